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

Runs of a seed have the same initial weights and batches: differences are paired by seed. Flags after ` -- ` go to all
runs. With --preset among them there is no proxy: shape, length and rates are the preset's. Writes --out: runs.jsonl,
README.md and optimizers.png. The same command goes on where an earlier one ended.
"""
import argparse
import math
import os
import shlex
import shutil
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path
from bench.common import Found, difference, effect, interval, markdown, mean_sd, paired, ratios  # noqa: E402

TRAINER = ROOT / "train_baseline.py"
MODEL = "--model-type moderngpt --mlp relu2 --no-norm-gain".split()
ALWAYS = "--target-loss 0 --save-every 0 --no-save-last".split()
# One thread: several runs go side by side.
SHAPE = """--preset cpu --device cpu --backend plain --threads 1 --num-layers 4 --width 128 --head-dim 32
--seq-len 128 --micro-tokens 2048 --schedule cosine""".split()
# With a large vocabulary nearly all the time goes to the head: fewer tokens.
FEW_TOKENS = "--batch-tokens 1024 --iterations 250 --warmup-steps 25 --eval-every 25 --eval-tokens 16384".split()
MANY_TOKENS = "--batch-tokens 2048 --iterations 500 --warmup-steps 50 --eval-every 25 --eval-tokens 32768".split()
LARGE_VOCAB = 4096
QUICK = "--iterations 20 --warmup-steps 2 --eval-every 5 --eval-tokens 1024".split()
ADAMW, MUON, HALF = "AdamW", "Muon", "Muon, half the steps"
TRIES = ("--beta2 0.99", "--weight-decay 0")  # of AdamW; Muon's matrices have no decay either
LEAST = 0.1  # last learning rate / peak
EXTEND = 4  # factors of two by which a grid may grow at either end
OWN = {"seed": "--seeds", "data": "--data"} | dict.fromkeys(  # what the runs differ in -> what sets it
    ("optimizer", "max_lr", "min_lr", "muon_lr", "beta2", "weight_decay"), "")

# --- Plan

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
        return common.key_of(self.common, self.fingerprint, self.s.max_lr, self.s.muon_lr)

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
        if point.muon is not None:
            words.append(f"--muon-lr {self.value(point):.6g}")
        words += [f"--max-lr {rate:.6g} --min-lr {LEAST * rate:.6g}", point.extra]
        if point.half:
            words.append(f"--iterations {s.iterations // 2} --warmup-steps {s.warmup_steps // 2}")
        return " ".join(filter(None, words))

    def job(self, point: Point, seed: int) -> Job:
        return Job(point.optimizer, self.change(point), seed, self.key, point.half, point.adam, point.muon,
                   point.extra, self.common, self.fingerprint, self.jobs)

    def records(self, runs: dict[tuple, dict]) -> dict[Point, dict[int, dict]]:
        """Point -> seed -> record of the finished runs of these flags, data and seeds."""
        found: dict[Point, dict[int, dict]] = {}
        for run in runs.values():
            if run["key"] == self.key and not run["problem"] and run["seed"] < self.seeds:
                point = Point(*(run[name] for name in Point._fields))
                found.setdefault(point, {})[run["seed"]] = run
        return found

    def collect(self, runs: dict[tuple, dict]) -> Found:
        return {point: {seed: common.loss_of(run) for seed, run in sorted(mine.items())}
                for point, mine in self.records(runs).items()}

    def plan(self, found: Found) -> dict[Point, int]:
        """How many seeds of which points the losses so far call for. Complete is a sweep that has all of them."""
        tuned = tuning(self, found)
        seeds = {point: self.sweep_seeds for points in tuned.points.values() for point in points}
        for points in tuned.points.values() if tuned.complete else ():
            seeds |= dict.fromkeys(finalists(self, found, points), self.seeds)
        best = winner(self, found, tuned, MUON)
        if best is not None:
            seeds[best._replace(half=True)] = self.seeds
        return seeds

    def order(self, item: tuple[Point, int]) -> int:
        return item[1]

    def distance(self, point: Point) -> int:
        return point.rate

def can_compile() -> bool:
    """Whether the trainer can compile on a CPU."""
    return any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))

def proxy_flags(vocab_size: int) -> list[str]:
    """Of the model that stands in for the real one."""
    compiles = can_compile()
    if not compiles:
        print("note: no C++ compiler, the runs are not compiled and take longer", file=sys.stderr)
    return [*SHAPE, "--compile" if compiles else "--no-compile", *(
        FEW_TOKENS if vocab_size > LARGE_VOCAB else MANY_TOKENS)]

def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs of the grid. Raises ValueError for flags that train_baseline.py refuses,
    FileNotFoundError where the data set is missing."""
    import train_baseline as t  # not above: --help needs no torch

    given = common.given(t, args.flags)
    common.refuse_own(given, OWN)
    corpus = t.open_corpus(args.data)
    proxy = [] if "preset" in given else proxy_flags(corpus.meta["vocab_size"])
    quick = QUICK if args.quick else []
    shared = (*MODEL, *ALWAYS, "--data", args.data, *proxy, *quick, *args.flags)
    s = common.parsed(t, [*shared, "--optimizer", "muon"])
    if not 0 < s.eval_every <= s.iterations // 2:
        raise ValueError(f"--eval-every {s.eval_every}: steps to equal loss need evaluations on the way, at least one "
                         f"in the first {s.iterations // 2} steps")
    sweep = Sweep(shared, corpus.fingerprint(), s, tuple(args.multipliers), args.seeds,
                  args.sweep_seeds, args.finalists, args.jobs)
    for point in (Point(0), Point(0, extra=" ".join(TRIES)), Point(0, 0, half=True)):
        common.parsed(t, [*shared, *sweep.change(point).split()])
    return sweep

