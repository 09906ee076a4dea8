"""A public speedrun script beside ours: same GPU, shards and tokens per step; ratios of ms/step and of validation loss.

    python bench/peer.py ../modded-nanogpt --data fineweb10B --steps 100 --time-limit 560 --out records/peer
    python bench/peer.py record.txt --set val_tokens=2097152 --set cooldown_frac=0.4 --max-doc-len 2048
    python bench/peer.py train_gpt_simple.py --device cpu --data pb --steps 96 --set batch_size=2048 --set mbs=1 \\
        --set val_tokens=16384 --swap num_layers=12=>num_layers=4 --vary "lr=0.025=>lr=0.025,lr=0.05" --preset cpu ..

PATH is a script, a folder that holds a train_gpt.py, or a public record log, whose embedded source is run: a copy in a
temporary folder with the shards in data/fineweb10B and a few constants set, under torchrun with one process. So it has
to accumulate gradients over 8 rows of train_seq_len: record 28, the last with FlexAttention. Nothing of its text is
kept: the results hold numbers, and the script's sha256, path and commit. `--work DIR` leaves its folders in DIR.

The script of track 3 runs on a CPU, too: what asks for CUDA is replaced, and torch.compile left out, as in ours. With
--vary it runs once for each text; the comparison takes the one with the lowest loss. A pair's seed is its number.

Ours is train_gpt.py --preset speedrun with as many steps, tokens per step and validation tokens; flags that are not
listed below go to it. The two take turns. Both clocks wait for the device at a validation and stop for it: ms/step is
measured from one validation to the next, where all runs got that far.

Loss at equal time is read off straight lines between validations, at the time when the first run ends. Schedules end
with the last step, so the faster side is further in its cool-down there.
"""
import argparse
import contextlib
import hashlib
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402
from bench import common  # noqa: E402
from runlogs import loading, parsing  # noqa: E402 - scripts of the root folder, not installed

CPU_SWAPS = {  # of the script of track 3
    'torch.device("cuda", int(os.environ["LOCAL_RANK"]))': 'torch.device("cpu")',
    "torch.cuda.set_device(device)": "pass", 'backend="nccl", device_id=device': 'backend="gloo"',
    "pin_memory=True": "pin_memory=False", 'device="cuda"': 'device="cpu"', ".cuda()": ".cpu()",
    "torch.cuda.get_device_name(device)": "device", "@torch.compile\n": "\n", "model.compile(dynamic=False)": "pass"}
TRACK_RANKS = 8  # processes of the public track; on one GPU a script takes as many rows one after another
EOT = 50256  # end of text, of GPT-2's tokens

@dataclass
class Run:
    """What a run's log tells: its clock in ms and its validation loss, each by step; and how it ended."""
    who: str  # "peer" or "ours"
    wall_s: float
    cpu_s: float = 0.0  # of all its processes
    variant: str = ""  # of the peer's script, with --vary
    times: dict[int, float] = field(default_factory=lambda: {0: 0.0})
    losses: dict[int, float] = field(default_factory=dict)
    peak_mib: float | None = None
    result: str = "ok"  # or "cut off", by --time-limit, or "FAILED: why"

    def curve(self) -> list[tuple[float, float]]:
        """Points (ms, validation loss) in order."""
        return sorted((self.times[step], loss) for step, loss in self.losses.items() if step in self.times)

# --- The peer's script

def load_peer(path: Path) -> tuple[str, dict]:
    """Source of a script, or in a record log, and its path, commit and sha256. Raises FileNotFoundError, ValueError."""
    path = path / "train_gpt.py" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; give a train_gpt.py, a folder that holds one, or a record log")
    sources = [path.read_text(encoding="utf-8", errors="replace")]
    if path.suffix != ".py":
        sources = list(loading.read_log(path).trace.parts.values())
    if not sources:
        raise ValueError(f"{path} is neither a .py file nor a record log: no line of 100 '=' ends its source")
    git = train_gpt.command_output("git", "-C", str(path.resolve().parent), "rev-parse", "HEAD")
    sha = hashlib.sha256(sources[0].encode()).hexdigest()
    return sources[0], {"path": str(path), "commit": git, "sha256": sha}

