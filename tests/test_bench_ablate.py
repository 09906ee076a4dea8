"""The ablation: bench/ablate.py changes what it says it changes, counts rightly and loses no finished run.

Most tests drive it with a stand-in for the trainer, a tiny script that writes what the real one writes.
"""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import helpers
import pytest

import train_gpt
from bench import common

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench_ablate", ROOT / "bench" / "ablate.py")
ablate = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ablate)

# Its loss and step time follow from the flags. It fails where a file "fail-SEED" lies beside it and smear is off.
STAND_IN = """
import json, pathlib, sys, time
here, argv = pathlib.Path(__file__).parent, sys.argv[1:]
seed = int(argv[argv.index("--seed") + 1])
with open(here / "calls", "a") as file:
    file.write(f"{seed} {'no-smear' if '--no-smear' in argv else 'clip' if 'clip' in argv else 'proxy'}\\n")
if "--no-smear" in argv and (fail := here / f"fail-{seed}").exists():
    sys.exit(fail.read_text())
if "--no-smear" in argv and (here / "slow").exists():
    time.sleep(600)
folder = pathlib.Path(argv[argv.index("--log-dir") + 1]) / "x" / "run"
folder.mkdir(parents=True)
loss = 1 + seed + 0.25 * ("--no-smear" in argv) + 0.01 * seed * ("--no-smear" in argv) - 0.5 * ("clip" in argv)
ms = 10 - 2 * ("--no-smear" in argv) + 10 * ("clip" in argv)
events = [{"step": i + 1, "step_ms": 1000 if i % 2 == 0 else ms, "tokens": 64 * (i + 1)} for i in range(6)]
events.append({"event": "end", "val_loss": loss, "val_bpb": None, "params_total": 1234, "train_time_ms": 1.0})
(folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, events)))
settings = {"iterations": 6, "stage_ends": [0.3333, 0.6667, 1.0]}
(folder / "config.json").write_text(json.dumps({"settings": settings, "torch": "9.9", "hardware": {"name": "a toy"},
    "git": {"commit": "abc", "dirty": False}, "data": {"name": "chars", "fingerprint": "f00"}}))
"""
THREE = ("--only", "smear,clip_docs")


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """bench(*flags) -> (exit code, stdout, stderr), with the stand-in and a data set made here."""
    helpers.make_data(tmp_path / "chars")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(ablate, "TRAINER", tmp_path / "stand_in.py")
    monkeypatch.setattr(common.os, "getloadavg", lambda: (0.0, 0.0, 0.0))

    def call(*flags):
        code = ablate.main(["--data", str(tmp_path / "chars"), "--out", str(tmp_path / "out"), *map(str, flags)])
        return code, *capsys.readouterr()

    return call


def calls(tmp_path):
    return (tmp_path / "calls").read_text().splitlines()


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]


# The plan


def test_every_technique_changes_the_settings_it_names_and_no_other(tmp_path):
    data = helpers.make_data(tmp_path / "chars")
    args = ablate.parse_args(["--data", str(data)])
    args.only = []
    sweep = ablate.make_sweep(args)
    base = dataclasses.asdict(train_gpt.parse_settings(list(sweep.proxy), 1)[0])
    assert base["data"] == str(data) and not base["save_last"]
    for row in ablate.TECHNIQUES:
        words = sweep.changes[row.name].split()
        named = {word.removeprefix("--no-").removeprefix("--").replace("-", "_") for word in words
                 if word.startswith("--")}
        changed = dataclasses.asdict(train_gpt.parse_settings([*sweep.proxy, *words], 1)[0])
        differing = {name for name in base if base[name] != changed[name]}
        # seq_len is one value in the proxy already; the letters of the layers follow from --paired
        assert differing - {"attention"} and differing - {"attention"} <= named, row.name
        assert named - differing <= {"seq_len", "stage_lr"}, row.name
    assert len({row.name for row in ablate.TECHNIQUES}) == len(ablate.TECHNIQUES)


def test_one_stage_has_the_tokens_of_all_and_the_learning_rate_of_their_mean_batch():
    s = helpers.settings(iterations=90, stage_ends=(1 / 3, 2 / 3, 1.0), batch_tokens=(32, 64, 192), seq_len=32,
                         stage_lr=(1.0, 2.0, 4.0), max_doc_len=(8, 16, 32), window=(8, 16, 24), head_dim=16)
    values = ablate.flag_values(train_gpt, s)
    assert values["mean_batch"] * 90 == 30 * (32 + 64 + 192)  # 96, a quarter of the way from 64 to 192
    assert values["mean_lr"] == "2.5" and values["plain_scale"] == "0.25"
    assert (values["max_doc_len"], values["window"]) == (32, 24)
    assert {ablate.flag_values(train_gpt, dataclasses.replace(s, skip=form))["other_skip"]
            for form in ("unet", "single")} == {"unet", "single"}


