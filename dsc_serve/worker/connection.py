"""The open connection to one engine process. Free of torch."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from dsc_serve.adapter_choice import AdapterInfo
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.frames import HEADER, FrameError, size_of
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.messages import (
    MAX_FRAME,
    AdapterList,
    CheckGrammar,
    Delta,
    ForgetGrammar,
    FromEngine,
    GrammarChecked,
    ListAdapters,
    ListTenants,
    ModelInfo,
    Shutdown,
    Stats,
    StatsRequest,
    StepDone,
    TenantList,
    ToEngine,
    frame,
    from_engine_decoder,
)

T = TypeVar("T")


class EngineDiedError(RuntimeError):
    """The engine is gone, or the request it held cannot be ended by it; the text says why."""


async def receive(reader: asyncio.StreamReader) -> FromEngine:
    """The next message. Raises EngineDiedError when none can come any more."""
    try:
        size = size_of(await reader.readexactly(HEADER.size), MAX_FRAME)
        message: FromEngine = from_engine_decoder.decode(await reader.readexactly(size))
        return message
    except (asyncio.IncompleteReadError, ConnectionError):
        raise EngineDiedError("the engine process has ended") from None
    except (FrameError, msgspec.MsgspecError) as error:
        raise EngineDiedError(f"the engine's messages cannot be read: {error}") from error


def answer_with(asked: dict[int, asyncio.Future[T]], ticket: int, message: T) -> None:
    """Tell who asked, where somebody still waits."""
    answer = asked.get(ticket)
    if answer is not None and not answer.done():
        answer.set_result(message)


class EngineConnection:
    """Hands every delta that the engine sends to `on_delta`, until it ends; `lost` then holds the reason.

    heard: when the engine last sent anything, in monotonic seconds.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        model: ModelInfo,
        on_delta: Callable[[Delta], None],
    ) -> None:
        self.model, self.heard = model, time.monotonic()
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._reader, self._writer, self._on_delta = reader, writer, on_delta
        self._stats: dict[int, asyncio.Future[Stats]] = {}
        self._checks: dict[int, asyncio.Future[GrammarChecked]] = {}
        self._lists: dict[int, asyncio.Future[AdapterList]] = {}
        self._tenants: dict[int, asyncio.Future[TenantList]] = {}
        self._tickets = itertools.count()
        self._pump = asyncio.create_task(self._receive())

    def send(self, message: ToEngine) -> None:
        """Queue a message; nothing happens where the connection has ended."""
        if not self.lost.done():
            self._writer.write(frame(message))

    async def stats(self, timeout_s: float) -> Stats:
        """The engine's state now. Raises TimeoutError when it does not answer, EngineDiedError when it is gone."""
        return await self._ask(self._stats, StatsRequest, timeout_s)

    async def adapters(self, timeout_s: float) -> list[AdapterInfo]:
        """The adapters that there are. Raises as `stats`."""
        return (await self._ask(self._lists, ListAdapters, timeout_s)).adapters

    async def tenants(self, timeout_s: float) -> TenantsReport:
        """What tenants have picked. Raises as `stats`."""
        return (await self._ask(self._tenants, ListTenants, timeout_s)).report

    async def _ask(
        self, asked: dict[int, asyncio.Future[T]], question: Callable[[int], ToEngine], timeout_s: float
    ) -> T:
        """The answer to a question with a ticket."""
        if self.lost.done():
            raise EngineDiedError(self.lost.result())
        ticket = next(self._tickets)
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        asked[ticket] = answer
        try:
            self.send(question(ticket))
            async with asyncio.timeout(timeout_s):
                return await answer
        finally:
            asked.pop(ticket, None)

    async def check_grammar(self, asked: StructuredOutputs) -> GrammarChecked:
        """Whether a grammar can be used. Leaving early stops its compilation. Raises EngineDiedError."""
        if self.lost.done():
            raise EngineDiedError(self.lost.result())
        ticket = next(self._tickets)
        answer: asyncio.Future[GrammarChecked] = asyncio.get_running_loop().create_future()
        self._checks[ticket] = answer
        try:
            self.send(CheckGrammar(ticket, asked))
            return await answer
        finally:
            self._checks.pop(ticket, None)
            if not answer.done() or answer.cancelled():
                self.send(ForgetGrammar(ticket))

    def lose(self, reason: str) -> None:
        """End the connection. Safe to call twice: the first reason stands."""
        if self.lost.done():
            return
        self.lost.set_result(reason)
        asked: list[dict[int, asyncio.Future[Any]]] = [self._stats, self._checks, self._lists, self._tenants]
        waiting = [answer for own in asked for answer in own.values()]
        for answer in waiting:
            if not answer.done():
                answer.set_exception(EngineDiedError(reason))
        self._pump.cancel()
        self._writer.close()

    def shut_down(self, reason: str) -> None:
        """Ask the engine to stop, and end the connection."""
        self.send(Shutdown())
        self.lose(reason)

    async def _receive(self) -> None:
        try:
            while True:
                message = await receive(self._reader)
                self.heard = time.monotonic()
                if isinstance(message, StepDone):
                    for delta in message.deltas:
                        self._on_delta(delta)
                elif isinstance(message, Stats):
                    answer_with(self._stats, message.ticket, message)
                elif isinstance(message, GrammarChecked):
                    answer_with(self._checks, message.ticket, message)
                elif isinstance(message, AdapterList):
                    answer_with(self._lists, message.ticket, message)
                elif isinstance(message, TenantList):
                    answer_with(self._tenants, message.ticket, message)
        except EngineDiedError as error:
            self.lose(str(error))
        except Exception as error:
            self.lose(f"the engine's messages cannot be used: {error}")
            raise
