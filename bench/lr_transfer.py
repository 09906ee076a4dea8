"""Does a learning rate that is tuned at the smallest width serve at the largest? With muP, and without as the control.

    python bench/lr_transfer.py --list            # the plan and how long it takes; runs nothing
    python bench/lr_transfer.py --jobs 2          # widths 64, 128, 256 on a CPU; Muon, AdamW; 3 seeds where it counts
    python bench/lr_transfer.py --widths 256 --optimizers muon -- --preset gpu    # tunes one width, prints what to use

All peak learning rates are multiplied by powers of two. The smallest width is the base, where both parametrizations are
the same runs. First every multiplier gets one seed; where the best lies at the edge, the grid grows. Then all seeds are
run at each width's best multiplier, at its neighbours in the smallest and the largest width, and at the multiplier that
is best in the smallest: the transferred one. This repeats until nothing new is asked for.

Flags after ` -- ` change the proxy. With --preset among them there is no proxy: multiplier 1 is the preset's own rates.
Writes --out: runs.jsonl, README.md and lr_transfer.png. The same command goes on where an earlier one ended. The exit
code is 1 if muP misses a criterion.

Regret is loss(transferred multiplier) - loss(best multiplier), nats per token, paired by seed. Depth, batch and number
of steps are the same at all widths: muP does not speak of them.
"""
import argparse
import importlib
import math
import shlex
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path
from bench.common import Found, difference, paired, power  # noqa: E402

MAX_REGRET = 0.03  # nats per token at the largest width
# 400 steps: with fewer the loss hardly depends on the rate. One thread: several runs go side by side.
PROXY = """
--preset cpu --device cpu --data stdlib --no-compile --threads 1 --num-layers 2 --head-dim 32 --value-embeds 1
--batch-tokens 1024 --micro-tokens 1024 --seq-len 64 --max-doc-len 64 --window 64 --window-start 0
--eval-seq-len 64 --eval-tokens 131072 --iterations 400 --warmup-steps 20 --cooldown 0.4 --lr-floor 0
--no-key-offset
""".split()
ALWAYS = "--target-loss 0 --eval-every 0 --save-every 0 --no-save-last".split()
OPTIMIZERS = {"muon": "", "adamw": "--hidden-optimizer adamw"}
RATES = {"muon": "--muon-lr 0.04 --adam-lr 0.008", "adamw": "--hidden-lr 0.004 --adam-lr 0.016"}  # of the proxy
SECONDS = 10  # a run of the proxy at width 64, until one is measured
BASE, SCALINGS = "base", {"mup": "muP", "standard": "standard parametrization"}
EXTEND = 3  # factors of two by which the grid may grow at either end
OWN = {"width": "--widths", "mup": "--parametrizations", "base_width": "--widths", "seed": "--seeds",
       "base_head_dim": "--mup-flags", "mup_embedding": "--mup-flags", "hidden_optimizer": "--optimizers"}

# --- Plan

class Series(NamedTuple):
    """Runs that differ in the multiplier and the seed alone."""
    optimizer: str
    scaling: str  # "base" at the smallest width, where both parametrizations are the same
    width: int

