"""What the data tools promise whatever happens: data/common.py, data/interrupt.py and the tools' use of them.

Files are on disk before meta.json is, nobody's data set is replaced, what is no file is not read, numbers are checked,
nothing reaches a terminal raw, and every end is a sentence.
"""

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import cached_fineweb  # noqa: E402
import common  # noqa: E402
import fineweb  # noqa: E402
import shakespeare_char  # noqa: E402
import stdlib  # noqa: E402

TOOLS = ["stdlib.py", "shakespeare_char.py", "fineweb.py", "cached_fineweb.py"]


def run_script(name, *args, **kwargs):
    command = [sys.executable, str(ROOT / "data" / name), *map(os.fspath, args)]
    return subprocess.run(command, **{"capture_output": True, "text": True, "timeout": 120, **kwargs})


def assert_one_error(result, *words, code=1):
    last = result.stderr.splitlines()[-1]
    assert result.returncode == code and "Traceback" not in result.stderr, result.stderr
    assert (code == 2 or last.startswith("error: ")) and [word for word in words if word not in last] == [], last


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def char_text(words="To be or not", source="characters of a.txt, given by the user"):
    return shakespeare_char.Text(words, source, "python data/shakespeare_char.py --input a.txt")


# ----------------------------------------------------------------------------------------------------------------------
# On disk, in order


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_meta_json_comes_after_everything_else_is_on_disk(tmp_path, monkeypatch):
    events, replace, fsync = [], os.replace, os.fsync

    def note_replace(source, target):
        events.append(("replace", Path(target).name))
        replace(source, target)

    def note_fsync(descriptor):
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    monkeypatch.setattr(os, "replace", note_replace)
    monkeypatch.setattr(os, "fsync", note_fsync)
    out = tmp_path / "new" / "x"
    common.check_folder(out, "x")
    assert events == [("sync", tmp_path.name), ("sync", "new")]  # the folders' own names
    events.clear()
    char_text().make(out)
    shards = [f"x_{split}_000000.bin" for split in ("train", "val")]
    expected = []
    for name in ("progress.json", *shards, "meta.json"):
        expected += [("sync", f".{name}.{os.getpid()}.tmp"), ("replace", name), ("sync", "x")]
    assert events == expected and sorted(contents(out)) == ["meta.json", *shards]


def test_downloaded_shard_is_synced(tmp_path, monkeypatch):
    import huggingface_hub

    synced = []
    path = tmp_path / "fineweb_train_000001.bin"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: common.write_shard(path, np.arange(9)))
    monkeypatch.setattr(cached_fineweb, "sync", synced.append)
    cached_fineweb.fetch_shard(cached_fineweb.VERSIONS["10B"], "main", path)
    assert synced == [path, tmp_path]


