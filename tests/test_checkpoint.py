"""Checkpoints: resumed runs continue to the bit, damaged or half-written ones are never used, and nothing is lost."""
import contextlib
import json
import os
import re
import resource
import shutil
import signal

import pytest
import torch
from helpers import (
    SCRIPT,
    assert_same_state,
    launch,
    load_state,
    losses,
    make_data,
    records,
    run_folder,
    script,
    settings,
    steps_saved,
    tiny,
)

import train_gpt
from train_gpt import MuonAdamW, Run, checkpoints_in, find_checkpoint, resume_place, write_checkpoint

META = {  # of a checkpoint, apart from what write_checkpoint adds
    "settings": {}, "train_time_ms": 1.5, "position": {"epoch": 0, "shard": 0, "used": 7}, "val_loss": None,
    "data": {"fingerprint": "f00", "meta": {}},
}

KILLED_IN_STEP_6 = """
def kill(self, *args, step=train_gpt.MuonAdamW.step, **kwargs):
    step(self, *args, **kwargs)
    if self.steps == 6:
        os.kill(os.getpid(), signal.SIGKILL)
train_gpt.MuonAdamW.step = kill
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run with the flags of `tiny`."""
    base = tmp_path_factory.mktemp("whole")
    assert train_gpt.main(tiny(base)) == 0
    return run_folder(base)


def assert_same_run(folder, whole, steps: int = 8):
    """Losses, and weights, moments and random state at the end, are those of the uninterrupted run."""
    mine, expected = losses(folder), losses(whole)
    assert set(mine["train_loss"]) == set(range(1, steps + 1)) and set(mine["val_loss"]) == {4, 8}
    assert mine == expected and len(set(expected["train_loss"].values())) == steps
    assert_same_state(load_state(folder, steps), load_state(whole, steps))


def signal_in_step(monkeypatch, number_of_step: int, number: int):
    """The signal arrives in the middle of a step; the first step is 1."""
    def signalled(self, *args, step=MuonAdamW.step, **kwargs):
        step(self, *args, **kwargs)
        if self.steps == number_of_step:
            signal.raise_signal(number)
    monkeypatch.setattr(MuonAdamW, "step", signalled)


def interrupted(tmp_path, monkeypatch, after: int = 3, **changes):
    """Folder of a run that was stopped by SIGINT after `after` steps."""
    with monkeypatch.context() as patch:
        signal_in_step(patch, after, signal.SIGINT)
        assert train_gpt.main(tiny(tmp_path, **changes)) == 130
    return run_folder(tmp_path)


# --- resuming


def test_run_killed_between_checkpoints_continues_to_the_bit(tmp_path, whole):
    """kill -9 in step 6, the last checkpoint is that of step 4; two steps are run again and give the same losses."""
    process = launch(tiny(tmp_path, save_every=2), KILLED_IN_STEP_6)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    assert steps_saved(run_folder(tmp_path)) == [2, 4]
    assert train_gpt.main([*tiny(tmp_path, save_every=2), "--resume"]) == 0
    resumed = next(record for record in records(run_folder(tmp_path)) if record.get("event") == "resume")
    assert resumed["step"] == 4 and resumed["config"]["settings"]["resume"]
    assert_same_run(run_folder(tmp_path), whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
@pytest.mark.parametrize("after", [3, 4])  # 4: at an evaluation
def test_signal_saves_and_the_run_continues_to_the_bit(number, after, tmp_path, monkeypatch, whole, capsys):
    handler = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_in_step(patch, after, number)
        assert train_gpt.main(tiny(tmp_path)) == 128 + number
    assert signal.getsignal(number) is handler, "handlers are given back"
    assert steps_saved(run_folder(tmp_path)) == [after]
    assert records(run_folder(tmp_path))[-1]["status"] == "interrupted"
    assert train_gpt.main([*tiny(tmp_path), "--resume", "latest"]) == 0
    assert f"after step {after}" in capsys.readouterr().out
    assert_same_run(run_folder(tmp_path), whole)


@pytest.mark.parametrize("changes", [
    dict(log_every=3), dict(shuffle=False, max_doc_len=0, batch_tokens=512, micro_tokens=64),
    dict(stage_ends=(0.5, 1.0), batch_tokens=(128, 256), seq_len=(32, 64), window=(16, 48)), dict(dtype="bf16"),
], ids=str)
def test_other_settings_continue_to_the_bit_too(changes, tmp_path, tmp_path_factory, monkeypatch):
    """Accumulation, several epochs (24 rows a shard), stages, bf16, a stop between console lines."""
    base = tmp_path_factory.mktemp("whole")
    assert train_gpt.main(tiny(base, **changes)) == 0
    folder = interrupted(tmp_path, monkeypatch, **changes)
    assert train_gpt.main([*tiny(tmp_path, **changes), "--resume"]) == 0
    expected, mine = losses(run_folder(base)), losses(folder)
    assert expected["val_loss"] == mine["val_loss"]
    assert expected["train_loss"].items() <= mine["train_loss"].items()  # the stop has a console line of its own
    assert_same_state(load_state(folder, 8), load_state(run_folder(base), 8))


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGUSR1, 138)])
def test_signal_from_outside(number, code, tmp_path):
    process = launch(tiny(tmp_path, iterations=100_000, eval_every=0))
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    out, error = process.communicate(timeout=120)
    name = signal.Signals(number).name
    assert (process.returncode, error) == (code, f"{name}: saves and stops after this step; Ctrl-C ends at once\n")
    (step,) = steps_saved(run_folder(tmp_path))
    assert step >= 3 and f"step_{step:06d}" in out
    assert records(run_folder(tmp_path))[-1]["step"] == step


