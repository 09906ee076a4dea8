"""Two sources of a training script: which settings, functions and lines changed. Pure text; `python logger.py diff`
presents it."""

import ast
import functools
import hashlib
import re
import sys
import warnings
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from runlogs.packages import language_of, pair_files

MAX_PARSED = 250_000  # characters of a source that is parsed: syntax trees take hundreds of bytes for each
MAX_PROGRAM = 2_000_000  # of all files of a program that are parsed
MAX_LINES = 50_000  # of two texts that are compared line by line
MAX_NAME = 300  # characters of a name: those of nested things begin with the names around them
DEPTH = 20  # how often the lines between two anchors are searched for more anchors
REST = "module level"  # the unit of what is neither function, class nor setting
UNREADABLE = (SyntaxError, ValueError, RecursionError, MemoryError)  # what parsing may raise
MAX_NEWER = 10  # lines for a newer Python, in a file that is read nevertheless
BODY = 40  # nodes of a function that is known by its body alone: shorter ones may be alike by chance
GONE = "gone"  # the change of a row whose unit was found in another place

# The box around the name of a part of train_gpt.py and train_moe.py: three lines of comment.
BOX = re.compile(r"^# ╔═+╗ *\n# ║ +(RECORD|KERNELS|SERVICE)\b.*\n# ╚═+╝ *(?:\n|\Z)", re.MULTILINE)


@dataclass
class Unit:
    """A function, a class without its methods, or the rest of a module; its own name is not part of its form."""

    form: bytes  # digest of its syntax without constants and docstrings
    constants: tuple  # as text
    text: str
    size: int  # nodes of its syntax


@dataclass
class Source:
    """A parsed file: values of its settings, its functions and classes, what else it does. Of the syntax only digests
    are kept: trees of a program of 40 files would not fit in memory."""

    settings: dict[str, str] = field(default_factory=dict)
    units: dict[str, Unit] = field(default_factory=dict)
    problem: str | None = None
    copies: Counter = field(default_factory=Counter)  # of the names of units
    newer: tuple = ()  # errors of lines that are for a newer Python than this one


@functools.lru_cache(64)
def parse_source(text):
    """Source of a Python text; `problem` says in a sentence why there is none."""
    if len(text) > MAX_PARSED:
        return Source(problem=f"is longer than {MAX_PARSED:,} characters: compared as text only")
    try:
        tree, newer = parse_python(text)
        source, lines, rest = Source(newer=newer), text.split("\n"), []
        for node in tree.body:
            if not read_unit(source, node, lines) and not read_setting(source, node):
                rest.append(node)
        source.units[REST] = unit_of(ast.Module(rest, []), "")
        return source
    except UNREADABLE as error:
        return Source(problem=f"{does_not_parse(error)}: compared as text only")


def does_not_parse(error):
    where = f" (line {error.lineno}: {error.msg})" if isinstance(error, SyntaxError) else ""
    return f"does not parse as Python {'.'.join(sys.version.split('.')[:2])}{where}"


def problem_of(name, text):
    """Why a file does not parse, None if it does, or is of another language."""
    source = parse_source(text) if language_of(name) == "Python" else Source()
    return source.problem or (does_not_parse(source.newer[0]) if source.newer else None)


def parse_python(text):
    """(syntax tree of a text, errors of the lines that it lacks): an f-string of Python 3.12, with quotes inside, is no
    reason for an older one to see nothing of a file, and its line becomes a constant. Raises what UNREADABLE names."""
    errors = []
    while True:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                return ast.parse(text), tuple(errors)
        except SyntaxError as error:
            lines = text.split("\n")
            if not error.msg.startswith("f-string") or len(errors) == MAX_NEWER or not 0 < error.lineno <= len(lines):
                raise
            errors.append(error.with_traceback(None))
            line = lines[error.lineno - 1]
            indent = line[: len(line) - len(line.lstrip())]
            lines[error.lineno - 1] = f"{indent}{line.strip()!r},"
            text = "\n".join(lines)


