"""Bad input that nobody thought of: drawn settings, meta.json of data and checkpoints, shards, states.

Whatever it is, a script ends with code 0, or with one sentence; it does not hang (10 s of CPU time), writes nothing but
its run's folder, and no control character of a file reaches the terminal. The same inputs each time (derandomize).
"""
import contextlib
import copy
import faulthandler
import functools
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import baseline
import pytest
import torch
from helpers import VOCAB, documents, make_data, tiny
from hypothesis import HealthCheck, Phase, currently_in_test_context, given, note, settings
from hypothesis import strategies as st

import generate
import logger
import train_baseline
import train_gpt
import train_moe

SCRIPTS = pytest.mark.parametrize("script", [train_gpt, train_moe, train_baseline], ids=lambda script: script.__name__)
CONTROLS = "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"  # which would drive a terminal
HUGE = [2**31, 2**32, 2**63, 10**12, 10**30]
WORDS = ["", " ", "nan", "-inf", "1e400", "1e-400", "0x10", "1,2", ",", "auto", "None", "true", "-", "--", "~", "..",
         "/", "a/b", "é", "٣",
         "\x1b[2J\x07", "\r\n", "\u202e", "\udcff", "9" * 400, "9" * 5000, "x" * 5000]
NUMBERS = [-1, 0, 1, 2, 3, 7, 16, 63, 64, 65535, 65536, -(2**63), 0.5, 255.5, -0.0, 1e-30, 1e30, 1e308, math.nan,
           math.inf, *HUGE]


def cases(count: int):
    """A hypothesis test of so many examples."""
    return settings(max_examples=count, derandomize=True, database=None, deadline=None, report_multiple_bugs=False,
                    phases=[Phase.generate], suppress_health_check=list(HealthCheck))  # no search for smaller inputs


# --- a run, watched


class Hangs(BaseException):
    pass


@contextlib.contextmanager
def watchdog():
    """Ends what takes more than 10 s of CPU time, or waits for longer than a minute."""
    def stop(number, frame):
        raise Hangs("10 s of CPU time, or a minute, are over")
    old = [signal.signal(number, stop) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, 10)
    signal.alarm(60)
    faulthandler.dump_traceback_later(150, exit=True)  # threads, which no signal ends
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), old, strict=True):
            signal.signal(number, handler)


def outcome(main, argv: list) -> tuple[int, str, str]:
    """Exit code, stdout, stderr of a command line in this process; they are what a terminal would get."""
    argv = [str(word) for word in argv]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors)
                for errors in ("strict", "backslashreplace"))
    with watchdog(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(argv)
        except SystemExit as done:  # argparse
            code = done.code
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode(errors="replace"))
    if currently_in_test_context():
        note(f"argv: {argv[-8:]}, code {code}\nstderr: {texts[1][:3000]}")
    return code, *texts


def check_outcome(main, argv: list, allowed=(0, 1, 2)) -> tuple[int, str]:
    """Code and stderr of a command line that ends as a user may expect."""
    code, out, err = outcome(main, argv)
    assert code in allowed
    for text in (out, err) if main is not generate.main else (err,):  # a sample's bytes stay as they are
        assert not re.search(CONTROLS, text), "control characters"
    errors = re.findall(r"^(?:\S+\.py: )?error: ", err, re.MULTILINE)
    assert len(errors) == (code in (1, 2)) and "Traceback" not in err and len(err) < 10_000
    return code, err


def files_in(folder: Path) -> dict[str, int]:
    """All paths, but what runs of the experiment `x` and the cache of hashes write -> inode, size and time."""
    paths = [path for path in sorted(folder.rglob("*")) if path.name != ".hashes.json"
             and folder / "logs" not in path.parents]
    return {str(path): (stat.st_ino, stat.st_size, stat.st_mtime_ns)
            for path in paths if path != folder / "logs" for stat in [path.lstat()] if not path.is_dir()}


