"""What each technique is worth: a small proxy is trained on real text with every technique switched off in turn.

    python bench/ablate.py --list                                # the plan and how long it takes; runs nothing
    python bench/ablate.py --data books --jobs 2                 # losses: every technique with 3 seeds
    python bench/ablate.py --data books --time                   # step times, on an otherwise idle machine
    python bench/ablate.py --only mtp,xsa --seeds 8 --out records/more -- --iterations 600 --num-layers 6

Flags after ` -- ` change the proxy. Writes --out: runs.jsonl, README.md (the table) and deltas.png. The same command
goes on where an earlier one ended: only what is missing or failed is run.

The effect of a technique is loss(without it) - loss(with it), in nats per token and paired by seed: positive means it
helps. Step times come from short runs of their own, one at a time and in turn with the proxy's.
"""
import argparse
import difflib
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

# Three stages of equal length, so that the schedules of batch, length, window and multi-token
# prediction have something to do; learning rates follow the square root of the batch.
PROXY = """
--preset cpu --device cpu --dtype bf16 --backend plain --no-compile --threads 1
--num-layers 4 --width 128 --head-dim 32 --value-embeds 2 --stage-ends 0.3333,0.6667,1
--batch-tokens 1024,2048,3072 --stage-lr 0.71,1,1.22 --seq-len 256 --max-doc-len 128,256,256
--window 64,96,128 --window-start 32 --window-step 32 --eval-seq-len 256 --mtp 2,1,0
--softcap 23,5,7.5 --paired --key-offset --xsa --skip single --backout
--muon-lr 0.06 --momentum-warmup 30 --momentum-cooldown 20 --iterations 200 --eval-tokens 65536
"""
LOSS_S, TIME_S = 50, 22  # guesses for --list: one run to its end, one pair of timing runs
ALWAYS = "--adam-weight-decay 0.005 --eval-every 0 --save-every 0 --no-save-last"  # of every proxy
TIMING = "--iterations 30 --log-every 1 --eval-tokens 1024"

class Technique(NamedTuple):
    """One row. Braces in `flags` are filled from the proxy's settings by `flag_values`."""
    name: str
    record: str  # public record number
    flags: str  # what removes it from the proxy; if `added`, what adds it
    published: str  # gain in optimizer steps and seconds of the 8xH100 track
    added: bool = False  # not part of the proxy

# name | public record | flags that remove it (+: that add it) | published gain
TABLE = """
batch_schedule  | 46     | --batch-tokens {mean_batch} --stage-lr {mean_lr}  | -65 steps, -1.8 s
length_schedule | 72     | --seq-len {seq_len} --max-doc-len {max_doc_len}   | part of -1.2 s
window_schedule | 13, 31 | --window {window} --window-start 0  | -22 s; 2.717 to 2.656 min
eval_window     | 33, 35 | + --eval-window {wider}             | -0.001 loss, about 10 steps, each
polar_express   | 38     | --orthogonalizer newton_schulz      | -10 steps, about 1 s
normuon         | 41, 42 | --muon-beta2 0                      | -0.8 s; -30 steps, -3.3 s with a rate fix
cautious        | 43, 50 | --no-cautious                       | -40 steps, -2.2 s (Muon); -20 steps, -1.1 s (Adam)
muon_decay      | 43     | --muon-weight-decay 0               | part of 43: -40 steps, -2.2 s
adam_decay      | 50     | --adam-weight-decay 0               | part of 50: -20 steps, -1.1 s
softcap         | 9, 18  | --softcap 0,0,1                     | bound 15 instead of 30: -100 steps
asymmetric_cap  | 54     | --softcap 30,0,7.5                  | -40 steps, -2.9 s
mtp             | 53     | --mtp 0                             | -80 steps, -3.1 s with the untied head
key_offset      | 49     | --no-key-offset                     | -50 steps, -2.4 s
paired          | 58     | --no-paired                         | -65 steps, -3.5 s
skip            | 11, 45 | --skip none                         | not given alone
skip_form       | 45     | --skip {other_skip}                 | single instead of U-net: part of -2 s
backout         | 40     | --no-backout                        | part of -6.2 s
value_embeds    | 14     | --value-embeds 0                    | 1750 to 1530 steps
value_gate      | 55     | --no-value-gate                     | -35 steps, -1.3 s with the skip gate
xsa             | 82, 86 | --no-xsa                            | -30 steps, -0.7 s; -0.3 s
smear           | 34     | --no-smear                          | -15 steps, about 5 at equal loss
attn_gate       | 28     | --no-attn-gate                      | -55 steps
attn_scale      | 20     | --attn-scale {plain_scale}          | -20 steps, about 3 s
momentum        | -      | --momentum-warmup 0 --momentum-cooldown 0         | not given
clip_docs       | 29     | + --long-docs clip                  | about -25 steps
bigram          | 62     | + --bigram 8192                     | -165 steps, -5.6 s
"""

