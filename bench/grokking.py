"""When does a network grok? A phase diagram over weight decay, optimizer and seeds, and curves of several runs.

    python bench/grokking.py sweep --list                             # the plan; runs nothing
    python bench/grokking.py sweep --jobs 2                           # the preset quick: 30 runs of about a minute
    python bench/grokking.py sweep --decays 0.1,1 --rates 1/2,1,2 --out records/power -- --preset power
    python bench/grokking.py plot logs/adamw logs/muon --out images/grokking.png

Flags after ` -- ` go to train_grokking.py. A sweep writes --out: runs.jsonl (a line for each finished run, at once),
phase.csv (one row a run) and phase.png. The same command goes on where an earlier one ended: only what is missing or
failed is run. The decay and the rate that vary are those of the hidden matrices: with AdamW of all parameters.

Phases as in Liu et al. 2022 (arXiv 2205.10343), who counted from 90 % accuracy, here from 99 %: confusion, the training
equations are not learned; memorization, only they are; grokking, the others more than DELAY steps later;
comprehension, the others at most DELAY steps later.
"""
import argparse
import csv
import hashlib
import io
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
from datetime import date
from fractions import Fraction
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.ablate import command_line, exit_code, missing, read_runs, run_all  # noqa: E402
from bench.moe import markdown  # noqa: E402

TRAINER = ROOT / "train_grokking.py"
NAMES = {"adamw": "AdamW", "muon": "Muon + AdamW"}
FLAGS = {"adamw": ("lr", "weight_decay"), "muon": ("muon_lr", "muon_weight_decay")}  # of the hidden matrices
MILESTONES = ("train_99", "val_50", "val_95", "val_99", "gap")
DELAY = 1000  # steps from training to validation accuracy that make the difference between two phases
SECONDS = 60  # a run, until one is measured


# ----------------------------------------------------------------------------------------------------------------------
# Plan


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
        return [sys.executable, str(TRAINER), *self.flags, "--optimizer", self.optimizer, f"--{rate}", str(self.rate),
                f"--{decay}", str(self.decay), "--seed", str(self.seed)]


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """All runs, seed by seed, so that an interrupted sweep has complete seeds. Raises ValueError for flags that
    train_grokking.py refuses."""
    import train_grokking as trainer  # not above: --help needs no torch

    key = hashlib.sha256(json.dumps(args.flags).encode()).hexdigest()[:12]
    settings = [trainer.parse_settings([*args.flags, "--optimizer", name])[0] for name in args.optimizers]
    return [Job(key, s.optimizer, float(f"{factor * getattr(s, FLAGS[s.optimizer][0]):.6g}"), decay, seed,
                tuple(args.flags))
            for seed in range(args.seeds) for s in settings for factor in args.rates for decay in args.decays]


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def execute(job: Job, children: set) -> dict:
    """The record of a job: its settings and milestones, or the problem that kept it from having any. A loss that is not
    finite is a result, too."""
    began, run = time.perf_counter(), job._asdict() | {"problem": "", "date": str(date.today())}
    run["trainer"] = hashlib.sha256(TRAINER.read_bytes()).hexdigest()[:12]
    try:
        with tempfile.TemporaryDirectory() as logs:
            child = subprocess.Popen([*job.command(), "--no-plot", "--log-dir", logs], stdout=subprocess.DEVNULL,
                                     stderr=subprocess.PIPE, text=True)
            children.add(child)
            printed = child.communicate()[1].strip()
            children.discard(child)
            found = [json.loads(path.read_text(encoding="utf-8")) for path in Path(logs).glob("*/*/metrics.json")]
        if child.returncode and not (found and found[0]["status"] == "nan"):
            sentence = re.split(r"^error: ", printed, flags=re.MULTILINE)[1:] or printed.splitlines()
            raise RuntimeError(" ".join(sentence[-1].split()) if sentence else f"ended with code {child.returncode}")
        result = found[0]
        run |= {**result["milestones"], **{name: result[name] for name in (
            "status", "total_steps", "best_val_acc", "step_ms", "train_time_s", "eval_time_s", "parameters",
            "config", "environment")}}
        run["phase"] = phase(run)
    except (RuntimeError, OSError, ValueError, KeyError, IndexError) as error:  # from the trainer, or what it wrote
        run["problem"] = str(error) or repr(error)
    return run | {"wall_s": round(time.perf_counter() - began, 2)}


