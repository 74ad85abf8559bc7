"""A light HTTP/1.1 client for measuring: what it costs per event is taken from the server beside it.

Bytes go from the socket's callback through a C parser to the caller, with no task switch per event.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

from dsc_serve.config import ConfigError

MAX_LINE = 16 * 2**20
IDLE_S = 1.0  # servers close connections that idle for longer; a shorter pause is no reason


class DisconnectError(ConnectionError):
    """The server closed the connection before its answer was whole."""


class ProtocolError(ValueError):
    """The server sent something that is not HTTP, or not server-sent events."""


class Endpoint:
    """Where a server listens, from a URL of the form http(s)://host[:port][/path]; a final /v1 is dropped.

    Raises ConfigError for any other.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        unused = parts.query or parts.fragment or parts.username is not None
        if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or unused:
            raise ConfigError(f"url is {url!r}; it must be of the form http://host:port")
        self.host = parts.hostname
        self.port = port or (443 if parts.scheme == "https" else 80)
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self._authority = parts.netloc

    def request(self, method: str, path: str, body: bytes = b"", api_key: str = "") -> bytes:
        """The bytes of a request."""
        lines = [f"{method} {self.path}{path} HTTP/1.1", f"Host: {self._authority}", "Accept: */*"]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        if api_key:
            lines.append(f"Authorization: Bearer {api_key}")
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


class ClientConnection(asyncio.Protocol):
    """One keep-alive connection; one exchange at a time.

    heard: whether the present or last exchange was answered at all. ended: when the last one did, in the loop's time.
    """

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._done: asyncio.Future[int] | None = None
        self._on_body: Callable[[bytes], None] | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._keep = False
        self.heard = False
        self.ended = 0.0

    @classmethod
    async def open(cls, endpoint: Endpoint) -> ClientConnection:
        """Connect. Raises OSError."""
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(cls, endpoint.host, endpoint.port, ssl=endpoint.tls)
        return connection

    @property
    def usable(self) -> bool:
        """Whether another exchange can follow."""
        return self._transport is not None and not self._transport.is_closing() and self._done is None

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> int:
        """Send a request and return the answer's status once it is whole; its body goes to `on_body` as it arrives.

        Raises DisconnectError and ProtocolError. Cancelling closes the connection, and so ends the request at the
        server.
        """
        if self._transport is None or not self.usable:
            raise DisconnectError("the connection is closed")
        self._done = asyncio.get_running_loop().create_future()
        self._on_body = on_body
        self._parser = httptools.HttpResponseParser(self)
        self._keep = self.heard = False
        try:
            self._transport.write(request)
            return await self._done
        finally:
            self._done = self._on_body = None
            if not self._keep:
                self.close()

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def _fail(self, error: Exception) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    # Called by the event loop.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        if self._done is None:  # bytes that nobody asked for
            self.close()
            return
        self.heard = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            self._fail(cause if isinstance(cause, ProtocolError) else ProtocolError(str(cause or error)))
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._fail(ProtocolError(f"not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._fail(DisconnectError(str(error) if error else "the server closed the connection"))

    # Called by the parser.

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._on_body is not None:
            self._on_body(body)

    def on_message_complete(self) -> None:
        # An interim answer such as 100 Continue is not the one that was waited for.
        if self._done is not None and not self._done.done() and self._status >= 200:
            self._keep = self._parser.should_keep_alive()
            self._done.set_result(self._status)


class Connections:
    """The open connections to one server, used again while they live. A context manager that closes them all."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._idle: list[ClientConnection] = []

    async def exchange(self, request: bytes, on_body: Callable[[bytes], None]) -> int:
        """As Connection.exchange, on an idle connection or a new one. Also raises OSError when none can be made.

        Where one that was idle for IDLE_S ends without a word of an answer, its server was closing it when the request
        came: that is no failure, and the request goes out once more.
        """
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                idle_s = asyncio.get_running_loop().time() - connection.ended
                try:
                    return await self._exchange(connection, request, on_body)
                except DisconnectError:
                    if connection.heard or idle_s < IDLE_S:
                        raise
                    break
        return await self._exchange(await ClientConnection.open(self._endpoint), request, on_body)

    async def _exchange(self, connection: ClientConnection, request: bytes, on_body: Callable[[bytes], None]) -> int:
        try:
            return await connection.exchange(request, on_body)
        finally:
            if connection.usable:
                connection.ended = asyncio.get_running_loop().time()
                self._idle.append(connection)

    def __enter__(self) -> Connections:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._idle:
            with contextlib.suppress(OSError):
                connection.close()


class EventReader:
    """Server-sent events out of a body that arrives in pieces."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, body: bytes) -> list[bytes]:
        """The data of the events that these bytes complete. Raises ProtocolError on a line without end."""
        lines = (self._rest + body).split(b"\n")
        self._rest = lines.pop()
        if len(self._rest) > MAX_LINE:
            raise ProtocolError(f"a line of the event stream is longer than {MAX_LINE} bytes")
        events: list[bytes] = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                events.append(b"\n".join(self._data))
                self._data = []
        return events
