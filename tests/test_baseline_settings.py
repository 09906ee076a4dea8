"""Command line of train_baseline.py: names of llm.c and nanoGPT, what each flag changes, what is refused, presets,
schedules."""
import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch
from baseline import OWN, TINY, TYPES, flags_of, given, parse, settings
from helpers import CPU, H100, flags

import train_baseline as tb
import train_gpt
from train_baseline import GPT, READ_WITH, MuonAdamW, Settings, UserError, World

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
PAIRS = [("--max_steps 7", "--iterations 7"), ("--total_batch_size 64", "--batch_tokens 64"),
         ("--T 16", "--seq_len 16"), ("--max-steps 7", "--iterations 7"),
         ("--total-batch-size 64", "--batch-tokens 64"), ("--B 2 --T 16", "--micro-tokens 32 --seq-len 16"),
         ("--T 16 --B 2", "--micro_tokens 32 --seq_len 16"), ("--warmup_steps 3", "--warmup-steps 3"),
         ("--max_lr 0.5", "--max-lr 0.5"), ("--min_lr 0.005", "--min-lr 0.005"), ("--no_shuffle", "--no-shuffle"),
         ("--weight_decay 2", "--weight-decay 2")]


def problems(*argv, hardware=CPU, world_size: int = 1, monkeypatch) -> list[str]:
    """The sentences about what is wrong with a command line."""
    with pytest.raises(UserError) as caught:
        parse(*argv, hardware=hardware, world_size=world_size, monkeypatch=monkeypatch)
    head, *lines = str(caught.value).split("\n  ")
    assert head == f"{len(lines)} setting(s) cannot work:"
    return lines


def tiny_without(*names: str, **changes) -> list[str]:
    """Flags of the tiny model but for these."""
    return flags(**{name: value for name, value in given(**changes).items() if name not in names})


# --- names


@pytest.mark.parametrize("one, other", PAIRS)
def test_two_names_are_one_setting(one, other, monkeypatch):
    names = [word.strip("-").replace("-", "_") for word in other.split() if word.startswith("--")]
    first, second = (parse(*tiny_without(*names), *argv.split(), monkeypatch=monkeypatch) for argv in (one, other))
    assert first == second != parse(*tiny_without(), monkeypatch=monkeypatch)


def test_nanogpts_recipe_by_llm_cs_names(monkeypatch):
    s = parse("--device", "cpu", "--dtype", "fp32", "--no-compile", *"""--max_steps 19073 --warmup_steps 715
        --max_lr 6e-4 --min_lr 6e-5 --total_batch_size 524288 --B 64 --T 1024""".split(), monkeypatch=monkeypatch)
    assert (s.iterations, s.warmup_steps, s.max_lr, s.min_lr) == (19073, 715, 6e-4, 6e-5)
    assert (s.batch_tokens, s.seq_len, s.micro_tokens, s.eval_seq_len) == (524288, 1024, 65536, 1024)
    assert tb.stage_table(s)[0].micro_rows(s, 1) == 64 and tb.stage_table(s)[0].micro_rows(s, 8) == 64


@pytest.mark.parametrize("rows, world_size, expected", [(3, 1, 2), (4, 1, 4), (4, 2, 2), (1, 1, 1), (99, 1, 4)])
def test_rows_of_a_forward_pass_divide_a_processs_share(rows, world_size, expected, monkeypatch):
    s = parse(*tiny_without("micro_tokens"), "--B", rows, world_size=world_size, monkeypatch=monkeypatch)
    assert tb.stage_table(s)[0].micro_rows(s, world_size) == expected


def test_help_lists_every_flag_and_looks_at_no_device(monkeypatch, capsys):
    monkeypatch.delattr(tb, "detect_hardware")
    with pytest.raises(SystemExit) as caught:
        tb.main(["--help"])
    assert caught.value.code == 0
    said = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert said >= {f"--{name}" for name in FIELDS} | {f"--{name.replace('_', '-')}" for name in FIELDS}
    assert said >= {"--max_steps", "--total_batch_size", "--T", "--B", "--no-shuffle"}


