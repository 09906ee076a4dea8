"""The GPU benchmark: is every fast part right, and how fast are train_gpt.py and train_moe.py on this GPU? One command,
under 9 minutes.

    python bench/gpu.py --out records/h200 --data data/fineweb10B     # on one GPU; needs no network
    python bench/gpu.py --out try --device cpu --tiny                 # every part in small on a CPU, to test it

Parts, in this order; each has a time limit, and all together --budget seconds:

  equality      every fast part against its plain reference, forward and backward. Both are compared with the reference
                in fp32: a fast part may err 1.5 times as much as the plain one in bf16, or up to a stated tolerance.
  moe_equality  the same of train_moe.py's products with experts, compiled, against its loop over experts, with even and
                uneven loads and idle experts; and whether they give the same bits twice.
  moe_times     forward and backward of these products beside a dense MLP of as much work, in turn.
  moe_steps     the mixtures at `speedrun` size, last stage, 1/8 of its batch, beside the dense control, in turn.
  steps         ms/step, tokens/s, MFU, peak memory and compile time: `speedrun` and `medium` with 1/8 of their batch,
                one GPU's share of eight, stage by stage, and `gpu` with all of it, because it is meant for one card.
  split         where the time of a step goes, by the profiler's kernels; and the update of one rank of eight.
  train         a short run of train_gpt.py, and the same with all fast parts off: losses side by side.
  resume        killed after a checkpoint and resumed: the same losses, bit by bit?
  ablate        the last stage of `speedrun` with each fast part switched off (or on) in turn, in alternating blocks.

A part is a process of its own and consists of rows, which it writes to OUT/PART.json one by one. A row that raises,
crashes or hangs is noted as failed, and a fresh process goes on with the next one. The same command again runs what is
missing or failed; --redo repeats all. OUT/README.md and OUT/gpu.json have everything, OUT/logs what was printed.

--data is text in GPT-2's tokens, for `train` and for the timings. Without it `train` takes the bytes of the standard
library, and the timings random tokens of GPT-2's vocabulary in documents as long as FineWeb's.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402 - after the path
import train_moe  # noqa: E402
from data import common  # noqa: E402
from train_gpt import GPT, MuonAdamW, World  # noqa: E402

SHARE = 8  # one GPU's share of the speedrun's eight
LIMITS = {"equality": 120, "moe_equality": 90, "moe_times": 120, "moe_steps": 300, "steps": 270, "split": 90,
          "train": 120, "resume": 90, "ablate": 300}  # seconds a part
CLEANUP_S = 5  # of the budget, for the report
ALONE = {"steps"}  # a process for each row: memory that an earlier one keeps would count as the next one's
GPT2 = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256}
SMALL = "--num-layers 3 --width 32 --head-dim 16 --value-embeds 1 --attention auto --seq-len 128 --batch-tokens 1024 " \
        "--max-doc-len 64 --window 64 --window-start 32 --window-step 16 --eval-window 0 --eval-seq-len 128 " \
        "--micro-tokens 128 --iterations 60"  # --tiny: three stages of 20 steps
ON_CPU = "--device cpu --dtype fp32 --no-compile --backend sdpa --kernels none --fp8-head off --threads 1"
PLAIN = "--kernels none --fp8-head off"  # all fast parts off that can be off
VARIANTS = {"no kernels": "--kernels none", "no gram kernel": "--kernels mlp+loss", "no mlp kernel":
            "--kernels gram+loss", "no loss kernel": "--kernels gram+mlp", "bf16 head": "--fp8-head off",
            "fp8 mlp": "--fp8-mlp"}
KINDS = ("speed", "mixtral", "deepseek")  # of train_moe.py's presets, what matters most first
ROUTINGS = ("even", "skewed", "idle")


class Skip(Exception):
    """A row cannot run here; the message says why."""


class Bench(NamedTuple):
    """What all rows need to know."""

    out: Path
    data: str  # folder given by --data, or ""
    device: str
    tiny: bool
    cache: Path  # compilers' caches, data sets made here, logs of runs

    def size(self, full: int, small: int) -> int:
        return small if self.tiny else full


Rows = dict[str, Callable[[], dict]]


def elapsed_ms(function: Callable[[], object], device: str) -> float:
    """Time of one call; on CUDA between two events, with the device idle before and after."""
    if device != "cuda":
        began = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - began)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def spread(blocks: list[float]) -> dict:
    """Median, minimum and (max - min) / median of times in ms."""
    middle = median(blocks)
    return {"ms": middle, "ms_min": min(blocks), "spread_percent": 100 * (max(blocks) - min(blocks)) / middle,
            "blocks": len(blocks)}


def counts(b: Bench) -> tuple[int, int, int]:
    """Untimed steps, blocks, steps of a block."""
    return (1, 2, 1) if b.tiny else (4, 7, 5)


def in_turn(b: Bench, base: Callable[[int], float], variant: Callable[[int], float]) -> dict:
    """Two functions that take a number of steps and return ms per step, block by block in turn."""
    _, blocks, size = counts(b)
    timed = [(base(size), variant(size)) for _ in range(blocks)]
    ours, theirs = (spread(list(times)) for times in zip(*timed, strict=True))
    return {"base": ours, "variant": theirs, "ratio": median(v / o for o, v in timed)}


# ----------------------------------------------------------------------------------------------------------------------
# Equality


def run(function, leaves: dict[str, Tensor], weight: Tensor | None, name: str = "out") -> dict[str, Tensor]:
    """Output of a function of `leaves`, and, given the incoming gradient, the gradients of all of them."""
    leaves = {leaf: x.detach().clone().requires_grad_(weight is not None) for leaf, x in leaves.items()}
    out = function(**leaves)
    if weight is not None:
        out.backward(weight.to(out.dtype))
    return {name: out.detach()} | {f"grad {leaf}": x.grad for leaf, x in leaves.items() if x.grad is not None}


def errors(fast: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor], floor: float,
           loss_floor: float | None = None) -> dict:
    """Relative errors ||x - exact|| / ||exact|| of a fast part and of its plain reference, those of the worst tensor.
    ok: each of the fast part's is at most `floor` (of a tensor `losses` loss_floor), or 1.5 times the plain one's. NaN
    never is."""
    found = []
    for name, reference in exact.items():
        norm = reference.double().norm().item() or 1.0
        off = [(x[name].double() - reference.double()) for x in (fast, plain)]
        rel, rel_plain = (x.norm().item() / norm for x in off)
        tolerance = max(loss_floor if loss_floor and name == "losses" else floor, 1.5 * rel_plain)
        found.append({"worst": name, "max_abs": off[0].abs().max().item(), "rel": rel, "rel_plain": rel_plain,
                      "tolerance": tolerance, "ok": rel <= tolerance})
    worst = max(found, key=lambda e: e["rel"] / e["tolerance"] if math.isfinite(e["rel"]) else math.inf)
    return worst | {"ok": all(e["ok"] for e in found), "compared": len(found)}


def check(fast, plain, leaves: dict[str, Tensor], weight: Tensor | None, floor: float, name: str = "out") -> dict:
    """A fast and a plain function on the same tensors, and the plain one on their fp32 copies."""
    exact = run(plain, {leaf: x.float() for leaf, x in leaves.items()}, weight, name)
    return errors(run(fast, leaves, weight, name), run(plain, leaves, weight, name), exact, floor, 5e-3)


def need_kernels(b: Bench):
    if b.device == "cpu" and not os.environ.get("TRITON_INTERPRET"):
        raise Skip("Triton kernels need CUDA, or on a CPU TRITON_INTERPRET=1")


def randn(b: Bench, *shape: int, dtype=torch.bfloat16, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(*shape, device=b.device)).to(dtype)


def check_gram(b: Bench, shape: tuple[int, ...], dtype: torch.dtype, square: bool) -> dict:
    """x x^T, or as in the second product of an iteration: c G G + b G for a symmetric G."""
    need_kernels(b)
    x = randn(b, *shape, dtype=dtype, scale=shape[-1] ** -0.5)
    if square:
        x = x @ x.mT
        x = (x + x.mT) / 2  # a library's product need not be symmetric to the last bit

    def product(x, kernel=False):
        return train_gpt.gram(x, x if square else None, 0.5 if square else 1.0, -2.8 if square else 0.0, kernel)
    with torch.no_grad():
        return check(functools.partial(product, kernel=True), product, {"x": x}, None, 1e-3)


def check_mlp(b: Bench, tokens: int, width: int, dtype: torch.dtype, kernel: bool, fp8: bool) -> dict:
    if kernel:
        need_kernels(b)
    leaves = {"x": randn(b, tokens, width, dtype=dtype), "up": randn(b, 4 * width, width, dtype=dtype,
              scale=0.5 * width**-0.5), "down": randn(b, 4 * width, width, dtype=dtype, scale=0.02)}

    def mlp(x, up, down, kernel=False, fp8=False):
        return train_gpt.mlp_relu2(x, up, down, kernel, fp8)
    return check(functools.partial(mlp, kernel=kernel, fp8=fp8), mlp, leaves, randn(b, tokens, width, dtype=dtype),
                 0.15 if fp8 else 1e-3)


def check_head(b: Bench, tokens: int, width: int, vocab: int, dtype: torch.dtype, losses: int, kernel: bool,
               fp8: bool) -> dict:
    """Soft-capped cross-entropies with several targets and unequal incoming gradients; some targets are IGNORE."""
    if kernel:
        need_kernels(b)
    if kernel and fp8 and b.device == "cpu":
        raise Skip("Triton's interpreter casts to e5m2 with errors of 30 %")
    targets = torch.randint(vocab, (losses, tokens), dtype=torch.int32, device=b.device)
    targets[torch.rand(losses, tokens, device=b.device) < 0.05] = train_gpt.IGNORE
    leaves = {"x": train_gpt.norm(randn(b, tokens, width, dtype=dtype)),
              "weight": randn(b, vocab, width, dtype=dtype, scale=1.5 * width**-0.5)}
    saturated = []

    def head(x, weight, kernel=False, fp8=False):
        out, clipped = train_gpt.head_losses(x, weight, targets, (23.0, 5.0, 7.5), kernel, fp8)
        saturated.append(int(clipped))
        return out
    incoming = torch.tensor([1.0, 0.4, 0.15], device=b.device)[:losses]
    result = check(functools.partial(head, kernel=kernel, fp8=fp8), head, leaves, incoming, 0.1 if fp8 else 2e-3,
                   "losses")
    return result | ({"saturated": saturated[1]} if fp8 else {})


def check_flex(b: Bench, copies: int) -> dict:
    """FlexAttention, compiled, against SDPA with the same rule; `copies` 2: the rows of paired heads."""
    if b.device == "cpu":
        raise Skip("FlexAttention has no backward pass on a CPU")
    length, heads = 4096, 6 // copies
    docs = (torch.rand(1, length, device=b.device) < 1 / 400).cumsum(1).to(torch.int32)
    window = torch.tensor(1024, dtype=torch.int32, device=b.device)
    q, k, v, weight = (randn(b, 1, copies * length, heads, 128) for _ in range(4))

    def flex(q, k, v):
        return train_gpt.attend(q, k, v, train_gpt.block_mask(docs, window, copies), 0.12, "flex")

    def plain(q, k, v):
        return train_gpt.attend(q, k, v, train_gpt.dense_mask(docs, window, copies), 0.12, "sdpa")
    leaves = {"q": train_gpt.norm(q), "k": train_gpt.norm(k), "v": v}
    return check(torch.compile(flex, dynamic=False, fullgraph=True), plain, leaves, weight, 5e-3)


def check_polar(b: Bench, shape: tuple[int, ...], dtype: torch.dtype) -> dict:
    need_kernels(b)

    def polar(x, kernel, dtype):
        return train_gpt.orthogonalize(x, "polar_express", dtype, kernel=kernel)
    leaves = {"x": randn(b, *shape, dtype=torch.float32)}
    with torch.no_grad():
        results = [run(functools.partial(polar, kernel=kernel, dtype=dtype), leaves, None)
                   for kernel, dtype in ((True, dtype), (False, dtype), (False, torch.float32))]
    return errors(*results, 1e-2)


def check_settings(b: Bench, fp8: bool) -> list[train_gpt.Settings]:
    """A model of the speedrun's kind as it trains, plain in the same dtype, and plain in fp32."""
    flags = ["--preset", "speedrun", *(SMALL if b.tiny else "--num-layers 6 --attention auto").split()]
    fast = [*flags, *ON_CPU.split()] if b.device == "cpu" else [*flags, "--fp8-head", "on" if fp8 else "off"]
    s = train_gpt.parse_settings(fast, 1)[0]
    plain = dataclasses.replace(s, kernels="none", fp8_head="off", compile=False, backend="sdpa")
    return [dataclasses.replace(s, compile=True), plain, dataclasses.replace(plain, dtype="fp32")]


