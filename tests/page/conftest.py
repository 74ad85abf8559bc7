"""A real browser, and the servers whose page it shows. Without them these tests are skipped with the line to type."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import tokenizers
from support.browsing import OpenTab, Serve, Visit, in_thread
from support.fake_engine import FakeEngine
from support.programs import BROWSER, program
from support.running_server import RunningServer, start_server, stop_server
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.config import AccessConfig, EngineConfig, ServerConfig
from dsc_serve.server.app import create_app
from dsc_serve.server.keys import KeyRing
from dsc_serve.text.chat import ChatTemplate
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer

TEMPLATE = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install -e '.[page]'")
    path = program(BROWSER)
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, chromium_sandbox=os.geteuid() != 0)
        yield browser
        browser.close()


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
