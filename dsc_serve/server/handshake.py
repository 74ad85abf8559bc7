"""Connections that have still to agree on TLS: they count, and have no more time than headers have."""

from __future__ import annotations

import asyncio
import ssl
import types
from collections.abc import Coroutine, Generator
from typing import Any

from dsc_serve.server.protocol import HttpConnection


class Handshake(asyncio.Protocol):
    """Becomes `connection` once TLS is agreed on. pending: all that have not come so far, which it is one of.

    The event loop's own servers tell nobody of a connection before that: it would not count, and not end in time.
    """

    def __init__(
        self, connection: HttpConnection, context: ssl.SSLContext, pending: set[Handshake], most: int, limit_s: float
    ) -> None:
        self._connection, self._context, self._pending = connection, context, pending
        self._most, self._limit_s = most, limit_s
        self._transport: asyncio.Transport | None = None
        self._task: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        if len(self._connection.connections) + len(self._pending) >= self._most:
            transport.abort()
            return
        self._pending.add(self)
        loop = asyncio.get_running_loop()
        agreeing = loop.start_tls(
            transport, self._connection, self._context, server_side=True, ssl_handshake_timeout=self._limit_s
        )
        # Begun at once: what the client sends may be read before a task has its first turn.
        waits_for = agreeing.send(None)
        self._task = loop.create_task(self._agree(rest_of(agreeing, waits_for)))

    def abort(self) -> None:
        self._pending.discard(self)
        if self._transport is not None:
            self._transport.abort()
        if self._task is not None:
            self._task.cancel()

    async def _agree(self, agreeing: Coroutine[Any, None, asyncio.Transport | None]) -> None:
        assert self._transport is not None
        try:
            secured = await agreeing
        except (OSError, RuntimeError):  # it is no TLS, or too late, or the client has left
            self._transport.abort()
        else:
            assert secured is not None
            if self._connection.lost:
                secured.abort()
            else:
                self._connection.connection_made(secured)
        finally:
            self._pending.discard(self)


@types.coroutine
def rest_of(
    begun: Coroutine[Any, None, asyncio.Transport | None], waits_for: object
) -> Generator[Any, None, asyncio.Transport | None]:
    """What is left of a coroutine that has taken its first step, which ended with waiting for something."""
    try:
        yield waits_for
    except BaseException as error:
        begun.throw(error)
    secured: asyncio.Transport | None = yield from begun
    return secured
