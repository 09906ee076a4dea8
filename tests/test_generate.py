"""generate.py: the cache against the full forward pass, sampling, streaming, checkpoints, and wrong input."""
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch
from helpers import log_probabilities
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
    {"backout": False}, {"value_gate": False}, {"ngram_rows": 50}, {"attention": "PP-L", "xsa": False, "ngram_rows": 6},
    {"pointer": 8}, {"pointer": 4, "ngram_rows": 50, "attention": "LSPL"}, {"pointer": 8, "softcap": (0.0, 0.0, 1.0)},
    {"qk_dim": 8, "attention": "LSPL"}, {"qk_dim": 12, "attention": "SPSL", "pointer": 8, "ngram_rows": 8},
    {"value_embeds": 0}, {"value_embeds": 2}, {"attention": "LS-L", "value_embeds": 2}, {"attention": "-S-S"},
    {"attention": "----"}, {"attention": "LLLL"}, {"num_layers": 1, "attention": "S", "value_embeds": 0},
    {"num_layers": 5, "attention": "LS-SL", "value_embeds": 2, "head_dim": 32, "mlp_ratio": 2},
]


def full_logits(model: GPT, tokens: list[int], window: int) -> torch.Tensor:
    """Logits of all positions by one forward pass, (T, padded vocabulary)."""
    inputs = torch.tensor([tokens])
    with torch.no_grad():
        return model.head(model.trunk(inputs, torch.zeros_like(inputs), torch.tensor(window, dtype=torch.int32)))[0]


def text(length: int) -> list[int]:
    return torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(2)).tolist()


def assert_same_logits(s: Settings, window: int, prompt: int, cached: bool = True, length: int = 45):
    """Log-probabilities after every position from `prompt` on, against one full forward pass over the whole text."""
    expected = log_probabilities(random_model(s), tokens := text(length), window)[prompt - 1:, :VOCAB].float()
    decoder = generate.Decoder(random_model(s), window, length, cached)
    for _ in range(2):  # the second text must not see the first
        decoder.restart()
        found = torch.stack([decoder(tokens[:prompt])] + [decoder([token]) for token in tokens[prompt:]])
        found = found if s.pointer else found.log_softmax(-1)[:, :VOCAB]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_cached_logits_are_those_of_the_full_forward_pass(changes):
    assert_same_logits(settings(**changes), window=16, prompt=5)


@pytest.mark.parametrize("window", [2, 3, 8, 13, 16, 44, 45, 300])
@pytest.mark.parametrize("prompt", [1, 2, 30, 45])
def test_cached_logits_for_windows_and_prompts_of_all_lengths(window, prompt):
    assert_same_logits(settings(num_layers=2, attention="LS"), window, prompt)


def test_without_cache_logits_are_those_of_the_full_forward_pass():
    assert_same_logits(settings(), window=16, prompt=5, cached=False)


@pytest.mark.parametrize("prompt, cached", [(1, True), (9, True), (27, True), (20, False)])
def test_the_pointer_sees_its_block_and_the_one_before(monkeypatch, prompt, cached):
    """With blocks of 8 tokens, against the model's own forward pass, too."""
    monkeypatch.setattr(train_gpt, "POINTER_BLOCK", 8)
    s = settings(pointer=8, ngram_rows=20)
    assert_same_logits(s, 16, prompt, cached, length=27)
    model, tokens = random_model(s), text(27)
    batch = torch.tensor([[tokens[:-1]], [tokens[1:]], [[0] * 26]], dtype=torch.int32)
    losses = generate.target_losses(model, batch, 16, 7)
    expected = -log_probabilities(model, tokens[:-1], 16).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    torch.testing.assert_close(losses, expected.float(), atol=1e-4, rtol=1e-4)
    trained = model(batch[0], batch[1:2], batch[2], torch.tensor(16, dtype=torch.int32))
    torch.testing.assert_close(losses.sum(), trained[0].detach())


@pytest.mark.parametrize("changes", [{"window": 45}, {"smear": False}, {"skip": "none"}, {"value_embeds": 0},
                                     {"ngram_rows": 0}, {"pointer": 0}], ids=str)
