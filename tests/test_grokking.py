"""train_grokking.py: the equations, the model and its shortcuts, the updates, and runs that are resumed to the bit."""
import dataclasses
import json
import signal

import pytest
import torch
from helpers import flags
from torch import nn

import train_grokking
from train_grokking import FIRST_NUMBER, OPERATIONS, Config, UserError, parse_settings

# A model that trains a step in milliseconds.
TINY = dict(prime=11, layers=2, width=16, heads=2, batch_size=16, iterations=24, eval_every=8, save_every=1, threads=1,
            device="cpu", dtype="fp32", compile=False, plot=False)


@pytest.fixture(autouse=True)
def handlers():
    """A run leaves its handlers of signals behind."""
    old = {number: signal.getsignal(number) for number in train_grokking.STOPS}
    yield
    for number, handler in old.items():
        signal.signal(number, handler)


def settings(**changes) -> Config:
    return Config(**{**TINY, **changes})


def argv(tmp_path, **changes) -> list[str]:
    return flags(**{"log_dir": tmp_path / "logs", "experiment_name": "x", **TINY, **changes})


def train(tmp_path, **changes) -> dict:
    """A run in this process; its metrics.json."""
    assert train_grokking.main(argv(tmp_path, **changes)) == 0
    return result(tmp_path)


def result(tmp_path) -> dict:
    (path,) = tmp_path.glob("logs/x/*/metrics.json")
    return json.loads(path.read_text())


def saved(tmp_path, name: str = "ckpt.pt") -> dict:
    (path,) = tmp_path.glob(f"logs/x/*/{name}")
    return torch.load(path, weights_only=True)


# --- data