class Point(NamedTuple):
    """A series' runs with all peak rates multiplied by 2**k."""
    series: Series
    k: int

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
        return common.key_of(self.script.name, self.common, self.fingerprint)

    @property
    def series(self) -> list[Series]:
        scalings = {width: self.scalings for width in self.widths} | {self.widths[0]: (BASE,)}
        return [Series(optimizer, scaling, width) for optimizer in self.rates
                for width in self.widths for scaling in scalings[width]]

    @property
    def reach(self) -> range:
        """All exponents to which the grid may grow."""
        return range(self.grid[0] - EXTEND, self.grid[-1] + EXTEND + 1)

    def line(self, optimizer: str, scaling: str, width: int) -> Series:
        """The series of a parametrization, which at the base width is that of both."""
        return Series(optimizer, BASE if width == self.widths[0] else scaling, width)

    def rate_flags(self, optimizer: str, k: int) -> str:
        rates = " ".join(f"{flag} {rate * 2.0**k:.6g}" for flag, rate in self.rates[optimizer].items())
        return f"{OPTIMIZERS[optimizer]} {rates}".strip()

    def change(self, point: Point) -> str:
        (optimizer, scaling, width), k = point
        mup = f" --mup --base-width {self.widths[0]} {self.mup_flags}" if scaling == "mup" else ""
        return f"--width {width} {self.rate_flags(optimizer, k)}{mup}".strip()

    def job(self, point: Point, seed: int) -> Job:
        (optimizer, scaling, width), k = point
        return Job(optimizer, width, self.change(point), seed, self.key, power(k), scaling,
                   self.common, self.fingerprint, str(self.script))

    def collect(self, runs: dict[tuple, dict]) -> Found:
        """Losses of the finished runs of these flags, data and seeds."""
        by_change: dict[str, dict[int, float]] = {}
        for run in runs.values():
            if run["key"] == self.key and not run["problem"] and run["seed"] < self.seeds:
                by_change.setdefault(run["change"], {})[run["seed"]] = common.loss_of(run)
        points = {Point(series, k): by_change.get(self.change(Point(series, k)))
                  for series in self.series for k in self.reach}
        return {point: losses for point, losses in points.items() if losses}

    def plan(self, found: Found) -> dict[Point, int]:
        """How many seeds of which points the losses so far call for. Complete is a sweep that has all of them."""
        seeds = {Point(series, k): 1 for series in self.series for k in self.grid}
        for series in self.series:
            seeds |= around_best(self, found, series, seeds)
        for series in self.series:
            moved = best(self, found, Series(series.optimizer, BASE, self.widths[0]))
            if moved is not None:
                seeds[Point(series, moved)] = self.seeds
        return seeds

    def order(self, item: tuple[Point, int]) -> tuple:
        """The longest runs first: what is left at the end is short."""
        (series, k), seed = item
        return -series.width, seed, abs(k)

    def distance(self, point: Point) -> int:
        return point.k

def best(sweep: Sweep, found: Found, series: Series) -> int | None:
    """Exponent of the lowest mean loss among the series' points with all seeds; None without any."""
    means = {k: mean(found[Point(series, k)].values()) for k in sweep.reach
             if len(found.get(Point(series, k), ())) == sweep.seeds}
    return min(means, key=means.get, default=None)

def candidates(sweep: Sweep, found: Found, series: Series) -> list[int]:
    """The best exponent, and those that with the seeds that they have are better: more seeds have to tell. Only the
    same seeds are compared: their losses go up and down together."""
    top = best(sweep, found, series)
    line = {k: found[Point(series, k)] for k in sweep.reach if found.get(Point(series, k))}
    if top is None:
        first = {k: losses[0] for k, losses in line.items() if 0 in losses}
        return [min(first, key=first.get)] if first else []
    better = [k for k, losses in line.items() if len(losses) < sweep.seeds
              and mean(losses.values()) < mean(line[top][seed] for seed in losses)]
    return [top, *better]

def around_best(sweep: Sweep, found: Found, series: Series, asked: dict[Point, int]) -> dict[Point, int]:
    """Points beside the best, one seed where none is asked for yet; then all seeds where they count."""
    def begun(ks) -> bool:
        return all(0 in found.get(Point(series, k), ()) for k in ks)

    if not begun(sweep.grid):
        return {}
    tops = candidates(sweep, found, series)
    near = {k for top in tops for k in (top - 1, top + 1) if k in sweep.reach}
    new = {Point(series, k): 1 for k in near if Point(series, k) not in asked}
    if begun(near):  # first let the grid grow
        at_end = series.width in (sweep.widths[0], sweep.widths[-1])
        new |= {Point(series, k): sweep.seeds for k in (*tops, *(near if at_end else ()))}
    return new

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

