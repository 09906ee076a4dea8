"""Project the time of the 8xH100 speedrun from what one GPU measured: python bench/projection.py [FOLDER] [--out FILE]

FOLDER is the --out of bench/gpu.py. A step on 8 GPUs is taken as

    step = single-GPU step with 1/8 of the batch - its whole optimizer + the optimizer of one rank of 8
           (times how much slower an H100 is, if the GPU was an H200)
         + communication * (1 - overlap),   communication = bytes sent per rank / (bandwidth * efficiency)

and the run as the sum over its steps. Bytes are counted from the optimizer's banks at 8 ranks, with ring collectives:
reduce-scatter and all-gather send 7/8 of a padded bank each, an all-reduce twice that. Without FOLDER, or without its
gpu.json, only the communication is computed. No waiting of ranks for each other is modelled, and whether the preset's
steps reach the target loss is a question that this projection does not answer.
"""
from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train_gpt  # noqa: E402 - after the path
from train_gpt import GPT, MuonAdamW, World  # noqa: E402

RANKS = 8
VOCAB_SIZE = 50257
RECORDS = (  # public record, minutes to 3.28 on FineWeb with 8 H100s
    ("#28, the last with FlexAttention", 2.812), ("#89", 1.23),
    ("claimed since #89", 1.167), ("claimed since #89", 1.079),
)

class Traffic(NamedTuple):
    """Bytes that one rank sends in a step."""

    reduce_scatter: float
    all_gather: float
    all_reduce: float

    def total(self) -> float:
        return sum(self)

class Assumptions(NamedTuple):
    """What is not measured."""

    bandwidth: float  # bytes/s that a rank can send, nominal
    efficiency: float  # fraction of it that collectives reach
    overlap: float  # fraction of communication hidden behind computation
    h200_gain: tuple[float, float]  # fraction of an H100's time that an H200 saves, least and most

def build_banks(preset: str, ranks: int, more: list[str]) -> tuple[train_gpt.Settings, list[train_gpt.Bank]]:
    """The preset's optimizer as rank 0 of several has it, without memory: shapes and dtypes on the meta device."""
    flags = ["--preset", preset, "--device", "cpu", "--dtype", "bf16", "--backend", "sdpa", "--no-compile"]
    s = train_gpt.parse_settings([*flags, "--kernels", "none", "--fp8-head", "off", *more], 1)[0]
    with torch.device("meta"):
        s = dataclasses.replace(s, device="meta")
        return s, MuonAdamW(GPT(s, VOCAB_SIZE), s, World(0, 0, ranks)).banks

def traffic(banks: list[train_gpt.Bank], ranks: int) -> Traffic:
    """Bytes that a rank sends for one optimizer step with ring collectives."""
    scattered = gathered = reduced = 0.0
    for bank in banks:
        numel = bank.grad.numel()  # of the own slots; a sharded bank has as many for each rank, padding included
        if bank.owners == 1:
            reduced += 2 * (ranks - 1) / ranks * numel * bank.grad.dtype.itemsize
        else:
            scattered += (ranks - 1) * numel * bank.grad.dtype.itemsize
            gathered += (ranks - 1) * numel * next(iter(bank.params.values())).dtype.itemsize
    return Traffic(scattered, gathered, reduced)

def communication_ms(sent: Traffic, a: Assumptions) -> float:
    return 1000 * sent.total() / (a.bandwidth * a.efficiency)

def slowdowns(gpu: str, a: Assumptions) -> tuple[float, float]:
    """Least and most that an H100's step takes, relative to the measured GPU's. Raises ValueError for other GPUs."""
    if "H200" in gpu:
        return 1 / (1 - a.h200_gain[0]), 1 / (1 - a.h200_gain[1])
    if "H100" in gpu:
        return 1.0, 1.0
    raise ValueError(f"the steps were measured on {gpu}: only those of an H100 or H200 can be projected")

class Measured(NamedTuple):
    """What the projection needs of gpu.json; times in ms."""

    gpu: str
    stages: list[dict]
    optimizer: float  # of a single rank
    own_optimizer: float  # of one rank of 8

def read_measured(folder: Path | None) -> Measured | None:
    """None if there is no gpu.json. Raises ValueError if it lacks what the projection needs, or is a trial's."""
    path = folder / "gpu.json" if folder else None
    if path is None or not path.exists():
        return None
    redo = "run bench/gpu.py with the same --out again, on a GPU"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        about, steps, update = found["about"], found["parts"]["steps"]["rows"], found["parts"]["update"]["rows"]
        stages = list(steps["speedrun"]["lines"].values())
        measured = Measured(about["gpu"], stages, update["optimizer of 1"]["ms"], update[f"optimizer of {RANKS}"]["ms"])
        if about["tiny"] or not measured.gpu or steps["speedrun"]["share"] != RANKS:
            raise ValueError(f"{path} is of a trial on a CPU or with other sizes: {redo}")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} lacks the speedrun's steps or the optimizers' times ({error!r}): {redo}") from error
    return measured

