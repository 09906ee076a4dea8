"""What leaves this program: text for a terminal, for another program, files written whole or not at all."""

import json
import os
import sys
from pathlib import Path


def printable(text):
    """`text` with control, bidi and undecodable characters spelled out (\\x1b): a name cannot drive a terminal."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(lines, file=None):
    """Print a line, or lines: all that this program says leaves here, so that no text of a log drives a terminal."""
    lines = [lines] if isinstance(lines, str) else lines
    print("\n".join(map(printable, lines)), file=file or sys.stdout)


def give(pieces):
    """Texts for another program, as they are, in UTF-8; on a terminal they are said."""
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        for piece in pieces:
            say(piece.expandtabs().removesuffix("\n").split("\n"))
        return
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(encoded(piece))


def encoded(text):
    return text.encode("utf-8", "backslashreplace")


def write_file(path, pieces):
    """Write bytes to `path`, whole or not at all: a file beside it takes its place. ValueError if a link, a folder or a
    device is there, RuntimeError if it cannot be written."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"'{path}' is a link, a folder or a device, no file: remove it, or write to another place")
    aside = path.parent / f".logger-{os.urandom(6).hex()}.tmp"
    try:
        try:
            with open(aside, "xb") as file:
                file.writelines(pieces)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(f"'{path}' cannot be written: {error.strerror}") from None


def strict_json(value, indent=2):
    """JSON text of `value`; nan and inf, which JSON cannot hold, become null."""
    value = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # the only control that json leaves raw


def say_json(value):
    say(strict_json(value).split("\n"))
