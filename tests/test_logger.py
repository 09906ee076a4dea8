"""Tests of logger.py on runs of ours, made here: step lines, resumed, killed, damaged runs, the report, the plots."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import logger
from runlogs import drawing, loading, parsing, reporting

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COUNTS = st.integers(0, 10**9)
KEYS = st.from_regex(r"[a-z][a-z_]{0,9}", fullmatch=True).map(lambda key: f"x_{key}")
WORDS = st.from_regex(r"[A-Za-z/]{1,8}", fullmatch=True).map(lambda word: f"w{word}")
LOSSES = st.decimals(0, 99, places=4, allow_nan=False)
SCALARS = st.none() | st.booleans() | st.integers(0, 9) | st.integers() | st.floats() | st.text()
RECORD_KEYS = st.sampled_from(["step", "val_loss", "train_loss", "event", "status", "tokens", "train_time_ms"])
RECORDS = st.dictionaries(RECORD_KEYS, SCALARS | st.lists(SCALARS, max_size=2))
STARTS = st.sampled_from(["", "step:1/2 val_loss:", '{"step": 1, "val_loss": ', "=" * 100 + "\n"])
QUICK = settings(deadline=None, database=None, max_examples=80)


def val(step, loss, **more):
    times = {"tokens": 100 * step, "train_time_ms": 10 * step}
    return {"step": step, "val_loss": loss, "val_bpb": loss / 2, **times, **more}


def train(step, loss):
    return {"step": step, "train_loss": loss, "tokens": 100 * step, "train_time_ms": 10 * step, "mfu": None}


def end(step, loss, status="done", **more):
    losses = {"val_loss": loss, "val_bpb": loss / 2}
    costs = {"train_time_ms": 10 * step, "peak_memory_mib": 512, "tokens_per_s": 9000.0}
    return {"event": "end", "status": status, "step": step, "iterations": 100, **losses, **costs, **more}


def resume(step):
    return {"event": "resume", "step": step}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def log_text(
    steps,
    code="import torch\n",
    machine="Running PyTorch 2.13.0+cpu compiled for CUDA None\nRunning on CPU: Some Chip 9, 2 threads\n",
):
    bar = "=" * 100 + "\n"
    return code + bar + machine + bar + steps


def make_run(logs, name, metrics=None, log=None, config=None, experiment="exp"):
    path = logs / experiment / name
    path.mkdir(parents=True)
    for file, text in (("metrics.jsonl", metrics), ("log.txt", log), ("config.json", config and json.dumps(config))):
        if text is not None:
            (path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def summary(path):
    return loading.summarize(loading.read_run(path))


def run_main(capsys, logs, *options, experiment="exp"):
    images = logs.parent / "images"
    flags = ["--experiment_name", experiment, "--log-dir", str(logs), "--images-dir", str(images), *options]
    status = logger.main(flags)
    return status, *capsys.readouterr()


# -- step lines


@QUICK
@given(COUNTS, COUNTS, LOSSES, COUNTS, st.dictionaries(KEYS, LOSSES | WORDS))
def test_step_line_round_trip(step, iterations, loss, time_ms, extra):
    tail = "".join(f" {key}:{value}" for key, value in extra.items())
    line = f"step:{step}/{iterations} val_loss:{loss} train_time:{time_ms}ms step_avg:nanms{tail}"
    row = parsing.parse_step_line(line)
    assert math.isnan(row.pop("step_avg_ms"))
    expected = {"step": step, "iterations": iterations, "val_loss": float(loss), "train_time_ms": time_ms}
    assert row == expected | {key: v if isinstance(v, str) else float(v) for key, v in extra.items()}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("step:3 train_time:1.5s", {"step": 3, "iterations": None, "train_time_ms": 1500.0}),
        ("\x1b[32mstep:3/4\x1b[0m val_loss:3.5 (best)", {"step": 3, "iterations": 4, "val_loss": 3.5}),
        ("step:3/4 step:9 val_loss:nope a: :b", {"step": 3, "iterations": 4, "val_loss": "nope", "a": ""}),
        ("print('step:3/4 val_loss:3.5')", None),
        ("step:-1/4 val_loss:3.5", None),
        ("step:²/4 val_loss:3.5", None),
        ("step_avg:3", None),
        ("", None),
    ],
)
def test_step_line_forms(line, expected):
    row = parsing.parse_step_line(line)
    assert row == expected


@QUICK
@given(st.binary(max_size=300), STARTS)
@example(b"[" * 100_000, "")
@example(b"9" * 5000 + b"}", '{"step": ')
def test_arbitrary_bytes_never_raise(tmp_path_factory, data, start):
    path = tmp_path_factory.mktemp("run")
    for file in ("metrics.jsonl", "log.txt", "config.json"):
        (path / file).write_bytes(start.encode() + data)
    run = loading.read_run(path)
    report = reporting.plain(reporting.experiment_report("exp", [run]))
    assert "\x1b" not in report
    assert json.loads(reporting.format_json([run]))["runs"][0]["run_id"] == path.name


@QUICK
@given(st.lists(RECORDS, max_size=6))
def test_any_json_values_never_raise(records):
    trace = parsing.parse_metrics(lines({"step": 1, "val_loss": 2.0}, *records))
    run = loading.Run(Path("run"), "metrics.jsonl", trace, {})
    json.loads(reporting.format_json([run]), parse_constant=pytest.fail)
    assert [row["step"] for row in trace.rows] == sorted(row["step"] for row in trace.rows)
    drawing.loss_limits([run])


# -- runs


def test_metrics_of_a_finished_run(tmp_path):
    config = {"torch": "2.13.0", "world_size": 8, "hardware": {"device": "cuda", "name": "H100"}, "settings": {}}
    records = [val(0, 10.0), train(50, 4.0), val(50, 3.0), train(100, 3.9), val(100, 3.5), end(100, 3.5)]
    found = summary(make_run(tmp_path, "a", lines(*records), config=config))
    expected = {"status": "done", "completed": True, "step": 100, "iterations": 100, "val_loss": 3.5, "val_bpb": 1.75}
    expected |= {"best_val_loss": 3.0, "best_val_step": 50, "train_time_ms": 1000, "step_avg_ms": 10.0}
    expected |= {"torch": "2.13.0", "tokens_per_s": 9000.0, "peak_memory_mib": 512, "device": "8x H100", "notes": []}
    assert {key: found[key] for key in expected} == expected


def test_resume_supersedes_later_records_and_the_end(tmp_path):
    records = [val(50, 3.0), train(60, 9.0), val(80, 1.0), end(80, 1.0, "interrupted"), resume(50), train(60, 2.9)]
    run = loading.read_run(make_run(tmp_path, "a", lines(*records)))
    assert [(row["step"], row.get("val_loss"), row.get("train_loss")) for row in run.trace.rows] == [
        (50, 3.0, None),
        (60, None, 2.9),
    ]
    found = loading.summarize(run)
    assert (found["status"], found["best_val_loss"]) == ("running or killed at step 60", 3.0)
    assert found["notes"] == []


def test_resume_glued_to_a_cut_line(tmp_path):
    text = lines(val(50, 3.0), val(80, 1.0)) + '{"step":81,"train_lo' + lines(resume(50), val(100, 2.5), end(100, 2.5))
    run = loading.read_run(make_run(tmp_path, "a", text))
    assert [row["step"] for row in run.trace.rows] == [50, 100]
    assert loading.summarize(run)["best_val_loss"] == 2.5


def test_steps_that_go_back_are_noted(tmp_path):
    run = loading.read_run(make_run(tmp_path, "a", lines(val(50, 3.0), val(80, 1.0), val(50, 2.0))))
    assert [row["val_loss"] for row in run.trace.rows] == [2.0]
    assert run.trace.notes == [parsing.BACKWARD]


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_killed_run_with_a_cut_last_line(tmp_path, cut):
    text = lines(val(50, 3.0), val(75, 2.5))
    found = summary(make_run(tmp_path, "a", text[: -1 - cut]))
    assert found["status"] == "running or killed at step 50"
    assert (found["val_loss"], found["tokens_per_s"], found["completed"], found["notes"]) == (3.0, 10000.0, False, [])


def test_damage_inside_is_skipped_and_noted(tmp_path):
    text = (
        b'\xff\x00garbage\r\n{"step": true, "val_loss": 1}\r\n'
        + lines(val(50, 3.0), end(50, 3.0)).replace("\n", "\r\n").encode()
    )
    found = summary(make_run(tmp_path, "a", text))
    assert (found["status"], found["val_loss"]) == ("done", 3.0)
    assert found["notes"] == ["2 unreadable line(s) of metrics.jsonl left out"]


def test_nan_run_is_not_completed_and_its_json_is_strict(tmp_path):
    run = loading.read_run(make_run(tmp_path, "a", lines(val(9, math.nan), val(50, 3.0), end(60, math.nan, "nan"))))
    assert "nan" in reporting.plain(reporting.experiment_report("exp", [run])).splitlines()[2]
    found = json.loads(reporting.format_json([run]), parse_constant=pytest.fail)["runs"][0]
    assert (found["status"], found["completed"], found["val_loss"], found["best_val_loss"]) == ("nan", False, None, 3.0)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_log_txt_fallback_ignores_the_embedded_code(tmp_path, newline):
    steps = "step:0/100 val_loss:10.8 train_time:0ms step_avg:nanms\nstep:100/100 train_time:900ms step_avg:9.00ms\n"
    steps += "step:100/100 val_loss:3.28 train_time:990ms step_avg:9.90ms\n"
    steps += "peak memory allocated: 7 MiB reserved: 9 MiB\n"
    text = log_text(steps, code="'''\nstep:0/9 val_loss:0.1 train_time:1ms step_avg:1ms\n'''\n").replace("\n", newline)
    found = summary(make_run(tmp_path, "a", log=text))
    expected = {"source": "log.txt", "status": "done", "step": 100, "val_loss": 3.28, "best_val_loss": 3.28}
    expected |= {
        "step_avg_ms": 9.9,
        "peak_memory_mib": 7,
        "torch": "2.13.0+cpu",
        "device": "Some Chip 9",
        "val_bpb": None,
    }
    assert {key: found[key] for key in expected} == expected


def test_gpus_of_an_nvidia_smi_table_are_counted():
    row = "|   {}  NVIDIA H100 80GB HBM3          On  |   00000000:61:00.0 Off |                    0 |\n"
    machine = "Running PyTorch 2.10.0.dev20251210+cu126 compiled for CUDA 12.6\n"
    machine += "".join(row.format(i) for i in range(8))
    header = parsing.parse_log(log_text("", machine=machine)).header
    expected = {"torch": "2.10.0.dev20251210+cu126", "cuda": "12.6", "device": "8x NVIDIA H100 80GB HBM3"}
    assert header == expected | {"gpus": "NVIDIA H100 80GB HBM3", "gpu_count": 8}


@pytest.mark.parametrize(
    ("tail", "loss"),
    [("val_loss:3.2", 10.8), ("val_loss:3.2807 train_time:9", 3.2807), ("val_loss:3.28 step_avg:9ms", 3.28)],
)
def test_cut_number_at_the_end_of_log_txt_is_not_believed(tail, loss):
    trace = parsing.parse_log(log_text(f"step:0/9 val_loss:10.8\nstep:9/9 {tail}"))
    assert loading.latest(trace.rows, "val_loss") == loss


def test_log_txt_is_read_where_metrics_hold_nothing(tmp_path):
    found = summary(make_run(tmp_path, "a", b"\x00\x01\n\xfe\n", log_text("step:5/9 val_loss:3.5 train_time:5ms\n")))
    assert (found["source"], found["status"], found["val_loss"]) == ("log.txt", "running or killed at step 5", 3.5)
    assert any("unreadable" in note for note in found["notes"])


def test_damaged_config_is_noted(tmp_path):
    path = make_run(tmp_path, "a", lines(val(50, 3.0)))
    (path / "config.json").write_text('{"torch": "2.')
    found = summary(path)
    assert found["torch"] is None and found["notes"] == ["config.json is no JSON object and was left out"]


# -- the command


def test_report_table_mean_and_differing_settings(tmp_path, capsys):
    logs, losses = tmp_path / "logs", [3.2810, 3.2790, 3.2835]
    for i, loss in enumerate(losses):
        config = {
            "settings": {"seed": i, "lr": 0.1, "run_id": i},
            "hardware": {"device": "cpu", "name": "Chip"},
            "world_size": 2,
        }
        make_run(logs, f"run_{8 + i}", lines(val(0, 10.8), val(100, loss), end(100, loss)), config=config)
    make_run(logs, "killed", lines(val(50, 4.0)))
    status, out, err = run_main(capsys, logs, "--no-plot", "--wide")
    table = out.splitlines()
    assert (status, err, len(table)) == (0, "", 9)
    assert table[8] == f"table: {logs / 'exp' / 'logs.txt'}"
    assert (logs / "exp" / "logs.txt").read_text().splitlines() == table[:8]
    assert [line.split()[0] for line in table[2:6]] == ["killed", "run_8", "run_9", "run_10"]
    assert len({line.index("100/100") for line in table[3:6]}) == 1
    assert all(line.endswith("  Chip") for line in table[3:6])  # two CPU processes are one chip
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    assert f"{mean:.4f} +- {sd:.4f} (mean +- sd, n=3, 1 left out)" in table[6]
    assert table[7] == "settings that differ between the runs: seed"


def test_table_aligns_wide_characters(tmp_path):
    runs = [loading.read_run(make_run(tmp_path, name, lines(val(9, 3.5)))) for name in ("日本", "abcd")]
    _, _, wide, narrow = reporting.plain(reporting.experiment_report("exp", runs)).splitlines()
    assert wide.removeprefix("日本") == narrow.removeprefix("abcd")


def test_json_output(tmp_path, capsys):
    make_run(tmp_path / "logs", "a", lines(val(100, 3.5), end(100, 3.5)))
    status, out, _ = run_main(capsys, tmp_path / "logs", "--json")
    assert status == 0 and [run["val_loss"] for run in json.loads(out)["runs"]] == [3.5]
    assert not (tmp_path / "images").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nope", "no experiment 'nope' in '{logs}'; available: exp, other\\x1b[31m"),
        ("../logs/exp", "--experiment_name must name a folder inside '{logs}', not '../logs/exp'"),
        ("", "--experiment_name must name a folder inside '{logs}', not ''"),
        ("other\x1b[31m", "no run in '{logs}/other\\x1b[31m': expected folders that hold one of metrics.jsonl, "),
    ],
)
def test_errors_are_one_sentence(tmp_path, capsys, name, expected):
    logs = tmp_path / "logs"
    make_run(logs, "a", lines(val(100, 3.5)))
    (logs / "other\x1b[31m").mkdir()
    status, out, err = run_main(capsys, logs, experiment=name)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: " + expected.format(logs=logs))


def test_escapes_in_names_and_logs_are_not_printed_raw(tmp_path, capsys):
    evil = "a\x1b[2J\u202eb"
    make_run(tmp_path / "logs", evil, lines(val(9, 3.5), end(9, 3.5, "done\x1b]0;x\x07")), config={"torch": "\x1b[31m"})
    status, out, _ = run_main(capsys, tmp_path / "logs", "--no-plot")
    assert status == 0 and "\x1b" not in out and "\u202e" not in out and "\\x1b[2J\\u202e" in out
    _, out, _ = run_main(capsys, tmp_path / "logs", "--json")
    assert "\x1b" not in out and json.loads(out)["runs"][0]["run_id"] == evil


def test_no_plot_needs_no_matplotlib(tmp_path):
    make_run(tmp_path / "logs", "a", lines(val(100, 3.5)))
    code = "import sys, logger; logger.main(sys.argv[1:]); assert 'matplotlib' not in sys.modules"
    command = [sys.executable, "-c", code, "--experiment-name", "exp", "--log_dir", str(tmp_path / "logs"), "--no_plot"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.startswith(b"exp: 1 run,")


# -- the plot


def curve_records(floor, steps=100):
    loss = [floor + 7 * math.exp(-step / 5) for step in range(steps + 1)]
    rows = [[train(step, loss[step] + 0.1)] + [val(step, loss[step])] * (step % 20 == 0) for step in range(steps + 1)]
    return [record for row in rows for record in row]


def test_plot_is_written_and_its_path_printed(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("_price$^$", "b\x1b[31m", "日本"):
        make_run(tmp_path / "logs", name, lines(*curve_records(3.0)))
    status, out, err = run_main(capsys, tmp_path / "logs")
    path = tmp_path / "images" / "exp" / "loss.png"
    assert (status, err, out.splitlines()[-1]) == (0, "", f"plot: {path}")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_step_time_and_schedule_are_drawn_where_they_are_logged(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    rows = [train(step, 4.0) | {"lr": 1 - step / 100, "window": 64 * step} for step in range(1, 9)]
    run = loading.read_run(make_run(tmp_path / "logs", "a", lines(*rows)))
    make_run(tmp_path / "logs", "b", lines(val(9, 3.5)))
    figures = drawing.figures_of([run], "exp")
    assert list(figures) == ["step_time.png", "schedule.png", "loss.png"]
    assert [set(line.get_ydata()) for line in figures["step_time.png"].axes[0].lines] == [{10.0}]
    lr, window = (ax.lines[0].get_ydata() for ax in figures["schedule.png"].axes)
    assert list(lr) == [row["lr"] for row in rows] and list(window) == [row["window"] for row in rows]
    assert run_main(capsys, tmp_path / "logs")[0] == 0
    assert sorted(p.name for p in (tmp_path / "images" / "exp").iterdir()) == sorted(figures)


def test_figure_has_limits_and_a_legend_with_the_best_run_first(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [loading.read_run(make_run(tmp_path, f"_r{i}", lines(*curve_records(3 + i / 10)))) for i in range(10)]
    diverged = [*curve_records(3.0), train(101, 1e300), train(102, math.inf), val(102, math.nan)]
    runs.append(loading.read_run(make_run(tmp_path, "diverged", lines(*diverged))))
    figure = drawing.loss_figure(runs, "exp")
    figure.savefig(tmp_path / "loss.png")
    (ax,) = figure.axes
    low, high = ax.get_ylim()
    assert 2.8 < low < 3.0 and 3.9 < high < 6  # all last losses, not the first ones near 10
    assert ax.get_xlabel() == "step"
    labels = [text.get_text().split() for text in figure.legends[0].get_texts()]
    assert [label[1] for label in labels] == [f"_r{i}" for i in range(10)] + ["diverged"]
    assert labels[0][0] == f"{3 + 7 * math.exp(-20):.4f}" and labels[-1] == ["nan", "diverged", "nan"]


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [
        ([500.0], 3.0, 3.3),  # one spike leaves the panel
        ([1e5] * 300, 3.9, 4.2),  # so does a diverged run, one nat above the rest
        ([3 + i / 100 for i in range(80)], 3.7, 4.0),  # overfitting stays in sight
    ],
)
def test_loss_limits_with_losses_that_rise(after, least, most):
    rows = curve_records(3.0, steps=600) + [val(601 + i, loss) for i, loss in enumerate(after)]
    low, high = drawing.loss_limits([loading.Run(Path("a"), "metrics.jsonl", parsing.Trace(rows=rows), {})])
    assert 2.9 < low < 3.0 and least < high < most


def test_loss_limits_show_where_a_short_run_ended():
    rows = [curve_records(3.0), curve_records(6.0, steps=4)]
    runs = [loading.Run(Path("a"), "metrics.jsonl", parsing.Trace(rows=r), {}) for r in rows]
    assert drawing.loss_limits(runs[:1])[1] < 6 < 6 + 7 * math.exp(-4 / 5) < drawing.loss_limits(runs)[1]


def test_a_single_validation_of_a_log_txt_is_a_dot(tmp_path):
    pytest.importorskip("matplotlib")
    run = loading.read_run(make_run(tmp_path, "a", log=log_text("step:5/9 val_loss:3.5 train_time:5ms\n")))
    (line,) = drawing.loss_figure([run], "exp").axes[0].lines
    assert [*line.get_xdata()] == [5] and [*line.get_ydata()] == [3.5] and line.get_marker() == "o"


def test_nothing_to_plot(tmp_path, capsys):
    make_run(tmp_path / "logs", "a", config={"settings": {"iterations": 7}})
    status, out, _ = run_main(capsys, tmp_path / "logs")
    assert status == 0 and "no step logged" in out and "-/7" in out and "no plot: no loss logged yet" in out
    assert not (tmp_path / "images").exists()
