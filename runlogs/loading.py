"""Files -> Run -> numbers: which files are logs, what a run's status, loss, time and settings are."""

import functools
import glob
import io
import json
import math
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

from runlogs.parsing import (
    BLOCK,
    COMPLETED,
    DEAD,
    LOSSES,
    MAX_KEYS,
    RUN_FILES,
    SCORES,
    Trace,
    number,
    open_file,
    parse_log,
    parse_metrics,
    parse_object,
    parse_record,
    parse_score,
    read_text,
    times,
)


@dataclass
class Run:
    """One run folder or log file; `source` names the file that the trace is from, None if there is nothing in it."""

    path: Path
    source: str | None
    trace: Trace
    config: dict


def read_run(path, keep_rows=True, loss_key=None):
    """Run of the folder `path`."""
    log = read_log(path / "log.txt", keep_rows, loss_key).trace if (path / "log.txt").is_file() else Trace()
    trace = Trace()
    if (path / "metrics.jsonl").is_file():
        with io.TextIOWrapper(open_file(path / "metrics.jsonl"), encoding="utf-8-sig", errors="replace") as file:
            trace = parse_metrics(iter(lambda: file.readline(BLOCK), ""))
    odd = [name for name in RUN_FILES if (path / name).exists() and not (path / name).is_file()]
    source = "log.txt" if log.rows or log.end else None
    source = "metrics.jsonl" if trace.rows or trace.end else source
    if source == "log.txt":
        log.notes = [*trace.notes, "read from log.txt: metrics.jsonl is missing or holds no step", *log.notes]
        trace = log
    trace.header, trace.parts, trace.code_hash = log.header, log.parts, log.code_hash
    for line in read_text(path / "hellaswag.jsonl").splitlines():
        if score := parse_score(parse_record(line) or {}):
            trace.add_score(score)
    config = parse_object(text := read_text(path / "config.json"))
    trace.notes += ["config.json is no JSON object and was left out"] if text and not config else []
    if not isinstance(config.get("settings", {}), dict):
        trace.note("the settings of config.json are no object and were left out")
    trace.notes += [f"{', '.join(odd)} left out: no regular file"] if odd else []
    return Run(path, source, trace, config)


def read_log(path, keep_rows=True, loss_key=None):
    """Run of the log file `path`."""
    with open_file(path) as file:
        return Run(path, path.name, parse_log(file, keep_rows, loss_key, path.name), {})


LOG_NAMES = re.compile(r".+\.(txt|log|out|stdout)(\.gz)?", re.I)  # what is looked for in folders


def find_logs(path, depth=50, links=None):
    """Run folders and LOG_NAMES in the folder `path` and below, in the order of their names. FIFOs and devices of such
    names are listed: reading them says what they are. Links to folders are not followed; they go to `links`."""
    if (path / "metrics.jsonl").is_file() or (path / "log.txt").is_file():
        return [path]
    found = []
    for entry in sorted(path.iterdir(), key=natural):
        if entry.is_dir() and not entry.is_symlink():
            found += find_logs(entry, depth - 1, links) if depth else []
        elif entry.is_dir():
            links.append(entry) if links is not None else None
        elif LOG_NAMES.fullmatch(entry.name) and entry.name != "logs.txt" and entry.exists():
            found.append(entry)
    return found


def expand(names, links=None):
    """Paths of all logs that files, folders and globs name, each once. FileNotFoundError if a name leads to none.
    `links` takes the links to folders, which are not followed."""
    found = {}
    for name in names:
        hits = [Path(name)] if os.path.exists(name) else [Path(hit) for hit in sorted(glob.glob(name, recursive=True))]
        logs = [log for hit in hits for log in (find_logs(hit, links=links) if hit.is_dir() else [hit] * hit.exists())]
        if not logs:
            what = "holds no log: expected run folders, *.txt or *.log, also *.out and *.gz" if hits else "is not there"
            raise FileNotFoundError(f"'{name}' {what}")
        found |= {os.path.abspath(log): log for log in logs}
    return list(found.values())


