"""Filling in the middle: what stands before a gap and what behind it, as one prompt, with the tokenizer's marks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc_serve.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class FillForm:
    """The marks that a family of models was trained with."""

    prefix: str
    suffix: str
    middle: str = ""  # "" where the gap needs none
    suffix_first: bool = False  # what stands behind the gap comes first


FORMS = {
    "qwen": FillForm("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    "starcoder": FillForm("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "santacoder": FillForm("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),
    "codellama": FillForm("▁<PRE>", "▁<SUF>", "▁<MID>"),
    "deepseek": FillForm("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
    "glm": FillForm("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),
    "codestral": FillForm("[PREFIX]", "[SUFFIX]", suffix_first=True),
}


@dataclass(frozen=True)
class Fill:
    """Marks as token ids."""

    prefix: int
    suffix: int
    middle: int | None
    suffix_first: bool
    start: tuple[int, ...]  # what a prompt begins with

    def prompt(self, before: Sequence[int], after: Sequence[int]) -> list[int]:
        """The prompt whose continuation belongs between two runs of tokens."""
        first, second = [self.prefix, *before], [self.suffix, *after]
        parts = [*second, *first] if self.suffix_first else [*first, *second]
        return [*self.start, *parts, *(() if self.middle is None else (self.middle,))]


def fill_of(tokenizer: Tokenizer) -> Fill | None:
    """How to fill in the middle with this tokenizer; None where it has the marks of no known form."""
    for form in FORMS.values():
        ids = [tokenizer.token_id(mark) for mark in (form.prefix, form.suffix)]
        middle = tokenizer.token_id(form.middle) if form.middle else None
        if None not in ids and (middle is not None or not form.middle):
            prefix, suffix = (id for id in ids if id is not None)
            return Fill(prefix, suffix, middle, form.suffix_first, tuple(tokenizer.frame[0]))
    return None
