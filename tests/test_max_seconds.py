"""--max-seconds: the schedule ends with the training clock, whatever a step takes. The clock is a test's own."""
import json

import baseline
import helpers
import pytest
import torch
from clocked import clock
from helpers import assert_same_state, flags, losses, make_data, records, run_folder, steps_saved, tiny
from moe import MIXTURE
from recipe import run_flags, run_processes

import generate
import train_baseline
import train_gpt
import train_moe

PARTS = dict(cooldown=0.5, tail=0.5, tail_steps=2, save_last=True)
SMALL = dict(num_layers=2, width=32, head_dim=16, seq_len=32, batch_tokens=128, micro_tokens=128, iterations=8,
             eval_every=0, eval_tokens=300, warmup_steps=0, log_every=1, threads=1, device="cpu", dtype="fp32",
             compile=False)
FLAGS = {"train_gpt": {**PARTS, "eval_every": 0}, "train_moe": {**PARTS, **MIXTURE, "eval_every": 0}}


def train(module, tmp_path, ms, experiment: str, **changes):
    """The folder of a run whose steps take so many ms: a number, or a function of the step."""
    if module is train_baseline and not (tmp_path / "data").exists():
        make_data(tmp_path / "data")
    own = FLAGS.get(module.__name__, {})
    argv = tiny(tmp_path, **own, experiment_name=experiment, **changes)
    if module is train_baseline:
        argv = train_gpt.dashed(baseline_flags(tmp_path, experiment_name=experiment, **changes))
    with clock(module, ms if callable(ms) else lambda step, rank: ms):
        assert module.main(argv) == 0
    return run_folder(tmp_path, experiment)


def baseline_flags(tmp_path, **changes) -> list[str]:
    return flags(**{"data": tmp_path / "data", "log_dir": tmp_path / "logs", **SMALL, **changes})


def state(module, folder, step: int) -> dict[str, torch.Tensor]:
    return (baseline if module is train_baseline else helpers).load_state(folder, step)


def logged(folder) -> list[dict]:
    return [r for r in records(folder) if "train_loss" in r]


SCRIPTS = pytest.mark.parametrize("module", [train_gpt, train_moe, train_baseline], ids=lambda m: m.__name__)


@SCRIPTS
@pytest.mark.parametrize("ms, seconds, steps", [(25, 1.0, 40), (500, 2.25, 4), (125, 1.0, 8), (4000, 1.0, 2)])
def test_a_run_fills_its_time_and_ends_cooled_down(module, ms, seconds, steps, tmp_path):
    """A step more than fit at most, as the next one is under way when the clock is read."""
    folder = train(module, tmp_path, ms, "x", max_seconds=seconds)
    end, lines = records(folder)[-1], logged(folder)
    assert (end["status"], end["step"], end["iterations"], len(lines)) == ("done", steps, steps, steps)
    rates = [r["lr"] for r in lines]
    assert rates == sorted(rates, reverse=True) or module is train_baseline
    plain = logged(train(module, tmp_path, ms, "plain"))
    floor = plain[-1]["lr"]  # of the last of 8 steps: later ones are lower
    assert rates[0] == plain[0]["lr"] and (rates[-1] < floor + 1e-9 if steps >= 8 else rates[-1] < 0.7 or steps == 2)
    assert steps_saved(folder) == [steps]
    schedule = json.loads((folder / "checkpoints" / f"step_{steps:06d}" / "meta.json").read_text())["schedule"]
    assert schedule == {"at": 8, "left": 0, "tokens": 128 * steps} and end["tokens_per_s"] == pytest.approx(128e3 / ms)
    assert f"step:{steps}/{steps} val_loss" in (folder / "log.txt").read_text()


@SCRIPTS
def test_time_for_as_many_steps_as_the_schedule_has_changes_no_bit(module, tmp_path):
    plain = train(module, tmp_path, 125, "plain")
    timed = train(module, tmp_path, 125, "timed", max_seconds=1)
    assert losses(plain) == losses(timed)
    assert_same_state(state(module, plain, 8), state(module, timed, 8))


@SCRIPTS
def test_a_resumed_run_goes_on_as_if_it_had_not_been_interrupted(module, tmp_path):
    whole = train(module, tmp_path, 40, "whole", max_seconds=1, save_every=1, keep=99)
    assert steps_saved(whole)[-1] == 25
    (tmp_path / "logs" / "part").mkdir()
    whole.rename(tmp_path / "logs" / "part" / whole.name)
    part = run_folder(tmp_path, "part")
    before = state(module, part, 25)
    again = train(module, tmp_path, 40, "part", max_seconds=1, resume=part / "checkpoints" / "step_000011")
    assert again == part and len(logged(part)) == 25 + 14
    losses(part)  # asserts that both times are equal
    assert_same_state(state(module, part, 25), before)


