"""GPT-2 124M on a CPU, tokens a second: train_baseline.py beside what people would pick. A part of bench/cpu.py.

    python bench/cpu.py --anchors                      # beside Hugging Face's GPT2LMHeadModel
    python bench/cpu.py --anchors --llmc ~/llm.c       # and llm.c's train_gpt2.c, built from that checkout
    python bench/cpu.py --anchors --nanochat ~/nanochat    # another question: bits per byte, beside nanochat

All train GPT-2's 124 M parameters from random weights on the same random tokens, in fp32, without a compiler, with
AdamW (torch's fused one), dropout 0, on all cores. They take turns, --runs times at each size. A run's figure is its
median step, without its first two. llm.c has one size, its source's 4 rows of 64 tokens.

--nanochat: the preset cpu of train_gpt.py, then nanochat's scripts for as many CPU seconds, each in fp32 without a
compiler on one thread, on the documents of data/stdlib (nanochat on their pieces); then the bits per byte of the same
whole validation documents, their ends included. Unequal are models, tokenizers (4,096 BPE tokens, ours bytes) and
contexts (512 tokens, ours 256 bytes). nanochat's flags are those of its runs/runcpu.sh but for NANOCHAT, as a run of
minutes needs; pip install rustbpe kernels psutil pyarrow tiktoken wandb beside our packages.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import common  # noqa: E402 - after the path
from data.common import BYTE_VOCAB, load_shard, shard_path, write_shard  # noqa: E402

VOCAB, PADDED, EOT, CONTEXT, LAYERS, HEADS, WIDTH = 50257, 50304, 50256, 1024, 12, 12, 768
SKIPPED = 2  # first steps: memory is new
LLMC_DATA = "dev/data/tinyshakespeare/tiny_shakespeare"  # the names that train_gpt2.c opens
LLMC_WEIGHTS = "gpt2_124M.bin"
STEP_TOKENS = 2048  # nanochat's
# Four times its own rates, the best of those in records/2026-11-26_cpu_anchors.
NANOCHAT = ["--depth=4", "--device-batch-size=4", f"--total-batch-size={STEP_TOKENS}", "--warmup-steps=5",
            "--matrix-lr=0.08", "--embedding-lr=1.2", "--unembedding-lr=0.03", "--scalar-lr=2"]
RUNCPU = ["--head-dim=64", "--window-pattern=L", "--max-seq-len=512", "--eval-every=-1", "--core-metric-every=-1",
          "--sample-every=-1", "--run=dummy", "--device-type=cpu", "--model-tag=run"]
PIECE = 1500  # characters: a row of 512 tokens holds one
STEP = re.compile(rb"step \d+: train loss .*\(took ([\d.]+) ms\)")

class Size(NamedTuple):
    """Tokens of a step."""
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    def __str__(self) -> str:
        return f"{self.rows} x {self.length}"

SIZES = (Size(4, 64), Size(16, 64), Size(2, 1024))

def make_tokens(folder: Path) -> Path:
    """A data set of random tokens for train_baseline.py: one document, so that no row is divided."""
    folder.mkdir()
    random = np.random.default_rng(0)
    splits = {"train": 200_000, "val": 4_096}
    for split, count in splits.items():
        write_shard(shard_path(folder, folder.name, split, 0), random.integers(0, EOT, count).astype("<u2"))
    said = {split: {"tokens": count} for split, count in splits.items()}
    common.write_json(folder / "meta.json", {
        "name": folder.name, "tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": VOCAB, "eot": None,
        "source": "random numbers of bench/anchors.py", "splits": said})
    return folder

# --- The programs: each returns the milliseconds of its steps

def ours(data: Path, size: Size, steps: int, layers: int) -> list[float]:
    flags = ["--model_type", "gpt", "--preset", "gpt2", "--data", str(data), "--device", "cpu", "--dtype", "fp32",
             "--no-compile", "--num-layers", str(layers), "--iterations", str(steps), "--log-every", "1",
             "--batch-tokens", str(size.tokens), "--micro-tokens", str(size.tokens), "--seq-len", str(size.length),
             "--warmup-steps", "1", "--eval-every", "0", "--eval-tokens", "64", "--no-save-last"]
    events, _ = common.train(ROOT / "train_baseline.py", flags, 0, set())
    return [event["step_ms"] for event in events if "step_ms" in event]

def transformers(data: Path, size: Size, steps: int, layers: int) -> list[float]:
    """In a process of its own, as ours: `worker`."""
    code = "import sys; from bench import anchors; anchors.worker(*sys.argv[1:])"
    command = [sys.executable, "-c", code, str(data), *map(str, (*size, steps, layers))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"transformers: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])

def worker(data: str, *numbers: str) -> None:
    """Prints the milliseconds of each step of GPT2LMHeadModel: loss, backward, fused AdamW."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    rows, length, steps, layers = map(int, numbers)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=layers, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
    (shard,) = Path(data).glob("*_train_*.bin")
    tokens = torch.from_numpy(load_shard(shard).astype(np.int64))
    times = []
    for step in range(steps):
        start = time.perf_counter()
        batch = tokens[step * rows * length:][:rows * length].view(rows, length)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(1000 * (time.perf_counter() - start))
    print(json.dumps(times))

