"""What each technique is worth: a small proxy is trained on real text with every technique switched off in turn.

    python bench/ablate.py --list                                # the plan and how long it takes; runs nothing
    python bench/ablate.py --data books --jobs 2                 # losses: every technique with 3 seeds
    python bench/ablate.py --data books --time                   # step times, on an otherwise idle machine
    python bench/ablate.py --only mtp,xsa --seeds 8 --out records/more -- --iterations 600 --num-layers 6

Flags after ` -- ` change the proxy. Writes --out: runs.jsonl (a line for each finished run, at once), README.md (the
table) and deltas.png. The same command goes on where an earlier one ended: only what is missing or failed is run.

The effect of a technique is loss(without it) - loss(with it), in nats per token and paired by seed: positive means it
helps. Given are its mean, standard error and 95 % Student t interval over the seeds. Step times come from short runs
of their own, one at a time and in turn with the proxy's: the losses may be computed side by side on a busy machine.
Needs Linux or macOS.
"""
import argparse
import contextlib
import difflib
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from datetime import date
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TRAINER = ROOT / "train_gpt.py"
BASE = "proxy"  # the name of the run with nothing changed


class Proxy(NamedTuple):
    """The model that stands in for the real one: its flags, and guesses of seconds for --list."""

    flags: str
    loss_s: float  # one run to its end
    time_s: float  # one pair of timing runs


# Three stages of equal length, so that the schedules of batch, length, window and multi-token prediction have something
# to do; learning rates follow the square root of the batch. Measured on one core (Zen 4): 230 ms/step for "cpu".
PROXIES = {
    "cpu": Proxy(
        "--preset cpu --device cpu --dtype bf16 --backend plain --no-compile --threads 1 "
        "--num-layers 4 --width 128 --head-dim 32 --value-embeds 2 --stage-ends 0.3333,0.6667,1 "
        "--batch-tokens 1024,2048,3072 --stage-lr 0.71,1,1.22 --seq-len 256 --max-doc-len 128,256,256 "
        "--window 64,96,128 --window-start 32 --window-step 32 --eval-seq-len 256 --mtp 2,1,0 "
        "--softcap 23,5,7.5 --paired --key-offset --xsa --skip single --backout "  # the preset leaves these out
        "--muon-lr 0.06 --momentum-warmup 30 --momentum-cooldown 20 --iterations 200 --eval-tokens 65536",
        loss_s=50, time_s=22,
    ),
    "gpu": Proxy(
        "--preset gpu --device cuda "
        "--num-layers 6 --width 384 --head-dim 64 --value-embeds 2 --iterations 900 --stage-ends 0.3333,0.6667,1 "
        "--batch-tokens 32768,65536,98304 --stage-lr 0.71,1,1.22 --seq-len 8192 --max-doc-len 1024,2048,2048 "
        "--window 384,896,1408 --window-start 128 --window-step 128 --eval-seq-len 8192 "
        "--mtp 2,1,0 --micro-tokens 98304 --momentum-warmup 150 --momentum-cooldown 50 --eval-tokens 1048576",
        loss_s=60, time_s=60,
    ),
}
ALWAYS = "--adam-weight-decay 0.005 --eval-every 0 --save-every 0 --no-save-last"  # of every proxy
TIMING = "--iterations 30 --log-every 1 --eval-tokens 1024"


class Technique(NamedTuple):
    """One row. Braces in `flags` are filled from the proxy's settings by `flag_values`."""

    name: str
    record: str  # public record number
    flags: str  # what removes it from the proxy; if `added`, what adds it
    published: str  # gain in optimizer steps and seconds of the 8xH100 track
    added: bool = False  # not part of the proxy


