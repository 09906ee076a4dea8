"""Power loss: what a disk holds when the power goes while a run writes its checkpoints.

    python tests/power.py --copies 25                     # as root: 25 copies with --keep 1, 25 with --keep 2
    python tests/power.py --script train_baseline.py

The run writes to an ext4 file system in a file (a loop mount). At a random moment it is stopped, and the file copied:
it holds what had reached the disk until then, and not what was still in memory. The copy is made anew until it is equal
to the file, so that it is a state that the disk had. Mounted without ext4's own care for renamed files
(noauto_da_alloc), with data and names written in any order (data=writeback) and names once a second (commit=1): what
the run does not sync is lost, or empty.

A copy passes if its newest whole checkpoint is the one that the console had announced, or a newer one.
"""
import argparse
import contextlib
import filecmp
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

import storm

OPTIONS = "loop,commit=1,noauto_da_alloc,data=writeback"


def shell(*command):
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, command))}: {done.stderr}"


@contextlib.contextmanager
def mounted(image: Path, place: Path, options: str):
    place.mkdir(exist_ok=True)
    shell("mount", "-o", options, image, place)
    try:
        yield place
    finally:
        shell("umount", place)


def announced(out: Path, pattern: str) -> int:
    """The step of the last checkpoint that a run has announced; 0 without one."""
    found = re.findall(pattern, out.read_text(errors="replace"), re.MULTILINE)
    return int(found[-1].replace(",", "")) if found else 0


def copy_of_disk(process: subprocess.Popen, image: Path, to: Path):
    """What the disk holds at this moment."""
    process.send_signal(signal.SIGSTOP)
    while not (to.exists() and filecmp.cmp(image, to, shallow=False)):  # the system may still be writing
        shutil.copyfile(image, to)
    process.send_signal(signal.SIGCONT)


def copies_of_run(args, folder: Path, keep: int) -> list[tuple[Path, int]]:
    """Copies of the disk at random moments of a run, with the step that had been announced before."""
    grok, image, out = args.script == "train_grokking.py", folder / f"disk{keep}", folder / f"run{keep}.out"
    with open(image, "wb") as file:
        file.truncate(96 << 20)
    shell("mkfs.ext4", "-q", "-F", image)
    changes = dict(log_dir=folder / "m", experiment_name="x", iterations=10**6, eval_every=20 if grok else 0)
    changes |= {} if grok else dict(save_every=10, log_every=10, eval_tokens=1000, keep=keep, data=folder / "text")
    words = [sys.executable, storm.ROOT / args.script, *storm.flags(**storm.FLAGS[args.script] | changes)]
    copies = []
    # of grokking's files nothing is announced: it saves after each evaluation
    pattern = r"^step ([\d,]+)/" if grok else r"^checkpoint \S*step_(\d+)$"
    with mounted(image, folder / "m", OPTIONS), open(out, "wb") as log:
        process = subprocess.Popen([str(w) for w in words], stdout=log, stderr=log, env=storm.environment())
        try:
            while not announced(out, pattern):
                assert process.poll() is None, out.read_text()
                time.sleep(0.05)
            for i in range(args.copies):
                time.sleep(random.uniform(0.05, 1.5))
                assert process.poll() is None, out.read_text()
                said = announced(out, pattern)
                copy_of_disk(process, image, folder / f"copy{keep}_{i}")
                copies.append((folder / f"copy{keep}_{i}", said))
        finally:
            process.kill()
            process.wait()
    return copies


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", default="train_gpt.py", choices=storm.FLAGS)
    parser.add_argument("--copies", type=int, default=25, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if os.geteuid():
        print("error: needs root, for a loop mount", file=sys.stderr)
        return 1
    random.seed(args.seed)
    good = total = 0
    with tempfile.TemporaryDirectory(prefix="nanospeedrun_power") as name:
        folder, grok = Path(name), args.script == "train_grokking.py"
        storm.make_data(folder / "text", [storm.documents(20_000, seed) for seed in range(2)],
                        [storm.documents(10_000, 9)])
        for keep in (1, 2):
            for copy, said in copies_of_run(args, folder, keep):
                with mounted(copy, folder / "copy", "loop"):
                    found = storm.checkpoints(folder / "copy", grok)
                copy.unlink()
                whole = max((step for _, step, wrong in found.values() if not wrong), default=0)
                before = said - 20 if grok else said  # the line comes before the files
                state = {path.name: wrong or "whole" for path, (*_, wrong) in found.items()}
                fine = whole > 0 and whole >= before
                good, total = good + fine, total + 1
                print(f"keep {keep}: announced {said}, on the disk {state}{'' if fine else '  <<< LOST'}", flush=True)
    print(f"{args.script}: {good} of {total} copies hold the checkpoint that had been announced, whole")
    return int(good < total)


if __name__ == "__main__":
    sys.exit(main())
