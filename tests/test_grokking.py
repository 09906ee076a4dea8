"""train_grokking.py: the equations, the model and its shortcuts, the updates, and runs that are resumed to the bit."""
import builtins
import dataclasses
import json
import math
import signal

import numpy as np
import pytest
import torch
from helpers import flags
from torch import nn

import train_grokking
from train_grokking import FIRST_NUMBER, OPERATIONS, Batches, GrokkingRun, Settings, UserError, parse_settings

# A model that trains a step in milliseconds.
TINY = dict(prime=11, layers=2, width=16, heads=2, batch_size=16, iterations=24, eval_every=8, save_every=1, threads=1,
            device="cpu", dtype="fp32", compile=False, plot=False)


def settings(**changes) -> Settings:
    return Settings(**{**TINY, **changes})


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
    s = settings(prime=prime, operation=operation, train_fraction=0.5)
    task = train_grokking.make_task(s)
    columns = [int(b) for b in task.b]
    assert columns == list(range(1 if operation == "/" else 0, prime))
    expected = [[BY_HAND[operation](a, b, prime) for b in columns] for a in range(prime)]
    assert task.answers.tolist() == expected
    assert task.answers.numel() == train_grokking.equation_count(s) == prime * (prime - (operation == "/"))
    rows = [tuple(row) for row in task.train.tolist()]
    assert len(rows) == len(set(rows)) == int(task.trained.sum()) == task.answers.numel() // 2
    assert all(expected[a][columns.index(b)] == c and task.trained[a, columns.index(b)] for a, b, c in rows)


def test_division_modulo_223_has_the_published_sizes():
    task = train_grokking.make_task(Settings())
    assert task.answers.numel() == 49506 and len(task.train) == 24753
    a, b, c = task.train.unbind(dim=1)
    assert torch.equal(c * b % 223, a) and int(b.min()) == 1 and int(task.answers.max()) == 222


def test_the_split_follows_from_the_seed_and_the_fraction():
    one, same, other = (train_grokking.make_task(settings(prime=31, seed=seed)).trained for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert int(train_grokking.make_task(settings(prime=31, train_fraction=0.3)).trained.sum()) == 279


@pytest.mark.parametrize("given, name", [("x/y", "/"), ("x + y", "+"), ("a*b", "*"), ("x^2+xy+y^2+x", "x2xyy2x"),
                                         ("x^3+xy^2+y", "x3xy2y"), ("x3xy", "x3xy"), ("-", "-"), ("x^9", "x^9")])
def test_operations_are_known_by_name_and_formula(given, name):
    assert train_grokking.operation_name(given) == name


def test_every_epoch_has_each_equation_at_most_once_in_another_order():
    s = settings(batch_size=16)
    count, batches, epochs = 55, Batches(55, s), []
    for epoch in range(2):
        places = [batches.place(3 * epoch + i) for i in range(3)]
        epochs.append(torch.cat([order[start:start + 16] for order, start in places]).tolist())
        assert len(set(epochs[-1])) == 48 and set(epochs[-1]) <= set(range(count))
    assert epochs[0] != epochs[1]
    order, start = Batches(55, s).place(4)  # a resumed run begins there
    assert order[start:start + 16].tolist() == epochs[1][16:32]
    assert Batches(10, s).size == 10


# --- model


def modules(s: Settings, w: dict) -> tuple[nn.Module, nn.Module, nn.Module]:
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
    last, head = nn.LayerNorm(s.width), nn.Linear(s.width, s.vocab_size)
    for module, name in ((last, "last_norm"), (head, "head")):
        module.weight.data.copy_(w[name])
        module.bias.data.copy_(w[f"{name}_bias"])
    return encoder, last, head


def random_weights(s: Settings) -> dict:
    """Initial weights in which no bias is 0 and no gain is 1."""
    torch.manual_seed(1)
    return {name: w + 0.1 * torch.randn_like(w) for name, w in train_grokking.initial_weights(s).items()}


def equations(s: Settings, count: int = 20) -> torch.Tensor:
    return train_grokking.make_task(s).train[:count]


def test_the_model_is_torchs_post_norm_encoder():
    s = settings(operation="-")
    w, (a, b, _) = random_weights(s), equations(s).unbind(dim=1)
    encoder, last, head = modules(s, w)
    n = torch.ones_like(a)
    tokens = torch.stack([0 * n, FIRST_NUMBER + a, 3 * n, FIRST_NUMBER + b, n], dim=1)  # EOS a - b =
    x = w["embedding"][tokens] + w["position"]
    for layer in encoder:
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(5), is_causal=True)
    torch.testing.assert_close(train_grokking.logits(w, a, b, s), head(last(x[:, -1])), rtol=1e-4, atol=1e-4)


