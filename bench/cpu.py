"""The CPU benchmark: how long training takes to reach the loss of nanoGPT's documented CPU run on Tiny Shakespeare.

    python bench/cpu.py                       # 3 runs each; downloads Tiny Shakespeare if it is not prepared yet
    python bench/cpu.py --input input.txt     # the same, from a copy of the text
    python bench/cpu.py --anchors             # another question: GPT-2 124M, tokens a second, beside other programs

Timed is the whole process, from its start to its exit, imports and compilation included (every run of ours gets an
empty compiler cache), of

  reference  bench/nanogpt_reference.py: 2,000 iterations, then one evaluation of the fixed validation stream;
  ours       train_gpt.py with OURS_FLAGS, until its validation loss on that stream is at or below the target.

The two take turns, with another seed each time. The target is the median final loss of the reference's runs or the
1.8857 its authors' configuration is documented with, whichever is lower. While not all runs of the reference are known,
ours aims at the lowest loss seen so far; should the median end up even lower, that run is repeated. Both see at most 64
characters of context, ours may have at most as many parameters as the reference, and it must evaluate the whole stream.
A run that crashes, misses the target or breaks one of these rules fails: there is no ratio, and the exit code is 1.

Prints every run, the medians with their spread, and as the last line `ratio: ours / reference` of the median seconds.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import anchors, common  # noqa: E402 - after the path

REFERENCE = ROOT / "bench" / "nanogpt_reference.py"
TRAINER = ROOT / "train_gpt.py"
DATA = ROOT / "data" / "shakespeare_char"
# The recipe of our runs; contexts of at most MAX_CONTEXT and --eval-tokens 0 are rules, not recipe.
OURS_FLAGS = """
--preset cpu --seq-len 64 --max-doc-len 64 --eval-seq-len 64 --eval-tokens 0 --num-layers 1 --width 64 --head-dim 32
--mlp-ratio 2 --value-embeds 0 --no-smear --no-attn-gate --ngram-rows 11000 --window 64 --window-start 64
--attn-scale 0.35 --batch-tokens 2048 --iterations 72 --muon-lr 0.08 --adam-lr 0.03 --eval-every 0 --log-every 50
--no-save-last --no-key-offset
""".split()
DOCUMENTED_LOSS = 1.8857  # nats per character that nanoGPT's configuration is documented to end at
REFERENCE_PARAMS = 804_096  # of that configuration
MAX_CONTEXT = 64  # characters

@dataclass
class Run:
    """One finished process. Seconds count from its start; a missing number is None."""
    who: str  # "reference" or "ours"
    seed: int
    wall_s: float
    first_step_s: float | None = None
    loss: float | None = None  # final validation loss, nats per character
    steps: int | None = None
    params: int | None = None
    context: int | None = None  # characters
    peak_mib: float | None = None  # largest resident memory, as the kernel reports it when the process ends
    tokens_per_s: float | None = None
    target: float | None = None
    eval_tokens: int | None = 0  # validation targets; 0: all of them
    problem: str = ""  # why the run does not count

@dataclass
class Process:
    """What a finished child process left: exit code, wall seconds, peak MiB and (seconds, line) pairs of its output."""
    code: int
    wall_s: float
    peak_mib: float
    lines: list[tuple[float, str]] = field(default_factory=list)

    def last_line(self) -> str:
        return next((line for _, line in reversed(self.lines) if line.strip()), "no output")

def time_process(command: list[str], cache: Path) -> Process:
    """Run `command` in the repository root and time it from start to exit. Compilers find only an empty `cache`."""
    caches = {f"{name}_CACHE_DIR": str(cache / name) for name in ("TORCHINDUCTOR", "TRITON")}
    lines: list[tuple[float, str]] = []
    start = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, env=os.environ | caches, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True, errors="replace")

    def read_output() -> None:
        for line in child.stdout:
            lines.append((time.perf_counter() - start, line.rstrip("\n")))

    reader = threading.Thread(target=read_output, daemon=True)
    reader.start()
    try:
        _, status, usage = os.wait4(child.pid, 0)  # not child.wait(): only wait4 tells the peak memory of this child
    except BaseException:
        child.kill()
        child.wait()
        raise
    wall_s = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)
    reader.join(timeout=5)  # a compiler's helper process may hold the pipe open for longer than the trainer lived
    peak_mib = usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # macOS counts bytes, Linux KiB
    return Process(child.returncode, wall_s, peak_mib, list(lines))

def read_reference(process: Process, seed: int) -> Run:
    """Turn the reference's output into a Run. Raises RuntimeError if it failed: without it there is no target."""
    if process.code:
        raise RuntimeError(f"the reference with seed {seed} ended with code {process.code}: {process.last_line()}")
    results = [json.loads(line) for _, line in process.lines if line.startswith("{")]
    if not results:
        raise RuntimeError(f"the reference with seed {seed} printed no result: {process.last_line()}")
    steps = [(seconds, line.split()[1]) for seconds, line in process.lines if line.startswith("step ")]
    return Run(
        who="reference",
        seed=seed,
        wall_s=process.wall_s,
        first_step_s=steps[0][0] if steps else None,
        loss=results[-1]["val_loss"],
        steps=int(steps[-1][1].split("/")[1]) if steps else None,
        params=results[-1]["params"],
        context=MAX_CONTEXT,
        peak_mib=process.peak_mib,
        tokens_per_s=results[-1]["tokens_per_s"],
    )

