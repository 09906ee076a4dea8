"""Streaming FineWeb with the real `datasets` library, against a stand-in for the hub on localhost: data/fineweb.py."""

import hashlib
import io
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "data"))

import common  # noqa: E402

REPO = "HuggingFaceFW/fineweb"
COMMIT = "c" * 40
CARD = b"""---
configs:
- config_name: default
  data_files: [{split: train, path: data/*}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*}]
---
"""


def make_texts():
    generator = random.Random(2)
    return [f"Document {n} " + str(generator.random()) * generator.randrange(400) for n in range(800)]


def parquet(texts):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts, "id": [str(n) for n in range(len(texts))]})
    pyarrow.parquet.write_table(table, buffer := io.BytesIO(), row_group_size=50)
    return buffer.getvalue()


class Handler(BaseHTTPRequestHandler):
    """One dataset repository: its description, its folders and its files, as far as `datasets` asks."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        path = urllib.parse.unquote(self.path.split("?")[0])
        files = self.server.files
        if path.startswith(f"/datasets/{REPO}/resolve/{COMMIT}/"):
            self.send_file(files.get(path.split(COMMIT + "/")[1]))
        elif path in (f"/api/datasets/{REPO}", f"/api/datasets/{REPO}/revision/{COMMIT}"):
            self.send_json({"id": REPO, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
        elif path.startswith(f"/api/datasets/{REPO}/tree/{COMMIT}"):
            self.send_json(list(self.entries(path.split(COMMIT)[1].strip("/"))))
        else:
            self.send_file(None)

    do_GET = do_HEAD

    def entries(self, folder):
        """What is directly in a folder."""
        depth = len(Path(folder).parts)
        inside = [name for name in self.server.files if Path(folder) in Path(name).parents]
        for child in sorted({"/".join(Path(name).parts[: depth + 1]) for name in inside}):
            raw = self.server.files.get(child)
            kind = "directory" if raw is None else "file"
            yield {"type": kind, "path": child, "size": len(raw or b""), "oid": hashlib.sha1(raw or b"").hexdigest()}

    def send_json(self, value):
        self.reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, raw):
        if raw is None:
            return self.reply(404, b"", {"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": f'"{hashlib.sha256(raw).hexdigest()}"', "X-Repo-Commit": COMMIT}
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if not asked:
            return self.reply(200, raw, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(raw)), len(raw) - 1)
        self.reply(206, raw[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(raw)}"})

    def reply(self, status, body, headers):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def hub():
    texts = make_texts()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {"README.md": CARD, "data/0.parquet": parquet(["not this one"])}
    server.files |= {f"sample/10BT/{n}.parquet": parquet(texts[400 * n : 400 * (n + 1)]) for n in (0, 1)}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", texts
    server.shutdown()
    server.server_close()


def start(endpoint, out, *args):
    command = [sys.executable, str(ROOT / "data" / "fineweb.py"), "--version", "10B", "--out", str(out)]
    command += ["--tokenizer", "byte", "--shard-tokens", "50000", "--workers", "1", *args]
    env = {"HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(out.parent / "hf")}
    env |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env={**os.environ, **env}, **pipes)


def finish(process):
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error


def stream(out):
    """All tokens, val first, which is how the documents follow each other."""
    paths = [*out.glob("fineweb_val_*.bin"), *sorted(out.glob("fineweb_train_*.bin"))]
    return np.concatenate([common.load_shard(path) for path in paths])


def packed(texts):
    return np.concatenate([[256, *text.encode("utf-8")] for text in texts]).astype(np.uint16)


def test_streamed_run_killed_and_resumed(hub, tmp_path):
    endpoint, texts = hub
    out = tmp_path / "fineweb10B"
    process = start(endpoint, out)
    while not list(out.glob("fineweb_train_*.bin")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert list(out.glob("*.bin")) and not (out / "meta.json").exists()
    assert json.loads((out / "progress.json").read_text())["settings"]["commit"] == COMMIT
    finish(start(endpoint, out))
    expected = packed(texts)
    assert np.array_equal(stream(out), expected)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["splits"]["val"]["tokens"] == 50_000
    assert meta["splits"]["train"]["tokens"] == len(expected) - 50_000
    sizes = sum(split["bytes"] for split in meta["splits"].values())
    assert sizes == sum(len(text.encode("utf-8")) for text in texts)


def test_streamed_run_stops_at_num_tokens(hub, tmp_path):
    endpoint, texts = hub
    out = tmp_path / "fineweb10B"
    finish(start(endpoint, out, "--num-tokens", "70000"))
    assert np.array_equal(stream(out), packed(texts)[:120_000])


def test_missing_network_is_one_sentence(tmp_path):
    process = start("http://127.0.0.1:9", tmp_path / "fineweb10B")
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 1 and "Traceback" not in error
    assert error.startswith("error: cannot reach HuggingFaceFW/fineweb") and not (tmp_path / "fineweb10B").exists()