def refuse_flags(script, args: argparse.Namespace) -> None:
    """Raises ValueError for flags that the sweep sets itself, and for --mup-flags that are none."""
    common.refuse_own(common.given(script, args.flags), OWN)
    special = common.given(script, shlex.split(args.mup_flags)).keys()
    if others := sorted(special - {"mup_embedding", "base_head_dim"}):
        name = others[0].replace("_", "-")
        raise ValueError(f"--mup-flags: --{name} is none of --mup-embedding, --base-head-dim")

def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of the whole grid. Raises ValueError for wrong ones, FileNotFoundError without the data."""
    t = load(args.script)
    refuse_flags(t, args)
    proxy = "preset" not in common.given(t, args.flags)
    shared, base = (*ALWAYS, *(PROXY if proxy else []), *args.flags), args.widths[0]
    tuned = {}
    for name in args.optimizers:
        rates = RATES[name] if proxy else ""
        flags = [*OPTIMIZERS[name].split(), *rates.split(), *shared, "--width", str(base)]
        tuned[name] = common.parsed(t, flags, f"{name}, width {base}: ")
    s = tuned[args.optimizers[0]]
    sweep = Sweep(args.script, shared, t.open_corpus(s.data).fingerprint(), s.head_dim,
                  {name: peak_rates(s) for name, s in tuned.items()}, tuple(args.parametrizations),
                  tuple(args.widths), tuple(args.multipliers), args.mup_flags, args.seeds)
    for line in sweep.series:
        for k in sweep.grid:
            flags = [*shared, *sweep.change(Point(line, k)).split()]
            common.parsed(t, flags, f"{line.optimizer}, width {line.width}: ")
    return sweep

# --- Runs

def measure(job: Job, children: set) -> dict:
    """Loss and size of a run."""
    flags = [*job.common, *job.change.split()]
    events, config = common.train(Path(job.script), flags, job.seed, children)
    where = common.about(config, job.fingerprint)
    return where | {"val_loss": events[-1]["val_loss"], "parameters": events[-1]["params_total"],
                    "tokens": common.tokens_of(events)}

def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    script = Path(job.script)
    run = common.record(job, script, lambda: measure(job, children), may_diverge=True)
    return run | {"script": script.name}

def outcome(run: dict) -> str:
    """A line about a finished run."""
    who = f"{run['optimizer']}, {run['scaling']}, width {run['width']}, × {run['multiplier']}, seed {run['seed']}"
    if run["problem"]:
        return f"{who}: FAILED: {run['problem']}"
    done = "diverged" if run["diverged"] else f"val loss {run['val_loss']:.4f}"
    return f"{who}: {done}, {run['wall_s']:.0f} s"

def cost(width: int) -> float:
    """Relative time of a run; measured on one core at widths 64 to 256."""
    return (width / 64) ** 1.35

# --- Results

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

    def __str__(self) -> str:
        return ", ".join([self.optimizer, *([SCALINGS[self.scaling]] if self.scaling in SCALINGS else [])])

def make_row(sweep: Sweep, found: Found, series: Series, moved: int | None) -> Row:
    top = best(sweep, found, series)
    at_best, at_moved = (found.get(Point(series, k), {}) for k in (top, moved))
    return Row(series.width, top, moved, at_best, at_moved)

def summarize(sweep: Sweep, found: Found) -> list[Result]:
    """With one width there is a single parametrization, called base."""
    results = []
    for optimizer in sweep.rates:
        moved = best(sweep, found, Series(optimizer, BASE, sweep.widths[0]))
        for scaling in sweep.scalings if len(sweep.widths) > 1 else (BASE,):
            lines = [sweep.line(optimizer, scaling, width) for width in sweep.widths]
            results.append(Result(optimizer, scaling, [make_row(sweep, found, line, moved) for line in lines]))
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

def verdicts(result: Result) -> list[Verdict]:
    """What is asked of muP at several widths. Where the best lies is not: of a flat curve it is chance."""
    last = result.rows[-1]
    losses = {row.width: mean(row.at_moved.values()) for row in result.rows if row.at_moved}
    falls = all(wide < narrow for narrow, wide in pairwise(losses.values()))
    regret = mean(last.regrets) <= MAX_REGRET if last.regrets else None
    wider = falls if len(losses) == len(result.rows) else None
    moves = ", ".join(f"× {power(row.best)} at {row.width}" for row in result.rows if row.best is not None)
    by_width = ", ".join(f"{loss:.4f} at {width}" for width, loss in losses.items())
    return [
        Verdict("regret", f"at most {MAX_REGRET} nats", regret, f"{difference(last.regrets)} at width {last.width}"),
        Verdict("optimum", "", None, moves),
        Verdict("wider is better", "a falling loss at the transferred rate", wider, by_width),
    ]

def shortcomings(results: list[Result]) -> list[str]:
    """The criteria that muP misses."""
    return [f"{result.optimizer}: {verdict}" for result in results if result.scaling == "mup"
            for verdict in verdicts(result) if verdict.ok is False]

def loss_cell(losses: dict[int, float], is_best: bool, is_moved: bool) -> str:
    if not losses:
        return "-"
    loss = mean(losses.values())
    text = f"{loss:.4f}" if math.isfinite(loss) else "diverged"
    return f"{f'**{text}**' if is_best else text}{' →' if is_moved else ''} ({len(losses)})"

def loss_table(sweep: Sweep, found: Found, result: Result) -> str:
    """Mean loss by width and multiplier."""
    def losses(row: Row, k: int) -> dict[int, float]:
        return found.get(Point(sweep.line(result.optimizer, result.scaling, row.width), k), {})

    ks = [k for k in sweep.reach if any(losses(row, k) for row in result.rows)]
    rows = [[row.width, *(loss_cell(losses(row, k), k == row.best, k == row.moved) for k in ks)]
            for row in result.rows]
    return common.markdown(["width", *(f"× {power(k)}" for k in ks)], rows)

def findings(sweep: Sweep, results: list[Result]) -> str:
    """What came out, in a few lines; of muP first."""
    if len(sweep.widths) == 1:
        tuned = [(r.optimizer, r.rows[0].best) for r in results if r.rows[0].best is not None]
        return "\n".join(f"- **{name}**: best × {power(k)}; go on with `{go_on(sweep, name, k)}`"
                         for name, k in tuned)
    lines = []
    for result in sorted(results, key=lambda r: r.scaling != "mup"):
        mup = result.scaling == "mup"
        lines.append(f"- **{result}**{'' if mup else ' (the control)'}")
        lines += [f"  - {v if mup else f'{v.criterion}: {v.said}'}" for v in verdicts(result)]
    return "\n".join(lines)

README = """# {title}, {date}

