"""generate.py --interactive: lines, commands, the text that is kept, Ctrl-C and Ctrl-D, on a terminal and in a pipe."""
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import environment
from test_generate import BYTES, CHARS, random_model, save, settings
from test_logger_watch import Screen

import generate
from data.common import BPETokenizer, CharTokenizer, byte_encoding

ROOT = Path(__file__).resolve().parents[1]


class Echo:
    """A decoder that remembers what it was given, and whose next token is the last one plus 1, or as `then` says."""

    def __init__(self, then=None):
        self.seen, self.then, self.device = [], then or {}, "cpu"

    def restart(self):
        self.seen.append([])

    def __call__(self, new):
        self.seen[-1] += new
        logits = torch.full((300,), -1e9)
        following = self.then.get(new[-1], (new[-1] + 1) % 256)
        if following == "interrupt":
            raise KeyboardInterrupt
        logits[following] = 0
        return logits


def session(decoder, longest=20, max_tokens=3, vocab=BYTES, tokenizer=None):
    args = SimpleNamespace(temperature=0.8, top_k=0, seed=0, max_tokens=max_tokens, num_samples=1, device="cpu")
    start = generate.Start(Path("x"), vocab, tokenizer or BPETokenizer(byte_encoding()), [], decoder)
    return generate.Session(start, args, longest)


@pytest.fixture
def told(capfdbinary):
    def take():
        out, err = capfdbinary.readouterr()
        return out.decode(), err.decode()
    return take


# --- the text that is kept


def test_each_line_continues_the_text_so_far(told):
    s = session(decoder := Echo())
    s.answer("a")
    s.answer("x")
    s.answer("")
    assert told()[0] == "bcd\nyz{\n|}~\n"
    assert decoder.seen[1][:6] == [256, *b"abcdx"] and decoder.seen[2][:9] == [256, *b"abcdxyz{"]


def test_of_a_long_text_the_model_sees_what_leaves_room_for_the_new_tokens(told):
    s = session(decoder := Echo(), longest=10, max_tokens=4)
    s.answer("abc")
    s.answer("0123")
    assert decoder.seen[1][:6] == [256, *b"g0123"]  # 10 - 4 new ones - eot
    assert max(map(len, decoder.seen)) <= 10 and told()[1] == ""
    s.answer("0123456789")
    assert decoder.seen[2][:6] == [256, *b"56789"] and "sees the last 5" in told()[1]


def test_without_history_and_after_reset_a_line_starts_anew(told):
    s = session(decoder := Echo())
    for line in ("a", "/reset", "b", "/history off", "c", "d", "/history on", "e"):
        s.answer(line)
    assert [seen[:2] for seen in decoder.seen[:4]] == [[256, *b"a"], [256, *b"b"], [256, *b"c"], [256, *b"d"]]
    assert decoder.seen[4][:6] == [256, *b"defge"]


def test_an_end_of_text_starts_a_new_one(told):
    s = session(decoder := Echo({ord("b"): 256}))
    s.answer("a")
    s.answer("x")
    assert told() == ("b\nyz{\n", "(end of text)\n") and decoder.seen[1][:2] == [256, *b"x"]


def test_ctrl_c_stops_a_sample_and_keeps_what_was_shown(told):
    s = session(decoder := Echo({ord("b"): "interrupt"}))
    s.answer("a")
    s.answer("x")
    assert told() == ("b\nyz{\n", "(stopped)\n") and decoder.seen[1][:4] == [256, *b"abx"]


def test_without_eot_an_empty_text_starts_with_a_newline(told):
    tokenizer = CharTokenizer(CHARS["tokenizer"]["chars"])
    s = session(decoder := Echo({0: 2, 2: 3, 3: 4}), vocab=CHARS, tokenizer=tokenizer)
    s.answer("")
    assert decoder.seen[0][0] == 0 and told()[0] == "abc\n"
    s.answer("aX")
    assert told() == ("", "'X' not among the 8 characters that the model knows\n")
    assert s.text == [2, 3, 4]  # as before


class Words:
    """Stands for GPT-2's tokenizer, whose files tests do not have: tokens of several bytes, cut within a character."""

    encoding = SimpleNamespace(n_vocab=300)
    table = {0: b"The ", 1: b"\xe2\x82", 2: b"\xac!", 3: b" end"}

    def encode(self, text):
        return [0] if text == "The " else [3]

    def decode_bytes(self, ids):
        return b"".join(self.table[i] for i in ids)


def test_a_tokenizer_of_several_bytes_a_token(told):
    vocab = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 4, "eot": None}
    s = session(decoder := Echo({0: 1, 1: 2, 2: 3}), vocab=vocab, tokenizer=Words())
    s.answer("The ")
    assert told()[0] == "€! end\n" and decoder.seen == [[0, 1, 2]]


# --- commands


def test_settings_change_by_commands_within_their_bounds(told):
    s = session(Echo(), longest=20)
    lines = {"/temperature 0.7": "temperature 0.7", "/top_k 5": "top_k 5", "/top-k": "top_k 5", "/seed 3": "seed 3",
             "/max_tokens 19": "max_tokens 19", "/max_tokens 20": "/max_tokens 20: expected an integer from 1 to 19",
             "/temperature hot": "/temperature hot: expected a number from 0 to 1000",
             "/history maybe": "/history maybe: expected on or off"}
    for line, said in lines.items():
        s.answer(line)
        assert told() == ("", f"{said}\n")
    assert (s.args.temperature, s.args.top_k, s.args.seed, s.args.max_tokens) == (0.7, 5, 3, 19)


