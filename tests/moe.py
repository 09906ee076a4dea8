"""What the tests of train_moe.py share: a tiny mixture, models with random weights, batches, runs of both scripts."""
from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from helpers import CPU, TINY, VOCAB, run_folder, tiny

import train_gpt
import train_moe as tm
from train_moe import GPT, Hardware, Settings

ROUTERS = ("noisy_topk", "softmax_topk", "sigmoid_bias")
PLAIN_IMPLS = ("grouped", "bmm", "loop")  # those that need no Triton
MIXTURE = dict(num_experts=4, top_k=2, z_coef=0.001, expert_lr=1.0)  # of the tiny runs
FIELDS = [field.name for field in dataclasses.fields(Settings)]


def settings(**changes) -> Settings:
    """Resolved settings of a tiny model with mixtures in all layers, without a command line. Single values of staged
    settings may be bare."""
    given = {**TINY, **MIXTURE, "attention": "LL", "backend": "sdpa", "compile_unit": "model", "eval_seq_len": 32,
             "kernels": "none", "fp8_head": "off", "moe_impl": "loop", **changes}
    staged = (*tm.staged_settings(), "stage_ends")
    s = Settings(**{k: (v,) if k in staged and not isinstance(v, tuple) else v for k, v in given.items()})
    return dataclasses.replace(s, moe_layers=s.moe_layers if s.moe_layers != "auto" else tm.auto_mixtures(s))


def random_model(s: Settings, seed: int = 0) -> GPT:
    """A model whose every parameter is random, those that start at zero, too; in fp32."""
    model, random = GPT(s, VOCAB), torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "scalars":
                p.normal_(std=0.5 if name == "routers" else 0.3, generator=random)
        model.get_buffer("router_bias").normal_(std=0.2, generator=random)
    return model


def random_batch(rows: int = 4, seq_len: int = 32, seed: int = 0) -> torch.Tensor:
    """(3, rows, T) int32: inputs, targets, document numbers, two documents a row and more in the first."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(VOCAB, (rows, seq_len + 1), generator=random, dtype=torch.int32)
    docs = (torch.arange(seq_len, dtype=torch.int32) >= seq_len // 2).int().repeat(rows, 1)
    docs[0, seq_len // 4:] += 1
    return torch.stack([tokens[:, :-1], tokens[:, 1:], docs])


def random_noise(s: Settings, rows: int = 4, seq_len: int = 32, seed: int = 0) -> torch.Tensor | None:
    """A batch's noise, for the router that takes it."""
    shape, random = (rows, len(s.mixtures), seq_len, s.num_experts), torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random) if s.router == "noisy_topk" else None


def window(length: int = 32) -> torch.Tensor:
    return torch.tensor(length, dtype=torch.int32)


def all_penalties(sums: torch.Tensor, num_experts: int) -> dict[str, torch.Tensor]:
    """The value of each penalty in each layer, from sums per token."""
    names = "importance", "load", "switch", "sequence", "z"
    return {name: tm.penalty(name, 1.0, sums, num_experts)[0] for name in names}


def sum_size(num_experts: int) -> int:
    """Length of a router's sums: four by expert, dropped choices in 8 parts of a row, five more."""
    return 4 * num_experts + 8 + 5


def layer_sums(model: GPT, s: Settings, batch: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """The routers' sums of a batch per token, (M, S)."""
    inputs, targets, docs = batch
    values = model(inputs, targets[None], docs, window(), noise)
    return values[1:].view(len(s.mixtures), -1) / inputs.numel()


# --- runs


def parse(*argv, hardware: Hardware = CPU, world_size: int = 1, monkeypatch) -> Settings:
    """Settings of a command line on a machine of our choice."""
    monkeypatch.setattr(tm, "detect_hardware", lambda device="auto": tm.Hardware(*hardware))
    return tm.parse_settings([str(a) for a in argv], world_size)[0]


def train(script, tmp_path: Path, **changes) -> Path:
    """A tiny run in this process of train_gpt or train_moe; its folder."""
    experiment = changes.setdefault("experiment_name", f"x{len(list((tmp_path / 'logs').glob('*')))}")
    experts = {} if script is train_gpt else {"num_experts": 4}
    assert script.main(tiny(tmp_path, **experts | changes)) == 0
    return run_folder(tmp_path, experiment)


def saved_state(folder: Path, step: int) -> dict:
    """The optimizer's part of a checkpoint, as it is: {"steps", "state", "balance"}."""
    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return torch.load(path, map_location="cpu", weights_only=True)["optimizer"]
