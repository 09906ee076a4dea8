"""evals/extra_losses.py: each token once, the usual loss of training, the matcher against a loop, a valid mixture."""
import json
import re

import helpers
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as profile
from hypothesis import strategies as st

import train_gpt
import train_moe
from evals import extra_losses
from evals.extra_losses import LENGTHS, copies, fit_weights, latest_matches, mixture_losses, token_losses

EOT = helpers.EOT
STREAM = helpers.documents(300, 4)


def random_model(**changes) -> torch.nn.Module:
    """A tiny model whose every parameter is random, and rotary tables of 512 tokens."""
    s, random = helpers.settings(eval_seq_len=512, **changes), torch.Generator().manual_seed(1)
    model = train_gpt.GPT(s, helpers.VOCAB).requires_grad_(False)
    for name, p in model.named_parameters():
        if name != "scalars":
            p.normal_(std=0.3, generator=random)
    return model


MODEL = random_model(ngram_rows=50, pointer=8)


# --- rows


def usual_losses(tokens: np.ndarray, row_len: int) -> np.ndarray:
    """As training's evaluation: rows of its stream, one after the other."""
    losses = []
    for start in range(0, len(tokens) - 1, row_len):
        row = tokens[start:start + row_len + 1].astype(np.int32)
        batch = torch.from_numpy(np.stack([row[:-1], row[1:], np.cumsum(row[:-1] == EOT)]).astype(np.int32))[:, None]
        losses.append(extra_losses.target_losses(MODEL, batch, 32, 99))
    return torch.cat(losses).double().numpy()


@pytest.mark.parametrize("total, row_len", [(300, 64), (300, 299), (257, 64), (258, 64), (2, 64), (50, 7)])
def test_without_overlap_the_losses_are_the_usual_ones(total, row_len):
    found = token_losses(MODEL, STREAM[:total], EOT, 32, row_len)
    np.testing.assert_allclose(found, usual_losses(STREAM[:total], row_len), atol=2e-5)


@pytest.mark.parametrize("total, row_len, context", [
    (300, 64, 32), (300, 64, 63), (300, 64, 1), (97, 64, 32), (98, 64, 32), (65, 64, 32), (66, 64, 32), (2, 64, 32)])
def test_each_token_is_scored_once_with_its_context(monkeypatch, total, row_len, context):
    """A stand-in for the model returns for each target its place in the stream and what it could see."""
    tokens, places = np.arange(total), []

    def spy(model, batch, window, at_a_time):
        inputs, targets, docs = batch
        scored = targets != -1
        assert (targets[scored] == inputs[scored] + 1).all() and (docs.diff(dim=1) >= 0).all()
        before = torch.arange(row_len).expand_as(inputs)[scored]
        places.extend(zip(targets[scored].tolist(), (before + 1).tolist(), strict=True))
        return targets[scored].float()

    monkeypatch.setattr(extra_losses, "target_losses", spy)
    found = token_losses(MODEL, tokens, None, 32, row_len, context)
    assert found.tolist() == [place for place, _ in places] == list(range(1, total))
    assert all(seen >= min(place, context + 1) for place, seen in places)


@pytest.mark.parametrize("context", [0, 50, 200])
def test_a_row_as_long_as_the_stream_has_the_loss_of_whole_documents(context):
    whole = token_losses(MODEL, STREAM, EOT, 32, 512, context)
    np.testing.assert_allclose(whole, usual_losses(STREAM, len(STREAM) - 1), atol=2e-5)
    ends = [*np.flatnonzero(STREAM[:-1] == EOT), len(STREAM) - 1]
    alone = [usual_losses(STREAM[a:b + 1], 512) for a, b in zip(ends, ends[1:], strict=False)]
    np.testing.assert_allclose(whole, np.concatenate(alone), atol=1e-4)


