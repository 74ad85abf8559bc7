"""LangChain's ChatOpenAI, as it is by default."""

from __future__ import annotations

from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

langchain_openai = client_library("langchain_openai")
messages = client_library("langchain_core.messages")
exceptions = client_library("langchain_core.exceptions")
pytestmark = pytest.mark.full


@pytest.fixture
def chat(tiny: RunningServer) -> Any:
    return langchain_openai.ChatOpenAI(
        model=MODEL, base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120, max_tokens=100, seed=1
    )


def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


def test_chat_and_stream(chat: Any) -> None:
    whole = chat.invoke(QUESTION, temperature=0, max_tokens=12).content
    assert whole and "".join(chunk.content for chunk in chat.stream(QUESTION, temperature=0, max_tokens=12)) == whole


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(chat: Any, method: str) -> None:
    if method == "json_mode":
        answer = chat.bind(response_format={"type": "json_object"}, max_tokens=20).invoke(QUESTION)
        assert answer.content.startswith("{")
        return
    assert isinstance(chat.with_structured_output(Report, method=method).invoke(QUESTION), Report)


def test_a_loop_of_tools(chat: Any) -> None:
    history: list[Any] = [messages.HumanMessage(QUESTION)]
    called = chat.bind_tools([Report, weather], tool_choice="Report", parallel_tool_calls=False).invoke(history)
    (call,) = called.tool_calls
    assert isinstance(Report(**call["args"]), Report) and not called.invalid_tool_calls
    history += [called, messages.ToolMessage("noted", tool_call_id=call["id"])]
    assert chat.bind_tools([Report, weather]).invoke(history, max_tokens=8).content


def test_its_own_error_for_what_is_too_long(chat: Any) -> None:
    with pytest.raises(exceptions.ContextOverflowError):
        chat.invoke(TOO_LONG)
    short = chat.bind(max_tokens=8)
    guarded = chat.with_fallbacks([messages_cut(short)], exceptions_to_handle=(exceptions.ContextOverflowError,))
    assert guarded.invoke(TOO_LONG).content


def messages_cut(chat: Any) -> Any:
    runnables = client_library("langchain_core.runnables")
    return runnables.RunnableLambda(lambda text: text[:200]) | chat
