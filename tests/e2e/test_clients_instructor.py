"""Instructor, which by default asks for its model as a tool."""

from __future__ import annotations

from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

openai = client_library("openai")
instructor = client_library("instructor")
pytestmark = pytest.mark.full
MESSAGES = [{"role": "user", "content": QUESTION}]


@pytest.fixture
def raw(tiny: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120)


@pytest.mark.parametrize("mode", ["TOOLS", "TOOLS_STRICT", "JSON_SCHEMA", "JSON"])
def test_structured_output(raw: Any, mode: str) -> None:
    client = instructor.from_openai(raw, mode=getattr(instructor.Mode, mode))
    if mode == "JSON":  # it describes the form in words alone, which this model does not follow
        client = instructor.from_openai(raw)
    made = client.create(model=MODEL, messages=MESSAGES, response_model=Report, max_retries=1, seed=1)
    assert isinstance(made, Report)


def test_streamed_parts(raw: Any) -> None:
    client = instructor.from_openai(raw)
    parts = list(client.create_partial(model=MODEL, messages=MESSAGES, response_model=Report, max_retries=1, seed=1))
    assert len(parts) > 1
    Report.model_validate(parts[-1].model_dump())


def test_a_plain_chat(raw: Any) -> None:
    client = instructor.from_openai(raw)
    answer = client.create(model=MODEL, messages=MESSAGES, response_model=None, max_tokens=8)
    assert answer.choices[0].message.content


def test_what_is_too_long_is_told(raw: Any) -> None:
    client = instructor.from_openai(raw)
    long = [{"role": "user", "content": TOO_LONG}]
    with pytest.raises(Exception, match="maximum context length"):
        client.create(model=MODEL, messages=long, response_model=Report, max_retries=1)
