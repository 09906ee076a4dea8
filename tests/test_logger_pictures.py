"""What logger.py draws and how its tables fit a terminal: the right numbers, in sight, in 80 columns."""

import json
import math
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.stats import ttest_ind
from test_logger import make_run
from test_logger_commands import command, numbers

import logger
from runlogs import curves, drawing, judging, loading, reporting

pytest.importorskip("matplotlib")


def falling(step, floor=3.0):
    return floor + 7 * math.exp(-step / 50)


def rows_of(losses, ms=10.0, tokens=64, train=None):
    """Records of validations {step: loss}, with a loss of training at each step if a function is given."""
    last, found = max(losses), []
    for step in range(last + 1):
        at = {"step": step, "iterations": last, "train_time_ms": ms * step, "tokens": tokens * step}
        found += [at | {"train_loss": train(step)}] if train and step else []
        found += [at | {"val_loss": losses[step]}] if step in losses else []
    return found


def write_run(folder, losses, settings=None, **options):
    """A complete run folder of ours."""
    folder.mkdir(parents=True)
    last = max(losses)
    end = {"event": "end", "status": "done", "step": last, "iterations": last, "val_loss": losses[last],
           "train_time_ms": options.get("ms", 10.0) * last}
    text = "".join(json.dumps(row) + "\n" for row in [*rows_of(losses, **options), end])
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps({"settings": settings or {}}))
    return folder


def write_group(folder, shifts, steps=(0, 50, 100, 150, 200), **options):
    for i, shift in enumerate(shifts):
        write_run(folder / f"run_{i}", {step: falling(step) + shift for step in steps}, **options)
    return folder


def groups_of(*folders):
    return logger.load_groups([str(folder) for folder in folders])[0]


OLD, NEW = [0.0, 0.02, 0.01], [-0.05, -0.03, -0.045, -0.06]


def pair(tmp_path, **options):
    return groups_of(write_group(tmp_path / "old", OLD), write_group(tmp_path / "new", NEW, **options))


# -- compare: numbers


def test_interval_at_each_point_is_that_of_scipy(tmp_path):
    groups = pair(tmp_path)
    points = curves.equal_points([*groups.values()])["step"]
    last = points[-1]
    expected = ttest_ind([falling(200) + s for s in NEW], [falling(200) + s for s in OLD], equal_var=False)
    assert last["intervals"][0] == pytest.approx([*expected.confidence_interval(0.95)])
    difference = statistics.mean(NEW) - statistics.mean(OLD)
    assert last["means"][1] - last["means"][0] == pytest.approx(difference)


def test_ten_points_at_measured_steps_where_there_are_some(tmp_path):
    groups = pair(tmp_path)
    found = curves.equal_points([*groups.values()])
    assert [len(points) for points in found.values()] == [10, 10, 10]
    measured = {p["at"]: p["means"][0] for p in found["step"] if p["measured"]}
    assert [*measured] == [50, 100, 150, 200]
    assert [*measured.values()] == pytest.approx([falling(at) + 0.01 for at in measured])
    places = [p["at"] for p in found["step"]]
    assert places == sorted(places) and places[0] > 0 and places[-1] == 200


def test_without_a_second_run_there_is_no_interval(tmp_path, capsys):
    a, b = write_group(tmp_path / "a", [0.0]), write_group(tmp_path / "b", NEW)
    found = numbers(capsys, "compare", a, b)
    assert {point["intervals"][0] for point in found["equal"]["step"]} == {None}
    assert "no interval: it needs two runs in each group" in command(capsys, "compare", a, b, "--no-plot")[1]


def test_between_validations_a_curve_stays_monotone_and_near_the_truth():
    """Straight lines are 0.5 off where the loss falls steeply; so would be differences at equal times."""
    steps = [0, 50, 100, 150, 200]
    rows = rows_of({step: falling(step) for step in steps})
    (found,) = curves.resample([SimpleNamespace(rows=rows)], "step", [*range(201)])
    assert all(a >= b for a, b in zip(found, found[1:], strict=False))
    assert [found[step] for step in steps] == pytest.approx([falling(step) for step in steps])
    line = (falling(50) + falling(100)) / 2
    assert abs(found[75] - falling(75)) < 0.6 * abs(line - falling(75))


