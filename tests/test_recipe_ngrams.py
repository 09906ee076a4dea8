"""The hashed n-gram table: rows and signs against a loop, its optimizer against a dense one, cycles and resuming."""
import functools
import itertools
import operator

import pytest
import torch
from helpers import flatten_state
from recipe import (
    assert_same_optimizer,
    int_tensor,
    losses,
    problems,
    random_batch,
    random_model,
    stream,
    tiny_settings,
)

import train_gpt as tg

ROWS, STEPS = 24, 7  # few rows: they collide often, within a batch and between pairs and triples


def start_of_document(docs, row: int, t: int) -> int:
    while t and docs[row, t - 1] == docs[row, t]:
        t -= 1
    return t


def plain_rows(inputs, docs, half: int) -> list[tuple[int, int]]:
    """(row, number of the signs) of pair and triple of each token, in the order of kind, row, token; the last row of
    each half, and the first signs, where the document begins too late."""
    found = []
    for n, row, t in itertools.product((1, 2), *map(range, inputs.shape)):
        number, kind = half - 1, 0
        if t - n >= start_of_document(docs, row, t):
            tokens = [inputs[row, t - k].item() for k in range(n + 1)]
            hashed = functools.reduce(operator.xor, map(operator.mul, tokens, tg.NGRAM_FACTORS))
            number, kind = hashed % (half - 1), (hashed >> 20) % tg.NGRAM_SIGNS
        found.append(((n - 1) * half + number, kind))
    return found


def model_of(**changes):
    """A random model with a table, and its settings."""
    s = tiny_settings(**{"ngram_rows": ROWS, **changes})
    return random_model(s, std=0.1), s


@pytest.mark.parametrize("half", [3, 12, 50_000])
def test_rows_and_signs_are_those_of_a_loop(half):
    inputs, _, docs = random_batch(3, 20, vocab_size=50_257)
    rows, kinds = tg.ngram_rows(inputs, docs, half)
    assert list(zip(rows.flatten().tolist(), kinds.flatten().tolist(), strict=True)) == plain_rows(inputs, docs, half)
    assert rows[0].max() < half <= rows[1].min() and rows.max() < 2 * half


def test_nothing_of_another_document_is_in_rows_or_signs():
    """Not even where there is no history: a first token has the same vector in whatever document it stands."""
    inputs, _, docs = random_batch(4, 20, vocab_size=50_257)
    for number in range(3):
        own = (docs == number)
        changed = torch.where(own, inputs, (inputs + 17) % 50_257)
        for before, after in zip(tg.ngram_rows(inputs, docs, 1000), tg.ngram_rows(changed, docs, 1000),
                                 strict=True):
            assert torch.equal(before[:, own.flatten()], after[:, own.flatten()])
            assert not torch.equal(before[:, ~own.flatten()], after[:, ~own.flatten()])


def test_rows_and_signs_of_different_pairs_are_spread_evenly():
    """As by chance: of 4,000 different triples about 1 - 1/e fill 4,000 rows, and few share both row and signs."""
    tokens = torch.randint(50_257, (1, 4002), generator=torch.Generator().manual_seed(0))
    rows, kinds = (x[:, 2:] for x in tg.ngram_rows(tokens, torch.zeros_like(tokens), 4001))
    for row, kind in zip(rows, kinds, strict=True):
        assert len(row.unique()) == pytest.approx(4000 * (1 - 1 / 2.718), rel=0.03)
        assert len((row * tg.NGRAM_SIGNS + kind).unique()) > 3995
        assert len(kind.unique()) == pytest.approx(tg.NGRAM_SIGNS * (1 - 2.718 ** (-4000 / tg.NGRAM_SIGNS)), rel=0.05)


