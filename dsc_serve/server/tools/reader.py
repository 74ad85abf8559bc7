"""Reads one answer as it comes: its reasoning, its text and its calls."""

from __future__ import annotations

from dsc_serve.server.tools.parser import CallParser
from dsc_serve.server.tools.parts import Content, Part, joined
from dsc_serve.server.tools.reasoning import ReasoningParser


class AnswerReader:
    """Either parser may be missing. Calls within the reasoning are none.

    reasoning_tokens: those of the answer that came while it was reasoning.
    """

    def __init__(self, reasoning: ReasoningParser | None, calls: CallParser | None) -> None:
        self._reasoning, self._calls = reasoning, calls
        self.reasoning_tokens = 0

    @property
    def calls(self) -> int:
        return 0 if self._calls is None else self._calls.count

    @property
    def malformed(self) -> int:
        """Calls whose arguments are no JSON object."""
        return 0 if self._calls is None else self._calls.malformed

    @property
    def held(self) -> int:
        """Characters of the text so far that no part has been made of yet; all before them are parts, or left out."""
        return sum(parser.held for parser in (self._reasoning, self._calls) if parser is not None)

    @property
    def done(self) -> bool:
        """Whether there are all the calls that there may be."""
        return self._calls is not None and self._calls.done

    def push(self, text: str, tokens: int = 0) -> list[Part]:
        """What became certain with this text, which so many tokens brought."""
        if self._reasoning is None:
            return self._after(text)
        if self._reasoning.thinking:
            self.reasoning_tokens += tokens
        parts, rest = self._reasoning.push(text)
        return [*parts, *self._after(rest)] if rest else parts

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        rest = ""
        if self._reasoning is not None:
            parts, rest = self._reasoning.finish()
        parts = [*parts, *self._after(rest)]
        return joined(parts if self._calls is None else [*parts, *self._calls.finish()])

    def _after(self, text: str) -> list[Part]:
        if self._calls is not None:
            return self._calls.push(text)
        return [Content(text)] if text else []
