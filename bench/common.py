"""What the benchmarks share: runs side by side, their records, statistics, tables, command line.

A sweep writes a line to runs.jsonl when a run ends: the same command goes on where an earlier one
ended. A bench imports this module, cards.py and the project's scripts, and no other bench. A job is a
NamedTuple whose first five fields identify it. Needs Linux or macOS.
"""
import argparse
import contextlib
import hashlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from datetime import date
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FACTS = ("date", "command", "data", "hardware", "torch", "commit", "trainer")  # of every record
NOT_FINITE = re.compile(r"(nan|inf|not finite).*: stopped")  # a trainer's words

# --- Records

def key_of(*parts) -> str:
    """A short name for flags and data: runs with another one do not count."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

def file_hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]

def read_lines(path: Path) -> list[dict]:
    """The objects of a .jsonl file; lines that a full disk or a kill cut off are left out."""
    found = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found

def read_runs(path: Path, job_type: type) -> dict[tuple, dict]:
    """The first five fields of a job -> its newest record."""
    names = job_type._fields[:5]
    return {tuple(run[name] for name in names): run for run in read_lines(path)}

def missing(jobs: list, runs: dict[tuple, dict]) -> list:
    """The jobs without a record, or whose record says that they failed."""
    return [job for job in jobs if runs.get(job[:5], {"problem": "not run"})["problem"]]

def append_run(path: Path, run: dict) -> None:
    """Adds a record, on a line of its own even after one that a full disk cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(run) + "\n")

def write_json(path: Path, value: dict, indent: int = 2) -> None:
    """Replaces the file as a whole: an interruption leaves the old or the new one."""
    temporary = path.with_suffix(".tmp")
    text = json.dumps(value, indent=indent)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)

# --- Runs

def run_command(command: list[str], children: set) -> tuple[str, float]:
    """Runs a program to its end: what went wrong in its own last sentence, "" if nothing did; and its CPU seconds."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    children.add(child)
    with child.stderr as stream:
        printed = stream.read().strip()
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    children.discard(child)
    said = re.split(r"^error: ", printed, flags=re.MULTILINE)[1:] or printed.splitlines()
    problem = " ".join(said[-1].split()) if said else f"ended with code {child.returncode}"
    return problem if child.returncode else "", used.ru_utime + used.ru_stime

def train(script: Path, flags: list[str], seed: int, children: set) -> tuple[list[dict], dict]:
    """Events of metrics.jsonl and config.json of a run, and in it cpu_s. RuntimeError: the trainer's sentence."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(script), *flags, "--seed", str(seed), "--log-dir", logs]
        problem, cpu_s = run_command(command, children)
        if problem:
            raise RuntimeError(problem)
        (folder,) = Path(logs).glob("*/*/")
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return read_lines(folder / "metrics.jsonl"), config | {"cpu_s": cpu_s}

def record(job, script: Path, measure: Callable[[], dict], may_diverge: bool = False) -> dict:
    """The record of a job: what was run, the numbers that `measure` finds, or the problem that kept it from any. With
    may_diverge a loss that is not finite is a result: the rate is too high."""
    began = time.perf_counter()
    run = job._asdict() | {"problem": "", "diverged": False, "date": str(date.today())}
    run["trainer"] = file_hash(script)
    try:
        run |= measure()
    except (RuntimeError, OSError, ValueError, LookupError) as error:
        run["diverged"] = may_diverge and bool(NOT_FINITE.search(str(error)))
        run["problem"] = "" if run["diverged"] else str(error) or repr(error)
    return run | {"wall_s": round(time.perf_counter() - began, 2)}

def about(config: dict, fingerprint: str | None = None) -> dict:
    """Where a run ran, from its config.json. RuntimeError: its data are others than expected."""
    data = config["data"]
    if fingerprint not in (None, data["fingerprint"]):
        raise RuntimeError(f"the data have changed: fingerprint {data['fingerprint']}, at the start "
                           f"of this call {fingerprint}")
    git = config["git"]
    changes = " with changes" if git["dirty"] else ""
    return {"torch": config["torch"],
            "hardware": f"{config['hardware']['name']}, {os.cpu_count()} CPU cores",
            "commit": (git["commit"] or "unknown")[:10] + changes,
            "data": f"{data['name']}, fingerprint {data['fingerprint']}"}

def step_ms(events: list[dict], config: dict) -> float:
    """ms per step over a run: each stage's median without its first step, weighted by its length."""
    times = [event["step_ms"] for event in events if "step_ms" in event]
    steps = config["settings"]["iterations"]
    ends = [0, *(round(end * steps) for end in config["settings"]["stage_ends"])]
    return sum((b - a) * median(times[a + 1:b]) for a, b in pairwise(ends)) / steps

