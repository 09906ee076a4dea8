"""The training scripts share code by copying it: one name is one text, or the copy says why it is not.

    python tests/test_shared_code.py             # lists the faults
    python tests/test_shared_code.py --write     # replaces drifted copies by the original, removes superfluous marks

The blocks KERNELS and SERVICE of train_gpt.py are byte for byte those of train_moe.py. All else goes by name:

Each script trains alone and imports none of the others. What is compared are the top-level functions, classes and
ALL_CAPS constants, with the comment directly above; the origin of a name is the first of SCRIPTS that has it. On the
line directly above a copy that must differ stands `# differs from train_gpt.py: <reason>`. A class with this mark may
differ in header, docstring and members of its own; the other methods and fields are compared one by one.
"""
import ast
import difflib
import hashlib
import io
import re
import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_shape import part_spans

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_gpt.py", "train_moe.py", "train_baseline.py", "train_grokking.py")
BLOCKS = ("KERNELS", "SERVICE")  # that are one text in the first two scripts
MARK = re.compile(r"\s*# differs from (\w+\.py|train_\w+)(?::(.*))?")
HEADING = re.compile(r"\s*# (┌|│|└|╔|║|╚|═|---)")
CONSTANT = re.compile(r"_?[A-Z][A-Z0-9_]*(, _?[A-Z][A-Z0-9_]*)*")
DIFF_LINES = 12  # most lines of a difference that are shown


@dataclass
class Unit:
    """What is compared: the lines first..last of a file, code from `start`, with its mark, if any, just above that."""

    file: str
    name: str  # a member's: Class.member
    parent: str
    first: int
    start: int
    last: int
    mark: re.Match | None
    lines: list[str]  # without marks


@dataclass
class Fault:
    file: str
    line: int
    text: str
    edit: tuple[int, int, list[str]] | None = None  # that repairs it: lines from, to this one become these

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


def name_of(node: ast.stmt, member: bool) -> str | None:
    """Name under which a statement is compared; None: it is not."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        decorators = [f"@{ast.unparse(decorator)}" for decorator in node.decorator_list]
        return " ".join([*decorators, "_"]) if node.name == "_" else node.name
    if isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        targets = [ast.unparse(target).strip("()") for target in targets]
        return " = ".join(targets) if member or all(map(CONSTANT.fullmatch, targets)) else None
    return None


def comment_lines(text: str) -> set[int]:
    """Numbers of the lines that hold nothing but a comment; text in strings is none."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return {t.start[0] for t in tokens if t.type == tokenize.COMMENT and not t.line[:t.start[1]].strip()}


class Script:
    """A parsed script: its units by name, members of classes included, and its marks by line."""

    def __init__(self, path: Path):
        self.file, text = path.name, path.read_bytes().decode()
        self.tree, self.lines, self.units = ast.parse(text, path), text.split("\n"), {}
        self.blocks = {name: span for name, span in part_spans(text).items() if name in BLOCKS}
        comments = {n: self.lines[n - 1] for n in comment_lines(text)}
        self.marks = {n: mark for n, line in comments.items() if (mark := MARK.match(line))}
        self.comments = {n for n, line in comments.items() if n not in self.marks and not HEADING.match(line)}
        for node in self.tree.body:
            self.add(node)

    def add(self, node: ast.stmt, parent: str = ""):
        if (name := name_of(node, bool(parent))) is None:
            return
        name = f"{parent}.{name}" if parent else name
        while name in self.units:
            name += "'"  # a property's setter, say: the second of a name is compared with the second
        start = min(n.lineno for n in [node, *getattr(node, "decorator_list", [])])
        first = start - (start - 1 in self.marks)
        while first - 1 in self.comments:
            first -= 1
        lines = [self.lines[n - 1] for n in range(first, node.end_lineno + 1) if n not in self.marks]
        mark = self.marks.get(start - 1)
        self.units[name] = Unit(self.file, name, parent, first, start, node.end_lineno, mark, lines)
        if isinstance(node, ast.ClassDef) and not parent:
            for member in node.body:
                self.add(member, name)

    def compared(self) -> list[Unit]:
        return [unit for unit in self.units.values() if not unit.parent or self.units[unit.parent].mark]

    def block_lines(self, name: str) -> list[str]:
        first, last = self.blocks[name]
        return self.lines[first - 1:last]

    def unit_at(self, line: int) -> str:
        """The function, class or constant of a line, or its number."""
        names = [unit.name for unit in self.units.values() if not unit.parent and unit.first <= line <= unit.last]
        return names[0] if names else f"line {line}"

    def import_faults(self, stems: set[str]) -> list[Fault]:
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        found = {(n.lineno, getattr(n, "module", None) or alias.name) for n in nodes for alias in n.names}
        return [Fault(self.file, line, f"imports {module}: a training script stands alone, copy the code")
                for line, module in found if module.split(".")[0] in stems]

    def stray_marks(self) -> list[Fault]:
        used = {unit.start - 1 for unit in self.compared()}
        text = ("this mark is above nothing that is compared: it belongs directly above a function, class or constant, "
                "or above a member of a class that has a mark, too")
        return [Fault(self.file, n, text) for n in self.marks if n not in used]


