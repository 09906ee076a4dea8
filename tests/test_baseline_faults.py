"""What train_baseline.py keeps when something goes wrong: signals, errors, a full disk, closed pipes, odd checkpoints,
a second process; what it says of data and numbers that cannot work; changed settings of a resumed run."""
import contextlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import baseline
import pytest
import torch
from baseline import (
    CPU,
    given,
    load_state,
    needs_gloo,
    rewrite_meta,
    rewrite_state,
    run,
    script_runs,
    tiny,
)
from helpers import (
    ROOT,
    assert_same_state,
    documents,
    flags,
    losses,
    make_data,
    records,
    run_folder,
    steps_saved,
    write_shard,
)
from ranks import run_ranks

import train_baseline as tb

SAVES = dict(save_every=3, eval_every=3, keep=9)  # checkpoints and validations after steps 3, 6 and 8
MUON = dict(optimizer="muon", muon_weight_decay=0.1)  # both optimizers of torch


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with a data set and a whole run of SAVES."""
    folder = tmp_path_factory.mktemp("base")
    run(folder, "moderngpt", **SAVES, **MUON)
    return folder


@pytest.fixture
def argv(base, tmp_path) -> list[str]:
    """Flags of the same run in another log folder."""
    return tiny(tmp_path, "moderngpt", data=base / "data", **SAVES, **MUON)


@pytest.fixture
def copied(base, tmp_path, argv) -> Path:
    """A copy of the run, whose checkpoint of step 8 is gone."""
    shutil.copytree(base / "logs", tmp_path / "logs")
    folder = run_folder(tmp_path)
    shutil.rmtree(checkpoint(folder, 8))
    return folder


def checkpoint(folder: Path, step: int) -> Path:
    return folder / "checkpoints" / f"step_{step:06d}"


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder but for the lock."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != "lock"}


def assert_same_end(folder: Path, base: Path):
    """Losses, and weights and moments at the end, are those of the whole run."""
    whole = run_folder(base)
    assert losses(folder) == losses(whole)
    assert_same_state(load_state(folder, 8), load_state(whole, 8))


def at_step(monkeypatch, step: int, action):
    """Does something when a step begins (counted from 1)."""
    set_rates = tb.set_rates
    monkeypatch.setattr(tb, "set_rates", lambda optimizers, s, done: (
        set_rates(optimizers, s, done), done == step - 1 and action()))


def fail(error: BaseException):
    def raise_it(*_, **__):
        raise error
    return raise_it


def one_error(capsys) -> str:
    """The only line on stderr, an error without a traceback."""
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "Traceback" not in said, said
    return said


# --- signals


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGTERM", "SIGINT"])
def test_a_signal_is_acknowledged_and_saves(name, argv, base, tmp_path, monkeypatch, capfd):
    number = getattr(signal, name)
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: signal.raise_signal(number))
        assert tb.main(argv) == 128 + number
    folder = run_folder(tmp_path)
    assert f"{name}: saves and stops after this step; Ctrl-C ends at once\n" in capfd.readouterr().err
    assert steps_saved(folder) == [3, 5] and records(folder)[-1]["status"] == "interrupted"
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


def test_under_nohup_a_lost_terminal_stops_nothing(argv, tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        at_step(monkeypatch, 5, lambda: signal.raise_signal(signal.SIGHUP))
        assert tb.main(argv) == 0 and records(run_folder(tmp_path))[-1]["status"] == "done"
    finally:
        signal.signal(signal.SIGHUP, before)


def test_signal_handlers_are_put_back(argv):
    numbers = signal.SIGHUP, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT
    before = [signal.getsignal(number) for number in numbers]
    assert tb.main(argv) == 0 and [signal.getsignal(number) for number in numbers] == before


def test_ctrl_c_during_imports_is_as_in_train_gpt():
    guard = 'import gc\nimport signal\n\nif __name__ == "__main__":\n    gc.disable()'
    texts = [(ROOT / name).read_text(encoding="utf-8") for name in ("train_gpt.py", "train_baseline.py")]
    parts = [text[text.index(guard):text.index("import argparse")] for text in texts]
    assert parts[0] == parts[1] and "import" not in texts[1][:texts[1].index(guard)].replace("import annotations", "")


# --- errors save what is done


def test_the_last_checkpoint_comes_before_the_validation(argv, base, tmp_path, monkeypatch, capsys):
    """Which is made up for by --resume. After that there is nothing to do, and nothing is written or removed."""
    validate = tb.validate
    with monkeypatch.context() as patch:
        patch.setattr(tb, "validate", lambda r, model, step: (step == 8 and fail(KeyboardInterrupt())(),
                                                              validate(r, model, step)))
        assert tb.main(argv) == 130
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [3, 6, 8] and list(losses(folder)["val_loss"]) == [3, 6]
    with monkeypatch.context() as patch:
        patch.setattr(tb, "set_rates", fail(AssertionError("trained on")))
        assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)
    before = content(folder)
    capsys.readouterr()
    assert tb.main([*argv, "--resume"]) == 0
    assert "this run has ended, after step 8 of 8; to go on: --iterations N" in capsys.readouterr().out
    assert content(folder) == before


def test_a_pending_validation_in_the_middle_is_made_up_for(argv, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(tb, "validate", fail(KeyboardInterrupt()))
        assert tb.main(argv) == 130
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [3] and not losses(folder)["val_loss"]
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory"), MemoryError("no memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")], ids=str)
@pytest.mark.parametrize("where", ["validate", "next_batch"])
def test_out_of_memory_is_said_and_saves(error, where, argv, base, tmp_path, monkeypatch, capsys):
    calls, real = itertools.count(1), getattr(tb, where)
    with monkeypatch.context() as patch:
        patch.setattr(tb, where, lambda *a: (next(calls) == 2 and fail(error)(), real(*a))[1])
        assert tb.main([*argv, "--save-every", "0"]) == 1
    assert "--micro-tokens" in one_error(capsys)
    folder, step = run_folder(tmp_path), 6 if where == "validate" else 1
    assert steps_saved(folder) == [step] and records(folder)[-1]["status"] == "error"
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


def test_an_error_of_the_data_saves_the_last_whole_step(argv, base, tmp_path, monkeypatch, capsys):
    """The second shard cannot be read for once."""
    open_shard, folder = tb.open_shard, base / "data"
    with monkeypatch.context() as patch:
        patch.setattr(tb, "open_shard", lambda path, *a: (
            "train_000001" in path.name and fail(tb.UserError(f"{path} became shorter while it was read"))(),
            open_shard(path, *a))[1])
        assert tb.main(argv) == 1
    assert "train_000001.bin became shorter" in one_error(capsys)
    folder = run_folder(tmp_path)
    end = records(folder)[-1]
    assert end["status"] == "error" and "became shorter" in end["error"] and steps_saved(folder)[-1] == end["step"] > 5
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


def test_a_shard_that_is_cut_short_meanwhile_is_no_sigbus(tmp_path, monkeypatch, capsys):
    """Its file is emptied when the first step has begun; nothing of it is mapped."""
    argv = tiny(tmp_path, **SAVES)
    def cut():
        for path in (tmp_path / "data").glob("*.bin"):
            os.truncate(path, 1024)
    at_step(monkeypatch, 2, cut)
    assert tb.main(argv) == 1
    assert "data_train_000001.bin is damaged: 1024 bytes, 3024 by its header" in one_error(capsys)
    assert steps_saved(run_folder(tmp_path))[-1] > 5


def test_half_a_step_is_not_saved(argv, base, tmp_path, monkeypatch):
    """AdamW fails when Muon is done."""
    calls, step = itertools.count(1), torch.optim.AdamW.step
    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", lambda x: (next(calls) == 5 and fail(KeyboardInterrupt())(), step(x)))
        assert tb.main(argv) == 130
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [3] and records(folder)[-1]["step"] == 4
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


def test_a_programming_error_has_its_traceback_and_saves(argv, tmp_path, monkeypatch):
    at_step(monkeypatch, 5, fail(ZeroDivisionError("of the test")))
    with pytest.raises(ZeroDivisionError):
        tb.main(argv)
    assert steps_saved(run_folder(tmp_path)) == [3, 4]


def test_weights_that_are_not_finite_are_not_saved(argv, tmp_path, monkeypatch, capsys):
    """The loss that shows it would come one step later."""
    normalize, calls = tb.normalize_rows, itertools.count()
    def spoil(model, s):  # also called by `initialize`
        normalize(model, s)
        if next(calls) == 6:
            model.lm_head.weight.data[0, 0] = math.inf
    monkeypatch.setattr(tb, "normalize_rows", spoil)
    assert tb.main(argv) == 1
    said, folder = one_error(capsys), run_folder(tmp_path)
    assert "the weights after step 6 are not finite: stopped" in said and "lower --max-lr" in said
    assert f"{checkpoint(folder, 3)} is kept" in said
    assert steps_saved(folder) == [3] and records(folder)[-1]["status"] == "nan"


# --- console and disk


class Console(io.StringIO):
    """A stdout that fails after some lines."""

    def __init__(self, error: OSError, after: int):
        super().__init__()
        self.error, self.left = error, after

    def write(self, text: str) -> int:
        self.left -= text.count("\n")
        if self.left < 0:
            raise self.error
        return super().write(text)


def test_a_closed_pipe_stops_and_saves(argv, base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Console(BrokenPipeError(32, "Broken pipe"), 8))
        assert tb.main(argv) == 128 + signal.SIGPIPE
    folder = run_folder(tmp_path)
    assert records(folder)[-1]["status"] == "interrupted" and steps_saved(folder)
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(folder, base)


def test_a_full_stdout_stops_nothing(argv, base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Console(OSError(28, "No space left on device"), 8))
    assert tb.main(argv) == 0
    assert capsys.readouterr().err == "warning: console: No space left on device; log.txt has all\n"
    assert_same_end(run_folder(tmp_path), base)


def test_what_the_console_cannot_show_is_escaped(tmp_path):
    """An ASCII console, a folder with an umlaut and a terminal's control character."""
    place = tmp_path / "gr\u00fc\x1b[2Jn"
    process = baseline.launch(tiny(place), "os.environ")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "\\x1b[2Jn" in out and "\x1b" not in out + err


