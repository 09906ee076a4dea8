"""Tests of logger.py on what a stranger may hand over: file names, control characters, FIFOs, sizes that make a program
slow, JSON of wrong structure; and on outputs that cannot be written. It ends with a sentence, an exit code and no other
file than those that were asked for."""

import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_logger_commands import BAR, CODE, MACHINE, command, error, log_text, make_ours, numbers

from runlogs import loading, parsing, sources

ROOT = Path(__file__).resolve().parents[1]
QUICK = settings(deadline=None, database=None, derandomize=True, max_examples=40)
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\x7f\r\u202e\u2066\ud800"
NEEDS_FIFO = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")


def part(name, text="x = 1\n"):
    """One more file of a source."""
    return "-" * 40 + f"\n# {name}\n" + "-" * 40 + f"\n{text}"


def tree(folder):
    """{path inside the folder: bytes, or where a link leads}."""
    return {str(p.relative_to(folder)): os.readlink(p) if p.is_symlink() else p.read_bytes()
            for p in sorted(folder.rglob("*")) if p.is_symlink() or p.is_file()}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return path


def process(*argv, **options):
    """A process of logger.py, its output as bytes."""
    line = [sys.executable, str(ROOT / "logger.py"), *map(str, argv)]
    return subprocess.run(line, **{"capture_output": True, "timeout": 120} | options)


# -- names that a log gives


@pytest.mark.parametrize("name", [
    "numpy.py", "Numpy.py", "sitecustomize.py", "usercustomize.py", "torch.py", "conftest.py", "json.py", "site.py",
    "logger.py", "train_moe.py", "_io.py", "__init__.py", "__main__.py", "builtins.py", "con.py", "COM1.txt", "nul.h",
    "numpy.txt", "a.so", "a.pth", "a.pyc", ".bashrc", "..", ".", "...", "-o.py", "a", "a.b.py", "a-b.py", "1.py",
])
def test_no_file_of_a_log_takes_the_place_of_another(tmp_path, capsys, name):
    log = write(tmp_path / "a.txt", log_text(code=CODE + part("kernel_a.py") + part(name)))
    before = tree(tmp_path)
    said = error(capsys, "extract", log, "-o", tmp_path / "old.py")
    assert f"the log holds a file '{name}': nothing was written" in said
    assert tree(tmp_path) == before and not (tmp_path / "old").exists()
    assert command(capsys, "extract", log)[0] == 0  # the main file can still be read


@pytest.mark.parametrize("name", ["../numpy.py", "/tmp/x.py", "a\\b.py", "a\x1b.py", "a b.py", "\u0430.py"])
def test_what_is_no_plain_name_is_text_of_the_source(tmp_path, capsys, name):
    log = write(tmp_path / "a.txt", log_text(code=CODE + part(name)))
    assert command(capsys, "extract", log, "-o", tmp_path / "old.py")[0] == 0
    assert sorted(tree(tmp_path)) == ["a.txt", "old.py"] and name in (tmp_path / "old.py").read_text()


def test_files_of_a_source_go_into_a_new_folder(tmp_path, capsys):
    log = write(tmp_path / "a.txt", log_text(code=CODE + part("kernel_a.py")))
    (tmp_path / "old").mkdir()  # an empty one will do
    assert command(capsys, "extract", log, "-o", tmp_path / "old.py")[0] == 0
    assert command(capsys, "extract", log, "-o", tmp_path / "new")[0] == 0
    files = {"a.txt", "old/old.py", "old/kernel_a.py", "new/train_gpt.py", "new/kernel_a.py"}
    assert tree(tmp_path).keys() == files and (tmp_path / "old/old.py").read_text() == CODE
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for there in ("old", "new.py", "a.txt", "link"):
        said = error(capsys, "extract", log, "-o", tmp_path / there, "--force")
        assert "they need a new folder" in said and tree(tmp_path).keys() == files | {"link"}
    assert "cannot be written: No such file" in error(capsys, "extract", log, "-o", tmp_path / "no" / "where")
    twice = write(tmp_path / "a.txt", log_text(code=CODE + part("kernel_a.py") + part("Kernel_A.py")))
    assert "upper and lower case" in error(capsys, "extract", twice, "-o", tmp_path / "twice")


