"""The house holds so many requests; the next one is told to come again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import MAX_RUNNING, MAX_WAITING, client_of, complete, service_of, until

from dsc_serve.config import LimitConfig, ServerConfig
from dsc_serve.server import limits
from dsc_serve.server.admission import Permits
from dsc_serve.server.errors import ApiError

CAPACITY = MAX_WAITING + MAX_RUNNING


def test_permits_are_taken_whole_or_not_at_all() -> None:
    permits = Permits(3)
    permits.take(2)
    with pytest.raises(ApiError) as refused:
        permits.take(2)
    assert (permits.held, permits.full, permits.idle.is_set()) == (2, False, False)
    permits.take(1)
    assert permits.full
    permits.release(3)
    assert (permits.held, permits.idle.is_set()) == (0, True)
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}


def test_places_are_taken_before_the_prompt_is_encoded(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoding = service_of(app).encode, asyncio.Event()

    async def slow_encode(*arguments: Any, **options: Any) -> list[int]:
        await encoding.wait()
        return await encode(*arguments, **options)

    monkeypatch.setattr(service_of(app), "encode", slow_encode)

    async def run() -> list[int]:
        async with client_of(app) as client:
            asking = [
                asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi"})) for _ in range(CAPACITY + 3)
            ]
            await until(lambda: sum(task.done() for task in asking) == 3)
            assert service_of(app).permits.held == CAPACITY
            assert engine.submitted == []
            encoding.set()
            return sorted([response.status_code for response in await asyncio.gather(*asking)])

    assert asyncio.run(run()) == [200] * CAPACITY + [429] * 3


def test_a_request_that_is_refused_after_it_got_its_place_gives_it_back(app: FastAPI) -> None:
    for _ in range(2 * CAPACITY):
        assert complete(app, prompt=[10_000]).status_code == 400


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_house_answers_429_and_recovers(app: FastAPI, engine: FakeEngine, stream: bool) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:

            async def ask(n: int) -> int:
                fields = {"prompt": "hi", "n": n, "stream": stream}
                response = await client.post("/v1/completions", json=fields)
                if response.status_code == 429:
                    error = response.json()["error"]
                    assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
                    assert response.headers["retry-after"] == "1"
                return response.status_code

            let_in = [asyncio.create_task(ask(CAPACITY - 2)), asyncio.create_task(ask(1))]
            await until(lambda: engine.running == CAPACITY - 1)
            assert await ask(2) == 429  # not even the one that would fit
            let_in.append(asyncio.create_task(ask(1)))
            await until(lambda: engine.running == CAPACITY)
            assert [await ask(1) for _ in range(3)] == [429] * 3
            assert engine.running == CAPACITY
            engine.gate.set()
            assert await asyncio.gather(*let_in) == [200] * 3
            assert service_of(app).permits.held == 0
            assert await ask(CAPACITY) == 200

    asyncio.run(run())
    assert service_of(app).permits.held == 0


def test_requests_that_arrive_together_are_counted_before_any_of_them_waits(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> list[int]:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            asking = [
                asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi"})) for _ in range(3 * CAPACITY)
            ]
            await until(lambda: sum(task.done() for task in asking) == 2 * CAPACITY)
            assert engine.running == CAPACITY
            engine.gate.set()
            return [response.status_code for response in await asyncio.gather(*asking)]

    statuses = asyncio.run(run())
    assert sorted(statuses) == [200] * CAPACITY + [429] * (2 * CAPACITY)


def test_bodies_that_are_being_read_together_have_a_limit(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_READING", 2000)
    monkeypatch.setattr(limits, "SMALL", 500)
    app.state.config = ServerConfig(limits=LimitConfig(max_body_bytes=1500))
    rest, headers = asyncio.Event(), {"content-type": "application/json"}
    whole = b'{"prompt": "hi"}'.ljust(1200)

    async def slowly() -> AsyncIterator[bytes]:
        yield whole[:1000]
        await rest.wait()
        yield whole[1000:]

    async def run() -> None:
        async with client_of(app) as client:

            def post(body: bytes | AsyncIterator[bytes]) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/completions", content=body, headers=headers))

            slow = post(slowly())
            await until(lambda: app.state.reading.total() == 1000)
            refused = await post(whole)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            assert (await post(b'{"prompt": "hi"}')).status_code == 200
            assert (await post(whole + b" " * 800)).status_code == 413
            rest.set()
            assert (await slow).status_code == 200
            assert (await post(whole)).status_code == 200
            assert not app.state.reading

    asyncio.run(run())
