"""Read the logs of training runs, print one table line per run and draw their loss curves.

    python logger.py --experiment_name NAME             # table, mean +- sd, images/NAME/loss.png
    python logger.py --experiment_name NAME --json      # the same numbers as {"runs": [...]}, no plot

A run is a folder logs/<experiment_name>/<run_id>/ with up to three files:
    metrics.jsonl  one object a line: training steps, validations, {"event": "resume"}, a closing {"event": "end"}
    log.txt        the public modded-nanogpt record format, read where metrics.jsonl is missing or holds no step
    config.json    settings, git commit, data, hardware and torch version
Runs may be in progress, killed or damaged: what can be read is shown, what was left out is named in a note.

Parsing (text -> Trace -> Run -> summary) knows nothing of presenting (table, JSON, figure), and a command is a function
of the parsed arguments. Losses are in nats/token; times are in milliseconds wherever a name ends in _ms.
"""

import argparse
import json
import math
import os
import re
import statistics
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import east_asian_width

SEPARATOR = "=" * 100  # a line of exactly this; nvidia-smi's own rules are shorter and start with | or +
STEP = re.compile(r"step:(\d{1,15})(?:/(\d{1,15}))?", re.ASCII)
NUMBER = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|[+-]?(?:nan|inf))(ms|s)?", re.ASCII | re.IGNORECASE)
PEAK = re.compile(r"peak memory (?:allocated|consumption): (\d{1,15}) MiB", re.ASCII)
TORCH = re.compile(r"Running pytorch (?:version )?(\d\S*)", re.IGNORECASE)
GPU = re.compile(r"\|\s+\d+\s+(\S.*?)\s+(?:On|Off|N/A)\s+\|")  # a device row of nvidia-smi's table
CPU = re.compile(r"(?:Running on )?(?:CPU|Model name):\s*([^,]+)")
ANSI = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")
LOSSES = ("train_loss", "val_loss")
COMPLETED = ("done", "target")  # reached the last step, or stopped because the target loss was reached
BACKWARD = "step numbers go back without a resume line; the later records are used"

# ---------------------------------------------------------------------------------------------------------------------
# Parsing: text -> Trace


@dataclass
class Trace:
    """What a log file tells: step records in order, the closing record ({} if none), the machine, what was left out."""

    rows: list[dict] = field(default_factory=list)
    end: dict = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rewind(self, step):
        """Drop the records after `step`: the run was continued from there."""
        self.rows = [row for row in self.rows if row["step"] <= step]

    def add(self, row):
        """Append a step record. One whose step goes back (log.txt of a resumed run) replaces those it repeats."""
        if self.rows and row["step"] < self.rows[-1]["step"]:
            self.rewind(row["step"] - 1)
            self.notes += [BACKWARD] if BACKWARD not in self.notes else []
        self.rows.append(row)


def read_text(path):
    """Text of a file, line ends as \\n, bytes that are not UTF-8 as U+FFFD; "" where there is no such file."""
    return path.read_text(encoding="utf-8-sig", errors="replace") if path.is_file() else ""


