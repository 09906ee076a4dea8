"""README.md and docs/*.md: README is short, and the links, functions and flags that they name exist.

    `train_gpt.py`: `muon_update`     a function, method, class, constant or setting of that file
    | ... | code in `train_gpt.py` |  head of a table column, whose names in backticks are such
    $ python train_gpt.py --seed 1    a command in a code block; its flags must be the script's
"""
import ast
import functools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINE = 120  # most characters of a line; rows of tables cannot be broken
LINK = re.compile(r"\]\(([^)\s]+)\)")
REFERENCE = re.compile(r"`([\w/]+\.py)`:\s+((?:`\w+`(?:,\s+|\s+and\s+)?)+)")
COLUMN = re.compile(r"\bin `([\w/]+\.py)`$")
NAME = re.compile(r"`(\w+)`")
FLAG = re.compile(r"(?<![\w-])--[A-Za-z][\w-]*")
SCRIPT = re.compile(r"(?:^|\s)(\S+\.(?:py|sh))(?=\s|$)")
SUBCOMMANDS = {"logger.py": "watch show compare diff stats verify extract export board profile history",
               "bench/grokking.py": "sweep plot"}
# Scripts that hand further flags on: all that they do not know (run.sh, peer.py), or those after ` -- `.
HANDS_ON = {"run.sh": "train_gpt.py", "bench/peer.py": "train_gpt.py"}
TRAINERS = {"bench/moe.py": "train_moe.py", "bench/optimizers.py": "train_baseline.py",
            "bench/grokking.py": "train_grokking.py"}  # all others: --script, or train_gpt.py


class Command(NamedTuple):
    """One call of a script in a page."""

    script: str
    subcommand: str
    flags: tuple[str, ...]


def identifier(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(text: str) -> list[str]:
    """Texts of the code blocks, lines that end in a backslash joined to the next."""
    found = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL)
    return [re.sub(r"\\\n\s*", " ", block) for block in found]


def prose(text: str) -> str:
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


