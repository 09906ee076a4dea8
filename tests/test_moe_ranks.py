"""train_moe.py on one rank against several, resumed against uninterrupted runs, and the routers' reports of both."""
from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_state, load_state, losses, records, run_folder, steps_saved, tiny
from moe_ranks import EXPERTS, MIXTURES, all_scenarios, script_runs, training_scenario
from ranks import difference, run_ranks

import train_moe as tm

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
                                reason="torch was built without gloo")
ROUNDING = 2e-4  # of fp32 sums in another order, after 4 steps that orthogonalize
TWO_ROUTERS = ("noisy_topk", "sigmoid_bias")


# --- spawned ranks on random batches


@pytest.fixture(scope="module")
def scenarios(tmp_path_factory):
    """Number of ranks -> what all_scenarios returned on each; made when first asked for."""
    folder, results = tmp_path_factory.mktemp("ranks"), {}

    def get(size: int) -> list[dict]:
        if size not in results:
            one = size == 1
            results[size] = ([{router: training_scenario(tm.World(), router) for router in TWO_ROUTERS}] if one else
                             run_ranks(all_scenarios, size, folder, TWO_ROUTERS))
        return results[size]

    return get


@pytest.fixture(scope="module")
def trained(scenarios):
    return lambda size, router: [result[router] for result in scenarios(size)]


@needs_gloo
@pytest.mark.parametrize("router", TWO_ROUTERS)
@pytest.mark.parametrize("size", [2, 4])
def test_ranks_train_as_one(trained, size, router):
    """Losses, weights, bias, slopes and sums over all tokens of 4 steps, split into other micro-steps, too."""
    (one,), many = trained(1, router), trained(size, router)
    summed = [sum(values) for values in zip(*(r["losses"] for r in many), strict=True)]
    assert summed == pytest.approx(one["losses"], rel=1e-5)
    for result in many:
        assert max(difference(one["weights"], result["weights"]).values()) < ROUNDING
        for key in ("bias", "slopes", "sums"):
            for expected, found in zip(one[key], result[key], strict=True):
                torch.testing.assert_close(found, expected, rtol=ROUNDING, atol=1e-5)
    assert all(r["digests"] == many[0]["digests"] for r in many) and len(set(many[0]["digests"])) == 4
    assert one["bias"][-1].any() == (router == "sigmoid_bias") and one["slopes"][-1].any()


@needs_gloo
@pytest.mark.parametrize("router", TWO_ROUTERS)
@pytest.mark.parametrize("size", [2, 4])
def test_state_and_report_do_not_depend_on_the_ranks(trained, size, router):
    (one,), (first, *others) = trained(1, router), trained(size, router)
    for key, tensors in one["state"]["state"].items():
        assert max(difference(tensors, first["state"]["state"][key]).values()) < 10 * ROUNDING, key
    for other in others:
        assert other["report"] == first["report"]
        assert not any(other["state"]["state"].values())  # rank 0 writes the checkpoint
    assert first["report"].keys() == one["report"].keys()
    for key, values in one["report"].items():
        np.testing.assert_allclose(first["report"][key], values, rtol=1e-3, atol=1e-5, err_msg=key)


@needs_gloo
@pytest.mark.parametrize("size", [1, 2, 4])
def test_counts_are_those_of_all_tokens_by_one_reduction_a_step(trained, size):
    for result in trained(size, "sigmoid_bias"):
        assert result["reductions_of_sums"] == (4 if size > 1 else 0)
        for sums in result["sums"]:
            chosen = tm.named_sums(sums, EXPERTS)["chosen"]
            assert chosen.sum(-1).tolist() == pytest.approx([2.0] * MIXTURES) and chosen.min() > 0
            assert (chosen * 192 - (chosen * 192).round()).abs().max() < 1e-2  # 192 tokens a step


@needs_gloo
@pytest.mark.parametrize("size", [2, 4])
def test_an_expert_is_idle_only_if_no_rank_sent_it_a_token(scenarios, size):
    idle = {(f"blocks.{layer}.mlp.experts_{kind}", e) for layer, e in ((0, 1), (2, 4)) for kind in ("up", "down")}
    assert scenarios(size)[0]["idle"] == {"master": idle, "momentum": idle, "variance": idle}


# --- whole runs

MOE = dict(num_experts=4, top_k=2, batch_tokens=256, micro_tokens=64, router_every=2, save_every=3, keep=9,
           importance_coef=0.5, load_coef=0.5)


def moe_flags(folder: Path, router: str, **changes) -> list[str]:
    """Flags of a run of 8 steps of 4 micro-steps, with checkpoints of steps 3, 6 and 8."""
    given = MOE | {"router": router} | changes
    unread = set() if router == "noisy_topk" else {"importance_coef", "load_coef"}
    return tiny(folder, **{name: value for name, value in given.items() if name not in unread})


