"""JSON schemas as the grammar library can keep them, or a refusal that names what cannot be kept.

The library (llguidance 1.9) is exact on most of JSON Schema. What it is not exact on is rewritten here so that every
text it lets through is valid: bounds are drawn in to numbers that it holds exactly, never out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from typing import Any

from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs

FIELD = "structured_outputs"
Schema = dict[str, Any]
Accepts = Callable[[tuple[str, str]], bool]  # a schema and a text: whether the library lets it through

# Formats that the library keeps; JSON Schema calls all others annotations, which change nothing.
FORMATS = frozenset(
    ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri", "unknown"]
)
# Where schemas stand within a schema.
ONE = ("additionalProperties", "additionalItems", "items", "not", "if", "then", "else", "contains", "propertyNames")
MANY = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
JOINS = ("allOf", "$ref")  # what holds together with what stands beside it
LOWER, UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
BOUNDS = (*LOWER, *UPPER)
EXACT = 2**53  # integers up to here are exact as the library holds bounds, which is in float64
LARGEST = 2**63 - 1024  # of float64 below 2^63
LONE_BACKSLASH = re.compile(r"(?<!\\)(?:\\\\)*\\\Z")
GUIDANCE = ("item_separator", "key_separator", "coerce_one_of", "lenient")  # what a schema may say to the library
ANY_NAME: tuple[Any, ...] = ({}, True, {"type": "string"})


def prepared(text: str, accepts: Accepts, asked: StructuredOutputs) -> str:
    """The schema to give to the library. Raises ValueError and ParameterError, naming the keyword."""
    try:
        schema = json.loads(text, parse_float=Literal)
    except json.JSONDecodeError:
        return text  # the library says what is wrong
    if not isinstance(schema, dict):
        return text  # the library says what is wrong
    check_guidance(schema.get("x-guidance", {}))
    inner = list(schemas(schema))
    joined = any(name in found for found in inner for name in JOINS)
    for found in inner:
        annotate(found)
        if asked.disable_additional_properties and "properties" in found:
            found.setdefault("additionalProperties", False)
    check_names(inner, joined, accepts)
    for found in inner:
        bound(found, joined)
    return json.dumps(schema, allow_nan=False)


class Literal(float):
    """A number of the schema with the digits that it was written with."""

    def __new__(cls, digits: str) -> Literal:
        number = super().__new__(cls, digits)
        number.digits = digits
        return number

    digits: str


def schemas(schema: Any) -> Iterator[Schema]:
    """The schema and all within it, the inner ones first."""
    if not isinstance(schema, dict):
        return
    for name, value in schema.items():
        within: list[Any] = []
        if name in ONE and isinstance(value, dict):
            within = [value]
        elif name in MANY and isinstance(value, list):
            within = value
        elif name in NAMED and isinstance(value, dict):
            within = list(value.values())
        for inner in within:
            yield from schemas(inner)
    yield schema


def check_guidance(given: Any) -> None:
    """Raises ParameterError for what the library would not heed."""
    wrong = None if isinstance(given, dict) else str(given)[:60]
    wrong = next((name for name in given if name not in GUIDANCE), None) if isinstance(given, dict) else wrong
    if wrong is not None:
        raise unusable(f"x-guidance has {wrong!r}; it must be an object with these names: {', '.join(GUIDANCE)}")


def annotate(schema: Schema) -> None:
    """Drop what changes nothing, refuse what the library would not enforce."""
    patterns = schema.get("patternProperties")
    for regex in (schema.get("pattern"), *(patterns if isinstance(patterns, dict) else ())):
        if isinstance(regex, str):
            whole_regex(regex)
    if isinstance(schema.get("format"), str) and schema["format"] not in FORMATS:
        del schema["format"]
    if schema.get("uniqueItems") is False:
        del schema["uniqueItems"]
    if schema.get("propertyNames", False) in ANY_NAME:
        del schema["propertyNames"]
    for name in ("const", "enum"):
        for value in integers(schema.get(name)):
            if abs(value) > LARGEST or int(float(value)) != value:
                raise unusable(f"{name} holds {str(value)[:60]}, which cannot be kept to its last digit")
    for name, what in (("uniqueItems", "that items differ"), ("propertyNames", "what names look like")):
        if name in schema:
            raise unusable(f"{name} asks for {what}, which no grammar can keep; leave it out")


def integers(value: Any) -> Iterator[int]:
    """All within a value."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from integers(inner)
    elif isinstance(value, int):
        yield value


