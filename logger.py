"""Read, compare and judge the logs of training runs: ours, and those of the public NanoGPT speedrun of every year.

    python logger.py --experiment_name NAME        # runs of logs/NAME: table (logs/NAME/logs.txt), plots in images/NAME
    python logger.py show LOG...                   # a screen per run: status, versions, losses, time, memory
    python logger.py compare A B [C...]            # groups of runs: means, Welch's t-test, equal steps and time, a plot
    python logger.py diff A B                      # what changed: settings, functions, text, environment, effect
    python logger.py profile RUN                   # time of a step, overlap, heaviest operations of its traces
    python logger.py stats FOLDER --target 3.28    # is the mean loss below the target; how many runs are missing
    python logger.py verify FOLDER                 # does a record folder hold what its README claims
    python logger.py extract LOG -o train_gpt.py   # the source inside a log, ready to run
    python logger.py export LOG... -o runs.csv     # every record as CSV or JSON, or to wandb: --wandb PROJECT
    python logger.py board FOLDER... --html FILE   # leaderboard: Markdown on the terminal, one self-contained page

A LOG is a file, a folder (searched for run folders, *.txt and *.log) or a glob. --json prints the numbers under stable
keys, --markdown the report as Markdown: `stats FOLDER --target 3.28 --markdown > statistics.md`.
Exit codes: 0 fine; 1 a check failed (stats: p is not below alpha; verify: a claim is contradicted; show --strict: a run
is not complete) or an input could not be used, said in one line of `error: ...`; 2 wrong usage.

A run is a public log (source, ====, machine, ====, step lines; llm.c's `s:1 trl:3.2` lines) or a folder of ours with
    metrics.jsonl  one object a line: training steps, validations, {"event": "resume"}, a closing {"event": "end"};
                   of mixtures of experts {"event": "routers"}: the load of each expert since the report before
    hellaswag.jsonl  scores of evals/hellaswag.py --follow, an object a line
    log.txt        the public format, read where metrics.jsonl is missing or holds no step
    config.json    settings, git commit, data, hardware and torch version
Runs may be in progress, killed or damaged: what can be read is shown, what was left out is named in a note. Files are
read in blocks and records above MAX_ROWS are thinned out, so that a log of any size fits in memory.

Parsing (bytes -> Trace -> Run -> numbers) knows nothing of presenting (tables, JSON, figures), and a command is a
function of the parsed arguments. Losses are in nats/token; times are in ms wherever a name ends in _ms, in s with _s.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends it without a traceback

import argparse
import csv
import errno
import functools
import glob
import hashlib
import io
import json
import math
import os
import re
import shutil
import stat
import statistics
import sys
import warnings
from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple
from unicodedata import east_asian_width

SEPARATOR = "=" * 100  # a line of exactly this; nvidia-smi's rules are shorter, with | or + first
BAR = SEPARATOR.encode()
BLOCK = 1 << 20  # bytes read at a time, and the longest line
MAX_SECTION = 4 << 20  # bytes kept of the source and of the text about the machine; public sources are below 200 KB
MAX_ROWS = 100_000  # records kept of a trial, then every second one goes
MAX_TRIALS = 1000
MAX_REPORTS = 400  # reports of the routers kept, then every second one goes
MAX_LAYERS = 100  # of a report: each is a panel of a figure
MAX_LOADS = 1_000_000  # shares of experts kept in all reports of a run
MAX_SCORES = 400  # HellaSwag scores kept of a run
MAX_KEYS, MAX_VALUE = 64, 200  # keys of a record, characters of a text in it
MAX_LINE = 2000  # bytes read of a line with a record
MAX_PARTS = 100  # files of a source
MAX_SECTIONS = 6  # parts between separators that are kept
MAX_COLUMNS = 1000  # of an exported table
MAX_CELL = 500  # characters of a cell of a table
MAX_TEXT = 16 << 20  # characters read of config.json, README.md and hellaswag.jsonl
HUGE, TINY = 1e30, 1e-100  # a number beyond is infinite or 0: none of a training run is
STEP = re.compile(r"step:(\d{1,15})(?:/(\d{1,15}))?", re.ASCII)
NUMBER = re.compile(r"([+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:e[+-]?\d++)?|[+-]?(?:nan|inf))(ms|s)?", re.ASCII | re.I)
DECIMAL = rb"(\d{1,15}(?:\.\d{0,15})?)"
USUAL_STEP = re.compile(  # nearly every line of every log; the others go through parse_step_line
    rb"step:(\d{1,15})/(\d{1,15}) (?:(val|train)_loss:%b )?train_time:%b(m?)s step_avg:(?:nan|%b)ms"
    % (DECIMAL, DECIMAL, DECIMAL))
RECORDS = (b"step:", b"s:", b"peak memory", b"resumed after", b"\x1b")  # lines that are read
LLMC = re.compile(r"s:(\d{1,15}) (tel|trl):", re.ASCII)
PEAK = re.compile(r"peak memory (?:allocated|consumption): (\d{1,15}) MiB(?: reserved: (\d{1,15}) MiB)?", re.ASCII)
RESUMED = re.compile(r"resumed after step (\d{1,15})", re.ASCII)
PART = re.compile(rb"^-{40}\n# ([\w.-]{1,100})\n-{40}\n", re.MULTILINE)  # one more file of a source
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
GPU = re.compile(r"^\| {1,9}\d{1,3} {1,9}(\S.{0,80}?) {1,80}(?:On|Off|N/A) {1,80}\|", re.M)  # of nvidia-smi
GPU_LIST = re.compile(r"^GPU \d+: (.+?) \(UUID", re.MULTILINE)
DATE = re.compile(r"^\w{3} (\w{3}) +(\d{1,2}) ([\d:]{8}) (?:[A-Z]{2,5} )?(\d{4})", re.M | re.ASCII)
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
FACTS = {  # key of Trace.header: where it stands in the text about the machine
    "python": r"^Running python (\S+)",
    "torch": r"^Running pytorch (?:version )?(\d\S*)",
    "cuda": r"^Running pytorch .* compiled for CUDA (\S+)",
    "triton": r"^Running Triton version (\S+)",
    "driver": r"Driver Version: (\S+)",
    "world_size": r"^Running pytorch .* with world_size (\d{1,5})",
    "gpu": r"^Running pytorch .{0,300} on (\S.{0,100}?) with world_size",
    "cpu": r"^(?:Running on )?(?:CPU|Model name):[ \t]*([^,\n]+)",
    "train_tokens": r"^Training DataLoader: total number of tokens: (\d{1,18})",
    "params_total": r"^[ \t]*Total parameters: ([\d,]{1,24})",
    "settings": r"^Settings: (\{.{1,100000}\})$",
}
FACTS = {key: re.compile(form, re.ASCII | re.I | re.M) for key, form in FACTS.items()}
LONG = re.compile(r"^(?!Settings: )(.{500}).+", re.MULTILINE)  # a line about the machine that is cut
LOSSES = ("train_loss", "val_loss")
ACCURACIES = ("per_token", "per_byte", "raw")  # of HellaSwag: by what a loss is divided
DEAD = 1 / 20  # an expert with less than this share of the mean load is dead, as in train_moe.py
RUN_FILES = ("metrics.jsonl", "log.txt", "config.json", "hellaswag.jsonl")
COMPLETED = ("done", "target")  # reached the last step or the target loss
BACKWARD = "step numbers go back without a resume line; the later records are used"


# ---------------------------------------------------------------------------------------------------------------------
# Parsing: bytes -> Trace


@dataclass
class Trace:
    """What a log file tells: records of its last trial in order, those of the trials before, the closing record ({} if
    none), the machine, the source by file name, what was left out."""

    rows: list[dict] = field(default_factory=list)
    end: dict = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    earlier: list[list[dict]] = field(default_factory=list)
    era: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    code_hash: str | None = None
    stage_ms: list[dict] = field(default_factory=list)  # of each trial {stage: ms of each step}
    resets: int = 0  # falls of the clock: until record 21 the scripts set it back after 10 steps
    routers: list[dict] = field(default_factory=list)  # reports as of parse_routers, in order
    scores: dict[int, dict] = field(default_factory=dict)  # by step, as of parse_score
    changes: list[tuple] = field(default_factory=list)  # (step of a resume, its changed settings in words)

    @property
    def trials(self):
        return [*self.earlier, self.rows] if self.rows else self.earlier

    def note(self, text):
        self.notes += [text] if text not in self.notes else []

    def rewind(self, step):
        """Drop the records after `step`: the run was continued from there."""
        for records in (self.rows, self.routers):
            while records and records[-1]["step"] > step:  # in order
                records.pop()
        self.changes = [change for change in self.changes if change[0] <= step]
        if self.scores and max(self.scores) > step:
            self.scores = {at: score for at, score in self.scores.items() if at <= step}

    def add(self, row, trials=False):
        """Append a record. One whose step goes back replaces those it repeats, or starts the next of several `trials`:
        after a last step or at step 0 or 1. A record of a finished trial that is told again is left out."""
        if self.rows and row["step"] < (last := self.rows[-1])["step"]:
            whole = last["step"] == last.get("iterations")
            if trials and whole and row["step"] > 1 and row in self.rows[-100:]:
                return
            if trials and (whole or row["step"] <= 1):
                self.next_trial()
            else:
                self.rewind(row["step"] - 1)
                self.note(BACKWARD)
        self.rows.append(row)
        if len(self.rows) > MAX_ROWS:
            self.thin()

    def add_routers(self, report):
        """Append a report of the routers; it replaces those from its step on, and all of another shape."""
        self.routers = [r for r in self.routers if r["step"] < report["step"] and r["layers"] == report["layers"]
                        and len(r["load"][0]) == len(report["load"][0])] + [report]
        most = min(MAX_REPORTS, max(2, MAX_LOADS // sum(map(len, report["load"]))))
        if len(self.routers) > most:
            self.routers = self.routers[::-2][::-1]  # the last one stays
            self.note(f"more than {most} reports of the routers: not all of them were kept")

    def add_score(self, score):
        """Take a HellaSwag score. Of a step that of the most tasks counts, of these the last."""
        if score["tasks"] >= self.scores.get(score["step"], score)["tasks"]:
            self.scores[score["step"]] = score
        if len(self.scores) > MAX_SCORES:
            del self.scores[min(self.scores)]
            self.note(f"more than {MAX_SCORES} HellaSwag scores: the first ones were left out")

    def add_change(self, record):
        """Take the settings that a resume event says were changed: {name: [old, new]}."""
        changed = record.get("changed")
        if isinstance(changed, dict) and changed:
            pairs = (f"{name[:MAX_VALUE]} {change_text(pair)}" for name, pair in [*changed.items()][:MAX_KEYS])
            self.changes = [*self.changes[-MAX_KEYS:], (record["step"], ", ".join(pairs))]
        elif changed:
            self.note("the changed settings of a resume event are no object and were left out")

    def next_trial(self):
        if len(self.earlier) < MAX_TRIALS and sum(map(len, self.earlier)) < 3 * MAX_ROWS:
            self.earlier.append(self.rows)
        else:
            self.note(f"more than {len(self.earlier)} trials: those before the last were left out")
        self.rows = []

    def thin(self):
        """Drop every second record, of the validations only if they are too many themselves, never the best one."""
        vals = [row for row in self.rows if number(row.get("val_loss")) is not None]
        best = min(vals, key=lambda row: row["val_loss"], default=None)
        many = len(vals) > MAX_ROWS // 2
        keep = [i % 2 == 0 or r is best or ("val_loss" in r and not many) for i, r in enumerate(self.rows[:-1])]
        self.rows = [row for row, kept in zip(self.rows, [*keep, True], strict=True) if kept]
        self.note(f"more than {MAX_ROWS} records: not all of them were kept")


def open_file(path):
    """A file opened for reading bytes. OSError unless it is a regular file: a FIFO may block, a device never end."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0)))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is a FIFO or a device, not a file", str(path))
    return file


def read_text(path):
    """Text of a file, up to MAX_TEXT characters, line ends as \\n, bytes that are not UTF-8 as U+FFFD; "" where there
    is no such file."""
    if not path.is_file():
        return ""
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="replace") as file:
        return file.read(MAX_TEXT)


