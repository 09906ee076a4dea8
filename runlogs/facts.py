"""Facts of the logs that a README may state: numbers of groups of runs, differences and tests of two groups.

A group is an arm, one of its cells, a folder of logs, all runs, one run, or a list of runs in the README.
"""

import itertools
import math
import statistics
from bisect import bisect_left, bisect_right
from collections import defaultdict
from functools import cached_property
from pathlib import Path

from runlogs.judging import below_target, welch
from runlogs.loading import trial_numbers

MAX_GROUPS = 40
MAX_PAIRS = 300
# Of means and deviations that were taken in single precision; a part of the value comes to it
SLACK = {"loss": 4e-7, "time": 2e-5, "step time": 2e-7}
SINGLE_PRECISION = 1.2e-7


class Group:
    """Runs that a claim may be about. `real`: they are in the logs, not in the README alone; `runs`: {name of its log:
    group of one run}; `members`: what tells runs apart."""

    def __init__(self, name, arm, losses, times, steps=(), step_times=(), rows=(), real=True, runs=None, folder="",
                 members=frozenset()):
        self.name, self.arm, self.real, self.runs, self.folder = name, arm, real, runs or {}, folder
        self.rows, self.members, self.made = rows, members, {}
        known = [[v for v in values if v is not None] for values in (losses, times, step_times)]
        self.losses, self.times, self.step_times = known
        self.steps = sorted(set(steps))
        self.n = max(len(self.losses), len(self.times))

    def numbers(self, kind):
        """Losses, seconds, seconds of a step, or final steps of the runs."""
        known = {"loss": self.losses, "time": self.times, "step time": self.step_times, "steps": self.steps}
        return known.get(kind, [])

    def facts(self, kind, statistic, target=None):
        """Sorted values that a claim of that kind and statistic may have."""
        if kind == "n":
            return [self.n]
        if kind in ("p", "t", "z", "d"):
            return self.keep("tests", lambda: tests_of(self.losses, target)).get(kind, [])
        if statistic == "interval":
            return self.keep(f"interval of {kind}", lambda: interval_of(self.numbers(kind)))
        found = self.keep(kind, lambda: spread_of(self.numbers(kind)))
        name = "run" if kind == "steps" else "any" if statistic in ("", "result") else statistic
        return found.get(name, [])

    def keep(self, name, make):
        """What `make` gives, made once."""
        if name not in self.made:
            self.made[name] = make()
        return self.made[name]

    @cached_property
    def validations(self):
        """Losses on the way, sorted."""
        losses = (row.get("val_loss", math.nan) for rows in self.rows for row in rows)
        return sorted(loss for loss in losses if math.isfinite(loss))


def spread_of(values):
    """{statistic: sorted values} of a list of numbers; several where people mean several things."""
    if not values:
        return {}
    values, mean, median = sorted(values), statistics.fmean(values), statistics.median(values)
    found = {"mean": [mean], "median": [median], "run": values, "min": values[:1], "max": values[-1:],
             "range": [values[0], values[-1]], "any": sorted([mean, median, *values])}
    if len(values) > 1:
        sd, root = statistics.stdev(values), math.sqrt(len(values))
        found["sd"] = [statistics.pstdev(values), sd]
        found["spread"] = sorted([*found["sd"], sd / root, 1.96 * sd / root, (values[-1] - values[0]) / 2])
    return found


def interval_of(values):
    """Ends of the 95 % and the 99 % interval of a mean, sorted."""
    if len(values) < 2:
        return []
    from scipy.stats import t

    mean, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    half = [error * float(t.isf(tail, len(values) - 1)) for tail in (0.025, 0.005)]
    return sorted(mean + side * width for width in half for side in (-1, 1))


