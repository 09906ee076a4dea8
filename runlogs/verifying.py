"""Claims of READMEs -> what the logs beside them say: supported, contradicted, or not found.

A claim is supported if a fact of its kind and statistic (and of its arm, where the words say one) rounds or is cut to
it, contradicted if its kind and statistic are known and no fact agrees, and else not found: it may be about something
that is not here. Claims of one row of a table, or one sentence, are about one thing: the group that most of them fit is
the one that the others have to fit. A row that fits no group, or is said to be of other runs, is not found.
"""

import re
import sys
from bisect import bisect_left, bisect_right
from collections import defaultdict
from pathlib import Path

from runlogs.claims import claims_of
from runlogs.facts import Group, Pairs, agrees, around, close, groups_of, holds, some
from runlogs.judging import versions, what_differs
from runlogs.loading import natural
from runlogs.parsing import parse_step_line, read_text
from runlogs.wording import COMPARED, COUNTED, RECORD, label_statistic

VERDICTS = {False: "contradicted", None: "not found", True: "supported"}
KNOWN = ("mean", "sd", "median", "min", "max", "range", "interval", "spread", "result")
MAX_RUNS = 500  # that rows of tables are compared with
OF_RUN = ("loss", "time", "step time", "steps")
BASELINE = re.compile(r"baseline|previous|prior\b|\bold\b|\bmaster\b|former|\bcontrol\b|reference|retim\w+|re-?r[ua]n",
                      re.I)
ELSEWHERE = re.compile(
    r"#\d\d+|\b(?:PR|pull) ?#?\d+|\b(?:record|WR) #?\d{1,3}(?!\.?\d)|official|karpathy|original|earlier|elsewhere|"
    r"separate|cluster|another (?:run|record|machine|node|box)|\b(?:on|an?) (?:single )?G?[AH]\d00|\bablat|\beval\b|"
    r"suggest|would|could|might|expect|no changes", re.I)
PAIRED = re.compile(r"welch|two[- ]sample|two[- ]sided|differ|faster|slower|\bvs\b|compar|improve", re.I)
WELCH = re.compile(r"welch|two[- ]sample|differ", re.I)
ONE_SAMPLE = re.compile(r"one[- ]sample", re.I)
PARTS = re.compile(r"\b(?:each|per|every|parts?|half|subset\w*|first|last)\b|groups? of|mean[- ]of", re.I)
RULE = re.compile(r"rule|target|need|requir|must|criteri|alpha|threshold", re.I)
KNOWN_SD = re.compile(r"0\.0013|track[ _]3|\bz[ -]|known sd", re.I)  # track 3's test
WHOLE = re.compile(r"these timings|\b(?:total|overall|net|wall-?(?:clock|time))\b", re.I)
BARE = re.compile(r"(?:[-*+] )?[\w -]{3,40}: ?[+-]?[\d.]+ ?\w{0,7}")  # - train time: -1.04 s
# Words of a difference of whole runs, and those of a part of them or of other ones
OF_RUNS = re.compile(
    r"\b(?:mean|average\w*|baseline|record|this (?:PR|run|change|submission)|train\w* time|loss|runs?)\b|"
    r"%\) (?:faster|slower)|\b(?:is|runs?|are) [~≈]?[\d.]+ ?\w{0,7} ?(?:\([^()]{0,12}\) )?(?:faster|slower)", re.I)
OF_PART = re.compile(
    r"\b(?:another|further|kernels?|stages?|layers?|forward|backward|compil\w+|fus\w+|freez\w+|each|per|steps? time|"
    r"due to|of which|from [a-z]|if|when|by (?!about |around )[a-z]+ing)\b", re.I)
ENOUGH = 1.5  # weight of the claims of a row that make it one of a group
OWN_LIST = "the README's own list, whose runs are not here"


def verdict(kind, claim, truth, detail="", **more):
    """`truth` is True, False or None: not found."""
    word, claim = VERDICTS[truth], claim.strip()[:100]
    return {"kind": kind, "claim": claim, "verdict": word, "detail": detail, **more}