def test_the_comparison_above_would_notice_a_part_left_out(changes):
    tokens, window = list(range(40)) + [3, 1, 3, 2, 3], changes.get("window", 16)
    full = settings(ngram_rows=50, pointer=8)
    s = full if "window" in changes else dataclasses.replace(full, **changes)
    parts = random_model(full).state_dict()
    other = GPT(s, VOCAB)
    other.load_state_dict({name: tensor for name, tensor in parts.items() if name in other.state_dict()})
    one, two = (log_probabilities(model, tokens, w) for model, w in [(random_model(full), 16), (other, window)])
    assert (one - two)[-1, :VOCAB].abs().max() > 0.01


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


@pytest.mark.parametrize("alpha", [-1.0, 1.0])  # of the gate's logit: near the ends of the cap
def test_the_gate_is_no_token_and_copies_come_from_the_text(tmp_path, capsys, alpha):
    """The gate's class has the largest or the smallest logit. The sink gets almost nothing."""
    model = random_model(s := settings(pointer=8), 257)
    with torch.no_grad():
        model.lm_head.zero_()
        model.pointer.small[0], model.pointer.small[1] = 0.0, 0.0
        x = model.trunk(torch.tensor([[256, *b"abc"]]), torch.zeros(1, 4, dtype=torch.int32), torch.tensor(16))[0]
        model.lm_head[257] = alpha * 1e4 * x.sign().mean(0)  # seen from any of these places
    path = save(tmp_path, BYTES, s, model=model)
    texts = text_of(capsys, "--checkpoint", path, "--prompt", "abc", "--max-tokens", 1, "--num-samples", 60,
                    "--temperature", 1)
    copies = len(re.findall(r"\nabc[abc]?\n", texts))
    assert copies > 30 if alpha > 0 else copies < 10, texts


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


def test_without_eot_and_newline_the_first_character_starts_a_text(tmp_path, capsys):
    """As in a vocabulary of A, C, G, T. With a newline that starts it, and nothing is said."""
    path = save(tmp_path / "dna", {"tokenizer": {"kind": "char", "chars": "ACGT"}, "vocab_size": 4, "eot": None})
    code, out, err = run(capsys, "--checkpoint", path, "--max-tokens", 9)
    assert code == 0 and len(out) == 10 and set(out[:-1]) <= set("ACGT") and "starts after 'A'" in err
    code, out, err = run(capsys, "--checkpoint", path, "--max-tokens", 9, "--prompt", "GAT")
    assert code == 0 and out.startswith("GAT") and len(out) == 13 and "starts after" not in err
    assert "starts after" not in run(capsys, "--checkpoint", save(tmp_path / "text", CHARS))[2]


def test_a_prompt_past_the_vocabulary(tmp_path, capsys):
    path = save(tmp_path, {"tokenizer": {"kind": "byte"}, "vocab_size": 100, "eot": None})
    assert text_of(capsys, "--checkpoint", path, "--prompt", "ab\r", "--max-tokens", 2).startswith("ab\r")
    assert "has a token past the 100 that the model knows" in error_of(capsys, "--checkpoint", path, "--prompt", "z")


def test_redirected_text_is_the_bytes_as_they_are(tmp_path, capsys):
    """Carriage returns, escapes and bytes that are no UTF-8, of the prompt and of the model."""
    path = save(tmp_path, BYTES)
    prompt = b"a\r\nb\x1b[0m\xff\xe2\x82"
    flags = ["--checkpoint", path, "--prompt", prompt.decode(errors="surrogateescape"), "--max-tokens", 200]
    out = text_of(capsys, *flags, "--temperature", 3).encode(errors="surrogateescape")
    start = generate.use_newest(path, lambda p, meta: generate.prepare(
        generate.parse([*map(str, flags[2:]), "--temperature", "3"]), p, meta))
    assert start.prompt == [256, *prompt]
    tokens = generate.sample(start.decoder, start.prompt, BYTES, generate.parse(
        ["--max-tokens", "200", "--temperature", "3"]), generator())
    assert out == prompt + bytes(tokens) + b"\n" and len(out) > 60 and len(set(out)) > 30


class Terminal(io.TextIOWrapper):
    def isatty(self):
        return True


