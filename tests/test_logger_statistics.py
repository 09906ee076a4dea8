"""Tests of the numbers of runlogs/ by hand: each formula against one that is written out here. tests/mutants.py puts
small errors into the code; these tests are fast, so that they are run first."""

import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
from scipy import stats

from runlogs import arms, facts, judging, loading
from runlogs.parsing import Trace

A, B = [0.0, 2.0, 4.0, 7.0], [10.0, 11.0, 16.0]  # other sizes and other spreads: Welch is not Student


def run(losses=(4.0, 3.0), steps=None, time_s=1.0, **more):
    """A sample with a validation every `steps / len(losses)` steps."""
    count = len(losses)
    steps = steps or count
    rows = [{"step": steps * i // count, "iterations": steps, "val_loss": loss, "tokens": 64 * steps * i // count,
             "train_time_ms": 1000 * time_s * i / count} for i, loss in enumerate(losses, 1)]
    found = SimpleNamespace(rows=rows, loss=losses[-1], time_s=time_s, steps=steps, arm="record", date=None, name="a")
    trace = SimpleNamespace(header={}, end={}, resets=0, changes=[], code_hash=None)
    found.run = SimpleNamespace(path=Path("a"), trace=trace, config={}, source="a")
    return SimpleNamespace(**{**vars(found), **more})


# -- one group


def test_mean_and_sd():
    assert judging.mean_sd([1.0, 2.0, 6.0, None, math.nan]) == (3.0, pytest.approx(math.sqrt((4 + 1 + 9) / 2)))
    assert judging.mean_sd([2.0]) == (2.0, None) and judging.mean_sd([None]) == (None, None)


def test_below_target_is_one_sided():
    """Three values: two degrees of freedom, F(t) = 1/2 + t / (2 sqrt(2 + t^2))."""
    losses, target = [3.27, 3.275, 3.286], 3.28
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    t = (mean - target) * math.sqrt(3) / sd
    assert judging.below_target(losses, target) == pytest.approx(0.5 + t / (2 * math.sqrt(2 + t * t)), rel=1e-9)
    assert judging.below_target([3.3, 3.31, 3.32], 3.28) > 0.9


def first_enough(margin, sd, alpha):
    """Smallest n with p < alpha, one after the other."""
    return next(n for n in range(2, 3000) if stats.t.sf(margin * math.sqrt(n) / sd, n - 1) < alpha)


@pytest.mark.parametrize("alpha", [0.01, 0.05])
@pytest.mark.parametrize("margin, sd", [(0.001, 0.0013), (0.0005, 0.002), (0.01, 0.001), (0.0002, 0.001),
                                        (0.0016, 0.002), (0.00131, 0.0013), (0.0008, 0.0013)])
def test_runs_needed(margin, sd, alpha):
    assert judging.runs_needed(margin, sd, alpha) == first_enough(margin, sd, alpha)


def test_runs_needed_without_a_spread_or_a_margin():
    assert judging.runs_needed(0.1, 0) == 2 and judging.runs_needed(0, 1) is None and judging.runs_needed(-1, 0) is None
    assert judging.runs_needed(1e-6, 1.0) is None


def test_detectable_margin_has_p_equal_to_alpha():
    margin = judging.detectable_margin(5, 0.002, 0.03)
    assert stats.t.sf(margin * math.sqrt(5) / 0.002, 4) == pytest.approx(0.03, rel=1e-9)


def test_target_numbers():
    losses = [3.276, 3.279, 3.2785, 3.277]
    samples = [run((4.0, loss)) for loss in losses]
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    found = judging.target_numbers(samples, 3.28, 0.02)
    p = stats.t.sf((3.28 - mean) * 2 / sd, 3)
    assert 0.02 < p < 0.04 and found["p_value"] == pytest.approx(p) and not found["passed"]
    assert found["t"] == pytest.approx((mean - 3.28) * 2 / sd) and found["t"] < 0
    needed = first_enough(3.28 - mean, sd, 0.02)
    assert (found["runs_needed"], found["more_runs"]) == (needed, needed - 4) and needed > 4
    assert found["detectable_margin"] == pytest.approx(judging.detectable_margin(4, sd, 0.02))
    assert found["sigma_rule"] == {"value": pytest.approx((3.28 - mean) * 2), "passed": True}  # 0.00475
    assert judging.target_numbers(samples, 3.29, 0.02)["more_runs"] == 0
    easy = judging.target_numbers(samples, 3.278, 0.2)["runs_needed"]
    assert easy == first_enough(3.278 - mean, sd, 0.2) < first_enough(3.278 - mean, sd, 0.01)
    assert not judging.target_numbers(samples, 3.2793, 0.02)["sigma_rule"]["passed"]  # 0.00335