def test_more_context_changes_the_losses_at_the_starts_of_rows_only():
    usual, sliding = (token_losses(MODEL, STREAM, EOT, 16, 128, context) for context in (0, 64))
    assert (usual[:128] == sliding[:128]).all() and np.abs(usual - sliding).max() > 0.1


# --- matches


def brute_force(tokens: list[int], eot: int | None) -> list[tuple[int, int]]:
    """O(T^2) pairs of places, each compared token by token."""
    found, begin = [], 0
    for t, token in enumerate(tokens):
        begin = t if token == eot else begin
        best = (0, -1)
        for end in range(begin, t):
            run = 0
            while end - run >= begin and tokens[end - run] == tokens[t - run]:
                run += 1
            best = max(best, (max((n for n in LENGTHS if n <= run), default=0), end))
        found.append(best if best[0] else (0, -1))
    return found


@profile(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 3), st.lists(st.integers(0, 3), min_size=1, max_size=90), st.sampled_from([None, 0, 3]))
def test_the_matcher_is_that_of_a_loop(repeats, tokens, eot):
    tokens = tokens * repeats
    length_N, place_N = latest_matches(np.array(tokens, dtype=np.uint16), eot)
    assert list(zip(length_N.tolist(), place_N.tolist(), strict=True)) == brute_force(tokens, eot)


@given(st.lists(st.integers(0, 2), min_size=2, max_size=60), st.data())
def test_a_changed_token_moves_no_earlier_copy(tokens, data):
    """Of the tokens before it; nor does whether a token is hit depend on anything after it."""
    cut, tokens = data.draw(st.integers(1, len(tokens) - 1)), np.array(tokens)
    other = np.concatenate((tokens[:cut], data.draw(st.permutations(tokens[cut:].tolist())) + [1]))
    for one, two in zip(copies(tokens, 0, (4, 9)), copies(other, 0, (4, 9)), strict=True):
        assert (one[:cut - 1] == two[:cut - 1]).all()
    one, two = (latest_matches(x, 0)[1][:cut] for x in (tokens, other))
    assert (one == two).all() and (one < np.arange(cut)).all(), "matches end before the last token seen"


def test_buckets_are_of_length_and_distance():
    tokens = np.array([9, 1, 2, 3, 4, 1, 2, 3, 5, 5, 5, 1, 2, 9, 9, 9, 9, 4])
    hit, bucket = copies(tokens, None, (4, 6))
    assert hit.tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 0]
    assert bucket.tolist() == [30, 30, 30, 30, 30, 0, 3, 6, 30, 0, 3, 1, 4, 2, 0, 3, 6]


# --- mixture


def a_case(seed: int) -> tuple:
    """LM distributions (N, V), tokens to copy (N,), buckets, weights: at random."""
    random = np.random.default_rng(seed)
    p_NV = random.dirichlet(np.ones(9) * 0.3, size=200)
    return p_NV, random.integers(9, size=200), random.integers(31, size=200), random.random(31)


@pytest.mark.parametrize("seed", range(3))
def test_the_mixture_is_a_distribution(seed):
    p_NV, copy_N, bucket_N, weights = a_case(seed)
    mixed = [mixture_losses(-np.log(p_NV[:, y]), copy_N == y, weights[bucket_N]) for y in range(9)]
    np.testing.assert_allclose(np.exp(-np.stack(mixed)).sum(0), 1, atol=1e-12)