def test_on_a_terminal_controls_are_replaced(tmp_path, monkeypatch):
    path, stream = save(tmp_path, BYTES), Terminal(io.BytesIO(), encoding="utf-8", newline="")
    monkeypatch.setattr(sys, "stdout", stream)
    flags = ["--checkpoint", str(path), "--prompt", "a\r\nb\x1b[0mé", "--max-tokens", "300", "--temperature", "3"]
    assert generate.main(["--device", "cpu", *flags]) == 0
    text = stream.buffer.getvalue().decode("utf-8")
    assert text.startswith("a\ufffd\nb\ufffd[0mé") and not set(generate.CONTROLS) & set(map(ord, text))


@pytest.mark.parametrize("vocab, prompt", [(BYTES, "def é("), (CHARS, "ab é€")])
def test_the_prompt_comes_before_the_text(tmp_path, capsys, vocab, prompt):
    path = save(tmp_path, vocab)
    out = text_of(capsys, "--checkpoint", path, "--prompt", prompt, "--max-tokens", 20)
    assert out.startswith(prompt) and len(out) > len(prompt) + 3 and out.endswith("\n")


# --- checkpoints


def place_of(place: Path) -> Path:
    return generate.use_newest(place, lambda path, meta: path)


def test_the_newest_checkpoint_of_a_step_run_experiment_or_log_folder(tmp_path):
    """By meta.json's `saved`, never by a file's time, which copies lose."""
    names = [("a/run1", 5), ("a/run2", 2), ("a/run1", 10), ("b/run1", 1)]
    paths = [save(tmp_path / "logs" / run, BYTES, step=step) for run, step in names]
    for i, path in enumerate(paths):
        os.utime(path, (1000 - i, 1000 - i))
        os.utime(path / "meta.json", (1000 - i, 1000 - i))
    shutil.copytree(paths[2], paths[2].with_name("step_000011.tmp"))
    (paths[2].parent / "step_000012").mkdir()
    assert [place_of(path) for path in paths] == paths
    assert place_of(paths[2].parent) == place_of(paths[2].parent.parent) == paths[2]
    assert place_of(tmp_path / "logs" / "a") == paths[2] and place_of(tmp_path / "logs") == paths[3]
    shutil.rmtree(paths[3])
    paths[2].rename(paths[2].with_name("step_000010.old"))
    assert place_of(tmp_path / "logs") == paths[2].with_name("step_000010.old"), "while it is replaced"


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
    lambda path: (path / "meta.json").write_text("[]"), lambda path: (path / "meta.json").write_text("[" * 10**5),
    lambda path: ((path / "state.pt").unlink(), os.mkfifo(path / "state.pt")),
    lambda path: ((path / "meta.json").unlink(), os.mkfifo(path / "meta.json")),
    lambda path: ((path / "state.pt").unlink(), (path / "state.pt").symlink_to("/dev/zero")),
])
def test_damaged_checkpoints_are_one_sentence(tmp_path, capsys, harm):
    """Of a run the one before it is taken, of a checkpoint that is named itself no other."""
    before = save(tmp_path, BYTES, step=5)
    path = save(tmp_path, BYTES)
    harm(path)
    error = error_of(capsys, "--checkpoint", path)
    assert (f"checkpoint {path} cannot be used" in error) == (path / "meta.json").exists(), error
    code, _, err = run(capsys, "--checkpoint", tmp_path, "--max-tokens", 3)
    assert code == 0 and f"{before}: cpu" in err and err.count("cannot be used") == (path / "meta.json").exists()


HUGE = [10**6, 2**31, 10**12, 10**18]
ODD = [None, "x", -1, 2.5, [], {}, True, "\x1b[2J"]
HARMLESS = [("eval_window", 0), ("eval_window", 10**6), ("window_step", 10**6), ("eval_seq_len", 0),
            ("ngram_rows", 0), ("pointer", 0), ("qk_dim", 0), ("eval_seq_len", 10**6), ("softcap", [0]),
            ("rope_base", 7), ("rope_base", 2.5), ("skip", "x"), ("skip", "L" * 10**6), ("skip", "\x1b[2J"),
            ("seq_len", [0]), ("stage_ends", [0]), ("stage_ends", [-1.0]),
            ("stage_ends", [10**12, 10**12])]  # nothing reads them here, or any value will do
NUMERIC = ("num_layers", "width", "head_dim", "mlp_ratio", "value_embeds", "ngram_rows", "pointer", "qk_dim",
           "eval_seq_len", "eval_window", "window_step")
