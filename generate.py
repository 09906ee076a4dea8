"""Sample text from a checkpoint of any training script and data set of this project.

    python generate.py                                    # the newest checkpoint under logs/, from a document's start
    python generate.py --checkpoint logs/quickstart --prompt "def " --temperature 0.7 --top-k 50 --num-samples 3
    python generate.py --interactive                      # a line after the other is continued; /help

The text goes to stdout as it is made: its bytes as they are, but on a terminal without control characters. Notes and
tokens/s go to stderr. The weights are the checkpoint's fp32 masters, the attention window is that of its validation.
Keys and values of earlier tokens are cached, which changes no logit beyond rounding; `--no-cache` computes them anew
for every token. Routers of a mixture of experts choose without noise, and drop nothing. A model that copies is sampled
from the mixture of its head and its copies, never the head's class that stands for copying.
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import argparse
import codecs
import contextlib
import importlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.common import MAX_VOCAB_SIZE, Tokenizer, load_tokenizer
from train_gpt import IGNORE, checkpoints_in, copy_losses, misfit, norm, out_of_memory, printable, read_state

MAX_PROMPT = 8192  # tokens: the mask of the pass over the prompt has this number squared of entries
MAX_MASK = 32768  # tokens: the same for the masks that a decoder is made with
MAX_TABLES = 2**28  # entries of the rotary tables: a million tokens, heads of 128 dimensions
NUMBERS = {  # flag: type, default, smallest and largest value, help
    "temperature": (float, 0.8, 0, 1000, "divides the logits: 0 greedy, 1 the model's own distribution"),
    "top-k": (int, 0, 0, 65536, "sample from the K likeliest tokens; 0: from all"),
    "seed": (int, 0, 0, 2**63 - 1, "same seed, same text"),
    "num-samples": (int, 1, 1, 1_000_000, "number of texts"),
    "max-tokens": (int, 256, 1, 100_000, "length of a text after the prompt, in tokens, if no eot ends it"),
}
T = TypeVar("T")

# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint -> model


class Unusable(ValueError):
    """What is wrong with a checkpoint, so that the one before it may be tried."""


def use_newest(place: Path, use: Callable[[Path, dict], T]) -> T:
    """What `use` makes of the checkpoint folder `place`, or of the newest checkpoint in the folder of a run, of an
    experiment or of logs and its meta.json. Where that cannot be used, which is said, of the one before it.

    Raises FileNotFoundError if there is none, ValueError if none can be used."""
    damaged = []
    inside = place.parent if place.name == "checkpoints" else place
    found = checkpoints_in(inside, ("", "*/", "*/*/"), tell=lambda path, reason: damaged.append((path, reason)))
    if place.absolute().parent.name == "checkpoints":  # that one, no other
        found, damaged = ([one for one in some if one[0] == place] for some in (found, damaged))
    for path, reason in damaged:
        if found:
            note(f"checkpoint {path} cannot be used ({reason}): passed over")
    for path, meta in found:
        try:
            return use(path, meta)
        except Unusable as error:
            damaged.append((path, error))
            if path != found[-1][0]:
                note(f"checkpoint {path} cannot be used ({error}): trying the one before it")
    if damaged:
        path, reason = damaged[-1]
        raise ValueError(f"checkpoint {path} cannot be used ({reason}): name another one with --checkpoint")
    raise FileNotFoundError(f"no checkpoint in {place}: train with python train_gpt.py, or name the folder of a "
                            "checkpoint, run or experiment with --checkpoint")


def import_script(name: str) -> ModuleType:
    """The training script that a checkpoint names: only a `train_*.py` beside this file, as importing it runs it."""
    here = Path(__file__).resolve().parent
    if not isinstance(name, str) or not re.fullmatch(r"train_\w+\.py", name) or not (here / name).is_file():
        scripts = ", ".join(sorted(path.name for path in here.glob("train_*.py")))
        raise Unusable(f"it was made by {name!r:.60}, which is none of the training scripts here: {scripts}")
    return importlib.import_module(name.removesuffix(".py"))


def read_settings(script: ModuleType, saved: dict):
    """`Settings` of the script as saved, for eager fp32 anywhere. Names those that the script no longer has. Raises
    ValueError for a value of another type."""
    defaults = vars(script.Settings())
    if unknown := sorted(saved.keys() - defaults.keys()):
        note(f"note: {script.__name__}.py no longer has the settings {', '.join(unknown):.200}: ignored")
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name in defaults}
    for name, value in values.items():
        several = isinstance(value, tuple) and isinstance(defaults[name], tuple)
        like = defaults[name][0] if several else defaults[name]
        for part in value if several else (value,):
            if wrong := misfit(part, like, name):
                raise ValueError(wrong)
    if values.get("softcap") == (0,):  # how earlier versions said: no cap
        values["softcap"] = (0.0, 0.0, 1.0)
    exact = dict(dtype="fp32", backend="sdpa", device="cpu", compile=False, kernels="none", fp8_head="off",
                 moe_impl="loop")
    return script.Settings(**values | {name: value for name, value in exact.items() if name in defaults})


def build_model(script: ModuleType, s, vocab_size: int, weights: dict, size: int) -> nn.Module:
    """The model of these settings with weights from a file of that size. What they ask for is compared with what there
    is before any memory is taken, on the device `meta`, where tensors are shapes. Raises ValueError if they differ."""
    seen = itertools.count()

    def no_more(*_):
        if next(seen) > len(weights) + 8:  # some names are assigned twice
            raise ValueError(f"its settings ask for more than the {len(weights)} tensors of state.pt")

    if (layers := max(s.num_layers, len(getattr(s, "attention", "")))) > len(weights):
        raise ValueError(f"its settings ask for {layers} layers, state.pt has {len(weights)} tensors")
    hook = nn.modules.module.register_module_parameter_registration_hook(no_more)
    try:
        with torch.device("meta"):
            shapes = script.GPT(s, vocab_size)
    finally:
        hook.remove()
    more = ", ".join(map(str, weights.keys() - shapes.state_dict().keys()))
    if wrong := misfit(weights, shapes.state_dict(), "state.pt") or more and f"state.pt has more: {more:.80}":
        raise ValueError(wrong)
    if 4 * sum(p.numel() for p in shapes.parameters()) > size:
        raise ValueError("state.pt is smaller than the weights that it says to hold")
    if sum(buffer.numel() for buffer in shapes.buffers()) > MAX_TABLES:
        raise ValueError("its settings ask for rotary tables that no text needs")
    model = script.GPT(s, vocab_size).requires_grad_(False)
    model.load_state_dict(weights)
    return model


def load_model(script: ModuleType, path: Path, meta: dict, longest: int) -> tuple[nn.Module, int]:
    """The trained model, fp32 on the CPU, with rotary tables for `longest` tokens, and its long attention window in
    tokens, that of validation at the checkpoint's step.

    Raises Unusable if script and checkpoint do not fit, ValueError for more tokens than the model has positions."""
    try:
        state, vocab = read_state(path, meta), meta["data"]["meta"]  # reads no moments
    except (ValueError, OSError) as error:
        raise Unusable(str(error)) from error
    try:
        if wrong := misfit(vocab, {"vocab_size": 0}, "data"):
            raise ValueError(wrong)
        s, weights = read_settings(script, meta["settings"]), state.get("model")
        weights = state["optimizer"]["state"]["master"] if weights is None else weights
        model = build_model(script, s, vocab["vocab_size"], weights, (path / "state.pt").stat().st_size)
        if hasattr(model, "router_bias"):  # of a mixture of experts: a buffer, no weight
            bias = state["optimizer"]["balance"]["bias"]
            if wrong := misfit(bias, model.router_bias, "the routers' bias"):
                raise ValueError(wrong)
            model.router_bias.copy_(bias)
        constant = getattr(model, "window", 0)  # train_baseline.py's
        at = (meta.get("schedule") or {"at": meta["step"]})["at"]
        window = constant or script.window_at(s, script.stage_table(s), at)
        longer = getattr(s, "eval_window", 0)
        positions = len(model.positions.weight) if getattr(model, "positions", None) is not None else longest
        if longest > model.cos.size(0) or longer > window:
            model.cos, model.sin = script.rotary_table(longest, s.head_dim, s.rope_base,
                                                       *((window, longer) if longer else ()))
        window = longer or window
        try_out(model, window)
    except Exception as error:  # noqa: BLE001 - what a script raises for settings that it never had has no end
        if out_of_memory(error):
            raise
        git = meta["git"] if isinstance(meta.get("git"), dict) else {}
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise Unusable(f"it does not fit this {script.__name__}.py, {' '.join(reason.split()):.200}; use the version "
                       f"it was made with, commit {git.get('commit')!s:.40}") from error
    if longest > positions:
        raise ValueError(f"{path} has learned positions of {positions} tokens, {longest} are asked for: lower "
                         "--max-tokens")
    return model, window


def try_out(model: nn.Module, window: int):
    """Raises what the model raises for a text of one token, or ValueError if its logits are not finite."""
    if window < 1 or not Decoder(model, window, longest=1, cached=False)([0]).isfinite().all():
        raise ValueError(f"with its window of {window} tokens a logit is not finite")


# ----------------------------------------------------------------------------------------------------------------------
# Model -> losses of known tokens


@torch.no_grad()
def target_losses(model: nn.Module, batch_3BT: Tensor, window: int, at_a_time: int) -> Tensor:
    """Losses of the targets that are not IGNORE, in order, (N,) fp32 in nats: as in training those of the mixture where
    the model copies, with all columns of the head in the softmax, also those that pad the vocabulary.

    batch: inputs, targets, document numbers, int32; the head runs on `at_a_time` positions at once."""
    inputs_BT, targets_BT, docs_BT = batch_3BT
    long_window = torch.tensor(window, dtype=torch.int32, device=inputs_BT.device)
    x_BTD = model.trunk(inputs_BT, docs_BT, long_window)
    chosen, losses = (targets_BT.flatten() != IGNORE).nonzero()[:, 0], []
    copies = copied(model, x_BTD, inputs_BT, targets_BT, docs_BT)
    of_chosen = (x.flatten(0, 1)[chosen] for x in (x_BTD, targets_BT.long(), *copies))
    for x_ND, targets_N, *copies_N in zip(*(x.split(at_a_time) for x in of_chosen), strict=True):
        logits_NV = model.head(x_ND).float()
        loss_N = F.cross_entropy(logits_NV, targets_N, reduction="none")
        if copies_N:
            gate_N = torch.full_like(targets_N, model.vocab_size)
            loss_N = copy_losses(loss_N, F.cross_entropy(logits_NV, gate_N, reduction="none"), *copies_N)
        losses.append(loss_N)
    return torch.cat(losses)


def copied(model: nn.Module, x_BTD: Tensor, inputs_BT, targets_BT, docs_BT) -> tuple[Tensor, ...]:
    """What the model's pointer says of each target, as its losses take it; nothing without a pointer."""
    pointer = getattr(model, "pointer", None)
    return () if pointer is None else pointer(norm(x_BTD), inputs_BT, targets_BT, docs_BT)


