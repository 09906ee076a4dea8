"""Train a two-layer transformer on modular arithmetic until it groks: it knows its training equations by heart long
before it can solve those it has not seen, and then, suddenly, it can.

    python train_grokking.py                                       # the preset nanugpt: a / b mod 223, AdamW
    python train_grokking.py --optimizer muon                      # the same, Muon on the hidden matrices
    python train_grokking.py --preset quick                        # the whole curve in about a minute on one core
    python train_grokking.py --prime 97 --operation x2xyy2 --train-fraction 0.8 --resume
    python train_grokking.py --sweep                               # phase diagram: decay x optimizer x seeds

Needs no data set: all p^2 (division: p(p-1)) equations are made at the start and split by the seed. Writes log.txt,
metrics.json, curve.png, ckpt.pt and ckpt_best.pt to LOG_DIR/EXPERIMENT_NAME/RUN_ID, and ends with the steps at which
training accuracy reached 99 % and validation accuracy 50, 95 and 99 %. `--help` lists all flags.

Grokking: Power et al. 2022 (arXiv 2201.02177), whose operations and token format these are; what such a network learns:
Nanda et al. 2023 (arXiv 2301.05217); Muon instead of AdamW: Tveit et al. 2025 (arXiv 2504.16041), who found it earlier
on seven tasks. Essential AI (2025) saw that lead vanish at other batch sizes and widths: tune both before comparing.

Measured (records/2026-11-20_grokking; torch 2.13.0, bf16, AMD EPYC; a step takes 38 ms on one thread and 21 ms on two
cores, with Muon 47 and 36 ms; n = 3 seeds):
99 % of training and of validation equations at step 2,933 +- 808 and 10,400 +- 1,000 with the preset's AdamW, both at
1,733 +- 115 with `--lr 2e-3 --weight-decay 0.3`, both at 1,200 +- 0 with `--optimizer muon --weight-decay 1`.
Shape suffixes: N equations, T tokens of one, S tokens before them, D width, H heads, K key dim of a head, V vocabulary.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import inspect
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Settings                                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# argparse is generated from the fields below: name, type, default, and the comment as help text, whose last bracket
# holds the allowed values.


class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback and exits with 1."""


class TrainingStopped(RuntimeError):
    """Training cannot go on (NaN loss, no space for the last checkpoint); what was saved before stays usable."""


# differs from train_gpt.py: the settings of another task
@dataclass(frozen=True)
class Settings:
    """Everything that shapes a run."""

    # --- run
    # differs from train_gpt.py: other presets
    preset: str = "nanugpt"  # group of settings, each overridden by its own flag [nanugpt|power|quick]
    # differs from train_gpt.py: its own name
    experiment_name: str = "train_grokking"  # runs are written to LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    # differs from train_gpt.py: it splits the data, too
    seed: int = 0  # of the initial weights, of the split and of the order of the training equations [>=0]
    # differs from train_gpt.py: a checkpoint is a file
    resume: str = ""  # continue the newest run of the experiment (latest), or this run's folder or checkpoint file
    # --- data
    prime: int = 223  # p: numbers are 0 to p - 1, results are modulo p [>0]
    operation: str = "/"  # on a and b; x2xyy2 is a^2+ab+b^2 [+|-|*|/|x2y2|x2xyy2|x2xyy2x|x3xy|x3xy2y]
    train_fraction: float = 0.5  # part of all equations that is trained on, above 0 and below 1
    # --- model
    layers: int = 2  # transformer layers [>0]
    # differs from train_gpt.py: a smaller model
    width: int = 128  # size of the residual stream, a multiple of heads [>0]
    heads: int = 4  # attention heads [>0]
    mlp_ratio: int = 4  # hidden size of the MLP / width [>0]
    full: bool = False  # the last layer computes all positions, not just the one that is read: the same, slower
    # --- optimizer
    optimizer: str = "adamw"  # of the hidden matrices, those of attention and MLP [adamw|muon]
    lr: float = 0.001  # learning rate, AdamW; with muon that of all but the hidden matrices [>=0]
    beta1: float = 0.9  # decay of AdamW's running mean of gradients [0..1]
    # differs from train_baseline.py: the reference's value
    beta2: float = 0.98  # and of their squares [0..1]
    # differs from train_gpt.py: torch's value, as in the reference
    adam_eps: float = 1e-8  # AdamW's epsilon [>0]
    # differs from train_baseline.py: no parameter is left out
    weight_decay: float = 0.1  # AdamW's decay / rate, decoupled, of all that it trains [>=0]
    # differs from train_gpt.py: another task
    muon_lr: float = 0.02  # learning rate of hidden matrices, Muon [>=0]
    # differs from train_gpt.py: without warm-up
    muon_momentum: float = 0.95  # Nesterov momentum [0..1]
    # differs from train_gpt.py: the rate is constant
    muon_weight_decay: float = 0.1  # its decay / rate, decoupled; 1 is too much to learn anything [>=0]
    # differs from train_gpt.py: Muon as published
    orthogonalizer: str = "newton_schulz"  # iteration that orthogonalizes updates [polar_express|newton_schulz]
    # differs from train_gpt.py: another default
    warmup_steps: int = 10  # learning-rate warm-up, in steps; the rate is constant after it [>=0]
    batch_size: int = 512  # equations of a step; all training equations where there are fewer [>0]
    # differs from train_gpt.py: another default
    iterations: int = 15000  # optimizer steps, at most [>0]
    # --- evaluation, checkpoints
    # differs from train_gpt.py: evaluation on all equations
    eval_every: int = 250  # steps between evaluations on all training and validation equations [>0]
    stop_accuracy: float = 0.99  # stop a tenth more steps after this validation accuracy; 0: at the last step [0..1]
    # differs from train_gpt.py: counted in evaluations
    save_every: int = 10  # evaluations between checkpoints; also written at the end and on SIGINT or SIGTERM [>0]
    plot: bool = True  # write curve.png at the end
    sweep: bool = False  # phase diagram over decay, optimizer and seeds (bench/grokking.py; preset quick), and end
    # --- hardware
    device: str = "auto"  # where to run [auto|cpu|cuda]
    dtype: str = "auto"  # of activations and matrices; auto: bf16 where the hardware is fast at it [auto|bf16|fp32]
    compile: bool = True  # torch.compile of model and optimizer
    threads: int = 0  # CPU threads of a process; 0: torch's choice [>=0]

    @property
    def vocab_size(self) -> int:
        return FIRST_NUMBER + self.prime

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32


