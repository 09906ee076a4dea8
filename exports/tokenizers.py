"""A data set's tokenizer as one that transformers loads without a network and without code."""
from __future__ import annotations

from pathlib import Path

from data.common import EOT_TEXT, CharTokenizer, load_tokenizer, read_json, write_json

PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # bytes that are letters


def byte_letters() -> dict[int, str]:
    """The letter that stands for a byte in a tokenizer.json: itself, or the next one from 256 on that is free."""
    others = [byte for byte in range(256) if byte not in PRINTABLE]
    letters = {byte: chr(byte) for byte in PRINTABLE}
    return letters | {byte: chr(256 + i) for i, byte in enumerate(others)}


def halves(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two tokens that a token is merged from: what remains of its bytes if only earlier merges are done."""
    parts, own = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        merged = [ranks.get(a + b, own) for a, b in zip(parts, parts[1:], strict=False)]
        at = merged.index(min(merged))
        if merged[at] >= own:
            raise ValueError(f"token {token!r} of rank {own} is not merged from two earlier ones")
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def byte_pairs(encoding, size: int, special: dict[str, int]):
    """tokenizers.Tokenizer of a tiktoken encoding, for its first `size` tokens. Its pattern must be GPT-2's, or take a
    text as a whole (the byte tokenizer). `special`: tokens that no text has, of other numbers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    letters, ranks = byte_letters(), encoding._mergeable_ranks

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    ordered = sorted((token for token in ranks if ranks[token] < size), key=ranks.get)
    merges = [tuple(map(spelled, halves(token, ranks))) for token in ordered if len(token) > 1]
    numbers = {spelled(token): ranks[token] for token in ordered} | special
    tokenizer = Tokenizer(models.BPE(numbers, merges))
    gpt2 = len(ranks) > 256
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=gpt2)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def characters(chars: str):
    """tokenizers.Tokenizer of single characters; leaves out those that it does not know."""
    from tokenizers import Tokenizer, decoders, models
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(chars)}, []))
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def write_tokenizer(folder: Path, vocab: dict, longest: int):
    """transformers' tokenizer of a data set's meta.json; it puts eot before a text, as documents have it in training.

    Raises ValueError for a vocabulary that cannot be written so, RuntimeError if tiktoken's files are not at hand."""
    from tokenizers import AddedToken, processors
    from transformers import PreTrainedTokenizerFast
    own, eot, names = load_tokenizer(vocab), vocab.get("eot"), {}
    if isinstance(own, CharTokenizer):
        tokenizer = characters(own.chars)
    else:
        special = {} if eot is None else {EOT_TEXT: eot}
        tokenizer = byte_pairs(own.encoding, vocab["vocab_size"], special)
    if eot is not None:
        if isinstance(own, CharTokenizer) or eot in own.encoding._mergeable_ranks.values():
            raise ValueError(f"the end-of-text of the data, {eot}, is a token of its texts as well")
        tokenizer.add_special_tokens([AddedToken(EOT_TEXT, special=True, normalized=False)])
        single = f"{EOT_TEXT}:0 $A:0"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=single, pair=f"{single} $B:1", special_tokens=[(EOT_TEXT, eot)])
        names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), EOT_TEXT)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, clean_up_tokenization_spaces=False,
        padding_side="left", **names).save_pretrained(folder)
    path = folder / "tokenizer_config.json"  # with the name that transformers 4 knows, too
    write_json(path, read_json(path) | {"tokenizer_class": "PreTrainedTokenizerFast"})