def test_seeds_are_complete_one_after_the_other(bench, tmp_path):
    assert bench(*THREE)[0] == 0
    assert calls(tmp_path) == [f"{seed} {name}" for seed in range(3) for name in ("proxy", "no-smear", "clip")]


def test_list_runs_nothing_and_estimates(bench, tmp_path):
    code, out, _ = bench(*THREE, "--list")
    assert code == 0 and "9 of 9 to run, about 8 min: 50 s each (a guess)" in out
    assert "0 of 3 done  smear            34     --no-smear" in out and not (tmp_path / "out").exists()
    bench("--only", "smear", "--seeds", "1", "--quick")
    code, out, _ = bench(*THREE, "--list")
    assert "7 of 9 to run" in out and "(measured)" in out and "1 of 3 done  smear " in out


# Runs


def test_finished_runs_are_not_repeated(bench, tmp_path):
    bench("--only", "smear")
    assert len(calls(tmp_path)) == 6
    assert bench("--only", "smear")[0] == 0 and len(calls(tmp_path)) == 6
    bench("--only", "smear", "--seeds", "4")
    assert calls(tmp_path)[6:] == ["3 proxy", "3 no-smear"]
    bench(*THREE, "--jobs", "2")
    assert sorted(calls(tmp_path)[8:]) == ["0 clip", "1 clip", "2 clip"]
    bench("--only", "smear", "--", "--width", "64")  # another proxy: all of it
    assert len(calls(tmp_path)) == 11 + 6
    code, out, _ = bench("--only", "smear")  # the first one's table is not mixed with it
    assert code == 0 and "| 4 | helps |" in out and len(calls(tmp_path)) == 17


def test_other_data_is_run_anew(bench, tmp_path):
    bench("--only", "smear")
    helpers.make_data(tmp_path / "chars", val=[helpers.documents(400, 5)])
    bench("--only", "smear")
    assert len(calls(tmp_path)) == 12


def test_half_a_line_costs_only_its_run(bench, tmp_path):
    bench("--only", "smear")
    file = tmp_path / "out" / "runs.jsonl"
    file.write_text(file.read_text()[:-30])
    assert bench("--only", "smear")[0] == 0 and bench("--only", "smear")[0] == 0
    assert calls(tmp_path)[6:] == ["2 no-smear"]  # the repeated record does not run on from the half one


@pytest.mark.parametrize(
    ("printed", "problem"),
    [("a warning\nerror: no luck:\n  twice", "no luck: twice"), ("Traceback\n  File\nKeyError: 3", "KeyError: 3")],
)
def test_failed_run_is_kept_reported_and_retried(bench, tmp_path, printed, problem):
    (tmp_path / "fail-1").write_text(printed)
    code, out, err = bench("--only", "smear")
    assert code == 1 and err == "error: 1 run(s) failed, see above; the same command runs them again\n"
    assert f"smear, seed 1: FAILED: {problem}\n" in out
    assert [run["problem"] for run in lines(tmp_path)].count(problem) == 1 and len(lines(tmp_path)) == 6
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"- Problem: smear, seed 1: {problem}\n" in readme and "| 2 | helps |" in readme
    (tmp_path / "fail-1").unlink()
    assert bench("--only", "smear")[0] == 0 and calls(tmp_path)[6:] == ["1 no-smear"]
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Problem" not in readme and "| 3 | helps |" in readme


def test_run_that_writes_nonsense_is_a_failed_one(bench, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.replace('"event": "end", "val_loss": loss', '"event": "end"'))
    code, out, _ = bench("--only", "smear", "--seeds", "1", "--quick")
    assert code == 1 and "FAILED: 'val_loss'" in out and not (tmp_path / "out" / "README.md").exists()


def test_interruption_ends_the_runs_under_way(bench, tmp_path, monkeypatch):
    (tmp_path / "slow").touch()  # smear's run would take ten minutes
    started = []
    popen = common.subprocess.Popen
    monkeypatch.setattr(common.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    original = common.append_run

    def interrupt(path, run):
        original(path, run)
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "append_run", interrupt)
    code, _, err = bench("--only", "smear", "--jobs", "2", "--seeds", "1", "--quick")
    assert code == 130 and "the same command goes on" in err
    started = [child for child in started if child.args[0] == sys.executable]  # `platform` asks uname
    assert len(started) == 2 and all(child.poll() is not None for child in started)
    assert [run["technique"] for run in lines(tmp_path)] == ["proxy"]


