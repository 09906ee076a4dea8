"""Train what the speedrun is measured against, as plainly as nanoGPT does.

    python train_baseline.py                                    # GPT-2, on whatever is there
    python train_baseline.py --model-type moderngpt --num-kv-heads 2     # as Llama
    torchrun --standalone --nproc_per_node=8 train_baseline.py --preset gpt2    # nanoGPT's 124M

The control of train_gpt.py: its data, batches, validation, checkpoints and logs, but torch.optim's AdamW
and Muon, autocast and DistributedDataParallel. Not yet measured on a GPU. gpt: nanoGPT's GPT-2 (Radford
et al. 2019). moderngpt: RMSNorm, RoPE, no biases, gated MLP, as in Llama. ngpt: Loshchilov et al. 2024,
arXiv 2410.01131. moegpt: moderngpt with DeepSeekMoE's layers (Dai et al. 2024, arXiv 2401.06066).
Shape suffixes: B rows, T tokens of a row, N = B * T, D model_dim, H heads, K key dim of a head or, of
routing, choices of a token, E experts of a layer, V vocabulary. Documents never see each other.
"""
from __future__ import annotations

import gc
import signal

if __name__ == "__main__":
    gc.disable()  # imports leave nothing to collect (0.3 s)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import argparse
import contextlib
import ctypes
import difflib
import errno
import functools
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
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
    """What is computed (and stays in a resumed run, but for --allow-change), and from `preset` on how and where."""
    seed: int = 0  # of initial weights and order of data [>=0]
    shuffle: bool = True  # the documents of a shard
    long_docs: str = "split"  # what is past max_doc_len: pieces, or skipped [split|clip]
    # --- model
    model_type: str = "gpt"  # architecture [gpt|moderngpt|ngpt|moegpt]
    num_layers: int = 12  # transformer layers [>0]
    width: int = 768  # model_dim [>0]
    head_dim: int = 64  # num_heads = width / head_dim [>0]
    num_kv_heads: int = 0  # 0: num_heads [>=0; with model_type moderngpt|moegpt]
    mlp: str = "auto"  # auto: by model [auto|gelu|relu2|swiglu|geglu]
    mlp_ratio: float = 4.0  # hidden size / width; a gated MLP has 2/3 of it [>0]
    tied: str = "auto"  # head = embedding [auto|on|off; with model_type gpt|moderngpt|moegpt]
    norm_gain: bool = True  # gains in RMSNorm [with model_type moderngpt|moegpt]
    qk_norm: bool = False  # RMSNorm of queries, keys [with model_type moderngpt|moegpt]
    rope_base: float = 1e4  # of RoPE [>0; with model_type moderngpt|ngpt|moegpt]
    window: int = 0  # tokens that a query sees; 0: its document [>=0]
    num_experts: int = 16  # routed experts of a mixture layer [>0; with model_type moegpt]
    top_k: int = 4  # of them for each token [>0; with model_type moegpt]
    num_shared: int = 2  # of every token [>=0; with model_type moegpt]
    expert_hidden: int = 0  # 0: like an MLP [>=0; with model_type moegpt]
    dense_first: int = 1  # first layers that keep a dense MLP [>=0; with model_type moegpt]
    balance: float = 0.01  # weight of the load-balancing loss [>=0; with model_type moegpt]
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
    weight_decay: float = 0.1  # of AdamW / its rate [>=0; with model_type gpt|moderngpt|moegpt]
    grad_clip: float = 1.0  # largest norm of all gradients; 0: no limit [>=0]
    muon_lr: float = 0.02  # Muon's learning rate [>=0; with optimizer muon]
    muon_momentum: float = 0.95  # Nesterov's after its warm-up [0..1; with optimizer muon]
    momentum_start: float = 0.85  # momentum at step 0 [0..1; with optimizer muon]
    momentum_warmup: int = 300  # steps over which it rises [>=0; with optimizer muon]
    muon_weight_decay: float = 0.0  # Muon's decay / rate [>=0; with optimizer muon]
    schedule: str = "cosine"  # constant, then linear: wsd [cosine|wsd]
    warmup_steps: int = 100  # rates rise; not given: at most iterations / 10 [>=0]
    cooldown: float = 0.4  # last share of the steps: rates fall [0..1; with schedule wsd]

    # --- how and where it runs
    preset: str = "auto"  # settings that flags override
    experiment_name: str = "train_baseline"  # its runs: LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    resume: str = ""  # from the newest checkpoint (latest), this run or checkpoint
    allow_change: str = ""  # with --resume: settings that may differ, as max_lr,iterations
    data: str = "auto"  # data set: the name of a folder under data/, or a path
    eval_every: int = 250  # steps between validations; 0: only after the last step [>=0]
    eval_tokens: int = 10485760  # first tokens of the validation split; 0: all [>=0]
    eval_seq_len: int = 0  # longest context in validation; 0: as trained [>=0]
    target_loss: float = 0.0  # stop at this validation loss, nats; 0 off [>=0]
    max_seconds: float = 0.0  # stretch the schedule to this training time; 0: iterations [>=0]
    save_every: int = 0  # steps between checkpoints; 0: at the end and on signals [>=0]
    save_last: bool = True  # a checkpoint after the last step
    save_best: bool = False  # a checkpoint at each best validation; ckpt_best names the last
    keep: int = 0  # checkpoints that a run keeps; 0: 2, or what the run had [>=0]
    log_every: int = 10  # steps between console lines [>0]
    tracker: str = "none"  # gets the metrics, too [none|wandb|tensorboard|trackio]
    device: str = "auto"  # mps, Apple's GPU, is untested [auto|cpu|cuda|mps]
    dtype: str = "auto"  # auto: bf16 where it is fast [auto|bf16|fp32]
    backend: str = "auto"  # the formula is fast in bf16 on a CPU [auto|sdpa|plain]
    compile: bool = True  # torch.compile of the model
    micro_tokens: int = 16384  # most tokens of a forward pass [>0]
    threads: int = 0  # CPU threads; 0: torch's choice [>=0]

    @property
    def mlp_hidden(self) -> int:
        size = min(self.mlp_ratio * self.width, 2.0**60)
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
# other names of settings: nanoGPT's, llm.c's, and DeepSeekMoE's in build-nano-moe
ALIASES = {
    "iterations": ("max_steps", "max_iters"), "batch_tokens": ("total_batch_size",), "seq_len": ("T",),
    "eval_every": ("eval_interval",), "data": ("dataset",), "num_experts": ("n_experts",),
    "num_shared": ("n_shared_experts",), "top_k": ("n_activated_experts",)}

class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback."""

class TrainingStopped(RuntimeError):
    """Training cannot go on (NaN, no space for the last checkpoint); what was saved stays usable."""

class NothingToDo(Exception):
    """The run that --resume names is over."""

# differs from train_gpt.py: one class
@functools.cache
def help_texts() -> dict[str, str]:
    """The comments of the fields of Settings, read from the source, by name."""
    texts = dict(re.findall(r"\n    (\w+): \w+ = .+?  # (.+)", inspect.getsource(Settings)))
    return texts | {"preset": f"{texts['preset']} [auto|{'|'.join(PRESETS)}]"}

def bracket(name: str) -> list[str]:
    """The parts of the bracket that ends a comment: allowed values, `per stage`, `with ..`."""
    found = re.search(r"\[([^\]]+)\]$", help_texts()[name])
    return found[1].split("; ") if found else []

def whole(text: str) -> int:
    """A whole number, also as 1e6 or 1_000_000; 0 for auto."""
    text = "0" if text == "auto" else text
    number = float(text)
    return int(number) if "e" in text.lower() and number.is_integer() else int(text)

whole.__name__ = "int"  # for argparse's "invalid .. value"

# differs from train_gpt.py: plain
def build_parser() -> argparse.ArgumentParser:
    """A flag per field of Settings, with dashes or underscores, and the ALIASES."""
    text, kinds = __doc__.split("\n\n")[0], {"int": whole, "float": float, "str": str}
    parser = argparse.ArgumentParser(usage="%(prog)s [flags]", description=text, allow_abbrev=False)
    for field in fields(Settings):
        names = field.name, *ALIASES.get(field.name, ())
        flags = [f"--{s}" for name in names for s in (name.replace("_", "-"), name)]
        option = {"type": kinds.get(field.type), "metavar": "X"}
        if field.type == "bool":
            option = {"action": argparse.BooleanOptionalAction}
        if field.name == "resume":
            option |= {"nargs": "?", "const": "latest"}
        text = f"{help_texts()[field.name]} (default: {field.default})"
        option |= {"dest": field.name, "default": argparse.SUPPRESS, "help": text}
        parser.add_argument(*dict.fromkeys(flags), **option)
    option = dict(type=whole, metavar="X", default=argparse.SUPPRESS, help="in place of iterations")
    parser.add_argument("--num-tokens", "--num_tokens", **option)
    return parser

def machine_memory() -> float:
    """GiB of this machine, 2^20 where the system does not say (Windows)."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return 2.0**20

