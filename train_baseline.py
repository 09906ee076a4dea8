"""Train what the speedrun is measured against, as plainly as nanoGPT does.

    python train_baseline.py                                    # GPT-2, on whatever is there
    python train_baseline.py --model-type moderngpt --num-kv-heads 2     # as Llama
    torchrun --standalone --nproc_per_node=8 train_baseline.py --preset gpt2    # nanoGPT's 124M

The control of train_gpt.py: its data, batches, validation and logs, but torch.optim's AdamW and Muon,
autocast and DistributedDataParallel. Not yet measured on a GPU. gpt: nanoGPT's GPT-2 (Radford et al.
2019). moderngpt: RMSNorm, RoPE, no biases, gated MLP, as in Llama. ngpt: Loshchilov et al. 2024, arXiv
2410.01131. moegpt: moderngpt with DeepSeekMoE's layers (Dai et al. 2024, arXiv 2401.06066).
Shape suffixes: B rows, T tokens of a row, N = B * T, D model_dim, H heads, K key dim of a head or, of
routing, choices of a token, E experts of a layer, V vocabulary. Documents never see each other.
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

# ==================== Settings ================================================================
# argparse is generated from the fields. The bracket holds the allowed values and, after `with`,
# those of another setting without which nothing reads this one.

# differs from train_gpt.py: the baselines
@dataclass(frozen=True)
class Settings:
    """What is computed (and must stay in a resumed run), and from `preset` on how and where."""
    seed: int = 0  # of initial weights and order of data [>=0]
    shuffle: bool = True  # the documents of a shard
    long_docs: str = "split"  # what is past max_doc_len: pieces, or skipped [split|clip]
    # --- model
    model_type: str = "gpt"  # architecture [gpt|moderngpt|ngpt|moegpt]
    num_layers: int = 12  # transformer layers [>0]
    width: int = 768  # model_dim [>0]
    head_dim: int = 64  # num_heads = width / head_dim [>0]
    num_kv_heads: int = 0  # 0: num_heads [>=0; with model_type=moderngpt|moegpt]
    mlp: str = "auto"  # auto: by model [auto|gelu|relu2|swiglu|geglu]
    mlp_ratio: float = 4.0  # hidden size / width; a gated MLP has 2/3 of it [>0]
    tied: str = "auto"  # head = embedding [auto|on|off; with model_type=gpt|moderngpt|moegpt]
    norm_gain: bool = True  # gains in RMSNorm [on|off; with model_type=moderngpt|moegpt]
    qk_norm: bool = False  # RMSNorm of queries, keys [on|off; with model_type=moderngpt|moegpt]
    rope_base: float = 1e4  # of RoPE [>0; with model_type=moderngpt|ngpt|moegpt]
    window: int = 0  # tokens that a query sees; 0: its document [>=0]
    num_experts: int = 16  # routed experts of a mixture layer [>0; with model_type=moegpt]
    top_k: int = 4  # of them for each token [>0; with model_type=moegpt]
    num_shared: int = 2  # of every token [>=0; with model_type=moegpt]
    expert_hidden: int = 0  # 0: like an MLP [>=0; with model_type=moegpt]
    dense_first: int = 1  # first layers that keep a dense MLP [>=0; with model_type=moegpt]
    balance: float = 0.01  # weight of the load-balancing loss [>=0; with model_type=moegpt]
    # --- training
    iterations: int = 5000  # optimizer steps; --max_steps [>0]
    batch_tokens: int = 524288  # of a step of all processes; --total_batch_size [>0]
    seq_len: int = 1024  # tokens of a row, packed from documents; --T [>0]
    max_doc_len: int = 0  # longest piece of a document; 0: the row's [>=0]
    optimizer: str = "adamw"  # of the matrices of attention and MLP [adamw|muon]
    max_lr: float = 6e-4  # peak learning rate of AdamW [>=0]
    min_lr: float = 6e-5  # at the end; not given: max_lr / 10 [>=0]
    beta1: float = 0.9  # AdamW's decay of the mean gradient [0..1]
    beta2: float = 0.95  # and of their squares [0..1]
    adam_eps: float = 1e-8  # AdamW's epsilon [>0]
    weight_decay: float = 0.1  # of AdamW / its rate [>=0; with model_type=gpt|moderngpt|moegpt]
    grad_clip: float = 1.0  # largest norm of all gradients; 0: no limit [>=0]
    muon_lr: float = 0.02  # Muon's learning rate [>=0; with optimizer=muon]
    muon_momentum: float = 0.95  # Nesterov's after its warm-up [0..1; with optimizer=muon]
    momentum_start: float = 0.85  # momentum at step 0 [0..1; with optimizer=muon]
    momentum_warmup: int = 300  # steps over which it rises [>=0; with optimizer=muon]
    muon_weight_decay: float = 0.0  # Muon's decay / rate [>=0; with optimizer=muon]
    schedule: str = "cosine"  # constant, then linear: wsd [cosine|wsd]
    warmup_steps: int = 100  # rates rise; not given: at most iterations / 10 [>=0]
    cooldown: float = 0.4  # last share of the steps: rates fall [0..1; with schedule=wsd]
    # --- how and where it runs
    preset: str = "auto"  # settings that flags override [auto|cpu|gpu|gpt2]
    experiment_name: str = "train_baseline"  # its runs: LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    resume: str = ""  # from the newest checkpoint (latest), this run or checkpoint
    data: str = "auto"  # data set: the name of a folder under data/, or a path
    eval_every: int = 250  # steps between validations; 0: only after the last step [>=0]
    eval_tokens: int = 10485760  # first tokens of the validation split; 0: all [>=0]
    eval_seq_len: int = 0  # longest context in validation; 0: as trained [>=0]
    target_loss: float = 0.0  # stop at this validation loss, nats; 0 off [>=0]
    save_every: int = 0  # steps between checkpoints; 0: the last only [>=0]
    save_last: bool = True  # a checkpoint after the last step
    keep: int = 2  # checkpoints of a run that are kept [>0]
    log_every: int = 10  # steps between console lines [>0]
    device: str = "auto"  # where to run [auto|cpu|cuda]
    dtype: str = "auto"  # auto: bf16 where it is fast [auto|bf16|fp32]
    backend: str = "auto"  # the formula is fast in bf16 on a CPU [auto|sdpa|plain]
    compile: bool = True  # torch.compile of the model
    micro_tokens: int = 16384  # most tokens of a forward pass [>0]
    threads: int = 0  # CPU threads; 0: torch's choice [>=0]

    @property
    def mlp_hidden(self) -> int:
        size = self.mlp_ratio * self.width
        return 32 * math.ceil(size / 48) if "glu" in self.mlp else round(size)

    @property
    def mixture_layers(self) -> range:
        first = self.dense_first if self.model_type == "moegpt" else self.num_layers
        return range(first, self.num_layers)

# differs from train_gpt.py: the baselines
PRESETS: dict[str, dict] = {
    "cpu": dict(  # two cores: the size and the data of train_gpt.py's preset
        data="stdlib", num_layers=3, width=192, head_dim=48, seq_len=256, batch_tokens=4096,
        iterations=360, warmup_steps=36, momentum_warmup=30, max_lr=4e-3, micro_tokens=8192,
        num_experts=8, top_k=2, num_shared=1, eval_every=120, eval_tokens=131072, compile=False),
    "gpu": dict(  # GPT-2 124M on one 16 GB card
        batch_tokens=65536, micro_tokens=8192, iterations=4000, warmup_steps=200,
        eval_tokens=262144, save_every=500),
    "gpt2": dict(  # nanoGPT's and llm.c's GPT-2 124M: 10 B tokens of FineWeb, 8 GPUs
        data="fineweb10B", shuffle=False, iterations=19073, warmup_steps=715, micro_tokens=65536),
}
ALIASES = {"iterations": "max_steps", "batch_tokens": "total_batch_size", "seq_len": "T"}

class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback."""