TECHNIQUES = (
    Technique("batch_schedule", "46", "--batch-tokens {mean_batch} --stage-lr {mean_lr}", "-65 steps, -1.8 s"),
    Technique("length_schedule", "72", "--seq-len {seq_len} --max-doc-len {max_doc_len}", "part of -1.2 s"),
    Technique("window_schedule", "13, 31", "--window {window} --window-start 0", "-22 s; 2.717 to 2.656 min"),
    Technique("eval_window", "33, 35", "--eval-window {wider}", "-0.001 loss, about 10 steps, each", added=True),
    Technique("polar_express", "38", "--orthogonalizer newton_schulz", "-10 steps, about 1 s"),
    Technique("normuon", "41, 42", "--muon-beta2 0", "-0.8 s; -30 steps, -3.3 s with a rate fix"),
    Technique("cautious", "43, 50", "--no-cautious", "-40 steps, -2.2 s (Muon); -20 steps, -1.1 s (Adam)"),
    Technique("muon_decay", "43", "--muon-weight-decay 0", "part of 43: -40 steps, -2.2 s"),
    Technique("adam_decay", "50", "--adam-weight-decay 0", "part of 50: -20 steps, -1.1 s"),
    Technique("softcap", "9, 18", "--softcap 0", "bound 15 instead of 30: -100 steps"),
    Technique("asymmetric_cap", "54", "--softcap 30,0,7.5", "-40 steps, -2.9 s"),
    Technique("mtp", "53", "--mtp 0", "-80 steps, -3.1 s with the untied head"),
    Technique("key_offset", "49", "--no-key-offset", "-50 steps, -2.4 s"),
    Technique("paired", "58", "--no-paired", "-65 steps, -3.5 s"),
    Technique("skip", "11, 45", "--skip none", "not given alone"),
    Technique("skip_form", "45", "--skip {other_skip}", "single instead of U-net: part of -2 s"),
    Technique("backout", "40", "--no-backout", "part of -6.2 s"),
    Technique("value_embeds", "14", "--value-embeds 0", "1750 to 1530 steps"),
    Technique("value_gate", "55", "--no-value-gate", "-35 steps, -1.3 s with the skip gate"),
    Technique("xsa", "82, 86", "--no-xsa", "-30 steps, -0.7 s; -0.3 s"),
    Technique("smear", "34", "--no-smear", "-15 steps, about 5 at equal loss"),
    Technique("attn_gate", "28", "--no-attn-gate", "-55 steps"),
    Technique("attn_scale", "20", "--attn-scale {plain_scale}", "-20 steps, about 3 s"),
    Technique("momentum", "-", "--momentum-warmup 0 --momentum-cooldown 0", "not given"),
    Technique("clip_docs", "29", "--long-docs clip", "about -25 steps", added=True),
    Technique("bigram", "62", "--bigram 8192", "-165 steps, -5.6 s", added=True),
)


# ----------------------------------------------------------------------------------------------------------------------
# Plan


class Sweep(NamedTuple):
    """What all runs of a call have in common; `key` tells their records from those of other proxies and data."""

    proxy: tuple[str, ...]  # flags of train_gpt.py
    changes: dict[str, str]  # of the proxy and of every technique: the flags added to it
    fingerprint: str  # of the data

    def key(self, kind: str) -> str:
        parts = [self.proxy, self.fingerprint, TIMING if kind == "time" else ""]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


class Job(NamedTuple):
    """One run to its end ("loss"), or one pair of timing runs ("time")."""

    kind: str
    technique: str
    seed: int  # for "time" the number of the pair
    key: str
    change: str
    proxy: tuple[str, ...]

    def flags(self, change: str) -> list[str]:
        return [*self.proxy, *change.split(), *(TIMING.split() if self.kind == "time" else [])]


def flag_values(trainer, s) -> dict[str, object]:
    """What the braces of TECHNIQUES stand for: one value in place of the stages' (batch: their mean, so that the token
    total stays; learning rate: interpolated at that batch; else the last), and values derived from the model's."""
    stages = trainer.stage_table(s)
    batch = sum((t.end - t.start) * t.batch_tokens for t in stages) / s.iterations
    rate = np.interp(batch, *zip(*sorted((t.batch_tokens, t.lr) for t in stages), strict=True))
    last = {name: getattr(stages[-1], name) for name in ("seq_len", "max_doc_len", "window")}
    return last | {"wider": last["window"] * 3 // 2, "mean_batch": round(batch), "mean_lr": f"{rate:.4g}",
                   "plain_scale": f"{s.head_dim**-0.5:.6g}", "other_skip": "single" if s.skip == "unet" else "unet"}


