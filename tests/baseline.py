"""What the tests of train_baseline.py share: tiny models of all types, runs, and the models' equations written plainly.

The equations take one document at a time, one head at a time and one token at a time, from a model's parameters."""
from __future__ import annotations

import json
import math
from pathlib import Path

import helpers
import pytest
import torch
from helpers import VOCAB, flags, make_data, run_folder
from torch import Tensor

import train_baseline as tb
from train_baseline import GPT, Settings

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")
CPU = {"device": "cpu", "name": "test CPU", "memory_gib": 8.0, "bf16": False}
H100 = {"device": "cuda", "name": "NVIDIA H100 80GB HBM3", "memory_gib": 79.6, "bf16": True}
TYPES = ("gpt", "moderngpt", "ngpt", "moegpt")
# Every run spells out device, dtype and threads, so that it is the same arithmetic on every machine.
TINY = dict(
    num_layers=2, width=32, head_dim=8, mlp_ratio=2, seq_len=32, batch_tokens=128, micro_tokens=128, iterations=8,
    warmup_steps=2, max_lr=0.01, min_lr=0.001, eval_every=4, eval_tokens=300, log_every=1, threads=1, device="cpu",
    dtype="fp32", backend="sdpa", compile=False,
)
OWN = {  # flags that only some choices read
    "moegpt": dict(num_experts=4, top_k=2, num_shared=1, expert_hidden=16, dense_first=1),
    "muon": dict(muon_lr=0.02, momentum_warmup=4),
}


def given(model_type: str = "gpt", **changes) -> dict:
    """Flags of a tiny model."""
    own = OWN.get(model_type, {}) | OWN.get(changes.get("optimizer"), {})
    return {"model_type": model_type, **TINY, **own, **changes}


def flags_of(name: str) -> list[str]:
    """A flag with some value that is allowed for it."""
    default = getattr(Settings, name)
    if isinstance(default, bool):
        return [f"--{name}"]
    return [f"--{name}", {"tied": "on"}.get(name, str(default))]


def settings(model_type: str = "gpt", **changes) -> Settings:
    """Settings of a tiny model, through the command line."""
    return tb.parse_settings(flags(**given(model_type, **changes)), 1)[0]


def parse(*argv, hardware=CPU, world_size: int = 1, monkeypatch) -> Settings:
    """Settings of a command line on a machine of our choice."""
    monkeypatch.setattr(tb, "find_device", lambda device: CPU if device == "cpu" else hardware)
    return tb.parse_settings([str(a) for a in argv], world_size)[0]


def random_model(s: Settings, seed: int = 0, size: float = 0.3) -> GPT:
    """A model whose every parameter is random, biases and gains, too; ngpt's vectors keep their norm of 1, and half of
    its scales are negative."""
    model, random = GPT(s, VOCAB), torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=random)
            if s.model_type == "ngpt" and p.dim() > 1:
                p.copy_(noise)
            elif name.endswith(tb.FP32_PARAMETERS):
                p.mul_((1 + size * noise.abs()) * noise.sign())
            else:
                p.add_(size * noise)
    tb.normalize_rows(model, s)
    return model


def random_tokens(rows: int, seq_len: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB, (rows, seq_len), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)


def packed(rows: int, seq_len: int = 32, seed: int = 0) -> Tensor:
    """(3, rows, T) int32: inputs, targets, document numbers; rows of 1, 2, 3, .. documents of unequal lengths."""
    docs = torch.zeros(rows, seq_len, dtype=torch.int32)
    for row in range(rows):
        for cut in range(row):
            docs[row, 5 + 11 * cut:] += 1
    return torch.stack((random_tokens(rows, seq_len, seed), random_tokens(rows, seq_len, seed + 1), docs))


def loss(model: GPT, s: Settings, batch: Tensor) -> tuple[Tensor, Tensor]:
    """Summed loss of a batch, and the load-balancing loss, 0 without experts."""
    return model(*batch)


def logits(model: GPT, s: Settings, batch: Tensor) -> Tensor:
    return model.head(model.trunk(batch[0], batch[2], model.window))


def state(model: GPT) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --- the models' equations


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def rms_norm(x: Tensor, gain: Tensor | None = None) -> Tensor:
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return x if gain is None else x * gain


def unit(x: Tensor) -> Tensor:
    return x / x.square().sum(-1, keepdim=True).sqrt()


def rope(x_TK: Tensor, base: float) -> Tensor:
    """The pair (x[i], x[i + K/2]) is a complex number, which is turned by -position * base^(-2i/K)."""
    a, b = x_TK.chunk(2, dim=-1)
    position, i = torch.arange(len(a))[:, None], torch.arange(a.size(1))
    turned = torch.complex(a, b) * torch.exp(-1j * position * base ** (-2 * i / x_TK.size(1)))
    return torch.cat((turned.real, turned.imag), dim=-1)


def gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


ACTIVATIONS = {"gelu": gelu, "geglu": gelu, "swiglu": silu, "relu2": lambda x: torch.where(x > 0, x, 0.0) ** 2}


class Plain:
    """A model's equations for one document, of its parameters by name. `routed`: choices and affinities of mixtures."""

    def __init__(self, model: GPT, s: Settings):
        self.p, self.s, self.routed = dict(model.named_parameters()), s, []

    def logits(self, tokens_T: Tensor) -> Tensor:
        p, s, ngpt = self.p, self.s, self.s.model_type == "ngpt"
        x = p["embed.weight"][tokens_T.long()]
        if s.model_type == "gpt":
            x = x + p["positions.weight"][:len(x)]
        for i in range(s.num_layers):
            x = self.unit_block(i, x) if ngpt else self.block(i, x)
        table = p["embed.weight"] if s.tied == "on" else p["lm_head.weight"]
        if ngpt:
            return x @ table.T * p["logit_scale"] * s.width**0.5
        return self.norm("norm", x) @ table.T

    def loss(self, tokens_T: Tensor, targets_T: Tensor) -> Tensor:
        z = self.logits(tokens_T)
        return sum(torch.logsumexp(row, 0) - row[target] for row, target in zip(z, targets_T.tolist(), strict=True))

    def norm(self, name: str, x: Tensor) -> Tensor:
        if self.s.model_type == "gpt":
            return layer_norm(x, self.p[f"{name}.weight"], self.p[f"{name}.bias"])
        return rms_norm(x, self.p.get(f"{name}.weight"))

    def block(self, i: int, x: Tensor) -> Tensor:
        name = f"blocks.{i}."
        x = x + self.attention(name + "attn.", self.norm(name + "attn_norm", x))
        y = self.norm(name + "mlp_norm", x)
        if name + "mlp.router" not in self.p:
            return x + self.mlp(name + "mlp.", y)
        return x + torch.stack([self.mixture(name + "mlp.", token) for token in y])

    def unit_block(self, i: int, x: Tensor) -> Tensor:
        """arXiv 2410.01131, equations 10 and 11: h <- Norm(h + alpha (Norm(block(h)) - h))."""
        p, name, width = self.p, f"blocks.{i}.", self.s.width
        for part, function in (("attn", self.attention), ("mlp", self.mlp)):
            alpha = (p[f"{name}{part}_step"] * 0.05 * width**0.5).abs()
            x = unit(x + alpha * (unit(function(f"{name}{part}.", x)) - x))
        return x

    def attention(self, name: str, x: Tensor) -> Tensor:
        p, s, size = self.p, self.s, self.s.head_dim
        out, ngpt, heads = 0.0, s.model_type == "ngpt", s.width // s.head_dim
        for head in range(heads):
            own, other = slice(head * size, (head + 1) * size), head * s.num_kv_heads // heads
            shared = slice(other * size, (other + 1) * size)
            q, k, v = (x @ p[f"{name}{part}.weight"][rows].T for part, rows in zip("qkv", (own, shared, shared),
                                                                                 strict=True))
            if s.model_type == "gpt":
                q, k, v = q + p[name + "q.bias"][own], k + p[name + "k.bias"][shared], v + p[name + "v.bias"][shared]
            else:
                q, k = (rope(rms_norm(x) if s.qk_norm else x, s.rope_base) for x in (q, k))
            if ngpt:
                q, k = (unit(x) * p[name + "qk_scale"][own] * s.width**0.5 for x in (q, k))
            average = self.softmax_average(q, k, v, size ** (0.5 if ngpt else -0.5))
            out = out + average @ p[name + "out.weight"].T[own]
        return out + p[name + "out.bias"] if s.model_type == "gpt" else out

    def softmax_average(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Each query looks at itself and at the keys before it that are in the window."""
        rows = []
        for t, query in enumerate(q):
            first = max(0, t - self.s.window + 1) if self.s.window else 0
            weights = torch.exp(scale * k[first:t + 1] @ query)
            rows.append(weights @ v[first:t + 1] / weights.sum())
        return torch.stack(rows)

    def mlp(self, name: str, x: Tensor) -> Tensor:
        p, s = self.p, self.s
        act, hidden, down = ACTIVATIONS[s.mlp], x @ p[name + "up.weight"].T, p[name + "down.weight"].T
        if s.model_type == "gpt":
            return act(hidden + p[name + "up.bias"]) @ down + p[name + "down.bias"]
        if not s.mlp.endswith("glu"):
            return act(hidden) @ down
        gate = x @ p[name + "gate.weight"].T
        if s.model_type == "ngpt":  # equations 20 and 21
            hidden, gate = hidden * p[name + "up_scale"], gate * p[name + "gate_scale"] * s.width**0.5
        return (act(gate) * hidden) @ down

    def mixture(self, name: str, x: Tensor) -> Tensor:
        """arXiv 2401.06066, equations 3 to 5, of one token: the experts of the largest affinities, and those shared."""
        p, s = self.p, self.s
        powers = torch.exp(p[name + "router"] @ x)
        affinity = powers / powers.sum()
        chosen = sorted(range(s.num_experts), key=lambda e: -affinity[e].item())[:s.top_k]
        self.routed.append((name, chosen, affinity))
        out = self.mlp(name + "shared.", x) if s.num_shared else 0.0
        for e in chosen:
            out = out + affinity[e] * self.mlp(f"{name}experts.{e}.", x)
        return out

    def balance(self) -> Tensor:
        """Equations 12 to 14 of the tokens since the last call, taken as one sequence, summed over the layers."""
        total, experts = 0.0, range(self.s.num_experts)
        for layer in {name for name, _, _ in self.routed}:
            tokens = [(chosen, affinity) for name, chosen, affinity in self.routed if name == layer]
            for e in experts:
                f = len(experts) / (self.s.top_k * len(tokens)) * sum(e in chosen for chosen, _ in tokens)
                total = total + f * sum(affinity[e] for _, affinity in tokens) / len(tokens)
        self.routed = []
        return total


def documents_of(batch: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of each document of a batch."""
    found = []
    for tokens, targets, docs in batch.unbind(1):
        for number in docs.unique():
            found.append((tokens[docs == number], targets[docs == number]))
    return found


# --- training


def train(model: GPT, s: Settings, batches: list[Tensor]) -> list[float]:
    """Steps on these batches as the script's loop makes them; the norms of the gradients."""
    optimizers, norms = tb.make_optimizers(model, s), []
    for step, batch in enumerate(batches):
        tb.set_rates(optimizers, s, step)
        total, balance = loss(model, s, batch)
        ((total + s.balance * balance) / s.batch_tokens).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf).item())
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
        tb.normalize_rows(model, s)
    return norms