def test_links_and_folders_in_the_way_of_an_output_are_not_followed(tmp_path, capsys):
    mine = write(tmp_path / "mine", "mine\n")
    log = write(tmp_path / "a.txt", log_text())
    run = make_ours(tmp_path / "logs" / "exp" / "run", [4.0, 3.5])
    out = tmp_path / "out"
    for kind, make in (("link", lambda: out.symlink_to(mine)), ("no", lambda: out.symlink_to(tmp_path / "new")),
                       ("folder", out.mkdir)):
        make()
        for argv in (["extract", log, "--force", "-o"], ["export", log, "-o"], ["compare", log, log, "--plot"],
                     ["board", run.parent, "--html"]):
            code, _, err = command(capsys, *argv, out)
            assert code == 1 and f"error: '{out}' is a link, a folder or a device" in err, (kind, argv)
        out.rmdir() if kind == "folder" else out.unlink()
    (run.parent / "logs.txt").symlink_to(mine)
    assert command(capsys, "--experiment_name", "exp", "--log-dir", tmp_path / "logs", "--no-plot")[0] == 1
    assert mine.read_text() == "mine\n" and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["..", "../x", "/tmp", ".", "", "a/../..", "a/../../logs2/exp"])
def test_an_experiment_is_inside_of_the_log_folder(tmp_path, capsys, name):
    make_ours(tmp_path / "logs2" / "exp" / "run", [4.0, 3.5])
    before = tree(tmp_path)
    code, _, err = command(capsys, "--experiment_name", name, "--log-dir", tmp_path / "logs", "--no-plot")
    assert code == 1 and "must name a folder inside" in err and tree(tmp_path) == before


# -- what is written is whole or not there


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    log = write(tmp_path / "a.txt", log_text())
    run = make_ours(tmp_path / "logs" / "exp" / "run", [4.0, 3.5])
    old = write(tmp_path / "old.csv", "old\n")
    before = tree(tmp_path)

    class Full(io.FileIO):
        def writelines(self, lines):
            self.write(b"half")
            raise OSError(28, "No space left on device")

    real = open
    monkeypatch.setattr("builtins.open", lambda name, mode="r", *args, **more: (
        Full(name, mode) if mode == "xb" else real(name, mode, *args, **more)))
    for argv, path in ((["extract", log, "-o"], tmp_path / "x.py"), (["export", log, "-o"], old),
                       (["compare", log, log, "--plot"], tmp_path / "c.png"),
                       (["board", run, "--html"], tmp_path / "b"),
                       (["--experiment_name", "exp", "--log-dir"], tmp_path / "logs")):
        code, _, err = command(capsys, *argv, path)
        path = path / "exp" / "logs.txt" if path.name == "logs" else path
        assert (code, err) == (1, f"error: '{path}' cannot be written: No space left on device\n")
    assert tree(tmp_path) == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("argv", [["show"], ["show", "--json"], ["export"], ["extract"]])