def block_fault(script: Script, name: str, origin: Script) -> Fault | None:
    """A block's difference from that of the origin, by hash: what differs first; --write copies the block."""
    there, here = origin.block_lines(name), script.block_lines(name)
    hashes = [hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12] for lines in (there, here)]
    if hashes[0] == hashes[1]:
        return None
    same = next((i for i, (one, other) in enumerate(zip(there, here, strict=False)) if one != other),
                min(len(there), len(here)))
    (first, last), at = script.blocks[name], script.blocks[name][0] + same
    unit = script.unit_at(at) if same < len(here) else origin.unit_at(origin.blocks[name][0] + same)
    shown = [f"{sign}{lines[same]}" for sign, lines in (("-", there), ("+", here)) if same < len(lines)]
    text = (f"block {name} is not that of {origin.file} (sha256 {hashes[0]} there, {hashes[1]} here), first in {unit}: "
            "python tests/test_shared_code.py --write copies it\n    ") + "\n    ".join(shown)
    return Fault(script.file, min(at, last), text, (first, last, there))


def block_faults(script: Script, origin: Script) -> list[Fault]:
    """Faults of the blocks that the first script has, in the second."""
    missing = [name for name in origin.blocks if name not in script.blocks]
    faults = [block_fault(script, name, origin) for name in origin.blocks if name in script.blocks]
    text = "has no block {}: copy the part of " + origin.file + " with its box of comment lines"
    return [Fault(script.file, len(script.lines), text.format(name)) for name in missing] + [*filter(None, faults)]


def drift(script: Script, unit: Unit, origin: Unit) -> Fault:
    """The difference; repaired only where no mark lies in the way: somebody meant that copy to differ."""
    diff = list(difflib.unified_diff(origin.lines, unit.lines, lineterm="", n=1))[2:]
    shown = diff[:DIFF_LINES] + ["..."] * (len(diff) > DIFF_LINES)
    text = (f"{unit.name} is not the text of {origin.file}:{origin.start}: --write copies that, "
            f"'# differs from {origin.file}: <reason>' on the line above allows it\n    ") + "\n    ".join(shown)
    marked = any(unit.first - 1 <= n <= unit.last for n in script.marks)
    return Fault(unit.file, unit.start, text, None if marked else (unit.first, unit.last, origin.lines))


def unit_fault(script: Script, unit: Unit, origin: Unit | None) -> Fault | None:
    """What is wrong with a unit, given the one of this name in the first of the earlier scripts that has it."""
    if not unit.mark:
        return drift(script, unit, origin) if origin and unit.lines != origin.lines else None
    line, (named, reason) = unit.start - 1, unit.mark.groups()
    if not origin:
        return Fault(unit.file, line, f"{unit.name} is marked as a copy, but no script before this one has it")
    if unit.lines == origin.lines:
        text = f"the mark is superfluous: {unit.name} is the text of {origin.file}:{origin.start}"
        return Fault(unit.file, line, text, (line, line, []))
    if named != origin.file:
        return Fault(unit.file, line, f"{unit.name} is marked as a copy from {named}, but comes from {origin.file}")
    if not (reason or "").strip():
        return Fault(unit.file, line, f"the mark needs a reason: '# differs from {named}: <reason>'")
    return None


def read_scripts(root: Path) -> list[Script]:
    return [Script(root / name) for name in SCRIPTS if (root / name).exists()]


