"""Runs on the terminal while they run: state, numbers and a loss curve of dots; logs are read again as they grow."""

import math
import os
import platform
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

from runlogs.curves import points_at
from runlogs.drawing import loss_limits
from runlogs.loading import Run, expand, files_being_written, latest, load_one, natural, step_times, summarize
from runlogs.output import printable, say
from runlogs.parsing import COMPLETED, LOSSES, RUN_FILES, number, read_text
from runlogs.reporting import cut, show

NEWEST = 60  # logs that are looked at
LEAST_PANEL = 48  # columns
PANEL_LINES = 7  # of a panel besides its curve
CURVE_LINES = (3, 12)  # fewest and most
PATIENCE = 120.0  # s without a record before a run may be stalled
GAPS = 10  # usual times between records, the same
START = 900.0  # s for imports, data and compilation before the first record
RECENT = 600.0  # s that a run stays on the screen after its end
LIVE = ("running", "starting", "stalled")
STYLES = {"running": "green", "starting": "cyan", "stalled": "yellow", "finished": "blue", "stopped": "magenta",
          "crashed": "red"}
HOLDER = re.compile(r"process (\d{1,9}) of (.*)")  # what the lock of a run says
MEMORY = ("memory_mib", "peak_memory_mib", "peak_allocated_mib", "peak_reserved_mib")

# --- state


def is_held(path):
    """Whether a process writes the log: True, False, or None where this machine cannot know."""
    names = ("lock", "metrics.jsonl", "log.txt") if path.is_dir() else ("",)
    if any(os.path.realpath(path / name) in files_being_written() for name in names):
        return True
    holder = HOLDER.match(read_text(path / "lock")) if path.is_dir() else None
    if not holder or holder[2].strip() != platform.node() or os.name == "nt":
        return None
    return is_process(int(holder[1]))


def is_process(pid):
    """Whether a process is there and may hold a run: one whose files can be seen does not, or it had been found."""
    try:
        os.kill(pid, 0)
        return not os.access(f"/proc/{pid}/fd", os.R_OK)
    except PermissionError:  # another user's
        return True
    except OSError:
        return False


def age_of(path, now):
    """Seconds since the log grew."""
    paths = [path / name for name in RUN_FILES] if path.is_dir() else [path]
    return max(0.0, now - max((p.stat().st_mtime for p in paths if p.exists()), default=now))


def patience_of(rows):
    """Seconds that a run may be silent: a validation or compilation takes longer than the usual gap."""
    if not rows:
        return START
    times = [row["train_time_ms"] for row in rows[-21:] if number(row.get("train_time_ms")) is not None]
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    return max(PATIENCE, GAPS * statistics.median(gaps) / 1000 if gaps else 0.0)


def state_of(run, held, age):
    """(state, why in a few words or ""). Where nobody knows whether a process is there, the age of the log decides."""
    rows, end = run.trace.rows, run.trace.end
    status, patience = str(end.get("status", "")), patience_of(rows)
    last = rows[-1] if rows else {}
    if any(number(last.get(key)) is not None and not math.isfinite(last[key]) for key in LOSSES) or status == "nan":
        return "crashed", "its loss is not finite"
    if status in COMPLETED or ended_whole(run, last):
        return "finished", ""
    if status == "error":
        return "crashed", " ".join(str(end.get("error", "it ended with an error")).split())
    if end:
        return "stopped", f"{status or 'ended'}: --resume goes on"
    silent = f"no record for {duration(age)}"
    if held is False or (held is None and age > GAPS * patience):
        return "crashed", "its process is gone" if held is False else silent
    if age > patience:
        return "stalled", silent
    return ("running" if rows else "starting"), ""


def ended_whole(run, last):
    """Whether a log without a closing record has its last validation: those of other projects."""
    return not run.path.is_dir() and "val_loss" in last and last.get("step") == last.get("iterations")