def find_device(device: str) -> dict:
    """Device (cuda, mps if asked for, or cpu), its name and memory, and whether it is fast in bf16."""
    if device == "mps" and torch.backends.mps.is_available():
        return {"device": "mps", "name": platform.machine(), "memory_gib": machine_memory(), "bf16": False}
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        memory = gpu.total_memory / 2**30
        return {"device": "cuda", "name": gpu.name, "memory_gib": memory, "bf16": gpu.major >= 8}
    name = platform.machine()
    with contextlib.suppress(OSError, TypeError):
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    memory = machine_memory()
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return {"device": "cpu", "name": name, "memory_gib": memory, "bf16": fast}

# differs from train_gpt.py: other settings
def parse_settings(argv: list[str] | None, world_size: int) -> tuple:
    """Settings without `auto`, the hardware, a line about them, list[str]. Raises UserError with all faults."""
    parser = build_parser()
    known, unknown = parser.parse_known_args(argv)
    given = vars(known)
    if [] in given.values():  # what argparse makes of --max-lr=--
        raise UserError("a flag is given -- as its value")
    hardware = find_device(given.get("device", "auto"))
    preset = given.get("preset", "auto")
    if preset == "auto":
        wide = world_size >= 8 and data_folder(given.get("data", "fineweb10B")).is_dir()
        preset = "cpu" if hardware["device"] != "cuda" else "gpt2" if wide else "gpu"
    tokens = given.pop("num_tokens", None)
    s = Settings(**PRESETS.get(preset, {}) | given | {"preset": preset})
    s = s if tokens is None else replace(s, iterations=-(-tokens // max(1, s.batch_tokens)))
    problems = size_errors(s) or field_errors(s)
    problems += ["--num_tokens, --iterations: give one"] * (tokens is not None and "iterations" in given)
    unread = {name: unread_without(s, name) for name in given}
    problems += [f"--{name}: has no effect without {other}" for name, other in unread.items() if other]
    for flag in [word for word in unknown if word.startswith("-")] or unknown:
        close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags"
        problems.append(f"{flag}: unknown, {hint}")
    if not problems:
        s = resolved(s, given, hardware)
        problems = misfits(s, given, hardware, world_size)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    return s, hardware, [f"preset {preset}: {s.device}, {s.dtype}, data {s.data}"]

def resolved(s: Settings, given: dict, hardware: dict) -> Settings:
    """The settings with every `auto`, and every 0 that stands for another value, replaced."""
    gpt, device = s.model_type == "gpt", hardware["device"]
    dtype = s.dtype if s.dtype != "auto" else "bf16" if hardware["bf16"] else "fp32"
    autos = {
        "mlp": "gelu" if gpt else "swiglu", "tied": "on" if gpt else "off",
        "backend": "plain" if (device, dtype) == ("cpu", "bf16") or device == "mps" else "sdpa",
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

def field_errors(s: Settings) -> list[str]:
    """A sentence for each field whose value is outside the bracket of its comment."""
    def allowed(value, spec: str) -> bool:
        if spec in (">0", ">=0"):
            return 0 < value < math.inf or (spec == ">=0" and value == 0)
        return 0 <= value <= 1 if spec == "0..1" else value in spec.split("|")

    bad = []
    for name in help_texts():
        value, spec = getattr(s, name), "".join(bracket(name)[:1])
        values = value if isinstance(value, tuple) else (value,)
        if re.match(r">|0\.\.1|\w+\|", spec) and not all(allowed(v, spec) for v in values):
            bad.append(f"--{name} {value}: must be {spec.replace('|', ' or ').replace('..', ' to ')}")
    if not re.fullmatch(r"\w[\w.+-]*", s.experiment_name):
        bad.append(f"--experiment_name {s.experiment_name!r}: use letters, digits and . _ + - only")
    return bad

def size_errors(s: Settings) -> list[str]:
    """A sentence for each integer that is too large to be tried."""
    most, bad = {"seed": 2**63, "num_layers": 2**11, "threads": 2**12}, []
    for name in help_texts():
        value, limit = getattr(s, name), most.get(name, 2**31)
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) is int and number >= limit:
                bad.append(f"--{name} {min(number, 10**99):.6g}: must be below {limit}")
    return bad

def unread_without(s: Settings, name: str) -> str:
    """The setting without which nothing reads this one, if it is not set so; else nothing."""
    conditions = [part.split() for part in bracket(name) if part.startswith("with ")]
    for _, other, *values in conditions:
        value = getattr(s, other)
        if value in values[0].split("|") if values else value:
            return unread_without(s, other)
        return " ".join([f"--{other}", *values]).replace("|", " or ")
    return ""

@functools.cache
def divisors(count: int) -> list[int]:
    """All divisors of a number, sorted."""
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})

def least_memory(s: Settings) -> float:
    """Bytes that a process needs at least: weights, gradients, moments, activations and mask of a row, a batch."""
    length, mixtures = max(s.seq_len, s.eval_seq_len), len(s.mixture_layers)
    experts = mixtures * s.num_experts * 2 * s.expert_hidden
    dense = 2 * s.num_layers * s.width + 2 * (s.num_layers - mixtures) * s.mlp_hidden
    activations = 2 * s.num_layers * s.seq_len * s.width
    return 16 * s.width * (dense + experts) + activations + length**2 + 12 * s.batch_tokens

def misfits(s: Settings, given: dict, hardware: dict, world_size: int) -> list[str]:
    """A sentence for each setting that does not fit the machine, another one, or world_size."""
    rows, heads = s.batch_tokens // s.seq_len, s.width // s.head_dim
    asked, cpu, kind = given.get("device"), s.device == "cpu", s.model_type
    compiler = not cpu or shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    fits = ", ".join(map(str, divisors(rows)[:12])) if rows else ""
    empty = ", ".join(f"--{name}" for name in ("resume", "data", "log_dir") if given.get(name) == "")
    strange = {*allowed_changes(s)} - {*help_texts(), "", "data_fingerprint"}
    least, memory = least_memory(s) / 2**30, hardware["memory_gib"]
    tracked = s.tracker == "none" or importlib.util.find_spec("trackers")
    checks = {  # sentence about the settings in quotes -> whether it is true
        "--device cuda needs a CUDA device, leave it out": cpu and asked == "cuda",
        "--device mps needs an Apple GPU, leave it out": asked == "mps" and s.device != "mps",
        "--device mps: torch.compile is not for it, add --no-compile": s.device == "mps" and s.compile,
        "'preset' needs a CUDA device: use cpu, or add --device cpu":
            cpu and s.preset != "cpu" and asked != "cpu",
        "'compile' needs a C++ compiler: install g++, or use --no-compile": s.compile and not compiler,
        f"{empty}: is empty; name something, or leave it out": empty,
        f"--tracker {s.tracker}: trackers.py is not beside it": not tracked,
        "--allow_change: has no effect without --resume": s.allow_change and not s.resume,
        f"--allow_change: {', '.join(sorted(strange))}: no such setting": strange,
        f"this needs more than {least:,.0f} GiB, {hardware['name']} has {memory:.1f}: lower 'width', "
        "'num_layers', 'mlp_ratio', 'num_experts', 'expert_hidden', 'seq_len', 'eval_seq_len' or 'batch_tokens'":
            least > memory,
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
        "'num_experts' must be below 4096": s.num_experts >= 4096,
        "'min_lr' must be at most 'max_lr'": s.min_lr > s.max_lr,
        "'beta1', 'beta2', 'muon_momentum' must be below 1": 1 in (s.beta1, s.beta2, s.muon_momentum),
        "'warmup_steps' must be below 'iterations'": s.warmup_steps >= s.iterations,
        "'micro_tokens' must be at least 'seq_len'": s.micro_tokens < s.seq_len,
        "'batch_tokens' must be a multiple of 'seq_len'": s.batch_tokens % s.seq_len or not rows,
        f"{world_size} processes cannot share the {rows} rows of a step ('batch_tokens' / "
        f"'seq_len'): use {fits} processes": rows % world_size,
    }
    return [re.sub(r"'(\w+)'", lambda name: f"--{name[1]} {getattr(s, name[1])}", sentence)
            for sentence, wrong in checks.items() if wrong]

def allowed_changes(s: Settings) -> list[str]:
    return s.allow_change.replace("-", "_").split(",")

# ==================== Files ===================================================================