def find_faults(root: Path) -> list[Fault]:
    """All faults, in the order of files and lines."""
    stems, origins, faults = {path.stem for path in root.glob("*.py")} - {"trackers"}, {}, []
    scripts = {script.file: script for script in read_scripts(root)}
    gpt = scripts.get(SCRIPTS[0])
    for script in scripts.values():
        twin = gpt is not None and script.file == SCRIPTS[1]
        whole = [script.blocks[name] for name in script.blocks if twin and name in gpt.blocks]  # not unit by unit
        units = [unit_fault(script, unit, origins.get(unit.name)) for unit in script.compared()
                 if not any(first <= unit.start <= last for first, last in whole)]
        found = [*script.import_faults(stems), *script.stray_marks(), *filter(None, units)]
        found += block_faults(script, gpt) if twin else []
        faults += sorted(found, key=lambda fault: fault.line)
        origins = script.units | origins
    return faults


def repair(root: Path) -> list[Fault]:
    """Applies edits, from the bottom of a file up, until none is left; returns what they repaired."""
    repaired = []
    while faults := [fault for fault in find_faults(root) if fault.edit]:
        for fault in reversed(faults):
            path, (first, last, new) = root / fault.file, fault.edit
            lines = path.read_bytes().decode().split("\n")
            lines[first - 1:last] = new
            path.write_bytes("\n".join(lines).encode())
        repaired += faults
    return repaired


def main(argv: list[str], root: Path = ROOT) -> int:
    """Lists the faults, after repairs with --write; 0 if there are none (left)."""
    if argv not in ([], ["--write"]):
        print(f"error: {' '.join(argv)!r}: the only argument is --write", file=sys.stderr)
        return 2
    for fault in repair(root) if argv else []:
        print(f"repaired {fault}")
    faults = find_faults(root)
    print(*faults or ["no faults"], sep="\n")
    return 1 if faults else 0


# --- the real scripts


def test_the_scripts_share_their_code():
    faults, (gpt, *others) = find_faults(ROOT), read_scripts(ROOT)
    assert gpt.file == "train_gpt.py" and len([unit for unit in gpt.units.values() if not unit.parent]) > 100
    assert not faults, "\n".join(["python tests/test_shared_code.py --write repairs drift:", *map(str, faults)])
    for moe in [script for script in others if script.file == "train_moe.py"]:
        assert set(BLOCKS) == gpt.blocks.keys() == moe.blocks.keys()
        common = [(unit, moe.units[name]) for name, unit in gpt.units.items() if name in moe.units and not unit.parent]
        assert len([unit for unit, copy in common if unit.lines == copy.lines]) > 50


def test_every_unit_of_the_real_script_is_guarded(tmp_path):
    """A copy is clean; with a remark behind the last line of each function, class and constant each one is found."""
    script = Script(ROOT / "train_gpt.py")
    (tmp_path / "train_gpt.py").write_bytes("\n".join(script.lines).encode())
    (tmp_path / "train_moe.py").write_bytes("\n".join(script.lines).encode())
    assert find_faults(tmp_path) == []
    units, lines = [unit for unit in script.units.values() if not unit.parent], list(script.lines)
    for unit in units:
        lines[unit.last - 1] += "  # other"
    (tmp_path / "train_moe.py").write_bytes("\n".join(lines).encode())
    inside = {unit.name: name for unit in units for name, (first, last) in script.blocks.items()
              if first <= unit.start <= last}
    faults = find_faults(tmp_path)
    blocks = [fault for fault in faults if fault.text.startswith("block ")]
    assert [fault.line for fault in faults if fault not in blocks] == [
        unit.start for unit in units if unit.name not in inside]
    for fault, name in zip(blocks, script.blocks, strict=True):  # the first unit of each block
        first = next(unit for unit in units if inside.get(unit.name) == name)
        assert f"first in {first.name}: " in fault.text
    assert len(repair(tmp_path)) == len(faults)
    assert (tmp_path / "train_moe.py").read_bytes() == (tmp_path / "train_gpt.py").read_bytes()


# --- the checker, on two small scripts

