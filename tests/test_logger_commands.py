"""Tests of logger.py's commands on logs made here: statistics by hand, diffs, claims, sources, exports, exit codes."""

import csv
import io
import json
import math
import re
import statistics
import subprocess
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import logger
from runlogs import arms, drawing, facts, judging, leaderboard, loading, parsing, verifying

ROOT = Path(__file__).resolve().parents[1]
QUICK = settings(deadline=None, database=None, max_examples=30)
BAR = "=" * 100 + "\n"
MACHINE = "Running Python 3.11.1\nRunning PyTorch 2.9.0 compiled for CUDA 12.6\nRunning on CPU: Chip, 2 threads\n"
CODE = '''"""A trainer."""
import os
from dataclasses import dataclass

RATE, BLOCK = 0.05, 64
PRESETS: dict = {"cpu": dict(width=192, steps=(1, 2)), "gpu": dict(width=768)}


@dataclass
class Args:
    """Settings."""

    steps: int = 100  # of training
    floor: float = 0.1

    def total(self):
        return self.steps * BLOCK


def get_lr(step, cooldown=0.4):
    """Rate at a step."""
    if step < 10:
        return 1.0
    return 0.1 * cooldown


def helper():
    return [1,
            2]


optimizer = Muon(params, lr=RATE, momentum=0.95)
for epoch in range(3):
    helper()
'''


