"""Runs -> figures. matplotlib is imported in new_figure only; a bare Figure draws with Agg, without display."""

import io
import math
import warnings
from pathlib import Path

from runlogs.curves import (
    common_range,
    difference,
    grid_of,
    loss_of,
    mean_curve,
    points_at,
    resample,
    rising,
    smoothed,
    tokens_a_step_differ,
)
from runlogs.judging import mean_sd, welch
from runlogs.loading import accuracies, balance_of, curve, differing, settings_of, status_of, step_times
from runlogs.output import printable, write_file
from runlogs.parsing import DEAD, LOSSES
from runlogs.reporting import show

X_AXES = (  # key of a row, label, its units from large to small
    ("step", "step", ((1, ""),)),
    ("tokens", "training tokens", ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))),
    ("train_time_ms", "training time", ((3.6e6, "h"), (6e4, "min"), (1e3, "s"))),
)
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a3b9e", "#8c564b", "#4d4d4d", "#a3ad00")


def loss_limits(runs):
    """(low, high) of the loss axis, None without a loss.

    It starts where the runs are after a fifth of the longest, as the first fall from ln(vocab_size) would flatten the
    rest. Losses that rise again stretch it to at most twice that span or one nat: a diverged run leaves the panel.
    """
    rows = [rows for run in runs for rows in run.trace.trials]
    curves = [[p for p in zip(*points_at(r, loss, "step"), strict=True) if math.isfinite(p[1])]
              for r in rows for loss in LOSSES]
    curves = [points for points in curves if points]
    if not curves:
        return None
    start = max(points[-1][0] for points in curves) / 5
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


MOST_RUNS, MOST_VALUES = 16, 8  # in a legend, the best of them; with dots and their last values beside the panel


