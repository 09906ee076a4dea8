"""What a run leaves for programs: `---` and key: value lines, result.json, metrics.json, ckpt_best; exit codes."""
import json
import math
import os
import signal

import baseline
import helpers
import pytest
import torch
from helpers import SCRIPT, launch, losses, make_data, records, run_folder, script, steps_saved
from moe import MIXTURE

import generate
import train_baseline
import train_gpt
import train_moe

MODULES = {"train_gpt": train_gpt, "train_moe": train_moe, "train_baseline": train_baseline}
KEYS = ["status", "val_loss", "val_bpb", "training_seconds", "total_seconds", "peak_memory_mb", "mfu", "total_tokens",
        "steps", "params"]


def tiny(name: str, tmp_path, **changes) -> list[str]:
    if name == "train_baseline":
        if not (tmp_path / "data").exists():
            make_data(tmp_path / "data")
        own = {"data": tmp_path / "data", "log_dir": tmp_path / "logs", "experiment_name": "x"}
        return [str(a) for a in helpers.flags(**baseline.given(**own, **changes))]
    return [str(a) for a in helpers.tiny(tmp_path, **(MIXTURE if name == "train_moe" else {}), **changes)]


def block(out: str) -> dict[str, str]:
    """The lines after the last `---`, which are the last of all."""
    assert out.count("\n---\n") == 1
    return dict(line.split(": ", 1) for line in out.split("\n---\n")[1].splitlines())


def result(tmp_path) -> dict:
    return json.loads((run_folder(tmp_path) / "result.json").read_text())


def same(shown: dict[str, str], said: dict) -> bool:
    return shown == {key: "null" if value is None else str(value) for key, value in said.items()}


# --- the end of a run


@pytest.mark.parametrize("name", MODULES)
def test_a_run_ends_with_its_result(name, tmp_path, capsys):
    assert MODULES[name].main(tiny(name, tmp_path)) == 0
    shown, said, end = block(capsys.readouterr().out), result(tmp_path), records(run_folder(tmp_path))[-1]
    assert list(said) == KEYS and same(shown, said)
    assert (said["status"], said["steps"], said["total_tokens"], said["mfu"]) == ("done", 8, 8 * 128, None)
    assert said["val_loss"] == losses(run_folder(tmp_path))["val_loss"][8] == end["val_loss"]
    assert said["val_bpb"] == pytest.approx(said["val_loss"] / math.log(2) / 2)  # two bytes a token
    assert 0 < said["training_seconds"] == end["train_time_ms"] / 1000 < said["total_seconds"]
    assert said["params"] == end["params_total"] > 1000 and said["peak_memory_mb"] == end["peak_memory_mib"] > 50


@pytest.mark.parametrize("name", MODULES)
def test_metrics_json_has_settings_and_a_row_per_loss_also_of_a_resumed_run(name, tmp_path):
    argv = tiny(name, tmp_path)
    assert MODULES[name].main([*argv, "--target-loss", "100"]) == 0 and result(tmp_path)["status"] == "target"
    assert MODULES[name].main([*argv, "--resume"]) == 0
    folder = run_folder(tmp_path)
    said = json.loads((folder / "metrics.json").read_text())
    assert said["metrics"] == [r for r in records(folder) if "event" not in r] and len(said["metrics"]) == 10
    assert said["config"]["settings"]["iterations"] == 8 and said["val_loss"] == result(tmp_path)["val_loss"]


def test_rows_after_the_checkpoint_that_a_run_goes_back_to_are_dropped(tmp_path):
    argv = tiny("train_gpt", tmp_path, save_every=2, keep=9)
    assert train_gpt.main(argv) == 0
    step_4 = run_folder(tmp_path) / "checkpoints" / "step_000004"
    assert train_gpt.main([*argv, "--resume", str(step_4)]) == 0
    rows = json.loads((run_folder(tmp_path) / "metrics.json").read_text())["metrics"]
    assert [row["step"] for row in rows if "train_loss" in row] == list(range(1, 9))


@pytest.mark.parametrize("name", MODULES)
def test_a_run_that_diverges_says_so(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(MODULES[name].Run, "read_losses", lambda self, *given: self._stop_unless(False, "it is nan", 1))
    assert MODULES[name].main(tiny(name, tmp_path)) == 1
    shown, said = block(capsys.readouterr().out), result(tmp_path)
    assert same(shown, said) and list(said) == [*KEYS, "error"]
    assert (said["status"], said["steps"], said["val_loss"]) == ("nan", 1, None)
    assert "it is nan: stopped" in said["error"]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("error, status", [
    (torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), "out_of_memory"), (MemoryError(), "out_of_memory"),
    (OSError("a disk is gone"), "error"), (KeyboardInterrupt(), "interrupted")])
