"""Tests of the formats that logger.py reads: the newest public form, sister projects, prefixes, gzip, what is no log.
The logs are written here, after the grammar of each project."""

import gzip
import io
import json
import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_logger_public import BAR, CODE, PEAK, PYTHON, SMI, TORCH, TRITON, describe, parse, steps_ms, write

import logger
from runlogs import arms, formats, loading, output, parsing, reporting

QUICK = settings(deadline=None, database=None, derandomize=True, max_examples=60)
MACHINE = BAR + PYTHON + TORCH + TRITON + SMI + BAR


def part(name, text="\nx = 1\n"):
    """One more file of a source, as the newest logs write it."""
    return f"\n\n{'-' * 40}\n# {name}\n{'-' * 40}\n{text}"


# -- the newest public form

TAIL = """step:475/500 train_time:9120ms step_avg:19.20ms
step:499/500 train_time:9604ms step_avg:19.25ms
step:500/500 train_time:9623ms step_avg:19.25ms
[ship:demo] win=100 blend=0.5 labels=['head']
step:500/500 val_loss:3.4012 train_time:9790ms step_avg:19.58ms
step:500/500 val_loss_unmasked:3.4031
step:500 diag nll:3.4012 alpha:0.0400
index built in 6.48 s
peak memory allocated: 900 MiB reserved: 1024 MiB
"""
NAMES = ["track_1_short/__init__.py", *(f"track_1_short/model/part_{i}.py" for i in range(42)), "exact/src/lib.rs"]
NAMES += ["a.cu"]
NEWEST = CODE + "".join(part(name, "" if "init" in name else f"\n# {name}\n") for name in NAMES) + MACHINE + TAIL


@pytest.mark.parametrize("keep", [True, False])
def test_the_newest_form(tmp_path, keep):
    found = describe(write(tmp_path / "a.txt", NEWEST), keep_rows=keep)
    expected = {"status": "complete", "steps": 500, "max_step": 500, "final_val_loss": 3.4012, "train_time_s": 9.79,
                "step_avg_ms": 19.58, "trials": 1, "era": "2026, several files", "peak_allocated_mib": 900,
                "extras": {"val_loss_unmasked": 3.4031, "nll": 3.4012, "alpha": 0.04}, "warnings": []}
    assert expected.items() <= found.items()
    assert found["parts"] == ["train_gpt.py", *NAMES] and len(NAMES) > 40


def test_each_part_has_its_text():
    trace = parse(NEWEST)
    assert trace.parts["exact/src/lib.rs"] == "# exact/src/lib.rs\n"
    assert trace.parts["track_1_short/__init__.py"] == "\n"
    assert trace.parts["train_gpt.py"] == CODE


LEAD_OUT = ["../a.py", "a/../b.py", "/a.py", "a//b.py", "a/", "./a.py", "a/./b.py", "a/..", "-a/b.py", "a/-b.py",
            "a\\b.py", "a b.py", "a/" * 20 + "b.py", "a/" + "b" * 101, "C:/a.py"]


@pytest.mark.parametrize("name", LEAD_OUT)
def test_a_path_that_leads_elsewhere_is_text_of_the_source(name):
    assert list(parse(CODE + part(name) + MACHINE + TAIL).parts) == ["train_gpt.py"]


def test_two_parts_of_one_name_lose_nothing():
    parts = part("a/b.py", "one\n") + part("a/b.py", "two\n") + part("train_gpt.py", "three\n")
    trace = parse(CODE + parts + MACHINE + TAIL)
    assert [text.strip() for text in trace.parts.values()][1:] == ["one", "two", "three"]
    assert list(trace.parts)[1:] == ["a/b.py", "a/b.py~", "train_gpt.py~"]


def test_records_of_a_step_merge_but_train_and_validation_with_their_times_stay():
    line = "step:4/8 {} train_time:{}ms step_avg:1.00ms\n"
    pair = line.format("train_loss:4.5", 400) + line.format("val_loss:4.1", 410)
    trace = parse(pair + "step:4/8 val_x:5 val_loss:9\n")
    assert [(row.get("train_loss"), row.get("val_loss"), row["train_time_ms"]) for row in trace.rows] == [
        (4.5, None, 400.0), (None, 4.1, 410.0)]
    assert trace.rows[1]["val_x"] == 5
    trace = parse("step:4/8 train_loss:4.5\nstep:4/8 val_loss:4.1\n")
    assert trace.rows == [{"step": 4, "iterations": 8, "train_loss": 4.5, "val_loss": 4.1}]


