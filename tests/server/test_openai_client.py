"""The official client reads every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import live

from dsc_serve.worker.messages import Delta

Talk = Callable[[openai.AsyncOpenAI], Awaitable[None]]


def talk(app: FastAPI, conversation: Talk) -> None:
    async def run() -> None:
        async with (
            live(app) as port,
            openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client,
        ):
            await conversation(client)

    asyncio.run(run())


def test_completions(app: FastAPI) -> None:
    async def conversation(client: openai.AsyncOpenAI) -> None:
        whole = await client.completions.create(model="fake", prompt="hi", max_tokens=4, logprobs=2, n=2, echo=True)
        assert [choice.text for choice in whole.choices] == ["hiabcd"] * 2
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.tokens == list("hiabcd")
        assert whole.usage is not None
        assert whole.usage.total_tokens == 2 + 8
        stream = await client.completions.create(
            model="fake", prompt=[104, 105], max_tokens=4, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == "abcd"
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.completion_tokens == 4

    talk(app, conversation)


def test_chat_completions(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("Grüße 😀")

    async def conversation(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(
            model="fake",
            messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": "hi"}],
            logprobs=True,
            top_logprobs=1,
        )
        message = whole.choices[0].message
        assert (message.content, message.role, whole.choices[0].finish_reason) == ("Grüße 😀", "assistant", "stop")
        assert whole.choices[0].logprobs is not None
        assert whole.choices[0].logprobs.content is not None
        assert len(whole.choices[0].logprobs.content) == len("Grüße 😀".encode())
        history: list[Any] = [{"role": "user", "content": "hi"}, message.to_dict(), {"role": "user", "content": "on"}]
        stream = await client.chat.completions.create(
            model="fake",
            messages=history,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices) == "Grüße 😀"
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage is not None

    talk(app, conversation)


def test_the_client_s_own_accumulator_understands_the_stream(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("hello")

    async def conversation(client: openai.AsyncOpenAI) -> None:
        messages: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
        async with client.chat.completions.stream(model="fake", messages=messages) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.content == "hello"

    talk(app, conversation)


def test_models(app: FastAPI) -> None:
    async def conversation(client: openai.AsyncOpenAI) -> None:
        assert [model.id async for model in client.models.list()] == ["fake"]
        assert (await client.models.retrieve("fake")).object == "model"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")

    talk(app, conversation)


def test_errors(app: FastAPI, engine: FakeEngine) -> None:
    async def conversation(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as refused:
            await client.completions.create(model="fake", prompt="hi", temperature=-1)
        assert refused.value.param == "temperature"
        with pytest.raises(openai.NotFoundError) as missing:
            await client.completions.create(model="other", prompt="hi")
        assert missing.value.code == "model_not_found"
        engine.gate = asyncio.Event()
        waiting = [asyncio.create_task(client.completions.create(model="fake", prompt="hi", n=8))]
        while engine.running < 8:  # noqa: ASYNC110  the engine tells nobody
            await asyncio.sleep(0.005)
        with pytest.raises(openai.RateLimitError):
            await client.completions.create(model="fake", prompt="hi")
        engine.gate.set()
        await asyncio.gather(*waiting)
        engine.fail_after = 2
        with pytest.raises(openai.APIError, match="the engine broke"):
            async for _ in await client.completions.create(model="fake", prompt="hi", stream=True):
                pass
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="fake", prompt="hi")

    talk(app, conversation)


def test_a_request_that_ran_out_of_its_own_time_is_not_tried_again(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after, engine.error = 0, Delta("", [], "timeout", error="too late")

    async def conversation(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.APIStatusError, match="too late") as error:
            await client.with_options(max_retries=2).completions.create(
                model="fake", prompt="hi", extra_body={"timeout_s": 1}
            )
        assert error.value.status_code == 408

    talk(app, conversation)
    assert len(engine.submitted) == 1
