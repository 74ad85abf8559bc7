"""JSON schemas: what the library is not exact on is drawn in, and what cannot be kept is refused by name."""

from __future__ import annotations

import json
from decimal import Decimal
from functools import cache
from typing import Any

import llguidance
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsc_serve.grammars.compile import compiled
from dsc_serve.grammars.schema import LARGEST
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs

Schema = dict[str, Any]


@cache
def single_bytes() -> llguidance.LLTokenizer:
    return llguidance.LLTokenizer("byte")


class Accepting:
    """What one schema lets through."""

    def __init__(self, schema: Schema, **fields: bool) -> None:
        asked = StructuredOutputs(json=json.dumps(schema), whitespace_pattern=" ", **fields)
        self._matcher = compiled(asked, single_bytes())

    def __call__(self, text: str) -> bool:
        matcher, ids = self._matcher.deep_copy(), list(text.encode())
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def within(schema: Schema, value: Decimal) -> bool:
    tests = {
        "minimum": lambda bound: value >= bound,
        "maximum": lambda bound: value <= bound,
        "exclusiveMinimum": lambda bound: value > bound,
        "exclusiveMaximum": lambda bound: value < bound,
    }
    return all(test(Decimal(str(schema[name]))) for name, test in tests.items() if name in schema)


ROUND = st.sampled_from([0, 1, -1, 0.25, -0.25, 0.5, 1.5, -1.5, 10, 0.1, 1e-5, 100, -100, 2.5, 1e6])
BOUNDS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
        ROUND | st.floats(-1e4, 1e4, width=16) | st.integers(-1000, 1000),
    ),
)


def spellings(value: Decimal) -> list[str]:
    plain = f"{value:f}"
    return [
        plain,
        f"-{plain}" if value == 0 else plain,
        plain if "." in plain else f"{plain}.0",
        f"{plain}0" * ("." in plain),
    ]


@settings(deadline=None, max_examples=300)
@given(bounds=BOUNDS, others=st.lists(st.decimals(-200, 200, places=3), max_size=5), joined=st.booleans())
def test_numbers_keep_their_bounds(bounds: Schema, others: list[Decimal], joined: bool) -> None:
    schema = {"type": "number", **bounds}
    if joined and len(bounds) > 1:  # the same, in two schemas that hold together
        first, *rest = bounds.items()
        schema = {"type": "number", "allOf": [dict([first])], **dict(rest)}
    try:
        accepts = Accepting(schema)
    except ParameterError as error:
        assert "nsatisfiable" in str(error) or "greater" in str(error) or "number range" in str(error)
        return
    near = [Decimal(str(bound)) + step for bound in bounds.values() for step in map(Decimal, ("0", "0.001", "-0.001"))]
    for value in (*near, *others, Decimal(0)):
        for text in filter(None, spellings(value)):
            assert not accepts(text) or within(bounds, value), (schema, text)


