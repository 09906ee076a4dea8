"""Losses of many configurations, so that a rewrite can be held against what was there before.

    python tests/losses.py --out before.json              # of this tree, about 5 minutes of one core
    python tests/losses.py --tree ELSEWHERE --out after.json
    python tests/losses.py --compare before.json after.json

Every run is a process of its own: one thread, fp32 unless the configuration says bf16, a tiny model on documents that
are made here. What is recorded are the losses of all steps, in full precision, and a hash of the final weights and
moments. On one machine they are equal to the bit; on another one the order of sums differs, and test_losses.py allows
for that.
"""
import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import documents, make_data  # noqa: E402

RECORDED = Path(__file__).with_name("losses.json")
SHORT = ("--iterations 8 --batch-tokens 2048 --seq-len 256 --micro-tokens 2048 --eval-every 4 --eval-tokens 8192 "
         "--value-embeds 1 --width 96 --head-dim 24 ")
CONSTANT = "--lr-floor 0 --tail 0 --no-key-offset "  # the cpu preset's, before the recipe of 2026
MUON = "--momentum-warmup 4 --momentum-cooldown 2 "
PLAIN = "--preset cpu --num-layers 6 " + CONSTANT + SHORT.replace("--value-embeds 1", "--value-embeds 2")
ALL = PLAIN + "--paired --key-offset --xsa --skip single --backout --softcap 23,5,7.5 "
STAGES = ("--stage-ends 0.5,1 --mtp 2,0 --seq-len 128,256 --max-doc-len 64,0 --batch-tokens 1024,2048 "
          "--window 128,256 --stage-lr 1,1.5 ")
BIG = "--device cpu --no-compile --width 48 --head-dim 12 --micro-tokens 1024 --eval-tokens 4096 "
ONE_STAGE = BIG + "--iterations 4 --batch-tokens 2048 --seq-len 512 --window 256 "
OFF = "--stage-ends 1 --candidates 0 --ngram-rows 0 --pointer 0 --qk-dim 0 --tail 0 "
RECIPE = ("--candidates 128,0 --stage-ends 0.5,1 --ngram-rows 1000 --ngram-every 3 --pointer 16 --qk-dim 12 "
          "--tail 0.5 --tail-steps 2 --cooldown-others 0.3 --extension 0.1 ")
MIXTURE = "--num-layers 3 " + CONSTANT + SHORT

CONFIGURATIONS = {  # name: script, flags, processes
    "cpu": ("gpt", "--preset cpu --iterations 12 --eval-every 6 --eval-tokens 16384 " + CONSTANT, 1),
    "all": ("gpt", ALL + MUON, 1),
    "bf16": ("gpt", ALL + MUON + "--dtype bf16", 1),
    "fp8": ("gpt", ALL + MUON + "--dtype bf16 --fp8-head on --fp8-mlp", 1),
    "fp8_fp32": ("gpt", PLAIN + MUON + "--fp8-head on --softcap 0,0,1", 1),
    "stages": ("gpt", ALL + MUON + STAGES, 1),
    "plainer": ("gpt", PLAIN + MUON + "--skip none --no-smear --no-attn-gate --no-value-gate --muon-beta2 0 "
                                      "--no-cautious", 1),
    "nocap": ("gpt", PLAIN + MUON + "--softcap 0,0,1", 1),
    "adamw": ("gpt", ALL + "--hidden-optimizer adamw", 1),
    "mup": ("gpt", ALL + MUON + "--mup --base-width 48", 1),
    "mup_adamw": ("gpt", PLAIN + "--mup --base-width 48 --base-head-dim 12 --hidden-optimizer adamw", 1),
    "schulz": ("gpt", PLAIN + MUON + "--orthogonalizer newton_schulz --adam-weight-decay 0.01 "
                                     "--muon-weight-decay 0.1", 1),
    "wsd": ("gpt", PLAIN + MUON + "--schedule wsd --warmup-steps 3 --lr-floor 0.2", 1),
    "yarn": ("gpt", PLAIN + MUON + "--window 64 --eval-window 256", 1),
    "clip": ("gpt", PLAIN + MUON + "--long-docs clip --no-shuffle --max-doc-len 100", 1),
    "micro": ("gpt", ALL + MUON + "--micro-tokens 512", 1),
    "sdpa": ("gpt", ALL + MUON + "--backend sdpa --target-loss 4.5", 1),
    "gpu": ("gpt", "--preset gpu --num-layers 12 " + ONE_STAGE + OFF + "--lr-floor 0.1", 1),
    "medium": ("gpt", "--preset medium " + ONE_STAGE + OFF + "--lr-floor 0.1", 1),
    "speedrun": ("gpt", "--preset speedrun --num-layers 12 " + BIG + "--iterations 24 --batch-tokens 1024,2048 "
                        "--stage-ends 0.6,1 --seq-len 512 --max-doc-len 256 --window 128,256 --stage-lr 1,1.5 "
                        "--mtp 2,0 --candidates 0 --ngram-rows 1000 --qk-dim 8 --tail-steps 4 --save-last", 1),
    "recipe": ("gpt", ALL + MUON + RECIPE, 1),
    "recipe_two_ranks": ("gpt", ALL + MUON + RECIPE, 2),
    "two_ranks": ("gpt", ALL + MUON, 2),
    "compiled": ("gpt", "--preset cpu --num-layers 2 --width 48 --head-dim 12 --iterations 6 --batch-tokens 1024 "
                        "--seq-len 256 --micro-tokens 1024 --eval-tokens 4096 --compile --momentum-warmup 2 "
                        "--momentum-cooldown 1 --no-key-offset", 1),
    "mixtral": ("moe", "--preset mixtral-cpu " + MIXTURE + MUON, 1),
    "deepseek": ("moe", "--preset deepseek-cpu " + MIXTURE + MUON, 1),
    "speed": ("moe", "--preset speed-cpu " + MIXTURE + MUON, 1),
    "switch": ("moe", "--preset mixtral-cpu --router softmax_topk --capacity-factor 1.25 " + MIXTURE + MUON, 1),
    "dense": ("moe", "--preset cpu --num-experts 0 " + MIXTURE + MUON, 1),
    "moe_mup": ("moe", "--preset mixtral-cpu --mup --base-width 48 --expert-hidden 96 " + MIXTURE + MUON, 1),
    "moe_mup_wide": ("moe", "--preset deepseek-cpu --mup --base-width 48 " + MIXTURE + MUON, 1),
    "moe_adamw": ("moe", "--preset deepseek-cpu --hidden-optimizer adamw --mup --base-width 48 --expert-hidden 48 "
                  + MIXTURE, 1),
    "moe_micro": ("moe", "--preset mixtral-cpu --moe-impl bmm "
                  + MIXTURE.replace("--micro-tokens 2048", "--micro-tokens 512") + MUON, 1),
    "moe_recipe": ("moe", "--preset mixtral-cpu " + MIXTURE + MUON + RECIPE, 1),
    "moe_two_ranks": ("moe", "--preset mixtral-cpu " + MIXTURE + MUON, 2),
}


