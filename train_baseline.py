"""Train the models and optimizers that the speedrun is measured against: GPT-2 and its modern relatives, with AdamW or
Muon, on the data, in the loop, with the logs and the checkpoints of train_gpt.py.

    python train_baseline.py                                         # GPT-2's architecture, on whatever is there
    python train_baseline.py --model-type moderngpt --num-kv-heads 2 # RMSNorm, RoPE, SwiGLU, grouped-query attention
    python train_baseline.py --model-type ngpt                       # normalized GPT: weights and states of unit norm
    python train_baseline.py --model-type moegpt                     # fine-grained mixture of experts with shared ones
    python train_baseline.py --model-type moderngpt --mlp relu2 --no-norm-gain --optimizer muon
    torchrun --standalone --nproc_per_node=8 train_baseline.py --preset gpt2    # nanoGPT's GPT-2 124M on 8 GPUs

"Three times faster than AdamW on GPT-2" is two commands with one kind of log, which logger.py compares. The names of
llm.c and nanoGPT are accepted: --max_steps --warmup_steps --max_lr --min_lr --total_batch_size --B --T.

Models. gpt: nanoGPT's GPT-2 (Radford et al. 2019): LayerNorm, learned positions, GELU, biases, tied head, residual
projections initialized smaller. moderngpt: pre-norm RMSNorm, RoPE, no biases, gated MLP, as in Llama. ngpt: Loshchilov
et al. 2024, arXiv 2410.01131. moegpt: moderngpt with DeepSeekMoE's layers (Dai et al. 2024, arXiv 2401.06066).
Documents are packed and never see each other, as in train_gpt.py; a learned position counts from its document's start.

Measured on 2 CPU cores (AMD EPYC, torch 2.13.0; bench/optimizers.py, records/2026-11-20_optimizers): on Tiny
Shakespeare's characters, 819,200 parameters, 500 steps, tuned AdamW ends at 1.814 +- 0.014 nats and tuned Muon at
1.627 +- 0.006 (n = 5), which has AdamW's loss after 292 steps. Not yet measured on a GPU.
Shape suffixes: B rows, T tokens of a row, N = B * T, D model_dim, H heads, K key dim of a head or, of routing, choices
of a token, V vocabulary; E experts of a layer, F hidden size, R = N * K sorted rows, M mixture layers.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import inspect
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Settings                                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# argparse is generated from the fields below: name, type, default, and the comment as help text, whose last bracket
# holds the allowed values.


class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback and exits with 1."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (NaN loss, no space for the last checkpoint); what was saved before stays usable."""


# differs from train_gpt.py: the baselines
@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run."""

    # --- run
    # differs from train_gpt.py: presets
    preset: str = "auto"  # group of settings, each overridden by its own flag [auto|cpu|gpu|gpt2]
    # differs from train_gpt.py: name of the script
    experiment_name: str = "train_baseline"  # runs are written to LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    seed: int = 0  # of the initial weights and of the order of shuffled data [>=0]
    resume: str = ""  # continue the newest checkpoint of the experiment (latest), or this run or checkpoint folder
    # --- data
    data: str = "auto"  # data set: the name of a folder under data/, or a path
    shuffle: bool = True  # shuffle the documents of a shard (the speedrun's rules want the published order)
    long_docs: str = "split"  # tokens of a document past max_doc_len: further pieces, or skipped [split|clip]
    # --- model
    model_type: str = "gpt"  # architecture [gpt|moderngpt|ngpt|moegpt]
    num_layers: int = 12  # transformer layers [>0]
    width: int = 768  # model_dim: size of the residual stream, a multiple of head_dim [>0]
    # differs from train_gpt.py: GPT-2's
    head_dim: int = 64  # size of an attention head; num_heads = width / head_dim [>0]
    num_kv_heads: int = 0  # heads of keys and values, each serves equally many queries; 1: one; 0: num_heads [>=0]
    mlp: str = "auto"  # geglu, swiglu are gated; auto: gelu for gpt, else swiglu [auto|gelu|relu2|geglu|swiglu]
    # differs from train_gpt.py: gated MLPs
    mlp_ratio: float = 4.0  # hidden size of a plain MLP / width; a gated one has 2/3 of it, for as many parameters [>0]
    tied: str = "auto"  # the head is the embedding table; auto: of gpt only [auto|on|off]
    norm_gain: bool = True  # learned gains in RMSNorm
    qk_norm: bool = False  # RMSNorm of queries and keys
    # differs from train_gpt.py: Llama's and the papers'
    rope_base: float = 10000.0  # slowest rotary frequency is about 1 / this, in radians per token [>0]
    # differs from train_gpt.py: one window
    window: int = 0  # tokens that a query sees, itself included; 0: its document, as far as it is in the row [>=0]
    # --- mixture of experts: moegpt
    # differs from train_moe.py: fine-grained
    num_experts: int = 16  # routed experts of a mixture layer [>0]
    # differs from train_moe.py: fine-grained
    top_k: int = 4  # of them for each token [>0]
    # differs from train_moe.py: DeepSeekMoE's
    num_shared: int = 2  # experts that serve every token [>=0]
    # differs from train_moe.py: no splitting
    expert_hidden: int = 0  # hidden size of an expert; 0: those of a token together have an MLP's [>=0]
    # differs from train_moe.py: DeepSeekMoE's
    dense_first: int = 1  # first layers that keep a dense MLP [>=0]
    balance: float = 0.01  # weight of the load-balancing loss (arXiv 2401.06066, eq. 12), mean over rows [>=0]
    # --- training: names of llm.c and nanoGPT in ALIASES
    # differs from train_gpt.py: longer runs
    iterations: int = 5000  # optimizer steps; --max_steps [>0]
    # differs from train_gpt.py: one stage
    batch_tokens: int = 524288  # tokens of one optimizer step, over all processes; --total_batch_size [>0]
    # differs from train_gpt.py: one stage
    seq_len: int = 1024  # tokens of a row; --T. Documents are packed into rows, and never see each other [>0]
    # differs from train_gpt.py: one stage
    max_doc_len: int = 0  # longest piece of a document, in tokens; 0: the row is the only limit [>=0]
    # --- optimizer
    optimizer: str = "adamw"  # of the hidden matrices, those of attention and MLP [adamw|muon]
    max_lr: float = 6e-4  # peak learning rate of AdamW [>=0]
    min_lr: float = 6e-5  # at the last step, a tenth of max_lr if not given; Muon's falls by the same factor [>=0]
    beta1: float = 0.9  # decay of AdamW's running mean of gradients [0..1]
    beta2: float = 0.95  # and of their squares [0..1]
    # differs from train_gpt.py: nanoGPT's
    adam_eps: float = 1e-8  # AdamW's epsilon [>0]
    weight_decay: float = 0.1  # AdamW's decay / rate, decoupled, of matrices and tables [>=0]
    decay_schedule: str = "constant"  # factor on the decay: 1, the rate's, or down to 0 [constant|rate|linear]
    grad_clip: float = 1.0  # largest norm of the gradient of all parameters together; 0: no limit [>=0]
    # differs from train_gpt.py: plain Muon
    muon_lr: float = 0.02  # learning rate of hidden matrices, Muon [>=0]
    muon_momentum: float = 0.95  # Nesterov momentum after its warm-up [0..1]
    momentum_start: float = 0.85  # momentum at step 0 and at the last step [0..1]
    momentum_warmup: int = 300  # steps over which the momentum rises [>=0]
    # differs from train_gpt.py: plain Muon
    momentum_cooldown: int = 0  # last steps over which it falls back [>=0]
    # differs from train_gpt.py: plain Muon
    muon_beta2: float = 0.0  # decay of NorMuon's running variance of update rows; 0 off [0..1]
    # differs from train_gpt.py: plain Muon
    muon_weight_decay: float = 0.0  # Muon's decay / rate, decoupled [>=0]
    # differs from train_gpt.py: plain Muon
    orthogonalizer: str = "newton_schulz"  # iteration that orthogonalizes updates [polar_express|newton_schulz]
    # differs from train_gpt.py: cosine
    schedule: str = "cosine"  # after the warm-up: half a cosine, or constant and a linear cool-down [cosine|wsd]
    # differs from train_gpt.py: nanoGPT's share
    warmup_steps: int = 100  # learning-rate warm-up, in steps [>=0]
    # differs from train_gpt.py: wsd only
    cooldown: float = 0.4  # last fraction of the iterations, in which the rate of wsd falls [0..1]
    # --- evaluation
    # differs from train_gpt.py: longer runs
    eval_every: int = 250  # steps between evaluations; 0: only after the last step [>=0]
    eval_tokens: int = 10485760  # first tokens of the validation split; 0: all of them [>=0]
    # differs from train_gpt.py: learned positions
    eval_seq_len: int = 0  # longest context in evaluation, in tokens; 0: as in training [>=0]
    target_loss: float = 0.0  # stop at the first validation loss at or below this, nats per token; 0 off [>=0]
    hellaswag_every: int = 0  # steps between HellaSwag scores (GPT-2 vocabulary, evals/hellaswag.py); 0: none [>=0]
    hellaswag_tasks: int = 0  # tasks of it, evenly spread over the file; 0: all [>=0]
    hellaswag_file: str = ""  # their file; empty: where python evals/hellaswag.py --download puts it
    # --- checkpoints, logs, profiling
    save_every: int = 0  # steps between checkpoints; 0: only after the last step and on SIGINT or SIGTERM [>=0]
    save_last: bool = True  # write a checkpoint after the last step
    keep: int = 2  # checkpoints of a run that are kept [>0]
    log_every: int = 10  # steps between console lines; the loss is read from the device only then [>0]
    wandb: bool = False  # mirror the metrics to Weights & Biases (WANDB_MODE=offline works)
    enable_profiling: bool = False  # write a trace per process (ui.perfetto.dev) and print the heaviest operations
    profile_start: int = 10  # first profiled step of this process [>=0]
    profile_steps: int = 3  # profiled steps [>0]
    # --- hardware
    device: str = "auto"  # where to run [auto|cpu|cuda]
    dtype: str = "auto"  # of activations and matrices; auto: bf16 where the hardware is fast at it [auto|bf16|fp32]
    backend: str = "auto"  # attention; auto: flex compiled on CUDA, plain on a CPU in bf16 [auto|flex|sdpa|plain]
    # differs from train_moe.py: no Triton
    moe_impl: str = "auto"  # products with experts; loop waits for the device; auto: the best [auto|grouped|bmm|loop]
    compile: bool = True  # torch.compile of model and optimizer
    compile_unit: str = "auto"  # one graph, or one per block, which lets reductions start early [auto|model|block]
    # differs from train_gpt.py: memory of fp32 logits
    micro_tokens: int = 16384  # most tokens of one forward and backward pass of a process; --B rows of seq_len [>0]
    threads: int = 0  # CPU threads of a process; 0: torch's choice [>=0]

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def gated(self) -> bool:
        return self.mlp in GATED

    @property
    def mlp_hidden(self) -> int:
        """Hidden size of an MLP: of a gated one a multiple of 32, as it is rounded."""
        size = self.mlp_ratio * self.width
        return 32 * math.ceil(size / 48) if self.gated else round(size)

    @property
    def mixture_layers(self) -> range:
        """Layers with a mixture of experts."""
        return range(self.dense_first if self.model_type == "moegpt" else self.num_layers, self.num_layers)

    @property
    def longest(self) -> int:
        """Tokens of the longest context that training sees."""
        return min(self.max_doc_len or self.seq_len, self.seq_len)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


GATED = {"geglu": lambda gate: F.gelu(gate, approximate="tanh"), "swiglu": F.silu}
PLAIN = {"gelu": lambda x: F.gelu(x, approximate="tanh"), "relu2": lambda x: x.relu().square()}
# differs from train_gpt.py: the baselines
PRESETS: dict[str, dict] = {
    # two CPU cores: the size and the data of train_gpt.py's preset
    "cpu": dict(
        data="stdlib", num_layers=3, width=192, head_dim=48, iterations=360, batch_tokens=4096, seq_len=256,
        max_lr=4e-3, warmup_steps=36, momentum_warmup=30, eval_every=120, eval_tokens=131072,
        micro_tokens=8192, num_experts=8, top_k=2, num_shared=1, compile=False,
    ),
    # GPT-2 124M on one 16 GB card
    "gpu": dict(
        iterations=4000, batch_tokens=65536, micro_tokens=8192, warmup_steps=200, eval_tokens=262144, save_every=500,
    ),
    # nanoGPT's and llm.c's GPT-2 124M: 10 B tokens of FineWeb, 8 GPUs
    "gpt2": dict(data="fineweb10B", shuffle=False, iterations=19073, warmup_steps=715, micro_tokens=65536),
}
# differs from train_gpt.py: other settings
RESUME_MAY_CHANGE = {
    "preset", "experiment_name", "log_dir", "resume", "data", "eval_every", "eval_tokens", "eval_seq_len",
    "target_loss", "hellaswag_every", "hellaswag_tasks", "hellaswag_file", "save_every", "save_last", "keep",
    "log_every", "wandb", "enable_profiling", "profile_start", "profile_steps", "device", "dtype", "backend", "compile",
    "compile_unit", "micro_tokens", "threads", "moe_impl",
}


# Settings that only some values of another one read.
# differs from train_gpt.py: other settings
READ_WITH = {name: ("optimizer", ("muon",)) for name in (
    "muon_lr", "muon_momentum", "momentum_start", "momentum_warmup", "momentum_cooldown", "muon_beta2",
    "muon_weight_decay", "orthogonalizer")}
READ_WITH |= {name: ("model_type", ("moegpt",)) for name in (
    "num_experts", "top_k", "num_shared", "expert_hidden", "dense_first", "balance", "moe_impl")}
READ_WITH |= {name: ("model_type", ("moderngpt", "moegpt")) for name in ("norm_gain", "qk_norm")}
READ_WITH |= {"rope_base": ("model_type", ("moderngpt", "ngpt", "moegpt")), "cooldown": ("schedule", ("wsd",)),
              "tied": ("model_type", ("gpt", "moderngpt", "moegpt")),
              "weight_decay": ("model_type", ("gpt", "moderngpt", "moegpt"))}
# Settings that follow from the architecture, unless a flag says otherwise.
TYPES = {"ngpt": dict(warmup_steps=0)}  # needs none (arXiv 2410.01131)
ALIASES = {"max_steps": "iterations", "total_batch_size": "batch_tokens", "T": "seq_len"}


@functools.cache
def help_texts() -> dict[str, str]:
    """Comments of the fields of `Settings`, read from the source: field name -> text."""
    return dict(re.findall(r"^    (\w+): \w+ = .+?  # (.+)$", inspect.getsource(Settings), flags=re.MULTILINE))


class Parser(argparse.ArgumentParser):
    """argparse that reports one sentence, with the flag that was probably meant."""

    def error(self, message: str):
        if unknown := re.match(r"unrecognized arguments: (--[\w-]+)", message):
            known = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], known, n=1)
            message += f" (did you mean {close[0]}?)" if close else " (--help lists all flags)"
        self.exit(2, f"error: {message}\n")


class Switch(argparse.BooleanOptionalAction):
    """--x and --no-x, the latter with an underscore too."""

    def __init__(self, option_strings, dest, **options):
        super().__init__(option_strings, dest, **options)
        self.option_strings = [*self.option_strings, f"--no_{dest}"]

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, not option_string.startswith(("--no-", "--no_")))


# differs from train_gpt.py: no settings with a value per stage, names of llm.c
def build_parser() -> Parser:
    """One flag per field of `Settings`, with dashes or underscores; then those of ALIASES, and --B."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=118))
    kinds, texts = {"int": int, "float": float, "str": str}, help_texts()
    others = {field: alias for alias, field in ALIASES.items()}
    for field in dataclasses.fields(Settings):
        names = [field.name.replace("_", "-"), field.name]
        if other := others.get(field.name):
            names += [other.replace("_", "-"), other]
        flags = dict.fromkeys(f"--{name}" for name in names)
        text = f"{texts[field.name]} (default: {field.default})"
        option = dict(dest=field.name, default=argparse.SUPPRESS, help=text)
        if field.type == "bool":
            option["action"] = Switch
        else:
            option.update(type=kinds[field.type], metavar="X")
        if field.name == "resume":
            option.update(nargs="?", const="latest")
        parser.add_argument(*flags, **option)
    parser.add_argument("--B", type=int, metavar="X", default=argparse.SUPPRESS,
                        help="most rows of one forward and backward pass: --micro_tokens is B * seq_len")
    return parser


