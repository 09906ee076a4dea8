"""What each technique is worth: a small proxy is trained on real text, with each technique switched off or on.

    python bench/ablate.py --list                                # the plan and its CPU time; runs nothing
    python bench/ablate.py --data books --jobs 2                 # every technique with 3 seeds
    python bench/ablate.py --proxy tokens --data pb --jobs 13 --seeds 5 --out records/tokens
    python bench/ablate.py --only mtp,xsa --seeds 8 --out records/more -- --iterations 600 --num-layers 6

Proxies: `bytes`, 1 M parameters in three stages, and `tokens`, 10 M parameters and GPT-2's tokens, where the head is
most of the cost. Flags after ` -- ` change them. Writes --out: runs.jsonl and README.md (tables). The same command
goes on where an earlier one ended: only what is missing or failed is run, each run with one thread.

The effect of a technique is loss(without it) - loss(with it), in nats per token and paired by seed: positive means it
helps. At equal seconds the proxy trains for the CPU seconds of the run it is compared with: its loss is read off runs
of several lengths, whose schedules fit them, on straight lines over the logarithm of the steps. CPU seconds of a step
are those of a whole run less those of a run of SHORT steps, so that start and evaluation cancel.
"""
import argparse
import dataclasses
import difflib
import math
import os
import shlex
import sys
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path

TRAINER = ROOT / "train_gpt.py"
BASE = "proxy"  # the name of the run with nothing changed
RECIPE = "recipe"  # of that with all that pays
SHORT = 10  # steps of the run whose CPU seconds are taken off
SHARED = """--preset cpu --device cpu --dtype bf16 --backend plain --no-compile --threads 1
--adam-weight-decay 0.005 --eval-every 0 --save-every 0 --no-save-last --no-key-offset"""
# glibc maps tensors above 32 MiB anew at each use, on a virtual machine most of the time
MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**33)}

class Proxy(NamedTuple):
    """A model and its data. Lengths are those of runs / its iterations."""
    flags: str
    lengths: tuple[float, ...]  # of its own runs
    recipe_lengths: tuple[float, ...]  # of the recipe's
    guess_s: float  # CPU seconds of a run, before any is measured
    recent: dict[str, str]  # technique of 2026 -> what adds it here

PROXIES = {
    # Three stages of equal length, so that the schedules of batch, length, window and multi-token
    # prediction have something to do; learning rates follow the square root of the batch.
    "bytes": Proxy("""
        --num-layers 4 --width 128 --head-dim 32 --value-embeds 2 --stage-ends 0.3333,0.6667,1
        --batch-tokens 1024,2048,3072 --stage-lr 0.71,1,1.22 --seq-len 256 --max-doc-len 128,256,256
        --window 64,96,128 --window-start 32 --window-step 32 --eval-seq-len 256 --mtp 2,1,0
        --softcap 23,5,7.5 --paired --key-offset --xsa --skip single --backout
        --muon-lr 0.06 --momentum-warmup 30 --momentum-cooldown 20 --iterations 200 --eval-tokens 65536""",
        (0.7, 1, 1.4), (0.6, 0.8, 1), 50,
        dict(
            floor="--lr-floor 0.3",
            tail="--lr-floor 0.3 --tail 0.6 --tail-steps {tail_steps}",
            ngrams="--ngram-rows 16384",
            pointer="--pointer 32",
            qk_dim="--qk-dim 16",
            split="--cooldown 0.8 --cooldown-others 0.4",
            extension="--extension 0.05",
            taper="--stage-ends 0.3333,0.6667,0.93,1 --batch-tokens 1024,2048,3072,2048 "
                  "--stage-lr 0.71,1,1.22,1 --max-doc-len 128,256,256,256 --window 64,96,128,128 "
                  "--mtp 2,1,0,0",
            recipe="--lr-floor 0.3 --tail 0.6 --tail-steps {tail_steps} "
                   "--ngram-rows 16384 --pointer 32",
        )),
    # The preset's model, narrower, for long documents; rates tuned. A higher floor wants lower ones.
    "tokens": Proxy("""
        --num-layers 4 --width 64 --head-dim 32 --value-embeds 1
        --batch-tokens 2048 --micro-tokens 1024 --seq-len 1024 --max-doc-len 1024
        --window 512 --window-start 128 --window-step 64
        --muon-lr 0.06 --adam-lr 0.024 --iterations 96 --eval-tokens 16384""",
        (0.45, 1, 1.3), (0.4, 0.6, 1), 90,
        dict(
            floor="--lr-floor 0.3 --muon-lr 0.03 --adam-lr 0.016",
            tail="--lr-floor 0.3 --muon-lr 0.03 --adam-lr 0.016 "
                 "--tail 0.6 --tail-steps {tail_steps}",
            candidates="--candidates 2048,0 --stage-ends 0.92,1",
            ngrams="--ngram-rows 65536",
            pointer="--pointer 32",
            qk_dim="--qk-dim 16",
            split="--cooldown 0.8 --cooldown-others 0.4",
            extension="--extension 0.05",
            taper="--stage-ends 0.93,1 --batch-tokens 2048,1024 --stage-lr 1,0.71",
            recipe="--lr-floor 0.3 --muon-lr 0.03 --adam-lr 0.016 "
                   "--tail 0.6 --tail-steps {tail_steps} --ngram-rows 65536 --pointer 32 "
                   "--candidates 2048,0 --stage-ends 0.92,1",
        )),
}

