"""Train a Mixture-of-Experts language model like train_gpt.py's, on the hardware at hand: in chosen layers a router
sends each token to a few of many feed-forward experts, so that the model has more parameters for the same work.

    python train_moe.py                                            # 8 experts, top-2, on whatever is there
    python train_moe.py --preset speed                             # or mixtral, deepseek; speed-cpu names the size, too
    python train_moe.py --num-experts 0 --experiment_name dense    # the dense control: train_gpt.py's model and losses
    python train_moe.py --preset speed --control logs/dense/RUN    # and compare with it at the end
    torchrun --standalone --nproc_per_node=8 train_moe.py --preset speed-speedrun

Data, attention, optimizer, logs, checkpoints and flags are train_gpt.py's, word for word (tests/test_shared_code.py).
What is new: settings of the mixture; Experts and routers (in Model); the experts as a batch of matrices for Muon, those
without a token left alone, and Balance (in Optimizer); reports of the routers (in Logging).

No token is dropped, unless --capacity-factor is given, and shapes do not depend on the routing: the rows of all tokens
are sorted by expert, multiplied by the stacked weights in one grouped product, and permuted back. Nothing is read from
the device but in log steps, --moe-impl loop excepted. Losses are cross-entropies alone; the routers' penalties are not
in them.

Measured on 2 CPU cores (AMD EPYC, torch 2.13.0; bench/moe.py, records/2026-11-20_moe_cpu) at `cpu` size: the dense
control's final loss, 1.134 +- 0.044 (n = 3), takes `deepseek` 0.855 times its tokens at 1.33 times the step time,
`speed` 0.898 at 1.15 (n = 4); `mixtral`, 1.173 +- 0.011 at 1.44, does not get there. Not yet measured on a GPU.
Shape suffixes: B rows, T tokens of a row, N = B * T, D model_dim, H heads, K key dim of a head or, of routing, choices
of a token, V vocabulary; E experts of a layer, F hidden size of one, R = N * K sorted rows, M mixture layers, S sums.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import gc
import hashlib
import importlib.util
import inspect
import json
import math
import os
import platform
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterable
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
# holds the allowed values. `ints` and `floats` have one value per stage of training, or one for all stages.

ints = tuple[int, ...]
floats = tuple[float, ...]


class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback and exits with 1."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (NaN loss, no space for the last checkpoint); what was saved before stays usable."""


# differs from train_gpt.py: the mixture
@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run."""

    # --- run
    # differs from train_gpt.py: kinds of mixtures
    preset: str = "auto"  # SIZE (auto, cpu, gpu, speedrun, medium), KIND (mixtral, deepseek, speed) or KIND-SIZE
    # differs from train_gpt.py: name of the script
    experiment_name: str = "train_moe"  # runs are written to LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    seed: int = 0  # of the initial weights and of the order of shuffled data [>=0]
    resume: str = ""  # continue the newest checkpoint of the experiment (latest), or this run or checkpoint folder
    # --- data
    data: str = "auto"  # data set: the name of a folder under data/, or a path
    shuffle: bool = True  # shuffle the documents of a shard (the speedrun's rules want the published order)
    long_docs: str = "split"  # tokens of a document past max_doc_len: further pieces, or skipped [split|clip]
    # --- model
    num_layers: int = 12  # transformer layers [>0]
    width: int = 768  # model_dim: size of the residual stream, a multiple of head_dim [>0]
    head_dim: int = 128  # size of an attention head; num_heads = width / head_dim [>0]
    mlp_ratio: int = 4  # hidden size of the MLP / width [>0]
    attention: str = "auto"  # per layer: L long window, S short, P short with paired heads, - none; auto_attention
    paired: bool = True  # auto_attention pairs the heads of some layers: each query sees both heads' keys (record 58)
    key_offset: bool = True  # in L layers the unrotated half of a key is the previous token's (record 49)
    xsa: bool = True  # remove from a head's output its component along the token's own value (records 82, 86)
    value_embeds: int = 3  # value-embedding tables, each shared by one of the first and one of the last layers [>=0]
    value_gate: bool = True  # gate each head's value embedding by 12 dimensions of the layer's input (record 55)
    skip: str = "single"  # outputs of early layers added to late ones: unet record 11, single 45 [unet|single|none]
    backout: bool = True  # subtract a learned share of the stream after 2/3 of the layers from the last (record 40)
    smear: bool = True  # each token's embedding takes up some of the previous token's, gated (record 34)
    bigram: int = 0  # rows of a table of hashed token pairs, added to the embedding (record 62); 0 off [>=0]
    attn_gate: bool = True  # gate each head's output by 12 dimensions of its input (record 28)
    softcap: floats = (23.0, 5.0, 7.5)  # a,b,c: logits are a*sigmoid((z+b)/c) (54; 30,0,7.5: 19 to 53); 0 off [>=0]
    rope_base: float = 1024.0  # slowest rotary frequency is 1 / this, in radians per token [>0]
    attn_scale: float = 0.0  # factor on q.k, both RMS-normed; 0: 1.36 / sqrt(head_dim), 0.12 at 128 (record 20) [>=0]
    # --- mixture of experts
    num_experts: int = 8  # experts of a mixture, each a feed-forward network; 0: none, the dense control [>=0]
    top_k: int = 2  # experts of a token [>0]
    segments: int = 1  # split each expert into so many of less width, top_k * segments active (DeepSeekMoE) [>0]
    num_shared: int = 0  # experts that serve all tokens, beside the chosen ones [>=0]
    expert_hidden: int = 0  # hidden size of an expert, after splitting; 0: as much work for a token as the MLP's [>=0]
    moe_layers: str = "auto"  # per layer: M mixture, D dense MLP; auto: M but for dense_first and dense_last
    dense_first: int = 0  # first layers that stay dense [>=0]
    dense_last: int = 0  # last layers that stay dense [>=0]
    router: str = "noisy_topk"  # how experts are chosen and kept busy [noisy_topk|softmax_topk|sigmoid_bias]
    route_norm: bool = True  # a token's gates sum to route_scale; not a lone one: its router would learn nothing
    route_scale: float = 0.0  # factor on gates; 0: top_k * segments if normalized, 2 for a lone sigmoid, else 1 [>=0]
    importance_coef: float = 0.01  # noisy_topk: weight of CV^2 of the experts' summed gates [>=0]
    load_coef: float = 0.01  # noisy_topk: weight of CV^2 of their expected numbers of tokens [>=0]
    aux_coef: float = 0.01  # softmax_topk: weight of E * sum(share of tokens * mean probability) [>=0]
    z_coef: float = 0.001  # noisy_topk, softmax_topk: weight of the mean squared log-sum-exp of router logits [>=0]
    bias_rate: float = 0.001  # sigmoid_bias: step of the selection bias, against over- and underload [>=0]
    bias_cooldown: float = 0.15  # sigmoid_bias: last fraction of the iterations, in which that falls to 0 [0..1]
    capacity_factor: float = 0.0  # most tokens of a row for an expert / an even share, in training; 0: no limit [>=0]
    force_balance: bool = False  # experts in turn instead of the router's choice: to measure throughput only
    moe_impl: str = "auto"  # product with the experts' weights [auto|grouped|bmm|loop|triton]
    # --- width transfer: rates tuned at a small width serve a large one (muP)
    mup: bool = False  # scale learning rates, weight decay and logits from base_width to width
    base_width: int = 0  # width at which the rates were tuned; 0: the preset's [>=0]
    base_head_dim: int = 0  # head_dim there; 0: the same [>=0]
    mup_embedding: str = "constant"  # rates of embedding tables; disputed: / sqrt(width/base_width) [constant|sqrt]
    mup_report: bool = False  # print how --mup scales each parameter, and end
    coord_check: bool = False  # check that activations do not depend on the width, and end (bench/coord_check.py)
    # --- stages of training: one value per stage, or one for all
    iterations: int = 1695  # optimizer steps [>0]
    stage_ends: floats = (1.0,)  # where each stage ends, as a fraction of the iterations [>0]
    batch_tokens: ints = (393216,)  # tokens of one optimizer step, over all processes [>0]
    seq_len: ints = (49152,)  # tokens of a row: documents are packed into rows, and never see each other [>0]
    max_doc_len: ints = (0,)  # longest piece of a document, in tokens; 0: the row is the only limit [>=0]
    window: ints = (1792,)  # long attention window at the end of the stage, in tokens; short ones have half [>0]
    window_start: int = 128  # long window at step 0, it grows linearly; 0: start with the first stage's window [>=0]
    window_step: int = 128  # windows are rounded up to a multiple of this, in tokens [>0]
    mtp: ints = (0,)  # further future tokens to predict, weights 1/2, 1/4 .., the last fades to 0 (record 53) [>=0]
    stage_lr: floats = (1.0,)  # factor on all learning rates in the stage [>0]
    # --- optimizer
    hidden_optimizer: str = "muon"  # of hidden matrices, those of attention and MLP [muon|adamw]
    hidden_lr: float = 0.002  # learning rate of hidden matrices, AdamW [>=0]
    hidden_weight_decay: float = 0.1  # its decay / peak rate, decoupled, falls with the rate's square [>=0]
    muon_lr: float = 0.05  # learning rate of hidden matrices, Muon [>=0]
    muon_momentum: float = 0.95  # Nesterov momentum after its warm-up [0..1]
    momentum_start: float = 0.85  # momentum at step 0 and at the last step [0..1]
    momentum_warmup: int = 300  # steps over which the momentum rises [>=0]
    momentum_cooldown: int = 50  # last steps over which it falls back [>=0]
    muon_beta2: float = 0.95  # decay of NorMuon's running variance of update rows; 0 off [0..1]
    muon_weight_decay: float = 0.02  # decay / peak rate, decoupled, falls with the rate's square; hidden matrices [>=0]
    orthogonalizer: str = "polar_express"  # iteration that orthogonalizes updates [polar_express|newton_schulz]
    adam_lr: float = 0.008  # base learning rate of all other parameters; factors in parameter_table [>=0]
    expert_lr: float = 1.0  # factor on the learning rate of experts, which see fewer tokens than other matrices [>0]
    router_lr: float = 0.005  # learning rate of the routers, AdamW [>=0]
    adam_eps: float = 1e-10  # AdamW's epsilon [>0]
    adam_weight_decay: float = 0.0  # the same for embeddings and head [>=0]
    cautious: bool = True  # decay only where update and weight have the same sign
    schedule: str = "linear"  # shape of the cool-down: linear, or 1 - sqrt (warm-up, stable, decay) [linear|wsd]
    warmup_steps: int = 0  # learning-rate warm-up, in steps [>=0]
    cooldown: float = 0.45  # last fraction of the iterations, in which the learning rate falls [0..1]
    lr_floor: float = 0.1  # learning rate at the end / its peak [0..1]
    # --- evaluation
    eval_every: int = 125  # steps between evaluations; 0: only after the last step [>=0]
    eval_tokens: int = 10485760  # first tokens of the validation split; 0: all of them [>=0]
    eval_seq_len: int = 0  # longest context in evaluation, in tokens; 0: seq_len of the last stage [>=0]
    eval_window: int = 0  # long attention window in evaluation, by YaRN (records 31 to 35); 0: as in training [>=0]
    target_loss: float = 0.0  # stop at the first validation loss at or below this, nats per token; 0 off [>=0]
    hellaswag_every: int = 0  # steps between HellaSwag scores (GPT-2 vocabulary, evals/hellaswag.py); 0: none [>=0]
    hellaswag_tasks: int = 0  # tasks of it, evenly spread over the file; 0: all [>=0]
    hellaswag_file: str = ""  # their file; empty: where python evals/hellaswag.py --download puts it
    control: str = ""  # folder of a dense control's run; its target, else last, validation loss is compared with
    # --- checkpoints, logs, profiling
    save_every: int = 0  # steps between checkpoints; 0: only after the last step and on SIGINT or SIGTERM [>=0]
    save_last: bool = True  # write a checkpoint after the last step
    keep: int = 2  # checkpoints of a run that are kept [>0]
    log_every: int = 10  # steps between console lines; the loss is read from the device only then [>0]
    router_every: int = 50  # least steps between reports of the routers, which come with console lines [>0]
    wandb: bool = False  # mirror the metrics to Weights & Biases (WANDB_MODE=offline works)
    enable_profiling: bool = False  # write a trace per process (ui.perfetto.dev) and print the heaviest operations
    profile_start: int = 10  # first profiled step of this process [>=0]
    profile_steps: int = 3  # profiled steps [>0]
    # --- hardware
    device: str = "auto"  # where to run [auto|cpu|cuda]
    dtype: str = "auto"  # of activations and matrices; auto: bf16 where the hardware is fast at it [auto|bf16|fp32]
    backend: str = "auto"  # attention; auto: flex compiled on CUDA, plain on a CPU in bf16 [auto|flex|sdpa|plain]
    kernels: str = "auto"  # own Triton kernels, joined by +, of gram, mlp, loss; none; auto: all in bf16 on CUDA
    fp8_head: str = "auto"  # LM head in FP8 while training; auto: from compute capability 8.9 [auto|on|off]
    fp8_mlp: bool = False  # MLP up-projections in FP8, forward only, while training (record 84)
    compile: bool = True  # torch.compile of model and optimizer
    compile_unit: str = "auto"  # one graph, or one per block, which lets reductions start early [auto|model|block]
    micro_tokens: int = 49152  # most tokens of one forward and backward pass of a process [>0]
    threads: int = 0  # CPU threads of a process; 0: torch's choice [>=0]

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def base(self) -> Settings:
        """Those of the model at the base width, whose rates these are."""
        return self if not self.mup else dataclasses.replace(
            self, mup=False, width=self.base_width, head_dim=self.base_head_dim)

    @property
    def scale(self) -> float:
        """Factor on q.k. From a base on it goes with 1 / head_dim, not its root: learned q and k align (TP-V)."""
        if self.mup:
            return self.base.scale * (self.base_head_dim / self.head_dim)
        return self.attn_scale or 1.36 / math.sqrt(self.head_dim)

    @property
    def cap(self) -> tuple[float, ...] | None:
        return self.softcap if self.softcap[0] else None

    @property
    def experts(self) -> int:
        return self.num_experts * self.segments

    @property
    def choices(self) -> int:
        return self.top_k * self.segments

    @property
    def hidden(self) -> int:
        """Of one expert: the dense MLP's split among the active ones, to a multiple of 8."""
        even = self.mlp_ratio * self.width / max(1, self.choices + self.num_shared)
        return self.expert_hidden or max(8, round(even / 8) * 8)

    @property
    def mixtures(self) -> tuple[int, ...]:
        """Numbers of the layers with a mixture."""
        return tuple(i for i, kind in enumerate(self.moe_layers) if kind == "M")

    @property
    def penalties(self) -> dict[str, float]:
        """What the router's balance adds to the loss, and how much of it."""
        return {"noisy_topk": {"importance": self.importance_coef, "load": self.load_coef, "z": self.z_coef},
                "softmax_topk": {"switch": self.aux_coef, "z": self.z_coef}, "sigmoid_bias": {}}[self.router]

    @property
    def gate_scale(self) -> float:
        """Normalized gates are 1 / choices on average, a lone sigmoid starts at 1/2. Muon's updates have one size: what
        a gate takes from an expert's output, a larger rate would have to give back."""
        if self.route_norm and self.choices > 1:
            return self.route_scale or float(self.choices)
        return self.route_scale or (2.0 if self.router == "sigmoid_bias" else 1.0)

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


PRESETS: dict[str, dict] = {
    # two CPU cores, under two minutes: bytes of the Python standard library (records/LOG.md has what else was tried)
    "cpu": dict(
        data="stdlib", num_layers=3, width=192, head_dim=48, value_embeds=1, iterations=360, batch_tokens=(4096,),
        seq_len=(256,), max_doc_len=(256,), window=(256,), window_start=64, window_step=32, micro_tokens=8192,
        softcap=(30.0, 0.0, 7.5), paired=False, key_offset=False, xsa=False, skip="unet", backout=False, muon_lr=0.06,
        muon_momentum=0.9, momentum_warmup=30, momentum_cooldown=20, cooldown=0.6, lr_floor=0.0, eval_every=120,
        eval_tokens=131072, compile=False,
    ),
    # the GPT-2-small shape on one 16 GB card; 24 GB and more: --micro-tokens 16384
    "gpu": dict(
        iterations=4000, batch_tokens=(65536,), seq_len=(8192,), max_doc_len=(2048,), window=(1024,), window_start=256,
        micro_tokens=8192, muon_lr=0.025, adam_lr=0.004, eval_every=250, eval_tokens=262144, save_every=500,
    ),
    # the 8xH100 track: 3.28 on FineWeb; stages as in record 89, with more steps: some of its techniques are left out
    "speedrun": dict(
        data="fineweb10B", shuffle=False, iterations=1800, stage_ends=(1 / 3, 2 / 3, 1.0),
        batch_tokens=(131072, 262144, 393216), seq_len=(16384, 32768, 49152), max_doc_len=(896, 2048, 2048),
        window=(384, 896, 1408), stage_lr=(1.0, 1.52, 1.73), mtp=(2, 1, 0), muon_lr=0.023, adam_weight_decay=0.005,
        cooldown=0.6, lr_floor=0.15, target_loss=3.28, save_last=False,
    ),
    # the GPT-2-medium track: 2.92 on FineWeb
    "medium": dict(
        data="fineweb10B", shuffle=False, num_layers=16, width=1024, iterations=5960, batch_tokens=(524288,),
        seq_len=(65536,), window=(3456,), muon_lr=0.025, adam_lr=0.004, cooldown=0.7, target_loss=2.92,
        micro_tokens=65536,
    ),
}
# Kinds of mixtures, joined to a size above; their active FLOPs are those of the dense model, within 1 %.
MIXTURES: dict[str, dict] = {
    "mixtral": dict(num_experts=8, top_k=2, router="noisy_topk"),
    "deepseek": dict(num_experts=32, top_k=3, segments=2, num_shared=2, router="sigmoid_bias", dense_first=1),
    "speed": dict(num_experts=8, top_k=1, num_shared=1, router="sigmoid_bias", dense_first=2, dense_last=2),
}
# What a kind has otherwise at a size.
SIZED: dict[str, dict] = {
    "deepseek-cpu": dict(num_experts=8, bias_rate=0.01, router_lr=0.001),  # 360 steps need a quicker bias
    "speed-cpu": dict(dense_first=1, dense_last=1, bias_rate=0.01),
}
# Settings that only some routers read.
ROUTER_SETTINGS = {
    "importance_coef": ("noisy_topk",), "load_coef": ("noisy_topk",), "aux_coef": ("softmax_topk",),
    "z_coef": ("noisy_topk", "softmax_topk"), "bias_rate": ("sigmoid_bias",), "bias_cooldown": ("sigmoid_bias",),
}
# Settings that a resumed run may change: they do not alter what is computed, or only its rounding.
# differs from train_gpt.py: further settings
RESUME_MAY_CHANGE = {
    "preset", "experiment_name", "log_dir", "resume", "data", "eval_every", "eval_tokens", "eval_seq_len",
    "eval_window", "target_loss", "hellaswag_every", "hellaswag_tasks", "hellaswag_file", "save_every", "save_last",
    "keep", "log_every", "wandb", "enable_profiling", "profile_start", "profile_steps", "device", "dtype", "backend",
    "kernels", "fp8_head", "fp8_mlp", "compile", "compile_unit", "micro_tokens", "threads", "mup_report", "coord_check",
    "moe_impl", "control", "router_every",
}