def printable(text: str) -> str:
    """A text whose control characters, which would drive a terminal, are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)

def misfit(value, like, name: str) -> str:
    """The first thing in which a value is not built like another, in words; nothing if it is. Dicts have all its keys,
    tensors its shape and kind; numbers are finite and not negative; a tuple is a choice."""
    if isinstance(like, tuple):
        return min((misfit(value, one, name) for one in like), key=len)
    if isinstance(like, dict) and isinstance(value, dict):
        parts = (misfit(value.get(key), part, f"{name}: {key}") for key, part in like.items())
        return next(filter(None, parts), "")
    if isinstance(like, Tensor) and isinstance(value, Tensor):
        is_, not_ = ((tuple(x.shape), x.dtype, x.layout) for x in (value, like))
        return "" if is_ == not_ and not value.is_meta else f"{name} is {is_}, not {not_}"
    fits = type(value) is type(like) and (type(like) is not int or 0 <= value < 2**63)
    if isinstance(like, float):
        fits = type(value) in (int, float) and 0 <= value < 1e15
    kinds = {int: "a whole number", float: "a number", str: "a text", dict: "an object"}
    kind, shown = kinds.get(type(like), type(like).__name__), " ".join(repr(value).split())
    return "" if fits else f"{name} is {shown:.60}, not {kind}"

def read_json(path: Path, like: dict) -> dict:
    """The object in a JSON file. Raises ValueError that says how it is not built like another."""
    if not path.is_file() or path.stat().st_size > 2**28:
        raise ValueError(f"{path.name} is no file of some lines" if path.exists() else "there is none")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name}: {error!r:.200}") from error
    if wrong := misfit(value, like, path.name):
        raise ValueError(wrong)
    return value

def sync(path: Path):
    """Waits until a file, or the names in a folder, are on the disk; some systems cannot do the latter."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP, errno.EACCES)):
            raise

def write_json(path: Path, value: dict):
    """A JSON file, on the disk, in place of the old one at once."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror}") from error

def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

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
    """The command that makes a data set again: what its meta.json says, or by its name."""
    with contextlib.suppress(ValueError):
        return printable(read_json(folder / "meta.json", {"made_with": ""})["made_with"])
    if folder.name.startswith("fineweb"):
        return "python data/cached_fineweb.py 9"
    if folder.name in ("stdlib", "shakespeare_char"):
        return f"python data/{folder.name}.py"
    return f"python data/fineweb.py --input YOUR_TEXT --out {folder}"

def shard_length(path: Path) -> int:
    """Tokens of a shard, by its header. Raises UserError if it or the file's length is wrong."""
    redo = f"make it again with {repair_command(path.parent)}"
    if not path.is_file():
        raise UserError(f"{path} is no file; {redo}")
    header = np.fromfile(path, dtype="<i4", count=256)
    if len(header) < 256 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        found = f"magic {header[0]}, version {header[1]}" if len(header) == 256 else "a truncated header"
        raise UserError(f"{path} is no token shard: {found}, expected {SHARD_MAGIC} and {SHARD_VERSION}; {redo}")
    count, size = int(header[2]), path.stat().st_size
    said = HEADER_BYTES + 2 * count
    if count < 1 or size != said:
        raise UserError(f"{path} is damaged: {size} bytes, {said} by its header; {redo}")
    return count

def open_shard(path: Path, vocab_size: int, most: int | None = None) -> np.ndarray:
    """The (first) tokens of a shard, in memory. Raises UserError as shard_length, or for an id past the vocabulary."""
    count = min(shard_length(path), most or math.inf)
    tokens = np.fromfile(path, dtype="<u2", count=count, offset=HEADER_BYTES)
    if len(tokens) < count:
        raise UserError(f"{path} became shorter while it was read")
    if (top := int(tokens.max())) >= vocab_size:
        raise UserError(f"{path} holds token id {top}, the vocabulary has {vocab_size}; make it again with "
                        f"{repair_command(path.parent)}")
    return tokens

class Corpus(NamedTuple):
    """A data set: its meta.json and the paths of its shards."""
    folder: Path
    meta: dict
    train: list[Path]
    val: list[Path]

    def fingerprint(self) -> str:
        """Hash of all shards, and of what their tokens mean: equal data, equal fingerprint."""
        digest = hashlib.sha256(f"{self.meta['vocab_size']} {self.meta['eot']}".encode())
        for path, hashed in shard_hashes(self.folder, self.train + self.val).items():
            digest.update(f"{path.name} {hashed}".encode())
        return digest.hexdigest()[:16]

def shard_hashes(folder: Path, paths: list[Path]) -> dict[Path, str]:
    """sha256 of whole files. A hidden file there keeps those of unchanged size, time and inode."""
    cache, hashes, known = folder / ".hashes.json", {}, {}
    with contextlib.suppress(ValueError, OSError):  # not there, or cut short
        known = read_json(cache, {})
    for path in paths:
        stat, found = path.stat(), known.get(path.name)
        state = [stat.st_size, stat.st_mtime_ns, stat.st_ino]
        if not isinstance(found, list) or found[:-1] != state:
            known[path.name] = [*state, file_hash(path)]
            with contextlib.suppress(OSError):  # of a read-only folder all are hashed each time
                write_json(cache, known)
        hashes[path] = known[path.name][-1]
    return hashes

DATA_META = {
    "vocab_size": 0, "eot": (None, 0), "tokenizer": {"kind": ""}, "name": (None, ""),
    "splits": dict.fromkeys(("train", "val"), (None, {"tokens": (None, 0), "bytes": (None, 0)}))}

def read_data_meta(folder: Path, shards: list[Path]) -> dict:
    """meta.json of a data set; only published FineWeb shards, by their names, may lack it. Raises UserError."""
    path, repair = folder / "meta.json", repair_command(folder)
    published = all(re.match(r"fineweb(edu)?_(train|val)_\d{6}\.bin", shard.name) for shard in shards)
    if not path.exists() and published and folder.name.startswith("fineweb"):
        return GPT2_META
    try:
        meta = read_json(path, DATA_META)
        if "eot" not in meta:
            raise ValueError("eot, the end-of-text token or null, is missing")
        size, eot = meta["vocab_size"], meta["eot"]
        if not 0 < size <= 65536 or (eot is not None and eot >= size):
            raise ValueError(f"vocab_size {size}, eot {eot}: 1 to 65536, and below it")
    except ValueError as error:
        raise UserError(f"{path} cannot be read ({error}); make it again with {repair}") from error
    return meta

def open_corpus(name: str) -> Corpus:
    """A data set, checked. Raises FileNotFoundError with the command that makes it, UserError for a damaged one."""
    folder = data_folder(name)
    shards = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
    for split, paths in shards.items():
        if not paths:
            raise FileNotFoundError(f"no {split} shards in {folder}; make them with: {repair_command(folder)}")
    meta = read_data_meta(folder, shards["train"] + shards["val"])
    for split, paths in shards.items():
        said, count = (meta["splits"].get(split) or {}).get("tokens"), sum(map(shard_length, paths))
        if said not in (None, count):
            raise UserError(f"{folder / 'meta.json'} says {said} {split} tokens, the shards hold {count}; "
                            f"make them again with {repair_command(folder)}")
    return Corpus(folder, meta, **shards)

