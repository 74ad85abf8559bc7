"""HTTP/1.1 connections that cannot be held open for nothing: limits on headers, on their time, and on slow readers."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from dsc_serve.config import LimitConfig
from dsc_serve.server import head
from dsc_serve.server.errors import ApiError
from dsc_serve.server.until_close import until_close

# What the transport's marks ask of a stream that waits: only when so much has been read may it go on.
PROGRESS = 48 * 1024
FRAMING = (b"content-length", b"transfer-encoding")
MAX_QUEUED = 8  # requests behind the one that is answered; then the connection is not read
SLICE = 512  # bytes parsed at a time outside of bodies of known length: some 30 requests at the most
NOTHING = memoryview(b"")


class Flow(FlowControl):
    """Does not let anybody go on reading while the connection holds back."""

    def __init__(self, transport: asyncio.Transport, held: Callable[[], bool]) -> None:
        super().__init__(transport)
        self._held = held

    def resume_reading(self) -> None:
        if not self._held():
            super().resume_reading()


class HttpConnection(HttpToolsProtocol):
    """One connection. The framework times only the pauses between requests; this times the headers too.

    It parses only as far as a short queue has room, and reads no more until it has parsed: what a client sends without
    reading answers stays in the system's buffers, and then with the client. Errors that end a connection before there
    is a request have the form of all others.
    """

    def __init__(self, *args: Any, limits: LimitConfig, max_connections: int, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits, self._max_connections = limits, max_connections
        self._head_timer: asyncio.TimerHandle | None = None
        self._awaits_head = True
        self._head_bytes = self._unparsed = 0  # of the head that is being parsed; since the last head or part of a body
        self._body_left = 0  # bytes, where the length is known
        self._rest = NOTHING  # read, and not parsed yet
        self._requests = 0
        self._fault: ApiError | None = None  # of the head that is being parsed
        self._refusal: ApiError | None = None  # to be said after the answers that are owed
        self._stuck_since: float | None = None
        self._unread = 0  # bytes, when that was noted
        self._answering: RequestResponseCycle | None = None
        self.lost = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = Flow(transport, self._holds_back)
        if len(self.connections) > self._max_connections:
            transport.abort()
            return
        self._time_head()
        if self._rest:  # it came with the end of the TLS handshake
            self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost = True
        if self.transport is None:
            return
        self._stop_timer()
        super().connection_lost(exc)
        self.pipeline.clear()
        self._rest = NOTHING
        if self._answering is not None:  # the framework tells only the last of the requests that have come
            self._answering.disconnected = True
            self._answering.message_event.set()

    def data_received(self, data: bytes) -> None:
        self._rest = memoryview(bytes(self._rest) + data if self._rest else data)
        if self.transport is not None:
            self._go_on()

    def shutdown(self) -> None:
        """End after the answer that is being given."""
        self.pipeline.clear()
        self._rest = NOTHING
        if self._answering is not None:
            self.cycle = self._answering
        super().shutdown()

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _last_has_come(self) -> bool:
        """Whether the connection ends with a request that has come whole: nothing behind it is looked at."""
        return self.cycle is not None and not self.cycle.keep_alive and not self.cycle.more_body

    @property
    def _full(self) -> bool:
        queued = self.pipeline
        return (
            self._refusal is not None
            or len(queued) >= MAX_QUEUED
            or sum(len(cycle.body) for cycle, _ in queued) > HIGH_WATER_LIMIT
        )

    def _holds_back(self) -> bool:
        return bool(self._rest) or self._full

    def _go_on(self) -> None:
        """Parse what has been read, as far as the queue has room."""
        self._unset_keepalive_if_required()
        most = self._limits.max_header_bytes
        while self._rest and not self._full and self._unparsed <= most and not self.transport.is_closing():
            size = len(self._rest) if self._last_has_come else self._body_left or SLICE
            part, self._rest = self._rest[:size], self._rest[size:]
            self._unparsed += len(part)
            if not self._last_has_come:
                self._parse(part)
        if self.transport.is_closing():
            self._rest = NOTHING
            return
        self._time_what_is_awaited()
        if self._holds_back():
            self.flow.pause_reading()
        elif self.pipeline:
            self.flow.resume_reading()  # nobody who does not read learns that the client has left

    def _parse(self, part: memoryview) -> None:
        try:
            self.parser.feed_data(part)
        except httptools.HttpParserUpgrade as asked:
            behind, self._rest = bytes(part[asked.args[0] :]) + bytes(self._rest), NOTHING
            self._parse_body(behind)
        except httptools.HttpParserError:
            self._refuse_request()

    def _time_what_is_awaited(self) -> None:
        if self._unparsed > self._limits.max_header_bytes:  # a head, or what may stand behind a body in pieces
            if self._busy:
                self.transport.abort()
            else:
                self._refuse_head()
        elif self._busy:
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
        self._head_bytes += len(name) + len(value) + 4
        if len(self.headers) <= head.MAX_HEADERS:  # one too many is enough to be refused for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._fault = self._head_too_large() or head.fault(self.parser.get_http_version(), self.headers)
        if self._fault is not None:
            raise ValueError(self._fault.message)  # which the parser hands on to `_parse`
        self._stop_timer()
        self._awaits_head, self._unparsed = False, 0
        self._body_left = next((int(value) for name, value in self.headers if name == b"content-length"), 0)
        super().on_headers_complete()
        self._requests += 1
        if 0 < self._limits.max_requests_per_connection <= self._requests:
            self.cycle.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, until_close(cycle, app) if cycle.scope["http_version"] == "1.0" else app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            return
        if self._refusal is not None and not self._busy:
            self._say(self._refusal)
            return
        if self._rest:
            self._go_on()
        self.flow.resume_reading()

    def on_body(self, body: bytes) -> None:
        self._unparsed = 0
        self._body_left = max(0, self._body_left - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return  # to the parser it is over; its body is still to come
        super().on_message_complete()
        self._awaits_head, self._unparsed, self._body_left = True, 0, 0

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

    def hang_up_if_stuck(self, now: float) -> None:
        """Drop a client that for too long has read too little of its answer, be it over or not, and one that has left
        while it is not read."""
        if self._holds_back() and has_left(self.transport):
            self.transport.abort()
        elif self._stuck_since is None:
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
            message = f"no request came within {self._limits.header_timeout_s:g} s"
            self._say(ApiError(408, message, code="request_timeout"))

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_too_large(self) -> ApiError | None:
        if max(self._head_bytes, self._unparsed) <= self._limits.max_header_bytes:
            return None
        return ApiError(
            431, f"the headers are larger than {self._limits.max_header_bytes} bytes", code="headers_too_large"
        )

    def _refuse_head(self) -> None:
        error = self._head_too_large()
        assert error is not None
        self._say(error)

    def _refuse_request(self) -> None:
        """Say what is wrong with what has come, after the answers to the requests before it."""
        error, self._fault = self._fault or self._head_too_large() or head.invalid("it is not valid HTTP/1.1"), None
        if self.pipeline and self.cycle.more_body:  # the queued one whose body it is
            self.pipeline.popleft()
            assert self._answering is not None
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering
        if not self._busy or (self.cycle.more_body and not self.cycle.response_started):
            self._say(error)
        elif self.cycle.more_body:
            self.transport.abort()
        else:
            self._refusal, self._rest = error, NOTHING

    def _say(self, error: ApiError) -> None:
        """Answer with an error that ends the connection."""
        error.headers = {"Connection": "close"}
        response = error.response()
        lines = b"".join(b"%b: %b\r\n" % header for header in response.raw_headers)
        self.transport.write(STATUS_LINE[error.status] + lines + b"\r\n" + bytes(response.body))
        self.transport.close()


def has_left(transport: asyncio.Transport) -> bool:
    """Whether the other side has ended the connection, though what it sent before has not been read."""
    looking = select.poll()
    looking.register(transport.get_extra_info("socket").fileno(), select.POLLRDHUP)
    return bool(looking.poll(0))


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
