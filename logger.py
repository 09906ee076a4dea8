"""Read, compare and judge the logs of training runs: ours, and those of the public NanoGPT speedrun of every year.

    python logger.py --experiment_name NAME        # runs of logs/NAME: table (logs/NAME/logs.txt), plots in images/NAME
    python logger.py watch [LOG...]                # running runs live: loss curve, rate, ETA, memory; Ctrl-C ends it
    python logger.py show LOG...                   # a screen per run: status, versions, losses, time, memory
    python logger.py compare A B [C...]            # groups of runs: means, Welch's t-test, equal steps and time, a plot
    python logger.py diff A B                      # what changed: settings, functions, text, environment, effect
    python logger.py history NAME FOLDER           # a function or constant through all records: how it changed and when
    python logger.py profile RUN                   # time of a step, overlap, heaviest operations of its traces
    python logger.py stats FOLDER --target 3.28    # is the mean loss below the target; gain over baseline/
    python logger.py stats FOLDER --target 3.28 --plan    # a look after each run: enough, go on, or hopeless
    python logger.py verify FOLDER                 # does a record folder hold what its README claims
    python logger.py extract LOG -o train_gpt.py   # the source inside a log, ready to run
    python logger.py export LOG... -o runs.csv     # every record as CSV or JSON, or to wandb: --wandb PROJECT
    python logger.py export RUN --tsv --description "wider"    # its result as a row of results.tsv
    python logger.py board FOLDER... --html FILE   # leaderboard: Markdown on the terminal, one self-contained page

A LOG is a file, a folder (searched for run folders, *.txt, *.log, *.out, *.stdout, these with .gz) or a glob. --json
prints the numbers under stable keys, --markdown the report as Markdown: `stats FOLDER --target 3.28 --markdown >
statistics.md`. --loss-key KEY judges another column: val_ema_loss, val_bpb, or a score that `show` names as an extra.
Exit codes: 0 fine; 1 a check failed (stats: p is not below alpha, or the runs are a mixture; verify: a claim is
contradicted; show --strict: a run is not complete) or an input could not be used, said in one line of `error: ...`; 2
wrong usage.

A run is a public log (source, ====, machine, ====, step lines; llm.c's `s:1 trl:3.2` lines; those of nanoGPT, nanochat,
slowrun, parameter-golf and autoresearch, runlogs/formats.py) or a folder of ours with
    metrics.jsonl  one object a line: training steps, validations, {"event": "resume"}, a closing {"event": "end"};
                   of mixtures of experts {"event": "routers"}: the load of each expert since the report before
    hellaswag.jsonl  scores of evals/hellaswag.py --follow, an object a line
    log.txt        the public format, read where metrics.jsonl is missing or holds no step
    config.json    settings, git commit, data, hardware and torch version
Runs may be in progress, killed or damaged: what can be read is shown, what was left out is named in a note. Files are
read in blocks and records above MAX_ROWS are thinned out, so that a log of any size fits in memory.

Its parts are in runlogs/: formats and parsing (bytes -> Trace), loading (files -> Run -> numbers) and judging
(statistics) know nothing of presenting (reporting, drawing, board); here a command is a function of the parsed
arguments. Losses are in nats/token; times are in ms wherever a name ends in _ms, in s with _s.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules are imported ends it without a traceback

import argparse
import glob
import json
import math
import os
import re
import sys
from pathlib import Path

from runlogs.arms import Arm, evidence_of
from runlogs.drawing import compare_figure, figures_of, load_figure, loss_limits, save_figures
from runlogs.exporting import append_results, columns_of, export_csv, export_json, export_wandb
from runlogs.extracting import how_to_run, write_parts
from runlogs.judging import changed_config, compare_numbers, effect_of, opponent, stats_numbers
from runlogs.leaderboard import records_of
from runlogs.loading import changes_of, describe, expand, load, load_experiment, load_one, natural, read_each
from runlogs.numbering import find_records, numbered, tracks_of
from runlogs.output import encoded, give, printable, say, say_json, write_file
from runlogs.planning import plan_of
from runlogs.profiling import trace_numbers
from runlogs.reporting import (
    Table,
    compare_report,
    diff_report,
    emit,
    experiment_report,
    format_json,
    hellaswag_report,
    history_report,
    operation_table,
    plain,
    profile_line,
    run_table,
    screen,
)
from runlogs.stats_report import plan_report, statistics_report, stats_report


def show_experiment(args):
    """Report all runs of an experiment, keep the report in logs.txt, then draw them."""
    runs = load_experiment(args.log_dir, args.experiment_name)
    if args.json:
        say(format_json(runs).split("\n"))
        return 0
    report = experiment_report(args.experiment_name, runs)
    emit(report, args)
    table = Path(args.log_dir) / args.experiment_name / "logs.txt"
    write_file(table, [encoded(plain(report) + "\n")])
    say(f"table: {table}")
    if args.no_plot:
        return 0
    if loss_limits(runs) is None:
        say("no plot: no loss logged yet")
        return 0
    folder = Path(args.images_dir) / args.experiment_name
    for path in save_figures(lambda: figures_of(runs, args.experiment_name), folder):
        say(f"plot: {path}")
    return 0


def draw_load_of(args):
    """Write the heat map of the last of the runs that reports its routers. ValueError if none does."""
    routed = [run for run in read_each(expand(args.logs)) if run.trace.routers]
    if not routed:
        raise ValueError(f"--plot: no run in {', '.join(args.logs)} reports its routers, as train_moe.py's do")
    path, experiment = Path(args.plot), routed[-1].path.absolute().parent.name
    save_figures(lambda: {path.name: load_figure(routed[-1], experiment)}, path.parent)
    say(f"plot: {path}")


def show_runs(args):
    """A screen per run, or above ten of them a table; what is no log is counted."""
    found = [describe(run, args.target) for run in read_each(expand(args.logs), loss_key=args.loss_key)]
    logs = [numbers for numbers in found if numbers["status"] != "not a log"]
    if args.json:
        say_json({"runs": found})
    else:
        report = [screen(n) for n in logs] if len(logs) <= 10 else [run_table(logs)]
        if len(found) > 1:
            counts = {status: sum(n["status"] == status for n in found) for status in {n["status"]: 0 for n in found}}
            report.append(f"{len(found)} files: {', '.join(f'{count} {status}' for status, count in counts.items())}")
        report += hellaswag_report(logs)
        others = [n for n in found if n["status"] == "not a log"]
        reasons = [f"not a log: {n['path']} ({'; '.join(n['warnings'] or [n['reason']])})" for n in others]
        more = [f"and {len(reasons) - 20} more that are no logs"] if len(reasons) > 20 else []
        emit(report + reasons[:20] + more, args)
        if args.plot:
            draw_load_of(args)
    return 1 if not logs or (args.strict and any(n["status"] != "complete" for n in found)) else 0


def record_arm(name, loss_key=None):
    """The record arm of a group of logs; what was left out names the other arms. ValueError if it has no run."""
    evidence = evidence_of([name], loss_key)
    arm = evidence.arm("record")
    if not arm.samples:
        raise ValueError(f"'{name}' holds no complete run: {reasons(evidence)}")
    arm.dropped += [f"{other.name}: {len(other.samples)} runs, another arm" for other in evidence.arms
                    if other.name != "record" and other.samples]
    return arm


def load_arms(names, cells=(), loss_key=None):
    """{name: Arm} of groups of logs: their record arms; of a single folder its baseline and its record."""
    if len(names) == 1:
        return arms_of_folder(names[0], cells, loss_key)
    arms = {}
    short = ["/".join(Path(os.path.abspath(name)).parts[-1 - ("*" in name) :]) for name in names]
    for name, last in zip(names, short, strict=True):
        label = last if short.count(last) == 1 else name if name not in arms else f"{name} ({len(arms) + 1})"
        arms[label] = record_arm(name, loss_key)
    return arms


def arms_of_folder(name, cells, loss_key=None):
    """{"baseline": Arm, "record": Arm} of one folder; of the baseline the cell that the record is compared with."""
    evidence = evidence_of([name], loss_key)
    record, baseline = evidence.arm("record"), evidence.arm("baseline")
    if not record.samples or not baseline.samples:
        raise ValueError(f"compare needs two groups or more: files, folders or quoted globs; '{name}' alone has no "
                         f"{'record' if not record.samples else 'baseline'}: expected a folder with runs and baseline/")
    chosen = [cell for cell in cells if any(c.answers_to(cell) for c in record.cells)]
    record = record.only(chosen[0]) if chosen else record
    other = None if record.mixture else opponent(record.cells[0], baseline)[0]
    return {"baseline": Arm("baseline", [other], baseline.dropped) if other else baseline, "record": record}


def load_groups(names, cells=(), loss_key=None):
    """{name: samples}, {name: what was left out} and {name: why it is a mixture} of groups of logs. A mixture becomes a
    group for each of its cells, or the cell that one of `cells` means. ValueError if one means none."""
    groups, dropped, mixtures = {}, {}, {}
    arms = load_arms(names, cells, loss_key)
    known = [cell for arm in arms.values() for cell in arm.cells]
    for name in cells:
        if not any(cell.answers_to(name) for cell in known):
            labels = ", ".join(dict.fromkeys(f"'{cell.label}'" for cell in known[:12]))
            raise ValueError(f"--cell '{name}' means none of the runs: expected one of {labels}, or a hash of code")
    for name, arm in arms.items():
        chosen = [cell for cell in cells if arm.mixture and any(c.answers_to(cell) for c in arm.cells)]
        arm = arm.only(chosen[0]) if chosen else arm
        for cell in arm.cells:
            label = f"{name}: {cell.label}" if arm.mixture or chosen else name
            groups[label], dropped[label], mixtures[label] = cell.samples, arm.dropped, arm.mixture
    return groups, dropped, mixtures


def reasons(evidence):
    """Why there is no run of a record, a few words."""
    if dropped := evidence.arm("record").dropped:
        return "; ".join(dropped[:3])
    others = [arm.name for arm in evidence.arms if arm.samples]
    return f"its runs are of {', '.join(others[:5])}: give one of these" if others else "no step in any file"


def compare_groups(args):
    """Means of groups of runs and how they differ from the first group; of one folder its record and its baseline."""
    groups, dropped, mixtures = load_groups(args.groups, args.cell, args.loss_key)
    result = compare_numbers(groups, dropped, mixtures)
    if args.json:
        say_json(result)
        return 0
    emit(compare_report(groups, result), args)
    if not args.no_plot:
        path, untested = Path(args.plot), {pair["b"] for pair in result["pairs"] if pair["why"]}
        save_figures(lambda: {path.name: compare_figure(groups, untested)}, path.parent)
        say(f"plot: {path}")
    return 0


def show_profile(args):
    """What the traces of a run with --enable_profiling say: the heaviest operations, the time of a
    step, how much of the communication ran beside computation."""
    run = Path(args.run)
    folder = run / "profile" if (run / "profile").is_dir() else run
    paths = sorted(folder.glob("trace_rank*.json"), key=natural)
    if not paths:
        raise FileNotFoundError(f"'{folder}' holds no trace_rank*.json, as of --enable_profiling")
    ranks = [trace_numbers(path) for path in paths]
    memory = sorted(map(str, folder.glob("memory_rank*.pickle")))
    if args.json:
        say_json({"ranks": ranks, "memory_snapshots": memory})
    else:
        report = [operation_table(ranks[0], args.top), *map(profile_line, ranks)]
        report += [f"trace, for ui.perfetto.dev: {path}" for path in paths]
        emit(report + [f"memory snapshot, for pytorch.org/memory_viz: {m}" for m in memory], args)
    return 0


RECORDS = "records"  # where records are looked for by number and name
ENVIRONMENT = ("python", "torch", "cuda", "triton", "driver", "gpus", "world_size")


def source_run(name, arm):
    """The run that stands for a group in `diff`: of the largest cell the first with a source, else any log."""
    runs = [sample.run for sample in arm.samples] or load(expand([name]))
    return load_one(next((run for run in runs if run.trace.parts), runs[0]).path)


def diff_runs(args):
    """What changed from run or group A to B."""
    from runlogs.sources import compare_parts, unified

    names = [name for name in (args.a, args.b) if not is_path(name, args.records)]
    records = find_records(names, args.records) if names else {}
    sides = [side_of(name, records.get(name)) for name in (args.a, args.b)]
    (a, b), arms = zip(*sides, strict=True)
    for run in (a, b):
        if not run.trace.parts and not run.config:
            raise ValueError(f"'{run.path}' holds no source: a log that begins with it is needed")
    result = {"a": str(a.path), "b": str(b.path), **compare_parts(a.trace.parts, b.trace.parts)}
    result["settings"] = changed_config(a, b) + result["settings"]
    facts = [describe(run) for run in (a, b)]
    result["environment"] = [{"name": key, "a": facts[0][key], "b": facts[1][key]} for key in ENVIRONMENT
                             if facts[0][key] != facts[1][key]]
    result["effect"] = effect_of(*arms)
    result["notes"] += [f"{name}: {arm.mixture}: no mean over them" for name, arm in zip("AB", arms, strict=True)
                        if arm.mixture]
    result["notes"] += [f"{name}: {text}" for name, run in zip("AB", (a, b), strict=True) for text in changes_of(run)]
    result["unified_diff"] = unified(a.trace.parts, b.trace.parts, ("a", "b"))
    if args.json:
        say_json(result)
    else:
        emit(diff_report(result, args.no_text), args)
    return 0


def side_of(name, record):
    """(the run that stands for a side of `diff`, its Arm); of a record of the board the cell that it shows."""
    name = record["folder"] if record else name
    arm = evidence_of([name], keep_rows=False, keep_source=True).arm("record")
    if not record:
        return source_run(name, arm), arm
    cells = [cell for cell in arm.cells if record["log"] in [str(sample.run.path) for sample in cell.samples]]
    return load_one(Path(record["log"])), Arm("record", cells, arm.dropped)


def is_path(name, folder):
    """Whether a name can only be that of logs, not of a record. FileNotFoundError for a number without `folder`."""
    there = os.path.exists(name) or os.sep in name or glob.has_magic(name)
    lacking = folder == RECORDS and not os.path.isdir(folder)
    if lacking and not there and re.fullmatch(r"#?\d{1,6}", name, re.ASCII):
        raise FileNotFoundError(f"'{name}' is not there, nor a folder '{RECORDS}' where it could be a record's "
                                "number: name one with --records")
    return there or lacking


def show_history(args):
    """How a function, class, method, constant or setting changed through the records of a folder, in their order."""
    from runlogs.history import history_of

    found, errors = [], []
    for track in tracks_of(args.folder):
        try:
            found.append({"folder": str(track), **history_of(args.function, numbered(track))})
        except ValueError as error:
            errors.append(f"{track}: {error}")
    if not found:
        raise ValueError("; ".join(errors))
    if args.json:
        say_json({"tracks": found})
    else:
        emit([line for result in found for line in history_report(result, args.no_text)], args)
    return 0


def show_stats(args):
    """Mean and spread of a record's runs, what they say about a target, and how they differ from its baseline."""
    evidence = evidence_of(args.logs, args.loss_key, keep_rows=False, keep_source=True)
    if not evidence.arm("record").samples:
        raise ValueError(f"no complete run in {', '.join(args.logs)}: {reasons(evidence)}")
    evidence = evidence.choose(args.cell) if args.cell else evidence
    result = stats_numbers(evidence, args.target, args.alpha)
    if args.plan:
        result["plan"] = plan_of(evidence.arm("record"), args.target, args.alpha, args.max_runs)
        result["passed"] = result["plan"]["verdict"] == "enough"
    if args.json:
        say_json(result)
    else:
        report = (statistics_report if args.markdown else stats_report)(evidence, result)
        emit(report + (plan_report(result["plan"]) if args.plan else []), args)
    return 0 if args.target is None or result["passed"] else 1


