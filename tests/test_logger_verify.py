"""Tests of `logger.py verify`: each kind of claim, true and false, in sentences, tables and code, on logs made here."""

import json
import math
import statistics
import time

import pytest

import logger
from runlogs import facts, verifying, wording

BAR = "=" * 100 + "\n"
CODE = "import os\nRATE = 0.05\n"
MACHINE = "Running Python 3.11.1\nRunning PyTorch 2.9.0 compiled for CUDA 12.6\nRunning on CPU: Chip, 2 threads\n"
LOSSES = {"record": [3.2711, 3.2735, 3.2752, 3.2729, 3.2748], "baseline": [3.2791, 3.2768, 3.2783, 3.2779]}
TIMES = {"record": [70.112, 70.254, 70.198, 70.333, 70.043], "baseline": [75.341, 75.502, 75.287, 75.444]}
STEPS = {"record": 1400, "baseline": 1450}


def write_logs(folder, arm, code=CODE):
    """Logs of an arm: a validation on the way and the last one."""
    folder.mkdir(parents=True)
    for i, (loss, seconds) in enumerate(zip(LOSSES[arm], TIMES[arm], strict=True)):
        steps, ms = STEPS[arm], 1000 * seconds
        lines = f"step:0/{steps} val_loss:10.8258 train_time:0ms step_avg:nanms\n"
        lines += f"step:700/{steps} val_loss:3.5{i}12 train_time:{ms / 2:.0f}ms step_avg:{ms / 1400:.2f}ms\n"
        lines += f"step:{steps}/{steps} val_loss:{loss:.4f} train_time:{ms:.0f}ms step_avg:{ms / steps:.2f}ms\n"
        (folder / f"{arm[0]}{i}f4e2a.txt").write_text(code + BAR + MACHINE + BAR + lines)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """A record without a baseline."""
    folder = tmp_path_factory.mktemp("one") / "2026-12-01_One"
    write_logs(folder, "record")
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A record with its baseline, each in its folder."""
    folder = tmp_path_factory.mktemp("both") / "2026-12-02_Both"
    write_logs(folder / "this_pr", "record")
    write_logs(folder / "baseline", "baseline", CODE.replace("0.05", "0.06"))
    return folder


def verified(folder, text, capsys, name="README.md"):
    """The claims of a text, as `verify --json` gives them."""
    (folder / name).write_text(text)
    if name != "README.md":
        (folder / "README.md").write_text("# Nothing\n")
    code = logger.main(["verify", str(folder), "--json"])
    found = json.loads(capsys.readouterr().out)
    (folder / name).unlink()
    assert code == (1 if not found["passed"] else 0)
    assert found["passed"] == (not any(c["verdict"] == "contradicted" for c in found["claims"] + found["checks"]))
    return found["claims"]


def verdicts(folder, text, capsys, **options):
    return [(claim["kind"], claim["verdict"]) for claim in verified(folder, text, capsys, **options)]


MEAN, SD = statistics.mean(LOSSES["record"]), statistics.stdev(LOSSES["record"])
TIME, TIME_SD = statistics.mean(TIMES["record"]), statistics.stdev(TIMES["record"])
T = (MEAN - 3.28) / SD * math.sqrt(5)


def test_the_numbers_of_these_tests():
    """Facts that the texts below state."""
    assert (round(MEAN, 5), round(SD, 5), round(TIME, 3), round(TIME_SD, 4)) == (3.2735, 0.00164, 70.188, 0.1143)
    assert round(T, 3) == -8.887


# One sentence of each kind, whether it is true, and what it is taken for
SENTENCES = [
    ("The mean validation loss is {}.", "loss mean", ["3.2735", "3.27350", "3.274", "3.273"],
     ["3.2765", "3.179", "41.1"]),
    ("Mean loss: {} over 5 runs", "loss mean", ["3.2735"], ["3.2739", "2.9"]),
    ("# losses: (std={}, mean=3.2735)", "loss sd", ["0.0016", "0.00164"], ["0.0026", "0.016"]),
    ("# losses: (tensor(0.0016), tensor({}))", "loss mean", ["3.2735"], ["3.2745"]),
    ("Loss 3.2735 ± {} (mean, sd)", "loss spread", ["0.0016", "0.0015", "0.00164"], ["0.0031", "0.16"]),
    ("Loss 3.2735 +- {} (mean, sd)", "loss spread", ["0.0016"], ["0.0031"]),
    ("Loss 3.2735 +/- {} (mean, sd)", "loss spread", ["0.0016"], ["0.0031"]),
    ("The best loss was {}.", "loss min", ["3.2711"], ["3.2701", "3.2735"]),
    ("The worst loss was {}.", "loss max", ["3.2752"], ["3.2761", "3.2711"]),
    ("The median loss was {}.", "loss median", ["3.2735"], ["3.2729", "3.2745"]),
    ("The mean time was {} s.", "time mean", ["70.188", "70.19", "70.2", "70.1", "70"],
     ["66.1", "70.4", "7.0", "140.4"]),
    ("It takes {} seconds on average.", "time mean", ["70.188"], ["70.288", "69"]),
    ("It takes {} minutes on average.", "time mean", ["1.17", "1.2", "1.1"], ["1.3", "11.7"]),
    ("It takes {} ms on average.", "time mean", ["70188", "70,188"], ["71188", "70,288"]),
    ("mean time 70.188 s (sd {} s)", "time sd", ["0.11", "0.1143"], ["0.13", "1.1"]),
    ("Stddev of the times: {} ms", "time sd", ["114", "114.3"], ["150", "15"]),
    ("The slowest run took {} s.", "time max", ["70.333"], ["70.254", "71"]),
    ("## New record: {} s", "time result", ["70.2", "70.188"], ["69.2", "63"]),
    ("The mean step time is {} ms.", "step time mean", ["50.13", "50.1"], ["50.23", "49", "501.3"]),
    ("Validated over {} runs.", "n", ["5"], ["4", "6", "50"]),
    ("n={}", "n", ["5"], ["7"]),
    ("I ran {} seeds.", "n", ["5"], ["3"]),
    ("p = {}", "p", ["0.00044", "4.4e-4", "0.0004", "0.000"], ["0.0005", "0.0001", "0.44", "4.4e-5"]),
    ("(p-value: {})", "p", ["0.0004"], ["0.0008"]),
    ("p(mean<3.28) = **{}**", "p", ["0.0004"], ["0.002"]),
    ("It is significant, p < {}", "p", ["0.01", "0.001", "0.0005"], ["0.0000001"]),
    ("t = {}", "t", ["-8.88", "-8.887", "8.9"], ["-7.89", "88.9"]),
    ("In {} training steps, this run is done.", "steps", ["1400", "1,400"], ["1300", "14000"]),
    ("- **Steps:** {}", "steps", ["1400"], ["1300"]),
    ("Number of steps: {}", "steps", ["1400"], ["1300"]),
    ("Mean loss of 3.2735 (5 runs), std {}", "loss sd", ["0.0016"], ["0.0026"]),
]


@pytest.mark.parametrize("text", [
    "Steps: 1360 + 40", "Warm-up steps: 300", "The losses lie between 3.2711 and 3.2752 with a median of 3.2735.",
])
def test_true_sentences(one, capsys, text):
    assert "contradicted" not in [v for _, v in verdicts(one, text, capsys)]


def test_a_test_of_two_groups_that_is_not_called_so(both, capsys):
    p = facts.welch_facts(LOSSES["record"], LOSSES["baseline"])["p"][0]
    text = "Welch's tests of record and baseline. For the loss: p = {}"
    assert verdicts(both, text.format(f"{p:.2g}"), capsys) == [("p", "not found")]
    assert verdicts(both, text.format("0.2"), capsys) == [("p", "contradicted")]


@pytest.mark.parametrize(("claim", "truth"), [
    ("1.074x", "supported"), ("0.931x", "supported"), ("1.174x", "not found"), ("7.4x", "not found"),
    ("6.9 %", "supported"), ("1.0 %", "not found"), ("1.07 %", "not found"),
])
def test_a_ratio_is_no_percentage(both, capsys, claim, truth):
    assert verdicts(both, f"A speedup of {claim} faster", capsys) == [("percent difference", truth)]


@pytest.mark.parametrize(("text", "kind", "true", "false"), SENTENCES)
def test_sentences(one, capsys, text, kind, true, false):
    for number in true:
        assert (kind, "supported") in verdicts(one, text.format(number), capsys), number
        assert "contradicted" not in [v for _, v in verdicts(one, text.format(number), capsys)], number
    for number in false:
        assert [k for k, v in verdicts(one, text.format(number), capsys) if v == "contradicted"] == [kind], number


def test_the_case_of_the_issue(one, capsys):
    found = verified(one, "# Mine\n\nMean validation loss 3.1790 over all runs, mean time 66.1 s, 4 runs.\n", capsys)
    assert [(c["kind"], c["verdict"], c["line"], c["file"]) for c in found] == [
        (kind, "contradicted", 3, "README.md") for kind in ("loss mean", "time mean", "n")]


def test_the_report_lists_all_and_counts_them(one, capsys):
    (one / "README.md").write_text("Mean loss 3.2735, mean time 66.1 s. Previous record: 75.4 s. "
                                   "Mean loss 3.2999 of the baseline.\n")
    assert logger.main(["verify", str(one)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (one / "README.md").unlink()
    assert lines[-1] == "5 complete runs; claims: 1 contradicted, 2 not found, 1 supported"
    assert [line.split()[-1] for line in lines[-5:-1]] == ["README.md:1"] * 4
    assert "66.1 s" in lines[-5] and "3.2735" in lines[-2]


@pytest.mark.parametrize("number", ["3.28", "3.2800"])
def test_the_target_is_no_result(one, capsys, number):
    assert verdicts(one, f"A loss below {number}, target {number}.", capsys) == [("loss", "supported")] * 1 or \
        all(v == "supported" for _, v in verdicts(one, f"A loss below {number}, target {number}.", capsys))
    assert ("loss mean", "contradicted") in verdicts(one, f"mean loss {number}", capsys)


def test_what_is_about_something_else_is_not_found(one, capsys):
    for text in ("Previous record: 75.4 s.", "The official mean time is 74.2 s.",
                 "The baseline has a mean loss of 3.2799.", "On an A100 the mean time was 400 s.",
                 "PR #123 had a mean loss of 3.2781.", "A saving of 300 ms."):
        assert [v for _, v in verdicts(one, text, capsys)] == ["not found"], text


def test_what_is_no_result_is_no_claim(one, capsys):
    text = """2026-12-01, version 2.10.0 of torch 3.11, lr = 0.0018, betas (0.9, 0.95), 12 layers, 768 wide, 8xH100,
