"""Claims of READMEs -> what the logs beside them say: supported, contradicted, or not found.

Facts are those of groups: an arm, its cells, a folder of logs, and each list of runs in the README that the logs hold.
A claim is supported if a fact of its kind and statistic (of its arm, where the words say one) rounds or is cut to it,
contradicted if its kind and statistic are known and no fact agrees, and else not found: it may be about something that
is not here. Claims of one row of a table, or of one sentence, are about one thing: the group that most of them fit is
the one that the others have to fit. `claims.py` says which numbers are claims.
"""

import itertools
import math
import re
import statistics
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from runlogs.claims import COMPARED, RECORD, claims_of
from runlogs.judging import HARMLESS, below_target, versions, welch, what_differs
from runlogs.loading import natural, trial_numbers
from runlogs.parsing import parse_step_line, read_text

VERDICTS = {False: "contradicted", None: "not found", True: "supported"}
MAX_GROUPS = 40
MAX_PAIRS = 300
SPECIFIC = ("mean", "sd", "median", "min", "max", "range", "spread", "result")
BASELINE = re.compile(r"baseline|previous|prior\b|\bold\b|\bmaster\b|former|\bcontrol\b|reference|retim\w+|re-?r[ua]n",
                      re.I)
ELSEWHERE = re.compile(r"#\d\d+|\b(?:PR|pull) ?#?\d+|official|karpathy|another (?:run|record|machine|node|box|cluster)|earlier|elsewhere|cluster|separate|\b(?:on|an?) (?:single )?(?:G?[AH]\d00|GH200)|"
                       r"\b(?:record|WR) #?\d{1,3}(?![\d.])|original|\bablat|suggest|would|could|might|expect|\beval\b|no changes", re.I)
PAIRED = re.compile(r"welch|two[- ]sample|two[- ]sided|differ|faster|slower|\bvs\b|compar|improve", re.I)
PARTS = re.compile(r"\beach\b|\bper\b|\bevery\b|groups? of|\bparts?\b|\bhalf\b|mean[- ]of|\bsubset|\bfirst\b|\blast\b", re.I)
WHOLE = re.compile(r"these timings|\b(?:total|overall|net|wall-?clock)\b", re.I)
BARE = re.compile(r"(?:[-*+] )?[\w -]{3,40}: ?[+-]?[\d.]+ ?\w{0,7}")  # - train time: -1.04 s
WEIGHTS = {"n": 0.5, "steps": 0.5, "p": 0.5, "t": 0.5}


def verdict(kind, claim, truth, detail="", **more):
    """`truth` is True, False or None: not found."""
    word, claim = VERDICTS[truth], claim.strip()[:100]
    return {"kind": kind, "claim": claim, "verdict": word, "detail": detail, **more}


# -- facts


class Group:
    """Runs that a claim may be about, and their statistics. `real`: they are in the logs, not in the README alone."""

    def __init__(self, name, arm, losses, times, steps=(), step_times=(), rows=(), real=True, runs=None, folder=""):
        self.name, self.arm, self.real, self.runs, self.folder = name, arm, real, runs or {}, folder
        self.losses, self.times, self.steps = list(losses), [t for t in times if t is not None], sorted(set(steps))
        self.step_times, self.rows = [t for t in step_times if t is not None], rows
        self.n = max(len(self.losses), len(self.times))

    def numbers(self, kind):
        return {"loss": self.losses, "time": self.times, "step time": self.step_times, "steps": self.steps}.get(kind, [])

    def facts(self, kind, statistic, target=None):
        """Values that a claim of that kind and statistic may have."""
        if kind == "n":
            return [self.n]
        if kind in ("p", "t"):
            return self.tests(target)[kind]
        values = self.numbers(kind)
        found = self.known(kind, values)
        statistic = "run" if kind == "steps" else statistic
        if statistic and statistic != "result":
            return found.get(statistic, [])
        return found.get("any", [])

    def known(self, kind, values):
        """{statistic: values} of losses, times or steps."""
        if kind not in self.cache:
            self.cache[kind] = spread_of(values) if values else {}
        return self.cache[kind]

    @cached_property
    def cache(self):
        return {}

    @cached_property
    def validations(self):
        """Losses on the way, sorted."""
        return sorted(row["val_loss"] for rows in self.rows for row in rows if math.isfinite(row.get("val_loss", math.nan)))

    def tests(self, target):
        """{"p", "t"}: of the one-sample t-test against the target, and of track 3's test with a known sd."""
        if "tests" not in self.cache:
            self.cache["tests"] = tests_of(self.losses, target)
        return self.cache["tests"]