def verify_folder(args):
    """Check the claims of a record folder's README.md and statistics.md, its code versions and its sources."""
    from runlogs.verifying import check_folder, check_runs, texts_of

    folder = Path(args.folder)
    if not texts_of(folder):
        raise FileNotFoundError(f"'{folder / 'README.md'}' is not there: nothing is claimed")
    evidence = evidence_of([args.folder], loss_key=args.loss_key, keep_source=True)
    samples = [sample for arm in evidence.arms for sample in arm.samples]
    claims = check_folder(folder, evidence, args.target)
    checks = check_runs(evidence, samples)
    bad = [c for c in claims + checks if c["verdict"] == "contradicted"]
    result = {"folder": str(folder), "runs": len(samples), "claims": claims, "checks": checks, "passed": not bad}
    if args.json:
        say_json(result)
    else:
        emit(verify_report(result), args)
    return 1 if bad else 0


def verify_report(result):
    """Tables of checks and claims, the contradicted first; how many there are of each verdict."""
    from runlogs.verifying import VERDICTS

    rows = [[c["claim"], c["verdict"], c["detail"]] for c in result["checks"]]
    report = [Table(["check", "verdict", "detail"], rows)]
    order = sorted(result["claims"], key=lambda c: list(VERDICTS.values()).index(c["verdict"]))
    rows = [[c["kind"], c["claim"], c["verdict"], c["detail"], where_of(c)] for c in order]
    report += [Table(["kind", "claim", "verdict", "detail", "where"], rows)] if rows else ["no claim found"]
    said = [claim["verdict"] for claim in result["claims"]]
    counts = [f"{said.count(word)} {word}" for word in VERDICTS.values()]
    return [*report, f"{result['runs']} complete runs; claims: {', '.join(counts)}"]


