"""Tests of sequential testing: runlogs/planning.py and `stats --plan`."""

import json
import math
import random
import statistics
from types import SimpleNamespace

import numpy as np
import pytest

import logger
from runlogs import planning
from runlogs.planning import boundaries, look, outlook, plan_numbers
from runlogs.reporting import plain
from runlogs.stats_report import plan_report

BAR = "=" * 100 + "\n"


def t_values(values):
    """t of the first 1, 2, .. values of each row, as an array."""
    counts = np.arange(1, values.shape[1] + 1)
    sums, squares = values.cumsum(1), (values * values).cumsum(1)
    variance = (squares - sums**2 / counts) / np.maximum(counts - 1, 1)
    return sums / np.sqrt(counts * np.maximum(variance, 1e-300))


def passes(values, alpha, most):
    """Whether each row has passed by look n, as an array (row, look)."""
    found = boundaries(alpha, most)
    over = np.array([t_values(values)[:, n - 1] >= bound for n, bound in found.items()]).T
    return np.logical_or.accumulate(over, 1)


def sample(loss, date=None, name="a.txt"):
    trace = SimpleNamespace(header={"date": date} if date else {})
    run = SimpleNamespace(path=SimpleNamespace(name=name), trace=trace)
    return SimpleNamespace(loss=loss, run=run, date=date)


# -- boundaries


def test_a_plan_of_one_look_is_the_t_test():
    """Of three values t has two degrees of freedom: P(t <= x) = 1/2 + x / (2 sqrt(2 + x^2))."""
    x = 0.98 * math.sqrt(2 / (1 - 0.98**2))
    assert boundaries(0.01, 3) == {3: pytest.approx(x, rel=1e-9)}


def test_first_look_spends_its_share():
    """Of 12 runs the first look has (3 / 12)^1.5 = 1/8 of the error rate."""
    share = 1 - 2 * 0.04 / 8
    assert boundaries(0.04, 12)[3] == pytest.approx(share * math.sqrt(2 / (1 - share**2)), rel=1e-9)


@pytest.mark.parametrize("alpha, most", [(0.01, 20), (0.1, 12), (0.4, 8)])
def test_error_rate_at_the_target_is_alpha(alpha, most):
    """100,000 competitors at the target who look after each run. By look n alpha (n / N)^1.5 of them have passed."""
    rates = passes(np.random.default_rng(1).standard_normal((100_000, most)), alpha, most).mean(0)
    spent = alpha * (np.arange(3, most + 1) / most) ** 1.5
    assert np.abs(rates - spent).max() < 3.5 * math.sqrt(alpha * (1 - alpha) / 100_000)


def test_the_t_test_at_every_look_does_not_keep_its_rate():
    from scipy.stats import t

    values = np.random.default_rng(1).standard_normal((20_000, 20))
    tests = t.isf(0.01, np.arange(2, 20))  # after run 3 to 20
    assert (t_values(values)[:, 2:] > tests).any(1).mean() == pytest.approx(0.056, abs=0.005)


def test_power_and_runs_against_a_fixed_number_of_runs():
    """At a margin of 1 sd 92 % pass within 20 runs, after 13 on average; with 20 runs and one look 96 %. At 2 sd all
    pass, after 7.5."""
    values = np.random.default_rng(2).standard_normal((20_000, 20))
    for margin, power, runs in ((0.5, 0.31, 18.4), (1, 0.924, 13.07), (2, 1, 7.49)):
        passed = passes(values + margin, 0.01, 20)
        needed = np.where(passed[:, -1], passed.argmax(1) + 3, 20)
        assert passed[:, -1].mean() == pytest.approx(power, abs=0.012)
        assert needed.mean() == pytest.approx(runs, abs=0.12)


def test_boundaries_fall_and_end_above_the_t_test():
    """What passes here passes the field's t-test at the same run."""
    from scipy.stats import t

    for alpha, most in ((0.01, 20), (0.05, 8), (0.001, 15), (0.2, 4), (0.01, 30)):
        found = boundaries(alpha, most)
        assert list(found) == [*range(3, most + 1)] and [*found.values()] == sorted(found.values(), reverse=True)
        assert all(bound > t.isf(alpha, n - 1) for n, bound in found.items())