def test_second_signal_ends_at_once(tmp_path):
    twice = """
def step(self, *_):
    signal.raise_signal(signal.SIGINT)
    print("still here", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("not gone", flush=True)
train_gpt.MuonAdamW.step = step
"""
    process = launch(tiny(tmp_path), twice)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGINT
    assert "still here" in out and "not gone" not in out and not (run_folder(tmp_path) / "checkpoints").exists()


def test_resume_by_run_folder_and_by_checkpoint_folder(tmp_path, monkeypatch, whole):
    folder = interrupted(tmp_path, monkeypatch, after=5, save_every=2)
    assert steps_saved(folder) == [4, 5]
    kept = tmp_path / "kept"
    for place in (folder, folder / "checkpoints" / "step_000004"):
        shutil.copytree(folder, kept)
        assert train_gpt.main([*tiny(tmp_path), "--resume", str(place)]) == 0
        assert records(folder)[-1]["status"] == "done"
        assert_same_run(folder, whole)
        shutil.rmtree(folder)
        kept.rename(folder)


def test_latest_is_the_newest_of_all_runs_of_the_experiment(tmp_path):
    """By the order in which they were written; a copy with other file times changes nothing."""
    for i, (run, step) in enumerate([("b", 2), ("a", 4), ("c", 1)]):
        path = write_checkpoint(tmp_path / "x" / run, step, {}, META, keep=9)
        os.utime(path, (1000 - i, 1000 - i))
    write_checkpoint(tmp_path / "other" / "z", 9, {}, META, keep=9)
    found = checkpoints_in(resume_place(settings(log_dir=str(tmp_path), experiment_name="x", resume="latest")))
    assert [path.parent.parent.name for path, _ in found] == ["c", "a", "b"] and found[0][1]["step"] == 1


def test_checkpoints_of_earlier_versions_are_older_and_go_by_run_and_step(tmp_path):
    """They have no `saved`: that of the run with the latest name counts."""
    for run, step in [("20260101-b", 2), ("20260101-b", 10), ("20260102-a", 1)]:
        path = write_checkpoint(tmp_path / run, step, {}, META, keep=9)
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps({key: meta[key] for key in meta.keys() - {"saved", "bytes"}}))
    assert [meta["step"] for _, meta in checkpoints_in(tmp_path)] == [1, 10, 2]
    write_checkpoint(tmp_path / "20260101-b", 5, {}, META, keep=2)
    assert [meta["step"] for _, meta in checkpoints_in(tmp_path)] == [5, 1, 10]


def test_checkpoints_behind_a_link_are_found_those_of_other_experiments_are_not(tmp_path):
    """Runs are kept on another disk; logs/ itself is the folder of many experiments."""
    saved = write_checkpoint(tmp_path / "disk" / "run", 3, {}, META, keep=9)
    (tmp_path / "logs" / "x").mkdir(parents=True)
    (tmp_path / "logs" / "x" / "run").symlink_to(tmp_path / "disk" / "run")
    (path, _), = checkpoints_in(tmp_path / "logs" / "x")
    assert path.resolve() == saved
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in .*logs: start without --resume"):
        find_checkpoint(tmp_path / "logs", {}, 1)


