"""The leaderboard of a set of records: a Markdown table, and one HTML page that needs neither server nor network.

    python logger.py board FOLDER...          # reads the record folders and writes what this module returns

A record is a dict with these keys; a missing key is None, and any number may be None:
    name, date (YYYY-MM-DD), folder (the link, as seen from where the board is written), readme_title, gpus, torch,
    code_hash, source                         texts
    n, mean_val_loss, sd_val_loss             runs; nats/token
    mean_time_s, sd_time_s, steps, tokens     seconds of training; tokens is their number, not millions
    gain                                      {"time_s", "ci_low", "ci_high", "percent"}: by how much it is faster than
                                              the baseline that ran on the same machine
    curves                                    [{"label": text, "points": [[step, time_s, val_loss, train_loss], ...]}]
Records are numbered by date, those of one day from slow to fast; the last one is the current record.

All texts come from logs that anyone may have written. They are shown as text: control and direction characters as
escapes such as \\x1b, long ones cut. The page's Content-Security-Policy runs its own script only and loads nothing.
Its style and script are board.css and board.js beside this file.
"""

import base64
import hashlib
import json
import re
from datetime import date
from html import escape
from numbers import Integral, Real
from pathlib import Path
from statistics import fmean
from urllib.parse import quote

from runlogs.sources import line_diff

CURVE_POINTS = 400  # of one curve, after thinning
CURVES = 20  # single runs of a record that the page carries; their mean is over all
DIFF_LINES, LINE_LENGTH = 2_000, 400  # of one code comparison that are shown; characters of one of its lines
SOURCE_LINES = 20_000  # of a source that is compared
LENGTHS = {"name": 100, "date": 20, "readme_title": 160, "gpus": 80, "torch": 30, "code_hash": 64}  # characters
CHANGE = {"time_s": "time_s", "ci_low": "ci_high", "ci_high": "ci_low", "percent": "percent"}  # of a gain: its negative
NUMBERS = ("n", "mean_val_loss", "sd_val_loss", "mean_time_s", "sd_time_s", "steps", "tokens")
MISSING = "–"
# Not printable, or able to reorder the line they stand in (Trojan Source): controls but \t and \n, bidirectional
# marks, line separators, surrogates without their partner
UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")

# ---------------------------------------------------------------------------------------------------------------------
# Records: hostile dicts -> numbered dicts of printable text and finite numbers; curves -> what is drawn


def clean(text, length):
    """`text` in printable characters, at most `length` of them."""
    text = "" if text is None else str(text)
    shown = UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text[: length + 1])
    return shown if len(shown) <= length else shown[: length - 1] + "…"


def number(value):
    """`value` as an int or float; None if it is not a number, is not finite or is beyond what JavaScript counts to."""
    if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) < 1e15:
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def tidy(points):
    """One row [step, time_s, val_loss, train_loss] for each step that has a loss, by step; of two values the later."""
    rows = {}
    for point in points:
        if point[2] is not None or point[3] is not None:
            step, *values = map(number, point)
            old = rows.setdefault(step, [step, None, None, None])
            old[1:] = [a if b is None else b for a, b in zip(old[1:], values, strict=True)]
    return [rows[step] for step in sorted(rows.keys() - {None}) if rows[step][2:] != [None, None]]


