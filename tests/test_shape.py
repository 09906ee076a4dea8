"""The shape of the code keeps its budgets: lines of files and parts, sizes of functions, widths of lines.

    python tests/test_shape.py      # the numbers of every script, of bench/ and runlogs/ as a table

A line of code holds a token that is neither a comment nor part of a docstring. A function's size is that of its `def`
to its last line, functions within it included. The parts of a script are marked by boxes of three comment lines:

    # ╔═══════════════════╗
    # ║ KERNELS: the fast ║
    # ╚═══════════════════╝
"""
import ast
import io
import re
import sys
import tokenize
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINES = {"train_gpt.py": 3636, "train_moe.py": 4372, "train_baseline.py": 1829, "train_grokking.py": 749,
         "README.md": 200}
TOGETHER = {  # name: most lines of several files together, the files
    "bench/": (6355, "bench/*.py"), "logger.py, runlogs/": (8440, "logger.py runlogs/*.py"),
    "export.py, exports/": (1110, "export.py exports/*.py evals/lm_eval_model.py")}
PARTS = {"RECORD": 1476, "KERNELS": 575, "SERVICE": 1520}  # lines of the parts of train_gpt.py
SCRIPTS = [name for name in LINES if name.endswith(".py")]
MEDIAN, LONGEST = 10, 80  # lines of a function
WIDE, WIDE_SHARE = 100, 0.10  # characters of a line, indentation included; share of such lines
AVERAGE = 52  # characters of a line of code without indentation
RULER = re.compile(r"# \S?═{3,}")
TITLE = re.compile(r"# ║ (\w+)")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


class Function(NamedTuple):
    name: str
    line: int
    lines: int


class Shape(NamedTuple):
    """The numbers of one source or of several together."""

    functions: list[Function]
    code: list[str]  # lines of code

    def __add__(self, other: "Shape") -> "Shape":
        return Shape(self.functions + other.functions, self.code + other.code)

    @property
    def median(self) -> float:
        return median(f.lines for f in self.functions) if self.functions else 0

    @property
    def longest(self) -> Function:
        return max(self.functions, key=lambda f: f.lines, default=Function("none", 0, 0))

    @property
    def wide_share(self) -> float:
        return sum(len(line) > WIDE for line in self.code) / max(1, len(self.code))

    @property
    def average(self) -> float:
        return mean(len(line.strip()) for line in self.code) if self.code else 0


def docstring_lines(tree: ast.Module) -> set[int]:
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, owners) and ast.get_docstring(node) is not None]
    return {n for node in nodes for n in range(node.body[0].lineno, node.body[0].end_lineno + 1)}


def code_lines(text: str) -> list[str]:
    """Lines with code on them; those of a string of several lines all count."""
    found, lines = set(), text.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            found.update(range(token.start[0], token.end[0] + 1))
    found -= docstring_lines(ast.parse(text))
    return [lines[n - 1] for n in sorted(found) if lines[n - 1].strip()]


def shape(text: str, file: str = "") -> Shape:
    """The shape of one source."""
    defs = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    functions = [Function(f"{file}:{n.lineno} {n.name}", n.lineno, n.end_lineno - n.lineno + 1) for n in defs]
    return Shape(functions, code_lines(text))


def line_count(text: str) -> int:
    return len(text.splitlines())


def part_spans(text: str) -> dict[str, tuple[int, int]]:
    """Part -> numbers of the first line of its box and of the last line before the next box, or of all."""
    lines, boxes = text.splitlines(), []
    for n in range(2, len(lines)):
        above, line, below = lines[n - 2:n + 1]
        if (title := TITLE.match(line)) and RULER.match(above) and RULER.match(below):
            boxes.append((title[1], n - 1))
    ends = [first - 1 for _, first in boxes[1:]]
    return {name: (first, last) for (name, first), last in zip(boxes, [*ends, len(lines)], strict=False)}