BY_HAND = {
    "+": lambda a, b, p: (a + b) % p, "-": lambda a, b, p: (a - b) % p, "*": lambda a, b, p: a * b % p,
    "/": lambda a, b, p: a * pow(b, -1, p) % p, "x2y2": lambda a, b, p: (a * a + b * b) % p,
    "x2xyy2": lambda a, b, p: (a * a + a * b + b * b) % p, "x2xyy2x": lambda a, b, p: (a * a + a * b + b * b + a) % p,
    "x3xy": lambda a, b, p: (a * a * a + a * b) % p, "x3xy2y": lambda a, b, p: (a * a * a + a * b * b + b) % p,
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("prime", [2, 13, 97])
def test_the_equations_are_all_there_are_once_each(operation, prime):
    train, val = train_grokking.make_equations(settings(prime=prime, operation=operation, train_fraction=0.5))
    count = prime * (prime - (operation == "/"))
    assert (len(train), len(val)) == (count // 2, count - count // 2)
    columns = range(1 if operation == "/" else 0, prime)
    expected = [(a, b, BY_HAND[operation](a, b, prime)) for a in range(prime) for b in columns]
    assert sorted(map(tuple, torch.cat([train, val]).tolist())) == expected


def test_division_modulo_223_has_the_published_sizes():
    train, val = train_grokking.make_equations(settings(prime=223))
    assert len(train) == len(val) == 24753
    a, b, c = torch.cat([train, val]).unbind(dim=1)
    assert torch.equal(c * b % 223, a) and int(b.min()) == 1 and int(c.max()) == 222


def test_the_split_follows_from_the_seed_and_the_fraction():
    one, same, other = (train_grokking.make_equations(settings(prime=31, seed=seed))[0] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(train_grokking.make_equations(settings(prime=31, train_fraction=0.3))[0]) == 279


def test_every_epoch_has_each_equation_at_most_once_in_another_order():
    s, epochs = settings(batch_size=16), []
    for epoch in range(2):
        places = [train_grokking.batch_at(s, 55, 3 * epoch + i) for i in range(3)]
        epochs.append(torch.cat([order[start:start + 16] for order, start in places]).tolist())
        assert len(set(epochs[-1])) == 48 and set(epochs[-1]) <= set(range(55))
    assert epochs[0] != epochs[1]
    train_grokking.epoch_order.cache_clear()
    order, start = train_grokking.batch_at(s, 55, 4)  # a resumed run begins there
    assert order[start:start + 16].tolist() == epochs[1][16:32]
    assert [int(train_grokking.batch_at(s, 10, step)[1]) for step in range(3)] == [0, 0, 0]  # all ten, each time


# --- model


def modules(s: Config, w: dict) -> tuple[nn.Module, nn.Module, nn.Module]:
    """torch's own post-norm encoder with these weights, LayerNorm, head."""
    encoder = nn.ModuleList(nn.TransformerEncoderLayer(s.width, s.heads, s.mlp_ratio * s.width, 0.0, "gelu",
                                                       batch_first=True) for _ in range(s.layers))
    for i, layer in enumerate(encoder):
        attention, norms = layer.self_attn, (layer.norm1, layer.norm2)
        pairs = [(attention.in_proj_weight, w["attention"][i, :3].flatten(0, 1)),
                 (attention.in_proj_bias, w["attention_bias"][i, :3].flatten()),
                 (attention.out_proj.weight, w["attention"][i, 3]),
                 (attention.out_proj.bias, w["attention_bias"][i, 3]),
                 (layer.linear1.weight, w["mlp"][i, 0]), (layer.linear1.bias, w["up_bias"][i]),
                 (layer.linear2.weight, w["mlp"][i, 1].T), (layer.linear2.bias, w["down_bias"][i])]
        pairs += [(norm.weight, w["norm"][i, j]) for j, norm in enumerate(norms)]
        pairs += [(norm.bias, w["norm_bias"][i, j]) for j, norm in enumerate(norms)]
        for parameter, value in pairs:
            parameter.data.copy_(value)
    last, head = nn.LayerNorm(s.width), nn.Linear(s.width, FIRST_NUMBER + s.prime)
    for module, name in ((last, "last_norm"), (head, "head")):
        module.weight.data.copy_(w[name])
        module.bias.data.copy_(w[f"{name}_bias"])
    return encoder, last, head


def random_weights(s: Config) -> dict:
    """Initial weights in which no bias is 0 and no gain is 1."""
    torch.manual_seed(1)
    return {name: w + 0.1 * torch.randn_like(w) for name, w in train_grokking.initial_weights(s).items()}


def equations(s: Config, count: int = 20) -> torch.Tensor:
    return train_grokking.make_equations(s)[0][:count]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_model_is_torchs_post_norm_encoder(layers):
    """Loss and gradients, too: nothing is missing from them, though the last layer computes one position only."""
    s = settings(operation="-", layers=layers)
    w, (a, b, c) = random_weights(s), equations(s).unbind(dim=1)
    encoder, last, head = modules(s, w)
    n = torch.ones_like(a)
    tokens = torch.stack([0 * n, FIRST_NUMBER + a, 3 * n, FIRST_NUMBER + b, n], dim=1)  # EOS a - b =
    table = w["embedding"].clone().requires_grad_()
    x = table[tokens] + w["position"]
    for layer in encoder:
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)
    expected = head(last(x[:, -1]))
    torch.testing.assert_close(train_grokking.logits(w, a, b, s), expected, rtol=1e-4, atol=1e-4)
    nn.functional.cross_entropy(expected, FIRST_NUMBER + c).backward()
    grads = torch.func.grad(lambda w: nn.functional.cross_entropy(train_grokking.logits(w, a, b, s),
                                                                  FIRST_NUMBER + c))(w)
    theirs = {"embedding": table.grad, "head": head.weight.grad, "last_norm": last.weight.grad}
    for i, layer in enumerate(encoder):
        attention = layer.self_attn
        torch.testing.assert_close(grads["attention"][i, :3].flatten(0, 1), attention.in_proj_weight.grad, rtol=1e-4,
                                   atol=1e-6)
        torch.testing.assert_close(grads["attention"][i, 3], attention.out_proj.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads["mlp"][i, 0], layer.linear1.weight.grad, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(grads["mlp"][i, 1].T, layer.linear2.weight.grad, rtol=1e-4, atol=1e-6)
    for name, grad in theirs.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-6)


def test_parameters_and_their_initial_sizes():
    w = train_grokking.initial_weights(Config())
    assert sum(z.numel() for z in w.values()) == 457578
    for part, bound in ((w["attention"][:, :3], (6 / 512) ** 0.5), (w["attention"][:, 3], 128**-0.5),
                        (w["mlp"][:, 0], 128**-0.5), (w["mlp"][:, 1], 512**-0.5), (w["head"], 128**-0.5)):
        assert 0.99 * bound < part.abs().max() <= bound and abs(part.std() / bound - 3**-0.5) < 0.01
    assert abs(w["embedding"].std() - 1) < 0.02 and not w["attention_bias"].any() and bool((w["norm"] == 1).all())


@pytest.mark.parametrize("rows", [16, 55, 1000])
def test_losses_and_accuracies_are_over_all_equations(rows, monkeypatch):
    s = settings()
    w, calls = random_weights(s), []
    monkeypatch.setattr(train_grokking, "EVAL_ROWS", rows)
    for some in train_grokking.make_equations(s):
        calls.clear()
        found = train_grokking.mean_scores(lambda *z: calls.append(z[1].shape) or train_grokking.score(*z), w, some, s)
        assert calls == [(min(rows, 55), 3)] * -(-55 // rows)  # equal shapes: one graph
        z, target = train_grokking.logits(w, some[:, 0], some[:, 1], s), FIRST_NUMBER + some[:, 2]
        loss, accuracy = nn.functional.cross_entropy(z, target), (z.argmax(1) == target).double().mean()
        assert found == pytest.approx([float(loss), float(accuracy)], rel=1e-5)


def test_bf16_products_leave_weights_and_logits_in_fp32():
    s = settings(dtype="bf16")
    w, (a, b, _) = random_weights(s), equations(s).unbind(dim=1)
    z, exact = (train_grokking.logits(w, a, b, dataclasses.replace(s, dtype=dtype)) for dtype in ("bf16", "fp32"))
    assert z.dtype == torch.float32 and 0 < float((z - exact).abs().max()) < 0.1


# --- optimizer


def steps_of(s: Config, count: int = 4) -> tuple[dict, dict, list[dict]]:
    """Weights before and after some updates by random gradients, and these."""
    w, before = random_weights(s), random_weights(s)
    moments, grads = train_grokking.initial_state(s)["moments"], []
    for step in range(count):
        torch.manual_seed(step)
        grads.append({name: torch.randn_like(z) for name, z in w.items()})
        train_grokking.update_weights(w, grads[-1], moments, train_grokking.step_numbers(s, step), s)
    return before, w, grads


def by_torch(optimizer: torch.optim.Optimizer, weights: list, grads: list[list], s: Config) -> list:
    """The weights after the same updates, warm-up included, by torch's optimizer."""
    peak = optimizer.param_groups[0]["lr"]
    for step, some in enumerate(grads):
        optimizer.param_groups[0]["lr"] = peak * float(train_grokking.step_numbers(s, step)[0])
        for z, grad in zip(weights, some, strict=True):
            z.grad = grad
        optimizer.step()
    return weights


def test_adamw_is_torchs_and_decays_everything():
    s = settings(warmup_steps=2, weight_decay=0.5)
    before, after, grads = steps_of(s)
    weights = [nn.Parameter(z) for z in before.values()]
    reference = torch.optim.AdamW(weights, lr=s.lr, betas=(0.9, 0.98), eps=1e-8, weight_decay=0.5)
    expected = by_torch(reference, weights, [list(some.values()) for some in grads], s)
    torch.testing.assert_close(list(after.values()), [z.data for z in expected], rtol=1e-5, atol=1e-6)


def test_muon_is_torchs_on_every_matrix_alone():
    s = settings(optimizer="muon", warmup_steps=2, muon_weight_decay=0.5, dtype="bf16")  # torch's works in bf16
    before, after, grads = steps_of(s)

    def matrices(w: dict) -> list[torch.Tensor]:
        """As a network of nn.Linear has them: Q, K, V, output, up, down of every layer."""
        return [z.clone() for i in range(s.layers) for z in [*w["attention"][i], w["mlp"][i, 0], w["mlp"][i, 1].T]]

    weights = [nn.Parameter(z) for z in matrices(before)]
    reference = torch.optim.Muon(weights, lr=s.muon_lr, weight_decay=0.5, momentum=0.95)
    expected = by_torch(reference, weights, [matrices(some) for some in grads], s)
    for got, z, start in zip(matrices(after), expected, matrices(before), strict=True):
        assert float((got - z.data).norm()) < 0.03 * float((z.data - start).norm())
    adamw = steps_of(settings(warmup_steps=2))[1]
    assert torch.equal(after["head"], adamw["head"]) and not torch.equal(after["mlp"], adamw["mlp"])


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 2, 64, 16), (2, 1, 16, 64)])
def test_orthogonalized_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    found = train_grokking.newton_schulz(torch.randn(shape), torch.float32)
    values = torch.linalg.svdvals(found)
    assert found.shape == shape and values.max() < 1.25 and values.median() > 0.65


