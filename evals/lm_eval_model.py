"""Checkpoints of this project in EleutherAI's lm-evaluation-harness, as its model `nanospeedrun`.

    python evals/lm_eval_model.py --model nanospeedrun --model_args checkpoint=logs/mine --tasks hellaswag,piqa

This is the command `lm_eval` with our model in its list; all its flags are the harness's own (pip install lm_eval). The
released harness (0.4.13) looks for models in its own package only, --include_path is for tasks: so the command
`lm_eval` cannot find ours; its model `hf` reads an export (docs/export.md). --model_args, separated by commas:

    checkpoint   folder of a checkpoint, or of a run or experiment: its newest (default: logs)
    max_length   longest text in tokens (default: the longest of training or validation); others lose their start

Every text is a document and begins with end-of-text, as in training; where there is no such token, one without context
begins with a newline. Weights are fp32, the logits are those of generate.py: copies are mixed in, routers have no
noise. Texts are generated greedily, or as a task says with do_sample, temperature and top_k.
"""
from __future__ import annotations

import copy
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import generate  # noqa: E402
from data.common import Tokenizer  # noqa: E402
from export import longest_text  # noqa: E402
from generate import Decoder, choose, load_model, note, read_vocabulary  # noqa: E402
from train_gpt import norm  # noqa: E402

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError:
    if __name__ == "__main__":
        sys.exit("error: the harness is not here: pip install lm_eval")
    raise

ROWS = 8  # texts of a forward pass


class Loaded(NamedTuple):
    """A checkpoint that is ready to score texts."""

    path: Path
    model: nn.Module
    window: int
    cacheable: bool
    vocab: dict
    tokenizer: Tokenizer
    longest: int  # tokens


def load(max_length: int, path: Path, meta: dict) -> Loaded:
    """Raises Unusable for what is wrong with the checkpoint, ValueError for more tokens than it has positions."""
    script, vocab = generate.import_script(meta.get("script")), meta["data"]["meta"]
    tokenizer = read_vocabulary(vocab)
    model, window = load_model(script, path, meta, longest=1)
    longest = max_length or longest_text(generate.read_settings(script, meta["settings"]), model)
    model, window = load_model(script, path, meta, longest=longest)
    return Loaded(path, model, window, generate.not_cacheable(script, model) is None, vocab, tokenizer, longest)


