"""Lines of logs, as a table: the step lines of sister projects, what stands before a line, what ends a run. A line is
text -> a record {"step", "iterations", keys of the line}; losses in nats/token, val_bpb in bits/byte, times in ms."""

import json
import math
import re
from dataclasses import dataclass

HUGE, TINY = 1e30, 1e-100  # a number beyond is infinite or 0: none of a training run is
NUM = r"`?([+-]?(?:\d{1,3}(?:,\d{3})++|\d++(?:\.\d*+)?|\.\d++)(?:e[+-]?\d++)?|[+-]?(?:nan|inf))`?"
UNITS = {"ms": 1, "s": 1000, "m": 60_000}
NAMES = {  # what a line calls it (small letters): the key of a record; other words keep theirs
    "loss": "train_loss", "train loss": "eval_train_loss",
    "val loss": "val_loss", "val bpb": "val_bpb",
    "validation bpb": "val_bpb", "total time": "train_time", "time": "dt", "minimum validation bpb": "min_val_bpb",
}


def limited(value):
    """A float without what overflows or vanishes as soon as one computes with it; all else as it is."""
    if not isinstance(value, float) or TINY < abs(value) < HUGE:
        return value
    if value != value:
        return value
    return math.copysign(math.inf if abs(value) >= HUGE else 0.0, value)


def pair_of(name, value, unit):
    """(key, number) of a name, digits and a unit in a line: `dt`, `9.5`, `s` are ("dt_ms", 9500.0)."""
    key = NAMES.get(name.lower(), re.sub(r"\W+", "_", name.lower().replace("/", "_per_")))
    factor = UNITS.get(unit)
    return (f"{key}_ms" if factor else key), limited(float(value.replace(",", "")) * (factor or 1))


@dataclass(frozen=True)
class Format:
    """Step lines of a project: their start, what must be in them, and the form of the pairs behind the start."""

    name: str
    example: str
    head: str  # with groups step and iterations
    pair: str  # with the groups name, number, unit
    mark: str = ""
    sums: bool = False  # each step tells its dt, and no line the whole time: they add up after the first 10 steps

    def record(self, text):
        """The record of a line, None if it has another form."""
        head = re.match(self.head, text, re.ASCII)
        if not head or not re.search(self.mark, text):
            return None
        found = {"step": int(head["step"]), "iterations": int(head["iterations"]) if head["iterations"] else None}
        for name, value, unit in re.findall(self.pair, text[head.end() :], re.ASCII | re.I):
            key, value = pair_of(name, value, unit)
            found.setdefault(key, value)
        return found


BARRED = {"head": r"[Ss]tep +(?P<step>\d{1,15})(?:/(?P<iterations>\d{1,15}))?(?: \([\d.]{1,20}%\))? (?=\|)",
          "pair": rf"\| ([a-z][\w /]{{0,40}}?):? {{1,9}}{NUM}(ms|s|m)?%?(?=[ |]|$)"}
FORMATS = (
    Format("nanochat", "step 00012/05000 (0.24%) | loss: 5.1 | dt: 629.00ms | total time: 0.02m", **BARRED,
           mark=r"\| (?:Validation bpb|CORE metric|ChatCORE|total time):"),
    Format("autoresearch", "step 00604 (99.5%) | loss: 2.99 | dt: 503ms | remaining: 1s", **BARRED,
           mark=r"\| remaining:", sums=True),
    Format("nanoGPT", "Step   50 | Train Loss: 4.28 | Val Loss: 4.28", **BARRED, mark=r"\| Train Loss:"),  # forks
    Format("slowrun", "Step 00191 | Epoch 1 | Val BPB: 1.43 | Val Loss: 4.42", **BARRED, sums=True),
    Format("nanoGPT", "iter 10: loss 9.71, time 2972.45ms, mfu 22.65%",
           r"(?P<bracket>\[)?(?:iter|step) +(?P<step>\d{1,15})(?(bracket)\]|:)(?P<iterations>(?!))?(?=.* loss)",
           rf"[ ,] ?([a-z][a-z ]{{0,20}}?):? {NUM}(ms|s)?%?(?=[ ,]|$)"),
    Format("parameter-golf", "4000/20000 val_loss: 2.87 val_bpb: 1.11",
           r"(?P<step>\d{1,15})/(?P<iterations>\d{1,15})(?= (?:train|val)_loss:)",
           rf" ([a-z][\w/]{{0,40}}): ?{NUM}(ms|s|m)?(?= |$)"),
    Format("parameter-golf", "stopping_early: wallclock_cap train_time: 599623ms step: 4900/20000",
           r"(?=stopping_early: .{1,99}step: ?(?P<step>\d{1,15})/(?P<iterations>\d{1,15}))",
           rf" (train_time): ?{NUM}(ms|s|m)?(?= |$)"),
)