class Judge:
    """Verdicts on the claims of one text. `home`: the folder inside the record that it is of."""

    def __init__(self, groups, target, home=""):
        self.groups, self.target, self.home = groups, target, home
        self.pairs, self.lists = Pairs(groups), []
        self.two = len(groups) == 3 and {g.arm for g in groups} == {"record", "baseline", ""}
        self.sample = self.known_sd = False
        self.subjects, self.weights, self.sizes, self.zeros = {}, {}, {}, {}
        self.each = list({id(run): run for group in groups for run in group.each}.values())[:MAX_RUNS]
        self.logs = defaultdict(dict)  # of one name there may be one in each arm
        for log, run in (item for group in groups for item in group.runs.items()):
            self.logs[log] |= {id(run): run} if len(log) > 3 else {}
        self.seeds = defaultdict(list)
        for run in self.each:
            self.seeds[run.seed].append(run)
        self.rows = {}  # of tables whose rows are runs: {scope: its claims}

    def all(self, text):
        """Verdicts on all claims of a Text."""
        self.known_sd = any(KNOWN_SD.search(claim.quote) for claim in text.claims)
        found = [self.step_line(line, number) for line, number in text.step_lines[:500]]
        found += [self.list(numbers) for numbers in text.lists]
        self.sample = self.counts_with_sample(text.claims)
        self.find_subjects(text.claims)
        self.find_rows(text.claims)
        return found + [self.claim(claim) for claim in text.claims]

    def claim(self, claim):
        """Verdict on one claim."""
        truth, detail = self.truth(claim)
        relation = "≈" if claim.relation == "~" else claim.relation
        said = f"{claim.kind} {relation} " if claim.kind in "pntd" else f"{relation} " if relation != "=" else ""
        return verdict(said_of(claim), f"{said}{claim.text}", truth, detail, line=claim.line, quote=claim.quote)

    # -- whose numbers they are

    def candidates(self, claim):
        """(groups that a claim may be about, whether the words say so)."""
        run = self.run_named(claim.label)
        if run:
            return [run], True
        if claim.change and self.two:
            arm = "baseline" if claim.change == "from" else "record"
            return [g for g in self.groups if g.arm == arm], True
        section = "" if re.match(r"\W*(?:vs\b|versus|compared)", claim.section, re.I) else claim.section
        for words in (claim.subject, section):
            words = COMPARED.sub(" ", words)
            if groups := self.named(words):
                return groups, True
            if arm := last_word(words, {"baseline": BASELINE, "record": RECORD}):
                return [g for g in self.groups if arm in (g.arm, role_of(g.folder))], True
        home = [g for g in self.groups if self.home and self.home in (g.folder, g.arm)]
        return home or self.groups, False

    def run_named(self, label):
        """Group of the one run whose log a row's label names, by its beginning or with its ending."""
        name = re.sub(r"\\|\.(?:txt|log)$", "", label)
        if len(name) < 4:
            return None
        runs = [run for log, found in self.logs.items() if log.startswith(name) for run in found.values()]
        runs = list(self.logs[name].values()) if name in self.logs else runs
        return runs[0] if len(runs) == 1 else None

    def named(self, words):
        """Groups whose folder the words name, the longest name that they hold."""
        folders = {group.folder for group in self.groups if len(group.folder) > 2}
        said = [f for f in folders if f in words and re.search(rf"(?<![\w-]){re.escape(f)}(?![\w-])", words)]
        said = [f for f in said if not any(f != other and f in other for other in said)]
        return [g for g in self.groups if any(g.folder == f or g.folder.startswith((f + "-", f + "_")) for f in said)]

    def find_subjects(self, claims):
        """The groups that most claims of each scope fit, and how many there are."""
        scopes = defaultdict(list)
        for claim in claims:
            if claim.kind in COUNTED or claim.statistic in KNOWN:
                scopes[claim.scope].append(claim)
        for scope, members in scopes.items():
            groups = self.candidates(members[0])[0] or self.groups
            weights = [sum(weight_of(c) for c in members if holds(c, self.facts(c, [group]))) for group in groups]
            best = self.weights[scope] = max(weights, default=0)
            if best >= ENOUGH:
                self.subjects[scope] = [g for g, weight in zip(groups, weights, strict=True) if weight == best]
        self.sizes = {scope: len(members) for scope, members in scopes.items()}
        self.zeros = {(c.scope[1], c.kind): c.scope for c in reversed(claims)
                      if c.statistic == "difference" and c.value == 0 and c.scope[0] == "row"}

    def find_rows(self, claims):
        """The rows of tables of which at least two, and half of those with two numbers, are those of one run."""
        rows, tables = defaultdict(list), defaultdict(list)
        for claim in claims:
            if claim.scope[0] == "row" and claim.kind in OF_RUN and claim.statistic in ("", "result"):
                rows[claim.scope].append(claim)
        for scope, members in rows.items():
            if {"loss", "time"} & {c.kind for c in members} and (len(members) > 1 or self.runs_called(members[0])):
                tables[scope[1]].append(scope)
        for scopes in tables.values():
            fitting = [scope for scope in scopes if self.runs_with(rows[scope], self.each)]
            if len(fitting) >= max(2, len(scopes) / 2):
                self.rows |= {scope: rows[scope] for scope in scopes if not self.is_summary(rows[scope])}

    def is_summary(self, row):
        """Whether all numbers of a row are means of one group."""
        groups = (group for group in self.groups if group.n > 1)
        return any(all(agrees(c, group.facts(c.kind, "run" if c.kind == "steps" else "mean")) for c in row)
                   for group in groups)

    def runs_called(self, claim):
        """Runs whose log or seed a row of a table names."""
        names = {re.sub(r"\\|\.(?:txt|log)\b.*$", "", cell) for cell in claim.cells}
        called = [run for name in sorted(names & self.logs.keys()) for run in self.logs[name].values()]
        return called or self.seeds.get(claim.seed or "none", [])

    def runs_with(self, claims, runs):
        """Those of the runs that have all numbers of some claims."""
        return [run for run in runs if all(agrees(c, run.facts(c.kind, "", self.target)) for c in claims)]

    def of_run(self, claim):
        """Verdict on a number in a row of a run, by its log, seed or other numbers; None if they are of none."""
        called = self.runs_called(claim)
        others = [other for other in self.rows.get(claim.scope, []) if other is not claim]
        if claim.scope not in self.rows or not (called or {"loss", "time"} & {other.kind for other in others}):
            return None
        runs = self.runs_with(others, called or self.each) or called
        if not runs:
            return None
        if found := self.runs_with([claim], runs):
            return True, f"{name_of(claim)} of {found[0].name}"
        values = sorted(value for run in runs for value in run.facts(claim.kind, "", self.target))
        return (False, f"the row is of {runs[0].name}, which has {some(values, claim)}") if values else None

    def stranger(self, claim):
        """Whether a row of a table has several numbers of which hardly one fits a group that the logs hold."""
        size, weight = self.sizes.get(claim.scope, 0), self.weights.get(claim.scope, 0)
        return claim.scope[0] == "row" and size > 2 and weight < 0.25 * size and not self.candidates(claim)[1]

    # -- facts

    def facts(self, claim, groups):
        """Sorted values of groups that a claim may have."""
        found = [group.facts(claim.kind, claim.statistic, self.target) for group in groups]
        if claim.statistic == "sd" and self.sample:
            found = [values[-1:] for values in found]
        if claim.kind == "p" and self.known_sd:
            found += [group.facts("z", "", self.target) for group in groups]
        return found[0] if len(found) == 1 else sorted(value for values in found for value in around(claim, values))

    def counts_with_sample(self, claims):
        """Whether the deviations that a text claims are those with n - 1, as far as they can be found."""
        claims, fits = [claim for claim in claims if claim.statistic == "sd"], {}
        for self.sample in (True, False):
            fits[self.sample] = sum(holds(c, self.facts(c, [g])) for c in claims for g in self.groups)
        return fits[True] > 0.5 * fits[False]

    # -- what is true

    def truth(self, claim):
        """(True, False or None, why)."""
        if self.is_target(claim):
            return True, "the target"
        claim.statistic = claim.statistic if claim.statistic != "target" else ""
        if claim.statistic == "difference" or claim.kind == "percent":
            return self.difference(claim)
        groups, said = self.candidates(claim)
        subjects = self.subjects.get(claim.scope, [])
        pool = subjects if subjects and (claim.scope[0] != "words" or claim.kind == "n") else groups
        if claim.kind in ("p", "t", "d"):
            return self.test(claim, pool)
        if claim.statistic == "interval" and agrees(claim, self.pairs.facts("interval", claim.kind)):
            return True, "interval of a difference"
        if found := self.of_run(claim) if claim.kind in OF_RUN else None:
            return found
        if self.stranger(claim):
            return self.listed(claim) or (None, "its row fits no group of the logs")
        pool = pool if claim.every is None else all_of(claim.every, pool)
        fitting = next((group for group in pool if holds(claim, self.facts(claim, [group]))), None)
        if fitting:
            return True, f"{name_of(claim)} of {fitting.name}"
        return self.elsewhere(claim, pool, bool(subjects)) or self.unmatched(claim, pool, said, bool(subjects))

    def is_target(self, claim):
        """Whether a loss is the target; one that is called a mean is a mean, unless it is "below" the target."""
        called = claim.statistic in KNOWN and (claim.relation == "=" or claim.every is not None)
        return claim.kind == "loss" and not called and self.target is not None and abs(claim.value - self.target) < 1e-9

    def elsewhere(self, claim, pool, resolved):
        """Verdict on a claim that no group fits, but a validation on the way, the sum of all runs, or a list."""
        loss = claim.kind == "loss" and claim.statistic in ("", "result") and claim.digit <= 1e-3
        if loss and any(agrees(claim, group.validations) for group in pool):
            return True, "a validation on the way"
        if claim.kind == "n" and claim.value == max((group.n for group in self.groups), default=0):
            return True, "all runs here"
        return None if resolved and claim.scope[0] == "row" else self.listed(claim)

    def unmatched(self, claim, pool, said, resolved):
        """Verdict on a claim that nothing here fits: false, if it is known what it is and of which runs."""
        values = self.facts(claim, pool)
        if claim.scope[0] == "words" and (beside := self.beside(claim, not values)):
            return False, f"the list above gives {some(beside, claim)}"
        if not values:
            return None, "no logs of that here" if said else "no number of that kind here"
        if claim.kind == "n" and claim.value > 1 == values[-1]:
            return None, "one log is here, perhaps of that many runs"
        run = len(pool) == 1 and pool[0].name.startswith("run ")
        if not resolved and not run and (why := self.excuse(claim, said, pool)):
            return None, f"{why}; here: {some(values, claim)}"
        known = run or claim.kind == "n" or (claim.sure and (claim.statistic in KNOWN or claim.kind == "steps"))
        if known or (resolved and claim.scope[0] == "row"):
            return False, f"{name_of(claim)} here: {some(values, claim)}"
        return None, f"here: {some(values, claim)}"

    def excuse(self, claim, said, pool):
        """Why a claim may be about runs that are not here, "" if nothing says so."""
        table, size = claim.scope[0] != "words", self.sizes.get(claim.scope, 0)
        words = f"{claim.subject} {claim.intro}" if table else claim.quote
        if ELSEWHERE.search(words) and not (self.home and claim.kind == "n"):
            return "perhaps of other runs"
        if claim.kind == "n":
            return "perhaps of a part of the runs" if PARTS.search(claim.around) else ""
        if table and not said and not self.home and size > 1 and self.weights.get(claim.scope, 0) < 0.25 * size:
            return "its row fits no group of the logs"
        alone = claim.statistic not in ("", "result") and max((group.n for group in pool), default=0) < 2
        return "one run says nothing of a mean" if alone else ""

    # -- lists in the README

    def listed(self, claim):
        """Verdict on a claim that follows from a list in the README, None without one; an n has to be that above it."""
        lists = self.above(claim) if claim.kind == "n" and claim.scope[0] == "words" else []
        group = next((group for group in lists or self.lists if holds(claim, self.facts(claim, [group]))), None)
        if group is None:
            return None
        return (True, "runs that the README lists") if group.real else (None, f"follows from {OWN_LIST}")

    def above(self, claim):
        """Lists just above a claim, under the same heading or label."""
        return [group for group in self.lists if 0 <= claim.line - group.line <= 12 and group.section == claim.section]

    def beside(self, claim, absent):
        """What lists just above a claim give for it, if their runs are not here."""
        if claim.kind not in ("n", "p") and not (claim.kind in ("loss", "time") and claim.statistic in ("mean", "sd")):
            return []
        lists = [group for group in self.above(claim) if absent or not group.real]
        return self.facts(claim, [group for group in lists if claim.kind in ("n", "p") or group.numbers(claim.kind)])

    def list(self, numbers):
        """Verdict on a list: losses or times of the runs. Most of them in the logs and some not is a contradiction."""
        words = numbers.words
        losses, times = (sorted({v for g in self.groups for v in g.numbers(kind)}) for kind in ("loss", "time"))
        known = {"losses": (losses, 1.0), "times": (times, 1.0), "times in ms": (times, 1e-3)}
        hits = {name: {word for word in words if is_one_of(word, *of)} for name, of in known.items()}
        name = max(hits, key=lambda name: len(hits[name]))
        missing = [word for word in words if word not in hits[name]]
        few = len(missing) <= max(1, len(words) / 4) and (len(words) > 3 or name != "losses")
        truth = True if not missing else False if few and hits[name] else None
        self.keep(numbers, name if hits[name] else self.name_of_list(numbers), bool(truth))
        detail = f"{len(words) - len(missing)} of {len(words)} are in the logs"
        detail += f", not {', '.join(missing[:5])}" if missing else ""
        return verdict(f"list of {name if hits[name] else 'numbers'}", f"[{', '.join(words[:4])}, ...]", truth, detail,
                       line=numbers.line)

    def name_of_list(self, numbers):
        """What a list without a run of these logs is of."""
        value = float(numbers.words[0])
        if self.target and abs(value - self.target) < 0.3 * self.target:
            return "losses"
        return "times in ms" if value > 2000 else "times"

    def keep(self, numbers, name, real):
        """A list is a group too: its mean and so on may be claimed."""
        values = [float(word) * (1e-3 if name == "times in ms" else 1) for word in numbers.words]
        group = Group("the list", "", *((values, []) if name == "losses" else ([], values)), real=real)
        group.line, group.section = numbers.line + numbers.lines, numbers.section
        self.lists.append(group)

    # -- two groups

    def test(self, claim, groups):
        """Verdict on a p or a t."""
        table = claim.scope[0] in ("row", "column")
        values = self.tests(claim, groups, table)
        if holds(claim, values):
            one = holds(claim, self.facts(claim, groups))
            return True, "the t-test of these logs" if one else "Welch's test of two groups here"
        if listed := self.listed(claim):
            return listed
        beside = self.beside(claim, True) if not values and claim.relation == "=" else []
        if beside and claim.kind == "p" and claim.scope[0] == "words":
            return False, f"the list above gives {some(beside, claim)}"
        if not values:
            against = f"the target {self.target:g}, --target names another" if self.target is not None else "no target"
            return None, f"no test of that kind can be made of the logs here ({against})"
        unsaid = claim.relation == "=" and claim.scope[0] == "words" and not ONE_SAMPLE.search(claim.quote)
        if unsaid and agrees(claim, self.pairs.facts(claim.kind)):
            return None, f"it would be of Welch's test of two groups; {claim.kind} here: {some(values, claim)}"
        if claim.relation == "<" and RULE.search(claim.quote):
            return None, "a rule"
        strange = ELSEWHERE.search(claim.quote) or (table and self.sizes.get(claim.scope, 0) > 2)
        truth = None if strange and claim.scope not in self.subjects else False
        return truth, f"{claim.kind} here: {some(values, claim)}"

    def tests(self, claim, groups, table):
        """Values of the tests that a p or t may be of: of a column of times two groups', of a row its group's."""
        welch = claim.kind == "d" or (table and WELCH.search(claim.around))
        single = [] if welch or (table and claim.about == "time") else self.facts(claim, groups)
        of = None if len(groups) == len(self.groups) else groups
        two = PAIRED.search(f"{claim.quote} {claim.section}") and not ONE_SAMPLE.search(claim.around)
        two = welch or claim.about == "time" or (two and claim.scope[0] != "row")
        return sorted([*single, *(self.pairs.facts(claim.kind, claim.about, of) if two else [])])

    def difference(self, claim):
        """Verdict on a difference of two groups, or a ratio."""
        pair = self.compared(claim)
        values = pair or self.pairs.facts("ratio" if claim.text.endswith("x") else claim.kind)
        if claim.value == 0 and claim.scope[0] != "words" and not pair:
            return True, "of a group and itself"
        if agrees(claim, values):
            return True, "difference of two groups here"
        if agrees(claim, self.pairs.facts("interval", claim.kind)):
            return True, "interval of a difference"
        if not values:
            return None, "no two groups to compare here"
        column = claim.scope[0] in ("column", "table") and claim.kind != "percent" and claim.sure
        row = claim.scope[0] == "row" and label_statistic(claim.label) == "difference" and self.two
        if pair or row or self.is_whole(claim) or (column and not ELSEWHERE.search(claim.subject)):
            return False, f"the difference is {some(values, claim)}"
        return None, f"differences here: {some(values, claim)}"

    def is_whole(self, claim):
        """Whether the words say that a difference is that of the record and the baseline, and each is one group."""
        said = claim.kind == "time" and WHOLE.search(claim.quote)
        said = said or (claim.kind in ("time", "loss") and BARE.fullmatch(claim.quote))
        runs = OF_RUNS.search(claim.quote) and not OF_PART.search(claim.quote)
        said = said or (runs and claim.kind in ("time", "loss", "percent"))
        return bool(said) and self.two and claim.scope[0] == "words" and not ELSEWHERE.search(claim.quote)

    def compared(self, claim):
        """Differences of a row's group and that of the row of its table which has 0 there; [] if one is not known."""
        zero = self.zeros.get((claim.scope[1], claim.kind))
        if claim.scope[0] != "row" or claim.kind == "percent" or zero in (None, claim.scope):
            return []
        groups, others = self.subjects.get(claim.scope, []), self.subjects.get(zero, [])
        return sorted(v for a in groups for b in others for v in self.pairs.of_pair(claim.kind, a, b))

    def step_line(self, line, number):
        """Verdict on a step line quoted from a log."""
        row = parse_step_line(re.sub(r"[,;.)]+(?=\s|$)", "", line))
        rows = [r for g in self.groups for rows in g.rows for r in rows
                if r["step"] == row["step"] and r.get("iterations") == row["iterations"]]
        there = any(r.get("val_loss") == row["val_loss"] for r in rows)
        return verdict("step line", line, there if rows else None, "" if there else "no log holds it", line=number)


