"""Calls are told from text, for every form, however the text arrives."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.server.tools.form import CallForm
from dsc_serve.server.tools.parser import CallParser
from dsc_serve.server.tools.parts import CallArguments, CallStart, Content, Part, Reasoning, joined
from dsc_serve.server.tools.reader import AnswerReader
from dsc_serve.server.tools.reasoning import FORMS as REASONING
from dsc_serve.server.tools.reasoning import ReasoningParser
from dsc_serve.server.tools.registry import FORMS, chosen

NAMES = ("get_weather", "get", "find.city-2")
TEMPLATES = {
    "hermes": "{{ tools }}<tool_call>\n</tool_call>",
    "llama3": "{{ tools }}<|python_tag|>",
    "mistral": "{{ tools }}[TOOL_CALLS] [",
    "mistral, newer": "{{ tools }}[TOOL_CALLS]name[ARGS]",
    "mistral, plain": "{{ tools }}[TOOL_CALLS]' + name + arguments",
    "granite": "{{ tools }}<|tool_call|>",
    "json": "{{ messages }}",
}
MADE = {name: chosen("auto", template, ()) for name, template in TEMPLATES.items()}
every_form = pytest.mark.parametrize("form", MADE.values(), ids=MADE)
ARGUMENTS = st.dictionaries(
    st.text(max_size=4),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=8)
        | st.sampled_from(['</tool_call>{"', "}]\\", "[TOOL_CALLS]"]),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=3,
)
CALLS = st.lists(
    st.tuples(st.sampled_from(NAMES), ARGUMENTS.map(lambda value: json.dumps(value, ensure_ascii=False))),
    min_size=1,
    max_size=3,
)
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "<tool_",
            "[TOOL_CALLS]",
            "[TOOL",
            "<|tool_call|>",
            "<|python_tag|>",
            "[ARGS]",
            "[",
            "]",
            "{",
            "}",
            ",",
            ";",
            "\n",
            " ",
            '"',
            "\\",
            ":",
            "a",
            "é",
            '{"name": "',
            "get",
            "get_weather",
            "_weather",
            '{"name": "get"',
            '", "arguments": {',
            '{"name": "get", "arguments": {}}',
            '{"name": "other", "arguments": {}}',
            '"parameters": ',
            '{"arguments": {"a": 1}, "name": "get"}',
            '"x": 1',
            '{"type": "function", "name": "get"}',
            '{"name": "get", "arguments": "{}"}',
            '{"name": "get", "arguments": null}',
            '{"name": "get", "arguments": [',
        ]
    ),
    max_size=14,
).map("".join)


def read(form: CallForm, pieces: list[str]) -> list[Part]:
    parser = CallParser(form, NAMES)
    parts = [part for piece in pieces for part in parser.push(piece)]
    return nameless(joined([*parts, *parser.finish()]))


def nameless(parts: list[Part]) -> list[Part]:
    return [CallStart(part.index, "", part.name) if isinstance(part, CallStart) else part for part in parts]


def cut(data: st.DataObject, text: str) -> list[str]:
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)], strict=True)]


def calls_of(parts: list[Part]) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, CallStart):
            assert part.index == len(found)
            found.append((part.name, ""))
        elif isinstance(part, CallArguments):
            assert part.index == len(found) - 1
            found[-1] = (found[-1][0], found[-1][1] + part.text)
    return found


def text_of(parts: list[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


@every_form
@given(data=st.data(), calls=CALLS, before=st.sampled_from(["", "Let me see.\n", "\n\n", "é {\n"]))
@settings(max_examples=60, deadline=None)
def test_calls_are_found_wherever_the_text_is_cut(
    form: CallForm, data: st.DataObject, calls: list[tuple[str, str]], before: str
) -> None:
    parts = read(form, cut(data, before + form.written(calls)))
    assert calls_of(parts) == calls
    assert text_of(parts) == (before if before.strip() else "")


@every_form
@given(data=st.data(), text=FRAGMENTS)
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_the_same_wherever_it_is_cut(form: CallForm, data: st.DataObject, text: str) -> None:
    whole = read(form, [text])
    assert read(form, cut(data, text)) == whole
    if not calls_of(whole):
        assert text_of(whole) == text, "text that only looks like a call is text, to its last character"


@every_form
@given(text=FRAGMENTS, calls=CALLS)
@settings(max_examples=60, deadline=None)
def test_nothing_of_the_text_around_calls_is_lost_or_doubled(
    form: CallForm, text: str, calls: list[tuple[str, str]]
) -> None:
    """What is neither an argument nor framing comes through, in its order."""
    given_ = text + "\n" + form.written(calls) + "\nThe end of it all."
    parts = read(form, [given_])
    place = 0
    for part in parts:
        if isinstance(part, Content):
            found = given_.find(part.text, place)
            assert found >= 0, (part, given_[place:])
            place = found + len(part.text)
    assert (
        text_of(parts).count("The end of it all.")
        + sum(arguments.count("The end of it all.") for _, arguments in calls_of(parts))
        == 1
    )


LOOKALIKES = [
    "<tool_call> is a mark",
    '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
    "<tool_call>[1, 2]",
    "[TOOL_CALLS] are what?",
    '[TOOL_CALLS][{"name": "unknown", "arguments": {}}]',
    "[TOOL_CALLS]unknown{}",
    '{"name": "unknown", "arguments": {}}',
    '{"name": "get", "age": 3}x',
    "{\n  int x;\n}",
    '{"city": "get"}',
    '<|tool_call|>[{"name": "get"',
    '<|python_tag|>brave_search.call(query="x")',
    '{"name": ["get"], "arguments": {}}',
    '{"arguments": {"a": 1}, "name": "unknown"}',
    '{"type": "function"}',
    "[TOOL_CALLS]getter{}",
    "{",
    "<",
]


@every_form
@pytest.mark.parametrize("text", LOOKALIKES)
def test_text_that_merely_looks_like_a_call_stays_text(form: CallForm, text: str) -> None:
    for given_ in (text, f"Look: {text}", f"{text}\nand so on"):
        assert read(form, [given_]) == [Content(given_)]
        assert read(form, list(given_)) == [Content(given_)]


ACCEPTED = {
    "hermes": [
        '<tool_call>{"name":"get","arguments":{"a":1}}</tool_call>',
        '<tool_call>\n{"arguments": {"a": 1}, "name": "get"}\n</tool_call>',
        '<tool_call>{"name": "get", "arguments": "{\\"a\\": 1}"}</tool_call>',
        '<tool_call>{"name": "get", "arguments": {"a": 1}</tool_call>',
        '<tool_call>{"name": "get", "arguments": {"a": 1}, "id": [1]}',
        '<tool_call>{"id": 7, "name": "get", "parameters": {"a": 1}}',
    ],
    "llama3": [
        '<|python_tag|>{"name": "get", "parameters": {"a": 1}}',
        '{"type": "function", "name": "get", "parameters": {"a": 1}}',
    ],
    "mistral": ['[TOOL_CALLS] [{"name": "get", "arguments": {"a": 1}}]', '[TOOL_CALLS]get{"a": 1}'],
    "mistral, newer": [
        '[TOOL_CALLS]get[CALL_ID]123456789[ARGS]{"a": 1}',
        '[TOOL_CALLS]get {"a": 1}',
        '[TOOL_CALLS][{"name": "get", "arguments": {"a": 1}}]',
    ],
    "granite": [
        '<tool_call>[{"name": "get", "arguments": {"a": 1}}]',
        '<|tool_call|> [ {"name": "get", "arguments": {"a": 1}} ]',
    ],
    "json": ['{"name": "get", "parameters": {"a": 1}}', 'So:\n  {"name": "get", "arguments": {"a": 1}}'],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in ACCEPTED.items() for text in texts])
def test_other_spellings_of_a_call_are_calls(name: str, text: str) -> None:
    ((called, arguments),) = calls_of(read(MADE[name], list(text)))
    assert (called, json.loads(arguments)) == ("get", {"a": 1})


@every_form
def test_a_call_that_has_begun_stays_one_and_is_counted_where_it_is_malformed(form: CallForm) -> None:
    text = form.written([("get", '{"a": 1,, }')])
    parser = CallParser(form, NAMES)
    parts = joined([*parser.push(text), *parser.finish()])
    assert calls_of(parts) == [("get", '{"a": 1,, }')]
    assert (parser.count, parser.malformed) == (1, 1)
    cut_off = CallParser(form, NAMES)
    parts = joined([*cut_off.push(text[: text.index(",,")]), *cut_off.finish()])
    assert calls_of(parts) == [("get", '{"a": 1')]
    assert cut_off.malformed == 1


@every_form
def test_one_call_is_all_where_no_more_may_be(form: CallForm) -> None:
    parser = CallParser(form, NAMES, most=1)
    parts = joined([*parser.push(form.written([("get", "{}"), ("get", '{"a": 1}')]) + " more"), *parser.finish()])
    assert calls_of(parts) == [("get", "{}")] and text_of(parts) == ""
    assert parser.done


def test_reading_takes_time_by_the_length_alone() -> None:
    """A mark in every place, each of which opens an object that never becomes a call."""
    for form in MADE.values():
        for text in (
            "<tool_call>{" * 4_000,
            '{"arguments": {"' * 3_000,
            '\n{"name": "get' * 3_000,
            "[TOOL_CALLS]get" * 3_000,
        ):
            assert text_of(read(form, [text])) == text


@pytest.mark.parametrize("marks", REASONING, ids=lambda marks: marks.opening)
@given(data=st.data(), begun=st.booleans(), end=st.booleans())
@settings(max_examples=60, deadline=None)
def test_reasoning_is_split_wherever_the_text_is_cut(
    marks: object, data: st.DataObject, begun: bool, end: bool
) -> None:
    form = next(form for form in REASONING if form is marks)
    calls = [("get", '{"a": 1}')]
    thought = data.draw(
        st.sampled_from(
            ["", "I think.", 'Maybe <tool_call>{"name": "get", "arguments": {}}\n', "a < b\n\nc", form.closing[:-1]]
        )
    )
    rest = data.draw(st.sampled_from(["", "Yes.", "Yes.\n" + MADE["hermes"].written(calls), form.opening]))
    text = ("" if begun else f"\n{form.opening}") + f"\n{thought}" + (f"\n{form.closing}\n\n{rest}" if end else "")
    reader = AnswerReader(ReasoningParser(form, begun), CallParser(MADE["hermes"], NAMES))
    parts = [part for piece in cut(data, text) for part in reader.push(piece)]
    parts = joined([*parts, *reader.finish()])
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    assert reasoning == thought.strip()
    assert calls_of(parts) == (calls if end and "<tool_call>" in rest else [])
    assert text_of(parts) == (re.sub("<tool_call>(.|\n)*", "", rest) if end else "")


def test_an_answer_that_does_not_begin_with_the_mark_has_no_reasoning() -> None:
    reader = AnswerReader(ReasoningParser(REASONING[0], False), None)
    text = "It is <think>not</think> so."
    assert joined([*(part for char in text for part in reader.push(char)), *reader.finish()]) == [Content(text)]


def test_the_form_is_told_by_the_template_and_then_by_the_tokens() -> None:
    assert {name: form.name for name, form in MADE.items()} == {name: name.partition(",")[0] for name in TEMPLATES}
    assert chosen("auto", "", ["<|python_tag|>"]).name == "llama3"
    assert chosen("auto", "<tool_call></tool_call>", ["<|tool_call|>", "[TOOL_CALLS]"]).name == "hermes"
    assert chosen("auto", "", ()).name == "json"
    assert [chosen(name, "", ()).name for name in FORMS] == list(FORMS)