def test_a_log_that_cannot_be_written_costs_one_warning(argv, tmp_path, monkeypatch, capsys):
    def replace():
        (log,) = tmp_path.glob("logs/x/*/log.txt")
        log.unlink()
        log.mkdir()
    at_step(monkeypatch, 2, replace)
    assert tb.main(argv) == 0
    assert capsys.readouterr().out.count("log.txt: Is a directory; training goes on") == 1


def test_a_line_that_a_full_disk_has_cut_does_not_swallow_the_next(copied, argv, base):
    with open(copied / "metrics.jsonl", "a") as file:
        file.write('{"step": 9')
    assert tb.main([*argv, "--resume"]) == 0
    lines = (copied / "metrics.jsonl").read_text().splitlines()
    (cut,) = [i for i, line in enumerate(lines) if line == '{"step": 9']
    assert json.loads(lines[cut + 1])["event"] == "resume"


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(argv, tmp_path, monkeypatch, capsys):
    """And those before it stay, whole; nothing half-written does."""
    calls, save = itertools.count(1), torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: (
        next(calls) >= 3 and (file.write(b"half") and fail(RuntimeError("unexpected pos"))()), save(state, file)))
    assert tb.main([*argv, "--keep", "1"]) == 1
    folder = run_folder(tmp_path)
    assert "error: the last checkpoint: could not write" in capsys.readouterr().err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000006"]


