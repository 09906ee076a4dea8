"""Width transfer: bench/lr_transfer.py asks for the right runs, loses none, and judges them by the numbers.

Most tests put a made-up loss in the place of training; the last one trains.
"""

import importlib.util
import json
import math
from fractions import Fraction
from pathlib import Path

import helpers
import pytest

import train_gpt
from bench import common

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_lr_transfer", ROOT / "bench" / "lr_transfer.py")
lr = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lr)

NOISE = (0.0, 0.5, 0.2)  # of the seeds, much more than what rates make
SMALL = ("--device", "cpu", "--batch-tokens", "128", "--micro-tokens", "128", "--seq-len", "32", "--max-doc-len", "32",
         "--window", "32", "--eval-seq-len", "32", "--eval-tokens", "300", "--iterations", "12", "--warmup-steps", "2")


def bowl(job, k):
    """muP: wider is better, and the optimum stays at 0. Standard: it is one step lower with each doubling."""
    doublings = math.log2(job.width / 64)
    return 2 - 0.1 * doublings + 0.04 * (k + (doublings if job.scaling == "standard" else 0)) ** 2 + NOISE[job.seed]


class Trainer:
    """Stands in for `execute`: keeps what was run, and fails or interrupts where it is told to."""

    def __init__(self):
        self.loss, self.calls, self.fail, self.interrupt = bowl, [], None, None

    def __call__(self, job, children):
        k = round(math.log2(Fraction(job.multiplier)))
        what = (job.optimizer, job.scaling, job.width, k, job.seed)
        if self.interrupt == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append(what)
        loss = self.loss(job, k)
        run = job._asdict() | {"problem": "no luck" if what == self.fail else "", "diverged": math.isinf(loss)}
        return run | {"val_loss": loss if math.isfinite(loss) else None, "wall_s": 6.0, "date": "today", "tokens": 512,
                      "trainer": "abc", "torch": "9.9", "hardware": "a toy", "commit": "def", "data": "chars"}


@pytest.fixture
def data(tmp_path):
    return helpers.make_data(tmp_path / "chars")


@pytest.fixture
def trainer(monkeypatch):
    monkeypatch.setattr(lr, "execute", stand_in := Trainer())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return stand_in


@pytest.fixture
def bench(tmp_path, data, trainer, capsys):
    """bench(*flags, more=flags of all runs) -> (exit code, stdout, stderr)."""
    def call(*flags, more=()):
        code = lr.main(["--out", str(tmp_path / "out"), *map(str, flags), "--", "--data", str(data), *more])
        return code, *capsys.readouterr()

    return call


def sweep_of(data, *flags, more=()):
    args = lr.parse_args([*flags, "--", "--data", str(data), *more])
    lr.check(args)
    return lr.make_sweep(args)


def report(tmp_path):
    return (tmp_path / "out" / "README.md").read_text()


def seeds_by_k(trainer, *series):
    """Exponent -> seeds that were run in a series."""
    found = {}
    for *line, k, seed in trainer.calls:
        if tuple(line) == series:
            found.setdefault(k, []).append(seed)
    return found


# The plan


def test_grid_has_every_rate_once_and_the_base_width_once_for_both(data):
    sweep = sweep_of(data, "--multipliers", "1/2,1,2")
    jobs = [sweep.job(*item) for item in common.absent(sweep, {})]
    assert len(jobs) == 2 * 3 * (1 + 2 + 2) == len({job[:5] for job in jobs}) and {job.seed for job in jobs} == {0}
    assert [job.width for job in jobs] == [256] * 12 + [128] * 12 + [64] * 6  # the longest first
    parsed = {job: train_gpt.parse_settings([*job.common, *job.change.split()], 1)[0] for job in jobs}
    assert {(job.scaling, s.mup, s.base_width) for job, s in parsed.items()} == {
        ("base", False, 0), ("mup", True, 64), ("standard", False, 0)}
    assert {(s.width, s.num_layers, s.head_dim, s.iterations) for s in parsed.values()} == {
        (width, 2, 32, 400) for width in (64, 128, 256)}
    for optimizer, name in (("muon", "muon_lr"), ("adamw", "hidden_lr")):
        mine = {job.multiplier: s for job, s in parsed.items() if job.optimizer == optimizer}
        assert {s.hidden_optimizer for s in mine.values()} == {optimizer} and len(mine) == 3
        for rate in (name, "adam_lr"):
            assert getattr(mine["2"], rate) == 2 * getattr(mine["1"], rate) == 4 * getattr(mine["1/2"], rate) > 0