# differs from train_gpt.py: another task
PRESETS: dict[str, dict] = {
    # nanuGPT's prime223: 49,506 equations, 457,578 parameters
    "nanugpt": dict(prime=223, operation="/", train_fraction=0.5, weight_decay=0.1),
    # Power et al. 2022: 9,312 equations, decay 1
    "power": dict(prime=97, operation="/", train_fraction=0.5, weight_decay=1.0, iterations=10000, eval_every=100),
    # 59,462 parameters; a compiled graph would cost more time than it saves
    "quick": dict(prime=59, operation="/", train_fraction=0.5, layers=1, width=64, optimizer="muon", weight_decay=1.0,
                  iterations=6000, eval_every=50, dtype="fp32", compile=False),
}
# differs from train_gpt.py: other settings
RESUME_MAY_CHANGE = {"preset", "experiment_name", "log_dir", "resume", "iterations", "stop_accuracy", "save_every",
                     "plot", "sweep", "device", "dtype", "compile", "threads", "full"}


# differs from train_gpt.py: other settings
READ_WITH = {name: ("optimizer", "muon") for name in (
    "muon_lr", "muon_momentum", "muon_weight_decay", "orthogonalizer")}


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


# differs from train_gpt.py: one process, other choices
def parse_settings(argv: list[str] | None) -> tuple[Settings, Hardware, list[str]]:
    """Command line -> settings with every `auto` resolved, the hardware, and lines that explain the choices.

    Raises UserError with all that is wrong with the settings at once."""
    given = vars(build_parser().parse_args(argv))
    hardware = detect_hardware(given.get("device", "auto"))
    s = Settings(**{**PRESETS.get(given.get("preset", Settings.preset), {}), **given})
    s = dataclasses.replace(s, operation=operation_name(s.operation))
    problems = field_errors(s) + unread_errors(s, given)
    if problems := problems or task_errors(s, hardware):
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    dtype = s.dtype if s.dtype != "auto" else ("bf16" if hardware.bf16 else "fp32")
    why = hardware.why if s.dtype == "auto" else "asked for" if "dtype" in given else f"preset {s.preset}"
    notes = [f"device {hardware.device}: {hardware.name}", f"dtype {dtype}: {why}"]
    compiler = hardware.device == "cuda" or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    if s.compile and not compiler:
        notes.append("not compiled: there is no C++ compiler; install g++ for faster steps")
    s = dataclasses.replace(s, device=hardware.device, dtype=dtype, compile=s.compile and bool(compiler))
    return s, hardware, notes


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


# differs from train_gpt.py: no kernels
def unread_errors(s: Settings, given: dict) -> list[str]:
    """A sentence for each given setting that nothing would read, as it belongs to another choice."""
    return [f"--{name}: has no effect without --{other} {value}" for name, (other, value) in READ_WITH.items()
            if name in given and getattr(s, other) != value]


def task_errors(s: Settings, hardware: Hardware) -> list[str]:
    """Settings that do not fit the task, each other or this machine."""
    bad = []
    if not is_prime(s.prime):
        ways = range(s.prime - 1, 1, -1), range(s.prime + 1, 2 * s.prime + 1)
        near = [str(next(filter(is_prime, numbers))) for numbers in ways if any(map(is_prime, numbers))]
        bad.append(f"--prime {s.prime}: must be a prime number; the nearest: {' and '.join(near)}")
    if not 0 < s.train_fraction < 1:
        bad.append(f"--train_fraction {s.train_fraction}: must be above 0 and below 1")
    elif not bad and (count := equation_count(s)) and not 0 < int(s.train_fraction * count) < count:
        bad.append(f"--train_fraction {s.train_fraction}: leaves no training or no validation equation of {count}")
    if s.width % s.heads:
        bad.append(f"--width {s.width}: must be a multiple of --heads {s.heads}")
    bad += [f"--{name} {getattr(s, name)}: must be below 1" for name in ("beta1", "beta2", "muon_momentum")
            if getattr(s, name) == 1]
    if s.device == "cuda" and hardware.device != "cuda":
        bad.append("--device cuda: this machine has no usable CUDA device; leave the flag out")
    return bad


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Data                                                                                                               │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# An equation a op b = c is five tokens and an answer: EOS a op b = -> c. Tokens: EOS, =, nine operations, 0 to p - 1.


class Operation(NamedTuple):
    """One of the binary operations of Power et al. 2022, on whole numbers; the result is taken modulo p."""

    formula: str
    result: Callable | None  # int64 arrays a, b -> array; None: division, which is built from its results


