"""train_moe.py's optimizer on one rank: experts as a batch of matrices, idle ones, routers, and their balance."""
from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from moe import ROUTERS, all_penalties, sum_size
from moe_ranks import EXPERTS, MIXTURES, backward, build, feed, random_gradients, settings, train
from ranks import ROWS, SEQ_LEN, parameters, random_batch

import train_moe as tm

UP, DOWN = "blocks.0.mlp.experts_up", "blocks.2.mlp.experts_down"
LAYERS = [0, 2]  # of the mixtures


def bank_of(optimizer: tm.MuonAdamW, name: str) -> tm.Bank:
    return next(bank for bank in optimizer.banks if name in bank.params)


def expert_matrices(tensors: dict[str, torch.Tensor]) -> dict[tuple[int, int, str], torch.Tensor]:
    """(mixture, expert, up or down) -> one matrix of a dictionary by parameter names."""
    return {(m, e, kind): tensors[f"blocks.{layer}.mlp.experts_{kind}"][e]
            for m, layer in enumerate(LAYERS) for e in range(EXPERTS) for kind in ("up", "down")}


# --- a batch of matrices


def test_each_expert_is_orthogonalized_by_itself():
    """Gradients that differ by 1e6 in size: each matrix moves as it would alone, by singular values near 1."""
    s = settings(muon_beta2=0.0, muon_weight_decay=0.0)
    model, optimizer = build(s)
    before, gradients = parameters(model), random_gradients(model, 0)
    sizes = 10.0 ** torch.linspace(-3, 3, EXPERTS).view(-1, 1, 1)
    for name in gradients:
        gradients[name] *= sizes if ".experts_" in name else 1
    feed(model, optimizer, gradients)
    optimizer.step(1.0, 0.0)
    moved = {name: (before[name] - p.detach()) for name, p in model.named_parameters()}
    rate, found = s.muon_lr * math.sqrt(s.hidden / s.width), expert_matrices(moved)
    assert len(found) == 2 * MIXTURES * EXPERTS
    for key, gradient in expert_matrices(gradients).items():
        alone = tm.orthogonalize(gradient[None], s.orthogonalizer, torch.float32)[0]
        torch.testing.assert_close(found[key] / rate, alone, rtol=0, atol=1e-3)
        values = torch.linalg.svdvals(found[key] / rate)
        assert 0.85 < values.min() and values.max() < 1.15


def test_learning_rate_factor_is_that_of_one_expert():
    """sqrt(rows / columns) of an expert's matrix, at least 1, whatever the number of experts, times expert_lr; shared
    ones are an MLP as wide as all of them together."""
    for changes, expert, shared in (({}, 2, 1), ({"num_experts": 64}, 2, 1), ({"expert_hidden": 128}, 4, 1),
                                    ({"expert_hidden": 16, "num_shared": 1}, 1, 1),
                                    ({"expert_hidden": 16, "num_shared": 4, "expert_lr": 0.5}, 0.25, 2)):
        s = settings(muon_lr=0.01, **changes)
        _, optimizer = build(s)
        rates = {name: bank.lr[i].item() for bank in optimizer.banks for i, (name, _) in enumerate(bank.pieces)}
        assert rates[UP] == rates[DOWN] == pytest.approx(0.01 * math.sqrt(expert))
        assert rates["blocks.1.mlp.up"] == pytest.approx(0.02) and rates["blocks.0.attn.qkvo"] == pytest.approx(0.01)
        if s.num_shared:
            assert rates["blocks.0.mlp.shared.up"] == pytest.approx(0.01 * math.sqrt(shared))


def test_state_of_the_experts_has_the_leading_dimension():
    model, optimizer = build(settings())
    train(model, optimizer, range(1))
    state = optimizer.state_dict()["state"]
    for kind, shape, rows in (("up", (5, 32, 64), (5, 1, 64)), ("down", (5, 64, 32), (5, 64, 1))):
        for layer in LAYERS:
            name = f"blocks.{layer}.mlp.experts_{kind}"
            assert state["master"][name].shape == state["momentum"][name].shape == shape
            assert state["variance"][name].shape == rows  # of the longer axis of each
            assert len(state["variance"][name].flatten(1).mean(1).unique()) == EXPERTS


