"""Dense against mixtures: bench/moe.py runs what it says, compares rightly and says what came out, wins and losses.

Most tests drive it with a stand-in for the trainer, a tiny script that writes what the real one writes.
"""

import importlib.util
import json
import threading
import time
from pathlib import Path

import helpers
import pytest

import train_moe
from bench import common

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_moe", ROOT / "bench" / "moe.py")
moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(moe)

# Loss and step time follow from kind and steps. It fails, hangs or reads other data where files beside it say so.
STAND_IN = """
import json, pathlib, sys, time
here, argv = pathlib.Path(__file__).parent, sys.argv[1:]
last = lambda name: argv[len(argv) - argv[::-1].index(name)]
seed, steps, who = int(last("--seed")), int(last("--iterations")), last("--preset").split("-")[0]
who = "dense" if who == "cpu" and last("--num-experts") == "0" else who
with open(here / "calls", "a") as file:
    file.write(f"{who} {seed} {steps}\\n")
if (here / f"fail-{who}-{seed}").exists():
    sys.exit("error: no luck")
if (here / f"slow-{who}").exists():
    time.sleep(600)
folder = pathlib.Path(argv[argv.index("--log-dir") + 1]) / "x" / "run"
folder.mkdir(parents=True)
gain = {"cpu": 99, "dense": 0, "mixtral": 0.09, "deepseek": -0.05, "speed": 0.2}[who]
loss = 2 + 0.1 * seed - gain + 0.5 * (100 - steps) / 100 * (who != "dense")
ms = {"dense": 10, "mixtral": 12.5, "deepseek": 20, "speed": 10.5}[who]
events = [{"step": i + 1, "step_ms": 1000 if i == 0 else ms, "tokens": 64 * (i + 1)} for i in range(steps)]
events += [{"step": at, "val_loss": loss + (steps - at) / 100, "tokens": 64 * at} for at in (steps // 2, steps)]
events.append({"event": "end", "step": steps, "val_loss": loss})
(folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, events)))
data = {"name": "chars", "fingerprint": "other" if (here / "other").exists() else (here / "fingerprint").read_text()}
(folder / "config.json").write_text(json.dumps({"settings": {"iterations": steps, "stage_ends": [1.0]}, "torch": "9.9",
    "hardware": {"name": "a toy"}, "git": {"commit": "abc", "dirty": False}, "data": data}))
"""
SMALL = ("--width", "32", "--head-dim", "16", "--batch-tokens", "256", "--seq-len", "64", "--max-doc-len", "64",
         "--micro-tokens", "256", "--window", "64", "--eval-tokens", "300", "--device", "cpu", "--threads", "1")


@pytest.fixture
def data(tmp_path):
    folder = helpers.make_data(tmp_path / "chars")
    (tmp_path / "fingerprint").write_text(train_moe.open_corpus(str(folder)).fingerprint())
    return folder