# --- runs


def test_a_run_writes_what_it_promises(tmp_path, capsys):
    found = train(tmp_path, optimizer="muon", plot=True)
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("logs/x/*/*")} == {
        "log.txt", "metrics.json", "result.json", "curve.png", "ckpt.pt", "ckpt_best.pt", "lock"}
    assert [m["step"] for m in found["metrics"]] == [8, 16, 24] and found["total_steps"] == 24
    assert found["metrics"][0].keys() == {"step", "train_loss", "train_acc", "val_loss", "val_acc", "weight_norm", "lr",
                                          "time_s"}
    assert found["config"]["prime"] == 11 and found["status"] == "done"
    assert found["environment"].keys() >= {"torch", "platform", "device", "threads", "git"}
    assert found["milestones"].keys() == {"train_99", "val_50", "val_95", "val_99", "gap"}
    assert found["best_val_acc"] == max(m["val_acc"] for m in found["metrics"])
    assert found["train_time_s"] > 0 and found["eval_time_s"] > 0 and found["step_ms"] > 0
    assert "val_99: None" in printed and "evaluation" in printed and "55 equations for training" in printed
    (log,) = tmp_path.glob("logs/x/*/log.txt")
    assert log.read_text() == printed
    weights = saved(tmp_path)["weights"].values()
    assert found["metrics"][-1]["weight_norm"] == pytest.approx(float(torch.cat([w.flatten() for w in weights]).norm()))