class Llmc:
    """llm.c's train_gpt2, built from a copy of a checkout, which stays as it is. FileNotFoundError: no checkout;
    RuntimeError: it cannot be built."""
    def __init__(self, checkout: Path, folder: Path, data: Path):
        if not (checkout / "train_gpt2.c").is_file():
            raise FileNotFoundError(f"--llmc {checkout}: no train_gpt2.c there; git clone karpathy/llm.c first")
        self.folder = folder
        shutil.copytree(checkout, folder, ignore=shutil.ignore_patterns(".git", "*.bin"))
        built = subprocess.run(["make", "train_gpt2"], cwd=folder, capture_output=True, text=True, check=False)
        if built.returncode or not (folder / "train_gpt2").is_file():
            raise RuntimeError(f"`make train_gpt2` failed in {checkout}: {built.stderr.strip()[-300:]}")
        (folder / LLMC_DATA).parent.mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            (shard,) = data.glob(f"*_{split}_*.bin")  # its format is ours
            shutil.copy(shard, folder / f"{LLMC_DATA}_{split}.bin")

    def __call__(self, _data: Path, _size: Size, steps: int, layers: int) -> list[float]:
        write_weights(self.folder / LLMC_WEIGHTS, layers)
        env = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count()))}
        child = subprocess.Popen(["stdbuf", "-oL", "./train_gpt2"], cwd=self.folder, env=env, stdout=subprocess.PIPE,
                                 start_new_session=True)
        times = []
        try:
            for line in child.stdout:
                if found := STEP.match(line):
                    times.append(float(found[1]))
                if len(times) == steps:
                    return times
        finally:
            common.stop_group(child)
            child.stdout.close()
        raise RuntimeError(f"llm.c's train_gpt2 ended after {len(times)} of {steps} steps")

def write_weights(path: Path, layers: int) -> None:
    """Random weights in llm.c's format, version 3: 256 int32, then fp32 tensors, those of all layers together."""
    if path.is_file():
        return
    header = np.zeros(256, dtype="<i4")
    header[:8] = 20240326, 3, CONTEXT, VOCAB, layers, HEADS, WIDTH, PADDED
    d, random = WIDTH, np.random.default_rng(0)
    inner = [(1, d), (0, d), (0.02, 3 * d * d), (0, 3 * d), (0.02, d * d), (0, d),  # first norm, attention
             (1, d), (0, d), (0.02, 4 * d * d), (0, 4 * d), (0.02, 4 * d * d), (0, d)]  # second norm, MLP
    tensors = [(0.02, PADDED * d), (0.02, CONTEXT * d), *((kind, layers * n) for kind, n in inner), (1, d), (0, d)]
    with open(path, "wb") as file:
        header.tofile(file)
        for kind, count in tensors:
            drawn = random.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            (np.full(count, kind, np.float32) if kind in (0, 1) else drawn).tofile(file)

# --- nanochat, in bits per byte