def read_each(paths, keep_rows=False, keep_source=False, loss_key=None):
    """Runs of log files and run folders, one after the other; one that cannot be read becomes a Run with a note that
    says why. Records without loss and sources are dropped unless a command needs them: 1,500 public logs hold a
    gigabyte of them. keep_rows="stages" keeps the times of the stages. `loss_key` names what counts as
    val_loss; ValueError if no record has it."""
    names, keys, held = [*map(str, paths)], {}, loss_key is None
    if len(paths) > 20 and sys.stderr.isatty():
        from tqdm import tqdm

        paths = tqdm(paths, unit="log", leave=False)
    for path in paths:
        yield (run := load_one(path, keep_rows, keep_source, loss_key))
        if not held:
            held = run.trace.loss_key == loss_key
            last = [row for rows in run.trace.trials for row in rows[-1:]]
            keys |= dict.fromkeys(key.removesuffix("_raw") for row in last for key in row
                                  if is_score(key) and number(row[key]) is not None)
    if not held:
        where = names[0] if len(names) == 1 else f"{len(names)} logs"
        listed = f"they hold {', '.join([*keys][:12])}" if keys else "they hold no loss"
        raise ValueError(f"--loss-key '{loss_key}': no record of {where} has it; {listed}")


def is_score(key):
    return "loss" in key or "bpb" in key


def load(paths, keep_rows=False, keep_source=False, loss_key=None):
    return list(read_each(paths, keep_rows, keep_source, loss_key))


def choose_loss(trace, key):
    """Make `key` the val_loss of all records; what was val_loss is val_loss_raw, and alone where a record lacks it."""
    for row in (*(row for rows in trace.trials for row in rows), trace.end):
        if "val_loss" in row and key != "val_loss":
            row["val_loss_raw"] = row.pop("val_loss")
        if number(row.get(key)) is not None:
            row["val_loss"], trace.loss_key = row[key], key
    lacking = sum("val_loss" not in rows[-1] for rows in trace.trials if not rows[-1].keys().isdisjoint(VALIDATIONS))
    if lacking:
        trace.note(f"the last validation of {lacking} trial(s) has no {key}: no final loss is known of them")


def load_one(path, keep_rows=True, keep_source=True, loss_key=None):
    try:
        run = (read_run if path.is_dir() else read_log)(path, keep_rows, loss_key)
        choose_loss(run.trace, loss_key) if loss_key else None
    except OSError as error:
        return Run(path, None, Trace(notes=[f"cannot be read: {error.strerror or error}"]), {})
    run.trace.parts = run.trace.parts if keep_source else dict.fromkeys(run.trace.parts, "")
    if keep_rows == "stages":
        keep_stages(run.trace)
    return run


def keep_stages(trace):
    """Keep the time of each stage, and of the records those that hold a loss, and the last."""
    for i, rows in enumerate(trials := trace.trials):
        trace.stage_ms.append(stage_times(rows, trace.header))
        trials[i] = [row for row in rows[:-1] if not row.keys().isdisjoint(LOSSES)] + rows[-1:]
    trace.earlier, trace.rows = trials[:-1], trials[-1] if trials else []


VALIDATIONS = (*SCORES, "val_loss_raw")  # a record of one of these is a validation


def folders(path):
    """Folders inside `path`, in natural order."""
    return sorted((entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else [], key=natural)


def natural(name):
    """Sort key that puts run_2 before run_10."""
    return [(len(s), s) if s.isdecimal() else (0, s) for s in re.split(r"(\d+)", getattr(name, "name", name))]


def load_experiment(log_dir, name):
    """All runs in log_dir/name. ValueError if `name` leads out of `log_dir`, FileNotFoundError if no run is there."""
    if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"--experiment_name must name a folder inside '{log_dir}', not '{name}'")
    path, log_dir = Path(log_dir) / name, Path(log_dir)
    if not path.is_dir():
        known = [p.name for p in folders(log_dir)]
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise FileNotFoundError(f"no experiment '{name}' in '{log_dir}'; available: {listed or 'none'}")
    runs = [load_one(p) for p in folders(path) if any((p / name).is_file() for name in RUN_FILES[:3])]
    if not runs:
        raise FileNotFoundError(f"no run in '{path}': expected folders that hold one of {', '.join(RUN_FILES[:3])}")
    return runs