def score(found: Found, point: Point, seeds: int) -> float | None:
    """Mean loss of the first seeds; None without all of them."""
    known = found.get(point, {})
    return mean(known[seed] for seed in range(seeds)) if known.keys() >= set(range(seeds)) else None

def grow(sweep: Sweep, scores: dict[int, float | None], size: int) -> list[int]:
    """The exponents of a grid: it grows while its best lies at an edge, or it is smaller than `size`; then at the end
    that is nearer to the best. Ends where a score is missing."""
    ks = list(sweep.grid)
    while all(scores[k] is not None for k in ks):
        top = min(ks, key=scores.get)
        low, high = top - ks[0], ks[-1] - top
        down, up = ks[0] > sweep.reach[0], ks[-1] < sweep.reach[-1]
        at_edge = (down and low == 0) or (up and high == 0)
        if not (at_edge or (len(ks) < size and (down or up))):
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

    adam = scores(Point)
    first = grow(sweep, adam, 0)
    if any(adam[k] is None for k in first):
        return Tuning({ADAMW: [Point(k) for k in first], MUON: []}, False)
    embedding = min(first, key=adam.get)  # AdamW's best rate serves embeddings and head
    muon = scores(lambda k: Point(embedding, k))
    ours, theirs = grow(sweep, adam, 0), grow(sweep, muon, 0)
    for _ in sweep.reach:  # until both are as large
        size = max(len(ours), len(theirs))
        ours, theirs = grow(sweep, adam, size), grow(sweep, muon, size)
    points = {ADAMW: [Point(k) for k in ours], MUON: [Point(embedding, k) for k in theirs]}
    if any(adam[k] is None for k in ours) or any(muon[k] is None for k in theirs):
        return Tuning(points, False)
    best, top = min(ours, key=adam.get), min(theirs, key=muon.get)
    points[ADAMW] += [Point(best, extra=flags) for flags in TRIES]
    points[MUON] += [Point(embedding + step, top) for step in (-1, 1)]
    every = [score(found, point, sweep.sweep_seeds) for some in points.values() for point in some]
    return Tuning(points, None not in every)

def finalists(sweep: Sweep, found: Found, points: list[Point]) -> list[Point]:
    """The best settings by the sweep's seeds; of those that diverged none, unless all did."""
    scores = {point: score(found, point, sweep.sweep_seeds) for point in points}
    ranked = sorted(points, key=scores.get)
    finite = [point for point in ranked if math.isfinite(scores[point])]
    return (finite or ranked[:1])[:sweep.finalists]

def winner(sweep: Sweep, found: Found, tuned: Tuning, optimizer: str) -> Point | None:
    """The finalist with the lowest mean over all seeds; None while runs are missing."""
    if not tuned.complete:
        return None
    last = finalists(sweep, found, tuned.points[optimizer])
    means = {point: score(found, point, sweep.seeds) for point in last}
    return None if None in means.values() else min(means, key=means.get)

