"""Bytes of a log -> Trace: the public speedrun's logs of every year, ours, and those of sister projects. It knows
nothing of presenting. Losses are in nats/token; times are in ms wherever a name ends in _ms, in s with _s."""

import errno
import hashlib
import io
import json
import math
import os
import re
import stat
from array import array
from dataclasses import dataclass, field
from itertools import accumulate

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
    "stage_ends": r"\bstage (?:ends|boundaries)=\[([\d, ()]{1,400})\]",
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


def times(name, count):
    return f"{count}x {name}" if count > 1 else name