def piece_table(tokens, eot: int | None, max_len: int, clip: bool, offset: int) -> tuple:
    """Start and length of each piece of a shard: documents cut to `max_len` tokens; `clip` keeps first pieces (29). The
    last token is only a target. Without end-of-text it is one document, cut from `offset` on: elsewhere every epoch."""
    last = len(tokens) - 1
    starts = np.array([min(offset, last)]) if eot is None else np.flatnonzero(tokens[:last] == eot)
    if eot is not None and (not len(starts) or starts[0]):
        starts = np.insert(starts, 0, 0)
    lengths = np.diff(np.append(starts, last))
    counts = np.ones_like(starts) if clip else -(-lengths // max_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + within * max_len
    return piece_starts, np.minimum(max_len, np.repeat(starts + lengths, counts) - piece_starts)

def pack_row(starts, lengths, ends, used: int, seq_len: int) -> tuple | None:
    """Starts and lengths of the next row's pieces, and tokens of the shard used up after it; None if too few are
    left. Given: those of all pieces in order, their ends in tokens, and how many tokens are used up before."""
    first = np.searchsorted(ends, used, side="right")
    last = np.searchsorted(ends, used + seq_len)
    if last == len(ends):
        return None
    starts, lengths = starts[first:last + 1].copy(), lengths[first:last + 1].copy()
    starts[0] += used - (ends[first] - lengths[0])  # 0, unless max_doc_len has changed
    lengths[0] = ends[first] - used
    lengths[-1] -= lengths.sum() - seq_len
    return starts, lengths, int(ends[last])

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
        while row := pack_row(starts, lengths, ends, used, s.seq_len):
            *pieces, used = row
            idle = 0
            yield gather_rows(tokens, *pieces), {"epoch": epoch, "shard": shard, "used": used}
        turn, shard = divmod(shard + 1, len(corpus.train))
        epoch, used = epoch + turn, 0
    raise UserError(f"no shard of {corpus.folder} fills a row of {s.seq_len} tokens: lower --seq_len")

def next_batch(rows, s: Settings, world: World) -> tuple[Tensor, dict]:
    """This process's share of the next batch, (3, rows, T) int32, and the place after the batch."""
    taken = [next(rows) for _ in range(s.batch_tokens // s.seq_len)]
    batch = np.stack([row for row, _ in taken], axis=1)
    own = np.split(batch, world.size, axis=1)[world.rank]
    return torch.from_numpy(own).to(s.device), taken[-1][1]

class ValStream:
    """The first N tokens of the val split, each once, cut into rows, where contexts are cut, too. What is predicted
    depends on neither processes nor batch size; a row's documents do not see each other."""
    def __init__(self, corpus: Corpus, num_tokens: int, seq_len: int):
        available = sum(map(shard_length, corpus.val)) - 1
        self.num_tokens, self.seq_len = num_tokens or available, seq_len
        self.eot = corpus.meta["eot"]
        if not 0 < self.num_tokens <= available:
            more = f"make more with {repair_command(corpus.folder)}"
            raise UserError(f"--eval_tokens {num_tokens}: {corpus.folder} has {available} validation "
                            f"tokens; {'use --eval_tokens 0 for all' if available else more}")
        self.num_rows, left, parts = -(-self.num_tokens // seq_len), self.num_tokens + 1, []
        for path in corpus.val:
            if left > 0:
                parts.append(open_shard(path, corpus.meta["vocab_size"], left))
                left -= len(parts[-1])
        self.tokens = np.concatenate(parts)

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

    def forward(self, x_BTD, mask: Tensor | list, angles: tuple | None) -> Tensor:
        q, k, v = (f(x_BTD).unflatten(-1, (-1, self.head_dim)) for f in (self.q, self.k, self.v))
        if self.qk_norm:
            q, k = (F.rms_norm(x, (self.head_dim,), eps=NORM_EPS).type_as(v) for x in (q, k))
        if angles is not None:
            q, k = rope(q, *angles), rope(k, *angles)
        if self.qk_scale is not None:
            scale = (self.qk_scale * x_BTD.size(-1) ** 0.5).view(-1, self.head_dim)
            q, k = ((unit(x) * scale).type_as(v) for x in (q, k))
        k, v = (x.repeat_interleave(self.group, dim=2) for x in (k, v))
        if isinstance(mask, list):  # without a mask a CPU skips the pairs that it would hide
            documents = (x.flatten(0, 1)[None].transpose(1, 2).split(mask, dim=2) for x in (q, k, v))
            options = {"is_causal": True, "scale": self.softmax_scale}
            y = [F.scaled_dot_product_attention(*qkv, **options) for qkv in zip(*documents, strict=True)]
            return self.out(torch.cat([x.transpose(1, 2) for x in y], dim=1).view_as(x_BTD))
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
        self.by_document = False  # train may: its rows have no keys of an earlier call
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
        if self.by_document and window >= docs_BT.size(1):
            starts = F.pad((place_BT == 0).flatten().nonzero()[:, 0], (0, 1), value=docs_BT.numel())
            mask = starts.diff().tolist()  # lengths of all documents
        else:
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
    moments = {p: {"step": torch.zeros((), device=p.device), "exp_avg": torch.zeros_like(p),
                   "exp_avg_sq": torch.zeros_like(p)} for p in (*others, *vectors)}
    adamw.state.update(moments)  # zeros, as torch makes in the first step: a checkpoint is held against them
    if not hidden:
        return [adamw]
    muon = torch.optim.Muon(hidden, s.muon_lr, weight_decay=s.muon_weight_decay)
    muon.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in hidden})
    return [muon, adamw]

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

# ==================== Checkpoints =============================================================
# RUN/checkpoints/step_000500/ holds state.pt (weights by name, optimizers) and meta.json (settings, place in the data,
# clock, order of writing, sha256 of state.pt). Rank 0 reads and writes them. It is written under another name, synced
# to the disk and renamed; only then older ones go. What ends in .tmp, or has no meta.json, counts for nothing. One of
# the same step stays, as .old, until the new one is in its place.

META = {  # a meta.json is built like this one
    "step": 0, "sha256": "", "settings": {}, "train_time_ms": 0.0, "data": {"fingerprint": "", "meta": {}},
    "position": {"epoch": 0, "shard": 0, "used": 0}, "val_loss": (None, 0.0), "val_step": (None, 0),
    "schedule": (None, {"at": 0.0, "left": 0, "tokens": 0}), "best_loss": (None, 0.0), "saved": (None, 0),
    "bytes": (None, 0)}

def tell_damage(path: Path, reason):
    text = f"checkpoint {path} cannot be used ({reason}); trying the one before it"
    print(printable(text), file=sys.stderr)

def read_meta(path: Path) -> dict:
    """meta.json of a checkpoint. Raises ValueError that says what is wrong with it."""
    meta = read_json(path / "meta.json", META)
    meta["saved"] = meta.get("saved") or 0  # earlier versions wrote none
    if meta["saved"] >= 2**62:
        raise ValueError(f"saved is {meta['saved']}, which leaves no larger number")
    return meta

def step_of(path: Path) -> int | None:
    """Step that the name of a checkpoint says; None: it is none."""
    name = re.fullmatch(r"step_(\d+)(\.old)?", path.name)
    return int(name[1]) if name else None

def checkpoints_in(place: Path, depths: tuple = ("", "*/"), tell=tell_damage) -> list[tuple[Path, dict]]:
    """Checkpoints of a run's or experiment's folder, newest first, by `saved` in their meta.json; of one: it, older."""
    place = place.resolve() if place.name == "ckpt_best" else place  # a link
    found, own = [path for up in depths for path in place.glob(up + "checkpoints/step_*")], None
    if place.absolute().parent.name == "checkpoints":
        found, own = list(place.parent.glob("step_*")), step_of(place)
        if own not in map(step_of, found):
            return []
    metas = {}
    for path in found:
        wanted = step_of(path) is not None and (own is None or step_of(path) <= own)
        if wanted and (path / "meta.json").exists():
            try:
                metas[path] = read_meta(path)
            except (ValueError, OSError) as error:
                tell(path, error)
    ages = {path: (step_of(path) == own, meta["saved"], path.parent.parent.name, meta["step"])
            for path, meta in metas.items()}
    return [(path, metas[path]) for path in sorted(metas, key=ages.get, reverse=True)]

def read_state(path: Path, meta: dict) -> dict:
    """What the state.pt of a checkpoint holds. Raises ValueError if it is not what was written."""
    file = path / "state.pt"
    if not is_whole(path, meta) or file_hash(file) != meta["sha256"]:
        raise ValueError("state.pt does not match its sha256")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # what unpickler and zip reader raise has no end
        if isinstance(error, OSError) or out_of_memory(error):
            raise  # says nothing about the checkpoint
        raise ValueError(f"state.pt cannot be read: {repr(error).splitlines()[0]:.200}") from error

def write_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int, damaged=()) -> Path:
    """The checkpoint, on the disk; then all but the newest `keep` and ckpt_best go, damaged ones stay uncounted. Raises
    OSError where it cannot be written; earlier ones stay then, and nothing half-written."""
    final = run_folder / "checkpoints" / f"step_{step:06d}"
    temporary, old = final.with_suffix(".tmp"), final.with_suffix(".old")
    known = checkpoints_in(run_folder, ("",), tell=lambda *_: None)
    try:
        for leftover in final.parent.glob("*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
        sync(temporary / "state.pt")
        written = {"sha256": file_hash(temporary / "state.pt"), "bytes": (temporary / "state.pt").stat().st_size}
        saved = max([time.time_ns(), *(m["saved"] + 1 for _, m in known)])
        write_json(temporary / "meta.json", meta | {"step": step, "saved": saved} | written)
        if final.exists():  # a run went back to an earlier one
            shutil.rmtree(old, ignore_errors=True)
            os.replace(final, old)
        os.replace(temporary, final)
        for folder in final.absolute().parents[:5]:  # up to the one that holds log_dir: all may be new
            sync(folder)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter on a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (str(error) or repr(error)).splitlines()[0]
        raise OSError(f"could not write {final}: {reason}") from error
    kept = {final, *damaged, final.with_name((run_folder / "ckpt_best").resolve().name)}
    others = [path for path, m in known if path not in kept and is_whole(path, m)]
    for path in [old, *others[keep - 1:]]:
        with contextlib.suppress(OSError):
            os.replace(path, path.with_suffix(".tmp"))
        shutil.rmtree(path.with_suffix(".tmp"), ignore_errors=True)
    return final

def is_whole(path: Path, meta: dict) -> bool:
    """Whether the state.pt of a checkpoint is there, by its size."""
    file = path / "state.pt"
    return file.is_file() and meta.get("bytes") in (None, file.stat().st_size)

def resume_place(s: Settings) -> Path:
    """The folder that --resume names."""
    return Path(s.log_dir) / s.experiment_name if s.resume == "latest" else Path(s.resume)

def run_state(model: GPT, optimizers: list) -> dict:
    """All tensors that training changes, in the places that they have in a checkpoint."""
    moments = {i: {"state": x.state_dict()["state"]} for i, x in enumerate(optimizers)}
    return {"model": dict(model.state_dict()), "optimizers": moments}

def empty_like(tree: dict) -> dict:
    """Such tensors on the CPU, where those of a checkpoint are; without values they take no memory."""
    return {key: empty_like(part) if isinstance(part, dict) else torch.empty_like(part, device="cpu")
            for key, part in tree.items()}

def leaves(tree: dict, like: dict) -> list[Tensor]:
    """What a tree has in the places of another one's tensors, in its order."""
    parts = [leaves(tree[key], part) if isinstance(part, dict) else [tree[key]]
             for key, part in like.items()]
    return [leaf for part in parts for leaf in part]

# differs from train_gpt.py: a list of optimizers
def find_checkpoint(place: Path, like: dict, num_shards: float) -> tuple[Path, dict, dict, list]:
    """The newest checkpoint in a place, its meta.json and state; those passed over. Raises FileNotFoundError."""
    found, damaged = checkpoints_in(place), []
    for path, meta in found:
        if path.parent != found[0][0].parent:
            break  # another run's
        try:
            state = read_state(path, meta)
            if isinstance(state, dict) and isinstance(state.get("optimizers"), list):
                state["optimizers"] = dict(enumerate(state["optimizers"]))
            if wrong := misfit(state, like, "state.pt"):
                raise ValueError(wrong)
            check_content(state, leaves(state["optimizers"], like["optimizers"]), meta, num_shards)
            return path, meta, state, damaged
        except ValueError as error:
            damaged.append(path)
            tell_damage(path, error)
    raise FileNotFoundError(f"no whole checkpoint in {place}: start without --resume, or name a run's folder")

# differs from train_gpt.py: torch.optim's state
def check_content(state: dict, moments: list[Tensor], meta: dict, num_shards: float):
    """Raises ValueError for a state that its own meta.json, or the data, contradicts."""
    if {x.item() for x in moments if not x.dim()} != {meta["step"]}:  # AdamW counts them
        raise ValueError("state.pt is of another step")
    if meta["position"]["shard"] >= num_shards:
        raise ValueError("state.pt is of other data")
    if not all(weight.isfinite().all() for weight in state["model"].values()):
        raise ValueError("state.pt has weights that are not finite")

# differs from train_gpt.py: one class of settings
def changed_settings(s: Settings, fingerprint: str, path: Path, meta: dict) -> dict[str, list]:
    """Settings that train, or data, that differ: name -> [then, now]. Raises UserError for those not allowed."""
    names = [field.name for field in fields(Settings)]
    now = {name: getattr(s, name) for name in names[:names.index("preset")]}
    now["data_fingerprint"] = fingerprint
    then = meta["settings"] | {"data_fingerprint": meta["data"]["fingerprint"]}
    changed = {key: [then.get(key), value] for key, value in now.items() if then.get(key) != value}
    if refused := [key for key in changed if key not in allowed_changes(s)]:
        ways = f"use them, start without --resume, or add --allow-change {','.join(refused)}"
        lines = ["{}: {} in the checkpoint, {} now".format(key, *changed[key]) for key in refused]
        raise UserError("\n  ".join([f"{path} has other settings; {ways}:", *lines]))
    return changed

# ==================== Run =====================================================================

def seconds_since_process_start() -> float:
    """Age of this process, imports included; without /proc its CPU time stands in."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.process_time()

def peak_memory_mib(device: str) -> tuple[int, int]:
    """Peak allocated and reserved MiB of the GPU; on a CPU peak resident memory, twice."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
    with contextlib.suppress(ImportError):
        import resource  # not on Windows
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit >> 20,) * 2
    return 0, 0

class Clock:
    """Training time in ms as the public rules count it: without validation, checkpoints, profiles, warm-up."""
    def __init__(self, device: str):
        self.total_ms, self.started = 0.0, None
        self.wait = getattr(torch, device).synchronize

    def start(self):
        self.wait()
        self.started = time.perf_counter()

    def stop(self) -> float:
        self.wait()
        if self.started is not None:
            self.total_ms += 1000 * (time.perf_counter() - self.started)
        self.started = None
        return self.total_ms

    @contextlib.contextmanager
    def paused(self):
        """Time that does not count; the time until then, in ms."""
        running = self.started is not None
        yield self.stop()
        if running:
            self.start()

def keep_memory():
    """glibc maps a tensor above 32 MiB anew at each use, page by page: from here on it keeps what is freed instead."""
    if "MALLOC_MMAP_MAX_" in os.environ:  # the user's choice
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: none
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back

def command_output(*command: str) -> str | None:
    """What a command prints, run in the script's folder; None where it fails or does not exist."""
    options = dict(cwd=Path(__file__).resolve().parent, capture_output=True, text=True, timeout=30)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, check=True, **options).stdout.strip()

