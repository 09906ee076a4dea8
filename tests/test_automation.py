"""docs/automation.md: its program runs as it stands, its keys and exit codes are those of the scripts."""
import json
import re
import shutil

from helpers import ROOT, flags, make_data, script
from helpers import TINY as SMALL

from runlogs.exporting import RESULT

PAGE = (ROOT / "docs" / "automation.md").read_text(encoding="utf-8")


def program() -> str:
    (text,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return text


def test_the_program_keeps_what_helps_by_result_json(tmp_path):
    """On a copy of the scripts; its ideas are those of the page (one cannot work), and one that is sure to help."""
    for name in ("train_gpt.py", "logger.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "runlogs", tmp_path / "runlogs")
    make_data(tmp_path / "mine")
    text, count = re.subn(r"(?m)^IDEAS = \[", 'IDEAS = ["--iterations 12", ', program())
    assert count == 1 and text.count("\n") == program().count("\n") <= 30
    assert (long := "--batch-tokens 2048 --iterations 240") in text
    text = text.replace(long, "--batch-tokens 64 --iterations 16")  # in seconds
    (tmp_path / "loop.py").write_text(text)
    common = {**SMALL, "data": tmp_path / "mine"}
    done = script("loop.py", *map(str, flags(**common)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    start, *tries, kept = done.stdout.splitlines()
    assert "--cooldown 2: settings that cannot work: dropped" in tries and len(tries) == 5
    best, losses = float(start.split(", ")[1]), []
    for line in (line for line in tries if "cannot work" not in line):
        losses.append(loss := float(re.search(r": done, ([\d.]+): (?:kept|dropped)$", line)[1]))
        assert line.endswith("kept" if loss < best else "dropped") or abs(loss - best) < 1e-4
        best = min(loss, best)
    assert kept.endswith(f": {best:.4f}") and "--iterations 12" in kept, "half as many steps more lower this loss"
    rows = (tmp_path / "results.tsv").read_text().splitlines()
    assert len(rows) == 1 + 1 + len(losses) and rows[0].startswith("run\tcommit\tstatus\tval_loss")
    results = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("logs/*/*/result.json")}
    assert len(results) == len(rows) - 1 and all(row.split("\t")[0] in results for row in rows[1:])


def test_a_run_without_a_result_is_told_and_no_earlier_one_taken(tmp_path, monkeypatch):
    """The second time the ideas have results of the first; one leaves none, as if it was killed."""
    (tmp_path / "train_gpt.py").write_text("""import json, os, pathlib, sys
name = sys.argv[sys.argv.index("--experiment_name") + 1]
folder = pathlib.Path("logs", name, "run_" + os.environ["TURN"])
folder.mkdir(parents=True)
if "--adam-lr" in sys.argv and os.environ["TURN"] == "2":
    os.kill(os.getpid(), 9)
(folder / "result.json").write_text(json.dumps({"status": "done", "val_loss": 3.0}))
""")
    (tmp_path / "logger.py").touch()
    (tmp_path / "loop.py").write_text(program())
    for turn, told in (("1", "done, 3.0000"), ("2", "no result, exit code -9")):
        monkeypatch.setenv("TURN", turn)
        done = script("loop.py", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert f"--adam-lr 0.004: {told}: dropped" in done.stdout


def test_the_page_names_every_key():
    table = PAGE.split("## Exit codes")[0]
    assert not {*RESULT, "error"} - {*re.findall(r"`(\w+)`", table)}


def test_the_output_on_the_page_is_of_its_ideas():
    ideas = re.findall(r'"(--[^"]+)"', program().split("\n\n")[1])
    (session,) = re.findall(r"printed:\n\n```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert [line.partition(": ")[0] for line in session.splitlines()[1:-1]] == ideas
    assert session.startswith("start: done, ") and session.splitlines()[-1].startswith("kept: ")
