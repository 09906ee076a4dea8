"""When does a network grok? A phase diagram over weight decay, optimizer and seeds, and curves of several runs.

    python bench/grokking.py sweep --list                             # the plan; runs nothing
    python bench/grokking.py sweep --jobs 2                           # the preset quick: 30 runs of about a minute
    python bench/grokking.py sweep --decays 0.1,1 --rates 1/2,1,2 --out records/power -- --preset power
    python bench/grokking.py plot logs/adamw logs/muon --out images/grokking.png

Flags after ` -- ` go to train_grokking.py. A sweep writes --out: runs.jsonl and phase.png; the same command goes on
where an earlier one ended. The decay and the rate that vary are those of the hidden matrices: with AdamW of all.

Phases as in Liu et al. 2022 (arXiv 2205.10343), who counted from 90 % accuracy, here from 99 %: confusion, the training
equations are not learned; memorization, only they are; grokking, the others more than DELAY steps later;
comprehension, the others at most DELAY steps later.
"""
import argparse
import json
import math
import shlex
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path

TRAINER = ROOT / "train_grokking.py"
NAMES = {"adamw": "AdamW", "muon": "Muon + AdamW"}
FLAGS = {"adamw": ("lr", "weight_decay"), "muon": ("muon_lr", "muon_weight_decay")}  # of the hidden matrices
MILESTONES = ("train_99", "val_50", "val_95", "val_99", "gap")
KEPT = ("status", "total_steps", "best_val_acc", "step_ms", "train_time_s", "eval_time_s", "parameters", "config",
        "environment")  # of a run's metrics.json
DELAY = 1000  # steps from training to validation accuracy that make the difference between two phases
SECONDS = 60  # a run, until one is measured
OWN = {"seed": "--seeds", "optimizer": "--optimizers", "weight_decay": "--decays", "muon_weight_decay": "--decays",
       "log_dir": "--out", "resume": "the same command again"}

# --- Sweep

class Job(NamedTuple):
    """One run. `rate` and `decay` are those of the hidden matrices."""
    key: str  # of the flags of all runs
    optimizer: str
    rate: float
    decay: float
    seed: int
    flags: tuple[str, ...]

    def command(self) -> list[str]:
        rate, decay = FLAGS[self.optimizer]
        own = {"optimizer": self.optimizer, rate: self.rate, decay: self.decay, "seed": self.seed}
        words = [word for name, value in own.items() for word in (f"--{name}", str(value))]
        return [sys.executable, str(TRAINER), *self.flags, *words]

