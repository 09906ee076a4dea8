"""The GPU benchmark: is every fast part right, and how fast are train_gpt.py and train_moe.py on this GPU? One command;
after --budget seconds, the same again goes on.

    python bench/gpu.py --out records/h200 --data data/fineweb10B     # on one GPU; needs no network
    python bench/gpu.py --out try --device cpu --tiny                 # every part in small on a CPU, to test it

Parts, in this order; each has a time limit, and all together --budget seconds. Those that time nothing run first, as
many at the same time as the GPU has memory for:

  compile_*     the programs of the timed parts, from an empty cache, each in a process of its own.
  equality      every fast part against its plain reference, forward and backward. Both are compared with the reference
                in fp32: a fast part may err 1.5 times as much as the plain one in bf16, or up to a stated tolerance.
  moe_equality  the same of train_moe.py's products with experts, compiled, against its loop over experts, with even and
                uneven loads and idle experts; and whether they give the same bits twice.
  resume        a run that goes on from a checkpoint: the same losses, bit by bit?
  steps         ms/step, tokens/s, MFU, peak memory: `speedrun` and `medium` with 1/8 of their batch, one GPU's share of
                eight, each stage by itself, and `gpu` with all of it, because it is meant for one card.
  moe_steps     the mixtures in `speedrun`'s largest stage, 1/8 of its batch, beside the dense control, in turn.
  ablate        the largest stage of `speedrun` with each fast part switched off (or on) in turn, in alternating blocks;
                seven programs to compile, so only if --parts names it.

A part is a process of its own and consists of rows, which it writes to OUT/PART.json one by one. A row that raises,
crashes or hangs is noted as failed, and a fresh process goes on. The same command again runs what is missing or failed;
--redo repeats all. OUT/README.md and OUT/gpu.json have everything, OUT/logs what was printed. --data is text in GPT-2's
tokens; without it there are random tokens in documents as long as FineWeb's.
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
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
from bench import common  # noqa: E402
from data import common as shards  # noqa: E402
from train_gpt import GPT, MuonAdamW, World  # noqa: E402

SHARE = 8  # one GPU's share of the speedrun's eight
# Seconds a part may take.
LIMITS = {"equality": 240, "moe_equality": 120, "moe_steps": 240, "steps": 240, "resume": 240, "ablate": 300}
COMPILE_LIMIT, COMPILE_GIB = 240, 38  # seconds, memory of the GPU for each of those that run at the same time
CLEANUP_S = 5  # of the budget, for the report
ALONE = {"steps"}  # a process for each row: memory that an earlier one keeps would count as the next one's
GPT2 = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256}
# --tiny: three stages of 20 steps
SMALL = """--num-layers 3 --width 32 --head-dim 16 --value-embeds 1 --attention auto --seq-len 128 --batch-tokens 1024
--max-doc-len 64 --window 64 --window-start 32 --window-step 16 --eval-window 0 --eval-seq-len 128
--micro-tokens 128 --iterations 60 --qk-dim 12 --ngram-rows 512 --pointer 8 --candidates 128""".split()
ON_CPU = "--device cpu --dtype fp32 --no-compile --backend sdpa --kernels none --fp8-head off --threads 1".split()
VARIANTS = {
    "no kernels": "--kernels none",
    "no gram kernel": "--kernels mlp+loss",
    "no mlp kernel": "--kernels gram+loss",
    "no loss kernel": "--kernels gram+mlp",
    "bf16 head": "--fp8-head off",
    "fp8 mlp": "--fp8-mlp",
}
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

# --- Equality

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
    """x x^T, or an iteration of Muon's: a x + b G x + c G G x with G = x x^T."""
    need_kernels(b)
    x = randn(b, *shape, dtype=dtype, scale=shape[-1] ** -0.5)

    def product(x, kernel=False):
        if square:
            return train_gpt.quintic(x, 3.3, -2.4, 0.5, kernel)
        return train_gpt.fused_gram(x, None, 1.0, 0.0, 0.0) if kernel else x @ x.mT
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

