"""The experts of train_moe.py: each way to multiply against a reference token by token, whole models compiled and not,
and mixtures that must be the dense model of train_gpt.py."""
import shutil

import pytest
import torch
from helpers import VOCAB, losses
from moe import (
    PLAIN_IMPLS,
    ROUTERS,
    all_penalties,
    random_batch,
    random_model,
    random_noise,
    saved_state,
    settings,
    train,
    window,
)
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode

import train_gpt
import train_moe as tm

D, F = 24, 40
ROUTINGS = {  # tokens, experts, choices of a token, experts that are never chosen
    "random": (50, 8, 2, ()),
    "empty experts": (50, 8, 2, (0, 3, 7)),
    "all to one": (37, 6, 1, (0, 1, 2, 3, 5)),
    "all experts": (21, 4, 4, ()),
    "one expert": (30, 1, 1, ()),
    "one choice": (64, 8, 1, ()),
    "more experts than choices": (3, 16, 2, ()),
}


def choose(tokens: int, experts: int, choices: int, never: tuple = (), seed: int = 0) -> torch.Tensor:
    """Different random experts for each token, (N, K)."""
    keys = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    keys[:, list(never)] = -1.0
    return keys.topk(choices).indices


def weights(experts: int, tokens: int = 50, choices: int = 2, dtype=torch.float32) -> list[torch.Tensor]:
    """Random x, up, down and, in fp32, gates, that ask for gradients."""
    random = torch.Generator().manual_seed(1)
    shapes = (tokens, D), (experts, D, F), (experts, F, D)
    leaves = [torch.randn(shape, generator=random).div(shape[-2] ** 0.5 if len(shape) == 3 else 1).to(dtype)
              for shape in shapes]
    return [t.requires_grad_() for t in (*leaves, torch.rand(tokens, choices, generator=random) + 0.1)]


def token_by_token(x, up, down, gates, experts) -> torch.Tensor:
    """The reference: (N, D)."""
    rows = []
    for row, own, chosen in zip(x, gates, experts.tolist(), strict=True):
        each = [gate * ((row @ up[e]).relu().square() @ down[e]) for gate, e in zip(own, chosen, strict=True)]
        rows.append(sum(each))
    return torch.stack(rows)


def with_gradients(function, leaves: list[torch.Tensor], *arguments) -> dict[str, torch.Tensor]:
    """Output, and gradients of x, up, down and gates under random gradients of the output."""
    y = function(*leaves, *arguments)
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y.dtype)
    names = "y", "x", "up", "down", "gates"
    return dict(zip(names, (y.detach(), *torch.autograd.grad(y, leaves, grad)), strict=True))


def assert_near(found: dict, expected: dict, tolerance: float):
    """Differences relative to the largest entry."""
    for name, value in expected.items():
        scale = value.float().abs().max().clamp_min(1e-20)
        error = ((found[name].float() - value.float()).abs().max() / scale).item()
        assert found[name].shape == value.shape and error <= tolerance, f"{name}: {error}"


