"""What every data tool shares: the shard format, meta.json, and the three tokenizers.

A data set is a folder of shards plus one `meta.json`. A shard is a header of 256 little-endian int32 (magic, version,
token count, zeros) followed by that many little-endian uint16 tokens: the format of llm.c and of the published FineWeb
shards (kjj0/fineweb10B-gpt2). Files appear in a folder only when whole, and `meta.json` is written last, so a folder
with a `meta.json` is a finished data set.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 2**16
EOT_TEXT = "<|endoftext|>"

# The vocabulary fields of meta.json for the two tokenizers that are the same in every data set.
BYTE_VOCAB = {"tokenizer": {"kind": "byte"}, "vocab_size": 257, "eot": 256}
GPT2_VOCAB = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256}


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def shard_path(folder: Path, name: str, split: str, index: int) -> Path:
    """Path of one shard, e.g. `data/stdlib/stdlib_val_000000.bin`.

    Raises ValueError for a name that would make one split's shards match the other's pattern (`*_train_*.bin`).
    """
    if any(f"_{word}_" in f"_{name}_" for word in ("train", "val")):
        raise ValueError(f"data set name {name!r} holds the word 'train' or 'val', which shard patterns use: rename it")
    return folder / f"{name}_{split}_{index:06d}.bin"


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file through a temporary one in the same folder, so that `path` is only ever absent, old or whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_shard(path: Path, tokens: np.ndarray) -> None:
    """Write tokens (1-D, any integer type, values below 65536) as one shard, atomically.

    Raises ValueError when a token does not fit the format and OSError when the disk refuses.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not 0 < tokens.size < 2**31 or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"{path}: a shard takes 1 to 2^31 - 1 integer tokens, got {tokens.dtype} {tokens.shape}")
    if tokens.min() < 0 or tokens.max() >= MAX_VOCAB_SIZE:
        raise ValueError(f"{path}: tokens must lie in 0..65535, got {tokens.min()}..{tokens.max()}")
    header = np.zeros(HEADER_INTS, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens.size
    write_atomic(path, [header.data, np.ascontiguousarray(tokens, dtype=TOKEN_DTYPE).data])


def read_shard_header(path: Path) -> int:
    """Number of tokens in a shard, after checking its magic number, version and exact length.

    Raises FileNotFoundError or ValueError with one sentence that names the file and the command that remakes it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"shard {path} does not exist: {remake_hint(path)}")
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if len(head) < HEADER_BYTES:
        raise ValueError(f"shard {path} is {size} bytes, expected at least {HEADER_BYTES}: {remake_hint(path)}")
    magic, version, count = (int(value) for value in np.frombuffer(head, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        expected = f"expected magic {MAGIC} version {VERSION}"
        raise ValueError(f"shard {path} has magic {magic} version {version}, {expected}: {remake_hint(path)}")
    if size != HEADER_BYTES + 2 * count:
        expected = f"its header promises {count} tokens = {HEADER_BYTES + 2 * count} bytes"
        raise ValueError(f"shard {path} is {size} bytes, {expected}: {remake_hint(path)}")
    return count


def load_shard(path: Path) -> np.ndarray:
    """Tokens of a shard as a read-only memory map, shape (count,), uint16. Raises what read_shard_header raises."""
    count = read_shard_header(path)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(count,))


def remake_hint(path: Path) -> str:
    """How to remake the data set that a shard belongs to, judged by its file name."""
    prefix = Path(path).name.split("_train_")[0].split("_val_")[0]
    commands = {
        "stdlib": "python data/stdlib.py --force",
        "shakespeare_char": "python data/shakespeare_char.py",
        "fineweb": "python data/cached_fineweb.py N (or data/fineweb.py)",
        "finewebedu": "python data/cached_fineweb.py N --version edu10B",
    }
    return f"remake it with {commands.get(prefix, 'the data script that made it (delete it first)')}"


# ----------------------------------------------------------------------------------------------------------------------
# meta.json and splits


def write_meta(folder: Path, *, name: str, vocab: dict, source: str, splits: dict) -> None:
    """Write `meta.json`, atomically; the last step of making a data set.

    vocab: the fields tokenizer, vocab_size and eot. splits: {"train": {"tokens": int, "bytes": int | None}, "val": ...}
    where bytes counts the UTF-8 text behind the tokens (eot counts 0), for bits per byte.
    """
    meta = {"name": name, **vocab, "source": source, "splits": splits}
    write_json(folder / "meta.json", meta)


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, [(json.dumps(value, indent=2) + "\n").encode()])


def read_json(path: Path) -> dict | None:
    """The JSON object in a file, None when there is no file; ValueError names a file that does not hold one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): delete it and make the data set again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object: delete it and start again")
    return value


