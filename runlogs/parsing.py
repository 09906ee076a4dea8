"""Bytes of a log -> Trace: the public speedrun's logs of every year, ours, and those of sister projects, whose lines
are in formats.py. It knows nothing of presenting. Losses are in nats/token, times in ms wherever a name ends in _ms."""

import codecs
import errno
import hashlib
import io
import json
import math
import os
import re
import stat
import zlib
from array import array
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

from runlogs.formats import (
    FIRST,
    FORMATS,
    LINE,
    MONTHS,
    PREFIX,
    SUMMARY,
    closing_of,
    limited,
    reason_of,
    scores_of,
    summary_of,
)

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
MAX_PARTS = 400  # files of a source
MAX_UNPACKED = 256 << 20  # bytes read of gzip data
MAX_SECTIONS = 6  # parts between separators that are kept
MAX_COLUMNS = 1000  # of an exported table
MAX_CELL = 500  # characters of a cell of a table
MAX_TEXT = 16 << 20  # characters read of config.json, README.md and hellaswag.jsonl
STEP_LINE = re.compile(rb"step[: ]\d|iter \d|Step +\d")
STEP = re.compile(r"step:(\d{1,15})(?:/(\d{1,15}))?", re.ASCII)
NUMBER = re.compile(r"([+-]?(?:\d++(?:\.\d*+)?|\.\d++)(?:e[+-]?\d++)?|[+-]?(?:nan|inf))(ms|s)?", re.ASCII | re.I)
DECIMAL = rb"(\d{1,15}(?:\.\d{0,15})?)"
USUAL_STEP = re.compile(  # nearly every line of every log; the others go through parse_step_line
    rb"step:(\d{1,15})/(\d{1,15}) (?:(val|train)_loss:%b )?train_time:%b(m?)s step_avg:(?:nan|%b)ms"
    % (DECIMAL, DECIMAL, DECIMAL))
