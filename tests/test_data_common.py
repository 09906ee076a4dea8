"""Shards, meta.json, splits and tokenizers: data/common.py."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import common  # noqa: E402

BYTE = common.load_tokenizer(common.BYTE_VOCAB)
TEXTS = st.text() | st.text().map(lambda text: f"{text}{common.EOT_TEXT}{text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@given(tokens=st.lists(st.integers(0, 65535), min_size=1, max_size=300))
def test_shard_round_trip(folder, tokens):
    path = folder / "a_train_000000.bin"
    common.write_shard(path, np.array(tokens))
    assert common.read_shard_header(path) == len(tokens)
    assert common.load_shard(path).tolist() == tokens
    assert path.stat().st_size == 1024 + 2 * len(tokens)


def test_shard_bytes_are_those_of_the_published_format(tmp_path):
    path = tmp_path / "a_val_000000.bin"
    common.write_shard(path, np.array([1, 50256, 258], dtype=np.int64))
    header = np.array([20240520, 1, 3] + [0] * 253, dtype="<i4").tobytes()
    assert path.read_bytes() == header + bytes([1, 0, 0x50, 0xC4, 2, 1])


@pytest.mark.parametrize("tokens", [[-1], [65536], [], [[1, 2]], [0.5]])
def test_write_shard_refuses_what_does_not_fit(tmp_path, tokens):
    with pytest.raises(ValueError, match="a_train_000000"):
        common.write_shard(tmp_path / "a_train_000000.bin", np.array(tokens))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-1], "is 1029 bytes, its header promises 3 tokens = 1030 bytes"),
        (lambda raw: raw + b"\0", "is 1031 bytes"),
        (lambda raw: raw[:100], "is 100 bytes, expected at least 1024"),
        (lambda raw: b"", "is 0 bytes"),
        (lambda raw: b"\1" + raw[1:], "expected magic 20240520 version 1"),
        (lambda raw: raw[:4] + b"\2" + raw[5:], "version 2, expected magic 20240520 version 1"),
    ],
)
def test_damaged_shard_is_refused_with_the_command_that_remakes_it(tmp_path, damage, message):
    path = tmp_path / "stdlib_train_000000.bin"
    common.write_shard(path, np.arange(3))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        common.load_shard(path)
    assert str(path) in str(error.value) and "python data/stdlib.py" in str(error.value)


def test_missing_shard_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="fineweb_val_000000.bin does not exist.*cached_fineweb.py"):
        common.load_shard(tmp_path / "fineweb_val_000000.bin")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path):
    path = tmp_path / "meta.json"
    path.write_text("old")

    def chunks():
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="cannot write .*meta.json: No space left on device"):
        common.write_atomic(path, chunks())
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_new_files_are_readable_by_others_as_the_umask_says(tmp_path):
    common.write_json(tmp_path / "atomic", {})
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("name", ["train", "my_train", "val_2"])
def test_names_that_confuse_the_shard_patterns_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="rename it"):
        common.check_folder(tmp_path / name, name)
    assert not (tmp_path / name).exists()


@given(name=st.text("trainvl_", min_size=1, max_size=12))
def test_accepted_names_keep_the_splits_apart(name):
    try:
        path = common.shard_path(Path("d"), name, "val", 0)
    except ValueError:
        return
    assert path.match("*_val_*.bin") and not path.match("*_train_*.bin")


def test_check_folder_refuses_the_shards_of_another_data_set(tmp_path):
    common.write_shard(tmp_path / "a_train_000000.bin", np.arange(3))
    common.check_folder(tmp_path, "a")
    with pytest.raises(ValueError, match="a_train_000000.bin"):
        common.check_folder(tmp_path, "b")


def test_write_meta_gives_the_documented_fields(tmp_path):
    splits = {"train": {"tokens": 5, "bytes": 4}, "val": {"tokens": 2, "bytes": None}}
    about = {"source": "here", "made_with": "python data/x.py"}
    common.write_meta(tmp_path, name="x", vocab=common.GPT2_VOCAB, splits=splits, **about)
    assert json.loads((tmp_path / "meta.json").read_text()) == {
        "name": "x",
        "tokenizer": {"kind": "tiktoken", "name": "gpt2"},
        "vocab_size": 50257,
        "eot": 50256,
        "source": "here",
        "made_with": "python data/x.py",
        "splits": splits,
    }


def test_read_json_names_a_damaged_file(tmp_path):
    path = tmp_path / "meta.json"
    assert common.read_json(path) is None
    for text in ("{", "[]", "\xff"):
        path.write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match="meta.json"):
            common.read_json(path)


@given(key=st.text(), low=st.floats(0, 1), high=st.floats(0, 1))
def test_held_out_is_monotonic_in_the_fraction(key, low, high):
    low, high = sorted((low, high))
    assert common.held_out(key, low) <= common.held_out(key, high)
    assert common.held_out(key, 1.0) and not common.held_out(key, 0.0)


def test_held_out_does_not_change_between_processes_or_releases():
    keys = [str(number) for number in range(1000)]
    chosen = [key for key in keys if common.held_out(key, 0.05)]
    code = "import common; print([key for key in map(str, range(1000)) if common.held_out(key, 0.05)])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "data", capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(chosen)
    assert chosen[:5] == ["39", "51", "55", "146", "149"] and len(chosen) == 55


@given(text=TEXTS)
def test_byte_tokenizer_round_trip(text):
    ids = BYTE.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert BYTE.decode(ids) == text
    assert common.BYTE_VOCAB["eot"] not in ids


@given(raw=st.binary())
def test_byte_tokenizer_decodes_any_bytes(raw):
    assert BYTE.decode_bytes(list(raw)) == raw
    assert BYTE.decode_bytes(np.frombuffer(raw, dtype=np.uint8)) == raw
    assert BYTE.decode(list(raw)) == raw.decode("utf-8", errors="replace")


def test_byte_vocabulary_is_256_bytes_and_eot():
    encoding = common.byte_encoding()
    assert encoding.n_vocab == common.BYTE_VOCAB["vocab_size"] == 257
    assert encoding.eot_token == common.BYTE_VOCAB["eot"] == 256
    assert BYTE.decode([256]) == common.EOT_TEXT


@given(text=TEXTS)
def test_char_tokenizer_round_trip(text):
    chars = "".join(sorted(set(text)))
    tokenizer = common.load_tokenizer({"tokenizer": {"kind": "char", "chars": chars}})
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == text
    assert tokenizer.decode_bytes(ids) == text.encode("utf-8")


def test_char_tokenizer_names_a_character_it_lacks():
    with pytest.raises(ValueError, match="'z' is not among this data set's 2 characters"):
        common.load_tokenizer({"tokenizer": {"kind": "char", "chars": "ab"}}).encode("az")


@given(text=TEXTS, documents=st.integers(0, 3))
def test_count_bytes_is_the_utf8_length_without_eot(text, documents):
    tokens = np.array(BYTE.encode(text) + [256] * documents, dtype=np.uint16)
    assert common.count_bytes(tokens, common.token_byte_lengths(common.BYTE_VOCAB)) == len(text.encode("utf-8"))


def test_count_bytes_refuses_a_foreign_token():
    with pytest.raises(ValueError, match="token 257 is outside the vocabulary of 257"):
        common.count_bytes(np.array([257], dtype=np.uint16), np.ones(257, dtype=np.int64))


@pytest.mark.parametrize("meta", [{}, {"tokenizer": None}, {"tokenizer": {"kind": "word"}}])
def test_unknown_tokenizer_kind_is_refused(meta):
    with pytest.raises(ValueError, match="known kinds are 'byte', 'char' and 'tiktoken'"):
        common.load_tokenizer(meta)


def test_unknown_tiktoken_name_is_refused():
    with pytest.raises(ValueError, match="no encoding 'gpt1'.*gpt2"):
        common.load_tokenizer({"tokenizer": {"kind": "tiktoken", "name": "gpt1"}})


def test_tiktoken_without_network_says_what_to_do(monkeypatch):
    import tiktoken

    def fail(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", fail)
    with pytest.raises(RuntimeError, match="cannot download its gpt2 vocabulary.*TIKTOKEN_CACHE_DIR"):
        common.load_tokenizer(common.GPT2_VOCAB)


def gpt2_or_skip():
    try:
        return common.load_tokenizer(common.GPT2_VOCAB)
    except RuntimeError as error:
        pytest.skip(str(error))


def test_gpt2_tokenizer():
    tokenizer = gpt2_or_skip()
    text = f"Hello, world! {common.EOT_TEXT} été 日本"
    ids = tokenizer.encode(text)
    assert tokenizer.encode("Hello world") == [15496, 995]
    assert tokenizer.decode(ids) == text and 50256 not in ids
    lengths = common.token_byte_lengths(common.GPT2_VOCAB)
    assert common.count_bytes(np.array([50256, *ids]), lengths) == len(text.encode("utf-8"))


@pytest.mark.parametrize("code", ["from data.common import load_tokenizer", "import data.common"])
def test_import_from_the_root_needs_no_tiktoken(code):
    code += "; import sys; assert 'tiktoken' not in sys.modules and 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