def latest(rows, key):
    """Last number that the rows give for `key`, or None."""
    return next((row[key] for row in reversed(rows) if number(row.get(key)) is not None), None)


def device_of(run):
    """Device name from config.json, else from log.txt's header: one GPU for each process, one CPU for all of them."""
    hardware, world_size = run.config.get("hardware"), run.config.get("world_size")
    name = hardware.get("name") if isinstance(hardware, dict) else hardware
    if not isinstance(name, str):
        return run.trace.header.get("device")
    shared = not isinstance(world_size, int) or (isinstance(hardware, dict) and hardware.get("device") == "cpu")
    return name if shared else times(name, world_size)


def settings_of(run):
    """Settings of one of our runs, from config.json or else from its log's line about them."""
    found = run.config.get("settings") or parse_object(run.trace.header.get("settings") or "")
    return found if isinstance(found, dict) else {}


def balance_of(load):
    """How evenly the experts of a layer are loaded: the number of experts with even loads of the same entropy, largest
    / mean, standard deviation / mean (CV), and how many have less than 1/20 of the mean (dead)."""
    mean = sum(load) / len(load)
    ratios = [share / mean for share in load]  # 1: even
    entropy = math.log(len(load)) - sum(r * math.log(r) for r in ratios if r > 0) / len(load)
    return {"effective_experts": math.exp(entropy), "max_over_mean": max(ratios), "cv": statistics.pstdev(ratios),
            "dead": sum(r < DEAD for r in ratios)}


def router_numbers(run):
    """The last report of the routers, the worst of all layers, and the sum of the dead; None without a report."""
    if not run.trace.routers:
        return None
    last = run.trace.routers[-1]
    layers = [balance_of(load) for load in last["load"]]
    effective = [layer["effective_experts"] for layer in layers]
    return {"step": last["step"], "layers": last["layers"], "experts": len(last["load"][0]),
            "worst_layer": last["layers"][effective.index(min(effective))], "effective_experts": min(effective),
            **{key: max(layer[key] for layer in layers) for key in ("max_over_mean", "cv")},
            "dead": sum(layer["dead"] for layer in layers), "dropped": last["dropped"]}


def accuracy(score, key):
    """(accuracy, its standard error) in percent."""
    p = score[key]
    return 100 * p, 100 * math.sqrt(p * (1 - p) / score["tasks"])


def accuracies(run):
    """[(step, accuracy per token, its standard error)] of a run's HellaSwag scores."""
    scores = sorted(run.trace.scores.values(), key=lambda score: score["step"])
    return [(score["step"], *accuracy(score, "per_token")) for score in scores]


def changes_of(run):
    """What was changed when the run was resumed, a sentence for each time."""
    return [f"changed on resume at step {step}: {words}" for step, words in run.trace.changes]


def planned_steps(run):
    """Steps of a run by its settings, or None; with --max-seconds those that the last pace leaves time for."""
    settings, keys = settings_of(run), ("train_time_ms", "step_ms")
    if not (limit := number(settings.get("max_seconds"))):
        return number(settings.get("iterations"))
    timed = [row for row in run.trace.rows if all(number(row.get(key)) for key in keys)]
    left = (1000 * limit - timed[-1][keys[0]]) / timed[-1][keys[1]] if timed else math.nan
    return timed[-1]["step"] + max(0, int(left)) if math.isfinite(left) else None


