"""One function, class, method or constant through all records: where it appears, changes, moves and disappears."""

import ast
import functools
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from runlogs.loading import load_one, settings_of
from runlogs.packages import language_of, lines_of
from runlogs.sources import (
    MAX_LINES,
    MAX_NAME,
    MAX_PARSED,
    UNREADABLE,
    Unit,
    change_of,
    line_diff,
    parse_python,
    unit_of,
)

OWN_SETTINGS = "the run's settings"  # stands for a file: what the command line or config.json gave
ALIKE = 0.6  # of the lines of two definitions that are equal: one was renamed to the other
QUIET = ("not there", "unchanged", "not read")  # changes that are told once of several records
STATEMENTS = (ast.stmt, ast.excepthandler, ast.match_case)
MAX_WORDS = 20_000  # names that an unknown one is compared with
WORDS = re.compile(r"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+(\w{1,80})"
                   r"|^[ \t]*(\w{1,80})[ \t]*(?::[^=\n]{1,80})?=(?!=)", re.MULTILINE)


@dataclass(frozen=True)
class Version:
    """The definitions of a name in a program."""

    modules: tuple
    text: str
    unit: Unit


def history_of(name, records):
    """Events of `name` through numbered records: {"first", "last"} numbers, "record", "date" and "change" (not there,
    appears, reappears, unchanged, changed, constants only, comments only, moved, alone or before one of these,
    disappears, not read), with "modules", "from", "constants", "renamed", "diff", "why" where they apply.
    ValueError if no record holds the name."""
    name = name.strip().removesuffix("()")
    if not records:
        raise ValueError("no record is there: expected folders with logs of complete runs")
    read = [read_record(record, name) for record in records]
    chosen = choose(name, read, records)
    events, before, gone, last = [], None, None, None  # the version before, the last one at all, the record before
    for record, (found, why) in zip(records, read, strict=True):
        after = found.get(chosen)
        if why and not after:
            add_event(events, record, {"change": "not read", "why": why})
            continue
        event = event_of(before, after, gone)
        if (before is None) != (after is None) and last:
            event["renamed"] = renamed(chosen, before, after, parts_of(last), parts_of(record))
        add_event(events, record, event)
        before, gone, last = after, after or gone, record
    return {"name": chosen, "records": len(records), "events": events}


def parts_of(record):
    """Source of a record, {path: text}; the settings of one of our runs as one more file."""
    run = load_one(Path(record["log"]), False)
    settings = {key: value for key, value in settings_of(run).items() if str(key).isidentifier()}
    text = "".join(f"{key} = {value!r}\n" for key, value in settings.items())
    return run.trace.parts | ({OWN_SETTINGS: text} if text else {})


def read_record(record, name):
    """({qualified name: Version} of what `name` may mean, why the source cannot be read or "")."""
    parts, found, why = parts_of(record), {}, ""
    for module, text in parts.items():
        try:
            for qualified, *version in definitions(text, name) if language_of(module) == "Python" else ():
                found.setdefault(qualified, []).append((module, *version))
        except UNREADABLE as error:
            why = f"{module} does not parse: {error}"
    found = {qualified: version_of(entries) for qualified, entries in found.items()}
    return found, why if parts else "its log holds no source"


def version_of(entries):
    """Version of [(module, text, Unit)]: of a name that is defined for several cases all definitions count."""
    units = [unit for *_, unit in entries]
    text = "\n".join(text for _, text, _ in entries)
    constants = tuple(constant for unit in units for constant in unit.constants)
    form = b"".join(unit.form for unit in units)
    return Version(tuple(dict.fromkeys(module for module, *_ in entries)), text,
                   Unit(form, constants, text, sum(unit.size for unit in units)))


@functools.lru_cache(64)
def definitions(text, name):
    """[(qualified name, its text, Unit)] of the functions, classes and constants of a source that `name` may mean."""
    if not re.search(rf"\b{re.escape(name.rpartition('.')[2])}\b", text):
        return []
    if len(text) > MAX_PARSED:
        raise ValueError(f"it is longer than {MAX_PARSED:,} characters")
    lines = text.split("\n")
    nodes = [(qualified, node) for qualified, node in named_nodes(parse_python(text)[0]) if means(name, qualified)]
    return [(qualified, text_of(node, lines), unit_of(node, "")) for qualified, node in nodes]