def tests_of(losses, target):
    """{"p", "t", "z"} of the tests that the mean loss is below the target; z is the p of track 3's, with a known sd."""
    if len(losses) < 2 or target is None or not all(abs(loss - target) < 1 for loss in losses):
        return {"p": [], "t": [], "z": []}
    gap, root, sd = target - statistics.fmean(losses), math.sqrt(len(losses)), statistics.stdev(losses)
    p, t = below_target(losses, target), gap * root / sd if sd else None
    return {"p": [p] if p is not None else [], "t": sorted([t, -t]) if sd else [],
            "z": [0.5 * math.erfc(gap * root / 0.0013 / math.sqrt(2))]}


# -- groups of samples


def run_of(sample):
    """Group of one run."""
    step_ms = trial_numbers(sample.rows)["step_avg_ms"]
    mean_s = sample.time_s / sample.steps if sample.time_s and sample.steps else None
    name = f"run {sample.name or sample.run.path.name}"
    return Group(name, sample.arm, [sample.loss], [sample.time_s], [sample.steps],
                 [step_ms / 1000 if step_ms else mean_s], [sample.rows])


def group_of(name, arm, samples, runs=None):
    """Group of samples; `runs` keeps the group of each."""
    runs = {} if runs is None else runs
    own = [runs.setdefault(id(sample), run_of(sample)) for sample in samples]
    folders = {sample.run.path.parent.name for sample in samples}
    keys = ("losses", "times", "steps", "step_times", "rows")
    values = ([value for run in own for value in getattr(run, key)] for key in keys)
    return Group(name, arm, *values, runs={log_name(s): run for s, run in zip(samples, own, strict=True)},
                 folder=folders.pop() if len(folders) == 1 else "", members=frozenset(map(id, samples)))


def log_name(sample):
    """What a row of a table may call a run: its folder, or its log without ending."""
    path = sample.run.path
    return (path.parent.name if path.name == "log.txt" else path.name if path.is_dir() else path.stem).lower()


def groups_of(evidence):
    """Groups of an Evidence: arms, their cells, folders, all runs; the same runs once."""
    found, runs = {}, {}

    def add(name, arm, samples):
        key = frozenset(map(id, samples))
        if samples and len(found) < MAX_GROUPS and key not in found:
            found[key] = group_of(name, arm, samples, runs)

    for arm in evidence.arms:
        add(arm.name, arm.name, arm.samples)
        for cell in arm.cells:
            add(f"{arm.name}, {cell.label}", arm.name, cell.samples)
        for name, samples in folders_of(arm).items():
            add(name, arm.name, samples)
    add("all runs", "", [sample for arm in evidence.arms for sample in arm.samples])
    return list(found.values())


def folders_of(arm):
    """{name: samples} of the folders of an arm, and of those of one final step in each."""
    found = defaultdict(list)
    for sample in arm.samples:
        folder = Path(sample.run.path).parent
        for steps in ("", f", step {sample.steps}"):
            found[str(folder), steps].append(sample)
    return {f"{Path(folder).name}{steps}": samples for (folder, steps), samples in found.items()}


class Pairs:
    """Differences, ratios and tests between groups that have no run in common."""

    def __init__(self, groups):
        pairs = itertools.combinations(groups, 2)
        self.pairs = list(itertools.islice(((a, b) for a, b in pairs if not a.members & b.members), MAX_PAIRS))
        self.of_two, self.of_all = {}, {}

    def facts(self, kind, about="", of=None):
        """Sorted values over all pairs, or those of the groups `of`."""
        key = kind, about, None if of is None else tuple(map(id, of))
        if key not in self.of_all:
            pairs = [pair for pair in self.pairs if of is None or any(group in of for group in pair)]
            self.of_all[key] = sorted(value for a, b in pairs for value in self.of_pair(kind, a, b, about))
        return self.of_all[key]

    def of_pair(self, kind, a, b, about=""):
        """Values of one pair."""
        key = kind, about, id(a), id(b)
        if key not in self.of_two:
            self.of_two[key] = pair_facts(kind, a, b, [about] if about else ["loss", "time"])
        return self.of_two[key]


