"""logger.py profile on traces made here, of known times, and on one of torch.profiler."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import logger
from runlogs import profiling

QUICK = settings(deadline=None, database=None, max_examples=80)
SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)))


def event(name, ts, dur, cat="cpu_op", tid=1):
    return {"ph": "X", "name": name, "ts": ts, "dur": dur, "cat": cat, "pid": 1, "tid": tid}


def write_trace(folder, events, rank=0):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"trace_rank{rank}.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def profile(capsys, *argv):
    code = logger.main(["profile", *map(str, argv)])
    return code, *capsys.readouterr()


def numbers(capsys, folder):
    code, out, err = profile(capsys, folder, "--json")
    assert (code, err) == (0, "")
    return json.loads(out, parse_constant=pytest.fail)["ranks"]


def events_of(spans):
    return [profiling.Event("x", "cpu_op", start, start + length, "1") for start, length in spans]


@QUICK
@given(SPANS)
def test_covered_counts_each_point_once(spans):
    points = {t for start, length in spans for t in range(start, start + length)}
    assert profiling.covered(events_of(spans)) == len(points)


# --- communication and computation

TIMES = [  # in us: events, communication and what of it is beside computation in ms
    # computation 0-4000 and 6000-9000, collectives 3000-7000 and 8000-8500: 1000 + 1000 + 500 beside
    ([event("aten::mm", 0, 4000), event("aten::mm", 6000, 3000), event("gloo:all_reduce", 3000, 4000, tid=2),
      event("gloo:all_gather", 8000, 500, tid=2)], 4.5, 2.5),
    ([event("aten::mm", 0, 4000), event("aten::add", 1000, 1000), event("gloo:all_reduce", 5000, 2000, tid=2)],
     2.0, 0.0),
    # waiting for a collective is no computation
    ([event("c10d::allreduce_", 0, 4000), event("gloo:all_reduce", 0, 4000, "user_annotation", 2)], 4.0, 0.0),
    # on a GPU only kernels count, not the CPU operators that start them
    ([event("gemm", 0, 5000, "kernel"), event("ncclDevKernel_ReduceScatter", 3000, 5000, "kernel", 2),
      event("aten::mm", 0, 9000)], 5.0, 2.0),
    ([event("aten::mm", 0, 4000), {"ph": "M", "name": "process_name"}, {"ph": "X", "name": "gloo:x", "ts": 1}], 0, 0),
]


@pytest.mark.parametrize("events, busy, beside", TIMES)
def test_communication_beside_computation(tmp_path, capsys, events, busy, beside):
    write_trace(tmp_path, events)
    (found,) = numbers(capsys, tmp_path)
    assert (found["communication_us"], found["beside_us"]) == (1000 * busy, 1000 * beside)
    said = f"communication {busy:.1f} ms, {beside:.1f} ms of it beside computation"
    assert said in profile(capsys, tmp_path)[1]


# --- operations


def test_self_times_of_nested_operations(tmp_path, capsys):
    """A child takes its time from its parent, on the same thread only, and its own child from it."""
    write_trace(tmp_path, [
        event("aten::linear", 0, 100), event("aten::mm", 10, 60), event("aten::empty", 20, 5),
        event("aten::mm", 80, 20), event("aten::mm", 0, 100, tid=2), event("aten::linear", 100, 50),
        event("python", 0, 500, "python_function"),
        event("ProfilerStep#3", 0, 200, "user_annotation"), event("ProfilerStep#4", 210, 190, "user_annotation"),
    ])
    (found,) = numbers(capsys, tmp_path)
    assert found["operations"] == [["aten::mm", 175, 3], ["aten::linear", 70, 2], ["aten::empty", 5, 1]]
    assert (found["steps"], found["step_us"], found["idle"], found["kind"]) == (2, 200, None, "CPU operations")
    code, out, _ = profile(capsys, tmp_path)
    title, headings, first, *_ = out.splitlines()
    assert code == 0 and title == "trace_rank0: the heaviest of 3 CPU operations"
    assert headings.split("  ")[0] == "name" and re.split("  +", first) == ["aten::mm", "0.175", "70.0 %", "3", "58.3"]
    assert "2 steps: communication 0.0 ms, 0.0 ms of it beside computation; 0.2 ms a step\n" in out
    assert "idle" not in out and f"trace, for ui.perfetto.dev: {tmp_path}/trace_rank0.json" in out


def test_only_the_heaviest_are_shown_and_shares_are_of_all(tmp_path, capsys):
    write_trace(tmp_path, [event(f"aten::op{i}", 100 * i, i) for i in range(1, 31)])
    lines = profile(capsys, tmp_path)[1].splitlines()
    assert [line.split()[0] for line in lines if line.startswith("aten")] == [f"aten::op{i}" for i in range(30, 18, -1)]
    lines = profile(capsys, tmp_path, "--top", 2)[1].splitlines()
    assert [re.split("  +", line)[2].strip() for line in lines if line.startswith("aten")] == ["6.5 %", "6.2 %"]


def test_kernels_steps_and_idle_time_of_a_gpu(tmp_path, capsys):
    """The GPU is busy 0-300 (two streams and a copy), idle to 600, busy to 1000; its own steps count."""
    write_trace(tmp_path, [
        event("gemm", 0, 200, "kernel", 7), event("gemm", 100, 150, "kernel", 8), event("aten::mm", 0, 5000),
        event("ncclDevKernel_AllGather", 600, 400, "kernel", 9), event("fill", 250, 50, "gpu_memset", 7),
        event("ProfilerStep#1", 0, 10, "user_annotation"), event("ProfilerStep#1", 0, 1000, "gpu_user_annotation", 7),
        event("Memcpy DtoH", 280, 20, "gpu_memcpy", 8),
    ])
    (found,) = numbers(capsys, tmp_path)
    assert found["operations"] == [["ncclDevKernel_AllGather", 400, 1], ["gemm", 350, 2]]
    assert (found["kind"], found["steps"], found["step_us"]) == ("kernels", 1, 1000)
    assert found["idle"] == pytest.approx(0.3) and found["communication_us"] == 400 and found["beside_us"] == 0
    assert "; 1.0 ms a step, device idle 30.0 %\n" in profile(capsys, tmp_path)[1]


def test_every_rank_and_memory_snapshot_is_named_in_order(tmp_path, capsys):
    for rank in (10, 2, 0):
        events = [event("aten::mm", 0, 1000), event("gloo:x", 0, 100 * rank + 100, tid=2)]
        write_trace(tmp_path / "profile", events, rank)
    (tmp_path / "profile" / "memory_rank0.pickle").touch()
    out = profile(capsys, tmp_path)[1]
    assert re.findall(r"communication ([\d.]+) ms", out) == ["0.1", "0.3", "1.1"]
    assert re.findall(r"trace_rank(\d+)\.json", out) == ["0", "2", "10"]
    assert f"memory snapshot, for pytorch.org/memory_viz: {tmp_path}/profile/memory_rank0.pickle" in out
    assert numbers(capsys, tmp_path / "profile") == numbers(capsys, tmp_path)


# --- a real trace


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """Three profiled steps of a small model, as the training scripts profile them, and torch's own table."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "profile").mkdir()
    nn = torch.nn
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 9))
    optimizer, tables = torch.optim.AdamW(model.parameters()), []

    def report(profiler):
        profiler.export_chrome_trace(str(folder / "profile" / "trace_rank0.json"))
        tables.append(profiler.key_averages())

    plan = torch.profiler.schedule(wait=1, warmup=1, active=3, repeat=1)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds, schedule=plan, on_trace_ready=report) as profiler:
        for _ in range(6):
            model(torch.randn(32, 64)).logsumexp(1).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            profiler.step()
    return folder, tables[0]


