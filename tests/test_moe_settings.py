"""Settings of train_moe.py's mixtures: what each flag changes, what is refused, presets at equal active FLOPs, the
choice of how experts are multiplied."""
import dataclasses
import functools

import pytest
import torch
from helpers import CPU, H100, TINY, flags, records, tiny
from moe import FIELDS, parse, random_batch, random_model, random_noise, settings, train, window

import train_gpt
import train_moe as tm
from train_moe import MIXTURES, PRESETS, Balance, MuonAdamW, UserError, World

H100 = tm.Hardware(*H100)._replace(capability=(9, 0))
PRODUCT = tm.expert_product
SECTION = FIELDS[FIELDS.index("num_experts"):FIELDS.index("router_lr") + 1]  # of Settings


def problems(*argv, hardware=CPU, monkeypatch) -> str:
    """What is wrong with a tiny run's settings."""
    with pytest.raises(UserError) as caught:
        parse(*flags(**TINY), *argv, hardware=hardware, monkeypatch=monkeypatch)
    return str(caught.value)


# --- flags


def observe(s: tm.Settings, monkeypatch) -> dict:
    """What a training step of a model with random weights shows of its settings."""
    products = set()
    monkeypatch.setattr(tm, "expert_product", lambda x, w, g, impl: products.add(impl) or PRODUCT(x, w, g, impl))
    model, noise = random_model(s), random_noise(s)
    balance, (inputs, targets, docs) = Balance(model, s, World()), random_batch()
    values = model(inputs, targets[None], docs, window(), noise)
    own_noise = balance.noise(0, 0, 4, 32)
    balance.add(values[1:], 1 / inputs.numel(), last=True)
    dropped = tm.named_sums(balance.sums, s.num_experts)["dropped"].sum().item()
    sums = balance.sums.clone()
    balance.update(1)
    slopes = tm.named_sums(balance.slopes, s.num_experts)
    bias = balance.bias.clone()
    balance.sums.copy_(sums)
    balance.update(7)
    late_step = (balance.bias - bias).abs().max().item()
    mixture = next(block.mlp for block in model.blocks if isinstance(block.mlp, tm.Mixture))
    x = torch.randn(4, 32, s.width, generator=torch.Generator().manual_seed(4))
    routing = mixture.router(x, model.routers[0], model.router_bias[0], None if noise is None else noise[:, 0])
    optimizer = MuonAdamW(model, s, World())
    (rate,) = [bank.lr.item() for bank in optimizer.banks if "routers" in bank.params]
    (expert_rate,) = [bank.lr.max().item() for bank in optimizer.banks
                      if any(name.endswith("experts_up") for name in bank.params)]
    gates = routing.gates_NK.sum(1)
    return {
        "experts": len(mixture.experts_up), "hidden": mixture.experts_down.size(1),
        "choices": routing.experts_NK.size(1),
        "shared": 0 if mixture.shared is None else len(mixture.shared.up),
        "layers": "".join("DM"[isinstance(block.mlp, tm.Mixture)] for block in model.blocks),
        "noise and bias": (own_noise is not None, bool(bias.any())),
        "gates": round(gates.mean().item(), 5), "equal gates": (gates - gates[0]).abs().max().item() < 1e-5,
        "dropped": dropped > 0, "products": products, "router rate": rate,
        "expert rate": expert_rate,
        "bias step": bias.abs().max().item(), "late bias step": late_step,
        "noise end": tm.noise_at(s, s.iterations / 4),
        **{f"{name} slope": slope.norm().item() for name, slope in slopes.items()},
    }


def times(factor: float):
    return lambda value, before: before > 0 and value == pytest.approx(factor * before, rel=1e-3)