def lock_folder(folder: Path):
    """An open file that keeps other processes from this run until this one ends. Raises UserError, with who has it."""
    file = open(folder / "lock", "a+", encoding="utf-8")
    try:
        import fcntl  # not on Windows
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} of {platform.node()}".encode())
    except BlockingIOError as error:
        file.seek(0)
        raise UserError(f"{folder} is in use by {file.read(200)}: wait for it, or stop it") from error
    except (OSError, ImportError) as error:
        reason = getattr(error, "strerror", error)
        print(f"note: {folder / 'lock'}: {reason}; start no second --resume of it")
    return file

class World(NamedTuple):
    """The place of this process among all."""
    rank: int = 0
    local_rank: int = 0
    size: int = 1
    alone: bool = False  # a rehearsal: what comes is as large as that of all, and its own

def on_rank_zero(world: World, function, *arguments):
    """What `function` returns on rank 0, everywhere; as what it raises there. Collective."""
    answer: list = [None, None]
    if world.rank == 0:
        try:
            answer[0] = function(*arguments)
        except Exception as error:  # noqa: BLE001 - raised again below, on all ranks
            answer[1] = error
    if world.size > 1:
        dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]

# differs from train_gpt.py: open
class RunLog:
    """The console, a tracker, and the files of a run, by rank 0 (docs/running.md)."""
    def __init__(self, folder: Path, lock=None):
        self.main, self.folder, self.tracker, self.lock = False, folder, None, lock
        self.rows, self.failed, self.pipe_closed = [], set(), False

    # differs from train_gpt.py: says less of the hardware
    def open(self, s: Settings, config: dict, resumed_at: int | None, changed: dict):
        """On rank 0: writes the head of the files or, in a resumed run, where it goes on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.main, self.lock = True, self.lock or lock_folder(self.folder)
        if s.tracker != "none":
            from trackers import Tracker
            self.tracker = Tracker(s.tracker, self.folder, config, self.print)
        (self.folder / "result.json").unlink(missing_ok=True)
        if resumed_at is not None:
            with contextlib.suppress(ValueError, LookupError, TypeError):
                rows = read_json(self.folder / "metrics.json", {"metrics": []})["metrics"]
                self.rows = [row for row in rows if row["step"] <= resumed_at]
            self.line(f"resumed after step {resumed_at}")
            self.metric(event="resume", step=resumed_at, config=config, changed=changed)
            return
        write_json(self.folder / "config.json", config)
        source, bar = Path(__file__).read_text(encoding="utf-8"), "=" * 100
        self.line(f"{source}\n{bar}\nRunning Python {sys.version}\n"
                  f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}\n"
                  f"Running on {config['hardware']['name']}\nSettings: {json.dumps(config['settings'])}\n{bar}")

    def print(self, text: str):
        """To the console. A full disk or a lost terminal cost lines; a closed pipe ends the run (see Run)."""
        if not self.main:
            return
        try:
            print(printable(text), flush=True)
        except OSError as error:
            self.pipe_closed = self.pipe_closed or isinstance(error, BrokenPipeError)
            if "console" not in self.failed:
                with contextlib.suppress(OSError):
                    print(f"warning: console: {error.strerror}; log.txt has all", file=sys.stderr)
            self.failed.add("console")

    def line(self, text: str, name: str = "log.txt"):
        """A line of log.txt, also where the last one was cut. A full disk costs lines of the logs, not the run."""
        if not self.main:
            return
        try:
            with open(self.folder / name, "a+b") as file:
                file.seek(-1 if file.tell() else 0, os.SEEK_END)
                start = "" if file.read(1) in (b"", b"\n") else "\n"
                file.write(f"{start}{text}\n".encode(errors="backslashreplace"))
        except OSError as error:
            if name not in self.failed:
                self.print(f"warning: {self.folder / name}: {error.strerror}; training goes on")
            self.failed.add(name)

    def metric(self, **values):
        """To metrics.jsonl and the tracker, which ends here: it may print, and the result comes last."""
        self.line(json.dumps(values), "metrics.jsonl")
        self.rows += [values] * ("event" not in values)
        self.track(values["step"], {k: v for k, v in values.items() if isinstance(v, int | float)})
        if self.tracker and values.get("event") == "end":
            self.tracker.finish()

    def track(self, step: int, numbers: dict):
        if self.tracker:
            self.tracker.log(step, numbers)

    def result(self, end: dict, config: dict):
        """The last object of metrics.jsonl, and what comes of a run: `---` and lines on the console, result.json."""
        self.metric(**end)
        told = end.get("error") or ""
        result = {
            "status": "out_of_memory" if told.startswith("out of memory") else end["status"],
            "val_loss": end["val_loss"], "val_bpb": end["val_bpb"],
            "training_seconds": end["train_time_ms"] / 1000,
            "total_seconds": seconds_since_process_start(),
            "peak_memory_mb": end["peak_memory_mib"], "mfu": end["mfu"],
            "total_tokens": end["tokens"], "steps": end["step"], "params": end["params_total"]}
        result |= {"error": " ".join(told.split())} if told else {}
        try:
            for name, more in {"result": {}, "metrics": {"config": config, "metrics": self.rows}}.items():
                write_json(self.folder / f"{name}.json", result | more)
        except OSError as error:
            self.print(f"warning: {error}")
        lines = (f"{name}: {'null' if x is None else x}" for name, x in result.items())
        self.print("\n".join(["---", *lines]))

    def close(self):
        if self.lock:
            self.lock.close()

STOPS = [  # signals; Windows has two
    number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if (number := getattr(signal, name, None))]

# differs from train_gpt.py: all layers are alike
def flops_per_token(s: Settings, matmul: int) -> float:
    """FLOPs of forward and backward: 6 per parameter of its products, 12 * width per visible key of a layer."""
    length = min(s.seq_len, s.max_doc_len)
    window = min(s.window or length, length)
    keys = window - window * (window - 1) / (2 * length)  # on average over a causal row
    return 6.0 * matmul + 12.0 * s.width * keys * s.num_layers

# Dense bf16 rates of NVIDIA's data sheets, FLOP/s, by a word of the GPU's name; the first counts.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12,
    "H100": 989e12, "H800": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12,
    "A40": 150e12, "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12,
}

def model_flops_utilization(tokens_per_s: float, flops: float, gpu: str, count: int) -> float | None:
    """tokens/s * FLOPs per token / (peak bf16 FLOP/s * count), without the optimizer's; None: no known peak."""
    peaks = [peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", gpu)]
    return tokens_per_s * flops / (peaks[0] * count) if peaks else None

# differs from train_gpt.py: plain
class Run:
    """What surrounds the training, on every rank. `train` calls the methods from top to bottom."""
    # differs from train_gpt.py: plain
    def __init__(self, s: Settings, hardware: dict, world: World, notes: list[str]):
        self.s, self.hardware, self.world, self.notes = s, hardware, world, notes
        self.clock, self.corpus = Clock(s.device), open_corpus(s.data)
        available = sum(map(shard_length, self.corpus.val)) - 1
        if 0 < available < s.eval_tokens == PRESETS.get(s.preset, {}).get("eval_tokens", Settings.eval_tokens):
            notes.append(f"eval_tokens {available}: all that the validation split has")
            s = replace(s, eval_tokens=available)
        self.s, self.stream = s, ValStream(self.corpus, s.eval_tokens, s.eval_seq_len)
        own = self.corpus.fingerprint() if world.local_rank == 0 else None  # once a machine
        self.fingerprint = on_rank_zero(world, lambda: own)
        if own not in (None, self.fingerprint):
            raise UserError(f"{self.corpus.folder} differs from that of the first machine: copy its shards here")
        self.checkpoint, self.meta, self.changed = None, {}, {}
        self.lock, self.damaged, self.looking = None, [], False
        if s.resume:  # before a model is built that may be another
            known = on_rank_zero(world, lambda: checkpoints_in(resume_place(s), tell=lambda *_: None))
            for found in known[:1]:
                changed_settings(s, self.fingerprint, *found)
        self._set_progress()
        self.status = "done"  # or target, interrupted, nan, error
        self.stop_signal, self.over, self.undo = 0, False, contextlib.ExitStack()  # over: all know of an end

    # differs from train_gpt.py: no loader
    def _set_progress(self):
        """What is done: as the checkpoint says, or nothing."""
        meta, first = self.meta, META["position"]
        self.step = self.logged_step = self.saved_step = meta.get("step", 0)
        self.clock.total_ms = self.logged_ms = meta.get("train_time_ms", 0.0)
        self.position = {key: meta.get("position", first)[key] for key in first}
        if "data_fingerprint" in self.changed:
            self.position = first
        schedule = meta.get("schedule") or {"at": float(self.step)}
        self.at = schedule["at"]
        self.left = max(0, math.ceil(self.s.iterations - self.at))  # steps
        if self.s.max_seconds:
            self.left = schedule.get("left", self.left)
        self.fitted = self.step, self.logged_ms, -math.inf  # of _fit_schedule
        self.tokens = self.step * self.s.batch_tokens
        self.val_loss, self.val_step = meta.get("val_loss"), meta.get("val_step") or 0
        self.best_loss = meta.get("best_loss") or 1e9  # of --save-best
        self.whole = True  # no step is half done

    # differs from train_gpt.py: torch.optim's state
    def _resume(self):
        """Takes the tensors of the checkpoint that --resume names. Raises NothingToDo for an ended run. Collective."""
        own = run_state(self.model, self.optimizers)
        like = empty_like(own)
        self.checkpoint, self.meta = on_rank_zero(self.world, self._take, like)
        if self.world.rank == 0:
            for x, there in zip(leaves(own, own), leaves(self.state, like), strict=True):
                x.copy_(there)
        for x in leaves(own, own) if self.world.size > 1 else []:
            dist.broadcast(x, 0)
        self.changed = changed_settings(self.s, self.fingerprint, self.checkpoint, self.meta)
        self.state = {}
        self._set_progress()
        kept = self.meta["settings"].get("keep")
        self.s = replace(self.s, keep=self.s.keep or (kept if type(kept) is int and kept > 0 else 2))

    def _take(self, like: dict) -> tuple[Path, dict]:
        """The checkpoint of a run that is then this process's alone."""
        s, place, quiet = self.s, resume_place(self.s), lambda *_: None
        known = checkpoints_in(place, tell=quiet)
        other_data = "data_fingerprint" in allowed_changes(s)
        num_shards = math.inf if other_data else len(self.corpus.train)
        path, meta, self.state, self.damaged = find_checkpoint(place, like, num_shards)
        step, loss = meta["step"], meta.get("val_loss")
        reached = s.target_loss and loss is not None and loss <= s.target_loss
        at = (meta.get("schedule") or {"at": step})["at"]
        if meta.get("val_step") == step and (at >= s.iterations or reached):
            ways = "a lower --target-loss" if reached else "--iterations N --allow-change iterations"
            raise NothingToDo(f"{path}: this run has ended, after step {step} of {s.iterations}; "
                              f"to go on: {ways}")
        self.lock = lock_folder(path.parent.parent)
        if any(one not in known for one in checkpoints_in(place, tell=quiet) if one[0].parent == path.parent):
            raise UserError(f"{path.parent.parent} has gone on meanwhile: give the command again")
        return path, meta

    # differs from train_gpt.py: plain
    def open(self, model: GPT, optimizers: list):
        """Opens the run's folder, new or the checkpoint's; prints what is trained. Collective."""
        self.model, self.optimizers = model, optimizers
        if self.s.resume:
            self._resume()
        s, corpus = self.s, self.corpus
        commit = command_output("git", "rev-parse", "HEAD")
        changes = command_output("git", "status", "--porcelain", "-uno")
        self.config = {
            "settings": asdict(s), "script": Path(__file__).name, "world_size": self.world.size,
            "git": {"commit": commit, "dirty": None if changes is None else bool(changes)},
            "torch": torch.__version__, "hardware": self.hardware, "optimizer_state": "of torch.optim",
            "data": {"name": corpus.folder.name, "fingerprint": self.fingerprint, "meta": corpus.meta},
        }
        counts = {name: p.numel() for name, p in model.named_parameters()}
        self.total = sum(counts.values())
        expert = sum(n for name, n in counts.items() if ".experts." in name) // s.num_experts
        idle = expert * (s.num_experts - s.top_k)
        self.active = self.total - idle
        matrices = sum(p.numel() for p in model.blocks.parameters() if p.dim() > 1)
        self.cost = flops_per_token(s, matrices - idle + model.lm_head.weight.numel())
        run_id = on_rank_zero(self.world, lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}")
        folder = Path(s.log_dir) / s.experiment_name / run_id
        self.log = RunLog(self.checkpoint.parent.parent if self.checkpoint else folder, self.lock)
        self.undo.callback(self.log.close)
        for number in STOPS:  # signals are repeated
            self.undo.callback(signal.signal, number, signal.getsignal(number))
        self.undo.push(self._end_record)
        resumed_at = self.meta.get("step")
        on_rank_zero(self.world, self.log.open, s, self.config, resumed_at, self.changed)
        self.notes += [f"{name}: {then} before, {now} from here on" for name, (then, now) in self.changed.items()]
        self.notes += [f"{s.model_type}: {self.total:,} parameters, {self.active:,} of them for a token",
                       f"run folder: {self.log.folder}"]
        self.notes += [f"resumed {self.checkpoint} after step {self.step}"] * (self.checkpoint is not None)
        self.log.print("\n".join(self.notes))

    # differs from train_gpt.py: no loader
    def start(self) -> int:
        """The first step: 0, or the checkpoint's. From here on signals and errors save what is done."""
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._on_signal)
        self.undo.push(self._on_error)
        return self.step

    def _on_signal(self, number: int, frame):
        """Save and stop, after this step (several ranks: the next logged one); another Ctrl-C ends at once."""
        if self.stop_signal and number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        first, self.stop_signal = not self.stop_signal, self.stop_signal or number
        if self.world.rank == 0:
            when = "this step" if self.world.size == 1 else "the next logged step"
            told = f"{signal.Signals(number).name}: saves and stops after {when}; Ctrl-C ends at once\n"
            with contextlib.suppress(OSError):  # print is not for signal handlers
                os.write(2, told.encode())
        if self.looking and first:
            raise InterruptedError

    @contextlib.contextmanager
    def look(self):
        """An evaluation, outside the clock. One process leaves it at a signal: saving comes first."""
        try:
            with self.clock.paused():
                self.looking = self.world.size == 1 and not self.stop_signal
                yield
        except InterruptedError:  # by _on_signal
            self.status, self.over = "interrupted", True
        finally:
            self.looking = False

    # differs from train_gpt.py: plain
    def _on_error(self, kind, error, trace):
        """Whatever else ends the loop: the last whole step is saved, if all ranks are here, and the logs end."""
        if error is None or isinstance(error, TrainingStopped):
            return
        self.status = "error"
        self.clock.wait = lambda: None  # what the device waits for may never come
        with contextlib.suppress(OSError, RuntimeError):  # the first error is the one to tell
            if self.whole and self.step > self.saved_step and self._all_have(error):
                self.save(self.step)

    def _all_have(self, error: BaseException) -> bool:
        """Whether every rank has come to an error of data or disk after the same step: the same is in flight on all."""
        if self.world.size == 1:
            return True
        store = dist.distributed_c10d._get_default_store()
        names = [f"error/{rank}" for rank in range(self.world.size)]
        store.set(names[self.world.rank], str(self.step if isinstance(error, (UserError, OSError)) else -1))
        store.wait(names, timedelta(seconds=30))
        return {int(store.get(name)) for name in names} == {self.step}

    @property
    def following(self) -> float:
        """Where in the schedule this step leads: its rest in equal parts, of s.iterations steps one each."""
        return self.s.iterations - (self.s.iterations - self.at) * (self.left - 1) / self.left

    def _fit_schedule(self, step: int, ms: float):
        """Under --max-seconds: the steps left, at the pace since the last call. `ms`: the first rank's clock."""
        before, before_ms, _ = self.fitted
        step_ms = max(1e-3, (ms - before_ms) / (step - before))
        if self.left:
            self.left = max(1, int((1000 * self.s.max_seconds - ms) / step_ms))
        self.fitted = step, ms, self.at

    # differs from train_gpt.py: no profiler
    def log_due(self, step: int, position: dict) -> bool:
        """Whether to log a step: each log_every-th; after a signal, if alone; a 64th of --max-seconds later."""
        self.step, self.position, self.whole = step, position, True
        self.at, self.left, self.tokens = self.following, self.left - 1, step * self.s.batch_tokens
        if self.log.pipe_closed:
            self.stop_signal = self.stop_signal or getattr(signal, "SIGPIPE", signal.SIGTERM)
        unfitted = self.s.max_seconds and self.at >= self.fitted[2] + self.s.iterations / 64
        return step % self.s.log_every == 0 or bool(unfitted or self.stop_signal and self.world.size == 1)

    def read_losses(self, losses: list[Tensor], step: int) -> float:
        """The newest loss up to this step; tells all of a signal. TrainingStopped if one is not finite. Collective."""
        numbers = F.pad(torch.stack(losses), (0, 1), value=float(self.stop_signal))
        with self.clock.paused() as ms:
            numbers = F.pad(numbers, (0, 1), value=0.0 if self.world.rank else ms)
        if self.world.size > 1:
            dist.all_reduce(numbers)
        *values, stop, ms = numbers.tolist()
        if self.s.max_seconds:
            self._fit_schedule(step, ms)
        for done, loss in enumerate(values, start=step - len(values) + 1):
            self._stop_unless(math.isfinite(loss), f"the loss of step {done} is {loss}", done)
        if stop and self.left:
            self.status, self.over = "interrupted", True
            self.stop_signal = self.stop_signal or signal.SIGTERM
        return values[-1]

    def _stop_unless(self, finite: bool, what: str, step: int):
        """Ends logs and run. A checkpoint is written only after a look at losses and weights."""
        if not finite:
            self.status, self.step = "nan", step
            rates = [n for n in help_texts() if n.endswith("_lr") and not unread_without(self.s, n)]
            flags = ", ".join("--" + n.replace("_", "-") for n in rates if n != "stage_lr")
            ways = ", with --resume and --allow-change" if self.saved_step else ""
            raise TrainingStopped(f"{what}: stopped, {self.kept()}; lower {flags}{ways}")

    def kept(self) -> str:
        """What is on the disk, in words."""
        return f"{self.checkpoint} is kept" if self.saved_step else f"{self.log.folder} has no checkpoint"

    # differs from train_gpt.py: the norm
    def log_step(self, step: int, loss: float, norm: float, lr: float):
        """A training loss to all logs, with what is known of the steps since the last one."""
        s = self.s
        self._stop_unless(math.isfinite(norm), f"the norm of the gradient of step {step} is {norm}", step)
        with self.clock.paused() as ms:
            step_ms = (ms - self.logged_ms) / (step - self.logged_step)
        self.logged_step, self.logged_ms = step, ms
        rate = 1000 * s.batch_tokens / step_ms
        mfu = self.mfu(rate)
        percent = "n/a" if mfu is None else f"{100 * mfu:.1f} %"
        console = f"  {step_ms:.1f} ms/step  {rate:,.0f} tokens/s  MFU {percent}"
        self._log_loss(step, "train", loss, ms, console, step_ms=step_ms, tokens_per_s=rate, mfu=mfu,
                       lr=lr, grad_norm=norm, seq_len=s.seq_len, window=s.window, batch_tokens=s.batch_tokens)

    def mfu(self, tokens_per_s: float) -> float | None:
        gpu, count = self.hardware["name"], self.world.size
        return model_flops_utilization(tokens_per_s, self.cost, gpu, count) or None

    def _log_loss(self, step: int, kind: str, loss: float, ms: float, console: str, **more):
        """One line on the console and in log.txt, one object in metrics.jsonl."""
        of = f"{step}/{step + self.left}"
        self.log.print(f"step {of}  {kind} loss {loss:.4f}{console}")
        self.log.line(f"step:{of} {kind}_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")
        more |= {"tokens": self.tokens, "train_time_ms": ms}
        self.log.metric(step=step, **{f"{kind}_loss": loss}, **more)

    def validation_due(self, step: int) -> bool:
        """Whether to look at the validation loss now. An interrupted run leaves it to the resumed one."""
        due = not self.left or (self.s.eval_every and step % self.s.eval_every == 0)
        return bool(due and step > self.val_step and self.status != "interrupted")

    def log_validation(self, step: int, loss: float):
        """A validation loss to all logs. Raises TrainingStopped if it is not finite."""
        self.looking = False  # from here on nothing is cut short
        self._stop_unless(math.isfinite(loss), f"the validation loss after step {step} is {loss}", step)
        self.val_loss, self.val_step = loss, step
        ms, bpb = self.clock.total_ms, bits_per_byte(loss, self.corpus.meta)
        bits = f", {bpb:.4f} bits per byte" if bpb else ""
        console = f" nats per token{bits}  train time {ms / 1000:.1f} s"
        self._log_loss(step, "val", loss, ms, console, val_bpb=bpb)
        if self.s.target_loss and loss <= self.s.target_loss:
            self.status, self.over = "target", True
        if self.left:
            self._note_validation(step)

    def _note_validation(self, step: int):
        """Adds the validation loss to a checkpoint of the same step, so that a resumed run has it."""
        if self.log.main and step == self.saved_step == self.val_step:
            path = self.checkpoint / "meta.json"
            with contextlib.suppress(OSError, ValueError):  # without it the resumed run looks again
                write_json(path, read_json(path, META) | {"val_loss": self.val_loss, "val_step": step})

    # differs from train_gpt.py: torch.optim's state
    def save(self, step: int) -> bool:
        """Writes a checkpoint, outside the clock; False, and a warning, if that failed. Collective."""
        if step == self.saved_step:
            return True
        with self.clock.paused() as ms:
            moments = [x.state_dict() for x in self.optimizers]
            state = {"model": self.model.state_dict(), "optimizers": moments}
            meta = self.config | dict(
                position=self.position, train_time_ms=ms, val_loss=self.val_loss, val_step=self.val_step,
                schedule={"at": self.at, "left": self.left, "tokens": self.tokens}, best_loss=self.best_loss)
            finite = on_rank_zero(
                self.world, lambda: all(x.isfinite().all() for x in state["model"].values()))
            self._stop_unless(finite, f"the weights after step {step} are not finite", step)
            arguments = self.log.folder, step, state, meta, self.s.keep or 2, self.damaged
            try:
                self.checkpoint = on_rank_zero(self.world, write_checkpoint, *arguments)
            except OSError as error:
                self.save_error = str(error)
                self.log.print(f"warning: {error}; {self.kept()}")
                return False
            self.saved_step = step
            self.log.print(f"checkpoint {self.checkpoint}")
            return True

    # differs from train_gpt.py: no profiler
    def finish(self, step: int):
        """Last checkpoint, end of the logs. Raises TrainingStopped if it could not be written."""
        s, ms = self.s, self.clock.stop()
        saved = self.save(step) if self.status == "interrupted" or s.save_last else True
        self._note_validation(step)
        if s.target_loss:
            reached = "reached" if self.status == "target" else "not reached"
            self.log.print(f"target loss {s.target_loss} {reached}: step {step}, {ms / 1000:.2f} s")
        if not saved:
            raise TrainingStopped(f"the last checkpoint: {self.save_error}; {self.kept()}")

    # differs from train_gpt.py: save has no optimizer
    def save_best(self, step: int):
        """Under --save-best, after the best validation so far: a checkpoint, and ckpt_best, a link. Collective."""
        if self.s.save_best and self.val_step == step and self.val_loss and self.val_loss <= self.best_loss:
            self.best_loss, link = self.val_loss, self.log.folder / "ckpt_best"
            if self.save(step) and self.log.main:
                try:
                    link.unlink(missing_ok=True)
                    link.symlink_to(Path("checkpoints", self.checkpoint.name))
                except OSError as error:  # a file system without links
                    self.log.print(f"warning: ckpt_best: {error}; the best is {self.checkpoint}")

    # differs from train_gpt.py: plain
    def _end_record(self, kind, error, trace):
        """The end of all logs, however the run ends."""
        if error:
            self.clock.wait = lambda: None  # what the device waits for may never come
            known = re.sub("done|interrupted", "error", self.status)
            self.status = "interrupted" if kind is KeyboardInterrupt else known
        ms, tokens, loss = self.clock.stop(), self.tokens, self.val_loss
        target = (self.step, ms) if self.status == "target" else (None, None)
        logged = self.logged_step * self.s.batch_tokens / (self.logged_ms or math.inf)
        end = dict(
            event="end", status=self.status, step=self.step, iterations=self.step + self.left, val_loss=loss,
            val_bpb=loss and bits_per_byte(loss, self.corpus.meta), train_time_ms=ms, tokens=tokens,
            tokens_per_s=1000 * tokens / ms if ms else None, params_total=self.total, params_active=self.active,
            peak_memory_mib=peak_memory_mib(self.s.device)[0], mfu=self.mfu(1000 * logged),
            target_step=target[0], target_time_ms=target[1])
        end |= {"error": explained(error) or repr(error)} if error else {}
        if self.log.main:
            self.log.result(end, self.config)

