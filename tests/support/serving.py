"""A served app without sockets, and one with, and how to ask it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI

from dsc_serve.config import AccessConfig, EngineConfig, LimitConfig, LogConfig, ServerConfig
from dsc_serve.server.app import create_app
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.process import HttpServer, bind
from dsc_serve.server.service import Service
from dsc_serve.text.tokenizer import Tokenizer
from support.fake_engine import FakeEngine

PATIENCE_S = 60.0  # of whoever waits for what a busy machine does late
MESSAGES = [{"role": "user", "content": "hi"}]
MAX_WAITING, MAX_RUNNING = 6, 2


def app_around(
    engine: FakeEngine,
    tokenizer: Tokenizer | None,
    ring: KeyRing | None = None,
    access: AccessConfig | None = None,
    log: LogConfig | None = None,
    **limits: Any,
) -> FastAPI:
    config = ServerConfig(
        served_model_name="fake",
        limits=LimitConfig(**{"max_waiting": MAX_WAITING, **limits}),
        access=access or AccessConfig(),
        log=log or LogConfig(),
        engine=EngineConfig(max_running=MAX_RUNNING, step_tokens=64),
    )
    return create_app(config, engine, tokenizer, ring)


def service_of(app: FastAPI) -> Service:
    service = app.state.service
    assert isinstance(service, Service)
    return service


def client_of(app: FastAPI) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


def ask(app: FastAPI, method: str, path: str, **options: Any) -> httpx.Response:
    """One request, answered whole; then nothing may be left behind."""

    async def run() -> httpx.Response:
        async with client_of(app) as client:
            return await client.request(method, path, **options)

    response = asyncio.run(run())
    assert service_of(app).permits.held == 0
    return response


def complete(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", json={"prompt": "hi", **fields})


def chat(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/chat/completions", json={"messages": MESSAGES, **fields})


def events_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, whose framing must be exact."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


@asynccontextmanager
async def live(app: FastAPI, send_buffer: int = 0) -> AsyncIterator[int]:
    """Serve over a real socket in this event loop; yields the port."""
    listening = asyncio.Event()
    server = app.state.server = HttpServer(app, app.state.config, listening.set)
    with bind("127.0.0.1", 0, send_buffer) as listener:
        port = listener.getsockname()[1]
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            await asyncio.wait_for(listening.wait(), PATIENCE_S)
            yield port
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, PATIENCE_S)


async def until(condition: Callable[[], object], timeout_s: float = PATIENCE_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110  what is waited for knows of no event
            await asyncio.sleep(0.005)


def post_bytes(path: str, fields: dict[str, Any]) -> bytes:
    """A request as it goes over the wire."""
    body = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body