def test_file_system_that_cannot_sync_folders_is_accepted(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    common.sync(tmp_path)


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    keep = [".notes.tmp", "a.tmp", ".a.12x.tmp"]
    for name in [".meta.json.123.tmp", ".x_train_000000.bin.4.tmp", *keep]:
        (tmp_path / name).write_text("")
    common.lock_folder(tmp_path)
    assert sorted(contents(tmp_path)) == sorted(keep)


def test_a_crash_at_any_write_of_a_char_data_set_is_mended_by_the_same_command(tmp_path, monkeypatch):
    char_text().make(make_folder(tmp_path / "straight" / "x"))
    for number in range(4):
        for after in (False, True):
            out = make_folder(tmp_path / f"{number}{after}" / "x")
            calls = iter(range(99))
            write_atomic = common.write_atomic

            def crash(path, chunks, number=number, after=after, calls=calls, write=write_atomic):
                mine = next(calls) == number
                if not mine or after:
                    write(path, chunks)
                if mine:
                    raise KeyboardInterrupt

            monkeypatch.setattr(common, "write_atomic", crash)
            with pytest.raises(KeyboardInterrupt):
                char_text().make(out)
            monkeypatch.undo()
            assert ("meta.json" in contents(out)) == (number == 3 and after)
            assert not char_text().complete(out)
            if number or after:  # something is there, and it is this text's alone
                with pytest.raises(ValueError, match="holds a data set of other text"):
                    char_text("Another text").complete(out)
            char_text().make(out)
            assert char_text().complete(out) and contents(out) == contents(tmp_path / "straight" / "x")


def make_folder(path):
    path.mkdir(parents=True)
    return path


def test_one_command_at_a_time_writes_a_folder(tmp_path):
    code = "import common, sys; common.lock_folder(common.Path(sys.argv[1])); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT / "data", **pipes) as holder:
        assert holder.stdout.readline() == "held\n"
        result = run_script("stdlib.py", "--out", tmp_path)
        assert_one_error(result, f"another command is writing to {tmp_path}", "choose another --out")
        holder.kill()
    assert list(tmp_path.iterdir()) == []
    common.lock_folder(tmp_path)
    common.lock_folder(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Nobody's data set is replaced


def test_char_data_set_of_another_text_is_left_alone(tmp_path):
    (tmp_path / "a.txt").write_text("The first text, to be kept. " * 9)
    (tmp_path / "b.txt").write_text("Another text.")
    out = tmp_path / "x"
    assert run_script("shakespeare_char.py", "--input", tmp_path / "a.txt", "--out", out).returncode == 0
    before = contents(out)
    result = run_script("shakespeare_char.py", "--input", tmp_path / "b.txt", "--out", out)
    assert_one_error(result, f"{out} holds a data set of other text", "choose another --out")
    assert contents(out) == before
    result = run_script("shakespeare_char.py", "--input", tmp_path / "a.txt", "--out", out)
    assert result.returncode == 0 and "already complete" in result.stdout and contents(out) == before
    (out / "x_val_000000.bin").write_bytes(b"damaged")
    result = run_script("shakespeare_char.py", "--input", tmp_path / "a.txt", "--out", out)
    assert result.returncode == 0 and "written" in result.stdout and contents(out) == before
    assert json.loads(before["meta.json"])["made_with"] == (
        f"python data/shakespeare_char.py --input {tmp_path}/a.txt --out {out}"
    )


def test_char_data_set_without_the_hash_of_older_versions(tmp_path):
    source = "Tiny Shakespeare, public domain, somewhere"
    for kind in ("tokens", "source"):
        out = make_folder(tmp_path / kind / "x")
        text = char_text() if kind == "tokens" else char_text(source=source)
        text.make(out)
        meta = json.loads((out / "meta.json").read_text())
        del meta["text_sha256"]
        (out / "meta.json").write_text(json.dumps(meta))
        assert text.complete(out)
        if kind == "source":  # damaged Tiny Shakespeare is made again
            (out / "x_val_000000.bin").unlink()
            assert not text.complete(out)
        with pytest.raises(ValueError, match="holds a data set of other text"):
            char_text("Another text", source="characters of b.txt").complete(out)


def test_char_data_set_does_not_replace_shards_of_unknown_origin(tmp_path):
    common.write_shard(tmp_path / f"{tmp_path.name}_train_000000.bin", np.arange(9))
    with pytest.raises(ValueError, match="holds a data set of other text"):
        char_text().complete(tmp_path)


def test_download_does_not_replace_another_input_txt(tmp_path):
    (tmp_path / "input.txt").write_text("my own text")
    result = run_script("shakespeare_char.py", "--out", tmp_path)
    assert_one_error(result, "input.txt is not Tiny Shakespeare", "choose another --out")
    assert contents(tmp_path) == {"input.txt": b"my own text"}


def test_stdlib_does_not_replace_the_users_text(tmp_path):
    out = tmp_path / "stdlib"
    (tmp_path / "stdlib.txt").write_text("my own text\n" * 9)
    args = ["--input", tmp_path / "stdlib.txt", "--out", out, "--tokenizer", "byte", "--workers", "1"]
    result = run_script("fineweb.py", *args)
    assert result.returncode == 0, result.stderr
    before = contents(out)
    for flags in ([], ["--force"]):
        assert_one_error(run_script("stdlib.py", "--out", out, *flags), "holds a data set of other text", "--out")
    assert contents(out) == before
    (out / "progress.json").unlink()
    with pytest.raises(ValueError, match="choose another --out"):
        stdlib.check_own(out)


def test_stdlib_is_recognized_by_its_source_not_by_the_command(tmp_path):
    (tmp_path / "lib").mkdir()
    for number in range(60):
        (tmp_path / "lib" / f"m{number}.py").write_text(f"# {number}")
    out = make_folder(tmp_path / "stdlib")
    splits = stdlib.make(out, tmp_path / "lib")
    meta = json.loads((out / "meta.json").read_text())
    for made_with in ("something else", None):
        meta["made_with"] = made_with
        if made_with is None:
            del meta["made_with"]
        (out / "meta.json").write_text(json.dumps(meta))
        stdlib.check_own(out)
        assert stdlib.complete(out) == splits
    (out / "meta.json").write_text("{damaged")
    stdlib.check_own(out)
    assert stdlib.complete(out) is None


@pytest.mark.parametrize("tool", ["fineweb.py", "cached_fineweb.py"])
def test_char_data_set_is_not_taken_for_another(tmp_path, tool):
    out = make_folder(tmp_path / "fineweb")
    char_text().make(out)
    before = contents(out)
    (tmp_path / "a.txt").write_text("Hello " * 99)
    args = ["--input", tmp_path / "a.txt", "--tokenizer", "byte"] if tool == "fineweb.py" else ["1"]
    result = run_script(tool, *args, "--out", out, env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"})
    assert_one_error(result, "choose another --out")
    assert contents(out) == before


# ----------------------------------------------------------------------------------------------------------------------
# A download that is cut off


def test_interrupted_extension_has_no_meta_json_but_keeps_its_commit(tmp_path, monkeypatch):
    published = cached_fineweb.VERSIONS["edu10B"]
    shards = {name: cached_fineweb.wanted_paths(published, tmp_path, 3)[n] for n, name in enumerate("v123")}

    def fetch(published, commit, path):
        if path == shards["3"]:
            raise KeyboardInterrupt
        common.write_shard(path, np.arange(9))

    monkeypatch.setattr(cached_fineweb, "probe", lambda published, revision: (revision, 1))
    monkeypatch.setattr(cached_fineweb, "fetch_shard", fetch)
    main(monkeypatch, tmp_path, 1, "--revision", "abc")
    assert not (tmp_path / "progress.json").exists()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert meta["made_with"].endswith(f"cached_fineweb.py 1 --version edu10B --revision abc --out {tmp_path}")
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, tmp_path, 3)
    assert not (tmp_path / "meta.json").exists() and shards["2"].exists()
    assert cached_fineweb.recorded_commit(published, tmp_path) == "abc"
    with pytest.raises(ValueError, match="holds shards of revision abc, not other"):
        main(monkeypatch, tmp_path, 3, "--revision", "other")
    main(monkeypatch, tmp_path, 2)
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert "cached_fineweb.py 2 --version edu10B" in meta["made_with"] and " at abc;" in meta["source"]
    main(monkeypatch, tmp_path, 1)  # a smaller number takes nothing away
    assert "cached_fineweb.py 2 " in json.loads((tmp_path / "meta.json").read_text())["made_with"]


def main(monkeypatch, out, count, *args):
    argv = ["cached_fineweb.py", str(count), "--version", "edu10B", "--out", str(out), *args]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(cached_fineweb, "token_byte_lengths", lambda vocab: np.ones(50257, dtype=np.int64))
        cached_fineweb.main()


# ----------------------------------------------------------------------------------------------------------------------
# What is no file


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("name", ["meta.json", "progress.json", "shard"])
def test_fifo_in_a_data_set_is_named_and_never_read(tmp_path, tool, name):
    prefix = {"stdlib.py": "stdlib", "cached_fineweb.py": "fineweb"}.get(tool, "x")
    out = make_folder(tmp_path / "x")
    name = f"{prefix}_val_000000.bin" if name == "shard" else name
    os.mkfifo(out / name)
    (tmp_path / "a.txt").write_text("Hello " * 99)
    args = {"fineweb.py": ["--input", tmp_path / "a.txt", "--tokenizer", "byte"], "cached_fineweb.py": ["1"]}
    args["shakespeare_char.py"] = ["--input", tmp_path / "a.txt"]
    env = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    result = run_script(tool, *args.get(tool, []), "--out", out, env=env)
    if result.returncode == 0:  # stdlib.py makes a data set again that is not whole
        assert tool == "stdlib.py" and stdlib.complete(out)
    else:
        assert_one_error(result)
        assert (out / name).is_fifo()


@pytest.mark.parametrize("path", ["/dev/zero", "fifo", "."])
def test_char_input_that_is_no_file(tmp_path, path):
    os.mkfifo(tmp_path / "fifo")
    result = run_script("shakespeare_char.py", "--input", path, "--out", tmp_path / "out", cwd=tmp_path)
    assert_one_error(result, ", not a file")


def test_shard_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "x_val_000000.bin")
    (tmp_path / "x_train_000000.bin").mkdir()
    with pytest.raises(ValueError, match="x_val_000000.bin is a FIFO, not a file"):
        common.load_shard(tmp_path / "x_val_000000.bin")
    with pytest.raises(ValueError, match="x_train_000000.bin is a folder, not a file"):
        common.load_shard(tmp_path / "x_train_000000.bin")
    with pytest.raises(ValueError, match="zero is a device, not a file"):
        common.load_shard(Path("/dev/zero"))


@pytest.mark.parametrize("count", [0, -1, -5])
def test_shard_of_no_tokens(tmp_path, count):
    header = np.zeros(256, dtype="<i4")
    header[:3] = common.MAGIC, common.VERSION, count
    (tmp_path / "x_val_000000.bin").write_bytes(header.tobytes())
    with pytest.raises(
        ValueError, match=f"promises {count} tokens, expected 1 or more: make the data set again with the"
    ):
        common.load_shard(tmp_path / "x_val_000000.bin")


def test_out_that_is_a_file(tmp_path):
    (tmp_path / "x").write_text("")
    assert_one_error(run_script("stdlib.py", "--out", tmp_path / "x"), "is a file, expected a folder", "--out")


def test_out_without_a_name():
    with pytest.raises(ValueError, match="/ has no name"):
        common.check_folder(Path("/"), "")


# ----------------------------------------------------------------------------------------------------------------------
# Numbers


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", 1), ("1e8", 10**8), ("1_000_000", 10**6), ("1e6", 10**6), ("2.5e3", 2500), ("1E+3", 1000), ("5.0", 5)],
)
def test_numbers_as_people_write_them(text, value):
    got = common.whole_number(text)
    assert got == value and type(got) is int