# --- Runs

def numbers(events: list[dict]) -> dict:
    """Of a run's metrics: its validation curve as (step, loss), its size, and its median ms per step."""
    curve = {event["step"]: event["val_loss"] for event in events if "val_loss" in event and "step" in event}
    times = [event["step_ms"] for event in events if "step_ms" in event]
    return {"val_loss": events[-1]["val_loss"], "parameters": events[-1]["params_total"],
            "tokens": common.tokens_of(events), "ms": median(times[1:] or times),
            "curve": sorted(curve.items())}

def measure(job: Job, children: set) -> dict:
    flags = [*job.common, *job.change.split()]
    events, config = common.train(TRAINER, flags, job.seed, children)
    return common.about(config, job.fingerprint) | numbers(events)

def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    return common.record(job, TRAINER, lambda: measure(job, children), may_diverge=True)

def outcome(run: dict) -> str:
    """A line about a finished run."""
    who = f"{run['change']}, seed {run['seed']}"
    if run["problem"]:
        return f"{who}: FAILED: {run['problem']}"
    return f"{who}: " + ("diverged" if run["diverged"] else f"val loss {run['val_loss']:.4f}, {run['wall_s']:.0f} s")

# --- Results

class Results(NamedTuple):
    """What the finished comparison tells; lists are in the order of the seeds."""
    points: dict[str, Point]  # arm -> its settings
    runs: dict[str, list[dict]]  # arm -> records
    steps: list[float | None]  # at which full-length Muon has AdamW's final loss; None where it never has
    step_ratios: list[float | None]  # AdamW's steps / these
    ms_ratios: list[float]  # time of a step of Muon / of AdamW

    def losses(self, arm: str) -> list[float]:
        return [*map(common.loss_of, self.runs[arm])]

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

def summarize(sweep: Sweep, runs: dict[tuple, dict]) -> Results | None:
    """None while runs are missing, or where all that an optimizer tried diverged."""
    found, records = sweep.collect(runs), sweep.records(runs)
    tuned = tuning(sweep, found)
    adam, muon = (winner(sweep, found, tuned, optimizer) for optimizer in (ADAMW, MUON))
    if adam is None or muon is None:
        return None
    points = {ADAMW: adam, MUON: muon, HALF: muon._replace(half=True)}
    means = [score(found, point, sweep.seeds) for point in points.values()]
    if None in means or math.inf in means[:2]:
        return None
    arms = {arm: [records[point][seed] for seed in range(sweep.seeds)] for arm, point in points.items()}
    ms = [{run["seed"]: run["ms"] for run in arms[arm]} for arm in (MUON, ADAMW)]
    steps = [crossing(m["curve"], a["val_loss"]) for a, m in zip(arms[ADAMW], arms[MUON], strict=True)]
    return Results(points, arms, steps, [step and sweep.s.iterations / step for step in steps], ratios(*ms))

def mean_ratio(values: list[float | None]) -> str:
    """Mean and 95 % interval of a ratio over seeds in words."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return f"not known: only {len(known)} of {len(values)} seeds reached it"
    e = effect(known)
    return interval(e, ".3f") if e else "not measured"

def verdict(deltas: list[float], better: str, worse: str) -> str:
    """What the interval of differences says: `better` if it is below 0."""
    e = effect(deltas)
    return e.side(worse, better, "not settled") if e else "not settled"

FINDINGS = """- **Loss at equal steps** ({steps}): {full}. AdamW {adamw}, Muon {muon} (mean ± sd, nats per token, \
n = {seeds}); Muon - AdamW {full_by}.
- **Steps to equal loss**: full-length Muon has AdamW's final loss of the same seed {reached}of {steps}. AdamW's \
steps / Muon's: {step_ratio}. Muon's rate is still high at that step; what a schedule for fewer steps makes of it, \
the next line tells.
- **Half the steps** ({half_steps}) and a whole schedule of its own: {half}. Muon {half_loss}; minus AdamW with all \
steps {half_by}.
- **Time**: a step takes {ms[0]:.1f} ms with AdamW, {ms[1]:.1f} ms with Muon (medians); Muon's / AdamW's: \
{ms_ratio}. AdamW's seconds / Muon's to AdamW's final loss: {time_ratio}."""

