"""What the tests of the optimizer and of several ranks share: a tiny model, random batches, and processes on gloo.

The functions that run inside spawned processes live here, because a spawned process imports them by name."""
from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import train_gpt as tg

PRELOADED = ["torch", "torch.distributed", "torch._dynamo"]  # which train_gpt.start_processes needs
VOCAB, ROWS, SEQ_LEN = 100, 12, 16  # 12 rows: shared by 1, 2, 3, 4 ranks, and 6 or 2 micro-steps of one


def settings(**changes) -> tg.Settings:
    """Settings of a 3-layer model of width 32. Attention in 2 layers makes 8 qkvo matrices, which 3 ranks cannot share
    evenly, as 4 ranks cannot the 6 MLP matrices, and 3 ranks the 128 x 32 entries of an embedding."""
    tiny = dict(num_layers=3, width=32, head_dim=16, attention="L-S", value_embeds=1, iterations=8, stage_ends=(1.0,),
                batch_tokens=(ROWS * SEQ_LEN,), seq_len=(SEQ_LEN,), window=(8,), window_start=8, window_step=4,
                muon_lr=0.02, adam_lr=0.002, adam_eps=1e-8, eval_seq_len=SEQ_LEN, device="cpu", dtype="fp32",
                backend="sdpa", compile=False, micro_tokens=ROWS * SEQ_LEN)
    tiny |= changes
    if "attention" not in changes and tiny["num_layers"] != 3:
        tiny["attention"] = tg.auto_attention(tiny["num_layers"], paired=True)
    return tg.Settings(**tiny)


def build(s: tg.Settings, world: tg.World = tg.World(), seed: int = 0, script=tg):  # noqa: B008
    """A model and its optimizer, of a training script. Noise on all weights: at the initial zeros most gradients would
    be zero too."""
    model = script.GPT(s, VOCAB)
    noise = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=noise))
    return model, script.MuonAdamW(model, s, world)