def test_unknown_commands_name_the_known_ones_and_help_lists_them(told):
    s = session(Echo())
    s.answer("/bye")
    text = told()[1]
    s.answer("/help")
    listed = told()[1]
    for name in ("help", "reset", "history", "temperature", "top_k", "seed", "max_tokens"):
        assert f"/{name}" in text and f"/{name}" in listed
    assert "/quit" in text and "/quit" in listed and "num_samples" not in text + listed


def test_two_slashes_stand_for_one(told):
    s = session(decoder := Echo())
    s.answer("//a")
    assert decoder.seen[0][:3] == [256, *b"/a"]


def test_a_seed_makes_the_same_text_again(told):
    class Uniform(Echo):
        def __call__(self, new):
            return torch.zeros(256)

    s = session(Uniform(), longest=100, max_tokens=30)
    texts = []
    for line in ("/seed 5", "a", "/reset", "/seed 5", "a", "/reset", "a"):
        before = len(s.text)
        s.answer(line)
        texts += [s.text[before:]] if line == "a" else []
    assert texts[0] == texts[1] != texts[2]


# --- lines


@pytest.fixture
def lines(monkeypatch):
    def take(text):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return list(generate.read_lines())
    return take


def test_lines_of_a_pipe(lines):
    assert lines("a\n\nb \\\nc\\\n\nlast") == ["a", "", "b \nc\n", "last"] and lines("") == []


@pytest.mark.parametrize("given, expected", [
    ({"max_doc_len": [256, 1024], "seq_len": [4096]}, 1024), ({"max_doc_len": 0, "seq_len": 512}, 512),
    ({"max_doc_len": [100_000]}, generate.MAX_PROMPT), ({}, 256), ({"seq_len": "x"}, 256),
])
def test_the_length_of_a_text_is_that_of_training(given, expected):
    assert generate.row_length(given) == expected


# --- the program


@pytest.fixture
def call(capfdbinary, monkeypatch):
    """A call of the program with bytes on stdin: exit code, stdout, stderr."""
    def run(folder, text, *flags):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        code = generate.main(["--checkpoint", str(folder), "--interactive", "--device", "cpu", *flags])
        return code, *capfdbinary.readouterr()
    return run


@pytest.mark.parametrize("vocab, line", [(BYTES, b"d\xff\xc3"), (CHARS, "a€".encode())], ids=["bytes", "chars"])
def test_a_pipe_gets_the_texts_only(tmp_path, vocab, line, call):
    save(tmp_path / "run", vocab, model=random_model(settings(), vocab["vocab_size"]))
    code, out, notes = call(tmp_path / "run", line + b"\n/temperature 0\n\n/bye\n/quit\n/seed\n", "--max-tokens", "9")
    told = notes.decode().splitlines()
    assert code == 0 and told[1] == "temperature 0.0" and told[2].startswith("/bye is none of") and len(told) == 3
    again = call(tmp_path / "run", line + b"\n/temperature 0\n\n", "--max-tokens", "9")
    assert again[1] == out and len(out) > 10


def test_one_sentence_for_what_cannot_be(tmp_path, call, capfdbinary):
    code, out, err = call(tmp_path, b"")
    assert (code, out) == (1, b"") and err.startswith(b"error: no checkpoint in") and err.count(b"\n") == 1
    code, out, err = call(tmp_path, b"", "--num-samples", "3")
    assert (code, out) == (1, b"") and b"--num-samples: --interactive makes one text" in err


def test_the_prompt_flag_is_the_first_line_and_max_tokens_leave_half_the_length(tmp_path, call):
    save(tmp_path / "run", BYTES, s=settings(max_doc_len=(64,)))
    code, out, err = call(tmp_path / "run", b"/max_tokens\n/max_tokens 64\n", "--prompt", "ab")
    assert code == 0 and b"max_tokens 32\n" in err and b"from 1 to 63\n" in err and len(out) > 1


class Chat(Screen):
    """`generate.py --interactive` on a pseudo-terminal."""

    program = ("generate.py", "--interactive", "--device", "cpu")


def test_on_a_terminal(tmp_path):
    """A history of lines, Ctrl-C at the prompt and in a sample, Ctrl-D."""
    save(tmp_path / "run", CHARS, model=random_model(settings(), 8))
    chat = Chat("--checkpoint", tmp_path / "run", "--max-tokens", "30000")
    try:
        chat.until("> ")
        chat.send("/seed 7\n", "seed 7\r\n> ")
        chat.send("\x1b[A", "/seed 7")  # the line before
        chat.send("\n", "seed 7\r\n> ")
        chat.send("abc", "abc")
        chat.interrupt("> ")
        chat.send("a\n", "a\r\n")
        chat.text = ""
        while len(chat.text) < 40:  # it writes
            chat.text += os.read(chat.terminal, 100).decode(errors="replace")
        chat.interrupt("(stopped)\r\n\r\n> ")
        chat.send("/top_k 3\n", "\ntop_k 3\r\n> ")
        os.write(chat.terminal, b"\x04")
        text, code = chat.end()
    finally:
        chat.process.kill()
    assert code == 0 and "Traceback" not in text


def test_sigint_in_a_pipe_stops_a_sample_only(tmp_path):
    save(tmp_path / "run", CHARS, model=random_model(settings(), 8))
    argv = [sys.executable, str(ROOT / "generate.py"), "--checkpoint", str(tmp_path / "run"), "--interactive",
            "--device", "cpu", "--max-tokens", "30000"]
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               env=environment())
    process.stdin.write(b"a\n/max_tokens 2\nb\n")
    process.stdin.flush()
    assert len(process.stdout.read(20)) == 20
    process.send_signal(signal.SIGINT)
    _, notes = process.communicate(timeout=300)
    assert process.returncode == 0 and b"(stopped)" in notes and b"max_tokens 2\n" in notes
