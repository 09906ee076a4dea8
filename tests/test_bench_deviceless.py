"""bench/deviceless.py and bench/fakecuda.py: what is arithmetic, parsing and report, on any build of torch; a compile
for a card that is not there, where torch is a CUDA build."""
import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, environment

import train_gpt
import train_moe
from bench import deviceless, fakecuda
from bench.fakecuda import CARDS, Timeline, Watch

H100 = CARDS["h100"]


def command(*flags):
    return subprocess.run([sys.executable, str(ROOT / "bench/deviceless.py"), *map(str, flags)], env=environment(),
                          capture_output=True, text=True)


# --- cards and roofline


def test_facts_of_the_cards():
    assert list(CARDS) == ["h100", "h200", "a100", "b200", "4090", "4080", "3090", "t4"]
    capabilities = {name: card.capability for name, card in CARDS.items()}
    assert capabilities == {"h100": (9, 0), "h200": (9, 0), "a100": (8, 0), "b200": (10, 0), "4090": (8, 9),
                            "4080": (8, 9), "3090": (8, 6), "t4": (7, 5)}
    shared = {name: card.shared << 10 for name, card in CARDS.items()}
    assert shared["h100"] == 232_448 and shared["a100"] == 166_912 and shared["4080"] == 101_376
    assert shared["t4"] == 65_536
    for name, card in CARDS.items():
        assert bool(card.fp8) == (card.capability >= (8, 9)), name
        assert card.fp32 < card.bf16 and card.link < card.bandwidth
        known = [peak for part, peak in train_gpt.PEAK_FLOPS.items() if part in card.name]
        assert not known or known[0] / 1e12 == pytest.approx(card.bf16, rel=0.01), name


def test_a_kernel_takes_what_memory_or_arithmetic_needs_and_never_less_than_the_shortest():
    memory = fakecuda.roofline(H100, 3350e6, 1.0)
    assert memory["us"] == pytest.approx(1000) and memory["compute_us"] < 1e-3
    compute = fakecuda.roofline(H100, 1.0, 989e9)
    assert compute["us"] == pytest.approx(1000) and compute["launches"] == 1
    assert fakecuda.roofline(H100, 1.0, 989e9, 1)["us"] == pytest.approx(1000 * 989 / 1979)
    assert fakecuda.roofline(H100, 1.0, 67e9, 4)["us"] == pytest.approx(1000)
    assert fakecuda.roofline(CARDS["a100"], 1.0, 312e9, 1)["us"] == pytest.approx(1000)  # no FP8: as bf16
    assert fakecuda.roofline(H100, 8, 8)["us"] == fakecuda.KERNEL_US


def test_the_device_waits_for_launches_and_the_host_for_numbers():
    time = Timeline(H100)
    for _ in range(10):
        time.launch(1.0)
    assert time.host == 10 * fakecuda.LAUNCH_US and time.device == time.host + 1  # bound by launches
    time.launch(1000.0)
    before = time.device
    time.launch(5.0)
    assert time.device == before + 5  # the launch is hidden
    time.sync()
    assert time.host == time.device


def test_collectives_run_beside_kernels_one_after_the_other():
    time = Timeline(H100, 8)
    first = time.send("reduce_scatter", 450e3 * 8 / 7)
    assert first == pytest.approx(fakecuda.SEND_US + 1)
    second = time.send("all_reduce", 450e3 * 8 / 7)
    assert second == pytest.approx(first + fakecuda.SEND_US + 2)
    time.launch(10.0)  # ends at 16
    assert time.wait(second) == pytest.approx(second - 16) and time.now == second
    assert time.wait(first) == 0
    assert Timeline(H100, 1).send("all_reduce", 1e9) == fakecuda.SEND_US  # alone: nothing to send


# --- what programs print


def test_registers_and_stack_are_read():
    text = ("Resource usage:\n Common:\n  GLOBAL:0\n Function triton_poi_fused_0:\n"
            "  REG:255 STACK:104 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0\n")
    assert fakecuda.usage_of(text) == {"registers": 255, "stack": 104}
    assert fakecuda.usage_of("cuobjdump fatal") == {}


def test_calls_of_generated_code_are_counted():
    code = """
def benchmark(): triton_poi_fused_0.run(a)
def call(args):
    triton_poi_fused_0.run(a, b, 8, stream=stream0)
    extern_kernels.mm(a, b, out=c)
    buf = torch.ops.project.head.default(a)
    triton_red_fused_1.run(a, stream=stream0)
"""
    assert fakecuda.calls_of(code) == {"kernels": 2, "calls": 2}
    assert fakecuda.calls_of("") == {"kernels": 0, "calls": 0}


