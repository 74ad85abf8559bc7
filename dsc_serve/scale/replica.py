"""One replica: the whole server without its socket. Its engine is a process of its own, as ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

import msgspec
import ray
from ray import serve
from starlette.types import Message

from dsc_serve.config import ServerConfig, resolve_model
from dsc_serve.scale.call import AnswerPart, Call, Taken
from dsc_serve.server.app import create_app
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.logs import logging_to
from dsc_serve.server.process import drain
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.supervisor import ENGINE, EngineSupervisor

MAX_UNSENT = 256  # messages of one answer that wait for the door
SETTLE_S = 5.0  # after its last message
BROKEN: Message = {"type": "broken"}


class EngineLostError(RuntimeError):
    """The engine will not come back."""


class BrokenAnswerError(RuntimeError):
    """The app did not finish an answer that it had begun; its log has the cause."""


class Replica:
    """Runs the server's app around an engine process of its own. command: as in EngineSupervisor.

    Raises EngineStartError, ConfigError or TokenizerError; Ray then tries again, a few times.
    """

    async def __init__(self, config: ServerConfig, command: tuple[str, ...] = ENGINE) -> None:  # type: ignore[misc]  # Ray awaits it
        self._name = serve.get_replica_context().replica_id.unique_id
        self._open = contextlib.ExitStack()
        self._open.enter_context(logging_to(config.log))
        ring = KeyRing.of(config)
        tokenizer = Tokenizer.load(resolve_model(config.engine.model))
        engine = msgspec.structs.replace(config.engine, threads=config.engine.threads or assigned_cores())
        self._supervisor = EngineSupervisor(engine, config.life, config.limits.max_unread, command)
        self._client = await self._supervisor.start()
        self._app = create_app(config, self._client, tokenizer, ring)
        self._reading = asyncio.create_task(ring.keep_current())

    async def answer(self, call: Call) -> AsyncGenerator[Taken | AnswerPart, None]:
        """The answer of the app, in parts as they come. Leaving early is what a client that leaves is to the app."""
        yield Taken(self._name)
        messages: asyncio.Queue[Message] = asyncio.Queue(MAX_UNSENT)
        running = asyncio.create_task(self._run(call, messages))
        status, headers = 0, None
        last = False
        try:
            while not last:
                message = await messages.get()
                if message is BROKEN:
                    raise BrokenAnswerError(f"{call.method} {call.path}")
                if message["type"] == "http.response.start":
                    status, headers = message["status"], list(message.get("headers", []))
                    continue
                body, last = collected(message, messages)
                yield AnswerPart(body, last, status, headers)
                status, headers = 0, None
        finally:
            if last:  # it has said everything, but not settled its account yet
                await asyncio.wait((running,), timeout=SETTLE_S)
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def whole(self, call: Call) -> tuple[str, AnswerPart]:
        """This replica's name, and its answer in one part."""
        parts = [part async for part in self.answer(call) if isinstance(part, AnswerPart)]
        return self._name, AnswerPart(b"".join(part.body for part in parts), True, parts[0].status, parts[0].headers)

    async def _run(self, call: Call, messages: asyncio.Queue[Message]) -> None:
        left = asyncio.Event()
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await left.wait()  # until the call ends, which cancels this
            return {"type": "http.disconnect"}

        complete = False

        async def send(message: Message) -> None:
            nonlocal complete
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)
            await messages.put(message)

        try:
            await self._app(call.scope(), receive, send)
        finally:
            task = asyncio.current_task()
            if not complete and task is not None and not task.cancelling():  # else nobody reads any more
                await messages.put(BROKEN)

    def check_health(self) -> None:
        """Ray replaces a replica for which this raises."""
        if self._client.gave_up:
            raise EngineLostError(self._client.trouble)

    async def __del__(self) -> None:
        """Ray calls this when the requests of a replica that must go have ended, or their time is over."""
        if not hasattr(self, "_app"):
            return
        self._reading.cancel()
        await drain(self._app.state.service, 0, asyncio.Event())
        await self._supervisor.stop()
        self._open.close()


def assigned_cores() -> int:
    """Cores that Ray has set aside for this replica."""
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def collected(message: Message, messages: asyncio.Queue[Message]) -> tuple[bytes, bool]:
    """The bytes of a body message and of those that wait behind it, and whether they are the last."""
    pieces: list[bytes] = [message.get("body", b"")]
    while message.get("more_body", False) and not messages.empty():
        message = messages.get_nowait()
        if message is BROKEN:
            messages.put_nowait(message)  # told after what came before it
            return b"".join(pieces), False
        pieces.append(message.get("body", b""))
    return b"".join(pieces), not message.get("more_body", False)
