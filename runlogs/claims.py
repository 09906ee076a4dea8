"""Text of a README -> the claims in it: numbers that are about results, and what the words around say each of them is."""

import re
from bisect import bisect_right
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import accumulate

MAX_CLAIMS = 3000  # of one text
MAX_NUMBERS = 20_000  # of one text that are looked at
MAX_LISTS = 200
MAX_LINE = 20_000  # characters of a line that are looked at
UNITS = {"ms": 1e-3, "s": 1, "sec": 1, "secs": 1, "second": 1, "seconds": 1, "min": 60, "mins": 60, "minute": 60,
         "minutes": 60, "h": 3600, "hours": 3600}
NUMBER = re.compile(r"(?<![\w.#])(?<!\w[/-])(?<!\w[’'])([+-]?\d+(?:[.,]\d+)*(?:e[+-]?\d{1,3})?|[+-]?\.\d+)"
                    r"(\s?-?(?:%|[A-Za-zµ]+(?:/[A-Za-z]+)?)?)", re.ASCII)
STEP_LINE = re.compile(r"step:\d{1,15}/\d{1,15} val_loss:\d{1,9}\.\d{1,15}[^\n`|]{0,300}", re.ASCII)
LIST = re.compile(r"\[([\s\d.,e+ms-]{8,60000})\]")


NOWHERE = {"loss": (0, 0), "time": (0, 0)}
HEADER = re.compile(r"\S\s{2,}\S.{0,500}?\S\s{2,}\S")
LISTED = re.compile(r"loss|acc|val|time|timing|runs|results|second", re.I)


@dataclass
class Claim:
    """One number and what is said of it. `kind`: loss, time, step time, n, steps, p, t, percent. `statistic`: mean, sd,
    spread (after ±), median, min, max, range, run, target, difference, or "". `arms`: the words for whose it is."""

    kind: str
    statistic: str
    text: str  # as it is written
    value: float  # seconds for times
    digit: float  # what one more in its last digit is worth
    relation: str = "="
    about: str = ""  # of p and t: loss or time
    subject: str = ""  # words that may name an arm or a log
    section: str = ""  # the heading or label above
    intro: str = ""  # of a table: the sentences before it
    scope: tuple = ()  # claims of one scope are about one thing
    sure: bool = False  # in a table, or called by its name: it is what it is taken for
    line: int = 0
    quote: str = ""
    around: str = ""  # the words next to it
    at: int = 0  # where in its sentence
    label: str = ""  # of its row


@dataclass
class NumberList:
    """Numbers in brackets: the losses or times of runs."""

    words: list
    label: str
    section: str
    line: int  # of its first number
    lines: int = 0  # that it goes on for
    above: str = ""  # the heading or label


@dataclass
class Text:
    """All that a README claims."""

    claims: list = field(default_factory=list)
    lists: list = field(default_factory=list)
    step_lines: list = field(default_factory=list)
    numbers: int = 0
    cut: bool = False  # there is more than was looked at


def words(*alternatives):
    """A pattern that finds one of the words, which may be glued with _ or digits (val_loss)."""
    return re.compile(rf"(?<![A-Za-z])(?:{'|'.join(alternatives)})(?![A-Za-z])", re.I)


