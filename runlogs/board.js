"use strict";
const find = (query) => document.querySelector(query), all = (query) => [...document.querySelectorAll(query)];
const set = (node, attributes) => Object.entries(attributes).forEach(([key, value]) => node.setAttribute(key, value));
const format = (value, places = 0) => Number(value.toFixed(places)) // rounded as Python rounds
  .toLocaleString("en", {minimumFractionDigits: places, maximumFractionDigits: places}).replace("-", "−");
const signed = (value) => (value > 0 ? "+" : "") + format(value, 4);
const plusMinus = ([mean, sd], places) => format(mean, places) + (sd === null ? "" : ` ± ${format(sd, places)}`);
const data = JSON.parse(find("#data").textContent).reverse(); // records, newest first

// ---- Table: a click on a heading sorts by it, a second one the other way round; missing values stay last

function sortBy(head) {
  const numeric = head.classList.contains("number"), sign = head.ariaSort === "ascending" ? -1 : 1;
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

// ---- What both charts share: nodes, ticks, the frame of a plot, its axes, the box with values

const edge = {left: 60, right: 22, top: 26, bottom: 40}; // pixels around a plot

function make(name, attributes, text = "") {
  const node = document.createElementNS(find("svg").namespaceURI, name);
  set(node, attributes);
  node.textContent = text;
  return node;
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

function dateTicks(low, high, count) { // of days since 1970: days for some weeks, else firsts of months
  const iso = (day) => new Date(day * 864e5).toISOString();
  const days = ticks(low, high, count).map(([day]) => day).filter(Number.isInteger);
  if (high - low < 62) return days.map((day) => [day, iso(day).slice(0, 10)]);
  const spans = [1, 3, 6, 12, 24, 60, 120, 600, 1200, 6000, 12000, 60000]; // months
  const every = spans.find((months) => high - low < 30 * months * count) ?? 120000, epoch = 1970 * 12;
  const first = Math.floor((low / 30.44 + epoch) / every) - 1;
  return Array.from({length: count + 4}, (_, i) => Date.UTC(1970, (first + i) * every - epoch) / 864e5)
    .filter((day) => day >= low && day <= high && /^\d{4}-/.test(iso(day))).map((day) => [day, iso(day).slice(0, 7)]);
}

function frame(svg, xs, ys, log) { // where the values of two ranges are drawn: pixels of x and y, x of a pixel
  const width = svg.parentNode.clientWidth, height = Math.max(260, Math.min(440, width * .5));
  const right = width - edge.right, bottom = height - edge.bottom, scale = log ? Math.log : (v) => v;
  const pad = (scale(ys[1]) - scale(ys[0])) * .03, low = scale(ys[0]) - pad, high = scale(ys[1]) + pad;
  set(svg, {viewBox: `0 0 ${width} ${height}`});
  return {xs, ys, log, width, height, right, bottom,
    X: (v) => edge.left + (v - xs[0]) / (xs[1] - xs[0]) * (right - edge.left),
    Y: (v) => bottom - (scale(v) - low) / (high - low) * (bottom - edge.top),
    fromX: (px) => xs[0] + (px - edge.left) / (right - edge.left) * (xs[1] - xs[0])};
}

function axes({X, Y, ys, log, width, height, right, bottom}, xTicks, xName, yName) {
  const text = (x, y, label, anchor) => make("text", {x, y, "text-anchor": anchor}, label);
  const nodes = [text(0, 12, yName, "start"), text(right, height - 4, xName, "end")];
  for (const [v, label] of xTicks)
    nodes.push(text(Math.min(X(v), width - 3.5 * label.length), bottom + 18, label, "middle"));
  let last = Infinity;
  for (const [v, label] of log && ys[1] > 10 * ys[0] ? decades(...ys) : ticks(...ys, height / 55)) {
    if (last - Y(v) < 18) continue;
    last = Y(v);
    nodes.push(make("line", {x1: edge.left, x2: right, y1: last, y2: last}));
    nodes.push(text(edge.left - 8, last + 4, label, "end"));
  }
  return nodes;
}

function mark(svg, place, text, colour) { // a dot at `place` and a box with `text` beside it; no text: neither
  const dot = svg.querySelector(".spot"), tip = svg.nextElementSibling;
  tip.hidden = !text;
  set(dot, {visibility: text ? "visible" : "hidden"});
  if (!text) return;
  const [x, y] = place, below = y < svg.clientHeight / 2;
  tip.textContent = text;
  tip.style.left = `${Math.max(0, Math.min(x + 14, svg.clientWidth - tip.offsetWidth))}px`;
  tip.style.top = `${below ? y + 14 : y - tip.offsetHeight - 12}px`;
  set(dot, {cx: x, cy: y, fill: colour});
}

function pointer(svg, event) { // pixels of a mouse or finger in a chart
  const box = svg.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
}

function nearest(items, places, [px, py]) { // index of the item whose place is nearest, -1 without any
  const away = items.map((item) => Math.hypot(places(item)[0] - px, places(item)[1] - py));
  return away.indexOf(Math.min(...away));
}

// ---- Timeline: the time of each record against its date

const timeline = find("#timeline");
const dated = data.filter((record) => record.day !== null && record.time[0] > 0).reverse(); // oldest first
let fastest = Infinity, picked = -1;
const best = new Set(dated.filter(({time: [time]}) => time < fastest && (fastest = time)));
const latest = dated.at(-1);

function whisker({day, time: [time, sd]}, {X, Y, ys}) { // one standard deviation to both sides
  const [x, low, high] = [X(day), Y(Math.max(ys[0], time - sd)), Y(time + sd)];
  return make("path", {d: `M${x - 4} ${high}h8m-4 0V${low}m-4 0h8`, class: "whisker"});
}

function drawTimeline() {
  const from = dated[0].day, to = latest.day, air = Math.max(3, (to - from) * .03);
  const ends = dated.flatMap(({time: [time, sd]}) => [time, time - sd, time + sd]).filter((time) => time > 0);
  const [low, high] = extent(ends), room = low * (low / high) ** .12; // for the name below the latest
  const plot = frame(timeline, [from - air, to + air], [room, high], true);
  const {X, Y, xs, width} = plot, last = latest.time[0];
  const steps = [...best].map(({day, time: [time]}) => `H${X(day)}V${Y(time)}`).join("");
  const dots = dated.map((record) => make("circle", {cx: X(record.day), cy: Y(record.time[0]),
    r: record === latest ? 6 : 3.5, class: record === latest ? "latest" : best.has(record) ? "best" : "other"}));
  const label = `#${latest.number} ${latest.name}`, shown = label.length > 30 ? label.slice(0, 29) + "…" : label;
  find("#dates").replaceChildren(
    ...axes(plot, dateTicks(...xs, width / 90), "date", "training time (s), logarithmic"),
    make("path", {d: `M${X(dated[0].day)} ${Y(dated[0].time[0])}${steps}H${plot.right}`, class: "frontier"}),
    ...dated.filter(({time}) => time[1]).map((record) => whisker(record, plot)), ...dots,
    make("text", {x: X(latest.day) + 6, y: Y(last) + 22, "text-anchor": "end", class: "name"}, shown));
  timeline.place = ({day, time: [time]}) => [X(day), Y(time)];
  pick(-1);
}

function pick(index) { // the record of this index in the order of dates is shown; -1: none
  picked = index;
  const record = dated[index], losses = record?.loss[0] != null;
  if (!record) return mark(timeline);
  const text = `#${record.number} ${record.name}\n${record.date} · ${plusMinus(record.time, 2)} s`
    + (losses ? `\nvalidation ${plusMinus(record.loss, 4)}` : "") + (record === latest ? "\ncurrent record" : "");
  mark(timeline, timeline.place(record), text, "var(--accent)");
  return text;
}

if (timeline) {
  timeline.onpointermove = timeline.onpointerdown =
    (event) => pick(nearest(dated, timeline.place, pointer(timeline, event)));
  timeline.onpointerleave = (event) => event.pointerType === "mouse" && pick(-1);
  timeline.onkeydown = (event) => {
    const end = dated.length - 1, now = picked < 0 ? end + 1 : picked;
    const [left, right] = [Math.max(now - 1, 0), Math.min(now + 1, end)];
    const to = {ArrowLeft: left, ArrowRight: right, Home: 0, End: end, Escape: -1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    find("#said").textContent = pick(to) ?? "";
  };
  new ResizeObserver(drawTimeline).observe(timeline.parentNode);
}

// ---- Curves: points are [step, time_s, val_loss, train_loss]; `view` is the zoomed x range, null: all of it

const svg = find("#chart"), form = find("#controls"), brush = find("#brush");
const on = new Set(data.slice(0, 8)), target = Number(svg.dataset.target);
let view = null, plot = null, start = null;

function stroke(record) { // eight colours from the newest record on, then the same ones in dashes
  const age = data.indexOf(record);
  return {stroke: `var(--c${age % 8})`, "stroke-dasharray": ["none", "6 3", "2 3"][Math.floor(age / 8) % 3]};
}

function curves(x, y, log) { // of the records switched on; the means last, that is on top
  const of = (record) => [...record.runs, {points: record.mean}].map(({label, points}) => ({record, label, x, y,
    points: points.filter((p) => p[x] !== null && p[y] !== null && (!log || p[y] > 0))}));
  const lines = data.filter((record) => on.has(record)).flatMap(of).filter((line) => line.points.length);
  return [...lines.filter((line) => line.label !== undefined), ...lines.filter((line) => line.label === undefined)];
}

function inView({points, x, y}, [from, to]) { // values of a line between two x, those at the borders interpolated
  const cut = (p, q) => [from, to].filter((at) => (p[x] - at) * (q[x] - at) < 0)
    .map((at) => p[y] + (at - p[x]) / (q[x] - p[x]) * (q[y] - p[y]));
  const inside = points.filter((p) => p[x] >= from && p[x] <= to).map((p) => p[y]);
  return [...inside, ...points.flatMap((p, i) => i ? cut(points[i - 1], p) : [])];
}

// ---- Difference of two records: of the mean of B's runs and that of A's, each run interpolated

function spline(points) { // of [x, y] with rising x: the y at an x, null outside; cubics that do not overshoot
  const rise = points.slice(1).map(([x, y], i) => (y - points[i][1]) / (x - points[i][0]));
  const slope = points.map((_, i) => {
    const [a, b] = [rise[i - 1] ?? rise[i], rise[i] ?? rise[i - 1]];
    return a * b > 0 ? 2 * a * b / (a + b) : 0;
  });
  return (at) => {
    const i = points.findLastIndex(([x]) => x <= at);
    if (i < 0 || at === points[i][0]) return points[i]?.[1] ?? null;
    if (i === points.length - 1) return null;
    const [[x, y], [end, next]] = [points[i], points[i + 1]], h = end - x, u = (at - x) / h, v = 1 - u;
    return v * v * ((1 + 2 * u) * y + u * h * slope[i]) + u * u * ((1 + 2 * v) * next - v * h * slope[i + 1]);
  };
}

// The 97.5 % quantile of Student's t. With t = sqrt(freedom) tan(angle) its density is cos(angle)^(freedom - 1): the
// angle up to which that has 95 % of its area from 0 to 90 degrees, summed in 2,000 steps, gives it to five digits.
const quantiles = new Map();
function student(freedom) {
  const power = Math.min(Math.max(freedom, 1), 1000).toPrecision(5) - 1, steps = 2000, width = Math.PI / 2 / steps;
  if (!quantiles.has(power)) {
    const area = Array.from({length: steps}, (_, i) => Math.cos((i + .5) * width) ** power);
    let i = 0, left = .95 * area.reduce((a, b) => a + b);
    while (left > area[i]) left -= area[i++];
    quantiles.set(power, Math.sqrt(power + 1) * Math.tan((i + left / area[i]) * width));
  }
  return quantiles.get(power);
}

function summary(values) { // mean, and the variance of that mean with its degrees of freedom
  const mean = values.reduce((a, b) => a + b, 0) / values.length, freedom = values.length - 1;
  const spread = values.reduce((sum, value) => sum + (value - mean) ** 2, 0);
  return {mean, freedom, variance: spread / freedom / values.length};
}

function welch(a, b) { // half the 95 % interval of a difference of means, NaN if either is of one run
  const variance = a.variance + b.variance;
  const freedom = variance ** 2 / (a.variance ** 2 / a.freedom + b.variance ** 2 / b.freedom);
  return variance === 0 ? 0 : variance > 0 ? student(freedom) * Math.sqrt(variance) : NaN;
}

function rising(points, x, y) { // [x, y] of the points that have both, those aside that go back in time
  let last = -Infinity;
  return points.filter((p) => p[x] !== null && p[y] !== null && p[x] > last && ((last = p[x]), true))
    .map((p) => [p[x], p[y]]);
}

function difference(a, b, x, y) { // rows [x, B minus A, half the interval, A, B] where all runs of both have values
  const arms = [a, b].map(({runs}) => runs.map(({points}) => rising(points, x, y)).filter((run) => run.length));
  const from = Math.max(...arms.flat().map((run) => run[0][0]));
  const to = Math.min(...arms.flat().map((run) => run.at(-1)[0]));
  if (!arms[0].length || !arms[1].length || from > to) return [];
  const means = [a, b].map(({mean}) => rising(mean, x, y).map(([v]) => v));
  const coarse = means[0].length < means[1].length ? means[0] : means[1]; // so that the finer one is interpolated
  const places = [...new Set([from, ...coarse.filter((v) => v > from && v < to), to])];
  const splines = arms.map((runs) => runs.map(spline));
  return places.map((v) => {
    const [before, after] = splines.map((runs) => summary(runs.map((run) => run(v))));
    return [v, after.mean - before.mean, welch(before, after), before.mean, after.mean];
  });
}

function interval([, value, half]) {
  return signed(value) + (half >= 0 ? ` (95 %: ${signed(value - half)} to ${signed(value + half)})` : "");
}

const moment = (value, x) => x ? `${format(value, 2)} s` : `step ${format(value)}`;

function conclude(a, b, rows, x) { // the difference at the last common place in words
  const row = rows.at(-1), runs = ({run_count: n, runs}) => runs.length < n ? `${runs.length} of ${n}` : n;
  find("#sum").textContent = row ? `#${b.number} minus #${a.number} at ${moment(row[0], x)}, the last that both have: `
    + `${interval(row)} nats/token, ${runs(b)} and ${runs(a)} runs.`
    + (row[2] >= 0 ? "" : " No band: it needs two runs of each.") : "";
}

// ---- Drawing of curves or of a difference

function choices() {
  const chosen = new FormData(form), x = +chosen.get("x"), y = +chosen.get("y");
  const [a, b] = ["a", "b"].map((name) => data[chosen.get(name)]), pair = chosen.get("mode") === "difference";
  return {x, y, a, b, pair, log: !pair && chosen.get("scale") === "log", whole: chosen.has("whole")};
}

function linesOf({x, y, a, b, pair, log}) { // what is drawn: curves, or a difference with the borders of its band
  if (!pair) return curves(x, y, log);
  const rows = difference(a, b, x, y), line = {record: b, rows: true, points: rows, x: 0, y: 1};
  conclude(a, b, rows, x);
  const border = (sign) => ({...line, points: rows.filter((row) => row[2] >= 0)
    .map(([at, value, half]) => [at, value + sign * half])});
  return rows.length ? [border(-1), border(1), line] : [];
}

function ranges(lines, {x, y, pair, whole}) { // of both axes; the high losses of the beginning are seen after a zoom
  const xs = view ?? extent(lines.flatMap(({points, x}) => points.map((p) => p[x])));
  const seen = view || whole ? xs : [xs[0] + (xs[1] - xs[0]) / 4, xs[1]];
  const values = (range) => lines.flatMap((line) => inView(line, range)), late = values(seen);
  const more = pair ? [0] : !view && y === 2 && target ? [target] : [];
  return [xs, extent([...late.length ? late : values(xs), ...more])];
}

function path({points, x, y}) {
  return points.map((p) => `${plot.X(p[x]).toFixed(1)} ${plot.Y(p[y]).toFixed(1)}`).join("L")
    + (points.length === 1 ? "h.01" : ""); // a single point is a dot
}

function shapes(lines, pair) {
  if (pair) {
    const [low, high, line] = lines, back = {...high, points: [...high.points].reverse()};
    return [make("path", {class: "band", d: low.points.length ? `M${path(low)}L${path(back)}Z` : ""}),
      make("path", {class: "mean difference", d: "M" + path(line)})];
  }
  return lines.map((line) => make("path", {...stroke(line.record), d: "M" + path(line),
    class: (line.label === undefined ? "mean" : "run") + (line.points.length === 1 ? " dot" : ""),
    "data-number": line.record.number}));
}

function level(value, label, name) { // a line across the plot, if the value is in it
  const y = plot.Y(value);
  if (!(y >= edge.top && y <= plot.bottom)) return [];
  return [make("line", {x1: edge.left, x2: plot.right, y1: y, y2: y, class: name}),
    make("text", {x: edge.left + 4, y: y - 5, class: name}, label)];
}

function draw() {
  const chosen = choices(), {x, y, a, b, pair, log} = chosen, lines = linesOf(chosen);
  const [xs, ys] = ranges(lines, chosen);
  plot = {...frame(svg, xs, ys, log), lines: pair ? lines.slice(2) : lines, chosen};
  const [unit, per] = x === 0 ? ["", 1] : xs[1] < 600 ? [" (s)", 1] : xs[1] < 18000 ? [" (min)", 60] : [" (h)", 3600];
  const loss = `${y === 2 ? "validation" : "training"} loss`, by = ticks(xs[0] / per, xs[1] / per, plot.width / 80);
  const name = pair ? `${loss}, #${b?.number} minus #${a?.number} (nats/token)` : `${loss} (nats/token)`;
  const across = pair ? level(0, "", "zero") : y === 2 && target ? level(target, `target ${target}`, "target") : [];
  find("#axes").replaceChildren(
    ...axes(plot, by.map(([v, label]) => [v * per, label]), (x ? "training time" : "step") + unit, name), ...across);
  for (const box of [find("#clip rect"), brush])
    set(box, {x: edge.left, y: edge.top, width: Math.max(0, plot.right - edge.left), height: plot.bottom - edge.top});
  find("#lines").replaceChildren(...lines.length ? shapes(lines, pair) : []);
  find("#empty").hidden = lines.length > 0;
  find("#reset").disabled = !view;
  for (const part of all("[data-mode]")) part.hidden = (part.dataset.mode === "difference") !== pair;
  hover(null);
}

function nearestPoint([px, py]) { // [line, point] in view or null; a mean before runs that are up to 8 pixels nearer
  let found = null, least = Infinity;
  for (const line of plot.lines) for (const p of line.points) {
    const off = plot.Y(p[line.y]) - py, away = Math.hypot(plot.X(p[line.x]) - px, line.rows ? 0 : off);
    const behind = away - (line.label === undefined ? 8 : 0);
    if (behind < least && p[line.x] >= plot.xs[0] && p[line.x] <= plot.xs[1]) [least, found] = [behind, [line, p]];
  }
  return found;
}

function words({record, label, rows}, p) { // what the box says of a point
  const {a, b, x} = plot.chosen;
  const losses = rows ? p.slice(3).map((loss) => format(loss, 4)) : [];
  if (rows) return `#${b.number} minus #${a.number}, ${moment(p[0], x)}\n${interval(p)}\n${losses[1]} − ${losses[0]}`;
  const [step, time, val, train] = p;
  losses.push(val !== null && `validation ${format(val, 4)}`, train !== null && `training ${format(train, 4)}`);
  const when = `step ${format(step)}${time === null ? "" : ` · ${format(time, 2)} s`}`;
  const who = label ?? (record.run_count > 1 ? `mean of ${record.run_count} runs` : "one run");
  return `#${record.number} ${record.name}\n${who}\n${when}\n${losses.filter(Boolean).join(" · ")}`;
}

function hover(place) { // the values of the point nearest to `place`, null: of none
  const found = place && nearestPoint(place);
  if (!found) return mark(svg);
  const [line, p] = found, y = Math.min(Math.max(plot.Y(p[line.y]), edge.top), plot.bottom);
  mark(svg, [plot.X(p[line.x]), y], words(line, p), line.rows ? "var(--accent)" : stroke(line.record).stroke);
}

function at(event) {
  const [x, y] = pointer(svg, event);
  return [Math.min(Math.max(x, edge.left), plot.right), y];
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
  find("#said").textContent = plot.xs.map((v) => moment(v, plot.chosen.x)).join(" to ");
};

// ---- Which records are drawn

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
const drawable = [...data.keys()].filter((i) => data[i].mean.length);
for (const [select, place] of [[form.a, 1], [form.b, 0]]) { // at first the newest record against the one before it
  select.append(...data.map(({number, name}, i) => new Option(`#${number} ${name}`.slice(0, 60), i)));
  select.value = drawable[place] ?? 0;
}
form.elements.mode[1].disabled = drawable.length < 2;
for (const input of [find("[name=x][value='1']"), find("[name=y][value='3']")]) // not if no curve has such values
  input.disabled = !data.some((r) => r.runs.some((run) => run.points.some((p) => p[input.value] !== null)));
new ResizeObserver(draw).observe(svg.parentNode);
show((record) => on.has(record));