@contextlib.contextmanager
def place():
    """A fresh folder, in which only run folders come to be."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder, before = Path(name), set(os.listdir())
        make_data(folder / "data", [documents(600, 0), documents(600, 1)], [documents(400, 9)])
        yield folder
        assert set(os.listdir()) == before and {path.name for path in folder.iterdir()} <= {"data", "logs"}
        assert {path.name for path in folder.glob("logs/*")} <= {"x"}


def short(script, folder: Path, **changes) -> list[str]:
    """Flags of a run of one step."""
    changes = {"iterations": 1, "eval_every": 0, "save_every": 1, **changes}
    if script is train_baseline:
        return baseline.tiny(folder, **{"warmup_steps": 0, **changes})
    return tiny(folder, **{"momentum_warmup": 0, "momentum_cooldown": 0, "tail": 0.0, **changes})


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Runs that do not wait for the disk, and do not ask git."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        for script in (train_gpt, train_moe, train_baseline):
            patch.setattr(script, "command_output", lambda *command: None)
        yield


# --- settings


def names_and_values(script):
    """Flags, as words: any setting, any value."""
    text = st.text(st.characters(exclude_characters="\0"), max_size=8)
    words = st.sampled_from(WORDS) | st.sampled_from(NUMBERS).map(str) | text
    several = st.lists(words, max_size=3).map(",".join)
    names = st.sampled_from([field.name for field in fields(script.Settings)]).map(lambda name: name.replace("_", "-"))
    flag = st.tuples(names, words | several).map(lambda pair: f"--{pair[0]}={pair[1]}")
    switch = names.flatmap(lambda name: st.sampled_from([f"--{name}", f"--no-{name}"]))
    return st.lists(flag | flag | flag | switch, min_size=1, max_size=4)


@SCRIPTS
def test_settings(script):
    @cases(125)
    @given(names_and_values(script))
    def check(argv):
        def main(words):
            try:
                script.parse_settings(words, 1)
            except script.UserError as error:
                raise SystemExit(str(error)) from error  # as main does, without its print
            return 0
        code, _, err = outcome(main, ["--device", "cpu", *argv])
        assert code in (0, 2) or isinstance(code, str)
        assert code != 2 or err.startswith(("error: ", "usage:"))
        assert not re.search(CONTROLS, err), "control characters"
    check()


@SCRIPTS
def test_settings_of_a_run(script):
    """Values that are small enough to train with, or too large to try."""
    values = st.sampled_from([*WORDS[:12], *(str(x) for x in NUMBERS if x not in (65535, 65536))])
    kinds = {field.name: field.type for field in fields(script.Settings)}
    left_out = ("help", "iterations", "device", "data", "log_dir", "experiment_name", "compile", "enable_profiling",
                "tracker")
    names = st.sampled_from([name for name in kinds if name not in left_out])

    @cases(20)
    @given(st.dictionaries(names, values, min_size=1, max_size=2))
    def check(changes):
        switches = {name for name in changes if kinds[name] == "bool"}
        words = [f"--{name}={value}" for name, value in changes.items() if name not in switches]
        with place() as folder:
            before = files_in(folder)
            check_outcome(script.main, [*short(script, folder, **{name: bool(changes[name]) for name in switches}),
                                        *words])
            assert files_in(folder) == before
    check()


# --- JSON


DEEP = functools.reduce(lambda inner, _: [inner], range(300), [])
VALUES = st.one_of(st.none(), st.booleans(), st.sampled_from([*NUMBERS, 10**400]), st.sampled_from(WORDS),
                   st.sampled_from([[], {}, [[]], {"": {}}, DEEP]).map(copy.deepcopy))


@st.composite
def mutated(draw, value):
    """A JSON value, changed at one to three places; or any text instead of it."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        part = value
        while True:  # deeper and deeper
            if not (keys := list(part) if isinstance(part, dict) else range(len(part))):
                return draw(VALUES)
            key = draw(st.sampled_from(keys))
            if not isinstance(part[key], dict | list) or not part[key] or draw(st.booleans()):
                break
            part = part[key]
        action = draw(st.sampled_from(["replace"] * 6 + ["remove", "add", "wrap"]))
        if action == "remove":
            del part[key]
        elif action == "wrap":
            part[key] = [part[key]]
        elif action == "add" and isinstance(part, dict):
            part[draw(st.sampled_from(WORDS))] = draw(VALUES)
        else:
            part[key] = draw(VALUES)
    return value


