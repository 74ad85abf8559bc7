"""Many streams at a time on one server, each followed to its end."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

LIMIT_S = 60


@dataclass
class Stream:
    """What one client saw."""

    body: dict[str, Any]
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    text: str = ""
    done: bool = False
    end: float = 0.0  # the moment of the last byte
    begun: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def error(self) -> str:
        """The message of the error that ended it, be it an event or the whole answer."""
        if self.status != 200:
            return str(json.loads(self.text)["error"]["message"])
        return next((event["error"]["message"] for event in self.events if "error" in event), "")

    @property
    def finished(self) -> bool:
        """Whether it came to the end it asked for."""
        reasons = [choice["finish_reason"] for event in self.events for choice in event.get("choices", [])]
        return self.done and bool(reasons) and reasons[-1] in ("stop", "length") and not self.error

    async def run(self, url: str) -> Stream:
        address = urlsplit(url)
        body = json.dumps({"stream": True, "ignore_eos": True, **self.body}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        try:
            async with asyncio.timeout(LIMIT_S):
                writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
                self.status = int((await reader.readline()).split()[1])
                while (header := await reader.readline()) not in (b"\r\n", b""):
                    name, _, value = header.decode().partition(":")
                    self.headers[name.lower()] = value.strip()
                while line := await reader.readline():
                    self.take(line)
        finally:
            self.end = time.monotonic()
            writer.close()
        return self

    def take(self, line: bytes) -> None:
        text = line.decode()
        if self.status != 200:
            self.text += text
        elif text.startswith("data: {"):
            self.events.append(json.loads(text[6:]))
            self.begun.set()
        elif text.startswith("data: [DONE]"):
            self.done = True


async def all_begun(streams: list[Stream]) -> None:
    async with asyncio.timeout(LIMIT_S):
        for stream in streams:
            await stream.begun.wait()
