"""logger.py with HellaSwag scores: of evals/hellaswag.py --follow, and those in metrics.jsonl of older runs."""
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_logger import QUICK, SCALARS, end, lines, make_run, resume, run_main, summary, train, val

import logger
from runlogs import drawing, loading, parsing, reporting


def score(step, right, tasks=100, **more):
    """A record of a score with which `right` of the tasks are solved."""
    found = {"tasks": tasks, "per_token": right / tasks, "per_byte": 0.5, "raw": 0.25}
    return {"step": step, "hellaswag": found, "hellaswag_per_token": right / tasks, "tokens": 10 * step, **more}


def scored(tmp_path, name, *scores, metrics=()):
    path = make_run(tmp_path / "logs", name, lines(*(metrics or [val(20, 3.0), val(40, 2.9), end(40, 2.9)])))
    (path / "hellaswag.jsonl").write_text(lines(*scores))
    return path


def steps(path):
    return {step: found["per_token"] for step, found in loading.read_run(path).trace.scores.items()}


def test_scores_in_metrics_of_older_runs(tmp_path):
    """A resumed run loses those after its checkpoint; the losses are read as ever."""
    rows = [train(10, 3.0), score(10, 26), train(20, 2.9), score(20, 30), resume(10), train(20, 2.8), score(20, 31)]
    path = make_run(tmp_path / "logs", "a", lines(*rows))
    assert steps(path) == {10: 0.26, 20: 0.31}
    assert [row["step"] for row in loading.read_run(path).trace.rows] == [10, 20]
    assert summary(path)["hellaswag"] == {"step": 20, "tasks": 100, "per_token": 0.31, "per_byte": 0.5, "raw": 0.25}
    cut = make_run(tmp_path / "logs", "b", lines(*rows[:5]))
    assert steps(cut) == {10: 0.26}


def test_scores_beside_the_metrics(tmp_path):
    assert steps(scored(tmp_path, "a", score(20, 26), score(40, 30))) == {20: 0.26, 40: 0.3}
    assert summary(scored(tmp_path, "b"))["hellaswag"] is None
    run = loading.read_run(scored(tmp_path, "c", score(20, 26)))
    assert loading.describe(run)["hellaswag"]["step"] == 20


def test_of_a_step_that_of_the_most_tasks_counts_and_the_last_of_these(tmp_path):
    path = scored(tmp_path, "a", score(20, 26), score(20, 4, 10), score(20, 27), score(40, 4, 10), score(40, 50))
    assert steps(path) == {20: 0.27, 40: 0.5}


@pytest.mark.parametrize("damaged", [
    {"hellaswag": None}, {"hellaswag": 0.25}, {"hellaswag": {}}, {"hellaswag": {"tasks": 5}}, {"step": None},
    score(20, 0) | {"hellaswag": {"tasks": 0, "per_token": 0.5, "per_byte": 0.5, "raw": 0.5}},
    {"hellaswag": {"tasks": 5, "per_token": 1.5, "per_byte": 0.5, "raw": 0.5}},
    {"hellaswag": {"tasks": 5, "per_token": math.nan, "per_byte": 0.5, "raw": 0.5}},
    {"hellaswag": {"tasks": 5, "per_token": "0.5", "per_byte": 0.5, "raw": 0.5}}, {"hellaswag": [0.5] * 4},
], ids=str)
def test_damaged_scores_are_passed_over(tmp_path, damaged):
    path = scored(tmp_path, "a", score(20, 26), {"step": 30, **damaged})
    with open(path / "hellaswag.jsonl", "a") as file:
        file.write('{"step": 40, "hellasw')
    assert steps(path) == {20: 0.26} and loading.read_run(path).trace.notes == []


@QUICK
@given(st.dictionaries(st.sampled_from(["tasks", "per_token", "per_byte", "raw"]), SCALARS), SCALARS)
def test_any_score_never_raises(values, step):
    text = lines({"step": 1, "val_loss": 2.0}, {"step": step, "hellaswag": values})
    run = loading.Run(Path("run"), "metrics.jsonl", parsing.parse_metrics(text), {})
    json.loads(reporting.format_json([run]), parse_constant=pytest.fail)
    assert reporting.plain(reporting.experiment_report("exp", [run])) and reporting.screen(loading.describe(run))


def test_reports_show_the_last_score_with_its_errors(tmp_path, capsys):
    path = scored(tmp_path, "a", score(20, 26), score(40, 36))
    scored(tmp_path, "b")
    status, out, _ = run_main(capsys, tmp_path / "logs", "--no-plot")
    rows = [line.split() for line in out.splitlines()]
    at = rows.index("HellaSwag of step tasks per token per byte raw".split())
    assert status == 0 and " ".join(rows[at + 1]) == "a 40 100 36.0 +- 4.8 % 50.0 +- 5.0 % 25.0 +- 4.3 %"
    assert "HellaSwag" not in " ".join(rows[at + 2])
    assert logger.main(["show", str(path)]) == 0
    assert "HellaSwag of  step  tasks" in capsys.readouterr().out
    assert logger.main(["show", str(path.parent / "b")]) == 0
    assert "HellaSwag" not in capsys.readouterr().out


def test_the_plot_has_a_curve_with_errors_for_each_run_with_scores(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    scored(tmp_path, "a", score(40, 36), score(20, 26))
    scored(tmp_path, "b")
    scored(tmp_path, "c", score(20, 5000, 10_000))
    runs = loading.load_experiment(tmp_path / "logs", "exp")
    (ax,) = drawing.figures_of(runs, "exp")["hellaswag.png"].axes
    curves = {c.get_label(): c for c in ax.containers}
    assert list(curves) == ["a", "c"]
    line, _, (bars,) = curves["a"].lines
    assert [*line.get_xdata()] == [20, 40] and [*line.get_ydata()] == pytest.approx([26, 36])
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    assert heights == pytest.approx([2 * 100 * math.sqrt(p * (1 - p) / 100) for p in (0.26, 0.36)])
    assert line.get_marker() == "o" and "chance is 25 %" in ax.get_ylabel() and ax.get_ylim()[0] > 15
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {"a", "c"}
    assert "hellaswag.png" not in drawing.figures_of(runs[1:2], "exp")
    assert run_main(capsys, tmp_path / "logs")[0] == 0
    assert (tmp_path / "images" / "exp" / "hellaswag.png").read_bytes().startswith(b"\x89PNG")