RAW = [b"", b"\x00", b"{", b"\xff\xfe{}", b"[" * 100_000, b"{}", b"null", b'{"a":' * 5000, b"\xef\xbb\xbf{}",
       b'"\\ud800"', b"9" * 5000]


def json_bytes(value: dict, rest: dict | None = None) -> st.SearchStrategy[bytes]:
    """The bytes of a mutated JSON file, of which the rest stays."""
    whole = mutated(value).map(lambda v: v | (rest or {}) if isinstance(v, dict) else v)
    text = whole.map(lambda v: json.dumps(v, ensure_ascii=False).encode(errors="surrogatepass"))
    cut = st.tuples(text, st.floats(0, 1)).map(lambda pair: pair[0][:int(len(pair[0]) * pair[1])])
    return st.one_of(*[text] * 8, cut, st.sampled_from(RAW))


@functools.cache
def example_meta() -> dict:
    with place() as folder:
        meta = json.loads((folder / "data" / "meta.json").read_text())
    return meta | {"made_with": "python data/mine.py", "tokenizer": {"kind": "char", "characters": ["a", "b", "c"]}}


# --- data


@cases(30)
@given(st.data())
def test_meta_of_data(data):
    script = data.draw(st.sampled_from([train_gpt, train_moe, train_baseline]))
    with place() as folder:
        (folder / "data" / "meta.json").write_bytes(data.draw(json_bytes(example_meta())))
        before = files_in(folder)
        check_outcome(script.main, short(script, folder), (0, 1))
        assert files_in(folder) == before


def put(path: Path, write):
    """Something else in a file's place."""
    path.unlink()
    write(path)


THINGS = {  # which are no shards
    "FIFO": lambda path: put(path, os.mkfifo), "folder": lambda path: put(path, os.mkdir),
    "missing": lambda path: path.unlink(), "dangling": lambda path: put(path, lambda p: p.symlink_to("nowhere")),
    "loop": lambda path: put(path, lambda p: p.symlink_to(p.name)),
    "zeros without end": lambda path: put(path, lambda p: p.symlink_to("/dev/zero")),
    "full device": lambda path: put(path, lambda p: p.symlink_to("/dev/full")),
    "terminal": lambda path: put(path, lambda p: p.symlink_to("/dev/tty")),
    "sparse": lambda path: os.truncate(path, 2**40), "text": lambda path: path.write_text("x" * 5000),
    "itself twice": lambda path: path.write_bytes(path.read_bytes() * 2),
}


@st.composite
def damage(draw):
    """What is done to a shard, as a function of its path."""
    kind = draw(st.sampled_from(["thing", "header", "bytes", "cut"]))
    if kind == "thing":
        return THINGS[draw(st.sampled_from(sorted(THINGS)))]
    at = draw(st.integers(0, 11) if kind == "header" else st.integers(0, 2200))
    new = draw(st.binary(min_size=1, max_size=4))

    def change(path: Path):
        content = path.read_bytes()
        path.write_bytes(content[:at] + (b"" if kind == "cut" else new + content[at + len(new):]))
    return change


@cases(25)
@given(damage(), st.sampled_from(["train_000000", "train_000001", "val_000000", "hashes", "meta"]), st.integers(1, 12))
def test_shards(change, which, iterations):
    names = {"hashes": ".hashes.json", "meta": "meta.json"}
    with place() as folder:
        path = folder / "data" / names.get(which, f"data_{which}.bin")
        if which == "hashes":
            path.write_text("{}")
        change(path)
        before = files_in(folder)
        check_outcome(train_gpt.main, short(train_gpt, folder, iterations=iterations), (0, 1))
        assert files_in(folder) == before


