"""Kill storm: a run is killed at many moments, resumed, and compared with the run that nobody killed.

    python tests/storm.py --kills 100                     # train_gpt.py with 1, 2 and 4 processes, about an hour
    python tests/storm.py --kills 20 --worlds 1 --script train_baseline.py
    python tests/storm.py --kills 100 --only 17,23        # some of the same cases again

Half of the kills fall into the first two seconds, into saves and into evaluations, the others anywhere else: start,
steps, half a line of a log, a checkpoint being read. Signals: KILL, TERM, INT, HUP, USR1. A case passes if

    said      a signal that a run can catch is acknowledged by a line; its exit code is 128 + its number (under torchrun
              0), unless the run was at its end; no traceback
    whole     every checkpoint that counts loads, matches its sha256 and is of the step that its name says
    kept      the newest checkpoint that the console announced is there, or a newer one
    saved     after a signal that can be caught, in the loop of one process: a checkpoint of the step at which it ended
    resumed   the resumed run (a new one where nothing had been saved) starts at the newest checkpoint, ends with code 0
    equal     its losses, validation included, are bit-equal to those of an uninterrupted run of as many processes;
              the difference from another number of processes is reported

Before it is resumed, all file times are scrambled. Results: a line for each case, a table, OUT/SCRIPT/report.json.
Processes are ended by their number only: children of this program, or those that name the case's folder.
"""
import argparse
import dataclasses
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from helpers import documents, environment, flags, make_data  # noqa: E402

STEPS, SAVE, EVAL = 40, 5, 10
SIGNALS = ["KILL", "TERM", "INT", "HUP", "USR1"]
COMMON = dict(iterations=STEPS, save_every=SAVE, eval_every=EVAL, log_every=1, num_layers=2, width=64, head_dim=16,
              seq_len=64, max_doc_len=64, batch_tokens=512, eval_tokens=8192, window=32, device="cpu", dtype="fp32",
              threads=1,
              compile=False)
RECORD = dict(preset="cpu", value_embeds=1, micro_tokens=512, window_start=16, window_step=8)
GROKKING = dict(preset="quick", prime=31, iterations=400, eval_every=20, save_every=1, stop_accuracy=0, dtype="fp32",
                threads=1,
                plot=False, device="cpu")
FLAGS = {"train_gpt.py": COMMON | RECORD, "train_moe.py": COMMON | RECORD,
         "train_baseline.py": COMMON | dict(preset="cpu"), "train_grokking.py": GROKKING}

# --- the killed process: the script as a module, with a trap at one moment

TRAPS = {  # phase -> the function at whose call, and how, the signal comes
    "step": ("MuonAdamW.step", "within"), "validation": ("evaluate", "within"), "save": ("write_checkpoint", "within"),
    "save-first": ("write_checkpoint", "before"), "save-half": ("torch.save", "half_saved"),
    "sync": ("os.fsync", "before"), "rename": ("os.replace", "before"), "renamed": ("os.replace", "after"),
    "remove": ("shutil.rmtree", "half_removed"), "log": ("RunLog.line", "half_a_line"),
    "start": ("open_corpus", "within"),
    "resume": ("torch.load", "within"), "note": ("Run._note_validation", "before"),
}
NAMES = {  # what other scripts call these
    "train_baseline.py": {"MuonAdamW.step": "next_batch", "evaluate": "validate"},
    "train_grokking.py": {"MuonAdamW.step": "step_numbers", "evaluate": "mean_scores",
                          "write_checkpoint": "RunFolder.save",
                          "RunLog.line": "RunFolder.say", "open_corpus": "make_equations",
                          "Run._note_validation": "RunFolder.report"},
}
INJECT = r'''
import json, os, shutil, signal, sys, threading, time
root, name, spec, mark = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), sys.argv[4]
sys.path.insert(0, root)
import torch
script = __import__(name.removesuffix(".py"))

def fire():
    with open(mark, "a") as file:
        file.write("fired\n")
    os.kill(os.getpid(), spec["number"])

def before(original, *args, **kwargs):
    fire()
    return original(*args, **kwargs)

def after(original, *args, **kwargs):
    result = original(*args, **kwargs)
    fire()
    return result

def within(original, *args, **kwargs):
    threading.Timer(spec["delay"], fire).start()
    return original(*args, **kwargs)

def half_saved(original, state, file, *args, **kwargs):
    import io
    original(state, buffer := io.BytesIO())
    data = buffer.getvalue()
    if isinstance(file, (str, os.PathLike)):
        file = open(file, "wb", buffering=0)
    file.write(data[:int(len(data) * spec["part"])])
    file.flush()
    fire()
    file.write(data[int(len(data) * spec["part"]):])
    file.flush()

def half_removed(original, path, *args, **kwargs):
    for name in sorted(os.listdir(path))[:1] if os.path.isdir(path) else ():
        os.unlink(os.path.join(path, name))
        fire()
    return original(path, *args, **kwargs)

def half_a_line(original, owner, text, *more):
    folder = getattr(owner, "folder", None) or owner.path
    with open(os.path.join(folder, more[0] if more else "log.txt"), "a") as file:
        file.write(text[:int(len(text) * spec["part"])])
    fire()
    return original(owner, text, *more)

if spec and int(os.environ.get("RANK", "0")) == spec["rank"]:
    *path, attribute = spec["trap"].split(".")
    owner = {"torch": torch, "os": os, "shutil": shutil}.get(path[0]) or getattr(script, path[0]) if path else script
    original, action, calls = getattr(owner, attribute), globals()[spec["how"]], []
    def trapped(*args, **kwargs):
        if spec["how"] != "half_removed" or os.path.isdir(args[0]):
            calls.append(1)
        return action(original, *args, **kwargs) if len(calls) == spec["call"] else original(*args, **kwargs)
    setattr(owner, attribute, trapped)
sys.exit(script.main(sys.argv[5:]))
'''