# Settings that only one value of another one reads.
READ_WITH = {name: ("mup", True) for name in ("base_width", "base_head_dim", "mup_embedding", "mup_report")}
READ_WITH |= {name: ("hidden_optimizer", "adamw") for name in ("hidden_lr", "hidden_weight_decay")}
READ_WITH |= {name: ("hidden_optimizer", "muon") for name in (
    "muon_lr", "muon_momentum", "momentum_start", "momentum_warmup", "momentum_cooldown", "muon_beta2",
    "muon_weight_decay", "orthogonalizer")}


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


def build_parser() -> Parser:
    """One flag per field of `Settings`, with dashes or underscores."""
    def values(kind: type):
        def parse(text: str):
            return tuple(kind(part) for part in text.split(","))
        parse.__name__ = f"{kind.__name__},{kind.__name__},.."  # argparse: "invalid int,int,.. value"
        return parse

    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                    formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=36, width=118))
    kinds = {"int": int, "float": float, "str": str, "ints": values(int), "floats": values(float)}
    texts = help_texts()
    for field in dataclasses.fields(Settings):
        flags = dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"])
        shown = ",".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        option = dict(dest=field.name, default=argparse.SUPPRESS, help=f"{texts[field.name]} (default: {shown})")
        if field.type == "bool":
            option["action"] = Switch
        else:
            option.update(type=kinds[field.type], metavar={"ints": "N,N", "floats": "X,X"}.get(field.type, "X"))
        if field.name == "resume":
            option.update(nargs="?", const="latest")
        parser.add_argument(*flags, **option)
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


def choose_preset(hardware: Hardware, world_size: int, data: str) -> tuple[str, str]:
    """Preset for `auto`, by hardware and data, and the reason for it."""
    if hardware.device == "cpu":
        return "cpu", "no CUDA device"
    folder = data_folder("fineweb10B" if data == "auto" else data)
    gpus = f"{world_size} process(es) on {hardware.name} of {hardware.memory_gib:.0f} GiB"
    if world_size >= 8 and hardware.memory_gib >= 70 and folder.name.startswith("fineweb") and folder.is_dir():
        return "speedrun", f"{gpus}, and {folder.name} is there"
    return "gpu", f"{gpus}; speedrun wants 8 of at least 70 GiB, and data/fineweb10B"


def preset_values(preset: str, hardware: Hardware, world_size: int, data: str) -> tuple[dict, str, str]:
    """Settings of --preset KIND, SIZE or KIND-SIZE, its full name, and why this size. Raises UserError."""
    kinds, sizes = "|".join(MIXTURES), "|".join(["auto", *PRESETS])
    parts = re.fullmatch(rf"(?:({kinds})(?:-|$))?({sizes})?", preset)
    if not parts or not preset or preset.endswith("-"):
        raise UserError(f"--preset {preset}: must be one of {kinds}, or of {sizes}, or two of them such as speed-cpu")
    kind, size, why = parts[1], parts[2] or "auto", "asked for"
    if size == "auto":
        size, why = choose_preset(hardware, world_size, data)
    name = f"{kind}-{size}" if kind else size
    return PRESETS[size] | MIXTURES.get(kind, {}) | SIZED.get(name, {}), name, why


# differs from train_gpt.py: presets, layers and backend of the mixture
def parse_settings(argv: list[str] | None, world_size: int) -> tuple[Settings, Hardware, list[str]]:
    """Command line -> settings with every `auto` resolved, the hardware, and lines that explain the choices.

    Raises UserError with all that is wrong with the settings at once."""
    given = vars(build_parser().parse_args(argv))
    hardware = detect_hardware(given.get("device", "auto"))
    values, preset, why = preset_values(given.get("preset", "auto"), hardware, world_size, given.get("data", "auto"))
    s = Settings(**{**values, **given, "preset": preset})
    if s.mup:
        s = dataclasses.replace(s, base_width=s.base_width or values.get("width", Settings.width),
                                base_head_dim=s.base_head_dim or s.head_dim)
    dtype = s.dtype if s.dtype != "auto" else ("bf16" if hardware.bf16 else "fp32")
    fallback = "plain" if hardware.device == "cpu" and dtype == "bf16" and not s.compile else "sdpa"
    kernel = "flex" if hardware.device == "cuda" and s.compile else fallback
    fp8 = hardware.fp8 and dtype == "bf16" and not any(size % 16 for size in (s.width, *s.seq_len))
    even_heads = not any(x.width // max(1, x.head_dim) % 2 for x in (s, s.base))
    problems = field_errors(s) + unread_errors(s, given)
    s = dataclasses.replace(  # the checks see what `auto` means
        s, backend=s.backend if s.backend != "auto" else kernel,
        attention=s.attention if s.attention != "auto" else auto_attention(s.num_layers, s.paired and even_heads),
        kernels=s.kernels if s.kernels != "auto" else fast_kernels(hardware, dtype),
        fp8_head=s.fp8_head if s.fp8_head != "auto" else "on" if fp8 else "off",
        moe_layers=s.moe_layers if s.moe_layers != "auto" else auto_mixtures(s),
        moe_impl=s.moe_impl if s.moe_impl != "auto" else auto_experts(hardware, dtype))
    problems += hardware_errors(s, hardware) + ([] if problems else shape_errors(s, world_size))
    problems += mixture_errors(s, given, hardware, dtype)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    unit = s.compile_unit if s.compile_unit != "auto" else ("model" if world_size == 1 else "block")
    data = s.data if s.data != "auto" else ("fineweb10B" if data_folder("fineweb10B").is_dir() else "stdlib")
    notes = [f"preset {preset}: {why}", f"device {hardware.device}: {hardware.name}",
             f"dtype {dtype}: " + (hardware.why if s.dtype == "auto" else "asked for"),
             f"attention {s.backend}, " + (f"compiled by {unit}" if s.compile else "not compiled"),
             f"Triton kernels: {s.kernels}; FP8 head {s.fp8_head}, FP8 MLP {'on' if s.fp8_mlp else 'off'}",
             mixture_note(s, auto_experts(hardware, dtype))]
    if s.mup:
        notes.append(f"muP: rates of width {s.base_width} serve width {s.width}; --mup-report lists what is scaled")
    s = dataclasses.replace(s, device=hardware.device, dtype=dtype, compile_unit=unit, data=data,
                            eval_seq_len=s.eval_seq_len or stage_table(s)[-1].seq_len)
    return s, hardware, notes


def fast_kernels(hardware: Hardware, dtype: str) -> str:
    """The Triton kernels that `auto` takes: all, where Triton is there and bf16 is fast on the GPU."""
    usable = hardware.device == "cuda" and hardware.bf16 and dtype == "bf16" and importlib.util.find_spec("triton")
    return "+".join(KERNELS) if usable else "none"


def auto_mixtures(s: Settings) -> str:
    """Layers with a mixture: all but the first and last ones that stay dense."""
    if not s.num_experts:
        return "D" * s.num_layers
    return "".join("M" if s.dense_first <= i < s.num_layers - s.dense_last else "D" for i in range(s.num_layers))


def auto_experts(hardware: Hardware, dtype: str) -> str:
    """Grouped products where they read their group sizes on the device, Hopper and datacentre Blackwell in bf16; on
    other GPUs padded batches, static, too; on a CPU, which has nothing to wait for, a loop (records/LOG.md)."""
    if hardware.device == "cpu":
        return "loop"
    return "grouped" if dtype == "bf16" and hardware.capability in ((9, 0), (10, 0)) else "bmm"


def mixture_note(s: Settings, best: str) -> str:
    """What the routers do, and how, in a line."""
    if not s.num_experts:
        return "mixture: none, the dense control"
    shared = f" and {s.num_shared} shared" if s.num_shared else ""
    return (f"mixture: layers {s.moe_layers}, {s.choices} of {s.experts} experts{shared} of hidden size {s.hidden}, "
            f"router {s.router}{', IGNORED: experts in turn' if s.force_balance else ''}, experts by {s.moe_impl}"
            + (", which waits for the device here" if s.moe_impl == "grouped" != best else ""))


def mixture_errors(s: Settings, given: dict, hardware: Hardware, dtype: str) -> list[str]:
    """Settings of the mixture that do not fit each other or this machine, or that nothing would read."""
    if not s.num_experts:
        unread = {"top_k", "segments", "num_shared", "expert_hidden", "expert_lr", "dense_first", "dense_last",
                  "router", "router_lr", "router_every", "route_norm", "route_scale", "capacity_factor",
                  "force_balance", "moe_impl", *ROUTER_SETTINGS}
        bad = [f"--{name}: has no effect with --num_experts 0" for name in sorted(unread & given.keys())]
        return bad + ([f"--moe_layers {s.moe_layers}: --num_experts 0 has no mixture"] if s.mixtures else [])
    bad = [f"--{name}: has no effect with --router {s.router}, only with {' or '.join(routers)}"
           for name, routers in ROUTER_SETTINGS.items() if name in given and s.router not in routers]
    bad += [f"--{name}: has no effect beside --moe_layers" for name in ("dense_first", "dense_last")
            if name in given and "moe_layers" in given]
    if len(s.moe_layers) != s.num_layers or set(s.moe_layers) - set("MD"):
        bad.append(f"--moe_layers {s.moe_layers}: one letter M or D for each of the {s.num_layers} layers")
    elif not s.mixtures:
        what = f"--moe_layers {s.moe_layers}" if "moe_layers" in given else (
            f"--dense_first {s.dense_first}, --dense_last {s.dense_last} of {s.num_layers} layers")
        bad.append(f"{what}: no mixture is left; use --num_experts 0 for the dense control")
    elif "D" not in s.moe_layers and not s.num_shared:
        bad += [f"--{name}: has no effect, as neither dense MLP nor shared expert is left" for name in ("fp8_mlp",)
                if getattr(s, name)]
    if {"expert_hidden", "mlp_ratio"} <= given.keys() and "D" not in s.moe_layers:
        bad.append("--mlp_ratio: has no effect, as all layers are mixtures with --expert_hidden")
    if s.choices > s.experts:
        bad.append(f"--top_k {s.top_k} must not be above --num_experts {s.num_experts}")
    if wrong := [size for size in (s.width, s.hidden) if size % 8]:
        bad.append(f"--width {s.width}, --expert_hidden {s.hidden}: grouped products need strides of 16 bytes, that is "
                   f"multiples of 8; {wrong[0]} is none")
    if s.fp8_mlp and s.num_shared * s.hidden % 16:
        bad.append(f"--fp8_mlp: {s.num_shared} shared experts of hidden size {s.hidden} are no multiple of 16")
    if s.moe_impl == "grouped" and dtype == "fp32" and s.compile:
        bad.append("--moe_impl grouped: torch compiles grouped products in bf16 only: use bmm, loop or --no-compile")
    if s.moe_impl == "triton" and not (
            importlib.util.find_spec("triton") and (hardware.device == "cuda" or os.environ.get("TRITON_INTERPRET"))):
        bad.append("--moe_impl triton needs Triton and a CUDA device (or TRITON_INTERPRET=1, to test): use auto")
    return bad


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


def unread_errors(s: Settings, given: dict) -> list[str]:
    """A sentence for each given setting that nothing would read, as it belongs to another choice."""
    bad = [f"--{name}: has no effect without --{other}" + (f" {value}" if isinstance(value, str) else "")
           for name, (other, value) in READ_WITH.items()
           if given.get(name, False) is not False and getattr(s, other) != value]
    bad += [f"--{name}: has no effect without --hellaswag_every" for name in ("hellaswag_tasks", "hellaswag_file")
            if name in given and not s.hellaswag_every]
    if "gram" in given.get("kernels", "") and s.hidden_optimizer == "adamw":
        bad.append(f"--kernels {s.kernels}: gram has no effect without --hidden_optimizer muon")
    return bad


def hardware_errors(s: Settings, hardware: Hardware) -> list[str]:
    """Settings that this machine cannot serve."""
    bad, cuda = [], hardware.device == "cuda"
    if s.device == "cuda" and not cuda:
        bad.append("--device cuda: this machine has no usable CUDA device; leave the flag out")
    if not s.preset.endswith("cpu") and s.device != "cpu" and not cuda:
        bad.append(f"--preset {s.preset} needs a CUDA device, there is none: use --preset cpu, or add --device cpu")
    if s.compile and not cuda and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        bad.append("--compile on a CPU needs a C++ compiler and there is none: install g++, or use --no-compile")
    if wrong := set(s.kernels.split("+")) - {*KERNELS, "none"}:
        bad.append(f"--kernels {s.kernels}: {', '.join(sorted(wrong))} is none of {', '.join(KERNELS)}; or use none")
    triton = importlib.util.find_spec("triton") and (cuda or os.environ.get("TRITON_INTERPRET"))
    if s.kernels != "none" and not triton:
        bad.append(f"--kernels {s.kernels} needs Triton and a CUDA device (or TRITON_INTERPRET=1, to test): use none")
    if cuda and s.kernels != "none" and s.dtype == "fp32":
        bad.append(f"--kernels {s.kernels} --dtype fp32: the tiles fit shared memory in bf16 only: use none")
    if cuda and not hardware.fp8 and (s.fp8_head == "on" or s.fp8_mlp):
        bad.append(f"--fp8_head, --fp8_mlp: {hardware.name} has no FP8 products (compute capability 8.9): leave out")
    if s.backend == "flex" and not (cuda and s.compile):
        bad.append("--backend flex trains only compiled and on a CUDA device (no CPU backward in torch): use sdpa")
    return bad


def shape_errors(s: Settings, world_size: int) -> list[str]:
    """Settings that do not fit each other: model shape, stages, rows per process."""
    bad = []
    for prefix in ("", "base_") if s.mup else ("",):
        width, head_dim = getattr(s, f"{prefix}width"), getattr(s, f"{prefix}head_dim")
        if width % head_dim or head_dim % 4 or width < GATE_DIM:
            bad.append(f"--{prefix}width {width} must be a multiple of --{prefix}head_dim {head_dim}, that one of 4, "
                       f"and not below {GATE_DIM}")
    if 2 * s.value_embeds > s.num_layers:
        bad.append(f"--value_embeds {s.value_embeds}: each table serves two layers and there are {s.num_layers}")
    if len(s.attention) != s.num_layers or set(s.attention) - set("LSP-"):
        bad.append(f"--attention {s.attention}: one letter L, S, P or - for each of the {s.num_layers} layers")
    elif "P" in s.attention and (odd := next((x.num_heads for x in (s, s.base) if x.num_heads % 2), 0)):
        bad.append(f"--attention {s.attention}: P layers pair heads, and there are {odd}; use --no-paired")
    elif set(s.attention) == {"-"} or len({layer.value_table for layer in layer_table(s)} - {None}) < s.value_embeds:
        bad.append(f"--attention {s.attention}: a layer, and one for each of {s.value_embeds} value tables, needs it")
    if s.cap and (len(s.cap) != 3 or not s.cap[2]):
        bad.append(f"--softcap {s.softcap}: three numbers a,b,c, the first and last above 0; or 0, no cap")
    if s.width % 16 and (s.fp8_head == "on" or s.fp8_mlp):
        bad.append(f"--width {s.width}: FP8 products need a multiple of 16; or use --fp8_head off --no-fp8_mlp")
    if s.bigram == 1:
        bad.append("--bigram 1: a table needs 2 rows or more, one is for the starts of documents; 0 leaves it out")
    if s.muon_beta2 == 1 or s.muon_momentum == 1:
        bad.append("--muon_beta2 and --muon_momentum must be below 1: at 1 nothing new is ever averaged in")
    if s.warmup_steps >= s.iterations:
        bad.append(f"--warmup_steps {s.warmup_steps} must be less than --iterations {s.iterations}")
    wrong = [f"--{name} has {len(getattr(s, name))} values, --stage_ends {len(s.stage_ends)}" for name in STAGED
             if len(getattr(s, name)) not in (1, len(s.stage_ends))]
    if s.stage_ends[-1] != 1.0 or list(s.stage_ends) != sorted(set(s.stage_ends)):
        wrong.append(f"--stage_ends {s.stage_ends}: must rise and end with 1.0")
    return bad + (wrong or [line for stage in stage_table(s) for line in row_errors(s, stage, world_size)])


def row_errors(s: Settings, stage: Stage, world_size: int) -> list[str]:
    """A stage's batch must split into whole rows, the same number for every process."""
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
    if stage.seq_len % 16 and (s.fp8_head == "on" or s.fp8_mlp):
        return [f"--seq_len {stage.seq_len}: FP8 products need a multiple of 16; or use --fp8_head off --no-fp8_mlp"]
    if stage.mtp >= stage.seq_len:
        return [f"--mtp {stage.mtp} must be less than --seq_len {stage.seq_len}"]
    return []


STAGED = ("batch_tokens", "seq_len", "max_doc_len", "window", "mtp", "stage_lr")


class Stage(NamedTuple):
    """One row of the stage table: steps [start, end) of the run."""

    start: int
    end: int
    window_start: int  # long window at `start`
    batch_tokens: int
    seq_len: int
    max_doc_len: int
    window: int  # long window at `end`
    mtp: int  # further future tokens
    lr: float

    def micro_rows(self, s: Settings, world_size: int) -> int:
        """Rows of one forward pass of a process: the most that fit into micro_tokens and divide its share."""
        rows = self.batch_tokens // self.seq_len // world_size
        return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * self.seq_len <= s.micro_tokens))


