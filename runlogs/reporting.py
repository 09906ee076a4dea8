"""Reports: lists of sentences, Tables and lines of code -> plain text, Markdown, terminal."""

import math
import os
import re
import shutil
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from unicodedata import east_asian_width

from runlogs.judging import SIGMA_RULE, group_numbers, versions
from runlogs.loading import accuracy, counted, differing, summarize
from runlogs.output import printable, say, strict_json
from runlogs.parsing import ACCURACIES, MAX_CELL

MAX_DIFFERENCES = 200  # rows of a table of `diff`


def show(value, form=""):
    return "-" if value is None else format(value, form)


def clip(value, most=60):
    text = "-" if value is None else str(value)
    return text if len(text) <= most else text[: most - 1] + "…"


def cell_text(value):
    return printable(clip(value, MAX_CELL))


def wide(text):
    """Columns that a text takes on a terminal: wide East Asian characters take two."""
    return len(text) + (0 if text.isascii() else sum(east_asian_width(c) in "WF" for c in text))


def fitting(characters, most):
    """The first of the characters that fit in so many columns."""
    for i, c in enumerate(characters):
        most -= wide(c)
        if most < 0:
            return characters[:i]
    return characters


def cut(text, most, head=None):
    """`text` in at most so many columns, its middle left out; `head`: columns before the gap."""
    if wide(text) <= most:
        return text
    start = fitting(text, (most - 1) // 2 if head is None else head)
    return f"{start}…{fitting(text[::-1], most - 1 - wide(start))[::-1]}"


def short_names(names, most):
    """Names in at most so many columns, cut where they stay apart, if there is such a place."""
    prefix = len(os.path.commonprefix(names))
    middle, best = (most - 1) // 2, []
    for start in sorted(range(most), key=lambda start: abs(start - middle)):
        for own in (names, ["…" + name[prefix:] for name in names] if prefix > 1 else names):
            found = [cut(name, most, start) for name in own]
            best = found if len(set(found)) > len(set(best)) else best
        if len(set(best)) == len(set(names)):
            break
    return best


def wrap(text, most):
    """Lines of at most so many columns, broken at spaces; a longer word after one of ._/(,- or anywhere."""
    if wide(text) <= most:
        return [text]
    lines, width = [""], 0
    for word in re.findall(r"\s*\S+", text):
        if width + wide(word) > most and wide(word.lstrip()) <= most:
            lines.append("")
            word, width = word.lstrip(), 0
        for c in [word] if width + wide(word) <= most else pieces_of(word, most):
            if width + wide(c) > most:
                lines.append("")
                c, width = c.lstrip(), 0
            lines[-1], width = lines[-1] + c, width + wide(c)
    return lines


def pieces_of(word, most):
    """Where a word that is too long may be broken: as few pieces as fit, each whole or its characters."""
    pieces = re.findall(r"[^._/(,-]*[._/(,-]|[^._/(,-]+", word)
    return [c for piece in pieces for c in ([piece] if wide(piece) <= most else piece)]


NAME_LEAST, STATE_LEAST, TEXT_LEAST = 26, 18, 10  # columns of a name with `extras` beside it, its state, any text


@dataclass
class Table:
    """Headings and rows of cells; a column of numbers is aligned right. `title` is a line above it. To be narrower, a
    table leaves out its `extras`, headings from the least important on, and wraps its texts; one of `names` cuts the
    first column instead, for a line a row."""

    headings: list[str]
    rows: list[list[str]]
    title: str = ""
    extras: tuple = ()
    names: bool = False

    def __post_init__(self):
        self.title, self.headings = printable(clip(self.title, MAX_CELL)), [*map(cell_text, self.headings)]
        self.rows = [[*map(cell_text, row)] for row in self.rows]
        columns = zip(*self.rows, strict=True) if self.rows else [[]] * len(self.headings)
        self.aligns = [">" if all(re.fullmatch(r"[-+~\d.,/ e%]*|nan|inf", cell) for cell in column) else "<"
                       for column in columns]

    def column_widths(self):
        columns = zip(self.headings, *self.rows, strict=True)
        return [max(map(wide, column)) for column in columns]

    def without(self, heading):
        """The table without a column."""
        i = self.headings.index(heading)
        headings, *rows = ([*row[:i], *row[i + 1 :]] for row in (self.headings, *self.rows))
        return Table(headings, rows, self.title, self.extras, self.names)

    def relative(self):
        """A table of names that are all in one folder, which its title says instead."""
        names = [row[0] for row in self.rows]
        folder = os.path.commonprefix([name[: name.rfind("/") + 1] for name in names])
        folder = folder[: folder.rfind("/") + 1]
        if len(names) < 2 or not folder:
            return self
        rows = [[name[len(folder) :], *row[1:]] for name, row in zip(names, self.rows, strict=True)]
        return Table(self.headings, rows, self.title or f"in {folder}", self.extras, self.names)

    def least_widths(self):
        """What each column can be narrowed to: numbers stay whole."""
        cells = [max(map(wide, column), default=0) for column in zip(*self.rows, strict=True)] or self.column_widths()
        texts = STATE_LEAST if self.names else TEXT_LEAST
        found = [max(3, min(width, texts) if align == "<" else width)
                 for width, align in zip(cells, self.aligns, strict=True)]
        return [min(cells[0], TEXT_LEAST), *found[1:]] if self.names else found

    def empty(self):
        """The extras that nothing is known of."""
        columns = zip(self.headings, *self.rows, strict=True)
        return [name for name, *cells in columns if name in self.extras and {*cells} <= {"-", ""}]

    def too_many(self, width):
        """The extras that find no room, the most important first: each takes its own where the rest leaves some."""
        first, *others = self.column_widths()
        kept = zip(self.headings[1:], others, self.least_widths()[1:], strict=True)
        sizes = {name: size if name in self.extras else max(least, wide(name)) for name, size, least in kept}
        room = width - min(first, NAME_LEAST) - sum(size + 2 for name, size in sizes.items() if name not in self.extras)
        found = []
        for name in reversed(self.extras):
            if name in sizes and sizes[name] + 2 <= room:
                room -= sizes[name] + 2
            elif name in sizes:
                found.append(name)
        return found

    def narrowed(self, width):
        """(the table without as many of its extras as it takes, widths of its columns, headings left out)."""
        table = self.relative() if self.names else self
        for heading in table.empty() if sum(self.column_widths()) + 2 * len(self.headings) > width else []:
            table = table.without(heading)
        left_out = table.too_many(width)
        for heading in left_out:
            table = table.without(heading)
        widths, least = table.column_widths(), table.least_widths()
        while sum(widths) + 2 * (len(widths) - 1) > width:
            i = max(range(len(widths)), key=lambda i: (widths[i] > least[i]) * widths[i])
            if widths[i] <= least[i]:
                break
            widths[i] -= 1
        if table.names and table.rows and widths[0] < table.column_widths()[0]:
            names = short_names([row[0] for row in table.rows], widths[0])
            rows = [[name, *row[1:]] for name, row in zip(names, table.rows, strict=True)]
            table = Table(table.headings, rows, table.title, table.extras, True)
        return table, widths, left_out

    def lines_of(self, row, widths):
        """Cells of a row, each a list of lines."""
        cells = [*zip(row, widths, self.aligns, strict=True)]
        if self.names:
            head, *rest = cells
            return [[cut(*head[:2])], *([cut(cell, width, width - 1)] for cell, width, _ in rest)]
        return [[cut(cell, width)] if align == ">" else wrap(cell, width) for cell, width, align in cells]

    def layout(self, width=None):
        """(lines of the title and of the headings, those of the rows, headings left out) in a width."""
        table, widths, left_out = self.narrowed(width or 10**9)
        blocks = []
        for row in (table.headings, *table.rows):
            cells = table.lines_of(row, widths)
            height = range(max(map(len, cells)))
            lines = [[cell[i] if i < len(cell) else "" for cell in cells] for i in height]
            blocks.append([table.joined(line, widths) for line in lines])
        title = wrap(table.title, width or 10**9) if table.title else []
        return title, blocks[0], [line for block in blocks[1:] for line in block], left_out

    def joined(self, cells, widths):
        pads = [" " * (width - wide(cell)) for cell, width in zip(cells, widths, strict=True)]
        pairs = zip(cells, pads, self.aligns, strict=True)
        return "  ".join(cell + pad if align == "<" else pad + cell for cell, pad, align in pairs).rstrip()

    def plain(self, width=None):
        """Lines, of at most `width` columns where that can be."""
        title, head, rows, _ = self.layout(width)
        return [*title, *head, *rows]

    def markdown(self):
        def line(cells):
            cells = (re.sub(r"([\\|<>`*_\[\]])", r"\\\1", cell) for cell in cells)
            return f"| {' | '.join(cells)} |"

        rule = "|".join("--:" if align == ">" else "---" for align in self.aligns)
        return [*([f"**{self.title}**", ""] if self.title else []), line(self.headings), f"|{rule}|",
                *map(line, self.rows), ""]

    def rich(self, width=None):
        """A rich Text, nothing in which is read as markup: title and headings stand out."""
        from rich.text import Text

        title, head, rows, _ = self.layout(width)
        text = Text("\n".join(title + head), style="bold")
        return Text("\n").join([text, Text("\n".join(rows))]) if rows else text


def plain(report, width=None):
    """Text of a report: a list of sentences, Tables, and lists of lines, as of code. Tables are made to fit a width."""
    lines = []
    for block in report:
        lines += block.plain(width) if isinstance(block, Table) else [block] if isinstance(block, str) else block
    return "\n".join(map(printable, lines))


def left_out_line(report, width):
    """[what Tables leave out to fit the width, in a sentence], [] if nothing."""
    tables = [block for block in report if isinstance(block, Table)]
    names = dict.fromkeys(name for table in tables for name in table.layout(width)[-1])
    return [f"left out at {width} columns: {', '.join(names)}; --wide shows them"] if names else []


def markdown(report):
    """A report as Markdown; lines of code are fenced."""
    fence, lines = "`" * 12, []
    for block in report:
        code = [fence + "diff", *block, fence, ""] if isinstance(block, list) else None
        lines += code or (block.markdown() if isinstance(block, Table) else [block.replace("<", "&lt;"), ""])
    return "\n".join(map(printable, lines))


def emit(report, args):
    """Print a report: Markdown if asked for, bold headings on a terminal, else plain text; as wide as it, or --wide."""
    if getattr(args, "markdown", False):
        say(markdown(report).split("\n"))
        return
    width = None if getattr(args, "wide", False) else shutil.get_terminal_size().columns
    report = report + (left_out_line(report, width) if width else [])
    if not sys.stdout.isatty() or os.environ.get("NO_COLOR"):
        say(plain(report, width).split("\n"))
        return
    from rich.console import Console
    from rich.text import Text

    for block in report:
        text = block.rich(width) if isinstance(block, Table) else Text(plain([block]))
        Console().print(text, soft_wrap=True)


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
EXTRAS = ("torch", "device", "peak MiB", "tokens/s", "bits/byte", "ms/step", "best val")


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
    look = {"names": True, "extras": ("parameters", "active", "mixtures", "CV", "dropped", "experts")}
    return [Table([heading for heading, _ in ROUTER_COLUMNS], rows, **look)] if rows else []


def hellaswag_report(summaries):
    """[Table of the last HellaSwag score of each run]; [] without one."""
    found = [(s["run_id"], s["hellaswag"]) for s in summaries if s["hellaswag"]]
    rows = [[run_id, str(score["step"]), f"{score['tasks']:,}",
             *("{:.1f} +- {:.1f} %".format(*accuracy(score, key)) for key in ACCURACIES)]
            for run_id, score in found]
    headings = ["HellaSwag of", "step", "tasks", "per token", "per byte", "raw"]
    return [Table(headings, rows, names=True, extras=("raw", "per byte"))] if rows else []


def experiment_report(name, runs):
    """The report of an experiment."""
    summaries, names = [summarize(run) for run in runs], differing(runs)
    report = [f"{name}: {counted(len(runs), 'run')}, losses in nats/token"]
    rows = [[cell(s) for _, cell in COLUMNS] for s in summaries]
    report.append(Table([heading for heading, _ in COLUMNS], rows, names=True, extras=EXTRAS))
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
    where = where if best is not None else "-"  # a log of bits per byte has no loss that could reach it
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
    extras = ("code", "torch", "hardware", "peak MiB", "trials", "best val", "ms/step")
    return Table(headings, rows, names=True, extras=extras)


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
    headings = ["group", "n", "val loss", "train s", "ms/step", "steps", "code versions"]
    return Table(headings, rows, names=True, extras=("code versions", "steps", "ms/step"))


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
    return [Table(headings, rows, names=True)]


MEASURED = (("val loss", "val_loss", "+.5f"), ("train s", "train_time_s", "+.3f"))


def untested_report(first, pairs):
    """A sentence for each reason why groups are not tested against the first."""
    why = {}
    for pair in pairs:
        if not pair["sigma_rule"]:
            why.setdefault(pair["why"], []).append(pair["b"])
    return [f"no test of {', '.join(names)} against {first}: {reason}; choose with --cell"
            for reason, names in why.items()]


def compare_report(groups, result):
    report, names = [group_table(groups)], list(groups)
    if any(group["params_active"] != group["params_total"] for group in result["groups"]):
        rows = [[g["name"], show(g["params_total"], ","), show(g["params_active"], ",")] for g in result["groups"]]
        report.append(Table(["parameters of", "all", "active"], rows, names=True))
    rows = [[f"{what} of {pair['b']}", *welch_cells(pair[key], form)] for pair in result["pairs"]
            if pair["sigma_rule"] for what, key, form in MEASURED]
    headings = ["minus that of " + names[0], "difference", "95 % interval", "p (Welch)", "Cohen's d"]
    report += [Table(headings, rows, names=True, extras=("Cohen's d",))] if rows else []
    report += untested_report(names[0], result["pairs"])
    for pair in result["pairs"]:
        if rule := pair["sigma_rule"]:
            words = f"{rule['value']:+.4f}, {passed(rule)} (>= {SIGMA_RULE})"
            report.append(f"track 3's rule for {pair['b']} beating {names[0]}: {words}")
    report += stage_report(names, result)
    report += equal_report(names, result["equal"], result["equal_loss"])
    report += control_report(result["control"])
    return report + [f"note on {group['name']}: {text}" for group in result["groups"]
                     for text in group["warnings"]]


EQUAL = {  # key of a row: its name, a value of it
    "step": ("steps", "step", lambda v: f"{v:,.0f}"),
    "tokens": ("tokens", "tokens", lambda v: f"{v:,.0f}"),
    "train_time_ms": ("time", "seconds", lambda v: f"{v / 1000:,.2f}"),
}
LOSS_NAMES = {"val_loss": "val loss", "train_loss": "train loss, smoothed,"}


def equal_report(names, equal, losses):
    """Tables of the loss of the first group and of each further one at equal steps, tokens and times."""
    if not any(losses.values()):
        return ["no losses at equal steps or times: these logs hold too few, so only the last ones are compared"]
    same = same_means(equal["step"], equal["tokens"])
    few = [EQUAL[x][0] for x, loss in losses.items() if loss == "train_loss" and not (same and x == "tokens")]
    words = f"too few validations at equal {' and '.join(few)}: the loss of training takes their place"
    report = [words] * bool(few)
    for i, name in enumerate(names[1:]):
        for x, points in equal.items():
            points = [] if same and x == "tokens" else points
            report += [equal_table(names[0], name, points, i, x, LOSS_NAMES[losses[x]])] if points else []
    if not any(point["intervals"][i] for points in equal.values() for point in points for i in range(len(names) - 1)):
        report.append("no interval: it needs two runs in each group, of one kind")
    guessed = [p for x in ("step", "tokens") for p in equal[x] if not p["measured"]]
    report += ["~ and times: interpolated between the losses around them"] if guessed else []
    report += ["equal tokens are equal steps"] * same
    return report + ["equal tokens: not all of these logs count their tokens"] * (not equal["tokens"])


def same_means(points, others):
    """Whether two lists of points have the same means, of all groups."""
    pairs = zip(points, others, strict=False)
    return len(points) == len(others) and all(
        math.isclose(a, b, rel_tol=1e-6) for p, q in pairs for a, b in zip(p["means"], q["means"], strict=True))


def equal_table(a, b, points, i, x, loss):
    """Table of the i-th further group, B, and the first, A, at equal x."""
    what, unit, form = EQUAL[x]
    rows = []
    for point in points:
        low, high = point["intervals"][i] or (None, None)
        old, new = point["means"][0], point["means"][i + 1]
        interval = "-" if low is None else f"{low:+.4f} to {high:+.4f}"
        mark = "~" if not point["measured"] and x != "train_time_ms" else ""
        rows.append([mark + form(point["at"]), f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}", interval])
    title = f"{loss} at equal {what}: A is {a}, B is {b}"
    return Table([unit, "A", "B", "B - A", "95 % interval"], rows, title)


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


def shortened_table(headings, rows):
    """A table of the first MAX_DIFFERENCES rows, and how many more there are."""
    more = len(rows) - MAX_DIFFERENCES
    return [Table(headings, rows[:MAX_DIFFERENCES])] + [f"... and {more} more: --json gives all"] * (more > 0)


def none_differs(result):
    """What is said where no setting differs, or where that is not known of all files."""
    unknown = result["not_compared"]
    names = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
    if unknown:
        return [f"settings, constants and functions could not be compared in {names}: see the text"]
    return [] if result["settings"] else ["no setting or constant differs"]


def module_report(result):
    """Table of the files that differ, unless there is the main file alone."""
    modules = result["modules"]
    if len(modules) + result["same_modules"] < 2 and [m["change"] for m in modules] in ([], ["changed"]):
        return []
    rows = [[m["name"], m["change"] + (f", from {m['from']}" if m["from"] and m["change"] != "removed" else ""),
             f"+{show(m['lines_added'])}", f"-{show(m['lines_removed'])}"] for m in modules]
    table = shortened_table(["file", "change", "lines", ""], rows) if rows else []
    same = result["same_modules"]
    return table + [f"{same} file{'s are' if same > 1 else ' is'} the same"] * (same > 0)


def unit_rows(units):
    """(name, change) of functions and classes; those that moved together and unchanged are one row."""
    rows, together = [], {}
    for unit in units:
        if unit["change"] == "moved":
            together.setdefault((unit["from"], unit["to"]), []).append(unit["name"])
        elif not unit["change"].startswith("file "):
            rows.append([unit["name"], unit["change"] + (f", from {unit['from']}" if "from" in unit else "")])
    for (old, new), names in together.items():
        many = [f"{len(names)} units of {new}"] if len(names) > 3 else names
        rows += [[name, f"moved, from {old}"] for name in many]
    return rows


def diff_report(result, no_text):
    report = [f"A: {result['a']}", f"B: {result['b']}"]
    report += [*result["blocks"], *module_report(result)]
    if result["settings"]:
        rows = [[s["name"], clip(s["a"]), clip(s["b"])] for s in result["settings"]]
        report += shortened_table(["setting or constant", "A", "B"], rows)
    report += none_differs(result)
    rows = unit_rows(result["units"])
    report += shortened_table(["function or class", "change"], rows) if rows else []
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


def history_report(result, no_text):
    """The events of a name, a line each, with the text of what changed."""
    report = [f"{result['name']} in {result['records']} records of {result['folder']}"]
    for event in result["events"]:
        numbers = f"#{event['first']}" + (f" to #{event['last']}" if event["last"] > event["first"] else "")
        if event["change"] in ("not there", "unchanged", "not read"):
            why = f": {event['why']}" if event.get("why") else ""
            report.append(f"{numbers}: {event['change']}{why}")
            continue
        report.append(f"{numbers} {event['record']} ({show(event['date'])}): {event_text(event)}")
        if not no_text and event.get("diff") and event["change"] != "disappears":
            report.append([line.expandtabs(4) for line in event["diff"]])
    return report


def event_text(event):
    """What happened to a definition in a record, in words."""
    signs = [line[:1] for line in event.get("diff") or []]
    words = event["change"]
    if "from" in event:
        words += f", from {' and '.join(event['from'])} to {' and '.join(event['modules'])}"
    elif event["change"] in ("appears", "reappears", "disappears"):
        words += f"{' from' if event['change'] == 'disappears' else ' in'} {' and '.join(event['modules'])}"
    if event.get("renamed"):
        words += f", {'now' if event['change'] == 'disappears' else 'before'} {event['renamed']}"
    pairs = [f"{clip(x, 30)} -> {clip(y, 30)}" for x, y in event.get("constants", [])]
    words += f" ({'; '.join(pairs[:6])}{' and more' if len(pairs) > 6 else ''})" if pairs else ""
    return words + (f", lines +{signs.count('+')} -{signs.count('-')}" if signs else "")
