"""Two sources of a training script: which settings, functions and lines changed. Pure text; `python logger.py diff`
presents it."""

import ast
import functools
import re
import sys
import warnings
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from difflib import SequenceMatcher

MAX_PARSED = 250_000  # characters of a source that is parsed: syntax trees take hundreds of bytes for each
MAX_LINES = 50_000  # of two texts that are compared line by line
MAX_NAME = 300  # characters of a name: those of nested things begin with the names around them
DEPTH = 20  # how often the lines between two anchors are searched for more anchors

# The box around the name of a part of train_gpt.py and train_moe.py: three lines of comment.
BOX = re.compile(r"^# ╔═+╗ *\n# ║ +(RECORD|KERNELS|SERVICE)\b.*\n# ╚═+╝ *(?:\n|\Z)", re.MULTILINE)


@dataclass
class Source:
    """A parsed file: values of its settings, its functions and classes as (syntax, text), what else it does."""

    settings: dict[str, str] = field(default_factory=dict)
    units: dict[str, tuple] = field(default_factory=dict)
    problem: str | None = None
    copies: Counter = field(default_factory=Counter)  # of the names of units


@functools.lru_cache(8)
def parse_source(text):
    """Source of a Python text; `problem` says in a sentence why there is none."""
    if len(text) > MAX_PARSED:
        return Source(problem=f"is longer than {MAX_PARSED:,} characters: compared as text only")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(text)
            source, lines, rest = Source(), text.split("\n"), []
            for node in tree.body:
                if not read_unit(source, node, lines) and not read_setting(source, node):
                    rest.append(node)
            source.units["module level"] = (ast.dump(without_docstrings(ast.Module(rest, []))), "", rest)
            return source
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" (line {error.lineno}: {error.msg})" if isinstance(error, SyntaxError) else ""
        python = ".".join(sys.version.split(".")[:2])
        return Source(problem=f"does not parse as Python {python}{where}: compared as text only")


def without_docstrings(node):
    """The node, its docstrings removed, in place."""
    for child in ast.walk(node):
        body = getattr(child, "body", None)
        first = body[0] if isinstance(body, list) and body else None
        if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
            child.body = body[1:]
    return node


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
    source.units[name] = (ast.dump(without_docstrings(node)), text, node)
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


def constants_of(node):
    """(the shape of a syntax tree without its constants, the constants), both in the order of ast.walk."""
    form, values = [], []
    for child in ast.walk(node):
        if isinstance(child, ast.Constant):
            values.append(child.value)
        fields = [] if isinstance(child, ast.Constant) else ast.iter_fields(child)
        plain = [(name, value if isinstance(value, str) else len(value) if isinstance(value, list) else value is None)
                 for name, value in fields]
        form.append((type(child), plain))
    return form, values


def changed_constants(old, new):
    """[(old, new)] if two pieces of syntax differ in constants only, else None."""
    old, new = (ast.Module(n, []) if isinstance(n, list) else n for n in (old, new))
    (form, before), (other, after) = constants_of(old), constants_of(new)
    if form != other or len(before) != len(after):
        return None
    return [(a, b) for a, b in zip(before, after, strict=True) if (type(a), a) != (type(b), b)]


def blocks_in(text):
    """{RECORD | KERNELS | SERVICE: text} of a source with boxes around these words, {"": text} of
    any other. What stands before the first box is RECORD's."""
    head, *rest = BOX.split(text)
    found = {"RECORD": head} if rest else {"": text}
    for name, block in zip(rest[::2], rest[1::2], strict=True):
        found[name] = found.get(name, "") + block
    return found