def named_nodes(tree):
    """(qualified name, node) of all that a module names; of a function not its variables."""
    left = [(tree, "", True)]
    while left:
        node, prefix, constants = left.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            prefix, constants = (prefix + node.name)[:MAX_NAME], isinstance(node, ast.ClassDef)
            yield prefix, node
            prefix += "."
        elif constants:
            yield from ((prefix + name, node) for name in assigned(node))
        inner = (child for child in ast.iter_child_nodes(node) if isinstance(child, STATEMENTS))
        left += [(child, prefix, constants) for child in inner][::-1]


def assigned(node):
    """Names that a statement gives a value."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [item for target in targets for item in (target.elts if isinstance(target, ast.Tuple) else [target])]
    return [name.id for name in names if isinstance(name, ast.Name)]


def means(name, qualified):
    return qualified == name or qualified.endswith(f".{name}")


def text_of(node, lines):
    """The lines of a definition, its decorators included, as if it stood at the top of a file."""
    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    lines = lines[first - 1 : node.end_lineno]
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines)


def choose(name, read, records):
    """The qualified name that `name` means. ValueError if it means none or several."""
    known = dict.fromkeys(qualified for found, _ in read for qualified in found)
    if name in known or len(known) == 1:
        return name if name in known else next(iter(known))
    if known:
        listed = ", ".join([*known][:12]) + (f" and {len(known) - 12} more" if len(known) > 12 else "")
        raise ValueError(f"'{name}' is the name of several: give one of {listed}")
    words = {word for record in records for text in parts_of(record).values() for match in WORDS.findall(text)
             for word in match}
    near = get_close_matches(name.rpartition(".")[2], sorted(words - {""})[:MAX_WORDS], 5, 0.6)
    why = [why for _, why in read if why]
    raise ValueError(f"no record defines '{name}'" + (f"; near it are {', '.join(near)}" if near else "")
                     + (f"; {len(why)} of {len(read)} could not be read: {why[0]}" if why else ""))


def event_of(before, after, gone):
    """What happened to a definition from one record to the next, None: not there; `gone`: the last that was there."""
    if after is None:
        return {"change": "not there"} if before is None else {
            "change": "disappears", "modules": list(before.modules), "diff": text_diff(before, None)}
    if before is None:
        return {"change": "reappears" if gone else "appears", "modules": list(after.modules),
                "diff": text_diff(gone, after)}
    change, pairs = change_of(before.unit, after.unit)
    moved = before.modules != after.modules
    event = {"change": ", ".join(filter(None, ["moved" if moved else "", change])) or "unchanged"}
    event |= {"from": list(before.modules), "modules": list(after.modules)} if moved else {}
    event |= {"constants": [[x, y] for x, y in pairs]} if pairs else {}
    return event | ({"modules": list(after.modules), "diff": text_diff(before, after)} if change else {})


def text_diff(before, after):
    """Lines of the unified diff of two Versions."""
    a, b = (version.text.split("\n") if version else [] for version in (before, after))
    lines = line_diff(a, b)
    return [f"more than {MAX_LINES} lines"] if lines is None else lines


def renamed(name, before, after, old, new):
    """The name under which the definition `name` went on, or came from: of those that only one of two programs holds
    the one that shares most lines, ALIKE at least; None without one."""
    here, there = (new, old) if before is None else (old, new)
    known, lines = named(here), nameless_lines(name, (after or before).text)
    best, found = ALIKE, None
    for other, text in named(there).items() if len(lines) > 2 else ():
        if other not in known:
            its = nameless_lines(other, text)
            share = 2 * len(lines & its) / (len(lines) + len(its))
            best, found = (share, other) if share > best else (best, found)
    return found


def nameless_lines(name, text):
    """Lines of a definition without its own name."""
    return lines_of(re.sub(rf"\b{re.escape(name.rpartition('.')[2])}\b", "_", text))


def named(parts):
    """{name: text} of the functions, classes and methods of a program."""
    found = {}
    for module, text in parts.items():
        if language_of(module) != "Python" or len(text) > MAX_PARSED:
            continue
        try:
            nodes, lines = named_nodes(parse_python(text)[0]), text.split("\n")
            found |= {name: text_of(node, lines) for name, node in nodes if hasattr(node, "name")}
        except UNREADABLE:
            continue
    return found


def add_event(events, record, event):
    """Append an event of a record; equal ones without news become one of several records."""
    last = events[-1] if events else {"change": None}
    if event["change"] == last["change"] and event["change"] in QUIET and event.get("why") == last.get("why"):
        last["last"] = record["number"]
        return
    events.append({"first": record["number"], "last": record["number"], "record": record["name"],
                   "date": record["date"], **event})
