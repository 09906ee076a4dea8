"""Sampled softmax: candidate sets and their loss against loops, full where it must be, the same on any processes."""
import itertools
import math
from collections import Counter

import pytest
import torch
from recipe import IGNORE, cap, int_tensor, losses, problems, random_batch, random_model, stream, tiny_settings

import train_gpt as tg

PERMUTATION = 20011  # of record 92


def plain_set(targets: list[int], turn: int, count: int, vocab_size: int, gate: bool) -> list[int]:
    """The targets, the gate, then labels in the order in which label * 20011 runs through turn, turn + 1, .."""
    place_of = {label * PERMUTATION % vocab_size: label for label in range(vocab_size)}
    chosen = {t for t in targets if t != IGNORE} | ({vocab_size} if gate else set())
    for k in range(vocab_size):
        if len(chosen) == count:
            break
        chosen.add(place_of[(turn + k) % vocab_size])
    return sorted(chosen)


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("turn", [0, 7, 49, 50, 1234, 10**12])
def test_a_set_is_the_targets_and_then_the_permutation_from_its_turn_on(turn, gate):
    targets = torch.tensor([[[3, 3, 41, 0]], [[17, 49, 3, 8]]])  # of the next and of a further token
    classes, place, bias = tg.candidate_set(targets, int_tensor(turn, torch.int64), 20, 50, gate)
    assert sorted(classes.tolist()) == plain_set(targets.flatten().tolist(), turn, 20, 50, gate)
    wanted = {*targets.flatten().tolist()} | ({50} if gate else set())
    more = math.log((50 + gate - len(wanted)) / (20 - len(wanted)))
    assert bias.tolist() == pytest.approx([0.0 if label in wanted else more for label in classes.tolist()])
    expected = [classes.tolist().index(label) if label in classes else IGNORE for label in range(50 + gate)]
    assert place.tolist() == expected


def test_targets_that_have_no_loss_do_no_harm():
    """IGNORE is no label; at most it brings in a label that is then only another class."""
    targets = torch.tensor([[[IGNORE, 3], [IGNORE, 4]]])
    classes, place, _ = tg.candidate_set(targets, int_tensor(5, torch.int64), 20, 50, False)
    assert len(classes.unique()) == 20 and {3, 4} < set(classes.tolist()) <= set(range(50))
    assert (place != IGNORE).sum() == 20


@pytest.mark.parametrize("vocab_size, count", [(101, 16), (101, 64), (64, 16), (90, 20)])
def test_every_class_is_drawn_equally_often_in_a_cycle(vocab_size, count):
    """vocab_size sets in turn are a cycle; with few targets no class is left out or much preferred."""
    s, drawn = tiny_settings(candidates=count), Counter()
    stage = tg.stage_table(s)[0]
    steps = (tg.candidate_turn(s, stage, tg.World(), step, 0) for step in itertools.count())
    numbers = (first + row for first in steps for row in range(12))
    for turn in (number * (count + 1) for number in itertools.islice(numbers, vocab_size)):
        classes, *_ = tg.candidate_set(torch.tensor([[[7]]]), int_tensor(turn, torch.int64), count, vocab_size, False)
        drawn.update(classes.tolist())
    others = [drawn[label] for label in range(vocab_size) if label != 7]
    assert drawn[7] == vocab_size and sum(others) == vocab_size * (count - 1)
    assert max(others) - min(others) <= max(2, math.gcd(count + 1, vocab_size))


# --- the loss


def model_of(vocab_size: int = 50, candidates: int = 0, **changes):
    """A random model with its sampled loss switched on, and its settings."""
    s = tiny_settings(**changes)
    model = random_model(s, vocab_size)
    model.candidates = candidates
    return model, s


def the_set(targets, turn: int, count: int) -> tuple[list[int], torch.Tensor]:
    """Of the 50 classes of these models, as tested above; and what is added to their logits."""
    classes, _, bias = tg.candidate_set(targets.long(), int_tensor(turn, torch.int64), count, 50, False)
    return classes.tolist(), bias


