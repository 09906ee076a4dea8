"""Record folders -> the dicts of the leaderboard."""

import re

from runlogs.judging import group_numbers, samples_of, versions
from runlogs.loading import SELF, describe, device_of, find_logs, folders, latest, load, points_of, settings_of
from runlogs.parsing import read_text


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
    """The record dict of one folder: numbers of its largest code version, logs of baselines aside; None without one."""
    paths = [path for path in find_logs(folder) if "baseline" not in str(path.relative_to(folder)).lower()]
    samples = samples_of(load(paths, keep_source=True))[0]
    if not samples:
        return None
    samples = next(iter(versions(samples).values()))
    first, match = samples[0].run, re.match(r"(\d{4})-?(\d\d)-?(\d\d)[_-]?(.*)", folder.name)
    titles = re.findall(r"^#+\s+(.+)", read_text(folder / "README.md"), re.MULTILINE)
    numbers = {key: value for key, value in group_numbers(samples).items() if key != "mean_step_ms"}
    torch, tokens = describe(first)["torch"], latest(samples[0].rows, "tokens")
    name, date = (match[4] or folder.name, "-".join(match.groups()[:3])) if match else (folder.name, None)
    return {"name": name, "date": date, "folder": str(folder), **numbers,
            "readme_title": titles[0].strip() if titles else None, "steps": numbers["steps"][-1],
            "tokens": tokens, "gpus": device_of(first), "torch": torch,
            "code_hash": first.trace.code_hash, "source": source_of(first), "log": str(first.path),
            "curves": [{"label": s.run.path.name, "points": points_of(s.rows)} for s in samples]}


def source_of(run):
    """Source of a run, with its settings below as lines: records of one source differ in them alone."""
    lines = [f"# setting {name} = {value!r}" for name, value in settings_of(run).items() if name not in SELF]
    first, *others = run.trace.parts.items() or [("", "")]
    return "\n".join([first[1], *(f"# file {name}\n{text}" for name, text in others), *lines])
