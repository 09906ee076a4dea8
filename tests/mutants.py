"""Mutants: small errors put into the statistics of runlogs/, one at a time; the tests have to see each.

    python tests/mutants.py                      # all of them: a few minutes on one core
    python tests/mutants.py planning welch       # those with one of these words in their lines
    python tests/mutants.py --list

They are in mutants.txt: a file, a text in it that occurs exactly once, what takes its place, and why that is an error.
Each is put into a copy of runlogs/, logger.py and the tests, where the tests of TESTS run until the first failure. It
survives if none fails. Exit code 1: one survives of which it is not said that no test can see it, or does not apply.
"""

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import hypothesis.strategies  # noqa: F401
import pytest
import scipy.optimize  # noqa: F401
import scipy.special  # noqa: F401
import scipy.stats  # noqa: F401

LONGEST = 600  # seconds of the tests of a mutant
ROOT = Path(__file__).resolve().parents[1]
QUICK = ["statistics", "stages"]
TESTS = {  # file: test_logger_*.py that may see an error in it, the fastest first
    "judging": [*QUICK, "arms", "commands", "control"],
    "planning": ["plan"],
    "loading": [*QUICK, "commands", "public", "formats"],
    "arms": [*QUICK, "arms", "commands"],
    "facts": [*QUICK, "verify", "commands"],
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    why: str
    equivalent: str  # why no test can see it, "" if one has to


def read_mutants(text: str) -> list[Mutant]:
    """Mutants of a text in the form of mutants.txt."""
    found = []
    for block in text.split("\n\n")[1:]:
        lines = [line for line in block.split("\n") if line]
        file, _, why = lines[0].partition(": ")
        old, new, known = ("\n".join(line[2:] for line in lines[1:] if line[0] == mark) for mark in "-+=")
        found.append(Mutant(file, old, new, why, known))
    return found


class Outcome(NamedTuple):
    mutant: Mutant
    word: str
    detail: str
    seconds: float


def copy_of_tree(folder: Path):
    """runlogs/, logger.py and what their tests need, in `folder`."""
    for name in ("runlogs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("records", "docs", "bench", "data", "evals"):
        (folder / name).symlink_to(ROOT / name)


def tests_fail(folder: Path, names: list[str]) -> str:
    """The first failing test of test_logger_NAME.py, "" if all pass. They run in a fork of this process, which has
    imported what takes long, but nothing of runlogs/."""
    paths = [f"tests/test_logger_{name}.py" for name in names]
    paths = [path for path in paths if (folder / path).exists()]
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if not child:
            run_tests(folder, paths, out)
        status = os.waitpid(child, 0)[1]
        out.seek(0)
        text = out.read()
    if os.WIFSIGNALED(status):
        return f"ended by signal {os.WTERMSIG(status)}" + " (no end)" * (os.WTERMSIG(status) == signal.SIGALRM)
    if not os.WEXITSTATUS(status):
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", text, re.M)
    return found[1].removeprefix("tests/test_logger_") if found else f"exit code {status >> 8}: {text[-200:]}"


def run_tests(folder: Path, paths: list[str], out):
    """Run tests in a child process and end it with their exit code."""
    signal.alarm(LONGEST)
    for stream in (1, 2):
        os.dup2(out.fileno(), stream)
    os.chdir(folder)
    sys.dont_write_bytecode = True  # a mutant of equal size in the same second would be taken from a .pyc
    sys.path[0] = str(folder)
    codes = (int(pytest.main(["-x", "-q", "--no-header", "--tb=no", "--rootdir", str(folder), path])) for path in paths)
    code = next((code for code in codes if code), 0)
    sys.stdout.flush()
    os._exit(code)


def outcome_of(mutant: Mutant, folder: Path) -> Outcome:
    """Put one mutant into the copy, run the tests, take it out again."""
    path, start = folder / "runlogs" / f"{mutant.file}.py", time.monotonic()
    text = path.read_text()
    if (count := text.count(mutant.old)) != 1:
        return Outcome(mutant, "does not apply", f"the text occurs {count} times", 0.0)
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        failed = tests_fail(folder, TESTS[mutant.file])
    finally:
        path.write_text(text)
    word = "killed" if failed else "equivalent" if mutant.equivalent else "SURVIVED"
    return Outcome(mutant, word, failed or mutant.equivalent, time.monotonic() - start)


def chosen(words: list[str]) -> list[Mutant]:
    mutants = read_mutants((ROOT / "tests" / "mutants.txt").read_text())
    return [m for m in mutants if not words or any(w in f"{m.file}: {m.why} {m.old}" for w in words)]


def report(outcomes: list[Outcome]) -> int:
    """Print the counts; the exit code."""
    words = [outcome.word for outcome in outcomes]
    counts = {word: words.count(word) for word in ("killed", "equivalent", "SURVIVED", "does not apply")}
    print(f"{len(outcomes)} mutants: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["SURVIVED"] or counts["does not apply"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the mutants to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{m.file}: {m.why}\n  - {m.old.strip()}\n  + {m.new.strip()}" for m in chosen(args.words)))
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        copy_of_tree(folder := Path(name))
        names = dict.fromkeys(name for m in chosen(args.words) for name in TESTS[m.file])
        if failed := tests_fail(folder, [*names]):
            print(f"without a mutant {failed} fails: repair that first")
            return 1
        for mutant in chosen(args.words):
            outcomes.append(one := outcome_of(mutant, folder))
            print(f"{one.word:<14} {mutant.file}: {mutant.why} ({one.seconds:.1f} s) {one.detail}", flush=True)
    return report(outcomes)


if __name__ == "__main__":
    sys.exit(main())
