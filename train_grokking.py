"""Train a two-layer transformer on modular arithmetic until it groks: it knows its training equations by heart
long before it can solve those it has not seen, and then, suddenly, it can.

    python train_grokking.py                      # the preset nanugpt: a / b mod 223, AdamW
    python train_grokking.py --optimizer muon     # the same, Muon on the hidden matrices
    python train_grokking.py --preset quick       # the whole curve in about a minute on one core
    python train_grokking.py --prime 97 --operation x2xyy2 --train-fraction 0.8 --resume
    python train_grokking.py --sweep              # phase diagram: decay x optimizer x seeds

Needs no data set: all equations are made at the start and split by the seed. A run's folder, LOG_DIR/EXPERIMENT_NAME/
RUN_ID, gets log.txt, metrics.json, curve.png, ckpt.pt (the newest) and ckpt_best.pt (of the best accuracy).

Grokking: Power et al. 2022 (arXiv 2201.02177), whose operations and token format these are; Muon instead of AdamW:
Tveit et al. 2025 (arXiv 2504.16041). Measured here: records/2026-11-20_grokking.
Shapes: N equations, T tokens of one, D width, H heads, K key dim of a head, V vocabulary.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import argparse
import contextlib
import copy
import difflib
import errno
import functools
import hashlib
import inspect
import io
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from operator import ge, gt, le, lt
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


class UserError(ValueError):
    """Wrong input that one sentence explains; `main` prints it without a traceback."""

# --- Settings -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Config:
    """The settings of a run. Each is a flag with its comment as help; the bracket says what it may be."""
    preset: str = "nanugpt"  # settings that other flags override [nanugpt|power|quick]
    experiment_name: str = "train_grokking"  # runs go to LOG_DIR/EXPERIMENT_NAME/RUN_ID
    log_dir: str = "logs"  # folder of all experiments
    seed: int = 0  # of weights, split and order of the equations [>= 0]
    resume: str = ""  # latest run, a run's folder or a checkpoint file to go on with
    allow_change: str = ""  # settings that --resume may change, as lr,weight_decay
    prime: int = 223  # p: numbers are 0 to p - 1, results modulo p [> 1, < 5000]
    operation: str = "/"  # on a and b [+|-|*|/|x2y2|x2xyy2|x2xyy2x|x3xy|x3xy2y]
    train_fraction: float = 0.5  # part of the equations that is trained on [> 0, < 1]
    layers: int = 2  # transformer layers [> 0, <= 1000]
    width: int = 128  # of the residual stream, a multiple of heads [> 0, <= 4096]
    heads: int = 4  # attention heads [> 0]
    mlp_ratio: int = 4  # hidden size of the MLP / width [> 0, <= 100]
    optimizer: str = "adamw"  # of the matrices of attention and MLP [adamw|muon]
    lr: float = 0.001  # AdamW's rate; with muon that of all other weights [>= 0]
    beta1: float = 0.9  # decay of AdamW's mean of gradients [>= 0, < 1]
    beta2: float = 0.98  # and of their squares [>= 0, < 1]
    adam_eps: float = 1e-8  # AdamW's epsilon [> 0]
    weight_decay: float = 0.1  # AdamW's decay / rate [>= 0]
    muon_lr: float = 0.02  # Muon's rate [>= 0]
    muon_momentum: float = 0.95  # Nesterov momentum [>= 0, < 1]
    muon_weight_decay: float = 0.1  # its decay / rate; with 1 it learns nothing [>= 0]
    warmup_steps: int = 10  # in which the rates rise to what they stay [>= 0]
    batch_size: int = 512  # equations of a step; all where there are fewer [> 0, <= 65536]
    iterations: int = 15000  # optimizer steps, at most [> 0]
    eval_every: int = 400  # steps between evaluations on all equations [> 0]
    stop_accuracy: float = 0.99  # stop a tenth later than this; 0: never [>= 0, <= 1]
    save_every: int = 10  # evaluations between checkpoints [> 0]
    plot: bool = True  # draw curve.png at the end (bench/grokking.py)
    sweep: bool = False  # draw a phase diagram instead (bench/grokking.py)
    device: str = "auto"  # where to run [auto|cpu|cuda]
    dtype: str = "auto"  # of products; auto: bf16 where it is fast [auto|bf16|fp32]
    compile: bool = True  # torch.compile of a step and of the evaluation
    threads: int = 0  # CPU threads; 0: torch's choice [>= 0, <= 1024]

# differs from train_gpt.py: another task
PRESETS: dict[str, dict] = {
    "nanugpt": {},  # nanuGPT's prime223: 49,506 equations, 457,578 parameters
    "power": dict(prime=97, weight_decay=1.0, iterations=10000, eval_every=100),  # Power et al. 2022
    # 59,462 parameters; a compiled graph would cost more time than it saves
    "quick": dict(prime=59, layers=1, width=64, optimizer="muon", weight_decay=1.0, iterations=6000,
                  eval_every=50, dtype="fp32", compile=False),
}
OTHER_NAMES = {"iterations": ("max_steps", "max_iters"), "eval_every": ("eval_interval",)}
FREE_ON_RESUME = {"preset", "experiment_name", "log_dir", "resume", "iterations", "stop_accuracy", "save_every",
                  "plot", "sweep", "device", "dtype", "compile", "threads", "allow_change"}
# that decide the equations or the shapes of the weights: no --allow-change
FIXED = {"seed", "prime", "operation", "train_fraction", "layers", "width", "heads", "mlp_ratio", "optimizer"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
STOPS = [  # signals; Windows has two
    number for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if (number := getattr(signal, name, None))]
COMPARE = {">": gt, ">=": ge, "<": lt, "<=": le}

@functools.cache
def flag_comments() -> dict[str, str]:
    """Comments of the settings, by name, read from the source."""
    source = inspect.getsource(Config)
    return dict(re.findall(r"^    (\w+): \w+ = .+?  # (.+)$", source, re.MULTILINE))

def flag_parser() -> argparse.ArgumentParser:
    """One flag for each setting, with dashes or underscores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False, exit_on_error=False)
    for field in fields(Config):
        names = field.name, *OTHER_NAMES.get(field.name, ())
        flags = [f"--{s}" for name in names for s in (name.replace("_", "-"), name)]
        options = dict(type=field.type, metavar="X")
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        if field.name == "resume":
            options |= dict(nargs="?", const="latest")
        text = f"{flag_comments()[field.name]} (default: {field.default})"
        parser.add_argument(*dict.fromkeys(flags), default=argparse.SUPPRESS, help=text, **options)
    return parser

