"""Falsified READMEs: does `logger.py verify` see one false number in each of many record folders?

    python tests/falsify.py RECORDS [--seeds 1 2] [--folders 30] [--target 3.28] [--any]

RECORDS is a folder of record folders (a checkout of public ones). In each README one number is replaced that is, by
arithmetic of its own, the mean loss, the mean time, n or the p of a group of runs: by a number that is off by 0.05 % to
90 % (n by 1 to nine times, p by 1.25 to 100 times) and is none of the other groups'. Detected: verify contradicts that
number, and did not contradict it before. With --any it is any number that verify had supported, off by 0.05 % to 90 %
or by one run or step; some of these are other true numbers by chance. The contradictions of the READMEs as they are
get listed: judge them by hand.
"""

import argparse
import random
import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from runlogs.arms import evidence_of
from runlogs.facts import groups_of
from runlogs.parsing import read_text
from runlogs.verifying import check_text

NUMBER = re.compile(r"(?<![\w.#/-])\d+(?:\.\d+)?(?:e-\d+)?(?![\w.]*\d)(?!\.\d)")
LIST = re.compile(r"\[[\s\d.,e+ms-]{8,60000}\]")
P_BEFORE = re.compile(r"\bp(?:[- ]?value)?[`*]{0,2}(?:\([^)]*\))? ?[=:] ?[`*]{0,2}$")
OFF = {"n": lambda v, r: max(1, int(v + r.choice([-1, 1, 2, 5, v, 9 * v]))),
       "p": lambda v, r: v * r.choice([0.01, 0.1, 0.5, 0.8, 1.25, 2, 5, 10])}
FACTORS = [0.0005, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 0.9]


def truths(groups, target):
    """{kind: values} of the groups of two or more runs."""
    groups = [group for group in groups if group.n > 1]
    means = {"mean loss": [g.losses for g in groups if g.losses], "mean time": [g.times for g in groups if g.times]}
    found = {kind: [statistics.fmean(values) for values in lists] for kind, lists in means.items()}
    return {**found, "n": [g.n for g in groups], "p": [p for g in groups for p in g.facts("p", "", target)]}


def digit_of(word):
    mantissa, _, exponent = word.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def kind_at(text, match, known):
    """Which truth the number at a match states, None if it states none."""
    word, before, after = match[0], text[max(0, match.start() - 25):match.start()], text[match.end():match.end() + 20]
    value, decimals = float(word), len(word.partition(".")[2])

    def is_one(kind, scale=1):
        return any(abs(scale * truth - value) <= 0.505 * digit_of(word) for truth in known[kind])

    if decimals >= 4 and is_one("mean loss"):
        return "mean loss"
    if value > 10 and (is_one("mean time") if decimals else value > 1000 and is_one("mean time", 1000)):
        return "mean time"
    if not decimals and value in known["n"] and (re.search(r"\bn ?= ?$", before) or re.match(r" (?:\w+ )?runs", after)):
        return "n"
    return "p" if P_BEFORE.search(before) and 0 < value < 1 and is_one("p") else None


def places(text, known):
    """[(kind, match)] of the numbers that may be falsified."""
    lists = [match.span() for match in LIST.finditer(text)]
    matches = [m for m in NUMBER.finditer(text) if not any(a <= m.start() < b for a, b in lists)]
    return [(kind, match) for match in matches if (kind := kind_at(text, match, known))]


def falsified(kind, word, known, rng):
    """Another number of the same form that is not true of any group; None if none is found."""
    for _ in range(100):
        value = float(word)
        new = OFF[kind](value, rng) if kind in OFF else value * (1 + rng.choice([-1, 1]) * rng.choice(FACTORS))
        form = ".2e" if "e" in word else f".{len(word.partition('.')[2])}f"
        text, scales = f"{new:{form}}", (1, 1000) if kind == "mean time" else (1,)
        true = any(abs(float(text) - scale * t) <= 1.01 * digit_of(text) for t in known[kind] for scale in scales)
        if text != word and not true and (kind != "p" or 0 < float(text) < 1):
            return text
    return None


def contradicted(text, groups, target):
    """{(kind, number)} that verify contradicts, and the verdicts."""
    found = [c for c in check_text(text, groups, target) if c["verdict"] == "contradicted"]
    return {(c["kind"], c["claim"].split()[-2 if c["claim"][-1].isalpha() else -1]) for c in found}, found