# --- runs


def tiny(folder: Path, model_type: str = "gpt", **changes) -> list[str]:
    """Flags of a tiny run on a data set that is made in folder/data if it is not there yet."""
    if "data" not in changes and not (folder / "data").exists():
        make_data(folder / "data")
    where = {"data": folder / "data", "log_dir": folder / "logs", "experiment_name": "x"}
    return flags(**where | given(model_type, **changes))


def run(folder: Path, model_type: str = "gpt", **changes) -> Path:
    """A tiny run to its end; its folder."""
    assert tb.main(tiny(folder, model_type, **changes)) == 0
    return run_folder(folder, changes.get("experiment_name", "x"))


def weights(folder: Path, step: int = 8) -> dict[str, Tensor]:
    """Weights of a checkpoint by name."""
    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["model"]


def load_state(folder: Path, step: int) -> dict[str, Tensor]:
    """All tensors and numbers of a checkpoint under one flat name each."""
    def flatten(value, name: str) -> dict:
        if isinstance(value, dict | list | tuple):
            parts = value.items() if isinstance(value, dict) else enumerate(value)
            return {k: v for key, part in parts for k, v in flatten(part, f"{name}/{key}").items()}
        return {name: torch.as_tensor(value)} if isinstance(value, Tensor | int | float) else {}

    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return flatten(torch.load(path, map_location="cpu", weights_only=True), "")


def rewrite_state(path: Path, state):
    """Another state.pt in a checkpoint, whose hash and size its meta.json says."""
    torch.save(state, path / "state.pt")
    rewrite_meta(path, sha256=tb.file_hash(path / "state.pt"), bytes=(path / "state.pt").stat().st_size)


def rewrite_meta(path: Path, **changes):
    """Other values in a checkpoint's meta.json; None: the key goes."""
    meta = json.loads((path / "meta.json").read_text()) | changes
    (path / "meta.json").write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))


def script_runs(world, command_lines: list[list[str]]) -> list[int]:
    """Runs of the script's loop, in a process that stands for one of torchrun's; how each ended."""
    ended = []
    for argv in command_lines:
        s, hardware, notes = tb.parse_settings(argv, world.size)
        try:
            run = tb.Run(s, hardware, tb.World(*world), notes)
            with run.undo:
                tb.train(run)
            ended.append(run.status)
        except (tb.UserError, OSError) as error:
            ended.append(f"{type(error).__name__}: {error}")
    return ended


def shared_batches(world, data: str) -> list[Tensor]:
    """The share of a process in 20 batches."""
    s = settings("gpt")
    rows = tb.training_rows(s, tb.open_corpus(data))
    return [tb.next_batch(rows, s, tb.World(*world))[0] for _ in range(20)]


def launch(argv: list[str], before: str = ""):
    """The script in another process, after the Python source `before`, in which `train_baseline` is imported."""
    return helpers.launch(argv, f"import train_baseline\n{before}\ntrain_gpt = train_baseline")
