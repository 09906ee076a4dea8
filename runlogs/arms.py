"""Which runs belong to a record: one place decides it for stats, compare, diff, verify and the board.

Arms, by the names of folders between the given one (of several names: the one that holds them all) and the log:
  baseline  a folder or log of that name (baseline, baseline_retime, 12-19-Baseline, xsa-baseline-s1385), or master-...
  side      dev_*, smoke*, provenance*, hparam*, sweep*, ablation*, probe*, extra*, debug*, profil*, prior*: an arm
            each, under its name, never pooled with another
  record    all others: in the folder itself, this_pr/, this_record/, logs/, runs/, pr299/, prefix-1375/
A name that the user gives is no reason: `stats FOLDER/baseline` is about these runs. Where a group has one arm only,
that is its record.

Cells: runs are pooled if they share the code version, the hardware, the number of processes and the final step.
A code version is the tokens of the source, without comments, docstrings, blank lines, and the values of seeds and
of run names; of our runs the settings too (but for SELF). It is a hash: the time is linear in the sources.
A log that does not say one of these (a console capture has neither source nor hardware) is not known to be of
the same: such logs are cells of their own and never join others; without a source they are of one cell only if their
folders have one name, digits aside. Logs that name no machine and differ in the time of a step by a factor of 1.5 are a
mixture too. Where only nvidia-smi tells how many processes there were, a run whose steps take 3 times as long is a cell
of its own. Several whole logs in one file are trials if source and machine are the same, else no samples. Nothing is
concluded from a mixture: one cell has to be chosen.

Copies: a run with the final step, loss and train time of another one is that run, unless a validation that both hold
differs. The log with source counts, of equals that of the record. This holds across files, trials and arms.
"""

import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from runlogs.loading import Run, expand, read_each, settings_of, status_of, trial_numbers, why_no_loss
from runlogs.parsing import SELF, number

BASELINE = re.compile(r"^baseline|(?:^|[^a-z])(?:baselines?|master)(?:$|[^a-z])", re.I)
SIDE = re.compile(r"^(?:smoke|provenance|hparam|hyperparam|ablation|profil)"
                  r"|^(?:dev|sweeps?|probes?|extras?|debug|prior)(?:$|[^a-z])", re.I)
MAX_CODE = 1_000_000  # characters of a source that is taken apart; beyond them only blanks and line ends are evened out
STRING = r"""[rbfuRBFU]{0,2}(?:"{3}(?:[^"\\]|\\.?|"(?!""))*(?:"{3}|\Z)|'{3}(?:[^'\\]|\\.?|'(?!''))*(?:'{3}|\Z)""" \
    r"""|"(?:[^"\\\n]|\\.?)*"?|'(?:[^'\\\n]|\\.?)*'?)"""  # always matches: no search starts twice at one place
REST = r"(?P<name>[^\W\d]\w*)|(?P<number>\.?\d[\w.]*)|(?P<line>\n[ \t]*)|(?P<blank>[ \t\r\f]+|\\\r?\n)|(?P<other>.)"
PYTHON = re.compile(rf"(?P<remark>#[^\n]*)|(?P<string>{STRING})|{REST}", re.S)
OTHERS = re.compile(rf"(?P<remark>//[^\n]*|/\*(?:[^*]|\*(?!/))*(?:\*/|\Z))|(?P<string>\"(?:[^\"\\\n]|\\.?)*\"?)|{REST}",
                    re.S)
OTHER_LANGUAGES = (".rs", ".cu", ".cuh", ".c", ".cc", ".cpp", ".h", ".hpp", ".js", ".ts", ".go", ".metal")
OWN_NAME = re.compile(r".*(?:seed|run_?id|run_?name)", re.I)
# Tokens that may stand between such a name and its value
BEFORE_VALUE = re.compile(r"(?!(?:if|else|and|or|in|for|while|elif)\b)[^\W\d]\w*|[:=(.\[|]")
BRANCHES = ("if", "elif", "while", "for")  # what follows their colon is no value of a name
FACTS = {"code": "code versions", "hardware": "kinds of hardware", "processes": "numbers of processes",
         "steps": "final steps", "pace": "paces", "place": "folders of logs without a source"}
