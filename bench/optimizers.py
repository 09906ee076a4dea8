"""AdamW against Muon on one model, each with its own tuned learning rate: loss at equal steps, and steps to equal loss.

    python bench/optimizers.py --list                               # the plan and how long it takes; runs nothing
    python bench/optimizers.py --data shakespeare_char --jobs 2     # characters, on a CPU
    python bench/optimizers.py --data books_gpt2 --jobs 2           # any GPT-2-tokenized data set
    python bench/optimizers.py --data fineweb10B -- --preset gpu    # GPT-2's 124M shape on one 16 GB card

The model is that of the speedrun's beginning: RMSNorm without gains, RoPE, no biases, squared ReLU, an untied head.
Muon trains the matrices of attention and MLP, AdamW the embeddings and the head beside them.

1. AdamW's learning rate is swept in powers of two with --sweep-seeds; a grid whose best lies at its edge grows. At the
   best rate AdamW then gets a few other settings (TRIES).
2. Muon's rate is swept likewise, with AdamW's best rate for embeddings and head; at Muon's best rate that one is halved
   and doubled. The optimizer with the smaller grid gets more rates, until both have tried equally many settings.
3. The --finalists best settings of each get all --seeds. The lowest mean is the optimizer's result.
4. Muon's result once more with half the steps and a whole schedule of its own: do half the steps suffice?

Runs of a seed have the same initial weights and the same batches in the same order: differences are paired by seed.
Flags after ` -- ` go to all runs. With --preset among them there is no proxy: shape, length and rates are the preset's.
Writes --out: runs.jsonl (a line for each finished run, at once), README.md and optimizers.png. The same command goes on
where an earlier one ended. Needs Linux or macOS.
"""
import argparse
import hashlib
import json
import math
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from datetime import date
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import command_line, effect, exit_code, missing, read_runs, run_all, train  # noqa: E402
from bench.lr_transfer import exponents, interval, paired, record  # noqa: E402
from bench.moe import markdown  # noqa: E402

TRAINER = ROOT / "train_baseline.py"
MODEL = "--model-type moderngpt --mlp relu2 --no-norm-gain"
ALWAYS = "--target-loss 0 --save-every 0 --no-save-last"
# One thread: several runs go side by side.
SHAPE = ("--preset cpu --device cpu --backend plain --threads 1 --num-layers 4 --width 128 --head-dim 32 "
         "--seq-len 128 --micro-tokens 2048 --schedule cosine")
# With a large vocabulary nearly all the time goes to the head: fewer tokens.
FEW_TOKENS = "--batch-tokens 1024 --iterations 250 --warmup-steps 25 --eval-every 25 --eval-tokens 16384"
MANY_TOKENS = "--batch-tokens 2048 --iterations 500 --warmup-steps 50 --eval-every 25 --eval-tokens 32768"
LARGE_VOCAB = 4096
QUICK = "--iterations 20 --warmup-steps 2 --eval-every 5 --eval-tokens 1024"
ADAMW, MUON, HALF = "AdamW", "Muon", "Muon, half the steps"
TRIES = ("--beta2 0.99", "--weight-decay 0")  # of AdamW; Muon's matrices have no decay either
LEAST = 0.1  # last learning rate / peak
EXTEND = 4  # factors of two by which a grid may grow at either end
OWN = {"seed": "--seeds", "data": "--data"} | dict.fromkeys(  # what the runs differ in -> what sets it
    ("optimizer", "max_lr", "min_lr", "muon_lr", "beta2", "weight_decay"), "")


# ----------------------------------------------------------------------------------------------------------------------
# Plan


class Point(NamedTuple):
    """Settings that are tried. Rates are exponents of two over the base rates."""

    adam: int  # AdamW's rate; under Muon that of embeddings and head
    muon: int | None = None  # Muon's rate; None: AdamW trains everything
    extra: str = ""  # further flags
    half: bool = False  # half the steps

    @property
    def optimizer(self) -> str:
        return ADAMW if self.muon is None else MUON

    @property
    def rate(self) -> int:
        return self.adam if self.muon is None else self.muon


Found = dict[Point, dict[int, dict]]  # point -> seed -> record


class Job(NamedTuple):
    """One run; the first five fields identify it."""

    optimizer: str
    change: str  # flags beside the common ones
    seed: int
    key: str
    half: bool
    adam: int
    muon: int | None
    extra: str
    common: tuple[str, ...]
    fingerprint: str
    jobs: int  # at the same time