def random_batch(step: int, rows: int = ROWS, seq_len: int = SEQ_LEN) -> torch.Tensor:
    """(3, rows, T) int32: inputs, targets, document numbers; the same on every rank."""
    random = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCAB, (rows, seq_len + 1), generator=random, dtype=torch.int32)
    docs = (torch.arange(seq_len, dtype=torch.int32) >= seq_len // 2).int().expand(rows, -1)
    return torch.stack([tokens[:, :-1], tokens[:, 1:], docs])


def next_token_loss(model: tg.GPT, batch: torch.Tensor, window: int = 8) -> torch.Tensor:
    """Summed loss of inputs, targets, document numbers."""
    inputs, targets, docs = batch
    return model(inputs, targets[None], docs, torch.tensor(window, dtype=torch.int32))[0]


def backward(model: tg.GPT, optimizer: tg.MuonAdamW, batch: torch.Tensor, micro_steps: int = 1) -> float:
    """Forward and backward over this rank's rows of a global batch, in micro-steps; the sum of its losses."""
    world, total = optimizer.world, 0.0
    parts = batch[:, world.rank::world.size].chunk(micro_steps, dim=1)
    for i, part in enumerate(parts):
        optimizer.last_micro_step = i == len(parts) - 1
        loss = next_token_loss(model, part) / batch[0].numel()
        loss.backward()
        total += loss.item()
    return total


def train(model, optimizer, steps: range, micro_steps: int = 1, backward=backward) -> list[float]:
    """Some steps with a changing rate and momentum; this rank's share of the loss of each."""
    losses = []
    for step in steps:
        losses.append(backward(model, optimizer, random_batch(step), micro_steps))
        optimizer.step(1.0 - 0.1 * step, 0.85 + 0.02 * step)
    arrive(optimizer)
    return losses


def arrive(optimizer):
    """Waits for the weights that a step gathers, as the next forward pass would."""
    for bank in optimizer.banks:
        bank.receive_weights()


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def digest(model: torch.nn.Module) -> str:
    """Hash of the bits of all parameters."""
    whole = hashlib.sha256()
    for p in model.parameters():
        whole.update(p.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    """Name -> largest difference, relative to the largest entry."""
    assert a.keys() == b.keys()
    return {name: ((a[name].double() - b[name].double()).abs().max() / a[name].abs().max().clamp_min(1e-12)).item()
            for name in a}


# --- processes


def run_ranks(function, size: int, parent: Path, *arguments, timeout: float = 120) -> list:
    """What `function(world, *arguments)` returns in each of `size` new processes joined by gloo.

    Ends all processes, and raises what was printed, as soon as one of them fails or the time is up. They are forked
    from a server that has imported torch, once for all tests, but has run nothing with it."""
    folder = Path(tempfile.mkdtemp(dir=parent))
    forks = "forkserver" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(PRELOADED)
    processes = [context.Process(target=_rank_main, args=(function, rank, size, folder, arguments), daemon=True)
                 for rank in range(size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(p.is_alive() for p in processes) and not any(p.exitcode for p in processes):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{function.__name__} on {size} ranks did not end within {timeout} s")
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
    errors = [path.read_text() for path in sorted(folder.glob("error_*"))]
    if errors or any(p.exitcode for p in processes):
        raise AssertionError("\n".join(errors) or f"exit codes {[p.exitcode for p in processes]}")
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(size)]


def _rank_main(function, rank: int, size: int, folder: Path, arguments: tuple):
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size,
                                timeout=timedelta(seconds=60))
        result = function(tg.World(rank, rank, size), *arguments)
        torch.save(result, folder / f"result_{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:  # noqa: BLE001 - run_ranks raises it
        (folder / f"error_{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        os._exit(1)  # the others may wait in a collective: the parent ends them


def training_scenario(world: tg.World, changes: dict, saved: Path | None) -> dict:
    """4 steps, a checkpoint, 2 more steps; then again from the checkpoint, and from the one in the file `saved`."""
    s = settings(**changes)
    model, optimizer = build(s, world)
    result: dict = {"digests": [], "losses": []}
    for step in range(4):
        result["losses"] += train(model, optimizer, range(step, step + 1), micro_steps=1 + step % 2)
        result["digests"].append(digest(model))
    result["state_numel"] = {key: sum(b.state[key].numel() for b in optimizer.banks if key in b.state and b.owners > 1)
                             for key in ("master", "momentum", "exp_avg", "exp_avg_sq", "variance")}
    result["grad_numel"] = sum(b.grad.numel() for b in optimizer.banks if b.owners > 1)
    result["checkpoint"] = optimizer.state_dict()
    result["middle"] = parameters(model)
    train(model, optimizer, range(4, 6))
    result["end"], result["end_checkpoint"] = parameters(model), optimizer.state_dict()
    result["again"] = continued(s, world, result["checkpoint"])
    result["left"] = left_after_backward(model, optimizer)
    if saved:
        result["from_file"] = continued(s, world, torch.load(saved, weights_only=True))
    return result


def continued(s: tg.Settings, world: tg.World, checkpoint: dict) -> dict[str, torch.Tensor]:
    """Parameters after loading a checkpoint into a model of other weights, and 2 further steps."""
    model, optimizer = build(s, world, seed=7)
    optimizer.load_state_dict(checkpoint)
    train(model, optimizer, range(4, 6))
    return parameters(model)


def left_after_backward(model: tg.GPT, optimizer: tg.MuonAdamW) -> dict:
    """What is left of the gradients between backward and step."""
    backward(model, optimizer, random_batch(0), micro_steps=2)
    left = {"grads": [n for n, p in model.named_parameters() if p.grad is not None], "sums": len(optimizer.sums),
            "arrived": sum(len(bank.arrived) for bank in optimizer.banks),
            "works": sum(len(bank.in_flight) for bank in optimizer.banks)}
    optimizer.step(1.0, 0.9)
    left |= {"works_after": sum(len(bank.in_flight) for bank in optimizer.banks),
             "gathers": sum(len(bank.gathers) for bank in optimizer.banks)}
    arrive(optimizer)
    return left


class SpyWork:
    """A work handle that writes down when it is waited for."""

    def __init__(self, work, name: str, events: list):
        self.work, self.name, self.events = work, name, events

    def wait(self):
        self.events.append(("wait", self.name))
        return self.work.wait()


def overlap_scenario(world: tg.World, flag: Path) -> dict:
    """Order of gradients, launches and waits in two accumulated steps; the second rank starts its backward pass only
    when the first one has ended its own, which never happens if a reduction waits for the other rank."""
    events: list[tuple[str, str]] = []
    s = settings(num_layers=4, compile_unit="block")
    model = tg.GPT(s, VOCAB)
    for name, p in model.named_parameters():  # before the optimizer's hooks, hence called before them
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(("grad", name)))
    optimizer = tg.MuonAdamW(model, s, world)
    for i, block in enumerate(model.blocks):  # after the optimizer's hooks
        block.register_forward_pre_hook(lambda *_, i=i: events.append(("block", str(i))))

    def spied(collective):
        def launch(*args, **kwargs):
            work = collective(*args, **kwargs)
            kind = "launch" if kwargs.get("async_op") and work is not None else "blocking"
            events.append((kind, collective.__name__))
            return SpyWork(work, collective.__name__, events)
        return launch

    kinds = ("reduce_scatter", "all_reduce", "all_gather")
    collectives = [value for name, value in vars(dist).items() if name.startswith(kinds)]
    for module in (dist, tg):  # under whatever name the script calls them
        for name, value in list(vars(module).items()):
            if callable(value) and value in collectives:
                setattr(module, name, spied(value))
    batch = random_batch(0)
    rows = batch[:, world.rank::world.size].chunk(2, dim=1)
    optimizer.last_micro_step = False
    next_token_loss(model, rows[0]).backward()
    events.append(("end", "first micro-step"))
    optimizer.last_micro_step = True
    loss = next_token_loss(model, rows[1])
    if world.rank == 1:
        deadline = time.monotonic() + 30
        while not flag.exists():
            assert time.monotonic() < deadline, "rank 0 did not end its backward pass while rank 1 had not begun"
            time.sleep(0.01)
    loss.backward()
    events.append(("end", "backward"))
    if world.rank == 0:
        flag.touch()
    held = [(type(work).__name__, None if packed is None else packed.numel(), math.prod(bank.shape), bank.owners)
            for bank in optimizer.banks for work, packed in bank.in_flight]
    optimizer.step(1.0, 0.9)
    events.append(("end", "step"))
    next_token_loss(model, rows[0])
    return {"events": events, "held": held}


# --- whole runs of the script


def write_corpus(folder: Path, vocab_size: int = 64, tokens: int = 6000) -> Path:
    """A data set of random documents in the documented format: a first-order chain, so that it can be learned."""
    folder.mkdir(parents=True)
    random, eot = np.random.default_rng(0), vocab_size - 1
    splits = {}
    for split, count in (("train", tokens), ("val", tokens // 4)):
        steps = random.integers(0, 4, count)
        ids = (np.cumsum(steps) % (vocab_size - 1)).astype("<u2")
        ids[0] = eot
        ids[1:][random.random(count - 1) < 0.05] = eot
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, count
        (folder / f"{folder.name}_{split}_000000.bin").write_bytes(header.tobytes() + ids.tobytes())
        splits[split] = {"tokens": count, "bytes": count}
    meta = {"name": folder.name, "tokenizer": {"kind": "char", "chars": ""}, "vocab_size": vocab_size, "eot": eot,
            "source": "random", "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def script_flags(corpus: Path, logs: Path, **changes) -> list[str]:
    """Command line of a run of 6 steps."""
    flags = dict(preset="cpu", device="cpu", dtype="fp32", num_layers=3, width=32, head_dim=16, attention="L-S",
                 value_embeds=1, iterations=6, batch_tokens=384, seq_len=32, max_doc_len=32, window=16, window_start=8,
                 window_step=4, micro_tokens=64, muon_lr=0.02, adam_lr=0.002, momentum_warmup=3, momentum_cooldown=1,
                 eval_every=3, eval_tokens=1001, log_every=1, save_every=3, threads=1) | changes
    return ["--data", str(corpus), "--log_dir", str(logs), *(f"--{name}={value}" for name, value in flags.items())]


def launch(launcher: list[str], flags: list[str], script: str = tg.__file__) -> subprocess.Popen:
    """`python -m torch.distributed.run LAUNCHER train_gpt.py FLAGS` in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", *launcher, script, *flags]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=environment | {"OMP_NUM_THREADS": "1"})


def finish(agents: list[subprocess.Popen], timeout: float = 120) -> list[str]:
    """Output of launched agents; kills them and their workers when the time is up or one of them fails."""
    outputs, deadline = [], time.monotonic() + timeout
    try:
        for agent in agents:
            outputs.append(agent.communicate(timeout=max(1.0, deadline - time.monotonic()))[0])
        assert not any(agent.returncode for agent in agents), "\n".join(outputs)
    finally:
        for agent in agents:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(agent.pid, signal.SIGKILL)
            agent.wait()
    return outputs


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_folder(logs: Path) -> Path:
    """The only run under a log folder."""
    (folder,) = logs.glob("*/*/")
    return folder


def metrics(logs: Path) -> tuple[dict[int, float], dict[int, float]]:
    """Step -> training loss, and step -> validation loss, of the only run under a log folder."""
    lines = [json.loads(line) for line in (run_folder(logs) / "metrics.jsonl").read_text().splitlines()]
    return ({m["step"]: m["train_loss"] for m in lines if "train_loss" in m},
            {m["step"]: m["val_loss"] for m in lines if "val_loss" in m and "event" not in m})