def plain_losses(model, s, batch, mtp: int, turn: int, candidates: int):
    """Token by token: log of the sum over the set of its row, less the target's logit; (1 + mtp,) fp64."""
    x, head = stream(model, batch).double(), model.lm_head.double()
    targets = tg.future_targets(*batch[1:], mtp)
    total = [x.new_zeros(()) for _ in targets]
    for first in range(len(x)):
        block = targets[:, first:first + 1]
        chosen, bias = the_set(block, (turn + first) * (candidates + 1), candidates)
        for k, r, t in itertools.product(*map(range, block.shape)):
            if (target := block[k, r, t].item()) != IGNORE:
                z = cap(head[chosen] @ x[first + r, t], s)
                total[k] = total[k] + (z + bias).logsumexp(0) - z[chosen.index(target)]
    return torch.stack(total)


@pytest.mark.parametrize("mtp", [0, 2])
def test_losses_and_gradients_are_those_of_a_loop(mtp):
    model, s = model_of(candidates=44)
    batch, weights = random_batch(4, 16), torch.tensor([1.0, 0.5, 0.25][:mtp + 1])
    names, parameters = zip(*model.named_parameters(), strict=True)
    fast = losses(model, batch, mtp, turn=11)
    plain = plain_losses(model, s, batch, mtp, 11, 44)
    torch.testing.assert_close(fast.double(), plain, rtol=1e-5, atol=1e-4)
    gradients = [torch.autograd.grad((loss * weights).sum(), parameters) for loss in (fast, plain)]
    for name, one, other in zip(names, *gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * other.abs().max().item(), msg=name)


def test_the_gradient_of_the_head_is_that_of_finite_differences():
    model, s = model_of(candidates=40)
    batch = random_batch(2, 8)
    gradient = torch.autograd.grad(losses(model, batch, 1, turn=3).sum(), model.lm_head)[0]
    for label, column in [(batch[1, 0, 0].item(), 0), (batch[1, 1, 3].item(), 5), (20, 9), (49, 31)]:
        sides = []
        for step in (1e-4, -1e-4):
            with torch.no_grad():
                model.lm_head.data = model.lm_head.data.double()
                model.lm_head[label, column] += step
                sides.append(plain_losses(model, s, batch, 1, 3, 40).sum().item())
                model.lm_head[label, column] -= step
        assert gradient[label, column].item() == pytest.approx((sides[0] - sides[1]) / 2e-4, rel=1e-3, abs=1e-4)


def test_classes_outside_the_sets_have_no_gradient():
    model, s = model_of(candidates=40)
    batch = random_batch(2, 8)
    gradient = torch.autograd.grad(losses(model, batch, 1, turn=3).sum(), model.lm_head)[0]
    targets = tg.future_targets(*batch[1:], 1)
    inside = {*the_set(targets[:, 0], 3 * 41, 40)[0], *the_set(targets[:, 1], 4 * 41, 40)[0]}
    touched = {label for label in range(len(gradient)) if gradient[label].any()}
    assert touched == inside and 40 < len(inside) < 50


@pytest.mark.parametrize("pointer", [0, 8])
def test_all_classes_as_candidates_give_the_full_loss_and_gradients(pointer):
    """With 127 or 128 labels the padded vocabulary has no rows beside them."""
    vocab_size = 128 - bool(pointer)
    model, _ = model_of(vocab_size, pointer=pointer)
    batch, results = random_batch(4, vocab_size=vocab_size), []
    for candidates in (0, 128):
        model.candidates = candidates
        loss = losses(model, batch, 2, turn=5)
        results.append([loss, *torch.autograd.grad(loss.sum(), list(model.parameters()))])
    for full, sampled in zip(*results, strict=True):
        torch.testing.assert_close(sampled, full, rtol=1e-5, atol=1e-5 * full.abs().max().item())