def all_of(count, groups):
    """Those of the groups that may be "all 8 runs" (a count of 0: "all runs"): as many, else the arms."""
    return [g for g in groups if g.n == count] or [g for g in groups if g.name == g.arm] or groups


def weight_of(claim):
    """How much it says if a claim fits a group: small numbers and spreads may by chance."""
    return 0.5 if claim.kind in COUNTED or claim.statistic in ("sd", "spread") else 1


def last_word(text, patterns):
    """The name of the pattern that is found last in a text, "" if none is."""
    ends = {name: max((m.end() for m in pattern.finditer(text)), default=-1) for name, pattern in patterns.items()}
    name = max(ends, key=ends.get)
    return name if ends[name] >= 0 else ""


def role_of(folder):
    """The arm that the name of a folder says."""
    return "baseline" if BASELINE.search(folder) else ""


def name_of(claim):
    return " ".join(filter(None, (claim.statistic, claim.kind)))


def said_of(claim):
    return " ".join(filter(None, (claim.kind, claim.statistic)))


def is_one_of(word, values, scale):
    """Whether a number of a list is one of the sorted values."""
    number, digit = float(word) * scale, 10.0 ** -len(word.partition(".")[2]) * scale
    low, high = bisect_left(values, number - 2 * digit), bisect_right(values, number + 2 * digit)
    return any(close(number, digit, value) for value in values[low:high][:1000])


