"""Grammars: whatever is drawn among the allowed tokens, the text is of the wanted form."""

from __future__ import annotations

import json
import re
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.config import resolve_model
from dsc_serve.sampling_params import ParameterError, StructuredOutputs
from dsc_serve.text.grammar import KEPT_GRAMMARS, Grammars, GrammarStuckError
from dsc_serve.text.tokenizer import Tokenizer

END = 0


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    loaded = Tokenizer.load(resolve_model("dsc-tiny"))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, tokenizer.vocab_size, (END,))


def written(grammars: Grammars, tokenizer: Tokenizer, asked: StructuredOutputs, seed: int, limit: int = 400) -> str:
    """A text of allowed tokens, drawn with no model at all."""
    constraint, draw = grammars.constraint(asked), np.random.default_rng(seed)
    tokens = [5, 6]  # a prompt
    while len(tokens) < limit:
        token = int(draw.choice(np.flatnonzero(constraint.allowed(tokens, 2))))
        if token == END:
            break
        tokens.append(token)
        if constraint.complete(tokens, 2):
            break
    else:
        raise AssertionError(f"no end: {tokenizer.decode(tokens[2:])!r}")
    return tokenizer.decode(tokens[2:])


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


def test_white_space_in_json_is_bounded_and_may_be_chosen(grammars: Grammars, tokenizer: Tokenizer) -> None:
    def longest(**fields: object) -> int:
        asked = StructuredOutputs(json='{"type": "array", "items": {"type": "null"}, "maxItems": 9}', **fields)  # type: ignore[arg-type]
        found = [re.findall(r"\s+", written(grammars, tokenizer, asked, seed)) for seed in range(20)]
        return max((len(space) for spaces in found for space in spaces), default=0)

    assert 2 <= longest() <= 21
    assert longest(disable_any_whitespace=True) == 0
    assert longest(whitespace_pattern="[ ]") == 1


def test_only_an_end_of_text_that_the_grammar_allows_is_allowed(grammars: Grammars, tokenizer: Tokenizer) -> None:
    constraint = grammars.constraint(StructuredOutputs(regex="a|ab"))
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert not constraint.allowed([], 0)[END]
    assert constraint.allowed([a], 0)[[END, b]].all()
    assert not constraint.complete([a], 0)
    assert constraint.complete([a, b], 0)


def test_a_model_without_an_end_of_text_ends_where_nothing_may_follow(tokenizer: Tokenizer) -> None:
    constraint = Grammars(tokenizer, tokenizer.vocab_size).constraint(StructuredOutputs(regex="a|ab"))
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    assert np.flatnonzero(constraint.allowed([a], 0)).tolist() == [b]
    assert constraint.complete([a, b], 0)


def test_a_vocabulary_may_be_padded_or_cut(tokenizer: Tokenizer) -> None:
    for size in (tokenizer.vocab_size + 61, 300):
        allowed = Grammars(tokenizer, size, (END,)).constraint(StructuredOutputs(regex="[a-c]+")).allowed([], 0)
        assert allowed.shape == (size,)
        assert not allowed[tokenizer.vocab_size :].any()


def test_a_grammar_that_no_token_can_follow_is_stuck(tokenizer: Tokenizer) -> None:
    constraint = Grammars(tokenizer, 3, (END,)).constraint(StructuredOutputs(regex="abc"))
    with pytest.raises(GrammarStuckError, match=r"^structured_outputs cannot be followed further: [^\n]{1,100}$"):
        constraint.allowed([], 0)


def test_a_grammar_beyond_its_limits_is_stuck(grammars: Grammars, tokenizer: Tokenizer) -> None:
    schema = json.dumps({"type": "object", "properties": {f"{i}": {} for i in range(600)}})
    constraint, brace = grammars.constraint(StructuredOutputs(json=schema)), tokenizer.encode("{")
    with pytest.raises(GrammarStuckError, match=r"items; max is [0-9]+; [^<>\n]*$"):
        constraint.allowed(brace, 0)


def test_an_ambiguous_grammar_is_stuck_before_it_has_taken_long(grammars: Grammars, tokenizer: Tokenizer) -> None:
    ambiguous = "start:" + 20 * " s" + '\ns: "x" | ' + " | ".join("s " * n for n in range(2, 80))
    constraint = grammars.constraint(StructuredOutputs(grammar=ambiguous))
    begun = time.process_time()
    constraint.allowed([], 0)
    with pytest.raises(GrammarStuckError, match=r"Too many items [^<>\n]*$"):
        constraint.allowed(tokenizer.encode("x"), 0)
    assert time.process_time() - begun < 3


def test_each_request_has_its_own_state(grammars: Grammars, tokenizer: Tokenizer) -> None:
    asked = StructuredOutputs(regex="a[bc]")
    first, second = grammars.constraint(asked), grammars.constraint(asked)
    (a,), (b,) = tokenizer.encode("a"), tokenizer.encode("b")
    first.allowed([a], 0)
    assert second.allowed([], 0)[a] and not second.allowed([], 0)[b]


def test_what_cannot_be_compiled_is_told(grammars: Grammars) -> None:
    for fields, words in (
        ({"regex": "(a"}, "unclosed group"),
        ({"json": '{"type": "strin"}'}, "strin"),
        ({"json": "[]"}, "object"),
        ({"json": '{"enum": []}'}, "empty"),
        ({"grammar": "start: missing"}, "missing"),
    ):
        with pytest.raises(ParameterError, match=words) as error:
            grammars.constraint(StructuredOutputs(**fields))  # type: ignore[arg-type]
        assert error.value.field == "structured_outputs"
        assert "\n" not in str(error.value)


def test_a_grammar_in_use_is_not_compiled_again(grammars: Grammars, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[StructuredOutputs] = []
    inner = grammars._compile
    monkeypatch.setattr(grammars, "_compile", lambda asked: compiled.append(asked) or inner(asked))
    popular = StructuredOutputs(regex="popular")
    for i in range(KEPT_GRAMMARS + 1):
        grammars.constraint(popular)
        grammars.constraint(StructuredOutputs(regex=f"rare{i}"))
    assert compiled.count(popular) == 1
    assert len(grammars._kept) == KEPT_GRAMMARS
