"""Tokenize FineWeb, FineWeb-Edu or your own text with the GPT-2 BPE into shards.

    python data/fineweb.py --version 10B --num-tokens 1_000_000_000    # streams from the Hugging Face hub
    python data/fineweb.py --input my.jsonl more.parquet --out data/my # local documents, any mix of formats

Hub versions go to data/fineweb10B and the like: the first shard is val, as in the published shards that
data/cached_fineweb.py downloads (hours faster). Local documents are split by whole works: a hash of the document's id
up to its first `#` decides, so the parts of one book (`book#1`, `book#2`) fall on the same side.

Local files are .jsonl and .jsonl.gz (one object a line), .parquet (both need a string `text`, and may have an `id`) or
.txt (one document a file); a folder stands for all such files in it, in the order of their names.

An interrupted run goes on where its last finished shard ended when the same command is given again, and the result is
the same to the byte: documents keep their order, and progress.json holds where each next shard starts.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import multiprocessing
import os
import signal
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from common import (
    BYTE_VOCAB,
    GPT2_VOCAB,
    check_folder,
    count_bytes,
    held_out,
    load_tokenizer,
    read_json,
    read_shard_header,
    run,
    shard_path,
    token_byte_lengths,
    write_json,
    write_meta,
    write_shard,
)

VOCABS = {"gpt2": GPT2_VOCAB, "byte": BYTE_VOCAB}
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
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
    index: int  # position in the whole input
    key: str  # what the local train/val split hashes
    text: str


# ----------------------------------------------------------------------------------------------------------------------
# Sources: where documents come from, and which shard a token goes to


class HubSource:
    """A FineWeb sample on the hub at one commit. All tokens form one stream; its shard 0 is val, the others train."""

    streams = ("all",)

    def __init__(self, version: str, progress: dict | None):
        self.version = HUB_VERSIONS[version]
        self.prefix = self.version.prefix
        self.commit = (progress or {}).get("settings", {}).get("commit") or self.newest_commit()
        self.settings = {"repo": self.version.repo, "config": self.version.config, "commit": self.commit}
        self.text = f"{self.version.repo} {self.version.config} at {self.commit}; ODC-By 1.0; the first shard is val"

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
                yield Document(index, str(index), row["text"])
        except Exception as error:  # of the HTTP client, the file system layer or the Parquet reader
            raise RuntimeError(
                f"reading {repo} from the hub stopped ({type(error).__name__}: {error}): "
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

    def __init__(self, paths: list[Path], prefix: str, val_fraction: float):
        self.files = list_files(paths)
        self.prefix = prefix
        self.val_fraction = val_fraction
        self.settings = {"files": [[key, sha256(path)] for key, path in self.files], "val_fraction": val_fraction}
        names = ", ".join(key for key, _ in self.files[:8]) + (", ..." if len(self.files) > 8 else "")
        self.text = f"text given by the user: {names}; {val_fraction:g} of the works held out for val by hash"

    def documents(self, start: int) -> Iterator[Document]:
        """Documents from number `start` on, files in order."""
        rows = itertools.chain.from_iterable(read_rows(key, path) for key, path in self.files)
        for index, (key, text) in itertools.islice(enumerate(rows), start, None):
            yield Document(index, str(index) if key is None else key, text)

    def stream_of(self, document: Document) -> str:
        return "val" if held_out(document.key.partition("#")[0], self.val_fraction) else "train"

    def shard(self, stream: str, number: int) -> tuple[str, int]:
        return stream, number

    def limit(self, num_tokens: int, shard_tokens: int) -> int:
        return num_tokens


def list_files(paths: list[Path]) -> list[tuple[str, Path]]:
    """[(name, path)]: files as given, folders as their files of a known kind, sorted. Raises for a path of no use."""
    files = []
    for path in paths:
        if path.is_dir():
            inside = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
            found = [(name, file) for name, file in inside if name.endswith(SUFFIXES)]
        elif path.is_file():
            found = [(path.name, path)] if path.name.endswith(SUFFIXES) else []
        else:
            raise FileNotFoundError(f"input {path} does not exist")
        if not found:
            raise ValueError(f"input {path} has none of the known formats {', '.join(SUFFIXES)}")
        files += found
    return files


def sha256(path: Path) -> str:
    """Hash of a file: what tells a changed input from the same one. It costs little beside tokenizing."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def read_rows(name: str, path: Path) -> Iterator[tuple[str | None, str]]:
    """(id or None, text) of each document in a file. Raises ValueError naming the place of a bad one."""
    if path.suffix == ".txt":
        yield name, read_txt(path)
        return
    for where, row in read_parquet(path) if path.suffix == ".parquet" else read_jsonl(path):
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise ValueError(f"{where} has no string `text`: every document needs one")
        yield (None if row.get("id") is None else str(row["id"])), row["text"]


