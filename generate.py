"""Sample text from a checkpoint of any training script and data set of this project.

    python generate.py                                    # the newest checkpoint under logs/, from a document's start
    python generate.py --checkpoint logs/quickstart --prompt "def " --temperature 0.7 --top-k 50 --num-samples 3

The text goes to stdout as it is made; notes and tokens/s go to stderr. The weights are the checkpoint's fp32 masters,
the attention window is that of its validation. Keys and values of earlier tokens are cached, which changes no logit
beyond rounding; `--no-cache` computes them anew for every token. Routers of a mixture of experts choose without noise,
and drop nothing.
"""
from __future__ import annotations

import argparse
import codecs
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from data.common import Tokenizer, load_tokenizer

MAX_PROMPT = 8192  # tokens: the mask of the pass over the prompt has this number squared of entries
NUMBERS = {  # flag: type, default, smallest and largest value, help
    "temperature": (float, 0.8, 0, 1000, "divides the logits: 0 greedy, 1 the model's own distribution"),
    "top-k": (int, 0, 0, 65536, "sample from the K likeliest tokens; 0: from all"),
    "seed": (int, 0, 0, 2**63 - 1, "same seed, same text"),
    "num-samples": (int, 1, 1, 1_000_000, "number of texts"),
    "max-tokens": (int, 256, 1, 100_000, "length of a text after the prompt, in tokens, if no eot ends it"),
}

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint -> model


def find_checkpoint(place: Path) -> Path:
    """The checkpoint folder `place`, or the newest one in a run's, an experiment's or the log folder.

    Raises FileNotFoundError if there is none."""
    depths = ("", "checkpoints/", "*/checkpoints/", "*/*/checkpoints/")
    if place.name.startswith("step_") and place.is_dir():
        return place
    found = [path for depth in depths for path in place.glob(f"{depth}step_*[0-9]")]
    if not found:
        raise FileNotFoundError(f"no checkpoint in {place}: train with python train_gpt.py, or name the folder of a "
                                "checkpoint, run or experiment with --checkpoint")
    return max(found, key=lambda path: (path.stat().st_mtime, path.name))


