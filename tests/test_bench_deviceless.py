"""bench/deviceless.py: what is arithmetic, parsing and report, on any build of torch; a compile for a card that is not
there, where torch is a CUDA build."""
import contextlib
import ctypes
import functools
import json
import shutil
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, environment

import train_gpt
import train_moe
from bench import cards, deviceless
from bench.cards import CARDS
from bench.deviceless import Watch

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
    memory = deviceless.roofline(H100, 3350e6, 1.0)
    assert memory["us"] == pytest.approx(1000) and memory["bytes"] == 3350e6
    compute = deviceless.roofline(H100, 1.0, 989e9)
    assert compute["us"] == pytest.approx(1000) and compute["launches"] == 1
    assert deviceless.roofline(H100, 1.0, 989e9, 1)["us"] == pytest.approx(1000 * 989 / 1979)
    assert deviceless.roofline(H100, 1.0, 67e9, 4)["us"] == pytest.approx(1000)
    assert deviceless.roofline(CARDS["a100"], 1.0, 312e9, 1)["us"] == pytest.approx(1000)  # no FP8: as bf16
    assert deviceless.roofline(H100, 8, 8)["us"] == deviceless.KERNEL_US


def test_the_device_waits_for_launches_and_the_host_for_numbers():
    watch = Watch(H100, 1)
    for _ in range(10):
        watch.launch("add", 8)
    assert watch.host == 10 * deviceless.LAUNCH_US  # the device is bound by launches
    assert watch.device == watch.host + deviceless.KERNEL_US
    watch.launch("mm", 1.0, 989e9)
    before = watch.device
    watch.launch("mm", 1.0, 5 * 989e6)
    assert watch.device == pytest.approx(before + 5)  # the launch is hidden
    watch.host_waits("a number is read")
    assert watch.host == watch.device == watch.now


def test_collectives_run_beside_kernels_one_after_the_other():
    watch, size = Watch(H100, 8), 450e3 * 8 / 7
    first = deviceless.Handle(watch, "reduce_scatter", size, [])
    assert first.end == pytest.approx(deviceless.SEND_US + 1)
    second = deviceless.Handle(watch, "all_reduce", size, [])
    assert second.end == pytest.approx(first.end + deviceless.SEND_US + 2)
    watch.launch("mm", 1.0, 10 * 989e6)  # ends at 16
    second.wait()
    first.wait()
    assert second.row["us"] == pytest.approx(second.end - 16) and watch.now == second.end
    assert first.row["us"] == 0 and first.tensors == []
    assert deviceless.Handle(Watch(H100, 1), "all_reduce", 1e9, []).end == deviceless.SEND_US  # alone: nothing to send


# --- what programs print


def test_registers_and_stack_are_read():
    text = ("Resource usage:\n Common:\n  GLOBAL:0\n Function triton_poi_fused_0:\n"
            "  REG:255 STACK:104 SHARED:0 LOCAL:0 CONSTANT[0]:560 TEXTURE:0 SURFACE:0 SAMPLER:0\n")
    assert deviceless.usage_of(text) == {"registers": 255, "stack": 104}
    assert deviceless.usage_of("cuobjdump fatal") == {}


def test_reasons_of_recompilations_are_one_line():
    text = ("Recompiling function forward in /a/train_gpt.py:500\n    triggered by the following guard failure(s):\n"
            "    - 0/0: L['x'].size()[0] == 4  # at b.py\n    - 0/1: other")
    assert deviceless.reason_of(text) == "forward: L['x'].size()[0] == 4  # at b.py"
    assert deviceless.reason_of("something\nelse") == "else" and len(deviceless.reason_of("x" * 999)) == 300


# --- bytes and FLOPs


def test_bytes_of_operations():
    table, rows = torch.zeros(1000, 8), torch.zeros(4, dtype=torch.int64)
    out = torch.zeros(4, 8)
    assert deviceless.moved("add", [out, out], [torch.zeros(4, 8)]) == 2 * 128  # one tensor twice
    assert deviceless.moved("embedding", [table, rows], [out]) == 2 * 128 + 32
    assert deviceless.moved("_index_put_impl_", [table, rows, out], [table]) == 3 * 128
    assert deviceless.nbytes(torch.zeros(1).expand(1000)) == 4