def check_names(inner: list[Schema], joined: bool, accepts: Accepts) -> None:
    """Refuse names for which a property and a pattern both hold: the library lets them begin and not go on."""
    groups = [(found, found) for found in inner]
    if joined:
        groups = [(one, other) for one in inner for other in inner if "patternProperties" in other]
    for named, patterned in groups:
        names, patterns = named.get("properties"), patterned.get("patternProperties")
        if not isinstance(names, dict) or not isinstance(patterns, dict):
            continue
        for pattern in patterns:
            shape = json.dumps({"type": "string", "pattern": pattern})
            for name in names:
                if accepts((shape, json.dumps(name, ensure_ascii=False))):
                    raise unusable(
                        f"patternProperties has {pattern!r}, which also holds for the property {name!r}; "
                        "both at once cannot be kept: leave the one out"
                    )


def bound(schema: Schema, joined: bool) -> None:
    """Draw a schema's bounds of numbers in to what the library holds exactly."""
    given = {name: exact(schema[name]) for name in BOUNDS if is_number(schema.get(name))}
    if not given:
        return
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if isinstance(kinds, list) and "number" not in kinds and "integer" in kinds:
        bound_integers(schema, given)
    else:
        bound_numbers(schema, given, joined)


def bound_numbers(schema: Schema, given: dict[str, Decimal], joined: bool) -> None:
    low = max((given[name] for name in LOWER if name in given), default=None)
    high = min((given[name] for name in UPPER if name in given), default=None)
    room = None if low is None or high is None else high - low
    for name, value in given.items():
        up = name in LOWER
        drawn = drawn_in(value, up)
        close = joined if room is None else room < 1
        if name.startswith("exclusive") and close and value == value.to_integral_value():
            # Where the other bound lies within 1, the library lets the integer itself through.
            step = 1e-9 if room is None or room <= 0 else min(1e-9, float(room) * 1e-6)
            near = drawn + step if up else drawn - step
            if near == drawn:
                near = math.nextafter(drawn, math.inf if up else -math.inf)
            del schema[name]
            name, drawn = ("minimum", near) if up else ("maximum", near)
            if name in given:
                drawn = max(drawn, drawn_in(given[name], up)) if up else min(drawn, drawn_in(given[name], up))
        schema[name] = drawn


def bound_integers(schema: Schema, given: dict[str, Decimal]) -> None:
    lows = [math.ceil(given["minimum"])] if "minimum" in given else []
    lows += [math.floor(given["exclusiveMinimum"]) + 1] if "exclusiveMinimum" in given else []
    highs = [math.floor(given["maximum"])] if "maximum" in given else []
    highs += [math.ceil(given["exclusiveMaximum"]) - 1] if "exclusiveMaximum" in given else []
    if all(abs(value) <= EXACT for value in (*lows, *highs)):
        return
    least, most = max(lows, default=-LARGEST), min(highs, default=LARGEST)
    low, high = whole(least, up=True), whole(most, up=False)
    if low > high or least > LARGEST or most < -LARGEST:
        bounds = ", ".join(f"{name} {value}" for name, value in given.items())
        raise unusable(f"no integer that can be kept lies within {bounds}; they reach to ±{LARGEST}")
    for name in given:
        del schema[name]
    schema |= {"minimum": low, "maximum": high}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def exact(value: float | int) -> Decimal:
    number = Decimal(value.digits if isinstance(value, Literal) else value)
    if not math.isfinite(float(number)):
        raise unusable(f"the number {str(value)[:60]} is too large for a bound")
    return number


def drawn_in(value: Decimal, up: bool) -> float:
    """The nearest number whose shortest digits, which the library goes by, are not outside of the bound."""
    near = float(value)
    while (Decimal(repr(near)) < value) if up else (Decimal(repr(near)) > value):
        near = math.nextafter(near, math.inf if up else -math.inf)
    return near


def whole(value: int, up: bool) -> int:
    """The nearest integer that the library holds exactly and that is not outside of a bound."""
    near = min(max(value, -LARGEST), LARGEST)
    held = float(near)
    if (held < near) if up else (held > near):
        held = math.nextafter(held, math.inf if up else -math.inf)
    return int(held)


def unusable(why: str) -> ParameterError:
    return ParameterError(FIELD, f"{FIELD} cannot be used: {why}")


def whole_regex(regex: str) -> str:
    """Raises ParameterError where it ends with a backslash that escapes nothing: the library drops it unsaid."""
    if LONE_BACKSLASH.search(regex):
        raise unusable(f"the regex {regex[:60]!r} ends with a backslash that escapes nothing; write two for one")
    return regex