def test_group_numbers():
    samples = [run((4.0, 3.0), time_s=1.0), run((4.0, 3.5), time_s=3.0)]
    found = judging.group_numbers(samples)
    assert (found["n"], found["mean_val_loss"], found["mean_time_s"]) == (2, 3.25, 2.0)
    assert found["sd_val_loss"] == pytest.approx(math.sqrt(0.125)) and found["sd_time_s"] == pytest.approx(math.sqrt(2))
    half = 12.706204736432095 * 500 * math.sqrt(2) / math.sqrt(2)  # steps of 500 and 1500 ms, one degree of freedom
    assert found["mean_step_ms"] == 1000 and found["steps"] == [2]
    assert (found["step_ms_ci_low"], found["step_ms_ci_high"]) == pytest.approx((1000 - half, 1000 + half))
    assert judging.group_numbers([run((3.0,), rows=[{"step": 1, "val_loss": 3.0}])])["mean_step_ms"] is None


# -- two groups


def welch_by_hand(a, b):
    """(difference, half of the 95 % interval, two-sided p) by Welch and Satterthwaite."""
    parts = [statistics.variance(values) / len(values) for values in (a, b)]
    error = math.sqrt(sum(parts))
    freedom = error**4 / sum(part**2 / (len(values) - 1) for part, values in zip(parts, (a, b), strict=True))
    difference = statistics.mean(a) - statistics.mean(b)
    return difference, stats.t.ppf(0.975, freedom) * error, 2 * stats.t.sf(abs(difference) / error, freedom)


def check_welch(test, a, b):
    difference, half, p = welch_by_hand(a, b)
    assert test["difference"] == pytest.approx(difference) and test["p_value"] == pytest.approx(p)
    assert (test["ci_low"], test["ci_high"]) == pytest.approx((difference - half, difference + half))


def test_welch_with_other_sizes_and_spreads():
    """Student's t would give p = 0.0119 and an interval of +- 6.05, not 0.0169 and +- 6.47."""
    test = judging.welch(A, B)
    check_welch(test, A, B)
    assert test["p_value"] > 0.015 and test["ci_low"] < -9.0833 < test["ci_high"] < 0
    spread = math.sqrt((statistics.variance(A) + statistics.variance(B)) / 2)
    assert test["cohens_d"] == pytest.approx(-(9 + 1 / 12) / spread)
    assert judging.welch(A, B, 0.5)["ci_low"] > test["ci_low"]
    assert judging.welch(A, [1.0]) is None and judging.welch([1.0, 1.0], [2.0, 2.0]) is None


def test_pairwise_rule():
    """0.003 of loss and 10 steps gained, 2 and 3 runs: (0.003 + 0.00045) / sqrt(1/2 + 1/3)."""
    a = [run((4.0, 3.28), 100), run((4.0, 3.282), 100)]
    b = [run((4.0, 3.277), 90), run((4.0, 3.279), 90), run((4.0, 3.278), 90)]
    rule = judging.pairwise_rule(a, b)
    assert rule == {"value": pytest.approx(0.00345 / math.sqrt(5 / 6)), "passed": False}
    assert judging.pairwise_rule(b, a)["value"] == pytest.approx(-rule["value"])
    assert judging.pairwise_rule(a, [run((4.0, 3.2765), 90)] * 3)["passed"]