def test_flops_of_products():
    def zeros(*shape):
        return torch.zeros(shape, dtype=torch.bfloat16)

    matrices = [zeros(64, 16), zeros(32, 16), zeros(64, 32)]
    assert deviceless.product_flops("product_relu2_kernel", matrices) == 2 * 64 * 16 * 32
    assert deviceless.product_flops("gram_kernel", [zeros(3, 8, 32), zeros(3, 8, 8)]) == 3 * 8 * 32 * 8
    assert deviceless.product_flops("copy", [zeros(64, 16), zeros(32, 8)]) == 0 == deviceless.product_flops("none", [])


def test_gathering_kernels_count_what_they_load_and_updates_count_twice():
    watch = Watch(H100, 1)
    given = {"in_ptr0": torch.zeros(1000, 8), "in_out_ptr0": torch.zeros(64), "xnumel": 64}
    watch.launched("triton_poi_fused_0", given, dot=True)
    ((key, work),) = watch.step.work.items()
    assert key == ("model", "triton_poi_fused_0") and work["bytes"] == 64 * 4 + 2 * 64 * 4


def test_attention_counts_the_keys_that_are_seen_whatever_buffers_its_inputs_share():
    watch, lse = Watch(H100, 1), torch.zeros(1, 2, 64)
    watch.keys = 10.0
    q, v, flat = torch.zeros(1, 2, 64, 16), torch.zeros(1, 2, 64, 32), torch.zeros(64, 2 * (16 + 16 + 32))
    forward = {"arg_K": torch.zeros(1, 64, 4, 16), "arg_V": flat, "arg_LSE": lse, "out_ptr0": v}
    backward = {"arg_K": q, "arg_V": flat, "arg_LSE": lse, "arg_DQ": q, "arg_DV": v, "out_ptr0": q}
    for i, given in enumerate((forward, forward | {"arg_K": flat}, backward)):
        watch.launched(f"flex_attention_{i}", given, dot=False)
    flops = [work["flops"] for work in watch.step.work.values()]
    assert flops == [2 * 10 * 2 * 64 * n for n in (16 + 32, 2 * 32, 3 * 16 + 2 * 32)]


# --- a run


def train_step(watch, sent=False):
    """Forward, backward, the optimizer's work, as a script calls them."""
    def forward():
        watch.launch("mm", 3350e3, 0.0)

    def backward():
        watch.launch("mm", 2 * 3350e3, 0.0)
        return deviceless.Handle(watch, "reduce_scatter", 450e5, []) if sent else None

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
    watch.enter()
    (sent,) = watch.done.sent
    assert sent["begins in"] == "backward" and sent["awaited in"] == "optimizer" and sent["bytes"] == 450e5
    assert sent["us"] == pytest.approx(deviceless.SEND_US + 100 * 7 / 8)
    spent = watch.done.spent
    assert spent["optimizer"] == pytest.approx(2 + sent["us"], abs=deviceless.LAUNCH_US)


def test_a_script_of_others_ends_after_its_steps():
    watch = Watch(H100, 1, 1)
    train_step(watch)
    with pytest.raises(SystemExit):
        train_step(watch)


def test_evaluation_is_a_phase_and_waits_are_counted():
    watch = Watch(H100, 1)

    def evaluate():
        watch.host_waits("a number is read")
        return watch.phase()
    assert evaluate() == "evaluation"
    ((why, times),) = watch.step.waits.items()
    assert why.startswith("a number is read, evaluation, test_bench_deviceless.py:") and times == 1


class OnCard:
    """So many floats, as if on the card."""
    device = torch.device("cuda")

    def __init__(self, size):
        self.storage = torch.zeros(size).untyped_storage()

    def untyped_storage(self):
        return self.storage


def test_a_step_of_dynamo_is_none_of_the_optimizer():
    for folder, phase in (("_dynamo", "model"), ("optim", "optimizer")):
        found = {}
        exec(compile("def step(watch):\n    return watch.phase()", f"/torch/{folder}/file.py", "exec"), found)
        assert found["step"](Watch(H100, 1)) == phase