class Technique(NamedTuple):
    """One row. Braces in `flags` are filled from the proxy and its settings by `flag_values`."""
    name: str
    record: str  # public record number
    flags: str  # what removes it from the proxy; if `added`, what adds it
    published: str  # gain in optimizer steps and seconds of the 8xH100 track
    added: bool = False  # not part of the proxy

    @property
    def recent(self) -> bool:
        """Whether each proxy has flags of its own for it."""
        return self.flags == f"{{{self.name}}}"

# name | public record | flags that remove it (+: that add it) | published gain
TABLE = """
batch_schedule  | 46     | --batch-tokens {mean_batch} --stage-lr {mean_lr} | -65 steps, -1.8 s
length_schedule | 72     | --seq-len {seq_len} --max-doc-len {max_doc_len} | part of -1.2 s
window_schedule | 13, 31 | --window {window} --window-start 0 | -22 s; 2.717 to 2.656 min
eval_window     | 33, 35 | + --eval-window {wider} | -0.001 loss, about 10 steps, each
polar_express   | 38     | --orthogonalizer newton_schulz | -10 steps, about 1 s
normuon         | 41, 42 | --muon-beta2 0 | -0.8 s; -30 steps, -3.3 s with a rate fix
cautious        | 43, 50 | --no-cautious | -40 steps, -2.2 s (Muon); -20 steps, -1.1 s (Adam)
muon_decay      | 43     | --muon-weight-decay 0 | part of 43: -40 steps, -2.2 s
adam_decay      | 50     | --adam-weight-decay 0 | part of 50: -20 steps, -1.1 s
softcap         | 9, 18  | --softcap 0,0,1 | bound 15 instead of 30: -100 steps
asymmetric_cap  | 54     | --softcap 30,0,7.5 | -40 steps, -2.9 s
mtp             | 53     | --mtp 0 | -80 steps, -3.1 s with the untied head
key_offset      | 49     | --no-key-offset | -50 steps, -2.4 s
paired          | 58     | --no-paired | -65 steps, -3.5 s
skip            | 11, 45 | --skip none | not given alone
skip_form       | 45     | --skip {other_skip} | single instead of U-net: part of -2 s
backout         | 40     | --no-backout | part of -6.2 s
value_embeds    | 14     | --value-embeds 0 | 1750 to 1530 steps
value_gate      | 55     | --no-value-gate | -35 steps, -1.3 s with the skip gate
xsa             | 82, 86 | --no-xsa | -30 steps, -0.7 s; -0.3 s
smear           | 34     | --no-smear | -15 steps, about 5 at equal loss
attn_gate       | 28     | --no-attn-gate | -55 steps
attn_scale      | 20     | --attn-scale {plain_scale} | -20 steps, about 3 s
momentum        | -      | --momentum-warmup 0 --momentum-cooldown 0 | not given
clip_docs       | 29     | + --long-docs clip | about -25 steps
tail            | 92     | + {tail} | 20 mn, -3.8 s with more; -30 steps (track 3)
floor           | 92     | + {floor} | part of the tail average
candidates      | 92     | + {candidates} | -8.4 s with its kernels; costs 2.4 mn
ngrams          | 62, 92 | + {ngrams} | -165 steps, -5.6 s; 84.6 M rows: -7.1 s
pointer         | 379    | + {pointer} | -144 of 1,194 steps, -4.6 s
qk_dim          | 90, 92 | + {qk_dim} | -4.95 s with more; costs 6.9 mn
split           | 24     | + {split} | -50 steps (track 3)
extension       | 90     | + {extension} | about -2 mn for 45 to 65 steps
taper           | 92     | + {taper} | not given
recipe          | -      | + {recipe} | 73.9 to 39.9 s with more; 36.0 s with the pointer
"""

