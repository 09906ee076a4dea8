"""Does a learning rate that is tuned at the smallest width serve at the largest? With muP, and without as the control.

    python bench/lr_transfer.py --list            # the plan and how long it takes; runs nothing
    python bench/lr_transfer.py --jobs 2          # widths 64, 128, 256 on a CPU; Muon, AdamW; 3 seeds where it counts
    python bench/lr_transfer.py --widths 256 --optimizers muon -- --preset gpu    # tunes one width, prints what to use

All peak learning rates are multiplied by powers of two. The smallest width is the base, where both parametrizations are
the same runs. First every multiplier gets one seed; where the best lies at the edge, the grid grows. Then all seeds are
run at each width's best multiplier, at its neighbours in the smallest and the largest width, and at the multiplier that
is best in the smallest: the transferred one. This repeats until nothing new is asked for.

Flags after ` -- ` change the proxy. With --preset among them there is no proxy: multiplier 1 is the preset's own rates.
Writes --out: runs.jsonl (a line for each finished run, at once), README.md and lr_transfer.png. The same command goes
on where an earlier one ended. The exit code is 1 if muP misses a criterion.

Regret is loss(transferred multiplier) - loss(best multiplier), nats per token, paired by seed. Depth, batch and number
of steps are the same at all widths: muP does not speak of them. Needs Linux or macOS.
"""
import argparse
import hashlib
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import command_line, effect, exit_code, missing, read_runs, run_all, train  # noqa: E402
from bench.moe import about, markdown  # noqa: E402

MAX_REGRET = 0.03  # nats per token at the largest width
# 400 steps: with fewer the loss hardly depends on the rate. One thread: several runs go side by side.
PROXY = (
    "--preset cpu --device cpu --data stdlib --no-compile --threads 1 --num-layers 2 --head-dim 32 --value-embeds 1 "
    "--batch-tokens 1024 --micro-tokens 1024 --seq-len 64 --max-doc-len 64 --window 64 --window-start 0 "
    "--eval-seq-len 64 --eval-tokens 131072 --iterations 400 --warmup-steps 20 --cooldown 0.4 --lr-floor 0"
)
ALWAYS = "--target-loss 0 --eval-every 0 --save-every 0 --no-save-last"
OPTIMIZERS = {"muon": "", "adamw": "--hidden-optimizer adamw"}
RATES = {"muon": "--muon-lr 0.04 --adam-lr 0.008", "adamw": "--hidden-lr 0.004 --adam-lr 0.016"}  # of the proxy
SECONDS = 10  # a run of the proxy at width 64, until one is measured
BASE, SCALINGS = "base", {"mup": "muP", "standard": "standard parametrization"}
EXTEND = 3  # factors of two by which the grid may grow at either end
OWN = {"width": "--widths", "mup": "--parametrizations", "base_width": "--widths", "base_head_dim": "--mup-flags",
       "mup_embedding": "--mup-flags", "hidden_optimizer": "--optimizers", "seed": "--seeds"}


# ----------------------------------------------------------------------------------------------------------------------
# Plan


class Series(NamedTuple):
    """Runs that differ in the multiplier and the seed alone."""

    optimizer: str
    scaling: str  # "base" at the smallest width, where both parametrizations are the same
    width: int


class Point(NamedTuple):
    """A series' runs with all peak rates multiplied by 2**k."""

    series: Series
    k: int


Found = dict[Point, dict[int, float]]  # point -> seed -> final validation loss, infinite where the run diverged


class Job(NamedTuple):
    """One run; the first five fields identify it."""

    optimizer: str
    width: int
    change: str  # flags beside the common ones
    seed: int
    key: str
    multiplier: str
    scaling: str
    common: tuple[str, ...]
    fingerprint: str
    script: str