def pair_facts(kind, a, b, tested):
    """Values of a kind for two groups: of Welch's tests of what is `tested`, ratios, or differences either way."""
    if kind in ("p", "t", "d", "interval"):
        return [value for name in tested for value in welch_facts(a.numbers(name), b.numbers(name))[kind]]
    if kind in ("percent", "ratio"):
        return ratios_of(kind, a, b)
    x, y = means_of("n", a, b) if kind == "n" else means_of(kind, a, b)
    return [] if x is None else [x - y, y - x]


def means_of(kind, a, b):
    """(mean of a, mean of b) of a kind, (None, None) where one has no such number."""
    x, y = ([a.n], [b.n]) if kind == "n" else (a.numbers(kind), b.numbers(kind))
    return (statistics.fmean(x), statistics.fmean(y)) if x and y else (None, None)


def ratios_of(kind, a, b):
    """Ratios of the means of two groups, or what they are called in percent."""
    means = [means_of(name, a, b) for name in ("time", "loss", "steps", "step time")]
    ratios = [x / y for x, y in means if x and y]
    if kind == "ratio":
        return [v for r in ratios for v in (r, 1 / r)]
    return [100 * v for r in ratios for v in (r, 1 / r, r - 1, 1 - r, 1 / r - 1, 1 - 1 / r)]


def welch_facts(x, y):
    """{"p", "t", "d", "interval"} of Welch's test: p one-sided either way and two-sided, the rest either way."""
    test = welch(x, y)
    if test is None:
        return {"p": [], "t": [], "d": [], "interval": []}
    error = math.sqrt(statistics.variance(x) / len(x) + statistics.variance(y) / len(y))
    p, t = test["p_value"], test["difference"] / error if error else 0.0
    d, low, high = test["cohens_d"], test["ci_low"], test["ci_high"]
    return {"p": [p, p / 2, 1 - p / 2], "t": [t, -t], "d": [d, -d], "interval": [low, high, -low, -high]}


# -- comparing


def around(claim, values, most=4):
    """Those of the sorted values that are nearest to a claim."""
    at = bisect_left(values, claim.value)
    return values[max(0, at - most):at + most]


def some(values, claim, most=4):
    """The values nearest to a claim, as words."""
    found = sorted(set(around(claim, values)), key=lambda value: abs(value - claim.value))[:most]
    return ", ".join(f"{value:.6g}" for value in found)


def close(number, digit, value, rough=False, slack=0.0):
    """Whether a number as it is written stands for a value: it is rounded or cut to it; a rough one may be 1 off."""
    if rough:
        return abs(number - value) <= max(1.01 * digit, 0.03 * abs(value) if digit > 0.001 * abs(value) else 0)
    cut = 0 <= abs(value) - abs(number) < digit and number * value >= 0
    return abs(number - value) <= 0.505 * digit + slack + 1e-12 * abs(value) or cut


def agrees(claim, values):
    """Whether one of the sorted values is the number of a claim; a difference may be that of rounded means."""
    rough = claim.relation == "~"
    slack = SLACK[claim.kind] + SINGLE_PRECISION * abs(claim.value) if claim.kind in SLACK else 0
    slack += 0.51 * claim.digit if claim.statistic == "difference" else 0
    reach = 2 * claim.digit + slack + (0.04 * abs(claim.value) if rough else 0)
    low, high = bisect_left(values, claim.value - reach), bisect_right(values, claim.value + reach)
    return any(close(claim.value, claim.digit, value, rough, slack) for value in values[low:high][:5000])


def holds(claim, values):
    """Whether a claim holds for one of the sorted values; of p < x it is enough that one is below."""
    if claim.relation in "<>":
        return bool(values) and (values[0] < claim.value if claim.relation == "<" else values[-1] > claim.value)
    return agrees(claim, values)