# ----------------------------------------------------------------------------------------------------------------------
# Model -> logits of the next token


class Decoder:
    """Logits of the token after a text that grows: a prompt in one pass, then token by token.

    With the cache, the model's own trunk runs on the new tokens only, and what looks at other positions is replaced:
    the rotary tables start at the first new token; embedding, n-grams and key offset get what came before it, too; and
    attention has keys and values of a layer from a ring of as many slots as its window. A key overwrites the one that
    leaves the window with it, so a new token sees all of the ring (its mask is 1 x 1 and true); in which order does not
    matter, as keys are stored rotated. The pointer's keys are kept, too; a token costs a row of its attention.
    """

    def __init__(self, model: nn.Module, window: int, longest: int, cached: bool):
        self.model, self.cached, self.device = model, cached, model.cos.device
        self.window = torch.tensor(window, dtype=torch.int32, device=self.device)
        self.cos, self.sin, self.pointer = model.cos, model.sin, getattr(model, "pointer", None)
        if self.pointer is not None:
            self.pointer_keys = torch.empty(longest, self.pointer.small.size(1), device=self.device)
        if cached:
            self.embedding, self.masks = model.embedding, model.masks
            docs = torch.zeros(1, min(window, longest), dtype=torch.int32, device=self.device)
            sizes = {kind: int(mask[0, 0, -1].sum()) for kind, mask in model.masks(docs, self.window).items()}
            model.embedding, model.masks = self.embed, self.see
            if model.ngrams is not None:
                model.ngrams.forward = partial(self.find, model.ngrams.forward)
            for block, layer in zip(model.blocks, model.layers, strict=True):
                if (attn := block.attn) is not None:
                    slots = sizes[layer.attention] // (2 if attn.paired else 1)  # the mask of paired heads has two rows
                    attn.offset_keys = partial(self.offset, attn.offset_keys, kept := {})
                    attn.project = partial(self.remember, attn.project, kept, slots)
        self.restart()

    def restart(self):
        """Forgets the text."""
        self.text = torch.empty(1, 0, dtype=torch.long, device=self.device)

    @torch.inference_mode()
    def __call__(self, new: list[int]) -> Tensor:
        """Appends tokens (one, except to an empty text); logits of the token after them, (padded vocabulary,) fp32. Of
        a model that copies log-probabilities of all tokens, (vocabulary,)."""
        assert len(new) == 1 or not self.text.numel(), "a ring has room for one new key"
        self.start = self.text.size(1) if self.cached else 0
        self.text = torch.cat((self.text, torch.tensor([new], device=self.device)), dim=1)
        tokens = self.text[:, self.start:]
        self.model.cos, self.model.sin = self.cos[self.start:], self.sin[self.start:]
        x = self.model.trunk(tokens, torch.zeros_like(tokens), self.window)
        logits = self.model.head(x[:, -1:])[0, -1].float()
        return logits if self.pointer is None else self.mix(logits, *self.point(norm(x[0])))

    def point(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """The pointer's attention for the next token, on each place of the text, (T,), and on the sink. `x`: the normed
        stream of the new tokens."""
        q_TK, k_TK = F.linear(x_TD, self.pointer.qk).float().chunk(2, dim=-1)
        gain, sink = self.pointer.small.float()
        end, block = self.text.size(1), sys.modules[type(self.model).__module__].POINTER_BLOCK
        self.pointer_keys[self.start:end] = norm(k_TK)
        first = max(0, ((end - 1) // block - 1) * block)
        keys = torch.cat((self.pointer_keys[first:end - 1], sink[None]))
        share = (keys @ (norm(q_TK[-1]) * gain) * sink.numel() ** -0.5).softmax(0)
        return F.pad(share[:-1], (first, 1)), share[-1]

    def mix(self, logits_V: Tensor, share_T: Tensor, nothing: Tensor) -> Tensor:
        """Log-probabilities of the tokens, (vocabulary,): log of p (1 - alpha (1 - nothing)) + alpha copied, where p is
        the head's without the gate, alpha that of the gate, and copied the sum of the shares of places with a token."""
        gate = self.model.vocab_size
        alpha = logits_V.softmax(0)[gate]
        head = logits_V.index_fill(0, torch.tensor(gate, device=self.device), -torch.inf).log_softmax(0)[:gate]
        copies = torch.zeros_like(head).index_add_(0, self.text[0], share_T)
        return torch.logaddexp(head + torch.log1p(-alpha * (1 - nothing)), (alpha * copies).log())

    def embed(self, inputs_BT: Tensor, follows_BT1: Tensor) -> Tensor:
        """Embeddings of the new tokens, (B, T, D), computed with two more before them: the one that is smeared over the
        first new token may itself be paired with its own predecessor."""
        tokens = self.text[:, max(0, self.start - 2):]
        follows = torch.arange(tokens.size(1), device=self.device)[None, :, None] > 0
        return self.embedding(tokens, follows)[:, -inputs_BT.size(1):]

    def find(self, ngrams: Callable, inputs_BT: Tensor, docs_BT: Tensor) -> Tensor:
        """What the n-gram table has for the new tokens, (B, T, D), which depends on the two before them."""
        tokens = self.text[:, max(0, self.start - 2):]
        return ngrams(tokens, torch.zeros_like(tokens))[:, -inputs_BT.size(1):]

    def see(self, docs_BT: Tensor, window: Tensor) -> dict:
        """The model's masks for a prompt; a later token sees all that the rings hold."""
        everything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self.device)
        return {kind: everything for kind in "LSP"} if self.start else self.masks(docs_BT, window)

    def offset(self, offset_keys: Callable, kept: dict[str, Tensor], k_BTHK: Tensor, follows_BT11: Tensor) -> Tensor:
        """Attention.offset_keys, with the key of the token before the new ones in front, (1, 1, H, K), which is kept.
        """
        k = torch.cat((kept["last"], k_BTHK), dim=1) if self.start else k_BTHK
        kept["last"] = k_BTHK[:, -1:]
        follows = torch.arange(k.size(1), device=self.device)[None, :, None, None] > 0
        return offset_keys(k, follows)[:, -k_BTHK.size(1):]

    def remember(self, project: Callable, kept: dict[str, Tensor], slots: int, x_BTD: Tensor, *rest):
        """Attention.project, which stores k and v in rings, (1, slots, H, K) each; a later token gets all of them."""
        q, k, v, *own = project(x_BTD, *rest)
        end = self.start + x_BTD.size(1)
        places = torch.arange(max(self.start, end - slots), end, device=self.device) % slots
        if not self.start:
            kept |= {name: x.new_empty(1, slots, *x.shape[2:]) for name, x in (("k", k), ("v", v))}
        for name, x in (("k", k), ("v", v)):
            kept[name][:, places] = x[:, -slots:]
        return (q, kept["k"][:, :end], kept["v"][:, :end], *own) if self.start else (q, k, v, *own)


def not_cacheable(script: ModuleType, model: nn.Module) -> str | None:
    """The first layer that the cache cannot serve, in words; None if there is none."""
    if not hasattr(model, "layers"):
        return f"the attention of {script.__name__}.py has none"
    for i, (block, layer) in enumerate(zip(model.blocks, model.layers, strict=True)):
        if block.attn is not None and not hasattr(block.attn, "project"):
            return f"the attention of {script.__name__}.py has none"
        if block.attn is not None and (type(block.attn) is not script.Attention or layer.attention not in "LSP"):
            return f"layer {i} is {type(block.attn).__name__} of kind {layer.attention!r}"
    return None


def make_decoder(path: Path, meta: dict, device: str, longest: int, cached: bool) -> Decoder:
    """Decoder of a checkpoint for texts of up to `longest` tokens; without the cache if that cannot serve the model."""
    script = import_script(meta.get("script"))
    model, window = load_model(script, path, meta, longest)
    reason = not_cacheable(script, model)
    if cached and reason:
        note(f"note: no cache, as {reason}: each token takes a pass over the whole text")
    cached = cached and not reason
    if (size := min(window, longest) if cached else longest) > MAX_MASK:
        raise ValueError(f"a mask of {size} x {size} tokens is too large, at most {MAX_MASK} are possible: lower "
                         "--max-tokens")
    return Decoder(model.to(device), window, longest, cached)


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
        if token == vocab.get("eot"):
            return
        yield token
        new = [token]


# Shown as U+FFFD, like bytes that are not UTF-8: a young model writes escape sequences, which would drive the terminal.
CONTROLS = {code: "\ufffd" for code in [*range(0x20), *range(0x7F, 0xA0)] if chr(code) not in "\t\n"}


def characters(chunks: Iterable[bytes]) -> Iterator[str]:
    """UTF-8 as text for a terminal, each character as soon as its last byte is there."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for chunk in chunks:
        yield decoder.decode(chunk).translate(CONTROLS)
    yield decoder.decode(b"", final=True)


def write_text(chunks: Iterable[bytes]):
    """To stdout, each chunk at once: the bytes as they are, but on a terminal as characters."""
    if sys.stdout.isatty() or not hasattr(sys.stdout, "buffer"):
        for text in characters(chunks):
            say(text, end="")
        return
    for chunk in chunks:
        with named("stdout"):
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()


def read_vocabulary(vocab: dict) -> Tokenizer:
    """The tokenizer of a data set's meta.json. Raises Unusable if that is not built as one, or promises more tokens
    than the tokenizer has; RuntimeError if tiktoken's files are not at hand."""
    try:
        if wrong := misfit(vocab, {"vocab_size": 0, "eot": (None, 0), "tokenizer": {"kind": ""}}, "data"):
            raise ValueError(wrong)
        tokenizer = load_tokenizer(vocab)
        chars, size, eot = getattr(tokenizer, "chars", None), vocab["vocab_size"], vocab.get("eot")
        known = tokenizer.encoding.n_vocab if chars is None else len(chars)
        if not 0 < size <= min(known, MAX_VOCAB_SIZE) or (eot or 0) >= size:
            raise ValueError(f"it has a vocabulary of {size}, its tokenizer of {known}, eot is {eot}")
        (chars or "").encode()
    except ValueError as error:
        raise Unusable(f"its vocabulary cannot be used, {error!s:.200}") from error
    return tokenizer


def encode_prompt(tokenizer: Tokenizer, vocab: dict, text: str) -> list[int]:
    """Tokens to start from: eot, as documents do, and the text. Without eot the text, or if it is empty a newline, or
    where there is none the first character, which is said.

    Raises ValueError that names characters which the vocabulary lacks, or for a prompt that is too long."""
    chars, eot = getattr(tokenizer, "chars", None), vocab.get("eot")
    if chars is not None and (missing := sorted(set(text) - set(chars))):
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"--prompt: {', '.join(map(repr, missing[:10]))}{more} not among the {len(chars)} characters "
                         "that the model knows")
    if not text and eot is None:
        text = "\n" if chars is None or "\n" in chars else chars[0]
        if text != "\n":
            note(f"note: the model knows no end of text and no newline: starts after {text!r}, or what --prompt gives")
    is_bytes = vocab["tokenizer"]["kind"] == "byte"  # which a prompt need not be UTF-8 for
    tokens = list(text.encode("utf-8", "surrogateescape")) if is_bytes else tokenizer.encode(text)
    tokens = tokens if eot is None else [eot, *tokens]
    if len(tokens) > MAX_PROMPT:
        raise ValueError(f"--prompt: {len(tokens)} tokens, at most {MAX_PROMPT} are possible")
    if max(tokens) >= vocab["vocab_size"]:
        raise ValueError(f"--prompt: it has a token past the {vocab['vocab_size']} that the model knows")
    return tokens


# ----------------------------------------------------------------------------------------------------------------------
# A text that a person and the model write together


class Session:
    """The loop of --interactive. The text so far, the person's lines and the model's, is what the model continues: it
    knows texts, not speakers. Of a long one it sees the last tokens, as many as with the new ones make `longest`."""

    def __init__(self, start: Start, args: argparse.Namespace, longest: int):
        self.start, self.args, self.longest = start, args, longest
        self.eot = start.vocab.get("eot")
        self.generator = torch.Generator(args.device).manual_seed(args.seed)
        self.text, self.history = [], True
        self.commands = {"help": self.help, "reset": self.reset, "history": self.set_history}
        self.numbers = {flag.replace("-", "_"): flag for flag in NUMBERS if flag != "num-samples"}

    def help(self, _=""):
        """this list"""
        note("a line is continued by the model; an empty one lets it go on; one that ends in \\ has a further line; // "
             "stands for / at the start; Ctrl-C stops a sample, Ctrl-D or /quit the program")
        for name, flag in self.numbers.items():
            note(f"/{name} {getattr(self.args, name)}    {NUMBERS[flag][4]}")
        for name, command in self.commands.items():
            note(f"/{name}    {command.__doc__}")

    def reset(self, _=""):
        """forget the text so far"""
        self.text = []

    def set_history(self, value: str):
        """on (default): the text so far is continued; off: each line starts a new text"""
        if value not in ("on", "off"):
            raise ValueError(f"/history {value:.40}: expected on or off")
        self.history = value == "on"

    def command(self, line: str):
        """Carries out a line without its slash. Raises ValueError for what it does not know."""
        name, _, value = line.strip().partition(" ")
        name, value = name.replace("-", "_"), value.strip()
        if name in self.commands:
            self.commands[name](value)
        elif name in self.numbers:
            self.set(name, value)
        else:
            known = ", ".join(f"/{word}" for word in [*self.commands, *self.numbers, "quit"])
            raise ValueError(f"/{name:.40} is none of {known}")

    def set(self, name: str, value: str):
        """A number of the command line; without a value it is told. Raises ValueError if it is not within its bounds.
        """
        kind, _, low, high, _ = NUMBERS[self.numbers[name]]
        high = min(high, self.longest - 1) if name == "max_tokens" else high
        found = number(value, kind, low, high) if value else getattr(self.args, name)
        if found is None:
            wanted = "an integer" if kind is int else "a number"
            raise ValueError(f"/{name} {value:.40}: expected {wanted} from {low} to {high}")
        setattr(self.args, name, found)
        if name == "seed" and value:
            self.generator.manual_seed(found)
        note(f"{name} {found}")

    def go_on(self, line: str):
        """Appends a line to the text, and what the model makes of it. An end of text by the model starts a new one."""
        start, begun = self.start, [] if self.eot is None else [self.eot]
        if not self.history:
            self.reset()
        added = encode_prompt(start.tokenizer, start.vocab, line)[len(begun):] if line else []
        self.text = (self.text + added)[-self.longest:]
        room = self.longest - self.args.max_tokens - len(begun)
        if len(added) > max(room, 1):
            note(f"note: of the line's {len(added)} tokens the model sees the last {max(room, 1)}; /max_tokens takes "
                 "the rest")
        seen = self.text[-max(room, 1):]
        prompt = begun + seen or encode_prompt(start.tokenizer, start.vocab, "")
        before = len(self.text)
        write_text(start.tokenizer.decode_bytes([token]) for token in self.kept(prompt))
        if len(self.text) - before < self.args.max_tokens:
            note("(end of text)")
            self.reset()

    def kept(self, prompt: list[int]) -> Iterator[int]:
        """New tokens, each of the text before it is shown."""
        for token in sample(self.start.decoder, prompt, self.start.vocab, self.args, self.generator):
            self.text.append(token)
            yield token

    def answer(self, line: str):
        """To a line: a command, or a text. Ctrl-C ends it, what was written stays; errors are told."""
        try:
            if line.startswith("/") and not line.startswith("//"):
                self.command(line[1:])
                return
            self.go_on(line.removeprefix("/") if line.startswith("//") else line)
        except KeyboardInterrupt:
            note("(stopped)")
        except ValueError as error:
            note(str(error).removeprefix("--prompt: "))
            return
        say("")


def read_lines() -> Iterator[str | None]:
    """Lines of stdin, those that end in a backslash joined with the next; None for Ctrl-C. On a terminal behind a
    prompt, and with readline's keys and history where that is present."""
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401
    said = ""
    while True:
        try:
            line = input("... " if said else "> ") if terminal else next(sys.stdin).removesuffix("\n")
        except (EOFError, StopIteration):
            if terminal:
                say("")
            return
        except KeyboardInterrupt:
            note("")
            said = ""
            yield None
            continue
        said += line
        if said.endswith("\\"):
            said = said[:-1] + "\n"
            continue
        yield said
        said = ""


def row_length(settings: dict) -> int:
    """The longest text of a checkpoint's training in tokens, at most MAX_PROMPT."""
    for name in ("max_doc_len", "seq_len"):
        sizes = settings.get(name)
        sizes = sizes if isinstance(sizes, list) else [sizes]
        if sizes and all(isinstance(size, int) and size > 1 for size in sizes):
            return min(max(sizes), MAX_PROMPT)
    return 256


def prepare_session(args: argparse.Namespace, path: Path, meta: dict) -> Session:
    """A session with a checkpoint; --max-tokens that were not given leave half of its length. Raises Unusable."""
    row = row_length(meta["settings"])
    if args.max_tokens == NUMBERS["max-tokens"][1]:
        args.max_tokens = min(args.max_tokens, row // 2)
    longest = max(row, args.max_tokens + 2)
    vocab = meta["data"]["meta"]
    tokenizer = read_vocabulary(vocab)
    decoder = make_decoder(path, meta, args.device, longest, not args.no_cache)
    return Session(Start(path, vocab, tokenizer, [], decoder), args, longest)


def converse(args: argparse.Namespace):
    """Reads lines and continues them, until Ctrl-D or /quit."""
    if sys.stdin is None:
        raise OSError("stdin is closed: --interactive reads lines from it")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")
    session = use_newest(args.checkpoint, partial(prepare_session, args))
    note(f"{session.start.path}: {args.device}, texts of up to {session.longest} tokens; /help, Ctrl-D ends")
    if args.prompt:
        session.answer(args.prompt)
    for line in read_lines():
        if line is not None and line.strip() == "/quit":
            return
        if line is not None:
            session.answer(line)


# ----------------------------------------------------------------------------------------------------------------------
# Command line


class Parser(argparse.ArgumentParser):
    """argparse that raises its one sentence."""

    def error(self, message: str):
        raise ValueError(f"{message} (--help lists all flags)")


def number(text, kind: type, low: float, high: float) -> int | float | None:
    """A number of the command line, also 1e3 for an integer; None if it is none within the bounds."""
    value = None
    with contextlib.suppress(ValueError):
        value = float(text)
        value = kind(text)
    return kind(value) if value is not None and low <= value <= high and value == kind(value) else None


def note(text: str):
    """A line to stderr, if anybody listens."""
    with contextlib.suppress(OSError):
        if sys.stderr is not None:
            print(printable(text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def named(name: str):
    """Errors of writing say where. A reader that has seen enough is none."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to {name}: {error.strerror or error}") from error


def say(text: str, end: str = "\n"):
    """To stdout, at once."""
    with named("stdout"):
        print(text, end=end, flush=True)


def guarded(action: Callable[[], int | None], smaller: str) -> int:
    """The exit code of a command. One sentence instead of a traceback for what the user can repair; `smaller` says how
    to do with less memory."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # characters that the terminal's encoding lacks
    code = 1
    try:
        if sys.stdout is None:
            raise OSError("stdout is closed")
        code = action() or 0
    except BrokenPipeError:  # the reader (head, less) has seen enough
        code = 0
    except KeyboardInterrupt:
        note("")
        code = 130
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        what = f"out of memory: {smaller}" if out_of_memory(error) else " ".join(str(error).split("\n"))
        note(f"error: {what}")
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # what cannot be written goes nowhere: the interpreter would complain at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. Raises ValueError that names all wrong values at once."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, default=Path("logs"), metavar="PATH",
                        help="folder of a checkpoint, or of a run or experiment: its newest (default: newest in logs)")
    parser.add_argument("--prompt", default="", metavar="TEXT", help="text to continue (default: start of a document)")
    for flag, (_, default, _, _, text) in NUMBERS.items():
        spellings = dict.fromkeys((f"--{flag}", f"--{flag.replace('-', '_')}"))
        parser.add_argument(*spellings, default=default, metavar="X", help=f"{text} (default: {default})")
    parser.add_argument("--device", default="auto", metavar="X",
                        help="auto, cpu, cuda or (untested) mps (default: auto)")
    parser.add_argument("--interactive", action="store_true", help="read lines and continue them: /help says more")
    parser.add_argument("--no-cache", "--no_cache", action="store_true", help="pass over the whole text for each token")
    args, problems = parser.parse_args(argv), []
    for flag, (kind, _, low, high, _) in NUMBERS.items():
        given, name = getattr(args, flag.replace("-", "_")), flag.replace("-", "_")
        setattr(args, name, number(given, kind, low, high))
        if getattr(args, name) is None:
            wanted = "an integer" if kind is int else "a number"
            problems.append(f"--{flag} {given!s:.40}: expected {wanted} from {low} to {high}")
    if args.interactive and args.num_samples not in (1, None):
        problems.append("--num-samples: --interactive makes one text, leave it out")
    if args.device not in ("auto", "cpu", "cuda", "mps"):
        problems.append(f"--device {args.device:.40}: expected auto, cpu, cuda or mps")
    if args.device == "mps" and not torch.backends.mps.is_available():
        problems.append("--device mps: this machine has no usable Apple GPU, leave the flag out")
    if args.device == "cuda" and not torch.cuda.is_available():
        problems.append("--device cuda: this machine has no usable CUDA device, leave the flag out")
    if problems:
        raise ValueError("; ".join(problems))
    args.device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    return args


class Start(NamedTuple):
    """What a text is made with."""

    path: Path  # of the checkpoint
    vocab: dict
    tokenizer: Tokenizer
    prompt: list[int]
    decoder: Decoder


def prepare(args: argparse.Namespace, path: Path, meta: dict) -> Start:
    """All that sampling from a checkpoint needs. Raises Unusable for what is wrong with the checkpoint."""
    vocab = meta["data"]["meta"]
    tokenizer = read_vocabulary(vocab)
    prompt = encode_prompt(tokenizer, vocab, args.prompt)
    decoder = make_decoder(path, meta, args.device, len(prompt) + args.max_tokens, not args.no_cache)
    return Start(path, vocab, tokenizer, prompt, decoder)


def generate(args: argparse.Namespace):
    """Prints the samples, and on stderr what they were made with and the rate."""
    path, vocab, tokenizer, prompt, decoder = use_newest(args.checkpoint, partial(prepare, args))
    cache = "with" if decoder.cached else "without"
    note(f"{path}: {args.device}, window {int(decoder.window)}, {cache} cache")
    given = prompt[vocab.get("eot") is not None:] if args.prompt else []
    generator, began, count = torch.Generator(args.device).manual_seed(args.seed), time.perf_counter(), 0
    for i in range(args.num_samples):
        if args.num_samples > 1:
            say(f"--- sample {i + 1} of {args.num_samples}")
        tokens = itertools.chain(given, sample(decoder, prompt, vocab, args, generator))
        write_text(tokenizer.decode_bytes([token]) for token in tokens)
        say("")
        count += decoder.text.size(1) - len(prompt) + 1  # the last one was not appended
    seconds = time.perf_counter() - began
    note(f"{count:,} tokens in {seconds:.2f} s: {count / seconds:,.1f} tokens/s")


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code."""
    def run():
        args = parse(argv)
        return converse(args) if args.interactive else generate(args)

    return guarded(run, "lower --max-tokens, or give a shorter --prompt")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