def where_of(claim):
    return f"{claim['file']}:{claim['line']}" if claim["line"] else claim["file"]


def extract_source(args):
    """Write the source inside a log; one of several files into a new folder, which -o names without its .py."""
    from runlogs.sources import problem_of

    run = load_one(Path(args.log))
    parts = run.trace.parts
    if not parts:
        if not os.path.exists(args.log):
            raise FileNotFoundError(f"'{args.log}' is not there")
        why = "".join(f" ({note})" for note in run.trace.notes if note.startswith("cannot be read"))
        raise ValueError(f"'{args.log}' holds no source{why}: expected a log that begins with it, or our run folder")
    if args.output is None:
        give([json.dumps(parts) + "\n" if args.json else next(iter(parts.values()))])
        return 0
    target = Path(args.output)
    files = write_parts(target, parts, args.log) if len(parts) > 1 else {target: next(iter(parts.values()))}
    if len(parts) == 1:
        text = files[target].encode("utf-8", "replace")
        if target.is_file() and not args.force and target.read_bytes() != text:
            raise ValueError(f"'{target}' is there and differs: choose another -o, or overwrite it with --force")
        write_file(target, [text])
    problems = [f"{name} {problem}" for name, text in parts.items() if (problem := problem_of(name, text))]
    command = how_to_run(files, run.trace.header.get("world_size") or run.trace.header.get("gpu_count"))
    if args.json:
        files = [str(path) for path in files]
        say_json({"files": files, "code_hash": run.trace.code_hash, "problems": problems, "run": command})
    else:
        say([f"wrote {path}" for path in files] + [f"note: {problem}" for problem in problems])
        say([f"to run it: {command}"] * (len(parts) > 1))
    return 0