def test_every_setting_that_trains_is_checked_on_resume():
    assert tb.RESUME_MAY_CHANGE <= FIELDS.keys() and READ_WITH.keys() <= FIELDS.keys()
    free = {"preset", "device", "dtype", "backend", "compile", "threads", "micro_tokens", "moe_impl", "log_every"}
    assert free <= tb.RESUME_MAY_CHANGE
    shapes = {"model_type", "optimizer", "seed", "iterations", "max_lr", "weight_decay", "balance", "schedule", "mlp"}
    assert not shapes & tb.RESUME_MAY_CHANGE


# --- refused


@pytest.mark.parametrize("name", READ_WITH)
def test_a_flag_that_nothing_would_read_is_refused(name, monkeypatch):
    """And accepted where it is read."""
    other, values = READ_WITH[name]
    choices = tb.help_texts()[other].rpartition("[")[2].rstrip("]").split("|")
    value = flags_of(name)
    for choice in choices:
        argv = [*tiny_without(other, name), f"--{other}", choice, *value]
        if choice in values:
            parse(*argv, monkeypatch=monkeypatch)
        else:
            (said,) = problems(*argv, monkeypatch=monkeypatch)
            assert said.startswith(f"--{name}: has no effect without --{other} {values[0]}")


@pytest.mark.parametrize("argv, words", [
    ("--width 30", ["--width 30", "multiple of --head_dim 8"]),
    ("--head-dim 6 --width 36", ["--head_dim 6", "4"]),
    ("--model-type moderngpt --num-kv-heads 3", ["--num_kv_heads 3", "divide", "4 heads"]),
    ("--model-type moderngpt --num-kv-heads 8", ["--num_kv_heads 8", "divide", "4 heads"]),
    ("--model-type moderngpt --num-kv-heads -1", ["--num_kv_heads -1", ">=0"]),
    ("--num-kv-heads 2", ["--num_kv_heads", "gpt", "moderngpt"]),
    ("--model-type ngpt --num-kv-heads 2", ["--num_kv_heads", "ngpt", "moderngpt"]),
    ("--mlp swiglu", ["--mlp swiglu", "gpt has no gated MLP", "gelu"]),
    ("--model-type ngpt --mlp relu2", ["--mlp relu2", "ngpt has a gated MLP", "swiglu"]),
    ("--eval-seq-len 64", ["--eval_seq_len 64", "32 tokens"]),
    ("--model-type moegpt --top-k 9 --num-experts 8", ["--top_k 9", "8 experts"]),
    ("--model-type moegpt --dense-first 2", ["--dense_first 2", "2 layers"]),
    ("--model-type moegpt --balance -1", ["--balance -1.0", ">=0"]),
    ("--min-lr 0.02", ["--min_lr 0.02", "--max_lr 0.01"]),
    ("--beta2 1", ["--beta2", "below 1"]),
    ("--warmup-steps 8", ["--warmup_steps 8", "--iterations 8"]),
    ("--batch-tokens 100", ["--batch_tokens 100", "multiple of --seq_len 32"]),
    ("--batch-tokens 16", ["--batch_tokens 16", "multiple of --seq_len 32"]),
    ("--micro-tokens 31", ["--micro_tokens 31", "--seq_len 32"]),
    ("--B 4", ["--B", "--micro_tokens"]),
    ("--model-type bert", ["--model_type bert", "gpt or moderngpt or ngpt or moegpt"]),
    ("--optimizer sgd", ["--optimizer sgd", "adamw or muon"]),
    ("--schedule step", ["--schedule step", "cosine or wsd"]),
    ("--decay-schedule off", ["--decay_schedule off", "constant or rate or linear"]),
    ("--model-type moegpt --moe-impl grouped", ["--moe_impl grouped", "CUDA", "bmm or loop"]),
    ("--grad-clip -1", ["--grad_clip -1.0", ">=0"]),
    ("--weight-decay nan", ["--weight_decay nan"]),
    ("--preset gpt3", ["--preset gpt3", "auto or cpu or gpu or gpt2"]),
])
def test_wrong_flags_are_refused_in_one_sentence_each(argv, words, monkeypatch):
    parts = argv.split()
    names = {part.strip("-").replace("-", "_") for part in parts[::2]} - {"B"}
    (said,) = problems(*tiny_without(*names), *parts, monkeypatch=monkeypatch)
    assert all(word in said for word in words)


