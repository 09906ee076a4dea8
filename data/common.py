"""What every data tool shares: the shard format, meta.json, and the three tokenizers.

A data set is a folder of shards plus one `meta.json`. A shard is a header of 256 little-endian int32 (magic, version,
token count, zeros) followed by that many little-endian uint16 tokens: the format of llm.c and of the published FineWeb
shards (kjj0/fineweb10B-gpt2). Files appear in a folder only when whole and on disk, and `meta.json` is written last,
so a folder with a `meta.json` is a finished data set.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NoReturn, Protocol

import numpy as np

MAGIC = 20240520
VERSION = 1
HEADER_INTS = 256
HEADER_BYTES = 4 * HEADER_INTS
TOKEN_DTYPE = np.dtype("<u2")
MAX_VOCAB_SIZE = 2**16
EOT_TEXT = "<|endoftext|>"
ROOT = Path(__file__).resolve().parent.parent  # the folder where the commands of made_with are given
OUR_FOLDERS = ("stdlib", "shakespeare_char", "fineweb")  # starts of the folder names that the tools choose themselves

# The vocabulary fields of meta.json for the two tokenizers that are the same in every data set.
BYTE_VOCAB = {"tokenizer": {"kind": "byte"}, "vocab_size": 257, "eot": 256}
GPT2_VOCAB = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": 50256}


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def shard_path(folder: Path, name: str, split: str, index: int) -> Path:
    """Path of one shard, e.g. `data/stdlib/stdlib_val_000000.bin`.

    Raises ValueError for a name that would make one split's shards match the other's pattern (`*_train_*.bin`).
    """
    if not name:
        raise ValueError(f"{folder} has no name, which its shards would get: choose another --out")
    if any(f"_{word}_" in f"_{name}_" for word in ("train", "val")):
        raise ValueError(f"data set name {name!r} holds the word 'train' or 'val', which shard patterns use: rename it")
    return folder / f"{name}_{split}_{index:06d}.bin"


def write_atomic(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a file through a temporary one in the same folder, so that `path` is only ever absent, old or whole.

    File and folder are synced: after a power loss nothing written later is there without it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}{advice(error)}") from error
    finally:
        with contextlib.suppress(OSError):  # or it would hide the error above
            temporary.unlink()


def sync(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on disk."""
    if os.name == "nt":  # opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that cannot sync folders
            raise
    finally:
        os.close(descriptor)


def advice(error: OSError) -> str:
    """What to do about a failed write, as the end of a sentence; empty where nobody can tell."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "; free some space there and run the same command again"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "; choose another folder"
    return ""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Operating system errors inside name the file, as those of open() do and those of read() do not."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def check_regular(path: Path) -> None:
    """Raise ValueError for what is there and no file: reading a FIFO or a device may wait for ever.

    Raises FileNotFoundError for what is not there.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {kind_of(mode)}, not a file")


def kind_of(mode: int) -> str:
    """What a path is, by its st_mode: "a folder", "a FIFO"."""
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((name for test, name in kinds.items() if test(mode)), "a device")


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


def read_shard_header(path: Path, repair: str | None = None) -> int:
    """Number of tokens in a shard, after checking its magic number, version and exact length.

    Raises FileNotFoundError or ValueError with one sentence that names the file and the repair, the command that makes
    the data set again where none is given.
    """
    path = Path(path)
    repair = repair or remake_hint(path)
    if not path.exists():
        raise FileNotFoundError(f"shard {path} does not exist: {repair}")
    check_regular(path)
    with open(path, "rb") as file, naming(path):
        head = file.read(HEADER_BYTES)
    size = path.stat().st_size
    if len(head) < HEADER_BYTES:
        raise ValueError(f"shard {path} is {size} bytes, expected at least {HEADER_BYTES}: {repair}")
    magic, version, count = (int(value) for value in np.frombuffer(head, dtype="<i4", count=3))
    if (magic, version) != (MAGIC, VERSION):
        expected = f"expected magic {MAGIC} version {VERSION}"
        raise ValueError(f"shard {path} has magic {magic} version {version}, {expected}: {repair}")
    if count < 1:
        raise ValueError(f"the header of shard {path} promises {count} tokens, expected 1 or more: {repair}")
    if size != HEADER_BYTES + 2 * count:
        expected = f"its header promises {count} tokens = {HEADER_BYTES + 2 * count} bytes"
        raise ValueError(f"shard {path} is {size} bytes, {expected}: {repair}")
    return count