@register_model("nanospeedrun")
class NanoSpeedrun(TemplateLM):
    """A checkpoint; its texts are documents."""

    def __init__(self, checkpoint: str = "logs", max_length: int = 0, batch_size: int | str | None = None,
                 device: str | None = None, **unknown):
        super().__init__()
        unknown = sorted(unknown.keys() - {"max_batch_size"})
        if unknown:
            raise ValueError(f"--model_args: nanospeedrun knows checkpoint and max_length, not {', '.join(unknown)}")
        if not isinstance(max_length, int) or not 0 <= max_length <= 2**15:
            raise ValueError(f"--model_args max_length={max_length!s:.20}: expected a number from 1 to 32768")
        self.rows = int(batch_size) if str(batch_size).isdigit() and int(batch_size) > 1 else ROWS
        self.loaded = generate.use_newest(Path(checkpoint), partial(load, max_length))
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"--device {device}: this machine has no usable CUDA device, leave the flag out")
        self.loaded.model.to(self._device)
        self.plain = Decoder(self.loaded.model, self.loaded.window, self.loaded.longest, cached=False)
        self.fast = None  # with a cache, in a copy of the model: made when a text is generated
        note(f"{self.loaded.path}: {self._device}, window {self.loaded.window}, texts of {self.loaded.longest} tokens")

    @property
    def eot_token_id(self) -> int | None:
        return self.loaded.vocab.get("eot")

    @property
    def prefix_token_id(self) -> int:
        return generate.encode_prompt(self.loaded.tokenizer, self.loaded.vocab, "")[0]

    @property
    def tokenizer_name(self) -> str:
        return str(self.loaded.vocab["tokenizer"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Tokens of a text, without end-of-text."""
        return self.loaded.tokenizer.encode(string)

    def document(self, tokens: list[int]) -> list[int]:
        """With end-of-text before them, where there is one."""
        return tokens if self.eot_token_id is None else [self.eot_token_id, *tokens]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """The whole text is tokenized, then cut, as the harness does it for all its models."""
        before, after = super()._encode_pair(context, continuation)
        return self.document(before), after

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **_) -> list[tuple[float, bool]]:
        """Of each continuation its log-likelihood, and whether each of its tokens is the likeliest."""
        texts = [(before + after)[-self.loaded.longest - 1:] for _, before, after in requests]
        order, answers = sorted(range(len(texts)), key=lambda i: -len(texts[i])), {}
        for first in tqdm(range(0, len(order), self.rows), disable=disable_tqdm, desc="nanospeedrun"):
            chosen = order[first:first + self.rows]
            counts = [min(len(requests[i][2]), len(texts[i]) - 1) for i in chosen]
            found = self.score([texts[i] for i in chosen], counts)
            answers |= zip(chosen, found, strict=True)
        for i, (names, *_) in enumerate(requests):
            if names is not None:
                self.cache_hook.add_partial("loglikelihood", names, answers[i])
        return [answers[i] for i in range(len(texts))]

    @torch.inference_mode()
    def score(self, texts: list[list[int]], counts: list[int]) -> list[tuple[float, bool]]:
        """Of the last `counts` tokens of texts: summed log-probabilities, and whether each is the likeliest."""
        longest = max(map(len, texts)) - 1
        batch = torch.zeros(2, len(texts), longest, dtype=torch.long)
        for row, text in enumerate(texts):
            batch[0, row, :len(text) - 1] = torch.tensor(text[:-1])
            batch[1, row, len(text) - 1:] = 1  # a document of its own
        inputs_BT, docs_BT = batch.to(self._device)
        x_BTD = self.plain.model.trunk(inputs_BT, docs_BT, self.plain.window)
        answers = []
        for x_TD, text, count in zip(x_BTD, texts, counts, strict=True):
            last = range(len(text) - 1 - count, len(text) - 1)
            target_N = torch.tensor(text[len(text) - count:], device=self._device)
            logits_NV = self.logits(x_TD[None, :len(text) - 1], text[:-1], last)
            found_N = logits_NV.log_softmax(-1).gather(1, target_N[:, None])
            likeliest_N = logits_NV[:, :self.loaded.vocab["vocab_size"]].argmax(-1)
            answers.append((float(found_N.double().sum()), bool((likeliest_N == target_N).all())))
        return answers

    def logits(self, x_1TD: Tensor, text: list[int], positions: range) -> Tensor:
        """Logits after the last positions of a text, (N, columns) fp32; of a model that copies log-probabilities."""
        logits_NV = self.plain.model.head(x_1TD[:, positions.start:])[0].float()
        if self.plain.pointer is None:
            return logits_NV
        normed_TD, tokens, rows = norm(x_1TD[0]), torch.tensor([text], device=self._device), []
        for position, logits_V in zip(positions, logits_NV, strict=True):
            self.plain.text, self.plain.start = tokens[:, :position + 1], 0
            rows.append(self.plain.mix(logits_V, *self.plain.point(normed_TD[:position + 1])))
        # what the padding of the head has of the probability stays in the sum
        rows = torch.stack(rows)
        rest = torch.log1p(-rows.exp().sum(-1, keepdim=True).clamp_max(1 - 1e-7))
        return torch.cat((rows, rest), dim=-1)

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the longest text."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="nanospeedrun"):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.loaded.longest, context_len=1)
            parts = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(parts, disable_tqdm=True)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, found[-1])
        return found

    def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
        """Texts after contexts, up to the first stop, which is left out, end-of-text, or the number of tokens."""
        found = []
        for request in tqdm(requests, disable=disable_tqdm, desc="nanospeedrun"):
            context, options = request.args
            found.append(self.continuation(context, normalize_gen_kwargs(options)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def continuation(self, context: str, options: dict) -> str:
        """One generated text."""
        if self.fast is None:
            model = copy.deepcopy(self.loaded.model)
            self.fast = Decoder(model, self.loaded.window, self.loaded.longest, self.loaded.cacheable)
            self.random = torch.Generator(self._device).manual_seed(0)
        most = min(options["max_gen_toks"], self.loaded.longest - 1)
        new = self.document(self.tok_encode(context))[-(self.loaded.longest - most):] or [self.prefix_token_id]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample") else 0.0
        stops, tokens, text = [stop for stop in options["until"] if stop], [], ""
        self.fast.restart()
        while len(tokens) < most and not any(stop in text for stop in stops):
            logits_V = self.fast(new)[:self.loaded.vocab["vocab_size"]]
            token = choose(logits_V, temperature, int(options.get("top_k") or 0), self.random)
            if token == self.eot_token_id:
                break
            tokens, new = [*tokens, token], [token]
            text = self.loaded.tokenizer.decode(tokens)
        return text[:min([text.index(stop) for stop in stops if stop in text], default=len(text))]


def main() -> int:
    """The harness's own command line -> exit code."""
    from lm_eval.__main__ import cli_evaluate
    return generate.guarded(cli_evaluate, "use a smaller max_length or --batch_size")


if __name__ == "__main__":
    sys.exit(main())