@pytest.mark.parametrize("hidden", [64, 32])  # 32: experts and the matrices of attention have one shape, and one bank
@pytest.mark.parametrize("size", [1, 2, 3, 4, 16])
def test_pieces_are_layers_times_experts_shared_by_the_ranks(size, hidden):
    """Every matrix has one owner, also where their number does not divide or is below that of the ranks."""
    s, held = settings(expert_hidden=hidden), []
    for rank in range(size):
        model, optimizer = build(s, tm.World(rank, rank, size))
        banks = {id(bank): bank for bank in (bank_of(optimizer, UP), bank_of(optimizer, DOWN))}
        for bank in banks.values():
            assert len(bank.state["master"]) == len(bank.experts) < len(bank.pieces) / size + bank.share
            for mine, number, lr, weights in zip(bank.mine, bank.experts.flatten(), bank.lr.flatten(),
                                                bank.state["master"], strict=True):
                name, i = bank.pieces[mine] if mine < len(bank.pieces) else ("", 0)
                expert = ".experts_" in name
                if name:
                    held.append((name, i))
                    assert torch.equal(weights, bank.cut(bank.params[name].detach())[i])
                owner = LAYERS.index(int(name[7])) * EXPERTS + i if expert else MIXTURES * EXPERTS
                assert number == (owner if name else 0)  # what pads a bank never moves
                assert lr == pytest.approx(s.muon_lr * (math.sqrt(hidden / 32) if expert else 1) if name else 0.0)
    experts = {(f"blocks.{layer}.mlp.experts_{kind}", e) for layer in LAYERS for kind in ("up", "down")
               for e in range(EXPERTS)}
    others = {(f"blocks.{i}.attn.qkvo", k) for i in LAYERS for k in range(4)} if hidden == 32 else set()
    assert sorted(held) == sorted(experts | others)


# --- idle experts


@pytest.mark.parametrize("changes", [{}, {"expert_hidden": 32}, {"dtype": "bf16"}, {"muon_beta2": 0.0},
                                     {"hidden_optimizer": "adamw"}], ids=str)
def test_experts_without_a_token_are_left_alone(changes):
    """Weights, momentum and variance to the bit, in spite of momentum and a gradient; everything else moves."""
    s = settings(muon_weight_decay=0.5, hidden_weight_decay=0.5, **changes)
    model, optimizer = build(s)
    feed(model, optimizer, random_gradients(model, 0))
    optimizer.step(1.0, 0.9)
    before, weights = optimizer.state_dict()["state"], parameters(model)
    chosen, idle = torch.full((MIXTURES, EXPERTS), 0.01), {(0, 0), (0, 3), (1, 4)}
    for m, e in idle:
        chosen[m, e] = 0
    feed(model, optimizer, random_gradients(model, 1), chosen)
    optimizer.step(1.0, 0.9)
    after = optimizer.state_dict()["state"]
    muon = ["momentum"] + ["variance"] * bool(s.muon_beta2)
    for key in ["master", *(muon if s.hidden_optimizer == "muon" else ["exp_avg", "exp_avg_sq"])]:
        old, new = expert_matrices(before[key]), expert_matrices(after[key])
        assert {place[:2] for place in old if torch.equal(old[place], new[place])} == idle
        assert {place[:2] for place in old if not torch.equal(old[place], new[place])}.isdisjoint(idle)
        assert all(not torch.equal(before[key][name][i], new) for name in before[key] if ".experts_" not in name
                   for i, new in enumerate(after[key][name]) if before[key][name].dim() > 2)
    old, new = expert_matrices(weights), expert_matrices(parameters(model))
    assert {place[:2] for place in old if torch.equal(old[place], new[place])} == idle
    assert all(not torch.equal(weights[n], p) for n, p in model.named_parameters())