def project(stage: dict, m: Measured, slowdown: float, exposed_ms: float) -> float:
    """ms of a step of one stage on 8 H100s; the stage's middle has its mean window."""
    return (stage["middle"]["ms"] - m.optimizer + m.own_optimizer) * slowdown + exposed_ms

def communication_report(sent: Traffic, a: Assumptions) -> list[str]:
    mib, ms = 2**20, communication_ms(sent, a)
    return [
        f"What each of {RANKS} ranks sends per step (gradients and weights in bf16, banks padded to {RANKS} owners):",
        "", "| collective | MiB per rank and step |", "|---|---|",
        f"| reduce-scatter of gradients | {sent.reduce_scatter / mib:,.1f} |",
        f"| all-gather of weights | {sent.all_gather / mib:,.1f} |",
        f"| all-reduce of small parameters | {sent.all_reduce / mib:,.3f} |",
        f"| together | {sent.total() / mib:,.1f} |", "",
        f"At {a.bandwidth / 1e9:g} GB/s per direction (NVLink, nominal) x efficiency {a.efficiency:g}: {ms:.2f} ms per "
        f"step, {ms * (1 - a.overlap):.2f} ms of it exposed at an overlap of {a.overlap:g}.", "",
    ]

def compute_report(m: Measured, exposed_ms: float, a: Assumptions) -> list[str]:
    """The stages, the run, and the public records."""
    scales = slowdowns(m.gpu, a)
    lines = [f"Measured on one {m.gpu}; optimizer of one rank alone {m.optimizer:.2f} ms, of one of {RANKS} "
             f"{m.own_optimizer:.2f} ms; an H100 is taken as {scales[0]:.3f} to {scales[1]:.3f} times as slow.", "",
             "| stage | steps | tokens per step, all ranks | measured ms/step, one GPU | projected ms/step, 8 H100s |",
             "|---|---|---|---|---|"]
    totals = [0.0, 0.0]
    for i, stage in enumerate(m.stages, 1):
        steps = stage["end_step"] - stage["start_step"]
        times = [project(stage, m, scale, exposed_ms) for scale in scales]
        totals = [total + steps * ms for total, ms in zip(totals, times, strict=True)]
        lines.append(f"| {i} | {steps:,} | {RANKS * stage['batch_tokens']:,} | {stage['middle']['ms']:.2f} | "
                     f"{times[0]:.2f} to {times[1]:.2f} |")
    low, high = (total / 60_000 for total in totals)
    return [*lines, "", "| run | minutes |", "|---|---|", f"| **ours, projected, not run** | {low:.3f} to {high:.3f} |",
            *(f"| public record {name} | {minutes:g} |" for name, minutes in RECORDS), "",
            "A record is a run that reached 3.28; ours is a sum of step times, and its loss is not known.", ""]

def report(folder: Path | None, a: Assumptions, more: list[str]) -> str:
    """The whole text. Raises ValueError for an unusable gpu.json."""
    sent = traffic(build_banks("speedrun", RANKS, more)[1], RANKS)
    lines = ["# Projection of the 8xH100 track", "", *communication_report(sent, a)]
    if measured := read_measured(folder):
        lines += compute_report(measured, communication_ms(sent, a) * (1 - a.overlap), a)
    else:
        lines += ["Compute has not been measured: there is no gpu.json of bench/gpu.py, so no time is projected.", ""]
    gain = " to ".join(f"{100 * part:g}" for part in a.h200_gain)
    lines.append(f"Assumed, not measured: bandwidth, efficiency, overlap, an H200's gain over an H100 ({gain} %, "
                 "from public logs of 8 GPUs), and that no rank waits for another.")
    return "\n".join(lines) + "\n"

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="the --out of bench/gpu.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the Markdown there; default: print it")
    parser.add_argument("--bandwidth", type=float, default=450, metavar="GB/S", help="per rank and direction")
    parser.add_argument("--efficiency", type=float, default=0.75, help="of the bandwidth (default: %(default)s)")
    parser.add_argument("--overlap", type=float, default=0.5, help="of communication (default: %(default)s)")
    parser.add_argument("--h200-gain", "--h200_gain", type=float, nargs=2, default=(5.1, 6.4), metavar=("LOW", "HIGH"),
                        help="percent of an H100's time that an H200 saves (default: 5.1 6.4)")
    return parser.parse_args(argv)

def assumptions(args: argparse.Namespace) -> Assumptions:
    """Raises ValueError for values outside their range."""
    low, high = (percent / 100 for percent in args.h200_gain)
    if not (args.bandwidth > 0 and 0 < args.efficiency <= 1 and 0 <= args.overlap <= 1 and 0 <= low <= high < 1):
        raise ValueError("--bandwidth must be above 0, --efficiency above 0 and at most 1, --overlap 0 to 1, and "
                         "--h200-gain two rising percentages below 100")
    return Assumptions(1e9 * args.bandwidth, args.efficiency, args.overlap, (low, high))

def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        text = report(args.folder, assumptions(args), [])
        if args.out:
            args.out.write_text(text, encoding="utf-8")
        print(text, end="")
        return 0
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

if __name__ == "__main__":
    sys.exit(main())