def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed. Raises ValueError for flags that train_grokking.py refuses."""
    import train_grokking as trainer  # not above: --help needs no torch

    key, flags, rates = common.key_of(*args.flags), tuple(args.flags), {}
    for name in args.optimizers:
        s = trainer.parse_settings([*flags, "--optimizer", name])[0]
        rates[name] = [float(f"{factor * getattr(s, FLAGS[name][0]):.6g}") for factor in args.rates]
    return [Job(key, name, rate, decay, seed, flags) for seed in range(args.seeds)
            for name in args.optimizers for rate in rates[name] for decay in args.decays]

def measure(job: Job, children: set) -> dict:
    """Settings, milestones and phase of a run. A loss that is not finite is a result, too."""
    with tempfile.TemporaryDirectory() as logs:
        problem, _ = common.run_command([*job.command(), "--no-plot", "--log-dir", logs], children)
        found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(logs).glob("*/*/metrics.json")]
    if problem and not (found and found[0]["status"] == "nan"):
        raise RuntimeError(problem)
    run = found[0]["milestones"] | {name: found[0][name] for name in KEPT}
    return run | {"phase": phase(run)}

def phase(run: dict) -> str:
    """One of the four phases, see above."""
    if run["train_99"] is None:
        return "confusion"
    if run["val_99"] is None:
        return "memorization"
    return "grokking" if run["val_99"] - run["train_99"] > DELAY else "comprehension"

def outcome(run: dict) -> str:
    """A line about a finished run."""
    def at(step: int | None) -> str:
        return "not reached" if step is None else f"at step {step:,}"
    who = f"{NAMES[run['optimizer']]}, rate {run['rate']:g}, decay {run['decay']:g}, seed {run['seed']}"
    if run["problem"]:
        return f"{who}: FAILED: {run['problem']}"
    return (f"{who}: {run['phase']}, training 99 % {at(run['train_99'])}, validation 99 % {at(run['val_99'])}, "
            f"{run['wall_s']:.0f} s")

# --- Phase diagram

EDGES = {"comprehension": "tab:blue", "grokking": "black", "memorization": "tab:orange", "confusion": "tab:red"}
PHASES = tuple(EDGES)  # the better first

class Cell(NamedTuple):
    """The runs of one optimizer, rate and decay."""
    phase: str  # of most seeds; of as many, the better
    steps: float | None  # median steps to 99 % validation accuracy; None: not reached by half of them
    reached: int  # seeds that did
    n: int

    @property
    def text(self) -> str:
        steps = "not reached" if self.steps is None else f"{self.steps:,.0f}"
        return f"{steps}\n{self.phase}\n{self.reached} of {self.n}"

def make_cell(runs: list[dict]) -> Cell:
    counts = Counter(run["phase"] for run in runs)
    steps = [math.inf if run["val_99"] is None else run["val_99"] for run in runs]
    middle = median(steps)
    return Cell(max(PHASES, key=lambda name: counts[name]), middle if math.isfinite(middle) else None,
                sum(map(math.isfinite, steps)), len(runs))

def make_cells(runs: list[dict]) -> dict[tuple[str, float], dict[float, Cell]]:
    """(optimizer, rate) -> decay -> cell, in the order of the diagram."""
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        groups.setdefault((run["optimizer"], run["rate"], run["decay"]), []).append(run)
    found: dict[tuple[str, float], dict[float, Cell]] = {}
    for optimizer, rate, decay in sorted(groups):
        found.setdefault((optimizer, rate), {})[decay] = make_cell(groups[optimizer, rate, decay])
    return found

def color_scale(cells: list[Cell]):
    """Colours of steps, on a logarithmic scale."""
    from matplotlib import colormaps, colors
    from matplotlib.cm import ScalarMappable

    steps = [c.steps for c in cells if c.steps is not None] or [1, 10000]
    norm = colors.LogNorm(min(steps), max(max(steps), 1.01 * min(steps)))
    return ScalarMappable(norm, colormaps["viridis_r"])

def draw_cell(axes, x: int, y: int, c: Cell, scale) -> None:
    """A rectangle: colour by steps, its edge by the phase."""
    from matplotlib.patches import Rectangle

    color = "0.93" if c.steps is None else scale.to_rgba(c.steps)
    dark = c.steps is not None and sum(color[:3]) < 1.5
    axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=color, edgecolor=EDGES[c.phase], linewidth=3))
    axes.text(x, y, c.text, ha="center", va="center", fontsize=9, color="white" if dark else "black")

def plot_phases(runs: list[dict], path: Path) -> None:
    """Decay to the right, optimizer and rate downwards, colour: steps to 99 % validation accuracy."""
    found = make_cells(runs)
    decays = sorted({decay for row in found.values() for decay in row})
    scale = color_scale([c for row in found.values() for c in row.values()])
    figure, axes = common.panels(3.4 + 1.45 * len(decays), 2.2 + 0.95 * len(found))
    for y, row in enumerate(found.values()):
        for decay, c in row.items():
            draw_cell(axes, decays.index(decay), y, c, scale)
    axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    axes.set_yticks(range(len(found)), [f"{NAMES[optimizer]}\nrate {rate:g}" for optimizer, rate in found])
    axes.set_xlim(-0.6, len(decays) - 0.4)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("weight decay of the hidden matrices, as a factor on their learning rate")
    figure.colorbar(scale, ax=axes, format="{x:,.0f}", label="steps to 99 % validation, median of seeds")
    c = runs[0]["config"]
    axes.set_title(f"{c['operation']} mod {c['prime']}, at most {c['iterations']:,} steps")
    figure.savefig(path, dpi=130)

def write_report(jobs: list[Job], out: Path) -> None:
    """phase.png and a printed table from the finished runs of these jobs; there may be others in runs.jsonl."""
    runs = common.read_runs(out / "runs.jsonl", Job)
    done = [runs[job[:5]] for job in jobs if job[:5] in runs and not runs[job[:5]]["problem"]]
    if not done:
        return
    plot_phases(done, out / "phase.png")
    head = ["optimizer", "rate", "decay", "steps to 99 % validation accuracy", "phase", "seeds that reached it"]
    rows = [[NAMES[optimizer], f"{rate:g}", f"{decay:g}", *c.text.split("\n")]
            for (optimizer, rate), row in make_cells(done).items() for decay, c in row.items()]
    print(f"{common.markdown(head, rows)}\n{common.problem_lines([], done, TRAINER.name)}written to {out}")

# --- Curves of several runs

def is_result(result: dict) -> bool:
    """Whether a run's numbers are in range, and nothing in its settings drives a terminal."""
    steps = [m["step"] for m in result["metrics"]]
    shares = [m[name] for m in result["metrics"] for name in ("train_acc", "val_acc")]
    others = [result["step_ms"], *(result["milestones"][name] or 0 for name in MILESTONES)]
    words = [str(x) for pair in result["config"].items() if pair[0] not in IGNORED for x in pair]
    return (steps == sorted({*steps}) and all(0 < step < 1e12 for step in steps)
            and all(0 <= x <= 1 for x in shares) and all(abs(x) < 1e12 for x in others)
            and result["config"]["optimizer"] in NAMES and all(map(str.isprintable, words)))

