"""Tokens to text while they are being generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence, Set

from dsc_serve.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Turns generated tokens into text that is certain: never half a character, never text that later changes.

    All that `push` and `flush` return, joined, is what the generated tokens add to the decoded prompt: word spaces
    between the two stay. Where the prompt ends within a character, or within what the decoder turns into something
    else, all of that counts as generated.
    At most 3 bytes are held back and a push costs the same however long the text already is, unless the tokenizer's
    decoder looks across tokens: then also what its steps may still change. shown: special tokens that are not skipped.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        skip_special_tokens: bool = True,
        shown: Set[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._skip, self._shown = skip_special_tokens, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoding = tokenizer.decoding()
        tail, read = b"", 0
        for token_id in prompt:
            if self._decoding.context_free:
                break
            read += 1
            if tokenizer.visible(token_id, skip_special_tokens):
                tail += self._decoding.push(token_id)
        self._utf8.decode(tail[-3:] + self._tail(prompt, read))
        # What the prompt would end with is no news, should it come out as it is.
        self._told, self._waiting = self._decoding.ending(), b""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that became certain with these tokens; possibly none."""
        text = ""
        for token_id in token_ids:
            if self._decoding.context_free:
                skip = self._skip and token_id not in self._shown
                text += self._utf8.decode(self._tokenizer.shown_bytes(token_id, skip))
            elif self._tokenizer.visible(token_id, self._skip and token_id not in self._shown):
                text += self._utf8.decode(self._news(self._decoding.push(token_id)))
        return text

    def flush(self) -> str:
        """What is held back, at the end: U+FFFD where the last character is unfinished."""
        return self._utf8.decode(self._news(self._decoding.ending()), final=True)

    def _tail(self, prompt: Sequence[int], start: int) -> bytes:
        """The last bytes of the prompt's tokens from `start` on: 3, or all that there are."""
        tail = b""
        for i in range(len(prompt) - 1, start - 1, -1):
            if len(tail) >= 3:
                break
            tail = self._tokenizer.shown_bytes(prompt[i], self._skip) + tail
        return tail[-3:]

    def _news(self, piece: bytes) -> bytes:
        """What of the bytes that came out is not what the prompt would have ended with."""
        if not self._told:
            return piece
        self._waiting += piece
        waiting, told = self._waiting, self._told
        if len(waiting) < len(told) and told.startswith(waiting):
            return b""
        self._told = b""
        if not waiting.startswith(told):
            return waiting
        self._utf8.decode(told)  # it may end within a character
        return waiting[len(told) :]