def log_text(loss=3.25, seconds=1.0, code=CODE, machine=MACHINE, count=4, tail=""):
    """A run of `count` steps with three validations."""
    lines = ""
    for step in range(count + 1):
        ms = 1000 * seconds * step / count
        lines += f"step:{step}/{count} train_time:{ms:.3f}ms step_avg:{ms / max(1, step):.2f}ms\n" if step else ""
        if step in (0, count // 2, count):
            value = loss + (count - step) / count
            average = ms / max(1, step)
            lines += f"step:{step}/{count} val_loss:{value:.5f} train_time:{ms:.3f}ms step_avg:{average:.2f}ms\n"
    return code + BAR + machine + BAR + lines + tail


def make_group(folder, losses, seconds=None, **options):
    """A folder with a log for each loss; the times differ by a millisecond unless given."""
    folder.mkdir(parents=True)
    for i, loss in enumerate(losses):
        text = log_text(loss, (seconds or [1 + k / 1000 for k in range(len(losses))])[i], **options)
        (folder / f"run_{i}.txt").write_text(text)
    return folder


def make_ours(folder, losses, seed=0, stages=((64, 32),), **changes):
    """A run folder of train_gpt.py: steps of 10 ms, a validation every second step."""
    folder.mkdir(parents=True)
    rows = []
    for step, loss in enumerate(losses, 1):
        batch, seq_len = stages[(step - 1) * len(stages) // len(losses)]
        rows.append({"step": step, "train_loss": loss, "batch_tokens": batch, "seq_len": seq_len, "tokens": 64 * step,
                     "train_time_ms": 10.0 * step})
        rows += [{"step": step, "val_loss": loss, "tokens": 64 * step, "train_time_ms": 10.0 * step}] * (step % 2 == 0)
    count = len(losses)
    rows.append({"event": "end", "status": "done", "step": count, "iterations": count, "val_loss": losses[-1],
                 "train_time_ms": 10.0 * count, "peak_memory_mib": 5})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"seed": seed, "run_id": folder.name, "width": 32} | changes
    (folder / "config.json").write_text(json.dumps({"settings": values, "torch": "2.13.0", "world_size": 1}))
    (folder / "log.txt").write_text(log_text(losses[-1]))
    return folder


def command(capsys, *argv):
    """(exit code, standard output, standard error) of a command."""
    code = logger.main(list(map(str, argv)))
    return code, *capsys.readouterr()


def numbers(capsys, *argv, code=0):
    """The JSON that a command prints."""
    found, out, err = command(capsys, *argv, "--json")
    assert (found, err) == (code, "")
    return json.loads(out, parse_constant=pytest.fail)


def error(capsys, *argv):
    """The one line of an error."""
    code, out, err = command(capsys, *argv)
    assert (code, out, err.count("\n")) == (1, "", 1) and err.startswith("error: ")
    return err


# -- statistics


def test_t_test_by_hand():
    """Of three values t has two degrees of freedom: its distribution function is 1/2 + t / (2 sqrt(2 + t^2))."""
    p = judging.below_target([3.270, 3.275, 3.280], 3.280)
    assert p == pytest.approx(0.5 - math.sqrt(3) / (2 * math.sqrt(5)), rel=1e-9)
    assert judging.below_target([3.2], 3.28) is None and judging.below_target([3.2, 3.2], 3.28) is None


def test_welch_by_hand():
    """Means 6 and 1, variances 2, n = 2 each: standard error sqrt(2), two degrees of freedom, t_0.975 = 4.302653."""
    test = judging.welch([5, 7], [0, 2])
    t = 5 / math.sqrt(2)
    assert test["difference"] == 5 and test["p_value"] == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    half = 4.302652729911275 * math.sqrt(2)
    assert (test["ci_low"], test["ci_high"]) == pytest.approx((5 - half, 5 + half), rel=1e-9)
    assert test["cohens_d"] == pytest.approx(5 / math.sqrt(2))
    assert judging.welch([1], [2, 3]) is None and judging.welch([1, 1], [2, 2]) is None
    assert judging.welch([5, 7, math.nan, None], [0, 2]) == test


@QUICK
@given(st.floats(1e-4, 0.05), st.floats(1e-4, 0.05))
def test_runs_needed_is_the_first_that_passes(margin, sd):
    from scipy.stats import t

    needed = judging.runs_needed(margin, sd)
    p = [t.sf(margin * math.sqrt(n) / sd, n - 1) for n in range(2, (needed or 100) + 1)]
    assert p[-1] < 0.01 or needed is None
    assert all(value >= 0.01 for value in p[:-1])


def test_runs_needed_limits_and_detectable_margin():
    assert judging.runs_needed(0, 1) is None and judging.runs_needed(1, 0) == 2 and judging.runs_needed(1e-9, 1) is None
    losses = [3.27, 3.272, 3.275, 3.271]
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    margin = judging.detectable_margin(4, sd, alpha=0.05)
    assert judging.below_target(losses, mean + margin) == pytest.approx(0.05)


def test_track_3_rules(tmp_path):
    old, new = make_group(tmp_path / "a", [3.28, 3.28], count=8), make_group(tmp_path / "b", [3.279, 3.279], count=4)
    a, b = (arms.evidence_of([str(path)]).arm("record").samples for path in (old, new))
    rule = judging.pairwise_rule(a, b)
    assert rule["value"] == pytest.approx(0.001 + 4 * 0.000045) and not rule["passed"]
    test = judging.target_numbers(b, 3.282)
    assert test["sigma_rule"] == {"value": pytest.approx(0.003 * math.sqrt(2)), "passed": True}
    assert test["p_value"] is None and not test["passed"]


def test_stats(tmp_path, capsys):
    losses = [3.2750, 3.2760, 3.2770, 3.2780]
    group = make_group(tmp_path / "group", losses)
    found = numbers(capsys, "stats", group, "--target", 3.28)
    assert (found["n"], found["steps"], sorted(found["losses"])) == (4, [4], losses)
    assert found["mean_val_loss"] == pytest.approx(3.2765)
    assert found["sd_val_loss"] == pytest.approx(0.001 * math.sqrt(5 / 3), rel=1e-9)
    assert found["mean_time_s"] == pytest.approx(1.0015) and found["mean_step_ms"] == pytest.approx(250.375, rel=1e-4)
    assert found["test"]["passed"] and found["test"]["more_runs"] == 0 and found["warnings"] == []
    code, out, _ = command(capsys, "stats", group, "--target", 3.277)
    assert code == 1 and "not passed (p < 0.01)" in out and re.search(r"\d+ runs are needed, \d+ more", out)
    assert "no number of runs" in command(capsys, "stats", group, "--target", 3.2)[1]
    assert numbers(capsys, "stats", group)["test"] is None
    code, out, _ = command(capsys, "stats", group, "--target", 3.28, "--markdown")
    assert code == 0 and "| leg | seed | log | steps | loss | train s |" in out and "|--:|" in out


def test_stats_warns(tmp_path, capsys):
    group = make_group(tmp_path / "group", [3.2750, 3.2760])
    other = CODE.replace("0.1\n", "0.2\n")
    for name, text in {
        "code": log_text(3.277, 1.5, code=other), "again": log_text(3.2750, 1.0), "died": log_text(3.2)[:-90],
        "torch": log_text(3.276, 1.6, machine=MACHINE.replace("2.9.0", "2.8.0").replace("Chip", "Other chip")),
        "steps": log_text(3.277, 1.7, count=8), "own_end": log_text(3.27, 1.8).replace("/4 ", "/9 ") + "peak memory "
        "allocated: 1 MiB reserved: 1 MiB\n", "nan": log_text(3.2).replace("3.20000", "nan"), "note": "hello\n",
    }.items():
        (group / f"{name}.txt").write_text(text)
    found = numbers(capsys, "stats", group)
    assert found["n"] == 6
    text = "\n".join(found["warnings"])
    assert "2 code versions mixed: 5 of " in text and "(other Args.floor)" in text
    for expected in ("mixed hardware: Chip, Other chip", "mixed torch versions: 2.8.0, 2.9.0", "step counts: 4, 8",
                     "stopped by themselves before the last step", "died.txt: died at step 4", "nan.txt: nan at step 4",
                     "run_0.txt: the same run as again.txt"):
        assert expected in text
    assert "note.txt" not in text


def test_clock_resets_and_seeds_are_told(tmp_path, capsys):
    reset = log_text().replace("train_time:250", "train_time:9250")
    (tmp_path / "a.txt").write_text(reset)
    found = numbers(capsys, "stats", tmp_path)
    assert found["warnings"] == ["the clock was set back in 1 run: the time before is left out"]
    for i, seed in enumerate((1, 2, 2)):
        make_ours(tmp_path / "ours" / str(i), [4.0, 3.0 + i / 100], seed=seed)
    assert numbers(capsys, "stats", tmp_path / "ours")["warnings"] == [
        "1 run with the seed of another one: no independent samples"]


def test_other_seeds_and_comments_are_one_version(tmp_path, capsys):
    group = make_group(tmp_path / "group", [3.2750, 3.2760], code=CODE + "SEED = 1\n")
    (group / "c.txt").write_text(log_text(3.277, 1.5, code=CODE + "SEED = 2\n"))
    (group / "d.txt").write_text(log_text(3.278, 1.6, code=CODE + "SEED = 1  # one\n"))
    found = numbers(capsys, "stats", group)["warnings"]
    assert found == ["3 sources of 1 code version(s): the others differ in "
                     "comments, blank lines, seeds or names of runs alone"]


def test_trials_of_one_file_are_samples(tmp_path, capsys):
    steps = log_text(3.27).rpartition(BAR)[2] + log_text(3.272, 1.1).rpartition(BAR)[2]
    (tmp_path / "a.txt").write_text(log_text(3.271, 1.2) + steps)
    found = numbers(capsys, "stats", tmp_path, "--target", 3.28)
    assert (found["n"], found["losses"], found["test"]["passed"]) == (3, [3.271, 3.27, 3.272], True)


# -- show


def test_show_json_keys(tmp_path, capsys):
    group = make_group(tmp_path / "a", [3.25])
    (group / "junk.txt").write_text("W0506 warning\n")
    found = numbers(capsys, "show", group)
    assert list(found) == ["runs"]
    run, junk = sorted(found["runs"], key=lambda run: run["status"])
    expected = {"path": str(group / "run_0.txt"), "status": "complete", "final_val_loss": 3.25, "train_time_s": 1.0,
                "steps": 4, "max_step": 4, "trials": 1, "target_crossing": {"step": 4, "train_time_s": 1.0}}
    assert expected.items() <= run.items() and list(run)[0] == "path"
    assert junk["status"] == "not a log" and junk.keys() == run.keys()
    assert numbers(capsys, "show", group / "run_0.txt", "--target", 3.0)["runs"][0]["target_crossing"] is None


def test_show_screens_tables_and_exit_codes(tmp_path, capsys):
    group = make_group(tmp_path / "a", [3.25 + i / 1000 for i in range(12)])
    code, out, _ = command(capsys, "show", group / "run_0.txt")
    assert code == 0 and "final val loss  3.25" in out and "target 3.28     step 4, 1.0 s" in out
    code, out, _ = command(capsys, "show", group, "--strict")
    place, _, *rows, count, left_out = out.splitlines()
    assert code == 0 and place == f"in {group}/" and count == "12 files: 12 complete"
    assert [row.split()[0] for row in rows] == [f"run_{i}.txt" for i in range(12)] and "--wide" in left_out
    (group / "died.txt").write_text(log_text()[:-90])
    code, out, _ = command(capsys, "show", group / "died.txt")
    assert code == 0 and "died at step 4 of 4" in out
    assert command(capsys, "show", group, "--strict")[0] == 1
    (group / "junk.txt").write_text("nothing\n")
    code, out, _ = command(capsys, "show", group / "junk.txt")
    assert code == 1 and out == f"not a log: {group / 'junk.txt'} (it holds no step line)\n"


def test_show_reads_our_runs(tmp_path, capsys):
    path = make_ours(tmp_path / "exp" / "run", [4.0, 3.5])
    run = numbers(capsys, "show", tmp_path / "exp")["runs"][0]
    expected = {"path": str(path), "status": "complete", "final_val_loss": 3.5, "train_time_s": 0.02, "steps": 2,
                "tokens": 128, "peak_allocated_mib": 5, "torch": "2.13.0", "era": "ours, metrics.jsonl"}
    assert expected.items() <= run.items() and run["code_hash"]


def test_globs_and_folders_name_each_log_once(tmp_path):
    make_group(tmp_path / "a", [3.25, 3.26])
    make_ours(tmp_path / "b" / "run", [4.0, 3.5])
    names = [tmp_path, tmp_path / "a", tmp_path / "*" / "*.txt", tmp_path / "b" / "run"]
    found = loading.expand(map(str, names))
    assert [path.name for path in found] == ["run_0.txt", "run_1.txt", "run"]


def test_unreadable_and_missing_logs(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert "'nowhere.txt' is not there" in error(capsys, "show", "nowhere.txt")
    assert "holds no log: expected run folders, *.txt or *.log" in error(capsys, "stats", tmp_path / "empty")
    (tmp_path / "a.txt").write_text("no step\n")
    assert "no complete run in" in error(capsys, "stats", tmp_path / "a.txt")
    for name in ("compare", "diff"):
        assert "a.txt' holds no" in error(capsys, name, tmp_path / "a.txt", tmp_path / "a.txt")
    assert "needs two groups" in error(capsys, "compare", tmp_path / "a.txt")
    run = loading.load_one(tmp_path / "gone.txt")
    assert run.trace.notes == ["cannot be read: No such file or directory"]


@pytest.mark.parametrize("argv", [[], ["show"], ["nonsense"], ["stats", "a", "--target", "x"], ["diff", "a"],
                                  ["export", "a", "--format", "xml"]])
def test_wrong_usage_is_exit_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        logger.main(argv)
    assert stop.value.code == 2 and "usage:" in capsys.readouterr().err


def test_starts_without_heavy_imports(tmp_path):
    path = make_group(tmp_path / "a", [3.25]) / "run_0.txt"
    code = "import sys, logger; logger.main(sys.argv[1:]); print({'numpy', 'scipy', 'rich', 'tqdm'} & set(sys.modules))"
    for argv in (["show", path], ["--help"]):
        line = [sys.executable, "-c", code, *map(str, argv)]
        out = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert out.endswith("set()\n") or "Exit codes" in out


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2))
KEYS = ("step", "val_loss", "train_loss", "event", "status", "tokens", "train_time_ms", "iterations", "batch_tokens",
        "lr", "window", "seed", "settings", "hardware", "name", "torch", "world_size")
