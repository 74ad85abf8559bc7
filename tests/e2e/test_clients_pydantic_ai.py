"""Pydantic AI: its output types are tools that must be called."""

from __future__ import annotations

from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

pydantic_ai = client_library("pydantic_ai")
models = client_library("pydantic_ai.models.openai")
providers = client_library("pydantic_ai.providers.openai")
exceptions = client_library("pydantic_ai.exceptions")
pytestmark = pytest.mark.full


@pytest.fixture(params=["OpenAIChatModel", "OpenAIResponsesModel"])
def model(tiny: RunningServer, request: pytest.FixtureRequest) -> Any:
    provider = providers.OpenAIProvider(base_url=f"{tiny.url}/v1", api_key="none")
    return getattr(models, request.param)(MODEL, provider=provider)


def test_chat(model: Any) -> None:
    agent = pydantic_ai.Agent(model, model_settings={"max_tokens": 12, "temperature": 0})
    assert agent.run_sync(QUESTION).output


def test_stream(model: Any) -> None:
    agent = pydantic_ai.Agent(model, model_settings={"max_tokens": 12, "temperature": 0})
    with agent.run_stream_sync(QUESTION) as result:
        parts = list(result.stream_text(delta=True, debounce_by=None))
    assert len(parts) > 1 and "".join(parts) == agent.run_sync(QUESTION).output


def test_structured_output(model: Any) -> None:
    agent = pydantic_ai.Agent(
        model, output_type=Report, model_settings={"max_tokens": 300, "parallel_tool_calls": False}
    )
    assert isinstance(agent.run_sync(QUESTION).output, Report)


def test_a_loop_of_tools(model: Any) -> None:
    """The model calls its tool or answers, as it likes; after the one call there is nothing but the answer."""
    seen: list[Report] = []

    async def once(context: Any, definition: Any) -> Any:
        return None if seen else definition

    def note(report: Report) -> str:
        """Note a report."""
        seen.append(report)
        return "noted"

    agent = pydantic_ai.Agent(
        model,
        output_type=Report,
        tools=[pydantic_ai.Tool(note, prepare=once)],
        model_settings={"max_tokens": 100, "parallel_tool_calls": False},
    )
    for _ in range(60):
        result = agent.run_sync(QUESTION)
        assert isinstance(result.output, Report)
        if seen:
            break
    assert len(seen) == 1 and isinstance(seen[0], Report)


def test_what_is_too_long_is_told(model: Any) -> None:
    with pytest.raises(exceptions.ModelHTTPError, match="maximum context length") as caught:
        pydantic_ai.Agent(model).run_sync(TOO_LONG)
    assert caught.value.status_code == 400