def command(script: str, flags: str, processes: int, folder: str) -> list[str]:
    """The command line of a configuration: data and logs are in a folder, nothing is left to the machine."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    fixed = f"--log-every 1 --threads 1 --data {folder}/data --log-dir {folder} --experiment-name x"
    fixed += "" if "--dtype" in flags else " --dtype fp32"
    fixed += "" if "compile" in flags else " --no-compile"
    return [*launch, f"train_{script}.py", *flags.split(), *fixed.split()]


def hashes(state: dict) -> dict[str, str]:
    """A hash of each kind of optimizer state, master weights among them, over all parameters."""
    found = {}
    for key, tensors in state.items():
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            digest.update(name.encode() + tensor.to_dense().contiguous().numpy().tobytes())
        found[f"state {key}"] = digest.hexdigest()[:16]
    return found


def measure(tree: Path, name: str) -> dict:
    """Losses by step, and hashes of the last checkpoint. Raises RuntimeError with what the run said."""
    import torch
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "data", [documents(60_000, seed) for seed in range(2)], [documents(20_000, 9)])
        run = subprocess.run(command(*CONFIGURATIONS[name], folder), cwd=tree, capture_output=True, text=True,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
        if run.returncode:
            raise RuntimeError(f"{name}: {run.stderr[-2000:]}")
        lines = next(Path(folder).glob("x/*/metrics.jsonl")).read_text().splitlines()
        records = [record for line in lines if "event" not in (record := json.loads(line))]
        result = {f"{key} {r['step']}": r[key] for r in records for key in ("train_loss", "val_loss") if key in r}
        checkpoint = next(Path(folder).glob("x/*/checkpoints/step_*"))
        state = torch.load(checkpoint / "state.pt", weights_only=True)["optimizer"]["state"]
        return result | hashes(state)


def compare(before: dict, after: dict) -> list[str]:
    """A line for each configuration of both."""
    lines = []
    for name in before.keys() & after.keys():
        differing = [key for key in before[name] if before[name][key] != after[name].get(key)]
        lines.append(f"{name}: " + (f"differs in {', '.join(differing)}" if differing else "equal"))
    return sorted(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=ROOT, help="checkout whose scripts are run (default: this one)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS), metavar="NAME")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON", help="compare two files instead")
    args = parser.parse_args()
    if args.compare:
        lines = compare(*(json.loads(path.read_text()) for path in args.compare))
        print("\n".join(lines))
        return int(any("differs" in line for line in lines))
    result = {}
    for name in args.only:
        result[name] = measure(args.tree, name)
        print(name, [value for key, value in result[name].items() if "loss" in key][-1], flush=True)
        if args.out:
            args.out.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
