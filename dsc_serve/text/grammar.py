"""Structured outputs: grammars over one tokenizer's tokens. Free of torch."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

import llguidance
import numpy as np
from numpy.typing import NDArray

from dsc_serve.sampling_params import ParameterError, StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

FIELD = "structured_outputs"
KEPT_GRAMMARS = 32
# A model that may put any amount of white space between two tokens of JSON may never come to its end.
WHITESPACE = r" |\n[ \t]{0,20}"
APPENDED = re.compile("<state>|<non-verbose/>|<backtrace>")
# Each item is compared with all others of its place: at the default of 50,000 a grammar of two thousand characters can
# hold a step up for many seconds. Schemas that keep below the library's 2,000 items in a place need far fewer.
LIMITS = llguidance.LLParserLimits(verbose_errors=False, step_max_items=5000)


class GrammarStuckError(RuntimeError):
    """A grammar that cannot go on: too complex for its limits, or without a token that the model has."""


class Vocabulary:
    """A tokenizer as llguidance wants it, with one token more, `end`, that stands for the end of the text."""

    def __init__(self, tokenizer: Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = size
        self.bos_token_id = None
        self.tokens = [tokenizer.token_bytes(token) for token in range(size)] + [b"<end>"]
        self.special_token_ids = [*(token for token in range(size) if tokenizer.is_special(token)), size]

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)


class Constraint:
    """How far one request's output has come in its grammar. It catches up by itself with the tokens it is shown."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, ends: Sequence[int]) -> None:
        self._matcher, self._vocab_size, self._ends = matcher, vocab_size, list(ends)
        self._seen = 0

    def complete(self, tokens: Sequence[int], start: int) -> bool:
        """Whether nothing may follow the output, which is `tokens` from `start` on."""
        self._advance(tokens, start)
        return bool(self._matcher.is_stopped() and not self._matcher.is_error())

    def allowed(self, tokens: Sequence[int], start: int) -> NDArray[np.bool_]:
        """The tokens that may follow the output, bool [vocabulary]. Raises GrammarStuckError."""
        self._advance(tokens, start)
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise GrammarStuckError(f"{FIELD} cannot be followed further: {reason(self._matcher.get_error())}")
        marks = np.unpackbits(bits, count=self._vocab_size + 1, bitorder="little").view(np.bool_)
        allowed = marks[:-1]
        allowed[self._ends] = marks[-1]
        if not allowed.any():
            raise GrammarStuckError(f"{FIELD} cannot be followed further: no token of the model fits")
        return allowed

    def _advance(self, tokens: Sequence[int], start: int) -> None:
        for token in tokens[start + self._seen :]:
            self._matcher.consume_token(token)
            self._seen += 1


class Grammars:
    """Compiles structured outputs for one tokenizer and a model's vocabulary, and keeps those used last.

    ends: the tokens that end the model's texts; allowed where the grammar is fulfilled, and nowhere else.
    Safe to call from several threads: compiling, which may take up to a second, lets the others run.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: Sequence[int] = ()) -> None:
        self._tokenizer, self._vocab_size, self._ends = tokenizer, vocab_size, tuple(ends)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[StructuredOutputs, llguidance.LLMatcher] = OrderedDict()

    def constraint(self, asked: StructuredOutputs) -> Constraint:
        """The state at the start of an output. Raises ParameterError when the grammar cannot be used."""
        matcher = self._kept.pop(asked, None)
        if matcher is None:
            matcher = self._compile(asked)
        self._kept[asked] = matcher
        while len(self._kept) > KEPT_GRAMMARS:
            self._kept.popitem(last=False)
        return Constraint(matcher.deep_copy(), self._vocab_size, self._ends)

    def _compile(self, asked: StructuredOutputs) -> llguidance.LLMatcher:
        if not self._tokenizer.local:
            message = f"{FIELD} cannot be used: with this model's tokenizer a token's text depends on those around it"
            raise ParameterError(FIELD, message)
        if self._vocabulary is None:
            vocabulary = llguidance.TokenizerWrapper(Vocabulary(self._tokenizer, self._vocab_size))
            self._vocabulary = llguidance.LLTokenizer(vocabulary, n_vocab=self._vocab_size + 1)
        try:
            matcher = llguidance.LLMatcher(self._vocabulary, grammar_of(asked), log_level=0, limits=LIMITS)
        except ValueError as error:
            raise ParameterError(FIELD, f"{FIELD} cannot be used: {reason(str(error))}") from None
        if matcher.is_error():
            raise ParameterError(FIELD, f"{FIELD} cannot be used: {reason(matcher.get_error())}")
        return matcher


def grammar_of(asked: StructuredOutputs) -> str:
    """The grammar in llguidance's form. Raises ValueError where its text cannot even be read."""
    if asked.regex is not None:
        return llguidance.grammar_from("regex", asked.regex)
    if asked.choice:
        # One terminal, not a rule with alternatives: thousands of choices are then matched by one automaton.
        return llguidance.grammar_from("lark", f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, asked.choice))}")
    if asked.grammar is not None:
        return llguidance.grammar_from("grammar", asked.grammar)
    spaces: JsonCompileOptions = {"whitespace_pattern": asked.whitespace_pattern or WHITESPACE}
    if asked.disable_any_whitespace:
        spaces = {"whitespace_flexible": False}
    schema = '{"type": "object"}' if asked.json is None else asked.json
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=spaces)


def reason(text: str) -> str:
    """The library's message in one line, without the state and the stack that it appends."""
    return " ".join(APPENDED.split(text, 1)[0].split())
