"""Tokenizing documents into shards, with interruptions: data/fineweb.py."""

import argparse
import gzip
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import common  # noqa: E402
import fineweb  # noqa: E402

EOT = common.BYTE_VOCAB["eot"]


class InlineExecutor(Executor):
    """Runs each call at once in this process."""

    def submit(self, function, *args):
        future = Future()
        future.set_result(function(*args))
        return future


class Bar:
    n = 0

    def update(self, count):
        self.n += count


@pytest.fixture(scope="module", autouse=True)
def byte_worker():
    """Tokenizing in this process, without waiting for the disk (test_data_safety.py looks at that)."""
    fineweb.WORKER.update(tokenizer=common.load_tokenizer(common.BYTE_VOCAB), eot=EOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def run_script(*args, cwd=ROOT, **env):
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **env})


def contents(folder):
    """{name: bytes} of the files in a folder, without the command that made them, which names the folder."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return {name: re.sub(rb'"made_with": ".*"', b'"made_with": ""', raw) for name, raw in files.items()}


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def build(out, source, shard_tokens, num_tokens=None, depth=2):
    common.check_folder(out, source.prefix)
    job = fineweb.Job(out, source, common.BYTE_VOCAB, shard_tokens, num_tokens)
    job.run(InlineExecutor(), depth, Bar())


def split_tokens(out, split):
    return np.concatenate([common.load_shard(path) for path in sorted(out.glob(f"*_{split}_*.bin"))])


def packed(texts):
    return [token for text in texts for token in (EOT, *text.encode("utf-8"))]


# ----------------------------------------------------------------------------------------------------------------------
# What ends up in the shards


def test_local_shards_hold_every_document_once_in_order(tmp_path):
    rows = [{"id": f"work{n // 3}#{n}", "text": f"Text {n} é " * (n % 7)} for n in range(200)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    out = tmp_path / "mine"
    build(out, fineweb.LocalSource([path], "mine", 0.2), 500)
    meta = json.loads((out / "meta.json").read_text())
    for split in ("train", "val"):
        held = [row for row in rows if common.held_out(row["id"].split("#")[0], 0.2) == (split == "val")]
        texts = [row["text"] for row in held if row["text"]]
        assert split_tokens(out, split).tolist() == packed(texts)
        size = sum(len(text.encode("utf-8")) for text in texts)
        assert meta["splits"][split] == {"tokens": size + len(texts), "bytes": size}
    sizes = [len(common.load_shard(shard)) for shard in sorted(out.glob("*_train_*.bin"))]
    assert len(sizes) > 2 and set(sizes[:-1]) == {500} and 0 < sizes[-1] <= 500
    assert meta["name"] == "mine" and (out / "mine_val_000000.bin").exists()


def test_parts_of_a_work_fall_on_the_same_side(tmp_path):
    source = fineweb.LocalSource([write_jsonl(tmp_path / "in.jsonl", [{"text": "x"}])], "mine", 0.5)
    for work in range(50):
        sides = {source.stream_of(fineweb.Document(0, f"w{work}#{part}", "x")) for part in range(5)}
        assert sides == {source.stream_of(fineweb.Document(9, f"w{work}", "y"))}


def test_all_local_formats_give_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"id": n, "text": f"text {n} – é"} for n in range(10)]
    folder = tmp_path / "mixed"
    (folder / "sub").mkdir(parents=True)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in rows).encode("utf-8")
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "c.parquet")
    (folder / "sub" / "d.txt").write_text("text d\n", encoding="utf-8")
    (folder / "ignored.md").write_text("no")
    documents = list(fineweb.LocalSource([folder], "mixed", 0.1).documents(0))
    expected = [(str(row["id"]), row["text"]) for row in rows] * 3 + [("sub/d.txt", "text d\n")]
    assert [(document.key, document.text) for document in documents] == expected
    assert [document.index for document in documents] == list(range(31))
    assert fineweb.LocalSource([folder], "mixed", 0.1).left_out == [(".md file", "ignored.md")]
    later = list(fineweb.LocalSource([folder], "mixed", 0.1).documents(17))
    assert later == documents[17:]


def test_documents_without_id_go_by_their_number(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "a"}, {"id": None, "text": "b"}, {"id": 7, "text": "c"}])
    keys = [document.key for document in fineweb.LocalSource([path], "x", 0.1).documents(0)]
    assert keys == ["0", "1", "7"]


def test_text_that_spells_eot_is_only_text(tmp_path):
    rows = [{"text": f"{common.EOT_TEXT} {n}"} for n in range(60)]
    build(tmp_path / "x", fineweb.LocalSource([write_jsonl(tmp_path / "in.jsonl", rows)], "x", 0.1), 1000)
    eots = sum(int((split_tokens(tmp_path / "x", split) == EOT).sum()) for split in ("train", "val"))
    assert eots == len(rows)


@pytest.mark.parametrize("batch_chars", [1, 50, 10**6])
def test_local_num_tokens_ends_both_splits_at_the_same_document(tmp_path, monkeypatch, batch_chars):
    texts = [f"Text number {n}" for n in range(100)]
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": text} for text in texts])
    monkeypatch.setattr(fineweb, "BATCH_CHARS", batch_chars)
    build(tmp_path / "x", fineweb.LocalSource([path], "x", 0.3), 200, num_tokens=450)
    sides = [common.held_out(str(n), 0.3) for n in range(100)]
    train = [n for n in range(100) if not sides[n]]
    last = next(n for n in train if len(packed(texts[i] for i in train if i <= n)) >= 450)
    assert split_tokens(tmp_path / "x", "train").tolist() == packed(texts[n] for n in train)[:450]
    assert split_tokens(tmp_path / "x", "val").tolist() == packed(texts[n] for n in range(last) if sides[n])


class FakeHub(fineweb.HubSource):
    """The hub source over a data set in memory, read by the real `datasets` streaming code."""

    def newest_commit(self):
        return "c" * 40


@pytest.fixture
def hub_texts(monkeypatch):
    import datasets

    texts = [f"document {n} " * (1 + n % 5) for n in range(100)]
    rows = datasets.Dataset.from_dict({"text": texts, "id": [str(n) for n in range(100)]})
    asked = []

    def load_dataset(repo, name, split, streaming, revision):
        asked.append((repo, name, split, streaming, revision))
        return rows.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield texts
    assert set(asked) == {("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", True, "c" * 40)}


def test_hub_shards_are_one_stream_whose_first_shard_is_val(tmp_path, hub_texts):
    build(tmp_path / "finewebedu10B", FakeHub("edu10B", None), 700)
    out = tmp_path / "finewebedu10B"
    names = sorted(path.name for path in out.glob("*.bin"))
    assert names[0] == "finewebedu_train_000001.bin" and names[-1] == "finewebedu_val_000000.bin"
    stream = np.concatenate([split_tokens(out, "val"), split_tokens(out, "train")]).tolist()
    assert stream == packed(hub_texts) and len(split_tokens(out, "val")) == 700
    meta = json.loads((out / "meta.json").read_text())
    for split in ("train", "val"):
        tokens = split_tokens(out, split)
        assert meta["splits"][split] == {"tokens": len(tokens), "bytes": int((tokens != EOT).sum())}
    assert meta["name"] == "finewebedu10B" and "c" * 40 in meta["source"] and "ODC-By" in meta["source"]


def test_hub_num_tokens_counts_train_tokens(tmp_path, hub_texts):
    build(tmp_path / "x", FakeHub("edu10B", None), 200, num_tokens=450)
    assert len(split_tokens(tmp_path / "x", "val")) == 200
    assert split_tokens(tmp_path / "x", "train").tolist() == packed(hub_texts)[200:650]


def test_hub_resumes_at_the_commit_it_began_with(monkeypatch):
    monkeypatch.setattr(FakeHub, "newest_commit", lambda self: "d" * 40)
    assert FakeHub("10B", {"settings": {"commit": "c" * 40}}).commit == "c" * 40
    assert FakeHub("10B", None).commit == "d" * 40


def test_hub_failure_while_reading_says_how_to_go_on(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*args, **kwargs):
        raise TimeoutError("server asleep")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(RuntimeError, match="server asleep.*run the same command again"):
        list(FakeHub("10B", None).documents(0))


def test_reading_waits_for_tokenizing():
    read = []

    def documents():
        for index in range(5000):
            read.append(index)
            yield fineweb.Document(index, "", "x")

    results = fineweb.tokenized(InlineExecutor(), documents(), depth=2)
    next(results)
    assert len(read) <= 3 * 1024
    assert [document.index for document, _ in results] == list(range(1, 5000))


# ----------------------------------------------------------------------------------------------------------------------
# Interruption


class Crash(Exception):
    pass


def crash_at(monkeypatch, number, after):
    """Make the number-th file write crash, just before or just after the file appears."""
    calls = iter(range(10**6))

    def guard(write):
        def guarded(*args, **kwargs):
            crash = next(calls) == number
            if not crash or after:
                write(*args, **kwargs)
            if crash:
                raise Crash

        return guarded

    for name in ("write_shard", "write_json", "write_meta"):
        monkeypatch.setattr(fineweb, name, guard(getattr(common, name)))


def attempt(out, path, fraction, *limits):
    """How a run ends: "complete", "crash", or the sentence for a split without documents."""
    try:
        build(out, fineweb.LocalSource([path], out.name, fraction), *limits)
    except Crash:
        return "crash"
    except ValueError as error:
        return str(error).replace(str(out), "OUT")
    return "complete"


def test_a_crash_at_any_write_ends_in_the_same_bytes(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "word " * (n % 9)} for n in range(30)])
    straight = tmp_path / "straight" / "x"
    assert attempt(straight, path, 0.3, 200) == "complete"
    for number in itertools.count():
        for after in (False, True):
            out = tmp_path / f"{number}{after}" / "x"
            crash_at(monkeypatch, number, after)
            end = attempt(out, path, 0.3, 200)
            monkeypatch.undo()
            assert end == "complete" or attempt(out, path, 0.3, 200) == "complete"
            assert contents(out) == contents(straight)
        if end == "complete":
            break
    assert number > 8


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=4, max_size=25),
    shard_tokens=st.integers(20, 90),
    num_tokens=st.none() | st.integers(1, 300),
    fraction=st.floats(0.2, 0.8),
    crashes=st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=6),
)
def test_any_crashes_end_in_the_same_bytes(lengths, shard_tokens, num_tokens, fraction, crashes):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        rows = [{"text": "ab" * (length // 2) + "é" * (length % 2)} for length in lengths]
        path = write_jsonl(Path(folder) / "in.jsonl", rows)
        straight, crashed = Path(folder) / "straight" / "x", Path(folder) / "crashed" / "x"
        expected = attempt(straight, path, fraction, shard_tokens, num_tokens)
        for crash in crashes:
            crash_at(monkeypatch, *crash)
            if attempt(crashed, path, fraction, shard_tokens, num_tokens) != "crash":
                break
        monkeypatch.undo()
        assert attempt(crashed, path, fraction, shard_tokens, num_tokens) == expected
        assert contents(crashed) == contents(straight)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """About 4 MB in 400 documents, and the folder an undisturbed run makes of it with two workers."""
    folder = tmp_path_factory.mktemp("corpus")
    generator = random.Random(1)
    texts = [" ".join(str(generator.random()) for _ in range(generator.randrange(1000))) for _ in range(400)]
    path = write_jsonl(folder / "in.jsonl", [{"text": text} for text in texts])
    out = folder / "straight" / "mine"
    result = run_script(*command(path, out), "--workers", 2)
    assert result.returncode == 0, result.stderr
    return path, contents(out)


def command(path, out):
    return ["--input", path, "--out", out, "--tokenizer", "byte", "--shard-tokens", "50_000", "--val_fraction", "0.2"]


def start(path, out):
    """Start a run and wait until it has finished a shard."""
    script = [sys.executable, str(ROOT / "data" / "fineweb.py"), *map(str, command(path, out)), "--workers", "1"]
    def heed_sigint():  # a shell that starts the tests in the background has them ignore it, and a child inherits that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, start_new_session=True,
                               preexec_fn=heed_sigint)
    while not list(out.glob("*.bin")) and process.poll() is None:
        time.sleep(0.001)
    return process


def children(pid):
    """Process ids below a process, in its own process group; empty where there is no /proc."""
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def wait_for_end(pids):
    """Wait until the processes are gone (or zombies that nobody has collected); False after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        alive = [path for path in states if path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"]
        if not alive:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("kind", ["SIGKILL", "SIGINT"])
def test_killed_run_resumes_to_the_same_bytes(corpus, tmp_path, kind):
    path, expected = corpus
    out = tmp_path / "mine"
    process = start(path, out)
    workers = children(process.pid)
    assert workers or not Path(f"/proc/self/task/{os.getpid()}/children").exists()
    process.send_signal(getattr(signal, kind))
    error = process.communicate(timeout=60)[1]
    assert process.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[kind]
    assert kind == "SIGKILL" or "interrupted: run the same command again" in error and "Traceback" not in error
    assert wait_for_end(workers)
    finished = {name: raw for name, raw in contents(out).items() if name.endswith(".bin")}
    assert 0 < len(finished) < len(expected) - 2 and "meta.json" not in contents(out)
    assert finished.items() <= expected.items()  # what is there is whole
    kept = read_progress(out)
    before = {path: path.stat().st_mtime_ns for path in kept}
    (out / ".mine_train_000099.bin.1.tmp").write_bytes(b"left by a killed run")
    result = run_script(*command(path, out), "--workers", 2)
    assert result.returncode == 0, result.stderr
    assert contents(out) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == before  # finished shards are not redone


def read_progress(out):
    """The shards that progress.json calls finished."""
    streams = json.loads((out / "progress.json").read_text())["streams"]
    return [out / f"mine_{name}_{n:06d}.bin" for name, saved in streams.items() for n in range(saved["shards"])]


def test_complete_folder_is_left_alone(corpus, tmp_path):
    path, expected = corpus
    out = tmp_path / "mine"
    out.mkdir()
    for name, raw in expected.items():
        (out / name).write_bytes(raw)
    result = run_script(*command(path, out))
    assert result.returncode == 0 and "already complete" in result.stdout and contents(out) == expected


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--shard-tokens", "60_000"], "shard_tokens 50000, not 60000"),
        (["--val-fraction", "0.3"], "val_fraction 0.2, not 0.3"),
        (["--num_tokens", "7e4"], "num_tokens null, not 70000"),
        (["--tokenizer", "gpt2"], 'tokenizer {"kind": "byte"}, not {"kind": "tiktoken"'),
        (["--val-input", "other.jsonl"], "val_fraction 0.2, not null"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, monkeypatch, change, named):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "hello"}])
    write_jsonl(tmp_path / "other.jsonl", [{"text": "bye"}])
    out = tmp_path / "mine"
    out.mkdir()
    parser_args = [*map(str, command(path, out)), *change]
    fineweb.make_job(parse(command(path, out))).save()
    before = contents(out)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{re.escape(named)}.*: choose another --out"):
        fineweb.make_job(parse(parser_args))
    assert contents(out) == before