@pytest.mark.parametrize(
    "text",
    ["0", "-5", "255.5", "1e400", "1e999999999", "1e9999999999999999999999", str(10**30), "nan", "inf", "-inf", "sNaN"]
    + ["", "x", "1e-3", "0x10", "1 000", "9" * 10_000, "\x1b[31m7"],
)
def test_numbers_that_are_none_or_absurd(text):
    with pytest.raises(ArgumentTypeError, match="is not a whole number from 1 to 1000000000000000") as error:
        common.whole_number(text)
    assert len(str(error.value)) < 150 and str(error.value).isprintable()


@given(text=st.text() | st.floats().map(str) | st.integers().map(str))
def test_any_text_is_a_number_or_refused(text):
    try:
        assert 1 <= common.whole_number(text) <= 10**15
    except ArgumentTypeError:
        pass


@pytest.mark.parametrize("flag", ["--num-tokens", "--shard-tokens", "--workers", "--val-fraction"])
@pytest.mark.parametrize("value", ["1e400", str(10**30), "nan", "-5", "0", "x"])
def test_absurd_flags_end_in_a_sentence(tmp_path, capsys, monkeypatch, flag, value):
    monkeypatch.setattr(sys, "argv", ["fineweb.py", "--input", "a.txt", flag, value])
    with pytest.raises(SystemExit) as end:
        fineweb.parse_args()
    assert end.value.code == 2 and flag in capsys.readouterr().err.splitlines()[-1]


