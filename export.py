"""Export a checkpoint for Hugging Face's transformers: weights, tokenizer, modeling code and model card in a folder.

    python export.py --checkpoint logs/mine --out hf                         # the newest checkpoint of that run
    python export.py --checkpoint logs/mine --out hf --push NAME/REPO        # and to the hub, after `hf auth login`

    AutoModelForCausalLM.from_pretrained("hf", trust_remote_code=True)       # needs no file of this project

The GPT-2 of train_baseline.py becomes transformers' own GPT2LMHeadModel, its Llama-like model LlamaForCausalLM (with
--qk-norm Qwen3ForCausalLM): no code, no trust_remote_code. All else brings a file with the model's part of the training
script, as it is here, and with exports/modeling.py behind it. The folder appears when it is whole, and when what
transformers loads from it has the checkpoint's losses. docs/export.md
"""
from __future__ import annotations

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports: no traceback

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shutil
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.common import advice, write_json
from exports.code import modeling_code
from exports.tokenizers import write_tokenizer
from exports.twins import twin
from generate import (
    Parser,
    guarded,
    import_script,
    load_model,
    note,
    read_settings,
    read_vocabulary,
    say,
    target_losses,
    use_newest,
)
from train_gpt import bits_per_byte, printable

MODELING = "modeling_nanospeedrun"
CLASSES = {"AutoConfig": "NanoSpeedrunConfig", "AutoModelForCausalLM": "NanoSpeedrunForCausalLM"}
TRIED = 64  # tokens whose losses are compared
TOLERANCE = 1e-4  # nats, of a token
NEEDED = ("transformers", "tokenizers", "safetensors")
UNTOLD = (  # settings that may name paths
    "preset", "experiment_name", "log_dir", "resume", "allow_change", "data")

# ----------------------------------------------------------------------------------------------------------------------
# Model -> files


def longest_text(s, model: nn.Module) -> int:
    """Tokens of the longest document that the model was trained or evaluated with, or has positions for."""
    if getattr(model, "positions", None) is not None:
        return len(model.positions.weight)
    rows, pieces = ((x if isinstance(x, tuple) else (x,)) for x in (s.seq_len, s.max_doc_len))
    return max(*(pieces if all(pieces) else rows), s.eval_seq_len)


def own_weights(model: nn.Module) -> dict[str, Tensor]:
    """All weights, and of the buffers those that nothing computes anew, by their names in exports/modeling.py."""
    named = dict(model.named_parameters(remove_duplicate=False))
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and name not in ("cos", "sin"):
            named[name] = buffer
    return {f"model.{name}": x for name, x in named.items()}


def own_config(s, model: nn.Module, code: str, vocab_size: int, windows: tuple[int, int]) -> dict:
    """config.json of a model with code: for loading it, and sizes by the names that tools look for."""
    fields = set(re.findall(r"^    (\w+): ", code, re.M))
    told = {name: value for name, value in dataclasses.asdict(s).items() if name in fields - {*UNTOLD}}
    window, longer = windows
    return dict(
        architectures=[CLASSES["AutoModelForCausalLM"]],
        model_type="nanospeedrun",
        auto_map={key: f"{MODELING}.{name}" for key, name in CLASSES.items()},
        settings=told, tokens=vocab_size, window=longer or window,
        longer=(window, longer) if longer else (),
        vocab_size=len(model.embed.weight), hidden_size=s.width,
        num_hidden_layers=s.num_layers, num_attention_heads=s.width // s.head_dim,
        head_dim=s.head_dim, max_position_embeddings=longest_text(s, model),
        tie_word_embeddings=False)


