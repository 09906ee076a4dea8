"""Width transfer (--mup) of train_gpt.py: how a rule serves at another width, the rates that follow for each parameter,
the initial weights, the head's multiplier inside the softcap, Muon's updates. Expected values are written out from the
theory. That the declared roles are what grows in the models: test_mup_roles.py."""
from __future__ import annotations

import dataclasses
import math

import pytest
import test_kernels
import torch
import torch.nn.functional as F
from helpers import settings
from test_kernels import CAPS, NO_CAP, PLACES, Head, assert_near, error

import train_gpt
from train_gpt import GPT, IGNORE, MuonAdamW, Rule, World, cap_logits, parameter_table, trained_rules, transferred

interpreter, where = test_kernels.interpreter, test_kernels.where  # fixtures
VOCAB, BASE = 64, 32  # the vocabulary is padded to 128
HIDDEN = ("qkvo", "up", "down")
TABLES = ("embed.weight", "value_embeds.0.weight")


def scaled(width: int, **changes) -> train_gpt.Settings:
    """Settings with all kinds of parameters, at `width` from base width 32."""
    given = dict(mup=True, base_width=BASE, base_head_dim=16, muon_lr=0.02, adam_lr=0.002, adam_eps=1e-8,
                 hidden_lr=0.003, muon_weight_decay=0.02, hidden_weight_decay=0.1, adam_weight_decay=0.005)
    return settings(**given | {"width": width} | changes)


def standard(s: train_gpt.Settings) -> train_gpt.Settings:
    return dataclasses.replace(s, mup=False, base_width=0, base_head_dim=0, mup_embedding="constant")


def names_of(s: train_gpt.Settings, script=train_gpt) -> list[str]:
    with torch.device("meta"):
        return [name for name, _ in script.GPT(s, VOCAB).named_parameters()]


def short(name: str) -> str:
    """Without the layer: all layers are treated alike."""
    return name.split(".")[-1] if name.startswith("blocks") else name


def rates(model: GPT, s: train_gpt.Settings, script=train_gpt) -> dict[str, tuple[float, float, float | None]]:
    """Learning rate, weight decay and AdamW's epsilon of each parameter, as its bank of the optimizer has them."""
    found = {}
    for bank in script.MuonAdamW(model, s, script.World()).banks:
        for name in bank.params:
            (lr,) = {bank.lr.flatten()[i].item() for i, (piece, _) in enumerate(bank.pieces) if piece == name}
            found[name] = lr, bank.rule.weight_decay, None if bank.muon else bank.rule.eps
    return found


# --- one rule at another width

ROLES = {  # (role, kind): sizes that grow; powers of m of learning rate, weight decay and epsilon
    ("hidden", "muon"): ("out in", 0, 0, None), ("hidden", "adamw"): ("out in", -1, 1, -1),
    ("hidden, out fixed", "muon"): ("in", -0.5, 0.5, None), ("hidden, out fixed", "adamw"): ("in", -1, 1, 0),
    ("hidden, in fixed", "muon"): ("out", 0.5, -0.5, None), ("hidden, in fixed", "adamw"): ("out", 0, 0, -1),
    ("input", "adamw"): ("out", 0, 0, -1), ("table", "adamw"): ("out", 0, 0, -1), ("output", "adamw"): ("in", 0, 0, -1),
    ("fixed", "adamw"): ("", 0, 0, 0),
}


def rule(role: str, kind: str, grows: str, m: int) -> Rule:
    """A rule of the base width 32, at m times of it."""
    fans = (3 * 32 * m if "out" in grows.split() else 7, 32 * m if "in" in grows.split() else 5)
    return Rule("name", kind, 0.03, (0.9, 0.95), 0.1, "sharded", role.split(",")[0], fans, eps=1e-8)


@pytest.mark.parametrize("m", [0.5, 2, 4])
@pytest.mark.parametrize("role, kind", ROLES, ids=str)
def test_a_rule_serves_at_another_width(role, kind, m):
    """Muon: sqrt(fan_out / fan_in) of the growths. AdamW: rate by the fan-in, epsilon by the fan-out, and rate * decay
    stays in both. Output and what does not grow: only epsilon, or nothing."""
    grows, *powers = ROLES[role, kind]
    base = rule(role, kind, grows, 1)
    for embedding in ("constant", "sqrt"):
        if (role, embedding) == ("table", "sqrt"):
            powers[:2] = -0.5, 0.5
        found = transferred(rule(role, kind, grows, m)._replace(lr=9.0, weight_decay=9.0, eps=9.0), base, embedding)
        for name, power in zip(("lr", "weight_decay", "eps"), powers, strict=True):
            if power is not None:  # Muon reads no epsilon
                assert getattr(found, name) == pytest.approx(getattr(base, name) * m**power, rel=1e-12), name
        assert found.lr * found.weight_decay == pytest.approx(base.lr * base.weight_decay, rel=1e-12)
        same = {name: getattr(base, name) for name in ("pattern", "kind", "betas", "comm", "role")}
        assert same == {name: getattr(found, name) for name in same}