# ==================== Training ================================================================

# differs from train_gpt.py: plain
def train(run: Run):
    """One run. Every process does the same."""
    s, size = run.s, run.world.size
    model = GPT(s, run.corpus.meta["vocab_size"]).to(s.device)
    model.by_document = s.device == "cpu" and s.backend == "sdpa" and not s.compile
    optimizers = make_optimizers(model, s)
    run.open(model, optimizers)
    compiled = torch.compile(model, dynamic=False) if s.compile else model
    trained = DistributedDataParallel(compiled) if size > 1 else compiled
    share = s.batch_tokens // s.seq_len // size
    rows = max(n for n in divisors(share) if n * s.seq_len <= s.micro_tokens)
    # Untimed: compiles, and orders DistributedDataParallel's buckets as a resumed run has them.
    batch = torch.zeros(3, rows, s.seq_len, dtype=torch.int32, device=s.device)
    batch[2] = torch.arange(s.seq_len)  # documents of a token: gpt has few positions
    sum(trained(*batch)).backward()
    model.zero_grad()
    step = run.start()
    training = training_rows(s, run.corpus, **run.position)
    losses = []  # of the steps since the last log line, on the device
    if run.validation_due(step):  # of a checkpoint whose own was cut short
        validate(run, compiled, step)
    run.save_best(step)
    run.clock.start()
    while run.left and not run.over:
        at = run.at  # in the schedule; the step, but for --max-seconds
        set_rates(optimizers, s, at)
        batch, position = next_batch(training, s, run.world)
        step_loss = torch.zeros((), device=s.device)
        for i, (inputs, targets, docs) in enumerate(batch.split(rows, dim=1)):
            alone = size == 1 or (i + 1) * rows == share
            with contextlib.nullcontext() if alone else trained.no_sync():
                loss, balance = trained(inputs, targets, docs)
                mean = (loss + s.balance * balance) / s.batch_tokens
                (mean * size).backward()  # the gradients of the processes are averaged
            step_loss += loss.detach() / s.batch_tokens
        norm = nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
        run.whole = False
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        normalize_rows(model, s)
        losses.append(step_loss)
        step += 1
        due, last = run.log_due(step, position), not run.left
        save = s.save_last if last else s.save_every and step % s.save_every == 0
        if due or last or save:
            train_loss = run.read_losses(losses, step)  # raises if one is not finite
            losses.clear()
            run.log_step(step, train_loss, norm.item(), rate_scale(s, at))
        if save or run.over:  # first: what follows may fail
            run.save(step)
        if run.validation_due(step):
            validate(run, compiled, step)
        run.save_best(step)
    run.finish(step)

