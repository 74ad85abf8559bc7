"""LiteLLM, which finds its own fallback by what an error says."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the world for prices
litellm = client_library("litellm")
pytestmark = pytest.mark.full
MESSAGES = [{"role": "user", "content": QUESTION}]
TOOL = {"type": "function", "function": {"name": "report", "parameters": Report.model_json_schema()}}


@pytest.fixture
def own(tiny: RunningServer) -> dict[str, Any]:
    return {
        "model": f"openai/{MODEL}", "api_base": f"{tiny.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120,
    }  # fmt: skip


def test_chat_and_stream(own: dict[str, Any]) -> None:
    fields = {**own, "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    whole = litellm.completion(**fields).choices[0].message.content
    chunks = list(litellm.completion(**fields, stream=True))
    assert whole and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole


def test_structured_output(own: dict[str, Any]) -> None:
    answer = litellm.completion(**own, messages=MESSAGES, response_format=Report, seed=1)
    Report.model_validate_json(answer.choices[0].message.content)


def test_a_loop_of_tools(own: dict[str, Any]) -> None:
    fields = {**own, "tools": [TOOL], "parallel_tool_calls": False, "seed": 1}
    message = litellm.completion(**fields, messages=MESSAGES, tool_choice="required").choices[0].message
    (call,) = message.tool_calls
    Report.model_validate_json(call.function.arguments)
    chunks = list(litellm.completion(**fields, messages=MESSAGES, tool_choice="required", stream=True))
    built = litellm.stream_chunk_builder(chunks, messages=MESSAGES).choices[0].message
    assert built.tool_calls[0].function.arguments == call.function.arguments
    history = [*MESSAGES, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert litellm.completion(**own, messages=history, tools=[TOOL], max_tokens=8).choices[0].message.content


def test_its_own_error_for_what_is_too_long_leads_to_its_fallback(own: dict[str, Any]) -> None:
    too_long = [{"role": "user", "content": TOO_LONG}]
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**own, messages=too_long)
    larger = {"model_name": "larger", "litellm_params": {**own, "mock_response": "from the larger one"}}
    small = {"model_name": "small", "litellm_params": own}
    router = litellm.Router(model_list=[small, larger], context_window_fallbacks=[{"small": ["larger"]}], num_retries=0)
    answer = router.completion(model="small", messages=too_long)
    assert answer.choices[0].message.content == "from the larger one"