def test_parameters_and_their_initial_sizes():
    w = train_grokking.initial_weights(Settings())
    assert sum(z.numel() for z in w.values()) == 457578
    assert Settings().vocab_size == 234
    assert sum(math.prod(shape) for shape in train_grokking.weight_shapes(settings()).values()) == sum(
        z.numel() for z in train_grokking.initial_weights(settings()).values())
    for part, bound in ((w["attention"][:, :3], (6 / 512) ** 0.5), (w["attention"][:, 3], 128**-0.5),
                        (w["mlp"][:, 0], 128**-0.5), (w["mlp"][:, 1], 512**-0.5), (w["head"], 128**-0.5)):
        assert 0.99 * bound < part.abs().max() <= bound and abs(part.std() / bound - 3**-0.5) < 0.01
    assert abs(w["embedding"].std() - 1) < 0.02 and not w["attention_bias"].any() and bool((w["norm"] == 1).all())


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_leaving_out_what_is_not_read_changes_nothing(layers):
    s = settings(layers=layers)
    w, (a, b, c) = random_weights(s), equations(s).unbind(dim=1)

    def loss(w, s):
        return nn.functional.cross_entropy(train_grokking.logits(w, a, b, s), FIRST_NUMBER + c)

    short, full = (torch.func.grad_and_value(loss)(w, dataclasses.replace(s, full=full)) for full in (False, True))
    torch.testing.assert_close(short, full, rtol=1e-4, atol=1e-6)
    assert all(grad.any() for grad in full[0].values())


@pytest.mark.parametrize("operation", ["/", "*"])
@pytest.mark.parametrize("layers", [1, 2])
def test_evaluation_with_kept_keys_and_values_is_the_same(layers, operation):
    s = settings(layers=layers, operation=operation)
    w, task = random_weights(s), train_grokking.make_task(s)
    rows = torch.tensor([0, 4, 10])
    fast = train_grokking.logits_of_rows(w, rows, task.b, s)
    plain = train_grokking.logits(w, rows.repeat_interleave(len(task.b)), task.b.repeat(3), s)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 11])
