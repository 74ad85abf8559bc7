"""The API process's side of the engine process: submit requests, receive their tokens. Free of torch."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.terms import Terms
from dsc_serve.worker.messages import (
    HEADER,
    MAX_FRAME,
    Delta,
    Finish,
    ModelInfo,
    Shutdown,
    Stats,
    StatsRequest,
    StepDone,
    Submit,
    ToEngine,
    frame,
    from_engine_decoder,
)

log = logging.getLogger(__name__)


class EngineDiedError(RuntimeError):
    """The engine process is gone; requests that were in flight have ended with an error."""


class EngineClient:
    """Multiplexes requests over one connection to an engine process.

    `generate` yields deltas until one has a finish reason; leaving the iterator early finishes the request in the
    engine. `in_flight` counts the requests that have not ended.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, model: ModelInfo) -> None:
        self.model = model
        self._reader, self._writer = reader, writer
        self._queues: dict[str, asyncio.Queue[Delta]] = {}
        self._stats: dict[int, asyncio.Future[Stats]] = {}
        self._tickets = itertools.count()
        self._dead: str | None = None
        self._pump = asyncio.create_task(self._receive())

    @property
    def in_flight(self) -> int:
        return len(self._queues)

    @property
    def alive(self) -> bool:
        return self._dead is None

    async def generate(
        self, request_id: str, prompt: list[int], params: SamplingParams, terms: Terms | None = None
    ) -> AsyncGenerator[Delta, None]:
        """Yield what the engine generates. Raises EngineDiedError if it is not running."""
        if self._dead is not None:
            raise EngineDiedError(self._dead)
        if request_id in self._queues:
            raise ValueError(f"request id {request_id!r} is in use")
        queue: asyncio.Queue[Delta] = asyncio.Queue()
        self._queues[request_id] = queue
        ended = False
        try:
            await self._send(Submit(request_id, prompt, params, terms or Terms()))
            while not ended:
                delta = await queue.get()  # ended by the engine's finish, by its death, or by the caller's cancellation
                ended = delta.finish_reason is not None
                yield delta
        finally:
            self._queues.pop(request_id, None)
            if not ended:
                self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str) -> None:
        """End a request in the engine. Safe to call twice, and for a request that has already ended."""
        if self._dead is None:
            self._writer.write(frame(Finish(request_id, reason)))

    async def stats(self, timeout_s: float = 1.0) -> Stats:
        """The engine's state now. Raises TimeoutError when it does not answer, EngineDiedError when it is gone."""
        if self._dead is not None:
            raise EngineDiedError(self._dead)
        ticket = next(self._tickets)
        future: asyncio.Future[Stats] = asyncio.get_running_loop().create_future()
        self._stats[ticket] = future
        try:
            await self._send(StatsRequest(ticket))
            return await asyncio.wait_for(future, timeout_s)
        finally:
            self._stats.pop(ticket, None)

    async def close(self) -> None:
        """Ask the engine to stop and close the connection."""
        if self._dead is None:
            self._writer.write(frame(Shutdown()))
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._lose("the server is shutting down")
        self._writer.close()

    async def _send(self, message: ToEngine) -> None:
        self._writer.write(frame(message))
        await self._writer.drain()

    async def _receive(self) -> None:
        try:
            while True:
                (size,) = HEADER.unpack(await self._reader.readexactly(HEADER.size))
                if size > MAX_FRAME:
                    raise EngineDiedError(f"the engine sent a frame of {size} bytes; at most {MAX_FRAME} are allowed")
                message = from_engine_decoder.decode(await self._reader.readexactly(size))
                if isinstance(message, StepDone):
                    for delta in message.deltas:
                        queue = self._queues.get(delta.request_id)
                        if queue is not None:
                            queue.put_nowait(delta)
                elif isinstance(message, Stats):
                    future = self._stats.get(message.ticket)
                    if future is not None and not future.done():
                        future.set_result(message)
        except (asyncio.IncompleteReadError, ConnectionError):
            self._lose("the engine process has ended")
        except Exception as error:
            self._lose(f"the engine's messages cannot be read: {error}")
            raise
        finally:
            if self._dead is not None:
                log.error("%s; until the server is restarted, requests are answered with an error", self._dead)

    def _lose(self, reason: str) -> None:
        if self._dead is not None:
            return
        self._dead = reason
        for request_id, queue in self._queues.items():
            queue.put_nowait(Delta(request_id, [], "error", error=reason))
        for future in self._stats.values():
            if not future.done():
                future.set_exception(EngineDiedError(reason))