@dataclasses.dataclass
class Case:
    number: int
    world: int
    resume_world: int
    phase: str  # one of TRAPS, or `clock`: by this program's clock, of the script itself
    signal: str
    target: str = "rank"  # of several processes: rank, the one at the trap; agent, torchrun; group, all, as Ctrl-C does
    rank: int = 0
    call: int = 1
    delay: float = 0.0
    part: float = 0.5
    keep: int = 2
    early: bool = False  # clock: from the start of the process on, else from its first line
    twice: bool = False  # killed again while the checkpoint is read
    torn: bool = False  # the logs end in half a line
    result: dict = dataclasses.field(default_factory=dict)

    def label(self) -> str:
        where = "" if self.world == 1 else f"rank {self.rank}" if self.target == "rank" else self.target
        words = [word for word in ("early", "twice", "torn") if getattr(self, word)]
        return " ".join([f"{self.world}->{self.resume_world} {self.signal} {self.phase}#{self.call}", where,
                         f"keep {self.keep}", *words])


def draw_cases(kills: int, worlds: list[int], seed: int, grok: bool) -> list[Case]:
    """The cases of a storm; the same seed, the same cases."""
    rng, cases = random.Random(seed), []
    share = {1: 6, 2: 3, 4: 1}
    for number in range(1, kills + 1):
        world = rng.choices(worlds, [share.get(w, 1) for w in worlds])[0]
        case = Case(number, world, world, "", rng.choice([*SIGNALS, "KILL", "KILL"]), keep=rng.choice([1, 2]))
        if rng.random() < 0.5:  # the dangerous half
            case.phase = rng.choice(["clock", "validation", "note", "save", "save-first", "save-half", "sync", "rename",
                                     "renamed", "remove"])
            case.early = case.phase == "clock"
        else:
            case.phase = rng.choice(["clock", "step", "step", "step", "log", "start"])
            case.torn = rng.random() < 0.2
            case.twice = rng.random() < 0.3
        case.rank = rng.randrange(world) if case.phase in ("step", "validation", "start") else 0
        if world > 1 and case.phase in ("clock", "step"):
            case.target = rng.choice(["agent", "group"] + ["rank"] * (case.phase == "step"))
        if case.phase in ("remove", "log"):  # for what goes on after half of it, there is no moment like this one
            case.signal = "KILL"
        saves = STEPS // SAVE
        most = {"step": STEPS - 1, "validation": STEPS // EVAL, "note": STEPS // EVAL, "sync": 30, "rename": 2 * saves,
                "renamed": 2 * saves, "remove": saves - 3, "log": STEPS, "start": 1, "clock": 1}
        case.call = rng.randint(1, 15 if grok and case.phase != "start" else most.get(case.phase, saves))
        slow = {"clock": 2.0, "step": 0.02, "validation": 0.05, "save": 0.05, "start": 0.3}
        case.delay, case.part = rng.uniform(0, slow.get(case.phase, 0.0)), rng.uniform(0.05, 0.95)
        if rng.random() < 0.15 and len(worlds) > 1:
            case.resume_world = rng.choice(worlds)
        cases.append(case)
    return cases


