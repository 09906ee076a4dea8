"""Records of runs -> CSV, JSON, Weights & Biases."""

import csv
import io
import sys
from pathlib import Path

from runlogs.loading import describe, read_each, settings_of
from runlogs.output import printable, say, strict_json
from runlogs.parsing import MAX_COLUMNS, number


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
                values = {key: value for key, value in row.items() if number(value) is not None}
                target.log(values, step=row["step"])
            target.finish()
    return 0