def test_all_is_synced_before_anything_older_goes(argv, tmp_path, monkeypatch):
    """state.pt, meta.json and the folders around, each time; then the older checkpoint is removed."""
    events, fsync, rmtree = [], os.fsync, shutil.rmtree
    def synced(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)
    def removed(path, **options):
        events.append(f"gone {Path(path).stem}" if Path(path).exists() else "")
        rmtree(path, **options)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(shutil, "rmtree", removed)
    assert tb.main([*argv, "--keep", "1"]) == 0
    names = [Path(event).name for event in events]
    assert [event for event in events if event.startswith("gone")] == ["gone step_000003", "gone step_000006"]
    before = names[:names.index("gone step_000003")]
    last = len(before) - before[::-1].index("state.pt")
    assert any(name.startswith("meta.json") for name in before[last:])
    assert {"step_000006.tmp", "checkpoints", run_folder(tmp_path).name, "x", "logs"} <= set(before[last:])


# --- which checkpoint


def test_which_is_newest_says_meta_json_and_no_file_time(copied, argv, base, capsys):
    """A copy has other times; what is half-written or half-removed counts for nothing, silently."""
    for step, age in ((3, 0), (6, 9999)):
        os.utime(checkpoint(copied, step), (time.time() - age,) * 2)
    shutil.copytree(checkpoint(copied, 6), copied / "checkpoints" / "step_000007.tmp")
    shutil.copytree(checkpoint(copied, 6), checkpoint(copied, 7))
    (checkpoint(copied, 7) / "meta.json").unlink()
    assert tb.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "after step 6" in out and err == ""
    assert_same_end(copied, base)