{findings}

{tables}
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
TABLE = """## {heading}

Validation loss in nats per token, mean over seeds (their number); best in bold; → the best of the smallest width.

{losses}
"""

def edge_notes(sweep: Sweep, results: list[Result]) -> list[str]:
    """Optima that may lie beyond what was run."""
    tops = dict.fromkeys((sweep.line(r.optimizer, r.scaling, row.width), row.best) for r in results for row in r.rows)
    return [f"{line.optimizer}, {line.scaling}, width {line.width}: the best multiplier, {power(k)}, is the last that "
            "the grid may grow to; give others with --multipliers"
            for line, k in tops if k in (sweep.reach[0], sweep.reach[-1])]

def readme(sweep: Sweep, found: Found, results: list[Result], runs: list[dict], problems: list[str]) -> str:
    """README.md: the verdicts, the tables, and how it came about."""
    widths = sweep.widths
    title = f"Does the learning rate tuned at width {widths[0]} serve at width {widths[-1]}?"
    if len(widths) == 1:
        title = f"Learning rate by width, {' and '.join(sweep.rates)}"
    tables = [TABLE.format(heading=r, losses=loss_table(sweep, found, r)) for r in results]
    return README.format(
        title=title, findings=findings(sweep, results), tables="\n".join(tables), script=sweep.script.name,
        rates=", ".join(f"{name} `{sweep.rate_flags(name, 0)}`" for name in sweep.rates),
        flags=shlex.join(sweep.common), seeds=sweep.seeds,
        mup_flags=f"; of muP's: `{sweep.mup_flags}`" if sweep.mup_flags else "",
        tokens="; ".join(dict.fromkeys(str(run["tokens"]) for run in runs if "tokens" in run)),
        problems=common.problem_lines([*problems, *edge_notes(sweep, results)], runs, sweep.script.name),
        **common.facts(runs))