def test_chance_of_the_next_u():
    """Against 400,000 next values, for u and y on both sides of 0 and of 1."""
    rng, n = np.random.default_rng(3), 5
    us = np.array([-2.0, -1.3, -0.4, 0.0, 0.7, 1.8])
    ys = np.array([-2.2, -1.4, -1.0, -0.5, 0.0, 0.3, 1.0, 1.2, 1.9, 2.3])
    found = planning.chance_below(ys, us, n)
    w = rng.standard_normal(400_000) / np.sqrt(rng.chisquare(n, 400_000))
    for j, u in enumerate(us):
        following = (u + w) / np.sqrt(1 + w * w)
        assert [(following <= y).mean() for y in ys] == pytest.approx(found[:, j], abs=0.004)


def test_u_and_t_are_inverse():
    values = [1.0, 2.0, 4.0]
    u = sum(values) / math.sqrt(sum(v * v for v in values))
    t = statistics.mean(values) * math.sqrt(3) / statistics.stdev(values)
    assert planning.t_of(u, 3) == pytest.approx(t) and planning.u_of(t, 3) == pytest.approx(u)


# -- what is still to be expected


def expected(n, mean, sd, most, alpha=0.01, futures=4000):
    """outlook() in plain Python: draw variance and mean, then runs one by one."""
    rng, bounds, passed = random.Random(4), boundaries(alpha, most), []
    for _ in range(futures):
        sigma = sd * math.sqrt((n - 1) / rng.gammavariate((n - 1) / 2, 2))
        center = rng.gauss(mean, sigma / math.sqrt(n))
        count, total, squares = n, n * mean, (n - 1) * sd**2 + n * mean**2
        while count < most:
            value = rng.gauss(center, sigma)
            count, total, squares = count + 1, total + value, squares + value**2
            spread = math.sqrt((squares - total**2 / count) / (count - 1))
            if total / math.sqrt(count) >= bounds[count] * spread:
                passed.append(count - n)
                break
    return len(passed) / futures, statistics.median(passed)


@pytest.mark.parametrize("n, mean, sd, most", [(4, 0.9, 1.0, 12), (8, 0.5, 0.7, 20), (10, 2.2, 2.0, 11)])
def test_outlook(n, mean, sd, most):
    chance, more = outlook(n, mean * math.sqrt(n) / sd, 0.01, most)
    other_chance, other_more = expected(n, mean, sd, most)
    assert chance == pytest.approx(other_chance, abs=0.03) and abs(more - other_more) <= 1
    assert more == 1 or most > n + 1


@pytest.mark.parametrize("n", [3, 7, 12])
def test_boundary_is_where_it_says(n):
    """Losses with a mean just so far below the target."""
    offsets = [i - (n - 1) / 2 for i in range(n)]
    for share, says in ((0.999, ("go on", "hopeless")), (1.001, ("enough",))):
        margin = share * boundaries(0.01, 12)[n] * statistics.stdev(offsets) / math.sqrt(n)
        assert look([3.28 - margin + x for x in offsets], 3.28, 0.01, 12)["says"] in says


def test_stopping_without_hope_costs_little():
    """Of the series with a margin of 1 sd that pass within 20 runs, 1 to 2 % would have been stopped; at the target 7
    runs are made instead of 20."""
    limits = {}
    for n in range(3, 20):  # the t with a chance of HOPELESS
        low, high = -6.0, boundaries(0.01, 20)[n]
        for _ in range(8):
            middle = (low + high) / 2
            low, high = (middle, high) if outlook(n, middle, 0.01, 20)[0] < planning.HOPELESS else (low, middle)
        limits[n] = high
    values = np.random.default_rng(5).standard_normal((20_000, 20))
    for margin, lost, runs in ((0, 0.001, 7.0), (1, 0.012, 12.5)):
        t = t_values(values + margin)
        up = passes(values + margin, 0.01, 20)
        down = np.array([t[:, n - 1] < limit for n, limit in limits.items()]).T
        first_up = np.where(up[:, -1], up.argmax(1), 99)
        first_down = np.where(down.any(1), down.argmax(1), 99)
        assert ((first_up < 99) & (first_down < first_up)).mean() == pytest.approx(lost, abs=0.01)
        assert np.minimum(np.minimum(first_up, first_down) + 3, 20).mean() == pytest.approx(runs, abs=0.5)


