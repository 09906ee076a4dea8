"""evals/hellaswag.py: constructed scorers, packing, normalizations, file, download, and wrong input."""
import dataclasses
import io
import json
import re
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import helpers
import hypothesis
import moe
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import train_gpt
import train_moe
from evals import hellaswag
from evals.hellaswag import Task, does_not_apply, ending_losses, fill_rows, pack, read_tasks, score

VOCAB, EOT = helpers.VOCAB, helpers.EOT
GPT2 = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256}
BYTES = {"tokenizer": {"kind": "byte"}, "vocab_size": 257, "eot": 256}
CHARS = {"tokenizer": {"kind": "char", "chars": "\nab"}, "vocab_size": 3, "eot": None}


def encode(text: str) -> list[int]:
    """Stands in for GPT-2's tokenizer: a number is a token."""
    return [int(word) for word in text.split()]


def spell(tokens) -> str:
    return " ".join(map(str, tokens))


def made_up(count: int, seed: int = 0) -> list[Task]:
    """Tasks whose true ending goes on counting in steps of 1 and whose wrong ones count in steps of 2 to 4."""
    rng, tasks = np.random.default_rng(seed), []
    for _ in range(count):
        context, label = rng.integers(EOT, size=rng.integers(1, 9)), int(rng.integers(4))
        steps = [1 if i == label else int(rng.integers(2, 5)) for i in range(4)]
        endings = [(context[-1] + step * np.arange(1, rng.integers(2, 10))) % EOT for step in steps]
        tasks.append(Task(spell(context), tuple(map(spell, endings)), label))
    return tasks


TASKS = made_up(500)


def packed_tasks(tasks: list[Task] = TASKS, row_len: int = 32) -> hellaswag.Packed:
    return pack(tasks, row_len, encode, EOT)


# --- constructed scorers


def scorer(logits_VV: torch.Tensor) -> SimpleNamespace:
    """A model whose logits depend on the last token only: rows of a table."""
    return SimpleNamespace(
        trunk=lambda inputs_BT, docs_BT, window: inputs_BT[..., None], head=lambda x_ND: logits_VV[x_ND[:, 0].long()])


def counter(*steps: int) -> torch.Tensor:
    """A table that finds it likely that tokens count on in one of these steps."""
    table = torch.zeros(EOT, VOCAB)
    for step in steps:
        table[torch.arange(EOT), (torch.arange(EOT) + step) % EOT] = 9.0
    return F.pad(table, (0, 0, 0, 1))  # after eot anything


def score_of(logits_VV: torch.Tensor, tasks: list[Task] = TASKS, **options) -> hellaswag.Score:
    packed = packed_tasks(tasks)
    return score(ending_losses(scorer(logits_VV), packed, 32, options.pop("rows", 7), "cpu", **options), packed)


def test_a_scorer_that_is_always_right():
    assert score_of(counter(1)) == (500, 1.0, 1.0, 1.0)


def test_a_scorer_that_is_always_wrong():
    assert score_of(counter(2, 3, 4)) == (500, 0.0, 0.0, 0.0)


