"""The optimizer on one rank: against torch's own, against plain loops, and compiled against eager."""
from __future__ import annotations

import shutil

import pytest
import torch
from helpers import CPU
from ranks import (
    ROWS,
    SEQ_LEN,
    backward,
    build,
    difference,
    next_token_loss,
    parameters,
    random_batch,
    settings,
    train,
)
from torch import nn

import train_gpt as tg

VARIANTS = {
    "default": {}, "no smear": {"smear": False}, "no value embeddings": {"value_embeds": 0},
    "no skips": {"skip": "none"}, "one skip": {"skip": "single"}, "no attention gate": {"attn_gate": False},
    "no gates at all": {"attn_gate": False, "value_embeds": 0}, "one layer": {"num_layers": 1, "value_embeds": 0},
    "no attention in the middle": {"attention": "L-S"}, "attention in one layer of a value table": {"attention": "L--"},
    "no softcap": {"softcap": (0.0, 0.0, 1.0)}, "no NorMuon": {"muon_beta2": 0.0},
}


def feed(model: nn.Module, optimizer: tg.MuonAdamW, gradients: dict[str, torch.Tensor]):
    """A backward pass that gives the parameters exactly these gradients."""
    optimizer.last_micro_step = True
    sum((p.float() * gradients[name]).sum() for name, p in model.named_parameters()).backward()


