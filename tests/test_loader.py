"""The loader and the validation stream: every token in its place, whatever the ranks, micro-steps, stops and epochs.

In most tests the shards together hold the tokens 1, 2, 3, ... with 0 (end of text) at the documents' starts, so that a
token says where in the corpus it lies: `place` recovers it, and batches are checked against the corpus by position."""
import json
import shutil
import tempfile
import threading
from concurrent import futures
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import documents, make_data, settings
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import train_gpt
from train_gpt import IGNORE, Loader, UserError, ValStream, World, evaluate, open_corpus, stage_at, stage_table

QUICK = hypothesis_settings(deadline=None, database=None, max_examples=40)
LONG = 10**9


def numbered(shards: list[list[int]], eot: bool = True) -> list[np.ndarray]:
    """Shards of documents of the given lengths, whose tokens are their places in the corpus; 0 starts a document."""
    made, total = [], 1
    for lengths in shards:
        tokens = np.arange(total, total + sum(lengths))
        if eot:
            tokens[np.cumsum([0, *lengths[:-1]])] = 0
        total += sum(lengths)
        made.append(tokens)
    return made


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    """A function (shards, eot) -> Corpus, each in a folder of its own."""
    base = tmp_path_factory.mktemp("corpora")

    def make(shards, eot: int | None = 0):
        folder = Path(tempfile.mkdtemp(dir=base)) / "data"
        return open_corpus(str(make_data(folder, train=shards, val=[np.arange(9)], vocab_size=65536, eot=eot)))
    yield make
    shutil.rmtree(base)


def start(s, corpus, rank: int = 0, size: int = 1, position=None, step: int = 0) -> Loader:
    """A loader whose `next` fails, rather than waits forever, if its threads never end a batch."""
    loader = Loader(s, corpus, World(rank, rank, size), position, step)
    original = loader.next

    def next_in_time(step: int):
        assert futures.wait([loader.pending], timeout=30).done, "no batch in 30 s"
        return original(step)
    loader.next = next_in_time
    return loader


def batches(s, corpus, rank: int = 0, size: int = 1, position=None, step: int = 0) -> list[tuple[torch.Tensor, dict]]:
    """What a process is given in all steps from `step` on."""
    loader = start(s, corpus, rank, size, position, step)
    try:
        return [loader.next(i) for i in range(step, s.iterations)]
    finally:
        loader.close()


def rows(batch: torch.Tensor) -> np.ndarray:
    """(micro-steps, 3, rows, T) -> (3, all rows, T)."""
    return batch.swapaxes(0, 1).flatten(1, 2).numpy()