# -- looks and plans


def test_looks_by_hand():
    """Losses 3.27, 3.28, 3.29 against 3.30: mean 3.28, sd 0.01, t = 0.02 * sqrt(3) / 0.01."""
    found = look([3.27, 3.28, 3.29], 3.30, 0.01, 20)
    assert (found["n"], found["mean"], found["sd"]) == (3, pytest.approx(3.28), pytest.approx(0.01))
    assert found["t"] == pytest.approx(2 * math.sqrt(3)) and found["boundary"] == boundaries(0.01, 20)[3]
    assert found["says"] == "go on" and 0.7 < found["chance"] < 0.9 and 2 <= found["more"] <= 8
    assert look([3.29, 3.28, 3.27], 3.30, 0.2, 3)["says"] == "enough"  # t_2 of 0.2 is 1.06
    assert look([3.31, 3.32, 3.33], 3.30, 0.01, 20)["says"] == "hopeless"
    late = look([3.29, 3.28, 3.27], 3.30, 0.01, 3)  # the last run: t is 3.46, 6.96 is needed
    assert (late["says"], late["chance"], late["more"]) == ("hopeless", 0.0, None)


def test_looks_that_say_nothing():
    assert [look([3.2] * n, 3.28, 0.01, 4)["says"] for n in (1, 2, 3, 4)] == ["go on"] * 3 + ["hopeless"]
    assert [look([3.2, 3.1][:n], 3.28, 0.01, 9)["more"] for n in (1, 2)] == [2, 1]
    assert look([3.1, 3.2, 3.3, 3.4], 3.28, 0.01, 3)["says"] == "beyond the plan"


def test_spread_and_level_do_not_matter():
    """Losses in other units: the same t, the same advice."""
    losses = [3.271, 3.277, 3.268, 3.279]
    a, b = look(losses, 3.28, 0.01, 15), look([10 * v + 1 for v in losses], 33.8, 0.01, 15)
    assert a["t"] == pytest.approx(b["t"], rel=1e-6) and (a["says"], a["more"]) == (b["says"], b["more"])


def test_plan_goes_by_the_dates():
    """The runs in the order of their dates pass after the fourth; what comes later changes nothing."""
    losses = [3.27, 3.271, 3.272, 3.27, 3.271, 3.272, 3.35, 3.4]
    samples = [sample(loss, f"2026-01-01 10:{i:02}:00") for i, loss in enumerate(losses)]
    plan = plan_numbers(samples[::-1], 3.28, 0.01, 20)
    assert [row["loss"] for row in plan["looks"]] == losses and plan["order"] == "by date"
    assert plan["passed_after"] == 4 and plan["verdict"] == "enough" and "after run 4 of at most 20" in plan["sentence"]
    assert [row["says"] for row in plan["looks"]] == ["go on"] * 3 + ["enough"] * 5
    assert [plan_numbers(samples[:3], target, 0.1, 3)["verdict"] for target in (3.28, 3.271)] == ["enough", "hopeless"]
    undated = plan_numbers([*samples[:1], sample(3.4)], 3.28)
    assert [row["loss"] for row in undated["looks"]] == [3.27, 3.4] and "by file" in undated["order"]


