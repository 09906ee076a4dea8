"""Loss curves of groups of runs at equal steps, tokens and times, and how they differ there."""

import bisect
import math

from runlogs.loading import curve

AXES = ("step", "tokens", "train_time_ms")
POINTS = 10  # rows of a table
LEAST = {"val_loss": 3, "train_loss": 10}  # records of a loss that make a curve


def rising(rows, loss, x):
    """[(x, loss)] without what a clock that was set back repeats."""
    found, top = [], -math.inf
    for point in curve(rows, loss, x):
        if point[0] > top:
            found.append(point)
            top = point[0]
    return found


def smoothed(values):
    """Centred running means of 1/40 of the values, or of five of a few, as an array; only finite ones count."""
    import numpy as np

    values = np.asarray(values, dtype=float)
    half = max(len(values) // 80, min(2, len(values) // 12))
    finite = np.isfinite(values) & (np.abs(values) < 1e9)
    sums, counts = (np.concatenate(([0], np.cumsum(v))) for v in (np.where(finite, values, 0), finite))
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    with np.errstate(all="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def points_at(rows, loss, x):
    """(x, loss) of a curve as lists or arrays; the loss of training is smoothed."""
    found = rising(rows, loss, x)
    if not found:
        return [], []
    at, losses = zip(*found, strict=True)
    return at, smoothed(losses) if loss == "train_loss" else losses


def between(grid, at, losses):
    """The losses at the points of `grid`, by monotone cubics: straight lines between a few validations of a curve that
    bends lie above it, most where it is far from both, and differences of two such curves would zigzag."""
    import numpy as np

    if len(at) < 3 or not np.isfinite(losses).all():
        return np.interp(grid, at, losses)
    from scipy.interpolate import PchipInterpolator

    with np.errstate(all="ignore"):
        return PchipInterpolator(at, losses)(np.clip(grid, at[0], at[-1]))


def resample(samples, x, grid, loss="val_loss"):
    """Losses of the samples at the points of `grid`, as an array (sample, point); x is a key of a row."""
    import numpy as np

    return np.array([between(grid, *points_at(sample.rows, loss, x)) for sample in samples])


def common_range(groups, x, loss="val_loss", least=2):
    """(low, high) of x that the curves of all samples cover, None if one has fewer than `least` points."""
    curves = [rising(s.rows, loss, x) for samples in groups for s in samples]
    if not curves or any(len(points) < least for points in curves):
        return None
    low, high = max(points[0][0] for points in curves), min(points[-1][0] for points in curves)
    return (low, high) if low < high else None


def loss_of(groups, x):
    """The loss whose curves can be compared at equal x: that of validation, or where few are logged, that together
    cover less than half of what the losses of training do, that of training, smoothed; None if neither can."""
    val, train = (common_range(groups, x, loss, least) for loss, least in LEAST.items())
    if val and (not train or val[1] - val[0] >= (train[1] - train[0]) / 2):
        return "val_loss"
    if train:
        return "train_loss"
    return "val_loss" if common_range(groups, x, "val_loss", 2) else None


def mean_curve(samples, x, loss):
    """(x, mean loss) of a group as arrays: against its mean times or tokens at the steps that all samples have, so that
    the curve ends where they end on average; at equal x if they have no steps in common."""
    import numpy as np

    steps = sorted(shared_places([samples], "step", loss))
    if len(steps) < 2:
        grid = grid_of(samples, common_range([samples], x, loss), x, loss)
        return grid, resample(samples, x, grid, loss).mean(0)
    at = np.array(steps) if x == "step" else resample(samples, "step", steps, x).mean(0)
    return at, resample(samples, "step", steps, loss).mean(0)


def grid_of(samples, span, x, loss):
    """Points at which curves are drawn: the steps at which they were measured if these are few, else 200."""
    import numpy as np

    if x != "step":
        return np.linspace(*span, 200)
    places = {at for sample in samples for at, _ in rising(sample.rows, loss, x) if span[0] <= at <= span[1]}
    return np.array(sorted({*span, *places})) if len(places) <= 300 else np.linspace(*span, 200)


def difference(a, b, confidence=0.95):
    """(b's mean - a's mean, low, high) at each point of two arrays (sample, point): Welch's interval of each
    difference; low and high are None where a group has one sample."""
    import numpy as np

    with np.errstate(all="ignore"):
        mean = b.mean(0) - a.mean(0)
        if min(len(a), len(b)) < 2:
            return mean, None, None
        parts = [v.var(0, ddof=1) / len(v) for v in (a, b)]
        half = half_width(parts, [len(a) - 1, len(b) - 1], confidence)
        return mean, mean - half, mean + half


def half_width(parts, freedom, confidence):
    """Half of Welch's interval from the squared standard errors of two means and their degrees of freedom."""
    import numpy as np
    from scipy.stats import t

    total = parts[0] + parts[1]
    shares = sum(part**2 / df for part, df in zip(parts, freedom, strict=True))
    df = np.where(shares > 0, total**2 / np.where(shares > 0, shares, 1), 1)
    return np.where(total > 0, t.isf((1 - confidence) / 2, df) * np.sqrt(total), total)


def equal_points(groups, count=POINTS):
    """{"step" | "tokens" | "train_time_ms": [{"at", "measured", "means": [one a group], "intervals": [(low, high) of
    each further group's mean minus the first's, or None]}]}, where all groups have been. A point that is not measured
    lies between records of the loss."""
    losses = {x: loss_of(groups, x) for x in AXES}
    return {x: equal_points_at(groups, x, loss, count) if loss else [] for x, loss in losses.items()}


def equal_points_at(groups, x, loss, count):
    span = common_range(groups, x, loss)
    if not span:
        return []
    shared = shared_places(groups, x, loss)
    grid = places_near(span, shared, count)
    first, *others = losses = [resample(samples, x, grid, loss) for samples in groups]
    bands = [difference(first, other)[1:] for other in others]
    return [{"at": at, "measured": at in shared, "means": [float(group[:, i].mean()) for group in losses],
             "intervals": [None if low is None else [float(low[i]), float(high[i])] for low, high in bands]}
            for i, at in enumerate(grid)]


def shared_places(groups, x, loss):
    """Where all samples of all groups have a record of the loss."""
    places = [{at for at, _ in rising(s.rows, loss, x)} for samples in groups for s in samples]
    return set.intersection(*places)


def places_near(span, shared, count):
    """`count` places after span[0], evenly to span[1], or those of `shared` that are nearest."""
    (low, high), known, found = span, sorted(shared), []
    gap = (high - low) / count
    for i in range(1, count + 1):
        at = low + gap * i if i < count else high
        k = bisect.bisect(known, at)
        near = min(known[max(0, k - 1) : k + 1], key=lambda place: abs(place - at), default=math.inf)
        close = low < near and abs(near - at) <= 0.5001 * gap and near not in found
        found.append(near if close else at)
    return found


def tokens_a_step_differ(groups):
    """Whether equal tokens are not equal steps: the groups' samples ended at other tokens a step."""
    ends = [found[-1] for samples in groups for s in samples if (found := curve(s.rows, "tokens", "step"))]
    rates = [tokens / step for step, tokens in ends if step > 0]
    return bool(rates) and max(rates) > 1.001 * min(rates)
