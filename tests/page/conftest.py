"""A real browser, and the servers whose page it shows. Without them these tests are skipped with the line to type."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import tokenizers
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.programs import BROWSER, program
from support.running_server import RunningServer, start_server, stop_server
from support.serving import live
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.config import AccessConfig, EngineConfig, ServerConfig
from dsc_serve.server.app import create_app
from dsc_serve.server.keys import KeyRing
from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
KEY = "k" * 16


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/page/" in str(item.path):
            item.add_marker(pytest.mark.full)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[page]'")
    path = program(BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A tab that shows a page. asked: the addresses that it asked for; wrong: what its console and its scripts said."""

    page: Any
    url: str
    asked: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

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


@pytest.fixture
def tab(chromium: Any) -> Iterator[OpenTab]:
    """Opens a tab without cookies or storage of others; at its end nothing may have gone wrong in it, or left it."""
    with ExitStack() as stack:
        visits: list[Visit] = []

        def open_tab(url: str, *, expected: str = "", at_once: bool = True, **options: Any) -> Visit:
            context = stack.enter_context(
                chromium.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
            )
            visit = Visit(context.new_page(), url)
            visits.append(visit)
            visit.page.set_default_timeout(20_000)
            visit.page.on("request", lambda request: visit.asked.append(request.url))
            visit.page.on("pageerror", lambda error: visit.wrong.append(str(error)))
            visit.page.on(
                "console",
                lambda said: (
                    said.type == "error"
                    and (not expected or expected not in said.text)
                    and visit.wrong.append(said.text)
                ),
            )
            return visit.open() if at_once else visit

        yield open_tab
        for visit in visits:
            assert visit.wrong == []
            origin = "/".join(visit.url.split("/")[:3])
            assert [address for address in visit.asked if not address.startswith(origin)] == []


@pytest.fixture(scope="session")
def tiny() -> Iterator[RunningServer]:
    """The embedded model, served with its defaults."""
    server = start_server("--threads", "1")
    yield server
    assert stop_server(server) == 0


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, eos_token_id=None, chat_template=ChatTemplate(TEMPLATE, {}))


Serve = Callable[..., str]


@pytest.fixture
def scripted(bytes_tokenizer: Tokenizer) -> Iterator[Serve]:
    """Serves an engine that says what it is told to; gives the server's address."""
    with ExitStack() as stack:

        def serve(
            engine: FakeEngine, keys: str = "", metrics_key: bool = False, wrap: Any = None, **settings: Any
        ) -> str:
            engine.capacity = type(engine.capacity)(300, 512, 64, 16)  # without atoms
            config = ServerConfig(
                **{"served_model_name": "fake", **settings},
                access=AccessConfig(metrics_key=metrics_key),
                engine=EngineConfig(max_running=2),
            )
            app = create_app(config, engine, bytes_tokenizer, KeyRing("", keys))
            if wrap is not None:
                app.add_middleware(wrap)
            return stack.enter_context(in_thread(app))

        yield serve


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
