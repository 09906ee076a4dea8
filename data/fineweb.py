"""Tokenize FineWeb, FineWeb-Edu or your own text with the GPT-2 BPE into shards.

    python data/fineweb.py --version 10B --num-tokens 1_000_000_000    # streams from the Hugging Face hub
    python data/fineweb.py --input my.jsonl more.parquet --out data/my # local documents, any mix of formats

Hub versions go to data/fineweb10B and the like: the first shard is val, as in the published shards that
data/cached_fineweb.py downloads (hours faster).

Local files are .jsonl and .jsonl.gz (one object a line), .parquet (both need a string `text`, and may have an `id`) or
.txt (one document a file); a folder stands for all such files in it, in the order of their names. Rows without text are
skipped, files of other kinds left out, and both are said. What is held out for val:
- the files of --val-input, or those named val*, valid* or validation* (test* is left out then);
- of a single document, its end, from a paragraph or line break on;
- else whole works: a hash of the document's id up to its first `#` decides, so the parts of one book (`book#1`,
  `book#2`) fall on the same side.

An interrupted run goes on where its last finished shard ended when the same command is given again, and the result is
the same to the byte: documents keep their order, and progress.json holds where each next shard starts. The documents
used so far must not change meanwhile, those after them may.
"""

import interrupt  # noqa: F401  (first: its docstring)

# isort: split
import argparse
import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from array import array
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import (
    BYTE_VOCAB,
    GPT2_VOCAB,
    OUR_FOLDERS,
    Parser,
    check_folder,
    check_regular,
    command_line,
    count_bytes,
    describe,
    held_out,
    is_whole,
    kind_of,
    load_tokenizer,
    lock_folder,
    naming,
    printable,
    read_json,
    read_meta,
    read_shard_header,
    run,
    say,
    shard_path,
    shorten,
    token_byte_lengths,
    warn,
    whole_number,
    write_json,
    write_meta,
    write_shard,
)

VOCABS = {"gpt2": GPT2_VOCAB, "byte": BYTE_VOCAB}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
SHARD_TOKENS = 10**8
VAL_FRACTION = 0.05
MAX_LINE = 2**30  # bytes of a line of .jsonl; more is another format, and would fill the memory
COUNTS = ("tokens", "bytes")
BATCH_CHARS = 2**20  # text a worker takes at once: enough to hide the cost of the message, small enough to share out


class HubVersion(NamedTuple):
    repo: str
    config: str
    folder: str
    prefix: str
    tokens: int  # nominal, for the progress bar


HUB_VERSIONS = {
    "10B": HubVersion("HuggingFaceFW/fineweb", "sample-10BT", "fineweb10B", "fineweb", 10 * 10**9),
    "100B": HubVersion("HuggingFaceFW/fineweb", "sample-100BT", "fineweb100B", "fineweb", 100 * 10**9),
    "350B": HubVersion("HuggingFaceFW/fineweb", "sample-350BT", "fineweb350B", "fineweb", 350 * 10**9),
    "edu10B": HubVersion("HuggingFaceFW/fineweb-edu", "sample-10BT", "finewebedu10B", "finewebedu", 10 * 10**9),
    "edu100B": HubVersion("HuggingFaceFW/fineweb-edu", "sample-100BT", "finewebedu100B", "finewebedu", 100 * 10**9),
    "edu350B": HubVersion("HuggingFaceFW/fineweb-edu", "sample-350BT", "finewebedu350B", "finewebedu", 350 * 10**9),
}


class Document(NamedTuple):
    index: int  # position among the rows with text of the whole input
    key: str  # what the local train/val split hashes
    text: str
    file: str = ""
    split: str | None = None  # given by the user's own split; None leaves it to the hash


class InputFile(NamedTuple):
    name: str
    path: Path
    split: str | None = None


class Skipped:
    """The rows without text that were passed over while reading."""

    def __init__(self):
        self.before = array("q")  # for each, the index of the next document
        self.first = ""  # what and where the first one is

    def add(self, index: int, what: str) -> None:
        self.first = self.first or what
        self.before.append(index)


# ----------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from, and which shard a token goes to


