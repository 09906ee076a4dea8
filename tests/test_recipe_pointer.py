"""The pointer: one causal distribution over the vocabulary, equal to a brute-force mixture in probability space."""
import itertools
import math

import pytest
import torch
from recipe import IGNORE, cap, int_tensor, losses, only, problems, random_batch, random_model, stream, tiny_settings

import train_gpt as tg

SIZE, VOCAB = 8, 50


def model_of(**changes):
    """A random model with a pointer, and its settings."""
    s = tiny_settings(**{"pointer": SIZE, "seq_len": 32, **changes})
    model = random_model(s, VOCAB)
    assert len(model.lm_head) == 128
    return model, s


def weights(model) -> tuple:
    """Of queries and keys, and gain and sink, fp64."""
    return model.pointer.qk.double(), model.pointer.small.double()


def repetitive_batch(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """As random_batch, of five tokens: nearly every target was seen before."""
    return random_batch(rows, length, vocab_size=5, seed=seed)


def plain_pointer(x, qk, small, inputs, docs, block: int | None = None):
    """By loops: the distribution of copies over tokens, (B, T, V), and the sink's part, (B, T); fp64."""
    def normed(v):
        return v / (v.square().mean() + torch.finfo(torch.float32).eps).sqrt()
    (gain, sink), size = small, len(qk) // 2
    copies, nothing = [], []
    for row, t in itertools.product(*map(range, inputs.shape)):
        q = normed(qk[:size] @ x[row, t]) * gain / math.sqrt(size)
        first = 0 if block is None else max(0, t // block - 1) * block
        seen = [u for u in range(first, t) if docs[row, u] == docs[row, t]]
        share = torch.stack([q @ normed(qk[size:] @ x[row, u]) for u in seen] + [q @ sink]).softmax(0)
        found = torch.zeros(VOCAB, dtype=x.dtype)
        copies.append(found.index_add(0, torch.tensor([inputs[row, u].item() for u in seen], dtype=torch.int64),
                                      share[:-1]))
        nothing.append(share[-1])
    return torch.stack(copies).view(*inputs.shape, VOCAB), torch.stack(nothing).view(inputs.shape)


def plain_losses(model, s, batch, x=None) -> torch.Tensor:
    """-log((1 - alpha (1 - sink)) p~ + alpha copies) of each target, (B, T) fp64; alpha is the softmax probability of
    the class after the vocabulary, p~ the softmax without it."""
    inputs, targets, docs = batch
    x = stream(model, batch).double() if x is None else x
    copies, nothing = plain_pointer(x, *weights(model), inputs, docs)
    z = cap(x @ model.lm_head.double().T, s)
    alpha = z.softmax(-1)[..., VOCAB]
    closed = torch.arange(z.size(-1)) == VOCAB
    model_p = z.masked_fill(closed, -math.inf).softmax(-1)
    target = targets.long().clamp_min(0)[..., None]
    p = model_p.gather(-1, target)[..., 0] * (1 - alpha * (1 - nothing)) + alpha * copies.gather(-1, target)[..., 0]
    return -p.log() * (targets != IGNORE)


@pytest.mark.parametrize("block", [None, 4, 7])
def test_the_attention_is_that_of_loops_over_earlier_positions(block, monkeypatch):
    """4, 7: copies come from the own block and the one before, also where blocks do not divide the row."""
    if block:
        monkeypatch.setattr(tg, "POINTER_BLOCK", block)
    model, _ = model_of()
    inputs, targets, docs = batch = repetitive_batch(2, 18)
    docs[1] = 0  # a long document
    x = stream(model, batch)
    copied, nothing = model.pointer(x, inputs, targets, docs)
    copies, sink = plain_pointer(x.double(), *weights(model), inputs, docs, block)
    torch.testing.assert_close(nothing.double(), sink, rtol=1e-4, atol=1e-5)
    expected = copies.gather(-1, targets.long()[..., None])[..., 0]
    torch.testing.assert_close(copied.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(copies.sum(-1) + sink, torch.ones_like(sink))


@pytest.mark.parametrize("softcap", [(23.0, 5.0, 7.5), (0, 0, 1)])
def test_losses_and_gradients_are_those_of_a_mixture_in_probability_space(softcap):
    model, s = model_of(softcap=softcap)
    batch = only(repetitive_batch(2, 12), torch.rand(2, 12, generator=torch.Generator().manual_seed(0)) < 0.8)
    x = stream(model, batch).detach().requires_grad_()
    copies = model.pointer(x, batch[0], batch[1], batch[2])
    fast = model.losses(x, batch[1][None], copies)[0]
    plain = plain_losses(model, s, batch, x.double()).sum()
    torch.testing.assert_close(fast.double(), plain, rtol=1e-5, atol=1e-4)
    leaves = [x, model.lm_head, model.pointer.qk, model.pointer.small]
    for one, other in zip(*(torch.autograd.grad(loss, leaves) for loss in (fast, plain)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=2e-5 * other.abs().max().item())
    assert losses(model, batch)[0].item() == pytest.approx(fast.item(), rel=1e-6)


def test_gradients_are_those_of_finite_differences():
    """Of the plain mixture, which the test before compares with: of gain and sink, queries and keys, gate."""
    model, s = model_of()
    batch = repetitive_batch(2, 10)
    x = stream(model, batch).detach()
    fast = model.losses(x, batch[1][None], model.pointer(x, batch[0], batch[1], batch[2]))[0]
    leaves = {"small": (model.pointer.small, [(0, 1), (1, 4)]), "qk": (model.pointer.qk, [(2, 3), (11, 30)]),
              "head": (model.lm_head, [(VOCAB, 7), (3, 0), (VOCAB + 5, 1)])}
    gradients = torch.autograd.grad(fast, [p for p, _ in leaves.values()])
    for (name, (p, places)), gradient in zip(leaves.items(), gradients, strict=True):
        p.data = p.data.double()
        for place in places:
            sides = []
            with torch.no_grad():
                for step in (1e-4, -1e-4):
                    p[place] += step
                    sides.append(plain_losses(model, s, batch, x.double()).sum().item())
                    p[place] -= step
            difference = (sides[0] - sides[1]) / 2e-4
            assert gradient[place].item() == pytest.approx(difference, rel=2e-3, abs=1e-4), (name, place)
            assert abs(difference) > 1e-6, (name, place)


def test_the_mixture_of_cross_entropies_passes_gradcheck_and_has_the_right_limits():
    random = torch.Generator().manual_seed(0)
    loss, gate, copied, nothing = (torch.rand(6, generator=random).double() for _ in range(4))
    values = (loss + 1, gate + 0.5, copied / 2, nothing / 2)
    assert torch.autograd.gradcheck(tg.copy_losses, [x.requires_grad_() for x in values])
    shut = torch.full((6,), 60.0).double()  # alpha 1e-26
    torch.testing.assert_close(tg.copy_losses(loss + 1, shut, copied, nothing), loss + 1)
    one = torch.ones(6).double()  # the sink takes all: the model's own distribution without the gate
    alpha = (-(gate + 0.5)).exp()
    torch.testing.assert_close(tg.copy_losses(loss + 1, gate + 0.5, 0 * one, one), loss + 1 + (1 - alpha).log())


@pytest.mark.parametrize("changes", [{}, dict(ngram_rows=64), dict(softcap=(0, 0, 1))], ids=str)
def test_probabilities_of_all_tokens_sum_to_one(changes):
    """By asking for the loss of every token in turn. The gate is none; the rows that pad the head are."""
    model, _ = model_of(**changes)
    batch = repetitive_batch(1, 10)
    batch[2] = torch.tensor([0] * 4 + [1] * 6)
    with torch.no_grad():
        x = stream(model, batch)
        for t in (0, 3, 4, 9):
            keep, total = torch.arange(10)[None] == t, 0.0
            for token in {*range(128)} - {VOCAB}:
                batch[1, 0, t] = token
                inputs, targets, docs = only(batch, keep)
                copies = model.pointer(x, inputs, targets, docs)
                total += math.exp(-model.losses(x, targets[None], copies)[0].item())
            assert total == pytest.approx(1, abs=1e-5), t
    assert losses(model, only(batch, keep))[0] == model.losses(x, targets[None], copies)[0]


def test_the_shut_gate_leaves_the_model():
    """With alpha near 0, and with a sink that takes all, the losses are those without a pointer."""
    model, s = model_of(softcap=(0, 0, 1))
    batch = repetitive_batch()
    x = stream(model, batch)
    with torch.no_grad():
        model.lm_head[VOCAB] = 0
        model.lm_head[VOCAB] -= 50 * x.mean((0, 1)) / x.mean((0, 1)).square().mean()
        gate = (x @ model.lm_head[VOCAB]).max()
        assert gate < -20, "the test needs a direction that all positions share"
        full = losses(model, batch)[0]
        z = x @ model.lm_head.T
        z[..., VOCAB] = -math.inf
    targets = batch[1].flatten().long()
    torch.testing.assert_close(full, torch.nn.functional.cross_entropy(z.flatten(0, 1), targets, reduction="sum"))


# --- what may be copied


def copied_at(model, batch) -> torch.Tensor:
    """Probability of copying the target at each position, (B, T)."""
    inputs, targets, docs = batch
    return model.pointer(stream(model, batch), inputs, targets, docs)[0]


def test_nothing_is_copied_from_the_own_position_or_later():
    """Targets that stand at the own position, or after it, and nowhere before."""
    model, _ = model_of()
    inputs = torch.arange(12, dtype=torch.int32)[None]
    docs = torch.zeros_like(inputs)
    for back in (0, -1, -3):
        assert not copied_at(model, torch.stack([inputs, inputs - back, docs])).any()
    before = copied_at(model, torch.stack([inputs, inputs - 1, docs]))
    assert (before[0, 1:] > 0).all()


def test_nothing_is_copied_from_another_document():
    model, _ = model_of()
    inputs = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4]], dtype=torch.int32)
    docs = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]], dtype=torch.int32)
    targets = torch.tensor([[2, 1, 2, 1, 2, 3, 4, 1]], dtype=torch.int32)
    found = copied_at(model, torch.stack([inputs, targets, docs])) > 0
    assert found.tolist() == [[False, True, True, True, False, False, False, True]]
    together = copied_at(model, torch.stack([inputs, targets, torch.zeros_like(docs)])) > 0
    assert together.tolist() == [[False, True, True, True, True, True, True, True]]