def findings(sweep: Sweep, r: Results) -> str:
    """What came out, in a few lines."""
    full, half, steps = r.minus_adamw(MUON), r.minus_adamw(HALF), sweep.s.iterations
    times = [step and step / ms for step, ms in zip(r.step_ratios, r.ms_ratios, strict=True)]
    return FINDINGS.format(
        steps=steps, half_steps=steps // 2, seeds=sweep.seeds,
        adamw=mean_sd(r.losses(ADAMW)), muon=mean_sd(r.losses(MUON)), half_loss=mean_sd(r.losses(HALF)),
        full=verdict(full, "Muon is better", "AdamW is better"), full_by=difference(full),
        half=verdict(half, "they suffice", "not enough"), half_by=difference(half),
        reached=f"after {mean(r.steps):.0f} steps (mean) " if None not in r.steps else "",
        ms=[median(run["ms"] for run in r.runs[arm]) for arm in (ADAMW, MUON)],
        step_ratio=mean_ratio(r.step_ratios), ms_ratio=mean_ratio(r.ms_ratios), time_ratio=mean_ratio(times))

def result_table(sweep: Sweep, r: Results) -> str:
    rows = []
    for arm, point in r.points.items():
        tokens = max(run.get("tokens", 0) for run in r.runs[arm])
        steps = sweep.s.iterations // (2 if point.half else 1)
        rows.append([arm, f"`{sweep.change(point)}`", steps, f"{tokens:,}", mean_sd(r.losses(arm)), sweep.seeds,
                     "" if arm == ADAMW else difference(r.minus_adamw(arm))])
    return markdown(["", "settings", "steps", "tokens", "final val loss ± sd", "n", "minus AdamW ± se"], rows)

def tuning_table(sweep: Sweep, found: Found, tuned: Tuning) -> str:
    """Everything that was tried, with the losses of the sweep and of all seeds."""
    def cell(point: Point, seeds: int) -> str:
        value = score(found, point, seeds)
        return "" if value is None else f"{value:.4f}" if math.isfinite(value) else "diverged"

    rows = []
    for optimizer, points in tuned.points.items():
        best = winner(sweep, found, tuned, optimizer)
        for point in sorted(points, key=lambda p: (p.rate, p.adam, p.extra)):
            mark = "**" if point == best else ""
            all_seeds = f"{mark}{cell(point, sweep.seeds)}{mark}" if sweep.seeds > sweep.sweep_seeds else ""
            rows.append([optimizer, f"`{sweep.change(point)}`", cell(point, sweep.sweep_seeds), all_seeds])
    head = ["optimizer", "settings", f"val loss, {sweep.sweep_seeds} seed(s)", f"mean of {sweep.seeds} seeds"]
    return markdown(head, rows)

def edge_notes(r: Results, tuned: Tuning) -> list[str]:
    """Where the best may lie beyond what was tried."""
    edges = {arm: {pick(point.rate for point in tuned.points[arm]) for pick in (min, max)} for arm in (ADAMW, MUON)}
    return [f"{arm}'s best learning rate is the last that was tried; give others with --multipliers"
            for arm, rates in edges.items() if r.points[arm].rate in rates]

FIGURE = "![validation loss against step and learning rate](optimizers.png)\n\n"
README = """# AdamW against Muon on the same model: {name}, {date}

{findings}

{results}## Tuning

Settings tried and full-length runs made with them: {budgets}. Validation loss in nats per token, the best in bold.

{tuning}

## How

- Both: {s.model_type}, {s.num_layers} layers, width {s.width}, {s.mlp}, no biases, {parameters} parameters;
  for a seed the same initial weights and the same batches in the same order; warm-up over
  {s.warmup_steps} steps, then {schedule} down to {least} × the peak, Muon's rate by the same factor;
  gradient clipped to a norm of {s.grad_clip}; AdamW's weight decay {s.weight_decay}; Muon's own matrices have
  {muon_decay}.
- AdamW's rate is swept in powers of two; at the best one `{tries}` are tried as
  well. Then Muon's rate is swept with AdamW's best rate for embeddings and head, which at the best one
  is halved and doubled. The best {finalists} of each get {seeds} seeds; the lowest mean is reported. Differences
  and ratios are paired by seed; intervals are Student t and ignore that the best is chosen.
- Steps to equal loss are interpolated between evaluations, every {s.eval_every} steps on {s.eval_tokens:,} tokens.
- Step times are medians of runs that went {jobs} at a time: no benchmark of the machine.
- Commands: `{command}`
- Flags of all runs of train_baseline.py: `{flags}`
- Data: {data}; {tokens} training tokens a full-length run
- Machine: {hardware}; torch {torch}; commit {commit}; train_baseline.py {trainer}
{problems}
Rates are tuned to a factor of two, one after the other, for this size and number of steps: what holds here need not
hold for longer runs.{size_caveat}
"""