def write_model(folder: Path, script: ModuleType, s, model: nn.Module, meta: dict, window: int) -> str:
    """The files that a model consists of; the name of its class."""
    from safetensors.torch import save_file
    vocab, padded = meta["data"]["meta"], len(model.embed.weight)
    same = twin(s, model, getattr(script, "NORM_EPS", 0.0))
    if same is None:
        longer = getattr(s, "eval_window", 0)
        if longer:
            window = script.window_at(s, script.stage_table(s), meta["step"])
        code = modeling_code(script)
        (folder / f"{MODELING}.py").write_text(code, encoding="utf-8")
        config = own_config(s, model, code, vocab["vocab_size"], (window, longer))
        name, weights = config["architectures"][0], own_weights(model)
    else:
        name, config, weights = same
    ends = {f"{kind}_token_id": vocab.get("eot") for kind in ("bos", "eos", "pad")}
    write_json(folder / "config.json", config | ends | {"dtype": "float32"})
    padding = [*range(vocab["vocab_size"], padded)]  # columns that are no token
    write_json(folder / "generation_config.json", ends | {"suppress_tokens": padding or None})
    dense = torch.contiguous_format
    tensors = {key: x.detach().clone(memory_format=dense) for key, x in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@torch.no_grad()
def largest_difference(folder: Path, model: nn.Module, vocab_size: int, window: int, longest: int) -> float:
    """Between the losses of random tokens, one document, by the checkpoint and by what transformers loads; nats."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    random, count = torch.Generator().manual_seed(0), min(TRIED, longest, len(model.cos))
    tokens = torch.randint(vocab_size, (1, count + 1), generator=random)
    batch = torch.stack((tokens[:, :-1], tokens[:, 1:], torch.zeros_like(tokens[:, 1:]))).int()
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    logits = loaded.eval()(tokens[:, :-1]).logits[0].float()
    found = F.cross_entropy(logits, tokens[0, 1:], reduction="none")
    return float((found - target_losses(model, batch, window, count)).abs().max())


# ----------------------------------------------------------------------------------------------------------------------
# Model card


def trained_tokens(script: ModuleType, s, step: int) -> int:
    """Tokens of the first `step` steps."""
    if not hasattr(script, "stage_table"):
        return step * s.batch_tokens
    return sum(max(0, min(step, t.end) - t.start) * t.batch_tokens for t in script.stage_table(s))


def facts(script: ModuleType, s, model: nn.Module, meta: dict, name: str) -> dict[str, str]:
    """What the model card says of a model and its training, row by row."""
    data, loss = meta["data"]["meta"], meta.get("val_loss")
    validated = "not known"
    if loss is not None:
        bits = bits_per_byte(loss, data)
        validated = f"{loss:.4f} nats per token" + (f", {bits:.4f} bits per byte" if bits else "")
        validated += f", after step {meta.get('val_step')}"
    git = meta.get("git") or {}
    tokenizer = {key: value for key, value in data["tokenizer"].items() if key != "chars"}
    return {
        "class": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "trained by": f"{meta['script']} of nanospeedrun, commit {git.get('commit')}",
        "steps": f"{meta['step']:,} of {s.iterations:,}",
        "tokens": f"{trained_tokens(script, s, meta['step']):,}",
        "training time": f"{meta['train_time_ms'] / 1000:,.1f} s",
        "validation loss": validated,
        "data": str(data.get("name")),
        "source of the data": str(data.get("source")),
        "data made with": str(data.get("made_with", "not known")),
        "tokenizer": str(tokenizer)}


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: {licence}
tags: [nanospeedrun]
---

# {title}

{rows}

## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "{folder}"  # or the name of this repository on the hub
tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
print(pipeline("text-generation", model=model, tokenizer=tokenizer)({prompt!r}, max_new_tokens=50))
```

A row is one document{start}. Longer texts than
{longest:,} tokens were never seen in training. Logits have {columns:,} columns, of which the first {tokens:,} are
tokens; the others pad the head and belong to its softmax.{mixture} Weights are fp32.

## Licence

The code is under the MIT licence of nanospeedrun, the weights under the licence above, chosen by who exported them.
The data has terms of its own, see its source.

## Settings

Those that differ from the defaults of {script}:

```
{settings}
```
"""


def changed_settings(script: ModuleType, meta: dict) -> str:
    """Those that differ from the script's defaults, one a line."""
    plain, lines = vars(script.Settings()), []
    for name, value in meta["settings"].items():
        value = tuple(value) if isinstance(value, list) else value
        if name in plain.keys() - {*UNTOLD} and value != plain[name]:
            lines.append(printable(f"{name}: {value}"))
    return "\n".join(lines)


def card(script: ModuleType, s, model: nn.Module, meta: dict, name: str, args) -> str:
    """README.md of an export."""
    vocab, title = meta["data"]["meta"], args.push or args.out.name
    rows = ["| what | value |", "|---|---|"]
    for key, value in facts(script, s, model, meta, name).items():
        rows.append(f"| {key} | {printable(value).replace('|', ' ')} |")
    prompt, start, mixture = "\n", "", ""
    if vocab.get("eot") is not None:
        prompt = ""
        start = "; its first token is end-of-text, which the tokenizer puts there, as in training"
    if getattr(model, "pointer", None) is not None:
        mixture = " They are the log-probabilities of the head mixed with what the model copies."
    own = name == CLASSES["AutoModelForCausalLM"]
    return CARD.format(
        licence=args.licence, title=title, rows="\n".join(rows), folder=title,
        trust=", trust_remote_code=True" if own else "", prompt=prompt, start=start,
        longest=longest_text(s, model), columns=len(model.embed.weight),
        tokens=vocab["vocab_size"], mixture=mixture, script=meta["script"],
        settings=changed_settings(script, meta))


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def missing_packages() -> list[str]:
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Checked arguments. Raises ValueError or RuntimeError in a sentence."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--checkpoint", type=Path, default=Path("logs"), metavar="PATH",
                        help="folder of a checkpoint, or of a run or experiment: its newest (default: newest in logs)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new folder for the export")
    parser.add_argument("--push", default="", metavar="REPO", help="upload to NAME/REPO of the hub, too")
    parser.add_argument("--private", action="store_true", help="with --push: a repository that only you see, if new")
    parser.add_argument("--licence", "--license", default="mit", metavar="X",
                        help="of the weights, as the hub writes it (default: mit, that of the code)")
    args = parser.parse_args(argv)
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ValueError(f"--out {args.out}: it is there and not empty, choose another folder or remove it")
    if args.private and not args.push:
        raise ValueError("--private: has no effect without --push NAME/REPO, leave it out")
    if args.push and not re.fullmatch(r"[\w.-]+/[\w.-]+", args.push):
        raise ValueError(f"--push {args.push:.80}: expected NAME/REPO, as in the address of the repository")
    if not re.fullmatch(r"[\w.-]+", args.licence):
        raise ValueError(f"--licence {args.licence:.80}: expected a word such as mit, apache-2.0, cc-by-4.0, other")
    if missing := missing_packages():
        raise RuntimeError(f"an export needs {', '.join(missing)}: pip install {' '.join(missing)}")
    return args


