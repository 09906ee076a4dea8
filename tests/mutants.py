"""Mutants: small errors put into the statistics of runlogs/, one at a time; the tests have to see each.

    python tests/mutants.py                      # all of them: about 5 minutes on one core
    python tests/mutants.py planning welch       # those with one of these words in their file, place or reason
    python tests/mutants.py --list

A mutant is a file, a text in it that occurs exactly once, what takes its place, and why that is an error. It is put into
a copy of runlogs/, logger.py and the tests; the tests of TESTS run there until the first failure. A mutant survives if
none fails. EQUIVALENT names those that no test can see, and why. Exit code 1: a survivor that is not of them, or a
mutant that does not apply.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["statistics", "plan"]
TESTS = {  # file: test_logger_*.py that may see an error in it, the fastest first
    "judging": [*QUICK, "arms", "commands", "control"],
    "planning": ["plan"],
    "loading": [*QUICK, "commands", "public", "formats"],
    "arms": [*QUICK, "arms", "commands"],
    "verifying": [*QUICK, "verify", "commands"],
}


class Mutant(NamedTuple):
    file: str
    old: str
    new: str
    why: str


MUTANTS = [Mutant(*fields) for fields in (
    # judging: one group
    ("judging", "(statistics.stdev(values) if len(values) > 1 else None)",
     "(statistics.pstdev(values) if len(values) > 1 else None)", "sd with n for n - 1"),
    ("judging", 'alternative="less"', 'alternative="greater"', "the other side of the t-test"),
    ("judging", 'alternative="less"', 'alternative="two-sided"', "two-sided t-test"),
    ("judging", "while t.sf(margin * math.sqrt(high) / sd, high - 1) >= alpha", "while t.sf(margin * math.sqrt(high) / sd, "
     "high - 1) >= 2 * alpha", "runs needed: another alpha on the way up"),
    ("judging", "enough = t.sf(margin * math.sqrt(middle) / sd, middle - 1)",
     "enough = t.sf(margin * math.sqrt(middle) / sd, middle)", "runs needed: n degrees of freedom"),
    ("judging", "enough = t.sf(margin * math.sqrt(middle) / sd", "enough = t.sf(margin * math.sqrt(middle) / sd**2",
     "runs needed: variance for sd"),
    ("judging", "    return high\n", "    return low\n", "runs needed: one too few"),
    ("judging", "None if margin <= 0 else 2", "None if margin <= 0 else 1", "runs needed: one run without a spread"),
    ("judging", "t.isf(alpha, n - 1)) * sd", "t.isf(alpha, n)) * sd", "detectable margin: n degrees of freedom"),
    ("judging", "t.isf(alpha, n - 1)) * sd", "t.isf(alpha / 2, n - 1)) * sd", "detectable margin: two-sided"),
    ("judging", "t.isf(alpha, n - 1)) * sd / math.sqrt(n)", "t.isf(alpha, n - 1)) * sd / n", "standard error sd / n"),
    ("judging", "p is not None and p < alpha", "p is not None and p < 2 * alpha", "passes with p below 2 alpha"),
    ("judging", '"t": (mean - target) * math.sqrt(n) / sd', '"t": (mean - target) * math.sqrt(n - 1) / sd', "t: n - 1"),
    ("judging", '"t": (mean - target) * math.sqrt(n) / sd', '"t": (target - mean) * math.sqrt(n) / sd', "sign of t"),
    ("judging", "runs_needed(target - mean, sd, alpha)", "runs_needed(mean - target, sd, alpha)", "sign of the margin"),
    ("judging", "runs_needed(target - mean, sd, alpha)", "runs_needed(target - mean, sd)", "runs needed: alpha ignored"),
    ("judging", "max(0, needed - n)", "max(0, needed - n + 1)", "one more run than needed"),
    ("judging", "detectable_margin(n, sd, alpha) if sd", "detectable_margin(n, sd) if sd", "margin: alpha ignored"),
    ("judging", "value = (target - mean) * math.sqrt(n)\n", "value = (target - mean) * n\n", "sigma rule: n for its root"),
    ("judging", '"sigma_rule": {"value": value, "passed": value >= SIGMA_RULE}, "runs_needed"',
     '"sigma_rule": {"value": value, "passed": value <= SIGMA_RULE}, "runs_needed"', "sigma rule: the other side"),
    ("judging", "SIGMA_RULE = 0.004 ", "SIGMA_RULE = 0.003 ", "sigma rule: another limit"),
    ("judging", 'trial_numbers(s.rows)["step_avg_ms"] for s in samples])[0]',
     'trial_numbers(s.rows)["step_avg_ms"] for s in samples])[1]', "sd of the step time for its mean"),
    # judging: two groups
    ("judging", "equal_var=False", "equal_var=True", "Student's t for Welch's"),
    ("judging", "ttest_ind(a, b,", "ttest_ind(b, a,", "Welch: interval of the other difference"),
    ("judging", "    difference = statistics.mean(a) - statistics.mean(b)", "    difference = statistics.mean(b) - statistics.mean(a)",
     "Welch: groups swapped"),
    ("judging", "confidence_interval(confidence)", "confidence_interval(0.9)", "Welch: interval of 90 %"),
    ("judging", "test.pvalue))", "test.pvalue / 2))", "Welch: one-sided p"),
    ("judging", "statistics.variance(b)) / 2)", "statistics.variance(b)) / 1)", "Cohen's d: sum for mean of variances"),
    ("judging", '"cohens_d": difference / pooled', '"cohens_d": difference / pooled**2', "Cohen's d: variance for sd"),
    ("judging", "math.sqrt(1 / len(a) + 1 / len(b))", "math.sqrt(1 / len(a))", "pairwise rule: error of one group"),
    ("judging", "    gain += (mean_sd", "    gain -= (mean_sd", "pairwise rule: sign of the steps"),
    ("judging", "LOSS_PER_STEP = 0.000045", "LOSS_PER_STEP = 0.00045", "pairwise rule: worth of a step"),
    ("judging", "    gain = mean_sd([s.loss for s in a])[0] - mean_sd([s.loss for s in b])[0]",
     "    gain = mean_sd([s.loss for s in b])[0] - mean_sd([s.loss for s in a])[0]", "pairwise rule: groups swapped"),
    ("judging", 'welch([s.loss for s in b], [s.loss for s in a])', 'welch([s.loss for s in a], [s.loss for s in b])',
     "compare: losses swapped"),
    ("judging", 'welch([s.time_s for s in b], [s.time_s for s in a])', 'welch([s.time_s for s in a], [s.time_s for s in b])',
     "compare: times swapped"),
    ("judging", "for c in (cell, other)))", "for c in (other, cell)))", "record minus baseline: arms swapped"),
    ("judging", "seconds = welch(old, new)", "seconds = welch(new, old)", "gain: interval of the loss of time"),
    ("judging", '{"time_s": base - mean,', '{"time_s": mean - base,', "gain: sign"),
    ("judging", "100 * (1 - mean / base)", "100 * (base / mean - 1)", "gain: percent of the record's time"),
    ("judging", 'for key in ("ci_high", "ci_low"))', 'for key in ("ci_low", "ci_high"))', "gain: bounds swapped"),
    ("judging", "c.steps == max(c.steps for c in near)", "c.steps == min(c.steps for c in near)", "opponent: the shortest"),
    ("judging", "changes > 1 if changes", "changes > 0 if changes", "PPPBBB called interleaved"),
    ("judging", '"difference": y_mean - x_mean if both', '"difference": x_mean - y_mean if both', "diff: sign of the effect"),
    ("judging", 'else None, "test": welch(y, x)}', 'else None, "test": welch(x, y)}', "diff: interval of the other sign"),
    ("judging", '        if row["val_loss"] <= loss:', '        if row["val_loss"] < loss:', "reached: equal is not reached"),
    ("judging", 'share = (above["val_loss"] - loss) / fall', 'share = (loss - row["val_loss"]) / fall', "reached: share upside down"),
    ("judging", "timed / sample.steps * control.steps / control.time_s", "timed / control.steps * sample.steps / control.time_s",
     "control: steps swapped"),
    ("judging", 'spent[first]["step"] / spent[name]["step"]', 'spent[name]["step"] / spent[first]["step"]', "break-even: inverse"),
    # judging: stages
    ("judging", "t.isf((1 - confidence) / 2, n - 1)", "t.isf(1 - confidence, n - 1)", "interval of the mean: one side"),
    ("judging", "t.isf((1 - confidence) / 2, n - 1)", "t.isf((1 - confidence) / 2, n)", "interval: n degrees of freedom"),
    ("judging", "n - 1)) * sd / math.sqrt(n)\n    return {\"n\"", "n - 1)) * sd\n    return {\"n\"", "interval of a run, not of the mean"),
    ("judging", '"ci_low": mean - half, "ci_high": mean + half', '"ci_low": mean - half / 2, "ci_high": mean + half / 2',
     "half of the interval"),
    ("judging", "found = {name: [ms / steps for ms, steps in runs if steps]", "found = {name: [ms for ms, steps in runs if steps]",
     "time of a stage for that of a step"),
    ("judging", "x, y = ([ms / 1000 for ms, _ in", "x, y = ([ms for ms, _ in", "stages: ms for s"),
    ("judging", "(welch(y, x) if test", "(welch(x, y) if test", "stages: interval of the other sign"),
    ("judging", '"difference": statistics.mean(y) - statistics.mean(x)', '"difference": statistics.mean(x) - statistics.mean(y)',
     "stages: sign"),
    ("judging", 'return "logged" if all(map(all, told)) and', 'return "logged" if any(map(all, told)) and',
     "stages of one group only"),
    # planning
    ("planning", "SPENDING = 1.5 ", "SPENDING = 1.0 ", "error rate spent earlier than said"),
    ("planning", "FIRST = 3 ", "FIRST = 4 ", "first look later than said"),
    ("planning", "HOPELESS = 0.02 ", "HOPELESS = 0.2 ", "gives up early"),
    ("planning", "1 - alpha * (n / most)", "1 - alpha * (n / (most + 1))", "not all of alpha is spent"),
    ("planning", "1 - alpha * (n / most)", "1 - 2 * alpha * (n / most)", "twice alpha"),
    ("planning", "stdtrit(FIRST - 1, kept[FIRST])", "stdtrit(FIRST, kept[FIRST])", "first look: n degrees of freedom"),
    ("planning", "return u * np.sqrt((n - 1)", "return u * np.sqrt(n", "t from u: n for n - 1"),
    ("planning", "t * math.sqrt(n / (n - 1 + t * t))", "t * math.sqrt(n / (n + t * t))", "u from t: n for n - 1"),
    ("planning", "(stdtr(n, w * math.sqrt(n))", "(stdtr(n - 1, w * math.sqrt(n))", "next value: degrees of freedom"),
    ("planning", "(stdtr(n, w * math.sqrt(n))", "(stdtr(n, w * math.sqrt(n + 1))", "next value: scale"),
    ("planning", "(rest > 0) & (u * y > 0)", "(rest > 0)", "roots of the wrong branch"),
    ("planning", "@ mass) - kept[n + 1]", "@ mass) - kept[n]", "spends one look late"),
    ("planning", "below = chance_below(edges, middles, n) @ mass", "below = chance_below(edges, middles, n + 1) @ mass",
     "density of another look"),
    ("planning", "np.diff(below, prepend=0)[1:]", "np.diff(below, append=0)[1:]", "mass of the neighbouring cell"),
    ("planning", "(target - statistics.mean(losses))", "(statistics.mean(losses) - target)", "sign of t"),
    ("planning", "(sd := statistics.stdev(losses))", "(sd := statistics.pstdev(losses))", "sd with n"),
    ("planning", "* math.sqrt(len(losses)) / sd", "* math.sqrt(len(losses) - 1) / sd", "t: n - 1"),
    ("planning", "    if t >= bound:", "    if t >= bound - 1:", "passes below its boundary"),
    ("planning", "losses[:n], target", "losses[: n + 1], target", "looks at the run after"),
    ("planning", "    if n > most:", "    if n >= most:", "the last run is beyond the plan"),
    ("planning", "if n < most else (0.0, None)", "if n <= most else (0.0, None)", "outlook after the last run"),
    ("planning", "np.sqrt((n - 1) / rng.chisquare(n - 1, FUTURES))", "np.sqrt(rng.chisquare(n - 1, FUTURES) / (n - 1))",
     "outlook: inverse of the variance"),
    ("planning", "mean = (t + sd * rng.standard_normal(FUTURES))", "mean = (t + 0 * rng.standard_normal(FUTURES))",
     "outlook: the mean is taken for known"),
    ("planning", "n - 1 + t * t + (runs", "n + t * t + (runs", "outlook: sum of squares"),
    ("planning", "argmax(1) + 1)", "argmax(1))", "outlook: one run too few"),
    ("planning", "return float(some.mean()), more", "return float(passing.mean()), more", "outlook: share of looks, not of futures"),
    ("planning", 'verdict = "hopeless" if last == "beyond the plan" else last', "verdict = last", "a plan that is used up"),
    ("planning", "    if not 0 < alpha < 0.5:", "    if not 0 <= alpha < 0.5:", "alpha of 0"),
    ("planning", "    if not FIRST <= most <= MOST:", "    if not FIRST < most <= MOST:", "a plan of three runs"),
    # loading
    ("loading", "is not None and loss <= target", "is not None and loss < target", "crossing: equal does not count"),
    ("loading", '"train_time_s": time_ms and time_ms / 1000}', '"train_time_s": time_ms}', "crossing: ms for s"),
    ("loading", "(b, (y - x) / (b - a))", "(b, y - x)", "step time: not divided by the gap"),
    ("loading", "if b > a and y >= x]", "if b > a]", "step time: clock set back"),
    ("loading", "(b, (y - x) / (b - a))", "(a, (y - x) / (b - a))", "step time: of the step before"),
    ("loading", "(steps[-1] - steps[0]) % gaps[0] != 0", "(steps[-1] - steps[0]) % gaps[0] == 0", "status: off beat upside down"),
    ("loading", "return len(gaps) > 1 and rows[-1]", "return len(gaps) > 0 and rows[-1]", "status: off beat after one gap"),
    ("loading", 'last["step"] == last.get("iterations") or by_itself', 'last["step"] <= (last.get("iterations") or 0) or by_itself',
     "status: complete before the last step"),
    ("loading", 'best = min(good, key=lambda row: row["val_loss"], default={})\n    step, time_ms = rows[-1]',
     'best = max(good, key=lambda row: row["val_loss"], default={})\n    step, time_ms = rows[-1]', "worst for best loss"),
    ("loading", '"final_val_loss": vals[-1]["val_loss"] if vals', '"final_val_loss": vals[0]["val_loss"] if vals', "first for last loss"),
    ("loading", "None if time_ms is None else time_ms / 1000,\n        \"step_avg_ms\"",
     "None if time_ms is None else time_ms,\n        \"step_avg_ms\"", "train time: ms for s"),
    ("loading", "average or (time_ms / step if", "average or (time_ms if", "average: whole time"),
    ("loading", "if ms >= at / 2 else", "if ms >= at else", "gaps: a jitter taken for a reset"),
    ("loading", "ms >= at / 2 else ([], 0.0)", "ms >= at / 2 else (found, 0.0)", "gaps: time before a reset counts"),
    ("loading", "(before, row[\"step\"], ms - at)", "(before, row[\"step\"], ms)", "gaps: time from the start"),
    ("loading", "-(-last * i // 4)", "last * i // 4", "quarters: rounded down"),
    ("loading", "stages[i][0] <= at", "stages[i][0] < at", "stages: the last step of a stage"),
    ("loading", "ms * (end - at) / (step - before)", "ms", "stages: a gap counts in each stage"),
    ("loading", "AFTER if step == last else", "AFTER if step != last else", "stages: after the last step"),
    ("loading", "found[name] = old_ms + ms, old_steps + steps", "found[name] = ms, steps", "stages: the last gap only"),
    # arms
    ("arms", "seen.setdefault((sample.steps, sample.loss, sample.time_s), [])", "seen.setdefault((sample.steps, sample.loss), [])",
     "copies: other times"),
    ("arms", "1 / SLOWER < step_s([sample]) / mean < SLOWER", "step_s([sample]) / mean < SLOWER", "cells: a faster machine"),
    ("arms", "home = fuller[0] if len(fuller) == 1 else", "home = fuller[0] if len(fuller) >= 1 else", "cells: any of several homes"),
    ("arms", "if len(counts) > 1 else []", "if len(counts) > 2 else []", "two versions are no mixture"),
    ("arms", "times = [s.time_s / s.steps for s in samples", "times = [s.time_s for s in samples", "step time: whole time"),
    ("arms", "return all(known.get(row[\"step\"], row[\"val_loss\"]) == row[\"val_loss\"]",
     "return any(known.get(row[\"step\"], row[\"val_loss\"]) == row[\"val_loss\"]", "copies: one equal validation"),
    ("arms", "key=lambda cell: -len(cell.samples))", "key=lambda cell: len(cell.samples))", "smallest cell first"),
    ("arms", 'numbers["status"] != "complete":', 'numbers["status"] == "nan":', "runs that died count"),
    ("arms", "if not math.isfinite(loss):", "if math.isinf(loss):", "nan counts"),
    ("arms", "key=lambda i: (dates[i], i)", "key=lambda i: (dates[i], -i)", "session: order of equal dates"),
)]
EQUIVALENT = {}


class Outcome(NamedTuple):
    mutant: Mutant
    word: str
    detail: str
    seconds: float


def copy_of_tree(folder: Path):
    """runlogs/, logger.py and what their tests need, in `folder`."""
    for name in ("runlogs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*ROOT.glob("*.py"), ROOT / "pyproject.toml"]:
        shutil.copy(path, folder)
    for name in ("records", "docs", "bench", "data", "evals"):
        (folder / name).symlink_to(ROOT / name)


def tests_fail(folder: Path, file: str) -> str:
    """The first failing test of the file's tests, "" if all pass."""
    paths = [f"tests/test_logger_{name}.py" for name in TESTS[file]]
    paths = [path for path in paths if (folder / path).exists()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "--tb=no", "-p", "no:randomly", *paths]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    except subprocess.TimeoutExpired:
        return "no end within 600 s"
    if done.returncode == 0:
        return ""
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    return found[1].removeprefix("tests/") if found else f"exit code {done.returncode}: {done.stdout[-200:]}"


