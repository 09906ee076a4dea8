"""The leaderboard of a set of records: a Markdown table, and one HTML page that needs neither server nor network.

    python logger.py board FOLDER...          # reads the record folders and writes what this module returns

A record is a dict with these keys; a missing key is None, and any number may be None:
    name, date (YYYY-MM-DD), folder (the link, as seen from where the board is written), readme_title, gpus, torch,
    code_hash, source                         texts
    n, mean_val_loss, sd_val_loss             runs; nats/token
    mean_time_s, sd_time_s, steps, tokens     seconds of training; tokens is their number, not millions
    curves                                    [{"label": text, "points": [[step, time_s, val_loss, train_loss], ...]}]
Records are numbered by date, those of one day from slow to fast; the last one is the current record.

All texts come from logs that anyone may have written. They are shown as text: control and direction characters as
escapes such as \\x1b, long ones cut. The page's Content-Security-Policy runs its own script only and loads nothing.
"""

import base64
import hashlib
import json
import re
from html import escape
from numbers import Integral, Real
from statistics import fmean
from urllib.parse import quote

from runlogs.sources import line_diff

CURVE_POINTS = 400  # of one curve, after thinning
CURVES = 20  # single runs of a record that the page carries; their mean is over all
DIFF_LINES, LINE_LENGTH = 2_000, 400  # of one code comparison that are shown; characters of one of its lines
SOURCE_LINES = 20_000  # of a source that is compared
LENGTHS = {"name": 100, "date": 20, "readme_title": 160, "gpus": 80, "torch": 30, "code_hash": 64}  # characters
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
    return {"number": record["number"], "name": record["name"], "run_count": len(curves), "mean": mean, "runs": runs}


def ranked(records):
    """The records in date order with their number, texts cleaned, numbers finite; sources and curves as they are."""
    out = []
    for record in records:
        entry = {key: clean(record.get(key), length) for key, length in LENGTHS.items()}
        entry |= {key: number(record.get(key)) for key in NUMBERS}
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
    return MISSING if value is None else f"{value:,.{places}f}"


def plus_minus(mean, sd, places):
    return decimal(mean, places) + (f" ± {decimal(sd, places)}" if None not in (mean, sd) else "")


COLUMNS = (  # heading, unit, what it sorts by (a number is aligned right), text of a record
    ("#", "", "number", lambda r: str(r["number"])),
    ("Record", "", "name", lambda r: r["name"] or MISSING),
    ("Date", "", "date", lambda r: r["date"] or MISSING),
    ("Validation loss", "nats/token, mean ± sd", "mean_val_loss",
     lambda r: plus_minus(r["mean_val_loss"], r["sd_val_loss"], 4)),
    ("Time", "s, mean ± sd", "mean_time_s", lambda r: plus_minus(r["mean_time_s"], r["sd_time_s"], 2)),
    ("Steps", "", "steps", lambda r: decimal(r["steps"], 0)),
    ("Tokens", "millions", "tokens", lambda r: decimal(r["tokens"] and r["tokens"] / 1e6, 2)),
    ("n", "runs", "n", lambda r: decimal(r["n"], 0)),
    ("GPUs", "", "gpus", lambda r: r["gpus"] or MISSING),
    ("torch", "", "torch", lambda r: r["torch"] or MISSING),
    ("Code", "hash", "code_hash", lambda r: r["code_hash"][:8] or MISSING),
)  # fmt: skip
NUMERIC = ("number", *NUMBERS)


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
            value = "" if entry[key] is None else entry[key]
            cells.append(f'<td class="number" data-v="{value}">{text}</td>')
        else:
            cells.append(f'<td class="{key}">{text}</td>')
    return f"<tr{' class=current' if current else ''}>{''.join(cells)}</tr>"


def table(entries):
    """The sortable table, newest record first."""
    heads = []
    for title, unit, key, _ in COLUMNS:
        kind = "number" if key in NUMERIC else "text"
        order = "descending" if key == "number" else "none"
        unit = f"<small>{unit}</small>" if unit else ""
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

