"""Make the Tiny Shakespeare data set, one token a character, with nanoGPT's vocabulary and split.

    python data/shakespeare_char.py                          # downloads 1.1 MB, writes data/shakespeare_char/
    python data/shakespeare_char.py --input FILE --out DIR   # any UTF-8 text of at most 65,535 distinct characters

The vocabulary is the sorted set of the text's characters (65), train is the first 90% of the characters (1,003,854)
and val the rest (111,540), so losses compare with nanoGPT's. There is no eot: the text is one document.

A folder with the data set of another text is left as it is.
"""

import interrupt  # noqa: F401  (first: its docstring)

# isort: split
import hashlib
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from common import (
    Parser,
    check_folder,
    check_regular,
    command_line,
    load_shard,
    lock_folder,
    naming,
    read_json,
    run,
    say,
    shard_path,
    warn,
    write_atomic,
    write_json,
    write_meta,
    write_shard,
)

# Andrej Karpathy's char-rnn repository (MIT; the text itself is in the public domain), at its last commit.
URL = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/"
    "6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e/data/tinyshakespeare/input.txt"
)
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SIZE = 1_115_394
MAX_CHARS = 65_535
TRAIN_FRACTION = 0.9
FOLDER = Path(__file__).resolve().parent / "shakespeare_char"


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
    check_regular(path)
    with naming(path):
        raw = path.read_bytes()
    if not is_shakespeare(raw):
        warn(f"{path} is not Tiny Shakespeare; losses will not compare with nanoGPT's")
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


class Text:
    """A text ready to be written: the tokens of each split, and what meta.json says of them."""

    def __init__(self, text: str, source: str, made_with: str):
        self.sha256 = hashlib.sha256(text.encode("utf-8")).hexdigest()
        self.source, self.made_with = source, made_with
        self.chars, tokens = encode(text)
        cut = int(len(text) * TRAIN_FRACTION)
        if cut == 0:
            raise ValueError(f"the text has {len(text)} characters, too few to split into train and val")
        self.tokens, self.splits = {}, {}
        for split, part in {"train": slice(cut), "val": slice(cut, None)}.items():
            self.tokens[split] = tokens[part]
            self.splits[split] = {"tokens": len(text[part]), "bytes": len(text[part].encode("utf-8"))}

    def make(self, out: Path) -> None:
        """Write both shards and meta.json. progress.json says until then whose folder it is."""
        write_json(out / "progress.json", {"text_sha256": self.sha256, "made_with": self.made_with})
        (out / "meta.json").unlink(missing_ok=True)
        for split, tokens in self.tokens.items():
            write_shard(shard_path(out, out.name, split, 0), tokens)
        vocab = {"tokenizer": {"kind": "char", "chars": self.chars}, "vocab_size": len(self.chars), "eot": None}
        about = {"source": self.source, "made_with": self.made_with, "text_sha256": self.sha256}
        write_meta(out, name=out.name, vocab=vocab, splits=self.splits, **about)
        (out / "progress.json").unlink()

    def complete(self, out: Path) -> bool:
        """Whether the folder holds this text's data set, whole. Raises ValueError for what belongs to another text."""
        meta, progress = read_json(out / "meta.json"), read_json(out / "progress.json")
        same = [self.same_tokens(out, split) for split in self.tokens]
        if self.is_of(meta, same) and progress is None:
            return all(same) and meta.get("splits") == self.splits
        if self.is_of(progress or meta, same) or not (meta or progress or any(out.glob("*.bin"))):
            return False
        raise ValueError(f"{out} holds a data set of other text, which would be lost: choose another --out")

    def is_of(self, record: dict | None, same: list[bool]) -> bool:
        """Whether meta.json or progress.json is of this text. Without its hash, as in older data sets, tokens tell."""
        if record is None or "text_sha256" in record:
            return record is not None and record["text_sha256"] == self.sha256
        old = "Tiny Shakespeare, public domain"
        return all(same) or str(record.get("source")).startswith(old) and self.source.startswith(old)

    def same_tokens(self, out: Path, split: str) -> bool:
        try:
            return np.array_equal(load_shard(shard_path(out, out.name, split, 0)), self.tokens[split])
        except (ValueError, FileNotFoundError):
            return False


def find_text(given: Path | None, out: Path) -> Path:
    """The file to read: the one given, or the download, which lies in the data set's folder."""
    if given:
        return given
    path = out / "input.txt"
    if not path.exists():
        download(path)
    check_regular(path)
    if not is_shakespeare(path.read_bytes()):
        raise ValueError(f"{path} is not Tiny Shakespeare, and the download would replace it: choose another --out")
    return path


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--input", type=Path, help="a local UTF-8 text instead of the download")
    parser.add_argument("--out", type=Path, default=FOLDER, help="output folder (default: data/shakespeare_char)")
    args = parser.parse_args()
    out = args.out.resolve()
    if args.input and not args.input.exists():
        raise FileNotFoundError(f"input {args.input} does not exist: pass a UTF-8 text with --input")
    check_folder(out, out.name)
    lock_folder(out)
    path = find_text(args.input, out)
    raw_text = read_text(path)
    known = is_shakespeare(raw_text.encode("utf-8"))
    source = f"Tiny Shakespeare, public domain, {URL}" if known else f"characters of {path.name}, given by the user"
    options = [*(["--input", path] if args.input else []), *([] if out == FOLDER else ["--out", out])]
    text = Text(raw_text, source, command_line("shakespeare_char.py", *options))
    verb = "already complete" if text.complete(out) else "written"
    if verb == "written":
        text.make(out)
    counts = " + ".join(f"{counts['tokens']:,} {split}" for split, counts in text.splits.items())
    say(f"{out}: {verb}, {counts} character tokens")


if __name__ == "__main__":
    run(main)
