"""bench/peer.py: a stand-in for the public script, with its interface only, runs beside a tiny run of ours on a CPU."""
import hashlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, TINY, documents, flags, make_data

sys.path.insert(0, str(ROOT / "bench"))
import peer  # noqa: E402

import train_gpt  # noqa: E402
from runlogs import parsing  # noqa: E402

EOT = 50256
# Takes 100 ms a step by its own clock; its loss is the mean of the validation tokens it was given, less the step.
STAND_IN = '''\
import glob, os
import numpy as np
class options:
    num_iterations = 1000  # this comment must not be stored
    val_loss_every: int = 125
    train_seq_len = 2 * 8
    val_seq_len = 32
    val_tokens = 4*64
    files = "data/fineweb10B/fineweb_%s_*.bin"
assert os.environ["WORLD_SIZE"] == "1" and os.environ["RANK"] == "0", "torchrun sets these"
def read_shards(split):
    paths = sorted(glob.glob(os.path.join(os.environ["DATA_PATH"], options.files % split)))
    return [np.fromfile(path, dtype=np.uint16)[512:] for path in paths]
assert len(read_shards("train")) == 3, "the number of shards is wrong"
mean = read_shards("val")[0][:options.val_tokens].mean()
os.makedirs("logs")
log = open("logs/first.txt", "w")
print("step:7/7 val_loss:0.1 train_time:1ms in embedded source", "=" * 100, "machine", "=" * 100, sep="\\n", file=log)
for step in range(options.num_iterations + 1):
    clock = f"train_time:{100 * step}ms step_avg:100ms"
    if step:
        print(f"step:{step}/{options.num_iterations} {clock}", file=log)
    if step % options.val_loss_every == 0 or step == options.num_iterations:
        print(f"step:{step}/{options.num_iterations} val_loss:{mean - step:.4f} {clock}", file=log)
print("peak memory allocated: 321 MiB reserved: 400 MiB", file=log)
'''
# As the script of track 3: what asks for CUDA, its log in seconds with few lines. Its loss is its rate less the step.
SIMPLE = '''\
import os
import torch
import torch.distributed as dist
device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
torch.cuda.set_device(device)
dist.init_process_group(backend="nccl", device_id=device)
def rows(seq_len=16):
    return torch.zeros(2, seq_len, pin_memory=True).to(device="cuda").cuda()
@torch.compile
def update(x):
    assert not torch.compiler.is_compiling()
model = torch.nn.Linear(2, 2)
model.compile(dynamic=False)
update(rows())
val_tokens = 20 * 16
batch_size = 8 * 16
options = dict(lr=0.025)
train_steps = 3250
val_step_freq = 125 if train_steps < 9 else 25
os.makedirs("logs")
log = open("logs/first.txt", "w")
print("=" * 100, f"on {torch.cuda.get_device_name(device)}", "=" * 100, sep="\\n", file=log)
for step in range(train_steps + 1):
    if step % val_step_freq == 0 or step == train_steps:
        print(f"step:{step}/{train_steps} val_loss:{100 * options['lr'] - step:.5f} train_time:{step / 10:.3f}s "
              f"step_avg:100.00ms", file=log)
'''


@pytest.fixture
def data(tmp_path):
    shards = {"train": [documents(1000, seed, EOT) for seed in range(3)], "val": [documents(500, 9, EOT)]}
    return make_data(tmp_path / "books", **shards, vocab_size=50257, eot=EOT)


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "checkout" / "train_gpt.py"
    path.parent.mkdir()
    path.write_text(STAND_IN)
    return path


def tiny_flags(data):
    return ["--data", data, "--device", "cpu", *flags(preset="cpu", **{k: v for k, v in TINY.items() if k != "device"})]


def trace(text):
    return parsing.parse_log(text + "\n")


def run(who, times, losses, **fields):
    return peer.Run(who, 1.0, times=dict(times), losses=dict(losses), **fields)


# --- whole runs