def documents(data: Path, split: str) -> list[str]:
    """The texts of a data set of bytes. FileNotFoundError: it is not made."""
    shards = sorted(data.glob(f"*_{split}_*.bin"))
    if not shards:
        raise FileNotFoundError(f"no {split} shards in {data}; make them with python data/stdlib.py")
    tokens = np.concatenate([load_shard(shard) for shard in shards])
    pieces = np.split(tokens, np.flatnonzero(tokens == BYTE_VOCAB["eot"]))[1:]
    return [bytes(piece[1:].astype(np.uint8)).decode() for piece in pieces]

def pieces(texts: list[str]) -> list[str]:
    """The texts cut at ends of lines into pieces of at most PIECE characters, if no line has more, in a fixed random
    order: nanochat's loader drops what is beyond a row, and most of a long file would never be seen."""
    found = []
    for text in texts:
        found.append("")
        for line in text.splitlines(keepends=True):
            if found[-1] and len(found[-1]) + len(line) > PIECE:
                found.append("")
            found[-1] += line
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]

class Result(NamedTuple):
    """A row of the table."""
    program: str
    val_bpb: float
    cpu_s: float
    params: int
    steps: int
    tokens: int

class Nanochat:
    """nanochat's own scripts in a checkout, on documents of ours in a folder. FileNotFoundError: no checkout;
    RuntimeError: what a script says as it fails."""
    def __init__(self, checkout: Path, folder: Path, data: Path):
        if not (checkout / "scripts" / "base_train.py").is_file():
            raise FileNotFoundError(f"--nanochat {checkout}: no scripts/base_train.py; git clone karpathy/nanochat")
        self.checkout = checkout
        self.env = os.environ | {
            "NANOCHAT_BASE_DIR": str(folder), "NANOCHAT_DTYPE": "float32", "TORCHDYNAMO_DISABLE": "1",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.run("-c", "import pyarrow; print()")  # or it says what is missing
        from pyarrow import parquet, table
        shards = folder / "base_data_climbmix"
        shards.mkdir(parents=True)
        splits = {  # its last file is for validation
            "shard_0.parquet": pieces(documents(data, "train")),
            "shard_1.parquet": documents(data, "val")}
        for name, texts in splits.items():
            parquet.write_table(table({"text": texts}), shards / name, row_group_size=64)
        self.run("-m", "scripts.tok_train", "--vocab-size=4096")

    def run(self, *command: str) -> tuple[str, float]:
        """The last line that python prints with this command in the checkout, and its CPU seconds."""
        before = sum(os.times()[2:4])  # of all children that have ended
        done = subprocess.run([sys.executable, *command], cwd=self.checkout, env=self.env,
                              capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"nanochat: {(done.stderr.strip() or 'no words').splitlines()[-1]}")
        return done.stdout.splitlines()[-1], sum(os.times()[2:4]) - before

    def train(self, steps: int) -> float:
        """CPU seconds of a run of these steps, from its start to its checkpoint."""
        return self.run("-m", "scripts.base_train", *RUNCPU, *NANOCHAT, f"--num-iterations={steps}")[1]

    def __call__(self, cpu_s: float) -> Result:
        """A run of as many CPU seconds and a step more, by two short ones."""
        short = self.train(1)
        step_s = max(0.001, (self.train(9) - short) / 8)
        steps = 2 + max(0, int((cpu_s - short) / step_s))
        spent = self.train(steps)
        found, _ = self.run("-c", f"from bench import anchors; anchors.nanochat_bits({steps})")
        bits, params = json.loads(found)
        return Result("nanochat", bits, round(spent, 1), params, steps, steps * STEP_TOKENS)

def nanochat_bits(step: int) -> None:
    """Prints, in nanochat's checkout: its bits per byte of all validation documents, its parameters. As in its training
    a row has max_seq_len tokens and starts with the one that starts documents."""
    import torch
    from nanochat.checkpoint_manager import load_model
    from nanochat.dataset import parquets_iter_batched

    model, tokenizer, meta = load_model("base", torch.device("cpu"), "eval", model_tag="run", step=step)
    texts, length, nats = sum(parquets_iter_batched("val"), []), meta["max_seq_len"], 0.0
    for ids in tokenizer.encode(texts, prepend="<|bos|>", append="<|bos|>"):
        for start in range(1, len(ids), length):
            row = torch.tensor([ids[:1] + ids[start:start + length]])
            with torch.no_grad():
                nats += model(row[:, :-1], row[:, 1:], loss_reduction="none").sum().item()
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    print([round(bits, 4), sum(p.numel() for p in model.parameters())])

def ours_in_bits(data: Path, seed: int, more: list[str]) -> Result:
    flags = ["--preset", "cpu", "--data", str(data), "--device", "cpu", "--dtype", "fp32", "--no-compile",
             "--threads", "1", "--eval-every", "0", "--eval-tokens", "0", "--no-save-last", *more]
    events, config = common.train(ROOT / "train_gpt.py", flags, seed, set())
    end, cpu_s = events[-1], round(config["cpu_s"], 1)
    counts = end["params_total"], end["step"], end["tokens"]
    return Result("train_gpt.py", round(end["val_bpb"], 4), cpu_s, *counts)

def beside_nanochat(args, command: str) -> int:
    """The whole of `bench/cpu.py --anchors --nanochat`; nanochat's seed is fixed, so that it runs once."""
    data, more = args.data or ROOT / "data" / "stdlib", ["--iterations", "9"] if args.quick else []
    with tempfile.TemporaryDirectory() as tmp:
        nanochat = Nanochat(args.nanochat.resolve(), Path(tmp) / "base", data)
        runs = [ours_in_bits(data, args.seed + i, more) for i in range(args.runs)]
        print(runs, flush=True)
        runs.append(nanochat(0 if args.quick else max(run.cpu_s for run in runs)))
    print(f"{common.markdown(Result._fields, runs)}\n\n{command}")
    if args.json:
        common.write_json(args.json, {"command": command, "runs": [run._asdict() for run in runs]})
    return 0

# --- The measurement

def measure(programs: dict, data: Path, sizes, runs: int, steps: int, layers: int) -> dict:
    """(size, program) -> tokens a second of each of its runs; the programs take turns."""
    found = {}
    for size in sizes:
        for turn in range(runs):
            for name, program in programs.items():
                if name == "llm.c" and size != sizes[0]:
                    continue
                step_ms = median(program(data, size, steps, layers)[SKIPPED:])
                found.setdefault((size, name), []).append(1000 * size.tokens / step_ms)
                print(f"{size}, run {turn + 1}, {name}: {step_ms:,.0f} ms a step", flush=True)
    return found

def table(found: dict) -> str:
    """Tokens a second by size and program, and ours over the program's in the same turn: median (range)."""
    rows = []
    for (size, name), rates in found.items():
        ratios = [mine / rate for mine, rate in zip(found[size, "train_baseline.py"], rates, strict=True)]
        rows.append([str(size), name, spread(rates, ".0f"), spread(ratios, ".2f")])
    return common.markdown(["rows x tokens", "program", "tokens a second", "ours / it"], rows)

def spread(values: list[float], form: str) -> str:
    low, middle, high = (format(x, form) for x in (min(values), median(values), max(values)))
    return f"{middle} ({low} to {high})"

def anchors(args, command: str) -> int:
    """The whole of `bench/cpu.py --anchors`; returns the exit code."""
    common.warn_if_busy()
    if args.nanochat:
        return beside_nanochat(args, command)
    sizes, layers = (SIZES[:1], 2) if args.quick else (SIZES, LAYERS)
    with tempfile.TemporaryDirectory() as tmp:
        data = make_tokens(Path(tmp) / "random")
        programs = {"train_baseline.py": ours, "transformers": transformers}
        if args.llmc:
            programs["llm.c"] = Llmc(args.llmc, Path(tmp) / "llmc", data)
        found = measure(programs, data, sizes, args.runs, SKIPPED + args.steps, layers)
    print(f"\n{table(found)}\n\n{command}; {os.cpu_count()} CPU cores")
    if args.json:
        common.write_json(args.json, {"command": command, "tokens_per_s": [
            {"size": size, "program": name, "runs": rates} for (size, name), rates in found.items()]})
    return 0
