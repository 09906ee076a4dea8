"""generate.py: the cache against the full forward pass, sampling, streaming, checkpoints, and wrong input."""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import generate
import train_gpt
from train_gpt import GPT, Settings

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 50
ABOUT = {"script": "train_gpt.py", "train_time_ms": 1.0, "position": {"epoch": 0, "shard": 0, "used": 0}}
BYTES = {"tokenizer": {"kind": "byte"}, "vocab_size": 257, "eot": 256, "splits": {}}
CHARS = {"tokenizer": {"kind": "char", "chars": "\n abcdé€"}, "vocab_size": 8, "eot": None, "splits": {}}


def settings(**changes) -> Settings:
    """A tiny model, all choices made."""
    base = dict(num_layers=4, width=64, head_dim=16, value_embeds=1, attention="LSSL", iterations=10, seq_len=(64,),
                batch_tokens=(128,), micro_tokens=128, window=(16,), window_start=16, window_step=8, eval_seq_len=64,
                device="cpu", dtype="fp32", backend="sdpa", compile=False)
    return Settings(**{**base, **changes})


def random_model(s: Settings, vocab_size: int = VOCAB) -> GPT:
    """A model whose every parameter is random, the zero-initialized ones too."""
    model, generator = GPT(s, vocab_size), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3, generator=generator)
    return model


def save(run: Path, vocab: dict, s: Settings | None = None, step: int = 10, model: GPT | None = None, **meta) -> Path:
    """A checkpoint as train_gpt writes it, of a random model unless one is given."""
    s = s or settings()
    model = model or random_model(s, vocab["vocab_size"])
    state = {"optimizer": {"steps": step, "state": {"master": {n: p.detach() for n, p in model.named_parameters()}}}}
    meta = ABOUT | {"settings": dataclasses.asdict(s), "data": {"fingerprint": "", "meta": vocab}} | meta
    return train_gpt.write_checkpoint(run, step, state, meta, keep=9)


@pytest.fixture
def capsys(capsysbinary):
    """Of bytes: what a random model writes is no UTF-8."""
    return capsysbinary


