"""What the tests of train_gpt.py share: tiny data sets, the flags of a tiny model, runs in this or another process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import train_gpt
from train_gpt import Hardware, Settings

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "train_gpt.py"
VOCAB, EOT = 64, 63
CPU = Hardware("cpu", "test CPU", 8.0, False, "the test says so")
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 79.6, True, "compute capability 9.0 >= 8.0")
# A model that trains a step in milliseconds; each run spells out device, dtype and threads, so that it is the same
# arithmetic on every machine and in every process.
TINY = dict(
    cooldown=0.45, lr_floor=0.1, muon_momentum=0.95,  # all that lr and momentum depend on: presets may change
    num_layers=2, width=32, head_dim=16, value_embeds=1, seq_len=32, max_doc_len=32, batch_tokens=128, micro_tokens=128,
    window=32, window_start=16, window_step=8, iterations=8, eval_every=4, eval_tokens=300, momentum_warmup=4,
    momentum_cooldown=2, muon_lr=0.02, adam_lr=0.002, log_every=1, threads=1, device="cpu", dtype="fp32", compile=False,
)


# --- data


def write_shard(path: Path, tokens, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    """A shard in the published format, or with a header that lies."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes())
    return path


def documents(total: int, seed: int, eot: int = EOT) -> np.ndarray:
    """`total` tokens of documents of 2 to 80 tokens, each rising by 1 or 2 from token to token: easy to learn."""
    rng, parts, size = np.random.default_rng(seed), [], 0
    while size < total:
        length = int(rng.integers(1, 80))
        steps = rng.integers(1, 3, size=length).cumsum() + rng.integers(VOCAB)
        parts.append(np.concatenate(([eot], steps % (VOCAB - 1))))
        size += length + 1
    return np.concatenate(parts)[:total]


def make_data(folder: Path, train=None, val=None, vocab_size: int = VOCAB, eot: int | None = EOT, **meta) -> Path:
    """A data set with meta.json; `train` and `val` are lists of shards' tokens. Keywords replace keys of meta.json."""
    splits = {"train": train or [documents(1000, seed) for seed in range(3)], "val": val or [documents(500, 9)]}
    folder.mkdir(parents=True, exist_ok=True)
    for split, shards in splits.items():
        for i, tokens in enumerate(shards):
            write_shard(folder / f"{folder.name}_{split}_{i:06d}.bin", tokens)
    counts = {split: sum(map(len, shards)) for split, shards in splits.items()}
    said = {split: {"tokens": count, "bytes": 2 * count} for split, count in counts.items()}
    full = {"name": folder.name, "tokenizer": {"kind": "byte"}, "vocab_size": vocab_size, "eot": eot,
            "source": "made by a test", "splits": said}
    (folder / "meta.json").write_text(json.dumps(full | meta))
    return folder


# --- settings


def settings(**changes) -> Settings:
    """Resolved settings of the tiny model, without a command line. Single values of staged settings may be bare."""
    given = {**TINY, "attention": "LL", "backend": "sdpa", "compile_unit": "model", "eval_seq_len": 32, **changes}
    staged = (*train_gpt.staged_settings(), "stage_ends")
    return Settings(**{k: (v,) if k in staged and not isinstance(v, tuple) else v for k, v in given.items()})


def flags(**changes) -> list[str]:
    """Keywords as command-line flags."""
    argv = []
    for name, value in changes.items():
        dashed = name.replace("_", "-")
        if isinstance(value, bool):
            argv.append(f"--{'' if value else 'no-'}{dashed}")
        else:
            argv += [f"--{dashed}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return argv


def tiny(tmp_path: Path, **changes) -> list[str]:
    """Flags of a tiny run on a data set that is made in tmp_path/data if it is not there yet."""
    if "data" not in changes and not (tmp_path / "data").exists():
        make_data(tmp_path / "data")
    return flags(**{"data": tmp_path / "data", "log_dir": tmp_path / "logs", "experiment_name": "x", **TINY, **changes})


def parse(*argv: str, hardware: Hardware = CPU, world_size: int = 1, monkeypatch) -> Settings:
    """Settings of a command line on a machine of our choice."""
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device="auto": CPU if device == "cpu" else hardware)
    return train_gpt.parse_settings(list(argv), world_size)[0]


