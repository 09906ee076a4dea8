"""Statistics of groups of runs. scipy is imported where it is used: it takes longer than reading a log."""

import hashlib
import json
import math
import re
import statistics
from array import array
from dataclasses import dataclass

from runlogs.curves import AXES, equal_points, loss_of
from runlogs.loading import (
    SELF,
    Run,
    changes_of,
    device_of,
    latest,
    load_one,
    settings_of,
    status_of,
    summarize,
    trial_numbers,
)
from runlogs.parsing import MAX_KEYS, number


@dataclass
class Sample:
    """One complete trial: what the statistics are made of."""

    run: Run
    rows: list[dict]
    loss: float
    time_s: float | None
    steps: int
    stage_ms: dict[str, array]


def samples_of(runs):
    """(samples, what was left out and why): complete trials with a finite loss, a trial that is in two files once."""
    found, dropped, seen = [], [], {}
    for run in sorted(runs, key=lambda run: run.trace.code_hash is None):  # a log before the console output of its run
        count = len(run.trace.trials)
        for i in range(count):
            name = f"{run.path.name}, trial {i + 1}" if count > 1 else run.path.name
            sample, why = sample_of(run, i, name, seen)
            found += [sample] if sample else []
            dropped += [f"{name}: {why}"] if why else []
        if not count and status_of(run) != "not a log":
            dropped.append(f"{run.path.name}: no step")
    return found, dropped


def sample_of(run, i, name, seen):
    """(Sample or None, reason) of trial i; `seen` maps the last validations of the trials so far to their names."""
    rows, last = run.trace.trials[i], i == len(run.trace.trials) - 1
    numbers = trial_numbers(rows, run.trace.end if last else None)
    if numbers["final_val_loss"] is None or numbers["status"] != "complete":
        return None, f"{numbers['status']} at step {numbers['steps']}"
    if not math.isfinite(numbers["final_val_loss"]):
        return None, f"nan at step {numbers['steps']}"
    vals = [(row["step"], row["val_loss"], number(row.get("train_time_ms"))) for row in rows if "val_loss" in row]
    if twin := seen.get((*vals[-2:],)):
        return None, f"the same run as {twin}"
    seen |= {(*vals[-2:],): name, (*vals[-1:],): name}  # the shorter key for a file that holds the last line only
    stages = run.trace.stage_ms[i] if run.trace.stage_ms else {}
    return Sample(run, rows, numbers["final_val_loss"], numbers["train_time_s"], numbers["steps"], stages), None


def mean_sd(values):
    """(mean, sample sd with n - 1), None where there are too few values."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return (statistics.mean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)


def below_target(losses, target):
    """p of the one-sided one-sample t-test that the mean is below the target; None unless two values differ."""
    if len(losses) < 2 or statistics.stdev(losses) == 0:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(losses, target, alternative="less").pvalue)


def runs_needed(margin, sd, alpha=0.01, most=100_000):
    """Smallest n with p < alpha for a mean that lies `margin` below the target with this sd; None if above `most`."""
    from scipy.stats import t

    if margin <= 0 or sd == 0:
        return None if margin <= 0 else 2
    low, high = 1, 2
    while t.sf(margin * math.sqrt(high) / sd, high - 1) >= alpha:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = t.sf(margin * math.sqrt(middle) / sd, middle - 1) < alpha
        low, high = (low, middle) if enough else (middle, high)
    return high


def detectable_margin(n, sd, alpha=0.01):
    """Smallest distance of the mean below the target that n runs with this sd show with p < alpha."""
    from scipy.stats import t

    return float(t.isf(alpha, n - 1)) * sd / math.sqrt(n)


def welch(a, b, confidence=0.95):
    """Welch's t-test of mean(a) - mean(b): difference, confidence interval, two-sided p, Cohen's d; None if too few."""
    a, b = ([v for v in values if v is not None and math.isfinite(v)] for values in (a, b))
    if min(len(a), len(b)) < 2 or not statistics.stdev(a) + statistics.stdev(b):
        return None
    from scipy.stats import ttest_ind

    test = ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(confidence)
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    difference = statistics.mean(a) - statistics.mean(b)
    low, high, p = map(float, (*interval, test.pvalue))
    return {"difference": difference, "ci_low": low, "ci_high": high, "confidence": confidence,
            "p_value": p, "cohens_d": difference / pooled}


SIGMA_RULE = 0.004  # track 3 knows the sd, 0.0013: z > 3 is (target - mean) * sqrt(n) >= 0.004
LOSS_PER_STEP = 0.000045  # track 3's worth of a step: 100 steps are 0.0045 of loss


def pairwise_rule(a, b):
    """Track 3's rule for samples b beating a: (loss difference + saved steps * 0.000045) / sqrt(1/n + 1/m)."""
    gain = mean_sd([s.loss for s in a])[0] - mean_sd([s.loss for s in b])[0]
    gain += (mean_sd([s.steps for s in a])[0] - mean_sd([s.steps for s in b])[0]) * LOSS_PER_STEP
    value = gain / math.sqrt(1 / len(a) + 1 / len(b))
    return {"value": value, "passed": value >= SIGMA_RULE}