class Sweep(NamedTuple):
    """What all runs of a call have in common; `key` tells their records from those of other flags and data."""

    common: tuple[str, ...]
    fingerprint: str  # of the data
    s: object  # train_baseline.Settings of Muon's runs; its rates are those at exponent 0
    grid: tuple[int, ...]  # rising
    seeds: int
    sweep_seeds: int
    finalists: int
    jobs: int

    @property
    def key(self) -> str:
        parts = [self.common, self.fingerprint, self.s.max_lr, self.s.muon_lr]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def reach(self) -> range:
        """All exponents to which a grid may grow."""
        return range(self.grid[0] - EXTEND, self.grid[-1] + EXTEND + 1)

    def value(self, point: Point) -> float:
        """The rate that is swept."""
        return (self.s.max_lr if point.muon is None else self.s.muon_lr) * 2.0**point.rate

    def change(self, point: Point) -> str:
        s, rate = self.s, self.s.max_lr * 2.0**point.adam
        words = [f"--optimizer {point.optimizer.lower()}"]
        words += [f"--muon-lr {self.value(point):.6g}"] if point.muon is not None else []
        words += [f"--max-lr {rate:.6g} --min-lr {LEAST * rate:.6g}", point.extra]
        words += [f"--iterations {s.iterations // 2} --warmup-steps {s.warmup_steps // 2}"] if point.half else []
        return " ".join(filter(None, words))

    def job(self, point: Point, seed: int) -> Job:
        return Job(point.optimizer, self.change(point), seed, self.key, point.half, point.adam, point.muon,
                   point.extra, self.common, self.fingerprint, self.jobs)


def can_compile() -> bool:
    """Whether the trainer can compile on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))


def proxy_flags(vocab_size: int) -> list[str]:
    """Of the model that stands in for the real one."""
    if not can_compile():
        print("note: no C++ compiler, the runs are not compiled and take longer", file=sys.stderr)
    size = FEW_TOKENS if vocab_size > LARGE_VOCAB else MANY_TOKENS
    return [*SHAPE.split(), "--compile" if can_compile() else "--no-compile", *size.split()]


def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs of the grid. Raises ValueError for flags that train_baseline.py refuses,
    FileNotFoundError where the data set is missing."""
    import train_baseline as t  # not above: --help needs no torch

    def settings(*flags: str):
        try:
            return t.parse_settings([*flags], 1)[0]
        except ValueError as error:
            raise ValueError(f"train_baseline.py: {' '.join(str(error).split())}") from error

    given = vars(t.build_parser().parse_args(args.flags))
    for name in OWN.keys() & given.keys():
        raise ValueError(f"--{name.replace('_', '-')} after --: every run gets its own"
                         + (f"; use {OWN[name]}" if OWN[name] else ""))
    corpus = t.open_corpus(args.data)
    proxy = [] if "preset" in given else proxy_flags(corpus.meta["vocab_size"])
    common = (*MODEL.split(), *ALWAYS.split(), "--data", args.data, *proxy, *(QUICK.split() if args.quick else []),
              *args.flags)
    s = settings(*common, "--optimizer", "muon")
    if not 0 < s.eval_every <= s.iterations // 2:
        raise ValueError(f"--eval-every {s.eval_every}: steps to equal loss need evaluations on the way, at least one "
                         f"in the first {s.iterations // 2} steps")
    sweep = Sweep(common, corpus.fingerprint(), s, tuple(args.multipliers), args.seeds, args.sweep_seeds,
                  args.finalists, args.jobs)
    for point in (Point(0), Point(0, extra=" ".join(TRIES)), Point(0, 0, half=True)):
        settings(*common, *sweep.change(point).split())
    return sweep


def collect(sweep: Sweep, runs: dict[tuple, dict]) -> Found:
    """The sweep's finished runs with its seeds."""
    found = {}
    for run in runs.values():
        if run["key"] == sweep.key and not run["problem"] and run["seed"] < sweep.seeds:
            found.setdefault(Point(*(run[name] for name in Point._fields)), {})[run["seed"]] = run
    return found


def losses(runs: dict[int, dict]) -> dict[int, float]:
    """Seed -> final validation loss, infinite where the run diverged."""
    return {seed: math.inf if run["diverged"] else run["val_loss"] for seed, run in sorted(runs.items())}


def score(found: Found, point: Point, seeds: int) -> float | None:
    """Mean loss of the first seeds; None without all of them."""
    known = losses(found.get(point, {}))
    return mean(known[seed] for seed in range(seeds)) if all(seed in known for seed in range(seeds)) else None