def longest_context(settings: dict) -> int | None:
    """Most characters before a target that the model may see, in any stage or in evaluation; None if not logged.
    Training rows of seq_len hold pieces of at most max_doc_len (0: no limit) that do not see each other."""
    if not {"seq_len", "max_doc_len", "eval_seq_len"} <= settings.keys():
        return None
    rows, pieces = max(settings["seq_len"]), settings["max_doc_len"]
    return max(rows if 0 in pieces else min(rows, max(pieces)), settings["eval_seq_len"])

def read_ours(process: Process, run_dir: Path, seed: int, target: float) -> Run:
    """Turn what the trainer wrote into a Run. The final loss is that of the last validation, not what `end` claims."""
    events, config = common.read_lines(run_dir / "metrics.jsonl"), run_dir / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")).get("settings", {}) if config.is_file() else {}
    end = next((event for event in reversed(events) if event.get("event") == "end"), {})
    losses = [event["val_loss"] for event in events if event.get("val_loss") is not None]
    return Run(
        who="ours",
        seed=seed,
        wall_s=process.wall_s,
        first_step_s=end.get("first_step_s"),
        loss=losses[-1] if losses else None,
        steps=max((event["step"] for event in events if "step" in event), default=None),
        params=end.get("params_total"),
        context=longest_context(settings),
        peak_mib=process.peak_mib,
        tokens_per_s=end.get("tokens_per_s"),
        target=target,
        eval_tokens=settings.get("eval_tokens"),
        problem="" if end and not process.code else f"ended with code {process.code}: {process.last_line()}",
    )

def judge(run: Run, limit: int) -> Run:
    """Note in `run.problem` why a run of ours does not count, if it missed its target or broke a rule."""
    if run.problem:
        return run
    if run.loss is None or not run.loss <= run.target:  # `not <=`, so that nan fails too
        run.problem = f"final loss {number(run.loss, 4)} is not at or below {run.target:.4f}"
    elif run.params is None or run.params > limit:
        run.problem = f"{number(run.params, 0)} parameters, but the reference has {limit:,}"
    elif run.context is None or run.context > MAX_CONTEXT:
        run.problem = f"contexts of {number(run.context, 0)} characters, but the reference has {MAX_CONTEXT}"
    elif run.eval_tokens != 0:
        run.problem = f"evaluated --eval-tokens {number(run.eval_tokens, 0)}, not all of them (0)"
    return run

def target_loss(losses: list[float], summarize: Callable[[list[float]], float] = median) -> float:
    """The loss ours has to reach: the reference's (median, or min while runs are to come) or the documented one."""
    return min(DOCUMENTED_LOSS, summarize(losses))

def run_reference(data: Path, seed: int) -> Run:
    with tempfile.TemporaryDirectory() as tmp:
        command = [sys.executable, str(REFERENCE), "--data", str(data), "--seed", str(seed)]
        return read_reference(time_process(command, Path(tmp)), seed)