def find_constant(source: str, name: str) -> re.Match:
    """The line of the only assignment to `name`; group 1 is its value. Raises ValueError if there is not just one."""
    form = rf"^[ \t]*{re.escape(name)}[ \t]*(?::[^=\n]+)?=[ \t]*([^#\n=][^#\n]*?),?[ \t]*(?:#.*)?$"
    found = list(re.finditer(form, source, re.MULTILINE))
    if len(found) != 1:
        raise ValueError(f"the peer's script assigns {name} {len(found)} times, expected once, as in record 28's")
    return found[0]

def set_constants(source: str, values: dict[str, str]) -> str:
    """`source` with other values in the only assignments to these names, each on one line."""
    for name, value in values.items():
        start, end = find_constant(source, name).span(1)
        source = source[:start] + value + source[end:]
    return source

def swap(source: str, old: str, new: str) -> str:
    """`source` with another text. Raises ValueError if the old one is not there."""
    if old not in source:
        raise ValueError(f"{old!r} is not in the peer's script")
    return source.replace(old, new)

def sizes(source: str) -> tuple[int, int, int]:
    """Tokens of a step, of validation, of a row there: of the script of track 3, or of one with train_seq_len."""
    val_tokens = constant_number(source, "val_tokens")
    if found := re.search(r"\bseq_len=(\d+)", source):
        return constant_number(source, "batch_size"), val_tokens, int(found[1])
    tokens = TRACK_RANKS * constant_number(source, "train_seq_len")
    return tokens, val_tokens, constant_number(source, "val_seq_len")

def constant_number(source: str, name: str) -> int:
    """The value of a constant that is a whole number or a product of some."""
    text = find_constant(source, name)[1]
    if not re.fullmatch(r"\d+(\s*\*\s*\d+)*", text):
        raise ValueError(f"{name} in the peer's script is no product of whole numbers; give --set {name}=NUMBER")
    return math.prod(map(int, text.split("*")))

def check_data(corpus: train_gpt.Corpus, steps: int, tokens: int, val_tokens: int, row: int) -> None:
    """Raises ValueError for shards that the peer could not read, or not as ours does, and would say so only minutes
    later: it passes over a validation shard that is smaller than 8 rows of `row` tokens."""
    if corpus.meta["eot"] != EOT and corpus.meta.get("vocab_size", EOT + 1) > EOT:  # not for bytes
        raise ValueError(f"{corpus.folder}: end-of-text is token {corpus.meta['eot']}, the peer wants GPT-2's {EOT}")
    rows = TRACK_RANKS * row
    reads, held = math.ceil(val_tokens / rows) * rows, train_gpt.shard_length(corpus.val[0])
    if val_tokens % row or reads + 1 >= held:
        raise ValueError(f"{corpus.val[0]} has {held} tokens; val_tokens {val_tokens} must be a multiple of "
                         f"val_seq_len {row}, and needs more than {reads + 1}: --set smaller ones")
    total = sum(map(train_gpt.shard_length, corpus.train))
    if steps * tokens > total:
        raise ValueError(f"{corpus.folder} has {total} training tokens, {steps} steps of {tokens} need more: "
                         "lower --steps")

# --- Runs

def run_process(command: list, folder: Path, limit_s: float | None, **options) -> tuple[int | None, float]:
    """Runs to the end, or stops it at the limit; returns the exit code (None: stopped) and wall seconds. On SIGTERM
    torchrun ends its worker (within 30 s) and ours writes its last record."""
    start = time.perf_counter()
    with open(folder / "output.txt", "w") as file:
        child = subprocess.Popen(
            [*map(str, command)], env={**os.environ, "DATA_PATH": "."}, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True, **options)
        try:
            code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if child.poll() is None:
                common.stop_group(child, patience_s=60)
    return code, time.perf_counter() - start