def test_first_position_of_a_document_has_the_sink_alone():
    model, _ = model_of()
    inputs, targets, docs = batch = repetitive_batch(3, 16)
    copied, nothing = model.pointer(stream(model, batch), inputs, targets, docs)
    first = torch.cat((torch.ones(3, 1, dtype=torch.bool), docs[:, 1:] != docs[:, :-1]), dim=1)
    assert (nothing[first] == 1).all() and not copied[first].any() and (nothing[~first] < 1).all()


def test_losses_do_not_depend_on_later_tokens():
    model, _ = model_of()
    batch = repetitive_batch(2, 16)
    keep = (torch.arange(16) < 9).expand(2, -1)
    changed = batch.clone()
    changed[0, :, 9:] = (batch[0, :, 9:] + 1) % 5
    changed[1, :, 9:] = (batch[1, :, 9:] + 2) % 5
    with torch.no_grad():
        assert torch.equal(losses(model, only(batch, keep)), losses(model, only(changed, keep)))
        assert not torch.equal(losses(model, batch), losses(model, changed))


def test_losses_do_not_depend_on_how_documents_are_packed():
    model, _ = model_of()
    batch = repetitive_batch(1, 20)
    batch[2] = torch.tensor([0] * 7 + [1] * 13)
    with torch.no_grad():
        alone = losses(model, batch[:, :, :7])[0] + losses(model, batch[:, :, 7:])[0]
        torch.testing.assert_close(losses(model, batch)[0], alone, rtol=1e-5, atol=1e-4)