def read_technique(line: str) -> Technique:
    name, record, flags, published = (cell.strip() for cell in line.split("|"))
    return Technique(name, record, flags.removeprefix("+ "), published, flags.startswith("+"))

TECHNIQUES = tuple(map(read_technique, TABLE.strip().splitlines()))

# --- Plan

class Sweep(NamedTuple):
    """What all runs of a call have in common."""
    proxy: tuple[str, ...]  # flags of train_gpt.py
    changes: dict[str, str]  # of the proxy and of every technique: the flags added to it
    fingerprint: str  # of the data

    def key(self, kind: str) -> str:
        return common.key_of(self.proxy, self.fingerprint, TIMING if kind == "time" else "")

class Job(NamedTuple):
    """One run to its end ("loss"), or one pair of timing runs ("time")."""

    kind: str
    technique: str
    seed: int  # for "time" the number of the pair
    key: str
    change: str
    proxy: tuple[str, ...]

    def flags(self, change: str) -> list[str]:
        timing = TIMING.split() if self.kind == "time" else []
        return [*self.proxy, *change.split(), *timing]

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
    }

def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs that are asked for.
    Raises ValueError for flags that train_gpt.py refuses or that change nothing, FileNotFoundError
    where the data set is missing."""
    import train_gpt as trainer  # not above: --help needs no torch

    proxy = [*PROXY.split(), *ALWAYS.split(), "--data", args.data, *args.flags]
    base = common.parsed(trainer, proxy)
    values = flag_values(trainer, base)
    changes = {BASE: ""} | {row.name: row.flags.format(**values) for row in TECHNIQUES}
    for name in args.only:
        if common.parsed(trainer, [*proxy, *changes[name].split()]) == base:
            raise ValueError(
                f"{name}: {changes[name]} changes nothing in this proxy; name the other techniques "
                "with --only, or give the proxy something to switch off, in flags after --")
    return Sweep(tuple(proxy), changes, trainer.open_corpus(base.data).fingerprint())

def make_jobs(sweep: Sweep, args: argparse.Namespace) -> list[Job]:
    """All jobs, seed by seed, so that an interrupted sweep has complete seeds."""
    kind = "time" if args.time else "loss"
    names = args.only if args.time else [BASE, *args.only]  # a timing pair holds the proxy too
    key = sweep.key(kind)
    return [Job(kind, name, seed, key, sweep.changes[name], sweep.proxy)
            for seed in range(args.seeds) for name in names]

# --- Runs

def measure(job: Job, children: set) -> dict:
    """The loss, or the step time beside the proxy's."""
    def train(change: str) -> tuple[list[dict], dict]:
        return common.train(TRAINER, job.flags(change), job.seed, children)

    found = {"proxy_ms": common.step_ms(*train(""))} if job.kind == "time" else {}
    events, config = train(job.change)
    if job.kind == "time":
        found["ms"] = common.step_ms(events, config)
    else:
        names = ("val_loss", "val_bpb", "params_total", "train_time_ms")
        found |= {name: events[-1][name] for name in names}
    return found | {"tokens": common.tokens_of(events)} | common.about(config)