def test_losses_and_accuracies_are_over_all_equations(rows, monkeypatch):
    s = settings()
    w, task = random_weights(s), train_grokking.make_task(s)
    monkeypatch.setattr(train_grokking, "EVAL_ROWS", rows * len(task.b))
    calls = []
    found = train_grokking.evaluate_all(lambda *z: calls.append(1) or train_grokking.score_rows(*z), w, task, s)
    assert len(calls) == -(-11 // rows)
    for split, where in (("train", task.trained), ("val", ~task.trained)):
        row, column = where.nonzero(as_tuple=True)
        z, target = train_grokking.logits(w, row, task.b[column], s), FIRST_NUMBER + task.answers[where]
        assert found[f"{split}_loss"] == pytest.approx(float(nn.functional.cross_entropy(z, target)), rel=1e-5)
        assert found[f"{split}_acc"] == pytest.approx(float((z.argmax(1) == target).double().mean()))


def test_bf16_products_leave_weights_and_logits_in_fp32():
    s = settings(dtype="bf16")
    w, (a, b, _) = random_weights(s), equations(s).unbind(dim=1)
    z, exact = (train_grokking.logits(w, a, b, dataclasses.replace(s, dtype=dtype)) for dtype in ("bf16", "fp32"))
    assert z.dtype == torch.float32 and 0 < float((z - exact).abs().max()) < 0.1


# --- optimizer


def steps_of(s: Settings, count: int = 4) -> tuple[dict, dict, list[dict]]:
    """Weights before and after some updates by random gradients, and these."""
    w, before = random_weights(s), random_weights(s)
    moments, grads = train_grokking.initial_moments(w, s), []
    for step in range(count):
        torch.manual_seed(step)
        grads.append({name: torch.randn_like(z) for name, z in w.items()})
        train_grokking.update_weights(w, grads[-1], moments, train_grokking.step_numbers(s, step), s)
    return before, w, grads


def by_torch(optimizer: torch.optim.Optimizer, weights: list, grads: list[list], s: Settings) -> list:
    """The weights after the same updates, warm-up included, by torch's optimizer."""
    peak = optimizer.param_groups[0]["lr"]
    for step, some in enumerate(grads):
        optimizer.param_groups[0]["lr"] = peak * train_grokking.warm_up_scale(s, step)
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


@pytest.mark.parametrize("method", ["newton_schulz", "polar_express"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 64, 16), (2, 16, 64)])
def test_orthogonalized_matrices_have_singular_values_near_one(method, shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(train_grokking.orthogonalize(torch.randn(shape), method, torch.float32))
    assert values.max() < 1.25 and values.median() > 0.65


# --- runs


def test_a_run_writes_what_it_promises(tmp_path, capsys):
    found = train(tmp_path, optimizer="muon", plot=True)
    printed = capsys.readouterr().out
    assert {path.name for path in tmp_path.glob("logs/x/*/*")} == {"log.txt", "metrics.json", "curve.png", "ckpt.pt",
                                                                   "ckpt_best.pt"}
    assert [m["step"] for m in found["metrics"]] == [8, 16, 24] and found["total_steps"] == 24
    assert found["metrics"][0].keys() == {"step", "train_loss", "train_acc", "val_loss", "val_acc", "weight_norm", "lr",
                                          "time_s"}
    assert found["config"]["prime"] == 11 and found["status"] == "done"
    assert found["environment"].keys() >= {"torch", "numpy", "platform", "cpu", "threads", "git"}
    assert found["milestones"].keys() == {"train_99", "val_50", "val_95", "val_99", "gap"}
    assert found["best_val_acc"] == max(m["val_acc"] for m in found["metrics"])
    assert found["train_time_s"] > 0 and found["eval_time_s"] > 0 and found["step_ms"] > 0
    assert "val >= 99 %: not reached" in printed and "evaluation" in printed and "55 for training" in printed
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
    step = GrokkingRun.do_step

    def interrupting(run, weights, moments, i):
        if i == stop_after - 1:
            signal.raise_signal(number)
        return step(run, weights, moments, i)

    with monkeypatch.context() as patch:
        patch.setattr(GrokkingRun, "do_step", interrupting)
        assert train_grokking.main(argv(tmp_path / "parts", optimizer=optimizer)) == 128 + number
    assert result(tmp_path / "parts")["status"] == "interrupted" and saved(tmp_path / "parts")["step"] == stop_after
    train(tmp_path / "parts", optimizer=optimizer, resume="latest")
    compare(saved(tmp_path / "whole"), saved(tmp_path / "parts"))
    assert result(tmp_path / "parts")["status"] == "done"


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path, monkeypatch):
    train(tmp_path / "whole", save_every=2)
    step = GrokkingRun.do_step

    def dying(run, weights, moments, i):
        if i == 21:
            raise MemoryError
        return step(run, weights, moments, i)

    with monkeypatch.context() as patch:
        patch.setattr(GrokkingRun, "do_step", dying)
        pytest.raises(MemoryError, train_grokking.main, argv(tmp_path / "parts", save_every=2))
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


def test_a_damaged_checkpoint_is_reported_and_the_best_one_taken(tmp_path, capsys):
    train(tmp_path)
    (file,) = tmp_path.glob("logs/x/*/ckpt.pt")
    best = saved(tmp_path, "ckpt_best.pt")["step"]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # in the middle of a tensor: torch.load would not notice
    file.write_bytes(content)
    assert train_grokking.main(argv(tmp_path, resume="latest", iterations=32)) == 0
    printed = capsys.readouterr().out
    assert f"checkpoint {file} is damaged" in printed and f"ckpt_best.pt after step {best}" in printed
    for path in (file, file.with_name("ckpt_best.pt")):
        path.write_bytes(path.read_bytes()[:999])
    assert train_grokking.main(argv(tmp_path, resume="latest")) == 1
    assert capsys.readouterr().err == f"error: no intact checkpoint in {file.parent}: start without --resume\n"