SLOWER = 1.5  # a step that takes this much longer is of another machine
MUCH_SLOWER = 3  # of named machines: of another number of processes than GPUs that nvidia-smi lists
USUAL = "usual steps"
MAX_LINKS = 10  # that are named


@dataclass
class Sample:
    """One complete trial: what the statistics are made of. What its log does not say is None."""

    run: Run
    rows: list[dict]
    loss: float
    time_s: float | None
    steps: int
    stage_ms: dict[str, dict]  # as of loading.stage_times
    name: str = ""  # of the file, with its trial
    arm: str = "record"
    code: str | None = None
    hardware: str | None = None
    processes: int | None = None
    place: str | None = None  # of a run without a source: its folder, digits aside
    counted: bool = True  # the log says how many processes there were, not only how many GPUs

    @property
    def step_s(self):
        """Seconds of a step, None where they are not known."""
        return self.time_s / self.steps if self.steps and 0 < (self.time_s or 0) < math.inf else None

    @property
    def date(self):
        """When the run began, as far as its log or the name of its file says so."""
        return self.run.trace.header.get("date") or date_in(self.run.path.name)


@dataclass
class Cell:
    """Samples that may be pooled."""

    code: str | None
    hardware: str | None
    processes: int | None
    steps: int
    samples: list[Sample] = field(default_factory=list)
    label: str = "all"
    pace: str = USUAL
    place: str | None = None

    @property
    def uneven(self):
        """Why runs that do not name their machine cannot be of one; "" if they do, or take about as long a step."""
        times = [1000 * s.step_s for s in self.samples if s.step_s]
        if not times or self.hardware or max(times) < SLOWER * min(times):
            return ""
        return f"the runs do not name their machine, and a step takes {min(times):,.2f} to {max(times):,.2f} ms"

    def answers_to(self, name):
        """Whether `name` is the cell's label, its code, a folder of all its logs, or the beginning of a hash."""
        folders = {sample.run.path.parent.name for sample in self.samples}
        hashes = [self.code or "no source", *(sample.run.trace.code_hash or "" for sample in self.samples)]
        return name == self.label or {name} == folders or len(name) > 3 and any(h.startswith(name) for h in hashes)


@dataclass
class Arm:
    """Runs of one role. `mixture` says why they cannot be pooled, "" if they can."""

    name: str
    cells: list[Cell] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    mixture: str = ""

    @property
    def samples(self):
        return [sample for cell in self.cells for sample in cell.samples]

    def only(self, name):
        """The arm with the one cell that `name` means. ValueError if none or several do."""
        found = [cell for cell in self.cells if cell.label == name]
        found = found or [cell for cell in self.cells if cell.answers_to(name)]
        if len(found) != 1:
            known = "; ".join(cell.label for cell in self.cells[:12])
            raise ValueError(f"--cell '{name}' means {len(found)} cells of the {self.name}: it has {known}")
        return Arm(self.name, found, self.dropped, mixture_of(found))


@dataclass
class Evidence:
    """All runs under the given names, by arm: record first, then baseline."""

    folder: Path
    arms: list[Arm]
    notes: list[str] = field(default_factory=list)

    def arm(self, name):
        """The arm of that name; one without runs if there is none."""
        return next((arm for arm in self.arms if arm.name == name), Arm(name))

    def choose(self, name):
        """The same with one cell of the record, that `name` means. ValueError if none or several do."""
        chosen = self.arm("record").only(name)
        others = [cell.label for cell in self.arm("record").cells if cell is not chosen.cells[0]]
        note = f"of the record the cell {chosen.cells[0].label}; set aside: {'; '.join(others[:12])}"
        arms = [chosen if arm.name == "record" else arm for arm in self.arms]
        return Evidence(self.folder, arms, self.notes + [note] * bool(others))