def test_sentences():
    plan = plan_numbers([sample(v) for v in (3.27, 3.275, 3.272, 3.279)], 3.28, 0.01, 20)
    assert plan["verdict"] == "go on" and plan["passed_after"] is None
    last = plan["looks"][-1]
    assert plan["sentence"].startswith(f"go on, about {last['more']} more: the chance to pass by run 20 is ")
    assert "probability of at most 0.01" in plan["sentence"] and f"{100 * last['chance']:.0f} %" in plan["sentence"]
    plan = plan_numbers([sample(v) for v in (3.29, 3.295, 3.292, 3.299)], 3.28, 0.01, 20)
    assert plan["sentence"].startswith("hopeless: the chance to pass by run 20 is 0.0 %, below 2 %")
    plan = plan_numbers([sample(v) for v in (3.27, 3.275, 3.288, 3.279)], 3.28, 0.01, 4)
    assert plan["verdict"] == "hopeless" and "the 4 planned runs are used up" in plan["sentence"]
    plan = plan_numbers([sample(v) for v in (3.27, 3.275, 3.288, 3.279, 3.2)], 3.28, 0.01, 4)
    assert plan["verdict"] == "hopeless" and plan["looks"][-1]["says"] == "beyond the plan"
    assert "too few runs" in plan_numbers([sample(3.27)], 3.28)["sentence"]


def test_plan_report():
    plan = plan_numbers([sample(v) for v in (3.27, 3.275, 3.272, 3.279)], 3.28, 0.01, 20)
    lines = plain(plan_report(plan)).split("\n")
    assert len(lines) == 7
    assert "go on, at least 2 more" in lines[2] and "14.2" in lines[5] and "go on, about" in lines[5]
    assert lines[6] == plan["sentence"] and all(len(line) <= 90 for line in lines[:6])


@pytest.mark.parametrize("alpha, most, word", [(0, 20, "--alpha is 0"), (0.5, 20, "--alpha is 0.5"), (0.01, 2, "is 2"),
                                               (0.01, 101, "is 101"), (math.nan, 20, "nan")])
def test_plans_that_cannot_be_made(alpha, most, word):
    with pytest.raises(ValueError, match=word):
        plan_numbers([sample(3.2)], 3.28, alpha, most)


def write_runs(folder, losses, code="x = 1"):
    """A log for each loss, an hour between them; the first is the last of its folder."""
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        text = (f"{code}\n{BAR}Running Python 3.11\nRunning PyTorch 2.9.0 compiled for CUDA 12.6 on H100 with "
                f"world_size 1\nMon Jan  5 {i:02}:00:00 2026\n{BAR}"
                f"step:1/2 train_time:50ms step_avg:50.00ms\nstep:2/2 val_loss:{loss} train_time:{100 + i}ms "
                "step_avg:50.00ms\n")
        (folder / f"run_{99 - i}.txt").write_text(text)
    return folder


def command(capsys, *argv):
    code = logger.main(list(map(str, argv)))
    return code, *capsys.readouterr()


def test_stats_plan(tmp_path, capsys):
    good = write_runs(tmp_path / "good", [3.27, 3.271, 3.272, 3.27])
    code, out, err = command(capsys, "stats", good, "--target", 3.28, "--plan", "--json")
    plan = json.loads(out)["plan"]
    assert (code, err, plan["verdict"], plan["passed_after"], plan["max_runs"]) == (0, "", "enough", 4, 20)
    assert [row["loss"] for row in plan["looks"]] == [3.27, 3.271, 3.272, 3.27] and plan["order"] == "by date"
    assert plan["looks"][3]["path"].endswith("run_96.txt")
    code, out, _ = command(capsys, "stats", good, "--target", 3.28, "--plan", "--max-runs", 40, "--alpha", 0.001)
    assert code == 1 and "go on, about" in out and "at most 0.001" in out and "passed (p < 0.001)" in out
    late = write_runs(tmp_path / "late", [3.29, 3.3, 3.31])
    code, out, _ = command(capsys, "stats", late, "--target", 3.28, "--plan", "--markdown")
    assert code == 1 and "hopeless" in out and "| run |" in out


def test_stats_plan_refuses(tmp_path, capsys):
    mixed = write_runs(tmp_path / "a", [3.27, 3.271, 3.272]).parent
    write_runs(tmp_path / "b", [3.26, 3.261, 3.262], "x = 2")
    for argv, words in ((["--target", 3.28], "2 code versions"), ([], "--plan needs a target: --target LOSS"),
                        (["--target", 3.28, "--cell", "a", "--max-runs", 1], "--max-runs is 1: a plan has 3 to 100")):
        code, out, err = command(capsys, "stats", mixed, "--plan", *argv)
        assert (code, out, err.count("\n")) == (1, "", 1) and words in err