def unit_of(node, text):
    """Unit of a piece of syntax: one walk over it."""
    form, constants, left = [type(node).__name__], [], []
    add_children(node, form, left, {"name"})
    while left:
        child = left.pop()
        if isinstance(child, ast.Constant):
            constants.append(repr(child.value))
            form.append("Constant")
        else:
            form.append(type(child).__name__)
            add_children(child, form, left)
    digest = hashlib.blake2b("\n".join(form).encode("utf-8", "replace"), digest_size=16).digest()
    return Unit(digest, tuple(constants), text, len(form))


def add_children(node, form, left, unseen=frozenset()):
    """Add what is in a node: pieces of syntax to `left`, names and counts to `form`."""
    for name in node._fields:
        value = getattr(node, name, None)
        if name in unseen or name in ("ctx", "type_comment"):
            continue
        if isinstance(value, list):
            value = value[1:] if name == "body" and is_docstring(value) else value
            form.append(str(len(value)))
            for item in value:
                left.append(item) if isinstance(item, ast.AST) else form.append(str(item))
        else:
            left.append(value) if isinstance(value, ast.AST) else form.append(str(value))


def is_docstring(body):
    """Whether a body begins with a docstring."""
    first = body[0] if body else None
    return isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str)


def read_unit(source, node, lines, prefix=""):
    """Take a function, or a class with its fields and methods, into `source`; False for anything else."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    name = (prefix + node.name)[:MAX_NAME]
    text, start = lines[node.lineno - 1], node.body[0]
    if isinstance(node, ast.ClassDef):
        node.body = [child for child in node.body if not read_unit(source, child, lines, f"{name}.")
                     and not read_setting(source, child, f"{name}.")]
    else:  # the text of the body: other defaults are no other function
        text = "\n".join([lines[start.lineno - 1][start.col_offset :], *lines[start.lineno : node.end_lineno]])
        read_defaults(source, node, name)
        name += "()"
    source.copies[name] += 1
    if (count := source.copies[name]) > 1:  # overloads, or one definition for each case
        name += f" ({count})"
    source.units[name] = unit_of(node, text)
    return True


def read_defaults(source, node, name):
    """Take the defaults of a function's arguments as settings, and out of its syntax."""
    arguments = node.args
    plain = [*arguments.posonlyargs, *arguments.args]
    pairs = list(zip(plain[len(plain) - len(arguments.defaults) :], arguments.defaults, strict=True))
    pairs += [(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d is not None]
    for argument, default in pairs:
        source.settings[f"{name}({argument.arg})"] = ast.unparse(default)
    arguments.defaults, arguments.kw_defaults = [], [None] * len(arguments.kwonlyargs)


def read_setting(source, node, prefix=""):
    """Take `name = value`, also with a type, into the settings; False for anything else."""
    if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
        return False
    target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
    if len(getattr(node, "targets", [target])) > 1:
        return False
    names = target.elts if isinstance(target, ast.Tuple) else [target]
    values = node.value.elts if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple) else [node.value]
    if len(names) != len(values) or not all(isinstance(name, (ast.Name, ast.Attribute)) for name in names):
        return False
    for name, value in zip(names, values, strict=True):
        flatten(source.settings, prefix + ast.unparse(name), value)
    return True


def flatten(settings, name, value, depth=0):
    """Take a value; dictionaries entry by entry, calls keyword by keyword: PRESETS[cpu].width, optimizer.lr."""
    name = name[:MAX_NAME]
    if isinstance(value, ast.Dict) and depth < 5 and all(isinstance(key, ast.Constant) for key in value.keys):
        for key, item in zip(value.keys, value.values, strict=True):
            flatten(settings, f"{name}[{key.value}]", item, depth + 1)
    elif isinstance(value, ast.Call) and value.keywords and depth < 5:
        for keyword in value.keywords:
            flatten(settings, f"{name}.{keyword.arg or '**'}", keyword.value, depth + 1)
        if value.args or not depth:
            settings[name] = ast.unparse(ast.Call(value.func, value.args, []))
    else:
        settings[name] = ast.unparse(value)


