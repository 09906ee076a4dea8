"""Training with train_baseline.py: its loop against a plain one, train_gpt.py's optimizer and batches against it,
invariants, ranks, micro-steps, resumed runs, what generate.py and logger.py make of them."""
import importlib
import itertools
import json
import math
import shutil
import signal

import baseline
import pytest
import torch
from baseline import (
    TYPES,
    launch,
    load_state,
    logits,
    loss,
    needs_gloo,
    packed,
    random_model,
    rewrite_state,
    run,
    script_runs,
    settings,
    shared_batches,
    state,
    tiny,
    train,
    weights,
)
from helpers import (
    VOCAB,
    assert_same_state,
    losses,
    make_data,
    records,
    run_folder,
    steps_saved,
)
from helpers import tiny as speedrun_flags
from ranks import difference, run_ranks
from test_hellaswag import GPT2, TASKS, Numbers, write_tasks
from torch.utils.flop_counter import FlopCounterMode

import generate
import train_baseline as tb
import train_gpt
from evals import hellaswag
from runlogs import loading
from train_baseline import GPT

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
    found_norms = train(model, s, batches)
    moved = {name: (p - before[name]).abs().max().item() for name, p in reference.named_parameters()
             if not name.endswith("k.bias")}
    expected, found = state(reference), state(model)
    for name, p in expected.items():
        if not name.endswith("k.bias"):
            torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-5, msg=name)
    assert min(norms) > 0.5 and found_norms == pytest.approx(norms, rel=1e-4)
    assert min(moved.values()) > 0.01


def newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """Five steps on a matrix (Jordan et al. 2024), in fp64."""
    x = g.double() / g.double().norm()
    x = x.T if len(g) > g.size(1) else x
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x - 4.7750 * square @ x + 2.0315 * square @ square @ x
    return x.T if len(g) > g.size(1) else x


@pytest.mark.parametrize("changes", [{}, dict(schedule="wsd")], ids=str)
@pytest.mark.parametrize("model_type", ["moderngpt", "moegpt"])
def test_hidden_matrices_train_as_with_a_plain_muon(model_type, changes):
    """6 steps with Nesterov momentum that rises, sqrt(max(1, outputs / inputs)) in the rate, and decoupled decay; all
    matrices are Muon's but tables, head and routers. torch orthogonalizes in bf16, so by 3 % of the way."""
    s = settings(model_type, optimizer="muon", muon_weight_decay=0.2, grad_clip=0.0, num_kv_heads=2, **changes)
    model = random_model(s)
    named = dict(model.named_parameters())
    hidden = [name for name, p in named.items() if p.dim() > 1 and name.startswith("blocks") and "router" not in name]
    optimizers = tb.make_optimizers(model, s)
    assert type(optimizers[0]) is torch.optim.Muon and type(optimizers[1]) is torch.optim.AdamW
    assert {id(p) for p in optimizers[0].param_groups[0]["params"]} == {id(named[name]) for name in hidden}
    assert sum(len(group["params"]) for o in optimizers for group in o.param_groups) == len(named)
    expected = {name: named[name].detach().double() for name in hidden}
    before = {name: w.clone() for name, w in expected.items()}
    momentum = {name: torch.zeros_like(w) for name, w in expected.items()}
    for step in range(6):
        tb.set_rates(optimizers, s, step)
        total, balance = loss(model, s, packed(4, seed=10 * step))
        ((total + s.balance * balance) / s.batch_tokens).backward()
        rate, mu = tb.rate_scale(s, step), 0.85 + 0.1 * min(1, step / 4)
        for name, w in expected.items():
            g = named[name].grad.double()
            momentum[name].mul_(mu).add_(g, alpha=1 - mu)
            way = newton_schulz(mu * momentum[name] + (1 - mu) * g) * max(1, len(w) / w.size(1)) ** 0.5
            w.sub_(0.02 * rate * (way + 0.2 * w))
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()
    for name, w in expected.items():
        assert (named[name] - w).norm() < 0.03 * (w - before[name]).norm(), name


# --- the oracle of train_gpt.py's optimizer; tests/test_optimizer.py compares its parts with torch's


