"""Grammars: whatever is drawn among the allowed tokens, the text is of the wanted form."""

from __future__ import annotations

import json
import re

import llguidance
import numpy as np
import pytest
from grammars.conftest import END
from grammars.drawing import answered, written
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.grammars.compile import compiled
from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import ReasoningGrammar, StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
@pytest.mark.parametrize(
    "pattern", ["[0-9]{3}-[0-9]{4}", "(yes|no)[.!]{0,3}", r"[^\x00-\x7f]{1,4}", "x|", r"a/b\\[\"']\n"]
)
def test_a_regex_matches_the_whole_text(grammars: Grammars, tokenizer: Tokenizer, pattern: str, seed: int) -> None:
    assert re.fullmatch(pattern, written(grammars, tokenizer, StructuredOutputs(regex=pattern), seed))


texts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(choices=st.lists(texts, min_size=1, max_size=5), seed=st.integers(0, 2**32))
def test_a_choice_is_one_of_the_choices(
    grammars: Grammars, tokenizer: Tokenizer, choices: list[str], seed: int
) -> None:
    assert written(grammars, tokenizer, StructuredOutputs(choice=tuple(choices)), seed) in choices


def test_thousands_of_choices_may_be_given(grammars: Grammars, tokenizer: Tokenizer) -> None:
    choices = tuple(f"choice {i}" for i in range(9000))
    assert written(grammars, tokenizer, StructuredOutputs(choice=choices), 1) in choices


@pytest.mark.parametrize(
    "grammar", ['root ::= "(" root ")" | "x"', 'start: "(" start ")" | "x"', "%llguidance {}\nstart: /[(]x[)]|x/"]
)
def test_grammars_may_be_lark_or_gbnf(grammars: Grammars, tokenizer: Tokenizer, grammar: str) -> None:
    text = written(grammars, tokenizer, StructuredOutputs(grammar=grammar), 4)
    depth = text.count("(")
    assert text == "(" * depth + "x" + ")" * depth


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2**32))
def test_json_follows_its_schema(grammars: Grammars, tokenizer: Tokenizer, seed: int) -> None:
    value = json.loads(written(grammars, tokenizer, StructuredOutputs(json=json.dumps(SCHEMA)), seed))
    assert set(value) <= {"name", "age", "tags"}
    assert len(value["name"]) <= 12
    assert type(value["age"]) is int and 0 <= value["age"] <= 150
    assert all(tag in ("red", "green", 3, None) for tag in value.get("tags", []))