def random_gradients(model: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """Gradients of very different sizes, with some exact zeros, as those of rare tokens."""
    random = torch.Generator().manual_seed(step)
    gradients = {}
    for name, p in model.named_parameters():
        size = 10.0 ** torch.empty(p.shape).uniform_(-4, 0, generator=random)
        gradients[name] = torch.randn(p.shape, generator=random) * size
        gradients[name].view(-1)[::7] = 0
    return gradients


def rules_of(model: nn.Module, s: tg.Settings) -> dict[str, tg.Rule]:
    return tg.match_rules(tg.parameter_table(s), [name for name, _ in model.named_parameters()])


def bank_of(optimizer: tg.MuonAdamW, name: str) -> tg.Bank:
    return next(bank for bank in optimizer.banks if name in bank.params)


# --- AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_adamw_matches_torch(weight_decay):
    s = settings(adam_weight_decay=weight_decay, cautious=False, adam_lr=0.003)
    model, optimizer = build(s)
    rules = {name: rule for name, rule in rules_of(model, s).items() if rule.kind == "adamw"}
    assert sum(rule.weight_decay > 0 for rule in rules.values()) == (3 if weight_decay else 0)
    copies = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters() if name in rules}
    groups = [dict(params=[p], lr=0.0, betas=rules[name].betas, eps=s.adam_eps) for name, p in copies.items()]
    reference = torch.optim.AdamW(groups)
    for step in range(6):
        scale = (0.3, 1.0, 1.0, 0.5, 0.1, 0.7)[step]
        gradients = random_gradients(model, step)
        feed(model, optimizer, gradients)
        optimizer.step(scale, 0.9)
        for name, group in zip(copies, reference.param_groups, strict=True):
            copies[name].grad = gradients[name].clone()
            group.update(lr=rules[name].lr * scale, weight_decay=rules[name].weight_decay * scale)
        reference.step()
        for name, p in copies.items():
            torch.testing.assert_close(dict(model.named_parameters())[name], p, rtol=1e-5, atol=1e-6)
    for name, p in copies.items():
        state = optimizer.state_dict()["state"]
        torch.testing.assert_close(state["exp_avg"][name], reference.state[p]["exp_avg"], rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(state["exp_avg_sq"][name], reference.state[p]["exp_avg_sq"], rtol=1e-5, atol=1e-10)


def test_adamw_survives_zero_gradients():
    model, optimizer = build(settings())
    before = parameters(model)
    feed(model, optimizer, {name: torch.zeros_like(p) for name, p in before.items()})
    optimizer.step(1.0, 0.9)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.equal(model.embed.weight, before["embed.weight"])


# --- Muon


def matrices_of(name: str, tensor: torch.Tensor) -> list[torch.Tensor]:
    """The 2-D matrices of a hidden parameter."""
    return list(tensor.view(-1, *tensor.shape[-2:]).unbind(0)) if tensor.dim() > 2 else [tensor]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("weight_decay", [0.0, 2.0])
def test_muon_matches_torch(weight_decay):
    """torch iterates in bf16: so do we here, with fp32 masters. torch's factor on the learning rate is
    sqrt(max(1, rows / columns)) and does not touch the decay; ours is in the rule and does."""
    s = settings(dtype="bf16", orthogonalizer="newton_schulz", muon_beta2=0.0, cautious=False,
                 muon_weight_decay=weight_decay)
    model, optimizer = build(s)
    hidden = {name: rule for name, rule in rules_of(model, s).items() if rule.kind == "muon"}
    start = {name: w.clone() for name, w in optimizer.state_dict()["state"]["master"].items() if name in hidden}
    copies = {name: [nn.Parameter(m.clone()) for m in matrices_of(name, w)] for name, w in start.items()}
    references = {name: torch.optim.Muon(ps, lr=s.muon_lr, momentum=0.9) for name, ps in copies.items()}
    for step in range(5):
        gradients = {n: torch.randn(p.shape, generator=torch.Generator().manual_seed(step + 10 * i)).bfloat16().float()
                     for i, (n, p) in enumerate(model.named_parameters())}
        feed(model, optimizer, gradients)
        optimizer.step(1.0, 0.9)
        for name, reference in references.items():
            for p, g in zip(copies[name], matrices_of(name, gradients[name]), strict=True):
                p.grad = g.clone()
            reference.param_groups[0]["weight_decay"] = weight_decay * hidden[name].lr / s.muon_lr
            reference.step()
    ours = optimizer.state_dict()["state"]
    for name, ps in copies.items():
        expected, moved = torch.stack(list(ps)).view_as(start[name]).detach(), (ours["master"][name] - start[name])
        assert (ours["master"][name] - expected).norm() < 0.03 * moved.norm(), name  # bf16 rounding; measured: 0.014
        buffers = torch.stack([references[name].state[p]["momentum_buffer"] for p in ps]).view_as(start[name])
        torch.testing.assert_close(ours["momentum"][name], buffers, rtol=1e-5, atol=1e-6)


def cautious_decay_loop(weights: torch.Tensor, update: torch.Tensor, lr: float, decay: float, cautious: bool):
    """The weights after a step, entry by entry."""
    after = weights.clone()
    for index in range(weights.numel()):
        w, u = weights.view(-1)[index].item(), update.reshape(-1)[index].item()
        agree = (w > 0) == (u > 0) or w == 0 or u == 0
        after.view(-1)[index] = w - lr * u - (lr * decay * w if agree or not cautious else 0.0)
    return after


@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_muon_matches_a_plain_reference(method, cautious):
    """Nesterov momentum, orthogonalization, NorMuon and decay, a matrix at a time, over steps of changing momentum."""
    s = settings(orthogonalizer=method, cautious=cautious, muon_weight_decay=3.0, muon_beta2=0.8)
    model, optimizer = build(s)
    rules, weights = rules_of(model, s), {}
    for name, p in model.named_parameters():
        if rules[name].kind == "muon":
            weights[name] = [m.clone() for m in matrices_of(name, p.detach())]
    momenta = {name: [torch.zeros_like(m) for m in ms] for name, ms in weights.items()}
    variances = {name: [torch.zeros(m.size(0), 1) for m in ms] for name, ms in weights.items()}  # square or tall
    for step, (scale, mu) in enumerate([(1.0, 0.85), (0.5, 0.95), (0.7, 0.9)]):
        gradients = random_gradients(model, step)
        feed(model, optimizer, gradients)
        optimizer.step(scale, mu)
        for name, ms in weights.items():
            for i, g in enumerate(matrices_of(name, gradients[name])):
                momenta[name][i] = mu * momenta[name][i] + (1 - mu) * g
                update = tg.orthogonalize(((1 - mu) * g + mu * momenta[name][i])[None], method, torch.float32)[0]
                variances[name][i] = 0.8 * variances[name][i] + 0.2 * update.square().mean(1, keepdim=True)
                scaled = update / variances[name][i].sqrt()
                scaled *= update.norm() / scaled.norm()
                ms[i] = cautious_decay_loop(ms[i], scaled, rules[name].lr * scale, 3.0 * scale, cautious)
    for name, ms in weights.items():
        expected = torch.stack(ms).view_as(dict(model.named_parameters())[name])
        torch.testing.assert_close(dict(model.named_parameters())[name].detach(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cautious", [True, False])
def test_decay_acts_only_where_signs_agree(cautious):
    random = torch.Generator().manual_seed(0)
    weights, update = torch.randn(3, 6, 5, generator=random), torch.randn(3, 6, 5, generator=random)
    weights[0, 0], update[0, 1] = 0.0, 0.0
    expected = cautious_decay_loop(weights, update, 0.1, 0.5, cautious)
    master = weights.clone()
    tg.apply_update(master, update, torch.tensor(0.1), torch.tensor(0.5), cautious)
    torch.testing.assert_close(master, expected, rtol=0, atol=1e-6)
    plain = weights - 0.1 * update
    changed = (master - plain).abs() > 1e-5
    assert torch.equal(changed, weights.abs() > 1e-3) if not cautious else 0.3 < changed.float().mean() < 0.7


def test_learning_rate_factor_of_each_parameter():
    s = settings(muon_lr=0.01, adam_lr=0.001, mlp_ratio=4)
    model, optimizer = build(s)
    rates = {name: rule.lr for name, rule in rules_of(model, s).items()}
    assert rates["blocks.0.attn.qkvo"] == pytest.approx(0.01) and rates["blocks.2.mlp.down"] == pytest.approx(0.02)
    before, gradients = parameters(model), {n: torch.ones_like(p) for n, p in model.named_parameters()}
    feed(model, optimizer, gradients)
    optimizer.step(0.5, 0.9)
    for name, p in model.named_parameters():
        if rules_of(model, s)[name].kind == "adamw":  # the first step of AdamW is lr * sign
            torch.testing.assert_close(before[name] - p, torch.full_like(p, 0.5 * rates[name]), rtol=1e-3, atol=1e-6)


# --- orthogonalization


def polar_factor(matrices: torch.Tensor) -> torch.Tensor:
    u, _, vt = torch.linalg.svd(matrices.double(), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(3, 32, 96), (3, 96, 32), (3, 64, 64), (2, 16, 17)])
@pytest.mark.parametrize("method,low,high", [("polar_express", 0.85, 1.15), ("newton_schulz", 0.6, 1.3)])
def test_orthogonalize_is_near_the_polar_factor(shape, method, low, high):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    result = tg.orthogonalize(matrices, method, torch.float32)
    assert result.shape == matrices.shape
    for given, found in zip(matrices, result, strict=True):
        before = torch.linalg.svdvals(given)
        after = torch.linalg.svdvals(found)
        large = int((before > 0.01 * before[0]).sum())  # the iteration does not reach the smallest ones
        assert large >= 0.9 * len(before)
        assert after.max() < high and after[:large].min() > low
        exact = polar_factor(given)
        assert (found.double() * exact).sum() / (found.norm() * exact.norm()) > 0.98


@pytest.mark.parametrize("method", ["polar_express", "newton_schulz"])
def test_orthogonalize_does_not_depend_on_scale_and_takes_zero(method):
    matrices = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(2))
    expected = tg.orthogonalize(matrices, method, torch.float32)
    for scale in (1e-3, 1e4):
        scaled = tg.orthogonalize(scale * matrices, method, torch.float32)
        torch.testing.assert_close(scaled, expected, rtol=0, atol=1e-3)
    assert torch.equal(tg.orthogonalize(torch.zeros(1, 4, 4), method, torch.float32), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("shape", [(5, 24, 40), (5, 40, 24), (5, 24, 24)])
def test_orthogonalize_batched_is_one_by_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    matrices *= 10.0 ** torch.arange(-2, 3).view(-1, 1, 1)  # each by its own norm
    together = tg.orthogonalize(matrices, "polar_express", torch.float32)
    alone = torch.cat([tg.orthogonalize(m[None], "polar_express", torch.float32) for m in matrices])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
    turned = tg.orthogonalize(matrices.mT.contiguous(), "polar_express", torch.float32).mT
    torch.testing.assert_close(together, turned, rtol=0, atol=1e-3 if shape[1] == shape[2] else 1e-4)


def test_orthogonalize_iterates_in_the_given_dtype():
    assert tg.orthogonalize(torch.randn(1, 8, 8), "polar_express", torch.bfloat16).dtype == torch.bfloat16


# --- NorMuon


@pytest.mark.parametrize("rows,columns", [(8, 5), (5, 8)])
def test_normalize_variance_evens_out_the_longer_axis(rows, columns):
    random = torch.Generator().manual_seed(4)
    update = torch.randn(3, rows, columns, generator=random) * torch.logspace(-2, 1, rows)[:, None]
    update *= torch.logspace(1, -2, columns)
    variance = torch.zeros(3, rows, 1) if rows > columns else torch.zeros(3, 1, columns)
    axis = -1 if rows > columns else -2
    result = tg.normalize_variance(update, variance, torch.tensor(1.0))
    torch.testing.assert_close(variance, update.square().mean(axis, keepdim=True))
    torch.testing.assert_close(result.norm(dim=(1, 2)), update.norm(dim=(1, 2)))
    sizes = result.square().mean(axis).sqrt()
    torch.testing.assert_close(sizes, sizes[:, :1].expand_as(sizes))
    torch.testing.assert_close(result.sign(), update.sign())


def test_normalize_variance_averages_over_steps():
    first, second = torch.randn(2, 2, 8, 5, generator=torch.Generator().manual_seed(5)).unbind(0)
    variance = torch.zeros(2, 8, 1)
    tg.normalize_variance(first, variance, torch.tensor(0.1))
    tg.normalize_variance(second, variance, torch.tensor(0.1))
    expected = 0.9 * 0.1 * first.square().mean(-1, keepdim=True) + 0.1 * second.square().mean(-1, keepdim=True)
    torch.testing.assert_close(variance, expected)


@pytest.mark.parametrize("name,shape", [("blocks.0.attn.qkvo", (8, 32, 1)), ("blocks.0.mlp.up", (6, 128, 1))])
def test_variance_is_of_the_longer_axis(name, shape):
    _, optimizer = build(settings())
    assert tuple(bank_of(optimizer, name).state["variance"].shape) == shape
    _, optimizer = build(settings(muon_beta2=0.0))
    assert "variance" not in bank_of(optimizer, name).state


# --- parameter table


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_one_rule_and_a_gradient(variant):
    s = settings(**VARIANTS[variant])
    model, optimizer = build(s)
    rules = rules_of(model, s)
    assert rules.keys() == dict(model.named_parameters()).keys()
    assert all((rule.kind == "muon") == name.startswith("blocks.") for name, rule in rules.items())
    before = parameters(model)
    train(model, optimizer, range(1))
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())


@pytest.mark.parametrize("attention,value_embeds", [("---", 0), ("---", 1), ("-S-", 1)])
def test_attention_that_leaves_parameters_unused_is_refused_or_trains(attention, value_embeds):
    s = settings(attention=attention, value_embeds=value_embeds)
    if not tg.hyperparameter_errors(s, {}, CPU, 1):
        train(*build(s), range(1))


def test_parameter_without_rule_is_named():
    table = tg.parameter_table(settings())
    with pytest.raises(AssertionError, match=r"blocks\.0\.mlp\.sideways"):
        tg.match_rules(table, ["lm_head", "blocks.0.mlp.sideways"])
    with pytest.raises(AssertionError, match="lm_head2"):  # full matches only
        tg.match_rules(table, ["lm_head2"])


def test_parameter_with_two_rules_is_named():
    table = tg.parameter_table(settings())
    with pytest.raises(AssertionError, match="lm_head"):
        tg.match_rules([*table, table[2]._replace(pattern="lm_.*")], ["lm_head", "scalars"])


def test_optimizer_refuses_an_unknown_parameter():
    s = settings()
    model = tg.GPT(s, 100)
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="extra"):
        tg.MuonAdamW(model, s, tg.World())