def phase(run: dict) -> str:
    """One of the four phases, see above."""
    if run["train_99"] is None:
        return "confusion"
    if run["val_99"] is None:
        return "memorization"
    return "grokking" if run["val_99"] - run["train_99"] > DELAY else "comprehension"


def outcome(run: dict) -> str:
    """A line about a finished run."""
    what = f"{NAMES[run['optimizer']]}, rate {run['rate']:g}, decay {run['decay']:g}, seed {run['seed']}"
    if run["problem"]:
        return f"{what}: FAILED: {run['problem']}"
    return (f"{what}: {run['phase']}, training 99 % {at(run['train_99'])}, validation 99 % {at(run['val_99'])}, "
            f"{run['wall_s']:.0f} s")


def at(step: int | None) -> str:
    return "not reached" if step is None else f"at step {step:,}"


# ----------------------------------------------------------------------------------------------------------------------
# Phase diagram


COLUMNS = ("optimizer", "rate", "decay", "seed", "phase", *MILESTONES, "total_steps", "best_val_acc", "status",
           "parameters", "step_ms", "train_time_s", "eval_time_s", "wall_s", "date", "trainer")


def write_csv(runs: list[dict], path: Path) -> None:
    """One row a run; empty where a milestone was not reached. The file is replaced as a whole."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text.getvalue(), encoding="utf-8")
    os.replace(temporary, path)


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


PHASES = ("comprehension", "grokking", "memorization", "confusion")


def cell(runs: list[dict]) -> Cell:
    counts = Counter(run["phase"] for run in runs)
    steps = median(math.inf if run["val_99"] is None else run["val_99"] for run in runs)
    return Cell(max(reversed(PHASES), key=lambda name: (counts[name], -PHASES.index(name))),
                steps if math.isfinite(steps) else None, sum(run["val_99"] is not None for run in runs), len(runs))


def cells(runs: list[dict]) -> dict[tuple[str, float], dict[float, Cell]]:
    """(optimizer, rate) -> decay -> cell, in the order of the diagram."""
    places = sorted({(run["optimizer"], run["rate"], run["decay"]) for run in runs})
    found: dict = {}
    for place in places:
        mine = [run for run in runs if (run["optimizer"], run["rate"], run["decay"]) == place]
        found.setdefault(place[:2], {})[place[2]] = cell(mine)
    return found


EDGES = {"comprehension": "tab:blue", "grokking": "black", "memorization": "tab:orange", "confusion": "tab:red"}


def plot_phases(runs: list[dict], path: Path) -> None:
    """Decay to the right, optimizer and rate downwards, colour: steps to 99 % validation accuracy."""
    from matplotlib import colormaps, colors
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    found = cells(runs)
    decays = sorted({decay for row in found.values() for decay in row})
    steps = [c.steps for row in found.values() for c in row.values() if c.steps is not None] or [1, 10000]
    scale = ScalarMappable(colors.LogNorm(min(steps), max(max(steps), 1.01 * min(steps))), colormaps["viridis_r"])
    figure = Figure(figsize=(3.4 + 1.45 * len(decays), 2.2 + 0.95 * len(found)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(found.values()):
        for decay, c in row.items():
            x, color = decays.index(decay), "0.93" if c.steps is None else scale.to_rgba(c.steps)
            axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=color, edgecolor=EDGES[c.phase],
                                     linewidth=3))
            dark = c.steps is not None and sum(color[:3]) < 1.5
            axes.text(x, y, c.text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.set_xticks(range(len(decays)), [f"{decay:g}" for decay in decays])
    axes.set_yticks(range(len(found)), [f"{NAMES[optimizer]}\nrate {rate:g}" for optimizer, rate in found])
    axes.set_xlim(-0.6, len(decays) - 0.4)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.set_xlabel("weight decay of the hidden matrices, as a factor on their learning rate")
    low, high = scale.get_clim()
    bar = figure.colorbar(scale, ax=axes, ticks=[low * (high / low) ** (i / 4) for i in range(5)],
                          format=lambda step, _: f"{step:,.0f}", label="steps to 99 % validation,\nmedian of seeds")
    bar.minorticks_off()
    figure.legend(handles=[Patch(facecolor="white", edgecolor=EDGES[name], linewidth=3, label=name)
                           for name in PHASES], loc="outside upper center", ncols=4)
    c, parameters = runs[0]["config"], runs[0]["parameters"]
    formula = f"a{c['operation']}b" if c["operation"] in "+-*/" else c["operation"]
    axes.set_title(f"{formula} mod {c['prime']}, {parameters:,} parameters, at most {c['iterations']:,} steps")
    figure.savefig(path, dpi=130)


def write_report(jobs: list[Job], out: Path) -> None:
    """phase.csv and phase.png from the finished runs of these jobs; there may be others in runs.jsonl."""
    runs = read_runs(out / "runs.jsonl", Job._fields[:5])
    done = [runs[job[:5]] for job in jobs if job[:5] in runs and not runs[job[:5]]["problem"]]
    if not done:
        return
    write_csv(done, out / "phase.csv")
    plot_phases(done, out / "phase.png")
    if len({run["trainer"] for run in done}) > 1:
        print("warning: train_grokking.py has changed between these runs; use another --out for the new one")
    head = ["optimizer", "rate", "decay", "steps to 99 % validation accuracy", "phase", "seeds that reached it"]
    rows = [[NAMES[optimizer], f"{rate:g}", f"{decay:g}", *c.text.split("\n")]
            for (optimizer, rate), row in cells(done).items() for decay, c in row.items()]
    print(f"{markdown(head, rows)}\nwritten to {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Curves of several runs


def read_results(places: list[Path]) -> list[dict]:
    """metrics.json of runs, each given as that file, its folder, or the folder of an experiment. Raises
    FileNotFoundError where there is none, ValueError where one cannot be read."""
    results = []
    for place in places:
        files = [place] if place.is_file() else sorted([*place.glob("metrics.json"), *place.glob("*/metrics.json")])
        if not files:
            raise FileNotFoundError(f"no metrics.json in {place}: name runs of train_grokking.py, or an experiment")
        for file in files:
            try:
                result = json.loads(file.read_text(encoding="utf-8"))
                results.append({name: result[name] for name in ("config", "metrics", "milestones", "parameters",
                                                                "step_ms", "status")})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}: is no metrics.json of train_grokking.py ({error!r})") from error
    return [result for result in results if result["metrics"]]


IGNORED = {"seed", "resume", "log_dir", "experiment_name", "preset", "device", "threads", "compile", "save_every",
           "plot", "full", "iterations", "stop_accuracy", "eval_every", "sweep"}  # what does not change the curve


def group(results: list[dict]) -> dict[str, list[dict]]:
    """Label -> runs that differ in nothing but the seed. The label names what differs between groups."""
    def read(c: dict) -> dict:
        unread = [name for name in c if name.startswith("muon_") or name == "orthogonalizer"]
        return {name: value for name, value in c.items()
                if name not in IGNORED and not (c["optimizer"] == "adamw" and name in unread)}

    configs = [read(result["config"]) for result in results]
    names = dict.fromkeys(name for c in configs for name in c)
    vary = [name for name in names if name != "optimizer" and len({c[name] for c in configs if name in c}) > 1]
    found: dict[str, list[dict]] = {}
    for c, result in zip(configs, results, strict=True):
        label = ", ".join([NAMES[c["optimizer"]], *(f"{name} {c[name]}" for name in vary if name in c)])
        found.setdefault(label, []).append(result)
    return found


def mean_curve(runs: list[dict], name: str) -> tuple[list[int], list[float]]:
    """Mean over runs at all steps at which any was evaluated; between its evaluations and past its end a run counts
    with its last value."""
    steps = sorted({m["step"] for run in runs for m in run["metrics"]})
    steps = [step for step in steps if all(run["metrics"][0]["step"] <= step for run in runs)]
    return steps, [mean([m[name] for m in run["metrics"] if m["step"] <= step][-1] for run in runs) for step in steps]


def milestone_table(groups: dict[str, list[dict]]) -> str:
    """Markdown: mean and standard deviation over the runs that reached a milestone, and how many did."""
    def shown(values: list, n: int) -> str:
        values = [value for value in values if value is not None]
        if not values:
            return "not reached"
        spread = f" ± {stdev(values):,.0f}" if len(values) > 1 else ""
        return f"{mean(values):,.0f}{spread}" + (f" ({len(values)} of {n})" if len(values) < n else "")

    head = ["runs", "n", "training 99 %", "validation 50 %", "validation 95 %", "validation 99 %", "gap", "ms/step"]
    rows = [[label, len(runs), *(shown([run["milestones"][name] for run in runs], len(runs)) for name in MILESTONES),
             f"{mean(run['step_ms'] for run in runs):.1f}"] for label, runs in groups.items()]
    return markdown(head, rows)


def plot_curves(groups: dict[str, list[dict]], path: Path) -> None:
    """Accuracies over the logarithm of the step: a thin line a run, a thick one the mean of a group's; dashed:
    training. Dotted: the mean of the seeds' steps to 99 % validation accuracy."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.6 + 0.4 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for i, (label, runs) in enumerate(groups.items()):
        color = colormaps["tab10"](i % 10)
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
    axes.set_xscale("log")
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("accuracy")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside upper left", fontsize=9)
    figure.savefig(path, dpi=130)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def numbers(text: str, flag: str) -> list[float]:
    """1/2,1,2 -> sorted values. Raises ValueError for what is no positive number."""
    found = set()
    for word in text.split(","):
        try:
            value = float(Fraction(word))
        except (ValueError, ZeroDivisionError):
            value = math.nan
        if not 0 <= value < math.inf or (flag == "--rates" and not value):
            raise ValueError(f"{flag} {word}: must be numbers {'above 0' if flag == '--rates' else 'of 0 or more'}, "
                             "such as 1/4,1,4")
        found.add(value)
    return sorted(found)