def read_txt(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first, e.g. with iconv") from error


def read_jsonl(path: Path) -> Iterator[tuple[str, object]]:
    """(place, parsed line) of each line that is not blank."""
    for number, line in enumerate(read_lines(path), 1):
        where = f"{path} line {number}"
        if line.strip():
            try:
                yield where, json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where} is not JSON ({error})") from error


def read_lines(path: Path) -> Iterator[bytes]:
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            yield from file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error})") from error


def read_parquet(path: Path) -> Iterator[tuple[str, dict]]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file ({error})") from error
    with table:
        columns = [name for name in ("id", "text") if name in table.schema_arrow.names]
        rows = (row for batch in table.iter_batches(256, columns=columns) for row in batch.to_pylist())
        for number, row in enumerate(rows):
            yield f"{path} row {number}", row


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
        pending.append((batch, pool.submit(tokenize, [document.text for document in batch])))
        if len(pending) >= depth:
            yield from next_batch(pending)
    while pending:
        yield from next_batch(pending)


def start_pool(workers: int, vocab: dict) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # a fork would copy locks held by the reader's threads
    return ProcessPoolExecutor(workers, context, start_worker, (vocab,))


def next_batch(pending: deque) -> Iterator[tuple[Document, np.ndarray]]:
    batch, future = pending.popleft()
    return zip(batch, future.result(), strict=True)


# ----------------------------------------------------------------------------------------------------------------------
# Shards and progress


