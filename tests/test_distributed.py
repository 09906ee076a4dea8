"""One rank against several: same weights, same state, same losses; communication beside the backward pass.

Ranks are spawned processes on gloo, or started by torchrun on the loopback device; see ranks.py."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ranks import (
    difference,
    finish,
    free_port,
    launch,
    metrics,
    overlap_scenario,
    run_folder,
    run_ranks,
    script_flags,
    settings,
    training_scenario,
    write_corpus,
)

import train_gpt as tg

pytestmark = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")
ROUNDING = 2e-4  # of fp32 sums in another order, after 6 steps that orthogonalize; measured: 6e-5


# --- spawned ranks on random batches


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Number of ranks -> what training_scenario returned on each; made when first asked for."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}

    def get(size: int) -> list[dict]:
        if size == 1 and 1 not in results:
            results[1] = [training_scenario(tg.World(), {}, None)]
        elif size not in results:
            saved = folder / "saved_by_2.pt"
            if size != 2:
                torch.save(get(2)[0]["checkpoint"], saved)
            results[size] = run_ranks(training_scenario, size, folder, {}, None if size == 2 else saved)
        return results[size]

    return get


@pytest.mark.parametrize("size", [2, 3, 4])
def test_parameters_match_one_rank(trained, size):
    one, many = trained(1)[0], trained(size)[0]
    for moment in ("middle", "end"):
        assert max(difference(one[moment], many[moment]).values()) < ROUNDING
    assert min(difference(one["middle"], one["end"]).values()) > 10 * ROUNDING  # equal because idle would say nothing


@pytest.mark.parametrize("size", [2, 3, 4])
def test_losses_sum_to_those_of_one_rank(trained, size):
    summed = [sum(losses) for losses in zip(*(r["losses"] for r in trained(size)), strict=True)]
    assert summed == pytest.approx(trained(1)[0]["losses"], rel=1e-5)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_hold_the_same_bits_after_every_step(trained, size):
    digests = [r["digests"] for r in trained(size)]
    assert all(d == digests[0] for d in digests)
    assert len(set(digests[0])) == 4  # and every step changes them


@pytest.mark.parametrize("size", [2, 3, 4])
def test_state_dict_does_not_depend_on_the_ranks(trained, size):
    one = trained(1)[0]
    first, *others = trained(size)
    assert all(not tensors for other in others for tensors in other["checkpoint"]["state"].values())  # rank 0 writes
    for result in [first]:
        for moment in ("checkpoint", "end_checkpoint"):
            assert result[moment]["steps"] == one[moment]["steps"]
            assert result[moment]["state"].keys() == one[moment]["state"].keys()
            for key, tensors in one[moment]["state"].items():
                found = result[moment]["state"][key]
                assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in found.items()}
                assert max(difference(tensors, found).values()) < ROUNDING, key


def test_state_dict_names_every_parameter_and_moment(trained):
    one = trained(1)[0]["checkpoint"]["state"]
    assert one["master"].keys() == trained(1)[0]["end"].keys()
    assert one["momentum"].keys() | one["exp_avg"].keys() == one["master"].keys()
    assert one["variance"].keys() == one["momentum"].keys() and one["exp_avg_sq"].keys() == one["exp_avg"].keys()
    for name, weights in trained(1)[0]["middle"].items():
        assert torch.equal(one["master"][name], weights)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_resume_on_the_same_ranks_is_exact(trained, size):
    for result in trained(size):
        assert all(torch.equal(result["again"][name], p) for name, p in result["end"].items())


@pytest.mark.parametrize("size", [3, 4])
def test_checkpoint_of_2_ranks_continues_on_others(trained, size):
    for result in trained(size):
        assert max(difference(trained(2)[0]["end"], result["from_file"]).values()) < ROUNDING


def test_checkpoint_of_2_ranks_continues_on_one(trained):
    from ranks import continued
    result = continued(settings(), tg.World(), trained(2)[0]["checkpoint"])
    assert max(difference(trained(2)[0]["end"], result).values()) < ROUNDING


@pytest.mark.parametrize("size", [2, 3, 4])
def test_each_rank_holds_its_share_of_the_state(trained, size):
    s = settings()
    matrix, mlp, embedding = s.width**2, s.mlp_ratio * s.width**2, 128 * s.width
    qkvo_mine, mlp_mine = -(-8 // size), -(-6 // size)
    flat = -(-embedding // size) * 3  # lm_head, embedding, one value embedding
    hidden = qkvo_mine * matrix + mlp_mine * mlp
    rows = qkvo_mine * s.width + mlp_mine * s.mlp_ratio * s.width
    expected = {"master": hidden + flat, "momentum": hidden, "exp_avg": flat, "exp_avg_sq": flat, "variance": rows}
    for result in trained(size):
        assert result["state_numel"] == expected
        assert result["grad_numel"] == hidden + flat


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gradients_are_gone_after_backward(trained, size):
    # of the 8 qkvo matrices 4, a parameter, or `size`, of the 6 MLP matrices `size`; three flat tables
    works = -(-8 // max(size, 4 // size * size)) + -(-6 // size) + 3 if size > 1 else 0
    small = 3 if size > 1 else 0  # gates, smear, scalars
    for result in trained(size):
        assert result["left"] == {"grads": [], "sums": 0, "arrived": 0, "works": works + small, "works_after": 0,
                                  "gathers": works}


# --- overlap


@pytest.fixture(scope="module")
def overlap(tmp_path_factory):
    folder = tmp_path_factory.mktemp("overlap")
    return run_ranks(overlap_scenario, 2, folder, folder / "rank_0_is_through")


def split(events: list, kind: str, what: str) -> tuple[list, list]:
    at = events.index((kind, what))
    return events[:at], events[at + 1:]


def test_earlier_micro_steps_do_not_communicate(overlap):
    for result in overlap:
        first, _ = split(result["events"], "end", "first micro-step")
        assert {kind for kind, _ in first} == {"block", "grad"}


def test_reductions_start_before_early_layers_have_gradients(overlap):
    for result in overlap:
        _, rest = split(result["events"], "end", "first micro-step")
        during, _ = split(rest, "end", "backward")
        for early, launched_before in (("blocks.0.mlp.up", 7), ("blocks.1.mlp.up", 5), ("blocks.2.mlp.up", 3)):
            before, _ = split(during, "grad", early)
            # the head, and for each later layer one of 2 MLP matrices and one of 4 of qkvo
            assert sum(kind == "launch" for kind, _ in before) >= launched_before


def test_no_wait_within_backward(overlap):
    for result in overlap:
        _, rest = split(result["events"], "end", "first micro-step")
        during, after = split(rest, "end", "backward")
        during = [event for event in during if event[0] != "block"]
        assert "wait" not in {kind for kind, _ in during}
        launches = [event for event in during if event[0] != "grad"]
        assert {kind for kind, _ in launches} == {"launch"}
        assert sum(kind == "wait" for kind, _ in after) == sum(kind == "launch" for kind, _ in during + after)
        assert not any(kind == "blocking" for kind, _ in after)


def test_weights_are_sent_by_the_step_and_awaited_where_the_next_forward_pass_uses_them(overlap):
    for result in overlap:
        _, after = split(result["events"], "end", "backward")
        step, forward = split(after, "end", "step")
        kinds = [(kind, what[:10]) for kind, what in step]
        assert kinds.count(("launch", "all_gather")) == 11  # 4 of 4 qkvo matrices, 4 of 2 MLP matrices, 3 tables
        assert ("wait", "all_gather") not in kinds
        assert {what[:10] for kind, what in forward if kind == "wait"} == {"all_gather"}
        places = [split(forward, "block", str(i))[0] for i in range(4)]
        # before block 0 the embedding, a value table and its qkvo, up and down; the head after all
        assert [sum(kind == "wait" for kind, _ in before) for before in places] == [4, 6, 8, 10]
        assert sum(kind == "wait" for kind, _ in forward) == 11


def test_buffers_stay_referenced_until_the_wait(overlap):
    for result in overlap:
        assert len(result["held"]) == 4 + 4 + 3 + 3
        for work, packed, piece, owners in result["held"]:
            assert work == "SpyWork"
            assert packed in ([owners * piece, 2 * owners * piece] if owners > 1 else [None])


# --- whole runs under torchrun


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """Launch -> log folder of a run: "1", "2" and "4" processes, "2 agents" of one process each."""
    folder, done = tmp_path_factory.mktemp("script"), {}
    corpus = write_corpus(folder / "chain")

    def get(kind: str, **changes):
        if kind in done:
            return done[kind]
        logs = folder / kind.replace(" ", "_")
        flags = script_flags(corpus, logs, **changes)
        if kind == "2 agents":
            address = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
            finish([launch([*address, f"--node_rank={rank}"], flags) for rank in range(2)])
        else:
            finish([launch(["--standalone", f"--nproc_per_node={kind[0]}"], flags)])
        done[kind] = logs
        return logs

    return get


@pytest.mark.parametrize("kind", ["2", "4", "2 agents"])
def test_script_has_the_losses_of_one_process(script, kind):
    (train, val), (expected_train, expected_val) = metrics(script(kind)), metrics(script("1"))
    assert list(train) == list(expected_train) == [1, 2, 3, 4, 5, 6] and list(val) == list(expected_val) == [3, 6]
    assert train == pytest.approx(expected_train, rel=1e-5)
    assert val == pytest.approx(expected_val, rel=1e-5)
    assert expected_train[6] < expected_train[1] - 0.1  # it learns: equal losses of an idle model would say nothing


@pytest.mark.parametrize("kind", ["2", "4"])
def test_script_checkpoint_is_that_of_one_process(script, kind):
    one, many = (torch.load(run_folder(script(k)) / "checkpoints/step_000006/state.pt", weights_only=True)["optimizer"]
                 for k in ("1", kind))
    assert one["steps"] == many["steps"] == 6
    # gradients of the first steps are of low rank, and what is orthogonalized of the rest is rounding; measured: 1.3e-3
    assert max(difference(one["state"]["master"], many["state"]["master"]).values()) < 5e-3


def test_script_resumes_on_another_number_of_processes(script):
    logs = script("2").with_name("2_to_1")
    shutil.copytree(script("2"), logs)
    shutil.rmtree(run_folder(logs) / "checkpoints/step_000006")
    corpus = script("2").parent / "chain"
    finish([launch(["--standalone", "--nproc_per_node=1"], [*script_flags(corpus, logs), "--resume"])])
    text = (run_folder(logs) / "metrics.jsonl").read_text()
    assert '"event": "resume", "step": 3' in text
    assert text.count('"step": 4, "train_loss"') == 2 and text.count('"step": 3, "train_loss"') == 1
    (train, val), (expected_train, expected_val) = metrics(logs), metrics(script("2"))  # the last line of a step counts
    assert train == pytest.approx(expected_train, rel=1e-5) and val == pytest.approx(expected_val, rel=1e-5)


SIGNALLED = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(tg.__file__).parent)!r})
import train_gpt

def step(self, *args, step=train_gpt.MuonAdamW.step, **kwargs):
    step(self, *args, **kwargs)
    if self.steps == 3 and os.environ["RANK"] == "1":
        signal.raise_signal(signal.SIGTERM)

train_gpt.MuonAdamW.step = step
sys.exit(train_gpt.main())
"""