def test_idle_by_the_routers_choice():
    """An expert that a bias keeps from being chosen keeps its state over a step, and moves when it is chosen again."""
    model, optimizer = build(settings(router="sigmoid_bias", bias_rate=0.0))
    train(model, optimizer, range(2))
    moved = []
    for bias in (-10.0, 0.0):
        model.router_bias[0] = torch.tensor([0, 0, 0, bias, 0])
        before = expert_matrices(optimizer.state_dict()["state"]["momentum"])
        backward(model, optimizer, random_batch(2), micro_steps=2)
        chosen = tm.named_sums(optimizer.balance.sums, EXPERTS)["chosen"]
        assert (chosen[0, 3] == 0) == (bias < 0) and chosen.sum(-1).tolist() == pytest.approx([2.0, 2.0])
        optimizer.step(1.0, 0.9)
        after = expert_matrices(optimizer.state_dict()["state"]["momentum"])
        moved.append({place[:2] for place in before if not torch.equal(before[place], after[place])})
    every = {(m, e) for m in range(MIXTURES) for e in range(EXPERTS)}
    assert moved == [every - {(0, 3)}, every]


@pytest.mark.parametrize("beta2", [0.95, 0.0])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e-9, 1e-20, 1e-38, 0.0])
def test_a_vanishing_gradient_moves_an_expert_by_no_more_than_any_other(size, beta2):
    s = settings(muon_beta2=beta2, muon_weight_decay=0.0)
    model, optimizer = build(s)
    gradients = {name: g * size for name, g in random_gradients(model, 0).items()}
    before = parameters(model)
    feed(model, optimizer, gradients)
    optimizer.step(1.0, 0.9)
    limit = 1.1 * s.muon_lr * math.sqrt(s.hidden / s.width) * math.sqrt(s.width)  # of orthogonal rows or columns
    old, new = expert_matrices(before), expert_matrices(parameters(model))
    sizes = torch.stack([(new[place] - old[place]).norm() for place in old])
    assert sizes.max() < limit and (size < 1e-6 or sizes.min() > 0.8 * limit) and (size > 0 or not sizes.any())


# --- routers


def test_router_is_fp32_adamw_with_its_own_rate_and_no_decay():
    s = settings(dtype="bf16", router_lr=0.25, adam_lr=0.001, adam_weight_decay=9.0, muon_weight_decay=9.0)
    model, optimizer = build(s)
    assert model.routers.dtype == torch.float32 and model.blocks[0].mlp.experts_up.dtype == torch.bfloat16
    assert bank_of(optimizer, "routers").grad.dtype == torch.float32
    before, gradients = parameters(model)["routers"], random_gradients(model, 0)
    feed(model, optimizer, gradients)
    optimizer.step(0.5, 0.9)
    torch.testing.assert_close(before - model.routers.detach(), 0.125 * gradients["routers"].sign(), rtol=1e-3, atol=0)
    assert torch.equal(optimizer.state_dict()["state"]["master"]["routers"], model.routers.detach())
    assert optimizer.state_dict()["state"]["exp_avg"]["routers"].shape == (MIXTURES, 2 * EXPERTS, s.width)


def test_bias_is_a_buffer_that_no_bank_has():
    model, optimizer = build(settings(router="sigmoid_bias", dtype="bf16"))
    assert "router_bias" in dict(model.named_buffers()) and model.router_bias.dtype == torch.float32
    assert {name for bank in optimizer.banks for name in bank.params} == dict(model.named_parameters()).keys()
    assert "router_bias" not in dict(model.named_parameters())
    train(model, optimizer, range(1))
    assert optimizer.balance.bias is model.router_bias and model.router_bias.any()
    assert torch.equal(optimizer.state_dict()["balance"]["bias"], model.router_bias)