class HubSource:
    """A FineWeb sample on the hub at one commit. All tokens form one stream; its shard 0 is val, the others train."""

    streams = ("all",)
    pinned = True  # the rows of a commit never change: those used may be passed over unread

    def __init__(self, version: str, progress: dict | None):
        self.version = HUB_VERSIONS[version]
        self.prefix = self.version.prefix
        self.skipped = Skipped()
        settings = (progress or {}).get("settings")
        commit = settings.get("commit") if isinstance(settings, dict) else None
        self.commit = commit if isinstance(commit, str) else self.newest_commit()
        self.settings = {"repo": self.version.repo, "config": self.version.config, "commit": self.commit}

    def about(self) -> str:
        return f"{self.version.repo} {self.version.config} at {self.commit}; ODC-By 1.0; {self.what_is_val()}"

    def what_is_val(self) -> str:
        return "the first shard is val"

    def newest_commit(self) -> str:
        """The repository's commit now; a resumed run keeps the one it began with."""
        from huggingface_hub import HfApi

        try:
            return HfApi().dataset_info(self.version.repo).sha
        except Exception as error:  # the hub library raises its HTTP client's errors too
            raise RuntimeError(
                f"cannot reach {self.version.repo} on the Hugging Face hub ({type(error).__name__}): "
                "check the network, or tokenize local text with --input FILE"
            ) from error

    def documents(self, start: int) -> Iterator[Document]:
        """Documents from number `start` on, in the order of the hub's files."""
        from datasets import load_dataset

        repo, config = self.version.repo, self.version.config
        try:
            rows = load_dataset(repo, name=config, split="train", streaming=True, revision=self.commit)
            for index, row in enumerate(rows.skip(start), start):
                if isinstance(row["text"], str):
                    yield Document(index, str(index), row["text"])
                else:
                    self.skipped.add(index, f"row {index} has no string `text`")
        except Exception as error:  # of the HTTP client, the file system layer or the Parquet reader
            raise RuntimeError(
                f"reading {repo} from the hub stopped ({type(error).__name__}: {describe(error)}): "
                "run the same command again to go on"
            ) from error

    def stream_of(self, document: Document) -> str:
        return "all"

    def shard(self, stream: str, number: int) -> tuple[str, int]:
        return ("train" if number else "val"), number

    def limit(self, num_tokens: int, shard_tokens: int) -> int:
        """Tokens of the stream that give num_tokens train tokens."""
        return num_tokens + shard_tokens


class LocalSource:
    """Local files. Train and val are two streams with shards of their own."""

    streams = ("train", "val")
    pinned = False

    def __init__(self, paths: list[Path], prefix: str, val_fraction: float, val_paths: Iterable[Path] = ()):
        files, left_out = list_files(paths)
        val, more = list_files(val_paths)
        self.left_out = left_out + more
        if val:
            held = {file.path.resolve() for file in val}
            train = [file._replace(split="train") for file in files if file.path.resolve() not in held]
            self.files = [file._replace(split="val") for file in val] + train
        else:
            self.files, tests = own_split(files)
            self.left_out += [("test file", name) for name in tests]
        self.own = [file.name for file in self.files if file.split == "val"]
        self.prefix, self.val_fraction = prefix, val_fraction
        self.settings = {"val_fraction": None if self.own else val_fraction}
        self.alone = False  # whether the whole input is one document
        self.skipped = Skipped()

    def about(self) -> str:
        return f"text given by the user: {first_names([file.name for file in self.files])}; {self.what_is_val()}"

    def what_is_val(self) -> str:
        if self.own:
            return f"val is {first_names(self.own)}"
        if self.alone:
            return f"val is the end of the text, about {self.val_fraction:g} of it"
        return f"val is {self.val_fraction:g} of the works, chosen by a hash of their names"

    def documents(self, start: int) -> Iterator[Document]:
        """Documents from number `start` on, files in order. Raises ValueError where there is no text at all."""
        documents = self.read()
        head = list(itertools.islice(documents, 2))
        if not head:
            raise ValueError(f"the input has no text: {self.skipped.first or 'its files are empty'}")
        self.alone = len(head) == 1 and not self.own
        if self.alone:
            head = halves(head[0], self.val_fraction)
        for document in itertools.chain(head, documents):
            if document.index >= start:
                yield document

    def read(self) -> Iterator[Document]:
        """All documents with a text that is not empty. Rows without text are as if they were not there."""
        self.skipped = Skipped()
        index = 0
        for file in self.files:
            for key, text, fault in read_rows(file.name, file.path):
                if fault:
                    self.skipped.add(index, fault)
                    continue
                if text:
                    yield Document(index, str(index) if key is None else key, text, file.name, file.split)
                index += 1

    def stream_of(self, document: Document) -> str:
        if document.split:
            return document.split
        return "val" if held_out(document.key.partition("#")[0], self.val_fraction) else "train"

    def shard(self, stream: str, number: int) -> tuple[str, int]:
        return stream, number

    def limit(self, num_tokens: int, shard_tokens: int) -> int:
        return num_tokens


