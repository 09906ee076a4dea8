"""The roles and fans that parameter_table declares are those of the shapes: models of two widths are compared.

A role cannot be read off a width: a vocabulary, a hidden size or a number of heads may be the same number. So models of
the base width and of 64 times that are built, without weights, and what grows is compared with what is declared; every
wrong role and every wrong fan of a row must be found.
"""
import dataclasses
import re
import sys

import pytest
from helpers import ROOT, settings
from moe import settings as moe_settings

import train_gpt
import train_moe

sys.path.insert(0, str(ROOT))
from bench import coord_check  # noqa: E402

VOCAB, BASE = 64, 32
ROLES = {"hidden", "input", "output", "fixed", "table"}
# Axes (fan_out, fan_in) of a parameter: x @ W.T with W (out, in), or x @ W with W (in, out); rows that are looked up.
AXES = {
    r".*(qk|qkvo|mlp\.up|shared\.up)|lm_head|routers|gates": (-2, -1),
    r".*(mlp\.down|shared\.down|experts_up|experts_down)": (-1, -2),
    r".*embed\.weight|value_embeds.*|ngrams\.table": (-1, None),
    r"smear|scalars|ngrams\.weight|pointer\.small": (None, None),
}
HIDDEN = r"blocks\..*|pointer\.qk"  # between activations of the model, whatever their size
LOOKED_UP = r".*embed.*|ngrams\.table"

GPT = {
    "every technique": dict(ngram_rows=50, pointer=8, qk_dim=8, attention="LS", smear=True, value_embeds=1),
    "paired heads": dict(attention="LP", head_dim=8, base_head_dim=8),
    "no gates": dict(attn_gate=False, value_gate=False, smear=False, value_embeds=0),
    "a vocabulary as large as the width": dict(width=128, ngram_rows=128),
    "AdamW": dict(hidden_optimizer="adamw", ngram_rows=50),
}
MOE = {
    "growing experts": dict(num_experts=8, top_k=2, num_shared=2, moe_layers="MD"),
    "experts of a fixed size": dict(num_experts=8, top_k=2, num_shared=2, moe_layers="MD", expert_hidden=48),
    "as many experts as the width": dict(num_experts=32, top_k=2, num_shared=0, moe_layers="MM"),
    "noisy routers": dict(num_experts=4, top_k=2, router="noisy_topk", moe_layers="MM", num_shared=0),
    "AdamW, fixed": dict(num_experts=8, top_k=2, num_shared=1, moe_layers="DM", expert_hidden=48,
                         hidden_optimizer="adamw"),
    "dense": dict(num_experts=0, ngram_rows=50),
}
CASES = [*((train_gpt, GPT[name]) for name in GPT), *((train_moe, MOE[name]) for name in MOE)]
NAMES = [*GPT, *MOE]


def scaled(script, changes: dict, m: int = 4):
    """Settings at m times the base width."""
    make = settings if script is train_gpt else moe_settings
    given = dict(mup=True, base_width=BASE, base_head_dim=16, width=m * BASE) | changes
    return make(**given)


def grown(sizes: tuple[int, int], axis: int | None) -> float:
    return 1.0 if axis is None else sizes[1][axis] / sizes[0][axis]


def expected(name: str, shapes: tuple[tuple, tuple]) -> tuple[str, tuple[float, float]]:
    """Role of a parameter, and growth of fan_out and fan_in, by its shapes at two widths."""
    (axes,) = (axes for pattern, axes in AXES.items() if re.fullmatch(pattern, name))
    out, into = (grown(shapes, axis) for axis in axes)
    if out == into == 1:
        return "fixed", (out, into)
    if re.fullmatch(HIDDEN, name):
        return "hidden", (out, into)
    if into == 1:
        return "table" if re.fullmatch(LOOKED_UP, name) else "input", (out, into)
    return "hidden" if out > 1 else "output", (out, into)