def test_reasons_of_recompilations_are_one_line():
    text = ("Recompiling function forward in /a/train_gpt.py:500\n    triggered by the following guard failure(s):\n"
            "    - 0/0: L['x'].size()[0] == 4  # at b.py\n    - 0/1: other")
    assert fakecuda.reason_of(text) == "forward: L['x'].size()[0] == 4  # at b.py"
    assert fakecuda.reason_of("something\nelse") == "else" and len(fakecuda.reason_of("x" * 999)) == 300


# --- bytes and FLOPs


def test_bytes_of_operations():
    table, rows = torch.zeros(1000, 8), torch.zeros(4, dtype=torch.int64)
    out = torch.zeros(4, 8)
    assert fakecuda.moved("add", [out, out], [torch.zeros(4, 8)]) == 2 * 128  # one tensor twice
    assert fakecuda.moved("embedding", [table, rows], [out]) == 2 * 128 + 32
    assert fakecuda.moved("_index_put_impl_", [table, rows, out], [table]) == 3 * 128
    assert fakecuda.nbytes(torch.zeros(1).expand(1000)) == 4


def test_flops_of_products():
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16)

    matrices = [zeros(64, 16), zeros(32, 16), zeros(64, 32)]
    assert fakecuda.product_flops("product_relu2_kernel", matrices) == 2 * 64 * 16 * 32
    assert fakecuda.product_flops("gram_kernel", [zeros(3, 8, 32), zeros(3, 8, 8)]) == 3 * 8 * 32 * 8
    assert fakecuda.product_flops("copy", [zeros(64, 16), zeros(32, 8)]) == 0 == fakecuda.product_flops("none", [])
    q, v = zeros(1, 6, 128, 64), zeros(1, 6, 128, 128)
    assert fakecuda.attention_flops(q, v, 10, False) == 2 * 10 * 6 * 128 * (64 + 128)
    assert fakecuda.attention_flops(q, v, 10, True) == 2 * 10 * 6 * 128 * (3 * 64 + 2 * 128)


def test_gathering_kernels_count_what_they_load_and_updates_count_twice():
    watch = Watch(H100, 1)
    given = {"in_ptr0": torch.zeros(1000, 8), "in_out_ptr0": torch.zeros(64), "xnumel": 64}
    watch.launched("triton_poi_fused_0", given, dot=True)
    ((key, work),) = watch.step.work.items()
    assert key == ("model", "eager", "triton_poi_fused_0") and work["bytes"] == 64 * 4 + 2 * 64 * 4


def test_attention_counts_the_keys_that_are_seen_also_where_queries_share_a_buffer():
    watch, q = Watch(H100, 1), torch.zeros(1, 2, 64, 16)
    watch.keys = 10.0
    for i, more in enumerate(({"arg_Q": q}, {}, {"arg_DO": q})):
        watch.launched(f"flex_attention_{i}", {"arg_V": q} | more, dot=False)
    flops = [work["flops"] for work in watch.step.work.values()]
    forward = 2 * 10 * 2 * 64 * 32
    assert flops == [forward, forward, 2.5 * forward]


# --- a run


def train_step(watch, sent=False):
    """Forward, backward, the optimizer's work, as a script calls them."""
    def forward():
        watch.launch("mm", 3350e3, 0.0)

    def backward():
        watch.launch("mm", 2 * 3350e3, 0.0)
        return fakecuda.Handle(watch, "reduce_scatter", 450e5, []) if sent else None

    class Optimizer:
        def step(self, handle):
            if handle:
                handle.wait()
            watch.launch("add", 3350e3, 0.0)
    forward()
    Optimizer().step(backward())


def test_phases_come_from_the_functions_and_a_step_ends_with_the_optimizer():
    watch = Watch(H100, 8)
    watch.launch("zeros", 8)
    train_step(watch)
    assert watch.count == 0
    train_step(watch, sent=True)
    phases = {phase for phase, *_ in watch.done.work}
    assert watch.count == 1 and phases == {"model", "forward", "backward", "optimizer"}
    watch.complete()
    (sent,) = watch.done.sent
    assert sent["phase"] == "backward" and sent["waited"] == "optimizer" and sent["bytes"] == 450e5
    assert sent["exposed_us"] == pytest.approx(fakecuda.SEND_US + 100 * 7 / 8)
    spent = watch.done.spent
    assert spent["optimizer"] == pytest.approx(1 + sent["exposed_us"], abs=fakecuda.LAUNCH_US)