# --- missing gradients


@pytest.mark.parametrize("name", ["lm_head", "blocks.1.mlp.down", "scalars"])
def test_missing_gradient_is_named(name):
    model, optimizer = build(settings())
    others = {n: torch.ones_like(p) for n, p in model.named_parameters() if n != name}
    sum((p * others[n]).sum() for n, p in model.named_parameters() if n in others).backward()
    with pytest.raises(RuntimeError, match=rf"no gradient for {name}:"):
        optimizer.step(1.0, 0.9)


def test_missing_gradient_through_the_model_is_named(monkeypatch):
    model, optimizer = build(settings())
    monkeypatch.setattr(model, "losses", lambda x, targets, copies: x.sum()[None])
    backward(model, optimizer, random_batch(0))
    with pytest.raises(RuntimeError, match="no gradient for lm_head:"):
        optimizer.step(1.0, 0.9)


def test_second_step_without_backward_is_refused():
    model, optimizer = build(settings())
    train(model, optimizer, range(1))
    with pytest.raises(RuntimeError, match="no gradient for "):
        optimizer.step(1.0, 0.9)


# --- accumulation


@pytest.mark.parametrize("micro_steps", [2, 3, 6])
def test_micro_steps_equal_one_batch(micro_steps):
    s = settings()
    (whole, one), (parts, many) = build(s), build(s)
    losses = train(whole, one, range(3)), train(parts, many, range(3), micro_steps)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert max(difference(parameters(whole), parameters(parts)).values()) < 3e-5
    a, b = one.state_dict()["state"], many.state_dict()["state"]
    assert max(v for key in a for v in difference(a[key], b[key]).values()) < 3e-4