def first_names(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def list_files(paths: Iterable[Path]) -> tuple[list[InputFile], list[tuple[str, str]]]:
    """(files, (kind, name) of each that is left out): files as given, folders as their files of a known kind, sorted.

    Raises for a path of no use.
    """
    paths, files, left_out = list(paths), [], []
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"input {path} does not exist")
        if not path.is_dir():
            check_regular(path)
        split = role(path.name) if path.is_dir() and len(paths) > 1 else None  # --input corpus/train corpus/val
        inside = walk(path) if path.is_dir() else [(path.name, path)]
        found = [(name, file) for name, file in inside if name.lower().endswith(SUFFIXES) and file.is_file()]
        if not found:
            kinds = ", ".join(SUFFIXES)
            raise ValueError(f"input {path} has none of the known formats {kinds}: convert it to one of them first")
        files += [InputFile(name, file, split) for name, file in found]
        known = set(found)
        left_out += [(kind_left_out(file), name) for name, file in inside if (name, file) not in known]
    return files, left_out


def walk(folder: Path) -> list[tuple[str, Path]]:
    """(name, path) of everything in a folder that is no folder, sorted. A linked folder is not entered."""

    def fail(error: OSError):
        raise error

    inside = []
    for place, folders, names in os.walk(folder, onerror=fail):
        inside += [Path(place) / name for name in names]
        inside += [Path(place) / name for name in folders if (Path(place) / name).is_symlink()]
    return sorted((path.relative_to(folder).as_posix(), path) for path in inside)


def kind_left_out(path: Path) -> str:
    """What kind of file is not read: ".csv file", "FIFO"."""
    if not path.exists():
        return "broken link"
    if not path.is_file():
        return "linked folder" if path.is_dir() else kind_of(path.stat().st_mode).removeprefix("a ")
    return f"{path.suffix.lower()} file" if path.suffix else "file without suffix"


def what_left_out(left_out: list[tuple[str, str]], most: int = 10) -> str:
    """E.g. `.csv file (3, the first is a/b.csv), FIFO (1, the first is pipe)`."""
    counts = Counter(kind for kind, _ in left_out)
    first = dict(reversed(left_out))
    kinds = [f"{kind} ({count}, the first is {first[kind]})" for kind, count in counts.most_common(most)]
    return ", ".join(kinds) + (f", and {len(counts) - most} more kinds" if len(counts) > most else "")


ROLE = re.compile(r"(train|test|validation|valid|val)(?![a-z])", re.IGNORECASE)


def role(name: str) -> str | None:
    """The split that a file's name gives (`train-00000-of-00002.parquet`, `val.jsonl`), or else a folder above it."""
    *folders, file = Path(name).parts
    match = ROLE.match(file) or next(filter(None, map(ROLE.fullmatch, reversed(folders))), None)
    kind = match[1].lower() if match else None
    return "val" if kind in ("valid", "validation") else kind


