"""AdamW against Muon: bench/optimizers.py tunes both alike, asks for the right runs, loses none, and counts correctly.

Made-up losses stand in for training; nothing is trained.
"""

import importlib.util
import json
import math
from pathlib import Path

import helpers
import pytest

import train_baseline
from bench import common

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_optimizers", ROOT / "bench" / "optimizers.py")
bo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bo)

NOISE = (0.0, 0.05, 0.02, -0.04, 0.01)  # of the seeds, the same for both optimizers
GRID = {-2, -1, 0, 1, 2}
ADAMW, MUON, HALF = bo.ADAMW, bo.MUON, bo.HALF


def bowl(job, adam=0, muon=0):
    """AdamW's best is 2.0 at `adam`; Muon's 1.9 at `muon`, with the rate of the embeddings as AdamW likes it."""
    tried = 0.01 * bool(job.extra)
    if job.muon is None:
        return 2.0 + 0.04 * (job.adam - adam) ** 2 + tried + NOISE[job.seed]
    return 1.9 + 0.03 * (job.muon - muon) ** 2 + 0.02 * (job.adam - adam) ** 2 + 0.08 * job.half + NOISE[job.seed]


def record(job, loss):
    """Of a run whose curve falls in a line from 3 at half its steps to the loss at its end."""
    steps = 250 if job.half else 500
    run = job._asdict() | {"problem": "", "diverged": math.isinf(loss), "wall_s": 6.0, "date": "today",
                           "trainer": "abc"}
    return run if run["diverged"] else run | {
        "val_loss": loss, "curve": [(steps // 2, 3.0), (steps, loss)], "parameters": 1234, "tokens": 2048 * steps,
        "ms": 10.0 if job.muon is None else 11.0, "torch": "9.9", "hardware": "a toy", "commit": "def", "data": "chars"}


class Trainer:
    """Stands in for `execute`: keeps what was run, and fails or interrupts where it is told to."""

    def __init__(self):
        self.loss, self.calls, self.fail, self.interrupt = bowl, [], None, None

    def __call__(self, job, children):
        what = bo.Point(job.adam, job.muon, job.extra, job.half), job.seed
        if self.interrupt == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(what)
        return record(job, self.loss(job)) | {"problem": "no luck" if what == self.fail else ""}

    def points(self, optimizer):
        return {point for point, _ in self.calls if point.optimizer == optimizer and not point.half}


@pytest.fixture
def data(tmp_path):
    return helpers.make_data(tmp_path / "chars")


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(bo, "execute", stand_in := Trainer())
    monkeypatch.setattr(bo, "can_compile", lambda: True)
    monkeypatch.setenv("CXX", "true")  # what the trainer looks for is there on every machine
    return stand_in


@pytest.fixture
def bench(tmp_path, data, trainer, capsys, monkeypatch):
    """bench(*flags, more=flags of all runs) -> (exit code, stdout, stderr); pictures where they are tested."""
    def call(*flags, more=(), draw=False):
        if not draw:
            monkeypatch.setattr(bo, "plot", lambda *_: None)
        code = bo.main(["--out", str(tmp_path / "out"), "--data", str(data), *flags, "--", *more])
        return code, *capsys.readouterr()

    return call


def report(tmp_path):
    return (tmp_path / "out" / "README.md").read_text()


def sweep_of(data, *flags, more=()):
    args = bo.parse_args(["--data", str(data), *flags, "--", *more])
    bo.check(args)
    return bo.make_sweep(args)


def settings(sweep, point):
    return train_baseline.parse_settings([*sweep.common, *sweep.change(point).split()], 1)[0]


# The plan


def test_flags_of_the_runs(data, trainer):
    sweep = sweep_of(data)
    adam, muon = settings(sweep, bo.Point(1)), settings(sweep, bo.Point(1, -1))
    assert (adam.optimizer, adam.max_lr, adam.min_lr) == ("adamw", 2 * sweep.s.max_lr, pytest.approx(0.1 * adam.max_lr))
    assert (muon.optimizer, muon.muon_lr, muon.max_lr) == ("muon", sweep.s.muon_lr / 2, adam.max_lr)
    for s in (adam, muon):
        assert (s.model_type, s.mlp, s.norm_gain, s.tied) == ("moderngpt", "relu2", False, "off")
        assert (s.num_layers, s.width, s.iterations, s.batch_tokens, s.save_last) == (4, 128, 500, 2048, False)
        assert (s.weight_decay, s.grad_clip, s.schedule, s.compile) == (0.1, 1.0, "cosine", True)
    half = settings(sweep, bo.Point(1, -1, half=True))
    assert (half.iterations, half.warmup_steps, half.muon_lr) == (250, 25, muon.muon_lr)
    assert {settings(sweep, bo.Point(0, extra=flags)).beta2 for flags in bo.TRIES} == {0.99, 0.95}


def test_large_vocabularies_get_fewer_tokens(tmp_path, trainer):
    sweep = sweep_of(helpers.make_data(tmp_path / "words", vocab_size=50257))
    assert (sweep.s.iterations, sweep.s.batch_tokens, sweep.s.warmup_steps) == (250, 1024, 25)


def test_preset_brings_its_own_shape_and_rates_but_not_the_model(data, trainer):
    s = sweep_of(data, more=("--preset", "cpu", "--width", "96")).s
    expected = train_baseline.PRESETS["cpu"]
    assert (s.width, s.num_layers, s.iterations) == (96, expected["num_layers"], expected["iterations"])
    assert (s.max_lr, s.mlp, s.model_type) == (expected["max_lr"], "relu2", "moderngpt")


def test_without_a_compiler_the_runs_are_not_compiled(data, trainer, monkeypatch, capsys):
    monkeypatch.setattr(bo, "can_compile", lambda: False)
    assert not sweep_of(data).s.compile and "note: no C++ compiler" in capsys.readouterr().err


def test_everything_is_tried_once_and_the_finalists_get_all_seeds(bench, trainer):
    assert bench()[0] == 0
    assert trainer.points(ADAMW) == {bo.Point(k) for k in GRID} | {bo.Point(0, extra=flags) for flags in bo.TRIES}
    assert trainer.points(MUON) == {bo.Point(0, k) for k in GRID} | {bo.Point(-1, 0), bo.Point(1, 0)}
    assert len(trainer.calls) == len(set(trainer.calls)) == 2 * (7 + 3 * 4) + 5
    whole = {point for point, seed in trainer.calls if seed == 4}
    assert {bo.Point(0), bo.Point(0, 0), bo.Point(0, 0, half=True)} <= whole and len(whole) == 7


@pytest.mark.parametrize(("adam", "muon", "grids"), [
    (3, 0, ({-2, -1, 0, 1, 2, 3, 4}, {-3, -2, -1, 0, 1, 2, 3})),  # Muon's grid is filled up around its best
    (0, -2, ({-3, -2, -1, 0, 1, 2}, {-3, -2, -1, 0, 1, 2})),
    (-2, 3, ({-4, -3, -2, -1, 0, 1, 2}, {-2, -1, 0, 1, 2, 3, 4})),
    (9, 0, (set(range(-2, 7)), set(range(-4, 5)))),  # only so far
])
def test_grids_grow_at_their_edges_and_budgets_stay_equal(bench, trainer, tmp_path, adam, muon, grids):
    trainer.loss = lambda job: bowl(job, adam, muon)
    assert bench()[0] == 0
    best = min(grids[0], key=lambda k: abs(k - adam))
    assert {p.adam for p in trainer.points(ADAMW)} == grids[0]
    assert {p.muon for p in trainer.points(MUON)} == grids[1]
    assert {p.adam for p in trainer.points(MUON)} == {best - 1, best, best + 1}
    size = len(grids[0]) + 2
    assert len(trainer.points(ADAMW)) == len(trainer.points(MUON)) == size
    assert f"AdamW {size} settings, {size + 12} runs; Muon {size} settings, {size + 12} runs" in report(tmp_path)
    assert ("AdamW's best learning rate is the last that was tried" in report(tmp_path)) == (adam == 9)


def test_best_is_that_of_all_seeds(bench, trainer, tmp_path):
    """Seed 0 prefers rate 0, the mean of five the next one."""
    trainer.loss = lambda job: bowl(job) - (0.235 if job.seed else 0.035) * (job.adam == 1 and job.muon is None)
    bench()
    assert "| AdamW | `--optimizer adamw --max-lr 0.008 --min-lr 0.0008` | 2.0050 | **1.8530** |" in report(tmp_path)
    assert {p.adam for p in trainer.points(MUON)} == {-1, 0, 1}  # what was best in the sweep


def test_number_of_sweep_seeds_and_finalists(bench, trainer):
    bench("--sweep-seeds", "2", "--finalists", "1", "--seeds", "4")
    assert len(trainer.calls) == 2 * (7 * 2 + 2) + 4


def test_diverged_runs_are_results(bench, trainer, tmp_path):
    trainer.loss = lambda job: math.inf if (job.adam if job.muon is None else job.muon) > 0 else bowl(job)
    code, out, _ = bench(draw=True)
    assert code == 0 and "--max-lr 0.008 --min-lr 0.0008, seed 0: diverged" in out
    assert "`--optimizer adamw --max-lr 0.016 --min-lr 0.0016` | diverged |" in report(tmp_path)
    count = len(trainer.calls)
    assert bench()[0] == 0 and len(trainer.calls) == count
    assert [seed for point, seed in trainer.calls if point == bo.Point(1)] == [0]


def test_diverged_settings_are_no_finalists(bench, trainer):
    trainer.loss = lambda job: bowl(job) if (job.adam, job.muon or 0, job.extra) == (0, 0, "") else math.inf
    assert bench()[0] == 0 and len(trainer.calls) == 2 * (7 + 4) + 5


def test_all_runs_diverge(bench, trainer, tmp_path):
    trainer.loss = lambda job: math.inf
    assert bench()[0] == 0
    assert "No result: runs are missing, or diverged." in report(tmp_path) and "0.0000" not in report(tmp_path)
    assert "| **diverged** |" in report(tmp_path) and not (tmp_path / "out" / "optimizers.png").exists()


def test_half_the_steps_diverge(bench, trainer, tmp_path):
    trainer.loss = lambda job: math.inf if job.half else bowl(job)
    assert bench(draw=True)[0] == 0
    assert "schedule of its own: not settled. Muon diverged; minus AdamW with all steps +inf nats" in report(tmp_path)
    assert "Muon - AdamW -0.1000" in report(tmp_path)


# Runs


def test_list_foresees_all_runs_and_runs_nothing(bench, trainer, tmp_path):
    code, out, _ = bench("--list")
    assert code == 0 and not trainer.calls and not (tmp_path / "out").exists()
    assert "43 to run, time unknown" in out
    bench()
    assert len(trainer.calls) == 43 and "0 to run, about 0 min" in bench("--list")[1]


def test_interrupted_sweep_goes_on_and_runs_nothing_twice(bench, trainer, tmp_path):
    trainer.interrupt = 17
    code, _, err = bench()
    assert (code, err) == (130, "error: interrupted; the same command goes on\n")
    assert "No result: runs are missing, or diverged." in report(tmp_path)
    assert "not finished: about 26 run(s) are to come; the same command goes on" in report(tmp_path)
    trainer.interrupt = None
    assert bench()[0] == 0 and bench()[0] == 0
    assert len(trainer.calls) == len(set(trainer.calls)) == 43 and "not finished" not in report(tmp_path)


def test_failed_run_is_said_and_run_again(bench, trainer, tmp_path):
    trainer.fail = bo.Point(0, 1), 0
    code, out, err = bench()
    assert code == 1 and "FAILED: no luck" in out and err.startswith("error: 1 run(s) failed, see above")
    assert "seed 0: FAILED: no luck" in report(tmp_path)
    trainer.fail = None
    assert bench()[0] == 0 and "FAILED" not in report(tmp_path)
    assert len(trainer.calls) == len(set(trainer.calls)) + 1 == 44


def test_runs_of_other_flags_do_not_count(bench, trainer):
    bench()
    bench(more=("--width", "64"))
    assert len(trainer.calls) == 86


def stub_train(loss):
    """What a run of the trainer leaves, the last validation twice."""
    def train(script, flags, seed, children):
        fingerprint = train_baseline.open_corpus(flags[flags.index("--data") + 1]).fingerprint()
        rows = [{"step": 10, "train_loss": 3.5, "step_ms": 90.0, "tokens": 20480}, {"step": 10, "val_loss": 3.0},
                *({"step": 20, "train_loss": 3.0, "step_ms": ms, "tokens": 40960} for ms in (5, 7, 6)),
                {"step": 20, "val_loss": loss}, {"step": 20, "val_loss": loss, "params_total": 99}]
        return rows, {"data": {"fingerprint": fingerprint, "name": "chars"}, "torch": "9.9",
                      "hardware": {"name": "a toy"}, "git": {"commit": "0123456789abc", "dirty": False}}

    return train


def test_record_of_a_run(data, monkeypatch):
    monkeypatch.setattr(bo, "can_compile", lambda: False)
    sweep = sweep_of(data, "--quick")
    job = sweep.job(bo.Point(0, 1), 3)
    monkeypatch.setattr(common, "train", stub_train(2.5))
    run = json.loads(json.dumps(bo.execute(job, set())))
    assert run["curve"] == [[10, 3.0], [20, 2.5]] and run["ms"] == 6  # without the first
    assert (run["val_loss"], run["parameters"], run["tokens"], run["problem"]) == (2.5, 99, 40960, "")
    assert sweep._replace(seeds=4).records({(): run}) == {bo.Point(0, 1): {3: run}}
    run = bo.execute(job._replace(fingerprint="other"), set())
    assert run["problem"].startswith("the data have changed") and not run["diverged"]


@pytest.mark.parametrize(("words", "diverged"), [
    ("the validation loss after step 5 is nan: stopped, the checkpoints before it are kept", True),
    ("the data set is gone", False)])
def test_nan_is_told_from_a_failure(data, monkeypatch, words, diverged):
    def fail(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(common, "train", fail)
    monkeypatch.setattr(bo, "can_compile", lambda: False)
    sweep = sweep_of(data)
    run = bo.execute(sweep.job(bo.Point(0), 0), set())
    assert (run["diverged"], run["problem"]) == (diverged, "" if diverged else words)


def test_whole_comparison_with_a_stubbed_trainer(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(common, "train", stub_train(2.5))
    monkeypatch.setattr(bo, "can_compile", lambda: False)
    code = bo.main(["--quick", "--data", str(data), "--out", str(tmp_path / "out")])
    assert code == 0, capsys.readouterr().err
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"runs.jsonl", "README.md", "optimizers.png"}
    assert "Muon - AdamW +0.0000 ± 0.0000" in report(tmp_path) and "AdamW's steps / Muon's: 1.000" in report(tmp_path)


# Results


@pytest.mark.parametrize(("target", "step"), [
    (3.0, 10.0), (3.5, 10.0), (2.75, 15.0), (2.5, 20.0), (2.4, 32.0), (2.25, 35.0), (1.9, None)])
def test_first_step_at_or_below(target, step):
    """2.4 is passed between 30, after a rise to 2.6, and 40 at 2.1; not at 20."""
    assert bo.crossing([(10, 3.0), (20, 2.5), (30, 2.6), (40, 2.1)], target) == (step and pytest.approx(
        30 + 10 * (2.6 - target) / 0.5 if step > 30 else step))


def test_numbers_by_hand(bench, trainer, tmp_path):
    """Full-length Muon falls from 3 at step 250 to 1.9 + noise at 500; AdamW ends at 2.0 + noise."""
    drift = (0.0, 0.01, -0.01, 0.02, -0.02)  # Muon - AdamW: -0.1 + drift
    trainer.loss = lambda job: bowl(job) + drift[job.seed] * (job.muon is not None and not job.half)
    assert bench()[0] == 0
    text = report(tmp_path)
    se = math.sqrt(0.001 / 4 / 5)
    half = 2.776445 * se  # Student's t, 4 degrees of freedom
    assert (f"Muon - AdamW -0.1000 ± {se:.4f} nats (95 % interval {-0.1 - half:+.4f} to {-0.1 + half:+.4f}, n = 5)"
            in text) and "(500): Muon is better" in text
    steps = [250 + 250 * (1.0 - n) / (1.1 - n - d) for n, d in zip(NOISE, drift, strict=True)]
    ratios = [500 / step for step in steps]
    center = sum(ratios) / 5
    spread = 2.776445 * math.sqrt(sum((x - center) ** 2 for x in ratios) / 4 / 5)
    said = f"{center:.3f} (95 % interval {center - spread:.3f} to {center + spread:.3f}, n = 5)"
    assert f"AdamW's steps / Muon's: {said}. Muon's rate is still high at that step" in text
    assert f"after {sum(steps) / 5:.0f} steps (mean) of 500" in text
    assert "Muon's / AdamW's: 1.100 (95 % interval 1.100 to 1.100, n = 5)" in text
    assert f"AdamW's seconds / Muon's to AdamW's final loss: {center / 1.1:.3f} (" in text
    assert "(250) and a whole schedule of its own: they suffice. Muon 1.9880 ± 0.0327" in text  # 1.98 + noise
    assert "minus AdamW with all steps -0.0200 ± 0.0000" in text


@pytest.mark.parametrize(("gain", "full", "half"), [
    (-0.05, "Muon is better", "not enough"), (0.2, "AdamW is better", "not enough")])
def test_verdicts(bench, trainer, tmp_path, gain, full, half):
    trainer.loss = lambda job: bowl(job) + (0.1 + gain) * (job.muon is not None)
    bench()
    assert f"(500): {full}." in report(tmp_path) and f": {half}." in report(tmp_path)
    reached = gain < 0
    assert ("not known: only 0 of 5 seeds reached it" in report(tmp_path)) != reached


def test_differences_are_paired_by_seed(bench, trainer, tmp_path):
    """Noise of 0.05 between the seeds leaves an exact difference."""
    bench()
    assert "Muon - AdamW -0.1000 ± 0.0000 nats (95 % interval -0.1000 to -0.1000, n = 5)" in report(tmp_path)
    assert "AdamW 2.0080 ± 0.0327, Muon 1.9080 ± 0.0327 (mean ± sd, nats per token, n = 5)" in report(tmp_path)


def test_readme_says_how_it_came_about(bench, trainer, tmp_path):
    code, out, err = bench("--jobs", "2")
    text = report(tmp_path)
    assert (code, err) == (0, "") and text in out and "1,234 parameters" in text
    sweep = sweep_of(tmp_path / "chars")
    for point in {point for point, _ in trainer.calls}:
        assert f"`{sweep.change(point)}`" in text
    for words in ("AdamW 7 settings, 19 runs; Muon 7 settings, 19 runs", "AdamW's weight decay 0.1", "norm of 1.0",
                  "runs that went 2 at a time", "Machine: a toy; torch 9.9; commit def; train_baseline.py abc",
                  "1,024,000 training tokens", "--jobs 2", "every 25 steps on 32,768 tokens", "have none"):
        assert words in " ".join(text.split())


def test_picture_shows_the_runs(bench, trainer, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    bench(draw=True)
    left, right = figures[-1].axes
    curves = [line.get_xydata().tolist() for line in left.lines[:3]]
    assert curves[0] == [[250, 3.0], [500, pytest.approx(2.008)]] and curves[1][1] == [500, pytest.approx(1.908)]
    assert left.lines[2].get_linestyle() == "--" and curves[2][1] == [250, pytest.approx(1.988)]
    at, level = left.lines[3].get_xydata()[0]
    assert 250 < at < 500 and level == pytest.approx(2.008)
    stars = [line.get_xydata()[0].tolist() for line in right.lines if line.get_marker() == "*"]
    assert stars == [[pytest.approx(0.004), pytest.approx(2.008)], [pytest.approx(0.02), pytest.approx(1.908)]]
    assert {round(float(x), 4) for line in right.lines for x in line.get_xdata()} >= {0.001, 0.016, 0.005, 0.08}


# Command line


@pytest.mark.parametrize(("flags", "more", "message"), [
    (["--multipliers", "1,3,4"], [], "--multipliers 3: must be powers of two"),
    (["--multipliers", "1,2"], [], "--multipliers: at least three powers of two without a gap"),
    (["--multipliers", "1,2,8"], [], "--multipliers: at least three powers of two without a gap"),
    (["--seeds", "2"], [], "--seeds must be at least 3, got 2; fewer than 3 need --quick"),
    (["--quick", "--seeds", "1"], [], "--seeds must be at least 2, got 1"),
    (["--seeds", "0"], [], "--seeds must be at least 3, got 0"),
    (["--sweep-seeds", "6"], [], "--sweep-seeds must be 1 to 5, the number of --seeds, got 6"),
    (["--sweep-seeds", "0"], [], "--sweep-seeds must be 1 to 5"),
    (["--jobs", "0"], [], "--jobs must be at least 1, got 0"),
    (["--finalists", "0"], [], "--finalists must be at least 1, got 0"),
    (["--data", "nothing"], [], "shards in"),
    ([], ["--seed", "1"], "--seed after --: every run gets its own; use --seeds"),
    ([], ["--data", "x"], "--data after --: every run gets its own; use --data"),
    ([], ["--max-lr", "1"], "--max-lr after --: every run gets its own"),
    ([], ["--optimizer", "muon"], "--optimizer after --: every run gets its own"),
    ([], ["--weight_decay", "0"], "--weight-decay after --: every run gets its own"),
    ([], ["--width", "100"], "train_baseline.py: 1 setting(s) cannot work: --width 100 must be a multiple"),
    ([], ["--eval-every", "0"], "--eval-every 0: steps to equal loss need evaluations on the way"),
    ([], ["--eval-every", "300"], "--eval-every 300: steps to equal loss need evaluations on the way"),
])
def test_wrong_input_gets_a_sentence_before_anything_runs(bench, trainer, tmp_path, flags, more, message):
    code, out, err = bench(*flags, more=more)
    assert (code, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not trainer.calls and not (tmp_path / "out").exists()