OPERATIONS = {
    "+": Operation("a+b", lambda a, b: a + b),
    "-": Operation("a-b", lambda a, b: a - b),
    "*": Operation("a*b", lambda a, b: a * b),
    "/": Operation("a/b", None),
    "x2y2": Operation("a^2+b^2", lambda a, b: a**2 + b**2),
    "x2xyy2": Operation("a^2+ab+b^2", lambda a, b: a**2 + a * b + b**2),
    "x2xyy2x": Operation("a^2+ab+b^2+a", lambda a, b: a**2 + a * b + b**2 + a),
    "x3xy": Operation("a^3+ab", lambda a, b: a**3 + a * b),
    "x3xy2y": Operation("a^3+ab^2+b", lambda a, b: a**3 + a * b**2 + b),
}
EOS, EQUALS, FIRST_OPERATION = 0, 1, 2
FIRST_NUMBER = FIRST_OPERATION + len(OPERATIONS)
PREFIX = 3  # EOS a op: what all equations with this a have in common


def operation_name(text: str) -> str:
    """Name of an operation that may also be given as its formula, in a and b or in x and y."""
    names = {operation.formula: name for name, operation in OPERATIONS.items()}
    return names.get(re.sub(r"\s", "", text).replace("x", "a").replace("y", "b"), text)


def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))


def equation_count(s: Settings) -> int:
    return s.prime * (s.prime - (s.operation == "/"))


class Task(NamedTuple):
    """All equations as a table with a row for each a and a column for each b, and their split."""

    b: Tensor  # (columns,) 0 to p - 1, for division 1 to p - 1
    answers: Tensor  # (p, columns)
    trained: Tensor  # (p, columns) bool: True for training, False for validation
    train: Tensor  # (equations, 3) a, b and answer of those to train on

    def to(self, device: str) -> Task:
        return Task(*(tensor.to(device) for tensor in self))


def answer_table(prime: int, operation: str) -> np.ndarray:
    """(p, columns) answers. Division needs no inverses: c is the answer at a = c * b."""
    result = OPERATIONS[operation].result
    a, b = np.arange(prime)[:, None], np.arange(result is None, prime)[None, :]
    if result is not None:
        return result(a, b) % prime
    table = np.empty((prime, prime - 1), dtype=np.int64)
    table[a * b % prime, b - 1] = a
    return table


def make_task(s: Settings) -> Task:
    """All equations, of which a part that the seed draws is to be trained on."""
    answers = torch.from_numpy(answer_table(s.prime, s.operation))
    b = torch.arange(s.prime - answers.size(1), s.prime)
    drawn = torch.randperm(answers.numel(), generator=torch.Generator().manual_seed(s.seed))
    trained = torch.zeros(answers.numel(), dtype=torch.bool)
    trained[drawn[:int(s.train_fraction * answers.numel())]] = True
    trained = trained.view_as(answers)
    row, column = trained.nonzero(as_tuple=True)
    return Task(b, answers, trained, torch.stack([row, b[column], answers[row, column]], dim=1))


class Batches:
    """Training equations in an order that seed and epoch alone decide, so that a resumed run needs no more than the
    step. The last equations of an epoch that fill no batch are left out."""

    def __init__(self, count: int, s: Settings):
        self.size, self.count, self.s, self.epoch = min(s.batch_size, count), count, s, None

    def place(self, step: int) -> tuple[Tensor, Tensor]:
        """Order of this step's epoch, on the device, and the place of its batch there."""
        epoch, batch = divmod(step, self.count // self.size)
        if epoch != self.epoch:
            seed = int.from_bytes(hashlib.sha256(f"{self.s.seed} {epoch}".encode()).digest()[:7], "big")
            order = torch.randperm(self.count, generator=torch.Generator().manual_seed(seed))
            self.epoch, self.order = epoch, order.to(self.s.device)
        return self.order, torch.tensor(batch * self.size, device=self.s.device)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Attention                                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def causal_attention(q_NQHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor) -> Tensor:
    """Attention of the last Q of T tokens, (N, Q, H, K), in fp32. Products of five tokens are too small for a matrix
    library: as sums, which torch.compile fuses, a step takes 20 ms instead of 32 with scaled_dot_product_attention."""
    q, k, v = q_NQHK.float(), k_NTHK.float(), v_NTHK.float()
    scores_NQTH = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.size(-1))
    (queries, tokens), positions = scores_NQTH.shape[1:3], torch.arange(k.size(1), device=q.device)
    visible_QT = positions[tokens - queries:, None] >= positions[None, :]
    weights_NQTH = scores_NQTH.masked_fill(~visible_QT[None, :, :, None], -math.inf).softmax(dim=2)
    return (weights_NQTH[..., None] * v[:, None]).sum(2)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Model                                                                                                              │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# nanuGPT's: learned positions, post-norm layers with biases, a LayerNorm at the end, an untied head with bias. Weights
# are a dict of fp32 tensors, those of all layers in one: Muon updates equal shapes in one call, and each of Q, K and V
# as the matrix it is.

HIDDEN = ("attention", "mlp")  # the matrices that Muon trains


def weight_shapes(s: Settings) -> dict[str, tuple[int, ...]]:
    layers, width, hidden = s.layers, s.width, s.mlp_ratio * s.width
    return {
        "embedding": (s.vocab_size, width), "position": (PREFIX + 2, width),
        "attention": (layers, 4, width, width), "attention_bias": (layers, 4, width),  # Q, K, V, output
        "mlp": (layers, 2, hidden, width), "up_bias": (layers, hidden), "down_bias": (layers, width),  # up, down.T
        "norm": (layers, 2, width), "norm_bias": (layers, 2, width),  # after attention, after MLP
        "last_norm": (width,), "last_norm_bias": (width,), "head": (s.vocab_size, width), "head_bias": (s.vocab_size,),
    }