def summarize(run):
    """Numbers of a run folder as a flat dict, None where unknown. `val_loss` and `val_bpb` are of one validation, that
    of the closing record or else the last. `tokens_per_s` without a closing record is the average so far."""
    rows, end = run.trace.rows, run.trace.end
    known = {key: value for key, value in end.items() if number(value) is not None}
    vals = [row for row in [*rows, known] if number(row.get("val_loss")) is not None]
    final = vals[-1] if vals else {}
    good = [row for row in vals if math.isfinite(row["val_loss"])]
    best = min(good, key=lambda row: row["val_loss"], default={})
    step, time_ms, tokens = (known.get(key, latest(rows, key)) for key in ("step", "train_time_ms", "tokens"))
    status = f"running or killed at step {step}" if rows else "no step logged"
    status = str(end.get("status", "ended")) if end else status
    rate = tokens / time_ms * 1000 if tokens and time_ms else None
    extra = ("peak_memory_mib", "params_total", "params_active", "first_step_s", "target_step", "target_time_ms")
    return {
        "run_id": run.path.name,
        "path": str(run.path),
        "source": run.source,
        "status": status,
        "completed": status in COMPLETED,
        "step": step,
        "iterations": known.get("iterations", latest(rows, "iterations") or planned_steps(run)),
        "val_loss": final.get("val_loss"),
        "val_bpb": number(final.get("val_bpb")),
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step", step if best else None),
        "train_time_ms": time_ms,
        "step_avg_ms": latest(rows[-1:], "step_avg_ms") or (step and time_ms and time_ms / step) or None,
        "tokens": tokens,
        "tokens_per_s": known.get("tokens_per_s", rate),
        **{key: known.get(key) for key in extra},
        "routers": router_numbers(run),
        "hellaswag": max(run.trace.scores.values(), key=lambda s: s["step"], default=None),
        "torch": run.config.get("torch") or run.trace.header.get("torch"),
        "device": device_of(run),
        "notes": run.trace.notes + changes_of(run),
    }