def cpu_seconds() -> float:
    """Of all processes that have ended; runs follow each other."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime

def read_trace(who: str, trace: parsing.Trace, code: int | None, wall_s: float, output: str) -> Run:
    """A Run from a parsed log. Times before a fall of the clock are dropped: until record 21 the scripts reset it after
    10 steps. A validation's time replaces the one of its step's own line, which has not waited for the device."""
    run, last_ms = Run(who, wall_s, peak_mib=trace.end.get("peak_memory_mib")), 0.0
    for row in trace.rows:
        ms, loss = parsing.number(row.get("train_time_ms")), parsing.number(row.get("val_loss"))
        if ms is not None and math.isfinite(ms):
            run.times = (run.times if ms >= last_ms else {}) | {row["step"]: ms}
            last_ms = ms
        if loss is not None:
            run.losses[row["step"]] = loss
    if code and trace.end.get("status") not in parsing.COMPLETED:
        form = r"^(?:\[rank0\]: *)?([\w.]*(?:Error|Exception|Iteration))\b"
        why = output.splitlines()[-1:]
        if who == "peer":  # an exception's name is not its text
            why = re.findall(form, output, re.MULTILINE)[:1]
        run.result = ", ".join([f"FAILED: code {code}", *why])
    elif len(run.times) < 2:
        run.result = "FAILED: no step in its log" + (" before the time limit" if code is None else "")
    elif code is None:
        run.result = "cut off"
    return run

def run_peer(source: str, corpus: train_gpt.Corpus, folder: Path, limit_s: float | None) -> Run:
    """One run of the peer in `folder`."""
    shards = folder / "data" / "fineweb10B"
    shards.mkdir(parents=True)
    for split, paths in (("train", corpus.train), ("val", corpus.val)):
        for i, path in enumerate(paths):
            (shards / f"fineweb_{split}_{i:06d}.bin").symlink_to(path.resolve())
    (folder / "train_gpt.py").write_text(source, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]
    code, wall_s = run_process([*launcher, "train_gpt.py"], folder, limit_s, cwd=folder)
    log = max(folder.glob("logs/*.txt"), key=os.path.getmtime, default=folder / "output.txt")
    trace = parsing.parse_log(parsing.read_text(log))
    return read_trace("peer", trace, code, wall_s, parsing.read_text(folder / "output.txt"))

def run_ours(flags: list[str], folder: Path, limit_s: float | None) -> Run:
    """One run of train_gpt.py, with its logs in `folder`."""
    folder.mkdir()
    command = [sys.executable, ROOT / "train_gpt.py", *flags, "--log-dir", folder, "--experiment_name", "ours"]
    code, wall_s = run_process(command, folder, limit_s)
    traces = [loading.read_run(path).trace for path in folder.glob("ours/*/")]
    output = parsing.read_text(folder / "output.txt")
    return read_trace("ours", (traces or [parsing.Trace()])[0], code, wall_s, output)

def report(run: Run, **more) -> Run:
    """Prints a line about a run that has just ended, and returns it, with more fields."""
    run = replace(run, **more)
    print(f"{run.who} {run.variant}: {max(run.times)} steps, {run.wall_s:.0f} s, {run.result}", flush=True)
    return run

def run_in_turn(sources: dict[str, str], flags: list[str], corpus: train_gpt.Corpus, args: argparse.Namespace,
                folder: Path) -> list[Run]:
    """peer, ours, peer, ours, ... and each peer in all its variants. A peer may use half of the time that is left;
    another round starts only if there is time for one like the last. A peer that fails ends it, before ours takes its
    time."""
    runs, end, size = [], time.monotonic() + (args.time_limit or math.inf), len(sources) + 1

    def left(share: float = 1.0) -> float | None:
        return max(1.0, share * (end - time.monotonic())) if args.time_limit else None

    for i in range(1, args.repeats + 1):
        if i > 1 and args.time_limit and sum(run.wall_s for run in runs[-size:]) > left():
            print(f"no time for pair {i} of {args.repeats}", flush=True)
            break
        for number, (variant, source) in enumerate(sources.items()):
            place = folder / f"peer_{i}{f'_{number}' if number else ''}"
            before = cpu_seconds()
            run = run_peer(f"import torch; torch.manual_seed({i})\n{source}", corpus, place, left(0.5))
            runs.append(report(run, variant=variant, cpu_s=cpu_seconds() - before))
            if "FAILED" in runs[-1].result:
                return runs
        before = cpu_seconds()
        run = run_ours([*flags, "--seed", str(i)], folder / f"ours_{i}", left())
        runs.append(report(run, cpu_s=cpu_seconds() - before))
    return runs

# --- Results

def marks(runs: list[Run]) -> list[int]:
    """Steps between which all runs are timed: 0 and those after which each has validated, or, if some were cut off
    before that, every step of which each logged the time."""
    shared = set.intersection(*(set(run.times) for run in runs))
    validated = {step for step in shared if step == 0 or all(step in run.losses for run in runs)}
    return sorted(validated if len(validated) > 1 else shared)

def interpolate(curve: list[tuple[float, float]], x: float) -> float | None:
    """y at `x` on straight lines between the points (x, y), which are in order; None outside of them."""
    inside = bool(curve) and curve[0][0] <= x <= curve[-1][0]
    return float(np.interp(x, *zip(*curve, strict=True))) if inside else None

def ratio(peer: list, ours: list, at: str) -> dict | None:
    """Medians with their ranges, ours / peer and ours - peer; None where a side has no number."""
    peer, ours = ([value for value in values if value is not None] for values in (peer, ours))
    if not peer or not ours:
        return None
    a, b = median(peer), median(ours)
    return {"peer": a, "peer_range": [min(peer), max(peer)], "ours": b, "ours_range": [min(ours), max(ours)],
            "ratio": b / a if a else None, "difference": b - a, "at": at}

def step_times(runs: list[Run], steps: list[int]) -> list[float]:
    """ms/step of all runs from one of these steps to the next."""
    return [(run.times[b] - run.times[a]) / (b - a) for run in runs for a, b in pairwise(steps)]

def compare(runs: list[Run], tokens: int) -> dict:
    """The comparisons by name, from the runs that did not fail, those of the peer's best variant; empty if the two
    sides share no two timed steps."""
    good = [run for run in runs if "FAILED" not in run.result]
    peers, ours = ([run for run in good if run.who == who] for who in ("peer", "ours"))
    ends = {}
    for run in peers:
        ends.setdefault(run.variant, []).append(run.losses.get(max(run.times), math.inf))
    best = min(ends, key=lambda variant: median(ends[variant]), default="")
    peers = [run for run in peers if run.variant == best]
    both = peers + ours
    steps = marks(both) if peers and ours else []
    if len(steps) < 2:
        return {}

    def compared(at: str, value) -> dict | None:
        return ratio([value(run) for run in peers], [value(run) for run in ours], at)

    at, ms = f"steps {steps[0]} to {steps[-1]}", [step_times(side, steps) for side in (peers, ours)]
    speeds = ([1000 * tokens / value for value in side if value] for side in ms)
    result = {
        "ms/step": ratio(*ms, at), "peak MiB": compared("whole run", lambda run: run.peak_mib),
        "CPU s, whole run": compared("whole run", lambda run: run.cpu_s),
        "tokens/s": ratio(*speeds, at)}
    if validated := set.intersection(*(set(run.losses) for run in both)):
        step = max(validated)
        result["val loss, equal tokens"] = compared(f"step {step}", lambda run: run.losses[step])
    if all(run.curve() for run in both):
        end = min(run.curve()[-1][0] for run in both)
        result["val loss, equal time"] = compared(f"{end / 1000:,.1f} s", lambda run: interpolate(run.curve(), end))
    return {name: found for name, found in result.items() if found}

def show(value: float | None) -> str:
    return "-" if value is None else f"{value:,.6g}"

def format_tables(runs: list[Run], result: dict) -> str:
    """A row a run, then a row a comparison: medians and ranges over the runs, those of ms/step over all stretches."""
    runs_table = [["run", "steps", "clock s", "ms/step", "val loss", "peak MiB", "CPU s", "wall s", "result"]]
    for run in runs:
        step, loss = max(run.times), run.losses[max(run.losses)] if run.losses else None
        ms = run.times[step]
        numbers = ms / 1000, ms / step if step else None, loss, run.peak_mib, run.cpu_s, run.wall_s
        runs_table.append([f"{run.who} {run.variant}".strip(), str(step), *map(show, numbers), run.result])
    head = ["", "peer", "range", "ours", "range", "ours / peer", "ours - peer", "at"]
    rows = []
    for name, r in result.items():
        sides = [cell for who in ("peer", "ours")
                 for cell in (show(r[who]), "..".join(map(show, r[f"{who}_range"])))]
        rows.append([name, *sides, show(r["ratio"]), show(r["difference"]), r["at"]])
    return "\n\n".join(map(common.aligned, [runs_table, *([[head, *rows]] if rows else [])]))

def write_folder(out: Path, record: dict, tables: str, folder: Path) -> None:
    """README.md, peer.json and the logs of our runs; nothing of the peer's."""
    out.mkdir(parents=True, exist_ok=True)
    said = record["setting"] | record["peer"]
    facts = "\n".join(f"- {name}: {value}" for name, value in said.items())
    text = f"# A public script beside ours, {time.strftime('%Y-%m-%d')}\n\n{facts}\n\n```\n{tables}\n```\n"
    (out / "README.md").write_text(text, encoding="utf-8")
    common.write_json(out / "peer.json", record)
    for run in folder.glob("ours_*/ours/*/"):
        shutil.copytree(run, out / run.relative_to(folder).parts[0], dirs_exist_ok=True,
                        ignore=shutil.ignore_patterns("checkpoints", "profile"))

