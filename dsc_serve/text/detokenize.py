"""Tokens to text while they are being generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence

from dsc_serve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns generated tokens into text that is certain: never half a character, never text that later changes.

    All that `push` and `flush` return, joined, is what the generated tokens add to the decoded prompt: word spaces
    between the two stay. Where the prompt ends within a character, that whole character counts as generated.
    At most 3 bytes are held back, so a push costs the same however long the text already is.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        tail = b""
        self._started = False
        for token_id in reversed(prompt):
            if tokenizer.visible(token_id, skip_special_tokens):
                self._started = True
                tail = tokenizer.token_bytes(token_id) + tail
                if len(tail) >= 3:
                    break
        self._utf8.decode(tail)

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; possibly none."""
        text = ""
        for token_id in token_ids:
            if self._started:
                text += self._utf8.decode(self._tokenizer.shown_bytes(token_id, self._skip))
            elif self._tokenizer.visible(token_id, self._skip):
                self._started = True
                text += self._utf8.decode(self._tokenizer.leading_bytes(token_id))
        return text

    def flush(self) -> str:
        """What is held back, at the end: U+FFFD where the last character is unfinished."""
        return self._utf8.decode(b"", final=True)