def test_a_full_disk_costs_checkpoints_not_the_run(tmp_path, monkeypatch, capsys):
    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train_grokking.main(argv(tmp_path)) == 1
    printed = capsys.readouterr()
    assert "warning: could not write" in printed.out and "free some space" in printed.err
    assert result(tmp_path)["total_steps"] == 24 and not list(tmp_path.glob("logs/x/*/*.tmp"))


def test_a_run_that_diverges_stops_with_a_sentence(tmp_path, capsys):
    assert train_grokking.main(argv(tmp_path, lr=1e30)) == 1
    assert "not finite after step 8: stopped" in capsys.readouterr().err and result(tmp_path)["status"] == "nan"


def test_a_run_stops_a_tenth_after_the_accuracy_to_stop_at(tmp_path, monkeypatch):
    def scores(score, w, task, s):
        seen.append(1)
        return {"train_loss": 1.0, "train_acc": 1.0, "val_loss": 1.0, "val_acc": 0.99 if len(seen) >= 10 else 0.1}

    seen = []
    monkeypatch.setattr(train_grokking, "evaluate_all", scores)
    found = train(tmp_path, iterations=40, eval_every=1)
    assert found["total_steps"] == 11 and found["status"] == "target"
    assert found["milestones"] == {"train_99": 1, "val_50": 10, "val_95": 10, "val_99": 10, "gap": 9}


def test_milestones_are_the_first_evaluations_that_reach_them():
    curve = [(10, 0.5, 0.1), (20, 0.99, 0.2), (30, 0.98, 0.6), (40, 1.0, 0.4), (50, 1.0, 0.95)]
    metrics = [{"step": step, "train_acc": train, "val_acc": val} for step, train, val in curve]
    found = train_grokking.milestones(metrics)
    assert found == {"train_99": 20, "val_50": 30, "val_95": 50, "val_99": None, "gap": None}
    text = train_grokking.milestone_text(found)
    assert text.startswith("train >= 99 %: step 20   val >= 50 %: step 30") and text.endswith("99 %: not reached")
    found = train_grokking.milestones([*metrics, {"step": 8000, "train_acc": 1.0, "val_acc": 0.991}])
    assert train_grokking.milestone_text(found).endswith("val >= 99 %: step 8,000   gap 7,980 steps (400.0x)")


def test_the_step_and_the_evaluation_are_whole_graphs():
    """Traced as torch.compile does, with no break in the graph; without the C++ compiler's minute."""
    s = settings(optimizer="muon")
    task = train_grokking.make_task(s)
    order, start = Batches(len(task.train), s).place(1)
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager", dynamic=False, fullgraph=True)):
        w = random_weights(s)
        moments = train_grokking.initial_moments(w, s)
        with torch.no_grad():
            for step in range(2):
                loss = wrap(train_grokking.train_step)(w, moments, task.train, order, start,
                                                       train_grokking.step_numbers(s, step), 16, s)
            scores = train_grokking.evaluate_all(wrap(train_grokking.score_rows), w, task, s)
        results.append([float(loss), *scores.values(), w["mlp"], w["embedding"]])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-4)


def test_nothing_is_compiled_after_the_warm_up(tmp_path, monkeypatch):
    def graphs() -> int:
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    run, at_start = GrokkingRun.run, []
    monkeypatch.setattr(train_grokking, "compiled", lambda f, s: torch.compile(f, backend="aot_eager", fullgraph=True))
    monkeypatch.setattr(GrokkingRun, "run", lambda self: at_start.append(graphs()) or run(self))
    torch._dynamo.reset()  # of what other tests have compiled
    before = graphs()
    train(tmp_path, compile=True)
    assert at_start == [before + 2] and graphs() == before + 2