def test_gradients_are_freed():
    model, optimizer = build(settings())
    first, second = random_batch(0).chunk(2, dim=1)
    optimizer.last_micro_step = False
    next_token_loss(model, first).backward()
    assert optimizer.sums.keys() == dict(model.named_parameters()).keys()
    assert all(p.grad is None for p in model.parameters())
    optimizer.last_micro_step = True
    next_token_loss(model, second).backward()
    assert not optimizer.sums and not any(bank.arrived for bank in optimizer.banks)
    assert all(p.grad is None for p in model.parameters())
    optimizer.step(1.0, 0.9)
    assert all(p.grad is None for p in model.parameters())


def test_bf16_gradients_are_summed_in_fp32():
    model, optimizer = build(settings(dtype="bf16"))
    assert {p.dtype for name, p in model.named_parameters() if name != "scalars"} == {torch.bfloat16}
    assert model.scalars.dtype == torch.float32
    parts = [{n: (torch.randn(p.shape) * 0.01**i).to(p.dtype) for n, p in model.named_parameters()} for i in range(3)]
    for i, gradients in enumerate(parts):
        optimizer.last_micro_step = i == 2
        sum((p * gradients[n]).float().sum() for n, p in model.named_parameters()).backward()
        assert all(total.dtype == torch.float32 for total in optimizer.sums.values())
        assert len(optimizer.sums) == (0 if i == 2 else len(gradients))
    name = "lm_head"
    expected = parts[0][name].float() + parts[1][name].float() + parts[2][name].float()
    torch.testing.assert_close(bank_of(optimizer, name).grad.view_as(expected), expected, rtol=0, atol=0)
    assert not torch.equal(expected, expected.bfloat16().float())  # bf16 sums would have lost something