def change_of(a, b):
    """(how unit b differs from a, "" if not at all; the constants that differ as [(old, new)])."""
    if a.form != b.form:
        return "changed", []
    pairs = [(x, y) for x, y in zip(a.constants, b.constants, strict=True) if x != y]
    return "constants only" if pairs else "comments only" if a.text != b.text else "", pairs


def blocks_in(text):
    """{RECORD | KERNELS | SERVICE: text} of a source with boxes around these words, {"": text} of
    any other. What stands before the first box is RECORD's."""
    head, *rest = BOX.split(text)
    found = {"RECORD": head} if rest else {"": text}
    for name, block in zip(rest[::2], rest[1::2], strict=True):
        found[name] = found.get(name, "") + block
    return found


@dataclass(frozen=True)
class Place:
    """A file of a program, or one of the boxed parts of a file; `prefix` goes before the names in it."""

    title: str
    prefix: str
    text: str


def compare_parts(old, new):
    """What changed between two programs, {path: text}: {"settings": [{"name", "a", "b"}], "units": [{"name", "change"}
    and, where it moved, "from", "to"], "modules": [{"name", "change", "from", "language", "lines_added",
    "lines_removed"}], "same_modules": number, "blocks": [sentence], "notes": [sentence], "not_compared": [title]}.

    A change of a unit is added, removed, changed, constants only, comments only; moved or renamed, alone or followed
    by one of these."""
    comparison = Comparison()
    for a, b in pair_files(old, new):
        comparison.compare_files(a, b, old.get(a), new.get(b))
    return comparison.close()