def test_interruption_ends_while_runs_are_queued(tmp_path):
    """In a process of its own: it would wait for ever for runs that were cancelled before they began."""
    code = f"""
import _thread, pathlib, time
from bench import common
def work(job, children):
    time.sleep(0.2)
    return dict(problem="")
def outcome(run):
    _thread.interrupt_main()
    return ""
try:
    common.run_all(range(9), 1, "", pathlib.Path({str(tmp_path / "runs.jsonl")!r}), work, outcome)
except KeyboardInterrupt:
    print("interrupted")"""
    assert helpers.script("-c", code, timeout=60).stdout.endswith("interrupted\n")
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) < 9


def test_a_record_after_one_that_was_cut_off_is_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text('{"kind": "loss", "techn')
    for seed in (0, 1):
        common.append_run(path, {"kind": "loss", "technique": "xsa", "seed": seed, "key": "k", "change": "c"})
    assert [key[2] for key in common.read_runs(path, ablate.Job)] == [0, 1] and len(path.read_text().splitlines()) == 3


def test_timing_pairs(bench, tmp_path):
    code, out, _ = bench(*THREE, "--time")
    assert code == 0 and calls(tmp_path)[:4] == ["0 proxy", "0 no-smear", "0 proxy", "0 clip"] and len(
        calls(tmp_path)) == 12
    assert [(run["proxy_ms"], run["ms"]) for run in lines(tmp_path)[:2]] == [(10, 8), (10, 20)]
    assert "| 1.250 | -15 steps" in out and "| 2.000 | about -25" in out  # with / without, also where it is added
    assert "not measured" in out and not (tmp_path / "out" / "deltas.png").exists()
    _, out, _ = bench(*THREE)
    assert len(calls(tmp_path)) == 12 + 9 and "not measured" not in out and "| 1.250 |" in out


def test_step_time_is_the_mean_of_the_stages_medians():
    times = [99, 2, 4, 9, 99, 10, 99, 1, 1, 2]  # stages of 4, 2 and 4 steps, whose medians are 4, 10 and 1
    events = [{"event": "start"}, *({"step_ms": ms} for ms in times), {"val_loss": 1.0}]
    config = {"settings": {"iterations": 10, "stage_ends": [0.4, 0.6, 1.0]}}
    assert common.step_ms(events, config) == pytest.approx((4 * 4 + 2 * 10 + 4 * 1) / 10)


# Results


def test_effect_by_hand():
    e = common.effect([0.1, 0.2, 0.3])
    assert e.n == 3 and e.side("helps", "hurts", "open") == "open"
    assert (e.mean, e.se) == pytest.approx((0.2, 0.1 / 3**0.5))
    assert (e.low, e.high) == pytest.approx((0.2 - 4.302653 * e.se, 0.2 + 4.302653 * e.se))  # t of 2 degrees
    assert common.effect([0.1, 0.11, 0.12]).side("helps", "hurts", "open") == "helps"
    assert common.effect([-0.1, -0.11, -0.12]).side("helps", "hurts", "open") == "hurts"
    assert common.effect([0.1]) is None is common.effect([0.1, float("inf")])


def made_up(technique, losses, kind="loss", **more):
    return [{"kind": kind, "technique": technique, "seed": seed, "val_loss": loss, **more}
            for seed, loss in losses.items()]


def test_differences_are_paired_by_seed_and_positive_where_the_technique_helps():
    runs = made_up("proxy", {0: 1.0, 1: 2.0, 2: 3.0}) + made_up("smear", {2: 3.3, 0: 1.1, 1: 2.2, 7: 99.0})
    runs += made_up("bigram", {0: 0.5, 1: 1.5}) + made_up("mtp", {0: 1.0})
    bigram, smear, mtp = ablate.summarize(runs)
    assert [row.technique.name for row in (bigram, smear, mtp)] == ["bigram", "smear", "mtp"]
    assert (smear.effect.n, smear.effect.mean) == (3, pytest.approx(0.2))
    assert (bigram.effect.n, bigram.effect.mean) == (2, pytest.approx(0.5))  # added to the proxy, it lowers the loss
    assert mtp.effect is None and smear.time is None


