"""The routers of train_moe.py and what keeps them balanced: formulas against slow references and Monte Carlo, noise,
bias, capacity, reports."""
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import make_data
from moe import ROUTERS, all_penalties, settings, sum_size

import train_moe as tm
from train_moe import Balance, Router, World

E, ROWS, T = 8, 3, 24


def router(kind: str = "softmax_topk", **changes) -> Router:
    given = dict(num_experts=E, choices=2, norm=True, scale=1.0, capacity=0.0)
    return Router(kind, **given | changes)


def random_inputs(seed: int = 0, dim: int = 16, std: float = 0.5) -> tuple:
    """x, weights of router and noise, bias, noise."""
    random = torch.Generator().manual_seed(seed)
    shapes = (ROWS, T, dim), (2 * E, dim), (E,), (ROWS, T, E)
    x, weight, bias, noise = (torch.randn(shape, generator=random) for shape in shapes)
    return x, std * weight, 0.3 * bias, noise


def routed(kind: str, seed: int = 0, noisy: bool = True, **changes) -> tuple[tm.Routing, Router, tuple]:
    """A routing of random tokens, with what the router got."""
    x, weight, bias, noise = random_inputs(seed)
    noisy = noisy and kind == "noisy_topk"
    given = x, weight if kind == "noisy_topk" else weight[:E], bias, noise if noisy else None
    r = router(kind, **changes)
    return r(*given), r, given


def peaked(choices: int, even: bool, kind: str, height: float = 50.0) -> torch.Tensor:
    """Sums per token where token n is sure of the experts n, n + 1 .. (even), or all of 0, 1 .. (collapsed)."""
    start = torch.arange(E) if even else torch.zeros(E, dtype=torch.long)
    x = torch.zeros(E, E).scatter_(1, (start[:, None] + torch.arange(choices)) % E, height)[None]
    weight = torch.cat([torch.eye(E), torch.zeros(E, E)]) if kind == "noisy_topk" else torch.eye(E)
    noise = torch.zeros(1, E, E) if kind == "noisy_topk" else None
    return router(kind, choices=choices)(x, weight, torch.zeros(E), noise).sums_S[None] / E


def balance(world: World = World(), **changes) -> Balance:  # noqa: B008
    s = settings(num_experts=E, **changes)
    return Balance(SimpleNamespace(router_bias=torch.zeros(2, E)), s, world)


# --- choices and gates


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("choices", [1, 2, 5, E])
@pytest.mark.parametrize("norm", [True, False])
def test_choices_and_gates_equal_a_slow_reference(kind, choices, norm):
    """Normed gates sum to route_scale; that of a single choice is its score, or its router would learn nothing."""
    routing, _, (x, weight, bias, noise) = routed(kind, choices=choices, norm=norm, scale=2.5)
    for n, token in enumerate(x.flatten(0, 1)):
        logits = weight[:E] @ token
        if kind == "noisy_topk":
            std = (1 + (weight[E:] @ token).exp()).log() + 0.01  # softplus, and its floor
            logits = logits + noise.flatten(0, 1)[n] * std
        scores = logits.sigmoid() if kind == "sigmoid_bias" else logits.exp() / logits.exp().sum()
        keys = scores + bias if kind == "sigmoid_bias" else scores
        chosen = sorted(range(E), key=lambda e: -keys[e])[:choices]
        gates = scores[chosen] / (scores[chosen].sum() if norm and choices > 1 else 1)
        assert routing.experts_NK[n].tolist() == chosen
        assert torch.allclose(routing.gates_NK[n], 2.5 * gates, atol=1e-5)
    if norm and choices > 1:
        assert torch.allclose(routing.gates_NK.sum(1), torch.tensor(2.5), atol=1e-5)
    assert routing.gates_NK.dtype == torch.float32


