"""Logs: the public text format, metrics.jsonl, config.json, the clock, profiles, the target."""
import json
import math
import re
import shutil
import sys
import time

import pytest
import torch
from helpers import (
    SCRIPT,
    assert_same_state,
    load_state,
    losses,
    make_data,
    records,
    run_folder,
    script,
    settings,
    steps_saved,
    tiny,
)

import train_gpt
from train_gpt import MuonAdamW

BAR = "=" * 100
STEP_LINE = re.compile(r"step:(\d+)/8 (train|val)_loss:(\d+\.\d{4}) train_time:(\d+)ms step_avg:(\d+\.\d\d)ms")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Folder of a finished run."""
    base = tmp_path_factory.mktemp("run")
    assert train_gpt.main(tiny(base)) == 0
    return run_folder(base)


# --- log.txt


def test_log_has_the_public_format(run):
    """Source, bar, environment, bar, step lines, peak memory."""
    source, environment, steps = f"\n{(run / 'log.txt').read_text()}".split(f"\n{BAR}\n")
    assert source[1:] == SCRIPT.read_text()
    assert environment.startswith(f"Running Python {sys.version}\nRunning PyTorch {torch.__version__} compiled for ")
    assert re.search(r"^Running on CPU: .+ threads, [\d.]+ GiB", environment, flags=re.MULTILINE)
    *lines, memory, end = steps.split("\n")
    assert re.fullmatch(r"peak memory allocated: \d+ MiB reserved: \d+ MiB", memory) and end == ""
    found = [(int(m[1]), m[2]) for m in map(STEP_LINE.fullmatch, lines)]
    expected = [(step, kind) for step in range(1, 9) for kind in ("train", "val") if kind == "train" or step in (4, 8)]
    assert found == expected


def test_step_lines_agree_with_the_metrics(run):
    """To the digits shown; step_avg is the time over the steps done."""
    text = (run / "log.txt").read_text()
    shown = [STEP_LINE.fullmatch(line) for line in text.split("\n") if line.startswith("step:")]
    told = [r for r in records(run) if "event" not in r]
    for match, record in zip(shown, told, strict=True):
        assert int(match[1]) == record["step"] and match[3] == f"{record[match[2] + '_loss']:.4f}"
        assert match[4] == f"{record['train_time_ms']:.0f}"
        assert match[5] == f"{record['train_time_ms'] / record['step']:.2f}"


def test_resumed_run_appends_without_a_second_header(tmp_path):
    assert train_gpt.main(tiny(tmp_path, target_loss=100)) == 0  # stops after step 4
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    text = (run_folder(tmp_path) / "log.txt").read_text()
    assert f"\n{text}".count(f"\n{BAR}\n") == 2 and text.count("\nresumed after step 4\n") == 1
    assert [int(step) for step in re.findall(r"^step:(\d+)/8 train", text, flags=re.MULTILINE)] == list(range(1, 9))


# --- metrics.jsonl and config.json

TRAIN_FIELDS = {"step", "train_loss", "lr", "seq_len", "window", "batch_tokens", "tokens", "train_time_ms", "step_ms",
                "tokens_per_s", "mfu", "fp8_clipped"}
VAL_FIELDS = {"step", "val_loss", "val_bpb", "tokens", "train_time_ms"}
END_FIELDS = {"event", "status", "step", "iterations", "val_loss", "val_bpb", "train_time_ms", "params_total",
              "params_active", "peak_memory_mib", "first_step_s", "tokens_per_s", "target_step", "target_time_ms",
              "compile_s", "mfu", "tokens"}


def test_metrics_have_their_fields(run):
    *steps, end = records(run)
    train, val = ([r for r in steps if key in r] for key in ("train_loss", "val_loss"))
    assert len(train) == 8 and len(val) == 2 and len(steps) == 10
    assert all(r.keys() == TRAIN_FIELDS for r in train) and all(r.keys() == VAL_FIELDS for r in val)
    assert end.keys() == END_FIELDS


def test_metrics_have_the_values_of_the_schedules(run):
    s, train = settings(), [r for r in records(run) if "train_loss" in r]
    stages = train_gpt.stage_table(s)
    assert [r["lr"] for r in train] == [train_gpt.lr_scale(s, stages, step) for step in range(8)]
    assert [r["window"] for r in train] == [train_gpt.window_at(s, stages, step) for step in range(8)]
    assert [r["tokens"] for r in train] == [128 * step for step in range(1, 9)]
    assert {(r["seq_len"], r["batch_tokens"], r["mfu"]) for r in train} == {(32, 128, None)}
    times = [0, *(r["train_time_ms"] for r in train)]
    assert times == sorted(times)
    assert [r["step_ms"] for r in train] == pytest.approx([b - a for a, b in zip(times, times[1:], strict=False)])
    assert [r["tokens_per_s"] for r in train] == pytest.approx([128000 / r["step_ms"] for r in train])


def test_end_of_the_metrics(run):
    *_, val, end = records(run)
    assert (end["event"], end["status"], end["step"], end["iterations"]) == ("end", "done", 8, 8)
    assert (end["val_loss"], end["val_bpb"]) == (val["val_loss"], val["val_bpb"])
    assert val["val_bpb"] == pytest.approx(val["val_loss"] / math.log(2) / 2)  # the data of helpers: 2 bytes a token
    assert end["params_total"] == end["params_active"] == 36985
    assert end["peak_memory_mib"] > 50 and end["first_step_s"] > 0
    assert (end["target_step"], end["target_time_ms"]) == (None, None)


def test_tokens_are_counted_over_stages_of_different_batches(tmp_path):
    argv = tiny(tmp_path, stage_ends=(0.5, 1.0), batch_tokens=(128, 256))
    assert train_gpt.main(argv) == 0
    tokens = [r["tokens"] for r in records(run_folder(tmp_path)) if "train_loss" in r]
    assert tokens == [128, 256, 384, 512, 768, 1024, 1280, 1536]


def test_config_holds_all_that_makes_the_run(run):
    config = json.loads((run / "config.json").read_text())
    names = {field.name for field in train_gpt.fields(train_gpt.Settings)}
    assert config["settings"].keys() == names and config["settings"]["muon_lr"] == 0.02
    assert "auto" not in config["settings"].values()
    assert config["git"].keys() == {"commit", "dirty"} and config["world_size"] == 1
    assert config["script"] == "train_gpt.py" and config["torch"] == torch.__version__
    assert config["hardware"]["device"] == "cpu" and config["hardware"]["name"]
    assert config["data"]["name"] == "data" and config["data"]["meta"]["vocab_size"] == 64
    assert re.fullmatch(r"[0-9a-f]{16}", config["data"]["fingerprint"])


def test_git_commit_and_whether_it_is_the_code_that_ran(monkeypatch, tmp_path):
    answers = {"rev-parse": "abc123", "status": " M train_gpt.py"}
    monkeypatch.setattr(train_gpt, "command_output", lambda *command: answers[command[1]])
    for status, dirty in ((" M train_gpt.py", True), ("", False), (None, None)):
        answers["status"] = status
        assert train_gpt.main(tiny(tmp_path, iterations=1, experiment_name=f"x{dirty}")) == 0
        config = json.loads((run_folder(tmp_path, f"x{dirty}") / "config.json").read_text())
        assert config["git"] == {"commit": "abc123", "dirty": dirty}


def test_a_command_that_fails_or_does_not_exist_gives_none():
    assert train_gpt.command_output("no-such-command-anywhere") is None
    assert train_gpt.command_output(sys.executable, "-c", "raise SystemExit(1)") is None
    assert train_gpt.command_output(sys.executable, "-c", "print('yes')") == "yes"


def test_fingerprint_is_that_of_the_data(tmp_path):
    """Equal data elsewhere has the same, one other token another."""
    def fingerprint(path):
        return train_gpt.open_corpus(str(path)).fingerprint()
    one, same, other = (make_data(tmp_path / place / "data") for place in "abc")
    make_data(other, val=[[1] * 500])
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_derived_numbers_are_printed(tmp_path, capsys):
    argv = tiny(tmp_path, stage_ends=(0.5, 1.0), batch_tokens=(128, 256), window=(16, 32), stage_lr=(1.0, 0.5),
                attention="LS")
    assert train_gpt.main(argv) == 0
    out = capsys.readouterr().out
    assert "parameters: 36,985 total, 36,985 active, 24,576 hidden, 8,192 embedding, 4,096 head, 121 small" in out
    layers = ["0: Layer(attention='L', value_table=0, skip_from=None)",
              "1: Layer(attention='S', value_table=0, skip_from=0)"]
    assert "\n".join(["", *layers, ""]) in out
    columns = ("start={}, end={}, window_start=16, batch_tokens={}, seq_len=32, max_doc_len=32, window={}, mtp=0, "
               "candidates=0, lr={}")
    first, second = (re.escape(columns.format(*row)) for row in ((0, 4, 128, 16, 1.0), (4, 8, 256, 32, 0.5)))
    rest = r"micro-steps of 4 rows, [\d.]+ MFLOPs/token"
    assert re.search(rf"^0: Stage\({first}\): 1 {rest}\n1: Stage\({second}\): 2 {rest}$", out, flags=re.MULTILINE)
    assert "1,536 training tokens, 300 validation tokens" in out
    assert re.search(r"step 8/8  train loss \d+\.\d{4}  [\d.]+ ms/step  [\d,]+ tokens/s  MFU n/a  ETA 00:00:00", out)
    assert re.search(r"val loss \d+\.\d{4} nats per token, \d+\.\d{4} bits per byte", out)
    assert f"run folder: {run_folder(tmp_path)}" in out


def test_a_new_epoch_is_told_once(tmp_path, capsys):
    make_data(tmp_path / "data", train=[list(range(63)) * 5])  # 9 rows: less than three steps of 4
    assert train_gpt.main(tiny(tmp_path)) == 0
    told = re.findall(r"all training data used, epoch (\d+) begins", capsys.readouterr().out)
    assert told == [str(n) for n in range(2, 2 + len(told))] and len(told) >= 2


def test_losses_between_console_lines_are_not_mixed_up(tmp_path, run):
    """With log_every 3 the lines hold the losses of exactly these steps."""
    assert train_gpt.main(tiny(tmp_path, log_every=3)) == 0
    every = losses(run)["train_loss"]
    assert losses(run_folder(tmp_path))["train_loss"] == {step: every[step] for step in (3, 6, 8)}


def test_loss_falls_on_data_that_can_be_learned(tmp_path):
    assert train_gpt.main(tiny(tmp_path, iterations=60, eval_every=30, momentum_warmup=20)) == 0
    val = losses(run_folder(tmp_path))["val_loss"]
    assert val[60] < val[30] < 4.16 and val[60] < 3  # 4.16 = log(64): knowing nothing


# --- the clock


class FakeTime:
    """The module `time` with a clock that only moves when told."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def __getattr__(self, name):
        return getattr(time, name)