def test_memory_is_counted_until_it_is_free():
    watch = Watch(H100, 1)
    one, other = OnCard(100), OnCard(50)
    watch.see([one, one, torch.zeros(7)])
    assert watch.peaks["model"] == sum(watch.peaks.values()) == 400
    del one
    watch.see([other])
    assert watch.peaks["model"] == 400 and sum(watch.live.values()) == 200


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler")
def test_the_stub_answers_for_one_device(tmp_path):
    facts = [f"-DBYTES={16 << 30}ull", "-DMAJOR=8", "-DMINOR=9"]
    subprocess.run(["cc", "-w", "-shared", "-fPIC", *facts, "-o", tmp_path / "stub.so", ROOT / "bench/deviceless.c"],
                   check=True)
    stub, count, free, size = ctypes.CDLL(tmp_path / "stub.so"), ctypes.c_int(), ctypes.c_size_t(), ctypes.c_size_t()
    assert stub.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value == 1
    assert stub.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(size)) == 0 and size.value == free.value == 16 << 30
    facts = ctypes.create_string_buffer(1000)
    stub.cudaGetDeviceProperties(facts, 0)
    assert facts[360] == b"\x08" and facts[364] == b"\x09" and stub.cudaSetDevice(0) == 0


def test_collectives_are_written_down_and_counts_on_the_cpu_come_back(monkeypatch):
    dist, watch = torch.distributed, Watch(H100, 8)
    for name, old in list(vars(dist).items()):
        if callable(old):
            monkeypatch.setattr(dist, name, old)
    deviceless.watch_collectives(watch)
    counts, sent = torch.zeros(8), torch.arange(8.0)
    dist.all_to_all_single(counts, sent, async_op=True).get_future().wait()
    dist.all_gather_into_tensor(torch.zeros(16), torch.zeros(2))
    assert counts.equal(sent) and dist.get_world_size() == 8 and dist.get_rank() == 0
    rows = [(row["kind"], row["bytes"], row["awaited in"]) for row in watch.step.sent]
    assert rows == [("all_to_all", 32, "model"), ("all_gather", 64, "model")]


# --- scripts


TINY = """--preset cpu --device cpu --dtype bf16 --backend plain --num-layers 2 --width 32 --head-dim 16
--qk-dim 0 --ngram-rows 64 --pointer 8 --value-embeds 1 --seq-len 64 --max-doc-len 0 --window 64 --window-start 0
--window-step 32 --batch-tokens 256,512 --stage-ends 0.5,1 --stage-lr 1 --mtp 1 --micro-tokens 128 --eval-seq-len 64
--candidates 0 --iterations 10""".split()


@pytest.mark.parametrize("script", [train_gpt, train_moe])
def test_a_script_trains_with_the_stand_in(script, monkeypatch):
    """The real `train` with its warm-up, on a CPU: the stand-in has all that it asks for, and ends it."""
    monkeypatch.setattr(script, "compiled", lambda function, s: function)
    s = script.parse_settings([*TINY, "--compile"], 1)[0]
    *_, stage = script.stage_table(s)
    monkeypatch.setattr(script, "stage_table", lambda _: [stage])
    monkeypatch.setattr(deviceless, "VOCAB", 257)
    run = deviceless.stand_in(s, script.World(), stage, 3)
    steps = []
    monkeypatch.setattr(script.MuonAdamW, "step", functools.partialmethod(note, steps, script.MuonAdamW.step))
    script.train(run)
    assert run.left == 0 and steps == [None] + [stage.start + 1] * 3
    assert run.fits.call_count == 1 and run.log_validation.call_count == 1
    assert run.next_batch(0).shape == (4, 3, 2, 64)


def note(optimizer, steps, step, scale, momentum, others=None, span=None):
    steps.append(span and span[1])
    return step(optimizer, scale, momentum, others, span)


def run_flags(script, *flags, stage=0, **more):
    """The settings with which a script of the project would train."""
    args = SimpleNamespace(flags=flags, world=1, stage=stage, steps=2)
    watch, path = Watch(H100, 1), ROOT / f"{script.__name__}.py"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("stage_table", "train"):
            patch.setattr(script, name, getattr(script, name))
        patch.setattr(script.GPT, "__init__", script.GPT.__init__)
        patch.setattr(script, "fitted", lambda s, *_: (s, [], []))  # this machine's memory does not count
        script.train = more.get("train", lambda run: None)
        deviceless.run_ours(path, watch, args)
        return watch, script.stage_table(None)


@pytest.mark.parametrize("number, end", [(0, 1107), (1, 320), (3, 965), (6, 1194)])
def test_a_stage_is_chosen(number, end):
    _, (stage,) = run_flags(train_gpt, "--preset", "speedrun", "--device", "cpu", stage=number)
    assert stage.end == end


