"""Whatever ends a run: what was trained is saved, then the reason is said in a sentence, and the run can go on.

Signals and damaged checkpoints are in test_checkpoint.py, input that is wrong from the start in test_bad_input.py."""
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import (
    SCRIPT,
    assert_same_state,
    documents,
    environment,
    launch,
    load_state,
    losses,
    make_data,
    records,
    run_folder,
    script,
    steps_saved,
    tiny,
    write_shard,
)

import train_gpt
from train_gpt import MuonAdamW, Run, RunLog


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run with the flags of `tiny`."""
    base = tmp_path_factory.mktemp("whole")
    assert train_gpt.main(tiny(base)) == 0
    return run_folder(base)


def goes_on(tmp_path, whole, **changes):
    """The run of tmp_path, resumed, ends as the uninterrupted one did."""
    assert train_gpt.main([*tiny(tmp_path, **changes), "--resume"]) == 0
    mine, expected = losses(run_folder(tmp_path)), losses(whole)
    assert mine == expected
    assert_same_state(load_state(run_folder(tmp_path), 8), load_state(whole, 8))


def last_record(tmp_path) -> dict:
    return records(run_folder(tmp_path))[-1]


# --- errors on the way


ERRORS = {
    "memory": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "smaller --micro-tokens"),
    "memory of a CPU": (RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory "
                                     "(you tried to allocate 9 bytes)"), "smaller --micro-tokens"),
    "disk": (OSError(5, "Input/output error"), "Input/output error"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_an_error_of_a_later_step_saves_the_whole_steps(error, tmp_path, monkeypatch, capsys, whole):
    """In the forward pass of step 6: step 5 is what was trained."""
    raised, said = ERRORS[error]

    def forward(self, *args, forward=train_gpt.GPT.forward):
        if torch.is_grad_enabled() and len(calls) == 5:
            raise raised
        calls.append(1) if torch.is_grad_enabled() else None
        return forward(self, *args)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.GPT, "forward", forward)
        assert train_gpt.main(tiny(tmp_path)) == 1
    out, told = capsys.readouterr()
    assert steps_saved(run_folder(tmp_path)) == [5] and "step_000005" in out
    assert told.startswith("error: ") and said in told and told.count("\n") == 1 and "lower" not in told
    assert last_record(tmp_path)["status"] == "error" and str(raised)[:20] in last_record(tmp_path)["error"]
    goes_on(tmp_path, whole)


@pytest.mark.parametrize("step, save_every, saved", [(4, 0, [4]), (4, 4, [4]), (8, 0, [8])])
def test_out_of_memory_in_an_evaluation_is_called_so_and_loses_nothing(
        step, save_every, saved, tmp_path, monkeypatch, capsys, whole):
    def evaluate(*args, evaluate=train_gpt.evaluate):
        calls.append(1)
        if 4 * len(calls) == step:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return evaluate(*args)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt, "evaluate", evaluate)
        assert train_gpt.main(tiny(tmp_path, save_every=save_every)) == 1
    told = capsys.readouterr().err
    assert "out of memory" in told and "--micro-tokens" in told and "nan" not in told and "_lr" not in told
    assert steps_saved(run_folder(tmp_path)) == saved and last_record(tmp_path)["status"] == "error"
    goes_on(tmp_path, whole, save_every=save_every)


def test_an_error_within_an_update_saves_no_half_of_it(tmp_path, monkeypatch, capsys):
    def step(self, *args, step=MuonAdamW.step):
        step(self, *args)
        if self.steps == 6:
            raise OSError("in the middle")
    monkeypatch.setattr(MuonAdamW, "step", step)
    assert train_gpt.main(tiny(tmp_path, save_every=4)) == 1
    assert steps_saved(run_folder(tmp_path)) == [4] and "in the middle" in capsys.readouterr().err


def test_an_error_of_ours_keeps_its_traceback_and_saves(tmp_path, monkeypatch):
    def next_batch(self, step, next_batch=Run.next_batch):
        assert step < 5, "an invariant"
        return next_batch(self, step)
    monkeypatch.setattr(Run, "next_batch", next_batch)
    with pytest.raises(AssertionError, match="an invariant"):
        train_gpt.main(tiny(tmp_path))
    assert steps_saved(run_folder(tmp_path)) == [5]


def damaged_data(folder, how: str):
    """Three shards; the third is damaged after the check at the start, while the run is under way."""
    path = folder / "data_train_000002.bin"
    if how == "bad token":
        tokens = documents(1000, 2)
        tokens[500] = 65535
        write_shard(path, tokens)
    elif how == "truncated":
        os.truncate(path, 1500)
    else:
        path.unlink()


@pytest.mark.parametrize("how, said, size", [
    ("bad token", "holds token id 65535", 1), ("removed", "is no file", 1), ("truncated", "is damaged", 2),
])
def test_a_shard_that_is_damaged_meanwhile_ends_the_run_saved(how, said, size, tmp_path):
    """On all ranks after the same step; a mapped file would end the processes with SIGBUS."""
    make_data(tmp_path / "data")
    before = f"""