# differs from train_gpt.py: fewer choices
def parse_settings(argv: list[str] | None) -> tuple[Config, list[str]]:
    """The settings, every `auto` resolved, and lines about that. Raises UserError that names all faults."""
    parser = flag_parser()
    given, unknown = parser.parse_known_args(argv)
    flags = [word for word in unknown if word.startswith("-")] or unknown
    for i, flag in enumerate(flags):
        close = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
        hint = f"did you mean {close[0]}?" if close else "--help lists all flags"
        flags[i] = f"{flag}: {hint}"
    if flags:
        raise UserError(f"unknown {', '.join(flags)}")
    given = vars(given)
    s = Config(**{**PRESETS.get(given.get("preset"), {}), **given})
    if problems := setting_problems(s, given):
        raise UserError("\n  ".join([f"{len(problems)} setting(s) cannot work:", *problems]))
    gpu = s.device != "cpu" and torch.cuda.is_available()
    fast = torch.cuda.get_device_capability() >= (8, 0) if gpu else (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    dtype = s.dtype if s.dtype != "auto" else "bf16" if fast else "fp32"
    compilable = gpu or any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++")))
    hint = "; no C++ compiler: install g++ for faster steps" if s.compile and not compilable else ""
    s = replace(s, device="cuda" if gpu else "cpu", dtype=dtype, compile=s.compile and compilable)
    notes = [f"device {s.device}, products in {s.dtype}, {'' if s.compile else 'not '}compiled{hint}"]
    return s, notes + (busy_cores() if s.device == "cpu" else [])

def busy_cores() -> list[str]:
    """A warning where others want the cores: one busy neighbour makes two threads four times slower than one."""
    load = getattr(os, "getloadavg", lambda: (0.0,))()[0]
    cores = os.cpu_count()
    wait = "steps will take longer; --threads 1 loses least"
    found = [f"WARNING: load {load:.1f} on {cores} cores: {wait}"]
    return found if load > cores else []

def setting_problems(s: Config, given: dict) -> list[str]:
    """A sentence for each setting that its bracket, another setting or this machine does not allow."""
    problems = []
    for name, comment in flag_comments().items():
        value, bracket = getattr(s, name), comment.partition(" [")[2].rstrip("]")
        bounds = re.findall(r"([<>]=?) (\d+)", bracket)
        fits = all(COMPARE[sign](value, int(bound)) for sign, bound in bounds)
        if not fits or ("|" in bracket and value not in bracket.split("|")):
            allowed = bracket.replace("|", " or ").replace(", ", " and ")
            problems.append(f"--{name} {str(value)[:40]}: must be {allowed}")
        elif value == math.inf or type(value) is int and value >= 2**32:
            problems.append(f"--{name} {str(value)[:40]}: must be below {2**32}")
        elif name in given and value == "" or "\0" in str(value):
            problems.append(f"--{name} {value!r}: must be a name; or leave it out")
    problems += [f"--allow_change {name}: no run can go on with another one" for name in s.allow_change.split(",")
                 if name in FIXED or name not in ("", *flag_comments())]
    if problems:
        return problems
    if not is_prime(s.prime):
        near = [n for n in range(s.prime - 34, s.prime + 35) if is_prime(n)]
        problems.append(f"--prime {s.prime}: must be a prime, as {near}")
    count = s.prime * (s.prime - (s.operation == "/"))
    if not 0 < int(s.train_fraction * count) < count:
        problems.append(f"--train_fraction {s.train_fraction}: no training or no validation equation of {count}")
    if s.width % s.heads:
        problems.append(f"--width {s.width}: must be a multiple of --heads {s.heads}")
    if s.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: this machine has no usable CUDA device; leave the flag out")
    unread = {name: "--optimizer muon" for name in given if name.startswith("muon") and s.optimizer != "muon"}
    unread |= {"allow_change": "--resume"} if s.allow_change and not s.resume else {}
    return problems + [f"--{name}: has no effect without {other}" for name, other in unread.items()]

# --- Data -----------------------------------------------------------------------------------------------------
# An equation is five tokens, EOS a op b =, and an answer. Tokens: EOS, =, nine operations, 0 to p - 1.

OPERATIONS = {
    "+": lambda a, b, p: a + b,
    "-": lambda a, b, p: a - b,
    "*": lambda a, b, p: a * b,
    "/": lambda a, b, p: a * pow(b, -1, p),
    "x2y2": lambda a, b, p: a**2 + b**2,
    "x2xyy2": lambda a, b, p: a**2 + a * b + b**2,
    "x2xyy2x": lambda a, b, p: a**2 + a * b + b**2 + a,
    "x3xy": lambda a, b, p: a**3 + a * b,
    "x3xy2y": lambda a, b, p: a**3 + a * b**2 + b,
}
EOS, EQUALS, FIRST_OPERATION = 0, 1, 2
FIRST_NUMBER = FIRST_OPERATION + len(OPERATIONS)
Weights = dict[str, Tensor]

def is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, math.isqrt(n) + 1))

