"""Train a Mixture-of-Experts language model like train_gpt.py's, on the hardware at hand: in chosen layers a router
sends each token to a few of many feed-forward experts, so that the model has more parameters for the same work.

    python train_moe.py                                            # 8 experts, top-2, on whatever is there
    python train_moe.py --preset speed                             # or mixtral, deepseek; speed-cpu names the size
    python train_moe.py --num-experts 0 --experiment_name dense    # the dense control: train_gpt.py's losses
    torchrun --standalone --nproc_per_node=8 train_moe.py --preset speed-speedrun

Three parts. RECORD is what a competitor changes: hyperparameters, model, optimizer, schedule, and the loop, `train`.
KERNELS has its fast forms, SERVICE all that surrounds a run: both are those of train_gpt.py, byte for byte, and so is
most of RECORD (tests/test_shared_code.py). New are the settings of the mixture; experts and routers; in Optimizer the
experts as a batch of matrices for Muon, idle ones left alone, and Balance; reports of the routers.

No token is dropped, unless --capacity-factor is given, and shapes do not depend on the routing: the rows of all tokens
are sorted by expert, multiplied by the stacked weights in one grouped product, and permuted back. Nothing is read from
the device but in log steps, --moe-impl loop excepted. Losses are cross-entropies, without the routers' penalties.

Measured on 2 CPU cores (AMD EPYC, torch 2.13.0; bench/moe.py, records/2026-11-20_moe_cpu) at `cpu` size: the dense
control's final loss, 1.134 +- 0.044 (n = 3), takes `deepseek` 0.855 times its tokens at 1.33 times the step time,
`speed` 0.898 at 1.15 (n = 4); `mixtral`, 1.173 +- 0.011 at 1.44, does not get there. Not measured on a GPU.
Shape suffixes: B rows, T tokens of a row, N = B * T, D model_dim, H heads, K key dim of a head or, of routing, choices
of a token, V vocabulary; E experts of a layer, F hidden size of one, R = N * K sorted rows, M mixture layers, S sums.
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
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ╔══════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ RECORD: what a competitor changes                                                            ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════╝

# ┌─ Hyperparameters ────────────────────────────────────────────────────────────────────────────┐
# argparse is generated from the fields: name, type, default, and the comment as help. Its bracket
# holds the allowed values, `per stage` where one value per stage of training may be given, and
# `with` another setting, without which nothing reads this one. How and where a run runs (device,
# dtype, kernels, evaluation, logs) is in RunSettings, in SERVICE; an object of Settings has both.

ints = tuple[int, ...]
floats = tuple[float, ...]

# differs from train_gpt.py: the mixture
@dataclass(frozen=True)
class Hyperparameters:
    """What is computed. A resumed run must have the same."""
    seed: int = 0  # of initial weights and the order of shuffled data [>=0]
    shuffle: bool = True  # shuffle a shard's documents; the speedrun keeps their order
    long_docs: str = "split"  # past max_doc_len: more pieces, or skipped (29) [split|clip]
    # --- model
    num_layers: int = 12  # transformer layers [>0]
    width: int = 768  # model_dim: size of the residual stream [>0]
    head_dim: int = 128  # size of a head; num_heads = width / head_dim [>0]
    qk_dim: int = 0  # of q and k, but in L layers (92); 0: head_dim [>=0]
    mlp_ratio: int = 4  # hidden size of the MLP / width [>0]
    attention: str = "auto"  # by layer: L long window, S short, P short, paired, - none
    paired: bool = True  # auto attention has P layers: queries see two heads' keys (58)
    key_offset: bool = True  # in L layers half of a key is the previous token's (49)
    xsa: bool = True  # a head's output without its part along the own value (82, 86)
    value_embeds: int = 3  # value-embedding tables, each for two layers (14) [>=0]
    value_gate: bool = True  # gate value embeddings by 12 dimensions of the input (55)
    skip: str = "single"  # from early to late layers (11, 45) [unet|single|none]
    backout: bool = True  # subtract a learned share of the stream after 2/3 (40)
    smear: bool = True  # embeddings take up the previous token's, gated (34)
    ngram_rows: int = 0  # hashed token pairs and triples (62, 92); 0 off [>=0]
    attn_gate: bool = True  # gate each head's output by 12 dimensions of the input (28)
    pointer: int = 0  # size of q and k that copy from the document (379) [>=0]
    softcap: floats = (23.0, 5.0, 7.5)  # a*sigmoid((logit+b)/c) (54); 0,0,1 off [>=0]
    rope_base: float = 1024.0  # 1 / slowest rotary frequency, radians per token [>0]
    attn_scale: float = 0.0  # on q.k; 0: 1.36 / sqrt(head_dim), 0.12 at 128 (20) [>=0]
    # --- mixture of experts
    num_experts: int = 8  # of a mixture layer; 0: none, the dense control [>=0]
    top_k: int = 2  # experts of a token [>0; with num_experts]
    num_shared: int = 0  # further experts, of all tokens [>=0; with num_experts]
    expert_hidden: int = 0  # 0: a token costs what it does in an MLP [>=0; with num_experts]
    moe_layers: str = "auto"  # by layer: M mixture, D dense [with num_experts]
    dense_first: int = 0  # first layers that stay dense [>=0; with moe_layers auto]
    dense_last: int = 0  # last layers that stay dense [>=0; with moe_layers auto]
    router: str = "noisy_topk"  # kind [noisy_topk|softmax_topk|sigmoid_bias; with num_experts]
    route_norm: bool = True  # a token's gates, if several, sum to route_scale [with num_experts]
    route_scale: float = 0.0  # of gates; 0: their mean is about 1 [>=0; with num_experts]
    importance_coef: float = 0.01  # of CV^2 of summed gates [>=0; with router noisy_topk]
    load_coef: float = 0.01  # of CV^2 of expected tokens [>=0; with router noisy_topk]
    noise_end: float = 0.05  # fraction of the iterations, of its fading; 0: never [0..1; with router noisy_topk]
    aux_coef: float = 0.01  # of E * sum(share * mean score) [>=0; with router noisy_topk|softmax_topk]
    sequence_coef: float = 0.0  # of the same in each row [>=0; with router sigmoid_bias]
    z_coef: float = 0.001  # of log-sum-exp^2 [>=0; with num_experts]
    bias_rate: float = 0.001  # bias's step against load [>=0; with router sigmoid_bias]
    bias_cooldown: float = 0.15  # last fraction, of its fall [0..1; with router sigmoid_bias]
    capacity_factor: float = 0.0  # most tokens / even share; 0: any [>=0; with num_experts]
    moe_impl: str = "auto"  # [auto|grouped|bmm|loop; with num_experts; free on resume]
    router_every: int = 50  # least steps of a report [>0; with num_experts; free on resume]
    expert_lr: float = 0.7  # factor on the rate of experts [>0; with num_experts]
    router_lr: float = 0.005  # learning rate of the routers, AdamW [>=0; with num_experts]
    # --- width transfer: rates tuned at a small width serve a large one (muP)
    mup: bool = False  # scale rates, decay, epsilon and logits from base_width to width
    base_width: int = 0  # where the rates were tuned; 0: the preset's [>=0; with mup]
    base_head_dim: int = 0  # head_dim there; 0: the same [>=0; with mup]
    mup_embedding: str = "constant"  # tables; sqrt: / sqrt(growth) [constant|sqrt; with mup]
    # --- stages of training: one value per stage, or one for all
    iterations: int = 1695  # optimizer steps [>0]
    stage_ends: floats = (1.0,)  # ends of stages, as fractions of the iterations [>0]
    batch_tokens: ints = (393216,)  # tokens of a step, all processes [>0; per stage]
    seq_len: ints = (49152,)  # tokens of a row of documents [>0; per stage]
    max_doc_len: ints = (0,)  # longest piece, in tokens; 0: seq_len [>=0; per stage]
    window: ints = (1792,)  # long attention window at the end, tokens [>0; per stage]
    mtp: ints = (0,)  # further tokens to predict, by 1/2, 1/4 .. (53) [>=0; per stage]
    candidates: ints = (0,)  # classes in the loss of a row; 0: all (92) [>=0; per stage]
    stage_lr: floats = (1.0,)  # factor on all learning rates [>0; per stage]
    ngram_every: int = 1  # steps of an update of n-grams [>0; with ngram_rows]
    window_start: int = 128  # long window at step 0, tokens, grows; 0: no growth [>=0]
    window_step: int = 128  # windows are rounded up to a multiple of this, tokens [>0]
    # --- optimizer
    hidden_optimizer: str = "muon"  # of the matrices of attention and MLP [muon|adamw]
    hidden_lr: float = 0.002  # their rate, AdamW [>=0; with hidden_optimizer adamw]
    hidden_weight_decay: float = 0.1  # decay / rate, AdamW [>=0; with hidden_optimizer adamw]
    muon_lr: float = 0.05  # their learning rate [>=0; with hidden_optimizer muon]
    muon_momentum: float = 0.95  # Nesterov, at its peak [0..1; with hidden_optimizer muon]
    momentum_start: float = 0.85  # momentum at both ends [0..1; with hidden_optimizer muon]
    momentum_warmup: int = 300  # steps of its rise [>=0; with hidden_optimizer muon]
    momentum_cooldown: int = 50  # last steps, its fall [>=0; with hidden_optimizer muon]
    muon_beta2: float = 0.95  # of NorMuon's variance; 0 off [0..1; with hidden_optimizer muon]
    muon_weight_decay: float = 0.02  # decay / peak rate [>=0; with hidden_optimizer muon]
    orthogonalizer: str = "polar_express"  # its iteration [polar_express|newton_schulz; with hidden_optimizer muon]
    adam_lr: float = 0.008  # of all else, times the factor in parameter_table [>=0]
    adam_eps: float = 1e-10  # AdamW's epsilon [>0]
    adam_weight_decay: float = 0.0  # decay / peak rate of embeddings, head [>=0]
    cautious: bool = True  # decay only where update and weight have the same sign
    schedule: str = "linear"  # shape of the cool-down: linear, or 1 - sqrt [linear|wsd]
    warmup_steps: int = 0  # steps over which the learning rates rise [>=0]
    cooldown: float = 0.45  # last fraction of the iterations, in which they fall [0..1]
    cooldown_others: float = 0.0  # of all but hidden matrices; 0: the same [0..1]
    extension: float = 0.0  # last fraction, at the lowest rate (92) [0..1]
    lr_floor: float = 0.1  # learning rate at the end / its peak [0..1]
    tail: float = 0.0  # share of the last weights' average in the end (92) [0..1]
    tail_steps: int = 128  # its time constant; it takes two [>0; with tail]

    @property
    def num_heads(self) -> int:
        return self.width // self.head_dim

    @property
    def hidden(self) -> int:
        """Hidden size of an expert, by default the MLP's, split among the active ones."""
        even = self.mlp_ratio * self.width / max(1, self.top_k + self.num_shared)
        return self.expert_hidden or max(8, round(even / 8) * 8)

    @property
    def mixtures(self) -> tuple[int, ...]:
        """Numbers of the layers with a mixture."""
        return tuple(i for i, kind in enumerate(self.moe_layers) if kind == "M")

    @property
    def penalties(self) -> dict[str, float]:
        """What keeps the router balanced, by its weight in the loss."""
        weights = {"z": self.z_coef}
        if self.router == "sigmoid_bias":
            return {"sequence": self.sequence_coef} | weights
        if self.router == "noisy_topk":
            weights |= {"importance": self.importance_coef, "load": self.load_coef}
        return weights | {"switch": self.aux_coef}

    @property
    def gate_scale(self) -> float:
        """Factor on gates. Normed ones are 1 / top_k on average, a lone sigmoid starts at 1/2: a smaller gate is a
        smaller learning rate, as Muon's updates have one size."""
        if self.route_norm and self.top_k > 1:
            return self.route_scale or float(self.top_k)
        return self.route_scale or (2.0 if self.router == "sigmoid_bias" else 1.0)

    @property
    def base(self) -> Hyperparameters:
        """The settings at the base width, whose learning rates these are."""
        if not self.mup:
            return self
        return replace(self, mup=False, width=self.base_width, head_dim=self.base_head_dim)

    @property
    def growth(self) -> float:
        """Width relative to the base width; the logits of a wider model are divided by it."""
        return self.width / self.base.width

    @property
    def softmax_scale(self) -> float:
        """The factor on q.k. Under --mup it goes with 1 / head_dim, as q and k align (TP-V)."""
        if self.mup:
            return self.base.softmax_scale * (self.base_head_dim / self.head_dim)
        return self.attn_scale or 1.36 / math.sqrt(self.head_dim)

PRESETS: dict[str, dict] = {
    # two CPU cores, under two minutes: bytes of the Python standard library (records/LOG.md)
    "cpu": dict(
        data="stdlib", num_layers=3, width=192, head_dim=48, value_embeds=1, iterations=360,
        batch_tokens=(4096,), seq_len=(256,), max_doc_len=(256,), window=(256,), window_start=64,
        window_step=32, micro_tokens=8192, softcap=(30.0, 0.0, 7.5), paired=False, xsa=False,
        skip="unet", backout=False, muon_lr=0.06, muon_momentum=0.9, momentum_warmup=30,
        momentum_cooldown=20, cooldown=0.6, lr_floor=0.15, tail=0.65, tail_steps=30, eval_every=120,
        eval_tokens=131072, compile=False,
    ),
    # the GPT-2-small shape on one 16 GB card
    "gpu": dict(
        iterations=3000, stage_ends=(0.93, 1.0), batch_tokens=(65536,), seq_len=(4096,),
        max_doc_len=(2048,), window=(1024,), window_start=256, muon_lr=0.025,
        adam_lr=0.004, candidates=(6144, 0), ngram_rows=2**20, pointer=128, tail=0.5, tail_steps=150,
        lr_floor=0.2, eval_every=250, eval_tokens=262144, save_every=500,
    ),
    # the 8xH100 track, 3.28 on FineWeb: stages of record 92, the last two its taper and extension
    "speedrun": dict(
        data="fineweb10B", shuffle=False, iterations=1194,
        stage_ends=tuple(end / 1194 for end in (320, 681, 965, 1107, 1174, 1194)),
        batch_tokens=(131072, 262144, 393216, 393216, 327680, 131072),
        seq_len=(16384, 32768, 49152, 49152, 40960, 16384),
        max_doc_len=(896, 2048, 3072, 3072, 3072, 3072), window=(384, 896, 1408, 1408, 1408, 1664),
        stage_lr=(1.0, 1.52, 1.73, 1.73, 1.58, 1.73), mtp=(2, 1, 0, 0, 0, 0),
        candidates=(10240, 10240, 14336, 16384, 0, 0), ngram_rows=21150720, ngram_every=2,
        pointer=128, qk_dim=64, muon_lr=0.023, adam_weight_decay=0.005, cooldown=0.8, lr_floor=0.17,
        extension=20 / 1194, tail=0.5, target_loss=3.28, save_last=False,
    ),
    # the GPT-2-medium track: 2.92 on FineWeb; stages and techniques of speedrun, untried
    "medium": dict(
        data="fineweb10B", shuffle=False, num_layers=16, width=1024, iterations=4200,
        stage_ends=(0.27, 0.57, 0.93, 1.0), batch_tokens=(262144, 524288, 524288, 524288),
        seq_len=(32768, 65536, 65536, 65536), window=(896, 2048, 3456, 3456),
        candidates=(10240, 16384, 24576, 0), ngram_rows=21150720, ngram_every=2, pointer=128,
        qk_dim=64, muon_lr=0.025, adam_lr=0.004, cooldown=0.7, lr_floor=0.17, tail=0.5,
        tail_steps=400, target_loss=2.92,
    ),
}

# speedrun's tokens on one card, by micro-steps instead of processes (track_1gpu)
PRESETS["one"] = PRESETS["speedrun"]
# without bf16 and FlexAttention: rows of one document, as masks are dense
PRESETS["t4"] = PRESETS["gpu"] | dict(seq_len=(2048,), ngram_rows=2**18)

# Kinds of mixtures; their active FLOPs are those of the dense model, within 1 %.
MIXTURES: dict[str, dict] = {
    "mixtral": dict(num_experts=8, top_k=2, router="noisy_topk"),
    "deepseek": dict(
        num_experts=64, top_k=6, num_shared=2, router="sigmoid_bias", z_coef=0.0, dense_first=1),
    "speed": dict(
        num_experts=8, top_k=1, num_shared=1, router="sigmoid_bias", z_coef=0.0, dense_first=2,
        dense_last=2),
}
# What a kind has otherwise at a size: 360 steps need a quicker bias; what fits into 16 GB.
SIZED: dict[str, dict] = {
    "deepseek-cpu": dict(num_experts=16, bias_rate=0.01, router_lr=0.001),
    "speed-cpu": dict(dense_first=1, dense_last=1, bias_rate=0.01),
    "deepseek-gpu": dict(ngram_rows=2**19, tail=0.0),
}
PRESETS |= {
    f"{kind}-{size}": PRESETS[size] | mixture | SIZED.get(f"{kind}-{size}", {})
    for kind, mixture in MIXTURES.items() for size in PRESETS
}

def choose_preset(hardware: Hardware, world_size: int, data: str) -> tuple:
    """The preset for `auto`, by hardware and data, and the reason for it."""
    if hardware.device != "cuda":
        return "cpu", "no CUDA device"
    folder = data_folder("fineweb10B" if data == "auto" else data)
    fineweb = folder.name.startswith("fineweb") and folder.is_dir()
    gpus = f"{world_size} process(es) on {hardware.name} of {hardware.memory_gib:.0f} GiB"
    if not hardware.bf16:
        return "t4", f"{gpus}, without bf16"
    s, _ = without_auto(Settings(**PRESETS["speedrun"], micro_tokens=MICRO_TOKENS), hardware, 8)
    need = expected_memory(s, GPT2_META["vocab_size"], 8) / 2**30
    if world_size >= 8 and hardware.room >= need and fineweb:
        return "speedrun", f"{gpus}, and {folder.name} is there"
    return "gpu", f"{gpus}; speedrun wants 8 with {need:.0f} GiB free, and data/fineweb10B"