def number(value):
    """`value` if it is a number (nan and inf included), else None: text, true, null, integers beyond 64 bits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if isinstance(value, float) or abs(value) < 2**63 else None


def parse_step_line(line):
    """`step:N/M key:value ...` as a dict, None if `line` has another form.

    N and M become `step` and `iterations` (None without /M), numbers become floats. A unit ms or s moves into the key:
    `train_time:1.5s` gives train_time_ms = 1500.0. Unknown keys stay, words without a colon are skipped.
    """
    tokens = ANSI.sub("", line).split()
    head = STEP.fullmatch(tokens[0]) if tokens else None
    if not head:
        return None
    row = {"step": int(head[1]), "iterations": int(head[2]) if head[2] else None}
    for key, colon, value in (token.partition(":") for token in tokens[1:]):
        if match := NUMBER.fullmatch(value):
            value, unit = float(match[1]), (match[2] or "").lower()
            key, value = (f"{key}_ms" if unit else key), (value * 1000 if unit == "s" else value)
        if key and colon:
            row.setdefault(key, value)
    return row


def log_lines(text):
    """Lines of a log.txt. A last line without line end may be cut inside a number (3.2 of 3.2807): its last word goes,
    unless a unit at its end shows that it is whole."""
    *lines, last = text.split("\n")
    return [*lines, last if re.search(r"\d(ms|s| MiB)$", last) else last.rpartition(" ")[0]]


def parse_log(text):
    """Trace of a log.txt: code, separator, machine, separator, steps. Step lines count after the last separator only,
    because the code may quote one. A validation at the last step or the peak memory line ends a run."""
    trace, lines = Trace(), log_lines(text)
    cuts = [i for i, line in enumerate(lines) if line == SEPARATOR]
    body = lines[cuts[-1] + 1 :] if cuts else lines
    rows = [row for row in map(parse_step_line, body) if row]
    good = [row for row in rows if not any(isinstance(row.get(key), str) for key in LOSSES)]
    for row in good:
        trace.add(row)
    if len(good) < len(rows):
        trace.notes.append(f"{len(rows) - len(good)} step line(s) of log.txt left out: their loss is not a number")
    peaks = [int(match[1]) for line in body if (match := PEAK.search(line))]
    last = trace.rows[-1] if trace.rows else {"step": 0}
    done = "val_loss" in last and last["step"] == last["iterations"]
    if done or peaks:
        trace.end = {"status": "done" if done else f"stopped at step {last['step']}"}
        trace.end |= {"peak_memory_mib": peaks[-1]} if peaks else {}
    trace.header = parse_header(lines[cuts[-2] + 1 : cuts[-1]] if len(cuts) > 1 else [])
    return trace


def parse_header(lines):
    """{"torch": version, "device": name} from the lines between the separators, each only if named there."""
    torch, gpus, cpus = ([m[1] for line in lines if (m := form.match(line[:300]))] for form in (TORCH, GPU, CPU))
    devices = [times(gpus[0], len(gpus))] if gpus else cpus
    return {key: found[0].strip() for key, found in (("torch", torch), ("device", devices)) if found}


def parse_object(text):
    """The JSON object in `text`, {} if it holds none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def parse_record(line):
    """A record of metrics.jsonl, None if damaged or without a step. A run killed inside a line and then resumed leaves
    `{"step":1{"event":"resume",...}`: the event is whole."""
    record = parse_object(line) or parse_object(line[line.rfind('{"event"') :])
    step = number(record.get("step"))
    return {**record, "step": int(step)} if step is not None and 0 <= step < 1e15 and step == int(step) else None


def parse_metrics(text):
    """Trace of a metrics.jsonl. Records after a closing one mean that the run went on: only a last one is its end."""
    trace, lines = Trace(), text.split("\n")
    records = [parse_record(line) for line in lines]
    for record in filter(None, records):
        event = record.get("event")
        trace.end = record if event == "end" else {}
        if event == "resume":
            trace.rewind(record["step"])
        elif event is None and any(number(record.get(key)) is not None for key in LOSSES):
            trace.add(record)
    # A cut last line is what a kill leaves and says nothing of the rest.
    bad = sum(record is None and line.strip() != "" for record, line in zip(records[:-1], lines, strict=False))
    trace.notes += [f"{bad} unreadable line(s) of metrics.jsonl left out"] if bad else []
    return trace


# ---------------------------------------------------------------------------------------------------------------------
# Runs: folder -> Run -> summary


@dataclass
class Run:
    """One run folder; `source` names the file that the trace is from, None if there is nothing in either."""

    path: Path
    source: str | None
    trace: Trace
    config: dict


def read_run(path):
    """Run of the folder `path`."""
    log, trace = parse_log(read_text(path / "log.txt")), parse_metrics(read_text(path / "metrics.jsonl"))
    source = "metrics.jsonl" if trace.rows or trace.end else "log.txt" if log.rows or log.end else None
    if source == "log.txt":
        log.notes = [*trace.notes, "read from log.txt: metrics.jsonl is missing or holds no step", *log.notes]
        trace = log
    trace.header = log.header
    config = parse_object(text := read_text(path / "config.json"))
    trace.notes += ["config.json is no JSON object and was left out"] if text and not config else []
    return Run(path, source, trace, config)