def place(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Places in the corpus, from 0. An end-of-text token, 0, lies before its target: documents have two tokens."""
    return np.where(inputs == 0, targets - 2, inputs - 1)


def starts_of(shards: list[list[int]], max_len: int, clip: bool) -> set[int]:
    """Places where pieces start."""
    found, total = set(), 0
    for lengths in shards:
        for length in lengths:
            found |= set(range(total, total + (1 if clip else length), max_len))
            total += length
    return found


SHARDS = st.lists(st.lists(st.integers(2, 40), min_size=4, max_size=12), min_size=1, max_size=3)
CASES = st.fixed_dictionaries(dict(
    shuffle=st.booleans(), long_docs=st.sampled_from(["split", "clip"]), seq_len=st.sampled_from([1, 4, 8]),
    max_doc_len=st.sampled_from([0, 1, 3, 8, 100]), seed=st.integers(0, 3),
))


def case_settings(case: dict, **changes):
    """Four rows a step, ten steps: with these corpora several epochs."""
    row = case["seq_len"]
    return settings(**{**case, "batch_tokens": 4 * row, "micro_tokens": 4 * row, "iterations": 10, **changes})


def longest(case: dict) -> int:
    """Longest piece: a document is cut to max_doc_len, and to a row in any case."""
    return min(case["max_doc_len"] or case["seq_len"], case["seq_len"])


def usable(shards, case) -> bool:
    """The corpus holds a row at all."""
    per_document = longest(case) if case["long_docs"] == "clip" else LONG
    return max(sum(min(n, per_document) for n in lengths) for lengths in shards) > case["seq_len"] + 1


# --- what a batch is


@QUICK
@given(shards=SHARDS, case=CASES)
def test_rows_are_pieces_with_their_true_next_tokens(corpora, shards, case):
    """Targets follow inputs in the corpus, also at the end of a piece; rows start with a piece; document numbers rise
    by one at each further start and nowhere else; pieces obey max_doc_len; nothing is used twice an epoch."""
    assume(usable(shards, case))
    tokens = numbered(shards)
    stream, used = np.concatenate(tokens), set()
    borders = set(np.cumsum([len(shard) for shard in tokens]) - 1)  # a shard's last token is only a target
    starts = starts_of(shards, longest(case), case["long_docs"] == "clip")
    for batch, position in batches(case_settings(case), corpora(tokens)):
        assert batch.shape == (1, 3, 4, case["seq_len"]) and batch.dtype == torch.int32
        inputs, targets, docs = rows(batch)
        places = place(inputs, targets)
        assert np.array_equal(stream[places], inputs) and np.array_equal(stream[places + 1], targets)
        assert not borders & set(places.flat)
        new = np.isin(places, list(starts))
        assert new[:, 0].all() and np.array_equal(np.diff(docs), new[:, 1:])
        assert np.array_equal(np.diff(places)[~new[:, 1:]], np.ones((~new[:, 1:]).sum()))
        assert max(np.unique(row, return_counts=True)[1].max() for row in docs) <= longest(case)
        if position["epoch"] == 0:
            assert len(used | set(places.flat)) == len(used) + places.size
            used |= set(places.flat)


@QUICK
@given(shards=SHARDS, case=CASES, micro=st.sampled_from([1, 2, 4]))
def test_ranks_share_the_batch_of_one_process(corpora, shards, case, micro):
    """In each micro-step the ranks take neighbouring rows; together, in order, those of a single process."""
    assume(usable(shards, case))
    corpus, s = corpora(numbered(shards)), case_settings(case, micro_tokens=micro * case["seq_len"])
    alone = batches(s, corpus)
    for size in (2, 4):
        ranks = [batches(s, corpus, rank, size) for rank in range(size)]
        for step, (batch, position) in enumerate(alone):
            together = torch.stack([rank[step][0] for rank in ranks], dim=1)  # (micro-steps, ranks, 3, rows, T)
            assert together.shape[3] <= micro and all(rank[step][1] == position for rank in ranks)
            inputs, targets = together.permute(2, 0, 1, 3, 4).flatten(1, 3).numpy()[:2]
            assert np.array_equal(inputs, rows(batch)[0]) and np.array_equal(targets, rows(batch)[1])
            breaks = np.diff(together.permute(2, 0, 1, 3, 4).flatten(1, 3).numpy()[2]) > 0
            assert np.array_equal(breaks, np.diff(rows(batch)[2]) > 0)


@QUICK
@given(shards=SHARDS, case=CASES)
def test_micro_steps_do_not_change_the_batch(corpora, shards, case):
    assume(usable(shards, case))
    corpus = corpora(numbered(shards))
    row = case["seq_len"]
    by_four, by_two, by_one = (batches(case_settings(case, micro_tokens=n * row), corpus) for n in (4, 2, 1))
    for (four, at), (two, at_two), (one, at_one) in zip(by_four, by_two, by_one, strict=True):
        assert (len(four), len(two), len(one)) == (1, 2, 4) and at == at_two == at_one
        assert np.array_equal(rows(four), rows(two)) and np.array_equal(rows(four), rows(one))


@QUICK
@given(shards=SHARDS, case=CASES)
def test_a_saved_position_continues_exactly(corpora, shards, case):
    """After every step: in the middle of a shard, at the borders of shards and of epochs."""
    assume(usable(shards, case))
    corpus, s = corpora(numbered(shards)), case_settings(case)
    whole = batches(s, corpus)
    again = batches(s, corpus)
    for step, (batch, position) in enumerate(whole):
        assert torch.equal(again[step][0], batch) and again[step][1] == position
        saved = json.loads(json.dumps(position))  # as in a checkpoint
        if step in (0, 4, 8):
            rest = batches(s, corpus, position=saved, step=step + 1)
            for (batch_after, after), (expected, expected_after) in zip(rest, whole[step + 1:], strict=True):
                assert torch.equal(batch_after, expected) and after == expected_after


def test_the_position_is_that_of_the_batch_not_of_what_is_prepared_ahead(corpora):
    s = settings(seq_len=8, batch_tokens=8, micro_tokens=8, max_doc_len=8, shuffle=False)
    used = [position["used"] for _, position in batches(s, corpora(numbered([[8] * 20])))]
    assert used == [8 * step for step in range(1, 9)]


# --- order, epochs, shards


def shard_of(batch: torch.Tensor, shards: list[np.ndarray]) -> list[int]:
    """For each row the shard it is from."""
    inputs, targets, _ = rows(batch)
    ends = np.cumsum([len(shard) for shard in shards])
    found = np.searchsorted(ends, place(inputs, targets), side="right")
    assert (found == found[:, :1]).all(), "a row mixes shards"
    return found[:, 0].tolist()


def test_every_epoch_uses_every_shard_in_turn(corpora):
    """Three shards of nine rows and a bit: a step takes one shard, three steps are an epoch."""
    shards = numbered([[8] * 9 + [2]] * 3)
    s = settings(seq_len=8, batch_tokens=72, micro_tokens=72, iterations=9, max_doc_len=8, shuffle=False)
    found = batches(s, corpora(shards))
    assert [shard_of(batch, shards) for batch, _ in found] == [[0] * 9, [1] * 9, [2] * 9] * 3
    assert [position["epoch"] for _, position in found] == [0] * 3 + [1] * 3 + [2] * 3


@pytest.mark.parametrize("shuffle", [True, False])
def test_shuffled_epochs_hold_the_same_pieces_in_another_order(corpora, shuffle):
    shards = numbered([[8] * 9 + [1]] * 3)
    s = settings(seq_len=8, batch_tokens=216, micro_tokens=216, iterations=3, max_doc_len=8, shuffle=shuffle)
    epochs = [rows(batch)[0] for batch, _ in batches(s, corpora(shards))]
    published = np.concatenate([shard[:72].reshape(9, 8) for shard in shards])
    for i, epoch in enumerate(epochs):
        assert sorted(epoch.tolist()) == sorted(published.tolist())
        assert all(np.array_equal(epoch, other) != shuffle for other in (published, *epochs[:i]))


def test_shuffling_depends_on_the_seed(corpora):
    corpus = corpora(numbered([[8] * 20]))
    one, other = (rows(batches(settings(seed=seed, iterations=1), corpus)[0][0])[0] for seed in (0, 1))
    assert not np.array_equal(one, other)


def test_a_batch_may_cross_from_shard_to_shard_and_into_the_next_epoch(corpora):
    """One step's rows come from both shards and from the first again, in order."""
    shards = numbered([[8, 8, 2], [8, 8, 2]])
    s = settings(seq_len=8, max_doc_len=8, batch_tokens=40, micro_tokens=40, iterations=1, shuffle=False)
    (batch, position), = batches(s, corpora(shards))
    assert shard_of(batch, shards) == [0, 0, 1, 1, 0]
    assert position == {"epoch": 1, "shard": 0, "used": 8}


def test_one_shard_wraps_into_itself(corpora):
    s = settings(seq_len=8, max_doc_len=8, batch_tokens=40, micro_tokens=40, iterations=1, shuffle=False)
    (batch, position), = batches(s, corpora(numbered([[8, 8, 2]])))
    assert rows(batch)[0].tolist() == [[0, *range(2, 9)], [0, *range(10, 17)]] * 2 + [[0, *range(2, 9)]]
    assert position == {"epoch": 2, "shard": 0, "used": 8}


def test_empty_documents_are_pieces_of_one_token(corpora):
    """End-of-text tokens in a row, and tokens before the first one."""
    stream = [5, 6, 0, 0, 0, 7, 8, 0, 9, 1, 2, 3]
    s = settings(seq_len=4, max_doc_len=0, batch_tokens=8, micro_tokens=8, iterations=1, shuffle=False)
    (batch, _), = batches(s, corpora([stream]))
    inputs, targets, docs = rows(batch)
    assert inputs.tolist() == [[5, 6, 0, 0], [0, 7, 8, 0]] and targets.tolist() == [[6, 0, 0, 0], [7, 8, 0, 9]]
    assert (docs - docs[:, :1]).tolist() == [[0, 0, 1, 2], [0, 0, 0, 1]]


def test_clip_keeps_the_first_piece_of_a_document_and_split_all(corpora):
    corpus = corpora(numbered([[10, 5, 10, 2]]))
    s = dict(seq_len=4, max_doc_len=4, batch_tokens=12, micro_tokens=12, iterations=1, shuffle=False)
    (clipped, _), = batches(settings(**s, long_docs="clip"), corpus)
    (split, _), = batches(settings(**s, long_docs="split"), corpus)
    assert rows(clipped)[0].tolist() == [[0, 2, 3, 4], [0, 12, 13, 14], [0, 17, 18, 19]]
    assert rows(split)[0].tolist() == [[0, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 12]]


# --- without end-of-text tokens


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_without_documents_is_cut_elsewhere_in_every_epoch(corpora, shuffle):
    tokens = numbered([[101]], eot=False)
    s = settings(seq_len=8, max_doc_len=8, batch_tokens=8, micro_tokens=8, iterations=60, shuffle=shuffle)
    cuts, epochs = {}, {}
    for batch, position in batches(s, corpora(tokens, eot=None)):
        inputs, targets, docs = rows(batch)
        assert np.array_equal(targets, inputs + 1) and np.array_equal(np.diff(docs) > 0, np.diff(inputs) != 1)
        cuts.setdefault(position["epoch"], set()).add(int(inputs[0, 0] - 1) % 8)
        epochs.setdefault(position["epoch"], []).extend(inputs.flat)
    assert cuts[0] == {0} and all(len(set(used)) == len(used) for used in epochs.values())
    assert len(set().union(*cuts.values())) > 2 and all(len(cut) == 1 for cut in cuts.values())


def test_without_documents_and_without_max_doc_len_rows_follow_each_other(corpora):
    s = settings(seq_len=8, max_doc_len=0, batch_tokens=8, micro_tokens=8, iterations=4, shuffle=False)
    found = batches(s, corpora(numbered([[40]], eot=False), eot=None))
    assert [rows(batch)[0].tolist() for batch, _ in found] == [[list(range(8 * i + 1, 8 * i + 9))] for i in range(4)]
    assert not any(np.diff(rows(batch)[2]).any() for batch, _ in found)


def test_a_document_longer_than_a_row_goes_on_in_the_next_row(corpora):
    s = settings(seq_len=8, max_doc_len=0, batch_tokens=16, micro_tokens=16, iterations=2, shuffle=False)
    found = batches(s, corpora(numbered([[100]])))
    assert np.concatenate([place(*rows(batch)[:2]).ravel() for batch, _ in found]).tolist() == list(range(32))


# --- stages


@QUICK
@given(lengths=st.lists(st.integers(2, 60), min_size=12, max_size=20),
       caps=st.tuples(*[st.sampled_from([0, 3, 8, 20])] * 3))
def test_a_new_max_doc_len_neither_repeats_nor_skips(corpora, lengths, caps):
    """Unshuffled and split, the corpus is used from its start on without a gap, but for the tails of pieces that the
    end of a row cuts off; and a restored position continues there."""
    s = settings(stage_ends=(0.3, 0.6, 1.0), max_doc_len=caps, seq_len=8, batch_tokens=8, micro_tokens=8, iterations=9,
                 shuffle=False)
    corpus, stages = corpora(numbered([lengths])), stage_table(s)
    document = np.repeat(np.cumsum(lengths), lengths)  # place -> end of its document
    expected, found = 0, batches(s, corpus)
    for step, (batch, position) in enumerate(found):
        if position["epoch"]:
            break
        inputs, targets, _ = rows(batch)
        places, cap = place(inputs, targets)[0].tolist(), min(stage_at(stages, step).max_doc_len or 8, 8)
        assert places == list(range(places[0], places[0] + 8)) and places[0] == expected
        start = np.searchsorted(np.cumsum(lengths), places[-1], side="right")
        begin = int(np.cumsum([0, *lengths])[start])
        expected = min(int(document[places[-1]]), begin + ((places[-1] - begin) // cap + 1) * cap, sum(lengths) - 1)
        rest = batches(s, corpus, position=position, step=step + 1)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(rest, found[step + 1:], strict=True))


def test_batch_and_row_sizes_change_with_the_stage(corpora):
    s = settings(stage_ends=(0.5, 1.0), seq_len=(4, 8), batch_tokens=(16, 64), micro_tokens=16, iterations=4)
    shapes = [tuple(batch.shape) for batch, _ in batches(s, corpora(numbered([[9] * 60])))]
    assert shapes == [(1, 3, 4, 4)] * 2 + [(4, 3, 2, 8)] * 2


# --- the threads


@pytest.fixture
def no_thread_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.usefixtures("no_thread_left")
def test_an_error_in_the_background_is_raised_by_next_after_the_good_batches(tmp_path):
    """The second shard holds a token that the vocabulary lacks."""
    good, bad = documents(200, 0), documents(200, 1)
    bad[17] = 64
    corpus = open_corpus(str(make_data(tmp_path / "data", train=[good, bad])))
    loader = start(settings(iterations=50), corpus)
    with pytest.raises(UserError, match="data_train_000001.bin holds token id 64"):
        for step in range(50):
            loader.next(step)
    assert step >= 1
    loader.close()


@pytest.mark.usefixtures("no_thread_left")
def test_any_error_in_the_background_is_raised(corpora, monkeypatch):
    monkeypatch.setattr(Loader, "make_batch", lambda self, stage: 1 // 0)
    loader = start(settings(), corpora(numbered([[40] * 9])))
    with pytest.raises(ZeroDivisionError):
        loader.next(0)
    loader.close()


def test_a_row_longer_than_every_shard_is_told(corpora):
    with pytest.raises(UserError, match="row of 128 tokens|128 tokens of a row"):
        batches(settings(seq_len=128, batch_tokens=128), corpora(numbered([[40, 40], [30, 30]])))


@pytest.mark.usefixtures("no_thread_left")
@pytest.mark.parametrize("used", [0, 1, 3])
def test_close_ends_the_threads_whatever_is_ready(corpora, used):
    loader = start(settings(iterations=1000), corpora(numbered([[40] * 20])))
    for step in range(used):
        loader.next(step)
    loader.close()
    assert loader.pending.done()


@pytest.mark.usefixtures("no_thread_left")
def test_close_while_a_batch_waits_for_its_shard(corpora, monkeypatch):
    """Nobody asks for that batch any more, and what went wrong with it is not told."""
    opening, go, corpus = threading.Event(), threading.Event(), corpora(numbered([[40] * 20]))

    def slow(path, vocab_size):
        opening.set()
        assert go.wait(timeout=30)
        raise UserError("damaged")
    monkeypatch.setattr(train_gpt, "open_shard", slow)
    loader = start(settings(), corpus)
    assert opening.wait(timeout=30)
    closing = threading.Thread(target=loader.close)
    closing.start()
    go.set()
    closing.join(timeout=30)
    assert not closing.is_alive()


def test_a_batch_is_made_once_for_each_step_one_ahead_and_none_past_the_end(corpora, monkeypatch):
    """While a batch is in use the next one is made, though nobody asks for it; but no further one."""
    made, original = [], Loader.make_batch

    def spy(self, stage):
        made.append(stage)
        return original(self, stage)
    monkeypatch.setattr(Loader, "make_batch", spy)
    s = settings(iterations=5)
    loader = start(s, corpora(numbered([[40] * 20])), step=2)
    try:
        for step, count in ((2, 2), (3, 3), (4, 3)):
            loader.next(step)
            assert futures.wait([loader.pending], timeout=30).done
            assert len(made) == count
    finally:
        loader.close()
    assert len(made) == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_copies_to_the_gpu_are_those_of_the_cpu_however_far_the_device_lags(corpora):
    """Each batch has pinned memory of its own until its copy is done, also behind a long queue of products."""
    corpus, changes = corpora(numbered([[40] * 20])), dict(iterations=40, batch_tokens=512, micro_tokens=128)
    expected = [batch for batch, _ in batches(settings(**changes), corpus)]
    loader, found = start(settings(**changes, device="cuda"), corpus), []
    busy = torch.randn(4096, 4096, device="cuda")
    try:
        for step in range(40):
            for _ in range(5):
                busy = busy @ busy * 1e-4
            assert futures.wait([loader.pending], timeout=30).done
            found.append(loader.next(step)[0])
    finally:
        loader.close()
    assert all(batch.is_cuda and torch.equal(batch.cpu(), e) for batch, e in zip(found, expected, strict=True))


# --- validation stream


@QUICK
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), seq_len=st.integers(1, 40),
       size=st.sampled_from([1, 2, 4]), count=st.integers(1, 5), cut=st.floats(0, 1))
def test_every_validation_target_counts_exactly_once(corpora, lengths, seq_len, size, count, cut):
    tokens = numbered([[n] for n in lengths], eot=False)
    available = sum(lengths) - 1
    assume(available)
    wanted = max(1, int(cut * available))
    corpus = corpora([np.arange(9)])._replace(val=corpora(tokens, eot=None).train)
    stream = ValStream(corpus, wanted, seq_len)
    seen = []
    for start in range(0, stream.num_rows, count * size):
        for rank in range(size):
            inputs, targets, _ = stream.rows(start + rank * count, count)
            assert inputs.shape == (count, seq_len)
            counts = targets != IGNORE
            assert np.array_equal(inputs[counts] + 1, targets[counts])
            seen += targets[counts].tolist()
    assert seen == list(range(2, wanted + 2))


def test_validation_documents_are_separated_and_padding_is_ignored(corpora):
    corpus = corpora([np.arange(9)])._replace(val=corpora([[0, 5, 6, 0, 7], [8, 0, 9, 4]]).train)
    inputs, targets, docs = ValStream(corpus, 0, 3).rows(0, 4)
    assert inputs.tolist() == [[0, 5, 6], [0, 7, 8], [0, 9, 0], [0, 0, 0]]
    assert targets.tolist() == [[5, 6, 0], [7, 8, 0], [9, 4, IGNORE], [IGNORE] * 3]
    flat = docs.flatten()
    assert (np.diff(flat) >= 0).all() and [row[0] for row in docs[:3]] == [1, 2, 3]
    assert docs[0].tolist() == [1] * 3 and docs[1].tolist() == [2] * 3 and docs[2, :2].tolist() == [3] * 2


def test_evaluation_does_not_depend_on_micro_tokens(corpora, tmp_path):
    corpus = open_corpus(str(make_data(tmp_path / "data")))
    model, values = train_gpt.GPT(settings(), 64), []
    torch.nn.init.normal_(model.lm_head, generator=torch.Generator().manual_seed(0))
    for micro in (32, 96, 4096):
        s = settings(micro_tokens=micro)
        values.append(evaluate(model, ValStream(corpus, 300, 32), s, World(), 32))
    assert values == pytest.approx([values[0]] * 3, rel=1e-6) and 1 < values[0] < 50


def test_evaluation_is_the_mean_over_the_targets(corpora):
    """With a `model` whose loss is the sum of the targets the mean is known exactly."""
    def total(inputs, targets, docs, window):
        assert window == 24
        return targets[targets != IGNORE].sum().double()[None]
    total.cos, total.sin = train_gpt.rotary_table(7, settings().head_dim, 1024.0)
    corpus = corpora([np.arange(9)])._replace(val=corpora(numbered([[101]], eot=False), eot=None).train)
    stream = ValStream(corpus, 50, 7)
    for micro in (7, 21, 1000):
        s = settings(micro_tokens=micro, eval_window=24)
        assert evaluate(total, stream, s, World(), 8) == pytest.approx(sum(range(2, 52)) / 50)


def test_evaluation_window_is_that_of_the_step_unless_set(corpora):
    seen = []

    def spy(inputs, targets, docs, window):
        seen.append((int(window), spy.cos.clone()))
        return torch.zeros(1)
    spy.cos, spy.sin = tables = train_gpt.rotary_table(4, settings().head_dim, 1024.0)
    before = spy.cos.clone()
    corpus = corpora([np.arange(9)])
    for eval_window in (0, 16):
        evaluate(spy, ValStream(corpus, 0, 4), settings(eval_window=eval_window), World(), 8)
    half = len(seen) // 2
    assert {window for window, _ in seen[:half]} == {8} and {window for window, _ in seen[half:]} == {16}
    assert all(torch.equal(cos, before) for _, cos in seen[:half]), "a window of training keeps the frequencies"
    slower = train_gpt.rotary_table(4, settings().head_dim, 1024.0, 8, 16)[0]
    assert all(torch.equal(cos, slower) for _, cos in seen[half:]) and not torch.equal(slower, before)
    assert torch.equal(tables[0], before), "restored"