OBJECTS = st.dictionaries(st.sampled_from(KEYS), JSON | st.dictionaries(st.sampled_from(KEYS), JSON, max_size=4))


@QUICK
@given(st.lists(OBJECTS, max_size=5), OBJECTS, st.binary(max_size=80), st.booleans())
def test_no_command_raises(tmp_path_factory, records, config, data, whole):
    """Valid JSON of wrong types, and bytes."""
    base = tmp_path_factory.mktemp("any")
    path = make_ours(base / "run", [4.0, 3.5]) if whole else base / "run"
    path.mkdir(exist_ok=True)
    with open(path / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({"step": 1, "val_loss": 3.0} | record) + "\n" for record in records)
    (path / "config.json").write_text(json.dumps(config))
    (base / "a.txt").write_bytes(log_text().encode() + data)
    (base / "README.md").write_bytes(b"n=3 p=0.01 3.25" + data)
    for argv in (["show", path], ["show", "--json", base], ["stats", base, "--target", 3.3],
                 ["compare", "--no-plot", path, base],
                 ["diff", path, base / "a.txt"], ["verify", base], ["export", base], ["extract", base / "a.txt"],
                 ["--experiment_name", "run", "--log-dir", base, "--no-plot"]):
        assert logger.main(list(map(str, argv))) in (0, 1)


