"""OpenAI's agents library, which asks /v1/responses unless it is told otherwise."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from support.clients import MODEL, QUESTION, TOO_LONG, Report, client_library
from support.running_server import RunningServer

openai = client_library("openai")
agents = client_library("agents")
pytestmark = pytest.mark.full


@pytest.fixture(params=["OpenAIResponsesModel", "OpenAIChatCompletionsModel"])
def model(tiny: RunningServer, request: pytest.FixtureRequest) -> Any:
    agents.set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=120)
    return getattr(agents, request.param)(model=MODEL, openai_client=client)


def settings(**fields: Any) -> Any:
    return agents.ModelSettings(**{"max_tokens": 100, "temperature": 0.5, "parallel_tool_calls": False, **fields})


def test_chat_and_stream(model: Any) -> None:
    own = settings(max_tokens=12, temperature=0, parallel_tool_calls=None)
    agent = agents.Agent(name="clerk", instructions="Be brief.", model=model, model_settings=own)

    async def told() -> None:
        whole = (await agents.Runner.run(agent, QUESTION)).final_output
        result = agents.Runner.run_streamed(agent, QUESTION)
        deltas = ""
        async for event in result.stream_events():
            if event.type == "raw_response_event" and event.data.type == "response.output_text.delta":
                deltas += event.data.delta
        assert whole and result.final_output == deltas == whole

    asyncio.run(told())


def test_structured_output(model: Any) -> None:
    agent = agents.Agent(
        name="clerk", model=model, output_type=Report, model_settings=settings(parallel_tool_calls=None)
    )
    assert isinstance(agents.Runner.run_sync(agent, QUESTION).final_output, Report)


@pytest.mark.parametrize("stream", [False, True])
def test_a_loop_of_two_tools(model: Any, stream: bool) -> None:
    """Look up, then decide: each must be called, and the second one ends the loop."""
    done: list[str] = []

    @agents.function_tool(is_enabled=lambda context, agent: not done)
    def look_up(city: str) -> str:
        """The weather of a city."""
        done.append("look_up")
        return "sunny"

    @agents.function_tool(is_enabled=lambda context, agent: bool(done))
    def decide(report: Report) -> str:
        """Decide by a report."""
        assert isinstance(report, Report)
        done.append("decide")
        return f"decided: {report.sky}"

    agent = agents.Agent(
        name="clerk",
        model=model,
        tools=[look_up, decide],
        model_settings=settings(tool_choice="required", max_tokens=200),
        reset_tool_choice=False,
        tool_use_behavior=agents.StopAtTools(stop_at_tool_names=["decide"]),
    )

    async def run() -> Any:
        result = agents.Runner.run_streamed(agent, QUESTION, max_turns=4)
        async for _ in result.stream_events():
            pass
        return result

    result = asyncio.run(run()) if stream else agents.Runner.run_sync(agent, QUESTION, max_turns=4)
    assert done == ["look_up", "decide"]
    assert str(result.final_output).startswith("decided: ")


def test_what_is_too_long_is_told(model: Any) -> None:
    agent = agents.Agent(name="clerk", model=model)
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        agents.Runner.run_sync(agent, TOO_LONG)
    assert caught.value.code == "context_length_exceeded"