def part_lines(text: str) -> dict[str, int]:
    return {name: last - first + 1 for name, (first, last) in part_spans(text).items()}


def shape_faults(what: str, found: Shape) -> list[str]:
    """A sentence for each limit that is passed."""
    faults, longest = [], found.longest
    if found.median > MEDIAN:
        faults.append(f"{what}: the median function has {found.median:g} lines, the limit is {MEDIAN}")
    if longest.lines > LONGEST:
        faults.append(f"{what}: {longest.name} has {longest.lines} lines, the limit is {LONGEST}")
    if found.wide_share > WIDE_SHARE:
        faults.append(f"{what}: {100 * found.wide_share:.1f} % of the lines of code have more than {WIDE} characters, "
                      f"the limit is {100 * WIDE_SHARE:g} %")
    if found.average > AVERAGE:
        faults.append(f"{what}: a line of code has {found.average:.1f} characters on average, the limit is {AVERAGE}")
    return faults


def size_faults(sizes: dict[str, int], limits: dict[str, int]) -> list[str]:
    """A sentence for each size above its limit, and for each limit that nothing has."""
    faults = [f"{name}: there is no such part or file" for name in limits if name not in sizes]
    return faults + [f"{name}: {size} lines, the limit is {limits[name]}" for name, size in sizes.items()
                     if name in limits and size > limits[name]]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def files_of(name: str) -> list[str]:
    paths = [path for pattern in TOGETHER[name][1].split() for path in ROOT.glob(pattern)]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


def lines_together(name: str) -> int:
    return sum(line_count(read(file)) for file in files_of(name))


def shape_together(name: str) -> Shape:
    total = Shape([], [])
    for file in files_of(name):
        total += shape(read(file), file)
    return total


# --- the tree


@pytest.mark.parametrize("name", LINES)
def test_lines_of_a_file(name):
    faults = size_faults({name: line_count(read(name))}, {name: LINES[name]})
    assert not faults, faults[0]


@pytest.mark.parametrize("name", TOGETHER)
def test_lines_of_several_files(name):
    count, most = lines_together(name), TOGETHER[name][0]
    assert len(files_of(name)) > 5 and count <= most, f"{name}: {count} lines together, the limit is {most}"


def test_lines_of_the_parts_of_train_gpt():
    faults = size_faults(part_lines(read("train_gpt.py")), PARTS)
    assert not faults, "\n".join(f"train_gpt.py, {fault}" for fault in faults)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shape_of_a_script(name):
    found = shape(read(name), name)
    assert len(found.functions) > 20 and len(found.code) > 200
    faults = shape_faults(name, found)
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("name", TOGETHER)
def test_shape_of_several_files(name):
    faults = shape_faults(name, shape_together(name))
    assert not faults, "\n".join(faults)


# --- the measures, on sources whose numbers are known

SMALL = '''"""A docstring
of two lines."""
import os  # a comment behind code


# a comment
class Place:
    """Where."""

    row: int = 0

    @property
    def area(self):
        """Its size.

        In metres."""
        # nothing
        return (self.row *
                2)

    async def move(self): return """one
    # two

    three"""


def outer():
    def inner():
        return 1

    return inner
'''


def function(lines: int, name: str = "f") -> str:
    """A function of so many lines."""
    return "\n".join([f"def {name}():", *["    a = 1"] * (lines - 1), ""])


def test_code_is_what_is_neither_comment_nor_docstring():
    assert [line.strip() for line in code_lines(SMALL)] == [
        "import os  # a comment behind code", "class Place:", "row: int = 0", "@property", "def area(self):",
        "return (self.row *", "2)", 'async def move(self): return """one', "# two", 'three"""', "def outer():",
        "def inner():", "return 1", "return inner"]
    assert code_lines('"""Only this."""\n# and that\n') == [] and code_lines("") == []
    assert code_lines("a = 1\n'a string that is no docstring'\n") == ["a = 1", "'a string that is no docstring'"]