def groups_of(**more):
    a = [run((4.0, 3.2 + x / 100), time_s=10 + x, stage_ms={}) for x in A]
    b = [run((4.0, 3.2 + x / 100), time_s=10 + x, stage_ms={}) for x in B]
    for sample in [*a, *b]:
        vars(sample).update(code="c", hardware="h", processes=1)
    return a, b


def test_compare_is_the_second_minus_the_first(monkeypatch):
    monkeypatch.setattr(judging, "group_warnings", lambda *given: [])
    monkeypatch.setattr(judging, "sizes_of", lambda samples: {})
    a, b = groups_of()
    pair = judging.compare_numbers({"a": a, "b": b}, {"a": [], "b": []})["pairs"][0]
    check_welch(pair["train_time_s"], [s.time_s for s in b], [s.time_s for s in a])
    check_welch(pair["val_loss"], [s.loss for s in b], [s.loss for s in a])
    effect = judging.effect_of(SimpleNamespace(samples=a, mixture=""), SimpleNamespace(samples=b, mixture=""))
    check_welch(effect["train_time_s"]["test"], [s.time_s for s in b], [s.time_s for s in a])
    assert effect["val_loss"]["difference"] == pytest.approx((statistics.mean(B) - statistics.mean(A)) / 100)


def cell_of(samples, **more):
    facts = {"samples": samples, "hardware": "h", "processes": 1, "steps": 2, "label": "all", "uneven": ""}
    return SimpleNamespace(**facts | more)


def test_gain_by_hand():
    """Seconds and percent that the record is faster, with intervals on their side of the mean."""
    old, new = (cell_of(samples) for samples in groups_of()[::-1])
    gain = judging.gain_of(new, old)
    times = [[s.time_s for s in c.samples] for c in (old, new)]
    difference, half, _ = welch_by_hand(*times)
    assert gain["time_s"] == pytest.approx(difference) and difference > 0
    assert (gain["ci_low"], gain["ci_high"]) == pytest.approx((difference - half, difference + half))
    means = [*map(statistics.mean, times)]
    assert gain["percent"] == pytest.approx(100 * (1 - means[1] / means[0]))
    ratio, half, _ = welch_by_hand(*([math.log(t) for t in side] for side in times[::-1]))
    assert gain["percent_low"] == pytest.approx(100 * (1 - math.exp(ratio + half)))
    assert gain["percent_high"] == pytest.approx(100 * (1 - math.exp(ratio - half)))
    assert gain["percent_low"] < gain["percent"] < gain["percent_high"]
    assert (gain["n_record"], gain["n_baseline"]) == (4, 3)


def test_difference_is_record_minus_baseline():
    a, b = groups_of()
    record, baseline = (SimpleNamespace(cells=[cell_of(s)], mixture="") for s in (a, b))
    found = judging.difference_of(record, baseline)
    check_welch(found["val_loss"], [s.loss for s in a], [s.loss for s in b])
    check_welch(found["train_time_s"], [s.time_s for s in a], [s.time_s for s in b])


def test_opponent_is_the_longest_baseline_of_the_machine():
    cells = [cell_of([], steps=90), cell_of([], steps=100), cell_of([], steps=200, hardware="other")]
    arm = SimpleNamespace(cells=cells)
    assert judging.opponent(cell_of([]), arm) == (cells[1], "")
    assert judging.opponent(cell_of([], processes=8), arm)[0] is None
    arm.cells = [*cells, cell_of([], steps=300, uneven="no")]
    assert judging.opponent(cell_of([]), arm)[0] is cells[1]
    arm.cells = [*cells, cell_of([], steps=100)]
    assert judging.opponent(cell_of([]), arm)[1].startswith("several baselines")


def test_session_order():
    def session(letters, dates=None):
        dates = dates or [f"2026-01-01 {i:02}" for i in range(len(letters))]
        return [run(arm="baseline" if c == "B" else "record", date=d) for c, d in zip(letters, dates, strict=True)]

    assert judging.session_numbers(session("PBP"))["interleaved"] is True
    assert judging.session_numbers(session("PPBB"))["interleaved"] is False
    found = judging.session_numbers(session("PPBB", ["4", "1", "3", "2"]))
    assert (found["order"], found["first"], found["last"]) == ("P B B P", "1", "4")
    same = session("PBPB", ["1"] * 4)
    assert arms.session_of(same) == same
    assert judging.session_numbers([*same, run()])["undated"] == 1