def make_sweep(args: argparse.Namespace) -> Sweep:
    """Checks the flags of all runs that are asked for. Raises ValueError for flags that train_gpt.py refuses or that
    change nothing, FileNotFoundError where the data set is missing."""
    sys.path.insert(0, str(TRAINER.parent))
    import train_gpt as trainer  # not above: --help needs no torch

    proxy = [*PROXIES[args.proxy].flags.split(), *ALWAYS.split(), "--data", args.data, *args.flags]
    base = trainer.parse_settings(proxy, 1)[0]
    values, fingerprint = flag_values(trainer, base), trainer.open_corpus(base.data).fingerprint()
    changes = {BASE: ""} | {row.name: row.flags.format(**values) for row in TECHNIQUES}
    for name in args.only:
        if trainer.parse_settings([*proxy, *changes[name].split()], 1)[0] == base:
            raise ValueError(f"{name}: {changes[name]} changes nothing in this proxy; name the other techniques with "
                             "--only, or give the proxy something to switch off, in flags after --")
    return Sweep(tuple(proxy), changes, fingerprint)


def make_jobs(sweep: Sweep, args: argparse.Namespace) -> list[Job]:
    """All jobs, seed by seed, so that an interrupted sweep has complete seeds."""
    kind, names = ("time", args.only) if args.time else ("loss", [BASE, *args.only])  # a pair holds the proxy too
    return [Job(kind, name, seed, sweep.key(kind), sweep.changes[name], sweep.proxy)
            for seed in range(args.seeds) for name in names]


def read_runs(path: Path, fields: tuple[str, ...] = Job._fields[:5]) -> dict[tuple, dict]:
    """The first five fields of a job -> newest record; what a full disk cut off is run again."""
    found = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with contextlib.suppress(json.JSONDecodeError):
            run = json.loads(line)
            found[tuple(run[name] for name in fields)] = run
    return found


def missing(jobs: list[Job], runs: dict[tuple, dict]) -> list[Job]:
    """The jobs without a record, or whose record says that they failed."""
    return [job for job in jobs if runs.get(job[:5], {"problem": "not run"})["problem"]]


def append_run(path: Path, run: dict) -> None:
    """Adds a record, on a line of its own even after one that a full disk cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = not path.is_file() or path.read_bytes()[-1:] in (b"", b"\n")
    with open(path, "a", encoding="utf-8") as file:
        file.write(("" if whole else "\n") + json.dumps(run) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def train(flags: list[str], seed: int, children: set, trainer: Path | None = None) -> tuple[list[dict], dict]:
    """Events of metrics.jsonl and config.json of one run. Raises RuntimeError with the trainer's sentence."""
    with tempfile.TemporaryDirectory() as logs:
        command = [sys.executable, str(trainer or TRAINER), *flags, "--seed", str(seed), "--log-dir", logs]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        children.add(child)
        printed = child.communicate()[1].strip()
        children.discard(child)
        if child.returncode:
            sentence = re.split(r"^error: ", printed, flags=re.MULTILINE)[1:] or printed.splitlines()
            raise RuntimeError(" ".join(sentence[-1].split()) if sentence else f"ended with code {child.returncode}")
        (folder,) = Path(logs).glob("*/*/")
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines], json.loads((folder / "config.json").read_text(encoding="utf-8"))


def step_ms(events: list[dict], config: dict) -> float:
    """ms per step over a whole run: median of each stage, without its first step, weighted by the stage's length."""
    times = [event["step_ms"] for event in events if "step_ms" in event]
    ends = [round(end * config["settings"]["iterations"]) for end in config["settings"]["stage_ends"]]
    return sum((end - start) * median(times[start + 1:end]) for start, end in pairwise([0, *ends])) / ends[-1]


