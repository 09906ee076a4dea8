"""What fits the memory: cards, expected memory, micro_tokens chosen, and halved where the warm-up lacks memory;
errors of the compiler in a sentence. No test needs a GPU: cards are properties that torch would report."""
import dataclasses
import json
import math
import types

import pytest
import torch
from helpers import H100, losses, records, run_folder, script, settings, tiny

import train_gpt as tg
import train_moe as tm

CARDS = {  # name, capability, bytes
    "t4": ("Tesla T4", (7, 5), 15_828_320_256), "4080": ("NVIDIA GeForce RTX 4080", (8, 9), 16_700_000_000),
    "3090": ("NVIDIA GeForce RTX 3090", (8, 6), 25_438_126_080),
    "a100": ("NVIDIA A100-SXM4-40GB", (8, 0), 42_405_855_232),
    "h100": ("NVIDIA H100 80GB HBM3", (9, 0), 85_017_624_576),
}


@pytest.fixture
def card(monkeypatch):
    """Makes torch report a card."""
    def choose(name: str):
        title, (major, minor), memory = CARDS[name]
        properties = types.SimpleNamespace(name=title, major=major, minor=minor, total_memory=memory)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: properties)
        for script_ in (tg, tm):  # GPT-2's, whatever data are here
            monkeypatch.setattr(script_, "vocabulary", lambda data: 50257)
    return choose


def notes_of(module, *argv: str, world_size: int = 1) -> tuple:
    s, hardware, notes = module.parse_settings(list(argv), world_size)
    return s, {note.split()[0]: note for note in notes}, hardware


# --- cards


@pytest.mark.parametrize("name, preset, backend, dtype, micro_tokens", [
    ("t4", "t4", "sdpa", "fp32", 2048), ("4080", "gpu", "flex", "bf16", 8192), ("3090", "gpu", "flex", "bf16", 16384),
    ("a100", "gpu", "flex", "bf16", 32768), ("h100", "gpu", "flex", "bf16", 32768),
])
def test_what_a_card_gets_and_why(name, preset, backend, dtype, micro_tokens, card):
    card(name)
    s, notes, hardware = notes_of(tg)
    assert (s.preset, s.backend, s.dtype, s.micro_tokens) == (preset, backend, dtype, micro_tokens)
    assert s.kernels == ("none" if name == "t4" else "gram+mlp+loss")
    assert "FlexAttention" in notes["backend"] if name == "t4" else "fastest" in notes["backend"]
    assert "compute capability" in notes["dtype"] and f"{hardware.name} has" in notes["micro_tokens"]


@pytest.mark.parametrize("preset", ["auto", "mixtral", "deepseek", "speed"])
@pytest.mark.parametrize("script_", [tg, tm], ids=["gpt", "moe"])
def test_size_gpu_is_for_one_card_of_16_gb(script_, preset, card):
    if script_ is tg and preset != "auto":
        pytest.skip("no mixtures")
    card("4080")
    s, notes, hardware = notes_of(script_, "--preset", preset)
    assert s.preset.endswith("gpu") and s.micro_tokens >= max(s.seq_len)
    assert script_.expected_memory(s, 50257, 1) / 2**30 <= hardware.room < hardware.memory_gib - 1


@pytest.mark.parametrize("name, preset, world_size", [
    ("4080", "one", 1), ("a100", "one", 1), ("3090", "speedrun", 8), ("3090", "medium", 8),
])
def test_what_does_not_fit_is_told_with_what_would(name, preset, world_size, card):
    card(name)
    with pytest.raises(tg.UserError, match="GiB are expected, NVIDIA .* has .*: use --micro_tokens auto") as caught:
        tg.parse_settings(["--preset", preset], world_size)
    way = str(caught.value).split(": use ")[1].split()
    assert way[0::2] == ["--micro_tokens", "--seq_len", "--ngram_rows"]
    s, hardware, _ = tg.parse_settings(["--preset", preset, *way], world_size)
    assert tg.expected_memory(s, 50257, world_size) / 2**30 <= hardware.room


def test_micro_tokens_that_are_too_many_are_told(card):
    card("4080")
    with pytest.raises(tg.UserError, match="use --micro_tokens auto --seq_len 4096 --ngram_rows 1048576$"):
        tg.parse_settings(["--preset", "gpu", "--micro-tokens", "65536"], 1)