def content(folder) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("changes", [dict(keep=9, save_every=2), dict(target_loss=100)], ids=str)
def test_resuming_a_finished_run_writes_and_removes_nothing_and_says_so(changes, tmp_path, capsys):
    assert train_gpt.main(tiny(tmp_path, **changes)) == 0
    before = content(tmp_path)
    capsys.readouterr()
    changes.pop("keep", None)
    assert train_gpt.main([*tiny(tmp_path, **changes), "--resume"]) == 0
    out, error = capsys.readouterr()
    ways = "a lower --target-loss" if "target_loss" in changes else "--iterations N --allow-change iterations"
    assert re.search(rf"step_00000[48]: this run has ended, after step [48] of 8; to go on: {ways}\n", out)
    assert content(tmp_path) == before and not error


def test_a_finished_run_goes_on_with_more_steps_and_other_rates(tmp_path, capsys):
    assert train_gpt.main(tiny(tmp_path)) == 0
    more = ["--iterations", "12", "--muon-lr", "0.01", "--resume", "--allow-change", "iterations,muon-lr"]
    assert train_gpt.main([*tiny(tmp_path), *more]) == 0
    assert "muon_lr: 0.02 before, 0.01 from here on" in capsys.readouterr().out
    resumed = next(r for r in records(run_folder(tmp_path)) if r.get("event") == "resume")
    assert resumed["changed"] == {"iterations": [8, 12], "muon_lr": [0.02, 0.01]} and resumed["step"] == 8
    assert steps_saved(run_folder(tmp_path)) == [8, 12]
    assert train_gpt.main([*tiny(tmp_path), *more[:4], "--resume"]) == 0  # the changed settings are the run's now
    assert "step_000012: this run has ended" in capsys.readouterr().out


def test_a_run_that_became_nan_goes_on_with_a_lower_rate(tmp_path, capsys):
    argv = tiny(tmp_path, save_every=2, eval_every=0)
    real, factor = train_gpt.GPT.forward, [1.0]
    with pytest.MonkeyPatch.context() as patch:
        def next_batch(self, step, next_batch=Run.next_batch):
            factor[0] = float("nan") if step >= 4 else 1.0
            return next_batch(self, step)
        patch.setattr(Run, "next_batch", next_batch)
        patch.setattr(train_gpt.GPT, "forward", lambda self, *args: real(self, *args) * factor[0])
        assert train_gpt.main(argv) == 1
    error = capsys.readouterr().err
    assert "step_000004 is kept; lower --muon-lr" in error
    assert train_gpt.main([*argv, "--resume", "--muon-lr", "0.001", "--allow-change", "muon_lr"]) == 0
    assert records(run_folder(tmp_path))[-1]["status"] == "done"


def test_a_change_of_shapes_is_refused_and_nothing_is_padded(tmp_path, monkeypatch, capsys):
    interrupted(tmp_path, monkeypatch)
    argv = [*tiny(tmp_path, width=48), "--resume", "--allow-change", "width"]
    assert train_gpt.main(argv) == 1
    error = capsys.readouterr().err
    assert "cannot be used (state.pt: optimizer: state: master: " in error and "no whole checkpoint" in error


def test_a_run_keeps_as_many_checkpoints_as_it_was_told_to(tmp_path, monkeypatch):
    folder = interrupted(tmp_path, monkeypatch, after=6, save_every=1, keep=4)
    assert steps_saved(folder) == [3, 4, 5, 6]
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    assert steps_saved(folder) == [4, 5, 6, 8]
    more = ["--iterations", "9", "--allow-change", "iterations", "--resume", "--keep", "1"]
    assert train_gpt.main([*tiny(tmp_path), *more]) == 0
    assert steps_saved(folder) == [9]


@pytest.mark.parametrize("copy", [shutil.copytree, lambda a, b: shutil.copytree(a, b, copy_function=shutil.copy)])
def test_a_copied_run_goes_on_from_the_same_checkpoint(copy, tmp_path, monkeypatch, whole):
    """File times of a copy, an archive say nothing: they are made the wrong way round here."""
    folder = interrupted(tmp_path, monkeypatch, after=6, save_every=1, keep=6)
    copied = folder.with_name("copied")
    copy(folder, copied)
    shutil.rmtree(folder)
    for step in steps_saved(copied):
        for path in (copied / "checkpoints" / f"step_{step:06d}").rglob("*"):
            os.utime(path, (1000 - step, 1000 - step))
        os.utime(copied / "checkpoints" / f"step_{step:06d}", (1000 - step, 1000 - step))
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    assert steps_saved(copied) == [2, 3, 4, 5, 6, 8][-6:]
    assert_same_run(copied, whole)