def test_the_best_checkpoint_is_that_of_the_best_accuracy_and_then_loss(tmp_path):
    found = train(tmp_path, iterations=120, lr=0.01)
    best = max(found["metrics"], key=lambda m: (m["val_acc"], -m["val_loss"]))
    assert saved(tmp_path, "ckpt_best.pt")["step"] == best["step"] < saved(tmp_path)["step"] == 120


def test_training_learns_the_training_equations(tmp_path):
    found = train(tmp_path, optimizer="muon", iterations=150, eval_every=10)
    assert found["milestones"]["train_99"] in range(10, 151) and found["metrics"][-1]["train_loss"] < 0.8
    assert found["metrics"][0]["train_acc"] < 0.5


def compare(one: dict, other: dict):
    """Both checkpoints hold the same state, bit by bit."""
    assert one["step"] == other["step"]
    for m, n in zip(one["metrics"], other["metrics"], strict=True):
        assert {**m, "time_s": 0} == {**n, "time_s": 0}
    for part in ("weights", "exp_avg", "exp_avg_sq", "momentum"):
        mine, its = (z["weights"] if part == "weights" else z["moments"][part] for z in (one, other))
        assert mine.keys() == its.keys() and all(torch.equal(mine[name], its[name]) for name in mine), part


@pytest.mark.parametrize("optimizer, stop_after, number", [("adamw", 13, signal.SIGINT), ("muon", 16, signal.SIGTERM)])
def test_an_interrupted_and_resumed_run_is_the_uninterrupted_one(tmp_path, monkeypatch, optimizer, stop_after, number):
    train(tmp_path / "whole", optimizer=optimizer)
    step, done = train_grokking.train_step, []

    def interrupting(*arguments):
        done.append(1)
        if len(done) == stop_after:
            signal.raise_signal(number)
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grokking, "train_step", interrupting)
        assert train_grokking.main(argv(tmp_path / "parts", optimizer=optimizer)) == 128 + number
    assert result(tmp_path / "parts")["status"] == "interrupted" and saved(tmp_path / "parts")["step"] == stop_after
    train(tmp_path / "parts", optimizer=optimizer, resume="latest")
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert result(tmp_path / "parts")["status"] == "done"


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "whole", save_every=2)
    step, done = train_grokking.train_step, []

    def dying(*arguments):
        done.append(1)
        if len(done) == 22:
            raise GeneratorExit  # no Exception: nothing is saved
        return step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_grokking, "train_step", dying)
        pytest.raises(GeneratorExit, train_grokking.main, argv(tmp_path / "parts", save_every=2))
    assert [m["step"] for m in result(tmp_path / "parts")["metrics"]] == [8, 16]
    assert result(tmp_path / "parts")["status"] == "running"
    (folder,) = tmp_path.glob("parts/logs/x/*")
    train(tmp_path / "parts", save_every=2, resume=folder)
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