def readme(sweep: Sweep, runs: dict[tuple, dict], problems: list[str]) -> str:
    """README.md: the findings, the tables, and how they came about."""
    s, found, r = sweep.s, sweep.collect(runs), summarize(sweep, runs)
    tuned, done = tuning(sweep, found), [run for run in runs.values() if not run["problem"]]
    whole = [run for run in done if not run["half"] and "tokens" in run]
    problems = [*problems, *(edge_notes(r, tuned) if r else [])]
    return README.format(
        s=s, name=Path(s.data).name, least=LEAST, tries="`, `".join(TRIES),
        finalists=sweep.finalists, seeds=sweep.seeds,
        findings=findings(sweep, r) if r else "No result: runs are missing, or diverged.",
        results=f"{FIGURE}{result_table(sweep, r)}\n\n" if r else "",
        budgets="; ".join(f"{optimizer} {len(points)} settings, {sum(len(found.get(p, ())) for p in points)} runs"
                          for optimizer, points in tuned.points.items()),
        tuning=tuning_table(sweep, found, tuned),
        parameters=f"{whole[0]['parameters']:,}" if whole else "unknown",
        schedule={"cosine": "half a cosine", "wsd": "constant, at the end linear"}[s.schedule],
        muon_decay=s.muon_weight_decay or "none", flags=shlex.join(sweep.common),
        tokens=f"{max((run['tokens'] for run in whole), default=0):,}",
        jobs="; ".join(dict.fromkeys(str(run["jobs"]) for run in done)),
        problems=common.problem_lines(problems, done, "train_baseline.py"),
        size_caveat="" if s.device == "cuda" else " A CPU proxy says little about the 124 M parameter model.",
        **common.facts(done))

# --- Picture

COLORS = {ADAMW: "#D55E00", MUON: "#0072B2", HALF: "#0072B2"}  # Okabe and Ito: told apart by all eyes

def draw_curves(axes, r: Results, end: int) -> None:
    """Mean curves, bands from the lowest to the highest seed, and a dot where Muon has AdamW's final loss."""
    means = {}
    for arm, runs in r.runs.items():
        curves = [dict(run["curve"]) for run in runs if not run["diverged"]]
        x = sorted(set.intersection(*map(set, curves))) if curves else []
        y = [[curve[step] for curve in curves] for step in x]
        means[arm] = dict(zip(x, map(mean, y), strict=True))
        style = "--" if arm == HALF else "-"
        axes.plot(x, [*means[arm].values()], style, color=COLORS[arm], linewidth=2, label=arm)
        axes.fill_between(x, [*map(min, y)], [*map(max, y)], color=COLORS[arm], alpha=0.2, linewidth=0)
    if None not in r.steps:
        at = mean(r.steps)
        axes.plot(at, mean(r.losses(ADAMW)), "o", color=COLORS[MUON], markersize=8, markeredgecolor="black",
                  label=f"Muon has AdamW's final loss at step {at:.0f} of {end}")
    low = min(loss for curve in means.values() for loss in curve.values())
    room = max(loss for step, loss in means[ADAMW].items() if step >= 0.15 * end) - low
    axes.set_ylim(low - 0.12 * room, low + 1.1 * room)
    axes.set_xlim(0, 1.02 * end)
    axes.set_xlabel("training step")
    axes.set_ylabel("validation loss, nats per token")