# -- compare


def test_compare(tmp_path, capsys):
    old = make_group(tmp_path / "old", [3.280, 3.282, 3.284], [2.0, 2.1, 2.2], count=8)
    new = make_group(tmp_path / "new", [3.270, 3.272, 3.274], [1.0, 1.1, 1.2], count=8)
    found = numbers(capsys, "compare", old, new)
    assert [(group["name"], group["n"]) for group in found["groups"]] == [("old", 3), ("new", 3)]
    pair = found["pairs"][0]
    assert pair["val_loss"]["difference"] == pytest.approx(-0.01)
    assert pair["train_time_s"]["difference"] == pytest.approx(-1)
    assert pair["val_loss"]["ci_low"] < -0.01 < pair["val_loss"]["ci_high"] < 0 and pair["sigma_rule"]["passed"]
    assert [round(value, 3) for value in found["stages"]["new"].values()] == [137.5] * 4
    steps, times = found["equal"]["step"], found["equal"]["train_time_ms"]
    assert len(steps) == len(times) == 10 and found["equal"]["tokens"] == []
    measured = [point for point in steps if point["measured"]]
    assert [point["at"] for point in measured] == [4, 8]
    assert [mean for point in measured for mean in point["means"]] == pytest.approx([3.782, 3.772, 3.282, 3.272])
    assert times[-1]["at"] == pytest.approx(1000)  # the fastest run of the faster group ends here
    path = tmp_path / "plots" / "c.png"
    code, out, _ = command(capsys, "compare", old, new, "--plot", path)
    assert code == 0 and "-0.01000" in out and out.endswith(f"plot: {path}\n") and path.read_bytes()[1:4] == b"PNG"