class Hardware(NamedTuple):
    """What this process may use, and why bf16 is fast on it or not."""

    device: str  # cuda or cpu
    name: str
    memory_gib: float  # of one GPU, or of the machine
    bf16: bool
    why: str
    fp8: bool = False  # has FP8 matrix products
    capability: tuple[int, int] = (0, 0)  # of a GPU: its generation


def detect_hardware(device: str = "auto") -> Hardware:
    """The first GPU if there is one and `device` allows it, else the CPU."""
    if device != "cpu" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        fast, capability = gpu.major >= 8, (gpu.major, gpu.minor)
        why = f"compute capability {gpu.major}.{gpu.minor} {'>=' if fast else '<'} 8.0"
        return Hardware("cuda", gpu.name, gpu.total_memory / 2**30, fast, why, capability >= (8, 9), capability)
    probes = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    found = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
    why = f"the CPU has {' and '.join(found)}" if found else "the CPU has neither AVX512-BF16 nor AMX"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return Hardware("cpu", name, memory, bool(found), why)


# differs from train_gpt.py: presets
def choose_preset(hardware: Hardware, world_size: int, data: str) -> tuple[str, str]:
    """Preset for `auto`, by hardware and data, and the reason for it."""
    if hardware.device == "cpu":
        return "cpu", "no CUDA device"
    folder = data_folder("fineweb10B" if data == "auto" else data)
    gpus = f"{world_size} process(es) on {hardware.name} of {hardware.memory_gib:.0f} GiB"
    if world_size >= 8 and hardware.memory_gib >= 70 and folder.name.startswith("fineweb") and folder.is_dir():
        return "gpt2", f"{gpus}, and {folder.name} is there"
    return "gpu", f"{gpus}; gpt2 wants 8 of at least 70 GiB, and data/fineweb10B"


# differs from train_gpt.py: model types
def parse_settings(argv: list[str] | None, world_size: int) -> tuple[Settings, Hardware, list[str]]:
    """Command line -> settings with every `auto` resolved, the hardware, and lines that explain the choices.

    Raises UserError with all that is wrong with the settings at once."""
    given = vars(build_parser().parse_args(argv))
    hardware = detect_hardware(given.get("device", "auto"))
    preset, why = given.get("preset", "auto"), "asked for"
    if preset == "auto":
        preset, why = choose_preset(hardware, world_size, given.get("data", "auto"))
    rows = given.pop("B", None)
    values = PRESETS.get(preset, {}) | TYPES.get(given.get("model_type"), {})
    s = Settings(**{**values, **given, "preset": preset})
    s = dataclasses.replace(s, min_lr=given.get("min_lr", s.max_lr / 10),
                            warmup_steps=given.get("warmup_steps", min(s.warmup_steps, s.iterations // 10)))
    problems = field_errors(s) + unread_errors(s, given)
    if rows is not None:
        problems += [f"--B {rows}: must be >0"] * (rows < 1)
        problems += ["--B: has no effect beside --micro_tokens"] * ("micro_tokens" in given)
        s = dataclasses.replace(s, micro_tokens=rows * s.seq_len)
    dtype = s.dtype if s.dtype != "auto" else ("bf16" if hardware.bf16 else "fp32")
    fallback = "plain" if hardware.device == "cpu" and dtype == "bf16" and not s.compile else "sdpa"
    kernel = "flex" if hardware.device == "cuda" and s.compile else fallback
    tied = "on" if s.model_type == "gpt" else "off"
    s = dataclasses.replace(  # the checks see what `auto` means
        s, backend=s.backend if s.backend != "auto" else kernel, tied=s.tied if s.tied != "auto" else tied,
        mlp=s.mlp if s.mlp != "auto" else "gelu" if s.model_type == "gpt" else "swiglu",
        moe_impl=s.moe_impl if s.moe_impl != "auto" else auto_experts(hardware, dtype))
    expert = 0 if problems or not s.mixture_layers else s.expert_hidden or auto_expert(s)
    s = dataclasses.replace(s, expert_hidden=expert,
                            eval_seq_len=s.eval_seq_len or (s.longest if s.model_type == "gpt" else s.seq_len))
    problems += hardware_errors(s, hardware) + ([] if problems else shape_errors(s, world_size))
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    unit = s.compile_unit if s.compile_unit != "auto" else ("model" if world_size == 1 else "block")
    data = s.data if s.data != "auto" else ("fineweb10B" if data_folder("fineweb10B").is_dir() else "stdlib")
    notes = [f"preset {preset}: {why}", f"device {hardware.device}: {hardware.name}",
             f"dtype {dtype}: " + (hardware.why if s.dtype == "auto" else "asked for"),
             f"attention {s.backend}, " + (f"compiled by {unit}" if s.compile else "not compiled"), model_note(s)]
    return dataclasses.replace(s, device=hardware.device, dtype=dtype, compile_unit=unit, data=data), hardware, notes


def auto_expert(s: Settings) -> int:
    """Hidden size of an expert, a multiple of 16: the MLP's is shared out among the experts of a token."""
    return 16 * max(1, round(s.mlp_hidden / max(1, s.top_k + s.num_shared) / 16))


def model_note(s: Settings) -> str:
    """The architecture in a line."""
    heads = f"{s.num_heads} heads" + (f", {s.kv_heads} of keys and values" if s.kv_heads != s.num_heads else "")
    mixture = ""
    if layers := s.mixture_layers:
        shared = f" and {s.num_shared} shared" if s.num_shared else ""
        mixture = (f", in layers {layers[0]} to {layers[-1]} {s.top_k} of {s.num_experts} experts{shared}, hidden size "
                   f"{s.expert_hidden} by {s.moe_impl}")
    return f"model {s.model_type}: {heads}, {s.mlp} of hidden size {s.mlp_hidden}{mixture}; optimizer {s.optimizer}"


def auto_experts(hardware: Hardware, dtype: str) -> str:
    """Grouped products where they read their group sizes on the device, Hopper and datacentre Blackwell in bf16; on
    other GPUs padded batches, static, too; on a CPU, which has nothing to wait for, a loop (records/LOG.md)."""
    if hardware.device == "cpu":
        return "loop"
    return "grouped" if dtype == "bf16" and hardware.capability in ((9, 0), (10, 0)) else "bmm"


def field_errors(s: Settings) -> list[str]:
    """A sentence for each field whose value is outside the bracket of its comment."""
    def allowed(value, spec: str) -> bool:
        if spec in (">0", ">=0"):
            return 0 < value < math.inf or (spec == ">=0" and value == 0)
        return 0 <= value <= 1 if spec == "0..1" else value in spec.split("|")

    bad = []
    for name, text in help_texts().items():
        value, spec = getattr(s, name), re.search(r"\[(\S+)\]$", text)
        if spec and not all(allowed(v, spec[1]) for v in (value if isinstance(value, tuple) else (value,))):
            bad.append(f"--{name} {value}: must be {spec[1].replace('|', ' or ').replace('..', ' to ')}")
    if s.seed >= 2**63:
        bad.append(f"--seed {s.seed}: must be below 2^63")
    if not re.fullmatch(r"\w[\w.+-]*", s.experiment_name):
        bad.append(f"--experiment_name {s.experiment_name!r}: use letters, digits and . _ + - only")
    return bad


# differs from train_gpt.py: several values of the other setting
def unread_errors(s: Settings, given: dict) -> list[str]:
    """A sentence for each given setting that nothing would read, as it belongs to another choice."""
    bad = [f"--{name}: has no effect without --{other} {' or '.join(values)}"
           for name, (other, values) in READ_WITH.items() if name in given and getattr(s, other) not in values]
    bad += [f"--{name}: has no effect without --hellaswag_every" for name in ("hellaswag_tasks", "hellaswag_file")
            if name in given and not s.hellaswag_every]
    bad += [f"--{name}: ngpt has no weight decay, its weights have norm 1" for name in ("muon_weight_decay",
            "decay_schedule") if name in given and s.model_type == "ngpt"]
    if "num_kv_heads" in given and s.model_type in ("gpt", "ngpt"):
        bad.append(f"--num_kv_heads: {s.model_type} has as many heads of keys as of queries; use moderngpt or moegpt")
    return bad


# differs from train_gpt.py: neither FP8 nor Triton
def hardware_errors(s: Settings, hardware: Hardware) -> list[str]:
    """Settings that this machine cannot serve."""
    bad, cuda = [], hardware.device == "cuda"
    if s.device == "cuda" and not cuda:
        bad.append("--device cuda: this machine has no usable CUDA device; leave the flag out")
    if not s.preset.endswith("cpu") and s.device != "cpu" and not cuda:
        bad.append(f"--preset {s.preset} needs a CUDA device, there is none: use --preset cpu, or add --device cpu")
    if s.compile and not cuda and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        bad.append("--compile on a CPU needs a C++ compiler and there is none: install g++, or use --no-compile")
    if s.backend == "flex" and not (cuda and s.compile):
        bad.append("--backend flex trains only compiled and on a CUDA device (no CPU backward in torch): use sdpa")
    if s.mixture_layers and s.moe_impl == "grouped" and not (cuda and hardware.bf16):
        bad.append("--moe_impl grouped needs a CUDA device that is fast in bf16: use bmm or loop")
    return bad


# differs from train_gpt.py: other models
def shape_errors(s: Settings, world_size: int) -> list[str]:
    """Settings that do not fit each other: model shape, rates, rows per process."""
    bad = []
    if s.width % s.head_dim or s.head_dim % 4:
        bad.append(f"--width {s.width} must be a multiple of --head_dim {s.head_dim}, that one of 4")
    elif s.num_heads % s.kv_heads:
        bad.append(f"--num_kv_heads {s.num_kv_heads} must divide the {s.num_heads} heads of queries")
    if s.mlp_hidden < 1:
        bad.append(f"--mlp_ratio {s.mlp_ratio}: the hidden size would be 0")
    if s.mixture_layers and s.moe_impl == "grouped" and (s.width % 8 or s.expert_hidden % 8):
        bad.append(f"--expert_hidden {s.expert_hidden}, --width {s.width}: grouped products need multiples of 8; "
                   "use them, or --moe_impl bmm")
    if s.model_type == "gpt" and s.gated:
        bad.append(f"--mlp {s.mlp}: gpt has no gated MLP; use gelu or relu2, or --model_type moderngpt")
    if s.model_type == "ngpt" and s.mlp not in ("swiglu", "geglu"):
        bad.append(f"--mlp {s.mlp}: ngpt has a gated MLP; use swiglu or geglu")
    if s.model_type == "gpt" and s.eval_seq_len > s.longest:
        bad.append(f"--eval_seq_len {s.eval_seq_len}: gpt has learned positions, and training sees {s.longest} tokens "
                   "of a document at most; lower it")
    if s.mixture_layers and s.top_k > s.num_experts:
        bad.append(f"--top_k {s.top_k}: there are {s.num_experts} experts")
    if s.model_type == "moegpt" and not s.mixture_layers:
        bad.append(f"--dense_first {s.dense_first}: of {s.num_layers} layers one must have the mixture")
    if s.min_lr > s.max_lr:
        bad.append(f"--min_lr {s.min_lr} must not be above --max_lr {s.max_lr}")
    if 1 in (s.muon_beta2, s.muon_momentum, s.beta1, s.beta2):
        bad.append("--muon_beta2, --muon_momentum, --beta1, --beta2 must be below 1: at 1 nothing new is averaged in")
    if s.warmup_steps >= s.iterations:
        bad.append(f"--warmup_steps {s.warmup_steps} must be less than --iterations {s.iterations}")
    return bad + row_errors(s, stage_table(s)[0], world_size)


# differs from train_gpt.py: neither FP8 nor further targets
def row_errors(s: Settings, stage: Stage, world_size: int) -> list[str]:
    """A batch must split into whole rows, the same number for every process."""
    rows = stage.batch_tokens // stage.seq_len
    if stage.batch_tokens % stage.seq_len:
        return [f"--batch_tokens {stage.batch_tokens} must be a multiple of --seq_len {stage.seq_len}"]
    if rows % world_size:
        fits = ", ".join(str(n) for n in range(1, rows + 1) if rows % n == 0)
        return [f"{world_size} processes cannot share the {rows} rows of a step (batch_tokens {stage.batch_tokens} / "
                f"seq_len {stage.seq_len}): use {fits} processes"]
    if stage.seq_len > s.micro_tokens:
        return [f"--micro_tokens {s.micro_tokens} is less than one row of --seq_len {stage.seq_len} tokens"]
    if s.backend == "flex" and (stage.seq_len % FLEX_BLOCK or s.eval_seq_len % FLEX_BLOCK):
        return [f"--seq_len {stage.seq_len}, --eval_seq_len {s.eval_seq_len}: flex needs multiples of {FLEX_BLOCK}"]
    return []


# differs from train_gpt.py: a run has one stage
class Stage(NamedTuple):
    """What the loader and the loop of train_gpt.py ask of a stage; a run has one."""

    start: int
    end: int
    batch_tokens: int
    seq_len: int
    max_doc_len: int

    def micro_rows(self, s: Settings, world_size: int) -> int:
        """Rows of one forward pass of a process: the most that fit into micro_tokens and divide its share."""
        rows = self.batch_tokens // self.seq_len // world_size
        return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * self.seq_len <= s.micro_tokens))


# differs from train_gpt.py: a run has one stage
def stage_table(s: Settings) -> list[Stage]:
    """The one stage of a run."""
    return [Stage(0, s.iterations, s.batch_tokens, s.seq_len, s.max_doc_len)]


def stage_at(stages: list[Stage], step: int) -> Stage:
    """The stage that training step `step` belongs to; the last one for steps past the end."""
    return next((stage for stage in stages if step < stage.end), stages[-1])


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data                                                                                                               │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# Shards have the public format: 256 int32 (magic, version, token count), then uint16 tokens. A document starts with
# the end-of-text token. Rows are packed from pieces: documents cut to max_doc_len. Every process computes the same
# sequence of rows and reads the tokens of its own ones, so the order does not depend on the number of processes.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_META = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256, "splits": {}}
IGNORE = -1  # target that has no loss


def data_folder(name: str) -> Path:
    """A data set by the name of its folder under data/, or by path."""
    return Path(name) if os.sep in name or Path(name).is_dir() else Path(__file__).resolve().parent / "data" / name


def repair_command(folder: Path) -> str:
    """The command that makes the data set of that name."""
    if folder.name.startswith("fineweb"):
        return "python data/cached_fineweb.py 9"
    return f"python data/{folder.name if folder.name == 'shakespeare_char' else 'stdlib'}.py"


def open_shard(path: Path, vocab_size: int | None = None) -> np.ndarray:
    """Tokens of a shard, memory-mapped. Raises UserError for a wrong header, a wrong length or (given `vocab_size`)
    a token id that the vocabulary does not have."""
    header, redo = np.fromfile(path, dtype="<i4", count=256), f"make it again with {repair_command(path.parent)}"
    if len(header) < 256 or tuple(header[:2]) != (SHARD_MAGIC, SHARD_VERSION):
        found = "a truncated header" if len(header) < 256 else f"magic {header[0]}, version {header[1]}"
        raise UserError(f"{path} is no token shard: {found}, expected {SHARD_MAGIC} and {SHARD_VERSION}; {redo}")
    count, size = int(header[2]), path.stat().st_size
    if count < 1 or size != HEADER_BYTES + 2 * count:
        raise UserError(f"{path} is damaged: {size} bytes, {HEADER_BYTES + 2 * count} by its header; {redo}")
    tokens = np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES, shape=(count,))
    if vocab_size and int(tokens.max()) >= vocab_size:
        raise UserError(f"{path} holds token id {int(tokens.max())}, the vocabulary has {vocab_size}; {redo}")
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
            with open(path, "rb") as file:
                digest.update(file.read(65536))
        return digest.hexdigest()[:16]


