"""What `stats` found -> text: on the terminal, and as the statistics.md of a record folder."""

import re

from runlogs.arms import session_of
from runlogs.judging import SIGMA_RULE, compared, group_numbers, target_numbers
from runlogs.loading import settings_of
from runlogs.reporting import Table, passed, plus_minus, show, welch_cells

MOST = 60  # runs of a table on the terminal, and legs of a session in a sentence
UNITS = (("val loss", "val_loss", "+.5f"), ("train s", "train_time_s", "+.3f"))


def stats_report(evidence, result):
    """The report on the terminal: arms and cells, runs, difference, verdict, warnings."""
    record, report = evidence.arm("record"), [cell_table(result)]
    if len(record.samples) <= MOST:
        rows = [[s.name, f"{s.loss:.5f}", show(s.time_s, ",.3f"), s.steps, cell.label]
                for cell in record.cells for s in cell.samples]
        report.append(Table(["run", "val loss", "train s", "steps", "cell"], rows, names=True, extras=("cell",)))
    if result["baseline"]:
        report += [*difference_lines(result["difference"]), session_line(result["session"])]
    report += verdict_lines(result)
    warnings = [f"warning: {text}" for text in [*result["warnings"], *result["notes"]]]
    others = {"baseline": result["baseline"], **result["other_arms"]}
    return report + warnings + [f"warning: {name}: {text}" for name, arm in others.items() if arm
                                for text in arm["warnings"]]


def cell_table(result):
    """A row for each cell of each arm."""
    arms = {"record": result, "baseline": result["baseline"], **result["other_arms"]}
    rows = []
    for name, arm in ((name, arm) for name, arm in arms.items() if arm):
        for cell in arm["cells"]:
            machine = machine_of(cell["processes"], cell["hardware"])
            rows.append([name, cell["label"], cell["n"], plus_minus(cell["mean_val_loss"], cell["sd_val_loss"], ".5f"),
                         plus_minus(cell["mean_time_s"], cell["sd_time_s"], ",.3f"), show(cell["mean_step_ms"], ",.2f"),
                         cell["steps"][0], machine, cell["code"] or "no source"])
    headings = ["arm", "cell", "n", "val loss", "train s", "ms/step", "steps", "hardware", "code"]
    return Table(headings, rows, extras=("code", "ms/step", "hardware", "steps"))


def difference_lines(found):
    """Record minus baseline, as a Table and the gain in a sentence, or why there is none."""
    if not found["baseline"]:
        return [f"record and baseline are not compared: {found['why']}"]
    rows = [[what, *welch_cells(found[key], form)] for what, key, form in UNITS]
    title = "record minus baseline" + (f" ({found['baseline']})" if found["baseline"] != "all" else "")
    return [Table([title, "difference", "95 % interval", "p (Welch)", "Cohen's d"], rows), *gain_line(found["gain"])]


def gain_line(gain):
    """[the gain in a sentence]."""
    if not gain:
        return []
    about = f"gain on the same machine: {gain['time_s']:+.3f} s, {gain['percent']:+.2f} %"
    if gain["ci_low"] is None or gain["percent_low"] is None:
        return [f"{about}; no interval: it needs two runs of each"]
    return [f"{about} (95 %: {gain['ci_low']:+.3f} to {gain['ci_high']:+.3f} s, "
            f"{gain['percent_low']:+.2f} to {gain['percent_high']:+.2f} %)"]


def session_line(session):
    """The order of the session in a sentence."""
    if session["order"] is None:
        return (f"order of the session not known: {session['undated']} of the logs do not say when they began; cold or "
                "warm caches not known")
    legs = session["order"].split(" ")
    order = " ".join(legs[:MOST]) + (f" and {len(legs) - MOST} more" if len(legs) > MOST else "")
    how = {None: "", True: ", interleaved", False: ", NOT interleaved: all of one arm, then all of the other"}
    return (f"order of the session (P record, B baseline): {order}{how[session['interleaved']]}; from "
            f"{session['first']} to {session['last']}; cold or warm caches not known")


def verdict_lines(result):
    """What the losses say about the target, in sentences; nothing about a mixture."""
    if result["mixture"]:
        labels = "; ".join(cell["label"] for cell in result["cells"][:12])
        return [f"no verdict: {result['mixture']}; choose one with --cell LABEL_OR_HASH: {labels}"]
    return target_lines(result["test"], result["n"]) if result["test"] else []


def target_lines(test, n):
    """What the test says, in sentences."""
    p, alpha, rule = test["p_value"], test["alpha"], test["sigma_rule"]
    lines = ["no t-test: it needs two runs that are not equal" if p is None else
             f"one-sided t-test that the mean loss is below {test['target']}: p = {p:.2g}, "
             f"{passed(test)} (p < {alpha})",
             f"track 3's rule with a fixed sd of 0.0013: (target - mean) * sqrt(n) = "
             f"{rule['value']:+.4f}, {passed(rule)} (>= {SIGMA_RULE})"]
    if test["detectable_margin"] is not None:
        lines.append(f"{n} runs with this spread show a mean that is {test['detectable_margin']:.5f} below the target")
    if test["more_runs"]:
        lines.append(f"for p < {alpha} at this mean and spread {test['runs_needed']} runs are needed, "
                     f"{test['more_runs']} more")
    elif test["runs_needed"] is None and p is not None:
        lines.append("no number of runs would show it at this mean and spread")
    return lines