def test_masters_keep_what_bf16_weights_cannot_hold():
    s = settings(dtype="bf16", adam_lr=1e-5, muon_lr=1e-5)
    model, optimizer = build(s)
    start = {name: w.clone() for name, w in optimizer.state_dict()["state"]["master"].items()}
    train(model, optimizer, range(3))
    masters = optimizer.state_dict()["state"]["master"]
    for name, p in model.named_parameters():
        assert masters[name].dtype == torch.float32 and not torch.equal(masters[name], start[name])
        assert torch.equal(p.float(), masters[name].to(p.dtype).float())


# --- state


def test_reset_clears_moments_and_keeps_weights():
    model, optimizer = build(settings())
    train(model, optimizer, range(2))
    weights = parameters(model)
    optimizer.reset()
    state = optimizer.state_dict()
    assert state["steps"] == 0
    moments = [tensor for key, group in state["state"].items() if key != "master" for tensor in group.values()]
    assert moments and not any(tensor.any() for tensor in moments)
    assert all(torch.equal(state["state"]["master"][name], p) for name, p in weights.items())


def test_rate_of_zero_changes_no_weight():
    """What warm_up relies on."""
    model, optimizer = build(settings(adam_weight_decay=0.1))
    weights = parameters(model)
    backward(model, optimizer, random_batch(0))
    optimizer.step(0.0, 0.9)
    assert all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_state_dict_is_a_copy():
    model, optimizer = build(settings())
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    before = {key: {n: t.clone() for n, t in group.items()} for key, group in saved["state"].items()}
    train(model, optimizer, range(1, 2))
    assert all(torch.equal(t, before[key][n]) for key, group in saved["state"].items() for n, t in group.items())