@pytest.mark.parametrize("profiled", [False, True])
def test_clock_counts_training_only(profiled, tmp_path, monkeypatch):
    """A step takes 1 s, validation 1000 s, a checkpoint 5000 s, writing a trace 300 s."""
    clock = FakeTime()
    monkeypatch.setattr(train_gpt, "time", clock)

    def takes(seconds, function):
        def slow(*args, **kwargs):
            clock.now += seconds
            return function(*args, **kwargs)
        return slow
    monkeypatch.setattr(MuonAdamW, "step", takes(1, MuonAdamW.step))
    monkeypatch.setattr(train_gpt, "evaluate", takes(1000, train_gpt.evaluate))
    monkeypatch.setattr(train_gpt, "write_checkpoint", takes(5000, train_gpt.write_checkpoint))
    profile = torch.profiler.profile
    monkeypatch.setattr(profile, "export_chrome_trace", takes(300, profile.export_chrome_trace))
    profile = dict(enable_profiling=True, profile_start=2, profile_steps=1) if profiled else {}
    argv = tiny(tmp_path, log_every=3, eval_every=2, save_every=3, **profile)
    assert train_gpt.main(argv) == 0
    assert clock.now == 8 + 4 * 1000 + 3 * 5000 + 300 * profiled
    steps = [r for r in records(run_folder(tmp_path)) if "event" not in r]
    assert [r["train_time_ms"] for r in steps] == [1000 * r["step"] for r in steps]
    assert {r["step_ms"] for r in steps if "step_ms" in r} == {1000.0}
    assert records(run_folder(tmp_path))[-1]["train_time_ms"] == 8000


