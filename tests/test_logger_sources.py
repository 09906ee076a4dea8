"""Tests of what logger.py does with sources: their differences, packages, files written from a log, the history of a
function through records. Programs here are {path: text}; two of them are written as logs."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_logger_commands import (
    CODE,
    MACHINE,
    QUICK,
    change,
    command,
    error,
    log_text,
    make_group,
    make_ours,
    numbers,
)

from runlogs import extracting, history, packages, reporting, sources

# -- diff


OUTSIDE = "only comments and blank lines outside of functions differ"
DIFFS = [  # change of the source, settings (name, A, B), units (name, change)
    (("steps: int = 100", "steps: int = 90"), [("Args.steps", "100", "90")], []),
    (("RATE, BLOCK = 0.05,", "RATE, BLOCK = 0.06,"), [("RATE", "0.05", "0.06")], []),
    (("width=768", "width=1024, heads=8"),
     [("PRESETS[gpu].width", "768", "1024"), ("PRESETS[gpu].heads", None, "8")], []),
    (("steps=(1, 2)", "steps=(1, 3)"), [("PRESETS[cpu].steps", "(1, 2)", "(1, 3)")], []),
    (("cooldown=0.4", "cooldown=0.5"), [("get_lr(cooldown)", "0.4", "0.5")], []),
    (("momentum=0.95", "momentum=0.9"), [("optimizer.momentum", "0.95", "0.9")], []),
    (("return 0.1 *", "return 0.05 *"), [("inside get_lr()", "0.1", "0.05")], [("get_lr()", "constants only")]),
    (("return 1.0", 'return "1.0"'), [("inside get_lr()", "1.0", "'1.0'")], [("get_lr()", "constants only")]),
    (("range(3)", "range(4)"), [("inside module level", "3", "4")], [("module level", "constants only")]),
    (("self.steps * BLOCK", "self.steps"), [], [("Args.total()", "changed")]),
    (("# of training", "# of all"), [], []),
    (('"""Rate at a step."""', '"""Another text."""'), [], [("get_lr()", "comments only")]),
    (("[1,\n            2]", "[1, 2]  # x"), [], [("helper()", "comments only")]),
    (("\n\ndef helper", "\n\ndef more():\n    pass\n\n\ndef helper"), [], [("more()", "added")]),
    (("class Args:", "class Args(Base):"), [], [("Args", "changed")]),
]


@pytest.mark.parametrize(("edit", "expected", "units"), DIFFS)
def test_diff_names_what_changed(edit, expected, units):
    found = sources.compare_parts({"train_gpt.py": CODE}, {"train_gpt.py": change(*edit)})
    assert [(s["name"], s["a"], s["b"]) for s in found["settings"]] == expected
    assert [(u["name"], u["change"]) for u in found["units"]] == units
    assert found["notes"] == ([] if expected or units else [OUTSIDE])
    back = sources.compare_parts({"train_gpt.py": change(*edit)}, {"train_gpt.py": CODE})
    assert {(s["name"], s["b"], s["a"]) for s in back["settings"]} == set(expected)


def test_diff_of_other_files_and_other_languages():
    old = {"train_gpt.py": "x = (1\n", "kernels.py": "TILE = 1\n", "old.py": ""}
    new = {"train_gpt.py": "x = (2\n", "kernels.py": "TILE = 2\n", "new.py": ""}
    found = sources.compare_parts(old, new)
    assert found["settings"] == [{"name": "kernels.py: TILE", "a": "1", "b": "2"}]
    assert [(u["name"], u["change"]) for u in found["units"]] == [("old.py", "file removed"), ("new.py", "file added")]
    assert len(found["notes"]) == 2 and all("compared as text only" in note for note in found["notes"])
    assert "-x = (1" in sources.unified(old, new, "ab") and "+x = (2" in sources.unified(old, new, "ab")


@QUICK
@given(st.lists(st.sampled_from(CODE.splitlines()) | st.text(max_size=10), max_size=20).map("\n".join))
def test_any_source_can_be_compared(text):
    for old, new in ((CODE, text), (text, CODE)):
        found = sources.compare_parts({"a": old}, {"a": new})
        assert old == new or found["settings"] or found["units"] or found["notes"]


@pytest.mark.parametrize("text", ["(" * 5000, "-" * 100_000 + "1", "x = '\0'", "[" * 300 + "]" * 300,
                                  "f(" * 90 + ")" * 90, "x" + " + x" * 900, "x" + ".x" * 900, "a = " * 900 + "1"])
def test_hostile_sources_do_not_raise(text):
    sources.compare_parts({"a": text}, {"a": CODE})


def test_diff_command(tmp_path, capsys):
    a = make_group(tmp_path / "a", [3.280, 3.282], [2.0, 2.2])
    code, machine = change("return 0.1 *", "return 0.05 *"), MACHINE.replace("2.9.0", "2.10.0")
    b = make_group(tmp_path / "b", [3.270, 3.272], [1.0, 1.2], code=code, machine=machine)
    found = numbers(capsys, "diff", a, b)
    assert found["settings"] == [{"name": "inside get_lr()", "a": "0.1", "b": "0.05"}]
    assert found["environment"] == [{"name": "torch", "a": "2.9.0", "b": "2.10.0"}]
    assert found["effect"]["val_loss"]["difference"] == pytest.approx(-0.01)
    assert found["effect"]["train_time_s"]["test"]["difference"] == pytest.approx(-1)
    assert "-    return 0.1 * cooldown" in found["unified_diff"]
    code, out, _ = command(capsys, "diff", a, b)
    order = [out.index(text) for text in ("setting or constant", "function or class", "--- a/", "environment", "B - A")]
    assert code == 0 and order == sorted(order) and "no setting or constant differs" not in out
    assert "--- a/" not in command(capsys, "diff", a, b, "--no-text")[1]
    assert "`" * 12 + "diff" in command(capsys, "diff", a, b, "--markdown")[1]
    same = command(capsys, "diff", a / "run_0.txt", a / "run_1.txt")[1]
    assert "the same\n" not in same and "file is" not in same  # one file alone is not counted
    assert "no setting or constant differs" in same and "the same Python, PyTorch, driver and hardware" in same


def test_diff_of_our_runs_shows_the_settings(tmp_path, capsys):
    make_ours(tmp_path / "a", [4.0, 3.5])
    make_ours(tmp_path / "b", [4.0, 3.4], seed=1, width=64, new=[1])
    found = numbers(capsys, "diff", tmp_path / "a", tmp_path / "b")
    expected = [{"name": "setting width", "a": "32", "b": "64"},
                {"name": "setting new", "a": "null", "b": "[1]"}]
    assert found["settings"] == expected and found["effect"]["n_a"] == 1


# -- diff of sources with the parts RECORD, KERNELS and SERVICE


def box(word):
    return f"# ╔{'═' * 60}╗\n# ║ {word + ' ' * (59 - len(word))}║\n# ╚{'═' * 60}╝\n"


KERNELS = "def kernel(x):\n    return x\n"
SERVICE = "LIMIT = 3\n\n\nclass Loader:\n    def next(self):\n        return 1\n\n\ndef main():\n    return Loader()\n"


def boxed(record=CODE, kernels=KERNELS, service=SERVICE):
    """A source in three parts; the docstring stands before the first box."""
    about, rest = record.split("\n", 1)
    return "\n".join([about, box("RECORD: what a competitor changes") + rest, box("KERNELS") + kernels,
                      box("SERVICE, byte-identical in both scripts") + service])


def compare_boxed(old, new):
    return sources.compare_parts({"train_gpt.py": old}, {"train_gpt.py": new})


def test_parts_that_are_the_same_are_not_listed():
    record = change("return 0.1 *", "return 0.05 *", change("def helper", "def more():\n    pass\n\n\ndef helper"))
    record = change("self.steps * BLOCK", "self.steps", record)
    found = compare_boxed(boxed(), boxed(record))
    assert found["blocks"] == ["record differs: units 2 changed, 1 added, 0 removed; lines 6 added, 2 removed",
                               "kernels unchanged", "service unchanged"]
    assert {(u["name"], u["change"]) for u in found["units"]} == {
        ("Args.total()", "changed"), ("get_lr()", "constants only"), ("more()", "added")}
    assert compare_boxed(boxed(record), boxed())["blocks"][0] == (
        "record differs: units 2 changed, 0 added, 1 removed; lines 2 added, 6 removed")


def test_a_service_that_differs_is_listed_after_the_record():
    service = change("LIMIT = 3", "LIMIT = 4", change("return Loader()", "return None", SERVICE))
    record = change("return [1,", "return [3, 1,")
    found = compare_boxed(boxed(), boxed(record, service=service))
    assert found["blocks"] == ["record differs: units 1 changed, 0 added, 0 removed; lines 1 added, 1 removed",
                               "kernels unchanged",
                               "service differs: units 1 changed, 0 added, 0 removed; lines 2 added, 2 removed"]
    assert [u["name"] for u in found["units"]] == ["helper()", "SERVICE: main()"]
    assert found["settings"] == [{"name": "SERVICE: LIMIT", "a": "3", "b": "4"}]


def test_what_moves_into_another_part_and_comments():
    found = compare_boxed(boxed(), boxed(CODE + KERNELS, kernels="\n"))
    assert found["units"] == [{"name": "kernel()", "change": "moved", "from": "KERNELS of train_gpt.py",
                               "to": "RECORD of train_gpt.py"}]
    counts = "differs: units 0 changed, 0 added, 0 removed, 1 moved; lines"
    assert found["blocks"] == [f"record {counts} 2 added, 0 removed", f"kernels {counts} 1 added, 2 removed",
                               "service unchanged"]
    found = compare_boxed(boxed(), boxed(service=SERVICE + "# the end\n"))
    assert found["blocks"][2].startswith("service differs: units 0 changed") and not found["units"]
    assert found["notes"] == [f"SERVICE: {OUTSIDE}"]
    found = compare_boxed(boxed(), boxed(service="(" + SERVICE))
    assert len(found["notes"]) == 1 and found["notes"][0].startswith("SERVICE of train_gpt.py of B does not parse")


@pytest.mark.parametrize("source", [
    CODE, CODE + box("SERVICES"), CODE + box("service"), box("SERVICE").replace("#", " #"),
    box("RECORD").replace("║", "|"), CODE + box("RECORD").split("\n", 1)[1],
])
def test_sources_without_boxes_are_treated_as_one(source):
    assert list(sources.blocks_in(source)) == [""]
    for old, new in ((boxed(), source), (source, boxed())):
        found = compare_boxed(old, new)
        assert found["blocks"] == [] and (found["units"] or found["notes"])


def test_blocks_hold_all_of_the_source_but_the_boxes():
    parts = sources.blocks_in(boxed())
    assert list(parts) == ["RECORD", "KERNELS", "SERVICE"] and parts["SERVICE"] == SERVICE
    assert parts["RECORD"].strip() == CODE.strip() and parts["KERNELS"].strip() == KERNELS.strip()
    last = sources.blocks_in(box("KERNELS") + "a = 1\n" + box("SERVICE").rstrip("\n"))
    assert last == {"RECORD": "", "KERNELS": "a = 1\n", "SERVICE": ""}


def test_diff_command_names_the_parts(tmp_path, capsys):
    a = make_group(tmp_path / "a", [3.280], code=boxed())
    b = make_group(tmp_path / "b", [3.270], code=boxed(change("return 0.1 *", "return 0.05 *")))
    assert numbers(capsys, "diff", a, b)["blocks"][1:] == ["kernels unchanged", "service unchanged"]
    lines = command(capsys, "diff", a, b)[1].splitlines()
    assert lines[2].startswith("record differs: units 1 changed")
    assert lines[3:5] == ["kernels unchanged", "service unchanged"]


# -- packages

NORM = "def norm(x):\n    scale = sum(value * value for value in x) ** 0.5\n    return [value / scale for value in x]\n"
STEP = "def step(x, rate=0.1):\n    for value in x:\n        x = [value - rate * y for y in x]\n    return x\n"
MAIN = "from track.model import norm\nfrom track.optim import step\n\nprint(step(norm([3.0, 4.0])))\n"
PACKAGE = {"train_gpt.py": MAIN, "track/__init__.py": "", "track/model.py": NORM,
           "track/optim.py": "RATE = 3\n\n\n" + STEP,
           "exact_match/src/lib.rs": "//! Rows.\npub fn rows(n: usize) -> usize { n * 2 }\n"}


def compared(old, new):
    """(units as {name: change}, settings as {name: (a, b)}) of two programs."""
    found = sources.compare_parts(old, new)
    settings = {s["name"]: (s["a"], s["b"]) for s in found["settings"]}
    return {u["name"]: u["change"] for u in found["units"]}, settings


def modules(old, new):
    return {m["name"]: (m["change"], m["from"]) for m in sources.compare_parts(old, new)["modules"]}


def without(name, **more):
    """The package without a file, and with others."""
    return {path: text for path, text in PACKAGE.items() if path != name} | more


def test_a_package_is_compared_file_by_file():
    new = PACKAGE | {"track/model.py": NORM.replace("0.5", "0.25")}
    new |= {"track/optim.py": PACKAGE["track/optim.py"] + "# x\n"}
    found = sources.compare_parts(PACKAGE, new)
    assert [(m["name"], m["change"], m["lines_added"], m["lines_removed"]) for m in found["modules"]] == [
        ("track/model.py", "changed", 1, 1), ("track/optim.py", "changed", 1, 0)]
    assert found["same_modules"] == 3 and found["not_compared"] == []
    assert found["units"] == [{"name": "track/model.py: norm()", "change": "constants only"}]
    assert found["settings"] == [{"name": "track/model.py: inside norm()", "a": "0.5", "b": "0.25"}]
    assert found["notes"] == [f"track/optim.py: {OUTSIDE}"]


def test_files_that_moved_or_were_renamed():
    text = PACKAGE["track/optim.py"]
    assert modules(PACKAGE, without("track/optim.py") | {"track/more/optim.py": text}) == {
        "track/more/optim.py": ("moved", "track/optim.py")}
    assert modules(PACKAGE, without("track/optim.py") | {"track/muon.py": text}) == {
        "track/muon.py": ("renamed", "track/optim.py")}
    new = without("track/optim.py") | {"track/muon.py": text.replace("RATE = 3", "RATE = 4")}
    assert modules(PACKAGE, new) == {"track/muon.py": ("renamed, changed", "track/optim.py")}
    units, settings = compared(PACKAGE, new)
    assert units == {} and settings == {"track/muon.py: RATE": ("3", "4")}
    moved = without("track/optim.py") | {"track/more/optim.py": text}
    assert sources.unified(PACKAGE, moved, "ab") == ["--- a/track/optim.py", "+++ b/track/more/optim.py"]
    lines = sources.unified(PACKAGE, new, "ab")
    assert lines[:2] == ["--- a/track/optim.py", "+++ b/track/muon.py"] and "+RATE = 4" in lines
    new = without("track/optim.py") | {"track/muon.py": "import os\n\nprint(os.name)\n"}
    assert modules(PACKAGE, new) == {"track/optim.py": ("removed", "track/optim.py"), "track/muon.py": ("added", None)}


def test_of_equal_files_the_one_of_the_same_name_is_meant():
    old = {"train_gpt.py": MAIN, "a/x.py": STEP, "a/y.py": STEP}
    new = {"train_gpt.py": MAIN, "b/y.py": STEP, "b/x.py": STEP}
    assert packages.pair_files(old, new) == [("train_gpt.py",) * 2, ("a/x.py", "b/x.py"), ("a/y.py", "b/y.py")]


def test_files_are_known_by_the_names_of_their_functions():
    old = {"m/old.py": "".join(f"def function_{i}():\n    return {i}\n" for i in range(4))}
    new = {"m/new.py": "".join(f"def function_{i}():\n    yield {i} + {i}\n" for i in range(4))}
    assert packages.pair_files(old, new) == [("m/old.py", "m/new.py")]
    assert packages.pair_files(old, {"m/new.rs": new["m/new.py"]}) == [("m/old.py", None), (None, "m/new.rs")]


def test_files_that_share_less_than_half_of_their_lines_are_others():
    lines = [f"value_{i} = {i}\n" for i in range(40)]
    old, alike, other = "".join(lines[:20]), "".join(lines[8:26]), "".join(lines[14:36])
    assert packages.pair_files({"a.py": old}, {"b.py": alike}) == [("a.py", "b.py")]
    assert packages.pair_files({"a.py": old}, {"b.py": other}) == [("a.py", None), (None, "b.py")]
    halves = {"a.py": "".join(lines[:18]), "c.py": "".join(lines[18:34])}  # both are in one new file: the larger is it
    assert packages.pair_files(halves, {"b.py": "".join(lines[:34])}) == [("a.py", "b.py"), ("c.py", None)]


def test_a_script_against_a_package():
    script = {"train_gpt.py": f"RATE = 3\n\n\n{NORM}\n\n{STEP}\n\nprint(step(norm([3.0, 4.0])))\n"}
    units, settings = compared(script, without("exact_match/src/lib.rs"))
    assert settings == {} and units.pop("module level") == "changed"
    assert {name for name, kind in units.items() if kind == "moved"} == {
        "track/model.py: norm()", "track/optim.py: step()"}
    assert set(units.values()) == {"moved", "file added"}
    units, settings = compared(without("exact_match/src/lib.rs"), script)  # and back
    assert {"norm()": "moved", "step()": "moved"}.items() <= units.items() and settings == {}


@pytest.mark.parametrize(("edit", "change", "settings"), [
    (("0.5", "0.25"), "moved, constants only", {"track/model.py: inside norm()": ("0.5", "0.25")}),
    (("value * value", "abs(value)"), "moved, changed", {}),
    (("    return", "    # norm\n    return"), "moved, comments only", {}),
    (("norm(x)", "norm(x, p=2)"), "moved, changed", {"track/model.py: norm(p)": (None, "2")}),
])
def test_a_function_that_moved_and_changed(edit, change, settings):
    old = {"train_gpt.py": MAIN + NORM}
    new = {"train_gpt.py": MAIN, "track/model.py": NORM.replace(*edit)}
    units, found = compared(old, new)
    assert units["track/model.py: norm()"] == change and "norm()" not in units and found == settings


def test_settings_that_moved():
    old = {"train_gpt.py": MAIN + "RATE, SIZE = 3, 4\nGONE = 1\n" + STEP}
    new = {"train_gpt.py": MAIN, "track/config.py": "RATE, SIZE = 3, 5\n", "track/optim.py": STEP.replace("0.1", "0.2")}
    units, settings = compared(old, new)
    assert settings == {"track/config.py: SIZE": ("4", "5"), "track/optim.py: step(rate)": ("0.1", "0.2"),
                        "GONE": ("1", None)}
    assert units["track/optim.py: step()"] == "moved"


def test_of_settings_of_one_name_those_of_one_value_belong_together():
    old = {"a.py": "X = 1\nlong_name_of_a = 1\n", "b.py": "X = 2\nlong_name_of_b = 1\n"}
    new = {"c.py": "X = 2\nother_name_of_c = 1\n", "d.py": "X = 3\nother_name_of_d = 1\n"}
    assert compared(old, new)[1]["d.py: X"] == ("1", "3") and "c.py: X" not in compared(old, new)[1]


def test_a_function_of_another_name_is_known_by_its_body():
    old = {"train_gpt.py": MAIN + STEP}
    new = {"train_gpt.py": MAIN, "track/optim.py": STEP.replace("def step", "def update")}
    found = sources.compare_parts(old, new)
    assert [u for u in found["units"] if "file" not in u["change"]] == [
        {"name": "track/optim.py: update()", "change": "renamed", "from": "step()", "to": "track/optim.py"}]
    assert found["settings"] == []  # rate is the same argument
    short = "def f():\n    return 1\n"
    assert compared({"train_gpt.py": short}, {"train_gpt.py": short.replace("f()", "g()")})[0] == {
        "f()": "removed", "g()": "added"}
    twice = {"train_gpt.py": STEP.replace("step", "one") + STEP.replace("step", "two")}
    assert compared({"train_gpt.py": STEP}, twice)[0] == {"step()": "removed", "one()": "added", "two()": "added"}


@pytest.mark.parametrize(("name", "language"), [
    ("a/lib.rs", "Rust"), ("k.cu", "CUDA"), ("k.CUH", "CUDA"), ("b/c.cpp", "C++"), ("a.py", "Python"), ("a", "Python"),
    ("rs/a.py", "Python"), ("Cargo.toml", "TOML")])
def test_languages(name, language):
    assert packages.language_of(name) == language


def test_other_languages_are_text_and_no_fault(tmp_path, capsys):
    lib = "exact_match/src/lib.rs"
    new = PACKAGE | {lib: PACKAGE[lib].replace("* 2", "* 3") + "// end\n"}
    found = sources.compare_parts(PACKAGE, new)
    assert found["notes"] == [f"{lib} is Rust, compared as text only: 2 lines added, 1 removed"]
    assert found["not_compared"] == [lib] and found["units"] == found["settings"] == []
    a, b = (write_log(tmp_path / f"{n}.txt", parts) for n, parts in enumerate((PACKAGE, new)))
    out = command(capsys, "diff", a, b)[1]
    assert "4 files are the same" in out and f"{lib}  changed     +2  -1" in out
    assert "no setting or constant differs" not in out and "does not parse" not in out
    assert f"settings, constants and functions could not be compared in {lib}: see the text" in out
    assert "-pub fn rows(n: usize) -> usize { n * 2 }" in out
    assert sources.compare_parts(without(lib), PACKAGE)["not_compared"] == []  # a new file: nothing to compare


def test_what_does_not_parse_is_not_called_equal(tmp_path, capsys):
    a, b = (write_log(tmp_path / f"{n}.txt", PACKAGE | {"track/model.py": text})
            for n, text in enumerate((NORM, NORM + "x = (\n")))
    out = command(capsys, "diff", a, b)[1]
    assert "no setting or constant differs" not in out
    assert "could not be compared in track/model.py of B: see the text" in out


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="this Python reads them")
def test_f_strings_of_a_newer_python(tmp_path, capsys):
    newer = 'def say(x):\n    print(f"{x["a"]} is it")\n    return 1\n' + NORM
    found = sources.compare_parts({"train_gpt.py": newer}, {"train_gpt.py": newer.replace("0.5", "0.25")})
    assert [s["name"] for s in found["settings"]] == ["inside norm()"] and found["not_compared"] == []
    assert len(found["notes"]) == 2 and all(note.endswith("line 2 is compared as text") for note in found["notes"])
    found = sources.compare_parts({"train_gpt.py": newer}, {"train_gpt.py": newer.replace("is it", "was it")})
    assert found["units"] == [{"name": "say()", "change": "constants only"}]
    assert sources.problem_of("a.py", newer).startswith("does not parse as Python 3.1")  # it does not run here
    records = [{"number": 1, "name": "R", "date": "d", "log": str(write_log(tmp_path / "a.txt", {"a.py": newer}))}]
    assert history.history_of("say", records)["events"][0]["diff"][2] == '+    print(f"{x["a"]} is it")'
    with pytest.raises(SyntaxError):
        sources.parse_python('f"{x["a"]}"\n' * (sources.MAX_NEWER + 1))


def test_many_files_have_room_together(monkeypatch):
    monkeypatch.setattr(sources, "MAX_PROGRAM", 2 * len(STEP) + 10)
    old = {f"{name}.py": STEP for name in "abc"}
    new = {name: text.replace("0.1", "0.2") for name, text in old.items()}
    found = sources.compare_parts(old, new)
    assert [s["name"] for s in found["settings"]] == ["a.py: step(rate)", "b.py: step(rate)"]
    assert found["not_compared"] == ["c.py of A", "c.py of B"]


def test_pairs_of_files_are_found_in_one_look_at_each_line(monkeypatch):
    seen = []
    monkeypatch.setattr(packages, "lines_of", lambda text: seen.append(text) or {*text.split("\n")})
    shared = "".join(f"a line that all files share, {i}\n" for i in range(50))
    old = {f"old/{i}.py": f"# {i}\n{shared}" for i in range(60)}
    new = {f"new/{i}.py": f"# other {i}\n{shared}" for i in range(60)}
    pairs = packages.pair_files(old, new)
    assert len(seen) == 120 and len(pairs) == 120
    assert len(packages.common({i: {1, i} for i in range(9)}, {i: {1, i} for i in range(9)})) == 8


@QUICK
@given(*[st.dictionaries(st.sampled_from(["train_gpt.py", "a.py", "b/a.py", "b/lib.rs", "c.cu"]),
                         st.lists(st.sampled_from([NORM, STEP, "X = 1\n", "X = 2\n", "def f(:\n", ""])).map("".join),
                         max_size=4)] * 2)
def test_any_programs_can_be_compared(old, new):
    found = sources.compare_parts(old, new)
    rows = found["settings"] + found["units"] + found["notes"] + found["modules"]
    assert (old == new) == (not rows) and all(s["a"] != s["b"] for s in found["settings"])
    assert all(u["change"] != sources.GONE for u in found["units"])
    changed = {m["name"] for m in found["modules"]}
    assert len(changed) == len(found["modules"]) and bool(sources.unified(old, new, "ab")) <= bool(changed)
    effect = {key: dict.fromkeys(("a", "b", "difference", "test")) for key in ("val_loss", "train_time_s", "steps")}
    result = {**found, "a": "a", "b": "b", "environment": [], "unified_diff": []}
    result["effect"] = {**effect, "n_a": 0, "n_b": 0}
    assert reporting.plain(reporting.diff_report(result, True))


def test_units_that_moved_together_are_one_row_and_long_tables_end():
    units = [{"name": f"m.py: f{i}()", "change": "moved", "from": "a.py", "to": "m.py"} for i in range(5)]
    units += [{"name": "m.py: g()", "change": "moved, changed", "from": "a.py", "to": "m.py"},
              {"name": "m.py", "change": "file added"}]
    assert reporting.unit_rows(units) == [["m.py: g()", "moved, changed, from a.py"],
                                          ["5 units of m.py", "moved, from a.py"]]
    assert [name for name, _ in reporting.unit_rows(units[:3])] == ["m.py: f0()", "m.py: f1()", "m.py: f2()"]
    table, more = reporting.shortened_table(["a"], [[str(i)] for i in range(reporting.MAX_DIFFERENCES + 7)])
    assert len(table.rows) == reporting.MAX_DIFFERENCES and more == "... and 7 more: --json gives all"


# -- files written from a log


def write_log(path, parts, loss=3.25, **options):
    """A log of a program."""
    main, *others = parts.items()
    rule = "-" * 40
    code = main[1] + "".join(f"\n\n{rule}\n# {name}\n{rule}\n\n{text}" for name, text in others)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(log_text(loss, code=code + "\n", **options))
    return path


def test_a_package_is_written_and_runs(tmp_path, capsys):
    log = write_log(tmp_path / "a.txt", PACKAGE)
    code, out, _ = command(capsys, "extract", log, "-o", tmp_path / "my old")
    folder = tmp_path / "my old"
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    assert code == 0 and files.keys() == PACKAGE.keys()
    assert all(files[name].read_text().strip() == PACKAGE[name].strip() for name in PACKAGE)
    how = out.splitlines()[-1].removeprefix("to run it: ")
    assert how == f"cd {shlex.quote(str(folder))} && python train_gpt.py"
    how = how.replace("python", shlex.quote(sys.executable))
    shell = subprocess.run(how, shell=True, capture_output=True, text=True)
    assert (shell.returncode, shell.stderr) == (0, "") and shell.stdout.startswith("[")
    found = numbers(capsys, "extract", log, "-o", tmp_path / "more.py")
    assert found["problems"] == [] and found["run"].endswith("&& python more.py")  # Rust is no fault
    assert extracting.how_to_run([Path("train_gpt.py")], 8) == "torchrun --standalone --nproc_per_node=8 train_gpt.py"


@pytest.mark.parametrize("name", [
    "../a.py", "a/../b.py", "/a.py", "a//b.py", "./a.py", "a/./b.py", ".git/config.json", "a/.hidden.py", "a/b", "a/",
    "a b/c.py", "a\\b.py", "a/b.so", "a/b.pth", "a/-b.py", "-a/b.py", "a.b/c.py", "a/b.c.py", "a/b.py~", "a/\u0430.py",
    "torch/a.py", "Torch/a.py", "json/a.py", "runlogs/a.py", "pytest/__init__.py", "numpy.py", "__init__.py",
    "wandb/a.py", "transformers.py", "Triton/a.py",
    "a/conftest.py", "setup/a.py", "a/setup.py", "a/pyproject.toml", "a/con.py", "nul/a.py", "a/COM1.txt",
    "a/sitecustomize.py", "/".join("abcdefghij") + ".py", "a/" + "b" * 100 + ".py"])
def test_no_file_leads_out_of_its_folder_or_takes_the_place_of_a_module(tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="nothing was written"):
        extracting.write_parts(tmp_path / "new", {"train_gpt.py": "", "a.py": "", name: ""}, "log")
    assert sorted(tmp_path.rglob("*")) == before


def test_modules_count_where_they_are_not_installed(monkeypatch):
    monkeypatch.setattr(extracting, "importable", lambda module: False)
    for name in ("torch/a.py", "Triton.py", "runlogs/__init__.py", "json.py"):
        with pytest.raises(ValueError, match="take the place of a module"):
            extracting.check_part(name)


@pytest.mark.parametrize("name", ["track_1_short/perf/cuda_graphs/step_graphs.py", "a/__init__.py", "a/__main__.py",
                                  "exact_match/Cargo.toml", "my-crate/src/lib.rs", "a/torch.py", "a/json.py", "b.cu"])
def test_usual_files_of_packages_are_written(tmp_path, name):
    files = extracting.write_parts(tmp_path / "new", {"train_gpt.py": "", name: "x"}, "log")
    assert (tmp_path / "new" / name).read_text() == "x" and len(files) == 2


@pytest.mark.parametrize(("names", "why"), [
    (["a/x.py", "A/y.py"], "upper and lower case"), (["a/x.py", "a/X.py"], "upper and lower case"),
    (["a/b/c.py", "a/B/d.py"], "upper and lower case"),
    ([f"a{i}.py" for i in range(400)], "more than 400")])
def test_files_that_collide_are_refused(tmp_path, names, why):
    with pytest.raises(ValueError, match=why):
        extracting.write_parts(tmp_path / "new", {"train_gpt.py": ""} | dict.fromkeys(names, ""), "log")
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="a file and a folder"):
        extracting.check_tree(["a/b", "a"], "log")


def test_files_do_not_follow_links(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="need a new folder"):
        extracting.write_parts(tmp_path / "new", PACKAGE, "log")
    assert not list((tmp_path / "elsewhere").iterdir())


# -- records by number


@pytest.fixture
def track(tmp_path):
    """Four records, two of them of one day."""
    folder = tmp_path / "records" / "track_x"
    for name, rate, seconds in (("2026-01-01_First", 1, 9), ("2026-01-03_Fast", 3, 2), ("2026-01-03_Aslow", 2, 4),
                                ("2026-01-04_Last", 4, 1)):
        make_group(folder / name, [3.28, 3.27], [seconds, seconds + 0.1], code=f"RATE = {rate}\n")
        make_group(folder / name / "baseline", [3.3], [10], code="RATE = 0\n")
    return folder


def test_diff_of_records_by_number_and_name(track, capsys):
    for a, b in (("2", "4"), ("#2", "last"), ("Aslow", "LAST"), ("2026-01-03_Aslow", "4")):
        found = numbers(capsys, "diff", a, b, "--records", track)
        assert found["settings"] == [{"name": "RATE", "a": "2", "b": "4"}]
        assert found["effect"]["n_a"] == 2 and found["effect"]["train_time_s"]["difference"] == pytest.approx(-3)
    other = numbers(capsys, "diff", "1", track / "2026-01-04_Last" / "run_1.txt", "--records", track.parent)
    assert other["settings"] == [{"name": "RATE", "a": "1", "b": "4"}] and other["effect"]["n_b"] == 1


def test_a_number_that_is_no_record(track, capsys):
    said = error(capsys, "diff", "1", "5", "--records", track)
    assert f"'5' is not there, and no record: '{track}' holds #1 (First) to #4 (Last)" in said
    assert "near it are First" in error(capsys, "diff", "1", "Frist", "--records", track)
    assert "no folder of records" in error(capsys, "diff", "1", "2", "--records", track / "none")
    assert "is not there" in error(capsys, "diff", "1", "a/b.txt", "--records", track)
    empty = track.parent / "empty"
    empty.mkdir()
    assert f"'{empty}' holds no record" in error(capsys, "diff", "1", "2", "--records", empty)


def test_a_file_whose_name_is_a_number(track, capsys, monkeypatch):
    monkeypatch.chdir(track.parents[1])
    Path("2").write_text(log_text(3.1, code="RATE = 9\n"))
    assert numbers(capsys, "diff", "2", "1")["settings"] == [{"name": "RATE", "a": "9", "b": "1"}]
    assert numbers(capsys, "diff", "1", "4")["settings"] == [{"name": "RATE", "a": "1", "b": "4"}]  # of records/
    make_group(track.parent / "track_y" / "2026-01-01_Other", [3.2])
    said = error(capsys, "diff", "3", "1")
    assert "'1' means 2 records" in said and "its track with --records" in said
    os.chdir(track)
    assert "'1' is not there" in error(capsys, "diff", "1", "4")  # no records/ here


# -- history

ORIGINAL = 'class Muon:\n    """An optimizer."""\n\n    beta = 0.9\n\n    def step(self, x):\n        return x - 0.1\n'
OTHER = "import math\n\n\ndef unrelated(x):\n    return math.sqrt(x)\n"
NEW_NAME = ORIGINAL.replace("class Muon", "class NorMuon")
STORY = [  # programs of records, what happens to Muon.step
    ({"train_gpt.py": OTHER}, "not there"),
    ({"train_gpt.py": ORIGINAL}, "appears"),
    ({"train_gpt.py": ORIGINAL + OTHER}, "unchanged"),
    ({"train_gpt.py": OTHER + ORIGINAL}, "unchanged"),
    ({"train_gpt.py": ORIGINAL.replace("0.1", "0.2")}, "constants only"),
    ({"train_gpt.py": ORIGINAL.replace("0.1", "0.2  # more")}, "comments only"),
    ({"train_gpt.py": OTHER, "m/optim.py": ORIGINAL.replace("0.1", "0.2  # more")}, "moved"),
    ({"train_gpt.py": "def f(:\n" + ORIGINAL}, "not read"),
    ({"train_gpt.py": OTHER, "m/muon.py": ORIGINAL.replace("x - 0.1", "x + 0.2")}, "moved, changed"),
    ({"train_gpt.py": NEW_NAME}, "disappears"),
    ({"train_gpt.py": NEW_NAME}, "not there"),
    ({"train_gpt.py": ORIGINAL}, "reappears"),
]


@pytest.fixture
def story(tmp_path):
    """The records of STORY as the board lists them."""
    return [{"number": i, "name": f"R{i}", "date": f"2026-01-{i:02}",
             "log": str(write_log(tmp_path / f"{i}.txt", parts))} for i, (parts, _) in enumerate(STORY, 1)]


def test_the_history_of_a_method(story):
    found = history.history_of("Muon.step()", story)
    assert found["name"] == "Muon.step" and found["records"] == len(STORY)
    told = {n: e["change"] for e in found["events"] for n in range(e["first"], e["last"] + 1)}
    assert [told[n] for n in range(1, len(STORY) + 1)] == [change for _, change in STORY]
    events = {event["first"]: event for event in found["events"]}
    assert len(events) == len(STORY) - 1 and events[3]["last"] == 4  # two without a change are one
    assert events[2]["modules"] == ["train_gpt.py"]
    assert events[2]["diff"] == ["@@ -0,0 +1,2 @@", "+def step(self, x):", "+    return x - 0.1"]
    assert events[5]["constants"] == [["0.1", "0.2"]] and "-    return x - 0.1" in events[5]["diff"]
    assert (events[7]["from"], events[7]["modules"]) == (["train_gpt.py"], ["m/optim.py"])
    assert "does not parse" in events[8]["why"] and events[9]["from"] == ["m/optim.py"]
    assert events[10]["diff"][1] == "-def step(self, x):"
    assert events[12]["diff"] == [  # against the last one that was there
        "@@ -1,2 +1,2 @@", " def step(self, x):", "-    return x + 0.2", "+    return x - 0.1"]


def test_the_history_of_a_class_and_what_it_was_called(story):
    events = {event["first"]: event for event in history.history_of("Muon", story)["events"]}
    assert events[10]["change"] == "disappears" and events[10]["renamed"] == "NorMuon"
    assert events[2]["renamed"] is None and events[12]["renamed"] == "NorMuon"
    back = history.history_of("NorMuon", story)["events"]
    assert [(e["first"], e["change"], e.get("renamed")) for e in back] == [
        (1, "not there", None), (10, "appears", "Muon"), (11, "unchanged", None), (12, "disappears", "Muon")]


def test_the_history_of_constants_and_settings(tmp_path, story):
    events = history.history_of("Muon.beta", story)["events"]
    assert [e["change"] for e in events if e["first"] in (2, 3)] == ["appears", "unchanged"]
    runs = [make_ours(tmp_path / f"run_{i}", [4.0, 3.5], width=width) for i, width in enumerate((32, 32, 64))]
    records = [{"number": i, "name": "R", "date": None, "log": str(run)} for i, run in enumerate(runs, 1)]
    found = history.history_of("width", records)["events"]
    assert [(e["first"], e["change"]) for e in found] == [(1, "appears"), (2, "unchanged"), (3, "constants only")]
    assert found[0]["modules"] == ["the run's settings"] and found[2]["constants"] == [["32", "64"]]


def test_what_is_found_beside_a_broken_file_counts(tmp_path):
    log = write_log(tmp_path / "a.txt", {"train_gpt.py": "def f(:\n    Muon\n", "m.py": ORIGINAL})
    events = history.history_of("Muon", [{"number": 1, "name": "R", "date": "d", "log": str(log)}])["events"]
    assert [(e["change"], e["modules"]) for e in events] == [("appears", ["m.py"])]


def test_what_was_there_before_is_no_new_name(tmp_path):
    twin = STEP.replace("step", "twin")
    records = [{"number": i, "name": "R", "date": "d", "log": str(write_log(tmp_path / f"{i}.txt", {"a.py": text}))}
               for i, text in enumerate((STEP + twin, twin))]
    assert history.history_of("step", records)["events"][1]["renamed"] is None


def test_names_of_a_history(story):
    assert history.history_of("step", story[:9])["name"] == "Muon.step"  # the only one so far
    with pytest.raises(ValueError, match=r"'step' is the name of several: give one of Muon.step, NorMuon.step"):
        history.history_of("step", story)
    with pytest.raises(ValueError, match=r"no record defines 'Muno'; near it are Muon"):
        history.history_of("Muno", story)
    with pytest.raises(ValueError, match="no record defines 'x'"):  # an argument and a variable are no definitions
        history.history_of("x", story)
    with pytest.raises(ValueError, match="no record is there"):
        history.history_of("Muon", [])


def test_definitions_of_a_source():
    text = ("if A:\n    @compile\n    def f():\n        g = 1\n        def h(): pass\nelse:\n    def f(): return 2\n"
            "class C:\n    a, b = 1, 2\n    n: int\n    m: int = 3\n    async def f(self): pass\nx = y = 4\n")
    names = [name for name, _ in history.named_nodes(sources.parse_python(text)[0])]
    assert names == ["f", "f.h", "f", "C", "C.a", "C.b", "C.n", "C.m", "C.f", "x", "y"]
    found = history.definitions(text, "f")
    assert [(name, text) for name, text, _ in found] == [
        ("f", "@compile\ndef f():\n    g = 1\n    def h(): pass"), ("f", "def f(): return 2"),
        ("C.f", "async def f(self): pass")]
    assert history.definitions(text, "absent") == []


@pytest.mark.parametrize("text", ["(" * 5000 + " f", "f = '\0'", "def f():\n" * 150, "f" * 300_000 + " f",
                                  "".join(f"{' ' * i}def f():\n" for i in range(90)) + " " * 90 + "pass\n",
                                  "f = " + "-" * 100_000 + "1"])
def test_hostile_sources_have_a_history(tmp_path, text):
    logs = [write_log(tmp_path / f"{i}.txt", {"train_gpt.py": code}) for i, code in enumerate((text, "f = 1\n", text))]
    records = [{"number": i, "name": "R", "date": "d", "log": str(log)} for i, log in enumerate(logs)]
    found = history.history_of("f", records)
    assert sum(event["last"] - event["first"] + 1 for event in found["events"]) == 3


def test_history_command(track, capsys):
    found = numbers(capsys, "history", "RATE", track.parent)["tracks"]
    assert [(t["folder"], t["name"], t["records"]) for t in found] == [(str(track), "RATE", 4)]
    assert [(e["first"], e["record"], e["change"]) for e in found[0]["events"]] == [
        (1, "First", "appears"), (2, "Aslow", "constants only"), (3, "Fast", "constants only"),
        (4, "Last", "constants only")]
    code, out, _ = command(capsys, "history", "RATE", track)
    lines = out.splitlines()
    assert code == 0 and lines[:4] == [f"RATE in 4 records of {track}",
                                       "#1 First (2026-01-01): appears in train_gpt.py, lines +1 -0",
                                       "@@ -0,0 +1 @@", "+RATE = 1"]
    assert "#2 Aslow (2026-01-03): constants only (1 -> 2), lines +1 -1" in lines
    assert command(capsys, "history", "RATE", track, "--no-text")[1].count("\n") == 5
    assert "no record defines 'RAT'; near it are RATE" in error(capsys, "history", "RAT", track)
    assert "is no folder of records" in error(capsys, "history", "RATE", track / "none")


def test_history_text_of_what_goes_on_and_is_gone(story, capsys):
    result = {"folder": "records", **history.history_of("Muon", story)}
    lines = reporting.plain(reporting.history_report(result, True)).splitlines()
    assert "#3 to #4: unchanged" in lines and "#7 R7 (2026-01-07): moved, from train_gpt.py to m/optim.py" in lines
    assert "#10 R10 (2026-01-10): disappears from m/muon.py, now NorMuon, lines +0 -7" in lines
    assert any(line.startswith("#8: not read: train_gpt.py does not parse") for line in lines)
    text = reporting.plain(reporting.history_report(result, False))
    assert text.count("+    beta = 0.9") == 1 and "-    beta" not in text  # what is gone is not told again