AFTER = ["step:500 diag nll:3.4", "step:500", "step:500 words only", "step:700 nll:3 val_loss:1", "step:500/500 note:1",
         "step:3 nll:2 train_time:1ms", "step:500/500 train_time:9999ms"]


@pytest.mark.parametrize("line", AFTER)
def test_no_line_behind_the_last_validation_makes_a_run_unfinished(tmp_path, line):
    found = describe(write(tmp_path / "a.txt", CODE + MACHINE + TAIL + line + "\n"))
    assert (found["status"], found["steps"], found["final_val_loss"]) == ("complete", 500, 3.4012)
    assert found["train_time_s"] == 9.79 and found["era"] == "07/2025, Triton version"


def test_lines_without_the_last_step_are_records_while_it_goes_on():
    trace = parse("step:0/9 val_loss:9\nstep:1 train_loss:8\nstep:2 train_loss:7\nstep:2 note:3\nstep:9/9 val_loss:3\n")
    assert [(row["step"], row["iterations"]) for row in trace.rows] == [(0, 9), (1, 9), (2, 9), (9, 9)]
    assert trace.rows[2]["note"] == 3


def test_a_clock_that_a_resume_sets_back_is_no_reset():
    line = "step:{}/9 val_loss:4 train_time:{}ms step_avg:1ms\n"
    text = line.format(2, 1000) + line.format(5, 5000) + "resumed after step 2\n" + line.format(3, 100)
    assert (parse(text).resets, parse(text.replace("resumed", "on")).resets) == (0, 0)
    assert parse(line.format(2, 1000) + line.format(3, 100)).resets == 1


def test_track_3_names_its_machine(tmp_path):
    header = "Running PyTorch 2.5.1 compiled for CUDA 12.4\n\nRunning on device_name=NVIDIA A40 with world_size=2\n\n"
    log = CODE + BAR + header + "Using seed=7\n" + BAR + "step:2/2 val_loss:3.1 train_time:1.5s step_avg:1ms\n"
    found = describe(write(tmp_path / "a.txt", log))
    assert (found["gpus"], found["world_size"], found["seed"]) == ("2x NVIDIA A40", 2, 7)


# -- which loss counts


def ema_log(folder, i, last="val_ema_loss:{} "):
    lines = ["step:0/4 val_loss:9.5 train_time:0.000s step_avg:nanms\n",
             f"step:2/4 val_loss:4.{i} val_ema_loss:4.0{i} train_time:1.0s step_avg:1ms\n",
             f"step:4/4 val_loss:3.{i} {last.format(f'3.0{i}')}train_time:2.0{i}s step_avg:1ms\n"]
    return write(folder / f"{i}.txt", CODE + MACHINE + "".join(lines))


