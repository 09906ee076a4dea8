"""Reports: lists of sentences, Tables and lines of code -> plain text, Markdown, terminal."""

import math
import os
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

from runlogs.judging import SIGMA_RULE, group_numbers, versions
from runlogs.loading import accuracy, differing, summarize
from runlogs.output import printable, say, strict_json
from runlogs.parsing import ACCURACIES, MAX_CELL


def show(value, form=""):
    return "-" if value is None else format(value, form)


def clip(value, most=60):
    text = "-" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def cell_text(value):
    return printable(clip(value, MAX_CELL))


@dataclass
class Table:
    """Headings and rows of cells; a column of numbers is aligned right. `title` is a line above it."""

    headings: list[str]
    rows: list[list[str]]
    title: str = ""

    def __post_init__(self):
        self.title, self.headings = printable(clip(self.title, MAX_CELL)), [*map(cell_text, self.headings)]
        self.rows = [[*map(cell_text, row)] for row in self.rows]
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(self.headings)
        self.aligns = [">" if all(re.fullmatch(r"[-+\d.,/ e%]*|nan|inf", cell) for cell in column) else "<"
                       for column in columns]

    def plain(self):
        """Lines; wide East Asian characters count as two."""
        columns = [list(column) for column in zip(self.headings, *self.rows, strict=True)]
        for column, align in zip(columns, self.aligns, strict=True):
            widths = [sum(1 + (east_asian_width(c) in "WF") for c in cell) for cell in column]
            pads = [" " * (widest - width) for widest in [max(widths)] for width in widths]
            column[:] = [cell + pad if align == "<" else pad + cell for cell, pad in zip(column, pads, strict=True)]
        return [*filter(None, [self.title]), *("  ".join(cells).rstrip() for cells in zip(*columns, strict=True))]

    def markdown(self):
        def line(cells):
            cells = (re.sub(r"([\\|<>`*_\[\]])", r"\\\1", cell) for cell in cells)
            return f"| {' | '.join(cells)} |"

        rule = "|".join("--:" if align == ">" else "---" for align in self.aligns)
        return [*([f"**{self.title}**", ""] if self.title else []), line(self.headings), f"|{rule}|",
                *map(line, self.rows), ""]

    def rich(self):
        """A rich Table of plain Text cells: nothing in them is read as markup."""
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(title=Text(self.title) if self.title else None, title_justify="left", header_style="bold")
        for heading, align in zip(self.headings, self.aligns, strict=True):
            table.add_column(Text(heading), justify="right" if align == ">" else "left")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def plain(report):
    """Text of a report: a list of sentences, Tables, and lists of lines, as of code."""
    lines = []
    for block in report:
        lines += block.plain() if isinstance(block, Table) else [block] if isinstance(block, str) else block
    return "\n".join(map(printable, lines))


def markdown(report):
    """A report as Markdown; lines of code are fenced."""
    fence, lines = "`" * 12, []
    for block in report:
        code = [fence + "diff", *block, fence, ""] if isinstance(block, list) else None
        lines += code or (block.markdown() if isinstance(block, Table) else [block.replace("<", "&lt;"), ""])
    return "\n".join(map(printable, lines))


def emit(report, args):
    """Print a report: Markdown if asked for, rich tables on a terminal, else plain text."""
    if getattr(args, "markdown", False):
        say(markdown(report).split("\n"))
    elif sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        from rich.console import Console
        from rich.text import Text

        for block in report:
            table = isinstance(block, Table)
            Console().print(block.rich() if table else Text(plain([block])), soft_wrap=not table)
    else:
        say(plain(report).split("\n"))


