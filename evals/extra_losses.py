"""Other losses of a checkpoint on its validation data: numbers beside the loss that training prints, never instead.

    python evals/extra_losses.py                                            # the newest checkpoint under logs/
    python evals/extra_losses.py --checkpoint logs/mine --tokens 65536 --context 768

Training's loss is of rows of tokens, at whose starts contexts are cut. Of the same tokens, in nats per token:

    sliding window  rows overlap by --context tokens; each token is scored once, in the first row that has it, and so
                    with at least so many tokens before it, or all that its document has
    copy mixture    (1 - w) P + w [x = c]: P is the usual prediction, c the token after the latest place in the document
                    where the longest run of the last 1 to 32 tokens stood before, w a weight for each length of that
                    run and distance, fitted on the last --fit-tokens of the training data (modded-nanogpt #376)

The mixture is causal and sums to 1, as P does. Its gain is what the model could copy and does not, most of it from
places that its attention does not reach. All in fp32, as generate.py reads checkpoints.
"""
from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate  # noqa: E402
from generate import MAX_MASK, load_model, note, say, target_losses  # noqa: E402
from train_gpt import IGNORE, ValStream, open_corpus  # noqa: E402

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of a match, tokens; each less the one before it is one of them
PASS_TOKENS = 8192  # of a forward pass, at least one row
HEAD_ROWS = 256  # positions whose logits exist at a time
NUMBERS = {  # flag: smallest and largest value, help
    "tokens": (0, 10**9, "validation tokens; 0: as many as training looks at"),
    "row-len": (0, MAX_MASK, "tokens of a row; 0: as in validation"),
    "context": (0, MAX_MASK, "tokens by which rows overlap for the sliding window; 0: half a row"),
    "fit-tokens": (0, 10**9, "training tokens for the weights of the mixture; 0: as many as validation tokens"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Losses


def token_losses(model: nn.Module, tokens_N: np.ndarray, eot: int | None, window: int, row_len: int,
                 context: int = 0) -> np.ndarray:
    """Loss of each token but the first, (N - 1,) fp64 in nats, from rows that overlap by `context` tokens, of which
    only the first row scores all. Documents begin with eot; a row's do not see each other."""
    count, device = len(tokens_N) - 1, model.cos.device
    starts, per_pass = range(0, max(1, count - context), row_len - context), max(1, PASS_TOKENS // row_len)
    losses = []
    for first in range(0, len(starts), per_pass):
        batch = np.zeros((3, per_pass, row_len), dtype=np.int32)
        batch[1] = IGNORE
        for row, start in enumerate(starts[first:first + per_pass]):
            seen, scored = tokens_N[start:start + row_len + 1], context if start else 0
            size = len(seen) - 1
            batch[0, row, :size], batch[1, row, scored:size] = seen[:-1], seen[1 + scored:]
            batch[2, row, :size] = np.cumsum(seen[:-1] == eot)
        found = target_losses(model, torch.from_numpy(batch).to(device), window, HEAD_ROWS)
        losses.append(found.double().cpu().numpy())
    return np.concatenate(losses)


# ----------------------------------------------------------------------------------------------------------------------
# Copies


def latest_matches(tokens_N: np.ndarray, eot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """For each token the largest of LENGTHS for which that many tokens, up to this one, stood in the same document
    before, and the latest place where they ended; 0 and -1 where not even the token did. Exact, O(N log N): runs of one
    content get one number, that of a run from those of its two parts."""
    def number_pairs(first_N, second_N):
        return np.unique(first_N.astype(np.int64) << 31 | second_N, return_inverse=True)[1]

    total = len(tokens_N)
    length_N, place_N = np.zeros(total, dtype=np.int64), np.full(total, -1)
    numbers = {1: number_pairs(np.cumsum(tokens_N == eot), tokens_N.astype(np.int64))}
    for shorter, length in zip((0, *LENGTHS), LENGTHS, strict=False):
        if more := shorter and length - shorter:
            outside = total + np.arange(more)  # of runs that would begin before the first token: like no others
            before = np.concatenate((outside, numbers[shorter]))[:total]
            numbers[length] = number_pairs(before, numbers[more])
        order = np.argsort(numbers[length], kind="stable")
        same = np.diff(numbers[length][order]) == 0
        place_N[order[1:][same]], length_N[order[1:][same]] = order[:-1][same], length
    return length_N, place_N


def copies(tokens_N: np.ndarray, eot: int | None, edges: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """For each token but the first: whether it is the one to copy, and the bucket of the match, by its length and by
    its distance, up to the first or second edge or beyond; the last bucket is for no match. (N - 1,) each."""
    length_N, place_N = latest_matches(tokens_N[:-1], eot)
    hit_N = (tokens_N[place_N + 1] == tokens_N[1:]) & (place_N >= 0)
    far_N = np.searchsorted(edges, np.arange(len(place_N)) - place_N)
    return hit_N, np.where(length_N, 3 * np.searchsorted(LENGTHS, length_N) + far_N, 3 * len(LENGTHS))


def mixture_losses(losses_N: np.ndarray, hit_N: np.ndarray, weight_N) -> np.ndarray:
    """Losses of (1 - weight) P + weight [x = c]."""
    return -np.log((1 - weight_N) * np.exp(-losses_N) + weight_N * hit_N)


def fit_weights(losses_N: np.ndarray, hit_N: np.ndarray, bucket_N: np.ndarray) -> np.ndarray:
    """The weight of each bucket with the least loss of these tokens and one more that is no hit: below 1, and 0 without
    tokens. By bisection: the derivative falls along the weight."""
    p_N, buckets = np.exp(-losses_N), 3 * len(LENGTHS) + 1
    low, high = np.zeros(buckets), np.ones(buckets)
    for _ in range(50):
        weight = (low + high) / 2
        slope_N = (hit_N - p_N) / np.exp(-mixture_losses(losses_N, hit_N, weight[bucket_N]))
        rises = np.bincount(bucket_N, slope_N, buckets) > 1 / (1 - weight)
        low, high = np.where(rises, weight, low), np.where(rises, high, weight)
    return low


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints


def measure(args: argparse.Namespace, path: Path, meta: dict):
    """Prints the losses of a checkpoint."""
    corpus = open_corpus(meta["settings"]["data"])
    if corpus.fingerprint() != meta["data"]["fingerprint"]:
        raise ValueError(f"{corpus.folder} holds other data than {path} was trained with: make that again")
    settings, eot = meta["settings"], corpus.meta["eot"]
    row_len = args.row_len or settings["eval_seq_len"]
    context = args.context or row_len // 2
    if not context < row_len <= MAX_MASK:
        raise ValueError(f"--context {context}, rows of {row_len} tokens: a row needs more tokens than the context and "
                         f"has at most {MAX_MASK}: set --row-len")
    model, window = load_model(generate.import_script(meta.get("script")), path, meta, longest=row_len)
    val = ValStream(corpus, args.tokens or settings["eval_tokens"], row_len).tokens
    fit = ValStream(corpus._replace(val=corpus.train[-1:]), 0, row_len).tokens[-(args.fit_tokens or len(val) - 1) - 1:]
    note(f"{path}: {args.device}, fp32, window {window}, {len(val) - 1:,} tokens in rows of {row_len}")
    losses_of = partial(token_losses, model.to(args.device), eot=eot, window=window, row_len=row_len)
    usual, edges = losses_of(val), (min(window, row_len), row_len)
    say(f"usual loss      {usual.mean():.4f} nats/token: as training prints it, contexts cut at rows")
    sliding = losses_of(val, context=context)
    say(f"sliding window  {sliding.mean():.4f} nats/token: at least {context} tokens before each that its document has")
    weights = fit_weights(losses_of(fit), *copies(fit, eot, edges))
    hit, bucket = copies(val, eot, edges)
    mixed = mixture_losses(usual, hit, weights[bucket])
    say(f"copy mixture    {mixed.mean():.4f} nats/token: the usual prediction mixed with the token after the longest "
        f"earlier match in the document, weights from {len(fit) - 1:,} training tokens")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. Raises ValueError that names all wrong values at once."""
    parser, problems = generate.Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False), []
    parser.add_argument("--checkpoint", type=Path, default=Path("logs"), metavar="PATH",
                        help="folder of a checkpoint, or of a run or experiment: its newest (default: newest in logs)")
    for flag, (_, _, text) in NUMBERS.items():
        parser.add_argument(f"--{flag}", default=0, metavar="N", help=f"{text} (default: 0)")
    parser.add_argument("--device", default="auto", metavar="X", help="auto, cpu or cuda (default: auto)")
    args = parser.parse_args(argv)
    for flag, (low, high, _) in NUMBERS.items():
        given, name = getattr(args, flag.replace("-", "_")), flag.replace("-", "_")
        setattr(args, name, generate.number(given, int, low, high))
        if getattr(args, name) is None:
            problems.append(f"--{flag} {given!s:.40}: expected an integer from {low} to {high}")
    if args.device not in ("auto", "cpu", "cuda") or args.device == "cuda" and not torch.cuda.is_available():
        problems.append(f"--device {args.device:.40}: expected auto, cpu, or cuda where there is a CUDA device")
    if problems:
        raise ValueError("; ".join(problems))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return args


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code."""
    def act():
        args = parse(argv)
        generate.use_newest(args.checkpoint, partial(measure, args))

    return generate.guarded(act, "use a smaller --row-len")


if __name__ == "__main__":
    sys.exit(main())