def test_targets_without_a_loss_have_none():
    model, _ = model_of()
    batch = repetitive_batch()
    none = only(batch, torch.zeros(2, 16, dtype=torch.bool))
    loss = losses(model, none)[0]
    gradients = torch.autograd.grad(loss, [model.lm_head, model.pointer.qk, model.pointer.small])
    assert loss.item() == 0 and not any(g.any() for g in gradients)
    keep = torch.arange(16) % 3 == 0
    parts = losses(model, only(batch, keep.expand(2, -1)))[0] + losses(model, only(batch, ~keep.expand(2, -1)))[0]
    assert parts.item() == pytest.approx(losses(model, batch)[0].item(), rel=1e-5)


def test_further_tokens_are_predicted_without_copies():
    """The pointer says what comes next, not what comes after: their losses are cross-entropies over all rows."""
    model, s = model_of()
    batch = repetitive_batch()
    first, second, third = losses(model, batch, mtp=2)
    assert first == losses(model, batch)[0]
    z = cap(stream(model, batch) @ model.lm_head.T, s)
    for k, loss in ((1, second), (2, third)):
        targets = tg.future_targets(batch[1], batch[2], 2)[k].flatten().long()
        plain = torch.nn.functional.cross_entropy(z.flatten(0, 1), targets, ignore_index=IGNORE, reduction="sum")
        torch.testing.assert_close(loss, plain)