COLUMNS = (  # heading, cell of a summary
    ("run", lambda s: s["run_id"]),
    ("status", lambda s: s["status"]),
    ("steps", lambda s: f"{show(s['step'])}/{show(s['iterations'])}"),
    ("val loss", lambda s: show(s["val_loss"], ".4f")),
    ("bits/byte", lambda s: show(s["val_bpb"], ".4f")),
    ("best val", lambda s: show(s["best_val_loss"], ".4f")),
    ("train s", lambda s: show(s["train_time_ms"] and s["train_time_ms"] / 1000, ",.1f")),
    ("ms/step", lambda s: show(s["step_avg_ms"], ",.2f")),
    ("tokens/s", lambda s: show(s["tokens_per_s"], ",.0f")),
    ("peak MiB", lambda s: show(s["peak_memory_mib"], ",.0f")),
    ("torch", lambda s: show(s["torch"])),
    ("device", lambda s: show(s["device"])),
)


def format_mean(summaries):
    """Mean, sample sd (n - 1) and n of the completed runs' final val loss; "" with fewer than two."""
    losses = [s["val_loss"] for s in summaries if s["completed"] and s["val_loss"] is not None]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if len(losses) < 2:
        return ""
    mean, sd = statistics.mean(losses), statistics.stdev(losses)
    rest = len(summaries) - len(losses)
    return f"final val loss of completed runs: {mean:.4f} +- {sd:.4f} (mean +- sd, n={len(losses)}, {rest} left out)"


def percent(share):
    return show(share and 100 * share, ".1f") + " %" * (share is not None)


ROUTER_COLUMNS = (  # heading, cell of a summary
    ("routers of", lambda s: s["run_id"]),
    ("step", lambda s: show(s["routers"]["step"])),
    ("mixtures", lambda s: show(len(s["routers"]["layers"]))),
    ("experts", lambda s: show(s["routers"]["experts"])),
    ("least effective", lambda s: f"{s['routers']['effective_experts']:.1f} in layer {s['routers']['worst_layer']}"),
    ("max/mean", lambda s: show(s["routers"]["max_over_mean"], ".2f")),
    ("CV", lambda s: show(s["routers"]["cv"], ".2f")),
    ("dead", lambda s: show(s["routers"]["dead"])),
    ("dropped", lambda s: percent(s["routers"]["dropped"])),
    ("parameters", lambda s: show(s["params_total"], ",")),
    ("active", lambda s: show(s["params_active"], ",")),
)


def router_report(summaries):
    """[Table of the last report of each run's routers, the worst of its layers]; [] without one."""
    summaries = [s for s in summaries if s["routers"]]
    rows = [[cell(s) for _, cell in ROUTER_COLUMNS] for s in summaries]
    return [Table([heading for heading, _ in ROUTER_COLUMNS], rows)] if rows else []


def hellaswag_report(summaries):
    """[Table of the last HellaSwag score of each run]; [] without one."""
    found = [(s["run_id"], s["hellaswag"]) for s in summaries if s["hellaswag"]]
    rows = [[run_id, str(score["step"]), f"{score['tasks']:,}",
             *("{:.1f} +- {:.1f} %".format(*accuracy(score, key)) for key in ACCURACIES)]
            for run_id, score in found]
    headings = ["HellaSwag of", "step", "tasks", "per token", "per byte", "raw"]
    return [Table(headings, rows)] if rows else []


def experiment_report(name, runs):
    """The report of an experiment."""
    summaries, names = [summarize(run) for run in runs], differing(runs)
    report = [f"{name}: {len(runs)} run(s), losses in nats/token"]
    report.append(Table([heading for heading, _ in COLUMNS], [[cell(s) for _, cell in COLUMNS] for s in summaries]))
    report += router_report(summaries) + hellaswag_report(summaries)
    report += filter(None, [format_mean(summaries)])
    names = ", ".join(names)
    report += [f"settings that differ between the runs: {names}"] if names else []
    return report + [f"note on {s['run_id']}: {note}" for s in summaries for note in s["notes"]]


def format_json(runs):
    """{"runs": [summary, ...]} as strict JSON; the status says nan where a loss is null."""
    return strict_json({"runs": [summarize(run) for run in runs]})