def checkpoints(folder: Path, grok: bool) -> dict[Path, tuple]:
    """Those of the runs of FOLDER/x that count -> order of writing, step, and what is wrong with it (or nothing)."""
    import torch
    found = {}
    for path in (folder / "x").glob("*/ckpt*.pt" if grok else "*/checkpoints/step_*"):
        if not grok and (path.suffix == ".tmp" or not (path / "meta.json").exists()):
            continue
        order, step, wrong = 0, -1, ""
        try:
            if grok:
                order = step = torch.load(path, weights_only=True)["step"]
            else:
                meta = json.loads((path / "meta.json").read_text())
                order, step = meta.get("saved", meta["step"]), meta["step"]
                assert hashlib.sha256((path / "state.pt").read_bytes()).hexdigest() == meta["sha256"], "sha256"
                assert path.stem == f"step_{step:06d}", "its name"
                torch.load(path / "state.pt", weights_only=True)
        except Exception as error:  # noqa: BLE001 - whatever is wrong is reported
            wrong = repr(error)[:100]
        found[path] = order, step, wrong
    return found


class Storm:
    def __init__(self, args):
        self.args, self.script, self.grok = args, args.script, args.script == "train_grokking.py"
        self.out = Path(args.out).resolve() / args.script.removesuffix(".py")
        self.out.mkdir(parents=True, exist_ok=True)
        self.inject, self.references = self.out / "inject.py", {}
        self.inject.write_text(INJECT)
        if not self.grok and not (self.out / "text" / "meta.json").exists():
            make_data(self.out / "text", [documents(20_000, seed) for seed in range(2)], [documents(10_000, 9)])

    # --- processes

    def start(self, world: int, folder: Path, tag: str, case: Case | None, spec: dict,
              resume=False) -> subprocess.Popen:
        given = FLAGS[self.script] | dict(log_dir=folder, experiment_name="x")
        given |= {} if self.grok else dict(data=self.out / "text", keep=case.keep if case else 2)
        head = [sys.executable]
        if world > 1:
            head += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
        trapped = [self.inject, ROOT, self.script, json.dumps(spec), folder / "fired"] if spec else [ROOT / self.script]
        words = [*head, *trapped, *flags(**given), *(["--resume"] if resume else [])]
        with open(folder / f"{tag}.out", "wb") as out:
            return subprocess.Popen([str(w) for w in words], stdout=out, stderr=subprocess.STDOUT, env=environment(),
                                    cwd=folder,
                                    start_new_session=True)

    def wait(self, process: subprocess.Popen, limit: float = 300) -> int | str:
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "hang"

    def orphans(self, folder: Path) -> list[int]:
        """Processes that name this case's folder: torchrun's workers, also those that outlived it."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if str(folder).encode() in words:
                    found.append(int(entry.name))
        return found

    def kill(self, case: Case, folder: Path, tag: str, resume: bool) -> dict:
        """One run that gets its signal; what became of it."""
        trap, how = TRAPS.get("resume" if resume else case.phase, ("", ""))
        spec = dict(trap=NAMES.get(self.script, {}).get(trap, trap), how=how, call=1 if resume else case.call,
                    rank=case.rank,
                    delay=case.delay, part=case.part, number=int(signal.Signals[f"SIG{case.signal}"]))
        outside = case.phase == "clock" or case.target != "rank"
        process = self.start(case.world, folder, tag, case, {} if outside else spec, resume)
        if outside:
            fired = self.send(process, case, folder, tag, spec["number"])
        code = self.wait(process)
        until = time.time() + 60  # workers that outlive a killed torchrun go on to the end, and hold the lock
        while (left := self.orphans(folder)) and time.time() < until:
            time.sleep(0.2)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return dict(code=code, orphans=len(left), fired=fired if outside else (folder / "fired").exists())

    def send(self, process: subprocess.Popen, case: Case, folder: Path, tag: str, number: int) -> bool:
        """A signal from outside: after a step, or some time after the start or the first line."""
        out, until = folder / f"{tag}.out", time.time() + 240
        awaited = f"step {case.call}/" if case.phase == "step" else "" if case.early else "\n"
        while awaited not in out.read_text(errors="replace") and process.poll() is None and time.time() < until:
            time.sleep(0.01)
        time.sleep(case.delay)
        if process.poll() is not None:
            return False
        if case.target == "group":
            os.killpg(process.pid, number)
            for pid in self.orphans(folder):  # torchrun gives each worker a session of its own
                if pid != process.pid:
                    os.kill(pid, number)
        else:
            process.send_signal(number)
        return True

    # --- what is on the disk

    def losses(self, run: Path) -> tuple[dict, int]:
        """(kind, step) -> loss of the last time that the step was done; lines that are no JSON."""
        values, torn, records = {}, 0, []
        if self.grok:
            records = json.loads((run / "metrics.json").read_text())["metrics"]
        else:
            for line in (run / "metrics.jsonl").read_text(errors="replace").splitlines():
                try:
                    records.append(json.loads(line))
                except ValueError:
                    torn += 1
        for record in records:
            if "event" not in record:
                values |= {(kind, record["step"]): record[kind] for kind in ("train_loss", "val_loss")
                           if kind in record}
        return values, torn

    def reference(self, world: int) -> dict:
        """Losses of an uninterrupted run."""
        if world not in self.references:
            folder = self.out / f"reference_{world}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            code = self.wait(self.start(world, folder, "run", None, {}))
            assert code == 0, f"reference of {world} processes: code {code}, {folder}/run.out"
            self.references[world] = self.losses(next((folder / "x").iterdir()))[0]
        return self.references[world]

    # --- a case

    def run_case(self, case: Case) -> dict:
        folder = self.out / f"case_{case.number:03d}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        r, problems, began = {}, [], time.time()
        r |= self.kill(case, folder, "killed", False)
        if not r["fired"]:
            failed = [] if r["code"] == 0 else [f"the run ended before its signal: {folder}/killed.out"]
            return r | {"verdict": "FAIL" if failed else "not fired", "problems": failed}
        text = (folder / "killed.out").read_text(errors="replace")
        problems += self.ending(case, r["code"], text)
        if case.twice and (found := checkpoints(folder, self.grok)):
            self.kill(case, folder, "again", True)
        found = checkpoints(folder, self.grok)
        good = sorted((order, step) for order, step, wrong in found.values() if not wrong)
        newest = good[-1][1] if good else 0
        problems += [f"damaged: {path}: {wrong}" for path, (*_, wrong) in found.items() if wrong]
        said = [int(n) for n in re.findall(r"^checkpoint \S*step_(\d+)$", text, re.MULTILINE)]
        if said and newest < said[-1]:
            problems.append(f"lost: announced step {said[-1]}, newest on the disk {newest}")
        done = [int(n.replace(",", "")) for n in re.findall(r"^step ([\d,]+)/", text, re.MULTILINE)]
        if self.caught(case, text) and done and newest < done[-1]:
            problems.append(f"not saved: step {done[-1]} was done, newest on the disk {newest}")
        self.disturb(case, folder)
        r |= self.resumed(case, folder, newest, problems) | {"seconds": round(time.time() - began)}
        verdict = "FAIL" if problems else "ok"
        if verdict == "ok" and not self.args.keep_folders:
            shutil.rmtree(folder)
        return r | {"verdict": verdict, "problems": problems}

    def caught(self, case: Case, text: str) -> bool:
        """Whether the signal came when the run of one process was in its loop, and can be caught."""
        return case.signal != "KILL" and case.world == 1 and case.phase not in ("clock", "start") and "\nstep " in text

    def ending(self, case: Case, code, text: str) -> list[str]:
        """What is wrong with how a run ended on its signal."""
        number, problems = int(signal.Signals[f"SIG{case.signal}"]), []
        if code == "hang":
            return ["the killed run hangs"]
        at_end = re.search(rf"^step {FLAGS[self.script]['iterations']}/", text, re.MULTILINE)
        if self.caught(case, text):
            if f"SIG{case.signal}" not in text:
                problems.append("the signal is not acknowledged")
            if code not in (128 + number, 0 if at_end else None):
                problems.append(f"code {code}: {text[-300:]}")
        if case.world == 1 and "Traceback" in text:
            problems.append(f"traceback: {text[-500:]}")
        acknowledged = case.world > 1 and f"SIG{case.signal}: saves" in text and case.target == "rank"
        if acknowledged and (code != 0 or "Traceback" in text):
            problems.append(f"torchrun: code {code} after a clean stop: {text[-500:]}")
        return problems

    def disturb(self, case: Case, folder: Path):
        """What a copy, or a crash, may do to the files: other times, half a line."""
        rng = random.Random(case.number)
        for path in (folder / "x").rglob("*"):
            os.utime(path, (rng.randrange(10**9),) * 2)
        for path in (folder / "x").glob("*/*") if case.torn else ():
            if path.name in ("log.txt", "metrics.jsonl") and (data := path.read_bytes()):
                last = data.rstrip(b"\n").rfind(b"\n") + 1
                path.write_bytes(data[:last + (len(data) - last) // 2])

    def resumed(self, case: Case, folder: Path, newest: int, problems: list[str]) -> dict:
        """The run goes on, from the newest checkpoint or anew; it is compared."""
        code = self.wait(self.start(case.resume_world, folder, "resumed", case, {}, resume=True))
        text = (folder / "resumed.out").read_text(errors="replace")
        places = [path for path in (folder / "x").glob("*") if self.checkpoints_of(path)]
        if not newest:
            if code == 0 or "checkpoint in" not in text or re.search(rf'File ".*{self.script}"', text):
                problems.append(f"--resume without a checkpoint: code {code}: {text[-300:]}")
            before = set((folder / "x").glob("*"))
            code = self.wait(self.start(case.resume_world, folder, "fresh", case, {}))
            text = (folder / "fresh.out").read_text(errors="replace")
            places = sorted(set((folder / "x").glob("*")) - before)
        start = re.search(r"^resumed .* after step ([\d,]+)", text, re.MULTILINE)
        start = int(start[1].replace(",", "")) if start else 0
        last = FLAGS[self.script]["iterations"]
        over = newest == last and "this run has ended" in text
        if start != newest and not over and not self.grok:
            problems.append(f"resumed after step {start}, the newest checkpoint is of {newest}")
        if code or len(places) != 1:
            problems.append(f"resumed run: code {code}, {len(places)} run folders: {text[-500:]}")
            return {"from": start, "equal": None}
        wanted, (mine, torn) = self.reference(case.resume_world), self.losses(places[0])
        needed = [key for key in wanted if key[1] > start and not over or key[1] == newest and key[0] == "val_loss"]
        if missing := [key for key in needed if key not in mine and not case.torn]:
            problems.append(f"not in the metrics: {missing[:4]}")
        gaps = [abs(mine[key] - value) for key, value in wanted.items() if key in mine]
        equal = max(gaps) == 0
        if case.world == case.resume_world and not equal:
            problems.append(f"not bit-equal: {max(gaps)}")
        if wrong := [(path.name, w) for path, (*_, w) in checkpoints(folder, self.grok).items() if w]:
            problems.append(f"damaged after the resumed run: {wrong}")
        kept = len(self.checkpoints_of(places[0]))
        if kept > case.keep and not self.grok:
            problems.append(f"{kept} checkpoints are kept, not {case.keep}")
        return {"from": start, "equal": equal, "gap": max(gaps), "torn": torn}

    def checkpoints_of(self, run: Path) -> list[Path]:
        return [path for path in checkpoints(run.parent.parent, self.grok) if run in path.parents]

    def main(self) -> int:
        worlds = [int(w) for w in self.args.worlds.split(",")]
        cases = draw_cases(self.args.kills, worlds, self.args.seed, self.grok)
        wanted = set(map(int, filter(None, self.args.only.split(","))))
        cases = [case for case in cases if not wanted or case.number in wanted]
        for case in cases:
            r = case.result = self.run_case(case)
            print(f"{case.number:3d} {case.label():44s} {r['verdict']:9s} code {r['code']!s:4s} "
                  f"from {r.get('from')!s:4s} "
                  f"equal {r.get('equal')!s:5s} gap {r.get('gap', 0):.0e} {r.get('seconds', 0)} s",
                  *r["problems"], sep="\n      ", flush=True)
            (self.out / "report.json").write_text(json.dumps([dataclasses.asdict(c) for c in cases if c.result],
                                                             indent=1))
        print(f"\n{self.script}: processes -> resumed with   kills  resumed  bit-equal  largest gap  failed  not fired")
        for pair in sorted({(c.world, c.resume_world) for c in cases}):
            group = [c.result for c in cases if (c.world, c.resume_world) == pair]
            fired = [r for r in group if r["verdict"] != "not fired"]
            print(f"{pair[0]} -> {pair[1]:<20} {len(fired):>21} {sum('gap' in r for r in fired):>8} "
                  f"{sum(bool(r.get('equal')) for r in fired):>10} "
                  f"{max((r.get('gap', 0) for r in fired), default=0):>12.1e} "
                  f"{sum(r['verdict'] == 'FAIL' for r in fired):>7} {len(group) - len(fired):>10}")
        return int(any(c.result["verdict"] == "FAIL" for c in cases))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_gpt.py", choices=FLAGS)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--worlds", default="", help="default: 1,2,4; 1 for train_grokking.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="numbers of cases")
    parser.add_argument("--out", default=Path(tempfile.gettempdir()) / "nanospeedrun_storm")
    parser.add_argument("--keep-folders", action="store_true", help="also those of cases that pass")
    args = parser.parse_args()
    args.worlds = args.worlds or ("1" if args.script == "train_grokking.py" else "1,2,4")
    return args


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, and inherited, where a shell started it with &
    sys.exit(Storm(parse()).main())
