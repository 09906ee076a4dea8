"""Whole runs with all of the recipe of 2026 on, of both scripts: the same on 1, 2 and 4 processes, resumed anywhere."""
import math
import shutil

import pytest
import torch
import torch._dynamo
from helpers import load_state, losses, make_data, records, run_folder, steps_saved
from recipe import assert_same_tensors, run_flags, run_processes

import train_gpt
import train_moe

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")
SCRIPTS = [script for script in ("train_gpt", "train_moe")
           if "tail" in {"train_gpt": train_gpt, "train_moe": train_moe}[script].Settings.__dataclass_fields__]
VOCAB, CLOSE = 300, 2e-3
PARTS = {
    "tail": dict(tail=0.6, tail_steps=2),
    "candidates": dict(stage_ends=(0.7, 1.0), candidates=(256, 0), mtp=(1, 0)),
    "ngrams": dict(ngram_rows=256, ngram_every=3),
    "pointer": dict(pointer=8)}
PARTS |= {"all": {key: value for part in PARTS.values() for key, value in part.items()}, "off": {}}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(script, processes, name of a part, "all" or "off") -> folder of the run, with logs/; made when asked for."""
    base = tmp_path_factory.mktemp("runs")
    make_data(base / "data", vocab_size=VOCAB, eot=VOCAB - 1, train=[chain(3000, 0)], val=[chain(500, 1)])

    def get(script: str, size: int, part: str = "all"):
        place = base / f"{script}_{size}_{part}"
        if not place.exists():
            run_processes(size, command(base, place, script, **PARTS[part]), script)
        return place
    return get


def command(base, place, script: str = "train_gpt", **changes) -> list[str]:
    experts = {"num_experts": 4, "moe_impl": "loop"} if script == "train_moe" else {}
    if experts:  # under the last bit of noise the load's slope magnifies rounding until a token goes elsewhere
        experts["noise_end"] = 1.0
    changes = {"tail": 0.0} | changes  # the cpu preset has one
    return run_flags(base / "data", place / "logs", save_every=1, keep=9, **experts, **changes)


def chain(total: int, seed: int) -> list[int]:
    """Tokens of documents of about 20 tokens that rise by 0 to 3 and come back to what was there: both table and
    pointer can learn them."""
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, (total,), generator=random).cumsum(0) % (VOCAB - 1)
    tokens[torch.rand(total, generator=random) < 0.05] = VOCAB - 1
    tokens[0] = VOCAB - 1
    return tokens.tolist()


def optimizer_state(place, step: int = 8) -> dict:
    path = run_folder(place) / "checkpoints" / f"step_{step:06d}" / "state.pt"
    return torch.load(path, weights_only=True)["optimizer"]


def found_losses(place) -> dict:
    return losses(run_folder(place))


def assert_close_runs(one, other):
    """The same losses but for rounding, and weights as close as Muon, which amplifies rounding, leaves them."""
    mine, expected = found_losses(other), found_losses(one)
    for kind in ("train_loss", "val_loss"):
        assert mine[kind].keys() == expected[kind].keys() and len(expected[kind]) >= 2
        assert mine[kind] == pytest.approx(expected[kind], rel=1e-5), kind
    for step in (2, 8):
        first, second = optimizer_state(one, step), optimizer_state(other, step)
        assert first["state"].keys() == second["state"].keys() and first.keys() == second.keys()
        for name, weight in first["state"]["master"].items():
            assert (second["state"]["master"][name] - weight).norm() <= CLOSE * weight.norm(), name


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("script", SCRIPTS)
def test_more_processes_train_the_same(script, size, runs):
    one = runs(script, 1)
    assert_close_runs(one, runs(script, size))
    found = found_losses(one)
    assert found["val_loss"][8] < found["val_loss"][4] - 0.02  # it learns: equal losses of an idle model say nothing


def test_each_part_changes_the_training(runs):
    """Off is another run than on; with n-grams from the step after their first update on, with a tail at the end."""
    off, first = found_losses(runs("train_gpt", 1, "off")), {}
    for part in ("candidates", "ngrams", "pointer"):
        found = found_losses(runs("train_gpt", 1, part))["train_loss"]
        first[part] = next(step for step, loss in found.items() if loss != off["train_loss"][step])
    assert first == {"candidates": 1, "ngrams": 4, "pointer": 1}
    tail = found_losses(runs("train_gpt", 1, "tail"))
    assert tail["train_loss"] == off["train_loss"]
    assert tail["val_loss"][4] == off["val_loss"][4] and tail["val_loss"][8] != off["val_loss"][8]


def waiting_sums(optimizer: dict) -> torch.Tensor:
    """Sums by row of the gradients that wait within a cycle, (256, 32)."""
    rows, grads = (optimizer["state"][key]["ngrams.table"] for key in ("rows", "grads"))
    return torch.zeros(256, 32).index_add_(0, rows, grads)


def test_the_state_of_the_table_does_not_depend_on_the_processes(runs):
    one, *others = (optimizer_state(runs("train_gpt", size)) for size in (1, 2, 4))
    assert one["state"]["master"]["ngrams.table"].shape == (256, 32)
    for other in others:
        for key in ("square", "event", "sums"):
            table, expected = (waiting_sums(found) if key == "sums" else found["state"][key]["ngrams.table"]
                               for found in (other, one))
            torch.testing.assert_close(table, expected, rtol=1e-3, atol=1e-6)
    assert waiting_sums(one).any()  # two steps of a cycle of three wait after step 8


def test_sampled_and_full_losses_are_where_the_stages_say(runs, monkeypatch, capsys):
    """Sampled in the first stage, full in the last, and in every evaluation; the log tells which."""
    calls, part = [], PARTS["candidates"] | {"eval_every": 1}

    def spy(*arguments, candidate_set=train_gpt.candidate_set, **more):
        calls.append(torch.is_grad_enabled())
        return candidate_set(*arguments, **more)
    off = runs("train_gpt", 1, "off")
    found = found_losses(runs("train_gpt", 1, "candidates"))["train_loss"]
    assert found[1] == pytest.approx(math.log(300), abs=1e-4)  # all equal at the start; 256 of 300 stand for all
    assert found_losses(off)["train_loss"][1] == pytest.approx(math.log(384), abs=1e-4)  # all rows of the head
    monkeypatch.setattr(train_gpt, "candidate_set", spy)
    assert train_gpt.main(command(off.parent, off.parent / "spied", **part)) == 0
    assert calls == [True] * (6 * 8)  # 0.7 * 8 steps of 8 rows, each with a set of its own
    told = [line.split(" classes")[0] for line in capsys.readouterr().out.splitlines() if line.endswith("classes")]
    assert told == ["step 1: train losses are among 256", "step 7: train losses are among all"]


def test_candidates_beyond_the_vocabulary_are_the_full_loss(runs):
    off = runs("train_gpt", 1, "off")
    place = off.with_name("beyond")
    run_processes(1, command(off.parent, place, candidates=384))
    assert found_losses(place) == found_losses(off)
    assert_same_tensors(load_state(run_folder(place), 8), load_state(run_folder(off), 8))


# --- resuming


def cut_short(whole, place, after: int):
    """Copy of a run as if it had ended with the checkpoint of step `after`."""
    shutil.copytree(whole, place)
    for step in range(after + 1, 9):
        shutil.rmtree(run_folder(place) / "checkpoints" / f"step_{step:06d}")
    assert steps_saved(run_folder(place))[-1] == after


@pytest.mark.parametrize("script, size, after", [
    ("train_gpt", 1, 4), ("train_gpt", 1, 5), ("train_gpt", 1, 7), ("train_gpt", 2, 5), ("train_moe", 1, 5),
    ("train_moe", 2, 5)])
def test_a_stopped_run_goes_on_to_the_bit(script, size, after, runs, tmp_path):
    """After step 4 the first stage and a cycle of n-grams are under way, and the tail begins; after 5 two steps of a
    cycle wait, and the tail has begun; after 7 one waits, and the loss is full."""
    if script not in SCRIPTS:
        pytest.skip("without these settings")
    whole, place = runs(script, size), tmp_path / "place"
    cut_short(whole, place, after)
    run_processes(size, [*command(whole.parent, place, script, **PARTS["all"]), "--resume"], script)
    events = [record["step"] for record in records(run_folder(place)) if record.get("event") == "resume"]
    assert events == [after]
    assert found_losses(place) == found_losses(whole)  # asserts as well that steps run twice gave the same
    assert_same_tensors(load_state(run_folder(place), 8), load_state(run_folder(whole), 8))


@pytest.mark.parametrize("sizes", [(4, 1), (1, 2)], ids=str)
def test_a_run_goes_on_with_other_processes(sizes, runs, tmp_path):
    """From the middle of a cycle, whose sums then wait on other processes."""
    first, then = sizes
    whole, place = runs("train_gpt", first), tmp_path / "place"
    cut_short(whole, place, 5)
    run_processes(then, [*command(whole.parent, place, **PARTS["all"]), "--resume"])
    steps = [record for record in records(run_folder(place)) if "train_loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6, 7, 8, 6, 7, 8]
    for before, after in zip(steps[5:8], steps[8:], strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-5)
    for name, weight in optimizer_state(whole)["state"]["master"].items():
        assert (optimizer_state(place)["state"]["master"][name] - weight).norm() <= CLOSE * weight.norm(), name


# --- compiled


@pytest.mark.parametrize("unit", ["model", "block"])
def test_the_warm_up_compiles_all_graphs_and_leaves_no_trace(unit, runs, monkeypatch):
    """Traced only, with no C++ compiler needed: a set, an event or a blend is no new graph, and the run is that without
    a warm-up, to the bit."""
    torch._dynamo.reset()
    whole, late = runs("train_gpt", 1), []
    compile_traced, finish = torch.compile, train_gpt.Run.finish
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_traced(f, backend="eager", **options))
    monkeypatch.setattr(train_gpt, "run_errors", lambda *_: [])
    monkeypatch.setattr(train_gpt.Run, "finish", lambda self, *arguments: (
        late.append(train_gpt.compiled_graphs() - self.warm_graphs), finish(self, *arguments)))
    place = whole.with_name(f"traced_{unit}")
    argv = command(whole.parent, place, **PARTS["all"] | {"compile": True, "compile_unit": unit})
    assert train_gpt.main(argv) == 0
    assert late == [0]
    assert found_losses(place) == found_losses(whole)
    mine, expected = (load_state(run_folder(folder), 8) for folder in (place, whole))
    for state in (mine, expected):
        del state["/rng"]
    assert_same_tensors(mine, expected)