def test_the_clock_goes_on_where_it_stopped(tmp_path, monkeypatch):
    folder = interrupted(tmp_path, monkeypatch)
    before = records(folder)[-1]["train_time_ms"]
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    after = [r["train_time_ms"] for r in records(folder) if r.get("step", 0) > 3]
    assert after == sorted(after) and after[0] > before > 0


# --- what may change


def test_other_settings_are_refused_by_name(tmp_path, monkeypatch, capsys):
    folder = interrupted(tmp_path, monkeypatch)
    argv = tiny(tmp_path, adam_lr=0.5, seed=7, width=48, eval_tokens=200, log_every=2)
    capsys.readouterr()
    assert train_gpt.main([*argv, "--resume"]) == 1
    error = capsys.readouterr().err
    assert "adam_lr: 0.002 in the checkpoint, 0.5 now" in error and "seed: 0 in the checkpoint, 7 now" in error
    assert "width: 32 in the checkpoint, 48 now" in error
    assert "log_every" not in error and "eval_tokens" not in error and error.count("in the checkpoint") == 3
    assert steps_saved(folder) == [3]


def test_other_data_is_refused(tmp_path, monkeypatch, capsys):
    interrupted(tmp_path, monkeypatch)
    make_data(tmp_path / "data", val=[list(range(63)) * 8])
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 1
    assert "data_fingerprint: " in capsys.readouterr().err


def test_other_data_is_begun_anew_where_that_is_allowed(tmp_path, monkeypatch):
    """Also where it has fewer shards than the place at which the run stopped."""
    folder = interrupted(tmp_path, monkeypatch, after=12, iterations=20, eval_every=0, shuffle=False)
    meta = json.loads((folder / "checkpoints" / "step_000012" / "meta.json").read_text())
    assert meta["position"]["shard"] == 1
    shutil.rmtree(tmp_path / "data")
    make_data(tmp_path / "data", train=[list(range(63)) * 20])
    argv = [*tiny(tmp_path, iterations=20, eval_every=0, shuffle=False), "--resume"]
    assert train_gpt.main(argv) == 1
    assert train_gpt.main([*argv, "--allow-change", "data-fingerprint"]) == 0
    resumed = next(r for r in records(folder) if r.get("event") == "resume")
    assert list(resumed["changed"]) == ["data_fingerprint"] and records(folder)[-1]["status"] == "done"


def test_settings_that_do_not_alter_the_result_may_change(tmp_path, monkeypatch, whole):
    """Also the place of the data: it is known by its fingerprint."""
    folder = interrupted(tmp_path, monkeypatch)
    (tmp_path / "data").rename(tmp_path / "elsewhere")
    (tmp_path / "logs").rename(tmp_path / "logs2")
    changed = dict(log_dir=tmp_path / "logs2", data=tmp_path / "elsewhere", log_every=2, save_every=3, keep=5,
                   enable_profiling=True, profile_start=1, profile_steps=1, preset="cpu")
    assert train_gpt.main([*tiny(tmp_path, **changed), "--resume"]) == 0
    folder = tmp_path / "logs2" / "x" / folder.name
    assert losses(folder)["val_loss"] == losses(whole)["val_loss"]
    assert_same_state(load_state(folder, 8), load_state(whole, 8))


# --- how many are kept


@pytest.mark.parametrize("keep", [1, 3, 5, 20])
def test_the_newest_are_kept(keep, tmp_path):
    assert train_gpt.main(tiny(tmp_path, save_every=1, keep=keep)) == 0
    assert steps_saved(run_folder(tmp_path)) == list(range(1, 9))[-keep:]