def run(capsys, *argv):
    code = logger.main([*map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_loss_key_counts_in_every_command(tmp_path, capsys):
    folder = tmp_path / "2026-01-01_A"
    folder.mkdir()
    paths = [ema_log(folder, i) for i in range(1, 4)]
    write(folder / "README.md", "Mean val loss 3.0200, n=3\n")
    key = ["--json", "--loss-key", "val_ema_loss"]
    shown = json.loads(run(capsys, "show", *key, paths[0])[1])["runs"][0]
    assert (shown["final_val_loss"], shown["extras"]["val_loss_raw"]) == (3.01, 3.1)
    assert shown["status"] == "complete" and shown["best_val_loss"] == 3.01
    assert json.loads(run(capsys, "stats", *key, folder)[1])["mean_val_loss"] == pytest.approx(3.02)
    compared = json.loads(run(capsys, "compare", *key, folder, paths[0])[1])
    assert [group["mean_val_loss"] for group in compared["groups"]] == pytest.approx([3.02, 3.01])
    claims = [json.loads(run(capsys, "verify", *k, folder)[1])["claims"] for k in (key, ["--json"])]
    assert claims[0] != claims[1]
    records = json.loads(run(capsys, "board", *key, folder)[1])["records"]
    assert records[0]["mean_val_loss"] == pytest.approx(3.02)
    for form in ("csv", "json"):
        assert "3.01" in run(capsys, "export", *key[1:], "--format", form, paths[0])[1]
    table = run(capsys, "export", *key[1:], paths[0])[1].splitlines()
    at = table[0].split(",").index("val_loss")
    assert [row.split(",")[at] for row in table[1:]] == ["", "4.01", "3.01"]


def test_a_loss_key_that_no_record_has_is_refused(tmp_path, capsys):
    path = ema_log(tmp_path, 1)
    for command in ("show", "stats", "export"):
        code, out, err = run(capsys, command, "--loss-key", "val_emu", path)
        assert (code, out) == (1, "") and err.count("\n") == 1
        assert "--loss-key 'val_emu': no record" in err and "they hold val_ema_loss, val_loss\n" in err


def test_a_run_without_the_loss_key_at_its_end_does_not_count(tmp_path, capsys):
    ema_log(tmp_path, 1), ema_log(tmp_path, 2, last="")
    code, out, _ = run(capsys, "stats", "--json", "--loss-key", "val_ema_loss", tmp_path)
    found = json.loads(out)
    assert (code, found["n"], found["losses"]) == (0, 1, [3.01])
    assert "2.txt: no val_loss in its last record" in " ".join(found["warnings"])
    found = json.loads(run(capsys, "show", "--json", "--loss-key", "val_ema_loss", tmp_path)[1])["runs"]
    assert ["has no val_ema_loss" in " ".join(one["warnings"]) for one in found] == [False, True]
    assert [(one["status"], one["final_val_loss"]) for one in found] == [("complete", 3.01), ("complete", None)]


def test_bits_per_byte_count_only_when_asked_for(tmp_path, capsys):
    for i in range(3):
        write(tmp_path / f"{i}.log", PROJECTS["nanochat"][0].replace("0.9000", f"0.90{i}0"))
    code, _, err = run(capsys, "stats", tmp_path)
    assert code == 1 and "--loss-key val_bpb" in err
    found = json.loads(run(capsys, "stats", "--json", "--loss-key", "val_bpb", tmp_path)[1])
    assert found["n"] == 3 and found["mean_val_loss"] == pytest.approx(0.901)


# -- sister projects

GOLF = """val_bpb:enabled tokenizer_kind=sentencepiece
warmup_step:1/20
step:0/900 val_loss:6.9 val_bpb:4.1 train_time:0ms step_avg:0.01ms
step:1/900 train_loss:6.9 train_time:76ms step_avg:75.51ms
swa:start step:400
step:500/900 loss:3.1 t:5000ms avg:10.0ms
step:600/900 val_loss:2.0 val_bpb:1.2 train_time:6000ms step_avg:10.00ms
stopping_early: wallclock_cap train_time:6000ms step:600/900
{end}final_int8_exact val_loss:2.05 val_bpb:1.25
final_sliding stride:64 val_loss:1.95 val_bpb:1.15 (T=1.00) eval_time:71405ms
"""
BARS = "| loss: {} | lrm: 1.00 | dt: {}ms | tok/sec: 48,042 | {}mfu: 31.5"
CHAT = "".join(f"step {i:05d}/00020 (0.1%) {BARS.format(9 - i / 4, 60_000, 'bf16_')} | epoch: 1 | total time: {i}.00m\n"
               for i in range(20))
SLOW = "".join(f"step {i:05d} (0.1%) {BARS.format(9 - i / 4, 1000, 'bf16_')}% | eta: 3.0m\n" for i in range(1, 21))
AUTO = "".join(f"\rstep {i:05d} (0.1%) {BARS.format(9 - i / 4, 1000, '')}% | epoch: 1 | remaining: 1s   "
               for i in range(20))
PROJECTS = {  # project: (log, final val loss, final val_bpb, steps, seconds, some extras)
    "nanoGPT": (
        "Overriding: max_iters = 20\nstep 0: train loss 10.9, val loss 10.95\n"
        "iter 0: loss 10.9, time 157.46ms, mfu -100.00%\niter 10: loss 5.5, time 100.00ms, mfu 22.65%\n"
        "step 20: train loss 3.5, val loss 3.6\nsaving checkpoint to out\n"
        "iter 20: loss 3.4, time 900.00ms, mfu 20.00%\n",
        3.6, None, 20, None, {"eval_train_loss": 3.5, "dt_ms": 900.0}),
    "nanochat": (
        "Step 00000 | Validation bpb: 3.1675\n" + CHAT + "Step 00020 | Validation bpb: 0.9000\n"
        "Step 00020 | CORE metric: 0.26\nPeak memory usage: 600.50MiB\nTotal training time: 19.50m\n"
        "Minimum validation bpb: 0.8900\n",
        None, 0.9, 20, 1170.0, {"core_metric": 0.26, "min_val_bpb": 0.89}),
    "slowrun": (
        "Step 00000 | Val BPB: 3.5 | Val Loss: 10.8\n" + SLOW
        + "Step 00020 | Epoch 2 | Val BPB: 1.0947 | Val Loss: 3.3684\n"
        "Peak memory: 470.65 MiB\nTotal training time: 0.20m\nFinal train loss: 3.0\nMin val BPB: 1.0947\n"
        "Min val Loss: 3.3\nEMA Val BPB: 1.08 | EMA Val Loss: 3.2\n  [equal] Val BPB: 1.07 | Val Loss: 3.1\n",
        3.3684, 1.0947, 20, 12.0, {"epoch": 2.0, "min_val_loss": 3.3, "EMA.val_loss": 3.2, "EMA.val_bpb": 1.08,
                                    "equal.val_loss": 3.1}),
    "parameter-golf": (GOLF.format(end=PEAK), 2.0, 1.2, 600, 6.0, {
        "final_int8_exact.val_loss": 2.05, "final_sliding_stride_64.val_bpb": 1.15}),
    "autoresearch": (
        AUTO + "\n---\nval_bpb:          1.0651\ntraining_seconds: 9.4\ntotal_seconds:    44.0\n"
        "peak_vram_mb:     934.9\n"
        "total_tokens_M:   318.8\nnum_steps:        20\nnum_params_M:     41.9\nW0403 a warning behind it\n",
        None, 1.0651, 20, 9.4, {"total_seconds": 44.0}),
}
LATE_GOLF = """0/900 val_loss: 6.9 val_bpb: 4.1
1/900 train_loss: 6.9 train_time: 0.0m tok/s: 12535509
500/900 train_loss: 3.1 train_time: 0.1m tok/s: 12535509 looping:True
600/900 val_loss: 2.0 val_bpb: 1.2
stopping_early: wallclock_cap train_time: 6000ms step: 600/900
"""


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("project", PROJECTS)
def test_every_project(tmp_path, project, keep, newline):
    text, loss, bpb, steps, seconds, extras = PROJECTS[project]
    found = describe(write(tmp_path / "a.log", text.replace("\n", newline)), keep_rows=keep)
    assert (found["era"], found["status"], found["steps"], found["trials"]) == (project, "complete", steps, 1)
    assert (found["final_val_loss"], found["final_val_bpb"], found["train_time_s"]) == (loss, bpb, seconds)
    assert extras.items() <= found["extras"].items()


def test_the_later_form_of_parameter_golf(tmp_path):
    for text in (LATE_GOLF, re.sub("(?m)^", "1776142723.115 ", LATE_GOLF.rstrip("\n")) + "\n"):
        found = describe(write(tmp_path / "a.log", text))
        assert (found["era"], found["status"], found["max_step"]) == ("parameter-golf", "complete", 900)
        assert (found["final_val_loss"], found["final_val_bpb"], found["train_time_s"]) == (2.0, 1.2, 6.0)


def test_curves_of_projects():
    trace = parse(PROJECTS["slowrun"][0])
    assert [row["step"] for row in trace.rows] == list(range(21))
    assert [row.get("train_time_ms") for row in trace.rows][10:13] == [0.0, 1000.0, 2000.0]  # 10 are not timed
    assert trace.rows[20]["train_loss"] == 4.0 and trace.rows[20]["val_loss"] == 3.3684
    assert trace.rows[12]["tok_per_sec"] == 48042 and trace.rows[12]["eta_ms"] == 180_000
    trace = parse(PROJECTS["autoresearch"][0])
    assert len(trace.rows) == 21 and trace.rows[19]["train_time_ms"] == 9000.0
    assert parse(PROJECTS["nanochat"][0]).rows[7]["train_time_ms"] == 420_000.0  # as the log says
    rows = [row for row in parse(GOLF.format(end="")).rows if "train_loss" in row]
    golf = [(row["step"], row["train_loss"], row["train_time_ms"]) for row in rows]
    assert golf == [(1, 6.9, 76.0), (500, 3.1, 5000.0)]


def test_units():
    line = "step 00012 | loss: 1 | dt: 2.5{} | total time: 1m\n"
    assert [parse(line.format(unit)).rows[0]["dt_ms"] for unit in ("ms", "s", "m")] == [2.5, 2500.0, 150_000.0]


def test_what_closes_a_run_says_nothing_of_the_next(tmp_path):
    for log in (PROJECTS["nanochat"][0], PROJECTS["autoresearch"][0], GOLF.format(end=PEAK)):
        next_run = "Step 00000 | Val BPB: 3.5 | Val Loss: 10.8\n" + SLOW
        found = describe(write(tmp_path / "a.log", log + next_run))
        assert [trial["status"] for trial in found["trial_runs"]][1] == found["status"] == "died"


def test_the_machine_of_nanochat(tmp_path):
    lines = "x = 1\n" * 9000 + "GPU: NVIDIA H100 80GB HBM3 | Peak FLOPS (BF16): 9.89e+14\n"
    lines += "2026-01-02 03:04:05,678 - nanochat.common - \x1b[32mINFO\x1b[0m - Distributed world size: 8\n"
    found = describe(write(tmp_path / "a.log", lines + PROJECTS["nanochat"][0]))
    assert (found["gpus"], found["world_size"]) == ("8x NVIDIA H100 80GB HBM3", 8)


def test_a_closing_block_alone(tmp_path):
    found = describe(write(tmp_path / "a.log", "---\nval_bpb:  1.5\nnum_steps:  30\n"))
    assert (found["era"], found["status"]) == ("autoresearch", "complete")
    assert (found["steps"], found["final_val_bpb"]) == (30, 1.5)
    assert describe(write(tmp_path / "a.log", "---\nval_bpb:  1.5\n"))["status"] == "not a log"


def test_a_last_validation_ends_a_run_that_counts_bits(tmp_path):
    log = PROJECTS["nanochat"][0].partition("Peak")[0]
    assert parse(log).end["status"] == "done"
    found = describe(write(tmp_path / "a.log", log + log))
    assert [trial["status"] for trial in found["trial_runs"]] == ["complete", "complete"]


def test_records_of_the_loss_key_are_kept(tmp_path):
    lines = "".join(f"step:{i}/9 val_x:{i} train_time:{i}ms step_avg:1ms\n" for i in range(10))
    path = write(tmp_path / "a.txt", lines)
    assert [len(loading.load_one(path, False, loss_key=key).trace.rows) for key in (None, "val_x")] == [1, 10]


def test_a_missing_step_leaves_the_time_unknown():
    lines = SLOW.splitlines(keepends=True)
    rows = parse("".join(lines[:12] + lines[14:])).rows
    assert rows[11]["train_time_ms"] == 2000.0 and all("train_time_ms" not in row for row in rows[12:])


@pytest.mark.parametrize("project", PROJECTS)
def test_a_project_that_is_cut_has_not_ended(tmp_path, project):
    text = PROJECTS[project][0].replace("\r", "\n")
    lines = text.splitlines(keepends=True)
    half = "".join(lines[: next(i for i, line in enumerate(lines) if re.search("0015|iter 10|step:500", line)) + 1])
    assert describe(write(tmp_path / "a.log", half))["status"] == "died"


def test_nanogpt_without_its_last_iteration_has_no_known_end(tmp_path):
    text = PROJECTS["nanoGPT"][0].partition("\n")[2]
    found = describe(write(tmp_path / "a.log", text))
    assert found["status"] == "died" and "no max_iters" in found["warnings"][0]
    fork = "".join(f"[step {i}] val loss: {5 - i / 1000:.4f}\n" for i in (200, 400))
    found = describe(write(tmp_path / "a.log", fork))
    assert (found["era"], found["steps"], found["final_val_loss"]) == ("nanoGPT", 400, 4.6)


def test_runs_of_several_formats_in_one_file_are_trials_in_order(tmp_path):
    chat, slow = PROJECTS["nanochat"][0], PROJECTS["slowrun"][0]
    found = describe(write(tmp_path / "a.log", slow + chat))
    assert (found["trials"], found["final_val_bpb"], found["status"]) == (2, 0.9, "complete")
    assert [trial["final_val_loss"] for trial in found["trial_runs"]] == [3.3684, None]
    assert found["era"] == "nanochat + slowrun"
    found = describe(write(tmp_path / "a.log", steps_ms(100) + "iter 101: loss 3.2\n"))
    assert found["era"] == "step lines only"


def test_steps_in_the_source_of_a_project_do_not_count():
    source = 'print0(f"step {step:05d} | loss: {x}")\nprint(f"iter {i}: loss {l:.4f}")\n"""\nMin val Loss: {x}\n"""\n'
    assert parse(source + PROJECTS["slowrun"][0]).rows == parse(PROJECTS["slowrun"][0]).rows


# -- what stands before a line

PREFIXES = ["[rank0]: ", "[rank0]:", "0: ", "[0] ", "[0]: ", "[default0]:", " 0: ", "2026-01-02 03:04:05 ",
            "2026-01-02T03:04:05.123456Z ", "[2026-01-02 03:04:05,678] ", "[03:04:05] ", "03:04:05 | ",
            "1776142360.712 ", "2026-01-02 03:04:05,678 - nanochat.common - INFO - ", "INFO:root:", "[INFO] ",
            "[rank0]: 2026-01-02 03:04:05 ",
            "2026-01-02T03:04:05+01:00 [rank0]: ", "Jan  2 03:04:05 ", "\x1b[32m[03:04:05]\x1b[0m "]


@pytest.mark.parametrize("before", PREFIXES)
@pytest.mark.parametrize("project", [*PROJECTS, "public"])
def test_prefixes(before, project):
    text = steps_ms() + PEAK if project == "public" else PROJECTS[project][0].replace("\r", "\n")
    text = re.sub("\n---\n.*", "\n", text, flags=re.S)  # the block of autoresearch is no line of a rank
    found = parse("".join(before + line + "\n" for line in text.split("\n")))
    assert found.rows == parse(text).rows and found.rows[-1]["step"] >= 8 and found.end == parse(text).end


def test_other_words_before_a_line_are_no_prefix():
    for before in ("x ", "loss: ", "a step ", "# ", "[abc]: ", "1.5: ", "(0) ", "rank "):
        assert parse("".join(f"{before}{line}\n" for line in steps_ms().split("\n"))).rows == []


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("shift", [0, 3])
def test_several_ranks_count_once(order, shift):
    """Ranks print the same, a little later or in another order, with clocks of their own."""
    lines = steps_ms(count=12).splitlines(keepends=True)
    text = ""
    for i in range(len(lines) + 3 * shift):
        for place, rank in enumerate(order):
            j = i - shift * place
            if 0 <= j < len(lines):
                text += f"[rank{rank}]: " + re.sub(r"(train_time:\d+)", rf"\g<1>{rank}", lines[j])
    expected = parse("".join(re.sub(r"(train_time:\d+)", r"\g<1>0", line) for line in lines))
    found = parse(text)
    assert found.rows == expected.rows and len(found.rows) == 16 and found.notes == [] and found.trials == [found.rows]


def test_ranks_without_a_prefix_count_once():
    text = "".join(line * 8 for line in steps_ms().splitlines(keepends=True))
    assert parse(text).rows == parse(steps_ms()).rows


# -- gzip


@pytest.mark.parametrize("name", ["a.txt.gz", "a.log.gz", "A.LOG.GZ"])
def test_gzip(tmp_path, name, capsys):
    write(tmp_path / name, gzip.compress(NEWEST.encode()))
    found = json.loads(run(capsys, "show", "--json", tmp_path)[1])["runs"]
    assert [(one["status"], one["final_val_loss"]) for one in found] == [("complete", 3.4012)]
    assert found[0]["parts"] == ["train_gpt.py", *NAMES]


def test_gzip_of_utf_16(tmp_path):
    packed = gzip.compress(NEWEST.encode("utf-16"))
    assert describe(write(tmp_path / "a.txt.gz", packed))["final_val_loss"] == 3.4012


def test_gzip_of_several_members(tmp_path):
    head, tail = steps_ms()[:200], steps_ms()[200:]
    packed = gzip.compress(head.encode()) + gzip.compress(tail.encode())
    assert describe(write(tmp_path / "a.txt.gz", packed))["final_val_loss"] == 3.25


def test_gzip_that_is_cut_or_damaged_says_so(tmp_path):
    packed = gzip.compress(steps_ms(count=20_000, every=1000).encode())
    for data in (packed[: len(packed) // 2], packed[:-4], packed[:5000] + b"x" * 100 + packed[5100:]):
        found = describe(write(tmp_path / "a.txt.gz", data))
        assert found["steps"] > 100 and any("gzip data is damaged" in note for note in found["warnings"])
    for data in (packed[:15], b"\x1f\x8b", b"\x1f\x8b" + b"x" * 100):
        found = describe(write(tmp_path / "a.txt.gz", data))
        assert (found["status"], found["steps"]) == ("not a log", None)


def test_a_gzip_bomb_is_read_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(parsing, "MAX_UNPACKED", 3 << 20)
    bomb = gzip.compress(steps_ms().encode() + b"words\n" * 9_000_000)
    sizes = []
    monkeypatch.setattr(parsing.LogParser, "feed", lambda self, block, feed=parsing.LogParser.feed: (
        sizes.append(len(block)), feed(self, block)))
    found = describe(write(tmp_path / "a.txt.gz", bomb))
    assert sum(sizes) <= (3 << 20) + 1 and max(sizes) <= 2 * parsing.BLOCK
    assert found["final_val_loss"] == 3.25 and "more than 3 MiB of gzip data" in found["warnings"][0]


# -- what is no log

TRIALS = ("commit\tval_bpb\tmemory_gb\tstatus\tdescription\nb\t0.9\t2\tkeep\tx\nc\t0.8\t2\tdiscard\ty\n"
          "d\t0.85\t2\tkeep\tz\n")
REASONS = {
    "": "it is empty", " \n\n": "it is blank", '{"a": [1, 2]}\n': "a JSON file", "[1, 2]": "a JSON file",
    "{not json}\n": "it holds no step line", "some words\n": "it holds no step line",
    "\x89PNG\r\n": "a picture", "PK\x03\x04abc": "a zip archive", "a\0\0\0\0b": "binary data",
    "# A title\n\nWords.\n\n## More\n\n- one\n": "a README or other Markdown text",
    "<!doctype html><html>": "a web page", "import os\n\nprint(1)\n": "source without a step line",
    "W0506 torch/distributed/run.py:852] ****\n": "console output without a step line",
    "x\nTraceback (most recent call last):\n  File\n": "console output with an error, without a step line",
    "GPU 0: NVIDIA H200 (UUID: GPU-1)\n": "a text about the machine, without a step line",
    "a\tb\n1\t2\n": "a table, no log", "run_id=3\nseed=4\n": "settings or facts of a run, without a step line",
    "---\nspeed:      88.0\nval_f1:   0.9\n":
        "a closing block of another task, without val_bpb or val_loss: speed, val_f1",
    TRIALS: "a list of trials of autoresearch: 3, 2 kept, the lowest val_bpb 0.85 (d)",
    "version https://git-lfs.github.com/spec/v1\n": "a Git LFS pointer: the file itself was not fetched",
}


@pytest.mark.parametrize("text", REASONS)
def test_what_is_no_log_says_why(tmp_path, capsys, text):
    path = write(tmp_path / "a.txt", text.encode("latin-1"))
    found = describe(path)
    assert (found["status"], found["reason"]) == ("not a log", REASONS[text])
    code, out, _ = run(capsys, "show", path)
    assert code == 1 and out == f"not a log: {path} ({REASONS[text]})\n"


def test_a_log_has_no_reason(tmp_path):
    assert all(describe(write(tmp_path / "a.txt", log[0]))["reason"] is None for log in PROJECTS.values())
    assert describe(write(tmp_path / "README.txt", "words\n"))["reason"] == "a README"


def test_many_that_are_no_logs_are_counted(tmp_path, capsys):
    for i in range(25):
        write(tmp_path / f"{i}.txt", "words\n")
    lines = run(capsys, "show", tmp_path)[1].splitlines()
    assert len(lines) == 22 and lines[-1] == "and 5 more that are no logs"


# -- damage

LOGS = {**{name: log[0] for name, log in PROJECTS.items()}, "newest": NEWEST, "late golf": LATE_GOLF}


def numbers_in(text):
    return {float(digits.replace(",", "")) for digits in re.findall(r"\d[\d,]*\.?\d*", text)}


@QUICK
@given(st.sampled_from(sorted(LOGS)), st.floats(0, 1), st.booleans(), st.sampled_from(["", "[rank0]: ", "12:00:01 "]))
def test_a_log_that_is_cut_anywhere_gives_no_loss_that_is_not_in_it(tmp_path_factory, name, share, keep, before):
    text = LOGS[name].replace("\r", "\n")
    text = "".join(before + line for line in text.splitlines(keepends=True))
    found = describe(write(tmp_path_factory.mktemp("cut") / "a.log", text[: int(share * len(text))]), keep_rows=keep)
    known = numbers_in(text)
    for key in ("final_val_loss", "best_val_loss", "final_val_bpb", "steps", "peak_allocated_mib"):
        assert found[key] is None or found[key] in known, key
    json.loads(output.strict_json(found), parse_constant=pytest.fail)


LINES = sorted({line + "\n" for log in LOGS.values() for line in log.split("\n")})
PIECES = st.sampled_from(LINES) | st.sampled_from([
    BAR, "---\n", "\r", "[rank1]: ", "0: ", "12:00:01 ", "step ", "iter 5: loss ", "nan", "| Val Loss: ",
    "step:5 x:1\n", "step:5/5 val_loss:1 val_loss_raw:2\n", "val_bpb: 1\n", "Total training time: 9",
    "stopping_early: step:1/1 ", "\x1b[1m", "999999999999999/9 val_loss: 1e999\n",
    "step 00001 | loss: 1e-200 | time: nanm\n",
    "num_steps: nan\n", "\n"])


@QUICK
@given(st.lists(PIECES, max_size=30), st.booleans(), st.sampled_from([None, "val_bpb"]))
@example(["---\n", "val_bpb:  1\n", "num_steps:  nan\n"], True, None)
@example(["step:5/5 val_loss:1 train_time:1ms\n", "step:5 val_bpb:2\n"], True, "val_bpb")
def test_any_mixture_of_lines_is_read(tmp_path_factory, pieces, keep, loss_key):
    path = write(tmp_path_factory.mktemp("mix") / "a.log", "".join(pieces))
    one = loading.load_one(path, keep, loss_key=loss_key)
    found = loading.describe(one, target=3.0)
    assert all(len({key for key in row}) <= parsing.MAX_KEYS + 20 for rows in one.trace.trials for row in rows)
    text = reporting.plain([reporting.screen(found), reporting.run_table([found])])
    assert "\x1b" not in text
    json.loads(output.strict_json(found), parse_constant=pytest.fail)
    samples, dropped = arms.trials_of(one)
    assert len(samples) + len(dropped) >= len(one.trace.trials)


HOSTILE = {
    "one long line": "step 00001 " + "| a " * 200_000, "digits": "1" * 800_000, "bars": "| loss: " * 100_000,
    "prefixes": "12:00:01 [0]: " * 60_000, "pairs": ("step:1/9 " + "a:1 " * 450 + "\n") * 300,
    "labels": ("x " * 900 + "val_bpb:1\n") * 400, "blocks": "---\n" * 60_000,
    "block lines": "---\n" + "a:  1\n" * 60_000,
    "same step": "".join(f"step:5/9 k{i}:1\n" for i in range(30_000)), "markdown": "# a\n" * 150_000,
    "back": "step:9/99 val_loss:1\nstep:3/99 val_loss:1\n" * 10_000, "settings": "a=\n" + "ab\n" * 150_000,
    "ranks": "".join(f"[rank{9999 - i % 9999}]: step:{i % 7}/9 val_loss:1\n" for i in range(20_000)),
    "open": "[" * 800_000, "tabs": "\t" * 800_000, "returns": "step 00001 | loss: 1\r" * 20_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_takes_bounded_time(tmp_path, name):
    path = write(tmp_path / "a.log", HOSTILE[name])
    start = time.process_time()
    one = loading.load_one(path)
    loading.describe(one)
    assert time.process_time() - start < 4  # it takes 0.3; what is quadratic takes minutes
    assert all(len(row) <= parsing.MAX_KEYS + 20 for row in one.trace.rows)


# -- the table


def test_the_table_reads_its_own_examples():
    for form in formats.FORMATS:
        first = next(other for other in formats.FORMATS if other.record(form.example))
        row = first.record(form.example)
        assert first.name == form.name and row["step"] > 0 and len(row) > 2
        assert parse(form.example + "\n").rows[0]["step"] == row["step"]


@pytest.mark.parametrize("size", [7, 64, 1000])
def test_blocks_of_any_size_give_the_same(monkeypatch, size):
    for text in LOGS.values():
        whole = parse(text)
        monkeypatch.setattr(parsing, "BLOCK", max(size, max(map(len, re.split("[\r\n]", text))) + 2))
        small = parsing.parse_log(io.BytesIO(text.encode()))
        monkeypatch.undo()
        assert small.rows == whole.rows and small.parts == whole.parts and small.end == whole.end
