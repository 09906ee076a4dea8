"""A small tiktoken encoding with GPT-2's pattern and end-of-text, which needs no file: 256 bytes and some merges."""
import tiktoken

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
WORDS = b" the  a in er on re ing the is at and th en or   \n    self def return import'll n't zu\xc3\xa9".split(b" ")
EOT = 50256


def ranks(order=range(255, -1, -1)) -> dict[bytes, int]:
    """The bytes in an order of their own, as GPT-2's are, and merges of two earlier tokens each."""
    made = {bytes([byte]): i for i, byte in enumerate(order)}
    for word in [b" " + word for word in WORDS] + WORDS + [b"    ", b"\n\n", b"th", b"he"]:
        for end in range(2, len(word) + 1):
            made.setdefault(word[:end], len(made))
    return made


def encoding() -> tiktoken.Encoding:
    """Of as many tokens as GPT-2's, most of which no text has."""
    special = {"<|endoftext|>": EOT}
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks(), special_tokens=special)


VOCAB = {"tokenizer": {"kind": "tiktoken", "name": "gpt2"}, "vocab_size": 50257, "eot": EOT}
