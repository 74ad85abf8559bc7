"""HTTP/1.1 connections that cannot be held open for nothing: limits on headers, on their time, and on slow readers."""

from __future__ import annotations

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dsc_serve.config import LimitConfig
from dsc_serve.server.errors import ApiError

# What the transport's marks ask of a stream that waits: only when so much has been read may it go on.
PROGRESS = 48 * 1024
FRAMING = (b"content-length", b"transfer-encoding")


class HttpConnection(HttpToolsProtocol):
    """One connection. The framework times only the pauses between requests; this times the headers too.

    Errors that end a connection before there is a request have the form of all others.
    """

    def __init__(self, *args: Any, limits: LimitConfig, max_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits, self._max_connections = limits, max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._awaits_head = True
        self._head_bytes = self._unparsed = 0  # of the head that is being parsed; since the last head or part of a body
        self._stuck_since: float | None = None
        self._unread = 0  # bytes, when that was noted
        self._answering: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)
        if self._answering is not None:  # the framework tells only the last of the requests that have come
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._unparsed += len(data)
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as asked:
            self._parse_body(data[asked.args[0] :])
        except httptools.HttpParserError:
            self._refuse_request()
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._unparsed > self._limits.max_header_bytes:  # a head, or what may stand behind a body in pieces
            if answering:
                self.transport.abort()
            else:
                self._refuse_head()
        elif answering:
            return
        elif self._awaits_head and not self._unparsed:  # the body of a request that was refused has ended
            self._stop_timer()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        elif self._head_timer is None:
            self._time_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._head_bytes += len(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._head_bytes += len(name) + len(value) + 4

    def on_headers_complete(self) -> None:
        if self._head_bytes > self._limits.max_header_bytes:
            raise ValueError("headers too large")  # the parser hands it on to send_400_response
        self._stop_timer()
        self._awaits_head, self._unparsed = False, 0
        super().on_headers_complete()
        if len(self.pipeline) == 1:
            self.flow.resume_reading()  # nobody who does not read learns that the client has left

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # to the parser it is over; its body is still to come
        super().on_message_complete()
        self._awaits_head, self._unparsed = True, 0

    def pause_writing(self) -> None:
        self._note_unread(self.loop.time())
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stuck_since = None
        super().resume_writing()

    def _parse_body(self, data: bytes) -> None:
        """Go on with a request that asks for another protocol, such as h2c, as if it did not, and then hang up.

        The parser takes what follows for that protocol's, but clients that merely offer it send their body.
        """
        self.cycle.keep_alive = False
        framing = b"".join(b"%b: %b\r\n" % header for header in self.headers if header[0] in FRAMING)
        self.parser = httptools.HttpRequestParser(Body(self))
        try:
            self.parser.feed_data(b"POST / HTTP/1.1\r\n%b\r\n%b" % (framing, data))
        except httptools.HttpParserError:
            self._refuse_request()

    def _refuse_request(self) -> None:
        if self._head_bytes > self._limits.max_header_bytes:
            self._refuse_head()
        else:
            self._refuse(400, "the request is not valid HTTP/1.1", "invalid_http")

    def hang_up_if_stuck(self, now: float) -> None:
        """Drop a client that for too long has read too little of its answer, be it over or not."""
        if self._stuck_since is None:
            if self.transport.is_closing():
                self._note_unread(now)
        elif self.transport.get_write_buffer_size() <= self._unread - PROGRESS:
            self._note_unread(now)
        elif now - self._stuck_since > self._limits.send_timeout_s:
            self.transport.abort()

    def _note_unread(self, now: float) -> None:
        self._stuck_since, self._unread = now, self.transport.get_write_buffer_size()

    def _time_head(self) -> None:
        self._head_timer = self.loop.call_later(self._limits.header_timeout_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"no request came within {self._limits.header_timeout_s:g} s", "request_timeout")

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers are larger than {self._limits.max_header_bytes} bytes", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        response = ApiError(status, message, code=code, headers={"Connection": "close"}).response()
        head = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()


class Body:
    """Hears of one body, and of nothing that its parser finds behind it."""

    def __init__(self, connection: HttpConnection) -> None:
        self._connection = connection
        self._over = False

    def on_body(self, data: bytes) -> None:
        if not self._over:
            self._connection.on_body(data)

    def on_message_complete(self) -> None:
        if not self._over:
            self._over = True
            self._connection.on_message_complete()
