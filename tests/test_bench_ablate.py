"""The ablation: bench/ablate.py changes what it says it changes, counts rightly and loses no finished run.

Most tests drive it with a stand-in for the trainer, a tiny script that writes what the real one writes.
"""

import dataclasses
import importlib.util
import json
import math
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

# Its loss follows from the flags: 0.1 nats less for twice the steps. It fails where a file "fail-SEED" lies beside it
# and smear is off.
STAND_IN = """
import json, math, pathlib, sys, time
here, argv = pathlib.Path(__file__).parent, sys.argv[1:]
seed = int(argv[argv.index("--seed") + 1])
steps = int(argv[len(argv) - argv[::-1].index("--iterations")]) if "--iterations" in argv else 200
with open(here / "calls", "a") as file:
    what = "no-smear" if "--no-smear" in argv else "clip" if "clip" in argv else "proxy"
    file.write(f"{seed} {what} {steps}\\n")
if "--no-smear" in argv and (fail := here / f"fail-{seed}").exists():
    sys.exit(fail.read_text())
if "--no-smear" in argv and (here / "slow").exists():
    time.sleep(600)
folder = pathlib.Path(argv[argv.index("--log-dir") + 1]) / "x" / "run"
folder.mkdir(parents=True)
loss = 1 + seed + 0.25 * ("--no-smear" in argv) + 0.01 * seed * ("--no-smear" in argv) - 0.5 * ("clip" in argv)
loss -= 0.1 * math.log2(steps / 200)
events = [{"step": i + 1, "tokens": 64 * (i + 1)} for i in range(6)]
events.append({"event": "end", "val_loss": loss, "val_bpb": None, "params_total": 1234, "train_time_ms": 1.0})
(folder / "metrics.jsonl").write_text("\\n".join(map(json.dumps, events)))
settings = {"iterations": steps}
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


def calls(tmp_path, length="200"):
    """Seed and kind of the stand-in's runs of that many steps, in order."""
    found = [line.split() for line in (tmp_path / "calls").read_text().splitlines()]
    return [f"{seed} {kind}" for seed, kind, steps in found if steps == length]


def lines(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]


# The plan


@pytest.mark.parametrize("proxy", ablate.PROXIES)
def test_every_technique_changes_the_settings_it_names_and_no_other(tmp_path, proxy):
    data = helpers.make_data(tmp_path / "chars")
    # 257 classes are too few for candidates: they are asked for where the vocabulary is GPT-2's
    names = [name for name in ablate.named(proxy) if name not in ("candidates", "recipe")]
    args = ablate.parse_args(["--data", str(data), "--proxy", proxy])
    args.only = names
    sweep = ablate.make_sweep(args)
    base = dataclasses.asdict(train_gpt.parse_settings(list(sweep.proxy), 1)[0])
    assert base["data"] == str(data) and not base["save_last"] and base["threads"] == 1
    for name in names:
        words = sweep.changes[name, 1].split()
        named = {word.removeprefix("--no-").removeprefix("--").replace("-", "_") for word in words
                 if word.startswith("--")}
        changed = dataclasses.asdict(train_gpt.parse_settings([*sweep.proxy, *words], 1)[0])
        differing = {name for name in base if base[name] != changed[name]}
        # seq_len is one value in the proxy already; the letters of the layers follow from --paired
        assert differing - {"attention"} and differing - {"attention"} <= named, name
        assert named - differing <= {"seq_len", "stage_lr"}, name
    assert len({row.name for row in ablate.TECHNIQUES}) == len(ablate.TECHNIQUES)


def test_proxies_have_their_own_techniques():
    bytes_, tokens = ablate.named("bytes"), ablate.named("tokens")
    assert {"smear", "tail", "recipe"} <= set(bytes_) and "candidates" not in bytes_
    assert {"candidates", "tail", "recipe"} <= set(tokens) and "smear" not in tokens