KINDS = {  # in order of precedence where one text has several
    "p": re.compile(r"(?<![\w-])p(?:[- ]?val(?:ue)?s?)?(?![\w-])", re.I),
    "t": re.compile(r"(?<![\w-])t(?:[- ]?(?:stat(?:istic)?|value))?(?![\w/-])", re.I),
    "step time": words(r"per[- ]step", r"step[ _-]?(?:time|avg|average)s?", r"ms ?/ ?step", r"s ?/ ?step"),
    "n": words("n", "runs?", "trials", "logs", "samples", "count"),
    "steps": words("steps?", "iterations", "iters"),
    "loss": words("loss(?:es)?", "accs?", "val"),
    "time": words("times?", "traintime", r"train s", "runtime", "wall[- ]?clock", "seconds", "duration", "timing"),
}
STATISTICS = {
    "difference": words("improve\\w*", "faster", "slower", "speed-?ups?", "sav(?:e|es|ed|ing|ings)", "gain(?:s|ed)?",
                        "delta", "diff", "differences?", "differs", "reduc\\w*", "decrease\\w*", "increase\\w*", "fewer",
                        "drop\\w*", "cut", "cuts", "overhead", "costs?", "regression", "less", "shorter", "longer",
                        "trades", "added?", "adds", "extra", "remov\\w*", "shift", "gap", "margin", "slow-?down"),
    "sd": words("std(?:ev|_dev|dev)?", "sd", "standard deviations?", "sigma", "stddev", "variance"),
    "mean": words("means?", "averag\\w*", "avg"),
    "median": words("median"),
    "min": words("min", "minimum", "best", "lowest", "fastest"),
    "max": words("max", "maximum", "worst", "highest", "slowest"),
    "range": words("range"),
    "target": words("target", "threshold", "limit", "cut-?off", "rules?"),
}
SIGNS = {"Δ": "difference", "σ": "sd", "μ": "mean"}
AFTER = re.compile(r"^[\s\w]{0,12}\b(?:on average|(?:mean|avg|average|median|std|sd)\b(?! ?[:=]))", re.I)
AFTER_DIFFERENCE = re.compile(r"^\s?(?:\w+ ){0,2}?(?:mean |of |the )?(?:improvement|faster|slower|speed-?up|saving|fewer|less|"
                              r"overhead|longer|shorter|reduction|decrease|increase|difference|gain|extra|slow-?down)", re.I)
NAMED = re.compile(r"(?<![\w-])(?P<name>p|n|t|df|z)(?:[- ]?(?:values?|stat(?:istic)?))?(?:\s?\([^()]{0,40}\))?"
                   r"\s{0,3}(?P<relation>=|<=?|>=?|≤|≥|~|≈|:|of|is)\s{0,3}$", re.I)
VERSUS = re.compile(r"\s?\w{0,3} (?:vs\.?|instead of) [~≈]?(?:\d|$)")  # after the own number
ARROW = re.compile(r"\s?\w{0,3} ?(?:->|→) ?[~≈]?$")  # before it
CALLED = re.compile(r"(?<![\w-])(?:(?P<p>p-?val(?:ue)?s?|one-sided p|two-sided p)|t-?stat(?:istic)?)(?![\w-])[\w\s.,<>()-]{0,60}"
                    r"(?P<relation>[=:])\s{0,3}$", re.I)
RELATION = re.compile(r"(=|<=?|>=?|≤|≥|~|≈|\babout|\baround|\broughly|\bapprox\w*\.?|\bnearly|\balmost|\bbelow|\bunder|\bover)"
                      r"\s{0,3}$", re.I)
LINK = re.compile(r"\s{0,3}(?:,|/|and|or|vs\.?|->|→|to|against|versus|\()?\s{0,3}", re.I)
NOUN_N = re.compile(r"^\s?(?:\w+ ){0,2}?(?:runs|trials|seeds|logs|times)\b", re.I)
NOUN_STEPS = re.compile(r"^\s?-?(?:\w+ )?(?:steps?|iterations|iters)\b(?!/)", re.I)
CLEANING = (  # markup and spellings that hide a number or its meaning
    (re.compile(r"</?[A-Za-z][^<>\n]{0,3000}>"), " "),
    (re.compile(r"!\[[^\[\]\n]{0,500}\]\([^()\s]{0,2000}\)"), " "),
    (re.compile(r"\]\([^()\s]{0,2000}\)"), "] "),
    (re.compile(r"\bhttps?://[^\s)>\]]{1,2000}"), " "),
    (re.compile(r"&lt;"), "<"), (re.compile(r"&gt;"), ">"), (re.compile(r"&plusmn;"), "±"),
    (re.compile(r"\\approx|\\sim"), "≈"), (re.compile(r"\\pm"), "±"), (re.compile(r"\\[tldq]?(?=[_%])"), ""),
    (re.compile(r"alternative ?= ?.less."), ""), (re.compile(r"\*\*|`|\$"), ""), (re.compile(r"[−–‒]"), "-"), (re.compile(r"\bnp\.float\d\d"), ""),
    (re.compile(r"\(tensor\(([\d.e-]{1,20})\), ?tensor\(([\d.e-]{1,20})\)\)"), r"(std=\1, mean=\2)"),
    (re.compile(r"(\d\.\d{1,9})[ ]?-[ ]?(\d{1,9}\.\d)"), r"\1 to \2"),
    (re.compile(r"(\d ?(?:ms|s|sec)?) ?(?:\+/-|\+-) ?(?=\d)"), r"\1 ± "),
)