def run_ours(data: Path, seed: int, target: float) -> Run:
    """Run train_gpt.py once in a log folder of its own, and read what it measured."""
    with tempfile.TemporaryDirectory() as tmp:
        logs = ["--experiment_name", "cpu_bench", "--log-dir", tmp, "--seed", str(seed)]
        aim = ["--data", str(data), "--target-loss", repr(target)]
        process = time_process([sys.executable, str(TRAINER), *logs, *aim, *OURS_FLAGS], Path(tmp) / "cache")
        run_dir = next((path for path in Path(tmp, "cpu_bench").glob("*/")), Path(tmp))
        return read_ours(process, run_dir, seed, target)

def run_in_turn(data: Path, seeds: range) -> tuple[list[Run], float]:
    """Run reference, ours, reference, ours, ...; return the runs, failed ones included, and the final target."""
    references: list[Run] = []
    ours: list[Run] = []

    def train(seed: int, summarize: Callable[[list[float]], float]) -> Run:
        target = target_loss([run.loss for run in references], summarize)
        return report(judge(run_ours(data, seed, target), references[0].params))

    for seed in seeds:
        references.append(report(run_reference(data, seed)))
        ours.append(train(seed, min))
    target = target_loss([run.loss for run in references])
    for i, run in enumerate(ours):
        if not run.problem and run.loss > target:
            print(f"the target is now {target:.4f}: repeating the run with seed {run.seed}", flush=True)
            ours[i] = train(run.seed, median)
    return [run for pair in zip(references, ours, strict=True) for run in pair], target

def report(run: Run) -> Run:
    """Print one line about a run that has just ended, and return it."""
    outcome = f"loss {number(run.loss, 4)}" + (f", FAILED: {run.problem}" if run.problem else "")
    print(f"{run.who}, seed {run.seed}: {run.wall_s:.1f} s, {outcome}", flush=True)
    return run

def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"

COLUMNS = (  # heading, attribute of Run, digits
    ("wall s", "wall_s", 2), ("first step s", "first_step_s", 2), ("val loss", "loss", 4), ("steps", "steps", 0),
    ("params", "params", 0), ("context", "context", 0), ("peak MiB", "peak_mib", 0), ("tokens/s", "tokens_per_s", 0),
)

def spread(runs: list[Run], attribute: str) -> dict[str, float] | None:
    """Median, min and max of one number over the runs that have it; None if no run has."""
    values = [getattr(run, attribute) for run in runs if getattr(run, attribute) is not None]
    return {"median": median(values), "min": min(values), "max": max(values)} if values else None

def by_program(runs: list[Run]) -> dict[str, list[Run]]:
    return {who: [run for run in runs if run.who == who] for who in dict.fromkeys(run.who for run in runs)}

def format_table(runs: list[Run]) -> str:
    """One row a run, then for both programs a row of medians and one of min..max."""
    rows = [["run", "seed", *(heading for heading, _, _ in COLUMNS), "result"]]
    for run in runs:
        cells = [number(getattr(run, name), digits) for _, name, digits in COLUMNS]
        rows.append([run.who, str(run.seed), *cells, f"FAILED: {run.problem}" if run.problem else "ok"])
    for who, group in by_program(runs).items():
        spreads = [(spread(group, name), digits) for _, name, digits in COLUMNS]
        rows.append([who, "median", *(number(s and s["median"], digits) for s, digits in spreads), ""])
        cells = [f"{number(s['min'], digits)}..{number(s['max'], digits)}" if s else "-" for s, digits in spreads]
        rows.append([who, "range", *cells, ""])
    return common.aligned(rows)

def wall_ratio(runs: list[Run]) -> float | None:
    """Our median wall seconds over the reference's; None if a run failed or one side has no runs."""
    groups = by_program(runs)
    if any(run.problem for run in runs) or len(groups) < 2:
        return None
    return spread(groups["ours"], "wall_s")["median"] / spread(groups["reference"], "wall_s")["median"]

def has_shards(folder: Path) -> bool:
    return any(folder.glob("*_val_*.bin"))