@torch.no_grad()
def validate(run: Run, model: nn.Module, step: int):
    """The mean loss of the validation stream in nats per token, logged, outside the clock. Collective."""
    s, stream, (rank, _, size, _) = run.s, run.stream, run.world
    with run.look():
        rows = max(1, min(s.micro_tokens // stream.seq_len, -(-stream.num_rows // size)))
        total = torch.zeros((), dtype=torch.float32 if s.device == "mps" else torch.float64, device=s.device)
        for start in range(rank * rows, stream.num_rows + rank * rows, rows * size):
            total += model(*torch.from_numpy(stream.rows(start, rows)).to(s.device))[0]
        if size > 1:
            dist.all_reduce(total)
        run.log_validation(step, total.item() / stream.num_tokens)

def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Loss in nats per token -> bits per byte, by the val split's tokens per byte; None if not known."""
    split = meta["splits"].get("val") or {}
    known = split.get("bytes") and split.get("tokens")
    return loss / math.log(2) * split["tokens"] / split["bytes"] if known else None

def start_processes(device: str) -> World:
    """The process group that torchrun announces in the environment, joined; alone without it."""
    if "RANK" not in os.environ:
        return World()
    world = World(*(int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")))
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # 2.13 renames collectives
    import torch._dynamo  # noqa: F401 - later it would keep the group alive past its end
    if device == "cpu":
        dist.init_process_group("gloo", timeout=timedelta(minutes=30))  # hashing, saving on slow disks
        return world
    gpus = torch.cuda.device_count()
    if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        raise UserError(f"torchrun starts more processes than GPUs: use --nproc_per_node={gpus}")
    torch.cuda.set_device(world.local_rank)
    device = torch.device("cuda", world.local_rank)
    dist.init_process_group("nccl", device_id=device, timeout=timedelta(minutes=30))
    return world

def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what a user can repair."""
    code, world_size = 2, int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # says once a machine what all ranks know
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the console's encoding lacks
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see the top
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        s, hardware, notes = parse_settings(argv, world_size)
        code = 1  # docs/automation.md has all
        torch.set_num_threads(s.threads or torch.get_num_threads())
        if s.device == "cpu":
            keep_memory()
        run = Run(s, hardware, start_processes(s.device), notes)
        with run.undo:
            train(run)
        # torchrun would call a clean stop a failure, and show a traceback
        stopped = run.status == "interrupted" and "TORCHELASTIC_RUN_ID" not in os.environ
        code = 128 + run.stop_signal if stopped else 0
    except NothingToDo as done:
        code = 0
        if first:
            print(printable(str(done)))
    except KeyboardInterrupt:
        code = 130
        if first:
            print("stopped before the first step", file=sys.stderr)
    except Exception as error:
        if not (told := explained(error)):
            raise
        if first or out_of_memory(error):
            print(printable(f"error: {told}"), file=sys.stderr)
    finally:  # after an error NCCL might wait here for ranks that are elsewhere
        if dist.is_initialized() and (code == 0 or dist.get_backend() == "gloo"):
            dist.destroy_process_group()
    try:
        print(end="", flush=True)  # does nothing where the console is closed from the start
    except OSError:  # a closed pipe, a full disk: the interpreter would complain at its end
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code

# differs from train_gpt.py: no kernels
def explained(error: BaseException) -> str:
    """A sentence about an error that a user can repair; nothing for one of ours."""
    if out_of_memory(error):
        what = "use a smaller --micro-tokens, and --seq-len, --eval-seq-len if they are as large"
        return f"out of memory: {what} ({(str(error) or repr(error)).splitlines()[0]:.200})"
    if compiler_failed(error):
        said = " ".join(str(getattr(error, "inner_exception", error)).split())
        return f"torch.compile or Triton failed; --no-compile avoids it ({said:.300})"
    return str(error) if isinstance(error, (UserError, OSError, TrainingStopped)) else ""

def out_of_memory(error: Exception) -> bool:
    """Of the GPU, or of a CPU, where torch raises a plain RuntimeError."""
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)

def compiler_failed(error: BaseException) -> bool:
    """Whether an error comes from torch.compile or Triton."""
    places = tuple(kind.__module__ for kind in type(error).__mro__)
    ours = any(place.startswith(("torch._dynamo", "torch._inductor", "triton")) for place in places)
    return ours or "Triton Error" in str(error)

if __name__ == "__main__":
    gc.freeze()  # what was imported stays
    gc.enable()
    sys.exit(main())
