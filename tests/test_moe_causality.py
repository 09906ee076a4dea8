"""What must not move: earlier tokens and other rows when a token changes, and training when it is evaluated."""
import pytest
import torch
from helpers import losses, make_data
from moe import PLAIN_IMPLS, ROUTERS, random_batch, random_model, random_noise, saved_state, settings, train, window

import train_moe as tm
from train_moe import Balance, World

# --- causality


def logits_and_losses(model, batch, noise, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Training mode: logits (B, T, V), and for each row the loss of its first `kept` targets."""
    inputs, targets, docs = batch
    logits = model.head(model.trunk(inputs, docs, window(), None, noise, []))
    targets = targets.clone()
    targets[:, kept:] = tm.IGNORE
    rows = [targets.where(torch.arange(len(targets))[:, None] == row, tm.IGNORE) for row in range(len(targets))]
    return logits.detach(), model(inputs, torch.stack(rows), docs, window(), noise)[:len(rows)].detach()


@pytest.mark.parametrize("impl", PLAIN_IMPLS)
@pytest.mark.parametrize("capacity", [0.0, 0.5], ids=["dropless", "capacity"])
@pytest.mark.parametrize("kind", ROUTERS)
def test_no_token_sees_a_later_one_or_another_row(kind, capacity, impl):
    """Changed from token 19 of row 1 on (its second document): nothing before moves, nor any other row."""
    s = settings(router=kind, capacity_factor=capacity, moe_impl=impl, num_shared=1)
    model, batch, noise, start = random_model(s), random_batch(), random_noise(s), 19
    other = batch.clone()
    other[0, 1, start:] = other[0, 1, start:].flip(0)
    other[1, 1, start:] = (other[1, 1, start:] + 1) % 63
    (logits, loss), (moved, moved_loss) = (logits_and_losses(model, b, noise, start) for b in (batch, other))
    seen = torch.ones(4, 32, dtype=torch.bool)
    seen[1, start:] = False
    # the same up to the rounding of products with another number of rows
    assert torch.allclose(logits[seen], moved[seen], atol=1e-4) and torch.allclose(loss, moved_loss, atol=1e-3)
    assert (logits - moved)[1, start:].abs().amax(1).min() > 0.01  # the change itself is seen


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_token_sees_the_earlier_ones_of_its_document_only(kind):
    """Without a capacity, which counts along the row, documents of a row do not touch each other."""
    s = settings(router=kind)
    model, batch, noise = random_model(s), random_batch(), random_noise(s)
    other = batch.clone()
    other[0, 1, :16] = (other[0, 1, :16] + 1) % 63
    logits, moved = (logits_and_losses(model, b, noise, 32)[0] for b in (batch, other))
    assert torch.allclose(logits[1, 16:], moved[1, 16:], atol=1e-4)
    assert (logits - moved)[1, :16].abs().amax(1).min() > 0.01


# --- evaluation


@pytest.mark.parametrize("kind", ["noisy_topk", "sigmoid_bias"])
def test_evaluation_does_not_change_training(kind, tmp_path):
    """After every step, or only after the last: the same weights, moments, bias and losses to the bit."""
    often, once = (train(tm, tmp_path, router=kind, eval_every=every, micro_tokens=64, router_every=3,
                         experiment_name=f"every{every}") for every in (1, 0))
    assert len(losses(often)["val_loss"]) == 8 and len(losses(once)["val_loss"]) == 1
    assert losses(often)["train_loss"] == losses(once)["train_loss"]
    one, other = saved_state(often, 8), saved_state(once, 8)
    for key, tensors in [*one["state"].items(), ("balance", one["balance"])]:
        others = other["balance"] if key == "balance" else other["state"][key]
        assert all(torch.equal(torch.as_tensor(t), torch.as_tensor(others[name])) for name, t in tensors.items())
    assert (kind == "sigmoid_bias") == bool(one["balance"]["bias"].any())
    assert one["balance"]["slopes"].any()
    assert one["state"]["master"]["routers"][:, -1].any()  # of the noise's size: 0 without noise in training


@pytest.mark.parametrize("kind", ROUTERS)
def test_evaluations_are_equal_and_free_of_capacity_and_noise(kind, tmp_path):
    """Twice the same loss; the sums, the bias and the random state stay; a capacity changes nothing."""
    corpus, found = tm.open_corpus(str(make_data(tmp_path / "data"))), []
    stream = tm.ValStream(corpus, 300, 32)
    for capacity in (0.0, 0.25):
        s = settings(router=kind, capacity_factor=capacity)
        model = random_model(s)
        b = Balance(model, s, World())
        b.bias.normal_(std=0.2, generator=torch.Generator().manual_seed(3))
        before = b.bias.clone(), b.sums.clone(), b.generator.get_state(), torch.get_rng_state()
        found += [tm.evaluate(model, stream, s, World(), 32) for _ in range(2)]
        after = b.bias, b.sums, b.generator.get_state(), torch.get_rng_state()
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    assert len(set(found)) == 1