def folders(path):
    """Folders inside `path`, run_2 before run_10."""
    found = [entry for entry in path.iterdir() if entry.is_dir()] if path.is_dir() else []
    return sorted(found, key=lambda p: [(len(s), s) if s.isdecimal() else (0, s) for s in re.split(r"(\d+)", p.name)])


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
    files = ("metrics.jsonl", "log.txt", "config.json")
    runs = [read_run(p) for p in folders(path) if any((p / file).is_file() for file in files)]
    if not runs:
        raise FileNotFoundError(f"no run in '{path}': expected folders that hold one of {', '.join(files)}")
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


def summarize(run):
    """Numbers of a run as a flat dict, None where unknown. `val_loss` and `val_bpb` are of one validation, that of the
    closing record or else the last. `tokens_per_s` without a closing record is the average so far."""
    rows, end, settings = run.trace.rows, run.trace.end, run.config.get("settings")
    known = {key: value for key, value in end.items() if number(value) is not None}
    vals = [row for row in [*rows, known] if number(row.get("val_loss")) is not None]
    final = vals[-1] if vals else {}
    best = min((v for v in vals if math.isfinite(v["val_loss"])), key=lambda v: v["val_loss"], default={})
    step, time_ms, tokens = (known.get(key, latest(rows, key)) for key in ("step", "train_time_ms", "tokens"))
    planned = settings.get("iterations") if isinstance(settings, dict) else None
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
        "iterations": known.get("iterations", latest(rows, "iterations") or number(planned)),
        "val_loss": final.get("val_loss"),
        "val_bpb": number(final.get("val_bpb")),
        "best_val_loss": best.get("val_loss"),
        "best_val_step": best.get("step", step if best else None),
        "train_time_ms": time_ms,
        "step_avg_ms": latest(rows[-1:], "step_avg_ms") or (time_ms / step if time_ms and step else None),
        "tokens": tokens,
        "tokens_per_s": known.get("tokens_per_s", rate),
        **{key: known.get(key) for key in extra},
        "torch": run.config.get("torch") or run.trace.header.get("torch"),
        "device": device_of(run),
        "notes": run.trace.notes,
    }


def differing(runs):
    """Names of the settings in config.json that are not the same in all runs."""
    settings = [found for run in runs if isinstance(found := run.config.get("settings"), dict)]
    names = dict.fromkeys(name for found in settings for name in found if name != "run_id")
    return [name for name in names if len({json.dumps(found.get(name), sort_keys=True) for found in settings}) > 1]


# ---------------------------------------------------------------------------------------------------------------------
# Presenting: summaries -> text


