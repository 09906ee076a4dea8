"""The source inside a log -> files of a new folder, nothing of which takes the place of a module."""

import os
import re
import shutil
import sys
from pathlib import PurePosixPath

from runlogs.output import write_file

# Modules that our scripts import, installed or not
TAKEN = set("""numpy torch triton tiktoken datasets huggingface_hub pyarrow tqdm wandb matplotlib scipy rich pytest
hypothesis transformers runlogs""".split())
# Files that Python, pytest, pip or make run when they find them, and names of devices: in no folder
RUN_UNASKED = set("sitecustomize usercustomize conftest setup pyproject makefile con prn aux nul".split())
FOLDER = re.compile(r"[a-z_][\w-]{0,60}", re.ASCII | re.I)
FILE = re.compile(r"[a-z_]\w{0,60}\.(py|pyi|rs|toml|cu|cuh|c|cc|cpp|h|hpp|txt|md|json|yaml|yml)", re.ASCII | re.I)
MAX_DEPTH, MAX_FILES = 8, 400  # folders around a file, files of a program


def check_part(name):
    """ValueError if a file of this path would lead out of its folder, or be imported or run in place of another one."""
    *folders, file = name.split("/")
    plain = FILE.fullmatch(file) and all(map(FOLDER.fullmatch, folders))
    if not plain or (not folders and file.startswith("_")):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as this is no plain file name")
    if len(folders) > MAX_DEPTH:
        raise ValueError(f"the log holds a file '{name}': nothing was written, as more than {MAX_DEPTH} "
                         "folders are around it")
    stems = [folder.lower() for folder in folders] + [file.partition(".")[0].lower()]
    first = (folders or [file])[0].partition(".")[0]
    known = first.lower() in TAKEN or first.lower() in sys.stdlib_module_names
    unasked = any(stem in RUN_UNASKED or re.fullmatch(r"(com|lpt)\d", stem) for stem in stems)
    if known or unasked or importable(first.lower()) or importable(first):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as it would take the place of a module; "
                         "without -o the main file is printed")


def importable(module):
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is imported but says not from where
        return True


def check_tree(names, log):
    """ValueError if a name is a file and a folder, or two differ in case only: not all systems tell these apart."""
    spelled = {}
    for name in names:
        path = PurePosixPath(name)
        for entry, is_file in ((path, True), *((folder, False) for folder in [*path.parents][:-1])):
            known = spelled.setdefault(str(entry).lower(), (str(entry), is_file))
            if known != (str(entry), is_file):
                what = "differ in upper and lower case only" if known[1] == is_file else "are a file and a folder"
                raise ValueError(f"'{log}' holds files whose names {what}, '{known[0]}' and '{entry}': nothing was "
                                 "written")


def write_parts(target, parts, log):
    """Write the files of a source of several into a folder that is new, or empty: old/old.py and others for old.py,
    old/train_gpt.py and others for old; {path: text}."""
    main, *others = parts
    script = target.suffix == ".py"
    folder, name = (target.with_suffix(""), target.name) if script else (target, main)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"'{log}' holds {len(parts)} files: they need a new folder, and '{folder}' is there; choose "
                         "another -o")
    if len(parts) > MAX_FILES:
        count = f"{len(parts)} files, more than {MAX_FILES}"
        raise ValueError(f"'{log}' holds {count}: nothing was written")
    for other in others:
        check_part(other)
    check_tree([name, *others], log)
    if len({name, *others}) < len(parts):
        raise ValueError(f"'{log}' holds two files '{name}': nothing was written; choose another -o")
    parts = {name: parts[main]} | {other: parts[other] for other in others}
    aside = folder.parent / f".logger-{os.urandom(6).hex()}.tmp"
    try:
        aside.mkdir()
        for name, text in parts.items():
            (aside / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(aside / name, [text.encode("utf-8", "replace")])
        os.replace(aside, folder)
    except OSError as error:
        raise RuntimeError(f"'{folder}' cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {folder / name: text for name, text in parts.items()}


def how_to_run(files, world_size=None):
    """The command that runs extracted files: the first, from its folder, where its imports find the others."""
    main = next(iter(files))
    several = (world_size or 1) > 1
    start = f"torchrun --standalone --nproc_per_node={world_size}" if several else "python"
    inside = "" if str(main.parent) == "." else f"cd {quoted(main.parent)} && "
    return f"{inside}{start} {quoted(main.name)}"


def quoted(path):
    from shlex import quote

    return quote(str(path))