def check_folder(folder: Path, name: str) -> None:
    """Create the folder of a data set.

    Raises ValueError for a name shards cannot have and for a folder with shards of another data set, which would be
    trained on too.
    """
    shard_path(folder, name, "val", 0)
    folder.mkdir(parents=True, exist_ok=True)
    known = (f"{name}_train_", f"{name}_val_")
    others = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith(known))
    if others:
        raise ValueError(f"{folder} already holds {others[0]}, a shard of another data set: choose another --out")


def held_out(key: str, fraction: float) -> bool:
    """Whether a document belongs to val: a hash of its name, so the answer is the same on every machine and run."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizers


class Tokenizer(Protocol):
    """Text to tokens and back. `encode` never yields eot: a text that spells `<|endoftext|>` is plain characters."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def decode_bytes(self, ids: Sequence[int]) -> bytes: ...


class BPETokenizer:
    """A tiktoken encoding with special tokens disabled in encode."""

    def __init__(self, encoding):
        self.encoding = encoding

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode_ordinary(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the tokens; bytes that are not valid UTF-8 (a cut-off character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes([int(i) for i in ids])


class CharTokenizer:
    """One token a character; token i is chars[i]. There is no eot."""

    def __init__(self, chars: str):
        self.chars = chars
        self.index = {char: i for i, char in enumerate(chars)}

    def encode(self, text: str) -> list[int]:
        """Raises ValueError for the first character that the vocabulary lacks."""
        try:
            return [self.index[char] for char in text]
        except KeyError as error:
            size = len(self.chars)
            raise ValueError(f"character {error.args[0]!r} is not among this data set's {size} characters") from None

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.chars[i] for i in ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.decode(ids).encode("utf-8")


def load_tokenizer(meta: dict) -> Tokenizer:
    """The tokenizer that a data set's meta.json names.

    Raises ValueError for an unknown one and RuntimeError when tiktoken is missing or cannot get its vocabulary files.
    """
    spec = meta.get("tokenizer") or {}
    if spec.get("kind") == "char":
        return CharTokenizer(spec["chars"])
    if spec.get("kind") == "byte":
        return BPETokenizer(byte_encoding())
    if spec.get("kind") == "tiktoken":
        return BPETokenizer(named_encoding(spec["name"]))
    raise ValueError(f"meta.json names tokenizer {spec!r}; known kinds are 'byte', 'char' and 'tiktoken'")


def import_tiktoken():
    try:
        import tiktoken
    except ImportError as error:
        raise RuntimeError("this tokenizer needs tiktoken: pip install tiktoken") from error
    return tiktoken


def byte_encoding():
    """A tiktoken encoding over the 256 bytes (token = byte value) plus eot = 256. It has no merges and no files."""
    return import_tiktoken().Encoding(
        "byte",
        pat_str=r"(?s).+",
        mergeable_ranks={bytes([value]): value for value in range(256)},
        special_tokens={EOT_TEXT: 256},
    )


def named_encoding(name: str):
    """tiktoken's encoding of that name, downloaded on first use."""
    tiktoken = import_tiktoken()
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"tiktoken has no encoding {name!r}, it has {', '.join(tiktoken.list_encoding_names())}")
    try:
        return tiktoken.get_encoding(name)
    except Exception as error:  # requests, ssl, and file errors share no closer base class
        raise RuntimeError(
            f"tiktoken cannot download its {name} vocabulary ({type(error).__name__}): connect to the network once, "
            "or set TIKTOKEN_CACHE_DIR to a folder that holds the files from a machine where it works"
        ) from error


def token_byte_lengths(vocab: dict) -> np.ndarray:
    """UTF-8 bytes behind each token of a byte or tiktoken vocabulary, eot 0; shape (vocab_size,), int64."""
    tokenizer = load_tokenizer(vocab)
    lengths = [len(tokenizer.decode_bytes([token])) for token in range(vocab["vocab_size"])]
    lengths[vocab["eot"]] = 0
    return np.array(lengths, dtype=np.int64)


def count_bytes(tokens: np.ndarray, lengths: np.ndarray) -> int:
    """UTF-8 bytes behind tokens, shape (n,). Raises ValueError for a token outside the vocabulary."""
    counts = np.zeros(len(lengths), dtype=np.int64)
    for start in range(0, len(tokens), 2**22):  # bincount makes an int64 copy: keep it small
        part = np.bincount(tokens[start : start + 2**22], minlength=len(lengths))
        if len(part) > len(lengths):
            raise ValueError(f"token {len(part) - 1} is outside the vocabulary of {len(lengths)} tokens")
        counts += part
    return int(counts @ lengths)


# ----------------------------------------------------------------------------------------------------------------------
# Command lines


def run(main: Callable[[], None]) -> None:
    """Call main; wrong input or a missing resource ends as one `error: ...` line and exit code 1, not a traceback."""
    try:
        main()
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: run the same command again to go on")