def export_records(args):
    """All records of all trials as CSV or JSON, or to Weights & Biases; or the result of each run as a row."""
    paths = expand(args.logs)
    if args.tsv:
        return append_results(paths, args.tsv, args.description)
    rows = (row for run in read_each(paths, True, loss_key=args.loss_key) for rows in run.trace.trials for row in rows)
    keys = columns_of(rows)
    if not keys:
        raise ValueError(f"no log in {', '.join(args.logs)} holds a step")
    if args.wandb:
        return export_wandb(paths, args.wandb, args.loss_key)
    form = "json" if str(args.output).endswith(".json") else "csv"
    form = "json" if args.json else args.format or form
    pieces = export_json(paths, args.loss_key) if form == "json" else export_csv(paths, keys, args.loss_key)
    if args.output:
        write_file(args.output, map(encoded, pieces))
        say(f"wrote {args.output}", sys.stderr)
    else:
        give(pieces)
    return 0


def show_board(args):
    """Leaderboard of record folders: Markdown on the terminal, a page in a file."""
    from runlogs.board import board_html, board_markdown

    records = [record for name in args.folders for record in records_of(Path(name), args.loss_key)]
    if not records:
        raise ValueError(f"no record in {', '.join(args.folders)}: expected folders with logs of complete runs")
    records.sort(key=lambda record: (record["date"] or "", record["name"]))
    if args.json:
        say_json({"records": records})
        return 0
    say(board_markdown(records).split("\n"))
    if args.html:
        page = Path(args.html)
        for record in records:  # links of the page start at its folder
            record["folder"] = os.path.relpath(record["folder"], page.resolve().parent)
        write_file(page, [board_html(records, args.title, args.target).encode("utf-8", "replace")])
        say(f"page: {args.html}", sys.stderr)
    return 0