def our_flags(args: argparse.Namespace, tokens: int, val_tokens: int) -> list[str]:
    """Flags of train_gpt.py: the preset at the peer's sizes. What is wrong is said before the peer has run."""
    rate = train_gpt.PRESETS["speedrun"]["stage_lr"][-1]  # the preset's for its largest batch
    same = {
        "data": args.data, "device": args.device, "iterations": args.steps,
        "batch-tokens": tokens, "save-every": 0, "eval-tokens": val_tokens,
        "eval-every": args.eval_every, "target-loss": 0}
    fixed = [f"--{key}={value}" for key, value in same.items()]
    flags = ["--preset", "speedrun", f"--stage-lr={rate}", *args.ours, "--no-save-last", *fixed]
    train_gpt.parse_settings(flags, world_size=1)
    return flags

def prepared(args: argparse.Namespace) -> tuple[dict[str, str], dict, dict]:
    """The peer's source in each variant, where it is from, and what was changed in it."""
    source, identity = load_peer(args.path)
    simple = "val_step_freq" in source  # track 3
    names = ("train_steps", "val_step_freq") if simple else ("num_iterations", "val_loss_every")
    changes = {names[0]: str(args.steps), names[1]: str(args.eval_every), **dict(args.set)}
    source = set_constants(source, changes)
    for old, new in [*(CPU_SWAPS.items() if simple and args.device == "cpu" else ()), *args.swap]:
        source = swap(source, old, new)
    sources = {"": source}
    for old, texts in args.vary:
        sources = {text: swap(source, old, text) for text in texts.split(",")}
    return sources, identity, changes | dict(args.swap)