def test_bias_goes_against_the_load_centred_and_slower_at_the_end():
    s = settings(router="sigmoid_bias", iterations=8, bias_rate=0.1, bias_cooldown=0.5)
    model, optimizer = build(s)
    loads, steps = torch.tensor([[0.8, 0.5, 0.3, 0.2, 0.2], [0.4, 0.4, 0.4, 0.4, 0.4]]), []
    for step in range(1, 9):
        before = model.router_bias.clone()
        feed(model, optimizer, random_gradients(model, step), loads)
        optimizer.step(1.0, 0.9)
        steps.append((model.router_bias - before)[0, 2] - (model.router_bias - before)[0, 0])
        assert model.router_bias.sum(-1).abs().max() < 1e-6 and not model.router_bias[1].any()
    assert [x.item() for x in steps] == pytest.approx([0.2] * 4 + [0.15, 0.1, 0.05, 0.0], abs=1e-6)
    assert model.router_bias[0].argsort(stable=True).tolist() == [0, 1, 2, 3, 4]


# --- penalties and their slopes


def random_sums(seed: int = 0) -> torch.Tensor:
    """Sums per token as a router might have them."""
    random = torch.Generator().manual_seed(seed)
    sums = torch.rand(MIXTURES, sum_size(EXPERTS), generator=random) + 0.05
    chosen = tm.named_sums(sums, EXPERTS)["chosen"]
    chosen *= 2 / chosen.sum(-1, keepdim=True)
    return sums


def textbook(sums: torch.Tensor) -> dict[str, torch.Tensor]:
    """Penalties of each layer, written down from the papers, but for importance and load plus 1."""
    named = tm.named_sums(sums, EXPERTS)
    share = (named["chosen"] / named["chosen"].sum(-1, keepdim=True)).detach()
    cv = {name: named[name].var(-1, correction=0) / named[name].mean(-1).square() for name in ("importance", "load")}
    return {name: 1 + squared for name, squared in cv.items()} | {
        "switch": EXPERTS * (share * named["score"]).sum(-1), "z": named["z"][:, 0],
        "sequence": named["sequence"][:, 0]}


def test_penalties_are_those_of_the_papers():
    sums = random_sums()
    named, found = tm.named_sums(sums.double(), EXPERTS), all_penalties(sums, EXPERTS)
    for name in ("importance", "load"):
        values = named[name].numpy()
        np.testing.assert_allclose(found[name], 1 + (values.std(1) / values.mean(1)) ** 2, rtol=1e-5)
    share = (named["chosen"] / named["chosen"].sum(1, keepdim=True)).numpy()
    np.testing.assert_allclose(found["switch"], EXPERTS * (share * named["score"].numpy()).sum(1), rtol=1e-5)
    np.testing.assert_allclose(found["z"], named["z"][:, 0], rtol=1e-6)


def test_penalties_are_1_where_even_and_largest_where_collapsed():
    even = torch.full_like(random_sums(), 1 / EXPERTS)
    collapsed = even.clone()
    for name, value in (("chosen", 2.0), ("score", 1.0), ("importance", 1.0), ("load", 2.0)):
        part = tm.named_sums(collapsed, EXPERTS)[name]
        part.zero_()[:, :2] = value / 2
    for sums, value in ((even, 1.0), (collapsed, EXPERTS / 2)):
        penalties = all_penalties(sums, EXPERTS)
        for name in ("importance", "load", "switch"):
            assert penalties[name].tolist() == pytest.approx([value] * MIXTURES)


