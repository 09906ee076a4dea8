"""Width transfer (--mup) of train_moe.py: experts, shared experts and routers, also at a fixed --expert-hidden."""
from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import VOCAB
from moe import ROUTERS, random_batch, random_noise, settings, window
from test_mup import BASE, HIDDEN, effects, names_of, rates, standard
from test_mup import scaled as dense

import train_gpt
import train_moe as tm
from train_moe import GPT

EXPERTS = ("experts_up", "experts_down", "shared.up", "shared.down")
NAMES = (*EXPERTS, "qkvo", "mlp.up", "mlp.down", "routers")  # of the checks below; the rest is train_gpt.py's
# As many choices and shared experts as mlp_ratio: an expert is as wide as the model, two shared ones twice that.
MIXED = dict(num_experts=8, top_k=2, num_shared=2, moe_layers="MD", expert_lr=1.5, router_lr=0.005)
FIXED = 48  # hidden size of an expert with --expert-hidden: above the base width and below twice that


def scaled(width: int, **changes) -> tm.Settings:
    """Settings with a mixture and a dense layer, at `width` from base width 32."""
    rest = dict(mup=True, base_width=BASE, base_head_dim=16, muon_lr=0.02, hidden_lr=0.003, muon_weight_decay=0.02,
                hidden_weight_decay=0.1, adam_eps=1e-8)
    return settings(**MIXED | rest | {"width": width} | changes)


def tail(name: str) -> str:
    """The name without its layer, dense MLPs apart from shared experts."""
    return next((known for known in NAMES if name.endswith(known) and ("shared" in name) == ("shared" in known)), name)


def growths(s: tm.Settings) -> dict[str, tuple[float, float]]:
    """By how much the table's fan-out and fan-in of each parameter grow from the base width."""
    now, then = (tm.match_rules(tm.parameter_table(x), names_of(s, tm)) for x in (s, s.base))
    return {tail(name): tuple(a / b for a, b in zip(now[name].fans, then[name].fans, strict=True)) for name in now}


# --- what grows


@pytest.mark.parametrize("num_experts", [8, 64, 32])
def test_as_many_experts_as_the_width_or_the_base_width_do_not_grow(num_experts):
    s = scaled(64, num_experts=num_experts)
    found = growths(s)
    assert GPT(s, VOCAB).routers.shape == (1, 2 * num_experts, 64) and found["routers"] == (1, 2)
    assert [found[name] for name in EXPERTS] == [(2, 2)] * 4


def test_a_fixed_hidden_size_does_not_grow_even_if_it_is_the_width():
    for hidden in (FIXED, 32, 64):
        found = growths(scaled(64, expert_hidden=hidden))
        assert [found[name] for name in EXPERTS] == [(1, 2), (2, 1), (1, 2), (2, 1)]


@pytest.mark.parametrize("hidden", [0, FIXED])
def test_the_fans_are_those_of_the_matrices(hidden):
    """Outputs, inputs: an expert's up-projection is stored (inputs, outputs), a shared one's is not."""
    s = scaled(64, expert_hidden=hidden)
    rules = {tail(name): rule.fans for name, rule in tm.match_rules(tm.parameter_table(s), names_of(s, tm)).items()}
    shapes = {tail(name): tuple(p.shape[-2:]) for name, p in GPT(s, VOCAB).named_parameters()}
    assert rules["shared.up"] == shapes["shared.up"]
    assert [rules[name] for name in ("experts_up", "experts_down", "shared.down")] == [
        shapes[name][::-1] for name in ("experts_up", "experts_down", "shared.down")]


# --- the factors


def theory(m: float, optimizer: str, fixed: bool) -> dict[str, dict[str, float]]:
    """lr, decay and eps that differ from 1. Experts are hidden matrices, batched. With a hidden size that
    stays, an up-projection has more inputs than before for an output, a down-projection fewer: under Muon factors
    sqrt(fan_out / fan_in), under AdamW rate / growth of the fan-in. A router's product is divided by m elsewhere."""
    hidden = {} if optimizer == "muon" else dict(lr=1 / m, decay=m, eps=1 / m)
    up, down = hidden, hidden
    if fixed:
        up, down = (dict(lr=m**-0.5), dict(lr=m**0.5)) if optimizer == "muon" else (hidden, dict(eps=1 / m))
    return {"experts_up": up, "experts_down": down, "shared.up": up, "shared.down": down, "qkvo": hidden,
            "mlp.up": hidden, "mlp.down": hidden, "routers": dict(eps=1 / m)}