def compare_parts(old, new):
    """What changed between two {file name: text}: {"settings": [{"name", "a", "b"}], "units":
    [{"name", "change"}], "blocks": [sentence], "notes": [sentence]}; a change is added, removed,
    changed, constants only, or comments only."""
    found = {"settings": [], "units": [], "blocks": [], "notes": []}
    for part in dict.fromkeys([*old, *new]):
        if old.get(part) == new.get(part):
            continue
        if part not in old or part not in new:
            change = "file removed" if part in old else "file added"
            found["units"].append({"name": part, "change": change})
            continue
        file = "" if part == "train_gpt.py" else f"{part}: "
        a, b = blocks_in(old[part]), blocks_in(new[part])
        if "" in a or "" in b:
            compare_texts(old[part], new[part], part, file, found)
            continue
        for name in sorted({*a, *b}, key="RECORD KERNELS SERVICE".split().index):
            compare_blocks(a.get(name, ""), b.get(name, ""), part, name, file, found)
    return found


def compare_blocks(a, b, part, name, file, found):
    """Add what changed between two texts of a block to `found`, and a sentence that counts it."""
    title, first = f"{file}{name.lower()}", len(found["units"])
    if a == b:
        found["blocks"].append(f"{title} unchanged")
        return
    compare_texts(a, b, f"{name} of {part}", file if name == "RECORD" else f"{file}{name}: ", found)
    changes = [unit["change"] for unit in found["units"][first:]]
    changed = changes.count("changed") + changes.count("constants only")
    lines = line_diff(a.splitlines(), b.splitlines(), around=0)
    signs = [line[0] for line in lines or []]
    counts = f"{signs.count('+')} added, {signs.count('-')} removed" if lines is not None else "too many to compare"
    found["blocks"].append(
        f"{title} differs: units {changed} changed, {changes.count('added')} added, "
        f"{changes.count('removed')} removed; lines {counts}")


def compare_texts(old, new, part, prefix, found):
    """Add what changed between two texts to `found`; `prefix` goes before the names."""
    a, b = parse_source(old), parse_source(new)
    for which, source in (("A", a), ("B", b)):
        found["notes"] += [f"{part} of {which} {source.problem}"] if source.problem else []
    if not a.problem and not b.problem:
        compare_sources(a, b, prefix, found)


def compare_sources(a, b, prefix, found):
    """Add what changed between two Sources to `found`."""
    settings, first = [], len(found["units"])
    for name in dict.fromkeys([*a.settings, *b.settings]):
        if (before := a.settings.get(name)) != (after := b.settings.get(name)):
            settings.append({"name": prefix + name, "a": before, "b": after})
    for name in dict.fromkeys([*a.units, *b.units]):
        if name not in a.units or name not in b.units:
            change = "added" if name in b.units else "removed"
            found["units"].append({"name": prefix + name, "change": change})
            continue
        (syntax, text, node), (other, its_text, its_node) = a.units[name], b.units[name]
        if syntax != other:
            pairs = changed_constants(node, its_node)
            inside = f"{prefix}inside {name}"
            settings += [{"name": inside, "a": repr(x), "b": repr(y)} for x, y in pairs or []]
            change = "constants only" if pairs else "changed"
            found["units"].append({"name": prefix + name, "change": change})
        elif text != its_text:
            found["units"].append({"name": prefix + name, "change": "comments only"})
    found["settings"] += sorted(settings, key=lambda s: (s["a"] is None) + 2 * (s["b"] is None))
    if not settings and len(found["units"]) == first:
        found["notes"].append(f"{prefix}only comments and blank lines outside of functions differ")


def unified(old, new, names):
    """Lines of the unified diff of two {file name: text}."""
    lines = []
    for part in dict.fromkeys([*old, *new]):
        a, b = (parts.get(part, "").splitlines() for parts in (old, new))
        found = line_diff(a, b)
        if found is None:
            lines.append(f"{part}: {len(a)} and {len(b)} lines are too many for a text diff")
        elif found:
            lines += [f"--- {names[0]}/{part}", f"+++ {names[1]}/{part}", *found]
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
    """Pairs (index in a, in b) of equal lines of a[i:m] and b[j:n], in order: equal ones at both ends, the anchors, and
    the same between these."""
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
