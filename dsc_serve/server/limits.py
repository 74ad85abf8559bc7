"""The bodies that the server reads: how large, and how long they may take."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter

from fastapi import Request
from starlette.requests import ClientDisconnect

from dsc_serve.config import ServerConfig
from dsc_serve.server.admission import too_many
from dsc_serve.server.errors import ApiError, bad_request, shown
from dsc_serve.server.middleware import EXCHANGE, Exchange

log = logging.getLogger(__name__)

MAX_DRAINED = 4  # times the largest body that is kept
MAX_READING = 2**28  # bytes that one app keeps of bodies that have not arrived whole: their requests have no place yet
KEY_SHARE = 4  # a key may have one part in so many of these
SMALL = 2**16  # bytes of one body that are always kept: the number of connections bounds them


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

    Raises ApiError: 400 for wrong headers or no body, 413 beyond the server's limit, 429 where too much is being read
    already, 408 when it takes too long; and ClientDisconnect. `app.state.reading` is what is being read, in bytes, by
    the name of the key.
    """
    config: ServerConfig = request.app.state.config
    reading: Counter[str] = request.app.state.reading
    name = key_name(request)
    limit, timeout_s = config.limits.max_body_bytes, config.limits.body_timeout_s
    check_headers(request)
    announced = request.headers.get("content-length", "")
    too_large = announced.isdecimal() and (len(announced) > 18 or int(announced) > limit)
    if too_large and "expect" in request.headers:  # the client waits for leave to send, so nothing is on its way
        raise body_too_large(limit)
    chunks: list[bytes] = []
    size = kept = 0
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                chunk: bytes = message.get("body", b"")
                size += len(chunk)
                # A client reads no answer while it still sends, so a body that is too large is read on, up to a limit.
                if size > limit or too_large:
                    too_large = True
                    chunks.clear()
                    reading[name] -= kept
                    kept = 0
                    if size > MAX_DRAINED * limit:
                        raise body_too_large(limit)
                else:
                    chunks.append(chunk)
                    kept += len(chunk)
                    reading[name] += len(chunk)
                    share = max(MAX_READING // KEY_SHARE, limit) if name else reading[name]
                    if kept > SMALL and (reading.total() > max(MAX_READING, limit) or reading[name] > share):
                        raise too_many("the server is reading as many requests as it has memory for", "queue_full")
                if not message.get("more_body", False):
                    break
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {timeout_s:g} s",
            code="request_timeout",
            headers={"Connection": "close"},
        ) from None
    finally:
        reading[name] -= kept
        if not reading[name]:
            del reading[name]
    if too_large:
        raise body_too_large(limit)
    if not size:
        raise bad_request(None, "the body is empty; it must be a JSON object", "invalid_json")
    body = b"".join(chunks)
    if config.log.log_prompts:
        log.info("request body", extra={"facts": {"body": body.decode("utf-8", "replace")}})
    return body


def key_name(request: Request) -> str:
    """Of the key that it came with; "" where none is needed, or somebody behind this server asks for it."""
    exchange: Exchange | None = request.scope.get(EXCHANGE)
    return "" if exchange is None or exchange.key is None else exchange.key.name


def body_too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes; send less in one request",
        code="request_too_large",
        headers={"Connection": "close"},
    )
