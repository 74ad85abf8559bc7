"""Special tokens that the texts of a chat spell, kept from being read as the marks of its template.

Before a chat is rendered, what its texts spell is replaced by words that nobody knows. The special tokens of the
rendered text are then the template's own; what stands between two of them is encoded without looking for any.
"""

from __future__ import annotations

import re
from typing import TypeVar, cast
from uuid import uuid4

import tokenizers

from dsc_serve.text.tokenizer import Tokenizer, TokenizerError

PROBES = ("x", " x", "x y\n", "X1")

T = TypeVar("T")


class Spelling:
    """Does nothing unless `escape`. Raises TokenizerError where it could not encode a text as the tokenizer would."""

    def __init__(self, tokenizer: Tokenizer | None, escape: bool) -> None:
        self._tokenizer = tokenizer
        self._marks: list[str] = []
        if tokenizer is None or not escape:
            return
        self._marks = sorted(tokenizer.special_texts, key=len, reverse=True)
        self._word = uuid4().hex
        self._spelled = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self._hidden = re.compile(self._word + r"x([0-9]+)x")
        self._plain = tokenizers.Tokenizer.from_str(tokenizer.to_json())
        self._plain.encode_special_tokens = True
        for mark in self._marks:
            for probe in PROBES:
                if tokenizer.encode_chat(mark + probe) != [*tokenizer.encode_chat(mark), *self._encode_plain(probe)]:
                    raise TokenizerError(f"texts cannot be encoded apart from the special token {mark!r} before them")

    def hidden(self, value: T) -> T:
        """A JSON value in whose texts no special token is spelled any more."""
        if not self._marks:
            return value
        if isinstance(value, str):
            text = self._spelled.sub(lambda found: f"{self._word}x{self._marks.index(found[0])}x", value)
            return cast(T, text)
        if isinstance(value, list | tuple):
            return cast(T, type(value)(self.hidden(item) for item in value))
        if isinstance(value, dict):
            return cast(T, {self.hidden(key): self.hidden(item) for key, item in value.items()})
        return value

    def shown(self, text: str) -> str:
        """A text with what was hidden in it."""
        if not self._marks:
            return text
        return self._hidden.sub(lambda found: self._marks[int(found[1])], text)

    def encode_chat(self, rendered: str) -> list[int]:
        """As `Tokenizer.encode_chat`, with what was hidden encoded as text."""
        assert self._tokenizer is not None
        if not self._marks or self._word not in rendered:
            return self._tokenizer.encode_chat(rendered)
        ids: list[int] = []
        done = start = 0
        ends = [found.span() for found in self._spelled.finditer(rendered)]
        for first, last in (*ends, (len(rendered), len(rendered))):
            if self._word in rendered[start:first]:
                if done < start:
                    ids += self._tokenizer.encode_chat(rendered[done:start])
                ids += self._encode_plain(self.shown(rendered[start:first]))
                done = first
            start = last
        return ids + (self._tokenizer.encode_chat(rendered[done:]) if done < len(rendered) else [])

    def _encode_plain(self, text: str) -> list[int]:
        (encoding,) = self._plain.encode_batch([text], add_special_tokens=False)
        ids: list[int] = encoding.ids
        return ids