def test_a_run_that_counted_steps_goes_on_by_the_clock_and_back(tmp_path):
    folder = train(train_gpt, tmp_path, 100, "x", save_every=4, keep=9)
    middle = folder / "checkpoints" / "step_000004"
    train(train_gpt, tmp_path, 100, "x", resume=middle, max_seconds=1.4, save_every=6, keep=9)
    assert records(folder)[-1]["step"] == 14  # 400 ms are over: 10 more
    train(train_gpt, tmp_path, 100, "x", resume=folder / "checkpoints" / "step_000012", keep=9)
    assert 13 <= records(folder)[-1]["step"] <= 14


def test_a_run_whose_time_is_over_is_not_resumed(tmp_path, capsys):
    folder = train(train_gpt, tmp_path, 50, "x", max_seconds=1)
    assert len(logged(folder)) == 20
    train(train_gpt, tmp_path, 50, "x", max_seconds=9, resume=folder)
    assert "this run has ended, after step 20" in capsys.readouterr().out and len(logged(folder)) == 20


@pytest.mark.parametrize("late", [5, 60, 90])
def test_steps_that_become_slower_or_faster_leave_the_end_in_time(late, tmp_path):
    def ms(step, rank):
        return 20 if step < 20 else late
    folder = train(train_gpt, tmp_path, ms, "x", max_seconds=1, log_every=5)
    end = records(folder)[-1]
    assert 1000 - late <= end["train_time_ms"] <= 1000 + late
    assert logged(folder)[-1]["lr"] < 0.3  # 0.1 at the end


def test_the_clock_is_read_at_least_64_times(tmp_path):
    folder = train(train_gpt, tmp_path, 10, "x", max_seconds=1, log_every=1000)
    assert 30 < len(logged(folder)) <= 64 and records(folder)[-1]["step"] == 100


def test_stages_follow_the_clock(tmp_path):
    """Batch and loader change at the same step; tokens are those that were trained on."""
    change = dict(stage_ends=(0.5, 1.0), batch_tokens=(64, 128), window=(16, 32))
    folder = train(train_gpt, tmp_path, 50, "x", max_seconds=1, **change)
    lines = logged(folder)
    sizes = [r["batch_tokens"] for r in lines]
    assert len(sizes) == 20 and sizes == sorted(sizes) and 9 <= sizes.count(64) <= 11
    assert [r["tokens"] for r in lines] == [sum(sizes[:i + 1]) for i in range(20)]
    assert lines[-1]["window"] > lines[0]["window"]


def test_ranks_follow_the_first_ones_clock(tmp_path):
    """The second rank's takes twice as long a step; one process with the first one's clock has the same losses. The
    loop of train_moe.py, which calls the same."""
    make_data(tmp_path / "data")
    found = {}
    for size in (1, 2):
        argv = run_flags(tmp_path / "data", tmp_path / "logs", experiment_name=f"n{size}", max_seconds=1, **MIXTURE)
        run_processes(size, ["train_moe", "50", *argv], script="clocked")
        folder = run_folder(tmp_path, f"n{size}")
        found[size] = losses(folder)["train_loss"], [r["lr"] for r in logged(folder)]
    assert found[1][1] == found[2][1] and len(found[1][1]) == 20
    for step, loss in found[1][0].items():
        assert found[2][0][step] == pytest.approx(loss, rel=1e-3)


def test_the_tail_average_spans_its_share_of_the_schedule(tmp_path):
    """Twice as many steps, each half as long in the schedule: half the share each."""
    s = train_gpt.Settings(iterations=100, tail=0.5, tail_steps=10)
    bank = train_gpt.Bank.__new__(train_gpt.Bank)
    bank.s, bank.state, bank.rule = s, {"average": torch.zeros(1)}, train_gpt.parameter_table(s)[0]
    assert bank.tail_share(78, 79) == 0 and bank.tail_share(79, 80) == 1 and bank.tail_share(80, 81) == 0.1
    assert bank.tail_share(79.5, 79.9) == 0 and bank.tail_share(79.9, 80.4) == 1
    assert bank.tail_share(80.4, 80.9) == pytest.approx(0.05) and bank.tail_share(80.5, 99) == 1


def test_samples_have_the_window_of_the_place_in_the_schedule(tmp_path):
    folder = train(train_gpt, tmp_path, 50, "x", max_seconds=1, save_every=4, keep=9)
    path = folder / "checkpoints" / "step_000008"
    meta = json.loads((path / "meta.json").read_text())
    assert 3.5 < meta["schedule"]["at"] < 4
    _, window = generate.load_model(train_gpt, path, meta, 32)
    s = generate.read_settings(train_gpt, meta["settings"])
    assert window == train_gpt.window_at(s, train_gpt.stage_table(s), meta["schedule"]["at"]) == 24