def stage_table(s: Settings) -> list[Stage]:
    """The stages of a run; a single value of a staged setting holds for all of them."""
    columns = [values * len(s.stage_ends) if len(values) == 1 else values for values in (getattr(s, n) for n in STAGED)]
    stages, start, window_start = [], 0, s.window_start or s.window[0]
    for end, *row in zip(s.stage_ends, *columns, strict=True):
        stages.append(Stage(start, round(end * s.iterations), window_start, *row))
        start, window_start = stages[-1].end, stages[-1].window
    return stages


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
# One rule says who sees whom; all backends apply it token by token, so that compiled, eager and SDPA agree. (A window
# that exists only in the block lists of FlexAttention is silently ignored wherever the kernel is not compiled.)

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

# --- Triton kernels and FP8. Each has a plain form here, which is its reference in the tests and takes its place where
# --kernels or --fp8_head do not name it. The registered operators hide them from torch.compile as one node each.

KERNELS = ("gram", "mlp", "loss")
OPERATORS = "nanospeedrun_" + re.sub(r"\W", "_", Path(__file__).stem)  # namespace
FP8_INPUT_MARGIN = 1.01  # RMS-normed values are at most sqrt(model_dim), but for rounding
LOSS_CHUNK = 4096  # rows of logits that the plain form holds in fp32
tl = None  # triton.language, from the first kernel on


@functools.cache
def triton_kernel(function):
    """The function compiled by Triton, which is imported only now."""
    import triton
    globals()["tl"] = triton.language
    return triton.jit(function)


def operator(signature: str):
    """Registers a function as a torch operator, e.g. `gram(Tensor x) -> Tensor`."""
    name, _, rest = signature.partition("(")
    return torch.library.custom_op(f"{OPERATORS}::{name}", mutates_args=(), schema="(" + rest)


