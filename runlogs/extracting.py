"""The source inside a log -> files, nothing of which takes the place of a module."""

import os
import re
import shutil
import sys

from runlogs.output import write_file

# Modules that our scripts import, installed or not, and files that Python, pytest or pip run when they find them
TAKEN = set("""numpy torch triton tiktoken datasets huggingface_hub pyarrow tqdm wandb matplotlib scipy rich pytest
hypothesis transformers runlogs sitecustomize usercustomize conftest setup con prn aux nul""".split())


def check_part(name):
    """ValueError if a file of this name, which a log gives, would be imported or run in place of another one."""
    module = name.partition(".")[0].lower()
    if not re.fullmatch(r"[a-z]\w{0,60}\.(py|cu|cuh|cpp|h|txt|md|json)", name, re.ASCII | re.I):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as this is no plain file name")
    known = module in TAKEN or module in sys.stdlib_module_names or re.fullmatch(r"(com|lpt)\d", module)
    if known or importable(module) or importable(name.partition(".")[0]):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as it would take the place of a module; "
                         "without -o the main file is printed")


def importable(module):
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is imported but says not from where
        return True


def write_parts(target, parts, log):
    """Write the files of a source of several into a folder that is new, or empty: old/old.py and others for old.py,
    old/train_gpt.py and others for old; {path: text}."""
    main, *others = parts
    folder, name = (target.with_suffix(""), target.name) if target.suffix == ".py" else (target, main)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"'{log}' holds {len(parts)} files: they need a new folder, and '{folder}' is there; choose "
                         "another -o")
    for other in others:
        check_part(other)
    if len({other.lower() for other in (name, *others)}) < len(parts):
        raise ValueError(f"'{log}' holds files whose names differ in upper and lower case only: nothing was written")
    parts = {name: parts[main]} | {other: parts[other] for other in others}
    aside = folder.parent / f".logger-{os.urandom(6).hex()}.tmp"
    try:
        aside.mkdir()
        for name, text in parts.items():
            write_file(aside / name, [text.encode("utf-8", "replace")])
        os.replace(aside, folder)
    except OSError as error:
        raise RuntimeError(f"'{folder}' cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {folder / name: text for name, text in parts.items()}