def test_functions_are_counted_from_def_to_end():
    found = shape(SMALL, "small.py")
    assert {f.name.split()[1]: f.lines for f in found.functions} == {"area": 7, "move": 4, "outer": 5, "inner": 2}
    assert found.median == 4.5 and found.longest == Function("small.py:13 area", 13, 7)
    assert shape("").median == 0 and shape("").longest.lines == 0 and shape("").average == 0


def test_averages_leave_indentation_out_and_widths_do_not():
    found = shape("b" * 101 + "\nif 1:\n    a = 10\n    if 2:\n        " + "c" * 93 + "\n")
    assert found.average == (101 + 5 + 6 + 5 + 93) / 5 and found.wide_share == 0.4
    assert shape("b" * 100).wide_share == 0
    both = shape("a = 1\n") + shape("a = 1234\n")
    assert both.average == (5 + 8) / 2 and both.functions == []


@pytest.mark.parametrize("text, words", [
    (function(11), ["x.py: the median function has 11 lines", "limit is 10"]),
    (function(81, "long") + function(2) + function(2), ["x.py:1 long has 81 lines", "limit is 80"]),
    ("a = 1\n" * 8 + f"a = '{'b' * 96}'\n", ["11.1 % of the lines of code have more than 100", "limit is 10 %"]),
    (f"a = '{'b' * 47}'\n", ["a line of code has 53.0 characters", "limit is 52"]),
])
def test_each_limit_can_be_passed(text, words):
    (fault,) = shape_faults("x.py", shape(text, "x.py"))
    assert all(word in fault for word in words), fault


def test_at_its_limits_a_source_has_no_fault():
    text = function(80) + function(10) + function(10) + "a = 1\n" * 8 + f"a = '{'b' * 96}'\n"
    assert shape_faults("x.py", shape(text)) == []
    assert shape_faults("x.py", shape(f"a = '{'b' * 46}'\n")) == []


def test_parts_reach_from_box_to_box():
    box = "# ╔════════╗\n# ║ {}: what ║\n# ╚════════╝\n"
    text = "head = 1\n" + box.format("RECORD") + "a = 1\n\n" + box.format("KERNELS") + box.format("SERVICE") + "b = 2"
    assert part_lines(text) == {"RECORD": 5, "KERNELS": 3, "SERVICE": 4}
    plain = "# ═════\n# ║ RECORD\n# ═════\na = 1\n"
    assert part_lines(plain) == {"RECORD": 4}
    assert part_lines("# ║ RECORD\n" + plain) == {"RECORD": 4}  # without rulers it is a comment
    assert part_lines("a = 1\n") == {} == part_lines("")


def test_sizes_above_their_limit_are_told():
    assert size_faults({"RECORD": 7, "SERVICE": 9, "OTHER": 99}, {"RECORD": 7, "SERVICE": 8, "KERNELS": 3}) == [
        "KERNELS: there is no such part or file", "SERVICE: 9 lines, the limit is 8"]
    assert line_count("a\nb\n") == line_count("a\nb") == 2


def main():
    print(f"{'file':24} {'lines':>6} {'limit':>6} {'code':>6} {'median':>7} {'longest':>8} {'>100':>6} {'average':>8}")
    rows = [(name, line_count(read(name)), LINES[name], shape(read(name), name)) for name in SCRIPTS]
    rows += [(name, lines_together(name), most, shape_together(name)) for name, (most, _) in TOGETHER.items()]
    for name, lines, limit, s in rows:
        print(f"{name:24} {lines:6} {limit:6} {len(s.code):6} {s.median:7g} {s.longest.lines:8} "
              f"{100 * s.wide_share:5.1f}% {s.average:8.1f}")
    for name, lines in part_lines(read("train_gpt.py")).items():
        print(f"{'  ' + name:24} {lines:6} {PARTS.get(name, ''):>6}")
    print(f"{'README.md':24} {line_count(read('README.md')):6} {LINES['README.md']:6}")


if __name__ == "__main__":
    sys.exit(main())
