"""README: links into the source point at the lines they name, and files that it names exist.

    python tests/test_readme.py --write     # sets the line numbers
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)")  # [`name`](file.py#L12)


def definition(name: str, file: str) -> int | None:
    """Number of the line that defines a function, method, class, constant or field."""
    pattern = re.compile(rf"\s*(?:def|class) {name}\b|{name}(?:: \S+)? = ")
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), None)


def with_line_numbers(text: str) -> str:
    return LINK.sub(lambda link: f"[`{link[1]}`]({link[2]}#L{definition(link[1], link[2])})", text)


def test_links_into_the_source_name_the_right_lines():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(LINK.findall(text)) > 40
    wrong = [link[0] for link in LINK.finditer(text) if int(link[3]) != definition(link[1], link[2])]
    assert not wrong, f"python tests/test_readme.py --write corrects {wrong}"


def test_a_name_that_is_not_there_is_found_out():
    assert definition("no_such_function", "train_gpt.py") is None
    assert with_line_numbers("[`attend`](train_gpt.py#L1)") != "[`attend`](train_gpt.py#L1)"


def test_linked_files_exist():
    links = re.findall(r"\]\(([^)#:]+)(?:#\w+)?\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(links) > 10 and [link for link in links if not (ROOT / link).exists()] == []


if __name__ == "__main__" and sys.argv[1:] == ["--write"]:
    readme = ROOT / "README.md"
    readme.write_text(with_line_numbers(readme.read_text(encoding="utf-8")), encoding="utf-8")