OTHERS = ("attention", "skip", "softcap", "seq_len", "window", "stage_ends", "rope_base")
SETTINGS = [(name, value) for name in NUMERIC for value in [0, *ODD, *HUGE]]
SETTINGS += [(name, value) for name in OTHERS
             for value in [7, [7, "x"], [[]], [-1.0], [10**12, 10**12], [0], "L" * 10**6, *ODD]]
SETTINGS = [pair for pair in SETTINGS if pair not in HARMLESS]
DATA = [{"vocab_size": value} for value in (0, 1, 1000, 10**12, *ODD)]
DATA += [{"eot": value} for value in (257, 10**12, "256", 255.5, -5, [], True)]
DATA += [{"tokenizer": value} for value in (*ODD, {"kind": 3}, {"kind": "morse"}, {"kind": "char"},
                                            {"kind": "char", "chars": 7}, {"kind": "char", "chars": "ab"},
                                            {"kind": "char", "chars": "\n" * 300}, {"kind": "tiktoken"},
                                            {"kind": "char", "chars": "\ud800" + "".join(map(chr, range(300)))},
                                            {"kind": "tiktoken", "name": ["gpt2"]},
                                            {"kind": "tiktoken", "name": "no\x1b[2J"})]
METAS = [{"settings": value} for value in ODD if value != {}]
METAS += [{"data": {"fingerprint": "", "meta": value}} for value in ODD]
METAS += [{name: value} for name in ("script", "step", "data") for value in ODD]
METAS += [{"script": name} for name in ("os.py", "../train_gpt.py", "train_missing.py", "train_gpt", "train_gpt.py\n",
                                        "", "train_grokking.py", "train_\x1b[2J.py")]


def change_meta(path: Path, **changes):
    meta = json.loads((path / "meta.json").read_text())
    for name, value in changes.items():
        meta[name] = meta[name] | value if isinstance(value, dict) and value and name == "settings" else value
    (path / "meta.json").write_text(json.dumps(meta))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """A run with checkpoints of steps 5 and 10."""
    root = tmp_path_factory.mktemp("two")
    save(root, BYTES, settings(num_layers=2, attention="LS"), step=5)
    return save(root, BYTES, settings(num_layers=2, attention="LS"), step=10).parent.parent


def falls_back(capsys, run_folder: Path, **changes):
    """The checkpoint of step 10 with these changes of its meta.json is passed over, with a sentence."""
    path = run_folder / "checkpoints" / "step_000010" / "meta.json"
    before = path.read_bytes()
    change_meta(path.parent, **changes)
    try:
        code, out, err = run(capsys, "--checkpoint", run_folder, "--max-tokens", 2)
    finally:
        path.write_bytes(before)
    assert code == 0 and "step_000010 cannot be used" in err and "step_000005: cpu, " in err, err
    assert "\x1b" not in err and len(err) < 2000 and "Traceback" not in err, err


@pytest.mark.parametrize("name, value", SETTINGS, ids=lambda value: f"{value!r:.20}".replace("\x1b", "ESC"))
def test_settings_that_state_pt_does_not_fit(two, capsys, name, value):
    falls_back(capsys, two, settings={name: value})


@pytest.mark.parametrize("changes", DATA, ids=lambda value: f"{value!r:.60}")
def test_vocabularies_that_are_none(two, capsys, changes):
    falls_back(capsys, two, data={"fingerprint": "", "meta": BYTES | changes})


@pytest.mark.parametrize("changes", METAS, ids=lambda value: f"{value!r:.60}")
def test_metas_that_are_none(two, capsys, changes):
    falls_back(capsys, two, **changes)


def rewrite(path: Path, change):
    """state.pt with other content, whose hash is right."""
    state = torch.load(path / "state.pt", weights_only=True)
    torch.save(change(state), path / "state.pt")
    change_meta(path, sha256=train_gpt.file_hash(path / "state.pt"), bytes=(path / "state.pt").stat().st_size)


def change_weights(change):
    def apply(state):
        weights = state["optimizer"]["state"]["master"]
        state["optimizer"]["state"]["master"] = change(weights)
        return state
    return apply


def first(weights: dict) -> str:
    return next(name for name in weights if name.startswith("blocks"))