from pathlib import Path
sys.path.insert(0, {os.path.dirname(__file__)!r})
import test_faults
def prepare(self, step, real=train_gpt.Loader._prepare):
    if step == 1 and self.world.rank == 0:
        test_faults.damaged_data(Path({str(tmp_path / 'data')!r}), {how!r})
    real(self, step)
train_gpt.Loader._prepare = prepare
"""
    argv = tiny(tmp_path, iterations=40, eval_every=0)
    code = tmp_path / "damaged.py"
    code.write_text(f"import sys, train_gpt\n{before}\nsys.exit(train_gpt.main({[str(a) for a in argv]!r}))")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)] if size > 1 else []
    done = script(*torchrun, code, timeout=240)
    assert done.returncode == 1 and f"error: {tmp_path / 'data' / 'data_train_000002.bin'} {said}" in done.stderr
    assert size > 1 or "Traceback" not in done.stderr
    (step,) = steps_saved(run_folder(tmp_path))
    assert 10 < step < 20 and last_record(tmp_path)["status"] == "error" and last_record(tmp_path)["step"] == step


# --- the console


def test_a_closed_pipe_stops_the_run_saved(tmp_path):
    """`python train_gpt.py | head`: no traceback, and nothing that the interpreter could not flush."""
    process = launch(tiny(tmp_path, iterations=100_000, eval_every=0, log_every=1))
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.stdout.close()
            break
    error = process.stderr.read()
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    assert error.startswith("warning: console: Broken pipe") and error.count("\n") == 1
    (step,) = steps_saved(run_folder(tmp_path))
    assert step >= 4 and last_record(tmp_path)["status"] == "interrupted"


def test_a_full_disk_under_the_console_costs_its_lines_only(tmp_path, whole):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, SCRIPT, *map(str, tiny(tmp_path))], stdout=full, stderr=subprocess.PIPE,
                              text=True, env=environment(), timeout=240)
    assert done.returncode == 0
    assert done.stderr.startswith("warning: console: No space left on device") and done.stderr.count("\n") == 1
    assert losses(run_folder(tmp_path)) == losses(whole) and steps_saved(run_folder(tmp_path)) == [8]


@pytest.mark.parametrize("name", ["train_gpt.py", "train_baseline.py"])
def test_a_console_that_is_closed_from_the_start_is_not_missed(name, tmp_path):
    """`>&- 2>&-`: sys.stdout and sys.stderr are None then."""
    argv = " ".join(map(str, tiny(tmp_path, iterations=1)[:6]))
    flags = "--preset cpu --iterations 1 --width 24 --head-dim 12 --eval-tokens 300 --dtype fp32 --no-compile"
    command = f"{sys.executable} {SCRIPT.with_name(name)} {argv} {flags} --num-layers 2 >&- 2>&-"
    assert subprocess.run(command, shell=True, env=environment(), timeout=240).returncode == 0
    assert steps_saved(run_folder(tmp_path)) == [1]


def test_a_console_that_lacks_characters_is_written_all_the_same(tmp_path):
    argv = tiny(tmp_path, log_dir=tmp_path / "übung\x1b[31m")
    env = environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    done = subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True, env=env, timeout=240)
    assert done.returncode == 0 and b"\x1b" not in done.stdout + done.stderr and b"bung\\x1b[31m" in done.stdout
    assert max(done.stdout) < 128 and not done.stderr


def test_nohup_is_respected(tmp_path):
    """SIGHUP that is ignored stays so."""
    body = "signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = launch(tiny(tmp_path, iterations=30), body)
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGHUP)
    _, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (0, "") and steps_saved(run_folder(tmp_path)) == [30]


def test_a_lost_terminal_may_say_so_twice(tmp_path):
    """The kernel and the shell both send SIGHUP: the second one must not end the run before it has saved."""
    body = """
