"""Command line of train_baseline.py: names of llm.c and nanoGPT, what each flag changes, what is refused, presets,
schedules."""
import dataclasses
import inspect
import itertools
import math
import re

import pytest
import torch
from baseline import CPU, H100, OWN, TINY, TYPES, flags_of, given, parse, settings
from helpers import flags

import train_baseline as tb
import train_gpt
from train_baseline import GPT, Settings, UserError

FIELDS = {field.name: field for field in dataclasses.fields(Settings)}
# setting -> the other one in the bracket of its comment, and the values with which it is read
READ_WITH = {name: (found[1], found[2].split("|")) for name, text in tb.help_texts().items()
             if (found := re.search(r"with (\w+) ([\w|]+)\]$", text))}
PAIRS = [("--max_steps 7", "--iterations 7"), ("--total_batch_size 64", "--batch_tokens 64"),
         ("--T 16", "--seq_len 16"), ("--max-steps 7", "--iterations 7"),
         ("--total-batch-size 64", "--batch-tokens 64"), ("--warmup_steps 3", "--warmup-steps 3"),
         ("--max_lr 0.5", "--max-lr 0.5"), ("--min_lr 0.005", "--min-lr 0.005"),
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
        --max_lr 6e-4 --min_lr 6e-5 --total_batch_size 524288 --T 1024""".split(), monkeypatch=monkeypatch)
    assert (s.iterations, s.warmup_steps, s.max_lr, s.min_lr) == (19073, 715, 6e-4, 6e-5)
    assert (s.batch_tokens, s.seq_len, s.eval_seq_len) == (524288, 1024, 1024)


def test_help_lists_every_flag_and_looks_at_no_device(monkeypatch, capsys):
    monkeypatch.delattr(tb, "find_device")
    with pytest.raises(SystemExit) as caught:
        tb.main(["--help"])
    assert caught.value.code == 0
    said = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert said >= {f"--{name}" for name in FIELDS} | {f"--{name.replace('_', '-')}" for name in FIELDS}
    assert said >= {"--max_steps", "--total_batch_size", "--T", "--no-shuffle"}


def test_every_setting_that_trains_is_checked_on_resume():
    """Those before `preset`; READ_WITH has found all brackets with a condition."""
    names = list(FIELDS)
    checked = set(names[:names.index("preset")])
    assert not checked & {"device", "dtype", "backend", "compile", "threads", "micro_tokens", "log_every", "data"}
    assert checked >= {"model_type", "optimizer", "seed", "iterations", "max_lr", "weight_decay", "schedule", "mlp"}
    assert READ_WITH.keys() == {name for name in FIELDS if any(part.startswith("with ") for part in tb.bracket(name))}
    assert len(READ_WITH) > 15


# --- refused


@pytest.mark.parametrize("name", READ_WITH)
def test_a_flag_that_nothing_would_read_is_refused(name, monkeypatch):
    """And accepted where it is read."""
    other, values = READ_WITH[name]
    choices = tb.help_texts()[other].rpartition("[")[2].rstrip("]").split("|")
    assert set(values) < set(choices)
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
    ("--num-kv-heads 2", ["--num_kv_heads", "--model_type moderngpt or moegpt"]),
    ("--model-type ngpt --num-kv-heads 2", ["--num_kv_heads", "--model_type moderngpt or moegpt"]),
    ("--mlp swiglu", ["--mlp swiglu", "gpt has no gated MLP", "gelu"]),
    ("--model-type ngpt --mlp relu2", ["--mlp relu2", "ngpt has a gated MLP", "swiglu"]),
    ("--eval-seq-len 64", ["--eval_seq_len 64", "gpt has positions", "--max_doc_len 32"]),
    ("--model-type moegpt --top-k 9 --num-experts 8", ["--top_k 9", "--num_experts 8"]),
    ("--model-type moegpt --dense-first 2", ["--dense_first 2", "--num_layers 2"]),
    ("--model-type moegpt --balance -1", ["--balance -1.0", ">=0"]),
    ("--min-lr 0.02", ["--min_lr 0.02", "--max_lr 0.01"]),
    ("--beta2 1", ["--beta2", "below 1"]),
    ("--warmup-steps 8", ["--warmup_steps 8", "--iterations 8"]),
    ("--batch-tokens 100", ["--batch_tokens 100", "multiple of --seq_len 32"]),
    ("--batch-tokens 16", ["--batch_tokens 16", "multiple of --seq_len 32"]),
    ("--micro-tokens 31", ["--micro_tokens 31", "--seq_len 32"]),
    ("--model-type bert", ["--model_type bert", "gpt or moderngpt or ngpt or moegpt"]),
    ("--optimizer sgd", ["--optimizer sgd", "adamw or muon"]),
    ("--schedule step", ["--schedule step", "cosine or wsd"]),
    ("--seed -1", ["--seed -1", ">=0"]),
    ("--seed 9223372036854775808", ["--seed", "below 9223372036854775808"]),
    ("--device cuda", ["--device cuda", "needs a CUDA device"]),
    ("--experiment-name a/b", ["--experiment_name 'a/b'", "letters"]),
    ("--grad-clip -1", ["--grad_clip -1.0", ">=0"]),
    ("--weight-decay nan", ["--weight_decay nan"]),
    ("--preset gpt3", ["--preset gpt3", "auto or cpu or gpu or gpt2"]),
])
def test_wrong_flags_are_refused_in_one_sentence_each(argv, words, monkeypatch):
    parts = argv.split()
    names = {part.strip("-").replace("-", "_") for part in parts[::2]}
    (said,) = problems(*tiny_without(*names), *parts, monkeypatch=monkeypatch)
    assert all(word in said for word in words)


def test_ranks_that_cannot_share_the_rows_are_told_which_can(monkeypatch):
    (said,) = problems(*tiny_without(), world_size=3, monkeypatch=monkeypatch)
    assert "3 processes cannot share the 4 rows" in said and "use 1, 2, 4 processes" in said


def test_all_that_is_wrong_is_said_at_once_and_without_a_traceback(tmp_path, capsys):
    argv = [*tiny_without("max_lr", "width"), "--max-lr", "-1", "--num-experts", "4", "--width", "0", "--muon-lr", "1",
            "--rope-base", "5", "--cooldown", "0.2", "--mlp", "silu", "--log-dir", str(tmp_path / "logs")]
    assert tb.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: 7 setting(s) cannot work:") and "Traceback" not in said
    for flag in ("--max_lr", "--num_experts", "--width", "--muon_lr", "--rope_base", "--cooldown", "--mlp"):
        assert f"\n  {flag}" in said
    assert not (tmp_path / "logs").exists()


def test_an_unknown_flag_gets_the_one_that_was_meant(capsys):
    for wrong, meant in (("--num-kv-head", "--num-kv-heads"), ("--max_step", "--max_steps"), ("--T1", "--T")):
        assert tb.main([*tiny_without(), wrong, "1"]) == 2
        said = capsys.readouterr().err
        assert f"{wrong}: unknown, did you mean {meant}?" in said and said.count("\n") == 2


def test_a_value_of_another_type_is_refused_in_a_line(capsys):
    with pytest.raises(SystemExit) as caught:
        tb.main(["--width", "wide"])
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "--width: invalid int value: 'wide'" in said and said.count("\n") == 2


def test_a_machine_without_a_compiler_or_gpu_says_so(monkeypatch):
    monkeypatch.setattr(tb.shutil, "which", lambda name: None)
    assert problems("--preset", "gpu", "--device", "auto", monkeypatch=monkeypatch) == [
        "--preset gpu needs a CUDA device: use cpu, or add --device cpu",
        "--compile True needs a C++ compiler: install g++, or use --no-compile"]


# --- what flags change


def shown(s: Settings) -> dict:
    """What a model and its optimizers show of the settings."""
    model = GPT(s, 64)
    block, last = model.blocks[0], model.blocks[-1]
    mixture = last.mlp if s.mixture_layers else None
    optimizers, names = tb.make_optimizers(model, s), {id(p): name for name, p in model.named_parameters()}
    rates, momenta = [], []
    for step in range(8):
        tb.set_rates(optimizers, s, step)
        rates.append(round(tb.rate_scale(s, step), 6))
        momenta.append(optimizers[0].param_groups[0].get("momentum"))
    tb.set_rates(optimizers, dataclasses.replace(s, warmup_steps=0), 0)
    groups = {names[id(p)]: (type(optimizer).__name__, group) for optimizer in optimizers
              for group in optimizer.param_groups for p in group["params"]}
    (kind, hidden), (_, table) = groups["blocks.0.attn.q.weight"], groups["embed.weight"]
    return {
        "layers": len(model.blocks), "heads": block.attn.q.out_features // block.attn.head_dim,
        "kv rows": block.attn.k.out_features, "hidden": getattr(block.mlp, "up", block.attn.q).out_features,
        "gate": getattr(block.mlp, "gate", None) is not None, "head": model.lm_head.weight is not model.embed.weight,
        "gains": sum("norm.weight" in name for name in groups),
        "qk_norm": block.attn.qk_norm, "turn": round(model.cos[1, 0, -1].item(), 6),
        "table": None if model.positions is None else len(model.positions.weight), "window": model.window,
        "experts": mixture and len(mixture.experts), "choices": mixture and mixture.top_k,
        "expert": mixture and mixture.experts[0].up.out_features, "mixtures": len(s.mixture_layers),
        "shared": mixture and (0 if mixture.shared is None else mixture.shared.up.out_features), "q": kind,
        "rate": hidden["lr"], "table rate": table["lr"], "betas": table["betas"], "eps": table["eps"],
        "decay": table["weight_decay"], "q decay": hidden["weight_decay"], "rates": rates, "momenta": momenta,
        "first weight": model.embed.weight[0, 0].item(),
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
    ("--optimizer muon", "gpt", "q", "AdamW", "Muon"),
    ("--max-lr 0.5", "gpt", "rate", 0.01, 0.5), ("--max-lr 0.5", "gpt muon", "table rate", 0.01, 0.5),
    ("--muon-lr 0.5", "gpt muon", "rate", 0.02, 0.5), ("--beta1 0.5", "gpt", "betas", (0.9, 0.95), (0.5, 0.95)),
    ("--beta2 0.5", "gpt", "betas", (0.9, 0.95), (0.9, 0.5)), ("--adam-eps 1e-3", "gpt", "eps", 1e-8, 1e-3),
    ("--weight-decay 0.5", "moegpt", "decay", 0.1, 0.5),
    ("--muon-weight-decay 0.5", "moderngpt muon", "q decay", 0.0, 0.5),
    ("--seed 5", "gpt", "first weight", None, None),
    ("--warmup-steps 4", "gpt", "rates", None, None), ("--schedule wsd", "gpt", "rates", None, None),
    ("--min-lr 0.005", "gpt", "rates", None, None), ("--cooldown 0.9", "gpt wsd", "rates", None, None),
    ("--iterations 12", "gpt", "rates", None, None), ("--momentum-warmup 2", "gpt muon", "momenta", None, None),
    ("--momentum-start 0.5", "gpt muon", "momenta", None, None),
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
    """Those of the balance loss, the clipping and the batch are tested where they act."""
    names = list(FIELDS)
    wanted = {*names[names.index("model_type") + 1:names.index("preset")]} - {"balance", "batch_tokens", "grad_clip"}
    assert {row[0].split()[0].removeprefix("--no-").strip("-").replace("-", "_")
            for row in CHANGES} == wanted | {"seed"}


def test_ngpt_needs_neither_decay_nor_warm_up(monkeypatch):
    """The published recipe; a warm-up that is asked for is made."""
    base = tiny_without("warmup_steps", model_type="ngpt")
    s = parse(*base, monkeypatch=monkeypatch)
    assert s.warmup_steps == 0 and parse(*base, "--warmup-steps", 3, monkeypatch=monkeypatch).warmup_steps == 3
    (adamw,) = tb.make_optimizers(GPT(s, 64), s)
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.0}


def test_vectors_do_not_decay_and_matrices_and_tables_do():
    """nanoGPT's groups; experts and routers are matrices."""
    for model_type, optimizer in itertools.product(("gpt", "moderngpt", "moegpt"), ("adamw", "muon")):
        more = dict(muon_weight_decay=0.1) if optimizer == "muon" else {}
        s = settings(model_type, optimizer=optimizer, **more)
        for group in (group for o in tb.make_optimizers(GPT(s, 64), s) for group in o.param_groups):
            assert all(group["weight_decay"] == (0.1 if p.dim() > 1 else 0.0) for p in group["params"])


# --- schedules


def test_cosine_is_nanogpts():
    """Linear warm-up, the peak in the first step after it, half of the way in the middle, and nearly min_lr at the end.
    """
    s = settings(iterations=110, warmup_steps=10, max_lr=1.0, min_lr=0.1)
    rate = [tb.rate_scale(s, step) for step in range(110)]
    assert rate[:10] == pytest.approx([(step + 1) / 11 for step in range(10)])
    assert rate[10] == 1.0 and rate[60] == pytest.approx(0.55)
    assert rate[85] == pytest.approx(0.1 + 0.9 * (1 + math.cos(0.75 * math.pi)) / 2)
    assert 0.1 < rate[109] < 0.1003 and all(a > b for a, b in itertools.pairwise(rate[10:]))


def test_wsd_is_constant_then_linear():
    s = settings(iterations=100, warmup_steps=10, max_lr=2.0, min_lr=0.5, schedule="wsd", cooldown=0.2)
    rate = [tb.rate_scale(s, step) for step in range(100)]
    assert rate[9] == pytest.approx(10 / 11) and set(rate[10:81]) == {1.0}
    assert rate[90] == pytest.approx(0.25 + 0.75 / 2) and rate[99] == pytest.approx(0.25 + 0.75 / 20)
    flat = settings(iterations=100, warmup_steps=0, min_lr=0.001, schedule="wsd", cooldown=0)
    assert {tb.rate_scale(flat, step) for step in range(100)} == {1.0}


def test_the_decay_of_a_step_is_rate_times_decay():
    """Weights without a gradient shrink by it alone; Muon's by the rate without the factor of the shape."""
    s = settings("moderngpt", optimizer="muon", weight_decay=0.5, muon_weight_decay=0.25, warmup_steps=3)
    model = GPT(s, 64)
    optimizers, before = tb.make_optimizers(model, s), [model.lm_head.weight, model.blocks[0].mlp.up.weight]
    before = [w.detach().clone() for w in before]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    tb.set_rates(optimizers, s, 1)
    for optimizer in optimizers:
        optimizer.step()
    torch.testing.assert_close(model.lm_head.weight.detach(), before[0] * (1 - 0.01 * 0.5 * 0.5))
    torch.testing.assert_close(model.blocks[0].mlp.up.weight.detach(), before[1] * (1 - 0.02 * 0.5 * 0.25))


def test_momentum_warms_up():
    s = settings("gpt", optimizer="muon", momentum_warmup=4, momentum_start=0.5, muon_momentum=0.9)
    optimizers, found = tb.make_optimizers(GPT(s, 64), s), []
    for step in range(8):
        tb.set_rates(optimizers, s, step)
        found.append(optimizers[0].param_groups[0]["momentum"])
    assert found == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9])


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
    assert (s.preset, s.data) == (preset, data) and s.backend == "sdpa"
    assert "auto" not in dataclasses.asdict(s).values()
    assert s.tied == ("on" if model_type == "gpt" else "off")
    assert s.batch_tokens % (s.seq_len * world_size) == 0