def test_a_full_output_is_one_sentence(tmp_path, argv):
    log = write(tmp_path / "a.txt", log_text())
    with open("/dev/full", "wb") as full:
        done = process(*argv, log, stdout=full, capture_output=False, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written: No space left on device\n"


@pytest.mark.parametrize("argv", [["show"], ["export"], ["extract"], ["--help"]])
def test_a_closed_pipe_ends_quietly(tmp_path, argv):
    log = write(tmp_path / "a.txt", log_text())
    read, write_end = os.pipe()
    os.close(read)
    done = process(*argv, log, stdout=write_end, capture_output=False, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_any_output_stream(tmp_path):
    log = write(tmp_path / "a.txt", log_text())
    line = f"'{sys.executable}' '{ROOT / 'logger.py'}' show '{log}' >&- 2>&-"
    assert subprocess.run(line, shell=True, timeout=120).returncode == 0


def test_ctrl_c_is_130_without_a_traceback(tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_one", stop)
    assert command(capsys, "show", write(tmp_path / "a.txt", log_text())) == (130, "", "")


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_during_the_imports(tmp_path):
    """Stopped by a module that logger.py imports: nothing is said."""
    write(tmp_path / "csv.py", "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = process("--help", env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_encodings_that_lack_characters(tmp_path, variables):
    code = CODE + "name = 'ü漢😀'\n"
    log = write(tmp_path / "ü漢😀.txt", log_text(code=code, machine=MACHINE.replace("Chip", "Chip ü漢")))
    environment = os.environ | {"PYTHONCOERCECLOCALE": "0"} | variables
    for argv in (["show", log], ["diff", log, log], ["export", log], ["show", tmp_path / "nö"], ["board", tmp_path]):
        argv += ["--html", tmp_path / "ü.html"] if argv[0] == "board" else []
        done = process(*argv, env=environment, cwd=tmp_path)
        assert b"Traceback" not in done.stderr + done.stdout and done.returncode == (argv[-1] == tmp_path / "nö")
    assert process("extract", log, env=environment).stdout == code.encode()  # a source as it is


def test_wandb_without_a_login_is_one_sentence(tmp_path, capsys, monkeypatch):
    class Wandb:
        class Error(Exception):
            pass

        @staticmethod
        def init(**options):
            raise Wandb.Error(f"no key{EVIL}")

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    said = error(capsys, "export", write(tmp_path / "a.txt", log_text()), "--wandb", "p")
    assert "no key" in said and "WANDB_MODE=offline" in said and not UNSAFE.search(said)


# -- control characters


def hostile_runs(folder):
    """A run of ours, a log and a folder, whose names, keys and texts are all evil."""
    evil = EVIL.replace("\ud800", "")
    run = make_ours(folder / f"exp{evil}" / f"run{evil}", [4.0, 3.5, 3.4, 3.3])
    records = [{"step": 5, "val_loss": 3.2, EVIL: EVIL, "x": [EVIL], "batch_tokens": EVIL, "seq_len": EVIL},
               {"event": "resume", "step": 5, "changed": {EVIL: [EVIL, 3]}}, {"step": 6, "val_loss": 3.1},
               {"event": "end", "status": "error", "error": f"it{EVIL}broke", "step": 6}]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    settings = {"seed": 1, EVIL: EVIL, "width": EVIL}
    config = {"settings": settings, "torch": EVIL, "hardware": {"name": EVIL}, "data": {"fingerprint": EVIL}}
    (run / "config.json").write_text(json.dumps(config))
    word = evil.replace("\r", "").replace("\x85", "")
    machine = f"Running Python 3.{word}\nRunning PyTorch 2.9{word} compiled for CUDA 1{word}\nCPU: a{word}\n"
    log = write(run.parent / f"a{evil}.txt", log_text(code=CODE.replace("64", repr(EVIL)) + f"# {evil}\n",
                                                     machine=machine).replace("step_avg", evil))
    write(run.parent / "README.md", f"# {evil} 3.25000 n=5 p=0.5\n")
    trace = {"traceEvents": [{"name": EVIL, "cat": EVIL, "ph": "X", "ts": 1, "dur": 2, "tid": EVIL},
                             {"name": f"aten::{EVIL}", "cat": "cpu_op", "ph": "X", "ts": 1, "dur": 2, "tid": EVIL}]}
    write(run / "profile" / "trace_rank0.json", json.dumps(trace))
    write(run / "profile" / f"memory_rank{evil}.pickle", "")
    return run, log


def every_command(run, log, out, forms=([], ["--json"], ["--markdown"])):
    """The arguments of every command, each in one of the forms after the other."""
    exp = run.parent
    lines = [["show", run, log], ["show", exp], ["show", f"{run}gone"], ["diff", run, log], ["diff", log, run],
             ["compare", log, run, "--no-plot"], ["stats", exp, "--target", "3"], ["profile", run],
             ["compare", log, log, "--no-plot"], ["verify", exp], ["extract", log, "-o", out / "x.py"],
             ["export", run, log], ["export", log, "-o", out / "x.csv"], ["board", exp, "--html", out / "b.html"],
             ["extract", log], ["compare", run, run, "--no-plot"],
             ["--experiment_name", exp.name, "--log-dir", exp.parent, "--images-dir", out, "--no-plot"]]
    for line in lines:
        for form in forms:
            if form != ["--markdown"] or not line[0].startswith("--"):
                yield [str(word) for word in (*line, *form)]


def test_no_text_of_a_log_reaches_the_output_raw(tmp_path, capsys, monkeypatch):
    run, log = hostile_runs(tmp_path / "logs")
    (out := tmp_path / "out").mkdir()
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        for argv in every_command(run, log, out):
            (out / "x.py").unlink(missing_ok=True)
            code, said, err = command(capsys, *argv)
            said = re.sub("\x1b\\[[0-9;]*m", "", said) if terminal else said  # the colours of rich
            assert code in (0, 1) and (not UNSAFE.search(said + err) or argv[0] == "extract" and not terminal), argv
            if "--json" in argv and code == 0 and argv[0] != "export":
                json.loads(said)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    code, said, err = command(capsys, "extract", log)
    assert code == 0 and not UNSAFE.search(said) and "\\x1b" in said


def test_on_a_real_terminal(tmp_path):
    run, log = hostile_runs(tmp_path / "logs")
    for argv in (["extract", log], ["export", run], ["stats", log, f"--{EVIL[:-1]}"], ["show", run]):
        main, other = pty.openpty()
        found = []

        def read(main=main, found=found):
            try:
                while data := os.read(main, 4096):
                    found.append(data)
            except OSError:  # the other end is closed
                pass

        reader = threading.Thread(target=read)
        reader.start()
        process(*argv, stdout=other, stderr=other, capture_output=False, env=os.environ | {"NO_COLOR": "1"})
        os.close(other)
        reader.join()
        os.close(main)
        text = b"".join(found).decode("utf-8", "backslashreplace").replace("\r\n", "\n")
        assert text and not UNSAFE.search(text) and "\\x1b" in text


# -- FIFOs, devices, sockets


@NEEDS_FIFO
def test_fifos_devices_and_sockets_never_block(tmp_path, capsys):
    log = write(tmp_path / "mixed" / "good.txt", log_text())
    os.mkfifo(fifo := tmp_path / "mixed" / "a.log")
    (tmp_path / "mixed" / "null.txt").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(tmp_path)  # names of sockets are short
        server.bind("mixed/s.txt")
    code, out, _ = command(capsys, "show", tmp_path / "mixed")
    assert code == 0 and out.count("cannot be read: ") == 3 and "4 files: 3 not a log, 1 complete" in out
    assert out.count("it is a FIFO or a device, not a file") == 2
    for argv in (["show", fifo], ["extract", fifo], ["diff", fifo, log], ["diff", log, fifo], ["stats", fifo],
                 ["export", fifo], ["compare", fifo, log], ["extract", "/dev/zero"]):
        assert command(capsys, *argv)[0] == 1
    assert "it is a FIFO or a device" in error(capsys, "extract", fifo)
    for argv in (["extract", log, "-o"], ["export", log, "-o"], ["board", log.parent, "--html"]):
        code, _, err = command(capsys, *argv, fifo)
        assert code == 1 and f"'{fifo}' is a link, a folder or a device" in err
    assert "is a link, a folder or a device" in error(capsys, "export", log, "-o", "/dev/null")


@NEEDS_FIFO
def test_fifos_in_a_run_are_passed_over_with_a_note(tmp_path, capsys):
    for name in ("metrics.jsonl", "log.txt", "config.json", "hellaswag.jsonl"):
        run = make_ours(tmp_path / "exp" / f"run_{name}", [4.0, 3.5])
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        (run / "profile").mkdir()
        os.mkfifo(run / "profile" / "trace_rank0.json")
        code, out, _ = command(capsys, "show", run)
        assert f"{name} left out: no regular file" in out
        assert "it is a FIFO or a device" in command(capsys, "profile", run)[2]
    code, out, _ = command(capsys, "--experiment_name", "exp", "--log-dir", tmp_path, "--no-plot")
    assert code == 0 and out.count("left out: no regular file") == 4
    os.mkfifo(tmp_path / "exp" / "README.md")
    assert "README.md' is not there" in error(capsys, "verify", tmp_path / "exp")


# -- what a resume changed, how a run ended


def changed_run(path):
    run = make_ours(path, [4.0, 3.5, 3.4, 3.3])
    records = [{"event": "resume", "step": 4, "config": {}, "changed": {"muon_lr": [0.06, 0.03], "name": ["a", None]}},
               {"step": 6, "val_loss": 3.2}, {"event": "resume", "step": 6, "changed": {"gone": [1, 2]}},
               {"event": "resume", "step": 5}, {"event": "resume", "step": 5, "changed": [1]},
               {"step": 8, "iterations": 8, "val_loss": 3.1, "train_time_ms": 90.0, "tokens": 512}]
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return run


def test_changes_on_resume_are_shown(tmp_path, capsys):
    run, other = changed_run(tmp_path / "exp" / "a"), make_ours(tmp_path / "exp" / "b", [4.0, 3.5, 3.4, 3.3])
    words = 'changed on resume at step 4: muon_lr 0.06 -> 0.03, name "a" -> null'
    for argv in (["show", run], ["show", run, "--json"], ["compare", run, other, "--no-plot"], ["stats", run],
                 ["--experiment_name", "exp", "--log-dir", tmp_path, "--no-plot"]):
        code, out, _ = command(capsys, *argv)
        assert code == 0 and words in out.replace('\\"', '"') and "gone" not in out, argv
    assert "the changed settings of a resume event are no object" in command(capsys, "show", run)[1]
    assert any(words in note for note in numbers(capsys, "diff", run, other)["notes"])


def test_an_error_is_shown_with_its_sentence(tmp_path, capsys):
    run = make_ours(tmp_path / "exp" / "a", [4.0, 3.5])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "end", "status": "error", "error": "the disk is full", "step": 2}) + "\n")
    code, out, _ = command(capsys, "show", run)
    assert re.search(r"status +error at step 2", out) and "ended with an error: the disk is full" in out
    out = command(capsys, "--experiment_name", "exp", "--log-dir", tmp_path, "--no-plot")[1]
    assert "note on a: ended with an error: the disk is full" in out and re.search(r"a +error", out)
    assert "error at step 2" in error(capsys, "stats", run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"event": "resume", "step": 2}\n{"step": 4, "val_loss": 3.0}\n')
    assert "the disk is full" not in command(capsys, "show", run)[1]


# -- what could take long: the amount of work is what is tested, the clock is not


def texts(count=24_000):
    """Pairs of texts that make difflib slow."""
    yield [f"x{i}" for i in range(count)], [f"y{i}" for i in range(count)]
    yield [f"x{i}" for i in range(count)], [f"x{i}" for i in reversed(range(count))]
    yield [str(i * i % 101) for i in range(count)], [str(i * i % 103) for i in range(count)]
    yield ["a"] * count, ["a", "b"] * (count // 2)
    yield [f"u{i // 2 if i % 2 else i}" for i in range(count)], [f"u{i // 3 if i % 2 else i}" for i in range(count)]
    yield ["a" * 1_000_000], ["b" * 1_000_000]


@pytest.mark.parametrize("index", range(6))
def test_a_diff_looks_at_each_line_a_bounded_number_of_times(monkeypatch, index):
    a, b = list(texts())[index]
    seen, real = [], sources.anchors
    monkeypatch.setattr(sources, "anchors", lambda a, b, i, m, j, n: seen.append(m - i + n - j) or
                        real(a, b, i, m, j, n))
    lines = sources.line_diff(a, b)
    assert sum(seen) <= (sources.DEPTH + 1) * (len(a) + len(b))
    assert patched(a, lines) == b


def patched(lines, diff):
    """The lines after a unified diff."""
    done, at = [], 0
    for line in diff:
        if found := re.match(r"@@ -(\d+)(,0)?", line):
            start = int(found[1]) - (not found[2])
            done, at = done + lines[at:start], start
            continue
        done += [line[1:]] if line[0] in " +" else []
        at += line[0] in " -"
        assert line[0] == "+" or lines[at - 1] == line[1:]
    return done + lines[at:]


@QUICK
@given(*[st.lists(st.sampled_from("abcdef"), max_size=12) | st.permutations("abcdefgh")] * 2, st.integers(0, 3))
def test_a_diff_makes_the_one_of_the_other(a, b, around):
    assert patched(list(a), sources.line_diff(list(a), list(b), around)) == list(b)
    assert (sources.line_diff(a, b) == []) == (a == b)


def test_sources_too_long_to_be_compared_say_so(tmp_path, capsys):
    logs = [write(tmp_path / f"{c}.txt", log_text(code=f"{c} = 1\n" * 60_000)) for c in "ab"]
    code, out, _ = command(capsys, "diff", *logs)
    assert code == 0 and "60000 and 60000 lines are too many for a text diff" in out
    assert out.count("is longer than 250,000 characters: compared as text only") == 2


def test_names_of_a_source_do_not_multiply():
    long = "a" * 50_000
    text = "".join(" " * i + f"class {long}:\n" for i in range(3)) + "   x = {1: {2: 3}}\n" + "def f(): 0\n" * 2000
    found = sources.parse_source(text)
    assert found.problem is None and max(map(len, [*found.units, *found.settings])) < 400
    assert "f() (2000)" in found.units


@pytest.mark.parametrize("line", [
    "step:1/2 x:" + "1" * 1_000_000 + "z", "\x1b[" * 200_000, "step:1/2 " + "a:1 " * 200_000, "step:" + "9" * 100_000,
    "step:1/2 val_loss:" + "9" * 5000, "step:1e9/2 val_loss:1e400", "s:1 trl:" + "." * 100_000,
])
def test_strange_lines_of_steps(tmp_path, capsys, line):
    log = write(tmp_path / "a.txt", log_text(tail=(line + "\n") * 3))
    assert command(capsys, "show", log)[0] == 0
    rows = loading.load_one(log).trace.rows
    assert all(len(row) <= 100 and all(len(str(v)) <= 2000 for v in row.values()) for row in rows)


@pytest.mark.parametrize("machine", [
    "Running pytorch " + " on x" * 100_000, "| 0 x" + " " * 100_000, "GPU " + "0" * 100_000, "CPU:" + "\n" * 100_000,
    ("| 0" + " a" * 200 + " " * 9000 + "\n") * 1000, "Settings: {" + '"a":{' * 10_000 + "}" * 10_001,
    ("=" * 100 + "\n") * 10_000,
])
def test_strange_text_about_the_machine(tmp_path, capsys, machine):
    log = write(tmp_path / "a.txt", log_text(machine=machine + "\n"))
    assert command(capsys, "show", log)[0] == 0 and command(capsys, "stats", log)[0] == 0


def test_sections_and_files_of_a_log_are_bounded():
    parser = parsing.LogParser()
    parser.feed((BAR + "text\n").encode() * 5000)
    assert len(parser.sections) <= parsing.MAX_SECTIONS
    trace = parsing.parse_log(log_text(code="x\n" + "".join(part(f"f{i}.py") for i in range(5000))))
    assert len(trace.parts) == parsing.MAX_PARTS + 1 and "files or more" in trace.notes[0]
    assert sum(text.count("x = 1") for text in trace.parts.values()) == 5000


def test_the_columns_of_an_export_are_bounded(tmp_path, capsys):
    rows = [{"step": i, "val_loss": 3.0, "path": "p", **{f"k{i}_{j}": j for j in range(200)}} for i in range(100)]
    run = write(tmp_path / "run" / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows)).parent
    code, out, err = command(capsys, "export", run)
    head = out.splitlines()[0].split(",")
    assert code == 0 and len(head) == parsing.MAX_COLUMNS + 2 and head.count("path") == 1 and "only the first" in err


def test_reports_of_routers_are_bounded():
    report = {"event": "routers", "layers": [0, 1], "load": [[1] * 5000] * 2}
    trace = parsing.parse_metrics("".join(json.dumps({**report, "step": i}) + "\n" for i in range(300)))
    assert sum(len(load) for found in trace.routers for load in found["load"]) <= 2 * parsing.MAX_LOADS
    assert trace.routers[-1]["step"] == 299


@pytest.mark.parametrize("text", [
    "p=" + "1" * 100_000 + "%", "p=1" + " " * 100_000 + "%", "[" + "1.1, " * 100_000, "#" * 100_000,
    "step:1/2 val_loss:3.2 " + "," * 100_000 + "x", "n=1 " * 100_000, "p=0.01 [3.1,3.2] " * 20_000,
    "# " + " " * 100_000,
])
def test_strange_readmes(tmp_path, capsys, text):
    folder = write(tmp_path / "2026-01-01_A" / "README.md", text).parent
    for i in range(3):
        write(folder / f"{i}.txt", log_text(3.2 + i / 100))
    assert command(capsys, "verify", folder)[0] in (0, 1)
    assert command(capsys, "board", folder, "--html", tmp_path / "b.html")[0] == 0


@pytest.mark.parametrize("record", [
    '{"step": 5, "val_loss": 1e400}', '{"step": 5, "val_loss": -1e308, "train_time_ms": 1e308, "tokens": 1e308}',
    '{"step": 5, "val_loss": 1e-320, "train_time_ms": 1e-320, "tokens": 5}', '{"step": 1e400, "val_loss": 1}',
    '{"step": -5, "val_loss": 1}', '{"step": 1000000000, "val_loss": 3, "iterations": 1000000000}', "[" * 100_000,
    '{"step": 5, "val_loss": 3, "x": ' + "[" * 900 + "]" * 900 + "}", '{"step": 5, "val_loss": ' + "9" * 5000 + "}",
    '{"step": 5, "val_loss": ' + "9" * 4000 + "}", '{"step": NaN, "val_loss": 3}', '{"step": 5, "val_loss": NaN}', "[]",
    "null", '"x"', '{"step": "5", "val_loss": 3}', '{"step": 5, "val_loss": "3"}', '{"step": 5, "val_loss": [3]}',
    '{"step": 5, "val_loss": 3, "train_time_ms": "x", "tokens": {}, "iterations": []}',
    '{"event": "end", "status": ["done"], "step": 5, "val_loss": {}, "peak_memory_mib": "5", "error": [1]}',
    '{"event": "end", "status": "done", "step": 5, "val_loss": NaN, "peak_memory_mib": {}, "params_total": []}',
    '{"event": "end", "status": "done", "step": 0, "iterations": 0, "val_loss": 3, "train_time_ms": 5}',
    '{"event": ["end"], "step": 5}', '{"event": "resume", "step": 2, "changed": {"a": 5}}',
])
def test_metrics_of_wrong_structure(tmp_path, capsys, record):
    for whole in (True, False):
        run = make_ours(tmp_path / str(whole) / "run", [4.0, 3.5])
        with open(run / "metrics.jsonl", "a" if whole else "w") as file:
            file.write(record + "\n")
        run_everything(capsys, run, tmp_path / str(whole))


@pytest.mark.parametrize("config", [
    "[]", "null", "5", "{", "[" * 100_000, '{"settings": []}', '{"settings": null, "torch": [], "hardware": [1]}',
    '{"settings": {"seed": [1], "width": ' + "[" * 900 + "]" * 900 + '}}', '{"world_size": ' + "9" * 4000 + "}",
    '{"world_size": -5, "hardware": {"name": 5}, "data": 5}', '{"settings": {"iterations": "x", "target_loss": "y"}}',
    '{"settings": {"target_loss": 1e400, "iterations": 1e400}, "hardware": "x", "world_size": true}',
])
def test_configs_of_wrong_structure(tmp_path, capsys, config):
    run = make_ours(tmp_path / "logs" / "run", [4.0, 3.5])
    (run / "config.json").write_text(config)
    run_everything(capsys, run, tmp_path / "logs")
    if config == "[]":
        assert "config.json is no JSON object" in command(capsys, "show", run)[1]
    if config == '{"settings": []}':
        assert "the settings of config.json are no object" in command(capsys, "show", run)[1]


def test_plots_of_strange_numbers(tmp_path, capsys):
    records = [{"step": step, "val_loss": loss, "train_loss": loss, "tokens": tokens, "train_time_ms": ms, "lr": loss,
                "window": tokens} for step, loss, tokens, ms in (
        (0, 1e300, -5, -1e300), (5, 3.0, 1e300, float("nan")), (6, float("inf"), 2**62, 1e-320), (6, -1e29, 0, 1e29),
        (10**14, 1e29, 5.5, 5), (10**14, 3.0, "x", []))]
    records += [{"event": "routers", "step": 1, "layers": [5, 0], "load": [[1e-300, 1e8], [5, 0]]},
                {"step": 10**14 + 1, "hellaswag": {"tasks": 1, "per_token": 1, "per_byte": 0, "raw": 1e-300}},
                {"event": "end", "status": "done", "step": 10**14 + 2, "val_loss": 3.0}]
    run = make_ours(tmp_path / "logs" / f"run{EVIL[:9]}$x_$^{{", [4.0, 3.5])
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    run_everything(capsys, run, tmp_path / "logs", plots=True)
    assert {path.suffix for path in (tmp_path / "out").rglob("*.*")} >= {".png", ".html", ".csv"}


def test_losses_that_are_no_numbers_are_counted(tmp_path, capsys):
    run = make_ours(tmp_path / "run", [4.0, 3.5])
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "val_loss": "3"}\n{"step": 4, "val_loss": [3]}\n{"step": 4, "val_loss": null}\n')
    assert "2 loss(es) of metrics.jsonl left out: they are no numbers" in command(capsys, "show", run)[1]