def random_model(b: Bench, s: train_gpt.Settings) -> tuple[GPT, MuonAdamW]:
    """A model and its optimizer, the same weights for all dtypes and none of them 0."""
    with torch.device(b.device):  # seconds faster than on the CPU
        model = GPT(s, b.size(GPT2["vocab_size"], 257))
    generator = torch.Generator(b.device).manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator, device=b.device))
    return model, MuonAdamW(model, s, World())


def model_outputs(b: Bench, s: train_gpt.Settings) -> dict[str, Tensor]:
    """Three losses (two further tokens) and the gradients that reach the optimizer; those of all small parameters, some
    of them sums that cancel, count as one vector."""
    model, optimizer = random_model(b, s)
    if s.compile:
        train_gpt.compile_model(model, s)
    generator = torch.Generator(b.device).manual_seed(2)
    shape, last = (2, b.size(2048, 128)), b.size(GPT2["vocab_size"], 257) - 1
    inputs = torch.randint(last, shape, generator=generator, device=b.device, dtype=torch.int32)
    docs = (torch.rand(shape, generator=generator, device=b.device) < 1 / 50).cumsum(1).to(torch.int32)
    targets = train_gpt.future_targets(inputs.roll(-1, dims=1), docs, 2)
    losses = model(inputs, targets, docs, torch.tensor(s.window[-1], dtype=torch.int32, device=b.device))
    (losses * torch.tensor([1.0, 0.4, 0.15], device=b.device)).sum().backward()
    grads = {f"grad {name}": grad for bank in optimizer.banks for name, grad in bank.join(bank.grad).items()}
    small = torch.cat([grads.pop(name).flatten() for name in list(grads) if grads[name].numel() < 10_000 and not b.tiny]
                      or [torch.zeros(1)])
    return {"losses": losses.detach(), "grad of small parameters": small} | grads