def test_adamw_of_train_gpt_is_the_baselines():
    """5 steps on the same gradients, from train_gpt.py's fp32 master weights; a decay and rate for each of two tensors.
    """
    s = settings("moderngpt", iterations=9, warmup_steps=2, weight_decay=0.2)
    model, random = random_model(s), torch.Generator().manual_seed(4)
    (adamw,) = tb.make_optimizers(model, s)
    names = ("embed.weight", "norm.weight", "blocks.1.mlp.down.weight")
    p = {name: model.get_parameter(name) for name in names}
    masters = {name: q.detach().clone().flatten() for name, q in p.items()}
    moments = {name: [torch.zeros_like(master) for _ in range(2)] for name, master in masters.items()}
    for step in range(5):
        tb.set_rates([adamw], s, step)
        for q in model.parameters():
            q.grad = torch.randn(q.shape, generator=random)
        numbers = (1 - s.beta1, 1 - s.beta2, 1 - s.beta1 ** (step + 1), 1 - s.beta2 ** (step + 1))
        share1, share2, correction1, correction2 = map(torch.tensor, numbers)
        for name, q in p.items():
            rate = torch.tensor(s.max_lr * tb.rate_scale(s, step))
            decay = torch.tensor(0.2 if q.dim() > 1 else 0.0)
            train_gpt.adamw_update(masters[name], q.grad.flatten(), *moments[name], rate, decay, share1, share2,
                                   correction1, correction2, s.adam_eps, False)
        adamw.step()
    for name, q in p.items():
        torch.testing.assert_close(masters[name].view_as(q), q.detach(), rtol=1e-5, atol=1e-6, msg=name)


def test_muon_of_train_gpt_is_the_baselines_up_to_bf16():
    """4 steps on the same gradients without decay; torch's orthogonalizes in bf16, so by 3 % of the way."""
    s = settings("moderngpt", optimizer="muon", warmup_steps=0, min_lr=0.01)
    model, random = random_model(s), torch.Generator().manual_seed(3)
    muon, _ = tb.make_optimizers(model, s)
    names = ("blocks.0.attn.q.weight", "blocks.0.attn.out.weight", "blocks.1.mlp.up.weight", "blocks.1.mlp.down.weight")
    p = {name: model.get_parameter(name) for name in names}
    masters = {name: q.detach().clone()[None] for name, q in p.items()}
    before, momentum = ({name: f(master) for name, master in masters.items()} for f in (torch.clone, torch.zeros_like))
    for step in range(4):
        tb.set_rates([muon], s, step)
        mu = torch.tensor(muon.param_groups[0]["momentum"])
        for q in model.parameters():
            q.grad = torch.randn(q.shape, generator=random)
        for name, q in p.items():
            rate = torch.tensor(s.muon_lr * tb.rate_scale(s, step) * max(1, len(q) / q.size(1)) ** 0.5)
            train_gpt.muon_update(masters[name], q.grad[None], momentum[name], None, rate.view(1, 1, 1),
                                  torch.tensor(0.0), mu, torch.tensor(0.0), "newton_schulz", torch.float32, False)
        muon.step()
    for name, q in p.items():
        assert (masters[name][0] - q).norm() < 0.03 * (q - before[name][0]).norm(), name


# --- ngpt


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_rows_of_ngpts_matrices_have_norm_1_after_training(optimizer, tmp_path):
    """After 8 steps, along model_dim; what embeds, reads or writes the stream are all of its matrices."""
    folder = run(tmp_path, "ngpt", optimizer=optimizer)
    found, initial = weights(folder), state(GPT(settings("ngpt"), VOCAB))
    matrices = {name for name, p in found.items() if p.dim() > 1}
    parts = {"embed", "lm_head", "q", "k", "v", "out", "up", "gate", "down"}
    assert {name.split(".")[-2] for name in matrices} == parts
    for name, p in found.items():
        assert (p - initial[name]).abs().max() > 1e-3, name
        if name in matrices:
            along = 0 if name.endswith(tb.RESIDUAL) else 1
            assert p.size(along) == 32 and (p.norm(dim=along) - 1).abs().max() < 1e-6, name


# --- training of all types


