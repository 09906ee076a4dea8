"""The records of a folder, numbered as the board numbers them, and found by number or name."""

import re
from difflib import get_close_matches
from pathlib import Path

from runlogs.loading import folders

CASELESS = str.casefold


def tracks_of(folder):
    """Folders of records in `folder`: its track_* folders, else itself. FileNotFoundError if it is not there."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"'{folder}' is no folder of records: expected one like 'records/track_cpu'")
    return [inside for inside in folders(folder) if inside.name.startswith("track_")] or [folder]


def numbered(track):
    """Records of a track in the order of the board, each with its "number"."""
    from runlogs.board import ranked
    from runlogs.leaderboard import records_of

    return [{**entry["record"], "number": entry["number"]} for entry in ranked(records_of(track))]


def find_records(names, folder):
    """{name: record} of numbers or names. ValueError if one means none or several of the folder's records."""
    tracks = {track: numbered(track) for track in tracks_of(folder)}
    return {name: find_record(name, tracks) for name in names}


def find_record(name, tracks):
    """The record that a number or a name means, of {track: records}."""
    records = [record for records in tracks.values() for record in records]
    found = [record for record in records if answers_to(record, name)]
    if len(found) == 1:
        return found[0]
    if found:
        listed = ", ".join(f"'{record['folder']}'" for record in found[:5])
        raise ValueError(f"'{name}' means {len(found)} records, {listed}: name one of these, or its track with "
                         "--records")
    ranges = "; ".join(f"'{track}' holds {range_of(records)}" for track, records in tracks.items())
    near = get_close_matches(CASELESS(name), {CASELESS(record["name"]): 0 for record in records}, 3, 0.5)
    near = [record["name"] for record in records if CASELESS(record["name"]) in near]
    raise ValueError(f"'{name}' is not there, and no record: {ranges}"
                     + (f"; near it are {', '.join(dict.fromkeys(near))}" if near else ""))


def answers_to(record, name):
    """Whether a record has this number, or its name or that of its folder is this one, in upper or lower case."""
    if re.fullmatch(r"#?\d{1,6}", name, re.ASCII):
        return record["number"] == int(name.removeprefix("#"))
    return CASELESS(name) in (CASELESS(record["name"]), CASELESS(Path(record["folder"]).name))


def range_of(records):
    """The numbers of records and the names of the first and the last, in words."""
    if not records:
        return "no record"
    first, last = (f"#{records[i]['number']} ({records[i]['name']})" for i in (0, -1))
    return first if len(records) == 1 else f"{first} to {last}"