def test_a_share_between_0_and_1_can_be_told() -> None:
    for schema in ({"exclusiveMinimum": 0, "maximum": 0.25}, {"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}):
        accepts = Accepting({"type": "number", **schema})
        assert accepts("0.20") and accepts("0.001") and not accepts("0") and not accepts("-0") and not accepts("0.0")


WIDE = st.integers(-(2**63), 2**63 - 1) | st.sampled_from(
    [2**53, 2**53 + 1, -(2**53) - 1, 2**62 + 1, 2**63 - 1, -(2**63)]
)


@settings(deadline=None, max_examples=100)
@given(low=st.none() | WIDE, high=st.none() | WIDE, nullable=st.booleans())
def test_integers_keep_bounds_of_64_bits(low: int | None, high: int | None, nullable: bool) -> None:
    assume(low is None or high is None or low <= high)
    schema: Schema = {"type": ["integer", "null"] if nullable else "integer"}
    schema |= {} if low is None else {"minimum": low}
    schema |= {} if high is None else {"maximum": high}
    try:
        accepts = Accepting(schema)
    except ParameterError as error:
        # Only between numbers that are closer than float64 tells apart, or beyond its last below 2^63.
        assert "no integer that can be kept" in str(error)
        assert min(abs(value) for value in (low, high) if value is not None) > 2**53
        return
    for bound, outward in ((low, -1), (high, 1)):
        if bound is None:
            continue
        for step in (1, 2, 1023, 1024, 5000):
            assert not accepts(str(bound + outward * step)), (schema, bound + outward * step)
        inside = bound - outward * 2048  # the numbers that are left out lie nearer than that
        if abs(inside) <= LARGEST and within(schema, Decimal(inside)):
            assert accepts(str(inside)), (schema, inside)
    assert accepts("null") == nullable


def test_the_bounds_of_64_bits_may_be_given() -> None:
    accepts = Accepting({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1})
    assert accepts("0") and accepts(str(LARGEST)) and accepts(str(-LARGEST)) and not accepts(str(2**63))
    accepts = Accepting({"type": "integer", "minimum": 0, "maximum": 2**64 - 1})
    assert accepts("0") and accepts(str(LARGEST)) and not accepts(str(2**64)) and not accepts("-1")


@pytest.mark.parametrize("format", ["path", "binary", "password", "uuid4", "ipv4network", "json-pointer", "my-own"])
def test_formats_that_nobody_knows_are_annotations(format: str) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": format}}, "required": ["format"]}
    assert Accepting(schema)('{"format":"anything"}')


def test_formats_that_are_known_hold() -> None:
    accepts = Accepting({"type": "string", "format": "date"})
    assert accepts('"2026-11-28"') and not accepts('"tomorrow"')


def test_what_a_schema_only_quotes_is_left_alone() -> None:
    accepts = Accepting({"const": {"format": "path", "uniqueItems": True, "maximum": 2**60}})
    assert accepts(json.dumps({"format": "path", "uniqueItems": True, "maximum": 2**60}, separators=(",", ":")))


@pytest.mark.parametrize(
    "harmless", [{"uniqueItems": False}, {"propertyNames": {}}, {"propertyNames": {"type": "string"}}], ids=str
)
def test_what_asks_for_nothing_is_let_through(harmless: Schema) -> None:
    assert Accepting({"items": {"type": "integer"}, **harmless})("[1,1]")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"properties": {"a": {"items": {}, "uniqueItems": True}}}, "uniqueItems"),
        ({"type": "object", "propertyNames": {"pattern": "^a"}}, "propertyNames"),
        ({"properties": {"ab": {}}, "patternProperties": {"^a": {"type": "integer"}}}, "patternProperties.*'ab'"),
        ({"anyOf": [{"properties": {"xab": {}}, "patternProperties": {"a": {}}}]}, "patternProperties.*'xab'"),
        ({"allOf": [{"properties": {"ab": {}}}, {"patternProperties": {"^a": {}}}]}, "patternProperties.*'ab'"),
        ({"patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "string"}}}, "disjoint"),
        ({"contains": {}}, "contains"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"minimum": 10**400}, "number"),
        ({"enum": [1, -(2**63)]}, "enum.*last digit"),
        ({"const": 2**53 + 1}, "const.*9007199254740993"),
        ({"properties": {"a": {"const": [{"b": -(2**70)}]}}}, "const.*last digit"),
    ],
    ids=str,
)
def test_what_cannot_be_kept_is_refused_by_name(schema: Schema, words: str) -> None:
    with pytest.raises(ParameterError, match=words) as error:
        Accepting(schema)
    assert error.value.field == "structured_outputs" and "\n" not in str(error.value)


def test_names_beside_patterns_that_do_not_hold_for_them() -> None:
    accepts = Accepting(
        {
            "type": "object",
            "properties": {"b": {"type": "string"}},
            "patternProperties": {"^a[0-9]$": {"type": "integer"}},
            "additionalProperties": False,
        }
    )
    assert accepts('{"b":"x","a1":1}') and not accepts('{"a1":"x"}')


def test_other_properties_may_be_ruled_out_for_all_objects() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "object", "properties": {"b": {}}}, "o": {"additionalProperties": True}},
        "$defs": {"unused": {"properties": {}}},
    }
    assert Accepting(schema)('{"a":{"c":1},"d":2}')
    strict = Accepting(schema, disable_additional_properties=True)
    assert strict('{"a":{"b":1}}') and strict('{"o":{"x":1}}')
    assert not strict('{"a":{"c":1}}') and not strict('{"d":2}')