@pytest.mark.parametrize("rows", [0, -2])
def test_a_batch_of_no_rows_is_refused(rows, monkeypatch):
    assert problems(*tiny_without("micro_tokens"), "--B", rows, monkeypatch=monkeypatch) == [f"--B {rows}: must be >0"]


def test_ranks_that_cannot_share_the_rows_are_told_which_can(monkeypatch):
    (said,) = problems(*tiny_without(), world_size=3, monkeypatch=monkeypatch)
    assert "3 processes cannot share the 4 rows" in said and "use 1, 2, 4 processes" in said


def test_all_that_is_wrong_is_said_at_once_and_without_a_traceback(tmp_path, capsys):
    argv = [*tiny_without("max_lr", "width"), "--max-lr", "-1", "--num-experts", "4", "--width", "0", "--muon-lr", "1",
            "--rope-base", "5", "--cooldown", "0.2", "--mlp", "silu", "--log-dir", str(tmp_path / "logs")]
    assert tb.main(argv) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: 7 setting(s) cannot work:") and "Traceback" not in said
    for flag in ("--max_lr", "--num_experts", "--width", "--muon_lr", "--rope_base", "--cooldown", "--mlp"):
        assert f"\n  {flag}" in said
    assert not (tmp_path / "logs").exists()


def test_an_unknown_flag_gets_the_one_that_was_meant(capsys):
    for wrong, meant in (("--num-kv-head", "--num-kv-heads"), ("--max_step", "--max_steps"), ("--T1", "--T")):
        with pytest.raises(SystemExit) as caught:
            tb.main([wrong, "1"])
        said = capsys.readouterr().err
        assert caught.value.code == 2 and f"did you mean {meant}?" in said and said.count("\n") == 1


# --- what flags change


def shown(s: Settings) -> dict:
    """What a model and its optimizer show of the settings."""
    model = GPT(s, 64)
    block, last = model.blocks[0], model.blocks[-1]
    mixture = last.mlp if s.mixture_layers else None
    optimizer = MuonAdamW(model, s, World())
    rules = {name: bank.rule for bank in optimizer.banks for name in bank.params}
    rates = {name: round(bank.lr.max().item(), 6) for bank in optimizer.banks for name in bank.params}
    return {
        "layers": len(model.blocks), "heads": block.attn.num_heads, "kv rows": block.attn.kv.size(1),
        "hidden": block.mlp.up.size(0) if hasattr(block.mlp, "up") else None,
        "gate": getattr(block.mlp, "gate", None) is not None,
        "head": model.lm_head is not None, "gains": sum("gain" in name for name in rules),
        "qk_norm": block.attn.qk_norm, "turn": round(model.cos[1, 0, -1].item(), 6),
        "table": None if model.positions is None else len(model.positions.weight), "window": tb.window_at(s, [], 0),
        "experts": mixture and len(mixture.experts_up), "choices": mixture and mixture.top_k,
        "expert": mixture and mixture.experts_up.size(2), "mixtures": len(s.mixture_layers),
        "shared": mixture and (0 if mixture.shared is None else mixture.shared.up.size(0)),
        "impl": mixture and mixture.impl, "q": rules["blocks.0.attn.q"].kind, "rate": rates["blocks.0.attn.q"],
        "table rate": rates["embed.weight"], "betas": rules["embed.weight"].betas, "eps": rules["embed.weight"].eps,
        "decay": rules["embed.weight"].weight_decay, "q decay": rules["blocks.0.attn.q"].weight_decay,
        "clip": optimizer.limit, "variance": rules["blocks.0.attn.q"].betas[1],
        "rates": [round(tb.lr_scale(s, [], step), 6) for step in range(8)],
        "decays": [round(tb.decay_scale(s, step, 0.5), 6) for step in range(8)],
        "momenta": [round(tb.momentum_at(s, step), 6) for step in range(8)],
        "first weight": model.embed.weight[0, 0].item(), "method": s.orthogonalizer,
    }