def test_without_weight_the_mixture_is_the_model():
    p_NV, copy_N, *_ = a_case(0)
    np.testing.assert_allclose(mixture_losses(-np.log(p_NV[:, 4]), copy_N == 4, 0.0), -np.log(p_NV[:, 4]), rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_weights_are_the_best_ones(seed):
    """Against a grid, with the one token more that is no hit."""
    p_NV, copy_N, bucket_N, _ = a_case(seed)
    target = np.array([np.random.default_rng(i).choice(9, p=p) for i, p in enumerate(p_NV)])
    target = np.where(np.arange(200) % 3, target, copy_N)
    losses, hit = -np.log(p_NV[np.arange(200), target]), copy_N == target
    weights = fit_weights(losses, hit, bucket_N)
    for b in range(30):
        own, grid = bucket_N == b, np.linspace(0, 0.999, 1000)
        sums = [mixture_losses(losses[own], hit[own], w).sum() - np.log(1 - w) for w in grid]
        assert weights[b] == pytest.approx(grid[np.argmin(sums)], abs=2e-3)
    assert 0 < weights.max() < 1 and mixture_losses(losses, hit, weights[bucket_N]).mean() < losses.mean()


def test_buckets_of_hits_alone_and_of_nothing():
    losses, buckets = np.full(10, 5.0), np.zeros(10, dtype=int)
    weights = fit_weights(losses, np.ones(10, dtype=bool), buckets)
    assert 0.8 < weights[0] < 10 / 11 and not weights[1:].any()
    assert not fit_weights(losses, np.zeros(10, dtype=bool), buckets).any()


# --- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs of two scripts, x and moe, whose training and validation splits are of one kind."""
    root = tmp_path_factory.mktemp("trained")
    extra = dict(ngram_rows=64, pointer=8, iterations=30, eval_every=30, eval_seq_len=64)
    assert train_gpt.main(helpers.tiny(root, **extra)) == 0
    assert train_moe.main(helpers.tiny(root, **extra, num_experts=4, experiment_name="moe")) == 0
    return root


def run(capsys, *flags) -> tuple[int, str, str]:
    capsys.readouterr()
    code = extra_losses.main(["--device", "cpu", *map(str, flags)])
    return code, *capsys.readouterr()


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"(\d+\.\d{4}) nats/token", text)]


@pytest.mark.parametrize("name", ["x", "moe"])
def test_the_usual_loss_is_that_of_training(trained, capsys, name):
    code, out, err = run(capsys, "--checkpoint", place := trained / "logs" / name, "--context", 48)
    assert code == 0 and out.count("\n") == 3 and "300 tokens in rows of 64" in err, err
    [usual, sliding, mixed] = numbers(out)
    loss = helpers.losses(helpers.run_folder(trained, name))["val_loss"][30]
    assert usual == pytest.approx(loss, abs=1e-4) and sliding != usual and mixed != usual
    assert "at least 48 tokens" in out and "weights from 300 training tokens" in out
    few = run(capsys, "--checkpoint", place, "--tokens", 100, "--row-len", 101, "--fit-tokens", 50)
    assert few[0] == 0 and len(set(numbers(few[1])[:2])) == 1 and "from 50 training tokens" in few[1]


@pytest.mark.parametrize("flags, problem", [
    (["--context", 64], "--context 64, rows of 64 tokens"), (["--tokens", -1, "--device", "tpu"], "--device tpu"),
    (["--tokens", "x"], "--tokens x: expected an integer"), (["--tokens", 10**6], "--eval_tokens 1000000"),
    (["--row-len", 1, "--context", 1], "--context 1, rows of 1"), (["--row-lens", 1], "--row-lens")])
def test_wrong_input_is_one_sentence(trained, capsys, flags, problem):
    code, out, err = run(capsys, "--checkpoint", trained / "logs", *flags)
    assert (code, out, err.count("\n")) == (1, "", 1) and problem in err and "Traceback" not in err


def test_other_data_is_refused(trained, tmp_path, capsys):
    path = next(trained.glob("logs/x/*/checkpoints/step_000030"))
    meta = json.loads((path / "meta.json").read_text())
    meta["settings"]["data"] = str(helpers.make_data(tmp_path / "data", val=[helpers.documents(500, 8)]))
    (path / "meta.json").rename(path / "kept.json")
    (path / "meta.json").write_text(json.dumps(meta))
    try:
        assert "holds other data than" in run(capsys, "--checkpoint", path)[2]
    finally:
        (path / "kept.json").rename(path / "meta.json")