def execute(job: Job, children: set) -> dict:
    """The record of a job."""
    run = common.record(job, TRAINER, lambda: measure(job, children))
    return run | {"proxy": shlex.join(job.proxy)}

def outcome(run: dict) -> str:
    """A line about a finished run."""
    who = f"{run['technique']}, seed {run['seed']}"
    if run["problem"]:
        return f"{who}: FAILED: {run['problem']}"
    if "ms" in run:
        return f"{who}: {run['ms']:.1f} ms, proxy {run['proxy_ms']:.1f} ms"
    return f"{who}: val loss {run['val_loss']:.4f}, {run['wall_s']:.0f} s"

# --- Results

class Row(NamedTuple):
    """A technique's results; None where nothing is measured."""
    technique: Technique
    effect: common.Effect | None
    time: float | None  # step time with it / without it

    @property
    def verdict(self) -> str:
        return self.effect.side("helps", "hurts", "not resolved")

def summarize(runs: list[dict]) -> list[Row]:
    """Results of all techniques that these finished runs tell about, the largest effect first."""
    def values(kind: str, name: str, field: str) -> dict[int, float]:
        mine = [run for run in runs if (run["kind"], run["technique"]) == (kind, name)]
        return {run["seed"]: run[field] for run in mine}

    base, rows = values("loss", BASE, "val_loss"), []
    for technique in TECHNIQUES:
        sign, name = -1 if technique.added else 1, technique.name
        losses = values("loss", name, "val_loss")
        changed = values("time", name, "ms").values()
        proxy = values("time", name, "proxy_ms").values()
        ratio = (median(proxy) / median(changed)) ** sign if changed else None
        if losses or ratio:
            deltas = [sign * delta for delta in common.paired(losses, base)]
            rows.append(Row(technique, common.effect(deltas), ratio))
    return sorted(rows, key=lambda row: row.effect.mean if row.effect else -np.inf, reverse=True)

HEAD = ["technique", "public record", "switched off by", "Δ val loss ± se", "95 % interval", "n",
        "verdict", "step time with / without", "published gain"]

def table(rows: list[Row], changes: dict[str, str]) -> str:
    """The results as a Markdown table."""
    cells = []
    for row in rows:
        technique, e, ratio = row
        change = f"`{changes[technique.name]}`"
        measured = ["not measured", "", "", "fewer than 2 seeds"]
        if e:
            span = f"{e.low:+.4f} to {e.high:+.4f}"
            measured = [f"{e.mean:+.4f} ± {e.se:.4f}", span, e.n, row.verdict]
        cells.append([
            technique.name, technique.record,
            f"not in the proxy; on: {change}" if technique.added else change, *measured,
            f"{ratio:.3f}" if ratio else "not measured", technique.published])
    return common.markdown(HEAD, cells)

README = """# What each technique is worth on a small proxy, {date}

Δ is loss(without the technique) - loss(with it), nats per token, paired by seed: positive means it helps. The verdict
says whether the 95 % Student t interval excludes 0; of 20 techniques without any effect, one is expected to get a
verdict by chance, and all rows share the proxy's own runs. Step times above 1 mean that the technique costs time.

{table}

{figure}- Commands: `{command}`
- Proxy: {size}; `{proxy}`
- Data: {data}
- Machine: {hardware}; torch {torch}; commit {commit}; train_gpt.py {trainer}
{problems}
A proxy of this size says little about the 124 M parameter model, with its longer windows and documents. It finds large
effects, and techniques that are broken.
"""

def proxy_size(runs: list[dict]) -> str:
    """Parameters, tokens and losses of the proxy's own runs."""
    base = [run for run in runs if (run["kind"], run["technique"]) == ("loss", BASE)]
    if not base:
        return "not run yet"
    losses = [run["val_loss"] for run in base]
    spread = f", sd over seeds {stdev(losses):.4f}" if len(losses) > 1 else ""
    return (f"{base[0]['params_total']:,} parameters, {base[0]['tokens']:,} training tokens, "
            f"val loss {mean(losses):.4f}{spread}")