def duration(seconds):
    """3:07 or 1:03:07."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


# --- numbers


def numbers_of(run, now):
    """The numbers of a run's panel, None where unknown; `run` itself for its curve."""
    rows, told, age = run.trace.rows, summarize(run), age_of(run.path, now)
    state, why = state_of(run, is_held(run.path), age)
    step, steps = told["step"], told["iterations"]
    pace = [ms for _, ms in step_times(rows[-6:])]
    ms = statistics.median(pace) if pace else told["step_avg_ms"]
    left = ms * (steps - step) / 1000 if ms and steps and step is not None else None
    tokens = latest(rows[-10:], "tokens_per_s") or told["tokens_per_s"]
    known = [run.trace.end, *reversed(rows[-10:])]
    memory = next((row[key] for row in known for key in MEMORY if number(row.get(key))), None)
    return {"path": str(run.path), "state": state, "why": why, "age_s": age, "step": step, "iterations": steps,
            "train_loss": latest(rows, "train_loss"), "val_loss": latest(rows, "val_loss"),
            "val_step": next((row["step"] for row in reversed(rows) if "val_loss" in row), None),
            "tokens_per_s": tokens, "step_ms": ms, "eta_s": left if state in LIVE else None,
            "mfu": latest(rows[-10:], "mfu"), "memory_mib": memory, "run": run}