def load(folder, target):
    """[(path, text, groups, truths, places)] of the READMEs of all record folders that have checkable numbers."""
    found = []
    for path in sorted(Path(folder).glob("*/*")):
        if path.name.lower() == "readme.md":
            try:
                groups = groups_of(evidence_of([str(path.parent)]))
            except FileNotFoundError:
                continue
            text, known = read_text(path), truths(groups, target)
            found.append((path, text, groups, known, places(text, known)))
    return found


def one_round(readmes, seed, count, target):
    """(detected, falsified) of `count` READMEs, one number each."""
    rng, hits, done = random.Random(seed), 0, 0
    chosen = [readme for readme in readmes if readme[4]]
    rng.shuffle(chosen)
    for path, text, groups, known, where in chosen[:count]:
        kind = rng.choice(sorted({kind for kind, _ in where}))
        match = rng.choice([match for other, match in where if other == kind])
        new = falsified(kind, match[0], known, rng)
        if new is None:
            continue
        false = text[:match.start()] + new + text[match.end():]
        found = contradicted(false, groups, target)[0] - contradicted(text, groups, target)[0]
        numbers = [number.replace(",", "") for _, number in found]
        hit = any(re.fullmatch(r"[\d.]+(?:e-\d+)?", number) and float(number) == float(new) for number in numbers)
        hits, done = hits + hit, done + 1
        if not hit:
            print(f"  missed: {path.parent.name}: {kind} {match[0]} -> {new}")
    print(f"seed {seed}: {hits} of {done} detected")
    return hits, done


def any_round(readmes, seed, count):
    """(detected, falsified) of up to `count` numbers of each README that verify had supported."""
    rng, hits, done = random.Random(seed), 0, 0
    for path, text, groups, target in readmes:
        before = contradicted(text, groups, target)[0]
        claims = [c for c in check_text(text, groups, target) if c["verdict"] == "supported"]
        claims = [claim for claim in claims if "quote" in claim and claim["detail"] != "the target"]  # no result
        rng.shuffle(claims)
        for false, word, new, claim in changed_numbers(text, claims, rng)[:count]:
            found = {n.replace(",", "").lstrip("+-") for _, n in contradicted(false, groups, target)[0] - before}
            hit = any(re.fullmatch(r"[\d.]+(?:e-\d+)?", number) and float(number) == float(new) for number in found)
            hits, done = hits + hit, done + 1
            if not hit:
                place = f"{path.parent.name}:{claim['line']}"
                print(f"  missed: {place}: {claim['kind']} {word} -> {new}: {claim['quote']}")
    print(f"seed {seed}: {hits} of {done} detected (any supported number)")


def changed_numbers(text, claims, rng):
    """[(text with one number changed, number, the new one, its claim)] of claims whose line has the number once."""
    lines, found = text.split("\n"), []
    for claim in claims:
        word = next(iter(re.findall(r"\d+(?:\.\d+)?(?:e-\d+)?", claim["claim"])), "")
        line = lines[claim["line"] - 1] if word else ""
        places = [m for m in re.finditer(rf"(?<![\w.,]){re.escape(word)}(?![\d.]*\d)", line)] if word else []
        if len(places) != 1:
            continue
        step = 1 + rng.choice([-1, 1]) * rng.choice(FACTORS)
        new = str(max(1, int(word) + rng.choice([-1, 1, 5]))) if word.isdigit() and len(word) < 5 else \
            f"{float(word) * step:{'.2e' if 'e' in word else f'.{len(word.partition(chr(46))[2])}f'}}"
        if float(new) != float(word):
            false = line[:places[0].start()] + new + line[places[0].end():]
            found.append(("\n".join([*lines[:claim["line"] - 1], false, *lines[claim["line"]:]]), word, new, claim))
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--folders", type=int, default=30)
    parser.add_argument("--target", type=float, default=3.28)
    parser.add_argument("--any", action="store_true", help="falsify any number that verify had supported")
    args = parser.parse_args()
    readmes = load(args.records, args.target)
    print(f"{len(readmes)} READMEs beside logs, {sum(bool(r[4]) for r in readmes)} with checkable numbers")
    for path, text, groups, *_ in readmes:
        for claim in contradicted(text, groups, args.target)[1]:
            print(f"  contradicted as it is: {path.parent.name}:{claim['line']}: {claim['claim']} ({claim['detail']})")
    for seed in args.seeds:
        if args.any:
            any_round([(*readme[:3], args.target) for readme in readmes], seed, 5)
        else:
            one_round(readmes, seed, args.folders, args.target)


if __name__ == "__main__":
    main()