class Sweep(NamedTuple):
    """What all runs of a call have in common; `key` tells their records from those of other flags and data."""

    script: Path
    common: tuple[str, ...]
    fingerprint: str  # of the data
    head_dim: int
    rates: dict[str, dict[str, float]]  # optimizer -> flag -> peak rate at multiplier 1
    scalings: tuple[str, ...]
    widths: tuple[int, ...]  # rising: the first is the base
    grid: tuple[int, ...]  # rising
    mup_flags: str
    seeds: int

    @property
    def key(self) -> str:
        parts = [self.script.name, self.common, self.fingerprint]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def series(self) -> list[Series]:
        return [Series(optimizer, scaling, width) for optimizer in self.rates for width in self.widths
                for scaling in ((BASE,) if width == self.widths[0] else self.scalings)]

    @property
    def reach(self) -> range:
        """All exponents to which the grid may grow."""
        return range(self.grid[0] - EXTEND, self.grid[-1] + EXTEND + 1)

    def rate_flags(self, optimizer: str, k: int) -> str:
        rates = " ".join(f"{flag} {rate * 2.0**k:.6g}" for flag, rate in self.rates[optimizer].items())
        return f"{OPTIMIZERS[optimizer]} {rates}".strip()

    def change(self, point: Point) -> str:
        (optimizer, scaling, width), k = point
        mup = f" --mup --base-width {self.widths[0]} {self.mup_flags}" if scaling == "mup" else ""
        return f"--width {width} {self.rate_flags(optimizer, k)}{mup}".strip()

    def job(self, point: Point, seed: int) -> Job:
        (optimizer, scaling, width), k = point
        return Job(optimizer, width, self.change(point), seed, self.key, power(k), scaling, self.common,
                   self.fingerprint, str(self.script))


def power(k: int) -> str:
    """2**k as people write it: 1/4, 1, 8."""
    return str(Fraction(2) ** k)


def load(script: Path):
    """The trainer as a module."""
    if not script.is_file():
        raise FileNotFoundError(f"--script {script}: no such file; train_gpt.py and train_moe.py are meant")
    sys.path.insert(0, str(script.parent))
    return importlib.import_module(script.stem)


def peak_rates(s) -> dict[str, float]:
    """Flag -> rate at multiplier 1 of all peak learning rates; the trainer multiplies its own factors on them."""
    names = ["muon_lr" if s.hidden_optimizer == "muon" else "hidden_lr", "adam_lr"]
    names += ["router_lr"] if getattr(s, "mixtures", ()) else []
    return {f"--{name.replace('_', '-')}": getattr(s, name) for name in names}


def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs of the grid. Raises ValueError for flags that the trainer refuses, FileNotFoundError
    where the data set is missing."""
    t = load(args.script)

    def settings(what: str, *flags: str):
        try:
            return t.parse_settings([*flags], 1)[0]
        except ValueError as error:
            raise ValueError(f"{what}: {args.script.name}: {' '.join(str(error).split())}") from error

    given = vars(t.build_parser().parse_args(args.flags))
    for name in OWN.keys() & given.keys():
        raise ValueError(f"--{name.replace('_', '-')} after --: every run gets its own; use {OWN[name]}")
    special = vars(t.build_parser().parse_args(shlex.split(args.mup_flags))).keys()
    if others := sorted(special - {"mup_embedding", "base_head_dim"}):
        raise ValueError(f"--mup-flags: --{others[0].replace('_', '-')} is none of --mup-embedding, --base-head-dim")
    proxy, base = "preset" not in given, ("--width", str(args.widths[0]))
    common = (*ALWAYS.split(), *(PROXY.split() if proxy else []), *args.flags)
    start = {name: [*OPTIMIZERS[name].split(), *(RATES[name].split() if proxy else [])] for name in args.optimizers}
    tuned = {name: settings(f"{name}, width {base[1]}", *flags, *common, *base) for name, flags in start.items()}
    s = tuned[args.optimizers[0]]
    sweep = Sweep(args.script, common, t.open_corpus(s.data).fingerprint(), s.head_dim,
                  {name: peak_rates(s) for name, s in tuned.items()}, tuple(args.parametrizations),
                  tuple(args.widths), tuple(args.multipliers), args.mup_flags, args.seeds)
    for line in sweep.series:
        for k in sweep.grid:
            settings(f"{line.optimizer}, width {line.width}", *common, *sweep.change(Point(line, k)).split())
    return sweep


def collect(sweep: Sweep, runs: dict[tuple, dict]) -> Found:
    """Losses of the sweep's finished runs with its seeds."""
    by_change = {}
    for run in runs.values():
        if run["key"] == sweep.key and not run["problem"] and run["seed"] < sweep.seeds:
            loss = math.inf if run["diverged"] else run["val_loss"]
            by_change.setdefault(run["change"], {})[run["seed"]] = loss
    points = [Point(series, k) for series in sweep.series for k in sweep.reach]
    return {point: by_change[sweep.change(point)] for point in points if sweep.change(point) in by_change}


