"""From what a client asked for to the library's matcher. Called where it can be killed: some texts take for ever."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from dsc_serve.grammars.schema import prepared, unusable
from dsc_serve.sampling_params import ParameterError, StructuredOutputs

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# A model that may put any amount of white space between two tokens of JSON may never come to its end.
WHITESPACE = r" |\n[ \t]{0,20}"
APPENDED = re.compile("<state>|<non-verbose/>|<backtrace>")
GBNF_RULE = re.compile(r"^[ \t]*[A-Za-z][A-Za-z0-9_-]*[ \t]*::=", re.MULTILINE)
# Each item is compared with all others of its place: at the default of 50,000 a grammar of two thousand characters can
# take many seconds for a token. Schemas that keep below the library's 2,000 items in a place need far fewer.
LIMITS = llguidance.LLParserLimits(verbose_errors=False, step_max_items=5000)


def compiled(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> llguidance.LLMatcher:
    """The matcher at the start of an output. Raises ParameterError when the grammar cannot be used."""
    try:
        matcher = llguidance.LLMatcher(tokens, grammar_of(asked, tokens), log_level=0, limits=LIMITS)
    except (ParameterError, MemoryError):
        raise
    except RecursionError:
        raise unusable("it nests too deeply") from None
    except Exception as error:
        raise unusable(reason(str(error))) from None
    if matcher.is_error():
        raise unusable(reason(matcher.get_error()))
    return matcher


def grammar_of(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> str:
    """The grammar in the library's form. Raises ValueError where its text cannot even be read."""
    if asked.regex is not None:
        return llguidance.grammar_from("regex", asked.regex)
    if asked.choice:
        # One terminal, not a rule with alternatives: thousands of choices are then matched by one automaton.
        return llguidance.grammar_from("lark", f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, asked.choice))}")
    if asked.grammar is not None:
        # GBNF's rules are told by their "::="; everything else is Lark, however its first rule is marked.
        if GBNF_RULE.search(asked.grammar) and "%llguidance" not in asked.grammar:
            return llguidance.grammar_from("lark", gbnf_to_lark(asked.grammar))
        return llguidance.grammar_from("lark", asked.grammar)
    schema = '{"type": "object"}' if asked.json is None else asked.json
    return json_grammar(prepared(schema, lambda value: accepts(value, tokens), asked), asked)


def json_grammar(schema: str, asked: StructuredOutputs) -> str:
    spaces: JsonCompileOptions = {"whitespace_pattern": asked.whitespace_pattern or WHITESPACE}
    if asked.disable_any_whitespace:
        spaces = {"whitespace_flexible": False}
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=spaces)


def accepts(probe: tuple[str, str], tokens: llguidance.LLTokenizer) -> bool:
    """Whether a schema lets this text through, as the library reads it."""
    schema, text = probe
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema)
    matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    ids = tokens.greedy_tokenize(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def reason(text: str) -> str:
    """The library's message in one line, without the state and the stack that it appends."""
    return " ".join(APPENDED.split(text, 1)[0].split())