OWN = {"seed": "--seeds", "optimizer": "--optimizers", "weight_decay": "--decays", "muon_weight_decay": "--decays",
       "log_dir": "--out", "resume": "the same command again"}


def check(args: argparse.Namespace) -> None:
    """Turns the options' words into values. Raises ValueError for those that cannot give a result."""
    args.decays, args.rates = numbers(args.decays, "--decays"), numbers(args.rates, "--rates")
    args.optimizers = args.optimizers.split(",")
    if wrong := [name for name in args.optimizers if name not in NAMES]:
        raise ValueError(f"--optimizers {wrong[0]}: must be one or more of {', '.join(NAMES)}")
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in args.flags if flag.startswith("--")}
    for name in sorted(given & OWN.keys()):
        raise ValueError(f"--{name} after --: the sweep sets it, use {OWN[name]} instead")
    if "preset" not in given:
        args.flags = ["--preset", "quick", *args.flags]
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(args, name)}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tools = parser.add_subparsers(dest="tool", required=True)
    tool = tools.add_parser("sweep", help="phase diagram", usage="%(prog)s [options] [-- flags of train_grokking.py]")
    tool.add_argument("--decays", default="0.01,0.03,0.1,0.3,1", metavar="X,..", help="default: 0.01,0.03,0.1,0.3,1")
    tool.add_argument("--optimizers", default="adamw,muon", metavar="NAME,..", help="default: adamw,muon")
    tool.add_argument("--rates", default="1", metavar="X,..", help="factors on the hidden matrices' rate (default: 1)")
    tool.add_argument("--seeds", type=int, default=3, help="runs of each cell (default: 3)")
    tool.add_argument("--jobs", type=int, default=1, help="runs at the same time, each on its share of the cores")
    tool.add_argument("--list", action="store_true", help="print the plan and its time, and run nothing")
    tool.add_argument("--out", type=Path, default=ROOT / "records" / f"{date.today()}_grokking", metavar="DIR",
                      help="folder of the results; name it to go on another day (default: records/DATE_grokking)")
    tool.add_argument("flags", nargs="*", help="after --: flags of train_grokking.py (default: --preset quick)")
    tool = tools.add_parser("plot", help="curves of several runs over each other, and their milestones as a table")
    tool.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of an experiment")
    tool.add_argument("--out", type=Path, default=Path("grokking.png"), metavar="FILE", help="default: grokking.png")
    return parser.parse_args(argv)


def sweep(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    jobs, file = make_jobs(args), args.out / "runs.jsonl"
    runs = read_runs(file, Job._fields[:5])
    todo = missing(jobs, runs)
    seconds = [run["wall_s"] for run in runs.values() if not run["problem"]]
    each = median(seconds) if seconds else SECONDS
    print(f"{len(todo)} of {len(jobs)} to run, about {len(todo) * each / args.jobs / 60:.0f} min: {each:.0f} s each "
          f"({'measured' if seconds else 'a guess'}), {args.jobs} at a time", flush=True)
    if args.list:
        print("\n".join(shlex.join(job.command()[1:]) for job in todo))
        return 0
    if args.jobs > 1:  # each with its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    try:
        failed = run_all(todo, args.jobs, command, file, execute, outcome)
    finally:
        write_report(jobs, args.out)
    return exit_code(failed)


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


def main(argv: list[str] | None = None) -> int:
    return command_line("bench/grokking.py", parse_args, work, argv)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the runs under way too
    sys.exit(main())