def look_of(i):
    """Colour and style of the i-th of many lines: 40 are told apart."""
    return {"color": PALETTE[i % len(PALETTE)], "ls": ("-", "--", ":", "-.")[i // len(PALETTE) % 4]}


def spread(values, gap, least=-math.inf):
    """Places of labels at least `gap` apart, in the order of the values, close to them, and none below `least`."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    groups = []  # [mean of what its members want, members]
    for i in order:
        groups.append([values[i], [i]])
        while len(groups) > 1 and groups[-1][0] - groups[-2][0] < gap * half_sizes(groups[-2:]):
            (x, xs), (y, ys) = groups[-2:]
            groups[-2:] = [[(x * len(xs) + y * len(ys)) / (len(xs) + len(ys)), xs + ys]]
    places = dict.fromkeys(order)
    for middle, members in groups:
        for k, i in enumerate(members):
            places[i] = max(least, middle + gap * (k - (len(members) - 1) / 2))
            least = places[i] + gap
    return [places[i] for i in range(len(values))]


def half_sizes(groups):
    return sum(len(members) for _, members in groups) / 2


def draw_run(ax, run, look, dots):
    """Draw the losses of a run against its steps: validation, with dots or not, and faint training, smoothed."""
    for rows in run.trace.trials:
        (x, val), (at, train) = (points_at(rows, loss, "step") for loss in ("val_loss", "train_loss"))
        faint = {"lw": 1.1, "alpha": 0.35} if len(x) > 1 else {"lw": 1.6, "alpha": 0.9}
        ax.plot(at, train, zorder=2, **look | faint) if len(at) else None
        marks = {"marker": "o", "ms": 4.5, "mec": "white", "mew": 0.7, "markevery": max(1, len(x) // 25), "lw": 2}
        marks = marks if dots or len(x) == 1 else {"lw": 1.3}
        ax.plot(x, val, zorder=3, **look | marks) if len(x) else None


def draw_target(ax, runs):
    """A line at each target loss of the runs' settings that is in sight, or close below."""
    low, high = ax.get_ylim()
    targets = {settings_of(run).get("target_loss") for run in runs}
    for target in sorted(t for t in targets if isinstance(t, int | float) and low - (high - low) / 2 < t < high):
        ax.axhline(target, color="0.35", lw=1, ls=(0, (5, 3)), zorder=1)
        ax.annotate(f"target {target:g}", (0, target), (6, 3), xycoords=ax.get_yaxis_transform(),
                    textcoords="offset points", color="0.35", fontsize=9)
        ax.set_ylim(min(ax.get_ylim()[0], target - (high - low) / 20), high)


def last_losses(run):
    """(last loss, its name) of a run: of validation if there is one, else of training, smoothed."""
    for loss in ("val_loss", "train_loss"):
        values = points_at(run.trace.rows, loss, "step")[1]
        if len(values):
            return float(values[-1]), loss
    return None, ""


def draw_values(ax, runs, looks):
    """Write beside the panel what the runs that go to its end came to, where that is in sight."""
    (low, high), end, seen = ax.get_ylim(), ax.get_xlim()[1], []
    for run, look in zip(runs, looks, strict=True):
        value, step = last_losses(run)[0], run.trace.rows[-1]["step"] if run.trace.rows else 0
        seen += [(value, look)] if value is not None and low <= value <= high and step >= 0.97 * end else []
    places = spread([v for v, _ in seen], (high - low) / 24, low)
    for (v, look), y in zip(seen, places, strict=True):
        ax.annotate(f"{v:.4f}", (1, y), (7, 0), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                    va="center", color=look["color"], fontsize=10, fontweight="bold")


def second_axis(runs):
    """(label, [(step, value)]) of what steps cost: time if all runs agree on it within 2 %, else tokens, else None."""
    for key, label, units in (X_AXES[2], X_AXES[1]):
        found = [rising(run.trace.rows, key, "step") for run in runs if run.trace.rows]
        rates = [points[-1][1] / points[-1][0] for points in found if points and points[-1][0] > 0]
        if len(rates) == len(found) > 0 and 0 < min(rates) and max(rates) <= 1.02 * min(rates) < math.inf:
            points = max(found, key=lambda points: points[-1][0])
            size, unit = unit_of(points[-1][1], units)
            return f"{label} ({unit})" if unit else label, [(0, 0)] * (points[0][0] > 0) + [
                (step, value / size) for step, value in points]
    return None


def draw_second_axis(ax, runs):
    """Ticks at the top for the time or the tokens that the steps cost."""
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    found = second_axis(runs)
    if not found:
        return
    label, points = found
    steps, values = np.transpose(points)
    values = np.maximum.accumulate(values)
    ticks = MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(values[0], values[-1])
    ticks = [t for t in ticks if values[0] <= t <= values[-1]]
    top = ax.secondary_xaxis("top")
    top.set_xticks(np.interp(ticks, values, steps), [f"{t:g}" for t in ticks])
    top.set_xlabel(label, color="0.35")
    top.tick_params(colors="0.35")
    top.spines["top"].set_visible(False)


def words_of(run, names):
    """Name of a run for a legend, its settings of these names, and its status unless it is complete."""
    settings = settings_of(run)
    words = ", ".join(f"{name} {settings.get(name)}" for name in names if name in settings)
    words = [label_of(words)] * bool(words) + [status_of(run)] * (status_of(run) != "complete")
    return "  ".join([label_of(run.path.name, 30), *words])


def loss_legend(figure, runs, looks):
    """The runs below the panel, the best one first, with their last losses."""
    from matplotlib.lines import Line2D

    names = [name for name in differing(runs) if name not in ("experiment_name", "log_dir")]
    names, ends = names if len(names) <= 2 else [], [*map(last_losses, runs)]
    order = sorted(range(len(runs)), key=lambda i: ends[i][0] if math.isfinite(ends[i][0] or math.nan) else math.inf)
    keys, labels = [], []
    for i in order[:MOST_RUNS]:
        value, loss = ends[i]
        keys.append(Line2D([], [], lw=2.5, **looks[i]))
        labels.append(f"{show(value, '.4f')}{' (train)' * (loss == 'train_loss')}  {words_of(runs[i], names)}")
    if len(order) > MOST_RUNS:
        keys.append(Line2D([], [], lw=0))
        labels.append(f"and {len(order) - MOST_RUNS} more, higher")
    columns = 1 if max(map(len, labels)) > 58 or len(labels) == 1 else 2
    figure.legend(keys, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5)
    return -(-len(labels) // columns)


def loss_figure(runs, name):
    """matplotlib Figure: the losses of all runs against their steps, in one panel."""
    figure, (ax,) = new_figure(1, 5.2, 9)
    looks = [look_of(i) for i in range(len(runs))]
    for run, look in zip(runs, looks, strict=True):
        draw_run(ax, run, look, len(runs) <= MOST_VALUES)
    ax.set_ylim(loss_limits(runs))
    draw_target(ax, runs)
    ax.set_xlim(0, max((line.get_xdata()[-1] for line in ax.lines if len(line.get_xdata()) > 0), default=1) or 1)
    ax.set(xlabel="step", ylabel="loss (nats/token)")
    ax.xaxis.get_major_locator().set_params(integer=True)
    draw_second_axis(ax, runs)
    draw_values(ax, runs, looks) if len(runs) <= MOST_VALUES else None
    rows = loss_legend(figure, runs, looks)
    figure.set_figheight(4.9 + 0.21 * rows)
    title = f"{label_of(name, 60)}: validation, and faint the loss of training (smoothed)"
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def series_figure(runs, name, panels):
    """Figure with a panel for each (label, function of a run -> [(step, value)], or with errors as
    [(step, value, error)]); None if nothing is logged."""
    found = [[points_of(run) for run in runs] for _, points_of in panels]
    if not any(points for panel in found for points in panel):
        return None
    figure, axes = new_figure(len(panels), 4.2, 7 if len(panels) == 1 else 5.2 * len(panels))
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
    """matplotlib Figure of a run's routers: a heat map of the load for each mixture layer, experts against steps."""
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


def calm(points):
    """The points with running means in place of their values."""
    return [*zip((at for at, _ in points), smoothed([value for _, value in points]).tolist(), strict=True)]


def figures_of(runs, name):
    """{file name: Figure} of an experiment, loss.png last; load.png is of the newest run that reports its routers."""
    routed = [run for run in runs if run.trace.routers]
    schedule = [(label, lambda run, key=key: curve(run.trace.rows, key, "step"))
                for key, label in (("lr", "learning rate / its setting"), ("window", "attention window (tokens)"))]
    times = [("ms per step, smoothed", lambda run: calm(step_times(run.trace.rows)))]
    scores = [("HellaSwag: accuracy per token (%)\nstandard errors; chance is 25 %", accuracies)]
    found = {"step_time.png": series_figure(runs, name, times),
             "schedule.png": series_figure(runs, name, schedule),
             "hellaswag.png": series_figure(runs, name, scores),
             "load.png": load_figure(routed[-1], name) if routed else None, "loss.png": loss_figure(runs, name)}
    return {file: figure for file, figure in found.items() if figure}


def compare_figure(groups, untested=()):
    """Figure of groups of runs: their curves where they matter and, below, each further group minus the first with a
    95 % band, at equal steps, tokens and times; the last losses and times if too few losses are logged for curves.
    Groups that are `untested`, cells of a mixture, have no band."""
    losses = {axis: loss_of(groups.values(), axis[0]) for axis in X_AXES}
    losses = {axis: loss for axis, loss in losses.items() if loss}
    if not tokens_a_step_differ(groups.values()):
        losses.pop(X_AXES[1], None)
    return curves_figure(groups, losses, untested) if losses else ends_figure(groups, untested)


def curves_figure(groups, losses, untested):
    count = len(losses)
    figure, axes = new_figure(2 * count, 6.4 + 0.22 * len(groups), 5.2 * count if count > 1 else 7.5, 2,
                              sharex="col", height_ratios=(1, 1.25))
    for top, bottom, ((x, label, units), loss) in zip(axes[:count], axes[count:], losses.items(), strict=True):
        low, high = common_range(groups.values(), x, loss)
        size, unit = unit_of(high, units)
        draw_groups(top, groups, x, size, loss)
        draw_differences(bottom, groups, x, size, loss, untested)
        bottom.set_xlim((low + 0.2 * (high - low)) / size, bottom.get_xlim()[1])  # what comes before is out of sight
        bottom.set(xlabel=f"{label} ({unit})" if unit else label)
        panel_title(top, f"at equal {'time' if x == 'train_time_ms' else x + 's' * (x == 'step')}", len(groups))
        panel_title(bottom, f"minus {label_of([*groups][0], 22)}: below 0 is better", len(groups) - 1)
        if top is axes[0] or len({*losses.values()}) > 1:
            top.set_ylabel("validation loss (nats/token)" if loss == "val_loss" else "training loss, smoothed")
            bottom.set_ylabel("difference (nats/token)")
    return figure


def panel_title(ax, title, lines):
    """A title above so many lines of a legend."""
    ax.set_title(title, fontsize=10, fontweight="bold", loc="left", pad=9 + 12.5 * lines)


def limits_of(values, pad=0.06):
    """(low, high) around the finite ones of `values`, None without one."""
    values = [v for v in values if math.isfinite(v)]
    if not values:
        return None
    low, high = min(values), max(values)
    room = pad * (high - low) or 0.05 * max(abs(high), 1e-3)
    return low - room, high + room


def head_legend(ax):
    """What the lines are, above the panel."""
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=9, borderaxespad=0.2,
              handlelength=1.4, labelspacing=0.3)


def draw_groups(ax, groups, x, size, loss):
    """Draw the mean curve of each group; the axis begins where they are after a quarter of what all have covered."""
    low, high = common_range(groups.values(), x, loss)
    start, seen = low + 0.25 * (high - low), []
    for (name, samples), colour in zip(groups.items(), colours_of(len(groups)), strict=True):
        grid, mean = mean_curve(samples, x, loss)
        ax.plot(grid / size, mean, color=colour, lw=1.8, label=f"{label_of(name)} (n = {len(samples)})")
        seen += [*mean[grid >= start]]
    ax.set_ylim(limits_of(seen))
    ax.ticklabel_format(axis="y", useOffset=False)
    head_legend(ax)


def draw_differences(ax, groups, x, size, loss, untested):
    """Draw each further group's mean minus the first's, with its band; the axis is made for the last half."""
    (first, base), *others = groups.items()
    ax.axhline(0, color="0.2", lw=1)
    limits = []
    for (name, samples), colour in zip(others, colours_of(len(groups))[1:], strict=True):
        span = common_range([base, samples], x, loss)
        grid = grid_of([*base, *samples], span, x, loss)
        mean, low, high = difference(*(resample(group, x, grid, loss) for group in (base, samples)))
        low, high = (None, None) if name in untested else (low, high)
        marks = {"marker": "o", "ms": 3} if len(grid) <= 40 else {}
        ax.plot(grid / size, mean, color=colour, lw=1.8, label=end_words(mean, low, high), **marks)
        if low is not None:
            ax.fill_between(grid / size, low, high, color=colour, alpha=0.18, lw=0)
        limits += tail_values(mean, low, high, grid >= span[0] + 0.5 * (span[1] - span[0]))
    ax.set_ylim(limits_of([0, *limits], 0.12))
    ax.ticklabel_format(axis="y", useOffset=False)
    head_legend(ax)


def tail_values(mean, low, high, late):
    """What the axis of differences has to hold: the late means, and their band up to four times as far out."""
    means = [v for v in mean[late] if math.isfinite(v)]
    if low is None or not means:
        return means
    import numpy as np

    far = 4 * max(max(map(abs, means)), np.median(np.abs(means)), 1e-9) + np.ptp(means)
    return means + [max(-far, v) for v in low[late]] + [min(far, v) for v in high[late]]


def end_words(mean, low, high):
    """The last difference in words, with its interval."""
    if low is None:
        return f"{mean[-1]:+.4f} at the end; no band: one run, or a mixture"
    return f"{mean[-1]:+.4f} at the end, {low[-1]:+.4f} to {high[-1]:+.4f} (95 %)"


def ends_figure(groups, untested):
    """Figure of groups with too few losses for curves: last loss and time of each run, means with 95 % intervals."""
    from scipy.stats import t

    kinds = [("last validation loss (nats/token)", ".5f", lambda s: s.loss),
             ("training time (s)", ".2f", lambda s: s.time_s)]
    kinds = [kind for kind in kinds if any(kind[2](s) is not None for samples in groups.values() for s in samples)]
    figure, axes = new_figure(len(kinds), 1.4 + 0.95 * len(groups), 5.2 * len(kinds))
    for ax, (label, form, value) in zip(axes, kinds, strict=True):
        first = [value(s) for s in [*groups.values()][0]]
        for i, ((name, samples), colour) in enumerate(zip(groups.items(), colours_of(len(groups)), strict=True)):
            other = first if i and name not in untested else None
            values = [v for s in samples if (v := value(s)) is not None]
            mean, sd = mean_sd(values)
            bar = float(t.isf(0.025, len(values) - 1)) * sd / len(values) ** 0.5 if sd is not None else None
            ax.plot(values, [i] * len(values), "o", color=colour, ms=5, alpha=0.35, mew=0)
            if mean is not None:
                ax.errorbar([mean], [i - 0.25], xerr=bar, fmt="D", color=colour, ms=5, capsize=3, lw=1.6)
            ax.annotate(value_words(values, other, form), (0, i + 0.16), (4, 0), va="top", fontsize=8.5,
                        color=colour, xycoords=ax.get_yaxis_transform(), textcoords="offset points")
        ax.set(xlabel=label, ylim=(len(groups) - 0.4, -0.6), yticks=[])
        ax.ticklabel_format(axis="x", useOffset=False)
        ax.xaxis.get_major_locator().set_params(nbins=5)
    names = [f"{label_of(name)} (n = {len(samples)})" for name, samples in groups.items()]
    axes[0].set_yticks(range(len(names)), names)
    title = "Too few losses are logged for curves: last loss and time of each run, and means with 95 % intervals"
    figure.suptitle(title, fontsize=10.5, fontweight="bold")
    return figure


def value_words(values, first, form):
    """Mean and sd of a group, and its difference from the first, if that is given, with Welch's interval."""
    mean, sd = mean_sd(values)
    words = show(mean, form) + (f" ± {sd:{form}} (sd)" if sd is not None else "")
    if test := welch(values, first) if first else None:
        words += f"\ndifference {test['difference']:+{form}} ({test['ci_low']:+{form}} to {test['ci_high']:+{form}})"
    return words


def save_figures(make, folder):
    """Write the {file name: Figure} that make() returns into `folder`; the paths. RuntimeError without matplotlib."""
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