def draw_width(axes, found: Found, series: Series, top: int | None, color) -> None:
    """Losses over the multiplier: mean, standard deviation over seeds, a star at the best."""
    points = {point.k: [*losses.values()] for point, losses in found.items() if point.series == series}
    points = {k: points[k] for k in sorted(points) if all(map(math.isfinite, points[k]))}
    spreads = [stdev(losses) if len(losses) > 1 else math.nan for losses in points.values()]
    axes.errorbar([2.0**k for k in points], [*map(mean, points.values())], yerr=spreads,
                  marker=".", capsize=3, color=color, label=f"width {series.width}")
    if top in points:
        axes.plot(2.0**top, mean(points[top]), marker="*", markersize=14, color=color, linestyle="")

def draw_result(axes, sweep: Sweep, found: Found, result: Result) -> None:
    """A line for each width."""
    from matplotlib import colormaps

    for i, row in enumerate(result.rows):
        color = colormaps["viridis"](0.85 * i / max(1, len(result.rows) - 1))
        line = sweep.line(result.optimizer, result.scaling, row.width)
        draw_width(axes, found, line, row.best, color)
    moved = result.rows[0].moved
    if moved is not None and len(result.rows) > 1:
        axes.axvline(2.0**moved, color="black", linewidth=0.8, linestyle="--",
                     label=f"best at width {sweep.widths[0]}")
    axes.set_xscale("log", base=2, subs=[])
    axes.xaxis.set_major_formatter(lambda x, _: power(round(math.log2(x))))
    axes.set_title(str(result))
    axes.grid(alpha=0.3)
    axes.legend()

def plot(sweep: Sweep, found: Found, results: list[Result], path: Path) -> None:
    """A panel for each optimizer and parametrization."""
    rows = len(sweep.rates)
    columns = len(results) // rows
    figure, grid = common.panels(1 + 5 * columns, 1 + 3.7 * rows, rows, columns, squeeze=False,
                                 sharex=True, sharey="row")
    for axes, result in zip(grid.flat, results, strict=True):
        draw_result(axes, sweep, found, result)
    figure.supylabel("validation loss, nats per token")
    figure.supxlabel("multiplier of all peak learning rates")
    figure.suptitle("mean and standard deviation over seeds; star: best of its width")
    figure.savefig(path, dpi=130)

def go_on(sweep: Sweep, optimizer: str, k: int) -> str:
    """Flags of a run at another width that uses what was found at the base."""
    return (f"{sweep.rate_flags(optimizer, k)} --mup --base-width {sweep.widths[0]} "
            f"--base-head-dim {sweep.head_dim} {sweep.mup_flags}").rstrip()

def print_flags(sweep: Sweep, results: list[Result]) -> None:
    """The flags to go on with; last those of the optimizer that is best at the base."""
    tuned = {r.optimizer: r.rows[0] for r in results if r.rows[0].best is not None}
    for optimizer, row in sorted(tuned.items(), key=lambda item: -mean(item[1].at_best.values())):
        print(f"to go on with {optimizer}, tuned at width {row.width}:\n{go_on(sweep, optimizer, row.best)}")