def tokens_of(events: list[dict]) -> int:
    return max(event.get("tokens", 0) for event in events)

def run_all(jobs: list, workers: int, command: str, path: Path, execute: Callable,
            outcome: Callable[[dict], str]) -> int:
    """Runs the jobs, appends each to `path` when it ends, and returns how many failed.
    An interruption ends those that are under way, which leaves no record of them."""
    children, failed = set(), 0
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(execute, job, children) for job in jobs]
        try:
            for number, future in enumerate(as_completed(futures), 1):
                run = future.result()
                append_run(path, run | {"command": command})
                failed += bool(run["problem"])
                print(f"[{number}/{len(jobs)}] {outcome(run)}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            started = [future for future in futures if not future.cancelled()]
            while wait(started, timeout=0.1).not_done:  # again: one may have been about to start
                for child in list(children):
                    child.kill()
            raise
    return failed

def micro_step(script, model, optimizer, batch, window, weights: list[float], place: tuple[int, int] = (0, 0)):
    """Forward and backward of some rows, (3, B, T), as in the script's `train`; their summed next-token loss. `place`:
    step and number of the micro-step, for the noise of routers."""
    inputs, targets, docs = batch
    targets, balance, noise = script.future_targets(targets, docs, len(weights) - 1), None, ()
    if hasattr(optimizer, "balance"):  # train_moe.py's
        balance = optimizer.balance
        noise = (balance.noise(*place, *inputs.shape) if balance else None,)
    if balance:
        model.noise_scale.fill_(script.noise_at(balance.s, place[0]))
    values = model(inputs, targets, docs, window, *noise)
    losses, sums = values[:len(weights)], values[len(weights):]
    loss = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    if balance:
        loss = loss + balance.add(sums, weights[0], optimizer.last_micro_step)
    loss.backward()
    return losses[0].detach()

def share_cores(jobs: int) -> None:
    """Each of the runs at the same time gets its share of the cores."""
    if jobs > 1:
        share = max(1, (os.cpu_count() or 1) // jobs)
        os.environ.setdefault("OMP_NUM_THREADS", str(share))

def warn_if_busy() -> None:
    """A second busy process makes a run up to 10 times slower."""
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the load average is {load:.1f}; times need an idle machine", file=sys.stderr)

def stop_group(child: subprocess.Popen, patience_s: float = 0) -> None:
    """Ends a process and what it started: SIGTERM if there is patience, at last SIGKILL."""
    signals = [(signal.SIGTERM, patience_s)] if patience_s else []
    for number, seconds in [*signals, (signal.SIGKILL, 10)]:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(child.pid, number)
            child.wait(seconds)

# --- Sweeps that decide by the losses so far what to run next
# A sweep has plan(found) -> {point: number of seeds}, job(point, seed), collect(runs) -> found, order(item) of (point,
# seed), and distance(point) from where the best is expected before anything is known.

Found = dict[tuple, dict[int, float]]  # point -> seed -> loss, infinite where the run diverged

def loss_of(run: dict) -> float:
    return math.inf if run["diverged"] else run["val_loss"]

def absent(sweep, found: Found) -> list[tuple[tuple, int]]:
    """The points and seeds that the plan calls for and that are not there."""
    todo = [(point, seed) for point, count in sweep.plan(found).items()
            for seed in range(count) if seed not in found.get(point, ())]
    return sorted(todo, key=sweep.order)

def foreseen(sweep, found: Found) -> list[tuple[tuple, int]]:
    """All runs to come, if further seeds change nothing and the best lies where it is expected."""
    guess, todo = {point: dict(losses) for point, losses in found.items()}, []
    while new := absent(sweep, guess):
        for point, seed in new:
            losses = guess.setdefault(point, {})
            unknown = 1000 + sweep.distance(point) ** 2
            losses[seed] = mean(losses.values()) if losses else unknown
        todo += new
    return todo

def run_rounds(sweep, job_type: type, file: Path, run_jobs: Callable[[list], int]) -> int:
    """Rounds of runs, until the plan is complete or a run fails; returns how many failed."""
    failed = 0
    while not failed:
        runs = read_runs(file, job_type)
        found = sweep.collect(runs)
        jobs = missing([sweep.job(*item) for item in absent(sweep, found)], runs)
        if not jobs:
            break
        later = len(foreseen(sweep, found)) - len(jobs)
        print(f"{len(jobs)} run(s), about {later} in later rounds", flush=True)
        failed = run_jobs(jobs)
    return failed

def unfinished(sweep, found: Found) -> list[str]:
    """A sentence about what is to come, if anything is."""
    left = len(foreseen(sweep, found))
    said = f"not finished: about {left} run(s) are to come; the same command goes on"
    return [said] if left else []

# --- Statistics

class Effect(NamedTuple):
    """Two or more values: mean, standard error, 95 % Student t interval."""
    n: int
    mean: float
    se: float
    low: float
    high: float

    def side(self, above: str, below: str, neither: str) -> str:
        """A word for an interval that lies above, below or around 0."""
        return above if self.low > 0 else below if self.high < 0 else neither

def effect(values: Iterable[float]) -> Effect | None:
    """None for fewer than two values, or where one is not finite."""
    from scipy.stats import t

    values = list(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return None
    center, se = mean(values), stdev(values) / len(values) ** 0.5
    half = float(t.ppf(0.975, len(values) - 1)) * se
    return Effect(len(values), center, se, center - half, center + half)

def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences one - other of the seeds that both have; of two infinities 0."""
    seeds = sorted(one.keys() & other.keys())
    return [0.0 if one[seed] == other[seed] else one[seed] - other[seed] for seed in seeds]

def ratios(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Ratios one / other of the seeds or rounds that both have."""
    return [one[seed] / other[seed] for seed in sorted(one.keys() & other.keys())]

def interval(e: Effect, form: str = "+.4f", unit: str = "") -> str:
    return f"{e.mean:{form}}{unit} (95 % interval {e.low:{form}} to {e.high:{form}}, n = {e.n})"

def difference(deltas: list[float]) -> str:
    """Mean, standard error and interval of paired differences in words."""
    if e := effect(deltas):
        return interval(e, unit=f" ± {e.se:.4f} nats")
    return f"{mean(deltas):+.4f} nats (n = {len(deltas)})" if deltas else "not measured"

def mean_sd(values: Iterable[float]) -> str:
    """Mean ± standard deviation."""
    values = list(values)
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")

# --- Report

def markdown(head: Sequence, rows: Iterable) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)

def aligned(rows: list[list[str]]) -> str:
    """A table of columns for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

def facts(runs: list[dict]) -> dict[str, str]:
    """What the records say of when, how and where, each different word once."""
    found = {}
    for name in FACTS:
        said = dict.fromkeys(str(run[name]) for run in runs if name in run)
        found[name] = ("`; `" if name == "command" else "; ").join(said) or "unknown"
    return found

def problem_lines(problems: list[str], runs: list[dict], script: str) -> str:
    """A list of problems; a trainer that changed between the runs is one."""
    if len({run["trainer"] for run in runs}) > 1:
        problems = [*problems, f"{script} has changed between these runs; use another --out for "
                    "the new one"]
    return "".join(f"- Problem: {line}\n" for line in problems)

def write_readme(out: Path, text: str) -> None:
    (out / "README.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {out}")

def panels(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of that many inches, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)

# --- Command line

def make_parser(doc: str, script: str = "") -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring; flags after -- go to the script."""
    usage = f"%(prog)s [options] [-- flags of {script}]" if script else None
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=form, usage=usage)
    if script:
        parser.add_argument("flags", nargs="*", help=f"after --: flags of {script} for all runs")
    return parser

def add_sweep_options(parser: argparse.ArgumentParser, place: str, seeds: int | None = 3,
                      quick: bool = True) -> None:
    """The options of every sweep; `place` names its folder under records/."""
    add = parser.add_argument
    add("--seeds", type=int, default=seeds, help="runs of each (default: %(default)s)")
    add("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    if quick:
        add("--quick", action="store_true", help="allow fewer seeds, to try it out")
    add("--list", action="store_true", help="print the plan and its time, and run nothing")
    add("--out", type=Path, metavar="DIR", help="folder of the results; name it to go on another "
        f"day (default: records/DATE_{place})")

def check_counts(args: argparse.Namespace, seeds: int = 3, quick: int = 1, **least: int) -> None:
    """Raises ValueError for too few seeds, jobs and other numbers."""
    low = quick if getattr(args, "quick", False) else seeds
    if args.seeds < low:
        hint = f"; fewer than {seeds} need --quick" if seeds > quick else ""
        raise ValueError(f"--seeds must be at least {low}, got {args.seeds}{hint}")
    for name, number in ({"jobs": 1} | least).items():
        if getattr(args, name) < number:
            given = getattr(args, name)
            raise ValueError(f"--{name} must be at least {number}, got {given}")

def default_out(place: str) -> Path:
    return ROOT / "records" / f"{date.today()}_{place}"

def words(text: str, kinds: Iterable[str], flag: str) -> list[str]:
    """The named kinds, in their own order. Raises ValueError for others."""
    given, kinds = text.split(","), list(kinds)
    for name in given:
        if name not in kinds:
            raise ValueError(f"{flag} {name}: must be one or more of {', '.join(kinds)}")
    return [name for name in kinds if name in given]

def whole_numbers(text: str, flag: str) -> list[int]:
    """64,128 -> rising numbers. Raises ValueError for what is no whole number above 0."""
    if wrong := [word for word in text.split(",") if not word.isdecimal() or not int(word)]:
        raise ValueError(f"{flag} {wrong[0]}: must be whole numbers above 0, such as 64,128,256")
    return sorted(set(map(int, text.split(","))))

def number(word: str) -> float:
    """1/4 or 0.25 -> 0.25; nan for what is no number."""
    try:
        return float(Fraction(word))
    except (ValueError, ZeroDivisionError):
        return math.nan

def exponents(text: str) -> list[int]:
    """1/2,1,2 -> -1, 0, 1. Raises ValueError for what is no power of two."""
    found = set()
    for word in text.split(","):
        x = number(word)
        if not x > 0 or not math.log2(x).is_integer():
            raise ValueError(f"--multipliers {word}: must be powers of two, such as 1/4,1/2,1,2,4")
        found.add(round(math.log2(x)))
    return sorted(found)

def power(k: int) -> str:
    """2**k as people write it: 1/4, 1, 8."""
    return str(Fraction(2) ** k)

def refuse_own(given: Iterable[str], own: dict[str, str]) -> None:
    """Raises ValueError for flags after -- that the sweep itself sets."""
    for name in sorted(own.keys() & set(given)):
        instead = f"; use {own[name]}" if own[name] else ""
        raise ValueError(f"--{name.replace('_', '-')} after --: every run gets its own{instead}")

def given(script, flags: Iterable[str]) -> dict:
    """What a command line of a trainer, a module, sets itself: name -> value. Exits where it is wrong."""
    def dashed(flag: str) -> str:
        name, equals, value = flag.partition("=")
        return name.replace("_", "-") + equals + value if flag.startswith("--") else flag

    return vars(script.build_parser().parse_args([*map(dashed, flags)]))

def parsed(script, flags: Iterable[str], what: str = "", world_size: int = 1):
    """Settings of a run of a trainer, a module. Raises ValueError with one line."""
    try:
        return script.parse_settings([*flags], world_size)[0]
    except ValueError as error:
        place = f"{what}{script.__name__}.py"
        raise ValueError(f"{place}: {' '.join(str(error).split())}") from error

def effort(amount: float, seconds: list[float], guess: float | None, jobs: int, unit: str = "each") -> str:
    """The time that runs will take by the median of finished ones, or by a guess."""
    if not seconds and guess is None:
        return "time unknown: no run has ended yet"
    each = median(seconds) if seconds else guess
    source = "measured" if seconds else "a guess"
    return (f"about {amount * each / jobs / 60:.0f} min: {each:.0f} s {unit} ({source}), "
            f"{jobs} at a time")

def show_plan(jobs: list, todo: list, label: Callable[[tuple], str]) -> None:
    """How many of the runs with each label are done."""
    total, left = Counter(map(label, jobs)), Counter(map(label, todo))
    for name, count in total.items():
        print(f"{count - left[name]} of {count} done  {name}")

def finish(run: Callable[[], int], report: Callable[[], object]) -> int:
    """Runs what is missing and writes the report, also where the runs are interrupted; the exit code 0.
    RuntimeError: runs failed."""
    try:
        failed = run()
    finally:
        report()
    if failed:
        raise RuntimeError(f"{failed} run(s) failed, see above; the same command runs them again")
    return 0

def command_line(script: str, parse: Callable, work: Callable[[argparse.Namespace, str], int],
                 argv: list[str] | None = None, resumes: bool = True) -> int:
    """Exit code of work(arguments, command); errors in one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        return work(parse(argv), shlex.join(["python", f"bench/{script}.py", *argv]))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted" + "; the same command goes on" * resumes, file=sys.stderr)
        return 130

def start(main: Callable[[], int]) -> None:
    """Ends this process with main's exit code; a time limit ends the runs under way, too."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