def test_count_of_shards(tmp_path):
    for value in ("1e8", str(10**15)):
        result = run_script("cached_fineweb.py", value, "--out", tmp_path / "x")
        assert_one_error(result, f"N = {int(float(value))}", "1 to 103 train shards of 100M tokens")
    assert_one_error(run_script("cached_fineweb.py", str(10**30)), "is not a whole number", code=2)


GOOD = {
    **{"name": "x", "tokenizer": {"kind": "byte"}, "vocab_size": 257, "eot": 256, "source": "here"},
    "splits": {"train": {"tokens": 9, "bytes": 8}, "val": {"tokens": 9, "bytes": None}},
}


@pytest.mark.parametrize("value", ["256", 255.5, -5, 10**30, float("inf"), True, [], {}, "\x1b[31m" * 99])
@pytest.mark.parametrize("key", ["vocab_size", "eot", "train tokens", "train bytes", "val tokens", "splits"])
def test_meta_json_of_the_wrong_type_or_range(tmp_path, key, value):
    meta = json.loads(json.dumps(GOOD))
    split, _, name = key.rpartition(" ")
    (meta["splits"][split] if split else meta)[name] = value
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=f"meta.json has .*{name}.*, expected ") as error:
        common.read_meta(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_meta_json_that_is_right(tmp_path):
    assert common.read_meta(tmp_path) is None
    for change in ({}, {"eot": None}, {"made_with": "python data/x.py"}, {"more": 1}):
        (tmp_path / "meta.json").write_text(json.dumps(GOOD | change))
        assert common.read_meta(tmp_path) == GOOD | change
    for change in ({"source": 5}, {"made_with": ["x"]}, {"splits": {"train": GOOD["splits"]["train"]}}):
        (tmp_path / "meta.json").write_text(json.dumps(GOOD | change))
        with pytest.raises(ValueError, match=f"meta.json has {next(iter(change))}"):
            common.read_meta(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "{", "\udcff", "[]", "5"])