def test_a_run_that_went_back_is_newer_than_its_later_checkpoints(copied, argv, base):
    """--resume of step 3, stopped at 4: the next one goes on from there, not from step 6."""
    assert tb.main([*argv, "--resume", str(checkpoint(copied, 3)), "--iterations", "4", "--allow-change",
                    "iterations"]) == 0
    newest, _ = tb.checkpoints_in(copied)[0]
    assert newest == checkpoint(copied, 4)


def test_a_replaced_checkpoint_is_never_without_one(copied, argv, monkeypatch):
    """Between the two renames the old one of the same step counts."""
    replace, found = os.replace, []
    def look(source, target):
        replace(source, target)
        if str(target).endswith("step_000006.old"):
            found.extend(path.name for path, _ in tb.checkpoints_in(copied))
    monkeypatch.setattr(os, "replace", look)
    assert tb.main([*argv, "--resume", str(checkpoint(copied, 3)), "--keep", "1"]) == 0
    assert found == ["step_000006.old", "step_000003"]
    assert [path.name for path in (copied / "checkpoints").iterdir()] == ["step_000008"]


def test_a_run_keeps_its_keep(argv, base, tmp_path, monkeypatch):
    argv = [*argv, "--save-every", "1", "--keep", "3"]
    with monkeypatch.context() as patch:
        at_step(patch, 6, lambda: signal.raise_signal(signal.SIGTERM))
        tb.main(argv)
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == [4, 5, 6]
    assert tb.main([*argv[:-2], "--keep", "0", "--resume"]) == 0 and steps_saved(folder) == [6, 7, 8]


def test_an_old_checkpoint_resumes(copied, argv, base, capsys):
    """Without saved, val_step and bytes. Other data are refused."""
    for step in (3, 6):
        data = json.loads((checkpoint(copied, step) / "meta.json").read_text())["data"]
        rewrite_meta(checkpoint(copied, step), saved=None, val_step=None, bytes=None)
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(copied, base)
    shutil.rmtree(checkpoint(copied, 8))
    rewrite_meta(checkpoint(copied, 6), data=data | {"fingerprint": "0"})
    assert tb.main([*argv, "--resume"]) == 1 and "data_fingerprint: 0 in the checkpoint" in capsys.readouterr().err


