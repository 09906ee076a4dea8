"""--follow of evals/hellaswag.py: a run's checkpoints are scored as they appear, once each, as by themselves."""
import contextlib
import json
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import helpers
import pytest
from test_hellaswag import BYTES, GPT2, TASKS, Numbers, error_of, run, write_tasks

import train_baseline
import train_gpt
import train_moe
from evals import hellaswag

RUN = dict(iterations=4, eval_every=0, eval_tokens=64, save_every=1, keep=9, log_every=2, seq_len=64, max_doc_len=64)
OF_SPEEDRUN = dict(momentum_warmup=1, momentum_cooldown=0, value_embeds=0)
EXTRA = {train_gpt: OF_SPEEDRUN, train_moe: OF_SPEEDRUN | dict(num_experts=4), train_baseline: dict(warmup_steps=1)}
# flags of helpers.TINY that train_baseline.py does not have, or refuses under AdamW
OF_OTHERS = ("cooldown", "lr_floor", "muon_momentum", "value_embeds", "window", "window_start", "window_step",
             "muon_lr", "adam_lr", "momentum_warmup", "momentum_cooldown")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Numbers for texts, and no waiting."""
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)
    monkeypatch.setattr(hellaswag, "POLL", 0.01)


def flags(folder: Path, script) -> list[str]:
    """A run of 4 steps on GPT-2's vocabulary with a checkpoint after each."""
    data = helpers.make_data(folder / "gpt2", **GPT2) if not (folder / "gpt2").exists() else folder / "gpt2"
    given = dict(data=data, experiment_name=script.__name__) | RUN | EXTRA[script]
    if script is not train_baseline:
        return helpers.tiny(folder, **given)
    given = {**helpers.TINY, "log_dir": folder / "logs", **given}
    return helpers.flags(**{name: value for name, value in given.items() if name not in OF_OTHERS})


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> dict:
    """The folder of a run of each script."""
    root = tmp_path_factory.mktemp("trained")
    for script in EXTRA:
        assert script.main(flags(root, script)) == 0
    return {script: helpers.run_folder(root, script.__name__) for script in EXTRA}


@pytest.fixture
def tasks(tmp_path) -> Path:
    return write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])


def arguments(folder: Path, tasks: Path, *more) -> list:
    return ["--follow", folder, "--input", tasks, "--device", "cpu", "--row-len", 32, *more]


def scores(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / hellaswag.SCORES).read_text().splitlines()]


def copy(source: Path, target: Path, step: int):
    """One checkpoint of a run into another, which appears whole, as the training scripts write it."""
    name = f"step_{step:06d}"
    (target / "checkpoints").mkdir(exist_ok=True)
    shutil.copytree(source / "checkpoints" / name, target / "checkpoints" / f"{name}.tmp")
    (target / "checkpoints" / f"{name}.tmp").rename(target / "checkpoints" / name)


