"""Tests of the times of steps and of stages: means, their intervals, and the seconds saved in each stage."""

import math
import statistics
from types import SimpleNamespace

import pytest

from runlogs import judging, loading, parsing
from runlogs.reporting import plain, stage_report

BAR = "=" * 100 + "\n"


def rows_of(times, key="train_time_ms", **more):
    return [{"step": step, key: ms, **more} for step, ms in times]


def test_step_time_is_divided_by_the_gap():
    rows = rows_of([(0, 0.0), (25, 500.0), (50, 1250.0), (51, 1280.0), (51, 1290.0), (52, 10.0), (53, 35.0)])
    assert loading.step_times(rows) == [(25, 20.0), (50, 30.0), (51, 30.0), (53, 25.0)]
    assert loading.step_times(rows_of([(1, 5.0), (2, math.nan), (3, 9.0), (5, math.inf)])) == []


def test_gaps_add_up_to_the_time():
    """A clock that begins before the first record, is set back at step 11, and runs on after the last step."""
    rows = rows_of([(5, 900.0), (10, 1900.0), (11, 100.0), (20, 1000.0), (20, 1030.0)])
    assert loading.gaps_of(rows) == [(10, 11, 100.0), (11, 20, 900.0), (20, 20, 30.0)]
    assert loading.gaps_of(rows[:2]) == [(0, 5, 900.0), (5, 10, 1000.0)]
    assert loading.gaps_of(rows_of([(1, 100.0), (2, 90.0)])) == [(0, 1, 100.0), (1, 2, -10.0)]  # a jitter is no reset
    assert loading.gaps_of([{"step": 1}, *rows_of([(2, math.nan)])]) == []


def test_quarters():
    """Ten steps: the quarters end after step 3, 5, 8 and 10; a gap over an end is shared by its steps."""
    rows = rows_of([(0, 0.0), (2, 20.0), (4, 60.0), (10, 120.0), (10, 121.0)])
    found = loading.stage_times(rows, {})
    assert list(found) == ["quarters"]
    assert found["quarters"] == {"0-25 % of the steps": (40.0, 3), "25-50 % of the steps": (30.0, 2),
                                 "50-75 % of the steps": (30.0, 3), "75-100 % of the steps": (20.0, 2),
                                 "after the last step": (1.0, 0)}
    assert loading.stage_times([{"step": 3, "val_loss": 1.0}], {}) == {}


def test_stages_that_the_log_announces():
    rows = rows_of([(10, 100.0), (20, 300.0), (40, 500.0)])
    found = loading.stage_times(rows, {"stage_ends": "0, 15, 30, 36"})["logged"]
    assert found == {"stage 1": (200.0, 15), "stage 2": (200.0, 15), "stage 3": (100.0, 10)}
    found = loading.stage_times(rows, {"stage_ends": "(0, 20), (20, 40)"})["logged"]
    assert found == {"stage 1": (300.0, 20), "stage 2": (200.0, 20)}
    text = f"code\n{BAR}[schedule] stage ends=[0, 15, 30]\n{BAR}step:1/1 val_loss:3.0 train_time:9ms step_avg:9ms\n"
    assert parsing.parse_log(text).header["stage_ends"] == "0, 15, 30"
    text = f"code\n{BAR}machine\n{BAR}run seed=6 stage boundaries=[(0, 279), (279, 600)]\nstep:1/1 val_loss:3.0\n"
    assert parsing.parse_log(text).header["stage_ends"] == "(0, 279), (279, 600)"


def test_stages_by_batch():
    rows = rows_of([(2, 20.0), (4, 40.0)], batch_tokens=64, seq_len=32) + rows_of([(4, 40.0)])
    rows += rows_of([(6, 100.0), (8, 160.0)], batch_tokens=128)
    found = loading.stage_times(rows, {"stage_ends": "0, 1"})["logged"]
    assert found == {"64 tokens a step, seq_len 32": (40.0, 4), "128 tokens a step, seq_len None": (120.0, 4)}


def test_many_stages_are_few_rows():
    """A hostile log with a stage for each of 20,000 steps: in linear time, and no time is lost."""
    rows = [{"step": i, "train_time_ms": 2.0 * i, "batch_tokens": i} for i in range(1, 20_001)]
    found = loading.stage_times(rows, {})["logged"]
    assert len(found) == parsing.MAX_KEYS + 1 and found["other stages"][1] == 20_000 - parsing.MAX_KEYS
    assert sum(ms for ms, _ in found.values()) == pytest.approx(40_000)


def timed(runs):
    """Samples of runs that are given as stages {name: (ms, steps)}."""
    return [SimpleNamespace(stage_ms={"logged": run, "quarters": {"q": (sum(ms for ms, _ in run.values()), 1)}})
            for run in runs]