def test_more_iterations_continue_a_finished_run(tmp_path):
    train(tmp_path / "whole", iterations=32)
    train(tmp_path / "parts", iterations=16)
    (file,) = tmp_path.glob("parts/logs/x/*/ckpt.pt")
    assert train(tmp_path / "parts", iterations=32, resume=file)["total_steps"] == 32
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))


def test_a_run_that_diverges_stops_with_a_sentence(tmp_path, capsys):
    assert train_grokking.main(argv(tmp_path, lr=1e30)) == 1
    assert "not finite after step 8: stopped" in capsys.readouterr().err and result(tmp_path)["status"] == "nan"


def test_a_run_stops_a_tenth_after_the_accuracy_to_stop_at(tmp_path, monkeypatch):
    def scores(score, w, equations, s):
        seen.append(1)
        return [1.0, 1.0 if len(seen) % 2 else 0.99 if len(seen) >= 20 else 0.1]  # training, validation, training ..

    seen = []
    monkeypatch.setattr(train_grokking, "mean_scores", scores)
    found = train(tmp_path, iterations=40, eval_every=1)
    assert found["total_steps"] == 11 and found["status"] == "target"
    assert found["milestones"] == {"train_99": 1, "val_50": 10, "val_95": 10, "val_99": 10, "gap": 9}


def test_milestones_are_the_first_evaluations_that_reach_them():
    curve = [(10, 0.5, 0.1), (20, 0.99, 0.2), (30, 0.98, 0.6), (40, 1.0, 0.4), (50, 1.0, 0.95)]
    metrics = [{"step": step, "train_acc": train, "val_acc": val} for step, train, val in curve]
    found = train_grokking.milestones(metrics)
    assert found == {"train_99": 20, "val_50": 30, "val_95": 50, "val_99": None, "gap": None}
    found = train_grokking.milestones([*metrics, {"step": 8000, "train_acc": 1.0, "val_acc": 0.991}])
    assert (found["val_99"], found["gap"]) == (8000, 7980)


def test_the_step_and_the_evaluation_are_whole_graphs():
    """Traced as torch.compile does, with no break in the graph; without the C++ compiler's minute."""
    s = settings(optimizer="muon")
    train, val = train_grokking.make_equations(s)
    order, start = train_grokking.batch_at(s, len(train), 1)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", dynamic=False, fullgraph=True)):
        w = random_weights(s)
        moments = train_grokking.initial_state(s)["moments"]
        with torch.no_grad():
            for step in range(2):
                loss = wrap(train_grokking.train_step)(w, moments, train, order, start,
                                                       train_grokking.step_numbers(s, step), s)
            scores = train_grokking.mean_scores(wrap(train_grokking.score), w, val, s)
        results.append([float(loss), *scores, w["mlp"], w["embedding"]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_after_the_warm_up(tmp_path, monkeypatch):
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    def register(*arguments):  # the first that happens after the warm-up
        at_start.append(graphs())
        return real(*arguments)

    compiler, real, at_start = torch.compile, signal.signal, []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend="aot_eager", **options))
    monkeypatch.setattr(signal, "signal", register)
    monkeypatch.setattr(train_grokking.shutil, "which", lambda name: "/bin/g++")
    torch._dynamo.reset()  # of what other tests have compiled
    before = graphs()
    train(tmp_path, compile=True, save_every=1)
    assert at_start[:2] == [before + 2] * 2 and graphs() == before + 2