STYLE = """
:root { color-scheme: light dark; --page: light-dark(#fff, #16181c); --text: light-dark(#1c1d20, #e3e5e8);
  --soft: light-dark(#5f636b, #9ba1aa); --rule: light-dark(#dcdee2, #33373e); --mark: light-dark(#f1f5fa, #1d2733);
  --accent: var(--c0); --add: light-dark(#e4f3e8, #15301f); --add-text: light-dark(#12532b, #a9dfba);
  --cut: light-dark(#fbe9e7, #3a1c1a); --cut-text: light-dark(#8b1d13, #f3b5ae);
  --c0: light-dark(#0b5cab, #6cb0f5); --c1: light-dark(#c2410c, #f59056); --c2: light-dark(#0f766e, #4fc4b5);
  --c3: light-dark(#86329b, #cf94e0); --c4: light-dark(#8a6400, #d9b245); --c5: light-dark(#be185d, #f283ad);
  --c6: light-dark(#4d7c0f, #a3c95c); --c7: light-dark(#525a66, #a9b0bb) }
body { margin: 0 auto; padding: 2rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 80rem; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem }
p { margin: 0 0 .6rem; max-width: 46rem; overflow-wrap: anywhere }
small, .soft, summary span, .same span { color: var(--soft); font-weight: 400 }
small { display: block; font-size: .8rem; line-height: 1.35 }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer }
a, .plain { color: var(--accent); text-decoration: underline } :disabled { visibility: hidden }
:focus { outline: none } :focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .9rem }
th, td { padding: .45rem .5rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--rule) }
th { font-weight: 400 } thead th { white-space: nowrap; vertical-align: bottom; border-bottom-color: var(--soft) }
thead button { font-weight: 600; text-align: inherit } [aria-sort=ascending] button::before { content: "↑ " }
[aria-sort=descending] button::before { content: "↓ " } .number { text-align: right; white-space: nowrap }
tbody th { min-width: 10.2rem; max-width: 24rem; overflow-wrap: anywhere }
.gpus, .torch { min-width: 7rem; overflow-wrap: anywhere }
.date { white-space: nowrap } .code_hash, pre { font-family: ui-monospace, monospace }
.current { background: var(--mark); box-shadow: inset 3px 0 var(--accent) }
.current th, .current .number { font-weight: 600 }
.badge { font: .75rem system-ui, sans-serif; white-space: nowrap; color: var(--accent); border: 1px solid;
  border-radius: 3px; padding: 0 .35em }
#controls { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; font-size: .9rem; accent-color: var(--accent) }
fieldset { border: 0; padding: 0; margin: 0 } legend { float: left; margin-right: .5rem; color: var(--soft) }
#plot { position: relative; margin: .5rem 0 }
#chart { display: block; width: 100%; touch-action: pan-y; user-select: none; cursor: crosshair }
#chart text { fill: var(--soft); font-size: 12px } #chart line { stroke: var(--rule) }
#lines path { fill: none; stroke-linejoin: round; stroke-linecap: round } .mean { stroke-width: 2 }
.run { stroke-width: 1; opacity: .3; stroke-dasharray: none } .dot { stroke-width: 7 }
#brush { fill: var(--accent); fill-opacity: .12 }
#tip { position: absolute; pointer-events: none; width: max-content; max-width: min(20rem, 80%);
  padding: .3rem .6rem; font-size: .8rem;
  white-space: pre-line; overflow-wrap: anywhere; background: var(--page); border: 1px solid; border-radius: 3px }
#legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; max-height: 11rem; overflow-y: auto; font-size: .85rem;
  padding: 3px; margin-bottom: .6rem } #legend [aria-pressed=false] { opacity: .45 }
#legend button { max-width: 20rem; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-height: 1.7rem }
#legend svg { width: 22px; height: 10px; margin-right: .4rem }
details, .same { border-top: 1px solid var(--rule); padding: .45rem 0; margin: 0; max-width: none }
summary { cursor: pointer; overflow-wrap: anywhere }
pre { overflow: auto; max-height: 36rem; font-size: .8rem; line-height: 1.45; tab-size: 4; margin: .5rem 0 }
ins, del { text-decoration: none } ins { color: var(--add-text) } del { color: var(--cut-text) }
pre > * { display: block; width: max-content; min-width: 100%; font-weight: 400 } pre b { color: var(--soft) }
pre ins { background: var(--add) } pre del { background: var(--cut) }
"""