def read_meta(path: Path) -> dict:
    """meta.json of a checkpoint, after comparing state.pt with its sha256. Raises ValueError if either is damaged."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        with open(path / "state.pt", "rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == meta["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint {path} is damaged ({error!r}): name another one with --checkpoint") from error
    if not same:
        raise ValueError(f"checkpoint {path} is damaged (state.pt does not match its sha256): name another one with "
                         "--checkpoint")
    return meta


def import_script(name: str) -> ModuleType:
    """The training script that a checkpoint names: only a `train_*.py` beside this file, as importing it runs it."""
    here = Path(__file__).resolve().parent
    if not re.fullmatch(r"train_\w+\.py", name) or not (here / name).is_file():
        scripts = ", ".join(sorted(path.name for path in here.glob("train_*.py")))
        raise ValueError(f"the checkpoint was made by {name!r}, which is none of the training scripts here: {scripts}")
    return importlib.import_module(name.removesuffix(".py"))


def read_settings(script: ModuleType, saved: dict):
    """`Settings` of the script as saved, for eager fp32 anywhere. Names those that the script no longer has."""
    known = {field.name for field in dataclasses.fields(script.Settings)}
    if unknown := sorted(saved.keys() - known):
        print(f"note: {script.__name__}.py no longer has the settings {', '.join(unknown)}: ignored", file=sys.stderr)
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in known}
    if values.get("softcap") == (0,):  # how earlier versions said: no cap
        values["softcap"] = (0.0, 0.0, 1.0)
    exact = dict(dtype="fp32", backend="sdpa", device="cpu", compile=False, kernels="none", fp8_head="off",
                 moe_impl="loop")
    return script.Settings(**values | {name: value for name, value in exact.items() if name in known})


def load_model(script: ModuleType, path: Path, meta: dict, longest: int) -> tuple[nn.Module, int]:
    """The trained model, fp32 on the CPU, with rotary tables for `longest` tokens, and its long attention window in
    tokens, that of validation at the checkpoint's step.

    Raises ValueError if script and checkpoint do not fit."""
    try:
        s = read_settings(script, meta["settings"])
        model = script.GPT(s, meta["data"]["meta"]["vocab_size"]).requires_grad_(False)
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True, mmap=True)  # reads no moments
        model.load_state_dict(state["model"] if "model" in state else state["optimizer"]["state"]["master"])
        if hasattr(model, "router_bias"):  # of a mixture of experts: a buffer, no weight
            model.router_bias.copy_(state["optimizer"]["balance"]["bias"])
        constant = getattr(model, "window", 0)  # train_baseline.py's
        window = constant or script.window_at(s, script.stage_table(s), meta["step"])
        longer = getattr(s, "eval_window", 0)
        if getattr(model, "positions", None) is not None and longest > len(model.positions.weight):
            raise ValueError(f"{path} has learned positions of {len(model.positions.weight)} tokens, {longest} are "
                             "asked for: lower --max-tokens")
        if longest > model.cos.size(0) or longer > window:
            model.cos, model.sin = script.rotary_table(longest, s.head_dim, s.rope_base,
                                                       *((window, longer) if longer else ()))
        return model, longer or window
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        commit = (meta.get("git") or {}).get("commit")
        raise ValueError(f"{path} does not fit this {meta['script']} ({' '.join(repr(error).split())[:200]}): use the "
                         f"version it was made with, commit {commit}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Model -> logits


class Decoder:
    """Logits of the token after a text that grows: a prompt in one pass, then token by token.

    With the cache, the model's own trunk runs on the new tokens only, and what looks at other positions is replaced:
    the rotary tables start at the first new token; the embedding and the key offset get what came before it, too; and
    attention has keys and values of a layer from a ring of as many slots as its window. A key overwrites the one that
    leaves the window with it, so a new token sees all of the ring (its mask is 1 x 1 and true); in which order does not
    matter, as keys are stored rotated.
    """

    def __init__(self, model: nn.Module, window: int, longest: int, cached: bool):
        self.model, self.cached, self.device = model, cached, model.cos.device
        self.window = torch.tensor(window, dtype=torch.int32, device=self.device)
        self.cos, self.sin = model.cos, model.sin
        if cached:
            self.embedding, self.masks = model.embedding, model.masks
            docs = torch.zeros(1, min(window, longest), dtype=torch.int32, device=self.device)
            sizes = {kind: int(mask[0, 0, -1].sum()) for kind, mask in model.masks(docs, self.window).items()}
            model.embedding, model.masks = self.embed, self.see
            for block, layer in zip(model.blocks, model.layers, strict=True):
                if (attn := block.attn) is not None:
                    slots = sizes[layer.attention] // (2 if attn.paired else 1)  # the mask of paired heads has two rows
                    ring = torch.empty((2, 1, slots, attn.num_heads, attn.head_dim), device=self.device)
                    attn.offset_keys = partial(self.offset, attn.offset_keys, torch.empty_like(ring[0, :, :1]))
                    attn.project = partial(self.remember, attn.project, ring)
        self.restart()

    def restart(self):
        """Forgets the text."""
        self.text = torch.empty(1, 0, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def __call__(self, new: list[int]) -> Tensor:
        """Appends tokens (one, except to an empty text); logits of the token after them, (padded vocabulary,) fp32."""
        assert len(new) == 1 or not self.text.numel(), "a ring has room for one new key"
        self.start = self.text.size(1) if self.cached else 0
        self.text = torch.cat((self.text, torch.tensor([new], device=self.device)), dim=1)
        tokens = self.text[:, self.start:]
        self.model.cos, self.model.sin = self.cos[self.start:], self.sin[self.start:]
        x = self.model.trunk(tokens, torch.zeros_like(tokens), self.window)
        return self.model.head(x[:, -1:])[0, -1].float()

    def embed(self, inputs_BT: Tensor, follows_BT1: Tensor) -> Tensor:
        """Embeddings of the new tokens, (B, T, D), computed with two more before them: the one that is smeared over the
        first new token may itself be paired with its own predecessor."""
        tokens = self.text[:, max(0, self.start - 2):]
        follows = torch.arange(tokens.size(1), device=self.device)[None, :, None] > 0
        return self.embedding(tokens, follows)[:, -inputs_BT.size(1):]

    def see(self, docs_BT: Tensor, window: Tensor) -> dict:
        """The model's masks for a prompt; a later token sees all that the rings hold."""
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return {kind: everything for kind in "LSP"} if self.start else self.masks(docs_BT, window)

    def offset(self, offset_keys: Callable, last: Tensor, k_BTHK: Tensor, follows_BT11: Tensor) -> Tensor:
        """Attention.offset_keys, with the key of the token before the new ones in front, (1, 1, H, K), kept in `last`.
        """
        k = torch.cat((last, k_BTHK), dim=1) if self.start else k_BTHK
        last.copy_(k_BTHK[:, -1:])
        follows = torch.arange(k.size(1), device=self.device)[None, :, None, None] > 0
        return offset_keys(k, follows)[:, -k_BTHK.size(1):]

    def remember(self, project: Callable, ring: Tensor, x_BTD: Tensor, *rest):
        """Attention.project, which stores k and v in the ring, (2, 1, slots, H, K); a later token gets all of it."""
        q, k, v, *own = project(x_BTD, *rest)
        size, end = ring.size(2), self.start + x_BTD.size(1)
        slots = torch.arange(max(self.start, end - size), end, device=self.device) % size
        ring[:, :, slots] = torch.stack((k, v))[:, :, -size:]
        return (q, *ring[:, :, :end], *own) if self.start else (q, k, v, *own)


