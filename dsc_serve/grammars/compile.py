"""From what a client asked for to the library's matcher. Called where it can be killed: some texts take for ever."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import llguidance
from llguidance.gbnf_to_lark import gbnf_to_lark

from dsc_serve.grammars.calls import SEPARATORS, Rules, pattern, with_calls, with_reasoning
from dsc_serve.grammars.schema import FIELD, prepared, unusable, whole_regex
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs, ToolGrammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# Where it is asked for.
WHITESPACE = r" |\n[ \t]{0,20}"
APPENDED = re.compile("<state>|<non-verbose/>|<backtrace>")
NO_TEXT = "NoExtensionBias"  # the library's name of it
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
        check_tools(asked, tokens)
        raise unusable(reason(matcher.get_error()))
    check_begins(matcher)
    return matcher


def check_begins(matcher: llguidance.LLMatcher) -> None:
    """Raises ParameterError where no text follows the grammar, as of a rule that is nothing but itself."""
    if matcher.is_stopped() and not matcher.is_error():  # the empty text, and no other
        return
    allowed = any(matcher.compute_bitmask())
    if matcher.is_error() and NO_TEXT not in matcher.get_error():
        raise unusable(reason(matcher.get_error()))
    if matcher.is_error() or not allowed:
        raise unusable("no text of the model's tokens follows it")


def grammar_of(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> str:
    """The grammar in the library's form. Raises ValueError where its text cannot even be read."""
    return alone(asked, tokens) if asked.calls is None and asked.reasoning is None else composed(asked, tokens)


def composed(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> str:
    """The grammar of an answer that may have calls, or reasoning before it."""
    rules, marks = Rules(), asked.reasoning
    own: list[dict[str, object]] = []
    answer = ""
    if asked.regex is not None:
        answer = rules.terminal(pattern(whole_regex(asked.regex)))
    elif asked.choice:
        answer = rules.terminal(alternatives(asked.choice))
    elif asked.grammar is not None:
        own, answer = [{"name": "answer", "lark_grammar": lark_of(asked.grammar)}], "@answer"
    elif asked.json is not None or asked.json_object:
        (found,) = json.loads(alone(asked, tokens))["grammars"]
        answer = rules.rule("%json " + json.dumps(found["json_schema"]))
    calls = asked.calls
    text_follows = calls is not None and bool(calls.triggers)

    def whole(not_first: str = "") -> str:
        if calls is None:
            return answer
        called = with_calls(rules, calls, lambda tool: prepared_arguments(tool, tokens, asked), not_first)
        return rules.rule(f"{called} | {answer}" if answer else called)

    if marks is None:
        start = whole()
    else:
        marked = isinstance(marks.opening, str) and text_follows and not marks.begun
        after = whole()
        alone_ = whole(str(marks.opening)) if marked else after
        start = with_reasoning(rules, marks, (after, alone_), text_follows)
    return json.dumps({"grammars": [{"lark_grammar": rules.text(start)}, *own]})


def prepared_arguments(tool: ToolGrammar, tokens: llguidance.LLTokenizer, asked: StructuredOutputs) -> str:
    """A tool's schema as the library takes it. Raises ParameterError naming the tool's own field."""
    narrow = StructuredOutputs(json=tool.schema, disable_additional_properties=True)
    try:
        schema = json.loads(prepared(tool.schema, lambda value: accepts(value, tokens), narrow))
    except ParameterError as error:
        raise ParameterError(tool.field, str(error).replace(FIELD, tool.field, 1)) from None
    given = schema.get("x-guidance")
    fixed = {**SEPARATORS, "whitespace_flexible": False}
    return json.dumps({**schema, "x-guidance": {**(given if isinstance(given, dict) else {}), **fixed}})


def check_tools(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> None:
    """Of a grammar that did not compile: raises ParameterError where it is a tool's schema that does not."""
    for tool in asked.calls.tools if asked.calls is not None else ():
        grammar = llguidance.LLMatcher.grammar_from_json_schema(prepared_arguments(tool, tokens, asked))
        matcher = llguidance.LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
        if matcher.is_error():
            raise ParameterError(tool.field, f"{tool.field} cannot be used: {reason(matcher.get_error())}")


def alternatives(choice: Sequence[str]) -> str:
    # One terminal, not a rule with alternatives: thousands of choices are then matched by one automaton.
    return " | ".join(map(json.dumps, choice))


def lark_of(grammar: str) -> str:
    # GBNF's rules are told by their "::="; everything else is Lark, however its first rule is marked.
    if GBNF_RULE.search(grammar) and "%llguidance" not in grammar:
        return gbnf_to_lark(grammar)
    return grammar


def alone(asked: StructuredOutputs, tokens: llguidance.LLTokenizer) -> str:
    """The grammar of an answer that has one form."""
    if asked.regex is not None:
        return llguidance.grammar_from("regex", whole_regex(asked.regex))
    if asked.choice:
        return llguidance.grammar_from("lark", f"start: CHOICE\nCHOICE: {alternatives(asked.choice)}")
    if asked.grammar is not None:
        return llguidance.grammar_from("lark", lark_of(asked.grammar))
    schema = '{"type": "object"}' if asked.json is None else asked.json
    return json_grammar(prepared(schema, lambda value: accepts(value, tokens), asked), asked)


def json_grammar(schema: str, asked: StructuredOutputs) -> str:
    # A model that may choose white space between two tokens of JSON may never come to its end.
    spaces: JsonCompileOptions = {"whitespace_flexible": False}
    separators: JsonCompileOptions = {} if asked.disable_any_whitespace else {**SEPARATORS}
    if asked.whitespace_pattern is not None or asked.disable_any_whitespace is False:
        spaces, separators = {"whitespace_pattern": asked.whitespace_pattern or WHITESPACE}, {}
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides=spaces, defaults=separators)


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
