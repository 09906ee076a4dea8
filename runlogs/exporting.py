"""Records of runs -> CSV, JSON, Weights & Biases; results of runs -> rows of a table."""

import csv
import io
import sys
from pathlib import Path

from runlogs.loading import describe, read_each, settings_of
from runlogs.output import printable, say, strict_json
from runlogs.parsing import MAX_COLUMNS, number, parse_object, read_text

RESULT = ("status", "val_loss", "val_bpb", "training_seconds", "total_seconds", "peak_memory_mb", "mfu", "total_tokens",
          "steps", "params")  # keys of result.json
COLUMNS = ("run", "commit", *RESULT, "description")  # of results.tsv


def columns_of(rows):
    """The keys of all rows, up to MAX_COLUMNS."""
    keys = {}
    for row in rows:
        keys |= dict.fromkeys(row) if len(keys) <= MAX_COLUMNS else {}
    if len(keys) > MAX_COLUMNS:
        say(f"note: more than {MAX_COLUMNS} different keys: only the first ones were exported as CSV", sys.stderr)
    return [key for key in keys if key not in ("path", "trial")][:MAX_COLUMNS]


def export_csv(paths, keys, loss_key=None):
    """A line a record: path, trial, and every key that any record has; yielded log by log. Texts are printable."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["path", "trial", *map(printable, keys)])
    for run in read_each(paths, True, loss_key=loss_key):
        for trial, rows in enumerate(run.trace.trials, 1):
            cells = ([run.path, trial, *map(row.get, keys)] for row in rows)
            writer.writerows([printable(c) if isinstance(c, (str, Path, list, dict)) else c for c in line]
                             for line in cells)
        yield file.getvalue()
        file.seek(0)
        file.truncate()


def export_json(paths, loss_key=None):
    """{"runs": [what show gives, with all records of each trial under "curves"]}, yielded log by log."""
    start = '{"runs": ['
    for run in read_each(paths, True, loss_key=loss_key):
        if run.trace.trials:
            yield start + strict_json({**describe(run), "curves": run.trace.trials}, None)
            start = ",\n"
    yield "]}\n"


def export_wandb(paths, project, loss_key=None):
    """One run of Weights & Biases for each trial. WANDB_MODE=offline keeps them on disk."""
    try:
        import wandb
    except ImportError:
        raise RuntimeError("--wandb: Weights & Biases is not installed; pip install wandb") from None
    for run in read_each(paths, True, loss_key=loss_key):
        facts = {key: value for key, value in describe(run).items() if key not in ("trial_runs", "warnings")}
        for trial, rows in enumerate(run.trace.trials, 1):
            name = printable(facts["run_id"]) + (f"-{trial}" if len(run.trace.trials) > 1 else "")
            config = {**facts, **settings_of(run)}
            try:
                target = wandb.init(project=project, name=name, config=config, reinit="finish_previous")
            except (OSError, RuntimeError, getattr(wandb, "Error", ValueError)) as error:  # no login, no network
                raise RuntimeError(f"--wandb: {error}; `wandb login`, or WANDB_MODE=offline keeps runs here") from None
            for row in rows:
                target.log({k: v for k, v in row.items() if number(v) is not None}, step=row["step"])
            target.finish()
    return 0


def append_results(paths, table, description):
    """A row of `table` for each run's result.json; a run that has one of as many steps is said and left out. ValueError
    for a run without a result, or another kind of table. A last line that an editor left open is ended first."""
    rows = [result_row(path, description) for path in paths]
    lines = read_text(table).splitlines()
    if lines and lines[0].split("\t") != [*COLUMNS]:
        raise ValueError(f"'{table}' is another kind of table: its first line is not {', '.join(COLUMNS)}")
    known = {tuple(dict(zip(COLUMNS, line.split("\t"), strict=False)).get(key) for key in ("run", "steps"))
             for line in lines}
    for row in rows:
        told = f"{row['run']}, {row['steps']} steps"
        if (row["run"], row["steps"]) in known:
            say(f"note: '{table}' has {told}, already: no row was added", sys.stderr)
            continue
        with open(table, "a", encoding="utf-8") as file:  # one write: another program may add rows, too
            start = "\n" * (read_text(table)[-1:] != "\n") if file.tell() else "\t".join(COLUMNS) + "\n"
            file.write(start + "\t".join(row.values()) + "\n")
        say(f"{table}: {told}: {row['status']}, val loss {row['val_loss']}")
        known.add((row["run"], row["steps"]))
    return 0


def result_row(path, description):
    """{column: text} of a run's folder."""
    result, config = (parse_object(read_text(path / f"{name}.json")) or {} for name in ("result", "config"))
    if not result:
        raise ValueError(f"'{path}' has no result.json: it was killed, or goes on; expected folders of ended runs")
    git = config.get("git") or {}
    commit = (git.get("commit") or "unknown")[:10] + "-dirty" * bool(git.get("dirty"))
    found = {"run": path.resolve().name, "commit": commit, **result, "description": description}
    return {key: printable(" ".join(str(found[key]).split())) if found.get(key) is not None else ""
            for key in COLUMNS}