SCRIPT = r"""
"use strict";
const find = (query) => document.querySelector(query), all = (query) => [...document.querySelectorAll(query)];
const set = (node, attributes) => Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
const format = (value, places = 0) =>
  value.toLocaleString("en", {minimumFractionDigits: places, maximumFractionDigits: places});

// Table: a click on a heading sorts by it, a second one the other way round; missing values stay last.
function sortBy(head) {
  const numeric = head.className === "number", sign = head.ariaSort === "ascending" ? -1 : 1;
  const key = ({cells}) => numeric ? cells[head.cellIndex].dataset.v : cells[head.cellIndex].textContent;
  const missing = (value) => value === "" || value === "–";
  const order = (a, b) => missing(a) || missing(b) ? missing(a) - missing(b)
    : sign * (numeric ? a - b : a.localeCompare(b, "en", {numeric: true}));
  const body = find("tbody");
  body.append(...[...body.rows].sort((a, b) => order(key(a), key(b))));
  for (const other of all("thead th")) other.ariaSort = "none";
  head.ariaSort = sign > 0 ? "ascending" : "descending";
}
for (const head of all("thead th")) head.firstChild.onclick = () => sortBy(head);

// Curves: points are [step, time_s, val_loss, train_loss]; `view` is the zoomed x range, null: all of it.
const data = JSON.parse(find("#data").textContent).reverse(); // newest first
const svg = find("#chart"), tip = find("#tip"), form = find("#controls"), brush = find("#brush"), dot = find("#dot");
const on = new Set(data.slice(0, 8)), edge = {left: 56, right: 22, top: 26, bottom: 40};
let view = null, plot = null, start = null;

function make(name, attributes, text = "") {
  const node = document.createElementNS(svg.namespaceURI, name);
  set(node, attributes);
  node.textContent = text;
  return node;
}

function stroke(record) { // eight colours from the newest record on, then the same ones in dashes
  const age = data.indexOf(record);
  return {stroke: `var(--c${age % 8})`, "stroke-dasharray": ["none", "6 3", "2 3"][Math.floor(age / 8) % 3]};
}

function curves(x, y, log) { // of the records switched on; the means last, that is on top
  const of = (record) => [...record.runs, {points: record.mean}].map(({label, points}) => ({record, label,
    points: points.filter((p) => p[x] !== null && p[y] !== null && (!log || p[y] > 0))}));
  const lines = data.filter((record) => on.has(record)).flatMap(of).filter((line) => line.points.length);
  return [...lines.filter((line) => line.label !== undefined), ...lines.filter((line) => line.label === undefined)];
}

function inView(points, x, y, [from, to]) { // losses of a line between two x, those at the borders interpolated
  const cut = (p, q) => [from, to].filter((at) => (p[x] - at) * (q[x] - at) < 0)
    .map((at) => p[y] + (at - p[x]) / (q[x] - p[x]) * (q[y] - p[y]));
  const inside = points.filter((p) => p[x] >= from && p[x] <= to).map((p) => p[y]);
  return [...inside, ...points.flatMap((p, i) => i ? cut(points[i - 1], p) : [])];
}

function extent(values) {
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  return low < high ? [low, high] : low > high ? [1, 2] : [low - (low / 10 || 1), low + (low / 10 || 1)];
}

function ticks(low, high, count) { // multiples of 1, 2 or 5 times a power of ten, as [value, label]
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((step) => step >= rough * .999);
  const first = Math.ceil(low / step), places = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  return Array.from({length: Math.max(0, Math.floor(high / step) - first + 1)},
    (_, i) => [(first + i) * step, format((first + i) * step, places)]);
}

function decades(low, high) { // 1, 2, 5, 10, ... for a logarithmic axis
  return Array.from({length: 90}, (_, i) => [1, 2, 5][i % 3] * 10 ** (Math.floor(i / 3) - 15))
    .filter((v) => v >= low && v <= high).map((v) => [v, v.toLocaleString("en", {maximumSignificantDigits: 1})]);
}

function draw() {
  const chosen = new FormData(form), x = +chosen.get("x"), y = +chosen.get("y"), log = chosen.get("scale") === "log";
  const width = svg.parentNode.clientWidth, height = Math.max(260, Math.min(440, width * .5));
  const right = width - edge.right, bottom = height - edge.bottom;
  const lines = curves(x, y, log), xs = view ?? extent(lines.flatMap(({points}) => points.map((p) => p[x])));
  const ys = extent(lines.flatMap(({points}) => inView(points, x, y, xs))), scale = log ? Math.log : (v) => v;
  const pad = (scale(ys[1]) - scale(ys[0])) * .03, low = scale(ys[0]) - pad, high = scale(ys[1]) + pad;
  const X = (v) => edge.left + (v - xs[0]) / (xs[1] - xs[0]) * (right - edge.left);
  const Y = (v) => bottom - (scale(v) - low) / (high - low) * (bottom - edge.top);
  const fromX = (px) => xs[0] + (px - edge.left) / (right - edge.left) * (xs[1] - xs[0]);
  plot = {x, y, xs, lines, X, Y, fromX, right, bottom};
  const [unit, per] = x === 0 ? ["", 1] : xs[1] < 600 ? [" (s)", 1] : xs[1] < 18000 ? [" (min)", 60] : [" (h)", 3600];
  const grid = [make("text", {x: 0, y: 12}, `${y === 2 ? "validation" : "training"} loss (nats/token)`),
    make("text", {x: right, y: height - 4, "text-anchor": "end"}, (x ? "training time" : "step") + unit)];
  for (const [v, label] of ticks(xs[0] / per, xs[1] / per, width / 110))
    grid.push(make("text", {x: X(v * per), y: bottom + 18, "text-anchor": "middle"}, label));
  let last = Infinity;
  for (const [v, label] of log && ys[1] > 10 * ys[0] ? decades(...ys) : ticks(...ys, height / 55)) {
    if (last - Y(v) < 18) continue;
    last = Y(v);
    grid.push(make("line", {x1: edge.left, x2: right, y1: last, y2: last}));
    grid.push(make("text", {x: edge.left - 8, y: last + 4, "text-anchor": "end"}, label));
  }
  set(svg, {viewBox: `0 0 ${width} ${height}`});
  find("#axes").replaceChildren(...grid);
  for (const box of [find("#clip rect"), brush])
    set(box, {x: edge.left, y: edge.top, width: Math.max(0, right - edge.left), height: bottom - edge.top});
  const path = ({points}) => points.map((p) => `${X(p[x]).toFixed(1)} ${Y(p[y]).toFixed(1)}`).join("L")
    + (points.length === 1 ? "h.01" : "");  // a single point is a dot
  find("#lines").replaceChildren(...lines.map((line) => make("path", {...stroke(line.record), d: "M" + path(line),
    class: (line.label === undefined ? "mean" : "run") + (line.points.length === 1 ? " dot" : ""),
    "data-number": line.record.number})));
  find("#empty").hidden = lines.length > 0;
  find("#reset").disabled = !view;
  hover(null);
}

function nearest(px, py) { // [line, point] in view or null; a mean before runs that are up to 8 pixels nearer
  let best = null, least = Infinity;
  for (const line of plot.lines) for (const p of line.points) {
    const away = Math.hypot(plot.X(p[plot.x]) - px, plot.Y(p[plot.y]) - py) - (line.label === undefined ? 8 : 0);
    if (away < least && p[plot.x] >= plot.xs[0] && p[plot.x] <= plot.xs[1]) [least, best] = [away, [line, p]];
  }
  return best;
}

function hover(place) { // the values of the point nearest to `place`, null: of none
  const best = place && nearest(...place);
  tip.hidden = !best;
  set(dot, {visibility: best ? "visible" : "hidden"});
  if (!best) return;
  const [{record, label}, p] = best, [step, time, val, train] = p, x = plot.X(p[plot.x]), y = plot.Y(p[plot.y]);
  const losses = [val !== null && `validation ${format(val, 4)}`, train !== null && `training ${format(train, 4)}`];
  const when = `step ${format(step)}${time === null ? "" : ` · ${format(time, 2)} s`}`;
  const who = label ?? (record.run_count > 1 ? `mean of ${record.run_count} runs` : "one run");
  tip.textContent = `#${record.number} ${record.name}\n${who}\n${when}\n${losses.filter(Boolean).join(" · ")}`;
  tip.style.left = `${Math.max(0, Math.min(x + 14, svg.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${y > plot.bottom / 2 ? y - tip.offsetHeight - 12 : y + 14}px`;
  set(dot, {cx: x, cy: y, fill: stroke(record).stroke});
}

function at(event) {
  const box = svg.getBoundingClientRect(), x = event.clientX - box.left;
  return [Math.min(Math.max(x, edge.left), plot.right), event.clientY - box.top];
}
function zoom(range) { // no closer than the numbers are known
  if (!range || range[1] - range[0] > 1e-6 * Math.abs(range[1])) view = range;
  draw();
}
svg.onpointerdown = (event) => {
  if (!event.button) { start = at(event)[0]; svg.setPointerCapture(event.pointerId); }
};
svg.onpointermove = (event) => {
  const [x] = at(event);
  if (start === null) hover(at(event));
  else set(brush, {x: Math.min(x, start), width: Math.abs(x - start), visibility: "visible"});
};
svg.onpointerup = (event) => { // a drag of a few pixels is a click or a tap: it shows values
  if (start === null) return;
  const ends = [start, at(event)[0]].sort((a, b) => a - b);
  svg.onpointercancel();
  if (ends[1] - ends[0] > 8) zoom(ends.map(plot.fromX)); else hover(at(event));
};
svg.onpointercancel = () => { start = null; set(brush, {visibility: "hidden"}); };
svg.onpointerleave = (event) => event.pointerType === "mouse" && hover(null);
svg.ondblclick = find("#reset").onclick = form.onchange = () => zoom(null);
svg.onkeydown = (event) => {
  const move = {ArrowLeft: [-.1, -.1], ArrowRight: [.1, .1], "+": [.1, -.1], "-": [-.125, .125], Escape: []}[event.key];
  if (!move) return;
  event.preventDefault();
  zoom(move.length ? plot.xs.map((v, i) => v + move[i] * (plot.xs[1] - plot.xs[0])) : null);
};

const buttons = data.map((record) => {
  const button = document.createElement("button"), swatch = make("svg", {viewBox: "0 0 22 10", "aria-hidden": "true"});
  swatch.append(make("path", {...stroke(record), d: "M0 5H22", "stroke-width": 2.5}));
  button.append(swatch, `#${record.number} ${record.name}`);
  Object.assign(button, {type: "button", title: record.name, onclick: () => show((r) => on.has(r) !== (r === record))});
  return button;
});
function show(wanted) {
  for (const [i, record] of data.entries()) {
    on[wanted(record) ? "add" : "delete"](record);
    buttons[i].ariaPressed = on.has(record);
  }
  draw();
}
find("#legend").append(...buttons);
find("#all").onclick = () => show(() => true);
find("#none").onclick = () => show(() => false);
for (const input of [find("[name=x][value='1']"), find("[name=y][value='3']")]) // not if no curve has such values
  input.disabled = !data.some((r) => r.runs.some((run) => run.points.some((p) => p[input.value] !== null)));
new ResizeObserver(draw).observe(svg.parentNode);
show((record) => on.has(record));
"""

