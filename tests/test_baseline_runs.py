"""Training with train_baseline.py: its optimizers against torch's, invariants, ranks, micro-steps, resumed runs, what
generate.py and logger.py make of them."""
import importlib
import itertools
import json
import math
import shutil
import signal

import pytest
import torch
from baseline import (
    TYPES,
    launch,
    logits,
    loss,
    weights,
    packed,
    random_model,
    run,
    script_runs,
    settings,
    state,
    tiny,
    train,
)
from helpers import (
    VOCAB,
    assert_same_state,
    load_state,
    losses,
    make_data,
    records,
    run_folder,
    steps_saved,
)
from helpers import tiny as speedrun_flags
from ranks import difference, run_ranks

import generate
import train_baseline as tb
import train_gpt
from train_baseline import GPT, MuonAdamW, Trainer, World

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")
CHARS = "\n" + "".join(map(chr, range(48, 47 + VOCAB)))
KINDS = {**{name: (name, {}) for name in TYPES},
         "moderngpt, muon": ("moderngpt", dict(optimizer="muon", muon_weight_decay=0.1)),
         "ngpt, muon": ("ngpt", dict(optimizer="muon"))}
SAVES = dict(save_every=3, eval_every=3, keep=9)  # checkpoints and validations after steps 3, 6 and 8


# --- optimizers against torch's


def nanogpt_rate(step: int, warmup: int, steps: int, high: float, low: float) -> float:
    if step < warmup:
        return high * (step + 1) / (warmup + 1)
    return low + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (high - low)