def load_shard(path: Path) -> np.ndarray:
    """Tokens of a shard as a read-only memory map, shape (count,), uint16. Raises what read_shard_header raises."""
    count = read_shard_header(path)
    return np.memmap(path, dtype=TOKEN_DTYPE, mode="r", offset=HEADER_BYTES, shape=(count,))


def remake_hint(path: Path) -> str:
    """How to make the data set of a shard again: by the command in its meta.json or progress.json, or by its name."""
    command = None
    for name in ("meta.json", "progress.json"):
        with contextlib.suppress(OSError, ValueError):
            command = command or (read_json(path.parent / name) or {}).get("made_with")
    prefix = path.name.split("_train_")[0].split("_val_")[0]
    published = {
        "stdlib": "python data/stdlib.py",
        "shakespeare_char": "python data/shakespeare_char.py",
        "fineweb": "python data/cached_fineweb.py N",
        "finewebedu": "python data/cached_fineweb.py N --version edu10B",
    }
    if not isinstance(command, str):
        command = published.get(prefix, "the command that made it")
    return f"make the data set again with {command}"


# ----------------------------------------------------------------------------------------------------------------------
# meta.json and splits


def write_meta(folder: Path, *, name: str, vocab: dict, source: str, made_with: str, splits: dict, **more) -> None:
    """Write `meta.json`, atomically; the last step of making a data set.

    vocab: the fields tokenizer, vocab_size and eot. made_with: what command_line gives. splits:
    {"train": {"tokens": int, "bytes": int | None}, "val": ...} where bytes counts the UTF-8 text behind the tokens (eot
    counts 0), for bits per byte. more: fields of this tool alone.
    """
    meta = {"name": name, **vocab, "source": source, "made_with": made_with, "splits": splits, **more}
    write_json(folder / "meta.json", meta)


def command_line(script: str, *words: object) -> str:
    """The command that makes a data set, for a shell in the project's folder. Paths inside it are relative to it."""
    return shlex.join(["python", f"data/{script}", *(str(shown(word)) for word in words)])


def shown(word: object) -> object:
    if not isinstance(word, Path):
        return word
    path = word.resolve()
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def read_meta(folder: Path) -> dict | None:
    """The meta.json of a data set, None without one. ValueError names what is wrong in it."""
    meta = read_json(folder / "meta.json")
    if meta is not None:
        check_meta(meta, folder / "meta.json")
    return meta


def check_meta(meta: dict, path: Path) -> None:
    """Raise ValueError for a field of the wrong type or out of range. Older data sets lack made_with."""
    size, eot = meta.get("vocab_size"), meta.get("eot")
    good = is_whole(size, 1, MAX_VOCAB_SIZE)
    check_field(path, "vocab_size", size, good, f"a whole number from 1 to {MAX_VOCAB_SIZE}")
    good = eot is None or is_whole(eot, 0, size - 1)
    check_field(path, "eot", eot, good, f"null or a whole number from 0 to {size - 1}")
    for key, default in {"source": None, "made_with": ""}.items():
        value = meta.get(key, default)
        check_field(path, key, value, isinstance(value, str), "a string")
    splits = meta.get("splits")
    for split in ("train", "val"):
        counts = splits.get(split) if isinstance(splits, dict) else None
        check_field(path, f"splits.{split}", counts, isinstance(counts, dict), "an object with tokens and bytes")
        tokens, size = counts.get("tokens"), counts.get("bytes")
        check_field(path, f"splits.{split}.tokens", tokens, is_whole(tokens, 1, 2**62), "a whole number, 1 or more")
        good = size is None or is_whole(size, 0, 2**62)
        check_field(path, f"splits.{split}.bytes", size, good, "null or a whole number, 0 or more")


def is_whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def check_field(path: Path, key: str, value: object, good: bool, expected: str) -> None:
    if not good:
        raise ValueError(f"{path} has {key} {shorten(repr(value))}, expected {expected}: {remake_hint(path)}")


def shorten(text: str, size: int = 60) -> str:
    return text if len(text) <= size else text[:size] + "..."


def write_json(path: Path, value: dict) -> None:
    write_atomic(path, [(json.dumps(value, indent=2) + "\n").encode()])


def read_json(path: Path) -> dict | None:
    """The JSON object in a file, None when there is no file; ValueError names a file that does not hold one."""
    try:
        check_regular(path)
        with naming(path):
            raw = path.read_bytes()
    except FileNotFoundError:
        return None
    repair = f"if no other file of {path.parent} is of use, remove that folder and make the data set again"
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): {repair}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, expected a JSON object: {repair}")
    return value