# -- statistics.md


def statistics_report(evidence, result):
    """The statistics.md of a record folder: what ran, numbers and legs of each arm in order, then the difference."""
    record, baseline = evidence.arm("record"), evidence.arm("baseline")
    arms = [arm for arm in (record, baseline) if arm.samples]
    legs = legs_of(arms, compared(record, baseline))
    report = [f"# Statistics of {evidence.folder.name}", "Protocol: " + session_line(result["session"]) + "."]
    for arm in arms:
        found = result if arm.name == "record" else result["baseline"]
        for one in arm.cells:
            title = arm.name if len(arm.cells) == 1 else f"{arm.name}: {one.label}"
            report += [f"## {title}", Table(["", "value"], [*facts_of(one), *numbers_of(one, result["test"])]),
                       leg_table(one, legs)]
        report += [f"{arm.name}: {text}" for text in found["warnings"]]
    if len(arms) > 1:
        report += ["## Record minus baseline", *difference_lines(result["difference"])]
    verdict = verdict_lines(result)
    return report + (["## Target", *verdict] if verdict else []) + [f"note: {text}" for text in result["notes"]]


def legs_of(arms, session):
    """{id of a sample: its place in the session, None: unknown}; cells that are not compared have their own."""
    known = set(map(id, session))
    groups = [session, *([s for s in cell.samples if id(s) not in known] for arm in arms for cell in arm.cells)]
    found = {}
    for samples in groups:
        ordered = session_of(samples)
        for i, s in enumerate(ordered or samples, 1):
            found[id(s)] = i if ordered else None
    return found


def facts_of(cell):
    """Rows on what the runs of a cell share: commit, GPUs, versions."""
    run = cell.samples[0].run
    header = run.trace.header
    gits = [found for s in cell.samples if isinstance(found := s.run.config.get("git"), dict)]
    commits = sorted({str(found.get("commit")) for found in gits})
    dirty = any(found.get("dirty") for found in gits)
    torch = run.config.get("torch") or header.get("torch")
    versions = {"Python": header.get("python"), "PyTorch": torch, "CUDA": header.get("cuda"),
                "Triton": header.get("triton"), "driver": header.get("driver")}
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value not in (None, "", "None"))
    return [["commit", (", ".join(commits) or "not known") + (" with changes" if dirty else "")],
            ["code", cell.code or "no source in the logs"], ["hardware", machine_of(cell.processes, cell.hardware)],
            ["versions", known or "not known"]]


def machine_of(processes, hardware):
    """Number and name of the devices, as far as they are known."""
    return (f"{processes} x " if processes else "") + (hardware or "not known")


def numbers_of(cell, test):
    """Rows of a cell's numbers; t and p against the target of `test`."""
    n = group_numbers(cell.samples)
    rows = [["n", n["n"]], ["train s", plus_minus(n["mean_time_s"], n["sd_time_s"], ".3f")],
            ["val loss", plus_minus(n["mean_val_loss"], n["sd_val_loss"], ".5f")], ["steps", cell.steps]]
    if test and not test.get("mixture"):
        found = target_numbers(cell.samples, test["target"], test["alpha"])
        rows += [[f"t against {test['target']}", show(found["t"], "+.3f")],
                 ["one-sided p", show(found["p_value"], ".3g")]]
    return rows


def leg_table(cell, legs):
    """Table of the runs of a cell in the order of the session."""
    rows = [[show(legs[id(s)]), show(seed_of(s)), s.name, s.steps, f"{s.loss:.5f}", show(s.time_s, ".3f")]
            for s in sorted(cell.samples, key=lambda s: legs[id(s)] or 0)]
    return Table(["leg", "seed", "log", "steps", "loss", "train s"], rows)


def seed_of(sample):
    """Seed of a run by its settings, else by the name of its file (seed_3.txt); None where neither says it."""
    seed = settings_of(sample.run).get("seed")
    match = re.search(r"seed[_-]?(\d{1,9})(?!\d)", sample.run.path.name, re.I | re.ASCII)
    return seed if seed is not None else match and match[1]


def plan_report(plan):
    """A look after each run, and what to do now."""
    rows = [[str(n), f"{look['loss']:.5f}", *look_cells(look)] for n, look in enumerate(plan["looks"], 1)]
    title = f"looks at the runs {plan['order']}; t = (target - mean) * sqrt(n) / sd"
    headings = ["run", "val loss", "mean", "sd", "t", "needed", "chance", "says"]
    return [Table(headings, rows, title), plan["sentence"]]


def look_cells(look):
    if "mean" not in look:
        return ["", "", "", "", "", look["says"]]
    least = "at least" if look["boundary"] is None else "about"
    more = f", {least} {look['more']} more" if look["more"] else ""
    numbers = [show(look[key], form) for key, form in (("sd", ".5f"), ("t", ".2f"), ("boundary", ".2f"))]
    chance = "-" if look["chance"] is None else f"{100 * look['chance']:.0f} %"
    return [f"{look['mean']:.5f}", *numbers, chance, look["says"] + more]
