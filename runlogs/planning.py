"""Sequential testing: a competitor runs one seed after the other and looks after each. With p < 0.01 at each of the
looks after run 3 to 20 the error rate is 5.6 %, not 1 %: here the looks share it.

The test is a group sequential t-test (Jennison and Turnbull, Exact calculations for sequential t, chi-squared and F
tests, Biometrika 78, 1991): after n of at most N runs a t above a boundary passes. The boundaries are such that a mean
equal to the target has passed by look n with probability alpha * (n / N) ** SPENDING, exactly for normal losses of any
spread (the spending of Lan and DeMets 1983, the power family of Kim and DeMets 1987). To skip looks, or to stop before
N, makes errors rarer.
"""

import functools
import math
import statistics

from runlogs.arms import session_of

FIRST = 3  # runs at the first look: two say nothing of a spread
SPENDING = 1.5  # more saves errors for the late looks: more power, but more runs where the margin is large
HOPELESS = 0.02  # a smaller chance to pass by the last run is not worth a run
MOST = 100  # runs that can be planned
CELLS, LOWEST = 240, -5.0  # of the grid of u; below it u is less than once in a million times
FUTURES = 4000  # simulated continuations of which the chance is a share


def t_of(u, n):
    """t of n values with u = sum / root of the sum of squares."""
    import numpy as np

    return u * np.sqrt((n - 1) / np.maximum(n - u * u, 1e-300))


def u_of(t, n):
    return t * math.sqrt(n / (n - 1 + t * t))


def chance_below(y, u, n):
    """P(next u <= y | u after n values), an array (y, u), for normal values of mean 0.

    u does not depend on the sum of squares Q (Basu), so w = next value / sqrt(Q) is Student's t of n degrees over
    sqrt(n), and the next u is (u + w) / sqrt(1 + w^2). That is y where w is a root of a quadratic."""
    import numpy as np
    from scipy.special import stdtr

    y, u = y[:, None], u[None, :]
    y = np.where(np.abs(np.abs(y) - 1) < 1e-8, y * (1 - 1e-8), y)  # the quadratic is none at 1 and -1
    a = y * y - 1
    rest = u * u - a
    root = y * np.sqrt(np.maximum(rest, 0))
    low, high = (stdtr(n, w * math.sqrt(n)) for w in ((u - root) / a, (u + root) / a))
    between = np.where((rest > 0) & (u * y > 0), low - high, 0)  # elsewhere |next u| is below |y|
    return np.where(a < 0, low, between + (y > 1))


@functools.cache
def boundaries(alpha, most):
    """{n: t from which n runs pass} for the looks after FIRST to `most` runs, together of error rate alpha."""
    import numpy as np
    from scipy.optimize import brentq
    from scipy.special import stdtr, stdtrit

    kept = [1 - alpha * (n / most) ** SPENDING for n in range(most + 1)]  # chance that nothing has passed
    found = {FIRST: float(stdtrit(FIRST - 1, kept[FIRST]))}
    edges = grid(u_of(found[FIRST], FIRST), FIRST)
    below = stdtr(FIRST - 1, t_of(edges, FIRST))
    for n in range(FIRST, most):
        mass, middles = np.diff(below, prepend=0)[1:], (edges[1:] + edges[:-1]) / 2

        def missing(y, n=n, mass=mass, middles=middles):
            return float(chance_below(np.array([y]), middles, n)[0] @ mass) - kept[n + 1]

        top = math.sqrt(n + 1) * (1 - 1e-12)
        bound = brentq(missing, LOWEST, top) if missing(top) > 0 else top  # a share below the precision is not spent
        found[n + 1] = float(t_of(bound, n + 1))
        edges = grid(bound, n + 1)
        below = chance_below(edges, middles, n) @ mass
    return found


def grid(bound, n):
    """Edges of CELLS cells of u, from the lowest to the boundary, near which they are finest: what passes is there."""
    import numpy as np

    low, rest = max(-math.sqrt(n), LOWEST), np.linspace(1, 0, CELLS + 1) ** 2
    return bound - (bound - low) * rest