def read_result(file: Path) -> dict:
    """metrics.json of a run. Raises ValueError where it is none."""
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
        if not is_result(result):
            raise ValueError("a value out of range")
        return result
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{str(file)!r}: is no metrics.json of train_grokking.py ({error!r})") from error

def read_results(places: list[Path]) -> list[dict]:
    """Runs, each given as its metrics.json, its folder, or that of an experiment. Raises FileNotFoundError."""
    results = []
    for place in places:
        files = [place, *place.glob("metrics.json"), *place.glob("*/metrics.json")]
        if not any(map(Path.is_file, files)):
            raise FileNotFoundError(f"no metrics.json in {str(place)!r}: name runs of train_grokking.py")
        results += map(read_result, filter(Path.is_file, sorted(files)))
    return [result for result in results if result["metrics"]]

IGNORED = {"seed", "resume", "log_dir", "experiment_name", "preset", "device", "threads", "compile", "save_every",
           "plot", "full", "iterations", "stop_accuracy", "eval_every", "sweep", "allow_change"}  # not the curve's

def group(results: list[dict]) -> dict[str, list[dict]]:
    """Label -> runs that differ in nothing but the seed. The label names what differs between groups."""
    def matters(name: str, c: dict) -> bool:
        of_muon = name.startswith("muon_") or name == "orthogonalizer"
        return name not in IGNORED and not (of_muon and c["optimizer"] == "adamw")
    configs = [{name: value for name, value in result["config"].items() if matters(name, result["config"])}
               for result in results]
    names = dict.fromkeys(name for c in configs for name in c)
    vary = [name for name in names if name != "optimizer" and len({c[name] for c in configs if name in c}) > 1]
    found: dict[str, list[dict]] = {}
    for c, result in zip(configs, results, strict=True):
        label = ", ".join([NAMES[c["optimizer"]], *(f"{name} {c[name]}" for name in vary if name in c)])
        found.setdefault(label, []).append(result)
    return found