def optimizer_outputs(b: Bench, s: train_gpt.Settings) -> dict[str, Tensor]:
    """How far three steps on random gradients move the master weights."""
    _, optimizer = random_model(b, s)
    generator = torch.Generator(b.device).manual_seed(3)
    before = [bank.state["master"].clone() for bank in optimizer.banks]
    for step in (1, 2, 3):
        for bank in optimizer.banks:
            bank.grad.copy_(torch.randn(bank.grad.shape, generator=generator, device=b.device))
            bank.step(1.0, 0.9, step)
    moved = [bank.state["master"] - old for bank, old in zip(optimizer.banks, before, strict=True)]
    return {next(iter(bank.params)): move for bank, move in zip(optimizer.banks, moved, strict=True)}


def equality(b: Bench) -> Rows:
    bf16, fp32, n, d = torch.bfloat16, torch.float32, b.size(8192, 48), b.size(768, 32)
    vocab, matrices = b.size(50304, 256), b.size(24, 2)

    def models(outputs, fp8=False) -> dict:
        return errors(*(outputs(b, s) for s in check_settings(b, fp8)), 0.15 if fp8 else 0.05, 0.01)
    low = "bf16" if b.device == "cuda" else "fp32"
    if b.device == "cpu":
        bf16 = fp32  # Triton's interpreter multiplies the bit patterns of bf16 as integers
    return {
        f"gram kernel, {low}": lambda: check_gram(b, (matrices, d, 4 * d), bf16, False),
        f"gram kernel with addend, {low}": lambda: check_gram(b, (matrices, d, d), bf16, True),
        "gram kernel, odd sizes, fp32": lambda: check_gram(b, (3, 72, 200), fp32, False),
        "polar express, gram kernel": lambda: check_polar(b, (matrices, d, 4 * d), bf16),
        f"mlp kernel, {low}": lambda: check_mlp(b, 2 * n, d, bf16, True, False),
        "mlp kernel, odd sizes, fp32": lambda: check_mlp(b, 77, 48, fp32, True, False),
        "mlp fp8": lambda: check_mlp(b, 2 * n, d, bf16, False, True),
        f"head kernel, 1 loss, {low}": lambda: check_head(b, n, d, vocab, bf16, 1, True, False),
        f"head kernel, 3 losses, {low}": lambda: check_head(b, n, d, vocab, bf16, 3, True, False),
        "head kernel, odd sizes, fp32": lambda: check_head(b, 77, 48, 384, fp32, 3, True, False),
        "head fp8, 1 loss": lambda: check_head(b, n, d, vocab, bf16, 1, False, True),
        "head fp8, 3 losses": lambda: check_head(b, n, d, vocab, bf16, 3, False, True),
        "head kernel and fp8, 3 losses": lambda: check_head(b, n, d, vocab, bf16, 3, True, True),
        "flex, documents and window": lambda: check_flex(b, 1),
        "flex, paired heads": lambda: check_flex(b, 2),
        "optimizer, compiled": lambda: models(optimizer_outputs),
        "model, compiled": lambda: models(model_outputs),
        "model, compiled, fp8 head": lambda: models(model_outputs, True) if b.device == "cuda" else no_fp8_on_cpu(),
    }


def no_fp8_on_cpu():
    raise Skip("the rows of the head cover FP8 on a CPU")


# ----------------------------------------------------------------------------------------------------------------------
# Experts


def kind_settings(b: Bench, kind: str) -> train_moe.Settings:
    """Sizes of a mixture at the speedrun's width."""
    return train_moe.Settings(**train_moe.MIXTURES[kind], width=b.size(768, 32))


def draw_experts(b: Bench, s: train_moe.Settings, tokens: int, routing: str) -> tuple[dict[str, Tensor], Tensor]:
    """Input and weights in bf16, and each token's experts, (N, K): at random, more often the first ones, or never each
    third one."""
    keys = torch.rand(tokens, s.experts, device=b.device)
    if routing == "skewed":
        keys += torch.linspace(1, 0, s.experts, device=b.device)
    if routing == "idle":
        keys[:, ::3] = -1
    leaves = {"x": randn(b, tokens, s.width), "up": randn(b, s.experts, s.width, s.hidden, scale=0.5 * s.width**-0.5),
              "down": randn(b, s.experts, s.hidden, s.width, scale=0.02)}
    return leaves, keys.topk(s.choices).indices