def test_peer_and_ours_side_by_side(tmp_path, data, script, capsys):
    argv = [script.parent, *tiny_flags(data), "--steps", "4", "--eval-every", "2", "--repeats", "1",
            "--out", tmp_path / "out", "--work", tmp_path / "work"]
    assert peer.main(list(map(str, argv))) == 0
    screen, record = capsys.readouterr().out, json.loads((tmp_path / "out" / "peer.json").read_text())
    assert record["peer"] == {"path": str(script), "commit": None, "constants": {
        "num_iterations": "4", "val_loss_every": "2"}, "sha256": hashlib.sha256(STAND_IN.encode()).hexdigest()}
    assert [found["who"] for found in record["runs"]] == ["peer", "ours"]

    first, ours = record["runs"]
    mean = np.fromfile(next(data.glob("*val*")), dtype="<u2")[512:][:256].mean()
    assert first["losses"] == {"0": round(mean, 4), "2": round(mean - 2, 4), "4": round(mean - 4, 4)}
    assert first["times"] == {str(step): 100.0 * step for step in range(5)} and first["peak_mib"] == 321
    settings = json.loads((tmp_path / "out" / "ours_1" / "config.json").read_text())["settings"]
    same = {"iterations": 4, "batch_tokens": [128], "eval_tokens": 256, "eval_every": 2, "data": str(data)}
    assert same.items() <= settings.items()  # 128 = 8 rows of the stand-in's train_seq_len
    events = [json.loads(line) for line in (tmp_path / "out" / "ours_1" / "metrics.jsonl").read_text().splitlines()]
    validated = {str(e["step"]): e["val_loss"] for e in events if "val_loss" in e}
    assert ours["losses"] == validated and set(validated) == {"2", "4"} and ours["peak_mib"] > 0

    result, clock = record["result"], {int(step): ms for step, ms in ours["times"].items()}
    stretches = [clock[2] / 2, (clock[4] - clock[2]) / 2]
    assert result["ms/step"]["peer_range"] == [100, 100]
    assert sorted(result["ms/step"]["ours_range"]) == pytest.approx(sorted(stretches))
    assert result["ms/step"]["ratio"] == pytest.approx(sum(stretches) / 200)
    assert result["tokens/s"]["peer"] == pytest.approx(1280)
    assert result["val loss, equal tokens"]["difference"] == pytest.approx(validated["4"] - round(mean - 4, 4))
    assert "ours / peer" in screen and "ms/step" in (tmp_path / "out" / "README.md").read_text()

    copy = tmp_path / "work" / "peer_1" / "train_gpt.py"  # kept where it was asked for, and only there
    assert copy.read_text().startswith("import torch; torch.manual_seed(1)\n") and settings["seed"] == 1
    kept = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert {path.parent.name for path in kept} == {"out", "ours_1"}
    theirs = [line.strip() for line in STAND_IN.splitlines() if len(line.strip()) > 15]
    everything = screen + "".join(path.read_text() for path in kept)
    own = (ROOT / "train_gpt.py").read_text()  # is in our log.txt, and imports what everyone imports
    assert not [line for line in theirs if line in everything and line not in own]


def test_script_of_track_3_with_several_rates(tmp_path, data, capsys):
    path = tmp_path / "train_gpt_simple.py"
    path.write_text(SIMPLE)
    argv = [path, *tiny_flags(data), "--steps", "4", "--eval-every", "2", "--repeats", "1", "--vary",
            "lr=0.025=>lr=0.06,lr=0.02,lr=0.05", "--swap", "dict(=>dict(", "--out", tmp_path / "out"]
    assert peer.main(list(map(str, argv))) == 0, capsys.readouterr()
    record = json.loads((tmp_path / "out" / "peer.json").read_text())
    assert [run["variant"] for run in record["runs"]] == ["lr=0.06", "lr=0.02", "lr=0.05", ""]
    assert record["peer"]["constants"] == {"train_steps": "4", "val_step_freq": "2", "dict(": "dict("}
    assert record["setting"]["tokens per step"] == 128 and record["setting"]["validation tokens"] == 320
    assert record["runs"][0]["losses"] == {"0": 6.0, "2": 4.0, "4": 2.0}
    assert record["result"]["val loss, equal tokens"]["peer_range"] == [-2, -2]  # the best of the three rates
    assert record["result"]["ms/step"]["peer"] == 100 and record["result"]["CPU s, whole run"]["peer"] > 0
    assert "peer lr=0.02" in (tmp_path / "out" / "README.md").read_text()


