"""logger.py compare of a run with its dense control: what each spent until a loss, step times, what is refused."""
import json
import math

import pytest

import logger
from runlogs import judging

SAME = dict(eval_tokens=300, eval_seq_len=32, batch_tokens=[100], seq_len=[32], mtp=[0])
ROWS = [dict(step=4, val_loss=3.5), dict(step=6, train_loss=2.0), dict(step=8, val_loss=3.1),
        dict(step=10, val_loss=3.0)]


def make_run(folder, rows=ROWS, step_ms=50.0, status="done", fingerprint="same", **changes):
    """A run's folder: steps of 100 tokens; rows may bring their own tokens and times."""
    folder.mkdir()
    config = {"settings": SAME | changes, "data": {"fingerprint": fingerprint}}
    (folder / "config.json").write_text(json.dumps(config))
    rows = [{"tokens": 100 * row["step"], "train_time_ms": step_ms * row["step"], "iterations": 10} | row
            for row in rows]
    last = rows[-1]
    rows.append({"event": "end", "status": status, "step": last["step"], "val_loss": last.get("val_loss"),
                 "train_time_ms": last["train_time_ms"]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def compare(capsys, *groups):
    """What --json gives under "control"."""
    assert logger.main(["compare", *map(str, groups), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["control"]


def table(capsys, *groups):
    assert logger.main(["compare", *map(str, groups), "--no-plot"]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


OWN = [dict(step=2, val_loss=3.2, tokens=1000, train_time_ms=100.0),
       dict(step=5, val_loss=3.05, tokens=1_234_000, train_time_ms=400.0),
       dict(step=10, val_loss=2.9, tokens=2_000_000, train_time_ms=750.0)]


def test_tokens_steps_and_seconds_to_the_last_loss_of_the_control(tmp_path, capsys):
    """In proportion between the validations above and below; training losses do not count."""
    dense, own = make_run(tmp_path / "dense"), make_run(tmp_path / "own", OWN)
    found = compare(capsys, dense, own)
    control, run = found["runs"]
    assert found["loss"] == 3.0 and control["reached"] == {"tokens": 1000, "step": 10, "train_time_ms": 500}
    third = 1 / 3  # of the way from step 5 to 10
    expected = {"tokens": 1_234_000 + 766_000 * third, "step": 5 + 5 * third, "train_time_ms": 400 + 350 * third}
    assert run["reached"] == pytest.approx(expected)
    assert (control["step_time_ratio"], control["break_even_ratio"]) == (1, 1)
    assert run["step_time_ratio"] == pytest.approx(1.5)
    assert run["break_even_ratio"] == pytest.approx(10 / expected["step"])
    lines = table(capsys, dense, own)
    at = lines.index("to val loss 3.0000 tokens steps seconds step time ratio break-even".split())
    assert lines[at + 1] == ["dense", "1,000", "10", "0.5", "1.000", "1.000"]
    assert lines[at + 2] == ["own", "1,489,333", "7", "0.5", "1.500", "1.500"]


def test_the_target_of_the_control_goes_before_its_last_loss(tmp_path, capsys):
    dense, own = make_run(tmp_path / "dense", target_loss=3.1), make_run(tmp_path / "own", OWN)
    found = compare(capsys, dense, own)
    assert found["loss"] == 3.1 and found["runs"][0]["reached"]["step"] == 8
    assert found["runs"][1]["reached"] == pytest.approx({"tokens": 823_000, "step": 4, "train_time_ms": 300})
    assert found["runs"][1]["break_even_ratio"] == pytest.approx(2)


def test_a_loss_that_is_not_reached(tmp_path, capsys):
    dense = make_run(tmp_path / "dense")
    own = make_run(tmp_path / "own", [*OWN[:2], OWN[2] | {"val_loss": 3.04}])
    found = compare(capsys, dense, own)["runs"][1]
    assert (found["reached"], found["break_even_ratio"]) == (None, None)
    assert ["own", "not", "reached", "-", "-", "1.500", "-"] in table(capsys, dense, own)
    found = compare(capsys, make_run(tmp_path / "far", target_loss=1.0), dense)["runs"]
    assert [run["break_even_ratio"] for run in found] == [None, None]


@pytest.mark.parametrize("losses, at", [
    ([3.0, 2.9], 10), ([3.1, 3.0, 2.5], 20), ([3.2, 3.0], 20), ([3.2, 2.8], 15), ([math.inf, 2.8], 20),
    ([3.2, 3.2, 2.9, 3.5], 20 + 10 * 2 / 3), ([3.0, 3.0], 10), ([math.nan, 3.2, 2.8], 25), ([None, 3.0], 20),
    ([3.1, 3.05], None), ([], None),
])
def test_where_a_loss_is_reached(losses, at):
    rows = [dict(step=10 * i, val_loss=loss, tokens=10 * i, train_time_ms=10 * i) for i, loss in enumerate(losses, 1)]
    found = judging.reached(rows, 3.0)
    assert found is None if at is None else found == pytest.approx(dict.fromkeys(judging.SPENT, at))
    assert judging.reached([{**row, "tokens": None} for row in rows], 3.0) is None


@pytest.mark.parametrize("changes, words", [
    (dict(fingerprint="other"), "dense and own: other data"),
    (dict(fingerprint=None), "dense and own: no config.json says which data"),
    (dict(eval_tokens=7, eval_seq_len=64), "dense and own: eval_tokens 300 and 7, eval_seq_len 32 and 64"),
    (dict(batch_tokens=[200], fingerprint="other"), "other data, batch_tokens [100] and [200]"),
])
def test_runs_that_are_not_comparable(tmp_path, capsys, changes, words):
    dense, own = make_run(tmp_path / "dense"), make_run(tmp_path / "own", **changes)
    assert words in compare(capsys, dense, own)["refused"]
    lines = [" ".join(words) for words in table(capsys, dense, own)]
    (said,) = [line for line in lines if line.startswith("tokens, steps and seconds to a loss: not comparable, ")]
    assert words in said and not any(line.startswith("to val loss") for line in lines)


def test_settings_that_only_one_script_has_do_not_matter(tmp_path, capsys):
    dense = make_run(tmp_path / "dense")
    config = json.loads((dense / "config.json").read_text())
    del config["settings"]["mtp"]
    (dense / "config.json").write_text(json.dumps(config))
    assert "loss" in compare(capsys, dense, make_run(tmp_path / "own", num_experts=8))


def test_more_runs_than_two_and_groups_of_several(tmp_path, capsys):
    runs = [make_run(tmp_path / name, step_ms=ms) for name, ms in (("a", 50.0), ("b", 75.0), ("c", 100.0))]
    assert [run["step_time_ratio"] for run in compare(capsys, *runs)["runs"]] == pytest.approx([1, 1.5, 2])
    group = tmp_path / "group"
    group.mkdir()
    for i in range(2):
        make_run(group / f"run_{i}", step_ms=50.0 + i)
    assert compare(capsys, runs[0], group) is None


def test_a_run_that_has_not_ended_is_refused(tmp_path, capsys):
    own = make_run(tmp_path / "own")
    half = make_run(tmp_path / "half", [dict(step=5, val_loss=3.0)], status="interrupted")
    assert logger.main(["compare", str(half), str(own)]) == 1
    assert "holds no complete run: half: died at step 5" in capsys.readouterr().err