@cases(12)
@given(st.data())
def test_cache_of_hashes(data):
    with place() as folder:
        train_gpt.open_corpus(str(folder / "data")).fingerprint()
        path = folder / "data" / ".hashes.json"
        path.write_bytes(data.draw(json_bytes(json.loads(path.read_text()))))
        check_outcome(train_gpt.main, short(train_gpt, folder), (0, 1))


# --- checkpoints


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folders with a run that has checkpoints of the steps 1 and 2, by script."""
    folders = {}
    for script in (train_gpt, train_moe, train_baseline):
        folders[script] = folder = tmp_path_factory.mktemp(script.__name__)
        chars = "".join(map(chr, range(48, 48 + VOCAB)))
        make_data(folder / "data", [documents(600, 0)], [documents(400, 9)],
                  tokenizer={"kind": "char", "chars": chars}, eot=None)
        assert script.main(short(script, folder, iterations=2)) == 0
        for path in folder.glob("logs/x/*/checkpoints/*/meta.json"):
            meta = json.loads(path.read_text())
            path.write_text(json.dumps(meta | {"settings": meta["settings"] | {"iterations": 3}}))
    return folders


@contextlib.contextmanager
def copy_of(folder: Path):
    """A copy of a folder with a run, and the paths of its checkpoints, the oldest first."""
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        shutil.copytree(folder, Path(name) / "copy")
        yield Path(name) / "copy", sorted(Path(name).glob("copy/logs/x/*/checkpoints/*"))


def goes_on(script, folder: Path):
    """A sample of the run, then --resume, end as a user may expect, and write only to the run's folder."""
    before, outside = files_in(folder), set(os.listdir(folder.parent))
    check_outcome(generate.main, ["--checkpoint", folder / "logs", "--max-tokens", 2, "--device", "cpu"], (0, 1))
    check_outcome(script.main, [*short(script, folder, iterations=3), "--resume"], (0, 1))
    assert files_in(folder) == before and set(os.listdir(folder.parent)) == outside
    assert {path.name for path in folder.glob("logs/*")} == {"x"} and len(list(folder.glob("logs/x/*"))) == 1


@SCRIPTS
def test_meta_of_checkpoints(script, runs):
    @cases(15)
    @given(st.data())
    def check(data):
        with copy_of(runs[script]) as (folder, paths):
            for path in paths if data.draw(st.booleans()) else paths[-1:]:
                meta = json.loads((path / "meta.json").read_text())
                left_out = {"settings"} if data.draw(st.booleans()) else set()  # else most changes would be there
                part = {key: meta[key] for key in train_gpt.META if key in meta and key not in left_out}
                rest = {key: value for key, value in meta.items() if key not in part}
                (path / "meta.json").write_bytes(data.draw(json_bytes(part, rest)))
            goes_on(script, folder)
    check()


ODD = [None, True, "x", [], -1, 2**63 - 1, 10**400, -1e299, 1e299, math.nan]


def test_each_number_of_a_checkpoint(runs):
    """Each key that is read, with a third of the odd values, the next key with the next third."""
    keys = sorted(train_gpt.META.keys() - {"settings"})
    places = [(key, part) for key in keys
              for part in (train_gpt.META[key] if key in ("data", "position") else [None])]
    for i, (key, part) in enumerate(places):
        for odd in ODD[i % 3::3]:
            value = odd if part is None else {part: odd}
            with copy_of(runs[train_gpt]) as (folder, paths):
                meta = json.loads((paths[-1] / "meta.json").read_text())
                changed = meta[key] | value if isinstance(value, dict) and value else value
                (paths[-1] / "meta.json").write_text(json.dumps(meta | {key: changed}))
                goes_on(train_gpt, folder)


TENSORS = {
    "other shape": lambda t: torch.zeros(*t.shape, 2, dtype=t.dtype), "shorter": lambda t: t.flatten()[:1].clone(),
    "empty": lambda t: t.flatten()[:0].clone(), "turned": lambda t: t.T.contiguous() if t.dim() == 2 else t.flip(0),
    "float64": lambda t: t.double(), "int": lambda t: t.to(torch.int64), "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t > 0, "half": lambda t: t.half(),
    "nan": lambda t: torch.full_like(t.float(), math.nan).to(t.dtype),
    "inf": lambda t: torch.full_like(t.float(), 1e38).to(t.dtype), "zero": torch.zeros_like, "ones": torch.ones_like,
    "view": lambda t: t.flatten()[:1].expand(t.numel()).reshape(t.shape), "sparse": lambda t: t.to_sparse(),
    "nothing": lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"),
    "parameter": lambda t: torch.nn.Parameter(t.float()),
}