CHANGES = [  # flag, flags beside it, what it changes, from, to
    ("--num-layers 3", "", "layers", 2, 3), ("--head-dim 16", "", "heads", 4, 2), ("--width 64", "", "heads", 4, 8),
    ("--num-kv-heads 1", "moderngpt", "kv rows", 32, 8), ("--mlp relu2", "moderngpt", "gate", True, False),
    ("--mlp-ratio 4", "gpt", "hidden", 64, 128), ("--mlp-ratio 4.5", "moderngpt", "hidden", 64, 96),
    ("--tied off", "gpt", "head", False, True), ("--tied on", "moderngpt", "head", True, False),
    ("--no-norm-gain", "moderngpt", "gains", 5, 0), ("--qk-norm", "moegpt", "qk_norm", False, True),
    ("--rope-base 10", "ngpt", "turn", 0.9999995, 0.98423), ("--window 9", "gpt", "window", 32, 9),
    ("--seq-len 16", "gpt", "table", 32, 16), ("--max-doc-len 8", "gpt", "table", 32, 8),
    ("--num-experts 6", "moegpt", "experts", 4, 6), ("--top-k 3", "moegpt", "choices", 2, 3),
    ("--num-shared 2", "moegpt", "shared", 16, 32), ("--num-shared 0", "moegpt", "shared", 16, 0),
    ("--expert-hidden 48", "moegpt", "expert", 16, 48), ("--dense-first 0", "moegpt", "mixtures", 1, 2),
    ("--moe-impl bmm", "moegpt", "impl", "loop", "bmm"), ("--optimizer muon", "gpt", "q", "adamw", "muon"),
    ("--max-lr 0.5", "gpt", "rate", 0.01, 0.5), ("--max-lr 0.5", "gpt muon", "table rate", 0.01, 0.5),
    ("--muon-lr 0.5", "gpt muon", "rate", 0.02, 0.5), ("--beta1 0.5", "gpt", "betas", (0.9, 0.95), (0.5, 0.95)),
    ("--beta2 0.5", "gpt", "betas", (0.9, 0.95), (0.9, 0.5)), ("--adam-eps 1e-3", "gpt", "eps", 1e-8, 1e-3),
    ("--weight-decay 0.5", "moegpt", "decay", 0.1, 0.5), ("--grad-clip 0.3", "gpt", "clip", 1.0, 0.3),
    ("--muon-weight-decay 0.5", "moderngpt muon", "q decay", 0.0, 0.5),
    ("--muon-beta2 0.9", "gpt muon", "variance", 0, 0.9), ("--seed 5", "gpt", "first weight", None, None),
    ("--orthogonalizer polar_express", "gpt muon", "method", "newton_schulz", "polar_express"),
    ("--warmup-steps 4", "gpt", "rates", None, None), ("--schedule wsd", "gpt", "rates", None, None),
    ("--min-lr 0.005", "gpt", "rates", None, None), ("--cooldown 0.9", "gpt wsd", "rates", None, None),
    ("--decay-schedule rate", "gpt", "decays", [1.0] * 8, [0.5] * 8),
    ("--iterations 12", "gpt", "rates", None, None), ("--momentum-warmup 2", "gpt muon", "momenta", None, None),
    ("--momentum-start 0.5", "gpt muon", "momenta", None, None),
    ("--momentum-cooldown 3", "gpt muon", "momenta", None, None),
    ("--muon-momentum 0.9", "gpt muon", "momenta", None, None),
]