def draw_rates(axes, sweep: Sweep, found: Found, r: Results) -> None:
    """Loss over learning rate: all seeds, a line through the sweep's seeds, hollow what was tried beside the rate."""
    for arm, points in tuning(sweep, found).points.items():
        color, swept = COLORS[arm], points[:-2]  # the others are no further rates
        scores = {sweep.value(p): score(found, p, sweep.sweep_seeds) for p in swept}
        line = [(x, y) for x, y in sorted(scores.items()) if math.isfinite(y)]
        axes.plot([x for x, _ in line], [y for _, y in line], "-", color=color, label=f"{arm}'s rate")
        for point in points:
            values = [loss for loss in found.get(point, {}).values() if math.isfinite(loss)]
            x = sweep.value(point) * (1 if point in swept else 1.06)
            axes.plot([x] * len(values), values, "o" if arm == ADAMW else "s", color=color, markersize=5,
                      markerfacecolor=color if point in swept else "white")
        axes.plot(sweep.value(r.points[arm]), mean(r.losses(arm)), "*", color=color, markersize=18,
                  markeredgecolor="black", zorder=3)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.3g}")
    axes.set_xlabel("peak learning rate")

def plot(sweep: Sweep, found: Found, r: Results, path: Path) -> None:
    """Curves of both optimizers, and the losses of their sweeps."""
    figure, (left, right) = common.panels(13, 5.6, 1, 2)
    draw_curves(left, r, sweep.s.iterations)
    draw_rates(right, sweep, found, r)
    left.set_title(f"mean over {sweep.seeds} seeds; band: lowest to highest")
    right.set_title("final losses of all seeds; star: best; hollow: other than the rate")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=100)

def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and optimizers.png from the records of these flags and data; there may be others in the file."""
    runs = {key: run for key, run in common.read_runs(out / "runs.jsonl", Job).items()
            if run["key"] == sweep.key and run["seed"] < sweep.seeds}
    found = sweep.collect(runs)
    if not found:
        return
    problems = [outcome(run) for run in runs.values() if run["problem"]] + common.unfinished(sweep, found)
    if r := summarize(sweep, runs):
        plot(sweep, found, r, out / "optimizers.png")
    common.write_readme(out, readme(sweep, runs, problems))

# --- Command line

def show_plan(sweep: Sweep, runs: dict[tuple, dict]) -> None:
    """What would be run, and for how long."""
    found = sweep.collect(runs)
    todo = common.foreseen(sweep, found)
    for point in dict.fromkeys([*found, *(point for point, _ in todo)]):
        left = sum(p == point for p, _ in todo)
        print(f"{len(found.get(point, ())):3} done, {left:3} to run  {sweep.change(point)}")
    seconds = [run["wall_s"] for run in runs.values()
               if run["key"] == sweep.key and not (run["problem"] or run["diverged"] or run["half"])]
    amount = sum(0.5 if point.half else 1.0 for point, _ in todo)
    print(f"{len(todo)} to run, {common.effort(amount, seconds, None, sweep.jobs)}; more where an "
          "optimum lies at the edge of its grid")

def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.multipliers = common.exponents(args.multipliers)
    if len(args.multipliers) < 3 or args.multipliers[-1] - args.multipliers[0] >= len(args.multipliers):
        raise ValueError("--multipliers: at least three powers of two without a gap are needed, such as 1/2,1,2")
    args.seeds = (2 if args.quick else 5) if args.seeds is None else args.seeds
    common.check_counts(args, seeds=3, quick=2, finalists=1)
    if not 1 <= args.sweep_seeds <= args.seeds:
        raise ValueError(f"--sweep-seeds must be 1 to {args.seeds}, the number of --seeds, got {args.sweep_seeds}")
    args.out = args.out or common.default_out("optimizers") / Path(args.data).name

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_baseline.py")
    add = parser.add_argument
    add("--data", default="shakespeare_char",
        help="a folder under data/, or a path (default: shakespeare_char)")
    add("--multipliers", default="1/4,1/2,1,2,4", metavar="X,..",
        help="of each optimizer's rate at first, powers of two (default: 1/4,1/2,1,2,4)")
    add("--sweep-seeds", "--sweep_seeds", type=int, default=1,
        help="runs of everything that is tried (default: 1)")
    add("--finalists", type=int, default=3, help="settings of each optimizer that get all seeds (default: 3)")
    common.add_sweep_options(parser, "optimizers/DATA", seeds=None)
    return parser.parse_args(argv)

def compare(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    if args.list:
        show_plan(sweep, common.read_runs(file, Job))
        return 0
    run_jobs = partial(common.run_all, workers=args.jobs, command=command, path=file, execute=execute, outcome=outcome)
    return common.finish(lambda: common.run_rounds(sweep, Job, file, run_jobs), lambda: write_report(sweep, args.out))

main = partial(common.command_line, "optimizers", parse_args, compare)

if __name__ == "__main__":
    common.start(main)
