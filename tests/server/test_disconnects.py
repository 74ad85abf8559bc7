"""A client that leaves takes its requests out of the engine, whatever they were doing."""

from __future__ import annotations

import asyncio
import random
import re
import socket
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import MESSAGES, app_around, client_of, live, post_bytes, service_of, until

from dsc_serve.text.tokenizer import Tokenizer

Ask = tuple[str, dict[str, Any]]
COMPLETION: Ask = ("/v1/completions", {"prompt": "hi", "max_tokens": 400})
CHAT: Ask = ("/v1/chat/completions", {"messages": MESSAGES})
REQUESTS = [COMPLETION, CHAT]


async def scrape(app: FastAPI) -> str:
    async with client_of(app) as client:
        return (await client.get("/metrics")).text


async def check_left(app: FastAPI, engine: FakeEngine, count: int) -> None:
    await until(lambda: len(engine.aborted) == count)
    await until(lambda: service_of(app).permits.held == 0)
    assert engine.running == 0
    assert len(engine.submitted) == count


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
@pytest.mark.parametrize("choices", [1, 3])
def test_leaving_a_stream_aborts_it(
    app: FastAPI, engine: FakeEngine, path: str, fields: dict[str, Any], choices: int
) -> None:
    engine.delay_s = 0.01

    async def run() -> None:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post_bytes(path, {**fields, "stream": True, "n": choices}))
            await reader.readuntil(b"data: ")
            writer.close()
            await check_left(app, engine, choices)
            assert f'dsc_serve_requests_total{{endpoint="{path}",status="499"}} 1.0' in await scrape(app)

    asyncio.run(run())


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choices", [1, 3])
def test_leaving_before_the_first_token_aborts_too(
    app: FastAPI, engine: FakeEngine, path: str, fields: dict[str, Any], stream: bool, choices: int
) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with live(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post_bytes(path, {**fields, "stream": stream, "n": choices}))
            await until(lambda: engine.running == choices)
            assert service_of(app).permits.held == choices
            writer.close()
            await check_left(app, engine, choices)
            assert f'dsc_serve_requests_total{{endpoint="{path}",status="499"}} 1.0' in await scrape(app)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_with_a_request_behind_the_one_that_is_answered_aborts_it(
    app: FastAPI, engine: FakeEngine, stream: bool
) -> None:
    engine.delay_s = 0.05
    request = post_bytes("/v1/completions", {"prompt": "hi", "max_tokens": 400, "stream": stream})

    async def run() -> None:
        async with live(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request + request)
            await until(lambda: engine.running == 1)
            writer.close()
            await check_left(app, engine, 1)

    asyncio.run(run())


def test_requests_that_do_not_wait_for_answers_are_answered_in_turn(app: FastAPI, engine: FakeEngine) -> None:
    requests = [post_bytes("/v1/completions", {"prompt": "hi", "max_tokens": 2, "seed": i}) for i in range(5)]

    async def run() -> bytes:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"".join(requests))
            answers = [await asyncio.wait_for(reader.readuntil(b"}}}"), 10) for _ in requests]
            writer.close()
            return b"".join(answers)

    assert re.findall(rb'"text":"(\w+)"', asyncio.run(run())) == [b"ab", b"bc", b"cd", b"de", b"ef"]


@pytest.mark.parametrize(("path", "fields"), REQUESTS)
def test_leaving_a_whole_answer_aborts_it(app: FastAPI, engine: FakeEngine, path: str, fields: dict[str, Any]) -> None:
    engine.delay_s = 0.01

    async def run() -> None:
        async with live(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post_bytes(path, fields))
            await until(lambda: engine.running == 1)
            await asyncio.sleep(0.05)
            writer.close()
            await check_left(app, engine, 1)

    asyncio.run(run())


def test_leaving_within_the_body_submits_nothing(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        async with live(app) as port:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post_bytes(*COMPLETION)[:-5])
            await asyncio.sleep(0.05)
            writer.close()
            text = ""
            async with asyncio.timeout(60):
                while 'endpoint="/v1/completions",status="499"} 1.0' not in text:
                    await asyncio.sleep(0.01)
                    text = await scrape(app)
        assert engine.submitted == []

    asyncio.run(run())


def test_a_client_that_reads_no_more_is_not_waited_for(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    app = app_around(engine, tokenizer, send_timeout_s=0.3)

    async def run() -> None:
        async with live(app, send_buffer=4096) as port:
            client = socket.socket()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", port))
            client.sendall(post_bytes(COMPLETION[0], {**COMPLETION[1], "stream": True, "n": 8, "logprobs": 20}))
            await until(lambda: engine.running > 0)
            await until(lambda: service_of(app).permits.held == 0, 20)
            client.close()
        assert engine.running == 0
        assert engine.aborted

    asyncio.run(run())


def test_an_answered_client_aborts_nothing_when_it_leaves(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        async with live(app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for stream in (False, True, False):  # over one connection that is kept alive
                answer = await client.post("/v1/completions", json={"prompt": "hi", "stream": stream})
                assert answer.status_code == 200
        assert engine.aborted == []

    asyncio.run(run())


def test_the_end_of_the_server_ends_its_requests(app: FastAPI, engine: FakeEngine) -> None:
    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "n": 2}))
            await until(lambda: engine.running == 2)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await check_left(app, engine, 2)

    asyncio.run(run())


def test_nothing_is_left_after_a_crowd_of_clients_with_bad_manners(app: FastAPI, engine: FakeEngine) -> None:
    engine.delay_s = 0.001
    random_choice = random.Random(0)

    async def visit(port: int) -> None:
        path, fields = random_choice.choice(REQUESTS)
        fields = {**fields, "stream": random_choice.random() < 0.5, "n": random_choice.randint(1, 4), "max_tokens": 30}
        if random_choice.random() < 0.2:
            fields["temperature"] = -1
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post_bytes(path, fields))
        if random_choice.random() < 0.5:
            await asyncio.sleep(random_choice.random() * 0.04)
        else:
            await reader.readuntil(b"HTTP/1.1 ")
            await reader.read(random_choice.randint(1, 4000))
        writer.close()

    async def run() -> None:
        async with live(app) as port:
            for _ in range(8):
                engine.fail_after = random_choice.choice([None, None, 5])
                async with asyncio.timeout(60):
                    await asyncio.gather(*(visit(port) for _ in range(12)))
            await until(lambda: service_of(app).permits.held == 0)
            await until(lambda: engine.running == 0)

    asyncio.run(run())
    assert len(engine.submitted) > 20
    assert engine.aborted