def test_an_unknown_stage_is_told():
    with pytest.raises(ValueError, match="--stage 7: must be 1 to 6, or 0 for the largest"):
        run_flags(train_gpt, "--preset", "speedrun", "--device", "cpu", stage=7)


@pytest.mark.parametrize("script", [train_gpt, train_moe])
def test_visible_keys_are_those_of_the_flops(script):
    flags = "--attention SS --window 256 --window-step 128 --seq-len 4096 --max-doc-len 0 --stage-ends 1 --qk-dim 8"
    watch, _ = run_flags(script, *TINY, *flags.split(), "--batch-tokens", "8192", "--micro-tokens", "4096")
    short = train_gpt.short_window(torch.tensor(256), 128).item()
    assert watch.keys == pytest.approx(short - short * (short - 1) / 8192)


@pytest.mark.parametrize("within", [contextlib.nullcontext, torch._C._AutoDispatchBelowAutograd])
def test_a_product_counts_once_also_within_operators(within):
    """There torch hands over `matmul` as a whole, and its FLOPs are those of the `mm` in it."""
    watch = Watch(H100, 1)
    with deviceless.make_mode(watch), within():
        a, b = torch.empty(4, 8, device="cuda"), torch.empty(8, 2, device="cuda")
        a @ b.reshape(8, 2)
    work = sum(watch.step.work.values(), Counter())
    assert (work["launches"], work["flops"], work["bytes"]) == (1, 2 * 4 * 8 * 2, 4 * (32 + 16 + 8))
    assert sum(watch.peaks.values()) == 4 * (32 + 16 + 8)


@torch.library.custom_op("deviceless_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return x + x


@double.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_of_the_script_counts_as_its_body_and_once():
    watch = Watch(H100, 1)
    with deviceless.make_mode(watch):
        y = double(torch.empty(100, device="cuda"))
    assert [name for _, name in watch.step.work] == ["add"] and y.shape == (100,)
    assert sum(watch.peaks.values()) == 2 * 400


def test_a_product_into_a_given_tensor_needs_no_fake_form():
    watch = Watch(H100, 1)
    with deviceless.make_mode(watch):
        a, scale = torch.empty(32, 32, device="cuda").to(torch.float8_e4m3fn), torch.empty((), device="cuda")
        out = torch.empty(32, 32, device="cuda", dtype=torch.bfloat16)
        assert torch._scaled_mm(a, a.T, scale, scale, out_dtype=torch.bfloat16, out=out) is out
    work = watch.step.work["model", "_scaled_mm"]
    assert (work["launches"], work["flops"]) == (1, 2 * 32**3)


def test_parameters_keep_what_hangs_on_them_on_their_way_to_the_card(monkeypatch):
    fake, waits = torch._subclasses.FakeTensor, []
    for place, name in ((torch, "tensor"), (torch.nn.Module, "_apply"), (fake, "data_ptr"), (fake, "__format__"),
                        (fake, "__getitem__")):
        monkeypatch.setattr(place, name, getattr(place, name))
    cards.let_in_fakes(waits.append)
    layer = torch.nn.Linear(2, 3)
    layer.weight.label = "head"
    with deviceless.make_mode(Watch(H100, 1)):
        layer._apply(lambda x: torch.empty_like(x, device="cuda"))
        assert layer.weight.device.type == "cuda" and layer.weight.label == "head"
        x = torch.tensor([1.0, 2], device="cuda", requires_grad=True)
    assert x.shape == (2,) and x.requires_grad and x.device.type == "cuda" and torch.tensor([3]).item() == 3
    assert waits == ["a copy from the CPU"]


def test_the_form_of_a_kernel_that_fits_is_noted_and_none_is_a_problem(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__file__=str(tmp_path / "triton.py")))
    monkeypatch.setenv(cards.INSIDE, str(tmp_path))
    said = SimpleNamespace(stdout=" REG:40 STACK:8 ")
    monkeypatch.setattr(deviceless.subprocess, "run", lambda *_, **__: said)
    watch = Watch(CARDS["t4"], 1)
    forms = [SimpleNamespace(metadata=SimpleNamespace(shared=n), asm={"cubin": b""}) for n in (99_000, 64_000, 1)]
    watch.note("k", forms)
    assert watch.kernels == {("eager", "k"): dict(kernel="k", graph="eager", shared=64_000, registers=40, stack=8)}
    assert not watch.problems and watch.graph.row["shared"] == 64_000
    watch.note("big", forms[:1])
    assert list(watch.problems) == ["big: 99,000 bytes of shared memory, and a block has 65,536"]