def execute(job: Job, children: set) -> dict:
    """The record of a job: what was run and where, its numbers, or the problem that kept it from having any."""
    began, run = time.perf_counter(), job._asdict() | {"problem": "", "date": date.today().isoformat()}
    run |= {"proxy": shlex.join(job.proxy), "trainer": hashlib.sha256(TRAINER.read_bytes()).hexdigest()[:12]}
    try:
        if job.kind == "time":
            run["proxy_ms"] = step_ms(*train(job.flags(""), job.seed, children))
        events, config = train(job.flags(job.change), job.seed, children)
        if job.kind == "time":
            run["ms"] = step_ms(events, config)
        else:
            run |= {name: events[-1][name] for name in ("val_loss", "val_bpb", "params_total", "train_time_ms")}
        commit, dirty = (config["git"]["commit"] or "unknown")[:10], config["git"]["dirty"]
        run |= {"tokens": max(event.get("tokens", 0) for event in events), "torch": config["torch"],
                "hardware": config["hardware"]["name"], "commit": commit + (" with changes" if dirty else ""),
                "data": f"{config['data']['name']}, fingerprint {config['data']['fingerprint']}"}
    except (RuntimeError, OSError, ValueError, KeyError) as error:  # from the trainer, or in what it wrote
        run["problem"] = str(error) or repr(error)
    return run | {"wall_s": round(time.perf_counter() - began, 2)}


def outcome(run: dict) -> str:
    done = (f"{run['ms']:.1f} ms, proxy {run['proxy_ms']:.1f} ms" if "ms" in run else
            f"val loss {run.get('val_loss', 0):.4f}, {run['wall_s']:.0f} s")
    return f"{run['technique']}, seed {run['seed']}: " + (f"FAILED: {run['problem']}" if run["problem"] else done)


def run_all(jobs: list, workers: int, command: str, path: Path, execute=execute, outcome=outcome) -> int:
    """Runs the jobs, appends each to `path` when it ends, and returns how many failed. An interruption ends those that
    are under way, which leaves no record of them."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Results


class Effect(NamedTuple):
    """Differences of at least two seeds: mean, standard error, 95 % interval."""

    n: int
    mean: float
    se: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        return "helps" if self.low > 0 else "hurts" if self.high < 0 else "not resolved"


def effect(deltas: list[float]) -> Effect | None:
    """Student t statistics of paired differences; None for fewer than two."""
    from scipy.stats import t

    if len(deltas) < 2:
        return None
    center, se = mean(deltas), stdev(deltas) / len(deltas) ** 0.5
    half = float(t.ppf(0.975, len(deltas) - 1)) * se
    return Effect(len(deltas), center, se, center - half, center + half)


class Row(NamedTuple):
    """A technique's results; None where nothing is measured."""

    technique: Technique
    effect: Effect | None
    time: float | None  # step time with it / without it


def summarize(runs: list[dict]) -> list[Row]:
    """Results of all techniques that these finished runs of one sweep tell about, the largest effect first."""
    def numbers(kind: str, name: str, field: str) -> dict[int, float]:
        return {run["seed"]: run[field] for run in runs if (run["kind"], run["technique"]) == (kind, name)}

    base, rows = numbers("loss", BASE, "val_loss"), []
    for technique in TECHNIQUES:
        sign, name = -1 if technique.added else 1, technique.name
        losses = numbers("loss", name, "val_loss")
        deltas = [sign * (losses[seed] - base[seed]) for seed in sorted(base.keys() & losses.keys())]
        changed, proxy = (numbers("time", name, field).values() for field in ("ms", "proxy_ms"))
        ratio = (median(proxy) / median(changed)) ** sign if changed else None
        if losses or ratio:
            rows.append(Row(technique, effect(deltas), ratio))
    return sorted(rows, key=lambda row: row.effect.mean if row.effect else -np.inf, reverse=True)