def own_split(files: list[InputFile]) -> tuple[list[InputFile], list[str]]:
    """(files with the split that their names give, val first; names of the test files among them).

    Without a file for val, or with no other, the names give no split, and all is left to the hash.
    """
    roles = [file.split or role(file.name) for file in files]
    if not {"train", "val"} & set(roles):
        return [file._replace(split=None) for file in files], []
    tests = [file.name for file, kind in zip(files, roles, strict=True) if kind == "test"]
    val = [file for file, kind in zip(files, roles, strict=True) if kind == "val"]
    rest = [file for file, kind in zip(files, roles, strict=True) if kind not in ("val", "test")]
    if not (val and rest):
        return [file._replace(split=None) for file in val + rest], tests
    return [file._replace(split="val") for file in val] + [file._replace(split="train") for file in rest], tests


def halves(document: Document, val_fraction: float) -> list[Document]:
    """A document alone as two, val first: its end is val. Raises ValueError for a single character."""
    text = document.text
    if len(text) < 2:
        raise ValueError(f"{document.file} has {len(text)} character, too few for train and val: give more text")
    cut = cut_place(text, val_fraction)
    train = document._replace(index=document.index + 1, text=text[:cut], split="train")
    return [document._replace(text=text[cut:], split="val"), train]


def cut_place(text: str, fraction: float) -> int:
    """Where the last `fraction` of a text begins, or the paragraph or line break within a quarter of that before it."""
    share = max(1, round(len(text) * fraction))
    target = max(1, len(text) - share)
    for mark in ("\n\n", "\n"):
        place = text.rfind(mark, max(0, target - share // 4 - len(mark)), target)
        if place > 0:
            return place + len(mark)
    return target


def read_rows(name: str, path: Path) -> Iterator[tuple[str | None, str, str]]:
    """(id or None, text, "") of each document in a file, and (None, "", what is wrong) of each row without text."""
    if path.suffix.lower() == ".txt":
        yield name, read_txt(path), ""
        return
    for where, row in read_parquet(path) if path.suffix.lower() == ".parquet" else read_jsonl(path):
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield (None if row.get("id") is None else str(row["id"])), row["text"], ""
        elif isinstance(row, ValueError):
            yield None, "", f"{where} is not JSON ({row})"
        else:
            yield None, "", f"{where} has no string `text`"


def read_txt(path: Path) -> str:
    try:
        with naming(path):
            return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first, e.g. with iconv") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """(place, parsed line, or the ValueError of one that is not JSON) of each line that is not blank."""
    for count, line in enumerate(read_lines(path), 1):
        where = f"{path} line {count}"
        if len(line) > MAX_LINE:
            raise ValueError(f"{where} is longer than {MAX_LINE:,} bytes: expected one JSON object a line")
        if line.strip():
            try:
                yield where, json.loads(line)
            except ValueError as error:
                yield where, error
            except RecursionError:
                yield where, ValueError("nested too deeply")


def read_lines(path: Path) -> Iterator[bytes]:
    """Lines of a file, each cut off after MAX_LINE + 1 bytes."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rb") as file, naming(path):
            while line := file.readline(MAX_LINE + 1):
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error})") from error


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table, naming(path):
            columns = [name for name in ("id", "text") if name in table.schema_arrow.names]
            rows = (row for batch in table.iter_batches(256, columns=columns) for row in batch.to_pylist())
            for count, row in enumerate(rows):
                yield f"{path} row {count}", row
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is not a whole Parquet file ({error})") from error


# ----------------------------------------------------------------------------------------------------------------------
# Tokenizing in several processes

WORKER = {}  # this process's tokenizer and eot, set by start_worker


def start_worker(vocab: dict) -> None:
    """Ready a process to tokenize. It leaves Ctrl-C to its parent and ends when the parent does, even by kill -9."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()
    WORKER.update(tokenizer=load_tokenizer(vocab), eot=vocab["eot"])


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def tokenize(texts: list[str]) -> list[np.ndarray]:
    """Tokens of each text, led by eot: uint16 arrays."""
    return [np.array([WORKER["eot"], *WORKER["tokenizer"].encode(text)], dtype=np.uint16) for text in texts]


def batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents in groups of about BATCH_CHARS characters."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARS or len(batch) >= 1024:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def tokenized(pool: Executor, documents: Iterable[Document], depth: int) -> Iterator[tuple[Document, np.ndarray]]:
    """(document, tokens) in the order of the documents.

    At most `depth` batches are under way, so that reading waits for tokenizing; Pool.imap would read ahead without
    bound and hold the whole data set in memory.
    """
    pending = deque()
    for batch in batches(documents):
        with sigint_held():
            pending.append((batch, pool.submit(tokenize, [document.text for document in batch])))
        if len(pending) >= depth:
            yield from next_batch(pending)
    while pending:
        yield from next_batch(pending)


@contextlib.contextmanager
def sigint_held() -> Iterator[None]:
    """Let Ctrl-C wait. A process started inside never sees it, not even before start_worker, when it would complain."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def start_pool(workers: int, vocab: dict) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by the reader's threads
    return ProcessPoolExecutor(workers, context, start_worker, (vocab,))