@pytest.fixture
def bench(tmp_path, data, monkeypatch, capsys):
    """bench(*flags, more=flags of all runs) -> (exit code, stdout, stderr), with the stand-in and 100 steps."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(moe, "TRAINER", tmp_path / "stand_in.py")
    monkeypatch.setattr(common.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def call(*flags, more=()):
        code = moe.main(["--data", str(data), "--out", str(tmp_path / "out"), *map(str, flags), "--",
                         *SMALL, "--iterations", "100", *more])
        return code, *capsys.readouterr()

    return call


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]


def report(tmp_path):
    return (tmp_path / "out" / "README.md").read_text()


# The plan


def plan(data, *flags, more=SMALL):
    args = moe.parse_args(["--data", str(data), *flags, "--", *more])
    moe.check(args)
    sweep = moe.make_sweep(args)
    return sweep, moe.make_jobs(sweep, args)


def test_models_are_the_presets_and_a_control_without_experts(data):
    sweep, _ = plan(data, more=())
    parsed = {who: train_moe.parse_settings([*sweep.flags, *m.flags.split()], 1)[0] for who, m in sweep.models.items()}
    assert list(parsed) == ["dense", "mixtral", "deepseek", "speed"]
    assert {who: (s.num_experts, s.router) for who, s in parsed.items() if who != "dense"} == {
        "mixtral": (8, "noisy_topk"), "deepseek": (16, "sigmoid_bias"), "speed": (8, "sigmoid_bias")}
    assert parsed["dense"].num_experts == 0 and not parsed["dense"].save_last
    for who, m in sweep.models.items():
        counts = train_moe.parameter_counts(train_moe.GPT(parsed[who], helpers.VOCAB))
        assert (m.total, m.active) == (counts["total"], counts["active"])
        assert m.flops == train_moe.flops_per_token(parsed[who], counts, train_moe.stage_table(parsed[who])[0])
        assert (m.total > m.active) == (who != "dense")


def test_a_fraction_has_a_schedule_of_its_own(data):
    _, jobs = plan(data, "--seeds", "3", "--fractions", "0.8,1.1", more=(*SMALL, "--iterations", "99"))
    assert [(job.seed, job.who) for job in jobs[:10]] == [
        (0, "dense"), *((0, who) for who in moe.KINDS for _ in range(3))]
    assert len(jobs) == 30 and {job.seed for job in jobs[10:20]} == {1}
    parsed = [train_moe.parse_settings(job.flags(), 1)[0] for job in jobs[:4]]
    assert [s.iterations for s in parsed] == [99, 109, 99, 79]
    assert [s.eval_every for s in parsed] == [17, 0, 17, 0]  # no cost for curves that nobody draws
    assert {s.target_loss for s in parsed} == {0.0}


def test_flags_of_the_kinds_are_not_the_controls(data):
    sweep, jobs = plan(data, "--mixture-flags=--router-lr 0.002")
    assert {job.who for job in jobs if "--router-lr 0.002" in job.change} == set(moe.KINDS)
    assert sweep.key("loss") != plan(data)[0].key("loss")  # their records do not mix


def test_rounds_of_timing_go_there_and_back(data):
    _, jobs = plan(data, "--time", "--pairs", "2")
    assert [(job.seed, job.who) for job in jobs] == [(0, "dense"), (0, "mixtral"), (0, "deepseek"), (0, "speed"),
                                                     (1, "speed"), (1, "deepseek"), (1, "mixtral"), (1, "dense")]
    s = train_moe.parse_settings(jobs[1].flags(), 1)[0]
    assert (s.iterations, s.log_every, s.save_last) == (30, 1, False)


def test_size_names_the_presets(data, monkeypatch):
    monkeypatch.setattr(train_moe, "detect_hardware", lambda device="auto": helpers.H100)
    monkeypatch.setattr(train_moe, "small_shared_memory", lambda device: False)
    monkeypatch.setattr(train_moe.importlib.util, "find_spec", lambda name: name)  # Triton
    sweep, jobs = plan(data, "--size", "speedrun", "--only", "speed", more=())
    assert {who: model.flags for who, model in sweep.models.items()} == {
        "dense": "--preset speedrun --num-experts 0", "speed": "--preset speed-speedrun"}
    assert {job.who for job in jobs} == {"dense", "speed"}


def test_list_runs_nothing(bench, tmp_path):
    code, out, _ = bench("--list")
    assert code == 0 and "21 of 21 to run, about 26 min: 75 s each (a guess)" in out and "| mixtral |" in out
    assert "0 of 3 done  mixtral  --preset mixtral-cpu --iterations 80" in out and not (tmp_path / "out").exists()
    bench("--quick", "--seeds", "1")
    code, out, _ = bench("--list")
    assert "14 of 21 to run" in out and "(measured)" in out and "1 of 3 done  mixtral  --preset mixtral-cpu" in out


# Runs


def test_finished_runs_are_not_repeated(bench, tmp_path):
    assert bench("--only", "speed", "--jobs", "2")[0] == 0
    assert len(calls(tmp_path)) == 9 and set(calls(tmp_path)) == {
        what for seed in range(3) for what in (f"dense {seed} 100", f"speed {seed} 100", f"speed {seed} 80")}
    bench("--only", "speed")
    assert len(calls(tmp_path)) == 9
    bench("--only", "speed", "--fractions", "1,0.5")
    assert calls(tmp_path)[9:] == [f"speed {seed} 50" for seed in range(3)]
    bench("--only", "speed", more=["--muon-lr", "0.01"])  # others: all of it
    assert len(calls(tmp_path)) == 12 + 9
    code, out, _ = bench("--only", "speed")  # the first ones' tables are not mixed with them
    assert code == 0 and len(calls(tmp_path)) == 21 and "| speed | 0.500 | 3,200 |" in out and "| 6 |" not in out


def test_half_a_line_costs_only_its_run(bench, tmp_path):
    bench("--only", "speed")
    file = tmp_path / "out" / "runs.jsonl"
    file.write_text(file.read_text()[:-30])
    assert bench("--only", "speed")[0] == 0 and calls(tmp_path)[9:] == ["speed 2 80"]


def test_failed_run_is_kept_reported_and_retried(bench, tmp_path):
    (tmp_path / "fail-speed-1").touch()
    code, out, err = bench("--only", "speed")
    assert code == 1 and err == "error: 2 run(s) failed, see above; the same command runs them again\n"
    line = "speed, seed 1 (--preset speed-cpu --iterations 80 --eval-every 0): FAILED: no luck"
    assert line in out and f"- Problem: {line}" in report(tmp_path) and len(lines(tmp_path)) == 9
    (tmp_path / "fail-speed-1").unlink()
    assert bench("--only", "speed")[0] == 0 and calls(tmp_path)[9:] == ["speed 1 100", "speed 1 80"]
    assert "Problem" not in report(tmp_path)


def test_run_on_other_data_is_a_failed_one(bench, tmp_path):
    (tmp_path / "other").touch()
    code, out, _ = bench("--only", "speed", "--quick", "--seeds", "1")
    assert code == 1 and out.count("FAILED: the data have changed: fingerprint other") == 3
    assert not (tmp_path / "out" / "README.md").exists()


def test_interruption_ends_the_runs_under_way_and_the_one_about_to_start(bench, tmp_path, monkeypatch):
    (tmp_path / "slow-speed").touch()
    children, third, append, popen = [], threading.Event(), common.append_run, common.subprocess.Popen

    def start(command, **options):
        if str(moe.TRAINER) not in command:  # others ask for the hardware
            return popen(command, **options)
        if len(children) == 2:  # it starts after the others were ended
            third.set()
            time.sleep(0.5)
        children.append(popen(command, **options))
        return children[-1]

    def interrupt(path, run):
        append(path, run)
        assert third.wait(600)
        raise KeyboardInterrupt

    monkeypatch.setattr(common.subprocess, "Popen", start)
    monkeypatch.setattr(common, "append_run", interrupt)
    code, _, err = bench("--only", "speed", "--jobs", "2", "--quick", "--seeds", "1")
    assert code == 130 and "the same command goes on" in err
    assert sorted(child.poll() for child in children) == [-9, -9, 0]
    assert [run["who"] for run in lines(tmp_path)] == ["dense"]


# Results


def made_up(kind, who, values, tokens=1000, field="val_loss"):
    return [{"kind": kind, "who": who, "seed": seed, field: value, "tokens": tokens,
             "curve": [[tokens // 2, value + 1], [tokens, value]]} for seed, value in values.items()]


def test_statistics_by_hand():
    runs = made_up("loss", "dense", {0: 2.0, 1: 2.2, 2: 2.4})
    runs += made_up("loss", "mixtral", {0: 1.9, 1: 2.1, 2: 2.33, 7: 99.0}) + made_up(
        "loss", "mixtral", {0: 2.1, 1: 2.3, 2: 2.43, 7: 99.0}, tokens=640)
    runs += made_up("time", "dense", {0: 100, 1: 200}, field="ms")
    runs += made_up("time", "mixtral", {0: 120, 1: 260, 5: 9}, field="ms")
    (r,) = moe.summarize(runs)
    e = r.equal_tokens  # of -0.1, -0.1, -0.07: standard error 0.01, and 4.3027 of t with 2 degrees of freedom
    assert e.n == 3 and e[1:] == pytest.approx((-0.09, 0.01, -0.09 - 0.043027, -0.09 + 0.043027), abs=1e-6)
    # means 2.2766667 with 0.64 of the tokens, 2.11 with all: 2.2 is at 0.46 of the way, 0.64 * (1 / 0.64)**0.46
    assert r.reach.relation == "=" and r.reach.ratio == pytest.approx(0.785845, abs=1e-6)
    # 1.2 and 1.3: standard error 0.05, t with 1 degree 12.7062
    assert r.ratio.n == 2 and r.ratio[1:] == pytest.approx((1.25, 0.05, 1.25 - 0.63531, 1.25 + 0.63531), abs=1e-5)
    # 1 / 1.25 = 0.8 is halfway from 0.64 to 1 in log tokens: 2.0, 2.2 and 2.38 against dense's 2.0, 2.2, 2.4
    assert r.equal_time.n == 3 and r.equal_time.mean == pytest.approx(-0.02 / 3)
    assert r.equal_time.high == pytest.approx(-0.02 / 3 + 4.302653 * 0.02 / 3, abs=1e-6)


def test_share_with_fewer_seeds_is_not_compared_with_the_others():
    runs = made_up("loss", "dense", {0: 2.0, 1: 3.0}) + made_up("loss", "speed", {0: 1.9, 1: 2.9})
    runs += made_up("loss", "speed", {0: 2.1}, tokens=800)
    (r,) = moe.summarize(runs)
    assert str(r.reach) == "below 1.000 ×"
    (r,) = moe.summarize(runs + made_up("loss", "speed", {1: 3.1}, tokens=800))
    assert str(r.reach) == "0.894 ×"  # sqrt(0.8)


def test_reach_never_goes_beyond_what_is_measured():
    curve = {0.5: 3.0, 0.8: 2.5, 1.0: 2.0}
    assert str(moe.reach(curve, 3.5)) == "below 0.500 ×" and str(moe.reach(curve, 3.0)) == "0.500 ×"
    assert str(moe.reach(curve, 2.5)) == "0.800 ×" and str(moe.reach(curve, 1.9)) == "not reached at 1.000 ×"
    assert moe.reach({0.5: 3.0, 0.8: 2.4, 1.0: 2.6}, 2.7).ratio == pytest.approx(0.5 * 1.6**0.5)  # first crossing
    assert moe.loss_at(curve, 0.49) is None and moe.loss_at(curve, 1.01) is None and moe.loss_at({}, 1.0) is None
    assert moe.loss_at(curve, 0.5 * 1.6**0.5) == pytest.approx(2.75)


def test_report_of_losses_and_times(bench, tmp_path):
    bench()
    readme = report(tmp_path)
    assert "At equal time" not in readme
    bench("--time", "--pairs", "2")
    readme = report(tmp_path)
    # mixtral: 0.09 below dense, at 0.8 of the tokens 0.01 above: 0.1 of the way from there, 0.8 * 1.25**0.1
    assert "| mixtral | 0.800 | 5,120 | 2.1100 ± 0.1000 | 3 | +0.0100 | +0.0100 to +0.0100 |" in readme
    assert "Dense's final loss takes 0.818 × its tokens: 1.222 is the step-time ratio that breaks even." in readme
    assert "**mixtral**: At equal tokens it beats dense: loss -0.0900 (95 % interval -0.0900 to -0.0900" in readme
    assert "At equal time, 0.800 of dense's tokens (interpolated between the fractions measured), it loses to" in readme
    assert "| mixtral | 12.5 | 0.818 × | 1.250 | 1.250 to 1.250 | 2 | 1.023 × | +0.0100 | +0.0100 to +0.0100" in readme
    assert "**deepseek**: At equal tokens it loses to dense: loss +0.0500" in readme
    assert "Dense's final loss is not reached at 1.000 × its tokens." in readme
    assert "At equal time, 0.500 of dense's tokens, its loss is not measured: --fractions." in readme
    assert "takes below 0.800 × its tokens: above 1.250 is the step-time ratio" in readme
    assert "| dense | 10.0 | - |" in readme and "a toy, " in readme and "torch 9.9; commit abc" in readme
    assert "chars, fingerprint" in readme and "`python bench/moe.py --data" in readme and "Problem" not in readme


def test_plot_has_a_curve_for_each_model(bench, tmp_path, monkeypatch):
    from matplotlib import figure

    drawn, save = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    bench()
    (axes,) = drawn[0].axes
    curves = {line.get_label(): line.get_data() for line in axes.get_lines() if line.get_label() in moe.COLORS}
    assert list(curves) == ["dense", *moe.KINDS]
    assert curves["speed"][0] == pytest.approx([0.0032, 0.0064])  # millions of tokens, halfway and at the end
    assert curves["speed"][1] == pytest.approx([1.9 + 0.5, 1.9])  # means over seeds 0, 1, 2
    hollow = [line for line in axes.get_lines() if line.get_marker() == "o" and line.get_color() == moe.COLORS["speed"]]
    assert sorted(hollow[0].get_xdata()) == pytest.approx([0.00512] * 3 + [0.0064] * 3)
    assert (tmp_path / "out" / "curves.png").stat().st_size > 10000


# Command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "sped"], "--only sped: must be one or more of mixtral, deepseek, speed"),
        (["--seeds", "2"], "--seeds must be at least 3, got 2; fewer than 3 need --quick"),
        (["--pairs", "1"], "--pairs must be at least 2, got 1"),
        (["--fractions", "1,0"], "--fractions 0: must be above 0 and at most 4"),
        (["--fractions", "a"], "--fractions a: must be above 0 and at most 4"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--time", "--jobs", "2"], "--time needs --jobs 1"),
        (["--data", "nothing"], "no train shards in"),
        (["--", "--width", "33"], "--width 33 must be a multiple of --head_dim"),
        (["--", "--router", "sigmoid_bias"], "dense, train_moe.py: "),
    ],
)
def test_wrong_input_gets_a_sentence_before_anything_runs(tmp_path, data, capsys, flags, message):
    code = moe.main(["--data", str(data), "--out", str(tmp_path / "out"), *flags])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists()


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit, match="0"):
        moe.main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_real_runs(tmp_path, data, capsys, monkeypatch):
    """Dense and one kind with the trainer itself: two losses, whose validations are at the same tokens."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "out"
    flags = ["--data", str(data), "--out", str(out), "--quick", "--seeds", "1", "--only", "mixtral", "--fractions", "1"]
    assert moe.main([*flags, "--", *SMALL, "--iterations", "12"]) == 0, capsys.readouterr().err
    dense, mixtral = lines(tmp_path)
    assert [point[0] for point in dense["curve"]] == [512 * i for i in range(1, 7)] == [
        point[0] for point in mixtral["curve"]]
    assert dense["val_loss"] == dense["curve"][-1][1] != mixtral["val_loss"] and dense["tokens"] == 12 * 256
    assert 0 < dense["val_loss"] < 6 and 0 < mixtral["val_loss"] < 6
    assert {path.name for path in out.iterdir()} == {"runs.jsonl", "README.md", "curves.png"}  # logs are temporary