def table(rows: list[Row], changes: dict[str, str]) -> str:
    """The results as a Markdown table."""
    lines = ["| technique | public record | switched off by | Δ val loss ± se | 95 % interval | n | verdict "
             "| step time with / without | published gain |", "|" + "---|" * 9]
    for technique, e, ratio in rows:
        measured = [f"{e.mean:+.4f} ± {e.se:.4f}", f"{e.low:+.4f} to {e.high:+.4f}", e.n, e.verdict] if e else [
            "not measured", "", "", "fewer than 2 seeds"]
        change = f"`{changes[technique.name]}`"
        cells = [technique.name, technique.record, f"not in the proxy; on: {change}" if technique.added else change,
                 *measured, f"{ratio:.3f}" if ratio else "not measured", technique.published]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


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
A proxy of this size says little about the 124 M parameter model: with few tokens, short windows and short documents a
technique may gain or cost what it does not there, and steps of small matrices spend their time elsewhere. It finds
large effects, and techniques that are broken.
"""


def readme(sweep: Sweep, rows: list[Row], runs: list[dict], problems: list[str]) -> str:
    """README.md of the results: the table, how it came about, and what it does not say."""
    said = {field: ("`; `" if field == "command" else "; ").join(dict.fromkeys(run[field] for run in runs))
            for field in ("date", "command", "data", "hardware", "torch", "commit", "trainer")}
    base, size = [run for run in runs if (run["kind"], run["technique"]) == ("loss", BASE)], "not run yet"
    if base:
        losses = [run["val_loss"] for run in base]
        size = (f"{base[0]['params_total']:,} parameters, {base[0]['tokens']:,} training tokens, val loss "
                f"{mean(losses):.4f}" + (f", sd over seeds {stdev(losses):.4f}" if len(losses) > 1 else ""))
    if len({run["trainer"] for run in runs}) > 1:
        problems = [*problems, "train_gpt.py has changed between these runs; use another --out for the new one"]
    figure = "![effects with their 95 % intervals](deltas.png)\n\n" if any(row.effect for row in rows) else ""
    return README.format(table=table(rows, sweep.changes), figure=figure, size=size, proxy=shlex.join(sweep.proxy),
                         problems="".join(f"- Problem: {problem}\n" for problem in problems), **said)


COLORS = {"helps": "tab:green", "hurts": "tab:red", "not resolved": "tab:gray"}


def plot(rows: list[Row], path: Path) -> None:
    """Points with 95 % intervals, one technique a line, the largest effect on top."""
    from matplotlib.figure import Figure

    shown = [(row.technique.name, row.effect) for row in reversed(rows) if row.effect]
    figure = Figure(figsize=(8, 1.4 + 0.27 * len(shown)), layout="constrained")
    axes = figure.subplots()
    for verdict, color in COLORS.items():
        points = [(y, e) for y, (_, e) in enumerate(shown) if e.verdict == verdict]
        axes.errorbar([e.mean for _, e in points], [y for y, _ in points], xerr=[e.high - e.mean for _, e in points],
                      fmt="o", color=color, capsize=3, label=f"{verdict} ({len(points)})")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.grid(axis="x", alpha=0.3)
    axes.set_xlabel("Δ validation loss, nats per token: mean and 95 % interval over seeds; right of 0 it helps")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def write_report(sweep: Sweep, out: Path) -> None:
    """README.md and deltas.png from the records of this proxy and data; there may be others in the file."""
    runs = [run for run in read_runs(out / "runs.jsonl").values()
            if run["key"] == sweep.key(run["kind"]) and run["change"] == sweep.changes.get(run["technique"])]
    done = [run for run in runs if not run["problem"]]
    problems = [f"{run['technique']}, seed {run['seed']}: {run['problem']}" for run in runs if run["problem"]]
    if not done:
        return
    rows = summarize(done)
    (out / "README.md").write_text(readme(sweep, rows, done, problems), encoding="utf-8")
    if any(row.effect for row in rows):
        plot(rows, out / "deltas.png")
    print(f"\n{table(rows, sweep.changes)}\n\nwritten to {out}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def show_plan(jobs: list[Job], runs: dict[tuple, dict], args: argparse.Namespace) -> None:
    """What would be run, and for how long by the median of finished runs (none yet: by the proxy's guess)."""
    todo, rows = missing(jobs, runs), {row.name: row for row in TECHNIQUES}
    for name in dict.fromkeys(job.technique for job in jobs):
        mine, left = ([job for job in some if job.technique == name] for some in (jobs, todo))
        what = "" if name == BASE else f"record {rows[name].record}: {mine[0].change}"
        print(f"{name:16} {len(mine) - len(left)} of {len(mine)} done  {what}")
    seconds = [run["wall_s"] for key, run in runs.items() if not run["problem"] and key[0] == jobs[0].kind]
    guess = PROXIES[args.proxy].time_s if args.time else PROXIES[args.proxy].loss_s
    each = median(seconds) if seconds else guess
    print(f"{len(todo)} of {len(jobs)} to run, about {len(todo) * each / args.jobs / 60:.0f} min: {each:.0f} s each "
          f"({'measured' if seconds else 'a guess'}), {args.jobs} at a time")


def check(args: argparse.Namespace) -> None:
    """Raises ValueError for options that cannot give a result, and turns --only into technique names."""
    names = [row.name for row in TECHNIQUES]
    for name in args.only or []:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"--only {name}: no such technique; " + (f"did you mean {close[0]}?" if close else
                                                                     f"there are {', '.join(names)}"))
    args.only = [name for name in names if name in (args.only or names)]
    least = 1 if args.quick else 3
    if args.seeds < least:
        raise ValueError(f"--seeds must be at least {least}, got {args.seeds}; fewer than 3 need --quick")
    if args.jobs < 1:
        raise ValueError(f"--jobs must be at least 1, got {args.jobs}")
    if args.time and args.jobs > 1:
        raise ValueError("--time needs --jobs 1: runs beside each other would change each other's step times")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [options] [-- flags of train_gpt.py]")
    today = ROOT / "records" / f"{date.today()}_ablation"
    parser.add_argument("--proxy", choices=PROXIES, default="cpu", help="the model to train (default: cpu)")
    parser.add_argument("--data", default="stdlib", help="data set: a folder under data/, or a path (default: stdlib)")
    parser.add_argument("--only", type=partial(str.split, sep=","), metavar="NAME,..", help="these techniques only")
    parser.add_argument("--seeds", type=int, default=3, help="runs (timing pairs) of each technique (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time (default: 1)")
    parser.add_argument("--time", action="store_true", help="measure step times instead of losses")
    parser.add_argument("--quick", action="store_true", help="allow fewer than 3 seeds, to try it out")
    parser.add_argument("--list", action="store_true", help="print the plan and its time, and run nothing")
    parser.add_argument("--out", type=Path, default=today, metavar="DIR",
                        help="folder of the results; name it to go on another day (default: records/DATE_ablation)")
    parser.add_argument("flags", nargs="*", help="after --: flags of train_gpt.py that change the proxy")
    return parser.parse_args(argv)


