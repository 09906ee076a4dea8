"""Parameters and FLOPs of train_moe.py's presets at `speedrun` size, counted without weights, data or a GPU.

    python records/2026-11-26_redesign/moe_sizes.py

FLOPs of forward and backward per token are means over the run, each stage weighted by its tokens.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train_moe  # noqa: E402

VOCABULARY = 50257  # of the data set's GPT-2 tokens
ROW = "| {} | {:,} | {:,} | {:.2f} | {:.4f} |"


def sizes(*flags: str) -> tuple[int, int, float]:
    """Parameters, those that a token meets, and FLOPs per token."""
    s, _, _ = train_moe.parse_settings([*flags, "--device", "cpu"], 1)
    with torch.device("meta"):
        counts = train_moe.parameter_counts(train_moe.GPT(s, VOCABULARY))
    tokens = flops = 0
    for stage in train_moe.stage_table(s):
        share = (stage.end - stage.start) * stage.batch_tokens
        tokens += share
        flops += share * train_moe.flops_per_token(s, counts, stage)
    return counts["total"], counts["active"], flops / tokens


def main():
    print("| preset | parameters | active | active MFLOPs/token | / dense |\n|---|---|---|---|---|")
    *counts, dense = sizes("--preset", "speedrun", "--num-experts", "0")
    print(ROW.format("dense", *counts, dense / 1e6, 1))
    for kind in ("mixtral", "deepseek", "speed"):
        *counts, flops = sizes("--preset", f"{kind}-speedrun")
        print(ROW.format(f"`{kind}-speedrun`", *counts, flops / 1e6, flops / dense))


if __name__ == "__main__":
    main()
