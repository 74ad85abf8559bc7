"""The choices of one prompt travel to the engine together, and to the next one where it dies."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.worker.client import EngineClient, EngineDiedError, Family
from dsc_serve.worker.connection import EngineConnection
from dsc_serve.worker.messages import Delta, Finish, Submit

PROMPT = [1, 2, 3]


class Wire:
    """What a client sends."""

    model = None

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: object) -> None:
        self.sent.append(message)

    def submitted(self) -> list[list[str]]:
        """Ids of each message, the first one's first."""
        messages = [message for message in self.sent if isinstance(message, Submit)]
        return [[message.request_id, *(one.request_id for one in message.siblings)] for message in messages]


def attached(client: EngineClient) -> Wire:
    wire = Wire()
    client.attach(cast(EngineConnection, wire))
    return wire


async def follow(client: EngineClient, name: str, family: Family) -> list[Delta]:
    return [delta async for delta in client.generate(name, PROMPT, SamplingParams(seed=int(name)), family=family)]


def test_they_are_one_message_that_holds_the_prompt_once() -> None:
    async def run() -> None:
        client = EngineClient(8)
        wire = attached(client)
        family = Family(3)
        tasks = [asyncio.create_task(follow(client, name, family)) for name in "012"]
        await asyncio.sleep(0)
        assert wire.submitted() == [["0", "1", "2"]]
        (message,) = wire.sent
        assert message.prompt == PROMPT and [one.params.seed for one in message.siblings] == [1, 2]
        for name in "201":
            client.take(Delta(name, [5], "length"))
        assert [len(deltas) for deltas in await asyncio.gather(*tasks)] == [1, 1, 1]
        assert client.in_flight == 0

    asyncio.run(run())


def test_they_wait_for_each_other_and_not_for_one_that_has_left() -> None:
    async def run() -> None:
        client = EngineClient(8)
        wire, family = attached(client), Family(3)
        first = asyncio.create_task(follow(client, "0", family))
        await asyncio.sleep(0)
        assert wire.submitted() == []
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        others = [asyncio.create_task(follow(client, name, family)) for name in "12"]
        await asyncio.sleep(0)
        assert wire.submitted() == [["1", "2"]]
        assert [message.request_id for message in wire.sent if isinstance(message, Finish)] == ["0"]
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        assert client.in_flight == 0

    asyncio.run(run())


def test_those_that_have_said_nothing_go_to_the_next_engine_together() -> None:
    async def run() -> None:
        client = EngineClient(8)
        attached(client)
        family = Family(3)
        tasks = [asyncio.create_task(follow(client, name, family)) for name in "012"]
        await asyncio.sleep(0)
        client.take(Delta("0", [5]))
        client.detach("it died")
        wire = attached(client)
        assert wire.submitted() == [["1", "2"]]
        assert wire.sent[0].age_s > 0
        for name in "12":
            client.take(Delta(name, [5], "stop"))
        died, *ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(died, EngineDiedError)
        assert [type(deltas) for deltas in ended] == [list, list]

    asyncio.run(run())


def test_one_alone_is_submitted_at_once() -> None:
    async def run() -> None:
        client = EngineClient(8)
        wire = attached(client)
        deltas = client.generate("0", PROMPT, SamplingParams())
        waiting = asyncio.ensure_future(anext(deltas))
        await asyncio.sleep(0)
        assert wire.submitted() == [["0"]]
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(run())
    with pytest.raises(EngineDiedError):
        asyncio.run(anext_of_nothing())


async def anext_of_nothing() -> Delta:
    return await anext(EngineClient(8).generate("0", PROMPT, SamplingParams()))