def test_compare_of_our_runs_knows_tokens_and_stages(tmp_path, capsys):
    stages = ((64, 32), (128, 32))
    for name, shift in (("a", 0), ("b", 0.5)):
        make_ours(tmp_path / name / "0", [5.0 - i / 2 + shift for i in range(8)], stages=stages)
    found = numbers(capsys, "compare", tmp_path / "a", tmp_path / "b")
    assert found["stages"]["a"] == {"64 tokens a step, seq_len 32": 10.0, "128 tokens a step, seq_len 32": 10.0}
    assert [round(p["means"][1] - p["means"][0], 9) for p in found["equal"]["tokens"]] == [0.5] * 10
    assert found["equal"]["tokens"][-1]["at"] == 512 and found["pairs"][0]["val_loss"] is None
    groups = logger.load_groups([str(tmp_path / "a"), str(tmp_path / "b")])[0]
    assert [ax.get_xlabel() for ax in drawing.compare_figure(groups).axes[2:]] == ["step", "training time (s)"]


def test_groups_of_one_name_stay_apart(tmp_path):
    a, b = make_group(tmp_path / "x" / "logs", [3.2]), make_group(tmp_path / "y" / "logs", [3.3])
    assert list(logger.load_groups([str(a), str(b)])[0]) == [str(a), str(b)]