def test_what_breaks_a_run_off_is_its_status(name, error, status, tmp_path, monkeypatch):
    def forward(self, *given):
        raise error
    monkeypatch.setattr(MODULES[name].GPT, "forward", forward)
    code = 130 if status == "interrupted" else 1
    assert MODULES[name].main(tiny(name, tmp_path)) == code
    assert result(tmp_path)["status"] == status and records(run_folder(tmp_path))[-1]["event"] == "end"


def test_an_interrupted_run_says_so_and_the_resumed_one_has_no_result_until_its_end(tmp_path):
    process = launch(tiny("train_gpt", tmp_path, iterations=100_000))
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(signal.SIGTERM)
            break
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 128 + signal.SIGTERM and block(out)["status"] == "interrupted"
    before = f"os.environ['GONE'] = '1'\ntrain_gpt.train = lambda run: (run.open({MODEL}), os._exit(9))"
    again = launch([*tiny("train_gpt", tmp_path, iterations=100_000), "--resume"], before)
    again.communicate(timeout=240)
    assert again.returncode == 9 and not (run_folder(tmp_path) / "result.json").exists()


MODEL = "m := train_gpt.GPT(run.s, run.vocab_size, run.world), train_gpt.MuonAdamW(m, run.s, run.world)"


def test_total_seconds_are_of_the_process_training_seconds_of_the_run(tmp_path):
    argv = tiny("train_gpt", tmp_path, target_loss=100)
    assert train_gpt.main(argv) == 0
    first = result(tmp_path)
    assert train_gpt.main([*argv, "--target-loss", "0", "--resume"]) == 0
    assert result(tmp_path)["training_seconds"] > first["training_seconds"] and result(tmp_path)["steps"] == 8


@pytest.mark.parametrize("name, find, cpu", [
    ("train_gpt", "detect_hardware", helpers.CPU), ("train_baseline", "find_device", baseline.CPU)])
def test_mfu_is_of_all_that_was_logged(name, find, cpu, tmp_path, monkeypatch, capsys):
    """A GPU's peak for the CPU at hand: the mean of the steps, weighted by time."""
    monkeypatch.setattr(MODULES[name], "PEAK_FLOPS", {"CPU": 1e12})
    monkeypatch.setattr(MODULES[name], find, lambda device: cpu)
    assert MODULES[name].main(tiny(name, tmp_path)) == 0
    steps = [r for r in records(run_folder(tmp_path)) if "train_loss" in r]
    mean = sum(r["mfu"] * r["step_ms"] for r in steps) / sum(r["step_ms"] for r in steps)
    assert result(tmp_path)["mfu"] == pytest.approx(mean) and mean > 0
    assert f"MFU {100 * steps[-1]['mfu']:.1f} %" in capsys.readouterr().out


def test_a_full_disk_costs_the_file_not_the_run(tmp_path, monkeypatch, capsys):
    def write(path, value, write=train_gpt.write_json):
        if path.name == "result.json":
            raise OSError(f"{path} cannot be written: No space left on device")
        write(path, value)
    monkeypatch.setattr(train_gpt, "write_json", write)
    assert train_gpt.main(tiny("train_gpt", tmp_path)) == 0
    out = capsys.readouterr().out
    assert "result.json cannot be written: No space left" in out and block(out)["status"] == "done"


@pytest.mark.parametrize("name", MODULES)
def test_exit_codes(name, tmp_path):
    """Settings that cannot work 2, what else one sentence explains 1; a run that has ended 0."""
    argv = tiny(name, tmp_path, iterations=4)
    path = SCRIPT.with_name(f"{name}.py")
    assert script(path, *argv, "--iterations", "0").returncode == 2
    assert script(path, *argv, "--iterations", "many").returncode == 2
    assert script(path, *argv, "--data", tmp_path / "none").returncode == 1
    assert not (tmp_path / "logs").exists()
    assert MODULES[name].main(argv) == 0 and MODULES[name].main([*argv, "--resume"]) == 0


@pytest.mark.parametrize("name", MODULES)
def test_a_signal_that_is_repeated_does_not_cost_the_result(name, tmp_path, capsys, monkeypatch):
    """As torchrun and schedulers send it: also while the result is written."""
    module = MODULES[name]
    def result(self, end, config, result=module.RunLog.result):
        signal.raise_signal(signal.SIGTERM)
        result(self, end, config)
    monkeypatch.setattr(module.RunLog, "result", result)
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("the run let go of the signal too early"))
    try:
        again = signal.getsignal(signal.SIGTERM)
        assert module.main(tiny(name, tmp_path)) == 0 and signal.getsignal(signal.SIGTERM) is again
    finally:
        signal.signal(signal.SIGTERM, before)
    assert block(capsys.readouterr().out)["status"] == "done"