def test_mup_flags_are_those_of_the_mup_runs_alone(data):
    sweep = sweep_of(data, "--multipliers", "1", "--mup-flags=--mup-embedding sqrt")
    runs = {job: train_gpt.parse_settings([*job.common, *job.change.split()], 1)[0]
            for job in (sweep.job(*item) for item in common.absent(sweep, {}))}
    assert {(job.scaling, s.mup_embedding) for job, s in runs.items()} == {
        ("base", "constant"), ("mup", "sqrt"), ("standard", "constant")}


def test_rates_of_routers_go_along(data):
    sweep = sweep_of(data, "--script", "train_moe.py", "--optimizers", "muon")
    assert sweep.rates["muon"].keys() == {"--muon-lr", "--adam-lr", "--router-lr"}
    assert sweep.rate_flags("muon", 1) == "--muon-lr 0.08 --adam-lr 0.016 --router-lr 0.01"


def test_preset_brings_its_own_model_and_rates(data):
    sweep = sweep_of(data, "--widths", "96", "--optimizers", "muon", more=("--preset", "cpu", "--adam-lr", "0.003"))
    assert sweep.rates == {"muon": {"--muon-lr": train_gpt.PRESETS["cpu"]["muon_lr"], "--adam-lr": 0.003}}
    (job,) = {sweep.job(*item) for item in common.absent(sweep, {}) if item[0].k == 0}
    s = train_gpt.parse_settings([*job.common, *job.change.split()], 1)[0]
    assert (s.num_layers, s.iterations, s.save_last, s.eval_every) == (3, 360, False, 0)


def test_seeds_go_where_they_count(bench, trainer):
    assert bench("--optimizers", "muon", "--multipliers", "1/8,1/4,1/2,1,2")[0] == 0
    three, one = [0, 1, 2], [0]
    assert seeds_by_k(trainer, "muon", "base", 64) == {-3: one, -2: one, -1: three, 0: three, 1: three}
    assert seeds_by_k(trainer, "muon", "mup", 128) == {-3: one, -2: one, -1: one, 0: three, 1: one}
    assert seeds_by_k(trainer, "muon", "mup", 256) == {-3: one, -2: one, -1: three, 0: three, 1: three}
    assert seeds_by_k(trainer, "muon", "standard", 128) == {-3: one, -2: one, -1: three, 0: three, 1: one}
    assert seeds_by_k(trainer, "muon", "standard", 256) == {-3: three, -2: three, -1: three, 0: three, 1: one}
    assert len(trainer.calls) == len(set(trainer.calls)) == 11 + 7 + 11 + 9 + 13


def test_best_moves_with_further_seeds(bench, trainer):
    """Seed 0 prefers 0, the mean 1: its other neighbour is compared too, and the middle width gets the new one."""
    trainer.loss = lambda job, k: bowl(job, k) - 0.2 * (k == 1 and job.seed > 0)
    bench("--optimizers", "muon", "--parametrizations", "mup")
    for scaling, width, expected in (("base", 64, {-1, 0, 1, 2}), ("mup", 128, {0, 1}), ("mup", 256, {-1, 0, 1, 2})):
        seeds = seeds_by_k(trainer, "muon", scaling, width)
        assert {k for k in seeds if len(seeds[k]) == 3} == expected


def test_only_the_same_seeds_are_compared(data):
    sweep = sweep_of(data, "--optimizers", "muon", "--multipliers", "1/2,1,2")
    line = lr.Series("muon", "base", 64)
    found = {lr.Point(line, k): {0: 1.0 + 0.1 * abs(k)} for k in (-1, 0, 1)}
    assert lr.best(sweep, found, line) is None and lr.candidates(sweep, found, line) == [0]
    found[lr.Point(line, 0)] |= {1: 5.0, 2: 5.0}  # hard seeds: the mean is far above the others' seed 0
    assert lr.best(sweep, found, line) == 0 and lr.candidates(sweep, found, line) == [0]
    found[lr.Point(line, 1)] |= {1: 3.0}  # better on the seeds that it has
    assert lr.candidates(sweep, found, line) == [0, 1]


@pytest.mark.parametrize(("optimum", "grown", "edge"),
                         [(2, {2, 3}, False), (-3, {-2, -3, -4}, False), (9, {2, 3, 4}, True)])
