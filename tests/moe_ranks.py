"""What the tests of train_moe.py's optimizer and of several ranks share: a tiny mixture of experts and its steps.

The functions that run inside spawned processes live here, because a spawned process imports them by name."""
from __future__ import annotations

import dataclasses
import functools

import ranks
import torch
import torch.distributed as dist
from ranks import digest, parameters

import train_moe as tm

MIXTURES, EXPERTS = 2, 5  # 10 matrices of a shape, which 3 or 4 ranks cannot share evenly


def settings(**changes) -> tm.Settings:
    """Those of ranks.py, with a dense layer between two mixtures of 5 experts, 2 of them for a token."""
    own = {"num_experts": EXPERTS, "expert_lr": 1.0, "top_k": 2, "moe_layers": "MDM", "moe_impl": "loop",
           "bias_rate": 0.05, "bias_cooldown": 1.0} | changes
    known = {field.name for field in dataclasses.fields(ranks.tg.Settings)}
    dense = dataclasses.asdict(ranks.settings(**{k: v for k, v in own.items() if k in known}))
    return tm.Settings(**{**dense, **own})


build = functools.partial(ranks.build, script=tm)


def backward(model: tm.GPT, optimizer: tm.MuonAdamW, batch: torch.Tensor, micro_steps: int = 1) -> float:
    """The micro-steps of `train` over this rank's rows of a global batch, shared as by the loader; its mean loss."""
    world, balance, weight = optimizer.world, optimizer.balance, 1 / batch[0].numel()
    parts, total = batch.chunk(micro_steps * world.size, dim=1)[world.rank::world.size], 0.0
    for i, (inputs, targets, docs) in enumerate(parts):
        optimizer.last_micro_step = i == len(parts) - 1
        noise = balance.noise(optimizer.steps, i, *inputs.shape)
        loss, *_ = values = model(inputs, targets[None], docs, torch.tensor(8, dtype=torch.int32), noise)
        (weight * loss + balance.add(values[1:], weight, optimizer.last_micro_step)).backward()
        total += weight * loss.item()
    return total


train = functools.partial(ranks.train, backward=backward)


def feed(model: tm.GPT, optimizer: tm.MuonAdamW, gradients: dict[str, torch.Tensor],
         chosen: torch.Tensor | None = None):
    """A backward pass that gives the parameters exactly these gradients, and routers that chose so often."""
    optimizer.last_micro_step = True
    sum((p.float() * gradients[name]).sum() for name, p in model.named_parameters()).backward()
    balance, size = optimizer.balance, optimizer.balance.s.num_experts
    sums = torch.full(balance.size, 1 / size)
    if chosen is not None:
        tm.named_sums(sums, size)["chosen"].copy_(chosen)
    balance.add(sums, 1.0, last=True)


def random_gradients(model: tm.GPT, step: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(step)
    return {name: torch.randn(p.shape, generator=random) for name, p in model.named_parameters()}


# --- in spawned processes


def training_scenario(world: tm.World, router: str) -> dict:
    """4 steps of changing numbers of micro-steps: what all ranks must agree on after each."""
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (calls.append(tuple(tensor.shape)),
                                                       all_reduce(tensor, *args, **kwargs))[1]
    model, optimizer = build(settings(router=router), world)
    balance, result = optimizer.balance, {key: [] for key in ("losses", "bias", "slopes", "sums", "digests")}
    for step in range(4):
        before = balance.report_sums.clone()
        result["losses"] += train(model, optimizer, range(step, step + 1), micro_steps=1 + step % 3)
        for key, tensor in (("bias", balance.bias), ("slopes", balance.slopes), ("sums", balance.report_sums - before)):
            result[key].append(tensor.clone())
        result["digests"].append(digest(model))
    result |= {"weights": parameters(model), "report": balance.report(), "state": optimizer.state_dict()}
    result["reductions_of_sums"] = calls.count(tuple(balance.sums.shape))
    dist.all_reduce = all_reduce
    return result


def idle_scenario(world: tm.World) -> dict:
    """A step in which no rank chose some experts and only one rank others: names of what did not move."""
    model, optimizer = build(settings(), world)
    feed(model, optimizer, random_gradients(model, 0))
    optimizer.step(1.0, 0.9)
    before = optimizer.state_dict()["state"]
    chosen = torch.ones(MIXTURES, EXPERTS) / 8
    chosen[0, 1] = chosen[1, 4] = 0  # nowhere
    chosen[1, world.rank] = 0  # the others
    feed(model, optimizer, random_gradients(model, 1 + world.rank), chosen)
    optimizer.step(1.0, 0.9)
    after = optimizer.state_dict()["state"]
    return {key: {(name, e) for name in after[key] if ".experts_" in name for e in range(EXPERTS)
                  if torch.equal(before[key][name][e], after[key][name][e])}
            for key in ("master", "momentum", "variance") if world.rank == 0}


def all_scenarios(world: tm.World, routers: tuple[str, ...]) -> dict:
    """Both of the above in one set of processes: to start them takes longer than to run them."""
    return {router: training_scenario(world, router) for router in routers} | {"idle": idle_scenario(world)}


def script_runs(world: tm.World, command_lines: list[list[str]]) -> list[str]:
    """Runs of the script, with this process in the place of one of torchrun's."""
    ends = []
    for argv in command_lines:
        s, hardware, notes = tm.parse_settings(argv, world.size)
        run = tm.Run(s, hardware, world, notes)
        with run.undo:
            tm.train(run)
        ends.append(run.status)
    return ends