SIGMOID, SOFTMAX = ["--router", "sigmoid_bias"], ["--router", "softmax_topk"]
FLAGS = [  # flag, other flags, what it changes, from, to (or a check of the new value against the old)
    ("--num-experts 16", [], "experts", 8, 16),
    ("--top-k 4", [], "choices", 2, 4),
    ("--top-k 4", [], "hidden", 64, 32),
    ("--num-shared 2", [], "shared", 0, 64),
    ("--num-shared 2", [], "hidden", 64, 32),
    ("--expert-hidden 24", [], "hidden", 64, 24),
    ("--expert-lr 1.4", [], "expert rate", None, times(2)),
    ("--moe-layers DM", [], "layers", "MM", "DM"),
    ("--dense-first 1", [], "layers", "MM", "DM"),
    ("--dense-last 1", [], "layers", "MM", "MD"),
    ("--router sigmoid_bias", [], "noise and bias", (True, False), (False, True)),
    ("--router softmax_topk", [], "noise and bias", (True, False), (False, False)),
    ("--no-route-norm", [], "equal gates", True, False),
    ("--route-scale 2.5", [], "gates", 2.0, 2.5),
    ("--importance-coef 0.03", [], "importance slope", None, times(3)),
    ("--load-coef 0.03", [], "load slope", None, times(3)),
    ("--noise-end 0.5", [], "noise end", 0.0, 0.5),
    ("--aux-coef 0.03", [], "score slope", None, times(3)),
    ("--aux-coef 0.03", SOFTMAX, "score slope", None, times(3)),
    ("--sequence-coef 0.03", SIGMOID, "sequence slope", 0.0, pytest.approx(0.03 * 2**0.5)),
    ("--z-coef 0.003", [], "z slope", None, times(3)),
    ("--z-coef 0.003", SOFTMAX, "z slope", None, times(3)),
    ("--z-coef 0.003", SIGMOID, "z slope", None, times(3)),
    ("--bias-rate 0.003", SIGMOID, "bias step", None, times(3)),
    ("--bias-cooldown 0.5", SIGMOID, "late bias step", None, times(0.3)),  # step 7 of 8: 1/4 instead of 1/1.2
    ("--capacity-factor 0.5", [], "dropped", False, True),
    ("--moe-impl bmm", [], "products", {"loop"}, {"bmm"}),
    ("--moe-impl grouped", [], "products", {"loop"}, {"grouped"}),
    ("--router-lr 0.125", [], "router rate", pytest.approx(0.005), 0.125),
]


@pytest.mark.parametrize("flag, others, name, before, after", FLAGS, ids=[f"{row[0]}: {row[2]}" for row in FLAGS])
def test_flag_changes_what_it_says(flag, others, name, before, after, monkeypatch):
    without, given = (observe(parse(*flags(**TINY), *others, *more, monkeypatch=monkeypatch), monkeypatch)[name]
                      for more in ([], flag.split()))
    assert (before is None or without == before) and without != given
    assert after(given, without) if callable(after) else given == after


@pytest.mark.parametrize("changes, scale", [
    (dict(top_k=2), 2.0), (dict(top_k=4), 4.0), (dict(top_k=1), 1.0), (dict(route_norm=False), 1.0),
    (dict(router="sigmoid_bias"), 2.0), (dict(router="sigmoid_bias", top_k=1), 2.0), (dict(route_scale=0.5), 0.5),
    (dict(router="sigmoid_bias", top_k=1, route_scale=0.5), 0.5)])
def test_gates_are_about_1_unless_a_scale_is_given(changes, scale):
    s = settings(**changes)
    assert s.gate_scale == random_model(s).blocks[0].mlp.router.scale == scale


def test_every_flag_of_the_mixture_is_in_the_table():
    assert {row[0].split()[0].removeprefix("--no-").strip("-").replace("-", "_") for row in FLAGS} == {
        *SECTION} - {"router_every"}  # which has its own test


def test_router_every_sets_the_steps_between_reports(tmp_path):
    for every, steps in ((3, [3, 6, 8]), (4, [4, 8]), (50, [8])):
        folder = train(tm, tmp_path, router_every=every)
        assert [r["step"] for r in records(folder) if r.get("event") == "routers"] == steps


# --- flags that are refused

VALUES = {"moe_layers": "MD", "router": "sigmoid_bias", "moe_impl": "bmm", "route_norm": None}


@pytest.mark.parametrize("name", SECTION[1:])
def test_without_experts_each_flag_of_the_mixture_is_refused(name, monkeypatch):
    value = VALUES.get(name, "1")
    said = problems("--num-experts", "0", f"--{name}", *[value] * (value is not None), monkeypatch=monkeypatch)
    other = dict.fromkeys(("bias_rate", "bias_cooldown", "sequence_coef"), "--router sigmoid_bias")
    assert f"--{name}: has no effect without {other.get(name, '--num_experts')}" in said
    assert said.startswith("1 setting(s)")


@pytest.mark.parametrize("name, routers", [
    ("importance_coef", ["noisy_topk"]), ("load_coef", ["noisy_topk"]), ("noise_end", ["noisy_topk"]),
    ("aux_coef", ["noisy_topk", "softmax_topk"]), ("sequence_coef", ["sigmoid_bias"]),
    ("bias_rate", ["sigmoid_bias"]), ("bias_cooldown", ["sigmoid_bias"])])
