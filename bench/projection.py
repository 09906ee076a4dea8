"""Bytes that each of several ranks sends in an optimizer step of the speedrun: python bench/projection.py [--out FILE]

Counted from the optimizer's banks, not timed: with ring collectives reduce-scatter and all-gather send (ranks - 1) /
ranks of a padded bank each, an all-reduce twice that. The time follows from the bandwidth and an efficiency, neither
of which is measured.
"""
import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402 - after the path
from bench import common  # noqa: E402

VOCAB_SIZE = 50257
MIB = 2**20

def build_banks(preset: str, ranks: int) -> list[train_gpt.Bank]:
    """The preset's optimizer as rank 0 of several has it, without memory: shapes and dtypes on the meta device."""
    flags = "--device cpu --dtype bf16 --backend sdpa --no-compile --kernels none --fp8-head off".split()
    s = train_gpt.parse_settings(["--preset", preset, *flags], 1)[0]
    with torch.device("meta"):
        s = dataclasses.replace(s, device="meta")
        return train_gpt.MuonAdamW(train_gpt.GPT(s, VOCAB_SIZE), s, train_gpt.World(0, 0, ranks)).banks

def traffic(banks: list[train_gpt.Bank], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends for one optimizer step with ring collectives, by collective."""
    scattered = gathered = reduced = 0.0
    for bank in banks:
        numel = bank.grad.numel()  # of the own pieces; a sharded bank has as many for each rank, padding included
        if bank.owners == 1:
            reduced += 2 * (ranks - 1) / ranks * numel * bank.grad.dtype.itemsize
        else:
            scattered += (ranks - 1) * numel * bank.grad.dtype.itemsize
            gathered += (ranks - 1) * numel * next(iter(bank.params.values())).dtype.itemsize
    return {"reduce-scatter of gradients": scattered, "all-gather of weights": gathered,
            "all-reduce of small parameters": reduced}

def report(args: argparse.Namespace) -> str:
    """The text, in Markdown."""
    sent = traffic(build_banks("speedrun", args.ranks), args.ranks)
    total = sum(sent.values())
    ms = 1000 * total / (1e9 * args.bandwidth * args.efficiency)
    rows = [[name, f"{count / MIB:,.3f}"] for name, count in (sent | {"together": total}).items()]
    return (f"# What each of {args.ranks} ranks sends in a step of `speedrun`\n\nGradients and weights in bf16, banks "
            f"padded to {args.ranks} owners.\n\n{common.markdown(['collective', 'MiB per rank and step'], rows)}\n\n"
            f"At {args.bandwidth:g} GB/s per direction (NVLink, nominal) x efficiency {args.efficiency:g}, both "
            f"assumed, {ms:.2f} ms, of which what overlaps with computation is hidden.\n")

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="default: 8")
    add("--bandwidth", type=float, default=450, metavar="GB/S", help="per rank and direction (default: %(default)s)")
    add("--efficiency", type=float, default=0.75, help="of the bandwidth (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the Markdown there, too")
    return parser.parse_args(argv)

def project(args: argparse.Namespace, _command: str) -> int:
    """Prints and writes the report; the exit code."""
    if args.ranks < 2 or not (args.bandwidth > 0 and 0 < args.efficiency <= 1):
        raise ValueError("--ranks must be 2 or more, --bandwidth above 0, --efficiency above 0 and at most 1")
    text = report(args)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0

main = partial(common.command_line, "projection", parse_args, project, resumes=False)

if __name__ == "__main__":
    common.start(main)