@functools.cache
def files_being_written():
    """Paths of files that processes of this machine have open for writing; none where /proc does not tell."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            flags = re.search(r"flags:\s*(\d+)", Path(link.replace("/fd/", "/fdinfo/")).read_text())
            found |= {os.readlink(link)} if flags and int(flags[1], 8) & os.O_ACCMODE else set()
        except OSError:  # closed meanwhile, or another user's
            continue
    return found


def off_beat(rows):
    """Whether the last record is a validation out of turn: so ends a run that chooses its end, a killed one hardly."""
    steps = [row["step"] for row in rows if not row.keys().isdisjoint(VALIDATIONS)]
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False) if b > a]
    return len(gaps) > 1 and rows[-1]["step"] == steps[-1] and (steps[-1] - steps[0]) % gaps[0] != 0


def trial_status(rows, end=None):
    """"complete", "nan", "error" or "died" for the records of one trial; `end`: what is known of the end of the run."""
    last = rows[-1]
    if any(number(last.get(key)) is not None and not math.isfinite(last[key]) for key in (*LOSSES, *SCORES)):
        return "nan"
    status = str((end or {}).get("status", ""))
    by_itself = status.startswith("stopped at") if end else off_beat(rows)
    validated = not last.keys().isdisjoint(VALIDATIONS)
    if validated and (last["step"] == last.get("iterations") or by_itself):
        return "complete"
    llmc = last.get("iterations") is None and validated and "train_time_ms" not in last and not end
    return "complete" if status in COMPLETED or llmc else status if status in ("nan", "error") else "died"


def status_of(run):
    """complete, died, nan, error, running (a process of this machine has the log open for writing), or not a log."""
    trace = run.trace
    if not trace.trials and not trace.end:
        started = run.config or (trace.code_hash and trace.header.get("torch"))
        status = "died" if started else "not a log"
    else:
        said = trace.end.get("status")
        ended = "complete" if said == "done" else "error" if said == "error" else "died"
        status = trial_status(trace.rows, trace.end) if trace.rows else ended
    names = ("lock", "metrics.jsonl", "log.txt") if run.path.is_dir() else ("",)
    if status == "died" and any(os.path.realpath(run.path / name) in files_being_written() for name in names):
        return "running"
    return status


def trial_numbers(rows, end=None):
    """Final (None where the last one lacks it) and best validation, time, last step and average of one trial."""
    vals = [row for row in rows if any(number(row.get(key)) is not None for key in VALIDATIONS)]
    good = [row for row in vals if math.isfinite(number(row.get("val_loss", math.inf)) or math.inf)]
    best = min(good, key=lambda row: row["val_loss"], default={})
    bpb = [row["val_bpb"] for row in vals if number(row.get("val_bpb")) is not None]
    step, time_ms = rows[-1]["step"] if rows else None, latest(rows, "train_time_ms")
    average = latest(rows[-1:], "step_avg_ms")
    return {
        "status": trial_status(rows, end) if rows else "died",
        "steps": step,
        "max_step": latest(rows, "iterations"),
        "final_val_loss": vals[-1].get("val_loss") if vals else None,
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step"),
        "final_val_bpb": bpb[-1] if bpb else None,
        "best_val_bpb": min((value for value in bpb if math.isfinite(value)), default=None),
        "train_time_s": None if time_ms is None else time_ms / 1000,
        "step_avg_ms": average or (time_ms / step if time_ms and step else None),
    }


def why_no_loss(rows):
    """Why a trial that is complete has no final loss, and what helps."""
    other = [key for key in rows[-1] if is_score(key) and re.match(r"(.*\.)?val(?!_loss_raw)", key)]
    return "no val_loss in its last record" + (f"; --loss-key {other[0]} takes what it has" if other else "")


def crossing(rows, target):
    """{"step", "train_time_s"} of the first validation at or below the target, None without one."""
    for row in rows:
        if (loss := number(row.get("val_loss"))) is not None and loss <= target:
            time_ms = number(row.get("train_time_ms"))
            return {"step": row["step"], "train_time_s": time_ms and time_ms / 1000}
    return None


def counted(number, noun):
    return f"{number} {noun}{'s' * (number != 1)}"


def describe(run, target=None):
    """Numbers of a run as `show` gives them, None: unknown; those of the last trial, and all under trial_runs."""
    trace, header, old = run.trace, run.trace.header, summarize(run)
    trials = [trial_numbers(rows, trace.end_of(i)) for i, rows in enumerate(trace.trials)] or [trial_numbers([])]
    broken = [str(i) for i, trial in enumerate(trials[:-1], 1) if trial["status"] != "complete"]
    notes = old["notes"] + ([f"incomplete trials: {', '.join(broken)}"] if broken else [])
    notes += [f"the clock was set back {counted(trace.resets, 'time')}"] if trace.resets else []
    last = trials[-1]
    if last["status"] == "complete" and last["max_step"] and last["steps"] < last["max_step"]:
        notes.append(f"ended by itself at step {last['steps']} of {last['max_step']}")
    if run.source == "metrics.jsonl" or not trace.rows:
        last = {**last, "steps": old["step"], "max_step": old["iterations"], "final_val_loss": old["val_loss"]}
        last["train_time_s"] = None if old["train_time_ms"] is None else old["train_time_ms"] / 1000
    status = status_of(run)
    return {
        "path": str(run.path),
        "run_id": run.path.name if run.path.is_dir() else run.path.stem,
        "era": trace.era or None,
        **last,
        "status": status,
        "trials": len(trace.trials),
        "peak_allocated_mib": number(trace.end.get("peak_memory_mib")),
        "peak_reserved_mib": number(trace.end.get("peak_reserved_mib")),
        "target": target,
        "target_crossing": crossing(trace.rows, target) if target is not None else None,
        "tokens": old["tokens"],
        "data_tokens": header.get("train_tokens"),
        "params_total": old["params_total"] or header.get("params_total"),
        "params_active": old["params_active"],
        **{key: old[key] for key in ("routers", "hellaswag")},
        **{key: header.get(key) for key in ("python", "cuda", "triton", "driver", "world_size", "seed", "date")},
        "torch": old["torch"],
        "gpus": old["device"],
        "gpu_count": header.get("gpu_count"),
        "code_hash": trace.code_hash,
        "parts": list(trace.parts),
        "warnings": notes,
        "extras": extras_of(run),
        "reason": (trace.reason or "it holds no step line") if status == "not a log" else None,
        "trial_runs": trials if len(trials) > 1 else [],
    }


SHOWN = ("step", "iterations", *LOSSES, *SCORES, "train_time_ms", "step_avg_ms", "tokens")  # by lines of their own


def extras_of(run):
    """The other numbers of the last validation of a log: {key: number}."""
    if run.source == "metrics.jsonl":
        return {}
    rows = run.trace.rows or [run.trace.end]  # an excerpt may hold the end only
    last = next((row for row in reversed(rows) if not row.keys().isdisjoint(VALIDATIONS)), rows[-1])
    return {key: value for key, value in last.items() if key not in SHOWN and number(value) is not None}


def differing(runs):
    """Names of the settings in config.json that are not the same in all runs."""
    settings = [found for run in runs if (found := settings_of(run))]
    names = dict.fromkeys(name for found in settings for name in found if name != "run_id")
    return [name for name in names if len({json.dumps(found.get(name), sort_keys=True) for found in settings}) > 1]


def step_times(rows):
    """[(step, ms of that step)] from the clock's differences; none where the clock was set back."""
    timed = [(row["step"], row["train_time_ms"]) for row in rows if number(row.get("train_time_ms")) is not None]
    pairs = zip(timed, timed[1:], strict=False)
    pairs = [pair for pair in pairs if math.isfinite(pair[1][1] - pair[0][1])]
    return [(b, (y - x) / (b - a)) for (a, x), (b, y) in pairs if b > a and y >= x]