def benchmark(args: argparse.Namespace, command: str) -> int:
    """Runs everything, prints and writes the result; returns the exit code."""
    hardware = train_gpt.detect_hardware(args.device)
    if hardware.device != args.device:
        raise RuntimeError("no usable CUDA device: run this on a machine with a GPU (--device cpu is for tests)")
    sources, identity, changes = prepared(args)
    tokens, val_tokens, row = sizes(next(iter(sources.values())))
    flags, corpus = our_flags(args, tokens, val_tokens), train_gpt.open_corpus(args.data)
    check_data(corpus, args.steps, tokens, val_tokens, row)
    setting = {"command": command, "device": hardware.name, "torch": train_gpt.torch.__version__,
               "tokens per step": tokens, "validation tokens": val_tokens}
    with contextlib.ExitStack() as stack:
        folder = (args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))).resolve()
        runs = run_in_turn(sources, flags, corpus, args, folder)
        result = compare(runs, tokens)
        tables = format_tables(runs, result)
        print(f"\n{tables}")
        if args.out:
            record = {"setting": setting, "peer": {**identity, "constants": changes}, "result": result,
                      "runs": [asdict(run) for run in runs]}
            write_folder(args.out, record, tables, folder)
    if not result or any("FAILED" in run.result for run in runs):
        raise RuntimeError("a run failed or has no timed step in common with the other side; the table says which, and "
                           "--work DIR keeps its output")
    return 0

