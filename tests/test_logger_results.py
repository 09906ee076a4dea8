"""logger.py export --tsv: a row of results.tsv for each run's result.json, never twice."""
import json
import re

import pytest
from helpers import run_folder, tiny

import logger
import train_gpt

HEAD = ["run", "commit", "status", "val_loss", "val_bpb", "training_seconds", "total_seconds", "peak_memory_mb", "mfu",
        "total_tokens", "steps", "params", "description"]


@pytest.fixture
def run(tmp_path):
    assert train_gpt.main(tiny(tmp_path, iterations=2)) == 0
    return run_folder(tmp_path)


def export(capsys, *argv) -> tuple:
    code = logger.main(["export", *map(str, argv)])
    return code, *capsys.readouterr()


def rows(table) -> list[list[str]]:
    return [line.split("\t") for line in table.read_text().splitlines()]


def test_a_row_has_commit_result_and_description(run, tmp_path, capsys):
    table = tmp_path / "results.tsv"
    code, out, err = export(capsys, run, "--tsv", table, "--description", "wider:\ta\nline\x1b[2J")
    head, row = rows(table)
    said, config = json.loads((run / "result.json").read_text()), json.loads((run / "config.json").read_text())
    assert code == 0 and err == "" and "2 steps: done" in out and head == HEAD
    found = dict(zip(head, row, strict=True))
    assert found["run"] == run.name and found["description"] == "wider: a line\\x1b[2J" and found["mfu"] == ""
    assert {key: found[key] for key in said if key != "mfu"} == {k: str(v) for k, v in said.items() if k != "mfu"}
    commit = config["git"]["commit"]
    assert found["commit"] == ((commit or "unknown")[:10] + "-dirty" * bool(config["git"]["dirty"]))


def test_a_run_is_never_added_twice_silently(run, tmp_path, capsys):
    table = tmp_path / "results.tsv"
    export(capsys, run, "--tsv", table)
    before = table.read_bytes()
    code, out, err = export(capsys, run, "--tsv", table, "--description", "again")
    assert code == 0 and out == "" and table.read_bytes() == before
    assert re.fullmatch(rf"note: '.*results.tsv' has {run.name}, 2 steps, already: no row was added\n", err)
    said = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps(said | {"steps": 4, "status": "target"}))  # it was resumed
    assert export(capsys, run, "--tsv", table)[0] == 0
    assert [row[2] for row in rows(table)] == ["status", "done", "target"]


def test_a_last_line_without_an_end_is_ended_first(run, tmp_path, capsys):
    table = tmp_path / "results.tsv"
    table.write_text("\t".join(HEAD) + "\n" + "\t".join(["other", *HEAD[1:]]))  # as an editor may save it
    assert export(capsys, run, "--tsv", table)[0] == 0
    assert [row[0] for row in rows(table)] == [HEAD[0], "other", run.name] and len({*map(len, rows(table))}) == 1


def test_without_a_file_it_is_results_tsv(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(capsys, run, "--tsv")[0] == 0 and len(rows(tmp_path / "results.tsv")) == 2


def test_a_run_without_a_result_and_another_table_are_refused(run, tmp_path, capsys):
    table = tmp_path / "results.tsv"
    table.write_text("commit\tval_bpb\tmemory_gb\tstatus\tdescription\n")
    code, _, err = export(capsys, run, "--tsv", table)
    assert code == 1 and "another kind of table" in err and len(rows(table)) == 1
    (run / "result.json").unlink()
    code, _, err = export(capsys, run, "--tsv", tmp_path / "new.tsv")
    assert code == 1 and "has no result.json" in err and not (tmp_path / "new.tsv").exists()