@pytest.mark.parametrize("clip", [0.0, 0.5, 1e6])
def test_gpt_trains_as_with_torchs_adamw(clip):
    """10 steps by nanoGPT's recipe: matrices and tables decay, vectors do not; norm of all gradients; cosine. Except
    biases of keys: no output depends on them, and AdamW makes steps of the rounding errors of their gradients."""
    s = settings("gpt", iterations=12, warmup_steps=3, grad_clip=clip, weight_decay=0.3, batch_tokens=96)
    model, reference = random_model(s), random_model(s)
    groups = [{"params": [p for p in reference.parameters() if p.dim() >= 2], "weight_decay": 0.3},
              {"params": [p for p in reference.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    batches, norms = [packed(3, seed=10 * i) for i in range(10)], []
    before = state(reference)
    for step, batch in enumerate(batches):
        adamw.zero_grad()
        (loss(reference, s, batch)[0] / 96).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(reference.parameters(), clip or math.inf).item())
        for group in adamw.param_groups:
            group["lr"] = nanogpt_rate(step, 3, 12, 0.01, 0.001)
        adamw.step()
    optimizer = train(model, s, batches)
    moved = {name: (p - before[name]).abs().max().item() for name, p in reference.named_parameters()}
    expected, found = state(reference), state(model)
    for name, p in expected.items():
        first = 32 if name.endswith("attn.biases.1") else 0
        torch.testing.assert_close(found[name][first:], p[first:], rtol=1e-5, atol=1e-5, msg=name)
    assert min(norms) > 0.5 and (not clip or optimizer.norm.item() == pytest.approx(norms[-1], rel=1e-4))
    assert min(moved.values()) > 0.01


def test_clipping_is_by_the_norm_of_all_parameters_together(monkeypatch):
    """What arrives at the optimizer: unchanged below the limit, above it with the limit as norm."""
    seen = {}
    monkeypatch.setattr(tb, "adamw_update", lambda master, grad, *rest: seen.setdefault("squares", []).append(
        grad.square().sum()))
    for limit in (0.0, 0.25, 1e9):
        seen.clear()
        optimizer = train(random_model(s := settings("moegpt", grad_clip=limit)), s, [packed(4)])
        norm = sum(seen["squares"]).sqrt().item()
        seen[limit] = norm
        if limit == 0.25:
            assert norm == pytest.approx(0.25, rel=1e-4) and optimizer.norm > 1
        elif limit:
            assert norm == pytest.approx(optimizer.norm.item(), rel=1e-5)
        else:
            assert norm > 1


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Five steps on a matrix (Jordan et al. 2024), in fp64."""
    x = g.double() / g.double().norm()
    x = x.T if len(g) > g.size(1) else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x.T if len(g) > g.size(1) else x


def own_layout(name: str, p: torch.Tensor) -> list[torch.Tensor]:
    """A parameter as matrices (outputs, inputs)."""
    transposed = name.endswith(("out", "down", "experts_up", "experts_gate"))
    return [m.T if transposed else m for m in p.flatten(0, -3)] if p.dim() > 2 else [p.T if transposed else p]


@pytest.mark.parametrize("changes", [{}, dict(decay_schedule="linear", schedule="wsd"), dict(decay_schedule="rate")],
                         ids=str)
@pytest.mark.parametrize("model_type", ["moderngpt", "moegpt"])
def test_hidden_matrices_train_as_with_a_plain_muon(model_type, changes):
    """6 steps with Nesterov momentum that rises, sqrt(max(1, outputs / inputs)) in the rate, and decoupled decay; all
    matrices are Muon's but tables, head and routers, of which each expert's is its own."""
    s = settings(model_type, optimizer="muon", muon_weight_decay=0.2, grad_clip=0.0, num_kv_heads=2, **changes)
    model, reference = random_model(s), random_model(s)
    hidden = [name for name, p in reference.named_parameters()
              if p.dim() > 1 and name.startswith("blocks") and "router" not in name]
    rules = {name: rule.kind for name, rule in model.rules.items()}
    assert {name for name, kind in rules.items() if kind == "muon"} == set(hidden)
    master = {name: [m.double() for m in own_layout(name, dict(reference.named_parameters())[name].detach().clone())]
              for name in hidden}
    momentum = {name: [torch.zeros_like(m) for m in matrices] for name, matrices in master.items()}
    batches, optimizer, stages = [packed(4, seed=10 * i) for i in range(6)], MuonAdamW(model, s, World()), [None]
    for step, batch in enumerate(batches):
        rate, mu = tb.lr_scale(s, stages, step), 0.85 + 0.1 * min(1, step / 4)
        decay = {"constant": 1.0, "rate": rate, "linear": 1 - step / 8}[s.decay_schedule]
        losses = loss(model, s, batch)
        total = (losses[0] + sum(s.balance * extra for extra in losses[1:])) / s.batch_tokens
        gradients = dict(zip(hidden, torch.autograd.grad(
            total, [dict(model.named_parameters())[name] for name in hidden], retain_graph=True), strict=True))
        total.backward()
        optimizer.step(rate, tb.momentum_at(s, step), tb.decay_scale(s, step, rate))
        for name in hidden:
            for i, g in enumerate(own_layout(name, gradients[name].double())):
                m, w = momentum[name][i], master[name][i]
                m.mul_(mu).add_(g, alpha=1 - mu)
                lr = 0.02 * rate * max(1, len(w) / w.size(1)) ** 0.5
                w.sub_(lr * (newton_schulz(mu * m + (1 - mu) * g) + 0.2 * decay * w))
    for name in hidden:
        for found, expected in zip(own_layout(name, dict(model.named_parameters())[name]), master[name], strict=True):
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_muon_is_torchs_up_to_bf16():
    """4 steps on given gradients; torch's orthogonalizes in bf16, so by 3 % of the way. Without decay, which torch's
    takes at the rate without the shape's factor."""
    s = settings("moderngpt", optimizer="muon", grad_clip=0.0, warmup_steps=0, min_lr=0.01)
    model = random_model(s)
    optimizer, random = MuonAdamW(model, s, World()), torch.Generator().manual_seed(3)
    names = [name for name, rule in model.rules.items() if rule.kind == "muon" and "kv" not in name]
    weights = {name: own_layout(name, dict(model.named_parameters())[name])[0].detach().clone() for name in names}
    before = {name: w.clone() for name, w in weights.items()}
    muon = torch.optim.Muon(list(weights.values()), lr=0.02, momentum=0.9, weight_decay=0.0, adjust_lr_fn="original")
    for _ in range(4):
        gradients = {name: torch.randn(p.shape, generator=random) for name, p in model.named_parameters()}
        sum((p * gradients[name]).sum() for name, p in model.named_parameters()).backward()
        optimizer.step(1.0, 0.9)
        for name, w in weights.items():
            w.grad = own_layout(name, gradients[name])[0].contiguous()
        muon.step()
    for name, w in weights.items():
        found = own_layout(name, dict(model.named_parameters())[name].detach())[0]
        assert (found - w).norm() < 0.03 * (w - before[name]).norm(), name


# --- ngpt


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_of_ngpts_matrices_have_norm_1_after_training(optimizer, tmp_path):
    """Of fp32 weights after 8 steps; what embeds, reads or writes the stream are all of its matrices."""
    folder = run(tmp_path, "ngpt", optimizer=optimizer)
    weights, initial = weights(folder), state(GPT(settings("ngpt"), VOCAB))
    matrices = {name for name, p in weights.items() if p.dim() > 1}
    assert {name.split(".")[-1] for name in matrices} == {"weight", "lm_head", "q", "kv", "out", "up", "gate", "down"}
    for name, p in weights.items():
        assert (p - initial[name]).abs().max() > 1e-3, name
        if name in matrices:
            assert p.size(-1) == 32 and (p.norm(dim=-1) - 1).abs().max() < 1e-6, name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_ranks_own_whole_rows_of_ngpts_matrices_and_together_all(optimizer, size):
    """Only the owner of a whole row can give it a norm of 1. What all ranks own are the weights."""
    s = settings("ngpt", optimizer=optimizer)
    models = [random_model(s) for _ in range(size)]
    optimizers = [MuonAdamW(model, s, World(rank, rank, size)) for rank, model in enumerate(models)]
    for banks in zip(*(optimizer.banks for optimizer in optimizers), strict=True):
        first = banks[0]
        assert first.slot_shape[-1] % 32 == 0 or not first.rule.unit
        slots = torch.stack([bank.state["master"] for bank in banks[:first.owners]], dim=1).flatten(0, 1)
        for name, whole in first.join(slots).items():
            assert torch.equal(whole, dict(models[0].named_parameters())[name]), name


# --- training of all types


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Kind -> folder of an uninterrupted run with SAVES; made when first asked for."""
    base, made = tmp_path_factory.mktemp("whole"), {}
    make_data(base / "data")

    def get(kind: str):
        if kind not in made:
            model_type, changes = KINDS[kind]
            made[kind] = run(base / kind, model_type, data=base / "data", **SAVES, **changes)
        return made[kind]

    return get


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns(kind, whole):
    found = losses(whole(kind))
    train_loss = list(found["train_loss"].values())
    assert len(train_loss) == 8 and train_loss[-1] < train_loss[0] - 0.05
    assert list(found["val_loss"]) == [3, 6, 8] and found["val_loss"][8] < found["val_loss"][3]


@pytest.mark.parametrize("kind", ["gpt", "moegpt"])
def test_validation_loss_is_that_of_the_saved_weights(kind, whole):
    folder = whole(kind)
    model = GPT(s := settings(kind), VOCAB)
    model.load_state_dict(weights(folder))
    stream = tb.ValStream(tb.open_corpus(str(folder.parents[3] / "data")), s.eval_tokens, s.eval_seq_len)
    rows = torch.from_numpy(stream.rows(0, stream.num_rows))
    z, targets = logits(model, s, rows).flatten(0, 1), rows[1].flatten().long()
    expected = torch.nn.functional.cross_entropy(z, targets, ignore_index=tb.IGNORE).item()
    assert (targets != tb.IGNORE).sum() == 300
    assert losses(folder)["val_loss"][8] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt", "ngpt, muon", "moegpt"])
def test_micro_steps_do_not_change_the_result(kind, tmp_path):
    """One row at a time instead of four; a large balance loss shows that it is the same, too."""
    model_type, changes = KINDS[kind]
    changes = {**changes, "data": make_data(tmp_path / "data"), **({"balance": 0.5} if kind == "moegpt" else {})}
    expected, folder = (run(tmp_path / str(size), model_type, micro_tokens=size, **changes) for size in (128, 32))
    for key, values in losses(expected).items():
        assert losses(folder)[key] == pytest.approx(values, rel=1e-5)
    assert max(difference(weights(expected), weights(folder)).values()) < 1e-3


def test_balance_spreads_the_load(tmp_path):
    """30 steps: the busiest expert has less with the loss than without."""
    make_data(tmp_path / "data")
    loads = {}
    for balance in (0.0, 1.0):
        folder = run(tmp_path / str(balance), "moegpt", data=tmp_path / "data", balance=balance, iterations=30,
                     eval_every=0, save_last=False, num_experts=8, log_every=10, dense_first=0)
        loads[balance] = [r["expert_load"] for r in records(folder) if "expert_load" in r]
    assert loads[1.0][-1] < 1.5 and loads[1.0][-1] < 0.8 * loads[0.0][-1]


def test_load_of_experts_is_that_of_the_steps_since_the_last_line(monkeypatch, tmp_path):
    """By hand: the busiest expert's share of the choices of the layer times the number of experts."""
    counts, train_step = [], Trainer.train_step

    def counted(self, step):
        train_step(self, step)
        counts.append(self.model.blocks[1].mlp.chosen.clone())

    monkeypatch.setattr(Trainer, "train_step", counted)
    folder = run(tmp_path, "moegpt", log_every=4, eval_every=1)
    found = [r["expert_load"] for r in records(folder) if "expert_load" in r]
    sums = [counts[3], counts[7]]  # counters are zeroed at each line, so these are of 4 steps
    assert all(c.sum() == 4 * 128 * 2 for c in sums)
    assert found == pytest.approx([(c.max() / c.double().mean()).item() for c in sums])


def test_only_a_mixture_logs_a_load(whole):
    for kind in TYPES:
        values = [r["expert_load"] for r in records(whole(kind)) if "expert_load" in r]
        assert len(values) == 8 and all((value is not None) == (kind == "moegpt") for value in values)


# --- resumed


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_continues_to_the_bit(kind, tmp_path, monkeypatch, whole):
    """Ended within step 6 without a last word; the checkpoint is that of step 3."""
    model_type, changes = KINDS[kind]
    expected, calls = whole(kind), itertools.count(1)
    argv = tiny(tmp_path, model_type, data=expected.parents[3] / "data", **SAVES, **changes)

    def micro_step(self, *args, real=Trainer.micro_step):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "micro_step", micro_step)
        assert tb.main(argv) == 130
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [3]
    assert tb.main([*argv, "--resume"]) == 0
    assert losses(folder) == losses(expected) and len(set(losses(folder)["train_loss"].values())) == 8
    for step in (6, 8):
        assert_same_state(load_state(folder, step), load_state(expected, step))


def test_a_killed_process_is_resumed_to_the_bit(tmp_path, whole):
    expected = whole("moegpt")
    argv = tiny(tmp_path, "moegpt", data=expected.parents[3] / "data", **SAVES)
    process = launch(argv, """
def kill(self, step, train=train_baseline.Trainer.train_step):
    train(self, step)
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train_baseline.Trainer.train_step = kill
""")
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    assert tb.main([*argv, "--resume"]) == 0
    folder = run_folder(tmp_path)
    assert losses(folder) == losses(expected)
    assert_same_state(load_state(folder, 8), load_state(expected, 8))


def test_a_signal_saves_and_the_run_goes_on_from_there(tmp_path, monkeypatch, whole):
    expected = whole("gpt")
    argv = tiny(tmp_path, "gpt", data=expected.parents[3] / "data", **SAVES | {"save_every": 0})
    with monkeypatch.context() as patch:
        train_step = Trainer.train_step
        patch.setattr(Trainer, "train_step", lambda self, step: (
            train_step(self, step), step == 4 and signal.raise_signal(signal.SIGINT)))
        assert tb.main(argv) == 128 + signal.SIGINT
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [5] and records(folder)[-1]["status"] == "interrupted"
    assert tb.main([*argv, "--resume"]) == 0 and losses(folder) == losses(expected)
    assert_same_state(load_state(folder, 8), load_state(expected, 8))


@pytest.mark.parametrize("change, word", [
    (dict(model_type="moderngpt"), "model_type: gpt in the checkpoint, moderngpt now"),
    (dict(max_lr=0.02), "max_lr: 0.01 in the checkpoint, 0.02 now"),
    (dict(optimizer="muon"), "optimizer: adamw in the checkpoint, muon now"),
    (dict(schedule="wsd"), "schedule: cosine in the checkpoint, wsd now")])
def test_a_run_is_not_resumed_with_other_settings(change, word, whole, capsys):
    folder = whole("gpt")
    argv = tiny(folder.parents[2], **{"data": folder.parents[3] / "data", **SAVES, **change})
    assert tb.main([*argv, "--resume"]) == 1
    said = capsys.readouterr().err
    assert word in said and "has other settings" in said and "Traceback" not in said


# --- several ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, whole):
    """Kind -> folders of a run of 2 ranks, ended after step 3 by its target, and of all types one of 1 rank that 2 have
    continued from its checkpoint of step 6."""
    base, found, command_lines = tmp_path_factory.mktemp("two"), {}, []
    for kind, (model_type, changes) in KINDS.items():
        new, old, one = base / kind / "new", base / kind / "old", whole(kind)
        where = {"data": one.parents[3] / "data", **SAVES}
        command_lines.append(tiny(new, model_type, **where, micro_tokens=32, target_loss=9.0, **changes))
        found[kind] = [new]
        if kind not in TYPES:
            continue
        shutil.copytree(one, old / "logs" / "x" / one.name)
        shutil.rmtree(run_folder(old) / "checkpoints" / "step_000008")
        metrics = run_folder(old) / "metrics.jsonl"
        early = [line for line in metrics.read_text().splitlines() if json.loads(line).get("step", 9) <= 6]
        metrics.write_text("\n".join(early) + "\n")
        command_lines.append([*tiny(old, model_type, **where, micro_tokens=64), "--resume"])
        found[kind].append(old)
    assert run_ranks(script_runs, 2, base, command_lines) == [[0] * len(command_lines)] * 2
    return {kind: [run_folder(folder) for folder in folders] for kind, folders in found.items()}


@needs_gloo
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(kind, whole, two_ranks):
    """Losses, norms of the gradient, loads of experts and the weights at the end."""
    expected = whole(kind)
    for folder, steps in zip(two_ranks[kind], (3, 8), strict=False):
        for key, values in losses(folder).items():
            wanted = {step: value for step, value in losses(expected)[key].items() if step <= steps}
            assert values == pytest.approx(wanted, rel=1e-5)
        assert max(difference(weights(expected, steps), weights(folder, steps)).values()) < 1e-3
        for name in ("grad_norm", "expert_load"):
            one, two = ([r[name] for r in records(f) if r.get(name) is not None] for f in (expected, folder))
            assert two == pytest.approx(one[:steps], rel=1e-4)
            assert len(one) == (8 if name == "grad_norm" or kind == "moegpt" else 0)


@needs_gloo
@pytest.mark.parametrize("kind", ["gpt", "ngpt, muon", "moegpt"])
def test_one_rank_continues_what_two_have_begun(kind, tmp_path, whole, two_ranks):
    """From step 3 on."""
    model_type, changes = KINDS[kind]
    shutil.copytree(two_ranks[kind][0], tmp_path / "logs" / "x" / "run")
    (folder,), expected = (tmp_path / "logs" / "x").iterdir(), whole(kind)
    argv = tiny(tmp_path, model_type, data=expected.parents[3] / "data", **SAVES, **changes)
    assert steps_saved(folder) == [3]
    assert tb.main([*argv, "--resume"]) == 0
    for key, values in losses(expected).items():
        assert losses(folder)[key] == pytest.approx(values, rel=1e-5)
    assert max(difference(weights(expected), weights(folder)).values()) < 1e-3


# --- compiled


@pytest.mark.parametrize("kind, unit", [("gpt", "model"), ("moderngpt, muon", "block"), ("ngpt", "block"),
                                        ("moegpt", "model")])
def test_whole_graphs_are_traced_and_the_warm_up_leaves_no_trace(kind, unit, tmp_path, monkeypatch):
    """Compiled by dynamo alone, with no C++ compiler needed: graphs without breaks, and after the warm-up the state of
    an uncompiled trainer, which has none."""
    compile_traced, (model_type, changes) = torch.compile, KINDS[kind]
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_traced(f, backend="eager", **options))
    monkeypatch.setattr(tb, "hardware_errors", lambda s, hardware: [])
    states = []
    for compiled in (False, True):
        argv = tiny(tmp_path, model_type, compile=compiled, compile_unit=unit, **changes)
        s, hardware, notes = tb.parse_settings(argv, 1)
        trainer = Trainer(s, hardware, World(), notes)
        trainer.loader.close()
        trainer.log.close()
        states.append({**{f"weights/{name}": p for name, p in state(trainer.model).items()},
                       **{f"{key}/{name}": tensor for key, tensors in trainer.optimizer.state_dict()["state"].items()
                          for name, tensor in tensors.items()},
                       **{f"chosen/{i}": block.mlp.chosen for i, block in enumerate(trainer.model.blocks)
                          if hasattr(block.mlp, "chosen")}, "steps": torch.tensor(trainer.optimizer.steps)})
    assert_same_state(*states)
    assert trainer.warm_graphs > 0


