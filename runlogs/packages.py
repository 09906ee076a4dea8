"""A program of several files, {path: text}: which file of one program became which file of another, and in which
language each is. Pure text, in time that grows with its size."""

import re
from collections import Counter
from pathlib import PurePosixPath

SUFFIXES = {"rs": "Rust", "cu": "CUDA", "cuh": "CUDA", "c": "C", "h": "C", "cc": "C++", "cpp": "C++", "cxx": "C++",
            "hpp": "C++", "js": "JavaScript", "sh": "shell", "toml": "TOML", "json": "JSON", "yaml": "YAML",
            "yml": "YAML", "md": "Markdown", "txt": "text", "cfg": "text", "ini": "text", "proto": "text"}
NAMES = re.compile(r"^[ \t]*(?:[\w:<>*]+[ \t]+){0,4}?(?:def|class|fn|struct|__global__ void)[ \t]+(\w{1,80})", re.M)
ALIKE = 0.5  # of the lines or names of two files that are equal: one became the other
SHORT = 8  # characters: shorter lines (brackets, else:) say nothing


def language_of(name):
    """Language of a file by its name; Python unless the name says otherwise."""
    return SUFFIXES.get(PurePosixPath(name).suffix[1:].lower(), "Python")


def pair_files(old, new):
    """[(name in old or None, name in new or None)] of two programs: the same path, else the same text, else the text
    that is most alike; those of old in order, then those that are new."""
    pairs = {name: name for name in old if name in new}
    for find in (same_texts, alike_texts):
        left = [name for name in old if name not in pairs]
        taken = {*pairs.values()}
        pairs |= find(old, left, new, [name for name in new if name not in taken])
    taken = {*pairs.values()}
    return [(name, pairs.get(name)) for name in old] + [(None, name) for name in new if name not in taken]


def same_texts(old, left, new, others):
    """{name in old: name in new} of files with the same text; of several the one with the same last name first."""
    places = {}
    for name in others:
        places.setdefault(new[name].strip(), []).append(name)
    pairs = {}
    for name in left:
        text = old[name].strip()
        if text and (found := places.get(text)):
            last = PurePosixPath(name).name
            match = next((other for other in found if PurePosixPath(other).name == last), found[0])
            found.remove(match)
            pairs[name] = match
    return pairs


def alike_texts(old, left, new, others):
    """{name in old: name in new} of files that share ALIKE of their lines, or of the names of their functions."""
    shares = Counter()
    for marks_of in (lines_of, names_of):
        before = {name: marks_of(old[name]) for name in left}
        after = {name: marks_of(new[name]) for name in others}
        for (a, b), count in common(before, after).items():
            share = 2 * count / (len(before[a]) + len(after[b]))
            if language_of(a) == language_of(b) and count >= 3:
                shares[a, b] = max(shares[a, b], share)
    pairs = {}
    for (a, b), share in shares.most_common():
        if share >= ALIKE and a not in pairs and b not in pairs.values():
            pairs[a] = b
    return pairs


def common(before, after):
    """{(a, b): number of marks that only a of `before` and only b of `after` has}: each mark counts for one pair."""
    owners = [{}, {}]
    for owner, files in zip(owners, (before, after), strict=True):
        for name, marks in files.items():
            for mark in marks:
                owner[mark] = None if mark in owner else name
    pairs = ((a, owners[1].get(mark)) for mark, a in owners[0].items())
    return Counter((a, b) for a, b in pairs if a is not None and b is not None)


def lines_of(text):
    return {line for line in map(str.strip, text.split("\n")) if len(line) >= SHORT}


def names_of(text):
    return {*NAMES.findall(text)}
