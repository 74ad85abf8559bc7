"""Grammars of calls let through what the forms write with valid arguments, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest

from dsc_serve.grammars.compile import compiled
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import CallGrammar, ReasoningGrammar, StructuredOutputs, ToolGrammar

CITY = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 5}}, "required": ["city"]}
FLAG = {
    "type": "object",
    "properties": {"on": {"$ref": "#/$defs/b"}},
    "required": ["on"],
    "$defs": {"b": {"type": "boolean"}},
}
TOKENS = llguidance.LLTokenizer("byte")


def tools(*schemas: dict[str, Any], head: str = '{"name": "%s", "arguments": ') -> tuple[ToolGrammar, ...]:
    return tuple(
        ToolGrammar(head=(head % f"t{i}",), schema=json.dumps(schema), field=f"tools.{i}.function.parameters")
        for i, schema in enumerate(schemas)
    )


HERMES = CallGrammar(
    tools=tools(CITY, FLAG, head='\n{"name": "%s", "arguments": '),
    mark="<tool_call>",
    tail=("}\n</tool_call>",),
    apart="\n",
    most=3,
)
FREE = {"triggers": ("(.|\n)*<tool_call>",)}
LIST = CallGrammar(tools=tools(CITY, FLAG), mark="[TOOL_CALLS]", tail=("}",), start="[", between=", ", end="]", most=2)
BARE = CallGrammar(
    tools=tools(CITY, FLAG, head='"name": "%s", "arguments": '),
    mark="{",
    tail=("}",),
    triggers=(r"((.|\n)*\n)?[ \t]*\{",),
)
THINK = ReasoningGrammar(opening="<think>", closing="</think>", begun=False)
BEGUN = ReasoningGrammar(opening="<think>", closing="</think>", begun=True)
T0, T1 = '{"name": "t0", "arguments": {"city": "Rome"}}', '{"name": "t1", "arguments": {"on": true}}'


def hermes(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


def accepted(asked: StructuredOutputs, text: str) -> bool:
    matcher = compiled(asked, TOKENS)
    ids = list(text.encode())
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def changed(calls: CallGrammar, **fields: Any) -> CallGrammar:
    return CallGrammar(**{name: getattr(calls, name) for name in CallGrammar.__struct_fields__} | fields)


CASES: dict[str, tuple[StructuredOutputs, list[str], list[str]]] = {
    "required": (
        StructuredOutputs(calls=HERMES),
        [hermes(T0), hermes(T1), hermes(T0, T1, T0)],
        ["", "text", "x" + hermes(T0), hermes(T0) + "x", hermes(T0, T0, T0, T0), hermes(T0.replace("Rome", "Berlin")),
         hermes(T0.replace('": "R', '":"R')), hermes(T1.replace("true", "1")), hermes(T0.replace("t0", "t2")),
         hermes(T0.replace('"}}', '", "x": 1}}'))],
    ),
    "text around": (
        StructuredOutputs(calls=changed(HERMES, **FREE)),
        ["", "text", "so: " + hermes(T0) + " and\n" + hermes(T1) + "!", "<tool_cal", "{"],
        ["<tool_call>", "so: <tool_call>{}", hermes(T1.replace("true", "1"))],
    ),
    "a list": (
        StructuredOutputs(calls=LIST),
        [f"[TOOL_CALLS][{T0}]", f"[TOOL_CALLS][{T0}, {T1}]"],
        ["[TOOL_CALLS][]", f"[TOOL_CALLS][{T0}, {T1}, {T1}]", f"[TOOL_CALLS][{T0},{T1}]", T0],
    ),
    "at the beginning of a line": (
        StructuredOutputs(calls=BARE),
        ["", "a {", f"so\n{T0}", f"{T0}{T1}", f"{T0}\nok"],
        ["{", "so\n {", "\n" + T1.replace("true", "1")],
    ),
    "calls or an answer": (
        StructuredOutputs(json=json.dumps(FLAG), calls=HERMES, disable_additional_properties=True),
        [hermes(T0), '{"on": true}'],
        ["", "text", '{"on": 1}', '{"on": true}' + hermes(T0)],
    ),
    "reasoning, then calls": (
        StructuredOutputs(calls=HERMES, reasoning=THINK),
        [hermes(T0), "<think>any <tool_call> thing\n</think>\n\n" + hermes(T1), "<think></think>" + hermes(T1)],
        ["any", "<think>" + hermes(T0), "<think>a</think>b"],
    ),
    "reasoning that has begun": (
        StructuredOutputs(calls=HERMES, reasoning=BEGUN),
        ["any {\n</think>\n\n" + hermes(T1), "</think>" + hermes(T1)],
        [hermes(T0), "a</think>b"],
    ),
    "reasoning, then text around": (
        StructuredOutputs(calls=changed(HERMES, **FREE), reasoning=THINK),
        ["", "a", "<think>so <tool_call> what</think>a", "<think>a</think>\n\nb" + hermes(T0), "a " + hermes(T0)],
        ["<think>so</think><tool_call>", "a <tool_call>"],
    ),
    "reasoning, then JSON": (
        StructuredOutputs(json=json.dumps(FLAG), reasoning=THINK),
        ['<think>a {</think>\n\n{"on": true}', '{"on": true}'],
        ['{"on":true}', 'a{"on": true}', '<think>{"on": true}'],
    ),
    "reasoning, then a regex": (
        StructuredOutputs(regex="a/[bc]+", reasoning=BEGUN),
        ["x</think>a/bc", "</think>\na/b"],
        ["a/b", "x</think>ab"],
    ),
    "reasoning, then a choice": (
        StructuredOutputs(choice=("yes", "<no>"), reasoning=THINK),
        ["<think>?</think>yes", "<no>", "yes"],
        ["no", "<think>yes"],
    ),
    "reasoning, then a grammar": (
        StructuredOutputs(grammar='root ::= "a" | "b"', reasoning=BEGUN),
        ["x</think>a", "</think>\n\nb"],
        ["a", "x</think>c"],
    ),
}  # fmt: skip
EACH = [
    pytest.param(asked, text, wanted, id=f"{name}: {text!r}")
    for name, (asked, good, bad) in CASES.items()
    for wanted, texts in ((True, good), (False, bad))
    for text in texts
]


@pytest.mark.parametrize(("asked", "text", "wanted"), EACH)
def test_what_a_grammar_of_calls_lets_through(asked: StructuredOutputs, text: str, wanted: bool) -> None:
    assert accepted(asked, text) is wanted


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "object", "properties": {"a": {"type": "strin"}}}, "strin"),
        ({"type": "object", "properties": {"a": {"uniqueItems": True}}}, "uniqueItems"),
        ({"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}}, "none"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "(?=a)b"}}}, "look-around"),
    ],
)
def test_a_schema_that_cannot_be_used_is_refused_by_its_own_name(schema: dict[str, Any], words: str) -> None:
    asked = StructuredOutputs(calls=changed(HERMES, tools=tools(CITY, schema)))
    with pytest.raises(ParameterError, match=words) as caught:
        compiled(asked, TOKENS)
    assert str(caught.value).startswith("tools.1.function.parameters cannot be used: ")
    assert caught.value.field == "tools.1.function.parameters"