def claims_of(text, ranges=NOWHERE):
    """Text with every claim; a number among the losses (`ranges`) with three decimals is one, whatever it is called."""
    found = Text()
    text = without_comments(text)
    for pattern, new in CLEANING:
        text = pattern.sub(new, text)
    starts = [i for i, c in enumerate(text) if c == "\n"]
    found.step_lines = [(m[0], line_of(starts, m)) for m in STEP_LINE.finditer(text)]
    text = STEP_LINE.sub(" ", text)
    starts = [i for i, c in enumerate(text) if c == "\n"]
    text = LIST.sub(lambda match: list_found(match, ranges, starts, found), text)
    reader = Reader(found, ranges)
    for number, line in enumerate(text.split("\n"), 1):
        found.cut |= len(line) > MAX_LINE
        reader.read(line[:MAX_LINE], number)
    reader.end()
    return found


def without_comments(text):
    """A text without <!-- comments -->, their lines kept."""
    pieces, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        pieces += [text[at:start], "\n" * text.count("\n", start, end)]
        at = end + 3
    return "".join([*pieces, text[at:]])


def within(value, span):
    return span[0] <= value <= span[1]


def line_of(starts, match):
    return bisect_right(starts, match.start()) + 1


def list_found(match, ranges, starts, found):
    """What stays of a list: its place and its lines; the list goes to `found` if it may be of losses or times."""
    numbers = re.findall(r"\d+\.\d+|\d{4,}", match[1])[:5000]
    before = match.string[max(0, match.start() - 80):match.start()]
    label = re.split(r"[\n\[\]]", before)[-1].strip()
    lines = match[1].count("\n")
    if len(numbers) < 2 or not (LISTED.search(label) or within(float(numbers[0]), ranges["loss"])):
        return " " + "\n" * lines
    if len(found.lists) < MAX_LISTS:
        found.lists.append(NumberList(numbers, label, "", line_of(starts, match), lines))
    found.cut |= len(found.lists) >= MAX_LISTS
    return "[list]" + "\n" * lines


