"""train_grokking.py: what survives which fault, and that no input ends in a traceback."""
import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import pytest
import torch
from helpers import ROOT, environment
from test_grokking import argv, compare, fails, handlers, result, saved, train  # noqa: F401 - the last are fixtures

import train_grokking
from train_grokking import Config

SCRIPT = ROOT / "train_grokking.py"


def run_folder(tmp_path):
    (folder,) = tmp_path.glob("logs/x/*")
    return folder


def main(tmp_path, **changes) -> int:
    return train_grokking.main(argv(tmp_path, **changes))


def script(tmp_path, *words, **changes) -> list[str]:
    """The command line of a tiny run."""
    return [sys.executable, str(SCRIPT), *argv(tmp_path, **changes), *words]


def full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


def rewrite(path, change):
    """Changes the content of a checkpoint."""
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def snapshot(folder) -> dict:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


# --- loss of power


def test_a_checkpoint_is_synced_before_it_replaces_one_and_its_folders_after(tmp_path, monkeypatch):
    calls, names = [], {}
    real_open, real_sync, real_replace = os.open, os.fsync, os.replace

    def opened(path, *arguments, **options):
        descriptor = real_open(path, *arguments, **options)
        names[descriptor] = str(path)
        return descriptor

    def sync(descriptor):
        calls.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        return real_sync(descriptor)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("replace", str(b))) or real_replace(a, b))
    train(tmp_path, iterations=8)
    folder = run_folder(tmp_path)
    for name in ("ckpt.pt", "ckpt_best.pt"):
        at = calls.index(("replace", str(folder / name)))
        assert calls[at - 1] == ("sync", str(folder / f"{name}.tmp")) and calls[at + 1] == ("sync", str(folder))
    last = len(calls) - 1 - calls[::-1].index(("replace", str(folder / "metrics.json")))
    assert calls[last - 1] == ("sync", str(folder / "metrics.json.tmp"))  # the final one
    at = calls.index(("replace", str(folder / "ckpt.pt")))  # after it all new folders, from the innermost outwards
    assert calls[at + 1:at + 5] == [("sync", str(place)) for place in (folder, *folder.parents[:3])]


# --- the end of a run saves


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_signals_stop_a_run_which_says_so_at_once_and_saves(tmp_path, monkeypatch, capfd, number):
    step, done = train_grokking.train_step, []

    def interrupting(*arguments):
        done.append(1)
        if len(done) == 13:
            signal.raise_signal(number)
            assert f"{number.name}: saving" in capfd.readouterr().err
            signal.raise_signal(number)  # a closed terminal sends two
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        return step(*arguments)

    monkeypatch.setattr(train_grokking, "train_step", interrupting)
    assert main(tmp_path) == 128 + number
    assert result(tmp_path)["status"] == "interrupted" and saved(tmp_path)["step"] == 13


def test_nohup_keeps_ignoring_a_closed_terminal(tmp_path):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    train(tmp_path, iterations=8)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


def test_a_signal_at_an_evaluation_does_not_wait_for_it_and_the_evaluation_is_made_up_for(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    step, done = train_grokking.train_step, []

    def interrupting(*arguments):
        done.append(1)
        if len(done) == 16:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grokking, "train_step", interrupting)
        assert main(tmp_path / "parts") == 143
    assert [m["step"] for m in saved(tmp_path / "parts")["metrics"]] == [8]
    train(tmp_path / "parts", resume="latest")
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


OUT_OF_MEMORY = RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you "
                             "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)")


@pytest.mark.parametrize("error, words", [
    (OUT_OF_MEMORY, ["error: out of memory: lower --batch-size"]), (MemoryError(), ["error: out of memory"]),
    (OSError(5, "Input/output error"), ["error: [Errno 5] Input/output error"]), (RuntimeError("of CUDA"), [])])