def test_a_clock_that_was_set_back_is_skipped():
    rows = [{"step": i, "train_time_ms": ms, "val_loss": 5 - i / 10} for i, ms in enumerate((0, 10, 20, 5, 15, 30, 40))]
    assert curves.rising(rows, "val_loss", "train_time_ms") == [(0, 5.0), (10, 4.9), (20, 4.8), (30, 4.5), (40, 4.4)]


def test_smoothing_keeps_constants_and_leaves_out_what_is_not_finite():
    assert [*curves.smoothed([2.0] * 200)] == [2.0] * 200
    noisy = [3 + (-1) ** i for i in range(200)]
    assert max(abs(v - 3) for v in curves.smoothed(noisy)) < 0.5
    found = curves.smoothed([*[2.0] * 99, math.nan, *[2.0] * 99, 1e300])
    assert all(v == 2 for v in found)
    assert [*curves.smoothed([1.0, 5.0])] == [1.0, 5.0] and len(curves.smoothed([])) == 0


@pytest.mark.parametrize(("vals", "train", "loss"), [
    ((0, 50, 100, 150, 200), True, "val_loss"),
    ((150, 175, 200), True, "train_loss"),  # validations of the last quarter only
    ((0, 200), True, "train_loss"),
    ((0, 200), False, "val_loss"),
    ((200,), False, None),
])
def test_which_loss_is_compared(tmp_path, vals, train, loss):
    options = {"steps": vals, "train": falling if train else None}
    folders = [write_group(tmp_path / name, [0.0, 0.1], **options) for name in "ab"]
    assert curves.loss_of(groups_of(*folders).values(), "step") == loss


# -- compare: the table


def equal_lines(out, title):
    lines = out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return [line.split() for line in lines[start + 2 : start + 12]]


def test_table_has_ten_rows_of_both_means_difference_and_interval(tmp_path, capsys):
    a, b = write_group(tmp_path / "a", OLD), write_group(tmp_path / "b", NEW, ms=5.0)
    code, out, _ = command(capsys, "compare", a, b, "--no-plot")
    rows = equal_lines(out, "val loss at equal steps: A is a, B is b")
    assert code == 0 and len(rows) == 10 and rows[-1][0] == "200" and "equal tokens are equal steps" in out
    at, old, new, difference, low, word, high = rows[-1]
    assert float(old) == pytest.approx(falling(200) + 0.01, abs=1e-4)
    assert float(new) - float(old) == pytest.approx(float(difference), abs=1.1e-4)
    assert word == "to" and float(low) < float(difference) < float(high)
    assert {row[0].startswith("~") for row in rows} == {True, False}
    times = equal_lines(out, "val loss at equal time: A is a, B is b")
    assert [times[-1][0], len(times)] == ["1.00", 10] and float(times[-1][3]) < -0.1  # twice as fast


def test_where_only_last_losses_are_logged_the_console_and_the_picture_say_so(tmp_path, capsys):
    a, b = (write_group(tmp_path / name, shifts, steps=(200,)) for name, shifts in (("a", OLD), ("b", NEW)))
    code, out, _ = command(capsys, "compare", a, b, "--plot", tmp_path / "c.png")
    assert code == 0 and "so only the last ones are compared" in out and (tmp_path / "c.png").exists()
    figure = drawing.compare_figure(groups_of(a, b))
    assert "Too few losses are logged" in figure.get_suptitle()
    left, right = figure.axes
    dots = [line for line in left.lines if line.get_marker() == "o"]
    assert [sorted(d.get_xdata()) for d in dots] == [sorted(falling(200) + s for s in shifts) for shifts in (OLD, NEW)]
    assert right.get_xlabel() == "training time (s)" and "difference -0.05625" in left.texts[-1].get_text()


def test_losses_of_training_stand_in_and_it_is_said(tmp_path, capsys):
    folders = [write_group(tmp_path / n, s, steps=(200,), train=falling) for n, s in (("a", OLD), ("b", NEW))]
    out = command(capsys, "compare", *folders, "--no-plot")[1]
    assert "too few validations at equal steps and time: the loss of training takes their place" in out
    figure = drawing.compare_figure(groups_of(*folders))
    assert figure.axes[0].get_ylabel() == "training loss, smoothed"


