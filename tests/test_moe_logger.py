"""logger.py with runs of train_moe.py: router reports, damaged ones, the heat map, parameters, a real run."""
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from moe import train
from test_logger import QUICK, SCALARS, end, lines, log_text, make_run, resume, run_main, summary, val
from test_logger import train as loss

import logger
import train_moe
from runlogs import drawing, loading, parsing, reporting


def report(step, load, **more):
    """A router report as of train_moe.py, of layers 1, 2, ..."""
    record = {"event": "routers", "step": step, "layers": [*range(1, len(load) + 1)], "experts": len(load[0])}
    return record | {"load": load, "dropped": [0.0] * len(load), **more}


EVEN, HALF, ONE = [0.25] * 4, [0.5, 0.5, 0, 0], [0, 0, 1.0, 0]


def read(tmp_path, *records, **files):
    return loading.read_run(make_run(tmp_path / "logs", "a", lines(*records), **files))


# --- numbers


@pytest.mark.parametrize(("load", "expected"), [
    (EVEN, (4, 1, 0, 0)), (HALF, (2, 2, 1, 2)), (ONE, (1, 4, math.sqrt(3), 3)), ([7.0], (1, 1, 0, 0)),
    ([0.75, 0.25], (math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 1.5, 0.5, 0)),
    ([0.5] * 19 + [0.02], (None, None, None, 1)), ([0.5] * 19 + [0.03], (None, None, None, 0)),
])
def test_balance_of_a_layer(load, expected):
    found = loading.balance_of(load)
    names = ("effective_experts", "max_over_mean", "cv", "dead")
    known = {name: value for name, value in zip(names, expected, strict=True) if value is not None}
    assert {name: found[name] for name in known} == pytest.approx(known)


def test_the_summary_is_of_the_last_report_and_the_worst_layer(tmp_path):
    run = read(tmp_path, report(5, [ONE, ONE]), report(10, [EVEN, HALF], layers=[3, 7], dropped=[0.0, 0.125]))
    found = loading.summarize(run)["routers"]
    assert found == {"step": 10, "layers": [3, 7], "experts": 4, "worst_layer": 7, "effective_experts": 2.0,
                     "max_over_mean": 2.0, "cv": 1.0, "dead": 2, "dropped": 0.125}
    assert loading.describe(run)["routers"] == found
    assert loading.summarize(read(tmp_path / "dense", val(5, 3.0)))["routers"] is None


def test_a_resumed_run_drops_the_reports_after_its_checkpoint(tmp_path):
    records = [loss(5, 3.0), report(5, [EVEN]), report(10, [ONE]), report(15, [ONE]), resume(5)]
    assert [r["step"] for r in read(tmp_path, *records).trace.routers] == [5]


def test_steps_that_go_back_replace_reports(tmp_path):
    reports = read(tmp_path, report(5, [EVEN]), report(10, [ONE]), report(15, [ONE]), report(10, [HALF])).trace.routers
    assert [(r["step"], [*r["load"][0]]) for r in reports] == [(5, EVEN), (10, HALF)]


@pytest.mark.parametrize("load", [[EVEN], [EVEN] * 3, [[0.5, 0.5]] * 2], ids=str)
def test_reports_of_another_shape_replace_those_before(tmp_path, load):
    reports = read(tmp_path, report(5, [EVEN, HALF]), report(10, load), report(15, load)).trace.routers
    assert [r["step"] for r in reports] == [10, 15]


@pytest.mark.parametrize("count", [400, 401, 402, 1000])
def test_a_long_run_keeps_its_last_report_and_says_that_some_went(tmp_path, count):
    trace = read(tmp_path, *(report(step, [EVEN]) for step in range(1, count + 1))).trace
    steps = [r["step"] for r in trace.routers]
    assert steps[-1] == count and 200 <= len(steps) <= parsing.MAX_REPORTS
    assert max(b - a for a, b in zip([0, *steps], steps, strict=False)) <= count // 50
    assert any("reports of the routers" in note for note in trace.notes) == (count > parsing.MAX_REPORTS)


# --- damage

BROKEN = {
    "no load": {"load": None}, "text": {"load": "load"}, "ragged": {"load": [EVEN, HALF[:3]]},
    "nan": {"load": [EVEN, [math.nan, 1, 0, 0]]}, "infinite": {"load": [EVEN, [math.inf, 1, 0, 0]]},
    "negative": {"load": [EVEN, [-0.5, 1.5, 0, 0]]}, "no token": {"load": [EVEN, [0, 0, 0, 0]]},
    "no expert": {"load": [[], []]}, "no layer": {"load": [], "layers": []}, "a row": {"load": EVEN},
    "text inside": {"load": [EVEN, ["a", 1, 0, 0]]}, "huge": {"load": [EVEN, [10**400, 1, 0, 0]]},
    "one layer too many": {"layers": [1, 2, 3]}, "no layers": {"layers": None}, "named layers": {"layers": ["a", "b"]},
    "very many layers": {"load": [EVEN] * 1000, "layers": [*range(1000)]},
}