OTHERS = [None, [], {}, "x", 0, -1, 2, 2.0, math.nan, 10**400, True, torch.zeros(3), {"state": {}}, [{}], {1: 2}]


def tree(state: dict, path: tuple = ()) -> list[tuple]:
    """The paths of all that a state holds."""
    return [found for key, value in state.items()
            for found in [(*path, key), *(tree(value, (*path, key)) if isinstance(value, dict) else [])]]


class Change(NamedTuple):
    """What is done to a state at a path."""
    path: tuple
    action: str
    other: int = 0

    def apply(self, state: dict):
        *path, key = self.path
        part = functools.reduce(dict.__getitem__, path, state)
        if self.action in TENSORS:
            part[key] = TENSORS[self.action](torch.as_tensor(part[key])) if not isinstance(part[key], dict) else {}
        elif self.action == "all":
            return OTHERS[self.other]
        elif self.action == "replace":
            part[key] = OTHERS[self.other]
        else:
            part |= {f"{key}x": part.pop(key)} if self.action == "rename" else {}
            part.pop(key, None)
        return state


def changes_of(state: dict) -> st.SearchStrategy[Change]:
    actions = st.sampled_from(sorted(TENSORS)) | st.sampled_from(["remove", "rename", "replace", "replace", "all"])
    return st.builds(Change, st.sampled_from(tree(state)), actions, st.integers(0, len(OTHERS) - 1))


def save_state(path: Path, content: bytes):
    """A state.pt, and a meta.json that agrees."""
    (path / "state.pt").write_bytes(content)
    meta = json.loads((path / "meta.json").read_text())
    meta |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (path / "meta.json").write_text(json.dumps(meta))


@SCRIPTS
def test_states_with_the_right_hash(script, runs):
    @cases(17)
    @given(st.data())
    def check(data):
        with copy_of(runs[script]) as (folder, paths):
            for path in paths if data.draw(st.booleans()) else paths[-1:]:
                content = (path / "state.pt").read_bytes()
                kind = data.draw(st.sampled_from(["state"] * 8 + ["cut", "bytes", "garbage"]))
                if kind == "state":
                    state = torch.load(path / "state.pt", weights_only=True)
                    torch.save(data.draw(changes_of(state)).apply(state), buffer := io.BytesIO())
                    content = buffer.getvalue()
                elif kind == "garbage":
                    content = data.draw(st.sampled_from([b"", b"PK\x03\x04", b"\x80\x04N.", b"x" * 5000]))
                else:
                    at = data.draw(st.integers(0, len(content) - 1))
                    content = content[:at] + (b"" if kind == "cut" else bytes([content[at] ^ 1]) + content[at + 1:])
                save_state(path, content)
            goes_on(script, folder)
    check()


@cases(12)
@given(st.sampled_from(sorted(THINGS)), st.sampled_from(["state.pt", "meta.json", "config.json", "metrics.jsonl",
                                                         "log.txt", "lock"]))
def test_files_of_a_run_that_are_something_else(runs, kind, name):
    with copy_of(runs[train_gpt]) as (folder, paths):
        where = paths[-1] if name in ("state.pt", "meta.json") else paths[-1].parents[1]
        THINGS[kind](where / name)
        goes_on(train_gpt, folder)


# --- logs

