"""Reasoning before an answer: which marks a model writes around it, and where it ends."""

from __future__ import annotations

from dataclasses import dataclass

from dsc_serve.server.tools.parts import Part, Reasoning
from dsc_serve.text.stop import StopMatcher

SPACE = " \t\n\r"


@dataclass(frozen=True)
class ReasoningForm:
    opening: str
    closing: str

    def begun_by(self, prompt: str) -> bool:
        """Whether a rendered chat ends with the opening, so that the answer begins within the reasoning."""
        return prompt.rstrip(SPACE).endswith(self.opening)


FORMS = (ReasoningForm("<think>", "</think>"), ReasoningForm("[THINK]", "[/THINK]"))


def reasoning_of(template: str) -> ReasoningForm | None:
    """The marks that a chat template has."""
    return next((form for form in FORMS if form.closing in template), None)


class ReasoningParser:
    """Cuts the reasoning from an answer's beginning. White space at both ends of it, and behind it, is left out.

    begun: the answer begins within it. Only an answer that begins with the opening has any else.
    """

    def __init__(self, form: ReasoningForm, begun: bool) -> None:
        self._form = form
        self.thinking = begun
        self.over = False
        self._held = ""
        self._end = StopMatcher([form.closing])
        self._some = self._some_after = False

    @property
    def held(self) -> int:
        """Characters of which nothing has been told yet."""
        return len(self._held) + self._end.held

    def push(self, text: str) -> tuple[list[Part], str]:
        """The reasoning that became certain, and what of the text comes after it."""
        if not self.thinking and not self.over:
            self._held += text
            start = self._held.lstrip(SPACE)
            if start.startswith(self._form.opening):
                self.thinking, self._held, text = True, "", start.removeprefix(self._form.opening)
            elif self._form.opening.startswith(start):
                return [], ""
            else:
                self.over, text, self._held = True, self._held, ""
        if self.over:
            return [], self._after(text)
        for i, char in enumerate(text):
            self._held += self._end.push(char)
            if self._end.found is not None:
                self.thinking, self.over = False, True
                parts = self._told(self._held.rstrip(SPACE))
                self._held = ""
                return parts, self._after(text[i + 1 :])
        kept = len(self._held.rstrip(SPACE))
        told, self._held = self._held[:kept], self._held[kept:]
        return self._told(told), ""

    def finish(self) -> tuple[list[Part], str]:
        """What is left where the answer ends before the reasoning does."""
        if self.over:
            return [], ""
        self.over = True
        if not self.thinking:
            return [], self._held
        return self._told((self._held + self._end.flush()).rstrip(SPACE)), ""

    def _after(self, text: str) -> str:
        if self._end.found is not None and not self._some_after:
            text = text.lstrip(SPACE)
            self._some_after = bool(text)
        return text

    def _told(self, text: str) -> list[Part]:
        if not self._some:
            text = text.lstrip(SPACE)
        self._some = self._some or bool(text)
        return [Reasoning(text)] if text else []
