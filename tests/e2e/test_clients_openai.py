"""OpenAI's own client: chats and responses, each whole, streamed, structured, with tools, and too long."""

from __future__ import annotations

import json
from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

openai = client_library("openai")
pytestmark = pytest.mark.full
MESSAGES = [{"role": "user", "content": QUESTION}]
PARAMETERS = Report.model_json_schema()
TOOL = {"type": "function", "function": {"name": "report", "description": "Weather.", "parameters": PARAMETERS}}
FLAT = {"type": "function", "name": "report", "parameters": PARAMETERS, "strict": True}


@pytest.fixture
def client(tiny: RunningServer) -> Any:
    return openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120)


def test_chats(client: Any) -> None:
    fields = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**fields)
    chunks = client.chat.completions.create(**fields, stream=True, stream_options={"include_usage": True})
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    parsed = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Report, seed=1)
    assert isinstance(parsed.choices[0].message.parsed, Report)


def test_a_loop_of_tools(client: Any) -> None:
    fields = {"model": MODEL, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 2}
    message = client.chat.completions.create(messages=MESSAGES, **fields).choices[0].message
    (call,) = message.tool_calls
    Report.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(messages=MESSAGES, **fields) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    assert final.message.tool_calls[0].function.arguments == call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    answer = client.chat.completions.create(
        model=MODEL, messages=[*MESSAGES, message, result], tools=[TOOL], max_tokens=8
    )
    assert answer.choices[0].message.content


def test_responses(client: Any) -> None:
    fields = {"model": MODEL, "input": QUESTION, "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**fields)
    assert whole.output_text and whole.status == "incomplete"
    with client.responses.stream(**fields) as stream:
        deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text
    parsed = client.responses.parse(model=MODEL, input=QUESTION, text_format=Report, extra_body={"seed": 1})
    assert isinstance(parsed.output_parsed, Report) and parsed.status == "completed"


def test_a_loop_of_tools_by_responses(client: Any) -> None:
    fields = {"model": MODEL, "tools": [FLAT], "tool_choice": "required", "parallel_tool_calls": False}
    first = client.responses.create(input=QUESTION, **fields)
    (call,) = first.output
    Report.model_validate(json.loads(call.arguments))
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [{"role": "user", "content": QUESTION}, *first.output, result]
    second = client.responses.create(model=MODEL, input=history, tools=[FLAT], max_output_tokens=8)
    assert second.output_text


def test_what_is_too_long_is_said_in_openais_words(client: Any) -> None:
    for ask in (
        lambda: client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": TOO_LONG}]),
        lambda: client.responses.create(model=MODEL, input=TOO_LONG),
    ):
        with pytest.raises(openai.BadRequestError) as caught:
            ask()
        assert caught.value.code == "context_length_exceeded"
        assert "maximum context length" in str(caught.value)