# -- compare: the picture


def test_picture_draws_new_minus_old_with_its_band(tmp_path):
    groups = pair(tmp_path)
    figure = drawing.compare_figure(groups)
    figure.savefig(tmp_path / "c.png")
    *_, step, time = figure.axes
    assert len(figure.axes) == 4 and (step.get_xlabel(), time.get_xlabel()) == ("step", "training time (s)")
    zero, line = step.lines
    difference = statistics.mean(NEW) - statistics.mean(OLD)
    assert {*zero.get_ydata()} == {0} and [*line.get_xdata()] == [0, 50, 100, 150, 200]
    assert [*line.get_ydata()] == pytest.approx([difference] * 5)
    (band,) = step.collections
    low, high = judging.welch(NEW, OLD)["ci_low"], judging.welch(NEW, OLD)["ci_high"]
    edges = band.get_paths()[0].vertices[:, 1]
    assert [edges.min(), edges.max()] == pytest.approx([low, high])
    bottom, top = step.get_ylim()
    assert bottom < low and top > max(high, 0) and top - bottom < 2 * (max(high, 0) - low)
    assert f"{difference:+.4f} at the end" in step.get_legend().get_texts()[0].get_text()
    assert np.ptp(step.get_ylim()) < 0.05 * np.ptp([falling(0), falling(200)])  # not the range of the losses


def test_picture_is_made_for_the_last_part(tmp_path):
    """A difference of 2 in the first steps and of 0.004 in the last ones: the last are in sight."""
    steps = range(0, 201, 10)
    for name, late in (("a", 0.0), ("b", 0.004)):
        for i in range(3):
            early = {s: falling(s) + (2.0 * (name == "b") if s < 40 else late) + i / 1e4 for s in steps}
            write_run(tmp_path / name / f"{i}", early)
    figure = drawing.compare_figure(groups_of(tmp_path / "a", tmp_path / "b"))
    top, bottom = figure.axes[0], figure.axes[2]
    assert bottom.get_ylim()[0] < 0 and 0.004 < bottom.get_ylim()[1] < 0.01
    low, high = top.get_ylim()
    assert low < falling(200) and falling(60) < high < 6
    assert top.get_xlim()[0] == pytest.approx(40)


def test_picture_of_one_run_a_group_has_no_band_and_says_so(tmp_path):
    groups = groups_of(write_group(tmp_path / "a", [0.0]), write_group(tmp_path / "b", [0.1]))
    figure = drawing.compare_figure(groups)
    assert not figure.axes[2].collections
    assert "no band: one run, or a mixture" in figure.axes[2].get_legend().get_texts()[0].get_text()


def test_over_a_mixture_there_is_neither_band_nor_interval(tmp_path, capsys):
    a, b = write_group(tmp_path / "a", OLD), write_group(tmp_path / "b", NEW)
    for i in range(2):
        write_run(b / f"longer_{i}", {step: falling(step) + i / 9 for step in range(0, 401, 50)})
    found = numbers(capsys, "compare", a, b)
    assert len(found["pairs"]) == 2 and all(pair["why"] for pair in found["pairs"])
    assert {interval for point in found["equal"]["step"] for interval in point["intervals"]} == {None}
    groups = groups_of(a, b)
    for untested, bands in ((set(), 2), ({*groups}, 0)):
        assert len(drawing.compare_figure(groups, untested).axes[2].collections) == bands


def test_a_wide_band_does_not_hide_the_difference(tmp_path):
    """Two runs a group: t is 12.7, and the band would take the axis for itself."""
    groups = groups_of(write_group(tmp_path / "a", [0.0, 1.0]), write_group(tmp_path / "b", [0.3, 1.3]))
    ax = drawing.compare_figure(groups).axes[2]
    low, high = ax.get_ylim()
    assert low < 0 < 0.3 < high and high - low < 3.5