def test_peer_that_fails_is_named_without_its_text(tmp_path, data, script):
    source = STAND_IN.replace('split("train")', 'split("none")').replace("== 3", "== 33")
    found = peer.run_peer(source, train_gpt.open_corpus(str(data)), tmp_path / "work", 60)
    assert found.result == "FAILED: code 1, AssertionError"
    assert "the number of shards is wrong" in (tmp_path / "work" / "output.txt").read_text()
    assert peer.compare([found, run("ours", {0: 0, 5: 9}, {5: 2.0})], 128) == {}


def test_ours_that_fails_says_why(tmp_path):
    found = peer.run_ours(["--preset", "cpu", "--data", str(tmp_path / "no")], tmp_path / "work", 60)
    assert found.result.startswith("FAILED: code 1, error: no train shards in")


def test_cut_off_run_still_gives_its_step_times(tmp_path, monkeypatch):
    class Patient(peer.subprocess.Popen):
        """Its limit is over when the first step is in the log, however long that takes on this machine."""

        def wait(self, timeout=None):
            while timeout == 3 and not (tmp_path / "output.txt").stat().st_size:
                time.sleep(0.02)
            return super().wait(0.01 if timeout == 3 else timeout)

    monkeypatch.setattr(peer.subprocess, "Popen", Patient)
    program = "import time; print('step:1/9 train_time:5ms step_avg:5ms', flush=True); time.sleep(600)"
    code, wall_s = peer.run_process([sys.executable, "-c", program], tmp_path, 3)
    text = (tmp_path / "output.txt").read_text()
    found = peer.read_trace("peer", trace(text), code, wall_s, text)
    assert code is None and found.result == "cut off" and found.times == {0: 0, 1: 5}
    assert "FAILED" in peer.read_trace("peer", trace(""), None, 4.0, "").result  # cut off while it compiled


def test_runs_alternate_and_share_the_time_limit(tmp_path, monkeypatch):
    calls, clock = [], SimpleNamespace(now=0.0)
    monkeypatch.setattr(peer.time, "monotonic", lambda: clock.now)

    def fake(who, wall_s):
        def call(*args):
            calls.append((who, args[-1] if who == "peer" else args[2]))
            clock.now += wall_s
            return peer.Run(who, wall_s, times={0: 0, 5: 50})
        return call
    monkeypatch.setattr(peer, "run_peer", fake("peer", 100))
    monkeypatch.setattr(peer, "run_ours", fake("ours", 80))
    args = SimpleNamespace(time_limit=400, repeats=3, steps=5)
    assert len(peer.run_in_turn({"": ""}, [], None, args, tmp_path)) == 4  # a third pair of 180 s does not fit into 40
    assert calls == [("peer", 200), ("ours", 300), ("peer", 110), ("ours", 120)]
    calls.clear()
    args.time_limit = None
    peer.run_in_turn({"": ""}, [], None, args, tmp_path)
    assert calls == [("peer", None), ("ours", None)] * 3
    monkeypatch.setattr(peer, "run_peer", lambda *args: peer.Run("peer", 1.0, result="FAILED: code 1"))
    assert len(peer.run_in_turn({"": ""}, [], None, args, tmp_path)) == 1  # ours would train for nothing


# --- the peer's script


def test_script_folder_and_record_log_hold_the_same_source(tmp_path, script):
    bar, steps = "=" * 100, "step:1/1 val_loss:3.0 train_time:9ms step_avg:9.00ms"
    (tmp_path / "new.txt").write_text(f"{STAND_IN}\n{bar}\nRunning Python 3\n{bar}\n{steps}\n")
    (tmp_path / "old.txt").write_text(f"{bar}\n{STAND_IN}\n{bar}\nRunning pytorch 2\n{bar}\n{steps}\n")
    found = [peer.load_peer(path) for path in (script, script.parent, tmp_path / "new.txt", tmp_path / "old.txt")]
    assert {source for source, _ in found} == {STAND_IN}
    assert len({identity["sha256"] for _, identity in found}) == 1
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="neither a .py file nor a record log"):
        peer.load_peer(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match="a folder that holds one"):
        peer.load_peer(tmp_path / "absent")