def spread_of(values):
    """{statistic: values} of a list of numbers; several where people mean several things."""
    values = sorted(values)
    found = {"mean": [statistics.fmean(values)], "median": [statistics.median(values)], "run": values,
             "min": values[:1], "max": values[-1:], "range": [values[0], values[-1]]}
    if len(values) > 1:
        sd = statistics.stdev(values)
        root = math.sqrt(len(values))
        found["sd"] = [statistics.pstdev(values), sd]
        found["spread"] = sorted([*found["sd"], sd / root, 1.96 * sd / root, (values[-1] - values[0]) / 2])
    found["any"] = sorted([*found["mean"], *found["median"], *values])
    return found


def tests_of(losses, target):
    """{"p", "t"} of the tests that the mean loss is below the target."""
    if len(losses) < 2 or target is None or not all(abs(loss - target) < 1 for loss in losses):
        return {"p": [], "t": []}
    z = (target - statistics.fmean(losses)) * math.sqrt(len(losses)) / 0.0013
    p, sd = below_target(losses, target), statistics.stdev(losses)
    t = (statistics.fmean(losses) - target) * math.sqrt(len(losses)) / sd if sd else None
    return {"p": sorted(p for p in (p, 0.5 * math.erfc(z / math.sqrt(2))) if p is not None),
            "t": sorted([t, -t]) if t is not None else []}


def run_of(sample):
    """Group of one run."""
    step_ms = trial_numbers(sample.rows)["step_avg_ms"]
    steps_s = step_ms / 1000 if step_ms else sample.time_s / sample.steps if sample.time_s and sample.steps else None
    return Group(f"run {sample.name or sample.run.path.name}", sample.arm, [sample.loss], [sample.time_s], [sample.steps],
                 [steps_s], [sample.rows])


def group_of(name, arm, samples, runs=None):
    """Group of samples; `runs` keeps the group of each."""
    runs = {} if runs is None else runs
    own = [runs.setdefault(id(sample), run_of(sample)) for sample in samples]
    folders = {sample.run.path.parent.name for sample in samples}
    return Group(name, arm, *([v for run in own for v in getattr(run, key)]
                              for key in ("losses", "times", "steps", "step_times", "rows")),
                 runs={run_stem(sample): run for sample, run in zip(samples, own, strict=True)},
                 folder=folders.pop() if len(folders) == 1 else "")


def run_stem(sample):
    """What a row of a table may call a run: its folder, or its log without ending."""
    path = sample.run.path
    return (path.parent.name if path.name == "log.txt" else path.name if path.is_dir() else path.stem).lower()


def groups_of(evidence):
    """Groups of an Evidence: cells, whole arms, folders, all runs; the same runs once."""
    found, runs = {}, {}

    def add(name, arm, samples):
        key = frozenset(map(id, samples))
        if samples and len(found) < MAX_GROUPS and key not in found:
            found[key] = group_of(name, arm, samples, runs)

    for arm in evidence.arms:
        add(arm.name, arm.name, arm.samples)
        folders = defaultdict(list)
        for cell in arm.cells:
            add(f"{arm.name}, {cell.label}", arm.name, cell.samples)
            for sample in cell.samples:
                folders[str(sample.run.path.parent), sample.steps].append(sample)
                folders[str(sample.run.path.parent), ""].append(sample)
        for (folder, steps), samples in folders.items():
            add(f"{Path(folder).name}{', step ' if steps else ''}{steps}", arm.name, samples)
    add("all runs", "", [sample for arm in evidence.arms for sample in arm.samples])
    return list(found.values())