def mean_curve(runs: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Mean over runs at all steps at which any was evaluated, each with its last value until then."""
    steps = sorted({m["step"] for run in runs for m in run["metrics"]})
    steps = [step for step in steps if all(run["metrics"][0]["step"] <= step for run in runs)]
    return steps, [mean([m[name] for m in run["metrics"] if m["step"] <= step][-1] for run in runs) for step in steps]

def milestone_table(groups: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over the runs that reached a milestone, and how many did."""
    def shown(runs: list[dict], name: str) -> str:
        values = [run["milestones"][name] for run in runs if run["milestones"][name] is not None]
        if not values:
            return "not reached"
        spread = f" ± {stdev(values):,.0f}" if len(values) > 1 else ""
        some = f" ({len(values)} of {len(runs)})" if len(values) < len(runs) else ""
        return f"{mean(values):,.0f}{spread}{some}"
    head = ["runs", "n", "training 99 %", "validation 50 %", "validation 95 %", "validation 99 %", "gap", "ms/step"]
    rows = [[label, len(runs), *(shown(runs, name) for name in MILESTONES),
             f"{mean(run['step_ms'] for run in runs):.1f}"] for label, runs in groups.items()]
    return common.markdown(head, rows)

def draw_group(axes, label: str, runs: list[dict], color) -> None:
    """A thin line a run, a thick one the mean; dashed: training. Dotted: the mean steps to 99 % validation."""
    for name, style in (("val_acc", "-"), ("train_acc", "--")):
        for run in runs if len(runs) > 1 else []:
            axes.plot([m["step"] for m in run["metrics"]], [m[name] for m in run["metrics"]], style, color=color,
                      linewidth=0.7, alpha=0.4)
        reached = [run["milestones"][f"{name[:-4]}_99"] for run in runs]
        when = f"{mean(reached):,.0f}" if None not in reached else "not reached by all"
        what = f"{label}, n = {len(runs)}: validation" if name == "val_acc" else "training"
        axes.plot(*mean_curve(runs, name), style, color=color, linewidth=2, label=f"{what} 99 %: {when}")
        if name == "val_acc" and None not in reached:
            axes.axvline(mean(reached), color=color, linewidth=1, linestyle=":")

def plot_curves(groups: dict[str, list[dict]], path: Path) -> None:
    """Accuracies over the logarithm of the step."""
    from matplotlib import colormaps

    figure, axes = common.panels(9, 4.6 + 0.4 * len(groups))
    for i, (label, runs) in enumerate(groups.items()):
        draw_group(axes, label, runs, colormaps["tab10"](i % 10))
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", fontsize=9)
    figure.savefig(path, dpi=130)

# --- Command line

def numbers(text: str, flag: str, least: str) -> list[float]:
    """1/2,1,2 -> sorted values. Raises ValueError for what is no finite number of 0 or more, or above 0."""
    found = {word: common.number(word) for word in text.split(",")}
    for word, value in found.items():
        if not 0 <= value < math.inf or (least == "above 0" and not value):
            raise ValueError(f"{flag} {word}: must be numbers {least}, such as 1/4,1,4")
    return sorted(set(found.values()))

def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.decays = numbers(args.decays, "--decays", "of 0 or more")
    args.rates = numbers(args.rates, "--rates", "above 0")
    args.optimizers = common.words(args.optimizers, NAMES, "--optimizers")
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in args.flags if flag.startswith("--")}
    common.refuse_own(given, OWN)
    if "preset" not in given:
        args.flags = ["--preset", "quick", *args.flags]
    common.check_counts(args, seeds=1)
    args.out = args.out or common.default_out("grokking")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    tools = parser.add_subparsers(dest="tool", required=True)
    tool = tools.add_parser("sweep", help="phase diagram", usage="%(prog)s [options] [-- flags of train_grokking.py]")
    add = tool.add_argument
    add("--decays", default="0.01,0.03,0.1,0.3,1", metavar="X,..", help="default: 0.01,0.03,0.1,0.3,1")
    add("--optimizers", default="adamw,muon", metavar="NAME,..", help="default: adamw,muon")
    add("--rates", default="1", metavar="X,..", help="factors on the hidden matrices' rate (default: 1)")
    common.add_sweep_options(tool, "grokking", quick=False)
    add("flags", nargs="*", help="after --: flags of train_grokking.py (default: --preset quick)")
    tool = tools.add_parser("plot", help="curves of several runs over each other, and their milestones as a table")
    tool.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of an experiment")
    tool.add_argument("--out", type=Path, default=Path("grokking.png"), metavar="FILE", help="default: grokking.png")
    return parser.parse_args(argv)

def sweep(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    jobs, file = make_jobs(args), args.out / "runs.jsonl"
    runs = common.read_runs(file, Job)
    todo = common.missing(jobs, runs)
    seconds = [run["wall_s"] for run in runs.values() if not run["problem"]]
    time = common.effort(len(todo), seconds, SECONDS, args.jobs)
    print(f"{len(todo)} of {len(jobs)} to run, {time}", flush=True)
    if args.list:
        print("\n".join(shlex.join(job.command()[1:]) for job in todo))
        return 0
    def execute(job: Job, children: set) -> dict:
        return common.record(job, TRAINER, lambda: measure(job, children))
    common.share_cores(args.jobs)
    return common.finish(lambda: common.run_all(todo, args.jobs, command, file, execute, outcome),
                         lambda: write_report(jobs, args.out))

def work(args: argparse.Namespace, command: str) -> int:
    if args.tool == "sweep":
        return sweep(args, command)
    groups = group(read_results(args.runs))
    if not groups:
        raise ValueError("none of these runs has been evaluated yet")
    print(milestone_table(groups))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    plot_curves(groups, args.out)
    print(f"written to {args.out}")
    return 0

main = partial(common.command_line, "grokking", parse_args, work)

if __name__ == "__main__":
    common.start(main)