def next_batch(pending: deque) -> Iterator[tuple[Document, np.ndarray]]:
    batch, future = pending.popleft()
    return zip(batch, future.result(), strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# Shards and progress


class Ledger:
    """Which documents a stream used, by their content: [file, documents, SHA-256 of their texts] for each file.

    A later run with these documents in the same order makes the same tokens of them, whatever became of the files.
    """

    def __init__(self):
        self.files = []
        self.count = 0

    def add(self, document: Document) -> None:
        if not self.files or self.files[-1][0] != document.file:
            self.files.append([document.file, 0, ""])
            self.digest = hashlib.sha256()
        raw = document.text.encode("utf-8", "surrogatepass")
        self.digest.update(b"%d:" % len(raw))
        self.digest.update(raw)
        self.files[-1][1:] = [self.files[-1][1] + 1, self.digest.hexdigest()]
        self.count += 1

    def copy(self) -> list[list]:
        return [list(entry) for entry in self.files]

    def difference(self, used: list[list]) -> str | None:
        """The first file whose documents are not those of a former ledger; a file may be renamed."""
        for now, then in itertools.zip_longest(self.files, used):
            if now is None or then is None or now[1:] != then[1:]:
                return (now or then)[0]
        return None


class Stream:
    """A sequence of tokens cut into shards.

    document and offset are the last document used and how many of its tokens are; `saved` is that state when the last
    shard ended, with the documents used, the shards, and the tokens and bytes a split so far: what progress.json keeps.
    """

    def __init__(self, write: Callable, shard_tokens: int, limit: float, saved: dict | None, pinned: bool):
        self.write = write  # (shard number, tokens) -> (split, UTF-8 bytes of the tokens)
        self.limit = limit
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = 0
        self.saved = saved or {"shards": 0, "document": -1, "offset": 0, "used": [], "splits": {}}
        self.document, self.offset = self.saved["document"], self.saved["offset"]
        self.used = sum(entry[1] for entry in self.saved["used"])  # documents
        self.ledger = None if pinned else Ledger()
        self.total = sum(split["tokens"] for split in self.saved["splits"].values())

    def full(self) -> bool:
        return self.total >= self.limit

    def wants(self, document: int) -> bool:
        """Whether the stream has not used up this document; False for the ones before the place it resumes at."""
        return document >= self.document and not self.full()

    def take(self, document: Document, tokens: np.ndarray) -> Iterator[int]:
        """Append a document's tokens, shape (n,), up to the limit; yields each time a shard has been written."""
        done = self.offset if document.index == self.document else 0
        if self.ledger and document.index > self.document and not self.full():
            self.ledger.add(document)
        while done < len(tokens) and not self.full():
            count = int(min(len(tokens) - done, len(self.buffer) - self.filled, self.limit - self.total))
            self.buffer[self.filled : self.filled + count] = tokens[done : done + count]
            self.filled += count
            self.total += count
            done += count
            self.document, self.offset = document.index, done
            if self.filled == len(self.buffer):
                yield self.flush()

    def flush(self) -> int:
        """Write what is buffered as the next shard; returns the number of shards written so far."""
        number = self.saved["shards"]
        split, size = self.write(number, self.buffer[: self.filled])
        splits = {name: dict(counts) for name, counts in self.saved["splits"].items()}
        counts = splits.setdefault(split, {"tokens": 0, "bytes": 0})
        counts["tokens"] += self.filled
        counts["bytes"] += size
        place = {"document": self.document, "offset": self.offset, "used": self.ledger.copy() if self.ledger else []}
        self.saved = {"shards": number + 1, **place, "splits": splits}
        self.filled = 0
        return number + 1


class Job:
    """One data set in the making: its folder, source, settings, and the progress a former run left."""

    def __init__(
        self,
        out: Path,
        source: HubSource | LocalSource,
        vocab: dict,
        shard_tokens: int,
        num_tokens: int | None = None,
        made_with: str = "",
    ):
        self.out, self.source, self.vocab, self.made_with = out, source, vocab, made_with
        self.complete = (out / "meta.json").exists()
        self.settings = {"tokenizer": vocab["tokenizer"], "shard_tokens": shard_tokens, "num_tokens": num_tokens}
        self.settings.update(source.settings)
        progress = self.read_progress()
        self.lengths = token_byte_lengths(vocab)
        self.streams = {}
        for number, stream in enumerate(source.streams):
            limit = source.limit(num_tokens, shard_tokens) if num_tokens and number == 0 else float("inf")
            saved = progress.get(stream)
            self.streams[stream] = Stream(self.writer(stream), shard_tokens, limit, saved, source.pinned)
        self.first = self.streams[source.streams[0]]  # the stream that num_tokens limits
        self.check_shards()
        if not source.pinned and any(stream.used for stream in self.streams.values()):
            self.check_input()

    def read_progress(self) -> dict:
        """The saved state of each stream. Raises ValueError when the folder holds a run with other settings."""
        progress = read_json(self.out / "progress.json")
        if progress is None:
            if self.complete or any(self.out.glob("*.bin")):
                raise ValueError(f"{self.out} holds a data set that this script did not make: choose another --out")
            return {}
        old = progress.get("settings")
        if not isinstance(old, dict):
            raise ValueError(f"{self.out} holds a data set that this script did not make: choose another --out")
        changed = sorted(key for key in self.settings if old.get(key) != self.settings[key])
        if changed:
            what = ", ".join(f"{key} {shorten(json.dumps(old.get(key)))}" for key in changed)
            now = ", ".join(shorten(json.dumps(self.settings[key])) for key in changed)
            raise ValueError(f"{self.out} holds a run with {what}, not {now}: choose another --out, or {self.again()}")
        streams = progress.get("streams")
        if not isinstance(streams, dict) or not all(map(self.is_saved, streams.values())):
            raise ValueError(f"{self.out / 'progress.json'} is damaged, or of an older version: {self.again()}")
        return streams

    def again(self) -> str:
        return f"remove {self.out} and run the same command again"

    def is_saved(self, saved: object) -> bool:
        """Whether a value of progress.json has the form of Stream.saved. A finished data set may lack `used`."""
        if not isinstance(saved, dict) or not isinstance(saved.get("splits"), dict):
            return False
        if self.complete or self.source.pinned:
            saved.setdefault("used", [])
        numbers = [saved.get("shards"), saved.get("offset")]
        used = saved.get("used")
        entries = isinstance(used, list) and all(
            isinstance(entry, list) and list(map(type, entry)) == [str, int, str] for entry in used
        )
        counts = [c.get(key) if isinstance(c, dict) else None for c in saved["splits"].values() for key in COUNTS]
        good = all(is_whole(value, 0, 2**62) for value in numbers + counts)
        return good and entries and is_whole(saved.get("document"), -1, 2**62)

    def finished(self) -> Iterator[Path]:
        """The shards that progress.json calls finished."""
        for name, stream in self.streams.items():
            for number in range(stream.saved["shards"]):
                yield self.path(*self.source.shard(name, number))

    def check_shards(self) -> None:
        """Raise unless every finished shard is there and whole."""
        for path in self.finished():
            read_shard_header(path, self.again())

    def remove_others(self) -> None:
        """Remove shards that a killed run wrote last and did not note: what is made now may need fewer."""
        for path in set(self.out.glob("*.bin")) - set(self.finished()):
            path.unlink()

    def check_input(self) -> None:
        """Find where each stream goes on in the input as it is now, by the content of the documents used so far.

        Raises ValueError, naming the first file that differs. For a finished data set the whole input counts.
        """
        ledgers = {name: Ledger() for name in self.streams}
        missing = sum(stream.used for stream in self.streams.values())
        for document in self.source.documents(0):
            name = self.source.stream_of(document)
            stream, ledger = self.streams[name], ledgers[name]
            if self.complete or ledger.count < stream.used:
                ledger.add(document)
                stream.document = document.index
                missing -= 1
            if missing <= 0 and not self.complete or self.first.full() and ledgers["train"].count == self.first.used:
                break
        for name, stream in self.streams.items():
            if file := ledgers[name].difference(stream.saved["used"]):
                where = f"{file} has other documents than when {self.out} was made"
                raise ValueError(f"{where}: choose another --out, or {self.again()}")
            stream.ledger = ledgers[name]

    def path(self, split: str, index: int) -> Path:
        return shard_path(self.out, self.source.prefix, split, index)

    def writer(self, stream: str) -> Callable:
        def write(number: int, tokens: np.ndarray) -> tuple[str, int]:
            split, index = self.source.shard(stream, number)
            write_shard(self.path(split, index), tokens)
            return split, count_bytes(tokens, self.lengths)

        return write

    def save(self) -> None:
        streams = {name: stream.saved for name, stream in self.streams.items()}
        progress = {"made_with": self.made_with, "settings": self.settings, "streams": streams}
        write_json(self.out / "progress.json", progress)

    def total(self) -> int:
        return sum(stream.total for stream in self.streams.values())

    def wanted(self) -> Iterator[Document]:
        """Documents that some stream still needs, up to the one that fills the first stream."""
        for document in self.source.documents(max(0, min(stream.document for stream in self.streams.values()))):
            if self.first.full() and document.index > self.first.document:
                return
            if document.text and self.streams[self.source.stream_of(document)].wants(document.index):
                yield document

    def run(self, pool: Executor, depth: int, bar) -> None:
        """Read, tokenize and write until the source or num_tokens ends, then write the unfinished shards and meta.json.

        Raises ValueError when a split got no document.
        """
        self.remove_others()
        self.save()  # before the first shard, so that the folder is known as this run's whenever it is killed
        for document, tokens in tokenized(pool, self.wanted(), depth):
            self.take(document, tokens)
            bar.update(self.total() - bar.n)
        for stream in self.streams.values():
            if stream.filled:
                stream.flush()
                self.save()
        self.finish()

    def take(self, document: Document, tokens: np.ndarray) -> None:
        if self.first.full() and document.index > self.first.document:
            return  # tokenized ahead, before the first stream was full
        for _ in self.streams[self.source.stream_of(document)].take(document, tokens):
            self.save()

    def skipped(self) -> int:
        """Rows without text among those read, up to the document that reached num_tokens."""
        rows = self.source.skipped.before
        return bisect_right(rows, self.first.document) if self.first.full() else len(rows)

    def finish(self) -> None:
        splits = {}
        for stream in self.streams.values():
            splits.update(stream.saved["splits"])
        for split in ("train", "val"):
            if split not in splits:
                advice = "more documents, a --val-input, another --val-fraction or smaller --shard-tokens"
                raise ValueError(f"no document fell in {split}: remove {self.out} and give {advice}")
        splits = {split: splits[split] for split in ("train", "val")}
        about = {"source": self.source.about(), "made_with": self.made_with}
        if self.skipped() and not self.source.pinned:
            about["skipped_rows"] = self.skipped()
        write_meta(self.out, name=self.out.name, vocab=self.vocab, splits=splits, **about)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--version", choices=HUB_VERSIONS, help="a FineWeb or FineWeb-Edu sample on the hub")
    source.add_argument("--input", type=Path, nargs="+", metavar="PATH", help="local files or folders")
    parser.add_argument(
        "--val-input", "--val_input", type=Path, nargs="+", metavar="PATH", default=[], help="local files for val alone"
    )
    parser.add_argument("--out", type=Path, help="output folder (default: data/fineweb10B etc., or data/<file name>)")
    parser.add_argument(
        "--num-tokens", "--num_tokens", type=whole_number, help="stop at this many train tokens, say 1e9"
    )
    shard_size = functools.partial(whole_number, high=2**31 - 1)  # what a shard's header can say
    parser.add_argument(
        "--shard-tokens", "--shard_tokens", type=shard_size, default=SHARD_TOKENS, help="tokens a shard (default: 1e8)"
    )
    parser.add_argument(
        "--val-fraction", "--val_fraction", type=fraction, default=VAL_FRACTION, help="share held out (default: 0.05)"
    )
    parser.add_argument("--tokenizer", choices=VOCABS, default="gpt2", help="gpt2 (default), or byte: no vocabulary")
    count = functools.partial(whole_number, high=1024)
    parser.add_argument(
        "--workers", type=count, default=max(1, (os.cpu_count() or 2) - 1), help="processes (default: cores - 1)"
    )
    args = parser.parse_args()
    if args.val_input and not args.input:
        parser.error("--val-input goes with --input: a FineWeb sample's val is its first shard")
    return args


def output_folder(args: argparse.Namespace) -> Path:
    here = Path(__file__).resolve().parent
    if args.out:
        return args.out.resolve()
    if args.version:
        return here / HUB_VERSIONS[args.version].folder
    if len(args.input) > 1:
        raise ValueError("several --input paths need an --out folder")
    name = args.input[0].resolve().name.split(".")[0]
    if not name or name.startswith(OUR_FOLDERS):  # a folder of this name is taken for that data set
        raise ValueError(f"input {args.input[0]} gives no name for a data set of your own: name a folder with --out")
    return here / name


def made_with(args: argparse.Namespace) -> str:
    """The command that makes the same data set, whatever the number of --workers."""
    words = ["--version", args.version] if args.version else ["--input", *args.input]
    if args.val_input:
        words += ["--val-input", *args.val_input]
    defaults = {"out": None, "num_tokens": None, "shard_tokens": SHARD_TOKENS, "val_fraction": VAL_FRACTION}
    for name, default in (defaults | {"tokenizer": "gpt2"}).items():
        if getattr(args, name) != default:
            words += ["--" + name.replace("_", "-"), getattr(args, name)]
    return command_line("fineweb.py", *words)


def make_job(args: argparse.Namespace) -> Job:
    out = output_folder(args)
    if args.version:
        source = HubSource(args.version, read_json(out / "progress.json"))
    else:
        source = LocalSource(args.input, out.name, args.val_fraction, args.val_input)
        if source.left_out:
            warn(f"left out of the input: {what_left_out(source.left_out)}")
    check_folder(out, source.prefix)
    lock_folder(out)
    return Job(out, source, VOCABS[args.tokenizer], args.shard_tokens, args.num_tokens, made_with(args))


def make(job: Job, workers: int, total: int | None) -> None:
    """Run a job with a progress bar, and say what came out."""
    from tqdm import tqdm

    pool = start_pool(workers, job.vocab)
    try:
        name = printable(job.out.name)
        with tqdm(total=total, initial=job.total(), unit="tok", unit_scale=True, desc=name) as bar:
            job.run(pool, 2 * workers + 1, bar)
    except BrokenProcessPool as error:
        advice = "if memory ran out, give fewer --workers; the same command goes on after the last finished shard"
        raise RuntimeError(f"a process that tokenizes was killed: {advice}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    if job.skipped():
        warn(f"rows without text, skipped: {job.skipped():,}; the first: {job.source.skipped.first}")
    splits = read_meta(job.out)["splits"]
    counts = " + ".join(f"{splits[split]['tokens']:,} {split}" for split in ("train", "val"))
    say(f"{job.out}: written, {counts} tokens; {job.source.what_is_val()}")


def main() -> None:
    args = parse_args()
    job = make_job(args)
    if job.complete:
        splits = read_meta(job.out)["splits"]
        say(f"{job.out}: already complete, {sum(split['tokens'] for split in splits.values()):,} tokens")
        return
    total = HUB_VERSIONS[args.version].tokens if args.version else None
    make(job, args.workers, job.first.limit if args.num_tokens else total)


if __name__ == "__main__":
    run(main)
