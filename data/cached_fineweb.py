"""Download pre-tokenized FineWeb shards (GPT-2 BPE, 100M tokens each) from the Hugging Face hub.

    python data/cached_fineweb.py 9                     # val + the first 900M train tokens, 2 GB, to data/fineweb10B/
    python data/cached_fineweb.py 99 --version edu10B   # FineWeb-Edu, to data/finewebedu10B/

These are the shards of the NanoGPT speedrun. Finished shards are kept, also after an interruption, and only what is
missing is downloaded; a shard that is not whole is fetched again. HF_ENDPOINT and the other variables of
huggingface_hub are respected.
"""

import interrupt  # noqa: F401  (first: its docstring)

# isort: split
import argparse
import errno
import re
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from common import (
    GPT2_VOCAB,
    Parser,
    check_folder,
    command_line,
    count_bytes,
    load_shard,
    lock_folder,
    printable,
    read_json,
    read_shard_header,
    run,
    say,
    shard_path,
    sync,
    token_byte_lengths,
    warn,
    whole_number,
    write_json,
    write_meta,
)

TRIES = 3  # of each request; huggingface_hub tries a download several times itself


class Published(NamedTuple):
    repo: str
    prefix: str
    folder: str
    train_shards: int
    revision: str


VERSIONS = {
    # The commit that public speedrun reproductions pin for these 104 files.
    "10B": Published("kjj0/fineweb10B-gpt2", "fineweb", "fineweb10B", 103, "889765ea1f903759787add96995d81171b632d0c"),
    # No commit of these two is on public record, so they follow main; meta.json notes the commit a folder began with.
    "100B": Published("kjj0/fineweb100B-gpt2", "fineweb", "fineweb100B", 1030, "main"),
    "edu10B": Published("kjj0/finewebedu10B-gpt2", "finewebedu", "finewebedu10B", 99, "main"),
}


# ----------------------------------------------------------------------------------------------------------------------
# The hub


def with_retries(what: str, call: Callable):
    """call(), tried again with growing pauses while the network or the server fails.

    Raises FileNotFoundError for what the hub does not have and RuntimeError, in one sentence, for everything else.
    """
    for attempt in range(TRIES):
        try:
            return call()
        except Exception as error:  # the hub library passes its HTTP client's errors through
            failure = explain(what, error)
            if failure is not None:
                raise failure from error
            if attempt == TRIES - 1:
                raise RuntimeError(
                    f"cannot download {what} ({type(error).__name__}): check the network or HF_ENDPOINT, "
                    "then run the same command again; finished shards are kept"
                ) from error
            time.sleep(2**attempt)


def explain(what: str, error: Exception) -> Exception | None:
    """The error to end with, or None when another try may help."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    missing = (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError)
    if isinstance(error, missing) and not isinstance(error, LocalEntryNotFoundError):  # the latter means: no network
        return FileNotFoundError(f"the hub has no {what} ({type(error).__name__}): check --version and --revision")
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
        return RuntimeError(f"disk full while downloading {what}: free some space and run the same command again")
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return RuntimeError(f"no permission to write {what}: choose another --out")
    if isinstance(error, OSError) and error.filename:  # the disk's, not the network's
        return RuntimeError(f"cannot write {error.filename} while downloading {what}: {error.strerror}")
    return None


def probe(published: Published, revision: str) -> tuple[str, int]:
    """(the commit that a revision stands for now, bytes of a shard), from one request for the val shard's headers.

    All shards of a run come from that commit, and without a network the run ends here, within seconds.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(published.repo, f"{published.prefix}_val_000000.bin", repo_type="dataset", revision=revision)
    metadata = with_retries(f"{published.repo} at {revision}", lambda: get_hf_file_metadata(url))
    return metadata.commit_hash or revision, metadata.size or 0


def fetch_shard(published: Published, commit: str, path: Path) -> None:
    """Download one shard to `path`, where it appears only when whole; a bad one is fetched once more.

    Raises ValueError when the second copy is bad too, and what with_retries raises.
    """
    from huggingface_hub import hf_hub_download

    place = {"repo_type": "dataset", "revision": commit, "local_dir": path.parent}
    for attempt in range(2):
        call = partial(hf_hub_download, published.repo, path.name, force_download=attempt > 0, **place)
        with_retries(f"{published.repo}/{path.name}", call)
        try:
            read_shard_header(path, "try again later")
            sync(path)
            sync(path.parent)
            return
        except ValueError as error:
            path.unlink()
            if attempt == 1:
                raise ValueError(f"{published.repo} at {commit} serves a bad shard twice: {error}") from error
            warn(f"{error}; downloading it again")


# ----------------------------------------------------------------------------------------------------------------------
# The folder


def wanted_paths(published: Published, out: Path, count: int) -> list[Path]:
    """The val shard and the first `count` train shards; published train shards are numbered from 1."""
    train = [shard_path(out, published.prefix, "train", index) for index in range(1, count + 1)]
    return [shard_path(out, published.prefix, "val", 0), *train]


