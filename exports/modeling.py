"""The model of an export, for transformers: exports/code.py writes this file behind the text of a training script.

In the place of the import from train_gpt below it puts the script's classes with all that they need, so that an export
needs no file of this project. What is defined here takes the place of what has the same name there. A row is one
document, whose logits are those of training; rows that are padded, on either side, need an attention mask.

The cache is transformers' own, a list of pairs of tensors, (B, heads, T, size) each, in the order in which a pass
asks for them: tokens and document numbers; of each layer keys before their offset, keys and values; the pointer's
keys. Shape suffixes as in the script.
"""
from __future__ import annotations

import contextvars

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from train_gpt import FP32_PARAMETERS, GPT, POINTER_BLOCK, Settings, ngram_rows, norm, rotary_table, visible

PAST = contextvars.ContextVar("PAST")  # of the pass that is under way
NOTHING = 1e-38  # of a copied token that stands nowhere: its logarithm is finite


class Past(TorchFunctionMode):
    """What earlier passes left. While it is entered, attention to new keys and values is attention to all of them."""

    def __init__(self, cache: DynamicCache | None, tokens_BT: Tensor, docs_BT: Tensor):
        super().__init__()
        self.cache, self.count = cache, 0
        kept = self.keep(tokens_BT[:, None, :, None], docs_BT[:, None, :, None])
        self.tokens, self.docs = (x[:, 0, :, 0] for x in kept)
        self.start = self.tokens.size(1) - tokens_BT.size(1)

    def keep(self, k_BHTK: Tensor, v_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Both behind those of earlier passes that were kept at the same point."""
        self.count += 1
        if self.cache is None:
            return k_BHTK, v_BHTK
        return self.cache.update(k_BHTK, v_BHTK, self.count - 1)

    def latest(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The latest tokens, their document numbers, and where the one before is of the same document, (B, T, 1)."""
        docs = self.docs[:, -count:]
        return self.tokens[:, -count:], docs, F.pad(docs[:, 1:] == docs[:, :-1], (1, 0))[..., None]

    def __enter__(self):
        self.token = PAST.set(self)
        return super().__enter__()

    def __exit__(self, *error):
        PAST.reset(self.token)
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            q, k, v, *rest = args
            args = q, *self.keep(k, v), *rest
        return function(*args, **(kwargs or {}))


# ----------------------------------------------------------------------------------------------------------------------
# Functions and methods of the scripts that look at other positions than the new ones


def dense_mask(docs_BT, window: Tensor, copies: int = 1) -> Tensor:
    """Which keys, of all, the new tokens see, (B, 1, T, all) bool; each token `copies` times."""
    docs, new = PAST.get().docs, copies * docs_BT.size(1)
    position = torch.arange(docs.size(1), device=docs.device).repeat_interleave(copies)
    docs = docs.repeat_interleave(copies, dim=1)
    return visible(position[-new:, None], position, docs[:, None, -new:, None], docs[:, None, None, :], window)


def attention_mask(docs_BT, window: Tensor | int) -> Tensor:
    """The same of train_baseline.py."""
    docs, new = PAST.get().docs, docs_BT.size(1)
    place = torch.arange(docs.size(1), device=docs.device)
    distance = place[-new:, None] - place
    return (docs[:, None, -new:, None] == docs[:, None, None, :]) & (distance >= 0) & (distance < window)


def stage_table(_) -> list:
    """Nothing: an export is not trained in stages."""
    return []


def document_positions(docs_BT) -> Tensor:
    """Place of each new token in its document, (B, T)."""
    return (PAST.get().docs.cumsum(1) - 1).clamp_min(0)[:, -docs_BT.size(1):]


def expert_product(x_RD, weight_EDF, g, impl: str) -> Tensor:
    """Of train_moe.py, each sorted row times its expert's matrix, (R, F), one expert after the other; with gradients
    of its own, where the script registers an operator."""
    ends, parts = g.ends_E.tolist(), []
    for start, end, weight in zip([0, *ends], ends, weight_EDF, strict=False):
        parts.append(x_RD[start:end] @ weight)
    parts.append(x_RD.new_zeros(len(x_RD) - ends[-1], weight_EDF.size(2)))
    return torch.cat(parts)


class Embeds:
    def embedding(self, inputs_BT, follows_BT1) -> Tensor:
        """With the two tokens before the new ones: the first may take up what is itself a pair's second."""
        tokens, _, follows = PAST.get().latest(inputs_BT.size(1) + 2)
        return super().embedding(tokens, follows)[:, -inputs_BT.size(1):]


class Finds:
    def forward(self, inputs_BT, docs_BT) -> Tensor:
        """The vectors of pairs and triples, which may begin before the new tokens."""
        tokens, docs, _ = PAST.get().latest(inputs_BT.size(1) + 2)
        rows, kinds = ngram_rows(tokens, docs, self.half)
        found = (F.embedding(rows, self.table) * self.signs[kinds]).sum(0).type_as(self.weight)
        return found.view(*tokens.shape, -1)[:, -inputs_BT.size(1):]


class Offsets:
    def offset_keys(self, k_BTHK, follows_BT11) -> Tensor:
        """With the key of the token before the new ones."""
        if not self.offset:
            return k_BTHK
        new = k_BTHK.transpose(1, 2)
        k = PAST.get().keep(new, new[..., :0])[0].transpose(1, 2)[:, -new.size(2) - 1:]
        follows = PAST.get().latest(k.size(1))[2]
        return super().offset_keys(k, follows[..., None])[:, -new.size(2):]


def with_past(model: nn.Module):
    """Gives the parts of a model the methods above."""
    parts = {"embedding": Embeds, "signs": Finds, "offset_keys": Offsets}  # by what such a part has
    for module in list(model.modules()):
        for name, mixin in parts.items():
            if hasattr(module, name):
                module.__class__ = type(type(module).__name__, (mixin, type(module)), {})


# ----------------------------------------------------------------------------------------------------------------------
# What transformers asks for


class Unplaced(TorchFunctionMode):
    """Undoes that transformers places torch.linspace on the CPU while it builds a model without memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") == "linspace":
            kwargs["device"] = torch.empty(0).device
        return function(*args, **kwargs)


class NanoSpeedrunConfig(PretrainedConfig):
    """`settings`: those of the training script; `tokens`: the vocabulary without padding; `window`: the long attention
    window, and `longer`: the two windows that YaRN stretches by, or nothing."""

    model_type = "nanospeedrun"

    def __init__(self, settings=None, tokens=256, window=1, longer=(), **more):
        self.settings, self.tokens = settings or {}, tokens
        self.window, self.longer = window, longer
        super().__init__(**more)


class NanoSpeedrunForCausalLM(PreTrainedModel, GenerationMixin):
    """A model of the training script. Logits of all columns of its head; of a model that copies, log-probabilities."""

    config_class = NanoSpeedrunConfig
    base_model_prefix = "model"
    _keep_in_fp32_modules_strict = {*FP32_PARAMETERS, "router_bias"}
    _is_stateful = True  # the cache cannot be cut: no assisted decoding
    accepts_loss_kwargs = False  # a mean: transformers' Trainer divides it by the passes that it accumulates

    def __init__(self, config: NanoSpeedrunConfig):
        super().__init__(config)
        known, random = Settings.__dataclass_fields__, torch.get_rng_state()
        given = {name: value for name, value in config.settings.items() if name in known}
        for name, value in given.items():
            given[name] = tuple(value) if isinstance(value, list) else value
        self.s = Settings(**given)
        with Unplaced():
            self.model = GPT(self.s, config.tokens)
        torch.set_rng_state(random)  # the seed of the settings is none of the caller's
        self.table = None  # of rotary angles; made when they are needed
        for module in self.model.modules():
            tables = {name for name, x in module.named_buffers(recurse=False) if x.is_floating_point()}
            module._non_persistent_buffers_set -= tables - {"cos", "sin"}  # what training keeps elsewhere
        with_past(self.model)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        """Nothing: the model has initialized itself."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, past_key_values=None, labels=None,
                use_cache: bool | None = None, logits_to_keep: int = 0, **_) -> CausalLMOutputWithPast:
        """Logits, (B, T or the last `logits_to_keep`, columns) fp32. `labels`: tokens as in `input_ids`, -100 where
        there is no loss."""
        cache = past_key_values
        if isinstance(cache, DynamicCache) and not cache.get_seq_length():
            cache.__init__()  # the caller's own, with as many layers as a pass asks for
        elif use_cache and cache is None or cache is not None and not cache.get_seq_length():
            cache = DynamicCache()
        docs_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids)
        docs_BT = docs_BT[:, -input_ids.size(1):]
        with Past(cache, input_ids, docs_BT) as past:
            self.turn_from(0 if hasattr(self.model, "positions") else past.start, past.tokens)
            window = torch.tensor(self.config.window, dtype=torch.int32, device=input_ids.device)
            x_BTD = self.model.trunk(input_ids, docs_BT, window)
            logits = self.model.head(x_BTD[:, -logits_to_keep:]).float()
            if getattr(self.model, "pointer", None) is not None:
                logits = self.mix(logits, *self.copies(norm(x_BTD), past, logits.size(1)))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten().long())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)

    def turn_from(self, start: int, tokens_BT: Tensor):
        """Gives the model its rotary tables from a position on."""
        length, device = tokens_BT.size(1), tokens_BT.device
        if self.table is None or len(self.table[0]) < length or self.table[0].device != device:
            longest = max(2 * length, self.config.window)
            table = rotary_table(longest, self.s.head_dim, self.s.rope_base, *self.config.longer)
            self.table = [x.to(device) for x in table]
        self.model.cos, self.model.sin = (x[start:] for x in self.table)

    def copies(self, x_BTD: Tensor, past: Past, last: int) -> tuple[Tensor, Tensor]:
        """Of the last positions, the pointer's attention on each token of the vocabulary, (B, last, columns), and on
        the sink, (B, last, 1)."""
        pointer = self.model.pointer
        q_BTK, k_BTK = F.linear(x_BTD, pointer.qk).chunk(2, dim=-1)
        gain, sink = pointer.small
        q_BTK = (norm(q_BTK) * (gain * len(gain) ** -0.5))[:, -last:]
        k_BTK = norm(k_BTK)[:, None]
        k_BTK = past.keep(k_BTK, k_BTK[..., :0])[0][:, 0]
        at = (past.docs.cumsum(1) - 1).clamp_min(0)  # in its document
        query, doc = at[:, -last:, None], past.docs[:, -last:, None]
        first = (query // POINTER_BLOCK - 1) * POINTER_BLOCK
        seen = (at[:, None] < query) & (at[:, None] >= first) & (past.docs[:, None] == doc)
        scores = (q_BTK @ k_BTK.mT).masked_fill(~seen, -torch.inf)
        shares = torch.cat((scores, q_BTK @ sink[:, None]), dim=-1).float().softmax(dim=-1)
        copied = shares.new_zeros(*query.shape[:2], self.config.vocab_size)
        token = past.tokens[:, None].expand_as(scores)
        return copied.scatter_add(2, token, shares[..., :-1]), shares[..., -1:]

    def mix(self, logits_BTV: Tensor, copied_BTV: Tensor, nothing_BT1: Tensor) -> Tensor:
        """Log-probabilities: log of p (1 - alpha (1 - nothing)) + alpha copied, where p is the head's without its
        class for copying, and alpha the probability of that."""
        gate = torch.tensor(self.config.tokens, device=logits_BTV.device)
        alpha = logits_BTV.softmax(-1).index_select(-1, gate)
        head = logits_BTV.index_fill(-1, gate, -torch.inf).log_softmax(-1)
        copied = (alpha * copied_BTV).clamp_min(NOTHING).log()
        return torch.logaddexp(head + torch.log1p(-alpha * (1 - nothing_BT1)), copied)