class Comparison:
    """Compares place by place. What one place lost and another one gained is put together at the end."""

    def __init__(self):
        self.settings, self.units, self.modules, self.notes, self.not_compared = [], [], [], [], []
        self.lost, self.gained = ({"units": {}, "settings": {}} for _ in "ab")  # of each name [(row, what, place)]
        self.blocks, self.same, self.room = [], 0, [MAX_PROGRAM, MAX_PROGRAM]

    def compare_files(self, a, b, old, new):
        """Names and texts of a file in the two programs, None where it is not there."""
        if a is None or b is None:
            self.units.append({"name": a or b, "change": "file removed" if a else "file added"})
        if old == new and a == b:
            self.same += 1
            return
        language = language_of(a or b)
        self.modules.append(module_row(a, b, old, new, language))
        if old == new:
            return
        if language != "Python":
            row = self.modules[-1]
            self.not_compared += [b] if a and b else []
            self.notes.append(f"{b or a} is {language}, compared as text only: {lines_text(row)}")
            return
        blocks = [blocks_in(text or "") for text in (old, new)]
        if "" in blocks[0] or "" in blocks[1]:
            self.compare_places(*(text and Place(name, prefix_of(name), text) for name, text in ((a, old), (b, new))))
            return
        for name in sorted({*blocks[0], *blocks[1]}, key="RECORD KERNELS SERVICE".split().index):
            self.compare_blocks(name, a, b, *(found.get(name, "") for found in blocks))

    def compare_blocks(self, name, a, b, old, new):
        """Two texts of a block, and a sentence that counts what changed."""
        title, first = f"{prefix_of(b)}{name.lower()}", len(self.units)
        if old == new:
            self.blocks.append((f"{title} unchanged", None, ""))
            return
        word = "" if name == "RECORD" else f"{name}: "
        self.compare_places(*(Place(f"{name} of {file}", prefix_of(file) + word, text)
                              for file, text in ((a, old), (b, new))))
        added, removed = counts_of(old, new)
        counts = f"{added} added, {removed} removed" if added is not None else "too many to compare"
        self.blocks.append((f"{title} differs: units ", self.units[first:], f"; lines {counts}"))

    def compare_places(self, a, b):
        """Two Places, None where there is no such place."""
        sources = []
        for side, place in enumerate((a, b)):
            source = self.parse(side, place.text) if place else Source()
            sources.append(source)
            if source.problem:
                self.notes.append(f"{place.title} of {'AB'[side]} {source.problem}")
                self.not_compared.append(f"{place.title} of {'AB'[side]}")
            elif source.newer:
                lines = ", ".join(str(error.lineno) for error in source.newer)
                self.notes.append(f"{place.title} of {'AB'[side]} {does_not_parse(source.newer[0])}: line {lines} is "
                                  "compared as text")
        if not any(source.problem for source in sources):
            self.compare_sources(*sources, a, b)

    def parse(self, side, text):
        """Source of a text, while there is room: many files are as slow as a long one."""
        self.room[side] -= len(text)
        if self.room[side] < 0:
            return Source(problem=f"is beyond the first {MAX_PROGRAM:,} characters: compared as text only")
        return parse_source(text)

    def compare_sources(self, old, new, a, b):
        """Two Sources and their Places."""
        before = len(self.settings), len(self.units)
        for name in dict.fromkeys([*old.settings, *new.settings]):
            if (x := old.settings.get(name)) != (y := new.settings.get(name)):
                row = {"name": (b or a).prefix + name, "a": x, "b": y}
                self.settings.append(row)
                self.keep("settings", name, row, x, y, a, b)
        for name in dict.fromkeys([*old.units, *new.units]):
            x, y = old.units.get(name), new.units.get(name)
            if x and y:
                self.compare_units(name, x, y, b.prefix)
            elif name != REST:
                row = {"name": (b or a).prefix + name, "change": "removed" if x else "added"}
                self.units.append(row)
                self.keep("units", name, row, x, y, a, b)
        if a and b and before == (len(self.settings), len(self.units)):
            self.notes.append(f"{b.prefix}only comments and blank lines outside of functions differ")

    def compare_units(self, name, x, y, prefix, row=None):
        """Two units of the same name; `row` is that of one that moved."""
        change, pairs = change_of(x, y)
        inside = f"{prefix}inside {name}"
        self.settings += [{"name": inside, "a": p, "b": q} for p, q in pairs]
        if row:
            row["change"] = f"moved, {change}" if change else "moved"
        elif change:
            self.units.append({"name": prefix + name, "change": change})

    def keep(self, kind, name, row, x, y, a, b):
        """Note a row of something that is in one of two places only: it may have moved."""
        if (x is None) != (y is None):
            found, what, place = (self.lost, x, a) if y is None else (self.gained, y, b)
            found[kind].setdefault(name, []).append((row, what, place))

    def match_units(self):
        """Make one row of each unit that one place lost and another gained."""
        for name, (lost, gained) in both(self.lost["units"], self.gained["units"]):
            row, unit, place = gained
            row |= {"from": lost[2].title, "to": place.title}
            self.compare_units(name, lost[1], unit, place.prefix, row)
            lost[0]["change"] = GONE

    def match_names(self):
        """Find units with another name and the same body, of those that are left; {old name: new name}."""
        names = {}
        lost, gained = (bodies(found["units"]) for found in (self.lost, self.gained))
        for _, ((name, old), (other, new)) in both(lost, gained, least=2):
            row, _, place = new
            row |= {"change": "renamed", "from": f"{old[2].prefix}{name}", "to": place.title}
            old[0]["change"] = GONE
            names[name.partition("()")[0]] = other.partition("()")[0]
        return names

    def match_settings(self, names):
        """Make one row of each setting that one place lost and another gained, none if the value is the same."""
        lost = {}
        for name, entries in self.lost["settings"].items():
            head, bracket, tail = name.partition("(")
            lost.setdefault(names.get(head, head) + bracket + tail, []).extend(entries)
        for _, (old, new) in both(lost, self.gained["settings"]):
            new[0]["a"] = old[1]
            old[0][GONE] = True
        self.settings = [row for row in self.settings if row["a"] != row["b"] and not row.get(GONE)]

    def close(self):
        """What compare_parts returns."""
        self.match_units()
        self.match_settings(self.match_names())
        blocks = [text if rows is None else text + changes_text(rows) + end for text, rows, end in self.blocks]
        units = [row for row in self.units if row["change"] != GONE]
        settings = sorted(self.settings, key=lambda s: (s["a"] is None) + 2 * (s["b"] is None))
        return {"settings": settings, "units": units, "modules": self.modules, "same_modules": self.same,
                "blocks": blocks, "notes": self.notes, "not_compared": self.not_compared}