@pytest.mark.parametrize("embedding", ["constant", "sqrt"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_at_the_base_width_all_rules_are_unchanged_to_the_bit(optimizer, embedding):
    s = scaled(BASE, hidden_optimizer=optimizer, mup_embedding=embedding)
    table, names = parameter_table(s), names_of(s)
    assert [transferred(row, row, embedding) for row in table] == table == parameter_table(standard(s))
    assert trained_rules(s, names) == train_gpt.match_rules(table, names)
    assert {row.role for row in table} == {"hidden", "input", "output", "fixed", "table"}


def test_the_rates_are_those_of_the_base_width_whatever_the_table_says_at_this_one():
    """Without --mup they are the table's."""
    s = scaled(64)
    names = names_of(s)
    assert trained_rules(standard(s), names) == train_gpt.match_rules(parameter_table(standard(s)), names)
    found, base = trained_rules(s, names), train_gpt.match_rules(parameter_table(s.base), names)
    assert all(found[name].lr == base[name].lr for name in names)
    assert (s.base.width, s.base.head_dim, s.base.mup) == (BASE, 16, False)


@pytest.mark.parametrize("width, base", [(384, 128), (384, 384), (768, 384), (128, 384)])
def test_a_finite_dimension_that_equals_a_width_is_not_mistaken_for_one_that_grows(width, base):
    """A vocabulary and a table of hashed pairs with 384 rows, at width 384."""
    s = scaled(width, base_width=base, ngram_rows=384, value_embeds=0)
    with torch.device("meta"):
        model = GPT(s, 384)
    assert model.embed.weight.shape == (384, width) == model.ngrams.table.shape == model.lm_head.shape
    rules = trained_rules(s, [name for name, _ in model.named_parameters()])
    for name, lr in (("embed.weight", 0.15), ("ngrams.table", 0.14), ("lm_head", 0.002)):
        assert rules[name].lr == lr and rules[name].eps == pytest.approx(1e-8 * base / width), name
    assert model.cap == pytest.approx((23.0, 5.0 * width / base, 7.5 * width / base), rel=1e-15)


def test_without_mup_nothing_grows():
    s = standard(scaled(64))
    model = GPT(s, VOCAB)
    assert s.growth == 1 and s.base is s and model.cap == s.softcap
    assert trained_rules(s, names_of(s)) == train_gpt.match_rules(parameter_table(s), names_of(s))


# --- the factors


def theory(m: float, optimizer: str, tables: str) -> dict[str, dict[str, float]]:
    """What differs from 1 in lr, multiplier, decay and eps of each parameter; m: width / base width.

    Hidden matrices: Muon's update has spectral norm 1, and their aspect ratio stays. AdamW's entries of size 1 add up
    over a fan-in of m: rate / m, at the same rate * decay. Whatever has a gradient by the width (it shrinks with 1 / m)
    needs AdamW's epsilon to shrink with it. The head: product / m."""
    hidden = {} if optimizer == "muon" else dict(lr=1 / m, decay=m, eps=1 / m)
    table = dict(eps=1 / m) | (dict(lr=m**-0.5, decay=m**0.5) if tables == "sqrt" else {})
    return {**dict.fromkeys(HIDDEN, hidden), **dict.fromkeys(TABLES, table), "gates": dict(eps=1 / m), "smear": {},
            "scalars": {}, "lm_head": dict(multiplier=1 / m, eps=1 / m)}


BASE_RATES = {  # learning rate and weight decay at the base width
    "muon": {"qkvo": (0.02, 0.02), "up": (0.04, 0.02), "down": (0.04, 0.02)},
    "adamw": {"qkvo": (0.003, 0.1), "up": (0.003, 0.1), "down": (0.003, 0.1)},
    "all": {**dict.fromkeys(TABLES, (0.15, 0.005)), "lm_head": (0.002, 0.005), "gates": (0.002, 0.0),
            "smear": (0.002, 0.0), "scalars": (0.01, 0.0)},
}


@pytest.mark.parametrize("tables", ["constant", "sqrt"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("m", [1, 2, 4])
def test_factors_and_rates_are_those_of_the_theory(m, optimizer, tables):
    s = scaled(int(m * BASE), hidden_optimizer=optimizer, mup_embedding=tables)
    model = GPT(s, VOCAB)
    expected, base_rates = theory(m, optimizer, tables), BASE_RATES[optimizer] | BASE_RATES["all"]
    found = rates(model, s)
    assert {short(name) for name in found} == expected.keys() == base_rates.keys()
    assert 1 / s.growth == expected["lm_head"]["multiplier"]
    for name, (lr, decay, eps) in found.items():
        wanted = dict(lr=1, decay=1, eps=1) | expected[short(name)]
        first, decayed = base_rates[short(name)]
        assert lr == pytest.approx(first * wanted["lr"]) and decay == pytest.approx(decayed * wanted["decay"]), name
        assert eps is None or eps == pytest.approx(1e-8 * wanted["eps"]), name
        assert lr * decay == pytest.approx(first * decayed), name  # what a step takes from a weight


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_step_of_adamw_has_the_scaled_rate_and_epsilon(optimizer):
    """The first one, with an epsilon as large as the gradients: rate * g / (|g| + epsilon)."""
    s = scaled(64, hidden_optimizer=optimizer, adam_eps=1.0, adam_weight_decay=0.0, hidden_weight_decay=0.0)
    model, expected = GPT(s, VOCAB), theory(2, optimizer, "constant")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradients = {name: torch.randn(p.shape) for name, p in model.named_parameters()}
    banks = MuonAdamW(model, s, World())
    sum((p * gradients[name]).sum() for name, p in model.named_parameters()).backward()
    banks.step(1.0, 0.9)
    for name, p in model.named_parameters():
        factors, g = expected[short(name)], gradients[name]
        if name.startswith("blocks") and optimizer == "muon":
            continue
        lr = (BASE_RATES["adamw"] | BASE_RATES["all"])[short(name)][0] * factors.get("lr", 1)
        update = g / (g.abs() + factors.get("eps", 1))
        torch.testing.assert_close(p.detach(), before[name] - lr * update, rtol=1e-5, atol=1e-5 * lr)


def test_factors_of_epsilon_below_the_base_width():
    """The inverse of those above it."""
    s = scaled(BASE // 2)
    found = {short(name): eps for name, (_, _, eps) in rates(GPT(s, VOCAB), s).items() if eps not in (None, 1e-8)}
    assert found == dict.fromkeys((*TABLES, "gates", "lm_head"), 2e-8)


@pytest.mark.parametrize("softcap", [(23.0, 5.0, 7.5), (30.0, 0.0, 7.5), (0.0, 0.0, 1.0)], ids=str)
def test_the_heads_multiplier_is_in_the_cap(softcap):
    for m in (1, 2, 4):
        a, b, c = softcap
        assert GPT(scaled(m * BASE, softcap=softcap), VOCAB).cap == (a, b * m, c * m)


@pytest.mark.parametrize("width, head_dim", [(32, 16), (64, 16), (64, 32), (32, 8)])
def test_attention_scale_goes_with_one_over_head_dim(width, head_dim):
    """From the base's, which has the root, or is given."""
    for given, base in ((0.0, 1.36 / 4), (0.2, 0.2)):
        s = scaled(width, head_dim=head_dim, attn_scale=given)
        assert s.softmax_scale == base * (16 / head_dim) == GPT(s, VOCAB).blocks[0].attn.scale
    plain = dataclasses.replace(standard(s), attn_scale=0.0)
    assert standard(s).softmax_scale == 0.2 and plain.softmax_scale == 1.36 / head_dim**0.5


def test_gates_follow_the_number_of_heads_not_the_width():
    """Heads that grow in size while their number stays: a gate's gradient is that of as large a share of the stream."""
    same, twice = (trained_rules(scaled(64, head_dim=size), ["gates"])["gates"] for size in (32, 16))
    assert same.eps == 1e-8 and twice.eps == 5e-9


# --- initial weights

STDS = {"embed.weight": 1.0, "value_embeds.0.weight": 1.0}  # of tables, at every width; of hidden matrices below


@pytest.mark.parametrize("m", [1, 2, 4])
def test_std_of_the_initial_weights(m):
    """Tables keep theirs, hidden matrices have 0.5 / sqrt(fan_in), the rest starts at zero."""
    model = GPT(scaled(m * BASE), VOCAB)
    expected = STDS | dict.fromkeys(("qkvo", "up"), 0.5 / math.sqrt(m * BASE))
    for name, p in model.named_parameters():
        if name == "scalars":
            continue
        wanted, weights = expected.get(short(name), 0.0), p.detach()[p.detach() != 0]
        assert len(weights) == {0.0: 0}.get(wanted, 0.75 * p.numel() if "qkvo" in name else p.numel()), name
        assert not len(weights) or weights.std().item() == pytest.approx(wanted, rel=0.05), name


def test_at_the_base_and_at_any_width_initial_weights_are_those_without_mup():
    """The same seed, the same bits: all of their initial sizes go with the right power of the width by themselves."""
    for width in (32, 64, 96):
        model, other = GPT(scaled(width), VOCAB), GPT(standard(scaled(width)), VOCAB)
        for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
            assert torch.equal(p, q), name


# --- what --mup changes, and what not

CHANGED = {  # lr, weight decay, eps: names whose rate is not the standard one at m = 2
    ("muon", "constant"): (set(), set(), {*TABLES, "lm_head", "gates"}),
    ("muon", "sqrt"): ({*TABLES}, {*TABLES}, {*TABLES, "lm_head", "gates"}),
    ("adamw", "constant"): ({*HIDDEN}, {*HIDDEN}, {*TABLES, *HIDDEN, "lm_head", "gates"}),
}


@pytest.mark.parametrize("optimizer, tables", CHANGED, ids=str)
def test_exactly_the_expected_rates_differ_from_the_standard_parametrization(optimizer, tables):
    s = scaled(64, hidden_optimizer=optimizer, mup_embedding=tables)
    model, plain = GPT(s, VOCAB), GPT(standard(s), VOCAB)
    found, expected = rates(model, s), rates(plain, standard(s))
    differing = tuple({short(name) for name in found if found[name][i] != expected[name][i]} for i in range(3))
    assert differing == CHANGED[optimizer, tables]
    assert model.cap == (23.0, 10.0, 15.0) and plain.cap == (23.0, 5.0, 7.5)
    assert [block.attn.scale for block in model.blocks] == [block.attn.scale for block in plain.blocks]


# --- the head's multiplier inside the cap


def folded(cap: tuple, m: float) -> tuple:
    """The cap of a model that is m times as wide as its base."""
    with torch.device("meta"):
        return GPT(scaled(int(m * BASE), softcap=cap), VOCAB).cap


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 0.5])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_the_cap_of_a_product_is_the_cap_of_the_multiplied_product(cap, m, dtype):
    z = (torch.randn(400, dtype=dtype) * 20).requires_grad_()
    incoming = torch.randn(400, dtype=dtype)
    found = cap_logits(z, folded(cap, m))
    expected = z / m if cap == NO_CAP else cap[0] / (1 + torch.exp(-(z / m + cap[1]) / cap[2]))
    assert m != 1 or folded(cap, 1) == cap
    tolerance = dict(rtol=2e-5, atol=1e-6) if dtype == torch.float32 else dict(rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(*(torch.autograd.grad(y, z, incoming)[0] for y in (found, expected)), **tolerance)


def explicit(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap, m: float) -> torch.Tensor:
    """Summed cross-entropies of cap(logits / m) in fp64, (K,)."""
    z = (x.double() @ weight.double().T) / m
    z = z if cap == NO_CAP else cap[0] / (1 + torch.exp(-(z + cap[1]) / cap[2]))
    return torch.stack([F.cross_entropy(z, t.long(), reduction="sum", ignore_index=IGNORE) for t in targets])


INCOMING = (1.0, 0.5, 0.25)


def compare_head(place: test_kernels.Where, cap, m: float, kernel: bool, fused: bool):
    """head_losses with the folded multiplier, or its fused operator, against the explicit form."""
    x, weight, targets = place.random(75, 40), place.random(300, 40, std=0.3 * m), place.targets(3, 75, 300)
    wide, incoming = folded(cap, m), torch.tensor(INCOMING, device=place.device)
    if fused:
        quantized = x.detach(), weight.detach()
        found = train_gpt.fused_head(x, weight, *quantized, targets, None, list(wide), kernel)[0].sum(1)
    else:
        found = train_gpt.head_losses(x, weight, targets, wide, kernel, fp8=False)[0]
    expected = explicit(x, weight, targets, cap, m)
    gradients, wanted = (torch.autograd.grad(y, (x, weight), incoming.type_as(y)) for y in (found, expected))
    for a, b in zip((found.detach(), *gradients), (expected.detach(), *wanted), strict=True):
        assert_near(a, b, 3 * place.tolerance)


@pytest.mark.parametrize("m", [2, 3, 8])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_losses_and_gradients_of_the_plain_head(cap, m, monkeypatch):
    """In one piece, and by the operator in chunks of 32 rows."""
    torch.manual_seed(0)
    monkeypatch.setattr(train_gpt, "LOSS_CHUNK", 32)
    for fused in (False, True):
        compare_head(PLACES["cpu-fp32"], cap, m, kernel=False, fused=fused)


@pytest.mark.parametrize("m", [2, 8])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_losses_and_gradients_of_the_head_by_the_kernels(where, cap, m):
    torch.manual_seed(0)
    compare_head(where, cap, m, kernel=True, fused=False)


def fp8_head(m: int) -> Head:
    """A head whose product with the same inputs is m times as large; the weights are numbers that e4m3 has."""
    torch.manual_seed(0)
    x = train_gpt.norm(torch.randn(64, 64))
    weight = train_gpt.to_fp8(0.02 * torch.randn(304, 64), 2.0**-8).float() * 2.0**-8
    return Head(x.requires_grad_(), (m * weight).requires_grad_(), PLACES["cpu-fp32"].targets(3, 64, 304))


@pytest.mark.parametrize("kernel", [False, True])
@pytest.mark.parametrize("cap", CAPS, ids=str)
def test_fp8_gradients_are_those_of_the_base_to_the_bit(cap, kernel, monkeypatch, request):
    """m = 8 and products 8 times as large: the same FP8 numbers, in units an eighth as large. None is out of range, and
    none becomes zero."""
    if kernel:
        test_kernels.prepare("cpu", request)
    original, seen, results = train_gpt.logit_gradient, [], {}

    def spy(*arguments):
        found, exact = original(*arguments), original(*arguments[:7], torch.float64, False)[0]
        seen.append((found[0], exact, arguments[5]))
        return found

    monkeypatch.setattr(train_gpt, "logit_gradient", spy)
    for m in (1, 8):
        head = fp8_head(m)
        results[m], clipped = head.results(folded(cap, m), kernel, fp8=True)
        expected = explicit(head.x, head.weight, head.targets, cap, m)
        wanted = torch.autograd.grad(expected, (head.x, head.weight), expected.new_tensor(INCOMING))
        assert clipped == 0 and error(results[m][0], expected.detach()) < 0.01
        assert all(0.005 < error(a, b) < 0.08 for a, b in zip(results[m][1:], wanted, strict=True))
    (base, _, unit), (wide, exact, unit_wide) = seen
    assert wide.dtype == torch.float8_e5m2 and unit / unit_wide == 8
    assert torch.equal(base.float(), wide.float()) or kernel and (base.float() != wide.float()).float().mean() < 1e-3
    assert 57344 / 64 < exact.abs().max() <= 57344 * (1 + 1e-6)
    assert (wide.float()[torch.arange(64) != 3] != 0).all()  # row 3 has no target
    for (a, b), factor in zip(zip(results[1], results[8], strict=True), (1, 1, 8), strict=True):
        assert error(b * factor, a) < (1e-3 if kernel else 1e-6)


# --- Muon's update


def effects(s: train_gpt.Settings, script=train_gpt) -> dict[str, float]:
    """Of one step with random gradients on each hidden matrix: root mean square of its change's singular values, as a
    change of outputs of size 1 by inputs of size 1, which has the factor sqrt(fan_in / fan_out)."""
    model = script.GPT(s, VOCAB)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, random = script.MuonAdamW(model, s, script.World()), torch.Generator().manual_seed(0)
    sum((p * torch.randn(p.shape, generator=random)).sum() for p in model.parameters()).backward()
    if script is not train_gpt:
        optimizer.balance.sums += 1  # all experts have seen tokens
    optimizer.step(1.0, 0.9)
    found, fans = {}, script.match_rules(script.parameter_table(s), list(before))
    for bank in (bank for bank in optimizer.banks if bank.muon):
        for name, p in bank.params.items():
            fan_out, fan_in = fans[name].fans
            change = (p.detach() - before[name]).flatten(0, -3) if p.dim() > 2 else (p.detach() - before[name])[None]
            sizes = change.square().sum((-1, -2)).div(min(p.shape[-2:])).sqrt() * math.sqrt(fan_in / fan_out)
            assert sizes.max() / sizes.min() < 1.1  # of the matrices of a bank
            found[short(name)] = sizes.mean().item()
    return found


@pytest.mark.parametrize("orthogonalizer", ["polar_express", "newton_schulz"])
def test_muons_update_has_the_same_effect_at_all_widths(orthogonalizer):
    found = {width: effects(scaled(width, orthogonalizer=orthogonalizer, muon_weight_decay=0.0))
             for width in (32, 64, 128)}
    assert found[32].keys() == {*HIDDEN}
    for width in (64, 128):
        assert found[width] == pytest.approx(found[32], rel=0.1)
