"""Claims of a README -> what the logs beside it say to them."""

import math
import re
import statistics
import sys
from bisect import bisect_left, bisect_right

from runlogs.judging import HARMLESS, below_target, group_numbers, versions, what_differs
from runlogs.loading import natural
from runlogs.parsing import parse_step_line

STEP_CLAIM = re.compile(r"step:\d{1,15}/\d{1,15} val_loss:\d{1,9}\.\d{1,15}[^\n`|]{0,300}", re.ASCII)
LIST_CLAIM = re.compile(r"\[([\s\d.,e+-]{8,20000})\]")
P_CLAIM = re.compile(r"\bp(?:[- ]?value)?\s{0,3}(=|<|<=|≤|~|≈|:)\s{0,3}(\d{0,9}\.?\d{1,20}(?:e-?\d{1,3})?)"
                     r"(?![\d.]{0,20}\s{0,3}%)", re.I)
N_CLAIM = re.compile(r"\bn\s?=\s?(\d{1,6})\b|"
                     r"\b(\d{1,6}) (?:independent |validation |training |new |more )?(?:runs|trials|seeds)\b", re.I)
LOSS_CLAIM = re.compile(r"(?<![\d.\w-])(\d{1,2}\.\d{3,6})(?!\d|\.\d|\s?(?:s|sec|seconds|ms|min|minutes|x)\b|\s?%)")
TIME_CLAIM = re.compile(r"(?<![\d.\w-])(\d{1,7}(?:\.\d{1,4})?)\s?(ms|s|sec|secs|seconds|min|mins|minutes)\b(?!/)", re.I)
VERDICTS = {False: "contradicted", None: "not checkable", True: "confirmed"}
MAX_CLAIMS = 200  # of each kind that are checked
UNITS = {"ms": 1e-3, "s": 1, "sec": 1, "secs": 1, "seconds": 1, "min": 60, "mins": 60, "minutes": 60}


def claims_of(form, text):
    """The first MAX_CLAIMS different matches."""
    return list({match[0]: match for match in form.finditer(text)}.values())[:MAX_CLAIMS]


def near(text, values, scale=1.0):
    """Those of the sorted values that may agree with a number as it is written."""
    value, step = float(text) * scale, 2 * 10.0 ** -len(text.partition(".")[2]) * scale
    return values[bisect_left(values, value - step) : bisect_right(values, value + step)]


def agrees(text, values, scale=1.0):
    """Whether a number as it is written is one of `values`, rounded or cut to its digits."""
    step = 10.0 ** -len(text.partition(".")[2]) * scale
    return any(abs(float(text) * scale - value) <= 1.01 * step / 2 or 0 <= value - float(text) * scale < step
               for value in values if value is not None)


def check_claims(text, groups, target):
    """[{"kind", "claim", "verdict", "detail"}] for every claim in a README; `groups` is {name: samples}. Verdicts are
    confirmed, contradicted, not checkable (the number may be about a run that is not here)."""
    samples, found = list({id(s): s for group in groups.values() for s in group}.values()), []
    numbers = [group_numbers(group) for group in groups.values()]
    found += [check_line(match[0], samples) for match in claims_of(STEP_CLAIM, text)]
    text = STEP_CLAIM.sub(" ", text)
    listed = claims_of(LIST_CLAIM, text)
    found += filter(None, (check_list(match[1], samples) for match in listed))
    lists = [[float(word) for word in re.findall(r"\d+\.\d+", match[1])] for match in listed]
    text = LIST_CLAIM.sub(" ", text)
    claims = [match for match in claims_of(P_CLAIM, text) if 0 < float(match[2]) < 1]
    found += check_ps(claims, groups, lists, target) if claims else []
    text = P_CLAIM.sub(" ", text)
    found += [check_n(match, numbers, len(samples)) for match in claims_of(N_CLAIM, text)]
    on_the_way = (row.get("val_loss", math.nan) for s in samples for row in s.rows)
    on_the_way = sorted(loss for loss in on_the_way if math.isfinite(loss))
    found += filter(None, (check_loss(m, text, samples, numbers, on_the_way) for m in claims_of(LOSS_CLAIM, text)))
    found += [check_time(match, samples, numbers) for match in claims_of(TIME_CLAIM, text)]
    return list({(claim["kind"], claim["claim"]): claim for claim in found}.values())


def verdict(kind, claim, truth, detail=""):
    """`truth` is True, False or None: not checkable."""
    word, claim = VERDICTS[truth], claim.strip()[:100]
    return {"kind": kind, "claim": claim, "verdict": word, "detail": detail}


def check_line(line, samples):
    """A step line quoted from a log must be in one."""
    row = parse_step_line(re.sub(r"[,;.)]+(?=\s|$)", "", line))
    rows = [r for s in samples for r in s.rows if r["step"] == row["step"] and r["iterations"] == row["iterations"]]
    there = any(r.get("val_loss") == row["val_loss"] for r in rows)
    return verdict("step line", line, there if rows else None, "" if there else "no log holds it")


def check_list(text, samples):
    """A list of numbers: losses or times of the runs. Many of them in the logs and some not is a contradiction."""
    words = re.findall(r"\d+\.\d+|\d{4,}", text)[:2000]
    if len(words) < 2:
        return None
    losses = sorted(s.loss for s in samples)
    seconds = sorted(s.time_s for s in samples if s.time_s is not None and math.isfinite(s.time_s))
    kinds = {"losses": (losses, 1.0), "times": (seconds, 1.0), "times in ms": (seconds, 1e-3)}
    hits = {kind: [w for w in words if agrees(w, near(w, *of), of[1])] for kind, of in kinds.items()}
    kind = max(hits, key=lambda kind: len(hits[kind]))
    missing = [word for word in words if word not in hits[kind]]
    truth = True if not missing else False if len(hits[kind]) > len(words) / 2 else None
    detail = f"{len(words) - len(missing)} of {len(words)} are in the logs"
    detail += f", not {', '.join(missing[:5])}" if missing else ""
    return verdict(f"list of {kind if hits[kind] else 'numbers'}", f"[{', '.join(words[:4])}, ...]", truth, detail)