def evidence_of(names, loss_key=None, keep_rows="stages", keep_source=False):
    """Evidence of files, folders, globs; `loss_key` for val_loss. FileNotFoundError if a name leads to no log."""
    paths = expand(names, links := [])
    base = base_of(names, paths)
    runs, codes = [], {}
    for run in read_each(paths, keep_rows, True, loss_key):
        code = version_of(run, codes)
        run.trace.parts = run.trace.parts if keep_source else dict.fromkeys(run.trace.parts, "")
        runs.append((arm_name(run.path, base), run, code))
    found = evidence_from(runs, base)
    found.notes += [f"{os.path.relpath(link, base)} is a link to a folder: not followed" for link in links[:MAX_LINKS]]
    return found


def evidence_from(runs, base):
    """Evidence of (name of the arm, run, code version) triples."""
    order = {"record": 0, "baseline": 1}
    names = sorted({name for name, *_ in runs}, key=lambda name: (order.get(name, 2), name))
    arms, notes, seen = {name: Arm(name) for name in names}, [], {}
    found = {name: [] for name in names}
    first = sorted(runs, key=lambda r: (r[2] is None, len(r[1].trace.trials) > 1, names.index(r[0])))
    for name, run, code in first:  # of copies the log with a source, then that of one run
        samples, dropped = trials_of(run, name, code, seen)
        found[name] += [sample if code else replace(sample, place=place_of(run.path, base)) for sample in samples]
        arms[name].dropped += [why for why, _ in dropped]
        notes += [f"{name}: {why}, which is of the {other}" for why, other in dropped if other not in (None, name)]
    for name, arm in arms.items():
        arm.cells = cells_of(found[name])
        arm.mixture = mixture_of(arm.cells)
    kept = [arm for arm in arms.values() if arm.cells or arm.dropped]
    if len(kept) == 1 and kept[0].name != "record":
        notes.append(f"all runs are of {kept[0].name}: taken as the record")
        kept[0].name = "record"
    return Evidence(base, kept, notes)


def base_of(names, paths):
    """The folder that arms are named from: the one given, or the one that holds all that are given."""
    if len(names) == 1 and os.path.isdir(names[0]):
        return Path(os.path.abspath(names[0]))
    parents = {os.path.dirname(os.path.abspath(path)) for path in paths}
    return Path(os.path.commonpath(parents))


def place_of(path, base):
    """The folder of a log below `base`, digits aside: run_1 and run_2 may be of one version, this_pr and old hardly."""
    return re.sub(r"\d+", "#", os.path.relpath(os.path.dirname(os.path.abspath(path)), base))


def arm_name(path, base):
    """Name of the arm that the log `path` below `base` belongs to."""
    path = Path(os.path.abspath(path))
    inside = path.relative_to(base).parts if path.is_relative_to(base) else path.parts[-1:]
    folders = inside[:-1]
    if any(map(BASELINE.search, [*folders, Path(inside[-1]).stem if inside else ""])):
        return "baseline"
    side = next((i for i, name in enumerate(folders) if SIDE.search(name)), None)
    return "record" if side is None else "/".join(folders[: side + 1])


# -- code versions


def version_of(run, known):
    """Hash of what a run's source, settings and `conditions_of` do; None without. `known`: of equal sources."""
    parts, raw = run.trace.parts, run.trace.code_hash
    if raw and raw not in known:
        known[raw] = code_of(parts) or raw
    settings = {key: value for key, value in settings_of(run).items() if key not in SELF}
    if not settings:
        return known.get(raw)
    text = json.dumps([settings, conditions_of(run)], sort_keys=True)
    source = known.get(raw) or "no source"
    return f"{source}+{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def conditions_of(run):
    """What else decides what one of our runs did: data, changes on resume, the commit where the source is not told."""
    data, git = (run.config.get(key) if isinstance(run.config.get(key), dict) else {} for key in ("data", "git"))
    commit = None if run.trace.code_hash else git.get("commit")
    return {"data": data.get("fingerprint"), "changes on resume": run.trace.changes, "commit": commit}