@pytest.mark.parametrize("name, world_size, preset", [("3090", 8, "gpu"), ("a100", 8, "speedrun"), ("a100", 4, "gpu")])
def test_speedrun_is_chosen_where_it_fits(name, world_size, preset, card, monkeypatch, tmp_path):
    (tmp_path / "fineweb10B").mkdir()
    monkeypatch.setattr(tg, "data_folder", lambda data: tmp_path / data)
    card(name)
    s, _, (why, *_) = tg.parse_settings([], world_size)
    assert s.preset == preset
    need = tg.expected_memory(dataclasses.replace(s, **tg.PRESETS["speedrun"], micro_tokens=49152), 50257, 8) / 2**30
    assert preset == "speedrun" or f"8 with {need:.0f} GiB free" in why


def test_both_scripts_have_the_presets_of_one():
    assert all(tm.PRESETS[name] == preset for name, preset in tg.PRESETS.items())


# --- expected memory


def test_weights_and_states_are_counted_exactly():
    """All but a pass: what the model and the optimizer hold, of one process or a share of it."""
    s = settings(tail=0.5, num_layers=4, attention="LLLL", window=16)
    model = tg.GPT(s, 1000)
    optimizer = tg.MuonAdamW(model, s, tg.World())
    held = [p.data for p in model.parameters()] + [t for b in optimizer.banks for t in (b.grad, *b.state.values())]
    rest = tg.activation_bytes(s, 128, 32) + 12 * 1000 * 128 + 12 * 128
    assert tg.expected_memory(s, 1000, 1) - rest == pytest.approx(sum(4 * t.numel() for t in held), rel=0.01)


def test_it_falls_with_processes_and_rows_and_rises_with_sums():
    def need(world_size: int = 1, **changes) -> float:
        return tg.expected_memory(settings(batch_tokens=1024, micro_tokens=128, **changes), 1000, world_size)
    assert need(4) < need(2) < need(1) > need(1, seq_len=16, eval_seq_len=16, ngram_rows=0) - 1
    whole = tg.expected_memory(settings(batch_tokens=256, micro_tokens=128), 1000, 2)
    parameters = sum(p.numel() for p in tg.GPT(settings(), 1000).parameters())
    assert need(2) - whole == pytest.approx(4 * parameters + 12 * 384), "sums of micro-steps"
    assert need(1, ngram_rows=4096) - need() == pytest.approx(4096 * (4 * 32 + 8) + 4 * 1.4 * 1024 * 32)


GPU = "--preset gpu --seq-len 8192 --micro-tokens 8192"
ONE_STAGE = "--preset speedrun --stage-ends 1 --stage-lr 1 --mtp 0"
DEEPSEEK = "--preset deepseek-gpu --seq-len 8192 --micro-tokens 8192 --tail 0.5 --ngram-rows 1048576"
SHORT = f"{ONE_STAGE} --batch-tokens 131072 --seq-len 16384 --micro-tokens 16384 --max-doc-len 896 --window 384"
PEAKS = [  # GiB; H200: by the allocator (records/2026-11-26_gpu_h200), else on a fake device, without new n-gram rows
    ("gpu", tg, GPU, 1, "h100", 11.10), ("gpu by block", tg, "--preset gpu --micro-tokens 8192", 1, "h100", 10.83),
    ("mixtral", tm, GPU, 1, "h100", 15.24), ("deepseek", tm, DEEPSEEK, 1, "h100", 19.65),
    ("speedrun, last stage", tg, f"{SHORT} --candidates 0", 8, "h100", 12.43),
    ("speedrun, first stage", tg, f"{SHORT} --candidates 10240", 8, "h100", 9.90),
    ("speedrun, third stage, H200", tg,
     f"{ONE_STAGE} --batch-tokens 49152 --seq-len 49152 --max-doc-len 3072 --window 1408"
     " --candidates 14336 --ngram-rows 2643840 --micro-tokens 49152", 1, "h100", 27290 / 1024),
]


@pytest.mark.parametrize("name, module, flags, world_size, where, peak", PEAKS, ids=[row[0] for row in PEAKS])
def test_it_is_right_within_5_percent(name, module, flags, world_size, where, peak, card):
    card(where)
    s, *_ = module.parse_settings(flags.split(), world_size)
    came = 0.0 if "H200" in name else 1.4 * s.ngram_every * s.batch_tokens[0] / world_size
    found = module.expected_memory(s, 50257, world_size) - 4 * s.width * min(s.ngram_rows / world_size, came)
    assert found / 2**30 == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("script_", [tg, tm], ids=["gpt", "moe"])
