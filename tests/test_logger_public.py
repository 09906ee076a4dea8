"""Tests of logger.py on public logs of every era, written here: numbers, damage, size, hostile text."""

import io
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import logger
from runlogs import arms, loading, output, parsing, reporting

QUICK = settings(deadline=None, database=None, max_examples=60)
BAR = "=" * 100 + "\n"
CODE = "import math\n\nWIDTH = 8  # step:1/2 val_loss:0.1 train_time:1ms step_avg:1ms\nprint(f'step:{WIDTH}')\n"
QUOTE = "'''\nstep:0/9 val_loss:0.1 train_time:1ms step_avg:1ms\n'''\n"  # a step line at the start of a line of code
SMI = """Fri Oct 10 23:58:24 2025
+-----------------------------------------------------------------------------+
| NVIDIA-SMI 570.1.2       Driver Version: 570.1.2       CUDA Version: 12.8     |
|=============================================================================|
{rows}+-----------------------------------------------------------------------------+

"""
ROW = "|   {}  NVIDIA H100 80GB HBM3       On  | 00000000:61:00.0 Off |     0 |\n"
SMI = SMI.format(rows="".join(map(ROW.format, range(8))))
PYTHON, TORCH = "Running Python 3.12.7 (main, x) [GCC 13]\n", "Running PyTorch 2.9.0+cu126 compiled for CUDA 12.6\n"
TRITON = "Running Triton version 3.4.0\n"
WARM = "Compiling model and warming up kernels (~7 minutes)\nSampling steps [0, 1] for warmup\nResetting Model\n"
PEAK = "peak memory allocated: 30724 MiB reserved: 45952 MiB\n"


def steps_ms(count=8, every=4, train=False, nan=-1, reset=False, loss=3.25):
    """Step lines of a run of 100 ms a step; the clock of `reset` starts again after step 2, as do all averages."""
    lines = []
    for step in range(count + 1):
        ms = 100 * (step - 2 if reset and step > 2 else step) + (50_000 if reset and step <= 2 else 0)
        average = "nan" if step <= nan else f"{ms / max(1, step):.2f}"
        if step:
            kind = f"train_loss:{loss + 1:.4f} " if train else ""
            lines.append(f"step:{step}/{count} {kind}train_time:{ms}ms step_avg:{average}ms\n")
        if step % every == 0 or step == count:
            value = loss + count - step
            lines.append(f"step:{step}/{count} val_loss:{value:.4f} train_time:{ms}ms step_avg:{average}ms\n")
    return "".join(lines)


def steps_s(losses, count=4):
    """Trials of track 3: validations only, in seconds."""
    start = f"step:0/{count} val_loss:10.82584 train_time:0.000s step_avg:nanms\n"
    end = f"step:{count}/{count} val_loss:{{}} train_time:12.345s step_avg:3086.25ms handoff:keep\n"
    return "".join(f"trial:{i}/{len(losses)} seed:{i}\n{start}{end.format(loss)}" for i, loss in enumerate(losses))


FILES = "-" * 40 + "\n# triton_kernels.py\n" + "-" * 40 + "\n\nimport triton\n"
ERAS = {
    "llm.c": "s:0 tel:10.9\ns:0 trl:10.8 lr:0.000001 norm:15.37\ns:7 trl:3.3 lr:0.1 norm:0.2\ns:8 tel:3.25\n",
    "step lines only": "some words\n" + steps_ms(),
    "10/2024, separator first": BAR + CODE + BAR + TORCH.replace("PyT", "pyt") + "nvidia-smi:\n" + SMI + BAR
    + steps_ms(train=True, nan=1),
    "12/2024, three separators": CODE + BAR + PYTHON.lower().capitalize() + TORCH.replace("PyT", "pyt") + SMI + BAR
    + "Training DataLoader: total number of tokens: 1000 across 1 files\n" + BAR + steps_ms()
    + "peak memory consumption: 34239 MiB\n",
    "01/2025, clock reset": CODE + BAR + PYTHON + TORCH + SMI + BAR + steps_ms(nan=2, reset=True) + PEAK,
    "02/2025, two separators": CODE + BAR + PYTHON + TORCH + SMI + BAR + "  Total parameters: 1,234\n" + steps_ms()
    + PEAK,
    "07/2025, Triton version": CODE + BAR + PYTHON + TORCH + TRITON + SMI + BAR + steps_ms() + PEAK,
    "12/2025, warm-up lines": CODE + BAR + PYTHON + TORCH + TRITON + SMI + BAR + WARM + steps_ms() + PEAK
    + "HellaSwag: accuracy=0.3\n",
    "2026, several files": CODE + "\n" + FILES + BAR + PYTHON + TORCH + TRITON + SMI + BAR + WARM + steps_ms() + PEAK,
    "track 3, seconds": CODE + BAR + TORCH.rstrip() + " on NVIDIA GH200 120GB with world_size 4\n" + BAR
    + steps_s([3.31, 3.27, 3.25]),
}
LINES_ONLY = {"llm.c", "step lines only"}