def not_cacheable(script: ModuleType, model: nn.Module) -> str | None:
    """The first layer that the cache cannot serve, in words; None if there is none."""
    if not hasattr(model, "layers"):
        return f"the attention of {script.__name__}.py has none"
    for i, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        if block.attn is not None and not hasattr(block.attn, "project"):
            return f"the attention of {script.__name__}.py has none"
        if block.attn is not None and (type(block.attn) is not script.Attention or layer.attention not in "LSP"):
            return f"layer {i} is {type(block.attn).__name__} of kind {layer.attention!r}"
        if getattr(getattr(block.mlp, "router", None), "forced", False):
            return f"layer {i} takes experts in turn, by a token's place (force_balance)"
    return None


def make_decoder(path: Path, meta: dict, device: str, longest: int, cached: bool) -> Decoder:
    """Decoder of a checkpoint for texts of up to `longest` tokens; without the cache if that cannot serve the model."""
    script = import_script(meta["script"])
    model, window = load_model(script, path, meta, longest)
    reason = not_cacheable(script, model)
    if cached and reason:
        print(f"note: no cache, as {reason}: each token takes a pass over the whole text", file=sys.stderr)
    return Decoder(model.to(device), window, longest, cached and not reason)


# ----------------------------------------------------------------------------------------------------------------------
# Logits -> text