# --- the target


def test_target_stops_at_the_first_validation_at_or_below(tmp_path, monkeypatch, capsys):
    answers = iter([5.0, 3.3, 3.28, 1.0])
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: next(answers))
    assert train_gpt.main(tiny(tmp_path, eval_every=2, target_loss=3.28)) == 0
    folder = run_folder(tmp_path)
    assert losses(folder)["val_loss"] == {2: 5.0, 4: 3.3, 6: 3.28} and steps_saved(folder) == [6]
    end = records(folder)[-1]
    assert (end["status"], end["step"], end["target_step"]) == ("target", 6, 6)
    assert end["target_time_ms"] == end["train_time_ms"] > 0
    assert re.search(r"^target loss 3.28:? reached.* step 6\b", capsys.readouterr().out, flags=re.MULTILINE)


def test_target_that_is_not_reached_is_told(tmp_path, capsys):
    assert train_gpt.main(tiny(tmp_path, target_loss=0.001)) == 0
    end = records(run_folder(tmp_path))[-1]
    assert (end["status"], end["target_step"], end["target_time_ms"]) == ("done", None, None)
    assert re.search(r"^target loss 0.001:? not reached", capsys.readouterr().out, flags=re.MULTILINE)


def test_target_reached_by_the_last_step(tmp_path, monkeypatch):
    monkeypatch.setattr(train_gpt, "evaluate", lambda *args: 2.0)
    assert train_gpt.main(tiny(tmp_path, eval_every=0, target_loss=2.5)) == 0
    end = records(run_folder(tmp_path))[-1]
    assert (end["status"], end["target_step"]) == ("target", 8)