# --- torch.compile

needs_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")),
                                    reason="torch.compile on a CPU needs g++ or clang++")


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit, error_on_recompile=False):
        yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@needs_compiler
@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled_equals_eager_and_the_schedule_does_not_recompile(unit, dynamo):
    s = settings(compile=True, compile_unit=unit, num_layers=2, value_embeds=1)
    (eager, plain), (model, optimizer) = build(settings(num_layers=2, value_embeds=1)), build(s)
    tg.compile_model(model, s)
    for step, (window, scale, momentum) in enumerate([(8, 1.0, 0.85), (4, 0.5, 0.9), (12, 0.25, 0.95)]):
        batch = random_batch(step)
        expected, loss = (next_token_loss(m, batch, window) / batch[0].numel() for m in (eager, model))
        expected.backward()
        loss.backward()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for bank, other in zip(optimizer.banks, plain.banks, strict=True):
            torch.testing.assert_close(bank.grad, other.grad, rtol=1e-3, atol=1e-6)
        plain.step(scale, momentum)
        optimizer.step(scale, momentum)
        if step == 0:
            graphs = dynamo["stats"]["unique_graphs"]
            torch._dynamo.config.error_on_recompile = True
    assert dynamo["stats"]["unique_graphs"] == graphs >= (1 if unit == "model" else 4) + 6  # 6 shapes of banks
    assert not dynamo["graph_break"]
    assert max(difference(parameters(eager), parameters(model)).values()) < 1e-4


@pytest.mark.parametrize("unit", ["model", "block"])
def test_deep_models_stay_below_the_recompile_limit(unit, dynamo, monkeypatch):
    """12 layers, 2 stages of other shapes, and evaluation: traced only, since torch counts graphs per function and not
    per block, and refuses the ones past its limit."""
    compile_traced = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_traced(f, backend="eager", **options))
    s = settings(compile=True, compile_unit=unit, num_layers=12, value_embeds=3, stage_ends=(0.5, 1.0),
                 seq_len=(SEQ_LEN, 2 * SEQ_LEN), eval_seq_len=3 * SEQ_LEN)
    model, optimizer = build(s)
    tg.compile_model(model, s)
    for factor in (1, 2):
        backward(model, optimizer, random_batch(0, ROWS // factor, factor * SEQ_LEN))
        optimizer.step(1.0, 0.9)
    with torch.no_grad():
        assert torch.isfinite(next_token_loss(model, random_batch(0, 4, 3 * SEQ_LEN)))
    assert dynamo["stats"]["unique_graphs"] > 8