# -- our runs against a control


def test_reached_in_proportion():
    """From 4 at step 4 to 3 at step 6: 3.25 is three quarters of the way."""
    rows = run((5.0, 4.0, 3.0), 6).rows
    spent = {"tokens": 64 * 5.5, "step": 5.5, "train_time_ms": 1000 * 5.5 / 6}
    assert judging.reached(rows, 3.25) == pytest.approx(spent)
    assert judging.reached(rows, 4.0)["step"] == 4 and judging.reached(rows, 5.0)["step"] == 2
    assert judging.reached(rows, 2.9) is None
    flat = run((5.0, 4.0, 4.0), 6).rows
    assert judging.reached(flat, 4.0)["step"] == 4  # a validation at the loss has reached it
    assert judging.reached([*rows[:1], {**rows[1], "val_loss": math.nan}, rows[2]], 4.0)["step"] == 4


def test_control_numbers(monkeypatch):
    monkeypatch.setattr(judging, "not_comparable", lambda a, b: "")
    control, other = run((5.0, 4.0), 10, 20.0), run((4.5, 3.5), 8, 24.0)
    for sample in (control, other):
        sample.run.source = "metrics.jsonl"
    found = judging.control_numbers({"control": [control], "new": [other]})
    new = found["runs"][1]
    assert found["loss"] == 4.0 and new["reached"]["step"] == 6
    assert new["step_time_ratio"] == pytest.approx((24 / 8) / (20 / 10))
    assert new["break_even_ratio"] == pytest.approx(10 / 6)


# -- one run


def rows_of(losses, gap=2, last=None, **more):
    return [{"step": gap * i, "iterations": last, "val_loss": loss, **more} for i, loss in enumerate(losses)]


def test_crossing_counts_equality():
    rows = [{"step": step, "val_loss": loss, "train_time_ms": 1000.0 * step}
            for step, loss in enumerate((3.3, 3.28, 3.2), 1)]
    assert loading.crossing(rows, 3.28) == {"step": 2, "train_time_s": 2.0}
    assert loading.crossing(rows, 3.2799) == {"step": 3, "train_time_s": 3.0}
    assert loading.crossing(rows, 3.1) is None and loading.crossing([{"step": 1, "val_loss": math.nan}], 9) is None
    assert loading.crossing([{"step": 4, "val_loss": 3.0}], 3.0) == {"step": 4, "train_time_s": None}


def test_trial_numbers():
    rows = [{"step": 0, "iterations": 4, "val_loss": 5.0, "train_time_ms": 0.0},
            {"step": 2, "iterations": 4, "val_loss": 2.5, "train_time_ms": 300.0},
            {"step": 4, "iterations": 4, "val_loss": 3.0, "train_time_ms": 600.0}]
    found = loading.trial_numbers(rows)
    assert (found["status"], found["steps"], found["max_step"]) == ("complete", 4, 4)
    assert (found["final_val_loss"], found["best_val_loss"], found["best_val_step"]) == (3.0, 2.5, 2)
    assert (found["train_time_s"], found["step_avg_ms"]) == (0.6, 150.0)
    rows[-1]["step_avg_ms"] = 151.0
    assert loading.trial_numbers(rows)["step_avg_ms"] == 151.0