def check_text(text, groups, target, home=""):
    """Verdicts on all claims of a README, of the folder `home` if it is one inside the record; the same one once."""
    claims = claims_of(text, ranges_of(groups, target))
    found = Judge(groups, target, home).all(claims)
    found += [verdict("text", "the rest of this text", None, LONG, line=0)] if claims.cut else []
    return list({(c["kind"], c["claim"], c["verdict"], c["detail"]): c for c in reversed(found)}.values())[::-1]


def ranges_of(groups, target):
    """{"loss", "time": (low, high)} around those of the runs, and the target."""
    losses = [loss for group in groups for loss in group.losses] + ([target] if target is not None else [])
    times = [time for group in groups for time in group.times]
    return {"loss": (0.97 * min(losses), 1.03 * max(losses)) if losses else (0, 0),
            "time": (0.8 * min(times), 1.25 * max(times)) if times else (0, 0)}


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
    """One code version, as arms.py tells them apart, in each folder of logs."""
    folders, mixed = {}, []
    for sample in samples:
        folders.setdefault(str(sample.run.path.parent), []).append(sample)
    for name, group in folders.items():
        first, *others = [found[0].run for found in versions(group).values() if found[0].code] or [None]
        words = list(dict.fromkeys(what_differs(first, run) for run in others))
        mixed += [f"{name}: {len(others) + 1} versions: {'; '.join(words[:3])}"] if others else []
    return verdict("code", "one code version in each group", not mixed if samples else None, "; ".join(mixed))


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