# What stands before a line: ranks ([rank0]: or [default0]: or 0:), times, words of logging
CLOCK = r"\d\d:\d\d:\d\d(?:[.,]\d{1,9})?(?:Z|[+-]\d\d:?\d\d)?"
MONTHS = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
STAMP = (rf"\[?(?:(?:\d{{4}}[-/]\d\d[-/]\d\d[T ])?{CLOCK}|\d{{10}}(?:\.\d{{1,9}})?"
         rf"|(?:{'|'.join(MONTHS)}) {{1,2}}\d{{1,2}} {CLOCK})\]?")
LEVEL = r"\[?(?:DEBUG|INFO|WARNING)\]?"
RANK = r"\[?(?:rank|default)?[ =]?(?P<rank>\d{1,5})(?:\]:?|:) {0,4}"
LOGGER = r"(?:(?!step:|s:)[a-z_][\w.]{0,40}(?: - |:(?= {0,2}\S)))?"
BEFORE = rf"(?:(?:{STAMP}|{LEVEL})[ :|,-]{{1,4}}{LOGGER}|{RANK}){{0,4}}"
STARTS = (r"step:\d|s:\d|peak memory|resumed after|Step +\d|\[?(?:step|iter) +\d"
          r"|\d{1,15}/\d{1,15} (?:train|val)_loss:|stopping_early: |---[ ]*$"
          r"|Total training time: |Peak memory|Min(?:imum)? val|Final train loss: ")
FIRST = frozenset(b"0123456789[-sSiIrRdDpPtTmMfFwWjJaAoOnN")  # with which a line may begin that is read
LINE = re.compile(rf"(?P<before>{BEFORE})(?={STARTS})".encode(), re.ASCII | re.I)
PREFIX = re.compile(BEFORE, re.ASCII | re.I)

# Lines behind the last step, and the closing block of autoresearch: what they tell of the whole run
CLOSING = re.compile(rf"(Total training time|Peak memory|Min val Loss|Min val BPB|Minimum validation bpb|"
                     rf"Final train loss)(?: usage)?: {NUM} ?(m|MiB)?`?$", re.ASCII | re.I)
SCORES = (  # of a trained model once more: quantized, averaged, with a sliding window
    re.compile(rf"(?P<label>[\w.:() +=/-]{{1,80}}?) val_loss[:=]{NUM}(?: \w{{1,20}})? val_bpb[:=]{NUM}", re.ASCII),
    re.compile(rf"(?P<label>[][\w ]{{1,40}}?) Val BPB: {NUM} \| (?:EMA )?Val Loss: {NUM}", re.ASCII))
SUMMARY = re.compile(rf"(\w{{1,60}}): {{1,40}}{NUM} *$", re.ASCII)  # a line of a closing block


def closing_of(text):
    """(key, number) of a line that closes a run, None if it has another form."""
    match = CLOSING.match(text.strip())
    return pair_of(*match.groups(default="")) if match else None


def scores_of(text):
    """{"LABEL.val_loss", "LABEL.val_bpb"} of a line that scores the trained model once more, {} of others."""
    for i, form in enumerate(SCORES):
        if match := form.match(text):
            label = re.sub(r"\W+", "_", match["label"]).strip("_")
            losses = [limited(float(digits.replace(",", ""))) for digits in match.groups()[1:]]
            return {f"{label}.val_loss": losses[i], f"{label}.val_bpb": losses[1 - i]} if label else {}
    return {}