def base_rates(optimizer: str, fixed: bool) -> dict[str, float]:
    """Learning rates at the base width; Muon's with the factor sqrt(hidden / width), experts' times --expert-lr."""
    expert, shared = (FIXED, 2 * FIXED) if fixed else (BASE, 2 * BASE)
    if optimizer == "adamw":
        return dict.fromkeys(NAMES, 0.003) | {"experts_up": 0.0045, "experts_down": 0.0045, "routers": 0.005}
    experts, both = 0.03 * math.sqrt(expert / BASE), 0.02 * math.sqrt(shared / BASE)
    return dict(zip(EXPERTS, (experts, experts, both, both), strict=True)) | {
        "qkvo": 0.02, "mlp.up": 0.04, "mlp.down": 0.04, "routers": 0.005}


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_factors_and_rates_are_those_of_the_theory(m, optimizer, fixed, router):
    s = scaled(m * BASE, hidden_optimizer=optimizer, expert_hidden=FIXED * fixed, router=router)
    model = GPT(s, VOCAB)
    expected, first = theory(m, optimizer, fixed), base_rates(optimizer, fixed)
    found = {tail(name): rest for name, rest in rates(model, s, tm).items()}
    assert found.keys() >= expected.keys() == first.keys()
    for name, factors in expected.items():
        lr, decay, eps = found[name]
        assert lr == pytest.approx(first[name] * factors.get("lr", 1)), name
        if optimizer == "adamw":
            assert decay == pytest.approx((0.0 if name == "routers" else 0.1) * factors.get("decay", 1)), name
        if eps is not None and not (fixed and name.endswith("up")):  # see below
            assert eps == pytest.approx(1e-8 * factors.get("eps", 1)), name


def test_a_step_takes_the_same_share_of_the_weights_at_every_width():
    """rate * decay, also where Muon's rate changes: then the norm at which updates and decay balance, 1 / decay, goes
    with sqrt(fan_out / fan_in), as that of an update does."""
    for m in (2, 4):
        for name, (lr, decay, _) in rates(GPT(s := scaled(m * BASE, expert_hidden=FIXED), VOCAB), s, tm).items():
            if tail(name) in EXPERTS:
                assert lr * decay == pytest.approx(0.02 * base_rates("muon", True)[tail(name)]), name


def test_epsilon_follows_the_gradient_of_an_up_projection_to_a_fixed_size():
    """An expert's hidden unit, one of as many as before, reaches the whole of the stream: its gradient stays, and with
    it that of the matrix. (That of a hidden matrix shrinks with 1 / m, as each of its m times as many outputs.)"""
    s = scaled(64, expert_hidden=FIXED, hidden_optimizer="adamw")
    rules = tm.trained_rules(s, names_of(s, tm))
    assert {tail(name): rule.eps for name, rule in rules.items() if tail(name) in EXPERTS} == {
        "experts_up": 1e-8, "experts_down": 0.5e-8, "shared.up": 1e-8, "shared.down": 0.5e-8}


# --- initial weights


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("hidden", [0, FIXED, 24])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_std_of_the_initial_weights(m, hidden, router):
    """0.5 / sqrt(fan_in), whatever the hidden size. Routers keep theirs, 0 with noise."""
    model, plain = GPT(scaled(m * BASE, expert_hidden=hidden, router=router), VOCAB), 0.5 / math.sqrt(m * BASE)
    expected = dict.fromkeys(("experts_up", "shared.up", "qkvo", "mlp.up"), plain) | {
        "routers": 0.0 if router == "noisy_topk" else 0.01}
    for name, p in model.named_parameters():
        if tail(name) not in NAMES:
            continue
        wanted, weights = expected.get(tail(name), 0.0), p.detach()[p.detach() != 0]
        assert (len(weights) > 0) == (wanted > 0), name
        assert not len(weights) or weights.std().item() == pytest.approx(wanted, rel=0.12 if p.numel() < 999 else 0.05)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("fixed", [False, True])