def test_the_checkpoint_just_written_is_never_removed(tmp_path):
    """After falling back from damaged checkpoints of later steps, with a smaller --keep."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step, {}, META, keep=3)
    write_checkpoint(tmp_path, 3, {}, META, keep=1)
    assert steps_saved(tmp_path) == [3]


def test_what_is_not_whole_is_not_counted_and_not_touched(tmp_path):
    """Neither half of a removed one nor one without its weights takes the place of a good one."""
    for step in (2, 4, 6):
        write_checkpoint(tmp_path, step, {}, META, keep=3)
    (tmp_path / "checkpoints" / "step_000004" / "state.pt").unlink()
    (tmp_path / "checkpoints" / "step_000006" / "meta.json").unlink()
    write_checkpoint(tmp_path, 8, {}, META, keep=2)
    assert steps_saved(tmp_path) == [2, 4, 6, 8]
    write_checkpoint(tmp_path, 10, {}, META, keep=2)
    assert steps_saved(tmp_path) == [4, 6, 8, 10]


def test_a_checkpoint_that_cannot_be_read_stops_no_save_and_stays(tmp_path, monkeypatch):
    first = write_checkpoint(tmp_path, 2, {}, META, keep=1)
    read = train_gpt.read_meta

    def refused(path):
        if path == first:
            raise PermissionError(13, "Permission denied")
        return read(path)
    monkeypatch.setattr(train_gpt, "read_meta", refused)
    for step in (4, 6):
        write_checkpoint(tmp_path, step, {}, META, keep=1)
    assert steps_saved(tmp_path) == [2, 6]


def test_a_clock_that_goes_back_changes_no_order(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 2, {}, META, keep=3)
    monkeypatch.setattr(train_gpt.time, "time_ns", lambda: 5)
    write_checkpoint(tmp_path, 4, {}, META, keep=3)
    write_checkpoint(tmp_path, 1, {}, META, keep=2)
    assert [meta["step"] for _, meta in checkpoints_in(tmp_path)] == [1, 4]


def test_replacing_a_checkpoint_has_no_moment_without_one(tmp_path, monkeypatch):
    """keep 1, the same step again: after each rename one is whole, and in the end nothing else is left."""
    write_checkpoint(tmp_path, 4, {"x": torch.zeros(3)}, META, keep=1)
    renames, replace = [], os.replace

    def watched(*args):
        replace(*args)
        found = checkpoints_in(tmp_path)
        train_gpt.read_state(*found[0])
        renames.append(len(found))
    monkeypatch.setattr(os, "replace", watched)
    final = write_checkpoint(tmp_path, 4, {"x": torch.ones(3)}, META, keep=1)
    assert len(renames) == 4 and list(final.parent.iterdir()) == [final]
    assert train_gpt.read_state(*checkpoints_in(tmp_path)[0])["x"].sum() == 3


def test_file_folder_and_parents_are_on_the_disk_before_an_older_one_goes(tmp_path, monkeypatch):
    """What os.fsync was called for, in order, against the rename and the removal."""
    write_checkpoint(tmp_path / "logs" / "x" / "run", 2, {}, META, keep=1)
    events, fsync, replace = [], os.fsync, os.replace

    def name(path) -> str:
        return str(path).removeprefix(f"{tmp_path}").lstrip("/") or "."
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(name(os.readlink(f"/proc/self/fd/{fd}"))), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append(f"-> {name(b)}"), replace(a, b)))
    write_checkpoint(tmp_path / "logs" / "x" / "run", 4, {}, META, keep=1)
    folder = "logs/x/run/checkpoints"
    new = events.index(f"-> {folder}/step_000004")
    old = events.index(f"-> {folder}/step_000002.tmp")
    before, between = events[:new], events[new:old]
    assert f"{folder}/step_000004.tmp/state.pt" in before and f"{folder}/step_000004.tmp" in before
    assert before.index(f"-> {folder}/step_000004.tmp/meta.json") < before.index(f"{folder}/step_000004.tmp")
    assert any(event.startswith(f"{folder}/step_000004.tmp/meta.json.") for event in before)
    assert {folder, "logs/x/run", "logs/x", "logs"} <= set(between)


# --- damage


def flip(path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


DAMAGE = {
    "flipped bit": flip,
    "truncated": lambda path: os.truncate(path / "state.pt", 100),
    "empty": lambda path: os.truncate(path / "state.pt", 0),
    "no state": lambda path: (path / "state.pt").unlink(),
    "no meta": lambda path: (path / "meta.json").unlink(),
    "empty meta": lambda path: os.truncate(path / "meta.json", 0),
    "half meta": lambda path: os.truncate(path / "meta.json", 40),
    "meta without hash": lambda path: (path / "meta.json").write_text('{"step": 4}'),
    "meta is a list": lambda path: (path / "meta.json").write_text("[]"),
    "meta is null": lambda path: (path / "meta.json").write_text("null"),
    "meta is binary": lambda path: (path / "meta.json").write_bytes(bytes(range(256))),
    "empty folder": lambda path: [file.unlink() for file in path.iterdir()],
}


STATE = {"optimizer": {"steps": 4, "state": {"master": {"w": torch.arange(50.0)}}}, "rng": torch.get_rng_state()}


def state(step: int) -> dict:
    return {**STATE, "optimizer": {**STATE["optimizer"], "steps": step}}


@pytest.fixture
def two_checkpoints(tmp_path):
    """Folder of an experiment that has checkpoints of steps 2 and 4, and the folders of these."""
    paths = [write_checkpoint(tmp_path / "x" / "run", step, state(step), META, keep=9) for step in (2, 4)]
    return tmp_path / "x", *paths


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoint_is_told_and_the_previous_one_taken(damage, two_checkpoints, capsys):
    place, first, second = two_checkpoints
    assert find_checkpoint(place, STATE, 1)[0] == second
    DAMAGE[damage](second)
    assert find_checkpoint(place, STATE, 1)[0] == first
    half = damage in ("no meta", "empty folder")  # what a removal that was cut short leaves: counts for nothing
    assert (f"checkpoint {second} cannot be used" in capsys.readouterr().err) != half
    with pytest.MonkeyPatch.context() as patch:  # named by its own folder, the ones before it are the fallback as well
        patch.chdir(first.parent)
        assert find_checkpoint(second, STATE, 1)[0] == first


def change_state(**changes):
    """A damage that the hash does not tell: another content, well written."""
    def damage(path):
        torch.save(changes.get("all", state(4) | changes), path / "state.pt")
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | {"sha256": train_gpt.file_hash(path / "state.pt")}))
    return damage


def change_meta(**changes):
    def damage(path):
        meta = json.loads((path / "meta.json").read_text())
        (path / "meta.json").write_text(json.dumps(meta | changes))
    return damage


def weights(tensor) -> dict:
    return {"steps": 4, "state": {"master": {"w": tensor}}}


WRONG_CONTENT = {
    "shorter": change_state(optimizer=weights(torch.arange(49.0))),
    "another dtype": change_state(optimizer=weights(torch.arange(50))),
    "another shape": change_state(optimizer=weights(torch.arange(50.0).view(5, 10))),
    "sparse": change_state(optimizer=weights(torch.arange(50.0).to_sparse())),
    "of no device": change_state(optimizer=weights(torch.empty(50, device="meta"))),
    "a number": change_state(optimizer=weights(5.0)),
    "another name": change_state(optimizer={"steps": 4, "state": {"master": {"v": torch.arange(50.0)}}}),
    "no moments": change_state(optimizer={"steps": 4, "state": {}}),
    "another step": change_state(optimizer={**STATE["optimizer"], "steps": 5}),
    "steps as text": change_state(optimizer={**STATE["optimizer"], "steps": "4"}),
    "no optimizer": change_state(optimizer=None),
    "no random state": change_state(rng=None),
    "a random state of zeros": change_state(rng=torch.zeros_like(torch.get_rng_state())),
    "a list": change_state(all=[1, 2]),
    "a tensor": change_state(all=torch.zeros(3)),
    "step is text": change_meta(step="4"),
    "step is negative": change_meta(step=-4),
    "step is a fraction": change_meta(step=4.5),
    "no settings": change_meta(settings=None),
    "settings are a list": change_meta(settings=[]),
    "position of text": change_meta(position={"epoch": 0, "shard": "0", "used": 0}),
    "position past the shards": change_meta(position={"epoch": 0, "shard": 1, "used": 0}),
    "time is negative": change_meta(train_time_ms=-1e299),
    "time is absurd": change_meta(train_time_ms=1e299),
    "longer than it says": lambda path: os.truncate(path / "state.pt", 2**40),  # a sparse file: hashing takes hours
    "endless meta": lambda path: os.truncate(path / "meta.json", 2**40),
    "time is infinite": change_meta(train_time_ms=float("inf")),
    "no data": change_meta(data={}),
    "loss is text": change_meta(val_loss="low"),
    "saved is text": change_meta(saved="last"),
    "saved leaves no larger one": change_meta(saved=2**63 - 1),
    "a weight is NaN": change_state(optimizer=weights(torch.full((50,), float("nan")))),
}


@pytest.mark.parametrize("content", WRONG_CONTENT)
def test_a_checkpoint_of_wrong_content_is_told_and_the_previous_one_taken(content, two_checkpoints, capsys):
    """Also where its hash is right: keys, shapes and types of all that is used are compared."""
    place, first, second = two_checkpoints
    WRONG_CONTENT[content](second)
    assert find_checkpoint(place, STATE, 1)[0] == first
    error = capsys.readouterr().err
    assert error.startswith(f"checkpoint {second} cannot be used (") and error.count("\n") == 1


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "broken"), RuntimeError("can't allocate memory")])
def test_an_error_of_reading_is_no_damage(error, two_checkpoints, monkeypatch):
    """To go on from the one before would let the newest one go, though nothing is wrong with it."""
    def load(*args, **kwargs):
        raise error
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(type(error)):
        find_checkpoint(two_checkpoints[0], STATE, 1)


def test_a_damaged_checkpoint_takes_no_place_among_those_that_are_kept(two_checkpoints):
    """Its size is right, only its hash is wrong; neither it nor the good one goes."""
    place, first, second = two_checkpoints
    flip(second)
    *_, damaged = find_checkpoint(place, STATE, 1)
    assert damaged == [second]
    third = write_checkpoint(first.parent.parent, 6, state(6), META, 2, damaged)
    assert {path for path, _ in checkpoints_in(place)} == {first, second, third}


def test_a_checkpoint_is_named_by_its_step(two_checkpoints, tmp_path):
    """Also the one that is left of a replacement, .old; one that is not there is not replaced by an earlier one."""
    place, first, second = two_checkpoints
    second.rename(second.with_suffix(".old"))
    assert find_checkpoint(second, STATE, 1)[0] == second.with_suffix(".old")
    with pytest.raises(FileNotFoundError):
        find_checkpoint(second.with_name("step_000003"), STATE, 1)
    write_checkpoint(tmp_path / "step_size" / "run", 3, {}, META, keep=1)
    assert len(checkpoints_in(tmp_path / "step_size")) == 1, "an experiment's name is no checkpoint's"


def test_checkpoints_of_another_run_are_no_fallback(two_checkpoints, tmp_path):
    place, *_ = two_checkpoints
    flip(write_checkpoint(place / "other", 9, state(9), META, keep=9))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        find_checkpoint(place, STATE, 1)


@pytest.mark.parametrize("number, removed", [(22, True), (5, False)])  # EINVAL, EIO
def test_nothing_older_goes_where_the_new_one_may_not_be_on_the_disk(number, removed, tmp_path, monkeypatch):
    """Some file systems cannot sync a folder at all; any other error may mean that the new one is lost."""
    first = write_checkpoint(tmp_path, 2, {}, META, keep=1)
    fsync = os.fsync

    def fail(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, os.strerror(number))
        fsync(descriptor)
    monkeypatch.setattr(os, "fsync", fail)
    with contextlib.nullcontext() if removed else pytest.raises(OSError, match="could not write"):
        write_checkpoint(tmp_path, 4, {}, META, keep=1)
    assert first.exists() != removed


@pytest.mark.parametrize("damage", DAMAGE)
def test_all_checkpoints_damaged_is_one_sentence(damage, two_checkpoints):
    place, first, second = two_checkpoints
    DAMAGE[damage](first)
    DAMAGE[damage](second)
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in .*: start without --resume"):
        find_checkpoint(place, STATE, 1)


def test_no_cap_as_earlier_versions_wrote_it_is_refused_by_name(tmp_path, monkeypatch, capsys):
    """--softcap 0 is now 0,0,1."""
    folder = interrupted(tmp_path, monkeypatch, softcap=(0, 0, 1))
    path = folder / "checkpoints" / "step_000003" / "meta.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"settings": meta["settings"] | {"softcap": [0.0], "hellaswag_every": 0}}))
    capsys.readouterr()
    assert train_gpt.main([*tiny(tmp_path, softcap=(0, 0, 1)), "--resume"]) == 1
    error = capsys.readouterr().err
    assert "softcap: [0.0] in the checkpoint, [0.0, 0.0, 1.0] now" in error
    assert error.count("in the checkpoint") == 1


def test_no_checkpoint_is_one_sentence(tmp_path, capsys):
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: no whole checkpoint in {tmp_path / 'logs' / 'x'}") and "without --resume" in error


def test_run_with_a_damaged_checkpoint_continues_to_the_bit(tmp_path, monkeypatch, whole, capsys):
    folder = interrupted(tmp_path, monkeypatch, after=5, save_every=2)
    flip(folder / "checkpoints" / "step_000005")
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    out, error = capsys.readouterr()
    assert "step_000005 cannot be used (state.pt does not match its sha256)" in error and "after step 4" in out
    assert_same_run(folder, whole)


# --- no space


@contextlib.contextmanager
def file_size_limit(size: int):
    """Files of this process cannot grow beyond `size` bytes: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def full_disk(monkeypatch, *steps: int):
    """The disk is full while the checkpoints of these steps are written."""
    def save(self, step, optimizer, save=Run.save):
        with file_size_limit(50_000) if step in steps else contextlib.nullcontext():
            return save(self, step, optimizer)
    monkeypatch.setattr(Run, "save", save)


