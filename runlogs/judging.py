"""Statistics of groups of runs. scipy is imported where it is used: it takes longer than reading a log."""

import json
import math
import statistics

from runlogs.arms import OWN_NAME, conditions_of, session_of
from runlogs.curves import AXES, equal_points, loss_of
from runlogs.loading import (
    AFTER,
    changes_of,
    counted,
    latest,
    load_one,
    settings_of,
    summarize,
    trial_numbers,
)
from runlogs.parsing import SELF, number


def mean_sd(values):
    """(mean, sample sd with n - 1), None where there are too few values."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return (statistics.mean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)


def mean_interval(values, confidence=0.95):
    """Mean of one value a run and its t interval: {"n", "mean", "ci_low", "ci_high"}, without bounds for one run."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    n, (mean, sd) = len(values), mean_sd(values)
    if sd is None:
        return {"n": n, "mean": mean, "ci_low": None, "ci_high": None}
    from scipy.stats import t

    half = float(t.isf((1 - confidence) / 2, n - 1)) * sd / math.sqrt(n)
    return {"n": n, "mean": mean, "ci_low": mean - half, "ci_high": mean + half}


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
    step = mean_interval([trial_numbers(s.rows)["step_avg_ms"] for s in samples])
    return {"n": len(samples), "mean_val_loss": loss, "sd_val_loss": loss_sd, "mean_time_s": time_s,
            "sd_time_s": time_sd, "mean_step_ms": step["mean"], "step_ms_ci_low": step["ci_low"],
            "step_ms_ci_high": step["ci_high"], "steps": steps}


def target_numbers(samples, target, alpha=0.01):
    """What the losses say about the target."""
    losses = [s.loss for s in samples]
    n, (mean, sd) = len(losses), mean_sd(losses)
    p = below_target(losses, target)
    needed = runs_needed(target - mean, sd, alpha) if sd else None
    value = (target - mean) * math.sqrt(n)
    return {"target": target, "alpha": alpha, "p_value": p, "passed": p is not None and p < alpha,
            "t": (mean - target) * math.sqrt(n) / sd if sd else None,
            "sigma_rule": {"value": value, "passed": value >= SIGMA_RULE}, "runs_needed": needed,
            "more_runs": None if needed is None else max(0, needed - n),
            "detectable_margin": detectable_margin(n, sd, alpha) if sd else None}


