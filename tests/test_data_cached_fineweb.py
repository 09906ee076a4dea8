"""Downloading shards, against a stand-in for the Hugging Face hub on localhost: data/cached_fineweb.py."""

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import cached_fineweb  # noqa: E402
import common  # noqa: E402

PINNED = cached_fineweb.VERSIONS["10B"].revision
NAMES = ["fineweb_val_000000.bin", *(f"fineweb_train_{index:06d}.bin" for index in (1, 2, 3))]


def shard_bytes(tokens):
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens)
    return header.tobytes() + np.asarray(tokens, dtype="<u2").tobytes()


class Hub(ThreadingHTTPServer):
    """Serves `files` of one dataset repository at any revision in `commits`, as far as hf_hub_download asks.

    spoiled: {name: times} to serve a shard without its last token. broken: names whose next body ends half way, when
    `go_on` is set. gets: (name, first byte) of every body asked for.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        generator = np.random.default_rng(0)
        self.files = {name: shard_bytes(generator.integers(0, 50257, 3000 + n)) for n, name in enumerate(NAMES)}
        self.repo = "kjj0/fineweb10B-gpt2"
        self.commits = {PINNED: PINNED}
        self.spoiled, self.broken, self.gets = {}, set(), []
        self.go_on = threading.Event()

    def endpoint(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub = self.server
        match = re.fullmatch(rf"/datasets/{hub.repo}/resolve/([^/]+)/(.+)", self.path)
        if not match or match[1] not in hub.commits:
            return self.refuse("RevisionNotFound" if match else "RepoNotFound")
        if match[2] not in hub.files:
            return self.refuse("EntryNotFound")
        self.serve(match[2], hub.commits[match[1]], body)

    def refuse(self, code):
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def serve(self, name, commit, body):
        hub = self.server
        raw = hub.files[name]
        if hub.spoiled.get(name, 0) > 0:
            raw = raw[:-2]
            hub.spoiled[name] -= body
        asked = self.headers.get("Range")
        start = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        self.send_response(206 if asked else 200)
        self.send_header("ETag", f'"{hashlib.sha256(raw).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{len(raw) - 1}/{len(raw)}")
        self.send_header("Content-Length", str(len(raw) - start))
        self.end_headers()
        if body:
            hub.gets.append((name, start))
            self.send_body(name, raw[start:])

    def send_body(self, name, raw):
        if name in self.server.broken:
            self.server.broken.remove(name)
            self.wfile.write(raw[: len(raw) // 2])
            self.server.go_on.wait(60)
            self.close_connection = True
        else:
            self.wfile.write(raw)


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def start(endpoint, out, *args, count=2):
    """Start the script without any network but the endpoint, and without GPT-2's vocabulary files."""
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out.parent / "hf")}
    env |= {"TIKTOKEN_CACHE_DIR": str(out.parent / "no_tiktoken"), "HTTPS_PROXY": "http://127.0.0.1:9"}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "data" / "cached_fineweb.py"), str(count), "--out", str(out), *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def download(*args, **kwargs):
    process = start(*args, **kwargs)
    stdout, stderr = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)


def shards(out):
    return {path.name: path.read_bytes() for path in out.glob("*.bin")}


def served(hub, *names):
    return {name: hub.files[name] for name in names}


def assert_one_error(result, *words):
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert last.startswith("error: ") and all(word in last for word in words), last


def test_download_then_extend(hub, tmp_path):
    out = tmp_path / "fineweb10B"
    result = download(hub.endpoint(), out)
    assert result.returncode == 0, result.stderr
    assert shards(out) == served(hub, *NAMES[:3])
    meta = json.loads((out / "meta.json").read_text())
    assert {key: meta[key] for key in common.GPT2_VOCAB} == common.GPT2_VOCAB and meta["name"] == "fineweb10B"
    assert PINNED in meta["source"] and "ODC-By" in meta["source"]
    assert meta["splits"]["train"] == {"tokens": 3001 + 3002, "bytes": None}
    assert meta["splits"]["val"] == {"tokens": 3000, "bytes": None} and "no byte count" in result.stderr
    result = download(hub.endpoint(), out, count=3)
    assert result.returncode == 0 and [name for name, _ in hub.gets] == NAMES
    meta = json.loads((out / "meta.json").read_text())
    assert meta["splits"]["train"]["tokens"] == 3001 + 3002 + 3003


def test_complete_folder_needs_no_network(hub, tmp_path):
    out = tmp_path / "fineweb10B"
    assert download(hub.endpoint(), out).returncode == 0
    (out / "meta.json").unlink()  # as if killed right before it
    result = download("http://127.0.0.1:9", out)
    assert result.returncode == 0 and "0 shards downloaded" in result.stdout
    assert json.loads((out / "meta.json").read_text())["splits"]["val"]["tokens"] == 3000


def test_local_shard_cut_short_is_fetched_again(hub, tmp_path):
    out = tmp_path / "fineweb10B"
    assert download(hub.endpoint(), out).returncode == 0
    hub.gets.clear()
    path = out / NAMES[2]
    path.write_bytes(path.read_bytes()[:-100])
    result = download(hub.endpoint(), out)
    assert result.returncode == 0 and hub.gets == [(NAMES[2], 0)]
    assert "warning: shard" in result.stderr and shards(out) == served(hub, *NAMES[:3])