def test_sums_of_micro_steps_lie_where_the_last_one_wants_them(script_):
    """One process: no memory of their own, and the same bits as with it."""
    from ranks import build, random_batch
    from ranks import settings as small
    s = small() if script_ is tg else tm.Settings(**dataclasses.asdict(small()), num_experts=0, moe_layers="DDD")
    grads = []
    for inside in (True, False):
        model, optimizer = build(s, tg.World(), script=script_)
        for bank in optimizer.banks:
            bank.places = bank.places if inside else {}
        parts = random_batch(0).chunk(3, dim=1)
        for i, (inputs, targets, docs) in enumerate(parts):
            optimizer.last_micro_step = i == 2
            more = (None,) if script_ is tm else ()
            model(inputs, targets[None], docs, torch.tensor(8, dtype=torch.int32), *more)[0].backward()
            starts = {bank.grad.untyped_storage().data_ptr() for bank in optimizer.banks}
            own = [x for x in optimizer.sums.values() if x.untyped_storage().data_ptr() not in starts]
            assert bool(own) == (not inside and i < 2)
        grads.append([bank.grad.clone() for bank in optimizer.banks])
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))


# --- micro_tokens


@pytest.mark.parametrize("changes, sizes", [
    (dict(micro_tokens=0), [32768, 16384, 8192, 4096]), (dict(micro_tokens=10000), [10000, 8192, 4096]),
    (dict(micro_tokens=4096), [4096]), (dict(micro_tokens=0, seq_len=65536, batch_tokens=65536), [65536]),
])
def test_sizes_to_try(changes, sizes):
    s = settings(**{**dict(seq_len=4096, batch_tokens=32768), **changes})
    assert tg.micro_sizes(s) == sizes


@pytest.mark.parametrize("word", ["auto", "0"])
def test_auto_is_zero_and_means_all_that_fits(word, card):
    card("h100")
    s, notes, _ = notes_of(tg, "--preset", "speedrun", "--micro-tokens", word, world_size=8)
    assert s.micro_tokens == 49152 and notes["micro_tokens"].startswith("micro_tokens 49152: ")


def fewer_rows(monkeypatch, most: int, error=None):
    """A machine whose memory holds `most` rows, and which compiles nothing."""
    def forward(self, inputs, *args, forward=tg.GPT.forward):
        if len(inputs) > most:
            raise error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return forward(self, inputs, *args)
    monkeypatch.setattr(tg.GPT, "forward", forward)
    monkeypatch.setattr(tg, "compiled", lambda function, s: function)
    monkeypatch.setattr(tg.shutil, "which", lambda name: name)


def test_the_warm_up_halves_what_does_not_fit(tmp_path, monkeypatch, capsys):
    asked = tiny(tmp_path, micro_tokens=32, experiment_name="asked", compile=True)
    with monkeypatch.context() as patch:
        fewer_rows(patch, 4)
        assert tg.main(asked) == 0
    with monkeypatch.context() as patch:
        fewer_rows(patch, 1)
        assert tg.main(tiny(tmp_path, micro_tokens=128, compile=True)) == 0
    out, folder = capsys.readouterr().out, run_folder(tmp_path)
    assert "micro_tokens 64 from here on: out of memory" in out and "micro_tokens 32 from here on" in out
    assert "micro_tokens 32 from here on" in (folder / "log.txt").read_text()
    assert [r["micro_tokens"] for r in records(folder) if r.get("event") == "micro_tokens"] == [64, 32]
    assert losses(folder) == losses(run_folder(tmp_path, "asked")), "as if it had been asked for"
    meta = json.loads((folder / "checkpoints" / "step_000008" / "meta.json").read_text())
    assert meta["settings"]["micro_tokens"] == 32


def test_a_row_that_does_not_fit_is_one_sentence(tmp_path, monkeypatch, capsys):
    fewer_rows(monkeypatch, 0)
    assert tg.main(tiny(tmp_path, compile=True)) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: out of memory: use a smaller --micro-tokens") and told.count("\n") == 1


RANKS = """
import os, sys, torch, train_gpt as tg
from torch._inductor.exc import InductorError
tg.compiled = lambda function, s: function
forward, calls = tg.GPT.forward, []
def limited(self, inputs, *args):
    if torch.distributed.get_rank() == 1 and len(inputs) > {most}:
        raise {error}
    return forward(self, inputs, *args)
tg.GPT.forward = limited
sys.exit(tg.main({argv!r} + ["--micro-tokens", {sizes!r}[int(os.environ["RANK"])]]))
"""