def test_shorter_runs_have_the_tail_of_their_length(tmp_path):
    args = ablate.parse_args(["--data", str(helpers.make_data(tmp_path / "chars"))])
    args.only = ["recipe"]
    changes = ablate.make_sweep(args).changes
    tails = {length: int(change.split()[change.split().index("--tail-steps") + 1])
             for (name, length), change in changes.items() if name == "recipe"}
    assert tails[1] == 25 and tails[0.8] == 20 and "--iterations 160" in changes["recipe", 0.8]
    assert changes["proxy", 1] == "" and changes["proxy", 0.7] == "--iterations 140"


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
    assert code == 0 and "15 of 15 to run, about 13 CPU min (a guess), 13 min with 1 at a time" in out
    assert "0 of 3 done  smear               1  --no-smear" in out and not (tmp_path / "out").exists()
    assert "0 of 3 done  proxy             1.4  --iterations 280" in out
    bench("--only", "smear", "--seeds", "1", "--quick")
    code, out, _ = bench(*THREE, "--list")
    assert "11 of 15 to run" in out and "(measured)" in out and "1 of 3 done  smear " in out


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
    assert code == 0 and "| 4 | +0.2650 " in out and len(calls(tmp_path)) == 17


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
    assert f"smear, length 1, seed 1: FAILED: {problem}\n" in out
    assert [run["problem"] for run in lines(tmp_path)].count(problem) == 1 and len(lines(tmp_path)) == 12
    readme = (tmp_path / "out" / "README.md").read_text()
    assert f"- Problem: smear, seed 1: {problem}\n" in readme and "| 2 | +0.2600 ± 0.0100 |" in readme
    (tmp_path / "fail-1").unlink()
    assert bench("--only", "smear")[0] == 0 and calls(tmp_path)[6:] == ["1 no-smear"]  # and its short run
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "Problem" not in readme and "| 3 | +0.2600 ± 0.0058 |" in readme


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
    code, _, err = bench("--only", "smear", "--jobs", "4", "--seeds", "1", "--quick")
    assert code == 130 and "the same command goes on" in err
    started = [child for child in started if child.args[0] == sys.executable]  # `platform` asks uname
    assert len(started) >= 4 and all(child.poll() is not None for child in started)
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
    path.write_text('{"technique": "xs')
    for seed in (0, 1):
        common.append_run(path, {"technique": "xsa", "length": 1, "seed": seed, "key": "k", "change": "c"})
    assert [key[2] for key in common.read_runs(path, ablate.Job)] == [0, 1] and len(path.read_text().splitlines()) == 3


def test_a_step_costs_the_run_less_a_short_one(bench, tmp_path, monkeypatch):
    """The CPU seconds of a process are those that it measures itself, and the rest of its life."""
    seconds = {"200": 30.0, "10": 11.0, "140": 0.0, "280": 0.0}
    run_command = common.run_command

    def counted(command, children):
        problem, cpu_s = run_command(command, children)
        steps = command[len(command) - command[::-1].index("--iterations")] if "--iterations" in command else "200"
        assert cpu_s > 0
        return problem, seconds[steps] * (1.5 if "--no-smear" in command else 1.0)

    monkeypatch.setattr(common, "run_command", counted)
    assert bench("--only", "smear")[0] == 0
    costs = {run["technique"]: run["step_s"] for run in lines(tmp_path) if run["length"] == 1}
    assert costs == {"proxy": pytest.approx(0.1), "smear": pytest.approx(0.15)}
    assert calls(tmp_path, "10") == [f"{seed} {name}" for seed in range(3) for name in ("proxy", "no-smear")]


def test_cpu_seconds_of_a_program_are_its_own(tmp_path):
    code = f"""
import os, time, pathlib
while time.process_time() < 0.3: pass
pathlib.Path({str(tmp_path / "used")!r}).write_text(str(sum(os.times()[:2])))"""
    problem, cpu_s = common.run_command([sys.executable, "-c", code], set())
    assert problem == "" and cpu_s >= float((tmp_path / "used").read_text()) - 0.02  # in ticks of 10 ms
    assert common.run_command([sys.executable, "-c", "raise SystemExit(3)"], set())[0] == "ended with code 3"