class Stream:
    """A sequence of tokens cut into shards.

    document and offset are the last document used and how many of its tokens are; `saved` is that state when the last
    shard ended, with the shards and the tokens and bytes a split so far: what progress.json keeps.
    """

    def __init__(self, write: Callable, shard_tokens: int, limit: float, saved: dict | None):
        self.write = write  # (shard number, tokens) -> (split, UTF-8 bytes of the tokens)
        self.limit = limit
        self.buffer = np.empty(shard_tokens, dtype=np.uint16)
        self.filled = 0
        self.saved = saved or {"shards": 0, "document": 0, "offset": 0, "splits": {}}
        self.document, self.offset = self.saved["document"], self.saved["offset"]
        self.total = sum(split["tokens"] for split in self.saved["splits"].values())

    def full(self) -> bool:
        return self.total >= self.limit

    def wants(self, document: int) -> bool:
        """Whether the stream has not used up this document; False for the ones before the place it resumes at."""
        return document >= self.document and not self.full()

    def take(self, document: int, tokens: np.ndarray) -> Iterator[int]:
        """Append a document's tokens, shape (n,), up to the limit; yields each time a shard has been written."""
        done = self.offset if document == self.document else 0
        while done < len(tokens) and not self.full():
            count = int(min(len(tokens) - done, len(self.buffer) - self.filled, self.limit - self.total))
            self.buffer[self.filled : self.filled + count] = tokens[done : done + count]
            self.filled += count
            self.total += count
            done += count
            self.document, self.offset = document, done
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
        self.saved = {"shards": number + 1, "document": self.document, "offset": self.offset, "splits": splits}
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
    ):
        self.out, self.source, self.vocab = out, source, vocab
        self.settings = {"tokenizer": vocab["tokenizer"], "shard_tokens": shard_tokens, "num_tokens": num_tokens}
        self.settings.update(source.settings)
        progress = self.read_progress()
        self.lengths = token_byte_lengths(vocab)
        self.streams = {}
        for number, stream in enumerate(source.streams):
            limit = source.limit(num_tokens, shard_tokens) if num_tokens and number == 0 else float("inf")
            self.streams[stream] = Stream(self.writer(stream), shard_tokens, limit, progress.get(stream))
        self.first = self.streams[source.streams[0]]  # the stream that num_tokens limits
        self.check_shards()

    def read_progress(self) -> dict:
        """The saved state of each stream. Raises ValueError when the folder holds a run with other settings."""
        progress = read_json(self.out / "progress.json")
        if progress is None:
            if (self.out / "meta.json").exists() or any(self.out.glob("*.bin")):
                raise ValueError(f"{self.out} holds a data set that this script did not make: choose another --out")
            return {}
        old = progress.get("settings", {})
        changed = sorted(key for key in self.settings if old.get(key) != self.settings[key])
        if changed:
            what = ", ".join(f"other {key}" for key in changed)
            raise ValueError(f"{self.out} holds a run with {what}: choose another --out, or delete it to start again")
        return progress["streams"]

    def check_shards(self) -> None:
        """Raise unless every shard that progress.json calls finished is there and whole."""
        for name, stream in self.streams.items():
            for number in range(stream.saved["shards"]):
                read_shard_header(self.path(*self.source.shard(name, number)))

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
        write_json(self.out / "progress.json", {"settings": self.settings, "streams": streams})

    def total(self) -> int:
        return sum(stream.total for stream in self.streams.values())

    def wanted(self) -> Iterator[Document]:
        """Documents that some stream still needs, up to the one that fills the first stream."""
        for document in self.source.documents(min(stream.document for stream in self.streams.values())):
            if self.first.full() and document.index > self.first.document:
                return
            if document.text and self.streams[self.source.stream_of(document)].wants(document.index):
                yield document

    def run(self, pool: Executor, depth: int, bar) -> None:
        """Read, tokenize and write until the source or num_tokens ends, then write the unfinished shards and meta.json.

        Raises ValueError when a split got no document.
        """
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
        for _ in self.streams[self.source.stream_of(document)].take(document.index, tokens):
            self.save()

    def finish(self) -> None:
        splits = {}
        for stream in self.streams.values():
            splits.update(stream.saved["splits"])
        for split in ("train", "val"):
            if split not in splits:
                raise ValueError(
                    f"no document fell in {split}, so {self.out} is not usable: delete it and give more documents, "
                    "another --val-fraction or smaller --shard-tokens"
                )
        splits = {split: splits[split] for split in ("train", "val")}
        write_meta(self.out, name=self.out.name, vocab=self.vocab, source=self.source.text, splits=splits)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def positive(text: str) -> int:
    value = int(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--version", choices=HUB_VERSIONS, help="a FineWeb or FineWeb-Edu sample on the hub")
    source.add_argument("--input", type=Path, nargs="+", metavar="PATH", help="local files or folders")
    parser.add_argument("--out", type=Path, help="output folder (default: data/fineweb10B etc., or data/<file name>)")
    parser.add_argument("--num-tokens", "--num_tokens", type=positive, help="stop at this many train tokens")
    parser.add_argument(
        "--shard-tokens", "--shard_tokens", type=positive, default=10**8, help="tokens a shard (default: 100 million)"
    )
    parser.add_argument(
        "--val-fraction", "--val_fraction", type=fraction, default=0.05, help="local works held out (default: 0.05)"
    )
    parser.add_argument("--tokenizer", choices=VOCABS, default="gpt2", help="gpt2 (default), or byte: no vocabulary")
    parser.add_argument(
        "--workers", type=positive, default=max(1, (os.cpu_count() or 2) - 1), help="processes (default: cores - 1)"
    )
    return parser.parse_args()


def output_folder(args: argparse.Namespace) -> Path:
    here = Path(__file__).resolve().parent
    if args.out:
        return args.out.resolve()
    if args.version:
        return here / HUB_VERSIONS[args.version].folder
    if len(args.input) > 1:
        raise ValueError("several --input paths need an --out folder")
    return here / args.input[0].resolve().name.split(".")[0]


def make_job(args: argparse.Namespace) -> Job:
    out = output_folder(args)
    if args.version:
        source = HubSource(args.version, read_json(out / "progress.json"))
    else:
        source = LocalSource(args.input, out.name, args.val_fraction)
    check_folder(out, source.prefix)
    return Job(out, source, VOCABS[args.tokenizer], args.shard_tokens, args.num_tokens)


def main() -> None:
    args = parse_args()
    from tqdm import tqdm

    job = make_job(args)
    out = job.out
    if (out / "meta.json").exists():
        print(f"{out}: already complete, {job.total():,} tokens")
        return
    for leftover in out.glob(".*.tmp"):  # a shard that a killed run was writing
        leftover.unlink()
    total = HUB_VERSIONS[args.version].tokens if args.version else None
    if args.num_tokens:
        total = job.first.limit
    pool = start_pool(args.workers, job.vocab)
    try:
        with tqdm(total=total, initial=job.total(), unit="tok", unit_scale=True, desc=out.name) as bar:
            job.run(pool, 2 * args.workers + 1, bar)
    finally:
        pool.shutdown(cancel_futures=True)
    splits = read_json(out / "meta.json")["splits"]
    print(f"{out}: written, {splits['train']['tokens']:,} train + {splits['val']['tokens']:,} val tokens")


if __name__ == "__main__":
    run(main)
