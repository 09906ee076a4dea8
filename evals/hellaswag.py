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

import argparse
import bisect
import contextlib
import errno
import hashlib
import http.client
import json
import math
import os
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
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data.common import GPT2_VOCAB, load_tokenizer, write_json  # noqa: E402
from generate import Parser, find_checkpoint, import_script, load_model, read_meta  # noqa: E402

FILE = ROOT / "data" / "hellaswag" / "hellaswag_val.jsonl"
URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"  # or HELLASWAG_URL
NUM_TASKS = 10_042  # in that file
TRIES = 3  # of a download
CHOICES = 4  # endings of a task
IGNORE = -1  # target that has no loss, as in the training scripts
SCORES = "hellaswag.jsonl"  # in a run's folder
POLL = 2.0  # seconds between two looks at a run that is followed
TAIL = 1 << 16  # bytes at the end of a run's metrics in which the last record is looked for
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
    tokenizer = meta.get("tokenizer") or {}
    if tokenizer == GPT2_VOCAB["tokenizer"]:
        return None
    known = {"byte": "of bytes", "char": "of characters"}
    kind = known.get(tokenizer.get("kind"), f"that of tokenizer {tokenizer!r}")
    return (f"HellaSwag does not apply: it needs a model with GPT-2's vocabulary and this one's is {kind}; "
            "data/cached_fineweb.py and data/fineweb.py make such data")


def problem_of(record) -> str | None:
    """What is wrong with a line of the file, None if nothing is."""
    if not isinstance(record, dict):
        return f"a JSON {type(record).__name__}, expected an object"
    if missing := [key for key in ("ctx", "endings", "label") if key not in record]:
        return f"it has no {', '.join(map(repr, missing))}"
    context, endings, label = record["ctx"], record["endings"], record["label"]
    if not isinstance(context, str):
        return f"ctx {context!r} is no text"
    if not isinstance(endings, list) or len(endings) != CHOICES or not all(isinstance(e, str) and e for e in endings):
        return f"endings {str(endings)[:60]!r}: expected a list of {CHOICES} texts, none empty"
    if type(label) is not int or not 0 <= label < CHOICES:
        return f"label {label!r}: expected 0, 1, 2 or 3"
    return None


def parse_task(line: bytes) -> Task:
    """Task of a line of the file. Raises ValueError that says what is wrong with it."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"no JSON ({error})") from error
    if problem := problem_of(record):
        raise ValueError(problem)
    return Task(record["ctx"], tuple(record["endings"]), record["label"])


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
        raise FileNotFoundError(f"there are no HellaSwag tasks at {path}: get them with "
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
            disk = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
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
        print(f"{path}: {count:,} tasks, already there")
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
    print(f"{path}: {count:,} tasks downloaded")


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
        raise ValueError(f"a text of {longest} tokens does not fit into a row of {row_len}: use --row-len {longest}")
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


@torch.no_grad()
def ending_losses(trunk: Callable, head: Callable, packed: Packed, window: int, rows: int, device: str,
                  watch: Callable[[Iterable], Iterable] = iter) -> Tensor:
    """Losses of all endings, summed over their tokens, (N, 4) fp64 in nats on the CPU.

    trunk(inputs_BT, docs_BT, int32 0-D window) -> x_BTD; head(x_ND) -> logits. All of their columns are in the softmax,
    those that pad the vocabulary, too, as in the training loss. Every batch has `rows` rows, the last one padded.
    `watch` wraps the batches' starts, for a progress bar."""
    at_a_time = HEAD_ROWS[torch.device(device).type]
    long_window = torch.tensor(window, dtype=torch.int32, device=device)
    found, endings = [], []
    for start in watch(range(0, len(packed.rows), rows)):
        part = packed.rows[start:start + rows]
        batch = np.zeros((3, rows, packed.rows.shape[2]), dtype=np.int32)
        batch[1] = IGNORE
        batch[:, :len(part)] = part.swapaxes(0, 1)
        places = np.flatnonzero(batch[1] != IGNORE)
        endings.append(packed.ending_RT[start:start + rows].ravel()[places])
        inputs, targets, docs = torch.from_numpy(batch).to(device)
        chosen = torch.from_numpy(places).to(device)
        x = trunk(inputs, docs, long_window).flatten(0, 1)[chosen]
        targets = targets.flatten()[chosen].long()
        for x_ND, t in zip(x.split(at_a_time), targets.split(at_a_time), strict=True):
            found.append(F.cross_entropy(head(x_ND).float(), t, reduction="none"))
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
    """The model as in training: parameters in `dtype`, but those whose names end with one of `fp32`, and buffers, in
    fp32."""
    for name, p in model.named_parameters():
        p.data = p.data.to(torch.float32 if name.split(".")[-1] in fp32 else dtype)
    return model.to(device)