def test_grid_grows_at_its_edge_up_to_a_limit(bench, trainer, tmp_path, optimum, grown, edge):
    trainer.loss = lambda job, k: bowl(job, k - optimum)
    bench("--optimizers", "muon", "--parametrizations", "mup", "--multipliers", "1/2,1,2", "--widths", "64,128")
    for series in (("muon", "base", 64), ("muon", "mup", 128)):
        assert set(seeds_by_k(trainer, *series)) == {-1, 0, 1} | grown
    assert ("is the last that the grid may grow to" in report(tmp_path)) == edge


def test_diverged_run_is_the_worst_result_and_no_failure(bench, trainer, tmp_path):
    trainer.loss = lambda job, k: math.inf if k > 0 else bowl(job, k - 1)
    code, out, _ = bench("--optimizers", "muon", "--parametrizations", "mup", "--multipliers", "1/2,1,2")
    assert code == 0 and "width 256, × 2, seed 0: diverged" in out
    assert "| 128 | 2.0600 (1) | **2.1733** → (3) | diverged (1) |" in report(tmp_path)
    assert "| 256 | 2.1933 (3) | **2.0733** → (3) | diverged (3) |" in report(tmp_path)
    code, out, _ = bench("--optimizers", "muon", "--parametrizations", "mup", "--multipliers", "1/2,1,2")
    assert code == 0 and "[1/" not in out


# Runs


def test_list_runs_nothing_and_foresees_what_comes(bench, trainer, tmp_path):
    code, out, _ = bench("--list", "--optimizers", "muon", "--jobs", "2")
    assert code == 0 and not trainer.calls and not (tmp_path / "out").exists()
    assert "muon   mup       width   128:   0 done,   9 to run" in out
    assert "muon   mup       width   256:   0 done,  13 to run" in out
    assert "57 to run, time unknown" in out
    trainer.loss = lambda job, k: bowl(job._replace(scaling="mup"), k)  # what is foreseen before anything is known
    bench("--optimizers", "muon")
    assert len(trainer.calls) == 57
    assert "0 to run, about 0 min" in bench("--list", "--optimizers", "muon")[1]


def test_time_is_by_cost(bench, trainer, data, tmp_path, monkeypatch):
    """Runs of width 64 took 60 s: those of 128 to come take as much more as they cost."""
    flags = ("--optimizers", "muon", "--parametrizations", "mup", "--jobs", "2")
    execute = lr.execute
    monkeypatch.setattr(lr, "execute", lambda job, children: execute(job, children) | {"wall_s": 60.0})
    bench(*flags, "--widths", "64")
    out = bench(*flags, "--widths", "64,128", "--list")[1]
    count = int(out.split(" to run, about ")[0].split()[-1])
    assert f"{count} to run, about {count * lr.cost(128) / 2:.0f} min: 60 s at width 64 (measured), 2 at a time" in out


@pytest.mark.parametrize(("after", "cut"), [(34, True), (60, False)])
def test_interrupted_sweep_goes_on(bench, trainer, tmp_path, after, cut):
    """In the last run of the first round, and of the last; the disk may have been full as well."""
    trainer.interrupt = after
    code, _, err = bench("--optimizers", "muon")
    assert (code, err, len(trainer.calls)) == (130, "error: interrupted; the same command goes on\n", after)
    assert f"- Problem: not finished: about {61 - after} run(s) are to come" in report(tmp_path)
    file = tmp_path / "out" / "runs.jsonl"
    file.write_text(file.read_text()[:-30 if cut else None])
    trainer.interrupt = None
    assert bench("--optimizers", "muon")[0] == 0 and bench("--optimizers", "muon")[0] == 0
    assert len(trainer.calls) <= 61 + 2 * cut and len(set(trainer.calls)) == 61  # a cut line can spoil the next


@pytest.mark.parametrize("series", [("muon", "base", 64, 0, 0), ("muon", "standard", 256, -2, 1)])
def test_failed_run_is_said_and_run_again(bench, trainer, tmp_path, series):
    trainer.fail = series
    code, out, err = bench("--optimizers", "muon")
    line = f"muon, {series[1]}, width {series[2]}, × {common.power(series[3])}, seed {series[4]}: FAILED: no luck"
    assert code == 1 and line in out and err == "error: 1 run(s) failed, see above; the same command runs them again\n"
    assert f"- Problem: {line}\n- Problem: not finished: about " in report(tmp_path)
    assert trainer.calls.count(series) == 1
    trainer.fail = None
    assert bench("--optimizers", "muon")[0] == 0 and "Problem" not in report(tmp_path)
    assert trainer.calls.count(series) == 2 and len(trainer.calls) == len(set(trainer.calls)) + 1