def seconds(value):
    return "-" if value is None else f"{value:,.1f} s" if value < 600 else f"{value:,.1f} s ({value / 60:,.1f} min)"


def parameters(total, active):
    """The number of parameters, and of those that a token meets if they are fewer."""
    return show(total, ",") + (f", {active:,} of them active" if active is not None and active != total else "")


def router_line(found):
    """What router_numbers found, in a line; None for None."""
    if not found:
        return None
    dropped = f", {percent(found['dropped'])} dropped" if found["dropped"] else ""
    return (f"step {found['step']}: {found['effective_experts']:.1f} of {found['experts']} experts effective in layer "
            f"{found['worst_layer']}, max/mean {found['max_over_mean']:.2f}, CV {found['cv']:.2f}, "
            f"{found['dead']} dead{dropped}")


def extras_line(extras, most=12):
    """Other numbers of the last validation as `key 1.5, key 2`."""
    words = [f"{key} {value:.6g}" for key, value in [*extras.items()][:most]]
    return ", ".join(words) + (f" and {len(extras) - most} more" if len(extras) > most else "")


def screen(numbers):
    """One run as a two-column Table."""
    n, status, best = numbers, numbers["status"], numbers["best_val_loss"]
    place = f" at step {show(n['steps'])} of {show(n['max_step'])}"
    place = place if status in ("died", "nan", "error", "running") else ""
    memory = [f"{n[key]:,} MiB {key.split('_')[1]}" for key in ("peak_allocated_mib", "peak_reserved_mib") if n[key]]
    known = [f"{key} {n[key]}" for key in ("python", "torch", "cuda", "triton", "driver") if n[key]]
    crossed = n["target_crossing"] or {}
    where = f"step {crossed.get('step')}, {seconds(crossed.get('train_time_s'))}" if crossed else "not reached"
    rows = [("status", status + place), ("format", n["era"]), ("trials", show(n["trials"])),
            ("steps", f"{show(n['steps'])} of {show(n['max_step'])}"),
            ("final val loss", show(n["final_val_loss"], ".5g")),
            ("best val loss", best and f"{show(best, '.5g')} at step {show(n['best_val_step'])}"),
            ("bits per byte", show(n["final_val_bpb"], ".6g")), ("extras", extras_line(n["extras"])),
            ("training time", seconds(n["train_time_s"])),
            ("step average", n["step_avg_ms"] and f"{n['step_avg_ms']:,.2f} ms"),
            (f"target {show(n['target'])}", where), ("peak memory", ", ".join(memory)),
            ("hardware", show(n["gpus"])), ("versions", ", ".join(known)),
            ("parameters", parameters(n["params_total"], n["params_active"])), ("routers", router_line(n["routers"])),
            ("training tokens", show(n["tokens"], ",")),
            ("tokens of the data", show(n["data_tokens"], ",")),
            ("date", show(n["date"])), ("code", f"{show(n['code_hash'])} {' '.join(n['parts'])}")]
    rows += [(f"trial {i}", f"val loss {show(t['final_val_loss'], '.5g')}, {seconds(t['train_time_s'])}, {t['status']}")
             for i, t in enumerate(n["trial_runs"], 1)]
    rows = [(key, value) for key, value in rows if value not in ("-", None, "")] + [("note", w) for w in n["warnings"]]
    return Table(["run", n["path"]], [[key, str(value)] for key, value in rows])


def run_table(found):
    """Many runs as a Table, a line each."""
    rows = [[n["path"], n["status"], show(n["trials"]), f"{show(n['steps'])}/{show(n['max_step'])}",
             show(n["final_val_loss"], ".4f"), show(n["best_val_loss"], ".4f"), show(n["train_time_s"], ",.1f"),
             show(n["step_avg_ms"], ",.2f"), n["peak_allocated_mib"], n["torch"], n["gpus"], n["code_hash"]]
            for n in found]
    headings = "run,status,trials,steps,val loss,best val,train s,ms/step,peak MiB,torch,hardware,code".split(",")
    return Table(headings, rows)