def write(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def describe(path, **options):
    return loading.describe(loading.load_one(path, **options))


def parse(text):
    return parsing.parse_log(io.BytesIO(text) if isinstance(text, bytes) else text)


# -- eras


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("era", ERAS)
def test_every_era(tmp_path, era, keep, newline):
    found = describe(write(tmp_path / "a.txt", ERAS[era].replace("\n", newline)), keep_rows=keep, keep_source=keep)
    assert (found["era"], found["status"], found["final_val_loss"]) == (era, "complete", 3.25)
    assert (found["steps"], found["trials"]) == ((4, 3) if "track 3" in era else (8, 1))
    seconds = {"llm.c": None, "track 3, seconds": 12.345, "01/2025, clock reset": 0.6}
    assert found["train_time_s"] == seconds.get(era, 0.8)
    hardware = "4x NVIDIA GH200 120GB" if "track 3" in era else "8x NVIDIA H100 80GB HBM3"
    machine = (None, None) if era in LINES_ONLY else (hardware, "2.9.0+cu126")
    assert (found["gpus"], found["torch"]) == machine
    smi = machine[0] is not None and "track 3" not in era
    assert (found["driver"], found["date"]) == (("570.1.2", "2025-10-10 23:58:24") if smi else (None, None))
    assert (found["code_hash"] is None) == (era in LINES_ONLY)


def test_what_only_some_eras_tell(tmp_path):
    found = {era: describe(write(tmp_path / "a.txt", text)) for era, text in ERAS.items()}
    assert [era for era in found if found[era]["triton"] == "3.4.0"] == list(ERAS)[6:9]
    old, new = found["12/2024, three separators"], found["02/2025, two separators"]
    assert (old["peak_allocated_mib"], old["peak_reserved_mib"], old["python"]) == (34239, None, "3.12.7")
    assert (old["data_tokens"], new["data_tokens"]) == (1000, None)
    assert (new["peak_allocated_mib"], new["peak_reserved_mib"], new["params_total"]) == (30724, 45952, 1234)
    assert found["2026, several files"]["parts"] == ["train_gpt.py", "triton_kernels.py"]
    assert found["01/2025, clock reset"]["warnings"] == ["the clock was set back 1 time"]
    assert [f["final_val_loss"] for f in found["track 3, seconds"]["trial_runs"]] == [3.31, 3.27, 3.25]
    assert all(not f["warnings"] for era, f in found.items() if era != "01/2025, clock reset")
    hashes = {f["code_hash"] for era, f in found.items() if era not in LINES_ONLY and "several" not in era}
    assert len(hashes) == 1  # the same source in every layout


def test_source_is_given_back_file_by_file(tmp_path):
    run = loading.load_one(write(tmp_path / "a.txt", ERAS["2026, several files"]))
    assert run.trace.parts == {"train_gpt.py": CODE, "triton_kernels.py": "import triton\n"}


def test_steps_quoted_in_the_code_do_not_count():
    for separators in ("", BAR):
        trace = parse(separators + CODE + QUOTE + BAR + TORCH + BAR + steps_ms())
        assert [row["val_loss"] for row in trace.rows if "val_loss" in row] == [11.25, 7.25, 3.25]


@pytest.mark.parametrize("line", ["=" * 99, "=" * 101, "|" + "=" * 100, "x = '" + "=" * 100 + "'", "=" * 100 + " x"])
def test_only_exact_separators_separate(line):
    trace = parse(CODE + line + "\n" + BAR + TORCH + BAR + steps_ms())
    assert line in trace.parts["train_gpt.py"] and len(trace.rows) == 11


def test_a_separator_at_the_end_takes_no_step_away():
    for text in (ERAS["02/2025, two separators"], ERAS["12/2024, three separators"]):
        assert parse(text + BAR + "\n").trials == parse(text).trials
    assert parse(CODE + QUOTE + BAR).trials == parse(CODE + QUOTE + BAR + TORCH + BAR).trials == []


def test_unknown_keys_are_kept():
    line = "step:4/4 val_loss:3.2 val_ema_loss:3.1 train_time:1.5s step_avg:3ms rel:7.7e-04 handoff:none gamma:-0.075\n"
    expected = {"val_ema_loss": 3.1, "train_time_ms": 1500.0, "rel": 7.7e-4, "handoff": "none", "gamma": -0.075}
    assert expected.items() <= parse(line).rows[0].items()


# -- trials, resumes, ends


def test_trials_start_over_and_repeated_lines_do_not():
    one = "step:125/300 val_loss:4.5 train_time:1s step_avg:8ms\nstep:300/300 val_loss:{} train_time:2s step_avg:7ms\n"
    summary = "step:125/300 val_loss:4.5 train_time:1s step_avg:8ms\n"
    trace = parse(one.format(3.3) + "seed 1 done\n" + summary + one.replace("1s", "1.1s").format(3.2))
    assert [[row["val_loss"] for row in rows] for rows in trace.trials] == [[4.5, 3.3], [4.5, 3.2]]
    assert trace.notes == []


def test_a_log_that_goes_back_without_an_end_is_a_resumed_run():
    line = "step:{}/9 val_loss:{} train_time:1ms step_avg:1ms\n"
    trace = parse(line.format(2, 5.0) + line.format(5, 4.0) + line.format(3, 4.5))
    assert [row["step"] for row in trace.rows] == [2, 3] and trace.notes == [parsing.BACKWARD]
    trace = parse(line.format(2, 5.0) + line.format(5, 4.0) + "resumed after step 2\n" + line.format(3, 4.5))
    assert [row["step"] for row in trace.rows] == [2, 3] and trace.notes == [] and trace.resets == 0


def test_incomplete_trials_are_named(tmp_path):
    text = steps_s([3.3]).replace("step:4/4", "step:3/4") + steps_s([3.2])
    found = describe(write(tmp_path / "a.txt", text))
    assert (found["status"], found["trials"], found["warnings"]) == ("complete", 2, ["incomplete trials: 1"])


def test_how_runs_end(tmp_path):
    whole = steps_ms(count=12)
    lines = whole.splitlines(keepends=True)
    on_beat = "".join(lines[: next(i for i, line in enumerate(lines) if "8/12 val" in line) + 1])
    extra = on_beat + "step:10/12 val_loss:3.5 train_time:1000ms step_avg:100.00ms\n"
    nan = whole.replace("val_loss:3.2500", "val_loss:nan")
    expected = {whole: "complete", on_beat: "died", on_beat + lines[-2]: "died", extra: "complete", nan: "nan",
                on_beat + PEAK: "complete", CODE + BAR + TORCH + BAR: "died", CODE: "not a log", "": "not a log"}
    for text, status in expected.items():
        assert describe(write(tmp_path / "a.txt", text))["status"] == status, text
    assert describe(write(tmp_path / "a.txt", extra))["warnings"] == ["ended by itself at step 10 of 12"]
    found = describe(write(tmp_path / "a.txt", nan))
    assert math.isnan(found["final_val_loss"]) and found["best_val_loss"] == 7.25


@pytest.mark.skipif(not os.path.exists("/proc/self/fdinfo"), reason="only Linux tells who has a file open")
def test_a_log_that_is_being_written_is_running(tmp_path):
    path = write(tmp_path / "a.txt", steps_ms().rpartition("step:8/8 val")[0])
    with open(path, "a"):
        loading.files_being_written.cache_clear()
        assert describe(path)["status"] == "running"
    loading.files_being_written.cache_clear()
    assert describe(path)["status"] == "died"


# -- damage


@QUICK
@given(st.sampled_from(sorted(ERAS)), st.floats(0, 1), st.booleans())
def test_a_truncated_log_gives_no_number_that_is_not_in_it(tmp_path_factory, era, share, keep):
    text = ERAS[era]
    losses = {float(number) for number in re.findall(r"(?:val_loss|tel):([\d.]+)", text)}
    path = write(tmp_path_factory.mktemp("cut") / "a.txt", text[: int(share * len(text))])
    found = describe(path, keep_rows=keep)
    assert found["final_val_loss"] is None or found["final_val_loss"] in losses
    assert found["train_time_s"] is None or f"{found['train_time_s']:.3f}" in {"0.000", "12.345"} or (
        found["train_time_s"] * 1000 == int(found["train_time_s"] * 1000))
    json.loads(output.strict_json(found), parse_constant=pytest.fail)


FRAGMENTS = st.sampled_from([
    BAR.encode(), b"step:1/2 val_loss:", b"step:2/2 val_loss:3.2 train_time:1ms step_avg:1ms\n", b"s:3 tel:",
    b"\r\n", b"step:1/2 train_time:2ms step_avg:nanms\n", b"\n", b"\x1b[31m", b"\0", b"resumed after step 1\n",
    b"\xff\xfe", b"nan",
    b"peak memory allocated: 9 MiB reserved: ", b"-" * 40, b"step:9e99/1 val_loss:1e999 a:b:c\n", b"trial:1/2\n",
    b"Running PyTorch 2.9\n"])


@QUICK
@given(st.lists(FRAGMENTS | st.binary(max_size=30), max_size=20), st.booleans())
@example([b"step:" + b"9" * 5000 + b"/1 val_loss:3"], True)
@example([b"step:1/1 " + b"a:1 " * 5000], False)
def test_arbitrary_bytes_never_raise(tmp_path_factory, pieces, keep):
    path = write(tmp_path_factory.mktemp("bytes") / "a.txt", b"".join(pieces))
    run = loading.load_one(path, keep)
    found = loading.describe(run, target=3.0)
    report = [reporting.screen(found), reporting.run_table([found])]
    for text in (reporting.plain(report), reporting.markdown(report)):
        assert "\x1b" not in text and "\0" not in text
    json.loads(output.strict_json(found), parse_constant=pytest.fail)
    samples, dropped = arms.trials_of(run)
    assert len(samples) + len(dropped) >= (1 if run.trace.mixed else len(run.trace.trials))  # a mixed file is one


CURVES = st.lists(st.tuples(st.integers(1, 50), st.decimals(0, 20, places=4), st.integers(0, 10**6), st.booleans()),
                  min_size=2, max_size=12)


@QUICK
@given(st.lists(CURVES, min_size=1, max_size=4), st.sampled_from(["ms", "s"]), st.integers(2, 4), st.booleans(),
       st.booleans())
def test_generated_logs_come_back(trials, unit, separators, crlf, first):
    expected, lines = [], []
    for curve in trials:
        step, rows = -1, []
        for i, (gap, loss, time, is_val) in enumerate(curve):
            step = 0 if i == 0 else step + gap
            last = sum(gap for gap, *_ in curve[1:])
            key = "val_loss" if is_val or i in (0, len(curve) - 1) else "train_loss"
            lines.append(f"step:{step}/{last} {key}:{loss} train_time:{time}{unit} step_avg:1.00ms\n")
            rows.append({"step": step, "iterations": last, key: float(loss), "step_avg_ms": 1.0,
                         "train_time_ms": float(time) * (1000 if unit == "s" else 1)})
        expected.append(rows)
    text = (BAR if first else "") + CODE + (BAR + TORCH) * (separators - 1) + BAR + "".join(lines)
    trace = parse((text.replace("\n", "\r\n") if crlf else text).encode())
    assert trace.trials == expected and trace.parts == {"train_gpt.py": CODE} and trace.notes == []


@QUICK
@given(st.sampled_from(sorted(ERAS)), st.integers(1, 400))
def test_blocks_of_any_size_give_the_same(era, size):
    text = ERAS[era].encode()
    with pytest.MonkeyPatch.context() as patch:
        whole = parse(text)
        patch.setattr(parsing, "BLOCK", size)
        pieces = list(parsing.blocks_of(io.BytesIO(text)))
        small = parse(text)
    assert b"".join(pieces) == text
    if size > max(map(len, text.split(b"\n"))):  # a line longer than a block is cut
        assert repr(small) == repr(whole)


def test_other_encodings(tmp_path):
    text = ERAS["07/2025, Triton version"]
    expected = describe(write(tmp_path / "a.txt", text))
    latin = text.replace("math", "math  # \xe9").encode("latin-1")
    for data in (text.encode("utf-16"), b"\xef\xbb\xbf" + text.encode(), latin):
        found = describe(write(tmp_path / "a.txt", data))
        assert found | {"code_hash": None} == expected | {"code_hash": None}


@pytest.mark.parametrize("name", ["stderr.txt", "metadata.txt", "noise.log", "zeros.txt"])
def test_not_a_log(tmp_path, name):
    text = {"stderr.txt": "W0506 torch/distributed/run.py:852] *****\nstep by step:1\n", "noise.log": os.urandom(4096),
            "metadata.txt": "run_id=1\nGPU 3: NVIDIA H100 (UUID: GPU-7)\n", "zeros.txt": bytes(3_000_000)}[name]
    found = describe(write(tmp_path / name, text))
    assert (found["status"], found["final_val_loss"], found["steps"], found["trials"]) == ("not a log", None, None, 0)


# -- size


def test_long_logs_are_thinned_out(monkeypatch):
    monkeypatch.setattr(parsing, "MAX_ROWS", 100)
    lines = steps_ms(count=4000, every=400).replace("val_loss:2003.25", "val_loss:0.5")
    trace = parse(lines)
    assert len(trace.rows) <= 100 and trace.rows[-1]["step"] == 4000
    assert [row["step"] for row in trace.rows if "val_loss" in row] == list(range(0, 4001, 400))
    assert loading.describe(loading.Run(Path("a"), "a", trace, {}))["best_val_loss"] == 0.5
    only = parse("".join(line for line in steps_ms(count=1000, every=1).splitlines(True) if "val_loss" in line))
    assert len(only.rows) <= 100 and only.rows[-1]["val_loss"] == 3.25
    assert trace.notes == only.notes == ["more than 100 records: not all of them were kept"]


def test_sections_and_trials_are_bounded(monkeypatch):
    monkeypatch.setattr(parsing, "MAX_SECTION", 64)
    monkeypatch.setattr(parsing, "MAX_TRIALS", 5)
    trace = parse("x = 1\n" * 50 + BAR + TORCH + BAR + steps_s([3.3] * 20 + [3.1]))
    assert len(trace.parts["train_gpt.py"]) <= 65 and len(trace.trials) == 6 and trace.rows[-1]["val_loss"] == 3.1
    assert len(trace.notes) == 2


def test_records_without_loss_and_sources_are_dropped_when_not_needed(tmp_path):
    path = write(tmp_path / "a.txt", ERAS["07/2025, Triton version"])
    slim, full = (loading.load_one(path, keep, keep) for keep in (False, True))
    assert (len(slim.trace.rows), len(full.trace.rows)) == (3, 11) and slim.trace.parts == {"train_gpt.py": ""}
    assert loading.describe(slim) == loading.describe(full)


# -- hostile text

EVIL = "\x1b]0;owned\x07\x1b[2J<script>alert(1)</script>|[bold]\u202e"


def test_hostile_text_is_spelled_out_everywhere(tmp_path, capsys):
    machine = f"Running PyTorch 2.9{EVIL.replace(' ', '')} compiled for CUDA 1\n"
    name = tmp_path / "a\x1b[31m\n.txt"
    write(name, CODE.replace("8", repr(EVIL)) + BAR + machine + BAR + steps_ms().replace("step_avg", EVIL))
    other = write(tmp_path / "b.txt", CODE + EVIL + BAR + machine + BAR + steps_ms())
    for argv in (["show", str(name)], ["show", "--markdown", str(name)], ["stats", str(name)],
                 ["diff", str(name), str(other)], ["diff", "--markdown", str(other), str(name)],
                 ["compare", str(name), str(other), "--no-plot"]):
        assert logger.main(argv) == 0
        out, err = capsys.readouterr()
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", out) and err == ""
        if "--markdown" in argv:
            assert "<script>" not in re.sub(r"(?s)`{12}diff.*?`{12}", "", out).replace(r"\<script", "")


def test_rich_tables_read_no_markup(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "[bold]a.txt", ERAS["07/2025, Triton version"])
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert logger.main(["show", "[[]bold]a.txt"]) == 0
    out = capsys.readouterr().out
    assert "[bold]a.txt" in out and "\x1b[1m" in out