# --- runs


def launch(argv: list[str], before: str = "", **options) -> subprocess.Popen:
    """The script in another process, after running the Python source `before`, in which `train_gpt` is imported."""
    code = f"import os, signal, sys, train_gpt\n{before}\nsys.exit(train_gpt.main({[str(a) for a in argv]!r}))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env=environment(), **options)


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without CUDA devices and without torchrun's variables."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **changes}


def script(*argv, **options) -> subprocess.CompletedProcess:
    """`python ARGV` without a CUDA device, to its end."""
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, **options)


def run_folder(tmp_path: Path, experiment: str = "x") -> Path:
    """The only run of an experiment."""
    (folder,) = (tmp_path / "logs" / experiment).iterdir()
    return folder


def records(folder: Path) -> list[dict]:
    """The objects of metrics.jsonl; NaN and Infinity are no JSON."""
    def refuse(word):
        raise AssertionError(f"metrics.jsonl holds {word}")
    return [json.loads(line, parse_constant=refuse) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[str, dict[int, float]]:
    """Training and validation losses by step; where a step was run twice both must agree to the bit."""
    found = {"train_loss": {}, "val_loss": {}}
    for record in (r for r in records(folder) if "event" not in r):
        for key in found.keys() & record.keys():
            first = found[key].setdefault(record["step"], record[key])
            assert first == record[key], f"{key} of step {record['step']} differs when run again"
    return found


def steps_saved(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").glob("step_*[0-9]"))


def flatten_state(value, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors and numbers of nested dictionaries under one flat name each."""
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in flatten_state(part, f"{name}/{key}").items()}
    return {name: torch.as_tensor(value)}


def load_state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """All tensors and numbers of a checkpoint under one flat name each."""
    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return flatten_state(torch.load(path, map_location="cpu", weights_only=True))


def assert_same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """Both checkpoints hold the same tensors, bit by bit."""
    assert one.keys() == other.keys() and len(one) > 10
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing


# --- what a model says of a text


@torch.no_grad()
def log_probabilities(model, tokens: list[int], window: int) -> torch.Tensor:
    """Of all columns of the head after each token of a document, (T, padded vocabulary) fp64, by its plain formulas."""
    inputs, long_window = torch.tensor([tokens]), torch.tensor(window, dtype=torch.int32)
    x_BTD = model.trunk(inputs, torch.zeros_like(inputs), long_window)
    p = model.head(x_BTD)[0].double().softmax(-1)
    if model.pointer is None:
        return p.log()
    x, (gain, sink) = F.rms_norm(x_BTD[0], x_BTD.shape[-1:]), model.pointer.small
    q, k = (F.rms_norm(z, z.shape[-1:]) for z in F.linear(x, model.pointer.qk).chunk(2, dim=-1))
    mixed, block = [], sys.modules[type(model).__module__].POINTER_BLOCK
    for t in range(len(tokens)):
        first = max(0, (t // block - 1) * block)
        scores = torch.cat((k[first:t], sink[None])) @ (q[t] * gain) / len(gain) ** 0.5
        copied, share = torch.zeros_like(p[t]), scores.double().softmax(0)
        for token, weight in zip(tokens[first:t], share[:-1], strict=True):
            copied[token] += weight
        alpha = p[t, model.vocab_size]
        rest = p[t].index_fill(0, torch.tensor(model.vocab_size), 0.0)
        mixed.append(rest / rest.sum() * (1 - alpha * (1 - share[-1])) + alpha * copied)
    return torch.stack(mixed).log()