def above_zero(text: str) -> int:
    if not int(text) > 0:
        raise ValueError
    return int(text)

def pairs(flag: str, texts: list[str], sign: str) -> list[tuple[str, str]]:
    """Names and values around a sign. Raises ValueError."""
    found = [tuple(text.split(sign, 1)) for text in texts]
    if wrong := [pair for pair in found if len(pair) != 2 or not pair[0]]:
        raise ValueError(f"{flag} {sign.join(wrong[0])}: expected NAME{sign}VALUE")
    return found

def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options; what they do not know goes to `ours`, the flags of train_gpt.py."""
    parser = common.make_parser(__doc__)
    parser.allow_abbrev = False
    add = parser.add_argument
    add("path", type=Path, metavar="PATH", help="public script, its folder, or a record log")
    add("--data", default="fineweb10B", help="data set of GPT-2 tokens: the name of a folder under data/, or a path")
    add("--steps", type=above_zero, default=100, help="steps, and so length of both schedules (default: 100)")
    add("--eval-every", "--eval_every", type=above_zero, default=25, help="steps between validations (default: 25)")
    add("--set", action="append", default=[], metavar="NAME=VALUE", help="set another constant of the peer's, such as "
        "train_seq_len, val_seq_len or val_tokens (which ours follows); can be repeated")
    add("--swap", action="append", default=[], metavar="OLD=>NEW", help="another text in the peer's; can be repeated")
    add("--vary", metavar="OLD=>NEW,..", help="the peer with each of these texts, such as rates; the best one counts")
    add("--repeats", type=above_zero, default=2, help="pairs of runs (default: 2)")
    add("--time-limit", "--time_limit", type=above_zero, metavar="S", help="seconds for all runs; cuts them off")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu is for tests")
    add("--out", type=Path, metavar="FOLDER", help="write README.md, peer.json and our logs there")
    add("--work", type=Path, metavar="DIR", help="run in this folder, outside of the project, and keep it")
    args, args.ours = parser.parse_known_args(argv)
    args.set, args.swap = pairs("--set", args.set, "="), pairs("--swap", args.swap, "=>")
    args.vary = pairs("--vary", [args.vary] if args.vary else [], "=>")
    if args.work and (args.work.exists() or args.work.resolve().is_relative_to(ROOT)):
        raise ValueError(f"--work {args.work} must be a new folder, and outside of the project, which keeps no peer")
    return args

main = partial(common.command_line, "peer", parse_args, benchmark, resumes=False)

if __name__ == "__main__":
    common.start(main)
