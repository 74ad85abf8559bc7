"""A tab of a browser that shows the page, and a server in this process to show it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI

from support.serving import live

KEY = "k" * 16
Serve = Callable[..., str]


@dataclass
class Visit:
    """A tab that shows a page."""

    page: Any
    url: str
    asked: list[str] = field(default_factory=list)  # the addresses that it asked for
    wrong: list[str] = field(default_factory=list)  # what its console and its scripts said

    def open(self) -> Visit:
        self.page.goto(self.url)
        self.until("model.options.length > 0 || notice.textContent !== ''")
        return self

    def until(self, condition: str, limit_s: float = 20) -> None:
        """Until an expression holds in the page, whose policy keeps the driver's own way of waiting out."""
        end = time.monotonic() + limit_s
        while not self.page.evaluate(condition):
            assert time.monotonic() < end, condition
            time.sleep(0.02)

    def chat(self, text: str) -> None:
        self.page.fill("#message", text)
        self.page.press("#message", "Enter")

    def field(self, name: str, value: str) -> None:
        self.page.evaluate("name => { document.getElementById(name).closest('details').open = true }", name)
        (self.page.select_option if name == "form-kind" else self.page.fill)(f"#{name}", value)

    def answered(self) -> str:
        """The last answer, once it is whole."""
        self.page.wait_for_selector(".message:last-child .facts:not(:empty)")
        self.page.wait_for_selector(".send:enabled >> visible=true")
        return str(self.page.inner_text(".message:last-child .text"))

    def notice(self) -> str:
        self.page.wait_for_selector("#notice:not(:empty)")
        return str(self.page.inner_text("#notice"))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.page.evaluate(script, *arguments)


OpenTab = Callable[..., Visit]


@contextmanager
def in_thread(app: FastAPI) -> Iterator[str]:
    """The app over a real socket, in an event loop of its own."""
    loop, stopping = asyncio.new_event_loop(), asyncio.Event()
    ports: list[int] = []
    ready = threading.Event()

    async def run() -> None:
        async with live(app) as port:
            ports.append(port)
            ready.set()
            await stopping.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert ready.wait(20)
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loop.call_soon_threadsafe(stopping.set)
        thread.join(30)
        loop.close()