def check_settings(b: Bench, fp8: bool) -> list[train_gpt.Settings]:
    """A model of the speedrun's kind as it trains, plain in the same dtype, and plain in fp32."""
    small = "--num-layers 6 --attention auto --ngram-rows 65536".split()
    flags = ["--preset", "speedrun", *(SMALL if b.tiny else small)]
    fast = [*flags, *ON_CPU] if b.device == "cpu" else [*flags, "--fp8-head", "on" if fp8 else "off"]
    s = train_gpt.parse_settings(fast, 1)[0]
    plain = dataclasses.replace(s, kernels="none", fp8_head="off", compile=False, backend="sdpa")
    return [dataclasses.replace(s, compile=True), plain, dataclasses.replace(plain, dtype="fp32")]

def random_model(b: Bench, s: train_gpt.Settings) -> tuple[GPT, MuonAdamW]:
    """A model and its optimizer, the same weights for all dtypes and none of them 0."""
    with torch.device(b.device):  # seconds faster than on the CPU
        model = GPT(s, b.size(GPT2["vocab_size"], 257)).to(b.device)  # some buffers are made on the CPU
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
        if fp8 and b.device == "cpu":
            raise Skip("the rows of the head cover FP8 on a CPU")
        return errors(*(outputs(b, s) for s in check_settings(b, fp8)), 0.15 if fp8 else 0.05, 0.01)
    low = "bf16" if b.device == "cuda" else "fp32"
    if b.device == "cpu":
        bf16 = fp32  # Triton's interpreter multiplies the bit patterns of bf16 as integers
    return {
        f"gram kernel, {low}": lambda: check_gram(b, (matrices, d, 4 * d), bf16, False),
        f"gram kernel with addend, {low}": lambda: check_gram(b, (matrices, d, d), bf16, True),
        "gram kernel, odd sizes, fp32": lambda: check_gram(b, (3, 72, 200), fp32, False),
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
        "model, compiled, fp8 head": lambda: models(model_outputs, True),
    }

# --- Experts

def kind_settings(b: Bench, kind: str) -> train_moe.Settings:
    """Sizes of a mixture at the speedrun's width."""
    return train_moe.Settings(**train_moe.MIXTURES[kind], width=b.size(768, 32))

def draw_experts(b: Bench, s: train_moe.Settings, tokens: int, routing: str) -> tuple[dict[str, Tensor], Tensor]:
    """Input, weights and gates; each token's experts, (N, K): any, more often the first ones, or never each third."""
    keys = torch.rand(tokens, s.num_experts, device=b.device)
    if routing == "skewed":
        keys += torch.linspace(1, 0, s.num_experts, device=b.device)
    if routing == "idle":
        keys[:, ::3] = -1
    up = randn(b, s.num_experts, s.width, s.hidden, scale=0.5 * s.width**-0.5)
    down = randn(b, s.num_experts, s.hidden, s.width, scale=0.02)
    gates = randn(b, tokens, s.top_k).float()
    leaves = {"x": randn(b, tokens, s.width), "up": up, "down": down, "gates": gates}
    return leaves, keys.topk(s.top_k).indices