def change(old, new, code=CODE):
    assert code.count(old) == 1
    return code.replace(old, new)


# -- verify

README = """# A record
Mean val loss 3.27650 over 4 runs (n=4), p=0.0062, in 1.0015 s on average.
losses = [3.2750, 3.2760, 3.2770, 3.2780]
times = [1.000, 1.001, 1.002, 1.003]
The last line of run_0 is `step:4/4 val_loss:3.27500 train_time:1000.000ms step_avg:250.00ms`.
It takes 20 minutes to compile, 3.3 % of the tokens and 17 layers; the baseline got 3.2911.
"""


@pytest.fixture
def record(tmp_path):
    folder = make_group(tmp_path / "2026-01-02_Name", [3.2750, 3.2760, 3.2770, 3.2780])
    (folder / "README.md").write_text(README)
    return folder


def claims(found, word):
    return [claim["claim"] for claim in found["claims"] + found["checks"] if claim["verdict"] == word]


def test_verify_confirms_a_true_record(record, capsys):
    found = numbers(capsys, "verify", record)
    assert found["passed"] and claims(found, "contradicted") == []
    assert claims(found, "not found") == ["20 minutes", "3.2911"]
    assert len(claims(found, "supported")) == 10
    code, out, _ = command(capsys, "verify", record)
    assert code == 0 and "0 contradicted, 2 not found, 7 supported" in out


@pytest.mark.parametrize(("old", "new", "kind"), [
    ("3.27650", "3.27550", "loss mean"), ("(n=4)", "(n=5)", "n"), ("4 runs", "40 runs", "n"),
    ("p=0.0062", "p=0.0001", "p"),
    ("3.2770, ", "3.2700, ", "list of losses"), ("1.002", "0.902", "list of times"),
    ("val_loss:3.27500", "val_loss:3.27400", "step line")])
def test_verify_finds_false_claims(record, capsys, old, new, kind):
    (record / "README.md").write_text(change(old, new, README))
    found = numbers(capsys, "verify", record, code=1)
    assert [c["kind"] for c in found["claims"] if c["verdict"] == "contradicted"] == [kind] and not found["passed"]


def test_verify_finds_mixed_and_broken_sources(record, capsys):
    (record / "other.txt").write_text(log_text(3.2765, 2.0, code=change("return 0.1 *", "return 0.05 *")))
    assert claims(numbers(capsys, "verify", record, code=1), "contradicted") == ["one code version in each group"]
    (record / "other.txt").write_text(log_text(3.2765, 1.0015, code=CODE + "# later\n"))
    assert claims(numbers(capsys, "verify", record), "contradicted") == []
    (record / "other.txt").write_text(log_text(3.2765, 1.0015, code=CODE + "def f(:\n"))
    found = claims(numbers(capsys, "verify", record, code=1), "contradicted")
    assert "the sources in the logs are whole Python files" in found


def test_verify_needs_runs_and_a_readme(record, capsys):
    for log in record.glob("*.txt"):
        log.write_text("no log\n")
    assert "complete runs" in claims(numbers(capsys, "verify", record, code=1), "contradicted")
    (record / "README.md").unlink()
    assert "README.md' is not there" in error(capsys, "verify", record)


@QUICK
@given(st.text(alphabet="pn=<0123456789.,[] runsmeavl:step/-e\n", max_size=200))
def test_any_readme_can_be_checked(text):
    rows = [{"step": 4, "iterations": 4, "val_loss": 3.2, "train_time_ms": 1.0}]
    run = loading.Run(Path("a"), "a", parsing.Trace(rows=rows), {})
    samples = [arms.Sample(run, rows, loss, 1.0, 4, {}) for loss in (3.2, 3.3)]
    groups = [facts.group_of("record", "record", samples)]
    verdicts = {claim["verdict"] for claim in verifying.check_text(text, groups, 3.28)}
    assert verdicts <= {"supported", "contradicted", "not found"}