def progress(tasks: int, starts: range) -> Iterator[int]:
    """The batches, with a bar that counts tasks, on a terminal only."""
    from tqdm import tqdm
    with tqdm(total=tasks, unit=" tasks", desc="HellaSwag", disable=None) as bar:
        for done, start in enumerate(starts, 1):
            yield start
            bar.update(tasks * done // len(starts) - bar.n)


def score_checkpoint(args, path: Path, meta: dict, packed: Packed) -> tuple[Score, float]:
    """Score of a checkpoint, and the seconds that it took; on stderr what was scored and the rate.

    Raises ValueError where script and checkpoint do not fit, RuntimeError where a loss is not finite."""
    script, count = import_script(meta["script"]), len(packed.labels)
    model, window = load_model(script, path, meta, longest=args.row_len)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = cast(model, script.FP32_PARAMETERS, args.device, dtype)
    print(f"{path}: {args.device}, {args.dtype}, window {window}, {len(packed.rows):,} rows of {args.row_len} tokens",
          file=sys.stderr)
    began = time.perf_counter()
    losses_N4 = ending_losses(model.trunk, model.head, packed, window, args.rows, args.device,
                              watch=partial(progress, count))
    result, seconds = score(losses_N4, packed), time.perf_counter() - began
    print(f"{seconds:.1f} s: {count / seconds:,.1f} tasks/s", file=sys.stderr)
    return result, seconds


def evaluate(args: argparse.Namespace):
    """Prints the score of a checkpoint."""
    path = find_checkpoint(args.checkpoint)
    meta = read_meta(path)
    if reason := does_not_apply(meta["data"]["meta"]):
        raise ValueError(reason)
    packed = pack(read_tasks(args.input, args.tasks), args.row_len)
    result, seconds = score_checkpoint(args, path, meta, packed)
    print(f"HellaSwag, {result}", flush=True)
    if args.output:
        write_json(args.output, {
            "checkpoint": str(path), "step": meta["step"], "script": meta["script"], **result._asdict(),
            "standard_errors": result.standard_errors, "seconds": seconds, "device": args.device, "dtype": args.dtype,
            "torch": torch.__version__,
        })


# ----------------------------------------------------------------------------------------------------------------------
# A run that is followed


def find_run(place: Path) -> Path:
    """The run folder `place`, or the newest run in an experiment's folder.

    Raises FileNotFoundError without one, ValueError for a damaged one or a model that cannot be scored."""
    configs = [place / "config.json"]
    if not configs[0].is_file():
        configs = sorted(place.glob("*/config.json"), key=lambda path: (path.stat().st_mtime, path))
    if not configs:
        raise FileNotFoundError(f"--follow {place}: there is no run, or none yet: name the folder of a run or of an "
                                "experiment when its training has begun")
    try:
        reason = does_not_apply(json.loads(configs[-1].read_bytes())["data"]["meta"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--follow {place}: {configs[-1]} is damaged ({error!r})") from error
    if reason:
        raise ValueError(reason)
    return configs[-1].parent


def parse_objects(lines: bytes) -> list[dict]:
    """The JSON objects of some lines. What a killed process left of one is passed over."""
    found = []
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [value for value in found if isinstance(value, dict)]


def append_object(path: Path, value: dict):
    """One more line in a file of JSON lines, by one write: a reader finds all of it or nothing. If another process was
    killed inside its line, that line is ended first."""
    line = json.dumps(value).encode() + b"\n"
    with open(path, "ab+", buffering=0) as file:
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


def hash_at(path: Path) -> str | None:
    """The hash of a checkpoint's weights, as its meta.json has it; None where the checkpoint is not, or no more."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
        return meta["sha256"] if (path / "state.pt").is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def find_unscored(run: Path, known: set[str]) -> tuple[Path, str] | tuple[None, None]:
    """The first checkpoint of the run whose hash is not in `known`, and that hash; (None, None) if there is none."""
    found = run.glob("checkpoints/step_*[0-9]")
    for path in sorted(found, key=lambda path: (len(path.name), path.name)):
        sha256 = hash_at(path)
        if sha256 is not None and sha256 not in known:
            return path, sha256
    return None, None


def score_of(args, run: Path, path: Path, packed: Packed) -> tuple[Score, dict]:
    """Score of a checkpoint of the run, and its record: what older runs have in metrics.jsonl, and what was scored how.
    Raises ValueError, OSError or RuntimeError where it cannot be scored."""
    meta = read_meta(path)
    result, _ = score_checkpoint(args, path, meta, packed)
    step, checkpoint = meta["step"], str(path.relative_to(run))
    return result, {
        "step": step, "hellaswag": result._asdict(), "hellaswag_per_token": result.per_token,
        "hellaswag_errors": result.standard_errors, "tokens": tokens_at(run, step),
        "train_time_ms": meta["train_time_ms"], "checkpoint": checkpoint, "sha256": meta["sha256"],
        "device": args.device, "dtype": args.dtype,
    }


def follow(args: argparse.Namespace) -> int:
    """Scores every checkpoint of a run as it appears, until the run has ended; exit code 1 if one is damaged. Those
    that training deletes or replaces before their turn are passed over."""
    run, failed = find_run(args.follow), 0
    tasks = read_tasks(args.input, args.tasks)
    packed = pack(tasks, args.row_len)
    tasks_hash = hashlib.sha256(repr(tasks).encode()).hexdigest()[:12]
    scores = parse_objects((run / SCORES).read_bytes()) if (run / SCORES).exists() else []
    known = {r.get("sha256") for r in scores if r.get("tasks_hash") == tasks_hash}
    print(f"{run}: follows this run, {len(known)} score(s) are there", file=sys.stderr)
    while True:
        ended = has_ended(run)  # before the look for checkpoints: the last one comes before the end
        path, sha256 = find_unscored(run, known)
        if path is None and ended:
            return failed
        if path is None:
            time.sleep(POLL)
            continue
        try:
            result, record = score_of(args, run, path, packed)
        except torch.OutOfMemoryError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            if hash_at(path) != sha256:
                print(f"{path}: deleted or replaced before it was scored", file=sys.stderr)
                continue
            print(f"warning: {error}", file=sys.stderr)
            known, failed = known | {sha256}, 1
            continue
        append_object(run / SCORES, record | {"tasks_hash": tasks_hash})
        known.add(record["sha256"])
        print(f"step {record['step']}: HellaSwag, {result}", flush=True)


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
        value, name = None, flag.replace("-", "_")
        with contextlib.suppress(ValueError):
            value = int(getattr(args, name))
        if value is None or not low <= value <= high:
            problems.append(f"--{flag} {getattr(args, name)}: expected an integer from {low} to {high}")
        setattr(args, name, value)
    for name, values in {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "fp32", "bf16")}.items():
        if getattr(args, name) not in values:
            problems.append(f"--{name} {getattr(args, name)}: expected {values[0]}, {values[1]} or {values[2]}")
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: this machine has no usable CUDA device, leave the flag out")
    if args.output and args.follow:
        problems.append("--output: has no effect with --follow, which writes hellaswag.jsonl in the run's folder")
    if args.output and not args.output.absolute().parent.is_dir():
        problems.append(f"--output {args.output}: there is no folder {args.output.absolute().parent}, make it first")
    if problems:
        raise ValueError("; ".join(problems))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    fast = args.device == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    args.dtype = args.dtype.replace("auto", "bf16" if fast else "fp32")
    row_len, rows = (1024, 32) if args.device == "cuda" else (256, 8)  # attention looks at all pairs of a row's tokens
    args.row_len, args.rows = args.row_len or row_len, args.rows or rows
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what the user can repair."""
    try:
        args = parse(argv)
        if args.download:
            download(args.input)
        elif args.follow:
            return follow(args)
        else:
            evaluate(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print("error: out of memory: use a smaller --rows or --row-len", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