# --- as in train_gpt.py


def test_a_run_steps_with_its_schedules(tmp_path, monkeypatch):
    """Rate, momentum and decay of each step, by hand; the rate is logged as well."""
    given, step = [], MuonAdamW.step
    monkeypatch.setattr(MuonAdamW, "step", lambda self, *values: (given.append(values), step(self, *values)))
    folder = run(tmp_path, "moderngpt", optimizer="muon", schedule="wsd", cooldown=0.5, decay_schedule="linear")
    rates = [1 / 3, 2 / 3, 1, 1, 1, 0.775, 0.55, 0.325]
    momenta = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95, 0.95]
    expected = zip(rates, momenta, [1 - i / 8 for i in range(8)], strict=True)
    assert [pytest.approx(values) for values in expected] == given
    assert [r["lr"] for r in records(folder) if "lr" in r] == pytest.approx(rates)


def test_the_target_loss_ends_a_run(tmp_path, capsys):
    folder = run(tmp_path, "moderngpt", target_loss=9.0, eval_every=2)
    end = records(folder)[-1]
    assert (end["status"], end["target_step"], end["step"]) == ("target", 2, 2)
    assert "target loss 9.0 reached: step 2" in capsys.readouterr().out


def test_the_same_data_in_the_same_order_as_train_gpt(tmp_path):
    """Inputs, targets and document numbers of all batches, by both loaders."""
    corpus = train_gpt.open_corpus(str(make_data(tmp_path / "data")))
    own, batches = settings("gpt", batch_tokens=96, iterations=20, max_doc_len=16), []
    other = train_gpt.parse_settings(speedrun_flags(tmp_path, batch_tokens=96, iterations=20, max_doc_len=16,
                                                    stage_ends=(1.0,)), 1)[0]
    for script, s in ((tb, own), (train_gpt, other)):
        loader = script.Loader(s, corpus, script.World())
        batches.append([loader.next(step)[0] for step in range(20)])
        loader.close()
    assert all(torch.equal(a.flatten(), b.flatten()) for a, b in zip(*batches, strict=True))