def test_json_that_cannot_be_read_is_a_sentence(tmp_path, text):
    (tmp_path / "meta.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(
        ValueError, match="meta.json (is not valid JSON|holds).*remove that folder and make the data set"
    ):
        common.read_json(tmp_path / "meta.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A data set of each kind that own text gives: {file name: (folder, JSON)}."""
    root = tmp_path_factory.mktemp("finished")
    (root / "a.jsonl").write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(40)))
    char, tokens = make_folder(root / "char" / "x"), make_folder(root / "tokens" / "x")
    char_text().make(char)
    result = run_script("fineweb.py", *fineweb_args(root), "--out", tokens)
    assert result.returncode == 0, result.stderr
    return [(folder, name) for folder, name in ((char, "meta.json"), (tokens, "meta.json"), (tokens, "progress.json"))]


def fineweb_args(root):
    return ["--input", str(root / "a.jsonl"), "--tokenizer", "byte", "--shard-tokens", "100", "--workers", "1"]


def places(value, path=()):
    """Paths of all values in a JSON value."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@settings(max_examples=300, deadline=None)
@given(file=st.integers(0, 2), place=st.integers(0, 99), unfinished=st.booleans(), value=VALUES)
def test_any_json_is_accepted_or_refused_in_a_sentence(finished, file, place, unfinished, value):
    folder, name = finished[file]
    path = folder / name
    raw = path.read_bytes()
    record = target = json.loads(raw)
    all_places = list(places(record))[1:]
    *above, last = all_places[place % len(all_places)]
    for key in above:
        target = target[key]
    target[last] = value
    published = cached_fineweb.VERSIONS["10B"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fineweb.py", *fineweb_args(folder.parent.parent), "--out", str(folder)])
        source = fineweb.LocalSource(fineweb.parse_args().input, "x", 0.05)
    makers = [
        lambda: common.read_meta(folder),
        lambda: common.load_tokenizer(common.read_json(folder / "meta.json") or {}),
        lambda: common.remake_hint(folder / "x_val_000000.bin").encode("utf-8", "surrogatepass"),
        lambda: stdlib.check_own(folder),
        lambda: stdlib.complete(folder),
        lambda: char_text().complete(folder),
        lambda: cached_fineweb.recorded_commit(published, folder),
        lambda: fineweb.Job(folder, source, common.BYTE_VOCAB, 100),
    ]
    try:
        path.write_text(json.dumps(record))
        if unfinished and name == "progress.json":
            (folder / "meta.json").rename(folder / "meta")
        for make in makers:
            try:
                make()
            except (ValueError, FileNotFoundError) as error:  # what run() catches
                assert len(common.printable(common.describe(error))) < 1000
    finally:
        if (folder / "meta").exists():
            (folder / "meta").rename(folder / "meta.json")
        path.write_bytes(raw)


@pytest.mark.parametrize("spec", [[], "byte", {"kind": []}, {"kind": "char"}, {"kind": "char", "chars": 5}])
@pytest.mark.parametrize("more", [{}, {"chars": "aa"}, {"chars": ["a", "b"]}])
def test_tokenizer_of_the_wrong_type(spec, more):
    spec = {**spec, **more} if isinstance(spec, dict) and "chars" not in spec else spec
    with pytest.raises(ValueError, match="meta.json (names tokenizer|has tokenizer.chars)"):
        common.load_tokenizer({"tokenizer": spec})
    with pytest.raises(ValueError, match="no encoding"):
        common.load_tokenizer({"tokenizer": {"kind": "tiktoken", "name": [spec]}})


# ----------------------------------------------------------------------------------------------------------------------
# Nothing raw on a terminal


@given(text=st.text() | st.text("\x00\x07\x1b[31m\x7f\x9b\u202e\u2066\u2028\n\r\udc80 é日"))
def test_printable_text_has_no_controls_and_keeps_the_rest(text):
    shown = common.printable(text)
    assert shown.isprintable()
    shown.encode("utf-8")
    assert "".join(c for c in text if c.isprintable()) == text.translate(
        {ord(c): "" for c in text if not c.isprintable()}
    )
    if text.isprintable():
        assert shown == text


def test_printable_spells_what_it_replaces():
    assert common.printable("a\x1b[2J\n\x9b\x7f\u202eé\udcff") == r"a\x1b[2J\n\x9b\x7f\u202eé\udcff"


def test_names_with_controls_never_reach_the_terminal_raw(tmp_path):
    folder = make_folder(tmp_path / "in\x1b[31m")
    (folder / "a\x1b[2J.jsonl").write_text('{"text": "hello"}\n{"text": null}\n{"text": "bye"}\n{"text": "more"}\n')
    (folder / "b\x9b.c\x1bsv").write_text("")
    path = os.fsencode(folder) + b"/\xff.jsonl"
    Path(os.fsdecode(path)).write_text('{"text": "hello"}\n' * 30)
    out = tmp_path / "out\x1b[32m"
    args = ["--input", folder, "--out", out, "--tokenizer", "byte", "--workers", "1", "--val-fraction", "0.5"]
    written = run_script("fineweb.py", *args)
    again = run_script("fineweb.py", *args)
    refused = run_script("fineweb.py", *args, "--num-tokens", "5")
    (tmp_path / "x\x1b.txt").write_text("a")
    short = run_script("shakespeare_char.py", "--input", tmp_path / "x\x1b.txt", "--out", tmp_path / "y\x1b")
    assert [result.returncode for result in (written, again, refused, short)] == [0, 0, 1, 1], written.stderr
    for result in (written, again, refused, short):
        said = result.stdout + result.stderr
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", said), said
    assert r"out\x1b[32m: written" in written.stdout and r"a\x1b[2J.jsonl line 2" in written.stderr
    assert r".c\x1bsv file (1, the first is b\x9b.c\x1bsv)" in written.stderr
    meta = common.read_meta(out)
    assert "\udcff.jsonl" in meta["source"]


def test_console_that_lacks_a_character(tmp_path):
    (tmp_path / "é日.txt").write_text("some text\n" * 9)
    args = ["--input", tmp_path / "é日.txt", "--out", tmp_path / "日", "--tokenizer", "byte", "--workers", "1"]
    result = run_script("fineweb.py", *args, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and r"\u65e5: written" in result.stdout, result.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Every end is a sentence


@pytest.mark.parametrize("tool", TOOLS)
def test_ctrl_c_during_imports(tmp_path, tool):
    (tmp_path / "numpy.py").write_text("raise KeyboardInterrupt\n")
    args = {"fineweb.py": ["--input", "x"], "cached_fineweb.py": ["1"]}.get(tool, [])
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    result = run_script(tool, *args, "--out", tmp_path / "out", env=env)
    assert (result.returncode, result.stderr) == (130, "interrupted: run the same command again to go on\n")
    assert [path.name for path in tmp_path.iterdir()] == ["numpy.py"]


def test_error_during_imports_is_still_shown(tmp_path):
    (tmp_path / "numpy.py").write_text("raise ImportError('no numpy here')\n")
    result = run_script("stdlib.py", env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"})
    assert result.returncode == 1 and "no numpy here" in result.stderr


def test_interrupt_leaves_other_programs_alone():
    code = "import sys; import data.common, stdlib; sys.exit(sys.excepthook is not sys.__excepthook__)"
    env = {**os.environ, "PYTHONPATH": str(ROOT / "data")}
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env).returncode == 0


def test_ctrl_c_exits_130(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        common.run(interrupted)
    assert end.value.code == 130 and capsys.readouterr().err == "interrupted: run the same command again to go on\n"


def test_workers_start_with_ctrl_c_held():
    with fineweb.sigint_held():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, set())
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "out of memory: give smaller --shard-tokens, fewer --workers, or shorter documents"),
        (PermissionError(13, "Permission denied", "a\x1bb"), r"a\x1bb: Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (OSError("cannot write x"), "cannot write x"),
        (ValueError("two\nlines"), r"two\nlines"),
        (RuntimeError(), "RuntimeError"),
        (OverflowError("int too large"), "int too large"),
    ],
)
def test_errors_are_one_line(error, sentence):
    def fail():
        raise error

    with pytest.raises(SystemExit) as end:
        common.run(fail)
    assert end.value.code == f"error: {sentence}"


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device; free some space there and run the same command again"),
        (errno.EDQUOT, "; free some space there and run the same command again"),
        (errno.EACCES, "Permission denied; choose another folder"),
        (errno.EROFS, "Read-only file system; choose another folder"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_failed_write_names_the_file_and_advises_by_the_reason(tmp_path, number, advice):
    def chunks():
        yield b"new"
        raise OSError(number, os.strerror(number))

    with pytest.raises(OSError) as error:
        common.write_atomic(tmp_path / "a.bin", chunks())
    assert str(error.value).startswith(f"cannot write {tmp_path}/a.bin: ") and str(error.value).endswith(advice)


def test_failed_read_names_the_file(tmp_path, monkeypatch):
    class Broken(io.BytesIO):
        def readline(self, size):
            raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: Broken())
    with pytest.raises(OSError) as error:
        list(fineweb.read_lines(Path("a.jsonl")))
    monkeypatch.undo()
    assert common.describe(error.value) == "a.jsonl: Input/output error"


def test_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    def mkdir(self, exist_ok):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(OSError, match="cannot make the folder .*/x: Permission denied; choose another folder"):
        common.check_folder(tmp_path / "x", "x")


def test_disk_errors_of_a_download_are_no_network_errors():
    error = OSError(errno.EIO, "Input/output error", "/disk/shard")
    failure = cached_fineweb.explain("x", error)
    assert str(failure) == "cannot write /disk/shard while downloading x: Input/output error"
    assert cached_fineweb.explain("x", ConnectionResetError(104, "reset")) is None


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("kind", ["full", "closed"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_takes_nothing(tmp_path, kind, unbuffered):
    (tmp_path / "a.txt").write_text("a text")
    command = [sys.executable, str(ROOT / "data" / "shakespeare_char.py"), "--input", "a.txt", "--out", "x"]
    if kind == "full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, cwd=tmp_path, stdout=stdout, stderr=subprocess.PIPE, text=True, env=env)
    os.close(stdout)
    reason = {"full": "No space left on device", "closed": "Broken pipe"}[kind]
    assert result.returncode == 1 and result.stderr.splitlines()[1:] == [
        f"error: the data set is there, but standard output takes nothing: {reason}"
    ]
    assert common.read_meta(tmp_path / "x")


def test_killed_worker_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a text " * 99)
    monkeypatch.setattr(fineweb, "tokenize", end_process)
    source = fineweb.LocalSource([tmp_path / "a.txt"], "x", 0.1)
    job = fineweb.Job(make_folder(tmp_path / "x"), source, common.BYTE_VOCAB, 100)
    with pytest.raises(
        RuntimeError, match="a process that tokenizes was killed: if memory ran out, give fewer --workers"
    ):
        fineweb.make(job, 1, None)


def end_process(texts):
    os._exit(9)


@pytest.mark.skipif(shutil.which("python") is None, reason="made_with calls it python")
def test_made_with_makes_the_data_set_again(tmp_path):
    (tmp_path / "my text.txt").write_text("some text\n" * 50)
    out = tmp_path / "my set"
    args = ["--input", "my text.txt", "--out", "my set", "--tokenizer", "byte", "--shard-tokens", "1e2"]
    assert run_script("fineweb.py", *args, cwd=tmp_path).returncode == 0
    before = contents(out)
    shutil.rmtree(out)
    words = json.loads(before["meta.json"])["made_with"]
    environment = {**os.environ, "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]}
    subprocess.run(words, shell=True, cwd=ROOT, env=environment, check=True, capture_output=True)
    assert contents(out) == before