# Results


def test_effect_by_hand():
    e = common.effect([0.1, 0.2, 0.3])
    assert e.n == 3 and e.side("helps", "hurts", "open") == "open"
    assert (e.mean, e.se) == pytest.approx((0.2, 0.1 / 3**0.5))
    assert (e.low, e.high) == pytest.approx((0.2 - 4.302653 * e.se, 0.2 + 4.302653 * e.se))  # t of 2 degrees
    assert common.effect([0.1, 0.11, 0.12]).side("helps", "hurts", "open") == "helps"
    assert common.effect([-0.1, -0.11, -0.12]).side("helps", "hurts", "open") == "hurts"
    assert common.effect([0.1]) is None is common.effect([0.1, float("inf")])


def made_up(technique, losses, length=1.0, **more):
    return [{"technique": technique, "length": length, "seed": seed, "val_loss": loss, **more}
            for seed, loss in losses.items()]


def test_differences_are_paired_by_seed_and_positive_where_the_technique_helps():
    runs = made_up("proxy", {0: 1.0, 1: 2.0, 2: 3.0}) + made_up("smear", {2: 3.3, 0: 1.1, 1: 2.2, 7: 99.0})
    runs += made_up("ngrams", {0: 0.5, 1: 1.5}) + made_up("mtp", {0: 1.0})
    rows = ablate.summarize(runs)
    assert [row.technique.name for row in rows] == ["ngrams", "smear", "mtp"]
    ngrams, smear, mtp = rows
    assert (smear.steps.n, smear.steps.mean) == (3, pytest.approx(0.2))
    assert (ngrams.steps.n, ngrams.steps.mean) == (2, pytest.approx(0.5))  # added to the proxy, it lowers the loss
    assert mtp.steps is None and smear.time is None and smear.seconds is None and smear.steps.n == 3


def test_equal_seconds_by_hand():
    """The proxy's loss is 2 - log2(length). Steps with n-grams take twice as long: it would have had twice the steps.
    Without smear they take 1 / sqrt(2): it would have had 1 / sqrt(2) of the steps."""
    runs = [run for length in (0.5, 1.0, 2.0) for run in made_up(
        "proxy", {seed: 2 + seed - math.log2(length) for seed in (0, 1)}, length, step_s=0.2)]
    runs += made_up("ngrams", {0: 1.25, 1: 2.25}, step_s=0.4)
    runs += made_up("smear", {0: 2.125, 1: 3.125}, step_s=0.2 / 2**0.5)
    ngrams, smear = ablate.summarize(runs)
    assert (ngrams.steps.mean, ngrams.time) == (pytest.approx(0.75), pytest.approx(2))
    assert ngrams.seconds.mean == pytest.approx(-0.25) and ngrams.seconds.n == 2  # 1 nat less in that time
    assert (smear.steps.mean, smear.time) == (pytest.approx(0.125), pytest.approx(2**0.5))
    assert smear.seconds.mean == pytest.approx(2.125 - 2.5)  # so faster that leaving it out helps
    slow = [run | {"step_s": 1.0} if run["technique"] == "ngrams" else run for run in runs]
    assert next(row for row in ablate.summarize(slow) if row.technique.name == "ngrams").seconds is None  # 5 times


def test_steps_and_seconds_to_the_loss_of_the_proxy():
    """The recipe's loss is 1 - log2(length): it reaches the proxy's 2 at half of the steps, of 0.6 times the cost."""
    runs = made_up("proxy", {0: 2.0, 1: 2.0}, step_s=0.5)
    runs += [run for length in (0.25, 0.75, 1.0) for run in made_up("recipe", {0: 1 - math.log2(length),
             1: 1 - math.log2(length)}, length, **({"step_s": 0.3} if length == 1 else {}))]
    (row,) = ablate.summarize(runs)
    steps, seconds = row.reach
    assert (steps.mean, seconds.mean) == (pytest.approx(0.5), pytest.approx(0.3))
    assert "the proxy ends, recipe needs 0.500" in ablate.reach_lines([row])
    (never,) = ablate.summarize([run | {"val_loss": 3.0} if run["technique"] == "recipe" else run for run in runs])
    assert never.reach == (None, None) and ablate.reach_lines([never]) == ""


