"""bench/grokking.py: the sweep runs what it says, goes on where it was cut off, and names the phases rightly.

The sweep drives a stand-in for the trainer, a tiny script that writes the metrics.json which the real one would.
"""
import json
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, environment

import train_grokking
from bench import common, grokking

# Steps to 99 % follow from the flags. It fails where a file "fail" lies beside it, for AdamW, and sleeps with "slow".
STAND_IN = """
import json, pathlib, sys, time
here, argv = pathlib.Path(__file__).parent, sys.argv[1:]
value = dict(zip(argv, argv[1:]))
muon, seed = value["--optimizer"] == "muon", int(value["--seed"])
decay = float(value["--muon_weight_decay" if muon else "--weight_decay"])
with open(here / "calls", "a") as file:
    file.write(f"{value['--optimizer']} {decay:g} {seed}\\n")
if not muon and (here / "fail").exists():
    sys.exit("error: no space\\n  left")
if (here / "slow").exists():
    time.sleep(600)
train, val = (400, 400 + 300 * seed) if muon else {0.01: (500, None), 0.1: (500, 3000), 1: (None, None)}[decay]
folder = pathlib.Path(value["--log-dir"]) / "x" / "run"
folder.mkdir(parents=True)
found = dict(train_99=train, val_50=val, val_95=val, val_99=val, gap=val and val - train)
(folder / "metrics.json").write_text(json.dumps(dict(
    milestones=found, status="nan" if train is None else "done", total_steps=6000, best_val_acc=0.5, step_ms=2.0,
    train_time_s=9.0, eval_time_s=1.0, parameters=1234, environment={}, metrics=[{"step": 50}],
    config=dict(operation="/", prime=59, iterations=6000))))
sys.exit(1 if train is None else 0)
"""
CELLS = [*(f"adamw {decay} {{}}" for decay in ("0.01", "0.1", "1")), *(f"muon {decay} {{}}" for decay in ("0.01", "0.1",
                                                                                                        "1"))]