@pytest.mark.parametrize("change", [
    lambda state: [], lambda state: {}, lambda state: {"optimizer": 3}, lambda state: {"model": {}},
    lambda state: torch.zeros(3), lambda state: "\x1b[2J",
    change_weights(lambda w: []), change_weights(lambda w: {}),
    change_weights(lambda w: {**w, "more\x1b": torch.zeros(1)}),
    change_weights(lambda w: {k: v for k, v in w.items() if k != first(w)}),
    change_weights(lambda w: {**w, first(w): 3}), change_weights(lambda w: {**w, first(w): w[first(w)][..., :-1]}),
    change_weights(lambda w: {**w, first(w): w[first(w)].double()}),
    change_weights(lambda w: {**w, first(w): w[first(w)].bool()}),
    change_weights(lambda w: {**w, first(w): w[first(w)].to_sparse()}),
    change_weights(lambda w: {k: v.view(-1)[:1].clone().expand(v.numel()).view(v.shape) for k, v in w.items()}),
    change_weights(lambda w: {k: v * float("nan") for k, v in w.items()}),
    change_weights(lambda w: dict(enumerate(w.values()))),
])
def test_wrong_content_whose_hash_is_right(tmp_path, capsys, change):
    before, path = (save(tmp_path, BYTES, settings(num_layers=2, attention="LS"), step=step) for step in (5, 10))
    rewrite(path, change)
    assert f"checkpoint {path} cannot be used" in error_of(capsys, "--checkpoint", path)
    code, _, err = run(capsys, "--checkpoint", tmp_path, "--max-tokens", 2)
    assert code == 0 and f"{before}: cpu" in err and "\x1b" not in err, err
    rewrite(before, change)
    assert f"checkpoint {before} cannot be used" in run(capsys, "--checkpoint", tmp_path)[2]


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2**70, 2**70) | st.floats() | st.text(max_size=9),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None,
                     suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(sorted(dataclasses.asdict(settings()))), JSON, min_size=1), JSON, JSON)
def test_any_settings_and_vocabulary_end_in_a_text_or_a_sentence(two, capsys, changes, value, tokenizer):
    path = two / "checkpoints" / "step_000010" / "meta.json"
    before = path.read_bytes()
    try:
        for data in (BYTES, BYTES | {"eot": value}, BYTES | {"tokenizer": tokenizer}):
            path.write_bytes(before)
            change_meta(path.parent, settings=changes, data={"fingerprint": "", "meta": data})
            code, _, err = run(capsys, "--checkpoint", path.parent, "--max-tokens", 2)
            assert code in (0, 1) and "Traceback" not in err, err
    finally:
        path.write_bytes(before)


def test_control_characters_of_a_checkpoint_reach_no_terminal(tmp_path, capsys):
    path = save(tmp_path / "run\x1b[31m", BYTES, settings=dataclasses.asdict(settings()) | {"old\x9b": 1})
    code, _, err = run(capsys, "--checkpoint", path, "--max-tokens", 2)
    assert code == 0 and "\\x1b[31m" in err and "old\\x9b" in err and not {"\x1b", "\x9b"} & set(err), err
    (path / "state.pt").write_bytes(b"")
    assert "\x1b" not in error_of(capsys, "--checkpoint", path)


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
    (["--temperature", "1e400"], ["--temperature 1e400: expected"]),
    (["--num-samples", str(10**18), "--top-k", str(2**40)], ["--num-samples 1000000000000000000:", "--top-k 1099511"]),
    (["--seed", "9" * 5000, "--max-tokens", "1e-3"], ["--seed 99999", "--max-tokens 1e-3: expected"]),
    (["--seed", str(2**63)], ["--seed 9223372036854775808: expected"]),
    (["--num_samples", "0"], ["--num-samples 0: expected an integer from 1"]),
    (["--max-tokens", "1000000000000"], ["--max-tokens 1000000000000: expected an integer from 1 to 100000"]),
    (["--seed", "-1"], ["--seed -1: expected"]),
    (["--device", "tpu"], ["--device tpu: expected auto, cpu, cuda or mps"]),
    (["--top-k", "-3", "--seed", "x", "--device", "tpu"], ["--top-k -3", "--seed x", "--device tpu"]),
    (["--temprature", "1"], ["--temprature"]),
    (["--prompt"], ["--prompt: expected one argument"]),
], ids=str)
def test_wrong_flags_are_named_all_at_once(capsys, flags, problems):
    error = error_of(capsys, *flags)
    assert all(problem in error for problem in problems) and len(error) < 400, error