CHART = f"""<h2>Loss curves</h2>
<form id="controls">
<fieldset><legend>Loss</legend><label><input type="radio" name="y" value="2" checked> validation</label>
<label><input type="radio" name="y" value="3"> training</label></fieldset>
<fieldset><legend>against</legend><label><input type="radio" name="x" value="0" checked> step</label>
<label><input type="radio" name="x" value="1"> time</label></fieldset>
<fieldset><legend>Loss axis</legend><label><input type="radio" name="scale" value="linear" checked> linear</label>
<label><input type="radio" name="scale" value="log"> logarithmic</label></fieldset>
<button type="button" id="reset" class="plain" disabled>Reset zoom</button>
</form>
<div id="plot"><svg id="chart" role="application" tabindex="0" aria-label="Loss curves; final values are in the table">
<defs><clipPath id="clip"><rect></rect></clipPath></defs><g id="axes"></g><g id="lines" clip-path="url(#clip)"></g>
<rect id="brush" visibility="hidden"></rect><circle id="dot" r="4" visibility="hidden"></circle></svg>
<div id="tip" hidden></div></div>
<noscript><p>The curves are drawn by JavaScript, which is switched off.</p></noscript>
<p id="empty" class="soft" hidden>No curve is switched on that has these values.</p>
<p class="soft">Records: <button type="button" id="all" class="plain">show all</button>
<button type="button" id="none" class="plain">hide all</button></p>
<div id="legend"></div>
<p class="soft">Thick lines are means over the runs of a record, at the steps that all of them have; thin lines
are single runs, {CURVES} of a record at most, thinned to {CURVE_POINTS} points. Drag sideways to zoom, double-click to
go back; or use the keys + and −, the arrows and Escape.</p>"""


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


def board_html(records: list[dict], title: str) -> str:
    """The page: table, loss curves, code changes. To be written in UTF-8; opens from the file system."""
    entries, title = ranked(records), escape(clean(title, 200))
    body = f"<h1>{title}</h1>\n<p>{headline(entries)}</p>\n"
    script, policy = "", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
    if entries:
        changes = [diff_html(old, new) for old, new in zip(entries, entries[1:], strict=False)]
        body += f"<h2>Records</h2>\n{table(entries)}\n{CHART}\n"
        body += "<h2>Code changes</h2>\n" + ("\n".join(changes[::-1]) or "<p>One record: nothing to compare.</p>")
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
