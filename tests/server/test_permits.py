"""The house holds so many requests; the next one is told to come again."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import FakeEngine
from fastapi import FastAPI
from serving import MAX_RUNNING, MAX_WAITING, client_of, service_of, until

from dsc_serve.server.errors import ApiError
from dsc_serve.server.limits import Permits

CAPACITY = MAX_WAITING + MAX_RUNNING


def test_permits_come_back_however_the_block_ends() -> None:
    permits = Permits(3)
    with permits.hold(2), permits.hold(1):
        with pytest.raises(ApiError) as refused, permits.hold(1):
            pass
        assert permits.held == 3
    with pytest.raises(KeyError), permits.hold(3):
        raise KeyError
    assert permits.held == 0
    assert refused.value.status == 429
    assert refused.value.headers == {"Retry-After": "1"}


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