def test_curves_against_time_end_where_the_groups_end_on_average(tmp_path):
    folder = tmp_path / "a"
    for i, ms in enumerate((8.0, 10.0, 12.0)):
        write_run(folder / f"{i}", {s: falling(s) for s in (0, 50, 100, 150, 200)}, ms=ms)
    other = write_group(tmp_path / "b", OLD)
    first, _ = groups_of(folder, other).values()
    assert len(first) == 3
    at, mean = curves.mean_curve(first, "train_time_ms", "val_loss")
    assert [*at] == pytest.approx([0, 500, 1000, 1500, 2000]) and mean[-1] == pytest.approx(falling(200))


def test_tokens_have_a_panel_only_where_they_are_not_steps(tmp_path):
    groups = pair(tmp_path, tokens=128)
    labels = [ax.get_xlabel() for ax in drawing.compare_figure(groups).axes]
    assert labels[3:] == ["step", "training tokens (thousands)", "training time (s)"]


# -- loss.png


def experiment(tmp_path, *floors, steps=200, **options):
    every = range(0, steps + 1, 20)
    return [loading.load_one(write_run(tmp_path / f"r{i}", {s: falling(s, floor) for s in every}, **options))
            for i, floor in enumerate(floors)]


def test_loss_picture_is_one_panel_with_the_last_value_and_a_target(tmp_path):
    runs = experiment(tmp_path, 3.0, settings={"target_loss": 3.1}, train=lambda s: falling(s) + 0.5 * (-1) ** s)
    figure = drawing.loss_figure(runs, "exp")
    figure.savefig(tmp_path / "loss.png")
    (ax,) = figure.axes
    train, val, target = ax.lines
    assert [*val.get_ydata()] == [falling(s) for s in range(0, 201, 20)] and train.get_alpha() < 0.5 < val.get_lw()
    late = [abs(y - falling(x)) for x, y in zip(train.get_xdata(), train.get_ydata(), strict=True) if x > 100]
    assert max(late) < 0.25  # half of the noise
    assert [*target.get_ydata()] == [3.1, 3.1]
    words = [text.get_text() for text in ax.texts]
    assert words == ["target 3.1", f"{falling(200):.4f}"]
    low, high = ax.get_ylim()
    assert low < falling(200) and falling(40) < high < falling(10)
    (top,) = ax.child_axes
    assert top.get_xlabel() == "training time (s)"
    ticks = dict(zip(top.get_xticks(), (label.get_text() for label in top.get_xticklabels()), strict=True))
    assert all(step * 10 / 1000 == pytest.approx(float(text)) for step, text in ticks.items()) and len(ticks) > 3


def test_runs_of_other_speed_share_an_axis_of_tokens_if_any(tmp_path):
    a = loading.load_one(write_run(tmp_path / "a", {0: 5.0, 100: 3.0}, ms=10))
    b = loading.load_one(write_run(tmp_path / "b", {0: 5.0, 100: 3.1}, ms=20))
    c = loading.load_one(write_run(tmp_path / "c", {0: 5.0, 100: 3.2}, ms=30, tokens=99))
    assert drawing.second_axis([a])[0] == "training time (s)"
    assert drawing.second_axis([a, b])[0] == "training tokens (thousands)"
    assert drawing.second_axis([a, c]) is None


def test_a_legend_names_runs_by_what_differs_the_best_first(tmp_path):
    losses = {"high": 3.2, "low": 3.0, "middle": 3.1}
    runs = [loading.load_one(write_run(tmp_path / name, {0: 9.0, 50: 4.0, 100: loss}, {"lr": loss}))
            for name, loss in losses.items()]
    figure = drawing.loss_figure(runs, "exp")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "3.0000  low  lr 3.0", "3.1000  middle  lr 3.1", "3.2000  high  lr 3.2"]
    handles = figure.legends[0].get_lines()
    drawn = {line.get_color(): line.get_ydata()[-1] for line in figure.axes[0].lines}
    assert [drawn[handle.get_color()] for handle in handles] == [3.0, 3.1, 3.2]


def test_many_runs_are_told_apart_and_the_legend_ends(tmp_path):
    runs = experiment(tmp_path, *(3 + i / 100 for i in range(24)), steps=40)
    figure = drawing.loss_figure(runs, "exp")
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 24
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 17 and labels[-1] == "and 8 more, higher"