def test_runs_of_other_flags_do_not_count(bench, trainer, tmp_path):
    bench("--optimizers", "muon", "--widths", "64,128")
    count = len(trainer.calls)
    bench("--optimizers", "muon", "--widths", "64,128,256")  # those of the two widths serve here too
    assert {call[2] for call in trainer.calls[count:]} == {256}
    count = len(trainer.calls)
    bench("--optimizers", "muon", "--widths", "64,128", more=("--iterations", "300"))
    assert len(trainer.calls) > count and "| 256 |" not in report(tmp_path)


def test_nan_is_told_from_a_failure(tmp_path, data, monkeypatch, capsys):
    """The trainer's own words, and those of another failure."""
    assert train_gpt.main(helpers.tiny(tmp_path, data=data) + ["--muon-lr", "1e30"]) == 1
    words = capsys.readouterr().err.removeprefix("error: ").strip()
    sweep = sweep_of(data, "--optimizers", "muon")
    job = sweep.job(lr.Point(sweep.series[0], 3), 0)

    def fail(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(common, "train", fail)
    run = lr.execute(job, set())
    assert (run["diverged"], run["problem"]) == (True, "")
    words = "the data set is gone"
    run = lr.execute(job, set())
    assert (run["diverged"], run["problem"]) == (False, words)


def test_run_on_other_data_fails(data, monkeypatch):
    sweep = sweep_of(data, "--optimizers", "muon")
    monkeypatch.setattr(common, "train", lambda *_: ([{"val_loss": 1.0}], {"data": {"fingerprint": "other"}}))
    run = lr.execute(sweep.job(lr.Point(sweep.series[0], 0), 0), set())
    assert run["problem"].startswith("the data have changed: fingerprint other, at the start")


# Results


def row(width, best, moved, at_best, at_moved):
    return lr.Row(width, best, moved, *(dict(enumerate(losses)) for losses in (at_best, at_moved)))


BASE = row(64, 1, 1, [2.0, 2.2, 2.1], [2.0, 2.2, 2.1])


def test_regret_by_hand():
    r = row(256, 2, 1, [1.50, 1.70, 1.61], [1.52, 1.71, 1.64])  # 0.02, 0.01, 0.03: mean 0.02, se 0.01 / sqrt(3)
    assert r.regrets == pytest.approx([0.02, 0.01, 0.03])
    assert common.difference(r.regrets) == "+0.0200 ± 0.0058 nats (95 % interval -0.0048 to +0.0448, n = 3)"
    regret, optimum, wider = lr.verdicts(lr.Result("muon", "mup", [BASE, r]))
    assert regret.ok and wider.ok and wider.said == "2.1000 at 64, 1.6233 at 256"
    assert str(optimum) == "optimum: × 2 at 64, × 4 at 256"
    assert common.paired({0: 1.0, 2: 5.0}, {0: 0.5, 1: 9.0}) == [0.5]
    assert common.difference([]) == "not measured" and common.difference([0.25]) == "+0.2500 nats (n = 1)"
    assert row(256, 1, 1, [math.inf], [math.inf]).regrets == [0.0]
    assert common.difference(row(256, 2, 1, [1.0, 1.0], [math.inf, 1.0]).regrets) == "+inf nats (n = 2)"


@pytest.mark.parametrize(
    ("last", "missed"),
    [
        (row(256, 1, 1, [1.5, 1.6], [1.5, 1.6]), []),
        (row(256, 2, 1, [1.5, 1.6], [1.5298, 1.6298]), []),
        (row(256, 2, 1, [1.5, 1.6], [1.5302, 1.6302]), ["regret"]),
        (row(256, 3, 1, [1.5, 1.6], [1.5, 1.6]), []),  # where the optimum lies is not asked
        (row(256, 1, 1, [2.1, 2.2], [2.1, 2.2]), ["wider is better"]),
        (row(256, -1, 1, [1.5, 1.6], [math.inf, 1.6]), ["regret", "wider is better"]),
        (row(256, None, 1, [], [1.5, 1.6]), []),  # not measured is not missed
    ],
)
def test_verdicts(last, missed):
    result = lr.Result("muon", "mup", [BASE, last])
    assert [verdict.criterion for verdict in lr.verdicts(result) if verdict.ok is False] == missed
    assert [text.split(":")[1].strip() for text in lr.shortcomings([result])] == missed
    assert lr.shortcomings([result._replace(scaling="standard")]) == []  # the control may fail


def test_success_and_failure_have_exit_codes(bench, trainer, tmp_path):
    code, out, err = bench()
    readme = report(tmp_path)
    assert (code, err) == (0, "") and readme in out
    assert "  - regret: PASS (at most 0.03 nats is asked): +0.0000 ± 0.0000 nats" in readme
    assert "- **muon, standard parametrization** (the control)\n  - regret: +0.1600 ± 0.0000 nats" in readme
    assert "| 256 | 2.0733 (3) | **2.0333** (3) | 2.0733 (3) | 2.1933 → (3) | 2.1600 (1) |" in readme
    trainer.loss = lambda job, k: bowl(job._replace(scaling="standard"), k)  # as if muP did nothing, Muon and AdamW
    (tmp_path / "out" / "runs.jsonl").unlink()
    code, out, err = bench()
    assert code == 1 and err.startswith("error: muP fails: muon: regret: FAIL (at most 0.03 nats is asked): +0.1600")
    assert "adamw: regret: FAIL" in err and "adamw: wider is better: FAIL" in err and "optimum" not in err
    assert "  - optimum: × 1 at 64, × 1/2 at 128, × 1/4 at 256\n" in report(tmp_path)
    assert report(tmp_path) in out and (tmp_path / "out" / "lr_transfer.png").stat().st_size > 10000


def test_optimum_may_move_where_the_curve_is_flat(bench, trainer, tmp_path):
    trainer.loss = lambda job, k: bowl(job, 0) + 0.001 * (k + math.log2(job.width / 64)) ** 2
    code, _, err = bench("--optimizers", "muon", "--parametrizations", "mup")
    assert (code, err) == (0, "")
    assert "  - regret: PASS (at most 0.03 nats is asked): +0.0040 ± 0.0000 nats" in report(tmp_path)
    assert "  - optimum: × 1 at 64, × 1/2 at 128, × 1/4 at 256\n" in report(tmp_path)


def test_picture_shows_the_table(bench, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: figures.append(self))
    bench("--multipliers", "1/4,1/2,1,2")
    panels = {axes.get_title(): axes for axes in figures[-1].axes}
    assert list(panels) == [f"{o}, {p}" for o in ("muon", "adamw") for p in ("muP", "standard parametrization")]
    lines = {bar.get_label(): bar[0] for bar in panels["muon, standard parametrization"].containers}
    assert list(lines) == ["width 64", "width 128", "width 256"]
    assert list(lines["width 256"].get_xdata()) == [0.125, 0.25, 0.5, 1, 2]  # grown by one
    assert lines["width 256"].get_ydata() == pytest.approx(
        [loss + 0.7 / 3 for loss in (1.84, 1.8, 1.84, 1.96)] + [2.16])
    stars = [line.get_xydata()[0] for line in panels["muon, muP"].lines if line.get_marker() == "*"]
    assert [x for x, _ in stars] == [1, 1, 1]
    assert [y for _, y in stars] == pytest.approx([loss + 0.7 / 3 for loss in (2.0, 1.9, 1.8)])
    assert any(line.get_linestyle() == "--" and line.get_xdata()[0] == 1.0 for line in panels["adamw, muP"].lines)


# For users: one width


def test_one_width_prints_the_flags_to_go_on_with(bench, trainer, tmp_path):
    trainer.loss = lambda job, k: bowl(job, k - 1)
    code, out, _ = bench("--widths", "256", "--optimizers", "muon", more=("--head-dim", "128"))
    assert code == 0 and out.splitlines()[-1] == (
        "--muon-lr 0.08 --adam-lr 0.016 --mup --base-width 256 --base-head-dim 128")
    assert {call[:3] for call in trainer.calls} == {("muon", "base", 256)}
    trainer.loss = lambda job, k: bowl(job, k + 1) - (job.optimizer == "adamw")
    code, out, _ = bench("--widths", "64,128")  # the better optimizer's last
    line = out.splitlines()[-1]
    assert line == "--hidden-optimizer adamw --hidden-lr 0.002 --adam-lr 0.008 --mup --base-width 64 --base-head-dim 32"
    s = train_gpt.parse_settings([*line.split(), "--preset", "cpu", "--device", "cpu"], 1)[0]
    assert (s.mup, s.width, s.base_width, s.base_head_dim) == (True, 192, 64, 32)


# Command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--widths", "64,wide"], "--widths wide: must be whole numbers above 0"),
        (["--widths", "0,64"], "--widths 0: must be whole numbers above 0"),
        (["--widths", "64,100"], "width 100: train_gpt.py: 1 setting(s) cannot work: --width 100 must be a multiple"),
        (["--optimizers", "sgd"], "--optimizers sgd: must be one or more of muon, adamw"),
        (["--parametrizations", "ntk"], "--parametrizations ntk: must be one or more of mup, standard"),
        (["--multipliers", "1,3"], "--multipliers 3: must be powers of two"),
        (["--multipliers", "1/0"], "--multipliers 1/0: must be powers of two"),
        (["--multipliers", "0"], "--multipliers 0: must be powers of two"),
        (["--multipliers", "x"], "--multipliers x: must be powers of two"),
        (["--seeds", "2"], "--seeds must be at least 3, got 2; fewer than 3 need --quick"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--script", "train_rnn.py"], "no such file; train_gpt.py and train_moe.py are meant"),
        (["--mup-flags=--mup-embedding root"], "--mup_embedding root: must be constant or sqrt"),
        (["--mup-flags=--mup-embedding sqrt", "--parametrizations", "standard"],
         "--mup-flags --mup-embedding sqrt: has no effect without muP and a second width"),
        (["--mup-flags=--mup-embedding sqrt", "--widths", "64"], "has no effect without muP and a second width"),
        (["--mup-flags=--base-width 32"], "--mup-flags: --base-width is none of --mup-embedding, --base-head-dim"),
        (["--", "--width", "64"], "--width after --: every run gets its own; use --widths"),
        (["--", "--seed", "1"], "--seed after --: every run gets its own; use --seeds"),
        (["--", "--muon-momentum", "0.9"], "adamw, width 64: train_gpt.py: 1 setting(s) cannot work: --muon_momentum"),
        (["--", "--data", "nothing"], "no train shards in"),
    ],
)
def test_wrong_input_gets_a_sentence_before_anything_runs(tmp_path, data, trainer, capsys, flags, message):
    before = flags[:flags.index("--")] if "--" in flags else flags
    more = flags[flags.index("--") + 1:] if "--" in flags else []
    code = lr.main(["--out", str(tmp_path / "out"), *before, "--", "--data", str(data), *more])
    out, err = capsys.readouterr()
    assert (code, out) == (1, "") and err.startswith("error: ") and message in err and err.count("\n") == 1
    assert not trainer.calls and not (tmp_path / "out").exists()