@functools.cache
def field_comments() -> dict[str, str]:
    """The comments of the fields of Settings, read from the source, by name."""
    return dict(re.findall(r"\n    (\w+): \w+ = .+?  # (.+)", inspect.getsource(Settings)))

# differs from train_gpt.py: names of llm.c
def build_parser() -> argparse.ArgumentParser:
    """A flag per field of Settings, with dashes or underscores, and the ALIASES."""
    text, kinds = __doc__.split("\n\n")[0], {"int": int, "float": float, "str": str}
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=text, allow_abbrev=False)
    for field in fields(Settings):
        names = [field.name, ALIASES.get(field.name, field.name)]
        flags = [f"--{s}" for name in names for s in (name.replace("_", "-"), name)]
        option = {"type": kinds.get(field.type), "metavar": "X"}
        if field.type == "bool":
            option = {"action": argparse.BooleanOptionalAction}
        if field.name == "resume":
            option |= {"nargs": "?", "const": "latest"}
        text = f"{field_comments()[field.name]} (default: {field.default})"
        option |= {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        parser.add_argument(*dict.fromkeys(flags), **option)
    return parser

def find_device(device: str) -> dict:
    """Device (cuda or cpu), its name, and whether it is fast in bf16."""
    if device != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        return {"device": "cuda", "name": gpu.name, "bf16": gpu.major >= 8}
    name = platform.machine()
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return {"device": "cpu", "name": name, "bf16": fast}

# differs from train_gpt.py: other settings
def parse_settings(argv: list[str] | None, world_size: int) -> tuple[Settings, dict]:
    """Settings with every `auto` resolved, and the hardware. Raises UserError with all faults."""
    parser = build_parser()
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    hardware = find_device(given.get("device", "auto"))
    preset = given.get("preset", "auto")
    if preset == "auto":
        wide = world_size >= 8 and data_folder(given.get("data", "fineweb10B")).is_dir()
        preset = "cpu" if hardware["device"] == "cpu" else "gpt2" if wide else "gpu"
    s = Settings(**PRESETS.get(preset, {}) | given | {"preset": preset})
    problems = setting_errors(s, given)
    for flag in [word for word in unknown if word.startswith("-")] or unknown:
        close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags"
        problems.append(f"{flag}: unknown, {hint}")
    if not problems:
        s = resolved(s, given, hardware)
        problems = misfits(s, given, world_size)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    return s, hardware

def resolved(s: Settings, given: dict, hardware: dict) -> Settings:
    """The settings with every `auto`, and every 0 that stands for another value, replaced."""
    gpt, device = s.model_type == "gpt", hardware["device"]
    dtype = s.dtype if s.dtype != "auto" else "bf16" if hardware["bf16"] else "fp32"
    autos = {
        "mlp": "gelu" if gpt else "swiglu", "tied": "on" if gpt else "off",
        "backend": "plain" if (device, dtype) == ("cpu", "bf16") else "sdpa",
        "data": "fineweb10B" if data_folder("fineweb10B").is_dir() else "stdlib",
    }
    autos = {name: value for name, value in autos.items() if getattr(s, name) == "auto"}
    s = replace(s, device=device, dtype=dtype, **autos)
    longest = min(s.max_doc_len or s.seq_len, s.seq_len)
    units = s.mlp_hidden / (s.top_k + s.num_shared)  # an MLP's, for all experts of a token
    warmup = 0 if s.model_type == "ngpt" else min(s.warmup_steps, s.iterations // 10)
    return replace(
        s, max_doc_len=longest, eval_seq_len=s.eval_seq_len or (longest if gpt else s.seq_len),
        num_kv_heads=s.num_kv_heads or max(1, s.width // s.head_dim),
        expert_hidden=s.expert_hidden or 16 * max(1, round(units / 16)),
        min_lr=given.get("min_lr", s.max_lr / 10), warmup_steps=given.get("warmup_steps", warmup),
    )

def setting_errors(s: Settings, given: dict) -> list[str]:
    """A sentence for each value that its bracket forbids, and each given one that nothing reads."""
    ranges = {">0": lambda x: 0 < x < math.inf, ">=0": lambda x: 0 <= x < math.inf,
              "0..1": lambda x: 0 <= x <= 1}
    bad = []
    if not re.fullmatch(r"\w[\w.+-]*", s.experiment_name):
        bad.append(f"--experiment_name {s.experiment_name!r}: use letters, digits and . _ + - only")
    for name, text in field_comments().items():
        value = getattr(s, name)
        spec, *needs = text.rpartition("[")[2].removesuffix("]").split("; with ")
        listed = isinstance(value, bool) or value in spec.split("|")
        if "[" in text and not (ranges[spec](value) if spec in ranges else listed):
            bad.append(f"--{name} {value}: must be {spec.replace('|', ' or ')}")
        for need in needs if name in given else []:
            other, values = need.split("=")
            if getattr(s, other) not in (values := values.split("|")):
                bad.append(f"--{name}: has no effect without --{other} {' or '.join(values)}")
    return bad

def misfits(s: Settings, given: dict, world_size: int) -> list[str]:
    """A sentence for each setting that does not fit the machine, another one, or world_size."""
    rows, heads = s.batch_tokens // s.seq_len, s.width // s.head_dim
    asked, cpu, kind = given.get("device"), s.device == "cpu", s.model_type
    compiler = not cpu or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
    checks = {  # sentence about the settings in quotes -> whether it is true
        "--device cuda needs a CUDA device, leave it out": cpu and asked == "cuda",
        "'preset' needs a CUDA device: use cpu, or add --device cpu":
            cpu and s.preset != "cpu" and asked != "cpu",
        "'compile' needs a C++ compiler: install g++, or use --no-compile": s.compile and not compiler,
        "'width' must be a multiple of 'head_dim'": s.width % s.head_dim,
        "'head_dim' must be a multiple of 4": s.head_dim % 4,
        f"'num_kv_heads' must divide the {heads} heads of queries": heads % s.num_kv_heads,
        "'mlp_ratio' leaves no hidden unit": s.mlp_hidden < 1,
        "'mlp': gpt has no gated MLP; use gelu, relu2": kind == "gpt" and "glu" in s.mlp,
        "'mlp': ngpt has a gated MLP; use swiglu": kind == "ngpt" and "glu" not in s.mlp,
        "'eval_seq_len': gpt has positions for 'max_doc_len' only; lower it":
            kind == "gpt" and s.eval_seq_len > s.max_doc_len,
        "'dense_first' must be below 'num_layers'": kind == "moegpt" and not s.mixture_layers,
        "'top_k' must be at most 'num_experts'": kind == "moegpt" and s.top_k > s.num_experts,
        "'min_lr' must be at most 'max_lr'": s.min_lr > s.max_lr,
        "'beta1', 'beta2', 'muon_momentum' must be below 1": 1 in (s.beta1, s.beta2, s.muon_momentum),
        "'seed' must be below 2^63": s.seed >= 2**63,
        "'warmup_steps' must be below 'iterations'": s.warmup_steps >= s.iterations,
        "'micro_tokens' must be at least 'seq_len'": s.micro_tokens < s.seq_len,
        "'batch_tokens' must be a multiple of 'seq_len'": s.batch_tokens % s.seq_len,
        f"{world_size} processes cannot share the {rows} rows of a step ('batch_tokens' / "
        f"'seq_len'): use {fits} processes": rows % world_size,
    }
    return [re.sub(r"'(\w+)'", lambda name: f"--{name[1]} {getattr(s, name[1])}", sentence)
            for sentence, wrong in checks.items() if wrong]

# ==================== Data ====================================================================
# Shards have the public format: 256 int32 (magic, version, token count), then uint16 tokens. Rows
# are packed from pieces: documents, which start with the end-of-text token, cut to max_doc_len.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_META = {
    "tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256, "splits": {}}
IGNORE = -1  # target that has no loss

def data_folder(name: str) -> Path:
    """A data set by the name of its folder under data/, or by path."""
    given = os.sep in name or Path(name).is_dir()
    return Path(name) if given else Path(__file__).resolve().parent / "data" / name

def repair_command(folder: Path) -> str:
    """The command that makes the data set of that name."""
    if folder.name.startswith("fineweb"):
        return "python data/cached_fineweb.py 9"
    return f"python data/{folder.name if folder.name == 'shakespeare_char' else 'stdlib'}.py"

def open_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """Tokens of a shard, memory-mapped. Raises UserError for a wrong header, a wrong length or
    (given `vocab_size`) a token id that the vocabulary does not have."""
    header = np.fromfile(path, dtype="<i4", count=256)
    redo = f"make it again with {repair_command(path.parent)}"
    if len(header) < 256 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        found = f"magic {header[0]}, version {header[1]}" if len(header) == 256 else "a truncated header"
        raise UserError(f"{path} is no token shard: {found}, expected {SHARD_MAGIC} and {SHARD_VERSION}; {redo}")
    count, size = int(header[2]), path.stat().st_size
    said = HEADER_BYTES + 2 * count
    if count < 1 or size != said:
        raise UserError(f"{path} is damaged: {size} bytes, {said} by its header; {redo}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size and (top := int(tokens.max())) >= vocab_size:
        raise UserError(f"{path} holds token id {top}, the vocabulary has {vocab_size}; {redo}")
    return tokens

class Corpus(NamedTuple):
    """A data set: its meta.json and the paths of its shards."""
    folder: Path
    meta: dict
    train: list[Path]
    val: list[Path]

    def fingerprint(self) -> str:
        """Hash of names, sizes and first 64 KiB of all shards: equal data, equal fingerprint."""
        digest = hashlib.sha256()
        for path in self.train + self.val:
            digest.update(f"{path.name} {path.stat().st_size}".encode())
            digest.update(np.fromfile(path, dtype=np.uint8, count=65536))
        return digest.hexdigest()[:16]

def open_corpus(name: str) -> Corpus:
    """A data set, checked; without meta.json it is taken for published FineWeb shards. Raises
    FileNotFoundError with the command that makes it, UserError if it is damaged."""
    folder = data_folder(name)
    repair, meta_path = repair_command(folder), folder / "meta.json"
    shards = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.exists() else GPT2_META
        said = {split: meta["splits"].get(split, {}).get("tokens") for split in shards}
        size, eot = int(meta["vocab_size"]), meta["eot"]
        if size < 1 or not (eot is None or 0 <= int(eot) < size):
            raise ValueError(f"vocab_size {size}, eot {eot}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{meta_path} cannot be read ({error!r}); make it again with {repair}") from error
    for split, paths in shards.items():
        if not paths:
            raise FileNotFoundError(f"no {split} shards in {folder}; make them with: {repair}")
        count = sum(len(open_shard(path)) for path in paths)
        if said[split] not in (None, count):
            raise UserError(f"{meta_path} says {said[split]} {split} tokens, the shards hold {count}; "
                            f"make them again with {repair}")
    return Corpus(folder, meta | {"vocab_size": size}, **shards)

def piece_table(tokens, eot: int | None, max_len: int, clip: bool, offset: int) -> tuple:
    """Start and length of each piece of a shard: documents cut to at most `max_len` tokens; `clip` keeps first pieces
    only (29). The last token is only a target. Without end-of-text tokens the shard is one document, cut from
    `offset` on, so that every epoch cuts elsewhere."""
    last = len(tokens) - 1
    starts = np.array([min(offset, last)]) if eot is None else np.flatnonzero(tokens[:last] == eot)
    if eot is not None and (not len(starts) or starts[0]):
        starts = np.insert(starts, 0, 0)
    lengths = np.diff(np.append(starts, last))
    counts = np.ones_like(starts) if clip else -(-lengths // max_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + within * max_len
    return piece_starts, np.minimum(max_len, np.repeat(starts + lengths, counts) - piece_starts)

def gather_rows(tokens, starts, lengths) -> np.ndarray:
    """Inputs, targets (the true next tokens, also at a piece's end), piece numbers, (3, total) int32."""
    begins = np.cumsum(lengths) - lengths
    index = np.repeat(starts - begins, lengths) + np.arange(lengths.sum())
    pieces = np.repeat(np.arange(len(starts)), lengths)
    return np.stack([tokens[index], tokens[index + 1], pieces]).astype(np.int32)

def training_rows(s: Settings, corpus: Corpus, epoch=0, shard=0, used=0):
    """The rows of train_gpt.py's Loader, (3, T) int32, and the place in the data after each."""
    idle = 0  # shards in turn without a row
    while idle < len(corpus.train) + 2:
        idle += 1
        tokens = open_shard(corpus.train[shard], corpus.meta["vocab_size"])
        rng = np.random.default_rng((s.seed, epoch, shard))
        offset = int(rng.integers(s.max_doc_len)) if epoch else 0
        eot, clip = corpus.meta["eot"], s.long_docs == "clip"
        starts, lengths = piece_table(tokens, eot, s.max_doc_len, clip, offset)
        order = rng.permutation(len(starts)) if s.shuffle else slice(None)
        starts, lengths = starts[order], lengths[order]
        ends = np.cumsum(lengths)
        while (last := np.searchsorted(ends, used + s.seq_len)) < len(ends):
            first = np.searchsorted(ends, used, side="right")
            sizes = lengths[first:last + 1].copy()
            sizes[-1] -= sizes.sum() - s.seq_len  # the rest of the last piece is skipped
            used, idle = int(ends[last]), 0
            row = gather_rows(tokens, starts[first:last + 1], sizes)
            yield row, {"epoch": epoch, "shard": shard, "used": used}
        turn, shard = divmod(shard + 1, len(corpus.train))
        epoch, used = epoch + turn, 0
    raise UserError(f"no shard of {corpus.folder} fills a row of {s.seq_len} tokens: lower --seq_len")

def next_batch(rows, s: Settings) -> tuple[Tensor, dict]:
    """This process's share of the next batch, (3, rows, T) int32, and the place after the batch."""
    rank, size = own_place()
    taken = [next(rows) for _ in range(s.batch_tokens // s.seq_len)]
    own = np.split(np.stack([row for row, _ in taken], axis=1), size, axis=1)[rank]
    return torch.from_numpy(own).to(s.device), taken[-1][1]

class ValStream:
    """The first N tokens of the val split, each once, cut into rows, where contexts are cut, too. What is predicted
    depends on neither processes nor batch size; a row's documents do not see each other."""
    def __init__(self, corpus: Corpus, num_tokens: int, seq_len: int):
        shards = [open_shard(path, corpus.meta["vocab_size"]) for path in corpus.val]
        available = sum(map(len, shards)) - 1
        self.num_tokens, self.seq_len = num_tokens or available, seq_len
        self.eot = corpus.meta["eot"]
        if not 0 < self.num_tokens <= available:
            more = f"make more with {repair_command(corpus.folder)}"
            repair = "use --eval_tokens 0 for all" if available else more
            raise UserError(f"--eval_tokens {num_tokens}: {corpus.folder} has {available} "
                            f"validation tokens; {repair}")
        self.num_rows = -(-self.num_tokens // seq_len)
        enough = len(shards[0]) > self.num_tokens
        self.tokens = shards[0] if enough else np.concatenate(shards)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Inputs, targets (IGNORE past the end) and documents of rows first, .., (3, count, T) int32."""
        batch = np.zeros((3, count * self.seq_len), dtype=np.int32)
        batch[1] = IGNORE
        start = first * self.seq_len
        size = max(0, min(count * self.seq_len, self.num_tokens - start))
        batch[0, :size] = self.tokens[start:start + size]
        batch[1, :size] = self.tokens[start + 1:start + size + 1]
        if self.eot is not None:
            batch[2] = np.cumsum(batch[0] == self.eot)
        return batch.reshape(3, count, self.seq_len)

# ==================== Model ===================================================================
# Parameters are fp32; in bf16, GPT.forward runs under autocast. ngpt's scales and steps start at
# the published values divided by a constant, which sets how fast AdamW moves them (section 2.5).

HEAD_MULTIPLE = 128  # the vocabulary is padded to a multiple of this
NORM_EPS = 1e-5  # of LayerNorm and RMSNorm, GPT-2's
RESIDUAL = ("out.weight", "down.weight")  # whose outputs are dimensions of the stream
# differs from train_gpt.py: last parts of names
FP32_PARAMETERS = (
    "router", "qk_scale", "up_scale", "gate_scale", "logit_scale", "attn_step", "mlp_step")
GELU = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": GELU, "geglu": GELU, "swiglu": F.silu, "relu2": lambda x: x.relu().square()}

def unit(x: Tensor) -> Tensor:
    """x with rows of norm 1, computed in fp32."""
    return F.normalize(x.float(), dim=-1).type_as(x)

# differs from train_gpt.py: rotates all dimensions
def rotary_table(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, 1, head_dim / 2) fp32, of RoPE (Su et al. 2021, arXiv 2104.09864)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[:, None]
    return angle.cos(), angle.sin()

def rope(x_BTHK, cos: Tensor, sin: Tensor) -> Tensor:
    """x with pairs (x[i], x[i + K/2]) rotated by the angle of their position, in fp32."""
    a, b = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x_BTHK)

def document_positions(docs_BT) -> Tensor:
    """Place of each token in its document, (B, T)."""
    index = torch.arange(docs_BT.size(1), device=docs_BT.device).expand_as(docs_BT)
    starts = F.pad(docs_BT[:, 1:] != docs_BT[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values

def attention_mask(docs_BT, window: Tensor | int) -> Tensor:
    """True where a query may look: causal, same document, inside the window; (B, 1, T, T)."""
    place = torch.arange(docs_BT.size(1), device=docs_BT.device)
    distance = place[:, None] - place
    same_document = docs_BT[:, None, :, None] == docs_BT[:, None, None, :]
    return same_document & (distance >= 0) & (distance < window)

def make_norm(s: Settings) -> nn.Module:
    """The normalization before a sublayer and the head; ngpt has none."""
    if s.model_type == "gpt":
        return nn.LayerNorm(s.width, NORM_EPS)
    norm = nn.RMSNorm(s.width, NORM_EPS, elementwise_affine=s.norm_gain)
    return nn.Identity() if s.model_type == "ngpt" else norm

class SelfAttention(nn.Module):
    """Causal self-attention; in ngpt of unit queries and keys with a learned scale."""
    def __init__(self, s: Settings):
        super().__init__()
        ngpt, bias, shared = s.model_type == "ngpt", s.model_type == "gpt", s.num_kv_heads * s.head_dim
        self.head_dim, self.qk_norm, self.backend = s.head_dim, s.qk_norm, s.backend
        self.group = s.width // shared  # heads of queries for one of keys
        self.softmax_scale = s.head_dim ** (0.5 if ngpt else -0.5)
        self.q = nn.Linear(s.width, s.width, bias)
        self.k = nn.Linear(s.width, shared, bias)
        self.v = nn.Linear(s.width, shared, bias)
        self.out = nn.Linear(s.width, s.width, bias)
        self.qk_scale = nn.Parameter(torch.full((s.width,), s.width**-0.5)) if ngpt else None

    def forward(self, x_BTD, mask: Tensor, angles: tuple | None) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = (F.rms_norm(x, (self.head_dim,), eps=NORM_EPS).type_as(v) for x in (q, k))
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        if self.qk_scale is not None:
            scale = (self.qk_scale * x_BTD.size(-1) ** 0.5).view(-1, self.head_dim)
            q, k = ((unit(x) * scale).type_as(v) for x in (q, k))
        k, v = (x.repeat_interleave(self.group, dim=2) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if self.backend == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, mask, scale=self.softmax_scale)
        else:  # in bf16 on a CPU 0.25 to 0.64 of SDPA's time (records/LOG.md, 2026-11-20)
            scores = q * self.softmax_scale @ k.mT
            y = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))

class FeedForward(nn.Module):
    """down(act(up(x))), or gated down(act(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202)."""
    def __init__(self, s: Settings, hidden: int):
        super().__init__()
        ngpt, bias = s.model_type == "ngpt", s.model_type == "gpt"
        self.activation = ACTIVATIONS[s.mlp]
        self.up = nn.Linear(s.width, hidden, bias)
        self.gate = nn.Linear(s.width, hidden, bias) if "glu" in s.mlp else None
        self.down = nn.Linear(hidden, s.width, bias)
        self.up_scale = nn.Parameter(torch.ones(hidden)) if ngpt else None
        self.gate_scale = nn.Parameter(torch.ones(hidden)) if ngpt else None

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gate is None:
            return self.down(self.activation(hidden))
        gate = self.gate(x)
        if self.up_scale is not None:
            # sqrt(model_dim): the activation wants entries of size 1, not of a unit vector
            hidden = (hidden * self.up_scale).type_as(hidden)
            gate = (gate * self.gate_scale * x.size(-1) ** 0.5).type_as(gate)
        return self.down(self.activation(gate) * hidden)

class FineMixture(nn.Module):
    """DeepSeekMoE's layer: `top_k` of many small experts, and shared ones, which are one MLP."""
    def __init__(self, s: Settings):
        super().__init__()
        self.top_k = s.top_k
        self.router = nn.Parameter(torch.empty(s.num_experts, s.width))
        self.experts = nn.ModuleList(FeedForward(s, s.expert_hidden) for _ in range(s.num_experts))
        self.shared = FeedForward(s, s.num_shared * s.expert_hidden) if s.num_shared else None
        if s.compile:  # it reads how many tokens each expert has
            self.routed = torch.compiler.disable(self.routed)

    def forward(self, x_BTD) -> Tensor:
        """Output; `balance` becomes the load-balancing loss (eq. 12) of each row times its tokens."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            scores_BTE = F.linear(x_BTD.float(), self.router).softmax(-1)
        gates_BTK, experts_BTK = scores_BTE.topk(self.top_k)
        y_NKD = self.routed(x_BTD.flatten(0, 1), experts_BTK.flatten())
        y = (y_NKD * gates_BTK.flatten(0, 1)[..., None]).sum(1).type_as(x_BTD).view_as(x_BTD)
        # of each row: depends on no micro-steps and processes; 1 where all have equal shares
        chosen_BTE = torch.zeros_like(scores_BTE).scatter(-1, experts_BTK, 1.0)
        share_BE = chosen_BTE.mean(1) * (len(self.experts) / self.top_k)
        self.balance = (share_BE * scores_BTE.mean(1)).sum() * x_BTD.size(1)
        return y if self.shared is None else y + self.shared(x_BTD)

    def routed(self, x_ND, choices: Tensor) -> Tensor:
        """Output of each expert that a token has chosen, (N, K, D). `choices`: (N * K,)."""
        order = choices.argsort(stable=True)
        counts = choices.bincount(minlength=len(self.experts)).tolist()
        rows = x_ND.repeat_interleave(self.top_k, dim=0)[order].split(counts)
        y = torch.cat([expert(x) for expert, x in zip(self.experts, rows, strict=True)])
        return y[order.argsort()].unflatten(0, (-1, self.top_k))

class TransformerLayer(nn.Module):
    """Attention, then MLP or experts; in ngpt each moves a point of the unit sphere a learned way."""
    def __init__(self, s: Settings, number: int):
        super().__init__()
        self.attn = SelfAttention(s)
        self.mlp = FineMixture(s) if number in s.mixture_layers else FeedForward(s, s.mlp_hidden)
        self.attn_norm, self.mlp_norm = make_norm(s), make_norm(s)
        ngpt = s.model_type == "ngpt"
        self.attn_step = nn.Parameter(torch.full((s.width,), s.width**-0.5)) if ngpt else None
        self.mlp_step = nn.Parameter(torch.full((s.width,), s.width**-0.5)) if ngpt else None

    def forward(self, x: Tensor, mask: Tensor, angles: tuple | None) -> Tensor:
        x = self.add(x, self.attn(self.attn_norm(x), mask, angles), self.attn_step)
        return self.add(x, self.mlp(self.mlp_norm(x)), self.mlp_step)

    def add(self, x: Tensor, y: Tensor, step_D: Tensor | None) -> Tensor:
        if step_D is None:
            return x + y
        step_D = (0.05 * x.size(-1) ** 0.5 * step_D).abs()
        return unit(x.float() + step_D * (unit(y) - x).float()).type_as(x)

# differs from train_gpt.py: the baselines
class GPT(nn.Module):
    """The language model, fp32 on the CPU. Its initial weights depend on the seed alone."""
    # differs from train_gpt.py: the baselines
    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        gpt, ngpt = s.model_type == "gpt", s.model_type == "ngpt"
        padded = -(-vocab_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
        longest = max(s.seq_len, s.eval_seq_len)
        self.bf16, self.window = s.dtype == "bf16", s.window or longest
        self.embed = nn.Embedding(padded, s.width)
        self.positions = nn.Embedding(s.max_doc_len, s.width) if gpt else None
        self.blocks = nn.ModuleList(TransformerLayer(s, i) for i in range(s.num_layers))
        self.norm = make_norm(s)
        self.lm_head = nn.Linear(s.width, padded, bias=False)
        if s.tied == "on":
            self.lm_head.weight = self.embed.weight
        self.logit_scale = nn.Parameter(torch.full((padded,), s.width**-0.5)) if ngpt else None
        for name, table in zip(("cos", "sin"), rotary_table(longest, s.head_dim, s.rope_base), strict=True):
            self.register_buffer(name, table, persistent=False)
        initialize(self, s)

    # differs from train_gpt.py: load-balancing loss
    def forward(self, inputs_BT, targets_BT, docs_BT) -> tuple:
        """Cross-entropy in nats, load-balancing loss times tokens: sums over all targets, layers."""
        with torch.autocast(inputs_BT.device.type, torch.bfloat16, enabled=self.bf16):
            logits_BTV = self.head(self.trunk(inputs_BT, docs_BT, self.window))
        logits_NV, targets_N = logits_BTV.flatten(0, 1).float(), targets_BT.flatten().long()
        loss = F.cross_entropy(logits_NV, targets_N, reduction="sum", ignore_index=IGNORE)
        balances = [block.mlp.balance for block in self.blocks if hasattr(block.mlp, "router")]
        return loss, sum(balances, torch.zeros_like(loss))

    # differs from train_gpt.py: the baselines
    def trunk(self, inputs_BT, docs_BT, window: Tensor | int) -> Tensor:
        """Residual stream after the last layer, (B, T, D). Document numbers rise along a row."""
        x = self.embed(inputs_BT)
        place_BT = document_positions(docs_BT)
        if self.positions is not None:
            x, angles = x + self.positions(place_BT), None
        else:
            # by document: ngpt scales after rotating, so q.k depends on more than the distance
            angles = self.cos[place_BT], self.sin[place_BT]
        mask = attention_mask(docs_BT, window)
        for block in self.blocks:
            x = block(x, mask, angles)
        return x

    # differs from train_gpt.py: no cap, a learned scale
    def head(self, x_BTD) -> Tensor:
        """Logits."""
        z = self.lm_head(self.norm(x_BTD))
        return z if self.logit_scale is None else z * (self.logit_scale * x_BTD.size(-1) ** 0.5)

@torch.no_grad()
def initialize(model: GPT, s: Settings):
    """GPT-2's initial weights: of residual projections smaller by the root of their number."""
    torch.manual_seed(s.seed)
    for name, p in model.named_parameters():
        if p.dim() > 1:
            std = s.width**-0.5 if s.model_type == "ngpt" else 0.02
            residual = name.endswith(RESIDUAL)  # drawn transposed since the first version
            std *= (2 * s.num_layers) ** -0.5 if residual else 1.0
            p.copy_((torch.randn(p.shape[::-1]).T if residual else torch.randn(p.shape)) * std)
        elif name.endswith("bias"):
            p.zero_()
    normalize_rows(model, s)

@torch.no_grad()
def normalize_rows(model: GPT, s: Settings):
    """ngpt's constraint: all vectors of model_dim that matrices consist of have norm 1."""
    for name, p in model.named_parameters():
        if s.model_type == "ngpt" and p.dim() > 1:
            p.copy_(unit(p.T).T if name.endswith(RESIDUAL) else unit(p))

# ==================== Optimizer and schedule ==================================================

def make_optimizers(model: GPT, s: Settings) -> list[torch.optim.Optimizer]:
    """AdamW, without decay of vectors; before it Muon (Jordan et al. 2024) for hidden matrices."""
    hidden, others, vectors = [], [], []
    for name, p in model.named_parameters():
        inner = name.startswith("blocks") and not name.endswith("router")
        group = hidden if s.optimizer == "muon" and inner else others
        (group if p.dim() > 1 else vectors).append(p)
    decay = 0.0 if s.model_type == "ngpt" else s.weight_decay  # ngpt's weights have norm 1
    groups = [{"params": others, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, s.max_lr, (s.beta1, s.beta2), s.adam_eps, fused=True)
    if not hidden:
        return [adamw]
    return [torch.optim.Muon(hidden, s.muon_lr, weight_decay=s.muon_weight_decay), adamw]

def rate_scale(s: Settings, step: int) -> float:
    """Factor on the rates: warm-up, then half a cosine to min_lr, or constant, then linear."""
    if step < s.warmup_steps:
        return (step + 1) / (s.warmup_steps + 1)
    if s.schedule == "cosine":
        done = (step - s.warmup_steps) / (s.iterations - s.warmup_steps)
        left = (1 + math.cos(math.pi * done)) / 2
    else:
        left = min(1.0, (s.iterations - step) / max(1, s.cooldown * s.iterations))
    floor = s.min_lr / s.max_lr if s.max_lr else 0.0
    return floor + (1 - floor) * left

def set_rates(optimizers: list[torch.optim.Optimizer], s: Settings, step: int):
    """The learning rates of a step, and Muon's momentum, which rises in the first steps."""
    scale = rate_scale(s, step)
    warm = min(1.0, step / max(1, s.momentum_warmup))
    for optimizer in optimizers:
        muon = isinstance(optimizer, torch.optim.Muon)
        for group in optimizer.param_groups:
            group["lr"] = scale * (s.muon_lr if muon else s.max_lr)
            if muon:
                group["momentum"] = s.momentum_start + (s.muon_momentum - s.momentum_start) * warm

# ==================== Training ================================================================
# RUN/checkpoints/step_000500/ holds state.pt (weights by name, optimizers) and meta.json (settings,
# place in the data, clock, sha256 of state.pt). All ranks read it: machines need one log folder.

def own_place() -> tuple[int, int]:
    """Rank of this process, and the number of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

def command_output(*command: str) -> str | None:
    """What a command prints, run in the script's folder; None where it fails or does not exist."""
    options = dict(cwd=Path(__file__).resolve().parent, capture_output=True, text=True, timeout=30)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, **options).stdout.strip()

def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Loss in nats per token -> bits per byte, by the val split's tokens per byte; None if not known."""
    split = meta["splits"].get("val", {})
    known = split.get("bytes") and split.get("tokens")
    return loss / math.log(2) * split["tokens"] / split["bytes"] if known else None

def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

@dataclass
class Progress:
    """How far a run is, and its files, which rank 0 writes."""
    s: Settings
    config: dict  # what config.json and every checkpoint say
    folder: Path
    step: int = 0  # steps done
    train_ms: float = 0.0  # they took, without validation and checkpoints
    logged: tuple[int, float] = (0, 0.0)  # step and train_ms of the last log line
    val_loss: float | None = None
    status: str = "done"  # or interrupted, target; else what is not finite
    signal: int = 0  # that has come

    def catch(self, number: int, frame):
        """A first signal: save and stop, several ranks together. The second one ends at once."""
        signal.signal(number, signal.SIG_DFL)
        self.signal = number

    def print(self, text: str):
        if own_place()[0] == 0:
            print(text, flush=True)

    def write(self, text: str, file: str = "log.txt"):
        """To a file. A full disk costs lines of the logs, not the run."""
        try:
            if own_place()[0] == 0:
                with open(self.folder / file, "a", encoding="utf-8") as opened:
                    opened.write(text + "\n")
        except OSError as error:
            self.print(f"warning: {self.folder / file}: {error.strerror}; training goes on")

    def log(self, kind: str, loss: float, text: str, **values):
        """A train or val loss to all; to log.txt in the form of the public records."""
        step, ms, at = self.step, self.train_ms, f"{self.step}/{self.s.iterations}"
        self.print(f"step {at}  {kind} loss {loss:.4f}  {text}")
        self.write(f"step:{at} {kind}_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
        record = {"step": step, "tokens": step * self.s.batch_tokens, "train_time_ms": ms}
        self.write(json.dumps(record | {f"{kind}_loss": loss} | values), "metrics.jsonl")

def new_run(s: Settings, config: dict) -> Progress:
    """A run with the heads of its files."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    run = Progress(s, config, Path(s.log_dir, s.experiment_name, run_id))
    if own_place()[0] == 0:
        run.folder.mkdir(parents=True)
        (run.folder / "config.json").write_text(json.dumps(config, indent=1))
    run.write(f"{Path(__file__).read_text(encoding='utf-8')}\n{'=' * 100}")
    run.write(f"Running Python {sys.version}")
    run.write(f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}")
    run.write(f"Running on {config['hardware']['name']}")
    run.write(f"Settings: {json.dumps(config['settings'])}\n{'=' * 100}")
    return run

def find_state(place: Path) -> tuple[Path, dict]:
    """The newest intact checkpoint at or in a place, and its meta.json, or FileNotFoundError."""
    found = list(place.rglob("step_*[0-9]"))
    if place.name.startswith("step_"):  # one checkpoint; those before it are its fallback
        found = [path for path in place.parent.glob("step_*[0-9]") if path.name <= place.name]
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            meta = json.loads((path / "meta.json").read_text())
            if file_hash(path / "state.pt") == meta["sha256"]:
                return path, meta
        print(f"checkpoint {path} is damaged; trying the one before it", flush=True)
    raise FileNotFoundError(f"no intact checkpoint in {place}: start without --resume")

def computed(config: dict) -> dict:
    """What a resumed run must have in common with its checkpoint."""
    names = [field.name for field in fields(Settings)]
    same = {name: config["settings"].get(name) for name in names[:names.index("preset")]}
    same["optimizer_state"] = config.get("optimizer_state")
    return same | {"data": config["data"]["fingerprint"]}

def resumed_run(s: Settings, config: dict) -> tuple[Progress, dict]:
    """The run that --resume names, and its state. Raises UserError that names what differs."""
    experiment = Path(s.log_dir, s.experiment_name)
    path, meta = find_state(experiment if s.resume == "latest" else Path(s.resume))
    then = computed(meta)
    differing = [f"{name}: {then[name]} in the checkpoint, {now} now"
                 for name, now in computed(config).items() if then[name] != now]
    if differing:
        text = "\n  ".join(["use them, or start without --resume:", *differing])
        raise UserError(f"{path} has other settings; {text}")
    step, ms = meta["step"], meta["train_time_ms"]
    run = Progress(s, config, path.parent.parent, step, ms, (step, ms), meta["val_loss"])
    run.write(f"resumed after step {step}")
    run.write(json.dumps({"event": "resume", "step": step, "config": config}), "metrics.jsonl")
    run.print(f"resumed {path} after step {step}")
    saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return run, saved | {"place": meta["position"]}

def run_config(s: Settings, hardware: dict, corpus: Corpus) -> dict:
    """What config.json and the checkpoints say of a run."""
    data = {"name": corpus.folder.name, "fingerprint": corpus.fingerprint(), "meta": corpus.meta}
    git = {"commit": command_output("git", "rev-parse", "HEAD"),
           "dirty": bool(command_output("git", "status", "--porcelain", "-uno"))}
    return {
        "settings": asdict(s), "script": Path(__file__).name, "world_size": own_place()[1],
        "git": git, "torch": torch.__version__, "hardware": hardware, "data": data,
        "optimizer_state": "of torch.optim",
    }

# differs from train_gpt.py: plain
def train(s: Settings, hardware: dict) -> int:
    """One run, from its settings to its exit code. Every process does the same."""
    size = own_place()[1]
    corpus = open_corpus(s.data)
    stream = ValStream(corpus, s.eval_tokens, s.eval_seq_len)
    config = run_config(s, hardware, corpus)
    run, saved = resumed_run(s, config) if s.resume else (new_run(s, config), {})
    training = training_rows(s, corpus, **saved.get("place", {}))
    model = GPT(s, corpus.meta["vocab_size"]).to(s.device)
    optimizers = make_optimizers(model, s)
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
    compiled = torch.compile(model, dynamic=False) if s.compile else model
    trained = DistributedDataParallel(compiled) if size > 1 else compiled
    counts = {name: p.numel() for name, p in model.named_parameters()}
    total = sum(counts.values())
    expert = sum(n for name, n in counts.items() if ".experts." in name) // s.num_experts
    active = total - expert * (s.num_experts - s.top_k)
    run.print(f"{s.model_type}: {total:,} parameters, {active:,} of them for a token; {s.device}, "
              f"{s.dtype}, preset {s.preset}, data {s.data}\nrun folder: {run.folder}")
    share = s.batch_tokens // s.seq_len // size
    rows = max(n for n in range(1, share + 1) if share % n == 0 and n * s.seq_len <= s.micro_tokens)
    # Untimed: compiles, and orders DistributedDataParallel's buckets as a resumed run has them.
    sum(trained(*torch.zeros(3, rows, s.seq_len, dtype=torch.int32, device=s.device))).backward()
    model.zero_grad()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.catch)
    began = time.perf_counter()
    while run.step < s.iterations and run.status == "done":
        set_rates(optimizers, s, run.step)
        batch, place = next_batch(training, s)
        step_loss = torch.zeros((), device=s.device)
        for i, (inputs, targets, docs) in enumerate(batch.split(rows, dim=1)):
            alone = size == 1 or (i + 1) * rows == share
            with contextlib.nullcontext() if alone else trained.no_sync():
                loss, balance = trained(inputs, targets, docs)
                mean = (loss + s.balance * balance) / s.batch_tokens
                (mean * size).backward()  # the gradients of the processes are averaged
            step_loss += loss.detach() / s.batch_tokens
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        normalize_rows(model, s)
        run.step += 1
        last = run.step == s.iterations
        save = s.save_every and run.step % s.save_every == 0
        evaluate = last or s.eval_every and run.step % s.eval_every == 0
        if evaluate or save or run.signal and size == 1 or run.step % s.log_every == 0:
            report(run, step_loss, norm.item(), began)
            if evaluate and run.status in ("done", "interrupted"):
                validate(run, compiled, stream)
            if save and not last and run.status == "done":
                save_checkpoint(run, model, optimizers, place)
            began = time.perf_counter()
    if run.status == "interrupted" or s.save_last and run.status in ("done", "target"):
        save_checkpoint(run, model, optimizers, place)
    return finish(run, total, active)

def report(run: Progress, step_loss: Tensor, norm: float, began: float):
    """Logs the last step; ends a run that got a signal or is not finite. Collective."""
    s, step, (step_before, ms_before) = run.s, run.step, run.logged
    numbers = torch.stack((step_loss, torch.full_like(step_loss, run.signal)))
    if dist.is_initialized():
        dist.all_reduce(numbers)
    loss, stop = numbers.tolist()
    run.train_ms += 1000 * (time.perf_counter() - began)
    if not math.isfinite(loss + norm):
        run.status = f"the loss of step {step} is {loss}, the norm of its gradient {norm}"
        return
    if stop and step < s.iterations:
        run.status = "interrupted"
    step_ms = (run.train_ms - ms_before) / (step - step_before)
    speed = 1000 * s.batch_tokens / step_ms
    run.log("train", loss, f"{step_ms:.1f} ms/step  {speed:,.0f} tokens/s", step_ms=step_ms,
            tokens_per_s=speed, lr=rate_scale(s, step - 1), grad_norm=norm,
            seq_len=s.seq_len, window=s.window, batch_tokens=s.batch_tokens)
    run.logged = step, run.train_ms

@torch.no_grad()
def validate(run: Progress, model: nn.Module, stream: ValStream):
    """The mean loss of the validation stream in nats per token, logged. Collective."""
    s, (rank, size) = run.s, own_place()
    rows = max(1, min(s.micro_tokens // stream.seq_len, -(-stream.num_rows // size)))
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for start in range(rank * rows, stream.num_rows + rank * rows, rows * size):
        total += model(*torch.from_numpy(stream.rows(start, rows)).to(s.device))[0]
    if size > 1:
        dist.all_reduce(total)
    loss = total.item() / stream.num_tokens
    if not math.isfinite(loss):
        run.status = f"the validation loss after step {run.step} is {loss}"
        return
    run.val_loss, bpb = loss, bits_per_byte(loss, run.config["data"]["meta"])
    run.log("val", loss, f"{bpb:.4f} bits per byte" if bpb else "nats per token", val_bpb=bpb)
    if s.target_loss and loss <= s.target_loss:
        run.status = "target"

def save_checkpoint(run: Progress, model: GPT, optimizers: list, place: dict):
    """Writes a checkpoint on rank 0. A full disk is a warning, but at the end of the run an error."""
    if own_place()[0]:
        return
    final = run.folder / "checkpoints" / f"step_{run.step:06d}"
    part = final.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizers": [o.state_dict() for o in optimizers]}
    meta = {"step": run.step, "train_time_ms": run.train_ms, "val_loss": run.val_loss}
    try:
        part.mkdir(parents=True, exist_ok=True)
        torch.save(state, part / "state.pt")
        with open(part / "state.pt", "rb+") as file:
            os.fsync(file)
        meta |= run.config | {"position": place, "sha256": file_hash(part / "state.pt")}
        (part / "meta.json").write_text(json.dumps(meta, indent=1))
        shutil.rmtree(final, ignore_errors=True)  # there if a run was resumed from an earlier one
        os.replace(part, final)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(part, ignore_errors=True)
        text = f"could not write {final}: {str(error).splitlines()[0]}; free some space, earlier ones are intact"
        if run.status != "done" or run.step == run.s.iterations:
            raise UserError(text) from error
        return run.print(f"warning: {text}; training goes on")
    run.print(f"checkpoint {final}")
    others = sorted(final.parent.glob("step_*[0-9]"), key=os.path.getmtime)
    for old in others[:-run.s.keep]:
        shutil.rmtree(old, ignore_errors=True)

def finish(run: Progress, total: int, active: int) -> int:
    """The end of the logs, and the exit code, SIGTERM's if another rank got a signal; or UserError."""
    s, ms, step, reached = run.s, run.train_ms, run.step, run.status == "target"
    wrong = run.status not in ("done", "interrupted", "target")
    bpb = run.val_loss and bits_per_byte(run.val_loss, run.config["data"]["meta"])
    end = {
        "event": "end", "status": "nan" if wrong else run.status, "step": step,
        "iterations": s.iterations, "train_time_ms": ms, "val_loss": run.val_loss, "val_bpb": bpb,
        "tokens_per_s": 1000 * step * s.batch_tokens / ms, "params_total": total,
        "params_active": active, "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20 or None,
        "target_step": step if reached else None, "target_time_ms": ms if reached else None,
    }
    run.write(json.dumps(end), "metrics.jsonl")
    if wrong:
        raise UserError(f"{run.status}; lower --max-lr and --muon-lr. Checkpoints: {run.folder}")
    if reached:
        run.print(f"target loss {s.target_loss} reached: step {step}, {ms / 1000:.2f} s")
    return 128 + (run.signal or signal.SIGTERM) if run.status == "interrupted" else 0

# differs from train_gpt.py: plain
def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. A sentence, not a traceback, for what the user can repair."""
    code, local_rank = 1, int(os.environ.get("LOCAL_RANK", 0))
    try:
        s, hardware = parse_settings(argv, int(os.environ.get("WORLD_SIZE", 1)))
        torch.set_num_threads(s.threads or torch.get_num_threads())
        if s.device == "cuda":
            torch.cuda.set_device(local_rank)
        if "RANK" in os.environ:
            dist.init_process_group("nccl" if s.device == "cuda" else "gloo")
        code = train(s, hardware)
    except torch.OutOfMemoryError as error:
        print(f"error: {error}; use a smaller --micro-tokens", file=sys.stderr)
    except (UserError, OSError) as error:
        if local_rank == 0:  # what is wrong everywhere is said once a machine
            print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    finally:
        # after an error NCCL might wait here for ranks that are elsewhere
        if dist.is_initialized() and (code == 0 or dist.get_backend() == "gloo"):
            dist.destroy_process_group()
    return code

if __name__ == "__main__":
    sys.exit(main())