SMALL = '''"""Says what it does."""
import functools

low = 0

# ┌──────┐
# │ Data │
# └──────┘
# Rates of the stages,
# one for each.
RATES: dict = {"a": 1}
LIMIT = 3  # at most
MAGIC, VERSION = 7, 1


@functools.cache
def double(x):
    return 2 * x  # twice


@double.register
def _(x):
    return "one"


class Place:
    """Where."""

    # --- position
    row: int = 0  # from the top
    col = 0

    def move(self, by):
        self.row += by

    @property
    def area(self):
        return self.row * self.col

    @area.setter
    def area(self, value):
        self.row = value


if __name__ == "__main__":
    print(double(low))
'''
PLACE, WHY = ("class Place:", "# differs from train_gpt.py: two\nclass Place:"), "# differs from train_gpt.py: why\n"
DRIFTS = {  # what changes in the copy: the unit that is reported, the line that is named
    ("# one for each.", "# one for all."): ("RATES", "RATES: dict"),
    ("# one for each.\n", ""): ("RATES", "RATES: dict"),
    ("# one for each.\n", "# one for each.\n# Or one for all.\n"): ("RATES", "RATES: dict"),
    ('{"a": 1}', '{"a": 2}'): ("RATES", "RATES: dict"),
    ("# at most", "# at least"): ("LIMIT", "LIMIT = 3"),
    ("7, 1", "7, 2"): ("MAGIC, VERSION", "MAGIC, VERSION = 7"),
    ("@functools.cache\n", ""): ("double", "def double"),
    ("# twice", "# doubled"): ("double", "@functools.cache"),
    ('"one"', '"two"'): ("@double.register _", "@double.register"),
    ('"""Where."""', '"""There."""'): ("Place", "class Place"),
    ("# from the top", "# from below"): ("Place", "class Place"),
}


@pytest.fixture
def copy(tmp_path):
    """copy((old, new), ..) writes SMALL, and with these changes as a copy, and returns the faults."""
    def write(*changes, file: str = "train_moe.py") -> list[Fault]:
        text = SMALL
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "train_gpt.py").write_text(SMALL, encoding="utf-8")
        (tmp_path / file).write_text(text, encoding="utf-8")
        return find_faults(tmp_path)
    return write


def copied(tmp_path) -> str:
    return (tmp_path / "train_moe.py").read_text(encoding="utf-8")


def test_equal_scripts_and_one_script_have_no_faults(copy, tmp_path, capsys):
    assert copy() == [] and main(["--write"], tmp_path) == 0 and copied(tmp_path) == SMALL
    (tmp_path / "train_moe.py").unlink()
    assert main([], tmp_path) == 0 and capsys.readouterr().out == "no faults\n" * 2
    assert main(["--wirte"], tmp_path) == 2 and "--wirte" in capsys.readouterr().err


@pytest.mark.parametrize("change, expected", DRIFTS.items(), ids=str)
def test_drift_is_found_and_repaired(copy, tmp_path, capsys, change, expected):
    (fault,), (name, code) = copy(change), expected
    assert fault.text.startswith(f"{name} is not the text of train_gpt.py:") and re.search(r"\n    [-+]", fault.text)
    assert copied(tmp_path).split("\n")[fault.line - 1].startswith(code)
    assert main(["--write"], tmp_path) == 0 and copied(tmp_path) == SMALL
    assert f"repaired train_moe.py:{fault.line}: {name}" in capsys.readouterr().out
    assert main(["--write"], tmp_path) == 0 and capsys.readouterr().out == "no faults\n"
    if name != "Place":  # whose members would need marks, too
        code = next(line for line in SMALL.replace(*change).split("\n") if line.startswith(code))
        assert copy(change, (f"\n{code}\n", f"\n{WHY}{code}\n")) == []


def test_headings_other_statements_and_what_one_script_has_are_free(copy):
    assert copy(("│ Data │", "│ More │"), ("Says what", "Tells what"), ("low = 0", "low = 1"), ("low))", "1))"),
                ("LIMIT = 3", "FURTHER = 1\nLIMIT = 3"), ("MAGIC, VERSION = 7, 1", "# --- more"), PLACE,
                ("    def move(self, by):\n        self.row += by\n", "    def turn(self):\n        return self\n"),
                ('"""Where."""', '"""There."""'), ("# --- position", "# --- place")) == []


def test_members_of_a_marked_class_are_compared_one_by_one(copy, tmp_path):
    method, field = ("+= by", "-= by\n        return self"), ("# from the top", "# from below")
    setter = ("row = value", "col = value")
    faults = copy(PLACE, method, field, setter)
    assert [fault.text.split()[0] for fault in faults] == ["Place.row", "Place.move", "Place.area'"]
    assert main(["--write"], tmp_path) == 0 and copied(tmp_path) == SMALL  # and the class's mark is superfluous then
    marked = [PLACE, method, ("    def move", f"    {WHY}    def move"), ("    row: int", f"    {WHY}    row: int")]
    assert copy(*marked, field) == []
    (fault,) = copy(*marked, field, setter)
    assert fault.text.startswith("Place.area' ") and main(["--write"], tmp_path) == 0
    assert "-= by" in copied(tmp_path) and "from below" in copied(tmp_path) and "row = value" in copied(tmp_path)