class Reader:
    """Lines of a README one by one: headings, tables of two forms, code, sentences of joined lines."""

    def __init__(self, found, ranges):
        self.found, self.ranges = found, ranges
        self.section, self.pending, self.start = "", [], 0
        self.header, self.table, self.code, self.lists = None, 0, False, iter(found.lists)
        self.next_list, self.intro = next(self.lists, None), ""

    def read(self, line, number):
        """Take in one line."""
        if not line and not self.pending and (self.code or not self.header):
            return
        while self.next_list and self.next_list.line <= number:
            self.next_list.section, self.next_list.above = f"{self.section} {self.next_list.label}", self.section
            self.next_list = next(self.lists, None)
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            self.end()
            self.code = not self.code
        elif stripped.count("|") > 1 and not self.code:
            self.sentence_ends()
            self.row_of_bars(stripped, number)
        elif self.row_of_blanks(line, number):
            pass
        else:
            self.words_of(stripped, number)

    def words_of(self, stripped, number):
        """A line that is no row: a heading, a label, or a part of a sentence."""
        if not stripped:
            self.sentence_ends()
            self.header = None if not self.code else self.header
            return
        heading = stripped.startswith("#") and not self.code
        label = stripped.endswith(":") and len(stripped) < 120
        if heading or label or self.code or re.match(r"[-*+>] |\d{1,3}[.)] ", stripped):
            self.sentence_ends()
        if heading or label:
            self.section = stripped
        self.start = self.start if self.pending else number
        self.pending.append(stripped)
        if heading or label or self.code:
            self.sentence_ends()

    def sentence_ends(self):
        """The lines so far are whole sentences."""
        text, ends = " ".join(self.pending), list(accumulate(len(line) + 1 for line in self.pending))
        self.pending = []
        heading = text.startswith("#") and not self.code
        self.intro = text[-1000:] or self.intro
        for i, match in enumerate(re.finditer(r".+?(?:[.!?;](?=\s)|$)", text)):
            sentence = match[0].strip()
            claims = self.sentence(sentence, heading)
            for claim in claims:
                line = self.start + bisect_right(ends, match.start() + claim.at)
                self.add([claim], line, sentence, ("words", self.start, i))

    def sentence(self, text, heading):
        """Claims of a sentence, as long as there have not been too many numbers."""
        return sentence_claims(text, self.ranges, heading) if self.room(len(text) // 8) else []

    def room(self, count):
        """Whether about `count` more numbers may be looked at."""
        self.found.numbers += count
        self.found.cut |= self.found.numbers > MAX_NUMBERS
        return self.found.numbers <= MAX_NUMBERS

    def end(self):
        self.sentence_ends()
        self.header = None

    def add(self, claims, line, quote, scope):
        """Keep the claims of one place."""
        self.found.cut |= len(self.found.claims) + len(claims) > MAX_CLAIMS
        for claim in claims[:max(0, MAX_CLAIMS - len(self.found.claims))]:
            start = max(0, min(claim.at - 120, len(quote) - 200))
            claim.line, claim.quote = line, " ".join(quote[start:start + 300].split())[:200]
            claim.section = self.section
            claim.scope, claim.intro = claim.scope or scope, self.intro if claim.scope else ""
            self.found.claims.append(claim)

    def row_of_bars(self, line, number):
        """A row of a table whose cells are parted by |."""
        cells = [cell.strip() for cell in line.strip("|").split("|")][:64]
        if all(re.fullmatch(r":?-{1,200}:?", cell) for cell in cells if cell):
            return
        if self.header is None:
            self.begin_table(cells, number)
        else:
            self.row(cells[0], list(zip(self.header[1:], cells[1:], range(1, 64), strict=False)), number, line)

    def begin_table(self, cells, number):
        self.header, self.table, self.ends = cells, self.table + 1, []
        for i, cell in enumerate(cells[1:], 1):  # "baseline (n=10)"
            claims = [c for c in sentence_claims(cell, self.ranges) if c.kind == "n"]
            for claim in claims:
                claim.subject, claim.scope, claim.sure = cell, ("column", self.table, i), True
            self.add(claims, number, cell, ())

    def row_of_blanks(self, line, number):
        """Whether the line is the header or a row of a table whose columns are parted by blanks; it is taken in."""
        cells = re.split(r"\s{2,}", line.strip()[:2000]) if HEADER.search(line) else []
        if len(cells) > 3 and not any(map(NUMBER.fullmatch, cells)) and sum(bool(kind_of(cell)) for cell in cells) > 2:
            self.sentence_ends()
            self.begin_table(cells, number)
            self.ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", line[:2000])]
            return True
        if self.header is None or not line.strip() or "|" in line:
            return False
        parts = re.sub(r"\s#.*$|[\s*]+$", "", line[:2000]).split()
        count = next((i for i, part in enumerate(reversed(parts)) if not is_cell(part)), len(parts))
        count = min(count, len(self.header), len(parts))
        if count < 3:
            self.header = self.header if re.fullmatch(r"[-=\s]+", line) else None
            return False
        at = self.offset(line, count)
        cells = list(zip(self.header[at:at + count], parts[-count:], range(at, at + 64), strict=False))
        self.row(" ".join(parts[:-count]), cells, number, line)
        return True

    def offset(self, line, count):
        """The column of the first of `count` values of a row that is parted by blanks: the one under whose name it is."""
        ends = [match.end() for match in re.finditer(r"\S+", re.sub(r"\s#.*$|[\s*]+$", "", line[:2000]))][-count:]
        if not self.ends:
            return len(self.header) - count
        costs = [sum(abs(a - b) for a, b in zip(self.ends[i:], ends, strict=False))
                 for i in range(len(self.header) - count + 1)]
        return costs.index(min(costs))

    def row(self, label, cells, number, line):
        """The claims of a row: a cell is described by its column's name and the row's."""
        if not self.room(len(cells)):
            return
        names = [name for name, _, _ in cells]
        summary = any(kind_of(name) == "n" or statistic_of(name) in ("mean", "sd") for name in names)
        for name, cell, i in cells:
            claims = cell_claims(label, name, cell, self.ranges, summary)
            for claim in claims:
                own = kind_of(outside_brackets(name))
                place = ("row", self.table, number) if own else ("column", self.table, i)
                place = ("table", self.table) if not own and statistic_of(name) else place
                claim.scope, claim.subject = claim.scope or place, label if own else f"{name} {label}"
                claim.label = label.strip("[]* ").lower()
            self.add(claims, number, line, ())


def is_cell(part):
    """Whether a word of a row is a value: a number, or what stands for one that is missing."""
    return bool(NUMBER.fullmatch(part)) or part.lower() in ("nan", "-", "n/a", "inf")


@lru_cache(2048)
def kind_of(text):
    """The kind of number that a column, row or a few words announce, "" if none."""
    return next((kind for kind, pattern in KINDS.items() if pattern.search(text)), "")


def outside_brackets(text):
    """A name without what stands in brackets: "baseline (n=10)" is no n."""
    return re.sub(r"\([^()]{0,200}\)", " ", text)


@lru_cache(2048)
def statistic_of(text):
    """The statistic that a column or row announces."""
    for sign, name in SIGNS.items():
        if sign in text:
            return name
    if re.search(r"\+/-|±$", text):
        return "difference" if "+/-" in text else "spread"
    return next((name for name, pattern in STATISTICS.items() if pattern.search(text)), "")


@lru_cache(2048)
def label_statistic(label):
    """The statistic of a row that is called so and no more: "mean", not "h3-subtract-mean"."""
    name = statistic_of(label)
    rest = STATISTICS[name].sub(" ", label) if name in STATISTICS else label.strip("σμΔ ")
    return "" if re.search(r"\w", rest) else name


@lru_cache(2048)
def unit_of(text):
    """Seconds of the unit that a column or row names."""
    found = re.search(r"(?<![A-Za-z])(ms|s|sec|seconds|minutes)(?![A-Za-z])|\((min)\)", text)
    return UNITS[found[1] or found[2]] if found else None


def number_of(match):
    """(value, digit, unit word, written) of a match of NUMBER; None if it is part of something else."""
    digits, rest = match[1], match[2].strip().lstrip("-")
    if "," in digits and not re.fullmatch(r"[+-]?\d{1,3}(?:,\d{3})+(?:\.\d+)?", digits):
        return None
    after = match.string[match.end():match.end() + 1]
    if digits.count(".") > 1 or after in ("_", "²") or after.isdigit() or len(digits) > 40:
        return None
    glued = bool(match[2]) and match[2][0].isalpha()
    word = "" if rest == "min" and after in (":", "=") else rest.lower()  # "2.9195 min: 2.9177"
    if glued and word not in UNITS and word not in ("x", "ms/step", "s/step"):
        return None
    mantissa, _, exponent = digits.replace(",", "").lower().partition("e")
    try:
        value = float(digits.replace(",", ""))
        digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    except (ValueError, OverflowError):
        return None
    return (value, digit, word, digits) if abs(value) < 1e15 and digit < 1e15 else None


def cell_claims(label, name, cell, ranges, summary):
    """Claims of a cell of a table."""
    kind = kind_of(outside_brackets(name)) or kind_of(outside_brackets(label))
    if len(re.findall(r"[A-Za-z]{2,}", cell)) > 4:  # a sentence in a cell
        return sentence_claims(cell, ranges)
    statistic = statistic_of(name) or (label_statistic(label) if kind_of(outside_brackets(name)) else statistic_of(label))
    found, after_spread = [], False
    for match in NUMBER.finditer(cell):
        number = number_of(match)
        if number is None:
            continue
        between = cell[:match.start()].rstrip()
        after_spread = between.endswith("±")
        if named := NAMED.search(between[-60:] + " "):
            claim = named_claim(number, named, between)
            found += [replace(claim, scope=("words", "cell", label[:40]))] if claim else []
            continue
        claim = claim_of(number, kind, statistic, unit_of(name) or unit_of(label))
        claim = replace(claim, statistic="spread") if claim and after_spread else claim
        if claim and claim.kind in ("p", "t", "n", "steps") and claim.statistic != "difference":
            claim.statistic = ""
        if claim and claim.kind in ("loss", "time", "step time") and not claim.statistic and summary:
            claim.statistic = "mean"
        if claim:
            claim.about = "time" if KINDS["time"].search(f"{name} {label}") else "loss"
            claim.relation = relation_before(between)
            found.append(replace(claim, sure=True))
    return [claim for claim in found if claim][:4]


def claim_of(number, kind, statistic, unit=None):
    """Claim of a number, None if its unit says that it is of another kind."""
    value, digit, word, written = number
    if word == "%" or (word == "x" and kind != "n"):
        return Claim("percent", "difference", f"{written} {word}", value, digit)
    if word in ("ms/step", "s/step"):
        kind, word = "step time", word.partition("/")[0]
    if word in UNITS:
        kind = kind if kind in ("time", "step time") else "time"
    if not kind:
        return None
    scale = (UNITS.get(word) or unit or 1) if kind in ("time", "step time") else 1
    text = f"{written} {word}" if word in UNITS else written
    return Claim(kind, statistic, text, value * scale, digit * scale)


def relation_before(text):
    """How a number is related to the truth: =, <, >, or ~."""
    found = RELATION.search(text[-20:])
    word = found[1].lower() if found else "="
    simple = {"≤": "<", "<=": "<", "≥": ">", ">=": ">", "≈": "~", "=": "=", "<": "<", ">": ">", "below": "<",
              "under": "<", "over": "="}
    return simple.get(word, "~")


def sentence_claims(text, ranges, heading=False):
    """Claims of a sentence, or of a line of code."""
    found, last_end, last, waiting = [], 0, None, None
    matches = [(match, number) for match in NUMBER.finditer(text) if (number := number_of(match))]
    for i, (match, number) in enumerate(matches):
        before = text[max(last_end, match.start() - 90):match.start()]
        until = matches[i + 1][0].start() if i + 1 < len(matches) else len(text)
        after = text[match.end(1):min(until, match.end(1) + 60)]
        claim = word_claim(number, before, after, last, ranges, text[max(0, match.start() - 120):match.start()])
        if waiting and claim and claim.kind in ("loss", "time") and MEAN_NEXT.match(before):  # "(std=0.0013, mean=3.2777)"
            found.append(replace(waiting, kind=claim.kind))
        statistic = "" if claim or number[1] >= 1 else word_statistic(number[3], before, after)
        waiting = Claim("", statistic, number[3], number[0], number[1], sure=True) if statistic == "sd" else None
        if claim:
            claim.subject = whose(text, match.start())
            claim.around, claim.at = before[-40:] + after[:25], match.start()
            mine = heading or RESULT.search(before[-50:]) or ON_HARDWARE.match(after)
            if claim.kind in ("time", "loss") and not claim.statistic and mine:
                claim.statistic, claim.sure = "result", True
            found.append(claim)
        last, last_end = claim, match.end(1)
    return found


def word_claim(number, before, after, last, ranges, reach):
    """The claim that a number is by the words around it; None if it is about no result."""
    value, digit, word, written = number
    if word in ("%", "x"):
        about = PERCENT.search(f"{before[-40:]} % {after[:30]}")
        return Claim("percent", "difference", f"{written} {word}", value, digit) if about else None
    if named := NAMED.search(before[-60:]) or CALLED.search(reach):
        return named_claim(number, named, reach)
    if NOUN_N.match(after) and digit == 1 and written.isdigit():
        statistic = "difference" if re.search(r"\b(?:more|extra|additional)\b", after[:30]) else ""
        return Claim("n", statistic, written, value, digit, relation_before(before))
    statistic = word_statistic(written, before, after)
    scale = UNITS.get(word, 1)
    whole = any(within(value * scale, ranges[kind]) for kind in ("loss", "time")) and digit * scale < 1
    if statistic == "difference" and whole and written[0] not in "+-":  # "improves the loss (3.2780 vs 3.2783)"
        statistic = ""
    if VERSUS.match(after) or (last and ARROW.match(before)):
        statistic = statistic or "result"
    if NOUN_STEPS.match(after) and digit == 1 and not PLACE.search(before):
        sure = bool(re.search(r"\bin\s*$", before, re.I) or re.match(r"\W?(?:total|training)", after, re.I))
        statistic = statistic if statistic == "difference" else ""
        return Claim("steps", statistic, written, value, digit, relation_before(before), sure=sure and not statistic)
    kind = word_kind(number, before, after, ranges)
    last = last if last and last.kind in ("loss", "time", "step time", "steps") else None
    if not kind and last and LINK.fullmatch(before) and word not in UNITS and digit < 1:
        kind, statistic = last.kind, last.statistic
    elif last and LINK.fullmatch(before) and not statistic and last.kind == kind:
        statistic = last.statistic
    if not kind and last and statistic in ("mean", "sd", "median", "min", "max") and digit < 1 and len(before) < 40:
        kind = last.kind if last.kind != "steps" else ""
    if not kind:
        return None
    if before.rstrip().endswith("±"):
        kind, statistic = last.kind if last else kind, "spread"
    claim = claim_of(number, kind, statistic)
    unit = last.value / float(last.text.split()[0].replace(",", "")) if last and last.value and word not in UNITS else 1
    if claim and statistic == "spread" and kind == "time" and unit != 1:
        claim.value, claim.digit = claim.value * unit, claim.digit * unit
    if claim:
        of = kind == "steps" and after[:1] == "/"  # step 1480/1480
        claim.relation, claim.sure = relation_before(before), bool(statistic) and statistic != "difference" or of
    return claim


def named_claim(number, named, before):
    """The claim p = x, n = x, t = x."""
    value, digit, _, written = number
    found = named.groupdict()
    kind = found["name"].lower().replace("z", "t") if "name" in found else "p" if found["p"] else "t"
    sign = {"≤": "<", "<=": "<", "≥": ">", ">=": ">", "≈": "~", "~": "~", "<": "<", ">": ">"}
    if kind == "p" and not 0 <= value <= 1:
        return None
    before = before[-60:]
    about = "time" if KINDS["time"].search(before) else ""
    about = "loss" if not about and KINDS["loss"].search(before) else about
    return Claim(kind, "", written, value, digit, sign.get(named["relation"], "="), about, sure=True)


def word_statistic(written, before, after):
    """The statistic that the words around a number in a sentence say."""
    if before.rstrip().endswith("±"):
        return "spread"
    hits = [(m.start(), name) for name, pattern in STATISTICS.items() for m in pattern.finditer(before)]
    hits += [(i, name) for sign, name in SIGNS.items() if (i := before.rfind(sign)) >= 0]
    names = {name for _, name in hits}
    signed = written[0] in "+-"
    if "difference" in names or signed or AFTER_DIFFERENCE.match(UNIT_WORD.sub("", after)):
        return "difference"
    if hits:
        return max(hits)[1]
    if re.match(r"\S{0,12}:? ?\[list\]|\s?(?:ms|s|sec)?\s?±", after):
        return "mean"
    if found := AFTER.match(after):
        return statistic_of(found[0]) or "mean"
    return ""


MEAN_NEXT = re.compile(r"\W{0,3}(?:mean|avg|average)\W{0,4}$", re.I)
PLACE = re.compile(r"\b(?:every|each|first|last|next|within|per|at|on|by|around|about|once|over|warm-?up(?: of)?)\W{0,3}$", re.I)
PERCENT = re.compile(r"(?:faster|slower|speed-?up|improve\w*|reduc\w*|gain\w*|sav\w+)\W+(?:\w+\W+){0,3}%|%\W+(?:\w+\W+){0,2}"
                     r"(?:faster|slower|speed-?up|improvement|less time|reduction|gain|better|of (?:its|the) time)", re.I)
UNIT_WORD = re.compile(r"^[\s-]?(?:ms|s|secs?|seconds?|mins?|minutes?)\b")


def word_kind(number, before, after, ranges):
    """The kind of a number in a sentence: by its unit, its digits, or the last word before it."""
    value, digit, word, written = number
    if word in UNITS or word in ("ms/step", "s/step"):
        per_step = re.search(r"/ ?step|\bper step|\ba step|\bper-step|\bsteps? (?:times?|avg)", before[-40:] + after[:25], re.I)
        return "step time" if per_step else "time"
    if digit <= 1e-3 and within(abs(value), ranges["loss"]):
        return "loss"
    if digit <= 0.1 and re.fullmatch(r"\W*", before) and not after.strip() and within(value, ranges["time"]):
        return "time"  # "# 163.8384" below the print of a mean
    hits = [(m.end(), kind) for kind in ("loss", "time", "step time", "steps") for m in KINDS[kind].finditer(before[-60:])]
    kind = max(hits)[1] if hits else ""
    if kind == "steps":
        return kind if digit == 1 and re.search(r"steps[:=]? ?$|step ?$", before, re.I) and after[:1] in "/:" else ""
    if kind == "loss":
        wide = 3 if re.search(r"loss\w*\W{0,4}(?:\w+\W+){0,6}$", before[-60:], re.I) else 1.5
        low, high = ranges["loss"]
        near = low / wide <= value <= wide * high
        small = digit < 0.01 and value < 1
        return kind if (near and digit < 1) or small else ""
    if not kind and STATISTICS["mean"].search(before[-30:]) and digit <= 0.01 and \
            ranges["loss"][0] / 2 <= value <= 2 * ranges["loss"][1]:
        return "loss"
    calls = re.search(r"(?:time|times|runtime)\)?s? ?(?:is|was|of|=|:|\()*[^\w]{0,4}(?:\w+ ?= ?)?$", before, re.I)
    return kind if kind and digit < 1 and (calls or STATISTICS["mean"].search(before) or STATISTICS["sd"].search(before)) else ""


RECORD = re.compile(r"\bthis[ _](?:pr|record|run|submission|attempt|change)|\bnew[ _](?:record|wr|run)|\bours?\b|\bmine\b"
                    r"|candidate|\bmy changes\b|\bPR of\b", re.I)
RESULT = re.compile(RECORD.pattern + r"|\bfinal (?:val\w* |test )?loss|\bresult(?:s|ed|ing) in|\breach\w*|\bachiev\w*|\battain\w*", re.I)
ON_HARDWARE = re.compile(r"\s?(?:minutes|seconds|mins?|s)? on (?:an? )?\d+ ?x ?[A-Z]\d00", re.I)
COMPARED = re.compile(r"\b(?:vs\.?|versus|than|over|against|from|relative to|compared (?:to|with)|on top of|"
                      r"improvement over|better than|to)\s+(?:the |our |its )?[\w#-]{0,40}(?: \w{1,20}){0,1}", re.I)


def whose(text, at):
    """The words before a number, without those that it is compared with, and those after it in its brackets."""
    return COMPARED.sub(" ", text[max(0, at - 400):at])