@pytest.mark.parametrize("norm", [True, False])
def test_penalties_of_a_batch_from_its_logits(norm):
    """Switch and z, and the importance of Shazeer et al., by numpy from router logits: 300 tokens, top-2 of 5."""
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 300, 8, generator=random), torch.randn(2 * EXPERTS, 8, generator=random)
    noise = torch.randn(1, 300, EXPERTS, generator=random)
    clean = (x[0] @ weight[:EXPERTS].T).double().numpy()
    spread = np.log1p(np.exp((x[0] @ weight[EXPERTS:].T).double().numpy())) + 0.01  # its floor
    for kind, z in (("softmax_topk", clean), ("noisy_topk", clean + noise[0].double().numpy() * spread)):
        noisy, (p, order) = kind == "noisy_topk", (np.exp(z), np.argsort(-z, axis=1)[:, :2])
        p /= p.sum(1, keepdims=True)
        router = tm.Router(kind, EXPERTS, 2, norm, 1.0, 0.0)
        sums = router(x, weight[:None if noisy else EXPERTS], torch.zeros(EXPERTS), noise if noisy else None).sums_S
        found = {name: value.item() for name, value in all_penalties(sums[None] / 300, EXPERTS).items()}
        gates = np.zeros_like(p)
        np.put_along_axis(gates, order, np.take_along_axis(p, order, 1), 1)
        gates /= gates.sum(1, keepdims=True) if norm else 1
        if noisy:
            assert found["importance"] == pytest.approx(1 + (gates.sum(0).std() / gates.sum(0).mean()) ** 2, rel=1e-4)
        share = np.bincount(order.ravel(), minlength=EXPERTS) / order.size
        assert found["switch"] == pytest.approx(EXPERTS * (share * p.mean(0)).sum(), rel=1e-4)
        assert found["z"] == pytest.approx((np.log(np.exp(clean).sum(1)) ** 2).mean(), rel=1e-4)


@pytest.mark.parametrize("coefficients", [
    {"importance": 0.3, "load": 0.7, "z": 0.1}, {"switch": 0.5, "z": 0.2}, {"sequence": 0.5, "z": 0.2}, {}])
def test_slopes_are_the_gradient_of_the_penalties(coefficients):
    sums = random_sums()
    exact = sums.clone().requires_grad_()
    values = textbook(exact)
    total = sum(weight * values[name].sum() for name, weight in coefficients.items()) + 0 * exact.sum()
    total.backward()
    slopes, _ = tm.balance_update(sums, torch.zeros(MIXTURES, EXPERTS), torch.tensor(0.1), coefficients, EXPERTS)
    torch.testing.assert_close(slopes, exact.grad, rtol=1e-4, atol=1e-6)
    assert bool(slopes.any()) == bool(coefficients)


def router_gradients(model: tm.GPT, optimizer: tm.MuonAdamW, penalty, step: int = 0) -> torch.Tensor:
    """Gradient of `penalty`, of the sums per token of a batch, by the router weights."""
    inputs, targets, docs = random_batch(step)
    noise = [x for x in (optimizer.balance.noise(optimizer.steps, 0, ROWS, SEQ_LEN),) if x is not None]
    values = model(inputs, targets[None], docs, torch.tensor(8, dtype=torch.int32), *noise)
    sums = values[1:].view(optimizer.balance.size) / inputs.numel()
    return torch.autograd.grad(penalty(sums), model.routers)[0]


COEFFICIENTS = {"noisy_topk": {"importance_coef": 0.5, "load_coef": 0.3, "aux_coef": 0.2, "z_coef": 0.1},
                "softmax_topk": {"aux_coef": 0.5, "z_coef": 0.1}}


@pytest.mark.parametrize("router", COEFFICIENTS)
def test_slopes_of_the_same_batch_have_the_gradient_of_the_exact_penalties(router):
    model, optimizer = build(settings(router=router, **COEFFICIENTS[router]))
    balance = optimizer.balance
    names = {"importance_coef": "importance", "load_coef": "load", "aux_coef": "switch", "z_coef": "z"}
    exact = router_gradients(model, optimizer, lambda sums: sum(
        weight * textbook(sums)[names[name]].sum() for name, weight in COEFFICIENTS[router].items()))
    backward(model, optimizer, random_batch(0))
    balance.update(0)
    found = router_gradients(model, optimizer, lambda sums: (balance.slopes * sums).sum())
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-5 * exact.abs().max().item())
    assert exact.abs().max() > 1e-4