def watch_runs(args):
    """Running runs, live: loss curve, rate, ETA, memory; which ended, and how. Ctrl-C ends it; in a pipe one frame."""
    from runlogs.watching import Watch, follow, print_frame

    watch = Watch(args.logs)
    if args.json:
        runs, others = watch.look()
        say_json({"runs": [{key: n[key] for key in n if key != "run"} for n in runs], "others": others})
    elif args.once or not sys.stdout.isatty():
        print_frame(watch)
    else:
        follow(watch, args.interval)
    return 0


def flag(parser, name, **options):
    """A flag with its dash and underscore spellings."""
    parser.add_argument(*dict.fromkeys([f"--{name}", f"--{name.replace('-', '_')}"]), **options)


def finite(text):
    """A number of the command line, neither nan nor inf."""
    if not math.isfinite(value := float(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not finite: expected a number, as 3.28")
    return value


def probability(text):
    if not 0 < float(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no probability: expected a number between 0 and 1, as 0.01")
    return float(text)


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is below 1: expected a number of rows, as 12")
    return int(text)


def seconds(text):
    if not 0.1 <= float(text) <= 3600:
        raise argparse.ArgumentTypeError(f"'{text}' is no interval: expected seconds from 0.1 to 3600, as 2")
    return float(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        super().error(printable(message))  # a folder's name may be taken for a flag


def build_parser():
    """Parser whose `command` is the function to call with its result; without a sub-command that of an experiment."""
    shown = argparse.ArgumentParser(add_help=False)
    shown.add_argument("--json", action="store_true", help="print numbers as JSON, draw nothing")
    shown.add_argument("--markdown", action="store_true", help="print the report as Markdown")
    shown.add_argument("--wide", action="store_true", help="whole tables, however wide the terminal is")
    about, _, more = __doc__.partition("\n\n")
    parser = Parser(description=about, epilog=more, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(command=show_experiment)
    parser.add_argument("--experiment_name", "--experiment-name", help="folder in the log folder")
    flag(parser, "log-dir", default="logs", help="folder of all experiments (default: logs)")
    flag(parser, "images-dir", default="images", help="folder for plots (default: images)")
    parser.add_argument("--json", action="store_true", help='print {"runs": [...]} instead of the table, draw nothing')
    flag(parser, "no-plot", action="store_true", help="draw nothing (matplotlib is not needed)")
    parser.add_argument("--wide", action="store_true", help="the whole table, however wide the terminal is")
    commands = parser.add_subparsers(metavar="COMMAND", dest="name")

    def command(name, function):
        text = " ".join(function.__doc__.split())
        found = commands.add_parser(name, parents=[shown], help=text, description=text, allow_abbrev=False)
        found.set_defaults(command=function)
        return found

    add_commands(command)
    return parser


def add_commands(command):
    """The sub-commands and their flags."""
    logs = {"nargs": "+", "metavar": "LOG", "help": "files, folders or globs"}
    target = {"type": finite, "metavar": "LOSS", "help": "the loss to be reached"}
    claim = {"metavar": "KEY", "help": "what counts as the loss, as val_ema_loss or val_bpb (default: val_loss)"}
    sub = command("watch", watch_runs)
    sub.add_argument("logs", **logs | {"nargs": "*", "default": ["logs"], "help": "what to watch (default: logs)"})
    sub.add_argument("--once", action="store_true", help="print one frame, as in a pipe")
    sub.add_argument("--interval", type=seconds, default=2.0, metavar="S", help="seconds between frames (default: 2)")
    sub = command("show", show_runs)
    flag(sub, "loss-key", **claim)
    sub.add_argument("logs", **logs)
    sub.add_argument("--target", **target | {"default": 3.28, "help": "to cross (default: 3.28)"})
    sub.add_argument("--strict", action="store_true", help="exit with 1 unless every file is a complete run")
    sub.add_argument("--plot", metavar="FILE", help="draw the experts' load of the last run that reports its routers")
    sub = command("compare", compare_groups)
    flag(sub, "loss-key", **claim)
    sub.add_argument("groups", nargs="+", metavar="GROUP", help="a file, folder or quoted glob for each group")
    flag(sub, "cell", action="append", default=[], metavar="LABEL_OR_HASH", help="of a mixture these runs")
    sub.add_argument("--plot", default="images/compare.png", help="where the plot goes (default: images/compare.png)")
    flag(sub, "no-plot", action="store_true", help="draw nothing")
    sub = command("diff", diff_runs)
    sub.add_argument("a", metavar="A", help="a log, a folder of runs, or the number or name of a record")
    sub.add_argument("b", metavar="B", help="another one")
    flag(sub, "no-text", action="store_true", help="without the unified diff")
    sub.add_argument("--records", default=RECORDS, metavar="FOLDER",
                     help="where A and B are numbers or names of records (default: records)")
    sub = command("history", show_history)
    sub.add_argument("function", metavar="NAME", help="a function, Class, Class.method, constant or setting")
    sub.add_argument("folder", nargs="?", default=RECORDS, metavar="FOLDER", help="records (default: records)")
    flag(sub, "no-text", action="store_true", help="without the text of what changed")
    sub = command("profile", show_profile)
    sub.add_argument("run", metavar="RUN", help="folder of a run, or of its traces")
    sub.add_argument("--top", type=positive, default=12, metavar="N", help="operations (default: 12)")
    sub = command("stats", show_stats)
    flag(sub, "loss-key", **claim)
    sub.add_argument("logs", **logs)
    sub.add_argument("--target", **target)
    flag(sub, "cell", metavar="LABEL_OR_HASH", help="of a mixture of versions or machines these runs")
    sub.add_argument("--alpha", type=probability, default=0.01, help="p has to be below (default: 0.01)")
    sub.add_argument("--plan", action="store_true", help="a look after each run: enough, go on, or hopeless")
    flag(sub, "max-runs", type=int, default=20, metavar="N", help="of --plan, chosen before the first (default: 20)")
    sub = command("verify", verify_folder)
    flag(sub, "loss-key", **claim)
    sub.add_argument("folder", metavar="FOLDER", help="record folder with README.md and logs")
    sub.add_argument("--target", **target | {"default": 3.28, "help": "of its p (default: 3.28)"})
    sub = command("extract", extract_source)
    sub.add_argument("log", metavar="LOG")
    sub.add_argument("-o", "--output", metavar="FILE", help="file to write (default: the terminal)")
    sub.add_argument("--force", action="store_true", help="overwrite files that differ")
    sub = command("export", export_records)
    flag(sub, "loss-key", **claim)
    sub.add_argument("logs", **logs)
    sub.add_argument("-o", "--output", metavar="FILE", help="file to write (default: the terminal)")
    sub.add_argument("--format", choices=("csv", "json"), help="default: by its name, else csv")
    sub.add_argument("--wandb", metavar="PROJECT", help="upload to Weights & Biases instead")
    sub.add_argument("--tsv", nargs="?", const="results.tsv", type=Path, metavar="FILE",
                     help="add a row for each run, from its result.json, to a table (default: results.tsv)")
    sub.add_argument("--description", default="", metavar="TEXT", help="what is tried, for the row of --tsv")
    sub = command("board", show_board)
    flag(sub, "loss-key", **claim)
    sub.add_argument("folders", nargs="+", metavar="FOLDER", help="records, or a folder of them")
    sub.add_argument("--html", default="board.html", metavar="FILE", help="default: board.html")
    sub.add_argument("--title", default="Leaderboard", help="its title")
    sub.add_argument("--target", **target | {"help": "a line in the page's loss curves (default: none)"})


def main(argv=None):
    """Run a command; return its exit code, 1 after one line of `error: ...`, 130 after Ctrl-C."""
    sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # closed: None
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # names that a terminal's encoding lacks
    try:
        try:
            args = parsed(argv)
            code = args.command(args)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            raise
        except SystemExit:  # of argparse
            sys.stdout.flush()
            raise
        except (ValueError, OSError, RuntimeError) as error:
            say(f"error: {sentence_of(error)}", sys.stderr)
            code = 1
    except (OSError, KeyboardInterrupt) as error:  # the reader (head, less) has seen enough; Ctrl-C
        code = 130 if isinstance(error, KeyboardInterrupt) else 0 if isinstance(error, BrokenPipeError) else 1
    drop_output()
    return code


def parsed(argv):
    """The arguments of the command line."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if not args.name and args.experiment_name is None:
        parser.error("give --experiment_name NAME or a command: see --help")
    return args


def sentence_of(error):
    """What an error says. One of the system without a file is of the output: files are written by write_file."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    where = f"'{error.filename}'" if error.filename else "the output cannot be written"
    return f"{where}: {error.strerror}"


def drop_output():
    """Point streams that cannot be written to nowhere, so that Python does not complain about them at its end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