def test_compiled_training_needs_no_compiler_to_go_on(monkeypatch):
    monkeypatch.setattr(train_grokking.shutil, "which", lambda name: None)
    s, notes = parse_settings(["--device", "cpu"])
    assert not s.compile and any("no C++ compiler" in note for note in notes)


def test_a_run_without_the_drawing_tool_is_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(train_grokking.subprocess, "call", lambda command: 1)
    assert train(tmp_path, iterations=8, plot=True)["status"] == "done"
    assert not list(tmp_path.glob("logs/x/*/curve.png"))


def test_presets():
    nanugpt, power, quick = (parse_settings(["--preset", name])[0] for name in ("nanugpt", "power", "quick"))
    assert (nanugpt.prime, nanugpt.operation, nanugpt.train_fraction, nanugpt.batch_size) == (223, "/", 0.5, 512)
    assert (nanugpt.lr, nanugpt.beta1, nanugpt.beta2, nanugpt.weight_decay) == (1e-3, 0.9, 0.98, 0.1)
    assert nanugpt.warmup_steps == 10 and nanugpt.optimizer == "adamw" and parse_settings([])[0] == nanugpt
    assert (power.prime, power.weight_decay) == (97, 1.0)
    assert (quick.prime, quick.layers, quick.width, quick.optimizer) == (59, 1, 64, "muon")
    assert parse_settings(["--preset", "quick", "--width", "32"])[0].width == 32


# --- bad input


@pytest.fixture
def fails(capsys):
    """A function that runs the script and checks that it fails with one sentence that has all the words."""
    def check(argv, *words: str, lines: int = 1, code: int = 1):
        got = train_grokking.main([str(a) for a in argv])
        error = capsys.readouterr().err
        assert got == code and error.startswith("error: ") and error.count("\n") == lines and "Traceback" not in error
        assert [word for word in words if word not in error] == [], error
    return check


@pytest.mark.parametrize("changes, words", [
    (dict(prime=91), ["--prime 91:", "89, 97"]), (dict(prime=1), ["--prime 1:", "> 1"]),
    (dict(prime=-7), ["--prime -7", "> 1"]), (dict(operation="x^y"), ["--operation x^y", "x2xyy2", "*"]),
    (dict(train_fraction=0), ["--train_fraction 0.0", "> 0 and < 1"]),
    (dict(train_fraction=1), ["--train_fraction 1.0", "> 0 and < 1"]),
    (dict(train_fraction=0.001), ["--train_fraction 0.001", "no training or no validation equation of 110"]),
    (dict(heads=3), ["--width 16", "--heads 3"]), (dict(preset="huge"), ["--preset huge", "nanugpt or power or quick"]),
    (dict(beta2=1), ["--beta2 1.0", ">= 0 and < 1"]), (dict(muon_lr=0.1), ["--muon_lr", "--optimizer muon"]),
    (dict(eval_every=0), ["--eval_every 0", "> 0"]), (dict(lr="nan"), ["--lr nan"]), (dict(seed=2**63), ["--seed"]),
])
def test_settings_that_cannot_work(changes, words, tmp_path, fails):
    fails(argv(tmp_path, **changes), "1 setting(s) cannot work", *words, lines=2, code=2)
    assert not (tmp_path / "logs").exists()


def test_several_faults_are_told_at_once(tmp_path, fails):
    fails(argv(tmp_path, lr=-1, train_fraction=2, heads=0), "3 setting(s)", "--lr -1.0", "--train_fraction 2.0",
          "--heads 0", lines=4, code=2)
    fails(argv(tmp_path, prime=100, muon_lr=1, heads=5), "3 setting(s)", "97, 101", "--heads 5", "--muon_lr",
          lines=4, code=2)


def test_flags_that_do_not_exist_or_have_no_number(tmp_path, fails):
    fails(["--prim", "7"], "unknown --prim", "did you mean --prime?", code=2)
    fails(["--xyzzy", "--prim", "7"], "unknown --xyzzy: --help lists all flags, --prim: did you mean", code=2)
    fails(["--prime", "seven"], "--prime", "invalid int value", code=2)
    fails(["--prime"], "--prime", "expected one argument", code=2)