@pytest.mark.parametrize("router", COEFFICIENTS)
def test_first_slopes_turn_no_router_but_for_z(router):
    model, optimizer = build(settings(router=router, **COEFFICIENTS[router]))
    first = router_gradients(model, optimizer, lambda sums: (optimizer.balance.slopes * sums).sum())
    z_only = router_gradients(model, optimizer, lambda sums: 0.1 * textbook(sums)["z"].sum())
    torch.testing.assert_close(first, z_only, rtol=0, atol=1e-5 * z_only.abs().max().item())
    train(model, optimizer, range(1))
    assert not torch.allclose(router_gradients(model, optimizer, lambda sums: (optimizer.balance.slopes * sums).sum()),
                              router_gradients(model, optimizer, lambda sums: 0.1 * textbook(sums)["z"].sum()),
                              rtol=0, atol=1e-3 * z_only.abs().max().item())


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_reported_is_the_cross_entropy_alone(router):
    """By hand from the logits; and the penalties do reach the gradients."""
    gradients = []
    for weight in (0.0, 50.0):
        names = "importance_coef", "load_coef", "aux_coef", "sequence_coef", "z_coef"
        coefficients = dict.fromkeys(names, weight)
        model, optimizer = build(settings(router=router, **coefficients))
        inputs, targets, docs = random_batch(0)
        noise = optimizer.balance.noise(0, 0, ROWS, SEQ_LEN)
        hidden = model.trunk(inputs, docs, torch.tensor(8, dtype=torch.int32), None, noise)
        expected = F.cross_entropy(model.head(hidden).flatten(0, 1).float(), targets.flatten().long())
        assert backward(model, optimizer, random_batch(0)) == pytest.approx(expected.item(), rel=1e-5)
        gradients.append(bank_of(optimizer, "routers").grad.clone())
    assert not torch.allclose(*gradients, atol=1e-6)


# --- micro-steps


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("micro_steps", [2, 3, 6])
def test_micro_steps_give_the_sums_noise_and_gradients_of_one_batch(micro_steps, router, monkeypatch):
    draw, drawn, results = tm.Balance.noise, [], []
    monkeypatch.setattr(tm.Balance, "noise", lambda *args: (drawn.append(draw(*args)), drawn[-1])[1])
    for parts in (1, micro_steps):
        model, optimizer = build(settings(router=router, importance_coef=1.0, load_coef=1.0, aux_coef=1.0))
        train(model, optimizer, range(1))  # slopes that are not even
        drawn.clear()
        loss = backward(model, optimizer, random_batch(1), parts)
        gradients = {name: bank.grad.clone() for bank in optimizer.banks for name in list(bank.params)[:1]}
        results.append((loss, optimizer.balance.sums.clone(), gradients, list(drawn)))
    (one, sums, gradients, whole), (many, other_sums, other_gradients, pieces) = results
    assert (len(whole), len(pieces)) == (1, micro_steps)
    if router == "noisy_topk":
        assert torch.equal(whole[0], torch.cat(pieces)) and len(whole[0].unique()) == whole[0].numel()
    assert many == pytest.approx(one, rel=1e-5)
    torch.testing.assert_close(other_sums, sums, rtol=1e-5, atol=1e-6)
    for name, expected in gradients.items():
        torch.testing.assert_close(other_gradients[name], expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_noise_is_another_in_each_step_row_layer_and_run():
    def drawn(step: int, rank: int = 0, size: int = 1, **changes) -> torch.Tensor:
        _, optimizer = build(settings(**changes), tm.World(rank, rank, size))
        return optimizer.balance.noise(step, 0, 4, SEQ_LEN)
    noise = drawn(3)
    assert noise.shape == (4, MIXTURES, SEQ_LEN, EXPERTS) and abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
    assert torch.equal(noise, drawn(3)) and len(noise.unique()) == noise.numel()
    for other in (drawn(4), drawn(3, seed=1), drawn(3, 1, 2)):
        assert not (other == noise).any()
