"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings of a text does a model find the likeliest?

    python evals/hellaswag.py --download                            # the 10,042 validation tasks, to data/hellaswag/
    python evals/hellaswag.py                                       # score the newest checkpoint under logs/
    python evals/hellaswag.py --checkpoint logs/quickstart --tasks 1000 --output score.json
    python evals/hellaswag.py --follow logs/mine                    # every checkpoint of a run, as it appears

Any checkpoint with GPT-2's vocabulary will do. A task is four texts: end-of-text, with which documents start in
training, the context, and " " + an ending, tokenized apart from the context as in llm.c and build-nanogpt. An ending's
loss is the sum over its tokens. The ending of the smallest loss is chosen, where the loss is

    per token   divided by the ending's tokens: acc_norm of llm.c and build-nanogpt
    per byte    divided by its UTF-8 bytes, the space not counted: acc_bytes of lm-evaluation-harness, whose acc_norm
                takes characters (other numbers for 199 of the 40,168 endings), and which cleans up WikiHow's texts
    raw         as it is: acc of all three of them

Scores come with their standard error, sqrt(p (1 - p) / tasks). As all models get the same tasks, the difference of
two is known better than their errors suggest.

Texts are packed into rows as in training, the longest first, each into the fullest row with room for it; none is cut,
none sees another. The head runs only where the target is a token of an ending: 39 % of the positions. Row length and
rows per pass change losses by rounding only, and the same call repeats to the bit.

--follow adds a JSON object for each checkpoint to RUN/hellaswag.jsonl, which logger.py plots, and ends with the run.
What is there is not scored again. It shares the device with the training, whose clock runs on: --device cpu, or
CUDA_VISIBLE_DEVICES with another GPU, leaves the training alone.

HELLASWAG_URL: another address to download from, such as a mirror's.
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import argparse
import bisect
import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
import platform
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.common import GPT2_VOCAB, load_tokenizer, write_json  # noqa: E402
from generate import Parser, guarded, import_script, load_model, named, note, say, target_losses, use_newest  # noqa: E402
from generate import number as parse_number  # noqa: E402
from train_gpt import IGNORE, checkpoints_in, misfit, out_of_memory, read_json, read_meta, sync  # noqa: E402