def missing_paths(paths: list[Path]) -> Iterator[Path]:
    """Shards to download. A file that is not a whole shard is removed: the hub library would take it for finished."""
    for path in paths:
        try:
            read_shard_header(path, "not whole")
        except FileNotFoundError:
            yield path
        except ValueError as error:
            if not path.is_file():  # a FIFO or a folder is not ours to remove
                raise
            warn(f"{error}; downloading it again")
            path.unlink()
            yield path


def check_space(out: Path, size: int) -> None:
    """Raise RuntimeError before a download of `size` bytes that cannot fit."""
    free = shutil.disk_usage(out).free
    if free < size:
        need = f"the missing shards take {size / 1e9:.1f} GB, {out} has {free / 1e9:.1f} GB free"
        raise RuntimeError(f"{need}: ask for fewer shards or choose another --out")


def count_splits(published: Published, out: Path) -> dict:
    """Tokens of all shards in the folder, from their headers; bytes for val only (it takes a read of every token)."""
    splits = {}
    for split in ("train", "val"):
        tokens = sum(read_shard_header(path) for path in out.glob(f"{published.prefix}_{split}_*.bin"))
        splits[split] = {"tokens": tokens, "bytes": None}
    try:
        lengths = token_byte_lengths(GPT2_VOCAB)
    except RuntimeError as error:
        warn(f"no byte count for val, so no bits per byte: {error}")
    else:
        splits["val"]["bytes"] = count_bytes(load_shard(shard_path(out, published.prefix, "val", 0)), lengths)
    return splits


def source_line(published: Published, commit: str) -> str:
    return f"{published.repo} at {commit}; text from HuggingFaceFW's FineWeb or FineWeb-Edu, ODC-By 1.0"


def recorded_commit(published: Published, out: Path) -> str | None:
    """The commit whose shards the folder holds by its meta.json, or by its progress.json where a download was cut off.

    None without either. Raises ValueError for a folder with shards from elsewhere, such as those of data/fineweb.py.
    """
    record = read_json(out / "meta.json") or read_json(out / "progress.json")
    if record is None:
        return None
    match = re.match(rf"{re.escape(published.repo)} at ([^;]+);", str(record.get("source")))
    if not match:
        raise ValueError(f"{out} holds shards that do not come from {published.repo}: choose another --out")
    return match[1]


def download(published: Published, out: Path, count: int, revision: str | None) -> tuple[int, str]:
    """Bring the folder to at least `count` train shards; returns (shards downloaded, their commit).

    While shards arrive, progress.json stands for meta.json, which would count other shards than there are.
    Raises ValueError when the folder holds another revision than the one asked for. Needs no network when no shard is
    missing and no other revision is asked for.
    """
    from tqdm import tqdm

    recorded = recorded_commit(published, out)
    missing = list(missing_paths(wanted_paths(published, out, count)))
    if not missing and not revision:
        return 0, recorded or published.revision
    commit, size = probe(published, revision or recorded or published.revision)
    if recorded and commit != recorded:
        raise ValueError(f"{out} holds shards of revision {recorded}, not {commit}: choose another --out")
    check_space(out, len(missing) * size)
    if missing:
        write_json(out / "progress.json", {"source": source_line(published, commit)})
        (out / "meta.json").unlink(missing_ok=True)
    for path in tqdm(missing, unit="shard", desc=printable(out.name)):
        fetch_shard(published, commit, path)
    for leftover in out.glob(".cache/huggingface/download/*.incomplete"):  # of killed runs, up to 200 MB each
        leftover.unlink()
    return len(missing), commit


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("count", type=partial(whole_number, low=0), metavar="N", help="train shards, 100M tokens each")
    parser.add_argument("--version", choices=VERSIONS, default="10B", help="data set (default: 10B)")
    parser.add_argument("--revision", help="commit, branch or tag of the hub repository instead of the pinned one")
    parser.add_argument("--out", type=Path, help="output folder (default: data/fineweb10B etc.)")
    return parser.parse_args()


def made_with(args: argparse.Namespace, out: Path) -> str:
    """The command for the same data set, which may hold more shards than were asked for last."""
    last = max(out.glob(f"*_train_{'[0-9]' * 6}.bin"))
    options = {"--version": args.version != "10B" and args.version, "--revision": args.revision, "--out": args.out}
    given = [word for option, value in options.items() if value for word in (option, value)]
    return command_line("cached_fineweb.py", int(last.stem[-6:]), *given)


def main() -> None:
    args = parse_args()
    published = VERSIONS[args.version]
    if not 1 <= args.count <= published.train_shards:
        has = f"has 1 to {published.train_shards} train shards of 100M tokens each"
        raise ValueError(f"N = {args.count}: version {args.version} {has}, and N is their number")
    out = args.out.resolve() if args.out else Path(__file__).resolve().parent / published.folder
    check_folder(out, published.prefix)
    lock_folder(out)
    downloaded, commit = download(published, out, args.count, args.revision)
    about = {"source": source_line(published, commit), "made_with": made_with(args, out)}
    splits = count_splits(published, out)
    write_meta(out, name=out.name, vocab=GPT2_VOCAB, splits=splits, **about)
    (out / "progress.json").unlink(missing_ok=True)
    say(f"{out}: {downloaded} shards downloaded, {splits['train']['tokens']:,} train tokens in all")


if __name__ == "__main__":
    run(main)