def read_technique(line: str) -> Technique:
    name, record, flags, published = (cell.strip() for cell in line.split("|"))
    return Technique(name, record, flags.removeprefix("+ "), published, flags.startswith("+"))

TECHNIQUES = tuple(map(read_technique, TABLE.strip().splitlines()))

def named(proxy: str) -> list[str]:
    """The techniques that are tried on this proxy unless others are asked for."""
    return [row.name for row in TECHNIQUES
            if (row.name in PROXIES[proxy].recent if row.recent else proxy == "bytes")]

# --- Plan

class Sweep(NamedTuple):
    """What all runs of a call have in common."""
    proxy: tuple[str, ...]  # flags of train_gpt.py
    changes: dict[tuple[str, float], str]  # name and length -> the flags added to the proxy's
    key: str  # of the proxy and the data

class Job(NamedTuple):
    """One run to its end."""
    technique: str
    length: float  # its steps / the proxy's
    seed: int
    key: str
    change: str
    proxy: tuple[str, ...]

def flag_values(trainer, s) -> dict[str, object]:
    """What the braces stand for: one value in place of the stages', and values of the model's.
    The batch is the stages' mean, so that the token total stays; the rate is interpolated at that
    batch; all others are the last stage's."""
    stages = trainer.stage_table(s)
    batch = sum((t.end - t.start) * t.batch_tokens for t in stages) / s.iterations
    rates = sorted((t.batch_tokens, t.lr) for t in stages)
    last = stages[-1]
    return {
        "seq_len": last.seq_len,
        "max_doc_len": last.max_doc_len,
        "window": last.window,
        "wider": last.window * 3 // 2,
        "mean_batch": round(batch),
        "mean_lr": f"{np.interp(batch, *zip(*rates, strict=True)):.4g}",
        "plain_scale": f"{s.head_dim**-0.5:.6g}",
        "other_skip": "single" if s.skip == "unet" else "unet",
        "tail_steps": max(1, s.iterations // 8),
    }

def change_flags(trainer, base, recent: dict[str, str], name: str, length: float) -> str:
    """The flags that make a technique's run, of `length` times the proxy's iterations, of the proxy's."""
    steps = round(length * base.iterations)
    values = flag_values(trainer, dataclasses.replace(base, iterations=steps))
    values |= {key: flags.format(**values) for key, flags in recent.items()}
    flags = {row.name: row.flags for row in TECHNIQUES}.get(name, "").format(**values)
    return " ".join([*flags.split(), *([] if length == 1 else ["--iterations", str(steps)])])

def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs that are asked for.
    Raises ValueError for flags that train_gpt.py refuses or that change nothing, FileNotFoundError
    where the data set is missing."""
    import train_gpt as trainer  # not above: --help needs no torch

    kind = PROXIES[args.proxy]
    proxy = [*SHARED.split(), *kind.flags.split(), "--data", args.data, *args.flags]
    base = common.parsed(trainer, proxy)
    lengths = {BASE: kind.lengths, RECIPE: kind.recipe_lengths}
    changes = {(name, length): change_flags(trainer, base, kind.recent, name, length)
               for name in [BASE, *args.only] for length in lengths.get(name, (1,))}
    for (name, length), change in changes.items():
        if common.parsed(trainer, [*proxy, *change.split()]) == base and (name, length) != (BASE, 1):
            raise ValueError(
                f"{name}: {change} changes nothing in this proxy; name the other techniques "
                "with --only, or give the proxy something to switch off, in flags after --")
    key = common.key_of(proxy, trainer.open_corpus(base.data).fingerprint())
    return Sweep(tuple(proxy), changes, key)

def make_jobs(sweep: Sweep, args: argparse.Namespace) -> list[Job]:
    """All jobs, seed by seed, so that an interrupted sweep has complete seeds."""
    return [Job(name, length, seed, sweep.key, change, sweep.proxy)
            for seed in range(args.seeds) for (name, length), change in sweep.changes.items()]

# --- Runs

def measure(job: Job, children: set) -> dict:
    """The loss of a run; and, for the proxy's length, the CPU seconds of a step."""
    def train(*more: str) -> tuple[list[dict], dict]:
        return common.train(TRAINER, [*job.proxy, *job.change.split(), *more], job.seed, children)

    events, config = train()
    names = ("val_loss", "val_bpb", "params_total", "train_time_ms")
    found = {name: events[-1][name] for name in names}
    steps, cpu_s = config["settings"]["iterations"], config["cpu_s"]
    if job.length == 1:
        short_s = train("--iterations", str(SHORT))[1]["cpu_s"]
        found["step_s"] = (cpu_s - short_s) / (steps - SHORT)
    found |= {"steps": steps, "cpu_s": cpu_s, "tokens": common.tokens_of(events)}
    return found | common.about(config)

def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    run = common.record(job, TRAINER, lambda: measure(job, children))
    return run | {"proxy": shlex.join(job.proxy)}

def outcome(run: dict) -> str:
    """A line about a finished run."""
    who = f"{run['technique']}, length {run['length']:g}, seed {run['seed']}"
    if run["problem"]:
        return f"{who}: FAILED: {run['problem']}"
    return f"{who}: val loss {run['val_loss']:.4f}, {run['cpu_s']:.0f} CPU s"

# --- Results

class Row(NamedTuple):
    """A technique's results; None where nothing is measured."""
    technique: Technique
    steps: common.Effect | None  # nats at equal steps
    seconds: common.Effect | None  # nats at equal CPU seconds
    time: float | None  # CPU seconds of a step with it / without it
    reach: tuple[common.Effect | None, ...]  # steps and seconds to the proxy's loss / the proxy's

def read_off(points: dict[float, float], x: float) -> float:
    """y at x on straight lines between the points; nan outside."""
    xs = sorted(points)
    inside = bool(xs) and xs[0] <= x <= xs[-1]
    return float(np.interp(x, xs, [points[x] for x in xs])) if inside else math.nan

def summarize(runs: list[dict]) -> list[Row]:
    """Results of all techniques that these finished runs tell about, the largest effect at equal steps first."""
    curves, costs = {}, {}  # name -> seed -> {log length: loss}; seconds of a step
    for run in runs:
        mine = curves.setdefault(run["technique"], {}).setdefault(run["seed"], {})
        mine[math.log(run["length"])] = run["val_loss"]
        if "step_s" in run:
            costs.setdefault(run["technique"], {})[run["seed"]] = run["step_s"]
    base, rows = curves.pop(BASE, {}), []
    for technique in TECHNIQUES:
        curve, name = curves.get(technique.name, {}), technique.name
        factors = common.ratios(costs.get(name, {}), costs.get(BASE, {}))
        if curve:
            rows.append(compare(technique, curve, base, median(factors) if factors else math.nan))
    return sorted(rows, key=lambda row: row.steps.mean if row.steps else -np.inf, reverse=True)

def compare(technique: Technique, curve: dict, base: dict, factor: float) -> Row:
    """A technique's losses, seed -> {log length: loss}, beside the proxy's; factor: the ratio of CPU
    seconds of a step."""
    def effect(values: list[float]) -> common.Effect | None:
        return common.effect([value for value in values if math.isfinite(value)])

    sign, seeds, ended = -1 if technique.added else 1, sorted(curve.keys() & base.keys()), 0.0
    loss = [curve[seed].get(ended, math.nan) for seed in seeds]
    at = math.log(factor) if factor > 0 else math.nan  # noise may exceed a step of a tiny model
    same_seconds = [read_off(base[seed], at) for seed in seeds]
    goals = [base[seed].get(ended, math.nan) for seed in seeds]
    inverse = [{y: x for x, y in curve[seed].items()} for seed in seeds]
    reached = list(map(read_off, inverse, goals))
    return Row(
        technique,
        effect([sign * (a - b) for a, b in zip(loss, goals, strict=True)]),
        effect([sign * (a - b) for a, b in zip(loss, same_seconds, strict=True)]),
        factor**-sign if factor > 0 else None,
        tuple(effect([scale * math.exp(at) for at in reached]) for scale in (1, factor)))

HEAD = [
    "technique", "public record", "switched off by", "n",
    "Δ at equal steps", "95 % interval", "verdict", "CPU time of a step with / without",
    "Δ at equal seconds", "95 % interval", "verdict", "published gain"]

def cells(effect: common.Effect | None) -> list[str]:
    """An effect, its interval and its verdict."""
    if not effect:
        return ["not measured", "", ""]
    span = f"{effect.low:+.4f} to {effect.high:+.4f}"
    return [f"{effect.mean:+.4f} ± {effect.se:.4f}", span,
            effect.side("helps", "hurts", "not resolved")]

def table(rows: list[Row], changes: dict[tuple[str, float], str]) -> str:
    """The results as a Markdown table."""
    lines = []
    for technique, steps, seconds, time, _ in rows:
        change = f"`{changes[technique.name, 1]}`"
        lines.append([
            technique.name, technique.record,
            f"not in the proxy; on: {change}" if technique.added else change,
            steps.n if steps else "fewer than 2", *cells(steps),
            f"{time:.3f}" if time else "not measured", *cells(seconds), technique.published])
    return common.markdown(HEAD, lines)

def reach_lines(rows: list[Row]) -> str:
    """A sentence for each technique whose runs of several lengths enclose the proxy's loss."""
    def sentence(name: str, steps: common.Effect, seconds: common.Effect) -> str:
        return (f"To the loss at which the proxy ends, {name} needs {common.interval(steps, '.3f')} of its steps, "
                f"{common.interval(seconds, '.3f')} of its CPU seconds.\n\n")

    return "".join(sentence(row.technique.name, *row.reach) for row in rows if all(row.reach))

README = """# What each technique is worth on a small proxy ({name}), {date}

Δ is loss(without the technique) - loss(with it), nats per token, paired by seed: positive means it
helps. The verdict says whether the 95 % Student t interval excludes 0; of 20 techniques without any
effect, one is expected to get a verdict by chance, and all share the proxy's runs. At equal seconds
the proxy has the CPU seconds of the other run: its loss is read off runs of {lengths} times its steps,
with schedules that fit them.

{reach}{table}

- Commands: `{command}`
- Proxy: {size}; `{proxy}`
- Data: {data}
- Machine: {hardware}; torch {torch}; commit {commit}; train_gpt.py {trainer}; one thread a run; {malloc}
{problems}
A proxy of this size says little about 124 M parameters, longer windows and documents. It finds
large effects, and techniques that are broken.
"""

def proxy_size(runs: list[dict]) -> str:
    """Parameters, tokens, losses and CPU seconds of the proxy's own runs."""
    base = [run for run in runs if (run["technique"], run["length"]) == (BASE, 1)]
    if not base:
        return "not run yet"
    losses = [run["val_loss"] for run in base]
    spread = f", sd over seeds {stdev(losses):.4f}" if len(losses) > 1 else ""
    ms = 1000 * median(run["step_s"] for run in base)
    return (f"{base[0]['params_total']:,} parameters, {base[0]['tokens']:,} training tokens, "
            f"val loss {mean(losses):.4f}{spread}, {ms:.0f} CPU ms a step")

def readme(sweep: Sweep, rows: list[Row], runs: list[dict], problems: list[str], name: str) -> str:
    """README.md of the results: the tables, how they came about, and what they do not say."""
    lengths = sorted(length for technique, length in sweep.changes if technique == BASE)
    return README.format(
        name=name,
        lengths=", ".join(f"{length:g}" for length in lengths),
        reach=reach_lines(rows),
        table=table(rows, sweep.changes),
        size=proxy_size(runs),
        proxy=shlex.join(sweep.proxy),
        malloc=" ".join(f"{key}={os.environ.get(key, '')}" for key in MALLOC),
        problems=common.problem_lines(problems, runs, "train_gpt.py"),
        **common.facts(runs))

def write_report(sweep: Sweep, out: Path, name: str) -> None:
    """README.md from the records of this proxy and data."""
    runs = [run for run in common.read_runs(out / "runs.jsonl", Job).values()
            if run["key"] == sweep.key
            and run["change"] == sweep.changes.get((run["technique"], run["length"]))]
    done = [run for run in runs if not run["problem"]]
    if not done:
        return
    problems = [f"{run['technique']}, seed {run['seed']}: {run['problem']}"
                for run in runs if run["problem"]]
    common.write_readme(out, readme(sweep, summarize(done), done, problems, name))

# --- Command line

def show_plan(jobs: list[Job], runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long."""
    todo = common.missing(jobs, runs)
    common.show_plan(jobs, todo, lambda job: f"{job.technique:16} {job.length:4g}  {job.change}")
    known = {}  # technique -> CPU seconds of runs of the proxy's length
    for run in runs.values():
        if not run["problem"]:
            known.setdefault(run["technique"], []).append(run["cpu_s"] / run["length"])
    guess = median(known[BASE]) if BASE in known else PROXIES[args.proxy].guess_s
    seconds = sum(job.length * median(known.get(job.technique, [guess])) for job in todo)
    source = "measured" if known else "a guess"
    print(f"{len(todo)} of {len(jobs)} to run, about {seconds / 60:.0f} CPU min ({source}), "
          f"{seconds / args.jobs / 60:.0f} min with {args.jobs} at a time")

def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot give a result; --only becomes a list of names."""
    names = [row.name for row in TECHNIQUES]
    recent = PROXIES[args.proxy].recent
    wanted = args.only.split(",") if args.only else named(args.proxy)
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"--only {name}: no such technique; {hint}")
        if "{" + name + "}" in TABLE and name not in recent:
            raise ValueError(f"--only {name}: the proxy {args.proxy} has no flags for it")
    args.only = [name for name in names if name in wanted]
    common.check_counts(args)
    args.out = args.out or common.default_out(f"ablation_{args.proxy}")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_gpt.py")
    add = parser.add_argument
    add("--proxy", choices=PROXIES, default="bytes", help="default: bytes")
    add("--data", default="stdlib", help="a folder under data/, or a path (default: stdlib)")
    add("--only", metavar="NAME,..", help="these techniques only")
    common.add_sweep_options(parser, "ablation_PROXY")
    return parser.parse_args(argv)

def ablate(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    os.environ.update({"OMP_NUM_THREADS": "1"} | MALLOC)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    jobs, runs = make_jobs(sweep, args), common.read_runs(file, Job)
    if args.list:
        show_plan(jobs, runs, args)
        return 0
    todo = common.missing(jobs, runs)
    return common.finish(lambda: common.run_all(todo, args.jobs, command, file, execute, outcome),
                         lambda: write_report(sweep, args.out, args.proxy))

main = partial(common.command_line, "ablate", parse_args, ablate)

if __name__ == "__main__":
    common.start(main)