def test_a_vocabulary_without_eot_is_one_document_a_shard(tmp_path):
    data = make_data(tmp_path / "data", eot=None)
    for kind in ("gpt", "moegpt"):
        folder = run(tmp_path / kind, kind, data=data)
        assert records(folder)[-1]["status"] == "done"


@pytest.mark.parametrize("kind", ["gpt", "ngpt"])
def test_a_rate_that_is_far_too_large_ends_in_one_sentence(kind, tmp_path, capsys):
    """Or, with unit vectors, in nothing worse than a poor loss."""
    code = tb.main(tiny(tmp_path, kind, max_lr=1e30, min_lr=1e30, grad_clip=0.0, warmup_steps=0))
    error, end = capsys.readouterr().err, records(run_folder(tmp_path))[-1]
    assert "Traceback" not in error and (code, end["status"]) in ((1, "nan"), (0, "done"))
    assert code == (kind == "gpt") and (not code or "lower --max-lr" in error and error.count("\n") == 1)


# --- the other tools


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Kind -> folder of a run on printable characters."""
    base = tmp_path_factory.mktemp("texts")
    data = make_data(base / "data", tokenizer={"kind": "char", "chars": CHARS}, eot=None)
    return lambda kind, **changes: run(base / f"{kind}{len(list(base.iterdir()))}", kind, data=data, **changes)


@pytest.mark.parametrize("kind, changes", [
    ("gpt", {}), ("moderngpt", dict(num_kv_heads=2, window=9)), ("moderngpt", dict(tied="on", qk_norm=True)),
    ("ngpt", {}), ("moegpt", dict(num_kv_heads=1)), ("ngpt", dict(optimizer="muon"))], ids=str)
def test_generate_continues_a_text_with_and_without_cache(kind, changes, texts, capsys):
    """The same text; gpt within its positions. The logits of a full pass choose the same tokens."""
    folder = texts(kind, **changes)
    options = ["--device", "cpu", "--checkpoint", str(folder), "--prompt", "0123", "--max-tokens", "24",
               "--temperature", "0"]
    capsys.readouterr()
    written = []
    for more in ([], ["--no-cache"]):
        code = generate.main([*options, *more])
        out, err = capsys.readouterr()
        assert code == 0, err
        written.append(out)
    assert written[0] == written[1] and len(written[0].rstrip("\n")) <= 4 + 24
    model = GPT(s := settings(kind, **changes), VOCAB)
    model.load_state_dict(weights(folder))
    text = [CHARS.index(c) for c in "0123"]
    with torch.no_grad():
        for _ in range(24):
            tokens = torch.tensor([text])
            z = logits(model, s, torch.stack((tokens, tokens, torch.zeros_like(tokens))))
            text.append(z[0, -1, :VOCAB].argmax().item())
    assert written[0] == "".join(CHARS[token] for token in text) + "\n"


def test_logger_reads_and_compares_the_logs(tmp_path, whole, capsys):
    """A report of a run, and the difference to a run of train_gpt.py on the same data."""
    logger = importlib.import_module("logger")
    own = whole("moegpt")
    speedrun = speedrun_flags(tmp_path, data=own.parents[3] / "data", experiment_name="speedrun")
    assert train_gpt.main(speedrun) == 0
    other = run_folder(tmp_path, "speedrun")
    capsys.readouterr()
    summary = logger.summarize(logger.read_run(own))
    assert (summary["val_loss"], summary["step"]) == (losses(own)["val_loss"][8], 8)
    assert summary["params_active"] < summary["params_total"]
    for argv in (["show", str(own)], ["compare", str(other), str(own)]):
        assert logger.main(argv) == 0
        assert f"{losses(own)['val_loss'][8]:.4f}" in capsys.readouterr().out
    assert logger.main(["diff", str(other), str(own)]) == 0
    out = capsys.readouterr().out
    assert "model_type" in out and "moegpt" in out


def test_generate_writes_no_more_than_gpt_has_positions(texts, capsys):
    """32 of them: 4 of the prompt and 28 new tokens; or fewer, but never a traceback."""
    options = ["--device", "cpu", "--checkpoint", str(texts("gpt")), "--prompt", "0123", "--max-tokens"]
    assert generate.main([*options, "28"]) == 0
    capsys.readouterr()
    for more in ([], ["--no-cache"]):
        code = generate.main([*options, "100", *more])
        out, err = capsys.readouterr()
        assert code in (0, 1) and "Traceback" not in err and len(out) <= 101 + 4
        assert code == 0 or "32" in err


def test_the_log_holds_its_script(whole):
    text = (whole("ngpt") / "log.txt").read_text()
    assert "class UnitBlock" in text and '"model_type": "ngpt"' in text and "step:8/8 val_loss:" in text