def grow(sweep: Sweep, scores: dict[int, float | None], size: int) -> list[int]:
    """The exponents of a grid: it grows while its best lies at an edge, or it is smaller than `size`; then at the end
    that is nearer to the best. Ends where a score is missing."""
    ks = list(sweep.grid)
    while all(scores[k] is not None for k in ks):
        top = min(ks, key=scores.get)
        down, up = ks[0] > sweep.reach[0], ks[-1] < sweep.reach[-1]
        low, high = top - ks[0], ks[-1] - top
        if not (down and low == 0 or up and high == 0 or len(ks) < size and (down or up)):
            break
        lower = down and (low <= high or not up)
        ks = [ks[0] - 1, *ks] if lower else [*ks, ks[-1] + 1]
    return ks


class Tuning(NamedTuple):
    """What both optimizers try, and whether the losses of all of it are there."""

    points: dict[str, list[Point]]
    complete: bool


def tuning(sweep: Sweep, found: Found) -> Tuning:
    """The settings that the losses found so far call for; equally many for both once it is complete."""
    def scores(make) -> dict[int, float | None]:
        return {k: score(found, make(k), sweep.sweep_seeds) for k in sweep.reach}

    adam, size = scores(Point), 0
    first = grow(sweep, adam, 0)
    if any(adam[k] is None for k in first):
        return Tuning({ADAMW: [Point(k) for k in first], MUON: []}, False)
    embedding = min(first, key=adam.get)  # AdamW's best rate serves embeddings and head
    muon = scores(lambda k: Point(embedding, k))
    while True:
        grids = (grow(sweep, adam, size), grow(sweep, muon, size))
        points = {ADAMW: [Point(k) for k in grids[0]], MUON: [Point(embedding, k) for k in grids[1]]}
        if any(adam[k] is None for k in grids[0]) or any(muon[k] is None for k in grids[1]):
            return Tuning(points, False)
        if len(grids[0]) == len(grids[1]):
            break
        size = max(map(len, grids))
    top, best = min(grids[0], key=adam.get), min(grids[1], key=muon.get)
    points[ADAMW] += [Point(top, extra=flags) for flags in TRIES]
    points[MUON] += [Point(embedding + step, best) for step in (-1, 1)]
    return Tuning(points, all(score(found, p, sweep.sweep_seeds) is not None for some in points.values() for p in some))


def finalists(sweep: Sweep, found: Found, points: list[Point]) -> list[Point]:
    """The best settings by the sweep's seeds; of those that diverged none, unless all did."""
    ranked = sorted(points, key=lambda p: score(found, p, sweep.sweep_seeds))
    finite = [p for p in ranked if math.isfinite(score(found, p, sweep.sweep_seeds))]
    return (finite or ranked[:1])[:sweep.finalists]


def winner(sweep: Sweep, found: Found, tuned: Tuning, optimizer: str) -> Point | None:
    """The finalist with the lowest mean over all seeds; None while runs are missing."""
    if not tuned.complete:
        return None
    means = {p: score(found, p, sweep.seeds) for p in finalists(sweep, found, tuned.points[optimizer])}
    return None if None in means.values() else min(means, key=means.get)


