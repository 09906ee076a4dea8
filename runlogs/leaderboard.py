"""Record folders -> the dicts of the leaderboard."""

import math
import re

from runlogs.arms import evidence_of
from runlogs.judging import gain_of, group_numbers, opponent
from runlogs.loading import SELF, describe, device_of, folders, latest, points_of, settings_of
from runlogs.parsing import read_text

DECIMAL = re.compile(r"(?<![\d.])\d{1,6}\.(\d{1,6})(?![\d.])", re.ASCII)


def records_of(folder):
    """Record dicts of a folder: of itself if it holds logs or a README.md beside folders of logs, else of each folder
    inside it."""
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder")
    date = re.compile(r"\d{4}-?\d\d-?\d\d")
    inside = [entry for entry in folders(folder) if date.match(entry.name)]
    found = [record_of(entry) for entry in inside] if inside and not date.match(folder.name) else [record_of(folder)]
    return [record for record in found if record]


def record_of(folder):
    """The record dict of one folder: numbers of one cell of its record arm, as chosen_cell says; None without one.
    `gain`: seconds that it is faster than its baseline arm."""
    try:
        evidence = evidence_of([str(folder)], keep_rows=False, keep_source=True)
    except FileNotFoundError:
        return None
    cells, readme = evidence.arm("record").cells, read_text(folder / "README.md")
    if not cells:
        return None
    cell = chosen_cell(cells, readme)
    samples = cell.samples
    first, match = samples[0].run, re.match(r"(\d{4})-?(\d\d)-?(\d\d)[_-]?(.*)", folder.name)
    titles = re.findall(r"^#+\s+(.+)", readme, re.MULTILINE)
    numbers = {key: value for key, value in group_numbers(samples).items() if key != "mean_step_ms"}
    torch, tokens = describe(first)["torch"], latest(samples[0].rows, "tokens")
    name, date = (match[4] or folder.name, "-".join(match.groups()[:3])) if match else (folder.name, None)
    return {"name": name, "date": date, "folder": str(folder), **numbers,
            "readme_title": titles[0].strip() if titles else None, "steps": numbers["steps"][-1],
            "tokens": tokens, "gpus": device_of(first), "torch": torch,
            "gain": gain_of(cell, opponent(cell, evidence.arm("baseline"))[0]),
            "cells": len(cells), "code_hash": first.trace.code_hash, "source": source_of(first),
            "curves": [{"label": s.run.path.name, "points": points_of(s.rows)} for s in samples]}


def chosen_cell(cells, readme):
    """The cell that a folder's record is: of those with the most processes the one whose loss, time and n its README
    claims, then the largest, then the newest."""
    claimed = numbers_in(readme[:200_000])
    most = max(cell.processes or 0 for cell in cells)

    def rank(cell):
        dates = [sample.date or "" for sample in cell.samples]
        return claims_met(cell, claimed, readme), len(cell.samples), max(dates)

    return max((cell for cell in cells if (cell.processes or 0) == most), key=rank)


def numbers_in(text):
    """Decimal numbers of a text as it writes them."""
    return {match[0] for match in DECIMAL.finditer(text)}


def claims_met(cell, claimed, readme):
    """How many of a cell's mean loss (3 decimals or more), mean time in seconds (2 or more) and n a README states."""
    numbers = group_numbers(cell.samples)
    loss, time_s = numbers["mean_val_loss"], numbers["mean_time_s"]
    stated = any(f"{loss:.{digits}f}" in claimed for digits in (4, 5, 6))
    timed = time_s is not None and any(f"{time_s:.{digits}f}" in claimed for digits in (2, 3, 4))
    count = re.search(rf"\bn\s*=\s*{len(cell.samples)}\b", readme[:200_000]) is not None
    return stated + 2 * timed + (count and len(cell.samples) > 1)


def source_of(run):
    """Source of a run, with its settings below as lines: records of one source differ in them alone."""
    lines = [f"# setting {name} = {value!r}" for name, value in settings_of(run).items() if name not in SELF]
    return "\n".join([*run.trace.parts.values(), *lines])