def make_equations(s: Config) -> tuple[Tensor, Tensor]:
    """All equations as rows a, b, answer, (N, 3): those to train on, which the seed draws, and the others."""
    result = OPERATIONS[s.operation]
    columns = range(s.operation == "/", s.prime)  # no division by 0
    rows = [(a, b, result(a, b, s.prime) % s.prime) for a in range(s.prime) for b in columns]
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(s.seed))
    trained = torch.zeros(len(rows), dtype=torch.bool)
    trained[drawn[:int(s.train_fraction * len(rows))]] = True
    equations = torch.tensor(rows)
    return equations[trained].to(s.device), equations[~trained].to(s.device)

@functools.lru_cache(maxsize=1)
def epoch_order(s: Config, count: int, epoch: int) -> Tensor:
    """Order of the training equations. Seed and epoch alone decide it: a resumed run needs only the step."""
    digest = hashlib.sha256(f"{s.seed} {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randperm(count, generator=generator).to(s.device)

def batch_at(s: Config, count: int, step: int) -> tuple[Tensor, Tensor]:
    """Order of a step's epoch, and where its batch starts there. Equations that fill no batch are left out."""
    size = min(s.batch_size, count)
    epoch, batch = divmod(step, count // size)
    return epoch_order(s, count, epoch), torch.tensor(batch * size, device=s.device)

# --- Model ----------------------------------------------------------------------------------------------------
# nanuGPT's: learned positions, post-norm layers with biases, a LayerNorm at the end, an untied head with bias.
# Weights are a dict of fp32 tensors, those of all layers in one, so that Muon updates equal shapes in one call.

def initial_weights(s: Config) -> Weights:
    """torch's defaults: embeddings N(0, 1); linear layers and biases uniform within 1 / sqrt(inputs), Q, K and V within
    sqrt(6 / (inputs + outputs)) of the 3 together (Xavier); biases of attention 0; LayerNorms 1 and 0."""
    generator = torch.Generator().manual_seed(s.seed)
    layers, width, hidden, vocab_size = s.layers, s.width, s.mlp_ratio * s.width, FIRST_NUMBER + s.prime
    xavier, narrow, wide = (6 / (4 * width)) ** 0.5, width**-0.5, hidden**-0.5

    def uniform(bound: float, *shape: int) -> Tensor:
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    return {
        "embedding": torch.randn(vocab_size, width, generator=generator),
        "position": torch.randn(5, width, generator=generator),
        "attention": torch.cat([uniform(xavier, layers, 3, width, width),  # Q, K, V
                                uniform(narrow, layers, 1, width, width)], dim=1),  # output
        "attention_bias": torch.zeros(layers, 4, width),
        "mlp": torch.cat([uniform(narrow, layers, 1, hidden, width),  # up
                          uniform(wide, layers, 1, hidden, width)], dim=1),  # down, transposed
        "up_bias": uniform(narrow, layers, hidden),
        "down_bias": uniform(wide, layers, width),
        "norm": torch.ones(layers, 2, width),  # after attention, after MLP
        "norm_bias": torch.zeros(layers, 2, width),
        "last_norm": torch.ones(width),
        "last_norm_bias": torch.zeros(width),
        "head": uniform(narrow, vocab_size, width),
        "head_bias": uniform(narrow, vocab_size),
    }

def dense(x: Tensor, weight: Tensor, bias: Tensor, s: Config) -> Tensor:
    """A product in s.dtype with fp32 weights."""
    return F.linear(*(z.to(DTYPES[s.dtype]) for z in (x, weight, bias)))

def embed(w: Weights, a_N: Tensor, b_N: Tensor, s: Config) -> Tensor:
    """Embedded EOS a op b =, (N, 5, D). A product with one-hot rows looks numbers up: equal gradients in all runs."""
    table = w["embedding"]
    numbers = torch.arange(s.prime, device=a_N.device)
    a_ND, b_ND = ((n[:, None] == numbers).float() @ table[FIRST_NUMBER:] for n in (a_N, b_N))
    symbol = FIRST_OPERATION + list(OPERATIONS).index(s.operation)
    eos_ND, symbol_ND, equals_ND = (table[i].expand_as(a_ND) for i in (EOS, symbol, EQUALS))
    return torch.stack([eos_ND, a_ND, symbol_ND, b_ND, equals_ND], dim=1) + w["position"]

def attention_sums(q_NQHK: Tensor, k_NTHK: Tensor, v_NTHK: Tensor) -> Tensor:
    """Causal attention of the last Q of T tokens, (N, Q, H, K), fp32: sums, compiled 20 ms a step, with SDPA 32."""
    q, k, v = q_NQHK.float(), k_NTHK.float(), v_NTHK.float()
    scores_NQTH = (q[:, :, None] * k[:, None]).sum(-1) / math.sqrt(q.size(-1))
    positions = torch.arange(k.size(1), device=q.device)
    visible_QT = positions[-q.size(1):, None] >= positions[None, :]
    weights_NQTH = scores_NQTH.masked_fill(~visible_QT[None, :, :, None], -math.inf).softmax(dim=2)
    return (weights_NQTH[..., None] * v[:, None]).sum(2)

def layer(w: Weights, i: int, x_NTD: Tensor, s: Config, last: bool) -> Tensor:
    """Layer i, (N, T, D), or, of the last one, the last token's output, (N, 1, D): a third less work."""
    matrices, biases = w["attention"][i], w["attention_bias"][i]
    x = x_NTD[:, -1:] if last else x_NTD
    if last:
        q = dense(x, matrices[0], biases[0], s)
        k, v = dense(x_NTD, matrices[1:3].flatten(0, 1), biases[1:3].flatten(), s).chunk(2, dim=-1)
    else:
        q, k, v = dense(x, matrices[:3].flatten(0, 1), biases[:3].flatten(), s).chunk(3, dim=-1)
    y = attention_sums(*(z.unflatten(-1, (s.heads, -1)) for z in (q, k, v)))
    y = dense(y.flatten(-2), matrices[3], biases[3], s)
    x = F.layer_norm(x + y.float(), (s.width,), w["norm"][i, 0], w["norm_bias"][i, 0])
    hidden = F.gelu(dense(x, w["mlp"][i, 0], w["up_bias"][i], s).float())
    y = dense(hidden, w["mlp"][i, 1].mT, w["down_bias"][i], s)
    return F.layer_norm(x + y.float(), (s.width,), w["norm"][i, 1], w["norm_bias"][i, 1])

def logits(w: Weights, a_N: Tensor, b_N: Tensor, s: Config) -> Tensor:
    """Logits of the answers, (N, V), in fp32 for every dtype: in bf16 those of 20 would be 0.125 apart."""
    x = embed(w, a_N, b_N, s)
    for i in range(s.layers):
        x = layer(w, i, x, s, last=i == s.layers - 1)
    x = F.layer_norm(x[:, -1], (s.width,), w["last_norm"], w["last_norm_bias"])
    return F.linear(x, w["head"], w["head_bias"])

# --- Optimizer ------------------------------------------------------------------------------------------------
# torch.optim's AdamW and Muon (tests compare them) as functions, so that forward, backward and update are one
# compiled graph, and the equal matrices of all layers one product.

def newton_schulz(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """The nearest (semi-)orthogonal matrices, (.., rows, cols), about: their singular values go to about 1."""
    x = matrices.flatten(0, -3)
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(5):
        square = x @ x.mT
        square = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, square, x, beta=3.4445)
    return (x.mT if tall else x).reshape(matrices.shape).float()

def update_weights(w: Weights, grads: Weights, moments: dict, numbers: Tensor, s: Config):
    """A step of Muon (kellerjordan.github.io/posts/muon) and AdamW (arXiv 1711.05101) in place, by `step_numbers`."""
    scale, correction1, correction2 = numbers.unbind()
    for name, momentum in moments["momentum"].items():
        # with more outputs than inputs steps are sqrt(outputs / inputs) longer: up, not down
        growth = [1.0] * 4 if name == "attention" else [math.sqrt(s.mlp_ratio), 1.0]
        growth = torch.tensor(growth, device=s.device).view(-1, 1, 1)
        momentum.lerp_(grads[name], 1 - s.muon_momentum)
        nesterov = torch.lerp(grads[name], momentum, s.muon_momentum)
        update = newton_schulz(nesterov, DTYPES[s.dtype])
        decay = s.muon_weight_decay / growth
        w[name].sub_(s.muon_lr * scale * growth * (update + decay * w[name]))
    for name, mean in moments["exp_avg"].items():
        square = moments["exp_avg_sq"][name]
        mean.lerp_(grads[name], 1 - s.beta1)
        square.lerp_(grads[name].square(), 1 - s.beta2)
        update = mean / correction1 / ((square / correction2).sqrt() + s.adam_eps)
        w[name].sub_(s.lr * scale * (update + s.weight_decay * w[name]))

def step_numbers(s: Config, step: int) -> Tensor:
    """What changes from step to step: scale of the rates, a warm-up; 1 - beta1^step and 1 - beta2^step."""
    scale = min(1.0, (step + 1) / max(1, s.warmup_steps))
    corrections = [1 - beta ** (step + 1) for beta in (s.beta1, s.beta2)]
    return torch.tensor([scale, *corrections], device=s.device)

def train_step(w: Weights, moments: dict, train, order, start, numbers, s: Config) -> Tensor:
    """Batch, forward, backward and update, one graph; returns the mean loss of the batch."""
    places = start + torch.arange(min(s.batch_size, len(train)), device=s.device)
    a, b, answer = train[order[places]].unbind(dim=1)

    def loss(w):
        return F.cross_entropy(logits(w, a, b, s), FIRST_NUMBER + answer)
    grads, value = torch.func.grad_and_value(loss)(w)
    update_weights(w, grads, moments, numbers, s)
    return value

# --- Evaluation -----------------------------------------------------------------------------------------------

EVAL_ROWS = 2048  # equations of one pass, which fit the caches of a CPU core
MILESTONES = ("train_99", "val_50", "val_95", "val_99")  # percent of equations
METRICS = ("train_loss", "train_acc", "val_loss", "val_acc", "weight_norm", "lr", "time_s")

def score(w: Weights, rows_N3: Tensor, s: Config) -> Tensor:
    """Losses, and whether the answers are right, (2, N)."""
    z_NV = logits(w, rows_N3[:, 0], rows_N3[:, 1], s)
    targets_N = FIRST_NUMBER + rows_N3[:, 2]
    losses_N = F.cross_entropy(z_NV, targets_N, reduction="none")
    return torch.stack([losses_N, (z_NV.argmax(dim=-1) == targets_N).float()])

def mean_scores(score, w: Weights, equations: Tensor, s: Config) -> list[float]:
    """Mean loss of some equations, and the share that is answered rightly."""
    size = min(EVAL_ROWS, len(equations))
    whole = F.pad(equations, (0, 0, 0, -len(equations) % size))  # equal shapes: one graph
    scores = torch.cat([score(w, rows, s) for rows in whole.split(size)], dim=1)
    return scores[:, :len(equations)].double().mean(dim=1).tolist()

def milestones(metrics: list[dict]) -> dict[str, int | None]:
    """First evaluated step at which each accuracy was reached, None: never; gap: train_99 to val_99."""
    found = {}
    for name in MILESTONES:
        split, percent = name.split("_")
        steps = [m["step"] for m in metrics if m[f"{split}_acc"] >= int(percent) / 100]
        found[name] = min(steps, default=None)
    both = None not in (found["train_99"], found["val_99"])
    return found | {"gap": found["val_99"] - found["train_99"] if both else None}

# --- Checkpoints and logs -------------------------------------------------------------------------------------
# RUN/ckpt.pt is the newest state, RUN/ckpt_best.pt that of the best validation accuracy. Which of several is newer
# says `saved` in them, which rises with each, not a file's time, which copies lose.

def initial_state(s: Config) -> dict:
    """The content of a checkpoint without its settings, at step 0. Times in ms."""
    w = {name: z.to(s.device) for name, z in initial_weights(s).items()}
    hidden = ("attention", "mlp") if s.optimizer == "muon" else ()
    rest = [name for name in w if name not in hidden]
    names = {"momentum": hidden, "exp_avg": rest, "exp_avg_sq": rest}
    moments = {key: {name: torch.zeros_like(w[name]) for name in names[key]} for key in names}
    return dict(step=0, weights=w, moments=moments, metrics=[], train_ms=0.0, eval_ms=0.0, saved=0, changes=[])

def tensors(state: dict) -> dict[str, Tensor]:
    """Weights and moments by name."""
    parts = state["moments"] | {"weights": state["weights"]}
    return {f"{part} {name}": z for part, some in parts.items() for name, z in some.items()}

def all_finite(state: dict) -> bool:
    """Whether weights and moments are numbers; waits for the device."""
    return all(bool(z.isfinite().all()) for z in tensors(state).values())

def printable(text: str) -> str:
    """A text whose control characters, which would drive a terminal, are spelled out."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)

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

def read_checkpoint(path: Path) -> dict:
    """The content of a checkpoint, checked for all but the shapes. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as file:  # torch.load does not
            if any(part.compress_type for part in file.infolist()) or file.testzip():
                raise ValueError("wrong checksum")
        state = {"saved": 0, "changes": []} | torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        json.dumps([*state["settings"].items(), state["changes"] + []])
        steps = [0, *(m["step"] for m in state["metrics"]), state["step"]]
        numbers = [m[name] for m in state["metrics"] for name in METRICS]
        numbers += [*steps, state["saved"], state["train_ms"], state["eval_ms"]]
        right = {*map(type, [*steps, state["saved"]])} == {int} and steps == sorted(steps)
        if not (right and all(map(math.isfinite, numbers)) and all_finite(state)):
            raise ValueError("a number out of range")
        return state
    except Exception as error:  # noqa: BLE001 - what unpickler and zip reader raise has no end
        raise ValueError(f"{path} is damaged ({repr(error).splitlines()[0]:.300})") from error

def load_checkpoint(s: Config, notes: list[str]) -> tuple[Path, dict]:
    """Path and content of the newest whole checkpoint. Raises UserError if there is none, or it has other settings."""
    place = Path(s.log_dir) / s.experiment_name if s.resume == "latest" else Path(s.resume)
    paths = place.parent.glob("ckpt*.pt") if place.is_file() else [*place.glob("ckpt*.pt"), *place.glob("*/ckpt*.pt")]
    found, damaged = {}, []
    for path in filter(Path.is_file, sorted({place, *paths})):
        try:
            found[path] = read_checkpoint(path)
        except ValueError as error:
            damaged.append(str(error))
    ages = {path: (path == place, c["saved"], path.parent.name, c["step"]) for path, c in found.items()}
    for path in sorted(found, key=ages.get, reverse=True):
        state, new = found[path], initial_state(s)
        changed = check_same_run(s, path, state["settings"])
        shapes = [{name: (z.shape, z.dtype) for name, z in tensors(each).items()} for each in (state, new)]
        if shapes[0] == shapes[1]:
            for name, z in tensors(new).items():
                z.copy_(tensors(state)[name])
            state["changes"] += [{"step": state["step"], "changed": changed}] * bool(changed)
            notes += [f"{line}: another one is taken" for line in damaged]
            return path, state | {"weights": new["weights"], "moments": new["moments"]}
        damaged.append(f"{path} is damaged (it is of another model)")
    raise UserError("\n  ".join([f"no whole checkpoint in {place}: leave --resume out", *damaged]))

def check_same_run(s: Config, path: Path, then: dict) -> dict[str, list]:
    """Allowed changes since a checkpoint, name -> [then, now]. Raises UserError that names the others."""
    gone = {"orthogonalizer": "newton_schulz"}  # in older checkpoints
    now, then = gone | asdict(s), gone | then
    changed = {name: [then.get(name), now[name]] for name in now if then.get(name) != now[name]}
    allowed = s.allow_change.split(",")
    if refused := [name for name in changed if name not in (*FREE_ON_RESUME, *allowed)]:
        hint = "" if {*refused} & {*FIXED, *gone} else f"--allow-change {','.join(refused)}, "
        text = f"{path} has other settings; {hint}use them, or start without --resume:"
        lines = [f"--{name}: {changed[name][0]!r:.80} in the checkpoint, {now[name]!r} now" for name in refused]
        raise UserError("\n  ".join([text, *lines]))
    return {name: pair for name, pair in changed.items() if name in allowed}

def bench_grokking(*arguments: str) -> int:
    """Runs bench/grokking.py, which draws and sweeps; its exit code."""
    tool = Path(__file__).resolve().parent / "bench" / "grokking.py"
    return subprocess.call([sys.executable, str(tool), *arguments])

def past_target(s: Config, state: dict) -> bool:
    """True a tenth more steps after the accuracy to stop at, so that the curve shows it."""
    good = [m["step"] for m in state["metrics"] if m["val_acc"] >= s.stop_accuracy > 0]
    return state["step"] >= 1.1 * min(good, default=math.inf)

def must_evaluate(s: Config, state: dict) -> bool:
    """Whether an evaluation is due that has not been: a checkpoint may have been written before it."""
    step, metrics = state["step"], state["metrics"]
    due = step and (step % s.eval_every == 0 or step in (30, 100, s.iterations))  # 30: left end of a log axis
    return bool(due) and not (metrics and metrics[-1]["step"] >= step)

def is_over(s: Config, state: dict) -> bool:
    return not must_evaluate(s, state) and (state["step"] >= s.iterations or past_target(s, state))

class RunFolder:
    """The folder of a run, locked: log, metrics.json and checkpoints; and the signals that end it."""
    def __init__(self, s: Config, path: Path, state: dict):
        state["settings"] = asdict(s)
        self.s, self.path, self.state = s, path, state
        self.kept, self.signals = state["step"], []  # 0: no checkpoint
        self.whole, self.opened = True, time.perf_counter()  # False in a step
        path.mkdir(parents=True, exist_ok=True)
        self.lock = lock_folder(path)

    def on_error(self, kind, error, trace):
        """Saves the state before an error, unless that came in the middle of a step."""
        if isinstance(error, Exception) and not isinstance(error, UserError):
            with contextlib.suppress(MemoryError, RuntimeError):  # the same once more
                if self.whole and self.state["step"] > self.kept and all_finite(self.state):
                    self.save("ckpt.pt")
            self.say(f"an error after step {self.state['step']:,}: {self.outlook()}")
            self.tell(self.report("out_of_memory" if out_of_memory(error) else "error"))
        self.lock.close()

    def tell(self, report: dict):
        """The last lines, also in result.json: what came of the run."""
        last = (report["metrics"] or [{}])[-1]
        text = json.dumps({
            "status": report["status"],
            "val_loss": last.get("val_loss"), "val_acc": last.get("val_acc"),
            "training_seconds": report["train_time_s"],
            "total_seconds": time.perf_counter() - self.opened,
            "steps": report["total_steps"], "params": report["parameters"]}, indent=1)
        self.write("result.json", text.encode())
        self.say("---" + re.sub(r'[{}",]|(?<=\n) ', "", text).rstrip())

    def stop(self, number: int, frame):
        """On a signal: asks the loop to stop. A second one, if it is Ctrl-C, ends the process at once."""
        self.signals.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # print is not for signal handlers
            os.write(2, f"{signal.Signals(number).name}: saving; Ctrl-C: stops at once\n".encode())

    def say(self, text: str):
        """Prints a line, and adds it to log.txt. A full disk costs lines; where nobody reads them the run stops."""
        text = printable(text)
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a", encoding="utf-8") as file:
            file.write(text + "\n")
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):  # `| head`, a terminal that is gone
                self.signals.append(getattr(signal, "SIGPIPE", signal.SIGTERM))

    def lap(self, name: str):
        """Adds the time since the last call to train_ms or eval_ms."""
        now = time.perf_counter()
        self.state[name] += 1000 * (now - self.began)
        self.began = now

    def write(self, name: str, content: bytes | memoryview) -> bool:
        """Replaces a file at once, on the disk; False, and a warning, where that fails: the old one stays."""
        temporary = self.path / f"{name}.tmp"
        try:
            temporary.write_bytes(content)
            sync(temporary)
            os.replace(temporary, self.path / name)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            self.say(f"warning: {self.path / name} cannot be written ({error.strerror}); {self.outlook()}")
            return False
        for folder in temporary.absolute().parents:
            with contextlib.suppress(OSError):  # some file systems cannot
                sync(folder)
        return True

    def save(self, name: str) -> bool:
        """Replaces a checkpoint; see `write`."""
        self.state["saved"] = max(time.time_ns(), self.state["saved"] + 1)
        torch.save(self.state, buffer := io.BytesIO())
        saved = self.write(name, buffer.getbuffer())
        self.kept = self.state["step"] if saved else self.kept
        return saved

    def report(self, status: str) -> dict:
        """Writes metrics.json and returns its content."""
        state = self.state
        git = f"git -C '{Path(__file__).resolve().parent}' describe --always --dirty"
        result = {
            "config": state["settings"],
            "environment": {"torch": torch.__version__, "git": subprocess.getoutput(git),
                            "platform": platform.platform(), "threads": torch.get_num_threads(),
                            "device": torch.cuda.get_device_name() if self.s.device == "cuda" else "cpu"},
            "parameters": sum(w.numel() for w in state["weights"].values()),
            "milestones": milestones(state["metrics"]),
            "train_time_s": state["train_ms"] / 1000, "eval_time_s": state["eval_ms"] / 1000,
            "total_steps": state["step"], "step_ms": state["train_ms"] / max(1, state["step"]),
            "best_val_acc": max((m["val_acc"] for m in state["metrics"]), default=None),
            "status": status, "changes": state["changes"], "metrics": state["metrics"],
        }
        self.write("metrics.json", json.dumps(result, indent=1).encode())
        return result

    def outlook(self) -> str:
        kept = f"the checkpoint of step {self.kept:,} is kept, --resume {self.path} goes on"
        return kept if self.kept else "there is no checkpoint yet"

    def require_finite(self, *numbers: float):
        """Raises UserError if weights, moments or these numbers are not finite: they replace no checkpoint."""
        if all(map(math.isfinite, numbers)) and all_finite(self.state):
            return
        self.tell(self.report("nan"))
        rates = "lr,muon_lr" if self.s.optimizer == "muon" else "lr"
        raise UserError(f"not finite after step {self.state['step']}: stopped, {self.outlook()}; "
                        f"lower {rates}, with --allow-change {rates}")

# --- Training -------------------------------------------------------------------------------------------------

# differs from train_gpt.py: another task
@torch.no_grad()  # torch.func takes the gradients; everywhere, as torch.compile makes a graph for each mode
def train(s: Config, notes: list[str]) -> int:
    """A whole run; its exit code. Raises UserError for what ends it early."""
    path, state = load_checkpoint(s, notes) if s.resume else (None, initial_state(s))
    if path and is_over(s, state):
        print(printable(f"{path.parent}: nothing to do after step {state['step']:,}; more --iterations go on"))
        return 0
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    run = RunFolder(s, path.parent if path else Path(s.log_dir) / s.experiment_name / run_id, state)
    if path and load_checkpoint(s, [])[1]["saved"] != state["saved"]:
        raise UserError(f"{path.parent} has gone on meanwhile: give the command again")
    (run.path / "result.json").unlink(missing_ok=True)
    with contextlib.ExitStack() as undo:
        undo.push(run.on_error)
        weights, moments, metrics = state["weights"], state["moments"], state["metrics"]
        train_set, val_set = make_equations(s)
        notes.append(f"{s.operation} mod {s.prime}: {len(train_set):,} equations for training, {len(val_set):,} for "
                     f"validation; {s.layers} layer(s), width {s.width}, {s.optimizer}, seed {s.seed}")
        notes.append(f"resumed {path} after step {state['step']:,}" if path else f"run folder: {run.path}")
        run.say("\n".join(notes))
        do_step, do_score = train_step, score
        if s.compile:  # and run on copies, outside the clock
            do_step, do_score = (torch.compile(f, dynamic=False, fullgraph=True) for f in (train_step, score))
            copies = copy.deepcopy((weights, moments))
            do_step(*copies, train_set, *batch_at(s, len(train_set), 0), step_numbers(s, 0), s)
            for equations in (train_set, val_set):
                mean_scores(do_score, weights, equations, s)
        for number in STOPS:
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, run.stop)
        run.began = time.perf_counter()
        while not (run.signals or is_over(s, state)):
            step = state["step"]
            if not must_evaluate(s, state):
                order, start = batch_at(s, len(train_set), step)
                run.whole = False
                do_step(weights, moments, train_set, order, start, step_numbers(s, step), s)
                state["step"] += 1
                run.whole = True
                continue
            run.require_finite()  # waits for the device
            run.lap("train_ms")
            if step % (s.eval_every * s.save_every) == 0 or step == s.iterations:
                run.save("ckpt.pt")  # before the evaluation, which may fail
            m = {"step": step}
            m["train_loss"], m["train_acc"] = mean_scores(do_score, weights, train_set, s)
            m["val_loss"], m["val_acc"] = mean_scores(do_score, weights, val_set, s)
            m["weight_norm"] = math.sqrt(sum(w.square().sum().item() for w in weights.values()))
            m |= {"lr": s.lr * step_numbers(s, step - 1)[0].item(), "time_s": state["train_ms"] / 1000}
            run.require_finite(*m.values())
            best = all((m["val_acc"], -m["val_loss"]) > (old["val_acc"], -old["val_loss"]) for old in metrics)
            metrics.append(m)
            run.say(f"step {step:,}/{s.iterations:,}  train {100 * m['train_acc']:.2f} % (loss {m['train_loss']:.3g})  "
                    f"val {100 * m['val_acc']:.2f} % (loss {m['val_loss']:.3g})  |w| {m['weight_norm']:.1f}  "
                    f"{state['train_ms'] / step:.1f} ms/step")
            run.report("running")
            if best:
                run.save("ckpt_best.pt")
            run.lap("eval_ms")
        run.require_finite()
        run.lap("train_ms")
        status = "interrupted" if not is_over(s, state) else "target" if past_target(s, state) else "done"
        saved = run.save("ckpt.pt")
        result = run.report(status if saved else "error")
        undo.callback(run.tell, result)
        if not saved:
            raise UserError(f"{run.path} cannot be written, see the warning; {run.outlook()}")
        run.say("   ".join(f"{name}: {step}" for name, step in result["milestones"].items()))
        run.say(f"{result['step_ms']:.1f} ms a step, {result['eval_time_s']:.1f} s for evaluation: {run.path}")
        if s.plot and getattr(signal, "SIGPIPE", 0) not in run.signals:
            bench_grokking("plot", str(run.path), "--out", str(run.path / "curve.png"))
        return 128 + run.signals[0] if status == "interrupted" else 0

def out_of_memory(error: Exception) -> bool:
    """Of the GPU, or of a CPU, where torch raises a plain RuntimeError."""
    kinds = torch.OutOfMemoryError, MemoryError
    return isinstance(error, kinds) or "can't allocate memory" in str(error)

# differs from train_gpt.py: one process
def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what a user can repair."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # what the console's encoding lacks
    code, argv = 2, sys.argv[1:] if argv is None else argv
    try:
        s, notes = parse_settings(argv)
        code = 1  # docs/automation.md has all
        if s.sweep:
            return bench_grokking("sweep", "--", *(flag for flag in argv if flag != "--sweep"))
        torch.set_num_threads(s.threads or torch.get_num_threads())
        code = train(s, notes)
    except Exception as error:
        memory = out_of_memory(error) and "out of memory: lower --batch-size, --layers, --width or --prime"
        if not memory and not isinstance(error, UserError | OSError | argparse.ArgumentError):
            raise
        print(printable(f"error: {memory or error}"), file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # a closed pipe, a full disk: the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code

if __name__ == "__main__":
    sys.exit(main())
