"""What the speedrun costs on 8 GPUs, before and after the recipe of 2026: python bench/projection.py [-- FLAGS]

FLOPs are counted (train_gpt.flops_per_token), bytes from the optimizer's banks: with ring collectives reduce-scatter
and all-gather send (ranks - 1) / ranks of a padded bank each, an all-reduce twice that. Times follow from a utilization
for each number of tokens on a GPU (--mfu), measured on one H200 with an eighth of the old recipe's batch, and from an
assumed bandwidth. FLAGS of train_gpt.py change the recipe after; without any it is the preset.
"""
import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_gpt  # noqa: E402 - after the path
from bench import common  # noqa: E402

VOCAB_SIZE = 50257
MIB, PEAK = 2**20, train_gpt.PEAK_FLOPS["H100"]
FLAGS = "--preset speedrun --kernels none --fp8-head off".split()
CARD = train_gpt.Hardware("cuda", "H100", 80, True, "", capability=(9, 0))
# until 2026-11-25
BEFORE = """--iterations 1800 --stage-ends 0.333333,0.666667,1 --batch-tokens 131072,262144,393216
--seq-len 16384,32768,49152 --max-doc-len 896,2048,2048 --window 384,896,1408 --stage-lr 1,1.52,1.73 --mtp 2,1,0
--candidates 0 --ngram-rows 0 --pointer 0 --qk-dim 0 --extension 0 --tail 0""".split()
MFU = "16384:0.306,32768:0.357,49152:0.376"

def build(flags: list[str], ranks: int) -> tuple[train_gpt.Settings, train_gpt.GPT, list[train_gpt.Bank]]:
    """A recipe, its model and optimizer as rank 0 of several has them, without memory: on the meta device."""
    with mock.patch.object(train_gpt, "detect_hardware", lambda *_: CARD):
        s = common.parsed(train_gpt, [*FLAGS, *flags], world_size=ranks)
    with torch.device("meta"):
        world = train_gpt.World(0, 0, ranks)
        s = dataclasses.replace(s, device="meta", compile=False)
        model = train_gpt.GPT(s, VOCAB_SIZE, world)
        return s, model, train_gpt.MuonAdamW(model, s, world).banks

def traffic(banks: list[train_gpt.Bank], ranks: int) -> dict[str, float]:
    """Bytes that a rank sends for one optimizer step with ring collectives, by collective."""
    scattered = gathered = reduced = 0.0
    for bank in banks:
        numel = bank.grad.numel()  # of the own pieces; a sharded bank has as many for each rank
        if bank.owners == 1:
            reduced += 2 * (ranks - 1) / ranks * numel * bank.grad.dtype.itemsize
        else:
            scattered += (ranks - 1) * numel * bank.grad.dtype.itemsize
            gathered += (ranks - 1) * numel * next(iter(bank.params.values())).dtype.itemsize
    return {"reduce-scatter of gradients": scattered, "all-gather of weights": gathered,
            "all-reduce of small parameters": reduced}

def ngram_traffic(s: train_gpt.Settings, stage: train_gpt.Stage, ranks: int) -> float:
    """Bytes that a rank sends for the n-grams of a step: tokens and documents to all, of vectors and their gradients
    to each rank its columns."""
    own = stage.batch_tokens / ranks
    each = 2 * 4 + 2 * s.width / ranks * s.torch_dtype.itemsize
    return (ranks - 1) * own * each if s.ngram_rows else 0.0

def utilization(text: str, tokens: float) -> float:
    """Between the given TOKENS:SHARE pairs on straight lines, beyond them as at the nearest."""
    points = sorted(tuple(map(float, pair.split(":"))) for pair in text.split(","))
    return float(np.interp(tokens, *zip(*points, strict=True)))

HEAD = """stage | steps | M tokens | tokens a step | classes | MFLOP a token | PFLOP | MFU | s
| MiB sent a step | ms to send""".replace("\n", " ").split(" | ")