def test_trial_status():
    """Complete: at its last step, or after a validation out of turn where the end is not logged."""
    status = loading.trial_status
    assert status(rows_of([5.0, 4.0, 3.0], last=4)) == "complete"
    assert status(rows_of([5.0, 4.0, 3.0], last=8, train_time_ms=1.0)) == "died"
    assert status([*rows_of([5.0, 4.0], last=8, train_time_ms=1.0)]) == "died"
    odd = [*rows_of([5.0, 4.0, 3.5], last=8), {"step": 7, "iterations": 8, "val_loss": 3.0}]
    assert status(odd) == "complete" and status(odd[:2] + odd[3:]) == "complete"
    assert status([odd[0], {**odd[1], "step": 3}]) == "died"  # one gap tells no rhythm
    assert status([{**row, "step": step} for row, step in zip(odd, (1, 3, 5, 7), strict=True)]) == "died"
    assert status(rows_of([5.0, math.nan], last=2)) == "nan" and status(rows_of([5.0, math.inf], last=2)) == "nan"
    assert status(rows_of([5.0, 4.0], last=8), {"status": "done"}) == "complete"
    assert status(rows_of([5.0, 4.0], last=8), {"status": "error"}) == "error"
    assert status(rows_of([5.0, 4.0], last=8), {"status": "stopped at step 2"}) == "complete"


# -- what may be pooled


def sample(**more):
    """A Sample as of arms.py."""
    facts = {"code": "c", "hardware": "h", "processes": 8, "steps": 2, "time_s": 1.0, "loss": 3.0} | more
    return arms.Sample(None, [], facts.pop("loss"), facts.pop("time_s"), facts.pop("steps"), {}, **facts)


def test_cells_and_mixtures():
    runs = [sample(), sample(code="d"), sample(), sample(steps=3), sample(hardware="i")]
    cells = arms.cells_of(runs)
    assert [len(cell.samples) for cell in cells] == [2, 1, 1, 1]
    words = arms.mixture_of(cells)
    for part in ("2 code versions: 4 of c, 1 of d", "2 final steps", "2 kinds of hardware"):
        assert part in words
    assert arms.mixture_of(cells[:1]) == "" and "processes" not in words


def test_runs_of_no_named_machine_are_even():
    """Of steps of 0.5 and 0.74 s they may be, of 0.5 and 0.75 s not; a name, or no time, says nothing against it."""
    def uneven(*times, **more):
        return bool(arms.Cell("c", more.get("hardware"), 8, 2, [sample(time_s=t) for t in times]).uneven)

    assert not uneven(1.0, 1.48) and uneven(1.0, 1.5) and uneven(1.5, 1.0) and not uneven(1.0, 1.5, hardware="h")
    assert not uneven(None, None) and not uneven(1.0)
    cell = arms.Cell("c", None, 8, 4, [sample(steps=4, time_s=2.0), sample(steps=8, time_s=2.0)])
    assert "250.00 to 500.00 ms" in cell.uneven
    assert arms.mixture_of([cell]) == cell.uneven


def whole_run(losses, time_s=1.0, name="a.txt", status=None, last=None):
    rows = run(losses, time_s=time_s).rows
    for row in rows:
        row["iterations"] = last or len(losses)
    path = SimpleNamespace(name=name, is_dir=lambda: False)
    trace = Trace(rows=rows, end={"status": status} if status else {})
    return SimpleNamespace(path=path, trace=trace, config={}, source=name)


def samples_and_reasons(*runs):
    seen, found, dropped = {}, [], []
    for one in runs:
        samples, reasons = arms.trials_of(one, seen=seen)
        found, dropped = found + samples, dropped + [why for why, _ in reasons]
    return found, dropped


def test_copies_count_once():
    runs = [whole_run((4.0, 3.0)), whole_run((4.0, 3.0), name="b.txt"), whole_run((4.0, 3.0), 1.1, "c.txt"),
            whole_run((3.9, 3.0), name="d.txt"), whole_run((4.0, 3.1), name="e.txt")]
    found, dropped = samples_and_reasons(*runs)
    assert [s.name for s in found] == ["a.txt", "c.txt", "d.txt", "e.txt"]
    assert dropped == ["b.txt: the same run as a.txt"]


def test_only_whole_runs_count():
    found, dropped = samples_and_reasons(whole_run((4.0, 3.0), last=9), whole_run((4.0, math.nan)),
                                         whole_run((4.0, math.inf)), whole_run((4.0, 3.0), name="good"))
    assert [s.name for s in found] == ["good"] and len(dropped) == 3


# -- what a README may claim


