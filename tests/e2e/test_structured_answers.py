"""Answers of the embedded model have the form that was asked for, every one of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict, Field
from support.running_server import RunningServer

MODEL = "dsc-tiny"
PROMPTS = ["Describe the king.", "What did he say?", "A list of words:", "In Python,", "Where is the house?"]
STREETS = r"[A-Z][a-z]{2,12} (street|road), [1-9][0-9]{0,2}"
CHOICES = ["yes", "no", "yes and no", "peut-être ☂"]

Answer = Callable[[int], str]


class Person(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)
    rank: Literal["king", "servant", "none"]
    words: list[str] = Field(max_length=3)
    height: float | None


@pytest.fixture
def client(tiny: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120)


def asked_in(client: OpenAI, i: int, **fields: object) -> str:
    """A chat's text, streamed for every other request."""
    stream = i % 2 == 0
    answer = client.chat.completions.create(  # type: ignore[call-overload]
        model=MODEL,
        messages=[{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}],
        seed=i,
        temperature=0.5 + i % 4 / 4,
        stream=stream,
        **fields,
    )
    if not stream:
        assert answer.choices[0].finish_reason == "stop"
        return str(answer.choices[0].message.content)
    chunks = list(answer)
    assert chunks[-1].choices[0].finish_reason == "stop"
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


COUNTS = pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.full)])


def every(count: int, valid: Callable[[int], bool]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(valid, range(count))) == count


@COUNTS
def test_json_follows_its_schema(client: OpenAI, count: int) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": bounded(Person.model_json_schema())}}

    def valid(i: int) -> bool:
        text = asked_in(client, i, response_format=form)
        return Person.model_validate_json(text) is not None

    every(count, valid)


def bounded(schema: dict[str, dict[str, dict[str, object]]]) -> dict[str, dict[str, dict[str, object]]]:
    """The schema with the limits that a model which does not come to an end by itself needs: any range of numbers
    holds some of endlessly many digits."""
    schema["properties"]["words"]["items"] = {"type": "string", "maxLength": 10}
    schema["properties"]["height"] = {"enum": [0.9, 1.65, 1.8, 2, None]}
    return schema


@COUNTS
def test_text_matches_its_regex(client: OpenAI, count: int) -> None:
    asked = {"structured_outputs": {"regex": STREETS}}
    every(count, lambda i: re.fullmatch(STREETS, asked_in(client, i, extra_body=asked)) is not None)


@COUNTS
def test_a_choice_is_one_of_the_choices(client: OpenAI, count: int) -> None:
    asked = {"structured_outputs": {"choice": CHOICES}}
    every(count, lambda i: asked_in(client, i, extra_body=asked) in CHOICES)


def test_the_client_s_own_parser_understands_the_answer(client: OpenAI) -> None:
    class Verdict(BaseModel):
        guilty: bool
        witness: Literal["Peter", "Paul"]

    answer = client.chat.completions.parse(
        model=MODEL, messages=[{"role": "user", "content": "Who?"}], response_format=Verdict
    )
    assert isinstance(answer.choices[0].message.parsed, Verdict)


def test_the_prompt_of_a_completion_is_not_part_of_the_form(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt=["It is", "He was"],
        max_tokens=60,
        n=2,
        echo=True,
        extra_body={"structured_outputs": {"regex": STREETS}},
    )
    texts = [choice.text for choice in answer.choices]
    assert all(re.fullmatch(f"(It is|He was){STREETS}", text) for text in texts)


def test_a_grammar_that_cannot_be_used_is_a_bad_request(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="unclosed group") as caught:
        asked_in(client, 0, extra_body={"structured_outputs": {"regex": "(a"}})
    assert caught.value.param == "structured_outputs"


def test_a_grammar_that_becomes_too_complex_is_told(client: OpenAI) -> None:
    grammar = "start:" + 20 * " s" + '\ns: "x" | ' + " | ".join("s " * n for n in range(2, 40))
    with pytest.raises(openai.BadRequestError, match="cannot be followed further"):
        asked_in(client, 1, extra_body={"structured_outputs": {"grammar": grammar}})