def router_events(folder: Path) -> dict[int, dict]:
    """Step -> the routers' report; where a step was run twice both must agree to the bit."""
    found: dict[int, dict] = {}
    for record in records(folder):
        if record.get("event") == "routers":
            assert found.setdefault(record["step"], record) == record
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Router -> folder of an uninterrupted run."""
    done = {}

    def get(router: str) -> Path:
        if router not in done:
            base = tmp_path_factory.mktemp("whole")
            assert tm.main(moe_flags(base, router)) == 0
            done[router] = run_folder(base)
        return done[router]

    return get


def killed(folder: Path, monkeypatch, router: str, in_step: int) -> Path:
    """A run that ends after some micro-steps of a step, as by kill -9: the checkpoint that its end wrote is removed."""
    def add(self, *args, calls=[], real=tm.Balance.add):  # noqa: B006 - counts over the run
        calls.append(1)
        if len(calls) == 4 * (in_step - 1) + 3:
            raise KeyboardInterrupt
        return real(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(tm.Balance, "add", add)
        assert tm.main(moe_flags(folder, router)) == 130
    shutil.rmtree(run_folder(folder) / "checkpoints" / f"step_{in_step - 1:06d}")
    return run_folder(folder)


@pytest.mark.parametrize("router", TWO_ROUTERS)
def test_resumed_run_continues_to_the_bit(router, tmp_path, monkeypatch, whole):
    """Killed in step 6 between its reports of steps 4 and 6; the checkpoint is that of step 3. Noise, slopes and bias
    go on, and so do the sums of the report of steps 3 and 4, of which half were taken before the checkpoint."""
    folder = killed(tmp_path, monkeypatch, router, in_step=6)
    assert steps_saved(folder) == [3] and max(router_events(folder)) == 4
    assert tm.main([*moe_flags(tmp_path, router), "--resume"]) == 0
    expected = whole(router)
    assert losses(folder) == losses(expected) and len(set(losses(folder)["train_loss"].values())) == 8
    assert router_events(folder) == router_events(expected) and set(router_events(folder)) == {2, 4, 6, 8}
    for step in (6, 8):
        assert_same_state(load_state(folder, step), load_state(expected, step))
    saved = load_state(expected, 3)
    assert saved["/optimizer/balance/report_steps"] == 1 and saved["/optimizer/balance/report_sums"].any()
    assert saved["/optimizer/balance/slopes"].any()
    assert saved["/optimizer/balance/bias"].any() == (router == "sigmoid_bias")


def test_a_stop_between_reports_shifts_none_of_them(tmp_path, monkeypatch):
    """SIGINT after step 5 has a console line of its own; the report of steps 4 to 6 still comes with step 6."""
    given = dict(router="noisy_topk", log_every=3, router_every=2, save_every=0)
    assert tm.main(moe_flags(tmp_path / "whole", **given)) == 0
    with monkeypatch.context() as patch:
        step = tm.MuonAdamW.step
        patch.setattr(tm.MuonAdamW, "step", lambda self, *args: (
            step(self, *args), self.steps == 5 and signal.raise_signal(signal.SIGINT)))
        assert tm.main(moe_flags(tmp_path / "stopped", **given)) == 130
    assert tm.main([*moe_flags(tmp_path / "stopped", **given), "--resume"]) == 0
    expected, found = (router_events(run_folder(tmp_path / name)) for name in ("whole", "stopped"))
    assert list(expected) == [3, 6, 8] and expected.items() <= found.items()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory, whole):
    """Router -> folders of a run of 2 ranks, and of one of 1 rank that 2 have continued from its checkpoint of step 3,
    in the middle of a report."""
    base, found, command_lines = tmp_path_factory.mktemp("two"), {}, []
    for router in TWO_ROUTERS:
        new, old, one = base / router / "new", base / router / "old", whole(router)
        shutil.copytree(one, old / "logs" / "x" / one.name)
        for step in (6, 8):
            shutil.rmtree(run_folder(old) / "checkpoints" / f"step_{step:06d}")
        metrics = run_folder(old) / "metrics.jsonl"
        early = [line for line in metrics.read_text().splitlines() if json.loads(line).get("step", 9) <= 3]
        metrics.write_text("\n".join(early) + "\n")
        command_lines += [moe_flags(folder, router, data=one.parents[2] / "data") for folder in (new, old)]
        command_lines[-1].append("--resume")
        found[router] = new, old
    assert run_ranks(script_runs, 2, base, command_lines) == [["done"] * 4] * 2
    return {router: [run_folder(folder) for folder in folders] for router, folders in found.items()}


@needs_gloo
@pytest.mark.parametrize("router", TWO_ROUTERS)
def test_runs_of_two_ranks_report_what_one_reports(router, whole, two_ranks):
    expected = whole(router)
    for folder in two_ranks[router]:
        for key, values in losses(expected).items():
            assert losses(folder)[key] == pytest.approx(values, rel=1e-4)
        reports, wanted = router_events(folder), router_events(expected)
        assert list(reports) == list(wanted) == [2, 4, 6, 8]
        for step, report in wanted.items():
            assert reports[step].keys() == report.keys() and len(report["load"]) == 2
            for key, values in report.items():
                if key not in ("event", "dead"):
                    np.testing.assert_allclose(reports[step][key], values, rtol=2e-3, atol=1e-4, err_msg=key)
        one, two = load_state(expected, 8), load_state(folder, 8)
        for name in ("/optimizer/balance/bias", "/optimizer/balance/slopes"):
            torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-4)


def test_reports_come_every_so_many_steps_and_at_the_end(tmp_path, monkeypatch):
    """Each of the steps since the last one; nothing is made of the sums on the steps between."""
    made, report = [], tm.Balance.report
    monkeypatch.setattr(tm.Balance, "report", lambda self: (made.append(self.report_steps), report(self))[1])
    assert tm.main(moe_flags(tmp_path, "sigmoid_bias", router_every=3, iterations=7, save_every=0)) == 0
    assert list(router_events(run_folder(tmp_path))) == [3, 6, 7] and made == [3, 3, 1]
    for report in router_events(run_folder(tmp_path)).values():
        assert np.sum(report["load"], axis=1).tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("router, changes", [("noisy_topk", {}), ("sigmoid_bias", {"bias_rate": 0.1})])
def test_validation_loss_is_the_cross_entropy_alone_without_noise(router, changes, tmp_path):
    """By hand from the weights and the bias of the last checkpoint. With noise, or without the bias, it is another."""
    argv = moe_flags(tmp_path, router, muon_lr=0.2, **changes)
    assert tm.main(argv) == 0
    s, folder = tm.parse_settings(argv, 1)[0], run_folder(tmp_path)
    model, state = tm.GPT(s, 64), load_state(folder, 8)
    for name, p in model.named_parameters():
        p.data.copy_(state[f"/optimizer/state/master/{name}"])
    stream = tm.ValStream(tm.open_corpus(s.data), s.eval_tokens, s.eval_seq_len)
    inputs, targets, docs = torch.from_numpy(stream.rows(0, stream.num_rows))

    @torch.no_grad()
    def loss(bias: torch.Tensor, *noise: torch.Tensor) -> float:
        model.router_bias.copy_(bias)
        logits = model.head(model.trunk(inputs, docs, torch.tensor(32, dtype=torch.int32), None, *noise))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten().long(), ignore_index=tm.IGNORE).item()

    bias, (rows, seq_len) = state["/optimizer/balance/bias"], inputs.shape
    assert losses(folder)["val_loss"][8] == pytest.approx(loss(bias), rel=1e-6)
    other = loss(bias, torch.randn(rows, 2, seq_len, 4)) if router == "noisy_topk" else loss(torch.zeros_like(bias))
    assert abs(other - loss(bias)) > 5e-5  # ten times what the line above allows


@pytest.mark.parametrize("router", TWO_ROUTERS)
def test_evaluation_does_not_change_training(router, tmp_path, whole):
    assert tm.main(moe_flags(tmp_path, router, eval_every=1)) == 0
    folder, expected = run_folder(tmp_path), whole(router)
    assert len(losses(folder)["val_loss"]) == 8
    assert losses(folder)["train_loss"] == losses(expected)["train_loss"]
    assert router_events(folder) == router_events(expected)
    assert_same_state(load_state(folder, 8), load_state(expected, 8))


# --- warm-up


@pytest.mark.parametrize("router", TWO_ROUTERS)
def test_warm_up_leaves_everything_as_it_was(router, tmp_path, monkeypatch):
    """Compiled for tracing only, with no C++ compiler needed: whole graphs of model, banks and balance."""
    compile_traced, seen = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_traced(f, backend="eager", **options))
    monkeypatch.setattr(tm, "run_errors", lambda *_: [])
    update = tm.Balance.update
    monkeypatch.setattr(tm.Balance, "update", lambda self, step: (update(self, step), seen.append(
        (self.slopes.clone(), self.bias.clone(), self.report_sums.clone())))[0])
    states = []

    def start(run, optimizer):
        balance = optimizer.balance
        states.append({**{f"weights/{n}": p.detach() for bank in optimizer.banks for n, p in bank.params.items()},
                       **{f"master/{n}": t for n, t in optimizer.state_dict()["state"]["master"].items()},
                       **{n: getattr(balance, n).clone() for n in ("sums", "bias", "slopes", "report_sums")},
                       "report_steps": torch.tensor(balance.report_steps), "steps": torch.tensor(optimizer.steps)})
        raise KeyboardInterrupt

    monkeypatch.setattr(tm.Run, "start", start)
    for compiled in (False, True):
        assert tm.main(moe_flags(tmp_path / str(compiled), router, compile=compiled)) == 130
    assert_same_state(*states)
    (slopes, bias, sums), = seen  # one warm step, which did leave traces before they were cleared
    assert sums.any() and (bias.any() if router == "sigmoid_bias" else not torch.equal(slopes, states[0]["slopes"]))
