"""Make the Tiny Shakespeare data set, one token a character, with nanoGPT's vocabulary and split.

    python data/shakespeare_char.py                          # downloads 1.1 MB, writes data/shakespeare_char/
    python data/shakespeare_char.py --input FILE --out DIR   # any UTF-8 text of at most 65,535 distinct characters

The vocabulary is the sorted set of the text's characters (65), train is the first 90% of the characters (1,003,854)
and val the rest (111,540), so losses compare with nanoGPT's. There is no eot: the text is one document.
"""

import argparse
import hashlib
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from common import check_folder, run, shard_path, write_atomic, write_meta, write_shard

# Andrej Karpathy's char-rnn repository (MIT; the text itself is in the public domain), at its last commit.
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394
MAX_CHARS = 65_535
TRAIN_FRACTION = 0.9


def is_shakespeare(raw: bytes) -> bool:
    return len(raw) == SIZE and hashlib.sha256(raw).hexdigest() == SHA256


def download(path: Path, url: str = URL, tries: int = 3) -> None:
    """Fetch the text to `path`, atomically. Raises RuntimeError without a network or when another text arrives."""
    for attempt in range(tries):
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                raw = response.read()
            break
        except OSError as error:  # URLError, timeouts and resets are all OSErrors
            if attempt == tries - 1 or isinstance(error, urllib.error.HTTPError):
                raise RuntimeError(f"cannot download {url} ({error}): get it elsewhere, pass --input FILE") from error
            time.sleep(2**attempt)
    if not is_shakespeare(raw):
        raise RuntimeError(f"{url} gave {len(raw)} bytes that are not Tiny Shakespeare (sha256 {SHA256[:12]}...)")
    write_atomic(path, [raw])


def read_text(path: Path) -> str:
    """The text of a file, verbatim. Raises ValueError when it is not UTF-8."""
    if not path.is_file():
        raise FileNotFoundError(f"input {path} is not a file: pass a UTF-8 text with --input")
    raw = path.read_bytes()
    if not is_shakespeare(raw):
        print(f"warning: {path} is not Tiny Shakespeare; losses will not compare with nanoGPT's", file=sys.stderr)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first, e.g. with iconv") from error


def encode(text: str) -> tuple[str, np.ndarray]:
    """(vocabulary as one sorted string, tokens of shape (characters,)). Raises ValueError for too many characters."""
    points, tokens = np.unique(np.frombuffer(text.encode("utf-32-le"), dtype="<u4"), return_inverse=True)
    if len(points) > MAX_CHARS:
        raise ValueError(f"the text has {len(points)} distinct characters, at most {MAX_CHARS} fit a shard")
    return "".join(chr(point) for point in points), tokens


def make(out: Path, text: str, source: str) -> dict:
    """Write both shards and meta.json; returns the splits."""
    chars, tokens = encode(text)
    cut = int(len(text) * TRAIN_FRACTION)
    if cut == 0:
        raise ValueError(f"the text has {len(text)} characters, too few to split into train and val")
    (out / "meta.json").unlink(missing_ok=True)
    splits = {}
    for split, part in {"train": slice(cut), "val": slice(cut, None)}.items():
        write_shard(shard_path(out, out.name, split, 0), tokens[part])
        splits[split] = {"tokens": len(text[part]), "bytes": len(text[part].encode("utf-8"))}
    vocab = {"tokenizer": {"kind": "char", "chars": chars}, "vocab_size": len(chars), "eot": None}
    write_meta(out, name=out.name, vocab=vocab, source=source, splits=splits)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parent / "shakespeare_char"
    parser.add_argument("--input", type=Path, help="a local UTF-8 text instead of the download")
    parser.add_argument("--out", type=Path, default=default, help="output folder (default: data/shakespeare_char)")
    args = parser.parse_args()
    out = args.out.resolve()
    check_folder(out, out.name)
    path = args.input or out / "input.txt"
    if not args.input and not (path.is_file() and is_shakespeare(path.read_bytes())):
        download(path)
    text = read_text(path)
    known = is_shakespeare(text.encode("utf-8"))
    source = f"Tiny Shakespeare, public domain, {URL}" if known else f"characters of {path.name}, given by the user"
    splits = make(out, text, source)
    print(f"{out}: written, {splits['train']['tokens']:,} train + {splits['val']['tokens']:,} val character tokens")


if __name__ == "__main__":
    run(main)
