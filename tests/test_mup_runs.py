"""Width transfer (--mup) in training: nothing changes at the base width, wider is better; checkpoints, ranks,
micro-steps, torch.compile, sampling; the flags."""
from __future__ import annotations

import functools
import math

import moe
import numpy as np
import pytest
import ranks
import test_generate
import test_moe_generate
import test_mup_moe
import torch
from helpers import VOCAB, assert_same_state, documents, load_state, losses, parse, run_folder, tiny
from ranks import difference, run_ranks
from test_checkpoint import interrupted
from test_distributed import ROUNDING
from test_distributed import pytestmark as needs_gloo
from test_kernels import NO_CAP
from test_mup import HIDDEN, TABLES, scaled, short, standard
from test_optimizer import dynamo as fresh_dynamo
from test_optimizer import needs_compiler

import generate
import train_gpt
import train_moe

dynamo = fresh_dynamo  # a fixture
SMALL = dict(mup=True, base_width=16, base_head_dim=16)  # of runs of width 32: m = 2


# --- at the base width

ADAMW = dict(hidden_optimizer="adamw")
SAME = {
    "muon": (train_gpt, {}), "adamw": (train_gpt, ADAMW), "no cap": (train_gpt, dict(softcap=NO_CAP)),
    "symmetric cap": (train_gpt, dict(softcap=(30.0, 0.0, 7.5))),
    "cap, more targets": (train_gpt, dict(mtp=2, ngram_rows=50, pointer=8, softcap=(23.0, 5.0, 7.5))),
    **{router: (train_moe, dict(router=router, num_experts=4)) for router in moe.ROUTERS},
    "experts, adamw": (train_moe, ADAMW | dict(num_experts=4, num_shared=1, expert_hidden=40)),
}
OF_MUON = ("--muon-lr", "--muon-momentum", "--momentum-warmup", "--momentum-cooldown")  # flags of `tiny`