class Watch:
    """The logs that names lead to, read again when they have grown. FileNotFoundError if there is none."""

    def __init__(self, names):
        self.names, self.seen = names, {}
        expand(names)

    def look(self, now=None):
        """(numbers of the runs to show, the live ones first; how many others there are by state)."""
        now = time.time() if now is None else now
        files_being_written.cache_clear()
        try:
            paths = expand(self.names)
        except FileNotFoundError:  # removed meanwhile
            paths = []
        paths = sorted(paths, key=lambda path: age_of(path, now))[:NEWEST]
        found = [numbers_of(run, now) for path in paths if is_run(run := self.read(path))]
        live = sorted((n for n in found if n["state"] in LIVE), key=lambda n: natural(n["path"]))
        ended = [n for n in found if n["state"] not in LIVE]
        recent = [n for n in ended if n["age_s"] < RECENT] or ended[:not live]
        states = [n["state"] for n in ended[len(recent):]]  # in the order of their ages
        return live + recent, {state: states.count(state) for state in dict.fromkeys(states)}

    def read(self, path):
        """The Run of a log, as before if its files are."""
        files = [path / name for name in RUN_FILES] if path.is_dir() else [path]
        stats = [(f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for f in files]
        if self.seen.get(path, (None,))[0] != stats:
            self.seen[path] = stats, load_one(path, keep_source=False)
        return self.seen[path][1]


def is_run(run: Run):
    return bool(run.trace.rows or run.trace.end or run.path.is_dir())


# --- a frame

BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of the dots of a Braille character, by line, column
BRAILLE = 0x2800


def places(points, spans, columns, lines):
    """[(x, y) or None: not finite] of points, cut at the edges, in dots from the top left, 2 a column and 4 a line."""
    (x0, x1), (y0, y1) = spans
    wide, high = 2 * columns - 1, 4 * lines - 1
    found = []
    for x, y in points:
        row = (y1 - y) / (y1 - y0) * high
        inside = math.isfinite(row) and 0 <= x <= x1
        found.append((round((x - x0) / (x1 - x0) * wide), min(max(round(row), -1), high + 1)) if inside else None)
    return found


def line_between(a, b):
    """Dots of the line from a to b."""
    count = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    return [tuple(p + round((q - p) * i / count) for p, q in zip(a, b, strict=True)) for i in range(count + 1)]


def dots(found, lines):
    """{(line, column): bits of its Braille character} of the line through places."""
    cells = {}
    for a, b in zip(found, [*found[1:], None], strict=True):
        for x, y in line_between(a, b or a) if a else []:
            if 0 <= y < 4 * lines:
                cell = y // 4, x // 2
                cells[cell] = cells.get(cell, 0) | BITS[y % 4][x % 2]
    return cells


def curve(n, columns, lines, ascii_only):
    """Lines of rich Text: both losses over the steps of the whole run, an axis on the left and below."""
    from rich.text import Text

    limits = loss_limits([n["run"]])
    if limits is None:
        return [Text("no loss yet", style="dim"), *[Text("")] * lines]
    rows, columns = n["run"].trace.rows, columns - 8
    last = max(n["iterations"] or 0, rows[-1]["step"], 1)
    train, val = (places(zip(*points_at(rows, key, "step"), strict=True), ((0, last), limits), columns, lines)
                  for key in LOSSES)
    cells, marked = dots(train, lines), {(y // 4, x // 2) for x, y in filter(None, val) if 0 <= y < 4 * lines}
    found = [Text.assemble((f"{label_at(i, lines, limits):>7} ", "dim")) for i in range(lines)]
    for i, j in ((i, j) for i in range(lines) for j in range(columns)):
        dot = "." if ascii_only else chr(BRAILLE + cells.get((i, j), 0))
        mark = "o" if (i, j) in marked else dot if (i, j) in cells else " "
        found[i].append(mark, "bold yellow" if mark == "o" else "cyan")
    return [*found, Text(f"{0:>9}{last:>{columns - 1},}", style="dim")]


def label_at(i, lines, limits):
    """The loss at the top and at the bottom line."""
    return f"{limits[1]:.3f}" if i == 0 else f"{limits[0]:.3f}" if i == lines - 1 else ""


def sentences(n, most):
    """What stands below the curve: progress, losses, rate, as much as fits, and why a run does not go on."""
    step, steps = n["step"], n["iterations"]
    share = f" ({100 * step / steps:.0f} %)" if steps and step is not None else ""
    eta = "" if n["eta_s"] is None else f"  ETA {duration(n['eta_s'])}"
    at = "" if n["val_step"] is None else f" at {n['val_step']:,}"
    known = ((n["tokens_per_s"], ",.0f", " tokens/s"), (n["memory_mib"], ",.0f", " MiB"),
             (n["step_ms"], ",.1f", " ms/step"), (n["mfu"], ".1%", " MFU"))
    parts = [format(value, form) + unit for value, form, unit in known if value]
    while len("  ".join(parts)) > most and len(parts) > 1:
        parts.pop()
    return [f"step {show(step, ',')}/{show(steps, ',')}{share}{eta}",
            f"train {show(n['train_loss'], '.4f')}  val {show(n['val_loss'], '.4f')}{at}", "  ".join(parts), n["why"]]


def panel(n, width, lines, ascii_only):
    """A rich Panel of a run."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    inner, style = width - 4, STYLES[n["state"]]
    name = "/".join(Path(n["path"]).absolute().parts[-2:])
    texts = [Text(cut(printable(line), inner, inner - 1)) for line in sentences(n, inner)]
    texts[-1].stylize(style)
    title = Text(cut(printable(name), inner - 14), style="bold") + Text(f"  {n['state']}", style=style)
    body = Group(*curve(n, inner, lines, ascii_only), *texts)
    return Panel(body, title=title, title_align="left", border_style=style, width=width)


def frame(chosen, others, console, height=None):
    """A rich Group: panels side by side as they fit the console, and a line about all other runs."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    beside = max(1, min(len(chosen), console.width // LEAST_PANEL))
    fewest, most = CURVE_LINES
    rows = max(1, (height - 2) // (PANEL_LINES + fewest)) if height else len(chosen)
    chosen, hidden = chosen[:rows * beside], chosen[rows * beside:]
    rows = -(-len(chosen) // beside)
    lines = min(most, max(fewest, (height - 2) // max(1, rows) - PANEL_LINES)) if height else most - 2
    grid = Table.grid(padding=0)
    for i in range(0, len(chosen), beside):
        width, ascii_only = console.width // beside, console.options.ascii_only
        grid.add_row(*(panel(n, width, lines, ascii_only) for n in chosen[i:i + beside]))
    rest = {"for lack of room": len(hidden), **others}
    rest = ", ".join(f"{count} {state}" for state, count in rest.items() if count)
    words = [f"not shown: {rest}"] * bool(rest) + ["line: train loss, o: val loss"]
    return Group(grid, Text(cut("; ".join(words), console.width), style="dim"))


def make_console(file=None):
    from rich.console import Console

    return Console(file=file or sys.stdout, width=shutil.get_terminal_size().columns, highlight=False)


def print_frame(watch):
    """One frame, as for a pipe."""
    console = make_console()
    console.print(frame(*watch.look(), console))


def follow(watch, interval):
    """Frames on a screen of its own, one each `interval` seconds, until Ctrl-C; the last one stays."""
    from rich.live import Live

    console, chosen = make_console(), watch.look()
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                console.size = shutil.get_terminal_size()
                live.update(frame(*chosen, console, console.height), refresh=True)
                time.sleep(interval)
                chosen = watch.look()
    except KeyboardInterrupt:
        console.print(frame(*chosen, console))
        say(f"watched {', '.join(watch.names)}")