def write_export(args: argparse.Namespace, folder: Path, path: Path, meta: dict) -> str:
    """All files of an export; what to say of it. Raises Unusable for what is wrong with the checkpoint."""
    vocab, script = meta["data"]["meta"], import_script(meta.get("script"))
    read_vocabulary(vocab)
    model, window = load_model(script, path, meta, longest=1)
    with contextlib.redirect_stderr(None):  # load_model has told
        s = read_settings(script, meta["settings"])
    for old in folder.iterdir():  # of a checkpoint that was no good
        old.unlink()
    name, longest = write_model(folder, script, s, model, meta, window), longest_text(s, model)
    write_tokenizer(folder, vocab, longest)
    (folder / "README.md").write_text(card(script, s, model, meta, name, args), encoding="utf-8")
    difference = largest_difference(folder, model, vocab["vocab_size"], window, longest)
    if not difference <= TOLERANCE:
        raise RuntimeError(f"what transformers loads differs from {path} by {difference:.2g} nats for a token, at most "
                           f"{TOLERANCE:g} is rounding: nothing is exported; if {meta['script']} has changed, "
                           "exports/modeling.py must follow")
    return f"{path}: {name}, losses within {difference:.1g} nats of the checkpoint's"


def push(args: argparse.Namespace):
    """Uploads the folder. Raises RuntimeError in a sentence."""
    import huggingface_hub
    try:
        api = huggingface_hub.HfApi()
        api.create_repo(args.push, private=args.private, exist_ok=True)
        api.upload_folder(repo_id=args.push, folder_path=args.out, commit_message="Export of nanospeedrun")
    except Exception as error:  # noqa: BLE001 - of the hub, its transport and its token, without a common base
        reason = " ".join(str(error).split()) or repr(error)
        raise RuntimeError(f"{args.out} is whole, but cannot be pushed to {args.push} ({reason:.200}): log in with "
                           f"hf auth login, then hf upload {args.push} {args.out}") from error


def export(args: argparse.Namespace):
    """Writes the folder, beside its place first, and pushes it."""
    out = args.out.absolute()
    folder = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        folder.mkdir(parents=True)
        told = use_newest(args.checkpoint, partial(write_export, args, folder))
        if out.exists():
            out.rmdir()
        os.replace(folder, out)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:  # no checkpoint
            raise
        raise OSError(f"cannot write {args.out}: {error.strerror or error}{advice(error)}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    note(told)
    if args.push:
        push(args)
    say(f"{args.out}{f', https://huggingface.co/{args.push}' if args.push else ''}")


def main(argv: list[str] | None = None) -> int:
    """Command line -> exit code."""
    return guarded(lambda: export(parse(argv)), "an export takes twice the memory of the weights")


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(main())