# --- links


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    heads = re.findall(r"^#+ (.+)$", prose(text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(text: str, folder: Path) -> list[str]:
    """The relative links that lead nowhere, or to a line number."""
    broken = []
    for link in LINK.findall(prose(text)):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (folder / path).resolve() if path else None
        missing = target and not target.exists()
        lost = anchor and target and target.suffix == ".md" and not missing and anchor not in anchors(target)
        if missing or lost or re.fullmatch(r"L\d+.*", anchor):
            broken.append(link)
    return broken


# --- names


@functools.cache
def defined(file: str) -> frozenset[str]:
    """Names of a file's functions, methods, classes, constants and fields; none if there is no such file."""
    if not (ROOT / file).is_file():
        return frozenset()
    tree = ast.parse((ROOT / file).read_bytes())
    nodes = list(ast.walk(tree))
    functions = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    bodies = [tree.body, *(node.body for node in nodes if isinstance(node, ast.ClassDef))]
    targets = [target for body in bodies for node in body for target in assigned(node)]
    return frozenset(functions + [target.id for target in targets if isinstance(target, ast.Name)])


def assigned(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def table_references(text: str) -> list[tuple[str, str]]:
    """File and name, of the cells below a column head that ends in a file."""
    found, files = [], {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.lstrip().startswith("|"):
            files = {}
        elif not files:
            heads = enumerate(map(COLUMN.search, cells))
            files = {column: head[1] for column, head in heads if head} or {-1: ""}
        else:
            named = {column: file for column, file in files.items() if 0 <= column < len(cells)}
            found += [(file, name) for column, file in named.items() for name in NAME.findall(cells[column])]
    return found


def references(text: str) -> list[tuple[str, str]]:
    """File and name, of all references of a page."""
    found = [(file, name) for file, names in REFERENCE.findall(text) for name in NAME.findall(names)]
    return found + table_references(text)


def unknown_names(text: str) -> list[str]:
    return [f"{file}: {name}" for file, name in references(text) if name not in defined(file)]


# --- flags


@functools.cache
def help_text(script: str, subcommand: str = "") -> str:
    """What --help prints, of a shell script its text; empty if there is no such script or subcommand."""
    if not (ROOT / script).is_file():
        return ""
    if script.endswith(".sh"):
        return (ROOT / script).read_text(encoding="utf-8")
    command = [sys.executable, script, *subcommand.split(), "--help"]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300).stdout


def accepted(script: str, subcommand: str = "") -> frozenset[str]:
    """Flags of a script, with dashes only."""
    return frozenset(flag.replace("_", "-") for flag in FLAG.findall(help_text(script, subcommand)))


def commands(text: str) -> list[Command]:
    """Calls of scripts in the code blocks, copies that a page makes as their originals; those after ` -- ` are the
    trainer's."""
    found, copies = [], {new: old for old, new in re.findall(r"\$ cp (\S+\.py) (\S+\.py)", text)}
    lines = [line for block in blocks(text) for line in block.splitlines()]
    calls = [part for line in lines for part in re.split(r"&&|;|\||\s#\s", line) if line.startswith("$ ")]
    for call in calls:
        if script := SCRIPT.search(call):
            own, _, handed = call[script.end():].partition(" -- ")
            file, words = script[1].removeprefix("./"), own.split()
            file = copies.get(file, file)
            known = SUBCOMMANDS.get(file, "").split()
            subcommand = words[0] if words and words[0] in known else ""
            found.append(Command(file, subcommand, tuple(FLAG.findall(own))))
            trainer = re.search(r"--script (\S+)", own)
            trainer = trainer[1] if trainer else TRAINERS.get(file, "train_gpt.py")
            found += [Command(trainer, "", tuple(FLAG.findall(handed)))] if handed else []
    return found


def unknown_flags(command: Command) -> list[str]:
    known = accepted(command.script, command.subcommand)
    if command.script in HANDS_ON:
        known |= accepted(HANDS_ON[command.script])
    return [flag for flag in command.flags if flag.replace("_", "-") not in known]


@functools.cache
def all_flags() -> frozenset[str]:
    """Flags of every script that a page names, and of the tools that are called in them."""
    scripts = {command.script for page in PAGES for command in commands(text_of(page))}
    scripts |= {file for page in PAGES for file in re.findall(r"`(?:python |\./)?([\w/]+\.(?:py|sh))\b", text_of(page))}
    known = {"--shutdown-timeout", "--write", "--lock"}  # of torchrun, tests/test_{shared_code,environments}.py
    known |= {"--extra", "--frozen", "--cluster"}  # of uv and sky
    for script in {script for script in scripts if not script.startswith("tests/")}:
        known |= accepted(script)
        for subcommand in SUBCOMMANDS.get(script, "").split():
            known |= accepted(script, subcommand)
    return frozenset(known)


# --- tests


def test_readme_takes_ten_minutes():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 200


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_lines_are_short(page):
    lines = text_of(page).splitlines()
    long = [line for line in lines if len(line) > LINE and not line.startswith("|")]
    if page.name == "README.md":  # rows that name a test cannot be shorter
        long += [line for line in lines if len(line) > LINE and line.startswith("|") and "`test_" not in line]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_links_lead_somewhere(page):
    assert broken_links(text_of(page), page.parent) == []


def test_every_page_is_linked_from_the_readme():
    linked = set(LINK.findall(text_of(ROOT / "README.md")))
    pages = {identifier(page) for page in PAGES[1:]}
    assert len(pages) > 5 and pages <= {link.partition("#")[0] for link in linked}


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_functions_that_are_named_exist(page):
    assert unknown_names(text_of(page)) == []


def test_functions_are_named():
    assert len([name for page in PAGES for name in references(text_of(page))]) > 50


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_flags_in_commands_are_those_of_the_script(page):
    calls = commands(text_of(page))
    assert [call for call in calls if not help_text(call.script, call.subcommand)] == []
    unknown = [f"{call.script} {call.subcommand} {flag}" for call in calls for flag in unknown_flags(call)]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=identifier)
def test_flags_in_the_text_are_those_of_some_script(page):
    spans = re.findall(r"`([^`]+)`", prose(text_of(page)))
    named = {flag for span in spans for flag in FLAG.findall(span)}
    assert {flag for flag in named if flag.replace("_", "-") not in all_flags()} == set()


# --- what is wrong is found


def test_a_lost_link_is_found(tmp_path):
    (tmp_path / "other.md").write_text("# A title, with `code`\n", encoding="utf-8")
    good = "[a](other.md) [b](other.md#a-title-with-code) [c](https://example.org/x.md)"
    assert broken_links(good, tmp_path) == []
    bad = ["gone.md", "other.md#no-title", "other.md#L12"]
    assert broken_links(" ".join(f"[x]({link})" for link in bad), tmp_path) == bad


def test_a_lost_function_is_found():
    text = "`train_gpt.py`: `GPT`, `no_such_one` and `gone.py`: `main`"
    assert unknown_names(text) == ["train_gpt.py: no_such_one", "gone.py: main"]
    table = "| a | code in `train_gpt.py` |\n|---|---|\n| `x` | `GPT`, `no_such_one` |\n\n`y`"
    assert unknown_names(table) == ["train_gpt.py: no_such_one"]


def test_a_lost_flag_is_found():
    calls = "$ python train_gpt.py --seed 1 \\\n    --no_such_flag && python logger.py stats A --gone  # --x"
    seed, stats = commands(f"```console\n{calls}\n```")
    assert seed.flags == ("--seed", "--no_such_flag") and unknown_flags(seed) == ["--no_such_flag"]
    assert (stats.script, stats.subcommand) == ("logger.py", "stats") and unknown_flags(stats) == ["--gone"]


def test_flags_after_two_dashes_are_the_trainers():
    calls = "$ python bench/moe.py --jobs 2 -- --top-k 1\n$ python bench/coord_check.py --script a.py -- --b 1"
    handed = [(call.script, call.flags) for call in commands(f"```console\n{calls}\n```")][1::2]
    assert handed == [("train_moe.py", ("--top-k",)), ("a.py", ("--b",))]


def test_every_promise_names_a_test_that_exists():
    """Rows of the tables whose last column is headed `test`."""
    defined = set(re.findall(r"^def (test_\w+)", "\n".join(map(text_of, (ROOT / "tests").glob("*.py"))), re.MULTILINE))
    named = []
    for page in [*PAGES, ROOT / "data" / "README.md"]:
        for table in re.findall(r"^\|.*\| test \|\n\|[-|]+\n((?:\|.*\n)+)", text_of(page), re.MULTILINE):
            for row in table.splitlines():
                tests = re.findall(r"`(?:[\w/.]+::)?(test_\w+)`", row.rsplit(" | ", 1)[1])
                assert tests, f"{page.name}: {row} names no test"
                named += tests
    assert len(named) > 20 and not set(named) - defined, set(named) - defined
