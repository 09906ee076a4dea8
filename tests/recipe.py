"""What the tests of the recipe of 2026 share (tail average, sampled softmax, n-gram table, pointer): a tiny model with
all weights random, batches, steps of the optimizer, and runs of both scripts on several processes."""
from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import pytest
import torch
from helpers import flags, flatten_state
from ranks import PRELOADED, free_port, settings

import train_gpt as tg

IGNORE = tg.IGNORE


def tiny_settings(**changes) -> tg.Settings:
    """Settings of the 3-layer model of ranks.py; rows of 16 tokens. Single values of staged settings may be bare."""
    staged = (*tg.staged_settings(), "stage_ends")
    return settings(**{k: (v,) if k in staged and not isinstance(v, tuple) else v for k, v in changes.items()})


def random_model(s: tg.Settings, vocab_size: int = 50, std: float = 0.3, seed: int = 1) -> tg.GPT:
    """A model whose every parameter is random, those that start at zero, too."""
    model, random = tg.GPT(s, vocab_size), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std, generator=random)
    return model


def random_batch(rows: int = 2, length: int = 16, vocab_size: int = 50, seed: int = 0) -> torch.Tensor:
    """(3, rows, T) int32: inputs, targets, document numbers; three documents a row, of other lengths in each."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=random, dtype=torch.int32)
    starts = torch.rand(rows, length, generator=random).topk(2).indices
    docs = torch.zeros(rows, length, dtype=torch.int32).scatter(1, starts, 1).cumsum(1, dtype=torch.int32)
    return torch.stack([tokens[:, :-1], tokens[:, 1:], docs])


def int_tensor(value: int, dtype=torch.int32) -> torch.Tensor:
    return torch.tensor(value, dtype=dtype)


def losses(model: tg.GPT, batch, mtp: int = 0, turn: int = 0, window: int = 8) -> torch.Tensor:
    """Summed losses of the next and of `mtp` further tokens, as in training, where the first row has number `turn`."""
    inputs, targets, docs = batch
    model.turn.fill_(turn)
    return model(inputs, tg.future_targets(targets, docs, mtp), docs, int_tensor(window))


def only(batch: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The batch with a loss at some positions only."""
    inputs, targets, docs = batch
    return torch.stack([inputs, targets.where(keep, IGNORE), docs])


def stream(model: tg.GPT, batch, window: int = 8) -> torch.Tensor:
    """What the head reads: the normed stream after the last layer, (B, T, D)."""
    inputs, _, docs = batch
    found = None if model.ngrams is None else model.ngrams(inputs, docs)
    return tg.norm(model.trunk(inputs, docs, int_tensor(window), found))


def cap(logits: torch.Tensor, s: tg.Settings) -> torch.Tensor:
    """a * sigmoid((logit + b) / c), spelled out."""
    a, b, c = s.softcap
    return a * torch.sigmoid((logits + b) / c) if a else logits


def assert_same_tensors(found: dict, expected: dict):
    """The same names, and tensors with the same bits, sparse ones too."""
    assert found.keys() == expected.keys()
    differing = [name for name, x in expected.items() if not torch.equal(found[name].to_dense(), x.to_dense())]
    assert not differing


def assert_same_optimizer(found: tg.MuonAdamW, expected: tg.MuonAdamW):
    """All that a checkpoint would hold is the same, to the bit."""
    assert_same_tensors(*(flatten_state(optimizer.state_dict()) for optimizer in (found, expected)))


def problems(*argv: str, world_size: int = 1) -> list[str]:
    """What is wrong with a command line, a sentence each."""
    with pytest.raises(tg.UserError) as caught:
        tg.parse_settings(["--device", "cpu", *argv], world_size)
    return str(caught.value).splitlines()[1:]


# --- whole runs


def run_processes(size: int, argv: list, script: str = "train_gpt", timeout: float = 300):
    """A script's main on `size` processes, joined as by torchrun; raises what they print if one fails. They are forked
    from a server that has imported torch, so that each costs less than a second."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    port, folder = free_port(), Path(tempfile.mkdtemp())
    processes = [context.Process(target=_process, args=(script, rank, size, port, list(map(str, argv)), folder),
                                 daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    told = "\n".join(path.read_text() for path in sorted(folder.iterdir()))
    assert not any(p.exitcode for p in processes), f"exit codes {[p.exitcode for p in processes]}\n{told}"


def _process(script: str, rank: int, size: int, port: int, argv: list[str], folder: Path):
    sys.stdout = sys.stderr = (folder / f"out_{rank}").open("w", buffering=1)
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    torch.set_num_threads(1)
    if size > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in names.items()}
    try:
        code = importlib.import_module(script).main(argv)
    except BaseException:  # noqa: BLE001 - run_processes raises it
        traceback.print_exc()
        code = 1
    os._exit(code)


def run_flags(folder: Path, logs: Path, **changes) -> list[str]:
    """Command line of a run of 8 steps of 8 rows of 32 tokens, which 4 processes can share."""
    given = dict(
        data=folder, log_dir=logs, experiment_name="x", preset="cpu", device="cpu", dtype="fp32", compile=False,
        threads=1, num_layers=2, width=32, head_dim=16, value_embeds=1, seq_len=32, max_doc_len=32, batch_tokens=256,
        micro_tokens=64, window=32, window_start=16, window_step=8, iterations=8, eval_every=4, eval_tokens=300,
        momentum_warmup=4, momentum_cooldown=2, muon_lr=0.02, adam_lr=0.002, log_every=1, save_every=0)
    return flags(**{**given, **changes})