def plus_minus(mean, sd, form):
    return "-" if mean is None else f"{mean:{form}}" + ("" if sd is None else f" +- {sd:{form}}")


def group_table(groups):
    """{name: samples} as a Table."""
    rows = []
    for name, samples in groups.items():
        n = group_numbers(samples)
        steps = n["steps"]
        rows.append([name, str(n["n"]), plus_minus(n["mean_val_loss"], n["sd_val_loss"], ".5f"),
                     plus_minus(n["mean_time_s"], n["sd_time_s"], ",.2f"), show(n["mean_step_ms"], ",.2f"),
                     f"{steps[0]}-{steps[-1]}" if len(steps) > 1 else str(*steps), len(versions(samples))])
    return Table(["group", "n", "val loss", "train s", "ms/step", "steps", "code versions"], rows)


def control_report(found):
    """[Table of what control_numbers found], or [why there is none]."""
    if not found:
        return []
    if "refused" in found:
        return [f"tokens, steps and seconds to a loss: not comparable, {found['refused']}"]
    rows = []
    for run in found["runs"]:
        at = run["reached"]
        spent = [f"{at['tokens']:,.0f}", f"{at['step']:,.0f}", f"{at['train_time_ms'] / 1000:,.1f}"] if at else []
        ratios = [show(run[key], ".3f") for key in ("step_time_ratio", "break_even_ratio")]
        rows.append([run["name"], *(spent or ["not reached", "-", "-"]), *ratios])
    headings = [f"to val loss {found['loss']:.4f}", "tokens", "steps", "seconds", "step time ratio", "break-even"]
    return [Table(headings, rows)]


def compare_report(groups, result):
    report, names = [group_table(groups)], list(groups)
    if any(group["params_active"] != group["params_total"] for group in result["groups"]):
        rows = [[g["name"], show(g["params_total"], ","), show(g["params_active"], ",")] for g in result["groups"]]
        report.append(Table(["parameters of", "all", "active"], rows))
    rows = [[f"{what} of {pair['b']}", *welch_cells(pair[key], form)] for pair in result["pairs"]
            for what, key, form in (("val loss", "val_loss", "+.5f"), ("train s", "train_time_s", "+.3f"))]
    report.append(Table(["minus that of " + names[0], "difference", "95 % interval", "p (Welch)", "Cohen's d"], rows))
    for pair in result["pairs"]:
        if not (rule := pair["sigma_rule"]):
            report.append(f"no test of {pair['b']} against {names[0]}: {pair['why']}; choose with --cell")
            continue
        words = f"{rule['value']:+.4f}, {passed(rule)} (>= {SIGMA_RULE})"
        report.append(f"track 3's rule for {pair['b']} beating {names[0]}: {words}")
    report += stage_report(names, result)
    forms = {"step": lambda v: f"step {v:,.0f}", "tokens": lambda v: f"{v:,.0f} tokens",
             "train_time_ms": lambda v: f"{v / 1000:,.2f} s"}
    rows = [[forms[x](point["at"]), *(f"{mean:.4f}" for mean in point["means"]),
             *(f"{mean - point['means'][0]:+.4f}" for mean in point["means"][1:])]
            for x, points in result["equal"].items() for point in points]
    report.append(Table(["val loss at", *names, *(f"{name} - {names[0]}" for name in names[1:])], rows))
    if not result["equal"]["tokens"]:
        report.append("equal tokens: not all of these logs count their tokens")
    report += control_report(result["control"])
    return report + [f"note on {group['name']}: {text}" for group in result["groups"]
                     for text in group["warnings"]]


