"""LlamaIndex's OpenAILike."""

from __future__ import annotations

from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

openai_like = client_library("llama_index.llms.openai_like")
core = client_library("llama_index.core.llms")
tools = client_library("llama_index.core.tools")
prompts = client_library("llama_index.core.prompts")
openai = client_library("openai")
pytestmark = pytest.mark.full


@pytest.fixture
def llm(tiny: RunningServer) -> Any:
    return openai_like.OpenAILike(
        model=MODEL,
        api_base=f"{tiny.url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=1024,
        max_tokens=100,
        max_retries=0,
        timeout=120,
    )


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def test_chat_and_stream(llm: Any) -> None:
    question = [core.ChatMessage(role="user", content=QUESTION)]
    whole = llm.chat(question, temperature=0, max_tokens=12).message.content
    assert (
        whole
        and [part.message.content for part in llm.stream_chat(question, temperature=0, max_tokens=12)][-1] == whole
    )
    assert llm.complete(QUESTION, max_tokens=8).text


def test_structured_output(llm: Any) -> None:
    assert isinstance(llm.structured_predict(Report, prompts.PromptTemplate(QUESTION)), Report)


def test_a_loop_of_tools(llm: Any) -> None:
    tool = tools.FunctionTool.from_defaults(
        fn_schema=Report, fn=lambda **_: "noted", name="report", description="Weather."
    )
    question = core.ChatMessage(role="user", content=QUESTION)
    answer = llm.chat_with_tools([tool], user_msg=question, tool_required=True, allow_parallel_tool_calls=False)
    (call,) = llm.get_tool_calls_from_response(answer)
    assert isinstance(Report(**call.tool_kwargs), Report)
    result = core.ChatMessage(role="tool", content="sunny", additional_kwargs={"tool_call_id": call.tool_id})
    second = llm.chat_with_tools([tool], chat_history=[question, answer.message, result], max_tokens=8)
    assert second.message.content


def test_what_is_too_long_is_told(llm: Any) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        llm.chat([core.ChatMessage(role="user", content=TOO_LONG)])
    assert caught.value.code == "context_length_exceeded"