def test_a_trace_of_torch_profiler(real, capsys):
    """Each operation has the time of torch's own table, but for rounding in the trace."""
    folder, table = real
    (found,) = numbers(capsys, folder)
    assert found["steps"] == 3 and found["step_us"] > 0 and found["idle"] is None
    expected = {row.key: row for row in table}
    calls = {name: calls for name, _, calls in found["operations"]}
    assert len(calls) > 15 and (calls["aten::addmm"], calls["aten::gelu"]) == (6, 3)
    for name, us, calls in found["operations"]:
        assert calls >= expected[name].count, name  # torch counts aten::sum inside aten::sum once
        assert us == pytest.approx(expected[name].self_cpu_time_total, rel=0.02, abs=0.1 * calls), name


def test_on_a_pipe_it_is_plain_text_and_exits_with_0(real):
    command = [sys.executable, str(Path(logger.__file__)), "profile", str(real[0])]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "FORCE_COLOR": "1"})
    assert (done.returncode, done.stderr) == (0, "") and "\x1b" not in done.stdout
    assert "aten::addmm" in done.stdout and "3 steps: communication 0.0 ms" in done.stdout


# --- damage


def error(capsys, *argv):
    code, out, err = profile(capsys, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")
    return err


def test_without_a_trace(tmp_path, capsys):
    said = "'{}' holds no trace_rank*.json, as of --enable_profiling"
    assert said.format(tmp_path / "none") in error(capsys, tmp_path / "none")
    (tmp_path / "profile").mkdir()
    assert said.format(tmp_path / "profile") in error(capsys, tmp_path)


@pytest.mark.parametrize("text, what", [
    (b"", "damaged, or cut off"), (b'{"traceEvents": [{"ph": "X", "na', "damaged, or cut off"), (b"\xff", "damaged"),
    (b"[]", "no trace of torch.profiler"), (b"{}", "no trace of"), (b'{"traceEvents": 3}', "no trace of"),
    (b'{"traceEvents": [1]}', "no trace of"), (b'{"traceEvents": [{"ph": "X", "dur": "x"}]}', "no trace of"),
    (b'{"traceEvents": [{"ph": "X", "dur": 1, "name": "a"}]}', "no trace of"), (b"[" * 100_000, "no trace of"),
])
def test_a_damaged_trace_is_one_sentence(tmp_path, capsys, text, what):
    path = write_trace(tmp_path, [], rank=1)
    path.write_bytes(text)
    write_trace(tmp_path, [event("aten::mm", 0, 10)])
    said = error(capsys, tmp_path)
    assert str(path) in said and what in said and "--enable_profiling" in said


def test_an_empty_trace_and_hostile_names(tmp_path, capsys):
    write_trace(tmp_path, [])
    code, out, err = profile(capsys, tmp_path)
    assert (code, err) == (0, "") and "0 steps: communication 0.0 ms" in out and "- ms a step" in out
    write_trace(tmp_path, [event("aten::\x1b[2J", 0, 10), event("aten::" + "x" * 500, 10, 5)])
    out = profile(capsys, tmp_path)[1]
    assert "\x1b" not in out and max(map(len, out.splitlines())) < 140
