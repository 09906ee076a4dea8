"""Own text: what is read, skipped, left out and held out, and resuming by content: data/fineweb.py."""

import json
import os
import re
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
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


class Crash(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def byte_worker():
    """Tokenizing in this process, without waiting for the disk (test_data_safety.py looks at that)."""
    fineweb.WORKER.update(tokenizer=common.load_tokenizer(common.BYTE_VOCAB), eot=EOT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def write_rows(path, rows):
    """A .jsonl of texts; a row that is no string is written as it is."""
    lines = [json.dumps({"text": row} if isinstance(row, str) else row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def local(*paths, fraction=0.3, val=()):
    return fineweb.LocalSource(list(paths), "x", fraction, list(val))


def build(out, source, shard_tokens=100, num_tokens=None):
    common.check_folder(out, source.prefix)
    job = fineweb.Job(out, source, common.BYTE_VOCAB, shard_tokens, num_tokens)
    job.run(InlineExecutor(), 2, Bar())
    return job


def interrupted(out, source, shards, monkeypatch, **limits):
    """A run that is cut off after some shards."""
    written = []

    def write_shard(path, tokens):
        if len(written) == shards:
            raise Crash
        common.write_shard(path, tokens)
        written.append(path)

    with monkeypatch.context() as patch:
        patch.setattr(fineweb, "write_shard", write_shard)
        with pytest.raises(Crash):
            build(out, source, **limits)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def text_of(out, split):
    """The documents of a split, as written."""
    tokens = np.concatenate([common.load_shard(path) for path in sorted(out.glob(f"*_{split}_*.bin"))])
    return [bytes(part[1:].astype(np.uint8)).decode() for part in np.split(tokens, np.flatnonzero(tokens == EOT))[1:]]


TEXTS = [f"Text number {n} is here." for n in range(60)]


# ----------------------------------------------------------------------------------------------------------------------
# Rows without text


def test_rows_without_text_are_skipped_and_counted(tmp_path):
    bad = [{"text": None}, {"text": 7}, {"title": "x"}, None, [], {"text": ["x"]}]
    plain = build(tmp_path / "plain" / "x", local(write_rows(tmp_path / "plain.jsonl", TEXTS)))
    path = write_rows(tmp_path / "in.jsonl", [*TEXTS[:9], *bad, *TEXTS[9:]])
    with open(path, "a") as file:
        file.write('{"text": "cut o\n')
    job = build(tmp_path / "mixed" / "x", local(path))
    assert plain.skipped() == 0 and job.skipped() == len(bad) + 1
    assert job.source.skipped.first == f"{path} line 10 has no string `text`"
    plain_meta, meta = (json.loads((tmp_path / n / "x" / "meta.json").read_text()) for n in ("plain", "mixed"))
    assert meta["skipped_rows"] == len(bad) + 1 and "skipped_rows" not in plain_meta
    assert meta["splits"] == plain_meta["splits"]
    for split in ("train", "val"):
        assert text_of(tmp_path / "mixed" / "x", split) == text_of(tmp_path / "plain" / "x", split)


def test_null_in_parquet_is_skipped(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "id": [1, 2, 3]}), path)
    source = local(path)
    assert [document.text for document in source.documents(0)] == ["a", "b"]
    assert source.skipped.first == f"{path} row 1 has no string `text`"


def test_skipped_rows_are_counted_up_to_num_tokens_whatever_was_read_ahead(tmp_path, monkeypatch):
    rows = [row for text in TEXTS for row in (None, text)]
    path = write_rows(tmp_path / "in.jsonl", rows)
    counts = set()
    for chars in (1, 200, 10**6):
        monkeypatch.setattr(fineweb, "BATCH_CHARS", chars)
        counts.add(build(tmp_path / str(chars) / "x", local(path), num_tokens=300).skipped())
    assert len(counts) == 1 and 10 < counts.pop() < 40


def test_long_line_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(fineweb, "MAX_LINE", 1000)
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "' + "a" * 2000)
    with pytest.raises(ValueError, match="in.jsonl line 2 is longer than 1,000 bytes"):
        list(local(path).documents(0))


def test_half_of_a_surrogate_pair_is_text(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", ["\ud800 half", *TEXTS])
    build(tmp_path / "x", local(path))
    assert len(text_of(tmp_path / "x", "train")) + len(text_of(tmp_path / "x", "val")) == 1 + len(TEXTS)


# ----------------------------------------------------------------------------------------------------------------------
# Resuming by content


def change_null(path):
    write_rows(path, [*TEXTS[:3], *TEXTS[3:]])


def change_name(path):
    path.rename(path.with_name("renamed.jsonl"))


def change_end(path):
    write_rows(path, [*TEXTS[:3], None, *TEXTS[3:50], "another end"])


@pytest.mark.parametrize("change", [change_null, change_name, change_end])
@pytest.mark.parametrize("shards", [1, 3, 6])
def test_run_goes_on_after_a_change_behind_what_was_done(tmp_path, monkeypatch, change, shards):
    path = write_rows(tmp_path / "in.jsonl", [*TEXTS[:3], None, *TEXTS[3:]])
    interrupted(tmp_path / "out" / "x", local(path), shards, monkeypatch)
    kept = {name: raw for name, raw in contents(tmp_path / "out" / "x").items() if name.endswith(".bin")}
    assert len(kept) == shards
    change(path)
    path = next(tmp_path.glob("*.jsonl"))
    build(tmp_path / "out" / "x", local(path))
    build(tmp_path / "straight" / "x", local(path))
    assert contents(tmp_path / "out" / "x") == contents(tmp_path / "straight" / "x")
    assert kept.items() <= contents(tmp_path / "out" / "x").items()


def test_changed_documents_that_were_used_are_refused_by_the_first_file(tmp_path, monkeypatch):
    folder = tmp_path / "texts"
    folder.mkdir()
    for n, text in enumerate(TEXTS):
        (folder / f"f{n:02}.txt").write_text(text)
    out = tmp_path / "x"
    interrupted(out, local(folder), 5, monkeypatch)
    before = contents(out)
    train = [n for n in range(60) if not common.held_out(f"f{n:02}.txt", 0.3)]
    for number in (train[8], train[4]):
        (folder / f"f{number:02}.txt").write_text("other text")
        match = (
            rf"^f{number:02}.txt has other documents than when .*x was made: choose another --out, or remove .*x and"
        )
        with pytest.raises(ValueError, match=match):
            build(out, local(folder))
    assert contents(out) == before
    for number in (train[8], train[4]):
        (folder / f"f{number:02}.txt").write_text(TEXTS[number])
    (folder / f"f{train[-1]:02}.txt").write_text("changed, but not used yet")
    build(out, local(folder))
    assert "changed, but not used yet" in text_of(out, "train")


def test_input_that_lost_its_end_is_refused(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    interrupted(tmp_path / "x", local(path), 5, monkeypatch)
    write_rows(path, TEXTS[:6])
    with pytest.raises(ValueError, match="in.jsonl has other documents"):
        build(tmp_path / "x", local(path))


@pytest.mark.parametrize("num_tokens", [None, 400])
def test_finished_data_set_of_a_changed_input_is_refused(tmp_path, num_tokens):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "x"
    build(out, local(path), num_tokens=num_tokens)
    for rows, good in [(TEXTS, True), ([None, *TEXTS], True), (["new", *TEXTS], False), ([*TEXTS, "new"], num_tokens)]:
        write_rows(path, rows)
        if good:
            assert fineweb.Job(out, local(path), common.BYTE_VOCAB, 100, num_tokens).complete
        else:
            with pytest.raises(ValueError, match="in.jsonl has other documents"):
                fineweb.Job(out, local(path), common.BYTE_VOCAB, 100, num_tokens)


def test_shard_that_a_killed_run_did_not_note_does_not_stay(tmp_path, monkeypatch):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    out = tmp_path / "out" / "x"
    interrupted(out, local(path), 3, monkeypatch)
    common.write_shard(out / "x_train_000077.bin", np.arange(5))
    build(out, local(path))
    build(tmp_path / "straight" / "x", local(path))
    assert contents(out) == contents(tmp_path / "straight" / "x")


@pytest.mark.parametrize(
    "damage",
    [
        {"streams": []},
        {"streams": {"train": 5}},
        {"streams": {"train": {"shards": "1"}}},
        {"streams": {"train": {"shards": 1, "document": 0, "offset": -1, "used": [], "splits": {}}}},
        {"streams": {"train": {"shards": 1, "document": 0, "offset": 1, "used": [["a", "1", "x"]], "splits": {}}}},
        {"streams": {"train": {"shards": 1, "document": 0, "offset": 1, "splits": {}}}},  # of an older version
        {"streams": {"train": {"shards": 1e400, "document": 0, "offset": 1, "used": [], "splits": {"train": 3}}}},
    ],
)
def test_damaged_progress_is_one_sentence(tmp_path, damage):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    fineweb.Job(tmp_path, local(path, fraction=0.2), common.BYTE_VOCAB, 100).save()
    progress = json.loads((tmp_path / "progress.json").read_text())
    (tmp_path / "progress.json").write_text(json.dumps(progress | damage))
    with pytest.raises(
        ValueError, match="progress.json is damaged, or of an older version: remove .* and run the same"
    ):
        fineweb.Job(tmp_path, local(path, fraction=0.2), common.BYTE_VOCAB, 100)


def test_progress_with_endless_shards_names_the_first_that_is_missing(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    fineweb.Job(tmp_path, local(path), common.BYTE_VOCAB, 100).save()
    progress = json.loads((tmp_path / "progress.json").read_text())
    progress["streams"]["train"]["shards"] = 2**62
    (tmp_path / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(
        FileNotFoundError, match="x_train_000000.bin does not exist: remove .* and run the same command"
    ):
        fineweb.Job(tmp_path, local(path), common.BYTE_VOCAB, 100)


def test_finished_data_set_of_an_older_version_is_complete(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    build(tmp_path / "x", local(path))
    progress = json.loads((tmp_path / "x" / "progress.json").read_text())
    for saved in progress["streams"].values():
        del saved["used"]
    (tmp_path / "x" / "progress.json").write_text(json.dumps(progress))
    assert fineweb.Job(tmp_path / "x", local(path), common.BYTE_VOCAB, 100).complete


# ----------------------------------------------------------------------------------------------------------------------
# What is held out


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.99])
def test_single_txt_is_split_inside(tmp_path, fraction):
    path = tmp_path / "mine.txt"
    path.write_text("".join(f"Line {n} of this text.\n" + "\n" * (n % 10 == 0) for n in range(1000)))
    build(tmp_path / "x", local(path, fraction=fraction), 10_000)
    (train,), (val,) = text_of(tmp_path / "x", "train"), text_of(tmp_path / "x", "val")
    assert train + val == path.read_text()
    assert train.endswith("\n") and val.startswith("Line")
    assert fraction <= len(val) / len(train + val) <= 1.25 * fraction + 0.005
    assert "end of the text" in json.loads((tmp_path / "x" / "meta.json").read_text())["source"]


def test_single_txt_with_num_tokens_has_all_of_val(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("word " * 1000)
    build(tmp_path / "x", local(path, fraction=0.1), 10_000, num_tokens=100)
    assert len(text_of(tmp_path / "x", "val")[0]) == 500 and len(text_of(tmp_path / "x", "train")[0]) == 99


def test_single_row_is_split_inside_too(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", [None, "a\n" * 50, ""])
    build(tmp_path / "x", local(path, fraction=0.2))
    assert len(text_of(tmp_path / "x", "val")[0]) == 20


def test_single_character_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="a.txt has 1 character, too few"):
        build(tmp_path / "x", local(tmp_path / "a.txt"))


@given(text=st.text("ab\n", min_size=2, max_size=300), fraction=st.floats(0.001, 0.999))
def test_cut_leaves_text_on_both_sides(text, fraction):
    cut = fineweb.cut_place(text, fraction)
    share = min(len(text) - 1, max(1, round(len(text) * fraction)))
    assert 0 < cut < len(text) and share <= len(text) - cut <= 1.25 * share + 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *(("train.jsonl", "train"), ("train-00000-of-00002.parquet", "train"), ("TRAIN_1.txt", "train")),
        *(("val.jsonl", "val"), ("valid.txt", "val"), ("validation-0.parquet", "val"), ("my/val/a.txt", "val")),
        *(("test.txt", "test"), ("train/val.txt", "val"), ("valley.txt", None), ("trains/a.txt", None)),
        *(("training.txt", None), ("a_val.txt", None), ("val_notes/a.txt", None)),
    ],
)
def test_role_of_a_name(name, expected):
    assert fineweb.role(name) == expected


@pytest.mark.parametrize("layout", ["folder", "files", "flag", "flag inside", "folders"])
def test_own_val_files_are_val(tmp_path, layout):
    folder = tmp_path / "corpus"
    folder.mkdir()
    names = {"train": "train.jsonl", "val": "val.jsonl"}
    if "flag" in layout:
        names = {"train": "a.jsonl", "val": "z.jsonl"}
    elif layout == "folders":
        names = {"train": "train/a.jsonl", "val": "validation/a.jsonl"}
        (folder / "train").mkdir()
        (folder / "validation").mkdir()
    train, val = write_rows(folder / names["train"], TEXTS[:40]), write_rows(folder / names["val"], TEXTS[40:])
    sources = {
        "folder": lambda: local(folder),
        "files": lambda: local(train, val),
        "flag": lambda: local(train, val=[val]),
        "flag inside": lambda: local(folder, val=[val]),
        "folders": lambda: local(train.parent, val.parent),
    }
    source = sources[layout]()
    build(tmp_path / "x", source)
    assert text_of(tmp_path / "x", "train") == TEXTS[:40] and text_of(tmp_path / "x", "val") == TEXTS[40:]
    name = val.name if layout != "folder" else names["val"]
    assert source.what_is_val() == f"val is {name}"
    assert f"val is {name}" in json.loads((tmp_path / "x" / "meta.json").read_text())["source"]


def test_own_val_is_whole_whatever_num_tokens(tmp_path):
    write_rows(tmp_path / "train.jsonl", TEXTS)
    write_rows(tmp_path / "val.jsonl", TEXTS[:9])
    build(tmp_path / "x", local(tmp_path / "train.jsonl", tmp_path / "val.jsonl"), num_tokens=150)
    assert text_of(tmp_path / "x", "val") == TEXTS[:9] and len(text_of(tmp_path / "x", "train")) < 9


def test_test_files_are_left_out_by_name(tmp_path):
    for name in ("train", "test", "valid"):
        write_rows(tmp_path / f"{name}.jsonl", [name])
    source = local(tmp_path)
    assert source.left_out == [("test file", "test.jsonl")]
    assert [(document.text, document.split) for document in source.documents(0)] == [
        ("valid", "val"),
        ("train", "train"),
    ]


def test_names_without_a_val_leave_the_split_to_the_hash(tmp_path):
    paths = [write_rows(tmp_path / f"train-{n}.jsonl", [str(n), "x"]) for n in range(2)]
    assert [file.split for file in local(*paths).files] == [None, None]
    paths = [write_rows(tmp_path / f"val-{n}.jsonl", [str(n), "x"]) for n in range(2)]
    assert [file.split for file in local(*paths).files] == [None, None]


# ----------------------------------------------------------------------------------------------------------------------
# What is left out


def test_files_of_other_kinds_are_named_with_counts(tmp_path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    write_rows(folder / "a.JSONL", TEXTS)
    for name in ("t.csv", "sub/u.csv", "README.md", "x.json", "y.jsonl.zst", "LICENSE"):
        (folder / name).write_text("x")
    os.mkfifo(folder / "pipe.txt")
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    (tmp_path / "elsewhere").mkdir()
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    source = local(folder)
    assert [file.name for file in source.files] == ["a.JSONL"]
    said = fineweb.what_left_out(source.left_out)
    assert said.startswith(".csv file (2, the first is sub/u.csv), ")
    for word in (".md file (1", ".json file (1", ".zst file (1", "file without suffix (1, the first is LICENSE)"):
        assert word in said
    for word in ("FIFO (1, the first is pipe.txt)", "broken link (1", "linked folder (1, the first is link)"):
        assert word in said


def test_many_kinds_stay_one_line():
    said = fineweb.what_left_out([(f".{n} file", f"a.{n}") for n in range(500)])
    assert len(said) < 500 and said.endswith("and 490 more kinds")


@pytest.mark.parametrize(("kind", "words"), [("fifo", "is a FIFO, not a file"), ("device", "is a device, not a file")])
def test_no_fifo_or_device_is_read(tmp_path, kind, words):
    path = Path("/dev/zero")
    if kind == "fifo":
        os.mkfifo(path := tmp_path / "in.txt")
    for paths in ([[path], []], [[write_rows(tmp_path / "a.jsonl", TEXTS)], [path]]):
        with pytest.raises(ValueError, match=words):
            local(*paths[0], val=paths[1])


def test_folder_that_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    write_rows(tmp_path / "a.jsonl", TEXTS)

    def walk(folder, onerror):
        onerror(PermissionError(13, "Permission denied", str(folder)))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(PermissionError):
        local(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Names and commands


@pytest.mark.parametrize("name", [".txt", "stdlib.txt", "shakespeare_char.txt", "fineweb10B.jsonl", "finewebedu.txt"])
def test_no_default_folder_of_another_data_set(tmp_path, name):
    args = parse("--input", write_rows(tmp_path / name, ["x"]))
    with pytest.raises(ValueError, match="name a folder with --out"):
        fineweb.output_folder(args)


def parse(*args):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["fineweb.py", *map(str, args)])
        return fineweb.parse_args()


def test_made_with_is_the_command_from_the_project_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT / "data")
    args = parse("--input", "README.md", tmp_path / "b c.txt", "--workers", 3, "--num_tokens", "1e3", "--out", "my set")
    words = f"--input data/README.md '{tmp_path}/b c.txt' --out 'data/my set' --num-tokens 1000"
    assert fineweb.made_with(args) == f"python data/fineweb.py {words}"
    assert fineweb.made_with(parse("--version", "edu10B")) == "python data/fineweb.py --version edu10B"
    path = tmp_path / "a.txt"
    args = parse(
        "--input", path, "--val-input", path, "--tokenizer", "byte", "--val-fraction", ".1", "--shard-tokens", "9"
    )
    words = f"--input {path} --val-input {path} --shard-tokens 9 --val-fraction 0.1 --tokenizer byte"
    assert fineweb.made_with(args) == f"python data/fineweb.py {words}"


def test_made_with_is_in_meta_and_in_the_advice(tmp_path):
    path = write_rows(tmp_path / "in.jsonl", TEXTS)
    job = fineweb.Job(tmp_path / "x", local(path), common.BYTE_VOCAB, 100, None, "python data/fineweb.py --input 'a b'")
    (tmp_path / "x").mkdir()
    job.run(InlineExecutor(), 2, Bar())
    (tmp_path / "x" / "x_val_000000.bin").write_bytes(b"")
    advice = re.escape("make the data set again with python data/fineweb.py --input 'a b'")
    with pytest.raises(ValueError, match=advice):
        common.load_shard(tmp_path / "x" / "x_val_000000.bin")
    (tmp_path / "x" / "meta.json").unlink()
    with pytest.raises(ValueError, match=advice):
        common.load_shard(tmp_path / "x" / "x_val_000000.bin")


def test_val_input_needs_input(capsys):
    with pytest.raises(SystemExit):
        parse("--version", "10B", "--val-input", "a.txt")
    assert "--val-input goes with --input" in capsys.readouterr().err