def summary_of(block):
    """(record, facts of the end) of a closing block, (None, {}) if it is of another task."""
    if block.keys().isdisjoint(("val_bpb", "val_loss")):
        return None, {}
    found = dict(block)
    row = {"step": int(found.pop("num_steps"))} if 0 <= found.get("num_steps", -1) < 1e15 else {}
    facts = {"training_seconds": ("train_time_ms", 1000), "peak_vram_mb": ("peak_memory_mib", 1),
             "num_params_M": ("params_total", 1e6), "total_tokens_M": ("tokens", 1e6)}
    end = {key: found.pop(name) * factor for name, (key, factor) in facts.items() if name in found}
    end |= {key: int(end[key]) for key in ("params_total", "tokens") if 0 <= end.get(key, -1) < 1e18}
    return {**row, **found, **({"train_time_ms": end["train_time_ms"]} if "train_time_ms" in end else {})}, end


# -- what is no log

MAGIC = {b"\x89PNG": "a picture", b"\xff\xd8\xff": "a picture", b"%PDF": "a PDF file", b"PK\x03\x04": "a zip archive",
         b"\x7fELF": "a program", b"\x1f\x8b": "damaged gzip data", b"BZh": "bzip2 data", b"\xfd7zXZ": "xz data",
         b"\x28\xb5\x2f\xfd": "zstd data", b"SQLite format": "a database", b"GIF8": "a picture"}
KINDS = (  # (what a text looks like, what it is then), the first that fits counts
    (r"\A\s*\Z", "it is blank"),
    (r"(?s)\A\s*[\[{].*[\]}]\s*\Z", "a JSON file"),
    (r"\Aversion https://git-lfs", "a Git LFS pointer: the file itself was not fetched"),
    (r"(?i)\A\s*<(?:!doctype|html|\?xml|svg)", "a web page"),
    (r"(?m)^Traceback \(most recent call last\):$", "console output with an error, without a step line"),
    (r"(?m)^(?:W\d{4} |slurmstepd|srun:|sbatch:|=== Job )", "console output without a step line"),
    (r"(?m)^(?:\+-{40,}|\| NVIDIA-SMI|GPU \d+: .*UUID)", "a text about the machine, without a step line"),
    (r"(?m)\A(?:[^\n]*\n){0,3}#{1,3} \w.*\n(?s:.*)^(?:#{1,6} |```|\|--|\* |- )", "a README or other Markdown text"),
    (r"(?m)^(?:import|from) \w[\w.]*(?: import .*)?$", "source without a step line"),
    (r"(?m)\A[^\n\t]*\t[^\n]*\n[^\n\t]*\t", "a table, no log"),
    (r"(?m)^commit\t|^\w+=\S*$(?s:.*)^\w+=\S*$", "settings or facts of a run, without a step line"),
)


def reason_of(head, block, name=""):
    """Why a file is no log: a sentence from its first bytes (of `name`, if that tells) and its closing block."""
    if not head:
        return "it is empty"
    if kind := next((kind for magic, kind in MAGIC.items() if head.startswith(magic)), None):
        return kind
    if head.count(0) + head.count(b"\xff") > len(head) // 100 or b"\0\0\0\0" in head:
        return "binary data"
    text = head.decode("utf-8", "replace")
    if trials := trials_of(text):
        return trials
    if block:
        keys = ", ".join([*block][:6])
        return f"a closing block of another task, without val_bpb or val_loss: {keys}"
    if re.match(r"readme", name, re.I):
        return "a README"
    found = next((kind for form, kind in KINDS if re.search(form, text)), "it holds no step line")
    return found if found != "a JSON file" or is_json(text) else "it holds no step line"


def is_json(text):
    try:
        return len(text) > 60_000 or json.loads(text) is not None
    except (ValueError, RecursionError):
        return False


def trials_of(text):
    """What a results.tsv of autoresearch holds: trials of different code, no runs to be pooled; "" of another text."""
    lines = [line.split("\t") for line in text.split("\n") if line.strip()]
    head = [name.strip() for name in lines[0]] if lines else []
    if len(head) < 3 or head[0] != "commit" or "status" not in head:
        return ""
    kept = [line for line in lines[1:] if len(line) == len(head) and line[head.index("status")].strip() == "keep"]
    values = [(float(line[1]), line[0]) for line in kept if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", line[1].strip())]
    best = f", the lowest {head[1]} {min(values)[0]:g} ({min(values)[1][:20]})" if values and "val" in head[1] else ""
    return f"a list of trials of autoresearch: {len(lines) - 1}, {len(kept)} kept{best}"
