"""The two data sets that need no hub: data/stdlib.py and data/shakespeare_char.py."""

import hashlib
import json
import subprocess
import sys
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import common  # noqa: E402
import shakespeare_char  # noqa: E402
import stdlib  # noqa: E402


def run_script(name, *args, cwd=ROOT):
    command = [sys.executable, str(ROOT / "data" / name), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ----------------------------------------------------------------------------------------------------------------------
# stdlib


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The real data set of this Python, made from another working folder."""
    out = tmp_path_factory.mktemp("data") / "stdlib"
    result = run_script("stdlib.py", "--out", out, cwd=out.parent)
    assert result.returncode == 0, result.stderr
    return out, result.stdout


def test_stdlib_shards_agree_with_meta(made):
    out, printed = made
    meta = json.loads((out / "meta.json").read_text())
    assert (meta["vocab_size"], meta["eot"], meta["tokenizer"]) == (257, 256, {"kind": "byte"})
    assert "PSF" in meta["source"] and sys.version.split()[0] in meta["source"]
    for split in ("train", "val"):
        tokens = common.load_shard(out / f"stdlib_{split}_000000.bin")
        assert tokens[0] == 256 and tokens.max() == 256
        counts = {"tokens": len(tokens), "bytes": int((tokens != 256).sum())}
        assert meta["splits"][split] == counts
        assert f"{len(tokens):,} {split}" in printed
    share = meta["splits"]["val"]["tokens"] / meta["splits"]["train"]["tokens"]
    assert 0.02 < share < 0.15


def test_stdlib_documents_are_whole_source_files(made):
    out, _ = made
    tokens = common.load_shard(out / "stdlib_val_000000.bin")
    documents = np.split(np.array(tokens), np.flatnonzero(tokens == 256))[1:]
    texts = [bytes(document[1:].astype(np.uint8)).decode("utf-8") for document in documents]
    known = stdlib.read_documents(Path(stdlib.sysconfig.get_path("stdlib")))
    expected = [text.decode() for name, text in known.items() if common.held_out(name, stdlib.VAL_FRACTION)]
    assert texts == expected
    for text in texts[:20]:
        compile(text, "document", "exec", dont_inherit=True)


def test_stdlib_is_made_once_per_python_version(made):
    out, _ = made
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    result = run_script("stdlib.py", "--out", out)
    assert "already complete" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before


def fake_library(root):
    """A small library with what must and must not be read; returns the names that must."""
    wanted = ["b.py", "a/__init__.py", "a/z.py", *(f"m{number:03}.py" for number in range(60))]
    unwanted = ["test/t.py", "a/tests/t.py", "idlelib/idle_test/t.py", "site-packages/s.py", "a/__pycache__/c.py"]
    unwanted += ["_sysconfigdata__linux_.py", "config-3.11/c.py", "a/note.txt", "encodings/cp1.py"]
    for name in wanted + unwanted:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(f"# {name}\r\n".encode())
    (root / "latin.py").write_bytes("# é".encode("latin-1"))
    (root / "empty.py").write_bytes(b"")
    return sorted(wanted)


def test_stdlib_reads_only_source_in_the_order_of_names(tmp_path):
    wanted = fake_library(tmp_path)
    documents = stdlib.read_documents(tmp_path)
    assert list(documents) == wanted
    assert documents["a/z.py"] == b"# a/z.py\n"


def test_stdlib_is_the_same_from_any_folder(tmp_path):
    outs = []
    for number, name in enumerate(("x", "other/place")):
        fake_library(tmp_path / name)
        out = tmp_path / f"out{number}"
        out.mkdir()
        stdlib.make(out, tmp_path / name)
        outs.append(contents(out))
    metas = [json.loads(files.pop("meta.json")) for files in outs]
    for number, meta in enumerate(metas):
        assert meta.pop("made_with") == f"python data/stdlib.py --out {tmp_path}/out{number}"
    assert metas[0] == metas[1] and outs[0] == outs[1] and len(outs[0]) == 2


@pytest.mark.parametrize("damage", ["truncate", "delete", "version", "meta"])
def test_stdlib_remakes_what_is_not_complete(tmp_path, damage):
    root, out = tmp_path / "lib", tmp_path / "out"
    fake_library(root)
    out.mkdir()
    splits = stdlib.make(out, root)
    assert stdlib.complete(out) == splits
    shard, meta = out / "stdlib_val_000000.bin", out / "meta.json"
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "delete":
        shard.unlink()
    elif damage == "version":
        meta.write_text(meta.read_text().replace("library of", "library of Old"))
    else:
        meta.write_text('{"source": ' + json.dumps(stdlib.source_text()) + "}")
    assert stdlib.complete(out) is None
    assert stdlib.make(out, root) == splits and stdlib.complete(out) == splits


def test_stdlib_without_source_files_says_so(tmp_path):
    (tmp_path / "os.pyc").write_bytes(b"")
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(FileNotFoundError, match="no standard library source.*zip or frozen"):
            stdlib.read_documents(root)


def test_stdlib_refuses_a_folder_of_another_data_set(tmp_path):
    common.write_shard(tmp_path / "fineweb_train_000001.bin", np.arange(3))
    result = run_script("stdlib.py", "--out", tmp_path)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ") and "fineweb_train_000001.bin" in result.stderr
    assert len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------------------
# shakespeare_char


def test_shakespeare_char_from_a_file(tmp_path):
    text = "To be,\r\nor not – 𝄞 to be\n" * 40
    (tmp_path / "play.txt").write_bytes(text.encode("utf-8"))
    result = run_script("shakespeare_char.py", "--input", "play.txt", "--out", "hamlet", cwd=tmp_path)
    assert result.returncode == 0 and "is not Tiny Shakespeare" in result.stderr
    out = tmp_path / "hamlet"
    meta = json.loads((out / "meta.json").read_text())
    tokenizer = common.load_tokenizer(meta)
    parts = {split: common.load_shard(out / f"hamlet_{split}_000000.bin") for split in ("train", "val")}
    assert meta["tokenizer"]["chars"] == "".join(sorted(set(text))) and meta["eot"] is None
    assert meta["vocab_size"] == len(set(text)) and meta["name"] == "hamlet" and "play.txt" in meta["source"]
    assert tokenizer.decode(parts["train"]) == text[: int(0.9 * len(text))]
    assert tokenizer.decode(parts["val"]) == text[int(0.9 * len(text)) :]
    for split, tokens in parts.items():
        size = len(tokenizer.decode(tokens).encode("utf-8"))
        assert meta["splits"][split] == {"tokens": len(tokens), "bytes": size}


@given(text=st.text(min_size=1))
def test_char_encoding_matches_the_tokenizer(text):
    chars, tokens = shakespeare_char.encode(text)
    assert chars == "".join(sorted(set(text)))
    assert tokens.tolist() == common.CharTokenizer(chars).encode(text)


def test_too_many_characters_are_refused():
    points = [point for point in range(70_000) if not 0xD800 <= point < 0xE000]
    text = "".join(map(chr, points))
    chars, _ = shakespeare_char.encode(text[:65_535])
    assert len(chars) == 65_535
    with pytest.raises(ValueError, match="65536 distinct characters, at most 65535"):
        shakespeare_char.encode(text[:65_536])


@pytest.mark.parametrize(
    ("raw", "message"), [(b"\xff\xfe", "not UTF-8"), (b"a", "1 characters, too few"), (None, "does not exist")]
)
def test_unusable_input_is_one_error_line(tmp_path, raw, message):
    path = tmp_path / "in.txt"
    if raw is not None:
        path.write_bytes(raw)
    result = run_script("shakespeare_char.py", "--input", path, "--out", tmp_path / "out")
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and last.startswith("error: ") and message in last
    assert "Traceback" not in result.stderr and list((tmp_path / "out").glob("*")) == []


def test_download_checks_the_text(tmp_path, monkeypatch):
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.write_text("To be")
    with pytest.raises(RuntimeError, match="not Tiny Shakespeare"):
        shakespeare_char.download(copy, source.as_uri())
    assert not copy.exists()
    monkeypatch.setattr(shakespeare_char, "SIZE", 5)
    monkeypatch.setattr(shakespeare_char, "SHA256", hashlib.sha256(b"To be").hexdigest())
    shakespeare_char.download(copy, source.as_uri())
    assert copy.read_text() == "To be"


def test_download_without_network_says_what_to_do(tmp_path, monkeypatch):
    calls = []

    def fail(url, timeout):
        calls.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(shakespeare_char.urllib.request, "urlopen", fail)
    monkeypatch.setattr(shakespeare_char.time, "sleep", lambda seconds: None)
    with pytest.raises(RuntimeError, match="no route to host.*--input FILE"):
        shakespeare_char.download(tmp_path / "input.txt")
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["stdlib.py", "shakespeare_char.py", "fineweb.py", "cached_fineweb.py"])
def test_help_works_from_anywhere(script, tmp_path):
    result = run_script(script, "--help", cwd=tmp_path)
    assert result.returncode == 0 and "usage" in result.stdout and list(tmp_path.iterdir()) == []