def number(value):
    """`value` if it is a number (nan and inf included), else None: text, true, null, integers beyond 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < 2**63 else None


def limited(value):
    """A float without what overflows or vanishes as soon as one computes with it; all else as it is."""
    if not isinstance(value, float) or TINY < abs(value) < HUGE:
        return value
    return math.copysign(math.inf if abs(value) >= HUGE else 0.0, value) if value == value else value


def shortened(row):
    """A record with its first MAX_KEYS keys, beside those that are read, and the start of long texts."""
    keys = [key for key in ("step", "iterations", *LOSSES, "train_time_ms", "tokens") if key in row]
    keys = dict.fromkeys([*keys, *list(row)[:MAX_KEYS]])
    row = {key[:MAX_VALUE]: row[key] for key in keys}
    return {key: value if number(value) is not None or value is None else str(value)[:MAX_VALUE]
            for key, value in row.items()}


def change_text(pair):
    """[old, new] of a changed setting as `0.06 -> 0.03`."""
    old_new = pair if isinstance(pair, list) and len(pair) == 2 else ["?", pair]
    return " -> ".join(json.dumps(value)[:MAX_VALUE] for value in old_new)


def parse_pairs(words):
    """{key: value} of `key:value` words. Numbers become floats; a unit ms or s moves into the key: `train_time:1.5s`
    gives train_time_ms = 1500.0. Unknown keys stay, words without a colon are skipped."""
    row = {}
    for key, colon, value in (word.partition(":") for word in words):
        if match := NUMBER.fullmatch(value):
            value, unit = float(match[1]), (match[2] or "").lower()
            key, value = (f"{key}_ms" if unit else key), limited(value * 1000 if unit == "s" else value)
        if key and colon:
            row.setdefault(key, value)
    return row


def parse_step_line(line):
    """`step:N/M key:value ...` as a dict with N as `step` and M as `iterations` (None without /M), llm.c's
    `s:N tel:L` and `s:N trl:L ...` likewise; None if `line` has another form."""
    line = ANSI.sub("", line)
    words = line.split()
    if head := STEP.fullmatch(words[0]) if words else None:
        return {"step": int(head[1]), "iterations": int(head[2]) if head[2] else None} | {
            key: value for key, value in parse_pairs(words[1:]).items() if key not in ("step", "iterations")}
    if LLMC.match(line):
        row = parse_pairs(words[1:])
        names = {"tel": "val_loss", "trl": "train_loss"}
        row = {names.get(key, key): value for key, value in row.items()}
        return {**row, "step": int(words[0][2:]), "iterations": None}
    return None


def usual_row(match):
    """The record of a USUAL_STEP match."""
    step, last, key, loss, time, milli, average = match.groups()
    row = {"step": int(step), "iterations": int(last)}
    if key:
        row[f"{key.decode()}_loss"] = float(loss)
    row["train_time_ms"] = float(time) if milli else float(time) * 1000
    row["step_avg_ms"] = float(average or "nan")
    return row


def whole_part(line):
    """A last line without line end may be cut inside a number (3.2 of 3.2807): its last word goes, unless a unit at its
    end shows that it is whole."""
    return line if re.search(rb"\d(ms|s| MiB)$", line) else line.rpartition(b" ")[0]


class LogParser:
    """Parses blocks of whole lines. Step lines count after the last separator only, because the code may quote one."""

    def __init__(self, keep_rows=True):
        self.keep_rows, self.sections, self.trace = keep_rows, [], None
        self.bar()

    def bar(self):
        """A separator, or the start of the file: what follows may be the steps."""
        if len(self.sections) == MAX_SECTIONS:
            del self.sections[-2]
        self.sections.append(bytearray())
        self.before, self.trace, self.bad, self.time = self.trace, Trace(), 0, -1.0

    def feed(self, block):
        """`block` ends with a line end; "\\r\\n" is read as "\\n"."""
        block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        start = at = 0
        while (at := block.find(BAR, at)) >= 0:
            end = block.find(b"\n", at) + 1 or len(block)
            if (at == 0 or block[at - 1 : at] == b"\n") and block[at:end].rstrip() == BAR:
                self.text(block[start:at])
                self.bar()
                start = end
            at = end
        self.text(block[start:])

    def text(self, block):
        """Lines of one section."""
        section = self.sections[-1]
        section += block[: MAX_SECTION - len(section)]
        if any(block.startswith(start) or b"\n" + start in block for start in RECORDS):
            for line in block.split(b"\n"):
                if match := USUAL_STEP.fullmatch(line):
                    self.row(usual_row(match))
                elif line:
                    self.other(line)

    def other(self, line):
        """A line that has not the usual form."""
        if not line.startswith(RECORDS):
            return
        line = line[:MAX_LINE].decode("utf-8", "replace")
        if match := PEAK.search(line):
            values = zip(("peak_memory_mib", "peak_reserved_mib"), match.groups(), strict=True)
            self.trace.end = {key: int(value) for key, value in values if value}
        elif match := RESUMED.match(line):
            self.trace.rewind(int(match[1]))
            self.time = -1.0
        elif row := parse_step_line(line):
            if any(isinstance(row.get(key), str) for key in LOSSES):
                self.bad += 1
            else:
                self.row(row if len(row) <= MAX_KEYS else shortened(row))

    def row(self, row):
        """A record; without keep_rows one that holds no loss is replaced by the next."""
        trace, time = self.trace, row.get("train_time_ms", -1.0)
        if isinstance(time, float):
            trace.resets += 0 <= time < self.time / 2 and bool(trace.rows) and row["step"] > trace.rows[-1]["step"]
            self.time = time
        if not self.keep_rows and trace.rows and trace.rows[-1].keys().isdisjoint(LOSSES):
            if row["step"] >= trace.rows[-1]["step"]:
                trace.rows.pop()
        trace.add(row, trials=True)

    def close(self):
        """The Trace of all that was fed."""
        trace, sections = self.trace, [bytes(section) for section in self.sections]
        if len(sections) > 2 and not sections[-1].strip() and self.before.rows:  # a separator after the last line
            trace, sections = self.before, sections[:-1]
        first_bar = len(sections) > 1 and not sections[0].strip()
        sections = sections[1:] if first_bar else sections
        if self.bad:
            trace.note(f"{self.bad} step line(s) of log.txt left out: their loss is not a number")
        last = trace.rows[-1] if trace.rows else {"step": 0}
        done = "val_loss" in last and last["step"] == last["iterations"]
        if done or trace.end:
            trace.end["status"] = "done" if done else f"stopped at step {last['step']}"
        machine = [*sections[1:-1], sections[-1].partition(b"step:")[0]]  # without the source
        machine = b"\n".join(section[:16384] for section in machine)
        trace.header = parse_header(machine.decode("utf-8", "replace"))
        if len(sections) > 1:
            split_source(trace, sections[0])
        trace.era = era_of(trace, sections, first_bar)
        return trace


def split_source(trace, source):
    """Fill in the parts of `trace` and the hash of all of them: sha256 without regard to line ends around the text."""
    trace.code_hash = hashlib.sha256(source.strip()).hexdigest()[:12] if source.strip() else None
    if len(source) == MAX_SECTION:
        trace.note(f"the source is longer than {MAX_SECTION >> 20} MiB: it was cut")
    first, *others = PART.split(source, MAX_PARTS)
    names, texts = [b"train_gpt.py", *others[::2]], [first, *others[1::2]]
    if len(others) == 2 * MAX_PARTS:
        trace.note(f"the source holds {MAX_PARTS} files or more: those after them are in the last one")
    for name, text in zip(names, texts, strict=True):
        name = name.decode("ascii", "replace")
        trace.parts[name] = text.decode("utf-8", "replace").strip("\n") + "\n"


def parse_header(text):
    """What is said of the machine: FACTS, device, gpus, gpu_count and date (ISO), each only where it is named."""
    text = LONG.sub(r"\1", text)
    found = {key: match[1].strip() for key, form in FACTS.items() if (match := form.search(text))}
    names = GPU.findall(text) or GPU_LIST.findall(text)
    names = names or [found["gpu"]] * int(found["world_size"]) if "gpu" in found else names
    for key in ("world_size", "train_tokens", "params_total"):
        found |= {key: int(digits)} if (digits := found.get(key, "").replace(",", "")) else {}
    if names:
        found |= {"gpus": names[0], "gpu_count": len(names), "device": times(names[0], len(names))}
    elif "cpu" in found:
        found["device"] = found["cpu"]
    if (match := DATE.search(text)) and match[1] in MONTHS:
        found["date"] = f"{match[4]}-{MONTHS.index(match[1]) + 1:02}-{int(match[2]):02} {match[3]}"
    return {key: value for key, value in found.items() if key not in ("gpu", "cpu")}


def era_of(trace, sections, first_bar):
    """Which form of the public format a log has, as docs of the formats call them."""
    tail, last = sections[-1][:65536], trace.trials[-1][-1] if trace.trials else {}
    if last and last["iterations"] is None and "train_time_ms" not in last:
        return "llm.c"
    if len(sections) == 1:
        return "step lines only" if last else ""
    if (time := re.search(rb"train_time:[\d.]+(m?s)", tail)) and time[1] == b"s":
        return "track 3, seconds"
    if first_bar:
        return "10/2024, separator first"
    if len(sections) > 3:
        return "12/2024, three separators"
    if "driver" not in trace.header:
        return "two separators, no nvidia-smi"
    if len(trace.parts) > 1:
        return "2026, several files"
    if b"Compiling model" in tail:
        return "12/2025, warm-up lines"
    if "triton" in trace.header:
        return "07/2025, Triton version"
    return "01/2025, clock reset" if trace.resets or b"step_avg:nanms" in tail else "02/2025, two separators"


def blocks_of(file):
    """Bytes of a binary file as blocks that end with a line end; a longer line than BLOCK is cut. A last line without
    line end comes without what may be cut."""
    rest, head = b"", file.read(BLOCK)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, as PowerShell's > writes
        file.seek(0)
        text = io.TextIOWrapper(file, "utf-16", errors="replace", newline="")
        head, read = text.read(BLOCK).encode("utf-8", "replace"), lambda: text.read(BLOCK).encode("utf-8", "replace")
    else:
        head, read = head.removeprefix(b"\xef\xbb\xbf"), lambda: file.read(BLOCK)
    while head:
        data = rest + head
        cut = data.rfind(b"\n") + 1 or (len(data) if len(data) > BLOCK else 0)
        if cut:
            yield data[:cut]
        rest, head = data[cut:], read()
    if rest:
        yield whole_part(rest.rstrip(b"\r")) + b"\n"


def parse_log(text, keep_rows=True):
    """Trace of a log.txt, given as text or as an open binary file."""
    parser = LogParser(keep_rows)
    for block in blocks_of(io.BytesIO(text.encode("utf-8", "replace")) if isinstance(text, str) else text):
        parser.feed(block)
    return parser.close()


def parse_object(text):
    """The JSON object in `text`, {} if it holds none, or one that is nested too deeply to be written again."""
    try:
        found = json.loads(text) if not too_deep(text) else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def too_deep(text, most=200):
    """Whether brackets in `text` are nested deeper than `most`; those within strings count, too."""
    if text.count("[") + text.count("{") <= most:
        return False
    depths = accumulate(1 if bracket[0] in "[{" else -1 for bracket in re.finditer(r"[\[\]{}]", text))
    return any(depth > most for depth in depths)


def parse_record(line):
    """A record of metrics.jsonl, None if damaged or without a step. A run killed inside a line and then resumed leaves
    `{"step":1{"event":"resume",...}`: the event is whole."""
    record = parse_object(line) or parse_object(line[max(0, line.rfind('{"event"')) :])
    step = number(record.get("step"))
    if step is None or not 0 <= step < 1e15 or step != int(step):
        return None
    return {**{key: limited(value) for key, value in record.items()}, "step": int(step)}


def parse_routers(record):
    """What is read of a report of the routers, None if that is damaged: {"step", "layers", "load": of each layer an
    array with the share of the choices of each expert, "dropped": largest share of dropped choices, None if unknown}.
    """
    try:
        load, layers = [array("d", shares) for shares in record["load"]], list(record["layers"])
    except (KeyError, TypeError, OverflowError):
        return None
    whole = 0 < len(load) == len(layers) <= MAX_LAYERS and len({*map(len, load)}) == 1
    whole = whole and all(type(i) is int and 0 <= i < 1000 for i in layers)
    if not whole or not all(min(shares, default=-1) >= 0 and 1e-9 < sum(shares) < 1e9 for shares in load):  # nor nan
        return None
    dropped = record.get("dropped") if isinstance(record.get("dropped"), list) else []
    dropped = max((x for x in map(number, dropped) if x is not None and math.isfinite(x)), default=None)
    return {"step": record["step"], "layers": layers, "load": load, "dropped": dropped}


def parse_score(record):
    """The HellaSwag score in a record: {"step", "tasks", "per_token", "per_byte", "raw"}, accuracies
    from 0 to 1; None where there is none, or a damaged one."""
    found = record.get("hellaswag")
    found = found if isinstance(found, dict) else {}
    score = {key: number(found.get(key)) for key in ("tasks", *ACCURACIES)}
    whole = None not in score.values() and 0 < score["tasks"] < 1e9
    whole = whole and all(0 <= score[key] <= 1 for key in ACCURACIES)
    return {"step": record["step"], **score} if whole else None


def parse_metrics(text):
    """Trace of a metrics.jsonl, given as text or lines. Records after a closing one mean that the run went on: only a
    last one is its end."""
    trace, bad, cut, unclear, wrong = Trace(era="ours, metrics.jsonl"), 0, False, 0, 0
    for line in text.split("\n") if isinstance(text, str) else text:
        bad += cut  # a cut last line is what a kill leaves and says nothing of the rest
        record = parse_record(line)
        cut = record is None and line.strip() != ""
        if record is None:
            continue
        event = record.get("event")
        trace.end = record if event == "end" else {}
        if event == "resume":
            trace.rewind(record["step"])
            trace.add_change(record)
        elif event == "routers":
            report = parse_routers(record)
            trace.add_routers(report) if report else None
            unclear += report is None
        elif event is None:
            row = {key: value for key, value in record.items() if key not in LOSSES or number(value) is not None}
            wrong += any(record[key] is not None for key in LOSSES if key in record and key not in row)
            if not row.keys().isdisjoint(LOSSES):
                trace.add(row if len(row) <= MAX_KEYS and len(line) < 5000 else shortened(row))
            if score := parse_score(record):
                trace.add_score(score)
    bad += cut and line.endswith("\n")
    trace.notes += [f"{bad} unreadable line(s) of metrics.jsonl left out"] if bad else []
    trace.notes += [f"{wrong} loss(es) of metrics.jsonl left out: they are no numbers"] if wrong else []
    if trace.end.get("status") == "error":
        trace.note(f"ended with an error: {str(trace.end.get('error', 'it does not say which'))[:2000]}")
    trace.notes += [f"{unclear} router report(s) left out: no load of each expert of each layer"] if unclear else []
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# Runs: files -> Run -> numbers


@dataclass
class Run:
    """One run folder or log file; `source` names the file that the trace is from, None if there is nothing in it."""

    path: Path
    source: str | None
    trace: Trace
    config: dict


def read_run(path, keep_rows=True):
    """Run of the folder `path`."""
    log = read_log(path / "log.txt", keep_rows).trace if (path / "log.txt").is_file() else Trace()
    trace = Trace()
    if (path / "metrics.jsonl").is_file():
        with io.TextIOWrapper(open_file(path / "metrics.jsonl"), encoding="utf-8-sig", errors="replace") as file:
            trace = parse_metrics(iter(lambda: file.readline(BLOCK), ""))
    odd = [name for name in RUN_FILES if (path / name).exists() and not (path / name).is_file()]
    source = "log.txt" if log.rows or log.end else None
    source = "metrics.jsonl" if trace.rows or trace.end else source
    if source == "log.txt":
        log.notes = [*trace.notes, "read from log.txt: metrics.jsonl is missing or holds no step", *log.notes]
        trace = log
    trace.header, trace.parts, trace.code_hash = log.header, log.parts, log.code_hash
    for line in read_text(path / "hellaswag.jsonl").splitlines():
        if score := parse_score(parse_record(line) or {}):
            trace.add_score(score)
    config = parse_object(text := read_text(path / "config.json"))
    trace.notes += ["config.json is no JSON object and was left out"] if text and not config else []
    if not isinstance(config.get("settings", {}), dict):
        trace.note("the settings of config.json are no object and were left out")
    trace.notes += [f"{', '.join(odd)} left out: no regular file"] if odd else []
    return Run(path, source, trace, config)


def read_log(path, keep_rows=True):
    """Run of the log file `path`."""
    with open_file(path) as file:
        return Run(path, path.name, parse_log(file, keep_rows), {})


def find_logs(path, depth=50):
    """Run folders and *.txt and *.log files in the folder `path` and below, in the order of their names. FIFOs and
    devices of such names are listed: reading them says what they are."""
    if (path / "metrics.jsonl").is_file() or (path / "log.txt").is_file():
        return [path]
    found = []
    for entry in sorted(path.iterdir(), key=natural):
        if entry.is_dir() and not entry.is_symlink():
            found += find_logs(entry, depth - 1) if depth else []
        elif entry.suffix.lower() in (".txt", ".log") and entry.name != "logs.txt" and entry.exists():
            found.append(entry) if not entry.is_dir() else None
    return found


def expand(names):
    """Paths of all logs that files, folders and globs name, each once. FileNotFoundError if a name leads to none."""
    found = {}
    for name in names:
        hits = [Path(name)] if os.path.exists(name) else [Path(hit) for hit in sorted(glob.glob(name, recursive=True))]
        logs = [log for hit in hits for log in (find_logs(hit) if hit.is_dir() else [hit] * hit.exists())]
        if not logs:
            what = "holds no log: expected run folders, *.txt or *.log" if hits else "is not there"
            raise FileNotFoundError(f"'{name}' {what}")
        found |= {os.path.abspath(log): log for log in logs}
    return list(found.values())


def read_each(paths, keep_rows=False, keep_source=False):
    """Runs of log files and run folders, one after the other; one that cannot be read becomes a Run with a note that
    says why. Records without loss and sources are dropped unless a command needs them: 1,500 public logs hold a
    gigabyte of them. keep_rows="stages" keeps the times of the steps as plain numbers."""
    if len(paths) > 20 and sys.stderr.isatty():
        from tqdm import tqdm

        paths = tqdm(paths, unit="log", leave=False)
    for path in paths:
        yield load_one(path, keep_rows, keep_source)


def load(paths, keep_rows=False, keep_source=False):
    return list(read_each(paths, keep_rows, keep_source))


def load_one(path, keep_rows=True, keep_source=True):
    try:
        run = (read_run if path.is_dir() else read_log)(path, keep_rows)
    except OSError as error:
        return Run(path, None, Trace(notes=[f"cannot be read: {error.strerror or error}"]), {})
    run.trace.parts = run.trace.parts if keep_source else dict.fromkeys(run.trace.parts, "")
    if keep_rows == "stages":
        keep_stages(run.trace)
    return run


def keep_stages(trace):
    """Keep the time of each step as a plain number, and of the records those that hold a loss, and the last."""
    for i, rows in enumerate(trials := trace.trials):
        trace.stage_ms.append(found := {})
        stage = stage_of(rows)
        for step, ms in step_times(rows):
            found.setdefault(stage(step), array("d")).append(ms)
        trials[i] = [row for row in rows[:-1] if not row.keys().isdisjoint(LOSSES)] + rows[-1:]
    trace.earlier, trace.rows = trials[:-1], trials[-1] if trials else []


def folders(path):
    """Folders inside `path`, in natural order."""
    return sorted((entry for entry in path.iterdir() if entry.is_dir()) if path.is_dir() else [], key=natural)


def natural(name):
    """Sort key that puts run_2 before run_10."""
    return [(len(s), s) if s.isdecimal() else (0, s) for s in re.split(r"(\d+)", getattr(name, "name", name))]


def load_experiment(log_dir, name):
    """All runs in log_dir/name. Raises ValueError if `name` leads out of `log_dir`, FileNotFoundError if there is no
    such experiment or no run in it."""
    if not Path(name).parts or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"--experiment_name must name a folder inside '{log_dir}', not '{name}'")
    path, log_dir = Path(log_dir) / name, Path(log_dir)
    if not path.is_dir():
        known = [p.name for p in folders(log_dir)]
        listed = ", ".join(known[:20]) + (f" and {len(known) - 20} more" if len(known) > 20 else "")
        raise FileNotFoundError(f"no experiment '{name}' in '{log_dir}'; available: {listed or 'none'}")
    runs = [load_one(p) for p in folders(path) if any((p / name).is_file() for name in RUN_FILES[:3])]
    if not runs:
        raise FileNotFoundError(f"no run in '{path}': expected folders that hold one of {', '.join(RUN_FILES[:3])}")
    return runs


def latest(rows, key):
    """Last number that the rows give for `key`, or None."""
    return next((row[key] for row in reversed(rows) if number(row.get(key)) is not None), None)


def times(name, count):
    return f"{count}x {name}" if count > 1 else name


def device_of(run):
    """Device name from config.json, else from log.txt's header: one GPU for each process, one CPU for all of them."""
    hardware, world_size = run.config.get("hardware"), run.config.get("world_size")
    name = hardware.get("name") if isinstance(hardware, dict) else hardware
    if not isinstance(name, str):
        return run.trace.header.get("device")
    shared = not isinstance(world_size, int) or (isinstance(hardware, dict) and hardware.get("device") == "cpu")
    return name if shared else times(name, world_size)