def initial_weights(s: Settings) -> dict[str, Tensor]:
    """torch's own defaults for these modules, as in the reference: embeddings N(0, 1); linear layers and their biases
    uniform within 1 / sqrt(inputs); Q, K and V uniform within sqrt(6 / (inputs + outputs)) of the 3 together (Xavier),
    all biases of attention 0; LayerNorms 1 and 0."""
    generator = torch.Generator().manual_seed(s.seed)
    weights = {name: torch.zeros(shape) for name, shape in weight_shapes(s).items()}
    narrow, wide, xavier = s.width**-0.5, (s.mlp_ratio * s.width) ** -0.5, (6 / (4 * s.width)) ** 0.5
    for name in ("embedding", "position"):
        weights[name].normal_(generator=generator)
    for bound, part in ((xavier, weights["attention"][:, :3]), (narrow, weights["attention"][:, 3]),
                        (narrow, weights["mlp"][:, 0]), (wide, weights["mlp"][:, 1]), (narrow, weights["up_bias"]),
                        (wide, weights["down_bias"]), (narrow, weights["head"]), (narrow, weights["head_bias"])):
        part.uniform_(-bound, bound, generator=generator)
    for name in ("norm", "last_norm"):
        weights[name].fill_(1.0)
    return weights


def linear(x: Tensor, weight: Tensor, bias: Tensor, s: Settings) -> Tensor:
    """A product in s.dtype of fp32 weights."""
    return F.linear(x.to(s.torch_dtype), weight.to(s.torch_dtype), bias.to(s.torch_dtype))


def embed(w: dict[str, Tensor], a_N: Tensor, b_N: Tensor, s: Settings) -> Tensor:
    """Embedded EOS a op b =, (N, 5, D). Numbers are looked up by a product with one-hot rows: its gradient is a product
    as well and the same in every run, not a sum in the order in which threads come by."""
    table, numbers = w["embedding"], torch.arange(s.prime, device=a_N.device)
    a_ND, b_ND = ((n[:, None] == numbers).float() @ table[FIRST_NUMBER:] for n in (a_N, b_N))
    operation = FIRST_OPERATION + list(OPERATIONS).index(s.operation)
    eos_ND, operation_ND, equals_ND = (table[token].expand_as(a_ND) for token in (EOS, operation, EQUALS))
    return torch.stack([eos_ND, a_ND, operation_ND, b_ND, equals_ND], dim=1) + w["position"]