def test_no_last_checkpoint_if_not_wanted(tmp_path):
    assert train_gpt.main(tiny(tmp_path, save_last=False)) == 0
    assert not (run_folder(tmp_path) / "checkpoints").exists()


def test_evaluation_only_after_the_last_step(tmp_path):
    assert train_gpt.main(tiny(tmp_path, eval_every=0)) == 0
    assert list(losses(run_folder(tmp_path))["val_loss"]) == [8]


# --- profiles


def test_profile_is_written_and_changes_nothing(tmp_path, capfd, run):
    """`logger.py profile`, a process of its own, sums it up at the end."""
    argv = tiny(tmp_path, enable_profiling=True, profile_start=3, profile_steps=2)
    assert train_gpt.main(argv) == 0
    folder, out = run_folder(tmp_path), capfd.readouterr().out
    trace = json.loads((folder / "profile" / "trace_rank0.json").read_text())
    names = {event.get("name") for event in trace["traceEvents"]}
    assert "aten::rms_norm" in names or "aten::mm" in names
    _, summary = out.split(f"log, metrics and checkpoints: {folder}\n")
    assert re.search(r"^aten::\S+ .* [\d.]+ %", summary, flags=re.MULTILINE)
    assert "2 steps: communication 0.0 ms" in summary and "trace_rank0.json" in summary
    assert losses(folder) == losses(run)
    assert_same_state(load_state(folder, 8), load_state(run, 8))


@pytest.mark.parametrize("start, steps", [(0, 1), (1, 2), (3, 2)])
def test_exactly_the_steps_asked_for_are_profiled(start, steps, tmp_path, monkeypatch):
    """The optimizer marks each training step in the trace."""
    def marked_step(self, *args, step=MuonAdamW.step, **kwargs):
        with torch.profiler.record_function(f"training step {self.steps}"):
            step(self, *args, **kwargs)
    monkeypatch.setattr(MuonAdamW, "step", marked_step)
    argv = tiny(tmp_path, enable_profiling=True, profile_start=start, profile_steps=steps)
    assert train_gpt.main(argv) == 0
    trace = json.loads((run_folder(tmp_path) / "profile" / "trace_rank0.json").read_text())
    marked = {event["name"] for event in trace["traceEvents"] if str(event.get("name")).startswith("training step")}
    assert marked == {f"training step {step}" for step in range(start, start + steps)}


@pytest.mark.parametrize("start", [7, 100])
def test_run_that_ends_before_its_profile_says_so(start, tmp_path, capfd):
    """In the midst of it, or before its first step; what is not whole is not summed up."""
    assert train_gpt.main(tiny(tmp_path, enable_profiling=True, profile_start=start, profile_steps=2)) == 0
    out, error = capfd.readouterr()
    assert "\nprofile: incomplete, the run ended before its last step; lower --profile-start\n---\n" in out
    assert "error" not in error and "logger.py" not in error


def test_traces_are_named_where_logger_is_not_beside_the_script(tmp_path):
    shutil.copy(SCRIPT, tmp_path)
    argv = tiny(tmp_path, enable_profiling=True, profile_start=1, profile_steps=1)
    done = script(tmp_path / SCRIPT.name, *argv)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path) / "profile"
    assert f"\ntraces, for ui.perfetto.dev: {folder}\n---\n" in done.stdout and list(folder.iterdir())