def test_a_random_scorer_is_right_by_chance():
    tasks = made_up(1600)
    for seed in range(3):
        table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
        found = score_of(table, [task._replace(label=i * (i + seed) // 7 % 4) for i, task in enumerate(tasks)])
        for name, error in found.standard_errors.items():
            assert error == pytest.approx(np.sqrt(0.1875 / 1600), rel=0.1)
            assert abs(getattr(found, name) - 0.25) < 4 * error, (name, found)


def test_a_scorer_that_is_right_in_known_tasks():
    """With the labels of every fifth task exchanged."""
    tasks = [task._replace(label=(task.label + (i % 5 == 0)) % 4) for i, task in enumerate(TASKS)]
    assert score_of(counter(1), tasks) == (500, 0.8, 0.8, 0.8)


def constructed(losses, tokens, sizes, labels) -> hellaswag.Score:
    packed = hellaswag.Packed(*[np.zeros(1)] * 2, np.array(tokens), np.array(sizes), np.array(labels))
    return score(torch.tensor(losses, dtype=torch.float64), packed)


def test_each_accuracy_divides_by_its_own_length():
    """Smallest: raw 0, per token 1, per byte 2."""
    task = [8.0, 9.0, 10.0, 30.0], [2, 9, 5, 6], [10, 20, 40, 50]
    for label, expected in enumerate([(1, 0, 0, 1), (1, 1, 0, 0), (1, 0, 1, 0), (1, 0, 0, 0)]):
        assert constructed(*([part] for part in task), [label]) == expected


def test_of_equal_losses_the_first_is_chosen():
    ones = np.ones((4, 4), dtype=int)
    assert constructed([[1.0] * 4] * 4, ones, ones, [0, 1, 2, 3]) == (4, 0.25, 0.25, 0.25)
    flat = score_of(torch.zeros(VOCAB, VOCAB))  # a model before its first step: exact ties per token
    assert flat.per_token == np.mean([task.label == 0 for task in TASKS])


def test_losses_that_are_not_finite_are_counted():
    ones = np.ones((2, 4), dtype=int)
    with pytest.raises(RuntimeError, match="the losses of 3 of 8 HellaSwag endings are not finite"):
        constructed([[1.0, np.nan, np.inf, 1.0], [1.0, 1.0, -np.inf, 1.0]], ones, ones, [0, 0])
    with pytest.raises(RuntimeError, match="not finite"):
        score_of(torch.full((VOCAB, VOCAB), np.nan))


def test_the_score_as_text_and_its_standard_errors():
    found = hellaswag.Score(10042, 0.2951, 0.311, 0.5)
    assert str(found) == ("10,042 tasks: 29.5 % +- 0.5 per token, 31.1 % +- 0.5 per byte, 50.0 % +- 0.5 raw "
                          "(chance: 25 %)")
    assert found.standard_errors == pytest.approx({"per_token": 0.004551, "per_byte": 0.004619, "raw": 0.0049895}, 1e-3)
    assert "100.0 % +- 0.0" in str(hellaswag.Score(5, 1.0, 1.0, 1.0))


# --- packing


def documents(packed: hellaswag.Packed) -> dict[int, tuple[list[int], list[int]]]:
    """By the ending that it belongs to: a document's inputs and targets. Each is found in one place."""
    found = {}
    for (inputs, targets, docs), endings in zip(packed.rows, packed.ending_RT, strict=True):
        assert (np.diff(docs) >= 0).all() and ((endings == -1) == (targets == -1)).all()
        for number in np.unique(docs):
            own = docs == number
            if (names := set(endings[own].tolist()) - {-1}):
                (name,) = names
                assert name not in found
                found[name] = inputs[own].tolist(), targets[own].tolist()
    return found


@pytest.mark.parametrize("row_len", [17, 20, 64, 1000, 20000])
def test_every_token_of_every_ending_is_a_target_once(row_len):
    packed = packed_tasks(row_len=row_len)
    found = documents(packed)
    assert sorted(found) == list(range(4 * len(TASKS)))
    for name, (inputs, targets) in found.items():
        task, i = TASKS[name // 4], name % 4
        context, ending = [EOT, *encode(task.context)], encode(task.endings[i])
        assert inputs == (context + ending)[:-1]
        assert targets == [-1] * (len(context) - 1) + ending
        assert packed.tokens[name // 4, i] == len(ending) and packed.bytes[name // 4, i] == len(task.endings[i])
    assert packed.rows.shape[1:] == (3, row_len) and packed.rows.dtype == packed.ending_RT.dtype == np.int32
    assert packed.labels.tolist() == [task.label for task in TASKS]
    assert (packed.rows[:, 1] != -1).sum() == packed.tokens.sum()


@given(st.lists(st.integers(1, 50), min_size=1), st.integers(0, 30))
def test_rows_are_filled_best_fit(lengths, more):
    """Each text is in one row, no row is too full, and no two rows could have been one."""
    row_len = max(lengths) + more
    rows = fill_rows(lengths, row_len)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    fill = sorted(sum(lengths[i] for i in row) for row in rows)
    assert fill[-1] <= row_len and (len(fill) == 1 or fill[0] + fill[1] > row_len)


def test_the_longest_text_comes_first_and_equal_ones_in_order():
    assert fill_rows([3, 5, 2, 5, 4], 7) == [[1, 2], [3], [4, 0]]
    assert fill_rows([5, 6, 2], 8) == [[1, 2], [0]], "the fullest row that has room"


def test_the_encoder_gets_the_context_and_a_space_before_each_ending():
    seen = []

    def record(text):
        seen.append(text)
        return list(text.encode())

    packed = pack([Task("é b", ("one", "zwölf", "3", "4"), 2)], 32, record, 7)
    assert seen == ["é b", " one", " zwölf", " 3", " 4"]
    assert packed.bytes.tolist() == [[3, 6, 1, 1]] and packed.tokens.tolist() == [[4, 7, 2, 2]]
    assert documents(packed)[0] == ([7, *"é b on".encode()], [-1] * 4 + list(b" one"))


def test_a_text_that_is_longer_than_a_row():
    tasks = [Task("1 2 3", ("4", "4 5 6", "4", "4"), 0)]
    assert len(packed_tasks(tasks, 6).rows) == 4  # eot 1 2 3 4 5 -> 6
    with pytest.raises(ValueError, match="a text of 6 tokens does not fit into a row of 5: use --row-len 6"):
        packed_tasks(tasks, 5)


# --- models

VARIANTS = {
    "plain": {}, "paired": dict(attention="LP", key_offset=True), "n-grams": dict(ngram_rows=50, smear=True),
    "short window": dict(attention="SL", window=8), "pointer": dict(pointer=8), "all": dict(
        num_layers=4, attention="LSPL", ngram_rows=50, pointer=8, smear=True, key_offset=True, xsa=True, skip="single",
        backout=True),
}


def random_model(**changes) -> torch.nn.Module:
    """A tiny model whose every parameter is random, those that start at zero, too."""
    model, random = train_gpt.GPT(helpers.settings(**changes), VOCAB), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name != "scalars":
                p.normal_(std=0.3, generator=random)
    return model.requires_grad_(False)


def alone(model, tasks: list[Task], window: int) -> torch.Tensor:
    """Losses of the endings, each text by itself."""
    losses = []
    for task in tasks:
        for ending in task.endings:
            context, tokens = [EOT, *encode(task.context)], encode(ending)
            logs = helpers.log_probabilities(model, context + tokens[:-1], window)[len(context) - 1:]
            losses.append(F.nll_loss(logs, torch.tensor(tokens), reduction="sum"))
    return torch.stack(losses).view(-1, 4)


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_a_packed_text_has_the_loss_that_it_has_alone(changes):
    model, window = random_model(**changes), changes.get("window", 32)
    found = ending_losses(model, packed_tasks(TASKS[:12]), window, 3, "cpu")
    assert found.dtype == torch.float64 and found.shape == (12, 4) and found.std() > 1
    torch.testing.assert_close(found, alone(model, TASKS[:12], window), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("changes", [*(dict(router=name) for name in moe.ROUTERS), dict(pointer=8, ngram_rows=50)])
def test_a_packed_text_has_the_loss_that_it_has_alone_with_experts(changes):
    model = moe.random_model(moe.settings(**changes))
    found = ending_losses(model, packed_tasks(TASKS[:12]), 32, 3, "cpu")
    torch.testing.assert_close(found, alone(model, TASKS[:12], 32), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("changes", [{}, dict(ngram_rows=50, pointer=8)], ids=str)
def test_the_losses_are_those_of_training(changes):
    """Summed over all endings, padded columns in the softmax: what GPT.forward returns for the same rows."""
    model, packed = random_model(**changes), packed_tasks(TASKS[:20])
    inputs, targets, docs = torch.from_numpy(packed.rows).swapaxes(0, 1)
    expected = model(inputs, targets[None], docs, torch.tensor(32, dtype=torch.int32))[0]
    assert model.lm_head.size(0) > VOCAB
    found = ending_losses(model, packed, 32, 4, "cpu").sum()
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)


def test_the_window_reaches_the_model():
    model, packed = random_model(), packed_tasks(TASKS[:12])
    wide, narrow = (ending_losses(model, packed, window, 3, "cpu") for window in (32, 2))
    assert (wide - narrow).abs().max() > 0.01


@pytest.mark.parametrize("row_len, rows, chunk", [(20, 1, 256), (32, 5, 7), (32, 1000, 256), (31, 2, 1)])
def test_row_length_rows_and_chunks_change_no_loss(monkeypatch, row_len, rows, chunk):
    model, tasks = random_model(), TASKS[:30]
    expected = ending_losses(model, packed_tasks(tasks), 32, 4, "cpu")
    monkeypatch.setitem(hellaswag.HEAD_ROWS, "cpu", chunk)
    sizes = []

    def head(x_ND):
        sizes.append(len(x_ND))
        return model.head(x_ND)

    packed = packed_tasks(tasks, row_len)
    found = ending_losses(SimpleNamespace(trunk=model.trunk, head=head), packed, 32, rows, "cpu")
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)
    assert max(sizes) <= chunk and sum(sizes) == packed.tokens.sum(), "the head runs on what has a target"
    assert score(found, packed) == score(expected, packed)


def test_every_batch_has_one_shape():
    model, packed, shapes = random_model(), packed_tasks(TASKS[:40]), []

    def trunk(inputs_BT, docs_BT, window):
        shapes.append(tuple(inputs_BT.shape))
        assert inputs_BT.dtype == docs_BT.dtype == window.dtype == torch.int32 and window.ndim == 0
        return model.trunk(inputs_BT, docs_BT, window)

    found = ending_losses(SimpleNamespace(trunk=trunk, head=model.head), packed, 32, 3, "cpu")
    assert shapes == [(3, 32)] * -(-len(packed.rows) // 3) and len(packed.rows) % 3, "the last batch is padded"
    assert found.device.type == "cpu" and bool(found.all())


def test_the_same_call_repeats_to_the_bit_and_watch_sees_the_batches():
    model, packed, seen = random_model(), packed_tasks(TASKS[:40]), []

    def watch(starts):
        seen.extend(starts)
        return starts

    first, second = (ending_losses(model, packed, 32, 4, "cpu", watch=watch) for _ in range(2))
    assert torch.equal(first, second) and seen == 2 * list(range(0, len(packed.rows), 4))


def test_the_bar_counts_tasks_on_a_terminal_only(monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    starts = range(0, 21, 3)
    assert list(hellaswag.progress(60, starts)) == list(starts) and capsys.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr", Terminal())
    assert list(hellaswag.progress(60, starts)) == list(starts)
    assert re.search(r"HellaSwag: 100%.* 60/60 .*tasks", sys.stderr.getvalue())


def test_the_model_is_cast_as_in_training():
    s = moe.settings(ngram_rows=50, pointer=8)
    model = hellaswag.cast(train_moe.GPT(s, VOCAB), train_moe.FP32_PARAMETERS, "cpu", torch.bfloat16)
    assert ending_losses(model, packed_tasks(TASKS[:3]), 32, 2, "cpu").isfinite().all()
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"scalars", "routers"}
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16} and model.cos.dtype == torch.float32


# --- file


def line(**changes) -> str:
    record = {"ind": 24, "ctx": "1 2 3", "ctx_a": "1", "label": 3, "endings": ["4", "5 6", "7", "8"]} | changes
    return json.dumps({key: value for key, value in record.items() if value != "left out"})


def write_tasks(path: Path, tasks: list[Task]) -> Path:
    path.write_text("".join(line(ctx=t.context, endings=t.endings, label=t.label) + "\n" for t in tasks))
    return path


def test_tasks_are_read_as_they_stand(tmp_path):
    path = write_tasks(tmp_path / "tasks.jsonl", TASKS)
    assert read_tasks(path) == TASKS
    (tmp_path / "x").write_text(line(ctx="naïve \u2028 x", endings=["ä", "b\r", "c", "d"]).replace("\\u2028", "\u2028"))
    assert read_tasks(tmp_path / "x") == [Task("naïve \u2028 x", ("ä", "b\r", "c", "d"), 3)]


def test_tasks_as_the_hub_writes_them(tmp_path):
    """Numbers are texts there; `ctx` is the two parts of the context."""
    (tmp_path / "x").write_text("\n".join([line(label="2", ind="24"), line(label=2.0), line(
        ctx="left out", ctx_a="1 2", ctx_b="3", label="2", split="val")]) + "\n")
    assert read_tasks(tmp_path / "x") == 3 * [Task("1 2 3", ("4", "5 6", "7", "8"), 2)]


@pytest.mark.parametrize("limit", [1, 2, 7, 499, 500, 501, 10**6])
def test_a_limit_takes_tasks_from_all_of_the_file(tmp_path, limit):
    tasks = [task._replace(context=f"{i}") for i, task in enumerate(TASKS)]
    numbers = [int(task.context) for task in read_tasks(write_tasks(tmp_path / "tasks.jsonl", tasks), limit)]
    assert len(set(numbers)) == len(numbers) == min(limit, 500) and numbers == sorted(numbers)
    assert max(np.diff([*numbers, 500])) <= -(-500 // limit)


@pytest.mark.parametrize("text, problem", [
    ("{", "no JSON"), ("", "no JSON"), ("[]", "a JSON list, expected an object"), ("\xff", "no JSON"),
    (line(ctx="left out", label="left out"), "it has no 'ctx', 'label'"), (line(ctx=3), "ctx 3 is no text"),
    (line(endings=["a", "b", "c"]), "expected a list of 4 texts"), (line(endings="abcd"), "expected a list of 4 texts"),
    (line(endings=["a", "", "c", "d"]), "none empty"), (line(endings=["a", 1, "c", "d"]), "expected a list of 4"),
    (line(label="4"), "it has no 'label'"), (line(label=4), "label 4"), (line(label=-1), "label -1"),
    (line(label=True), "label True"), (line(label=""), "it has no 'label'"), (line(label=None), "it has no 'label'"),
    (line(label=[]), "label []"), (line(endings=None), "it has no 'endings'"), (line(ctx=None), "it has no 'ctx'"),
    ("[" * 10**5, "no JSON"), ("9" * 10**4, "no JSON"),
])
def test_a_damaged_line_is_named(tmp_path, text, problem):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes("\n".join([line(), text, line(), ""]).encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} is damaged, line 2: .*{re.escape(problem)}.*--download"):
        read_tasks(path)


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
                      lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
                      max_leaves=5)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(VALUES, VALUES, VALUES)
def test_any_row_is_a_task_or_a_sentence(ctx, endings, label):
    for row in (dict(ctx=ctx, endings=list("abcd"), label=label), dict(ctx="a", endings=endings, label=1), ctx,
                dict(ctx_a=ctx, ctx_b=endings, endings=list("abcd"), label=label)):
        try:
            task = hellaswag.parse_task(json.dumps(row).encode())
            assert isinstance(task.context, str) and task.label in range(4) and type(task.label) is int
        except ValueError as error:
            assert len(str(error)) < 300


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file of HellaSwag tasks at .*python evals/hellaswag.py --download"):
        read_tasks(tmp_path / "nothing")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty is damaged, no line: .*--download"):
        read_tasks(tmp_path / "empty")
    hellaswag.os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(FileNotFoundError, match="no file of HellaSwag tasks"):
            read_tasks(place)


@pytest.mark.parametrize("meta, kind", [
    (BYTES, "of bytes"), (CHARS, "of characters"), ({}, "tokenizer None"), (GPT2 | {"vocab_size": 300}, "of size 300"),
    ({"tokenizer": {"kind": "tiktoken", "name": "o200k_base"}}, "o200k_base"), ({"tokenizer": [1]}, "tokenizer [1]"),
    ({"tokenizer": {"kind": ["byte"]}}, "['byte']"), (GPT2 | {"vocab_size": "50257"}, "of size '50257'"),
])
def test_other_vocabularies_do_not_apply(meta, kind):
    reason = does_not_apply(meta)
    assert reason.startswith("HellaSwag does not apply: ") and "GPT-2's vocabulary" in reason and kind in reason
    assert "\n" not in reason and does_not_apply(GPT2) is does_not_apply(train_gpt.GPT2_META) is None


def test_with_gpt2s_own_tokenizer():
    try:
        packed = pack([Task("A man is sitting on a roof. he", ("is ripping", "x", "Hello world", "é"), 1)], 64)
    except RuntimeError as error:
        pytest.skip(str(error))
    assert documents(packed)[2] == ([50256, 32, 582, 318, 5586, 319, 257, 9753, 13, 339, 18435],
                                    [-1] * 9 + [18435, 995])
    assert packed.bytes.tolist() == [[10, 1, 11, 2]]


# --- download


class Server(ThreadingHTTPServer):
    """Serves `body`, from the byte that is asked for if `ranges`; the next answers end after `cuts` bytes, and have
    the status `errors`. `asked`: Range of every request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body, self.ranges, self.cuts, self.errors, self.asked = b"", True, [], [], []


class Handler(BaseHTTPRequestHandler):

    def log_message(self, *args):
        pass

    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        start = int(asked[6:-1]) if asked and server.ranges else 0
        status = server.errors.pop(0) if server.errors else 416 if start >= len(server.body) else 206 if start else 200
        body = server.body[start:] if status < 400 else b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:server.cuts.pop(0)] if server.cuts else body)


@pytest.fixture
def server(monkeypatch):
    """A server of the 500 tasks, which is what a complete file has here; no pauses between tries."""
    server = Server()
    server.body = "".join(line(ctx=t.context, endings=t.endings, label=t.label) + "\n" for t in TASKS).encode()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HELLASWAG_URL", f"http://127.0.0.1:{server.server_address[1]}/tasks.jsonl")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "NUM_TASKS", 500)
    monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
    yield server
    server.shutdown()
    server.server_close()


def run(capsys, *flags) -> tuple[int, str, str]:
    capsys.readouterr()
    code = hellaswag.main([*map(str, flags)])
    return code, *capsys.readouterr()


def error_of(capsys, *flags) -> str:
    """The one sentence of a failing call."""
    code, out, err = run(capsys, *flags)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


def test_download(server, tmp_path, capsys):
    path = tmp_path / "new" / "tasks.jsonl"
    assert run(capsys, "--download", "--input", path) == (0, f"{path}: 500 tasks downloaded\n", "")
    assert path.read_bytes() == server.body and list(path.parent.iterdir()) == [path]
    assert run(capsys, "--download", "--input", path)[:2] == (0, f"{path}: 500 tasks, already there\n")
    assert server.asked == [None]


@pytest.mark.parametrize("ranges", [True, False])
def test_a_download_goes_on_where_it_ended(server, tmp_path, capsys, ranges):
    server.ranges, server.cuts = ranges, [1000, 500]
    path = tmp_path / "tasks.jsonl"
    assert run(capsys, "--download", "--input", path)[0] == 0
    assert path.read_bytes() == server.body
    assert server.asked == [None, "bytes=1000-", "bytes=1500-" if ranges else "bytes=500-"]


def test_a_download_is_kept_for_the_next_call(server, tmp_path, capsys):
    server.cuts, path = [1000, 0, 0], tmp_path / "tasks.jsonl"
    error = error_of(capsys, "--download", "--input", path)
    assert f"the connection ended after 1000 of {len(server.body)} bytes" in error and "same command again" in error
    assert not path.exists()
    assert run(capsys, "--download", "--input", path)[0] == 0
    assert path.read_bytes() == server.body and server.asked[-1] == "bytes=1000-"


def test_a_whole_download_that_was_not_renamed(server, tmp_path, capsys):
    (tmp_path / "tasks.jsonl.part").write_bytes(server.body)
    assert run(capsys, "--download", "--input", tmp_path / "tasks.jsonl")[0] == 0
    assert (tmp_path / "tasks.jsonl").read_bytes() == server.body and len(server.asked) == 1


@pytest.mark.parametrize("status, tries", [(404, 1), (503, 3), (429, 3)])
def test_a_server_without_the_file(server, tmp_path, capsys, status, tries):
    server.errors = [status] * 3
    assert str(status) in error_of(capsys, "--download", "--input", tmp_path / "tasks.jsonl")
    assert len(server.asked) == tries and not list(tmp_path.iterdir())
    server.errors = [503, 503]
    assert run(capsys, "--download", "--input", tmp_path / "tasks.jsonl")[0] == 0


def test_a_server_that_is_not_there(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(hellaswag.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HELLASWAG_URL", "http://127.0.0.1:9/x")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    error = error_of(capsys, "--download", "--input", tmp_path / "tasks.jsonl")
    assert "cannot download http://127.0.0.1:9/x" in error and "--input" in error


@pytest.mark.parametrize("body, problem", [
    (f"{line()}\n".encode() * 499, "it has 499 lines, expected 500"), (b"<html>\n" * 500, "line 1: no JSON"),
])
def test_another_file_is_not_kept(server, tmp_path, capsys, body, problem):
    good, server.body = server.body, body
    error = error_of(capsys, "--download", "--input", tmp_path / "tasks.jsonl")
    assert "is not HellaSwag's validation file" in error and problem in error and not list(tmp_path.iterdir())
    server.body = good
    assert run(capsys, "--download", "--input", tmp_path / "tasks.jsonl")[0] == 0


def test_a_file_of_the_user_is_not_replaced(server, tmp_path, capsys):
    path = write_tasks(tmp_path / "mine.jsonl", TASKS[:9])
    before = path.read_bytes()
    assert "with 9 tasks instead of 500: move it away" in error_of(capsys, "--download", "--input", path)
    assert path.read_bytes() == before and not server.asked


def test_an_interrupted_download_is_not_taken_for_whole(server, tmp_path, capsys, monkeypatch):
    """Ctrl-C between the last byte and the check; a part that is no file."""
    path, check = tmp_path / "tasks.jsonl", hellaswag.parse_file

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(hellaswag, "parse_file", interrupt)
    assert run(capsys, "--download", "--input", path)[0] == 130 and not path.exists()
    monkeypatch.setattr(hellaswag, "parse_file", check)
    assert run(capsys, "--download", "--input", path)[0] == 0 and path.read_bytes() == server.body
    path.write_bytes(server.body[:-9])
    assert "is damaged, line 500" in error_of(capsys, "--download", "--input", path), "a file that is there is checked"
    path.unlink()
    hellaswag.os.mkfifo(tmp_path / "tasks.jsonl.part")
    assert "is there already, and no file" in error_of(capsys, "--download", "--input", path)


# --- command line


class Numbers:
    """Stands in for GPT-2's tokenizer."""

    encode = staticmethod(encode)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Log folder with a run on GPT-2's vocabulary of each script, checkpoints of steps 1 and 2, and one on bytes."""
    root = tmp_path_factory.mktemp("trained")
    gpt2, plain = helpers.make_data(root / "gpt2", **GPT2), helpers.make_data(root / "plain")
    changes = dict(iterations=2, save_every=1, eval_every=0, eval_tokens=64, momentum_warmup=1, momentum_cooldown=0,
                   value_embeds=0)
    for script, data in [(train_gpt, gpt2), (train_moe, gpt2), (train_gpt, plain)]:
        experts = {"num_experts": 4} if script is train_moe else {}
        name = f"{script.__name__}-{data.name}"
        assert script.main(helpers.tiny(root, data=data, experiment_name=name, **experts, **changes)) == 0
    return root / "logs"


def own_score(name: str, path: Path, tasks: list[Task]) -> hellaswag.Score:
    """Score of a checkpoint by passes over single texts."""
    script = {"train_gpt": train_gpt, "train_moe": train_moe}[name]
    meta = json.loads((path / "meta.json").read_text())
    staged = {k: tuple(v) if isinstance(v, list) else v for k, v in meta["settings"].items()}
    model = script.GPT(dataclasses.replace(script.Settings(), **staged), 50257)
    state = torch.load(path / "state.pt", weights_only=True)["optimizer"]
    model.load_state_dict(state["state"]["master"])
    if script is train_moe:
        model.router_bias.copy_(state["balance"]["bias"])
    losses = []
    for task in tasks:
        for ending in map(encode, task.endings):
            context = [50256, *encode(task.context)]
            inputs = torch.tensor([context + ending[:-1]], dtype=torch.int32)
            with torch.no_grad():
                x = model.trunk(inputs, torch.zeros_like(inputs), torch.tensor(32, dtype=torch.int32))
                logits = model.head(x)[0, len(context) - 1:]
            losses.append(F.cross_entropy(logits, torch.tensor(ending), reduction="sum"))
    return score(torch.stack(losses).view(-1, 4), pack(tasks, 32, encode))


@pytest.mark.parametrize("name", ["train_gpt", "train_moe"])
def test_the_score_of_a_trained_checkpoint(trained, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)
    monkeypatch.setattr(hellaswag, "FILE", write_tasks(tmp_path / "tasks.jsonl", TASKS[:24]))
    flags = ["--checkpoint", trained / f"{name}-gpt2", "--input", hellaswag.FILE, "--device", "cpu", "--row-len", 64]
    code, out, err = run(capsys, *flags, "--rows", 8, "--output", tmp_path / "score.json")
    (path,) = trained.glob(f"{name}-gpt2/*/checkpoints/step_000002")
    expected = own_score(name, path, TASKS[:24])
    assert (code, out) == (0, f"HellaSwag, {expected}\n"), err
    assert f"{path}: cpu, fp32, window 32, " in err and re.search(r"\d tasks/s\n", err)
    record = json.loads((tmp_path / "score.json").read_text())
    assert record.pop("seconds") > 0 and record == {
        "checkpoint": str(path), "step": 2, "script": f"{name}.py", **expected._asdict(), "device": "cpu",
        "standard_errors": expected.standard_errors, "dtype": "fp32", "torch": torch.__version__}
    assert run(capsys, *flags, "--rows", 3, "--row-len", 20)[:2] == (0, out)
    few = own_score(name, path, TASKS[:24:2])
    assert run(capsys, *flags, "--tasks", 12)[1] == f"HellaSwag, {few}\n"
    code, out, err = run(capsys, *flags, "--dtype", "bf16", "--checkpoint", path.with_name("step_000001"))
    assert code == 0 and "step_000001: cpu, bf16, window 24, " in err and out.startswith("HellaSwag, 24 tasks: ")


def test_what_can_be_wrong_is_one_sentence(trained, tmp_path, capsys, monkeypatch):
    assert "does not apply" in error_of(capsys, "--checkpoint", trained / "train_gpt-plain", "--device", "cpu")
    gpt2 = ["--checkpoint", trained / "train_gpt-gpt2", "--device", "cpu", "--input"]
    assert "python evals/hellaswag.py --download" in error_of(capsys, *gpt2, tmp_path / "nowhere.jsonl")
    assert "no checkpoint in" in error_of(capsys, "--checkpoint", tmp_path)
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)
    path = write_tasks(tmp_path / "tasks.jsonl", [TASKS[0]._replace(context="1 " * 20)])
    assert "use --row-len" in error_of(capsys, *gpt2, path, "--row-len", 16)
    path = write_tasks(tmp_path / "tasks.jsonl", [TASKS[0]._replace(context="1 " * 20000)])
    assert "leave its task out" in error_of(capsys, *gpt2, path)
    (tmp_path / "evil").mkdir()
    path = tmp_path / "evil" / "\x1b[2J.jsonl"
    path.write_text(line(ctx=["\x1b[2J"]))
    assert "\\x1b[2J.jsonl is damaged" in (error := error_of(capsys, *gpt2, path)) and "\x1b" not in error


def test_of_a_run_the_checkpoint_before_a_bad_one_is_scored(trained, tmp_path, capsys, monkeypatch):
    """Wrong content whose hash is right, and other settings."""
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)
    tasks = write_tasks(tmp_path / "tasks.jsonl", TASKS[:24])
    (run_folder,) = (trained / "train_gpt-gpt2").iterdir()
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step_000002"
    meta = json.loads((path / "meta.json").read_text())
    flags = ["--checkpoint", tmp_path / "run", "--input", tasks, "--device", "cpu", "--row-len", 64]
    expected = run(capsys, *flags[:1], path.with_name("step_000001"), *flags[2:])[1]
    state = torch.load(path / "state.pt", weights_only=True)
    state["optimizer"]["state"]["master"].popitem()
    torch.save(state, path / "state.pt")
    meta["sha256"] = train_gpt.file_hash(path / "state.pt")
    for changes in ({}, {"settings": meta["settings"] | {"num_layers": 10**6}}, {"script": "os.py"}, {"step": "2"}):
        (path / "meta.json").write_text(json.dumps(meta | changes))
        code, out, err = run(capsys, *flags)
        assert (code, out) == (0, expected) and "step_000002 cannot be used" in err and "Traceback" not in err, err


@pytest.mark.parametrize("place", ["pipe", "/dev/full", "."])
def test_an_output_that_is_no_file(tmp_path, capsys, place):
    hellaswag.os.mkfifo(tmp_path / "pipe")
    assert "it is there and no file" in error_of(capsys, "--output", tmp_path / place)
    assert (tmp_path / "pipe").is_fifo() and Path("/dev/full").is_char_device()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("target, code", [("> /dev/full", 1), ("| true", 0), (">&-", 1)])
def test_a_full_or_closed_stdout(server, tmp_path, target, code):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes("".join(line() + "\n" for _ in range(10042)).encode())
    command = f"'{sys.executable}' evals/hellaswag.py --download --input '{path}' {target}; exit ${{PIPESTATUS[0]}}"
    result = helpers.subprocess.run(["bash", "-c", command], cwd=helpers.ROOT, capture_output=True, text=True)
    assert result.returncode == code, result.stderr
    assert not {"Traceback", "Exception"} & set(result.stderr.split()) and result.stderr.count("\n") == code


@pytest.mark.parametrize("flags, problems", [
    (["--tasks", "-1", "--rows", "x"], ["--tasks -1: expected an integer from 0", "--rows x: expected"]),
    (["--tasks", "1" + "0" * 5000, "--row-len", "1e400"], ["--tasks 1000", "--row-len 1e400: expected an integer"]),
    (["--rows", "nan"], ["--rows nan: expected"]), (["--rows", "60000", "--row-len", "16384"], ["at most 32 fit"]),
    (["--row_len", "20000"], ["--row-len 20000: expected an integer from 0 to 16384"]),
    (["--device", "tpu", "--dtype", "fp8"], ["--device tpu: expected auto, cpu or cuda", "--dtype fp8: expected auto"]),
    (["--output", "/nowhere/x/y.json"], ["--output /nowhere/x/y.json: there is no folder /nowhere/x"]),
    (["--tsks", "1"], ["--tsks"]), (["--follow", "x", "--checkpoint", "y"], ["--checkpoint: not allowed with"]),
    (["--follow", "x", "--output", "y.json"], ["--output: has no effect with --follow"]),
], ids=str)
def test_wrong_flags_are_named_all_at_once(capsys, flags, problems):
    error = error_of(capsys, *flags)
    assert all(problem in error for problem in problems) and len(error) < 400, error


def test_cuda_without_a_cuda_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no usable CUDA device" in error_of(capsys, "--device", "cuda")


def test_the_command_line_from_another_folder(tmp_path):
    result = helpers.script(helpers.ROOT / "evals" / "hellaswag.py", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (1, "") and "error: no checkpoint in logs" in result.stderr