class Pairs:
    """Differences, ratios and tests between groups."""

    def __init__(self, groups):
        self.pairs = list(itertools.islice(itertools.combinations([g for g in groups if g.real], 2), MAX_PAIRS))
        self.cache, self.all = {}, {}

    def facts(self, kind, statistic, about="", of=None):
        """Values over all pairs, or those of the groups `of`."""
        key = kind, about, None if of is None else tuple(map(id, of))
        if key not in self.all:
            pairs = [pair for pair in self.pairs if of is None or any(group in of for group in pair)]
            self.all[key] = sorted(value for a, b in pairs for value in self.of_pair(kind, about, a, b))
        return self.all[key]

    def of_pair(self, kind, about, a, b):
        key = kind, about, id(a), id(b)
        if key not in self.cache:
            self.cache[key] = self.made(kind, about, a, b)
        return self.cache[key]

    def made(self, kind, about, a, b):
        """Values of one pair."""
        if kind in ("p", "t"):
            return [v for name in ([about] if about else ["loss", "time"]) for v in welch_facts(a, b, name)[kind]]
        if kind == "percent":
            ratios = [x / y for name in ("time", "loss", "steps", "step time") for x, y in self.means(name, a, b) if x and y]
            return [100 * v for r in ratios for v in (r, 1 / r, r - 1, 1 - r, 1 / r - 1, 1 - 1 / r)] + ratios
        if kind == "n":
            return [b.n - a.n, a.n - b.n]
        return [v for x, y in self.means(kind, a, b) for v in (x - y, y - x)]

    def means(self, kind, a, b):
        """[(mean of a, mean of b)], [] where one has no such number."""
        x, y = a.numbers(kind), b.numbers(kind)
        return [(statistics.fmean(x), statistics.fmean(y))] if x and y else []


def welch_facts(a, b, name):
    """{"p", "t"} of Welch's test of two groups: one-sided either way and two-sided."""
    x, y = a.numbers(name), b.numbers(name)
    test = welch(x, y)
    if test is None:
        return {"p": [], "t": []}
    error = math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
    p, t = test["p_value"], test["difference"] / error if error else 0.0
    return {"p": [p, p / 2, 1 - p / 2], "t": [t, -t]}


# -- comparing


SLACK = {"loss": 4e-7, "time": 2e-5, "step time": 2e-7}  # of means and deviations that were taken in single precision


def agrees(claim, values):
    """Whether one of the sorted values is the number, rounded or cut to its digits; a rough one may be 1 off."""
    slack = SLACK.get(claim.kind, 0) + (0.51 * claim.digit if claim.statistic == "difference" else 0)  # of rounded means
    reach = 2 * claim.digit + slack + (0.04 * abs(claim.value) if claim.relation == "~" else 0)
    low, high = bisect_left(values, claim.value - reach), bisect_right(values, claim.value + reach)
    return any(close(claim.value, claim.digit, value, claim.relation, slack) for value in values[low:high][:5000])


def close(number, digit, value, relation, slack=0.0):
    """Whether a number as it is written stands for a value."""
    if relation == "~":
        return abs(number - value) <= max(1.01 * digit, 0.03 * abs(value) if digit > 0.001 * abs(value) else 0)
    cut = 0 <= abs(value) - abs(number) < digit and number * value >= 0
    return abs(number - value) <= 0.505 * digit + slack + 1e-12 * abs(value) or cut


def holds(claim, values):
    """Whether the claim holds for one of the values; of p < x it is enough that one is below."""
    if claim.relation == "<":
        return bool(values) and values[0] < claim.value
    if claim.relation == ">":
        return bool(values) and values[-1] > claim.value
    return agrees(claim, values)


