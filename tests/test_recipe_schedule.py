"""Narrow queries and keys, a cool-down of its own for what is no hidden matrix, and the extension after it."""
import pytest
import torch
from helpers import tiny
from ranks import build, parameters
from recipe import int_tensor, losses, problems, random_batch, random_model, tiny_settings

import train_gpt as tg

# --- schedule


def plain_rate(step: int, end: float, cooldown: float, floor: float) -> float:
    """1, then a straight line that reaches the floor at `end`, then the floor."""
    start = end * (1 - cooldown)
    if step <= start:
        return 1.0
    return floor if step >= end else 1 - (1 - floor) * (step - start) / (end - start)


@pytest.mark.parametrize("extension", [0.0, 0.2])
def test_both_cool_downs_end_at_the_floor_where_the_extension_begins(extension):
    s = tiny_settings(iterations=100, cooldown=0.8, cooldown_others=0.4, lr_floor=0.1, extension=extension)
    stages, end = tg.stage_table(s), 100 * (1 - extension)
    for cooldown, given in ((0.8, ()), (0.8, (0.0,)), (0.4, (s.cooldown_others,))):
        found = [tg.lr_scale(s, stages, step, *given) for step in range(100)]
        assert found == pytest.approx([plain_rate(step, end, cooldown, 0.1) for step in range(100)])
    if extension:
        assert found[80:] == pytest.approx([0.1] * 20) and found[79] > 0.1


def test_hidden_matrices_follow_one_rate_and_all_else_the_other():
    s = tiny_settings(ngram_rows=64, pointer=8)
    for scale, others in ((0.0, 1.0), (1.0, 0.0)):
        model, optimizer = build(s)
        before = parameters(model)
        (losses(model, random_batch(4, 16, vocab_size=5))[0] / 64).backward()
        optimizer.step(scale, 0.9, others)
        moved = {name: not torch.equal(p, before[name]) for name, p in parameters(model).items()}
        hidden = {name: "blocks" in name or name == "pointer.qk" for name in before}
        assert moved == {name: is_hidden == (scale > 0) for name, is_hidden in hidden.items()}


def test_the_training_hands_over_both_rates(tmp_path, monkeypatch):
    """As lr_scale says, in each step."""
    seen = []

    def step(self, *arguments, step=tg.MuonAdamW.step):
        seen.append(arguments)
        step(self, *arguments)
    monkeypatch.setattr(tg.MuonAdamW, "step", step)
    assert tg.main(tiny(tmp_path, cooldown=0.8, cooldown_others=0.4, extension=0.25, eval_every=0)) == 0
    assert [scale for scale, *_ in seen] == pytest.approx([plain_rate(step, 6, 0.8, 0.1) for step in range(8)])
    assert [others for _, _, others, _ in seen] == pytest.approx([plain_rate(step, 6, 0.4, 0.1) for step in range(8)])


# --- narrow queries and keys


@pytest.mark.parametrize("kind", ["SS", "PS"])
@pytest.mark.parametrize("narrow", [8, 12])
def test_narrow_heads_are_wide_ones_with_zeros(narrow, kind):
    """At the same explicit scale: RMS norms of padded vectors are larger, which the wide scale takes back."""
    shape = dict(num_layers=2, attention=kind, head_dim=16)
    thin = random_model(tiny_settings(qk_dim=narrow, attn_scale=0.2, **shape))
    wide = random_model(tiny_settings(attn_scale=0.2 * narrow / 16, **shape))
    state = thin.state_dict()
    for i in range(2):
        qk = state.pop(f"blocks.{i}.attn.qk").unflatten(1, (2, 2, narrow // 2))  # (2, heads, half, dims, D)
        padded = torch.nn.functional.pad(qk, (0, 0, 0, 8 - narrow // 2)).flatten(1, 3)
        state[f"blocks.{i}.attn.qkvo"] = torch.cat((padded, state[f"blocks.{i}.attn.qkvo"]))
    wide.load_state_dict(state)
    batch = random_batch(3, 16)
    one, other = losses(thin, batch), losses(wide, batch)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad(loss, model.embed.weight)[0] for loss, model in ((one, thin), (other, wide))]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_the_scale_of_narrow_heads_is_that_of_their_size():
    """1.36 / sqrt(dimensions), as of wide ones."""
    thin = random_model(tiny_settings(qk_dim=8, num_layers=2, attention="SS"))
    same = random_model(tiny_settings(qk_dim=8, num_layers=2, attention="SS", attn_scale=1.36 / 8**0.5))
    batch = random_batch(2, 16)
    torch.testing.assert_close(losses(thin, batch), losses(same, batch))


def test_long_layers_keep_wide_queries_and_keys():
    model = tg.GPT(tiny_settings(qk_dim=8), 50)  # L-S
    assert [block.attn is not None and block.attn.qk is not None for block in model.blocks] == [False, False, True]
    assert len(model.blocks[0].attn.qkvo) == 4 and len(model.blocks[2].attn.qkvo) == 2


def test_narrow_heads_are_causal_and_keep_documents_apart():
    model = random_model(tiny_settings(qk_dim=8, num_layers=2, attention="SP"))
    inputs, targets, docs = random_batch(2, 16)
    def logits(tokens):
        return model.trunk(tokens, docs, int_tensor(8))
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = logits(inputs), logits(changed)
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9], after[:, 9])
    other = docs != docs[:, 9:10]
    torch.testing.assert_close(before[other], after[other], rtol=1e-5, atol=1e-6)


# --- settings


@pytest.mark.parametrize("argv, told", [
    ("--qk-dim 3", "--qk_dim 3: a multiple of 4"), ("--head-dim 64 --qk-dim 128", "--qk_dim 128"),
    ("--head-dim 64 --qk-dim 16", "--qk_dim 16"), ("--qk-dim -4", "--qk_dim -4: must be >=0"),
    ("--extension 1.5", "--extension 1.5: must be 0 to 1"), ("--extension -0.1", "--extension -0.1"),
    ("--cooldown-others 2", "--cooldown_others 2.0: must be 0 to 1"),
], ids=lambda x: x)
def test_bad_settings_are_told_in_a_sentence(argv, told):
    (sentence,) = problems(*argv.split())
    assert told in sentence and len(sentence) < 200