def choose(logits_V: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> int:
    """One token. Greedy is top-k 1. fp64 and distances to the largest logit bear every temperature above 0."""
    top_k = 1 if temperature == 0 else min(top_k or len(logits_V), len(logits_V))
    values, tokens = logits_V.double().topk(top_k)
    probabilities = ((values - values[0]) / (temperature or 1)).softmax(0)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def sample(decoder: Decoder, prompt: list[int], vocab: dict, args, generator: torch.Generator) -> Iterator[int]:
    """New tokens after the prompt, until eot, which is left out. Padding of the vocabulary is never chosen."""
    decoder.restart()
    new = prompt
    for _ in range(args.max_tokens):
        token = choose(decoder(new)[:vocab["vocab_size"]], args.temperature, args.top_k, generator)
        if token == vocab["eot"]:
            return
        yield token
        new = [token]


# Shown as U+FFFD, like bytes that are not UTF-8: a young model writes escape sequences, which would drive the terminal.
CONTROLS = {code: "\ufffd" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def characters(chunks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 as text, each character as soon as its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        yield decoder.decode(chunk).translate(CONTROLS)
    yield decoder.decode(b"", final=True)


def encode_prompt(tokenizer: Tokenizer, vocab: dict, text: str) -> list[int]:
    """Tokens to start from: eot, as documents do, and the text; without eot the text, or a newline if it is empty.

    Raises ValueError that names the characters which the vocabulary lacks, or for a prompt that is too long."""
    if vocab["tokenizer"]["kind"] == "char" and (missing := sorted(set(text) - set(tokenizer.chars))):
        raise ValueError(f"--prompt: the model has no {', '.join(map(repr, missing))}, only {tokenizer.chars!r}")
    tokens = tokenizer.encode(text or "\n") if vocab["eot"] is None else [vocab["eot"], *tokenizer.encode(text)]
    if len(tokens) > MAX_PROMPT:
        raise ValueError(f"--prompt: {len(tokens)} tokens, at most {MAX_PROMPT} are possible")
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that raises its one sentence."""

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all flags)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. Raises ValueError that names all wrong values at once."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, default=Path("logs"), metavar="PATH",
                        help="folder of a checkpoint, or of a run or experiment: its newest (default: newest in logs)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (default: start of a document)")
    for flag, (_, default, _, _, text) in NUMBERS.items():
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('-', '_')}"))
        parser.add_argument(*spellings, default=default, metavar="X", help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", metavar="X", help="auto, cpu or cuda (default: auto)")
    parser.add_argument("--no-cache", "--no_cache", action="store_true", help="pass over the whole text for each token")
    args, problems = parser.parse_args(argv), []
    for flag, (kind, _, low, high, _) in NUMBERS.items():
        value, name = None, flag.replace("-", "_")
        with contextlib.suppress(ValueError):
            value = kind(getattr(args, name))
        if value is None or not low <= value <= high:
            wanted = "an integer" if kind is int else "a number"
            problems.append(f"--{flag} {getattr(args, name)}: expected {wanted} from {low} to {high}")
        setattr(args, name, value)
    if args.device not in ("auto", "cpu", "cuda"):
        problems.append(f"--device {args.device}: expected auto, cpu or cuda")
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: this machine has no usable CUDA device, leave the flag out")
    if problems:
        raise ValueError("; ".join(problems))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return args


def generate(args: argparse.Namespace):
    """Prints the samples, and on stderr what they were made with and the rate."""
    path = find_checkpoint(args.checkpoint)
    meta = read_meta(path)
    vocab = meta["data"]["meta"]
    tokenizer = load_tokenizer(vocab)
    prompt = encode_prompt(tokenizer, vocab, args.prompt)
    decoder = make_decoder(path, meta, args.device, len(prompt) + args.max_tokens, not args.no_cache)
    cache = "with" if decoder.cached else "without"
    print(f"{path}: {args.device}, window {int(decoder.window)}, {cache} cache", file=sys.stderr)
    generator, began, count = torch.Generator(args.device).manual_seed(args.seed), time.perf_counter(), 0
    for i in range(args.num_samples):
        if args.num_samples > 1:
            print(f"--- sample {i + 1} of {args.num_samples}")
        tokens = chain(tokenizer.encode(args.prompt), sample(decoder, prompt, vocab, args, generator))
        for text in characters(tokenizer.decode_bytes([token]) for token in tokens):
            print(text, end="", flush=True)
        print(flush=True)
        count += decoder.text.size(1) - len(prompt) + 1  # the last one was not appended
    seconds = time.perf_counter() - began
    print(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.1f} tokens/s", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code. One sentence instead of a traceback for what the user can repair."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding lacks
    try:
        generate(parse(argv))
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