def step(self, *args, step=train_gpt.MuonAdamW.step):
    step(self, *args)
    if self.steps == 3:
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
train_gpt.MuonAdamW.step = step
"""
    process = launch(tiny(tmp_path), body)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 129 and steps_saved(run_folder(tmp_path)) == [3] and "Traceback" not in error


def test_ctrl_c_in_the_imports_shows_no_traceback(tmp_path):
    """torch takes a second to import; the signal comes when argparse, the first one, is imported."""
    (tmp_path / "argparse.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    env = environment(PYTHONPATH=str(tmp_path))
    done = subprocess.run([sys.executable, SCRIPT, "--help"], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == -signal.SIGINT and (done.stdout, done.stderr) == ("", "")


# --- looks at the validation loss


@pytest.mark.parametrize("at", [4, 8])
def test_kill_9_in_an_evaluation_loses_nothing(at, tmp_path, whole):
    """What is saved before is there, and the look that was cut short is taken by the resumed run."""
    body = f"""
def evaluate(*args, evaluate=train_gpt.evaluate, calls=[]):
    calls.append(1)
    if 4 * len(calls) == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(*args)
train_gpt.evaluate = evaluate
"""
    process = launch(tiny(tmp_path, save_every=4), body)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL and steps_saved(run_folder(tmp_path))[-1] == at
    goes_on(tmp_path, whole, save_every=4)
    assert [r["step"] for r in records(run_folder(tmp_path)) if "val_loss" in r and "event" not in r] == [4, 8]


@pytest.mark.parametrize("at, number", [(4, signal.SIGINT), (8, signal.SIGTERM)])
def test_a_signal_in_an_evaluation_ends_it_and_loses_nothing(number, at, tmp_path, whole):
    """Though no --save-every has saved before: what matters is written first, at once, and looked at later."""
    body = f"""
def evaluate(*args, evaluate=train_gpt.evaluate, calls=[]):
    calls.append(1)
    if 4 * len(calls) == {at}:
        signal.raise_signal({int(number)})
        print("still evaluating")
    return evaluate(*args)
train_gpt.evaluate = evaluate
"""
    process = launch(tiny(tmp_path), body)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 128 + number and "still evaluating" not in out and "Traceback" not in error
    assert steps_saved(run_folder(tmp_path)) == [at] and last_record(tmp_path)["status"] == "interrupted"
    goes_on(tmp_path, whole)


def test_a_persons_ctrl_c_ends_at_once_after_any_signal(tmp_path):
    body = """
def step(self, *args, step=train_gpt.MuonAdamW.step):
    step(self, *args)
    if self.steps == 3:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a scheduler repeats itself
        print("goes on", flush=True)
        signal.raise_signal(signal.SIGINT)
