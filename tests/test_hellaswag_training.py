"""--hellaswag-every: scores during training are those of evals/hellaswag.py, on any number of ranks, in all scripts."""
import json
import sys
from pathlib import Path

import helpers
import pytest
from ranks import run_ranks
from test_hellaswag import GPT2, TASKS, Numbers, write_tasks

import train_gpt
import train_moe
from evals import hellaswag

RUN = dict(iterations=4, eval_every=0, eval_tokens=64, hellaswag_every=2, log_every=2, seq_len=64, max_doc_len=64)
OF_SPEEDRUN = dict(momentum_warmup=1, momentum_cooldown=0, value_embeds=0)
EXTRA = {train_gpt: OF_SPEEDRUN, train_moe: OF_SPEEDRUN | dict(num_experts=4)}


@pytest.fixture(autouse=True)
def tokenizer(monkeypatch):
    monkeypatch.setattr(hellaswag, "load_tokenizer", lambda vocab: Numbers)


def flags(tmp_path, script, **changes) -> list[str]:
    """A run of 4 steps on GPT-2's vocabulary, scored after steps 2 and 4."""
    data = tmp_path / "gpt2"
    if not data.exists():
        helpers.make_data(data, **GPT2)
    given = dict(data=data, hellaswag_file=tmp_path / "tasks.jsonl") | RUN | EXTRA[script] | changes
    return helpers.tiny(tmp_path, **given)


def scores(tmp_path) -> list[dict]:
    return [record for record in helpers.records(helpers.run_folder(tmp_path)) if "hellaswag" in record]


@pytest.mark.parametrize("script", EXTRA, ids=lambda script: script.__name__)
def test_the_last_score_is_that_of_the_checkpoint(tmp_path, capsys, script):
    write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    assert script.main(flags(tmp_path, script)) == 0, capsys.readouterr().err
    printed, found = capsys.readouterr().out, scores(tmp_path)
    assert [record["step"] for record in found] == [2, 4]
    assert f"step 2/4  HellaSwag, {hellaswag.Score(**found[0]['hellaswag'])}" in printed
    assert found[1]["hellaswag_per_token"] == found[1]["hellaswag"]["per_token"]
    output = tmp_path / "score.json"
    assert hellaswag.main(["--checkpoint", str(tmp_path / "logs"), "--input", str(tmp_path / "tasks.jsonl"),
                           "--device", "cpu", "--row-len", "32", "--output", str(output)]) == 0
    alone = json.loads(output.read_text())
    assert {name: alone[name] for name in found[1]["hellaswag"]} == found[1]["hellaswag"]
    assert alone["standard_errors"] == found[1]["hellaswag_errors"]


def losses_on_ranks(world: train_gpt.World, tasks_path: Path) -> list[list[float]]:
    """Runs in a spawned process."""
    hellaswag.load_tokenizer = lambda vocab: Numbers
    s = helpers.settings(hellaswag_every=1, hellaswag_file=str(tasks_path), eval_seq_len=64, micro_tokens=128)
    return train_gpt.HellaSwag(s, GPT2, world).losses(train_gpt.GPT(s, GPT2["vocab_size"]), 32).tolist()


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_share_the_rows_and_agree(tmp_path, size):
    path = write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    several = run_ranks(losses_on_ranks, size, tmp_path, path)
    assert several == [losses_on_ranks(train_gpt.World(), path)] * size


def test_scores_count_in_no_clock_and_change_no_loss(tmp_path):
    write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    for name, every in (("with", 1), ("without", 0)):
        argv = flags(tmp_path, train_gpt, experiment_name=name, hellaswag_every=every)
        if not every:
            argv = argv[:argv.index("--hellaswag-file")] + argv[argv.index("--hellaswag-file") + 2:]
        assert train_gpt.main(argv) == 0
    folders = [helpers.run_folder(tmp_path, name) for name in ("with", "without")]
    assert helpers.losses(folders[0]) == helpers.losses(folders[1])
    helpers.assert_same_state(*(helpers.load_state(folder, 4) for folder in folders))


@pytest.mark.parametrize("changes, sentence", [
    (dict(hellaswag_file="nowhere.jsonl"), "no HellaSwag tasks at nowhere.jsonl"),
    (dict(seq_len=8, max_doc_len=8, micro_tokens=128), "use --eval_seq_len"),
    (dict(hellaswag_every=0), "--hellaswag_file: has no effect without --hellaswag_every"),
])
def test_what_cannot_be_scored_is_one_sentence(tmp_path, capsys, changes, sentence):
    write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    assert train_gpt.main(flags(tmp_path, train_gpt, **changes)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and sentence in error, error


@pytest.mark.parametrize("script", EXTRA, ids=lambda script: script.__name__)
def test_bytes_are_refused_before_training(tmp_path, capsys, script):
    write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    assert script.main(flags(tmp_path, script, data=helpers.make_data(tmp_path / "bytes"))) == 1
    assert "HellaSwag does not apply: it needs a model with GPT-2's vocabulary" in capsys.readouterr().err


def test_without_the_evaluations_beside_the_script(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "evals", None)
    write_tasks(tmp_path / "tasks.jsonl", TASKS[:20])
    assert train_gpt.main(flags(tmp_path, train_gpt)) == 1
    assert "evals/, data/ and generate.py belong beside this script" in capsys.readouterr().err
