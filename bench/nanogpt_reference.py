"""The reference of the CPU benchmark: nanoGPT's documented CPU run on the characters of Tiny Shakespeare.

    python bench/nanogpt_reference.py --data data/shakespeare_char

nanoGPT (https://github.com/karpathy/nanoGPT, README section "I only have a macbook") documents this run as

    train.py config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
        --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
        --lr_decay_iters=2000 --dropout=0.0

and says "a loss of only 1.88". This file is an own implementation; `Config` says where nanoGPT sets each number. All
differences favour the reference: no evaluation interrupts training, few steps print, the token file is opened once.

After training, the whole validation split is evaluated as a fixed stream (`fixed_stream`): every target once,
contexts of at most 64 characters. Progress goes to stderr; stdout gets one JSON line: val_loss (nats per character),
params, train_s, ms_per_step, tokens_per_s.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

HEADER_BYTES, MAGIC, VERSION = 1024, 20240520, 1  # the shard format written by the tools in data/

@dataclass(frozen=True)
class Config:
    """The documented run. Sources: C = the command line above, F = config/train_shakespeare_char.py, D = default."""
    vocab_size: int = 65  # distinct characters of Tiny Shakespeare
    n_layer: int = 4  # C
    n_head: int = 4  # C
    n_embd: int = 128  # C
    block_size: int = 64  # C; characters of context
    batch_size: int = 12  # C; F sets one accumulation step, so an iteration sees 768 characters
    iterations: int = 2000  # C; max_iters and lr_decay_iters
    warmup: int = 100  # F
    max_lr: float = 1e-3  # F
    min_lr: float = 1e-4  # F
    betas: tuple[float, float] = (0.9, 0.99)  # D, F
    weight_decay: float = 0.1  # D
    grad_clip: float = 1.0  # D
    # dropout is 0 (C) and no Linear or LayerNorm has a bias (D), so neither appears in the model.

class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); (B, T, C) to (B, T, C)."""

    def __init__(self, cfg: Config):
        super().__init__()
        width = cfg.n_embd
        self.heads = cfg.n_head
        self.norm_attn = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_out = nn.Linear(width, width, bias=False)
        self.norm_mlp = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, T, C/heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_out(y.transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.norm_attn(x))
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_mlp(x))))

class GPT(nn.Module):
    """GPT-2 as nanoGPT trains it: learned positions, a final LayerNorm, the head tied to the token embedding."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.token = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        self.position = nn.Embedding(cfg.block_size, cfg.n_embd)
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.norm = nn.LayerNorm(cfg.n_embd, bias=False)
        self.init_weights(cfg)

    @torch.no_grad()
    def init_weights(self, cfg: Config) -> None:
        """N(0, 0.02) for every matrix; the 2 * n_layer outputs added to the residual are scaled down (GPT-2 paper)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                residual = name.endswith(("attn_out.weight", "mlp_out.weight"))
                weight.normal_(0.0, 0.02 / math.sqrt(2 * cfg.n_layer) if residual else 0.02)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map token ids (B, T), T <= block_size, to logits (B, T, vocab_size)."""
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.token.weight)

def make_optimizer(model: nn.Module, cfg: Config) -> torch.optim.AdamW:
    """AdamW that decays matrices and embeddings (2-D) and leaves the norm gains (1-D) alone; unfused, as on CPU."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    gains = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=cfg.max_lr, betas=cfg.betas)

def learning_rate(step: int, cfg: Config) -> float:
    """Rate of 0-based iteration `step`: linear to max_lr over the warm-up, then a cosine down to min_lr at the end."""
    if step < cfg.warmup:
        return cfg.max_lr * (step + 1) / (cfg.warmup + 1)
    progress = min(1.0, (step - cfg.warmup) / max(1, cfg.iterations - cfg.warmup))
    return cfg.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (cfg.max_lr - cfg.min_lr)