def settings_of(run):
    """Settings of one of our runs, from config.json or else from its log's line about them."""
    found = run.config.get("settings") or parse_object(run.trace.header.get("settings") or "")
    return found if isinstance(found, dict) else {}


def balance_of(load):
    """How evenly the experts of a layer are loaded: the number of experts with even loads of the same entropy, largest
    / mean, standard deviation / mean (CV), and how many have less than 1/20 of the mean (dead)."""
    mean = sum(load) / len(load)
    ratios = [share / mean for share in load]  # 1: even
    entropy = math.log(len(load)) - sum(r * math.log(r) for r in ratios if r > 0) / len(load)
    return {"effective_experts": math.exp(entropy), "max_over_mean": max(ratios), "cv": statistics.pstdev(ratios),
            "dead": sum(r < DEAD for r in ratios)}


def router_numbers(run):
    """The last report of the routers: of effective experts, max/mean, CV and dropped share the worst of all layers, the
    sum of the dead; None without a report."""
    if not run.trace.routers:
        return None
    last = run.trace.routers[-1]
    layers = [balance_of(load) for load in last["load"]]
    effective = [layer["effective_experts"] for layer in layers]
    return {"step": last["step"], "layers": last["layers"], "experts": len(last["load"][0]),
            "worst_layer": last["layers"][effective.index(min(effective))], "effective_experts": min(effective),
            **{key: max(layer[key] for layer in layers) for key in ("max_over_mean", "cv")},
            "dead": sum(layer["dead"] for layer in layers), "dropped": last["dropped"]}


def accuracy(score, key):
    """(accuracy, its standard error) in percent."""
    p = score[key]
    return 100 * p, 100 * math.sqrt(p * (1 - p) / score["tasks"])


def accuracies(run):
    """[(step, accuracy per token, its standard error)] of a run's HellaSwag scores."""
    scores = sorted(run.trace.scores.values(), key=lambda score: score["step"])
    return [(score["step"], *accuracy(score, "per_token")) for score in scores]


def changes_of(run):
    """What was changed when the run was resumed, a sentence for each time."""
    return [f"changed on resume at step {step}: {words}" for step, words in run.trace.changes]


def summarize(run):
    """Numbers of a run folder as a flat dict, None where unknown. `val_loss` and `val_bpb` are of one validation, that
    of the closing record or else the last. `tokens_per_s` without a closing record is the average so far."""
    rows, end = run.trace.rows, run.trace.end
    known = {key: value for key, value in end.items() if number(value) is not None}
    vals = [row for row in [*rows, known] if number(row.get("val_loss")) is not None]
    final = vals[-1] if vals else {}
    good = [row for row in vals if math.isfinite(row["val_loss"])]
    best = min(good, key=lambda row: row["val_loss"], default={})
    step, time_ms, tokens = (known.get(key, latest(rows, key)) for key in ("step", "train_time_ms", "tokens"))
    status = f"running or killed at step {step}" if rows else "no step logged"
    status = str(end.get("status", "ended")) if end else status
    rate = tokens / time_ms * 1000 if tokens and time_ms else None
    extra = ("peak_memory_mib", "params_total", "params_active", "first_step_s", "target_step", "target_time_ms")
    return {
        "run_id": run.path.name,
        "path": str(run.path),
        "source": run.source,
        "status": status,
        "completed": status in COMPLETED,
        "step": step,
        "iterations": known.get("iterations", latest(rows, "iterations") or number(settings_of(run).get("iterations"))),
        "val_loss": final.get("val_loss"),
        "val_bpb": number(final.get("val_bpb")),
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step", step if best else None),
        "train_time_ms": time_ms,
        "step_avg_ms": latest(rows[-1:], "step_avg_ms") or (step and time_ms and time_ms / step) or None,
        "tokens": tokens,
        "tokens_per_s": known.get("tokens_per_s", rate),
        **{key: known.get(key) for key in extra},
        "routers": router_numbers(run),
        "hellaswag": max(run.trace.scores.values(), key=lambda s: s["step"], default=None),
        "torch": run.config.get("torch") or run.trace.header.get("torch"),
        "device": device_of(run),
        "notes": run.trace.notes + changes_of(run),
    }


@functools.cache
def files_being_written():
    """Paths of files that processes of this machine have open for writing; none where /proc does not tell."""
    found = set()
    for link in glob.glob("/proc/[0-9]*/fd/*"):
        try:
            flags = re.search(r"flags:\s*(\d+)", Path(link.replace("/fd/", "/fdinfo/")).read_text())
            found |= {os.readlink(link)} if flags and int(flags[1], 8) & os.O_ACCMODE else set()
        except OSError:  # closed meanwhile, or another user's
            continue
    return found


def off_beat(rows):
    """Whether the last record is a validation out of turn: a run that stops at a step of its choice ends so, one that
    is killed hardly ever."""
    steps = [row["step"] for row in rows if "val_loss" in row]
    gaps = [b - a for a, b in zip(steps, steps[1:], strict=False) if b > a]
    return len(gaps) > 1 and rows[-1]["step"] == steps[-1] and (steps[-1] - steps[0]) % gaps[0] != 0


def trial_status(rows, end=None):
    """"complete", "nan", "error" or "died" for the records of one trial; `end`: what is known of the end of the run."""
    last = rows[-1]
    if any(number(last.get(key)) is not None and not math.isfinite(last[key]) for key in LOSSES):
        return "nan"
    status = str((end or {}).get("status", ""))
    by_itself = status.startswith("stopped at") if end else off_beat(rows)
    if "val_loss" in last and (last["step"] == last.get("iterations") or by_itself):
        return "complete"
    llmc = last.get("iterations") is None and "val_loss" in last and "train_time_ms" not in last and not end
    return "complete" if status in COMPLETED or llmc else status if status in ("nan", "error") else "died"


def status_of(run):
    """complete, died, nan, error, running (a process of this machine has the log open for writing), or not a log."""
    trace = run.trace
    if not trace.trials and not trace.end:
        started = run.config or (trace.code_hash and trace.header.get("torch"))
        status = "died" if started else "not a log"
    else:
        ended = "error" if trace.end.get("status") == "error" else "died"
        status = trial_status(trace.rows, trace.end) if trace.rows else ended
    names = ("metrics.jsonl", "log.txt") if run.path.is_dir() else ("",)
    if status == "died" and any(os.path.realpath(run.path / name) in files_being_written() for name in names):
        return "running"
    return status


def trial_numbers(rows, end=None):
    """Final and best validation, time, last step and average of one trial."""
    vals = [row for row in rows if number(row.get("val_loss")) is not None]
    good = [row for row in vals if math.isfinite(row["val_loss"])]
    best = min(good, key=lambda row: row["val_loss"], default={})
    step, time_ms = rows[-1]["step"] if rows else None, latest(rows, "train_time_ms")
    average = latest(rows[-1:], "step_avg_ms")
    return {
        "status": trial_status(rows, end) if rows else "died",
        "steps": step,
        "max_step": latest(rows, "iterations"),
        "final_val_loss": vals[-1]["val_loss"] if vals else None,
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step"),
        "train_time_s": None if time_ms is None else time_ms / 1000,
        "step_avg_ms": average or (time_ms / step if time_ms and step else None),
    }


def crossing(rows, target):
    """{"step", "train_time_s"} of the first validation at or below the target, None without one."""
    for row in rows:
        if (loss := number(row.get("val_loss"))) is not None and loss <= target:
            time_ms = number(row.get("train_time_ms"))
            return {"step": row["step"], "train_time_s": time_ms and time_ms / 1000}
    return None


def describe(run, target=None):
    """Numbers of a run as `show` gives them, None where unknown; of several trials those of the last, and all of them
    under trial_runs."""
    trace, header, old = run.trace, run.trace.header, summarize(run)
    ends = [None] * (len(trace.trials) - 1) + [trace.end]
    trials = [trial_numbers(rows, end) for rows, end in zip(trace.trials, ends, strict=False)] or [trial_numbers([])]
    broken = [str(i) for i, trial in enumerate(trials[:-1], 1) if trial["status"] != "complete"]
    notes = old["notes"] + ([f"incomplete trials: {', '.join(broken)}"] if broken else [])
    notes += [f"the clock was set back {trace.resets} time(s)"] if trace.resets else []
    last = trials[-1]
    if last["status"] == "complete" and last["max_step"] and last["steps"] < last["max_step"]:
        notes.append(f"ended by itself at step {last['steps']} of {last['max_step']}")
    if run.source == "metrics.jsonl":
        last = {**last, "steps": old["step"], "max_step": old["iterations"], "final_val_loss": old["val_loss"]}
        last["train_time_s"] = None if old["train_time_ms"] is None else old["train_time_ms"] / 1000
    return {
        "path": str(run.path),
        "run_id": run.path.name if run.path.is_dir() else run.path.stem,
        "era": trace.era or None,
        **last,
        "status": status_of(run),
        "trials": len(trace.trials),
        "peak_allocated_mib": number(trace.end.get("peak_memory_mib")),
        "peak_reserved_mib": number(trace.end.get("peak_reserved_mib")),
        "target": target,
        "target_crossing": crossing(trace.rows, target) if target is not None else None,
        "tokens": old["tokens"],
        "data_tokens": header.get("train_tokens"),
        "params_total": old["params_total"] or header.get("params_total"),
        "params_active": old["params_active"],
        **{key: old[key] for key in ("routers", "hellaswag")},
        **{key: header.get(key) for key in ("python", "cuda", "triton", "driver", "world_size", "date")},
        "torch": old["torch"],
        "gpus": old["device"],
        "gpu_count": header.get("gpu_count"),
        "code_hash": trace.code_hash,
        "parts": list(trace.parts),
        "warnings": notes,
        "trial_runs": trials if len(trials) > 1 else [],
    }


SELF = ("seed", "run_id", "experiment_name", "log_dir", "resume", "wandb")  # settings that do not change the training


def differing(runs):
    """Names of the settings in config.json that are not the same in all runs."""
    settings = [found for run in runs if (found := settings_of(run))]
    names = dict.fromkeys(name for found in settings for name in found if name != "run_id")
    return [name for name in names if len({json.dumps(found.get(name), sort_keys=True) for found in settings}) > 1]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics. scipy is imported where it is used: it takes longer than reading a log.


@dataclass
class Sample:
    """One complete trial: what the statistics are made of."""

    run: Run
    rows: list[dict]
    loss: float
    time_s: float | None
    steps: int
    stage_ms: dict[str, array]


def samples_of(runs):
    """(samples, what was left out and why): complete trials with a finite loss, a trial that is in two files once."""
    found, dropped, seen = [], [], {}
    for run in sorted(runs, key=lambda run: run.trace.code_hash is None):  # a log before the console output of its run
        count = len(run.trace.trials)
        for i in range(count):
            name = f"{run.path.name}, trial {i + 1}" if count > 1 else run.path.name
            sample, why = sample_of(run, i, name, seen)
            found += [sample] if sample else []
            dropped += [f"{name}: {why}"] if why else []
        if not count and status_of(run) != "not a log":
            dropped.append(f"{run.path.name}: no step")
    return found, dropped


def sample_of(run, i, name, seen):
    """(Sample or None, reason) of trial i; `seen` maps the last validations of the trials so far to their names."""
    rows, last = run.trace.trials[i], i == len(run.trace.trials) - 1
    numbers = trial_numbers(rows, run.trace.end if last else None)
    if numbers["final_val_loss"] is None or numbers["status"] != "complete":
        return None, f"{numbers['status']} at step {numbers['steps']}"
    if not math.isfinite(numbers["final_val_loss"]):
        return None, f"nan at step {numbers['steps']}"
    vals = [(row["step"], row["val_loss"], number(row.get("train_time_ms"))) for row in rows if "val_loss" in row]
    if twin := seen.get((*vals[-2:],)):
        return None, f"the same run as {twin}"
    seen |= {(*vals[-2:],): name, (*vals[-1:],): name}  # the shorter key for a file that holds the last line only
    stages = run.trace.stage_ms[i] if run.trace.stage_ms else {}
    return Sample(run, rows, numbers["final_val_loss"], numbers["train_time_s"], numbers["steps"], stages), None


def mean_sd(values):
    """(mean, sample sd with n - 1), None where there are too few values."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    return (statistics.mean(values) if values else None), (statistics.stdev(values) if len(values) > 1 else None)


def below_target(losses, target):
    """p of the one-sided one-sample t-test that the mean is below the target; None unless two values differ."""
    if len(losses) < 2 or statistics.stdev(losses) == 0:
        return None
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(losses, target, alternative="less").pvalue)


def runs_needed(margin, sd, alpha=0.01, most=100_000):
    """Smallest n with p < alpha for a mean that lies `margin` below the target with this sd; None if above `most`."""
    from scipy.stats import t

    if margin <= 0 or sd == 0:
        return None if margin <= 0 else 2
    low, high = 1, 2
    while t.sf(margin * math.sqrt(high) / sd, high - 1) >= alpha:
        low, high = high, 2 * high
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = t.sf(margin * math.sqrt(middle) / sd, middle - 1) < alpha
        low, high = (low, middle) if enough else (middle, high)
    return high


def detectable_margin(n, sd, alpha=0.01):
    """Smallest distance of the mean below the target that n runs with this sd show with p < alpha."""
    from scipy.stats import t

    return float(t.isf(alpha, n - 1)) * sd / math.sqrt(n)


def welch(a, b, confidence=0.95):
    """Welch's t-test of mean(a) - mean(b): difference, confidence interval, two-sided p, Cohen's d; None if too few."""
    a, b = ([v for v in values if v is not None and math.isfinite(v)] for values in (a, b))
    if min(len(a), len(b)) < 2 or not statistics.stdev(a) + statistics.stdev(b):
        return None
    from scipy.stats import ttest_ind

    test = ttest_ind(a, b, equal_var=False)
    interval = test.confidence_interval(confidence)
    pooled = math.sqrt((statistics.variance(a) + statistics.variance(b)) / 2)
    difference = statistics.mean(a) - statistics.mean(b)
    low, high, p = map(float, (*interval, test.pvalue))
    return {"difference": difference, "ci_low": low, "ci_high": high, "confidence": confidence,
            "p_value": p, "cohens_d": difference / pooled}


SIGMA_RULE = 0.004  # track 3 knows the sd, 0.0013: z > 3 is (target - mean) * sqrt(n) >= 0.004
LOSS_PER_STEP = 0.000045  # track 3's worth of a step: 100 steps are 0.0045 of loss


def pairwise_rule(a, b):
    """Track 3's rule for samples b beating a: (loss difference + saved steps * 0.000045) / sqrt(1/n + 1/m)."""
    gain = mean_sd([s.loss for s in a])[0] - mean_sd([s.loss for s in b])[0]
    gain += (mean_sd([s.steps for s in a])[0] - mean_sd([s.steps for s in b])[0]) * LOSS_PER_STEP
    value = gain / math.sqrt(1 / len(a) + 1 / len(b))
    return {"value": value, "passed": value >= SIGMA_RULE}


def group_numbers(samples):
    """n, mean and sd of loss and time, steps of a list of samples."""
    (loss, loss_sd), (time_s, time_sd) = mean_sd([s.loss for s in samples]), mean_sd([s.time_s for s in samples])
    steps = sorted({s.steps for s in samples})
    step_ms = mean_sd([trial_numbers(s.rows)["step_avg_ms"] for s in samples])[0]
    return {"n": len(samples), "mean_val_loss": loss, "sd_val_loss": loss_sd, "mean_time_s": time_s,
            "sd_time_s": time_sd, "mean_step_ms": step_ms, "steps": steps}