def auto_attention(num_layers: int, paired: bool) -> str:
    """Long windows in the first, last and a third's layer (20), none in layer 7/12 (17), pairs in every third (58)."""
    long = {0, num_layers // 3, num_layers - 1}
    none = 7 * num_layers // 12 if num_layers >= 12 else None
    letters = ["L" if i in long else "P" if paired and i % 3 == 2 else "S" for i in range(num_layers)]
    return "".join("-" if i == none else letter for i, letter in enumerate(letters))

# differs from train_gpt.py: the mixture
def record_auto(s: Settings, hardware: Hardware) -> dict[str, tuple]:
    """What `auto`, or 0, means: setting -> value and the reason for it."""
    width = s.base_width or PRESETS.get(s.preset, {}).get("width", 768)
    head_dim = s.base_head_dim or s.head_dim
    odd = s.width // max(1, s.head_dim) % 2 or (s.mup and width // max(1, head_dim) % 2)
    return {
        "attention": (auto_attention(s.num_layers, s.paired and not odd), f"for {s.num_layers} layers"),
        "base_width": (width if s.mup else 0, "the preset's width"),
        "base_head_dim": (head_dim if s.mup else 0, "the head_dim"),
        "moe_layers": (
            auto_mixtures(s), f"{s.top_k} of {s.num_experts} experts, of hidden size {s.hidden}"),
        "moe_impl": (auto_experts(s, hardware), "the fastest here" + NO_GROUPED * (hardware.capability == (10, 0))),
    }

# differs from train_gpt.py: the mixture
def hyperparameter_errors(s: Settings, given: dict, hardware: Hardware, world_size: int) -> list[str]:
    """A sentence for each setting of the model that does not fit another one."""
    bad = []
    for prefix, x in (("", s), ("base_", s.base))[:1 + s.mup]:
        if x.width % x.head_dim or x.head_dim % 4 or x.width < GATE_DIM:
            bad.append(f"--{prefix}width {x.width} must be a multiple of --{prefix}head_dim {x.head_dim}, "
                       f"that one of 4, and not below {GATE_DIM}")
    if 2 * s.value_embeds > s.num_layers:
        bad.append(f"--value_embeds {s.value_embeds}: each table serves two of {s.num_layers} layers")
    if len(s.attention) != s.num_layers or set(s.attention) - set("LSP-"):
        bad.append(f"--attention {s.attention}: a letter L, S, P or - for each of {s.num_layers} layers")
    elif "P" in s.attention and (odd := [x.num_heads for x in (s, s.base) if x.num_heads % 2]):
        bad.append(f"--attention {s.attention}: P layers pair heads, and there are {odd[0]}; use --no-paired")
    elif set(s.attention) == {"-"} or len({x.value_table for x in layer_table(s)} - {None}) < s.value_embeds:
        bad.append(f"--attention {s.attention}: a layer, and one for each of {s.value_embeds} value tables, needs it")
    if len(s.softcap) != 3 or not s.softcap[2] or (not s.softcap[0] and s.softcap != (0, 0, 1)):
        bad.append(f"--softcap {s.softcap}: three numbers a,b,c, a and c above 0; 0,0,1 is no cap")
    if s.qk_dim and (s.qk_dim % 4 or not s.head_dim / 2 <= s.qk_dim <= s.head_dim):
        bad.append(f"--qk_dim {s.qk_dim}: a multiple of 4, at least half of --head_dim {s.head_dim}")
    if s.ngram_rows and (s.ngram_rows < 4 or s.ngram_rows % 2 or s.width % world_size):
        bad.append(f"--ngram_rows {s.ngram_rows}: at least 4, and even; --width {s.width} must be a multiple of "
                   f"{world_size} processes, which share the columns")
    if s.muon_beta2 == 1 or s.muon_momentum == 1:
        bad.append("--muon_beta2, --muon_momentum must be below 1: at 1 nothing new is averaged in")
    if s.warmup_steps >= s.iterations:
        bad.append(f"--warmup_steps {s.warmup_steps} must be less than --iterations {s.iterations}")
    return bad + stage_errors(s, world_size) + mixture_errors(s, given, hardware)

def auto_mixtures(s: Settings) -> str:
    """Mixtures in all layers but the first and last ones that stay dense."""
    if not s.num_experts:
        return "D" * s.num_layers
    last = s.num_layers - s.dense_last
    return "".join("M" if s.dense_first <= i < last else "D" for i in range(s.num_layers))

NO_GROUPED = "; grouped has wrong gradients of idle experts on compute capability 10.0"

def auto_experts(s: Settings, hardware: Hardware) -> str:
    """Grouped products where they read their group sizes on the device and are right, on Hopper in bf16; on other GPUs
    padded batches, static, too; on a CPU, which has nothing to wait for, a loop (records/LOG.md)."""
    if hardware.device != "cuda":
        return "loop"
    bf16 = s.dtype == "bf16" or (s.dtype == "auto" and hardware.bf16)
    return "grouped" if bf16 and hardware.capability == (9, 0) else "bmm"

def mixture_errors(s: Settings, given: dict, hardware: Hardware) -> list[str]:
    """A sentence for each setting of the mixture that does not fit another one, or the machine."""
    if not s.num_experts:
        return []
    letters = len(s.moe_layers) == s.num_layers and set(s.moe_layers) <= set("MD")
    dense = "D" in s.moe_layers
    problems = [
        (not letters,
         f"--moe_layers {s.moe_layers}: one letter M or D for each of the {s.num_layers} layers"),
        (letters and not s.mixtures,
         f"--moe_layers {s.moe_layers}, --dense_first {s.dense_first}, --dense_last {s.dense_last}: "
         "no mixture is left; use --num_experts 0 for the dense control"),
        (s.fp8_mlp and not dense and not s.num_shared,
         "--fp8_mlp: has no effect, as neither dense MLP nor shared expert is left"),
        ({"expert_hidden", "mlp_ratio"} <= given.keys() and not dense,
         "--mlp_ratio: has no effect, as all layers are mixtures with --expert_hidden"),
        (s.top_k > s.num_experts,
         f"--top_k {s.top_k} must not be above --num_experts {s.num_experts}"),
        (s.width % 8 or s.hidden % 8,
         f"--width {s.width}, --expert_hidden {s.hidden}: strides must be 16 bytes, multiples of 8"),
        (s.fp8_mlp and s.num_shared * s.hidden % 16,
         f"--fp8_mlp: {s.num_shared} shared experts of size {s.hidden} are no multiple of 16"),
        (s.moe_impl == "grouped" and s.dtype == "fp32" and s.compile,
         "--moe_impl grouped: torch compiles it in bf16 only: use bmm, loop or --no-compile"),
        (s.moe_impl == "grouped" and hardware.capability == (10, 0),
         f"--moe_impl grouped{NO_GROUPED}: use bmm"),
    ]
    return [text for wrong, text in problems if wrong]

def stage_errors(s: Settings, world_size: int) -> list[str]:
    """A sentence for each stage whose batch does not split into whole rows, equally for all."""
    count = len(s.stage_ends)
    bad = [f"--{name} has {len(getattr(s, name))} values, --stage_ends {count}"
           for name in staged_settings() if len(getattr(s, name)) not in (1, count)]
    if s.stage_ends[-1] != 1.0 or list(s.stage_ends) != sorted(set(s.stage_ends)):
        bad.append(f"--stage_ends {s.stage_ends}: must rise and end with 1.0")
    for t in [] if bad else stage_table(s):
        rows = t.batch_tokens // t.seq_len
        if t.batch_tokens % t.seq_len:
            bad.append(f"--batch_tokens {t.batch_tokens} must be a multiple of --seq_len {t.seq_len}")
        elif rows % world_size:
            fits = ", ".join(map(str, divisors(rows)[:12]))
            bad.append(f"{world_size} processes cannot share the {rows} rows of a step (batch_tokens "
                       f"{t.batch_tokens} / seq_len {t.seq_len}): use {fits} processes")
        elif 0 < s.micro_tokens < t.seq_len:
            bad.append(f"--micro_tokens {s.micro_tokens} is less than one row of --seq_len {t.seq_len} tokens")
        elif t.mtp >= t.seq_len:
            bad.append(f"--mtp {t.mtp} must be less than --seq_len {t.seq_len}")
        elif t.candidates % HEAD_MULTIPLE:
            bad.append(f"--candidates {t.candidates} must be a multiple of {HEAD_MULTIPLE}")
    return bad

class Stage(NamedTuple):
    """One row of the stage table: steps [start, end) of the run."""
    start: int
    end: int
    window_start: int  # at `start`
    batch_tokens: int
    seq_len: int
    max_doc_len: int
    window: int  # at `end`
    mtp: int
    candidates: int
    lr: float

    def micro_rows(self, s: Settings, world_size: int) -> int:
        """Rows of one forward pass: the most that fit into micro_tokens, 0: any, and divide a process's share."""
        most = max(1, s.micro_tokens // self.seq_len) if s.micro_tokens else math.inf
        return max(n for n in divisors(self.batch_tokens // self.seq_len // world_size) if n <= most)

def micro_sizes(s: Settings) -> list[int]:
    """Values to try for micro_tokens: its own, if any; a longest row, doubled as often as it pays; halves of that."""
    longest, own = max(s.seq_len), s.micro_tokens
    most = own - 1 if own else max(MICRO_TOKENS, longest)
    return [own] * (own > 0) + [longest << k for k in reversed(range(32)) if longest << k <= most]

def staged_settings() -> list[str]:
    """The settings that may have a value per stage, in the order of the fields of Stage."""
    return [name for name in help_texts() if "per stage" in bracket(name)]

def stage_table(s: Settings) -> list[Stage]:
    """The stages of a run; a single value of a staged setting holds for all of them."""
    columns = [getattr(s, name) for name in staged_settings()]
    columns = [c * len(s.stage_ends) if len(c) == 1 else c for c in columns]
    stages, start, window = [], 0, s.window_start or s.window[0]
    for end, *row in zip(s.stage_ends, *columns, strict=True):
        stages.append(Stage(start, round(end * s.iterations), window, *row))
        start, window = stages[-1].end, stages[-1].window
    return stages

def stage_at(stages: list[Stage], step: float) -> Stage:
    """The stage of training step `step`; the last one for steps past the end."""
    return next((stage for stage in stages if step < stage.end), stages[-1])

# ┌─ Attention ──────────────────────────────────────────────────────────────────────────────────┐
# One rule says who sees whom; all backends, in KERNELS, apply it token by token, so that they agree.

def visible(query, key, query_doc, key_doc, window) -> Tensor:
    """True where a query may look at a key: causal, same document, inside the window."""
    return (query >= key) & (query - key < window) & (query_doc == key_doc)

def dense_mask(docs_BT, window: Tensor, copies: int = 1) -> Tensor:
    """The rule for all pairs, (B, 1, T, T) bool; each token `copies` times."""
    position = torch.arange(docs_BT.size(1), device=docs_BT.device).repeat_interleave(copies)
    docs = docs_BT.repeat_interleave(copies, dim=1)
    return visible(position[:, None], position, docs[:, None, :, None], docs[:, None, None, :], window)

# ┌─ Mixture of experts ─────────────────────────────────────────────────────────────────────────┐
# A token's choice number n = token * K + k becomes row j of the rows sorted by expert, order[j] = n;
# expert e has the rows from ends[e - 1] up to ends[e]. Shapes do not depend on how many those are. Dropped choices are
# of expert E, and last: `loop` leaves them out.

LOOP_ROWS = 64  # multiple of the rows of a product in `loop`
expert_operator = functools.partial(torch.library.custom_op, mutates_args=())

class Grouping(NamedTuple):
    """Choices sorted by expert, perhaps with padding."""
    order_R: Tensor  # row -> number of the choice; N * K: padding
    inverse_R: Tensor  # number of the choice -> row
    ends_E: Tensor  # int32: where the rows of each expert end
    owner_GE: Tensor | None = None  # of G equal blocks of rows, for `bmm`: 1 at its expert

def group_rows(experts_NK, num_experts: int) -> Grouping:
    """Sorts the choices by expert, tokens in order. Nothing is read from the device."""
    flat = experts_NK.flatten().to(torch.int32)  # a sort of shorter keys takes fewer passes
    order = flat.argsort(stable=True)
    row = torch.arange(len(order), device=order.device)
    inverse = torch.empty_like(order).scatter_(0, order, row)
    number = torch.arange(num_experts, dtype=torch.int32, device=flat.device)
    ends = torch.searchsorted(flat[order], number, right=True, out_int32=True)
    return Grouping(order, inverse, ends)

def pad_groups(g: Grouping, size: int) -> Grouping:
    """The same in blocks of `size` rows, each of one expert: padding fills an expert's last one."""
    rows, experts = len(g.order_R), len(g.ends_E)
    count = -(-rows // size) + experts  # enough for any routing
    begins = F.pad(g.ends_E, (1, 0))
    block_ends = (-(-torch.diff(begins) // size)).cumsum(0)
    shift = F.pad(block_ends, (1, 0)) * size - begins  # of an expert's first row
    row = torch.arange(rows, device=begins.device)
    row = row + shift[torch.searchsorted(g.ends_E, row.to(torch.int32), right=True)]
    order = torch.full((count * size,), rows, device=row.device).scatter_(0, row, g.order_R)
    block = torch.arange(count, device=row.device)
    owner = torch.searchsorted(block_ends, block, right=True).clamp_max(experts - 1)
    ends = (block_ends * size).to(torch.int32)
    return Grouping(order, row[g.inverse_R], ends, F.one_hot(owner, experts))

def arrange(experts_NK, num_experts: int, impl: str) -> Grouping:
    """Sorted rows as a backend wants them: `bmm` in about four blocks an expert; `loop` in multiples of LOOP_ROWS, as
    oneDNN makes a new kernel for each new size."""
    g = group_rows(experts_NK, num_experts)
    if impl == "grouped":  # dropped ones, too: what it left out would be garbage
        return g._replace(ends_E=F.pad(g.ends_E[:-1], (0, 1), value=len(g.order_R)))
    quarter = -(-len(g.order_R) // (64 * num_experts))
    return pad_groups(g, 16 * quarter if impl == "bmm" else LOOP_ROWS)

def rows_of_tokens(x_ND, order_R, choices: int) -> Tensor:
    """The token's row for each sorted one; of padding, any."""
    return x_ND[(order_R // choices).clamp_max(len(x_ND) - 1)]

def sums_of_tokens(y_RD, inverse_R, choices: int) -> Tensor:
    """The sum of a token's sorted rows, (N, D): gathered, so without atomics."""
    index_NK = inverse_R.unflatten(0, (-1, choices))
    if y_RD.device.type == "cpu":
        return F.embedding_bag(index_NK, y_RD, mode="sum")  # in one pass
    return y_RD[index_NK].sum(1)

class Spread(torch.autograd.Function):
    """Rows of the tokens, sorted: (R, D)."""
    @staticmethod
    def forward(ctx, x_ND, order_R, inverse_R, choices: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.choices = choices
        return rows_of_tokens(x_ND, order_R, choices)

    @staticmethod
    def backward(ctx, grad_RD):
        (inverse,) = ctx.saved_tensors
        return sums_of_tokens(grad_RD.contiguous(), inverse, ctx.choices), None, None, None

class Combine(torch.autograd.Function):
    """A token's sorted rows, summed: (N, D)."""
    @staticmethod
    def forward(ctx, y_RD, order_R, inverse_R, choices: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.choices = choices
        return sums_of_tokens(y_RD, inverse_R, choices)

    @staticmethod
    def backward(ctx, grad_ND):
        (order,) = ctx.saved_tensors  # padding gets gradients that GatedReLU2 multiplies by 0
        return rows_of_tokens(grad_ND, order, ctx.choices), None, None, None

class GatedReLU2(torch.autograd.Function):
    """gate * relu(x)^2, (R, F), of sorted rows and gates by choice; 0 in padding, also the gradient of x."""
    @staticmethod
    def forward(ctx, x_RF, gates_C, order_R, inverse_R) -> Tensor:
        gate_R1 = F.pad(gates_C, (0, 1))[order_R][:, None].type_as(x_RF)
        root = torch.where(gate_R1 == 0, 0, x_RF).relu()
        ctx.save_for_backward(root, gate_R1, inverse_R)
        return root.square() * gate_R1

    @staticmethod
    def backward(ctx, grad_RF):
        root, gate_R1, inverse = ctx.saved_tensors
        slope_RF = grad_RF * root
        gate_grad_R = (slope_RF * root).sum(1, dtype=torch.float32)
        return slope_RF * (2 * gate_R1), gate_grad_R[inverse], None, None

@expert_operator(
    "nanospeedrun_train_moe::loop", schema="(Tensor x, Tensor weight, Tensor ends) -> Tensor")
def loop_product(x_RD, weight_EDF, ends_E):
    """A product for each expert, whose rows' ends are read on the host; zeros behind the last."""
    out_RF, start = x_RD.new_empty(len(x_RD), weight_EDF.size(2)), 0
    for weight, end in zip(weight_EDF, ends_E.tolist(), strict=True):
        torch.mm(x_RD[start:end], weight, out=out_RF[start:end])
        start = end
    out_RF[start:] = 0
    return out_RF

@expert_operator(
    "nanospeedrun_train_moe::loop_weight", schema="(Tensor x, Tensor grad, Tensor ends) -> Tensor")
def loop_weight_gradient(x_RD, grad_RF, ends_E):
    out_EDF, start = x_RD.new_empty(len(ends_E), x_RD.size(1), grad_RF.size(1)), 0
    for out, end in zip(out_EDF, ends_E.tolist(), strict=True):
        torch.mm(x_RD[start:end].T, grad_RF[start:end], out=out)
        start = end
    return out_EDF

def _loop_backward(ctx, grad):
    x, weight, ends = ctx.saved_tensors
    grad = grad.contiguous()
    return loop_product(grad, weight.mT, ends), loop_weight_gradient(x, grad, ends), None

loop_product.register_fake(lambda x, weight, ends: x.new_empty(len(x), weight.size(2)))
loop_weight_gradient.register_fake(
    lambda x, grad, ends: x.new_empty(len(ends), x.size(1), grad.size(1)))
loop_product.register_autograd(
    _loop_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def block_matrices(weight_EDF, owner_GE) -> Tensor:
    """(G, D, F), by a product, so that its gradient is one: no atomics."""
    return (owner_GE.to(weight_EDF.dtype) @ weight_EDF.flatten(1)).unflatten(1, weight_EDF.shape[1:])

@expert_operator("nanospeedrun_train_moe::blocks", schema="(Tensor x, Tensor weight, Tensor owner) -> Tensor")
def block_product(x_GBD, weight_EDF, owner_GE):
    """Each block of rows times its expert's matrix, (G, B, F). An operator, as backward copies the matrices again: what
    torch.compile keeps of them is, in each layer, five times the experts' weights."""
    return x_GBD @ block_matrices(weight_EDF, owner_GE)

@expert_operator(
    "nanospeedrun_train_moe::blocks_backward",
    schema="(Tensor grad, Tensor x, Tensor weight, Tensor owner) -> (Tensor, Tensor)")
def block_product_backward(grad_GBF, x_GBD, weight_EDF, owner_GE):
    x_grad = grad_GBF @ block_matrices(weight_EDF, owner_GE).mT
    grads_GK = (x_GBD.mT @ grad_GBF).flatten(1)
    owner_GE = owner_GE.to(x_grad.dtype)
    weight_grad = owner_GE.T @ grads_GK
    return x_grad, weight_grad.view_as(weight_EDF)

block_product.register_fake(lambda x, weight, owner: x.new_empty(*x.shape[:2], weight.size(2)))
block_product_backward.register_fake(
    lambda grad, x, weight, owner: (x.new_empty(x.shape), weight.new_empty(weight.shape)))
block_product.register_autograd(
    lambda ctx, grad: (*block_product_backward(grad, *ctx.saved_tensors), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))

def expert_product(x_RD, weight_EDF, g: Grouping, impl: str) -> Tensor:
    """Each sorted row times its expert's matrix, (R, F)."""
    if impl == "grouped":
        return F.grouped_mm(x_RD, weight_EDF, offs=g.ends_E)
    if impl == "loop":
        return loop_product(x_RD, weight_EDF, g.ends_E)
    return block_product(x_RD.unflatten(0, (len(g.owner_GE), -1)), weight_EDF, g.owner_GE).flatten(0, 1)

def expert_mlp(x_ND, up_EDF, down_EFD, gates_NK, experts_NK, impl: str) -> Tensor:
    """The sum of gate * relu(x @ up[e])^2 @ down[e] over the experts e that a token has chosen, (N, D)."""
    choices = experts_NK.size(1)
    g = arrange(experts_NK, len(up_EDF), impl)
    x_RD = Spread.apply(x_ND, g.order_R, g.inverse_R, choices)
    pre_RF = expert_product(x_RD, up_EDF, g, impl)
    post_RF = GatedReLU2.apply(pre_RF, gates_NK.flatten(), g.order_R, g.inverse_R)
    y_RD = expert_product(post_RF, down_EFD, g, impl)
    return Combine.apply(y_RD, g.order_R, g.inverse_R, choices)

# ┌─ Routers ────────────────────────────────────────────────────────────────────────────────────┐
ROUTER_STD = 0.01  # of the routers' initial weights
DROP_PARTS = 8  # parts of a row by which dropped choices are counted
NOISE_FLOOR = 0.01  # least std of noisy_topk's noise: chance_of_choice divides by it

def named_sums(sums: Tensor, num_experts: int) -> dict[str, Tensor]:
    """What a router sums over tokens, the last axis, by name. By expert: how often it was chosen, its share of the
    scores; of noisy_topk, else 0, its gates and chance to be chosen under another noise. Choices dropped in each part
    of the row. E * sum(share of choices * of scores) of a row, entropy of the scores, key of the last choice less that
    of the next, squared log-sum-exp and mean square of the logits."""
    experts = "chosen", "score", "importance", "load"
    sizes = dict.fromkeys(experts, num_experts) | {"dropped": DROP_PARTS}
    sizes |= dict.fromkeys(("sequence", "entropy", "margin", "z", "logit"), 1)
    return dict(zip(sizes, sums.split(list(sizes.values()), dim=-1), strict=True))

def chance_of_choice(clean_NE, noise_std_NE, noisy_NE, top_NK, choices: int) -> Tensor:
    """Probability that an expert is among the chosen if its own noise is drawn again, (N, E): that it exceeds the
    K-th largest noisy logit of the others (Shazeer et al. 2017, arXiv 1701.06538, appendix A). `top_NK`: the K + 1
    largest, in order; if there is no K + 1st, all are chosen."""
    if top_NK.size(1) == choices:
        return torch.ones_like(clean_NE)
    inside, outside = top_NK[:, choices - 1:].split(1, dim=1)
    threshold = torch.where(noisy_NE > outside, outside, inside)
    return torch.special.ndtr((clean_NE - threshold) / noise_std_NE)

def among(experts: Tensor, num_experts: int) -> Tensor:
    """Numbers of experts (.., K) -> (.., E), True for those."""
    return (experts[..., None] == torch.arange(num_experts, device=experts.device)).any(-2)

class Routing(NamedTuple):
    """What a router decides, and sums for its balance and its report."""
    experts_NK: Tensor  # E: dropped
    gates_NK: Tensor  # fp32
    sums_S: Tensor | None  # see named_sums; None without gradients

class RouterProduct(torch.autograd.Function):
    """x @ weight.T, (N, R) fp32, of bf16 x, by tensor cores and without an fp32 copy of x. The weight is a sum of two
    bf16 matrices, which have 16 of its 24 bits; the gradient of the product is rounded to bf16, as any other."""
    @staticmethod
    def forward(ctx, x_ND, weight_RD) -> Tensor:
        high = weight_RD.type_as(x_ND)
        both = torch.cat((high, (weight_RD - high).type_as(x_ND)))
        ctx.save_for_backward(x_ND, high)
        products = torch.mm(x_ND, both.T, out_dtype=torch.float32)
        return products.unflatten(1, (2, -1)).sum(1)

    @staticmethod
    def backward(ctx, grad_NR):
        x, weight = ctx.saved_tensors
        grad = grad_NR.type_as(x)
        return grad @ weight, torch.mm(grad.T, x, out_dtype=torch.float32)

class Router(NamedTuple):
    """How tokens choose: everything that is not learned."""
    kind: str
    num_experts: int
    choices: int
    norm: bool
    scale: float
    capacity: float

    def __call__(self, x_BTD, weight_RD, bias_E, noise_BTE, noise_scale=1.0) -> Routing:
        """Routing of normed tokens. weight: (E, D) fp32, noisy_topk (2E, D), the second half for the noise's size;
        bias: sigmoid_bias's, for the choice alone; noise: standard normal, None in evaluation; its scale fades."""
        training, sigmoid = torch.is_grad_enabled(), self.kind == "sigmoid_bias"
        x_ND = x_BTD.flatten(0, 1)
        if x_ND.is_cuda and x_ND.dtype == torch.bfloat16:
            products = RouterProduct.apply(x_ND, weight_RD)
        else:
            products = F.linear(x_ND.float(), weight_RD)
        logits, *noise_logits = products.split(self.num_experts, dim=1)
        keys, noise_std = logits, None
        if noise_BTE is not None:
            noise_std = F.softplus(noise_logits[0]) * noise_scale + NOISE_FLOOR
            keys = logits + noise_BTE.flatten(0, 1) * noise_std
        scores = torch.sigmoid(logits) if sigmoid else keys.softmax(-1)
        keys = scores + bias_E if sigmoid else keys
        top, experts = keys.topk(min(self.choices + 1, self.num_experts))
        experts = experts[:, :self.choices]
        gates = scores.gather(1, experts)
        if self.norm and self.choices > 1:  # a lone one would be constant: nothing to learn from
            gates = gates / gates.sum(-1, keepdim=True).clamp_min(1e-20)
        kept = sums = None
        if training and self.capacity:
            kept = self.kept(experts.view(*x_BTD.shape[:2], -1))
        if training:
            sums = self.sums(logits, noise_std, keys, scores, top, experts, gates, kept, len(x_BTD))
        gates = gates * self.scale
        if kept is not None:
            kept = kept.view_as(gates)
            experts, gates = experts.where(kept, self.num_experts), gates * kept
        return Routing(experts, gates, sums)

    def kept(self, experts_BTK) -> Tensor:
        """False where earlier tokens of the row have filled an expert. What a token loses depends on nothing that comes
        after it, nor on other rows (unlike GShard's order of first choices first)."""
        even = experts_BTK.size(1) * self.choices / self.num_experts
        chosen = among(experts_BTK, self.num_experts).int()
        earlier = (chosen.cumsum(1) - chosen).gather(2, experts_BTK)
        return earlier < math.ceil(self.capacity * even)

    def sums(
            self, logits, noise_std, keys, scores, top, experts_NK, gates_NK, kept_BTK, rows: int) -> Tensor:
        """The sums that named_sums names, (S,) fp32. Only what penalties read has a gradient: that of the entropy is
        infinite where a score underflows."""
        chosen_BE = among(experts_NK, self.num_experts).unflatten(0, (rows, -1)).sum(1)
        share = scores / scores.sum(-1, keepdim=True)
        score_BE = share.unflatten(0, (rows, -1)).sum(1)
        sequence = (chosen_BE * score_BE).sum() * self.num_experts * rows / experts_NK.numel()
        importance, load = torch.zeros(2, self.num_experts, device=share.device)
        if noise_std is not None:
            importance = torch.zeros_like(share).scatter(1, experts_NK, gates_NK).sum(0)
            load = chance_of_choice(logits, noise_std, keys, top, self.choices).sum(0)
        dropped = share.new_zeros(DROP_PARTS)
        if kept_BTK is not None:
            length = kept_BTK.size(1)
            part = torch.arange(length, device=share.device) * DROP_PARTS // length
            dropped = (~kept_BTK).sum((0, 2)).float() @ F.one_hot(part, DROP_PARTS).float()
        entropy = torch.special.entr(share.detach()).sum()
        margin = (top[:, self.choices - 1] - top[:, -1]).detach().sum()  # 0 if all are chosen
        z = logits.logsumexp(-1).square().sum()
        logit = (logits.detach().square() / self.num_experts).sum()
        single = torch.stack((sequence, entropy, margin, z, logit))
        chosen = chosen_BE.sum(0).float()
        return torch.cat((chosen, score_BE.sum(0), importance, load, dropped, single))

class Mixture(nn.Module):
    """Feed-forward layer in which each token has some of many experts, and perhaps shared ones."""
    def __init__(self, s: Settings):
        super().__init__()
        experts, self.impl = s.num_experts, s.moe_impl
        self.router = Router(
            s.router, experts, s.top_k, s.route_norm, s.gate_scale, s.capacity_factor)
        up = uniform_matrix(experts, s.hidden, s.width).mT
        self.experts_up = nn.Parameter(up.contiguous())  # (E, D, F)
        self.experts_down = nn.Parameter(torch.zeros(experts, s.hidden, s.width))  # (E, F, D)
        shared = s.num_shared * s.hidden  # side by side they are one MLP
        self.shared = MLP(s, shared) if shared else None

    def forward(self, x_BTD, router: tuple) -> tuple:
        """Output and sums. Gates are applied after ReLU^2, which would square them."""
        shared = self.shared(x_BTD) if self.shared is not None else None
        experts, gates, sums = self.router(x_BTD, *router)
        weights = self.experts_up, self.experts_down
        y = expert_mlp(x_BTD.flatten(0, 1), *weights, gates, experts, self.impl).view_as(x_BTD)
        return y if shared is None else y + shared, sums

# ┌─ Model ──────────────────────────────────────────────────────────────────────────────────────┐
GATE_DIM = 12  # dimensions of the residual stream that gates read (28)
HEAD_MULTIPLE = 128  # the vocabulary is padded to a multiple of this
IGNORE = -1  # target that has no loss
POINTER_BLOCK = 2048  # positions; copies come from the own block and the one before
NGRAM_FACTORS = 2654435761, 2246822519, 3266489917  # of a token and those before
NGRAM_SIGNS = 8192  # different vectors of signs
PERMUTATION = 20011  # label * this, modulo the vocabulary, is a permutation: a prime
# Learned scalars of a layer and their initial values: weights of the stream, the embedding, the skip connection (11),
# values, value embedding (14, 15), of the output of which the last is freed (40).
SCALARS = {
    "residual": 1.0, "embedding": 0.0, "skip": 1.0, "value": 0.5, "value_embed": 0.5, "backout": 0.5}

# differs from train_gpt.py: the mixture
class Layer(NamedTuple):
    """One row of the layer table."""
    attention: str  # L, S, P or -
    value_table: int | None  # that is mixed into v
    skip_from: int | None  # layer whose output is added to the input
    mixture: int | None = None  # number among the mixture layers; None: a dense MLP

# differs from train_gpt.py: the mixture
def layer_table(s: Settings) -> list[Layer]:
    """The topology. Value tables serve first and last layers (17); skips: unet i to n-1-i (11), single n/4 to n/2."""
    n, tables = s.num_layers, s.value_embeds
    layers = []
    for i, attention in enumerate(s.attention):
        value = i if i < tables else i - (n - tables) if i >= n - tables else None
        skips = {"unet": n - 1 - i if n - 1 - i < i else None,
                 "single": n // 4 if i == n // 2 > 1 else None}
        value = value if attention != "-" else None
        mixture = s.mixtures.index(i) if i in s.mixtures else None
        layers.append(Layer(attention, value, skips.get(s.skip), mixture))
    return layers

def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last axis, without parameters."""
    return F.rms_norm(x, (x.size(-1),))

def short_window(window, step: int):
    """Half of a long window, an int or int tensor, rounded up to `step` tokens."""
    return -(-window // (2 * step)) * step

def rotary_table(length: int, head_dim: int, base: float, window=1, longer=1) -> tuple:
    """cos and signed sin, (length, 1, head_dim) fp32, of 1 .. 1/base radians a token; 1, 0 where content counts (17).
    For a `longer` window YaRN (arXiv 2309.00071): what turns less than once in it slows by the ratio, 32 turns stay."""
    frequency = (1.0 / base) ** torch.linspace(0, 1, head_dim // 4, dtype=torch.float32)
    if longer > window:
        kept = ((window * frequency / (2 * math.pi) - 1) / 31).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) * window / longer)
    angle = torch.outer(torch.arange(length, dtype=torch.float32), frequency)[:, None]
    cos, sin, still = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return torch.cat((cos, still + 1, cos, still + 1), -1), torch.cat((sin, still, -sin, still), -1)

def rotate(x_BTHK, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-truncated RoPE (17): turns the first half of the pairs (x[i], x[i + K/2]), of narrow ones, too; in fp32."""
    half = x_BTHK.size(-1) // 2
    cos, sin = (table.unflatten(-1, (2, -1))[..., :half].flatten(-2) for table in (cos, sin))
    x = x_BTHK.float()
    return (x * cos + x.roll(half, -1) * sin).type_as(x_BTHK)

def without_component(y: Tensor, direction: Tensor) -> Tensor:
    """y minus its projection on `direction`, along the last axis."""
    unit = F.normalize(direction, dim=-1)
    return y - (y * unit).sum(-1, keepdim=True) * unit

def pair(x_BTHK) -> Tensor:
    """(B, T, H, K) -> (B, 2T, H/2, K): heads h and h + H/2 of a token in turn: queries see both heads' keys (58)."""
    return x_BTHK.unflatten(2, (2, -1)).flatten(1, 2)

def uniform_matrix(*shape: int) -> Tensor:
    """Initial weights, uniform with standard deviation 0.5 / sqrt(fan_in), the last axis."""
    bound = math.sqrt(3) * 0.5 * shape[-1] ** -0.5
    return torch.empty(shape).uniform_(-bound, bound)

class Attention(nn.Module):
    """Causal self-attention. Matrices of one shape are one parameter, for batching; the output's is transposed."""
    def __init__(self, s: Settings, kind: str):
        super().__init__()
        self.num_heads, self.head_dim = s.num_heads, s.head_dim
        self.gated, self.value_gated = s.attn_gate, s.value_gate
        self.backend, self.options = s.backend, flex_options(s.device)
        self.offset, self.paired, self.xsa = s.key_offset and kind == "L", kind == "P", s.xsa
        narrow = s.qk_dim if kind != "L" else 0
        growth = 1 if s.attn_scale or not narrow else math.sqrt(s.head_dim / narrow)
        self.scale = s.softmax_scale * growth
        self.qk = nn.Parameter(uniform_matrix(2, s.num_heads * narrow, s.width)) if narrow else None
        self.qkvo = nn.Parameter(torch.zeros(2 if narrow else 4, s.width, s.width))
        self.qkvo.data[:-1] = uniform_matrix(*self.qkvo[:-1].shape)

    def forward(self, x_BTD, value_BTD, mask, at, scalars: dict, gates) -> Tensor:
        """`at`: rotary cos and sin, (T, 1, K), and where the token before is of the same document."""
        q, k, v, value_BTHK, gate = self.project(x_BTD, value_BTD, at, scalars, gates)
        q, k, v = (pair(x) if self.paired else x for x in (q, k, v))
        y = attend(q, k, v, mask, self.scale, self.backend, self.options).reshape(value_BTHK.shape)
        y = without_component(y, value_BTHK) if self.xsa else y
        return (y if gate is None else y * gate).flatten(2) @ self.qkvo[-1]

    def project(self, x_BTD, value_BTD, at, scalars: dict, gates) -> tuple:
        """q, k, v of each position, (B, T, H, K), and for its output v again and its gate, (B, T, H, 1)."""
        v = F.linear(x_BTD, self.qkvo[:-1].flatten(0, 1)).unflatten(-1, (-1, self.head_dim))
        if self.qk is None:
            qk, v = v.split((2 * self.num_heads, self.num_heads), dim=2)
        else:
            qk = F.linear(x_BTD, self.qk.flatten(0, 1)).unflatten(-1, (2 * self.num_heads, -1))
        cos, sin, follows_BT11 = at
        q, k = rotate(norm(qk), cos, sin).chunk(2, dim=2)
        k = self.offset_keys(k, follows_BT11)
        if gates is not None:
            both = torch.sigmoid(F.linear(x_BTD[..., :GATE_DIM], gates.flatten(0, 1)))
            out_gate, value_gate = both.unflatten(-1, (2, self.num_heads, 1)).unbind(2)
        if value_BTD is not None:
            weight = scalars["value_embed"] * (2 * value_gate if self.value_gated else 1)
            v = scalars["value"] * v + weight * value_BTD.view_as(v)
        return q, k, v, v, out_gate if self.gated else None

    def offset_keys(self, k_BTHK, follows_BT11) -> Tensor:
        """The unrotated half of a key is the previous token's, if of the same document: one layer can induce (49)."""
        if not self.offset:
            return k_BTHK
        quarter = torch.arange(k_BTHK.size(-1), device=k_BTHK.device) // (k_BTHK.size(-1) // 4)
        shifted = F.pad(k_BTHK, (0, 0, 0, 0, 1, -1))
        return torch.where(follows_BT11 & (quarter % 2 == 1), shifted, k_BTHK)

class MLP(nn.Module):
    """ReLU^2 feed-forward; both matrices are (hidden, model), so that they can be batched (27)."""
    def __init__(self, s: Settings, hidden: int):
        super().__init__()
        self.kernel, self.fp8 = "mlp" in s.kernels, s.fp8_mlp
        self.up = nn.Parameter(uniform_matrix(hidden, s.width))
        self.down = nn.Parameter(torch.zeros(hidden, s.width))

    def forward(self, x_BTD) -> Tensor:
        fp8 = self.fp8 and torch.is_grad_enabled()  # evaluation is exact
        x_ND = x_BTD.flatten(0, 1)
        return mlp_relu2(x_ND, self.up, self.down, self.kernel, fp8).view_as(x_BTD)

# differs from train_gpt.py: the mixture
class Block(nn.Module):
    """One layer: mix with skip connection and embedding, attention, MLP or mixture of experts."""
    # differs from train_gpt.py: the mixture
    def __init__(self, s: Settings, layer: Layer):
        super().__init__()
        self.attn = Attention(s, layer.attention) if layer.attention != "-" else None
        dense = layer.mixture is None
        self.mlp = MLP(s, s.mlp_ratio * s.width) if dense else Mixture(s)

    # differs from train_gpt.py: the router in, its sums out
    def forward(
            self, x_BTD, x0_BTD, skip_BTD, value_BTD, mask, at, scalars_S, gates, router) -> tuple:
        scalars = dict(zip(SCALARS, scalars_S, strict=True))
        x = x_BTD if skip_BTD is None else x_BTD + scalars["skip"] * skip_BTD
        x = scalars["residual"] * x + scalars["embedding"] * x0_BTD
        if self.attn is not None:
            x = x + self.attn(norm(x), value_BTD, mask, at, scalars, gates)
        y, sums = (self.mlp(norm(x)), None) if router is None else self.mlp(norm(x), router)
        return x + y, sums

# differs from train_gpt.py: routers, their noise, bias and sums
class GPT(nn.Module):
    """The language model, built in fp32 on the CPU from the seed alone; the optimizer casts it."""
    # differs from train_gpt.py: routers
    def __init__(self, s: Settings, vocab_size: int, world: World | None = None):
        super().__init__()
        torch.manual_seed(s.seed)
        self.layers, self.window_step, self.backend = layer_table(s), s.window_step, s.backend
        self.loss_kernel, self.fp8_head = "loss" in s.kernels, s.fp8_head == "on"
        padded = -(-(vocab_size + bool(s.pointer)) // HEAD_MULTIPLE) * HEAD_MULTIPLE
        self.vocab_size, self.embed = vocab_size, Table(padded, s.width)
        self.value_embeds = nn.ModuleList(Table(padded, s.width) for _ in range(s.value_embeds))
        self.smear = nn.Parameter(torch.zeros(GATE_DIM + 1)) if s.smear else None  # gate, its weight
        self.blocks = nn.ModuleList(Block(s, layer) for layer in self.layers)
        self.ngrams = Ngrams(s, world or World()) if s.ngram_rows else None
        gates = torch.zeros(s.num_layers, 2, s.num_heads, GATE_DIM)  # of outputs, of value embeddings
        gated = s.attn_gate or (s.value_embeds and s.value_gate)
        self.gates = nn.Parameter(gates) if gated else None
        self.scalars = nn.Parameter(torch.tensor([list(SCALARS.values())] * s.num_layers))
        self.backout = 2 * s.num_layers // 3 - 1 if s.backout and s.num_layers > 2 else None
        self.lm_head = nn.Parameter(torch.zeros(padded, s.width))
        self.pointer = Pointer(s.width, s.pointer) if s.pointer else None
        if s.mixtures:  # noisy_topk starts even, by its noise; elsewhere ties would all go one way
            shape = len(s.mixtures), s.num_experts, s.width
            routers = torch.zeros(shape).repeat(1, 2, 1)
            if s.router != "noisy_topk":
                routers = torch.randn(shape) * ROUTER_STD
            self.routers, self.router_scale = nn.Parameter(routers), 1 / s.growth
            self.register_buffer("router_bias", torch.zeros(shape[:2]), persistent=False)
        a, b, c = s.softcap
        self.cap = (a, b * s.growth, c * s.growth)  # of logits / growth: costs nothing, scales FP8
        self.candidates = 0
        lengths = [(t.seq_len, t.max_doc_len or t.seq_len) for t in stage_table(s)]
        self.longest = dict(sorted(lengths))  # document, of stages with one seq_len the longest
        cos, sin = torch.zeros(2, max(*s.seq_len, s.eval_seq_len), 1, s.head_dim)
        # number of the first row (candidate_turn); values that FP8 clipped; targets without a loss
        turn, saturated, left_out = torch.zeros(3, dtype=torch.int64)
        buffers = dict(cos=cos, sin=sin, turn=turn, saturated=saturated, left_out=left_out,
                       noise_scale=torch.ones(()))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        if not cos.is_meta:  # where only shapes count (Table)
            set_rotary(self, s)

    # differs from train_gpt.py: noise in, sums out
    def forward(self, inputs_BT, targets_KBT, docs_BT, window: Tensor, noise_BMTE=None) -> Tensor:
        """Cross-entropies with the targets k of `future_targets`, each summed over those not IGNORE, in nats, and with
        gradients the routers' sums, (K + M * S,) fp32. `window`: int32 0-D tensor, tokens of the long window; document
        numbers rise along a row; noise: standard normal, for noisy_topk in training."""
        found_BTD = None if self.ngrams is None else self.ngrams(inputs_BT, docs_BT)
        return self.calculate(inputs_BT, targets_KBT, docs_BT, window, found_BTD, noise_BMTE)

    # differs from train_gpt.py: noise in, sums out
    def calculate(self, inputs_BT, targets_KBT, docs_BT, window: Tensor, found_BTD, noise_BMTE=None):
        """As `forward`, with the vectors that `ngrams` found: what can be one graph."""
        sums = []
        x_BTD = norm(self.trunk(inputs_BT, docs_BT, window, found_BTD, noise_BMTE, sums))
        copies = None if self.pointer is None else self.pointer(x_BTD, inputs_BT, targets_KBT[0], docs_BT)
        return torch.cat([self.losses(x_BTD, targets_KBT, copies), *sums])

    # differs from train_gpt.py: noise in, sums out
    def trunk(self, inputs_BT, docs_BT, window: Tensor, found_BTD=None, noise_BMTE=None, sums=None):
        """Residual stream after the last layer, (B, T, D). The routers' sums are appended to `sums`."""
        follows = F.pad(docs_BT[:, 1:] == docs_BT[:, :-1], (1, 0))[..., None]
        x = x0 = self.embedding(inputs_BT, follows)
        masks = self.masks(docs_BT, window)
        at = *(x[:inputs_BT.size(1)] for x in (self.cos, self.sin)), follows[..., None]
        scalars = self.scalars.type_as(x).unbind(0)
        gates = [None] * len(self.layers) if self.gates is None else self.gates.unbind(0)
        if self.ngrams is not None:
            weights = self.ngrams.weight.type_as(x).unbind(0)
            found_BTD = self.ngrams(inputs_BT, docs_BT) if found_BTD is None else found_BTD
        outputs, values = [], {}
        for i, (block, layer) in enumerate(zip(self.blocks, self.layers, strict=True)):
            skip = outputs[layer.skip_from] if layer.skip_from is not None else None
            if (table := layer.value_table) not in (None, *values):  # late: early in backward
                values[table] = self.value_embeds[table](inputs_BT)
            router = self.router(layer.mixture, noise_BMTE)
            mask = masks.get(layer.attention)
            x = x if found_BTD is None else x + weights[i] * found_BTD
            x, own = block(x, x0, skip, values.get(table), mask, at, scalars[i], gates[i], router)
            outputs.append(x)
            if sums is not None and own is not None:
                sums.append(own)
        return x if self.backout is None else x - scalars[self.backout][-1] * outputs[self.backout]

    def router(self, mixture: int | None, noise_BMTE) -> tuple | None:
        """What the router of a mixture is called with: weights, bias, noise and its scale."""
        if mixture is None:
            return None
        noise_BTE = None if noise_BMTE is None else noise_BMTE[:, mixture]
        weight = self.routers[mixture] * self.router_scale
        return weight, self.router_bias[mixture], noise_BTE, self.noise_scale

    def masks(self, docs_BT, window: Tensor) -> dict:
        """The mask of each kind of layer, made once per forward pass. A short window is half a long one."""
        kinds = sorted({layer.attention for layer in self.layers} - {"-"})
        if self.backend == "varlen":
            longest = self.longest.get(docs_BT.size(1)) if torch.is_grad_enabled() else None
            return packed_documents(docs_BT, window, self.window_step, longest, kinds)
        half = torch.minimum(short_window(window, self.window_step), window)
        make = block_mask if self.backend == "flex" else dense_mask
        options = {"L": (window, 1), "S": (half, 1), "P": (half, 2)}
        return {kind: make(docs_BT, *options[kind]) for kind in kinds}

    def embedding(self, inputs_BT, follows_BT1) -> Tensor:
        """Normed token embeddings; each takes up some of the previous one of its document, gated (34)."""
        x = self.embed(inputs_BT)
        if self.smear is not None:
            gate, weight = self.smear.split((GATE_DIM, 1))
            previous = torch.cat((x[:, :1], x[:, :-1]), dim=1) * follows_BT1
            x = x + weight * torch.sigmoid(F.linear(x[..., :GATE_DIM], gate[None])) * previous
        return norm(x)

    def head(self, x_BTD) -> Tensor:
        """Logits, exact."""
        return cap_logits(F.linear(norm(x_BTD), self.lm_head), self.cap)

    def losses(self, x_BTD, targets_KBT, copies=None) -> Tensor:
        """As `forward`, of the normed stream; copies: what the pointer says of each token. In training each row has
        `candidates` classes of its own; targets without a place among them are counted."""
        if not torch.is_grad_enabled() or not 0 < self.candidates < self.vocab_size:
            return self.class_losses(x_BTD, targets_KBT, self.lm_head, self.vocab_size, copies)
        losses = []
        for row in range(len(x_BTD)):
            part, turn = slice(row, row + 1), (self.turn + row) * (self.candidates + 1)
            targets, some = targets_KBT[:, part].long(), copies and [x[part] for x in copies]
            classes, place, bias_V = candidate_set(
                targets, turn, self.candidates, self.vocab_size, copies is not None)
            among = place[targets.clamp_min(0)].where(targets != IGNORE, IGNORE)
            self.left_out += ((among == IGNORE) & (targets != IGNORE)).sum()
            weight_VD = look_up(self.lm_head, classes)
            losses.append(self.class_losses(x_BTD[part], among, weight_VD, place[-1], some, bias_V))
        return sum(losses)

    def class_losses(self, x_BTD, targets_KBT, weight_VD, gate, copies, bias_V=None) -> Tensor:
        """Summed cross-entropies, (K,), among the classes with these rows of the head. The first one is that of a
        mixture with copies, by the probability of the class `gate`, which is no token."""
        fp8 = self.fp8_head and torch.is_grad_enabled()
        x_ND, targets_KN = x_BTD.flatten(0, 1), targets_KBT.flatten(1)
        if copies is not None:
            targets_KN = torch.cat((targets_KN, torch.zeros_like(targets_KN[:1]) + gate))
        losses, saturated = head_losses(
            x_ND, weight_VD, targets_KN, self.cap, self.loss_kernel, fp8, copies is not None, bias_V)
        if fp8:
            self.saturated += saturated
        if copies is None:
            return losses
        mixed_N = copy_losses(losses[0], losses[-1], *(x.flatten() for x in copies))
        mixed_N = mixed_N.where(targets_KN[0] != IGNORE, 0.0)
        return torch.stack([loss_N.sum() for loss_N in (mixed_N, *losses[1:-1])])

class Pointer(nn.Module):
    """Attention that copies what came next before (379; Merity et al. 2016, arXiv 1609.07843). A query sees earlier
    positions of its block and the one before, and a sink: no copy."""
    def __init__(self, width: int, size: int):
        super().__init__()
        self.qk = nn.Parameter(uniform_matrix(2 * size, width))
        self.small = nn.Parameter(torch.stack((torch.ones(size), torch.zeros(size))))  # gain, sink

    def forward(self, x_BTD, inputs_BT, targets_BT, docs_BT) -> tuple[Tensor, Tensor]:
        """The attention on the target, and on the sink, each (B, T), fp32."""
        q_BTK, k_BTK = F.linear(x_BTD, self.qk).chunk(2, dim=-1)
        gain, sink = self.small
        q_BTK, k_BTK = norm(q_BTK) * (gain * len(gain) ** -0.5), norm(k_BTK)
        position, parts = torch.arange(q_BTK.size(1), device=x_BTD.device), []
        for start in range(0, len(position), POINTER_BLOCK):
            end = start + POINTER_BLOCK
            own, seen = slice(start, end), slice(max(0, start - POINTER_BLOCK), end)
            mask = (position[own, None] > position[seen]) & (docs_BT[:, own, None] == docs_BT[:, None, seen])
            scores = (q_BTK[:, own] @ k_BTK[:, seen].mT).masked_fill(~mask, -math.inf)
            shares = torch.cat((scores, q_BTK[:, own] @ sink[:, None]), dim=-1).float().softmax(dim=-1)
            hits = inputs_BT[:, None, seen] == targets_BT[:, own, None]
            parts.append(((shares[..., :-1] * hits).sum(-1), shares[..., -1]))
        copied, nothing = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return copied, nothing

def copy_losses(loss_N, gate_N, copied_N, nothing_N) -> Tensor:
    """-log(p (1 - alpha (1 - nothing)) + alpha copied): alpha = exp(-gate), p = exp(-loss) / (1 - alpha)."""
    model, alpha = (-loss_N).exp(), (-gate_N).exp()
    return -torch.log(model * (1 + alpha * nothing_N / (1 - alpha)) + alpha * copied_N)

class Ngrams(nn.Module):
    """Vectors of hashed pairs and triples of tokens, half of the rows each (62, 92), which each layer adds, weighted.
    A process owns some columns and looks them up for the tokens of all: no size depends on the rows that are wanted."""
    def __init__(self, s: Settings, world: World):
        super().__init__()
        self.world, self.half, self.came = world, s.ngram_rows // 2, []  # (rows, gradients)
        self.table = nn.Parameter(torch.zeros(s.ngram_rows, s.width // world.size, dtype=s.torch_dtype))
        self.weight = nn.Parameter(torch.full((s.num_layers,), 0.05))
        fixed = torch.Generator("cpu").manual_seed(0)
        signs = torch.randint(2, (NGRAM_SIGNS, s.width), generator=fixed, device="cpu")
        own = (2 * signs - 1).to(s.torch_dtype).chunk(world.size, dim=1)[world.rank]
        self.register_buffer("signs", own, persistent=False)

    @torch.no_grad()
    def forward(self, inputs_BT, docs_BT) -> Tensor:
        """The two vectors of each token, summed, (B, T, D): a leaf, whose gradient goes to the columns' owners."""
        world, own = self.world, torch.stack((inputs_BT, docs_BT), dim=1)
        rows, kinds = ngram_rows(*gathered(world, own).unbind(1), self.half)
        pair, triple = self.table[rows] * self.signs[kinds]
        found = exchanged(world, pair + triple).unflatten(0, (world.size, -1))
        found = found.transpose(0, 1).reshape(*inputs_BT.shape, -1)

        def hand_over(leaf: Tensor):
            grads = leaf.grad.unflatten(2, (world.size, -1)).movedim(2, 0).flatten(0, 2)
            grads = exchanged(world, grads) * self.signs[kinds]
            self.came.append((rows.flatten(), grads.flatten(0, 1)))

        found.requires_grad_().register_post_accumulate_grad_hook(hand_over)
        return found

def ngram_rows(inputs_BT, docs_BT, half: int) -> tuple[Tensor, Tensor]:
    """Rows of the pair and of the triple that end at each token, (2, B * T), the last of a half if the document begins
    too late; and which signs they have: what shares a row mostly differs in them."""
    rows, kinds, inputs_BT = [], [], inputs_BT.long()
    hashed = inputs_BT * NGRAM_FACTORS[0]
    for n in (1, 2):
        hashed = hashed ^ F.pad(inputs_BT, (n, 0))[:, :-n] * NGRAM_FACTORS[n]
        inside = F.pad(docs_BT, (n, 0), value=-1)[:, :-n] == docs_BT  # also in a row of one token
        rows.append((hashed % (half - 1)).where(inside, half - 1) + (n - 1) * half)
        kinds.append(((hashed >> 20) % NGRAM_SIGNS).where(inside, 0))
    return torch.stack(rows).flatten(1), torch.stack(kinds).flatten(1)

def gathered(world: World, x: Tensor) -> Tensor:
    """x of all ranks, one after the other along the first axis. Collective."""
    whole = torch.cat([x] * world.size)
    if world.size > 1 and not world.alone:
        dist.all_gather_into_tensor(whole, x.contiguous())
    return whole

def exchanged(world: World, x: Tensor) -> Tensor:
    """What each rank has for this one: its rank-th equal part of x along the first axis. Collective."""
    if world.size == 1 or world.alone:
        return x
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x)
    return received

def candidate_set(targets: Tensor, turn: Tensor, count: int, vocab_size: int, gate: bool) -> tuple:
    """The classes of a sampled softmax (92): the gate, targets, and others by a permutation from `turn` on; the place
    of each class among them, or IGNORE; what is added to logits, as the others stand for all (1412.2007, not in 92)."""
    label = torch.arange(vocab_size + gate, device=targets.device)
    rank = ((label * PERMUTATION - turn) % vocab_size).where(label < vocab_size, -2)
    rank = rank.index_fill(0, targets.flatten().clamp_min(0), -1)
    classes = rank.argsort(stable=True)[:count]
    place = torch.full_like(label, IGNORE).scatter(0, classes, label[:count])
    wanted = (rank < 0).sum()
    more = torch.log((len(label) - wanted).clamp_min(1) / (count - wanted).clamp_min(1))
    return classes, place, more * (rank[classes] >= 0)

def future_targets(targets_BT, docs_BT, count: int) -> Tensor:
    """Targets and those of the `count` tokens after them, (1 + count, B, T); IGNORE past the document."""
    rows = [targets_BT]
    for k in range(1, count + 1):
        same = docs_BT[:, k:] == docs_BT[:, :-k]
        rows.append(F.pad(targets_BT[:, k:].where(same, IGNORE), (0, k), value=IGNORE))
    return torch.stack(rows)

# differs from train_gpt.py: experts and routers
def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Number of parameters by kind; `matmul`: that multiply a token (for FLOPs), `active`: it meets, of n-grams two."""
    kinds = {
        "embed": "embedding", "value_embeds": "embedding", "ngrams": "embedding", "blocks": "hidden",
        "pointer": "hidden", "lm_head": "head", "routers": "router"}
    counts, idle = dict.fromkeys(("hidden", "experts", "router", "embedding", "head", "small"), 0), 0
    for name, p in model.named_parameters():
        size = p.numel()
        if name == "ngrams.table":
            size *= model.ngrams.world.size
            idle = size - 2 * size // len(p)
        kind = kinds.get(name.split(".")[0], "small")
        counts["experts" if ".experts_" in name else kind] += size
    routers = [block.mlp.router for block in model.blocks if isinstance(block.mlp, Mixture)]
    share = routers[0].choices / routers[0].num_experts if routers else 0.0
    total, unchosen = sum(counts.values()), round(counts["experts"] * (1 - share))
    matmul = sum(counts[kind] for kind in ("hidden", "experts", "router", "head")) - unchosen
    return {"total": total, "active": total - idle - unchosen, **counts, "matmul": matmul}

def flops_per_token(s: Settings, counts: dict[str, int], stage: Stage) -> float:
    """FLOPs of forward and backward per token: 6 per matmul parameter, 12 * model_dim per visible key of a layer, less
    if narrow, on average over a causal row, cut at the final window and max_doc_len; and the pointer's."""
    length, keys = min(stage.seq_len, stage.max_doc_len or stage.seq_len), 0.0
    long = math.ceil(stage.window / s.window_step) * s.window_step
    short = min(short_window(long, s.window_step), long)
    for layer in layer_table(s):
        window = min({"L": long, "-": 0}.get(layer.attention, short), length)
        share = 1.0 if layer.attention == "L" or not s.qk_dim else (1 + s.qk_dim / s.head_dim) / 2
        share *= 2 if layer.attention == "P" else 1
        keys += (window - window * (window - 1) / (2 * length)) * share
    left_out = max(0, counts["head"] - stage.candidates * s.width) if stage.candidates else 0
    pointer = 6.0 * s.pointer * min(length, 3 * POINTER_BLOCK) / 2
    return 6.0 * (counts["matmul"] - left_out) + 12.0 * s.width * keys + pointer

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

MICRO_TOKENS = 49152  # of a forward pass: more bring nothing

# differs from train_gpt.py: sorted rows of the mixtures
def activation_bytes(s: Settings, tokens: int, seq_len: int) -> float:
    """What a forward pass keeps for the backward one, fitted: 17 times the width in a layer where compiled, of which 4
    go to queries and keys; in a mixture for the MLP's inputs, outputs and twice the hidden units of each choice, by
    `bmm` padded; scores and a mask in fp32, where there is no FlexAttention; the pointer's scores."""
    size, narrow = s.torch_dtype.itemsize, s.num_layers - sum(map(s.attention.count, "L-"))
    units = 17 * s.num_layers - 4 * narrow * (1 - (s.qk_dim or s.head_dim) / s.head_dim)
    scores = 0 if s.backend in ("flex", "varlen") else 2 * size * s.num_layers * s.num_heads * seq_len
    pointer = 8 * 2 * POINTER_BLOCK * bool(s.pointer)
    choices = s.top_k * (1.4 if s.moe_impl == "bmm" else 1.13)
    hidden = choices * (2 * s.width + 2 * s.hidden) + s.num_shared * s.hidden - s.mlp_ratio * s.width
    kept = units * s.width + len(s.mixtures) * hidden
    return tokens * (kept * (1 if s.compile else 2) * size + scores + pointer)

def expected_memory(s: Settings, vocab_size: int, world_size: int) -> float:
    """Bytes of a process at its peak, the start of a backward pass: weights, optimizer, n-grams, activations."""
    size, peak = s.torch_dtype.itemsize, 0.0
    with torch.random.fork_rng(()), torch.device("meta"):
        model = GPT(replace(s, device="cpu", ngram_rows=0), vocab_size)
    named = dict(model.named_parameters())
    for t in stage_table(s):
        tokens = t.micro_rows(s, world_size) * t.seq_len
        sums = sum(p.numel() for p in named.values()) if 1 < world_size < t.batch_tokens / tokens else 0
        logits = (4 if "loss" in s.kernels else 12) * (t.candidates or vocab_size) * tokens
        more = 4 * sums + 12 * t.batch_tokens / world_size
        peak = max(peak, more + logits + activation_bytes(s, tokens, t.seq_len))
    for name, rule in trained_rules(s, list(named)).items():
        count, shared = named[name].numel(), rule.comm == "sharded"
        fp32 = (2 if rule.kind == "muon" else 3) + (s.tail > 0 and shared)
        gradient = 4 if world_size == 1 else size
        peak += size * count + (4 * fp32 + gradient) * count / (world_size if shared else 1)
    rows = s.ngram_rows / world_size
    came = min(rows, 1.4 * s.ngram_every * max(s.batch_tokens) / world_size)  # some come twice
    return peak + rows * (size * s.width + 8) + 4 * came * s.width

def way_to_fit(s: Settings, fits) -> str:
    """Flags that make `fits` true of the settings: shorter rows, fewer n-grams, or both."""
    for shorter, fewer in ((k * i, k * j) for k in range(5) for i, j in ((1, 0), (0, 1), (1, 1))):
        length = tuple(n >> shorter for n in s.seq_len)
        less = replace(s, micro_tokens=0, seq_len=length, ngram_rows=s.ngram_rows >> fewer)
        if not stage_errors(less, 1) and fits(less):
            return f"--micro_tokens auto --seq_len {','.join(map(str, length))} --ngram_rows {less.ngram_rows}"
    return "a lower --num_layers, --width or --batch_tokens"

# ┌─ Optimizer ──────────────────────────────────────────────────────────────────────────────────┐
# One class for one rank or many. Each gradient is reduced into the shard of its owner as soon as it is complete in the
# last micro-step's backward; moments and fp32 masters exist there only (ZeRO-2); all gather the owner's weights till
# the next forward pass needs them (wait_before_use). Small parameters are all-reduced and updated by every rank.

# differs from train_gpt.py: a rounded router would change its choices
FP32_PARAMETERS = ("scalars", "routers")  # that are not rounded to bf16

class Rule(NamedTuple):
    """One row of the parameter table."""
    pattern: str  # of the parameter names, a full match
    kind: str  # muon or adamw; rows: NgramBank's
    lr: float  # peak learning rate
    betas: tuple[float, float]  # of muon: unused, NorMuon's
    weight_decay: float  # per unit of the peak rate
    comm: str  # sharded: its owner updates it; replicated: every rank does
    role: str  # in width transfer: hidden, input, table (an input), output, fixed
    fans: tuple[int, int] = (1, 1)  # fan_out and fan_in; 1: without the width
    tail: float = 1.0  # time constant of its tail average / tail_steps
    eps: float = 0.0

# differs from train_gpt.py: experts and routers
def parameter_table(s: Settings) -> list[Rule]:
    """How each parameter is trained: factors on adam_lr of records 20 to 28, betas of small parameters of 89. Muon's
    rule sqrt(rows / columns) gives both MLP matrices, (hidden, model), the factor sqrt(mlp_ratio). An expert's factor
    is that of its own matrices, at least 1."""
    width, hidden, adam = s.width, s.mlp_ratio * s.width, s.adam_lr
    kind, lr, mlp = "muon", s.muon_lr, s.muon_lr * s.mlp_ratio**0.5
    matrix = (0.0, s.muon_beta2), s.muon_weight_decay, "sharded", "hidden"
    if s.hidden_optimizer == "adamw":
        kind, lr, mlp = "adamw", s.hidden_lr, s.hidden_lr
        matrix = (0.9, 0.95), s.hidden_weight_decay, "sharded", "hidden"
    table, shared = ("sharded", "table", (width, 1)), s.num_shared * s.hidden
    ratios = [max(1.0, size / width) if kind == "muon" else 1.0 for size in (s.hidden, shared)]
    expert, beside = lr * s.expert_lr * math.sqrt(ratios[0]), lr * math.sqrt(ratios[1])
    fast, decay = (0.8, 0.95), s.adam_weight_decay
    small = (0.9, 0.99), 0.0, "replicated"
    rules = [
        Rule(r"blocks\.\d+\.attn\.qk(vo)?", kind, lr, *matrix, (width, width)),
        Rule(r"blocks\.\d+\.mlp\.up", kind, mlp, *matrix, (hidden, width), 0.5),
        Rule(r"blocks\.\d+\.mlp\.down", kind, mlp, *matrix, (width, hidden), 0.5),
        Rule(r"blocks\.\d+\.mlp\.experts_up", kind, expert, *matrix, (s.hidden, width)),
        Rule(r"blocks\.\d+\.mlp\.experts_down", kind, expert, *matrix, (width, s.hidden)),
        Rule(r"blocks\.\d+\.mlp\.shared\.up", kind, beside, *matrix, (shared, width)),
        Rule(r"blocks\.\d+\.mlp\.shared\.down", kind, beside, *matrix, (width, shared)),
        Rule(r"routers", "adamw", s.router_lr, *small, "output", (1, width)),
        Rule(r"lm_head", "adamw", adam, fast, decay, "sharded", "output", (1, width)),
        Rule(r"(embed|value_embeds\.\d+)\.weight", "adamw", 75 * adam, fast, decay, *table),
        Rule(r"ngrams\.table", "rows", 70 * adam, (0.0, 0.95), 5 * decay, *table),
        Rule(r"pointer\.qk", "adamw", adam, (0.9, 0.99), 0.0, "sharded", "hidden", (1, width)),
        Rule(r"gates", "adamw", adam, *small, "input", (s.num_heads, 1)),
        Rule(r"smear|pointer\.small", "adamw", adam, *small, "fixed"),
        Rule(r"scalars|ngrams\.weight", "adamw", 5 * adam, *small, "fixed"),
    ]
    return [rule._replace(eps=s.adam_eps) for rule in rules]

def match_rules(table: list[Rule], names: list[str]) -> dict[str, Rule]:
    """Parameter name -> its row of the table. Every parameter must match exactly one."""
    matches = {name: [rule for rule in table if re.fullmatch(rule.pattern, name)] for name in names}
    wrong = {name: rules for name, rules in matches.items() if len(rules) != 1}
    assert not wrong, f"parameter_table must cover each parameter exactly once, but: {wrong}"
    return {name: rules[0] for name, rules in matches.items()}

def trained_rules(s: Settings, names: list[str]) -> dict[str, Rule]:
    """By parameter name, its row of the table at the base width, with what --mup changes (transferred)."""
    base, wide = (match_rules(parameter_table(settings), names) for settings in (s.base, s))
    return {name: transferred(wide[name], base[name], s.mup_embedding) for name in names}

def transferred(rule: Rule, base: Rule, embedding: str) -> Rule:
    """The rule of the base width, serving at another one: muP (Tensor Programs V, TP-V: arXiv 2203.03466), as a
    condition on spectral norms, which covers Muon (2310.17813): its update has norm 1, and with sqrt(fan_out / fan_in)
    the effect of any width. An output's product is divided by the growth of fan_in (GPT.cap), all else stays (TP-V, 8).
    AdamW's updates add up over the fan-in; a table's rate is constant; disputed: / sqrt(growth) (2506.15025). Rate *
    decay stays (2510.19093; disputed in 2512.05620). Epsilon goes with the gradients, or the divisor (TP-V, B.3)."""
    out, into = (now / then for now, then in zip(rule.fans, base.fans, strict=True))
    if rule.role == "output":
        return base._replace(eps=base.eps / into)
    factor = (out / into) ** 0.5 if rule.kind == "muon" else 1 / into
    if rule.role == "table" and embedding == "sqrt":
        factor = out**-0.5
    return base._replace(lr=base.lr * factor, weight_decay=base.weight_decay / factor, eps=base.eps / out)

# Minimax-optimal quintic steps of Polar Express (arXiv 2505.16932; 5 steps, safety 2e-2, cushion 2).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323))
NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5  # Muon's quintic (Jordan et al. 2024)

def orthogonalize(matrices, method: str, dtype, kernel=False) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of (K, rows, cols): singular values go to about 1."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    slack, steps = (1.02, POLAR_EXPRESS) if method == "polar_express" else (1.0, NEWTON_SCHULZ)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * slack + 1e-7)).to(dtype)
    for a, b, c in steps:
        x = quintic(x, a, b, c, kernel)
    return x.mT if tall else x

def normalize_variance(update, variance, new_share) -> Tensor:
    """NorMuon (arXiv 2510.05491): divides each row (of a wide matrix: column) of the update by the running RMS of its
    entries, then restores the matrix's norm, so needs no bias correction. variance, (K, rows, 1) or (K, 1, cols)."""
    before = update.norm(dim=(-2, -1), keepdim=True)
    along = -1 if variance.size(-1) == 1 else -2
    variance.lerp_(update.square().mean(dim=along, keepdim=True), new_share)
    update = update * variance.clamp_min(1e-10).rsqrt()
    return update * (before / update.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))

def muon_update(
        master, grad, momentum, variance, lr, weight_decay, mu, new_share,
        method: str, dtype, cautious: bool, kernel=False):
    """One Muon step on (K, rows, cols) matrices, in place (Jordan et al. 2024, kellerjordan.github.io/posts/muon)."""
    grad = grad.float()
    momentum.lerp_(grad, 1 - mu)
    update = orthogonalize(torch.lerp(grad, momentum, mu), method, dtype, kernel).float()
    if variance is not None:
        update = normalize_variance(update, variance, new_share)
    apply_update(master, update, lr, weight_decay, cautious)

def adamw_update(
        master, grad, exp_avg, exp_avg_sq, lr, weight_decay, new_share1, new_share2,
        correction1, correction2, eps: float, cautious: bool):
    """One AdamW step on a flat shard, in place (arXiv 1711.05101); share: 1 - beta; correction: 1 - beta^step."""
    grad = grad.float()
    exp_avg.lerp_(grad, new_share1)
    exp_avg_sq.lerp_(grad.square(), new_share2)
    update = exp_avg / correction1 / ((exp_avg_sq / correction2).sqrt() + eps)
    apply_update(master, update, lr, weight_decay, cautious)

def apply_update(master, update, lr, weight_decay, cautious: bool):
    """master -= lr * (update + decay * master); `cautious`: decay only where both agree in sign (arXiv 2510.12402)."""
    decay = weight_decay * master
    master.sub_(lr * (update + (decay * (update * master >= 0) if cautious else decay)))

# differs from train_gpt.py: experts without a token are left alone
class Bank:
    """Parameters that one call updates, cut into pieces of one shape.

        pieces       p0  p1  p2 | p3  p4  p5 | p6  ..   a matrix each for Muon; AdamW: 1/ranks, flat
        collectives  one for about a parameter: by it gradients are reduced, weights gathered
        mine         in each the `share` pieces that this rank updates: its rank-th
        state        of those, fp32: master (the weights) and moments, each (number, *piece)
        weights      memory of all parameters; those of other owners come until `receive_weights`"""
    # differs from train_gpt.py: experts
    def __init__(self, named: list[tuple], rules: dict[str, Rule], s: Settings, world: World):
        self.params, self.s, self.world = dict(named), s, world
        name, first = named[0]
        self.rule, self.muon = rules[name], rules[name].kind == "muon"
        self.owners = n = world.size if self.rule.comm == "sharded" else 1
        self.shape = tuple(first.shape[-2:]) if self.muon else (-(-first.numel() // n),)
        self.pieces = [(name, i) for name, p in named for i in range(len(self.cut(p)))]
        self.share = max(1, min(len(self.cut(p)) for _, p in named) // n)
        size = self.share * n
        self.collectives = [self.pieces[k:k + size] for k in range(0, len(self.pieces), size)]
        self.names = [dict(pieces).keys() for pieces in self.collectives]
        self.mine = [i for i in range(len(self.collectives) * size)
                     if i // self.share % n == world.rank % n]
        lrs = [rules[name].lr for name, _ in self.pieces] + [0.0] * size
        rates = torch.tensor([lrs[i] for i in self.mine], device=s.device)
        self.lr = rates.view(-1, *(1 for _ in self.shape))
        self.update_function = compiled(muon_update if self.muon else adamw_update, s)
        self.state = {"master": self.my_pieces({name: p.detach() for name, p in named})}
        self.experts = self.my_experts()
        dtype = torch.float32 if name in FP32_PARAMETERS else s.torch_dtype
        self.weights = torch.zeros(len(self.mine) * n, *self.shape, dtype=dtype, device=s.device)
        for name, view in self.join(self.weights).items():
            self.params[name].data = view.copy_(self.params[name].data)
        # one rank keeps fp32 sums of micro-steps as they are; several reduce in the parameters' dtype
        dtype = first.dtype if world.size > 1 else torch.float32
        self.grad = torch.zeros_like(self.state["master"], dtype=dtype)
        self.places = self.join(self.grad) if world.size == 1 else {}  # of sums of micro-steps
        self.gathers = {}  # (work, what must live until it is done)
        self.scalars = [torch.zeros((), device=s.device) for _ in range(5)]
        self.reset()

    def reset(self):
        """Zero moments, as before the first step, also where one was broken off."""
        self.expect()
        master, keys = self.state["master"], ["momentum"] if self.muon else ["exp_avg", "exp_avg_sq"]
        keys += ["average"] if self.s.tail and self.rule.comm == "sharded" else []
        self.state |= {key: torch.zeros_like(master) for key in keys}
        if self.muon and self.s.muon_beta2:
            rows, cols = self.shape
            self.state["variance"] = torch.zeros_like(master[..., :1] if rows >= cols else master[:, :1])

    def cut(self, tensor: Tensor, shape=None) -> Tensor:
        """A whole tensor as pieces, (number, *piece), padded with zeros where it does not divide."""
        shape = shape or self.shape
        short = -tensor.numel() % math.prod(shape)
        return (F.pad(tensor.flatten(), (0, short)) if short else tensor.flatten()).view(-1, *shape)

    def expect(self):
        """Before a backward pass: all collectives wait for gradients."""
        self.waiting, self.arrived = list(range(len(self.collectives))), {}
        self.in_flight = []  # (work, what must live until it is done)

    def receive(self, name: str, grad: Tensor):
        """A parameter's gradient is complete: starts collectives that now have all, frees what none needs."""
        self.arrived[name] = self.cut(grad)
        for k in [k for k in self.waiting if self.names[k] <= self.arrived.keys()]:
            self.reduce(k)
            self.waiting.remove(k)
        needed = {name for k in self.waiting for name in self.names[k]}
        self.arrived = {name: pieces for name, pieces in self.arrived.items() if name in needed}

    def reduce(self, k: int):
        """Sums the gradients of collective k into the owners' shards, asynchronously."""
        pieces, own = self.collectives[k], self.grad.split(self.share)[k]
        whole = [self.arrived[name] for name in self.names[k]]
        whole = torch.cat(whole) if len(whole) > 1 else whole[0]
        packed = self.padded(whole[pieces[0][1]:][:len(pieces)])
        if self.owners > 1:
            packed = packed.to(own.dtype)
            self.in_flight.append((dist.reduce_scatter_tensor(own, packed, async_op=True), packed))
            return
        own.copy_(packed)
        if self.world.size > 1:
            self.in_flight.append((dist.all_reduce(own, async_op=True), None))

    def my_experts(self) -> Tensor | None:
        """The number of the expert, counted through all layers, that each own piece (AdamW: each entry of it) belongs
        to; what belongs to none has the number past the last one. None: no experts."""
        layers, count, numbers = self.s.mixtures, self.s.num_experts, {}
        if not any(".experts_" in name for name in self.params):
            return None
        for name, p in self.params.items():
            number = torch.tensor(len(layers) * count)
            if ".experts_" in name:
                first = layers.index(int(name.split(".")[1])) * count
                number = torch.arange(first, first + count)[:, None, None]
            numbers[name] = number.expand(p.shape)
        mine = self.my_pieces(numbers).int()
        return mine[:, :1, :1].contiguous() if self.muon else mine

    # differs from train_gpt.py: experts without a token are left alone
    def step(self, scale: float, mu: float, step: int, span: tuple = (0, 0), busy: Tensor | None = None):
        """Waits for the own gradients, updates the own pieces and sends them off, asynchronously. `busy`: which experts
        saw a token, and True. Updates have full size however small the gradient, and without one would repeat old ones;
        so idle experts keep weights and moments."""
        for work, _ in self.in_flight:
            work.wait()
        self.expect()
        s, state, (beta1, beta2) = self.s, self.state, self.rule.betas
        decay = self.rule.weight_decay * scale  # and by the rate again: it falls as lr^2
        if self.muon:
            moments = state["momentum"], state.get("variance")
            numbers = decay, mu, 1 - beta2
            options = s.orthogonalizer, s.torch_dtype, s.cautious, "gram" in s.kernels
        else:
            moments = state["exp_avg"], state["exp_avg_sq"]
            numbers = decay, 1 - beta1, 1 - beta2, 1 - beta1**step, 1 - beta2**step
            options = self.rule.eps, s.cautious
        lr = self.lr * scale
        scalars = self.scalars[:len(numbers)]  # the same ones: nothing is compiled anew
        for tensor, value in zip(scalars, numbers, strict=True):
            tensor.fill_(value)
        if self.experts is not None:
            on, (decay, first, second, *more) = busy[self.experts], scalars
            self.grad.masked_fill_(~on, 0.0)  # whatever a product leaves for an expert without rows
            first = torch.where(on, first, 1.0) if self.muon else first * on
            lr, scalars = lr * on, (decay, first, second * on, *more)
        self.update_function(state["master"], self.grad, *moments, lr, *scalars, *options)
        if share := self.tail_share(*span):
            state["average"].lerp_(state["master"], share)
        self.send_weights()

    def tail_share(self, before: float, after: float) -> float:
        """Share in their tail average of the weights after a step from `before` to `after`; at its start all of it."""
        steps = max(1.0, self.rule.tail * self.s.tail_steps)
        start = max(1, self.s.iterations - round(2 * steps))
        if after < start or "average" not in self.state:
            return 0.0
        return 1.0 if before < start else min(1.0, (after - before) / steps)

    def blend(self):
        """The weights that count: drawn to their tail average, each matrix or, of AdamW, tensor with its norm (92)."""
        raw = self.state["raw"] = self.state["master"]
        blended = raw.lerp(self.state["average"], self.s.tail)
        squares = torch.stack([x.square().sum(dim=(-2, -1), keepdim=True) for x in (raw, blended)])
        if self.owners > 1 and not self.muon:  # the pieces of all are one tensor
            dist.all_reduce(squares)
        before, after = squares.clamp_min(1e-24).sqrt()
        self.use(blended * (before / after))

    def use(self, master: Tensor):
        """Gives the weights of all owners to the model. Collective."""
        self.state["master"] = master
        self.send_weights()
        self.receive_weights()

    def send_weights(self):
        """Starts to gather the new weights of all owners, those of early layers first."""
        self.receive_weights()
        if self.owners == 1:
            self.weights.copy_(self.state["master"])
            return
        for k in reversed(range(len(self.collectives))):
            whole = self.weights.split(self.owners * self.share)[k]
            own = self.state["master"].split(self.share)[k].to(whole.dtype, copy=True)  # it may change
            self.gathers[k] = dist.all_gather_into_tensor(whole, own, async_op=True), own

    def receive_weights(self, name=None, *_):
        """Waits for the gathered weights of a parameter, or of all."""
        for k in [k for k in self.gathers if name in (None, *self.names[k])]:
            self.gathers.pop(k)[0].wait()

    def join(self, pieces: Tensor) -> dict[str, Tensor]:
        """Pieces of all owners in order -> parameter name: whole tensor (views where possible)."""
        counts = [-(-p.numel() // math.prod(self.shape)) for p in self.params.values()]
        parts = dict(zip(self.params, pieces[:sum(counts)].split(counts), strict=True))
        if pieces.shape[1:] != self.shape:  # NorMuon's variance: a number per row or column
            return parts
        return {name: parts[name].flatten()[:p.numel()].view_as(p) for name, p in self.params.items()}

    def full(self, key: str) -> dict[str, Tensor]:
        """State `key` of all parameters by name, whole, on the CPU of rank 0; {} elsewhere. Collective."""
        pieces = self.state[key]
        if self.owners > 1:
            pieces = gathered(self.world, pieces).unflatten(0, (self.owners, -1, self.share))
            pieces = pieces.transpose(0, 1).flatten(0, 2)
        if self.world.rank:
            return {}
        return {name: t.to("cpu", copy=True) for name, t in self.join(pieces).items()}

    def padded(self, pieces: Tensor) -> Tensor:
        """The pieces, and zeros where owners outnumber the last ones."""
        missing = -len(pieces) % (self.owners * self.share)
        return F.pad(pieces, [0, 0] * (pieces.dim() - 1) + [0, missing]) if missing else pieces

    def my_pieces(self, whole: dict[str, Tensor], shape=None) -> Tensor:
        """The own pieces of whole tensors by name, fp32 on the device."""
        pieces = self.padded(torch.cat([self.cut(whole[name], shape) for name in self.params]))
        return pieces[self.mine].to(self.s.device, torch.float32).contiguous()

    def load(self, saved: dict[str, dict[str, Tensor]]):
        """State as `full` gave it to rank 0, one tensor at a time to all ranks. Collective."""
        for key, old in self.state.items():
            whole = {n: on_rank_zero(self.world, lambda k=key, n=n: saved[k][n].clone()) for n in self.params}
            self.state[key] = self.my_pieces(whole, tuple(old.shape[1:]))
        self.use(self.state["master"])

class NgramBank:
    """The own columns of the n-gram table. No momentum, one second moment a row; only those that came are touched (92),
    of `ngram_every` steps at once, in an event, as often as they came: so sizes are known, and the host never waits."""
    def __init__(self, ngrams: Ngrams, rule: Rule, s: Settings, world: World):
        self.s, self.rule, self.world, self.came = s, rule, world, ngrams.came
        self.table = ngrams.table.data
        self.reset()

    def reset(self):
        """As before the first step, with the rows at hand. event: number of a row's last one."""
        self.square, self.event = torch.zeros(2, len(self.table), device=self.s.device)
        self.came.clear()
        self.whole = 0  # of those that came: of whole steps

    @property
    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds; within a cycle also what came, with gradients."""
        state = {"master": self.table, "square": self.square, "event": self.event}
        if self.whole:
            state["rows"], state["grads"] = map(torch.cat, zip(*self.came[:self.whole], strict=True))
        return state

    def step(self, scale: float, step: int):
        """The event of a cycle's end: v <- beta2 v for those that a row missed, and + (1 - beta2) mean(g^2)."""
        self.whole = len(self.came)
        if step % self.s.ngram_every:
            return
        beta2, event, new = self.rule.betas[1], step // self.s.ngram_every, []
        lr, decay = self.rule.lr * scale, self.rule.weight_decay * scale
        rows, grads = map(torch.cat, zip(*self.came, strict=True))  # one sum: so a resumed run has the same
        place = torch.arange(len(rows), device=rows.device)
        first = place.new_full((len(self.table),), len(rows)).scatter_reduce_(0, rows, place, "amin")[rows]
        sums = torch.zeros(len(rows), self.table.size(1), device=rows.device)  # where a row came first
        if sums.is_cuda:  # where index_add_ is atomic
            sums.index_put_((first,), grads.float(), accumulate=True)
        else:
            sums.index_add_(0, first, grads.float())
        for part, places in zip(*(x.split(2**26 // sums.size(1)) for x in (rows, first)), strict=True):
            grads, vectors = sums[places], self.table[part].float()
            mean = sum(gathered(self.world, grads.square().mean(dim=1)[None]))  # all_reduce's order varies
            square = self.square[part] * beta2**(event - 1 - self.event[part])
            square.lerp_(mean / self.world.size, 1 - beta2)
            root = (square / (1 - beta2**event)).sqrt() + self.rule.eps
            apply_update(vectors, grads / root[:, None], lr, decay, self.s.cautious)
            new.append((vectors.type_as(self.table), square))
        self.table[rows], self.square[rows] = map(torch.cat, zip(*new, strict=True))
        self.event[rows] = float(event)
        self.came.clear()
        self.whole = 0

    def full(self, key: str) -> dict[str, Tensor]:
        """State `key` of all columns, on the CPU of rank 0; {} elsewhere. Collective."""
        own, parts = self.state[key].cpu(), []
        own = own.float() if key == "master" else own
        for owner in range(self.world.size if own.dim() > 1 else 1):
            part = [own]
            if self.world.size > 1:
                dist.broadcast_object_list(part, src=owner)
            parts += part * (self.world.rank == 0)
        return {"ngrams.table": torch.cat(parts, dim=own.dim() - 1)} if parts else {}

    def load(self, saved: dict[str, dict[str, Tensor]]):
        """State as `full` gave it to rank 0, a share at a time to all ranks. Collective."""
        def share(key: str, owner: int) -> Tensor:
            whole, size = saved[key]["ngrams.table"], self.table.size(1)
            return whole.narrow_copy(1, owner * size, size) if whole.dim() > 1 else whole

        self.reset()
        own = {}
        for key in on_rank_zero(self.world, lambda: [k for k in saved if "ngrams.table" in saved[k]]):
            for owner in range(self.world.size):
                part = on_rank_zero(self.world, share, key, owner)
                own |= {key: part.to(self.s.device)} if owner == self.world.rank else {}
        self.came += [(own.pop("rows"), own.pop("grads"))] if "rows" in own else []
        for key, part in own.items():
            self.state[key].copy_(part)
        self.whole = len(self.came)

def penalty(name: str, weight: float, sums_MS, num_experts: int) -> tuple:
    """What makes routers balance, by sums per token: its value in each layer, 1 where all experts are equal, but for z;
    by which of the sums it has a slope; and weight * that slope. importance, load: 1 + CV^2 (Shazeer et al. 2017,
    arXiv 1701.06538); switch: E * sum_i f_i P_i (Fedus et al. 2021, arXiv 2101.03961), f_i the share of all choices,
    without gradient; sequence: the mean of that over rows (DeepSeek-V3, arXiv 2412.19437); z: mean squared log-sum-exp
    (Zoph et al. 2022, arXiv 2202.08906)."""
    sums = named_sums(sums_MS, num_experts)
    if name in ("z", "sequence"):  # means over tokens, and rows
        return sums[name].squeeze(-1), name, torch.full_like(sums[name], weight)
    total = sums["chosen" if name == "switch" else name].sum(-1, keepdim=True)
    if name == "switch":
        value = num_experts * (sums["chosen"] / total * sums["score"]).sum(-1)
        return value, "score", weight * num_experts * sums["chosen"] / total
    share = sums[name] / total
    square = share.square().sum(-1, keepdim=True)
    slope = weight * 2 * num_experts / total * (share - square)
    return num_experts * square.squeeze(-1), name, slope

def balance_update(sums_MS, bias_ME, bias_step, weights: dict[str, float], num_experts: int) -> tuple:
    """Slopes of the weighted penalties at a step's sums per token, (M, S), and the new selection bias (Wang et al.
    2024, arXiv 2408.15664): a fixed step against each expert's over- or underload, then centred."""
    slopes = torch.zeros_like(sums_MS)
    for name, weight in weights.items():
        _, by, slope = penalty(name, weight, sums_MS, num_experts)
        named_sums(slopes, num_experts)[by].add_(slope)
    chosen = named_sums(sums_MS, num_experts)["chosen"]
    bias = bias_ME + bias_step * torch.sign(chosen.mean(-1, keepdim=True) - chosen)
    return slopes, bias - bias.mean(-1, keepdim=True)

class Balance:
    """What keeps routers from sending all tokens to few experts, by the sums over all tokens of a step.

    Penalties that are no means over tokens, such as CV^2, would depend on how a batch is split into micro-steps and
    ranks; so what is added to the loss is their linearization at the sums of the step before: sum(slopes * sums). It
    has the penalties' gradient for the whole batch, one step late, and needs one small all-reduce a step."""
    def __init__(self, model: nn.Module, s: Settings, world: World):
        self.s, self.world, self.bias = s, world, model.router_bias
        self.size = len(self.bias), 4 * s.num_experts + DROP_PARTS + 5  # of the sums, (M, S)
        self.update_function = compiled(balance_update, s)
        self.generator = torch.Generator(s.device)
        self.reset()

    def reset(self):
        """As before the first step: slopes of evenly loaded experts, which turn no router."""
        self.sums = torch.zeros(self.size, device=self.s.device)  # of this step, per token
        self.in_flight, self.report_steps = None, 0
        self.report_sums = torch.zeros_like(self.sums)
        self.bias.zero_()
        self.slopes, _ = self.updated(torch.full_like(self.sums, 1 / self.s.num_experts), 0.0)

    def updated(self, sums_MS, bias_step: float) -> tuple:
        """Slopes and bias after a step with these sums."""
        bias_step = torch.full((), bias_step, device=self.s.device)
        return self.update_function(
            sums_MS, self.bias, bias_step, self.s.penalties, self.s.num_experts)

    def noise(self, step: int, micro_step: int, rows: int, seq_len: int) -> Tensor | None:
        """Standard normal noise for noisy_topk, (B, M, T, E) fp32: each row's from a generator with its own seed, made
        of the run's, the step and the row's number in the batch. So it does not depend on the number of ranks or
        micro-steps, and a resumed run draws what it would have drawn."""
        if self.s.router != "noisy_topk":
            return None
        shape = rows, self.size[0], seq_len, self.s.num_experts
        noise = torch.empty(shape, device=self.s.device)
        first = (micro_step * self.world.size + self.world.rank) * rows
        for row, out in enumerate(noise, start=first):
            key = hashlib.sha256(f"{self.s.seed} {step} {row}".encode()).digest()
            self.generator.manual_seed(int.from_bytes(key[:7], "little"))
            torch.randn(out.shape, generator=self.generator, device=out.device, out=out)
        return noise

    def add(self, sums: Tensor, weight: float, last: bool) -> Tensor:
        """What a micro-step's sums add to its share of the loss. weight: 1 / tokens of the batch. The last one's start
        on their way to the other ranks, before the gradients do."""
        sums_MS = sums.view(self.size) * weight
        self.sums += sums_MS.detach()
        if last and self.world.size > 1:
            self.in_flight = dist.all_reduce(self.sums, async_op=True)
        return (self.slopes * sums_MS).sum()

    def busy(self) -> Tensor:
        """Waits for the sums of all ranks. Which experts saw a token, and True: (M * E + 1,) bool."""
        if self.in_flight:
            self.in_flight.wait()
        chosen = named_sums(self.sums, self.s.num_experts)["chosen"]
        return F.pad(chosen.flatten() > 0, (0, 1), value=True)

    def update(self, step: float):
        """Sets slopes and bias for the next step by the sums of this one, which takes the schedule to `step`."""
        s, rate = self.s, 0.0
        if s.router == "sigmoid_bias":
            left = (s.iterations - step) / max(1.0, s.bias_cooldown * s.iterations)
            rate = s.bias_rate * min(1.0, left)
        self.slopes, bias = self.updated(self.sums, rate)
        self.bias.copy_(bias)
        self.report_sums += self.sums
        self.report_steps += 1
        self.sums.zero_()

    def report(self) -> dict[str, list]:
        """Numbers of the steps since the last report; waits for the device."""
        sums, self.report_steps = self.report_sums / max(1, self.report_steps), 0
        self.report_sums = torch.zeros_like(self.sums)
        return router_report(sums.cpu(), self.bias.cpu(), self.s)

    def state_dict(self) -> dict:
        tensors = {"bias": self.bias, "slopes": self.slopes, "report_sums": self.report_sums}
        saved = {name: t.to("cpu", copy=True) for name, t in tensors.items()}
        return saved | {"report_steps": self.report_steps}

    def load_state_dict(self, saved: dict):
        self.bias.copy_(saved["bias"])
        self.slopes = saved["slopes"].to(self.s.device)
        self.report_sums = saved["report_sums"].to(self.s.device)
        self.report_steps = saved["report_steps"]

# differs from train_gpt.py: balance of the experts
class MuonAdamW:
    """The optimizer of a model: hooks that reduce gradients in backward, the step, hooks that await weights."""
    # differs from train_gpt.py: balance of the experts
    def __init__(self, model: nn.Module, s: Settings, world: World):
        named = list(reversed(list(model.named_parameters())))  # about the order of backward
        rules = trained_rules(s, [name for name, _ in named])
        groups = {}  # Muon: matrices of one shape and decay; AdamW: each alone
        for name, p in named:
            alike = (*p.shape[-2:], rules[name].weight_decay) if rules[name].kind == "muon" else name
            groups.setdefault(alike, []).append((name, p))
        self.world, self.sums = world, {}  # of gradients of earlier micro-steps, fp32
        self.steps, self.span, self.last_micro_step = 0, (0, 0), True
        table = groups.pop("ngrams.table", None)
        self.tables = [NgramBank(model.ngrams, rules["ngrams.table"], s, world)] if table else []
        banks = [Bank(group, rules, s, world) for group in groups.values()]
        # updated first: Muon's, while the tables, last in backward, are reduced; then those that are used first
        self.banks = sorted(reversed(banks), key=lambda bank: (not bank.muon, "lm_head" in bank.params))
        self.balance = Balance(model, s, world) if s.mixtures else None
        for bank in self.banks:
            for name, p in bank.params.items():
                p.register_post_accumulate_grad_hook(functools.partial(self._on_gradient, name, bank))
                if bank.owners > 1:
                    wait_before_use(model, name, functools.partial(bank.receive_weights, name), s)

    def _on_gradient(self, name: str, bank: Bank, p: nn.Parameter):
        """Runs inside backward when a parameter's gradient is complete. Micro-steps are summed in fp32."""
        grad, p.grad = p.grad, None
        if name in self.sums:
            grad = self.sums.pop(name).add_(grad)
        if self.last_micro_step:
            bank.receive(name, grad)
        else:  # one process sums where the last one's are wanted
            self.sums[name] = bank.places[name].copy_(grad) if bank.places else grad.float()

    # differs from train_gpt.py: balance of the experts
    def step(self, scale: float, momentum: float, others: float | None = None, span: tuple | None = None):
        """Updates all parameters. `scale`: factor on rates, `others`: of all but the hidden matrices; `span`: from
        where to where this takes the schedule. Raises RuntimeError that names parameters whose gradient never came."""
        missing = {name for bank in self.banks for k in bank.waiting
                   for name in bank.names[k] - bank.arrived.keys()}
        if missing:
            raise RuntimeError(f"no gradient for {', '.join(sorted(missing))}: all must be in the loss")
        self.steps += 1
        self.span = span or (self.steps - 1, self.steps)
        busy = self.balance.busy() if self.balance else None
        others = scale if others is None else others
        for bank in self.banks:
            bank.step(scale if bank.rule.role == "hidden" else others, momentum, self.steps, self.span, busy)
        for table in self.tables:
            table.step(others, self.steps)
        if self.balance:
            self.balance.update(self.span[1])

    @contextlib.contextmanager
    def blended(self):
        """Meanwhile the model has the weights that would count now: blended with their tail average, if any."""
        banks = [bank for bank in self.banks if bank.tail_share(*self.span)]
        try:
            for bank in banks:
                bank.blend()
            yield
        finally:
            for bank in banks:
                bank.use(bank.state.pop("raw", bank.state["master"]))

    # differs from train_gpt.py: balance of the experts
    def reset(self):
        """As before the first step, with the weights at hand."""
        self.steps, self.span, self.last_micro_step = 0, (0, 0), True
        self.sums.clear()
        for part in filter(None, [*self.banks, *self.tables, self.balance]):
            part.reset()

    # differs from train_gpt.py: balance of the experts
    def state_dict(self) -> dict:
        """{"steps": n, "state": {key: {parameter name: whole tensor, on rank 0 only}}, "balance": Balance's}; `master`
        are the weights that count, blended in the tail, where `raw` are those of training. Collective."""
        state = {}
        with self.blended():
            for bank in [*self.banks, *self.tables]:
                for key in bank.state:
                    state.setdefault(key, {}).update(bank.full(key))
        balance = self.balance.state_dict() if self.balance else None
        return {"steps": self.steps, "state": state, "balance": balance}

    # differs from train_gpt.py: balance of the experts
    def load_state_dict(self, saved: dict):
        """Restores what state_dict gave (`saved` counts on rank 0) and the model's weights. Collective."""
        self.steps = on_rank_zero(self.world, lambda: saved["steps"])
        self.span = 0, self.steps
        state = saved.get("state", {})
        state = state | {"master": state.get("master", {}) | state.get("raw", {})}
        for bank in [*self.banks, *self.tables]:
            bank.load(state)
        if self.balance:
            self.balance.load_state_dict(on_rank_zero(self.world, lambda: saved["balance"]))

def wait_before_use(model: nn.Module, name: str, wait, s: Settings):
    """Has the forward pass wait for a parameter: at its start, or, compiled by block, before the part that it is in."""
    parts = r"(blocks|value_embeds)\.\d+|pointer|lm_head|" if s.compile_unit == "block" else ""
    part = re.match(parts, name)[0]
    if part == "lm_head":
        model.blocks[-1].register_forward_hook(wait)
    else:
        model.get_submodule(part).register_forward_pre_hook(wait)

def compiled(function, s: Settings):
    """torch.compile with static shapes and whole graphs, or the function itself."""
    if not s.compile:
        return function
    torch._dynamo.config.recompile_limit = 256  # of a function: all blocks and banks share one
    return torch.compile(function, dynamic=False, fullgraph=True)

def compile_model(model: GPT, s: Settings):
    """One graph; or one per block: then gradients are reduced while earlier blocks are still in backward."""
    if s.compile_unit == "model":
        model.calculate = compiled(model.calculate, s)
        return
    model.masks = torch.no_grad()(compiled(model.masks, s))  # one graph, for evaluation, too
    parts = [(model, "embedding"), (model, "losses")]
    parts += [(part, "forward") for part in filter(None, [*model.blocks, model.pointer])]
    for module, name in parts:
        setattr(module, name, compiled(getattr(module, name), s))

def compiled_graphs() -> int:
    """Number of graphs that torch.compile has made in this process."""
    made = sys.modules.get("torch._dynamo.utils")
    return made.counters["stats"]["unique_graphs"] if made else 0

# ┌─ Schedule ───────────────────────────────────────────────────────────────────────────────────┐
# step: where a run is in a schedule of s.iterations steps; under --max-seconds a fraction (Run.following).
def lr_scale(s: Settings, stages: list[Stage], step: float, cooldown: float = 0.0) -> float:
    """Factor on rates: warm-up, cool-down to lr_floor (wsd: arXiv 2405.18392) before the extension; the stage's."""
    end = (1 - s.extension) * s.iterations
    left = min(1.0, max(0, end - step) / max(1, (cooldown or s.cooldown) * end))
    left = 1 - math.sqrt(1 - left) if s.schedule == "wsd" else left
    warm = min(1.0, (step + 1) / max(1, s.warmup_steps))
    return stage_at(stages, step).lr * warm * (s.lr_floor + (1 - s.lr_floor) * left)

def momentum_at(s: Settings, step: float) -> float:
    """Muon's momentum: up over momentum_warmup steps, down again over the last momentum_cooldown."""
    rise = step / max(1, s.momentum_warmup)
    fall = (s.iterations - step) / max(1, s.momentum_cooldown)
    return s.momentum_start + (s.muon_momentum - s.momentum_start) * min(1.0, rise, fall)

def future_weights(stages: list[Stage], step: float) -> list[float]:
    """Weights of the losses of next and further tokens (arXiv 2404.19737, 53): 1, 1/2 ..; the last fades in a stage."""
    stage = stage_at(stages, step)
    fade = 1 - (step - stage.start) / max(1, stage.end - stage.start)
    return [0.5**k * (fade if k == stage.mtp > 0 else 1.0) for k in range(stage.mtp + 1)]

def candidate_turn(s: Settings, stage: Stage, world: World, step: int, micro_step: int) -> int:
    """The number of the first row of a micro-step, of all rows of the run however many processes share them."""
    rows, own = stage.batch_tokens // stage.seq_len, stage.micro_rows(s, world.size)
    return step * rows + (micro_step * world.size + world.rank) * own

def noise_at(s: Settings, step: float) -> float:
    """Factor on the noise of noisy_topk: it explores first, and costs loss for as long as it is there."""
    return max(0.0, 1 - step / (s.noise_end * s.iterations)) if s.noise_end else 1.0

def window_at(s: Settings, stages: list[Stage], step: float) -> int:
    """Long attention window of a step in tokens: linear within its stage, rounded up (13)."""
    stage = stage_at(stages, step)
    progress = min(1.0, (step - stage.start) / max(1, stage.end - stage.start))
    window = stage.window_start + (stage.window - stage.window_start) * progress
    return math.ceil(window / s.window_step) * s.window_step

# ┌─ Rows ───────────────────────────────────────────────────────────────────────────────────────┐
# Rows are packed from pieces: documents cut to max_doc_len. They start with the start of a piece; the last one is
# cut at the end of the row and its rest skipped (26: batches that start at a document's start train better).

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

# ┌─ Evaluation ─────────────────────────────────────────────────────────────────────────────────┐
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

def set_rotary(model: nn.Module, s: Settings, *windows: int):
    """Writes the model's rotary tables: YaRN's, where the second window is longer than the first."""
    tables = rotary_table(len(model.cos), s.head_dim, s.rope_base, *windows)
    torch._foreach_copy_((model.cos, model.sin), tables)

@torch.no_grad()
def evaluate(model, stream: ValStream, s: Settings, world: World, window: int, batches=None) -> float:
    """Mean loss of the validation stream (or its first `batches`), nats per token. Collective."""
    rows = max(1, min(s.micro_tokens // stream.seq_len, -(-stream.num_rows // world.size)))
    long_window = torch.tensor(s.eval_window or window, dtype=torch.int32, device=s.window_device)
    dtype = torch.float32 if s.device == "mps" else torch.float64
    total = torch.zeros((), dtype=dtype, device=s.device)
    set_rotary(model, s, window, s.eval_window)
    for start in range(0, stream.num_rows, rows * world.size)[:batches]:
        batch = torch.from_numpy(stream.rows(start + world.rank * rows, rows))
        check_documents(batch[2].numpy(), s.backend)
        inputs, targets, docs = batch.to(s.device)
        total += model(inputs, targets[None], docs, long_window)[0]
    set_rotary(model, s)
    if world.size > 1:
        dist.all_reduce(total)
    return total.item() / stream.num_tokens

def bits_per_byte(loss: float, meta: dict) -> float | None:
    """Loss in nats per token -> bits per byte, by the val split's tokens per byte; None if not known."""
    split = meta["splits"].get("val") or {}
    known = split.get("bytes") and split.get("tokens")
    return loss / math.log(2) * split["tokens"] / split["bytes"] if known else None

# ┌─ Reports of the routers ─────────────────────────────────────────────────────────────────────┐
def router_report(sums_MS, bias_ME, s: Settings) -> dict[str, list]:
    """Numbers of each mixture layer, from sums per token over some steps: each expert's share of the choices (load),
    e^its entropy, largest / mean, standard deviation / mean (cv); dropped share of choices, in all and in each 1/8 of a
    row; entropy of the router's scores in nats, gap between last choice and next, rms of logits; range of the bias;
    penalties; experts below 1/20 of the mean."""
    sums, even = named_sums(sums_MS, s.num_experts), 1 / s.num_experts
    load, dropped = sums["chosen"] / s.top_k, sums["dropped"] / s.top_k
    values = {
        "load": load, "effective_experts": torch.special.entr(load).sum(-1).exp(),
        "max_over_mean": load.amax(-1) / even, "cv": load.std(-1, correction=0) / even,
        "dropped": dropped.sum(-1), "dropped_by_part": dropped * DROP_PARTS,
        "score_entropy": sums["entropy"][:, 0], "margin": sums["margin"][:, 0],
        "logit_rms": sums["logit"][:, 0].sqrt(),
        "bias_min": bias_ME.amin(-1), "bias_max": bias_ME.amax(-1),
    }
    for name in s.penalties:
        values[f"{name}_loss"], *_ = penalty(name, 1.0, sums_MS, s.num_experts)
    dead = [[e for e, share in enumerate(row) if share < even / 20] for row in load.tolist()]
    return {name: value.tolist() for name, value in values.items()} | {"dead": dead}

def router_lines(report: dict[str, list], s: Settings) -> list[str]:
    """A line about all layers, and an alarm for each with dead experts or a collapse: choices as good as limited to
    half more experts than a token has, or to a quarter of them."""
    effective, dead = report["effective_experts"], report["dead"]
    drops = f", dropped {100 * max(report['dropped']):.1f} %" if s.capacity_factor else ""
    lines = [f"routers: effective experts {' '.join(f'{x:.1f}' for x in effective)} "
             f"of {s.num_experts}, max/mean {max(report['max_over_mean']):.2f}, "
             f"CV {max(report['cv']):.2f}, dead {sum(map(len, dead))}{drops}"]
    for layer, experts in zip(s.mixtures, dead, strict=True):
        if experts:
            lines.append(f"ALARM: layer {layer}: dead experts {', '.join(map(str, experts))}: "
                         "less than 1/20 of an even share of tokens")
    limit = max(1.5 * s.top_k, s.num_experts / 4)
    for layer, x in zip(s.mixtures, effective, strict=True):
        if x < limit < s.num_experts:
            lines.append(f"ALARM: layer {layer}: collapse: {x:.1f} of {s.num_experts} experts are effectively used")
    return lines

def log_routers(run: Run, step: int, report: dict[str, list]):
    """One line on the console, alarms there and in log.txt, all numbers to metrics.jsonl."""
    s, (line, *alarms) = run.s, router_lines(report, run.s)
    run.log.print("\n".join([line, *alarms]))
    for alarm in alarms:
        run.log.line(f"{alarm} (step {step})")
    run.log.metric(event="routers", step=step, layers=s.mixtures, experts=s.num_experts, **report)
    single = {name: row for name, row in report.items() if isinstance(row[0], float)}
    run.log.track(step, {f"routers/{name}/layer{i}": x for name, row in single.items()
                         for i, x in zip(s.mixtures, row, strict=True)})

# ┌─ Training ───────────────────────────────────────────────────────────────────────────────────┐
# differs from train_gpt.py: noise, balance and reports of the routers
def train(run: Run):
    """Steps of micro-steps. Nothing but a log step, an evaluation or a checkpoint waits for the device."""
    s, world, stages = run.s, run.world, stage_table(run.s)
    model = GPT(s, run.vocab_size, world).to(s.device)
    optimizer = MuonAdamW(model, s, world)
    balance = optimizer.balance  # of the experts; None without them
    compile_model(model, s)
    window = torch.zeros((), dtype=torch.int32, device=s.window_device)
    run.open(model, optimizer)
    if s.compile or s.device == "cuda":
        warm_up(run, model, optimizer, window)
    step = run.start(optimizer)  # 0, or the checkpoint's
    s = run.s  # with the micro_tokens that fit
    losses = []  # of the steps since the last log line, on the device

    def validate():
        with run.look(), optimizer.blended():
            val_loss = evaluate(model, run.stream, s, world, window_at(s, stages, run.at))
            run.log_validation(step, val_loss)

    if run.validation_due(step):  # of a checkpoint whose own was cut short
        validate()
    run.clock.start()
    while run.left and not run.over:
        # --- a batch, by micro-steps: forward, backward; the last one's gradients are reduced
        at = run.at  # in the schedule; the step, but for --max-seconds
        stage = stage_at(stages, at)
        micro_steps = run.next_batch(step)
        if (candidates := stage.candidates * (stage.candidates < run.vocab_size)) != model.candidates:
            model.candidates = candidates
            run.log.print(f"step {step + 1}: train losses are among {candidates or 'all'} classes")
        window.fill_(window_at(s, stages, at))
        model.noise_scale.fill_(noise_at(s, at))
        weights = [w / stage.batch_tokens for w in future_weights(stages, at)]
        step_loss = torch.zeros((), device=s.device)
        for i, (inputs_BT, targets_BT, docs_BT) in enumerate(micro_steps):
            optimizer.last_micro_step = i == len(micro_steps) - 1
            targets_KBT = future_targets(targets_BT, docs_BT, stage.mtp)
            model.turn.fill_(candidate_turn(s, stage, world, step, i))
            noise = balance.noise(step, i, *inputs_BT.shape) if balance else None
            values = model(inputs_BT, targets_KBT, docs_BT, window, noise)
            losses_K, sums = values.split((len(weights), len(values) - len(weights)))
            loss = sum(w * loss for w, loss in zip(weights, losses_K, strict=True))
            if balance:
                loss = loss + balance.add(sums, 1 / stage.batch_tokens, optimizer.last_micro_step)
            loss.backward()
            step_loss += losses_K[0].detach() / stage.batch_tokens
        scale, others = lr_scale(s, stages, at), lr_scale(s, stages, at, s.cooldown_others)
        optimizer.step(scale, momentum_at(s, at), others, (at, run.following))
        losses.append(step_loss)
        step += 1

        # --- log, checkpoint, evaluation
        due, last = run.log_due(step), not run.left
        save = s.save_last if last else s.save_every and step % s.save_every == 0
        if due or last or save:
            train_loss = run.read_losses(losses, step)  # raises if one is not finite
            losses.clear()
            run.log_step(
                step, train_loss, lr=scale, seq_len=stage.seq_len, window=window_at(s, stages, at),
                batch_tokens=stage.batch_tokens, fp8_clipped=int(model.saturated))
            if model.left_out:  # 0, unless a set was too small
                run.log.print(f"{int(model.left_out)} targets were no candidates: raise --candidates")
            regular = step % s.log_every == 0  # not where a signal or a checkpoint brought the line about
            if balance and (last or (regular and balance.report_steps >= s.router_every)):
                log_routers(run, step, balance.report())
        if save or run.over:  # first: what follows may fail
            run.save(step, optimizer)
        if run.validation_due(step):
            validate()
            if balance and run.status == "target" and balance.report_steps:
                log_routers(run, step, balance.report())
    run.finish(step, optimizer)

def warm_up(run: Run, model: GPT, optimizer: MuonAdamW, window: Tensor):
    """Compiles and runs every shape, untimed; of several processes each alone first: none waits for one that fails."""
    alone = functools.partial(rehearse, run, model, optimizer, window, World())
    while not run.fits(alone):
        optimizer.reset()
    if run.world.size > 1:
        rehearse(run, model, optimizer, window, run.world)
    run.warmed_up()

# differs from train_gpt.py: noise and sums of the routers
def rehearse(run: Run, model: GPT, optimizer: MuonAdamW, window: Tensor, world: World):
    """A micro-step of every shape on random tokens and, if all of `world` are in it, a step; an evaluation."""
    s, together, balance = run.s, world.size == run.world.size, optimizer.balance
    shapes = {(t.micro_rows(s, run.world.size), t.seq_len, t.mtp, t.candidates) for t in run.stages}
    window.fill_(s.window_step)
    if model.ngrams is not None:
        model.ngrams.world = run.world._replace(alone=not together)
    for rows, seq_len, mtp, model.candidates in sorted(shapes):
        tokens = torch.randint(run.vocab_size, (rows, seq_len), dtype=torch.int32, device=s.device)
        docs = torch.arange(seq_len, dtype=torch.int32, device=s.device)
        docs = (docs // model.longest[seq_len]).repeat(rows, 1)
        for optimizer.last_micro_step in (True,) if together else (False, False):  # twice: sums
            noise = balance.noise(0, 0, rows, seq_len) if balance else None
            values = model(tokens, future_targets(tokens, docs, mtp), docs, window, noise)
            loss = sum(values[:1 + mtp])
            if balance:
                loss = loss + balance.add(values[1 + mtp:], 1 / tokens.numel(), optimizer.last_micro_step)
            loss.backward()
        if together:
            optimizer.step(scale=0.0, momentum=s.momentum_start)
    model.candidates = 0
    evaluate(model, run.stream, s, world, s.window_step, batches=1)
    optimizer.reset()
    torch._foreach_zero_([model.saturated, model.left_out])

# ╔══════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ KERNELS: the fast forms beside their references; the same text in both scripts               ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════╝
# Each has a plain form, which the tests compare it with and which takes its place where --kernels or --fp8_head do not
# name it. To torch.compile an operator is one node.

KERNELS = ("gram", "mlp", "loss")
OPERATORS = "nanospeedrun_" + re.sub(r"\W", "_", Path(__file__).stem)  # namespace
FP8_INPUT_MARGIN = 1.01  # for rounding of values of at most sqrt(model_dim)
LOSS_CHUNK = 4096  # rows of fp32 logits at a time, of the plain form
tl = None  # triton.language, from the first kernel on

@functools.cache
def triton_kernel(function):
    """The function compiled by Triton, which is imported only now."""
    import triton
    globals()["tl"] = triton.language
    return triton.jit(function)

def operator(signature: str):
    """A decorator that registers a torch operator, such as `gram(T x, float a) -> T`, where T is Tensor."""
    name, rest = re.match(r"(\w+)(.+)", re.sub(r"\bT\b", "Tensor", signature)).groups()
    return torch.library.custom_op(f"{OPERATORS}::{name}", mutates_args=(), schema=rest)

@functools.cache
def small_shared_memory(device: str) -> bool:
    """Whether a kernel has less than 160 KB: consumer cards (100 KB), not A100 or H100."""
    if device != "cuda":
        return False
    gpu = torch.cuda.get_device_properties()
    return getattr(gpu, "shared_memory_per_block_optin", 0) < 160 << 10  # unknown on ROCm: 64 KB

def differentiable(operator, backward, context):
    """Gives an operator its backward: called with the first output's gradient, tensors and other values, which
    `context` makes of inputs and outputs. It returns gradients of the first inputs; the others have none."""
    def keep(ctx, inputs, output):
        tensors, ctx.others = context(inputs, output)
        ctx.save_for_backward(*tensors)
        ctx.count = len(inputs)
        ctx.set_materialize_grads(False)

    def gradients(ctx, grad, *_):
        found = backward(grad, *ctx.saved_tensors, *ctx.others)
        return *found, *[None] * (ctx.count - len(found))

    operator.register_autograd(gradients, setup_context=keep)

# --- attention over documents: FlexAttention's block masks (record 12), FlashAttention's sequences, SDPA, the formula

FLEX_BLOCK = 128  # tokens of a block of FlexAttention's block mask

def block_mask(docs_BT, window: Tensor, copies: int = 1):
    """The rule as a FlexAttention BlockMask, nearest blocks first. Documents rise along a row: first and last tokens
    tell how far blocks share one, before queries and after keys, and how near they consist of one (full: no mask)."""
    from torch.nn.attention.flex_attention import BlockMask
    span = FLEX_BLOCK // copies  # tokens of a block
    docs = docs_BT.unflatten(1, (-1, span))
    ends = torch.stack((docs[..., 0], docs[..., -1]))  # (2, B, n)
    other, block = ends.flip(0), torch.arange(docs.size(1), device=docs.device)
    before = (block < block[:, None]) & (other[..., None, :] >= ends[..., None])
    after = (block > block[:, None]) & (ends[..., None, :] <= other[..., None])
    far, near = torch.stack((before.sum(-1), after.sum(-1)), dim=1)  # of queries, keys: (2, B, n)
    far = torch.minimum(far, (window + span - 2) // span)
    near = torch.minimum(near, window // span - 1).clamp_min(0)
    second = torch.arange(2, device=docs.device).view(2, 1, 1, 1) > 0
    counts = torch.where(second, near, 1 + far - near).int()  # partial, full
    away = torch.where(block > 0, block + near[..., None], 0)  # itself, behind full ones
    away = torch.where(second[..., None], block + 1, away)
    lists = block[:, None] + torch.where(second, away, -away)
    lists = lists.clamp(0, len(block) - 1).int()

    def mask_mod(b, h, query, key):
        query, key = query // copies, key // copies
        return visible(query, key, docs_BT[b, query], docs_BT[b, key], window)

    listed = [x[kind, side][:, None] for side in (0, 1) for kind in (0, 1) for x in (counts, lists)]
    length = copies * docs_BT.size(1)
    return BlockMask((length, length), *listed, (FLEX_BLOCK, FLEX_BLOCK), mask_mod)

def flex_options(device: str) -> dict | None:
    """FlexAttention's kernel options: its default tiles need 106 to 131 KB of shared memory."""
    if not small_shared_memory(device):
        return None
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_M1=32, BLOCK_N1=64, BLOCK_M2=64, BLOCK_N2=32)

class Packed(NamedTuple):
    """The rule as FlashAttention takes it: documents are sequences of the flattened batch."""
    starts: Tensor  # int32, of the documents, then the number of tokens
    window: Tensor  # of long layers, on the CPU: read without waiting for the GPU
    step: int  # window_step where half of the window counts, else 0
    longest: int  # document
    turns: int  # 2: a head sees its partner's keys, too

def most_documents(tokens: int) -> int:
    """Sequences of a batch; each costs a little, also where there is none."""
    return min(tokens, max(256, tokens // 128))

def packed_documents(
        docs_BT, window: Tensor, step: int, longest: int | None, kinds: list[str]) -> dict[str, Packed]:
    """By kind of layer; the size depends on that of the batch only."""
    new = docs_BT[:, 1:] != docs_BT[:, :-1]
    number = F.pad(new, (1, 0), value=True).flatten().cumsum(0)
    wanted = torch.arange(most_documents(len(number)) + 1, device=number.device) + 1
    starts = torch.searchsorted(number, wanted, out_int32=True)  # past the last: the end
    longest = min(longest or docs_BT.size(1), docs_BT.size(1))
    return {kind: Packed(starts, window, 0 if kind == "L" else step, longest, 1 + (kind == "P"))
            for kind in kinds}

def check_documents(docs_BT: np.ndarray, backend: str):
    """Raises UserError where a micro-step has more documents than there are sequences."""
    found = len(docs_BT) + int((docs_BT[:, 1:] != docs_BT[:, :-1]).sum())
    most = most_documents(docs_BT.size)
    if backend == "varlen" and found > most:
        raise UserError(f"a micro-step has {found} documents, --backend varlen takes {most}: "
                        "use flex or sdpa")

def flash_arguments(starts, window: Tensor, step: int, longest: int, scale: float) -> tuple:
    """What both directions are called with, by place and by name."""
    size = int(window)
    if step:
        size = min(size, short_window(size, step))
    options = {"window_size_left": size - 1, "window_size_right": 0}
    return (starts, starts, longest, longest, 0.0, False), options | {"scale": scale}

def turned(turns: int, *tensors_NHK: Tensor) -> list:
    """In turn 1 those of a head, in turn 2 its partner's."""
    others = [x.roll(x.size(1) // 2, 1) for x in tensors_NHK]
    return [tensors_NHK, others][:turns]

@operator("varlen(T q, T k, T v, T starts, T window, "
          "int step, int longest, int turns, float scale) -> (T, T)")
def fused_varlen(q_NHK, k_NHK, v_NHK, starts, window, step, longest, turns, scale):
    """Output and log-sum-exps, (H, N); of two turns those of one softmax over the keys of both."""
    sizes, options = flash_arguments(starts, window, step, longest, scale)
    flash = torch.ops.aten._flash_attention_forward
    parts = [flash(q_NHK, *keys, *sizes, False, **options)[:2] for keys in turned(turns, k_NHK, v_NHK)]
    if turns == 1:
        return parts[0]
    (own, own_lse), (other, other_lse) = parts
    lse = torch.logaddexp(own_lse, other_lse)
    share = (other_lse - lse).exp().T[..., None]
    return own.float().lerp(other.float(), share).type_as(q_NHK), lse

@operator("varlen_backward(T grad, T q, T k, T v, T starts, T window, T out, T lse, "
          "int step, int longest, int turns, float scale) -> (T, T, T)")
def fused_varlen_backward(
        grad, q_NHK, k_NHK, v_NHK, starts, window, out, lse, step, longest, turns, scale):
    """From output and log-sum-exps of all turns each turn's part of the gradients follows."""
    sizes, options = flash_arguments(starts, window, step, longest, scale)
    seed = starts.new_zeros(2, dtype=torch.uint64)
    rest = out, lse, *sizes, seed, seed[:0]
    flash, grad = torch.ops.aten._flash_attention_backward, grad.contiguous()
    parts = [flash(grad, q_NHK, *keys, *rest, **options) for keys in turned(turns, k_NHK, v_NHK)]
    if turns == 1:
        return parts[0]
    own, (q_more, *more) = parts
    more = [q_more, *turned(2, *more)[1]]
    return tuple(map(torch.add, own, more))

differentiable(fused_varlen, fused_varlen_backward, lambda x, made: ((*x[:5], *made), x[5:]))
fused_varlen.register_fake(
    lambda q, *_: (torch.empty_like(q), q.new_empty(q.size(1), len(q), dtype=torch.float32)))
fused_varlen_backward.register_fake(lambda grad, *inputs: tuple(map(torch.empty_like, inputs[:3])))

def attend(q_BTHK, k_BTHK, v_BTHK, mask, scale: float, backend: str, options=None) -> Tensor:
    """softmax(scale * q k + mask) v -> (B, T, H, K). The plain formula takes 0.25 to 0.64 of SDPA's time on a CPU."""
    if backend == "varlen":
        return attend_packed(q_BTHK, k_BTHK, v_BTHK, mask, scale)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHK, k_BTHK, v_BTHK))
    if backend == "flex":
        from torch.nn.attention.flex_attention import flex_attention
        y = flex_attention(q, k, v, block_mask=mask, scale=scale, kernel_options=options)
    elif backend == "sdpa":
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        y = (q * scale @ k.mT).masked_fill(~mask, -math.inf).softmax(dim=-1) @ v
    return y.transpose(1, 2)

def attend_packed(q_BTHK, k_BTHK, v_BTHK, packed: Packed, scale: float) -> Tensor:
    """`attend` by FlashAttention; narrow queries and keys get zeros."""
    size = v_BTHK.size(-1)
    tokens = v_BTHK.size(0) * v_BTHK.size(1) // packed.turns
    if short := size - q_BTHK.size(-1):
        q_BTHK, k_BTHK = (F.pad(x, (0, short)) for x in (q_BTHK, k_BTHK))
    flat = [x.reshape(tokens, -1, size) for x in (q_BTHK, k_BTHK, v_BTHK)]
    y, _ = fused_varlen(*flat, *packed, scale)
    return y.view(v_BTHK.shape)

# --- rows of a table, whose gradient has the same bits in every run

@operator("table_gradient(T grad, T index, int rows) -> T")
def table_gradient(grad, index, rows: int):
    """Sums by row, in sorted order, in grad's dtype: torch.compile's own are fp32 atomics, in any order, and a cast."""
    return torch.ops.aten.embedding_dense_backward(grad, index, rows, -1, False)

table_gradient.register_fake(lambda grad, index, rows: grad.new_empty(rows, grad.size(-1)))

class TableRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table_VD, index):
        ctx.save_for_backward(index)
        ctx.rows = len(table_VD)
        return F.embedding(index, table_VD)

    @staticmethod
    def backward(ctx, grad):
        (index,) = ctx.saved_tensors
        return table_gradient(grad.contiguous(), index, ctx.rows), None

def look_up(table_VD, index) -> Tensor:
    """table[index], (*index.shape, D)."""
    return TableRows.apply(table_VD, index) if table_VD.is_cuda else F.embedding(index, table_VD)

class Table(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # where only shapes count; it would load torch._dynamo there
            super().reset_parameters()

    def forward(self, index) -> Tensor:
        return look_up(self.weight, index)

# --- x @ x.mT, of which one triangle is computed (record 27)

def gram_kernel(
        x, add, out, size, depth, stride_batch, stride_row, stride_depth, alpha, beta,
        diagonal, ADD: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr):
    """One tile on or above the diagonal of alpha * x @ x.T + beta * add + diagonal * I, stored below it, too."""
    down, right = tl.program_id(0), tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    if down <= right:
        row = down * TILE + tl.arange(0, TILE)
        col = right * TILE + tl.arange(0, TILE)
        k = tl.arange(0, DEPTH)
        x += batch * stride_batch
        total = tl.zeros((TILE, TILE), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            at = (start + k) * stride_depth
            deep = start + k < depth
            inside = (row < size)[:, None] & deep[None, :]
            left = tl.load(x + row[:, None] * stride_row + at[None, :], inside, 0.0)
            inside = (col < size)[None, :] & deep[:, None]
            above = tl.load(x + col[None, :] * stride_row + at[:, None], inside, 0.0)
            total = tl.dot(left, above, total, input_precision="ieee")
        total *= alpha
        corner = batch * size * size
        where = corner + row[:, None] * size + col[None, :]
        inside = (row < size)[:, None] & (col < size)[None, :]
        if ADD:
            total += beta * tl.load(add + where, inside, 0.0).to(tl.float32)
        total += tl.where(row[:, None] == col[None, :], diagonal, 0.0)
        total = total.to(out.dtype.element_ty)
        tl.store(out + where, total, inside)
        mirrored = corner + col[None, :] * size + row[:, None]
        tl.store(out + mirrored, total, inside & (down < right))

@operator("gram(T x, T? add, float alpha, float beta, float diagonal) -> T")
def fused_gram(x_KMN, add_KMM, alpha: float, beta: float, diagonal: float):
    count, size, depth = x_KMN.shape
    out = x_KMN.new_empty(count, size, size)
    tiles = -(-size // 128)
    triton_kernel(gram_kernel)[(tiles, tiles, count)](
        x_KMN, out if add_KMM is None else add_KMM.contiguous(), out, size, depth,
        *x_KMN.stride(), alpha, beta, diagonal, ADD=add_KMM is not None,
        TILE=128, DEPTH=64, num_warps=8, num_stages=3)
    return out

fused_gram.register_fake(lambda x, *_: x.new_empty(x.size(0), x.size(1), x.size(1)))

def quintic(x_KMN, a: float, b: float, c: float, kernel: bool) -> Tensor:
    """a * x + b * s @ x + c * s @ s @ x with s = x @ x.mT. The kernel adds a * I: baddbmm would copy x."""
    if kernel:
        square = fused_gram(x_KMN, None, 1.0, 0.0, 0.0)
        return fused_gram(square, square, c, b, a) @ x_KMN
    square = x_KMN @ x_KMN.mT
    more = torch.baddbmm(square, square, square.mT, beta=b, alpha=c)
    return torch.baddbmm(x_KMN, more, x_KMN, beta=a)

# --- the MLP, fused (records 59, 87), or with its up-projection in FP8 (84)

def product_relu2_kernel(
        a, b, post, out, rows, cols, depth, BACKWARD: tl.constexpr, ROWS: tl.constexpr,
        COLS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr):
    """out = relu(a @ b.T)^2, or in the backward pass (a @ b.T) * 2 sqrt(post), post being the former's result: a (rows,
    depth), b (cols, depth), row-major, as tensor descriptors. Each program takes every PROGRAMS-th tile: it loads the
    next one's while it stores one, in halves, for which memory suffices. GROUP rows of tiles share b in the L2."""
    tiles_down, tiles_right = tl.cdiv(rows, ROWS), tl.cdiv(cols, COLS)
    half: tl.constexpr = COLS // 2
    for tile in tl.range(tl.program_id(0), tiles_down * tiles_right, PROGRAMS, flatten=True):
        group = tile // (GROUP * tiles_right)
        within = tile % (GROUP * tiles_right)
        height = min(tiles_down - group * GROUP, GROUP)
        row = (group * GROUP + within % height) * ROWS
        col = (within // height) * COLS
        total = tl.zeros((ROWS, COLS), dtype=tl.float32)
        for start in range(0, depth, DEPTH):
            left = a.load([row, start])
            right = b.load([col, start])
            total = tl.dot(left, right.T, total, input_precision="ieee")
        parts = tl.split(tl.permute(tl.reshape(total, (ROWS, 2, half)), (0, 2, 1)))
        for i in tl.static_range(2):
            part = parts[i]
            if BACKWARD:
                part *= 2 * tl.sqrt(post.load([row, col + i * half]).to(tl.float32))
            else:
                part = tl.maximum(part, 0.0) * part
            out.store([row, col + i * half], part.to(out.dtype))

def product_relu2(a: Tensor, b: Tensor, post: Tensor | None = None) -> Tensor:
    """relu(a @ b.T)^2, or, given that as `post`, (a @ b.T) times its derivative. The square root gives the
    pre-activations back. Before Hopper, which copies tensors by descriptors, in two passes."""
    if a.is_cuda and (torch.version.hip or torch.cuda.get_device_capability() < (9, 0)):
        product = a @ b.T
        return product.relu().square_() if post is None else product.mul_(2 * post.sqrt())
    from triton.tools.tensor_descriptor import TensorDescriptor
    (rows, depth), cols = a.shape, b.size(0)
    out = a.new_empty(rows, cols)
    small = small_shared_memory(a.device.type) or a.dtype == torch.float32
    tile = dict(ROWS=128, COLS=128 if small else 256, DEPTH=32 if small else 64)
    whole, half = [tile["ROWS"], tile["DEPTH"]], [tile["ROWS"], tile["COLS"] // 2]
    shapes = whole, [tile["COLS"], tile["DEPTH"]], half, half
    tensors = a.contiguous(), b.contiguous(), out if post is None else post, out
    at_once = torch.cuda.get_device_properties().multi_processor_count if a.is_cuda else 4
    programs = min(at_once, -(-rows // 128) * -(-cols // tile["COLS"]))
    triton_kernel(product_relu2_kernel)[(programs,)](
        *map(TensorDescriptor.from_tensor, tensors, shapes), rows, cols, depth,
        BACKWARD=post is not None, **tile, GROUP=8, PROGRAMS=programs, num_warps=8, num_stages=3)
    return out

@operator("mlp(T x, T up, T down) -> (T, T)")
def fused_mlp(x_ND, up_FD, down_FD):
    post_NF = product_relu2(x_ND, up_FD)
    return post_NF @ down_FD, post_NF

@operator("mlp_backward(T grad, T x, T up, T down, T post) -> (T, T, T)")
def fused_mlp_backward(grad_ND, x_ND, up_FD, down_FD, post_NF):
    pre_grad_NF = product_relu2(grad_ND, down_FD, post_NF)
    return pre_grad_NF @ up_FD, pre_grad_NF.T @ x_ND, post_NF.T @ grad_ND

differentiable(fused_mlp, fused_mlp_backward, lambda x, made: ((*x, made[1]), ()))
fused_mlp.register_fake(lambda x, up, down: (torch.empty_like(x), x.new_empty(len(x), len(up))))
fused_mlp_backward.register_fake(lambda grad, *inputs: tuple(map(torch.empty_like, inputs[:3])))

@operator("quantized_linear(T x, T weight, T xq, T wq, T x_scale, T w_scale) -> T")
def quantized_linear(x_ND, weight_FD, xq_ND, wq_FD, x_scale: Tensor, w_scale: Tensor):
    return fp8_product(xq_ND, wq_FD, x_scale, w_scale, fast=True).to(x_ND.dtype)

differentiable(
    quantized_linear, lambda grad, x, weight: (grad @ weight, grad.T @ x), lambda x, _: (x[:2], ()))
quantized_linear.register_fake(lambda x, weight, *_: x.new_empty(len(x), len(weight)))

class ReLUSquared(torch.autograd.Function):
    """relu(x)^2, equal to the bit; only the root is kept, and backward takes two passes instead of four."""
    @staticmethod
    def forward(ctx, x) -> Tensor:
        root = x.relu()
        ctx.save_for_backward(root)
        return root.square()

    @staticmethod
    def backward(ctx, grad):
        (root,) = ctx.saved_tensors
        return grad * root * 2

def mlp_relu2(x_ND, up_FD, down_FD, kernel: bool, fp8: bool) -> Tensor:
    """relu(x @ up.T)^2 @ down, (N, D): plain, fused, or with the up-projection in FP8."""
    if kernel and not fp8:
        return fused_mlp(x_ND, up_FD, down_FD)[0]
    return ReLUSquared.apply((fp8_linear if fp8 else F.linear)(x_ND, up_FD)) @ down_FD

def fp8_linear(x_ND, weight_FD) -> Tensor:
    """x @ weight.T in e4m3, each scaled to its largest entry; the gradients are exact. Quantized outside the operator,
    so that torch.compile can fuse it with what comes before."""
    exact = [t.detach().float() for t in (x_ND, weight_FD)]
    scales = [t.abs().amax().clamp_min(1e-12) / 448 for t in exact]
    return quantized_linear(x_ND, weight_FD, *map(to_fp8, exact, scales), *scales)

def to_fp8(x: Tensor, scale, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """x / scale, clipped: on a GPU the cast turns what is out of range into NaN or infinity."""
    limit = torch.finfo(dtype).max
    return (x / scale).clamp(-limit, limit).to(dtype)

def fp8_product(a_NK, b_MK, scale_a: Tensor, scale_b: Tensor, fast: bool) -> Tensor:
    """(a * scale_a) @ (b * scale_b).T, fp8, row-major -> (N, M) bf16. `fast`: shorter sums."""
    return torch._scaled_mm(
        a_NK, b_MK.T, scale_a=scale_a, scale_b=scale_b, out_dtype=torch.bfloat16, use_fast_accum=fast)

# --- the loss without fp32 logits (record 60), and the head's products in FP8 (19)

def loss_kernel(
        logits, targets, bias, losses, lses, rows, vocab, a, b, c,
        CAPPED: tl.constexpr, BIASED: tl.constexpr, TARGETS: tl.constexpr, BLOCK: tl.constexpr):
    """One row of logits: the logarithm of its sum of exponentials, and the cross-entropy with each of its targets.
    Capped logits, a * sigmoid((z + b) / c), are below a, which spares them the running maximum; the sigmoid is a
    squared rsqrt(1 + 2^..), cheaper than a division."""
    slope, shift = 1 / c, b / c
    row, col = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    peak = tl.full((BLOCK,), a if CAPPED else -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        inside = start + col < vocab
        z = tl.load(logits + row * vocab + start + col, inside, 0.0).to(tl.float32)
        if CAPPED:
            root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * slope * z - 1.4426950408889634 * shift))
            z = a * (root * root)
        else:
            z *= slope
        if BIASED:
            z += tl.load(bias + start + col, inside, 0.0)
        z = tl.where(inside, z, -1e30)
        if not CAPPED:
            higher = tl.maximum(peak, z)
            total *= tl.exp(peak - higher)
            peak = higher
        total += tl.exp(z - peak)  # 1 in an empty lane, where exp(peak - top) cancels it
    top = tl.max(peak, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(peak - top), 0))
    tl.store(lses + row, lse)
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k * rows + row)
        z = tl.load(logits + row * vocab + target, target >= 0, 0.0).to(tl.float32)
        z = a * tl.sigmoid(slope * z + shift) if CAPPED else slope * z
        tl.store(losses + k * rows + row, tl.where(target >= 0, lse - z, 0.0))

def loss_gradient_kernel(
        logits, targets, bias, lses, grads, unit, out, out_t, rows, vocab, a, b, c,
        CAPPED: tl.constexpr, BIASED: tl.constexpr, TARGETS: tl.constexpr, TRANSPOSED: tl.constexpr,
        ROWS: tl.constexpr, COLS: tl.constexpr):
    """One tile of the logits' gradient / unit, (rows, vocab), for FP8 also as (vocab, rows); grads: of the losses."""
    slope, shift = 1 / c, b / c
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (row < rows)[:, None] & (col < vocab)[None, :]
    where = row.to(tl.int64)[:, None] * vocab + col[None, :]
    z = tl.load(logits + where, inside, 0.0).to(tl.float32)
    if CAPPED:
        root = tl.rsqrt(1 + tl.exp2(-1.4426950408889634 * slope * z - 1.4426950408889634 * shift))
        share = root * root
        z = a * share
    else:
        z *= slope
    weight, hit = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS, COLS), tl.float32)
    for k in tl.static_range(TARGETS):
        target = tl.load(targets + k * rows + row, row < rows, -1)
        grad = tl.load(grads + k * rows + row, row < rows, 0.0) / tl.load(unit)
        grad = tl.where(target >= 0, grad, 0.0)
        weight += grad
        hit += tl.where(col[None, :] == target[:, None], grad[:, None], 0.0)
    lse = tl.load(lses + row, row < rows, 0.0)
    more = tl.load(bias + col, col < vocab, 0.0)[None, :] if BIASED else 0.0
    result = weight[:, None] * tl.exp(z + more - lse[:, None]) - hit
    result = result * z * (slope - slope * share) if CAPPED else result * slope
    result = result.to(out.dtype.element_ty)
    tl.store(out + where, result, inside)
    if TRANSPOSED:
        tl.store(out_t + col.to(tl.int64)[None, :] * rows + row[:, None], result, inside)

def cap_logits(z: Tensor, cap: tuple) -> Tensor:
    """a * sigmoid((z + b) / c) (54), with b = 0 but for a constant a/2 * tanh(z / 2c) (9, 18); if a is 0, z / c."""
    a, b, c = cap
    return a * torch.sigmoid((z + b) / c) if a else z / c

def loss_rows(logits_NV, targets_KN, bias_V, cap: list[float], kernel: bool) -> tuple:
    """Cross-entropies of capped logits + bias (that of a target: 0), (K, N), 0 where the target is IGNORE, and
    log-sum-exps, (N,), both fp32."""
    (rows, vocab), count = logits_NV.shape, len(targets_KN)
    if kernel:
        lse_N = logits_NV.new_empty(rows, dtype=torch.float32)
        losses_KN = lse_N.new_empty(count, rows)
        triton_kernel(loss_kernel)[(rows,)](
            logits_NV, targets_KN.contiguous(), bias_V, losses_KN, lse_N, rows, vocab, *cap,
            CAPPED=cap[0] != 0, BIASED=bias_V is not None, TARGETS=count, BLOCK=2048, num_warps=4)
        return losses_KN, lse_N
    losses, lses = [], []
    for start in range(0, rows, LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        z, target = cap_logits(logits_NV[part].float(), cap), targets_KN[:, part]
        lses.append((z if bias_V is None else z + bias_V).logsumexp(-1))
        hit = z.gather(1, target.clamp_min(0).long().T).T
        losses.append((lses[-1] - hit) * (target != IGNORE))
    return torch.cat(losses, dim=1), torch.cat(lses)

def logit_gradient(
        logits_NV, targets_KN, bias_V, lse_N, grad_KN, unit: Tensor,
        cap: list[float], dtype: torch.dtype, kernel: bool) -> tuple:
    """Gradient of sum(grad_KN * losses_KN) by the uncapped logits / `unit`; and its transpose."""
    (rows, vocab), fp8 = logits_NV.shape, dtype.itemsize == 1
    out = logits_NV.new_empty(rows, vocab, dtype=dtype)
    if kernel:
        out_t = out.new_empty(vocab, rows) if fp8 else out
        triton_kernel(loss_gradient_kernel)[(-(-rows // 64), -(-vocab // 64))](
            logits_NV, targets_KN.contiguous(), bias_V, lse_N, grad_KN.contiguous(), unit, out, out_t,
            rows, vocab, *cap, CAPPED=cap[0] != 0, BIASED=bias_V is not None, TARGETS=len(targets_KN),
            TRANSPOSED=fp8, ROWS=64, COLS=64, num_warps=4)
        return out, out_t if fp8 else out.T
    a, _, c = cap
    for start in range(0, rows, LOSS_CHUNK):
        part = slice(start, start + LOSS_CHUNK)
        z, target = cap_logits(logits_NV[part].float(), cap), targets_KN[:, part]
        weight = grad_KN[:, part] * (target != IGNORE)
        biased = z if bias_V is None else z + bias_V
        gradient = (biased - lse_N[part, None]).exp() * weight.sum(0)[:, None]
        gradient.scatter_add_(1, target.clamp_min(0).long().T, -weight.T)
        gradient *= z * (1 - z / a) / c if a else 1 / c
        out[part] = (gradient / unit).to(dtype)
    return out, out.T.contiguous() if fp8 else out.T

def head_scales(model_dim: int) -> tuple:
    """e4m3 scales of the head's RMS-normed inputs, at most sqrt(model_dim), and of its weights, at most 448 / 256:
    powers of two, so that only the cast rounds."""
    largest = FP8_INPUT_MARGIN * math.sqrt(model_dim)
    return 2.0 ** math.ceil(math.log2(largest / 448)), 2.0**-8

@operator("head(T x, T weight, T xq, T wq, T targets, T? bias, float[] cap, bool kernel) -> (T, T, T)")
def fused_head(x_ND, weight_VD, xq_ND, wq_VD, targets_KN, bias_V, cap, kernel):
    """Losses (K, N), logits and log-sum-exps. xq and wq: x and weight in FP8, or they themselves."""
    if xq_ND.dtype.itemsize == 1:
        scales = [torch.full((), s, device=x_ND.device) for s in head_scales(x_ND.size(1))]
        logits_NV = fp8_product(xq_ND, wq_VD, *scales, fast=True)
    else:
        logits_NV = F.linear(xq_ND, wq_VD)
    losses_KN, lse_N = loss_rows(logits_NV, targets_KN, bias_V, cap, kernel)
    return losses_KN, logits_NV, lse_N

@operator("head_backward(T grad, T xq, T wq, T targets, T? bias, T logits, T lse, "
          "float[] cap, bool kernel, ScalarType dtype) -> (T, T)")
def fused_head_backward(grad_KN, xq, wq, targets_KN, bias_V, logits_NV, lse_N, cap, kernel, dtype):
    """Gradients of x and weight. FP8, xq (D, N) and wq (D, V): a logit's gradient is at most sum |grad| * a / 4c; in
    units of that / 57344 it always fits e5m2, and the units go into the products' scales."""
    rest = logits_NV, targets_KN, bias_V, lse_N, grad_KN
    if xq.dtype.itemsize > 1:
        one = torch.ones_like(grad_KN[0, 0])
        gradient, transposed = logit_gradient(*rest, one, cap, logits_NV.dtype, kernel)
        return gradient @ wq, transposed @ xq
    steepest = (cap[0] / 4 or 1.0) / cap[2]
    largest = grad_KN.abs().sum(0).amax().clamp_min(1e-30)
    unit = largest * (steepest / torch.finfo(torch.float8_e5m2).max)
    gradient, transposed = logit_gradient(*rest, unit, cap, torch.float8_e5m2, kernel)
    x_scale, w_scale = (torch.full((), s, device=unit.device) for s in head_scales(len(xq)))
    x_grad = fp8_product(gradient, wq, unit, w_scale, fast=False)
    w_grad = fp8_product(transposed, xq, unit, x_scale, fast=False)
    return x_grad.to(dtype), w_grad.to(dtype)

def _head_backward(grad_KN, xq, wq, *rest):
    if xq.dtype.itemsize == 1:  # here, where torch.compile sees it
        xq, wq = xq.T.contiguous(), wq.T.contiguous()
    return fused_head_backward(grad_KN, xq, wq, *rest)

def _head_fake(x, weight, xq, wq, targets, bias, cap, kernel):
    logits = torch.bfloat16 if xq.dtype.itemsize == 1 else x.dtype
    losses = x.new_empty(targets.shape, dtype=torch.float32)
    return losses, x.new_empty(len(x), len(weight), dtype=logits), losses.new_empty(len(x))

differentiable(
    fused_head, _head_backward, lambda x, made: ((*x[2:6], *made[1:]), (*x[6:], x[0].dtype)))
fused_head.register_fake(_head_fake)
fused_head_backward.register_fake(lambda grad, xq, wq, targets, bias, logits, *rest: tuple(
    t.new_empty(n, t.numel() // n, dtype=rest[-1]) for t, n in zip((xq, wq), logits.shape, strict=True)))

def head_losses(x_ND, weight_VD, targets_KN, cap: tuple, kernel: bool, fp8: bool, each=False, bias_V=None) -> tuple:
    """Cross-entropies of capped logits x @ weight.T + bias with each row of targets, whose own bias is 0, summed, (K,)
    fp32 in nats, IGNORE left out, or `each` token's, (K, N); and how many values FP8 clipped, int64."""
    clipped = targets_KN.new_zeros((), dtype=torch.int64)
    if not kernel and not fp8:
        logits = cap_logits(F.linear(x_ND, weight_VD), cap).float()
        logits = logits if bias_V is None else logits + bias_V
        form = {"reduction": "none" if each else "sum", "ignore_index": IGNORE}
        return torch.stack([F.cross_entropy(logits, t.long(), **form) for t in targets_KN]), clipped
    x, weight = x_ND.detach(), weight_VD.detach()
    if fp8:
        x_scale, w_scale = head_scales(x.size(1))
        clipped = (x.abs() > 448 * x_scale).sum() + (weight.abs() > 448 * w_scale).sum()
        x, weight = to_fp8(x, x_scale), to_fp8(weight, w_scale)
    losses = fused_head(x_ND, weight_VD, x, weight, targets_KN, bias_V, list(cap), kernel)[0]
    return losses if each else losses.sum(1), clipped

# ╔══════════════════════════════════════════════════════════════════════════════════════════════╗
# ║ SERVICE: what surrounds a run; the same text in train_gpt.py and train_moe.py                ║
# ╚══════════════════════════════════════════════════════════════════════════════════════════════╝
# Of RECORD it calls Hyperparameters, PRESETS, choose_preset, record_auto, hyperparameter_errors; Stage, stage_table,
# stage_at, layer_table, FLEX_BLOCK, parameter_counts, flops_per_token, model_flops_utilization, expected_memory,
# micro_sizes, way_to_fit; compiled_graphs, piece_table, pack_row, gather_rows, ValStream, bits_per_byte; and train,
# which calls Run's methods.

# ┌─ Command line ───────────────────────────────────────────────────────────────────────────────┐
class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback."""

class TrainingStopped(RuntimeError):
    """Training cannot go on (NaN, no space for the last checkpoint); what was saved stays usable."""

class NothingToDo(Exception):
    """The run that --resume names is over."""

@dataclass(frozen=True)
class RunSettings:
    """Where and how a run runs, what it looks at and writes. A resumed run may change all of it."""
    preset: str = "auto"  # settings that flags override
    experiment_name: str = Path(__file__).stem  # its runs: LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # of all experiments
    resume: str = ""  # go on from the latest, this run or checkpoint
    allow_change: str = ""  # with --resume: what may differ, as muon_lr,iterations
    data: str = "auto"  # data set: a name under data/, or a path
    # --- evaluation
    eval_every: int = 125  # steps between evaluations; 0: the last [>=0]
    eval_tokens: int = 10485760  # first tokens of the validation split; 0: all [>=0]
    eval_seq_len: int = 0  # longest context, tokens; 0: that of the last stage [>=0]
    eval_window: int = 0  # long window, by YaRN (31 to 35); 0: as in training [>=0]
    target_loss: float = 0.0  # stop at a validation loss at or below, nats; 0 off [>=0]
    max_seconds: float = 0.0  # stretch the schedule to this time; 0: iterations [>=0]
    # --- checkpoints, logs, profiling
    save_every: int = 0  # steps between checkpoints; 0: at the end [>=0]
    save_last: bool = True  # a checkpoint after the last step
    save_best: bool = False  # a checkpoint at each best validation: ckpt_best
    keep: int = 0  # checkpoints kept; 0: 2, or what the run had [>=0]
    log_every: int = 10  # steps between lines, which wait for the device [>0]
    tracker: str = "none"  # gets the metrics, too [none|wandb|tensorboard|trackio]
    enable_profiling: bool = False  # a trace per process, for logger.py profile
    profile_start: int = 10  # first profiled step of a process [>=0]
    profile_steps: int = 3  # profiled steps [>0]
    # --- hardware
    device: str = "auto"  # mps, Apple's GPU, is untested [auto|cpu|cuda|mps]
    dtype: str = "auto"  # of activations and matrices; bf16 where fast [auto|bf16|fp32]
    backend: str = "auto"  # of attention (docs/running.md) [auto|flex|varlen|sdpa|plain]
    kernels: str = "auto"  # own Triton ones, of gram+mlp+loss; none; auto
    fp8_head: str = "auto"  # LM head in FP8 while training [auto|on|off]
    fp8_mlp: bool = False  # MLP up-projections in FP8, forward (84)
    compile: bool = True  # torch.compile of model and optimizer
    compile_unit: str = "auto"  # of graphs; block: early reductions [auto|model|block]
    micro_tokens: int = 0  # most tokens of a forward pass; auto, 0: what fits [>=0]
    threads: int = 0  # CPU threads of a process; 0: torch's choice [>=0]

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    @property
    def window_device(self) -> str:
        """Where attention reads its window."""
        return "cpu" if self.backend == "varlen" else self.device

@dataclass(frozen=True)
class Settings(RunSettings, Hyperparameters):
    """Everything that shapes a run."""

@functools.cache
def help_texts() -> dict[str, str]:
    """The comments of the fields of Settings, read from the source, by name."""
    source = Path(__file__).read_text(encoding="utf-8")  # inspect parses it: 0.2 s
    classes = re.findall(r"(?ms)^class (?:Hyperp|RunS).+?^(?=\S)", source)
    texts = dict(re.findall(r"(?m)^    (\w+): \w+ = .+?  # (.+)$", "".join(classes)))
    return texts | {"preset": f"{texts['preset']} [auto|{'|'.join(PRESETS)}]"}

def bracket(name: str) -> list[str]:
    """The parts of the bracket that ends a comment: allowed values, `per stage`, `with ..`."""
    found = re.search(r"\[([^\]]+)\]$", help_texts()[name])
    return found[1].split("; ") if found else []

# other names of settings: nanoGPT's, llm.c's, and DeepSeekMoE's in build-nano-moe
ALIASES = {
    "iterations": ("max_steps", "max_iters"), "batch_tokens": ("total_batch_size",), "seq_len": ("T",),
    "eval_every": ("eval_interval",), "data": ("dataset",), "num_experts": ("n_experts",),
    "num_shared": ("n_shared_experts",), "top_k": ("n_activated_experts",)}
REPLACED = {"--wandb": "now --tracker wandb"}
OTHERS = {  # flags that are no settings, but change one
    "num_tokens": ("iterations", "in training tokens, in their place"),
    "m_sub_experts": ("num_experts", "a factor on them")}

class Parser(argparse.ArgumentParser):
    """argparse that reports one sentence, with the flags that were probably meant."""
    def error(self, message: str):
        flags = re.findall(r"(?<= )--[\w-]+", message) if message.startswith("unrecognized") else []
        for i, flag in enumerate(flags):
            close = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            hint = f"did you mean {close[0]}?" if close else "--help lists all flags"
            flags[i] = f"{flag} ({REPLACED.get(flag, hint)})"
        message = f"unrecognized arguments: {', '.join(flags)}" if flags else message
        self.exit(2, f"error: {message}\n")

def dashed(argv: list[str]) -> list[str]:
    """A command line whose flags have dashes for underscores: both are accepted."""
    return [re.sub(r"^--\w[\w-]*", lambda flag: flag[0].replace("_", "-"), word) for word in argv]

def whole(text: str) -> int:
    """A whole number, also as 1e6 or 1_000_000; 0 for auto."""
    text = "0" if text == "auto" else text
    number = float(text)
    return int(number) if "e" in text.lower() and number.is_integer() else int(text)

whole.__name__ = "int"  # for argparse's "invalid .. value"

def build_parser() -> Parser:
    """One flag per field of Settings."""
    def list_of(kind: type):
        def parse(text: str):
            return tuple(map(kind, text.split(",")))
        parse.__name__ = f"{kind.__name__},{kind.__name__},.."  # for argparse's "invalid .. value"
        return parse

    layout = functools.partial(argparse.HelpFormatter, max_help_position=36, width=118)
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False, formatter_class=layout)
    kinds = {"int": whole, "float": float, "str": str, "ints": list_of(whole), "floats": list_of(float)}
    for field in fields(Settings):
        default, several = field.default, isinstance(field.default, tuple)
        shown = ",".join(map(str, default)) if several else default
        option = dict(default=argparse.SUPPRESS, help=f"{help_texts()[field.name]} (default: {shown})")
        if field.type == "bool":
            option["action"] = argparse.BooleanOptionalAction
        else:
            option |= dict(type=kinds[field.type], metavar="X,X" if several else "X")
        if field.name == "resume":
            option |= dict(nargs="?", const="latest")
        names = field.name, *ALIASES.get(field.name, ())
        parser.add_argument(*(f"--{name.replace('_', '-')}" for name in names), **option)
    for name in (name for name, (changed, _) in OTHERS.items() if changed in help_texts()):
        option = dict(default=argparse.SUPPRESS, help=": ".join(OTHERS[name]))
        parser.add_argument("--" + name.replace("_", "-"), type=whole, metavar="X", **option)
    return parser

def changed_by(others: dict, s: Settings) -> Settings:
    """Settings, as the flags OTHERS of a command line change them."""
    if "m_sub_experts" in others:
        s = replace(s, num_experts=s.num_experts * others["m_sub_experts"])
    if "num_tokens" in others and not size_errors(s) + field_errors(s):
        batches = s.batch_tokens if len(s.batch_tokens) == len(s.stage_ends) else s.batch_tokens[:1]
        batch = round((np.diff((0.0, *s.stage_ends)) * batches).sum())
        s = replace(s, iterations=-(-others["num_tokens"] // max(1, batch)))
    return s

class Hardware(NamedTuple):
    """What this process may use, and why bf16 is fast on it or not."""
    device: str  # cuda (also ROCm's), mps or cpu
    name: str
    memory_gib: float  # of one GPU, or of the machine
    bf16: bool
    why: str
    fp8: bool = False  # has FP8 matrix products
    capability: tuple[int, int] = (0, 0)  # of NVIDIA's GPU: its generation

    @property
    def room(self) -> float:
        """GiB for tensors: the context and the libraries take half a GiB, gaps between blocks 5 %."""
        return 0.95 * self.memory_gib - 0.5

def machine_memory() -> float:
    """GiB of this machine, 2^20 where the system does not say (Windows)."""
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return 2.0**20

def detect_hardware(device: str = "auto") -> Hardware:
    """The first GPU if there is one and `device` allows it, else the CPU. Apple's only if asked for."""
    if device == "mps" and torch.backends.mps.is_available():
        return Hardware("mps", platform.machine(), machine_memory(), False, "bf16 only if asked for")
    if device in ("auto", "cuda") and torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        memory = gpu.total_memory / 2**30
        if torch.version.hip:  # whose generations are numbered otherwise
            return Hardware("cuda", gpu.name, memory, True, f"ROCm {torch.version.hip}")
        capability, fast = (gpu.major, gpu.minor), gpu.major >= 8
        why = f"compute capability {gpu.major}.{gpu.minor} {'>=' if fast else '<'} 8.0"
        return Hardware("cuda", gpu.name, memory, fast, why, capability >= (8, 9), capability)
    probes = {"AVX512-BF16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
    found = [name for name, probe in probes.items() if getattr(torch.cpu, probe, bool)()]
    why = f"the CPU has {' and '.join(found) or 'neither AVX512-BF16 nor AMX'}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, AttributeError):
        name = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())[1]
    return Hardware("cpu", name, machine_memory(), bool(found), why)

def flash_fits(s: Settings, hardware: Hardware, bf16: bool) -> bool:
    """Whether FlashAttention can be called: an NVIDIA GPU from Ampere on, bf16, heads of its sizes."""
    return hardware.capability >= (8, 0) and bf16 and s.head_dim % 8 == 0 and s.head_dim <= 256

def run_auto(s: Settings, hardware: Hardware, world_size: int) -> dict[str, tuple]:
    """What `auto`, or 0, means: setting -> value and the reason for it."""
    bf16 = s.dtype == "bf16" or (s.dtype == "auto" and hardware.bf16)
    nvidia = hardware.device == "cuda" and not torch.version.hip
    plain = hardware.device == "mps" or hardware.device == "cpu" and bf16 and not s.compile
    fallback = "varlen" if flash_fits(s, hardware, bf16) else "plain" if plain else "sdpa"
    flex = nvidia and s.compile and hardware.bf16
    why = "the fastest here" if flex or not nvidia else "FlexAttention needs capability 8.0"
    triton = nvidia and bf16 and hardware.bf16 and importlib.util.find_spec("triton")
    fp8 = hardware.fp8 and bf16 and not any(size % 16 for size in (s.width, *s.seq_len))
    return {
        "device": (hardware.device, hardware.name),
        "dtype": ("bf16" if bf16 else "fp32", hardware.why),
        "backend": ("flex" if flex else fallback, why),
        "kernels": ("+".join(KERNELS) if triton else "none", "they need Triton, CUDA, not ROCm, and bf16"),
        "fp8_head": ("on" if fp8 else "off", "it needs FP8 products and multiples of 16"),
        "compile_unit": ("model" if world_size == 1 else "block", f"{world_size} process(es)"),
        "data": ("fineweb10B" if data_folder("fineweb10B").is_dir() else "stdlib",
                 "fineweb10B where it is there"),
        "eval_seq_len": (s.seq_len[-1], "that of the last stage"),
    }

def without_auto(s: Settings, hardware: Hardware, world_size: int) -> tuple[Settings, dict]:
    """Settings without `auto`, and the choices: name -> value and the reason for it."""
    auto = run_auto(s, hardware, world_size) | record_auto(s, hardware)
    auto = {name: choice for name, choice in auto.items() if getattr(s, name) in ("auto", 0)}
    return replace(s, **{name: value for name, (value, _) in auto.items()}), auto

def with_head_dim(
        s: Settings, given: dict, hardware: Hardware, world_size: int, notes: list[str]) -> Settings:
    """Settings whose head_dim, if nobody gave it, divides width and base width; a change is noted."""
    base_width = 0 if s.base_head_dim else without_auto(s, hardware, world_size)[0].base_width
    wide = math.gcd(s.width, base_width)
    fitting = [n for n in divisors(wide) if n % 4 == 0 and s.head_dim / 2 <= n <= 2 * s.head_dim]
    if "head_dim" in given or wide % s.head_dim == 0 or not fitting:
        return s
    size = min(fitting, key=lambda size: abs(math.log(size / s.head_dim)))
    notes.append(f"head_dim {size}: a divisor of {wide}")
    return replace(s, head_dim=size)

def vocabulary(data: str) -> int:
    """Size of a data set's vocabulary; GPT-2's where nothing is there yet."""
    with contextlib.suppress(OSError, ValueError):
        return min(read_json(data_folder(data) / "meta.json", DATA_META)["vocab_size"], 2**16)
    return GPT2_META["vocab_size"]

def fitted(s: Settings, hardware: Hardware, world_size: int) -> tuple[Settings, list[str], list[str]]:
    """Settings with the largest micro_tokens that fit, where that is open; notes on it; what would fit, if nothing."""
    def need(s: Settings, size: int = 0) -> float:
        s = replace(s, micro_tokens=size or micro_sizes(s)[-1])
        with contextlib.suppress(RuntimeError):  # more bytes than a number holds
            return expected_memory(s, vocabulary(s.data), world_size) / 2**30
        return math.inf

    sizes = [s.micro_tokens] if s.micro_tokens else micro_sizes(s)
    size = next((n for n in sizes if need(s, n) <= hardware.room), sizes[-1])
    told = f"{need(s, size):,.1f} GiB are expected, {hardware.name} has {hardware.memory_gib:.1f}"
    if need(s, size) > hardware.memory_gib:
        return s, [], [f"{told}: use {way_to_fit(s, lambda less: need(less) <= hardware.room)}"]
    return replace(s, micro_tokens=size), [] if s.micro_tokens else [f"micro_tokens {size}: {told}"], []

def parse_settings(argv: list[str] | None, world_size: int) -> tuple:
    """Command line -> Settings without `auto`, Hardware, lines about choices. Raises UserError with all faults."""
    parser = build_parser()
    given = vars(parser.parse_args(dashed(sys.argv[1:] if argv is None else argv)))
    if [] in given.values():  # what argparse makes of --muon-lr=--
        parser.error("a flag is given -- as its value")
    hardware = detect_hardware(given.get("device", "auto"))
    size, why = choose_preset(hardware, world_size, given.get("data", "auto"))
    wanted = given.get("preset", "auto")  # or a preset, KIND, KIND-auto
    full = size if wanted == "auto" else f"{wanted.removesuffix('-auto')}-{size}"
    preset = full if wanted not in PRESETS and full in PRESETS else wanted
    others = {name: given.pop(name) for name in OTHERS if name in given}
    s = changed_by(others, Settings(**{**PRESETS.get(preset, {}), **given, "preset": preset}))
    problems = (too_large := size_errors(s)) or field_errors(s) + unread_errors(s, given)
    both = "num_tokens" in others and "iterations" in given
    problems += ["--num_tokens, --iterations: give one"] * both
    notes, auto = [f"preset {preset}: {'asked for' if wanted == preset else why}"], {}
    if not too_large:
        s = with_head_dim(s, given, hardware, world_size, notes)
        s, auto = without_auto(s, hardware, world_size)
    notes += [f"{name} {value}: {reason}" for name, (value, reason) in auto.items() if value]
    notes += busy_cores() if hardware.device == "cpu" else []
    unfit = [] if problems else hyperparameter_errors(s, given, hardware, world_size)
    problems += [] if too_large else run_errors(s, given, hardware) + unfit
    s, more, problems = (s, [], problems) if problems else fitted(s, hardware, world_size)
    if problems:
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    return s, hardware, notes + more

def busy_cores() -> list[str]:
    """A warning where others want the cores: one busy neighbour makes two threads four times slower than one."""
    load = getattr(os, "getloadavg", lambda: (0.0,))()[0]
    cores = os.cpu_count()
    wait = "steps will take longer; --threads 1 loses least"
    found = [f"WARNING: load {load:.1f} on {cores} cores: {wait}"]
    return found if load > cores else []

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

@functools.cache
def divisors(count: int) -> list[int]:
    """All divisors of a number, sorted."""
    small = [n for n in range(1, math.isqrt(count) + 1) if count % n == 0]
    return sorted({*small, *(count // n for n in small)})

def unread_without(s: Settings, name: str) -> str:
    """The setting without which nothing reads this one, if it is not set so; else nothing."""
    conditions = [part.split() for part in bracket(name) if part.startswith("with ")]
    for _, other, *values in conditions:
        value = getattr(s, other)
        if value in values[0].split("|") if values else value:
            return unread_without(s, other)
        return " ".join([f"--{other}", *values]).replace("|", " or ")
    return ""

def unread_errors(s: Settings, given: dict) -> list[str]:
    """A sentence for each given setting that nothing would read, as it belongs to another choice."""
    unread = {name: unread_without(s, name) for name, value in given.items() if value is not False}
    if "gram" in given.get("kernels", "") and s.hidden_optimizer == "adamw":
        unread[f"kernels {s.kernels}: gram"] = "--hidden_optimizer muon"
    return [f"--{name}: has no effect without {other}" for name, other in unread.items() if other]

def run_errors(s: Settings, given: dict, hardware: Hardware) -> list[str]:
    """A sentence for each setting that this machine cannot serve."""
    cuda, fp8 = hardware.device == "cuda", s.fp8_head == "on" or s.fp8_mlp
    asked, mps = given.get("device"), hardware.device == "mps"
    compiler = any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    needs_cuda = s.preset in PRESETS and not s.preset.endswith("cpu") and asked not in ("cpu", "mps")
    unknown = ", ".join(sorted(set(s.kernels.split("+")) - {*KERNELS, "none"}))
    here = cuda and not torch.version.hip or os.environ.get("TRITON_INTERPRET")
    triton = importlib.util.find_spec("triton") and here
    odd = [f"--width {s.width}"] * (s.width % 16 > 0) + [f"--seq_len {n}" for n in s.seq_len if n % 16]
    lengths = *s.seq_len, s.eval_seq_len
    empty = ", ".join(f"--{name}" for name in ("resume", "data", "log_dir") if given.get(name) == "")
    unknown_change = {*allowed_changes(s)} - {*help_texts(), "", "data_fingerprint"}
    tracked = s.tracker == "none" or importlib.util.find_spec("trackers")
    problems = [
        (not tracked, f"--tracker {s.tracker}: trackers.py is not beside it"),
        (empty, f"{empty}: is empty; name something, or leave it out"),
        (s.allow_change and not s.resume, "--allow_change: has no effect without --resume"),
        (unknown_change, f"--allow_change: {', '.join(sorted(unknown_change))}: no such setting"),
        (asked in ("cuda", "mps") and asked != hardware.device,
         f"--device {asked}: this machine has no usable {str(asked).upper()} device; leave the flag out"),
        (mps and (s.compile or s.backend not in ("plain", "sdpa")),
         "--device mps has the plain parts only: add --no-compile --backend plain"),
        (s.backend == "varlen" and not flash_fits(s, hardware, s.dtype == "bf16"),
         "--backend varlen needs an NVIDIA GPU from 8.0 on, --dtype bf16, and a --head_dim "
         f"(here {s.head_dim}) that is a multiple of 8, at most 256: use sdpa"),
        (needs_cuda and not cuda,
         f"--preset {s.preset} needs a CUDA device: use --preset cpu, or add --device cpu"),
        (s.compile and not cuda and not compiler,
         "--compile on a CPU needs a C++ compiler: install g++, or use --no-compile"),
        (unknown, f"--kernels {s.kernels}: {unknown} is none of {', '.join(KERNELS)}; or use none"),
        (s.kernels != "none" and not (triton and (s.dtype == "bf16" or not cuda)),
         f"--kernels {s.kernels} needs Triton, CUDA (or TRITON_INTERPRET=1), --dtype bf16: use none"),
        (fp8 and cuda and not hardware.fp8,
         f"--fp8_head, --fp8_mlp: {hardware.name} has no FP8 (compute capability 8.9): leave out"),
        (fp8 and odd,
         f"{', '.join(odd)}: FP8 needs a multiple of 16; or use --fp8_head off --no-fp8_mlp"),
        (s.backend == "flex" and not (cuda and s.compile),
         "--backend flex trains only compiled and on CUDA (no CPU backward in torch): use sdpa"),
        (s.backend == "flex" and any(n % FLEX_BLOCK for n in lengths),
         f"--seq_len, --eval_seq_len {lengths}: flex needs multiples of {FLEX_BLOCK}"),
    ]
    return [text for wrong, text in problems if wrong]

# ┌─ Files ──────────────────────────────────────────────────────────────────────────────────────┐
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

# ┌─ Data ───────────────────────────────────────────────────────────────────────────────────────┐
# Shards have the public format: 256 int32 (magic, version, token count), then uint16 tokens; documents start with
# the end-of-text token. Every process walks over all rows: their order is the same for any number of processes.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 1024
GPT2_META = {
    "tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256, "splits": {}}

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

class Loader:
    """The batches of a process, each prepared while the one before is in use. `position`: epoch, shard, used tokens."""
    FIRST = {"epoch": 0, "shard": 0, "used": 0}

    def __init__(self, s: Settings, corpus: Corpus, world: World, position=None, step=0):
        self.s, self.corpus, self.world, self.stages = s, corpus, world, stage_table(s)
        self.position = position or self.FIRST
        self.workers = ThreadPoolExecutor(2, "loader")  # a batch, and the next shard's table
        self.table = functools.lru_cache(2)(functools.partial(self.workers.submit, self._make_table))
        self._prepare(step)

    def _prepare(self, step: float):
        """Starts to make the batch of a step; only one is being made at any time."""
        stage = stage_at(self.stages, step)
        self.pending = self.workers.submit(lambda: (self.make_batch(stage), self.position))

    def next(self, step: int, following: float | None = None) -> tuple[Tensor, dict]:
        """The batch of a step on the device, and the position after it; the one at `following`, or step + 1, starts."""
        batch, position = self.pending.result()
        following = step + 1 if following is None else following
        if following < self.s.iterations:
            self._prepare(following)
        # pinned anew: the allocator reuses memory only after the copy; not in a worker: that is GPU 0's
        batch = batch.pin_memory() if self.s.device == "cuda" else batch
        return batch.to(self.s.device, non_blocking=True), position

    def make_batch(self, stage: Stage) -> Tensor:
        """Inputs, targets, document numbers of this process's rows, (micro-steps, 3, rows, T) int32."""
        micro_rows, rows = stage.micro_rows(self.s, self.world.size), []
        for row in range(stage.batch_tokens // stage.seq_len):
            tokens, starts, lengths = self._next_row(stage)
            if row // micro_rows % self.world.size == self.world.rank:
                rows.append(gather_rows(tokens, starts, lengths))
        batch = np.concatenate(rows, axis=1).reshape(3, -1, micro_rows, stage.seq_len)
        for docs_BT in batch[2]:
            check_documents(docs_BT, self.s.backend)
        return torch.from_numpy(np.ascontiguousarray(batch.swapaxes(0, 1)))

    def _next_row(self, stage: Stage) -> tuple:
        """Tokens of the shard, or the next one if too few are left; starts and lengths of the row's pieces."""
        longest = min(stage.max_doc_len or stage.seq_len, stage.seq_len)
        epoch, shard, used = (self.position[key] for key in self.FIRST)
        for _ in range(len(self.corpus.train) + 2):
            turn, next_shard = divmod(shard + 1, len(self.corpus.train))
            table = self.table(epoch, shard, longest)
            self.table(epoch + turn, next_shard, longest)  # made, checked while this is in use
            tokens, *pieces = table.result()
            if row := pack_row(*pieces, used, stage.seq_len):
                starts, lengths, used = row
                self.position = {"epoch": epoch, "shard": shard, "used": used}
                return tokens, starts, lengths
            epoch, shard, used = epoch + turn, next_shard, 0
        raise UserError(f"no shard of {self.corpus.folder} fills a row of {stage.seq_len} tokens: lower --seq_len")

    def _make_table(self, epoch: int, shard: int, longest: int) -> tuple:
        """Tokens of a shard, starts, lengths and ends of its pieces in the order of use."""
        meta, clip = self.corpus.meta, self.s.long_docs == "clip"
        tokens = open_shard(self.corpus.train[shard], meta["vocab_size"])
        rng = np.random.default_rng((self.s.seed, epoch, shard))
        offset = int(rng.integers(longest)) if epoch else 0
        starts, lengths = piece_table(tokens, meta["eot"], longest, clip, offset)
        order = rng.permutation(len(starts)) if self.s.shuffle else slice(None)
        return tokens, starts[order], lengths[order], np.cumsum(lengths[order])

    def close(self):
        self.workers.shutdown(cancel_futures=True)

# ┌─ Checkpoints ────────────────────────────────────────────────────────────────────────────────┐
# RUN/checkpoints/step_000500/ holds state.pt (tensors by parameter name, whole, fp32) and meta.json (settings, place in
# the data, clock, order, sha256 of state.pt). It is written under another name, synced and renamed; then older ones go,
# renamed first: .tmp, or without meta.json, counts for nothing. One of the same step stays, as .old, until that.

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

def find_checkpoint(place: Path, like: dict, num_shards: float) -> tuple[Path, dict, dict, list]:
    """The newest checkpoint built like `like`, its meta.json, state; those told as damaged. Or FileNotFoundError."""
    found, damaged = checkpoints_in(place), []
    for path, meta in found:
        if path.parent != found[0][0].parent:
            break  # another run's
        try:
            state = read_state(path, meta)
            if wrong := misfit(state, like, "state.pt"):
                raise ValueError(wrong)
            check_content(state, meta, num_shards)
            return path, meta, state, damaged
        except ValueError as error:
            damaged.append(path)
            tell_damage(path, error)
    raise FileNotFoundError(f"no whole checkpoint in {place}: start without --resume, or name a run's folder")

def check_content(state: dict, meta: dict, num_shards: float):
    """Raises ValueError for a state that its own meta.json, or the data, contradicts."""
    optimizer = state["optimizer"]
    if optimizer["steps"] != meta["step"] or meta["position"]["shard"] >= num_shards:
        raise ValueError("state.pt is of another step, or of other data")
    if not all(weight.isfinite().all() for weight in optimizer["state"]["master"].values()):
        raise ValueError("state.pt has weights that are not finite")
    state["rng"] = state["rng"].contiguous()
    try:
        torch.Generator().set_state(state["rng"])
    except RuntimeError as error:
        raise ValueError(f"state.pt: {error}") from error

def changed_settings(s: Settings, fingerprint: str, path: Path, meta: dict) -> dict[str, list]:
    """Hyperparameters or data that differ: name -> [then, now]. Raises UserError for those not in --allow-change."""
    names = [field.name for field in fields(Hyperparameters)]
    compared = {name: getattr(s, name) for name in names if "free on resume" not in bracket(name)}
    now = json.loads(json.dumps(compared)) | {"data_fingerprint": fingerprint}
    then = meta["settings"] | {"data_fingerprint": meta["data"]["fingerprint"]}
    changed = {key: [then.get(key), value] for key, value in now.items() if then.get(key) != value}
    if refused := [key for key in changed if key not in allowed_changes(s)]:
        ways = f"use them, start without --resume, or add --allow-change {','.join(refused)}"
        lines = ["{}: {} in the checkpoint, {} now".format(key, *changed[key]) for key in refused]
        raise UserError("\n  ".join([f"{path} has other settings; {ways}:", *lines]))
    return changed

def allowed_changes(s: Settings) -> list[str]:
    return s.allow_change.replace("-", "_").split(",")

# ┌─ Clock, profiler, log files ─────────────────────────────────────────────────────────────────┐
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

def keep_memory():
    """glibc maps a tensor above 32 MiB anew at each use, page by page: from here on it keeps what is freed instead."""
    if "MALLOC_MMAP_MAX_" in os.environ:  # the user's choice
        return
    with contextlib.suppress(AttributeError, OSError, TypeError):  # of macOS, Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: none
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: nothing is given back

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

def make_profiler(s: Settings, world: World, folder: Path):
    """torch.profiler over profile_steps steps: a trace per rank, on CUDA a memory snapshot, too."""
    def report(profiler):
        folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(folder / f"trace_rank{world.rank}.json"))
        if s.device == "cuda":
            torch.cuda.memory._dump_snapshot(str(folder / f"memory_rank{world.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)

    if s.device == "cuda":
        torch.cuda.memory._record_memory_history(max_entries=100_000)
    first = min(1, s.profile_start)
    return torch.profiler.profile(on_trace_ready=report, schedule=torch.profiler.schedule(
        wait=s.profile_start - first, warmup=first, active=s.profile_steps, repeat=1))

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

class RunLog:
    """The console, a tracker, and the files of a run, by rank 0 (docs/running.md)."""
    def __init__(self, folder: Path, lock=None):
        self.main, self.folder, self.tracker, self.lock = False, folder, None, lock
        self.rows, self.failed, self.pipe_closed = [], set(), False

    def open(self, s: Settings, hardware: Hardware, config: dict, resumed_at: int | None, changed: dict):
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
        cpu = (f"Running on CPU: {hardware.name}, {torch.get_num_threads()} threads, {hardware.memory_gib:.1f} GiB, "
               f"{torch.backends.cpu.get_cpu_capability()}, {platform.platform()}")
        gpu = hardware.device == "cuda" and (command_output("nvidia-smi") or hardware.name)
        self.line(f"{source}\n{bar}\nRunning Python {sys.version}\n"
                  f"Running PyTorch {torch.__version__} compiled for CUDA {torch.version.cuda}\n{gpu or cpu}\n"
                  f"Settings: {json.dumps(config['settings'])}\n{bar}")  # the source knows only its defaults

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

# ┌─ Run ────────────────────────────────────────────────────────────────────────────────────────┐
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

STOPS = [  # signals; Windows has two
    number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if (number := getattr(signal, name, None))]

def told_by_all(world: World, value) -> list:
    """The value of each rank. Collective."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values

class Run:
    """What surrounds the training, on every rank. `train` calls the methods from top to bottom."""
    def __init__(self, s: Settings, hardware: Hardware, world: World, notes: list[str]):
        self.s, self.hardware, self.world, self.notes = s, hardware, world, notes
        self.stages, self.clock, self.corpus = stage_table(s), Clock(s.device), open_corpus(s.data)
        self.vocab_size = self.corpus.meta["vocab_size"]
        available = sum(map(shard_length, self.corpus.val)) - 1
        s = replace(s, micro_tokens=min(told_by_all(world, s.micro_tokens)))  # GPUs may differ
        by_preset = PRESETS.get(s.preset, {}).get("eval_tokens", RunSettings.eval_tokens)
        if 0 < available < s.eval_tokens == by_preset:
            notes.append(f"eval_tokens {available}: all that the validation split has")
            s = replace(s, eval_tokens=available)
        self.s, self.stream = s, ValStream(self.corpus, s.eval_tokens, s.eval_seq_len)
        own = self.corpus.fingerprint() if world.local_rank == 0 else None  # once a machine
        self.fingerprint = on_rank_zero(world, lambda: own)
        if own not in (None, self.fingerprint):
            raise UserError(f"{self.corpus.folder} differs from that of the first machine: copy its shards here")
        self.checkpoint, self.meta, self.state, self.changed = None, {}, {}, {}
        self.lock, self.damaged, self.looking = None, [], False
        if s.resume:  # before a model is built that may be another
            known = on_rank_zero(world, lambda: checkpoints_in(resume_place(s), tell=lambda *_: None))
            for found in known[:1]:
                changed_settings(s, self.fingerprint, *found)
        self._set_progress()
        self.status = "done"  # or target, interrupted, nan, error
        self.over = False  # the target is reached, or all ranks know of a signal
        self.stop_signal, self.first_step_s, self.profiler = 0, None, None
        self.compile_s, self.warm_graphs = 0.0, 0
        self.flops = self.worked_ms = 0.0  # as logged
        self.undo = contextlib.ExitStack()

    def _set_progress(self):
        """What is done: as the checkpoint says, or nothing."""
        meta = self.meta
        self.first_step = self.logged_step = self.step = self.saved_step = meta.get("step", 0)
        self.clock.total_ms = self.logged_ms = meta.get("train_time_ms", 0.0)
        self.position = self.step_position = meta.get("position", Loader.FIRST)
        if "data_fingerprint" in self.changed:
            self.position = Loader.FIRST
        schedule = meta.get("schedule") or {"at": float(self.step)}
        self.at = schedule["at"]
        self.left = max(0, math.ceil(self.s.iterations - self.at))  # steps
        if self.s.max_seconds and self.left:
            self.left = schedule.get("left") or self.left  # 0: ended, before --iterations rose
        self.tokens = schedule.get("tokens", 0)
        self.fitted = self.step, self.logged_ms, -math.inf  # of _fit_schedule
        self.val_loss, self.val_step = meta.get("val_loss"), meta.get("val_step") or 0
        self.best_loss = meta.get("best_loss") or 1e9  # of --save-best

    def _resume(self, optimizer):
        """Takes the checkpoint that --resume names. Raises NothingToDo if its run is over. Collective."""
        like = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
        self.checkpoint, self.meta = on_rank_zero(self.world, self._take, like)
        self.changed = changed_settings(self.s, self.fingerprint, self.checkpoint, self.meta)
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

    def open(self, model: nn.Module, optimizer):
        """Opens the run's folder, new or the checkpoint's; prints choices and derived numbers. Collective."""
        if self.s.resume:
            self._resume(optimizer)
        s, corpus, self.counts = self.s, self.corpus, parameter_counts(model)
        commit = command_output("git", "rev-parse", "HEAD")
        changes = command_output("git", "status", "--porcelain", "-uno")
        self.config = {
            "settings": asdict(s), "script": Path(__file__).name, "world_size": self.world.size,
            "git": {"commit": commit, "dirty": None if changes is None else bool(changes)},
            "torch": torch.__version__, "hardware": self.hardware._asdict(),
            "data": {"name": corpus.folder.name, "fingerprint": self.fingerprint, "meta": corpus.meta},
        }
        run_id = on_rank_zero(self.world, lambda: f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}")
        folder = Path(s.log_dir) / s.experiment_name / run_id
        self.log = RunLog(self.checkpoint.parent.parent if self.checkpoint else folder, self.lock)
        self.undo.callback(self.log.close)
        for number in STOPS:  # signals are repeated
            self.undo.callback(signal.signal, number, signal.getsignal(number))
        self.undo.push(self._end_record)
        resumed_at = self.meta.get("step")
        on_rank_zero(self.world, self.log.open, s, self.hardware, self.config, resumed_at, self.changed)
        self.notes += [f"{name}: {then} before, {now} from here on"
                       for name, (then, now) in self.changed.items()]
        self.log.print("\n".join([*self.notes, *self.summary(optimizer), f"run folder: {self.log.folder}"]))
        self.opened = time.perf_counter()

    def summary(self, optimizer) -> list[str]:
        """The derived numbers: data, parameters, layers, stages, memory."""
        s, size = self.s, self.world.size
        kinds = ", ".join(f"{n:,} {kind}" for kind, n in self.counts.items() if kind != "matmul")
        lines = [f"data {self.corpus.folder}: vocabulary {self.vocab_size}", f"parameters: {kinds}"]
        lines += [f"{i}: {layer}" for i, layer in enumerate(layer_table(s))]
        for i, t in enumerate(self.stages):
            rows = t.micro_rows(s, size)
            count = t.batch_tokens // (t.seq_len * rows * size)
            mflops = flops_per_token(s, self.counts, t) / 1e6
            lines.append(f"{i}: {t}: {count} micro-steps of {rows} rows, {mflops:.1f} MFLOPs/token")
        training = f"{sum((t.end - t.start) * t.batch_tokens for t in self.stages):,} training tokens"
        training = f"{s.max_seconds:g} s of training" if s.max_seconds else training
        return [*lines, f"{training}, {self.stream.num_tokens:,} validation tokens, about "
                        f"{expected_memory(s, self.vocab_size, size) / 2**30:.2f} GiB per process"]

    def _log_failure(self, error):
        """What the compiler said, in full; the console has one sentence."""
        if compiler_failed(error):
            self.log.line("".join(traceback.format_exception(error)))
            self.log.print(f"the whole error: {self.log.folder / 'log.txt'}")

    def _end_record(self, kind, error, trace):
        """The end of all logs, however the run ends."""
        if error:
            self.clock.wait = lambda: None  # what the device waits for may never come
            known = re.sub("done|interrupted", "error", self.status)
            self.status = "interrupted" if kind is KeyboardInterrupt else known
            self._log_failure(error)
        ms, loss, counts = self.clock.stop(), self.val_loss, self.counts
        target = (self.step, ms) if self.status == "target" else (None, None)
        rate, speed = 1000 * self.tokens / (ms or math.inf), 1000 / (self.worked_ms or math.inf)
        end = dict(
            event="end", status=self.status, step=self.step, iterations=self.step + self.left,
            val_loss=loss, val_bpb=loss and bits_per_byte(loss, self.corpus.meta), train_time_ms=ms,
            tokens=self.tokens, tokens_per_s=rate or None, params_total=counts["total"],
            params_active=counts["active"], peak_memory_mib=peak_memory_mib(self.s.device)[0],
            mfu=model_flops_utilization(speed, self.flops, self.hardware.name, self.world.size) or None,
            first_step_s=self.first_step_s, compile_s=self.compile_s,
            target_step=target[0], target_time_ms=target[1])
        end |= {"error": explained(error) or repr(error)} if error else {}
        if self.log.main:
            self.log.result(end, self.config)

    def fits(self, attempt) -> bool:
        """Whether `attempt` goes well on all. Lack of memory halves micro_tokens; else raises UserError. Collective."""
        failure = None
        try:
            attempt()
            self.clock.wait()
        except Exception as error:  # noqa: BLE001 - told to all
            if self.world.size == 1 and not out_of_memory(error):
                raise
            self._log_failure(error)
            failure = out_of_memory(error), explained(error) or repr(error)
        gc.collect()
        torch.cuda.empty_cache()
        failures = list(filter(None, told_by_all(self.world, failure)))
        if not failures:
            return True
        lacking, reason = min(failures)
        smaller = micro_sizes(self.s)[1:]
        if not (lacking and smaller):
            raise UserError(reason)
        self.s = replace(self.s, micro_tokens=smaller[0])
        self.config["settings"]["micro_tokens"] = smaller[0]
        for tell in (self.log.print, self.log.line):
            tell(f"micro_tokens {smaller[0]} from here on: {reason}")
        self.log.metric(event="micro_tokens", step=self.step, micro_tokens=smaller[0])
        return False

    def warmed_up(self):
        """Notes what compiling took."""
        self.clock.wait()
        self.compile_s, self.warm_graphs = time.perf_counter() - self.opened, compiled_graphs()
        self.log.print(f"kernels warm after {self.compile_s:.1f} s, {self.warm_graphs} graphs compiled")

    def start(self, optimizer) -> int:
        """The first step: 0, or the checkpoint's, which is loaded. Loader, profiler and signal handlers start."""
        s, step, self.optimizer = self.s, self.first_step, optimizer
        if self.checkpoint:
            saved, self.state = self.state, {}
            optimizer.load_state_dict(saved.get("optimizer", {}))
            optimizer.span = 0, self.at
            torch.set_rng_state(on_rank_zero(self.world, lambda: saved["rng"]))
            self.log.print(f"resumed {self.checkpoint} after step {step}")
        self.loader = Loader(s, self.corpus, self.world, self.position, self.at)
        self.undo.callback(self.loader.close)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, self._on_signal)
        if s.enable_profiling:
            profiler = make_profiler(s, self.world, self.log.folder / "profile")
            self.profiler = self.undo.enter_context(profiler)
        gc.collect()
        gc.disable()  # its pauses are as long as a step (47)
        self.undo.callback(gc.enable)
        self.undo.push(self._on_error)
        return step

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

    def _on_error(self, kind, error, trace):
        """Whatever else ends the loop: the last whole step is saved, if all ranks are here, and the logs end."""
        if error is None or isinstance(error, TrainingStopped):
            return
        self.status, self.position = "error", self.step_position
        self.clock.wait = lambda: None  # what the device waits for may never come
        with contextlib.suppress(OSError, RuntimeError):  # the first error is the one to tell
            whole = getattr(self.optimizer, "steps", self.step) == self.step > self.saved_step
            if whole and self._all_have(error):
                self.save(self.step, self.optimizer)

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

    def next_batch(self, step: int) -> Tensor:
        """The micro-steps of a step, (micro-steps, 3, B, T): inputs, targets, document numbers."""
        self.save_best(step)
        epoch = self.position["epoch"]
        batch, self.position = self.loader.next(step, self.following)
        if self.position["epoch"] != epoch:
            self.log.print(f"step {step + 1}: all training data used, epoch {epoch + 2} begins")
        return batch

    def log_due(self, step: int) -> bool:
        """Whether to log a step: each log_every-th; after a signal, if alone; a 64th of --max-seconds later."""
        self.stage = stage_at(self.stages, self.at)
        self.tokens += self.stage.batch_tokens
        self.step, self.step_position = step, self.position
        self.at, self.left = self.following, self.left - 1
        if self.log.pipe_closed:
            self.stop_signal = self.stop_signal or getattr(signal, "SIGPIPE", signal.SIGTERM)
        if self.first_step_s is None:
            self.clock.wait()
            self.first_step_s = seconds_since_process_start()
        if self.profiler:
            with self.clock.paused():
                self.profiler.step()
        unfitted = self.s.max_seconds and 64 * (self.at - self.fitted[2]) >= self.s.iterations
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

    def log_step(self, step: int, loss: float, **more):
        """A training loss to all logs, with what is known of the steps since the last one."""
        s, stage = self.s, self.stage
        with self.clock.paused() as ms:
            step_ms = (ms - self.logged_ms) / (step - self.logged_step)
        rate, flops = 1000 * stage.batch_tokens / step_ms, flops_per_token(s, self.counts, stage)
        self.flops += (step - self.logged_step) * stage.batch_tokens * flops
        self.worked_ms += ms - self.logged_ms
        self.logged_step, self.logged_ms = step, ms
        mfu = model_flops_utilization(rate, flops, self.hardware.name, self.world.size)
        eta = time.strftime("%H:%M:%S", time.gmtime(self.left * step_ms / 1000))
        percent = "n/a" if mfu is None else f"{100 * mfu:.1f} %"
        console = f"  {step_ms:.1f} ms/step  {rate:,.0f} tokens/s  MFU {percent}  ETA {eta}"
        self._log_loss(step, "train", loss, ms, console, **more, step_ms=step_ms, tokens_per_s=rate, mfu=mfu)

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

    def save(self, step: int, optimizer) -> bool:
        """Writes a checkpoint, outside the clock; False, and a warning, if that failed. Collective."""
        if step == self.saved_step:
            return True
        with self.clock.paused() as ms:
            state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state()}
            meta = self.config | dict(
                position=self.position, train_time_ms=ms, val_loss=self.val_loss, val_step=self.val_step,
                schedule={"at": self.at, "left": self.left, "tokens": self.tokens}, best_loss=self.best_loss)
            weights = state["optimizer"]["state"]["master"].values()  # {} but on rank 0
            finite = on_rank_zero(self.world, lambda: all(x.isfinite().all() for x in weights))
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

    def save_best(self, step: int):
        """Under --save-best, after the best validation so far: a checkpoint, and ckpt_best, a link. Collective."""
        if self.s.save_best and self.val_step == step and self.val_loss and self.val_loss <= self.best_loss:
            self.best_loss, link = self.val_loss, self.log.folder / "ckpt_best"
            if self.save(step, self.optimizer) and self.log.main:
                try:
                    link.unlink(missing_ok=True)
                    link.symlink_to(Path("checkpoints", self.checkpoint.name))
                except OSError as error:  # a file system without links
                    self.log.print(f"warning: ckpt_best: {error}; the best is {self.checkpoint}")

    def finish(self, step: int, optimizer):
        """Last checkpoint, end of the logs. Raises TrainingStopped if it could not be written."""
        s, folder, ms = self.s, self.log.folder, self.clock.stop()
        self.save_best(step)
        saved = self.save(step, optimizer) if self.status == "interrupted" or s.save_last else True
        self._note_validation(step)
        if s.target_loss:
            missed = "" if self.status == "target" else "not "
            self.log.print(f"target loss {s.target_loss} {missed}reached: step {step}, {ms / 1000:.2f} s")
        memory = "peak memory allocated: {} MiB reserved: {} MiB".format(*peak_memory_mib(s.device))
        self.log.line(memory)
        self.log.print(f"{memory}\nlog, metrics and checkpoints: {folder}")
        if not saved:
            raise TrainingStopped(f"the last checkpoint: {self.save_error}; {self.kept()}")
        if s.enable_profiling:
            self._end_profile(step)

    def _end_profile(self, step: int):
        """Has logger.py read the traces. Asserts that the warm-up compiled every graph."""
        s, reader = self.s, Path(__file__).resolve().parent / "logger.py"
        if step - self.first_step < s.profile_start + s.profile_steps:
            self.log.print("profile: incomplete, the run ended before its last step; lower --profile-start")
        elif self.log.main and reader.is_file():
            subprocess.call([sys.executable, str(reader), "profile", str(self.log.folder)])
        else:
            self.log.print(f"traces, for ui.perfetto.dev: {self.log.folder / 'profile'}")
        if s.compile:
            late = compiled_graphs() - self.warm_graphs
            self.log.print(f"graphs compiled after the warm-up: {late}")
            assert not late, "a graph was compiled after the warm-up, inside the training time"

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

def explained(error: BaseException) -> str:
    """A sentence about an error that a user can repair; nothing for one of ours."""
    if out_of_memory(error):
        what = "use a smaller --micro-tokens, and --seq-len, --eval-seq-len if they are as large"
        return f"out of memory: {what} ({(str(error) or repr(error)).splitlines()[0]:.200})"
    if compiler_failed(error):
        said = " ".join(str(getattr(error, "inner_exception", error)).split())
        ways = "--backend sdpa, --kernels none or --no-compile avoid it"
        return f"torch.compile or Triton failed; {ways} ({said:.300})"
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