LLMC = re.compile(r"s:(\d{1,15}) (tel|trl):", re.ASCII)
PEAK = re.compile(r"peak memory (?:allocated|consumption): (\d{1,15}) MiB(?: reserved: (\d{1,15}) MiB)?", re.ASCII)
RESUMED = re.compile(r"resumed after step (\d{1,15})", re.ASCII)
# a name of a file, or a path that leads neither up nor out
PLAIN = rb"[\w.-]{1,100}|(?:(?!\.{1,2}/|-)[\w.+-]{1,100}/){1,12}(?!\.{1,2}\n|-)[\w.+-]{1,100}"
PART = re.compile(rb"^-{40}\n# (%b)\n-{40}\n" % PLAIN, re.MULTILINE)  # one more file of a source
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
GPU = re.compile(r"^\| {1,9}(\d{1,3}) {1,9}(\S.{0,80}?) {1,80}(?:On|Off|N/A) {1,80}\|", re.M)  # of nvidia-smi
GPU_LIST = re.compile(r"^GPU (\d+): (.+?) \(UUID", re.MULTILINE)
DATE = re.compile(r"^\w{3} (\w{3}) +(\d{1,2}) ([\d:]{8}) (?:[A-Z]{2,5} )?(\d{4})", re.M | re.ASCII)
FACTS = {  # key of Trace.header: where it stands in the text about the machine
    "python": r"^Running python (\S+)",
    "torch": r"^Running pytorch (?:version )?(\d\S*)",
    "cuda": r"^Running pytorch .* compiled for CUDA (?!None\b)(\S+)",
    "triton": r"^Running Triton version (\S+)",
    "driver": r"Driver Version: (\S+)",
    "world_size": r"^(?:Running .* with world_size[ =]|.{0,99}Distributed world size: )(\d{1,5})",
    "gpu": r"^(?:Running (?:pytorch .{0,300} on |on device_name=)|GPU: )(\S.{0,100}?)(?: with world_size| \| Peak F)",
    "seed": r"^Using seed=(\d{1,18})",
    "max_iters": r"^(?:.{0,99}[ :\]])?max_iters = (\d{1,15})",
    "cpu": r"^(?:Running on )?(?:CPU|Model name):[ \t]*([^,\n]+)",
    "train_tokens": r"^Training DataLoader: total number of tokens: (\d{1,18})",
    "params_total": r"^[ \t]*Total parameters: ([\d,]{1,24})",
    "stage_ends": r"\bstage (?:ends|boundaries)=\[([\d, ()]{1,400})\]",
    "settings": r"^Settings: (\{.{1,100000}\})$",
}
FACTS = {key: re.compile(form, re.ASCII | re.I | re.M) for key, form in FACTS.items()}
LONG = re.compile(r"^(?!Settings: )(.{500}).+", re.MULTILINE)  # a line about the machine that is cut
LOSSES = ("train_loss", "val_loss")
SCORES = ("val_loss", "val_bpb")  # what a validation says
ACCURACIES = ("per_token", "per_byte", "raw")  # of HellaSwag: by what a loss is divided
DEAD = 1 / 20  # an expert with less than this share of the mean load is dead, as in train_moe.py
SELF = ("seed", "run_id", "experiment_name", "log_dir", "resume", "wandb", "tracker")  # change no training
RUN_FILES = ("metrics.jsonl", "log.txt", "config.json", "hellaswag.jsonl")
COMPLETED = ("done", "target")  # reached the last step or the target loss
BACKWARD = "step numbers go back without a resume line; the later records are used"


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
    stage_ms: list[dict] = field(default_factory=list)  # of each trial, as of loading.stage_times
    resets: int = 0  # falls of the clock: until record 21 the scripts set it back after 10 steps
    routers: list[dict] = field(default_factory=list)  # reports as of parse_routers, in order
    scores: dict[int, dict] = field(default_factory=dict)  # by step, as of parse_score
    changes: list[tuple] = field(default_factory=list)  # (step of a resume, its changed settings in words)
    reason: str = ""  # why it is no log
    ends: list[dict] = field(default_factory=list)  # the closing records of `earlier`, where they are whole logs
    mixed: str = ""  # why the whole logs in one file are no runs of one kind
    loss_key: str = "val_loss"  # which key of its records is the claim

    @property
    def trials(self):
        return [*self.earlier, self.rows] if self.rows else self.earlier

    def end_of(self, i):
        """What is known of the end of trial i, {} if nothing is."""
        return self.end if i == len(self.trials) - 1 else self.ends[i] if i < len(self.ends) else {}

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
            if trials and row["step"] > 1 and row in self.rows[-100:]:
                return
            if trials and (whole or row["step"] <= 1):
                self.next_trial()
            else:
                self.rewind(row["step"] - 1)
                self.note(BACKWARD)
        self.rows.append(row)
        if len(self.rows) > MAX_ROWS:
            self.thin()

    def merge(self, row):
        """Give the record of the step of `row` the keys that it lacks; among the last records, else it is left out."""
        for old in reversed(self.rows[-100:]):
            if old["step"] == row["step"]:
                for key in row if len(old) < MAX_KEYS else ():
                    old.setdefault(key, row[key])
                return

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
    """Text of a file up to MAX_TEXT characters, line ends as \\n, what is no UTF-8 as U+FFFD; "" without a file."""
    if not path.is_file():
        return ""
    with io.TextIOWrapper(open_file(path), encoding="utf-8-sig", errors="replace") as file:
        return file.read(MAX_TEXT)


