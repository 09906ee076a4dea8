"""Names of flags that other programs use, --num_tokens, and a head size that fits the widths that were given."""
import pytest
from baseline import parse as parse_baseline
from helpers import CPU, H100, parse

import train_baseline
import train_gpt
import train_moe
from train_gpt import UserError


def settings(module, *argv: str, hardware=CPU, monkeypatch):
    monkeypatch.setattr(module, "detect_hardware", lambda device="auto": hardware)
    return module.parse_settings([*argv], 1)[0]


@pytest.mark.parametrize("flag, name, value", [
    ("--max_iters", "iterations", 7), ("--max_steps", "iterations", 7), ("--max-steps", "iterations", 7),
    ("--eval_interval", "eval_every", 7), ("--dataset", "data", "mine"), ("--T", "seq_len", 128),
    ("--total_batch_size", "batch_tokens", 8192)])
@pytest.mark.parametrize("module", [train_gpt, train_moe, train_baseline], ids=lambda module: module.__name__)
def test_other_names_set_the_same(module, flag, name, value, monkeypatch):
    more = ["--warmup_steps", "1"] if module is train_baseline else []
    if module is train_baseline:
        s = parse_baseline(flag, value, *more, monkeypatch=monkeypatch)
    else:
        s = settings(module, flag, str(value), monkeypatch=monkeypatch)
    assert getattr(s, name) in (value, (value,))


def test_the_flags_of_a_mixture(monkeypatch):
    """The last is the number of routed experts of a token; sub-experts are a factor on the experts, as there."""
    argv = "--n_experts 4 --m_sub_experts 2 --n_shared_experts 1 --n_activated_experts 3".split()
    s = settings(train_moe, *argv, monkeypatch=monkeypatch)
    assert (s.num_experts, s.num_shared, s.top_k) == (8, 1, 3)
    s = settings(train_moe, "--preset", "deepseek-cpu", "--m_sub_experts", "2", monkeypatch=monkeypatch)
    assert s.num_experts == 2 * train_moe.PRESETS["deepseek-cpu"]["num_experts"]
    s = parse_baseline("--model-type", "moegpt", "--n_experts", "4", "--n_activated_experts", "3",
                       monkeypatch=monkeypatch)
    assert (s.num_experts, s.top_k) == (4, 3)


def test_a_dense_model_has_no_flags_of_experts(capsys):
    for flag in ("--n_experts", "--m_sub_experts"):
        with pytest.raises(SystemExit):
            train_gpt.parse_settings([flag, "2"], 1)
        assert f"--{flag[2:].replace('_', '-')} (" in capsys.readouterr().err


@pytest.mark.parametrize("tokens, steps", [("4096", 1), ("4097", 2), ("1e6", 245), ("40960000", 10000)])
def test_num_tokens_gives_the_steps(tokens, steps, monkeypatch):
    assert parse("--num_tokens", tokens, monkeypatch=monkeypatch).iterations == steps
    flags = "--num_tokens", tokens, "--warmup-steps", "0"
    assert parse_baseline(*flags, monkeypatch=monkeypatch).iterations == steps


def test_num_tokens_of_stages_is_reached(monkeypatch):
    s = parse("--preset", "speedrun", "--num_tokens", "1e8", hardware=H100, monkeypatch=monkeypatch)
    stages = train_gpt.stage_table(s)
    total = sum((stage.end - stage.start) * stage.batch_tokens for stage in stages)
    assert total == pytest.approx(1e8, rel=0.01)
    with pytest.raises(UserError, match="--iterations 0: must be >0"):
        parse("--num_tokens", "0", monkeypatch=monkeypatch)


@pytest.mark.parametrize("module", [train_gpt, train_moe, train_baseline], ids=lambda module: module.__name__)
def test_two_lengths_of_training_are_told(module):
    for name in ("--iterations", "--max_iters"):
        with pytest.raises(module.UserError, match="--num_tokens, --iterations: give one"):
            module.parse_settings(["--num_tokens", "1e6", name, "5"], 1)


@pytest.mark.parametrize("argv, told", [
    (["--stage-ends", "nan"], "--stage_ends"), (["--stage-ends", "0.5,inf"], "--stage_ends"),
    (["--batch-tokens", "1" + "0" * 400], "--batch_tokens"), (["--num-tokens", "1" + "0" * 400], "--iterations")])
def test_num_tokens_with_what_cannot_be_counted_is_a_sentence(argv, told):
    with pytest.raises(UserError, match=told):
        train_gpt.parse_settings(["--preset", "cpu", "--num-tokens", "1e6", *argv], 1)


# --- a head size


def test_mup_chooses_a_head_size_that_divides_both_widths(monkeypatch, capsys):
    argv = "--mup --width 1024 --base-width 768 --micro-tokens 2048".split()
    s = parse(*argv, monkeypatch=monkeypatch)  # the preset's is 48
    assert s.head_dim == s.base_head_dim and s.width % s.head_dim == 0 == s.base_width % s.head_dim == s.head_dim % 4
    assert s.head_dim == 64
    notes = train_gpt.parse_settings(argv, 1)[2]
    assert "head_dim 64: a divisor of 256" in notes
    s = parse(*argv[:-2], "--micro-tokens", "4096", hardware=H100, monkeypatch=monkeypatch)
    assert s.head_dim == 128  # that of the preset divides both


def test_without_mup_the_nearest_that_divides_the_width(monkeypatch):
    assert parse("--width", "256", monkeypatch=monkeypatch).head_dim == 64
    assert parse("--width", "384", monkeypatch=monkeypatch).head_dim == 48
    assert parse(monkeypatch=monkeypatch).head_dim == 48


def test_what_the_user_gave_stays(monkeypatch):
    with pytest.raises(UserError, match="--width 256 must be a multiple of --head_dim 48"):
        parse("--width", "256", "--head-dim", "48", monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="--base_width 768 must be a multiple of --base_head_dim 100"):
        parse(*"--mup --width 1024 --base-width 768 --base-head-dim 100".split(), monkeypatch=monkeypatch)
    with pytest.raises(UserError, match="--width 102 must be a multiple of --head_dim 48"):
        parse("--width", "102", monkeypatch=monkeypatch)  # nothing fits
    with pytest.raises(UserError, match="--width 100 must be a multiple of --head_dim 48"):
        parse("--width", "100", monkeypatch=monkeypatch)  # 20 and 100 are not near 48