def test_constants_are_replaced_in_place():
    source = "class A:\n    x: int = 2*3 # two\n    y = f(1)\nargs.z = 'a'\nprint(x=1)\nif x == 2: pass\n    # x = 4\n"
    changed = peer.set_constants(source, {"x": "7", "y": "g(2)", "args.z": "'b=c'"})
    assert changed == source.replace("2*3", "7").replace("f(1)", "g(2)").replace("'a'", "'b=c'")
    assert peer.set_constants("f(\n    lr=0.1,\n    b=2)\n", {"lr": "3"}) == "f(\n    lr=3,\n    b=2)\n"
    assert peer.constant_number(source, "x") == 6


@pytest.mark.parametrize(("values", "message"), [
    ({"absent": "1"}, "assigns absent 0 times"),
    ({"twice": "1"}, "assigns twice 2 times"),
    ({"once": "3", "on": "2"}, "assigns on 0 times"),
])
def test_constants_that_cannot_be_set(values, message):
    with pytest.raises(ValueError, match=message):
        peer.set_constants("once = 1\ntwice = 1\nif once:\n    twice: int = 2\n", values)


def test_number_that_is_none():
    with pytest.raises(ValueError, match="x in the peer's script is no product"):
        peer.constant_number("x = y // 2\n", "x")


def test_shards_that_the_peer_could_not_read(data):
    corpus = train_gpt.open_corpus(str(data))
    peer.check_data(corpus, 2, 1024, 256, 32)
    for arguments, message in (((2, 1024, 512, 32), "has 500 tokens; val_tokens 512 must"),
                               ((2, 1024, 256, 96), "multiple of val_seq_len 96"),
                               ((3, 1024, 256, 32), "has 3000 training tokens, 3 steps of 1024 need more")):
        with pytest.raises(ValueError, match=message):
            peer.check_data(corpus, *arguments)
    with pytest.raises(ValueError, match="end-of-text is token 63"):
        peer.check_data(corpus._replace(meta={"eot": 63}), 1, 1024, 256, 32)


# --- logs and numbers


def test_log_formats():
    waited = trace("step:0/4 val_loss:9.5 train_time:0ms step_avg:nanms\nstep:1/4 train_time:90ms step_avg:90ms\n"
                   "step:2/4 train_time:190ms step_avg:95ms\nstep:2/4 val_loss:5.0 train_time:201ms step_avg:100.5ms\n"
                   "step:3/4 train_time:290ms step_avg:97ms")
    found = peer.read_trace("peer", waited, None, 1.0, "")
    assert found.times == {0: 0, 1: 90, 2: 201, 3: 290} and found.losses == {0: 9.5, 2: 5.0}
    assert found.curve() == [(0, 9.5), (201, 5.0)]
    reset = trace("step:0/14 val_loss:9.5 train_time:0ms step_avg:nanms\n" + "\n".join(
        f"step:{s}/14 train_time:{100 * (s if s < 11 else s - 10)}ms step_avg:nanms" for s in range(1, 15)))
    assert peer.read_trace("peer", reset, None, 1.0, "").times == {11: 100, 12: 200, 13: 300, 14: 400}
    seconds = trace("step:100/200 val_loss:4.1 train_time:12.345s step_avg:123.45ms other:1")
    assert peer.read_trace("peer", seconds, 0, 1.0, "").times == {0: 0, 100: 12345}


def test_exit_code_counts_only_before_the_last_step():
    done = trace("step:4/4 val_loss:3.0 train_time:40ms step_avg:10ms")
    assert peer.read_trace("peer", done, 1, 1.0, "NCCLError: at the end").result == "ok"
    half = trace("step:2/4 val_loss:3.0 train_time:20ms step_avg:10ms")
    text = "  File x\n[rank0]: torch.OutOfMemoryError: its own words\nRuntimeError: later"
    assert peer.read_trace("peer", half, 1, 1.0, text).result == "FAILED: code 1, torch.OutOfMemoryError"
    assert peer.read_trace("ours", half, 2, 1.0, "a\nerror: b").result == "FAILED: code 2, error: b"


