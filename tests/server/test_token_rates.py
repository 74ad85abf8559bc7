"""Tokens a minute of a key: set aside before a request begins, settled by what it took when it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI
from support.access import ALICE, Write, bearer, entry
from support.fake_engine import CONTEXT, FakeEngine, saying
from support.serving import MESSAGES, app_around, ask, client_of, service_of, until

from dsc_serve.server.admission import Rate
from dsc_serve.server.keys import KeyRing
from dsc_serve.text.tokenizer import Tokenizer

App = Callable[[int], FastAPI]


@pytest.fixture
def limited(engine: FakeEngine, tokenizer: Tokenizer, write: Write) -> App:
    """An app whose only key may use so many tokens a minute, and for whose rates no time goes by."""

    def made(tokens: int) -> FastAPI:
        ring = KeyRing(write(entry("alice", ALICE, tokens_per_minute=tokens)), "")
        app = app_around(engine, tokenizer, ring, max_waiting=100)
        service_of(app).admission._clock = lambda: 0.0
        return app

    return made


def generate(app: FastAPI, **fields: object) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", headers=bearer(ALICE), json={"prompt": [1], **fields})


def level(app: FastAPI) -> float:
    """Tokens that the key has left."""
    return service_of(app).admission._accounts["alice"].tokens._level


def test_a_request_is_let_in_only_where_all_it_may_take_is_left(limited: App) -> None:
    app = limited(20)
    assert generate(app, prompt=[1] * 5, max_tokens=5).status_code == 200
    refused = generate(app, prompt=[1] * 4, max_tokens=16)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limited"
    assert refused.headers["retry-after"] == "30", "10 tokens are missing, and 3 s for each"
    assert generate(app, prompt=[1] * 4, max_tokens=6).status_code == 200


def test_what_was_not_taken_is_given_back(limited: App, engine: FakeEngine) -> None:
    engine.script = saying("ab")
    app = limited(60)
    for _ in range(5):
        assert generate(app, prompt=[1] * 3, max_tokens=30).status_code == 200
    assert level(app) == 60 - 5 * (3 + 2)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_early_neither_overdraw_nor_lose_their_tokens(
    limited: App, engine: FakeEngine, stream: bool
) -> None:
    app = limited(1000)
    fields = {"prompt": [1] * 90, "max_tokens": 110, "stream": stream}

    async def run() -> None:
        async with client_of(app) as client:

            def post() -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(client.post("/v1/completions", json=fields, headers=bearer(ALICE)))

            engine.gate = asyncio.Event()
            asked = [post() for _ in range(40)]
            await until(lambda: sum(task.done() for task in asked) == 35)
            assert engine.running == 5, "200 tokens each, of 1000"
            assert {task.result().status_code for task in asked if task.done()} == {429}
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: engine.running == 0)
            # Their prompts were submitted, and no token had come.
            assert level(app) == 1000 - 5 * 90
            engine.gate = None
            assert (await post()).status_code == 200

    asyncio.run(run())
    assert level(app) == 1000 - 5 * 90 - 200


def test_a_failed_request_pays_for_what_it_took(limited: App, engine: FakeEngine) -> None:
    engine.fail_after = 3
    app = limited(100)
    assert generate(app, prompt=[1] * 10, max_tokens=50).status_code == 500
    assert level(app) == 100 - 13


@pytest.mark.parametrize(
    ("fields", "takes"),
    [
        ({"max_tokens": 100}, 101),
        ({"max_tokens": 30, "n": 4}, 121),
        ({"prompt": [[1] * 30, [1] * 30], "max_tokens": 25}, 110),
        ({"prompt": [1] * 101, "max_tokens": 1}, 102),
    ],
)
def test_what_could_never_be_let_in_is_the_client_s_error(
    limited: App, engine: FakeEngine, fields: dict[str, object], takes: int
) -> None:
    app = limited(100)
    refused = generate(app, **fields)
    error = refused.json()["error"]
    assert (refused.status_code, error["param"]) == (400, "max_tokens")
    assert f"up to {takes} tokens, and this key may use 100 in a minute" in error["message"]
    assert engine.submitted == []
    assert level(app) == 100


def test_an_open_length_is_cut_to_what_the_key_may_use(limited: App, engine: FakeEngine) -> None:
    app = limited(100)
    answer = ask(app, "POST", "/v1/chat/completions", headers=bearer(ALICE), json={"messages": MESSAGES, "n": 2})
    assert answer.status_code == 200
    usage = answer.json()["usage"]
    lengths = [params.max_tokens for _, _, params in engine.submitted]
    assert lengths == [(100 - usage["prompt_tokens"]) // 2] * 2
    assert usage["total_tokens"] <= 100
    assert {choice["finish_reason"] for choice in answer.json()["choices"]} == {"length"}


def test_without_a_limit_an_open_length_is_the_context_s(limited: App, engine: FakeEngine) -> None:
    app = limited(0)
    answer = ask(app, "POST", "/v1/chat/completions", headers=bearer(ALICE), json={"messages": MESSAGES})
    assert answer.json()["usage"]["total_tokens"] == CONTEXT


def test_a_trace_takes_its_prompt(limited: App) -> None:
    app = limited(100)
    assert ask(app, "POST", "/v1/dsc/trace", headers=bearer(ALICE), json={"prompt": [1] * 40}).status_code == 200
    assert level(app) == 60


def test_a_key_whose_limit_changes_meanwhile_settles_with_the_limit_it_was_let_in_by(
    engine: FakeEngine, tokenizer: Tokenizer, write: Write
) -> None:
    ring = KeyRing(write(entry("alice", ALICE, tokens_per_minute=100)), "")
    app = app_around(engine, tokenizer, ring)

    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:
            fields = {"prompt": [1] * 10, "max_tokens": 80}
            asked = asyncio.create_task(client.post("/v1/completions", json=fields, headers=bearer(ALICE)))
            await until(lambda: engine.running)
            write(entry("alice", ALICE, tokens_per_minute=200))
            assert ring.reload()
            assert (await client.get("/v1/models", headers=bearer(ALICE))).status_code == 200
            engine.gate.set()
            assert (await asked).status_code == 200

    asyncio.run(run())
    assert level(app) == 200


def test_what_is_given_back_never_fills_a_rate_beyond_its_minute() -> None:
    rate = Rate(60, lambda: 0.0)
    rate.charge(-1000)
    assert rate.wait_s(60) == 0
    assert rate.wait_s(61) == pytest.approx(1)