# --- what is in a checkpoint


def changed_state(path: Path, change):
    state = torch.load(path / "state.pt", weights_only=True)
    changed = change(state)
    rewrite_state(path, state if changed is None else changed)


def set_in(*keys):
    """Puts the last argument into nested dicts and lists."""
    *keys, last, value = keys
    def change(state):
        for key in keys:
            state = state[key]
        state[last] = value
    return change


def without_last(key):
    """Takes away a part of a dict or list."""
    def change(state):
        state[key].pop() if isinstance(state[key], list) else state[key].popitem()
    return change


EMBED = "embed.weight"
STATES = {
    "missing weight": without_last("model"),
    "shape": set_in("model", EMBED, torch.zeros(128, 16)),
    "dtype": set_in("model", EMBED, torch.zeros(128, 32, dtype=torch.bfloat16)),
    "number": set_in("model", EMBED, 1.0),
    "no model": set_in("model", None),
    "one optimizer": without_last("optimizers"),
    "no optimizers": set_in("optimizers", None),
    "optimizers by name": set_in("optimizers", {"adamw": {}}),
    "missing momentum": set_in("optimizers", 0, "state", {}),
    "moment's shape": set_in("optimizers", 0, "state", 0, "momentum_buffer", torch.zeros(3)),
    "moments": set_in("optimizers", 1, "state", 0, "exp_avg", [1, 2]),
    "no state": set_in("optimizers", 1, {"param_groups": []}),
    "other step": set_in("optimizers", 1, "state", 0, "step", torch.tensor(5.0)),
    "NaN for a step": set_in("optimizers", 1, "state", 0, "step", torch.tensor(math.nan)),
    "a tensor": lambda state: torch.zeros(3),
    "a list": lambda state: [state],
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_kind_gives_way_to_the_one_before(name, copied, argv, base, capsys):
    """Its hash is right."""
    changed_state(checkpoint(copied, 6), STATES[name])
    assert tb.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"checkpoint \S+step_000006 cannot be used \(.+\); trying the one before it\n", err)
    assert "after step 3" in out
    assert_same_end(copied, base)


METAS = {
    "step": -1, "sha256": 5, "settings": [], "train_time_ms": "1", "data": {"fingerprint": 5, "meta": {}},
    "position": {"epoch": 0, "shard": 9, "used": 0}, "saved": "new", "val_step": 2.5, "bytes": -3, "val_loss": "low",
}


@pytest.mark.parametrize("key", METAS)
def test_a_meta_json_of_another_kind_gives_way_to_the_one_before(key, copied, argv, base, capsys):
    rewrite_meta(checkpoint(copied, 6), **{key: METAS[key]})
    assert tb.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert re.fullmatch(r"checkpoint \S+step_000006 cannot be used \(.+\); trying the one before it\n", err)
    assert "after step 3" in out
    assert_same_end(copied, base)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"step": NaN}', "[" * 100000, "\xff\xfe"])