def thin(points):
    """At most CURVE_POINTS of the rows of `tidy`: evenly spaced ones of either loss, its first, last and smallest."""
    if len(points) <= CURVE_POINTS:
        return points
    rows, kept = [([i for i, point in enumerate(points) if point[k] is not None], k) for k in (2, 3)], set()
    for (having, k), losses_left in zip(sorted(rows, key=lambda row: len(row[0])), (2, 1), strict=True):
        room = (CURVE_POINTS - len(kept)) // losses_left
        if len(having) > room:
            least = min(having, key=lambda i: points[i][k])
            having = [having[i * (len(having) - 1) // (room - 2)] for i in range(room - 1)] + [least]
        kept.update(having)
    return [points[i] for i in sorted(kept)]


def mean_curve(curves):
    """Rows of means over runs, each value at the steps where every run that has such values has one."""
    runs = [{point[0]: point for point in points} for points in curves]
    having = [[run for run in runs if any(point[k] is not None for point in run.values())] for k in (1, 2, 3)]
    rows = []
    for step in sorted(set().union(*runs)):
        columns = [[run[step][k] if step in run else None for run in having[k - 1]] for k in (1, 2, 3)]
        rows.append([step, *(fmean(values) if values and None not in values else None for values in columns)])
    return [row for row in rows if row[2:] != [None, None]]


def drawn(record):
    """What the page draws of a record: its mean curve and single runs, thinned, in seven significant digits."""

    def short(points):
        return [[step, *(None if v is None else float(f"{v:.7g}") for v in row)] for step, *row in thin(points)]

    curves = [(clean(curve.get("label"), 80), tidy(curve["points"])) for curve in record["curves"]]
    runs = [{"label": label, "points": short(points)} for label, points in curves[:CURVES]]
    mean = short(mean_curve([points for _, points in curves]))
    words = {key: record[key] for key in ("number", "name", "date")}
    time, loss = ([record[f"mean_{key}"], record[f"sd_{key}"]] for key in ("time_s", "val_loss"))
    numbers = {"day": days(record["date"]), "time": time, "loss": loss, "run_count": len(curves)}
    return words | numbers | {"mean": mean, "runs": runs}


def days(text):
    """Days from 1970 to a date YYYY-MM-DD; None if the text is none."""
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        return None
    try:
        return (date.fromisoformat(text) - date(1970, 1, 1)).days
    except ValueError:  # no such day
        return None


def change_of(gain):
    """The change of the time by a gain, with the gain's keys; None without one."""
    gain = {key: number(gain.get(old)) for key, old in CHANGE.items()} if isinstance(gain, dict) else {}
    change = {key: None if value is None else 0 - value for key, value in gain.items()}
    return change if change.get("time_s") is not None else None


def ranked(records):
    """The records in date order with their number, texts cleaned, numbers finite; sources and curves as they are."""
    out = []
    for record in records:
        entry = {key: clean(record.get(key), length) for key, length in LENGTHS.items()}
        entry |= {key: number(record.get(key)) for key in NUMBERS}
        entry["gain"] = change_of(record.get("gain"))
        entry |= {"source": record.get("source") or "", "curves": record.get("curves") or []}
        entry["record"] = record  # as it came
        out.append(entry | {"href": link(record.get("folder"))})
    out.sort(key=lambda entry: (entry["date"], -(entry["mean_time_s"] or 1e15), entry["name"]))
    return [{"number": i, **entry} for i, entry in enumerate(out, 1)]


def link(folder):
    """A URL of `folder` that can only be a path: no scheme (the colon is quoted), no other host (one leading /)."""
    return re.sub("^/+", "/", quote(str(folder or ""), safe="/", errors="replace"))


# ---------------------------------------------------------------------------------------------------------------------
# Table: numbered records -> cells, Markdown, HTML


def decimal(value, places):
    return MISSING if value is None else f"{value:,.{places}f}".replace("-", "−")


def plus_minus(mean, sd, places):
    return decimal(mean, places) + (f" ± {decimal(sd, places)}" if None not in (mean, sd) else "")


def change_text(change):
    """Such as "−33.98 s (−34.07 to −33.88), −46.0 %"."""
    if not change:
        return MISSING
    ends = [decimal(change[key], 2) for key in ("ci_low", "ci_high")]
    text = f"{decimal(change['time_s'], 2)} s" + ("" if MISSING in ends else f" ({' to '.join(ends)})")
    return text + ("" if change["percent"] is None else f", {decimal(change['percent'], 1)} %")


COLUMNS = (  # heading, unit, what it sorts by (a number is aligned right), text of a record
    ("#", "", "number", lambda r: str(r["number"])),
    ("Record", "", "name", lambda r: r["name"] or MISSING),
    ("Date", "", "date", lambda r: r["date"] or MISSING),
    ("Validation loss", "nats/token, mean ± sd", "mean_val_loss",
     lambda r: plus_minus(r["mean_val_loss"], r["sd_val_loss"], 4)),
    ("Time", "s, mean ± sd", "mean_time_s", lambda r: plus_minus(r["mean_time_s"], r["sd_time_s"], 2)),
    ("Gain on the same machine", "change of time, 95 % interval", "gain", lambda r: change_text(r["gain"])),
    ("Steps", "", "steps", lambda r: decimal(r["steps"], 0)),
    ("Tokens", "millions", "tokens", lambda r: decimal(r["tokens"] and r["tokens"] / 1e6, 2)),
    ("n", "runs", "n", lambda r: decimal(r["n"], 0)),
    ("GPUs", "", "gpus", lambda r: r["gpus"] or MISSING),
    ("torch", "", "torch", lambda r: r["torch"] or MISSING),
    ("Code", "hash", "code_hash", lambda r: r["code_hash"][:8] or MISSING),
)  # fmt: skip
NUMERIC = ("number", "gain", *NUMBERS)


def markdown_text(text):
    """`text` for a table cell: no line ends, nothing that Markdown or HTML would read as markup."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", escape(" ".join(text.split()), quote=False))


def board_markdown(records: list[dict]) -> str:
    """The records, newest first, as a Markdown table; the names link to the folders, the current record is bold."""
    entries = ranked(records)
    if not entries:
        return "No records yet.\n"
    heads = [f"{title} ({unit})" if unit else title for title, unit, *_ in COLUMNS]
    lines = [heads, ["---:" if key in NUMERIC else "---" for _, _, key, _ in COLUMNS]]
    for entry in reversed(entries):
        cells = {key: markdown_text(show(entry)) for _, _, key, show in COLUMNS}
        cells["name"] = f"[{cells['name']}]({entry['href']})" if entry["href"] else cells["name"]
        cells["name"] += f"<br>{markdown_text(entry['readme_title'])}" if entry["readme_title"] else ""
        if entry is entries[-1]:
            cells |= {key: f"**{cells[key]}**" for key in ("number", "mean_val_loss", "mean_time_s")}
        lines.append(cells.values())
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def kind_of(key):
    """Class of a numeric column."""
    return "number wrap" if key == "gain" else "number"


def table_row(entry, current):
    """A <tr>; data-v holds a number to sort by, empty where it is missing."""
    cells = []
    for _, _, key, show in COLUMNS:
        text = escape(show(entry))
        if key == "name":
            text = f'<a href="{entry["href"]}">{text}</a>' if entry["href"] else text
            text += ' <em class="badge">current record</em>' if current else ""
            text += f"<small>{escape(entry['readme_title'])}</small>" if entry["readme_title"] else ""
            cells.append(f'<th scope="row">{text}</th>')
        elif key in NUMERIC:
            value = entry[key]["time_s"] if key == "gain" and entry[key] else entry[key]
            cells.append(f'<td class="{kind_of(key)}" data-v="{"" if value is None else value}">{text}</td>')
        else:
            cells.append(f'<td class="{key}">{text}</td>')
    return f"<tr{' class=current' if current else ''}>{''.join(cells)}</tr>"


def table(entries):
    """The sortable table, newest record first."""
    heads = []
    for title, unit, key, _ in COLUMNS:
        kind = kind_of(key) if key in NUMERIC else "text"
        order = "descending" if key == "number" else "none"
        unit = f"<small>{unit.replace(' ± ', '&nbsp;±&nbsp;')}</small>" if unit else ""
        heads.append(f'<th scope="col" class="{kind}" aria-sort="{order}"><button type="button">{title}{unit}</button>')
    rows = "\n".join(table_row(entry, entry is entries[-1]) for entry in reversed(entries))
    return f"""<div class="scroll" role="region" aria-label="Table of records" tabindex="0"><table id="records">
<thead><tr>{"</th>".join(heads)}</th></tr></thead>
<tbody>
{rows}
</tbody></table></div>"""


# ---------------------------------------------------------------------------------------------------------------------
# Code changes between consecutive records


def code_change(old, new):
    """(sentence, list of unified diff lines) between the sources of two records, without the two file name lines."""
    if not (old and new):
        return "source not recorded", []
    before, after = (re.sub("\r\n?", "\n", text).split("\n") for text in (old, new))
    if before == after:
        return "identical sources", []
    if max(len(before), len(after)) > SOURCE_LINES:
        return f"not compared: {max(len(before), len(after)):,} lines, the limit is {SOURCE_LINES:,}", []
    lines = line_diff(before, after)
    added, removed = (sum(line.startswith(sign) for line in lines) for sign in "+-")
    return f'<ins>+{added:,}</ins> <del>−{removed:,}</del> {"line" if added + removed == 1 else "lines"}', lines


def diff_html(old, new):
    """<details> of what changed from record `old` to record `new`; a plain paragraph where there is nothing to open."""
    sentence, lines = code_change(old["source"], new["source"])
    head = f"#{new['number']} {escape(new['name'])} <span>against #{old['number']}: {sentence}</span>"
    if not lines:
        return f'<p class="same">{head}</p>'
    tags = {"+": "ins", "-": "del", "@": "b", " ": "i"}
    shown = [(tags[line[0]], escape(clean(line, LINE_LENGTH))) for line in lines[:DIFF_LINES]]
    left = len(lines) - len(shown)
    note = f"<p>{left:,} more lines of this comparison are left out.</p>" if left else ""
    text = "".join(f"<{tag}>{line}\n</{tag}>" if tag != "i" else f"{line}\n" for tag, line in shown)
    return f'<details><summary>{head}</summary><pre tabindex="0">{text}</pre>{note}</details>'


# ---------------------------------------------------------------------------------------------------------------------
# Page

STYLE, SCRIPT = (Path(__file__).with_name(f"board.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))

TIMELINE = """<h2 id="times">Record times</h2>
<div class="plot"><svg id="timeline" class="chart" role="application" tabindex="0"
aria-label="Record times by date, the arrow keys go from record to record; the numbers are in the table">
<g id="dates"></g><circle class="spot" r="5" visibility="hidden"></circle></svg><div class="tip" hidden></div></div>
<p class="soft">Points are records, bars one standard deviation of their runs to both sides. The line is the best time
so far, filled points made it. Times are as logged, on whatever machine each record ran.</p>
"""


def radios(legend, name, *choices, attributes=""):
    """A <fieldset> of one choice, the first one made; choices are (value, text)."""
    texts = [f'<label><input type="radio" name="{name}" value="{value}"{" checked" * (not i)}> {text}</label>'
             for i, (value, text) in enumerate(choices)]  # fmt: skip
    return f"<fieldset{attributes}><legend>{legend}</legend>{' '.join(texts)}</fieldset>"


CONTROLS = f"""<form id="controls" autocomplete="off">
{radios("Show", "mode", ("curves", "curves"), ("difference", "difference"))}
<div data-mode="difference" hidden><label>of <select name="b" aria-label="record B"></select></label>
<label>minus <select name="a" aria-label="record A"></select></label></div>
{radios("Loss", "y", (2, "validation"), (3, "training"))}
{radios("against", "x", (0, "step"), (1, "time"))}
{radios("Loss axis", "scale", ("linear", "linear"), ("log", "logarithmic"), attributes=' data-mode="curves"')}
<label><input type="checkbox" name="whole"> first quarter in full</label>
<button type="button" id="reset" class="plain" disabled>Reset zoom</button>
</form>"""

CHART = f"""<h2 id="losses">Loss curves</h2>
{CONTROLS}
<div class="plot"><svg id="chart" class="chart" role="application" tabindex="0" data-target="TARGET"
aria-label="Loss curves, the keys + and − and the arrows zoom; final values are in the table">
<defs><clipPath id="clip"><rect></rect></clipPath></defs><g id="axes"></g><g id="lines" clip-path="url(#clip)"></g>
<rect id="brush" visibility="hidden"></rect><circle class="spot" r="4" visibility="hidden"></circle></svg>
<div class="tip" hidden></div></div>
<noscript><p>The curves are drawn by JavaScript, which is switched off.</p></noscript>
<p id="empty" class="soft" hidden>There are no curves with these values.</p>
<p id="said" class="away" role="status"></p>
<p id="sum" role="status" data-mode="difference" hidden></p>
<p class="soft" data-mode="difference" hidden>The difference of the means of the runs, {CURVES} of a record at most, at
equal steps or equal times; below zero the first record is better. Each run is interpolated by a monotone cubic at the
points of the record that has fewer. The band is Welch's 95 % interval at each point by itself.</p>
<div data-mode="curves"><p class="soft">Records: <button type="button" id="all" class="plain">show all</button>
<button type="button" id="none" class="plain">hide all</button></p>
<div id="legend"></div>
<p class="soft">Thick lines are means over the runs of a record, at the steps that all of them have; thin lines
are single runs, {CURVES} of a record at most, thinned to {CURVE_POINTS} points.</p></div>
<p class="soft">Drag sideways to zoom, double-click to go back; or use the keys + and −, the arrows and Escape.</p>
"""


def headline(entries):
    """One sentence: which record stands, with which numbers."""
    if not entries:
        return "No records yet."
    name, date, loss, time = (show(entries[-1]) for _, _, _, show in COLUMNS[1:5])
    text = f"validation loss {loss} nats/token, training time {time} s"
    return f"Current record: <strong>#{len(entries)} {escape(name)}</strong>, {escape(date)}: {text}."


def island(entries):
    """The curves as JSON that can end neither a script element nor a JavaScript string."""
    text = json.dumps([drawn(entry) for entry in entries], allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)  # U+2028 and all other non-ASCII: by dumps


def charted(entries, target):
    """The parts of the page that show records: times, table, curves, code changes."""
    has_times = any(days(entry["date"]) is not None and (entry["mean_time_s"] or 0) > 0 for entry in entries)
    changes = [diff_html(old, new) for old, new in zip(entries, entries[1:], strict=False)]
    places = {"times": "Times", "table": "Table", "losses": "Loss curves", "changes": "Code changes"}
    links = [f'<a href="#{key}">{text}</a>' for key, text in places.items() if key != "times" or has_times]
    parts = [f"<nav>{' '.join(links)}</nav>", TIMELINE if has_times else ""]
    parts += [f'<h2 id="table">Records</h2>\n{table(entries)}', CHART.replace("TARGET", f"{number(target) or ''}")]
    parts += ['<h2 id="changes">Code changes</h2>', *(changes[::-1] or ["<p>One record: nothing to compare.</p>"])]
    return "\n".join(parts)


def board_html(records: list[dict], title: str, target: float | None = None) -> str:
    """The page, to be written in UTF-8: times, table, loss curves with a line at the target loss, code changes."""
    entries, title = ranked(records), escape(clean(title, 200))
    body = f"<h1>{title}</h1>\n<p>{headline(entries)}</p>\n"
    script, policy = "", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if entries:
        body += charted(entries, target)
        script = f'<script type="application/json" id="data">{island(entries)}</script>\n<script>{SCRIPT}</script>\n'
        policy += f"; script-src 'sha256-{base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()}'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
{body}
{script}</body>
</html>
"""
