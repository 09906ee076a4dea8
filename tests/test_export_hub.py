"""export.py: tokenizers against those of the data, and a push to a stand-in for the hub on localhost."""
import base64
import functools
import json
import random
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from encodings_small import VOCAB, encoding, ranks
from test_export import modules  # noqa: F401 - a fixture
from test_generate import BYTES, CHARS, save

import data.common
import export
from data.common import load_tokenizer
from exports import tokenizers

transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")
TEXTS = ["", "a", " the  string\n\n    self.x = return import'll don't 12 345é €漢\t<|endoftext|>", "  \n ", "\x00\x7f"]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    parts = [" ", "  ", "\n", "the", " the", "ing", "12", "'s", "'LL", "é", "€", "漢字", "!?", "\u00a0", "\U0001f600"]
    return "".join(rng.choice(parts) for _ in range(60))


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(data.common, "named_encoding", lambda name: encoding())


def written(folder: Path, vocab: dict):
    folder.mkdir()
    tokenizers.write_tokenizer(folder, vocab, 99)
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("vocab", [BYTES, VOCAB], ids=["bytes", "GPT-2's"])
def test_tokens_of_texts_are_those_of_the_data_and_begin_with_eot(tmp_path, small, vocab):
    own = load_tokenizer(vocab)
    tokenizer = written(tmp_path / "hf", vocab)
    assert tokenizer.model_max_length == 99 and tokenizer.bos_token_id == tokenizer.eos_token_id == vocab["eot"]
    for text in TEXTS + [random_text(seed) for seed in range(50)]:
        if "<|endoftext|>" in text:
            parts = text.split("<|endoftext|>")  # special in transformers, where a prompt may spell it
            expected = [*own.encode(parts[0]), vocab["eot"], *own.encode(parts[1])]
        else:
            expected = own.encode(text)
        found = tokenizer(text)["input_ids"]
        assert found == [vocab["eot"], *expected], text
        assert tokenizer.decode(found, skip_special_tokens=True) == text.replace("<|endoftext|>", "")


def test_characters_are_tokens(tmp_path):
    tokenizer, text = written(tmp_path / "hf", CHARS), "\n ab cdé€a"
    assert tokenizer(text)["input_ids"] == load_tokenizer(CHARS).encode(text)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text and tokenizer("aXb")["input_ids"] == [2, 3]
    assert tokenizer.eos_token_id is None and len(tokenizer) == 8


def test_merges_are_found_again():
    """Of each token the two that its own encoding merges last; a token that no merge makes is refused."""
    known = ranks()
    assert tokenizers.halves(b" the", known) == (b" th", b"e") and tokenizers.halves(b"in", known) == (b"i", b"n")
    with pytest.raises(ValueError, match="not merged from two earlier ones"):
        tokenizers.halves(b"xyz", {**known, b"xyz": 999})


def test_end_of_text_has_its_number(tmp_path, small):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="63, is a token of its texts"):
        tokenizers.write_tokenizer(tmp_path / "hf", BYTES | {"eot": 63}, 9)


# --- push


class Hub(BaseHTTPRequestHandler):
    """A repository that takes one commit, as far as upload_folder asks."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        body, path = self.rfile.read(int(self.headers["Content-Length"])), self.path
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self.reply(401, {"error": "Invalid username or password."})
        if path == "/api/repos/create":
            self.server.created = json.loads(body)
            return self.reply(200, {"url": f"{self.server.address}/me/tiny", "id": "me/tiny"})
        if path == "/api/models/me/tiny/preupload/main":
            files = json.loads(body)["files"]
            return self.reply(200, {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                                              for file in files]})
        if path == "/api/models/me/tiny/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return self.reply(200, {"commitUrl": f"{self.server.address}/me/tiny/commit/{'c' * 40}",
                                    "commitOid": "c" * 40, "success": True})
        return self.reply(200, {})

    def do_GET(self):
        self.reply(200, {"id": "me/tiny", "sha": "c" * 40, "siblings": []})

    def reply(self, status: int, value: dict):
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.address, server.files = f"http://127.0.0.1:{server.server_address[1]}", {}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def push(hub, tmp_path: Path, monkeypatch, token: str) -> int:
    api = functools.partial(huggingface_hub.HfApi, endpoint=hub.address, token=token)
    with monkeypatch.context() as patched:
        patched.setattr(huggingface_hub, "HfApi", api)
        return export.main(["--checkpoint", str(tmp_path / "runs"), "--out", str(tmp_path / token), "--push", "me/tiny",
                            "--private", "--licence", "cc-by-4.0"])


def test_a_push_takes_all_files_and_a_refused_one_keeps_the_folder(hub, tmp_path, monkeypatch, capsys):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    save(tmp_path / "runs", BYTES)
    assert push(hub, tmp_path, monkeypatch, "hf_test") == 0, capsys.readouterr()
    assert capsys.readouterr().out.strip().endswith("https://huggingface.co/me/tiny")
    assert hub.files == {path.name: path.read_bytes() for path in (tmp_path / "hf_test").iterdir()}
    assert len(hub.files) == 7 and hub.created["name"] == "tiny" and "me" in str(hub.created)
    said = hub.files["README.md"].decode()
    assert said.startswith("---\nlibrary_name: transformers\n") and "\nlicense: cc-by-4.0\n" in said
    assert 'folder = "me/tiny"' in said
    assert push(hub, tmp_path, monkeypatch, "hf_other") == 1
    out, err = capsys.readouterr()
    assert out == "" and "cannot be pushed to me/tiny" in err and "hf auth login" in err and "Traceback" not in err
    assert len(list((tmp_path / "hf_other").iterdir())) == 7