@pytest.mark.parametrize("error, most, code, sizes", [
    ("torch.OutOfMemoryError('CUDA out of memory')", 1, 0, ("128", "128")),
    ("InductorError(RuntimeError('no tile fits'), None)", 0, 1, ("128", "128")), ("0", 9, 0, ("128", "32")),
], ids=["memory", "compiler", "other cards"])
def test_processes_agree_where_one_of_them_fails(error, most, code, sizes, tmp_path):
    """Only the second one lacks memory, cannot compile, or chose less; n-grams and reductions are collectives."""
    argv = tiny(tmp_path, compile=True, ngram_rows=64, batch_tokens=256, eval_every=0, iterations=2)
    (tmp_path / "ranks.py").write_text(RANKS.format(error=error, most=most, argv=argv, sizes=sizes))
    done = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  tmp_path / "ranks.py", timeout=240)
    assert bool(done.returncode) == bool(code), done.stdout + done.stderr
    folder = run_folder(tmp_path)
    if code:
        assert "error: torch.compile or Triton failed; --backend sdpa" in done.stderr and "no tile fits" in done.stderr
    else:
        told = [r["micro_tokens"] for r in records(folder) if r.get("event") == "micro_tokens"]
        assert told == ([64, 32] if most == 1 else [])
        tg.main(tiny(tmp_path, experiment_name="one", ngram_rows=64, batch_tokens=256, eval_every=0, iterations=2))
        expected = losses(run_folder(tmp_path, "one"))["train_loss"]
        assert losses(folder)["train_loss"] == pytest.approx(expected, abs=1e-4)


# --- the compiler's errors


def errors() -> list:
    from torch._dynamo.exc import BackendCompilerFailed
    from torch._inductor.exc import InductorError
    full = RuntimeError("No valid triton configs. OutOfResources: out of resource: triton_tem_fused_0\nRequired: 81920")
    failed = BackendCompilerFailed(torch.compile, full, None)
    return [InductorError(full, None), failed, RuntimeError("Triton Error [CUDA]: x")]


@pytest.mark.parametrize("number", range(3))
def test_errors_of_the_compiler_are_one_sentence(number, tmp_path, monkeypatch, capsys):
    fewer_rows(monkeypatch, 0, errors()[number])
    assert tg.main(tiny(tmp_path, compile=True)) == 1
    out, told = capsys.readouterr()
    assert told.startswith("error: torch.compile or Triton failed; --backend sdpa, --kernels none or --no-compile")
    assert told.count("\n") == 1 and ("triton_tem_fused_0 Required: 81920" in told or number == 2)
    log = run_folder(tmp_path) / "log.txt"
    assert f"the whole error: {log}" in out and "Traceback" in log.read_text() and "in rehearse" in log.read_text()


def test_other_errors_of_the_warm_up_keep_their_traceback(tmp_path, monkeypatch):
    fewer_rows(monkeypatch, 0, AssertionError("an invariant"))
    with pytest.raises(AssertionError, match="an invariant"):
        tg.main(tiny(tmp_path, compile=True))


# --- one card instead of eight


def test_a_micro_step_of_one_is_the_share_of_one_of_eight(tmp_path):
    """Preset `one`: rows, their order and their candidates; the gradient is the sum of both."""
    from helpers import make_data
    s = settings(data=str(make_data(tmp_path / "data")), batch_tokens=256, micro_tokens=32, candidates=128,
                 iterations=4)
    corpus, (stage,) = tg.open_corpus(s.data), tg.stage_table(s)
    one = tg.Loader(s, corpus, tg.World())
    eight = [tg.Loader(s, corpus, tg.World(rank, rank, 8)) for rank in range(8)]
    for step in range(s.iterations):
        batch, (shares, _) = one.next(step)[0], zip(*(loader.next(step) for loader in eight), strict=True)
        assert torch.equal(batch, torch.cat(shares)) and len(batch) == 8
        turns = [tg.candidate_turn(s, stage, tg.World(), step, i) for i in range(8)]
        assert turns == [tg.candidate_turn(s, stage, tg.World(r, r, 8), step, 0) for r in range(8)]
    for loader in (one, *eight):
        loader.close()


def test_one_is_speedrun_by_accumulation(card):
    card("h100")
    one, eight = (tg.parse_settings(["--preset", name], n)[0] for name, n in (("one", 1), ("speedrun", 8)))
    same = [f.name for f in dataclasses.fields(tg.Hyperparameters)]
    assert all(getattr(one, name) == getattr(eight, name) for name in same)
    for t in tg.stage_table(one):
        rows = t.micro_rows(one, 1)
        assert rows * t.seq_len <= 49152 and math.gcd(rows, 8) == rows and t.micro_rows(eight, 8) == 1
    assert H100.memory_gib > tg.expected_memory(one, 50257, 1) / 2**30
