"""A tokenizer for models of random weights: as large as their vocabulary, byte-level, of made-up words."""

from __future__ import annotations

import itertools
import json
import string
from collections.abc import Iterator
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.text.tokenizer import CONFIG_FILE, TOKENIZER_FILE

END = "<|endoftext|>"


def made_up_tokens(count: int) -> Iterator[tuple[str, tuple[str, str] | None]]:
    """`count` tokens of a byte-level BPE, each with the pair that it merges: bytes, then ever longer runs of letters,
    with and without a space before them."""
    letters = string.ascii_lowercase
    known = sorted(pre_tokenizers.ByteLevel.alphabet())

    def runs() -> Iterator[tuple[str, tuple[str, str] | None]]:
        yield from ((char, None) for char in known)
        for length in itertools.count(1):
            for start in ("Ġ", ""):
                if not start and length == 1:
                    continue
                for word in itertools.product(letters, repeat=length):
                    token = start + "".join(word)
                    yield token, (token[:-1], token[-1])

    return itertools.islice(runs(), count)


def made_up_tokenizer(vocab_size: int) -> tokenizers.Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, the end of a text among them as token 0."""
    tokens = list(made_up_tokens(vocab_size - 1))
    vocabulary = {END: 0} | {token: i for i, (token, _) in enumerate(tokens, 1)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [pair for _, pair in tokens if pair is not None]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END])
    return backend


def save_tokenizer(vocab_size: int, folder: Path) -> None:
    """The made-up tokenizer in the ecosystem's two files."""
    made_up_tokenizer(vocab_size).save(str(folder / TOKENIZER_FILE))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "bos_token": END}
    (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