def test_exactly_the_expected_rates_differ_from_the_standard_parametrization(fixed, router):
    s = scaled(64, expert_hidden=FIXED * fixed, router=router)
    model, plain = GPT(s, VOCAB), GPT(standard(s), VOCAB)
    pairs = zip(model.named_parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(p, q) for (_, p), q in pairs)
    found, expected = rates(model, s, tm), rates(plain, standard(s), tm)
    differing = [{tail(name) for name in found if found[name][i] != expected[name][i]} for i in (0, 2)]
    # standard rates have sqrt(max(1, hidden / width)) at each width: those of up-projections until that is 1
    assert differing[0] == (set(EXPERTS) - {"shared.up"} if fixed else set())
    assert differing[1] == {"embed.weight", "value_embeds.0.weight", "lm_head", "gates", "routers"}


# --- routers


@pytest.mark.parametrize("router", ROUTERS)
def test_a_routers_multiplier_divides_its_product(router):
    """Logits, noise and all that follows are those of a standard model whose routers are m times as small."""
    s = scaled(64, router=router)
    model, plain = GPT(s, VOCAB), GPT(standard(s), VOCAB)
    with torch.no_grad():
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.normal_(std=0.3)
            q.copy_(p)
        plain.routers.div_(2)
    batch, noise = random_batch(), random_noise(s)
    outputs = [m.trunk(batch[0], batch[2], window(), None, noise) for m in (model, plain)]
    torch.testing.assert_close(*outputs)
    pairs = zip(outputs, (model, plain), strict=True)
    gradients = [torch.autograd.grad(x.square().sum(), m.routers)[0] for x, m in pairs]
    torch.testing.assert_close(2 * gradients[0], gradients[1], rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        plain.routers.mul_(2)
    assert (plain.trunk(batch[0], batch[2], window(), None, noise) - outputs[0]).abs().max() > 0.01


def test_without_experts_factors_are_those_of_train_gpt():
    s = dense(64)
    mixed = tm.Settings(**dataclasses.asdict(s), num_experts=0, moe_layers="DD")
    mine = GPT(mixed, VOCAB)
    its = train_gpt.GPT(s, VOCAB)
    rules, theirs = (script.trained_rules(x, names_of(s)) for script, x in ((tm, mixed), (train_gpt, s)))
    assert {name: tuple(rule) for name, rule in rules.items()} == {name: tuple(rule) for name, rule in theirs.items()}
    assert mine.cap == its.cap != s.softcap


# --- Muon's update


@pytest.mark.parametrize("hidden", [0, FIXED, 200])
def test_muons_update_of_an_expert_has_the_same_effect_at_all_widths(hidden):
    """Hidden sizes that grow, that the width outgrows, and that are always larger."""
    found = {width: effects(scaled(width, expert_hidden=hidden, muon_weight_decay=0.0), tm) for width in (32, 64, 128)}
    assert found[32].keys() == {*HIDDEN, "experts_up", "experts_down"}
    for width in (64, 128):
        assert found[width] == pytest.approx(found[32], rel=0.12)


@pytest.mark.parametrize("hidden", [0, FIXED])
def test_a_bank_of_experts_is_updated_like_one_matrix_at_a_time(hidden):
    """By the rate of each: at width 64 with experts as wide as the model, one bank holds matrices of three rates."""
    s = scaled(64, expert_hidden=hidden, muon_beta2=0.0, muon_weight_decay=0.0)
    model = GPT(s, VOCAB)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    optimizer = tm.MuonAdamW(model, s, tm.World())
    sum((p * gradients[name]).sum() for name, p in model.named_parameters()).backward()
    optimizer.balance.sums += 1
    optimizer.step(1.0, 0.9)
    first, factors = base_rates("muon", bool(hidden)), theory(2, "muon", bool(hidden))
    for name, p in model.named_parameters():
        if tail(name) not in NAMES or tail(name) == "routers":
            continue
        whole = p.detach(), before[name], gradients[name]
        lr = first[tail(name)] * factors[tail(name)].get("lr", 1)
        for now, then, gradient in zip(*(x.reshape(-1, *p.shape[-2:]) for x in whole), strict=True):
            update = tm.orthogonalize(gradient[None], s.orthogonalizer, torch.float32)[0]
            torch.testing.assert_close(now, then - lr * update, rtol=1e-3, atol=1e-4 * lr)
