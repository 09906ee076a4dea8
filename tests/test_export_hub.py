"""export.py: tokenizers against those of the data, and a push to a stand-in for the hub on localhost."""
import base64
import json
import os
import random
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from encodings_small import VOCAB, encoding, ranks
from helpers import environment
from test_generate import BYTES, CHARS, save

import data.common
from data.common import load_tokenizer
from exports import tokenizers

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["", "a", " the  string\n\n    self.x = return import'll don't 12 345é €漢\t<|endoftext|>", "  \n ", "\x00\x7f"]


def random_text(seed: int) -> str:
    rng = random.Random(seed)
    parts = [" ", "  ", "\n", "the", " the", "ing", "12", "'s", "'LL", "é", "€", "漢字", "!?", "\u00a0", "\U0001f600", "\t"]
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
    assert tokenizers.halves(b" the", known) == (b" th", b"e") and tokenizers.halves(b"ll", known) == (b"l", b"l")
    with pytest.raises(ValueError, match="not merged from two earlier ones"):
        tokenizers.halves(b"xyz", {**known, b"xyz": 999})


def test_end_of_text_has_its_number(tmp_path, small):
    (tmp_path / "hf").mkdir()
    with pytest.raises(ValueError, match="in the data it is 63"):
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
            return self.reply(200, {"files": [{"path": file["path"], "uploadMode": "regular"} for file in files]})
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


def push(hub, tmp_path: Path, token: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, as the hub's address is read at the import."""
    env = environment(HF_ENDPOINT=hub.address, HF_TOKEN=token, HF_HOME=str(tmp_path / "home"), NO_PROXY="127.0.0.1",
                      no_proxy="127.0.0.1", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_PROGRESS_BARS="1")
    command = [sys.executable, str(ROOT / "export.py"), "--checkpoint", str(tmp_path / "runs"), "--out",
               str(tmp_path / f"hf_{token}"), "--push", "me/tiny", "--private", "--licence", "cc-by-4.0"]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)


def test_a_push_takes_all_files_and_a_refused_one_keeps_the_folder(hub, tmp_path):
    save(tmp_path / "runs", BYTES)
    done = push(hub, tmp_path, "hf_test")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("https://huggingface.co/me/tiny")
    folder = tmp_path / "hf_hf_test"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()} and len(hub.files) == 7
    assert hub.created["name"] == "tiny" and hub.created.get("private", True) is not False
    said = hub.files["README.md"].decode()
    assert said.startswith("---\nlibrary_name: transformers\n") and "\nlicense: cc-by-4.0\n" in said
    assert 'folder = "me/tiny"' in said
    refused = push(hub, tmp_path, "hf_other")
    assert refused.returncode == 1 and refused.stdout == "" and "Traceback" not in refused.stderr
    assert "cannot be pushed to me/tiny" in refused.stderr and "hf auth login" in refused.stderr
    assert len(list((tmp_path / "hf_hf_other").iterdir())) == 7 and os.listdir(tmp_path / "hf_hf_other")