def test_unknown_flag_names_the_one_that_was_meant(bench, capsys):
    with pytest.raises(SystemExit, match="2"):
        bench(more=("--num-layer", "3"))
    assert "did you mean --num-layers?" in capsys.readouterr().err


def test_real_runs(tmp_path, data, capsys, monkeypatch):
    """Base, muP and standard with the trainer itself, at one rate."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(lr, "EXTEND", 0)
    out = tmp_path / "out"
    flags = ["--quick", "--seeds", "1", "--widths", "32,64", "--optimizers", "muon", "--multipliers", "8"]
    code = lr.main([*flags, "--out", str(out), "--", "--data", str(data), *SMALL])
    assert code == 0, capsys.readouterr().err
    runs = {run["scaling"]: run for run in map(json.loads, (out / "runs.jsonl").read_text().splitlines())}
    assert {name: run["width"] for name, run in runs.items()} == {"base": 32, "mup": 64, "standard": 64}
    losses = {name: run["val_loss"] for name, run in runs.items()}
    assert len(set(losses.values())) == 3 and all(0 < loss < math.log(helpers.VOCAB) for loss in losses.values())
    assert {run["tokens"] for run in runs.values()} == {12 * 128}
    assert runs["base"]["parameters"] < runs["mup"]["parameters"] == runs["standard"]["parameters"]
    assert {path.name for path in out.iterdir()} == {"runs.jsonl", "README.md", "lr_transfer.png"}
    readme = report(tmp_path)
    assert all(f"| 64 | **{losses[name]:.4f}** → (1) |" in readme for name in ("mup", "standard"))
    assert "wider is better: PASS (a falling loss at the transferred rate is asked): " in readme