def printable(text):
    """`text` with control, bidi and undecodable characters spelled out (\\x1b): a name cannot drive a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def show(value, form=""):
    return "-" if value is None else format(value, form)


COLUMNS = (  # heading, alignment, cell of a summary
    ("run", "<", lambda s: printable(s["run_id"])),
    ("status", "<", lambda s: printable(s["status"])),
    ("steps", ">", lambda s: f"{show(s['step'])}/{show(s['iterations'])}"),
    ("val loss", ">", lambda s: show(s["val_loss"], ".4f")),
    ("bits/byte", ">", lambda s: show(s["val_bpb"], ".4f")),
    ("best val", ">", lambda s: show(s["best_val_loss"], ".4f")),
    ("train s", ">", lambda s: show(s["train_time_ms"] and s["train_time_ms"] / 1000, ",.1f")),
    ("ms/step", ">", lambda s: show(s["step_avg_ms"], ",.2f")),
    ("tokens/s", ">", lambda s: show(s["tokens_per_s"], ",.0f")),
    ("peak MiB", ">", lambda s: show(s["peak_memory_mib"], ",.0f")),
    ("torch", "<", lambda s: printable(show(s["torch"]))),
    ("device", "<", lambda s: printable(show(s["device"]))),
)


def format_table(summaries):
    """Lines of the table: one per summary, columns as in COLUMNS, wide East Asian characters counted as two."""
    columns = [[heading, *map(cell, summaries)] for heading, _, cell in COLUMNS]
    for column, (_, align, _) in zip(columns, COLUMNS, strict=True):
        widths = [sum(1 + (east_asian_width(c) in "WF") for c in cell) for cell in column]
        pads = [" " * (max(widths) - width) for width in widths]
        column[:] = [cell + pad if align == "<" else pad + cell for cell, pad in zip(column, pads, strict=True)]
    return ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]


def format_mean(summaries):
    """Mean, sample sd (n - 1) and n of the completed runs' final val loss; "" with fewer than two."""
    losses = [s["val_loss"] for s in summaries if s["completed"] and s["val_loss"] is not None]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2:
        return ""
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    rest = len(summaries) - len(losses)
    return f"final val loss of completed runs: {mean:.4f} +- {sd:.4f} (mean +- sd, n={len(losses)}, {rest} left out)"


def format_report(name, runs):
    """The terminal report of an experiment."""
    summaries, names = [summarize(run) for run in runs], differing(runs)
    lines = [f"{printable(name)}: {len(runs)} run(s), losses in nats/token", *format_table(summaries)]
    lines += filter(None, [format_mean(summaries)])
    lines += [f"settings that differ between the runs: {printable(', '.join(names))}"] if names else []
    lines += [f"note on {printable(s['run_id'])}: {printable(note)}" for s in summaries for note in s["notes"]]
    return "\n".join(lines)


def format_json(runs):
    """{"runs": [summary, ...]} as strict JSON: nan and inf, which it cannot hold, become null (the status says nan)."""
    text = json.dumps({"runs": [summarize(run) for run in runs]})
    return json.dumps(json.loads(text, parse_constant=lambda constant: None), indent=2)


# ---------------------------------------------------------------------------------------------------------------------
# Presenting: runs -> figure. matplotlib is imported in loss_figure only; a bare Figure draws with Agg, without display.

X_AXES = (  # key of a row, label, its units from large to small
    ("step", "step", ((1, ""),)),
    ("tokens", "training tokens", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))),
    ("train_time_ms", "training time", ((3.6e6, "h"), (6e4, "min"), (1e3, "s"))),
)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3b9e", "#8c564b", "#4d4d4d", "#a3ad00")


def curve(run, loss, x):
    """[(x, loss)] of the rows that have both; a nan or infinite loss stays and leaves a gap in the line."""
    pairs = [(number(row.get(x)), number(row.get(loss))) for row in run.trace.rows]
    return [(a, b) for a, b in pairs if a is not None and b is not None and math.isfinite(a)]


def loss_limits(runs):
    """(low, high) of the loss axis, None without a loss.

    It starts where the runs are after a tenth of the longest, as the first fall from ln(vocab_size) would flatten the
    rest. Losses that rise again stretch it to at most twice that span or one nat: a diverged run leaves the panel.
    """
    curves = [[p for p in curve(run, loss, "step") if math.isfinite(p[1])] for run in runs for loss in LOSSES]
    curves = [points for points in curves if points]
    if not curves:
        return None
    start = max(points[-1][0] for points in curves) / 10
    cuts = [next((i for i, (x, _) in enumerate(points) if x >= start), len(points) - 1) for points in curves]
    fallen = max(min(y for _, y in points[: i + 1]) for points, i in zip(curves, cuts, strict=True))
    late = sorted(y for points, i in zip(curves, cuts, strict=True) for _, y in points[i:])
    low, top = min(late[0], fallen), late[int(0.995 * len(late))]  # a few spikes may leave the panel, too
    high = max(fallen, min(top, low + max(2 * (fallen - low), 1.0)))
    pad = 0.05 * (high - low) or 0.05
    return low - pad, high + pad