# -- verdicts


class Judge:
    """Verdicts on the claims of one text."""

    def __init__(self, groups, target, home=""):
        self.groups, self.target, self.home = groups, target, home
        self.real = list(groups)
        self.pairs = Pairs(groups)
        self.lists = []

    def all(self, text):
        """Verdicts on all claims of a Text."""
        found = [self.step_line(line, number) for line, number in text.step_lines[:500]]
        for numbers in text.lists:
            found.append(self.list(numbers))
        self.sample = self.style_of(text.claims)
        self.subjects = self.subjects_of(text.claims)
        return found + [self.claim(claim) for claim in text.claims]

    # whose numbers they are

    def candidates(self, claim):
        """(groups that a claim may be about, why the words say so, whether it is about something else)."""
        if claim.label and (run := self.run_named(claim.label)):
            return [run], True
        section = "" if re.match(r"\W*(?:vs\b|versus|compared)", claim.section, re.I) else claim.section
        for words in (COMPARED.sub(" ", claim.subject), COMPARED.sub(" ", section)):
            groups = self.named(words)
            if groups:
                return groups, True
            arm = last_word(words, {"baseline": BASELINE, "record": RECORD})
            if arm:
                return [g for g in self.real if g.arm == arm or (arm == "baseline" and BASELINE.search(g.folder))], True
        if self.home:
            return [g for g in self.real if self.home in (g.folder, g.arm)] or self.real, False
        return self.real, False

    def run_named(self, label):
        """Group of the one run whose log a row's label names, by its beginning or with its ending."""
        name = re.sub(r"\\|\.(?:txt|log)$", "", label)
        if len(name) < 4:
            return None
        runs = {stem: run for group in self.real for stem, run in group.runs.items() if stem.startswith(name)}
        return runs.get(name) or (next(iter(runs.values())) if len(runs) == 1 else None)

    def named(self, words):
        """Groups whose folder, or one of whose logs, the words name."""
        folders = {g.folder for g in self.real if len(g.folder) > 2}
        said = [f for f in folders if re.search(rf"(?<![\w-]){re.escape(f)}(?![\w-])", words, re.I)]
        said = [f for f in said if not any(f != other and f in other for other in said)]
        return [g for g in self.real if any(g.folder == f or g.folder.startswith((f + "-", f + "_")) for f in said)]

    def subjects_of(self, claims):
        """{scope: the groups that most of its claims fit}."""
        scopes = defaultdict(list)
        for claim in claims:
            if claim.kind in WEIGHTS or claim.statistic in SPECIFIC:
                scopes[claim.scope].append(claim)
        found, self.best = {}, {}
        for scope, members in scopes.items():
            groups = self.candidates(members[0])[0] or self.real
            scores = {i: sum(weight_of(c) for c in members if self.fits(c, [g])) for i, g in enumerate(groups)}
            best = self.best[scope] = max(scores.values(), default=0)
            if best >= 1.5:
                found[scope] = [g for i, g in enumerate(groups) if scores[i] == best]
        self.zeros = {(c.scope[1], c.kind): c.scope for c in reversed(claims)
                      if c.statistic == "difference" and c.value == 0 and c.scope[0] == "row"}
        self.sizes = {scope: len(members) for scope, members in scopes.items()}
        return found

    def fits(self, claim, groups):
        """Whether a claim agrees with one of the groups."""
        return any(holds(claim, self.facts(claim, [group])) for group in groups)

    def facts(self, claim, groups):
        """Sorted values of groups that a claim may have; an sd with n is left out if the others are with n - 1."""
        found = [group.facts(claim.kind, claim.statistic, self.target) for group in groups]
        if claim.statistic == "sd" and self.sample:
            found = [values[-1:] for values in found]
        if len(found) == 1:
            return found[0]
        return sorted(value for values in found for value in around(claim, values))

    def style_of(self, claims):
        """Whether the deviations that a README claims are those with n - 1, as far as some are."""
        claims, self.sample = [c for c in claims if c.statistic == "sd"], True
        with_sample = sum(self.fits(c, self.real) for c in claims)
        self.sample = False
        return with_sample > 0.5 * sum(self.fits(c, self.real) for c in claims)

    # what is true

    def claim(self, claim):
        """Verdict on one claim."""
        truth, detail = self.truth(claim)
        name = " ".join(filter(None, (claim.kind, claim.statistic)))
        mark = {"=": "", "~": "≈ "}.get(claim.relation, claim.relation + " ")
        said = f"{claim.kind} {claim.relation if claim.relation != '~' else '≈'} " if claim.kind in "pnt" else mark
        return verdict(name, f"{said}{claim.text}", truth, detail, line=claim.line, quote=claim.quote)

    def truth(self, claim):
        """(True, False or None, why)."""
        if self.is_target(claim):
            return True, "the target"
        claim.statistic = claim.statistic if claim.statistic != "target" else ""
        if claim.statistic == "difference" or claim.kind == "percent":
            return self.difference(claim)
        groups, said = self.candidates(claim)
        subjects = self.subjects.get(claim.scope, [])
        strict = subjects and (claim.scope[0] != "words" or claim.kind == "n")
        if claim.kind in ("p", "t"):
            return self.test(claim, subjects if strict else groups, groups)
        pool = subjects if strict else groups
        if self.stranger(claim):
            return self.listed(claim) or (None, "its row fits no group of the logs")
        for group in pool:
            if holds(claim, self.facts(claim, [group])):
                return True, f"{name_of(claim)} of {group.name}"
        return self.unmatched(claim, pool, said, bool(subjects))

    def is_target(self, claim):
        """Whether a loss is the target; one that is called a mean is a mean, unless it is "below" the target."""
        called = claim.statistic in SPECIFIC and claim.relation == "="
        return claim.kind == "loss" and not called and self.target is not None and abs(claim.value - self.target) < 1e-9

    def stranger(self, claim):
        """Whether a row of a table has several numbers of which hardly one fits a group that the logs hold."""
        size = self.sizes.get(claim.scope, 0)
        return claim.scope[0] == "row" and size > 2 and \
            self.best.get(claim.scope, 0) < 0.25 * size and not self.candidates(claim)[1]

    def unmatched(self, claim, pool, said, resolved):
        """A claim that no group fits: about runs on the way, of a list, of something else, or false."""
        statistic = claim.statistic
        if claim.kind == "loss" and statistic in ("", "result") and claim.digit <= 1e-3 and any(agrees(claim, group.validations) for group in pool):
            return True, "a validation on the way"
        if claim.kind == "n" and claim.value == sum(g.n for g in self.real if g.name == "all runs"):
            return True, "all runs here"
        strict = resolved and claim.scope[0] == "row"
        if not strict and (listed := self.listed(claim)):
            return listed
        values = self.facts(claim, pool)
        if claim.scope[0] == "words" and (aside := self.aside(claim, not values)):
            return False, f"the list above gives {some(aside, claim)}"
        one = bool(claim.label) and len(pool) == 1 and pool[0].name.startswith("run ")
        known = claim.kind == "n" or statistic in SPECIFIC or (claim.kind == "steps" and claim.sure) or one
        if not values:
            return None, "no logs of that here" if said else "no number of that kind here"
        if not resolved and not one and (why := self.other(claim, said, pool)):
            return None, f"{why}; here: {some(values, claim)}"
        if not known or (not claim.sure and claim.kind != "n"):
            return (False if resolved and claim.scope[0] == "row" else None), f"here: {some(values, claim)}"
        return False, f"{name_of(claim)} here: {some(values, claim)}"

    def other(self, claim, said, pool):
        """Why a claim may be about runs that are not here, "" if nothing says so."""
        table = claim.scope[0] != "words"
        if ELSEWHERE.search(f"{claim.subject} {claim.intro}" if table else claim.quote) and not (self.home and claim.kind == "n"):
            return "perhaps of other runs"
        if claim.kind == "n" and PARTS.search(claim.around):
            return "perhaps of a part of the runs"
        if table and not said and self.sizes.get(claim.scope, 0) > 1:
            best = self.best.get(claim.scope, 0)
            return "its row fits no group of the logs" if best < 0.25 * self.sizes[claim.scope] else ""
        if claim.kind != "n" and claim.statistic not in ("", "result") and max((g.n for g in pool), default=0) < 2:
            return "one run says nothing of a mean"
        return ""

    def listed(self, claim):
        """Verdict on a claim that follows, or should, from a list in the README."""
        beside = claim.kind == "n" and claim.scope[0] == "words"
        lists = beside and self.above(claim) or self.lists
        for group in lists:
            if holds(claim, self.facts(claim, [group])):
                where = "runs that the README lists" if group.real else "the README's own list, whose runs are not here"
                return (True, where) if group.real else (None, f"follows from {where}")
        return None

    def above(self, claim):
        """Lists just above a claim, under the same heading or label."""
        return [g for g in self.lists if 0 <= claim.line - g.line <= 8 and g.section == claim.section]

    def aside(self, claim, absent):
        """What the README's own list just above a claim gives for it, if its runs are not here."""
        if claim.kind not in ("n", "loss", "time") or (claim.kind != "n" and claim.statistic not in ("mean", "sd")):
            return []
        near = [group for group in self.above(claim) if (absent or not group.real)
                and (claim.kind == "n" or group.numbers(claim.kind))]
        return self.facts(claim, near)

    def test(self, claim, groups, all_groups):
        """Verdict on a p or a t."""
        of = None if len(groups) == len(self.real) else groups
        single = self.facts(claim, groups)
        paired = self.pairs.facts(claim.kind, "", claim.about, of) if self.pairs.pairs else []
        words = f"{claim.quote} {claim.section}"
        table = claim.scope[0] in ("row", "column")
        if table and claim.about == "time":
            single = []
        elif table and claim.scope[0] == "row":
            paired = []
        elif re.search(r"one[- ]sample", claim.around, re.I) or not PAIRED.search(words) and claim.about != "time":
            paired = []
        values = sorted([*single, *paired])
        if holds(claim, values):
            return True, "the t-test of these logs" if holds(claim, single) else "Welch's test of two groups here"
        if listed := self.listed(claim):
            return listed
        if not values:
            return None, "no test of that kind can be made of the logs here"
        if re.search(r"rule|target|need|requir|must|criteri|alpha|threshold", claim.quote, re.I) and claim.relation == "<":
            return None, "a rule"
        if claim.scope not in self.subjects and (ELSEWHERE.search(claim.quote) or
                                                 (table and self.sizes.get(claim.scope, 0) > 2)):
            return None, f"here: {some(values, claim)}"
        return False, f"{claim.kind} here: {some(values, claim)}"

    def difference(self, claim):
        """Verdict on a difference of two groups, or a ratio."""
        pair = self.compared(claim)
        if claim.value == 0 and claim.scope[0] != "words" and not pair:
            return True, "of a group and itself"
        values = pair or self.pairs.facts(claim.kind, "difference")
        if agrees(claim, values):
            return True, "difference of two groups here"
        if not values:
            return None, "no two groups to compare here"
        columns = claim.scope[0] in ("column", "table") and claim.kind != "percent" and claim.sure
        if pair or self.headline(claim) or (columns and not ELSEWHERE.search(claim.subject)):
            return False, f"the difference is {some(values, claim)}"
        return None, f"differences here: {some(values, claim)}"

    def headline(self, claim):
        """Whether the words say that a difference in time is that of the whole record, and there are two arms."""
        arms = {group.arm for group in self.real} - {""}
        said = claim.kind == "time" and claim.scope[0] == "words" and WHOLE.search(claim.quote)
        said = said or (claim.kind in ("time", "loss") and BARE.fullmatch(claim.quote))
        return bool(said) and len(self.real) == 3 and arms == {"record", "baseline"} and not ELSEWHERE.search(claim.quote)

    def compared(self, claim):
        """Differences of a row's group and that of the row of its table which has 0 there; [] if one is not known."""
        if claim.scope[0] != "row" or claim.kind == "percent":
            return []
        zero = self.zeros.get((claim.scope[1], claim.kind), claim.scope)
        groups, others = self.subjects.get(claim.scope, []), self.subjects.get(zero, []) if zero != claim.scope else []
        return sorted(v for a in groups for b in others for v in self.pairs.of_pair(claim.kind, "", a, b))

    def step_line(self, line, number):
        """Verdict on a step line quoted from a log."""
        row = parse_step_line(re.sub(r"[,;.)]+(?=\s|$)", "", line))
        rows = [r for g in self.real for rows in g.rows for r in rows
                if r["step"] == row["step"] and r["iterations"] == row["iterations"]]
        there = any(r.get("val_loss") == row["val_loss"] for r in rows)
        return verdict("step line", line, there if rows else None, "" if there else "no log holds it", line=number)

    def list(self, numbers):
        """Verdict on a list: losses or times of the runs. Many of them in the logs and some not is a contradiction."""
        words, everything = numbers.words, self.real
        sorts = {"losses": (sorted({v for g in everything for v in g.losses}), 1.0),
                 "times": (sorted({v for g in everything for v in g.times}), 1.0)}
        sorts["times in ms"] = (sorts["times"][0], 1e-3)
        hits = {sort: [w for w in words if word_in(w, *of)] for sort, of in sorts.items()}
        sort = max(hits, key=lambda sort: len(hits[sort]))
        missing = [word for word in words if word not in set(hits[sort])]
        most = len(missing) <= max(1, len(words) / 4) and (len(words) > 3 or sort != "losses")
        truth = True if not missing else False if most and hits[sort] else None
        self.keep(numbers, sort if hits[sort] else self.sort_of(numbers), truth)
        detail = f"{len(words) - len(missing)} of {len(words)} are in the logs"
        detail += f", not {', '.join(missing[:5])}" if missing else ""
        return verdict(f"list of {sort if hits[sort] else 'numbers'}", f"[{', '.join(words[:4])}, ...]", truth, detail,
                       line=numbers.line)

    def sort_of(self, numbers):
        """Which numbers a list without a run of these logs holds."""
        value = float(numbers.words[0])
        if self.target and abs(value - self.target) < 0.3 * self.target:
            return "losses"
        return "times in ms" if value > 2000 else "times"

    def keep(self, numbers, sort, real):
        """A list is a group too: its mean and so on may be claimed."""
        values = [float(word) * (1e-3 if sort == "times in ms" else 1) for word in numbers.words]
        losses, times = (values, []) if sort == "losses" else ([], values)
        group = Group("the list", "", losses, times, real=bool(real))
        group.line, group.section = numbers.line + numbers.lines, numbers.above
        self.lists.append(group)


