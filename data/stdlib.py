"""Make the default data set, without any download: the source code of Python's own standard library, as bytes.

    python data/stdlib.py          # a few seconds; writes data/stdlib/

Every Python has it, it is real text of about 10 MB, and the model's samples are easy to judge by eye. Tests, installed
packages and generated files are left out. One document is one file, in the order of their names, eot first; which
files are held out for val depends only on their names.
"""

import interrupt  # noqa: F401  (first: its docstring)

# isort: split
import platform
import sysconfig
from pathlib import Path

import numpy as np
from common import (
    BYTE_VOCAB,
    Parser,
    check_folder,
    command_line,
    held_out,
    lock_folder,
    read_json,
    read_meta,
    read_shard_header,
    run,
    say,
    shard_path,
    write_meta,
    write_shard,
)

NAME = "stdlib"
FOLDER = Path(__file__).resolve().parent / NAME
SOURCE = "source files of the standard library of "
SPLITS = ("train", "val")
VAL_FRACTION = 0.08
EOT = BYTE_VOCAB["eot"]
# Generated text goes with the tests and installed packages: the code-page tables of `encodings` are near-copies of each
# other (they would sit on both sides of the split), and one 0.7 MB file of `pydoc_data` would be half of val.
EXCLUDED_FOLDERS = {
    *("site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"),
    *("encodings", "pydoc_data"),
}


def source_text() -> str:
    """The `source` line of meta.json; a folder with the same line is up to date."""
    version = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{SOURCE}{version}, without tests; PSF License Version 2"


def wanted(relative: Path) -> bool:
    """Whether a file is library source. `_sysconfigdata*` and `config-*/` are made by each build and name its paths."""
    built = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
    return not built and EXCLUDED_FOLDERS.isdisjoint(relative.parts)


def read_documents(root: Path) -> dict[str, bytes]:
    """{relative POSIX name: UTF-8 text with \\n line ends}, in the order of the names.

    Files in other encodings are left out: bytes of a token stream should spell text.
    Raises FileNotFoundError when this Python keeps its library in a zip, frozen, or as bytecode only.
    """
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py") if wanted(path.relative_to(root))}
    documents = {}
    for name in sorted(files):
        text = files[name].read_bytes().replace(b"\r\n", b"\n")
        if text and is_utf8(text):
            documents[name] = text
    if not documents:
        raise FileNotFoundError(
            f"no standard library source in {root}: this Python keeps it in a zip or frozen; "
            "run data/stdlib.py with a full Python installation, or use data/shakespeare_char.py"
        )
    return documents


def is_utf8(text: bytes) -> bool:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def pack(texts: list[bytes]) -> np.ndarray:
    """Byte tokens of the documents, each led by eot: shape (sum of lengths + number of documents,), uint16."""
    parts = []
    for text in texts:
        parts += [np.array([EOT], dtype=np.uint16), np.frombuffer(text, dtype=np.uint8).astype(np.uint16)]
    return np.concatenate(parts)


def make(out: Path, root: Path) -> dict:
    """Write both shards and meta.json; returns the splits. The old meta.json goes first: its shards are replaced."""
    documents = read_documents(root)
    texts = {split: [] for split in SPLITS}
    for name, text in documents.items():
        texts["val" if held_out(name, VAL_FRACTION) else "train"].append(text)
    if not texts["train"] or not texts["val"]:
        raise FileNotFoundError(f"{root} holds only {len(documents)} source files, too few for train and val")
    (out / "meta.json").unlink(missing_ok=True)
    splits = {}
    for split in SPLITS:
        tokens = pack(texts[split])
        write_shard(shard_path(out, NAME, split, 0), tokens)
        splits[split] = {"tokens": tokens.size, "bytes": tokens.size - len(texts[split])}
    command = command_line("stdlib.py", *([] if out == FOLDER else ["--out", out]))
    write_meta(out, name=NAME, vocab=BYTE_VOCAB, source=source_text(), made_with=command, splits=splits)
    return splits


def check_own(out: Path) -> None:
    """Raise ValueError for a folder with another data set of the same name: text of the user, say from stdlib.txt.

    A damaged meta.json passes: the data set is remade.
    """
    try:
        source = (read_json(out / "meta.json") or {}).get("source", SOURCE)
    except ValueError:
        source = SOURCE
    if (out / "progress.json").exists() or not str(source).startswith(SOURCE):
        raise ValueError(f"{out} holds a data set of other text: choose another --out")


def complete(out: Path) -> dict | None:
    """The splits of a finished data set of this Python version in `out`, else None."""
    try:
        meta = read_meta(out)
        if meta is None or meta["source"] != source_text():
            return None
        same = all(
            meta["splits"][split]["tokens"] == read_shard_header(shard_path(out, NAME, split, 0)) for split in SPLITS
        )
    except (ValueError, FileNotFoundError):  # a damaged data set is remade
        return None
    return meta["splits"] if same else None


def summary(out: Path, splits: dict, verb: str) -> str:
    train, val = (splits[split]["tokens"] for split in SPLITS)
    return f"{out}: {verb}, {train:,} train + {val:,} val byte tokens of Python {platform.python_version()}"


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="output folder (default: data/stdlib)")
    parser.add_argument("--force", action="store_true", help="remake a data set that is already complete")
    args = parser.parse_args()
    out = args.out.resolve()
    check_folder(out, NAME)
    check_own(out)
    if not args.force and (splits := complete(out)):
        say(summary(out, splits, "already complete"))
        return
    lock_folder(out)
    say(summary(out, make(out, Path(sysconfig.get_path("stdlib"))), "written"))


if __name__ == "__main__":
    run(main)
