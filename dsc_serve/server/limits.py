"""What the server lets in: how large a body, how many requests at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from fastapi import Request
from starlette.requests import ClientDisconnect

from dsc_serve.server.errors import ApiError, bad_request, shown

MAX_BODY_BYTES = 8 * 2**20
MAX_DRAINED_BYTES = 4 * MAX_BODY_BYTES
BODY_TIMEOUT_S = 60.0
SEND_TIMEOUT_S = 60.0
RETRY_AFTER_S = 1


class Permits:
    """Counts the requests in the house, queued and running, one for each prompt and choice."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.held = 0

    def check(self, count: int, param: str) -> None:
        """Raises ApiError (400) when so many could never be let in, naming `param`."""
        if count > self.capacity:
            raise bad_request(
                param, f"{param} asks for {count} generations at once; this server holds at most {self.capacity}"
            )

    @contextmanager
    def hold(self, count: int) -> Iterator[None]:
        """Take `count` permits at once for as long as the block runs. Raises ApiError (429) when they are not free."""
        if self.held + count > self.capacity:
            raise ApiError(
                429,
                f"the server is full: {self.held} of {self.capacity} places are taken and the request needs {count}; "
                f"try again in {RETRY_AFTER_S} s",
                type="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.held += count
        try:
            yield
        finally:
            self.held -= count


def check_headers(request: Request) -> None:
    """Raises ApiError unless the body is announced as plain JSON."""
    # Insisting on the type also keeps web pages of other origins from posting without the browser asking first.
    kind, _, options = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json":
        raise bad_request(None, f"content-type is {shown(kind.strip())}; it must be application/json", "invalid_type")
    charset = options.partition("charset=")[2].strip().strip('"').lower()
    if charset not in ("", "utf-8", "utf8"):
        raise bad_request(None, f"charset is {shown(charset)}; it must be utf-8", "invalid_type")
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding != "identity":
        raise bad_request(None, f"content-encoding is {shown(encoding)}; the body must not be compressed")


async def read_body(request: Request) -> bytes:
    """The whole body of a JSON request.

    Raises ApiError: 400 for wrong headers or no body, 413 beyond MAX_BODY_BYTES, 408 when it takes too long; and
    ClientDisconnect.
    """
    check_headers(request)
    announced = request.headers.get("content-length", "")
    too_large = announced.isdecimal() and (len(announced) > 18 or int(announced) > MAX_BODY_BYTES)
    if too_large and "expect" in request.headers:  # the client waits for leave to send, so nothing is on its way
        raise body_too_large()
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                # A client reads no answer while it still sends, so a body that is too large is read on, up to a limit.
                if size > MAX_BODY_BYTES or too_large:
                    too_large = True
                    chunks.clear()
                    if size > MAX_DRAINED_BYTES:
                        raise body_too_large()
                else:
                    chunks.append(chunk)
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {BODY_TIMEOUT_S:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    if too_large:
        raise body_too_large()
    if not size:
        raise bad_request(None, "the body is empty; it must be a JSON object", "invalid_json")
    return b"".join(chunks)


def body_too_large() -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {MAX_BODY_BYTES} bytes; send less in one request",
        code="request_too_large",
        headers={"Connection": "close"},
    )
