"""bench/gpu.py end to end in small on a CPU, its isolation, resume and report; bench/projection.py by hand."""
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import H100, ROOT, documents, environment, make_data, settings

import train_gpt
import train_moe


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gpu, projection = load("gpu"), load("projection")
RUN = [part for part in gpu.PARTS if not part.startswith("compile_") or part == "compile_gpu_1"]  # of the tiny run


def command(*flags):
    return subprocess.run([sys.executable, str(ROOT / "bench/gpu.py"), *map(str, flags)], env=environment(),
                          capture_output=True, text=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder, flags and result of a complete tiny run."""
    folder = tmp_path_factory.mktemp("gpu")
    make_data(folder / "words", [documents(6000, 1)], [documents(2000, 9)])
    flags = ("--out", folder / "out", "--device", "cpu", "--tiny", "--data", folder / "words", "--cache",
             folder / "cache", "--parts", ",".join(RUN))
    return folder / "out", flags, command(*flags)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A bench on the CPU whose workers run in this process."""
    monkeypatch.setattr(torch, "compile", torch.compile)  # work() replaces it
    monkeypatch.setattr(gpu, "call_worker", lambda b, part, seconds: gpu.work(b, part))
    (tmp_path / "out/logs").mkdir(parents=True)
    return gpu.Bench(tmp_path / "out", "", "cpu", True, tmp_path / "cache")


def rows_of(monkeypatch, part="equality", **rows):
    monkeypatch.setitem(gpu.PARTS, part, lambda b: rows)


def failing():
    raise RuntimeError("no such kernel\nand a second line")


# --- the whole, in small


def test_every_part_runs_on_a_cpu(finished):
    out, _, result = finished
    assert result.returncode == 0, result.stdout + result.stderr
    found = json.loads((out / "gpu.json").read_text())
    assert found["about"]["torch"] == torch.__version__ and found["about"]["tiny"] is True
    for part in RUN:
        assert found["parts"][part]["status"] == "done" == json.loads((out / f"{part}.json").read_text())["status"]
        assert re.search(rf"^{part}: done, ", result.stdout, re.MULTILINE)
        assert found["parts"][part]["rows"].keys() == gpu.PARTS[part](bench_of(out, finished)).keys()
    compared = gpu.results(found["parts"]["equality"])
    assert {"head fp8, 3 losses", "mlp fp8", "optimizer, compiled", "model, compiled"} <= compared.keys()
    assert all(row["ok"] for row in compared.values()) and 0 < compared["mlp fp8"]["rel"] < 0.15
    assert "CUDA" in found["parts"]["equality"]["rows"]["gram kernel, fp32"]["skipped"]


def bench_of(out, finished):
    return gpu.Bench(out, str(out.parent / "words"), "cpu", True, out.parent / "cache")


def test_steps_are_measured_stage_by_stage(finished):
    rows = json.loads((finished[0] / "steps.json").read_text())["rows"]
    assert list(rows) == [name for name, (script, _) in gpu.programs().items() if script.__name__ == "train_gpt"]
    stages = [row for name, row in rows.items() if name.startswith("speedrun")]
    assert sum(s["end_step"] for s in stages) == 60 and {s["start_step"] for s in stages} == {0}
    for stage in stages:
        assert stage["batch_tokens"] == 1024 // 8  # one GPU's share
        assert stage["middle"]["ms"] >= stage["middle"]["ms_min"] > 0
        assert stage["tokens_per_s"] == pytest.approx(1000 * 128 / stage["end"]["ms"])
        assert stage["mfu"] is None  # of a CPU the peak is not known


def test_what_is_timed_is_compiled_before(finished):
    assert {f"compile_{name}" for name in gpu.programs()} <= gpu.PARTS.keys()
    row = json.loads((finished[0] / "compile_gpu_1.json").read_text())["rows"]["gpu_1"]
    assert row["first_step_s"] > 0 and row["graphs"] >= 0


def test_experts_are_checked(finished):
    checks = json.loads((finished[0] / "moe_equality.json").read_text())["rows"]
    assert len(checks) == 6
    for kind in train_moe.MIXTURES:
        for impl in ("grouped", "bmm"):
            row = checks[f"{kind}, {impl}"]  # 3 routings, the output and 4 gradients
            assert row["ok"] is row["same_twice"] is True and row["compared"] == 15 and 0 < row["rel"] < 0.01


def test_mixtures_are_timed_beside_the_dense_control(finished):
    rows = json.loads((finished[0] / "moe_steps.json").read_text())["rows"]
    assert not any("skipped" in row for row in rows.values())
    for kind in gpu.KINDS:
        mixture, dense = rows[kind]["lines"].values()
        assert mixture["ratio"] > 0 and "ratio" not in dense and mixture["memory_mib"] >= dense["memory_mib"] > 0
        for line in (mixture, dense):
            assert line["ms"] > 0 and line["tokens_per_s"] == pytest.approx(1000 * 128 / line["ms"])
        router = 32 * {"speed": 8, "mixtral": 2 * 8, "deepseek": 64}[kind]  # weights in each of two layers
        assert mixture["flops_per_token"] == dense["flops_per_token"] + 6 * 2 * router
    assert len({row["lines"]["dense beside it"]["memory_mib"] for row in rows.values() if "lines" in row}) == 1


def test_resume_is_exact(finished):
    out, _, _ = finished
    resumed = json.loads((out / "resume.json").read_text())["rows"]["from a checkpoint"]
    assert resumed["ok"] is True and resumed["max_difference"] == 0 and resumed["resumed_after"] == 4
    straight, gone_on = ((out / f"logs/{name}_metrics.jsonl").read_text() for name in ("straight", "resumed"))
    assert straight.count('"event": "end"') == 1 and gone_on.count('"step": 8, "train_loss"') == 2
    assert "resumed " in (out / "logs/resumed.txt").read_text()


@pytest.mark.parametrize("script, more", [("train_gpt", []), ("train_moe", ["--preset", "mixtral-speedrun"]),
                                          ("train_moe", ["--num-experts", "0"])])
def test_what_is_timed_is_what_the_script_trains(bench, tmp_path, script, more):
    """The losses of the first steps, which the script writes itself."""
    module = {"train_gpt": train_gpt, "train_moe": train_moe}[script]
    data = make_data(tmp_path / "words", [documents(6000, 1)], [documents(2000, 9)])
    flags = [*gpu.flags_of(bench, "speedrun", str(data)), *more, "--iterations", "6", "--log-every", "1"]
    flags += ["--moe-layers", "DMM"] if "mixtral-speedrun" in more else []
    t = gpu.Timed(module, flags)
    sums = [0.0, t.loss.item()]  # after the step that compiles
    for _ in range(5):
        t.train(1)
        sums.append(t.loss.item())
    t.close()
    assert module.main(flags) == 0
    (file,) = (bench.cache / "logs").glob("*/*/metrics.jsonl")
    events = [json.loads(line) for line in file.read_text().splitlines()]
    wanted = [event["train_loss"] for event in events if "train_loss" in event]
    assert [b - a for a, b in itertools.pairwise(sums)] == pytest.approx(wanted, abs=1e-4) and len(wanted) == 6


def test_report_has_every_part_and_says_that_sizes_mean_nothing(finished):
    text = (finished[0] / "README.md").read_text()
    assert text.startswith("# bench/gpu.py: timings of this CPU, --tiny")
    assert [part for part in re.findall(r"^## (\w+): done", text, re.MULTILINE)] == RUN
    assert "| speedrun_3 | 128 |" in text
    assert "| mixtral, dense beside it |" in text
    assert "- flex, paired heads: FlexAttention has no backward pass on a CPU" in text


def test_same_command_again_skips_what_is_done(finished):
    out, flags, _ = finished
    before = {part: (out / f"{part}.json").read_bytes() for part in RUN}
    result = command(*flags)
    assert result.returncode == 0 and result.stdout.count("already done") == len(RUN)
    assert before == {part: (out / f"{part}.json").read_bytes() for part in RUN}


# --- isolation


def test_a_failed_row_leaves_the_others_and_runs_again_last(bench, monkeypatch):
    calls = []
    rows_of(monkeypatch, a=lambda: calls.append("a") or {"ok": True}, bad=failing, c=lambda: calls.append("c") or {})
    assert gpu.run_parts(bench, ["equality"], 100) == 1
    state = gpu.read_part(bench.out, "equality")
    assert state["status"] == "1 row(s) failed" and list(state["rows"]) == ["a", "bad", "c"]
    assert state["rows"]["bad"]["error"] == "RuntimeError: no such kernel" and calls == ["a", "c"]
    rows_of(monkeypatch, a=failing, bad=lambda: calls.append("bad") or {"ok": True}, c=failing,
            new=lambda: calls.append("new") or {"ok": True})
    assert gpu.run_parts(bench, ["equality"], 100) == 0  # a and c are not run again
    assert calls == ["a", "c", "new", "bad"]
    assert gpu.read_part(bench.out, "equality")["status"] == "done"


def test_a_process_for_each_row_where_memory_is_measured(bench, monkeypatch):
    calls = []
    monkeypatch.setattr(gpu, "call_worker", lambda b, part, seconds: calls.append(gpu.work(b, part)) or calls[-1])
    rows_of(monkeypatch, "steps", a=lambda: {}, b=lambda: {}, c=lambda: {})
    assert gpu.run_part(bench._replace(tiny=False), "steps", 100)["status"] == "done" and calls == [1, 1, 0]


def test_a_failed_part_leaves_the_others(bench, monkeypatch, capsys):
    rows_of(monkeypatch, "steps", x=failing)
    rows_of(monkeypatch, "ablate", **{"no kernels": lambda: {"flags": "--kernels none", "ratio": 2.0}})
    assert gpu.run_parts(bench, ["steps", "ablate"], 100) == 1
    assert "steps: 1 row(s) failed" in (printed := capsys.readouterr().out) and "ablate: done, 1 rows" in printed
    text = (bench.out / "README.md").read_text()
    assert "- x: RuntimeError: no such kernel" in text and "| no kernels | --kernels none | - | - | 2.000 | - |" in text


def test_a_wrong_fast_part_is_found(bench, monkeypatch, capsys):
    right = train_gpt.mlp_relu2
    monkeypatch.setattr(train_gpt, "mlp_relu2", lambda x, up, down, kernel, fp8:
                        right(x, up, down, False, False) * (1.2 if fp8 else 1.0))
    rows_of(monkeypatch, mlp=lambda: gpu.check_mlp(bench, 48, 32, torch.float32, False, True))
    assert gpu.run_parts(bench, ["equality"], 100) == 1
    row = gpu.read_part(bench.out, "equality")["rows"]["mlp"]
    assert row["ok"] is False and row["rel"] == pytest.approx(0.2, rel=1e-3) and row["rel_plain"] == 0
    assert "mlp: NOT EQUAL" in capsys.readouterr().out


@pytest.mark.parametrize("off, equal, same", [(lambda call: 0.02, False, True),
                                              (lambda call: 1e-6 * call, True, False)])
def test_wrong_experts_are_found(bench, monkeypatch, off, equal, same):
    """Products 2 % too large; and others that are right, but not to the bit what they were a call before."""
    right, calls = train_moe.expert_mlp, itertools.count(1)

    def wrong(x, up, down, gates, experts, impl):
        y = right(x.float(), up.float(), down.float(), gates, experts, "loop")
        return right(x, up, down, gates, experts, impl) if impl == "loop" else y * (1 + off(next(calls)))
    monkeypatch.setattr(train_moe, "expert_mlp", wrong)
    monkeypatch.setattr(train_moe, "compiled", lambda function, s: function)
    row = gpu.check_experts(bench, "mixtral", "bmm")
    assert (row["rel"] <= row["tolerance"]) is equal and row["same_twice"] is same and row["ok"] is False


def test_routings_and_sizes_of_the_kinds(bench):
    for kind, shape in (("mixtral", (8, 1536, 2)), ("deepseek", (64, 384, 6)), ("speed", (8, 1536, 1))):
        s = gpu.kind_settings(bench._replace(tiny=False), kind)
        assert (s.num_experts, s.hidden, s.top_k, s.width) == (*shape, 768)
    s, loads = gpu.kind_settings(bench, "mixtral"), {}
    for routing in gpu.ROUTINGS:
        leaves, experts = gpu.draw_experts(bench, s, 800, routing)
        assert leaves["up"].shape == leaves["down"].mT.shape == (8, 32, 64) and leaves["up"].dtype == torch.bfloat16
        assert (experts[:, 0] != experts[:, 1]).all()
        loads[routing] = experts.flatten().bincount(minlength=8)
    assert loads["even"].max() < 1.3 * 200 and loads["even"].min() > 0.7 * 200
    assert loads["skewed"][0] > 2 * 200 and loads["skewed"][-1] < 0.2 * 200
    assert [e for e, load in enumerate(loads["idle"]) if not load] == [0, 3, 6]


def test_peak_memory_is_what_a_trainer_adds(bench, monkeypatch):
    """Beside 700 MiB of another's, in a step after the one that compiles."""
    calls = []
    trainer = types.SimpleNamespace(train=calls.append)
    monkeypatch.setattr(gpu, "Timed", lambda script, flags: calls.append(script) or trainer)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 700 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr(train_gpt, "peak_memory_mib", lambda device: (1900, 2000))
    assert gpu.ready(bench._replace(device="cuda"), []) == (trainer, 1200) and calls == [train_moe, "reset", 1]


def real_workers(monkeypatch, source):
    """Workers are processes that run `source`, in which `state` is the part's file."""
    head = "import json, os, pathlib, sys, time; state = pathlib.Path(sys.argv[1])\n"
    monkeypatch.setattr(gpu, "worker_command", lambda b, part: [sys.executable, "-c", head + source,
                                                                str(b.out / f"{part}.json")])


def test_a_crash_and_a_death_without_a_word(tmp_path, monkeypatch):
    b = gpu.Bench(tmp_path, "", "cpu", True, tmp_path / "cache")
    (tmp_path / "logs").mkdir()
    real_workers(monkeypatch, """
s = json.loads(state.read_text())
if "crash" in s["rows"]:
    s["rows"]["after"] = {"ok": True}
    state.write_text(json.dumps(s))
    sys.exit(0)
state.write_text(json.dumps(s | {"now": "crash"}))
os.abort()""")
    state = gpu.run_part(b, "equality", 60)
    assert state["rows"] == {"crash": {"error": "the process died with code -6"}, "after": {"ok": True}}
    real_workers(monkeypatch, "sys.exit('no torch here')")
    state = gpu.run_part(b, "ablate", 60)
    assert state["status"] == "the process died with code 1" and not state["rows"]
    assert "no torch here" in (tmp_path / "logs/ablate.txt").read_text()


def test_a_hang_is_cut_off_with_all_it_started(tmp_path, monkeypatch):
    b = gpu.Bench(tmp_path, "", "cpu", True, tmp_path / "cache")
    (tmp_path / "logs").mkdir()
    real_workers(monkeypatch, """
import subprocess
child = subprocess.Popen(["sleep", "600"])
s = json.loads(state.read_text())
state.write_text(json.dumps(s | {"now": "hang"}))
state.with_name("new").write_text(str(child.pid))
state.with_name("new").rename(state.with_name("child"))
time.sleep(600)""")
    popen = subprocess.Popen

    class Patient(popen):
        """Its limit is over when the worker hangs, however long that takes on this machine."""

        def wait(self, timeout=None):
            limited = timeout is not None and self.args[1:2] == ["-c"] and not (tmp_path / "child").exists()
            while limited and not (tmp_path / "child").exists():
                time.sleep(0.02)
            return super().wait(0.01 if limited else timeout)

    monkeypatch.setattr(gpu.subprocess, "Popen", Patient)
    state = gpu.run_part(b, "resume", 9)
    assert state["rows"]["hang"] == {"error": "cut off by the time limit"}
    assert state["status"] == "cut off by the time limit"
    child = int((tmp_path / "child").read_text())
    while alive(child):  # a test that hangs here has found one that lives on
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_budget_no_part(bench, monkeypatch, capsys):
    rows_of(monkeypatch, a=lambda: {"ok": True})
    assert gpu.run_parts(bench, ["equality"], gpu.CLEANUP_S - 1) == 1
    assert "equality: skipped, the budget of 4 s is used up" in capsys.readouterr().out
    assert gpu.read_part(bench.out, "equality")["status"] == "not run"


@pytest.mark.parametrize("flags, sentence", [
    (["--device", "cpu"], "--device cpu only tests this script: add --tiny"),
    (["--device", "cpu", "--tiny", "--parts", "steps,stpes"], "--parts stpes: must be one or more of compile_"),
    (["--device", "cpu", "--tiny", "--budget", "0"], "--budget 0: must be above 0 seconds"),
    (["--device", "cpu", "--tiny", "--data", "nowhere/at/all"], "no train shards in nowhere/at/all"),
])
def test_bad_options_get_one_sentence(tmp_path, capsys, flags, sentence):
    assert gpu.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"), *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_cuda_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: this machine has no usable CUDA device; ")


