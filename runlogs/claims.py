"""Text of a README -> its claims: numbers that are about results, in sentences, tables of two forms, and lists.

A number is a claim if it has a unit of time, a name (p, n, t), runs or steps after it, a column or row of results, the
word loss or time before it, or as many digits as a loss and is near the losses. Dates, versions, links, settings,
sizes and numbers in code are none.
"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from itertools import accumulate

from runlogs.wording import LABELED, NOWHERE, NUMBER, cell_claims, kind_of, sentence_claims, statistic_of, within

MAX_CLAIMS = 3000  # of one text
MAX_NUMBERS = 20_000  # of one text that are looked at
MAX_LISTS = 200
MAX_LINE = 20_000  # characters of a line that are looked at
MAX_COLUMNS = 64
STEP_LINE = re.compile(r"step:\d{1,15}/\d{1,15} val_loss:\d{1,9}\.\d{1,15}[^\n`|]{0,300}", re.ASCII)
LIST = re.compile(r"\[([\s\d.,e+ms-]{8,60000})\]")
LABEL = re.compile(r"loss|acc|val|time|timing|runs|results|second", re.I)
COLUMNS = re.compile(r"\S\s{2,}\S.{0,500}?\S\s{2,}\S")
ASKS = {"p": re.compile(r"\.pvalue\)?\s*$"), "mean": re.compile(r"\bmean\(")}  # lines of code, answered by the next
ANSWER = re.compile(r"(?:#|>|Out\[\d{1,4}\]:|\s){0,4}\(?(\d{0,9}\.\d{1,30}(?:e-?\d{1,3})?|\de-\d{1,3})\)?", re.ASCII)
SEED = re.compile(r"\bseed\b", re.I)
REMARK = re.compile(r"\s#.*$|[\s*]+$")  # after the values of a row: "# At 1775 steps", "**"
CLEANING = tuple((re.compile(pattern), new) for pattern, new in (  # what hides a number or its meaning
    (r"</?[A-Za-z][^<>\n]{0,3000}>", " "),
    (r"!\[[^\[\]\n]{0,500}\]\([^()\s]{0,2000}\)", " "),
    (r"\]\([^()\s]{0,2000}\)", "] "),
    (r"\bhttps?://[^\s)>\]]{1,2000}", " "),
    (r"\b(\d{1,3}) ?(?:minutes?|mins?|m) ?(?:and )?(\d{1,2}(?:\.\d{1,6})?) ?(?:seconds?|secs?|s)\b",
     lambda match: in_seconds(*match.groups())),
    ("&lt;", "<"), ("&gt;", ">"), ("&plusmn;", "±"), (r"\\approx|\\sim", "≈"), (r"\\pm", "±"), (r"\\(?=[_%])", ""),
    (r"alternative ?= ?.less.", ""), (r"\bnp\.float\d\d", ""),
    (r"```([^`\n]{1,3000})```", r"\1"), (r"\*\*|\$|(?<!`)`{1,2}(?!`)", ""), (r"[−–‒]", "-"),
    (r"\(tensor\(([\d.e-]{1,20})\), ?tensor\(([\d.e-]{1,20})\)\)", r"(std=\1, mean=\2)"),  # of torch.std_mean
    (r"(\d\.\d{1,9}) ?- ?(\d{1,9}\.\d)", r"\1 to \2"),
    (r"(\d ?(?:ms|s|sec)?) ?(?:\+/-|\+-) ?(?=\d)", r"\1 ± "),
))


@dataclass
class NumberList:
    """Numbers in brackets: the losses or times of runs."""

    words: list
    label: str
    line: int  # of its first number
    lines: int  # that it goes on for
    section: str = ""  # the heading or label above


@dataclass
class Text:
    """All that a README claims. `cut`: there is more than was looked at."""

    claims: list = field(default_factory=list)
    lists: list = field(default_factory=list)
    step_lines: list = field(default_factory=list)  # (line, its number)
    numbers: int = 0
    cut: bool = False


def claims_of(text, ranges=NOWHERE):
    """Text with every claim; `ranges` are {"loss": (low, high), "time": ..} of what the runs have, a little wider."""
    text = without_comments(text)
    for pattern, new in CLEANING:
        text = pattern.sub(new, text)
    found, starts = Text(), line_starts(text)
    found.step_lines = [(match[0], bisect_right(starts, match.start())) for match in STEP_LINE.finditer(text)]
    text = STEP_LINE.sub(" ", text)
    starts = line_starts(text)
    text = LIST.sub(lambda match: list_found(match, ranges, starts, found), text)
    reader = Reader(found, ranges)
    for number, line in enumerate(text.split("\n"), 1):
        found.cut |= len(line) > MAX_LINE
        reader.read(line[:MAX_LINE], number)
    reader.end()
    return found


def in_seconds(minutes, seconds):
    """Minutes and seconds as seconds, with as many digits."""
    return f"{60 * int(minutes) + float(seconds):.{len(seconds.partition('.')[2])}f} s"


def line_starts(text):
    return [0, *(i for i, c in enumerate(text, 1) if c == "\n")]


def without_comments(text):
    """A text without <!-- comments -->, their lines kept."""
    pieces, at = [], 0
    while (start := text.find("<!--", at)) >= 0 and (end := text.find("-->", start)) >= 0:
        pieces += [text[at:start], "\n" * text.count("\n", start, end)]
        at = end + 3
    return "".join([*pieces, text[at:]])


def list_found(match, ranges, starts, found):
    """What stays of a list: its place and its lines; the list goes to `found` if it may be of losses or times."""
    numbers = re.findall(r"\d+\.\d+|\d{4,}", match[1])[:5000]
    label = re.split(r"[\n\[\]]", match.string[max(0, match.start() - 80):match.start()])[-1].strip()
    first, lines = float(numbers[0]) if numbers else 0, match[1].count("\n")
    alike = any(within(first * scale, span) for span in ranges.values() for scale in (1, 1e-3))
    if len(numbers) < 2 or not (alike or LABEL.search(label)):
        return " " + "\n" * lines
    found.cut |= len(found.lists) >= MAX_LISTS
    if len(found.lists) < MAX_LISTS:
        found.lists.append(NumberList(numbers, label, bisect_right(starts, match.start()), lines))
    return "[list]" + "\n" * lines


class Reader:
    """Lines of a README one by one: headings, tables, code, sentences of joined lines."""

    def __init__(self, found, ranges):
        self.found, self.ranges, self.lists = found, ranges, iter(found.lists)
        self.next_list = next(self.lists, None)
        self.section, self.intro, self.code = "", "", False  # heading or label above, sentences before, in a fence
        self.asked = ""  # what the line of code above prints: p or mean
        self.pending, self.start = [], 0  # lines of an open sentence, the number of the first
        self.header, self.ends, self.table = None, [], 0  # of an open table: names, where they end, its number

    def read(self, line, number):
        """Take in one line."""
        stripped = line.strip()
        if not stripped and not self.pending and (self.code or not self.header):
            return
        self.pass_lists(number)
        if stripped.startswith(("```", "~~~")):
            self.end()
            self.code = not self.code
        elif stripped.count("|") > 1 and not self.code:
            self.sentence_ends()
            self.row_of_bars(stripped, number)
        elif not self.row_of_blanks(line, number):
            self.words_of(stripped, number)

    def pass_lists(self, number):
        """Give the lists up to here the heading or label they stand under."""
        while self.next_list and self.next_list.line <= number:
            self.next_list.section = self.section
            self.next_list = next(self.lists, None)

    def words_of(self, line, number):
        """A line that is no row: a heading, a label, or a part of a sentence."""
        if not line:
            self.sentence_ends()
            self.header = self.header if self.code else None
            return
        title = (line.startswith("#") and not self.code) or (line.endswith(":") and len(line) < 120)
        line = self.answered(line) if self.code else line
        if title or self.code or re.match(r"[-*+>] |\d{1,3}[.)] ", line) or LABELED.match(line):
            self.sentence_ends()
        self.section = line if title else self.section
        self.start = self.start if self.pending else number
        self.pending.append(line)
        if title or self.code:
            self.sentence_ends()

    def answered(self, line):
        """A line of code; a number alone below `.pvalue` or `mean(..)` is called p or mean."""
        answer = ANSWER.fullmatch(line[:80]) if self.asked else None
        named = f"{self.asked} = {answer[1]}" if answer else line
        self.asked = next((name for name, asks in ASKS.items() if asks.search(line[-200:])), "")
        return named

    def sentence_ends(self):
        """The lines so far are whole sentences."""
        text, ends = " ".join(self.pending), list(accumulate(len(line) + 1 for line in self.pending))
        heading = text.startswith("#") and not self.code
        self.pending, self.intro = [], text[-1000:] or self.intro
        for i, match in enumerate(re.finditer(r".+?(?:[.!?;](?=\s)|$)", text)):
            claims = sentence_claims(match[0], self.ranges, heading) if self.room(len(match[0]) // 8) else []
            for claim in claims:
                line = self.start + bisect_right(ends, match.start() + claim.at)
                self.add([claim], line, match[0], ("words", self.start, i))

    def end(self):
        """Whatever is open ends here."""
        self.sentence_ends()
        self.header = None

    def room(self, count):
        """Whether about `count` more numbers may be looked at."""
        self.found.numbers += count
        self.found.cut |= self.found.numbers > MAX_NUMBERS
        return self.found.numbers <= MAX_NUMBERS

    def add(self, claims, line, quote, scope=()):
        """Keep the claims of one place."""
        self.found.cut |= len(self.found.claims) + len(claims) > MAX_CLAIMS
        for claim in claims[:max(0, MAX_CLAIMS - len(self.found.claims))]:
            start = max(0, min(claim.at - 120, len(quote) - 200))
            claim.quote = " ".join(quote[start:start + 300].split())[:200]
            claim.intro = "" if scope else self.intro
            claim.line, claim.section, claim.scope = line, self.section, claim.scope or scope
            self.found.claims.append(claim)

    # tables

    def row_of_bars(self, line, number):
        """A row of a table whose cells are parted by |."""
        cells = [cell.strip() for cell in line.strip("|").split("|")][:MAX_COLUMNS]
        if all(re.fullmatch(r":?-{1,200}:?", cell) for cell in cells if cell):
            return
        if self.header is None:
            self.begin_table(cells, number)
        else:
            columns = range(1, MAX_COLUMNS)
            self.row(cells[0], list(zip(self.header[1:], cells[1:], columns, strict=False)), number, line)

    def row_of_blanks(self, line, number):
        """Whether the line is the header or a row of a table whose columns are parted by blanks; it is taken in."""
        if self.header_of_blanks(line, number):
            return True
        if self.header is None or not self.ends or not line.strip():
            return False
        parts = REMARK.sub("", line[:2000]).split()
        count = next((i for i, part in enumerate(reversed(parts)) if not is_value(part)), len(parts))
        count = min(count, len(self.header))
        if count < 3:
            self.header = self.header if re.fullmatch(r"[-=\s]+", line) else None
            return False
        at = self.offset(line, count)
        cells = zip(self.header[at:at + count], parts[-count:], range(at, at + count), strict=True)
        self.row(" ".join(parts[:-count]), list(cells), number, line)
        return True

    def header_of_blanks(self, line, number):
        """Whether a line is the header of such a table: several names of kinds and no number."""
        cells = re.split(r"\s{2,}", line.strip()[:2000]) if COLUMNS.search(line) else []
        if len(cells) < 4 or any(map(NUMBER.fullmatch, cells)) or sum(bool(kind_of(cell)) for cell in cells) < 3:
            return False
        self.sentence_ends()
        self.begin_table(cells, number)
        self.ends = [match.end() for match in re.finditer(r"\S+(?: \S+)*", line[:2000])]
        return True

    def offset(self, line, count):
        """The column of the first of `count` values: where all together are nearest to the names above them."""
        ends = [match.end() for match in re.finditer(r"\S+", REMARK.sub("", line[:2000]))][-count:]
        costs = [sum(abs(a - b) for a, b in zip(self.ends[i:], ends, strict=False))
                 for i in range(len(self.header) - count + 1)]
        return costs.index(min(costs))

    def begin_table(self, cells, number):
        """Names of the columns; they may claim an n: "baseline (n=10)"."""
        self.header, self.table, self.ends = cells, self.table + 1, []
        for i, cell in enumerate(cells[1:], 1):
            claims = [claim for claim in sentence_claims(cell, self.ranges) if claim.kind == "n"]
            for claim in claims:
                claim.subject, claim.scope, claim.sure = cell, ("column", self.table, i), True
            self.add(claims, number, cell)

    def row(self, label, cells, number, line):
        """The claims of a row. A column that says its kind makes the row one thing, else the column is one."""
        if not self.room(len(cells)):
            return
        names = [name for name, _, _ in cells]
        texts = tuple(plain(text) for text in (label, *(cell for _, cell, _ in cells)))
        seed = next((text for name, text in zip((self.header[0], *names), texts, strict=True) if SEED.search(name)), "")
        summary = any(kind_of(name) == "n" or statistic_of(name) in ("mean", "sd") for name in names)
        for name, cell, i in cells:
            own = kind_of(name)
            place = ("row", self.table, number) if own else ("table", self.table) if statistic_of(name) else \
                ("column", self.table, i)
            claims = cell_claims(label, name, cell, self.ranges, summary)
            for claim in claims:
                claim.scope, claim.label = claim.scope or place, texts[0]
                claim.cells, claim.seed = texts, seed
                claim.subject = label if own else f"{name} {label}"
            self.add(claims, number, line)


def plain(cell):
    return cell.strip("[]* ").lower()


def is_value(part):
    """Whether a word of a row is a value: a number, or what stands for one that is missing."""
    return bool(NUMBER.fullmatch(part)) or part.lower() in ("nan", "-", "n/a", "inf")