def test_values_beside_a_panel_do_not_overlap():
    places = drawing.spread([3.0, 3.001, 3.002, 3.5], 0.1)
    gaps = [b - a for a, b in zip(places, places[1:], strict=False)]
    assert min(gaps) == pytest.approx(0.1) and statistics.mean(places[:3]) == pytest.approx(3.001) and places[3] == 3.5
    mixed = drawing.spread([2.0, 1.0, 1.5], 0.1)
    assert mixed == [2.0, 1.0, 1.5] and drawing.spread([], 1) == []


def test_a_run_that_ended_early_has_no_value_at_the_end_of_the_others(tmp_path):
    runs = experiment(tmp_path, 3.0) + [loading.load_one(write_run(tmp_path / "s", {0: 9.0, 50: 4.5, 100: 4.0}))]
    ax = drawing.loss_figure(runs, "exp").axes[0]
    assert [text.get_text() for text in ax.texts] == [f"{falling(200):.4f}"]


# -- tables in 80 columns

HOSTILE = ["a" * 300, "日本" * 60, "b\x1b[31m" * 30, "x " * 100, "with_the_end_" * 12 + "1", "with_the_end_" * 12 + "2"]


def screens(tmp_path, capsys, monkeypatch, columns, *flags):
    """Output of the commands that print tables, of runs with such names."""
    monkeypatch.setenv("COLUMNS", str(columns))
    logs = tmp_path / "logs"
    for i, name in enumerate(HOSTILE):
        settings = {"seed": i, "note": "w" * 300}
        write_run(logs / "exp" / name[-80:] / "deep", {0: 9.0, 50: 4.0, 100: 3 + i / 10}, settings)
    exp = logs / "exp"
    for i in range(12):
        write_run(logs / "many" / f"{'long' * 20}_{i}", {0: 9.0, 50: 4.0, 100: 3.0 + i / 10})
    first, second = sorted(exp.iterdir())[:2]
    for argv in (["show", exp], ["show", logs / "many"], ["stats", logs / "many"], ["show", first],
                 ["compare", first, second, "--no-plot"],
                 ["--experiment_name", "many", "--log-dir", logs, "--no-plot"]):
        code, out, _ = command(capsys, *argv, *flags)
        assert code == 0
        yield argv[0], out


def sentence(line):
    starts = ("no ", "too few", "track 3", "tokens, steps", "note on", "left out", "table: ", "equal tokens", "~ and",
              "final val loss", "settings that", "warning: ", "many: ", "one-sided")
    return line.startswith(starts)


@pytest.mark.parametrize("columns", [80, 120])
def test_tables_fit_the_terminal(tmp_path, capsys, monkeypatch, columns):
    for name, out in screens(tmp_path, capsys, monkeypatch, columns):
        lines = [line for line in out.splitlines() if not sentence(line)]
        assert len(lines) > 5 and max(map(reporting.wide, lines)) <= columns, name


def test_a_table_of_runs_has_a_line_a_run_and_says_what_it_left_out(tmp_path, capsys, monkeypatch):
    outs = [out for name, out in screens(tmp_path, capsys, monkeypatch, 80) if name == "show"]
    place, head, *rows, count, last = outs[1].splitlines()
    while not head.startswith("run "):
        head, *rows = rows  # the place takes several lines
    assert place.startswith("in /") and len(rows) == 12 and count == "12 files: 12 complete"
    names = [row.split()[0] for row in rows]
    assert len({*names}) == 12 and all("…" in name for name in names)
    assert "val loss" in head and "train s" in head
    missing = last.removeprefix("left out at 80 columns: ").removesuffix("; --wide shows them").split(", ")
    assert {"best val", "trials"} <= {*missing} and not any(f"  {name} " in head for name in missing)


def test_wide_shows_all_and_markdown_is_never_cut(tmp_path, capsys, monkeypatch):
    for name, out in screens(tmp_path, capsys, monkeypatch, 80, "--wide"):
        assert "left out at" not in out, name
        if name == "show":
            assert "…" not in out
    folder = tmp_path / "logs" / "many"
    out = command(capsys, "show", folder, "--markdown")[1]
    assert out.splitlines()[0].count("|") == 13 and "…" not in out
    assert numbers(capsys, "show", folder)["runs"][0]["path"].startswith(str(folder))