def open_corpus(name: str) -> Corpus:
    """Finds and checks a data set; without meta.json it is taken for published FineWeb shards.

    Raises FileNotFoundError with the command that makes it, UserError if it is damaged."""
    folder = data_folder(name)
    repair, meta_path = repair_command(folder), folder / "meta.json"
    paths = {split: sorted(folder.glob(f"*_{split}_*.bin")) for split in ("train", "val")}
    for split in paths:
        if not paths[split]:
            raise FileNotFoundError(f"no {split} shards in {folder}; make them with: {repair}")
    try:
        meta = json.loads(meta_path.read_text(encoding="utf-8")) if meta_path.exists() else GPT2_META
        said = {split: meta["splits"].get(split, {}).get("tokens") for split in paths}
        meta = meta | {"vocab_size": int(meta["vocab_size"]), "eot": meta["eot"]}
        if meta["vocab_size"] < 1 or not (meta["eot"] is None or 0 <= int(meta["eot"]) < meta["vocab_size"]):
            raise ValueError(f"vocab_size {meta['vocab_size']}, eot {meta['eot']}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{meta_path} cannot be read ({error!r}); make it again with {repair}") from error
    for split, found in paths.items():
        count = sum(len(open_shard(path)) for path in found)
        if said[split] not in (None, count):
            raise UserError(f"{meta_path} says {said[split]} {split} tokens, the shards hold {count}; "
                            f"make them again with {repair}")
    return Corpus(folder, meta, paths["train"], paths["val"])


