"""A tokenizer as the grammar library wants it: texts in the middle of others, of ordinary tokens alone."""

from __future__ import annotations

import json
from functools import cached_property
from typing import Any

import tokenizers
from tokenizers import models

from dsc_serve.text.tokenizer import Tokenizer

# What puts a space before a text, by the type of the step: fields to set. None: the step is left out.
PREFIXING: dict[str, dict[str, object] | None] = {
    "Prepend": None,
    "Metaspace": {"prepend_scheme": "never", "add_prefix_space": False},
    "ByteLevel": {"add_prefix_space": False},
}


class Vocabulary:
    """The tokens of a model, with one more, `end`, that stands for the end of the text.

    Calling it encodes a text as it is written within an answer: without the space that some tokenizers put before every
    text, without marks around it, and with the text of a special token spelled in ordinary ones.
    """

    def __init__(self, backend: tokenizers.Tokenizer, size: int) -> None:
        tokenizer = Tokenizer(backend)
        self._backend = within(backend)
        self.eos_token_id = size
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)] + [b"<end>"]
        self._special = {token for token in range(size) if tokenizer.is_special(token)} | {size}
        self.special_token_ids = sorted(self._special)

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode()
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        wanted = text.encode()
        if self._special.isdisjoint(ids) and b"".join(self.tokens[i] for i in ids if i < len(self.tokens)) == wanted:
            return ids
        return self._longest_first(wanted)  # the tokenizer changes texts: no token that it gives may be another's

    def _longest_first(self, text: bytes) -> list[int]:
        ids, start = [], 0
        while start < len(text):
            for end in range(min(len(text), start + self._longest), start, -1):
                token = self._by_bytes.get(text[start:end])
                if token is not None:
                    ids.append(token)
                    start = end
                    break
            else:
                return ids  # no token begins so: the library goes on by itself from here
        return ids

    @cached_property
    def _by_bytes(self) -> dict[bytes, int]:
        return {token: i for i, token in enumerate(self.tokens) if token and i not in self._special}

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self._by_bytes), default=0)


def within(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The tokenizer, changed in place to encode texts as they stand within others."""
    backend.encode_special_tokens = True
    steps = {name: unprefixed(state(getattr(backend, name))) for name in ("normalizer", "pre_tokenizer")}
    empty = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    made = tokenizers.Tokenizer.from_str(json.dumps({**empty, **steps}))
    for name in steps:
        setattr(backend, name, getattr(made, name))
    return backend


def state(step: Any) -> dict[str, Any] | None:
    return None if step is None else json.loads(step.__getstate__())


def unprefixed(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normalising or splitting step without what puts a space before a text."""
    if step is None or (step["type"] in PREFIXING and PREFIXING[step["type"]] is None):
        return None
    changed = {name: value for name, value in (PREFIXING.get(step["type"]) or {}).items() if name in step}
    step = {**step, **changed}
    for name in ("normalizers", "pretokenizers"):
        if name in step:
            step[name] = [kept for inner in step[name] if (kept := unprefixed(inner)) is not None]
    return step