def check_folder(folder: Path, name: str) -> None:
    """Create the folder of a data set.

    Raises ValueError for a name shards cannot have and for a folder with shards of another data set, which would be
    trained on too.
    """
    shard_path(folder, name, "val", 0)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, expected a folder: choose another --out")
    make_folder(folder)
    known = (f"{name}_train_", f"{name}_val_")
    others = sorted(path.name for path in folder.glob("*.bin") if not path.name.startswith(known))
    if others:
        raise ValueError(f"{folder} already holds {others[0]}, a shard of another data set: choose another --out")


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, on disk before anything is put in."""
    if not folder.exists():
        make_folder(folder.parent)
        try:
            folder.mkdir(exist_ok=True)
            sync(folder.parent)
        except OSError as error:
            raise OSError(f"cannot make the folder {folder}: {error.strerror}{advice(error)}") from error


LOCKS = {}  # folder: the open descriptor that holds its lock until this process ends


def lock_folder(folder: Path) -> None:
    """Keep other data tools out of a folder while this process lives, and remove what a killed one left half-written.

    Raises RuntimeError when one is at work there. The system lets go of the lock when the process ends, however it
    ends. Where there are no locks, there is none.
    """
    if folder not in LOCKS:
        LOCKS[folder] = take_lock(folder)
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(r"\..+\.\d+\.tmp", path.name) and path.is_file():
            path.unlink(missing_ok=True)


def take_lock(folder: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise RuntimeError(f"another command is writing to {folder}: wait for it, or choose another --out") from None
    except OSError:  # some network file systems
        pass
    return descriptor


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
    spec = meta.get("tokenizer")
    kind = spec.get("kind") if isinstance(spec, dict) else None
    if kind == "char":
        return CharTokenizer(distinct(spec.get("chars")))
    if kind == "byte":
        return BPETokenizer(byte_encoding())
    if kind == "tiktoken":
        return BPETokenizer(named_encoding(spec.get("name")))
    raise ValueError(f"meta.json names tokenizer {shorten(repr(spec))}; known kinds are 'byte', 'char' and 'tiktoken'")


def distinct(chars: object) -> str:
    """The characters of a char tokenizer. Raises ValueError for what is no string of distinct characters."""
    if not isinstance(chars, str) or len(set(chars)) < len(chars) or len(chars) > MAX_VOCAB_SIZE:
        expected = f"a string of at most {MAX_VOCAB_SIZE} distinct characters"
        raise ValueError(f"meta.json has tokenizer.chars {shorten(repr(chars))}, expected {expected}")
    return chars


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
        known = ", ".join(tiktoken.list_encoding_names())
        raise ValueError(f"tiktoken has no encoding {shorten(repr(name))}, it has {known}")
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


class Parser(argparse.ArgumentParser):
    """An argument parser whose help is the script's docstring and whose errors are safe to print."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def whole_number(text: str, low: int = 1, high: int = 10**15) -> int:
    """A whole number as people write it, for argparse: 100000, 100_000 or 1e5."""
    try:
        value = Decimal(text)
        if value.is_finite() and low <= value <= high and value == int(value):
            return int(value)
    except ArithmeticError:  # not a number
        pass
    raise argparse.ArgumentTypeError(f"{shorten(repr(text))} is not a whole number from {low} to {high}")


def printable(text: object) -> str:
    """Text for a terminal, on one line, with what is no printable character spelled out: escape sequences as \\x1b...,
    line ends, marks that turn the direction of writing, bytes of a file name that are not UTF-8."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in str(text))


def say(text: str) -> None:
    """Print the summary of what a command did. Raises OSError, saying what failed, when nobody can take it."""
    try:
        print(printable(text), flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more when it ends
        raise OSError(f"the data set is there, but standard output takes nothing: {error.strerror}") from error


def warn(text: str) -> None:
    print(f"warning: {printable(text)}", file=sys.stderr)


def run(main: Callable[[], None]) -> None:
    """Call main; wrong input or a missing resource ends as one `error: ...` line and exit code 1, not a traceback.

    Ctrl-C ends as one line and exit code 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a character that the console's encoding lacks is spelled
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except (ValueError, OSError, RuntimeError, MemoryError, OverflowError) as error:
        sys.exit(f"error: {printable(describe(error))}")
    except KeyboardInterrupt:
        print("interrupted: run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def describe(error: Exception) -> str:
    """One sentence for an error that ends a command."""
    if isinstance(error, MemoryError):
        return "out of memory: give smaller --shard-tokens, fewer --workers, or shorter documents"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__