def without(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """A command line without these flags and their values."""
    return [word for i, word in enumerate(argv) if word not in flags and argv[i - 1] not in flags]


@pytest.mark.parametrize("name", SAME)
def test_at_the_base_width_training_is_bit_identical(name, tmp_path):
    """20 steps: losses, weights, moments, state of the random generator. With another base it differs."""
    (script, changes), runs = SAME[name], {}
    for base in (None, 32, 16):
        mup = dict(mup=True, base_width=base) if base else {}
        argv = tiny(tmp_path, **changes, **mup, iterations=20, eval_every=10, experiment_name=f"base-{base}")
        assert script.main(without(argv, OF_MUON) if "hidden_optimizer" in changes else argv) == 0
        runs[base] = run_folder(tmp_path, f"base-{base}")
    plain, same, other = (load_state(folder, 20) for folder in runs.values())
    assert losses(runs[None]) == losses(runs[32]) and len(losses(runs[None])["train_loss"]) == 20
    assert_same_state(plain, same)
    assert any("/rng" in key for key in plain)
    assert losses(runs[16]) != losses(runs[None])
    assert not torch.equal(plain["/optimizer/state/master/lm_head"], other["/optimizer/state/master/lm_head"])


# --- at other widths


def fixed_batch(seed: int, rows: int = 8, length: int = 32) -> torch.Tensor:
    """(3, rows, T) int32: inputs, targets, document numbers."""
    tokens = np.stack([documents(length + 1, 10 * seed + row) for row in range(rows)])
    tokens = torch.from_numpy(tokens).int()
    return torch.stack([tokens[:, :-1], tokens[:, 1:], torch.zeros(rows, length, dtype=torch.int32)])


def curve(s, script=train_gpt, steps: int = 25) -> list[float]:
    """Losses of a model that is trained on one batch."""
    model, batch = script.GPT(s, VOCAB), fixed_batch(s.seed)
    optimizer, noise, found = script.MuonAdamW(model, s, script.World()), (), []
    if script is train_moe:
        noise = (moe.random_noise(s, *batch.shape[1:], s.seed),)
    for _ in range(steps):
        loss = model(batch[0], batch[1][None], batch[2], moe.window(), *noise)[0] / batch[0].numel()
        loss.backward()
        if script is train_moe:
            optimizer.balance.sums += 1
        optimizer.step(1.0, 0.9)
        found.append(loss.item())
    return found


FAST = dict(muon_lr=0.04, hidden_lr=0.006, adam_lr=0.004)
WIDTHS = (32, 64, 128)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_wider_is_better(optimizer, seed):
    """The same loss at the first step and nearly so in the first 8, then lower the wider. (In the standard
    parametrization the losses of step 8 differ by 2.)"""
    curves = [curve(scaled(width, hidden_optimizer=optimizer, seed=seed, **FAST)) for width in WIDTHS]
    assert [c[0] for c in curves] == [pytest.approx(math.log(128), abs=1e-5)] * 3
    for step in range(8):
        assert max(c[step] for c in curves) - min(c[step] for c in curves) < 0.04, step
    for step in (19, 24):
        small, middle, large = (c[step] for c in curves)
        assert small > middle + 0.002 > large + 0.004


def test_the_comparison_above_would_notice():
    """Standard parametrization: rates of the base at 4 times its width."""
    first, wide = (curve(standard(scaled(width, **FAST)), steps=8) for width in (32, 128))
    assert first[0] == pytest.approx(wide[0], abs=1e-6) and first[7] - wide[7] > 1


@pytest.mark.parametrize("router", moe.ROUTERS)
def test_wider_mixtures_are_better(router):
    curves = [curve(test_mup_moe.scaled(width, router=router, **FAST), train_moe) for width in WIDTHS]
    assert max(c[5] for c in curves) - min(c[5] for c in curves) < 0.04
    assert curves[0][24] > curves[1][24] > curves[2][24]


@pytest.mark.parametrize("softcap", [(23.0, 5.0, 7.5), (30.0, 0.0, 7.5), NO_CAP], ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_at_the_first_step_all_logits_are_those_of_zero(width, softcap):
    model, batch = train_gpt.GPT(scaled(width, softcap=softcap), VOCAB), fixed_batch(0)
    logits = model.head(model.trunk(batch[0], batch[2], moe.window()))
    zero = softcap[0] / (1 + math.exp(-softcap[1] / softcap[2])) if softcap[0] else 0.0
    assert torch.equal(logits, torch.full((*batch[0].shape, 128), zero))
    loss = model(batch[0], batch[1][None], batch[2], moe.window())[0] / batch[0].numel()
    assert loss.item() == pytest.approx(math.log(128), rel=1e-6)


def gradient_sizes(s) -> dict[str, float]:
    """Root mean square of each parameter's gradient, after 8 steps."""
    model, batch = train_gpt.GPT(s, VOCAB), fixed_batch(0)
    optimizer = train_gpt.MuonAdamW(model, s, train_gpt.World())
    for step in range(9):
        loss = model(batch[0], batch[1][None], batch[2], moe.window())[0] / batch[0].numel()
        if step < 8:
            loss.backward()
            optimizer.step(1.0, 0.9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters)
    return {name: gradient.square().mean().sqrt().item() for name, gradient in zip(names, gradients, strict=True)}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_gradients_shrink_as_the_epsilon_of_adamw_does(optimizer):
    """Measured, at widths 32 and 128, of all that grow: AdamW's updates are what they were."""
    base, wide = (scaled(width, hidden_optimizer=optimizer, **FAST) for width in (32, 128))
    before, after = gradient_sizes(base), gradient_sizes(wide)
    rules = train_gpt.trained_rules(wide, list(after))
    smaller = {name: rule.eps / wide.adam_eps for name, rule in rules.items() if rule.kind == "adamw"}
    seen = {name: factor for name, factor in smaller.items() if factor != 1}
    assert {short(name) for name in seen} == {*TABLES, "gates", "lm_head", *(HIDDEN if optimizer == "adamw" else ())}
    for name, factor in seen.items():
        assert 0.4 < after[name] / before[name] / factor < 2.5, name


# --- works with


def test_a_resumed_run_is_bit_identical_and_other_scalings_are_refused_by_name(tmp_path, monkeypatch, capsys):
    whole = tmp_path / "whole"
    assert train_gpt.main(tiny(tmp_path, **SMALL, log_dir=whole / "logs")) == 0
    folder = interrupted(tmp_path, monkeypatch, **SMALL)
    capsys.readouterr()
    for changes, expected in (
            (SMALL | dict(base_width=32), ["base_width: 16 in the checkpoint, 32 now"]),
            (SMALL | dict(mup_embedding="sqrt"), ["mup_embedding: constant in the checkpoint, sqrt now"]),
            ({}, ["mup: True in the checkpoint, False now", "base_width: 16 in the checkpoint, 0 now",
                  "base_head_dim: 16 in the checkpoint, 0 now"])):
        assert train_gpt.main([*tiny(tmp_path, **changes), "--resume"]) == 1
        error = capsys.readouterr().err
        assert all(line in error for line in expected) and error.count("in the checkpoint") == len(expected)
    assert train_gpt.main([*tiny(tmp_path, **SMALL), "--resume"]) == 0
    assert_same_state(load_state(folder, 8), load_state(run_folder(whole), 8))
    assert losses(folder)["val_loss"] == losses(run_folder(whole))["val_loss"]


@needs_gloo
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_two_ranks_train_like_one(optimizer, tmp_path):
    """ZeRO-2 with changing numbers of micro-steps; a checkpoint loaded on 2 ranks goes on like on one."""
    changes = SMALL | dict(hidden_optimizer=optimizer, mup_embedding="sqrt")
    one = ranks.training_scenario(train_gpt.World(), changes, None)
    both = run_ranks(ranks.training_scenario, 2, tmp_path, changes, None)
    plain = ranks.training_scenario(train_gpt.World(), dict(hidden_optimizer=optimizer), None)
    for many in both:
        for moment in ("middle", "end", "again"):
            assert max(difference(one[moment], many[moment]).values()) < ROUNDING, moment
    summed = [sum(parts) for parts in zip(*(many["losses"] for many in both), strict=True)]
    assert summed == pytest.approx(one["losses"], rel=1e-5)
    assert difference(one["end"], plain["end"])["embed.weight"] > 10 * ROUNDING


@pytest.mark.parametrize("script", [train_gpt, train_moe])
def test_micro_steps_change_rounding_only(script, tmp_path):
    experts = dict(num_experts=4, router="softmax_topk") if script is train_moe else {}
    for tokens in (128, 32):
        assert script.main(tiny(tmp_path, **SMALL, **experts, micro_tokens=tokens, experiment_name=f"m{tokens}")) == 0
    one, other = (losses(run_folder(tmp_path, f"m{tokens}"))["train_loss"] for tokens in (128, 32))
    assert one == pytest.approx(other, rel=1e-5) and len(one) == 8


@needs_compiler
@pytest.mark.parametrize("unit", ["model", "block"])
def test_compiled_equals_eager(unit, dynamo, monkeypatch):
    """A sharp cap and m = 3, whose inverse is rounded; AdamW for all, as each epsilon is a constant of its graph."""
    changes = dict(width=48, num_layers=2, **SMALL | dict(hidden_optimizer="adamw", softcap=(23.0, 5.0, 7.5)))
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    found = []
    for compiled in (False, True):
        s = ranks.settings(**changes, compile=compiled, compile_unit=unit)
        model, optimizer = ranks.build(s)
        train_gpt.compile_model(model, s)
        found.append((ranks.train(model, optimizer, range(3)), ranks.parameters(model)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert max(difference(found[0][1], found[1][1]).values()) < 1e-4
    assert not dynamo["graph_break"] and dynamo["stats"]["unique_graphs"] > 5


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("softcap", [(23.0, 5.0, 7.5), NO_CAP], ids=str)
def test_samples_come_from_the_logits_of_training(softcap, cached, tmp_path):
    """A checkpoint at m = 2 with another head_dim, too: multiplier and attention scale are those of its training."""
    s = test_generate.settings(mup=True, base_width=32, base_head_dim=8, softcap=softcap)
    model, tokens = test_generate.random_model(s), torch.arange(40).tolist()
    path = test_generate.save(tmp_path, dict(test_generate.CHARS, vocab_size=test_generate.VOCAB), s, model=model)
    decoder = generate.make_decoder(path, train_gpt.read_meta(path), "cpu", 40, cached)
    found = torch.stack([decoder([token]) for token in tokens])
    torch.testing.assert_close(found, test_generate.full_logits(model, tokens, 16), atol=2e-4, rtol=1e-4)
    plain = test_generate.random_model(test_generate.settings(softcap=softcap))
    assert (test_generate.full_logits(plain, tokens, 16) - found).abs().max() > 0.1


@pytest.mark.parametrize("cached", [True, False])
def test_samples_of_a_mixture_come_from_the_logits_of_training(cached, tmp_path):
    s = moe.settings(**test_moe_generate.DEEP | dict(window=16, window_step=8, router="sigmoid_bias", **SMALL))
    with torch.no_grad():
        expected = test_moe_generate.full_logits(moe.random_model(s))
    path = test_moe_generate.save_random(tmp_path, s)
    decoder = generate.make_decoder(path, train_gpt.read_meta(path), "cpu", 40, cached)
    found = torch.stack([decoder([token]) for token in test_moe_generate.TOKENS[0].tolist()])
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


# --- flags


def errors(*argv: str, monkeypatch) -> list[str]:
    """The lines of a refused command line, of both scripts alike."""
    found = []
    for script, module in ((train_gpt, None), (train_moe, moe)):
        with pytest.raises(script.UserError) as refused:
            (module.parse if module else parse)(*argv, monkeypatch=monkeypatch)
        found.append([line.strip() for line in str(refused.value).splitlines()[1:]])
    assert found[0] == found[1]
    return found[0]


def test_flags_that_nothing_would_read_are_refused_together(monkeypatch):
    refused = functools.partial(errors, monkeypatch=monkeypatch)
    assert refused("--base-width", "96", "--base-head-dim", "48", "--mup-embedding", "sqrt", "--hidden-lr", "0.1",
                   "--hidden-weight-decay=0") == [
        *(f"--{name}: has no effect without --mup" for name in ("base_width", "base_head_dim", "mup_embedding")),
        *(f"--{name}: has no effect without --hidden_optimizer adamw" for name in ("hidden_lr", "hidden_weight_decay"))]
    muon = dict(muon_lr=0.1, muon_momentum=0.9, momentum_start=0.8, momentum_warmup=3, momentum_cooldown=3,
                muon_beta2=0.9, muon_weight_decay=0, orthogonalizer="newton_schulz")
    argv = [f"--{name}={value}" for name, value in muon.items()]
    assert refused("--hidden_optimizer", "adamw", *argv) == [
        f"--{name}: has no effect without --hidden_optimizer muon" for name in muon]


def test_flags_that_are_read_are_taken(monkeypatch):
    argv = "--mup --base-width 96 --base-head-dim 48 --mup-embedding sqrt --hidden-optimizer adamw --hidden-lr 0.1"
    s = parse(*argv.split(), monkeypatch=monkeypatch)
    assert (s.base_width, s.base_head_dim, s.mup_embedding, s.hidden_lr) == (96, 48, "sqrt", 0.1)
    assert not parse("--no-mup", "--muon-lr", "0.1", monkeypatch=monkeypatch).mup


SHORT = "--seq-len 1024 --eval-seq-len 1024 --max-doc-len 1024 --batch-tokens 8192 --ngram-rows 0".split()  # fits 8 GiB


def test_base_width_and_head_dim_default_to_the_presets(monkeypatch):
    s = parse("--preset", "cpu", "--width", "384", "--mup", monkeypatch=monkeypatch)
    assert (s.width, s.base_width, s.base_head_dim) == (384, 192, 48)
    small = [*SHORT, "--num-layers", "3", "--value-embeds", "1"]
    s = parse("--preset", "medium", "--device", "cpu", "--mup", "--head-dim", "64", *small, monkeypatch=monkeypatch)
    assert (s.base_width, s.base_head_dim) == (1024, 64)
    s = moe.parse("--preset", "deepseek-cpu", "--width", "96", "--mup", monkeypatch=monkeypatch)
    assert (s.base_width, s.base_head_dim) == (192, 48)
    s = parse("--preset", "cpu", monkeypatch=monkeypatch)
    assert (s.base_width, s.base_head_dim) == (0, 0)


@pytest.mark.parametrize("argv, expected", [
    (["--base-width", "100"], "--base_width 100 must be a multiple of --base_head_dim 48, that one of 4"),
    (["--base-width", "192", "--base-head-dim", "50"], "--base_width 192 must be a multiple of --base_head_dim 50"),
    (["--base-width", "8", "--base-head-dim", "8"], "and not below 12"),
    (["--base-width", "-48"], "--base_width -48: must be >=0"),
    (["--mup-embedding", "root"], "--mup_embedding root: must be constant or sqrt"),
], ids=lambda value: str(value)[:40])
def test_base_shapes_that_cannot_be(argv, expected, monkeypatch):
    (line,) = errors("--preset", "cpu", "--mup", *argv, monkeypatch=monkeypatch)
    assert expected in line


def test_heads_are_paired_only_if_they_can_be_at_both_widths(monkeypatch):
    """Else the model would be another one than the one whose rates these are."""
    def attention(*flags: str) -> str:
        argv = "--preset", "gpu", "--device", "cpu", *SHORT, "--width", "768", *flags
        return parse(*argv, monkeypatch=monkeypatch).attention

    tuned = attention("--width", "384")
    assert "P" not in tuned and attention("--mup", "--base-width", "384") == tuned
    assert "P" in attention() and attention("--mup", "--base-width", "256") == attention()