def expert_outputs(b: Bench, kind: str, impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and gradients under each routing, for the same bf16 values in any dtype; all but the loop compiled."""
    torch.manual_seed(0)
    s, found = kind_settings(b, kind), {}
    function = train_moe.compiled(train_moe.expert_mlp, dataclasses.replace(s, compile=impl != "loop"))
    for routing in ROUTINGS:
        leaves, experts = draw_experts(b, s, b.size(16384, 48), routing)
        result = run(lambda x, up, down, gates, experts=experts: function(x, up, down, gates, experts, impl),
                     {leaf: x.to(x.dtype if leaf == "gates" else dtype) for leaf, x in leaves.items()},
                     randn(b, *leaves["x"].shape))
        found |= {f"{routing}, {name}": x for name, x in result.items()}
    return found

def check_experts(b: Bench, kind: str, impl: str) -> dict:
    fast, again = (expert_outputs(b, kind, impl, torch.bfloat16) for _ in range(2))
    plain, exact = (expert_outputs(b, kind, "loop", dtype) for dtype in (torch.bfloat16, torch.float32))
    result, same = errors(fast, plain, exact, 1e-3), all(map(torch.equal, fast.values(), again.values()))
    return result | {"same_twice": same, "ok": result["ok"] and same}

def moe_equality(b: Bench) -> Rows:
    return {f"{kind}, {impl}": functools.partial(check_experts, b, kind, impl)
            for kind in KINDS for impl in ("grouped", "bmm")}

# --- Steps

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
            shards.write_shard(shards.shard_path(folder, "synthetic", split, 0), tokens)
            splits[split] = {"tokens": count, "bytes": None}
        shards.write_meta(folder, name="synthetic", vocab=GPT2, source="drawn", made_with="bench/gpu.py", splits=splits)
    return str(folder)

def flags_of(b: Bench, preset: str, data: str, share: int = SHARE, *more: str) -> list[str]:
    """Flags of train_gpt.py: a preset with 1/share of its batch."""
    flags = ["--preset", preset, "--data", data, "--log-dir", str(b.cache / "logs"), "--target-loss", "0",
             "--eval-tokens", "0", "--no-save-last", *(SMALL if b.tiny else []),
             *(ON_CPU if b.device == "cpu" else []), *more]
    if not b.tiny:  # the rows that one of so many owns
        flags += ["--ngram-rows", str(train_gpt.PRESETS[preset]["ngram_rows"] // share)]
    batch = train_gpt.parse_settings(flags, 1)[0].batch_tokens
    return [*flags, "--batch-tokens", ",".join(str(tokens // share) for tokens in batch)]

class Timed:
    """A model in training that can be put at any step and timed block by block: the script's `train` without logs."""

    def __init__(self, script, flags: list[str]):
        s, self.hardware, _ = script.parse_settings(flags, 1)
        torch.set_num_threads(s.threads or torch.get_num_threads())
        began = time.perf_counter()
        self.script, self.s, self.stages, self.corpus = script, s, script.stage_table(s), script.open_corpus(s.data)
        self.model = script.GPT(s, self.corpus.meta["vocab_size"], script.World()).to(s.device)
        self.counts = script.parameter_counts(self.model)
        self.optimizer = script.MuonAdamW(self.model, s, script.World())
        script.compile_model(self.model, s)
        self.window = torch.zeros((), dtype=torch.int32, device=s.device)
        self.loss = torch.zeros((), device=s.device)  # sum of all steps
        self.loader = None
        self.at(0).train(1)  # compiles
        self.loss.item()  # waits
        self.first_step_s = time.perf_counter() - began

    def at(self, step: int) -> Timed:
        self.close()
        self.loader = self.script.Loader(self.s, self.corpus, self.script.World(), None, step)
        self.step = step
        return self

    def close(self):
        if self.loader:
            self.loader.close()

    def train(self, steps: int):
        for _ in range(steps):
            self.train_step(self.step)
            self.step += 1

    def train_step(self, step: int):
        script, s, stages = self.script, self.s, self.stages
        stage = script.stage_at(stages, step)
        micro_steps, _ = self.loader.next(step)
        self.window.fill_(script.window_at(s, stages, step))
        self.model.candidates = stage.candidates
        weights = [w / stage.batch_tokens for w in script.future_weights(stages, step)]
        for i, batch in enumerate(micro_steps):
            self.optimizer.last_micro_step = i == len(micro_steps) - 1
            self.model.turn.fill_(script.candidate_turn(s, stage, script.World(), step, i))
            loss = common.micro_step(script, self.model, self.optimizer, batch, self.window, weights, (step, i))
            self.loss += loss / stage.batch_tokens
        scale, others = (script.lr_scale(s, stages, step, x) for x in (s.cooldown, s.cooldown_others or s.cooldown))
        self.optimizer.step(scale, script.momentum_at(s, step), others)

    def block(self, steps: int) -> float:
        """ms per step of the next steps."""
        return elapsed_ms(lambda: self.train(steps), self.s.device) / steps

    def check(self):
        """Raises RuntimeError if a loss was not finite."""
        if not self.loss.isfinite():
            raise RuntimeError("the training loss is not finite")

def rates(t: Timed, stage, ms: float) -> dict:
    """What follows from the time of a step."""
    rate, flops = 1000 * stage.batch_tokens / ms, t.script.flops_per_token(t.s, t.counts, stage)
    mfu = train_gpt.model_flops_utilization(rate, flops, t.hardware.name, 1)
    return {"tokens_per_s": rate, "flops_per_token": flops, "mfu": mfu}

def measure_stage(b: Bench, t: Timed, stage) -> dict:
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

def measure_program(b: Bench, flags: list[str]) -> dict:
    """Times of one stage, by itself."""
    t = Timed(train_gpt, flags)
    found = measure_stage(b, t, t.stages[0])
    t.close()
    t.check()
    return found | {"first_step_s": t.first_step_s, "data": t.corpus.folder.name}

def stage_flags(b: Bench, preset: str, number: int | None = None) -> list[str]:
    """Flags of one stage of a preset alone, counted from 1, with one GPU's share of the batch; without a number, of the
    stage with the most tokens."""
    flags = flags_of(b, preset, timing_data(b), 1 if preset == "gpu" else SHARE)
    s = train_gpt.parse_settings(flags, 1)[0]
    stages = train_gpt.stage_table(s)
    most = max(stages, key=lambda stage: stage.batch_tokens * (stage.end - stage.start))
    i = stages.index(most) if number is None else number - 1
    for name in train_gpt.staged_settings():
        values = getattr(s, name)
        flags += [f"--{name.replace('_', '-')}", str(values[min(i, len(values) - 1)])]
    window = 0 if number is None else stages[i].window_start  # 0: at its full window from the start
    steps = stages[i].end - stages[i].start
    flags += ["--stage-ends", "1.0", "--iterations", str(steps), "--window-start", str(window)]
    return [*flags, "--extension", "0", "--kernels", s.kernels, "--fp8-head", s.fp8_head]

def programs() -> dict[str, tuple]:
    """What is compiled and timed: a script, and its flags given a Bench."""
    presets = "speedrun", "gpu", "medium"
    stages = {preset: len(train_gpt.PRESETS[preset].get("stage_ends", (1.0,))) for preset in presets}
    timed = {f"{preset}_{i}": (train_gpt, functools.partial(stage_flags, preset=preset, number=i))
             for preset, count in stages.items() for i in range(1, count + 1)}
    return timed | {kind: (train_moe, functools.partial(moe_flags, kind=kind)) for kind in ("dense", *KINDS)}

def steps(b: Bench) -> Rows:
    return {name: lambda flags=flags: measure_program(b, flags(b)) for name, (script, flags) in programs().items()
            if script is train_gpt}

def ready(b: Bench, flags: list[str]) -> tuple[Timed, int]:
    """A trainer that has compiled, and the MiB that a step of its own takes at most beside what was there before."""
    gc.collect()  # the trainer before
    held = torch.cuda.memory_allocated() >> 20 if b.device == "cuda" else 0
    t = Timed(train_moe, flags)
    if b.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    t.train(counts(b)[0])
    return t, train_gpt.peak_memory_mib(b.device)[0] - held

def moe_flags(b: Bench, kind: str) -> list[str]:
    """Flags of train_moe.py for a mixture, or the dense control, in the stage with the most tokens."""
    small = ["--moe-layers", "DMM"] if b.tiny else []
    mixture = ["--preset", f"{kind}-speedrun", "--moe-impl", "grouped", *small]
    return [*stage_flags(b, "speedrun"), *(["--num-experts", "0"] if kind == "dense" else mixture)]

def moe_steps(b: Bench) -> Rows:
    """Each kind of mixture beside the dense control, which is train_gpt.py's model."""
    dense = functools.cache(lambda: ready(b, moe_flags(b, "dense")))

    def compare(kind: str) -> dict:
        both = dense(), ready(b, moe_flags(b, kind))
        timed = in_turn(b, *(t.block for t, _ in both))
        both[1][0].close()
        for t, _ in both:
            t.check()
        control, mixture = (timed[name] | rates(t, t.stages[0], timed[name]["ms"]) | {"memory_mib": memory}
                            for name, (t, memory) in zip(("base", "variant"), both, strict=True))
        return {"lines": {"": mixture | {"ratio": timed["ratio"]}, "dense beside it": control}}

    return {kind: functools.partial(compare, kind) for kind in KINDS}

# --- Resume, ablate

def run_script(b: Bench, name: str, flags: list[str]) -> dict[str, float]:
    """Losses of a run of train_gpt.py, whose logs go to OUT/logs: of a step that was run twice, the later one; and the
    final validation loss. Raises RuntimeError if it failed."""
    command = [sys.executable, str(ROOT / "train_gpt.py"), *flags, "--experiment-name", "resume"]
    printed = b.out / "logs" / f"{name}.txt"
    with open(printed, "w", encoding="utf-8") as log:  # a pipe would live as long as compilers
        code = subprocess.call(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if code:
        last = (printed.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"])[-1]
        raise RuntimeError(f"train_gpt.py ended with code {code}: {last}")
    (file,) = (b.cache / "logs/resume").glob("*/metrics.jsonl")
    shutil.copy(file, b.out / "logs" / f"{name}_metrics.jsonl")
    metrics = common.read_lines(file)
    losses = {f"train {m['step']}": m["train_loss"] for m in metrics if m.get("train_loss") is not None}
    return losses | {"val": next(m["val_loss"] for m in reversed(metrics) if m.get("event") == "end")}

def go_on(b: Bench) -> dict:
    """Goes on from the first checkpoint of a run, and compares with what that run itself made of it. Where they differ,
    the same run once more tells whether the hardware repeats itself at all."""
    number, half = b.size(40, 8), b.size(20, 4)
    model = [] if b.tiny else "--num-layers 4 --value-embeds 2 --batch-tokens 16384".split()
    often = f"--iterations {number} --save-every {half} --log-every 1 --eval-every 0 --eval-tokens {b.size(65536, 512)}"
    flags = [*flags_of(b, "gpu", timing_data(b), 1, *model), *often.split()]
    shutil.rmtree(b.cache / "logs/resume", ignore_errors=True)
    whole = run_script(b, "straight", flags)
    (checkpoint,) = (b.cache / "logs/resume").glob(f"*/checkpoints/step_{half:06d}")
    after = run_script(b, "resumed", [*flags, "--resume", str(checkpoint)])
    shutil.rmtree(b.cache / "logs/resume")  # gigabytes
    difference = max(abs(after[key] - whole[key]) for key in whole)
    result = {"ok": difference == 0, "steps": number, "resumed_after": half, "max_difference": difference}
    if difference:
        again = run_script(b, "again", flags)
        result["run_to_run_difference"] = max(abs(again[key] - whole[key]) for key in whole)
    return result

def compile_program(b: Bench, name: str) -> dict:
    """Compiles what a timed program needs, and leaves it in the compilers' caches."""
    script, flags = programs()[name]
    t = Timed(script, flags(b))
    t.close()
    t.check()
    return {"first_step_s": t.first_step_s, "graphs": train_gpt.compiled_graphs()}

def compile_parts() -> dict[str, Callable[[Bench], Rows]]:
    """A part for each program, which a process of its own compiles."""
    return {f"compile_{name}": lambda b, name=name: {name: lambda: compile_program(b, name)} for name in programs()}

def resume(b: Bench) -> Rows:
    return {"from a checkpoint": lambda: go_on(b)}

def ablate(b: Bench) -> Rows:
    """A variant beside the settings as they are, both in the last stage's shape, block by block in turn."""
    flags = stage_flags(b, "speedrun")
    base = functools.cache(lambda: Timed(train_gpt, flags))

    def compare(change: str) -> dict:
        gc.collect()  # the variant before
        both = [base(), Timed(train_gpt, [*flags, *change.split()])]
        for t in both:
            t.at(0).train(counts(b)[0])
        timed = in_turn(b, *(t.block for t in both))
        both[1].close()
        return {"flags": change} | timed

    variants = {"plain attention": "--backend plain"} if b.device == "cpu" else VARIANTS
    return {name: functools.partial(compare, change) for name, change in variants.items()}

UNTIMED = compile_parts() | {part.__name__: part for part in (equality, moe_equality, resume)}
PARTS: dict[str, Callable[[Bench], Rows]] = UNTIMED | {part.__name__: part for part in (steps, moe_steps, ablate)}

# --- Worker: one part in its own process

def read_part(out: Path, part: str) -> dict:
    """What OUT/PART.json says; that of a part never started if there is none, or a damaged one."""
    with contextlib.suppress(OSError, json.JSONDecodeError):
        return json.loads((out / f"{part}.json").read_text(encoding="utf-8"))
    return {"part": part, "status": "not run", "seconds": 0.0, "now": None, "later": [], "rows": {}}

def write_part(out: Path, state: dict):
    common.write_json(out / f"{state['part']}.json", state, indent=1)

def run_row(row: Callable[[], dict]) -> dict:
    """What a row finds, why it was skipped, or the error that it raised."""
    try:
        return row()
    except Skip as reason:
        return {"skipped": str(reason)}
    except Exception as error:  # noqa: BLE001 - becomes the row's result
        traceback.print_exc()
        first = str(error).strip().splitlines()[:1]
        return {"error": f"{type(error).__name__}: {''.join(first)}"}

def work(b: Bench, part: str) -> int:
    """Runs the rows that have no result yet; ends after the first one that raises, because what it leaves on the device
    must not touch the next one. Returns 1 if another process has to go on."""
    if b.device == "cpu":  # inductor takes half a minute there; this traces and differentiates the same graphs
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    state, rows = read_part(b.out, part), PARTS[part](b)
    left = [name for name in rows if name not in state["rows"]]
    for name in sorted(left, key=lambda name: name in state["later"]):
        state["now"] = name
        write_part(b.out, state)
        began = time.perf_counter()
        result = run_row(rows[name])
        state["rows"][name], state["now"] = result | {"seconds": time.perf_counter() - began}, None
        write_part(b.out, state)
        print(f"{name}: {json.dumps(result)}", flush=True)
        if "error" in result or (part in ALONE and not b.tiny):
            return int("error" in result or len(state["rows"]) < len(rows))
    return 0

# --- All parts

def worker_command(b: Bench, part: str) -> list[str]:
    flags = ["--out", str(b.out), "--device", b.device, "--cache", str(b.cache), "--part", part]
    more = [*(["--data", b.data] if b.data else []), *(["--tiny"] if b.tiny else [])]
    return [sys.executable, str(Path(__file__).resolve()), *flags, *more]

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
            common.stop_group(process)

def run_part(b: Bench, part: str, seconds: float) -> dict:
    """Calls workers until every row has a result or the time is over. Rows that failed in an earlier call come last."""
    began, state = time.perf_counter(), read_part(b.out, part)
    state["later"] = [name for name, row in state["rows"].items() if "error" in row]
    state["rows"] = {name: row for name, row in state["rows"].items() if "error" not in row}
    state |= {"status": "running", "now": None}
    write_part(b.out, state)
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
        write_part(b.out, state)
    bad = sum("error" in row for row in state["rows"].values())
    state["status"] = problem or (f"{bad} row(s) failed" if bad else "done")
    state["seconds"] += time.perf_counter() - began
    write_part(b.out, state)
    return state

def beside(b: Bench) -> int:
    """How many of the parts that time nothing run at the same time."""
    if b.device == "cpu":
        return 1
    return max(1, torch.cuda.get_device_properties().total_memory // (COMPILE_GIB << 30))

def run_parts(b: Bench, parts: list[str], budget: float) -> int:
    """All parts within the budget; 0 if each is done and every equality holds."""
    end, one_writes = time.perf_counter() + budget - CLEANUP_S, threading.Lock()
    if all(read_part(b.out, part)["status"] == "not run" for part in PARTS):  # compile times are from empty caches
        for name in ("inductor", "triton"):
            shutil.rmtree(b.cache / name, ignore_errors=True)

    def run_one(part: str) -> bool:
        state, left = read_part(b.out, part), end - time.perf_counter()
        if state["status"] == "done":
            print(f"{part}: already done", flush=True)
        elif left <= 0:
            print(f"{part}: skipped, the budget of {budget:g} s is used up; run the same command again", flush=True)
        else:
            state = run_part(b, part, min(left, LIMITS.get(part, COMPILE_LIMIT)))
            print(f"{part}: {state['status']}, {len(state['rows'])} rows, {state['seconds']:.1f} s", flush=True)
        wrong = {name: row for name, row in state["rows"].items() if "error" in row or row.get("ok") is False}
        for name, row in wrong.items():
            print(f"  {name}: {row.get('error', 'NOT EQUAL')}", flush=True)
        with one_writes:
            write_report(b)
        return state["status"] == "done" and not wrong

    with ThreadPoolExecutor(beside(b)) as pool:
        complete = list(pool.map(run_one, [part for part in parts if part in UNTIMED]))
    complete += [run_one(part) for part in parts if part not in UNTIMED]
    print(f"report: {b.out / 'README.md'}")
    return 0 if all(complete) else 1

# --- Report

def about(b: Bench) -> dict:
    """Machine, versions and commit."""
    command = train_gpt.command_output
    query = "nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"
    return {"date": time.strftime("%Y-%m-%d"), "device": b.device, "tiny": b.tiny, "data": Path(b.data).name or None,
            "gpu": torch.cuda.get_device_name() if b.device == "cuda" else None,
            "name, driver, memory": command(*query) if b.device == "cuda" else None,
            "cpu": train_gpt.detect_hardware("cpu").name, "torch": torch.__version__, "cuda": torch.version.cuda,
            "python": platform.python_version(), "commit": command("git", "rev-parse", "HEAD"),
            "uncommitted changes": bool(command("git", "status", "--porcelain", "-uno"))}

# Columns of a part's table: heading, where the value is in a row's result, its format. Times are medians of blocks.
COLUMNS = {
    "equality": "worst tensor|worst|; of|compared|; max abs error|max_abs|.1e; relative error|rel|.1e; "
                "plain part's|rel_plain|.1e; allowed|tolerance|.1e; equal|ok|; twice the same|same_twice|",
    "moe_steps": "ms/step|ms|.2f; mixture / dense|ratio|.3f; min|ms_min|.2f; spread %|spread_percent|.1f; "
                 "tokens/s|tokens_per_s|,.0f; MFU|mfu|.1%; FLOPs/token|flops_per_token|.3g; peak MiB|memory_mib|,d",
    "steps": "tokens/step|batch_tokens|,d; classes|candidates|; window at end|window|,d; "
             "ms/step, middle of stage|middle.ms|.2f; ms/step, end|end.ms|.2f; min|end.ms_min|.2f; "
             "spread %|end.spread_percent|.1f; tokens/s, end|tokens_per_s|,.0f; MFU, end|mfu|.1%; "
             "peak MiB|memory_mib|,d; reserved MiB|reserved_mib|,d; warm start, s|first_step_s|.1f",
    "resume": "steps|steps|; resumed after|resumed_after|; losses equal|ok|; largest difference|max_difference|.1e; "
              "of two undisturbed runs|run_to_run_difference|.1e",
    "ablate": "flags|flags|; ms/step as is|base.ms|.2f; variant|variant.ms|.2f; variant / as is|ratio|.3f; "
              "spread %|base.spread_percent|.1f",
}
COLUMNS["moe_equality"] = COLUMNS["equality"]
COLUMNS |= dict.fromkeys(compile_parts(), "to the end of the first step, s|first_step_s|.1f; graphs|graphs|")

def results(state: dict) -> dict[str, dict]:
    """The rows that ran."""
    return {name: row for name, row in state["rows"].items() if "error" not in row and "skipped" not in row}

def cell(row: dict, place: str, form: str) -> str:
    """A value of a row, formatted; `place` names keys of nested dictionaries."""
    value = functools.reduce(lambda part, key: (part or {}).get(key), place.split("."), row)
    if value is None:
        return "-"
    text = form.format(value) if "{" in form else f"{value:{form}}" if form else str(value)
    return text if value is not False else f"**{text}**"

def table(part: str, state: dict) -> list[str]:
    """Markdown: a line for each row that ran, or one for each of its `lines` (stages, a control)."""
    columns, rows = [column.split("|") for column in COLUMNS[part].split("; ")], []
    for name, row in results(state).items():
        for line, values in row.get("lines", {"": {}}).items():
            cells = [cell(row | values, place, form) for _, place, form in columns]
            rows.append([", ".join(filter(None, (name, line))), *cells])
    return [common.markdown(["", *(heading for heading, *_ in columns)], rows), ""] if rows else []

def write_report(b: Bench):
    """OUT/gpu.json and OUT/README.md, from what all parts have left so far."""
    states, found = {part: read_part(b.out, part) for part in PARTS}, about(b)
    common.write_json(b.out / "gpu.json", {"about": found, "parts": states}, indent=1)
    where = "timings of this CPU" if b.device == "cpu" else found["gpu"]
    lines = [f"# bench/gpu.py: {where}" + (", --tiny: sizes that mean nothing" if b.tiny else ""), "",
             *(f"- {key}: {value}" for key, value in found.items()), ""]
    for part, state in states.items():
        lines += [f"## {part}: {state['status']}, {state['seconds']:.0f} s", "", *table(part, state)]
        lines += [f"- {name}: {row.get('skipped') or row['error']}" for name, row in state["rows"].items()
                  if "skipped" in row or "error" in row] + [""]
    (b.out / "README.md").write_text("\n".join(lines), encoding="utf-8")

# --- Command line

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="where results are written")
    add("--data", default="", metavar="PATH", help="data set in GPT-2's tokens, name or folder")
    usual = ",".join(part for part in PARTS if part != "ablate")
    add("--parts", default=usual, metavar="A,B", help="default: %(default)s")
    add("--budget", type=float, default=560, metavar="S", help="seconds for all (default: %(default)s)")
    add("--redo", action="store_true", help="forget what is done")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="small sizes, to test this script")
    add("--cache", type=Path, metavar="FOLDER", default=Path(tempfile.gettempdir()) / "bench_gpu_cache",
        help="compilers' caches, data made here (default: %(default)s)")
    add("--part", choices=tuple(PARTS), help=argparse.SUPPRESS)
    return parser.parse_args(argv)

def prepare(args: argparse.Namespace) -> tuple[Bench, list[str]]:
    """Checks the options and makes the folders. Raises ValueError or FileNotFoundError with one sentence."""
    parts = common.words(args.parts, PARTS, "--parts")
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
    for part in parts if args.redo else ():
        (b.out / f"{part}.json").unlink(missing_ok=True)
    return b, parts

def benchmark(args: argparse.Namespace, _command: str) -> int:
    b, parts = prepare(args)
    return work(b, args.part) if args.part else run_parts(b, parts, args.budget)

main = functools.partial(common.command_line, "gpu", parse_args, benchmark)

if __name__ == "__main__":
    common.start(main)