LINES = [b"", b"=" * 100, b"step:1/2 val_loss:nan train_time:1ms step_avg:1ms",
         b"step:1/2 val_loss:1e400 train_time:-1ms", b"s:1 trl:3.2",
         b"step:" + b"9" * 5000 + b"/1 train_loss:1", b"import sitecustomize\x1b]0;title\x07", b"[" * 5000, b"{}",
         b"null", b"5",
         b'{"step": 1, "train_loss": null}', b'{"event": "end", "status": "\\u001b[2J"}', b'{"event": "routers"}',
         b"\xff\xfe\x00",
         b"-" * 40 + b"\n# ../evil.py\n" + b"-" * 40, b"Running Python \xc2\x9b31m"]


@st.composite
def mutated_log(draw, content: bytes):
    """A log with one to four lines changed, each somewhere in its last ones or its first."""
    lines = content.split(b"\n")
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(30, len(lines) - 1))) * draw(st.sampled_from([1, -1]))
        word = draw(st.sampled_from([str(x).encode() for x in NUMBERS] + [w.encode(errors="surrogateescape")
                                                                          for w in WORDS]))
        action = draw(st.sampled_from(["number", "number", "string", "line", "line", "remove", "twice", "cut"]))
        if action == "number":
            lines[at] = re.sub(rb"\d[\d.e]*", lambda _, word=word: word, lines[at], count=draw(st.integers(1, 3)))
        elif action == "string":
            lines[at] = re.sub(rb"[a-z_]+", lambda _, word=word: word, lines[at], count=draw(st.integers(1, 3)))
        elif action == "line":
            lines.insert(at, draw(st.sampled_from(LINES)))
        elif action == "remove":
            lines[at] = b""
        elif action == "twice":
            lines[at:at] = lines[at:][:20]
        else:
            lines[at] = lines[at][:len(lines[at]) // 2]
    return b"\n".join(lines)


COMMANDS = {  # of logger.py, on a run `a` that is odd and a whole one, `b`
    "show": ["a"], "show --json": ["a"], "show --markdown": ["a"], "compare --json": ["a", "b"],
    "compare --no-plot": ["a", "b"],
    "diff": ["a", "b"], "diff --json": ["b", "a"], "stats --target 3.28": ["a", "b"], "stats --json": ["a"],
    "verify": ["."],
    "extract -o out/log.py": ["a"], "export -o out/all.csv": ["a"], "export -o out/all.json": ["a", "b"],
    "board --html out/board.html": ["."], "history main": ["."], "--experiment-name x --log-dir . --no-plot": [],
    "profile": ["a"],
}


@cases(50)
@given(st.data())
def test_logs(runs, data):
    (run,) = runs[data.draw(st.sampled_from([train_gpt, train_moe]))].glob("logs/x/*")
    with tempfile.TemporaryDirectory(prefix="fuzz") as name, contextlib.chdir(name):
        for copied in ("x/a", "x/b"):
            shutil.copytree(run, copied, ignore=shutil.ignore_patterns("checkpoints"))
        os.mkdir("out")
        for file in data.draw(st.sampled_from([["metrics.jsonl"], ["log.txt"], ["config.json"],
                                               ["log.txt", "config.json"]])):
            path = Path("x/a", file)
            config = file == "config.json"
            odd = json_bytes(json.loads(path.read_text())) if config else mutated_log(path.read_bytes())
            path.write_bytes(data.draw(odd))
            if file == "log.txt":
                Path("x/a/metrics.jsonl").unlink()
        before = files_in(Path.cwd())
        command = data.draw(st.sampled_from(sorted(COMMANDS)))
        check_log_command([*command.split(), *(f"x/{word}" for word in COMMANDS[command])])
        after = files_in(Path.cwd())
        written = after.keys() - before.keys()
        assert before.items() <= after.items() and all("/out/" in x or x.endswith("x/logs.txt") for x in written)
        for new in Path("out").rglob("*"):
            assert new.suffix in (".py", ".csv", ".json", ".html", ""), new
            assert new.stem not in ("numpy", "sitecustomize", "evil")


def check_log_command(argv: list[str]):
    """As check_outcome, but a check of logger.py that fails is code 1 without an error."""
    code, out, err = outcome(logger.main, argv)
    assert code in (0, 1, 2) and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) <= 1
    for text in (out, err):
        assert not re.search(CONTROLS, text), "control characters"