def run(capsys, *flags) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of generate.main, on the CPU unless a flag says otherwise."""
    capsys.readouterr()
    code = generate.main(["--device", "cpu", *map(str, flags)])
    return code, *(stream.decode(errors="surrogateescape") for stream in capsys.readouterr())


def text_of(capsys, *flags) -> str:
    code, out, err = run(capsys, *flags)
    assert code == 0, err
    return out


def error_of(capsys, *flags) -> str:
    """The one sentence of a failing call."""
    code, out, err = run(capsys, *flags)
    assert (code, out) == (1, "") and err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err


# --- cache

VARIANTS = [
    {}, {"skip": "unet"}, {"skip": "none"}, {"smear": False}, {"attn_gate": False}, {"softcap": (0.0, 0.0, 1.0)},
    {"softcap": (30.0, 0.0, 7.5)}, {"key_offset": False}, {"attention": "LPPL"}, {"attention": "PPPP"}, {"xsa": False},
    {"backout": False}, {"value_gate": False}, {"bigram": 50}, {"attention": "PP-L", "xsa": False, "bigram": 5},
    {"value_embeds": 0}, {"value_embeds": 2}, {"attention": "LS-L", "value_embeds": 2}, {"attention": "-S-S"},
    {"attention": "----"}, {"attention": "LLLL"}, {"num_layers": 1, "attention": "S", "value_embeds": 0},
    {"num_layers": 5, "attention": "LS-SL", "value_embeds": 2, "head_dim": 32, "mlp_ratio": 2},
]


def full_logits(model: GPT, tokens: list[int], window: int) -> torch.Tensor:
    """Logits of all positions by one forward pass, (T, padded vocabulary)."""
    inputs = torch.tensor([tokens])
    with torch.no_grad():
        return model.head(model.trunk(inputs, torch.zeros_like(inputs), torch.tensor(window, dtype=torch.int32)))[0]


def assert_same_logits(s: Settings, window: int, prompt: int, cached: bool = True, length: int = 45):
    """Logits of every position from `prompt` on, against one full forward pass over the whole text."""
    tokens = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(2)).tolist()
    expected = full_logits(random_model(s), tokens, window)
    decoder = generate.Decoder(random_model(s), window, length, cached)
    for _ in range(2):  # the second text must not see the first
        decoder.restart()
        found = [decoder(tokens[:prompt])] + [decoder([token]) for token in tokens[prompt:]]
        torch.testing.assert_close(torch.stack(found), expected[prompt - 1:], atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_logits_are_those_of_the_full_forward_pass(changes):
    assert_same_logits(settings(**changes), window=16, prompt=5)


@pytest.mark.parametrize("window", [2, 3, 8, 13, 16, 44, 45, 300])
@pytest.mark.parametrize("prompt", [1, 2, 30, 45])
def test_cached_logits_for_windows_and_prompts_of_all_lengths(window, prompt):
    assert_same_logits(settings(num_layers=2, attention="LS"), window, prompt)


def test_without_cache_logits_are_those_of_the_full_forward_pass():
    assert_same_logits(settings(), window=16, prompt=5, cached=False)


@pytest.mark.parametrize("changes", [{"window": 45}, {"smear": False}, {"skip": "none"}, {"value_embeds": 0}], ids=str)
def test_the_comparison_above_would_notice_a_part_left_out(changes):
    tokens = list(range(45))
    window = changes.get("window", 16)
    s = settings() if "window" in changes else settings(**changes)
    parts = random_model(settings()).state_dict()
    other = GPT(s, VOCAB)
    other.load_state_dict({name: tensor for name, tensor in parts.items() if name in other.state_dict()})
    difference = full_logits(random_model(settings()), tokens, 16) - full_logits(other, tokens, window)
    assert difference[-1].abs().max() > 0.01


@pytest.mark.parametrize("flags", [[], ["--no-cache"]])
def test_texts_beyond_the_rotary_table_use_a_longer_one(tmp_path, capsys, flags):
    greedy = ["--max-tokens", 120, "--temperature", 0, *flags]
    s = settings(attention="LLLL", eval_window=200)
    short = save(tmp_path / "short", CHARS, s)
    long = save(tmp_path / "long", CHARS, dataclasses.replace(s, eval_seq_len=256))
    assert text_of(capsys, "--checkpoint", short, *greedy) == text_of(capsys, "--checkpoint", long, *greedy)


def test_models_with_another_attention_are_served_without_cache(tmp_path, capsys):
    class Other(train_gpt.Attention):
        pass

    model = random_model(settings())
    assert generate.not_cacheable(train_gpt, model) is None
    model.blocks[2].attn.__class__ = Other
    assert generate.not_cacheable(train_gpt, model) == "layer 2 is Other of kind 'S'"
    model = random_model(settings())
    model.layers[1] = model.layers[1]._replace(attention="X")
    assert generate.not_cacheable(train_gpt, model) == "layer 1 is Attention of kind 'X'"


def test_the_fallback_is_announced_and_writes_the_same_text(tmp_path, capsys, monkeypatch):
    path = save(tmp_path, BYTES)
    expected = text_of(capsys, "--checkpoint", path, "--max-tokens", 40)
    monkeypatch.setattr(generate, "not_cacheable", lambda script, model: "layer 7 is Odd of kind 'O'")
    code, out, err = run(capsys, "--checkpoint", path, "--max-tokens", 40)
    assert (code, out) == (0, expected)
    assert "note: no cache, as layer 7 is Odd of kind 'O'" in err and "without cache" in err


# --- sampling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [0, 3])
def test_tokens_are_drawn_with_the_probabilities_of_the_softmax(temperature, top_k):
    logits, n, source = torch.tensor([1.0, -1.0, 2.0, 0.0, 0.5]), 4000, generator()
    expected = (logits / temperature).exp()
    if top_k:
        expected[[1, 3]] = 0
    expected /= expected.sum()
    draws = torch.tensor([generate.choose(logits, temperature, top_k, source) for _ in range(n)])
    found = torch.bincount(draws, minlength=5) / n
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all(), (found, expected)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-40, 1e-6])
def test_temperatures_near_zero_are_greedy(temperature):
    logits = torch.tensor([29.0, 30.0, -30.0, 29.99])
    assert {generate.choose(logits, temperature, 0, generator(i)) for i in range(50)} == {1}


def test_the_highest_temperature_is_uniform_over_what_top_k_leaves():
    logits = torch.arange(6.0)
    assert {generate.choose(logits, 1000.0, 0, generator(i)) for i in range(200)} == set(range(6))
    assert {generate.choose(logits, 1000.0, 2, generator(i)) for i in range(200)} == {4, 5}
    assert {generate.choose(logits, 1000.0, 99, generator(i)) for i in range(200)} == set(range(6))


class Scripted:
    """Stands in for a decoder: the n-th call's likeliest token is the n-th of a list; padding is likelier still."""

    def __init__(self, tokens: list[int], padded: int = 384):
        self.tokens, self.padded, self.calls = tokens, padded, []

    def restart(self):
        self.calls = []

    def __call__(self, new: list[int]) -> torch.Tensor:
        logits = torch.zeros(self.padded)
        logits[self.tokens[len(self.calls)]] = 50.0
        logits[257:] = 1000.0
        self.calls.append(new)
        return logits