def test_settings_of_other_routers_are_refused(name, routers, monkeypatch):
    for router in ("noisy_topk", "softmax_topk", "sigmoid_bias"):
        argv = ["--router", router, f"--{name}", "0.5"]
        if router in routers:
            assert getattr(parse(*flags(**TINY), *argv, monkeypatch=monkeypatch), name) == 0.5
        else:
            said = problems(*argv, monkeypatch=monkeypatch)
            assert f"--{name}: has no effect without --router {' or '.join(routers)}" in said
            assert said.startswith("1 setting(s)")


@pytest.mark.parametrize("argv, words", [
    ("--top-k 9", ["--top_k 9", "--num_experts 8"]),
    ("--top-k 0", ["--top_k 0", "must be >0"]),
    ("--num-shared -2", ["--num_shared -2", "must be >=0"]),
    ("--num-shared -1", ["--num_shared -1", "must be >=0"]),
    ("--route-scale -1", ["--route_scale -1.0", "must be >=0"]),
    ("--bias-cooldown 1.5 --router sigmoid_bias", ["--bias_cooldown 1.5", "0 to 1"]),
    ("--router best", ["--router best", "noisy_topk or softmax_topk or sigmoid_bias"]),
    ("--moe-impl cuda", ["--moe_impl cuda", "auto or grouped or bmm or loop"]),
    ("--moe-layers M", ["--moe_layers M", "each of the 2 layers"]),
    ("--moe-layers MX", ["--moe_layers MX", "M or D"]),
    ("--moe-layers DD", ["--moe_layers DD", "--num_experts 0"]),
    ("--dense-first 1 --dense-last 1", ["--dense_first 1, --dense_last 1: no mixture", "--num_experts 0"]),
    ("--moe-layers MM --fp8-mlp", ["--fp8_mlp: has no effect"]),
    ("--moe-layers MM --expert-hidden 8 --mlp-ratio 2", ["--mlp_ratio: has no effect"]),
    ("--moe-layers MD --dense-first 1", ["--dense_first: has no effect without --moe_layers auto"]),
    ("--expert-hidden 12", ["--expert_hidden 12", "16 bytes", "multiples of 8"]),
    ("--width 36 --head-dim 12", ["--width 36", "16 bytes", "multiples of 8"]),
    ("--moe-impl grouped --compile", ["--moe_impl grouped", "bf16", "--no-compile"]),
])
def test_wrong_flags_are_refused_in_one_sentence_each(argv, words, monkeypatch):
    said = problems(*argv.split(), monkeypatch=monkeypatch)
    assert all(word in said for word in words)
    assert said.startswith("1 setting(s)") and said.count("\n") == 1


def test_a_negative_number_of_experts_is_refused(monkeypatch):
    assert "--num_experts -1: must be >=0" in problems("--num-experts", "-1", monkeypatch=monkeypatch)