def prepare_data(args: argparse.Namespace, tmp: Path) -> Path:
    """The folder with the shards: --data, or made in `tmp` from --input, or data/shakespeare_char, made if absent.
    Raises FileNotFoundError without shards, RuntimeError if they cannot be made."""
    if args.data and not has_shards(args.data):
        raise FileNotFoundError(f"no *_val_*.bin in {args.data}; leave --data away to have the data prepared")
    folder = args.data.resolve() if args.data else tmp / "shakespeare_char" if args.input else DATA
    if not has_shards(folder):
        given = ["--input", str(args.input)] if args.input else []
        command = [sys.executable, str(ROOT / "data" / "shakespeare_char.py"), "--out", str(folder), *given]
        if subprocess.run(command, check=False).returncode:
            raise RuntimeError("data/shakespeare_char.py failed; without a network give the text of Tiny Shakespeare "
                               "with --input")
    return folder

def check(args: argparse.Namespace) -> None:
    """Raise ValueError or FileNotFoundError for options that cannot give a result."""
    least = 1 if args.quick or args.nanochat else 3
    if args.runs < least:
        raise ValueError(f"--runs must be at least {least}, got {args.runs}; fewer than 3 need --quick")
    if args.input and args.data:
        raise ValueError("--input and --data exclude each other; give the text or the folder made from it")
    for name in ("llmc", "nanochat"):
        if getattr(args, name) and not args.anchors:
            raise ValueError(f"--{name} is read with --anchors only")
    if args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    if args.input and not args.input.is_file():
        raise FileNotFoundError(f"--input {args.input} is not a file; it has to be the text of Tiny Shakespeare")

def write_json(path: Path, args: argparse.Namespace, runs: list[Run], target: float) -> None:
    """Write everything measured, with the machine and the flags of ours."""
    summary = {who: {name: spread(group, name) for _, name, _ in COLUMNS} for who, group in by_program(runs).items()}
    machine = {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()}
    result = {"machine": machine, "ours_flags": OURS_FLAGS, "quick": args.quick, "target": target}
    common.write_json(path, result | {"ratio": wall_ratio(runs), "summary": summary,
                                      "runs": [asdict(run) for run in runs]})

def benchmark(args: argparse.Namespace, command: str) -> int:
    """Run everything and print the result; return the exit code."""
    check(args)
    if args.anchors:
        return anchors.anchors(args, command)
    common.warn_if_busy()
    with tempfile.TemporaryDirectory() as tmp:
        data = prepare_data(args, Path(tmp))
        runs, target = run_in_turn(data, range(args.seed, args.seed + args.runs))
    source = "documented" if target == DOCUMENTED_LOSS else "median of the reference"
    print(f"\n{format_table(runs)}\n\ntarget: {target:.4f}, the {source} loss")
    if args.json:
        write_json(args.json, args, runs, target)
    if failed := sum(bool(run.problem) for run in runs):
        raise RuntimeError(f"{failed} of {len(runs)} runs failed, so there is no ratio; the table says why")
    print(f"ratio: {wall_ratio(runs):.3f}")
    return 0

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--input", type=Path, metavar="FILE", help="Tiny Shakespeare's text, if not to be downloaded")
    add("--data", type=Path, metavar="DIR", help="folder with prepared shards")
    add("--runs", type=int, help="runs of each, at least 3 (default: 3; 1 with --quick)")
    add("--seed", type=int, default=1337, help="seed of the first run; the next ones count up from it")
    add("--quick", action="store_true", help="allow fewer than 3 runs, to try the benchmark out")
    add("--json", type=Path, metavar="FILE", help="write all numbers there too")
    add("--anchors", action="store_true", help="tokens a second of GPT-2 124M instead (see bench/anchors.py)")
    add("--llmc", type=Path, metavar="DIR", help="with --anchors: a checkout of llm.c")
    add("--nanochat", type=Path, metavar="DIR", help="with --anchors: a checkout of nanochat; bits per byte instead")
    add("--steps", type=int, default=6, help="with --anchors: timed steps of a run (default: 6)")
    args = parser.parse_args(argv)
    args.runs = args.runs if args.runs is not None else (1 if args.quick else 3)
    return args

main = partial(common.command_line, "cpu", parse_args, benchmark, resumes=False)

if __name__ == "__main__":
    common.start(main)
