"""What a review of logger.py's screens and command lines found."""

import pytest

import logger
from runlogs import drawing, facts
from runlogs.reporting import untested_report, wrap

BAR = "=" * 100


def write_runs(folder, losses, gpus=1, source="lr = 0.1\n"):
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        machine = "".join(f"|   {i}  NVIDIA H100 80GB HBM3          On  |\n" for i in range(gpus))
        rows = "".join(f"step:{s}/20 val_loss:{loss + 20 - s:.4f} train_time:{1000 * s + i}ms step_avg:1000.00ms\n"
                       for s in (0, 10, 20))
        (folder / f"{i}.txt").write_text(f"{source}{BAR}\nRunning PyTorch 2.10.0\n{machine}{BAR}\n{rows}")
    return str(folder)


@pytest.fixture
def runs(tmp_path):
    return write_runs(tmp_path / "2026-01-01_x", (3.27, 3.271, 3.272))


@pytest.mark.parametrize("words", [("stats", "--target", "nan"), ("stats", "--target", "inf"),
                                   ("stats", "--alpha", "2"), ("stats", "--alpha", "-1"), ("stats", "--alpha", "nan"),
                                   ("show", "--target", "nan"), ("profile", "--top", "0"), ("profile", "--top", "-1")])
def test_numbers_of_the_command_line_that_mean_nothing_are_refused(runs, words, capsys):
    with pytest.raises(SystemExit) as ended:
        logger.main([words[0], runs, *words[1:]])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"{words[1]}: '{words[2]}'" in error and "expected a number" in error


def test_a_cell_that_no_group_has_is_an_error(runs, capsys):
    assert logger.main(["compare", runs, runs, "--cell", "nothing", "--no-plot"]) == 1
    error = capsys.readouterr().err
    assert "--cell 'nothing' means none" in error and "'all'" in error
    assert logger.main(["compare", runs, runs, "--cell", "all", "--no-plot"]) == 0


def test_numbers_of_records_without_a_folder_of_records_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert logger.main(["diff", "1", "2"]) == 1
    assert "'1' is not there, nor" in (error := capsys.readouterr().err) and "--records" in error
    assert logger.main(["history", "lr", "nowhere"]) == 1
    assert "'nowhere' is no folder of records" in (error := capsys.readouterr().err) and "--records" not in error


def test_groups_without_a_test_take_a_sentence_for_each_reason(tmp_path, capsys):
    pairs = [{"b": b, "sigma_rule": None, "why": why} for b, why in (("b", "x"), ("c", "x"), ("d", "y"))]
    pairs.append({"b": "e", "sigma_rule": {"value": 1, "passed": True}, "why": ""})
    assert untested_report("a", pairs) == ["no test of b, c against a: x; choose with --cell",
                                           "no test of d against a: y; choose with --cell"]
    write_runs(tmp_path / "mixed" / "one", (3.27, 3.28))
    write_runs(tmp_path / "mixed" / "two", (3.27, 3.29), source="lr = 0.2\n")
    assert logger.main(["compare", str(tmp_path / "mixed"), str(tmp_path / "mixed" / "one"), "--no-plot"]) == 0
    out = capsys.readouterr().out
    assert out.count("no test of") == 1 and "p (Welch)" not in out


def test_hardware_without_its_number_has_no_question_mark(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(f"lr = 1\n{BAR}\nNVIDIA H100 80GB HBM3\n{BAR}\n"
                                    "step:1/1 val_loss:3.2 train_time:1000ms step_avg:1000ms\n")
    assert logger.main(["stats", str(tmp_path), "--wide"]) == 0
    assert "? x" not in capsys.readouterr().out
    assert logger.main(["stats", str(tmp_path), "--markdown"]) == 0
    assert "| hardware | not known |" in capsys.readouterr().out


def test_a_log_without_a_loss_is_not_said_to_miss_the_target(tmp_path, capsys):
    (tmp_path / "a.log").write_text("Step 00000 | Validation bpb: 3.1\nStep 00010 | Validation bpb: 1.2\n")
    assert logger.main(["show", str(tmp_path)]) == 0
    assert "bits per byte  1.2" in (out := capsys.readouterr().out) and "not reached" not in out


def test_a_text_that_is_not_read_to_its_end_has_no_line_zero(runs, tmp_path, capsys):
    (tmp_path / "2026-01-01_x" / "README.md").write_text("mean 3.2710\n" + "x" * 30_000)
    assert logger.main(["verify", runs]) == 0
    assert "README.md:1" in (out := capsys.readouterr().out) and "longer than" in out and "README.md:0" not in out


def test_a_p_that_needs_another_target_says_so(tmp_path, capsys):
    folder = write_runs(tmp_path / "x", (1.87, 1.871, 1.872))
    (tmp_path / "x" / "README.md").write_text("The mean loss is below 1.8857, p = 0.00077.\n")
    for target, verdict in (((), "not found"), (("--target", "1.8857"), "supported")):
        assert logger.main(["verify", folder, "--wide", *target]) == 0
        line, = [line for line in capsys.readouterr().out.split("\n") if line.startswith("p ")]
        assert verdict in line and ("the target 3.28, --target names another" in line) == (not target)


@pytest.mark.parametrize("dated", [True, False])
def test_what_stats_writes_is_all_supported(tmp_path, capsys, dated):
    """The leg "P" with the seed 1 beside it is no p, and 8 x NVIDIA no ratio."""
    folder = tmp_path / "2026-01-01_x"
    write_runs(folder, (3.27, 3.271, 3.2715), 8, source="lr = 0.2\n")
    write_runs(folder / "baseline", (3.272, 3.274, 3.277), 8)
    for k, path in enumerate(sorted(folder.rglob("*.txt"))):
        date = f"Running PyTorch 2.10.0+cu128 compiled for CUDA None\nThu Jan  1 00:{k:02d}:00 2026\n"
        path.write_text(path.read_text().replace("Running PyTorch 2.10.0\n", date if dated else ""))
        path.rename(path.with_name(f"seed_{path.name}"))
    assert logger.main(["stats", str(folder), "--target", "3.28", "--markdown"]) == 0
    text = capsys.readouterr().out
    assert "| 8 x NVIDIA H100 80GB HBM3 |" in text and "CUDA None" not in text
    (folder / "statistics.md").write_text(text)
    assert logger.main(["verify", str(folder)]) == 0
    assert "0 contradicted, 0 not found" in capsys.readouterr().out


def test_a_ratio_holds_either_way():
    slow, fast = (facts.Group("", "", [3.2, 3.2], [time, time]) for time in (80.0, 40.0))
    for pair in ((slow, fast), (fast, slow)):
        assert {2.0, 0.5} <= {*facts.ratios_of("ratio", *pair)}


def test_long_names_are_broken_between_their_parts():
    assert wrap("Hyperparameters.num_scheduled_iterations", 25) == ["Hyperparameters.num_", "scheduled_iterations"]
    assert wrap("kernels.py: linear_relu_square(alpha)", 20) == ["kernels.py: linear_", "relu_square(alpha)"]
    assert wrap("kernels.py: linearity_relu_square", 14) == ["kernels.py:", "linearity_", "relu_square"]
    assert "".join(wrap("x" * 50, 20)) == "x" * 50


def test_values_beside_a_panel_stay_above_its_axis():
    places = drawing.spread([1.0, 1.01, 1.02, 3.0], 0.5, 0.9)
    assert places == pytest.approx([0.9, 1.4, 1.9, 3.0])