def group_numbers(samples):
    """n, mean and sd of loss and time, steps of a list of samples."""
    (loss, loss_sd), (time_s, time_sd) = mean_sd([s.loss for s in samples]), mean_sd([s.time_s for s in samples])
    steps = sorted({s.steps for s in samples})
    step_ms = mean_sd([trial_numbers(s.rows)["step_avg_ms"] for s in samples])[0]
    return {"n": len(samples), "mean_val_loss": loss, "sd_val_loss": loss_sd, "mean_time_s": time_s,
            "sd_time_s": time_sd, "mean_step_ms": step_ms, "steps": steps}


def target_numbers(samples, target, alpha=0.01):
    """What the losses say about the target."""
    losses = [s.loss for s in samples]
    n, (mean, sd) = len(losses), mean_sd(losses)
    p = below_target(losses, target)
    needed = runs_needed(target - mean, sd, alpha) if sd else None
    value = (target - mean) * math.sqrt(n)
    return {"target": target, "alpha": alpha, "p_value": p, "passed": p is not None and p < alpha,
            "sigma_rule": {"value": value, "passed": value >= SIGMA_RULE}, "runs_needed": needed,
            "more_runs": None if needed is None else max(0, needed - n),
            "detectable_margin": detectable_margin(n, sd, alpha) if sd else None}


def versions(samples):
    """{code version: samples}, most samples first. A version is the source and, for our runs, the settings but seed and
    names."""
    found = {}
    for sample in samples:
        settings = {key: value for key, value in settings_of(sample.run).items() if key not in SELF}
        text = json.dumps(settings, sort_keys=True) if settings else ""
        key = sample.run.trace.code_hash or "no source"
        key += f"+{hashlib.sha256(text.encode()).hexdigest()[:6]}" if text else ""
        found.setdefault(key, []).append(sample)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


HARMLESS = {"only comments differ", "only seeds and names differ"}