FILE = ROOT / "data" / "hellaswag" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # or HELLASWAG_URL
NUM_TASKS = 10_042  # in that file
TRIES = 3  # of a download
CHOICES = 4  # endings of a task
SCORES = "hellaswag.jsonl"  # in a run's folder
POLL = 2.0  # seconds between two looks at a run that is followed
TAIL = 1 << 16  # bytes at the end of a run's metrics in which the last record is looked for
MAX_MASK = 2**33  # entries of the attention masks of a forward pass
HEAD_ROWS = {"cpu": 256, "cuda": 2048}  # positions whose logits exist at a time: 51 MB or 0.4 GB in fp32
NUMBERS = {  # flag: default, smallest and largest value, help
    "tasks": (0, 0, 1_000_000, "score that many tasks, evenly spread over the file; 0: all"),
    "row-len": (0, 0, 16384, "tokens of a row, into which texts are packed; 0: 1024 on a GPU, 256 on a CPU"),
    "rows": (0, 0, 65536, "rows of a forward pass; 0: 32 on a GPU, 8 on a CPU"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Tasks


class Task(NamedTuple):
    context: str
    endings: tuple[str, str, str, str]
    label: int  # of the true ending


def does_not_apply(meta: dict) -> str | None:
    """Why a model of this data set (its meta.json) cannot be scored, in one sentence; None if it can."""
    tokenizer, known = meta.get("tokenizer"), {"byte": "of bytes", "char": "of characters"}
    large = not misfit(meta.get("vocab_size"), 0, "") and meta["vocab_size"] >= GPT2_VOCAB["vocab_size"]
    if tokenizer == GPT2_VOCAB["tokenizer"] and large:
        return None
    kind = f"that of tokenizer {tokenizer!r:.80}, of size {meta.get('vocab_size')!r:.20}"
    if isinstance(tokenizer, dict):
        kind = next((text for name, text in known.items() if tokenizer.get("kind") == name), kind)
    return (f"HellaSwag does not apply: it needs a model with GPT-2's vocabulary and this one's is {kind}; "
            "data/cached_fineweb.py and data/fineweb.py make such data")


def problem_of(record) -> str | None:
    """What is wrong with a line of the file, None if nothing is."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object"
    if missing := [key for key in ("ctx", "endings", "label") if record.get(key) is None]:
        return f"it has no {', '.join(map(repr, missing))}"
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(context, str):
        return f"ctx {context!r:.60} is no text"
    if not isinstance(endings, list) or len(endings) != CHOICES or not all(isinstance(e, str) and e for e in endings):
        return f"endings {endings!r:.60}: expected a list of {CHOICES} texts, none empty"
    if isinstance(label, bool) or label not in range(CHOICES):
        return f"label {label!r:.60}: expected 0, 1, 2 or 3"
    return None


def parse_task(line: bytes) -> Task:
    """Task of a line of the file, as it was published, or of the Hub, where numbers are texts. Raises ValueError that
    says what is wrong with it."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON ({error!s:.200})") from error
    if isinstance(record, dict):
        if all(isinstance(record.get(key), str) for key in ("ctx_a", "ctx_b")):
            record = {"ctx": f"{record['ctx_a']} {record['ctx_b']}".strip()} | record
        if isinstance(record.get("label"), str):
            record["label"] = parse_number(record["label"], int, 0, CHOICES - 1)
    if problem := problem_of(record):
        raise ValueError(problem)
    return Task(record["ctx"], tuple(record["endings"]), int(record["label"]))


def parse_file(path: Path) -> list[Task]:
    """Tasks of a file of JSON lines. Raises ValueError with the number of a damaged line."""
    tasks = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                tasks.append(parse_task(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return tasks


def read_tasks(path: Path = FILE, limit: int = 0) -> list[Task]:
    """Tasks of a file of JSON lines: all, or `limit` evenly spread ones. (The first ones are of one kind: HellaSwag's
    file begins with 3,243 video captions from ActivityNet and ends with 6,799 articles from WikiHow.)

    Raises FileNotFoundError with the command that gets the file, ValueError with the number of a damaged line."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of HellaSwag tasks at {path}: get them with "
                                "python evals/hellaswag.py --download, or name their file with --input")
    try:
        if not (tasks := parse_file(path)):
            raise ValueError("no line")
    except ValueError as error:
        raise ValueError(f"{path} is damaged, {error}: move it away and get it with python evals/hellaswag.py "
                         "--download") from error
    limit = min(limit or len(tasks), len(tasks))
    return [tasks[i * len(tasks) // limit] for i in range(limit)]


# ----------------------------------------------------------------------------------------------------------------------
# Download


def fetch(url: str, part: Path):
    """One try to download what `part` lacks of the file at `url`, with progress. Raises ConnectionError if the
    connection ends early, and what urllib raises."""
    from tqdm import tqdm
    if part.exists() and not part.is_file():
        raise FileExistsError(errno.EEXIST, f"{part} is there already, and no file")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as answer:
        have = have if answer.status == 206 else 0  # 200: the server sends all of it
        length = answer.headers["Content-Length"]
        total = have + int(length) if length else None
        with (open(part, "ab" if have else "wb") as file,
              tqdm(total=total, initial=have, unit="B", unit_scale=True, desc=part.stem, disable=None) as bar):
            while chunk := answer.read(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
    sync(part)
    if total not in (None, part.stat().st_size):
        raise ConnectionError(f"the connection ended after {part.stat().st_size} of {total} bytes")


def fetch_with_retries(url: str, part: Path):
    """Downloads the file at `url` to `part`, after an error from where it ended. Raises RuntimeError in one sentence.
    """
    for attempt in range(TRIES):
        try:
            return fetch(url, part)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # nothing lies beyond what is there
                return None
            reason, final = error, error.code < 500 and error.code != 429
        except (OSError, http.client.HTTPException) as error:
            disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EEXIST)
            reason, final = error, getattr(error, "errno", None) in disk
        if final or attempt == TRIES - 1:
            raise RuntimeError(f"cannot download {url} to {part} ({reason}): mend that and run the same command again, "
                               "which goes on where this one ended, or name the file with --input") from reason
        time.sleep(2**attempt)


def download(path: Path):
    """Gets the tasks to `path`, where they appear only when whole and checked. A file that is there is kept.

    Raises ValueError for one that does not hold the tasks and for a server's; RuntimeError without a network."""
    if path.exists():
        if (count := len(read_tasks(path))) != NUM_TASKS:
            raise ValueError(f"{path} is there already, with {count:,} tasks instead of {NUM_TASKS:,}: move it away")
        say(f"{path}: {count:,} tasks, already there")
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    url, part = os.environ.get("HELLASWAG_URL", URL), path.with_name(f"{path.name}.part")
    fetch_with_retries(url, part)
    try:
        if (count := len(parse_file(part))) != NUM_TASKS:
            raise ValueError(f"it has {count:,} lines, expected {NUM_TASKS:,}")
    except ValueError as error:
        part.unlink()
        raise ValueError(f"{url} is not HellaSwag's validation file ({error})") from error
    os.replace(part, path)
    say(f"{path}: {count:,} tasks downloaded")


# ----------------------------------------------------------------------------------------------------------------------
# Tasks -> rows


class Packed(NamedTuple):
    """N tasks as R rows of T tokens."""

    rows: np.ndarray  # (R, 3, T) int32: inputs, targets (IGNORE but for tokens of endings), document numbers, rising
    ending_RT: np.ndarray  # int32: the ending that a target belongs to, 4 * task + ending; elsewhere -1
    tokens: np.ndarray  # of each ending, (N, 4)
    bytes: np.ndarray  # of each ending in UTF-8, without the space before it, (N, 4)
    labels: np.ndarray  # the true endings, (N,)


def fill_rows(lengths: list[int], row_len: int) -> list[list[int]]:
    """Numbers of the texts in each row: the longest first, each into the fullest row with room for it (best fit
    decreasing; measured: all tasks fill 99.8 % of rows of 1024 tokens and 99.6 % of rows of 256)."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (places left, row), sorted
    for text in np.argsort(-np.asarray(lengths), kind="stable").tolist():
        best = bisect.bisect_left(rooms, (lengths[text], 0))
        if best == len(rooms):
            rooms.append((row_len, len(rows)))
            rows.append([])
        room, row = rooms.pop(best)
        rows[row].append(text)
        bisect.insort(rooms, (room - lengths[text], row))
    return rows


def tokenize(tasks: list[Task], encode: Callable[[str], list[int]], eot: int) -> tuple[list[list[int]], list[int]]:
    """The tokens of the four texts of each task, and for each text the number of the first one of the ending."""
    texts, begins = [], []
    for task in tasks:
        context = [eot, *encode(task.context)]
        texts += [context + encode(" " + ending) for ending in task.endings]
        begins += [len(context)] * CHOICES
    return texts, begins


def pack(tasks: list[Task], row_len: int, encode: Callable[[str], list[int]] | None = None,
         eot: int = GPT2_VOCAB["eot"]) -> Packed:
    """All texts, tokenized (by GPT-2's tokenizer), in rows. A text's last token is only a target; what a row has left
    is filled with eot, a document of its own.

    Raises ValueError for a text longer than a row, RuntimeError if tiktoken's vocabulary is not at hand."""
    texts, begins = tokenize(tasks, encode or load_tokenizer(GPT2_VOCAB).encode, eot)
    lengths = [len(text) - 1 for text in texts]
    if (longest := max(lengths)) > row_len:
        repair = f"use --row-len {longest}" if longest <= NUMBERS["row-len"][2] else "leave its task out"
        raise ValueError(f"a text of {longest} tokens does not fit into a row of {row_len}: {repair}")
    members = fill_rows(lengths, row_len)
    rows = np.empty((len(members), 3, row_len), dtype=np.int32)
    rows[:, 0], rows[:, 1] = eot, IGNORE
    ending_RT = np.full((len(members), row_len), -1, dtype=np.int32)
    for row, ending_T, row_texts in zip(rows, ending_RT, members, strict=True):
        row[2], start = len(row_texts), 0
        for number, i in enumerate(row_texts):
            end, first = start + lengths[i], start + begins[i] - 1  # of the row's places; that of the first target
            row[0, start:end], row[1, first:end], row[2, start:end] = texts[i][:-1], texts[i][begins[i]:], number
            ending_T[first:end] = i
            start = end
    tokens = [len(text) - begin for text, begin in zip(texts, begins, strict=True)]
    sizes = [len(ending.encode("utf-8", "surrogatepass")) for task in tasks for ending in task.endings]
    by_task = [np.array(numbers).reshape(-1, CHOICES) for numbers in (tokens, sizes)]
    return Packed(rows, ending_RT, *by_task, np.array([task.label for task in tasks]))


# ----------------------------------------------------------------------------------------------------------------------
# Rows -> score


def ending_losses(model: nn.Module, packed: Packed, window: int, rows: int, device: str,
                  watch: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Losses of all endings, summed over their tokens, (N, 4) fp64 in nats on the CPU, as `target_losses` has them.
    Every batch has `rows` rows, the last one padded. `watch` wraps the batches' starts, for a progress bar."""
    found, endings = [], []
    for start in watch(range(0, len(packed.rows), rows)):
        part = packed.rows[start:start + rows]
        batch = np.zeros((3, rows, packed.rows.shape[2]), dtype=np.int32)
        batch[1] = IGNORE
        batch[:, :len(part)] = part.swapaxes(0, 1)
        endings.append(packed.ending_RT[start:start + rows][part[:, 1] != IGNORE])
        on_device = torch.from_numpy(batch).to(device)
        found.append(target_losses(model, on_device, window, HEAD_ROWS[on_device.device.type]))
    losses = torch.cat(found).double().cpu().numpy()
    # added up one after the other: atomic additions on a GPU would not repeat to the bit
    sums = np.bincount(np.concatenate(endings), weights=losses, minlength=packed.tokens.size)
    return torch.from_numpy(sums.reshape(packed.tokens.shape))


class Score(NamedTuple):
    """Accuracies, 0 to 1, by what the losses are divided by."""

    tasks: int
    per_token: float
    per_byte: float
    raw: float

    @property
    def standard_errors(self) -> dict[str, float]:
        """Of the three accuracies, by name."""
        return {name: math.sqrt(p * (1 - p) / self.tasks) for name, p in self._asdict().items() if name != "tasks"}

    def __str__(self) -> str:
        parts = [f"{100 * getattr(self, name):.1f} % +- {100 * error:.1f} {name.replace('_', ' ')}"
                 for name, error in self.standard_errors.items()]
        return f"{self.tasks:,} tasks: {', '.join(parts)} (chance: 25 %)"


def score(losses_N4: Tensor, packed: Packed) -> Score:
    """Accuracies of choosing the ending with the smallest loss; of equal ones the first.

    Raises RuntimeError if a loss is not finite."""
    losses = losses_N4.double().cpu().numpy()
    if bad := int((~np.isfinite(losses)).sum()):
        raise RuntimeError(f"the losses of {bad:,} of {losses.size:,} HellaSwag endings are not finite: the weights "
                           "are damaged, or too large for the dtype")
    divided = (losses / packed.tokens, losses / packed.bytes, losses)
    return Score(len(losses), *(float((x.argmin(axis=1) == packed.labels).mean()) for x in divided))


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def cast(model: nn.Module, fp32: tuple[str, ...], device: str, dtype: torch.dtype) -> nn.Module:
    """The model as in training: parameters in `dtype`, but those whose names end with one of `fp32`, and buffers but
    the n-grams' signs, in fp32."""
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if name.split(".")[-1] in fp32 else dtype)
    if getattr(model, "ngrams", None) is not None:
        model.ngrams.to(dtype)
    return model.to(device)


def progress(tasks: int, starts: range) -> Iterator[int]:
    """The batches, with a bar that counts tasks, on a terminal only."""
    from tqdm import tqdm
    with tqdm(total=tasks, unit=" tasks", desc="HellaSwag", disable=None) as bar:
        for done, start in enumerate(starts, 1):
            yield start
            bar.update(tasks * done // len(starts) - bar.n)


def score_checkpoint(args, packed: Packed, path: Path, meta: dict) -> tuple[Score, dict]:
    """Score of a checkpoint, and what to keep of how it was made; on stderr what was scored and the rate.

    Raises Unusable for what is wrong with the checkpoint, RuntimeError where a loss is not finite."""
    script, count = import_script(meta.get("script")), len(packed.labels)
    model, window = load_model(script, path, meta, longest=args.row_len)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = cast(model, script.FP32_PARAMETERS, args.device, dtype)
    note(f"{path}: {args.device}, {args.dtype}, window {window}, {len(packed.rows):,} rows of {args.row_len} tokens")
    began = time.perf_counter()
    rows, watch = min(args.rows, len(packed.rows)), partial(progress, count)
    losses_N4 = ending_losses(model, packed, window, rows, args.device, watch=watch)
    result, seconds = score(losses_N4, packed), time.perf_counter() - began
    note(f"{seconds:.1f} s: {count / seconds:,.1f} tasks/s")
    return result, {"checkpoint": str(path), "step": meta["step"], "script": meta["script"], **result._asdict(),
                    "standard_errors": result.standard_errors, "seconds": seconds, "device": args.device,
                    "dtype": args.dtype, "torch": torch.__version__}


def evaluate(args: argparse.Namespace):
    """Prints the score of a checkpoint."""
    packed = []  # once, for all checkpoints that are tried

    def scored(path: Path, meta: dict) -> tuple[Score, dict]:
        if reason := does_not_apply(meta["data"]["meta"]):
            raise ValueError(reason)
        packed[:] = packed or [pack(read_tasks(args.input, args.tasks), args.row_len)]
        return score_checkpoint(args, packed[0], path, meta)

    result, record = use_newest(args.checkpoint, scored)
    say(f"HellaSwag, {result}")
    if args.output:
        write_json(args.output, record)


# ----------------------------------------------------------------------------------------------------------------------
# A run that is followed


def find_run(place: Path) -> Path:
    """The run folder `place`, or of an experiment's runs the newest by its name, before it one that is trained now.

    Raises FileNotFoundError without one, ValueError for a damaged one or a model that cannot be scored."""
    runs = [path.parent for path in [place / "config.json", *place.glob("*/config.json")] if path.is_file()]
    runs = runs[:1] if place in runs else sorted(runs, key=lambda run: (is_alive(run) is True, run.name))
    if not runs:
        raise FileNotFoundError(f"--follow {place}: there is no run, or none yet: name the folder of a run or of an "
                                "experiment when its training has begun")
    try:
        config = read_json(runs[-1] / "config.json", {"data": {"meta": {}}})
    except ValueError as error:
        raise ValueError(f"--follow {place}: {runs[-1] / 'config.json'} is damaged ({error})") from error
    if reason := does_not_apply(config["data"]["meta"]):
        raise ValueError(reason)
    return runs[-1]


def is_alive(run: Path) -> bool | None:
    """Whether a process trains this run, which keeps its file `lock` locked as long as it lives; None if that cannot
    be told: earlier versions lock nothing, and a lock may be seen on its own machine only."""
    try:
        import fcntl  # not on Windows
        if not (run / "lock").is_file():
            return None
        with open(run / "lock", encoding="utf-8", errors="replace") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False if platform.node() in file.read(1000) else None
    except (OSError, ImportError):
        return None


def parse_objects(lines: bytes) -> list[dict]:
    """The JSON objects of some lines. What a killed process left of one is passed over."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def append_object(path: Path, value: dict):
    """One more line in a file of JSON lines, by one write: a reader finds all of it or nothing. If another process was
    killed inside its line, that line is ended first."""
    line = json.dumps(value).encode() + b"\n"
    with named(str(path)), open(path, "ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else b"\n" + line
        file.write(line)


def has_ended(run: Path) -> bool:
    """Whether the last line of the run's metrics is whole and says that it has ended."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
        *lines, cut = file.read().split(b"\n")
    last = parse_objects(lines[-1]) if lines and not cut else []
    return bool(last) and last[0].get("event") == "end"


def tokens_at(run: Path, step: int) -> int | None:
    """Training tokens of the first `step` steps, from the run's metrics: those of the last record until then, and its
    batch for each step since. None where no record says."""
    path = run / "metrics.jsonl"
    records = parse_objects(path.read_bytes()) if path.is_file() else []
    records = [r for r in records if type(r.get("step")) is int and type(r.get("tokens")) is int]
    records = sorted((r for r in records if r["step"] <= step), key=lambda r: r["step"])
    if records and records[-1]["step"] == step:
        return records[-1]["tokens"]
    batches = [r["batch_tokens"] for r in records if "batch_tokens" in r]
    return records[-1]["tokens"] + (step - records[-1]["step"]) * batches[-1] if batches else None


def is_there(path: Path, sha256: str) -> bool:
    """Whether the checkpoint has not been deleted or replaced meanwhile."""
    try:
        return (path / "state.pt").is_file() and read_meta(path)["sha256"] == sha256
    except ValueError:
        return False


def score_of(args, run: Path, packed: Packed, path: Path, meta: dict) -> tuple[Score, dict]:
    """Score of a checkpoint of the run, and its record: what older runs have in metrics.jsonl, and what was scored how.
    Raises what score_checkpoint raises."""
    result, _ = score_checkpoint(args, packed, path, meta)
    step, checkpoint = meta["step"], str(path.relative_to(run))
    return result, {
        "step": step, "hellaswag": result._asdict(), "hellaswag_per_token": result.per_token,
        "hellaswag_errors": result.standard_errors, "tokens": tokens_at(run, step),
        "train_time_ms": meta["train_time_ms"], "checkpoint": checkpoint, "sha256": meta["sha256"],
        "device": args.device, "dtype": args.dtype,
    }


def follow(args: argparse.Namespace) -> int:
    """Scores every checkpoint of a run as it appears, until the run has ended or its process is gone; exit code 1 if
    one is damaged. Those that training deletes or replaces before their turn are passed over."""
    run, failed, damaged, gone = find_run(args.follow), 0, set(), 0
    tasks = read_tasks(args.input, args.tasks)
    packed = pack(tasks, args.row_len)
    tasks_hash = hashlib.sha256(repr(tasks).encode()).hexdigest()[:12]
    scores = parse_objects((run / SCORES).read_bytes()) if (run / SCORES).is_file() else []
    known = {str(r.get("sha256")) for r in scores if r.get("tasks_hash") == tasks_hash}
    note(f"{run}: follows this run, {len(known)} score(s) are there")

    def tell(path: Path, reason):
        if path not in damaged:
            note(f"warning: checkpoint {path} cannot be used ({reason})")
        damaged.add(path)

    while True:
        ended, alive = has_ended(run), is_alive(run)  # before the look for checkpoints: the last one comes before them
        found = sorted(checkpoints_in(run, ("",), tell), key=lambda one: one[1]["step"])
        unscored = (one for one in found if one[1]["sha256"] not in known and is_there(one[0], one[1]["sha256"]))
        path, meta = next(unscored, (None, {}))
        gone = gone + 1 if path is None and alive is False else 0
        if path is None and (ended or gone > 1):  # twice: a run is made before it is locked
            if not ended:
                note(f"{run}: its process is gone without an end, all its checkpoints are scored: go on with --resume")
            return 1 if failed or damaged else 0
        if path is None:
            time.sleep(POLL)
            continue
        try:
            result, record = score_of(args, run, packed, path, meta)
        except (ValueError, OSError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            if not is_there(path, meta["sha256"]):
                note(f"{path}: deleted or replaced before it was scored")
                continue
            note(f"warning: checkpoint {path} cannot be used ({error})")
            known, failed = known | {meta["sha256"]}, 1
            continue
        append_object(run / SCORES, record | {"tasks_hash": tasks_hash})
        known.add(record["sha256"])
        say(f"step {record['step']}: HellaSwag, {result}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. Raises ValueError that names all wrong values at once."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--checkpoint", type=Path, default=Path("logs"), metavar="PATH",
                      help="folder of a checkpoint, or of a run or experiment: its newest (default: newest in logs)")
    what.add_argument("--follow", type=Path, metavar="RUN", help="score every checkpoint of this run as it appears, to "
                      "hellaswag.jsonl in its folder; of an experiment the newest run")
    what.add_argument("--download", action="store_true", help="get the tasks to the place of --input, and end")
    parser.add_argument("--input", type=Path, default=FILE, metavar="FILE",
                        help="the tasks, a JSON object with ctx, endings, label a line (default: data/hellaswag/...)")
    for flag, (default, _, _, text) in NUMBERS.items():
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('-', '_')}"))
        parser.add_argument(*spellings, default=default, metavar="N", help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", metavar="X", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", metavar="X",
                        help="auto, fp32 or bf16 (default: auto, bf16 on GPUs that have it)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the score to this JSON file, too")
    args, problems = parser.parse_args(argv), []
    for flag, (_, low, high, _) in NUMBERS.items():
        given, name = getattr(args, flag.replace("-", "_")), flag.replace("-", "_")
        setattr(args, name, parse_number(given, int, low, high))
        if getattr(args, name) is None:
            problems.append(f"--{flag} {given!s:.40}: expected an integer from {low} to {high}")
    for name, values in {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "fp32", "bf16")}.items():
        if getattr(args, name) not in values:
            problems.append(f"--{name} {getattr(args, name):.40}: expected {values[0]}, {values[1]} or {values[2]}")
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: this machine has no usable CUDA device, leave the flag out")
    if args.output and args.follow:
        problems.append("--output: has no effect with --follow, which writes hellaswag.jsonl in the run's folder")
    if args.output and not args.output.absolute().parent.is_dir():
        problems.append(f"--output {args.output}: there is no folder {args.output.absolute().parent}, make it first")
    if args.output and args.output.exists() and not args.output.is_file():
        problems.append(f"--output {args.output}: it is there and no file, name another one")
    if args.follow and (args.follow / SCORES).exists() and not (args.follow / SCORES).is_file():
        problems.append(f"--follow {args.follow}: {SCORES} in it is no file, move it away")
    if problems:
        raise ValueError("; ".join(problems))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    fast = args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    args.dtype = args.dtype.replace("auto", "bf16" if fast else "fp32")
    row_len, rows = (1024, 32) if args.device == "cuda" else (256, 8)  # attention looks at all pairs of a row's tokens
    args.row_len, args.rows = args.row_len or row_len, args.rows or rows
    if args.row_len**2 * args.rows > MAX_MASK:
        most = max(1, MAX_MASK // args.row_len**2)
        raise ValueError(f"--rows {args.rows}: of {args.row_len} tokens at most {most} fit into a pass: lower it")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code."""
    def act() -> int | None:
        args = parse(argv)
        return download(args.input) if args.download else follow(args) if args.follow else evaluate(args)

    return guarded(act, "use a smaller --rows or --row-len")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