def test_flags_of_full_size_suit_an_h100(tmp_path, monkeypatch):
    """All command lines of the real sizes are valid there, and mean what the report says."""
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device="auto": H100._replace(fp8=True))
    data = make_data(tmp_path / "words", [documents(6000, 1)], [documents(2000, 9)])
    b = gpu.Bench(tmp_path, str(data), "cuda", False, tmp_path / "cache")
    seen = {}

    def parse(flags):
        return train_gpt.parse_settings(flags, 1)[0]

    def run_script(b, name, flags):
        seen[name] = parse(flags)
        raise gpu.Skip

    def build(script, flags):
        seen[len(seen)] = parse(flags)
        raise gpu.Skip
    monkeypatch.setattr(gpu, "run_script", run_script)
    monkeypatch.setattr(gpu, "Timed", build)
    monkeypatch.setattr(gpu, "timing_data", lambda b: str(data))
    for row in [*gpu.resume(b).values(), *gpu.ablate(b).values()]:
        with pytest.raises(gpu.Skip):
            row()
    whole = train_gpt.PRESETS["speedrun"]
    assert seen["straight"].save_every == 20 and not seen["straight"].save_last
    (stage,) = train_gpt.stage_table(seen[max(k for k in seen if isinstance(k, int))])
    assert (stage.batch_tokens, stage.window) == (max(whole["batch_tokens"]) // 8, whole["window"][2])
    assert stage.window_start == stage.window
    for preset in ("speedrun", "gpu", "medium"):
        s = parse(gpu.flags_of(b, preset, str(data)))
        assert s.backend == "flex" and s.compile and s.target_loss == 0
    for change in gpu.VARIANTS.values():
        parse([*gpu.flags_of(b, "speedrun", str(data)), *change.split()])
    fast, plain, exact = gpu.check_settings(b, True)
    assert (fast.backend, fast.fp8_head, fast.dtype, fast.compile) == ("flex", "on", "bf16", True)
    assert (plain.backend, plain.kernels, plain.fp8_head, plain.dtype) == ("sdpa", "none", "off", "bf16")
    assert exact.dtype == "fp32" and not exact.compile


def test_mixtures_of_full_size_suit_an_h100(tmp_path, monkeypatch):
    h100, data = H100._replace(fp8=True), make_data(tmp_path / "words", [documents(6000, 1)], [documents(2000, 9)])
    monkeypatch.setattr(train_gpt, "detect_hardware", lambda device="auto": h100)
    monkeypatch.setattr(train_moe, "detect_hardware", lambda device="auto": train_moe.Hardware(*h100[:6], (9, 0)))
    monkeypatch.setattr(gpu, "timing_data", lambda b: str(data))
    seen = []

    def ready(b, flags):
        seen.append(train_moe.parse_settings(flags, 1)[0])
        if seen[-1].num_experts:
            raise gpu.Skip
    monkeypatch.setattr(gpu, "ready", ready)
    rows = gpu.moe_steps(gpu.Bench(tmp_path, str(data), "cuda", False, tmp_path / "cache"))
    for row in rows.values():
        with pytest.raises(gpu.Skip):
            row()
    dense, *mixtures = seen  # one control for all rows of a process
    assert dense.num_experts == 0 and [s.preset for s in mixtures] == [f"{name}-speedrun" for name in rows]
    assert {s.moe_impl for s in mixtures} == {"grouped"}
    for s in seen:
        (stage,) = train_moe.stage_table(s)
        assert stage.batch_tokens == stage.seq_len == 49152 and stage.window == stage.window_start
        assert s.compile and (s.backend, s.kernels, s.fp8_head) == ("flex", "gram+mlp+loss", "on")
        assert s.num_layers == 12 and s.target_loss == 0
    assert {s.moe_layers for s in mixtures} == {"M" * 12, "DD" + "M" * 8 + "DD", "D" + "M" * 11}


# --- errors, data, profile


def test_errors_by_hand():
    exact = {"out": torch.tensor([3.0, 4.0]), "grad": torch.tensor([1.0])}
    plain = {"out": torch.tensor([3.0, 4.5]), "grad": torch.tensor([1.0])}  # off by 10 %, 0 %
    fast = {"out": torch.tensor([3.0, 3.3]), "grad": torch.tensor([1.01])}  # off by 14 %, 1 %
    result = gpu.errors(fast, plain, exact, floor=0.02)
    assert result["ok"] is True and result["worst"] == "out" and result["compared"] == 2
    assert result["rel"] == pytest.approx(0.14) and result["rel_plain"] == pytest.approx(0.1)
    assert result["tolerance"] == pytest.approx(0.15) and result["max_abs"] == pytest.approx(0.7)
    one = {"losses": torch.ones(2)}
    strict = gpu.errors({"losses": torch.ones(2) * 1.01}, one, one, 0.1, 0.005)
    assert strict["ok"] is False and strict["tolerance"] == 0.005
    worse = gpu.errors(fast, plain, exact, floor=0.005)
    assert worse["ok"] is False and worse["worst"] == "grad"
    broken = gpu.errors(fast | {"grad": torch.tensor([math.nan])}, plain, exact, floor=10.0)
    assert broken["ok"] is False and broken["worst"] == "grad"


def test_timing_data_has_documents_like_fineweb(tmp_path):
    b = gpu.Bench(tmp_path, "", "cpu", False, tmp_path)
    corpus = train_gpt.open_corpus(gpu.timing_data(b))
    tokens = train_gpt.open_shard(corpus.train[0], corpus.meta["vocab_size"])
    lengths = np.diff(np.flatnonzero(tokens == 50256))
    assert corpus.meta["vocab_size"] == 50257 and len(tokens) == 4_000_000
    assert np.median(lengths) == pytest.approx(403, rel=0.1) and lengths.mean() == pytest.approx(690, rel=0.1)


# --- projection


def test_traffic_by_hand():
    """Two layers of width 32: 8 attention matrices fill one round of 8 owners, 4 MLP matrices half a round; each table
    of the vocabulary is cut into 8 pieces; the rest is all-reduced."""
    s = settings(num_layers=2, width=32, dtype="bf16", device="meta", value_embeds=1)
    with torch.device("meta"):
        model = train_gpt.GPT(s, 64)
        banks = train_gpt.MuonAdamW(model, s, train_gpt.World(0, 0, 8)).banks
    sent = projection.traffic(banks, 8)
    padded = 128  # of 64 tokens
    sharded = 8 * 32 * 32 + 8 * 128 * 32 + 3 * padded * 32  # 4 MLP matrices and 4 slots of padding
    scattered, gathered, reduced = sent.values()
    assert scattered == gathered == 7 / 8 * sharded * 2
    small = {n: p for n, p in model.named_parameters() if re.fullmatch("gates|smear|scalars", n)}
    sizes = sum(p.numel() * (4 if "scalar" in n else 2) for n, p in small.items())
    assert reduced == pytest.approx(2 * 7 / 8 * sizes)


def test_traffic_of_the_speedrun_matches_its_parameters(tmp_path, capsys):
    """Without padding each sharded parameter would be sent once, as bf16, but for the eighth a rank keeps."""
    _, model, banks = projection.build([], 8)
    small = re.compile("gates|smear|scalars|pointer.small|ngrams.*")
    sharded = sum(p.numel() for n, p in model.named_parameters() if not small.fullmatch(n))
    sent = projection.traffic(banks, 8)
    assert 1 <= sent["reduce-scatter of gradients"] / (7 / 8 * 2 * sharded) < 1.05
    assert projection.main(["--bandwidth", "900", "--efficiency", "0.5", "--out", str(tmp_path / "p.md")]) == 0
    text = capsys.readouterr().out
    assert text == (tmp_path / "p.md").read_text() and f"| together | {sum(sent.values()) / 2**20:,.3f} |" in text
    for flags, message in ((["--efficiency", "1.5"], "--ranks must be 2 or more"), (["--mfu", "0.3"], "--mfu 0.3: ex")):
        assert projection.main(flags) == 1
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_the_old_recipe_costs_what_it_did():
    """377 PFLOP, 472 M tokens, 928.3 MiB a step; its times are those of the utilization measured for each stage."""
    args = projection.parse_args([])
    rows, total = projection.costs(projection.BEFORE, args)
    assert total["flops"] / 1e15 == pytest.approx(376.7, abs=0.05)
    assert total["tokens"] == 600 * 8 * (16384 + 32768 + 49152)
    assert [row[-2:] for row in rows] == [["928.3", "2.88"]] * 3 and total["steps"] == 1800
    assert total["seconds"] == pytest.approx(0.6 * (41.1 + 73 + 107), rel=0.01)  # ms a step of an eighth on one H200
    assert projection.utilization("10:0.2,20:0.4", 15) == pytest.approx(0.3)
    assert projection.utilization("20:0.4,10:0.2", 5) == 0.2


def test_stages_with_candidates_and_ngrams_by_hand():
    """The whole head costs 6 FLOPs for each of its 50,304 x 768 weights; of found vectors and their gradients parts."""
    args, few = projection.parse_args([]), ["--candidates", "10240,10240,0"]
    (whole, _), (rows, total) = (projection.costs([*projection.BEFORE, *flags], args) for flags in ([], few))
    saved = 6 * (50304 - 10240) * 768 / 1e6
    assert float(whole[0][5]) - float(rows[0][5]) == pytest.approx(saved, abs=0.11) and whole[2] == rows[2]
    rows, _ = projection.costs([*projection.BEFORE, "--ngram-rows", "8192"], args)
    more = 7 * 16384 * (2 * 768 / 8 * 2 + 8) / 2**20  # 1/8 of the columns is sent; and a weight for each layer
    assert float(rows[0][-2].replace(",", "")) - 928.272 == pytest.approx(more, abs=0.1)
