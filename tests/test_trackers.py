"""--tracker: the metrics of a run also to wandb, tensorboard, trackio; tried with the packages that are installed."""
import sys
import types

import baseline
import helpers
import pytest
from helpers import losses, records, run_folder
from moe import MIXTURE

import train_baseline
import train_gpt
import train_moe

SCRIPTS = {train_gpt: helpers.tiny, train_baseline: baseline.tiny, train_moe: helpers.tiny}
each_script = pytest.mark.parametrize("script", [train_gpt, train_baseline], ids=lambda script: script.__name__)


def tiny(script, tmp_path, **changes) -> list[str]:
    return SCRIPTS[script](tmp_path, **changes)


def run_alone(script, tmp_path, before: str, **changes) -> str:
    """What a run in a process of its own prints; without a network a package must end it well."""
    start = helpers.launch if script is train_gpt else baseline.launch
    process = start(tiny(script, tmp_path, **changes), f"{before}; os.chdir({str(tmp_path)!r})")
    out, error = process.communicate(timeout=240)
    assert process.returncode == 0, error
    return out


class Told(types.ModuleType):
    """A module that notes what it is told; `login` is what wandb knows of one."""
    def __init__(self, name: str, login: bool = False, broken: str = ""):
        super().__init__(name)
        self.options, self.logged, self.finished, self.login_known, self.broken = None, [], 0, login, broken

    def login(self, prompt: bool) -> bool:
        assert not prompt
        return self.login_known

    def init(self, **options):
        self.fail("init")
        self.options = options
        return self

    def log(self, numbers, step):
        self.fail("log")
        self.logged.append((step, numbers))

    def finish(self):
        print("what the package says")
        self.fail("finish")
        self.finished += 1

    def fail(self, call: str):
        if self.broken == call:
            raise RuntimeError(f"{call} did not work\nand more")


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)

    def make(name: str, **options) -> Told:
        monkeypatch.setitem(sys.modules, name, module := Told(name, **options))
        return module
    return make


@each_script
@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_metrics(name, script, tmp_path, stand_in):
    told = stand_in(name)
    assert script.main(tiny(script, tmp_path, tracker=name)) == 0
    folder, options = run_folder(tmp_path), told.options
    assert options["config"]["settings"]["muon_lr"] == 0.02 and told.finished == 1
    assert (options["project"], options["group"], options["name"]) == ("nanospeedrun", "x", folder.name)
    assert options["resume"] == "allow"
    for kind in ("train_loss", "val_loss"):
        assert {step: values[kind] for step, values in told.logged if kind in values} == losses(folder)[kind]


@pytest.mark.parametrize("login, mode, expected", [
    (False, None, "offline"), (True, None, None), (False, "online", None), (False, "offline", None)])
@each_script
def test_wandb_is_offline_without_a_login_unless_the_user_says(
        script, login, mode, expected, tmp_path, stand_in, monkeypatch):
    """Its own WANDB_MODE counts; then no mode is given."""
    if mode:
        monkeypatch.setenv("WANDB_MODE", mode)
    told = stand_in("wandb", login=login)
    argv = tiny(script, tmp_path, tracker="wandb", iterations=1, warmup_steps=0)
    assert script.main(argv) == 0 and told.options["mode"] == expected
    assert told.options["dir"] == str(run_folder(tmp_path)) and told.options["id"] == run_folder(tmp_path).name


@each_script
@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_a_tracker_that_fails_costs_no_run(call, script, tmp_path, stand_in, capsys):
    stand_in("trackio", broken=call)
    assert script.main(tiny(script, tmp_path, tracker="trackio")) == 0
    out = capsys.readouterr().out
    assert out.count(f"warning: --tracker trackio: {call} did not work; the run goes on without it\n") == 1
    assert out.count("warning") == 1 and records(run_folder(tmp_path))[-1]["status"] == "done"


@each_script
@pytest.mark.parametrize("broken", ["", "finish"])
def test_the_result_comes_after_what_a_tracker_prints(broken, script, tmp_path, stand_in, capsys):
    stand_in("trackio", broken=broken)
    assert script.main(tiny(script, tmp_path, tracker="trackio")) == 0
    before, result = capsys.readouterr().out.split("\n---\n")
    assert "what the package says" in before and ("finish did not work" in before) == bool(broken)
    assert [line.split(": ")[0] for line in result.splitlines()][::9] == ["status", "params"]


@each_script
@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_package_that_is_not_installed_is_named(name, script, tmp_path, capsys, monkeypatch):
    for module in [module for module in sys.modules if module.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)
    assert script.main(tiny(script, tmp_path, tracker=name, iterations=1, warmup_steps=0)) == 0
    warning = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: --tracker")]
    assert len(warning) == 1 and f"pip install {name}" in warning[0]


@each_script
def test_no_tracker_is_imported_without_the_flag(script, tmp_path, monkeypatch):
    for name in ("wandb", "trackio", "torch.utils.tensorboard", "trackers"):
        monkeypatch.setitem(sys.modules, name, None)  # an import would fail
    assert script.main(tiny(script, tmp_path, iterations=1, warmup_steps=0)) == 0


@each_script
def test_without_the_file_the_flag_is_refused(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(script.importlib.util, "find_spec", lambda name: None)
    assert script.main(tiny(script, tmp_path, tracker="wandb")) == 2
    assert "--tracker wandb: trackers.py is not beside it" in capsys.readouterr().err


@each_script
def test_only_the_first_process_tracks(script, tmp_path, stand_in):
    told = stand_in("trackio")
    script.RunLog(tmp_path).metric(step=1, train_loss=2.0)
    assert not told.logged and not list(tmp_path.iterdir())


def test_routers_are_tracked_by_layer(tmp_path, stand_in):
    told = stand_in("trackio")
    assert train_moe.main(tiny(train_moe, tmp_path, tracker="trackio", router_every=1, **MIXTURE)) == 0
    assert any(key.startswith("routers/") and key.endswith("/layer1") for _, values in told.logged for key in values)


# --- the packages themselves, without a network


@each_script
def test_wandb_offline(script, tmp_path):
    pytest.importorskip("wandb")
    run_alone(script, tmp_path, "os.environ.update(WANDB_SILENT='true')", tracker="wandb")
    written = [path.read_bytes() for path in run_folder(tmp_path).rglob("run-*.wandb")]
    assert len(written) == 1 and all(word in written[0] for word in (b"train_loss", b"val_bpb", b"warmup_steps"))


@each_script
def test_tensorboard_reads_what_was_written(script, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    assert script.main(tiny(script, tmp_path, tracker="tensorboard")) == 0
    events = EventAccumulator(str(run_folder(tmp_path) / "tensorboard")).Reload()
    shown = {event.step: event.value for event in events.Scalars("train_loss")}
    assert shown == pytest.approx(losses(run_folder(tmp_path))["train_loss"], rel=1e-6)


@each_script
def test_trackio_keeps_a_run_on_this_machine(script, tmp_path):
    pytest.importorskip("trackio")
    kept = tmp_path / "trackio"
    out = run_alone(script, tmp_path, f"os.environ.update(TRACKIO_DIR={str(kept)!r})", tracker="trackio")
    assert "warning" not in out and b"train_loss" in (kept / "nanospeedrun.db").read_bytes()