def layer(w: dict[str, Tensor], i: int, x_NTD: Tensor, s: Settings, past: tuple[Tensor, Tensor] | None = None,
          last: bool = False) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Layer i on tokens that follow those whose keys and values are `past`, of some times N rows: then the tokens
    follow each N of them. With `last` only the last token's output.

    Returns the output, (N, T or 1, D), and keys and values of all tokens, (N, S + T, H, K)."""
    matrices, biases = w["attention"][i], w["attention_bias"][i]
    queried = x_NTD[:, -1:] if last else x_NTD
    if last:
        q = linear(queried, matrices[0], biases[0], s)
        k, v = linear(x_NTD, matrices[1:3].flatten(0, 1), biases[1:3].flatten(), s).chunk(2, dim=-1)
    else:
        q, k, v = linear(x_NTD, matrices[:3].flatten(0, 1), biases[:3].flatten(), s).chunk(3, dim=-1)
    q, k, v = (z.unflatten(-1, (s.heads, -1)) for z in (q, k, v))
    if past is not None:
        times = past[0].size(0) // x_NTD.size(0)
        q, k, v, queried = (z.repeat(times, *[1] * (z.dim() - 1)) for z in (q, k, v, queried))
        k, v = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
    y = linear(causal_attention(q, k, v).flatten(-2), matrices[3], biases[3], s)
    x = F.layer_norm(queried + y.float(), (s.width,), w["norm"][i, 0], w["norm_bias"][i, 0])
    hidden = F.gelu(linear(x, w["mlp"][i, 0], w["up_bias"][i], s).float())
    y = linear(hidden, w["mlp"][i, 1].mT, w["down_bias"][i], s)
    return F.layer_norm(x + y.float(), (s.width,), w["norm"][i, 1], w["norm_bias"][i, 1]), (k, v)


def head(w: dict[str, Tensor], x_ND: Tensor, s: Settings) -> Tensor:
    """Logits, (N, V), a product in fp32 for every dtype: in bf16 logits of 20 would be 0.125 apart."""
    return F.linear(F.layer_norm(x_ND, (s.width,), w["last_norm"], w["last_norm_bias"]), w["head"], w["head_bias"])


def logits(w: dict[str, Tensor], a_N: Tensor, b_N: Tensor, s: Settings) -> Tensor:
    """Logits of the answers, (N, V). Nothing reads the last layer's other outputs, so that they are not computed,
    which saves a third of the work; s.full computes them."""
    x = embed(w, a_N, b_N, s)
    for i in range(s.layers):
        x, _ = layer(w, i, x, s, last=i == s.layers - 1 and not s.full)
    return head(w, x[:, -1], s)


def logits_of_rows(w: dict[str, Tensor], a_A: Tensor, b_B: Tensor, s: Settings) -> Tensor:
    """Logits of the equations of each a with all b, (A * B, V). Attention is causal: EOS a op are computed once for
    each a, and their keys and values kept, as in decoding. That leaves 2 of 5 tokens of an equation."""
    x_A3D = embed(w, a_A, a_A, s)[:, :PREFIX]
    x_NTD = embed(w, b_B, b_B, s)[:, PREFIX:]  # (B, 2, D), from the first layer on (A * B, ..)
    for i in range(s.layers):
        last = i == s.layers - 1
        x_A3D, past = layer(w, i, x_A3D, s, last=last)
        past = tuple(z.repeat_interleave(len(b_B), dim=0) for z in past)
        x_NTD, _ = layer(w, i, x_NTD, s, past, last)
    return head(w, x_NTD[:, -1], s)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Optimizer                                                                                                          │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

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
def orthogonalize(matrices: Tensor, method: str, dtype: torch.dtype) -> Tensor:
    """Nearest (semi-)orthogonal matrix of each of (K, rows, cols), approximately: singular values go to about 1."""
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    slack, steps = (1.02, POLAR_EXPRESS) if method == "polar_express" else (1.0, NEWTON_SCHULZ)
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) * slack + 1e-7)).to(dtype)
    for a, b, c in steps:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


# differs from train_gpt.py: no kernel, without NorMuon
def muon_update(master: Tensor, grad: Tensor, momentum: Tensor, lr: Tensor, weight_decay: Tensor, mu: float,
                method: str, dtype: torch.dtype, cautious: bool):
    """One Muon step on (K, rows, cols) matrices, in place (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    lr and weight_decay (K, 1, 1); mu: momentum."""
    momentum.lerp_(grad, 1 - mu)
    update = orthogonalize(torch.lerp(grad, momentum, mu), method, dtype).float()
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


def initial_moments(weights: dict[str, Tensor], s: Settings) -> dict[str, dict[str, Tensor]]:
    """Zeros: momentum of what Muon trains, exp_avg and exp_avg_sq of the rest."""
    muon = [name for name in HIDDEN if s.optimizer == "muon"]
    rest = [name for name in weights if name not in muon]
    return {key: {name: torch.zeros_like(weights[name]) for name in names}
            for key, names in (("momentum", muon), ("exp_avg", rest), ("exp_avg_sq", rest))}


def update_weights(w: dict[str, Tensor], grads: dict[str, Tensor], moments: dict[str, dict[str, Tensor]],
                   numbers: Tensor, s: Settings):
    """One step of the optimizer, in place. numbers: scale of the rates, 1 - beta1^step, 1 - beta2^step."""
    scale, correction1, correction2 = numbers.unbind()
    for name, momentum in moments["momentum"].items():
        master, grad, m = (z.flatten(0, 1) for z in (w[name], grads[name], momentum))
        # a matrix that maps to more outputs than it has inputs takes sqrt(outputs / inputs) longer steps: up, not down
        growth = [1.0] * 4 if name == "attention" else [math.sqrt(s.mlp_ratio), 1.0]
        growth = torch.tensor(growth * s.layers, device=master.device).view(-1, 1, 1)
        muon_update(master, grad, m, s.muon_lr * scale * growth, s.muon_weight_decay / growth, s.muon_momentum,
                    s.orthogonalizer, s.torch_dtype, cautious=False)
    for name, exp_avg in moments["exp_avg"].items():
        adamw_update(w[name], grads[name], exp_avg, moments["exp_avg_sq"][name], s.lr * scale, s.weight_decay,
                     1 - s.beta1, 1 - s.beta2, correction1, correction2, s.adam_eps, cautious=False)


def train_step(w: dict[str, Tensor], moments: dict[str, dict[str, Tensor]], train: Tensor, order: Tensor,
               start: Tensor, numbers: Tensor, size: int, s: Settings) -> Tensor:
    """Gather, forward, backward and update, one graph; returns the mean loss of the batch."""
    a, b, answer = train[order[start + torch.arange(size, device=order.device)]].unbind(dim=1)

    def loss(w):
        return F.cross_entropy(logits(w, a, b, s), FIRST_NUMBER + answer)

    grads, value = torch.func.grad_and_value(loss)(w)
    update_weights(w, grads, moments, numbers, s)
    return value


def compiled(function, s: Settings):
    """torch.compile with static shapes and whole graphs, or the function itself."""
    if not s.compile:
        return function
    torch._dynamo.config.recompile_limit = 256  # counted per function, and all blocks and banks share theirs
    return torch.compile(function, dynamic=False, fullgraph=True)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Schedule                                                                                                           │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def warm_up_scale(s: Settings, step: int) -> float:
    """Factor on all learning rates at training step `step`: a linear warm-up, then 1."""
    return min(1.0, (step + 1) / max(1, s.warmup_steps))


def step_numbers(s: Settings, step: int) -> Tensor:
    """What changes from step to step, for `update_weights`."""
    return torch.tensor([warm_up_scale(s, step), 1 - s.beta1 ** (step + 1), 1 - s.beta2 ** (step + 1)], device=s.device)


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Evaluation                                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘

EVAL_ROWS = 4096  # equations of one pass, whose activations fit the caches of a CPU core; a GPU takes them all
EARLY_STEPS = (30, 100)  # further evaluations, for the left end of a logarithmic axis


def score_rows(w: dict[str, Tensor], a_A: Tensor, b_B: Tensor, answers_AB: Tensor, s: Settings):
    """Losses, fp32, and whether the answer is right, of the equations of some a with all b; each (A, B)."""
    z_NV, targets_N = logits_of_rows(w, a_A, b_B, s), FIRST_NUMBER + answers_AB.flatten()
    losses_N = F.cross_entropy(z_NV, targets_N, reduction="none")
    return losses_N.view_as(answers_AB), (z_NV.argmax(dim=-1) == targets_N).view_as(answers_AB)


def evaluate_all(score: Callable, w: dict[str, Tensor], task: Task, s: Settings) -> dict[str, float]:
    """Loss and accuracy over all training and over all validation equations."""
    prime, columns = task.answers.shape
    rows, found = max(1, min(prime, EVAL_ROWS // columns)) if s.device == "cpu" else prime, []
    for start in range(0, prime, rows):
        a = torch.arange(start, start + rows, device=s.device).clamp(max=prime - 1)  # equal shapes: the last one again
        found.append(score(w, a, task.b, task.answers[a], s))
    losses, right = (torch.cat(parts)[:prime] for parts in zip(*found, strict=True))
    return {f"{split}_{name}": values[where].double().mean().item()
            for split, where in (("train", task.trained), ("val", ~task.trained))
            for name, values in (("loss", losses), ("acc", right))}


MILESTONES = {"train_99": ("train_acc", 0.99), "val_50": ("val_acc", 0.5), "val_95": ("val_acc", 0.95),
              "val_99": ("val_acc", 0.99)}


def milestones(metrics: list[dict]) -> dict[str, int | None]:
    """First evaluated step at which each accuracy was reached, None: never; gap: steps from train_99 to val_99."""
    found = {name: next((m["step"] for m in metrics if m[key] >= least), None)
             for name, (key, least) in MILESTONES.items()}
    both = found["train_99"] is not None and found["val_99"] is not None
    return found | {"gap": found["val_99"] - found["train_99"] if both else None}


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Checkpoint                                                                                                         │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘
# RUN/ckpt.pt is the newest state, RUN/ckpt_best.pt that of the best validation accuracy: step, settings, weights,
# moments, metrics and times. The order of the data follows from seed and step. A file is replaced when it is complete.


def replace_file(path: Path, write: Callable):
    """Calls `write` with a binary file that then takes the place of `path`. Raises OSError and leaves the old file when
    the disk is full."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(f"could not write {path}: {str(error).splitlines()[0]}") from error


def checkpoint_files(s: Settings) -> list[Path]:
    """The newest checkpoint that --resume names, then the run's other one. Raises FileNotFoundError without any."""
    place = Path(s.log_dir) / s.experiment_name if s.resume == "latest" else Path(s.resume)
    found = [place] if place.is_file() else [*place.glob("ckpt*.pt"), *place.glob("*/ckpt*.pt")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {place}: start without --resume, or name a run's folder")
    first = max(found, key=lambda path: path.stat().st_mtime_ns)
    return [first, *(path for path in first.parent.glob("ckpt*.pt") if path != first)]


def load_checkpoint(s: Settings) -> tuple[Path, dict]:
    """Path and content of the checkpoint to go on from. A damaged one is reported and the run's other one is
    taken. Raises UserError if that is damaged, too, or has other settings."""
    files = checkpoint_files(s)
    for path in files:
        try:
            with zipfile.ZipFile(path) as parts:
                damaged = parts.testzip()  # torch.load does not look at the checksums
            if damaged is None:
                saved = torch.load(path, map_location="cpu", weights_only=True)
                check_same_run(s, path, saved["settings"])
                return path, saved
            reason = f"wrong checksum of {damaged}"
        except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError, zipfile.BadZipFile,
                zlib.error) as error:
            reason = str(error) or repr(error)
        print(f"checkpoint {path} is damaged ({reason.splitlines()[0]})", flush=True)
    raise UserError(f"no intact checkpoint in {files[0].parent}: start without --resume")


def check_same_run(s: Settings, path: Path, then: dict):
    """Raises UserError that names the settings in which a checkpoint differs from this run."""
    differing = [f"--{key}: {then.get(key)} in the checkpoint, {value} now"
                 for key, value in dataclasses.asdict(s).items() if key not in RESUME_MAY_CHANGE
                 and then.get(key) != value]
    if differing:
        raise UserError("\n  ".join([f"{path} has other settings; use them, or start without --resume:", *differing]))


# ┌────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┐
# │ Logging                                                                                                            │
# └────────────────────────────────────────────────────────────────────────────────────────────────────────────────────┘


def command_output(*command: str) -> str | None:
    """What a command prints, run in the script's folder; None where it fails or does not exist."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True, check=True,
                              timeout=30).stdout.strip()


class RunFolder:
    """Console and log.txt, which get the same lines, and metrics.json."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir(parents=True, exist_ok=True)

    def say(self, text: str):
        print(text, flush=True)
        try:
            with open(self.path / "log.txt", "a", encoding="utf-8") as file:
                file.write(text + "\n")
        except OSError as error:  # a full disk costs lines of the log, not the run
            print(f"warning: {self.path / 'log.txt'}: {error.strerror}; training goes on", flush=True)

    def write(self, name: str, write: Callable) -> bool:
        """Replaces a file as a whole; False, and a warning, if that failed."""
        try:
            replace_file(self.path / name, write)
        except OSError as error:
            self.say(f"warning: {error}; training goes on, what was written before is intact: free some space")
            return False
        return True


def environment(hardware: Hardware) -> dict:
    """Where a run took place, for metrics.json."""
    commit, changes = command_output("git", "rev-parse", "HEAD"), command_output("git", "status", "--porcelain", "-uno")
    return {"torch": torch.__version__, "numpy": np.__version__, "platform": platform.platform(),
            "cpu": detect_hardware("cpu").name, "device": hardware.name, "threads": torch.get_num_threads(),
            "git": {"commit": commit, "dirty": None if changes is None else bool(changes)}}


def milestone_text(found: dict[str, int | None]) -> str:
    """One line, e.g. train >= 99 %: step 2,700   val >= 50 %: 6,900   ..   gap 6,100 steps (3.3x)."""
    parts = [f"{split} >= {percent} %: " + (f"step {step:,}" if step is not None else "not reached")
             for (split, percent), step in ((name.split("_"), found[name]) for name in MILESTONES)]
    if found["gap"] is not None:
        parts.append(f"gap {found['gap']:,} steps ({found['val_99'] / found['train_99']:.1f}x)")
    return "   ".join(parts)


def plot_run(result: dict, path: Path):
    """curve.png: accuracies, then losses and the norm of the weights, over the logarithm of the step."""
    from matplotlib.figure import Figure

    config, metrics = result["config"], result["metrics"]
    steps = [m["step"] for m in metrics]
    figure = Figure(figsize=(8, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axes, name, label in ((above, "acc", "accuracy"), (below, "loss", "cross-entropy, nats")):
        axes.plot(steps, [m[f"train_{name}"] for m in metrics], color="tab:blue", label="training")
        axes.plot(steps, [m[f"val_{name}"] for m in metrics], color="tab:red", label="validation")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        for key, color, what in (("train_99", "tab:blue", "training"), ("val_99", "tab:red", "grokking: validation")):
            if (step := result["milestones"][key]) is not None:
                axes.axvline(step, color=color, linewidth=1, linestyle="--", label=f"{what} 99 % at step {step:,}")
    norm = below.twinx()
    norm.plot(steps, [m["weight_norm"] for m in metrics], color="tab:gray", linewidth=1)
    norm.set_ylabel("norm of all weights", color="tab:gray")
    norm.set_ylim(bottom=0)
    above.set_xscale("log")
    above.set_ylim(-0.02, 1.02)
    above.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
    above.legend(loc="upper left")
    below.set_yscale("log")
    below.set_xlabel("optimizer step")
    formula, optimizer = OPERATIONS[config["operation"]].formula, {"adamw": "AdamW", "muon": "Muon and AdamW"}
    figure.suptitle(f"{formula} mod {config['prime']}, {100 * config['train_fraction']:g} % of equations trained on\n"
                    f"{optimizer[config['optimizer']]}, {result['parameters']:,} parameters, seed {config['seed']}")
    figure.savefig(path, dpi=130)


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


class GrokkingRun:
    """One run: builds everything from the settings, then `run` trains."""

    def __init__(self, s: Settings, hardware: Hardware, notes: list[str]):
        self.s, self.hardware, self.status, self.stop_signal = s, hardware, "running", 0
        path, saved = load_checkpoint(s) if s.resume else (None, None)
        self.task = make_task(s).to(s.device)
        self.batches = Batches(len(self.task.train), s)
        self.step, self.metrics, self.clock, self.eval_clock = 0, [], Clock(s.device), Clock(s.device)
        self.weights = initial_weights(s) if saved is None else saved["weights"]
        self.moments = initial_moments(self.weights, s) if saved is None else saved["moments"]
        if saved is not None:
            self.step, self.metrics = saved["step"], saved["metrics"]
            self.clock.total_ms, self.eval_clock.total_ms = saved["train_ms"], saved["eval_ms"]
        self.weights = {name: w.to(s.device) for name, w in self.weights.items()}
        self.moments = {key: {name: m.to(s.device) for name, m in part.items()} for key, part in self.moments.items()}
        self.train_step, self.score = compiled(train_step, s), compiled(score_rows, s)
        run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
        self.folder = RunFolder(path.parent if path else Path(s.log_dir) / s.experiment_name / run_id)
        self.environment = environment(hardware)
        for line in [*notes, *self.summary(), *([f"resumed {path} after step {self.step:,}"] if path else [])]:
            self.folder.say(line)
        self.warm_up()

    def summary(self) -> list[str]:
        """The derived numbers that are printed before training."""
        s, equations, train = self.s, self.task.answers.numel(), len(self.task.train)
        rates = f"AdamW, rate {s.lr:g}, decay {s.weight_decay:g}"
        if s.optimizer == "muon":
            rates = f"Muon on hidden matrices, rate {s.muon_lr:g}, decay {s.muon_weight_decay:g}; rest {rates}"
        return [f"task: {OPERATIONS[s.operation].formula} mod {s.prime}, {equations:,} equations, {train:,} for "
                f"training and {equations - train:,} for validation, seed {s.seed}",
                f"model: {s.layers} layer(s), width {s.width}, {s.heads} heads, {self.parameters:,} parameters",
                f"optimizer: {rates}; batches of {self.batches.size}", f"run folder: {self.folder.path}"]

    @property
    def parameters(self) -> int:
        return sum(w.numel() for w in self.weights.values())

    @torch.no_grad()  # as in `run`: torch.compile makes other graphs where gradients are on
    def warm_up(self):
        """Compiles and runs both graphs, untimed; the step works on copies of all that it changes."""
        if not self.s.compile and self.s.device == "cpu":
            return
        began = time.perf_counter()
        copies = [{name: w.clone() for name, w in part.items()} for part in (self.weights, *self.moments.values())]
        self.do_step(copies[0], dict(zip(self.moments, copies[1:], strict=True)), 0)
        evaluate_all(self.score, self.weights, self.task, self.s)
        self.clock.wait()
        self.folder.say(f"compiled in {time.perf_counter() - began:.1f} s")

    def do_step(self, weights: dict, moments: dict, step: int) -> Tensor:
        order, start = self.batches.place(step)
        return self.train_step(weights, moments, self.task.train, order, start, step_numbers(self.s, step),
                               self.batches.size, self.s)

    @torch.no_grad()
    def run(self) -> int:
        """Trains to the end, past the accuracy to stop at, or to a signal; returns the exit code."""
        handlers = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop()
            return self._finish()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame):
        """First signal: save and stop after this step. The second ends the process at once."""
        if self.stop_signal:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.stop_signal = number

    def _loop(self):
        s = self.s
        self.clock.start()
        while self.step < s.iterations and not self.reached():
            if self.stop_signal:
                self.status = "interrupted"
                return
            self.do_step(self.weights, self.moments, self.step)
            self.step += 1
            early = self.step in EARLY_STEPS and self.step < s.eval_every
            if early or self.step % s.eval_every == 0 or self.step == s.iterations:
                self.evaluate()
        self.status = "target" if self.reached() else "done"

    def reached(self) -> bool:
        """True some steps after the validation accuracy to stop at, so that the curve shows it last."""
        at = next((m["step"] for m in self.metrics if m["val_acc"] >= self.s.stop_accuracy > 0), None)
        return at is not None and self.step >= 1.1 * at

    def evaluate(self):
        """Scores on all equations, outside the clock, to all logs; checkpoints where they are due."""
        s, ms = self.s, self.clock.stop()
        self.eval_clock.start()
        scores = evaluate_all(self.score, self.weights, self.task, s)
        self.eval_clock.stop()
        norm = math.sqrt(sum(w.square().sum().item() for w in self.weights.values()))
        m = {"step": self.step, **scores, "weight_norm": norm, "lr": s.lr * warm_up_scale(s, self.step - 1),
             "time_s": ms / 1000}
        if not all(map(math.isfinite, m.values())):
            self.status = "nan"
            self.write_metrics()
            raise TrainingStopped(f"loss or weights are not finite after step {self.step}: stopped, the checkpoints "
                                  f"before it are kept in {self.folder.path}; lower --lr")
        best = max((self.rank(old) for old in self.metrics), default=None)
        self.metrics.append(m)
        step_ms = ms / self.step
        eta = time.strftime("%H:%M:%S", time.gmtime((s.iterations - self.step) * step_ms / 1000))
        self.folder.say(f"step {self.step:,}/{s.iterations:,}  train {100 * m['train_acc']:.2f} % "
                        f"(loss {m['train_loss']:.3g})  val {100 * m['val_acc']:.2f} % (loss {m['val_loss']:.3g})  "
                        f"|w| {norm:.1f}  {step_ms:.1f} ms/step  ETA {eta}")
        self.write_metrics()
        if best is None or self.rank(m) > best:
            self.save("ckpt_best.pt")
        if self.step % (s.eval_every * s.save_every) == 0:
            self.save("ckpt.pt")
        self.clock.start()

    @staticmethod
    def rank(m: dict) -> tuple[float, float]:
        """Order of evaluations from worst to best."""
        return m["val_acc"], -m["val_loss"]

    def result(self) -> dict:
        """The content of metrics.json."""
        best = max((m["val_acc"] for m in self.metrics), default=None)
        return {"config": dataclasses.asdict(self.s), "environment": self.environment, "parameters": self.parameters,
                "milestones": milestones(self.metrics), "total_steps": self.step,
                "train_time_s": self.clock.total_ms / 1000, "eval_time_s": self.eval_clock.total_ms / 1000,
                "step_ms": self.clock.total_ms / max(1, self.step), "best_val_acc": best, "status": self.status,
                "metrics": self.metrics}

    def write_metrics(self):
        self.folder.write("metrics.json", lambda file: file.write(json.dumps(self.result(), indent=1).encode()))

    def save(self, name: str) -> bool:
        """Writes a checkpoint; False, and a warning, if that failed."""
        state = {"step": self.step, "settings": dataclasses.asdict(self.s), "weights": self.weights,
                 "moments": self.moments, "metrics": self.metrics, "train_ms": self.clock.total_ms,
                 "eval_ms": self.eval_clock.total_ms}
        return self.folder.write(name, lambda file: torch.save(state, file))

    def _finish(self) -> int:
        """Last checkpoint, metrics, figure, milestones; the exit code."""
        self.clock.stop()
        saved = self.save("ckpt.pt")
        self.write_metrics()
        result, say = self.result(), self.folder.say
        if self.s.plot and self.metrics:
            try:
                plot_run(result, self.folder.path / "curve.png")
            except ImportError:
                say("no curve.png: matplotlib is not installed; pip install matplotlib")
        train_s, eval_s = result["train_time_s"], result["eval_time_s"]
        say(milestone_text(result["milestones"]))
        say(f"{self.step:,} steps of {result['step_ms']:.1f} ms, {train_s:.1f} s; evaluation {eval_s:.1f} s, "
            f"{100 * eval_s / max(1e-9, train_s + eval_s):.1f} % of the run; {self.status}: {self.folder.path}")
        if not saved:
            raise TrainingStopped(f"the last checkpoint could not be written to {self.folder.path}: free some space")
        return 128 + self.stop_signal if self.status == "interrupted" else 0


def phase_diagram(argv: list[str]) -> int:
    """bench/grokking.py with the settings of a command line; its exit code."""
    tool = Path(__file__).resolve().parent / "bench" / "grokking.py"
    if not tool.is_file():
        raise FileNotFoundError(f"--sweep: {tool} is missing; copy it there from the project")
    command = [tool, "sweep", "--", *(flag for flag in argv if flag != "--sweep")]
    print("python", shlex.join(map(str, command)), flush=True)
    return subprocess.call([sys.executable, *command])


# differs from train_gpt.py: one process
def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what the user can repair."""
    try:
        s, hardware, notes = parse_settings(argv)
        if s.sweep:
            return phase_diagram(sys.argv[1:] if argv is None else argv)
        torch.set_num_threads(s.threads or torch.get_num_threads())
        return GrokkingRun(s, hardware, notes).run()
    except (UserError, OSError, TrainingStopped, torch.OutOfMemoryError) as error:
        hint = "; use a smaller --batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