def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and lr_transfer.png from the records of these flags and data; there may be others in the file."""
    runs = common.read_runs(out / "runs.jsonl", Job)
    found = sweep.collect(runs)
    if not found:
        return
    changes = {sweep.change(Point(line, k)) for line in sweep.series for k in sweep.reach}
    mine = [run for run in runs.values() if run["key"] == sweep.key and run["change"] in changes]
    problems = [outcome(run) for run in mine if run["problem"]] + common.unfinished(sweep, found)
    results = summarize(sweep, found)
    plot(sweep, found, results, out / "lr_transfer.png")
    done = [run for run in mine if not run["problem"]]
    common.write_readme(out, readme(sweep, found, results, done, problems))
    print_flags(sweep, results)

# --- Command line

def show_plan(sweep: Sweep, runs: dict[tuple, dict], jobs: int) -> None:
    """What would be run, and for how long."""
    found = sweep.collect(runs)
    todo = common.foreseen(sweep, found)
    for series in sweep.series:
        done = sum(len(losses) for point, losses in found.items() if point.series == series)
        left = sum(point.series == series for point, _ in todo)
        print(f"{series.optimizer:6} {series.scaling:9} width {series.width:5}: {done:3} done, {left:3} to run")
    seconds = [run["wall_s"] / cost(run["width"]) for run in runs.values()
               if run["key"] == sweep.key and not (run["problem"] or run["diverged"])]
    guess = SECONDS if sweep.common == (*ALWAYS, *PROXY) else None
    amount = sum(cost(point.series.width) for point, _ in todo)
    print(f"{len(todo)} to run, {common.effort(amount, seconds, guess, jobs, 'at width 64')}; "
          "more where an optimum lies at the edge or is not the same at all widths")

def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.widths = common.whole_numbers(args.widths, "--widths")
    args.optimizers = common.words(args.optimizers, OPTIMIZERS, "--optimizers")
    args.parametrizations = common.words(args.parametrizations, SCALINGS, "--parametrizations")
    args.multipliers = common.exponents(args.multipliers)
    common.check_counts(args)
    if args.mup_flags and ("mup" not in args.parametrizations or len(args.widths) == 1):
        raise ValueError(f"--mup-flags {args.mup_flags}: has no effect without muP and a second width")
    args.script = args.script if args.script.is_file() else ROOT / args.script
    args.out = args.out or common.default_out("lr_transfer")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_gpt.py")
    add = parser.add_argument
    add("--widths", default="64,128,256", metavar="N,..",
        help="the smallest is the base; one alone is tuned (default: 64,128,256)")
    add("--optimizers", default="muon,adamw", metavar="NAME,..",
        help="of the hidden matrices (default: muon,adamw)")
    add("--parametrizations", default="mup,standard", metavar="NAME,..",
        help="scalings of the larger widths (default: mup,standard)")
    add("--multipliers", default="1/8,1/4,1/2,1,2,4,8", metavar="X,..",
        help="of all peak learning rates, powers of two (default: 1/8,1/4,1/2,1,2,4,8)")
    add("--mup-flags", default="", metavar="FLAGS",
        help='flags of the muP runs alone, such as --mup-flags="--mup-embedding sqrt"')
    add("--script", type=Path, default=ROOT / "train_gpt.py", metavar="FILE",
        help="train_gpt.py or train_moe.py (default: train_gpt.py)")
    common.add_sweep_options(parser, "lr_transfer")
    return parser.parse_args(argv)

def transfer(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code. Raises RuntimeError if muP fails."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    if args.list:
        show_plan(sweep, common.read_runs(file, Job), args.jobs)
        return 0
    common.share_cores(args.jobs)
    run_jobs = partial(common.run_all, workers=args.jobs, command=command, path=file, execute=execute, outcome=outcome)
    common.finish(lambda: common.run_rounds(sweep, Job, file, run_jobs), lambda: write_report(sweep, args.out))
    results = summarize(sweep, sweep.collect(common.read_runs(file, Job)))
    if len(sweep.widths) > 1 and (missed := shortcomings(results)):
        raise RuntimeError(f"muP fails: {'; '.join(missed)}")
    return 0

main = partial(common.command_line, "lr_transfer", parse_args, transfer)

if __name__ == "__main__":
    common.start(main)