def ablate(args: argparse.Namespace, command: str) -> int:
    """Runs what is missing and writes the results; returns the exit code."""
    check(args)
    sweep, file = make_sweep(args), args.out / "runs.jsonl"
    jobs, runs = make_jobs(sweep, args), read_runs(file)
    if args.list:
        show_plan(jobs, runs, args)
        return 0
    if args.time and os.getloadavg()[0] > 0.5:
        print(f"warning: the load average is {os.getloadavg()[0]:.1f}; step times need an idle machine",
              file=sys.stderr)
    try:
        failed = run_all(missing(jobs, runs), args.jobs, command, file)
    finally:
        write_report(sweep, args.out)
    return exit_code(failed)


def exit_code(failed: int) -> int:
    """0; raises RuntimeError if runs failed."""
    if failed:
        raise RuntimeError(f"{failed} run(s) failed, see above; the same command runs them again")
    return 0


def main(argv: list[str] | None = None) -> int:
    return command_line("bench/ablate.py", parse_args, ablate, argv)


def command_line(script: str, parse: Callable, work: Callable[[argparse.Namespace, str], int],
                 argv: list[str] | None) -> int:
    """Exit code of `work(arguments, command)`; errors in one sentence, and an interruption as what can be resumed."""
    try:
        args = parse(argv)
        return work(args, shlex.join(["python", script, *(sys.argv[1:] if argv is None else argv)]))
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends the runs under way too
    sys.exit(main())