def test_compiled_training_needs_no_compiler_to_go_on(monkeypatch):
    monkeypatch.setattr(train_grokking.shutil, "which", lambda name: None)
    s, _, notes = parse_settings(["--device", "cpu"])
    assert not s.compile and any("no C++ compiler" in note for note in notes)


def test_without_matplotlib_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def absent(name, *rest):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    train(tmp_path, iterations=8, plot=True)
    assert "pip install matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("logs/x/*/curve.png"))


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
    def check(argv, *words: str, code: int = 1, lines: int = 1):
        try:
            got = train_grokking.main([str(a) for a in argv])
        except SystemExit as stopped:  # argparse
            got = stopped.code
        error = capsys.readouterr().err
        assert got == code and error.startswith("error: ") and error.count("\n") == lines and "Traceback" not in error
        assert [word for word in words if word not in error] == [], error
    return check


@pytest.mark.parametrize("changes, words", [
    (dict(prime=91), ["--prime 91:", "89 and 97"]), (dict(prime=1), ["--prime 1:", "the nearest: 2\n"]),
    (dict(prime=-7), ["--prime -7", ">0"]), (dict(operation="x^y"), ["--operation x^y", "x2xyy2", "*"]),
    (dict(train_fraction=0), ["--train_fraction 0.0", "above 0 and below 1"]),
    (dict(train_fraction=1), ["--train_fraction 1.0", "above 0 and below 1"]),
    (dict(train_fraction=0.001), ["--train_fraction 0.001", "no training or no validation equation of 110"]),
    (dict(heads=3), ["--width 16", "--heads 3"]), (dict(preset="huge"), ["--preset huge", "nanugpt or power or quick"]),
    (dict(beta2=1), ["--beta2 1.0", "below 1"]), (dict(muon_lr=0.1), ["--muon_lr", "--optimizer muon"]),
    (dict(eval_every=0), ["--eval_every 0"]), (dict(experiment_name="a/b"), ["--experiment_name 'a/b'"]),
])
def test_settings_that_cannot_work(changes, words, tmp_path, fails):
    fails(argv(tmp_path, **changes), "1 setting(s) cannot work", *words, lines=2)
    assert not (tmp_path / "logs").exists()


def test_several_faults_are_told_at_once(tmp_path, fails):
    fails(argv(tmp_path, prime=100, train_fraction=2, heads=5), "3 setting(s)", "97 and 101", "--train_fraction 2.0",
          "--heads 5", lines=4)


def test_flags_that_do_not_exist_or_have_no_number(tmp_path, fails):
    fails(["--prim", "7"], "--prim", "did you mean --prime?", code=2)
    fails(["--prime", "seven"], "--prime", "invalid int value", code=2)


def test_resuming_nothing(tmp_path, fails):
    fails(argv(tmp_path, resume="latest"), "no checkpoint in", "start without --resume")
    fails(argv(tmp_path, resume=tmp_path / "gone.pt"), "no checkpoint in", "gone.pt")


def test_resuming_with_other_settings_names_them(tmp_path, fails, capsys):
    train(tmp_path, iterations=8)
    capsys.readouterr()
    fails(argv(tmp_path, iterations=8, resume="latest", seed=3, weight_decay=0.2), "other settings",
          "--seed: 0 in the checkpoint, 3 now", "--weight_decay: 0.1 in the checkpoint, 0.2 now", lines=3)


def test_a_checkpoint_of_something_else_is_not_taken(tmp_path, fails):
    torch.save({"model": 1}, tmp_path / "ckpt.pt")
    fails(argv(tmp_path, resume=tmp_path), "no intact checkpoint in")


def test_importing_and_help_do_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    pytest.raises(SystemExit, train_grokking.main, ["--help"])
    assert "--train-fraction" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_a_prime_check_is_a_prime_check():
    sieve = [n for n in range(2, 300) if all(n % d for d in range(2, n))]
    assert [n for n in range(-3, 300) if train_grokking.is_prime(n)] == sieve
    assert issubclass(UserError, ValueError) and np.array_equal(train_grokking.answer_table(2, "/"), [[0], [1]])