def test_report(bench, tmp_path):
    bench(*THREE)
    readme = (tmp_path / "out" / "README.md").read_text()
    # differences 0.25, 0.26, 0.27: mean 0.26, se 0.01 / sqrt(3) = 0.0058, interval +- 4.3027 of it
    smear = "| smear | 34 | `--no-smear` | 3 | +0.2600 ± 0.0058 | +0.2352 to +0.2848 | helps |"
    clip = "| clip_docs | 29 | not in the proxy; on: `--long-docs clip` | 3 | +0.5000 ± 0.0000 |"
    assert smear in readme and clip in readme and readme.index(clip) < readme.index(smear)
    assert "1,234 parameters, 384 training tokens, val loss 2.0000, sd over seeds 1.0000" in readme
    for said in ("a toy, ", "; torch 9.9", "commit abc;", "chars, fingerprint f00", "says little about 124 M",
                 "`python bench/ablate.py --data", "--preset cpu",
                 "runs of 0.7, 1, 1.4 times", "MALLOC_MMAP_MAX_=0"):
        assert said in readme
    assert "Problem" not in readme
    (tmp_path / "stand_in.py").write_text(STAND_IN + "# changed\n")
    bench(*THREE, "--seeds", "4")
    assert "- Problem: train_gpt.py has changed between" in (tmp_path / "out" / "README.md").read_text()


# Command line


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--only", "smaer"], "--only smaer: no such technique; did you mean smear?"),
        (["--only", "?"], "there are batch_schedule, length_schedule"),
        (["--seeds", "2"], "--seeds must be at least 3, got 2; fewer than 3 need --quick"),
        (["--jobs", "0"], "--jobs must be at least 1, got 0"),
        (["--only", "candidates"], "--only candidates: the proxy bytes has no flags for it"),
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


def test_real_sweep_on_bytes_of_a_local_text(tmp_path, capsys, monkeypatch):
    """A technique that is added, with the trainer itself and data made by data/fineweb.py."""
    monkeypatch.setitem(ablate.PROXIES, "bytes", ablate.PROXIES["bytes"]._replace(lengths=(1, 1.4)))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(40):
        (texts / f"{i:02d}.txt").write_text(f"Chapter {i}. " + "It was a dark and stormy night; the rain fell. " * 12)
    made = helpers.script(ROOT / "data" / "fineweb.py", "--input", texts, "--out", tmp_path / "books", "--tokenizer",
                          "byte", "--val-fraction", "0.2")
    assert made.returncode == 0, made.stderr
    out = tmp_path / "out"
    shared = ["--data", str(tmp_path / "books"), "--out", str(out), "--quick"]
    small = ["--", "--num-layers", "2", "--width", "32", "--head-dim", "16", "--value-embeds", "1", "--iterations",
             "12", "--batch-tokens", "512,1024,1536", "--eval-tokens", "512"]
    assert ablate.main([*shared, "--only", "ngrams", "--seeds", "1", *small]) == 0, capsys.readouterr().err
    runs = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(run["seed"], run["technique"], run["length"]) for run in runs] == [
        (0, "proxy", 1), (0, "proxy", 1.4), (0, "ngrams", 1)]
    assert len({run["val_loss"] for run in runs}) == 3 and all(0 < run["val_loss"] < 6 for run in runs)
    assert {run["tokens"] for run in runs if run["length"] == 1} == {12 * 1024}
    assert all(run["step_s"] > -1 for run in runs if run["length"] == 1)
    readme = (out / "README.md").read_text()
    assert "books, fingerprint" in readme and "ngrams" in readme
    assert {path.name for path in out.iterdir()} == {"runs.jsonl", "README.md"}  # logs are temporary