# --- blocks

BOX = "# ╔═══════════╗\n# ║ {}: all ║\n# ╚═══════════╝\n\n"
FAST = BOX.format("KERNELS") + '# Why.\ndef fast(x):\n    return 3 * x\n\n\nWIDTH = 4\n\n\n'
AROUND = BOX.format("SERVICE") + "def start():\n    print(low)\n\n\n"
BLOCK_DRIFTS = {  # what changes in the copy's blocks: block, what is named, and the line that is
    ("3 * x", "3*x"): ("KERNELS", "fast", "    return 3*x"),
    ("# Why.", "# Because."): ("KERNELS", "fast", "# Because."),
    ("WIDTH = 4", "WIDTH = 5"): ("KERNELS", "WIDTH", "WIDTH = 5"),
    ("SERVICE: all", "SERVICE: alL"): ("SERVICE", "line {}", "# ║ SERVICE: alL ║"),
    ("    print(low)\n", "    print(low)  \n"): ("SERVICE", "start", "    print(low)  "),
    ("print(low)\n\n\n", "print(low)\n\n\ndef more():\n    return 1\n\n\n"): ("SERVICE", "more", "def more():"),
    ("def fast", f"{WHY}def fast"): ("KERNELS", "fast", WHY.rstrip()),
}


@pytest.fixture
def blocks(tmp_path):
    """blocks((old, new), ..) writes two scripts that have blocks, with changes in the second; returns the faults."""
    def write(*changes, gpt: str = "", moe: str = "") -> list[Fault]:
        head, main = SMALL.split("if __name__")
        tail = FAST + AROUND + "if __name__" + main
        text = tail
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "train_gpt.py").write_text(head + gpt + tail, encoding="utf-8")
        (tmp_path / "train_moe.py").write_text(head + moe + text, encoding="utf-8")
        return find_faults(tmp_path)
    return write


@pytest.mark.parametrize("change, expected", BLOCK_DRIFTS.items(), ids=str)
def test_a_block_is_compared_as_a_whole_and_copied(blocks, tmp_path, capsys, change, expected):
    assert blocks() == []
    faults, (name, unit, line) = blocks(change), expected
    (fault,) = [fault for fault in faults if fault.text.startswith("block ")]
    assert fault.text.startswith(f"block {name} is not that of train_gpt.py (sha256 ")
    assert f"first in {unit.format(fault.line)}: python tests/test_shared_code.py --write copies it" in fault.text
    assert copied(tmp_path).split("\n")[fault.line - 1] == line and f"+{line}" in fault.text
    assert main(["--write"], tmp_path) == 0
    assert copied(tmp_path) == (tmp_path / "train_gpt.py").read_text(encoding="utf-8")
    assert f"repaired train_moe.py:{fault.line}: block {name}" in capsys.readouterr().out


def test_a_block_that_ends_early_is_found(blocks, tmp_path):
    (fault,) = blocks(("\n\nWIDTH = 4\n\n\n", ""))
    assert fault.text.startswith("block KERNELS ") and "first in line" in fault.text and "\n    -" in fault.text
    assert main(["--write"], tmp_path) == 0 and "WIDTH = 4" in copied(tmp_path)


def test_both_blocks_and_the_rest_are_repaired_together(blocks, tmp_path):
    own = "def moe_only():\n    return 1\n\n\n"
    faults = blocks(("3 * x", "4 * x"), ("print(low)\n", "print(1)\n"), gpt="MORE = 1\n\n\n",
                    moe=own + "MORE = 2\n\n\n")
    assert [fault.text.split(" is ")[0] for fault in faults] == ["MORE", "block KERNELS", "block SERVICE"]
    assert main(["--write"], tmp_path) == 0
    assert own + "MORE = 1\n" in copied(tmp_path) and copied(tmp_path).endswith(
        (tmp_path / "train_gpt.py").read_text(encoding="utf-8").split("MORE = 1\n")[1])