def test_signal_to_one_process_stops_all_and_they_go_on_to_the_bit(script, tmp_path):
    """Rank 1 hears it in step 3; the next logged step, 4, tells rank 0, and both end with a checkpoint."""
    (tmp_path / "signalled.py").write_text(SIGNALLED)
    whole, logs, two = script("2"), tmp_path / "logs", ["--standalone", "--nproc_per_node=2"]
    flags = script_flags(whole.parent / "chain", logs, log_every=2, save_every=0)
    finish([launch(two, flags, str(tmp_path / "signalled.py"))])  # exit code 0: torchrun shows no traceback
    folder = run_folder(logs)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000004"]
    assert '"status": "interrupted", "step": 4' in (folder / "metrics.jsonl").read_text()
    finish([launch(two, [*flags, "--resume"])])
    (train, val), (expected_train, expected_val) = metrics(logs), metrics(whole)
    assert train == {step: expected_train[step] for step in (2, 4, 6)} and val == expected_val
    one, other = (torch.load(run_folder(place) / "checkpoints/step_000006/state.pt", weights_only=True)["optimizer"]
                  for place in (logs, whole))
    assert max(difference(one["state"]["master"], other["state"]["master"]).values()) == 0


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted in /proc")
def test_process_group_is_gone_before_python_ends():
    """torch.compile loads modules whose functions keep the process group of that moment as a default argument. A group
    that outlives destroy_process_group leaves gloo's threads running, which at times abort a process that ends."""
    program = """if True:
        import os, torch, train_gpt
        train_gpt.start_processes("cpu")
        torch.distributed.all_reduce(torch.ones(3))
        import torch._dynamo
        torch.distributed.destroy_process_group()
        names = [open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task")]
        left = [name for name in names if "gloo" in name]
        print("left:", left, flush=True)
        os._exit(0)"""
    place = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    result = subprocess.run([sys.executable, "-c", program], env=os.environ | place, cwd=Path(tg.__file__).parent,
                            text=True, capture_output=True, timeout=60)
    assert "left: []" in result.stdout, result.stdout + result.stderr