def both(lost, gained, least=1):
    """(name, (entry of lost, entry of gained)) of names that are in both: of the same value first, then in order. With
    `least` 2 only names that have one entry each, as several could be any of them."""
    for name in [name for name in lost if name in gained]:
        olds, news = lost[name], gained[name]
        if least > 1:
            if len(olds) == len(news) == 1:
                yield name, (olds[0], news[0])
            continue
        pairs = same_first(olds, news)
        for old, new in pairs:
            yield name, (old, new)
        paired = {id(entry) for pair in pairs for entry in pair}
        lost[name], gained[name] = ([e for e in entries if id(e) not in paired] for entries in (olds, news))


def same_first(olds, news):
    """Pairs of (row, value, place): those of the same value, then the others in order."""
    places, pairs, rest = {}, [], []
    for new in news:
        places.setdefault(value_of(new), []).append(new)
    for old in olds:
        same = places.get(value_of(old))
        pairs.append((old, same.pop(0))) if same else rest.append(old)
    taken = {id(new) for _, new in pairs}
    return pairs + list(zip(rest, [new for new in news if id(new) not in taken], strict=False))


def value_of(entry):
    value = entry[1]
    return (value.form, value.constants, value.text) if isinstance(value, Unit) else value


def bodies(units):
    """{form and constants: [(name, entry)]} of the units that are long enough to be known by their body."""
    found = {}
    for name, entries in units.items():
        for entry in entries:
            if entry[1].size >= BODY:
                found.setdefault((entry[1].form, entry[1].constants), []).append((name, entry))
    return found


def prefix_of(file):
    return "" if file == "train_gpt.py" else f"{file}: "


def changes_text(rows):
    """How many units changed, in words."""
    changes = [row["change"] for row in rows]
    changed = changes.count("changed") + changes.count("constants only")
    moved = sum(change == GONE or change.startswith(("moved", "renamed")) for change in changes)
    return (f"{changed} changed, {changes.count('added')} added, {changes.count('removed')} removed"
            + (f", {moved} moved" if moved else ""))


def module_row(a, b, old, new, language):
    """What became of a file, and how many of its lines changed, None for too many."""
    if a is None or b is None:
        change = "removed" if a else "added"
    else:
        change = "" if a == b else "moved" if a.split("/")[-1] == b.split("/")[-1] else "renamed"
        change = ", ".join(filter(None, [change, "changed" if old != new else ""]))
    added, removed = counts_of(old or "", new or "")
    return {"name": b or a, "change": change, "from": a if a != b else None, "language": language,
            "lines_added": added, "lines_removed": removed}


def lines_text(row):
    if row["lines_added"] is None:
        return "too many lines to compare"
    return f"{row['lines_added']} lines added, {row['lines_removed']} removed"


def counts_of(old, new):
    """(number of added lines, of removed ones), (None, None) above MAX_LINES."""
    a, b = old.splitlines(), new.splitlines()
    if len(a) + len(b) > MAX_LINES:
        return None, None
    codes = [code for code in opcodes_of(a, b) if code[0] != "equal"]
    return sum(n - m for *_, m, n in codes), sum(j - i for _, i, j, *_ in codes)


def unified(old, new, names):
    """Lines of the unified diff of two {file name: text}."""
    lines = []
    for x, y in pair_files(old, new):
        a, b = old.get(x, "").splitlines(), new.get(y, "").splitlines()
        found = line_diff(a, b)
        if found is None:
            lines.append(f"{y or x}: {len(a)} and {len(b)} lines are too many for a text diff")
        elif found or (x and y and x != y):
            lines += [f"--- {names[0]}/{x or y}", f"+++ {names[1]}/{y or x}", *found]
    return lines