def product(x, weight, grad, fast: bool) -> list[torch.Tensor]:
    """Logits, and the gradients of x and weight."""
    y = tm.RouterProduct.apply(x, weight) if fast else x.float() @ weight.T
    return [y.detach(), *torch.autograd.grad(y, (x, weight), grad)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_fast_product_of_a_router_is_that_in_fp32(device, monkeypatch):
    """From bf16 activations; on a CPU with fp32 products in place of tensor cores'. The logits are nearer than a
    rounded weight's by far, the gradients by bf16's rounding."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    multiply = torch.mm
    if device == "cpu":
        monkeypatch.setattr(torch, "mm", lambda a, b, out_dtype: multiply(a.to(out_dtype), b.to(out_dtype)))
    torch.manual_seed(0)
    x = torch.randn(400, 64, device=device).bfloat16().requires_grad_()
    weight, grad = torch.randn(2 * E, 64, device=device, requires_grad=True), torch.randn(400, 2 * E, device=device)
    fast, exact = (product(x, weight, grad, choice) for choice in (True, False))
    errors = [((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in zip(fast, exact, strict=True)]
    assert [a.dtype for a in fast] == [a.dtype for a in exact] == [torch.float32, torch.bfloat16, torch.float32]
    assert errors[0] < 1e-5 and max(errors[1:]) < 6e-3
    rounded = (x.float() @ weight.bfloat16().float().T).detach()
    assert errors[0] < 0.01 * (rounded - exact[0]).norm() / exact[0].norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ROUTERS)
def test_routing_on_a_gpu_in_bf16_is_that_of_fp32_products(kind):
    """Where a choice is not decided by the last bits."""
    x, weight, bias, noise = (t.cuda() for t in random_inputs(dim=256, std=0.1))
    weight = weight if kind == "noisy_topk" else weight[:E]
    rest = weight, bias, noise if kind == "noisy_topk" else None
    found, expected = (router(kind)(given, *rest) for given in (x.bfloat16(), x.bfloat16().float()))
    same = (found.experts_NK == expected.experts_NK).all(1)
    assert same.float().mean() > 0.95
    torch.testing.assert_close(found.gates_NK[same], expected.gates_NK[same], atol=1e-4, rtol=1e-4)


def test_bias_moves_choices_but_no_gates():
    x, weight, bias, _ = random_inputs()
    plain, biased = (router("sigmoid_bias", norm=False)(x, weight[:E], b, None) for b in (0 * bias, bias))
    assert not torch.equal(plain.experts_NK, biased.experts_NK)
    scores = (x.flatten(0, 1) @ weight[:E].T).sigmoid()
    for routing in (plain, biased):
        assert torch.allclose(routing.gates_NK, scores.gather(1, routing.experts_NK), atol=1e-6)
    for kind in ("softmax_topk", "noisy_topk"):  # elsewhere it is not read
        own = weight if kind == "noisy_topk" else weight[:E]
        first, second = (router(kind)(x, own, b, None) for b in (0 * bias, bias))
        assert torch.equal(first.experts_NK, second.experts_NK) and torch.equal(first.gates_NK, second.gates_NK)


def test_without_noise_the_choice_is_the_clean_logits():
    """Evaluation: twice the same, whatever the weights of the noise's size."""
    x, weight, bias, noise = random_inputs()
    clean, louder = (router("noisy_topk")(x, w, bias, None) for w in (weight, torch.cat([weight[:E], 9 * weight[E:]])))
    assert torch.equal(clean.experts_NK, louder.experts_NK) and torch.equal(clean.gates_NK, louder.gates_NK)
    assert torch.equal(clean.experts_NK, (x.flatten(0, 1) @ weight[:E].T).topk(2).indices)
    noisy = router("noisy_topk")(x, weight, bias, noise)
    assert not torch.equal(clean.experts_NK, noisy.experts_NK)


# --- noise


def test_noise_of_a_row_does_not_depend_on_ranks_or_micro_steps():
    """Rows of a step in the loader's order: micro-step after micro-step, and in each rank after rank."""
    def batch(size: int, micro_steps: int, step: int = 3, **changes) -> torch.Tensor:
        rows, parts = 8 // size // micro_steps, []
        ranks = [balance(World(rank, rank, size), **changes) for rank in range(size)]
        for micro_step in range(micro_steps):
            parts += [rank.noise(step, micro_step, rows, T) for rank in ranks]
        return torch.cat(parts)

    whole = batch(1, 1)
    assert whole.shape == (8, 2, T, E) and abs(whole.mean()) < 0.05 and abs(whole.std() - 1) < 0.05
    assert len({row.sum().item() for row in whole.flatten(0, 1)}) == 16  # rows and layers differ
    for size, micro_steps in [(1, 4), (2, 1), (2, 2), (4, 2), (8, 1)]:
        assert torch.equal(batch(size, micro_steps), whole), (size, micro_steps)
    assert not torch.equal(batch(1, 1, step=4), whole) and not torch.equal(batch(1, 1, seed=1), whole)
    assert torch.equal(batch(1, 1), whole)
    for kind in ("softmax_topk", "sigmoid_bias"):
        assert balance(router=kind).noise(0, 0, 4, T) is None


def test_noise_of_a_row_stays_with_its_tokens(tmp_path):
    """Tokens of the loader and noise together, on 1 and 2 ranks, in 1 and 2 micro-steps."""
    corpus = tm.open_corpus(str(make_data(tmp_path / "data")))

    def pairs(size: int, micro_tokens: int) -> set:
        found = set()
        for rank in range(size):
            world, s = World(rank, rank, size), settings(micro_tokens=micro_tokens, data=str(corpus.folder))
            loader, b = tm.Loader(s, corpus, world), balance(world)
            for i, (inputs, _, _) in enumerate(loader.next(0)[0]):
                noise = b.noise(0, i, *inputs.shape)
                found |= {(tuple(row.tolist()), own.sum().item()) for row, own in zip(inputs, noise, strict=True)}
            loader.close()
        return found

    whole = pairs(1, 128)
    assert len(whole) == 4 and all(pairs(*split) == whole for split in [(1, 64), (2, 64), (2, 32), (4, 32)])


# --- penalties


def test_chance_of_choice_is_monte_carlos():
    """Each expert's noise drawn again 400,000 times, the others' kept: the standard error is below 0.0008, and the
    largest of 48 differences may be four of them."""
    random, tokens, draws, choices = torch.Generator().manual_seed(0), 6, 400_000, 2
    clean, noise, size = (torch.randn(tokens, E, generator=random) for _ in range(3))
    std = torch.nn.functional.softplus(size) + 0.01
    noisy = clean + std * noise
    chance = tm.chance_of_choice(clean, std, noisy, noisy.topk(choices + 1).values, choices)
    for e in range(E):
        again = clean[:, e, None] + std[:, e, None] * torch.randn(tokens, draws, generator=random)
        others = torch.cat([noisy[:, :e], noisy[:, e + 1:]], dim=1).topk(choices).values[:, -1:]
        assert (chance[:, e] - (again > others).float().mean(1)).abs().max() < 0.0032
    assert chance.std() > 0.1
    assert torch.equal(tm.chance_of_choice(clean, std, noisy, noisy.topk(E).values, E), torch.ones(tokens, E))


@pytest.mark.parametrize("choices", [1, 2])
def test_penalties_are_1_when_even_and_e_over_k_when_collapsed(choices):
    for kind, names in (("noisy_topk", ("importance", "load")), ("softmax_topk", ("switch",))):
        for even, expected in ((True, 1.0), (False, E / choices)):
            found = all_penalties(peaked(choices, even, kind), E)
            for name in names:
                assert found[name].item() == pytest.approx(expected, rel=1e-4), (kind, name)


def test_penalties_equal_their_formulas():
    """From the tokens themselves: 1 + CV^2, E sum f P, mean lse^2."""
    routing, _, (x, weight, _, _) = routed("noisy_topk")
    found = all_penalties(routing.sums_S[None] / (ROWS * T), E)
    gates = torch.zeros(ROWS * T, E).scatter_(1, routing.experts_NK, routing.gates_NK).sum(0)
    assert found["importance"].item() == pytest.approx(1 + (gates.std(correction=0) / gates.mean()).item()**2, rel=1e-5)
    load = tm.named_sums(routing.sums_S, E)["load"]
    assert found["load"].item() == pytest.approx(1 + (load.std(correction=0) / load.mean()).item()**2, rel=1e-5)
    logits = x.flatten(0, 1) @ weight[:E].T
    assert found["z"].item() == pytest.approx(logits.exp().sum(1).log().square().mean().item(), rel=1e-5)
    routing, *_ = routed("softmax_topk")
    share = routing.experts_NK.flatten().bincount(minlength=E) / (ROWS * T * 2)
    expected = E * (share * logits.softmax(1).mean(0)).sum().item()
    assert all_penalties(routing.sums_S[None] / (ROWS * T), E)["switch"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind, weights", [("noisy_topk", {"importance": 0.3, "load": 0.2, "z": 0.1}),
                                           ("softmax_topk", {"switch": 0.3, "z": 0.1}),
                                           ("sigmoid_bias", {"sequence": 0.3, "z": 0.1})])