def number(value):
    """`value` if it is a number (nan and inf included), else None: text, true, null, integers beyond 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < 2**63 else None


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


OTHER_NAMES = {"loss": "train_loss", "t_ms": "train_time_ms"}  # of keys in public step lines


def parse_step_line(line):
    """`step:N/M key:value ...` as a dict with N as `step` and M as `iterations` (None without /M), llm.c's
    `s:N tel:L` and `s:N trl:L ...` likewise; None if `line` has another form."""
    line = ANSI.sub("", line)
    words = line.split()
    if head := STEP.fullmatch(words[0]) if words else None:
        found = {OTHER_NAMES.get(key, key): value for key, value in parse_pairs(words[1:]).items()}
        first = {"step": int(head[1]), "iterations": int(head[2]) if head[2] else None}
        return {**first, **found, **first}
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
    """A last line without line end may be cut in a number (3.2 of 3.2807): its last word goes, unless it has a unit."""
    return line if re.search(rb"\d(ms|s| MiB)$", line) else line.rpartition(b" ")[0]


class LogParser:
    """Parses blocks of whole lines. Step lines count behind a separator only, because the code may quote one; if one
    more source and separator follow, that is the next of several whole logs in the file. Lines of several projects in
    one file are read as one run, or its trials, in their order."""

    def __init__(self, keep_rows=True, loss_key=None):
        self.keep_rows, self.sections, self.found, self.notes = keep_rows, [], None, []
        self.kept = {*LOSSES, *SCORES, loss_key}  # keys of records that stay
        self.logs, self.lost, self.rows_kept = [], False, 0  # the whole logs before this one
        self.bar()

    def bar(self):
        """A separator, or the start of the file: what follows may be the steps."""
        if self.found and self.found.trace.trials and self.holds_steps():
            rest = self.sections[-1][self.read :]
            self.whole_log()
            self.sections = [rest]  # the source of the next log, if one follows
        elif len(self.sections) == MAX_SECTIONS:
            del self.sections[-2]
        self.sections.append(bytearray())
        self.before, self.found = self.found, Found(Trace())
        self.size = self.read = 0  # bytes of the section so far, and up to its last line that was taken

    def holds_steps(self):
        """Whether the section that ends here is one of steps: behind the source, or one that begins with a step."""
        first = 1 if len(self.sections) > 1 and not self.sections[0].strip() else 0
        return len(self.sections) > first + 1 or bool(LINE.match(self.sections[-1][:MAX_LINE].lstrip()))

    def whole_log(self):
        """Keep the log that ends here, of too many the first ones."""
        log = self.log()
        self.rows_kept += sum(map(len, log.trials))
        self.lost |= len(self.logs) >= MAX_TRIALS or self.rows_kept > 3 * MAX_ROWS
        self.logs += [] if self.lost else [log]

    def feed(self, block):
        """`block` ends with a line end; "\\r\\n" is read as "\\n"."""
        block = block.replace(b"\r\n", b"\n") if b"\r" in block else block
        pieces, start, at = [], 0, 0
        while (at := block.find(BAR, at)) >= 0:
            end = block.find(b"\n", at) + 1 or len(block)
            if (at == 0 or block[at - 1 : at] == b"\n") and block[at:end].rstrip() == BAR:
                pieces.append((start, at))
                start = end
            at = end
        pieces.append((start, len(block)))
        for i, (start, end) in enumerate(pieces):
            self.bar() if i else None
            steps = i >= len(pieces) - 2 or len(self.sections) > 1  # not in a source
            self.text(block[start:end], steps or bool(LINE.match(block[start : start + MAX_LINE].lstrip())))

    def text(self, block, steps):
        """Lines of one section, which may hold steps."""
        section = self.sections[-1]
        section += block[: MAX_SECTION - len(section)]
        block = block.replace(b"\r", b"\n") if b"\r" in block else block  # of progress bars
        at, self.size = self.size, self.size + len(block)
        for line in block.split(b"\n") if steps else ():
            at += len(line) + 1
            if match := USUAL_STEP.fullmatch(line):
                self.row(usual_row(match))
                self.read = at
            elif line and self.other(line):
                self.read = at

    def other(self, line):
        """Whether a line that has not the usual form is of a run; it is taken in."""
        if b"\x1b" in line:
            line = ANSI.sub("", line[:MAX_LINE].decode("utf-8", "replace")).encode()
        likely = line[:1] and (line[0] in FIRST or line[1:2].isdigit())  # srun -l writes blanks before a rank
        if likely and (match := LINE.match(line)):
            text = line[match.end() : match.end() + MAX_LINE].decode("utf-8", "replace")
            return self.found.counts(match["rank"]) and self.line(text)
        if self.found.block is not None:
            self.summary(line)
        elif b"val_bpb" in line or b"Val BPB" in line:
            text = line[:MAX_LINE].decode("utf-8", "replace")
            self.found.add(scores := scores_of(text[PREFIX.match(text).end() :]))
            return bool(scores)
        return False

    def line(self, text):
        """Whether a line that begins as those that are read do is one; it is taken in."""
        trace = self.found.trace
        if match := PEAK.search(text):
            values = zip(("peak_memory_mib", "peak_reserved_mib"), match.groups(), strict=True)
            trace.end |= {key: int(value) for key, value in values if value}
        elif match := RESUMED.match(text):
            trace.rewind(int(match[1]))
            self.found.time = -1.0
        elif row := parse_step_line(text):
            if any(isinstance(row.get(key), str) for key in LOSSES):
                self.found.bad += 1
            elif row := self.found.own(row if len(row) <= MAX_KEYS else shortened(row)):
                self.row(row)
        elif text.startswith("---"):
            self.found.block = {}
        elif pair := closing_of(text):
            self.found.close(*pair)
        elif found := next(((form, row) for form in FORMATS if (row := form.record(text))), None):
            self.foreign(*found)
        else:
            return False
        if text.startswith("stopping_early"):
            trace.end["status"] = "stopped at its limit of time"
        return True

    def foreign(self, form, row):
        """A record of a sister project: all lines of a step are one record."""
        found, last = self.found, self.found.trace.rows[-1:]
        found.forms[form.name] += 1
        if form.sums and "dt_ms" in row and "train_time_ms" not in row:
            row |= found.summed(row)
        if last and last[0]["step"] == row["step"]:
            found.trace.merge(row)
        else:
            same = last and row["iterations"] is None and row["step"] > last[0]["step"]
            self.row({**row, "iterations": last[0]["iterations"]} if same else row)

    def summary(self, line):
        """A line of a closing block, or behind it."""
        if (match := SUMMARY.match(line[:MAX_LINE].decode("utf-8", "replace"))) and len(self.found.block) < MAX_KEYS:
            self.found.block[match[1]] = limited(float(match[2].replace(",", "")))
        elif line.strip():
            self.end_block()

    def end_block(self):
        """Take what a closing block tells; a block of another task is kept to be named."""
        found = self.found
        row, end = summary_of(found.block)
        if row and (found.trace.rows or "step" in row):
            step = found.trace.rows[-1]["step"] if found.trace.rows else 0
            found.forms["autoresearch"] += "step" in row
            row = {"step": step, "iterations": None} | row
            found.add(row) if row["step"] == step and found.trace.rows else self.row(row)
            found.trace.end |= {**end, "status": "done"}
        found.other_task, found.block = found.other_task or (None if row else found.block), None

    def row(self, row):
        """A record; without keep_rows one that holds no loss is replaced by the next."""
        found, trace, time = self.found, self.found.trace, row.get("train_time_ms", -1.0)
        if trace.rows and row == trace.rows[-1]:  # of another rank
            return
        if isinstance(time, float):
            trace.resets += 0 <= time < found.time / 2 and bool(trace.rows) and row["step"] > trace.rows[-1]["step"]
            found.time = time
        if not self.keep_rows and trace.rows and trace.rows[-1].keys().isdisjoint(self.kept):
            if row["step"] >= trace.rows[-1]["step"]:
                trace.rows.pop()
        found.count += 1
        if trace.end:
            trace.end = {}  # of the run before
        trace.add(row, trials=True)

    def close(self, start=b"", name=""):
        """The Trace of all that was fed; `start` are the first bytes of the file `name`."""
        if self.logs and not self.lost and len(self.sections) == 2 and not self.sections[1].strip():
            trace = self.logs.pop()  # a separator after the last line
        else:
            if len(self.sections) > 2 and not self.sections[-1].strip() and self.before.trace.rows:
                self.found, self.sections = self.before, self.sections[:-1]
            trace = self.log()
        if self.logs:
            trace = joined([*self.logs, trace], self.lost)
        for note in reversed(self.notes):
            trace.notes.insert(0, note)
        if not trace.trials and not trace.end:
            first = next((section for section in self.sections if section.strip()), b"")
            other = start.startswith((b"\x1f\x8b", b"\xff\xfe", b"\xfe\xff")) and first
            trace.reason = reason_of(bytes(first[:65536]) if other else start, self.found.other_task, name)
        return trace

    def log(self):
        """The Trace of the log that ends here."""
        found, sections = self.found, [bytes(section) for section in self.sections]
        trace = found.trace
        self.end_block() if found.block is not None else None
        first_bar = len(sections) > 1 and not sections[0].strip()
        sections = sections[1:] if first_bar else sections
        if found.bad:
            trace.note(f"{found.bad} step line(s) of log.txt left out: their loss is not a number")
        machine = [*(section[:16384] for section in sections[1:-1]), STEP_LINE.split(sections[-1][: 1 << 18], 1)[0]]
        machine = b"\n".join(machine)  # without the source
        trace.header = parse_header(machine.decode("utf-8", "replace"))
        found.finish()
        if len(sections) > 1:
            split_source(trace, sections[0])
        trace.era = era_of(found, sections, first_bar)
        return trace


def joined(logs, lost=False):
    """One Trace of the whole logs in a file: the last one that has a step, with the trials of all. Where their sources
    or machines are not the same, `mixed` says so: they are runs of several kinds."""
    trace = next((log for log in reversed(logs) if log.trials), logs[-1])
    trials = [(rows, log.end_of(i)) for log in logs for i, rows in enumerate(log.trials)]
    trace.earlier, trace.rows = [rows for rows, _ in trials[:-1]], trials[-1][0] if trials else []
    trace.ends = [end for _, end in trials[:-1]]
    trace.resets = sum(log.resets for log in logs)
    kinds = {"sources": [log.code_hash for log in logs], "machines": [machine_of(log) for log in logs],
             "settings": [own_settings(log) for log in logs]}
    differ = [name for name, values in kinds.items() if any(value != values[0] for value in values)]
    if differ or lost:
        what = f"with different {' and '.join(differ)}" if differ else "or more"
        trace.mixed = f"holds {len(logs)} logs {what}: split it"
    for key in ("date", "seed"):  # of one log are not those of all
        if any(log.header.get(key) != trace.header.get(key) for log in logs):
            trace.header.pop(key, None)
    for note in (note for log in logs for note in log.notes):
        trace.note(note)
    trace.note(trace.mixed or f"holds {len(logs)} whole logs of one source and machine: each is a trial")
    if empty := sum(not log.trials for log in logs):
        trace.note(f"{empty} of the {len(logs)} logs in the file have no step")
    return trace


def machine_of(log):
    """What a log says of the machine that decides which runs may be pooled."""
    return [log.header.get(key) for key in ("device", "gpus", "gpu_count", "world_size")]


def own_settings(log):
    """The settings that a log of ours tells, but for SELF."""
    found = parse_object(log.header.get("settings", ""))
    return {key: value for key, value in found.items() if key not in SELF}


@dataclass
class Found:
    """The Trace of a section while it is read, and what is known of its lines so far."""

    trace: Trace
    bad: int = 0  # step lines whose loss is no number
    time: float = -1.0  # of the last record
    count: int = 0  # records
    forms: Counter = field(default_factory=Counter)  # of them those of sister projects
    rank: int | None = None
    sum: tuple = (-1, 0.0)  # step and time so far where a format tells the time of each step only
    block: dict | None = None  # of autoresearch, while it is read
    other_task: dict | None = None

    def counts(self, rank):
        """Whether a line of this rank counts: those of the lowest rank that speaks, and of none."""
        if rank is None or (rank := int(rank)) == self.rank:
            return True
        if self.rank is not None and rank < self.rank:
            self.trace.rows = []  # it tells them itself
        lower = self.rank is None or rank < self.rank
        self.rank = rank if lower else self.rank
        return lower

    def own(self, row):
        """`row` if it is a record of its own. Else the record of its step gets its keys: one without /M after /M was
        seen, and one of the same step without a validation and its time."""
        last = self.trace.rows[-1] if self.trace.rows else None
        if last is None:
            return row
        if row["iterations"] is None and last["iterations"] is not None:
            later = last["step"] < row["step"] and last["step"] < last["iterations"]
            row["iterations"] = last["iterations"]
            if later and not row.keys().isdisjoint((*LOSSES, "train_time_ms")):
                return row
        elif row["step"] != last["step"] or (row.keys() >= {"val_loss", "train_time_ms"} and row != last):
            return row
        self.trace.merge(row)
        return None

    def summed(self, row):
        """The time so far, of steps that tell their own but for 10, which compile. {} where one is missing."""
        step, time = self.sum
        if row["step"] not in (step, step + 1) and row["step"] > 1:
            self.sum = (-9, 0.0)
            return {}
        time = 0.0 if row["step"] <= 1 else time
        self.sum = (row["step"], time + (row["dt_ms"] if row["step"] > 10 and row["step"] != step else 0.0))
        return {"train_time_ms": self.sum[1]}

    def add(self, keys):
        """Give the last record keys that it lacks."""
        if self.trace.rows and keys:
            self.trace.merge({**keys, "step": self.trace.rows[-1]["step"]})

    def close(self, key, value):
        """A line that closes a run of a sister project."""
        if key in ("total_training_time_ms", "peak_memory"):
            time = key == "total_training_time_ms"
            self.trace.end |= {"train_time_ms": value, "status": "done"} if time else {"peak_memory_mib": value}
        elif self.trace.rows:
            self.add({key: value})
        else:
            self.trace.end[key] = value

    def finish(self):
        """What is known of the end."""
        trace = self.trace
        last = trace.rows[-1] if trace.rows else {"step": 0, "iterations": None}
        if self.forms["nanoGPT"] and trace.rows:
            planned = trace.header.get("max_iters")
            for row in trace.rows:
                row["iterations"] = row["iterations"] or planned
            trace.end = trace.end or {"status": "no end is logged"}
            if planned is None:
                trace.note("nanoGPT logs no end, and no max_iters stands here: whether it is complete is not known")
        done = not last.keys().isdisjoint(SCORES) and last["step"] == last["iterations"]
        if "train_time_ms" in trace.end and trace.rows:
            last["train_time_ms"] = trace.end["train_time_ms"]
        if done or (trace.end and "status" not in trace.end):
            trace.end["status"] = "done" if done else f"stopped at step {last['step']}"


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
        while name in trace.parts:
            name += "~"  # which no name that is split has
        trace.parts[name] = text.decode("utf-8", "replace").strip("\n") + "\n"


def parse_header(text):
    """What is said of the machine: FACTS, device, gpus, gpu_count and date (ISO), each only where it is named."""
    text = LONG.sub(r"\1", text)
    found = {key: match[1].strip() for key, form in FACTS.items() if (match := form.search(text))}
    names = one_machine(GPU.findall(text) or GPU_LIST.findall(text))
    names = names or [found["gpu"]] * int(found.get("world_size", 1)) if "gpu" in found else names
    for key in ("world_size", "train_tokens", "params_total", "seed", "max_iters"):
        found |= {key: int(digits)} if (digits := found.get(key, "").replace(",", "")) else {}
    if names:
        found |= {"gpus": names[0], "gpu_count": len(names), "device": times(names[0], len(names))}
    elif "cpu" in found:
        found["device"] = found["cpu"]
    if (match := DATE.search(text)) and match[1] in MONTHS:
        found["date"] = f"{match[4]}-{MONTHS.index(match[1]) + 1:02}-{int(match[2]):02} {match[3]}"
    return {key: value for key, value in found.items() if key not in ("gpu", "cpu")}


def one_machine(gpus):
    """Names of (index, name) of GPUs up to the first index that comes again: a second table, or a second machine."""
    found = {}
    for index, name in gpus:
        if index in found:
            break
        found[index] = name
    return list(found.values())


GOLF = re.compile(rb"^(?:[\d.]{1,30} )?(?:val_bpb:enabled|train_batch_tokens:|stopping_early: |Serialized model)", re.M)


def era_of(found, sections, first_bar):
    """Which project or form of the public format a log has, as docs of the formats call them."""
    trace, tail = found.trace, sections[-1][:65536]
    last = trace.trials[-1][-1] if trace.trials else {}
    if last and 2 * found.forms.total() >= found.count:
        return " + ".join(name for name, _ in found.forms.most_common(3))
    if any("val_bpb" in row for row in trace.rows) and GOLF.search(tail):
        return "parameter-golf"
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


def blocks_of(file, notes=None):
    """Bytes of a binary file as blocks that end with a line end; a longer line than BLOCK is cut. A last line without
    line end comes without what may be cut. gzip data is unpacked; what is wrong with it goes to `notes`."""
    rest, head, read = b"", file.read(BLOCK), lambda: file.read(BLOCK)
    if head.startswith(b"\x1f\x8b"):
        file.seek(0)
        pieces = unpacked(file, [] if notes is None else notes)
        head, read = next(pieces, b""), lambda: next(pieces, b"")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):  # UTF-16, as PowerShell's > writes
        decoder, more = codecs.getincrementaldecoder("utf-16")("replace"), read
        head, read = recoded(decoder, head), lambda: recoded(decoder, more())
    head = head.removeprefix(b"\xef\xbb\xbf")
    while head:
        data = rest + head
        cut = data.rfind(b"\n") + 1
        if not cut and len(data) > BLOCK:
            cut = data.rfind(b"\r") + 1 or len(data)
        if cut:
            yield data[:cut]
        rest, head = data[cut:], read()
    if rest:
        yield whole_part(rest.rstrip(b"\r")) + b"\n"


def recoded(decoder, data):
    """Bytes of another encoding as UTF-8."""
    return decoder.decode(data, not data).encode("utf-8", "replace")


def unpacked(file, notes):
    """Pieces of what gzip data holds, none longer than BLOCK, up to MAX_UNPACKED bytes in all."""
    left, member, whole = MAX_UNPACKED, zlib.decompressobj(31), False
    try:
        while packed := file.read(1 << 14):
            while packed and left:
                if piece := member.decompress(packed, min(BLOCK, left)):
                    yield piece
                left, whole = left - len(piece), member.eof
                packed = member.unused_data if whole else member.unconsumed_tail
                member = zlib.decompressobj(31) if whole else member
            if not left:
                notes.append(f"more than {MAX_UNPACKED >> 20} MiB of gzip data: the rest was left out")
                return
    except zlib.error:
        whole = False
    if not whole:
        notes.append("the gzip data is damaged or cut: what stands before that was read")


def parse_log(text, keep_rows=True, loss_key=None, name=""):
    """Trace of a log.txt, given as text or as an open binary file."""
    parser = LogParser(keep_rows, loss_key)
    file = io.BytesIO(text.encode("utf-8", "replace")) if isinstance(text, str) else text
    start = file.read(65536)
    file.seek(0)
    for block in blocks_of(file, parser.notes):
        parser.feed(block)
    return parser.close(start, name)


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
    """Trace of a metrics.jsonl, given as text or lines. Only a last closing record ends it: others went on."""
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


def times(name, count):
    return f"{count}x {name}" if count > 1 else name