def target_numbers(samples, target, alpha=0.01):
    """What the losses say about the target."""
    losses = [s.loss for s in samples]
    n, (mean, sd) = len(losses), mean_sd(losses)
    p = below_target(losses, target)
    needed = runs_needed(target - mean, sd, alpha) if sd else None
    value = (target - mean) * math.sqrt(n)
    return {"target": target, "alpha": alpha, "p_value": p, "passed": p is not None and p < alpha,
            "sigma_rule": {"value": value, "passed": value >= SIGMA_RULE}, "runs_needed": needed,
            "more_runs": None if needed is None else max(0, needed - n),
            "detectable_margin": detectable_margin(n, sd, alpha) if sd else None}


def versions(samples):
    """{code version: samples}, most samples first. A version is the source and, for our runs, the settings but seed and
    names."""
    found = {}
    for sample in samples:
        settings = {key: value for key, value in settings_of(sample.run).items() if key not in SELF}
        text = json.dumps(settings, sort_keys=True) if settings else ""
        key = sample.run.trace.code_hash or "no source"
        key += f"+{hashlib.sha256(text.encode()).hexdigest()[:6]}" if text else ""
        found.setdefault(key, []).append(sample)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


HARMLESS = {"only comments differ", "only seeds and names differ"}


def what_differs(a, b):
    """A few words on how the version of run b differs from that of run a: settings, definitions, seeds, comments."""
    from records.sources import compare_parts

    a, b = (run if any(run.trace.parts.values()) else load_one(run.path) for run in (a, b))
    found = compare_parts(a.trace.parts, b.trace.parts)
    names = [s["name"] for s in changed_config(a, b) + found["settings"]]
    units = [unit["name"] for unit in found["units"] if unit["change"] not in ("comments only", "constants only")]
    if not names + units:
        return next((note for note in found["notes"] if "text only" in note), "only comments differ")
    names = [name for name in names if not re.search(r"seed|run_?id|run_?name", name, re.I)]
    if not names + units:
        return "only seeds and names differ"
    names = [name.removeprefix("setting ") for name in [*names, *units]]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return f"other {', '.join(names[:4])}{more}"


def version_warning(groups, most=25):
    """How the code versions of a group differ, a sentence; only the first `most` are compared."""
    (first, its_samples), *others = list(groups.items())[:most]
    words = {key: what_differs(its_samples[0].run, group[0].run) for key, group in others}
    if set(words.values()) <= HARMLESS:
        return f"{len(groups)} sources: {', '.join(sorted(set(words.values())))}"
    counts = [f"{len(groups[key])} of {key} ({text})" for key, text in words.items()][:5]
    counts += [f"{len(groups) - 6} more"] if len(groups) > 6 else []
    counts = ", ".join([f"{len(its_samples)} of {first}", *counts])
    return f"{len(groups)} code versions mixed: {counts}; see `logger.py diff` on one run of each"


def group_warnings(samples, dropped):
    """What makes the mean of a group doubtful."""
    found = []
    if len(groups := versions(samples)) > 1:
        found.append(version_warning(groups))
    for what, values in (("hardware", {device_of(s.run) for s in samples}),
                         ("torch versions", {str(summarize(s.run)["torch"]) for s in samples}),
                         ("driver versions", {s.run.trace.header.get("driver") for s in samples}),
                         ("step counts", {s.steps for s in samples})):
        if len(values) > 1:
            found.append(f"mixed {what}: {', '.join(sorted(map(str, values)))}")
    if any(s.run.trace.end.get("status") == "target" or s.steps < (latest(s.rows, "iterations") or 0) for s in samples):
        found.append("runs that stopped by themselves before the last step: a stop chosen by the loss biases its mean")
    seeds = [(key, str(seed)) for key, group in groups.items() for s in group
             if (seed := settings_of(s.run).get("seed")) is not None]
    if again := len(seeds) - len(set(seeds)):
        found.append(f"{again} run(s) repeat the seed of another one: they are no independent samples")
    if resets := sum(s.run.trace.resets > 0 for s in samples):
        found.append(f"the clock was set back in {resets} run(s): their times leave out the steps before")
    found += [f"{s.run.path.name}: {text}" for s in samples for text in changes_of(s.run)]
    return found + [f"left out: {text}" for text in dropped]


def step_times(rows):
    """[(step, ms of that step)] from the clock's differences; none where the clock was set back."""
    timed = [(row["step"], row["train_time_ms"]) for row in rows if number(row.get("train_time_ms")) is not None]
    pairs = zip(timed, timed[1:], strict=False)
    pairs = [pair for pair in pairs if math.isfinite(pair[1][1] - pair[0][1])]
    return [(b, (y - x) / (b - a)) for (a, x), (b, y) in pairs if b > a and y >= x]