def test_a_script_of_others_ends_after_its_steps():
    watch = Watch(H100, 1, 1)
    train_step(watch)
    with pytest.raises(fakecuda.Enough):
        train_step(watch)


def test_evaluation_is_a_phase_and_waits_are_counted():
    watch = Watch(H100, 1)

    def evaluate():
        watch.host_waits("a number is read")
        return watch.phase()
    assert evaluate() == "evaluation" and watch.step.waits == {"a number is read, evaluation": 1}


def test_the_stub_answers_for_one_device():
    source = fakecuda.stub_source(16 << 30, (8, 9))
    assert "#define MAJOR 8\n#define MINOR 9\n" in source
    assert "int cudaGetDeviceCount(int *x) { *x = 1; return 0; }" in source and f"{16 << 30}ull" in source
    assert "int cuGetErrorString(int e, const char **x) { *x = \"stub\"; return 0; }" in source
    assert source.count("return 0") == len(fakecuda.NOTHING.split()) + 14 + 1


# --- scripts


@pytest.mark.parametrize("which, ends", [("largest", [1107]), ("first", [320]), ("last", [1194]), ("3", [965]),
                                         ("all", [320, 681, 965, 1107, 1174, 1194])])
def test_stages_are_chosen(which, ends):
    stages = train_gpt.stage_table(train_gpt.Settings(**train_gpt.PRESETS["speedrun"]))
    assert [t.end for t in deviceless.chosen(stages, which)] == ends


def test_an_unknown_stage_is_told():
    with pytest.raises(ValueError, match="--stages 9: must be one of largest, last, first, all, 1"):
        deviceless.chosen([SimpleNamespace(batch_tokens=1)], "9")


@pytest.mark.parametrize("script", [train_gpt, train_moe])
def test_visible_keys_are_those_of_the_flops(script):
    s = script.Settings(num_layers=2, attention="SS", window=(256,), window_step=128, seq_len=(4096,), qk_dim=0,
                        pointer=64, max_doc_len=(0,), value_embeds=0)
    (stage,) = script.stage_table(s)
    short = train_gpt.short_window(torch.tensor(256), 128).item()
    assert deviceless.visible_keys(script, s, stage) == pytest.approx(short - short * (short - 1) / 8192)


def test_the_stand_in_gives_the_steps_that_were_asked_for(monkeypatch):
    s = train_gpt.Settings(seq_len=(64,), batch_tokens=(512,), micro_tokens=128, eval_seq_len=64, device="cpu")
    (stage,) = train_gpt.stage_table(s)
    args = SimpleNamespace(vocab=257, steps=2)
    run = deviceless.StandIn(s, train_gpt.World(0, 0, 2), stage, args)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *a, device=None, **k: zeros(*a, **k))
    assert run.next_batch(0).shape == (2, 3, 2, 64) and not run.over and not run.validation_due(1)
    run.next_batch(1)
    assert run.over and run.validation_due(2)
    assert run.log.print("x") is None and not run.log_due(1) and run.stream.rows(0, 3).shape[1] == 3


def test_rows_that_are_stood_in_for():
    one = fakecuda.SparseRows(torch.tensor([[2, 0]]), torch.tensor([[1.0], [2.0]]))
    both = (one + one).coalesce()
    assert both.indices().tolist() == [[0, 0, 2, 2]] and both.values().flatten().tolist() == [2, 2, 1, 1]


def test_operations_that_start_kernels():
    aten = torch.ops.aten
    assert fakecuda.starts_kernel(aten.add.Tensor) and fakecuda.starts_kernel(aten.add_.Tensor)
    for quiet in (aten.view.default, aten.t.default, aten.empty.memory_format, aten.detach.default):
        assert not fakecuda.starts_kernel(quiet)


def test_numbers_are_stood_in_for():
    watch, x = Watch(H100, 4), torch.ones(8)
    assert fakecuda.stood_in(watch, "_local_scalar_dense", (x,), {}) == 1.0
    assert fakecuda.stood_in(watch, "_local_scalar_dense", (x.long(),), {}) == 0
    assert fakecuda.stood_in(watch, "nonzero", (x > 0,), {}).shape == (2, 1)
    assert fakecuda.stood_in(watch, "_to_copy", (x,), {"device": "cpu", "dtype": torch.int64}).sum() == 0
    values, places, counts = fakecuda.stood_in(watch, "_unique2", (x,), {})
    assert len(values) == len(places) == len(counts) == 8
    assert fakecuda.stood_in(watch, "add", (x, x), {}) is None


# --- report