def test_slopes_are_the_weighted_penalties_gradient(kind, weights):
    """By finite differences, in fp64; `chosen` has none."""
    routing, *_ = routed(kind)
    sums = (routing.sums_S[None] / (ROWS * T)).double()
    slopes, _ = tm.balance_update(sums, torch.zeros(1, E, dtype=torch.float64), torch.tensor(0.0), weights, E)

    def total(values: torch.Tensor) -> float:
        found = all_penalties(values, E)
        return sum(weight * found[name].sum().item() for name, weight in weights.items())

    step = 1e-6
    for i in range(E, sums.size(1)):
        up, down = sums.clone(), sums.clone()
        up[0, i] += step
        down[0, i] -= step
        assert slopes[0, i].item() == pytest.approx((total(up) - total(down)) / (2 * step), abs=1e-7)
    assert not slopes[:, :E].any() and slopes[:, E:].any()


@pytest.mark.parametrize("kind", ["noisy_topk", "softmax_topk"])
def test_descending_the_penalties_balances_a_router(kind):
    """From a router that prefers two experts, by the losses of Balance alone; without them nothing moves."""
    def unevenness(**coefficients) -> list[float]:
        x, weight, bias, noise = random_inputs(std=0.2)
        x[..., 0] = 1.0
        weight[:2, 0] += 1.5
        weight, noise = (weight, noise) if kind == "noisy_topk" else (weight[:E], None)
        b, cvs = balance(router=kind, **coefficients), []
        for _ in range(100):
            weight.requires_grad_()
            sums = router(kind)(x, weight, bias, noise).sums_S
            loss = b.add(torch.cat([sums, sums]), 1 / (ROWS * T), last=True)
            weight = (weight - 0.3 * torch.autograd.grad(loss, weight)[0]).detach()
            cvs.append(E * (tm.named_sums(b.sums[0], E)["chosen"] / 2).std(correction=0).item())
            b.update(1)
        return cvs

    coefficients = dict(importance_coef=1.0, load_coef=1.0, aux_coef=1.0, z_coef=0.0)
    cvs, still = unevenness(**coefficients), unevenness(**dict.fromkeys(coefficients, 0.0))
    assert cvs[0] > 0.7 and cvs[-1] < 0.5 * cvs[0] and still[-1] == still[0] == cvs[0]