@pytest.mark.parametrize("changes", BROKEN.values(), ids=BROKEN)
def test_damaged_reports_are_left_out_and_noted(tmp_path, capsys, changes):
    records = [loss(5, 3.0), report(5, [EVEN, HALF]), report(10, [EVEN, EVEN]) | changes, loss(10, 2.9)]
    run = read(tmp_path, *records)
    assert [r["step"] for r in run.trace.routers] == [5] and len(run.trace.rows) == 2
    assert run.trace.notes == ["1 router report(s) left out: no load of each expert of each layer"]
    status, out, err = run_main(capsys, tmp_path / "logs", "--no-plot")
    assert (status, err, out.count("router report(s) left out")) == (0, "", 1)


def test_a_report_without_dropped_or_cut_by_a_kill(tmp_path):
    cut = lines(loss(5, 3.0), report(5, [HALF], dropped=None), report(10, [EVEN]))[:-20]
    found = summary(make_run(tmp_path, "a", cut))
    assert (found["routers"]["step"], found["routers"]["dropped"], found["notes"]) == (5, None, [])


@QUICK
@given(st.dictionaries(st.sampled_from(["load", "layers", "dropped", "step", "experts"]),
                       SCALARS | st.lists(SCALARS | st.lists(SCALARS, max_size=3), max_size=3)))
def test_any_report_never_raises(values):
    records = [{"step": 1, "val_loss": 2.0}, report(1, [EVEN]), report(2, [EVEN]) | values]
    run = loading.Run(Path("run"), "metrics.jsonl", parsing.parse_metrics(lines(*records)), {})
    json.loads(reporting.format_json([run]), parse_constant=pytest.fail)
    assert reporting.plain(reporting.experiment_report("exp", [run])) and reporting.screen(loading.describe(run))


# --- the heat map


def test_colours_are_even_around_the_mean():
    assert [drawing.load_colour(x) for x in (0, 0.5, 1, 2, 4)] == [0, 0.25, 0.5, 0.75, 0.875]


@pytest.mark.parametrize(("layers", "experts", "rows"), [
    (1, 2, 1), (5, 16, 2), (11, 64, 3),
])
def test_a_panel_for_each_layer_with_every_expert_and_report(tmp_path, layers, experts, rows):
    pytest.importorskip("matplotlib")
    load = [[1.0] * (experts - 1) + [0.0]] * layers
    run = read(tmp_path, report(10, load), report(30, load), report(40, load))
    figure = drawing.load_figure(run, "exp")
    figure.savefig(tmp_path / "load.png")
    *panels, bar = figure.axes
    assert len(panels) == layers and len({round(ax.get_position().y0, 3) for ax in panels}) == rows
    effective = f"{experts - 1:.1f} of {experts} effective, 1 dead"
    assert [ax.get_title() for ax in panels] == [f"layer {i + 1}: {effective}" for i in range(layers)]
    assert sum(ax.get_ylabel() == "expert" for ax in panels) == rows  # the first of each
    for ax in panels:
        beneath = [x for x in panels if x.get_position().y0 < ax.get_position().y0 - 0.01
                   and abs(x.get_position().x0 - ax.get_position().x0) < 0.01]
        assert ax.get_xlabel() == ("" if beneath else "step")
        (mesh,) = ax.collections
        assert mesh.get_array().shape == (experts, 3)
        assert sorted({x for x, _ in mesh.get_coordinates()[0]}) == [0, 10, 30, 40]
        assert ax.get_ylim() == (-0.5, experts - 0.5)
    assert "a, to step 40" in figure.get_suptitle() and len(bar.get_yticklabels()) == 7


def test_colours_of_dead_even_and_full_experts(tmp_path):
    pytest.importorskip("matplotlib")
    figure = drawing.load_figure(read(tmp_path, report(10, [[0.001, 1.0, 2.0, 0.5, 1.499]])), "exp")
    (mesh,) = figure.axes[0].collections
    colours = [tuple(mesh.to_rgba(value)) for value in mesh.get_array().flatten()]
    dead, even, full, half, _ = colours
    assert dead == (0, 0, 0, 1) and len(set(colours)) == 5
    assert full[0] > full[2] and half[0] < half[2] and max(even[:3]) - min(even[:3]) < 0.02  # red, blue, grey


