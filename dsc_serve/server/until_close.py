"""Answers of unknown length to HTTP/1.0, which has no chunks: they end where the connection does."""

from __future__ import annotations

from typing import Any

from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle


def until_close(cycle: RequestResponseCycle, app: Any) -> Any:
    """`app`, whose answers to this request are sent as they are, without frames."""
    cycle.waiting_for_100_continue = False  # HTTP/1.0 knows of no answers before the answer

    async def serve(scope: Scope, receive: Receive, send: Send) -> None:
        open_ended = False

        async def sent(message: Message) -> None:
            nonlocal open_ended
            if message["type"] == "http.response.start":
                open_ended = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
                if open_ended:
                    cycle.chunked_encoding = False
            elif open_ended and scope["method"] != "HEAD":
                cycle.expected_content_length = len(message.get("body", b""))  # each part is as long as it says
            await send(message)

        await app(scope, receive, sent)

    return serve