# --- sums


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("capacity", [0.0, 0.5])
def test_sums_equal_slow_references(kind, capacity):
    """Each of named_sums, token by token."""
    routing, _, (x, weight, bias, noise) = routed(kind, capacity=capacity, scale=3.0)
    found, tokens = tm.named_sums(routing.sums_S, E), ROWS * T
    assert routing.sums_S.shape == (sum_size(E),)
    logits = x.flatten(0, 1) @ weight[:E].T
    noisy, keys = logits, logits.softmax(1)
    if kind == "noisy_topk":
        noisy = logits + noise.flatten(0, 1) * (torch.nn.functional.softplus(x.flatten(0, 1) @ weight[E:].T) + 0.01)
        keys = noisy
    scores = logits.sigmoid() if kind == "sigmoid_bias" else noisy.softmax(1)
    keys = scores + bias if kind == "sigmoid_bias" else noisy
    share = scores / scores.sum(1, keepdim=True)
    expected = {"entropy": -(share * share.log()).sum(), "z": logits.exp().sum(1).log().square().sum(),
                "logit": logits.square().mean(1).sum(), "score": share.sum(0), "importance": torch.zeros(E),
                "load": torch.zeros(E), "sequence": torch.tensor(0.0)}
    ranked = keys.sort(1, descending=True)
    expected["margin"] = (ranked.values[:, 1] - ranked.values[:, 2]).sum()
    chosen, importance, dropped, places = [0] * E, torch.zeros(E), [0] * 8, {}
    for n, experts in enumerate(ranked.indices[:, :2].tolist()):
        for e in experts:
            chosen[e] += 1
            importance[e] += scores[n, e] / scores[n, experts].sum()
            if capacity and places.setdefault((n // T, e), 0) >= math.ceil(capacity * T * 2 / E):
                dropped[n % T * 8 // T] += 1
            places[n // T, e] = places.get((n // T, e), 0) + 1
    expected |= {"chosen": torch.tensor(chosen), "dropped": torch.tensor(dropped)}
    for row in range(ROWS):
        own = slice(row * T, row * T + T)
        part = ranked.indices[own, :2].flatten().bincount(minlength=E) / (2 * T)
        expected["sequence"] += T * E * (part * share[own].mean(0)).sum()
    if kind == "noisy_topk":  # summed gates, and chances, which have their own test
        std = torch.nn.functional.softplus(x.flatten(0, 1) @ weight[E:].T) + 0.01
        load = tm.chance_of_choice(logits, std, noisy, ranked.values[:, :3], 2)
        expected |= {"importance": importance, "load": load.sum(0)}
    assert expected.keys() == found.keys() and sum(chosen) == 2 * tokens and bool(sum(dropped)) == bool(capacity)
    for name, value in expected.items():
        assert torch.allclose(found[name], value.float().flatten(), rtol=1e-4, atol=1e-4), name


def test_no_sums_without_gradients():
    with torch.no_grad():
        assert all(routed(kind)[0].sums_S is None for kind in ROUTERS)


# --- capacity


@pytest.mark.parametrize("kind", ROUTERS)
def test_capacity_drops_what_a_slow_reference_drops(kind):
    """In the order of the row, for each row by itself; the gates of what is dropped are 0, the others stay."""
    free, *_ = routed(kind)
    routing, r, _ = routed(kind, capacity=0.75)
    limit, kept = math.ceil(0.75 * T * 2 / E), []
    for row in free.experts_NK.view(ROWS, T, 2).tolist():
        taken = [0] * E
        for experts in row:
            kept.append([taken[e] < limit for e in experts])
            for e in experts:
                taken[e] += 1
    kept = torch.tensor(kept)
    assert 0 < kept.float().mean() < 1 and torch.equal(
        routing.experts_NK, free.experts_NK.where(kept.view_as(free.experts_NK), E))
    assert torch.equal(routing.gates_NK, free.gates_NK * kept)
    dropped = tm.named_sums(routing.sums_S, E)["dropped"]
    by_token = (~kept).view(ROWS, T, 2).sum((0, 2))
    assert torch.equal(dropped, by_token.view(8, T // 8).sum(1).float()) and dropped[0] < dropped[-1]
    with torch.no_grad():
        assert routed(kind, capacity=0.75)[0].gates_NK.count_nonzero() == 2 * ROWS * T  # none in evaluation


def test_capacity_of_an_even_share_drops_nothing_of_an_even_row():
    """Token n is sure of the experts n and n + 1."""
    x = torch.eye(E).add(torch.eye(E).roll(1, 1)).repeat(ROWS, T // E, 1)
    sums = tm.named_sums(router(capacity=1.0)(x, torch.eye(E), torch.zeros(E), None).sums_S, E)
    assert not sums["dropped"].any() and (sums["chosen"] == ROWS * T * 2 / E).all()


# --- selection bias


def test_bias_moves_against_the_load_and_is_centred():
    chosen = torch.tensor([[0.9, 0.1, 0.25, 0.25, 0.1, 0.1, 0.1, 0.2], [0.25] * 8])  # the mean is 0.25
    sums = torch.nn.functional.pad(chosen, (0, sum_size(E) - E), value=0.1)
    before = torch.arange(2.0 * E).view(2, E) * 0.01
    before -= before.mean(1, keepdim=True)
    slopes, bias = tm.balance_update(sums, before, torch.tensor(0.02), {}, E)
    step = torch.tensor([-1.0, 1, 0, 0, 1, 1, 1, 1]) * 0.02
    assert torch.allclose(bias[0], before[0] + step - step.mean(), atol=1e-6)
    assert torch.allclose(bias[1], before[1], atol=1e-6) and bias.sum(1).abs().max() < 1e-6 and not slopes.any()


def test_bias_step_falls_to_zero_at_the_end():
    """10 steps, the rate falls over the last 4 of them."""
    b = balance(router="sigmoid_bias", iterations=10, bias_rate=0.1, bias_cooldown=0.4)
    uneven = torch.zeros(b.size)
    uneven[:, :E] = torch.tensor([1.0] * 4 + [0.0] * 4)
    spans = []
    for step in range(1, 11):
        before = b.bias.clone()
        b.add(uneven.flatten(), 1.0, last=True)
        b.update(step)
        spans.append((b.bias - before)[0, -1].item())
    assert spans == pytest.approx([0.1] * 6 + [0.075, 0.05, 0.025, 0.0], abs=1e-6)
    assert (b.bias[:, :4] < 0).all() and (b.bias[:, 4:] > 0).all()
    for kind in ("noisy_topk", "softmax_topk"):  # elsewhere there is none
        other = balance(router=kind)
        other.add(uneven.flatten() + 0.1, 1.0, last=True)
        other.update(1)
        assert not other.bias.any()


def test_bias_balances_a_router():
    """Tokens that prefer two experts; the bias alone evens out the choices."""
    x, weight, _, _ = random_inputs(std=0.2)
    x[..., 0] = 1.0
    weight[:2, 0] += 1.5
    b, cvs = balance(router="sigmoid_bias", iterations=1000, bias_rate=0.01), []
    for step in range(1, 151):
        sums = router("sigmoid_bias")(x, weight[:E], b.bias[0], None).sums_S
        b.add(torch.cat([sums, sums]), 1 / (ROWS * T), last=True)
        cvs.append(E * (tm.named_sums(b.sums[0], E)["chosen"] / 2).std(correction=0).item())
        b.update(step)
    assert cvs[0] > 0.7 and cvs[-1] < 0.3


# --- reports


def report_of(load: list[list[float]], **changes) -> tuple[dict, tuple[str, list[str]]]:
    """Report and lines for given shares of the choices."""
    s = settings(num_experts=E, num_layers=3, attention="LLL", moe_layers="MDM", **changes)
    sums = torch.full((2, sum_size(E)), 0.1)
    sums[:, :E] = torch.tensor(load) * s.top_k
    report = tm.router_report(sums, torch.linspace(-1, 1, 2 * E).view(2, E), s)
    line, *alarms = tm.router_lines(report, s)
    return report, (line, alarms)


EVEN = [1 / E] * E


def test_report_of_an_even_and_an_uneven_layer():
    uneven = [0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.046, 0.004]
    report, (line, alarms) = report_of([EVEN, uneven], capacity_factor=1.0)
    entropy = -sum(p * math.log(p) for p in uneven)
    cv = E * math.sqrt(sum((p - 1 / E)**2 for p in uneven) / E)
    expected = {"effective_experts": [8.0, math.exp(entropy)],
                "max_over_mean": [1.0, 2.4], "cv": [0.0, cv], "dropped": [0.4, 0.4], "score_entropy": [0.1, 0.1],
                "margin": [0.1, 0.1], "logit_rms": [0.1**0.5] * 2, "bias_min": [-1, 1 / 15], "bias_max": [-1 / 15, 1],
                "importance_loss": [1.0, 1.0], "load_loss": [1.0, 1.0], "switch_loss": [E * 0.1] * 2,
                "z_loss": [0.1, 0.1]}
    for name, values in expected.items():
        assert report[name] == pytest.approx(values, abs=1e-5), name
    assert report["dead"] == [[], [7]] and report["dropped_by_part"][0] == pytest.approx([0.4] * 8)
    assert report["load"][1] == pytest.approx(uneven)
    assert line == (f"routers: effective experts 8.0 {math.exp(entropy):.1f} of 8, max/mean 2.40, CV {cv:.2f}, dead 1, "
                    "dropped 40.0 %")
    assert alarms == ["ALARM: layer 2: dead experts 7: less than 1/20 of an even share of tokens"]


def test_alarms():
    """None when balanced; dead experts; a collapse, also of an only nearly dead rest."""
    assert report_of([EVEN, EVEN])[1][1] == []
    assert report_of([[0.3, 0.3, 0.1, 0.1, 0.1, 0.04, 0.03, 0.03], EVEN])[1][1] == []  # uneven, but alive
    _, (line, alarms) = report_of([EVEN, [0.5, 0.5] + [0.0] * 6])
    assert [alarm.split(":")[1] for alarm in alarms] == [" layer 2"] * 2 and "dropped" not in line and "dead 6" in line
    assert "experts 2, 3, 4, 5, 6, 7:" in alarms[0] and "collapse: 2.0 of 8 experts" in alarms[1]
    nearly = [0.47, 0.47] + [0.01] * 6  # 1/20 of an even share is 0.00625
    (alarm,) = report_of([nearly, EVEN])[1][1]
    assert alarm.startswith("ALARM: layer 0: collapse")
    assert report_of([nearly, EVEN], top_k=7)[1][1] == []  # 7 of 8 cannot collapse


@pytest.mark.parametrize("kind", ROUTERS)
def test_scores_that_underflow_leave_the_gradients_finite(kind):
    """The entropy of the scores has an infinite slope at 0: it is reported, and not differentiated."""
    x, weight, bias, noise = random_inputs()
    own = (1e4 * weight[:2 * E if kind == "noisy_topk" else E]).requires_grad_()
    routing = router(kind)(x, own, bias, noise if kind == "noisy_topk" else None)
    (routing.gates_NK.sum() + (tm.named_sums(routing.sums_S, E)["score"] * torch.arange(E)).sum()
     + 0 * routing.sums_S.sum()).backward()
    assert own.grad.isfinite().all() and routing.sums_S.isfinite().all()