def test_report(bench, tmp_path):
    bench(*THREE)
    readme = (tmp_path / "out" / "README.md").read_text()
    # differences 0.25, 0.26, 0.27: mean 0.26, se 0.01 / sqrt(3) = 0.0058, interval +- 4.3027 of it
    smear = "| smear | 34 | `--no-smear` | +0.2600 ± 0.0058 | +0.2352 to +0.2848 | 3 | helps | not measured | -15 steps"
    clip = "| clip_docs | 29 | not in the proxy; on: `--long-docs clip` | +0.5000 ± 0.0000 |"
    assert smear in readme and clip in readme and readme.index(clip) < readme.index(smear)
    assert "1,234 parameters, 384 training tokens, val loss 2.0000, sd over seeds 1.0000" in readme
    for said in ("a toy, ", "; torch 9.9", "commit abc;", "chars, fingerprint f00", "says little about the 124 M",
                 "`python bench/ablate.py --data", "(deltas.png)", "--preset cpu"):
        assert said in readme
    assert "Problem" not in readme
    (tmp_path / "stand_in.py").write_text(STAND_IN + "# changed\n")
    bench(*THREE, "--seeds", "4")
    assert "- Problem: train_gpt.py has changed between" in (tmp_path / "out" / "README.md").read_text()


def test_plot_names_every_technique(tmp_path, monkeypatch):
    from matplotlib import figure

    drawn = []
    save = figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: drawn.append(self) or save(self, *a, **k))
    names = [row.name for row in ablate.TECHNIQUES]
    runs = made_up("proxy", {0: 1.0, 1: 1.0, 2: 1.0})
    for i, name in enumerate(names):
        runs += made_up(name, {0: 1.0 + 0.01 * i, 1: 1.02 + 0.01 * i, 2: 0.99 + 0.01 * i})
    rows = ablate.summarize(runs)
    ablate.plot(rows, tmp_path / "deltas.png")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [row.technique.name for row in reversed(rows)]
    height, width = (tmp_path / "deltas.png").read_bytes()[20:24], (tmp_path / "deltas.png").read_bytes()[16:20]
    assert int.from_bytes(width) >= 800 and int.from_bytes(height) >= 800
    text = {legend.get_text() for legend in axes.get_legend().get_texts()}
    assert sum(int(t.split("(")[1][:-1]) for t in text) == len(names)


# Command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "smaer"], "--only smaer: no such technique; did you mean smear?"),
        (["--only", "?"], "there are batch_schedule, length_schedule"),
        (["--seeds", "2"], "--seeds must be at least 3, got 2; fewer than 3 need --quick"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--time", "--jobs", "2"], "--time needs --jobs 1"),
        (["--data", "nothing"], "no train shards in"),
        (["--only", "smear", "--", "--no-smear"], "smear: --no-smear changes nothing in this proxy"),
        (["--", "--width", "33"], "--width 33 must be a multiple of --head_dim"),
    ],
)
def test_wrong_input_gets_a_sentence_before_anything_runs(bench, tmp_path, flags, message):
    code, out, err = bench(*flags)
    assert (code, out) == (1, "") and err.startswith("error: ") and message in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "calls").exists()


def test_help_needs_nothing(capsys):
    with pytest.raises(SystemExit, match="0"):
        ablate.main(["--help"])
    assert "usage:" in capsys.readouterr().out


def test_real_sweep_on_bytes_of_a_local_text(tmp_path, capsys):
    """Two techniques, two seeds, then step times, with the trainer itself and data made by data/fineweb.py."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"Chapter {i}. " + "It was a dark and stormy night; the rain fell. " * 12)
    made = helpers.script(ROOT / "data" / "fineweb.py", "--input", texts, "--out", tmp_path / "books", "--tokenizer",
                          "byte", "--val-fraction", "0.2")
    assert made.returncode == 0, made.stderr
    out = tmp_path / "out"
    shared = ["--data", str(tmp_path / "books"), "--out", str(out), "--quick"]
    small = ["--", "--num-layers", "2", "--width", "32", "--head-dim", "16", "--value-embeds", "1", "--iterations", "9",
             "--batch-tokens", "512,1024,1536", "--eval-tokens", "512"]
    assert ablate.main([*shared, "--only", "normuon,bigram", "--seeds", "2", *small]) == 0, capsys.readouterr().err
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(run["seed"], run["technique"]) for run in runs] == [
        (seed, name) for seed in range(2) for name in ("proxy", "normuon", "bigram")]
    assert len({run["val_loss"] for run in runs}) == 6 and all(0 < run["val_loss"] < 6 for run in runs)
    assert {run["tokens"] for run in runs} == {9 * 1024}
    assert ablate.main([*shared, "--time", "--only", "normuon", "--seeds", "1", *small]) == 0, capsys.readouterr().err
    readme = (out / "README.md").read_text()
    assert "| 2 | " in readme and "books, fingerprint" in readme and (out / "deltas.png").stat().st_size > 1000
    timed = json.loads((out / "runs.jsonl").read_text().splitlines()[-1])
    assert timed["kind"] == "time" and timed["ms"] > 0 and timed["proxy_ms"] > 0
    assert {path.name for path in out.iterdir()} == {"runs.jsonl", "README.md", "deltas.png"}  # logs are temporary