def whole_ms(step_ms, count=400):
    """Records of a run of a public script, which prints whole milliseconds."""
    return rows_of([(step, float(round(step * step_ms))) for step in range(count + 1)])


def test_mean_shows_what_the_median_of_whole_milliseconds_hides():
    times = {ms: loading.stage_times(whole_ms(ms), {}) for ms in (88.4, 87.7)}
    medians = [statistics.median(ms for _, ms in loading.step_times(whole_ms(ms))) for ms in times]
    assert medians == [88, 88]
    groups = [[SimpleNamespace(stage_ms=found)] for found in times.values()]
    means = [judging.step_numbers(judging.by_stage(group, "quarters"))["all"]["mean"] for group in groups]
    assert means == pytest.approx([88.4, 87.7])


def test_interval_of_the_mean_by_hand():
    """Of 2, 4, 6: sd 2, t_0.975 with two degrees of freedom 4.302653."""
    half = 4.302652729911275 * 2 / math.sqrt(3)
    found = judging.mean_interval([2, 4, 6])
    assert (found["n"], found["mean"]) == (3, 4)
    assert (found["ci_low"], found["ci_high"]) == pytest.approx((4 - half, 4 + half), rel=1e-9)
    assert judging.mean_interval([2]) == {"n": 1, "mean": 2, "ci_low": None, "ci_high": None}


def test_seconds_saved_by_stage_add_up():
    old = timed([{"x": (1000.0, 10), "y": (3000.0, 20)}, {"x": (1200.0, 10), "y": (3100.0, 20)}])
    new = timed([{"x": (900.0, 10), loading.AFTER: (50.0, 0)}, {"x": (1000.0, 10), "z": (500.0, 5)}])
    a, b = (judging.by_stage(samples, "logged") for samples in (old, new))
    assert list(b) == ["x", "z", loading.AFTER, "all"]
    found = {row.pop("stage"): row for row in judging.saved_by_stage(a, b)}
    assert list(found) == ["x", "y", "z", loading.AFTER, "all"]
    assert [found["x"][key] for key in ("a_s", "b_s", "difference")] == pytest.approx([1.1, 0.95, -0.15])
    assert found["y"]["difference"] == pytest.approx(-3.05) and found["z"]["difference"] == pytest.approx(0.25)
    assert found["all"]["difference"] == pytest.approx(sum(row["difference"] for row in [*found.values()][:-1]))
    assert found["all"]["difference"] == pytest.approx((0.95 + 1.5) / 2 - (4.0 + 4.3) / 2)
    test = judging.welch([0.9, 1.0], [1.0, 1.2])
    assert (found["x"]["ci_low"], found["x"]["ci_high"]) == pytest.approx((test["ci_low"], test["ci_high"]))
    assert judging.saved_by_stage(a, b, test=False)[0]["ci_low"] is None
    assert judging.step_numbers(b)["x"]["mean"] == 95 and judging.step_numbers(b)["z"]["n"] == 1
    assert judging.step_means(b).keys() == {"x", "z"}


def test_stages_are_compared_where_both_have_them():
    staged, other, plain_one = timed([{"x": (1.0, 1)}]), timed([{"z": (1.0, 1)}]), timed([{"x": (1.0, 1)}])
    del plain_one[0].stage_ms["logged"]
    assert judging.stage_kind([staged, staged]) == "logged"
    assert judging.stage_kind([staged, other]) == judging.stage_kind([staged, plain_one]) == "quarters"
    assert judging.stage_kind([staged, [*staged, *plain_one]]) == "quarters"
    untimed = SimpleNamespace(stage_ms={})
    assert judging.stage_kind([staged, [untimed]]) == "quarters"
    assert judging.by_stage([untimed], "quarters") == {"all": []}
    assert judging.saved_by_stage({"all": []}, judging.by_stage(staged, "quarters")) == []


def test_stage_report():
    groups = {"A": timed([{"x": (1000.0, 10)}, {"x": (1100.0, 10)}]), "B": timed([{"x": (900.0, 10)}])}
    times = {name: judging.by_stage(samples, "logged") for name, samples in groups.items()}
    result = {"step_ms": {name: judging.step_numbers(found) for name, found in times.items()},
              "pairs": [{"a": "A", "b": "B", "stages": judging.saved_by_stage(times["A"], times["B"])}]}
    text = plain(stage_report([*groups], result))
    half = 12.706204736432095 * math.sqrt(50) / math.sqrt(2)
    assert "x" in text and f"105.00 +- {half:.2f}" in text and "90.00" in text
    assert "-0.150" in text and "A is A, B is B" in text