def test_with_candidates_the_mixture_is_that_of_the_set():
    """Copies of a target count whole; the model's part and the gate's are among the classes of the set."""
    model, s = model_of()
    batch = repetitive_batch(1, 12)
    model.candidates = 24
    classes, _, bias = tg.candidate_set(batch[1][None].long(), int_tensor(3 * 25, torch.int64), 24, VOCAB, True)
    assert VOCAB in classes
    sampled = losses(model, batch, turn=3)[0]
    outside = torch.ones(128, dtype=torch.bool).index_fill(0, classes, False)
    with torch.no_grad():
        x = stream(model, batch).double()
        copies, nothing = plain_pointer(x, *weights(model), batch[0], batch[2])
        z = cap(x @ model.lm_head.double().T, s).masked_fill(outside, -math.inf)
        z[..., classes] += bias  # the others stand for all that are no targets
        alpha = z.softmax(-1)[..., VOCAB]
        z[..., VOCAB] = -math.inf
        target = batch[1].long()[..., None]
        p = z.softmax(-1).gather(-1, target)[..., 0] * (1 - alpha * (1 - nothing))
        p += alpha * copies.gather(-1, target)[..., 0]
    torch.testing.assert_close(sampled.double(), -p.log().sum(), rtol=1e-5, atol=1e-4)


def test_a_pointer_changes_no_other_initial_weight():
    """A new model is that without one, and its gate's row is among those that pad the head."""
    with_pointer, without = (tg.GPT(tiny_settings(pointer=size), VOCAB) for size in (SIZE, 0))
    others = {name: p for name, p in with_pointer.named_parameters() if not name.startswith("pointer")}
    expected = dict(without.named_parameters())
    assert others.keys() == expected.keys() and all(torch.equal(others[name], p) for name, p in expected.items())


@pytest.mark.parametrize("vocab_size, rows", [(127, 128), (128, 256), (50, 128)])
def test_the_gate_has_a_row_of_its_own(vocab_size, rows):
    assert len(tg.GPT(tiny_settings(pointer=SIZE), vocab_size).lm_head) == rows


def test_bad_settings_are_told_in_a_sentence():
    (sentence,) = problems("--pointer", "-1")
    assert "--pointer -1: must be >=0" in sentence