def code_of(parts):
    """Hash of the tokens of {file name: source}: the same for sources that do the same in the same words. None if there
    are none: a source of remarks alone is a stand-in for one that is not told."""
    found = {name: tokens_of(text, name) for name, text in parts.items()}
    if not any(found.values()):
        return None
    text = "\n".join(line for name, lines in found.items() for line in [name, *lines])
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def tokens_of(text, name=""):
    """Logical lines of a source, each its depth and tokens: without remarks, docstrings, values of seeds and names."""
    if len(text) > MAX_CODE:
        return [" ".join(line.split()) for line in text.split("\n") if line.strip()]
    foreign = name.endswith(OTHER_LANGUAGES)
    lines, line, kinds, depth, indent, own = [], [], set(), 0, 0, False
    for match in (OTHERS if foreign else PYTHON).finditer(text + "\n"):
        kind, token = match.lastgroup, match[0]
        if kind == "line" and depth <= 0:
            lines += [(indent, " ".join(line))] if kinds - {"string"} else []
            line, kinds, indent, own = [], set(), len(token.expandtabs()) - 1, False
        elif kind not in ("line", "blank", "remark"):
            depth += (token in "([{") - (token in ")]}")
            own = own if kind in ("string", "number") else is_own(token, own, line)
            line.append("_" if own and kind in ("string", "number") else token)
            kinds.add(kind)
    lines += [(indent, " ".join(line))] if kinds - {"string"} else []  # of an open bracket: the source was cut
    return [text for _, text in lines] if foreign else leveled(lines)


def is_own(token, own, line):
    """Whether a value that follows is that of a seed or of a run's name. `own`: it was before `token` of the line."""
    return bool(OWN_NAME.fullmatch(token)) or own and bool(BEFORE_VALUE.fullmatch(token)) and (
        token != ":" or line[0] not in BRANCHES)


def leveled(lines):
    """(indentation, text) -> texts after the depth of their block: two blanks or four are the same."""
    found, stack = [], []
    for indent, text in lines:
        while stack and stack[-1] > indent:
            stack.pop()
        if not stack or stack[-1] < indent:
            stack.append(indent)
        found.append(f"{len(stack)} {text}")
    return found


# -- samples


def machine_of(run):
    """(hardware, number of processes) of a run, None where its config.json and its log do not say so."""
    header, hardware = run.trace.header, run.config.get("hardware")
    name = hardware.get("name") if isinstance(hardware, dict) else hardware
    name = name if isinstance(name, str) else header.get("gpus") or header.get("device")
    count = count_of(run)
    return name, header.get("gpu_count") if count is None else count


def count_of(run):
    """The number of processes as a run itself tells it, None if it does not."""
    told = (run.config.get("world_size"), run.trace.header.get("world_size"))
    return next((n for n in told if isinstance(n, int)), None)


def trials_of(run, arm="record", code=None, seen=None):
    """(samples, [(what was left out and why, arm of its twin or None)]) of a run's complete trials with a finite loss.
    `seen` {key of a trial: samples} tells those that stood in other files."""
    found, dropped, count = [], [], len(run.trace.trials)
    seen, (hardware, processes) = {} if seen is None else seen, machine_of(run)
    if run.trace.mixed:
        return [], [(f"{run.path.name}: {run.trace.mixed}", None)]
    for i in range(count):
        name = f"{run.path.name}, trial {i + 1}" if count > 1 else run.path.name
        sample, why = sample_of(run, i)
        if why:
            dropped.append((f"{name}: {why}", None))
            continue
        sample = replace(sample, name=name, arm=arm, code=code, hardware=hardware, processes=processes,
                         counted=count_of(run) is not None)
        twins = seen.setdefault((sample.steps, sample.loss, sample.time_s), [])
        if twin := next((twin for twin in twins if agree(twin.rows, sample.rows)), None):
            dropped.append((f"{name}: the same run as {twin.name}", twin.arm))
            continue
        twins.append(sample)
        found.append(sample)
    if not count and status_of(run) != "not a log":
        dropped.append((f"{run.path.name}: no step", None))
    return found, dropped


def sample_of(run, i):
    """(Sample or None, reason) of trial i."""
    rows = run.trace.trials[i]
    numbers = trial_numbers(rows, run.trace.end_of(i))
    loss = numbers["final_val_loss"]
    if loss is None and numbers["status"] == "complete":
        return None, why_no_loss(rows)
    if loss is None or numbers["status"] != "complete":
        return None, f"{numbers['status']} at step {numbers['steps']}"
    if not math.isfinite(loss):
        return None, f"nan at step {numbers['steps']}"
    stages = run.trace.stage_ms[i] if run.trace.stage_ms else {}
    return Sample(run, rows, loss, numbers["train_time_s"], numbers["steps"], stages), None