def test_what_is_left_out_is_the_least_important_that_has_no_room():
    table = reporting.Table(["run", "loss", "torch", "code"], [["r", "3.28", "2.9", "c" * 40]], names=True,
                            extras=("code", "torch"))
    assert table.layout(30)[-1] == ["code"] and table.layout(80)[-1] == []
    assert table.layout(8)[-1] == ["torch", "code"]


def test_columns_without_any_value_go_first_and_are_no_loss():
    rows = [["r", "-", "2.9"], ["s", "-", "2.9"]]
    table = reporting.Table(["run", "peak MiB", "torch"], rows, names=True, extras=("torch", "peak MiB"))
    assert table.plain(12) == ["run  torch", "r      2.9", "s      2.9"] and table.layout(12)[-1] == []
    assert "peak MiB" in table.plain(80)[0]


def test_values_of_a_screen_hang():
    table = reporting.Table(["run", "p"], [["note", "word " * 30 + "end"], ["status", "complete"]])
    _, first, second, *rest, last = table.plain(60)
    assert first.startswith("note    word") and second.startswith(" " * 8 + "word") and last == "status  complete"
    words = " ".join(" ".join(table.plain(60)).split())
    assert words == "run p note " + "word " * 30 + "end status complete"


@pytest.mark.parametrize(("text", "most"), [("a" * 50, 7), ("日本語" * 9, 8), ("one two three", 5), ("", 4), (" x", 1)])
def test_wrap_keeps_all_and_fits(text, most):
    lines = reporting.wrap(text, most)
    assert all(reporting.wide(line) <= most for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_cut_keeps_both_ends_and_names_stay_apart():
    assert reporting.cut("abcdefghij", 5) == "ab…ij" and reporting.cut("abc", 3) == "abc"
    assert reporting.wide("日本 a") == 6 and reporting.cut("日本語" * 9, 8) == "日…本語"
    names = [f"2026_run_{i}_{'x' * 40}" for i in range(10)]
    short = reporting.short_names(names, 16)
    assert len({*short}) == 10 and all(reporting.wide(name) <= 16 for name in short)
    tails = [f"{'x' * 40}_{i}" for i in range(10)]
    assert len({*reporting.short_names(tails, 12)}) == 10
    inner = [f"{c}{'y' * 9}{i}{'x' * 40}" for c in "ab" for i in range(3)]
    assert len({*reporting.short_names(inner, 16)}) == 6


def test_names_are_given_relative_to_their_folder():
    rows = [[f"a/b/c{i}/run.txt", "1"] for i in (1, 2)]
    table = reporting.Table(["run", "n"], rows, names=True)
    assert table.plain(80) == ["in a/b/", "run         n", "c1/run.txt  1", "c2/run.txt  1"]
    assert reporting.Table(["run", "n"], rows[:1], names=True).plain(80)[1].startswith("a/b/c1")
    assert table.markdown()[2] == "| a/b/c1/run.txt | 1 |"


def test_long_tables_of_long_names_take_little_time():
    rows = [[f"{'n' * 400}{i}{'m' * 90}", "w" * 400, "1"] for i in range(1500)]
    start = time.process_time()
    reporting.Table(["run", "state", "n"], rows, names=True).plain(80)
    assert time.process_time() - start < 5


# -- the other pictures


def test_step_times_are_smoothed(tmp_path):
    rows, ms = [], 0.0
    for step in range(1, 401):
        ms += 100 + 20 * (-1) ** step
        rows.append({"step": step, "train_loss": 4.0, "train_time_ms": ms})
    path = make_run(tmp_path, "a", "".join(json.dumps(row) + "\n" for row in rows))
    (line,) = drawing.figures_of([loading.load_one(Path(path))], "exp")["step_time.png"].axes[0].lines
    assert len(line.get_ydata()) == 399 and all(abs(v - 100) < 3 for v in line.get_ydata()[10:-10])