def started(source: Path, folder: Path) -> Path:
    """A copy of a run without its checkpoints and its end, as if it went on."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints", "lock", hellaswag.SCORES))
    lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["event"] == "end"
    (folder / "metrics.jsonl").write_text("".join(lines[:-1]))
    return folder


def end(source: Path, folder: Path):
    shutil.copy(source / "metrics.jsonl", folder / "metrics.jsonl")


@pytest.fixture
def half(trained, tmp_path) -> Path:
    """A finished run of train_gpt.py of which the checkpoints of steps 2 and 4 are there."""
    folder = started(trained[train_gpt], tmp_path / "run")
    copy(trained[train_gpt], folder, 2)
    copy(trained[train_gpt], folder, 4)
    end(trained[train_gpt], folder)
    return folder


@pytest.mark.parametrize("script", EXTRA, ids=lambda script: script.__name__)
def test_every_checkpoint_has_the_score_that_it_has_alone(trained, tasks, tmp_path, capsys, script):
    folder = trained[script]
    code, out, err = run(capsys, *arguments(folder.parent, tasks))
    found = scores(folder)
    assert code == 0 and [r["step"] for r in found] == [1, 2, 3, 4], err
    output = tmp_path / "score.json"
    for record, line in zip(found, out.splitlines(), strict=True):
        path = folder / record["checkpoint"]
        alone = ["--checkpoint", path, "--input", tasks, "--device", "cpu", "--row-len", 32, "--output", output]
        assert run(capsys, *alone)[0] == 0
        expected, meta = json.loads(output.read_text()), json.loads((path / "meta.json").read_text())
        assert {name: expected[name] for name in record["hellaswag"]} == record["hellaswag"]
        assert record["hellaswag"]["tasks"] == 20 and set(record["hellaswag"]) == {*hellaswag.Score._fields}
        assert record["hellaswag_errors"] == expected["standard_errors"]
        assert record["hellaswag_per_token"] == record["hellaswag"]["per_token"]
        assert (record["step"], record["train_time_ms"]) == (meta["step"], meta["train_time_ms"])
        assert record["tokens"] == 128 * record["step"], "also where metrics.jsonl has no record of the step"
        assert line == f"step {record['step']}: HellaSwag, {hellaswag.Score(**record['hellaswag'])}"


def test_checkpoints_that_appear_while_it_follows(trained, tasks, tmp_path, capsys):
    """One appears when that before it is scored, the last one together with the end of the run."""
    source = trained[train_gpt]
    folder = started(source, tmp_path / "run")
    stop = threading.Event()

    def train():
        for step in (1, 2, 4):
            copy(source, folder, step)
            if step == 4:
                end(source, folder)
            while not stop.wait(0.01):
                with contextlib.suppress(FileNotFoundError):
                    if step in [r["step"] for r in scores(folder)]:
                        break

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    code = run(capsys, *arguments(folder, tasks))[0]
    stop.set()
    thread.join()
    assert code == 0 and [r["step"] for r in scores(folder)] == [1, 2, 4]


def test_what_is_scored_is_not_scored_again(half, tasks, tmp_path, capsys, monkeypatch):
    assert run(capsys, *arguments(half, tasks, "--tasks", 10))[0] == 0
    first = scores(half)
    with monkeypatch.context() as patch:
        patch.setattr(hellaswag, "score_checkpoint", pytest.fail)
        code, out, err = run(capsys, *arguments(half, tasks, "--tasks", 10))
        assert (code, out) == (0, "") and "2 score(s) are there" in err and scores(half) == first
    assert run(capsys, *arguments(half, tasks))[0] == 0, "other tasks"
    assert [(r["step"], r["hellaswag"]["tasks"]) for r in scores(half)] == [(2, 10), (4, 10), (2, 20), (4, 20)]
    others = write_tasks(tmp_path / "others.jsonl", TASKS[20:40])
    assert run(capsys, *arguments(half, others))[0] == 0 and len(scores(half)) == 6


def test_a_line_that_was_cut_off_is_scored_again(half, tasks, capsys):
    assert run(capsys, *arguments(half, tasks))[0] == 0
    path, whole = half / hellaswag.SCORES, scores(half)
    path.write_bytes(path.read_bytes()[:-40])
    assert run(capsys, *arguments(half, tasks))[0] == 0
    first, cut, again = path.read_text().splitlines()
    assert [json.loads(first), json.loads(again)] == whole and path.read_bytes().endswith(b"\n")
    assert hellaswag.parse_objects(path.read_bytes()) == whole


def test_a_checkpoint_that_training_deletes_meanwhile(half, tasks, capsys, monkeypatch):
    """keep= deletes it after it was found, or while its weights are read."""
    def load_model(script, path, meta, longest, load=hellaswag.load_model):
        if meta["step"] == 2:
            shutil.rmtree(path)
        return load(script, path, meta, longest)

    monkeypatch.setattr(hellaswag, "load_model", load_model)
    code, _, err = run(capsys, *arguments(half, tasks))
    assert code == 0 and "step_000002: deleted or replaced before it was scored" in err
    assert [r["step"] for r in scores(half)] == [4]


def test_a_checkpoint_that_training_replaces_is_scored_again(trained, half, tasks, capsys):
    """As in a run that was resumed from an earlier one with other settings."""
    assert run(capsys, *arguments(half, tasks))[0] == 0
    path = half / "checkpoints" / "step_000004"
    shutil.rmtree(path)
    shutil.copytree(trained[train_moe] / "checkpoints" / "step_000004", path)
    assert run(capsys, *arguments(half, tasks))[0] == 0
    assert [r["step"] for r in scores(half)] == [2, 4, 4]


def test_a_damaged_checkpoint_does_not_keep_the_others_from_their_scores(half, tasks, capsys):
    path = half / "checkpoints" / "step_000002" / "state.pt"
    path.write_bytes(path.read_bytes()[:-1])
    code, _, err = run(capsys, *arguments(half, tasks))
    assert code == 1 and err.count("warning: ") == 1 and "step_000002 cannot be used" in err
    assert [r["step"] for r in scores(half)] == [4]


@pytest.mark.parametrize("metrics, ended", [
    ('{"event": "end", "step": 4}\n', True), ('{"event": "end", "step": 4}', False), ("", False), ("\n", False),
    ('{"event": "end", "step": 4}\n{"event": "res', False), ('{"event": "end", "step": 4}\n{"step": 5}\n', False),
    (f'{{"step": 1, "x": "{"x" * hellaswag.TAIL}"}}\n{{"event": "end"}}\n', True), (None, False),
])
def test_end_of_a_run(tmp_path, metrics, ended):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    assert hellaswag.has_ended(tmp_path) == ended


@pytest.mark.parametrize("step, tokens", [(0, None), (1, None), (2, 200), (3, 300), (4, 400), (5, 600), (9, 1400)])
def test_tokens_where_the_metrics_do_not_have_the_step(tmp_path, step, tokens):
    """The batch doubles after step 4; what a kill left and other objects do not count."""
    rows = [{"step": 2, "tokens": 200, "batch_tokens": 100}, {"event": "resume", "step": 3},
            {"step": None, "tokens": 1},
            {"step": 4, "tokens": 400, "val_loss": 3.0}, {"step": 5, "tokens": 600, "batch_tokens": 200}]
    assert hellaswag.tokens_at(tmp_path, step) is None
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "tok')
    assert hellaswag.tokens_at(tmp_path, step) == tokens


def test_ctrl_c_ends_it_with_130_and_whole_lines(trained, tasks, tmp_path):
    folder = started(trained[train_gpt], tmp_path / "run")
    copy(trained[train_gpt], folder, 2)
    code = f"import sys\nsys.path.insert(0, {str(helpers.ROOT / 'tests')!r})\nfrom test_hellaswag import *\n" \
           "hellaswag.load_tokenizer = lambda vocab: Numbers\nsys.exit(hellaswag.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *map(str, arguments(folder, tasks))]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=helpers.environment())
    line = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    assert (process.returncode, out) == (130, "") and "Traceback" not in err, err
    assert line.startswith("step 2: HellaSwag, 20 tasks") and [r["step"] for r in scores(folder)] == [2]


def test_what_cannot_be_followed_is_one_sentence(trained, half, tasks, tmp_path, capsys):
    assert f"--follow {tmp_path / 'none'}: there is no run" in error_of(capsys, *arguments(tmp_path / "none", tasks))
    assert "python evals/hellaswag.py --download" in error_of(capsys, *arguments(half, tmp_path / "nowhere"))
    assert "use --row-len" in error_of(capsys, *arguments(half, tasks, "--row-len", 4))
    config = half / "config.json"
    config.write_text(json.dumps({"data": {"meta": BYTES}}))
    assert "does not apply: it needs a model with GPT-2's vocabulary" in error_of(capsys, *arguments(half, tasks))
    config.write_text("{}")
    assert f"{config} is damaged" in error_of(capsys, *arguments(half, tasks))
    assert not (half / hellaswag.SCORES).exists()


def test_the_newest_run_of_an_experiment_is_followed(half, tmp_path):
    """By its name, which starts with its time, not by a file's time; before it the one that is trained now."""
    names = ["20260102-000000-aaaa", "20260101-000000-bbbb"]
    newer, older = (tmp_path / "runs" / name for name in names)
    for i, folder in enumerate((newer, older)):
        shutil.copytree(half, folder)
        hellaswag.os.utime(folder / "config.json", (i, i))
    assert hellaswag.find_run(tmp_path / "runs") == newer and hellaswag.find_run(older) == older
    lock = train_gpt.lock_folder(older)
    assert hellaswag.find_run(tmp_path / "runs") == older
    lock.close()
    assert hellaswag.find_run(tmp_path / "runs") == newer