@pytest.mark.parametrize("flag, beside, name, before, after", CHANGES, ids=[row[0] for row in CHANGES])
def test_flag_changes_what_it_says(flag, beside, name, before, after, monkeypatch):
    words, field = beside.split() or ["gpt"], flag.split()[0].removeprefix("--no-").strip("-").replace("-", "_")
    more = dict(optimizer="muon") if "muon" in words else dict(schedule="wsd") if "wsd" in words else {}
    base = given(words[0], **more)
    without = shown(parse(*flags(**base), monkeypatch=monkeypatch))[name]
    base.pop(field, None)
    found = shown(parse(*flags(**base), *flag.split(), monkeypatch=monkeypatch))[name]
    assert without != found
    for value, expected in ((without, before), (found, after)):
        assert expected is None or value == pytest.approx(expected, abs=1e-6 if isinstance(expected, float) else None)


def test_every_flag_of_model_and_optimizer_is_in_the_table():
    """Those of the balance loss and of the batch are tested where they act."""
    names = list(FIELDS)
    wanted = {*names[names.index("model_type") + 1:names.index("eval_every")]} - {"balance", "batch_tokens"}
    assert {row[0].split()[0].removeprefix("--no-").strip("-").replace("-", "_")
            for row in CHANGES} == wanted | {"seed", "moe_impl"}


def test_ngpt_needs_neither_decay_nor_warm_up(monkeypatch):
    """The published recipe; a warm-up that is asked for is made."""
    base = tiny_without("warmup_steps", model_type="ngpt")
    s = parse(*base, monkeypatch=monkeypatch)
    assert s.warmup_steps == 0 and parse(*base, "--warmup-steps", 3, monkeypatch=monkeypatch).warmup_steps == 3
    assert {rule.weight_decay for rule in GPT(s, 64).rules.values()} == {0.0}


def test_vectors_do_not_decay_and_matrices_and_tables_do():
    """nanoGPT's groups; experts and routers are matrices."""
    for model_type, optimizer in itertools.product(("gpt", "moderngpt", "moegpt"), ("adamw", "muon")):
        more = dict(muon_weight_decay=0.1) if optimizer == "muon" else {}
        model = GPT(settings(model_type, optimizer=optimizer, **more), 64)
        for name, p in model.named_parameters():
            assert model.rules[name].weight_decay == (0.1 if p.dim() > 1 else 0.0), name


# --- schedules


def test_cosine_is_nanogpts():
    """Linear warm-up, the peak in the first step after it, half of the way in the middle, and nearly min_lr at the end.
    """
    s = settings(iterations=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    rate = [tb.lr_scale(s, [], step) for step in range(110)]
    assert rate[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rate[10] == 1.0 and rate[60] == pytest.approx(0.55)
    assert rate[85] == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert 0.1 < rate[109] < 0.1003 and all(a > b for a, b in itertools.pairwise(rate[10:]))


def test_wsd_is_constant_then_linear():
    s = settings(iterations=100, warmup_steps=10, max_lr=2.0, min_lr=0.5, schedule="wsd", cooldown=0.2)
    rate = [tb.lr_scale(s, [], step) for step in range(100)]
    assert rate[9] == pytest.approx(10 / 11) and set(rate[10:81]) == {1.0}
    assert rate[90] == pytest.approx(0.25 + 0.75 / 2) and rate[99] == pytest.approx(0.25 + 0.75 / 20)
    flat = settings(iterations=100, warmup_steps=0, min_lr=0.001, schedule="wsd", cooldown=0)
    assert {tb.lr_scale(flat, [], step) for step in range(100)} == {1.0}


def test_decay_schedules():
    for name, expected in (("constant", [1, 1, 1]), ("rate", [0.3, 0.3, 0.3]), ("linear", [1, 0.5, 0.125])):
        s = settings(decay_schedule=name)
        assert [tb.decay_scale(s, step, 0.3) for step in (0, 4, 7)] == pytest.approx(expected)


def test_the_decay_of_a_step_is_rate_times_decay_times_schedule():
    """Weights without a gradient shrink by it alone."""
    for name, factor in (("constant", 1.0), ("rate", 0.25), ("linear", 0.5)):
        s = settings("moderngpt", weight_decay=0.5, decay_schedule=name, grad_clip=0.0)
        model = GPT(s, 64)
        optimizer, before = MuonAdamW(model, s, World()), model.lm_head.detach().clone()
        sum((p * 0).sum() for p in model.parameters()).backward()
        optimizer.step(0.25, 0.9, tb.decay_scale(s, 4, 0.25))
        torch.testing.assert_close(model.lm_head.detach(), before * (1 - 0.01 * 0.25 * 0.5 * factor))


def test_momentum_warms_up_and_cools_down():
    s = settings(optimizer="muon", momentum_warmup=4, momentum_cooldown=2, momentum_start=0.5, muon_momentum=0.9)
    assert [tb.momentum_at(s, step) for step in range(8)] == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.7])