def sampled(decoder, seed: int = 0, **changes) -> list[int]:
    flags = [f"--{name}={value}" for name, value in {"max-tokens": 6, **changes}.items()]
    return list(generate.sample(decoder, [256, 1], BYTES, generate.parse(flags), generator(seed)))


def test_each_token_is_fed_back_and_eot_ends_the_text_unseen():
    decoder = Scripted([7, 8, 256, 9, 9, 9])
    assert sampled(decoder, temperature=0) == [7, 8]
    assert decoder.calls == [[256, 1], [7], [8]]
    assert sampled(Scripted([7] * 6), temperature=0) == [7] * 6


def test_entries_that_pad_the_vocabulary_are_never_chosen():
    tokens = [token for seed in range(40) for token in sampled(Scripted([0] * 6), seed, temperature=1000)]
    assert len(tokens) > 100 and len(set(tokens)) > 50 and max(tokens) <= 256


def test_seed_greedy_and_top_k(tmp_path, capsys):
    path = save(tmp_path, BYTES)

    def text(*flags):
        return text_of(capsys, "--checkpoint", path, "--max-tokens", 60, *flags)

    assert text("--seed", 5) == text("--seed", 5) == text("--seed", 5, "--no-cache") != text("--seed", 6)
    greedy = text("--temperature", 0)
    assert greedy == text("--temperature", 0, "--no-cache") == text("--temperature", 0, "--seed", 9)
    assert greedy == text("--top-k", 1) == text("--top_k", 1, "--temperature", 1000) != text("--top-k", 2, "--seed", 1)
    both = text("--num-samples", 2)
    first, second = both.split("--- sample 2 of 2\n")
    assert first == "--- sample 1 of 2\n" + text() and second != text()


# --- text


def stream(*chunks: bytes) -> list[str]:
    return list(generate.characters(iter(chunks)))


def test_a_character_appears_with_its_last_byte():
    assert stream(b"\xe2", b"\x82", b"\xac", b"a", "é".encode()) == ["", "", "€", "a", "é", ""]
    source = iter([b"a", b"b"])
    assert next(generate.characters(source)) == "a" and next(source) == b"b", "nothing is read ahead"


def test_bytes_that_are_no_utf8_and_controls_become_replacement_characters():
    assert stream(b"\xff", b"a", b"\xe2", b"b") == ["\ufffd", "a", "", "\ufffdb", ""]
    assert stream(b"a", b"\xe2\x82") == ["a", "", "\ufffd"]
    assert "".join(stream(b"\x1b[2J\x00\t\n\r", "\x9b\x7f".encode())) == "\ufffd[2J\ufffd\t\n\ufffd\ufffd\ufffd"


@given(st.text(), st.integers(1, 5))
def test_any_text_survives_being_cut_into_chunks(text, size):
    data = text.encode()
    chunks = [data[i:i + size] for i in range(0, len(data), size)]
    assert "".join(stream(*chunks)) == text.translate(generate.CONTROLS)


def test_prompts_start_with_eot_where_there_is_one():
    def encode(vocab, text):
        return generate.encode_prompt(generate.load_tokenizer(vocab), vocab, text)

    assert encode(BYTES, "") == [256] and encode(BYTES, "aé") == [256, 97, 0xC3, 0xA9]
    assert encode(CHARS, "") == [0] and encode(CHARS, "b€") == [3, 7]
    assert encode(BYTES, "<|endoftext|>") == [256, *b"<|endoftext|>"]
    with pytest.raises(ValueError, match="at most 8192"):
        encode(BYTES, "a" * 8192)


@pytest.mark.parametrize("vocab, prompt", [(BYTES, "def é("), (CHARS, "ab é€")])
def test_the_prompt_comes_before_the_text(tmp_path, capsys, vocab, prompt):
    path = save(tmp_path, vocab)
    out = text_of(capsys, "--checkpoint", path, "--prompt", prompt, "--max-tokens", 20)
    assert out.startswith(prompt) and len(out) > len(prompt) + 3 and out.endswith("\n")


# --- checkpoints