def line_diff(a, b, around=3):
    """Lines of a unified diff of two lists of lines, without the file names; None above MAX_LINES.

    Anchors are lines that both hold once; between two anchors others may be such lines. What has no anchor is removed
    and added as a whole: unlike difflib's, the time does not grow with the square of the length."""
    if len(a) + len(b) > MAX_LINES:
        return None
    matcher, lines = SequenceMatcher(None, [], []), []
    matcher.opcodes = opcodes_of(a, b)
    for group in matcher.get_grouped_opcodes(around):
        spans = [(group[0][k], group[-1][k + 1]) for k in (1, 3)]
        lines.append("@@ -{} +{} @@".format(*(span_text(*span) for span in spans)))
        for kind, i, j, m, n in group:
            lines += [" " + line for line in a[i:j]] if kind == "equal" else [
                *("-" + line for line in a[i:j]), *("+" + line for line in b[m:n])]
    return lines


def span_text(start, end):
    """Lines start to end as a unified diff names them."""
    count = end - start
    return str(start + 1) if count == 1 else f"{start + bool(count)},{count}"


def opcodes_of(a, b):
    """What makes the list b of a, as of difflib's get_opcodes; [] if they are equal."""
    codes, i, j = [], 0, 0
    for m, n, size in [*merged(matches(a, b, 0, len(a), 0, len(b), DEPTH)), (len(a), len(b), 0)]:
        if i < m or j < n:
            codes.append(("replace" if i < m and j < n else "delete" if i < m else "insert", i, m, j, n))
        if size:
            codes.append(("equal", m, m + size, n, n + size))
        i, j = m + size, n + size
    return codes if codes and codes[0][0] != "equal" or len(codes) > 1 else []


def merged(pairs):
    """(start in a, start in b, length) of the runs of pairs that follow each other."""
    runs = []
    for i, j in pairs:
        if runs and (i, j) == (runs[-1][0] + runs[-1][2], runs[-1][1] + runs[-1][2]):
            runs[-1][2] += 1
        else:
            runs.append([i, j, 1])
    return runs


def matches(a, b, i, m, j, n, depth):
    """Pairs (index in a, in b) of equal lines of a[i:m] and b[j:n], in order: at both ends, anchors, between these."""
    head = []
    while i < m and j < n and a[i] == b[j]:
        head.append((i, j))
        i, j = i + 1, j + 1
    tail = []
    while i < m and j < n and a[m - 1] == b[n - 1]:
        m, n = m - 1, n - 1
        tail.append((m, n))
    middle, found = [], anchors(a, b, i, m, j, n) if i < m and j < n and depth else []
    for x, y in found:
        middle += [*matches(a, b, i, x, j, y, depth - 1), (x, y)]
        i, j = x + 1, y + 1
    middle += matches(a, b, i, m, j, n, depth - 1) if found else []
    return [*head, *middle, *tail[::-1]]


def anchors(a, b, i, m, j, n):
    """The longest list of pairs (index in a, in b), growing in both, of lines that a[i:m] and b[j:n] hold once each."""
    counts = Counter(a[i:m]), Counter(b[j:n])
    place = {line: y for y, line in enumerate(b[j:n], j) if counts[1][line] == 1}
    pairs = [(x, place[a[x]]) for x in range(i, m) if counts[0][a[x]] == 1 and a[x] in place]
    ends, last, before = [], [], []  # of the shortest chains of each length: y, its pair; the pair before each pair
    for index, (_, y) in enumerate(pairs):
        at = bisect_left(ends, y)
        before.append(last[at - 1] if at else None)
        ends[at:at + 1], last[at:at + 1] = [y], [index]
    chain, index = [], last[-1] if last else None
    while index is not None:
        chain.append(pairs[index])
        index = before[index]
    return chain[::-1]