def test_all_that_is_wrong_is_said_at_once_and_without_a_traceback(tmp_path, capsys):
    argv = "--top-k 9 --moe-layers MMX --expert-hidden 12 --bias-rate 1 --muon-lr -1".split()
    assert tm.main([*tiny(tmp_path), *argv]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 2 setting(s) cannot work:") and "Traceback" not in said
    assert all(flag in said for flag in ("--bias_rate", "--muon_lr"))  # each by itself; then what must fit together
    assert tm.main([*tiny(tmp_path), *argv[:6]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 3 setting(s) cannot work:") and "Traceback" not in said
    assert all(flag in said for flag in ("--top_k", "--moe_layers", "--expert_hidden"))
    assert not (tmp_path / "logs").exists()


@pytest.mark.parametrize("preset", ["mixtrall", "-cpu", "mixtral-large", "cpu-mixtral", "mixtral-speed"])
def test_wrong_presets_are_refused(preset, monkeypatch):
    with pytest.raises(UserError, match=f"--preset {preset}: must be auto or cpu or .* or mixtral-cpu or "):
        parse(f"--preset={preset}", monkeypatch=monkeypatch)


# --- presets


@pytest.mark.parametrize("preset, hardware, kind, size", [
    ("auto", CPU, None, "cpu"), ("auto", H100, None, "gpu"), ("mixtral", CPU, "mixtral", "cpu"),
    ("deepseek", H100, "deepseek", "gpu"), ("speed-speedrun", H100, "speed", "speedrun"),
    ("speedrun", H100, None, "speedrun"), ("speed-auto", CPU, "speed", "cpu"), ("cpu", CPU, None, "cpu"),
    ("mixtral-medium", H100._replace(memory_gib=139.8), "mixtral", "medium")])
def test_preset_is_a_kind_and_a_size(preset, hardware, kind, size, monkeypatch):
    world_size = 1 if size in ("cpu", "gpu") else 8
    s = parse("--preset", preset, hardware=hardware, world_size=world_size, monkeypatch=monkeypatch)
    assert s.preset == (f"{kind}-{size}" if kind else size)
    wanted = train_gpt.PRESETS[size] | MIXTURES.get(kind, {}) | tm.SIZED.get(s.preset, {})
    assert PRESETS[s.preset] == wanted and {name: getattr(s, name) for name in wanted} == wanted


def test_command_line_goes_before_the_preset(monkeypatch):
    s = parse("--preset", "deepseek-cpu", "--num-shared", "1", "--top-k", "1", monkeypatch=monkeypatch)
    assert (s.num_shared, s.top_k, s.num_experts, s.moe_layers) == (1, 1, 16, "DMM")


@functools.cache
def flops(script, preset: str) -> list[float]:
    """Of each stage, by the real parameters of a model without storage."""
    s = script.parse_settings(["--preset", preset], 1 if "cpu" in preset else 8)[0]
    s = dataclasses.replace(s, device="cpu", backend="sdpa")
    with torch.device("meta"):
        counts = script.parameter_counts(script.GPT(s, 257 if "cpu" in preset else 50257))
    return [script.flops_per_token(s, counts, stage) for stage in script.stage_table(s)]


@pytest.mark.parametrize("size", train_gpt.PRESETS)
@pytest.mark.parametrize("kind", MIXTURES)
def test_presets_cost_a_token_as_much_as_the_dense_model(kind, size, monkeypatch):
    """Active FLOPs within 1 % of train_gpt.py's preset, at every stage; never exactly equal: there is a router."""
    for script in (train_gpt, tm):
        hardware = script.Hardware("cuda", "H200", 139.8, True, "")
        monkeypatch.setattr(script, "detect_hardware", lambda device="auto", hardware=hardware: hardware)
    ratios = [own / dense for own, dense in zip(flops(tm, f"{kind}-{size}"), flops(train_gpt, size), strict=True)]
    assert all(1 < ratio < 1.01 for ratio in ratios)


def test_parameters_and_flops_of_a_small_mixture():
    """By hand: width 32, hidden 40, 4 experts of which 2 are active and 1 shared, router of 2 x 4 rows."""
    s = settings(num_shared=1, moe_layers="DM", value_embeds=0, expert_hidden=40)
    counts = tm.parameter_counts(tm.GPT(s, 64))
    attention, dense, expert = 4 * 32 * 32, 2 * 32 * 128, 2 * 32 * 40
    assert counts["hidden"] == 2 * attention + dense + expert and counts["experts"] == 4 * expert
    assert counts["router"] == 8 * 32 and counts["total"] - counts["active"] == 2 * expert
    assert counts["matmul"] == 2 * attention + dense + 3 * expert + 8 * 32 + 128 * 32
    keys = 2 * (32 - 32 * 31 / 64)  # two layers, a causal row of 32
    assert tm.flops_per_token(s, counts, tm.stage_table(s)[0]) == 6 * counts["matmul"] + 12 * 32 * keys


# --- how experts are multiplied


def test_grouped_products_are_refused_where_idle_experts_would_get_garbage(monkeypatch, capsys):
    monkeypatch.setattr(tm, "detect_hardware", lambda device="auto": H100._replace(capability=(10, 0)))
    assert tm.main(["--preset", "mixtral", "--moe-impl", "grouped"]) == 2
    assert "on compute capability 10.0: use bmm" in capsys.readouterr().err


@pytest.mark.parametrize("capability, argv, impl", [
    ((9, 0), [], "grouped"), ((10, 0), [], "bmm"), ((8, 0), [], "bmm"), ((12, 0), [], "bmm"), ((8, 9), [], "bmm"),
    ((9, 0), ["--dtype", "fp32"], "bmm"), ((9, 0), ["--moe-impl", "loop"], "loop"), (None, [], "loop"),
    (None, ["--moe-impl", "bmm"], "bmm")])
def test_auto_impl_by_hardware_is_printed(capability, argv, impl, monkeypatch):
    hardware = tm.Hardware(*CPU) if capability is None else H100._replace(capability=capability)
    monkeypatch.setattr(tm, "detect_hardware", lambda device="auto": hardware)
    s, _, notes = tm.parse_settings(["--preset", "mixtral", *argv], 1)
    reason = tm.NO_GROUPED if capability == (10, 0) else ""
    assert s.moe_impl == impl and (f"moe_impl {impl}: the fastest here{reason}" in notes) == ("--moe-impl" not in argv)
    assert "moe_layers MMM: 2 of 8 experts, of hidden size 384" in notes or hardware.device == "cuda"