def what_differs(a, b):
    """A few words on how the version of run b differs from that of run a: settings, definitions, seeds, comments."""
    from runlogs.sources import compare_parts

    a, b = (run if any(run.trace.parts.values()) else load_one(run.path) for run in (a, b))
    found = compare_parts(a.trace.parts, b.trace.parts)
    names = [s["name"] for s in changed_config(a, b) + found["settings"]]
    units = [unit["name"] for unit in found["units"] if unit["change"] not in ("comments only", "constants only")]
    if not names + units:
        return next((note for note in found["notes"] if "text only" in note), "only comments differ")
    names = [name for name in names if not re.search(r"seed|run_?id|run_?name", name, re.I)]
    if not names + units:
        return "only seeds and names differ"
    names = [name.removeprefix("setting ") for name in [*names, *units]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"other {', '.join(names[:4])}{more}"


def version_warning(groups, most=25):
    """How the code versions of a group differ, a sentence; only the first `most` are compared."""
    (first, its_samples), *others = list(groups.items())[:most]
    words = {key: what_differs(its_samples[0].run, group[0].run) for key, group in others}
    if set(words.values()) <= HARMLESS:
        return f"{len(groups)} sources: {', '.join(sorted(set(words.values())))}"
    counts = [f"{len(groups[key])} of {key} ({text})" for key, text in words.items()][:5]
    counts += [f"{len(groups) - 6} more"] if len(groups) > 6 else []
    counts = ", ".join([f"{len(its_samples)} of {first}", *counts])
    return f"{len(groups)} code versions mixed: {counts}; see `logger.py diff` on one run of each"


def group_warnings(samples, dropped):
    """What makes the mean of a group doubtful."""
    found = []
    if len(groups := versions(samples)) > 1:
        found.append(version_warning(groups))
    for what, values in (("hardware", {device_of(s.run) for s in samples}),
                         ("torch versions", {str(summarize(s.run)["torch"]) for s in samples}),
                         ("driver versions", {s.run.trace.header.get("driver") for s in samples}),
                         ("step counts", {s.steps for s in samples})):
        if len(values) > 1:
            found.append(f"mixed {what}: {', '.join(sorted(map(str, values)))}")
    if any(s.run.trace.end.get("status") == "target" or s.steps < (latest(s.rows, "iterations") or 0) for s in samples):
        found.append("runs that stopped by themselves before the last step: a stop chosen by the loss biases its mean")
    seeds = [(key, str(seed)) for key, group in groups.items() for s in group
             if (seed := settings_of(s.run).get("seed")) is not None]
    if again := len(seeds) - len(set(seeds)):
        found.append(f"{again} run(s) repeat the seed of another one: they are no independent samples")
    if resets := sum(s.run.trace.resets > 0 for s in samples):
        found.append(f"the clock was set back in {resets} run(s): their times leave out the steps before")
    found += [f"{s.run.path.name}: {text}" for s in samples for text in changes_of(s.run)]
    return found + [f"left out: {text}" for text in dropped]


def stage_medians(samples):
    """{stage: median ms of a step}, over all steps of all samples."""
    found = {}
    for stage, values in ((stage, ms) for sample in samples for stage, ms in sample.stage_ms.items() if stage):
        if stage in found or len(found) < MAX_KEYS:
            found.setdefault(stage, array("d")).extend(values)
    return {stage: statistics.median(values) for stage, values in found.items()}


def sizes_of(samples):
    """Parameters of the first run of a group: all, and those that a token meets."""
    return {key: summarize(samples[0].run)[key] for key in ("params_total", "params_active")}


# Settings that runs must share for their steps to a loss to be compared
COMPARED = "eval_tokens eval_seq_len eval_window batch_tokens stage_ends seq_len mtp".split()
SPENT = ("tokens", "step", "train_time_ms")  # what a loss costs


def not_comparable(a, b):
    """Why losses and steps of two of our runs cannot be compared, in words; "" if they can."""
    data = [run.config.get("data") for run in (a, b)]
    prints = [found.get("fingerprint") if isinstance(found, dict) else None for found in data]
    if None in prints:
        return "no config.json says which data"
    x, y = settings_of(a), settings_of(b)
    same = [name for name in COMPARED if name in x and name in y]
    differing = [f"{name} {x[name]} and {y[name]}" for name in same if x[name] != y[name]]
    return ", ".join(["other data"] * (prints[0] != prints[1]) + differing)


def reached(rows, loss):
    """Tokens, step and train_time_ms at which the validation loss came down to `loss`, in proportion
    between the validations around it; None if it did not, or that is not logged."""
    above = None
    for row in rows:
        if None in [number(row.get(key)) for key in ("val_loss", *SPENT)]:
            continue
        if row["val_loss"] <= loss:
            above = above or row
            fall = above["val_loss"] - row["val_loss"]
            share = (above["val_loss"] - loss) / fall if fall else 0
            return {key: above[key] + share * (row[key] - above[key]) for key in SPENT}
        above = row if math.isfinite(row["val_loss"]) else above
    return None


def control_numbers(groups):
    """Our runs against the first, the control: what each spent until the control's target loss, or
    else its last one; its step time over the control's; and the ratio at which the two would break
    even. {"refused": why} if they are not comparable; None unless each group is one of our runs."""
    samples = {name: found[0] for name, found in groups.items() if len(found) == 1}
    sources = {sample.run.source for sample in samples.values()}
    if len(samples) < len(groups) or sources != {"metrics.jsonl"}:
        return None
    first, *others = samples
    control = samples[first]
    for name in others:
        if why := not_comparable(control.run, samples[name].run):
            return {"refused": f"{first} and {name}: {why}"}
    loss = number(settings_of(control.run).get("target_loss")) or control.loss
    spent = {name: reached(sample.rows, loss) for name, sample in samples.items()}
    found = []
    for name, sample in samples.items():
        both = spent[first] and spent[name] and spent[name]["step"]
        timed = sample.steps and control.time_s and sample.time_s
        found.append({
            "name": name,
            "reached": spent[name],
            "step_time_ratio": timed and timed / sample.steps * control.steps / control.time_s,
            "break_even_ratio": spent[first]["step"] / spent[name]["step"] if both else None,
        })
    return {"loss": loss, "runs": found}


def compare_numbers(groups, dropped):
    """{"groups", "pairs", "stages", "equal", "control"}: pairs are of the first group with each
    other one."""
    first, *others = groups
    pairs = []
    for name in others:
        a, b = groups[first], groups[name]
        pairs.append({"a": first, "b": name, "val_loss": welch([s.loss for s in b], [s.loss for s in a]),
                      "train_time_s": welch([s.time_s for s in b], [s.time_s for s in a]),
                      "sigma_rule": pairwise_rule(a, b)})
    return {"groups": [{"name": name, **group_numbers(samples), **sizes_of(samples),
                        "warnings": group_warnings(samples, dropped[name])} for name, samples in groups.items()],
            "pairs": pairs, "stages": {name: stage_medians(samples) for name, samples in groups.items()},
            "equal": equal_points(list(groups.values())), "equal_loss": {x: loss_of(groups.values(), x) for x in AXES},
            "control": control_numbers(groups)}


def changed_config(a, b):
    """Settings of two of our runs that differ, names and seeds aside."""
    old, new = settings_of(a), settings_of(b)
    names = [name for name in dict.fromkeys([*old, *new]) if name not in SELF and old.get(name) != new.get(name)]
    return [{"name": f"setting {name}", "a": json.dumps(old.get(name)), "b": json.dumps(new.get(name))}
            for name in names if old and new]


def effect_of(old, new):
    """{"val_loss" | "train_time_s" | "steps": {"a", "b", "difference", "test"}} of the complete trials of groups."""
    a, b = (samples_of(runs)[0] for runs in (old, new))
    found = {}
    for key, name in (("val_loss", "loss"), ("train_time_s", "time_s"), ("steps", "steps")):
        x, y = ([getattr(s, name) for s in samples] for samples in (a, b))
        x_mean, y_mean = mean_sd(x)[0], mean_sd(y)[0]
        both = x_mean is not None and y_mean is not None
        found[key] = {"a": x_mean, "b": y_mean, "difference": y_mean - x_mean if both else None, "test": welch(y, x)}
    return {**found, "n_a": len(a), "n_b": len(b)}