def weight_of(claim):
    """How much it says if a claim fits a group: small numbers and spreads may by chance."""
    return WEIGHTS.get(claim.kind, 0.5 if claim.statistic in ("sd", "spread") else 1)


def last_word(text, patterns):
    """The name of the pattern that is found last in a text, "" if none is."""
    ends = {name: max((m.end() for m in pattern.finditer(text)), default=-1) for name, pattern in patterns.items()}
    name = max(ends, key=ends.get)
    return name if ends[name] >= 0 else ""


def name_of(claim):
    return " ".join(filter(None, (claim.statistic, claim.kind)))


def some(values, claim, most=4):
    """The values nearest to a claim, as words."""
    values = sorted(set(around(claim, values)), key=lambda value: abs(value - claim.value))[:most]
    return ", ".join(f"{value:.6g}" for value in values)


def around(claim, values, most=4):
    """Those of the sorted values that are nearest to a claim."""
    at = bisect_left(values, claim.value)
    return values[max(0, at - most):at + most]


def word_in(word, values, scale):
    """Whether a number of a list is one of the sorted values."""
    number, digit = float(word) * scale, 10.0 ** -len(word.partition(".")[2]) * scale
    low, high = bisect_left(values, number - 2 * digit), bisect_right(values, number + 2 * digit)
    return any(close(number, digit, value, "=") for value in values[low:high][:1000])


