"""generate.py with checkpoints of train_moe.py: cache against full passes, selection bias, settings, refusals."""
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from helpers import VOCAB, log_probabilities, make_data
from moe import random_model, random_noise, settings, train, window

import generate
import train_moe
from train_moe import GPT, Settings

CHARS = "\n" + "".join(map(chr, range(48, 47 + VOCAB)))
VOCABULARY = {"tokenizer": {"kind": "char", "chars": CHARS}, "vocab_size": VOCAB, "eot": None, "splits": {}}
DEEP = dict(num_layers=4, attention="LSSL", moe_layers="MDMM", seq_len=64, eval_seq_len=64)
KINDS = {
    "noisy_topk": dict(router="noisy_topk"),
    "top-1": dict(router="noisy_topk", top_k=1),
    "softmax_topk": dict(router="softmax_topk", route_norm=False, route_scale=2.5),
    "sigmoid_bias": dict(router="sigmoid_bias"),
    "shared, fine": dict(router="sigmoid_bias", num_shared=2, num_experts=8, top_k=4, moe_layers="DMMM"),
    "capacity": dict(router="noisy_topk", capacity_factor=0.25),
    "all experts": dict(router="softmax_topk", top_k=4, moe_layers="MDDD"),
    "copies": dict(router="sigmoid_bias", pointer=8, ngram_rows=50, qk_dim=8),
    "from a GPU": dict(router="sigmoid_bias", moe_impl="bmm", dtype="bf16", compile=True, kernels="gram+mlp"),
}


def save(folder: Path, s: Settings, model: GPT, balance: dict | None) -> Path:
    """A checkpoint as train_moe.py writes it."""
    master = {name: p.detach() for name, p in model.named_parameters()}
    state = {"optimizer": {"steps": 10, "state": {"master": master}, "balance": balance}}
    meta = {"settings": dataclasses.asdict(s), "script": "train_moe.py", "train_time_ms": 1.0,
            "data": {"fingerprint": "", "meta": VOCABULARY}, "position": {"epoch": 0, "shard": 0, "used": 0}}
    return train_moe.write_checkpoint(folder, 10, state, meta, keep=9)


def save_random(folder: Path, s: Settings) -> Path:
    model = random_model(s)
    return save(folder, s, model, {"bias": model.router_bias})


def run(capsys, *flags) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of generate.main on the CPU."""
    capsys.readouterr()
    code = generate.main(["--device", "cpu", *map(str, flags)])
    return code, *capsys.readouterr()


TOKENS = torch.randint(VOCAB, (1, 40), generator=torch.Generator().manual_seed(2))


def full_logits(model: GPT, noise: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of all positions by one forward pass, (T, padded vocabulary)."""
    return model.head(model.trunk(TOKENS, torch.zeros_like(TOKENS), window(16), noise_BMTE=noise))[0]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_logits_token_by_token_are_those_of_the_full_forward_pass(tmp_path, name, cached):
    """Read from a checkpoint, against the model that it was made of, without gradients and so without drops."""
    s = settings(**DEEP | dict(window=16, window_step=8) | KINDS[name])
    exact = dataclasses.replace(s, moe_impl="loop", dtype="fp32", kernels="none", compile=False)
    with torch.no_grad():
        expected = log_probabilities(random_model(exact), TOKENS[0].tolist(), 16)[:, :VOCAB].float()
    path = save_random(tmp_path, s)
    decoder = generate.make_decoder(path, train_moe.read_meta(path), "cpu", TOKENS.numel(), cached)
    assert decoder.cached == cached
    first, *rest = TOKENS[0].tolist()
    found = torch.stack([decoder([first]), *(decoder([token]) for token in rest)])
    found = found if s.pointer else found.log_softmax(-1)[:, :VOCAB]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["bias", "noise", "capacity"])
def test_the_comparison_above_would_notice(change):
    """The bias, which the logits must have, and noise and drops, which they must not, change these models' logits."""
    s = settings(**DEEP, router="sigmoid_bias" if change == "bias" else "noisy_topk", capacity_factor=0.25)
    model = random_model(s)
    with torch.no_grad():
        expected = full_logits(model)
    if change == "bias":
        model.router_bias.zero_()
    with torch.set_grad_enabled(change == "capacity"):
        found = full_logits(model, random_noise(s, 1, TOKENS.numel()) if change == "noise" else None)
    assert (found - expected).abs().max() > 0.05


def test_the_dense_control_has_no_bias_to_read(tmp_path, capsys):
    s = settings(num_experts=0)
    code, text, err = run(capsys, "--checkpoint", save(tmp_path, s, GPT(s, VOCAB), None), "--max-tokens", 30)
    assert code == 0 and len(text) == 31 and "with cache" in err


BROKEN = {"none": None, "not there": {"slopes": torch.zeros(2)}, "of another shape": {"bias": torch.zeros(3, 4)}}


@pytest.mark.parametrize("balance", BROKEN.values(), ids=BROKEN)
def test_a_checkpoint_without_its_bias_is_one_sentence(tmp_path, capsys, balance):
    path = save(tmp_path, s := settings(), random_model(s), balance)
    code, out, err = run(capsys, "--checkpoint", path, "--max-tokens", 5)
    assert (code, out, err.count("\n")) == (1, "", 1) and "does not fit this train_moe.py" in err


@pytest.mark.parametrize("name", ["num_experts", "top_k", "num_shared", "moe_layers", "router", "expert_hidden"])
def test_settings_that_state_pt_does_not_fit(tmp_path, capsys, name):
    """A text or a sentence, nothing is allocated, and the checkpoint before it is taken."""
    run_folder = save_random(tmp_path, settings(num_shared=1)).parent.parent
    path = save_random(tmp_path / "later", settings(num_shared=1))
    path = path.rename(run_folder / "checkpoints" / "step_000011")
    before = json.loads((path / "meta.json").read_text())
    for value in (None, -1, 2.5, [], {}, 10**6, 2**31, 10**12, "L" * 10**6, "\x1b[2J"):
        (path / "meta.json").write_text(json.dumps(before | {"settings": before["settings"] | {name: value}}))
        code, out, err = run(capsys, "--checkpoint", run_folder, "--max-tokens", 2)
        assert code == 0 and "\x1b" not in err and len(err) < 1000
        known = name in before["settings"] and name not in ("router",)
        assert not known or ("step_000011 cannot be used" in err and "step_000010: cpu" in err), (value, err)


def test_a_trained_checkpoint_writes_the_same_text_with_and_without_cache(tmp_path, capsys):
    """With the bias that training made; without it the text is another one."""
    data = make_data(tmp_path / "data", tokenizer=VOCABULARY["tokenizer"], eot=None)
    folder = train(train_moe, tmp_path, data=data, router="sigmoid_bias", bias_rate=0.5, bias_cooldown=0.0, pointer=8,
                   ngram_rows=50)
    path = folder / "checkpoints" / "step_000008"
    code, text, err = run(capsys, *(options := ["--max-tokens", 60, "--checkpoint", tmp_path / "logs"]))
    assert code == 0 and f"{path}: cpu" in err and "with cache" in err
    assert text == run(capsys, *options, "--no-cache")[1]
    state = torch.load(path / "state.pt", weights_only=True)
    state["optimizer"]["balance"]["bias"].zero_()
    meta = json.loads((path / "meta.json").read_text())
    other = train_moe.write_checkpoint(tmp_path / "other", 8, state, meta, keep=1)
    assert run(capsys, *options, "--checkpoint", other)[1] != text