# -- extract, export, board


def test_extract_gives_the_source_back(tmp_path, capsys):
    extra = "-" * 40 + "\n# kernels.py\n" + "-" * 40 + "\n\nTILE = 8\n"
    log = tmp_path / "a.txt"
    log.write_text(log_text(code=CODE + "\n\n" + extra).replace("\n", "\r\n"), newline="")
    target = tmp_path / "out" / "train.py"
    target.parent.mkdir()
    code, out, _ = command(capsys, "extract", log, "-o", target)
    folder = target.parent / "train"
    assert code == 0 and (folder / "train.py").read_text() == CODE
    assert (folder / "kernels.py").read_text() == "TILE = 8\n"
    assert "they need a new folder" in error(capsys, "extract", log, "-o", target, "--force")
    one = tmp_path / "one.txt"
    one.write_text(log_text())
    assert numbers(capsys, "extract", one, "-o", target)["problems"] == [] and target.read_text() == CODE
    assert numbers(capsys, "extract", one, "-o", target)["problems"] == []  # the same file again is no loss
    target.write_text("mine\n")
    assert "is there and differs" in error(capsys, "extract", one, "-o", target) and target.read_text() == "mine\n"
    assert command(capsys, "extract", one, "-o", target, "--force")[0] == 0 and target.read_text() == CODE
    assert command(capsys, "extract", log)[1] == CODE
    (tmp_path / "b.txt").write_text("s:1 tel:3.2\n")
    assert "holds no source" in error(capsys, "extract", tmp_path / "b.txt")
    assert "is not there" in error(capsys, "extract", tmp_path / "c.txt")


def test_parts_cannot_lead_out_of_the_folder(tmp_path):
    text = CODE + "-" * 40 + "\n# ../evil.py\n" + "-" * 40 + "\nx\n"
    trace = parsing.parse_log(log_text(code=text))
    assert list(trace.parts) == ["train_gpt.py"] and trace.parts["train_gpt.py"] == text


def test_export_csv_and_json(tmp_path, capsys):
    group = make_group(tmp_path / "a", [3.25, 3.26])
    code, out, _ = command(capsys, "export", group)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0 and len(rows) == 14
    assert [row["val_loss"] for row in rows if row["step"] == "4"] == ["", "3.25", "", "3.26"]
    assert {(Path(row["path"]).name, row["trial"]) for row in rows} == {("run_0.txt", "1"), ("run_1.txt", "1")}
    target = tmp_path / "runs.json"
    code, out, err = command(capsys, "export", group, "-o", target)
    assert (code, out, err) == (0, "", f"wrote {target}\n")
    runs = json.loads(target.read_text())["runs"]
    assert [run["final_val_loss"] for run in runs] == [3.25, 3.26] and len(runs[0]["curves"][0]) == 7
    assert numbers(capsys, "export", group)["runs"] == runs
    (tmp_path / "junk.txt").write_text("nothing\n")
    assert "holds a step" in error(capsys, "export", tmp_path / "junk.txt")


