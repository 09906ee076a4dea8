"""The tail average: closed form on ramps, norms, time constants of its own for each group, validation, and the end of a
run: at its last step, or earlier at --target-loss."""
import contextlib
import itertools
import re
from fractions import Fraction

import pytest
import torch
from helpers import (
    assert_same_state,
    flatten_state,
    load_state,
    losses,
    make_data,
    records,
    run_folder,
    steps_saved,
    tiny,
)
from ranks import build, train
from recipe import assert_same_optimizer, assert_same_tensors, problems, tiny_settings

import train_gpt

ITERATIONS, STEPS, SHARE = 24, 6, 0.65  # the average begins with step 24 - 2 * 6 = 12; that of the MLPs with step 18
PARTS = {  # time constant / --tail-steps
    r"blocks\.\d+\.mlp\..*": Fraction(1, 2), r"gates|scalars|smear|pointer\.small|ngrams\.(weight|table)": 0, ".*": 1}


def share_of(name: str):
    return next(share for pattern, share in PARTS.items() if re.fullmatch(pattern, name))


def norms(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Frobenius norms: of each matrix of attention and MLP, or of the whole tensor."""
    return weight.norm(dim=(-2, -1), keepdim=True) if name.startswith("blocks") else weight.norm()


def blended(name: str, weight: torch.Tensor, average: torch.Tensor, share: float) -> torch.Tensor:
    """The plain formula: towards the average, at the norm of the weights."""
    mixed = (1 - share) * weight + share * average
    return mixed * (norms(name, weight) / norms(name, mixed))


class Ramp:
    """An optimizer whose weights are what the test says: steps at a rate of 0 with gradients of zero."""

    def __init__(self, iterations: int = ITERATIONS, **changes):
        changes = {"tail": SHARE, "tail_steps": STEPS, "pointer": 8} | changes
        self.s = tiny_settings(iterations=iterations, **changes)
        self.model, self.optimizer = build(self.s)
        random = torch.Generator().manual_seed(0)
        self.start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.slope = {name: torch.randn(p.shape, generator=random) for name, p in self.start.items()}

    def at(self, name: str, step: float) -> torch.Tensor:
        return self.start[name] + 0.01 * step * self.slope[name]

    def run(self, steps: range):
        for step in steps:
            saved = self.optimizer.state_dict()
            saved["state"] |= {"master": {name: self.at(name, step) for name in self.start}, "raw": {}}
            self.optimizer.load_state_dict(saved)
            sum((0 * p).sum() for p in self.model.parameters()).backward()
            self.optimizer.step(0.0, 0.9)

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def final(self) -> dict[str, torch.Tensor]:
        """The weights that count now."""
        with self.optimizer.blended():
            return self.weights()


def lag(steps: float, count: int) -> float:
    """Steps by which the average of the last `count` steps is behind a ramp: (t - 1) (1 - (1 - 1/t)^(count - 1))."""
    return (steps - 1) * (1 - (1 - 1 / steps) ** (count - 1))


def test_the_average_of_a_ramp_has_a_closed_form():
    ramp = Ramp()
    ramp.run(range(1, ITERATIONS + 1))
    for name, weight in ramp.final().items():
        steps, last = float(share_of(name) * STEPS), ramp.at(name, ITERATIONS)
        expected = last
        if steps:
            behind = lag(steps, round(2 * steps) + 1)
            assert 0.8 * (steps - 1) < behind < steps - 1
            expected = blended(name, last, ramp.at(name, ITERATIONS - behind), SHARE)
            assert not torch.allclose(expected, last, rtol=0.01)
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("steps", [7, 12, 13, 14, 18, 19, 23])
def test_during_the_tail_the_model_sees_the_blend_and_gets_its_bits_back(steps):
    ramp = Ramp()
    ramp.run(range(1, steps + 1))
    before, state = ramp.weights(), flatten_state(ramp.optimizer.state_dict())
    with ramp.optimizer.blended():
        seen = ramp.weights()
    after = ramp.weights()
    for name, weight in before.items():
        assert torch.equal(after[name], weight)
        constant = float(share_of(name) * STEPS)
        count = steps - (ITERATIONS - round(2 * constant)) + 1
        if not constant or count <= 0:
            assert torch.equal(seen[name], weight), name
        else:
            average = ramp.at(name, steps - lag(constant, count))
            torch.testing.assert_close(seen[name], blended(name, weight, average, SHARE), rtol=1e-5, atol=1e-6)
            assert count == 1 or not torch.equal(seen[name], weight), name
    assert_same_tensors(flatten_state(ramp.optimizer.state_dict()), state)


def test_an_error_in_the_validation_gives_the_weights_back_too():
    ramp = Ramp()
    ramp.run(range(1, ITERATIONS))
    before = ramp.weights()
    with pytest.raises(KeyboardInterrupt), ramp.optimizer.blended():
        raise KeyboardInterrupt
    assert all(torch.equal(weight, before[name]) for name, weight in ramp.weights().items())


def test_the_blend_is_not_blended_again():
    ramp = Ramp()
    ramp.run(range(1, ITERATIONS + 1))
    before, first, second = ramp.weights(), ramp.final(), ramp.final()
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
    assert all(torch.equal(weight, before[name]) for name, weight in ramp.weights().items())


def test_a_checkpoint_has_the_weights_that_count_and_those_of_training():
    ramp = Ramp()
    ramp.run(range(1, ITERATIONS - 8))
    weights, final, saved = ramp.weights(), ramp.final(), ramp.optimizer.state_dict()["state"]
    assert all(torch.equal(weight, final[name]) for name, weight in saved["master"].items())
    assert all(torch.equal(weight, weights[name]) for name, weight in (saved["master"] | saved["raw"]).items())
    assert saved["raw"].keys() == {name for name in weights if share_of(name) == 1}  # that of the MLPs begins later


@pytest.mark.parametrize("tail", [0.3, 1.0])
def test_norms_stay_and_constants_too(tail):
    """Weights at random places in each step: their mean is shorter. Those that do not move are their own average."""
    ramp = Ramp(tail=tail, seed=3)
    random = torch.Generator().manual_seed(1)
    still = {"embed.weight", "blocks.0.mlp.up", "blocks.1.attn.qkvo"}
    ramp.at = lambda name, step: ramp.start[name] if name in still else torch.randn(
        ramp.start[name].shape, generator=random)
    ramp.run(range(1, ITERATIONS + 1))
    before = ramp.weights()
    for name, weight in ramp.final().items():
        torch.testing.assert_close(norms(name, weight), norms(name, before[name]), rtol=1e-5, atol=1e-6)
        if name in still:
            torch.testing.assert_close(weight, ramp.start[name], rtol=1e-5, atol=1e-7)
        elif share_of(name):
            assert (weight - before[name]).norm() > 0.2 * tail * before[name].norm(), name


def test_weights_of_zero_stay_finite():
    ramp = Ramp()
    ramp.start = {name: 0 * weight for name, weight in ramp.start.items()}
    ramp.slope = ramp.start
    ramp.run(range(1, ITERATIONS + 1))
    assert not any(weight.any() for weight in ramp.final().values())


def test_a_tail_longer_than_the_run_begins_with_its_first_step():
    ramp = Ramp(iterations=5, tail_steps=100)
    ramp.run(range(1, 6))
    name, last = "embed.weight", ramp.at("embed.weight", 5)
    expected = blended(name, last, ramp.at(name, 5 - lag(100.0, 5)), SHARE)
    torch.testing.assert_close(ramp.final()[name], expected, rtol=1e-5, atol=1e-6)


def test_without_a_tail_there_is_no_average_and_the_training_is_the_same():
    """To the bit, up to the last step: the average only looks on."""
    results = []
    for tail in (0.0, 0.6):
        s = tiny_settings(tail=tail, tail_steps=2, iterations=8)
        model, optimizer = build(s)
        losses = train(model, optimizer, range(6))
        with optimizer.blended():
            pass
        losses += train(model, optimizer, range(6, 8))
        results.append((losses, optimizer.state_dict()["state"]))
    (one, plain), (other, averaged) = results
    assert one == other and averaged.keys() - plain.keys() == {"average", "raw"}
    averaged["master"] |= averaged["raw"]
    assert_same_tensors(*(flatten_state({key: state[key] for key in plain}) for state in (averaged, plain)))


def test_resuming_inside_the_tail_is_exact():
    s = tiny_settings(tail=0.6, tail_steps=2, iterations=8)
    model, optimizer = build(s)
    train(model, optimizer, range(6))
    saved = optimizer.state_dict()
    other, resumed = build(s, seed=5)
    resumed.load_state_dict(saved)
    for one_model, one in ((model, optimizer), (other, resumed)):
        train(one_model, one, range(6, 8))
    assert_same_optimizer(resumed, optimizer)


@pytest.mark.parametrize("argv, told", [
    ("--tail 1.5", "--tail 1.5: must be 0 to 1"), ("--tail -0.1", "--tail -0.1: must be 0 to 1"),
    ("--tail 0 --tail-steps 5", "--tail_steps: has no effect without --tail"),
    ("--tail 0.5 --tail-steps 0", "--tail_steps 0: must be >0"),
], ids=lambda x: x)
def test_bad_settings_are_told_in_a_sentence(argv, told):
    (sentence,) = problems(*argv.split())
    assert told in sentence and len(sentence) < 200


# --- whole runs


def spied(monkeypatch) -> list[dict]:
    """What evaluations from now on see: the weights of the model, in order."""
    seen, evaluate = [], train_gpt.evaluate

    def spy(model, *arguments, **more):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return evaluate(model, *arguments, **more)
    monkeypatch.setattr(train_gpt, "evaluate", spy)
    return seen


def saved_parts(folder, step: int) -> list[dict]:
    """Weights that count, weights of training, and averages of a checkpoint."""
    path = folder / "checkpoints" / f"step_{step:06d}" / "state.pt"
    state = torch.load(path, weights_only=True)["optimizer"]["state"]
    return [state["master"], state["master"] | state.get("raw", {}), state["average"]]


def test_a_run_validates_saves_and_ends_with_the_blend(tmp_path, monkeypatch):
    seen = spied(monkeypatch)
    assert train_gpt.main(tiny(tmp_path, tail=0.6, tail_steps=2, eval_every=1, save_every=1, keep=9)) == 0
    folder = run_folder(tmp_path)
    assert steps_saved(folder) == list(range(1, 9)) and len(seen) == 8
    for step in range(1, 9):
        final, weights, averages = saved_parts(folder, step)
        assert all(torch.equal(weight, seen[step - 1][name]) for name, weight in final.items())
        for name, weight in weights.items():
            in_tail = share_of(name) and step >= 8 - round(2 * 2 * share_of(name))
            expected = blended(name, weight, averages[name], 0.6) if in_tail else weight
            torch.testing.assert_close(final[name], expected, rtol=1e-5, atol=1e-7)
    with monkeypatch.context() as patch:  # the same run without the blend
        patch.setattr(train_gpt.MuonAdamW, "blended", lambda self: contextlib.nullcontext())
        assert train_gpt.main(tiny(tmp_path, tail=0.6, tail_steps=2, experiment_name="raw")) == 0
    raw, *_ = saved_parts(run_folder(tmp_path, "raw"), 8)
    assert all(torch.equal(weight, raw[name]) for name, weight in weights.items())
    assert any(not torch.equal(weight, final[name]) for name, weight in raw.items())


def test_looking_at_the_blend_does_not_change_the_run(tmp_path):
    for name, every in (("often", 1), ("never", 0)):
        changes = dict(tail=0.6, tail_steps=2, eval_every=every, experiment_name=name)
        assert train_gpt.main(tiny(tmp_path, **changes)) == 0
    often, never = (run_folder(tmp_path, name) for name in ("often", "never"))
    assert losses(often)["train_loss"] == losses(never)["train_loss"]
    assert losses(often)["val_loss"][8] == losses(never)["val_loss"][8]
    assert_same_state(load_state(often, 8), load_state(never, 8))


def test_training_losses_are_those_without_a_tail(tmp_path):
    for name, tail in (("off", 0), ("on", 0.6)):
        more = {"tail": tail} | ({"tail_steps": 2} if tail else {})
        assert train_gpt.main(tiny(tmp_path, eval_every=1, experiment_name=name, **more)) == 0
    off, on = (losses(run_folder(tmp_path, name)) for name in ("off", "on"))
    assert off["train_loss"] == on["train_loss"]
    same = [off["val_loss"][step] == on["val_loss"][step] for step in range(1, 9)]
    assert same == [True] * 4 + [False] * 4  # after step 4 the average is the weights themselves


@pytest.mark.parametrize("save_every", [0, 1, 3])
def test_a_run_that_reaches_its_target_ends_with_the_blend(save_every, tmp_path, monkeypatch):
    """Step 6 is the first that is looked at. Whether a checkpoint of it was written before or not: the last one holds
    the weights whose loss is the result."""
    seen = spied(monkeypatch)
    changes = dict(tail=0.6, tail_steps=2, eval_every=6, target_loss=100.0, save_every=save_every)
    assert train_gpt.main(tiny(tmp_path, **changes)) == 0
    folder = run_folder(tmp_path)
    assert steps_saved(folder)[-1] == 6 and records(folder)[-1]["status"] == "target" and len(seen) == 1
    final, weights, _ = saved_parts(folder, 6)
    assert all(torch.equal(weight, seen[0][name]) for name, weight in final.items())
    assert any(not torch.equal(final[name], weight) for name, weight in weights.items())


def test_shapes_of_all_models_have_a_rule(tmp_path):
    """Each parameter of a model with all parts is averaged as PARTS says."""
    make_data(tmp_path / "data")
    s = tiny_settings(tail=0.5, pointer=8, ngram_rows=64)
    model, optimizer = build(s)
    averaged = optimizer.state_dict()["state"]["average"].keys()
    assert averaged == {name for name, _ in model.named_parameters() if share_of(name)}
    assert {*itertools.chain(averaged)} >= {"pointer.qk", "lm_head", "embed.weight", "blocks.0.attn.qkvo"}


def test_a_signal_while_weights_are_blended_leaves_those_of_training(monkeypatch):
    """`Run.look` raises InterruptedError wherever an evaluation is, its blending included; then comes a checkpoint."""
    ramp, calls, blend = Ramp(), itertools.count(), train_gpt.Bank.blend
    ramp.run(range(ITERATIONS))
    before = ramp.optimizer.state_dict()

    def broken(bank):
        if next(calls) == 1:
            raise InterruptedError
        blend(bank)

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(train_gpt.Bank, "blend", broken)
        ramp.final()
    assert next(calls) == 2
    assert_same_state(flatten_state(ramp.optimizer.state_dict()), flatten_state(before))