@pytest.mark.parametrize("flag, name", [("--max_iters", "iterations"), ("--max-steps", "iterations"),
                                        ("--eval_interval", "eval_every")])
def test_other_names_of_flags(flag, name):
    assert getattr(parse_settings([flag, "7"])[0], name) == 7


def test_a_resumed_run_has_no_result_until_its_end(tmp_path, monkeypatch):
    def gone(*given):
        raise KeyboardInterrupt
    train(tmp_path)
    assert list(tmp_path.rglob("result.json"))
    monkeypatch.setattr(train_grokking, "train_step", gone)
    with pytest.raises(KeyboardInterrupt):
        train_grokking.main([*argv(tmp_path, iterations=48), "--resume"])
    assert not list(tmp_path.rglob("result.json"))


def test_a_run_ends_with_its_result(tmp_path, capsys):
    assert train_grokking.main(argv(tmp_path)) == 0
    (folder,) = (path.parent for path in tmp_path.rglob("result.json"))
    said, out = json.loads((folder / "result.json").read_text()), capsys.readouterr().out
    assert out.split("\n---\n")[1].splitlines() == [
        f"{name}: {json.dumps(value)}".replace('"', "") for name, value in said.items()]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (said["status"], said["steps"], said["params"]) == ("done", metrics["total_steps"], metrics["parameters"])
    assert said["val_loss"] == metrics["metrics"][-1]["val_loss"] and said["total_seconds"] > said["training_seconds"]


def test_a_run_that_diverges_or_lacks_memory_says_so(tmp_path, monkeypatch):
    assert train_grokking.main(argv(tmp_path / "a", lr=1e30)) == 1
    def score(*given):
        raise MemoryError
    monkeypatch.setattr(train_grokking, "score", score)
    assert train_grokking.main(argv(tmp_path / "b")) == 1
    said = {path.parts[len(tmp_path.parts)]: json.loads(path.read_text()) for path in tmp_path.rglob("result.json")}
    assert (said["a"]["status"], said["b"]["status"], said["b"]["val_loss"]) == ("nan", "out_of_memory", None)


def test_resuming_nothing(tmp_path, fails):
    fails(argv(tmp_path, resume="latest"), "no whole checkpoint in", "leave --resume out")
    fails(argv(tmp_path, resume=tmp_path / "gone.pt"), "no whole checkpoint in", "gone.pt")


def test_resuming_with_other_settings_names_them(tmp_path, fails, capsys):
    train(tmp_path, iterations=8)
    capsys.readouterr()
    fails(argv(tmp_path, iterations=8, resume="latest", seed=3, weight_decay=0.2), "other settings",
          "--seed: 0 in the checkpoint, 3 now", "--weight_decay: 0.1 in the checkpoint, 0.2 now", lines=3)


def test_a_checkpoint_of_before_is_read_unless_its_optimizer_is_gone(tmp_path, fails, capsys):
    train(tmp_path, iterations=8)
    (file,) = tmp_path.glob("logs/x/*/ckpt.pt")
    old = torch.load(file, weights_only=True)
    for name in ("newton_schulz", "polar_express"):
        old["settings"] |= {"full": False, "orthogonalizer": name}
        torch.save(old, file)
        capsys.readouterr()
        if name == "newton_schulz":
            train(tmp_path, iterations=16, resume=file)
        else:
            fails(argv(tmp_path, resume=file), "--orthogonalizer: 'polar_express' in the checkpoint", lines=2)


def test_a_checkpoint_of_something_else_is_not_taken(tmp_path, fails):
    torch.save({"model": 1}, tmp_path / "ckpt.pt")
    fails(argv(tmp_path, resume=tmp_path), "no whole checkpoint in",
          "ckpt.pt is damaged (KeyError('settings'))", lines=2)


def test_importing_and_help_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.raises(SystemExit, train_grokking.main, ["--help"])
    assert "--train-fraction" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_prime_check_is_a_prime_check():
    sieve = [n for n in range(2, 300) if all(n % d for d in range(2, n))]
    assert [n for n in range(-3, 300) if train_grokking.is_prime(n)] == sieve
    assert issubclass(UserError, ValueError)