def test_an_error_in_an_evaluation_loses_no_step(tmp_path, monkeypatch, capsys, error, words):
    train(tmp_path / "whole")

    def failing(*arguments):
        seen.append(1)
        if len(seen) > 2:
            raise error
        return real(*arguments)

    seen, real = [], train_grokking.mean_scores
    with monkeypatch.context() as patch:
        patch.setattr(train_grokking, "mean_scores", failing)
        if words:
            assert main(tmp_path / "parts", save_every=100) == 1
        else:  # it may be a fault of the script: with its traceback
            pytest.raises(RuntimeError, main, tmp_path / "parts", save_every=100)
    out, err = capsys.readouterr()
    assert err.count("\n") == bool(words) and [word for word in words if word not in err] == [], err
    assert "an error after step 16: the checkpoint of step 16 is kept, --resume" in out
    status = "out_of_memory" if "out of memory" in err or "memory" in str(error) else "error"
    assert saved(tmp_path / "parts")["step"] == 16 and result(tmp_path / "parts")["status"] == status
    train(tmp_path / "parts", resume="latest", save_every=100)
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


def test_a_checkpoint_is_written_before_the_evaluation_at_its_step(tmp_path, monkeypatch):
    def dying(*arguments):
        seen.append(1)
        if len(seen) > 4:
            raise GeneratorExit  # as SIGKILL: nothing is saved
        return real(*arguments)

    seen, real = [], train_grokking.mean_scores
    monkeypatch.setattr(train_grokking, "mean_scores", dying)
    pytest.raises(GeneratorExit, main, tmp_path, save_every=100)
    assert saved(tmp_path)["step"] == 24 and [m["step"] for m in saved(tmp_path)["metrics"]] == [8, 16]


def test_an_error_in_the_middle_of_a_step_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    step, done = train_grokking.train_step, []

    def failing(w, *arguments):
        done.append(1)
        if len(done) == 13:
            w["head"].zero_()
            raise OUT_OF_MEMORY
        return step(w, *arguments)

    monkeypatch.setattr(train_grokking, "train_step", failing)
    assert main(tmp_path) == 1 and saved(tmp_path)["step"] == 8
    assert "after step 12: the checkpoint of step 8 is kept, --resume" in capsys.readouterr().out


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path, monkeypatch, capsys):
    step, done = train_grokking.train_step, []

    def diverging(w, *arguments):
        done.append(1)
        if len(done) == 12:
            w["head"].fill_(float("nan"))
        if len(done) == 13:
            signal.raise_signal(signal.SIGTERM)
        return step(w, *arguments)

    monkeypatch.setattr(train_grokking, "train_step", diverging)
    assert main(tmp_path) == 1 and saved(tmp_path)["step"] == 8
    said = capsys.readouterr().err
    assert "not finite after step 13: stopped, the checkpoint of step 8 is kept" in said and "--allow-change lr" in said


def test_a_full_disk_is_a_warning_until_the_end(tmp_path, monkeypatch, capsys):
    train(tmp_path, iterations=8)
    monkeypatch.setattr(os, "fsync", full)
    capsys.readouterr()
    assert main(tmp_path, resume="latest") == 1
    out, err = capsys.readouterr()
    assert "ckpt.pt cannot be written (No space left on device); the checkpoint of step 8 is kept" in out
    assert "step 24/24" in out and err.count("\n") == 1 and "checkpoint of step 8 is kept, --resume" in err
    assert saved(tmp_path)["step"] == 8 and not list(run_folder(tmp_path).glob("*.tmp"))