def test_export_to_wandb(tmp_path, capsys, monkeypatch):
    calls = []

    class Upload:
        def log(self, values, step):
            calls.append((step, values.get("val_loss")))

        def finish(self):
            calls.append("finish")

    def init(**options):
        calls.append((options["project"], options["name"], options["config"]["steps"]))
        return Upload()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    group = make_group(tmp_path / "a", [3.25])
    assert command(capsys, "export", group, "--wandb", "p")[0] == 0
    assert calls[0] == ("p", "run_0", 4) and calls[-2:] == [(4, 3.25), "finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error(capsys, "export", group, "--wandb", "p")


@pytest.fixture
def boards(monkeypatch):
    """The records that the board's functions were called with."""
    seen = []
    module = types.SimpleNamespace(board_markdown=lambda records: seen.append(records) or "| table |",
                                   board_html=lambda records, title, target: f"<title>{title}</title>")
    monkeypatch.setitem(sys.modules, "runlogs.board", module)
    return seen


def test_board_collects_records(tmp_path, capsys, boards):
    first = make_group(tmp_path / "records" / "2026-01-02_First", [3.25, 3.26])
    (first / "README.md").write_text("# The first\ntext\n")
    make_group(first / "baseline", [3.30])
    (first / "other.txt").write_text(log_text(3.2, 5.0, code=CODE + "x = 1\n"))  # one of another version
    make_ours(tmp_path / "records" / "2026-01-03_Second" / "run", [4.0, 3.5])
    (tmp_path / "records" / "notes").mkdir()
    page = tmp_path / "board.html"
    code, out, err = command(capsys, "board", tmp_path / "records", "--html", page, "--title", "T")
    assert (code, out, err) == (0, "| table |\n", f"page: {page}\n") and page.read_text() == "<title>T</title>"
    one, two = boards[0]
    expected = {"name": "First", "date": "2026-01-02", "folder": "records/2026-01-02_First",
                "readme_title": "The first", "n": 2, "steps": 4, "tokens": None, "gpus": "Chip",
                "torch": "2.9.0", "source": CODE}
    assert expected.items() <= one.items() and one["mean_val_loss"] == pytest.approx(3.255)
    measured = {"mean_val_loss", "sd_val_loss", "mean_time_s", "sd_time_s", "code_hash", "curves", "gain", "log"}
    assert set(one) == set(two) == expected.keys() | measured
    points = [[0, 0.0, 4.25, None], [2, 0.5, 3.75, None], [4, 1.0, 3.25, None]]
    gain = {"time_s": pytest.approx(-0.0005), "percent": pytest.approx(-0.05), "n_record": 2, "n_baseline": 1}
    assert gain.items() <= one["gain"].items() and one["gain"]["ci_low"] is None and two["gain"] is None
    assert one["curves"][0] == {"label": "run_0.txt", "points": points}
    assert (two["name"], two["tokens"], two["sd_val_loss"]) == ("Second", 128, None)
    assert two["curves"][0]["points"] == [[1, 0.01, None, 4.0], [2, 0.02, None, 3.5], [2, 0.02, 3.5, None]]
    assert len(numbers(capsys, "board", tmp_path / "records")["records"]) == 2
    assert [r["name"] for r in numbers(capsys, "board", first)["records"]] == ["First"]


def test_board_without_records(tmp_path, capsys, boards):
    assert "is no folder" in error(capsys, "board", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "no record in" in error(capsys, "board", tmp_path / "empty")


def test_points_are_thinned_but_for_validations():
    rows = [{"step": i, "train_loss": 3.0, "train_time_ms": i} for i in range(5000)]
    rows[7]["val_loss"], rows[1003]["val_loss"] = math.nan, 3.1
    points = loading.points_of(rows)
    assert 400 <= len(points) <= 450 and [1003, 1.003, 3.1, 3.0] in points and all(p[2] in (None, 3.1) for p in points)


def test_settings_of_a_log_without_its_folder_come_from_its_line_about_them(tmp_path, capsys):
    """log.txt alone, as record folders hold it."""
    for name, width in (("a", 32), ("b", 64)):
        text = log_text(3.2, 5.0).split(parsing.SEPARATOR)
        text[-2] += f'Settings: {{"width": {width}, "seed": {width}, "window": [1, 2]}}\n'
        (tmp_path / f"{name}.txt").write_text(parsing.SEPARATOR.join(text))
    found = numbers(capsys, "diff", tmp_path / "a.txt", tmp_path / "b.txt")["settings"]
    assert found == [{"name": "setting width", "a": "32", "b": "64"}]
    assert leaderboard.source_of(loading.load_one(tmp_path / "a.txt")).endswith(
        "# setting width = 32\n# setting window = [1, 2]")