def product_relu2_kernel(a, b, post, out, rows, cols, depth, BACKWARD: tl.constexpr, ROWS: tl.constexpr,
                         COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """out = relu(a @ b.T)^2, or in the backward pass (a @ b.T) * 2 sqrt(post), post being the former's result: a
    (rows, depth), b (cols, depth), all row-major. Tiles run down GROUP rows before they go right: b stays in the L2."""
    tiles_down, tiles_right = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    group, within = tl.program_id(0) // (GROUP * tiles_right), tl.program_id(0) % (GROUP * tiles_right)
    height = min(tiles_down - group * GROUP, GROUP)
    row = ((group * GROUP + within % height) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = ((within // height) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    k = tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        left = tl.load(a + row * depth + (start + k)[None, :], (row < rows) & (start + k < depth)[None, :], 0.0)
        right = tl.load(b + col * depth + (start + k)[:, None], (col < cols) & (start + k < depth)[:, None], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    where, inside = row * cols + col, (row < rows) & (col < cols)
    if BACKWARD:
        total *= 2 * tl.sqrt(tl.load(post + where, inside, 0.0).to(tl.float32))
    else:
        total = tl.maximum(total, 0.0) * total
    tl.store(out + where, total.to(out.dtype.element_ty), inside)


def product_relu2(a: Tensor, b: Tensor, post: Tensor | None = None) -> Tensor:
    """relu(a @ b.T)^2, or, given that as `post`, (a @ b.T) times its derivative: the fused MLP (record 59; without the
    pre-activations, which the square root gives back: 87)."""
    (rows, depth), cols, out = a.shape, b.size(0), a.new_empty(a.size(0), b.size(0))
    tile = dict(ROWS=128, COLS=128, DEPTH=32, GROUP=8) if small_shared_memory(a.device.type) else dict(
        ROWS=128, COLS=256, DEPTH=64, GROUP=8)
    grid = (-(-rows // tile["ROWS"]) * -(-cols // tile["COLS"]),)
    triton_kernel(product_relu2_kernel)[grid](
        a.contiguous(), b.contiguous(), out if post is None else post, out, rows, cols, depth,
        BACKWARD=post is not None, **tile, num_warps=8, num_stages=3)
    return out


@operator("mlp(Tensor x, Tensor up, Tensor down) -> (Tensor, Tensor)")
def fused_mlp(x_ND: Tensor, up_FD: Tensor, down_FD: Tensor):
    post_NF = product_relu2(x_ND, up_FD)
    return post_NF @ down_FD, post_NF


@operator("mlp_backward(Tensor grad, Tensor x, Tensor up, Tensor down, Tensor post) -> (Tensor, Tensor, Tensor)")
def fused_mlp_backward(grad_ND: Tensor, x_ND: Tensor, up_FD: Tensor, down_FD: Tensor, post_NF: Tensor):
    pre_grad_NF = product_relu2(grad_ND, down_FD, post_NF)
    return pre_grad_NF @ up_FD, pre_grad_NF.T @ x_ND, post_NF.T @ grad_ND


@operator("quantized_linear(Tensor x, Tensor weight, Tensor xq, Tensor wq, Tensor x_scale, Tensor w_scale) -> Tensor")
def quantized_linear(x_ND: Tensor, weight_FD: Tensor, xq_ND: Tensor, wq_FD: Tensor, x_scale: Tensor, w_scale: Tensor):
    return fp8_product(xq_ND, wq_FD, x_scale, w_scale, fast=True).to(x_ND.dtype)


fused_mlp.register_fake(lambda x, up, down: (torch.empty_like(x), x.new_empty(x.size(0), up.size(0))))
fused_mlp_backward.register_fake(lambda grad, x, up, down, post: tuple(map(torch.empty_like, (x, up, down))))
quantized_linear.register_fake(lambda x, weight, *_: x.new_empty(x.size(0), weight.size(0)))
fused_mlp.register_autograd(
    lambda ctx, grad, _: fused_mlp_backward(grad, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: (ctx.save_for_backward(*inputs, output[1]),
                                               ctx.set_materialize_grads(False)))
quantized_linear.register_autograd(
    lambda ctx, grad: (grad @ ctx.saved_tensors[1], grad.T @ ctx.saved_tensors[0], *[None] * 4),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:2]))


def mlp_relu2(x_ND: Tensor, up_FD: Tensor, down_FD: Tensor, kernel: bool, fp8: bool) -> Tensor:
    """relu(x @ up.T)^2 @ down, (N, D): plain, by the fused Triton kernel, or with the up-projection in FP8."""
    if kernel and not fp8:
        return fused_mlp(x_ND, up_FD, down_FD)[0]
    return (fp8_linear if fp8 else F.linear)(x_ND, up_FD).relu().square() @ down_FD


def fp8_linear(x_ND: Tensor, weight_FD: Tensor) -> Tensor:
    """x @ weight.T in e4m3, each scaled to its largest entry; the gradients are exact (record 84). Quantized outside
    the operator, so that torch.compile can fuse it with what comes before."""
    exact = [t.detach().float() for t in (x_ND, weight_FD)]
    scales = [t.abs().amax().clamp_min(1e-12) / 448 for t in exact]
    return quantized_linear(x_ND, weight_FD, *map(to_fp8, exact, scales), *scales)


def to_fp8(x: Tensor, scale, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x / scale, clipped: on a GPU the cast turns what is out of range into NaN or infinity."""
    limit = torch.finfo(dtype).max
    return (x / scale).clamp(-limit, limit).to(dtype)


def fp8_product(a_NK: Tensor, b_MK: Tensor, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """(a * scale_a) @ (b * scale_b).T, both fp8 and row-major -> (N, M) bf16. `fast`: sums with fewer bits."""
    return torch._scaled_mm(a_NK, b_MK.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16,
                            use_fast_accum=fast)


def cap_logits(z: Tensor, cap: tuple[float, ...] | None) -> Tensor:
    """a * sigmoid((z + b) / c), or with b = 0 a/2 * tanh(z / 2c) but for a constant (records 9, 18, 19, 54); no cap, if
    a is 0: z / c."""
    if cap is None:
        return z
    a, b, c = cap
    return a * torch.sigmoid((z + b) / c) if a else z / c


def width_free(cap: tuple[float, ...] | None, multiplier: float) -> tuple[float, ...] | None:
    """The cap that takes in z what `cap` takes in multiplier * z. It stands after the product with the head, and so the
    head's multiplier costs nothing, needs no kernel, and scales FP8 gradients with it."""
    a, b, c = cap or (0.0, 0.0, 1.0)
    return cap if multiplier == 1 else (a, b / multiplier, c / multiplier)


def loss_kernel(logits, targets, losses, lses, rows, vocab, a, slope, shift, CAPPED: tl.constexpr,
                TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits: the logarithm of its sum of exponentials, and the cross-entropy with each of its targets.
    Capped logits, a * sigmoid(slope * z + shift), are below a, which spares them the running maximum."""
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    peak, total = tl.full((BLOCK,), a if CAPPED else -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        z = tl.load(logits + row * vocab + start + col, start + col < vocab, 0.0).to(tl.float32)
        z = tl.where(start + col < vocab, a * tl.sigmoid(slope * z + shift) if CAPPED else slope * z, -1e30)
        if not CAPPED:
            higher = tl.maximum(peak, z)
            total *= tl.exp(peak - higher)
            peak = higher
        total += tl.exp(z - peak)  # 1 for each column that an empty lane does not have: exp(peak - top) cancels it
    top = tl.max(peak, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
    tl.store(lses + row, lse)
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k * rows + row)
        z = tl.load(logits + row * vocab + target, target >= 0, 0.0).to(tl.float32)
        z = a * tl.sigmoid(slope * z + shift) if CAPPED else slope * z
        tl.store(losses + k * rows + row, tl.where(target >= 0, lse - z, 0.0))


def loss_gradient_kernel(logits, targets, lses, grads, unit, out, out_t, rows, vocab, a, slope, shift,
                         CAPPED: tl.constexpr, TARGETS: tl.constexpr, TRANSPOSED: tl.constexpr, ROWS: tl.constexpr,
                         COLS: tl.constexpr):
    """One tile of the logits' gradient / unit, stored as rows and for FP8 as columns, too: (rows, vocab) and
    (vocab, rows). grads: of the summed loss of each target."""
    row, col = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside, where = (row < rows)[:, None] & (col < vocab)[None, :], row.to(tl.int64)[:, None] * vocab + col[None, :]
    z = tl.load(logits + where, inside, 0.0).to(tl.float32)
    share = tl.sigmoid(slope * z + shift) if CAPPED else z
    z = a * share if CAPPED else slope * z
    weight, hit = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k * rows + row, row < rows, -1)
        grad = tl.where(target >= 0, tl.load(grads + k) / tl.load(unit), 0.0)
        weight += grad
        hit += tl.where(col[None, :] == target[:, None], grad[:, None], 0.0)
    lse = tl.load(lses + row, row < rows, 0.0)
    result = weight[:, None] * tl.exp(z - lse[:, None]) - hit
    result = (result * z * (slope - slope * share) if CAPPED else result * slope).to(out.dtype.element_ty)
    tl.store(out + where, result, inside)
    if TRANSPOSED:
        tl.store(out_t + col.to(tl.int64)[None, :] * rows + row[:, None], result, inside)


def cap_arguments(cap: list[float]) -> tuple[float, float, float]:
    """a, slope and shift of a * sigmoid(slope * z + shift), or without a cap of slope * z."""
    return (cap[0], 1 / cap[2], cap[1] / cap[2]) if cap else (0.0, 1.0, 0.0)


def loss_rows(logits_NV: Tensor, targets_KN: Tensor, cap: list[float], kernel: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropies of capped logits, (K, N), 0 where the target is IGNORE, and log-sum-exps, (N,), fp32."""
    (rows, vocab), (count, _) = logits_NV.shape, targets_KN.shape
    if kernel:
        lse_N = logits_NV.new_empty(rows, dtype=torch.float32)
        losses_KN = lse_N.new_empty(count, rows)
        triton_kernel(loss_kernel)[(rows,)](logits_NV, targets_KN.contiguous(), losses_KN, lse_N, rows, vocab,
                                            *cap_arguments(cap), CAPPED=any(cap[:1]), TARGETS=count, BLOCK=4096,
                                            num_warps=8)
        return losses_KN, lse_N
    losses, lses = [], []
    for z, target in zip(logits_NV.split(LOSS_CHUNK), targets_KN.split(LOSS_CHUNK, dim=1), strict=True):
        z = cap_logits(z.float(), cap or None)
        lses.append(z.logsumexp(-1))
        losses.append((lses[-1] - z.gather(1, target.clamp_min(0).long().T).T) * (target != IGNORE))
    return torch.cat(losses, dim=1), torch.cat(lses)


def logit_gradient(logits_NV: Tensor, targets_KN: Tensor, lse_N: Tensor, grad_K: Tensor, unit: Tensor, cap: list[float],
                   dtype: torch.dtype, kernel: bool) -> tuple[Tensor, Tensor]:
    """Gradient of sum(grad_K * losses_K) by the uncapped logits, in multiples of `unit`; and its transpose."""
    (rows, vocab), fp8 = logits_NV.shape, dtype.itemsize == 1
    if kernel:
        out = logits_NV.new_empty(rows, vocab, dtype=dtype)
        out_t = out.new_empty(vocab, rows) if fp8 else out
        triton_kernel(loss_gradient_kernel)[(-(-rows // 64), -(-vocab // 128))](
            logits_NV, targets_KN.contiguous(), lse_N, grad_K.contiguous(), unit, out, out_t, rows, vocab,
            *cap_arguments(cap), CAPPED=any(cap[:1]), TARGETS=len(targets_KN), TRANSPOSED=fp8, ROWS=64, COLS=128,
            num_warps=8)
        return out, out_t if fp8 else out.T
    parts = []
    for z, target, lse in zip(logits_NV.split(LOSS_CHUNK), targets_KN.split(LOSS_CHUNK, dim=1), lse_N.split(LOSS_CHUNK),
                              strict=True):
        z, weight = cap_logits(z.float(), cap or None), grad_K[:, None] * (target != IGNORE)
        gradient = (z - lse[:, None]).exp() * weight.sum(0)[:, None]
        gradient.scatter_add_(1, target.clamp_min(0).long().T, -weight.T)
        if cap:
            gradient *= z * (1 - z / cap[0]) / cap[2] if cap[0] else 1 / cap[2]
        parts.append((gradient / unit).to(dtype))
    out = torch.cat(parts)
    return out, out.T.contiguous() if fp8 else out.T


def head_scales(model_dim: int) -> tuple[float, float]:
    """e4m3 scales of the head's RMS-normed inputs, at most sqrt(model_dim), and of its weights: powers of two, so that
    only the cast rounds. Weights up to 448 / 256 = 1.75 fit (records 28 and 89: 0.875 and 1.6)."""
    return 2.0 ** math.ceil(math.log2(FP8_INPUT_MARGIN * math.sqrt(model_dim) / 448)), 2.0**-8


@operator("head(Tensor x, Tensor weight, Tensor xq, Tensor wq, Tensor targets, float[] cap, bool kernel) -> "
          "(Tensor, Tensor, Tensor)")
def fused_head(x_ND: Tensor, weight_VD: Tensor, xq_ND: Tensor, wq_VD: Tensor, targets_KN: Tensor, cap: list[float],
               kernel: bool):
    """Losses (K,), logits and log-sum-exps. xq and wq are x and weight in FP8, or they themselves."""
    if xq_ND.dtype.itemsize == 1:
        scales = [torch.full((), scale, device=x_ND.device) for scale in head_scales(x_ND.size(1))]
        logits_NV = fp8_product(xq_ND, wq_VD, *scales, fast=True)
    else:
        logits_NV = F.linear(xq_ND, wq_VD)
    losses_KN, lse_N = loss_rows(logits_NV, targets_KN, cap, kernel)
    return losses_KN.sum(1), logits_NV, lse_N


@operator("head_backward(Tensor grad, Tensor xq, Tensor wq, Tensor targets, Tensor logits, Tensor lse, float[] cap, "
          "bool kernel, ScalarType dtype) -> (Tensor, Tensor)")
def fused_head_backward(grad_K: Tensor, xq_ND: Tensor, wq_VD: Tensor, targets_KN: Tensor, logits_NV: Tensor,
                        lse_N: Tensor, cap: list[float], kernel: bool, dtype: torch.dtype):
    """Gradients of x and weight. FP8: a token's loss being a sum over its targets, the gradient of a logit is at most
    sum |grad| * a / 4c; in units of that / 57344 it always fits e5m2, and the units go into the products' scales."""
    fp8 = xq_ND.dtype.itemsize == 1
    if not fp8:
        gradient, transposed = logit_gradient(logits_NV, targets_KN, lse_N, grad_K, torch.ones_like(grad_K[0]), cap,
                                              logits_NV.dtype, kernel)
        return gradient @ wq_VD, transposed @ xq_ND
    steepest = (cap[0] / 4 or 1.0) / cap[2] if cap else 1.0
    unit = grad_K.abs().sum().clamp_min(1e-30) * (steepest / torch.finfo(torch.float8_e5m2).max)
    gradient, transposed = logit_gradient(logits_NV, targets_KN, lse_N, grad_K, unit, cap, torch.float8_e5m2, kernel)
    x_scale, w_scale = (torch.full((), scale, device=unit.device) for scale in head_scales(xq_ND.size(1)))
    return (fp8_product(gradient, wq_VD.T.contiguous(), unit, w_scale, fast=False).to(dtype),
            fp8_product(transposed, xq_ND.T.contiguous(), unit, x_scale, fast=False).to(dtype))


def _head_backward(ctx, grad_K: Tensor, *_):
    gradients = fused_head_backward(grad_K, *ctx.saved_tensors, ctx.cap, ctx.kernel, ctx.dtype)
    return (*gradients, *[None] * 5)


def _head_context(ctx, inputs, output):
    x, _, xq, wq, targets, ctx.cap, ctx.kernel = inputs
    ctx.save_for_backward(xq, wq, targets, *output[1:])
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)


fused_head.register_autograd(_head_backward, setup_context=_head_context)


@fused_head.register_fake
def _(x, weight, xq, wq, targets, cap, kernel):
    logits = torch.bfloat16 if xq.dtype.itemsize == 1 else x.dtype
    return (x.new_empty(len(targets), dtype=torch.float32), x.new_empty(len(x), len(weight), dtype=logits),
            x.new_empty(len(x), dtype=torch.float32))


@fused_head_backward.register_fake
def _(grad, xq, wq, targets, logits, lse, cap, kernel, dtype):
    return torch.empty_like(xq, dtype=dtype), torch.empty_like(wq, dtype=dtype)


def head_losses(x_ND: Tensor, weight_VD: Tensor, targets_KN: Tensor, cap: tuple[float, ...] | None, kernel: bool,
                fp8: bool) -> tuple[Tensor, Tensor]:
    """Cross-entropies of capped logits x @ weight.T with each row of targets, summed, (K,) fp32 in nats, IGNORE left
    out; and the number of values that FP8 clipped, int64. Plain, or without fp32 logits by the Triton kernels (record
    60), with the products in FP8 (19). Their gradients come from outside, so multi-token weights need nothing here."""
    if not kernel and not fp8:
        logits = cap_logits(F.linear(x_ND, weight_VD), cap).float()
        losses = [F.cross_entropy(logits, t.long(), reduction="sum", ignore_index=IGNORE) for t in targets_KN]
        return torch.stack(losses), targets_KN.new_zeros((), dtype=torch.int64)
    x, weight, clipped = x_ND.detach(), weight_VD.detach(), targets_KN.new_zeros((), dtype=torch.int64)
    if fp8:
        scales = head_scales(x.size(1))
        clipped = (x.abs() > 448 * scales[0]).sum() + (weight.abs() > 448 * scales[1]).sum()
        x, weight = to_fp8(x, scales[0]), to_fp8(weight, scales[1])
    return fused_head(x_ND, weight_VD, x, weight, targets_KN, list(cap or ()), kernel)[0], clipped


# --- experts: products of sorted rows. Sorted row j belongs to (token, choice) number order[j]: that row of results,
# and row order[j] // choices of x; expert e has the rows from ends[e - 1] up to ends[e]. Shapes and grids do not depend
# on how many those are, so nothing waits for the GPU to tell. Suffixes: E experts, F hidden, R = tokens * choices.


def expert_product_kernel(a, b, index, ends, post, out, experts, rows, cols, depth, BACKWARD: tl.constexpr,
                          SCATTER: tl.constexpr, EXPERTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
                          DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """out[j] = relu(a[index[j]] @ b[e])^2 for each sorted row j, e being its expert, or in the backward pass
    (a[index[j]] @ b[e].T) * 2 sqrt(post[j]); with SCATTER the product alone: out[index[j]] = a[j] @ b[e], or b[e].T.
    Expert e has the tiles from number ends[e - 1] // ROWS + e on: enough for any rows, and those in excess end at once.
    Tiles run down GROUP rows before they go right: b stays in the L2."""
    tiles_down, tiles_right = rows // ROWS + experts, tl.cdiv(cols, COLS)
    group, within = tl.program_id(0) // (GROUP * tiles_right), tl.program_id(0) % (GROUP * tiles_right)
    height = min(tiles_down - group * GROUP, GROUP)
    tile, e = group * GROUP + within % height, tl.arange(0, EXPERTS)
    earlier = tl.load(ends + e, e < experts, rows) // ROWS + e < tile
    expert = tl.sum(earlier.to(tl.int32), 0)
    begin, end = tl.load(ends + expert - 1, expert > 0, 0), tl.load(ends + expert)
    first = begin + (tile - expert - begin // ROWS) * ROWS
    if first < end:
        row = first + tl.arange(0, ROWS)
        indexed, row = tl.load(index + row, row < end, 0)[:, None], row.to(tl.int64)[:, None]
        col = ((within // height) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
        k, total = tl.arange(0, DEPTH), tl.zeros((ROWS, COLS), dtype=tl.float32)
        source, target = (row, indexed) if SCATTER else (indexed, row)
        b += expert.to(tl.int64) * depth * cols
        for start in range(0, depth, DEPTH):
            left = tl.load(a + source * depth + (start + k)[None, :], (row < end) & (start + k < depth)[None, :], 0.0)
            where = col * depth + (start + k)[:, None] if BACKWARD else (start + k).to(tl.int64)[:, None] * cols + col
            right = tl.load(b + where, (col < cols) & (start + k < depth)[:, None], 0.0)
            total = tl.dot(left, right, total, input_precision="ieee")
        inside = (row < end) & (col < cols)
        if BACKWARD and not SCATTER:
            total *= 2 * tl.sqrt(tl.load(post + target * cols + col, inside, 0.0).to(tl.float32))
        elif not SCATTER:
            total = tl.maximum(total, 0.0) * total
        tl.store(out + target * cols + col, total.to(out.dtype.element_ty), inside)


def expert_weight_kernel(a, b, index, ends, out, rows, cols, GATHER_A: tl.constexpr, ROWS: tl.constexpr,
                         COLS: tl.constexpr, DEPTH: tl.constexpr):
    """One tile of out[e] = a.T @ b, summed over expert e's rows: a[index[j]] and b[j], or else a[j] and b[index[j]].
    The tiles of an expert run together: its rows stay in the L2."""
    expert, tiles_down = tl.program_id(1).to(tl.int64), tl.cdiv(rows, ROWS)
    row = ((tl.program_id(0) % tiles_down) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    col = ((tl.program_id(0) // tiles_down) * COLS + tl.arange(0, COLS)).to(tl.int64)[None, :]
    begin, end = tl.load(ends + expert - 1, expert > 0, 0), tl.load(ends + expert)
    total = tl.zeros((ROWS, COLS), dtype=tl.float32)
    for start in range(begin, end, DEPTH):
        k = start + tl.arange(0, DEPTH)
        source, k = tl.load(index + k, k < end, 0), k.to(tl.int64)
        left = tl.load(a + (source if GATHER_A else k)[None, :] * rows + row, (row < rows) & (k < end)[None, :], 0.0)
        right = tl.load(b + (k if GATHER_A else source)[:, None] * cols + col, (col < cols) & (k < end)[:, None], 0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    inside = (row < rows) & (col < cols)
    tl.store(out + (expert * rows + row) * cols + col, total.to(out.dtype.element_ty), inside)


def expert_tile(x: Tensor, num_stages: int) -> dict:
    """Tile and launch options: three tiles of each operand have to fit in shared memory."""
    small = small_shared_memory(x.device.type) or x.element_size() > 2
    return dict(ROWS=128, COLS=128 if small else 256, DEPTH=32 if small else 64, num_warps=8, num_stages=num_stages)


def fused_product(a: Tensor, b_EKM: Tensor, index_R: Tensor, ends_E: Tensor, post: Tensor | None = None,
                  backward: bool = False, scatter: bool = False) -> Tensor:
    """(R, M), or in the backward pass, which multiplies by b[e].T, (R, K): see `expert_product_kernel`."""
    experts, depth, cols = (b_EKM.mT if backward else b_EKM).shape
    rows, tile = len(index_R), expert_tile(a, num_stages=3)
    out = a.new_empty(rows, cols)
    grid = ((rows // tile["ROWS"] + experts) * -(-cols // tile["COLS"]),)
    triton_kernel(expert_product_kernel)[grid](
        a.contiguous(), b_EKM.contiguous(), index_R, ends_E, out if post is None else post, out, experts, rows, cols,
        depth, BACKWARD=backward, SCATTER=scatter, EXPERTS=1 << (experts - 1).bit_length(), GROUP=8, **tile)
    return out


def fused_weight_gradient(a: Tensor, b: Tensor, index_R: Tensor, ends_E: Tensor, gather_a: bool) -> Tensor:
    """(E, columns of a, columns of b), exactly 0 for an expert without rows: see `expert_weight_kernel`."""
    (experts,), rows, cols, out = ends_E.shape, a.size(1), b.size(1), a.new_empty(len(ends_E), a.size(1), b.size(1))
    tile = expert_tile(a, num_stages=5)  # an index is loaded before what it points to: 5 stages hold three tiles
    grid = (-(-rows // tile["ROWS"]) * -(-cols // tile["COLS"]), experts)
    triton_kernel(expert_weight_kernel)[grid](a.contiguous(), b.contiguous(), index_R, ends_E, out, rows, cols,
                                              GATHER_A=gather_a, **tile)
    return out


@operator("experts(Tensor x, Tensor up, Tensor down, Tensor order, Tensor ends, int choices) -> (Tensor, Tensor)")
def fused_experts(x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, order_R: Tensor, ends_E: Tensor, choices: int):
    """y[order[j]] = relu(x[order[j] // choices] @ up[e])^2 @ down[e], (R, D), and the hidden values of sorted rows,
    (R, F). `order` int64, `ends` int32, cumulative: an expert may have no rows, its gradients are then exactly 0."""
    post_RF = fused_product(x_ND, up_EDF, order_R // choices, ends_E)
    return fused_product(post_RF, down_EFD, order_R, ends_E, scatter=True), post_RF


@operator("experts_backward(Tensor grad, Tensor x, Tensor up, Tensor down, Tensor order, Tensor ends, Tensor post, "
          "int choices) -> (Tensor, Tensor, Tensor)")
def fused_experts_backward(grad_RD: Tensor, x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, order_R: Tensor,
                           ends_E: Tensor, post_RF: Tensor, choices: int):
    pre_grad_RF = fused_product(grad_RD, down_EFD, order_R, ends_E, post_RF, backward=True)
    x_grad_RD = fused_product(pre_grad_RF, up_EDF, order_R, ends_E, backward=True, scatter=True)
    return (x_grad_RD.unflatten(0, (-1, choices)).sum(1),
            fused_weight_gradient(x_ND, pre_grad_RF, order_R // choices, ends_E, gather_a=True),
            fused_weight_gradient(post_RF, grad_RD, order_R, ends_E, gather_a=False))


def _experts_backward(ctx, grad_RD: Tensor, _):
    return (*fused_experts_backward(grad_RD, *ctx.saved_tensors, ctx.choices), None, None, None)


def _experts_context(ctx, inputs, output):
    *tensors, ctx.choices = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


fused_experts.register_fake(lambda x, up, down, order, ends, choices: (x.new_empty(order.size(0), x.size(1)),
                                                                       x.new_empty(order.size(0), up.size(2))))
fused_experts_backward.register_fake(lambda grad, *inputs: tuple(t.new_empty(t.shape) for t in inputs[:3]))
fused_experts.register_autograd(_experts_backward, setup_context=_experts_context)


# --- layers

GATE_DIM = 12  # dimensions of the residual stream that gates read (record 28)
HEAD_MULTIPLE = 128  # the vocabulary is padded to a multiple of this
ROUTER_STD = 0.01  # of the routers' initial weights
# Learned scalars of a layer and their initial values: weights of the residual stream, of the embedding (added in again
# at every layer), of the skip connection, of the values, of the value embedding (records 11, 14, 15), of the output
# where the last layer's is freed of it (record 40).
SCALARS = {"residual": 1.0, "embedding": 0.0, "skip": 1.0, "value": 0.5, "value_embed": 0.5, "backout": 0.5}


# differs from train_gpt.py: the mixture
class Layer(NamedTuple):
    """One row of the layer table."""

    attention: str  # L long window, S short window, P short window and paired heads, - none
    value_table: int | None  # value-embedding table that is mixed into v
    skip_from: int | None  # layer whose output is added to this one's input
    mixture: int | None = None  # number among the mixture layers; None: a dense MLP


def auto_attention(num_layers: int, paired: bool) -> str:
    """Long windows in the first, the last and a layer at a third (record 20); from 12 layers on no attention in layer
    7/12 (record 17); paired heads in every third of the others (record 58 has 4 such layers of 11)."""
    long, none = {0, num_layers // 3, num_layers - 1}, 7 * num_layers // 12 if num_layers >= 12 else None
    return "".join("-" if i == none else "L" if i in long else "P" if paired and i % 3 == 2 else "S"
                   for i in range(num_layers))


# differs from train_gpt.py: the mixture
def layer_table(s: Settings) -> list[Layer]:
    """Topology of the model. Value tables serve the first and again the last layers (record 17); `unet` adds the
    output of layer i to layer n-1-i (record 11), `single` that of layer n/4 to layer n/2 (record 45)."""
    n, tables, table = s.num_layers, s.value_embeds, []
    for i, attention in enumerate(s.attention):
        value = i if i < tables else i - (n - tables) if i >= n - tables else None
        skip = {"unet": n - 1 - i if n - 1 - i < i else None, "single": n // 4 if i == n // 2 > 1 else None}.get(s.skip)
        mixture = s.mixtures.index(i) if i in s.mixtures else None
        table.append(Layer(attention, value if attention != "-" else None, skip, mixture))
    return table


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    return F.rms_norm(x, (x.size(-1),))


def short_window(window, step: int):
    """Half of a long window, an int or int tensor, rounded up to `step` tokens."""
    return -(-window // (2 * step)) * step


def rotary_table(length: int, head_dim: int, base: float, window: int = 1, longer: int = 1) -> tuple[Tensor, Tensor]:
    """cos and sin, (length, 1, head_dim / 4) fp32, of frequencies 1 .. 1/base, in radians per token. For a `longer`
    window than that of training, YaRN (Peng et al. 2023, arXiv 2309.00071): frequencies that turn less than once in
    the window are slowed down by the ratio of the two, those that turn 32 times stay, the others lie between. (Without
    its temperature: queries and keys are normed.)"""
    frequency = (1.0 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32)
    if longer > window:
        kept = ((window * frequency / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) * window / longer)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[:, None]
    return angle.cos(), angle.sin()


def rotate(x_BTHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-truncated RoPE: rotates the first half of the pairs (x[i], x[i + K/2]) by the angle of their position, in
    fp32; the other half stands still and carries content regardless of position (record 17)."""
    a, a_still, b, b_still = x_BTHK.chunk(4, dim=-1)
    a, b = a.float(), b.float()
    turned = (a * cos + b * sin).type_as(x_BTHK), (b * cos - a * sin).type_as(x_BTHK)
    return torch.cat((turned[0], a_still, turned[1], b_still), dim=-1)


class Place(NamedTuple):
    """What a layer knows about the tokens' positions."""

    cos: Tensor  # of the rotary angles, (T, 1, K / 4)
    sin: Tensor
    follows_BT11: Tensor  # True where the token before belongs to the same document


def without_component(y: Tensor, direction: Tensor) -> Tensor:
    """y minus its projection on `direction`, along the last axis."""
    unit = F.normalize(direction, dim=-1)
    return y - (y * unit).sum(-1, keepdim=True) * unit


def pair(x_BTHK: Tensor) -> Tensor:
    """(B, T, H, K) -> (B, 2T, H/2, K), head h and head h + H/2 of a token one after the other; a view if the tokens are
    contiguous. Each query sees the keys of both heads in a short window. (Record 58 orders the two heads of a token,
    and halves the window, so that the cost stays that of a short layer; here it doubles.)"""
    return x_BTHK.unflatten(2, (2, -1)).flatten(1, 2)


def uniform(*shape: int) -> Tensor:
    """Uniform with standard deviation 0.5 / sqrt(fan_in), the fan-in being the last axis."""
    bound = math.sqrt(3) * 0.5 * shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)


class Attention(nn.Module):
    """Causal self-attention of one layer: QK-norm, RoPE, key offset, value embedding, paired heads, output gate.

    qkvo holds the four matrices in one shape, so that the optimizer can batch them; the output matrix is the
    transposed one and starts at zero."""

    def __init__(self, s: Settings, kind: str):
        super().__init__()
        self.num_heads, self.head_dim, self.gated, self.value_gated = s.num_heads, s.head_dim, s.attn_gate, s.value_gate
        self.scale, self.backend, self.options = s.scale, s.backend, flex_options(s.device)
        self.offset, self.paired, self.xsa = s.key_offset and kind == "L", kind == "P", s.xsa
        self.qkvo = nn.Parameter(torch.cat((uniform(3, s.width, s.width), torch.zeros(1, s.width, s.width))))

    def forward(self, x_BTD: Tensor, value_BTD: Tensor | None, mask, place: Place, scalars: dict, gates: Tensor | None):
        q, k, v, (own, gate) = self.project(x_BTD, value_BTD, place, scalars, gates)
        q, k, v = (pair(x) if self.paired else x for x in (q, k, v))
        y = attend(q, k, v, mask, self.scale, self.backend, self.options).reshape(own.shape)
        y = without_component(y, own) if self.xsa else y
        _, out = self.qkvo.split((3, 1))
        return (y if gate is None else y * gate).flatten(2) @ out[0]

    def project(self, x_BTD: Tensor, value_BTD: Tensor | None, place: Place, scalars: dict, gates: Tensor | None):
        """q, k, v of each position, (B, T, H, K), and what its output needs: its v and its gate, (B, T, H, 1) or None.
        """
        qkv, _ = self.qkvo.split((3, 1))
        qk, v = F.linear(x_BTD, qkv.flatten(0, 1)).unflatten(-1, (3 * self.num_heads, self.head_dim)).split(
            (2 * self.num_heads, self.num_heads), dim=2)
        q, k = (rotate(x, place.cos, place.sin) for x in norm(qk).chunk(2, dim=2))
        k = self.offset_keys(k, place.follows_BT11)
        out_gate = value_gate = None
        if gates is not None:
            both = torch.sigmoid(F.linear(x_BTD[..., :GATE_DIM], gates.flatten(0, 1)))
            out_gate, value_gate = both.unflatten(-1, (2, self.num_heads, 1)).unbind(2)
        if value_BTD is not None:
            weight = scalars["value_embed"] * (2 * value_gate if self.value_gated else 1)
            v = scalars["value"] * v + weight * value_BTD.view_as(v)
        return q, k, v, (v, out_gate if self.gated else None)

    def offset_keys(self, k_BTHK: Tensor, follows_BT11: Tensor) -> Tensor:
        """Partial key offset: the unrotated half of a key is that of the token before, if it is of the same document.
        A query that looks for a content finds what came after it: one layer can do induction (record 49)."""
        if not self.offset:
            return k_BTHK
        previous = torch.where(follows_BT11, torch.cat((k_BTHK[:, :1], k_BTHK[:, :-1]), dim=1), k_BTHK)
        (a, _, b, _), (_, a_still, _, b_still) = k_BTHK.chunk(4, dim=-1), previous.chunk(4, dim=-1)
        return torch.cat((a, a_still, b, b_still), dim=-1)


class MLP(nn.Module):
    """ReLU^2 feed-forward; both matrices are (hidden, model), so that the optimizer can batch them (record 27)."""

    def __init__(self, s: Settings, hidden: int):
        super().__init__()
        self.kernel, self.fp8 = "mlp" in s.kernels, s.fp8_mlp
        self.up = nn.Parameter(uniform(hidden, s.width))
        self.down = nn.Parameter(torch.zeros(hidden, s.width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        fp8 = self.fp8 and torch.is_grad_enabled()  # evaluation is exact
        return mlp_relu2(x_BTD.flatten(0, 1), self.up, self.down, self.kernel, fp8).view_as(x_BTD)


# --- experts and routers


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


def arrange(experts_NK: Tensor, num_experts: int, impl: str) -> Grouping:
    """Sorted rows as a backend wants them: `bmm` in about four blocks an expert; `loop` in multiples of LOOP_ROWS, as
    oneDNN makes a new kernel for each new size."""
    g = group_rows(experts_NK, num_experts)
    if impl in ("grouped", "triton"):
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


def expert_mlp(x_ND: Tensor, up_EDF: Tensor, down_EFD: Tensor, experts_NK: Tensor, impl: str) -> Tensor:
    """relu(x @ up[e])^2 @ down[e] for each expert e that a token has chosen, (N, K, D)."""
    g, choices = arrange(experts_NK, len(up_EDF), impl), experts_NK.size(1)
    if impl == "triton":
        y = fused_experts(x_ND, up_EDF, down_EFD, g.order_R, g.ends_E, choices)[0]
        return y.unflatten(0, (-1, choices))
    x_RD = Spread.apply(x_ND, g.order_R, g.inverse_R, choices)
    y_RD = expert_product(expert_product(x_RD, up_EDF, g, impl).relu().square(), down_EFD, g, impl)
    return Collect.apply(y_RD, g.order_R, g.inverse_R).unflatten(0, (-1, choices))


DROP_PARTS = 8  # parts of a row by which dropped choices are counted
NOISE_FLOOR = 0.01  # least standard deviation of noisy_topk's noise: chance_of_choice divides by it


def sum_sizes(num_experts: int) -> dict[str, int]:
    """What a router sums over tokens. For each expert: how often it was chosen, its gates (noisy_topk) or share of the
    scores, its chance to be chosen under another noise (noisy_topk, else 0). Choices dropped in each part of the row.
    Entropy of the scores, key of the last choice less that of the next, squared log-sum-exp and mean square of the
    logits."""
    return {"chosen": num_experts, "importance": num_experts, "load": num_experts, "dropped": DROP_PARTS,
            "entropy": 1, "margin": 1, "z": 1, "logit": 1}


def named_sums(sums: Tensor, num_experts: int) -> dict[str, Tensor]:
    """The last axis by the names of sum_sizes."""
    sizes = sum_sizes(num_experts)
    return dict(zip(sizes, sums.split(list(sizes.values()), dim=-1), strict=True))


def chance_of_choice(clean_NE: Tensor, noise_std_NE: Tensor, noisy_NE: Tensor, top_NK: Tensor, choices: int) -> Tensor:
    """Probability that an expert is among the chosen if its own noise is drawn again, (N, E): that it exceeds the
    K-th largest noisy logit of the others (Shazeer et al. 2017, arXiv 1701.06538, appendix A). `top_NK`: the K + 1
    largest, in order; if there is no K + 1st, all are chosen."""
    if top_NK.size(1) == choices:
        return torch.ones_like(clean_NE)
    inside, outside = top_NK[:, choices - 1:choices], top_NK[:, choices:choices + 1]
    threshold = torch.where(noisy_NE > outside, outside, inside)
    return torch.special.ndtr((clean_NE - threshold) / noise_std_NE)


def among(experts: Tensor, num_experts: int) -> Tensor:
    """Numbers of experts (.., K) -> (.., E), True for those."""
    return (experts[..., None] == torch.arange(num_experts, device=experts.device)).any(-2)


class Routing(NamedTuple):
    """What a router decides, and sums for its balance and its report."""

    experts_NK: Tensor
    gates_NK: Tensor  # fp32
    sums_S: Tensor | None  # see sum_sizes; None without gradients


class Router(NamedTuple):
    """How tokens choose: everything that is not learned."""

    kind: str
    num_experts: int
    choices: int
    norm: bool
    scale: float
    capacity: float
    forced: bool

    def __call__(self, x_BTD: Tensor, weight_RD: Tensor, bias_E: Tensor, noise_BTE: Tensor | None) -> Routing:
        """Routing of normed tokens. weight: (E, D) fp32, noisy_topk (2E, D), the second half for the noise's size;
        bias: sigmoid_bias's, for the choice alone; noise: standard normal, None in evaluation."""
        logits, *noise_logits = F.linear(x_BTD.float().flatten(0, 1), weight_RD).split(self.num_experts, dim=1)
        scores = torch.sigmoid(logits) if self.kind == "sigmoid_bias" else logits.softmax(-1)
        keys, noise_std = scores + bias_E if self.kind == "sigmoid_bias" else logits, None
        if noise_BTE is not None:
            noise_std = F.softplus(noise_logits[0]) + NOISE_FLOOR
            keys = logits + noise_BTE.flatten(0, 1) * noise_std
            scores = keys.softmax(-1)
        top, experts = keys.topk(min(self.choices + 1, self.num_experts))
        experts = self.in_turn(experts) if self.forced else experts[:, :self.choices]
        gates = scores.gather(1, experts)
        if self.norm and self.choices > 1:
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
        kept = self.kept(experts.view(*x_BTD.shape[:2], -1)) if self.capacity and torch.is_grad_enabled() else None
        sums = None
        if torch.is_grad_enabled():
            load = None if noise_std is None else chance_of_choice(logits, noise_std, keys, top, self.choices)
            sums = self.sums(logits, scores, experts, gates, load, top, kept)
        return Routing(experts, gates * self.scale * (1 if kept is None else kept.view_as(gates)), sums)

    def in_turn(self, experts_NK: Tensor) -> Tensor:
        """Each expert as often as any other, whatever the router says."""
        number = torch.arange(len(experts_NK) * self.choices, device=experts_NK.device)
        return (number % self.num_experts).view(-1, self.choices)

    def kept(self, experts_BTK: Tensor) -> Tensor:
        """False where an expert has already been chosen as often as its capacity by earlier tokens of the row. What a
        token loses depends on nothing that comes after it, nor on other rows (unlike GShard's order of first choices
        first)."""
        length = experts_BTK.size(1)
        capacity = math.ceil(self.capacity * length * self.choices / self.num_experts)
        chosen = among(experts_BTK, self.num_experts).int()
        return (chosen.cumsum(1) - chosen).gather(2, experts_BTK) < capacity

    def sums(self, logits_NE: Tensor, scores_NE: Tensor, experts_NK: Tensor, gates_NK: Tensor, load_NE: Tensor | None,
             top_NK: Tensor, kept_BTK: Tensor | None) -> Tensor:
        """The sums over tokens that sum_sizes lists, (S,) fp32. Only what penalties read has a gradient: that of the
        entropy is infinite where a score underflows."""
        chosen = among(experts_NK, self.num_experts).sum(0)
        share = scores_NE / scores_NE.sum(-1, keepdim=True)
        importance, load, dropped = share.sum(0), torch.zeros_like(share[0]), share.new_zeros(DROP_PARTS)
        if load_NE is not None:
            importance = torch.zeros_like(share).scatter(1, experts_NK, gates_NK).sum(0)
            load = load_NE.sum(0)
        if kept_BTK is not None:
            part = torch.arange(kept_BTK.size(1), device=share.device) * DROP_PARTS // kept_BTK.size(1)
            dropped = (~kept_BTK).sum((0, 2)).float() @ F.one_hot(part, DROP_PARTS).float()
        last, following = top_NK[:, self.choices - 1], top_NK[:, -1]  # the same if all experts are chosen
        single = (torch.special.entr(share.detach()), (last - following).detach(),
                  logits_NE.logsumexp(-1).square(), logits_NE.detach().square() / self.num_experts)
        return torch.cat((chosen.float(), importance, load, dropped, torch.stack([x.sum() for x in single])))


class Mixture(nn.Module):
    """Feed-forward layer in which each token has some of many experts, and perhaps shared ones."""

    def __init__(self, s: Settings):
        super().__init__()
        self.impl = s.moe_impl
        self.router = Router(s.router, s.experts, s.choices, s.route_norm, s.gate_scale, s.capacity_factor,
                             s.force_balance)
        self.experts_up = nn.Parameter(uniform(s.experts, s.hidden, s.width).mT.contiguous())  # (E, D, F)
        self.experts_down = nn.Parameter(torch.zeros(s.experts, s.hidden, s.width))  # (E, F, D)
        self.shared = MLP(s, s.num_shared * s.hidden) if s.num_shared else None  # side by side they are one MLP

    def forward(self, x_BTD: Tensor, router: tuple[Tensor, Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        """Output and sums. The gates are applied after the experts: before, ReLU^2 would square them."""
        shared = self.shared(x_BTD) if self.shared is not None else None
        experts, gates, sums = self.router(x_BTD, *router)
        y_NKD = expert_mlp(x_BTD.flatten(0, 1), self.experts_up, self.experts_down, experts, self.impl)
        y = (y_NKD * gates[..., None]).sum(1).type_as(x_BTD).view_as(x_BTD)
        return y if shared is None else y + shared, sums


# differs from train_gpt.py: the mixture
class Block(nn.Module):
    """One layer: mix with skip connection and embedding, attention, MLP or mixture of experts."""

    # differs from train_gpt.py: the mixture
    def __init__(self, s: Settings, layer: Layer):
        super().__init__()
        self.attn = Attention(s, layer.attention) if layer.attention != "-" else None
        self.mlp = MLP(s, s.mlp_ratio * s.width) if layer.mixture is None else Mixture(s)

    # differs from train_gpt.py: the mixture's router and sums
    def forward(self, x_BTD: Tensor, x0_BTD: Tensor, skip_BTD: Tensor | None, value_BTD: Tensor | None, mask,
                place: Place, scalars_S: Tensor, gates: Tensor | None,
                router: tuple[Tensor, Tensor, Tensor | None] | None) -> tuple[Tensor, Tensor | None]:
        scalars = dict(zip(SCALARS, scalars_S, strict=True))
        x = x_BTD if skip_BTD is None else x_BTD + scalars["skip"] * skip_BTD
        x = scalars["residual"] * x + scalars["embedding"] * x0_BTD
        if self.attn is not None:
            x = x + self.attn(norm(x), value_BTD, mask, place, scalars, gates)
        y, sums = (self.mlp(norm(x)), None) if router is None else self.mlp(norm(x), router)
        return x + y, sums


# differs from train_gpt.py: routers, their noise, bias and sums
class GPT(nn.Module):
    """The language model. Built in fp32 on the CPU from the seed alone; the optimizer casts it to its dtype."""

    # differs from train_gpt.py: routers
    def __init__(self, s: Settings, vocab_size: int):
        super().__init__()
        torch.manual_seed(s.seed)
        self.layers, self.window_step, self.flex = layer_table(s), s.window_step, s.backend == "flex"
        self.loss_kernel, self.fp8_head, self.choices = "loss" in s.kernels, s.fp8_head == "on", s.choices
        padded = -(-vocab_size // HEAD_MULTIPLE) * HEAD_MULTIPLE
        self.embed = nn.Embedding(padded, s.width)
        self.value_embeds = nn.ModuleList(nn.Embedding(padded, s.width) for _ in range(s.value_embeds))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1)) if s.smear else None  # gate, and its weight
        self.blocks = nn.ModuleList(Block(s, layer) for layer in self.layers)
        self.bigram = nn.Embedding(s.bigram, s.width) if s.bigram else None
        gates = torch.zeros(s.num_layers, 2, s.num_heads, GATE_DIM)  # of head outputs, of value embeddings
        self.gates = nn.Parameter(gates) if s.attn_gate or (s.value_embeds and s.value_gate) else None
        self.scalars = nn.Parameter(torch.tensor([list(SCALARS.values())] * s.num_layers))
        self.backout = 2 * s.num_layers // 3 - 1 if s.backout and s.num_layers > 2 else None  # layer
        self.lm_head = nn.Parameter(torch.zeros(padded, s.width))
        if s.bigram:
            nn.init.zeros_(self.bigram.weight)
        self.register_buffer("saturated", torch.zeros((), dtype=torch.int64), persistent=False)  # clipped FP8 values
        longest = max([stage.seq_len for stage in stage_table(s)] + [s.eval_seq_len])
        for name, table in zip(("cos", "sin"), rotary_table(longest, s.head_dim, s.rope_base), strict=True):
            self.register_buffer(name, table, persistent=False)
        mixtures, noisy = len(s.mixtures), s.router == "noisy_topk"
        if mixtures:  # noisy_topk starts at zero: even chances by the noise; elsewhere ties would all go one way
            routers = torch.zeros(mixtures, 2 * s.experts, s.width) if noisy else (
                torch.randn(mixtures, s.experts, s.width) * ROUTER_STD)
            self.routers = nn.Parameter(routers)
            self.register_buffer("router_bias", torch.zeros(mixtures, s.experts), persistent=False)
        self.inf_shapes = inf_shapes(self, s, vocab_size)
        self.rules, self.scaling = scaled_rules(self.inf_shapes, s)
        self.cap = width_free(s.cap, self.scaling["lm_head"].multiplier)

    # differs from train_gpt.py: noise in, sums out
    def forward(self, inputs_BT: Tensor, targets_KBT: Tensor, docs_BT: Tensor, window: Tensor,
                noise_BMTE: Tensor | None = None) -> Tensor:
        """Cross-entropies with the targets k of `future_targets`, each summed over those that are not IGNORE, in nats,
        and with gradients the routers' sums, (K + M * S,) fp32. `window`: int32 0-D tensor, tokens of the long window;
        document numbers rise along a row; noise: standard normal, for noisy_topk in training."""
        sums: list[Tensor] = []
        x = self.trunk(inputs_BT, docs_BT, window, noise_BMTE, sums)
        return torch.cat([self.losses(x, targets_KBT), *sums])

    # differs from train_gpt.py: noise in, sums out
    def trunk(self, inputs_BT: Tensor, docs_BT: Tensor, window: Tensor, noise_BMTE: Tensor | None = None,
              sums: list[Tensor] | None = None) -> Tensor:
        """Residual stream after the last layer, (B, T, D). The routers' sums are appended to `sums`."""
        follows = F.pad(docs_BT[:, 1:] == docs_BT[:, :-1], (1, 0))[..., None]
        x = x0 = self.embedding(inputs_BT, follows)
        values = [table(inputs_BT) for table in self.value_embeds]
        masks = self.masks(docs_BT, window)
        place = Place(self.cos[:inputs_BT.size(1)], self.sin[:inputs_BT.size(1)], follows[..., None])
        scalars, outputs = self.scalars.type_as(x).unbind(0), []
        gates = [None] * len(self.layers) if self.gates is None else self.gates.unbind(0)
        for i, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            skip = outputs[layer.skip_from] if layer.skip_from is not None else None
            value = values[layer.value_table] if layer.value_table is not None else None
            m, router = layer.mixture, None
            if m is not None:
                weight = self.routers[m] * self.scaling["routers"].multiplier
                router = weight, self.router_bias[m], None if noise_BMTE is None else noise_BMTE[:, m]
            x, own_sums = block(x, x0, skip, value, masks.get(layer.attention), place, scalars[i], gates[i], router)
            outputs.append(x)
            if sums is not None and own_sums is not None:
                sums.append(own_sums)
        return x if self.backout is None else x - scalars[self.backout][-1] * outputs[self.backout]

    def masks(self, docs_BT: Tensor, window: Tensor) -> dict:
        """Mask of each kind of layer, made once per forward pass. A short window is half a long one."""
        half = torch.minimum(short_window(window, self.window_step), window)
        make, kinds = block_mask if self.flex else dense_mask, {layer.attention for layer in self.layers}
        options = {"L": (window, 1), "S": (half, 1), "P": (half, 2)}
        return {kind: make(docs_BT, *options[kind]) for kind in sorted(kinds - {"-"})}

    def embedding(self, inputs_BT: Tensor, follows_BT1: Tensor) -> Tensor:
        """Normed token embeddings, with hashed pairs of tokens; each takes up some of the previous token's, gated, if
        that is of the same document (record 34)."""
        x = self.embed(inputs_BT)
        if self.bigram is not None:
            x = x + self.bigram(bigram_rows(inputs_BT, follows_BT1[..., 0], self.bigram.num_embeddings))
        if self.smear is not None:
            gate, weight = self.smear.split((GATE_DIM, 1))
            previous = torch.cat((x[:, :1], x[:, :-1]), dim=1) * follows_BT1
            x = x + weight * torch.sigmoid(F.linear(x[..., :GATE_DIM], gate[None])) * previous
        return norm(x)

    def head(self, x_BTD: Tensor) -> Tensor:
        """Logits, exact."""
        return cap_logits(F.linear(norm(x_BTD), self.lm_head), self.cap)

    def losses(self, x_BTD: Tensor, targets_KBT: Tensor) -> Tensor:
        fp8 = self.fp8_head and torch.is_grad_enabled()  # evaluation is exact
        losses, saturated = head_losses(norm(x_BTD).flatten(0, 1), self.lm_head, targets_KBT.flatten(1), self.cap,
                                        self.loss_kernel, fp8)
        if fp8:
            self.saturated += saturated
        return losses


def bigram_rows(inputs_BT: Tensor, follows_BT: Tensor, rows: int) -> Tensor:
    """Row of the bigram table for each token and the one before it; 0 at the start of a document."""
    pairs = (inputs_BT[:, 1:] * 40503) ^ (inputs_BT[:, :-1] * 27644)  # below 2^31 for tokens below 50,304
    return F.pad(1 + pairs % (rows - 1), (1, 0)) * follows_BT


def future_targets(targets_BT: Tensor, docs_BT: Tensor, count: int) -> Tensor:
    """Targets and those of the `count` tokens after them, (1 + count, B, T); IGNORE past the end of the document."""
    rows = [targets_BT]
    for k in range(1, count + 1):
        same = docs_BT[:, k:] == docs_BT[:, :-k]
        rows.append(F.pad(targets_BT[:, k:].where(same, IGNORE), (0, k), value=IGNORE))
    return torch.stack(rows)


# differs from train_gpt.py: experts and routers
def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters by kind; `matmul`: those that multiply a token (for FLOPs), `active`: that it meets."""
    kinds = {"embed": "embedding", "value_embeds": "embedding", "blocks": "hidden", "lm_head": "head",
             "routers": "router"}
    counts, idle = dict.fromkeys(("hidden", "embedding", "head", "small", "experts", "router"), 0), 0
    for name, p in model.named_parameters():
        expert = ".experts_" in name
        counts["experts" if expert else kinds.get(name.split(".")[0], "small")] += p.numel()
        idle += p.numel() * (len(p) - model.choices) // len(p) if expert else 0
    total = sum(counts.values())
    matmul = counts["hidden"] + counts["head"] + counts["experts"] + counts["router"] - idle
    return counts | {"total": total, "active": total - idle, "matmul": matmul}


def flops_per_token(s: Settings, counts: dict[str, int], stage: Stage) -> float:
    """FLOPs of forward and backward per token: 6 per matmul parameter, and 12 * model_dim per visible key of each
    attention layer (q.k and weighted sum, 2 FLOPs each, times 3). Keys: the average over a causal row cut at the window
    and at max_doc_len, taken at the stage's final window; shorter documents are not subtracted."""
    length, keys = min(stage.seq_len, stage.max_doc_len or stage.seq_len), 0.0
    long = math.ceil(stage.window / s.window_step) * s.window_step
    short = short_window(long, s.window_step)
    for layer in layer_table(s):
        window = min({"L": long, "-": 0}.get(layer.attention, min(short, long)), length)
        keys += (window - window * (window - 1) / (2 * length)) * (2 if layer.attention == "P" else 1)
    return 6.0 * counts["matmul"] + 12.0 * s.width * keys


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimizer                                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# One class for one rank or many. Each gradient is packed, freed and reduced into the shard of the rank that owns it as
# soon as it is complete in the last micro-step's backward pass; optimizer state and fp32 master weights exist on the
# owner only (ZeRO-2); after the update the owner's weights are gathered by all. Small parameters are all-reduced and
# updated by every rank.


# differs from train_gpt.py: a rounded router would change its choices
FP32_PARAMETERS = ("scalars", "routers")  # names of parameters that are not rounded to bf16


class World(NamedTuple):
    """Place of this process among all."""

    rank: int = 0
    local_rank: int = 0
    size: int = 1


class Rule(NamedTuple):
    """One row of the parameter table."""

    pattern: str  # of the parameter names, a full match
    kind: str  # muon or adamw
    lr: float  # peak learning rate
    betas: tuple[float, float]  # of adamw; of muon: unused (scheduled momentum), beta2 of the variance
    weight_decay: float  # per unit of the peak learning rate
    comm: str  # sharded: its owner updates it; replicated: every rank does
    form: str = "vector"  # a key of FORMS
    std: float = 0.0  # of the initial weights, of a matrix times sqrt(fan_in)
    eps: float = 0.0  # of adamw


# differs from train_gpt.py: experts and routers
def parameter_table(s: Settings) -> list[Rule]:
    """How each parameter is trained. Factors on adam_lr as in records 20 to 28, betas of the small parameters as in
    record 89. Muon's shape rule sqrt(rows / columns) is written out: both MLP matrices are stored as (hidden, model),
    which gives both the factor sqrt(mlp_ratio). An expert's has the shape of its own matrices, at least 1."""
    kind, lr, betas, hidden_decay = hidden_rule(s)
    shape = math.sqrt if kind == "muon" else lambda ratio: 1.0
    mlp, shared = lr * shape(s.mlp_ratio), lr * shape(max(1.0, s.num_shared * s.hidden / s.width))
    expert, adam, decay = lr * s.expert_lr * shape(max(1.0, s.hidden / s.width)), s.adam_lr, s.adam_weight_decay
    router_std = 0.0 if s.router == "noisy_topk" else ROUTER_STD
    return [
        Rule(r"blocks\.\d+\.attn\.qkvo", kind, lr, betas, hidden_decay, "sharded", "matrix", 0.5),
        Rule(r"blocks\.\d+\.mlp\.up", kind, mlp, betas, hidden_decay, "sharded", "matrix", 0.5),
        Rule(r"blocks\.\d+\.mlp\.down", kind, mlp, betas, hidden_decay, "sharded", "transposed"),
        Rule(r"blocks\.\d+\.mlp\.experts_up", kind, expert, betas, hidden_decay, "sharded", "transposed", 0.5),
        Rule(r"blocks\.\d+\.mlp\.experts_down", kind, expert, betas, hidden_decay, "sharded", "transposed"),
        Rule(r"blocks\.\d+\.mlp\.shared\.up", kind, shared, betas, hidden_decay, "sharded", "matrix", 0.5),
        Rule(r"blocks\.\d+\.mlp\.shared\.down", kind, shared, betas, hidden_decay, "sharded", "transposed"),
        Rule(r"routers", "adamw", s.router_lr, (0.9, 0.99), 0.0, "replicated", "readout", router_std),
        Rule(r"lm_head", "adamw", adam, (0.8, 0.95), decay, "sharded", "readout"),
        Rule(r"embed\.weight", "adamw", 75 * adam, (0.8, 0.95), decay, "sharded", "table", 1.0),
        Rule(r"value_embeds\.\d+\.weight", "adamw", 75 * adam, (0.8, 0.95), decay, "sharded", "table", 1.0),
        Rule(r"bigram\.weight", "adamw", 75 * adam, (0.75, 0.95), decay, "sharded", "table"),
        Rule(r"gates", "adamw", adam, (0.9, 0.99), 0.0, "replicated", "matrix"),
        Rule(r"smear", "adamw", adam, (0.9, 0.99), 0.0, "replicated"),
        Rule(r"scalars", "adamw", 5 * adam, (0.9, 0.99), 0.0, "replicated"),
    ]


def hidden_rule(s: Settings) -> tuple[str, float, tuple[float, float], float]:
    """Optimizer, learning rate, betas and weight decay of the hidden matrices."""
    if s.hidden_optimizer == "adamw":
        return "adamw", s.hidden_lr, (0.9, 0.95), s.hidden_weight_decay
    return "muon", s.muon_lr, (0.0, s.muon_beta2), s.muon_weight_decay


def match_rules(table: list[Rule], names: list[str]) -> dict[str, Rule]:
    """Parameter name -> its row of the table. Every parameter must match exactly one."""
    matches = {name: [rule for rule in table if re.fullmatch(rule.pattern, name)] for name in names}
    wrong = {name: [rule.pattern for rule in rules] for name, rules in matches.items() if len(rules) != 1}
    assert not wrong, f"parameter_table must cover each parameter exactly once, but: {wrong}"
    return {name: rules[0] for name, rules in matches.items()}


# --- width transfer (muP). A model's shapes at base_width and at another width tell which axes of each parameter grow
# with it. From that, and from how the parameter is used and trained, follow a few floats, all 1 at base_width. Theory
# and most rules: Tensor Programs V, TP-V (Yang et al. 2022, arXiv 2203.03466); as a condition on spectral norms, which
# covers Muon: Yang, Simon, Bernstein 2023, arXiv 2310.17813. Neither derives anything for depth, batch or duration.

# Axes (fan_out, fan_in) of a parameter by its form; those before them, of banks and experts, are a batch.
FORMS = {
    "matrix": (-2, -1), "transposed": (-1, -2),
    "table": (-1, -2),  # its rows are looked up
    "readout": (-2, -1),  # a matrix whose product is multiplied by Scaling.multiplier
    "vector": (None, None),
}


class InfShape(NamedTuple):
    """Shape of a parameter, and which of its axes grow with the width."""

    shape: tuple[int, ...]
    base: tuple[int, ...]  # shape at the base width
    wide: tuple[bool, ...]  # of each axis: does it grow?
    form: str

    def fans(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """fan_out, fan_in of this parameter where it has that shape; 1, 1 of a vector."""
        return tuple(1 if axis is None else shape[axis] for axis in FORMS[self.form])

    @property
    def growth(self) -> tuple[float, float]:
        """Of fan_out and fan_in, relative to the base."""
        return tuple(now / then for now, then in zip(self.fans(self.shape), self.fans(self.base), strict=True))

    @property
    def role(self) -> str:
        """hidden: width to width, output: width to fixed, input: fixed to width, or fixed."""
        wide_out, wide_in = (axis is not None and self.wide[axis] for axis in FORMS[self.form])
        return "hidden" if wide_out and wide_in else "output" if wide_in else "input" if any(self.wide) else "fixed"


class Scaling(NamedTuple):
    """What --mup makes of a parameter; std is absolute, all others are factors on the standard parametrization."""

    std: float  # standard deviation of the initial weights
    lr: float = 1.0
    multiplier: float = 1.0  # on the product with it
    decay: float = 1.0
    eps: float = 1.0
    fp8: float = 1.0  # on the scale of the gradient of its product, where that is in FP8
    reason: str = "does not grow with the width"


def compare_shapes(shapes: dict[str, tuple], base: dict[str, tuple], delta: dict[str, tuple],
                   forms: dict[str, str]) -> dict[str, InfShape]:
    """An InfShape by parameter name. An axis grows if models of two widths, `base` and `delta`, differ in it."""
    found = {}
    for name, shape in shapes.items():
        wide = tuple(then != later for then, later in zip(base[name], delta[name], strict=True))
        same = [now == then for now, then, grows in zip(shape, base[name], wide, strict=True) if not grows]
        assert all(same), f"{name}: {shape} differs from {base[name]} in an axis that does not grow with the width"
        found[name] = InfShape(tuple(shape), tuple(base[name]), wide, forms[name])
    return found


def scale_parameter(shape: InfShape, rule: Rule, sqrt_tables: bool = False) -> Scaling:
    """The rules, m being the growth of the fan-in. `rule` is the parameter's at the base width.

    - Muon: an orthogonalized update has spectral norm 1; times sqrt(fan_out / fan_in) its effect is that of any width,
      and nothing changes while that ratio stays (2310.17813).
    - AdamW, hidden: an update's entries have one size and add up over the fan-in: rate / m (TP-V, table 8).
    - Readout: multiplier 1 / m, all else constant (ibid.). Equivalent to std / m and rate / m (lemma J.1), but the
      weights keep the size that FP8's scale expects.
    - Input: constant (ibid.). Disputed for embedding tables: rate / sqrt(m), for AdamW by Hayou, Liu 2025, arXiv
      2506.15025; it fails the coordinate check by design.
    - Initial weights: as they are drawn, with 1 / sqrt(fan_in), a constant, or 0. (2310.17813 makes those of a matrix
      to a fixed size smaller; its output would then start at 0 in the limit.)
    - Weight decay: rate * decay is kept, by most accounts (Kosson et al. 2025, arXiv 2510.19093; disputed by Qiu et al.
      2025, arXiv 2512.05620).
    - AdamW's epsilon: as the gradients, which shrink as the fan-out grows, or by a readout's multiplier (TP-V, B.3).
    """
    fan_in, (grown_out, grown_in) = shape.fans(shape.shape)[1], shape.growth
    std = rule.std * (fan_in**-0.5 if rule.form in ("matrix", "transposed") else 1.0)
    eps = 1 / (grown_in if rule.form == "readout" else grown_out)
    if shape.role == "fixed":
        return Scaling(std)
    if rule.kind == "muon":
        return Scaling(std, lr=(grown_out / grown_in) ** 0.5, decay=(grown_in / grown_out) ** 0.5,
                       reason="Muon: sqrt(fan_out / fan_in)")
    if rule.form == "readout":
        fp8 = 1 / grown_in if rule.pattern == "lm_head" else 1.0
        return Scaling(std, multiplier=1 / grown_in, eps=eps, fp8=fp8, reason="TP-V: logits / m")
    if shape.role == "input":
        table = sqrt_tables and rule.form == "table"
        lr, reason = (grown_out**-0.5, "2506.15025: / sqrt(m)") if table else (1.0, "TP-V: input, constant")
        return Scaling(std, lr=lr, decay=1 / lr, eps=eps, reason=reason)
    return Scaling(std, lr=1 / grown_in, decay=grown_in, eps=eps, reason="TP-V: rate / m")


def model_shapes(s: Settings, vocab_size: int) -> dict[str, tuple]:
    """Parameter name -> shape, of a model without weights."""
    with torch.random.fork_rng(devices=()), torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(s, vocab_size).named_parameters()}


def inf_shapes(model: nn.Module, s: Settings, vocab_size: int) -> dict[str, InfShape]:
    """Those of a model's parameters, by name; without --mup no axis grows."""
    base = delta = shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    if s.mup:
        widths = s.base_width, 64 * s.base_width  # far apart: some sizes are rounded
        base, delta = (model_shapes(dataclasses.replace(s.base, width=width), vocab_size) for width in widths)
    forms = {name: rule.form for name, rule in match_rules(parameter_table(s.base), list(shapes)).items()}
    return compare_shapes(shapes, base, delta, forms)


def scaled_rules(shapes: dict[str, InfShape], s: Settings) -> tuple[dict[str, Rule], dict[str, Scaling]]:
    """How each parameter is trained at the model's width, and what --mup changes in that, by name."""
    rules, scaling = match_rules(parameter_table(s.base), list(shapes)), {}
    for name, rule in rules.items():
        f = scaling[name] = scale_parameter(shapes[name], rule, s.mup_embedding == "sqrt")
        rules[name] = rule._replace(lr=rule.lr * f.lr, weight_decay=rule.weight_decay * f.decay, eps=s.adam_eps * f.eps)
    return rules, scaling


def mup_report(s: Settings, vocab_size: int) -> str:
    """The table of --mup-report: what is scaled and why, parameters of equal rows together."""
    with torch.device("meta"):
        model = GPT(s, vocab_size)
    rows = {}
    for name, x in model.inf_shapes.items():
        f, fans = model.scaling[name], x.fans(x.shape)
        shape = " x ".join(f"{size}{'*' if wide else ''}" for size, wide in zip(x.shape, x.wide, strict=True))
        sizes = ("-" if x.form in ("vector", "table") else str(fans[1]),
                 "-" if x.form == "vector" else f"{f.std:.4g}")
        factors = (f"{factor:.4g}" for factor in (f.lr, f.multiplier, f.decay, f.eps, f.fp8))
        rows.setdefault((re.sub(r"\.\d+\.", ".*.", name), x.role, shape, *sizes, model.rules[name].kind, *factors,
                        f.reason))
    head = ("parameter", "role", "shape (* grows)", "fan-in", "init std", "optimizer", "lr x", "multiplier", "decay x",
            "eps x", "FP8 gradient x", "reason")
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in (head, *rows)]
    return "\n".join([f"muP from width {s.base_width} to {s.width}, m = {s.width / s.base_width:g}; "
                      f"attention scale {s.scale:.4g} at head_dim {s.head_dim}", *lines])


# Minimax-optimal quintic steps of Polar Express (Amsel et al. 2025, arXiv 2505.16932; 5 steps, safety 2e-2, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # Muon's quintic (Jordan et al. 2024)


def gram_kernel(x, add, out, size, depth, stride_batch, stride_row, stride_depth, alpha, beta, ADD: tl.constexpr,
                TILE: tl.constexpr, DEPTH: tl.constexpr):
    """One tile on or above the diagonal of alpha * x @ x.T + beta * add, which is stored below it, too."""
    down, right, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    if down <= right:
        row, col, k = down * TILE + tl.arange(0, TILE), right * TILE + tl.arange(0, TILE), tl.arange(0, DEPTH)
        x += batch * stride_batch
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            left = tl.load(x + row[:, None] * stride_row + (start + k)[None, :] * stride_depth,
                           (row < size)[:, None] & (start + k < depth)[None, :], 0.0)
            above = tl.load(x + col[None, :] * stride_row + (start + k)[:, None] * stride_depth,
                            (col < size)[None, :] & (start + k < depth)[:, None], 0.0)
            total = tl.dot(left, above, total, input_precision="ieee")
        where = batch * size * size + row[:, None] * size + col[None, :]
        inside = (row < size)[:, None] & (col < size)[None, :]
        total *= alpha
        if ADD:
            total += beta * tl.load(add + where, inside, 0.0).to(tl.float32)
        total = total.to(out.dtype.element_ty)
        tl.store(out + where, total, inside)
        mirrored = batch * size * size + col[None, :] * size + row[:, None]
        tl.store(out + mirrored, total, inside & (down < right))


@operator("gram(Tensor x, Tensor? add, float alpha, float beta) -> Tensor")
def fused_gram(x_KMN: Tensor, add_KMM: Tensor | None, alpha: float, beta: float):
    count, size, depth = x_KMN.shape
    out, tiles = x_KMN.new_empty(count, size, size), -(-size // 128)
    triton_kernel(gram_kernel)[(tiles, tiles, count)](
        x_KMN, out if add_KMM is None else add_KMM.contiguous(), out, size, depth, *x_KMN.stride(), alpha, beta,
        ADD=add_KMM is not None, TILE=128, DEPTH=64, num_warps=8, num_stages=3)
    return out


fused_gram.register_fake(lambda x, add, alpha, beta: x.new_empty(x.size(0), x.size(1), x.size(1)))


def gram(x_KMN: Tensor, add_KMM: Tensor | None, alpha: float, beta: float, kernel: bool) -> Tensor:
    """alpha * x @ x.mT + beta * add, `add` symmetric: the kernel computes one triangle (record 27)."""
    if kernel:
        return fused_gram(x_KMN, add_KMM, alpha, beta)
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


# differs from train_gpt.py: experts without a token are left alone
class Bank:
    """Parameters that one call updates, cut into slots of one shape: a matrix each for Muon, 1/ranks of a flat
    parameter for AdamW. Slot k * owners + r belongs to rank r; the slots of one k, a round, travel in one collective.

    `state` holds the own slots, fp32: master (the weights) and the moments, each (rounds, *slot)."""

    # differs from train_gpt.py: experts without a token are left alone
    def __init__(self, named: list[tuple[str, nn.Parameter]], rules: dict[str, Rule], s: Settings, world: World):
        self.params, self.s, self.world = dict(named), s, world
        self.rule, first = rules[named[0][0]], named[0][1]
        self.owners = world.size if self.rule.comm == "sharded" else 1
        self.muon = self.rule.kind == "muon"
        self.slot_shape = tuple(first.shape[-2:]) if self.muon else (-(-first.numel() // self.owners),)
        self.slots = [(name, i) for name, p in named for i in range(len(self.cut(p)))]
        self.rounds = [self.slots[k:k + self.owners] for k in range(0, len(self.slots), self.owners)]
        self.own = [k * self.owners + (world.rank if self.owners > 1 else 0) for k in range(len(self.rounds))]
        self.lr = torch.tensor([rules[self.slots[i][0]].lr if i < len(self.slots) else 0.0 for i in self.own],
                               device=s.device).view(-1, *(1 for _ in self.slot_shape))
        self.experts = self.own_experts()
        self.update_function = compiled(muon_update if self.muon else adamw_update, s)
        self.state = {"master": self.own_slots({name: p.detach() for name, p in named})}
        for name, p in named:
            p.data = p.data.to(s.device, torch.float32 if name in FP32_PARAMETERS else s.torch_dtype)
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

    def own_experts(self) -> Tensor | None:
        """For each own slot (AdamW: each entry of it) the number of its expert, layers * experts counted through; None
        if there are none. What holds no expert (or nothing) gets the number past the last one."""
        layers, experts, number = self.s.mixtures, self.s.experts, []
        first = {f"blocks.{i}.mlp.experts_{part}": m * experts for m, i in enumerate(layers) for part in ("up", "down")}
        if not first.keys() & self.params.keys():
            return None
        if not self.muon:  # one parameter, flat
            (name, p), = self.params.items()
            entry = self.own[0] * self.slot_shape[0] + torch.arange(self.slot_shape[0])
            number = (first[name] + entry // p[0].numel()).where(entry < p.numel(), len(layers) * experts)
            return number.to(self.s.device, torch.int32)[None]
        for slot in self.own:
            name, i = self.slots[slot] if slot < len(self.slots) else ("", 0)
            number.append(first[name] + i if name in first else len(layers) * experts)
        return torch.tensor(number, device=self.s.device).view(-1, 1, 1)

    # differs from train_gpt.py: experts without a token are left alone
    def step(self, scale: float, mu: float, step: int, busy: Tensor | None = None):
        """Waits for the own gradients, updates the own slots and sends them off, asynchronously. `busy`: which experts
        saw a token, and True. Updates have full size however small the gradient, and without one would repeat old
        ones; so idle experts keep weights and moments."""
        for work, _ in self.in_flight:
            work.wait()
        self.in_flight, state, h = [], self.state, self.hyper
        self.expect()
        beta1, beta2 = self.rule.betas  # the decay is scaled twice, here and by the rate: it falls as lr^2
        values = dict(decay=self.rule.weight_decay * scale, mu=mu, share1=1 - beta1, share2=1 - beta2,
                      c1=1 - beta1**step, c2=1 - beta2**step)
        for key, value in values.items():
            h[key].fill_(value)
        common, lr, momentum = (state["master"], self.grad), self.lr * scale, h["mu"]
        share1, share2 = h["share1"], h["share2"]
        if busy is not None and self.experts is not None:
            on = busy[self.experts]
            self.grad.masked_fill_(~on, 0.0)  # whatever a grouped product leaves for an expert without rows
            lr, momentum, share1, share2 = lr * on, torch.where(on, momentum, 1.0), share1 * on, share2 * on
        if self.muon:
            self.update_function(*common, state["momentum"], state.get("variance"), lr, h["decay"],
                                 momentum, share2, self.s.orthogonalizer, self.s.torch_dtype, self.s.cautious,
                                 "gram" in self.s.kernels)
        else:
            self.update_function(*common, state["exp_avg"], state["exp_avg_sq"], lr, h["decay"], share1, share2,
                                 h["c1"], h["c2"], self.rule.eps, self.s.cautious)
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


PENALTIES = ("importance", "load", "switch", "z")


def penalties(sums_MS: Tensor, num_experts: int, names: Iterable[str] = PENALTIES) -> dict[str, Tensor]:
    """What makes routers balance, of each layer, from sums per token; 1 where all experts are equal, but for z.
    importance, load: 1 + CV^2 (Shazeer et al. 2017, arXiv 1701.06538); switch: E * sum_i f_i P_i (Fedus et al. 2021,
    arXiv 2101.03961), f_i the share of all choices, without gradient; z: mean squared log-sum-exp (arXiv 2202.08906).
    """
    sums, values = named_sums(sums_MS, num_experts), {}
    for name in names:
        if name == "z":
            values[name] = sums["z"].squeeze(-1)
        elif name == "switch":
            share = sums["chosen"] / sums["chosen"].sum(-1, keepdim=True)
            values[name] = num_experts * (share * sums["importance"]).sum(-1)
        else:
            values[name] = num_experts * (sums[name] / sums[name].sum(-1, keepdim=True)).square().sum(-1)
    return values


def balance_update(sums_MS: Tensor, bias_ME: Tensor, bias_step: Tensor, coefficients: dict[str, float],
                   num_experts: int) -> tuple[Tensor, Tensor]:
    """After a step: slopes (gradients) of the weighted penalties at its sums per token, (M, S), and the new selection
    bias (Wang et al. 2024, arXiv 2408.15664): a fixed step against each expert's over- or underload, then centred."""
    slopes = torch.zeros_like(sums_MS)
    sums, parts = (named_sums(tensor, num_experts) for tensor in (sums_MS, slopes))
    for name, weight in coefficients.items():
        if name == "z":
            parts["z"] += weight
        elif name == "switch":
            parts["importance"] += weight * num_experts * sums["chosen"] / sums["chosen"].sum(-1, keepdim=True)
        else:
            total = sums[name].sum(-1, keepdim=True)
            share = sums[name] / total
            parts[name] += weight * 2 * num_experts / total * (share - share.square().sum(-1, keepdim=True))
    chosen = sums["chosen"]
    bias = bias_ME + bias_step * torch.sign(chosen.mean(-1, keepdim=True) - chosen)
    return slopes, bias - bias.mean(-1, keepdim=True)


class Balance:
    """How routers are kept from sending all tokens to few experts, by the sums over all tokens of a step and all ranks.

    Penalties that are no means over tokens, such as CV^2, would depend on how a batch is split into micro-steps and
    ranks; so what is added to the loss is their linearization at the sums of the step before: sum(slopes * sums). It
    has the penalties' gradient for the whole batch, one step late, and needs one small all-reduce a step."""

    def __init__(self, model: nn.Module, s: Settings, world: World):
        self.s, self.world, self.bias = s, world, model.router_bias
        self.size = len(self.bias), sum(sum_sizes(s.experts).values())
        self.update_function = compiled(balance_update, s)
        self.generator = torch.Generator(s.device)
        self.reset()

    def reset(self):
        """As before the first step: slopes of evenly loaded experts, which turn no router."""
        self.sums, self.micro_steps, self.in_flight = torch.zeros(self.size, device=self.s.device), 0, None
        self.report_sums, self.report_steps = torch.zeros_like(self.sums), 0
        even = torch.full_like(self.sums, 1 / self.s.experts)
        self.bias.zero_()
        self.slopes, _ = self.update_function(even, self.bias, torch.zeros((), device=self.s.device), self.s.penalties,
                                              self.s.experts)

    def noise(self, step: int, rows: int, seq_len: int) -> Tensor | None:
        """Standard normal noise of the next micro-step's rows, (B, M, T, E) fp32: each row's from a generator with its
        own seed, made of the run's, the step and the row's number in the batch. So it does not depend on the number of
        ranks or micro-steps, and a resumed run draws what it would have drawn."""
        if self.s.router != "noisy_topk":
            return None
        noise = torch.empty(rows, self.size[0], seq_len, self.s.experts, device=self.s.device)
        first = (self.micro_steps * self.world.size + self.world.rank) * rows
        for row, out in enumerate(noise, start=first):
            key = hashlib.sha256(f"{self.s.seed} {step} {row}".encode()).digest()
            self.generator.manual_seed(int.from_bytes(key[:7], "little"))
            torch.randn(out.shape, generator=self.generator, device=out.device, out=out)
        return noise

    def add(self, sums: Tensor, weight: float, last: bool = False) -> Tensor:
        """Takes a micro-step's sums; what they add to its share of the loss. weight: 1 / tokens of the batch. The last
        one's start on their way to the other ranks, before the gradients do."""
        sums_MS = sums.view(self.size) * weight
        self.sums += sums_MS.detach()
        self.micro_steps += 1
        if last:
            self.send()
        return (self.slopes * sums_MS).sum()

    def send(self):
        """Starts to sum the sums over the ranks."""
        if self.world.size > 1:
            self.in_flight = dist.all_reduce(self.sums, async_op=True)

    def gather(self) -> Tensor:
        """Waits for the sums of all ranks. Which experts saw a token, and True: (M * E + 1,) bool."""
        if not self.in_flight:
            self.send()
        if self.in_flight:
            self.in_flight.wait()
        self.in_flight = None
        chosen = named_sums(self.sums, self.s.experts)["chosen"]
        return F.pad(chosen.flatten() > 0, (0, 1), value=True)

    def update(self, step: int):
        """Sets slopes and bias for the next step by the sums of this one, the `step`-th."""
        s, left = self.s, (self.s.iterations - step) / max(1.0, self.s.bias_cooldown * self.s.iterations)
        rate = s.bias_rate * min(1.0, left) if s.router == "sigmoid_bias" else 0.0
        self.slopes, bias = self.update_function(self.sums, self.bias, torch.full((), rate, device=s.device),
                                                 s.penalties, s.experts)
        self.bias.copy_(bias)
        self.report_sums += self.sums
        self.report_steps += 1
        self.sums.zero_()
        self.micro_steps = 0

    def report(self) -> dict[str, list]:
        """Numbers of the steps since the last report; waits for the device."""
        sums, self.report_steps = self.report_sums / max(1, self.report_steps), 0
        self.report_sums = torch.zeros_like(self.sums)
        return router_report(sums.cpu(), self.bias.cpu(), self.s)

    def state_dict(self) -> dict:
        tensors = {"bias": self.bias, "slopes": self.slopes, "report_sums": self.report_sums}
        return {name: t.to("cpu", copy=True) for name, t in tensors.items()} | {"report_steps": self.report_steps}

    def load_state_dict(self, saved: dict):
        self.bias.copy_(saved["bias"])
        self.slopes, self.report_sums = (saved[name].to(self.s.device) for name in ("slopes", "report_sums"))
        self.report_steps = saved["report_steps"]


# differs from train_gpt.py: balance of the experts
class MuonAdamW:
    """The optimizer of a model: hooks that reduce gradients during backward, and the step over all banks."""

    # differs from train_gpt.py: balance of the experts
    def __init__(self, model: nn.Module, s: Settings, world: World):
        named = list(reversed(list(model.named_parameters())))  # about the order in which backward completes them
        rules, unknown = model.rules, {name for name, _ in named} - model.rules.keys()
        assert not unknown, f"parameters that came after the model's construction: {unknown}"
        groups: dict[tuple, list] = {}  # Muon: matrices of one shape and decay together; AdamW: each for itself
        for name, p in named:
            alike = (*p.shape[-2:], rules[name].weight_decay) if rules[name].kind == "muon" else name
            groups.setdefault(alike, []).append((name, p))
        self.steps, self.last_micro_step, self.world = 0, True, world
        self.banks = [Bank(group, rules, s, world) for group in groups.values()]
        self.sums: dict[str, Tensor] = {}  # fp32 gradient sums of earlier micro-steps
        self.balance = Balance(model, s, world) if s.mixtures else None
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

    # differs from train_gpt.py: balance of the experts
    def step(self, scale: float, momentum: float):
        """Updates all parameters. `scale`: the schedule's factor on all learning rates; `momentum`: Muon's.

        Raises RuntimeError that names the parameters whose gradient never came."""
        missing = sorted({name for bank in self.banks for needs in bank.waiting for name in needs})
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(missing)}: every parameter must take part in the loss")
        self.steps += 1
        busy = self.balance.gather() if self.balance else None
        for bank in self.banks:
            bank.step(scale, momentum, self.steps, busy)
        if self.balance:
            self.balance.update(self.steps)
        for bank in self.banks:
            bank.receive_weights()

    # differs from train_gpt.py: balance of the experts
    def reset(self):
        """As before the first step, with the weights at hand."""
        self.steps = 0
        for part in [*self.banks, *([self.balance] if self.balance else [])]:
            part.reset()

    # differs from train_gpt.py: balance of the experts
    def state_dict(self) -> dict:
        """{"steps": n, "state": {key: {parameter name: whole fp32 tensor}}}, tensors on rank 0 only. Collective."""
        state: dict[str, dict[str, Tensor]] = {}
        for bank in self.banks:
            for key in bank.state:
                state.setdefault(key, {}).update(bank.full(key))
        return {"steps": self.steps, "state": state, "balance": self.balance.state_dict() if self.balance else None}

    # differs from train_gpt.py: balance of the experts
    def load_state_dict(self, saved: dict):
        """Restores what state_dict gave, on any number of ranks (`saved` counts on rank 0), and the model's weights."""
        self.steps = on_rank_zero(self.world, lambda: saved["steps"])
        for bank in self.banks:
            bank.load(saved.get("state", {}))
        if self.balance:
            self.balance.load_state_dict(on_rank_zero(self.world, lambda: saved["balance"]))


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


def lr_scale(s: Settings, stages: list[Stage], step: int) -> float:
    """Factor on all learning rates at training step `step`: warm-up, constant, cool-down to lr_floor; times the
    stage's. Cool-down linear, or 1 - sqrt for wsd (Haegele et al. 2024, arXiv 2405.18392)."""
    left = min(1.0, (s.iterations - step) / max(1, s.cooldown * s.iterations))
    left = 1 - math.sqrt(1 - left) if s.schedule == "wsd" else left
    warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
    return stage_at(stages, step).lr * warm * (s.lr_floor + (1 - s.lr_floor) * left)


def momentum_at(s: Settings, step: int) -> float:
    """Muon's momentum: up over momentum_warmup steps, down again over the last momentum_cooldown."""
    part = min(1.0, step / max(1, s.momentum_warmup), (s.iterations - step) / max(1, s.momentum_cooldown))
    return s.momentum_start + (s.muon_momentum - s.momentum_start) * part


def future_weights(stages: list[Stage], step: int) -> list[float]:
    """Weights of the next-token loss and of those of further tokens: 1, 1/2, 1/4 ..; the last one fades to 0 over its
    stage (multi-token prediction, Gloeckle et al. 2024, arXiv 2404.19737, here without further heads: record 53)."""
    stage = stage_at(stages, step)
    fade = 1 - (step - stage.start) / max(1, stage.end - stage.start)
    return [0.5**k * (fade if k == stage.mtp > 0 else 1.0) for k in range(stage.mtp + 1)]


def window_at(s: Settings, stages: list[Stage], step: int) -> int:
    """Long attention window of a step in tokens: linear within its stage, rounded up to window_step (record 13)."""
    stage = stage_at(stages, step)
    progress = min(1.0, (step - stage.start) / max(1, stage.end - stage.start))
    window = stage.window_start + (stage.window - stage.window_start) * progress
    return math.ceil(window / s.window_step) * s.window_step


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluation                                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


@contextlib.contextmanager
def stretched(model: nn.Module, s: Settings, window: int):
    """The model with YaRN's frequencies, for an evaluation window longer than the one it was trained with."""
    tables = model.cos, model.sin
    kept = [table.clone() for table in tables]
    for table, values in zip(tables, rotary_table(len(kept[0]), s.head_dim, s.rope_base, window, s.eval_window),
                             strict=True):
        table.copy_(values)
    try:
        yield
    finally:
        for table, values in zip(tables, kept, strict=True):
            table.copy_(values)


@torch.no_grad()
def evaluate(model: nn.Module, stream: ValStream, s: Settings, world: World, window: int,
             batches: int | None = None) -> float:
    """Mean loss of the validation stream (or its first `batches`) in nats per token, equal on all ranks. Collective."""
    rows = max(1, min(s.micro_tokens // stream.seq_len, -(-stream.num_rows // world.size)))
    long_window = torch.tensor(s.eval_window or window, dtype=torch.int32, device=s.device)
    total = torch.zeros((), dtype=torch.float64, device=s.device)
    with stretched(model, s, window) if s.eval_window > window else contextlib.nullcontext():
        for start in range(0, stream.num_rows, rows * world.size)[:batches]:
            inputs, targets, docs = torch.from_numpy(stream.rows(start + world.rank * rows, rows)).to(s.device)
            total += model(inputs, targets[None], docs, long_window)[0]
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


def router_report(sums_MS: Tensor, bias_ME: Tensor, s: Settings) -> dict[str, list]:
    """Numbers of each mixture layer, from sums per token over some steps: share of the choices of each expert (load);
    its entropy / log E, e^entropy (effective experts), largest / mean, CV = standard deviation / mean; experts with
    less than 1/20 of an even share (dead); dropped share of choices, in all and in each 1/8 of a row; entropy of the
    router's scores in nats, gap between last choice and next, rms of logits; range of the selection bias; penalties."""
    sums, even = named_sums(sums_MS, s.experts), 1 / s.experts
    load = sums["chosen"] / s.choices
    entropy = torch.special.entr(load).sum(-1)
    values = {"load": load, "load_entropy": entropy / math.log(max(2, s.experts)), "effective_experts": entropy.exp(),
              "max_over_mean": load.amax(-1) / even, "cv": load.std(-1, correction=0) / even,
              "dropped": sums["dropped"].sum(-1) / s.choices,
              "dropped_by_part": sums["dropped"] * DROP_PARTS / s.choices,
              "score_entropy": sums["entropy"][:, 0], "margin": sums["margin"][:, 0],
              "logit_rms": sums["logit"][:, 0].sqrt(), "bias_min": bias_ME.amin(-1), "bias_max": bias_ME.amax(-1),
              **{f"{name}_loss": value for name, value in penalties(sums_MS, s.experts, s.penalties).items()}}
    dead = [[e for e, share in enumerate(row) if share < even / 20] for row in load.tolist()]
    return {name: value.tolist() for name, value in values.items()} | {"dead": dead}


def router_lines(report: dict[str, list], s: Settings) -> tuple[str, list[str]]:
    """A line about all layers, and an alarm for each with dead experts or a collapse: choices as good as limited to
    half more experts than a token has, or to a quarter of them."""
    effective = report["effective_experts"]
    drops = f", dropped {100 * max(report['dropped']):.1f} %" if s.capacity_factor else ""
    line = (f"routers: effective experts {' '.join(f'{x:.1f}' for x in effective)} of {s.experts}, max/mean "
            f"{max(report['max_over_mean']):.2f}, CV {max(report['cv']):.2f}, dead "
            f"{sum(map(len, report['dead']))}{drops}")
    alarms = [f"ALARM: layer {i}: dead experts {', '.join(map(str, dead))}: less than 1/20 of an even share of tokens"
              for i, dead in zip(s.mixtures, report["dead"], strict=True) if dead]
    limit = max(1.5 * s.choices, s.experts / 4)
    alarms += [f"ALARM: layer {i}: collapse: {x:.1f} of {s.experts} experts are effectively used"
               for i, x in zip(s.mixtures, effective, strict=True) if x < limit < s.experts]
    return line, alarms


# Settings that losses and steps of a run and its control must share.
COMPARED = ("eval_tokens", "eval_seq_len", "eval_window", "batch_tokens", "stage_ends", "seq_len", "mtp")


def read_control(s: Settings, fingerprint: str) -> dict | None:
    """Last record of the dense control's metrics. Raises FileNotFoundError, or UserError if it cannot be compared."""
    if not s.control:
        return None
    try:
        config = json.loads((Path(s.control) / "config.json").read_text(encoding="utf-8"))
        *_, last = [record for record in metric_records(Path(s.control)) if record.get("event") in ("end", "resume")]
        same = config["data"]["fingerprint"] == fingerprint and not config["settings"].get("num_experts", 0)
    except (FileNotFoundError, NotADirectoryError) as error:
        missing, wanted = Path(error.filename).name, "name a run's folder, logs/EXPERIMENT/RUN"
        raise FileNotFoundError(f"--control {s.control}: no {missing} there; {wanted}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--control {s.control}: that run has not ended, or is damaged: resume it") from error
    if last.get("status") not in ("done", "target") or last["val_loss"] is None:
        raise UserError(f"--control {s.control}: that run has not ended: wait for it, or resume it")
    if not same:
        raise UserError(f"--control {s.control}: no dense run on the same data; make one with --num_experts 0")
    own, theirs = json.loads(json.dumps(dataclasses.asdict(s))), config["settings"]
    if differing := [f"{name} {theirs[name]}, here {own[name]}" for name in COMPARED if theirs.get(name) != own[name]]:
        raise UserError(f"--control {s.control}: its losses and steps are not comparable: {'; '.join(differing)}")
    return last


def metric_records(folder: Path) -> list[dict]:
    """The objects of a run's metrics.jsonl, but for a last line that a killed process has not finished, and for steps
    after the checkpoint from which the run was resumed."""
    records: list[dict] = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        if line.endswith("}"):
            record = json.loads(line)
            if record.get("event") == "resume":
                records = [earlier for earlier in records if earlier["step"] <= record["step"]]
            records.append(record)
    return records


def reached(records: list[dict], loss: float) -> dict[str, float] | None:
    """Tokens, step and training time in ms at which a run's validation loss came down to `loss`: linear between the
    last validation above it and the first that is not; None if it never did."""
    above = None
    for r in (r for r in records if r.get("val_loss") is not None and "event" not in r):
        if r["val_loss"] <= loss:
            part = 1.0 if above is None else (above["val_loss"] - loss) / (above["val_loss"] - r["val_loss"])
            return {key: r[key] if above is None else above[key] + part * (r[key] - above[key])
                    for key in ("tokens", "step", "train_time_ms")}
        above = r
    return None


def compare_with_control(control: list[dict], own: list[dict], loss: float, step_ms: tuple[float, float]) -> dict:
    """Tokens, steps and time to a validation loss of the dense control and of this run; ratio of their step times
    (step_ms: control, own), and the ratio at which they would break even: as many times fewer steps as it took."""
    both = {"loss": loss, "control": reached(control, loss), "run": reached(own, loss)}
    even = both["control"]["step"] / both["run"]["step"] if both["control"] and both["run"] else None
    return both | {"step_time_ratio": step_ms[1] / step_ms[0], "break_even_ratio": even}


def control_lines(comparison: dict) -> list[str]:
    """The comparison as a table."""
    lines = [f"to validation loss {comparison['loss']:.4f}       tokens    steps   seconds"]
    for name, key in (("dense control", "control"), ("this run", "run")):
        r = comparison[key]
        lines.append(f"{name:>24}  " + ("not reached" if r is None else
                     f"{r['tokens']:>13,.0f}  {r['step']:>7,.0f}  {r['train_time_ms'] / 1000:>8.1f}"))
    even = comparison["break_even_ratio"]
    return [*lines, f"step time {comparison['step_time_ratio']:.3f} of the control's"
            + (f", break-even at {even:.3f}" if even else "")]


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


# differs from train_gpt.py: routers
class Trainer:
    """One run: builds everything from the settings, then `run` trains. Every rank does the same."""

    # differs from train_gpt.py: the dense control
    def __init__(self, s: Settings, hardware: Hardware, world: World, notes: list[str]):
        self.s, self.hardware, self.world, self.stages = s, hardware, world, stage_table(s)
        self.corpus = open_corpus(s.data)
        self.stream = ValStream(self.corpus, s.eval_tokens, s.eval_seq_len)
        self.hellaswag = HellaSwag(s, self.corpus.meta, world) if s.hellaswag_every else None
        self.fingerprint = self.corpus.fingerprint()
        if on_rank_zero(world, lambda: self.fingerprint) != self.fingerprint:
            raise UserError(f"{self.corpus.folder} differs from that of the first machine: copy its shards here")
        self.control = on_rank_zero(world, read_control, s, self.fingerprint)
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

    # differs from train_gpt.py: experts and mixtures
    def summary(self) -> list[str]:
        """The derived numbers that are printed before training: data, parameters, layers, stages, memory."""
        s, kinds = self.s, ("total", "active", "hidden", "experts", "router", "embedding", "head", "small")
        lines = [f"data {self.corpus.folder}: vocabulary {self.corpus.meta['vocab_size']}",
                 "parameters: " + ", ".join(f"{self.counts[kind]:,} {kind}" for kind in kinds),
                 "layer  attention  value table  skip from  mixture"]
        for i, layer in enumerate(self.model.layers):
            cells = ["-" if cell is None else cell for cell in layer]
            lines.append(f"{i:>5}  {cells[0]:>9}  {cells[1]:>11}  {cells[2]:>9}  {cells[3]:>7}")
        lines.append("        steps  tokens/step  rows x seq_len  accumulation     window  targets  lr x  MFLOPs/token")
        for t in self.stages:
            rows = t.micro_rows(s, self.world.size)
            accumulation = t.batch_tokens // (t.seq_len * rows * self.world.size)
            steps, shape, windows = f"{t.start}-{t.end}", f"{rows} x {t.seq_len}", f"{t.window_start}-{t.window}"
            lines.append(f"{steps:>13}  {t.batch_tokens:>11,}  {shape:>14}  {accumulation:>12}  {windows:>9}"
                         f"  {t.mtp + 1:>7}  {t.lr:4.2f}  {flops_per_token(s, self.counts, t) / 1e6:>12.1f}")
        return [*lines, f"{self.tokens_at(s.iterations):,} training tokens, {self.stream.num_tokens:,} validation "
                        f"tokens, about {self.expected_memory() / 2**30:.2f} GiB per process"]

    # differs from train_gpt.py: sorted rows of the mixtures
    def expected_memory(self) -> float:
        """Bytes per process, a rough estimate: weights, own masters and moments, gradients, and for each token of a
        micro-step 34 activations a layer and dimension (half if compiled, by the 34 GiB of the public records at 49,152
        tokens), ten more (five) for each choice in a mixture, the logits (three times in fp32, or twice in bf16), and,
        but for FlexAttention, a row of scores; for `bmm` the experts' weights in each of its about 5 blocks an expert.
        """
        s, total, size = self.s, self.counts["total"], self.s.torch_dtype.itemsize
        stage = max(self.stages, key=lambda t: t.micro_rows(s, self.world.size) * t.seq_len)
        tokens = stage.micro_rows(s, self.world.size) * stage.seq_len
        own = sum(4 * t.numel() for bank in self.optimizer.banks for t in [*bank.state.values(), bank.grad])
        sums = 4 * total if tokens * self.world.size < stage.batch_tokens else 0
        scores = 0 if s.backend == "flex" else 2 * size * s.num_layers * s.num_heads * stage.seq_len
        logits = (4 if "loss" in s.kernels else 12) * self.model.lm_head.size(0)
        mixtures, share = len(s.mixtures), 2 if s.compile else 1
        activations = size * s.width * (34 * s.num_layers + 10 * s.choices * mixtures) // share + logits
        copies = 5 * 2 * mixtures * s.experts * s.hidden * s.width * size if s.moe_impl == "bmm" else 0
        return own + sums + 2 * size * total + tokens * (activations + scores) + copies

    def warm_up(self):
        """Compiles and runs every shape of training and evaluation on random tokens, untimed, then restores: a rate of
        0 changes no weight, and the moments are cleared. The compile time is printed."""
        began, s = time.perf_counter(), self.s
        for rows, seq_len, mtp in sorted({(t.micro_rows(s, self.world.size), t.seq_len, t.mtp) for t in self.stages}):
            tokens = torch.randint(self.corpus.meta["vocab_size"], (rows, seq_len), dtype=torch.int32, device=s.device)
            self.window.fill_(s.window_step)
            docs = torch.zeros_like(tokens)
            self.micro_step(tokens, tokens, docs, [1.0] * (1 + mtp))
            self.optimizer.step(scale=0.0, momentum=s.momentum_start)
        evaluate(self.model, self.stream, s, self.world, s.window_step, batches=1)
        if self.hellaswag:
            self.hellaswag.losses(self.model, s.window_step, batches=1)
        self.optimizer.reset()
        self.model.saturated.zero_()
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

    def train_step(self, step: int):
        """Forward and backward over the micro-steps of one batch, then the optimizer. Nothing waits for the device."""
        stage = stage_at(self.stages, step)
        micro_steps, self.position = self.loader.next(step)
        self.window.fill_(window_at(self.s, self.stages, step))
        weights = [w / stage.batch_tokens for w in future_weights(self.stages, step)]
        for i, (inputs, targets, docs) in enumerate(micro_steps):
            self.optimizer.last_micro_step = i == len(micro_steps) - 1
            loss = self.micro_step(inputs, targets, docs, weights)
            self.losses[step % self.s.log_every] += loss / stage.batch_tokens
        self.optimizer.step(lr_scale(self.s, self.stages, step), momentum_at(self.s, step))
        if self.position["epoch"] != self.epoch:
            self.epoch = self.position["epoch"]
            self.log.print(f"step {step + 1}: all training data used, epoch {self.epoch + 1} begins")

    # differs from train_gpt.py: noise and sums of the routers
    def micro_step(self, inputs: Tensor, targets: Tensor, docs: Tensor, weights: list[float]) -> Tensor:
        """Forward and backward of some rows, (B, T); their summed next-token loss."""
        targets, balance, noise = future_targets(targets, docs, len(weights) - 1), self.optimizer.balance, ()
        if balance:
            noise = (balance.noise(self.optimizer.steps, *inputs.shape),)
        values = self.model(inputs, targets, docs, self.window, *noise)
        total = sum(w * loss for w, loss in zip(weights, values[:len(weights)], strict=True))
        if balance:
            total = total + balance.add(values[len(weights):], weights[0], self.optimizer.last_micro_step)
        total.backward()
        return values[0].detach()

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

    # differs from train_gpt.py: the routers' rate
    def _stop_not_finite(self, what: str, step: int):
        """Ends the logs and the run. Checkpoints are written only after a look at losses and weights: all are good."""
        self.status = "nan"
        self._end_record(step)
        raise TrainingStopped(f"{what}: stopped, the checkpoints before it are kept in {self.log.folder}; "
                              f"lower --{'muon' if self.s.hidden_optimizer == 'muon' else 'hidden'}-lr, --adam-lr "
                              "and --router-lr")

    # differs from train_gpt.py: routers
    def _report(self, step: int, loss: float):
        """One line on the console and in log.txt, one object in metrics.jsonl."""
        s, stage, ms = self.s, stage_at(self.stages, step - 1), self.clock.stop()
        self.clock.start()
        step_ms = (ms - self.logged_ms) / max(1, step - self.logged_step)
        rate = 1000 * stage.batch_tokens / step_ms
        mfu = model_flops_utilization(rate, flops_per_token(s, self.counts, stage), self.hardware.name, self.world.size)
        eta = time.strftime("%H:%M:%S", time.gmtime((s.iterations - step) * step_ms / 1000))
        self.log.print(f"step {step}/{s.iterations}  train loss {loss:.4f}  {step_ms:.1f} ms/step  {rate:,.0f} tokens/s"
                       f"  MFU {'n/a' if mfu is None else f'{100 * mfu:.1f} %'}  ETA {eta}")
        self._step_line(step, f"train_loss:{loss:.4f}", ms)
        self.log.metric(step=step, train_loss=loss, lr=lr_scale(s, self.stages, step - 1), seq_len=stage.seq_len,
                        window=window_at(s, self.stages, step - 1), batch_tokens=stage.batch_tokens,
                        tokens=self.tokens_at(step), train_time_ms=ms, step_ms=step_ms, tokens_per_s=rate, mfu=mfu,
                        fp8_clipped=int(self.model.saturated))
        self.logged_step, self.logged_ms = step, ms
        balance = self.optimizer.balance
        due = step % s.log_every == 0  # not where a signal or a checkpoint brought the line about
        if balance and (step == s.iterations or (due and balance.report_steps >= s.router_every)):
            self._report_routers(step, balance.report())

    def _report_routers(self, step: int, report: dict[str, list]):
        """One line on the console, alarms there and in log.txt, all numbers to metrics.jsonl."""
        line, alarms = router_lines(report, self.s)
        self.log.print("\n".join([line, *alarms]))
        for alarm in alarms:
            self.log.line(f"{alarm} (step {step})")
        layers = self.s.mixtures
        self.log.metric(event="routers", step=step, layers=layers, experts=self.s.experts, **report)
        if self.log.wandb is not None:
            single = {name: values for name, values in report.items() if isinstance(values[0], float)}
            self.log.wandb.log({f"routers/{name}/layer{i}": value for name, values in single.items()
                                for i, value in zip(layers, values, strict=True)}, step=step)

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

    # differs from train_gpt.py: comparison with the dense control
    def _end_record(self, step: int):
        """The last object of metrics.jsonl, and where there is a dense control what came out against it."""
        ms, done, balance, comparison = self.clock.stop(), self.status == "target", self.optimizer.balance, None
        if done and balance and balance.report_steps:
            self._report_routers(step, balance.report())
        if self.control and self.log.main and step:
            step_ms = self.control["train_time_ms"] / self.control["step"], ms / step
            loss = self.s.target_loss or self.control["val_loss"]
            comparison = compare_with_control(metric_records(Path(self.s.control)), metric_records(self.log.folder),
                                              loss, step_ms)
            for line in control_lines(comparison):
                self.log.print(line)
                self.log.line(line)
        bpb = self.val_loss and bits_per_byte(self.val_loss, self.corpus.meta)
        self.log.metric(event="end", status=self.status, step=step, iterations=self.s.iterations,
                        val_loss=self.val_loss, val_bpb=bpb, train_time_ms=ms,
                        tokens_per_s=1000 * self.tokens_at(step) / ms if ms else None,
                        params_total=self.counts["total"], params_active=self.counts["active"],
                        peak_memory_mib=peak_memory_mib(self.s.device)[0], first_step_s=self.first_step_s,
                        compile_s=self.compile_s, comparison=comparison,
                        target_step=step if done else None, target_time_ms=ms if done else None)


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


def check_width(s: Settings, argv: list[str]) -> int:
    """--mup-report, then --coord-check, which is a program of its own; its exit code."""
    if "RANK" in os.environ:
        raise UserError("--mup-report and --coord-check run in one process: use python instead of torchrun")
    if s.mup_report:
        there = data_folder(s.data).is_dir()
        if not there:
            print(f"{data_folder(s.data)} is not there: with GPT-2's vocabulary")
        print(mup_report(s, (open_corpus(s.data).meta if there else GPT2_META)["vocab_size"]), flush=True)
    return coordinate_check(argv) if s.coord_check else 0


def coordinate_check(argv: list[str]) -> int:
    """bench/coord_check.py with the settings of a command line; its exit code."""
    script = Path(__file__).resolve()
    tool, other = script.parent / "bench" / "coord_check.py", r"--(no.)?(coord.check|mup.report)"
    if not tool.is_file():
        raise FileNotFoundError(f"--coord-check: {tool} is missing; copy it there from the project")
    command = [tool, "--script", str(script), "--", *(flag for flag in argv if not re.fullmatch(other, flag))]
    print("python", shlex.join(map(str, command)), flush=True)
    return subprocess.call([sys.executable, *command])


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what the user can repair."""
    code = 1
    try:
        s, hardware, notes = parse_settings(argv, int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ else 1)
        torch.set_num_threads(s.threads or torch.get_num_threads())
        if s.mup_report or s.coord_check:
            return check_width(s, sys.argv[1:] if argv is None else argv)
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
