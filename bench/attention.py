"""Time the attention backends of train_gpt.py, forward and backward, on the hardware at hand.

    python bench/attention.py                # the shapes of the cpu preset and of the CPU benchmark
    python bench/attention.py --rows 1 --seq-len 49152 --heads 6 --head-dim 128 --window 1792     # speedrun, on a GPU

Prints the best of --repeats runs per backend in ms and its ratio to SDPA. Documents are half a row long.
"""
from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402 - after the path

SHAPES = ((32, 64, 4, 32), (32, 256, 4, 64))  # rows, seq_len, heads, head_dim

def best_ms(function, repeats: int, device: str) -> float:
    """Shortest of several timed calls, after two warm-up calls, in ms."""
    times = []
    for i in range(repeats + 2):
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        if device == "cuda":
            torch.cuda.synchronize()
        times += [1000 * (time.perf_counter() - began)] if i >= 2 else []
    return min(times)

def compare(shape: tuple[int, ...], window: int, dtype: torch.dtype, device: str, repeats: int) -> dict[str, float]:
    """Backend -> ms of forward and backward; SDPA and the plain formula are left out where (T, T) does not fit."""
    rows, seq_len, heads, head_dim = shape
    docs = (torch.arange(seq_len, device=device) // (seq_len // 2)).to(torch.int32).expand(rows, -1).contiguous()
    limit = torch.tensor(window or seq_len, dtype=torch.int32, device=device)
    *leaves, weight = (torch.randn(rows, seq_len, heads, head_dim, device=device, dtype=dtype) for _ in range(4))
    leaves = [leaf.requires_grad_() for leaf in leaves]
    backends = (["sdpa", "plain"] if rows * seq_len**2 < 2**28 else []) + (["flex"] if device == "cuda" else [])
    attend = torch.compile(train_gpt.attend, dynamic=False) if device == "cuda" else train_gpt.attend
    times = {}
    for backend in backends:
        mask = (train_gpt.block_mask if backend == "flex" else train_gpt.dense_mask)(docs, limit)
        times[backend] = best_ms(lambda b=backend, m=mask: attend(*leaves, m, 0.2, b).backward(weight), repeats, device)
    return times

def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    for name in ("rows", "seq-len", "heads", "head-dim", "window"):
        parser.add_argument(f"--{name}", type=int, default=0, help="0: the built-in shapes, no window")
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = [(args.rows, args.seq_len, args.heads, args.head_dim)] if args.rows else SHAPES
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            times = compare(shape, args.window, dtype, device, args.repeats)
            base = times.get("sdpa", min(times.values()))
            print(f"rows {shape[0]}, seq_len {shape[1]}, heads {shape[2]} x {shape[3]}, {dtype}: "
                  + ", ".join(f"{name} {ms:.2f} ms ({ms / base:.2f})" for name, ms in times.items()), flush=True)
    return 0

if __name__ == "__main__":
    sys.exit(main())