def expert_outputs(b: Bench, kind: str, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients under each routing, for the same bf16 values in any dtype; all but the loop compiled."""
    torch.manual_seed(0)
    s, found = kind_settings(b, kind), {}
    function = train_moe.compiled(train_moe.expert_mlp, dataclasses.replace(s, compile=impl != "loop"))
    for routing in ROUTINGS:
        leaves, experts = draw_experts(b, s, b.size(16384, 48), routing)
        result = run(lambda x, up, down, experts=experts: function(x, up, down, experts, impl),
                     {leaf: x.to(dtype) for leaf, x in leaves.items()}, randn(b, *experts.shape, s.width))
        found |= {f"{routing}, {name}": x for name, x in result.items()}
    return found


def check_experts(b: Bench, kind: str, impl: str) -> dict:
    if impl == "triton":
        need_kernels(b)
    low = torch.float32 if b.device == "cpu" and impl == "triton" else torch.bfloat16  # as in `equality`
    fast, again = (expert_outputs(b, kind, impl, low) for _ in range(2))
    plain, exact = (expert_outputs(b, kind, "loop", dtype) for dtype in (low, torch.float32))
    result, same = errors(fast, plain, exact, 1e-3), all(map(torch.equal, fast.values(), again.values()))
    return result | {"same_twice": same, "ok": result["ok"] and same}


def moe_equality(b: Bench) -> Rows:
    return {f"{kind}, {impl}": functools.partial(check_experts, b, kind, impl)
            for kind in KINDS for impl in ("grouped", "bmm", "triton")}


def timed_product(b: Bench, function, leaves: list[Tensor]) -> Callable[[int], float]:
    """Times a forward and backward pass, as `in_turn` wants it."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    weight = torch.randn_like(function(*leaves))

    def block(steps: int) -> float:
        return elapsed_ms(lambda: [torch.autograd.grad(function(*leaves), leaves, weight) for _ in range(steps)],
                          b.device) / steps
    block(counts(b)[0])
    return block


def time_experts(b: Bench, kind: str, impl: str) -> dict:
    """Evenly loaded experts, sorting included, and the dense MLP, with its kernel, that does as much for a token."""
    if impl == "triton":
        need_kernels(b)
    s, kernel = kind_settings(b, kind), b.device == "cuda"
    leaves, experts = draw_experts(b, s, b.size(49152, 48), "even")  # the tokens of a step of one GPU of eight
    wide = [randn(b, s.choices * s.hidden, s.width, scale=0.02) for _ in range(2)]
    mlp = train_moe.compiled(lambda x, up, down: train_moe.mlp_relu2(x, up, down, kernel, False), s)
    moe = train_moe.compiled(lambda x, up, down: train_moe.expert_mlp(x, up, down, experts, impl), s)
    return in_turn(b, timed_product(b, mlp, [leaves["x"], *wide]), timed_product(b, moe, list(leaves.values())))


def moe_times(b: Bench) -> Rows:
    return {f"{kind}, {impl}": functools.partial(time_experts, b, kind, impl)
            for impl in ("grouped", "triton", "bmm", "loop") for kind in KINDS}


# ----------------------------------------------------------------------------------------------------------------------
# Steps


def timing_data(b: Bench) -> str:
    """--data if its vocabulary is GPT-2's (or the sizes mean nothing), else random tokens, common ones more often, in
    documents as long as FineWeb's: median 403, mean 690 tokens."""
    if b.data and (b.tiny or train_gpt.open_corpus(b.data).meta["vocab_size"] == GPT2["vocab_size"]):
        return b.data
    folder = b.cache / "synthetic"
    if not (folder / "meta.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, splits = np.random.default_rng(0), {}
        for split, count in (("train", b.size(4_000_000, 20_000)), ("val", b.size(500_000, 2_000))):
            tokens = (GPT2["eot"] * rng.random(count) ** 4).astype(np.uint16)
            starts = np.exp(rng.normal(math.log(403), math.sqrt(2 * math.log(690 / 403)), count // 100)).cumsum()
            tokens[np.append(0, starts[starts < count].astype(int))] = GPT2["eot"]
            common.write_shard(common.shard_path(folder, "synthetic", split, 0), tokens)
            splits[split] = {"tokens": count, "bytes": None}
        common.write_meta(folder, name="synthetic", vocab=GPT2, source="random tokens, for timings", splits=splits)
    return str(folder)


def flags_of(b: Bench, preset: str, data: str, share: int = SHARE, *more: str) -> list[str]:
    """Flags of train_gpt.py: a preset with 1/share of its batch."""
    flags = ["--preset", preset, "--data", data, "--log-dir", str(b.cache / "logs"), "--target-loss", "0",
             "--eval-tokens", "0", "--no-save-last", *(SMALL.split() if b.tiny else []),
             *(ON_CPU.split() if b.device == "cpu" else []), *more]
    batch = train_gpt.parse_settings(flags, 1)[0].batch_tokens
    return [*flags, "--batch-tokens", ",".join(str(tokens // share) for tokens in batch)]


class Timed:
    """Lets a trainer be put at any step and timed block by block."""

    script = train_gpt

    @classmethod
    def of(cls, flags: list[str]) -> Timed:
        s, hardware, notes = cls.script.parse_settings(flags, 1)
        torch.set_num_threads(s.threads or torch.get_num_threads())
        return cls(s, hardware, World(), notes)

    def at(self, step: int) -> Timed:
        self.loader.close()
        self.loader, self.at_step = self.script.Loader(self.s, self.corpus, self.world, None, step), step
        return self

    def train(self, steps: int):
        for _ in range(steps):
            self.train_step(self.at_step)
            self.at_step += 1

    def block(self, steps: int) -> float:
        """ms per step of the next steps."""
        return elapsed_ms(lambda: self.train(steps), self.s.device) / steps


class Measured(Timed, train_gpt.Trainer):
    """The trainer as it is, warmed up."""


class Unwarmed(Measured):
    """Compiles in its first step, and only what training needs."""

    def warm_up(self):
        pass


class UnwarmedMoe(Timed, train_moe.Trainer):
    """The same of train_moe.py."""

    script, warm_up = train_moe, Unwarmed.warm_up


def rates(t: Timed, stage: train_gpt.Stage, ms: float) -> dict:
    """What follows from the time of a step."""
    rate, flops = 1000 * stage.batch_tokens / ms, t.script.flops_per_token(t.s, t.counts, stage)
    return {"tokens_per_s": rate, "flops_per_token": flops,
            "mfu": train_gpt.model_flops_utilization(rate, flops, t.hardware.name, 1)}


def measure_stage(b: Bench, t: Measured, stage: train_gpt.Stage) -> dict:
    """Times in the middle of a stage, where the window has its mean, and at its end, where FLOPs are counted."""
    warm, blocks, steps = counts(b)
    if b.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    timed = {}
    for place, step in (("middle", (stage.start + stage.end) // 2), ("end", stage.end - warm - blocks * steps)):
        t.at(max(stage.start, step)).train(warm)
        timed[place] = spread([t.block(steps) for _ in range(blocks)])
    memory, reserved = train_gpt.peak_memory_mib(b.device)
    shape = {"start_step": stage.start, "end_step": stage.end} | {n: getattr(stage, n) for n in stage._fields[2:]}
    return {**shape, **timed, **rates(t, stage, timed["end"]["ms"]), "memory_mib": memory, "reserved_mib": reserved}


def measure_preset(b: Bench, preset: str, share: int) -> dict:
    t = Measured.of(flags_of(b, preset, timing_data(b), share))
    result = {"share": share, "warm_up_s": t.compile_s or None, "data": t.corpus.folder.name}
    result["lines"] = {f"stage {i}": measure_stage(b, t, stage) for i, stage in enumerate(t.stages, 1)}
    t.loader.close()
    if not t.losses.isfinite().all():
        raise RuntimeError("the training loss is not finite")
    return result


def steps(b: Bench) -> Rows:
    return {"speedrun": lambda: measure_preset(b, "speedrun", SHARE), "gpu": lambda: measure_preset(b, "gpu", 1),
            "medium": lambda: measure_preset(b, "medium", SHARE)}


def last_stage(b: Bench) -> list[str]:
    """Flags of the speedrun's last stage alone, at its full window."""
    flags = flags_of(b, "speedrun", timing_data(b))
    s = train_gpt.parse_settings(flags, 1)[0]
    for name in train_gpt.STAGED:
        flags += [f"--{name.replace('_', '-')}", str(getattr(s, name)[-1])]
    return [*flags, "--stage-ends", "1.0", "--window-start", "0", "--kernels", s.kernels, "--fp8-head", s.fp8_head]


def ready(b: Bench, flags: list[str]) -> tuple[UnwarmedMoe, int]:
    """A trainer that has compiled, and the MiB that a step of its own takes at most beside what was there before."""
    gc.collect()  # the trainer before
    held = torch.cuda.memory_allocated() >> 20 if b.device == "cuda" else 0
    t = UnwarmedMoe.of(flags).at(0)
    t.train(counts(b)[0])
    if b.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    t.train(1)
    return t, train_gpt.peak_memory_mib(b.device)[0] - held


def moe_steps(b: Bench) -> Rows:
    """Each kind of mixture beside the dense control, which is train_gpt.py's model."""
    flags, small = last_stage(b), ["--moe-layers", "DMM"] if b.tiny else []
    dense = functools.cache(lambda: ready(b, [*flags, "--num-experts", "0"]))

    def compare(kind: str, impl: str) -> dict:
        if impl == "triton":
            need_kernels(b)
        both = dense(), ready(b, [*flags, "--preset", f"{kind}-speedrun", "--moe-impl", impl, *small])
        timed = in_turn(b, *(t.block for t, _ in both))
        both[1][0].loader.close()
        if not all(t.losses.isfinite().all() for t, _ in both):
            raise RuntimeError("the training loss is not finite")
        control, mixture = (timed[name] | rates(t, t.stages[0], timed[name]["ms"]) | {"memory_mib": memory}
                            for name, (t, memory) in zip(("base", "variant"), both, strict=True))
        return {"lines": {"": mixture | {"ratio": timed["ratio"]}, "dense beside it": control}}
    rows = [(kind, impl) for some in (KINDS[:2], KINDS[2:]) for impl in ("grouped", "triton") for kind in some]
    return {f"{kind}, {impl}": functools.partial(compare, kind, impl) for kind, impl in [*rows, ("mixtral", "loop")]}


# ----------------------------------------------------------------------------------------------------------------------
# Split

MATMUL = re.compile(r"aten::(mm|addmm|bmm|baddbmm|_scaled_mm|matmul|linear)(\.|$)")
NAMES = (  # by the name of a kernel or operator; the first match counts
    ("communication", r"nccl|gloo"), ("data", r"memcpy htod"), ("attention", r"flex|attention|flash|fmha"),
    ("head + loss", r"nll_loss|log_softmax|cross_entropy|head|loss|logit"), ("MLP", r"relu|mlp"),
    ("optimizer", r"gram|muon|adamw|baddbmm"), ("embedding", r"embedding|index_put|index_add"),
)


def classify(name: str, dims: list, span: str, width: int, hidden: int, vocab: int) -> str:
    """Part of a step that a kernel belongs to: the annotated span that launched it (optimizer, data), else its name,
    else, for matrix products, the sizes of the operands. Fused element-wise kernels that tell nothing are `other`."""
    text = name.lower()
    if span and not re.search(NAMES[0][1], text):
        return span
    for part, pattern in NAMES:
        if re.search(pattern, text):
            return part
    sizes = {n for shape in dims for n in (shape if isinstance(shape, list) else [])}
    return "head + loss" if vocab in sizes else "MLP" if hidden in sizes else "attention" if width in sizes else "other"


def work_items(trace: dict) -> list[tuple[str, list, str, float, float]]:
    """Name, operand sizes if a matrix product, span, start and own duration in us of all kernels of a Chrome trace; of
    all CPU operators, each without those it calls, where there are no kernels."""
    events = [e | {"args": e.get("args", {})} for e in trace["traceEvents"] if e.get("ph") == "X"]
    spans = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith("bench:")]
    operators = [e for e in events if e.get("cat") == "cpu_op"]
    called = {e["args"].get("External id"): e for e in operators}
    launches = {e["args"].get("correlation"): e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver")}

    def span_of(e: dict) -> str:
        inside = (s["name"][6:] for s in spans if s["tid"] == e["tid"] and s["ts"] <= e["ts"] <= s["ts"] + s["dur"])
        return next(inside, "")

    def dims_of(e: dict) -> list:
        return e["args"].get("Input Dims", []) if MATMUL.match(e["name"]) else []
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if kernels:
        return [(e["name"], dims_of(called.get(e["args"].get("External id"), e)),
                 span_of(launches.get(e["args"].get("correlation"), e)), e["ts"], e["dur"]) for e in kernels]
    own, open_calls = {id(e): e["dur"] for e in operators}, {}
    for e in sorted(operators, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_calls.setdefault(e["tid"], [])
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
            stack.pop()
        if stack:
            own[id(stack[-1])] -= e["dur"]
        stack.append(e)
    return [(e["name"], dims_of(e), span_of(e), e["ts"], max(0.0, own[id(e)])) for e in operators]


def split_trace(trace: dict, steps: int, width: int, hidden: int, vocab: int) -> dict:
    """ms per step by part, the time that the device was busy, and the largest kernels that belong to no part."""
    items, parts, other = work_items(trace), {}, {}
    for name, dims, span, _, duration in items:
        part = classify(name, dims, span, width, hidden, vocab)
        parts[part] = parts.get(part, 0.0) + duration / 1000 / steps
        if part == "other":
            other[name] = other.get(name, 0.0) + duration / 1000 / steps
    total, busy = sum(parts.values()), train_gpt.covered([(start, start + time) for *_, start, time in items])
    lines = {part: {"ms": ms, "percent": 100 * ms / total} for part, ms in sorted(parts.items(), key=lambda p: -p[1])}
    return {"lines": lines, "busy_ms": busy / 1000 / steps,
            "other_ms": dict(sorted(other.items(), key=lambda p: -p[1])[:10])}


def profile_step(b: Bench) -> dict:
    """Steps at the end of the speedrun's last stage, first timed, then profiled."""
    def annotated(call, part: str):
        def inside(*args):
            with torch.profiler.record_function(f"bench:{part}"):
                return call(*args)
        return inside
    t, n, (warm, blocks, size) = Measured.of(flags_of(b, "speedrun", timing_data(b))), 3, counts(b)
    t.at(t.s.iterations - warm - blocks * size - n).train(warm)
    timed = spread([t.block(size) for _ in range(blocks)])
    t.optimizer.step, t.loader.next = annotated(t.optimizer.step, "optimizer"), annotated(t.loader.next, "data")
    with torch.profiler.profile(record_shapes=True) as profiler:
        profiled_ms = t.block(n)
    t.loader.close()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiler.export_chrome_trace(file.name)
        trace = json.loads(Path(file.name).read_text())
    sizes = t.s.width, t.s.width * t.s.mlp_ratio, t.model.lm_head.size(0)
    return {"warm_up_s": t.compile_s or None, "step": timed, "profiled_ms": profiled_ms} | split_trace(trace, n, *sizes)


def time_update(b: Bench, ranks: int) -> dict:
    """The update of what rank 0 of several owns, in the speedrun's shape; nothing is communicated."""
    s = train_gpt.parse_settings(flags_of(b, "speedrun", timing_data(b)), 1)[0]
    with torch.device(b.device):
        model = GPT(s, b.size(GPT2["vocab_size"], 257))
    banks = MuonAdamW(model, s, World(0, 0, ranks)).banks
    for bank in banks:
        bank.grad.normal_()
        bank.send_weights = lambda: None

    def update(times: int = 1):
        for step in range(1, times + 1):
            for bank in banks:
                bank.step(1.0, 0.95, step)
    update(3)
    _, blocks, size = counts(b)
    return spread([elapsed_ms(lambda: update(2 * size), b.device) / (2 * size) for _ in range(blocks)])


def split(b: Bench) -> Rows:
    return {"profile": lambda: profile_step(b), "optimizer of 1": lambda: time_update(b, 1),
            f"optimizer of {SHARE}": lambda: time_update(b, SHARE)}


# ----------------------------------------------------------------------------------------------------------------------
# Train, resume, ablate


def training_data(b: Bench) -> str:
    """--data, or the bytes of the standard library."""
    if not b.data and not (b.cache / "stdlib" / "meta.json").exists():
        subprocess.run([sys.executable, str(ROOT / "data/stdlib.py"), "--out", str(b.cache / "stdlib")], check=True)
    return b.data or str(b.cache / "stdlib")


def launch(b: Bench, name: str, flags: list[str]) -> subprocess.Popen:
    """train_gpt.py in a process of its own, printing to OUT/logs/NAME.txt; its folder of runs is empty before."""
    if "--resume" not in flags:
        shutil.rmtree(b.cache / "logs" / name, ignore_errors=True)
    command = [sys.executable, str(ROOT / "train_gpt.py"), *flags, "--experiment-name", name]
    with open(b.out / "logs" / f"{name}.txt", "w", encoding="utf-8") as log:  # a pipe would live as long as compilers
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)


def finish(b: Bench, name: str, process: subprocess.Popen) -> list[dict]:
    """Waits for a run, copies its logs to OUT/logs, and returns its metrics. Raises RuntimeError if it failed."""
    process.wait()
    folder = next((b.cache / "logs" / name).glob("*/"), None)
    for file in ("log.txt", "metrics.jsonl") if folder else ():
        shutil.copy(folder / file, b.out / "logs" / f"{name}_{file}")
    if process.returncode:
        printed = (b.out / "logs" / f"{name}.txt").read_text(encoding="utf-8", errors="replace")
        last = (printed.strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"train_gpt.py ended with code {process.returncode}: {last}")
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def val_tokens(data: str, most: int) -> int:
    """Validation tokens of a data set, at most so many."""
    return min(most, train_gpt.ValStream(train_gpt.open_corpus(data), 0, 1).num_tokens)


def train_once(b: Bench, name: str, *more: str) -> dict:
    """300 steps of the speedrun with 1/8 of its batch, and the rates that go with it (divided by the square root)."""
    data, number = training_data(b), b.size(300, 6)
    flags = flags_of(b, "speedrun", data, SHARE, "--iterations", str(number), "--eval-every", str(number // 3), *more)
    rates = train_gpt.parse_settings(flags, 1)[0].stage_lr
    flags += ["--stage-lr", ",".join(f"{rate / math.sqrt(SHARE):.4f}" for rate in rates)]
    flags += ["--eval-tokens", str(val_tokens(data, 1 << 20))]
    metrics = finish(b, name, launch(b, name, flags))
    keys = ("val_loss", "train_time_ms", "tokens_per_s", "peak_memory_mib", "compile_s", "status")
    end = next(m for m in reversed(metrics) if m.get("event") == "end")
    losses = {m["step"]: m["val_loss"] for m in metrics if "event" not in m and m.get("val_loss") is not None}
    return {"data": Path(data).name, "steps": number, "val_losses": losses} | {key: end.get(key) for key in keys}


def train(b: Bench) -> Rows:
    return {"fast": lambda: train_once(b, "train_fast"), "plain": lambda: train_once(b, "train_plain", *PLAIN.split())}


def losses_by_step(metrics: list[dict]) -> dict[str, float]:
    """Training losses and the final validation loss; of a step that was run twice, the later one."""
    losses = {f"train {m['step']}": m["train_loss"] for m in metrics if m.get("train_loss") is not None}
    return losses | {"val": next(m["val_loss"] for m in reversed(metrics) if m.get("event") == "end")}


def kill_and_resume(b: Bench) -> dict:
    """Kills a run after its first checkpoint, goes on from there, and compares with a run that was left alone. Where
    they differ, a second run that was left alone tells whether the hardware repeats itself at all."""
    number, half, data = b.size(40, 8), b.size(20, 4), training_data(b)
    model = [] if b.tiny else "--num-layers 4 --value-embeds 2 --batch-tokens 16384".split()
    flags = flags_of(b, "gpu", data, 1, *model, "--iterations", str(number), "--save-every", str(half),
                     "--log-every", "1", "--eval-every", "0")
    flags += ["--eval-tokens", str(val_tokens(data, 65536))]
    whole = losses_by_step(finish(b, "resume_straight", launch(b, "resume_straight", flags)))
    process, saved = launch(b, "resume_killed", flags), f"*/checkpoints/step_{half:06d}"
    while process.poll() is None and not list((b.cache / "logs/resume_killed").glob(saved)):
        time.sleep(0.01)
    process.kill()
    process.wait()
    checkpoint = next((b.cache / "logs/resume_killed").glob(saved), None)
    if checkpoint is None:
        raise RuntimeError(f"the run wrote no checkpoint after step {half} and ended with code {process.returncode}")
    resume = [*flags, "--resume", str(checkpoint)]
    after = losses_by_step(finish(b, "resume_killed", launch(b, "resume_killed", resume)))
    shutil.rmtree(checkpoint.parent)  # gigabytes
    difference = max(abs(after[key] - whole[key]) for key in whole)
    result = {"ok": difference == 0, "steps": number, "killed_after": half, "max_difference": difference}
    if difference:
        again = losses_by_step(finish(b, "resume_again", launch(b, "resume_again", flags)))
        result["run_to_run_difference"] = max(abs(again[key] - whole[key]) for key in whole)
    return result


def resume(b: Bench) -> Rows:
    return {"kill and resume": lambda: kill_and_resume(b)}


def ablate(b: Bench) -> Rows:
    """A variant beside the settings as they are, both in the last stage's shape, block by block in turn."""
    flags = last_stage(b)
    base = functools.cache(lambda: Unwarmed.of(flags))

    def compare(change: str) -> dict:
        gc.collect()  # the variant before
        both = [base(), Unwarmed.of([*flags, *change.split()])]
        for t in both:
            t.at(0).train(counts(b)[0])
        timed = in_turn(b, *(t.block for t in both))
        both[1].loader.close()
        return {"flags": change} | timed
    variants = {"plain attention": "--backend plain"} if b.device == "cpu" else VARIANTS
    return {name: functools.partial(compare, change) for name, change in variants.items()}


PARTS: dict[str, Callable[[Bench], Rows]] = {
    part.__name__: part
    for part in (equality, moe_equality, moe_times, moe_steps, steps, split, train, resume, ablate)}


# ----------------------------------------------------------------------------------------------------------------------
# Worker: one part in its own process


def read_part(out: Path, part: str) -> dict:
    """What OUT/PART.json says; that of a part never started if there is none, or a damaged one."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((out / f"{part}.json").read_text(encoding="utf-8"))
    return {"part": part, "status": "not run", "seconds": 0.0, "now": None, "later": [], "rows": {}}


def write_json(path: Path, value: dict):
    path.with_suffix(".tmp").write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(path.with_suffix(".tmp"), path)


def work(b: Bench, part: str) -> int:
    """Runs the rows that have no result yet; ends after the first one that raises, because what it leaves on the device
    must not touch the next one. Returns 1 if another process has to go on."""
    if b.device == "cpu":  # inductor takes half a minute there; this traces and differentiates the same graphs
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    state, rows = read_part(b.out, part), PARTS[part](b)
    missing = [name for name in rows if name not in state["rows"]]
    for name in sorted(missing, key=lambda name: name in state["later"]):
        state["now"] = name
        write_json(b.out / f"{part}.json", state)
        began, error = time.perf_counter(), None
        try:
            result = rows[name]()
        except Skip as reason:
            result = {"skipped": str(reason)}
        except Exception as problem:  # noqa: BLE001 - becomes the row's result
            traceback.print_exc()
            error = problem
            result = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        state["rows"][name], state["now"] = result | {"seconds": time.perf_counter() - began}, None
        write_json(b.out / f"{part}.json", state)
        print(f"{name}: {json.dumps(result)}", flush=True)
        if error is not None or (part in ALONE and not b.tiny):
            return int(error is not None or len(state["rows"]) < len(rows))
    return 0


# ----------------------------------------------------------------------------------------------------------------------
# All parts


def worker_command(b: Bench, part: str) -> list[str]:
    flags = ["--out", str(b.out), "--device", b.device, "--cache", str(b.cache), "--part", part]
    return [sys.executable, str(Path(__file__).resolve()), *flags, *(["--data", b.data] if b.data else []),
            *(["--tiny"] if b.tiny else [])]


def stop(process: subprocess.Popen):
    """Ends a worker and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def call_worker(b: Bench, part: str, seconds: float) -> int | None:
    """Exit code of one worker process; None if it was ended at its time limit."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(b.cache / "inductor"), "TRITON_CACHE_DIR": str(b.cache / "triton")}
    with open(b.out / "logs" / f"{part}.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(worker_command(b, part), stdout=log, stderr=subprocess.STDOUT,
                                   env=os.environ | caches, start_new_session=True)
        try:
            return process.wait(timeout=max(0.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            stop(process)


def run_part(b: Bench, part: str, seconds: float) -> dict:
    """Calls workers until every row has a result or the time is over. Rows that failed in an earlier call come last."""
    began, state = time.perf_counter(), read_part(b.out, part)
    state["later"] = [name for name, row in state["rows"].items() if "error" in row]
    state["rows"] = {name: row for name, row in state["rows"].items() if "error" not in row}
    state |= {"status": "running", "now": None}
    write_json(b.out / f"{part}.json", state)
    if part == "steps" and not state["rows"]:  # its compile times are those from an empty cache
        for name in ("inductor", "triton"):
            shutil.rmtree(b.cache / name, ignore_errors=True)
    code, problem = 1, ""
    while code and not problem:
        known = len(state["rows"])
        code = call_worker(b, part, seconds - (time.perf_counter() - began))
        state = read_part(b.out, part)
        cut = "cut off by the time limit" if code is None else f"the process died with code {code}"
        if state["now"]:
            state["rows"][state["now"]], state["now"] = {"error": cut}, None
        if code is None or (code and len(state["rows"]) == known):
            problem = cut
        write_json(b.out / f"{part}.json", state)
    bad = [name for name, row in state["rows"].items() if "error" in row]
    state["status"] = problem or (f"{len(bad)} row(s) failed" if bad else "done")
    state["seconds"] += time.perf_counter() - began
    write_json(b.out / f"{part}.json", state)
    return state


def run_parts(b: Bench, parts: list[str], budget: float) -> int:
    """All parts within the budget; 0 if each is done and every equality holds."""
    end, complete = time.perf_counter() + budget - CLEANUP_S, True
    for part in parts:
        state, left = read_part(b.out, part), end - time.perf_counter()
        if state["status"] == "done":
            print(f"{part}: already done", flush=True)
        elif left <= 0:
            print(f"{part}: skipped, the budget of {budget:g} s is used up; run the same command again", flush=True)
        else:
            state = run_part(b, part, min(left, LIMITS[part]))
            print(f"{part}: {state['status']}, {len(state['rows'])} rows, {state['seconds']:.1f} s", flush=True)
        for name, row in state["rows"].items():
            if "error" in row or row.get("ok") is False:
                print(f"  {name}: {row.get('error', 'NOT EQUAL')}", flush=True)
                complete = False
        complete &= state["status"] == "done"
        write_report(b)
    print(f"report: {b.out / 'README.md'}")
    return 0 if complete else 1


# ----------------------------------------------------------------------------------------------------------------------
# Report


def about(b: Bench) -> dict:
    """Machine, versions and commit."""
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    with contextlib.suppress(ImportError):
        import triton
        versions["triton"] = triton.__version__
    return {"date": time.strftime("%Y-%m-%d"), "device": b.device, "tiny": b.tiny, "data": Path(b.data).name or None,
            "gpu": torch.cuda.get_device_name() if b.device == "cuda" else None,
            "name, driver, memory": train_gpt.command_output(*query) if b.device == "cuda" else None,
            "cpu": train_gpt.detect_hardware("cpu").name, **versions,
            "commit": train_gpt.command_output("git", "rev-parse", "HEAD"),
            "uncommitted changes": bool(train_gpt.command_output("git", "status", "--porcelain", "-uno"))}


# Columns of a part's table: heading, where the value is in a row's result, its format. Times are medians of blocks.
COLUMNS = {
    "equality": (("worst tensor", "worst", ""), ("of", "compared", ""), ("max abs error", "max_abs", ".1e"),
                 ("relative error", "rel", ".1e"), ("plain part's", "rel_plain", ".1e"),
                 ("allowed", "tolerance", ".1e"), ("equal", "ok", "")),
    "moe_times": (("dense MLP, ms", "base.ms", ".3f"), ("experts, ms", "variant.ms", ".3f"),
                  ("experts / dense", "ratio", ".3f"), ("spread %", "variant.spread_percent", ".1f")),
    "moe_steps": (("ms/step", "ms", ".2f"), ("mixture / dense", "ratio", ".3f"), ("min", "ms_min", ".2f"),
                  ("spread %", "spread_percent", ".1f"), ("tokens/s", "tokens_per_s", ",.0f"), ("MFU", "mfu", ".1%"),
                  ("FLOPs/token", "flops_per_token", ".3g"), ("peak MiB", "memory_mib", ",d")),
    "steps": (("batch", "share", "1/{}"), ("tokens/step", "batch_tokens", ",d"), ("window at end", "window", ",d"),
              ("ms/step, middle of stage", "middle.ms", ".2f"), ("ms/step, end", "end.ms", ".2f"),
              ("min", "end.ms_min", ".2f"), ("spread %", "end.spread_percent", ".1f"),
              ("tokens/s, end", "tokens_per_s", ",.0f"), ("MFU, end", "mfu", ".1%"), ("peak MiB", "memory_mib", ",d"),
              ("reserved MiB", "reserved_mib", ",d"), ("compile and warm-up, cold, s", "warm_up_s", ".1f")),
    "split": (("ms/step", "ms", ".2f"), ("% of device time", "percent", ".1f"), ("device busy ms", "busy_ms", ".2f"),
              ("step ms", "step.ms", ".2f"), ("step ms, profiled", "profiled_ms", ".2f"),
              ("compile and warm-up, warm, s", "warm_up_s", ".1f"), ("spread %", "spread_percent", ".1f")),
    "train": (("data", "data", ""), ("steps", "steps", ""), ("val loss, nats/token", "val_loss", ".4f"),
              ("by step", "val_losses", ".4f"), ("train time ms", "train_time_ms", ",.0f"),
              ("tokens/s", "tokens_per_s", ",.0f"), ("peak MiB", "peak_memory_mib", ",d"),
              ("compile s", "compile_s", ".1f")),
    "resume": (("steps", "steps", ""), ("killed after", "killed_after", ""), ("losses equal", "ok", ""),
               ("largest difference", "max_difference", ".1e"),
               ("of two undisturbed runs", "run_to_run_difference", ".1e")),
    "ablate": (("flags", "flags", ""), ("ms/step as is", "base.ms", ".2f"), ("variant", "variant.ms", ".2f"),
               ("variant / as is", "ratio", ".3f"), ("spread %", "base.spread_percent", ".1f")),
}
COLUMNS["moe_equality"] = (*COLUMNS["equality"], ("twice the same", "same_twice", ""))


def results(state: dict) -> dict[str, dict]:
    """The rows that ran."""
    return {name: row for name, row in state["rows"].items() if "error" not in row and "skipped" not in row}


def cell(row: dict, place: str, form: str) -> str:
    """A value of a row, formatted; `place` names keys of nested dictionaries."""
    value = functools.reduce(lambda part, key: (part or {}).get(key), place.split("."), row)
    if value is None:
        return "-"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {part:{form}}" for key, part in value.items())
    text = form.format(value) if "{" in form else f"{value:{form}}" if form else str(value)
    return text if value is not False else f"**{text}**"


def table(part: str, state: dict) -> list[str]:
    """Markdown: a line for each row that ran, or one for each of its `lines` (stages, parts of a step)."""
    lines = [f"| | {' | '.join(heading for heading, *_ in COLUMNS[part])} |", "|" + "---|" * (len(COLUMNS[part]) + 1)]
    for name, row in results(state).items():
        for line, values in row.get("lines", {"": {}}).items():
            cells = [cell(row | values, place, form) for _, place, form in COLUMNS[part]]
            lines.append(f"| {', '.join(filter(None, (name, line)))} | {' | '.join(cells)} |")
    return [*lines, ""] if len(lines) > 2 else []


def derived(states: dict[str, dict]) -> list[str]:
    """What follows from several rows."""
    ran, lines = {part: results(state) for part, state in states.items()}, []
    if {"profile", "optimizer of 1", f"optimizer of {SHARE}"} <= ran["split"].keys():
        step, one, own = (ran["split"]["profile"]["step"]["ms"], ran["split"]["optimizer of 1"]["ms"],
                          ran["split"][f"optimizer of {SHARE}"]["ms"])
        lines.append(f"- optimizer with {SHARE} ranks, nothing communicated: {own:.2f} ms, "
                     f"{100 * own / (step - one + own):.1f} % of a step that is otherwise the same")
    if {"fast", "plain"} <= ran["train"].keys():
        change = ran["train"]["fast"]["val_loss"] - ran["train"]["plain"]["val_loss"]
        lines.append(f"- final validation loss with the fast parts, minus that without: {change:+.4f}")
    return [*lines, ""]


def write_report(b: Bench):
    """OUT/gpu.json and OUT/README.md, from what all parts have left so far."""
    states, facts = {part: read_part(b.out, part) for part in PARTS}, about(b)
    write_json(b.out / "gpu.json", {"about": facts, "parts": states})
    where = "timings of this CPU" if b.device == "cpu" else facts["gpu"]
    lines = [f"# bench/gpu.py: {where}" + (", --tiny: sizes that mean nothing" if b.tiny else ""), "",
             *(f"- {key}: {value}" for key, value in facts.items()), *derived(states)]
    for part, state in states.items():
        lines += [f"## {part}: {state['status']}, {state['seconds']:.0f} s", "", *table(part, state)]
        if profile := results(state).get("profile"):
            lines += ["Largest of `other`: " + cell(profile, "other_ms", ".2f") + " ms", ""]
        lines += [f"- {name}: {row.get('skipped') or row['error']}" for name, row in state["rows"].items()
                  if "skipped" in row or "error" in row] + [""]
    (b.out / "README.md").write_text("\n".join(lines), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# Main


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results are written")
    parser.add_argument("--data", default="", metavar="PATH", help="data set in GPT-2's tokens, name or folder")
    parser.add_argument("--parts", default=",".join(PARTS), metavar="A,B", help="default: %(default)s")
    parser.add_argument("--budget", type=float, default=520, metavar="S", help="seconds for all (default: %(default)s)")
    parser.add_argument("--redo", action="store_true", help="forget what is done")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to test this script")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", default=Path(tempfile.gettempdir()) / "bench_gpu_cache",
                        help="compilers' caches, data made here (default: %(default)s)")
    parser.add_argument("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser


def prepare(args: argparse.Namespace) -> tuple[Bench, list[str]]:
    """Checks the options and makes the folders. Raises ValueError or FileNotFoundError with one sentence."""
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(f"--parts {args.parts}: {', '.join(unknown)} is none of {', '.join(PARTS)}")
    if args.device == "cpu" and not args.tiny:
        raise ValueError("--device cpu only tests this script: add --tiny")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no usable CUDA device; --device cpu --tiny tests the script without one")
    if args.budget <= 0:
        raise ValueError(f"--budget {args.budget:g}: must be above 0 seconds")
    if args.data:
        args.data = str(train_gpt.open_corpus(args.data).folder.resolve())
    b = Bench(args.out.resolve(), args.data, args.device, args.tiny, args.cache.resolve())
    for folder in (b.out / "logs", b.cache):
        folder.mkdir(parents=True, exist_ok=True)
    if args.redo:
        for part in parts:
            (b.out / f"{part}.json").unlink(missing_ok=True)
    return b, parts


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        b, parts = prepare(args)
        return work(b, args.part) if args.part else run_parts(b, parts, args.budget)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on with what is missing", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