def outcome_of(mutant: Mutant, folder: Path) -> Outcome:
    """Put one mutant into the copy, run the tests, take it out again."""
    path, start = folder / "runlogs" / f"{mutant.file}.py", time.monotonic()
    text = path.read_text()
    if (count := text.count(mutant.old)) != 1:
        return Outcome(mutant, "does not apply", f"the text occurs {count} times", 0.0)
    path.write_text(text.replace(mutant.old, mutant.new))
    try:
        failed = tests_fail(folder, mutant.file)
    finally:
        path.write_text(text)
    known = EQUIVALENT.get(mutant[:3], "")
    word = "killed" if failed else "equivalent" if known else "SURVIVED"
    return Outcome(mutant, word, failed or known, time.monotonic() - start)


def chosen(words: list[str]) -> list[Mutant]:
    return [m for m in MUTANTS if not words or any(w in f"{m.file} {m.old} {m.why}" for w in words)]


def report(outcomes: list[Outcome]) -> int:
    """Print the counts; the exit code."""
    words = [outcome.word for outcome in outcomes]
    counts = {word: words.count(word) for word in ("killed", "equivalent", "SURVIVED", "does not apply")}
    print(f"{len(outcomes)} mutants: " + ", ".join(f"{count} {word}" for word, count in counts.items()))
    return 1 if counts["SURVIVED"] or counts["does not apply"] else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the mutants to run (default: all)")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{m.file}: {m.why}\n  - {m.old.strip()}\n  + {m.new.strip()}" for m in chosen(args.words)))
        return 0
    outcomes = []
    with tempfile.TemporaryDirectory() as name:
        copy_of_tree(folder := Path(name))
        for file in dict.fromkeys(m.file for m in chosen(args.words)):
            if failed := tests_fail(folder, file):
                print(f"without a mutant {failed} fails: repair that first")
                return 1
        for mutant in chosen(args.words):
            outcomes.append(one := outcome_of(mutant, folder))
            print(f"{one.word:<14} {mutant.file}: {mutant.why} ({one.seconds:.1f} s) {one.detail}", flush=True)
    return report(outcomes)


if __name__ == "__main__":
    sys.exit(main())