@pytest.fixture
def report(tmp_path):
    """report.json of a run by hand, and its folder."""
    watch = Watch(H100, 8)
    watch.graphs.append(dict(label="0 forward", kind="forward", phase="forward", work=Counter(bytes=2e9, us=1000.0),
                             nodes=7, after=0, seconds=1.5, kernels=3, calls=4))
    watch.kernels["0 forward", "k"] = dict(kernel="k", graph="0 forward", shared=9000, registers=255, stack=104)
    watch.recompiled.append((1, "forward: guard"))
    watch.peaks = {"model": 2 << 30, "forward": 100 << 30}
    watch.stand_ins["nonzero"] = 3
    train_step(watch, sent=True)
    watch.complete()
    about = dict(script="train_gpt.py", flags="--preset gpu", card="h100", rank=0, world=8, torch="2.14.1",
                 date="2026-11-26", keys=512.0)
    found = json.loads(json.dumps(deviceless.result(watch, about, ["in forward: RuntimeError: no"])))
    (tmp_path / "one").mkdir()
    (tmp_path / "one/report.json").write_text(json.dumps(found))
    return found, tmp_path / "one"


def test_the_report_has_every_part(report):
    text = deviceless.report(report[0])
    for words in ("Compiles: **no**, 1 graphs", "Fits: **no**, 100.00 of 79.2 GiB", "| forward | 100.00 | 126% |",
                  "| backward | reduce_scatter | optimizer | 1 | 45.00 |",
                  "| 0 forward | forward | forward | 3 | 4 | 1.5 | 9000 | 255 | 104 | 2.00 |",
                  "| k | 9000 | 255 | 104 |", "| 1 | forward: guard |", "| nonzero | 3 |",
                  "in forward: RuntimeError: no", "Graphs compiled in the last of 1 steps: 1"):
        assert words in text, text
    assert list(report[0]["phases"]) == ["forward", "backward", "optimizer"]


def test_every_line_with_a_time_says_estimate(report):
    lines = deviceless.report(report[0]).split("## Roofline of a step\n\n")[1].split("\n\n")
    rows = lines[0].splitlines()[2:]
    assert len(rows) == 4 and all("estimate" in row for row in rows) and lines[1].startswith("Estimate")
    for heading in ("## Where a step", "## Collectives", "## Graphs"):
        head = deviceless.report(report[0]).split(heading)[1].split("\n\n")[1].splitlines()[0]
        assert "estimate" in head


def test_reports_side_by_side(report):
    found = command("--compare", report[1], report[1])
    assert found.returncode == 0, found.stderr
    row = "| one | train_gpt.py | h100 | 1 | 3 | 0.0 | 0.00 | 45 | 100.00 |"
    assert found.stdout.count(row) == 2 and "estimate" in found.stdout


# --- command line


def test_help_and_facts_need_no_cuda_build():
    assert "No GPU is needed" in command("--help").stdout
    found = command("--facts")
    assert found.returncode == 0 and all(f"| {name} |" in found.stdout for name in CARDS)


@pytest.mark.parametrize("flags, words", [
    (["--card", "v100"], "--card v100: must be one of h100, h200"),
    (["--script", "nothing.py"], "--script nothing.py: no such file"),
    (["--world", 2, "--rank", 2], "--rank 2 from 0 to --world - 1"),
    (["--compare", "nowhere"], "No such file"),
])
def test_errors_are_one_sentence(flags, words):
    found = command(*flags)
    assert found.returncode == 1 and words in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_a_build_for_cpus_is_told():
    found = command()
    assert found.returncode == 1 and "build for CPUs" in found.stderr and found.stderr.count("\n") == 1


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch (no GPU)")
def test_a_small_model_compiles_for_a_card_that_is_not_there(tmp_path):
    flags = """--preset gpu --num-layers 3 --value-embeds 1 --width 128 --head-dim 64 --seq-len 512 --batch-tokens 1024
    --micro-tokens 512 --max-doc-len 512 --window 256 --eval-tokens 1024 --eval-seq-len 512 --ngram-rows 4096"""
    found = command("--configs", "none", "--vocab", 300, "--out", tmp_path, "--", *flags.split())
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    r = json.loads((tmp_path / "report.json").read_text())
    assert not r["errors"] and r["steps"] >= 2 and r["compiled_in_last_step"] == 0 and len(r["graphs"]) >= 3
    assert set(r["phases"]) == {"forward", "backward", "optimizer"} and r["memory"]["backward"] > 1e6
    assert all(one["flops"] > 0 for one in r["phases"].values()) and "nonzero" in r["stand_ins"]