@pytest.mark.parametrize("name", MODULES)
def test_a_run_that_could_not_save_at_a_signal_is_no_interrupted_one(name, tmp_path, monkeypatch):
    module = MODULES[name]
    def write(*given):
        raise OSError("no space")
    def due(self, step, *given, due=module.Run.log_due):
        self.stop_signal = signal.SIGTERM
        return due(self, step, *given)
    monkeypatch.setattr(module, "write_checkpoint", write)
    monkeypatch.setattr(module.Run, "log_due", due)
    assert module.main(tiny(name, tmp_path)) == 1
    assert result(tmp_path)["status"] == "error" and "no space" in result(tmp_path)["error"]


@pytest.mark.parametrize("name", MODULES)
def test_damaged_rows_of_before_cost_those_rows(name, tmp_path):
    argv = tiny(name, tmp_path)
    assert MODULES[name].main([*argv, "--target-loss", "100"]) == 0
    (run_folder(tmp_path) / "metrics.json").write_text('{"metrics": [1, {"loss": 2}]}')
    assert MODULES[name].main([*argv, "--resume"]) == 0 and result(tmp_path)["status"] == "done"


# --- ckpt_best


@pytest.mark.parametrize("name", MODULES)
def test_the_best_validation_is_kept_and_ckpt_best_names_it(name, tmp_path, monkeypatch):
    told = iter([3.0, 2.0, 2.5, 2.25])
    log = MODULES[name].Run.log_validation
    monkeypatch.setattr(MODULES[name].Run, "log_validation", lambda self, step, loss: log(self, step, next(told)))
    assert MODULES[name].main(tiny(name, tmp_path, eval_every=2, save_best=True, save_every=1, keep=1)) == 0
    folder = run_folder(tmp_path)
    best = folder / "ckpt_best"
    assert os.readlink(best) == os.path.join("checkpoints", "step_000004")
    meta = json.loads((best / "meta.json").read_text())
    assert (meta["step"], meta["val_loss"], steps_saved(folder)) == (4, 2.0, [4, 8])


@pytest.mark.parametrize("name", MODULES)
def test_without_the_flag_nothing_more_is_saved(name, tmp_path):
    assert MODULES[name].main(tiny(name, tmp_path)) == 0
    assert steps_saved(run_folder(tmp_path)) == [8] and not (run_folder(tmp_path) / "ckpt_best").exists()


def test_a_resumed_run_knows_the_best_before_it(tmp_path, monkeypatch):
    told, log = iter([2.0, 3.0, 2.5, 1.0]), train_gpt.Run.log_validation
    monkeypatch.setattr(train_gpt.Run, "log_validation", lambda self, step, loss: log(self, step, next(told)))
    argv = tiny("train_gpt", tmp_path, eval_every=2, save_best=True, save_every=2, keep=1)
    def full(self, *given, next_batch=train_gpt.Run.next_batch):
        if given[0] == 5:
            raise OSError("the disk is gone")
        return next_batch(self, *given)
    with monkeypatch.context() as patch:
        patch.setattr(train_gpt.Run, "next_batch", full)
        assert train_gpt.main(argv) == 1
    best = run_folder(tmp_path) / "ckpt_best"
    assert os.readlink(best).endswith("step_000002")
    assert train_gpt.main([*argv, "--resume"]) == 0
    assert os.readlink(best).endswith("step_000008"), "2.5 after step 6 is not the best, 1.0 after step 8 is"
    assert 6 not in steps_saved(run_folder(tmp_path))


@pytest.mark.parametrize("name", MODULES)
def test_a_process_killed_before_the_link_leaves_it_to_the_resumed_run(name, tmp_path, monkeypatch):
    """The checkpoint is there, and knows that it is the best; ckpt_best names the one before."""
    module, told = MODULES[name], iter([3.0, 2.0, 2.5])
    log = module.Run.log_validation
    monkeypatch.setattr(module.Run, "log_validation", lambda self, step, loss: log(self, step, next(told)))
    argv = tiny(name, tmp_path, eval_every=2, iterations=6, save_best=True, save_last=False, keep=9)
    with monkeypatch.context() as patch:
        def link(path, target, link=train_gpt.Path.symlink_to):
            if target.name == "step_000004":
                raise KeyboardInterrupt
            link(path, target)
        patch.setattr(train_gpt.Path, "symlink_to", link)
        assert module.main(argv) == 130
    best = run_folder(tmp_path) / "ckpt_best"
    assert module.main([*argv, "--resume"]) == 0
    assert os.readlink(best) == os.path.join("checkpoints", "step_000004")


def test_the_best_checkpoint_is_resumed_and_generates_by_its_link(tmp_path, capsys):
    argv = tiny("train_gpt", tmp_path, save_best=True)
    assert train_gpt.main(argv) == 0
    best, texts = run_folder(tmp_path) / "ckpt_best", []
    for place in (best, best.resolve()):
        capsys.readouterr()
        assert generate.main(["--checkpoint", str(place), "--max-tokens", "5"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert train_gpt.main([*argv, "--resume", str(best), "--iterations", "12", "--allow-change", "iterations"]) == 0
    assert records(run_folder(tmp_path))[-1]["step"] == 12