def check_ps(claims, groups, lists, target):
    """p = x is that of the t-test, or of track 3's test with a known sd, of some group; p < x holds for one. A p that
    follows from a list in the README whose runs are not here cannot be checked."""
    values = [p for group in groups.values() for p in p_values([s.loss for s in group], target)]
    listed = [p for losses in lists for p in p_values(losses, target)]
    return [check_p(match, values, listed) for match in claims]


def check_p(match, values, listed):
    """`values` are the p of the groups, `listed` those of the lists in the README."""
    digits, exact = match[2], match[1] in "=:~≈"

    def fits(p):
        return agrees(digits, [p]) or abs(p - float(digits)) < 0.05 * float(digits) if exact else p < float(digits)

    if not values:
        return verdict("p", match[0], None, "no group of two or more runs")
    if not any(map(fits, values)) and any(map(fits, listed)):
        return verdict("p", match[0], None, "follows from the README's own list, not from the logs here")
    closest = min(values, key=lambda p: abs(math.log((p + 1e-300) / float(digits))))
    return verdict("p", match[0], any(map(fits, values)), f"the closest of the tests of these logs: p = {closest:.2g}")


def p_values(losses, target):
    """p of the t-test, and of the z-test with track 3's sd of 0.0013, that the mean is below the target."""
    if len(losses) < 2 or not all(abs(loss - target) < 1 for loss in losses):
        return []
    z = (target - statistics.mean(losses)) * math.sqrt(len(losses)) / 0.0013
    return [p for p in (below_target(losses, target), 0.5 * math.erfc(z / math.sqrt(2))) if p is not None]


def check_n(match, numbers, total):
    """A number of runs must be one that the folder holds; fewer may be about a part of them."""
    claim = int(match[1] or match[2])
    counts = sorted({g["n"] for g in numbers} | {total})
    truth = True if claim in counts else False if claim > total else None
    return verdict("n", match[0], truth, f"complete runs here: {', '.join(map(str, counts))}")


def check_loss(match, text, samples, numbers, on_the_way):
    """A number in the range of the runs' losses: of a run, a validation on the way, or the mean of a group. One that is
    called the mean or average and is not is contradicted."""
    losses = [s.loss for s in samples]
    if not losses or not min(losses) - 0.05 <= float(match[1]) <= max(losses) + 0.05:
        return None
    means = [g["mean_val_loss"] for g in numbers]
    if agrees(match[1], means):
        return verdict("loss", match[1], True, "mean of a group")
    if agrees(match[1], losses):
        return verdict("loss", match[1], True, "final loss of a run")
    if agrees(match[1], near(match[1], on_the_way)):
        return verdict("loss", match[1], True, "validation on the way")
    before = text[max(0, match.start() - 40) : match.start()].lower()
    called = re.search(r"(mean|average|avg)\W{0,12}(?:\w+\W{1,3}){0,3}$", before)
    return verdict("loss", match[1], False if called else None,
                   f"means here: {', '.join(f'{m:.4f}' for m in means[:4])}" if called else "no run has it")


def check_time(match, samples, numbers):
    """A time of a run, a mean, or a step average; others may be about anything."""
    unit = UNITS[match[2].lower()]
    seconds = [s.time_s for s in samples] + [g["mean_time_s"] for g in numbers]
    seconds += [g["mean_step_ms"] / 1000 for g in numbers if g["mean_step_ms"]] if unit == 1e-3 else []
    there = agrees(match[1], seconds, unit)
    return verdict("time", match[0], True if there else None, "" if there else "no run took that long")


def check_versions(samples):
    """One code version in each folder of logs; other seeds and comments are the same version."""
    folders, mixed = {}, []
    for sample in samples:
        folders.setdefault(str(sample.run.path.parent), []).append(sample)
    for name, group in folders.items():
        first, *others = [found[0].run for found in versions(group).values() if found[0].run.trace.code_hash] or [None]
        words = dict.fromkeys(what_differs(first, run) for run in others)
        some = "; ".join(list(words)[:3])
        mixed += [f"{name}: {len(others) + 1} versions: {some}"] if words else []
        mixed += [""] if words.keys() - HARMLESS else []
    fatal, mixed = "" in mixed, "; ".join(filter(None, mixed))
    return verdict("code", "one code version in each group", not fatal if samples else None, mixed)


def check_sources(runs):
    """Every embedded source compiles; one for a newer Python than this one cannot be judged."""
    from runlogs.sources import problem_of

    found = {part: run for run in runs for part in run.trace.parts.items()}
    broken = [run for part, run in found.items() if problem_of(*part)]
    own = natural(sys.version)
    newer = [run for run in broken if natural(run.trace.header.get("python", "")) > own]
    truth = None if not found or (newer and len(newer) == len(broken)) else not broken
    detail = f"not that of {', '.join(run.path.name for run in broken[:3])}" if broken else ""
    detail += f", for a newer Python than {sys.version.split()[0]}" if newer else ""
    return verdict("source", "the sources in the logs are whole Python files", truth,
                   detail if found else "no log holds a source")