@pytest.mark.parametrize("event", [
    {"ts": 10**400, "dur": 1}, {"ts": "1", "dur": 1}, {"ts": 1, "dur": "x"}, {"ts": None, "dur": 1},
    {"ts": 1e308, "dur": 1e308}, {"ts": float("nan"), "dur": 1}, {"ts": 0, "dur": float("inf")}, {"ts": [], "dur": 1},
])
def test_traces_of_wrong_numbers(tmp_path, capsys, event):
    event = {"name": "aten::a", "cat": "cpu_op", "ph": "X", **event}
    write(tmp_path / "trace_rank0.json", json.dumps({"traceEvents": [event]}))
    code, out, err = command(capsys, "profile", tmp_path)
    assert (code, err.count("\n")) == ((0, 0) if event["ts"] == "1" else (1, 1))


def run_everything(capsys, run, folder, plots=False):
    """Every command on a run in `folder`: an exit code, at most one line of an error, no file outside of out/."""
    log = write(folder / "other.txt", log_text()) if not (folder / "other.txt").exists() else folder / "other.txt"
    write(folder / "README.md", "n=3 p=0.01 3.25 1.000 s\n")
    (out := folder.parent / "out").mkdir(exist_ok=True)
    before = tree(folder)
    for argv in every_command(run, log, out, [[]]):
        (out / "x.py").unlink(missing_ok=True)
        argv = [word for word in argv if word != "--no-plot"] if plots and "--json" not in argv else argv
        argv += ["--plot", str(out / "c.png")] if plots and argv[0] == "compare" else []
        code, said, err = command(capsys, *argv)
        assert code in (0, 1) and (not UNSAFE.search(said + err) or argv[0] == "extract"), argv
        assert len(re.findall("^error: ", err, re.MULTILINE)) == (code == 1 and bool(err)), (argv, err)
        assert not re.search("recursion|NoneType|unsupported|format", err), (argv, err)
    (folder / "logs.txt").unlink(missing_ok=True)
    assert tree(folder) == before