[a paper](https://arxiv.org/abs/2405.09818), #92, 124M parameters, eps=1e-10, every 125 steps, GPT-2, `x0 * 0.5`.
![plot 3.2811](a_3.2811.png) <img width="500"> <!-- mean loss 3.9 -->
"""
    assert verdicts(one, text, capsys) == []


# -- lists


def test_lists_of_runs(one, capsys):
    losses, times = ", ".join(map(str, LOSSES["record"])), ", ".join(map(str, TIMES["record"]))
    text = f"```\nlosses = [{losses}]\ntimes = [{times}]\nms: [{times.replace('.', '')}]\n```\n"
    assert verdicts(one, text, capsys) == [("list of losses", "supported"), ("list of times", "supported"),
                                           ("list of times in ms", "supported")]
    for old, new, kind in (("3.2752", "3.2762", "list of losses"), ("70.254", "69.254", "list of times"),
                           ("70254", "71254", "list of times in ms")):
        found = verdicts(one, text.replace(old, new), capsys)
        assert [k for k, v in found if v == "contradicted"] == [kind]


def test_a_list_without_its_logs(one, capsys):
    """What follows from it is not found, what does not is contradicted."""
    text = "Timing of the prior record:\n\n```\ntimes = [90.1, 90.2, 90.4]\n# time: (std=0.1528, mean={})\n```\n"
    assert verdicts(one, text.format("90.2333"), capsys) == [
        ("list of numbers", "not found"), ("time sd", "not found"), ("time mean", "not found")]
    assert ("time mean", "contradicted") in verdicts(one, text.format("89.2333"), capsys)


def test_some_runs_in_a_list_are_a_group(one, capsys):
    text = "losses = [3.2711, 3.2735, 3.2752]\n\nmean: {}, n = 3\n"
    assert [v for _, v in verdicts(one, text.format("3.27327"), capsys)] == ["supported"] * 3
    assert ("loss mean", "contradicted") in verdicts(one, text.format("3.2711"), capsys)


def test_step_lines(one, capsys):
    line = "`step:1400/1400 val_loss:{} train_time:70112ms step_avg:50.08ms`"
    assert verdicts(one, line.format("3.2711"), capsys) == [("step line", "supported")]
    assert verdicts(one, line.format("3.2710"), capsys) == [("step line", "contradicted")]
    assert verdicts(one, "step:900/900 val_loss:3.2 train_time:1ms", capsys) == [("step line", "not found")]


def test_lists_of_other_runs(one, capsys):
    losses = LOSSES["record"][:3] + [3.2911, 3.2822]
    assert verdicts(one, f"losses = {losses}", capsys) == [("list of losses", "not found")]
    prior = "### Baseline\n\nlosses = [3.2711, 3.2735]\n\n(n = {})\n"
    assert [verdicts(one, prior.format(n), capsys)[-1] for n in (2, 3)] == [("n", "supported"), ("n", "contradicted")]
    assert verdicts(one, "losses = [3.2711, 3.2735, 3.2752]\n\nThe first 2 runs.", capsys)[-1] == ("n", "not found")
    assert verdicts(one, "Times: 70.199 [70.254, 70.112, 70.198, 70.333, 70.043]", capsys)[-1] == \
        ("time mean", "contradicted")


def test_a_list_beside_a_claim_decides(one, capsys):
    text = "PR #123 took these times: [90.1, 90.2, 90.4]\n\nThe mean time of PR #123 is {} s.\n"
    assert verdicts(one, text.format("90.23"), capsys)[-1] == ("time mean", "not found")
    assert verdicts(one, text.format("91.23"), capsys)[-1] == ("time mean", "contradicted")


def test_deviations_with_n_or_with_n_minus_1(one, capsys):
    """Those of one text are of one sort."""
    text = "The sd of the loss is {}, the sd of the time {} s; the sd of the time in ms: {} ms."
    for numbers in (("0.0015", "0.1023", "102"), ("0.0016", "0.1143", "114")):
        assert {v for _, v in verdicts(one, text.format(*numbers), capsys)} == {"supported"}
    assert ("loss sd", "contradicted") in verdicts(one, text.format("0.0015", "0.1143", "114"), capsys)


# -- tables

ROWS = """
| run | n | steps | Time μ | Time σ | Time +/- | Loss μ | Loss σ | p |
|---|--:|--:|--:|--:|--:|--:|--:|--:|
| baseline | 4 | 1450 | 75.3935 | 0.0973 | 0.0000 | 3.2780 | 0.0010 | 0.0129 |
| this PR | 5 | 1400 | 70.1880 | 0.1143 | -5.2055 | 3.2735 | 0.0016 | 0.0004 |
"""
BLANKS = "```\n" + "\n".join(
    "  ".join(cell.strip().rjust(9) for cell in line.strip("|").split("|"))
    for line in ROWS.replace("run ", "    ").strip().split("\n") if "--" not in line) + "\n```\n"
COLUMNS = """
| | baseline (n=4) | this_pr (n=5) | delta |
|---|---|---|---|
| steps | 1450 | 1400 | -50 |
| mean val_loss | 3.27803 | 3.2735 | -0.00453 |
| val_loss std | 0.00096 | 0.00164 | |
| train_time mean (ms) | 75393.5 | 70188.0 | **-5205.5** |
| p(mean<3.28) | 0.0129 | 0.0004 | |
"""
STATISTICS = """
| | mean | std | min | max |
|---|---|---|---|---|
| val_loss | 3.27350 | 0.00164 | 3.2711 | 3.2752 |
| train_time (ms) | 70188.0 | 114.3 | 70043 | 70333 |
"""


@pytest.mark.parametrize("table", [ROWS, BLANKS, COLUMNS])
def test_tables_that_are_true(both, capsys, table):
    found = verdicts(both, table, capsys)
    assert {v for _, v in found} == {"supported"} and len(found) >= 12


@pytest.mark.parametrize(("old", "new"), [
    ("| 4 |", "| 6 |"), ("| 1400 |", "| 1450 |"), ("75.3935", "70.1880"), ("70.1880", "66.1880"), ("0.1143", "0.0973"),
    ("3.2780", "3.2735"), ("3.2735", "3.1735"), ("0.0016", "0.0010"), ("0.0004", "0.0129"), ("-5.2055", "-4.2055")])
def test_rows_with_a_false_number(both, capsys, old, new):
    """Numbers of the other arm too: the row is about the arm that its other numbers are of."""
    for table in (ROWS, BLANKS.replace("        ", " ")):
        if old.strip("| ") in table:
            at = table.replace(old, new, 1) if old in table else table.replace(old.strip("|"), new.strip("|"), 1)
            assert [v for _, v in verdicts(both, at, capsys)].count("contradicted") == 1


@pytest.mark.parametrize(("old", "new"), [
    ("n=5", "n=4"), ("1400", "1450"), ("3.27803", "3.2735"), ("0.00164", "0.00096"), ("70188.0", "75393.5"),
    ("0.0129", "0.0004"), ("-5205.5", "-4205.5"), ("-0.00453", "-0.0153")])
def test_columns_with_a_false_number(both, capsys, old, new):
    found = verdicts(both, COLUMNS.replace(old, new, 1), capsys)
    assert [v for _, v in found].count("contradicted") == 1


def test_rows_of_other_runs_are_not_found(both, capsys):
    row = "| another idea | 7 | 1500 | 81.2 | 0.21 | 5.8 | 3.2811 | 0.0021 | 0.31 |\n"
    found = verdicts(both, ROWS + row, capsys)
    assert {v for _, v in found} == {"supported", "not found"} and [v for _, v in found].count("not found") >= 7


def test_statistics_of_an_arm_are_checked_against_it(both, capsys):
    """`mean` and so on name the columns, the rows say of what."""
    for name in ("this_pr", "baseline"):
        found = verified(both, STATISTICS, capsys, name=f"{name}/statistics.md")
        said = {claim["verdict"] for claim in found}
        assert said == ({"supported"} if name == "this_pr" else {"contradicted"}) and len(found) == 8
        assert {claim["file"] for claim in found} == {f"{name}/statistics.md"}


@pytest.mark.parametrize(("old", "new", "kind"), [
    ("3.27350", "3.27450", "loss mean"), ("0.00164", "0.00264", "loss sd"), ("3.2711", "3.2729", "loss min"),
    ("3.2752", "3.2748", "loss max"), ("70188.0", "71188.0", "time mean"), ("114.3", "149.1", "time sd"),
    ("70043", "70112", "time min"), ("70333", "70254", "time max")])
def test_statistics_with_a_false_number(one, capsys, old, new, kind):
    assert [k for k, v in verdicts(one, STATISTICS.replace(old, new), capsys) if v == "contradicted"] == [kind]


def test_rows_that_name_their_logs(one, capsys):
    table = "| log | val loss | time | steps |\n|---|---|---|---|\n"
    table += "".join(f"| r{i}f4e2a | {loss} | {seconds}s | 1400 |\n"
                     for i, (loss, seconds) in enumerate(zip(LOSSES["record"], TIMES["record"], strict=True)))
    assert {v for _, v in verdicts(one, table, capsys)} == {"supported"}
    for old, new in (("3.2752", "3.2711"), ("70.254s", "70.333s"), ("3.2729", "6.1"), ("| 1400 |", "| 1401 |")):
        assert [v for _, v in verdicts(one, table.replace(old, new, 1), capsys)].count("contradicted") == 1


def test_a_mean_and_its_spread_in_a_cell(one, capsys):
    table = "| group | n | val loss | train s |\n|---|---|---|---|\n| all | 5 | 3.27350 +- {} | 70.19 +- 0.11 |\n"
    assert verdicts(one, table.format("0.00164"), capsys) == [
        ("n", "supported"), ("loss mean", "supported"), ("loss spread", "supported"), ("time mean", "supported"),
        ("time spread", "supported")]
    assert ("loss spread", "contradicted") in verdicts(one, table.format("0.01640"), capsys)


def test_a_table_of_blanks_with_two_labels(one, capsys):
    table = "Hyp  Branch          Runs   Time μ   Loss μ  Loss p\nH0   origin/master_a    5   {}   3.2735  0.0004\n"
    assert {v for _, v in verdicts(one, table.format("70.188"), capsys)} == {"supported"}
    found = verdicts(one, table.format("71.188"), capsys)
    assert ("time mean", "contradicted") in found and ("loss mean", "supported") in found and len(found) == 4


@pytest.mark.parametrize("text", ["1 minute {} seconds", "1 min {} s", "1m{}s", "1 minute and {} seconds"])
def test_minutes_and_seconds_are_one_time(one, capsys, text):
    words = f"The mean time is {text}.\n"
    assert verdicts(one, words.format("10.19"), capsys) == [("time mean", "supported")]
    assert verdicts(one, words.format("20.10"), capsys) == [("time mean", "contradicted")]


# -- arms


def test_whose_number_it_is(both, capsys):
    true = "The baseline has a mean loss of 3.2780 and a mean time of 75.394 s. This PR has a mean time of 70.188 s."
    assert {v for _, v in verdicts(both, true, capsys)} == {"supported"}
    for old, new in (("3.2780", "3.2735"), ("75.394", "70.188"), ("a mean time of 70", "a mean time of 75")):
        assert [v for _, v in verdicts(both, true.replace(old, new), capsys)].count("contradicted") == 1
    for heading in ("## Gain over the baseline", "## vs. baseline"):
        assert verdicts(both, f"{heading}\n\nMean loss 3.2735.\n", capsys) == [("loss mean", "supported")]
    below = "### Baseline\n\nMean loss 3.2780.\n\n### This PR\n\nMean loss {}.\n"
    assert {v for _, v in verdicts(both, below.format("3.2735"), capsys)} == {"supported"}
    assert ("loss mean", "contradicted") in verdicts(both, below.format("3.2780"), capsys)


def test_differences_and_tests_of_two_arms(both, capsys):
    for text in ("The mean time falls by 5.2 s.", "It is 5.2055 s faster.", "This is a reduction of 50 steps.",
                 "These timings show ≈ 5.2 seconds of improvement.", "It is 6.9 % faster.",
                 "Welch's two-sided test of the times: p = 2.7e-11"):
        assert [v for _, v in verdicts(both, text, capsys)] == ["supported"], text
    for text in ("These timings show ≈ 7.2 seconds of improvement.", "- train time: `-4.2 s`",
                 "Welch p-value of the times: 0.03"):
        assert [v for _, v in verdicts(both, text, capsys)] == ["contradicted"], text
    assert [v for _, v in verdicts(both, "Fusing the kernels saves 300 ms.", capsys)] == ["not found"]


def test_words_that_compare(both, capsys):
    for text in ("Compared with the baseline, the mean time is 70.188 s.", "This PR improves the loss to 3.2735.",
                 "Welch's one-sided test of the times: p = 1.33e-11", "This PR has the logs of 9 runs.",
                 "At step 700 it had a loss of 3.5012.", "The mean time was 70188 ms ± 114."):
        assert {v for _, v in verdicts(both, text, capsys)} == {"supported"}, text


def test_intervals_and_effect_sizes(both, one, capsys):
    table = ("| record minus baseline | difference | 95 % interval | p (Welch) | Cohen's d |\n|---|--:|---|--:|--:|\n"
             "| val loss | -0.00453 | -0.00662 to -0.00243 | 0.0016 | -3.38 |\n"
             "| train s | -5.206 | -5.373 to -5.038 | 2.7e-11 | -49.03 |\n")
    found = verdicts(both, table, capsys)
    assert {v for _, v in found} == {"supported"} and len(found) == 10
    for old, new in (("0.0016 ", "0.0061 "), ("2.7e-11", "2.7e-3"), ("-3.38", "-1.38"), ("-5.206", "-6.206")):
        assert [v for _, v in verdicts(both, table.replace(old, new), capsys)].count("contradicted") == 1
    assert ("loss interval", "supported") in verdicts(one, "The 95 % confidence interval of the loss: 3.2715.", capsys)
    assert ("loss interval", "contradicted") in verdicts(one, "The 95 % confidence interval of the loss: 3.26.", capsys)


def test_what_stats_writes_is_true(both, one, capsys):
    for folder in (one, both):
        logger.main(["stats", str(folder), "--target", "3.28", "--markdown"])
        text = capsys.readouterr().out
        found = verified(folder, text, capsys, name="statistics.md")
        assert {claim["verdict"] for claim in found} == {"supported"} and len(found) > 15


# -- what bounds it


def test_which_texts_are_read(both, capsys):
    (both / "baseline" / "notes.md").write_text("Mean loss 4.0\n")
    found = verified(both, "Mean loss 3.2735\n", capsys)
    (both / "baseline" / "notes.md").unlink()
    assert [claim["file"] for claim in found] == ["README.md"]
    assert [path.name for path in verifying.texts_of(both)] == []


def test_more_than_is_checked_is_said(one, capsys, monkeypatch):
    found = verified(one, "p = 0.0004 and " * 3000, capsys)
    assert ("text", "not found") in [(claim["kind"], claim["verdict"]) for claim in found]
    monkeypatch.setattr(verifying, "MAX_TEXT", 40)  # of both texts
    found = verified(one, "Mean loss 3.2735, n = 5, p = 0.0004.", capsys, name="statistics.md")
    assert ("text", "not found", "statistics.md") in [(c["kind"], c["verdict"], c["file"]) for c in found]


@pytest.mark.parametrize("piece", [
    "p(mean<3.28) = 0.01\n", "|3.27|3.28|\n", "loss  time  n  p\n1.1 2.2 3 4\n", "<!--", "![", "mean 3.271 s, ", "1,1.",
    "\n", "](", "[1.1, ", "word. ", "vs ", "± 1 ", "```", "all runs < 3.2, ", "3.29 to 3.28 (1%) ", "loss: 3.3\n",
    "|a|time|loss|\n" + "|1|70.2s|3.27|\n" * 100])
def test_the_time_is_linear(piece):
    groups = [facts.Group("record", "record", LOSSES["record"], TIMES["record"], [1400])]
    times = []
    for size in (5_000, 50_000):
        start = time.process_time()
        verifying.check_text(piece * (size // len(piece)), groups, 3.28)
        times.append(time.process_time() - start)
    assert times[1] < 30 * times[0] + 1


def test_numbers_as_they_are_written():
    def read(text):
        found = map(wording.number_of, wording.NUMBER.finditer(text))
        return [(number.value, number.digit) for number in found if number]

    assert read("70,188.5 ms") == [(70188.5, 0.1)]
    assert read("1.5e-4, -3 and +.5") == [(1.5e-4, 1e-5), (-3, 1), (0.5, 0.1)]
    assert read("1.2.3, v3, 3D, H100, #12, a-1, 2026-12, 1,2, 8xH100, 124M") == []


# -- versions


@pytest.mark.parametrize(("old", "new", "truth"), [
    ("0.05", "0.06", "contradicted"),
    ('{"seed": 1}', '{"seed": 2}', "contradicted"), ("seed = 1", "seed = 2", "supported"),
    ("# one", "# two", "supported")])
def test_versions_are_those_of_the_statistics(tmp_path, capsys, old, new, truth):
    """What `stats` calls a mixture is none of one version, even where a setting is called seed."""
    code = CODE + 'seed = 1  # one\nCONFIG = {"seed": 1}\n'
    write_logs(tmp_path / "a" / "logs", "record", code)
    path = next((tmp_path / "a" / "logs").glob("*.txt"))
    path.write_text(path.read_text().replace(old, new))
    (tmp_path / "a" / "README.md").write_text("# Nothing\n")
    logger.main(["verify", str(tmp_path / "a"), "--json"])
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [c["verdict"] for c in checks if c["kind"] == "code"] == [truth]
    logger.main(["stats", str(tmp_path / "a"), "--target", "3.28", "--json"])
    assert bool(json.loads(capsys.readouterr().out)["mixture"]) == (truth == "contradicted")


# -- what an independent review found


def contradictions(folder, text, capsys):
    found = [claim for claim in verified(folder, text, capsys) if claim["verdict"] == "contradicted"]
    return [(claim["kind"], claim["claim"].lstrip("≈<= ")) for claim in found]


RUNS = "| seed | val loss | train time |\n|--:|--:|--:|\n" + "".join(
    f"| {i} | {loss} | {seconds}s |\n" for i, (loss, seconds) in
    enumerate(zip(LOSSES["record"], TIMES["record"], strict=True)))


@pytest.mark.parametrize(("old", "new", "kind"), [
    ("70.254s", "81.288s", "time"), ("70.254s", "70.255s", "time"), ("3.2752", "3.2763", "loss"),
    ("70.254s", "70.333s", "time")])  # the last one is that of another run
def test_rows_of_runs_that_name_no_log(one, both, capsys, old, new, kind):
    """The other numbers of a row say which run it is."""
    for folder in (one, both):
        assert {v for _, v in verdicts(folder, RUNS, capsys)} == {"supported"}
        found = contradictions(folder, RUNS.replace(old, new), capsys)
        assert (kind, new.replace("s", " s")) in found and (len(found) == 1 or new == "70.333s")


def test_a_row_of_runs_that_are_not_here(one, capsys):
    for row in ("| 9 | 3.2799 | 71.001s |\n", "| 9 | 3.2799 | 70.9s |\n", "| all | 3.2735 | 70.188s |\n"):
        assert contradictions(one, RUNS + row, capsys) == [], row
    other = RUNS.replace("3.27", "3.26").replace("3.2648", "3.2748")  # one loss of five is here by chance
    assert contradictions(one, other.replace("70.", "71."), capsys) == []


def test_rows_that_name_a_log_in_any_column_or_a_seed(tmp_path, capsys):
    folder = tmp_path / "named"
    write_logs(folder / "logs", "record")
    for i, path in enumerate(sorted((folder / "logs").glob("*.txt"))):
        path.rename(path.with_name(f"{path.stem}_seed{i + 40}.txt"))
    head = "| i | {} | val loss |\n|---|---|---|\n"
    for name, word in (("log", "r{}f4e2a_seed4{}.txt"), ("seed", "4{1}")):
        text = head.format(name) + "".join(f"| {i} | {word.format(i, i)} | {loss} |\n"
                                           for i, loss in enumerate(LOSSES["record"]))
        assert {v for _, v in verdicts(folder, text, capsys)} == {"supported"}
        for new in ("3.2763", "3.2711"):  # of no run, of another one
            assert contradictions(folder, text.replace("3.2752", new), capsys) == [("loss", new)]


# True is 5.2055 s, 6.90 %, 0.0045, 50 steps
DIFFERENCES = [
    ("This PR is {} seconds (6.9%) faster.", "time difference", "5.21", "4.21"),
    ("5.21 seconds ({}%) faster", "percent difference", "6.9", "4.9"),
    ("{} seconds (6.9%) faster", "time difference", "5.21", "2.98"),
    ("The mean loss falls by {}.", "loss difference", "0.0045", "0.0031"),
    ("Loss of the baseline: 3.2780, and it falls by {}.", "loss difference", "0.0045", "0.0031"),
    ("The mean time: 75.39s to {}s.", "time mean", "70.19", "71.30"),
    ("The mean time: {}s to 70.19s.", "time mean", "75.39", "74.98"),
    ("Loss: {} → 3.2735", "loss", "3.2780", "3.2790"),
]


@pytest.mark.parametrize(("text", "kind", "true", "false"), DIFFERENCES)
def test_differences_of_two_arms_in_sentences(both, one, capsys, text, kind, true, false):
    assert contradictions(both, text.format(true), capsys) == []
    assert [k.split()[0] for k, _ in contradictions(both, text.format(false), capsys)] == [kind.split()[0]]
    said = [k for k, _ in verdicts(both, text.format(true), capsys)]
    assert kind in said or kind == "loss"
    if "difference" in kind:
        assert contradictions(one, text.format(false), capsys) == []


@pytest.mark.parametrize("text", [
    "Fusing the kernels saves 300 ms.", "Another change is 0.3 s (0.4%) faster.", "PR #123 is 0.3 s (0.4%) faster.",
    "The loss of record 59 falls by 0.0031.", "The times are from 70.04 to 70.34 s.", "Losses: 3.2711 - 3.2752"])
def test_differences_of_something_else(both, capsys, text):
    assert contradictions(both, text, capsys) == []


def test_a_row_of_differences(both, capsys):
    table = "| arm | mean loss | mean time (s) |\n|---|---|---|\n| baseline | 3.2780 | 75.394 |\n"
    table += "| this PR | 3.2735 | 70.188 |\n| diff | -0.0045 | -5.206 |\n"
    table = table.replace("mean ", "")
    assert {v for _, v in verdicts(both, table, capsys)} == {"supported"}
    for old, new in (("-0.0045", "-0.0031"), ("-5.206", "-2.98")):
        assert [text for _, text in contradictions(both, table.replace(old, new), capsys)] == [new]


def test_what_is_said_of_all_runs(one, both, capsys):
    for folder in (one, both):
        for text in ("All 5 runs under 70.4 s.", "All 5 runs are below 3.28.", "Every run stays under 3.2753.",
                     "The mean of all runs is below 3.274.", "Not all runs are below 3.274."):
            assert contradictions(folder, text, capsys) == [], text
        for text, number in (("All 5 runs under 70.3 s.", "70.3 s"), ("Every run stays under 3.275.", "3.275"),
                             ("All of the 5 seeds are below 3.2750.", "3.2750")):
            assert [word for _, word in contradictions(folder, text, capsys)] == [number], text
    baseline = "All 5 runs of the record are below 3.2780; all 4 runs of the baseline are below {}."
    assert contradictions(both, baseline.format("3.28"), capsys) == []
    assert contradictions(both, baseline.format("3.2785"), capsys) == [("loss max", "3.2785")]


def test_all_runs_below_the_target(tmp_path, capsys):
    folder = tmp_path / "above"
    write_logs(folder, "record")
    path = next(iter(sorted(folder.glob("*.txt"))))
    path.write_text(path.read_text().replace("val_loss:3.2711", "val_loss:3.2811"))
    assert contradictions(folder, "All 5 runs are below 3.28.", capsys) == [("loss max", "3.28")]
    assert contradictions(folder, "The mean loss is below 3.28.", capsys) == []


def test_one_log_of_many(tmp_path, one, capsys):
    folder = tmp_path / "single"
    write_logs(folder, "record")
    for path in sorted(folder.glob("*.txt"))[1:]:
        path.unlink()
    for text in ("I made 40 runs.", "n = 160", "| arm | n | loss |\n|---|---|---|\n| all | 40 | 3.2711 |\n"):
        assert ("n", "not found") in verdicts(folder, text, capsys), text
        assert ("n", "contradicted") in verdicts(one, text, capsys), text


def test_labels_at_the_begin_of_a_line_and_within(one, capsys):
    for text, true, false in (("Loss: {}", "3.2735", "3.2769"), ("- **Loss:** {}", "3.2711", "3.2769"),
                              ("It is good,\nFinal val loss: {}\nand so on", "3.2735", "3.2769"),
                              ("Time: {} s", "70.188", "71.3"), ("On 8 GPUs, Steps: {} and so on.", "1400", "1300"),
                              ("8 GPUs\nSteps: {}\nand so on", "1400", "1300")):
        assert [v for _, v in verdicts(one, text.format(true), capsys)] == ["supported"], text
        assert [v for _, v in verdicts(one, text.format(false), capsys)] == ["contradicted"], text
    for text in ("8 GPUs, warm-up steps: 300", "8 GPUs\nCooldown steps: 300", "Baseline loss: 3.2769"):
        assert contradictions(one, text, capsys) == [], text


def test_a_p_that_is_printed_below_its_question(one, capsys):
    text = "```python\n>>> stats.ttest_1samp(losses, 3.28, alternative='less').pvalue\n{}\n```\n"
    for form in ("{}", "np.float64({})", "# {}"):
        assert ("p", "supported") in verdicts(one, text.format(form.format("0.00044")), capsys)
        assert [k for k, _ in contradictions(one, text.format(form.format("0.0031")), capsys)] == ["p"]
    assert verdicts(one, "```\nx = 1\n0.0031\n```\n", capsys) == []


def test_a_mean_that_is_printed_below_its_question(one, capsys):
    text = "```python\nprint(f'{{np.mean(times):.4f}}')\n# {}\n```\n"
    assert verdicts(one, text.format("70.1880"), capsys) == [("time mean", "supported")]
    assert verdicts(one, text.format("69.1880"), capsys) == [("time mean", "contradicted")]


def test_a_p_below_its_list(one, capsys):
    """Of runs of the record that the README calls the baseline's: there is no baseline to compare with."""
    text = "Previous record, timed here:\n\n```\nlosses = [3.2711, 3.2735, 3.2752]\n\n# p={}\n```\n"
    p = facts.tests_of([3.2711, 3.2735, 3.2752], 3.28)["p"][0]
    assert ("p", "supported") in verdicts(one, text.format(f"{p:.4f}"), capsys)
    assert contradictions(one, text.format("0.0640"), capsys) == [("p", "p = 0.0640")]


def test_code_in_one_line_opens_no_block(one, capsys):
    found = verdicts(one, "```n = 5```\n\n# Loss\n\nThe mean\nloss is 3.2735, p = 0.0004.\n", capsys)
    assert found == [("n", "supported"), ("loss mean", "supported"), ("p", "supported")]