@pytest.mark.parametrize("killed", [False, True])
def test_shard_cut_off_on_its_way_arrives_whole(hub, tmp_path, killed):
    hub.files[NAMES[1]] = shard_bytes(np.arange(12 * 10**6) % 50257)  # huggingface_hub writes pieces of 10 MB
    hub.broken.add(NAMES[1])
    out = tmp_path / "fineweb10B"
    process = start(hub.endpoint(), out)
    if killed:
        wait_for_piece(out, process)
        process.kill()
        process.communicate()
        assert shards(out) == served(hub, NAMES[0])  # nothing but whole shards is in sight
        process = start(hub.endpoint(), out)
    hub.go_on.set()
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 0, stderr
    assert shards(out) == served(hub, *NAMES[:3])
    assert [name for name, _ in hub.gets] == [NAMES[0], NAMES[1], NAMES[1], NAMES[2]]
    assert killed or hub.gets[2][1] > 0  # a broken connection goes on where it broke
    assert list(out.glob(".cache/**/*.incomplete")) == []


def wait_for_piece(out, process):
    """Wait until a part of a shard is on disk."""
    while process.poll() is None:
        if any(path.stat().st_size > 10**6 for path in out.glob(".cache/**/*.incomplete")):
            return
        time.sleep(0.01)


def test_bad_shard_on_the_hub_is_fetched_once_more(hub, tmp_path):
    hub.spoiled[NAMES[1]] = 1
    out = tmp_path / "fineweb10B"
    result = download(hub.endpoint(), out)
    assert result.returncode == 0, result.stderr
    assert [name for name, _ in hub.gets] == [NAMES[0], NAMES[1], NAMES[1], NAMES[2]]
    assert shards(out) == served(hub, *NAMES[:3])


def test_shard_that_stays_bad_ends_the_run_and_the_next_run_goes_on(hub, tmp_path):
    hub.spoiled[NAMES[1]] = 2
    out = tmp_path / "fineweb10B"
    assert_one_error(download(hub.endpoint(), out), "serves a bad shard twice", NAMES[1])
    assert shards(out) == served(hub, NAMES[0]) and not (out / "meta.json").exists()
    assert download(hub.endpoint(), out).returncode == 0
    assert shards(out) == served(hub, *NAMES[:3])
    assert [name for name, _ in hub.gets].count(NAMES[0]) == 1


def test_branch_is_resolved_to_one_commit_that_the_folder_keeps(hub, tmp_path):
    first, second = "a" * 40, "b" * 40
    hub.commits = {"main": first, first: first}
    out = tmp_path / "fineweb10B"
    assert download(hub.endpoint(), out, "--revision", "main", count=1).returncode == 0
    assert f"at {first};" in json.loads((out / "meta.json").read_text())["source"]
    hub.commits = {"main": second, first: first, second: second}
    result = download(hub.endpoint(), out, count=2)
    assert result.returncode == 0 and f"at {first};" in json.loads((out / "meta.json").read_text())["source"]
    assert_one_error(download(hub.endpoint(), out, "--revision", "main"), first, second, "choose another --out")


def test_no_network_is_one_sentence(tmp_path):
    result = download("http://127.0.0.1:9", tmp_path / "fineweb10B", count=1)
    assert_one_error(result, "cannot download kjj0/fineweb10B-gpt2", "check the network or HF_ENDPOINT")


def test_what_the_hub_lacks_is_one_sentence(hub, tmp_path):
    assert_one_error(download(hub.endpoint(), tmp_path / "a", "--revision", "nope"), "RevisionNotFoundError", "nope")
    assert_one_error(download(hub.endpoint(), tmp_path / "b", "--version", "edu10B"), "kjj0/finewebedu10B-gpt2")
    assert_one_error(download(hub.endpoint(), tmp_path / "c", count=4), "fineweb_train_000004.bin")


@pytest.mark.parametrize("count", [0, 104])
def test_number_of_shards_is_checked_first(tmp_path, count):
    assert_one_error(download("http://127.0.0.1:9", tmp_path / "x", count=count), f"N = {count}", "1 to 103")
    assert not (tmp_path / "x").exists()


def test_folder_made_by_fineweb_py_is_refused(tmp_path):
    out = tmp_path / "fineweb10B"
    out.mkdir()
    bad = out / NAMES[0]
    bad.write_bytes(b"half a shard")
    common.write_json(out / "progress.json", {"settings": {}, "streams": {}})
    assert_one_error(download("http://127.0.0.1:9", out), "do not come from kjj0/fineweb10B-gpt2")
    assert bad.read_bytes() == b"half a shard"


def test_disk_full_ends_without_another_try():
    calls = []

    def call():
        calls.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RuntimeError, match="disk full while downloading x"):
        cached_fineweb.with_retries("x", call)
    assert len(calls) == 1


def test_server_errors_are_tried_again(monkeypatch):
    pauses, answers = [], [TimeoutError(), ConnectionError(), "done"]

    def call():
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(cached_fineweb.time, "sleep", pauses.append)
    assert cached_fineweb.with_retries("x", call) == "done" and pauses == [1, 2]


def test_download_that_cannot_fit_is_refused(tmp_path):
    cached_fineweb.check_space(tmp_path, 0)
    with pytest.raises(RuntimeError, match="ask for fewer shards"):
        cached_fineweb.check_space(tmp_path, 10**18)


def test_val_bytes_are_exact_when_gpt2_is_at_hand(tmp_path):
    try:
        tokenizer = common.load_tokenizer(common.GPT2_VOCAB)
    except RuntimeError as error:
        pytest.skip(str(error))
    text = "Été: the speedrun's validation text.\n" * 50
    for name in NAMES[:2]:
        common.write_shard(tmp_path / name, np.array([50256, *tokenizer.encode(text)] * 3))
    splits = cached_fineweb.count_splits(cached_fineweb.VERSIONS["10B"], tmp_path)
    assert splits["val"] == {"tokens": splits["train"]["tokens"], "bytes": 3 * len(text.encode("utf-8"))}
    assert splits["train"]["bytes"] is None