train_gpt.MuonAdamW.step = step
"""
    process = launch(tiny(tmp_path), body)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT and "goes on" in out


def test_ctrl_c_before_the_first_step_is_a_sentence(tmp_path):
    body = "train_gpt.train = lambda run: signal.raise_signal(signal.SIGINT)"
    process = launch(tiny(tmp_path), body)
    out, error = process.communicate(timeout=120)
    assert (process.returncode, error) == (130, "stopped before the first step\n")


def test_a_validation_at_a_checkpoint_is_not_done_again(tmp_path, monkeypatch):
    """meta.json is completed after it: the run that goes on from there has its loss."""
    def batch(self, step, next_batch=Run.next_batch):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, step)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "next_batch", batch)
        assert train_gpt.main(tiny(tmp_path, save_every=4)) == 143
    folder = run_folder(tmp_path)
    shutil.rmtree(folder / "checkpoints" / "step_000006")
    meta = json.loads((folder / "checkpoints" / "step_000004" / "meta.json").read_text())
    assert meta["val_step"] == 4 and meta["val_loss"] == losses(folder)["val_loss"][4]
    assert train_gpt.main([*tiny(tmp_path, save_every=4), "--resume"]) == 0
    assert [r["step"] for r in records(folder) if "val_loss" in r and "event" not in r] == [4, 8]


# --- one run, one process


def test_a_second_resume_says_who_has_the_run(tmp_path):
    process = launch(tiny(tmp_path, iterations=100_000, eval_every=0, save_every=1))
    try:
        for line in process.stdout:
            if line.startswith("step 3/"):
                break
        process.send_signal(signal.SIGSTOP)
        second = script(SCRIPT, *tiny(tmp_path, iterations=100_000), "--resume", timeout=120)
        assert second.returncode == 1 and f"is in use by process {process.pid} of " in second.stderr
        assert second.stderr.count("\n") == 1
        process.send_signal(signal.SIGCONT)
    finally:
        process.kill()
        process.communicate()
    assert train_gpt.main([*tiny(tmp_path, iterations=100_000, target_loss=100), "--resume", "--allow-change", ""]) == 0


def test_a_run_that_goes_on_while_its_checkpoint_is_read_is_left_to_the_other(tmp_path, monkeypatch, capsys):
    """A requeued job: the one before it saves and ends between the look and the lock."""
    assert train_gpt.main(tiny(tmp_path, save_every=4, keep=1)) == 0
    def lock(folder, lock=train_gpt.lock_folder):
        shutil.copytree(folder / "checkpoints" / "step_000008", folder / "checkpoints" / "step_000009")
        return lock(folder)
    monkeypatch.setattr(train_gpt, "lock_folder", lock)
    argv = [*tiny(tmp_path, iterations=20), "--resume", "--allow-change", "iterations"]
    assert train_gpt.main(argv) == 1
    assert "has gone on meanwhile: give the command again" in capsys.readouterr().err
    assert steps_saved(run_folder(tmp_path)) == [8, 9]


# --- log files


def test_a_line_that_was_cut_short_stays_alone(tmp_path):
    log = RunLog(tmp_path)
    log.main = True
    log.metric(step=1)
    for name in ("metrics.jsonl", "log.txt"):
        with open(tmp_path / name, "a") as file:
            file.write('{"half')
    log.metric(step=2)
    log.line("whole")
    log.line("again")
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"half\n{"step": 2}\n'
    assert (tmp_path / "log.txt").read_text() == '{"half\nwhole\nagain\n'


def test_a_log_that_cannot_be_written_is_told_once(tmp_path, capsys):
    log = RunLog(tmp_path)
    log.main = True
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    for step in range(5):
        log.metric(step=step)
        log.line("a line")
    assert capsys.readouterr().out.count("metrics.jsonl: No space left on device; training goes on") == 1
    assert (tmp_path / "log.txt").read_text() == "a line\n" * 5


def test_a_full_disk_at_the_start_names_the_file(tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(train_gpt, "sync", full)
    assert train_gpt.main(tiny(tmp_path)) == 1
    error = capsys.readouterr().err
    assert "config.json cannot be written: No space left on device" in error and error.count("\n") == 1


# --- data


def test_a_presets_eval_tokens_are_a_wish_the_users_are_not(tmp_path, capsys):
    """The preset wants 131,072, the split has 499."""
    argv = tiny(tmp_path, iterations=1)
    place = argv.index("--eval-tokens")
    assert train_gpt.main([*argv[:place], *argv[place + 2:], "--preset", "cpu"]) == 0
    out, error = capsys.readouterr()
    assert "eval_tokens 499: all that the validation split has" in out and "499 validation tokens" in out and not error
    assert json.loads((run_folder(tmp_path) / "config.json").read_text())["settings"]["eval_tokens"] == 499
    assert train_gpt.main([*argv, "--eval-tokens", "500"]) == 1


def test_the_fingerprint_is_of_whole_shards_and_of_their_meaning(tmp_path):
    """The last token of a long shard; and which token begins a document."""
    def fingerprint(tokens, **meta) -> str:
        shutil.rmtree(tmp_path / "data", ignore_errors=True)
        return train_gpt.open_corpus(str(make_data(tmp_path / "data", train=[tokens], **meta))).fingerprint()
    long = documents(60_000, 0)
    other = long.copy()
    other[-1] = (other[-1] + 1) % 60
    assert fingerprint(long) == fingerprint(long) != fingerprint(other)
    assert fingerprint(long, eot=None) != fingerprint(long)


def test_hashes_are_kept_by_size_time_and_inode(tmp_path, monkeypatch):
    corpus = train_gpt.open_corpus(str(make_data(tmp_path / "data")))
    first, hashed, real = corpus.fingerprint(), [], train_gpt.file_hash
    monkeypatch.setattr(train_gpt, "file_hash", lambda path: hashed.append(path.name) or real(path))
    assert corpus.fingerprint() == first and hashed == []
    os.utime(corpus.train[1], (1, 1))
    assert corpus.fingerprint() == first and hashed == ["data_train_000001.bin"]
    (tmp_path / "data" / ".hashes.json").write_text("[1")
    assert corpus.fingerprint() == first and len(hashed) == 5


def test_a_checkpoint_of_before_goes_on(tmp_path, monkeypatch, whole):
    """Earlier versions wrote no `saved`, `bytes`, `val_step`, `best_loss`."""
    def batch(self, step, next_batch=Run.next_batch):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, step)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "next_batch", batch)
        assert train_gpt.main(tiny(tmp_path)) == 143
    path = run_folder(tmp_path) / "checkpoints" / "step_000006" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps({key: meta[key] for key in meta.keys() - {"saved", "bytes", "val_step", "best_loss"}}))
    goes_on(tmp_path, whole)