def test_the_others_stand_for_all_that_are_no_targets():
    """Where all of these have the same logit the sampled loss is the full one, with any set."""
    model, _ = model_of(candidates=30)
    batch = random_batch(1, 8)
    with torch.no_grad():
        model.lm_head[50:] = -100.0  # padding
        targets = batch[1].unique().long()
        others = torch.ones(50, dtype=torch.bool).index_fill(0, targets, False).nonzero()[:, 0]
        model.lm_head[others] = model.lm_head[others[0]].clone()
        z = cap(stream(model, batch)[0] @ model.lm_head[:50].T, tiny_settings())
        full = torch.nn.functional.cross_entropy(z, batch[1][0].long(), reduction="sum")
    for turn in (0, 4, 9):
        torch.testing.assert_close(losses(model, batch, turn=turn)[0], full)


def test_in_evaluation_the_loss_is_full():
    """Whatever stage of the training it falls into."""
    model, _ = model_of()
    batch = random_batch()
    full = losses(model, batch, 1)
    model.candidates = 32
    assert not torch.equal(losses(model, batch, 1), full)
    with torch.no_grad():
        assert torch.equal(losses(model, batch, 1), full)


def test_the_gate_of_the_pointer_is_in_every_set():
    """Even where targets alone are more than the candidates: without it the mixture has no probability."""
    for turn, count in itertools.product(range(0, 300, 7), (2, 24, 39)):
        targets = torch.randperm(300, generator=torch.Generator().manual_seed(turn))[:40].view(1, 1, 40)
        classes, place, _ = tg.candidate_set(targets, int_tensor(turn, torch.int64), count, 300, True)
        assert 300 in classes and classes[place[300]] == 300 and len(classes.unique()) == count


@pytest.mark.parametrize("gate", [False, True])
def test_targets_of_all_classes_leave_nothing_to_stand_for(gate):
    """No other is in the set, and what is added stays 0, where a logarithm of 0 would make it NaN."""
    classes, _, bias = tg.candidate_set(torch.arange(50).view(1, 2, 25), int_tensor(3, torch.int64), 20, 50, gate)
    assert len(classes.unique()) == 20 and not bias.any()


# --- the same sets on any number of processes


def test_the_turn_of_a_row_depends_on_its_place_in_the_step_alone():
    found = {}
    for size, micro_rows in itertools.product((1, 2, 4), (2, 4)):
        s = tiny_settings(candidates=64, batch_tokens=16 * 16, micro_tokens=16 * micro_rows)
        stage, turns = tg.stage_table(s)[0], {}
        rows = stage.micro_rows(s, size)
        for step, micro_step, rank in itertools.product((0, 3), range(16 // size // rows), range(size)):
            first = tg.candidate_turn(s, stage, tg.World(rank, rank, size), step, micro_step)
            for k in range(rows):  # rows of a step go to processes as in Loader.make_batch
                turns[step, (micro_step * size + rank) * rows + k] = first + k
        found[size, micro_rows] = turns
    one = found[1, 2]
    assert len({*one.values()}) == 2 * 16 and all(turns == one for turns in found.values())


# --- settings


@pytest.mark.parametrize("argv, told", [
    ("--candidates 100", "--candidates 100 must be a multiple of 128"),
    ("--candidates -128", "must be >=0"), ("--candidates 128,256", "--candidates has 2 values"),
], ids=lambda x: x)
def test_bad_settings_are_told_in_a_sentence(argv, told):
    (sentence,) = problems(*argv.split())
    assert told in sentence and len(sentence) < 200


def test_targets_without_a_place_have_no_loss_and_are_counted():
    """More different targets than candidates: the rest is left out, as if it were IGNORE, and not in silence."""
    model, s = model_of(candidates=12)
    batch = random_batch(2, 16)
    batch[1] = torch.arange(32).view(2, 16)
    loss = losses(model, batch, turn=0)[0]
    assert int(model.left_out) == 2 * (16 - 12) and loss.isfinite()
    x, plain = stream(model, batch), 0.0
    for row, targets in enumerate(batch[1]):
        chosen, _ = the_set(targets, row * 13, 12)
        logs = cap(x[row] @ model.lm_head[chosen].T, s).log_softmax(-1)
        places = [(t, chosen.index(target)) for t, target in enumerate(targets.tolist()) if target in chosen]
        plain -= sum(logs[place].item() for place in places)
    assert loss.item() == pytest.approx(plain, rel=1e-5)