def test_gpt2s_preset_is_nanogpts_recipe(monkeypatch):
    s = parse("--preset", "gpt2", hardware=H100, world_size=8, monkeypatch=monkeypatch)
    assert (s.num_layers, s.width, s.head_dim, s.mlp, s.mlp_ratio, s.seq_len) == (12, 768, 64, "gelu", 4.0, 1024)
    assert (s.max_lr, s.beta1, s.beta2, s.weight_decay, s.grad_clip) == (6e-4, 0.9, 0.95, 0.1, 1.0)
    assert s.min_lr == pytest.approx(6e-5)
    assert (s.batch_tokens, s.iterations, s.warmup_steps) == (524288, 19073, 715)


@pytest.mark.parametrize("dtype, backend", [("auto", "plain"), ("fp32", "sdpa")])
def test_a_cpu_that_is_fast_in_bf16_has_the_formula(dtype, backend, monkeypatch):
    s = parse("--dtype", dtype, hardware=CPU | {"bf16": True}, monkeypatch=monkeypatch)
    assert (s.dtype, s.backend) == ("bf16" if dtype == "auto" else "fp32", backend)


# --- shared with train_gpt.py


def test_settings_of_the_same_name_have_the_same_type():
    others = {field.name: field for field in dataclasses.fields(train_gpt.Settings)}
    shared = FIELDS.keys() & others.keys() - set(train_gpt.staged_settings())
    differing = {name for name in shared if FIELDS[name].type != others[name].type}
    assert differing <= {"mlp_ratio"} and len(shared) > 30  # of a gated MLP it is no whole number


def test_nothing_happens_at_import_and_main_is_guarded():
    last = inspect.getsource(tb).rstrip().split('if __name__ == "__main__":\n')[-1].splitlines()
    assert [line.strip().split("  #")[0] for line in last] == ["gc.freeze()", "gc.enable()", "sys.exit(main())"]
    assert OWN["moegpt"].keys() <= FIELDS.keys() and TINY.keys() <= FIELDS.keys()