def check_text(text, groups, target, home=""):
    """Verdicts on all claims of a README, of the folder `home` if it is one inside the record; the same one once."""
    losses = [loss for group in groups for loss in group.losses] + ([target] if target is not None else [])
    times = [time for group in groups for time in group.times]
    ranges = {"loss": (0.97 * min(losses), 1.03 * max(losses)) if losses else (0, 0),
              "time": (0.8 * min(times), 1.25 * max(times)) if times else (0, 0)}
    claims = claims_of(text, ranges)
    found = Judge(groups, target, home).all(claims)
    if claims.cut:
        found.append(verdict("text", "the rest of this text", None, LONG, line=0))
    return list({(c["kind"], c["claim"], c["verdict"], c["detail"]): c for c in reversed(found)}.values())[::-1]


# -- a folder

MAX_TEXT = 1_000_000  # characters of all texts of a folder
LONG = "longer than what is checked"
NAMES = re.compile(r"(?:readme|statistics|summary|pr_summary)\.md", re.I)


def texts_of(folder):
    """README.md, statistics.md and summary.md of a record folder and of the folders in it, the README first."""
    paths = [path for pattern in ("*.md", "*.MD", "*/*.md") for path in sorted(Path(folder).glob(pattern))[:200]]
    paths = [path for path in dict.fromkeys(paths) if NAMES.fullmatch(path.name) and path.is_file()]
    return sorted(paths, key=lambda path: (len(path.parts), path.name.lower() != "readme.md"))[:20]


