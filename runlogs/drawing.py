"""Runs -> figures. matplotlib is imported in new_figure only; a bare Figure draws with Agg, without display."""

import io
import math
import warnings
from pathlib import Path

from runlogs.judging import common_range, resample
from runlogs.loading import accuracies, balance_of, curve, step_times, summarize
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

    It starts where the runs are after a tenth of the longest, as the first fall from ln(vocab_size) would flatten the
    rest. Losses that rise again stretch it to at most twice that span or one nat: a diverged run leaves the panel.
    """
    rows = [rows for run in runs for rows in run.trace.trials]
    curves = [[p for p in curve(r, loss, "step") if math.isfinite(p[1])] for r in rows for loss in LOSSES]
    curves = [points for points in curves if points]
    if not curves:
        return None
    start = max(points[-1][0] for points in curves) / 10
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


def draw_panel(ax, runs, colours, x, size):
    """Draw the losses of all runs against x / size: train faint, val on top with about 25 markers."""
    for run, colour in zip(runs, colours, strict=True):
        for rows in run.trace.trials:
            train, val = ([(a / size, b) for a, b in curve(rows, loss, x)] for loss in LOSSES)
            look = {"marker": "o", "ms": 4.5, "mec": "white", "mew": 0.6, "markevery": max(1, len(val) // 25)}
            ax.plot(*zip(*train, strict=True), color=colour, lw=0.9, alpha=0.28, zorder=2) if train else None
            ax.plot(*zip(*val, strict=True), color=colour, lw=1.7, zorder=3, **look) if val else None
    if not ax.lines:
        not_logged(ax)


def loss_figure(runs, name):
    """matplotlib Figure: the losses against step, tokens and time, side by side, on one loss axis."""
    from matplotlib.lines import Line2D

    figure, axes = new_figure(3, 4.9 + 0.24 * math.ceil((len(runs) + 2) / 4), sharey=True)
    colours = colours_of(len(runs))
    for ax, (x, label, units) in zip(axes, X_AXES, strict=True):
        tops = (a for r in runs for rows in r.trace.trials for loss in LOSSES for a, _ in curve(rows, loss, x))
        size, unit = unit_of(max(tops, default=0), units)
        draw_panel(ax, runs, colours, x, size)
        ax.set_xlabel(f"{label} ({unit})" if unit else label)
        ax.set_xlim(left=0)
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


def series_figure(runs, name, panels):
    """Figure with a panel for each (label, function of a run -> [(step, value)], or with errors as
    [(step, value, error)]); None if nothing is logged."""
    found = [[points_of(run) for run in runs] for _, points_of in panels]
    if not any(points for panel in found for points in panel):
        return None
    figure, axes = new_figure(len(panels), 4.4, 7 * len(panels))
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
    """matplotlib Figure of a run that reports its routers: a heat map of the load for each mixture layer, experts
    against steps."""
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


def figures_of(runs, name):
    """{file name: Figure} of an experiment, loss.png last; load.png is of the newest run (names of run folders begin
    with the time) that reports its routers."""
    routed = [run for run in runs if run.trace.routers]
    schedule = [(label, lambda run, key=key: curve(run.trace.rows, key, "step"))
                for key, label in (("lr", "learning rate / its setting"), ("window", "attention window (tokens)"))]
    times = [("ms per step", lambda run: step_times(run.trace.rows))]
    scores = [("HellaSwag: accuracy per token (%)\nstandard errors; chance is 25 %", accuracies)]
    found = {"step_time.png": series_figure(runs, name, times),
             "schedule.png": series_figure(runs, name, schedule),
             "hellaswag.png": series_figure(runs, name, scores),
             "load.png": load_figure(routed[-1], name) if routed else None, "loss.png": loss_figure(runs, name)}
    return {file: figure for file, figure in found.items() if figure}


def compare_figure(groups):
    """Figure: mean validation loss of each group against step, tokens and time as far as they are logged, with a band
    from its lowest to its highest run."""
    import numpy as np

    shown = [axis for axis in X_AXES if common_range(groups.values(), axis[0])] or X_AXES[:1]
    figure, axes = new_figure(len(shown), 4.9, 7 * len(shown), sharey=True)
    colours, lows, highs = colours_of(len(groups)), [], []
    for ax, (x, label, units) in zip(axes, shown, strict=True):
        spans = {name: common_range([samples], x) for name, samples in groups.items()}
        size, unit = unit_of(max((span[1] for span in spans.values() if span), default=0), units)
        for (name, samples), colour in zip(groups.items(), colours, strict=True):
            if spans[name]:
                grid = np.linspace(*spans[name], 200)
                losses = resample(samples, x, grid)
                ax.fill_between(grid / size, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
                ax.plot(grid / size, losses.mean(0), color=colour, label=f"{label_of(name)} (n={len(samples)})")
                low, high = losses.min(), losses.mean(0)[20]
                lows, highs = lows + [low] * bool(np.isfinite(low)), highs + [high] * bool(np.isfinite(high))
        text = f"{label} ({unit})" if unit else label
        ax.set_xlabel(text) if ax.lines else not_logged(ax, "no two common validations")
    if lows and highs:
        axes[0].set_ylim(min(lows) - 0.05, max(highs) + 0.05)
    if any(ax.lines for ax in axes):
        next(ax for ax in axes if ax.lines).legend(frameon=False)
    axes[0].set_ylabel("validation loss (nats/token)")
    return figure


def save_figures(make, folder):
    """Write the {file name: Figure} that make() returns into `folder`; returns the paths. RuntimeError if matplotlib is
    missing."""
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