def test_a_run_that_was_killed_is_not_waited_for(trained, tasks, tmp_path, capsys, monkeypatch):
    """Its lock is free, its metrics have no end. One that lives, or was made before there were locks, is waited for."""
    folder = started(trained[train_gpt], tmp_path / "run")
    copy(trained[train_gpt], folder, 2)
    lock = train_gpt.lock_folder(folder)
    assert hellaswag.is_alive(folder) is True
    lock.close()
    assert hellaswag.is_alive(folder) is False
    code, out, err = run(capsys, *arguments(folder, tasks))
    assert code == 0 and out.startswith("step 2: ") and "its process is gone without an end" in err
    (folder / "lock").write_text("process 1 of another machine")
    assert hellaswag.is_alive(folder) is None
    (folder / "lock").unlink()
    assert hellaswag.is_alive(folder) is None
    polls = []

    def wait(seconds):
        polls.append(seconds)
        if len(polls) == 5:
            end(trained[train_gpt], folder)

    monkeypatch.setattr(hellaswag.time, "sleep", wait)
    assert run(capsys, *arguments(folder, tasks))[0] == 0 and len(polls) == 5


def test_a_damaged_meta_is_said_once(half, tasks, capsys):
    (half / "checkpoints" / "step_000002" / "meta.json").write_text('{"sha256": "\x1b[2J"')
    code, _, err = run(capsys, *arguments(half, tasks))
    assert code == 1 and err.count("step_000002 cannot be used") == 1 and "\x1b" not in err
    assert [r["step"] for r in scores(half)] == [4]


def test_scores_that_cannot_be_written_are_named(half, tasks, capsys):
    (half / hellaswag.SCORES).symlink_to("/dev/full")
    assert f"{hellaswag.SCORES} in it is no file" in error_of(capsys, *arguments(half, tasks))
    with pytest.raises(OSError, match="cannot write to .*full: No space left"):
        hellaswag.append_object(Path("/dev/full"), {})