def test_the_host_waits_for_copies_from_the_cpu_unless_they_are_told_not_to():
    watch, there = Watch(H100, 1), torch.zeros(3)
    for args, options in (((OnCard(3), there), {}), ((OnCard(3), there, True), {}), ((OnCard(3), OnCard(3)), {}),
                          ((there,), {"device": "cuda"}), ((there,), {"device": "cuda", "non_blocking": True})):
        name = "_to_copy" if options else "copy_"
        assert deviceless.stood_in(watch, name, args, options) is None
    assert [why.split(",")[0] for why in watch.step.waits] == ["a copy from the CPU"]
    assert sum(watch.step.waits.values()) == 2


def test_operations_that_start_kernels():
    aten = torch.ops.aten
    assert deviceless.starts_kernel(aten.add.Tensor) and deviceless.starts_kernel(aten.add_.Tensor)
    for quiet in (aten.view.default, aten.t.default, aten.empty.memory_format, aten.detach.default):
        assert not deviceless.starts_kernel(quiet)


def test_numbers_are_stood_in_for():
    watch, x = Watch(H100, 4), torch.ones(8)
    assert deviceless.stood_in(watch, "_local_scalar_dense", (x,), {}) == 1.0
    assert deviceless.stood_in(watch, "_local_scalar_dense", (x.long(),), {}) == 0
    assert deviceless.stood_in(watch, "nonzero", (x > 0,), {}).shape == (2, 1)
    assert deviceless.stood_in(watch, "copy_", (x, x), {}) is x
    assert deviceless.stood_in(watch, "_to_copy", (x,), {"device": "cpu", "dtype": torch.int64}).sum() == 0
    assert deviceless.stood_in(watch, "add", (x, x), {}) is None


# --- report


@pytest.fixture
def report(tmp_path):
    """report.json of a run by hand, and its folder."""
    watch = Watch(H100, 8)
    graph = deviceless.new_graph("0 forward", "forward")
    graph.row |= {"phase": "forward", "compile, s": 1.5, "shared": 9000, "registers": 255, "stack": 104}
    graph.work.update(bytes=2e9, us=1000.0, triton=3, launches=7)
    watch.graphs.append(graph)
    watch.kernels["0 forward", "k"] = dict(kernel="k", graph="0 forward", shared=9000, registers=255, stack=104)
    watch.recompiled.append({"steps before": 1, "reason": "forward: guard"})
    watch.peaks |= {"model": 2 << 30, "forward": 100 << 30}
    watch.problems["k: too large"] += 2
    train_step(watch, sent=True)
    watch.enter()
    return write(watch, tmp_path / "one", ["in forward: RuntimeError: no"])


def write(watch, folder, errors):
    about = dict(script="train_gpt.py", flags="--preset gpu", world=8, torch="2.14.1", date="2026-11-26")
    found = json.loads(json.dumps(deviceless.result(watch, about, errors)))
    folder.mkdir()
    (folder / "report.json").write_text(json.dumps(found))
    return found, folder


def test_the_report_has_every_part(report):
    text = deviceless.report(report[0])
    for words in ("Compiles: **no**.", "Fits: **no**, 100.00 of 79.2 GiB", "| forward | 100.0 | 126% |",
                  "| backward | reduce_scatter | optimizer | 1 | 45.0 |",
                  "| 0 forward | forward | forward | 0 | 1.5 | 9000 | 255 | 104 | 7 | 3 | 2.0 | 0.0 | 1.0 |",
                  "| k | 0 forward | 9000 | 255 | 104 |", "| 1 | forward: guard |", "| k: too large | 2 |",
                  "in forward: RuntimeError: no", "| steps | graphs | of them in the last step |",
                  "| 1 | 1 | 1 | 100.0 |"):
        assert words in text, (words, text)