def plan(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """The points and seeds that the losses found so far call for. Complete is a sweep that has all of them."""
    tuned = tuning(sweep, found)
    seeds = {point: sweep.sweep_seeds for points in tuned.points.values() for point in points}
    for points in tuned.points.values() if tuned.complete else ():
        seeds |= {point: sweep.seeds for point in finalists(sweep, found, points)}
    best = winner(sweep, found, tuned, MUON)
    if best is not None:
        seeds[best._replace(half=True)] = sweep.seeds
    return [(point, seed) for point, count in seeds.items() for seed in range(count)]


def absent(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """What the plan calls for and is not there, seed by seed."""
    todo = [(point, seed) for point, seed in plan(sweep, found) if seed not in found.get(point, ())]
    return sorted(todo, key=lambda item: item[1])


def foreseen(sweep: Sweep, found: Found) -> list[tuple[Point, int]]:
    """All runs to come, if further seeds change nothing, and unknown optima lie at multiplier 1."""
    guess, todo = {point: dict(runs) for point, runs in found.items()}, []
    while new := absent(sweep, guess):
        for point, seed in new:
            known = losses(guess.get(point, {})).values()
            loss = mean(known) if known else 1000.0 + point.rate**2
            guess.setdefault(point, {})[seed] = {"diverged": False, "val_loss": loss}
        todo += new
    return todo


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    flags = [*job.common, *job.change.split()]
    return record(job, TRAINER, lambda: train(flags, job.seed, children, TRAINER), numbers)


def numbers(events: list[dict]) -> dict:
    """Of a run's metrics: its validation curve as (step, loss), its size, and its median ms per step."""
    curve = {event["step"]: event["val_loss"] for event in events if "val_loss" in event and "step" in event}
    times = [event["step_ms"] for event in events if "step_ms" in event]
    return {"val_loss": events[-1]["val_loss"], "parameters": events[-1]["params_total"],
            "tokens": max(event.get("tokens", 0) for event in events), "ms": median(times[1:] or times),
            "curve": sorted(curve.items())}


def outcome(run: dict) -> str:
    """A line about a finished run."""
    done = "diverged" if run["diverged"] else f"val loss {run.get('val_loss', 0):.4f}, {run['wall_s']:.0f} s"
    return f"{run['change']}, seed {run['seed']}: " + (f"FAILED: {run['problem']}" if run["problem"] else done)


def batches(jobs: list[Job], warm: set[str]) -> Iterator[list[Job]]:
    """The first job of each optimizer alone, which leaves its compiled graphs in inductor's cache; then the others."""
    for optimizer in dict.fromkeys(job.optimizer for job in jobs):
        if optimizer not in warm:
            warm.add(optimizer)
            first = next(job for job in jobs if job.optimizer == optimizer)
            jobs = [job for job in jobs if job is not first]
            yield [first]
    if jobs:
        yield jobs


def run_sweep(sweep: Sweep, command: str, file: Path) -> int:
    """Round after round of runs, until the plan is complete or a run fails; returns how many failed."""
    failed, warm = 0, set()
    while not failed:
        runs = read_runs(file, Job._fields[:5])
        found = collect(sweep, runs)
        jobs = missing([sweep.job(*item) for item in absent(sweep, found)], runs)
        if not jobs:
            break
        print(f"{len(jobs)} run(s), about {len(foreseen(sweep, found)) - len(jobs)} later", flush=True)
        for batch in batches(jobs, warm):
            failed += run_all(batch, sweep.jobs, command, file, execute, outcome) if not failed else 0
    return failed


# ----------------------------------------------------------------------------------------------------------------------
# Results


class Results(NamedTuple):
    """What the finished comparison tells; lists are in the order of the seeds."""

    points: dict[str, Point]  # arm -> its settings
    runs: dict[str, list[dict]]  # arm -> records
    steps: list[float | None]  # at which full-length Muon has AdamW's final loss; None where it never has
    step_ratios: list[float | None]  # AdamW's steps / these
    ms_ratios: list[float]  # time of a step of Muon / of AdamW

    def losses(self, arm: str) -> list[float]:
        return [*losses(dict(enumerate(self.runs[arm]))).values()]

    def minus_adamw(self, arm: str) -> list[float]:
        return paired(*(dict(enumerate(self.losses(name))) for name in (arm, ADAMW)))


def crossing(curve: list[tuple[float, float]], target: float) -> float | None:
    """First step at which the curve is at or below the target, linear between evaluations; None if it never is. Before
    the first evaluation nothing is known: its step is the earliest."""
    if curve[0][1] <= target:
        return float(curve[0][0])
    for (start, high), (end, low) in pairwise(curve):
        if low <= target:
            return start + (end - start) * (high - target) / (high - low)
    return None


def summarize(sweep: Sweep, found: Found) -> Results | None:
    """None while runs are missing, or where all that an optimizer tried diverged."""
    tuned = tuning(sweep, found)
    adam, muon = (winner(sweep, found, tuned, optimizer) for optimizer in (ADAMW, MUON))
    if adam is None or muon is None or score(found, muon._replace(half=True), sweep.seeds) is None:
        return None
    if math.inf in (score(found, adam, sweep.seeds), score(found, muon, sweep.seeds)):
        return None
    points = {ADAMW: adam, MUON: muon, HALF: muon._replace(half=True)}
    runs = {arm: [found[point][seed] for seed in range(sweep.seeds)] for arm, point in points.items()}
    pairs = list(zip(runs[ADAMW], runs[MUON], strict=True))
    steps = [crossing(m["curve"], a["val_loss"]) for a, m in pairs]
    return Results(points, runs, steps, [step and sweep.s.iterations / step for step in steps],
                   [m["ms"] / a["ms"] for a, m in pairs])


def ratio(values: list[float | None]) -> str:
    """Mean and 95 % interval of a ratio over seeds in words."""
    known = [value for value in values if value is not None]
    e = effect(known)
    if len(known) < len(values):
        return f"not known: only {len(known)} of {len(values)} seeds reached it"
    return f"{e.mean:.3f} (95 % interval {e.low:.3f} to {e.high:.3f}, n = {e.n})" if e else "not measured"


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    if not all(map(math.isfinite, values)):
        return "diverged"
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def verdict(deltas: list[float], better: str, worse: str) -> str:
    """What the interval of differences says: `better` if it is below 0."""
    e = effect(deltas) if all(map(math.isfinite, deltas)) else None
    return "not settled" if e is None or e.low <= 0 <= e.high else better if e.high < 0 else worse


def findings(sweep: Sweep, r: Results) -> str:
    """What came out, in a few lines."""
    full, half, steps = r.minus_adamw(MUON), r.minus_adamw(HALF), sweep.s.iterations
    reached = f"after {mean(r.steps):.0f} steps (mean) " if None not in r.steps else ""
    ms = [median(run["ms"] for run in r.runs[arm]) for arm in (ADAMW, MUON)]
    times = [step and step / ms for step, ms in zip(r.step_ratios, r.ms_ratios, strict=True)]
    return f"""- **Loss at equal steps** ({steps}): {verdict(full, "Muon is better", "AdamW is better")}. AdamW \
{spread(r.losses(ADAMW))}, Muon {spread(r.losses(MUON))} (mean ± sd, nats per token, n = {sweep.seeds}); Muon - AdamW \
{interval(full)}.
- **Steps to equal loss**: full-length Muon has AdamW's final loss of the same seed {reached}of {steps}. AdamW's \
steps / Muon's: {ratio(r.step_ratios)}. Muon's rate is still high \
at that step; what a schedule for fewer steps makes of it, the next line tells.
- **Half the steps** ({steps // 2}) and a whole schedule of its own: {verdict(half, "they suffice", "not enough")}. \
Muon {spread(r.losses(HALF))}; minus AdamW with all steps {interval(half)}.
- **Time**: a step takes {ms[0]:.1f} ms with AdamW, {ms[1]:.1f} ms with Muon (medians); Muon's / AdamW's: \
{ratio(r.ms_ratios)}. AdamW's seconds / Muon's to AdamW's final loss: \
{ratio(times)}."""


def result_table(sweep: Sweep, r: Results) -> str:
    rows = []
    for arm, point in r.points.items():
        tokens = max(run.get("tokens", 0) for run in r.runs[arm])
        rows.append([arm, f"`{sweep.change(point)}`", sweep.s.iterations // (2 if point.half else 1), f"{tokens:,}",
                     spread(r.losses(arm)), sweep.seeds, "" if arm == ADAMW else interval(r.minus_adamw(arm))])
    return markdown(["", "settings", "steps", "tokens", "final val loss ± sd", "n", "minus AdamW ± se"], rows)


def seed_table(r: Results) -> str:
    columns = {"AdamW": (r.losses(ADAMW), ".4f"), "Muon": (r.losses(MUON), ".4f"),
               "Muon - AdamW": (r.minus_adamw(MUON), "+.4f"), "Muon's steps to AdamW's loss": (r.steps, ".1f"),
               "AdamW's steps / these": (r.step_ratios, ".3f"), "Muon, half": (r.losses(HALF), ".4f"),
               "half - AdamW": (r.minus_adamw(HALF), "+.4f"), "step time Muon / AdamW": (r.ms_ratios, ".3f")}
    return markdown(["seed", *columns], [
        [seed, *("-" if values[seed] is None else format(values[seed], form) for values, form in columns.values())]
        for seed in range(len(r.steps))])


def tuning_table(sweep: Sweep, found: Found, tuned: Tuning) -> str:
    """Everything that was tried, with the losses of the sweep and of all seeds."""
    def cell(point: Point, seeds: int) -> str:
        value = score(found, point, seeds)
        return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"

    best, rows = {winner(sweep, found, tuned, optimizer) for optimizer in tuned.points}, []
    for optimizer, points in tuned.points.items():
        for point in sorted(points, key=lambda p: (p.rate, p.adam, p.extra)):
            mark = "**" if point in best else ""
            rows.append([optimizer, f"`{sweep.change(point)}`", cell(point, sweep.sweep_seeds),
                         f"{mark}{cell(point, sweep.seeds)}{mark}" if sweep.seeds > sweep.sweep_seeds else ""])
    return markdown(["optimizer", "settings", f"val loss, {sweep.sweep_seeds} seed(s)",
                     f"mean of {sweep.seeds} seeds"], rows)


def budget(found: Found, tuned: Tuning, optimizer: str) -> str:
    runs = sum(len(found.get(point, ())) for point in tuned.points[optimizer])
    return f"{optimizer} {len(tuned.points[optimizer])} settings, {runs} runs"


def edge_notes(r: Results, tuned: Tuning) -> list[str]:
    """Where the best may lie beyond what was tried."""
    notes = []
    for arm in (ADAMW, MUON):
        best, tried = r.points[arm], tuned.points[arm]
        if best.rate in (min(p.rate for p in tried), max(p.rate for p in tried)):
            notes.append(f"{arm}'s best learning rate is the last that was tried; give others with --multipliers")
        if best in tried[-2:]:  # beside the sweep
            notes.append(f"{arm}'s best is a setting tried beside the sweep, beyond which nothing was tried: "
                         + (best.extra or "another rate of embeddings and head"))
    return notes


FIGURE = "![validation loss against step and learning rate](optimizers.png)\n\n"
README = """# AdamW against Muon on the same model: {name}, {date}

{findings}

{results}## Tuning

Settings tried and full-length runs made with them: {budgets}. Validation loss in nats per token, the best in bold.

{tuning}

## How

- Both: {model}, {parameters} parameters; for a seed the same initial weights and
  the same batches in the same order; warm-up over {warmup} steps, then {schedule} down to {least} × the peak,
  Muon's rate by the same factor; gradient clipped to a norm of {clip}; AdamW's weight decay {decay}; Muon's own
  matrices have {muon_decay}.
- AdamW's rate is swept in powers of two; at the best one `{tries}` are tried as well.
  Then Muon's rate is swept with AdamW's best rate for embeddings and head, and at the best one that rate is halved and
  doubled. The best {finalists} of each get {seeds} seeds; the lowest mean is reported. Differences and ratios are
  paired by seed; intervals are Student t and ignore that the best is chosen from the same losses, on both sides alike.
- Steps to equal loss are interpolated linearly between evaluations, every {eval_every} steps on {eval_tokens} tokens.
- Step times are medians of runs that went {jobs} at a time: no benchmark of the machine.
- Commands: `{command}`
- Flags of all runs of train_baseline.py: `{flags}`
- Data: {data}; {tokens} training tokens a full-length run
- Machine: {hardware}; torch {torch}; commit {commit}; train_baseline.py {trainer}
{problems}
Rates are tuned to a factor of two, one after the other, for this size and number of steps: what holds here need not
hold for longer runs.{size_caveat}
"""


def readme(sweep: Sweep, found: Found, runs: list[dict], problems: list[str]) -> str:
    """README.md: the findings, the tables, and how they came about."""
    def said(field: str, join: str = "; ") -> str:
        return join.join(dict.fromkeys(str(run[field]) for run in runs if field in run)) or "unknown"

    s, tuned, r = sweep.s, tuning(sweep, found), summarize(sweep, found)
    if len({run["trainer"] for run in runs}) > 1:
        problems = [*problems, "train_baseline.py has changed between these runs; use another --out for the new one"]
    whole = [run for run in runs if not run["half"] and "tokens" in run]
    return README.format(
        name=Path(s.data).name, findings=findings(sweep, r) if r else "No result: runs are missing, or diverged.",
        results=f"{FIGURE}{result_table(sweep, r)}\n\n{seed_table(r)}\n\n" if r else "",
        budgets="; ".join(budget(found, tuned, optimizer) for optimizer in tuned.points),
        tuning=tuning_table(sweep, found, tuned), finalists=sweep.finalists, seeds=sweep.seeds,
        tries="`, `".join(TRIES), model=f"{s.model_type}, {s.num_layers} layers, width {s.width}, {s.mlp}, no biases",
        parameters=f"{whole[0]['parameters']:,}" if whole else "unknown", warmup=s.warmup_steps,
        schedule={"cosine": "half a cosine", "wsd": "constant, at the end linear"}[s.schedule], least=LEAST,
        clip=s.grad_clip, decay=s.weight_decay, muon_decay=s.muon_weight_decay or "none", eval_every=s.eval_every,
        eval_tokens=f"{s.eval_tokens:,}", tokens=f"{max((run['tokens'] for run in whole), default=0):,}",
        command=said("command", "`; `"), flags=shlex.join(sweep.common),
        problems="".join(f"- Note: {line}\n" for line in [*problems, *(edge_notes(r, tuned) if r else [])]),
        size_caveat="" if s.device == "cuda" else " A CPU proxy says little about the 124 M parameter model.",
        **{name: said(name) for name in ("date", "data", "hardware", "torch", "commit", "trainer", "jobs")})


COLORS = {ADAMW: "#D55E00", MUON: "#0072B2", HALF: "#0072B2"}  # Okabe and Ito: told apart by all eyes


def draw_curves(axes, r: Results, end: int) -> None:
    """Mean curves, bands from the lowest to the highest seed, and an arrow of the steps to equal loss."""
    means = {}
    for arm, runs in r.runs.items():
        curves = [dict(run["curve"]) for run in runs if not run["diverged"]]
        x = sorted(set.intersection(*map(set, curves))) if curves else []
        y = [[curve[step] for curve in curves] for step in x]
        means[arm] = dict(zip(x, map(mean, y), strict=True))
        style = "--" if arm == HALF else "-"
        axes.plot(x, list(means[arm].values()), style, color=COLORS[arm], linewidth=2)
        axes.fill_between(x, list(map(min, y)), list(map(max, y)), color=COLORS[arm], alpha=0.2, linewidth=0)
    drawn = [y for curve in means.values() for y in curve.values()]
    room = max(loss for step, loss in means[ADAMW].items() if step >= 0.15 * end) - min(drawn)
    axes.set_ylim(min(drawn) - 0.12 * room, min(drawn) + 1.1 * room)
    axes.set_xlim(0, 1.02 * end)
    draw_labels(axes, means, end)
    draw_arrow(axes, r, end)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation loss, nats per token")


def draw_labels(axes, means: dict[str, dict[int, float]], end: int) -> None:
    """Names beside the lines, where these are apart."""
    for arm, share, side in ((ADAMW, 0.45, 1), (MUON, 0.72, -1), (HALF, 0.3, -1)):
        if means[arm]:
            at = min(means[arm], key=lambda step: abs(step - share * end))
            axes.annotate(arm.replace(", ", ",\n"), (at, means[arm][at]), (0, 12 * side), textcoords="offset points",
                          color=COLORS[arm], ha="left" if side > 0 else "right", fontsize=12, fontweight="bold",
                          va="bottom" if side > 0 else "top")


def draw_arrow(axes, r: Results, end: int) -> None:
    """From AdamW's end to the step at which Muon is there; means over seeds."""
    if None in r.steps:
        return
    level, at = mean(r.losses(ADAMW)), mean(r.steps)
    axes.annotate("", (at, level), (end, level), arrowprops={"arrowstyle": "->", "linewidth": 1.5, "shrinkB": 0})
    axes.plot(at, level, "o", color=COLORS[MUON], markersize=8, markeredgecolor="black")
    axes.annotate(f"Muon has AdamW's final loss at step {at:.0f}\nof {end}: {mean(r.step_ratios):.2f} × fewer, not "
                  "cooled down there", (0.98, 0.97), xycoords="axes fraction", ha="right", va="top", fontsize=11)


def draw_rates(axes, sweep: Sweep, found: Found, tuned: Tuning, r: Results) -> None:
    """Loss over learning rate: all seeds, a line through the sweep's seeds, hollow what was tried beside the rate."""
    for arm, points in tuned.points.items():
        main = points[:-2]  # the others are no further rates
        line = sorted((sweep.value(p), score(found, p, sweep.sweep_seeds)) for p in main
                      if math.isfinite(score(found, p, sweep.sweep_seeds)))
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=COLORS[arm], linewidth=1.5)
        for point in points:
            values = [loss for loss in losses(found.get(point, {})).values() if math.isfinite(loss)]
            fill = COLORS[arm] if point in main else "white"
            axes.plot([sweep.value(point) * (1 if point in main else 1.06)] * len(values), values,
                      "o" if arm == ADAMW else "s", color=COLORS[arm], markerfacecolor=fill, markersize=5)
        axes.annotate(f"{arm}'s rate", line[0], (4, 7), textcoords="offset points", color=COLORS[arm], fontsize=12,
                      fontweight="bold")
        axes.plot(sweep.value(r.points[arm]), mean(r.losses(arm)), "*", color=COLORS[arm], markersize=18,
                  markeredgecolor="black", zorder=3)
    axes.set_xscale("log", base=2)
    low, high = (round(math.log2(rate / sweep.s.max_lr)) for rate in axes.get_xlim())
    ticks = [sweep.s.max_lr * 2.0**k for k in range(low, high + 1)]  # AdamW's
    axes.set_xticks(ticks, [f"{rate:.3g}" for rate in ticks])
    axes.set_xlabel("peak learning rate")


def plot(sweep: Sweep, found: Found, r: Results, path: Path) -> None:
    """Curves of both optimizers, and the losses of their sweeps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_curves(left, r, sweep.s.iterations)
    draw_rates(right, sweep, found, tuning(sweep, found), r)
    left.set_title(f"mean over {sweep.seeds} seeds; band: lowest to highest", fontsize=12)
    right.set_title("final losses of all seeds; star: best; hollow: other than the rate", fontsize=12)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.tick_params(labelsize=11)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.label.set_size(12)
        axes.yaxis.label.set_size(12)
    figure.savefig(path, dpi=100)


def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and optimizers.png from the records of these flags and data; there may be others in the file."""
    runs = {key: run for key, run in read_runs(out / "runs.jsonl", Job._fields[:5]).items()
            if run["key"] == sweep.key and run["seed"] < sweep.seeds}
    found, done = collect(sweep, runs), [run for run in runs.values() if not run["problem"]]
    problems = [outcome(run) for run in runs.values() if run["problem"]]
    if left := len(foreseen(sweep, found)):
        problems.append(f"not finished: about {left} run(s) are to come; the same command goes on")
    if not done:
        return
    text = readme(sweep, found, done, problems)
    (out / "README.md").write_text(text, encoding="utf-8")
    if r := summarize(sweep, found):
        plot(sweep, found, r, out / "optimizers.png")
    print(f"\n{text}\nwritten to {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def seconds_per_run(sweep: Sweep, runs: dict[tuple, dict]) -> float | None:
    """Median of the finished runs with all steps; None before any."""
    mine = [run["wall_s"] for run in runs.values()
            if run["key"] == sweep.key and not (run["problem"] or run["diverged"] or run["half"])]
    return median(mine) if mine else None


def show_plan(sweep: Sweep, runs: dict[tuple, dict]) -> None:
    """What would be run, and for how long."""
    found = collect(sweep, runs)
    todo, each = foreseen(sweep, found), seconds_per_run(sweep, runs)
    for point in dict.fromkeys(point for point, _ in [*((p, 0) for p in found), *todo]):
        left = sum(p == point for p, _ in todo)
        print(f"{len(found.get(point, ())):3} done, {left:3} to run  {sweep.change(point)}")
    weight = sum(0.5 if point.half else 1.0 for point, _ in todo)
    hours = "time unknown: no run has ended yet" if each is None else (
        f"about {weight * each / sweep.jobs / 60:.0f} min, {sweep.jobs} at a time")
    print(f"{len(todo)} to run, {hours}; more where an optimum lies at the edge of its grid")


def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.multipliers = exponents(args.multipliers)
    if len(args.multipliers) < 3 or args.multipliers[-1] - args.multipliers[0] >= len(args.multipliers):
        raise ValueError("--multipliers: at least three powers of two without a gap are needed, such as 1/2,1,2")
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    least = 2 if args.quick else 3
    if args.seeds < least:
        raise ValueError(f"--seeds must be at least {least}, got {args.seeds}"
                         + ("" if args.quick else "; 2 need --quick"))
    if not 1 <= args.sweep_seeds <= args.seeds:
        raise ValueError(f"--sweep-seeds must be 1 to {args.seeds}, the number of --seeds, got {args.sweep_seeds}")
    for name in ("jobs", "finalists"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")
    args.out = args.out or ROOT / "records" / f"{date.today()}_optimizers" / Path(args.data).name


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] [-- flags of train_baseline.py]")
    parser.add_argument("--data", default="shakespeare_char",
                        help="data set: a folder under data/, or a path (default: shakespeare_char)")
    parser.add_argument("--multipliers", default="1/4,1/2,1,2,4", metavar="X,..",
                        help="of each optimizer's rate at first, powers of two (default: 1/4,1/2,1,2,4)")
    parser.add_argument("--seeds", type=int, help="runs of the finalists and of half the steps (default: 5)")
    parser.add_argument("--sweep-seeds", "--sweep_seeds", type=int, default=1,
                        help="runs of everything that is tried (default: 1)")
    parser.add_argument("--finalists", type=int, default=3,
                        help="settings of each optimizer that get all seeds (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--quick", action="store_true", help="2 seeds of 20 steps, to try it out")
    parser.add_argument("--list", action="store_true", help="print the plan and its time, and run nothing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the results; name it to go on another day "
                        "(default: records/DATE_optimizers/DATA)")
    parser.add_argument("flags", nargs="*", help="after --: flags of train_baseline.py for all runs")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    if args.list:
        show_plan(sweep, read_runs(file, Job._fields[:5]))
        return 0
    try:
        failed = run_sweep(sweep, command, file)
    finally:
        write_report(sweep, args.out)
    return exit_code(failed)


def main(argv: list[str] | None = None) -> int:
    return command_line("bench/optimizers.py", parse_args, compare, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the runs under way too
    sys.exit(main())