def parse(args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
        return fineweb.parse_args()


def test_progress_with_a_missing_shard_is_refused(tmp_path):
    rows = [{"text": f"text number {n}"} for n in range(60)]
    source = fineweb.LocalSource([write_jsonl(tmp_path / "in.jsonl", rows)], "x", 0.2)
    build(tmp_path / "x", source, 50)
    (tmp_path / "x" / "x_train_000001.bin").unlink()
    with pytest.raises(FileNotFoundError, match="x_train_000001.bin does not exist"):
        build(tmp_path / "x", source, 50)


def test_folder_of_downloaded_shards_is_refused(tmp_path):
    out = tmp_path / "fineweb10B"
    out.mkdir()
    common.write_shard(out / "fineweb_train_000001.bin", np.arange(3))
    with pytest.raises(ValueError, match="a data set that this script did not make"):
        fineweb.Job(out, FakeHub("10B", None), common.BYTE_VOCAB, 100)


# ----------------------------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("name", "raw", "message"),
    [
        ("a.jsonl", b'\n{"text": 7}\n{"title": "b"}\n', "the input has no text: .*a.jsonl line 2 has no string `text`"),
        ("a.jsonl", b'\n\n{"text"', "a.jsonl line 3 is not JSON"),
        ("a.jsonl", b"\xff", "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "a.jsonl line 1 is not JSON .nested too deeply"),
        ("a.jsonl", b"9" * 5000, "a.jsonl line 1 is not JSON"),
        ("a.jsonl", b"", "the input has no text: its files are empty"),
        ("a.jsonl", b'["text"]', "a.jsonl line 1 has no string `text`"),
        ("a.jsonl", b'{"text": null}', "a.jsonl line 1 has no string `text`"),
        ("a.txt", b"\xff", "a.txt is not UTF-8"),
        ("a.parquet", b"PAR0", "a.parquet is not a whole Parquet file"),
        ("a.jsonl", b"null", "a.jsonl line 1 has no string `text`"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 99)[:-9], "a.jsonl.gz is not a whole gzip file"),
        ("a.csv", b"a,b", "none of the known formats .jsonl"),
    ],
)
def test_unusable_input_is_one_sentence(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        list(fineweb.LocalSource([tmp_path / name], "x", 0.1).documents(0))


def test_missing_input_is_one_line_and_makes_nothing(tmp_path):
    result = run_script("--input", tmp_path / "none.jsonl", "--out", tmp_path / "out", "--tokenizer", "byte")
    assert result.returncode == 1 and not (tmp_path / "out").exists()
    assert result.stderr == f"error: input {tmp_path / 'none.jsonl'} does not exist\n"


def test_input_that_leaves_val_empty_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", [{"text": "one of two"}, {"text": "the other"}])
    with pytest.raises(ValueError, match="no document fell in val.*--val-fraction"):
        build(tmp_path / "x", fineweb.LocalSource([path], "x", 0.01), 100)
    assert not (tmp_path / "x" / "meta.json").exists()


@pytest.mark.parametrize("flags", [["--num-tokens", "0"], ["--val-fraction", "1"], ["--version", "1B"], []])
def test_wrong_flags_end_with_usage(tmp_path, flags):
    result = run_script(*flags, *(["--input", "x"] if flags and flags[0] != "--version" else []))
    assert result.returncode == 2 and "usage" in result.stderr and "Traceback" not in result.stderr


def test_default_folders():
    data = ROOT / "data"
    args = argparse.Namespace(out=None, version=None, input=[Path("books/moby.dick.jsonl.gz")])
    assert fineweb.output_folder(args) == data / "moby"
    assert fineweb.output_folder(argparse.Namespace(out=None, version="edu10B")) == data / "finewebedu10B"
    with pytest.raises(ValueError, match="need an --out"):
        fineweb.output_folder(argparse.Namespace(out=None, version=None, input=[Path("a.txt"), Path("b.txt")]))


def test_gpt2_tokens_decode_to_the_text(tmp_path):
    try:
        tokenizer = common.load_tokenizer(common.GPT2_VOCAB)
    except RuntimeError as error:
        pytest.skip(str(error))
    rows = [{"text": f"Document number {n}: été {common.EOT_TEXT}.\n"} for n in range(80)]
    path = write_jsonl(tmp_path / "in.jsonl", rows)
    result = run_script("--input", path, "--out", tmp_path / "x", "--workers", 1)
    assert result.returncode == 0, result.stderr
    meta = json.loads((tmp_path / "x" / "meta.json").read_text())
    total = 0
    for split in ("train", "val"):
        tokens = split_tokens(tmp_path / "x", split)
        held = [row["text"] for n, row in enumerate(rows) if common.held_out(str(n), 0.05) == (split == "val")]
        assert (tokens == 50256).sum() == len(held)
        assert tokenizer.decode(tokens[tokens != 50256]) == "".join(held)
        total += meta["splits"][split]["bytes"]
    assert total == sum(len(row["text"].encode("utf-8")) for row in rows)