def stage_report(names, result):
    """Tables of the time of a step in each group, and of the time of a run in each stage for each pair."""
    times = result["step_ms"].values()
    stages = dict.fromkeys(stage for found in times for stage in found)
    rows = [[stage, *(mean_half(found.get(stage)) for found in times)] for stage in stages]
    report = [Table(["ms of a step, 95 %", *names], rows)]
    for pair in result["pairs"]:
        rows = []
        for stage in pair["stages"]:
            low, high = stage["ci_low"], stage["ci_high"]
            interval = "-" if low is None else f"{low:+.3f} to {high:+.3f}"
            rows.append([stage["stage"], f"{stage['a_s']:,.3f}", f"{stage['b_s']:,.3f}",
                         f"{stage['difference']:+.3f}", interval])
        title = f"seconds of a run by stage: A is {pair['a']}, B is {pair['b']}"
        report += [Table(["stage", "A", "B", "B - A", "95 % interval"], rows, title)] if rows else []
    return report


def mean_half(found):
    """A mean with half of its interval."""
    if not found:
        return "-"
    half = "" if found["ci_low"] is None else f" +- {(found['ci_high'] - found['ci_low']) / 2:,.2f}"
    return f"{found['mean']:,.2f}{half}"


def passed(test):
    return "passed" if test["passed"] else "not passed"


def welch_cells(test, form):
    if not test:
        return ["-", "-", "-", "-"]
    interval = f"{test['ci_low']:{form}} to {test['ci_high']:{form}}"
    return [f"{test['difference']:{form}}", interval, f"{test['p_value']:.2g}", f"{test['cohens_d']:+.2f}"]


def operation_table(numbers, top):
    """The heaviest operations of a trace as a Table; shares are of all of them."""
    found = numbers["operations"]
    total = sum(us for _, us, _ in found) or 1
    rows = [[clip(name), f"{us / 1000:,.3f}", percent(us / total), calls, f"{us / calls:,.1f}"]
            for name, us, calls in found[:top]]
    title = f"{Path(numbers['trace']).stem}: the heaviest of {len(found)} {numbers['kind']}"
    return Table(["name", "self ms", "share", "calls", "us a call"], rows, title)


def profile_line(numbers):
    """The steps of a trace in a sentence."""
    times = (numbers[key] for key in ("communication_us", "beside_us", "step_us"))
    talk, beside, step = (show(us and us / 1000, ",.1f") for us in times)
    idle = f", device idle {percent(numbers['idle'])}" if numbers["idle"] is not None else ""
    return (f"{numbers['steps']} steps: communication {talk} ms, {beside} ms of it beside "
            f"computation; {step} ms a step{idle}")


def diff_report(result, no_text):
    report = [f"A: {result['a']}", f"B: {result['b']}"]
    report += result["blocks"]
    if result["settings"]:
        rows = [[s["name"], clip(s["a"]), clip(s["b"])] for s in result["settings"]]
        report.append(Table(["setting or constant", "A", "B"], rows))
    else:
        report.append("no setting or constant differs")
    if result["units"]:
        report.append(Table(["function or class", "change"], [[u["name"], u["change"]] for u in result["units"]]))
    report += result["notes"]
    if result["unified_diff"] and not no_text:
        report.append([line.expandtabs(4) for line in result["unified_diff"]])
    same = "the same Python, PyTorch, driver and hardware"
    rows = [[e["name"], e["a"], e["b"]] for e in result["environment"]]
    report.append(Table(["environment", "A", "B"], rows) if rows else same)
    effect, rows = result["effect"], []
    for key, form in (("val_loss", ",.5f"), ("train_time_s", ",.3f"), ("steps", ",.0f")):
        e = effect[key]
        cells = welch_cells(e["test"], "+" + form)[1:3]
        rows.append([key, show(e["a"], form), show(e["b"], form), show(e["difference"], "+" + form), *cells])
    headings = ["mean", f"A (n={effect['n_a']})", f"B (n={effect['n_b']})", "B - A", "95 % interval", "p (Welch)"]
    return [*report, Table(headings, rows)]