def agree(rows, others):
    """Whether two records of runs agree wherever both hold a validation."""
    known, other = ({row["step"]: loss for row in found if (loss := number(row.get("val_loss"))) is not None
                     and math.isfinite(loss)} for found in (rows, others))
    return all(known[step] == other[step] for step in known.keys() & other.keys())


# -- cells


def cells_of(samples):
    """Cells of samples, the largest first. What a log does not say is not known to be the same."""
    cells = {}
    for sample in samples:
        facts = sample.code, sample.hardware, sample.processes, sample.steps
        cells.setdefault((*facts, sample.place), Cell(*facts, place=sample.place)).samples.append(sample)
    found = [part for cell in cells.values() for part in paces_of(cell)]
    found.sort(key=lambda cell: -len(cell.samples))
    for cell in found:
        cell.label = label_of(cell, found)
    return found


def paces_of(cell):
    """A cell as one or more: runs on a named machine that do not say how many processes they had are apart if a step
    takes them 3 times as long as the fastest, 9 times, ..."""
    fastest = min((sample.step_s for sample in cell.samples if sample.step_s), default=None)
    found = {}
    for sample in cell.samples:
        known = cell.hardware and not sample.counted and sample.step_s
        level = min(9, int(math.log(sample.step_s / fastest, MUCH_SLOWER) + 1e-9)) if known else 0
        pace = f"{MUCH_SLOWER**level}x slower steps" if level else USUAL
        found.setdefault(pace, replace(cell, samples=[], pace=pace)).samples.append(sample)
    return list(found.values())


def label_of(cell, cells):
    """Short words for what tells a cell from the others of its arm."""
    words = {"code": cell.code or "no source", "hardware": cell.hardware or "no hardware",
             "processes": f"{cell.processes or '?'} process{'es' * (cell.processes != 1)}",
             "steps": f"step {cell.steps}", "pace": cell.pace, "place": f"folder {cell.place}"}
    varied = [fact for fact in FACTS if len(values_of(fact, cells)) > 1 and (fact != "place" or cell.place)]
    return ", ".join(words[fact] for fact in varied) or "all"


def values_of(fact, cells):
    """Values of a fact in cells, in their order. Only runs without a source have a place."""
    values = dict.fromkeys(getattr(cell, fact) for cell in cells)
    return [value for value in values if value is not None or fact != "place"]


def mixture_of(cells):
    """Why the samples of cells cannot be pooled, a sentence; "" for one cell."""
    said = []
    if len(cells) == 1:
        return cells[0].uneven
    for fact, plural in FACTS.items():
        counts = dict.fromkeys(values_of(fact, cells), 0)
        for key, cell in ((getattr(cell, fact), cell) for cell in cells):
            counts |= {key: counts[key] + len(cell.samples)} if key in counts else {}
        listed = [f"{count} of {'unknown' if key is None else key}" for key, count in counts.items()]
        more = f" and {len(listed) - 5} more" if len(listed) > 5 else ""
        said += [f"{len(counts)} {plural}: {', '.join(listed[:5])}{more}"] if len(counts) > 1 else []
    return f"the runs are of {'; '.join(said)}" if said else ""


# -- the session


DATED = re.compile(r"(?<!\d)(20\d\d)-?(\d\d)-?(\d\d)[_T -](\d\d)[-:]?(\d\d)(?:[-:]?(\d\d))?(?!\d)", re.ASCII)


def date_in(name):
    """YYYY-MM-DD hh:mm:ss in the name of a file, None without one."""
    match = DATED.search(name)
    return match and "{}-{}-{} {}:{}:{}".format(*match.groups("00"))


def session_of(samples):
    """Samples in the order of their beginnings, None where a log does not tell its own."""
    dates = [sample.date for sample in samples]
    if None in dates:
        return None
    return [samples[i] for i in sorted(range(len(samples)), key=lambda i: (dates[i], i))]