# --- products


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("impl", PLAIN_IMPLS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_experts_and_gradients_equal_the_reference(routing, impl, dtype, tolerance):
    """bf16: against the reference in fp32 on the same weights."""
    tokens, count, choices, never = ROUTINGS[routing]
    leaves, experts = weights(count, tokens, choices, dtype), choose(tokens, count, choices, never)
    expected = with_gradients(token_by_token, [t.detach().float().requires_grad_() for t in leaves], experts)
    found = with_gradients(tm.expert_mlp, leaves, experts, impl)
    assert all(value.dtype == (torch.float32 if name == "gates" else dtype) for name, value in found.items())
    assert_near(found, expected, tolerance)
    for e in never:
        assert not found["up"][e].any() and not found["down"][e].any()  # exactly zero, not garbage


@pytest.mark.parametrize("impl", PLAIN_IMPLS)
@pytest.mark.parametrize("lost", [0.3, 1.0])
def test_dropped_choices_add_nothing_and_loop_does_not_multiply_them(impl, lost, monkeypatch):
    """They are of expert E, with gates of 0; even if all of them are dropped."""
    leaves, experts, rows, mm = weights(8), choose(50, 8, 2), [], torch.mm
    dropped = torch.rand(50, 2, generator=torch.Generator().manual_seed(3)) < lost
    with torch.no_grad():
        leaves[3][dropped] = 0.0
    expected = with_gradients(token_by_token, leaves, experts)
    monkeypatch.setattr(torch, "mm", lambda a, b, **more: (rows.append(len(a)), mm(a, b, **more))[1])
    found = with_gradients(tm.expert_mlp, leaves, experts.masked_fill(dropped, 8), impl)
    expected["gates"][dropped] = 0.0
    assert_near(found, expected, 1e-5)
    counts = experts[~dropped].bincount(minlength=8)
    blocks = (-(-counts // tm.LOOP_ROWS) * tm.LOOP_ROWS).tolist()
    assert rows[:8] == (blocks if impl == "loop" else [])


COMPILED = [("grouped", torch.bfloat16)] + [(impl, dtype) for impl in ("bmm", "loop")
                                            for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize("impl, dtype", COMPILED, ids=[f"{i}-{str(d)[6:]}" for i, d in COMPILED])
def test_compiled_experts_are_one_graph_for_all_routings(impl, dtype):
    """The second and third routing, one with empty experts, compile nothing; all agree with eager."""
    torch._dynamo.reset()
    compiled = torch.compile(tm.expert_mlp, fullgraph=True, dynamic=False, backend="aot_eager")
    leaves, before = weights(8, dtype=dtype), counters["stats"]["unique_graphs"]
    for never, seed in [((), 0), ((), 1), ((0, 3, 4, 7), 2)]:
        experts = choose(50, 8, 2, never, seed)
        found = with_gradients(compiled, leaves, experts, impl)
        eager = with_gradients(tm.expert_mlp, leaves, experts, impl)
        assert_near(found, eager, 1e-6 if dtype is torch.float32 else 0.01)
    assert counters["stats"]["unique_graphs"] - before == 1


@pytest.mark.parametrize("impl", ["grouped", "bmm"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_nothing_is_read_from_the_device(kind, impl):
    """Routing, experts and gradients on tensors without values, of which nothing can be read."""
    router = tm.Router(kind, 8, 2, norm=True, scale=1.0, capacity=1.0)
    with FakeTensorMode():
        x = torch.empty(4, 8, D, dtype=torch.bfloat16, requires_grad=True)
        up, down = (torch.empty(8, *shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((D, F), (F, D)))
        weight = torch.empty(16 if kind == "noisy_topk" else 8, D, requires_grad=True)
        noise = torch.empty(4, 8, 8) if kind == "noisy_topk" else None
        experts, gates, sums = router(x, weight, torch.empty(8), noise)
        y = tm.expert_mlp(x.flatten(0, 1), up, down, gates, experts, impl)
        (y.sum() + sums.sum()).backward()
    assert y.shape == (32, D) and all(t.grad.shape == t.shape for t in (x, up, down, weight))


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on a CPU")
def test_experts_compiled_by_inductor_equal_eager():
    leaves, experts = weights(8, dtype=torch.bfloat16), choose(50, 8, 2, (1, 6))
    compiled = torch.compile(tm.expert_mlp, fullgraph=True, dynamic=False)
    assert_near(with_gradients(compiled, leaves, experts, "grouped"),
                with_gradients(tm.expert_mlp, leaves, experts, "grouped"), 0.02)


# --- sorted rows


@pytest.mark.parametrize("routing", ROUTINGS)
def test_rows_are_sorted_by_expert_and_padded_to_blocks_of_one(routing):
    tokens, count, choices, never = ROUTINGS[routing]
    experts = choose(tokens, count, choices, never)
    g = tm.group_rows(experts, count)
    flat = experts.flatten().tolist()
    assert g.order_R.tolist() == sorted(range(len(flat)), key=lambda i: (flat[i], i))
    assert g.ends_E.tolist() == [sum(e <= last for e in flat) for last in range(count)]
    assert g.ends_E.dtype == torch.int32  # what grouped_mm takes
    padded = tm.pad_groups(g, 16)
    owner = padded.owner_GE.argmax(1).repeat_interleave(len(padded.order_R) // len(padded.owner_GE))
    rows = padded.order_R.tolist()
    assert sorted(i for i in rows if i < len(flat)) == list(range(len(flat)))  # each choice once, the rest is padding
    for grouping in (g, padded):
        assert torch.equal(grouping.order_R[grouping.inverse_R], torch.arange(len(flat)))
    assert all(flat[i] == e for i, e in zip(rows, owner.tolist(), strict=True) if i < len(flat))
    uneven = tm.pad_groups(tm.group_rows(torch.zeros_like(experts), count), 16)  # the worst case takes no more
    assert [t.shape for t in padded] == [t.shape for t in uneven]


@pytest.mark.parametrize("padded", [False, True], ids=["sorted", "padded"])
def test_gradients_of_spread_and_combine(padded):
    g = tm.group_rows(choose(7, 4, 2), 4)
    g = tm.pad_groups(g, 16) if padded else g
    real = (g.order_R < 14)[:, None]  # padding takes any row, and gives no gradient
    gates = torch.rand(14, dtype=torch.float64, requires_grad=True)
    x, y = (torch.randn(rows, 3, dtype=torch.float64, requires_grad=True) for rows in (7, len(g.order_R)))
    assert padded == (not real.all())
    assert torch.autograd.gradcheck(lambda x: tm.Spread.apply(x, g.order_R, g.inverse_R, 2) * real, x)
    assert torch.autograd.gradcheck(lambda y: tm.Combine.apply(y * real, g.order_R, g.inverse_R, 2), y)
    assert torch.autograd.gradcheck(lambda *both: tm.GatedReLU2.apply(*both, g.order_R, g.inverse_R), (y, gates))
    assert not tm.GatedReLU2.apply(y, gates, g.order_R, g.inverse_R)[~real[:, 0]].any()


@pytest.mark.parametrize("impl", ["bmm", "loop"])  # grouped_mm has no fp64
def test_gradients_of_the_product(impl):
    g = tm.group_rows(choose(7, 4, 2, never=(2,)), 4)
    g = tm.pad_groups(g, 16) if impl == "bmm" else g
    x = torch.randn(len(g.order_R), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: tm.expert_product(x, w, g, impl), (x, weight))


# --- whole models


@pytest.mark.parametrize("router", ROUTERS)
def test_output_is_the_gated_sum_of_the_chosen_and_the_shared_experts(router):
    """A mixture's output, token by token; dropped choices add nothing, gates are not squared with the ReLU."""
    s = settings(router=router, num_shared=2, route_scale=1.5, capacity_factor=0.75)
    model, noise = random_model(s), random_noise(s)
    mixture, x = model.blocks[0].mlp, torch.randn(4, 32, s.width, generator=torch.Generator().manual_seed(5))
    given = model.routers[0], model.router_bias[0], None if noise is None else noise[:, 0]
    routing, tokens = mixture.router(x, *given), x.flatten(0, 1)
    both = routing.gates_NK, routing.experts_NK % s.num_experts  # dropped: any, its gate is 0
    mixed = token_by_token(tokens, mixture.experts_up, mixture.experts_down, *both)
    shared = (tokens @ mixture.shared.up.T).relu().square() @ mixture.shared.down
    y, sums = mixture(x, given)
    assert_near({"y": y.flatten(0, 1)}, {"y": mixed + shared}, 1e-5)
    assert torch.equal(sums, routing.sums_S) and not both[0].all() and len(both[0].unique()) > 10


def step_of(model, s, batch, noise) -> dict[str, torch.Tensor]:
    """Values of a forward pass, and all gradients, with the penalties' among them."""
    inputs, targets, docs = batch
    values = model(inputs, targets[None], docs, window(), noise)
    sums = values[1:].view(len(s.mixtures), -1) / inputs.numel()
    penalties = sum(value.sum() for value in all_penalties(sums, s.num_experts).values())
    model.zero_grad()
    (values[0] / inputs.numel() + 0.1 * penalties).backward()
    return {"values": values.detach()} | {name: p.grad for name, p in model.named_parameters()}


def in_bf16(model):
    for name, p in model.named_parameters():
        if name not in tm.FP32_PARAMETERS:
            p.data = p.data.bfloat16()
    return model


@pytest.mark.parametrize("impl, router, more", [
    ("grouped", "noisy_topk", {}), ("bmm", "softmax_topk", dict(top_k=1)),
    ("loop", "sigmoid_bias", dict(num_shared=1, capacity_factor=1.0, moe_layers="DM"))])
def test_compiled_model_is_one_graph_and_equals_eager_in_bf16(impl, router, more):
    s = settings(moe_impl=impl, router=router, dtype="bf16", **more)
    model, batch, noise = in_bf16(random_model(s)), random_batch(), random_noise(s)
    expected = step_of(model, s, batch, noise)
    backend = "aot_eager" if impl == "grouped" else "eager"  # one graph or not is decided before
    model.forward = torch.compile(model.forward, fullgraph=True, dynamic=False, backend=backend)
    found = step_of(model, s, batch, noise)
    assert expected["routers"].abs().max() > 0
    assert_near(found, expected, 0.02)


@pytest.mark.parametrize("router", ROUTERS)
def test_impls_agree_in_a_whole_model(router):
    results = []
    for impl in PLAIN_IMPLS:
        s = settings(moe_impl=impl, router=router, num_shared=1, num_experts=8, top_k=4)
        results.append(step_of(random_model(s), s, random_batch(), random_noise(s)))
    for other in results[1:]:
        assert_near(other, results[0], 1e-4)


# --- the dense model


def test_no_experts_are_train_gpt_to_the_bit(tmp_path):
    """Losses of all steps and evaluations, last weights and moments; two micro-steps a step."""
    folders = [train(script, tmp_path, iterations=6, micro_tokens=64, experiment_name=script.__name__, **more)
               for script, more in ((train_gpt, {}), (tm, dict(num_experts=0)))]
    one, other = map(losses, folders)
    assert one == other and len(one["train_loss"]) == 6 and len(one["val_loss"]) == 2
    one, other = (saved_state(folder, 6) for folder in folders)
    assert other["balance"] is None and one["state"].keys() == other["state"].keys()
    for key, tensors in one["state"].items():
        assert tensors.keys() == other["state"][key].keys()
        assert all(torch.equal(tensor, other["state"][key][name]) for name, tensor in tensors.items())


@pytest.mark.parametrize("impl", PLAIN_IMPLS)
@pytest.mark.parametrize("router", ["noisy_topk", "softmax_topk"])
def test_one_expert_is_the_dense_model(router, impl):
    """The same loss, and the same gradients; those of the way up are transposed."""
    s = settings(num_experts=1, top_k=1, router=router, moe_impl=impl)
    mixture, batch = random_model(s), random_batch()
    dense = tm.GPT(settings(num_experts=0), VOCAB)
    whole = mixture.state_dict()
    for i in range(s.num_layers):
        up, down = (whole.pop(f"blocks.{i}.mlp.experts_{name}")[0] for name in ("up", "down"))
        whole |= {f"blocks.{i}.mlp.up": up.T, f"blocks.{i}.mlp.down": down}
    del whole["routers"]
    dense.load_state_dict(whole)
    inputs, targets, docs = batch
    values = [model(inputs, targets[None], docs, window(), *noise)[0]
              for model, noise in ((mixture, (random_noise(s),)), (dense, ()))]
    for value in values:
        (value / inputs.numel()).backward()
    assert torch.allclose(*values, rtol=1e-6, atol=0)
    grads = [{name: p.grad for name, p in model.named_parameters()} for model in (mixture, dense)]
    for i in range(s.num_layers):
        up, down = (grads[0].pop(f"blocks.{i}.mlp.experts_{name}")[0] for name in ("up", "down"))
        grads[0] |= {f"blocks.{i}.mlp.up": up.T, f"blocks.{i}.mlp.down": down}
    assert not grads[0].pop("routers").any()  # one choice of one leaves nothing to learn
    assert grads[0].keys() == grads[1].keys() and grads[1]["blocks.0.mlp.up"].any()
    assert_near(grads[0], grads[1], 1e-5)


@pytest.mark.parametrize("router", ["noisy_topk", "softmax_topk"])
def test_one_expert_trains_like_train_gpt(tmp_path, router):
    """Same initial weights and, transposed, the same updates: losses stay equal but for rounding. Without the z-loss,
    which would turn a router of one expert, too."""
    dense = losses(train(train_gpt, tmp_path, experiment_name="dense", tail=0.0))
    mixture = losses(train(tm, tmp_path, experiment_name="mixture", num_experts=1, top_k=1, router=router,
                           z_coef=0.0, tail=0.0, expert_lr=1.0))
    for kind, values in dense.items():
        assert mixture[kind] == pytest.approx(values, abs=2e-5) and len(set(values.values())) == len(values)