def readme(sweep: Sweep, rows: list[Row], runs: list[dict], problems: list[str]) -> str:
    """README.md of the results: the table, how it came about, and what it does not say."""
    figure = "![effects with their 95 % intervals](deltas.png)\n\n"
    return README.format(
        table=table(rows, sweep.changes),
        figure=figure if any(row.effect for row in rows) else "",
        size=proxy_size(runs),
        proxy=shlex.join(sweep.proxy),
        problems=common.problem_lines(problems, runs, "train_gpt.py"),
        **common.facts(runs))

COLORS = {"helps": "tab:green", "hurts": "tab:red", "not resolved": "tab:gray"}

def plot(rows: list[Row], path: Path) -> None:
    """Points with 95 % intervals, one technique a line, the largest effect on top."""
    shown = [row for row in reversed(rows) if row.effect]
    figure, axes = common.panels(8, 1.4 + 0.27 * len(shown))
    for verdict, color in COLORS.items():
        points = [(y, row.effect) for y, row in enumerate(shown) if row.verdict == verdict]
        axes.errorbar(
            [e.mean for _, e in points], [y for y, _ in points],
            xerr=[e.high - e.mean for _, e in points],
            fmt="o", color=color, capsize=3, label=f"{verdict} ({len(points)})")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row.technique.name for row in shown])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("Δ validation loss, nats per token: mean and 95 % interval; right of 0 it helps")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)

def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and deltas.png from the records of this proxy and data."""
    runs = [run for run in common.read_runs(out / "runs.jsonl", Job).values()
            if run["key"] == sweep.key(run["kind"])
            and run["change"] == sweep.changes.get(run["technique"])]
    done = [run for run in runs if not run["problem"]]
    if not done:
        return
    problems = [f"{run['technique']}, seed {run['seed']}: {run['problem']}" for run in runs if run["problem"]]
    rows = summarize(done)
    if any(row.effect for row in rows):
        plot(rows, out / "deltas.png")
    common.write_readme(out, readme(sweep, rows, done, problems))

# --- Command line

def show_plan(jobs: list[Job], runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long."""
    todo, records = common.missing(jobs, runs), {row.name: row.record for row in TECHNIQUES}
    common.show_plan(jobs, todo, lambda job: f"{job.technique:16} {records.get(job.technique, ''):6} {job.change}")
    seconds = [run["wall_s"] for run in runs.values() if run["kind"] == jobs[0].kind and not run["problem"]]
    time = common.effort(len(todo), seconds, TIME_S if args.time else LOSS_S, args.jobs)
    print(f"{len(todo)} of {len(jobs)} to run, {time}")

def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot give a result; --only becomes a list of names."""
    names = [row.name for row in TECHNIQUES]
    wanted = args.only.split(",") if args.only else names
    for name in wanted:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"--only {name}: no such technique; {hint}")
    args.only = [name for name in names if name in wanted]
    common.check_counts(args)
    if args.time and args.jobs > 1:
        raise ValueError("--time needs --jobs 1: runs beside each other would change each other's "
                         "step times")
    args.out = args.out or common.default_out("ablation")

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_gpt.py")
    add = parser.add_argument
    add("--data", default="stdlib", help="a folder under data/, or a path (default: stdlib)")
    add("--only", metavar="NAME,..", help="these techniques only")
    add("--time", action="store_true", help="measure step times instead of losses")
    common.add_sweep_options(parser, "ablation")
    return parser.parse_args(argv)

def ablate(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    jobs, runs = make_jobs(sweep, args), common.read_runs(file, Job)
    if args.list:
        show_plan(jobs, runs, args)
        return 0
    if args.time:
        common.warn_if_busy()
    todo = common.missing(jobs, runs)
    return common.finish(lambda: common.run_all(todo, args.jobs, command, file, execute, outcome),
                         lambda: write_report(sweep, args.out))

main = partial(common.command_line, "ablate", parse_args, ablate)

if __name__ == "__main__":
    common.start(main)