def test_every_line_with_a_time_says_estimate(report):
    text = deviceless.report(report[0])
    rows = text.split("## Roofline of a step\n\n")[1].split("\n\n")[0].splitlines()
    assert len(rows) == 5 and all("estimate" in row for row in rows if row[2] != "-")
    for heading in ("# train_gpt.py", "## Where a step", "## Collectives", "## Graphs"):
        tables = [part for part in text.split(heading)[1].split("\n\n") if part.startswith("| ")]
        assert "estimate" in tables[0].splitlines()[0]
    assert "Estimates with " in text and "6 µs of the host for a launch" in text


def test_reports_side_by_side(report):
    found = command("--compare", report[1], report[1])
    assert found.returncode == 0, found.stderr
    row = "| one | train_gpt.py | NVIDIA H100 80GB HBM3 | 1 | 1 | 1 | 100.0 | 45 | 3 |"
    assert found.stdout.count(row) == 2 and "estimate" in found.stdout


def test_a_report_without_a_step_says_so(tmp_path):
    found, folder = write(Watch(H100, 1), tmp_path / "none", ["in model: ValueError: no"])
    text = deviceless.report(found)
    assert "Compiles: **no**." in text and "in model: ValueError: no" in text
    assert "| none | train_gpt.py | NVIDIA H100 80GB HBM3 | 0 | 0 | 0 |" in command("--compare", folder).stdout


# --- command line


def test_help_needs_no_cuda_build():
    assert "No GPU is needed" in command("--help").stdout


@pytest.mark.parametrize("flags, words", [
    (["--card", "v100"], "--card v100: must be one of h100, h200"),
    (["--script", "nothing.py"], "--script nothing.py: no such file"),
    (["--world", 0], "--world 0 must be at least 1"),
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
    found = command("--configs", "none", "--out", tmp_path, "--", *flags.split())
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    r = json.loads((tmp_path / "report.json").read_text())
    assert not r["errors"] and r["summary"]["steps"] >= 2 and r["summary"]["of them in the last step"] == 0
    assert r["summary"]["graphs"] >= 3 and not r["tables"]["Problems"] and not r["tables"]["The host waits, in a step"]
    rows = r["tables"]["Roofline of a step"]
    assert [row[""].split(",")[0] for row in rows] == ["forward", "backward", "optimizer"]
    assert all(row["GFLOP"] > 0 for row in rows) and {"backward"} < {row["peak in"] for row in r["tables"]["Memory"]}
    assert "# train_gpt.py --preset gpu" in (tmp_path / "report.md").read_text()


PUBLIC = """import os, torch
assert os.environ["RANK"] == "0" and os.environ["WORLD_SIZE"] == "2"
torch.distributed.init_process_group("nccl")
model = torch.nn.Linear(64, 64, bias=False)
model.weight.label = "mine"
model = model.cuda()
assert model.weight.label == "mine"

class Optimizer:
    def step(self):
        torch.distributed.all_reduce(model.weight.grad)
        model.weight.data.add_(model.weight.grad, alpha=-0.1)

forward = torch.compile(lambda x: model(x).square().mean())
for i in range(9):
    x = torch.randn(32, 64, device="cuda")[[0, 1, 2, 3] * 4]
    loss = forward(x) * torch.tensor(0.5, device="cuda")
    loss.backward()
    Optimizer().step()
    print(f"step {i} {loss:.3f}")
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="needs a CUDA build of torch (no GPU)")
def test_a_script_of_others_runs_to_its_last_step(tmp_path):
    (tmp_path / "train.py").write_text(PUBLIC)
    found = command("--script", tmp_path / "train.py", "--world", 2, "--steps", 3, "--out", tmp_path)
    assert found.returncode == 0 and "step 1" in found.stdout, found.stdout[-3000:] + found.stderr[-3000:]
    r = json.loads((tmp_path / "report.json").read_text())
    assert not r["errors"] and r["summary"]["steps"] == 3 and r["summary"]["graphs"] == 2
    (sent,) = r["tables"]["Collectives of a step"]
    assert (sent["kind"], sent["begins in"], sent["MB"]) == ("all_reduce", "optimizer", 0.02)
    rows = r["tables"]["The host waits, in a step"]
    whys = [row["why"].split(",")[0] for row in rows]
    assert whys == ["a number is read", "a copy from the CPU"] and all("train.py" in row["why"] for row in rows)


def test_the_tool_stays_short():
    assert len((ROOT / "bench/deviceless.py").read_text(encoding="utf-8").splitlines()) <= 600