def test_a_full_log_and_console_cost_lines_not_the_run(tmp_path):
    with open("/dev/full", "w") as stdout:
        child = subprocess.run(script(tmp_path), env=environment(), stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert child.returncode == 0 and "Traceback" not in child.stderr and "Exception" not in child.stderr
    assert saved(tmp_path)["step"] == 24 and "step 24/24" in (run_folder(tmp_path) / "log.txt").read_text()


def test_a_closed_pipe_stops_the_run_which_saves(tmp_path):
    child = subprocess.Popen(script(tmp_path, iterations=10**8, eval_every=50), env=environment(), text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.readline()
    child.stdout.close()
    said = child.stderr.read()
    assert child.wait() == 128 + signal.SIGPIPE and said == "" and result(tmp_path)["status"] == "interrupted"
    assert saved(tmp_path)["step"] == result(tmp_path)["total_steps"]


def test_a_terminal_that_is_gone_stops_the_run_which_saves(tmp_path):
    terminal, side = os.openpty()
    child = subprocess.Popen(script(tmp_path, iterations=10**8, eval_every=50), env=environment(), text=True,
                             stdout=side, stderr=subprocess.PIPE, start_new_session=True)
    os.close(side)
    os.read(terminal, 1)
    os.close(terminal)
    assert child.stderr.read() == "" and child.wait() == 128 + signal.SIGPIPE
    assert result(tmp_path)["status"] == "interrupted" and saved(tmp_path)["step"] >= 0


def test_a_second_signal_ends_a_run_at_once(tmp_path):
    code = (f"import os, signal, train_grokking\n"
            f"def scores(*a):\n    os.kill(os.getpid(), signal.SIGINT); os.kill(os.getpid(), signal.SIGINT)\n"
            f"train_grokking.mean_scores = scores\ntrain_grokking.main({argv(tmp_path)!r})")
    child = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert child.returncode == -signal.SIGINT and child.stderr.startswith("SIGINT: saving")


def test_ctrl_c_while_torch_is_imported_leaves_nothing_behind(tmp_path):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    env = environment(PYTHONPATH=str(tmp_path))
    child = subprocess.Popen([sys.executable, str(SCRIPT)], env=env, cwd=tmp_path, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE)
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    assert child.communicate()[1] == "" and child.returncode == -signal.SIGINT
    assert {path.name for path in tmp_path.iterdir()} == {"torch.py"}


# --- which checkpoint


def test_the_newest_is_what_the_files_say_not_their_times(tmp_path, capsys):
    train(tmp_path, iterations=120, lr=0.01)
    folder = run_folder(tmp_path)
    best = saved(tmp_path, "ckpt_best.pt")
    assert best["step"] < 120 and best["saved"] < saved(tmp_path)["saved"]
    os.utime(folder / "ckpt.pt", (1, 1))
    capsys.readouterr()
    train(tmp_path, iterations=128, lr=0.01, resume="latest")
    assert "ckpt.pt after step 120" in capsys.readouterr().out
    rewrite(folder / "ckpt_best.pt", lambda state: state.update(saved=2**64))
    main(tmp_path, iterations=136, lr=0.01, resume=folder)
    assert f"ckpt_best.pt after step {best['step']}" in capsys.readouterr().out
    assert saved(tmp_path)["saved"] > 2**64  # even where the clock is behind


def test_the_latest_of_several_runs_is_what_their_files_say(tmp_path, capsys):
    folders = []
    for seed in range(2):
        assert main(tmp_path, iterations=8, seed=seed) == 0
        folders += {*tmp_path.glob("logs/x/*")} - {*folders}
    for path in folders[0].iterdir():
        os.utime(path)
    capsys.readouterr()
    assert main(tmp_path, iterations=16, seed=1, resume="latest") == 0
    assert f"resumed {folders[1]}" in capsys.readouterr().out
    assert main(tmp_path, iterations=16, seed=0, resume="latest") == 1 and "--seed: 1 in" in capsys.readouterr().err


def test_checkpoints_of_before_go_on(tmp_path):
    def older(state):
        for name in ("saved", "changes"):
            del state[name]
        del state["settings"]["allow_change"]

    train(tmp_path / "whole")
    train(tmp_path / "parts", iterations=16)
    for path in run_folder(tmp_path / "parts").glob("ckpt*"):
        rewrite(path, older)
    train(tmp_path / "parts", resume="latest")
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


@pytest.mark.parametrize("changes", [{}, dict(iterations=8), dict(stop_accuracy=0.01, iterations=99)])
def test_resuming_a_finished_run_changes_nothing_and_says_so(tmp_path, capsys, changes):
    train(tmp_path)
    before = snapshot(run_folder(tmp_path))
    capsys.readouterr()
    assert main(tmp_path, resume="latest", **changes) == 0
    assert ": nothing to do after step 24" in capsys.readouterr().out
    assert snapshot(run_folder(tmp_path)) == before


def test_a_run_that_is_in_use_is_told_with_its_holder(tmp_path, fails):  # noqa: F811
    train(tmp_path, iterations=8)
    folder = run_folder(tmp_path)
    with train_grokking.lock_folder(folder):
        before = snapshot(folder)
        fails(argv(tmp_path, resume="latest"), f"is in use by process {os.getpid()} of ")
        assert snapshot(folder) == before
    train(tmp_path, resume="latest")


def test_a_run_that_goes_on_before_it_is_locked_is_left_to_the_other(tmp_path, monkeypatch, fails):  # noqa: F811
    train(tmp_path, iterations=8)
    real, looks = train_grokking.load_checkpoint, []

    def load(s, notes):
        path, state = real(s, notes)
        looks.append(1)
        return path, state | {"saved": state["saved"] + len(looks)}
    monkeypatch.setattr(train_grokking, "load_checkpoint", load)
    fails(argv(tmp_path, resume="latest", iterations=16), "has gone on meanwhile: give the command again")


def test_the_lock_ends_with_its_process(tmp_path):
    train(tmp_path, iterations=8)
    code = (f"import pathlib, time, train_grokking\n"
            f"lock = train_grokking.lock_folder(pathlib.Path({str(run_folder(tmp_path))!r}))\n"
            f"print(1, flush=True)\ntime.sleep(60)")
    child = subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE, text=True)
    child.stdout.readline()
    assert main(tmp_path, resume="latest") == 1
    child.kill()
    child.communicate()
    train(tmp_path, resume="latest")


# --- damaged checkpoints


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor: torch.load would not notice
    path.write_bytes(content)


def compress(path):
    with zipfile.ZipFile(path) as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part)