def piece_table(tokens: np.ndarray, eot: int | None, max_len: int, clip: bool, offset: int) -> tuple[np.ndarray, ...]:
    """Start and length of each piece of a shard: documents cut to at most `max_len` tokens.

    The shard's last token is only a target. Without end-of-text tokens the shard is one document, cut from `offset`
    on, so that every epoch cuts elsewhere. `clip` keeps only the first piece of a document (record 29)."""
    last = len(tokens) - 1
    starts = np.flatnonzero(tokens[:last] == eot) if eot is not None else np.array([min(offset, last)])
    if eot is not None and (not len(starts) or starts[0]):
        starts = np.insert(starts, 0, 0)
    lengths = np.diff(np.append(starts, last))
    counts = np.ones_like(starts) if clip else -(-lengths // max_len)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    piece_starts = np.repeat(starts, counts) + within * max_len
    return piece_starts, np.minimum(max_len, np.repeat(starts + lengths, counts) - piece_starts)


def gather_rows(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Inputs, targets (the true next tokens, also at the end of a piece) and piece numbers: (3, total) int32."""
    begins = np.cumsum(lengths) - lengths
    index = np.repeat(starts - begins, lengths) + np.arange(lengths.sum())
    return np.stack([tokens[index], tokens[index + 1], np.repeat(np.arange(len(starts)), lengths)]).astype(np.int32)


class Loader:
    """Training batches of one process, prepared by a background thread, at an exact and restorable position.

    A row starts with the start of a piece and is filled with further pieces; the last one is cut at the end of the
    row and its rest skipped (record 26: batches that start at a document's start train better). `position`: epoch,
    shard, and tokens of that shard, in the order of its pieces, that are used up."""

    def __init__(self, s: Settings, corpus: Corpus, world: World, position: dict | None = None, step: int = 0):
        self.s, self.corpus, self.world, self.stages, self.step = s, corpus, world, stage_table(s), step
        self.position = dict(position or {"epoch": 0, "shard": 0, "used": 0})
        self.table_key, self.ready, self.stop = None, queue.Queue(maxsize=4), threading.Event()
        self.opener, self.opened = ThreadPoolExecutor(1, "shards"), {}
        self.staging: list = [None] * 3  # pinned buffers, each with the event of the copy out of it
        self.thread = threading.Thread(target=self._produce, daemon=True, name="loader")
        self.thread.start()

    def _produce(self):
        """Background thread: (tokens, position after them) of each step in order, or the error that ended it."""
        try:
            for step in range(self.step, self.s.iterations):
                if not self._hand_over((self.make_batch(stage_at(self.stages, step)), dict(self.position))):
                    return
        except Exception as error:  # noqa: BLE001 - raised again in the training thread, by next()
            self._hand_over(error)

    def _hand_over(self, item) -> bool:
        """Waits for room; False if the loader was closed meanwhile."""
        while not self.stop.is_set():
            with contextlib.suppress(queue.Full):
                self.ready.put(item, timeout=0.1)
                return True
        return False

    def _load_table(self, stage: Stage):
        """Opens the shard of the current position and lists its pieces, none longer than a row, in the order of use."""
        epoch, shard, eot = self.position["epoch"], self.position["shard"], self.corpus.meta["eot"]
        longest = min(stage.max_doc_len or stage.seq_len, stage.seq_len)
        key = (epoch, shard, longest)
        if key == self.table_key:
            return
        if self.table_key is None or self.table_key[1] != shard:
            both = dict.fromkeys((shard, (shard + 1) % len(self.corpus.train)))
            self.opened = {number: self._open(number) for number in both}
            self.tokens = self.opened[shard].result()
        rng = np.random.default_rng((self.s.seed, epoch, shard))
        offset = int(rng.integers(longest)) if epoch else 0
        starts, lengths = piece_table(self.tokens, eot, longest, self.s.long_docs == "clip", offset)
        order = rng.permutation(len(starts)) if self.s.shuffle else slice(None)
        self.starts, self.lengths, self.table_key = starts[order], lengths[order], key
        self.ends = np.cumsum(self.lengths)

    def _open(self, shard: int) -> Future:
        """A shard being opened: the next one is read and checked while this one is in use, so no batch waits for it."""
        vocab_size = self.corpus.meta["vocab_size"]
        return self.opened.get(shard) or self.opener.submit(open_shard, self.corpus.train[shard], vocab_size)

    def _next_row(self, stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of the shard, starts and lengths of the pieces of the next row; on to the next shard, and after the
        last one to the first again in a new epoch, where the pieces left do not fill a row."""
        for _ in range(len(self.corpus.train) + 2):
            self._load_table(stage)
            used = self.position["used"]
            first = np.searchsorted(self.ends, used, side="right")
            last = np.searchsorted(self.ends, used + stage.seq_len)
            if last < len(self.ends):
                break
            turn, shard = divmod(self.position["shard"] + 1, len(self.corpus.train))
            self.position = {"epoch": self.position["epoch"] + turn, "shard": shard, "used": 0}
        else:
            raise UserError(f"no shard of {self.corpus.folder} fills a row of {stage.seq_len} tokens: lower --seq_len")
        starts, lengths = self.starts[first:last + 1].copy(), self.lengths[first:last + 1].copy()
        starts[0] += used - (self.ends[first] - lengths[0])  # 0, unless the longest piece has changed within this one
        lengths[0] = self.ends[first] - used
        lengths[-1] -= lengths.sum() - stage.seq_len
        self.position["used"] = int(self.ends[last])
        return self.tokens, starts, lengths

    def make_batch(self, stage: Stage) -> Tensor:
        """This process's part of the next batch, (micro-steps, 3, rows, T) int32: inputs, targets, document numbers.
        All processes walk over all rows; each gathers its own."""
        micro_rows, own = stage.micro_rows(self.s, self.world.size), {}
        for row in range(stage.batch_tokens // stage.seq_len):
            tokens, starts, lengths = self._next_row(stage)
            if row // micro_rows % self.world.size == self.world.rank:
                visit = self.position["epoch"], self.position["shard"]
                own.setdefault(visit, (tokens, [], []))  # the rows of one shard are gathered together
                own[visit][1].append(starts)
                own[visit][2].append(lengths)
        parts = [gather_rows(tokens, np.concatenate(a), np.concatenate(b)) for tokens, a, b in own.values()]
        batch = np.concatenate(parts, axis=1).reshape(3, -1, micro_rows, stage.seq_len).swapaxes(0, 1)
        return torch.from_numpy(np.ascontiguousarray(batch))

    def next(self, step: int) -> tuple[Tensor, dict]:
        """Batch of training step `step` on the device, and the position after it. Raises what the thread raised."""
        item = self.ready.get()
        if isinstance(item, Exception):
            raise item
        return item if self.s.device == "cpu" else (self._to_device(step, item[0]), item[1])

    def _to_device(self, step: int, tokens: Tensor) -> Tensor:
        """One asynchronous copy from pinned memory. A buffer is refilled only after the copy out of it is done, which
        its event says: refilling without asking races with copies queued behind a long backward pass."""
        slot = step % len(self.staging)
        if self.staging[slot] is None or self.staging[slot][0].shape != tokens.shape:
            self.staging[slot] = (torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True), torch.cuda.Event())
        buffer, copied = self.staging[slot]
        assert buffer.is_pinned(), "a copy from pageable memory would wait for the device"
        copied.synchronize()
        buffer.copy_(tokens)
        on_device = buffer.to(self.s.device, non_blocking=True)
        copied.record()
        return on_device

    def close(self):
        self.stop.set()
        self.thread.join()
        self.opener.shutdown()


class ValStream:
    """The fixed validation stream: the first N tokens of the val split, each once, cut into rows of `seq_len`.

    What is predicted does not depend on the number of processes or on the batch size; a row's documents do not see
    each other, and a context is cut where a row starts."""

    def __init__(self, corpus: Corpus, num_tokens: int, seq_len: int):
        shards = [open_shard(path, corpus.meta["vocab_size"]) for path in corpus.val]
        available = sum(map(len, shards)) - 1
        self.num_tokens, self.eot, self.seq_len = num_tokens or available, corpus.meta["eot"], seq_len
        if not 0 < self.num_tokens <= available:
            repair = "use --eval_tokens 0 for all" if available else f"make more with {repair_command(corpus.folder)}"
            raise UserError(f"--eval_tokens {num_tokens}: {corpus.folder} has {available} validation tokens; {repair}")
        self.num_rows = -(-self.num_tokens // seq_len)
        self.tokens = shards[0] if len(shards[0]) > self.num_tokens else np.concatenate(shards)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Rows [first, first + count) as (3, count, T) int32: inputs, targets, documents; padded with target IGNORE."""
        batch = np.zeros((3, count * self.seq_len), dtype=np.int32)
        batch[1] = IGNORE
        start = first * self.seq_len
        size = max(0, min(count * self.seq_len, self.num_tokens - start))
        batch[0, :size], batch[1, :size] = self.tokens[start:start + size], self.tokens[start + 1:start + size + 1]
        if self.eot is not None:
            batch[2] = np.cumsum(batch[0] == self.eot)
        return batch.reshape(3, count, self.seq_len)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Attention                                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# One rule says who sees whom; all backends apply it token by token, so that compiled, eager and SDPA agree.

FLEX_BLOCK = 128  # tokens of a block of FlexAttention's block mask


def visible(query: Tensor, key: Tensor, query_doc: Tensor, key_doc: Tensor, window: Tensor) -> Tensor:
    """True where a query position may look at a key position: causal, same document, inside the window."""
    return (query >= key) & (query - key < window) & (query_doc == key_doc)


def dense_mask(docs_BT: Tensor, window: Tensor, copies: int = 1) -> Tensor:
    """The rule for all pairs: (B, 1, T, T) bool, for scaled_dot_product_attention; each token `copies` times."""
    position = torch.arange(docs_BT.size(1), device=docs_BT.device).repeat_interleave(copies)
    docs = docs_BT.repeat_interleave(copies, dim=1)
    return visible(position[:, None], position, docs[:, None, :, None], docs[:, None, None, :], window)


def block_mask(docs_BT: Tensor, window: Tensor, copies: int = 1):
    """The rule as a FlexAttention BlockMask, nearest blocks first, made without looking at T x T pairs.

    Document numbers only rise along a row, so the first and last number of a block tell whether two blocks share a
    document (a pair of tokens may), or consist of one and the same (every pair does: no mask is needed inside)."""
    from torch.nn.attention.flex_attention import BlockMask
    span = FLEX_BLOCK // copies  # tokens of a block
    docs = docs_BT.unflatten(1, (-1, span))
    first, last = docs[..., 0], docs[..., -1]
    block = torch.arange(first.size(1), device=docs_BT.device)
    ahead = (block[:, None] - block) * span  # distance of two blocks' first tokens
    some = (ahead >= 0) & (ahead - (span - 1) < window) & (last[:, None, :] >= first[:, :, None])
    full = (ahead > 0) & (ahead + (span - 1) < window) & (first[:, None, :] == last[:, :, None])

    def listed(flags: Tensor) -> tuple[Tensor, Tensor]:  # counts (B, 1, blocks), indices (B, 1, blocks, blocks)
        nearest_first = flags.size(-1) - 1 - flags.flip(-1).int().argsort(dim=-1, descending=True, stable=True)
        return flags.sum(-1, dtype=torch.int32)[:, None], nearest_first.to(torch.int32)[:, None].contiguous()

    def mask_mod(b, h, query, key):
        query, key = query // copies, key // copies
        return visible(query, key, docs_BT[b, query], docs_BT[b, key], window)

    length = copies * docs_BT.size(1)
    return BlockMask.from_kv_blocks(*listed(some & ~full), *listed(full), BLOCK_SIZE=FLEX_BLOCK, mask_mod=mask_mod,
                                    seq_lengths=(length, length))


@functools.cache
def small_shared_memory(device: str) -> bool:
    """Whether a kernel has less than 160 KB of shared memory: on consumer cards (100 KB), not on A100 or H100."""
    return device == "cuda" and torch.cuda.get_device_properties().shared_memory_per_block_optin < 160 << 10


def flex_options(device: str) -> dict | None:
    """FlexAttention's kernel options: its default tiles need 106 to 131 KB of shared memory at head_dim 128."""
    if not small_shared_memory(device):
        return None
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_M1": 32, "BLOCK_N1": 64, "BLOCK_M2": 64, "BLOCK_N2": 32}


def attend(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHK: Tensor, mask, scale: float, backend: str,
           options: dict | None = None) -> Tensor:
    """softmax(scale * q k + mask) v -> (B, T, H, K): FlexAttention with a block_mask, or with a dense_mask SDPA or the
    formula itself, which in bf16 on a CPU takes 0.25 to 0.64 of the time of SDPA (records/LOG.md, 2026-11-20)."""
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention
        return flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options).transpose(1, 2)
    if backend == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)
    return ((q * scale @ k.mT).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v).transpose(1, 2)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                                              │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# All matrices have model_dim as their last axis, output matrices transposed: ngpt's unit vectors are then always rows,
# and matrices of one size are one batch for Muon. Experts excepted, whose products want (E, D, F) and (E, F, D).

OPERATORS = "nanospeedrun_" + re.sub(r"\W", "_", Path(__file__).stem)  # namespace
HEAD_MULTIPLE = 128  # the vocabulary is padded to a multiple of this
NORM_EPS = 1e-5  # of LayerNorm and RMSNorm, GPT-2's
INIT_STD = 0.02  # of all initial weights but those of residual projections and of ngpt, GPT-2's


# differs from train_gpt.py: all layers are alike but for their MLP
class Layer(NamedTuple):
    """One row of the layer table."""

    # differs from train_gpt.py: one kind
    attention: str  # L: all layers have the same window
    mixture: int | None = None  # number among the mixture layers; None: a dense MLP


# differs from train_gpt.py: all layers are alike but for their MLP
def layer_table(s: Settings) -> list[Layer]:
    """Topology of the model."""
    return [Layer("L", s.mixture_layers.index(i) if i in s.mixture_layers else None) for i in range(s.num_layers)]


def normal(*shape: int, std: float) -> nn.Parameter:
    """Initial weights."""
    return nn.Parameter(torch.randn(shape) * std)


def unit(x: Tensor) -> Tensor:
    """x with rows of norm 1, computed in fp32."""
    return F.normalize(x.float(), dim=-1).type_as(x)


# differs from train_gpt.py: rotates all dimensions
def rotary_table(length: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, 1, head_dim / 2) fp32, of frequencies base^(-2i / head_dim) in radians per token (RoFormer,
    Su et al. 2021, arXiv 2104.09864)."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[:, None]
    return angle.cos(), angle.sin()


# differs from train_gpt.py: rotates all dimensions
def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE: rotates the pairs (x[i], x[i + K/2]) by the angle of their position, in fp32."""
    a, b = x_BTHK.float().chunk(2, dim=-1)
    return torch.cat((a * cos + b * sin, b * cos - a * sin), dim=-1).type_as(x_BTHK)


def document_positions(docs_BT: Tensor) -> Tensor:
    """Place of each token in its document, (B, T)."""
    index = torch.arange(docs_BT.size(1), device=docs_BT.device).expand_as(docs_BT)
    starts = F.pad(docs_BT[:, 1:] != docs_BT[:, :-1], (1, 0), value=True)
    return index - torch.where(starts, index, 0).cummax(dim=1).values


class Norm(nn.Module):
    """LayerNorm with gain and bias (gpt), else RMSNorm with or without a gain."""

    def __init__(self, s: Settings):
        super().__init__()
        gpt = s.model_type == "gpt"
        self.gain = nn.Parameter(torch.ones(s.width)) if gpt or s.norm_gain else None
        self.bias = nn.Parameter(torch.zeros(s.width)) if gpt else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is not None:
            return F.layer_norm(x, self.gain.shape, self.gain, self.bias, NORM_EPS)
        return F.rms_norm(x, (x.size(-1),), self.gain, NORM_EPS)


class Scale(nn.Module):
    """ngpt's learned vector: `value` at the start. What is stored starts at `stored`, which sets how fast it learns:
    AdamW moves it by about the learning rate (arXiv 2410.01131, section 2.5)."""

    def __init__(self, size: int, value: float, stored: float):
        super().__init__()
        self.scale, self.unit = nn.Parameter(torch.full((size,), stored)), value / stored

    def forward(self) -> Tensor:
        return self.scale * self.unit


# differs from train_gpt.py: the baselines'
class Attention(nn.Module):
    """Causal self-attention: with biases (gpt), RoPE, fewer heads of keys and values, QK-norm; of unit queries and keys
    with a learned scale (ngpt)."""

    # differs from train_gpt.py: the baselines'
    def __init__(self, s: Settings):
        super().__init__()
        self.num_heads, self.kv_heads, self.head_dim, self.qk_norm = s.num_heads, s.kv_heads, s.head_dim, s.qk_norm
        self.backend, self.options, ngpt = s.backend, flex_options(s.device), s.model_type == "ngpt"
        self.softmax_scale = s.head_dim ** (0.5 if ngpt else -0.5)
        own, shared = s.num_heads * s.head_dim, s.kv_heads * s.head_dim
        self.q = normal(own, s.width, std=weight_std(s))
        self.kv = normal(2, shared, s.width, std=weight_std(s))
        self.out = normal(own, s.width, std=weight_std(s, residual=True))
        biases = (own, 2 * shared, s.width) if s.model_type == "gpt" else ()
        self.biases = nn.ParameterList(torch.zeros(size) for size in biases)  # of q, kv, out
        self.qk_scale = Scale(own, 1.0, s.width**-0.5) if ngpt else None

    # differs from train_gpt.py: the baselines'
    def forward(self, x_BTD: Tensor, mask, cos: Tensor | None, sin: Tensor | None) -> Tensor:
        q_bias, kv_bias, out_bias = self.biases if len(self.biases) else (None, None, None)
        q = F.linear(x_BTD, self.q, q_bias).unflatten(-1, (self.num_heads, -1))
        k, v = F.linear(x_BTD, self.kv.flatten(0, 1), kv_bias).unflatten(-1, (2, self.kv_heads, -1)).unbind(2)
        if self.qk_norm:
            q, k = (F.rms_norm(x, (self.head_dim,), eps=NORM_EPS) for x in (q, k))
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if self.qk_scale is not None:
            scale = self.qk_scale().view(self.num_heads, self.head_dim)
            q, k = ((unit(x) * scale).type_as(x) for x in (q, k))
        k, v = (x.repeat_interleave(self.num_heads // self.kv_heads, dim=2) for x in (k, v))
        y = attend(q, k, v, mask, self.softmax_scale, self.backend, self.options).flatten(2)
        return F.linear(y, self.out.T, out_bias)


def weight_std(s: Settings, residual: bool = False) -> float:
    """Standard deviation of initial weights. Each layer adds two residual projections to the stream, so theirs is
    smaller by the root of their number (Radford et al. 2019)."""
    return (s.width**-0.5 if s.model_type == "ngpt" else INIT_STD) * ((2 * s.num_layers) ** -0.5 if residual else 1.0)


# differs from train_gpt.py: the baselines'
class MLP(nn.Module):
    """Feed-forward: act(x @ up) @ down, or gated (act(x @ gate) * (x @ up)) @ down (Shazeer 2020, arXiv 2002.05202)."""

    # differs from train_gpt.py: the baselines'
    def __init__(self, s: Settings, hidden: int):
        super().__init__()
        self.activation, ngpt = (GATED | PLAIN)[s.mlp], s.model_type == "ngpt"
        self.up = normal(hidden, s.width, std=weight_std(s))
        self.gate = normal(hidden, s.width, std=weight_std(s)) if s.gated else None
        self.down = normal(hidden, s.width, std=weight_std(s, residual=True))
        biases = (hidden, s.width) if s.model_type == "gpt" else ()
        self.biases = nn.ParameterList(torch.zeros(size) for size in biases)  # of up, down
        self.up_scale, self.gate_scale = (Scale(hidden, 1.0, 1.0) if ngpt else None for _ in range(2))

    # differs from train_gpt.py: the baselines'
    def forward(self, x_BTD: Tensor) -> Tensor:
        up_bias, down_bias = self.biases if len(self.biases) else (None, None)
        hidden = F.linear(x_BTD, self.up, up_bias)
        if self.gate is None:
            return F.linear(self.activation(hidden), self.down.T, down_bias)
        gate = F.linear(x_BTD, self.gate)
        if self.up_scale is not None:  # sqrt(model_dim): the activation wants entries of size 1, not of a unit vector
            hidden = (hidden * self.up_scale()).type_as(hidden)
            gate = (gate * self.gate_scale() * x_BTD.size(-1) ** 0.5).type_as(gate)
        return F.linear(self.activation(gate) * hidden, self.down.T)


# --- experts: train_moe.py's products of rows that are sorted by expert, here with any MLP


LOOP_ROWS = 64  # multiple of the rows of a product in `loop`


class Grouping(NamedTuple):
    """Rows of a product with the experts: one for each choice of a token, sorted by expert, perhaps with padding."""

    order_R: Tensor  # row -> number of the choice, token * K + k; N * K: padding
    inverse_R: Tensor  # number of the choice -> row
    ends_E: Tensor  # int32: where the rows of each expert end
    owner_GE: Tensor | None = None  # of G equal blocks of rows, for `bmm`: 1 at the expert that multiplies it


def group_rows(experts_NK: Tensor, num_experts: int) -> Grouping:
    """Sorts the choices by expert, tokens in order. All shapes are static, nothing is read from the device."""
    flat = experts_NK.flatten().to(torch.int32)  # a sort of shorter keys takes fewer passes
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    number = torch.arange(num_experts, dtype=torch.int32, device=flat.device)
    ends = torch.searchsorted(flat[order], number, right=True, out_int32=True)
    return Grouping(order, inverse, ends)


def pad_groups(g: Grouping, size: int) -> Grouping:
    """The same in blocks of `size` rows, each of one expert: padding fills up the last block of every expert."""
    rows, experts = len(g.order_R), len(g.ends_E)
    count = -(-rows // size) + experts  # enough for any routing
    sizes = torch.diff(g.ends_E, prepend=g.ends_E.new_zeros(1))
    blocks = -(-sizes // size)
    block_ends = blocks.cumsum(0)
    shift = (block_ends - blocks) * size - (g.ends_E - sizes)  # of an expert's first row
    row = torch.arange(rows, device=sizes.device)
    row = row + shift[torch.searchsorted(g.ends_E, row.to(torch.int32), right=True)]
    order = torch.full((count * size,), rows, device=row.device).scatter_(0, row, g.order_R)
    owner = torch.searchsorted(block_ends, torch.arange(count, device=row.device), right=True)
    return Grouping(order, row[g.inverse_R], (block_ends * size).to(torch.int32),
                    F.one_hot(owner.clamp_max(experts - 1), experts))


# differs from train_moe.py: no Triton kernel
def arrange(experts_NK: Tensor, num_experts: int, impl: str) -> Grouping:
    """Sorted rows as a backend wants them: `bmm` in about four blocks an expert; `loop` in multiples of LOOP_ROWS, as
    oneDNN makes a new kernel for each new size."""
    g = group_rows(experts_NK, num_experts)
    if impl == "grouped":
        return g
    return pad_groups(g, 16 * -(-len(g.order_R) // (64 * num_experts)) if impl == "bmm" else LOOP_ROWS)


class Spread(torch.autograd.Function):
    """Rows of the tokens in sorted order, (R, D). Backward gathers and sums over a token's choices: no atomics."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, order_R: Tensor, inverse_R: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.choices = choices
        return x_ND[(order_R // choices).clamp_max(len(x_ND) - 1)]  # padding: any row

    @staticmethod
    def backward(ctx, grad_RD: Tensor):
        return grad_RD[ctx.saved_tensors[0]].unflatten(0, (-1, ctx.choices)).sum(1), None, None, None


class Collect(torch.autograd.Function):
    """Sorted rows back in the order of the choices, (N * K, D): a permutation, and backward its inverse."""

    @staticmethod
    def forward(ctx, y_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.save_for_backward(order_R)
        return y_RD[inverse_R]

    @staticmethod
    def backward(ctx, grad: Tensor):
        (order,) = ctx.saved_tensors
        if len(order) == len(grad):
            return grad[order], None, None
        return torch.where((order < len(grad))[:, None], grad[order.clamp_max(len(grad) - 1)], 0), None, None


def operator(signature: str):
    """Registers a function as a torch operator, e.g. `gram(Tensor x) -> Tensor`."""
    name, _, rest = signature.partition("(")
    return torch.library.custom_op(f"{OPERATORS}::{name}", mutates_args=(), schema="(" + rest)


@operator("loop(Tensor x, Tensor weight, Tensor ends) -> Tensor")
def loop_product(x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor):
    """One product an expert. Reads the sizes of the groups on the host: the reference, and on a CPU the fastest."""
    out_RF, start = x_RD.new_empty(len(x_RD), weight_EDF.size(2)), 0
    for weight, end in zip(weight_EDF, ends_E.tolist(), strict=True):
        torch.mm(x_RD[start:end], weight, out=out_RF[start:end])
        start = end
    return out_RF


@operator("loop_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends) -> (Tensor, Tensor)")
def loop_product_backward(grad_RF: Tensor, x_RD: Tensor, weight_EDF: Tensor, ends_E: Tensor):
    x_grad, weight_grad, start = torch.empty_like(x_RD), torch.empty_like(weight_EDF), 0
    for e, end in enumerate(ends_E.tolist()):
        torch.mm(grad_RF[start:end], weight_EDF[e].T, out=x_grad[start:end])
        torch.mm(x_RD[start:end].T, grad_RF[start:end], out=weight_grad[e])
        start = end
    return x_grad, weight_grad


loop_product.register_fake(lambda x, weight, ends: x.new_empty(len(x), weight.size(2)))
loop_product_backward.register_fake(lambda grad, x, weight, ends: (torch.empty_like(x), torch.empty_like(weight)))
loop_product.register_autograd(
    lambda ctx, grad: (*loop_product_backward(grad.contiguous(), *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def expert_product(x_RD: Tensor, weight_EDF: Tensor, g: Grouping, impl: str) -> Tensor:
    """Each sorted row times its expert's matrix, (R, F)."""
    if impl == "grouped":
        return F.grouped_mm(x_RD, weight_EDF, offs=g.ends_E)
    if impl == "loop":
        return loop_product(x_RD, weight_EDF, g.ends_E)
    blocks = g.owner_GE.to(x_RD.dtype) @ weight_EDF.flatten(1)  # a product, so that its gradient is one: no atomics
    return (x_RD.unflatten(0, (len(blocks), -1)) @ blocks.unflatten(1, weight_EDF.shape[1:])).flatten(0, 1)


def among(experts: Tensor, num_experts: int) -> Tensor:
    """Numbers of experts (.., K) -> (.., E), True for those."""
    return (experts[..., None] == torch.arange(num_experts, device=experts.device)).any(-2)


class FineMixture(nn.Module):
    """DeepSeekMoE's layer: each token has `top_k` of many small experts, weighted by the router's softmax, and the
    shared ones, which side by side are one MLP. Nothing is dropped."""

    def __init__(self, s: Settings):
        super().__init__()
        self.impl, self.top_k, self.activation = s.moe_impl, s.top_k, (GATED | PLAIN)[s.mlp]
        size = s.num_experts, s.width, s.expert_hidden
        self.router = normal(s.num_experts, s.width, std=INIT_STD)
        self.experts_up = normal(*size, std=weight_std(s))
        self.experts_gate = normal(*size, std=weight_std(s)) if s.gated else None
        self.experts_down = normal(s.num_experts, s.expert_hidden, s.width, std=weight_std(s, residual=True))
        self.shared = MLP(s, s.num_shared * s.expert_hidden) if s.num_shared else None
        self.register_buffer("chosen", torch.zeros(s.num_experts, dtype=torch.int64), persistent=False)

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Output, and the row's load-balancing loss times its tokens, summed over the rows, 0-D fp32."""
        scores_BTE = F.linear(x_BTD.float(), self.router).softmax(-1)
        gates_BTK, experts_BTK = scores_BTE.topk(self.top_k)
        y_NKD = self.experts(x_BTD.flatten(0, 1), experts_BTK.flatten(0, 1))
        y = (y_NKD * gates_BTK.flatten(0, 1)[..., None]).sum(1).type_as(x_BTD).view_as(x_BTD)
        chosen_BTE = among(experts_BTK, scores_BTE.size(-1))
        if torch.is_grad_enabled():
            self.chosen += chosen_BTE.sum((0, 1))
        # of each row, so that it does not depend on micro-steps and processes; 1 where all experts have equal shares
        share_BE = chosen_BTE.float().mean(1) * (scores_BTE.size(-1) / self.top_k)
        balance = (share_BE * scores_BTE.mean(1)).sum() * x_BTD.size(1)
        return y if self.shared is None else y + self.shared(x_BTD), balance

    def experts(self, x_ND: Tensor, experts_NK: Tensor) -> Tensor:
        """Output of each expert that a token has chosen, (N, K, D)."""
        g = arrange(experts_NK, len(self.router), self.impl)
        x_RD = Spread.apply(x_ND, g.order_R, g.inverse_R, self.top_k)
        hidden = expert_product(x_RD, self.experts_up, g, self.impl)
        if self.experts_gate is None:
            hidden = self.activation(hidden)
        else:
            hidden = self.activation(expert_product(x_RD, self.experts_gate, g, self.impl)) * hidden
        y_RD = expert_product(hidden, self.experts_down, g, self.impl)
        return Collect.apply(y_RD, g.order_R, g.inverse_R).unflatten(0, (-1, self.top_k))


# differs from train_gpt.py: the baselines'
class Block(nn.Module):
    """One pre-norm layer: attention, then MLP or mixture of experts, each added to the stream."""

    # differs from train_gpt.py: the baselines'
    def __init__(self, s: Settings, layer: Layer):
        super().__init__()
        self.attn, self.attn_norm = Attention(s), Norm(s)
        self.mlp, self.mlp_norm = MLP(s, s.mlp_hidden) if layer.mixture is None else FineMixture(s), Norm(s)

    # differs from train_gpt.py: the baselines'
    def forward(self, x_BTD: Tensor, mask, cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream, and the load-balancing loss of a mixture."""
        x = x_BTD + self.attn(self.attn_norm(x_BTD), mask, cos, sin)
        y = self.mlp(self.mlp_norm(x))
        y, balance = y if isinstance(y, tuple) else (y, None)
        return x + y, balance


class UnitBlock(nn.Module):
    """One layer of ngpt: the state is a point of the unit sphere, which attention and MLP each move a learned part of
    the way to where they point, each dimension its own."""

    def __init__(self, s: Settings):
        super().__init__()
        self.attn, self.mlp = Attention(s), MLP(s, s.mlp_hidden)
        self.attn_step, self.mlp_step = (Scale(s.width, 0.05, s.width**-0.5) for _ in range(2))

    def forward(self, x_BTD: Tensor, mask, cos: Tensor, sin: Tensor) -> tuple[Tensor, None]:
        x = self.move(x_BTD, self.attn(x_BTD, mask, cos, sin), self.attn_step())
        return self.move(x, self.mlp(x), self.mlp_step()), None

    def move(self, x: Tensor, y: Tensor, step_D: Tensor) -> Tensor:
        return unit(x.float() + step_D.abs() * (unit(y) - x).float()).type_as(x)


# differs from train_gpt.py: the baselines
class GPT(nn.Module):
    """The language model. Built in fp32 on the CPU from the seed alone; the optimizer casts it to its dtype."""

    # differs from train_gpt.py: the baselines
    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        torch.manual_seed(s.seed)
        self.layers, self.flex, ngpt = layer_table(s), s.backend == "flex", s.model_type == "ngpt"
        padded = -(-vocab_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
        self.embed = nn.Embedding(padded, s.width, _weight=normal(padded, s.width, std=weight_std(s)))
        learned = s.model_type == "gpt"
        self.positions = nn.Embedding(s.longest, s.width, _weight=normal(s.longest, s.width, std=INIT_STD)) \
            if learned else None
        self.blocks = nn.ModuleList(UnitBlock(s) if ngpt else Block(s, layer) for layer in self.layers)
        self.norm = None if ngpt else Norm(s)
        self.lm_head = None if s.tied == "on" else normal(padded, s.width, std=weight_std(s))
        self.logit_scale = Scale(padded, 1.0, s.width**-0.5) if ngpt else None
        for name, table in zip(("cos", "sin"), rotary_table(max(s.seq_len, s.eval_seq_len), s.head_dim, s.rope_base),
                               strict=True):
            self.register_buffer(name, table, persistent=False)
        self.rules = training_rules(self, s)
        if ngpt:
            for name, p in self.named_parameters():
                if self.rules[name].unit:
                    p.data = unit(p.data)

    # differs from train_gpt.py: load-balancing loss
    def forward(self, inputs_BT: Tensor, targets_KBT: Tensor, docs_BT: Tensor, window: Tensor) -> Tensor:
        """Cross-entropy with the targets, (1, B, T), summed over those that are not IGNORE, in nats; with gradients and
        mixtures also their load-balancing losses times tokens, summed: (1,) or (2,) fp32. `window`: int32 0-D tensor,
        tokens; document numbers rise along a row."""
        balance: list[Tensor] = []
        losses = self.losses(self.trunk(inputs_BT, docs_BT, window, balance), targets_KBT)
        return torch.cat((losses, sum(balance)[None])) if balance and torch.is_grad_enabled() else losses

    # differs from train_gpt.py: load-balancing loss
    def trunk(self, inputs_BT: Tensor, docs_BT: Tensor, window: Tensor, balance: list[Tensor] | None = None) -> Tensor:
        """Residual stream after the last layer, (B, T, D). Load-balancing losses are appended to `balance`."""
        x, mask = self.embedding(inputs_BT, docs_BT), self.masks(docs_BT, window)["L"]
        # ngpt scales dimensions after rotating them, so q.k is no function of the distance alone
        place = document_positions(docs_BT) if self.logit_scale is not None else slice(inputs_BT.size(1))
        cos, sin = (None, None) if self.positions is not None else (self.cos[place], self.sin[place])
        for block in self.blocks:
            x, own = block(x, mask, cos, sin)
            if balance is not None and own is not None:
                balance.append(own)
        return x

    # differs from train_gpt.py: one kind of layer
    def masks(self, docs_BT: Tensor, window: Tensor) -> dict:
        """Mask of each kind of layer, made once per forward pass."""
        return {"L": (block_mask if self.flex else dense_mask)(docs_BT, window)}

    # differs from train_gpt.py: learned positions
    def embedding(self, inputs_BT: Tensor, docs_BT: Tensor) -> Tensor:
        """Token embeddings, with gpt those of the places in the documents, too."""
        x = self.embed(inputs_BT)
        return x if self.positions is None else x + self.positions(document_positions(docs_BT))

    @property
    def head_weight(self) -> Tensor:
        return self.embed.weight if self.lm_head is None else self.lm_head

    # differs from train_gpt.py: no cap, a learned scale
    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits."""
        z = F.linear(x_BTD if self.norm is None else self.norm(x_BTD), self.head_weight)
        return z if self.logit_scale is None else z * self.logit_scale()

    # differs from train_gpt.py: plain
    def losses(self, x_BTD: Tensor, targets_KBT: Tensor) -> Tensor:
        logits_NV = self.head(x_BTD).flatten(0, 1).float()
        return F.cross_entropy(logits_NV, targets_KBT.flatten().long(), reduction="sum", ignore_index=IGNORE)[None]


# differs from train_gpt.py: tied heads, experts
def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters by kind; `matmul`: those that multiply a token (for FLOPs), `active`: that it meets."""
    kinds = {"embed": "embedding", "positions": "embedding", "blocks": "hidden", "lm_head": "head"}
    counts, idle = dict.fromkeys(("hidden", "embedding", "head", "small"), 0), 0
    for name, p in model.named_parameters():
        counts[kinds.get(name.split(".")[0], "small") if p.dim() > 1 else "small"] += p.numel()
        if ".experts_" in name:
            idle += p.numel() * (len(p) - model.get_submodule(name.rpartition(".")[0]).top_k) // len(p)
    total = sum(counts.values())
    matmul = counts["hidden"] - idle + model.head_weight.numel()
    return counts | {"total": total, "active": total - idle, "matmul": matmul}


# differs from train_gpt.py: one window
def flops_per_token(s: Settings, counts: dict[str, int], stage: Stage) -> float:
    """FLOPs of forward and backward per token: 6 per matmul parameter, and 12 * model_dim per visible key of each
    attention layer (q.k and weighted sum, 2 FLOPs each, times 3). Keys: the average over a causal row cut at the window
    and at max_doc_len; shorter documents are not subtracted."""
    length = s.longest
    window = min(s.window or length, length)
    keys = s.num_layers * (window - window * (window - 1) / (2 * length))
    return 6.0 * counts["matmul"] + 12.0 * s.width * keys


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimizer                                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# One class for one rank or many. Each gradient is packed, freed and reduced into the shard of the rank that owns it as
# soon as it is complete in the last micro-step's backward pass; optimizer state and fp32 master weights exist on the
# owner only (ZeRO-2); after the update the owner's weights are gathered by all. Small parameters are all-reduced and
# updated by every rank.


# differs from train_gpt.py: last parts of names
FP32_PARAMETERS = ("scale", "router")  # last parts of names of parameters that are not rounded to bf16


class World(NamedTuple):
    """Place of this process among all."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


# differs from train_gpt.py: no width transfer, unit vectors
class Rule(NamedTuple):
    """One row of the parameter table."""

    pattern: str  # of the parameter names, a full match
    kind: str  # muon or adamw
    lr: float  # peak learning rate
    betas: tuple[float, float]  # of adamw; of muon: unused (scheduled momentum), beta2 of the variance
    # differs from train_gpt.py: schedules
    weight_decay: float  # per unit of the learning rate
    comm: str  # sharded: its owner updates it; replicated: every rank does
    eps: float = 0.0  # of adamw
    unit: bool = False  # rows, along the last axis, have norm 1 after each step
    transposed: bool = False  # stored as (inputs, outputs)


# differs from train_gpt.py: the baselines
def parameter_table(s: Settings) -> list[Rule]:
    """How each parameter is trained: matrices and tables decay, vectors do not (as in nanoGPT)."""
    unit, betas = s.model_type == "ngpt", (s.beta1, s.beta2)
    adamw = "adamw", s.max_lr, betas, 0.0 if unit else s.weight_decay, "sharded", s.adam_eps, unit
    muon = "muon", s.muon_lr, (0.0, s.muon_beta2), 0.0 if unit else s.muon_weight_decay, "sharded", 0.0, unit
    hidden = muon if s.optimizer == "muon" else adamw
    small = "adamw", s.max_lr, betas, 0.0, "replicated", s.adam_eps
    block = r"blocks\.\d+\."
    return [
        Rule(block + r"attn\.(q|kv)", *hidden),
        Rule(block + r"attn\.out", *hidden, transposed=True),
        Rule(block + r"mlp\.(shared\.)?(up|gate)", *hidden),
        Rule(block + r"mlp\.(shared\.)?down", *hidden, transposed=True),
        Rule(block + r"mlp\.experts_\w+", *hidden, transposed=True),
        Rule(block + r"mlp\.router", *adamw[:4], "replicated", s.adam_eps),
        Rule(r"(embed|positions)\.weight|lm_head", *adamw),
        Rule(r".*(gain|bias|biases\.\d|scale)", *small),
    ]


def match_rules(table: list[Rule], names: list[str]) -> dict[str, Rule]:
    """Parameter name -> its row of the table. Every parameter must match exactly one."""
    matches = {name: [rule for rule in table if re.fullmatch(rule.pattern, name)] for name in names}
    wrong = {name: [rule.pattern for rule in rules] for name, rules in matches.items() if len(rules) != 1}
    assert not wrong, f"parameter_table must cover each parameter exactly once, but: {wrong}"
    return {name: rules[0] for name, rules in matches.items()}


def training_rules(model: nn.Module, s: Settings) -> dict[str, Rule]:
    """Parameter name -> its rule, with Muon's factor sqrt(max(1, outputs / inputs)) in the learning rate (Jordan et al.
    2024)."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    rules = match_rules(parameter_table(s), list(shapes))
    for name, rule in rules.items():
        if rule.kind == "muon":
            inputs, outputs = shapes[name][-2:] if rule.transposed else shapes[name][:-3:-1]
            rules[name] = rule._replace(lr=rule.lr * max(1.0, outputs / inputs) ** 0.5)
    return rules


# Minimax-optimal quintic steps of Polar Express (Amsel et al. 2025, arXiv 2505.16932; 5 steps, safety 2e-2, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # Muon's quintic (Jordan et al. 2024)


# differs from train_gpt.py: no kernel
def gram(x_KMN: Tensor, add_KMM: Tensor | None, alpha: float, beta: float, kernel: bool) -> Tensor:
    """alpha * x @ x.mT + beta * add, `add` symmetric."""
    if add_KMM is None:
        return x_KMN @ x_KMN.mT if alpha == 1 else alpha * (x_KMN @ x_KMN.mT)
    return torch.baddbmm(add_KMM, x_KMN, x_KMN.mT, beta=beta, alpha=alpha)


def orthogonalize(matrices: Tensor, method: str, dtype: torch.dtype, kernel: bool = False) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of (K, rows, cols), approximately: singular values go to about 1."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    slack, steps = (1.02, POLAR_EXPRESS) if method == "polar_express" else (1.0, NEWTON_SCHULZ)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * slack + 1e-7)).to(dtype)
    for a, b, c in steps:
        square = gram(x, None, 1.0, 0.0, kernel)
        x = torch.baddbmm(x, gram(square, square, c, b, kernel), x, beta=a)
    return x.mT if tall else x


def normalize_variance(update: Tensor, variance: Tensor, new_share: Tensor) -> Tensor:
    """NorMuon (Li et al. 2025, arXiv 2510.05491): divides each row (of a wide matrix: each column) of the update by the
    running root-mean-square of its entries, then restores the matrix's norm. No bias correction is needed: a common
    factor cancels. `variance`: (K, rows, 1) or (K, 1, cols), updated in place."""
    before = update.norm(dim=(-2, -1), keepdim=True)
    variance.lerp_(update.square().mean(dim=-1 if variance.size(-1) == 1 else -2, keepdim=True), new_share)
    update = update * variance.clamp_min(1e-10).rsqrt()
    return update * (before / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))


def muon_update(master: Tensor, grad: Tensor, momentum: Tensor, variance: Tensor | None, lr: Tensor,
                weight_decay: Tensor, mu: Tensor, new_share: Tensor, method: str, dtype: torch.dtype, cautious: bool,
                kernel: bool = False):
    """One Muon step on (K, rows, cols) matrices, in place (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    lr (K, 1, 1); mu: momentum; variance None: without NorMuon."""
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    update = orthogonalize(torch.lerp(grad, momentum, mu), method, dtype, kernel).float()
    if variance is not None:
        update = normalize_variance(update, variance, new_share)
    apply_update(master, update, lr, weight_decay, cautious)


def adamw_update(master: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, lr: Tensor, weight_decay: Tensor,
                 new_share1: Tensor, new_share2: Tensor, correction1: Tensor, correction2: Tensor, eps: float,
                 cautious: bool):
    """One AdamW step on a flat shard, in place (Loshchilov & Hutter 2019, arXiv 1711.05101). new_share: 1 - beta;
    correction: 1 - beta^step."""
    grad = grad.float()
    exp_avg.lerp_(grad, new_share1)
    exp_avg_sq.lerp_(grad.square(), new_share2)
    update = exp_avg / correction1 / ((exp_avg_sq / correction2).sqrt() + eps)
    apply_update(master, update, lr, weight_decay, cautious)


def apply_update(master: Tensor, update: Tensor, lr: Tensor, weight_decay: Tensor, cautious: bool):
    """master -= lr * (update + decay * master), the decay only where it and the update agree in sign if `cautious`
    (Chen et al. 2025, arXiv 2510.12402)."""
    decay = weight_decay * master
    master.sub_(lr * (update + (decay * (update * master >= 0) if cautious else decay)))


# differs from train_gpt.py: clipping, schedule of the decay, unit rows
class Bank:
    """Parameters that one call updates, cut into slots of one shape: a matrix each for Muon, 1/ranks of a flat
    parameter for AdamW. Slot k * owners + r belongs to rank r; the slots of one k, a round, travel in one collective.

    `state` holds the own slots, fp32: master (the weights) and the moments, each (rounds, *slot)."""

    # differs from train_gpt.py: unit rows, names of fp32 parameters
    def __init__(self, named: list[tuple[str, nn.Parameter]], rules: dict[str, Rule], s: Settings, world: World):
        self.params, self.s, self.world = dict(named), s, world
        self.rule, first = rules[named[0][0]], named[0][1]
        self.owners = world.size if self.rule.comm == "sharded" else 1
        self.muon = self.rule.kind == "muon"
        row = first.size(-1) if self.rule.unit else 1  # is not cut
        self.slot_shape = tuple(first.shape[-2:]) if self.muon else (row * -(-first.numel() // (row * self.owners)),)
        self.slots = [(name, i) for name, p in named for i in range(len(self.cut(p)))]
        self.rounds = [self.slots[k:k + self.owners] for k in range(0, len(self.slots), self.owners)]
        self.own = [k * self.owners + (world.rank if self.owners > 1 else 0) for k in range(len(self.rounds))]
        self.lr = torch.tensor([rules[self.slots[i][0]].lr if i < len(self.slots) else 0.0 for i in self.own],
                               device=s.device).view(-1, *(1 for _ in self.slot_shape))
        self.update_function = compiled(muon_update if self.muon else adamw_update, s)
        self.state = {"master": self.own_slots({name: p.detach() for name, p in named})}
        for name, p in named:
            p.data = p.data.to(s.device, torch.float32 if name.split(".")[-1] in FP32_PARAMETERS else s.torch_dtype)
        # one rank keeps fp32 sums of micro-steps as they are; several reduce in the parameters' dtype
        self.grad = torch.zeros_like(self.state["master"], dtype=first.dtype if world.size > 1 else torch.float32)
        self.in_flight: list[tuple] = []  # (work, tensors it uses): all must live until the wait
        self.hyper = {key: torch.zeros((), device=s.device) for key in ("decay", "mu", "share1", "share2", "c1", "c2")}
        self.expect()
        self.reset()

    def reset(self):
        """Zero moments, as before the first step."""
        master = self.state["master"]
        moments = ["momentum"] if self.muon else ["exp_avg", "exp_avg_sq"]
        self.state |= {key: torch.zeros_like(master) for key in moments}
        if self.muon and self.s.muon_beta2:
            rows_longer = self.slot_shape[0] >= self.slot_shape[1]
            self.state["variance"] = torch.zeros_like(master[..., :1] if rows_longer else master[:, :1])

    def cut(self, tensor: Tensor, slot_shape: tuple[int, ...] | None = None) -> Tensor:
        """A whole tensor as slots, (number, *slot), padded with zeros where it does not divide."""
        shape = slot_shape or self.slot_shape
        short = -tensor.numel() % math.prod(shape)
        return (F.pad(tensor.flatten(), (0, short)) if short else tensor.flatten()).view(-1, *shape)

    def expect(self):
        """Before a backward pass: the names of the parameters whose gradients each round waits for."""
        self.waiting = [{name for name, _ in slots} for slots in self.rounds]
        self.arrived: dict[str, Tensor] = {}

    def receive(self, name: str, grad: Tensor):
        """A parameter's gradient is complete: reduces every round that now has all it needs, and frees what no other
        round needs."""
        self.arrived[name] = self.cut(grad)
        for k, needs in enumerate(self.waiting):
            if name in needs:
                needs.remove(name)
                if not needs:
                    self.reduce(k)
        unfinished = {name for k, slots in enumerate(self.rounds) if self.waiting[k] for name, _ in slots}
        self.arrived = {name: slots for name, slots in self.arrived.items() if name in unfinished}

    def reduce(self, k: int):
        """Sums a round's gradients over the ranks into the owners' shards, asynchronously."""
        pieces = [self.arrived[name][i] for name, i in self.rounds[k]]
        if self.owners == 1:
            self.grad[k] = pieces[0]
            if self.world.size > 1:
                self.in_flight.append((dist.all_reduce(self.grad[k], async_op=True), None))
            return
        pieces += [torch.zeros_like(pieces[0])] * (self.owners - len(pieces))
        packed = torch.cat(pieces).to(self.grad.dtype)  # one after the other: gloo takes no stacked tensor
        work = dist.reduce_scatter_tensor(self.grad[k], packed, async_op=True)
        self.in_flight.append((work, packed))

    def wait(self):
        """Waits for the own gradients."""
        for work, _ in self.in_flight:
            work.wait()
        self.in_flight = []
        self.expect()

    # differs from train_gpt.py: clipping, schedule of the decay, unit rows
    def step(self, scale: float, decay: float, mu: float, step: int, clip: Tensor | None):
        """Updates the own slots, by gradients times `clip`, and sends them off, asynchronously."""
        state, h, (beta1, beta2) = self.state, self.hyper, self.rule.betas
        if clip is not None:
            self.grad.mul_(clip)
        values = dict(decay=self.rule.weight_decay * decay, mu=mu, share1=1 - beta1, share2=1 - beta2,
                      c1=1 - beta1**step, c2=1 - beta2**step)
        for key, value in values.items():
            h[key].fill_(value)
        common = state["master"], self.grad
        if self.muon:
            self.update_function(*common, state["momentum"], state.get("variance"), self.lr * scale, h["decay"],
                                 h["mu"], h["share2"], self.s.orthogonalizer, self.s.torch_dtype, False)
        else:
            self.update_function(*common, state["exp_avg"], state["exp_avg_sq"], self.lr * scale, h["decay"],
                                 h["share1"], h["share2"], h["c1"], h["c2"], self.rule.eps, False)
        if self.rule.unit and scale:
            rows = state["master"].view(-1, next(iter(self.params.values())).size(-1))
            rows.copy_(unit(rows))
        self.send_weights()

    def send_weights(self):
        """Starts to gather the new weights of all owners, one collective a round."""
        if self.owners == 1:
            return
        dtype = next(iter(self.params.values())).dtype
        for own in self.state["master"]:
            sent = own.to(dtype)
            received = torch.empty(self.owners, *self.slot_shape, dtype=dtype, device=sent.device)
            work = dist.all_gather_into_tensor(received.flatten(0, 1), sent, async_op=True)
            self.in_flight.append((work, sent, received))

    def receive_weights(self):
        """Writes the weights of all owners into the parameters."""
        for work, *_ in self.in_flight:
            work.wait()
        slots = torch.cat([received for *_, received in self.in_flight]) if self.in_flight else self.state["master"]
        self.in_flight = []
        torch._foreach_copy_([p.data for p in self.params.values()], list(self.join(slots).values()))

    def join(self, slots: Tensor) -> dict[str, Tensor]:
        """Slots of all owners in order -> parameter name: whole tensor (views where possible)."""
        whole, start, slot_numel = {}, 0, math.prod(self.slot_shape)
        for name, p in self.params.items():
            count = -(-p.numel() // slot_numel)
            part, start = slots[start:start + count], start + count
            same = part.shape[1:] == self.slot_shape
            whole[name] = part.flatten()[:p.numel()].view_as(p) if same else part
        return whole

    def full(self, key: str) -> dict[str, Tensor]:
        """State `key` of all parameters by name, whole, on the CPU of rank 0; {} elsewhere. Collective."""
        own = self.state[key]
        if self.owners > 1:
            gathered = torch.empty(self.owners, *own.shape, device=own.device)
            dist.all_gather_into_tensor(gathered.flatten(0, 1), own)
            own = gathered.transpose(0, 1).flatten(0, 1)
        return {} if self.world.rank else {name: t.to("cpu", copy=True) for name, t in self.join(own).items()}

    def own_slots(self, whole: dict[str, Tensor], slot_shape: tuple[int, ...] | None = None) -> Tensor:
        """The own slots of whole tensors by name, fp32 on the device; zero where there are fewer slots than ranks."""
        slots = torch.cat([self.cut(whole[name], slot_shape) for name in self.params])
        missing = len(self.rounds) * self.owners - len(slots)
        slots = F.pad(slots, [0, 0] * (slots.dim() - 1) + [0, missing])
        return slots[self.own].to(self.s.device, torch.float32).contiguous()

    def load(self, saved: dict[str, dict[str, Tensor]]):
        """State as `full` gave it to rank 0, one tensor at a time to all ranks. Collective."""
        for key, old in self.state.items():
            whole = {n: on_rank_zero(self.world, lambda k=key, n=n: saved[k][n].clone()) for n in self.params}
            self.state[key] = self.own_slots(whole, tuple(old.shape[1:]))
        self.send_weights()
        self.receive_weights()


# differs from train_gpt.py: clipping, schedule of the decay
class MuonAdamW:
    """The optimizer of a model: hooks that reduce gradients during backward, and the step over all banks."""

    # differs from train_gpt.py: clipping
    def __init__(self, model: nn.Module, s: Settings, world: World):
        named = list(reversed(list(model.named_parameters())))  # about the order in which backward completes them
        rules, unknown = model.rules, {name for name, _ in named} - model.rules.keys()
        assert not unknown, f"parameters that came after the model's construction: {unknown}"
        groups: dict[tuple, list] = {}  # Muon: matrices of one shape and decay together; AdamW: each for itself
        for name, p in named:
            alike = (*p.shape[-2:], rules[name].weight_decay) if rules[name].kind == "muon" else name
            groups.setdefault(alike, []).append((name, p))
        self.steps, self.last_micro_step, self.world = 0, True, world
        self.limit, self.norm = s.grad_clip, torch.zeros((), device=s.device)  # of the last gradient
        self.banks = [Bank(group, rules, s, world) for group in groups.values()]
        self.sums: dict[str, Tensor] = {}  # fp32 gradient sums of earlier micro-steps
        for bank in self.banks:
            for name, p in bank.params.items():
                p.register_post_accumulate_grad_hook(lambda p, name=name, bank=bank: self._on_gradient(name, p, bank))

    def _on_gradient(self, name: str, p: nn.Parameter, bank: Bank):
        """Runs inside backward when a parameter's gradient is complete. Micro-steps are summed in fp32."""
        grad, p.grad = p.grad, None
        if name in self.sums:
            grad = self.sums.pop(name).add_(grad)
        if self.last_micro_step:
            bank.receive(name, grad)
        else:
            self.sums[name] = grad.float()

    # differs from train_gpt.py: clipping, schedule of the decay
    def step(self, scale: float, momentum: float, decay: float = 1.0):
        """Updates all parameters. `scale`: the schedule's factor on all learning rates; `momentum`: Muon's; `decay`:
        the factor on weight decay / rate.

        Raises RuntimeError that names the parameters whose gradient never came."""
        missing = sorted({name for bank in self.banks for needs in bank.waiting for name in needs})
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}: every parameter must take part in the loss")
        self.steps += 1
        for bank in self.banks:
            bank.wait()
        clip = self.clip() if self.limit else None
        for bank in self.banks:
            bank.step(scale, decay, momentum, self.steps, clip)
        for bank in self.banks:
            bank.receive_weights()

    def clip(self) -> Tensor:
        """Factor on all gradients, 0-D, that limits the norm of all together. Each rank has a share of the sharded ones
        and all of the others. Nothing waits for the device."""
        squares = {"sharded": [], "replicated": []}
        for bank in self.banks:
            squares[bank.rule.comm].append(bank.grad.float().square().sum())
        zero = torch.zeros_like(self.norm)
        sharded, replicated = (sum(part, zero) for part in squares.values())
        if self.world.size > 1:
            dist.all_reduce(sharded)
        self.norm = (sharded + replicated).sqrt()
        return (self.limit / (self.norm + 1e-6)).clamp_max(1.0)

    def reset(self):
        """As before the first step, with the weights at hand."""
        self.steps = 0
        for bank in self.banks:
            bank.reset()

    def state_dict(self) -> dict:
        """{"steps": n, "state": {key: {parameter name: whole fp32 tensor}}}, tensors on rank 0 only. Collective."""
        state: dict[str, dict[str, Tensor]] = {}
        for bank in self.banks:
            for key in bank.state:
                state.setdefault(key, {}).update(bank.full(key))
        return {"steps": self.steps, "state": state}

    def load_state_dict(self, saved: dict):
        """Restores what state_dict gave, on any number of ranks (`saved` counts on rank 0), and the model's weights."""
        self.steps = on_rank_zero(self.world, lambda: saved["steps"])
        for bank in self.banks:
            bank.load(saved.get("state", {}))


def compiled(function, s: Settings):
    """torch.compile with static shapes and whole graphs, or the function itself."""
    if not s.compile:
        return function
    torch._dynamo.config.recompile_limit = 256  # counted per function, and all blocks and banks share theirs
    return torch.compile(function, dynamic=False, fullgraph=True)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"] if "torch._dynamo" in sys.modules else 0


def compile_model(model: GPT, s: Settings):
    """One graph; or one per block: then the gradients of a block are complete, and their reduction starts, while
    earlier blocks are still in their backward pass. A single graph hands over all gradients at its end."""
    if s.compile_unit == "model":
        model.forward = compiled(model.forward, s)
        return
    parts = [(model, "embedding"), (model, "masks"), (model, "losses")]
    for module, name in parts + [(block, "forward") for block in model.blocks]:
        setattr(module, name, compiled(getattr(module, name), s))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Schedule                                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


# differs from train_gpt.py: nanoGPT's warm-up and cosine
def lr_scale(s: Settings, stages: list[Stage], step: int) -> float:
    """Factor on all learning rates at training step `step`: linear warm-up, then half a cosine down to min_lr, or for
    wsd constant and at the end linear down to it."""
    if step < s.warmup_steps:
        return (step + 1) / (s.warmup_steps + 1)
    if s.schedule == "cosine":
        left = (1 + math.cos(math.pi * (step - s.warmup_steps) / (s.iterations - s.warmup_steps))) / 2
    else:
        left = min(1.0, (s.iterations - step) / max(1, s.cooldown * s.iterations))
    floor = s.min_lr / s.max_lr if s.max_lr else 0.0
    return floor + (1 - floor) * left


def decay_scale(s: Settings, step: int, rate: float) -> float:
    """Factor on weight decay / rate: 1, decoupled AdamW's; `rate`, lr_scale's, which the decay then has squared; or a
    line down to 0."""
    return {"constant": 1.0, "rate": rate, "linear": 1 - step / s.iterations}[s.decay_schedule]


def momentum_at(s: Settings, step: int) -> float:
    """Muon's momentum: up over momentum_warmup steps, down again over the last momentum_cooldown."""
    part = min(1.0, step / max(1, s.momentum_warmup), (s.iterations - step) / max(1, s.momentum_cooldown))
    return s.momentum_start + (s.muon_momentum - s.momentum_start) * part


# differs from train_gpt.py: constant
def window_at(s: Settings, stages: list[Stage], step: int) -> int:
    """Attention window in tokens, of all layers and steps."""
    longest = max(s.seq_len, s.eval_seq_len)
    return min(s.window or longest, longest)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluation                                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


# differs from train_gpt.py: no longer windows
@torch.no_grad()
def evaluate(model: nn.Module, stream: ValStream, s: Settings, world: World, window: int,
             batches: int | None = None) -> float:
    """Mean loss of the validation stream (or its first `batches`) in nats per token, equal on all ranks. Collective."""
    rows = max(1, min(s.micro_tokens // stream.seq_len, -(-stream.num_rows // world.size)))
    window_tensor = torch.tensor(window, dtype=torch.int32, device=s.device)
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    for start in range(0, stream.num_rows, rows * world.size)[:batches]:
        inputs, targets, docs = torch.from_numpy(stream.rows(start + world.rank * rows, rows)).to(s.device)
        total += model(inputs, targets[None], docs, window_tensor)[0]
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / stream.num_tokens


class HellaSwag:
    """Periodic scores by evals/hellaswag.py, imported only here; ranks share its rows. A text has at most some 200
    tokens, so the window is that of the step. Raises UserError where the model cannot be scored."""

    def __init__(self, s: Settings, meta: dict, world: World):
        try:
            from evals import hellaswag as tool
        except ImportError as error:
            raise UserError(f"--hellaswag_every: {error}; evals/, data/ and generate.py belong beside this script") \
                from error
        self.tool, self.s, self.world = tool, s, world
        self.row_len = min(s.eval_seq_len, 256 if s.device == "cpu" else 1024)  # dense masks grow with its square
        if reason := tool.does_not_apply(meta):
            raise UserError(f"--hellaswag_every: {reason}")
        try:
            tasks = tool.read_tasks(Path(s.hellaswag_file or tool.FILE), s.hellaswag_tasks)
            self.packed = tool.pack(tasks, self.row_len)
        except (ValueError, RuntimeError) as error:  # a damaged file; a text longer than a row; no tokenizer
            raise UserError(f"--hellaswag_every: {str(error).replace('--row-len', '--eval_seq_len')}") from error

    def losses(self, model: nn.Module, window: int, batches: int | None = None) -> Tensor:
        """Of all endings, (tasks, 4), equal on all ranks, or of the first batches of rows. Collective."""
        trunk = compiled(model.trunk, self.s) if self.s.compile_unit == "model" else model.trunk
        rows = max(1, self.s.micro_tokens // self.row_len)
        losses = self.tool.ending_losses(trunk, model.head, self.packed, window, rows, self.s.device, self.world.rank,
                                         self.world.size, batches)
        if self.world.size > 1:
            dist.all_reduce(losses)
        return losses

    def score(self, model: nn.Module, window: int):
        """Accuracies. Raises RuntimeError if a loss is not finite. Collective."""
        return self.tool.score(self.losses(model, window), self.packed)


def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Loss in nats per token -> bits per byte of text, by the val split's tokens per byte; None where not known."""
    split = meta["splits"].get("val", {})
    known = split.get("bytes") and split.get("tokens")
    return loss / math.log(2) * split["tokens"] / split["bytes"] if known else None


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Checkpoint                                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# RUN/checkpoints/step_000500/ holds state.pt (tensors by parameter name, whole, fp32) and meta.json (settings, position
# in the data, clock, tokenizer, sha256 of state.pt). It is written under another name and renamed when complete.


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checkpoint(run_folder: Path, step: int, state: dict, meta: dict, keep: int) -> Path:
    """Writes a checkpoint, then removes all but the newest `keep`. Raises OSError and leaves nothing half-written when
    the disk is full; earlier checkpoints stay."""
    final = run_folder / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        meta = meta | {"step": step, "sha256": file_hash(temporary / "state.pt")}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"could not write {final}: {str(error).splitlines()[0]}") from error
    shutil.rmtree(final, ignore_errors=True)  # there only if a run was resumed from an earlier checkpoint
    os.replace(temporary, final)
    others = [path for path in final.parent.glob("step_*[0-9]") if path != final]
    others.sort(key=lambda path: path.stat().st_mtime_ns, reverse=True)  # not by step: a run may have gone back
    for old in others[keep - 1:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def find_checkpoint(s: Settings) -> tuple[Path, dict]:
    """The checkpoint that --resume names, and its meta.json. A damaged one is reported and the one before it is taken.
    Raises FileNotFoundError if there is none at all, UserError if all are damaged."""
    place = Path(s.log_dir) / s.experiment_name if s.resume == "latest" else Path(s.resume)
    found = [*place.glob("checkpoints/step_*[0-9]"), *place.glob("*/checkpoints/step_*[0-9]")]
    if place.name.startswith("step_"):  # one checkpoint; those before it are its fallback
        found = [path for path in place.parent.glob("step_*[0-9]") if path.name <= place.name]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {place}: start without --resume, or name a run's folder")
    for path in sorted(found, key=lambda path: (path.stat().st_mtime, path.name), reverse=True):
        try:
            meta = json.loads((path / "meta.json").read_text())
            if file_hash(path / "state.pt") == meta["sha256"]:
                return path, meta
            reason = "state.pt does not match its sha256"
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = repr(error)
        print(f"checkpoint {path} is damaged ({reason}); trying the one before it", flush=True)
    raise UserError(f"all {len(found)} checkpoint(s) in {place} are damaged: start without --resume")


def check_resumable(s: Settings, fingerprint: str, path: Path, meta: dict):
    """Raises UserError that names the settings, or data, in which a checkpoint differs from this run."""
    now = json.loads(json.dumps(dataclasses.asdict(s))) | {"data_fingerprint": fingerprint}
    then = meta["settings"] | {"data_fingerprint": meta["data"]["fingerprint"]}
    differing = [f"{key}: {then.get(key)} in the checkpoint, {value} now" for key, value in now.items()
                 if key not in RESUME_MAY_CHANGE and then.get(key) != value]
    if differing:
        raise UserError("\n  ".join([f"{path} has other settings; use them, or start without --resume:", *differing]))


def on_rank_zero(world: World, function, *arguments):
    """What `function` returns on rank 0, on all ranks; what it raises there, everywhere. Collective."""
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


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Logging                                                                                                            │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

# Dense bf16 rates of NVIDIA's data sheets, FLOP/s, by a word of the GPU's name; the first match counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "GH200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
              "H800": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "A10": 125e12, "A40": 150e12,
              "RTX 5090": 210e12, "RTX 4090": 165e12, "RTX 3090": 71e12}


def model_flops_utilization(tokens_per_s: float, flops: float, gpu: str, count: int) -> float | None:
    """MFU = tokens/s * FLOPs per token / (peak bf16 FLOP/s of the GPU * count); None where the peak is unknown (CPUs).
    FLOPs as in flops_per_token: the optimizer does not count, and fp8 products count against the bf16 peak."""
    peak = next((peak for part, peak in PEAK_FLOPS.items() if re.search(rf"\b{part}\b", gpu)), None)
    return tokens_per_s * flops / (peak * count) if peak else None


def command_output(*command: str) -> str | None:
    """What a command prints, run in the script's folder; None where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True,
                              timeout=30).stdout.strip()


def environment_text(hardware: Hardware) -> str:
    """Versions and devices, as the public logs give them."""
    device = (f"Running on CPU: {hardware.name}, {torch.get_num_threads()} threads, {hardware.memory_gib:.1f} GiB, "
              f"{torch.backends.cpu.get_cpu_capability()}, {platform.platform()}")
    if hardware.device == "cuda":
        device = command_output("nvidia-smi") or hardware.name
    return "\n".join([f"Running Python {sys.version}",
                      f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}", device])


def seconds_since_process_start() -> float:
    """Age of this process, imports included; on systems without /proc, its CPU time stands in."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - started
    return time.process_time()


def peak_memory_mib(device: str) -> tuple[int, int]:
    """Peak allocated and reserved MiB of the GPU; on a CPU the process's peak resident memory, twice."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() >> 20, torch.cuda.max_memory_reserved() >> 20
    import resource  # not on Windows
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) >> 20
    return resident, resident


class RunLog:
    """Files of a run, written by rank 0 only: log.txt (public record format), metrics.jsonl, config.json, wandb."""

    def __init__(self, folder: Path):
        self.main, self.folder, self.wandb = False, folder, None

    def open(self, s: Settings, hardware: Hardware, config: dict, resumed_at: int | None):
        """On rank 0: opens the files, and writes their head or, in a resumed run, where it went on."""
        folder, self.main = self.folder, True
        folder.mkdir(parents=True, exist_ok=True)
        self.text = open(folder / "log.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open all the run long
        self.metrics = open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        if s.wandb:
            try:
                import wandb
            except ImportError as error:
                raise UserError("--wandb: Weights & Biases is not installed; pip install wandb") from error
            self.wandb = wandb.init(project="nanospeedrun", group=s.experiment_name, name=folder.name, id=folder.name,
                                    dir=str(folder), resume="allow", config=config)
        if resumed_at is not None:
            self.line(f"resumed after step {resumed_at}")
            self.metric(event="resume", step=resumed_at, config=config)
            return
        source, bar = Path(__file__).read_text(encoding="utf-8"), "=" * 100
        settings = json.dumps(config["settings"])  # of the command line: the source knows only its defaults
        self.text.write(f"{source}\n{bar}\n{environment_text(hardware)}\nSettings: {settings}\n{bar}\n")
        (folder / "config.json").write_text(json.dumps(config, indent=1))

    def print(self, text: str):
        """To the console."""
        if self.main:
            print(text, flush=True)

    def line(self, text: str):
        """To log.txt."""
        if self.main:
            self._append(self.text, text)

    def _append(self, file, text: str):
        """A full disk costs lines of the logs, not the run."""
        try:
            file.write(text + "\n")
        except OSError as error:
            self.print(f"warning: {file.name}: {error.strerror}; training goes on")

    def metric(self, **values):
        """To metrics.jsonl and wandb."""
        if self.main:
            self._append(self.metrics, json.dumps(values))
            if self.wandb is not None:
                self.wandb.log({k: v for k, v in values.items() if isinstance(v, int | float)}, step=values["step"])

    def close(self):
        if self.main:
            for file in (self.text, self.metrics):
                with contextlib.suppress(OSError):  # lines that a full disk did not take, and that were told
                    file.close()
            if self.wandb is not None:
                self.wandb.finish()


def covered(spans: list[tuple[float, float]]) -> float:
    """Total length of the union of intervals."""
    total, reach = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return total


def communication_overlap(trace: dict) -> str:
    """From a Chrome trace: time in collectives and how much of it ran beside computation. On a GPU both are kernels; on
    a CPU collectives are gloo's operations, on threads of their own, and computation is the other operators."""
    events = [e for e in trace["traceEvents"] if e.get("ph") == "X" and e.get("dur")]
    pool = [e for e in events if e.get("cat") == "kernel"] or [e for e in events if re.match("aten::|gloo:", e["name"])]
    spans: dict[bool, list] = {True: [], False: []}
    for e in pool:
        spans[e["name"].startswith(("nccl", "gloo:"))].append((e["ts"], e["ts"] + e["dur"]))
    busy = covered(spans[True])
    beside = busy + covered(spans[False]) - covered(spans[True] + spans[False])
    return f"communication {busy / 1e3:.1f} ms, {beside / 1e3:.1f} ms of it beside computation"


def make_profiler(s: Settings, world: World, folder: Path, say):
    """torch.profiler over steps [profile_start, profile_start + profile_steps) of this process: a trace per rank for
    ui.perfetto.dev, a table of the heaviest operations, on CUDA a memory snapshot."""
    cuda, kinds = s.device == "cuda", torch.profiler.ProfilerActivity

    def report(profiler):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"trace_rank{world.rank}.json"
        profiler.export_chrome_trace(str(path))
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        say(profiler.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))
        say(f"{s.profile_steps} steps: {communication_overlap(json.loads(path.read_text()))}")
        say(f"trace, for ui.perfetto.dev: {path}")
        if cuda:
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_rank{world.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
            say(f"memory snapshot, for pytorch.org/memory_viz: {folder}/memory_rank{world.rank}.pickle")

    if cuda:
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    warmup = min(1, s.profile_start)
    plan = torch.profiler.schedule(wait=s.profile_start - warmup, warmup=warmup, active=s.profile_steps, repeat=1)
    activities = [kinds.CPU, kinds.CUDA] if cuda else [kinds.CPU]
    return torch.profiler.profile(activities=activities, schedule=plan, on_trace_ready=report)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Main                                                                                                               │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


class Clock:
    """Training time in ms as the public rules count it: the device is waited for at every start and stop; validation,
    checkpoints, profiles and warm-up lie outside."""

    def __init__(self, device: str):
        self.total_ms, self.started, self.wait = 0.0, None, torch.cuda.synchronize if device == "cuda" else lambda: None

    def start(self):
        self.wait()
        self.started = time.perf_counter()

    def stop(self) -> float:
        self.wait()
        if self.started is not None:
            self.total_ms += 1000 * (time.perf_counter() - self.started)
        self.started = None
        return self.total_ms


# differs from train_gpt.py: one stage, no FP8
class Trainer:
    """One run: builds everything from the settings, then `run` trains. Every rank does the same."""

    def __init__(self, s: Settings, hardware: Hardware, world: World, notes: list[str]):
        self.s, self.hardware, self.world, self.stages = s, hardware, world, stage_table(s)
        self.corpus = open_corpus(s.data)
        self.stream = ValStream(self.corpus, s.eval_tokens, s.eval_seq_len)
        self.hellaswag = HellaSwag(s, self.corpus.meta, world) if s.hellaswag_every else None
        self.fingerprint = self.corpus.fingerprint()
        if on_rank_zero(world, lambda: self.fingerprint) != self.fingerprint:
            raise UserError(f"{self.corpus.folder} differs from that of the first machine: copy its shards here")
        path, meta = on_rank_zero(world, find_checkpoint, s) if s.resume else (None, None)
        if path:
            check_resumable(s, self.fingerprint, path, meta)
        self.model = GPT(s, self.corpus.meta["vocab_size"]).to(s.device)
        self.counts = parameter_counts(self.model)
        self.optimizer = MuonAdamW(self.model, s, world)
        compile_model(self.model, s)
        self.window = torch.zeros((), dtype=torch.int32, device=s.device)
        self.losses = torch.zeros(s.log_every, device=s.device)
        self.stop_signal, self.status, self.val_loss, self.first_step_s = 0, "done", None, None
        self.compile_s, self.warm_graphs, self.clock = 0.0, 0, Clock(s.device)
        self._open_log(path, meta, notes)
        if s.compile or s.device == "cuda":
            self.warm_up()
        self.start_step, self.position, self.epoch = 0, None, 0
        if path:
            self.start_step, self.position, self.clock.total_ms = meta["step"], meta["position"], meta["train_time_ms"]
            self.epoch, self.val_loss = self.position["epoch"], meta["val_loss"]
            saved = {}
            if world.rank == 0:
                saved = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)
            self.optimizer.load_state_dict(saved.get("optimizer", {}))
            torch.set_rng_state(on_rank_zero(world, lambda: saved["rng"]))
            self.log.print(f"resumed {path} after step {self.start_step}")
        self.loader = Loader(s, self.corpus, world, self.position, self.start_step)

    def _open_log(self, path: Path | None, meta: dict | None, notes: list[str]):
        """Folder and files of the run, new or the checkpoint's; choices and derived numbers to the console."""
        git = command_output("git", "rev-parse", "HEAD"), command_output("git", "status", "--porcelain", "-uno")
        self.config = {
            "settings": dataclasses.asdict(self.s), "script": Path(__file__).name, "world_size": self.world.size,
            "git": {"commit": git[0], "dirty": None if git[1] is None else bool(git[1])}, "torch": torch.__version__,
            "hardware": self.hardware._asdict(),
            "data": {"name": self.corpus.folder.name, "fingerprint": self.fingerprint, "meta": self.corpus.meta},
        }
        run_id = on_rank_zero(self.world, lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}")
        folder = path.parent.parent if path else Path(self.s.log_dir) / self.s.experiment_name / run_id
        self.log = RunLog(folder)
        on_rank_zero(self.world, self.log.open, self.s, self.hardware, self.config, meta and meta["step"])
        self.log.print("\n".join(notes + self.summary() + [f"run folder: {folder}"]))

    # differs from train_gpt.py: no layer table, one stage
    def summary(self) -> list[str]:
        """The derived numbers that are printed before training: data, parameters, steps, memory."""
        s, kinds, stage = self.s, ("total", "hidden", "embedding", "head", "small"), self.stages[0]
        rows = stage.micro_rows(s, self.world.size)
        accumulation = s.batch_tokens // (s.seq_len * rows * self.world.size)
        active = f"; {self.counts['active']:,} of them for a token" if s.mixture_layers else ""
        return [
            f"data {self.corpus.folder}: vocabulary {self.corpus.meta['vocab_size']}",
            "parameters: " + ", ".join(f"{self.counts[kind]:,} {kind}" for kind in kinds) + active,
            f"{s.iterations} steps of {s.batch_tokens:,} tokens: {rows} rows x {s.seq_len} x {accumulation} micro-steps"
            f" x {self.world.size} processes, {flops_per_token(s, self.counts, stage) / 1e6:.1f} MFLOPs/token",
            f"{self.tokens_at(s.iterations):,} training tokens, {self.stream.num_tokens:,} validation tokens, about "
            f"{self.expected_memory() / 2**30:.2f} GiB per process"]

    # differs from train_gpt.py: one stage, plain loss
    def expected_memory(self) -> float:
        """Bytes per process, a rough estimate: weights, own masters and moments, gradients, and for each token of a
        micro-step 34 activations a layer and dimension (half if compiled), the logits three times in fp32, and, but for
        FlexAttention, a row of scores."""
        s, total, size = self.s, self.counts["total"], self.s.torch_dtype.itemsize
        tokens = self.stages[0].micro_rows(s, self.world.size) * s.seq_len
        own = sum(4 * t.numel() for bank in self.optimizer.banks for t in [*bank.state.values(), bank.grad])
        sums = 4 * total if tokens * self.world.size < s.batch_tokens else 0
        scores = 0 if s.backend == "flex" else 2 * size * s.num_layers * s.num_heads * s.seq_len
        activations = (17 if s.compile else 34) * size * s.num_layers * s.width + 12 * len(self.model.head_weight)
        return own + sums + 2 * size * total + tokens * (activations + scores)

    # differs from train_gpt.py: one stage, experts
    def warm_up(self):
        """Compiles and runs the shapes of training and evaluation on random tokens, untimed, then restores: a rate of 0
        changes no weight, and the moments are cleared. The compile time is printed."""
        began, s = time.perf_counter(), self.s
        shape = self.stages[0].micro_rows(s, self.world.size), s.seq_len
        tokens = torch.randint(self.corpus.meta["vocab_size"], shape, dtype=torch.int32, device=s.device)
        self.window.fill_(window_at(s, self.stages, 0))
        self.micro_step(tokens, tokens, torch.zeros_like(tokens))
        self.optimizer.step(scale=0.0, momentum=s.momentum_start)
        evaluate(self.model, self.stream, s, self.world, window_at(s, self.stages, 0), batches=1)
        if self.hellaswag:
            self.hellaswag.losses(self.model, window_at(s, self.stages, 0), batches=1)
        self.optimizer.reset()
        self.expert_load()
        self.clock.wait()
        self.compile_s, self.warm_graphs = time.perf_counter() - began, compiled_graphs()
        self.log.print(f"kernels warm after {self.compile_s:.1f} s, {self.warm_graphs} graphs compiled")

    def run(self) -> int:
        """Trains to the end, the target loss or a signal; returns the exit code."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        profiler = None
        if self.s.enable_profiling:
            profiler = make_profiler(self.s, self.world, self.log.folder / "profile", self.log.print)
        gc.collect()
        gc.freeze()  # the collector's pauses are as long as a step (record 47)
        gc.disable()
        try:
            with profiler or contextlib.nullcontext():
                return self._finish(self._loop(profiler))
        finally:
            gc.enable()
            self.loader.close()
            self.log.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame):
        """First signal: save and stop after this step (several ranks: after the next logged one, together). The second
        ends the process at once."""
        if self.stop_signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_signal = number

    def _loop(self, profiler) -> int:
        """The training loop; returns the number of steps done."""
        s, step, stop = self.s, self.start_step, False
        self.clock.start()
        self.logged_step, self.logged_ms = step, self.clock.total_ms
        while step < s.iterations and not stop:
            self.train_step(step)
            step += 1
            if self.first_step_s is None:
                self.clock.wait()
                self.first_step_s = seconds_since_process_start()
            if profiler:
                self.clock.stop()
                profiler.step()
                self.clock.start()
            save = s.save_every and step % s.save_every == 0 and step < s.iterations
            if save or step % s.log_every == 0 or step == s.iterations or (self.stop_signal and self.world.size == 1):
                stop = self.log_step(step)
            if self.hellaswag and (step == s.iterations or step % s.hellaswag_every == 0):
                self.answer(step)
            if step == s.iterations or (s.eval_every and step % s.eval_every == 0):
                self.validate(step)
                if s.target_loss and self.val_loss <= s.target_loss:
                    self.status = "target"
                    break
            if save and not stop:
                self.save(step)
        if stop and step < s.iterations and self.status != "target":
            self.status = "interrupted"
        self.clock.stop()
        return step

    # differs from train_gpt.py: no further targets, schedule of the decay
    def train_step(self, step: int):
        """Forward and backward over the micro-steps of one batch, then the optimizer. Nothing waits for the device."""
        stage, rate = stage_at(self.stages, step), lr_scale(self.s, self.stages, step)
        micro_steps, self.position = self.loader.next(step)
        self.window.fill_(window_at(self.s, self.stages, step))
        for i, (inputs, targets, docs) in enumerate(micro_steps):
            self.optimizer.last_micro_step = i == len(micro_steps) - 1
            loss = self.micro_step(inputs, targets, docs)
            self.losses[step % self.s.log_every] += loss / stage.batch_tokens
        self.optimizer.step(rate, momentum_at(self.s, step), decay_scale(self.s, step, rate))
        if self.position["epoch"] != self.epoch:
            self.epoch = self.position["epoch"]
            self.log.print(f"step {step + 1}: all training data used, epoch {self.epoch + 1} begins")

    # differs from train_gpt.py: load-balancing loss, no further targets
    def micro_step(self, inputs: Tensor, targets: Tensor, docs: Tensor) -> Tensor:
        """Forward and backward of some rows, (B, T); their summed next-token loss."""
        losses = self.model(inputs, targets[None], docs, self.window)
        weights = 1.0, self.s.balance  # of the load-balancing loss, if there is one
        (sum(w * loss for w, loss in zip(weights, losses, strict=False)) / self.s.batch_tokens).backward()
        return losses[0].detach()

    def expert_load(self) -> float | None:
        """Load of the busiest expert of any layer / mean load, of all ranks since the last call. Collective."""
        counters = [block.mlp.chosen for block in self.model.blocks if isinstance(block.mlp, FineMixture)]
        if not counters:
            return None
        chosen_ME = torch.stack(counters)
        for counter in counters:
            counter.zero_()
        if self.world.size > 1:
            dist.all_reduce(chosen_ME)
        return float((chosen_ME.max(1).values / chosen_ME.double().mean(1)).max())

    def log_step(self, step: int) -> bool:
        """Reads the losses since the last call, checks and reports them; waits for the device. True if any rank got a
        stop signal. Raises TrainingStopped at the first loss that is not finite."""
        numbers = F.pad(self.losses, (0, 1), value=float(self.stop_signal))
        if self.world.size > 1:
            dist.all_reduce(numbers)
        *losses, stop = numbers.tolist()
        self.losses.zero_()
        for done in range(self.logged_step, step):
            loss = losses[done % self.s.log_every]
            if not math.isfinite(loss):
                self._stop_not_finite(f"the loss of step {done + 1} is {loss}", done + 1)
        self._report(step, losses[(step - 1) % self.s.log_every])
        if stop:
            self.stop_signal = self.stop_signal or signal.SIGTERM  # another rank got it
        return stop > 0

    # differs from train_gpt.py: names of the rates
    def _stop_not_finite(self, what: str, step: int):
        """Ends the logs and the run. Checkpoints are written only after a look at losses and weights: all are good."""
        self.status = "nan"
        self._end_record(step)
        raise TrainingStopped(f"{what}: stopped, the checkpoints before it are kept in {self.log.folder}; "
                              f"lower --max-lr{' and --muon-lr' if self.s.optimizer == 'muon' else ''}")

    # differs from train_gpt.py: norm of the gradient, load of the experts
    def _report(self, step: int, loss: float):
        """One line on the console and in log.txt, one object in metrics.jsonl."""
        s, stage, ms = self.s, stage_at(self.stages, step - 1), self.clock.stop()
        self.clock.start()
        load = self.expert_load()
        step_ms = (ms - self.logged_ms) / max(1, step - self.logged_step)
        rate = 1000 * stage.batch_tokens / step_ms
        mfu = model_flops_utilization(rate, flops_per_token(s, self.counts, stage), self.hardware.name, self.world.size)
        eta = time.strftime("%H:%M:%S", time.gmtime((s.iterations - step) * step_ms / 1000))
        self.log.print(f"step {step}/{s.iterations}  train loss {loss:.4f}  {step_ms:.1f} ms/step  {rate:,.0f} tokens/s"
                       f"  MFU {'n/a' if mfu is None else f'{100 * mfu:.1f} %'}  ETA {eta}"
                       + (f"  busiest expert {load:.2f} x mean" if load else ""))
        self._step_line(step, f"train_loss:{loss:.4f}", ms)
        self.log.metric(step=step, train_loss=loss, lr=lr_scale(s, self.stages, step - 1), seq_len=stage.seq_len,
                        window=window_at(s, self.stages, step - 1), batch_tokens=stage.batch_tokens,
                        tokens=self.tokens_at(step), train_time_ms=ms, step_ms=step_ms, tokens_per_s=rate, mfu=mfu,
                        grad_norm=float(self.optimizer.norm) if s.grad_clip else None, expert_load=load)
        self.logged_step, self.logged_ms = step, ms

    def _step_line(self, step: int, loss: str, ms: float):
        self.log.line(f"step:{step}/{self.s.iterations} {loss} train_time:{ms:.0f}ms step_avg:{ms / step:.2f}ms")

    def tokens_at(self, step: int) -> int:
        """Training tokens used up by the first `step` steps."""
        return sum((min(step, t.end) - t.start) * t.batch_tokens for t in self.stages if step > t.start)

    def validate(self, step: int):
        """Validation loss, outside the clock, to `val_loss` and all logs. Raises TrainingStopped if not finite."""
        ms, window = self.clock.stop(), window_at(self.s, self.stages, step)
        loss = evaluate(self.model, self.stream, self.s, self.world, window)
        if not math.isfinite(loss):
            self._stop_not_finite(f"the validation loss after step {step} is {loss}", step)
        self.val_loss = loss
        bpb = bits_per_byte(loss, self.corpus.meta)
        self.log.print(f"step {step}/{self.s.iterations}  val loss {loss:.4f} nats per token"
                       + (f", {bpb:.4f} bits per byte" if bpb else "") + f"  train time {ms / 1000:.1f} s")
        self._step_line(step, f"val_loss:{loss:.4f}", ms)
        self.log.metric(step=step, val_loss=loss, val_bpb=bpb, tokens=self.tokens_at(step), train_time_ms=ms)
        self.clock.start()

    def answer(self, step: int):
        """HellaSwag, outside the clock, to the console and metrics.jsonl."""
        ms = self.clock.stop()
        try:
            score = self.hellaswag.score(self.model, window_at(self.s, self.stages, step))
        except RuntimeError as error:
            self._stop_not_finite(f"{error}; this is after step {step}", step)
        self.log.print(f"step {step}/{self.s.iterations}  HellaSwag, {score}")
        self.log.metric(step=step, hellaswag=score._asdict(), hellaswag_per_token=score.per_token,
                        hellaswag_errors=score.standard_errors, tokens=self.tokens_at(step), train_time_ms=ms)
        self.clock.start()

    def save(self, step: int) -> bool:
        """Writes a checkpoint, outside the clock; False, and a warning, if that failed."""
        ms = self.clock.stop()
        state = {"optimizer": self.optimizer.state_dict(), "rng": torch.get_rng_state()}
        meta = self.config | {"position": self.position, "train_time_ms": ms, "val_loss": self.val_loss}

        def write() -> tuple[str, bool | None]:
            if not all(weights.isfinite().all() for weights in state["optimizer"]["state"]["master"].values()):
                return "", None
            try:
                return f"checkpoint {write_checkpoint(self.log.folder, step, state, meta, self.s.keep)}", True
            except OSError as error:
                return f"warning: {error}; training goes on, earlier checkpoints are intact: free some space", False

        text, saved = on_rank_zero(self.world, write)
        if saved is None:
            self._stop_not_finite(f"the weights after step {step} are not finite", step)
        self.log.print(text)
        self.clock.start()
        return saved

    def _finish(self, step: int) -> int:
        """Last checkpoint, end of the logs, exit code."""
        saved = self.save(step) if self.status == "interrupted" or self.s.save_last else True
        self._end_record(step)
        if self.s.enable_profiling and step - self.start_step < self.s.profile_start + self.s.profile_steps:
            self.log.print("profile: incomplete, the run ended before its last step; lower --profile-start")
        if self.s.target_loss:
            reached = "reached" if self.status == "target" else "not reached"
            seconds = self.clock.total_ms / 1000
            self.log.print(f"target loss {self.s.target_loss} {reached}: step {step}, {seconds:.2f} s")
        memory = "peak memory allocated: {} MiB reserved: {} MiB".format(*peak_memory_mib(self.s.device))
        self.log.print(memory)
        self.log.line(memory)
        self.log.print(f"log, metrics and checkpoints: {self.log.folder}")
        if not saved:
            raise TrainingStopped(f"the last checkpoint could not be written to {self.log.folder}: free some space")
        if self.s.enable_profiling and self.s.compile:
            late = compiled_graphs() - self.warm_graphs
            self.log.print(f"graphs compiled after the warm-up: {late}")
            assert not late, "a graph was compiled after the warm-up, inside the training time"
        return 128 + self.stop_signal if self.status == "interrupted" else 0

    def _end_record(self, step: int):
        """The last object of metrics.jsonl."""
        ms, reached = self.clock.stop(), self.status == "target"
        bpb = self.val_loss and bits_per_byte(self.val_loss, self.corpus.meta)
        self.log.metric(event="end", status=self.status, step=step, iterations=self.s.iterations,
                        val_loss=self.val_loss, val_bpb=bpb, train_time_ms=ms,
                        tokens_per_s=1000 * self.tokens_at(step) / ms if ms else None,
                        params_total=self.counts["total"], params_active=self.counts["active"],
                        peak_memory_mib=peak_memory_mib(self.s.device)[0], first_step_s=self.first_step_s,
                        compile_s=self.compile_s,
                        target_step=step if reached else None, target_time_ms=ms if reached else None)


def start_processes(device: str) -> World:
    """Joins the process group that torchrun announces in the environment; alone without it."""
    if "RANK" not in os.environ:
        return World()
    world = World(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"]))
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)  # 2.13 renames collectives, 2.11 has the old
    import torch._dynamo  # noqa: F401 - imported later it would keep the group alive past destroy_process_group
    if device == "cpu":
        dist.init_process_group("gloo")
        return world
    gpus = torch.cuda.device_count()
    if int(os.environ["LOCAL_WORLD_SIZE"]) > gpus:
        raise UserError(f"torchrun started more processes than this machine has GPUs: use --nproc_per_node={gpus}")
    torch.cuda.set_device(world.local_rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", world.local_rank))
    return world


# differs from train_gpt.py: no width transfer
def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what the user can repair."""
    code = 1
    try:
        s, hardware, notes = parse_settings(argv, int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1)
        torch.set_num_threads(s.threads or torch.get_num_threads())
        code = Trainer(s, hardware, start_processes(s.device), notes).run()
    except (UserError, OSError, TrainingStopped, torch.OutOfMemoryError) as error:
        memory = isinstance(error, torch.OutOfMemoryError)
        hint = "; use a smaller --micro-tokens, and --seq-len if that is as large" if memory else ""
        if os.environ.get("LOCAL_RANK", "0") == "0" or memory:  # what is wrong everywhere is said once a machine
            print(f"error: {error}{hint}", file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    finally:  # after an error NCCL might wait here for ranks that are elsewhere
        if dist.is_initialized() and (code == 0 or dist.get_backend() == "gloo"):
            dist.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(main())