def load_tokens(folder: Path, split: str) -> np.ndarray:
    """Memory-map the one shard of `split` in `folder` as uint16 tokens (N,).
    Raises FileNotFoundError if there is no shard, ValueError if there are several or the shard is damaged."""
    shards = sorted(folder.glob(f"*_{split}_*.bin"))
    if not shards:
        raise FileNotFoundError(f"no *_{split}_*.bin in {folder}; make it with `python data/shakespeare_char.py`")
    if len(shards) > 1:
        raise ValueError(f"{folder} holds {len(shards)} {split} shards, but the reference reads the one of Shakespeare")
    header = np.fromfile(shards[0], dtype="<i4", count=3)
    if len(header) < 3 or tuple(header[:2]) != (MAGIC, VERSION):
        raise ValueError(f"{shards[0]} is not a token shard; make it again with `python data/shakespeare_char.py`")
    if shards[0].stat().st_size != HEADER_BYTES + 2 * int(header[2]):
        raise ValueError(f"{shards[0]} does not hold the {header[2]} tokens of its header; make it again")
    return np.memmap(shards[0], dtype="<u2", mode="r", offset=HEADER_BYTES)

def random_batch(tokens: np.ndarray, cfg: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (batch_size, block_size), each row from a uniformly random offset of `tokens`."""
    offsets = torch.randint(len(tokens) - cfg.block_size, (cfg.batch_size,)).tolist()
    rows = np.stack([tokens[i : i + cfg.block_size + 1] for i in offsets]).astype(np.int64)
    rows = torch.from_numpy(rows)
    return rows[:, :-1], rows[:, 1:]

def fixed_stream(tokens: np.ndarray, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut N tokens into consecutive contexts: inputs tokens[:-1], targets tokens[1:], both (ceil((N-1)/block), block).
    Every one of the N - 1 targets appears once. Padding of the last row is input 0, target -1 (no loss)."""
    if len(tokens) < 2:
        raise ValueError(f"validation needs at least 2 tokens, got {len(tokens)}")
    stream = torch.from_numpy(tokens.astype(np.int64))
    padding = -(len(stream) - 1) % block_size
    inputs, targets = F.pad(stream[:-1], (0, padding)), F.pad(stream[1:], (0, padding), value=-1)
    return inputs.view(-1, block_size), targets.view(-1, block_size)

def loss_of(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Cross-entropy in nats over all targets that are not -1."""
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)

@torch.no_grad()
def evaluate(model: nn.Module, tokens: np.ndarray, cfg: Config) -> float:
    """Mean nats per target over the fixed stream of `tokens`."""
    inputs, targets = fixed_stream(tokens, cfg.block_size)
    batches = zip(inputs.split(128), targets.split(128), strict=True)
    return sum(loss_of(model, x, y, "sum").item() for x, y in batches) / (len(tokens) - 1)

def train(model: nn.Module, tokens: np.ndarray, cfg: Config) -> float:
    """Run the iterations, with progress on stderr; return the loss of the last batch in nats."""
    optimizer = make_optimizer(model, cfg)
    for step in range(cfg.iterations):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        loss = loss_of(model, *random_batch(tokens, cfg))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0 or (step + 1) % 500 == 0:
            print(f"step {step + 1}/{cfg.iterations} loss {loss.item():.4f}", file=sys.stderr, flush=True)
    return loss.item()

def run(args: argparse.Namespace) -> dict:
    """Train and evaluate once; return the result line as a dict."""
    if args.iterations < 1:
        raise ValueError(f"--iterations must be at least 1, got {args.iterations}")
    train_tokens, val_tokens = load_tokens(args.data, "train"), load_tokens(args.data, "val")
    vocab_size = json.loads((args.data / "meta.json").read_text(encoding="utf-8"))["vocab_size"]
    cfg = Config(vocab_size=vocab_size, iterations=args.iterations)
    torch.manual_seed(args.seed)
    model = GPT(cfg)
    start = time.perf_counter()
    train(model, train_tokens, cfg)
    seconds = time.perf_counter() - start
    result = {"val_loss": evaluate(model, val_tokens, cfg)}
    return result | {
        "params": sum(p.numel() for p in model.parameters()),
        "train_s": seconds,
        "ms_per_step": 1000 * seconds / cfg.iterations,
        "tokens_per_s": cfg.iterations * cfg.batch_size * cfg.block_size / seconds,
    }

def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/shakespeare_char"), metavar="DIR")
    parser.add_argument("--seed", type=int, default=1337, help="default: nanoGPT's 1337")
    parser.add_argument("--iterations", type=int, default=Config.iterations)
    return parser.parse_args(argv)

def main(argv: list[str] | None = None) -> int:
    try:
        print(json.dumps(run(parse_args(argv))), flush=True)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0

if __name__ == "__main__":
    sys.exit(main())