def stage_of(rows):
    """step -> name of its stage: by batch_tokens and seq_len where they are logged, else quarters of the steps."""
    known = [(row["step"], (row["batch_tokens"], row.get("seq_len"))) for row in rows if "batch_tokens" in row]
    if known:
        table = dict(known)
        return lambda step: (f"{table[step][0]} tokens a step, seq_len {table[step][1]}") if step in table else None
    last, names = max(1, rows[-1]["step"]), [f"{share}-{share + 25} % of the steps" for share in (0, 25, 50, 75)]
    return lambda step: names[max(0, min(3, 4 * (step - 1) // last))]


def stage_medians(samples):
    """{stage: median ms of a step}, over all steps of all samples."""
    found = {}
    for stage, values in ((stage, ms) for sample in samples for stage, ms in sample.stage_ms.items() if stage):
        if stage in found or len(found) < MAX_KEYS:
            found.setdefault(stage, array("d")).extend(values)
    return {stage: statistics.median(values) for stage, values in found.items()}


def resample(samples, x, grid):
    """Validation losses of the samples at the points of `grid`, as an array (sample, point); x is a key of a row."""
    import numpy as np

    curves = []
    for sample in samples:
        points = curve(sample.rows, "val_loss", x)
        points = [point for i, point in enumerate(points) if i == 0 or point[0] > points[i - 1][0]]
        curves.append(np.interp(grid, *zip(*points, strict=True)))
    return np.array(curves)


def common_range(groups, x):
    """(low, high) of x that the validation curves of all samples of all groups cover, None without one."""
    curves = [[a for a, _ in curve(s.rows, "val_loss", x)] for samples in groups for s in samples]
    if not curves or any(len(points) < 2 for points in curves):
        return None
    low, high = max(points[0] for points in curves), min(max(points) for points in curves)
    return (low, high) if low < high else None


def equal_points(groups, count=4):
    """{"step" | "tokens" | "train_time_ms": [{"at", "means": [one a group]}]}, where all groups have been."""
    found = {}
    for x in ("step", "tokens", "train_time_ms"):
        span = common_range(groups, x)
        low, high = span or (0, 0)
        grid = [low + (high - low) * i / count for i in range(1, count + 1)] if span else []
        means = [resample(samples, x, grid).mean(0) for samples in groups] if grid else []
        found[x] = [{"at": at, "means": [*map(float, at_x)]} for at, *at_x in zip(grid, *means, strict=True)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Claims: README.md -> what the logs say to it

STEP_CLAIM = re.compile(r"step:\d{1,15}/\d{1,15} val_loss:\d{1,9}\.\d{1,15}[^\n`|]{0,300}", re.ASCII)
LIST_CLAIM = re.compile(r"\[([\s\d.,e+-]{8,20000})\]")
P_CLAIM = re.compile(r"\bp(?:[- ]?value)?\s{0,3}(=|<|<=|≤|~|≈|:)\s{0,3}(\d{0,9}\.?\d{1,20}(?:e-?\d{1,3})?)"
                     r"(?![\d.]{0,20}\s{0,3}%)", re.I)
N_CLAIM = re.compile(r"\bn\s?=\s?(\d{1,6})\b|"
                     r"\b(\d{1,6}) (?:independent |validation |training |new |more )?(?:runs|trials|seeds)\b", re.I)
LOSS_CLAIM = re.compile(r"(?<![\d.\w-])(\d{1,2}\.\d{3,6})(?!\d|\.\d|\s?(?:s|sec|seconds|ms|min|minutes|x)\b|\s?%)")
TIME_CLAIM = re.compile(r"(?<![\d.\w-])(\d{1,7}(?:\.\d{1,4})?)\s?(ms|s|sec|secs|seconds|min|mins|minutes)\b(?!/)", re.I)
VERDICTS = {False: "contradicted", None: "not checkable", True: "confirmed"}
MAX_CLAIMS = 200  # of each kind that are checked
UNITS = {"ms": 1e-3, "s": 1, "sec": 1, "secs": 1, "seconds": 1, "min": 60, "mins": 60, "minutes": 60}


def claims_of(form, text):
    """The first MAX_CLAIMS different matches."""
    return list({match[0]: match for match in form.finditer(text)}.values())[:MAX_CLAIMS]


def near(text, values, scale=1.0):
    """Those of the sorted values that may agree with a number as it is written."""
    value, step = float(text) * scale, 2 * 10.0 ** -len(text.partition(".")[2]) * scale
    return values[bisect_left(values, value - step) : bisect_right(values, value + step)]


def agrees(text, values, scale=1.0):
    """Whether a number as it is written is one of `values`, rounded or cut to its digits."""
    step = 10.0 ** -len(text.partition(".")[2]) * scale
    return any(abs(float(text) * scale - value) <= 1.01 * step / 2 or 0 <= value - float(text) * scale < step
               for value in values if value is not None)


def check_claims(text, groups, target):
    """[{"kind", "claim", "verdict", "detail"}] for every claim in a README; `groups` is {name: samples}. Verdicts are
    confirmed, contradicted, not checkable (the number may be about a run that is not here)."""
    samples, found = list({id(s): s for group in groups.values() for s in group}.values()), []
    numbers = [group_numbers(group) for group in groups.values()]
    found += [check_line(match[0], samples) for match in claims_of(STEP_CLAIM, text)]
    text = STEP_CLAIM.sub(" ", text)
    listed = claims_of(LIST_CLAIM, text)
    found += filter(None, (check_list(match[1], samples) for match in listed))
    lists = [[float(word) for word in re.findall(r"\d+\.\d+", match[1])] for match in listed]
    text = LIST_CLAIM.sub(" ", text)
    claims = [match for match in claims_of(P_CLAIM, text) if 0 < float(match[2]) < 1]
    found += check_ps(claims, groups, lists, target) if claims else []
    text = P_CLAIM.sub(" ", text)
    found += [check_n(match, numbers, len(samples)) for match in claims_of(N_CLAIM, text)]
    on_the_way = (row.get("val_loss", math.nan) for s in samples for row in s.rows)
    on_the_way = sorted(loss for loss in on_the_way if math.isfinite(loss))
    found += filter(None, (check_loss(m, text, samples, numbers, on_the_way) for m in claims_of(LOSS_CLAIM, text)))
    found += [check_time(match, samples, numbers) for match in claims_of(TIME_CLAIM, text)]
    return list({(claim["kind"], claim["claim"]): claim for claim in found}.values())


def verdict(kind, claim, truth, detail=""):
    """`truth` is True, False or None: not checkable."""
    word, claim = VERDICTS[truth], claim.strip()[:100]
    return {"kind": kind, "claim": claim, "verdict": word, "detail": detail}


def check_line(line, samples):
    """A step line quoted from a log must be in one."""
    row = parse_step_line(re.sub(r"[,;.)]+(?=\s|$)", "", line))
    rows = [r for s in samples for r in s.rows if r["step"] == row["step"] and r["iterations"] == row["iterations"]]
    there = any(r.get("val_loss") == row["val_loss"] for r in rows)
    return verdict("step line", line, there if rows else None, "" if there else "no log holds it")


def check_list(text, samples):
    """A list of numbers: losses or times of the runs. Many of them in the logs and some not is a contradiction."""
    words = re.findall(r"\d+\.\d+|\d{4,}", text)[:2000]
    if len(words) < 2:
        return None
    losses = sorted(s.loss for s in samples)
    seconds = sorted(s.time_s for s in samples if s.time_s is not None and math.isfinite(s.time_s))
    kinds = {"losses": (losses, 1.0), "times": (seconds, 1.0), "times in ms": (seconds, 1e-3)}
    hits = {kind: [w for w in words if agrees(w, near(w, *of), of[1])] for kind, of in kinds.items()}
    kind = max(hits, key=lambda kind: len(hits[kind]))
    missing = [word for word in words if word not in hits[kind]]
    truth = True if not missing else False if len(hits[kind]) > len(words) / 2 else None
    detail = f"{len(words) - len(missing)} of {len(words)} are in the logs"
    detail += f", not {', '.join(missing[:5])}" if missing else ""
    return verdict(f"list of {kind if hits[kind] else 'numbers'}", f"[{', '.join(words[:4])}, ...]", truth, detail)


def check_ps(claims, groups, lists, target):
    """p = x is that of the t-test, or of track 3's test with a known sd, of some group; p < x holds for one. A p that
    follows from a list in the README whose runs are not here cannot be checked."""
    values = [p for group in groups.values() for p in p_values([s.loss for s in group], target)]
    listed = [p for losses in lists for p in p_values(losses, target)]
    return [check_p(match, values, listed) for match in claims]


def check_p(match, values, listed):
    """`values` are the p of the groups, `listed` those of the lists in the README."""
    digits, exact = match[2], match[1] in "=:~≈"

    def fits(p):
        return agrees(digits, [p]) or abs(p - float(digits)) < 0.05 * float(digits) if exact else p < float(digits)

    if not values:
        return verdict("p", match[0], None, "no group of two or more runs")
    if not any(map(fits, values)) and any(map(fits, listed)):
        return verdict("p", match[0], None, "follows from the README's own list, not from the logs here")
    closest = min(values, key=lambda p: abs(math.log((p + 1e-300) / float(digits))))
    return verdict("p", match[0], any(map(fits, values)), f"the closest of the tests of these logs: p = {closest:.2g}")


def p_values(losses, target):
    """p of the t-test, and of the z-test with track 3's sd of 0.0013, that the mean is below the target."""
    if len(losses) < 2 or not all(abs(loss - target) < 1 for loss in losses):
        return []
    z = (target - statistics.mean(losses)) * math.sqrt(len(losses)) / 0.0013
    return [p for p in (below_target(losses, target), 0.5 * math.erfc(z / math.sqrt(2))) if p is not None]


def check_n(match, numbers, total):
    """A number of runs must be one that the folder holds; fewer may be about a part of them."""
    claim = int(match[1] or match[2])
    counts = sorted({g["n"] for g in numbers} | {total})
    truth = True if claim in counts else False if claim > total else None
    return verdict("n", match[0], truth, f"complete runs here: {', '.join(map(str, counts))}")


def check_loss(match, text, samples, numbers, on_the_way):
    """A number in the range of the runs' losses: of a run, a validation on the way, or the mean of a group. One that is
    called the mean or average and is not is contradicted."""
    losses = [s.loss for s in samples]
    if not losses or not min(losses) - 0.05 <= float(match[1]) <= max(losses) + 0.05:
        return None
    means = [g["mean_val_loss"] for g in numbers]
    if agrees(match[1], means):
        return verdict("loss", match[1], True, "mean of a group")
    if agrees(match[1], losses):
        return verdict("loss", match[1], True, "final loss of a run")
    if agrees(match[1], near(match[1], on_the_way)):
        return verdict("loss", match[1], True, "validation on the way")
    before = text[max(0, match.start() - 40) : match.start()].lower()
    called = re.search(r"(mean|average|avg)\W{0,12}(?:\w+\W{1,3}){0,3}$", before)
    return verdict("loss", match[1], False if called else None,
                   f"means here: {', '.join(f'{m:.4f}' for m in means[:4])}" if called else "no run has it")


def check_time(match, samples, numbers):
    """A time of a run, a mean, or a step average; others may be about anything."""
    unit = UNITS[match[2].lower()]
    seconds = [s.time_s for s in samples] + [g["mean_time_s"] for g in numbers]
    seconds += [g["mean_step_ms"] / 1000 for g in numbers if g["mean_step_ms"]] if unit == 1e-3 else []
    there = agrees(match[1], seconds, unit)
    return verdict("time", match[0], True if there else None, "" if there else "no run took that long")


# ---------------------------------------------------------------------------------------------------------------------
# Profiles: traces of torch.profiler -> what took how long, in us as in the traces

class Event(NamedTuple):
    """Something of a trace that took time. `kind`: cpu_op, kernel, gpu_memcpy, user_annotation, ..."""

    name: str
    kind: str
    start: float
    end: float
    thread: str  # or stream of a GPU


def read_events(path):
    """Events of a trace that have a duration. ValueError if it is damaged."""
    try:
        with open_file(path) as file:
            found = json.loads(file.read())["traceEvents"]
        return [Event(str(e["name"]), str(e.get("cat")), *span_of(e), f"{e.get('tid')}")
                for e in found if e.get("ph") == "X" and e.get("dur", 0) > 0]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        what = "damaged, or cut off" if isinstance(error, ValueError) else "no trace of torch.profiler"
        raise ValueError(f"'{path}' is {what}: train again with --enable_profiling") from error


def span_of(event):
    """(start, end) of an event. OverflowError if it is not between -1e18 and 1e18, or no number."""
    start, end = float(event["ts"]), float(event["ts"]) + float(event["dur"])
    if not -1e18 < start <= end < 1e18:
        raise OverflowError
    return start, end


def covered(events):
    """Length of the union of the events' times."""
    total, reach = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, reach))
        reach = max(reach, event.end)
    return total


def length(events):
    """Time from the first start to the last end."""
    return max(e.end for e in events) - min(e.start for e in events)


def self_times(events):
    """{name: [time without that of the events inside, calls]}; on a thread events nest."""
    found, threads = {}, {}
    for event in sorted(events, key=lambda e: (e.start, -e.end)):
        open_ones = threads.setdefault(event.thread, [])
        while open_ones and open_ones[-1].end <= event.start:
            open_ones.pop()
        if open_ones:
            outer = open_ones[-1]
            found[outer.name][0] -= min(outer.end, event.end) - event.start
        own = found.setdefault(event.name, [0.0, 0])
        own[0] += event.end - event.start
        own[1] += 1
        open_ones.append(event)
    return found


def trace_numbers(path):
    """What a trace says. Operations: a GPU's kernels, or else a CPU's operators and what gloo does.
    Idle: share of the time from the first to the last thing on a GPU with nothing on it, or None."""
    events = read_events(path)
    device = [e for e in events if e.kind in ("kernel", "gpu_memcpy", "gpu_memset")]
    kernels = [e for e in device if e.kind == "kernel"]
    on_cpu = [e for e in events if e.kind == "cpu_op" or e.name.startswith(("aten::", "gloo:"))]
    pool = kernels or on_cpu
    talk = [e for e in pool if e.name.startswith(("nccl", "gloo:"))]
    work = [e for e in pool if e.name.startswith("aten::")]
    work = [e for e in kernels if not e.name.startswith("nccl")] if kernels else work
    steps = [e for e in events if e.name.startswith("ProfilerStep")]
    steps = [e for e in steps if e.kind == "gpu_user_annotation"] or steps
    operations = [[name, *own] for name, own in self_times(pool).items()]
    return {
        "trace": str(path),
        "kind": "kernels" if kernels else "CPU operations",
        "steps": len(steps),
        "step_us": length(steps) / len(steps) if steps else None,
        "communication_us": covered(talk),
        "beside_us": covered(talk) + covered(work) - covered(talk + work),
        "idle": 1 - covered(device) / length(device) if device else None,
        "operations": sorted(operations, key=lambda own: -own[1]),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Presenting: reports of strings and Tables -> text, Markdown, terminal


def printable(text):
    """`text` with control, bidi and undecodable characters spelled out (\\x1b): a name cannot drive a terminal."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(lines, file=None):
    """Print a line, or lines: all that this program says leaves here, so that no text of a log drives a terminal."""
    lines = [lines] if isinstance(lines, str) else lines
    print("\n".join(map(printable, lines)), file=file or sys.stdout)


def give(pieces):
    """Texts for another program, as they are, in UTF-8; on a terminal they are said."""
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        for piece in pieces:
            say(piece.expandtabs().removesuffix("\n").split("\n"))
        return
    sys.stdout.flush()
    for piece in pieces:
        sys.stdout.buffer.write(encoded(piece))


def encoded(text):
    return text.encode("utf-8", "backslashreplace")


def write_file(path, pieces):
    """Write bytes to `path`, whole or not at all: a file beside it takes its place. ValueError if a link, a folder or a
    device is there, RuntimeError if it cannot be written."""
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"'{path}' is a link, a folder or a device, no file: remove it, or write to another place")
    aside = path.parent / f".logger-{os.urandom(6).hex()}.tmp"
    try:
        try:
            with open(aside, "xb") as file:
                file.writelines(pieces)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise RuntimeError(f"'{path}' cannot be written: {error.strerror}") from None


def show(value, form=""):
    return "-" if value is None else format(value, form)


def clip(value, most=60):
    text = "-" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def cell_text(value):
    return printable(clip(value, MAX_CELL))


@dataclass
class Table:
    """Headings and rows of cells; a column of numbers is aligned right. `title` is a line above it."""

    headings: list[str]
    rows: list[list[str]]
    title: str = ""

    def __post_init__(self):
        self.title, self.headings = printable(clip(self.title, MAX_CELL)), [*map(cell_text, self.headings)]
        self.rows = [[*map(cell_text, row)] for row in self.rows]
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(self.headings)
        self.aligns = [">" if all(re.fullmatch(r"[-+\d.,/ e%]*|nan|inf", cell) for cell in column) else "<"
                       for column in columns]

    def plain(self):
        """Lines; wide East Asian characters count as two."""
        columns = [list(column) for column in zip(self.headings, *self.rows, strict=True)]
        for column, align in zip(columns, self.aligns, strict=True):
            widths = [sum(1 + (east_asian_width(c) in "WF") for c in cell) for cell in column]
            pads = [" " * (widest - width) for widest in [max(widths)] for width in widths]
            column[:] = [cell + pad if align == "<" else pad + cell for cell, pad in zip(column, pads, strict=True)]
        return [*filter(None, [self.title]), *("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))]

    def markdown(self):
        def line(cells):
            cells = (re.sub(r"([\\|<>`*_\[\]])", r"\\\1", cell) for cell in cells)
            return f"| {' | '.join(cells)} |"

        rule = "|".join("--:" if align == ">" else "---" for align in self.aligns)
        return [*([f"**{self.title}**", ""] if self.title else []), line(self.headings), f"|{rule}|",
                *map(line, self.rows), ""]

    def rich(self):
        """A rich Table of plain Text cells: nothing in them is read as markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left", header_style="bold")
        for heading, align in zip(self.headings, self.aligns, strict=True):
            table.add_column(Text(heading), justify="right" if align == ">" else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def plain(report):
    """Text of a report: a list of sentences, Tables, and lists of lines, as of code."""
    lines = []
    for block in report:
        lines += block.plain() if isinstance(block, Table) else [block] if isinstance(block, str) else block
    return "\n".join(map(printable, lines))


def markdown(report):
    """A report as Markdown; lines of code are fenced."""
    fence, lines = "`" * 12, []
    for block in report:
        code = [fence + "diff", *block, fence, ""] if isinstance(block, list) else None
        lines += code or (block.markdown() if isinstance(block, Table) else [block.replace("<", "&lt;"), ""])
    return "\n".join(map(printable, lines))


def emit(report, args):
    """Print a report: Markdown if asked for, rich tables on a terminal, else plain text."""
    if getattr(args, "markdown", False):
        say(markdown(report).split("\n"))
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.text import Text

        for block in report:
            table = isinstance(block, Table)
            Console().print(block.rich() if table else Text(plain([block])), soft_wrap=not table)
    else:
        say(plain(report).split("\n"))


def strict_json(value, indent=2):
    """JSON text of `value`; nan and inf, which JSON cannot hold, become null."""
    value = json.loads(json.dumps(value, default=str), parse_constant=lambda constant: None)
    return json.dumps(value, indent=indent).replace("\x7f", "\\u007f")  # the only control that json leaves raw


def say_json(value):
    say(strict_json(value).split("\n"))


COLUMNS = (  # heading, cell of a summary
    ("run", lambda s: s["run_id"]),
    ("status", lambda s: s["status"]),
    ("steps", lambda s: f"{show(s['step'])}/{show(s['iterations'])}"),
    ("val loss", lambda s: show(s["val_loss"], ".4f")),
    ("bits/byte", lambda s: show(s["val_bpb"], ".4f")),
    ("best val", lambda s: show(s["best_val_loss"], ".4f")),
    ("train s", lambda s: show(s["train_time_ms"] and s["train_time_ms"] / 1000, ",.1f")),
    ("ms/step", lambda s: show(s["step_avg_ms"], ",.2f")),
    ("tokens/s", lambda s: show(s["tokens_per_s"], ",.0f")),
    ("peak MiB", lambda s: show(s["peak_memory_mib"], ",.0f")),
    ("torch", lambda s: show(s["torch"])),
    ("device", lambda s: show(s["device"])),
)


def format_mean(summaries):
    """Mean, sample sd (n - 1) and n of the completed runs' final val loss; "" with fewer than two."""
    losses = [s["val_loss"] for s in summaries if s["completed"] and s["val_loss"] is not None]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2:
        return ""
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    rest = len(summaries) - len(losses)
    return f"final val loss of completed runs: {mean:.4f} +- {sd:.4f} (mean +- sd, n={len(losses)}, {rest} left out)"


def percent(share):
    return show(share and 100 * share, ".1f") + " %" * (share is not None)


ROUTER_COLUMNS = (  # heading, cell of a summary
    ("routers of", lambda s: s["run_id"]),
    ("step", lambda s: show(s["routers"]["step"])),
    ("mixtures", lambda s: show(len(s["routers"]["layers"]))),
    ("experts", lambda s: show(s["routers"]["experts"])),
    ("least effective", lambda s: f"{s['routers']['effective_experts']:.1f} in layer {s['routers']['worst_layer']}"),
    ("max/mean", lambda s: show(s["routers"]["max_over_mean"], ".2f")),
    ("CV", lambda s: show(s["routers"]["cv"], ".2f")),
    ("dead", lambda s: show(s["routers"]["dead"])),
    ("dropped", lambda s: percent(s["routers"]["dropped"])),
    ("parameters", lambda s: show(s["params_total"], ",")),
    ("active", lambda s: show(s["params_active"], ",")),
)


def router_report(summaries):
    """[Table of the last report of each run's routers, the worst of its layers]; [] without one."""
    summaries = [s for s in summaries if s["routers"]]
    rows = [[cell(s) for _, cell in ROUTER_COLUMNS] for s in summaries]
    return [Table([heading for heading, _ in ROUTER_COLUMNS], rows)] if rows else []


def hellaswag_report(summaries):
    """[Table of the last HellaSwag score of each run]; [] without one."""
    found = [(s["run_id"], s["hellaswag"]) for s in summaries if s["hellaswag"]]
    rows = [[run_id, str(score["step"]), f"{score['tasks']:,}",
             *("{:.1f} +- {:.1f} %".format(*accuracy(score, key)) for key in ACCURACIES)]
            for run_id, score in found]
    headings = ["HellaSwag of", "step", "tasks", "per token", "per byte", "raw"]
    return [Table(headings, rows)] if rows else []


def experiment_report(name, runs):
    """The report of an experiment."""
    summaries, names = [summarize(run) for run in runs], differing(runs)
    report = [f"{name}: {len(runs)} run(s), losses in nats/token"]
    report.append(Table([heading for heading, _ in COLUMNS], [[cell(s) for _, cell in COLUMNS] for s in summaries]))
    report += router_report(summaries) + hellaswag_report(summaries)
    report += filter(None, [format_mean(summaries)])
    names = ", ".join(names)
    report += [f"settings that differ between the runs: {names}"] if names else []
    return report + [f"note on {s['run_id']}: {note}" for s in summaries for note in s["notes"]]


def format_json(runs):
    """{"runs": [summary, ...]} as strict JSON; the status says nan where a loss is null."""
    return strict_json({"runs": [summarize(run) for run in runs]})


def seconds(value):
    return "-" if value is None else f"{value:,.1f} s" if value < 600 else f"{value:,.1f} s ({value / 60:,.1f} min)"


def parameters(total, active):
    """The number of parameters, and of those that a token meets if they are fewer."""
    return show(total, ",") + (f", {active:,} of them active" if active is not None and active != total else "")


def router_line(found):
    """What router_numbers found, in a line; None for None."""
    if not found:
        return None
    dropped = f", {percent(found['dropped'])} dropped" if found["dropped"] else ""
    return (f"step {found['step']}: {found['effective_experts']:.1f} of {found['experts']} experts effective in layer "
            f"{found['worst_layer']}, max/mean {found['max_over_mean']:.2f}, CV {found['cv']:.2f}, "
            f"{found['dead']} dead{dropped}")


def screen(numbers):
    """One run as a two-column Table."""
    n, status = numbers, numbers["status"]
    place = f" at step {show(n['steps'])} of {show(n['max_step'])}"
    place = place if status in ("died", "nan", "error", "running") else ""
    memory = [f"{n[key]:,} MiB {key.split('_')[1]}" for key in ("peak_allocated_mib", "peak_reserved_mib") if n[key]]
    known = [f"{key} {n[key]}" for key in ("python", "torch", "cuda", "triton", "driver") if n[key]]
    crossed = n["target_crossing"] or {}
    where = f"step {crossed.get('step')}, {seconds(crossed.get('train_time_s'))}" if crossed else "not reached"
    rows = [("status", status + place), ("format", n["era"]), ("trials", show(n["trials"])),
            ("steps", f"{show(n['steps'])} of {show(n['max_step'])}"),
            ("final val loss", show(n["final_val_loss"], ".5g")),
            ("best val loss", f"{show(n['best_val_loss'], '.5g')} at step {show(n['best_val_step'])}"),
            ("training time", seconds(n["train_time_s"])), ("step average", f"{show(n['step_avg_ms'], ',.2f')} ms"),
            (f"target {show(n['target'])}", where), ("peak memory", ", ".join(memory)),
            ("hardware", show(n["gpus"])), ("versions", ", ".join(known)),
            ("parameters", parameters(n["params_total"], n["params_active"])), ("routers", router_line(n["routers"])),
            ("training tokens", show(n["tokens"], ",")),
            ("tokens of the data", show(n["data_tokens"], ",")),
            ("date", show(n["date"])), ("code", f"{show(n['code_hash'])} {' '.join(n['parts'])}")]
    rows += [(f"trial {i}", f"val loss {show(t['final_val_loss'], '.5g')}, {seconds(t['train_time_s'])}, {t['status']}")
             for i, t in enumerate(n["trial_runs"], 1)]
    rows = [(key, value) for key, value in rows if value not in ("-", None, "")] + [("note", w) for w in n["warnings"]]
    return Table(["run", n["path"]], [[key, str(value)] for key, value in rows])


def run_table(found):
    """Many runs as a Table, a line each."""
    rows = [[n["path"], n["status"], show(n["trials"]), f"{show(n['steps'])}/{show(n['max_step'])}",
             show(n["final_val_loss"], ".4f"), show(n["best_val_loss"], ".4f"), show(n["train_time_s"], ",.1f"),
             show(n["step_avg_ms"], ",.2f"), n["peak_allocated_mib"], n["torch"], n["gpus"], n["code_hash"]]
            for n in found]
    headings = "run,status,trials,steps,val loss,best val,train s,ms/step,peak MiB,torch,hardware,code".split(",")
    return Table(headings, rows)


def plus_minus(mean, sd, form):
    return "-" if mean is None else f"{mean:{form}}" + ("" if sd is None else f" +- {sd:{form}}")


def group_table(groups):
    """{name: samples} as a Table."""
    rows = []
    for name, samples in groups.items():
        n = group_numbers(samples)
        steps = n["steps"]
        rows.append([name, str(n["n"]), plus_minus(n["mean_val_loss"], n["sd_val_loss"], ".5f"),
                     plus_minus(n["mean_time_s"], n["sd_time_s"], ",.2f"), show(n["mean_step_ms"], ",.2f"),
                     f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else str(*steps), len(versions(samples))])
    return Table(["group", "n", "val loss", "train s", "ms/step", "steps", "code versions"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# Presenting: runs -> figures. matplotlib is imported in new_figure only; a bare Figure draws with Agg, without display.

X_AXES = (  # key of a row, label, its units from large to small
    ("step", "step", ((1, ""),)),
    ("tokens", "training tokens", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))),
    ("train_time_ms", "training time", ((3.6e6, "h"), (6e4, "min"), (1e3, "s"))),
)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3b9e", "#8c564b", "#4d4d4d", "#a3ad00")


def curve(rows, loss, x):
    """[(x, loss)] of the rows that have both; a nan or infinite loss stays and leaves a gap in the line."""
    pairs = [(number(row.get(x)), number(row.get(loss))) for row in rows]
    return [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a)]


def loss_limits(runs):
    """(low, high) of the loss axis, None without a loss.

    It starts where the runs are after a tenth of the longest, as the first fall from ln(vocab_size) would flatten the
    rest. Losses that rise again stretch it to at most twice that span or one nat: a diverged run leaves the panel.
    """
    rows = [rows for run in runs for rows in run.trace.trials]
    curves = [[p for p in curve(r, loss, "step") if math.isfinite(p[1])] for r in rows for loss in LOSSES]
    curves = [points for points in curves if points]
    if not curves:
        return None
    start = max(points[-1][0] for points in curves) / 10
    cuts = [next((i for i, (x, _) in enumerate(points) if x >= start), len(points) - 1) for points in curves]
    fallen = max(min(y for _, y in points[: i + 1]) for points, i in zip(curves, cuts, strict=True))
    late = sorted(y for points, i in zip(curves, cuts, strict=True) for _, y in points[i:])
    low, top = min(late[0], fallen), late[int(0.995 * len(late))]  # a few spikes may leave, too
    high = max(fallen, min(top, low + max(2 * (fallen - low), 1.0)))
    pad = 0.05 * (high - low) or 0.05 * max(1.0, abs(high))
    return low - pad, high + pad


def label_of(text, most=36):
    """`text` for matplotlib: printable, cut in the middle, with $ as itself instead of the start of a formula."""
    text = printable(text)
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
    return text.replace("$", r"\$")


def unit_of(top, units):
    """The (size, name) that makes `top` read as 2 or more, else the smallest."""
    return next((unit for unit in units if top >= 2 * unit[0]), units[-1])


def new_figure(panels, height, width=14, rows=1, **options):
    """(matplotlib Figure, its axes, row by row)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=120)
    axes = figure.subplots(rows, -(-panels // rows), squeeze=False, **options).flatten()
    for ax in axes[panels:]:
        ax.remove()
    axes = axes[:panels]
    for ax in axes:
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def colours_of(count):
    if count <= len(PALETTE):
        return PALETTE[:count]
    from matplotlib import colormaps

    return [colormaps["turbo"](0.05 + 0.9 * i / count) for i in range(count)]


def not_logged(ax, what="not logged"):
    ax.text(0.5, 0.5, what, transform=ax.transAxes, ha="center", color="0.5")
    ax.set_xticks([])


def draw_panel(ax, runs, colours, x, size):
    """Draw the losses of all runs against x / size: train faint, val on top with about 25 markers."""
    for run, colour in zip(runs, colours, strict=True):
        for rows in run.trace.trials:
            train, val = ([(a / size, b) for a, b in curve(rows, loss, x)] for loss in LOSSES)
            look = {"marker": "o", "ms": 4.5, "mec": "white", "mew": 0.6, "markevery": max(1, len(val) // 25)}
            ax.plot(*zip(*train, strict=True), color=colour, lw=0.9, alpha=0.28, zorder=2) if train else None
            ax.plot(*zip(*val, strict=True), color=colour, lw=1.7, zorder=3, **look) if val else None
    if not ax.lines:
        not_logged(ax)


def loss_figure(runs, name):
    """matplotlib Figure: the losses against step, tokens and time, side by side, on one loss axis."""
    from matplotlib.lines import Line2D

    figure, axes = new_figure(3, 4.9 + 0.24 * math.ceil((len(runs) + 2) / 4), sharey=True)
    colours = colours_of(len(runs))
    for ax, (x, label, units) in zip(axes, X_AXES, strict=True):
        tops = (a for r in runs for rows in r.trace.trials for loss in LOSSES for a, _ in curve(rows, loss, x))
        size, unit = unit_of(max(tops, default=0), units)
        draw_panel(ax, runs, colours, x, size)
        ax.set_xlabel(f"{label} ({unit})" if unit else label)
        ax.set_xlim(left=0)
    axes[0].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_ylabel("loss (nats/token)")
    axes[0].set_ylim(loss_limits(runs))
    keys = [Line2D([], [], color="0.4", alpha=0.4, lw=1), Line2D([], [], color="0.4", marker="o", ms=4.5, mec="white")]
    keys = [Line2D([], [], color=colour, lw=3) for colour in colours] + keys
    labels = [f"{label_of(s['run_id'])}   {show(s['val_loss'], '.4f')}" for s in map(summarize, runs)]
    labels += ["train loss", "val loss; last value beside the run"]
    figure.legend(keys, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(f"{label_of(name, 60)}: {len(runs)} run{'s' * (len(runs) > 1)}", fontsize=14, fontweight="bold")
    return figure


def series_figure(runs, name, panels):
    """Figure with a panel for each (label, function of a run -> [(step, value)], or with errors as
    [(step, value, error)]); None if nothing is logged."""
    found = [[points_of(run) for run in runs] for _, points_of in panels]
    if not any(points for panel in found for points in panel):
        return None
    figure, axes = new_figure(len(panels), 4.4, 7 * len(panels))
    for ax, (label, _), panel in zip(axes, panels, found, strict=True):
        bars = any(len(point) > 2 for points in panel for point in points)
        look = {"lw": 1.2, "capsize": 2, "ms": 4, "marker": "o" if bars else ""}
        for run, points, colour in zip(runs, panel, colours_of(len(runs)), strict=True):
            line = look | {"color": colour, "label": label_of(run.path.name)}
            ax.errorbar(*zip(*points, strict=True), **line) if points else None
        ax.set(xlabel="step", ylabel=label, ylim=(None if bars else 0, None)) if ax.lines else not_logged(ax)
    if len(runs) <= 12:
        next(ax for ax in axes if ax.lines).legend(frameon=False, fontsize=8)
    figure.suptitle(label_of(name, 60), fontsize=12, fontweight="bold")
    return figure


def load_colour(ratio):
    """Place of a load / the mean load on the colour scale, 0 to 1: even is 1/2, and x is as far from it as 1 / x."""
    return ratio / 2 if ratio < 1 else 1 - 1 / (2 * ratio)


def load_figure(run, name):
    """matplotlib Figure of a run that reports its routers: a heat map of the load for each mixture layer, experts
    against steps."""
    reports, layers = run.trace.routers, run.trace.routers[-1]["layers"]
    experts, count = len(reports[-1]["load"][0]), len(layers)
    rows = -(-count // (4 if count > 6 else 3))
    columns = -(-count // rows)
    size = {"height": 1.3 + rows * (1.9 + min(experts, 64) / 64), "width": max(6, 1.6 + 3.5 * columns)}
    figure, axes = new_figure(count, **size, rows=rows, sharex=True, sharey=True)
    for m, (ax, layer) in enumerate(zip(axes, layers, strict=True)):
        mesh = draw_load(ax, reports, m)
        found, lowest = balance_of(reports[-1]["load"][m]), m >= count - columns
        dead = f", {found['dead']} dead" if found["dead"] else ""
        ax.set_title(f"layer {layer}: {found['effective_experts']:.1f} of {experts} effective{dead}", fontsize=10)
        ax.set(ylabel="expert" if m % columns == 0 else "", xlabel="step" if lowest else "")
        ax.xaxis.set_tick_params(labelbottom=lowest)
    ticks = {"1/20": DEAD, "1/4": 1 / 4, "1/2": 1 / 2, "even": 1, "2": 2, "4": 4, "20": 1 / DEAD}
    places = [*map(load_colour, ticks.values())]
    bar = figure.colorbar(mesh, ax=list(axes), extend="min", aspect=20 * rows, pad=0.015, ticks=places)
    bar.set_ticklabels([*ticks])
    bar.set_label("load / mean; black: dead")
    title = f"{label_of(name, 50)}: load of the experts\nrun {label_of(run.path.name)}, to step {reports[-1]['step']:,}"
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure


def draw_load(ax, reports, m):
    """Heat map of the m-th mixture layer; a report is about the steps since the one before. Returns the colours."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    ratios = [[share * len(load) / sum(load) for share in load] for load in (report["load"][m] for report in reports)]
    cells = [[load_colour(row[expert]) for row in ratios] for expert in range(len(ratios[0]))]
    edges = [0, *(report["step"] for report in reports)], [e - 0.5 for e in range(len(cells) + 1)]
    look = {"norm": Normalize(load_colour(DEAD), load_colour(1 / DEAD)),
            "cmap": colormaps["coolwarm"].with_extremes(under="black")}
    mesh = ax.pcolormesh(*edges, cells, **look)
    ax.grid(False)
    ax.spines[:].set_visible(False)
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return mesh


def figures_of(runs, name):
    """{file name: Figure} of an experiment, loss.png last; load.png is of the newest run (names of run folders begin
    with the time) that reports its routers."""
    routed = [run for run in runs if run.trace.routers]
    schedule = [(label, lambda run, key=key: curve(run.trace.rows, key, "step"))
                for key, label in (("lr", "learning rate / its setting"), ("window", "attention window (tokens)"))]
    times = [("ms per step", lambda run: step_times(run.trace.rows))]
    scores = [("HellaSwag: accuracy per token (%)\nstandard errors; chance is 25 %", accuracies)]
    found = {"step_time.png": series_figure(runs, name, times),
             "schedule.png": series_figure(runs, name, schedule),
             "hellaswag.png": series_figure(runs, name, scores),
             "load.png": load_figure(routed[-1], name) if routed else None, "loss.png": loss_figure(runs, name)}
    return {file: figure for file, figure in found.items() if figure}


def compare_figure(groups):
    """Figure: mean validation loss of each group against step, tokens and time as far as they are logged, with a band
    from its lowest to its highest run."""
    import numpy as np

    shown = [axis for axis in X_AXES if common_range(groups.values(), axis[0])] or X_AXES[:1]
    figure, axes = new_figure(len(shown), 4.9, 7 * len(shown), sharey=True)
    colours, lows, highs = colours_of(len(groups)), [], []
    for ax, (x, label, units) in zip(axes, shown, strict=True):
        spans = {name: common_range([samples], x) for name, samples in groups.items()}
        size, unit = unit_of(max((span[1] for span in spans.values() if span), default=0), units)
        for (name, samples), colour in zip(groups.items(), colours, strict=True):
            if spans[name]:
                grid = np.linspace(*spans[name], 200)
                losses = resample(samples, x, grid)
                ax.fill_between(grid / size, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
                ax.plot(grid / size, losses.mean(0), color=colour, label=f"{label_of(name)} (n={len(samples)})")
                low, high = losses.min(), losses.mean(0)[20]
                lows, highs = lows + [low] * bool(np.isfinite(low)), highs + [high] * bool(np.isfinite(high))
        text = f"{label} ({unit})" if unit else label
        ax.set_xlabel(text) if ax.lines else not_logged(ax, "no two common validations")
    if lows and highs:
        axes[0].set_ylim(min(lows) - 0.05, max(highs) + 0.05)
    if any(ax.lines for ax in axes):
        next(ax for ax in axes if ax.lines).legend(frameon=False)
    axes[0].set_ylabel("validation loss (nats/token)")
    return figure


def save_figures(make, folder):
    """Write the {file name: Figure} that make() returns into `folder`; returns the paths. RuntimeError if matplotlib is
    missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of glyphs that the font lacks: a box; of numbers too large to be drawn: a gap
        try:
            figures = make()
        except ModuleNotFoundError as error:
            raise RuntimeError(f"no plot without {error.name}: pip install {error.name}, or pass --no-plot") from None
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            image = io.BytesIO()
            figure.savefig(image, format=Path(name).suffix[1:] or "png")
            write_file(folder / name, [image.getvalue()])
    return [folder / name for name in figures]


# ---------------------------------------------------------------------------------------------------------------------
# Commands: each prints its result and returns the exit code


def show_experiment(args):
    """Report all runs of an experiment, keep the report in logs.txt, then draw them."""
    runs = load_experiment(args.log_dir, args.experiment_name)
    if args.json:
        say(format_json(runs).split("\n"))
        return 0
    report = experiment_report(args.experiment_name, runs)
    emit(report, args)
    table = Path(args.log_dir) / args.experiment_name / "logs.txt"
    write_file(table, [encoded(plain(report) + "\n")])
    say(f"table: {table}")
    if args.no_plot:
        return 0
    if loss_limits(runs) is None:
        say("no plot: no loss logged yet")
        return 0
    folder = Path(args.images_dir) / args.experiment_name
    for path in save_figures(lambda: figures_of(runs, args.experiment_name), folder):
        say(f"plot: {path}")
    return 0


def draw_load_of(args):
    """Write the heat map of the last of the runs that reports its routers. ValueError if none does."""
    routed = [run for run in read_each(expand(args.logs)) if run.trace.routers]
    if not routed:
        raise ValueError(f"--plot: no run in {', '.join(args.logs)} reports its routers, as train_moe.py's do")
    path, experiment = Path(args.plot), routed[-1].path.absolute().parent.name
    save_figures(lambda: {path.name: load_figure(routed[-1], experiment)}, path.parent)
    say(f"plot: {path}")


def show_runs(args):
    """A screen per run, or above ten of them a table; what is no log is counted."""
    found = [describe(run, args.target) for run in read_each(expand(args.logs))]
    logs = [numbers for numbers in found if numbers["status"] != "not a log"]
    if args.json:
        say_json({"runs": found})
    else:
        report = [screen(n) for n in logs] if len(logs) <= 10 else [run_table(logs)]
        if len(found) > 1:
            counts = {status: sum(n["status"] == status for n in found) for status in {n["status"]: 0 for n in found}}
            report.append(f"{len(found)} files: {', '.join(f'{count} {status}' for status, count in counts.items())}")
        report += hellaswag_report(logs)
        others = [n for n in found if n["status"] == "not a log"]
        reasons = [f"not a log: {n['path']}{''.join(f' ({note})' for note in n['warnings'])}" for n in others]
        emit(report + reasons[:20], args)
        if args.plot:
            draw_load_of(args)
    return 1 if not logs or (args.strict and any(n["status"] != "complete" for n in found)) else 0


def load_groups(names):
    """{name: samples} and {name: what was left out} of groups of logs. ValueError if one has no complete run."""
    groups, dropped = {}, {}
    short = ["/".join(Path(os.path.abspath(name)).parts[-1 - ("*" in name) :]) for name in names]
    for name, last in zip(names, short, strict=True):
        label = last if short.count(last) == 1 else name if name not in groups else f"{name} ({len(groups) + 1})"
        groups[label], dropped[label] = samples_of(load(expand([name]), "stages"))
        if not groups[label]:
            raise ValueError(f"'{name}' holds no complete run: {reasons(dropped[label])}")
    return groups, dropped


def reasons(dropped):
    return "; ".join(dropped[:3]) or "no step in any file"


def compare_groups(args):
    """Means of groups of runs and how they differ from the first group."""
    if len(args.groups) < 2:
        raise ValueError("compare needs two groups or more: files, folders or quoted globs")
    groups, dropped = load_groups(args.groups)
    result = compare_numbers(groups, dropped)
    if args.json:
        say_json(result)
        return 0
    emit(compare_report(groups, result), args)
    if not args.no_plot:
        path = Path(args.plot)
        save_figures(lambda: {path.name: compare_figure(groups)}, path.parent)
        say(f"plot: {path}")
    return 0


def sizes_of(samples):
    """Parameters of the first run of a group: all, and those that a token meets."""
    return {key: summarize(samples[0].run)[key] for key in ("params_total", "params_active")}


# Settings that runs must share for their steps to a loss to be compared
COMPARED = "eval_tokens eval_seq_len eval_window batch_tokens stage_ends seq_len mtp".split()
SPENT = ("tokens", "step", "train_time_ms")  # what a loss costs


def not_comparable(a, b):
    """Why losses and steps of two of our runs cannot be compared, in words; "" if they can."""
    data = [run.config.get("data") for run in (a, b)]
    prints = [found.get("fingerprint") if isinstance(found, dict) else None for found in data]
    if None in prints:
        return "no config.json says which data"
    x, y = settings_of(a), settings_of(b)
    same = [name for name in COMPARED if name in x and name in y]
    differing = [f"{name} {x[name]} and {y[name]}" for name in same if x[name] != y[name]]
    return ", ".join(["other data"] * (prints[0] != prints[1]) + differing)


def reached(rows, loss):
    """Tokens, step and train_time_ms at which the validation loss came down to `loss`, in proportion
    between the validations around it; None if it did not, or that is not logged."""
    above = None
    for row in rows:
        if None in [number(row.get(key)) for key in ("val_loss", *SPENT)]:
            continue
        if row["val_loss"] <= loss:
            above = above or row
            fall = above["val_loss"] - row["val_loss"]
            share = (above["val_loss"] - loss) / fall if fall else 0
            return {key: above[key] + share * (row[key] - above[key]) for key in SPENT}
        above = row if math.isfinite(row["val_loss"]) else above
    return None


def control_numbers(groups):
    """Our runs against the first, the control: what each spent until the control's target loss, or
    else its last one; its step time over the control's; and the ratio at which the two would break
    even. {"refused": why} if they are not comparable; None unless each group is one of our runs."""
    samples = {name: found[0] for name, found in groups.items() if len(found) == 1}
    sources = {sample.run.source for sample in samples.values()}
    if len(samples) < len(groups) or sources != {"metrics.jsonl"}:
        return None
    first, *others = samples
    control = samples[first]
    for name in others:
        if why := not_comparable(control.run, samples[name].run):
            return {"refused": f"{first} and {name}: {why}"}
    loss = number(settings_of(control.run).get("target_loss")) or control.loss
    spent = {name: reached(sample.rows, loss) for name, sample in samples.items()}
    found = []
    for name, sample in samples.items():
        both = spent[first] and spent[name] and spent[name]["step"]
        timed = sample.steps and control.time_s and sample.time_s
        found.append({
            "name": name,
            "reached": spent[name],
            "step_time_ratio": timed and timed / sample.steps * control.steps / control.time_s,
            "break_even_ratio": spent[first]["step"] / spent[name]["step"] if both else None,
        })
    return {"loss": loss, "runs": found}


def control_report(found):
    """[Table of what control_numbers found], or [why there is none]."""
    if not found:
        return []
    if "refused" in found:
        return [f"tokens, steps and seconds to a loss: not comparable, {found['refused']}"]
    rows = []
    for run in found["runs"]:
        at = run["reached"]
        spent = [f"{at['tokens']:,.0f}", f"{at['step']:,.0f}", f"{at['train_time_ms'] / 1000:,.1f}"] if at else []
        ratios = [show(run[key], ".3f") for key in ("step_time_ratio", "break_even_ratio")]
        rows.append([run["name"], *(spent or ["not reached", "-", "-"]), *ratios])
    headings = [f"to val loss {found['loss']:.4f}", "tokens", "steps", "seconds", "step time ratio", "break-even"]
    return [Table(headings, rows)]


def compare_numbers(groups, dropped):
    """{"groups", "pairs", "stages", "equal", "control"}: pairs are of the first group with each
    other one."""
    first, *others = groups
    pairs = []
    for name in others:
        a, b = groups[first], groups[name]
        pairs.append({"a": first, "b": name, "val_loss": welch([s.loss for s in b], [s.loss for s in a]),
                      "train_time_s": welch([s.time_s for s in b], [s.time_s for s in a]),
                      "sigma_rule": pairwise_rule(a, b)})
    return {"groups": [{"name": name, **group_numbers(samples), **sizes_of(samples),
                        "warnings": group_warnings(samples, dropped[name])} for name, samples in groups.items()],
            "pairs": pairs, "stages": {name: stage_medians(samples) for name, samples in groups.items()},
            "equal": equal_points(list(groups.values())), "control": control_numbers(groups)}


def compare_report(groups, result):
    report, names = [group_table(groups)], list(groups)
    if any(group["params_active"] != group["params_total"] for group in result["groups"]):
        rows = [[g["name"], show(g["params_total"], ","), show(g["params_active"], ",")] for g in result["groups"]]
        report.append(Table(["parameters of", "all", "active"], rows))
    rows = [[f"{what} of {pair['b']}", *welch_cells(pair[key], form)] for pair in result["pairs"]
            for what, key, form in (("val loss", "val_loss", "+.5f"), ("train s", "train_time_s", "+.3f"))]
    report.append(Table(["minus that of " + names[0], "difference", "95 % interval", "p (Welch)", "Cohen's d"], rows))
    for pair in result["pairs"]:
        rule = pair["sigma_rule"]
        words = f"{rule['value']:+.4f}, {passed(rule)} (>= {SIGMA_RULE})"
        report.append(f"track 3's rule for {pair['b']} beating {names[0]}: {words}")
    stages = dict.fromkeys(stage for found in result["stages"].values() for stage in found)
    rows = [[stage, *(show(found.get(stage), ",.2f") for found in result["stages"].values())] for stage in stages]
    report.append(Table(["median ms of a step", *names], rows))
    forms = {"step": lambda v: f"step {v:,.0f}", "tokens": lambda v: f"{v:,.0f} tokens",
             "train_time_ms": lambda v: f"{v / 1000:,.2f} s"}
    rows = [[forms[x](point["at"]), *(f"{mean:.4f}" for mean in point["means"]),
             *(f"{mean - point['means'][0]:+.4f}" for mean in point["means"][1:])]
            for x, points in result["equal"].items() for point in points]
    report.append(Table(["val loss at", *names, *(f"{name} - {names[0]}" for name in names[1:])], rows))
    if not result["equal"]["tokens"]:
        report.append("equal tokens: not all of these logs count their tokens")
    report += control_report(result["control"])
    return report + [f"note on {group['name']}: {text}" for group in result["groups"]
                     for text in group["warnings"]]


def passed(test):
    return "passed" if test["passed"] else "not passed"


def welch_cells(test, form):
    if not test:
        return ["-", "-", "-", "-"]
    interval = f"{test['ci_low']:{form}} to {test['ci_high']:{form}}"
    return [f"{test['difference']:{form}}", interval, f"{test['p_value']:.2g}", f"{test['cohens_d']:+.2f}"]


def show_profile(args):
    """What the traces of a run with --enable_profiling say: the heaviest operations, the time of a
    step, how much of the communication ran beside computation."""
    run = Path(args.run)
    folder = run / "profile" if (run / "profile").is_dir() else run
    paths = sorted(folder.glob("trace_rank*.json"), key=natural)
    if not paths:
        raise FileNotFoundError(f"'{folder}' holds no trace_rank*.json, as of --enable_profiling")
    ranks = [trace_numbers(path) for path in paths]
    memory = sorted(map(str, folder.glob("memory_rank*.pickle")))
    if args.json:
        say_json({"ranks": ranks, "memory_snapshots": memory})
    else:
        report = [operation_table(ranks[0], args.top), *map(profile_line, ranks)]
        report += [f"trace, for ui.perfetto.dev: {path}" for path in paths]
        emit(report + [f"memory snapshot, for pytorch.org/memory_viz: {m}" for m in memory], args)
    return 0


def operation_table(numbers, top):
    """The heaviest operations of a trace as a Table; shares are of all of them."""
    found = numbers["operations"]
    total = sum(us for _, us, _ in found) or 1
    rows = [[clip(name), f"{us / 1000:,.3f}", percent(us / total), calls, f"{us / calls:,.1f}"]
            for name, us, calls in found[:top]]
    title = f"{Path(numbers['trace']).stem}: the heaviest of {len(found)} {numbers['kind']}"
    return Table(["name", "self ms", "share", "calls", "us a call"], rows, title)


def profile_line(numbers):
    """The steps of a trace in a sentence."""
    times = (numbers[key] for key in ("communication_us", "beside_us", "step_us"))
    talk, beside, step = (show(us and us / 1000, ",.1f") for us in times)
    idle = f", device idle {percent(numbers['idle'])}" if numbers["idle"] is not None else ""
    return (f"{numbers['steps']} steps: communication {talk} ms, {beside} ms of it beside "
            f"computation; {step} ms a step{idle}")


ENVIRONMENT = ("python", "torch", "cuda", "triton", "driver", "gpus", "world_size")


def diff_runs(args):
    """What changed from run or group A to B."""
    from records.sources import compare_parts, unified

    loaded = [load(expand([name])) for name in (args.a, args.b)]
    a, b = (load_one(next((run for run in runs if run.trace.parts), runs[0]).path) for runs in loaded)
    for run in (a, b):
        if not run.trace.parts and not run.config:
            raise ValueError(f"'{run.path}' holds no source: a log that begins with it is needed")
    result = {"a": str(a.path), "b": str(b.path), **compare_parts(a.trace.parts, b.trace.parts)}
    result["settings"] = changed_config(a, b) + result["settings"]
    facts = [describe(run) for run in (a, b)]
    result["environment"] = [{"name": key, "a": facts[0][key], "b": facts[1][key]} for key in ENVIRONMENT
                             if facts[0][key] != facts[1][key]]
    result["effect"] = effect_of(*loaded)
    result["notes"] += [f"{name}: {text}" for name, runs in zip("AB", loaded, strict=True)
                        for text in group_warnings(*samples_of(runs)) if "code versions" in text]
    result["notes"] += [f"{name}: {text}" for name, run in zip("AB", (a, b), strict=True) for text in changes_of(run)]
    result["unified_diff"] = unified(a.trace.parts, b.trace.parts, ("a", "b"))
    if args.json:
        say_json(result)
    else:
        emit(diff_report(result, args.no_text), args)
    return 0


def changed_config(a, b):
    """Settings of two of our runs that differ, names and seeds aside."""
    old, new = settings_of(a), settings_of(b)
    names = [name for name in dict.fromkeys([*old, *new]) if name not in SELF and old.get(name) != new.get(name)]
    return [{"name": f"setting {name}", "a": json.dumps(old.get(name)), "b": json.dumps(new.get(name))}
            for name in names if old and new]


def effect_of(old, new):
    """{"val_loss" | "train_time_s" | "steps": {"a", "b", "difference", "test"}} of the complete trials of groups."""
    a, b = (samples_of(runs)[0] for runs in (old, new))
    found = {}
    for key, name in (("val_loss", "loss"), ("train_time_s", "time_s"), ("steps", "steps")):
        x, y = ([getattr(s, name) for s in samples] for samples in (a, b))
        x_mean, y_mean = mean_sd(x)[0], mean_sd(y)[0]
        both = x_mean is not None and y_mean is not None
        found[key] = {"a": x_mean, "b": y_mean, "difference": y_mean - x_mean if both else None, "test": welch(y, x)}
    return {**found, "n_a": len(a), "n_b": len(b)}


def diff_report(result, no_text):
    report = [f"A: {result['a']}", f"B: {result['b']}"]
    report += result["blocks"]
    if result["settings"]:
        rows = [[s["name"], clip(s["a"]), clip(s["b"])] for s in result["settings"]]
        report.append(Table(["setting or constant", "A", "B"], rows))
    else:
        report.append("no setting or constant differs")
    if result["units"]:
        report.append(Table(["function or class", "change"], [[u["name"], u["change"]] for u in result["units"]]))
    report += result["notes"]
    if result["unified_diff"] and not no_text:
        report.append([line.expandtabs(4) for line in result["unified_diff"]])
    same = "the same Python, PyTorch, driver and hardware"
    rows = [[e["name"], e["a"], e["b"]] for e in result["environment"]]
    report.append(Table(["environment", "A", "B"], rows) if rows else same)
    effect, rows = result["effect"], []
    for key, form in (("val_loss", ",.5f"), ("train_time_s", ",.3f"), ("steps", ",.0f")):
        e = effect[key]
        cells = welch_cells(e["test"], "+" + form)[1:3]
        rows.append([key, show(e["a"], form), show(e["b"], form), show(e["difference"], "+" + form), *cells])
    headings = ["mean", f"A (n={effect['n_a']})", f"B (n={effect['n_b']})", "B - A", "95 % interval", "p (Welch)"]
    return [*report, Table(headings, rows)]


def show_stats(args):
    """Mean and spread of a group of runs, and what they say about a target."""
    samples, dropped = samples_of(load(expand(args.logs)))
    if not samples:
        raise ValueError(f"no complete run in {', '.join(args.logs)}: {reasons(dropped)}")
    result = {**group_numbers(samples), "losses": [s.loss for s in samples], "times_s": [s.time_s for s in samples],
              "paths": [str(s.run.path) for s in samples],
              "versions": {key: group_numbers(group) for key, group in versions(samples).items()}}
    result["test"] = None if args.target is None else target_numbers(samples, args.target, args.alpha)
    result["warnings"] = group_warnings(samples, dropped)
    if args.json:
        say_json(result)
    else:
        emit(stats_report(samples, result), args)
    return 0 if not result["test"] or result["test"]["passed"] else 1


def stats_report(samples, result):
    groups = versions(samples)
    report = [group_table({"all": samples, **(groups if len(groups) > 1 else {})})]
    if len(samples) <= 50:
        rows = [[s.run.path.name, f"{s.loss:.5f}", show(s.time_s, ",.3f"), s.steps] for s in samples]
        report.append(Table(["run", "val loss", "train s", "steps"], rows))
    report += target_lines(result["test"], result["n"]) if result["test"] else []
    return report + [f"warning: {text}" for text in result["warnings"]]


def target_lines(test, n):
    """What the test says, in sentences."""
    p, alpha, rule = test["p_value"], test["alpha"], test["sigma_rule"]
    lines = ["no t-test: it needs two runs that are not equal" if p is None else
             f"one-sided t-test that the mean loss is below {test['target']}: p = {p:.2g}, "
             f"{passed(test)} (p < {alpha})",
             f"track 3's rule with a fixed sd of 0.0013: (target - mean) * sqrt(n) = "
             f"{rule['value']:+.4f}, {passed(rule)} (>= {SIGMA_RULE})"]
    if test["detectable_margin"] is not None:
        lines.append(f"{n} runs with this spread show a mean that is {test['detectable_margin']:.5f} below the target")
    if test["more_runs"]:
        lines.append(f"for p < {alpha} at this mean and spread {test['runs_needed']} runs are needed, "
                     f"{test['more_runs']} more")
    elif test["runs_needed"] is None and p is not None:
        lines.append("no number of runs would show it at this mean and spread")
    return lines


def verify_folder(args):
    """Check the claims of a record folder's README.md, its code versions and its sources."""
    folder = Path(args.folder)
    if not (folder / "README.md").is_file():
        raise FileNotFoundError(f"'{folder / 'README.md'}' is not there: nothing is claimed")
    runs = load(expand([args.folder]), keep_source=True)
    samples, dropped = samples_of(runs)
    groups = {"all": samples} if samples else {}
    for sample in samples:
        groups.setdefault(str(sample.run.path.parent), []).append(sample)
    groups |= versions(samples)
    claims = check_claims(read_text(folder / "README.md")[:1_000_000], groups, args.target)
    complete = verdict("runs", "complete runs", bool(samples), f"{len(samples)} complete")
    others = [verdict("runs", name, None, why) for name, _, why in (s.partition(": ") for s in dropped[:20])]
    checks = [check_versions(samples), check_sources(runs), complete, *others]
    bad = [c for c in claims + checks if c["verdict"] == "contradicted"]
    result = {"folder": str(folder), "runs": len(samples), "claims": claims, "checks": checks, "passed": not bad}
    if args.json:
        say_json(result)
    else:
        report = [Table(["check", "verdict", "detail"], [[c["claim"], c["verdict"], c["detail"]] for c in checks])]
        order = sorted(claims, key=lambda c: list(VERDICTS.values()).index(c["verdict"]))
        rows = [[c["kind"], c["claim"], c["verdict"], c["detail"]] for c in order]
        report += [Table(["kind", "claim of the README", "verdict", "detail"], rows)] if rows else ["no claim found"]
        said = [claim["verdict"] for claim in claims]
        counts = [f"{said.count(word)} {word}" for word in VERDICTS.values()]
        emit([*report, f"{len(samples)} complete runs; claims: {', '.join(counts)}"], args)
    return 1 if bad else 0


def check_versions(samples):
    """One code version in each folder of logs; other seeds and comments are the same version."""
    folders, mixed = {}, []
    for sample in samples:
        folders.setdefault(str(sample.run.path.parent), []).append(sample)
    for name, group in folders.items():
        first, *others = [found[0].run for found in versions(group).values() if found[0].run.trace.code_hash] or [None]
        words = dict.fromkeys(what_differs(first, run) for run in others)
        some = "; ".join(list(words)[:3])
        mixed += [f"{name}: {len(others) + 1} versions: {some}"] if words else []
        mixed += [""] if words.keys() - HARMLESS else []
    fatal, mixed = "" in mixed, "; ".join(filter(None, mixed))
    return verdict("code", "one code version in each group", not fatal if samples else None, mixed)


def check_sources(runs):
    """Every embedded source compiles; one for a newer Python than this one cannot be judged."""
    from records.sources import parse_source

    found = {text: run for run in runs for text in run.trace.parts.values()}
    broken = [run for text, run in found.items() if parse_source(text).problem]
    own = natural(sys.version)
    newer = [run for run in broken if natural(run.trace.header.get("python", "")) > own]
    truth = None if not found or (newer and len(newer) == len(broken)) else not broken
    detail = f"not that of {', '.join(run.path.name for run in broken[:3])}" if broken else ""
    detail += f", for a newer Python than {sys.version.split()[0]}" if newer else ""
    return verdict("source", "the sources in the logs are whole Python files", truth,
                   detail if found else "no log holds a source")


def extract_source(args):
    """Write the source inside a log; one of several files into a new folder, which -o names without its .py."""
    from records.sources import parse_source

    run = load_one(Path(args.log))
    parts = run.trace.parts
    if not parts:
        if not os.path.exists(args.log):
            raise FileNotFoundError(f"'{args.log}' is not there")
        why = "".join(f" ({note})" for note in run.trace.notes if note.startswith("cannot be read"))
        raise ValueError(f"'{args.log}' holds no source{why}: expected a log that begins with it, or our run folder")
    if args.output is None:
        give([json.dumps(parts) + "\n" if args.json else next(iter(parts.values()))])
        return 0
    target = Path(args.output)
    files = write_parts(target, parts, args.log) if len(parts) > 1 else {target: next(iter(parts.values()))}
    if len(parts) == 1:
        text = files[target].encode("utf-8", "replace")
        if target.is_file() and not args.force and target.read_bytes() != text:
            raise ValueError(f"'{target}' is there and differs: choose another -o, or overwrite it with --force")
        write_file(target, [text])
    problems = [f"{path.name} {problem}" for path, text in files.items() if (problem := parse_source(text).problem)]
    if args.json:
        files = [str(path) for path in files]
        say_json({"files": files, "code_hash": run.trace.code_hash, "problems": problems})
    else:
        say([f"wrote {path}" for path in files] + [f"note: {problem}" for problem in problems])
    return 0


# Modules that our scripts import, installed or not, and files that Python, pytest or pip run when they find them
TAKEN = set("""numpy torch triton tiktoken datasets huggingface_hub pyarrow tqdm wandb matplotlib scipy rich pytest
hypothesis transformers records sitecustomize usercustomize conftest setup con prn aux nul""".split())


def check_part(name):
    """ValueError if a file of this name, which a log gives, would be imported or run in place of another one."""
    module = name.partition(".")[0].lower()
    if not re.fullmatch(r"[a-z]\w{0,60}\.(py|cu|cuh|cpp|h|txt|md|json)", name, re.ASCII | re.I):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as this is no plain file name")
    known = module in TAKEN or module in sys.stdlib_module_names or re.fullmatch(r"(com|lpt)\d", module)
    if known or importable(module) or importable(name.partition(".")[0]):
        raise ValueError(f"the log holds a file '{name}': nothing was written, as it would take the place of a module; "
                         "without -o the main file is printed")


def importable(module):
    from importlib.util import find_spec

    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: it is imported but says not from where
        return True


def write_parts(target, parts, log):
    """Write the files of a source of several into a folder that is new, or empty: old/old.py and others for old.py,
    old/train_gpt.py and others for old; {path: text}."""
    main, *others = parts
    folder, name = (target.with_suffix(""), target.name) if target.suffix == ".py" else (target, main)
    if folder.is_symlink() or (folder.exists() and (not folder.is_dir() or any(folder.iterdir()))):
        raise ValueError(f"'{log}' holds {len(parts)} files: they need a new folder, and '{folder}' is there; choose "
                         "another -o")
    for other in others:
        check_part(other)
    if len({other.lower() for other in (name, *others)}) < len(parts):
        raise ValueError(f"'{log}' holds files whose names differ in upper and lower case only: nothing was written")
    parts = {name: parts[main]} | {other: parts[other] for other in others}
    aside = folder.parent / f".logger-{os.urandom(6).hex()}.tmp"
    try:
        aside.mkdir()
        for name, text in parts.items():
            write_file(aside / name, [text.encode("utf-8", "replace")])
        os.replace(aside, folder)
    except OSError as error:
        raise RuntimeError(f"'{folder}' cannot be written: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return {folder / name: text for name, text in parts.items()}


def export_records(args):
    """All records of all trials as CSV or JSON, or to Weights & Biases."""
    paths = expand(args.logs)
    rows = (row for run in read_each(paths, True) for rows in run.trace.trials for row in rows)
    keys = columns_of(rows)
    if not keys:
        raise ValueError(f"no log in {', '.join(args.logs)} holds a step")
    if args.wandb:
        return export_wandb(paths, args.wandb)
    form = "json" if str(args.output).endswith(".json") else "csv"
    form = "json" if args.json else args.format or form
    pieces = export_json(paths) if form == "json" else export_csv(paths, keys)
    if args.output:
        write_file(args.output, map(encoded, pieces))
        say(f"wrote {args.output}", sys.stderr)
    else:
        give(pieces)
    return 0


def columns_of(rows):
    """The keys of all rows, up to MAX_COLUMNS."""
    keys = {}
    for row in rows:
        keys |= dict.fromkeys(row) if len(keys) <= MAX_COLUMNS else {}
    if len(keys) > MAX_COLUMNS:
        say(f"note: more than {MAX_COLUMNS} different keys: only the first ones were exported as CSV", sys.stderr)
    return [key for key in keys if key not in ("path", "trial")][:MAX_COLUMNS]


def export_csv(paths, keys):
    """A line a record: path, trial, and every key that any record has; yielded log by log. Texts are printable."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "trial", *map(printable, keys)])
    for run in read_each(paths, True):
        for trial, rows in enumerate(run.trace.trials, 1):
            cells = ([run.path, trial, *map(row.get, keys)] for row in rows)
            writer.writerows([printable(c) if isinstance(c, (str, Path, list, dict)) else c for c in line]
                             for line in cells)
        yield file.getvalue()
        file.seek(0)
        file.truncate()


def export_json(paths):
    """{"runs": [what show gives, with all records of each trial under "curves"]}, yielded log by log."""
    start = '{"runs": ['
    for run in read_each(paths, True):
        if run.trace.trials:
            yield start + strict_json({**describe(run), "curves": run.trace.trials}, None)
            start = ",\n"
    yield "]}\n"


def export_wandb(paths, project):
    """One run of Weights & Biases for each trial. WANDB_MODE=offline keeps them on disk."""
    try:
        import wandb
    except ImportError:
        raise RuntimeError("--wandb: Weights & Biases is not installed; pip install wandb") from None
    for run in read_each(paths, True):
        facts = {key: value for key, value in describe(run).items() if key not in ("trial_runs", "warnings")}
        for trial, rows in enumerate(run.trace.trials, 1):
            name = printable(facts["run_id"]) + (f"-{trial}" if len(run.trace.trials) > 1 else "")
            config = {**facts, **settings_of(run)}
            try:
                target = wandb.init(project=project, name=name, config=config, reinit="finish_previous")
            except (OSError, RuntimeError, getattr(wandb, "Error", ValueError)) as error:  # no login, no network
                raise RuntimeError(f"--wandb: {error}; `wandb login`, or WANDB_MODE=offline keeps runs here") from None
            for row in rows:
                values = {key: value for key, value in row.items() if number(value) is not None}
                target.log(values, step=row["step"])
            target.finish()
    return 0


def show_board(args):
    """Leaderboard of record folders: Markdown on the terminal, a page in a file."""
    from records.board import board_html, board_markdown

    records = [record for name in args.folders for record in records_of(Path(name))]
    if not records:
        raise ValueError(f"no record in {', '.join(args.folders)}: expected folders with logs of complete runs")
    records.sort(key=lambda record: (record["date"] or "", record["name"]))
    if args.json:
        say_json({"records": records})
        return 0
    say(board_markdown(records).split("\n"))
    if args.html:
        page = Path(args.html)
        for record in records:  # links of the page start at its folder
            record["folder"] = os.path.relpath(record["folder"], page.resolve().parent)
        write_file(page, [board_html(records, args.title).encode("utf-8", "replace")])
        say(f"page: {args.html}", sys.stderr)
    return 0


def records_of(folder):
    """Record dicts of a folder: of itself if it holds logs or a README.md beside folders of logs, else of each folder
    inside it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder")
    date = re.compile(r"\d{4}-?\d\d-?\d\d")
    inside = [entry for entry in folders(folder) if date.match(entry.name)]
    found = [record_of(entry) for entry in inside] if inside and not date.match(folder.name) else [record_of(folder)]
    return [record for record in found if record]


def record_of(folder):
    """The record dict of one folder: numbers of its largest code version, logs of baselines aside; None without one."""
    paths = [path for path in find_logs(folder) if "baseline" not in str(path.relative_to(folder)).lower()]
    samples = samples_of(load(paths, keep_source=True))[0]
    if not samples:
        return None
    samples = next(iter(versions(samples).values()))
    first, match = samples[0].run, re.match(r"(\d{4})-?(\d\d)-?(\d\d)[_-]?(.*)", folder.name)
    titles = re.findall(r"^#+\s+(.+)", read_text(folder / "README.md"), re.MULTILINE)
    numbers = {key: value for key, value in group_numbers(samples).items() if key != "mean_step_ms"}
    torch, tokens = describe(first)["torch"], latest(samples[0].rows, "tokens")
    name, date = (match[4] or folder.name, "-".join(match.groups()[:3])) if match else (folder.name, None)
    return {"name": name, "date": date, "folder": str(folder), **numbers,
            "readme_title": titles[0].strip() if titles else None, "steps": numbers["steps"][-1],
            "tokens": tokens, "gpus": device_of(first), "torch": torch,
            "code_hash": first.trace.code_hash, "source": source_of(first),
            "curves": [{"label": s.run.path.name, "points": points_of(s.rows)} for s in samples]}


def source_of(run):
    """Source of a run, with its settings below as lines: records of one source differ in them alone."""
    lines = [f"# setting {name} = {value!r}" for name, value in settings_of(run).items() if name not in SELF]
    return "\n".join([*run.trace.parts.values(), *lines])


def points_of(rows, most=400):
    """[[step, time_s, val_loss, train_loss]]: all validations, and about `most` of the other records with a loss."""
    rows = [row for row in rows if any(number(row.get(key)) is not None for key in LOSSES)]
    stride = max(1, len(rows) // most)
    keys = ("train_time_ms", "val_loss", "train_loss")
    finite = [[number(row.get(key)) for key in keys] for row in rows]
    finite = [[v if v is not None and math.isfinite(v) else None for v in row] for row in finite]
    points = [[row["step"], None if ms is None else ms / 1000, val, train]
              for row, (ms, val, train) in zip(rows, finite, strict=True)]
    return [point for i, point in enumerate(points) if point[2] is not None or i % stride == 0]


def flag(parser, name, **options):
    """A flag with its dash and underscore spellings."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        super().error(printable(message))  # a folder's name may be taken for a flag


def build_parser():
    """Parser whose `command` is the function to call with its result; without a sub-command that of an experiment."""
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="print numbers as JSON, draw nothing")
    shown.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    about, _, more = __doc__.partition("\n\n")
    parser = Parser(description=about, epilog=more, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=show_experiment)
    parser.add_argument("--experiment_name", "--experiment-name", help="folder in the log folder")
    flag(parser, "log-dir", default="logs", help="folder of all experiments (default: logs)")
    flag(parser, "images-dir", default="images", help="folder for plots (default: images)")
    parser.add_argument("--json", action="store_true", help='print {"runs": [...]} instead of the table, draw nothing')
    flag(parser, "no-plot", action="store_true", help="draw nothing (matplotlib is not needed)")
    commands = parser.add_subparsers(metavar="COMMAND", dest="name")

    def command(name, function):
        text = " ".join(function.__doc__.split())
        found = commands.add_parser(name, parents=[shown], help=text, description=text, allow_abbrev=False)
        found.set_defaults(command=function)
        return found

    add_commands(command)
    return parser


def add_commands(command):
    """The sub-commands and their flags."""
    logs = {"nargs": "+", "metavar": "LOG", "help": "files, folders or globs"}
    target = {"type": float, "metavar": "LOSS", "help": "the loss to be reached"}
    sub = command("show", show_runs)
    sub.add_argument("logs", **logs)
    sub.add_argument("--target", **target | {"default": 3.28, "help": "to cross (default: 3.28)"})
    sub.add_argument("--strict", action="store_true", help="exit with 1 unless every file is a complete run")
    sub.add_argument("--plot", metavar="FILE", help="draw the experts' load of the last run that reports its routers")
    sub = command("compare", compare_groups)
    sub.add_argument("groups", nargs="+", metavar="GROUP", help="a file, folder or quoted glob for each group")
    sub.add_argument("--plot", default="images/compare.png", help="where the plot goes (default: images/compare.png)")
    flag(sub, "no-plot", action="store_true", help="draw nothing")
    sub = command("diff", diff_runs)
    sub.add_argument("a", metavar="A", help="a log, or a folder of runs")
    sub.add_argument("b", metavar="B", help="another one")
    flag(sub, "no-text", action="store_true", help="without the unified diff")
    sub = command("profile", show_profile)
    sub.add_argument("run", metavar="RUN", help="folder of a run, or of its traces")
    sub.add_argument("--top", type=int, default=12, metavar="N", help="operations (default: 12)")
    sub = command("stats", show_stats)
    sub.add_argument("logs", **logs)
    sub.add_argument("--target", **target)
    sub.add_argument("--alpha", type=float, default=0.01, help="p has to be below (default: 0.01)")
    sub = command("verify", verify_folder)
    sub.add_argument("folder", metavar="FOLDER", help="record folder with README.md and logs")
    sub.add_argument("--target", **target | {"default": 3.28, "help": "of its p (default: 3.28)"})
    sub = command("extract", extract_source)
    sub.add_argument("log", metavar="LOG")
    sub.add_argument("-o", "--output", metavar="FILE", help="file to write (default: the terminal)")
    sub.add_argument("--force", action="store_true", help="overwrite files that differ")
    sub = command("export", export_records)
    sub.add_argument("logs", **logs)
    sub.add_argument("-o", "--output", metavar="FILE", help="file to write (default: the terminal)")
    sub.add_argument("--format", choices=("csv", "json"), help="default: by its name, else csv")
    sub.add_argument("--wandb", metavar="PROJECT", help="upload to Weights & Biases instead")
    sub = command("board", show_board)
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="records, or a folder of them")
    sub.add_argument("--html", default="board.html", metavar="FILE", help="default: board.html")
    sub.add_argument("--title", default="Leaderboard", help="its title")


def main(argv=None):
    """Run a command; return its exit code, 1 after one line of `error: ...`, 130 after Ctrl-C."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed: None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal's encoding lacks
    try:
        try:
            args = parsed(argv)
            code = args.command(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise
        except SystemExit:  # of argparse
            sys.stdout.flush()
            raise
        except (ValueError, OSError, RuntimeError) as error:
            say(f"error: {sentence_of(error)}", sys.stderr)
            code = 1
    except (OSError, KeyboardInterrupt) as error:  # the reader (head, less) has seen enough; Ctrl-C
        code = 130 if isinstance(error, KeyboardInterrupt) else 0 if isinstance(error, BrokenPipeError) else 1
    drop_output()
    return code


def parsed(argv):
    """The arguments of the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.name and args.experiment_name is None:
        parser.error("give --experiment_name NAME or a command: see --help")
    return args


def sentence_of(error):
    """What an error says. One of the system without a file is of the output: files are written by write_file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f"'{error.filename}'" if error.filename else "the output cannot be written"
    return f"{where}: {error.strerror}"


def drop_output():
    """Point streams that cannot be written to nowhere, so that Python does not complain about them at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