@pytest.fixture
def bench(tmp_path, monkeypatch, capsys):
    """bench(*flags) -> (exit code, stdout, stderr), with the stand-in and three decays."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(grokking, "TRAINER", tmp_path / "stand_in.py")

    def call(*flags):
        code = grokking.main(["sweep", "--decays", "0.01,0.1,1", "--out", str(tmp_path / "out"), *map(str, flags)])
        return code, *capsys.readouterr()

    return call


def calls(tmp_path) -> list[str]:
    return (tmp_path / "calls").read_text().splitlines()


def rows(tmp_path) -> list[dict]:
    """The finished runs."""
    runs = common.read_runs(tmp_path / "out" / "runs.jsonl", grokking.Job)
    return [run for run in runs.values() if not run["problem"]]


def test_a_sweep_runs_every_cell_with_every_seed_and_names_the_phases(bench, tmp_path):
    code, out, _ = bench("--seeds", 2)
    assert code == 0 and calls(tmp_path) == [text.format(seed) for seed in range(2) for text in CELLS]
    found = {(row["optimizer"], float(row["decay"]), int(row["seed"])): row for row in rows(tmp_path)}
    assert len(found) == 12 and {row["rate"] for row in found.values()} == {0.001, 0.02}
    assert [found["adamw", decay, 1]["phase"] for decay in (0.01, 0.1, 1)] == ["memorization", "grokking", "confusion"]
    assert found["adamw", 0.01, 0]["val_99"] is None and found["adamw", 0.1, 0]["gap"] == 2500
    assert found["adamw", 1, 0]["status"] == "nan" and found["muon", 1, 1]["phase"] == "comprehension"
    assert "| AdamW | 0.001 | 0.1 | 3,000 | grokking | 2 of 2 |" in out and "not reached | memorization | 0 of 2" in out
    assert "| Muon + AdamW | 0.02 | 1 | 550 | comprehension | 2 of 2 |" in out
    assert (tmp_path / "out" / "phase.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_run_twice_and_a_cut_off_line_is_run_again(bench, tmp_path):
    bench("--seeds", 1)
    file = tmp_path / "out" / "runs.jsonl"
    file.write_bytes(file.read_bytes()[:-30])
    assert bench("--seeds", 1)[0] == 0 and calls(tmp_path)[6:] == ["muon 1 0"]
    assert bench("--seeds", 2)[0] == 0 and len(calls(tmp_path)) == 13 and len(rows(tmp_path)) == 12
    assert bench("--seeds", 1, "--rates", "1,2")[0] == 0 and len(calls(tmp_path)) == 19
    assert {row["rate"] for row in rows(tmp_path)} == {0.001, 0.002, 0.02, 0.04}
    assert bench("--seeds", 1, "--", "--prime", 13)[0] == 0 and len(calls(tmp_path)) == 25  # another key


def test_failed_runs_are_told_and_run_again(bench, tmp_path):
    (tmp_path / "fail").touch()
    code, out, err = bench("--seeds", 1)
    assert code == 1 and "FAILED: no space left" in out and err.startswith("error: 3 run(s) failed")
    assert [row["optimizer"] for row in rows(tmp_path)] == ["muon"] * 3
    (tmp_path / "fail").unlink()
    assert bench("--seeds", 1)[0] == 0 and len(calls(tmp_path)) == 9 and len(rows(tmp_path)) == 6


def test_an_interrupted_sweep_goes_on(bench, tmp_path):
    assert bench("--seeds", 1, "--optimizers", "muon")[0] == 0
    (tmp_path / "slow").touch()
    code = (f"import signal, sys, pathlib; from bench import grokking\n"
            f"grokking.TRAINER = pathlib.Path({str(tmp_path / 'stand_in.py')!r})\n"
            f"sys.exit(grokking.main(['sweep', '--decays', '0.01,0.1,1', '--seeds', '1', '--out', "
            f"{str(tmp_path / 'out')!r}]))")
    child = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.PIPE, text=True)
    while len(calls(tmp_path)) < 4 and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert "interrupted; the same command goes on" in child.communicate()[1] and child.returncode == 130
    (tmp_path / "slow").unlink()
    assert bench("--seeds", 1)[0] == 0 and len(rows(tmp_path)) == 6 and len(calls(tmp_path)) == 7


def test_the_plan_runs_nothing_and_gives_the_trainers_flags(bench, tmp_path):
    code, out, _ = bench("--list", "--seeds", 1, "--", "--prime", "97")
    assert code == 0 and "6 of 6 to run" in out and not (tmp_path / "calls").exists()
    line = next(line for line in out.splitlines() if "--optimizer muon" in line and "--muon_weight_decay 0.1 " in line)
    s = train_grokking.parse_settings(line.split()[1:])[0]
    assert (s.preset, s.prime, s.muon_lr, s.muon_weight_decay, s.weight_decay) == ("quick", 97, 0.02, 0.1, 1.0)


@pytest.mark.parametrize("given, words", [
    (["--decays", "0.1,much"], ["--decays much", "numbers of 0 or more"]), (["--rates", "0"], ["--rates 0", "above 0"]),
    (["--optimizers", "sgd"], ["--optimizers sgd", "adamw, muon"]), (["--seeds", "0"], ["--seeds must be at least 1"]),
    (["--", "--seed", "3"], ["--seed after --", "--seeds"]), (["--", "--prime", "91"], ["--prime 91", "89, 97"]),
    (["--", "--weight-decay=1"], ["--weight-decay after --", "--decays"]),
])
def test_options_that_cannot_work(bench, given, words):
    code, _, err = bench(*given)
    assert code == 1 and err.startswith("error: ") and all(word in err for word in words), err


def test_a_cells_phase_is_that_of_most_seeds_and_its_steps_their_median():
    def run(train, val):
        return {"train_99": train, "val_99": val, "phase": grokking.phase({"train_99": train, "val_99": val})}

    assert grokking.make_cell([run(100, 1101), run(100, 1100), run(100, 5000)]) == ("grokking", 1101, 3, 3)
    assert grokking.make_cell([run(100, None), run(100, 1100)]) == ("comprehension", None, 1, 2)
    assert grokking.make_cell([run(None, None), run(None, None), run(100, 100)]) == ("confusion", None, 1, 3)


# Curves of several runs


def write_run(folder, steps: list[int], **config):
    """metrics.json of a run that is evaluated at these steps; validation accuracy is 1 at the last, before it 0."""
    folder.mkdir(parents=True)
    metrics = [{"step": step, "train_acc": 1.0, "val_acc": float(step == steps[-1])} for step in steps]
    settings = {**vars(train_grokking.Config()), **config}
    (folder / "metrics.json").write_text(json.dumps(dict(
        config=settings, metrics=metrics, milestones=train_grokking.milestones(metrics), parameters=9, step_ms=2.0,
        status="target")))


def test_runs_that_differ_in_the_seed_alone_are_averaged(tmp_path, capsys):
    for seed, last in enumerate((800, 1000)):
        write_run(tmp_path / "adamw" / f"run{seed}", [200, last], seed=seed)
    write_run(tmp_path / "muon" / "run", [100, 200], optimizer="muon")
    code = grokking.main(["plot", str(tmp_path / "adamw"), str(tmp_path / "muon" / "run"), "--out",
                          str(tmp_path / "new" / "curves.png")])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and lines[2] == "| AdamW | 2 | 200 ± 0 | 900 ± 141 | 900 ± 141 | 900 ± 141 | 700 ± 141 | 2.0 |"
    assert lines[3] == "| Muon + AdamW | 1 | 100 | 200 | 200 | 200 | 100 | 2.0 |" and len(lines) == 5
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    runs = grokking.read_results([tmp_path / "adamw"])
    assert grokking.mean_curve(runs, "val_acc") == ([200, 800, 1000], [0.0, 0.5, 1.0])


def test_groups_are_labelled_by_what_differs(tmp_path):
    for i, (rate, muon_rate) in enumerate(((0.001, 0.02), (0.003, 0.01))):  # AdamW runs do not read muon_lr
        write_run(tmp_path / str(i), [10], lr=rate, muon_lr=muon_rate)
    assert list(grokking.group(grokking.read_results([tmp_path]))) == ["AdamW, lr 0.001", "AdamW, lr 0.003"]


def test_what_is_no_run_is_told(tmp_path, capsys):
    assert grokking.main(["plot", str(tmp_path)]) == 1 and "no metrics.json in" in capsys.readouterr().err
    (tmp_path / "metrics.json").write_text("{}")
    assert grokking.main(["plot", str(tmp_path)]) == 1 and "is no metrics.json of" in capsys.readouterr().err


WRONG = {
    "no json": lambda r: "{", "a list": lambda r: [r], "deep": lambda r: "[" * 100000, "no object": lambda r: 3,
    "no step": lambda r: r["metrics"][0].pop("step") and None, "a text": lambda r: r["metrics"][0].update(val_acc="1"),
    "nan": lambda r: r["metrics"][0].update(val_acc=float("nan")), "more than all": lambda r: r["metrics"][0].update(
        val_acc=1.5), "order": lambda r: r["metrics"].reverse(), "no settings": lambda r: r.update(config=None),
    "another optimizer": lambda r: r["config"].update(optimizer=["sgd"]), "huge": lambda r: r.update(step_ms=10**400),
    "a word": lambda r: r["milestones"].update(gap="x"), "controls": lambda r: r["config"].update(operation="\x1b[2J"),
    "metrics": lambda r: r.update(metrics={"step": 1}), "no milestones": lambda r: r.pop("milestones") and None,
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_result_is_one_sentence(name, tmp_path, capsys):
    write_run(tmp_path / "run\x1b", [10, 20])
    file = tmp_path / "run\x1b" / "metrics.json"
    result = json.loads(file.read_text())
    wrong = WRONG[name](result)  # the text, another value, or None: it has changed the result
    file.write_text(wrong if isinstance(wrong, str) else json.dumps(wrong or result))
    assert grokking.main(["plot", str(tmp_path), "--out", str(tmp_path / "x.png")]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and "is no metrics.json of" in err and err.count("\n") == 1 and len(err) < 500
    assert "\x1b" not in out + err and not (tmp_path / "x.png").exists()


def test_the_script_starts_the_sweep(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(train_grokking.subprocess, "call", lambda command: started.append(command) or 7)
    assert train_grokking.main(["--sweep", "--preset", "power"]) == 7
    assert list(map(str, started[0][1:])) == [str(ROOT / "bench" / "grokking.py"), "sweep", "--", "--preset", "power"]
    assert grokking.parse_args(["sweep", "--", "--preset", "power"]).flags == ["--preset", "power"]