def test_full_disk_while_saving_does_not_stop_training(tmp_path, monkeypatch, capsys, whole):
    """The warning names the checkpoint; the one before stays, later ones are written."""
    full_disk(monkeypatch, 4, 6)
    assert train_gpt.main(tiny(tmp_path, save_every=2)) == 0
    out = capsys.readouterr().out
    for step in (4, 6):
        assert re.search(rf"warning: could not write \S+step_00000{step}: .+; \S+step_000002 is kept", out)
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [2, 8] and len(list((folder / "checkpoints").iterdir())) == 2, "half of one is left"
    assert_same_run(folder, whole)


def test_full_disk_at_the_end_is_an_error_and_the_run_can_go_on(tmp_path, monkeypatch, capsys, whole):
    with monkeypatch.context() as patch:
        full_disk(patch, 4, 6, 8)
        assert train_gpt.main(tiny(tmp_path, save_every=2)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the last checkpoint: could not write ") and error.count("\n") == 1
    assert steps_saved(run_folder(tmp_path)) == [2]
    assert train_gpt.main([*tiny(tmp_path), "--resume"]) == 0
    assert_same_run(run_folder(tmp_path), whole)


@pytest.mark.parametrize("error", [
    OSError(28, "No space left on device"), RuntimeError("[enforce fail at inline_container.cc:1] . unexpected pos 64"),
])
def test_what_torch_raises_on_a_full_disk_is_an_oserror(error, tmp_path, monkeypatch):
    def save(state, file):
        file.write(b"half")
        raise error
    good = write_checkpoint(tmp_path, 2, {}, META, keep=1)
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="could not write .*step_000004"):
        write_checkpoint(tmp_path, 4, {}, META, keep=1)
    assert list((tmp_path / "checkpoints").iterdir()) == [good]