def versions(samples):
    """{code version: samples}, most samples first; a version is as of arms.py."""
    found = {}
    for sample in samples:
        found.setdefault(sample.code or "no source", []).append(sample)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def what_differs(a, b):
    """A few words on how the version of run b differs from that of run a, as arms.py says: settings, definitions."""
    from runlogs.sources import compare_parts

    a, b = (run if any(run.trace.parts.values()) else load_one(run.path) for run in (a, b))
    found = compare_parts(a.trace.parts, b.trace.parts)
    names = [s["name"] for s in changed_config(a, b) + found["settings"]]
    x, y = conditions_of(a), conditions_of(b)
    names += [name for name in x if x[name] != y[name]]
    units = [unit["name"] for unit in found["units"] if unit["change"] not in ("comments only", "constants only")]
    units += [m["name"] for m in found["modules"] if m["change"] in ("moved", "renamed")]
    if not names + units:
        return next((note for note in found["notes"] if "text only" in note), "other text, no setting or definition")
    names = [name.removeprefix("setting ") for name in [*sorted(names, key=is_own_name), *units]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"other {', '.join(names[:4])}{more}"


def is_own_name(name):
    """Whether a setting is the seed or the name of a run, which say least."""
    return bool(OWN_NAME.fullmatch(name))


def version_warning(groups, most=5):
    """How the code versions of a group differ, a sentence; only the first `most` are compared with the first."""
    (first, its_samples), *others = list(groups.items())[:most]
    words = {key: what_differs(its_samples[0].run, group[0].run) for key, group in others}
    counts = [f"{len(groups[key])} of {key} ({text})" for key, text in words.items()]
    counts += [f"{len(groups) - most} more"] if len(groups) > most else []
    counts = ", ".join([f"{len(its_samples)} of {first}", *counts])
    return f"{len(groups)} code versions mixed: {counts}; see `logger.py diff` on one run of each"


def alike_warning(groups):
    """[a sentence] if sources of one version differ in what does not count."""
    count = sum(len({sample.run.trace.code_hash for sample in group}) for group in groups.values())
    words = "comments, blank lines, seeds or names of runs alone"
    return [f"{count} sources of {len(groups)} code version(s): the others differ in {words}"] * (count > len(groups))


def group_warnings(samples, dropped):
    """What makes the mean of a group doubtful."""
    found = []
    if len(groups := versions(samples)) > 1:
        found.append(version_warning(groups))
    found += alike_warning(groups)
    if samples and not any(sample.run.trace.code_hash for sample in samples):
        found.append("no log holds a source: that the runs are of one version is not shown")
    for what, values in (("hardware", {s.hardware for s in samples}),
                         ("numbers of processes", {s.processes for s in samples} - {None}),
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
        found.append(f"{counted(again, 'run')} with the seed of another one: no independent samples")
    if resets := sum(s.run.trace.resets > 0 for s in samples):
        found.append(f"the clock was set back in {counted(resets, 'run')}: the time before is left out")
    found += [f"{s.run.path.name}: {text}" for s in samples for text in changes_of(s.run)]
    return found + [f"left out: {text}" for text in dropped]


def stage_kind(groups):
    """"logged" if all runs tell their stages and all groups share one, else "quarters"."""
    told = [[s.stage_ms.get("logged") for s in samples if s.stage_ms] for samples in groups]
    names = [{name for found in runs if found for name in found if name != AFTER} for runs in told]
    return "logged" if all(map(all, told)) and set.intersection(*names) else "quarters"


def by_stage(samples, kind):
    """{stage: [(ms, steps) of each run]}, and of "all" of them; a run without a stage has spent no time in it."""
    runs = [s.stage_ms[kind] for s in samples if s.stage_ms]
    found = {name: [run.get(name, (0.0, 0)) for run in runs] for name in dict.fromkeys(n for run in runs for n in run)}
    found |= {AFTER: found.pop(AFTER)} if AFTER in found else {}
    return found | {"all": [tuple(map(sum, zip(*run.values(), strict=True))) for run in runs]}


def step_numbers(times):
    """{stage: mean_interval of the ms of a step} of what by_stage found: the mean of a run is one observation."""
    found = {name: [ms / steps for ms, steps in runs if steps] for name, runs in times.items()}
    return {name: mean_interval(values) for name, values in found.items() if values}


def step_means(times):
    """{stage: mean ms of a step} of what by_stage found."""
    return {name: found["mean"] for name, found in step_numbers(times).items() if name != "all"}


def saved_by_stage(a, b, test=True):
    """[{"stage", "a_s", "b_s", "difference", "ci_low", "ci_high"}] of what by_stage found of two groups: mean seconds
    of a run in each stage and how much more they are in b (Welch), at last in all of them."""
    rows, none = [], [(0.0, 0)]
    for name in [*(n for n in dict.fromkeys([*a, *b]) if n not in (AFTER, "all")), AFTER, "all"]:
        x, y = ([ms / 1000 for ms, _ in times.get(name, none * len(times["all"]))] for times in (a, b))
        if not x or not y or name not in a | b:
            continue
        interval = (welch(y, x) if test else None) or {}
        rows.append({"stage": name, "a_s": statistics.mean(x), "b_s": statistics.mean(y),
                     "difference": statistics.mean(y) - statistics.mean(x),
                     "ci_low": interval.get("ci_low"), "ci_high": interval.get("ci_high")})
    return rows


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


def opponent(cell, arm):
    """(the cell of a baseline arm that `cell` is compared with or None, why there is none): of those with its hardware
    and number of processes the one with the most steps. A baseline with fewer is the same code cut short."""
    if not arm.cells:
        return None, "no baseline"
    even = [c for c in arm.cells if not c.uneven]
    near = [c for c in even if all(None in pair or pair[0] == pair[1] for pair in
                                        ((c.hardware, cell.hardware), (c.processes, cell.processes)))]
    most = [c for c in near if c.steps == max(c.steps for c in near)]
    if len(most) == 1:
        return most[0], ""
    why = "several baselines of as many steps" if most else "no baseline with this hardware and number of processes"
    return None, f"{why}: {'; '.join(c.label for c in arm.cells[:5])}"


def gain_of(cell, other):
    """{"time_s", "ci_low", "ci_high", "percent", "percent_low", "percent_high", "n_record", "n_baseline"}: seconds that
    cell's mean time is below the other's (Welch), and that in percent of the other's (Welch on the logarithms). None
    without two times; intervals are None where a side has one run."""
    times = [[s.time_s for s in c.samples if s.time_s and s.time_s > 0] for c in (cell, other) if c]
    if len(times) < 2 or not all(times):
        return None
    new, old = times
    seconds = welch(old, new) or {}
    ratio = welch([math.log(t) for t in new], [math.log(t) for t in old]) or {}
    low, high = (100 * -math.expm1(ratio[key]) if ratio else None for key in ("ci_high", "ci_low"))
    mean, base = statistics.mean(new), statistics.mean(old)
    return {"time_s": base - mean, "ci_low": seconds.get("ci_low"), "ci_high": seconds.get("ci_high"),
            "percent": 100 * (1 - mean / base), "percent_low": low, "percent_high": high,
            "n_record": len(new), "n_baseline": len(old)}


def cell_numbers(cell):
    """A cell as a dict: what its runs share, their numbers and files."""
    facts = {key: getattr(cell, key) for key in ("label", "code", "hardware", "processes")}
    return {**facts, **group_numbers(cell.samples), "paths": [str(s.run.path) for s in cell.samples]}


def arm_numbers(arm):
    """An arm as a dict: numbers of all its runs unless they are a mixture, each cell, what was left out."""
    samples = arm.samples
    return {**group_numbers([] if arm.mixture else samples), "n": len(samples), "mixture": arm.mixture,
            "steps": sorted({s.steps for s in samples}), "cells": [cell_numbers(cell) for cell in arm.cells],
            "warnings": group_warnings(samples, arm.dropped)}


def difference_of(record, baseline):
    """Record minus baseline: {"val_loss", "train_time_s": Welch, "gain", "baseline": its cell, "why" there is none}."""
    cell = None if record.mixture else record.cells[0]
    other, why = opponent(cell, baseline) if cell else (None, record.mixture)
    found = {"baseline": other and other.label, "why": why, "val_loss": None, "train_time_s": None, "gain": None}
    if other:
        for key, name in (("val_loss", "loss"), ("train_time_s", "time_s")):
            found[key] = welch(*([getattr(s, name) for s in c.samples] for c in (cell, other)))
        found["gain"] = gain_of(cell, other)
    return found


def compared(record, baseline):
    """Samples of the session: of the record and of the baseline that it is compared with, else of all."""
    other = None if record.mixture else opponent(record.cells[0], baseline)[0]
    return [*record.samples, *(other or baseline).samples]


def session_numbers(samples):
    """{"order": "P B P", "interleaved", "first", "last"}: how record (P) and baseline (B) alternate, or None."""
    ordered = session_of(samples)
    if ordered is None:
        undated = sum(sample.date is None for sample in samples)
        return {"order": None, "interleaved": None, "first": None, "last": None, "undated": undated}
    letters = ["B" if sample.arm == "baseline" else "P" for sample in ordered]
    changes = sum(a != b for a, b in zip(letters, letters[1:], strict=False))
    return {"order": " ".join(letters), "interleaved": changes > 1 if changes else None,
            "first": ordered[0].date, "last": ordered[-1].date, "undated": 0}


def stats_numbers(evidence, target=None, alpha=0.01):
    """What `stats` says: record, baseline and their difference in numbers, the verdict (None: a mixture)."""
    record, baseline = evidence.arm("record"), evidence.arm("baseline")
    samples = record.samples
    test = None
    if target is not None:
        test = target_numbers(samples, target, alpha) if not record.mixture else no_verdict(target, alpha, record)
    return {**arm_numbers(record), "losses": [s.loss for s in samples], "times_s": [s.time_s for s in samples],
            "paths": [str(s.run.path) for s in samples],
            "versions": {key: group_numbers(group) for key, group in versions(samples).items()}, "test": test,
            "baseline": arm_numbers(baseline) if baseline.samples else None,
            "difference": difference_of(record, baseline) if baseline.samples else None,
            "session": session_numbers(compared(record, baseline)),
            "other_arms": {arm.name: arm_numbers(arm) for arm in evidence.arms if arm.name not in TWO},
            "notes": evidence.notes, "passed": test["passed"] if test else None}


TWO = ("record", "baseline")


def no_verdict(target, alpha, arm):
    """The test of a mixture: what was asked, and no answer."""
    keys = ("t", "p_value", "passed", "sigma_rule", "runs_needed", "more_runs", "detectable_margin")
    return {"target": target, "alpha": alpha, **dict.fromkeys(keys), "mixture": arm.mixture}


def compare_numbers(groups, dropped, mixtures=None):
    """{"groups", "pairs", "stages", "equal", "control"}: pairs are of the first group with each
    other one. `mixtures` {group: why it is a cell of a mixture}: such a group has a mean and no test."""
    first, *others = groups
    pairs, mixtures = [], mixtures or {}
    kind = stage_kind(groups.values())
    times = {name: by_stage(samples, kind) for name, samples in groups.items()}
    for name in others:
        why = mixtures.get(first) or mixtures.get(name) or ""
        a, b = groups[first], groups[name]
        pairs.append({"a": first, "b": name, "why": why,
                      "val_loss": None if why else welch([s.loss for s in b], [s.loss for s in a]),
                      "train_time_s": None if why else welch([s.time_s for s in b], [s.time_s for s in a]),
                      "sigma_rule": None if why else pairwise_rule(a, b),
                      "stages": saved_by_stage(times[first], times[name], not why)})
    equal = equal_points(list(groups.values()))
    for i, pair in enumerate(pairs):
        for point in (point for points in equal.values() for point in points if pair["why"]):
            point["intervals"][i] = None
    return {"groups": [{"name": name, "mixture": mixtures.get(name, ""), **group_numbers(samples), **sizes_of(samples),
                        "warnings": group_warnings(samples, dropped[name])} for name, samples in groups.items()],
            "pairs": pairs, "stages": {name: step_means(found) for name, found in times.items()},
            "step_ms": {name: step_numbers(found) for name, found in times.items()},
            "equal": equal, "equal_loss": {x: loss_of(groups.values(), x) for x in AXES},
            "control": control_numbers(groups)}


def changed_config(a, b):
    """Settings of two of our runs that differ, names and seeds aside."""
    old, new = settings_of(a), settings_of(b)
    names = [name for name in dict.fromkeys([*old, *new]) if name not in SELF and old.get(name) != new.get(name)]
    return [{"name": f"setting {name}", "a": json.dumps(old.get(name)), "b": json.dumps(new.get(name))}
            for name in names if old and new]


def effect_of(old, new):
    """{"val_loss" | "train_time_s" | "steps": {"a", "b", "difference", "test"}} of two arms; none over a mixture."""
    whole = [arm.samples if not arm.mixture else [] for arm in (old, new)]
    found = {}
    for key, name in (("val_loss", "loss"), ("train_time_s", "time_s"), ("steps", "steps")):
        x, y = ([getattr(s, name) for s in samples] for samples in whole)
        x_mean, y_mean = mean_sd(x)[0], mean_sd(y)[0]
        both = x_mean is not None and y_mean is not None
        found[key] = {"a": x_mean, "b": y_mean, "difference": y_mean - x_mean if both else None, "test": welch(y, x)}
    return {**found, "n_a": len(old.samples), "n_b": len(new.samples)}