def test_the_plot_is_of_the_newest_run_with_reports(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name, step in (("20260101-a", 5), ("20260102-b", 7)):
        make_run(tmp_path / "logs", name, lines(loss(step, 3.0), report(step, [EVEN, HALF])))
    make_run(tmp_path / "logs", "20260103-c", lines(loss(9, 3.0)))
    runs = loading.load_experiment(tmp_path / "logs", "exp")
    assert "20260102-b, to step 7" in drawing.figures_of(runs, "exp")["load.png"].get_suptitle()
    assert "load.png" not in drawing.figures_of(runs[2:], "exp")
    status, out, err = run_main(capsys, tmp_path / "logs")
    image = tmp_path / "images" / "exp" / "load.png"
    assert (status, err) == (0, "") and f"plot: {image}" in out and image.read_bytes().startswith(b"\x89PNG")


# --- commands


def test_show_names_routers_and_active_parameters(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    sizes = {"params_total": 2_000_000, "params_active": 900_000}
    moe = make_run(tmp_path, "moe", lines(val(50, 3.0), report(50, [HALF], dropped=[0.034]), end(100, 3.0, **sizes)))
    dense = make_run(tmp_path, "dense", lines(val(50, 3.0), end(100, 3.0, **dict.fromkeys(sizes, 900_000))))
    image = tmp_path / "new" / "load.png"
    assert logger.main(["show", str(moe), "--plot", str(image), "--wide"]) == 0
    out = capsys.readouterr().out
    assert "2,000,000, 900,000 of them active" in out and image.read_bytes().startswith(b"\x89PNG")
    assert "step 50: 2.0 of 4 experts effective in layer 1, max/mean 2.00, CV 1.00, 2 dead, 3.4 % dropped" in out
    assert logger.main(["show", str(dense)]) == 0
    out = capsys.readouterr().out
    assert "900,000" in out and "them active" not in out and "experts effective" not in out
    assert logger.main(["show", str(dense), "--plot", str(image)]) == 1
    assert capsys.readouterr().err == f"error: --plot: no run in {dense} reports its routers, as train_moe.py's do\n"


def test_compare_shows_the_active_parameters_where_they_are_fewer(tmp_path, capsys):
    def run(name, losses, total, active):
        rows = [val(step, loss) for step, loss in zip((0, 50, 100), losses, strict=True)]
        sizes = {"params_total": total, "params_active": active}
        return str(make_run(tmp_path, name, lines(*rows, report(100, [EVEN]), end(100, losses[-1], **sizes))))

    dense, moe = run("dense", (9.0, 4.0, 3.5), 1000, 1000), run("moe", (9.0, 3.8, 3.3), 5000, 1010)
    assert logger.main(["compare", dense, moe, "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert any(line.split() == ["moe", "5,000", "1,010"] for line in out.splitlines())
    assert "100  3.5000  3.3000  -0.2000              -" in [line.strip() for line in out.splitlines()]
    assert "equal tokens are equal steps" in out
    assert logger.main(["compare", dense, run("dense2", (9.0, 4.0, 3.4), 1000, 1000), "--no-plot"]) == 0
    assert "active" not in capsys.readouterr().out


def test_a_real_run_is_read_as_it_reported_itself(tmp_path, capsys):
    """What logger.py works out of the load is what train_moe.py reports of itself; its log.txt reads the same."""
    folder = train(train_moe, tmp_path, moe_layers="DM", router_every=2, capacity_factor=0.5)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reports = [record for record in records if record.get("event") == "routers"]
    last, found = reports[-1], loading.summarize(loading.read_run(folder))
    assert len(reports) == len(loading.read_run(folder).trace.routers) == 4 and found["notes"] == []
    own = {key: last[key][0] for key in ("effective_experts", "max_over_mean", "cv", "dropped")}
    assert {key: found["routers"][key] for key in own} == pytest.approx(own, rel=1e-4, abs=1e-5)
    assert found["routers"]["dead"] == len(last["dead"][0]) and found["routers"]["dropped"] > 0
    assert found["routers"] | {"step": 8, "layers": [1], "experts": 4, "worst_layer": 1} == found["routers"]
    assert found["params_active"] < found["params_total"]
    assert logger.main(["show", "--strict", str(folder / "log.txt")]) == 0
    assert "complete" in capsys.readouterr().out


def test_log_txt_without_reports(tmp_path):
    run = loading.read_run(make_run(tmp_path, "a", log=log_text("step:5/9 val_loss:3.5 train_time:5ms\n")))
    assert run.trace.routers == [] and reporting.router_report([loading.summarize(run)]) == []