def test_logs_on_a_full_disk_do_not_stop_training(tmp_path, monkeypatch, capsys):
    """log.txt and metrics.jsonl may lie on another disk than the checkpoints: what is trained is saved."""
    def start(self, *args, start=train_gpt.RunLog.open):
        self.folder.mkdir(parents=True)
        for name in ("log.txt", "metrics.jsonl"):
            (self.folder / name).symlink_to("/dev/full")
        start(self, *args)
    monkeypatch.setattr(train_gpt.RunLog, "open", start)
    assert train_gpt.main(tiny(tmp_path)) == 0
    out, error = capsys.readouterr()
    assert "log.txt: No space left on device; training goes on" in out and not error
    assert steps_saved(run_folder(tmp_path)) == [8]


@pytest.mark.parametrize("where", ["torch.save", "train_gpt.file_hash", "os.replace"])
def test_killed_while_saving_leaves_nothing_that_is_taken_for_a_checkpoint(where, tmp_path):
    """kill -9 in the middle of state.pt, before meta.json, and before the new name."""
    body = f"""
import torch
real, calls = {where}, []
def kill(*args, **kwargs):
    if {where!r} == "torch.save" or "step_000004.tmp" in str(args[0]):
        calls.append(1)
    if len(calls) == {2 if where == "torch.save" else 1}:
        if {where!r} == "torch.save":
            args[1].write(b"half a state")
            args[1].flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
{where} = kill
"""
    process = launch(tiny(tmp_path, save_every=2), body)
    _, error = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, error
    folder = run_folder(tmp_path)
    assert len(list((folder / "checkpoints").iterdir())) == 2, "killed at another place than this test is about"
    path, meta = checkpoints_in(folder)[0]
    assert path.name == "step_000002" and meta["step"] == 2
    assert train_gpt.main([*tiny(tmp_path, save_every=2), "--resume"]) == 0
    assert steps_saved(folder) == [6, 8]


# --- other numbers of processes


def test_checkpoint_of_two_processes_continues_on_one(tmp_path, whole):
    """Stopped after step 4 by a target that is easy; the target may change."""
    argv = tiny(tmp_path, target_loss=100)
    done = script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT, *argv, timeout=240)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [4]
    assert json.loads((folder / "config.json").read_text())["world_size"] == 2
    assert train_gpt.main([*tiny(tmp_path, compile_unit="model"), "--resume"]) == 0
    mine, expected = losses(folder), losses(whole)
    assert mine["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert mine["val_loss"] == pytest.approx(expected["val_loss"], rel=1e-4)