def test_1e3_is_a_whole_number_and_large_seeds_are_exact():
    args = generate.parse(["--max-tokens", "1e3", "--seed", str(2**63 - 1), "--temperature", "1"])
    assert (args.max_tokens, args.seed, args.temperature) == (1000, 2**63 - 1, 1.0)
    assert type(args.max_tokens) is int and type(args.temperature) is float


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate "
                                                               "memory: you tried to allocate 9 bytes.\nframe #0")])
def test_out_of_memory_is_one_sentence(tmp_path, capsys, monkeypatch, error):
    def fail(*_):
        raise error

    path = save(tmp_path, BYTES)
    monkeypatch.setattr(generate, "read_state", fail)
    monkeypatch.setattr(generate, "build_model", fail)
    assert error_of(capsys, "--checkpoint", path).startswith("error: out of memory: lower --max-tokens")
    monkeypatch.undo()
    monkeypatch.setattr(generate, "build_model", fail)
    assert error_of(capsys, "--checkpoint", path).startswith("error: out of memory: lower --max-tokens")


def test_masks_that_are_too_large_are_refused(tmp_path, capsys):
    path = save(tmp_path, BYTES)
    error = error_of(capsys, "--checkpoint", path, "--max-tokens", 100_000, "--no-cache")
    assert "a mask of 100001 x 100001 tokens is too large" in error and "lower --max-tokens" in error


def test_cuda_without_a_cuda_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda: this machine has no usable CUDA device" in error_of(capsys, "--device", "cuda")


def test_characters_that_the_vocabulary_lacks_are_named(tmp_path, capsys):
    path = save(tmp_path, CHARS)
    error = error_of(capsys, "--checkpoint", path, "--prompt", "abzüzX")
    assert "--prompt: 'X', 'z', 'ü' not among the 8 characters that the model knows" in error
    many = error_of(capsys, "--checkpoint", path, "--prompt", "".join(map(chr, range(1000, 9000))))
    assert "and 7989 more not among" in many and len(many) < 300


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
    for name, more in [("tinybytes", {}), ("tinychars", dict(pointer=8, ngram_rows=50, qk_dim=8))]:
        flags = [f"--{key}={value}" for key, value in (tiny | more).items()]
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("target, code, sentence", [
    ("| head -c 1 >/dev/null", 0, ""), ("> /dev/full", 1, "cannot write to stdout: No space left"),
    (">&-", 1, "stdout is closed"), ("2>&-", 0, ""), ("2>/dev/full", 0, ""),
])
def test_a_stdout_that_is_full_or_closed(trained, target, code, sentence):
    """A reader that has seen enough is no error, an interpreter that complains at its end is."""
    command = f"'{sys.executable}' '{ROOT / 'generate.py'}' --num-samples 20 --max-tokens 20 {target}; " \
              "exit ${PIPESTATUS[0]}"
    options = dict(cwd=trained.parent, capture_output=True, text=True, errors="replace")
    result = subprocess.run(["bash", "-c", command], **options)
    assert result.returncode == code and sentence in result.stderr, result.stderr
    assert "Traceback" not in result.stderr and "Exception" not in result.stderr, result.stderr
    assert ("error" in result.stderr) == bool(code), result.stderr
    assert "tokens/s" not in result.stdout, "no note goes to the text"


@pytest.mark.parametrize("script", ["generate.py", "evals/hellaswag.py"])
def test_ctrl_c_while_torch_is_imported_leaves_no_traceback(tmp_path, script):
    """The first import after the script's own lines waits, and says so."""
    (tmp_path / "argparse.py").write_text("import sys, time\nprint('in', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, str(ROOT / script)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate()[1] == "" and process.returncode == -signal.SIGINT


def test_consoles_without_unicode(trained):
    """On a terminal; redirected, the bytes are as they are."""
    command = [sys.executable, "-c", "import sys, generate\nsys.stdout.isatty = lambda: True\nsys.exit(generate.main("
               "sys.argv[1:]))", "--checkpoint", str(trained / "tinychars"), "--max-tokens", "40", "--prompt", "é€"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=environment, capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(rb"\xe9\u20ac") and result.stdout.isascii()