def outlook(n, t, alpha, most):
    """(chance to pass by the last run, median number of more runs of those that pass, None if none does) after n runs
    with this t that have not passed: mean and variance drawn from what these runs say of them (t distribution, no
    prior knowledge), then the runs to come."""
    import numpy as np

    rng = np.random.default_rng(0)
    t = max(-100.0, min(t, 100.0))  # beyond, nothing changes
    sd = np.sqrt((n - 1) / rng.chisquare(n - 1, FUTURES))
    mean = (t + sd * rng.standard_normal(FUTURES)) / math.sqrt(n)
    runs = mean[:, None] + sd[:, None] * rng.standard_normal((FUTURES, most - n))
    counts = np.arange(n + 1, most + 1)
    sums, squares = t * math.sqrt(n) + runs.cumsum(1), n - 1 + t * t + (runs * runs).cumsum(1)
    bounds = [boundaries(alpha, most)[count] for count in counts]
    passing = t_of(sums / np.sqrt(squares), counts) >= bounds
    some = passing.any(1)
    more = math.ceil(np.median(passing[some].argmax(1) + 1)) if some.any() else None
    return float(some.mean()), more


def look(losses, target, alpha, most):
    """What to do after these runs, of which none but the last may have passed: numbers and "says"."""
    n, t = len(losses), statistic(losses, target)
    bound = boundaries(alpha, most).get(n)
    found = {"n": n, "mean": statistics.mean(losses), "sd": statistics.stdev(losses) if n > 1 else None, "t": t,
             "boundary": bound, "chance": None, "more": None}
    if n > most:
        return {**found, "says": "beyond the plan"}
    if t is None or bound is None:
        return {**found, "says": "go on" if n < most else "hopeless", "more": max(1, FIRST - n) if n < most else None}
    if t >= bound:
        return {**found, "says": "enough"}
    chance, more = outlook(n, t, alpha, most)
    says = "go on" if chance >= HOPELESS else "hopeless"
    return {**found, "says": says, "chance": chance, "more": more if says == "go on" else None}


def statistic(losses, target):
    """Student's t that the mean is below the target, None where two runs do not differ."""
    if len(losses) < 2 or not (sd := statistics.stdev(losses)):
        return None
    return (target - statistics.mean(losses)) * math.sqrt(len(losses)) / sd


def in_order(samples):
    """(samples by the time of their beginning, what the order is); as they come, by file, where a log does not say."""
    ordered = session_of(samples)
    return (ordered, "by date") if ordered else (samples, "by file: not all have a date")


def plan_of(arm, target, alpha, most):
    """plan_numbers of an arm. ValueError if it is a mixture, or there is no target."""
    if target is None:
        raise ValueError("--plan needs a target: --target LOSS")
    if arm.mixture:
        raise ValueError(f"--plan: {arm.mixture}; choose some of them with --cell")
    return plan_numbers(arm.samples, target, alpha, most)


def plan_numbers(samples, target, alpha=0.01, most=20):
    """A look after each run of one cell. ValueError if the plan cannot be made."""
    if not 0 < alpha < 0.5:
        raise ValueError(f"--alpha is {alpha}: an error rate above 0 and below 0.5 is needed")
    if not FIRST <= most <= MOST:
        raise ValueError(f"--max-runs is {most}: a plan has {FIRST} to {MOST} runs")
    samples, order = in_order(samples)
    looks, losses, passed = [], [s.loss for s in samples], None
    for n, sample in enumerate(samples, 1):
        found = look(losses[:n], target, alpha, most) if passed is None else {"n": n, "says": "enough"}
        passed = passed or (n if found["says"] == "enough" else None)
        looks.append({"path": str(sample.run.path), "loss": sample.loss, **found})
    last = looks[-1]["says"]
    verdict = "hopeless" if last == "beyond the plan" else last
    plan = {"target": target, "alpha": alpha, "max_runs": most, "order": order, "looks": looks,
            "passed_after": passed, "verdict": verdict}
    return plan | {"sentence": sentence(plan)}


def sentence(plan):
    """The last look in words, with the error rate that the plan keeps."""
    last, most, n = plan["looks"][-1], plan["max_runs"], len(plan["looks"])
    rate = (f"a mean that is not below {plan['target']} passes with a probability of at most {plan['alpha']:g} (normal "
            f"losses), whenever one looks or stops, if the {most} runs at most were planned before the first and all "
            "that finished are here")
    if plan["verdict"] == "enough":
        return f"enough: passed after run {plan['passed_after']} of at most {most}; {rate}"
    if n >= most:
        return f"hopeless: the {most} planned runs are used up and have not passed, more of them are no test; {rate}"
    chance = f"the chance to pass by run {most} is {percent(last['chance'])}" if last["chance"] is not None else ""
    if plan["verdict"] == "hopeless":
        return f"hopeless: {chance}, below {100 * HOPELESS:.0f} %; {rate}"
    return f"go on, about {last['more']} more: {chance}; {rate}" if chance else f"go on, too few runs to tell; {rate}"


def percent(chance):
    return f"{100 * chance:.1f} %" if chance < 0.1 else f"{100 * chance:.0f} %"