def test_times_are_compared_where_all_runs_waited():
    peers = run("peer", {s: 10 * s for s in range(9)}, {0: 9, 4: 5, 8: 4})
    ours = run("ours", {0: 0, 2: 11, 4: 20, 6: 33, 8: 40}, {4: 5, 8: 4})
    assert peer.marks([peers, ours]) == [0, 4, 8]
    assert peer.marks([run("peer", {s: s for s in range(4)}, {0: 9}), ours]) == [0, 2]  # cut off before step 4


def test_interpolation_by_hand():
    curve = [(0.0, 10.0), (100.0, 6.0), (300.0, 4.0)]
    assert peer.interpolate(curve, 50) == 8 and peer.interpolate(curve, 250) == 4.5
    assert peer.interpolate(curve, 300) == 4 and peer.interpolate(curve, 301) is None
    assert peer.interpolate(curve[1:], 99) is None and peer.interpolate([], 1) is None


def test_comparison_by_hand():
    peers = [run("peer", {0: 0, 2: 200, 4: 440}, {0: 10, 2: 6, 4: 4}, peak_mib=800),
             run("peer", {0: 0, 2: 220, 4: 420}, {0: 10, 2: 6, 4: 5}, peak_mib=1000)]
    ours = [run("ours", {0: 0, 2: 160, 4: 320}, {2: 5, 4: 3}, peak_mib=450, result="cut off")]
    failed = run("ours", {0: 0, 2: 1}, {2: 0.1}, result="FAILED: code 1")
    result = peer.compare([peers[0], ours[0], peers[1], failed], tokens=1000)
    ms = result["ms/step"]
    assert (ms["peer"], ms["peer_range"], ms["ours"]) == (105, [100, 120], 80)  # 100, 120, 110, 100; 80, 80
    assert ms["ratio"] == pytest.approx(80 / 105) and ms["at"] == "steps 0 to 4"
    assert result["tokens/s"]["ours"] == 12500
    assert result["peak MiB"]["ratio"] == 0.5
    assert result["val loss, equal tokens"]["peer"] == 4.5 and result["val loss, equal tokens"]["difference"] == -1.5
    at_320 = (6 - 2 * 120 / 240 + 6 - 1 * 100 / 200) / 2  # ours ends at 320 ms
    assert result["val loss, equal time"]["peer"] == pytest.approx(at_320)
    assert result["val loss, equal time"]["ratio"] == pytest.approx(3 / at_320)
    table = peer.format_tables([*peers, *ours, failed], result)
    assert "FAILED: code 1" in table and "cut off" in table and "100..120" in table


# --- command line


@pytest.mark.parametrize(("extra", "message"), [
    ([], "no usable CUDA device"),
    (["--device", "cpu", "--set", "lr"], "--set lr: expected NAME=VALUE"),
    (["--device", "cpu", "--set", "unknown=3"], "assigns unknown 0 times"),
    (["--device", "cpu", "--swap", "no such text=>3"], "'no such text' is not in the peer's script"),
    (["--device", "cpu", "--vary", "lr=0.1"], "--vary lr=0.1: expected NAME=>VALUE"),
    (["--device", "cpu", "--work", str(ROOT / "kept")], "outside of the project"),
    (["--device", "cpu", "--no-compile", "--width", "102"], "--width 102 must be a multiple"),
])
def test_wrong_input_is_one_sentence(script, capsys, monkeypatch, extra, message):
    monkeypatch.setattr(train_gpt.torch.cuda, "is_available", lambda: False)
    assert peer.main([str(script), *extra]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and not Path(ROOT / "kept").exists()


def test_flag_that_neither_knows(script, capsys):
    with pytest.raises(SystemExit):
        peer.main([str(script), "--device", "cpu", "--wdith", "64"])
    assert "did you mean --width?" in capsys.readouterr().err