def best(sweep: Sweep, found: Found, series: Series) -> int | None:
    """Exponent of the lowest mean loss among the series' points with all seeds; None without any."""
    means = {k: mean(found[Point(series, k)].values()) for k in sweep.reach
             if len(found.get(Point(series, k), ())) == sweep.seeds}
    return min(means, key=means.get, default=None)


def candidates(sweep: Sweep, found: Found, series: Series) -> list[int]:
    """The best exponent, and those that may yet turn out to be better: with the seeds that they have, they are. Only
    the same seeds are compared: their losses go up and down together."""
    top = best(sweep, found, series)
    line = {k: found[Point(series, k)] for k in sweep.reach if found.get(Point(series, k))}
    if top is None:
        first = {k: losses[0] for k, losses in line.items() if 0 in losses}
        return [min(first, key=first.get)] if first else []
    return [top, *(k for k, losses in line.items() if len(losses) < sweep.seeds
                   and mean(losses.values()) < mean(line[top][seed] for seed in losses))]


def plan(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """The points and seeds that the losses found so far call for. Complete is a sweep that has all of them."""
    ends = sweep.widths[0], sweep.widths[-1]
    seeds = {Point(series, k): 1 for series in sweep.series for k in sweep.grid}  # how many each point needs
    for series in sweep.series:
        if not all(0 in found.get(Point(series, k), ()) for k in sweep.grid):
            continue
        tops = candidates(sweep, found, series)
        near = {k for top in tops for k in (top - 1, top + 1) if k in sweep.reach}
        seeds |= {Point(series, k): 1 for k in near if Point(series, k) not in seeds}
        if all(0 in found.get(Point(series, k), ()) for k in near):  # first let the grid grow
            seeds |= {Point(series, k): sweep.seeds for k in (*tops, *(near if series.width in ends else ()))}
    for series in sweep.series:
        moved = best(sweep, found, Series(series.optimizer, BASE, sweep.widths[0]))
        if moved is not None:
            seeds[Point(series, moved)] = sweep.seeds
    return [(point, seed) for point, count in seeds.items() for seed in range(count)]


def absent(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """What the plan calls for and is not there, the longest runs first: what is left at the end is short."""
    todo = [(point, seed) for point, seed in plan(sweep, found) if seed not in found.get(point, ())]
    return sorted(todo, key=lambda item: (-item[0].series.width, item[1], abs(item[0].k)))


def foreseen(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """All runs to come, if further seeds change nothing, and unknown optima lie at multiplier 1."""
    guess, todo = {point: dict(losses) for point, losses in found.items()}, []
    while new := absent(sweep, guess):
        for point, seed in new:
            losses = guess.setdefault(point, {})
            losses[seed] = mean(losses.values()) if losses else 1000 + point.k**2
        todo += new
    return todo


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def record(job, script: Path, run_it: Callable[[], tuple[list[dict], dict]],
           numbers: Callable[[list[dict]], dict]) -> dict:
    """The record of a job: what was run and where, the numbers of its events, or the problem that kept it from having
    any. A loss that is not finite is a result too: the rate is too high. `run_it`: ablate.train of the job."""
    began, run = time.perf_counter(), job._asdict() | {"problem": "", "diverged": False, "date": str(date.today())}
    run |= {"trainer": hashlib.sha256(script.read_bytes()).hexdigest()[:12]}
    try:
        events, config = run_it()
        if config["data"]["fingerprint"] != job.fingerprint:
            raise RuntimeError(f"the data have changed: fingerprint {config['data']['fingerprint']}, at the start of "
                               f"this call {job.fingerprint}")
        run |= numbers(events)
        run |= about(config["torch"], config["hardware"]["name"], config["git"]["commit"], config["git"]["dirty"],
                     config["data"])
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # from the trainer, or in what it wrote
        run["diverged"] = bool(re.search(r"(nan|inf|not finite).*: stopped", str(error)))
        run["problem"] = "" if run["diverged"] else str(error) or repr(error)
    return run | {"wall_s": round(time.perf_counter() - began, 2)}


def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    script = Path(job.script)
    flags = [*job.common, *job.change.split()]
    return record(job, script, lambda: train(flags, job.seed, children, script), numbers) | {"script": script.name}


def numbers(events: list[dict]) -> dict:
    """Of a run's metrics: its loss and size."""
    return {"val_loss": events[-1]["val_loss"], "parameters": events[-1]["params_total"],
            "tokens": max(event.get("tokens", 0) for event in events)}


def outcome(run: dict) -> str:
    """A line about a finished run."""
    what = f"{run['optimizer']}, {run['scaling']}, width {run['width']}, × {run['multiplier']}, seed {run['seed']}"
    done = "diverged" if run["diverged"] else f"val loss {run.get('val_loss', 0):.4f}, {run['wall_s']:.0f} s"
    return f"{what}: FAILED: {run['problem']}" if run["problem"] else f"{what}: {done}"


def cost(width: int) -> float:
    """Relative time of a run; measured on one core at widths 64 to 256."""
    return (width / 64) ** 1.35


def unit_seconds(sweep: Sweep, runs: dict[tuple, dict]) -> float | None:
    """Seconds per unit of cost: measured, or guessed for the unchanged proxy; None where there is neither."""
    mine = [run["wall_s"] / cost(run["width"]) for run in runs.values()
            if run["key"] == sweep.key and not (run["problem"] or run["diverged"])]
    return median(mine) if mine else SECONDS if [*sweep.common] == [*ALWAYS.split(), *PROXY.split()] else None


class Progress:
    """Called with a finished run: the line about it, and the time left by the runs of this call."""

    def __init__(self, todo: list[Job], workers: int):
        self.left, self.workers = {job[:5]: cost(job.width) for job in todo}, workers
        self.spent = self.done = 0.0

    def __call__(self, run: dict) -> str:
        self.done += self.left.pop(tuple(run[name] for name in Job._fields[:5]), 0)
        self.spent += run["wall_s"]
        minutes = sum(self.left.values()) / self.workers * self.spent / max(self.done, 1e-9) / 60
        return f"{outcome(run)}; about {minutes:.0f} min left"


def run_sweep(sweep: Sweep, args: argparse.Namespace, command: str, file: Path) -> int:
    """Round after round of runs, until the plan is complete or a run fails; returns how many failed."""
    failed, number = 0, 0
    while not failed:
        runs = read_runs(file, Job._fields[:5])
        found = collect(sweep, runs)
        jobs = missing([sweep.job(*item) for item in absent(sweep, found)], runs)
        if not jobs:
            break
        number += 1
        ahead = [sweep.job(*item) for item in foreseen(sweep, found)]
        print(f"round {number}: {len(jobs)} run(s), about {len(ahead) - len(jobs)} in later rounds", flush=True)
        failed = run_all(jobs, args.jobs, command, file, execute, Progress(ahead, args.jobs))
    return failed


# ----------------------------------------------------------------------------------------------------------------------
# Results


class Row(NamedTuple):
    """A width's result; None and empty where the runs for it are missing."""

    width: int
    best: int | None  # exponent
    moved: int | None  # exponent that is best in the base width
    at_best: dict[int, float]  # seed -> loss
    at_moved: dict[int, float]

    @property
    def regrets(self) -> list[float]:
        return paired(self.at_moved, self.at_best)


class Result(NamedTuple):
    """An optimizer and a parametrization, a row for each width."""

    optimizer: str
    scaling: str
    rows: list[Row]


def paired(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Differences one - other of the seeds that both have."""
    return [0.0 if one[seed] == other[seed] else one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())]


def summarize(sweep: Sweep, found: Found) -> list[Result]:
    """With one width there is a single parametrization, called base."""
    results, base = [], sweep.widths[0]
    for optimizer in sweep.rates:
        moved = best(sweep, found, Series(optimizer, BASE, base))
        for scaling in sweep.scalings if len(sweep.widths) > 1 else (BASE,):
            rows = []
            for width in sweep.widths:
                series = Series(optimizer, BASE if width == base else scaling, width)
                top = best(sweep, found, series)
                rows.append(Row(width, top, moved, *({} if k is None else found.get(Point(series, k), {})
                                                     for k in (top, moved))))
            results.append(Result(optimizer, scaling, rows))
    return results


class Verdict(NamedTuple):
    criterion: str
    asked: str
    ok: bool | None  # None: runs are missing, or nothing is asked
    said: str

    def __str__(self) -> str:
        if not self.asked:
            return f"{self.criterion}: {self.said}"
        word = "not measured" if self.ok is None else "PASS" if self.ok else "FAIL"
        return f"{self.criterion}: {word} ({self.asked} is asked): {self.said}"


def interval(deltas: list[float]) -> str:
    """Mean, standard error and 95 % interval of paired differences in words."""
    e = effect(deltas) if deltas and all(map(math.isfinite, deltas)) else None
    if e:
        return f"{e.mean:+.4f} ± {e.se:.4f} nats (95 % interval {e.low:+.4f} to {e.high:+.4f}, n = {e.n})"
    return f"{mean(deltas):+.4f} nats (n = {len(deltas)})" if deltas else "not measured"


def verdicts(result: Result) -> list[Verdict]:
    """Of a result with several widths."""
    last = result.rows[-1]
    losses = {row.width: mean(row.at_moved.values()) for row in result.rows if row.at_moved}
    complete = len(losses) == len(result.rows)
    regret = mean(last.regrets) <= MAX_REGRET if last.regrets else None
    falls = all(wide < narrow for narrow, wide in pairwise(losses.values()))
    moves = ", ".join(f"× {power(row.best)} at {row.width}" for row in result.rows if row.best is not None)
    return [
        Verdict("regret", f"at most {MAX_REGRET} nats", regret, f"{interval(last.regrets)} at width {last.width}"),
        Verdict("optimum", "", None, moves),  # not asked: where the curve is flat, its lowest point is chance
        Verdict("wider is better", "a falling loss at the transferred rate", falls if complete else None,
                ", ".join(f"{loss:.4f} at {width}" for width, loss in losses.items())),
    ]


def shortcomings(results: list[Result]) -> list[str]:
    """The criteria that muP misses."""
    return [f"{result.optimizer}: {verdict}" for result in results if result.scaling == "mup"
            for verdict in verdicts(result) if verdict.ok is False]


def versus_standard(results: list[Result], optimizer: str) -> str:
    """What muP does not buy: the best of both at the largest width."""
    last = {result.scaling: result.rows[-1] for result in results if result.optimizer == optimizer}
    if set(last) != set(SCALINGS) or not all(row.at_best for row in last.values()):
        return f"**{optimizer}**: not measured."
    deltas = paired(last["mup"].at_best, last["standard"].at_best)
    e = effect(deltas) if all(map(math.isfinite, deltas)) else None
    verdict = "no difference is resolved" if e is None or e.low <= 0 <= e.high else (
        "the retuned standard run is better" if e.low > 0 else "muP is better")
    width, means = last["mup"].width, {name: mean(row.at_best.values()) for name, row in last.items()}
    return (f"**{optimizer}**: at width {width} each at its own best rate, muP has {means['mup']:.4f} (× "
            f"{power(last['mup'].best)}), standard {means['standard']:.4f} (× {power(last['standard'].best)}); "
            f"muP - standard {interval(deltas)}: {verdict}.")


def loss_cell(losses: dict[int, float], is_best: bool, is_moved: bool) -> str:
    if not losses:
        return "-"
    loss = mean(losses.values())
    text = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    return f"{f'**{text}**' if is_best else text}{' →' if is_moved else ''} ({len(losses)})"


def line_of(sweep: Sweep, result: Result, width: int) -> Series:
    """The series of a result at that width."""
    return Series(result.optimizer, BASE if width == sweep.widths[0] else result.scaling, width)


def loss_table(sweep: Sweep, found: Found, result: Result) -> str:
    """Mean loss by width and multiplier."""
    lines = [line_of(sweep, result, row.width) for row in result.rows]
    ks = [k for k in sweep.reach if any(Point(line, k) in found for line in lines)]
    rows = [[row.width, *(loss_cell(found.get(Point(line, k), {}), k == row.best, k == row.moved) for k in ks)]
            for row, line in zip(result.rows, lines, strict=True)]
    return markdown(["width", *(f"× {power(k)}" for k in ks)], rows)


def regret_table(result: Result) -> str:
    def loss(losses: dict[int, float]) -> str:
        return f"{mean(losses.values()):.4f}" if losses else "-"

    rows = [[row.width, "-" if row.best is None else f"× {power(row.best)}", loss(row.at_best), loss(row.at_moved),
             interval(row.regrets)] for row in result.rows]
    return markdown(["width", "best multiplier", "loss there", "loss at the transferred", "regret"], rows)


def heading(result: Result) -> str:
    return ", ".join([result.optimizer, *([SCALINGS[result.scaling]] if result.scaling in SCALINGS else [])])


def findings(sweep: Sweep, results: list[Result]) -> str:
    """What came out, in a few lines; of muP first."""
    if len(sweep.widths) == 1:
        return "\n".join(f"- **{r.optimizer}**: best × {power(r.rows[0].best)}; go on with "
                         f"`{go_on(sweep, r.optimizer, r.rows[0].best)}`"
                         for r in results if r.rows[0].best is not None)
    lines = []
    for result in sorted(results, key=lambda r: r.scaling != "mup"):
        lines.append(f"- **{heading(result)}**{'' if result.scaling == 'mup' else ' (the control)'}")
        lines += [f"  - {v if result.scaling == 'mup' else f'{v.criterion}: {v.said}'}" for v in verdicts(result)]
    return "\n".join(lines)


README = """# {title}, {date}

{findings}

{beside}{tables}
![loss by multiplier](lr_transfer.png)

## How

- Commands: `{command}`
- Rates at × 1: {rates}
- Flags of all runs of {script}: `{flags}`{mup_flags}
- Seeds: every multiplier has at least one; the best, its neighbours at the smallest and the largest width, and the
  transferred multiplier have {seeds}. Optima are compared on the same seeds; regrets are paired by seed, intervals are
  Student t and ignore that the best is chosen from the same losses.
- Data: {data}; {tokens} training tokens a run
- Machine: {hardware}; torch {torch}; commit {commit}; {script} {trainer}
{problems}"""
BESIDE = """## What muP does not buy

muP saves the search at the large width. It does not promise a lower loss than a standard run whose rate is searched for
there:

{lines}

"""
TABLE = """## {heading}

Validation loss in nats per token, mean over seeds (their number); best in bold; → the best of the smallest width.

{losses}

{regrets}

"""


def edge_notes(sweep: Sweep, results: list[Result]) -> list[str]:
    """Optima that may lie beyond what was run."""
    ends = (sweep.reach[0], sweep.reach[-1])
    tops = dict.fromkeys((line_of(sweep, r, row.width), row.best) for r in results for row in r.rows)
    return [f"{line.optimizer}, {line.scaling}, width {line.width}: the best multiplier, {power(k)}, is the last that "
            "the grid may grow to; give others with --multipliers" for line, k in tops if k in ends]


def readme(sweep: Sweep, found: Found, results: list[Result], runs: list[dict], problems: list[str]) -> str:
    """README.md: the verdicts, the tables, and how it came about."""
    def said(field: str, join: str = "; ") -> str:
        return join.join(dict.fromkeys(str(run[field]) for run in runs if field in run)) or "unknown"

    widths, tables = sweep.widths, "\n".join(TABLE.format(
        heading=heading(r), losses=loss_table(sweep, found, r), regrets=regret_table(r)).rstrip("\n") + "\n"
        for r in results)
    if len({run["trainer"] for run in runs}) > 1:
        problems = [*problems, f"{sweep.script.name} has changed between these runs; use another --out for the new one"]
    both = len(widths) > 1 and len(sweep.scalings) > 1
    beside = "\n".join(f"- {versus_standard(results, optimizer)}" for optimizer in sweep.rates)
    return README.format(
        title=f"Learning rate by width, {' and '.join(sweep.rates)}" if len(widths) == 1 else
        f"Does the learning rate tuned at width {widths[0]} serve at width {widths[-1]}?",
        findings=findings(sweep, results), beside=BESIDE.format(lines=beside) if both else "",
        tables=tables, command=said("command", "`; `"), script=sweep.script.name, flags=shlex.join(sweep.common),
        rates=", ".join(f"{name} `{sweep.rate_flags(name, 0)}`" for name in sweep.rates), seeds=sweep.seeds,
        mup_flags=f"; of muP's: `{sweep.mup_flags}`" if sweep.mup_flags else "",
        problems="".join(f"- Problem: {line}\n" for line in [*problems, *edge_notes(sweep, results)]),
        **{name: said(name) for name in ("date", "data", "hardware", "torch", "commit", "trainer", "tokens")})


def draw_series(axes, sweep: Sweep, found: Found, result: Result, row: Row, color: str) -> list[float]:
    """One width's losses over the multiplier: mean, standard deviation over seeds, a star at the best. Returns the
    means."""
    line = line_of(sweep, result, row.width)
    points = {k: list(found[Point(line, k)].values()) for k in sweep.reach if Point(line, k) in found}
    points = {k: losses for k, losses in points.items() if all(map(math.isfinite, losses))}
    means = [mean(losses) for losses in points.values()]
    axes.errorbar([2.0**k for k in points], means, yerr=[stdev(y) if len(y) > 1 else math.nan for y in points.values()],
                  marker=".", capsize=3, color=color, label=f"width {row.width}")
    if row.best in points:
        axes.plot(2.0**row.best, mean(points[row.best]), marker="*", markersize=14, color=color, linestyle="")
    return means


def plot(sweep: Sweep, found: Found, results: list[Result], path: Path) -> None:
    """A panel for each optimizer and parametrization: loss over multiplier, a line for each width."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = len(results) // len(sweep.rates)
    figure = Figure(figsize=(1 + 5 * columns, 1 + 3.7 * len(sweep.rates)), layout="constrained")
    panels = figure.subplots(len(sweep.rates), columns, squeeze=False, sharex=True, sharey="row")
    for number, (axes, result) in enumerate(zip(panels.flat, results, strict=True)):
        for i, row in enumerate(result.rows):
            color = colormaps["viridis"](0.85 * i / max(1, len(result.rows) - 1))
            draw_series(axes, sweep, found, result, row, color)
        if result.rows[0].moved is not None and len(result.rows) > 1:
            axes.axvline(2.0**result.rows[0].moved, color="black", linewidth=0.8, linestyle="--",
                         label=f"best at width {sweep.widths[0]}")
        axes.set_xscale("log", base=2, subs=[])
        axes.xaxis.set_major_formatter(lambda x, _: power(round(math.log2(x))))
        axes.set_title(heading(result))
        axes.grid(alpha=0.3)
        axes.legend()
        if number % columns == 0:
            axes.set_ylabel("validation loss, nats per token")
        if number >= len(results) - columns:
            axes.set_xlabel("multiplier of all peak learning rates")
    figure.suptitle("mean and standard deviation over seeds; star: best of its width")
    figure.savefig(path, dpi=130)


def go_on(sweep: Sweep, optimizer: str, k: int) -> str:
    """Flags of a run at another width that uses what was found at the base."""
    return (f"{sweep.rate_flags(optimizer, k)} --mup --base-width {sweep.widths[0]} "
            f"--base-head-dim {sweep.head_dim} {sweep.mup_flags}").rstrip()


def write_report(sweep: Sweep, out: Path) -> list[Result]:
    """README.md and lr_transfer.png from the records of these flags and data; there may be others in the file. The last
    line that is printed holds the flags to go on with: those of the optimizer that is best at the base."""
    runs = read_runs(out / "runs.jsonl", Job._fields[:5])
    found, changes = collect(sweep, runs), {sweep.change(Point(line, k)) for line in sweep.series for k in sweep.reach}
    mine = [run for run in runs.values() if run["key"] == sweep.key and run["change"] in changes]
    problems = [outcome(run) for run in mine if run["problem"]]
    if left := len(foreseen(sweep, found)):
        problems.append(f"not finished: about {left} run(s) are to come; the same command goes on")
    if not found:
        return []
    results = summarize(sweep, found)
    text = readme(sweep, found, results, [run for run in mine if not run["problem"]], problems)
    (out / "README.md").write_text(text, encoding="utf-8")
    plot(sweep, found, results, out / "lr_transfer.png")
    print(f"\n{text}\nwritten to {out}")
    tuned = {r.optimizer: r.rows[0] for r in results if r.rows[0].best is not None}
    for optimizer, row in sorted(tuned.items(), key=lambda item: -mean(item[1].at_best.values())):
        print(f"to go on with {optimizer}, tuned at width {row.width}:\n{go_on(sweep, optimizer, row.best)}")
    return results


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_plan(sweep: Sweep, runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long."""
    found = collect(sweep, runs)
    todo = foreseen(sweep, found)
    for series in sweep.series:
        done = sum(len(losses) for point, losses in found.items() if point.series == series)
        left = [(k, seed) for (line, k), seed in todo if line == series]
        seeds = {k: [seed for other, seed in left if other == k] for k in sorted({k for k, _ in left})}
        print(f"{series.optimizer:6} {series.scaling:9} width {series.width:5}: {done:3} done, {len(left):3} to run"
              + "".join(f"  × {power(k)}" + (f" ({len(some)})" if len(some) > 1 else "") for k, some in seeds.items()))
    unit = unit_seconds(sweep, runs)
    hours = "time unknown: no run has ended yet" if unit is None else (
        f"about {unit * sum(cost(point.series.width) for point, _ in todo) / args.jobs / 60:.0f} min, "
        f"{args.jobs} at a time")
    print(f"{len(todo)} to run, {hours}; more where an optimum lies at the edge or is not the same at all widths")


def words(text: str, kinds: tuple[str, ...] | dict, flag: str) -> list[str]:
    """The named kinds, in their own order. Raises ValueError for others."""
    given = text.split(",")
    for name in given:
        if name not in kinds:
            raise ValueError(f"{flag} {name}: must be one or more of {', '.join(kinds)}")
    return [name for name in kinds if name in given]


def exponents(text: str) -> list[int]:
    """1/2,1,2 -> -1, 0, 1. Raises ValueError for what is no power of two."""
    found = set()
    for word in text.split(","):
        try:
            k = math.log2(Fraction(word))
        except (ValueError, ZeroDivisionError):
            k = math.nan
        if not k.is_integer():
            raise ValueError(f"--multipliers {word}: must be powers of two, such as 1/4,1/2,1,2,4")
        found.add(int(k))
    return sorted(found)


def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    if wrong := [word for word in args.widths.split(",") if not word.isdecimal() or not int(word)]:
        raise ValueError(f"--widths {wrong[0]}: must be whole numbers above 0, such as 64,128,256")
    args.widths = sorted({int(word) for word in args.widths.split(",")})
    args.optimizers = words(args.optimizers, OPTIMIZERS, "--optimizers")
    args.parametrizations = words(args.parametrizations, SCALINGS, "--parametrizations")
    args.multipliers = exponents(args.multipliers)
    least = 1 if args.quick else 3
    if args.seeds < least:
        raise ValueError(f"--seeds must be at least {least}, got {args.seeds}; fewer than 3 need --quick")
    if args.mup_flags and ("mup" not in args.parametrizations or len(args.widths) == 1):
        raise ValueError(f"--mup-flags {args.mup_flags}: has no effect without muP and a second width")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    args.script = args.script if args.script.is_file() else ROOT / args.script


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] [-- flags of train_gpt.py]")
    parser.add_argument("--widths", default="64,128,256", metavar="N,..",
                        help="the smallest is the base; one alone is tuned (default: 64,128,256)")
    parser.add_argument("--optimizers", default="muon,adamw", metavar="NAME,..",
                        help="of the hidden matrices (default: muon,adamw)")
    parser.add_argument("--parametrizations", default="mup,standard", metavar="NAME,..",
                        help="scalings of the larger widths (default: mup,standard)")
    parser.add_argument("--multipliers", default="1/8,1/4,1/2,1,2,4,8", metavar="X,..",
                        help="of all peak learning rates, powers of two (default: 1/8,1/4,1/2,1,2,4,8)")
    parser.add_argument("--mup-flags", default="", metavar="FLAGS",
                        help='flags of the muP runs alone, such as --mup-flags="--mup-embedding sqrt"')
    parser.add_argument("--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE",
                        help="train_gpt.py or train_moe.py (default: train_gpt.py)")
    parser.add_argument("--seeds", type=int, default=3, help="runs where they count (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="allow fewer than 3 seeds, to try it out")
    parser.add_argument("--list", action="store_true", help="print the plan and its time, and run nothing")
    parser.add_argument("--out", type=Path, default=ROOT / "records" / f"{date.today()}_lr_transfer", metavar="DIR",
                        help="folder of the results; name it to go on another day (default: records/DATE_lr_transfer)")
    parser.add_argument("flags", nargs="*", help="after --: flags of the trainer for all runs")
    return parser.parse_args(argv)


def transfer(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code. Raises RuntimeError if muP fails."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    if args.list:
        show_plan(sweep, read_runs(file, Job._fields[:5]), args)
        return 0
    if args.jobs > 1:  # each with its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    results = []
    try:
        failed = run_sweep(sweep, args, command, file)
    finally:
        results = write_report(sweep, args.out)
    exit_code(failed)
    if len(sweep.widths) > 1 and (missed := shortcomings(results)):
        raise RuntimeError(f"muP fails: {'; '.join(missed)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return command_line("bench/lr_transfer.py", parse_args, transfer, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the runs under way too
    sys.exit(main())