AFTER = "after the last step"  # of the clock: what runs on until the last validation


def gaps_of(rows):
    """[(step before, step, ms between)] of the records with a time, the first from step 0 at 0 ms: their sum is the
    training time. Where the clock was set back it begins anew."""
    found, before, at = [], 0, 0.0
    for row in rows:
        ms = number(row.get("train_time_ms"))
        if ms is None or not math.isfinite(ms):
            continue
        found, at = (found, at) if ms >= at / 2 else ([], 0.0)
        found.append((before, row["step"], ms - at))
        before, at = row["step"], ms
    return found


def stage_times(rows, header):
    """{"logged" | "quarters": {stage: (ms, steps)}} of the stages that a trial's log tells, of quarters of all."""
    gaps, last = gaps_of(rows), rows[-1]["step"]
    if not gaps:
        return {}
    quarters = [(-(-last * i // 4), f"{25 * i - 25}-{25 * i} % of the steps") for i in (1, 2, 3, 4)]
    spans = {"logged": logged_stages(rows, header), "quarters": quarters}
    return {kind: shares_of(gaps, found) for kind, found in spans.items() if found}


def logged_stages(rows, header):
    """[(last step, name)] of the stages: by batch_tokens and seq_len of the records, else by the ends in the log."""
    known = [(row["step"], f"{row['batch_tokens']} tokens a step, seq_len {row.get('seq_len')}")
             for row in rows if "batch_tokens" in row]
    ends = sorted({int(word) for word in re.findall(r"\d{1,15}", header.get("stage_ends", ""))} - {0})
    known = known or [(end, f"stage {i}") for i, end in enumerate(ends, 1)]
    following = zip(known, [*known[1:], (0, None)], strict=False)
    return [stage for stage, after in following if stage[1] != after[1]]


def shares_of(gaps, stages):
    """{stage: (ms, steps)}; a gap over the end of a stage is divided by the numbers of steps on both sides."""
    found, i, last = {}, 0, gaps[-1][1]
    for before, step, ms in gaps:
        if before == step and ms:
            add_time(found, AFTER if step == last else stages[i][1], ms, 0)
        at = before
        while at < step:
            while i < len(stages) - 1 and stages[i][0] <= at:
                i += 1
            end = min(step, stages[i][0]) if i < len(stages) - 1 else step
            add_time(found, stages[i][1], ms * (end - at) / (step - before), end - at)
            at = end
    return found


def add_time(found, name, ms, steps):
    name = name if name in found or len(found) < MAX_KEYS else "other stages"
    old_ms, old_steps = found.get(name, (0.0, 0))
    found[name] = old_ms + ms, old_steps + steps


def curve(rows, loss, x):
    """[(x, loss)] of the rows that have both; a nan or infinite loss stays and leaves a gap in the line."""
    pairs = [(number(row.get(x)), number(row.get(loss))) for row in rows]
    return [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a)]


def points_of(rows, most=400):
    """[[step, time_s, val_loss, train_loss]]: all validations, and about `most` of the other records with a loss."""
    rows = [row for row in rows if any(number(row.get(key)) is not None for key in LOSSES)]
    stride = max(1, len(rows) // most)
    keys = ("train_time_ms", "val_loss", "train_loss")
    finite = [[number(row.get(key)) for key in keys] for row in rows]
    finite = [[v if v is not None and math.isfinite(v) else None for v in row] for row in finite]
    points = [[row["step"], None if ms is None else ms / 1000, val, train]
              for row, (ms, val, train) in zip(rows, finite, strict=True)]
    return [point for i, point in enumerate(points) if point[2] is not None or i % stride == 0]