def test_spread_of():
    values, sd = [1.0, 2.0, 4.0, 9.0], math.sqrt(38 / 3)
    found = facts.spread_of(values[::-1])
    assert (found["mean"], found["median"], found["min"], found["max"]) == ([4.0], [3.0], [1.0], [9.0])
    assert found["range"] == [1.0, 9.0] and found["run"] == values
    assert found["sd"] == pytest.approx([math.sqrt(38 / 4), sd])
    spread = sorted([math.sqrt(38 / 4), sd, sd / 2, 1.96 * sd / 2, 4.0])  # +- sd, its error, 95 % of it, half the range
    assert found["spread"] == pytest.approx(spread) and "sd" not in facts.spread_of([1.0])


def test_intervals_of():
    error = statistics.stdev(A) / 2
    ends = [statistics.mean(A) + sign * error * stats.t.ppf(share, 3) for share in (0.975, 0.995) for sign in (-1, 1)]
    assert facts.interval_of(A) == pytest.approx(sorted(ends)) and facts.interval_of([1.0]) == []


def test_tests_of():
    """p of the t-test and of a z-test with a known sd of 0.0013; t with either sign."""
    losses = [3.277, 3.28, 3.2785, 3.2788]
    found, mean = facts.tests_of(losses, 3.28), statistics.mean(losses)
    assert found["p"] == [judging.below_target(losses, 3.28)]
    assert found["z"] == pytest.approx([statistics.NormalDist().cdf((mean - 3.28) * 2 / 0.0013)])
    t = (3.28 - mean) * 2 / statistics.stdev(losses)
    assert found["t"] == pytest.approx([-t, t])
    assert not any(facts.tests_of(losses[:1], 3.28).values()) and not any(facts.tests_of(losses, 9.0).values())


def test_facts_of_two_groups():
    found = facts.welch_facts(A, B)
    difference, half, p = welch_by_hand(A, B)
    t = difference / math.sqrt(statistics.variance(A) / 4 + statistics.variance(B) / 3)
    assert sorted(found["p"]) == pytest.approx(sorted([p, p / 2, 1 - p / 2]))
    assert sorted(found["t"]) == pytest.approx([t, -t])
    ends = difference - half, difference + half
    assert found["interval"] == pytest.approx([*ends, -ends[0], -ends[1]])
    assert sorted(map(abs, found["d"])) == pytest.approx([abs(judging.welch(A, B)["cohens_d"])] * 2)


@pytest.mark.parametrize("written, value, agrees", [
    ("3.277", 3.2766, True), ("3.277", 3.2774, True), ("3.277", 3.2779, True),  # the last is cut, not rounded
    ("3.277", 3.2781, False), ("3.277", 3.2764, False), ("3.277", 3.2759, False), ("-1.5", -1.54, True),
    ("-1.5", 1.52, False), ("12", 12.4, True), ("12", 13.1, False), ("12", 11.4, False), ("-1", 1.5, False)])
def test_rounded_or_cut(written, value, agrees):
    digit = 10.0 ** -len(written.partition(".")[2])
    assert facts.close(float(written), digit, value) is agrees


def test_rough_claims():
    assert facts.close(100, 1, 102.5, True) and not facts.close(100, 1, 104, True)
    assert facts.close(3.28, 0.01, 3.289, True) and not facts.close(3.28, 0.0001, 3.2802, True)


def test_claims_of_a_bound():
    below, above = (SimpleNamespace(kind="p", value=0.01, relation=relation) for relation in "<>")
    assert facts.holds(below, [0.001, 0.5]) and not facts.holds(below, [0.01, 0.5])
    assert facts.holds(above, [0.001, 0.5]) and not facts.holds(above, [0.001, 0.01])
    assert not facts.holds(below, []) and not facts.holds(above, [])


def test_step_time_of_a_run():
    sample = run((4.0, 3.0), time_s=3.0)
    sample.rows[-1]["step_avg_ms"] = 1490.0
    assert facts.run_of(sample).step_times == [1.49]
    sample.rows = [{"step": 2, "val_loss": 3.0}]
    assert facts.run_of(sample).step_times == [1.5]