def test_a_meta_json_that_is_none_gives_way_to_the_one_before(text, copied, argv, capsys):
    (checkpoint(copied, 6) / "meta.json").write_text(text, encoding="latin-1")
    assert tb.main([*argv, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert "step_000006 cannot be used" in err and "after step 3" in out


def test_other_keys_of_a_checkpoint_do_no_harm(copied, argv, base):
    """Of later versions: in state.pt, its parts and meta.json."""
    def more(state):
        state["model"]["new"] = state["new"] = torch.zeros(3)
        state["optimizers"][1]["state"] |= {998: {"step": 1}, 999: 1, "new": None}
        state["optimizers"].append(None)
    changed_state(checkpoint(copied, 6), more)
    position = json.loads((checkpoint(copied, 6) / "meta.json").read_text())["position"]
    rewrite_meta(checkpoint(copied, 6), new=1, position=position | {"new": 1})
    assert tb.main([*argv, "--resume"]) == 0
    assert_same_end(copied, base)


def test_control_characters_of_a_checkpoint_do_not_reach_the_terminal(copied, argv, capsys):
    for step in (3, 6):
        rewrite_meta(checkpoint(copied, step), sha256="\x1b[2J", saved="\x1b[2J")
    assert tb.main([*argv, "--resume"]) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "\\x1b[2J" in err and "no whole checkpoint" in err


# --- a second process


def test_a_run_is_one_process(copied, argv, capsys):
    """The second says who has it; nothing changes. The system frees the lock when a process dies."""
    with contextlib.closing(tb.lock_folder(copied)):
        before = content(copied)
        assert tb.main([*argv, "--resume"]) == 1
        assert f"is in use by process {os.getpid()} of" in one_error(capsys)
        assert content(copied) == before
    assert tb.main([*argv, "--resume"]) == 0


# --- other settings


def test_changed_settings_are_used_and_recorded(copied, argv, monkeypatch, capsys):
    """Rates and all that lies in torch.optim's groups: the new ones, not the checkpoint's."""
    new = dict(max_lr=0.5, min_lr=0.5, weight_decay=0.25, beta1=0.5, adam_eps=1e-4, muon_lr=0.125,
               muon_weight_decay=0.5)
    argv = [*argv, *flags(**new), "--resume"]
    assert tb.main(argv) == 1
    said = capsys.readouterr().err
    assert all(f"\n  {name}: " in said for name in new)
    assert f"or add --allow-change {','.join(sorted(new, key=list(vars(tb.Settings())).index))}:" in said
    assert tb.main([*argv, "--allow-change", ",".join(list(new)[1:])]) == 1
    assert "max_lr: 0.01 in the checkpoint, 0.5 now" in capsys.readouterr().err
    groups = []
    for kind in (torch.optim.Muon, torch.optim.AdamW):
        step = kind.step
        monkeypatch.setattr(kind, "step", lambda x, step=step: (groups.append(x.param_groups[0].copy()), step(x)))
    assert tb.main([*argv, "--allow-change", ",".join(new)]) == 0
    muon, adamw = groups[:2]
    assert (muon["lr"], muon["weight_decay"]) == (0.125, 0.5)
    assert (adamw["lr"], adamw["weight_decay"], adamw["betas"], adamw["eps"]) == (0.5, 0.25, (0.5, 0.95), 1e-4)
    (event,) = [r for r in records(copied) if r.get("event") == "resume"]
    assert event["changed"]["max_lr"] == [0.01, 0.5] and event["changed"].keys() == set(new)
    assert "muon_lr: 0.02 before, 0.125 from here on" in capsys.readouterr().out


def test_a_finished_run_goes_on_with_more_steps(base, tmp_path, argv):
    shutil.copytree(base / "logs", tmp_path / "logs")
    more = [*argv, "--resume", "--iterations", "12", "--warmup-steps", "2", "--allow-change", "iterations"]
    assert tb.main(more) == 0
    folder = run_folder(tmp_path)
    assert steps_saved(folder)[-1] == 12 and records(folder)[-1]["status"] == "done"


def test_rows_of_another_length_begin_where_the_data_were(copied, argv, tmp_path):
    """Half as long: the next row starts at the first token that is not used up, also within a piece."""
    change = ["--seq-len", "16", "--max-doc-len", "16", "--allow-change", "seq-len,max_doc_len"]
    assert tb.main([*argv, "--resume", *change]) == 0
    corpus = tb.open_corpus(str(make_data(tmp_path / "other", train=[documents(200, 5)], eot=None)))
    s = baseline.settings("moderngpt", seq_len=16, max_doc_len=32, shuffle=False)
    row, place = next(tb.training_rows(s, corpus, epoch=0, shard=0, used=40))
    assert row[0].tolist() == documents(200, 5)[40:56].tolist() and place == {"epoch": 0, "shard": 0, "used": 64}


def test_other_data_start_anew_where_that_is_allowed(copied, argv, tmp_path, capsys):
    other = make_data(tmp_path / "other", train=[documents(1000, 77)])
    argv = [*argv, "--resume", "--data", str(other)]
    assert tb.main(argv) == 1 and "data_fingerprint" in capsys.readouterr().err
    assert tb.main([*argv, "--allow-change", "data_fingerprint"]) == 0


@pytest.mark.parametrize("words, said", [
    (["--resume", ""], "--resume: is empty; name something, or leave it out"),
    (["--data", ""], "--data: is empty"),
    (["--resume", "--allow-change", "speed"], "--allow_change: speed: no such setting"),
    (["--allow-change", "max_lr"], "--allow_change: has no effect without --resume"),
])
def test_flags_that_say_nothing_are_refused(words, said, argv, capsys):
    assert tb.main([*argv, *words]) == 2
    assert said in capsys.readouterr().err


# --- data


def test_tokens_without_meta_json_are_refused(tmp_path, capsys):
    argv = tiny(tmp_path)
    (tmp_path / "data" / "meta.json").unlink()
    assert tb.main(argv) == 1
    said = one_error(capsys)
    assert "meta.json" in said and "make it again with python data/" in said


@pytest.mark.parametrize("changes", [
    dict(vocab_size="256"), dict(vocab_size=255.5), dict(eot=-5), dict(eot=64), dict(vocab_size=10**400),
    dict(splits={"val": {"tokens": "500"}}), dict(tokenizer="byte"), dict(splits={"train": {"tokens": 20000}}),
], ids=lambda changes: str(changes)[:50])
def test_a_meta_json_of_the_data_that_cannot_be_is_refused(changes, tmp_path, capsys):
    make_data(tmp_path / "data", **changes)
    assert tb.main(tiny(tmp_path)) == 1
    assert "meta.json" in one_error(capsys)


def test_the_fingerprint_covers_whole_shards(tmp_path):
    """A token near the end of 200,000, which the first 64 KiB do not hold."""
    tokens = documents(200000, 3)
    folder = make_data(tmp_path / "data", train=[tokens])
    before = tb.open_corpus(str(folder)).fingerprint()
    tokens[-3] = (tokens[-3] + 1) % 50
    write_shard(folder / "data_train_000000.bin", tokens)
    corpus = tb.open_corpus(str(folder))
    assert corpus.fingerprint() != before


def test_the_validation_tokens_of_a_preset_are_a_wish(tmp_path, capsys):
    """Those of a flag are not."""
    small = {name: value for name, value in given(data=make_data(tmp_path / "data")).items() if name != "eval_tokens"}
    argv = flags(**small, preset="cpu", log_dir=tmp_path / "logs", experiment_name="x")
    assert tb.main(argv) == 0
    assert "eval_tokens 499: all that the validation split has" in capsys.readouterr().out
    assert tb.main([*argv, "--eval-tokens", "500"]) == 1
    assert "--eval_tokens 500" in capsys.readouterr().err


def test_a_row_of_several_pieces_has_positions_for_each(tmp_path):
    """max_doc_len below seq_len: the untimed pass has no more positions than the model."""
    assert tb.main(tiny(tmp_path, max_doc_len=16)) == 0


# --- numbers


@pytest.mark.parametrize("words", [
    "width=2147483648", "width=2000000000 --head-dim 4", "iterations=1e30", "iterations=1" + 30 * "0",
    "threads=1000000000000", "batch_tokens=1000000000000000000", "batch_tokens=2147483616 --width 1048576",
    "num_layers=100000", "num_layers=2000 --width 131072", "mlp_ratio=1e308", "mlp_ratio=1e300", "seq_len=2147483616 "
    "--batch-tokens 2147483616 --micro-tokens 2147483616", "micro_tokens=1e12", "seed=1e30", "save_every=1e19",
    "num_experts=2147483647 --model-type moegpt", "expert_hidden=2000000 --num-experts 4000 --model-type moegpt",
    "eval_seq_len=2000000000 --model-type moderngpt", "eval_tokens=1e400", "max_doc_len=1e100", "window=1e10",
])
def test_numbers_too_large_are_refused_before_anything_is_made(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tb, "find_device", lambda device: CPU)
    monkeypatch.setattr(tb, "Run", fail(AssertionError("tried")))
    name, *more = words.split()
    name, value = name.split("=")
    argv = [*tiny(tmp_path), f"--{name}", value, *more]
    try:
        assert tb.main(argv) == 2
    except SystemExit as error:
        assert error.code == 2
    said = capsys.readouterr().err
    assert name.replace("_", "-") in said.replace("_", "-") and "Traceback" not in said


@pytest.mark.parametrize("text, value", [("1e6", 10**6), ("1_000", 1000), ("3", 3)])
def test_whole_numbers_may_be_written_short(text, value, base):
    s = tb.parse_settings([*tiny(base), "--eval-tokens", text], 1)[0]
    assert s.eval_tokens == value


# --- several ranks


def damage_and_run(world, argv: list[str], fault: str) -> list[str]:
    """The run of two ranks, in which all of the data, or rank 0's reading of checkpoints, fails."""
    if fault == "data":
        open_shard = tb.open_shard
        tb.open_shard = lambda path, *a: ("train_000001" in path.name and fail(tb.UserError("no shard"))(),
                                          open_shard(path, *a))[1]
    if fault == "disk" and world.rank == 0:
        tb.find_checkpoint = fail(FileNotFoundError("no whole checkpoint in the test"))
    return script_runs(world, [argv])


@needs_gloo
def test_errors_end_all_ranks_together(copied, argv, base, tmp_path):
    """Of the data, after the same step, which is saved; of checkpoints, which only rank 0 reads."""
    ended = run_ranks(damage_and_run, 2, tmp_path, [*argv, "--resume"], "disk")
    assert ended == [["FileNotFoundError: no whole checkpoint in the test"]] * 2
    new = ["--experiment-name", "new"]
    assert run_ranks(damage_and_run, 2, tmp_path, [*argv, *new], "data") == [["UserError: no shard"]] * 2
    folder = run_folder(tmp_path, "new")
    assert records(folder)[-1]["status"] == "error" and steps_saved(folder)[-1] == records(folder)[-1]["step"] > 5


@needs_gloo
def test_ranks_need_no_common_folder_for_a_checkpoint(copied, argv, base, tmp_path):
    """Rank 1 has none: its weights and moments are rank 0's."""
    (copied / "metrics.jsonl").write_text("")
    assert run_ranks(only_rank_zero_reads, 2, tmp_path, [*argv, "--resume"]) == [["done"]] * 2
    for key, values in losses(copied).items():
        whole = losses(run_folder(base))[key]
        assert 8 in values and values == pytest.approx({step: whole[step] for step in values}, rel=1e-5)


def only_rank_zero_reads(world, argv: list[str]) -> list[str]:
    if world.rank:
        tb.find_checkpoint = tb.checkpoints_in = fail(AssertionError("rank 1 has no checkpoints"))
    return script_runs(world, [argv])


def test_a_checkpoint_is_held_against_tensors_on_the_cpu():
    """As it is loaded there, also where the model is on a GPU."""
    found = tb.empty_like({"a": {"b": torch.zeros(3, 2, device="meta", dtype=torch.bfloat16)}})["a"]["b"]
    assert tb.misfit(torch.zeros(3, 2, dtype=torch.bfloat16), found, "b") == ""
