"""Record folders -> the dicts of the leaderboard."""

import math
import re

from runlogs.arms import evidence_of
from runlogs.judging import gain_of, group_numbers, opponent
from runlogs.loading import describe, device_of, folders, latest, points_of, settings_of
from runlogs.parsing import SELF, read_text

MAX_README = 200_000  # characters that are searched for claims
TARGET = re.compile(r"(?:ttest_1samp\([^()\n,]{1,80},|below|under|target(?: loss)?(?: of)?:?|<=?|≤)"
                    r"[ \t]{0,9}(\d\.\d{2,4})\b", re.IGNORECASE | re.ASCII)
DECIMAL = re.compile(r"(?<![\d.])\d{1,6}\.(\d{1,6})(?![\d.])", re.ASCII)


def records_of(folder, loss_key=None):
    """Record dicts of a folder: of itself if it holds logs, or a README.md beside such folders, else those inside."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder")
    date = re.compile(r"\d{4}-?\d\d-?\d\d")
    inside = [entry for entry in folders(folder) if date.match(entry.name)]
    several = inside and not date.match(folder.name)
    found = [record_of(entry, loss_key) for entry in (inside if several else [folder])]
    return [record for record in found if record]


def record_of(folder, loss_key=None):
    """The record dict of one folder: numbers of one cell of its record arm, as chosen_cell says; None without one.
    `gain`: seconds that it is faster than its baseline arm."""
    try:
        evidence = evidence_of([str(folder)], loss_key, keep_rows=False, keep_source=True)
    except FileNotFoundError:
        return None
    cells, readme = evidence.arm("record").cells, read_text(folder / "README.md")
    if not cells:
        return None
    cell = chosen_cell(cells, readme)
    samples = cell.samples
    first, match = samples[0].run, re.match(r"(\d{4})-?(\d\d)-?(\d\d)[_-]?(.*)", folder.name)
    titles = re.findall(r"^#+\s+(.+)", readme, re.MULTILINE)
    numbers = {key: value for key, value in group_numbers(samples).items() if "step_ms" not in key}
    torch, tokens = describe(first)["torch"], latest(samples[0].rows, "tokens")
    name, date = (match[4] or folder.name, "-".join(match.groups()[:3])) if match else (folder.name, None)
    return {"name": name, "date": date, "folder": str(folder), **numbers,
            "readme_title": titles[0].strip() if titles else None, "steps": numbers["steps"][-1],
            "tokens": tokens, "gpus": device_of(first), "torch": torch,
            "gain": gain_of(cell, opponent(cell, evidence.arm("baseline"))[0]),
            "code_hash": first.trace.code_hash, "source": source_of(first), "log": str(first.path),
            "curves": [{"label": s.run.path.name, "points": points_of(s.rows)} for s in samples]}


def chosen_cell(cells, readme):
    """The cell that a folder's record is. Of those with the most processes: if the README claims some, the fastest of
    these that meets the target it names; else the largest, of equals the fastest, of single runs the newest."""
    most = max(cell.processes or 0 for cell in cells)
    cells = [cell for cell in cells if (cell.processes or 0) == most]
    stated = numbers_in(readme[:MAX_README])
    if claimed := [cell for cell in cells if is_claimed(cell, stated)]:
        target = target_in(readme[:MAX_README])
        means = {id(cell): group_numbers(cell.samples) for cell in claimed}
        good = [cell for cell in claimed if means[id(cell)]["mean_val_loss"] <= target] or claimed
        return min(good, key=lambda cell: means[id(cell)]["mean_time_s"] or math.inf)
    large = [cell for cell in cells if len(cell.samples) == max(len(other.samples) for other in cells)]
    if len(large[0].samples) == 1:
        return max(large, key=lambda cell: cell.samples[0].date or "")
    return min(large, key=lambda cell: group_numbers(cell.samples)["mean_time_s"] or math.inf)


def numbers_in(text):
    """Decimal numbers of a text as it writes them."""
    return {match[0] for match in DECIMAL.finditer(text)}


def is_claimed(cell, stated):
    """Whether the mean loss (4 decimals or more) or the mean time in seconds (2 or more) of the runs of a cell is among
    the numbers of a README. One run has no mean: it may be any line of a list."""
    numbers = group_numbers(cell.samples)
    means = ((numbers["mean_val_loss"], (4, 5, 6)), (numbers["mean_time_s"], (2, 3, 4)))
    found = [f"{mean:.{digits}f}" in stated for mean, most in means if mean is not None for digits in most]
    return len(cell.samples) > 1 and any(found)


def target_in(readme):
    """The target loss that a README names, as in `below 3.28` or `ttest_1samp(losses, 3.28)`; inf if it names none."""
    match = TARGET.search(readme)
    return float(match[1]) if match else math.inf


def source_of(run):
    """Source of a run, with its settings below as lines: records of one source differ in them alone."""
    lines = [f"# setting {name} = {value!r}" for name, value in settings_of(run).items() if name not in SELF]
    first, *others = run.trace.parts.items() or [("", "")]
    return "\n".join([first[1], *(f"# file {name}\n{text}" for name, text in others), *lines])