def label_of(text, most=36):
    """`text` for matplotlib: printable, cut in the middle, with $ as itself instead of the start of a formula."""
    text = printable(text)
    text = text if len(text) <= most else f"{text[: most // 2 - 1]}…{text[-most // 2 :]}"
    return text.replace("$", r"\$")


def unit_of(top, units):
    """The (size, name) that makes `top` read as 2 or more, else the smallest."""
    return next((unit for unit in units if top >= 2 * unit[0]), units[-1])


def draw_panel(ax, runs, colours, x, size):
    """Draw the losses of all runs against x / size: train faint, val on top with about 25 markers."""
    for run, colour in zip(runs, colours, strict=True):
        train, val = ([(a / size, b) for a, b in curve(run, loss, x)] for loss in LOSSES)
        look = {"marker": "o", "ms": 4.5, "mec": "white", "mew": 0.6, "markevery": max(1, len(val) // 25)}
        ax.plot(*zip(*train, strict=True), color=colour, lw=0.9, alpha=0.28, zorder=2) if train else None
        ax.plot(*zip(*val, strict=True), color=colour, lw=1.7, zorder=3, **look) if val else None
    if not ax.lines:
        ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color="0.5")
        ax.set_xticks([])


def loss_figure(runs, name):
    """matplotlib Figure: the losses against step, tokens and time, side by side, on one loss axis."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    rows = math.ceil((len(runs) + 2) / 4)
    figure = Figure(figsize=(14, 4.9 + 0.24 * rows), layout="constrained", dpi=120)
    axes = figure.subplots(1, 3, sharey=True)
    spread = [colormaps["turbo"](0.05 + 0.9 * i / len(runs)) for i in range(len(runs))]
    colours = PALETTE[: len(runs)] if len(runs) <= len(PALETTE) else spread
    for ax, (x, label, units) in zip(axes, X_AXES, strict=True):
        size, unit = unit_of(max((a for r in runs for loss in LOSSES for a, _ in curve(r, loss, x)), default=0), units)
        draw_panel(ax, runs, colours, x, size)
        ax.set_xlabel(f"{label} ({unit})" if unit else label)
        ax.set_xlim(left=0)
        ax.grid(color="0.92")
        ax.spines[["top", "right"]].set_visible(False)
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


def save_plot(runs, path, name):
    """Write the loss figure to `path`; RuntimeError if matplotlib is missing."""
    try:
        figure = loss_figure(runs, name)
    except ModuleNotFoundError as error:
        raise RuntimeError(f"no plot without {error.name}: pip install {error.name}, or pass --no-plot") from None
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a run name in a script the font lacks: a box
        figure.savefig(path)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def show_experiment(args):
    """Report all runs of an experiment, then draw them."""
    runs = load_experiment(args.log_dir, args.experiment_name)
    if args.json:
        print(format_json(runs))
        return
    print(format_report(args.experiment_name, runs))
    if args.no_plot:
        return
    if loss_limits(runs) is None:
        print("no plot: no loss logged yet")
        return
    path = Path(args.images_dir) / args.experiment_name / "loss.png"
    save_plot(runs, path, args.experiment_name)
    print(f"plot: {printable(path)}")


def build_parser():
    """Parser whose `command` is the function to call with its result; a subcommand is one more parser that sets it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.set_defaults(command=show_experiment)
    parser.add_argument("--experiment_name", "--experiment-name", required=True, help="folder inside the log folder")
    parser.add_argument("--log-dir", "--log_dir", default="logs", help="folder of all experiments (default: logs)")
    parser.add_argument("--images-dir", "--images_dir", default="images", help="folder for plots (default: images)")
    parser.add_argument("--json", action="store_true", help='print {"runs": [...]} instead of the table, draw nothing')
    parser.add_argument("--no-plot", "--no_plot", action="store_true", help="draw nothing (matplotlib is not needed)")
    return parser


def main(argv=None):
    """Run a command; return the exit status: 0, or 1 after one line of `error: ...`."""
    args = build_parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal's encoding lacks
    try:
        args.command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