def test_json_has_no_white_space_to_choose_unless_that_is_asked_for(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def longest(**fields: object) -> int:
        asked = StructuredOutputs(json='{"type": "array", "items": {"type": "null"}, "maxItems": 9}', **fields)  # type: ignore[arg-type]
        found = [re.findall(r"\s+", written(grammars, tokenizer, asked, seed)) for seed in range(20)]
        return max((len(space) for spaces in found for space in spaces), default=0)

    assert longest() == 1
    assert longest(disable_any_whitespace=True) == 0
    assert longest(whitespace_pattern="[ ]") == 1
    assert longest(disable_any_whitespace=False) > 1


def single(tokenizer: Tokenizer, text: str) -> int:
    """The token that is this text and nothing else."""
    return next(i for i in range(1, tokenizer.vocab_size) if tokenizer.token_bytes(i) == text.encode())


def test_only_an_end_of_text_that_the_grammar_allows_is_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint(StructuredOutputs(regex="a|ab"))
    a, b = single(tokenizer, "a"), single(tokenizer, "b")
    assert not answered(constraint).allowed[END]
    constraint.push(a)
    assert answered(constraint).allowed[[END, b]].all()
    assert not constraint.complete
    constraint.push(b)
    assert answered(constraint).complete


def test_a_model_without_an_end_of_text_ends_where_nothing_may_follow(tokenizer: Tokenizer) -> None:
    endless = Grammars(tokenizer, tokenizer.vocab_size)
    constraint = endless.constraint(StructuredOutputs(regex="a|ab"))
    constraint.push(single(tokenizer, "a"))
    allowed = np.flatnonzero(answered(constraint).allowed)
    assert {tokenizer.token_bytes(int(token)) for token in allowed} == {b"b"}
    endless.close()


def test_a_vocabulary_may_be_padded_or_cut(tokenizer: Tokenizer) -> None:
    for size in (tokenizer.vocab_size + 61, 300):
        sized = Grammars(tokenizer, size, (END,))
        allowed = answered(sized.constraint(StructuredOutputs(regex="[a-c]+"))).allowed
        assert allowed.shape == (size,)
        assert not allowed[tokenizer.vocab_size :].any()
        sized.close()


def stuck(constraint: object) -> str:
    error = answered(constraint).error  # type: ignore[arg-type]
    assert re.fullmatch(r"structured_outputs cannot be followed further: [^<>\n]+", error), error
    return error


def test_a_grammar_that_no_token_can_follow_is_refused(tokenizer: Tokenizer) -> None:
    small = Grammars(tokenizer, 3, (END,))
    with pytest.raises(ParameterError, match="no text of the model's tokens follows it"):
        small.compile(StructuredOutputs(regex="abc"))
    small.close()


def test_a_grammar_beyond_its_limits_is_stuck(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = json.dumps({"type": "object", "properties": {f"{i}": {} for i in range(600)}})
    constraint = grammars.constraint(StructuredOutputs(json=schema))
    constraint.push(single(tokenizer, "{"))
    assert "items; max is" in stuck(constraint)


def test_an_ambiguous_grammar_is_stuck(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ambiguous = "start:" + 20 * " s" + '\ns: "x" | ' + " | ".join("s " * n for n in range(2, 80))
    constraint = grammars.constraint(StructuredOutputs(grammar=ambiguous))
    constraint.push(single(tokenizer, "x"))
    assert "Too many items" in stuck(constraint)


def test_each_request_has_its_own_state(grammars: Grammars, tokenizer: Tokenizer) -> None:
    asked = StructuredOutputs(regex="[ad][bc]")
    first, second = grammars.constraint(asked), grammars.constraint(asked)
    a, b = single(tokenizer, "a"), single(tokenizer, "b")
    first.push(a)
    assert answered(first).allowed[b] and not answered(first).allowed[a]
    assert answered(second).allowed[a] and not answered(second).allowed[b]


@pytest.mark.parametrize("text", ["Then, the quick fox", " leading", "'a", "▁x", "a  b", "é數\n\t"])
def test_a_grammar_may_begin_with_any_text(grammars: Grammars, tokenizer: Tokenizer, text: str) -> None:
    """Tokenizers that put a space before every text must not put one before a grammar's."""
    quoted = json.dumps(text, ensure_ascii=False)
    for asked in (
        StructuredOutputs(choice=(text,)),
        StructuredOutputs(regex=re.escape(text)),
        StructuredOutputs(grammar=f"start: {quoted} rest\nrest: /[0-9]?/"),
        StructuredOutputs(json=json.dumps({"const": text})),
    ):
        drawn = written(grammars, tokenizer, asked, 3)
        assert re.fullmatch(re.escape(text) + "[0-9]?", json.loads(drawn) if asked.json else drawn)


@pytest.fixture(params=["special", "shown"])
def mark(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> str:
    """A text that is a token of its own, as the end of a text is."""
    special = [tokenizer.token_bytes(i).decode() for i in range(tokenizer.vocab_size) if tokenizer.is_special(i)]
    return special[0] if request.param == "special" else f"a{special[-1]}b"


def test_the_text_of_a_special_token_can_be_written(grammars: Grammars, tokenizer: Tokenizer, mark: str) -> None:
    schemas = [{"const": mark}, {"enum": [mark]}, {"properties": {mark: {"const": 1}}, "required": [mark]}]
    schemas[2] |= {"type": "object", "additionalProperties": False}
    assert written(grammars, tokenizer, StructuredOutputs(choice=(mark,)), 1) == mark
    for schema, value in zip(schemas, (mark, mark, {mark: 1}), strict=True):
        assert json.loads(written(grammars, tokenizer, StructuredOutputs(json=json.dumps(schema)), 1)) == value


@pytest.mark.parametrize(
    "grammar",
    [
        '?start: "a" | "b"',
        '!start: "a" | "b"',
        '// a comment ::= of ours\nstart: "a" | "b"',
        'start: x\nx: "a" | "b"',
        'root ::= "a" | "b"',
        '# a comment: of ours\nroot ::= x\nx ::= "a" | "b"',
        'root ::= x\nx-y ::= "a"\nx ::= x-y | "b"',
    ],
)
def test_grammars_are_told_apart_by_their_rules(grammars: Grammars, tokenizer: Tokenizer, grammar: str) -> None:
    assert written(grammars, tokenizer, StructuredOutputs(grammar=grammar), 1) in ("a", "b")


def test_what_cannot_be_compiled_is_told(grammars: Grammars) -> None:
    for fields, words in (
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": "a\\"}, "escapes nothing"),
        ({"regex": "a\\\\\\"}, "escapes nothing"),
        ({"json": json.dumps({"type": "string", "pattern": "a\\"})}, "escapes nothing"),
        ({"json": json.dumps({"type": "object", "patternProperties": {"a\\": {}}})}, "escapes nothing"),
        ({"json": '{"x-guidance": 5}'}, "x-guidance has '5'; it must be an object"),
        ({"json": '{"x-guidance": {"whitespace_pattern": " *"}}'}, "x-guidance has 'whitespace_pattern'"),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, "no text of the model's tokens"),
        ({"json": '{"$ref": "#"}'}, "no text of the model's tokens"),
        ({"json": '{"allOf": [{"$ref": "#"}]}'}, "no text of the model's tokens"),
        ({"grammar": "start: start"}, "no text of the model's tokens"),
        ({"grammar": "root ::= root"}, "no text of the model's tokens"),
        ({"json": '{"type": "strin"}'}, "strin"),
        ({"json": "[]"}, "object"),
        ({"json": '{"enum": []}'}, "empty"),
        ({"grammar": "start: missing"}, "missing"),
    ):
        with pytest.raises(ParameterError, match=words) as error:
            grammars.compile(StructuredOutputs(**fields))  # type: ignore[arg-type]
        assert error.value.field == "structured_outputs"
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("regex", ["a/b", "a\nb", r"a\\", r"a\/b", "/", r"\\/", "[/]", '"', "#a", "\u2028"])
@pytest.mark.parametrize("behind", [None, ReasoningGrammar(opening="<think>", closing="</think>", begun=False)])
def test_a_regex_means_the_same_wherever_it_stands(regex: str, behind: ReasoningGrammar | None) -> None:
    """As Python's own, also where it is part of a larger grammar."""
    matcher = compiled(StructuredOutputs(regex=regex, reasoning=behind), llguidance.LLTokenizer("byte"))
    for text in ("a/b", "a\nb", "a\\", "/", "\\/", '"', "#a", "\u2028", "a", ""):
        own = matcher.deep_copy()
        taken = own.try_consume_tokens(list(text.encode()))
        assert (taken == len(text.encode()) and own.is_accepting()) is bool(re.fullmatch(regex, text)), text


@pytest.mark.parametrize("most", [0, 3])
def test_an_answer_tells_what_must_follow_only_where_somebody_drafts(bytes_tokenizer: Tokenizer, most: int) -> None:
    grammars = Grammars(bytes_tokenizer, bytes_tokenizer.vocab_size, (END,), GrammarLimits(most_forced=most))
    constraint = answered(grammars.constraint(StructuredOutputs(choice=("abcdefgh",))))
    forced = constraint.forced(8)
    assert len(forced) == most
    assert b"abcdefgh".startswith(b"".join(map(bytes_tokenizer.token_bytes, forced)))
    grammars.close()