def check_folder(folder, evidence, target):
    """Verdicts on the claims of all texts of a record folder; each says its file."""
    groups, found, room = groups_of(evidence), [], MAX_TEXT
    for path in texts_of(folder):
        text = read_text(path)
        home = path.parent.name if path.parent != Path(folder) else ""
        claims = check_text(text[:room], groups, target, home)
        claims += [verdict("text", "the rest of this text", None, LONG, line=0)] if len(text) > room else []
        found += [{**claim, "file": str(path.relative_to(folder))} for claim in claims]
        room = max(0, room - len(text))
    return found


def check_runs(evidence, samples):
    """Verdicts on the runs themselves: their versions and sources, that they are complete."""
    runs = list({id(sample.run): sample.run for sample in samples}.values())
    complete = verdict("runs", "complete runs", bool(samples), f"{len(samples)} complete")
    dropped = [why.partition(": ") for arm in evidence.arms for why in arm.dropped][:20]
    return [check_versions(samples), check_sources(runs), complete,
            *(verdict("runs", name, None, why) for name, _, why in dropped)]


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
    from runlogs.sources import parse_source

    found = {text: run for run in runs for text in run.trace.parts.values()}
    broken = [run for text, run in found.items() if parse_source(text).problem]
    own = natural(sys.version)
    newer = [run for run in broken if natural(run.trace.header.get("python", "")) > own]
    truth = None if not found or (newer and len(newer) == len(broken)) else not broken
    detail = f"not that of {', '.join(run.path.name for run in broken[:3])}" if broken else ""
    detail += f", for a newer Python than {sys.version.split()[0]}" if newer else ""
    return verdict("source", "the sources in the logs are whole Python files", truth,
                   detail if found else "no log holds a source")