def complaints(script, s, change=lambda rule: rule) -> dict[str, str]:
    """Parameter -> what is wrong with its row; `change` makes a row wrong."""
    far = dataclasses.replace(s.base, width=64 * s.base.width)
    shapes = [coord_check.model_shapes(script, x, VOCAB) for x in (s.base, far)]
    tables = [[change(rule) for rule in script.parameter_table(x)] for x in (s.base, far)]
    now, then = (script.match_rules(table, list(shapes[0])) for table in tables)
    found = {}
    for name in shapes[0]:
        role, growth = expected(name, (shapes[0][name], shapes[1][name]))
        declared = tuple(b / a for a, b in zip(now[name].fans, then[name].fans, strict=True))
        if now[name].role != role:
            found[name] = f"is declared {now[name].role}, but is {role}"
        elif declared != growth:
            found[name] = f"its fans grow by {growth}, not by {declared}"
    return found


@pytest.mark.parametrize("script, changes", CASES, ids=NAMES)
def test_declared_roles_are_what_the_shapes_say(script, changes):
    s = scaled(script, changes)
    assert complaints(script, s) == {}
    axes = coord_check.parameter_axes(script, s, VOCAB)
    shapes = coord_check.model_shapes(script, s, VOCAB)
    assert {name: x.shape for name, x in axes.items()} == shapes
    assert any(map(any, (x.wide for x in axes.values())))


@pytest.mark.parametrize("script, changes", [CASES[0], CASES[4], CASES[5], CASES[6]],
                         ids=[NAMES[0], NAMES[4], NAMES[5], NAMES[6]])
def test_every_wrong_row_is_found(script, changes):
    s = scaled(script, changes)
    shapes = coord_check.model_shapes(script, s.base, VOCAB)
    rules = script.match_rules(script.parameter_table(s.base), list(shapes))
    far = script.match_rules(script.parameter_table(dataclasses.replace(s.base, width=64 * BASE)), list(shapes))
    for name, rule in rules.items():
        wrong = [rule._replace(role=role) for role in ROLES - {rule.role}]
        for mutant in wrong:
            def change(row, mutant=mutant):
                return row._replace(role=mutant.role) if row.pattern == mutant.pattern else row
            assert name in complaints(script, s, change), (name, mutant.role)
        if rule.fans == far[name].fans:
            continue

        def forgotten(row, rule=rule):
            return row._replace(fans=(1, 1)) if row.pattern == rule.pattern else row

        def swapped(row, rule=rule):
            return row._replace(fans=row.fans[::-1]) if row.pattern == rule.pattern else row
        assert name in complaints(script, s, forgotten), name
        out, into = (b / a for a, b in zip(rule.fans, far[name].fans, strict=True))
        assert (name in complaints(script, s, swapped)) == (out != into), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("hidden", [0, 48], ids=["growing", "fixed"])
def test_experts_of_a_fixed_size_get_the_aspect_ratio(hidden, optimizer):
    """At 4 times the width. Muon: sqrt(fan_out / fan_in); AdamW: 1 / fan_in; of what does not grow nothing."""
    s = scaled(train_moe, MOE["growing experts"] | {"expert_hidden": hidden, "hidden_optimizer": optimizer})
    names = list(coord_check.model_shapes(train_moe, s, VOCAB))
    now = train_moe.trained_rules(s, names)
    base = train_moe.match_rules(train_moe.parameter_table(s.base), names)
    factors = {"muon": (1, 1) if not hidden else (0.5, 2), "adamw": (0.25, 0.25) if not hidden else (0.25, 1)}
    for up, down in (("experts_up", "experts_down"), ("shared.up", "shared.down")):
        for end, factor in zip((up, down), factors[optimizer], strict=True):
            (name,) = (name for name in names if name.endswith(end))
            assert now[name].lr / base[name].lr == pytest.approx(factor), name
            assert now[name].lr * now[name].weight_decay == pytest.approx(base[name].lr * base[name].weight_decay)


@pytest.mark.parametrize("script, changes", [CASES[0], CASES[5]], ids=[NAMES[0], NAMES[5]])
def test_at_the_base_width_nothing_changes(script, changes):
    s = scaled(script, changes, m=1)
    names = list(coord_check.model_shapes(script, s, VOCAB))
    assert script.trained_rules(s, names) == script.match_rules(script.parameter_table(s), names) and s.growth == 1
