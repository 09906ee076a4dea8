"""logger.py watch: states of runs, frames at several widths, logs that grow, the live screen and its end."""
import io
import json
import os
import platform
import select
import subprocess
import sys
from pathlib import Path

import pytest

import logger
from runlogs import loading, watching

ROOT = Path(__file__).resolve().parents[1]
NOW = 1_000_000.0


def row(step, **more):
    return {"step": step, "train_loss": 4.0 - step / 100, "tokens": 1000 * step, "train_time_ms": 500.0 * step,
            "tokens_per_s": 2000.0} | more


ROWS = [row(step) for step in range(10, 101, 10)] + [{"step": 100, "val_loss": 3.21, "train_time_ms": 50_000.0}]


def make_run(folder, rows=ROWS, age=5.0, lock=None, iterations=200, **end):
    """A run's folder whose log grew `age` seconds before NOW; `end` makes the closing record."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": {"iterations": iterations}}))
    rows = rows + ([{"event": "end", "step": 100} | end] if end else [])
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if lock:
        (folder / "lock").write_text(lock)
    for path in folder.iterdir():
        os.utime(path, (NOW - age, NOW - age))
    return folder


def mine(pid):
    return f"process {pid} of {platform.node()}"


def gone():
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def look(*names):
    return watching.Watch([*map(str, names)]).look(NOW)


def state(folder):
    (n,), _ = look(folder)
    return n["state"], n["why"]


def frame(folder, width=100, height=None, encoding="utf-8"):
    console = watching.make_console(io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    console.width = width
    with console.capture() as capture:
        console.print(watching.frame(*look(folder), console, height))
    return capture.get()


# --- states


@pytest.mark.parametrize("end, expected", [
    (dict(status="done"), ("finished", "")), (dict(status="target"), ("finished", "")),
    (dict(status="interrupted"), ("stopped", "interrupted: --resume goes on")),
    (dict(status="error", error="no\nmemory"), ("crashed", "no memory")),
    (dict(status="nan"), ("crashed", "its loss is not finite")),
])
def test_a_closing_record_says_how_a_run_ended(tmp_path, end, expected):
    assert state(make_run(tmp_path / "a", **end)) == expected


def test_a_run_whose_lock_is_held_runs_until_it_is_silent_for_long(tmp_path, monkeypatch):
    held = [make_run(tmp_path / name, age=age, lock="x") for name, age in (("a", 119), ("b", 121))]
    monkeypatch.setattr(watching, "files_being_written", lambda: {os.path.realpath(run / "lock") for run in held})
    watching.files_being_written.cache_clear = lambda: None
    assert state(held[0]) == ("running", "") and state(held[1]) == ("stalled", "no record for 2:01")


def test_slow_runs_may_be_silent_for_ten_of_their_gaps(tmp_path):
    slow = [row(step, train_time_ms=3000.0 * step) for step in range(10, 101, 10)]  # a record each 30 s
    assert state(make_run(tmp_path / "a", slow, age=299))[0] == "running"
    assert state(make_run(tmp_path / "b", slow, age=301))[0] == "stalled"


def test_a_run_without_a_record_starts_for_a_quarter_of_an_hour(tmp_path):
    assert state(make_run(tmp_path / "a", [], age=890)) == ("starting", "")
    assert state(make_run(tmp_path / "b", [], age=910)) == ("stalled", "no record for 15:10")


def test_a_run_whose_process_is_gone_crashed_at_once(tmp_path):
    assert state(make_run(tmp_path / "a", lock=mine(gone()), age=0)) == ("crashed", "its process is gone")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_number_that_another_process_has_now_holds_no_run(tmp_path):
    assert state(make_run(tmp_path / "a", lock=mine(os.getpid()), age=0)) == ("crashed", "its process is gone")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_a_process_that_has_the_lock_open_is_seen_here_and_by_show(tmp_path):
    """It keeps no other file open."""
    run = make_run(tmp_path / "a")
    with open(run / "lock", "a+") as file:
        file.write(mine(os.getpid()))
        file.flush()
        assert state(run) == ("running", "")
        assert loading.status_of(loading.load_one(run)) == "running"
    assert state(run) == ("crashed", "its process is gone")


def test_of_runs_on_other_machines_the_age_of_the_log_decides(tmp_path):
    far = "process 1 of a-node-of-some-cluster"
    assert [state(make_run(tmp_path / str(age), lock=far, age=age)) for age in (100, 1000, 2000)] == [
        ("running", ""), ("stalled", "no record for 16:40"), ("crashed", "no record for 33:20")]


def test_a_loss_that_is_not_finite_is_a_crash(tmp_path):
    assert state(make_run(tmp_path / "a", [*ROWS, row(110, train_loss=float("nan"))]))[0] == "crashed"


# --- numbers


def test_numbers_of_a_run(tmp_path):
    (n,), others = look(make_run(tmp_path / "a", [*ROWS, row(110, mfu=0.4, peak_memory_mib=9000, train_time_ms=56e3)]))
    assert others == {} and (n["step"], n["iterations"], n["val_loss"], n["val_step"]) == (110, 200, 3.21, 100)
    assert (n["train_loss"], n["tokens_per_s"], n["mfu"], n["memory_mib"]) == (2.9, 2000.0, 0.4, 9000)
    assert n["step_ms"] == 500 and n["eta_s"] == 45  # the median of the last steps
    text = frame(tmp_path / "a")
    for words in ("step 110/200 (55 %)  ETA 0:45", "train 2.9000  val 3.2100 at 100", "2,000 tokens/s  9,000 MiB",
                  "40.0% MFU", f"{tmp_path.name}/a  running"):
        assert words in text


def test_a_run_of_so_many_seconds_has_as_many_steps_as_it_has_time_for(tmp_path):
    folder = make_run(tmp_path / "a", [row(step, step_ms=250.0) for step in range(10, 301, 10)])
    config = {"settings": {"iterations": 200, "max_seconds": 180.0}}
    (folder / "config.json").write_text(json.dumps(config))
    os.utime(folder / "config.json", (NOW - 5, NOW - 5))
    (n,), _ = look(folder)
    assert (n["step"], n["iterations"]) == (300, 420)  # 30 s of 180 are left
    (folder / "metrics.jsonl").write_text("")
    assert look(folder)[0][0]["iterations"] is None


def test_the_curve_is_brighter_than_its_axis(tmp_path):
    (n,), _ = look(make_run(tmp_path / "a"))
    first = watching.curve(n, 60, 5, False)[0]
    assert not first.style and {str(span.style) for span in first.spans} == {"dim", "cyan"}


def test_a_finished_run_has_no_eta(tmp_path):
    assert "ETA" not in frame(make_run(tmp_path / "a", status="done"))


def test_live_runs_come_first_by_name_and_old_ones_are_counted(tmp_path):
    for name, age, end in (("run_10", 5, {}), ("run_2", 50, {}), ("new", 60, dict(status="done")),
                           ("old", 5000, dict(status="done")), ("older", 9000, dict(status="error"))):
        make_run(tmp_path / name, age=age, **end)
    chosen, others = look(tmp_path)
    assert [Path(n["path"]).name for n in chosen] == ["run_2", "run_10", "new"]
    assert others == {"finished": 1, "crashed": 1}
    assert "not shown: 1 finished, 1 crashed" in frame(tmp_path)


def test_without_a_live_run_the_newest_is_shown(tmp_path):
    for name, age in (("a", 90_000), ("b", 80_000)):
        make_run(tmp_path / name, age=age, status="done")
    chosen, others = look(tmp_path)
    assert [Path(n["path"]).name for n in chosen] == ["b"] and others == {"finished": 1}


def test_only_logs_that_grew_are_read_again(tmp_path, monkeypatch):
    runs, read = [make_run(tmp_path / name) for name in "ab"], []
    one = watching.load_one
    monkeypatch.setattr(watching, "load_one", lambda path, **options: read.append(path.name) or one(path, **options))
    watch = watching.Watch([str(tmp_path)])
    assert [n["step"] for n in watch.look(NOW)[0]] == [100, 100] and sorted(read) == ["a", "b"]
    with open(runs[0] / "metrics.jsonl", "a") as file:
        file.write(json.dumps(row(110)) + "\n")
    assert [n["step"] for n in watch.look(NOW)[0]] == [110, 100] and len(read) == 3


def test_folders_that_vanish_meanwhile_are_no_error(tmp_path):
    run = make_run(tmp_path / "a" / "b")
    watch = watching.Watch([str(tmp_path / "a")])
    for path in run.iterdir():
        path.unlink()
    run.rmdir()
    assert watch.look(NOW) == ([], {})


# --- frames


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_frame_fits_its_screen(tmp_path, width, count):
    for i in range(count):
        make_run(tmp_path / f"{i}", [*ROWS, row(110, train_loss=90.0)] if i else ROWS)
    lines = frame(tmp_path, width, height=30).splitlines()
    assert len(lines) <= 30 and max(map(len, lines)) <= width
    beside = min(count, width // 48)
    assert lines[0].count("running") == beside
    shown = sum(line.count("running") for line in lines)
    assert shown == count or f"not shown: {count - shown} for lack of room" in lines[-1]


def test_a_small_screen_shows_a_run_all_the_same(tmp_path):
    make_run(tmp_path / "a")
    assert "running" in frame(tmp_path, 48, height=5)


def braille(text):
    return [c for c in text if 0x2800 < ord(c) <= 0x28ff]


def test_the_curve_falls_from_left_to_right_and_ends_where_the_run_is(tmp_path):
    make_run(tmp_path / "a")
    lines = frame(tmp_path, 100).splitlines()[1:11]
    places = [(i, j) for i, line in enumerate(lines) for j, c in enumerate(line) if braille(c)]
    left, right = min(places, key=lambda p: p[1]), max(places, key=lambda p: p[1])
    assert left[0] < right[0] and 50 <= right[1] <= 58  # step 100 of 200
    assert "o" in "".join(lines)


def test_dots_of_a_line():
    across = watching.places([(0, 1.0), (10, 0.0)], ((0, 10), (0.0, 1.0)), columns=2, lines=1)
    assert across == [(0, 0), (3, 3)] and watching.dots(across, 1) == {(0, 0): 0x01 | 0x10, (0, 1): 0x04 | 0x80}
    apart = watching.places([(0, 1.0), (5, float("nan")), (10, 1.0)], ((0, 10), (0.0, 1.0)), 2, 1)
    assert watching.dots(apart, 1) == {(0, 0): 0x01, (0, 1): 0x08}  # nothing between them
    above = watching.places([(0, 9e99), (10, 0.5)], ((0, 10), (0.0, 1.0)), 2, 1)
    assert above[0] == (0, -1)


def test_a_terminal_without_unicode_gets_ascii(tmp_path):
    make_run(tmp_path / "a")
    text = frame(tmp_path, encoding="ascii")
    assert text.isascii() and "...." in text and "o" in text and "running" in text


def test_names_and_errors_of_strangers_drive_no_terminal(tmp_path):
    make_run(tmp_path / "a\x1b[2J[red]", status="error", error="\x1b]0;x\x07 [bold]no[/bold]")
    text = frame(tmp_path)
    assert "\x1b" not in text and "\\x1b[2J[red]" in text and "[bold]no[/bold]" in text


# --- the command


def main(capsys, *argv):
    code = logger.main(["watch", *map(str, argv)])
    return code, *capsys.readouterr()


def test_once_and_a_pipe_print_one_frame(tmp_path, capsys):
    make_run(tmp_path / "a", status="done")
    for flags in ([], ["--once"]):
        code, out, err = main(capsys, tmp_path, *flags)
        assert (code, err) == (0, "") and out.count("finished") == 1 and "\x1b" not in out


def test_json_gives_the_numbers(tmp_path, capsys):
    make_run(tmp_path / "a", status="done")
    code, out, _ = main(capsys, tmp_path, "--json")
    (n,) = json.loads(out)["runs"]
    assert code == 0 and (n["state"], n["step"]) == ("finished", 100) and "run" not in n


def test_watches_logs_where_nothing_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(capsys) == (1, "", "error: 'logs' is not there\n")
    make_run(tmp_path / "logs" / "mine" / "a", status="done")
    assert "mine/a  finished" in main(capsys)[1]


@pytest.mark.parametrize("name, words", [("gone", "is not there"), ("empty", "holds no log")])
def test_a_wrong_folder_is_one_sentence(tmp_path, capsys, name, words):
    (tmp_path / "empty").mkdir()
    code, out, err = main(capsys, tmp_path / name)
    assert (code, out) == (1, "") and words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize("interval", ["0", "-1", "nan", "inf", "x", "1e9"])
def test_a_wrong_interval_is_told(tmp_path, capsys, interval):
    with pytest.raises(SystemExit) as stop:
        main(capsys, tmp_path, f"--interval={interval}")
    assert stop.value.code == 2 and "interval" in capsys.readouterr().err


class Screen:
    """`logger.py watch` on a pseudo-terminal; `text` is what it has written."""

    program = ("logger.py", "watch")

    def __init__(self, *argv):
        pty = pytest.importorskip("pty")
        self.terminal, inner = pty.openpty()
        known = os.environ | {"TERM": "xterm", "COLUMNS": "100", "LINES": "30", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, str(ROOT / self.program[0]), *self.program[1:], *map(str, argv)]
        self.process = subprocess.Popen(command, stdin=inner, stdout=inner, stderr=inner, env=known, close_fds=True,
                                        start_new_session=True, preexec_fn=self.take_terminal)
        os.close(inner)
        self.text = ""

    @staticmethod
    def take_terminal():
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def until(self, words):
        """Reads on until the words have come; the end of the process ends it, too."""
        while words not in self.text:
            assert self.read(200), f"{words!r} did not come: {self.text[-2000:]}"

    def read(self, seconds):
        """Whether something came in this time; it is added to the text."""
        if not select.select([self.terminal], [], [], seconds)[0]:
            return False
        try:
            piece = os.read(self.terminal, 65536)
        except OSError:  # closed
            piece = b""
        self.text += piece.decode(errors="replace")
        return bool(piece)

    def send(self, keys, words):
        """Types, and reads on until the words have come."""
        self.text = ""
        os.write(self.terminal, keys.encode())
        self.until(words)

    def interrupt(self, words):
        """Ctrl-C until the words come: one between readline's echo and its wait is not seen before the next key."""
        self.text, tries = "", 0
        while words not in self.text and tries < 40:
            os.write(self.terminal, b"\x03")
            tries += 1
            while words not in self.text and self.read(5):
                pass
        self.until(words)

    def end(self):
        """What comes until its end, and its exit code."""
        self.text = ""
        try:
            while piece := os.read(self.terminal, 65536):
                self.text += piece.decode(errors="replace")
        except OSError:
            pass
        os.close(self.terminal)
        return self.text, self.process.wait(60)


def test_the_screen_follows_a_growing_log_and_ctrl_c_ends_it(tmp_path):
    run = make_run(tmp_path / "a")
    os.utime(run / "metrics.jsonl")
    screen = Screen(tmp_path, "--interval", "0.1")
    try:
        screen.until("step 100/200")
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(row(110)) + "\n")
        screen.until("step 110/200")
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"event": "end", "status": "done", "step": 110}) + "\n")
        screen.until("finished")
        os.write(screen.terminal, b"\x03")
        text, code = screen.end()
    finally:
        screen.process.kill()
    after = text.rpartition("\x1b[?1049l")[2]  # back from the screen of its own
    assert code == 0 and "Traceback" not in text and "KeyboardInterrupt" not in text
    assert "step 110/200" in after and "watched" in after
    assert "\x1b[?25h" in text  # the cursor is shown again