# --- presets


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("hardware, world_size, fineweb, preset, data", [
    (CPU, 1, True, "cpu", "stdlib"), (H100, 1, False, "gpu", "stdlib"), (H100, 1, True, "gpu", "fineweb10B"),
    (H100, 8, True, "gpt2", "fineweb10B"), (H100, 8, False, "gpu", "stdlib")])
def test_presets_resolve_everywhere(model_type, optimizer, hardware, world_size, fineweb, preset, data, monkeypatch,
                                    tmp_path):
    (tmp_path / "fineweb10B").mkdir()
    place = {"fineweb10B": tmp_path / "fineweb10B" if fineweb else tmp_path / "none"}
    monkeypatch.setattr(tb, "data_folder", lambda name: place.get(name, tmp_path / name))
    s = parse("--model-type", model_type, "--optimizer", optimizer, hardware=hardware, world_size=world_size,
              monkeypatch=monkeypatch)
    assert (s.preset, s.data) == (preset, data) and (s.backend == "flex") == (hardware is H100)
    assert "auto" not in dataclasses.asdict(s).values()
    assert s.tied == ("on" if model_type == "gpt" else "off")
    stage = tb.stage_table(s)[0]
    assert stage.batch_tokens % (stage.seq_len * world_size) == 0 and stage.micro_rows(s, world_size) >= 1


def test_gpt2s_preset_is_nanogpts_recipe(monkeypatch):
    s = parse("--preset", "gpt2", hardware=H100, world_size=8, monkeypatch=monkeypatch)
    assert (s.num_layers, s.width, s.head_dim, s.mlp, s.mlp_ratio, s.seq_len) == (12, 768, 64, "gelu", 4.0, 1024)
    assert (s.max_lr, s.beta1, s.beta2, s.weight_decay, s.grad_clip) == (6e-4, 0.9, 0.95, 0.1, 1.0)
    assert s.min_lr == pytest.approx(6e-5)
    assert (s.batch_tokens, s.iterations, s.warmup_steps) == (524288, 19073, 715)


def test_experts_are_multiplied_as_the_hardware_wants(monkeypatch):
    for capability, dtype, impl in (((9, 0), "bf16", "grouped"), ((8, 0), "bf16", "bmm"), ((9, 0), "fp32", "bmm")):
        gpu = tb.Hardware(*H100)._replace(capability=capability)
        s = parse("--model-type", "moegpt", "--dtype", dtype, hardware=gpu, monkeypatch=monkeypatch)
        assert s.moe_impl == impl
    assert parse("--model-type", "moegpt", monkeypatch=monkeypatch).moe_impl == "loop"


# --- shared with train_gpt.py


def test_settings_of_the_same_name_have_the_same_type():
    others = {field.name: field for field in dataclasses.fields(train_gpt.Settings)}
    shared = FIELDS.keys() & others.keys() - set(train_gpt.STAGED)
    differing = {name for name in shared if FIELDS[name].type != others[name].type}
    assert differing <= {"mlp_ratio"} and len(shared) > 40  # of a gated MLP it is no whole number


def test_nothing_happens_at_import_and_main_is_guarded():
    assert inspect.getsource(tb).rstrip().endswith('if __name__ == "__main__":\n    sys.exit(main())')
    assert OWN["moegpt"].keys() <= FIELDS.keys() and TINY.keys() <= FIELDS.keys()