def bad_weight(value):
    return lambda state: state["weights"].update(head=value)


DAMAGE = {
    "a flipped bit": (flip, "wrong checksum"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-99]), "not a zip file"),
    "empty": (lambda path: path.write_bytes(b""), "not a zip file"),
    "compressed": (compress, "wrong checksum"),
    "a pickle": (lambda path: path.write_bytes(b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R."), "not a zip file"),
    "a list": (lambda path: torch.save([1], path), "TypeError"),
    "code": (lambda path: torch.save({"settings": Config}, path), "Weights only load failed"),
}
CHANGES = {
    "no weights": (lambda state: state.pop("weights"), "KeyError('weights')"),
    "one more": (lambda state: state["weights"].update(x=torch.ones(2)), "it is of another model"),
    "a shape": (bad_weight(torch.ones(2, 2)), "it is of another model"),
    "a dtype": (bad_weight(torch.ones(22, 16).double()), "it is of another model"),
    "a number": (bad_weight(3), "AttributeError"),
    "nan": (bad_weight(torch.full((22, 16), float("nan"))), "a number out of range"),
    "a moment": (lambda state: state["moments"]["exp_avg"].pop("mlp"), "it is of another model"),
    "a text as step": (lambda state: state.update(step="8"), "a number out of range"),
    "a negative step": (lambda state: state.update(step=-1), "a number out of range"),
    "a fraction": (lambda state: state.update(step=24.0), "a number out of range"),
    "a huge step": (lambda state: state.update(step=10**400), "OverflowError"),
    "a huge counter": (lambda state: state.update(saved=10**400), "OverflowError"),
    "settings": (lambda state: state.update(settings=[]), "AttributeError"),
    "a tensor setting": (lambda state: state["settings"].update(lr=torch.ones(2)), "not JSON serializable"),
    "metrics": (lambda state: state.update(metrics={"a": 1}), "TypeError"),
    "an evaluation": (lambda state: state["metrics"][0].pop("lr"), "KeyError('lr')"),
    "a loss": (lambda state: state["metrics"][0].update(val_loss="low"), "TypeError"),
    "times": (lambda state: state.update(train_ms=float("inf")), "a number out of range"),
    "evaluations": (lambda state: state["metrics"].reverse(), "a number out of range"),
    "changes": (lambda state: state.update(changes=[torch.ones(1)]), "not JSON serializable"),
    "no list": (lambda state: state.update(changes={}), "TypeError"),
    "controls": (lambda state: state.update(settings={"\x1b]0;x\x07": 1}, saved="\x1b"), "a number out of range"),
}
DAMAGE |= {name: (lambda path, change=change: rewrite(path, change), word)
           for name, (change, word) in CHANGES.items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(folder, iterations=16)
    rewrite(run_folder(folder) / "ckpt_best.pt", lambda state: state.update(saved=1))
    return run_folder(folder)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_checkpoint_is_told_and_the_other_one_is_taken(name, finished, tmp_path, capsys):
    folder = tmp_path / "logs" / "x" / "run"
    folder.mkdir(parents=True)
    for path in finished.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    change, word = DAMAGE[name]
    change(folder / "ckpt.pt")
    step = saved(tmp_path, "ckpt_best.pt")["step"]
    capsys.readouterr()
    assert main(tmp_path, resume=folder / "ckpt.pt", iterations=17) == 0
    out, err = capsys.readouterr()
    assert f"{folder}/ckpt.pt is damaged (" in out and word in out and "another one is taken" in out, out
    assert f"resumed {folder}/ckpt_best.pt after step {step}" in out and "\x1b" not in out + err
    assert saved(tmp_path)["step"] == 17


def test_where_all_are_damaged_one_error_names_them(finished, tmp_path, capsys, fails):  # noqa: F811
    folder = tmp_path / "logs" / "x" / "run"
    folder.mkdir(parents=True)
    (folder / "ckpt.pt").write_bytes((finished / "ckpt.pt").read_bytes())
    (folder / "ckpt_best.pt").write_bytes(b"")
    flip(folder / "ckpt.pt")
    fails(argv(tmp_path, resume="latest"), "no whole checkpoint in", "ckpt.pt is damaged (", "wrong checksum",
          "ckpt_best.pt is damaged", lines=3)
    assert {path.name for path in folder.iterdir()} == {"ckpt.pt", "ckpt_best.pt"}


def test_pipes_are_no_checkpoints(tmp_path, fails):  # noqa: F811
    os.mkfifo(tmp_path / "ckpt.pt")
    fails(argv(tmp_path, resume=tmp_path), "no whole checkpoint in")
    fails(argv(tmp_path, resume=tmp_path / "ckpt.pt"), "no whole checkpoint in")


# --- other settings


def test_settings_that_may_change_are_listed_and_recorded(tmp_path, fails, capsys):  # noqa: F811
    train(tmp_path, iterations=8)
    capsys.readouterr()
    again = dict(iterations=16, lr=5e-4, weight_decay=0.2, resume="latest")
    fails(argv(tmp_path, **again), "--allow-change lr,weight_decay", "--lr: 0.001 in the checkpoint, 0.0005 now",
          "--weight_decay: 0.1", lines=3)
    fails(argv(tmp_path, allow_change="lr", **again), "--allow-change weight_decay", lines=2)
    found = train(tmp_path, allow_change="lr,weight_decay,iterations,beta1", **again)
    expected = {"iterations": [8, 16], "lr": [0.001, 0.0005], "weight_decay": [0.1, 0.2]}
    assert found["changes"] == [{"step": 8, "changed": expected}] and found["config"]["lr"] == 5e-4
    found = train(tmp_path, **{**again, "iterations": 24})
    assert len(found["changes"]) == 1 and [m["lr"] for m in found["metrics"]][1:] == pytest.approx([5e-4] * 2)


def test_a_run_that_diverged_goes_on_with_a_lower_rate(tmp_path, capsys):
    train(tmp_path, iterations=8)
    assert main(tmp_path, iterations=16, lr=1e30, resume="latest", allow_change="lr") == 1
    assert "checkpoint of step 8 is kept" in capsys.readouterr().err
    assert train(tmp_path, iterations=16, lr=1e-4, resume="latest", allow_change="lr")["status"] == "done"


@pytest.mark.parametrize("changes, words", [
    (dict(allow_change="lr"), ["--allow_change", "without --resume"]),
    (dict(allow_change="width,lr", resume="latest"), ["--allow_change width: no run can"]),
    (dict(allow_change="lrr", resume="latest"), ["--allow_change lrr"]),
    (dict(resume=""), ["--resume ''", "or leave it out"]), (dict(experiment_name=""), ["--experiment_name ''"]),
    (dict(log_dir="a\0b"), ["--log_dir 'a\\x00b'"]),
])
def test_resume_flags_that_cannot_work(tmp_path, fails, changes, words):  # noqa: F811
    fails(argv(tmp_path, **changes), "1 setting(s)", *words, lines=2, code=2)


# --- numbers


@pytest.mark.parametrize("flag, value, words", [
    ("width", 2**31, ["--width 2147483648", "<= 4096"]), ("width", 10**40, ["--width 1000", "<= 4096"]),
    ("prime", 10**12 + 39, ["--prime 1000000000039", "< 5000"]), ("prime", 2**607 - 1, ["--prime", "< 5000"]),
    ("iterations", 10**30, ["--iterations 1", "below 4294967296"]), ("threads", 10**12, ["--threads", "<= 1024"]),
    ("batch_size", 10**18, ["--batch_size", "<= 65536"]), ("layers", 100000, ["--layers 100000", "<= 1000"]),
    ("eval_every", 2**70, ["--eval_every"]), ("save_every", 10**20, ["--save_every"]),
    ("warmup_steps", 10**20, ["--warmup_steps"]), ("mlp_ratio", 10**10, ["--mlp_ratio"]),
    ("heads", 10**12, ["--heads"]), ("seed", 2**64, ["--seed"]), ("train_fraction", "nan", ["--train_fraction nan"]),
    ("lr", "inf", ["--lr inf", "below"]), ("lr", "nan", ["--lr nan"]), ("weight_decay", "inf", ["--weight_decay inf"]),
    ("adam_eps", "1e-400", ["adam_eps"]),
])
def test_numbers_too_large_are_refused_before_anything_is_made(flag, value, words, tmp_path, fails):  # noqa: F811
    began = time.process_time()
    fails(argv(tmp_path, **{flag: value}), "1 setting(s)", *words, lines=2, code=2)
    assert not (tmp_path / "logs").exists() and time.process_time() - began < 20  # hours, where it counts or allocates


@pytest.mark.parametrize("word", ["1.5", "nan", "inf", "1e5", "9" * 5000, "1e", ""])
def test_what_is_no_whole_number_is_told(word, fails):  # noqa: F811
    fails(["--iterations", word], "argument --iterations", "invalid", code=2)


def test_what_no_machine_can_hold_is_out_of_memory(tmp_path, fails):  # noqa: F811
    fails(argv(tmp_path, layers=1000, width=4096, mlp_ratio=100), "out of memory: lower --batch-size, --layers")


def test_want_of_memory_before_the_first_step_is_a_sentence(tmp_path, monkeypatch, fails):  # noqa: F811
    def failing(*arguments):
        raise OUT_OF_MEMORY

    monkeypatch.setattr(train_grokking, "make_equations", failing)
    fails(argv(tmp_path), "out of memory: lower --batch-size")


# --- terminals and folders


def test_a_console_that_lacks_characters_and_names_with_controls(tmp_path):
    words = script(tmp_path, log_dir=tmp_path / "ä\x1b[31m", iterations=8)
    child = subprocess.run(words, env=environment(PYTHONIOENCODING="ascii"), capture_output=True)
    assert child.returncode == 0 and b"\\xe4\\x1b[31m" in child.stdout and b"\x1b" not in child.stdout
    child = subprocess.run([*words, "--resume", "\x1b[2J"], env=environment(LC_ALL="C"), capture_output=True)
    assert child.returncode == 1 and b"no whole checkpoint in \\x1b[2J" in child.stderr


def test_controls_in_a_checkpoint_do_not_reach_the_terminal(tmp_path, capsys):
    train(tmp_path, iterations=8)
    for path in run_folder(tmp_path).glob("ckpt*"):
        rewrite(path, lambda state: state["settings"].update(operation="\x1b[2J\nerror: x" * 99))
    capsys.readouterr()
    assert main(tmp_path, iterations=16, resume="latest") == 1
    error = capsys.readouterr().err
    assert "\x1b" not in error and "--operation: '\\x1b[2J\\nerror: x" in error and error.count("\n") == 2
    assert len(error) < 600


def test_a_log_folder_that_is_none_is_told(tmp_path, fails):  # noqa: F811
    (tmp_path / "file").touch()
    fails(argv(tmp_path, log_dir=tmp_path / "file"), f"{tmp_path}/file", "Not a directory")
    fails(argv(tmp_path, log_dir=tmp_path / ("x" * 300)), "File name too long")


def test_metrics_json_is_json_and_whole(tmp_path, monkeypatch):
    train(tmp_path, iterations=8)
    before = (run_folder(tmp_path) / "metrics.json").read_bytes()
    monkeypatch.setattr(os, "replace", full)
    assert main(tmp_path, resume="latest") == 1
    assert (run_folder(tmp_path) / "metrics.json").read_bytes() == before and json.loads(before)["status"] == "done"