def test_a_block_that_is_missing_is_told_and_left_to_a_person(blocks, tmp_path):
    (fault,) = blocks(("SERVICE: all", "OTHER: all"))
    assert fault.text == "has no block SERVICE: copy the part of train_gpt.py with its box of comment lines"
    assert main(["--write"], tmp_path) == 1


def test_a_name_of_a_block_is_the_origin_of_other_scripts_copies(blocks, tmp_path):
    blocks()
    (tmp_path / "train_baseline.py").write_text("def start():\n    print(1)\n", encoding="utf-8")
    (fault,) = find_faults(tmp_path)
    assert fault.file == "train_baseline.py" and fault.text.startswith("start is not the text of train_gpt.py")


# --- marks


@pytest.mark.parametrize("code", ["RATES: dict", "LIMIT = 3", "MAGIC, VERSION", "@functools.cache", "class Place"])
def test_a_superfluous_mark_is_found_and_removed(copy, tmp_path, code):
    (fault,) = copy((code, WHY + code))
    assert "superfluous" in fault.text and copied(tmp_path).split("\n")[fault.line - 1] + "\n" == WHY
    assert main(["--write"], tmp_path) == 0 and copied(tmp_path) == SMALL


@pytest.mark.parametrize("changes, text", [
    ([("LIMIT = 3", f"{WHY}MORE = 1\nLIMIT = 3")], "MORE is marked as a copy, but no script before this one has it"),
    ([("LIMIT = 3", "# differs from train_moe.py: why\nLIMIT = 4")], "LIMIT is marked as a copy from train_moe.py"),
    ([("LIMIT = 3", "# differs from train_gpt: why\nLIMIT = 4")], "LIMIT is marked as a copy from train_gpt, but"),
    ([("LIMIT = 3", "# differs from train_gpt.py: \nLIMIT = 4")], "the mark needs a reason"),
    ([("LIMIT = 3", "# differs from train_gpt.py\nLIMIT = 4")], "the mark needs a reason"),
    ([("low = 0", f"{WHY}low = 0")], "this mark is above nothing"),
    ([("    row: int", f"    {WHY}    row: int")], "this mark is above nothing"),
    ([("import functools", "import functools\nimport train_gpt as t")], "imports train_gpt"),
    ([("import functools", "import functools\nfrom . import train_gpt")], "imports train_gpt"),
    ([("@functools", f"{WHY}@functools"), ("return 2 * x  # twice", "from train_gpt import low")], "imports train_gpt"),
], ids=str)
def test_other_faults_stay_until_somebody_repairs_them(copy, tmp_path, capsys, changes, text):
    (fault,) = copy(*changes)
    before = copied(tmp_path)
    assert fault.text.startswith(text)
    assert main(["--write"], tmp_path) == 1 and copied(tmp_path) == before
    assert capsys.readouterr().out == f"{fault}\n" and str(fault).startswith(f"train_moe.py:{fault.line}: ")


@pytest.mark.parametrize("old, new", [
    ("# Rates of the stages,\n# one for each.\n", WHY + "# Rates of\n# others.\n"),  # the comment is between
    ("    def move(self, by):\n", f"    {WHY}    def move(self, *by):\n"),  # the class has none
], ids=str)
def test_a_difference_with_a_mark_in_a_wrong_place_is_not_overwritten(copy, tmp_path, old, new):
    faults = copy((old, new))
    assert len(faults) == 2 and main(["--write"], tmp_path) == 1 and new in copied(tmp_path)


def test_a_name_comes_from_the_first_script_that_has_it(copy):
    assert copy(("LIMIT = 3", f"MORE = 1\n{WHY}LIMIT = 5")) == []
    faults = copy(("LIMIT = 3", "MORE = 2\nLIMIT = 4"), file="train_baseline.py")
    assert [(fault.file, fault.edit) for fault in faults] == [
        ("train_baseline.py", (12, 12, ["MORE = 1"])), ("train_baseline.py", (13, 13, ["LIMIT = 3  # at most"]))]
    why = ("LIMIT = 3", "# differs from train_moe.py: why\nMORE = 2\nLIMIT = 3")
    assert copy(why, file="train_baseline.py") == []


def test_a_long_difference_is_cut(copy):
    (fault,) = copy(("    return 2 * x  # twice", "\n".join(f"    x += {n}" for n in range(99))))
    assert fault.text.count("\n") == DIFF_LINES + 1 and fault.text.endswith("\n    ...")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