# -- anything at all

WORDS = st.sampled_from([
    "step:4/4 val_loss:3.1 train_time:5ms step_avg:1ms", "step:9/4", BAR, "s:1 tel:3", "\x1b[2J", part("numpy.py"),
    "1e400", "nan", "9" * 5000, "(" * 300, "\0", "\r", "é"])
ODD = st.sampled_from([1e400, -1e308, 1e-320, 2**70, 10**4000, EVIL])
SCALARS = st.none() | st.booleans() | st.integers(-3, 9) | ODD | st.floats() | st.text(max_size=5)
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
    st.text(max_size=3), inner, max_size=2), max_leaves=4)
KEYS = st.sampled_from([
    "step", "val_loss", "train_loss", "event", "status", "error", "tokens", "train_time_ms", "changed", "iterations",
    "lr", "batch_tokens", "seq_len", "settings", "hardware", "torch", "world_size", "data", "hellaswag",
    "peak_memory_mib", "load", "layers", "window", "target_loss", EVIL])
OBJECTS = st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=3), max_size=6)
EVENTS = st.sampled_from([{}, {}, {"step": 4}, {"event": "resume", "step": 2}, {"event": "routers", "step": 3},
                          {"event": "end", "status": "done", "step": 4}])


@st.composite
def mutated(draw, text):
    """A text with a piece cut out and another put in."""
    start = draw(st.integers(0, len(text)))
    return text[:start] + draw(WORDS | st.text(max_size=8)) + text[start + draw(st.integers(0, 80)):]


@settings(QUICK, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated(log_text()), st.lists(st.tuples(OBJECTS, EVENTS), max_size=4),
       mutated('{"settings": {"seed": 1}}') | OBJECTS)
def test_no_command_fails_on_anything(tmp_path_factory, capsys, text, records, config):
    base = tmp_path_factory.mktemp("any")
    run = make_ours(base / "logs" / "run", [4.0, 3.5])
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps(record | event) + "\n" for record, event in records)
    write(run / "config.json", config if isinstance(config, str) else json.dumps(config))
    write(base / "logs" / "other.txt", text)
    run_everything(capsys, run, base / "logs")