def assert_close_weights(kind: str, one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    """To rounding; Muon's orthogonalization in bf16 makes more of it, and biases of keys move by rounding errors alone.
    """
    differing = {name: d for name, d in difference(one, other).items() if not name.endswith("k.bias")}
    assert max(differing.values()) < (0.05 if "muon" in kind else 1e-3), differing



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
    assert_close_weights(kind, weights(expected), weights(folder))


def test_balance_spreads_the_load(tmp_path):
    """30 steps: the busiest expert has less with the loss than without."""
    make_data(tmp_path / "data")
    loads = {}
    for balance in (0.0, 1.0):
        given = dict(balance=balance, iterations=30, num_experts=8, dense_first=0)
        folder = run(tmp_path / str(balance), "moegpt", data=tmp_path / "data", eval_every=0, **given)
        model = GPT(settings("moegpt", **given), VOCAB)
        stream = tb.ValStream(tb.open_corpus(str(tmp_path / "data")), 300, 32)
        model.load_state_dict(weights(folder, 30))
        rows = []
        for expert in model.blocks[0].mlp.experts:
            expert.register_forward_hook(lambda expert, inputs, output, rows=rows: rows.append(len(output)))
        with torch.no_grad():
            loss(model, None, torch.from_numpy(stream.rows(0, stream.num_rows)))
        loads[balance] = max(rows) / (sum(rows) / 8)
    assert loads[1.0] < 1.5 and loads[1.0] < 0.8 * loads[0.0]


# --- resumed


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_run_continues_to_the_bit(kind, tmp_path, monkeypatch, whole):
    """Ended within step 6 by an error that is none of the data; what is saved is step 5."""
    model_type, changes = KINDS[kind]
    expected, calls = whole(kind), itertools.count(1)
    argv = tiny(tmp_path, model_type, data=expected.parents[3] / "data", **SAVES, **changes)

    def next_batch(*given, real=tb.next_batch):
        if next(calls) == 6:
            raise KeyboardInterrupt
        return real(*given)

    with monkeypatch.context() as patch:
        patch.setattr(tb, "next_batch", next_batch)
        assert tb.main(argv) == 130
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [3, 5] and records(folder)[-1]["status"] == "interrupted"
    assert tb.main([*argv, "--resume"]) == 0
    assert losses(folder) == losses(expected) and len(set(losses(folder)["train_loss"].values())) == 8
    for step in (6, 8):
        assert_same_state(load_state(folder, step), load_state(expected, step))


def test_a_killed_process_is_resumed_to_the_bit(tmp_path, whole):
    expected = whole("moegpt")
    argv = tiny(tmp_path, "moegpt", data=expected.parents[3] / "data", **SAVES)
    process = launch(argv, """
def kill(optimizers, s, step, real=train_baseline.set_rates):
    if step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    real(optimizers, s, step)
train_baseline.set_rates = kill
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
        set_rates = tb.set_rates
        patch.setattr(tb, "set_rates", lambda optimizers, s, step: (
            set_rates(optimizers, s, step), step == 4 and signal.raise_signal(signal.SIGINT)))
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


def test_a_checkpoint_of_the_sharded_optimizer_is_refused(tmp_path, whole, capsys):
    """Of before torch.optim: its state has neither model nor optimizers."""
    folder = tmp_path / "logs" / "x" / "run"
    shutil.copytree(whole("gpt"), folder)
    for path in (folder / "checkpoints").iterdir():
        rewrite_state(path, {"optimizer": {"steps": 8}})
    assert tb.main([*tiny(tmp_path, data=whole("gpt").parents[3] / "data", **SAVES), "--resume"]) == 1
    said = capsys.readouterr().err
    assert "state.pt: model is None, not an object" in said and said.endswith("or name a run's folder\n")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, whole, capsys):
    """A byte of the newest is changed: the run goes on from step 6 to the same end. Without any intact one it ends."""
    folder, expected = tmp_path / "logs" / "x" / "run", whole("gpt")
    shutil.copytree(expected, folder)
    argv = [*tiny(tmp_path, data=expected.parents[3] / "data", **SAVES), "--resume"]
    broken = folder / "checkpoints" / "step_000008" / "state.pt"
    content = bytearray(broken.read_bytes())
    content[len(content) // 2] ^= 1
    broken.write_bytes(content)
    assert tb.main(argv) == 0
    said = capsys.readouterr().err
    assert "step_000008 cannot be used (state.pt does not match its sha256); trying the one before it" in said
    assert_same_state(load_state(folder, 8), load_state(expected, 8))
    for path in (folder / "checkpoints").iterdir():
        (path / "state.pt").unlink()
    assert tb.main(argv) == 1 and "no whole checkpoint" in capsys.readouterr().err


def test_only_the_newest_checkpoints_stay_and_a_full_disk_costs_none(tmp_path, monkeypatch, capsys):
    """torch.save fails at step 6, the second of three times; training goes on."""
    calls, save = itertools.count(1), torch.save
    def full(state, file):
        if next(calls) == 2:
            raise RuntimeError("No space left on device")
        save(state, file)
    monkeypatch.setattr(torch, "save", full)
    folder = run(tmp_path, **SAVES | {"keep": 1})
    assert steps_saved(folder) == [8] and [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000008"]
    assert "could not write" in (said := capsys.readouterr().out) and "is kept" in said


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
    ended = ["target" if "--target-loss" in argv else "done" for argv in command_lines]
    assert run_ranks(script_runs, 2, base, command_lines) == [ended] * 2
    return {kind: [run_folder(folder) for folder in folders] for kind, folders in found.items()}


@needs_gloo
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_train_as_one(kind, whole, two_ranks):
    """Losses, norms of the gradient and the weights at the end."""
    expected = whole(kind)
    for folder, steps in zip(two_ranks[kind], (3, 8), strict=False):
        for key, values in losses(folder).items():
            wanted = {step: value for step, value in losses(expected)[key].items() if step <= steps}
            assert values == pytest.approx(wanted, rel=1e-5)
        assert_close_weights(kind, weights(expected, steps), weights(folder, steps))
        one, two = ([r["grad_norm"] for r in records(f) if "grad_norm" in r] for f in (expected, folder))
        assert two == pytest.approx(one[:steps], rel=1e-3) and len(one) == 8


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
    assert_close_weights(kind, weights(expected), weights(folder))


# --- compiled


@pytest.mark.parametrize("kind", ["gpt", "moderngpt, muon", "ngpt", "moegpt"])
def test_a_compiled_run_has_the_same_losses(kind, tmp_path, monkeypatch, whole):
    """Traced by dynamo alone, with no C++ compiler needed, in one graph for each of training and validation, but for
    the experts; the run in which all is compiled leaves no trace. It has a mask, the other none."""
    compile_traced, (model_type, changes) = torch.compile, KINDS[kind]
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_traced(
        f, backend="eager", fullgraph=model_type != "moegpt", **options))
    monkeypatch.setattr(tb, "misfits", lambda *_: [])
    torch._dynamo.reset()
    data = whole(kind).parents[3] / "data"
    folder = run(tmp_path, model_type, data=data, compile=True, **SAVES, **changes)
    for key, values in losses(whole(kind)).items():
        assert losses(folder)[key] == pytest.approx(values, rel=1e-4)


# --- as in train_gpt.py


def test_a_run_steps_with_its_schedules(tmp_path, monkeypatch):
    """Rate and momentum of each step, by hand; the rate is logged as well."""
    given, step = [], torch.optim.Muon.step
    monkeypatch.setattr(torch.optim.Muon, "step", lambda self: (
        given.append((self.param_groups[0]["lr"], self.param_groups[0]["momentum"])), step(self)))
    folder = run(tmp_path, "moderngpt", optimizer="muon", schedule="wsd", cooldown=0.5)
    rates = [1 / 3, 2 / 3, 1, 1, 1, 0.775, 0.55, 0.325]
    momenta = [0.85, 0.875, 0.9, 0.925, 0.95, 0.95, 0.95, 0.95]
    expected = zip([0.02 * rate for rate in rates], momenta, strict=True)
    assert [pytest.approx(values) for values in expected] == given
    assert [r["lr"] for r in records(folder) if "lr" in r] == pytest.approx(rates)


def test_the_target_loss_ends_a_run(tmp_path, capsys):
    folder = run(tmp_path, "moderngpt", target_loss=9.0, eval_every=2)
    end = records(folder)[-1]
    assert (end["status"], end["target_step"], end["step"]) == ("target", 2, 2)
    assert "target loss 9.0 reached: step 2" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, dict(shuffle=False), dict(long_docs="clip", seed=3)], ids=str)
def test_the_same_data_in_the_same_order_as_train_gpt(changes, tmp_path):
    """Inputs, targets and document numbers of all batches of three epochs, and the places after them."""
    data = str(make_data(tmp_path / "data"))
    own = settings("gpt", batch_tokens=96, iterations=20, max_doc_len=16, **changes)
    other = train_gpt.parse_settings(speedrun_flags(tmp_path, batch_tokens=96, iterations=20, max_doc_len=16,
                                                    stage_ends=(1.0,), **changes), 1)[0]
    loader = train_gpt.Loader(other, train_gpt.open_corpus(data), train_gpt.World())
    rows = tb.training_rows(own, tb.open_corpus(data))
    for step in range(20):
        (expected,), position = loader.next(step)
        found, place = tb.next_batch(rows, own, tb.World())
        assert torch.equal(found[:2], expected[:2]) and place == position, step
        assert torch.equal(found[2].diff(), expected[2].diff()), "documents begin at the same places of a row"
    loader.close()


@needs_gloo
def test_processes_share_the_batch_of_one(tmp_path):
    data = str(make_data(tmp_path / "data"))
    one, two = shared_batches((0, 0, 1), data), run_ranks(shared_batches, 2, tmp_path, data)
    for batch, parts in zip(one, zip(*two, strict=True), strict=True):
        assert torch.equal(torch.cat(parts, dim=1), batch) and parts[0].size(1) == 2


def test_the_validation_stream_is_train_gpts(tmp_path):
    data = str(make_data(tmp_path / "data"))
    own = tb.ValStream(tb.open_corpus(data), 300, 32)
    other = train_gpt.ValStream(train_gpt.open_corpus(data), 300, 32)
    assert own.num_tokens == other.num_tokens == 300 and own.num_rows == other.num_rows
    assert (own.rows(0, 12) == other.rows(0, 12)).all()


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
    summary = loading.summarize(loading.read_run(own))
    assert (summary["val_loss"], summary["step"]) == (losses(own)["val_loss"][8], 8)
    assert summary["params_active"] < summary["params_total"]
    for argv in (["show", str(own)], ["compare", str(other), str(own)]):
        assert logger.main(argv) == 0
        assert f"{losses(own)['val_loss'][8]:.4f}" in capsys.readouterr().out
    assert logger.main(["diff", str(other), str(own)]) == 0
    out = capsys.readouterr().out
    assert "model_type" in out and "moegpt" in out


@pytest.mark.parametrize("kind", ["gpt", "ngpt", "moegpt"])
def test_hellaswag_scores_a_checkpoint(kind, tmp_path, monkeypatch):
    """In fp32, and in bf16 in which nearly all choices are the same."""
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)
    folder = run(tmp_path, kind, data=make_data(tmp_path / "data", **GPT2), eval_tokens=64, seq_len=64, iterations=2,
                 warmup_steps=1)
    scores = {}
    for dtype in ("fp32", "bf16"):
        output = tmp_path / f"{dtype}.json"
        assert hellaswag.main(["--checkpoint", str(folder), "--input", str(write_tasks(tmp_path / "tasks", TASKS[:20])),
                               "--device", "cpu", "--dtype", dtype, "--row-len", "32", "--output", str(output)]) == 0
        scores[dtype] = json.loads(output.read_text())
    assert scores["fp32"]["tasks"] == 20 and scores["fp32"]["script"] == "train_baseline.py"
    assert abs(scores["fp32"]["per_token"] - scores["bf16"]["per_token"]) <= 0.2


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
    assert "class TransformerLayer" in text and '"model_type": "ngpt"' in text and "step:8/8 val_loss:" in text


def test_a_cpu_trains_without_a_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(tb, "attention_mask", None)
    run(tmp_path / "alone", "gpt", iterations=1, warmup_steps=0)
    with pytest.raises(TypeError):
        run(tmp_path / "plain", "gpt", iterations=1, warmup_steps=0, backend="plain")


# --- the share of a GPU's peak


@pytest.mark.parametrize("changes", [dict(), dict(tied="off", window=8), dict(max_doc_len=16)], ids=str)
@pytest.mark.parametrize("model_type", ["gpt", "moegpt"])
def test_mfu_counts_what_torch_counts(model_type, changes, tmp_path, monkeypatch):
    """Products of forward and backward by torch's counter, which sees all pairs of a row, less those that no query of
    a whole causal row looks at."""
    monkeypatch.setattr(tb, "PEAK_FLOPS", {"CPU": 1e12})
    monkeypatch.setattr(tb, "find_device", lambda device: baseline.CPU)
    changes = {"backend": "plain", "eval_seq_len": 16, **changes}
    step = records(run(tmp_path, model_type, iterations=1, warmup_steps=0, **changes))[0]
    s = settings(model_type, **changes)
    length, batch = s.max_doc_len, packed(4)
    batch[2] = torch.arange(32) // length
    with FlopCounterMode(display=False) as counter:
        sum(GPT(s, VOCAB)(*batch)).backward()
    pairs = sum(min(s.window or length, place + 1) for place in range(length)) / length
    expected = counter.get_total_flops() / (4 * 32) - 12 * s.width * s.num_layers * (32 - pairs)
    assert 1e12 * step["mfu"] / step["tokens_per_s"] == pytest.approx(expected)