def test_the_vector_of_a_token_is_the_signed_sum_of_its_two_rows():
    model, _ = model_of()
    inputs, _, docs = random_batch()
    with torch.no_grad():
        found = model.ngrams(inputs, docs)
    table, signs = model.ngrams.table, model.ngrams.signs
    assert signs.shape == (tg.NGRAM_SIGNS, 32) and signs.abs().eq(1).all() and abs(signs.mean()) < 0.01
    plain = [table[row] * signs[kind] for row, kind in plain_rows(inputs, docs, ROWS // 2)]
    pairs, triples = torch.stack(plain).view(2, *inputs.shape, 32)
    torch.testing.assert_close(found, pairs + triples)


def test_vectors_of_zeros_change_no_bit_of_the_model():
    """A new table is the model without one: same initial weights, same losses."""
    with_table, without = (tg.GPT(tiny_settings(ngram_rows=rows), 50) for rows in (ROWS, 0))
    others = {name: p for name, p in with_table.named_parameters() if not name.startswith("ngrams")}
    expected = dict(without.named_parameters())
    assert others.keys() == expected.keys() and all(torch.equal(others[name], p) for name, p in expected.items())
    with torch.no_grad():
        for name, p in expected.items():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
            others[name].copy_(p)
    batch = random_batch()
    one, other = (losses(model, batch) for model in (with_table, without))
    assert not with_table.ngrams.table.any() and torch.equal(one, other)


def test_each_layer_adds_the_vectors_with_a_weight_of_its_own(monkeypatch):
    """What a block gets is what the one before gave, the first one the embeddings, and its weight times the vectors."""
    model, _ = model_of()
    batch, taken, before = random_batch(), [], []

    def forward(self, x_BTD, x0_BTD, *rest, forward=tg.Block.forward):
        before.extend([] if before else [x0_BTD])
        taken.append(x_BTD)
        before.append(forward(self, x_BTD, x0_BTD, *rest))
        return before[-1]
    monkeypatch.setattr(tg.Block, "forward", forward)
    with torch.no_grad():
        losses(model, batch)
        found = model.ngrams(batch[0], batch[2])
    for x, y, weight in zip(taken, before[:-1], model.ngrams.weight, strict=True):
        torch.testing.assert_close(x, y + weight * found)
    assert found.any() and model.ngrams.weight.unique().numel() == 3


def test_future_tokens_and_other_documents_change_nothing():
    model, _ = model_of(ngram_rows=1000)
    batch = random_batch(2, 16)
    inputs, targets, docs = batch
    before = stream(model, batch)
    changed = inputs.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    after = stream(model, torch.stack([changed, targets, docs]))
    assert torch.equal(before[:, :9], after[:, :9]) and not torch.equal(before[:, 9], after[:, 9])
    for row in range(len(inputs)):
        own = docs[row] == docs[row, -1]
        changed = torch.where(own, inputs[row], (inputs[row] + 1) % 50)[None]
        after = stream(model, torch.stack([changed, targets[row:row + 1], docs[row:row + 1]]))
        torch.testing.assert_close(after[0, own], before[row, own], rtol=1e-5, atol=1e-5)


# --- the optimizer


class DenseTable:
    """The reference: a gradient for every row, all second moments decay at every event, all in fp64; rows without a
    gradient stay."""

    def __init__(self, model, s):
        self.model, self.s, self.events = model, s, 0
        (self.rule,) = (rule for rule in tg.parameter_table(s) if rule.kind == "rows")
        self.table = model.ngrams.table.detach().double().clone()
        self.square, self.grad = torch.zeros(len(self.table)).double(), torch.zeros_like(self.table)
        self.seen = torch.zeros(len(self.table), dtype=torch.bool)

    def backward(self, batch, parts: int = 1):
        """Adds the gradient of the mean loss, over micro-steps, by the whole table."""
        inputs, targets, docs = batch
        table = self.model.ngrams.table.detach().clone().requires_grad_()
        rows, kinds = tg.ngram_rows(inputs, docs, len(table) // 2)
        found = (table[rows] * self.model.ngrams.signs[kinds]).sum(0).view(*inputs.shape, -1)
        loss = self.model.calculate(inputs, targets[None], docs, int_tensor(8), found)
        self.grad += torch.autograd.grad(loss.sum() / inputs.numel() / parts, table)[0].double()
        self.seen[rows.flatten()] = True

    def event(self, scale: float):
        s, rule, seen = self.s, self.rule, self.seen
        self.events += 1
        beta2 = rule.betas[1]
        assert rule.betas[0] == 0
        self.square = beta2 * self.square + (1 - beta2) * self.grad.square().mean(1)
        root = (self.square / (1 - beta2**self.events)).sqrt() + rule.eps
        update = self.grad / root[:, None]
        decay = rule.weight_decay * scale * self.table * ((update * self.table >= 0) if s.cautious else 1)
        self.table[seen] -= (rule.lr * scale * (update + decay))[seen]
        self.grad.zero_()
        self.seen = torch.zeros_like(seen)


def trained(s, model, optimizer, steps: range, dense: DenseTable | None = None, rows: int = 2):
    """Steps of `rows` rows and a changing rate, the first half of them in two micro-steps; the table after each."""
    tables = []
    for step in steps:
        batch = random_batch(rows, vocab_size=8, seed=step)
        parts = batch.chunk(2 if step % 2 else 1, dim=1)
        for i, part in enumerate(parts):
            if dense:
                dense.backward(part, len(parts))
            optimizer.last_micro_step = i == len(parts) - 1
            (losses(model, part)[0] / batch[0].numel()).backward()
        optimizer.step(1.0 - 0.1 * step, 0.9)
        if dense and (step + 1) % s.ngram_every == 0:
            dense.event(1.0 - 0.1 * step)
        tables.append(model.ngrams.table.detach().clone())
    return tables


@pytest.mark.parametrize("every, cautious", [(1, True), (1, False), (3, True)])
def test_training_is_that_of_a_dense_table(every, cautious):
    """Duplicates within a batch and cycle add up before the square; a row that was not seen owes the decay of its
    second moment and pays at its next event."""
    model, s = model_of(ngram_every=every, cautious=cautious, adam_weight_decay=0.5)
    optimizer = tg.MuonAdamW(model, s, tg.World())
    dense = DenseTable(model, s)
    trained(s, model, optimizer, range(STEPS), dense)
    torch.testing.assert_close(model.ngrams.table.double(), dense.table, rtol=1e-4, atol=1e-4)
    assert (dense.square > 0).sum() > ROWS // 2


def test_rows_that_were_not_seen_keep_their_bits():
    """Neither the rate nor the decay moves them; nor does looking them up without a gradient."""
    model, s = model_of(ngram_rows=1000, adam_weight_decay=0.5)
    optimizer = tg.MuonAdamW(model, s, tg.World())
    before, seen = model.ngrams.table.detach().clone(), set()
    for step in range(3):
        inputs, _, docs = batch = random_batch(2, seed=step)
        seen |= {row for row, _ in plain_rows(inputs, docs, 500)}
        losses(model, batch)[0].backward()
        with torch.no_grad():
            losses(model, random_batch(2, seed=100 + step))
        optimizer.step(1.0, 0.9)
    moved = {row for row in range(1000) if not torch.equal(model.ngrams.table[row], before[row])}
    assert moved == seen and 50 < len(seen) < 200


def test_second_moment_decays_for_the_events_that_a_row_missed():
    """A row seen in events 1 and 5, with gradients g and h: v = beta2^4 (1 - beta2) g^2 + (1 - beta2) h^2."""
    model, s = model_of(ngram_rows=1000)
    optimizer, beta2 = tg.MuonAdamW(model, s, tg.World()), 0.95
    (rule,) = (rule for rule in tg.parameter_table(s) if rule.kind == "rows")
    assert rule.betas == (0.0, beta2)
    once, others, dense = random_batch(1, seed=0), random_batch(1, seed=1), DenseTable(model, s)
    row = next(iter({r for r, _ in plain_rows(once[0], once[2], 500)} - {r for r, _ in plain_rows(*others[::2], 500)}))
    squares = []
    for step in range(5):
        batch = once if step in (0, 4) else others
        if batch is once:
            dense.grad.zero_()
            dense.backward(batch)
            squares.append(dense.grad[row].square().mean())
        (losses(model, batch)[0] / batch[0].numel()).backward()
        optimizer.step(1.0, 0.9)
    square = optimizer.state_dict()["state"]["square"]["ngrams.table"]
    assert len(square) == 1000
    expected = (1 - beta2) * (beta2**4 * squares[0] + squares[1])
    assert square[row].item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_cycle_makes_one_update_of_its_rows():
    model, s = model_of(ngram_every=3)
    tables = [model.ngrams.table.detach().clone(), *trained(s, model, tg.MuonAdamW(model, s, tg.World()), range(7))]
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(tables)]
    assert moved == [False, False, True, False, False, True, False]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("after", [2, 3, 4])
def test_resuming_inside_a_cycle_is_exact(after, dtype):
    """after 2: two steps wait; 3: none; 4: one."""
    model, s = model_of(ngram_every=3, dtype=dtype)
    optimizer = tg.MuonAdamW(model, s, tg.World())
    trained(s, model, optimizer, range(after))
    saved = optimizer.state_dict()
    kept = {name: x.dtype for name, x in flatten_state(saved["state"]).items()}
    waiting = {f"/{key}/ngrams.table": kept.pop(f"/{key}/ngrams.table", None) for key in ("rows", "grads")}
    assert set(kept.values()) == {torch.float32}  # so dtype may change
    assert (waiting["/rows/ngrams.table"] == torch.int64) == (after != 3)
    whole = trained(s, model, optimizer, range(after, 8))[-1]
    other = random_model(s, std=0.1, seed=5)
    resumed = tg.MuonAdamW(other, s, tg.World())
    trained(s, other, resumed, range(1))  # what it holds itself must go
    resumed.load_state_dict(saved)
    assert torch.equal(trained(s, other, resumed, range(after, 8))[-1], whole)
    assert_same_optimizer(resumed, optimizer)


def test_the_memory_check_counts_the_table():
    small, large = (tg.expected_memory(tiny_settings(ngram_rows=rows), 64, 1) for rows in (1000, 1_000_000))
    assert large - small >= 2 * 32 * 999_000
    assert tg.expected_memory(tiny_settings(ngram_rows=1_000_000), 64, 4) < large / 3


@pytest.mark.parametrize("argv, told", [
    ("--ngram-rows 2", "--ngram_rows 2: at least 4"), ("--ngram-rows 7", "--ngram_rows 7: "),
    ("--ngram-rows -4", "--ngram_rows -4: must be >=0"), ("--ngram-every 2", "--ngram_every: has no effect without"),
    ("--ngram-rows 64 --ngram-every 0", "--ngram_every 0: must be >0"),
    ("--ngram-rows 2000000000", "GiB"),
], ids=lambda x: x)
def test_bad_settings_are_told_in_a_sentence(argv, told):
    (sentence,) = problems(*argv.split())
    assert told in sentence and len(sentence) < 200


def test_columns_that_processes_cannot_share_are_told():
    told = problems("--ngram-rows", "66", "--batch-tokens", "1280", world_size=5)
    assert "--ngram_rows 66" in told[0] and "--width 192" in told[0] and "5 processes" in told[0] and len(told) == 1