def test_the_newest_checkpoint_of_a_step_run_experiment_or_log_folder(tmp_path):
    names = [("a/run1", "step_000010"), ("a/run1", "step_000005"), ("a/run2", "step_000002"), ("b/run1", "step_000001")]
    paths = [tmp_path / "logs" / run / "checkpoints" / step for run, step in names]
    for i, path in enumerate(paths):
        path.mkdir(parents=True)
        os.utime(path, (1000 - i // 2, 1000 - i // 2))  # the first two are of the same second
    (paths[0].parent / "step_000011.tmp").mkdir()
    find = generate.find_checkpoint
    assert [find(path) for path in paths] == paths
    assert find(paths[0].parent) == find(paths[0].parent.parent) == paths[0]
    assert find(tmp_path / "logs" / "a") == find(tmp_path / "logs") == paths[0]
    os.utime(paths[3], (2000, 2000))
    assert find(tmp_path / "logs") == paths[3] and find(tmp_path / "logs" / "a") == paths[0]


def test_missing_checkpoints_are_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint in logs: train with python train_gpt.py" in error_of(capsys)
    for place in ("nowhere", "logs/a/checkpoints/step_000003"):
        assert f"no checkpoint in {place}" in error_of(capsys, "--checkpoint", place)
    (tmp_path / "logs" / "a").mkdir(parents=True)
    assert "no checkpoint in logs/a" in error_of(capsys, "--checkpoint", "logs/a")


def flip_byte(path: Path):
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def drop_hash(path: Path):
    meta = json.loads((path / "meta.json").read_text())
    del meta["sha256"]
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.mark.parametrize("harm", [
    flip_byte, drop_hash, lambda path: (path / "state.pt").unlink(), lambda path: (path / "meta.json").unlink(),
    lambda path: (path / "state.pt").write_bytes(b""), lambda path: (path / "meta.json").write_text('{"settings": '),
    lambda path: (path / "meta.json").write_text("[]"),
])
def test_damaged_checkpoints_are_one_sentence(tmp_path, capsys, harm):
    path = save(tmp_path, BYTES)
    harm(path)
    assert f"checkpoint {path} is damaged" in error_of(capsys, "--checkpoint", path)


@pytest.mark.parametrize("script", ["os.py", "../train_gpt.py", "train_missing.py", "train_gpt", "train_gpt.py\n", ""])
def test_only_training_scripts_beside_generate_are_imported(tmp_path, capsys, script):
    path = save(tmp_path, BYTES, script=script)
    assert "none of the training scripts here" in error_of(capsys, "--checkpoint", path)


def test_settings_of_other_versions(tmp_path, capsys):
    saved = dataclasses.asdict(settings())
    path = save(tmp_path / "new", BYTES, settings=saved | {"future_setting": 3})
    code, out, err = run(capsys, "--checkpoint", path, "--max-tokens", 5)
    assert code == 0 and "no longer has the settings future_setting: ignored" in err
    path = save(tmp_path / "old", BYTES, settings=saved | {"width": 32}, git={"commit": "abc123"})
    error = error_of(capsys, "--checkpoint", path)
    assert "does not fit this train_gpt.py" in error and "commit abc123" in error


@pytest.mark.parametrize("growth", [1, 2])
def test_no_cap_as_earlier_versions_wrote_it(growth, tmp_path, capsys):
    """--softcap 0; also of a model whose logits --mup divides."""
    s = settings(softcap=(0.0, 0.0, 1.0), mup=growth > 1, base_width=64 // growth, base_head_dim=16)
    now = save(tmp_path / "now", BYTES, s)
    before = save(tmp_path / "before", BYTES, s, settings=dataclasses.asdict(s) | {"softcap": (0.0,)})
    capped = save(tmp_path / "capped", BYTES, dataclasses.replace(s, softcap=(1.0, 0.0, 1.0)))
    texts = [text_of(capsys, "--checkpoint", path, "--max-tokens", 60) for path in (now, before, capped)]
    assert texts[0] == texts[1] != texts[2]


def test_the_window_is_that_of_validation(tmp_path, capsys):
    s = settings(window=(48,), window_start=16, iterations=10)
    for step, changes, window in [(0, {}, 16), (5, {}, 32), (10, {}, 48), (5, {"eval_window": 20}, 20)]:
        path = save(tmp_path / f"{step}{len(changes)}", BYTES, dataclasses.replace(s, **changes), step=step)
        code, _, err = run(capsys, "--checkpoint", path, "--max-tokens", 2)
        assert code == 0 and f"window {window}, with cache" in err


# --- flags


@pytest.mark.parametrize("flags, problems", [
    (["--temperature", "hot"], ["--temperature hot: expected a number from 0 to 1000"]),
    (["--temperature", "-1"], ["--temperature -1: expected"]),
    (["--temperature", "nan"], ["--temperature nan: expected"]),
    (["--temperature", "inf"], ["--temperature inf: expected"]),
    (["--top-k", "2.5"], ["--top-k 2.5: expected an integer from 0 to 65536"]),
    (["--num_samples", "0"], ["--num-samples 0: expected an integer from 1"]),
    (["--max-tokens", "1000000000000"], ["--max-tokens 1000000000000: expected an integer from 1 to 100000"]),
    (["--seed", "-1"], ["--seed -1: expected"]),
    (["--device", "tpu"], ["--device tpu: expected auto, cpu or cuda"]),
    (["--top-k", "-3", "--seed", "x", "--device", "tpu"], ["--top-k -3", "--seed x", "--device tpu"]),
    (["--temprature", "1"], ["--temprature"]),
    (["--prompt"], ["--prompt: expected one argument"]),
], ids=str)
def test_wrong_flags_are_named_all_at_once(capsys, flags, problems):
    error = error_of(capsys, *flags)
    assert all(problem in error for problem in problems), error


def test_cuda_without_a_cuda_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no usable CUDA device" in error_of(capsys, "--device", "cuda")


def test_characters_that_the_vocabulary_lacks_are_named(tmp_path, capsys):
    path = save(tmp_path, CHARS)
    error = error_of(capsys, "--checkpoint", path, "--prompt", "abzüzX")
    assert "--prompt: the model has no 'X', 'z', 'ü', only" in error


# --- with checkpoints that training wrote


def write_data(folder: Path, vocab: dict, tokens: list[int]):
    """A data set of one shard per split, in the public format."""
    folder.mkdir()
    for split in ("train", "val"):
        header = np.zeros(256, dtype="<i4")
        header[:3] = 20240520, 1, len(tokens)
        data = header.tobytes() + np.array(tokens, dtype="<u2").tobytes()
        (folder / f"{folder.name}_{split}_000000.bin").write_bytes(data)
    (folder / "meta.json").write_text(json.dumps(vocab | {"name": folder.name}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Log folder with an experiment on bytes (two checkpoints) and one on characters."""
    root = tmp_path_factory.mktemp("trained")
    write_data(root / "tinybytes", BYTES, [256, *b"the quick brown fox"] * 100)
    write_data(root / "tinychars", CHARS, [i % 8 for i in range(2000)])
    tiny = dict(num_layers=2, width=32, head_dim=16, iterations=6, save_every=3, batch_tokens=256, seq_len=64,
                window=32, window_start=16, window_step=8, eval_tokens=128, micro_tokens=256, eval_every=0)
    for name in ("tinybytes", "tinychars"):
        flags = [f"--{key}={value}" for key, value in tiny.items()]
        flags += ["--preset=cpu", "--device=cpu", "--dtype=fp32", f"--data={root / name}", f"--experiment_name={name}"]
        flags += [f"--log_dir={root / 'logs'}"]
        assert train_gpt.main(flags) == 0
    shutil.rmtree(root / "tinychars")  # a checkpoint is complete without its data
    return root / "logs"


@pytest.mark.parametrize("name", ["tinybytes", "tinychars"])
def test_trained_checkpoints_write_the_same_text_with_and_without_cache(trained, capsys, name):
    [step] = trained.glob(f"{name}/*/checkpoints/step_000006")
    flags = ["--max-tokens", 90, "--seed", 3]
    code, text, err = run(capsys, "--checkpoint", trained / name, *flags)
    assert code == 0 and f"{step}: cpu, window 32, with cache" in err and "tokens/s" in err
    assert text == text_of(capsys, "--checkpoint", step.parent.parent, *flags, "--no-cache")
    earlier = step.with_name("step_000003")
    assert f"{earlier}: cpu, window 24" in run(capsys, "--checkpoint", earlier, "--max-tokens", 1)[2]
    if name == "tinychars":
        assert set(text) <= set(CHARS["tokenizer"]["chars"]) and len(text) == 91


def test_the_command_line_from_another_folder(trained):
    command = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", "logs", "--max-tokens", "30"]
    result = subprocess.run(command, cwd=trained.parent, capture_output=True)
    assert result.returncode == 0 and result.stdout and b"tokens/s" in result.stderr, result.stderr
    assert result.stdout.decode("utf-8").endswith("\n")


def test_a_reader_that_has_seen_enough_is_no_error(trained):
    command = f"'{sys.executable}' '{ROOT / 'generate.py'}' --checkpoint logs --num-samples 40 | head -c 1"
    result = subprocess.run(command, shell=True, cwd=trained.parent, capture_output=True, text=True)
    assert len(result.stdout) == 1 and "error" not in result.stderr and "Traceback" not in result.stderr, result.stderr