def costs(flags: list[str], args: argparse.Namespace) -> tuple[list[list], dict[str, float]]:
    """A row of numbers for each stage, and the totals."""
    s, model, banks = build(flags, args.ranks)
    counts, always = train_gpt.parameter_counts(model), sum(traffic(banks, args.ranks).values())
    rows, total = [], dict.fromkeys(("steps", "tokens", "flops", "seconds", "sent"), 0.0)
    for i, stage in enumerate(train_gpt.stage_table(s), 1):
        steps, per_token = stage.end - stage.start, train_gpt.flops_per_token(s, counts, stage)
        tokens = steps * stage.batch_tokens
        flops, mfu = tokens * per_token, utilization(args.mfu, stage.batch_tokens / args.ranks)
        seconds = flops / (args.ranks * PEAK * mfu)
        sent = always + ngram_traffic(s, stage, args.ranks)
        ms = 1000 * sent / (1e9 * args.bandwidth * args.efficiency)
        for name, amount in zip(total, (steps, tokens, flops, seconds, steps * ms / 1000), strict=True):
            total[name] += amount
        rows.append([
            i, steps, f"{tokens / 1e6:.1f}", f"{stage.batch_tokens:,}", stage.candidates or "all",
            f"{per_token / 1e6:.1f}", f"{flops / 1e15:.1f}", f"{mfu:.1%}", f"{seconds:.1f}",
            f"{sent / MIB:,.1f}", f"{ms:.2f}"])
    return rows, total

def section(name: str, flags: list[str], args: argparse.Namespace) -> str:
    """A recipe's table and totals, in Markdown."""
    rows, total = costs(flags, args)
    at_45 = total["flops"] / (0.45 * args.ranks * PEAK)
    sums = (f"{total['steps']:,.0f} steps, {total['tokens'] / 1e6:.1f} M tokens, "
            f"{total['flops'] / 1e15:.1f} PFLOP: {total['seconds']:.1f} s at these utilizations, "
            f"{at_45:.1f} s at 45 %. Sending takes {total['sent']:.1f} s, of which what overlaps "
            "with computation is hidden.")
    return f"## {name}\n\n{common.markdown(HEAD, rows)}\n\n{sums}\n"

README = """# `speedrun` on {ranks} GPUs, projected

{before}
{after}
After, without n-grams:

{collectives}

Utilization of {peak:g} TFLOP/s by tokens on a GPU, measured with the old recipe on one H200: {mfu}.
A head with fewer classes has smaller products, so the same share is an assumption. Assumed:
{bandwidth:g} GB/s per direction (NVLink, nominal) x {efficiency:g}. Gradients and weights in bf16, banks
padded to {ranks} owners. Not counted: the optimizer's products, lookups, waiting for each other.
"""

def report(args: argparse.Namespace) -> str:
    """The text, in Markdown."""
    sent = traffic(build(args.flags, args.ranks)[2], args.ranks)
    sent |= {"together": sum(sent.values())}
    rows = [[name, f"{count / MIB:,.3f}"] for name, count in sent.items()]
    return README.format(
        before=section("Before", BEFORE, args), after=section("After", args.flags, args),
        collectives=common.markdown(["collective", "MiB per rank and step"], rows), peak=PEAK / 1e12,
        **vars(args))

def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = common.make_parser(__doc__, "train_gpt.py")
    add = parser.add_argument
    add("--ranks", type=int, default=8, help="default: 8")
    add("--mfu", default=MFU, metavar="TOKENS:SHARE,..", help="default: %(default)s")
    add("--bandwidth", type=float, default=450, metavar="GB/S", help="per rank and direction (default: %(default)s)")
    add("--efficiency", type=float, default=0.75, help="of the bandwidth (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the Markdown there, too")
    return parser.parse_args(argv)

def project(args: argparse.Namespace, _command: str) -> int:
    """Prints and writes the report; the exit code."""
    if args.ranks < 2 or not (args.bandwidth > 0 and 0 < args.efficiency <= 1):
        raise ValueError("--ranks must be 2 or more, --bandwidth above 0, --efficiency above 0 and at most 1")
    if not all(0 < common.number(pair.partition(":")[2]) <= 1 for pair in args.mfu.split(",")):
        raise ValueError(f"--mfu {args.mfu}: expected TOKENS:SHARE pairs such as {MFU}")
    text = report(args)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(text, end="")
    return 0

main = partial(common.command_line, "projection", parse_args, project, resumes=False)

if __name__ == "__main__":
    common.start(main)
