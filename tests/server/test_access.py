"""Who may ask for what: keys and their limits, guarded routes, other origins, request ids."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from fastapi import FastAPI
from support.access import ALICE, BOB, ROOT, Write, bearer, entry
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, client_of, complete, until

from dsc_serve.cli import main
from dsc_serve.config import API_KEYS, AccessConfig, ConfigError, LimitConfig, ServerConfig
from dsc_serve.server.admission import Admission, Permits, Rate
from dsc_serve.server.errors import ApiError
from dsc_serve.server.keys import PER_KEY, Key, KeyRing
from dsc_serve.settings import document


@pytest.fixture
def guarded(engine: FakeEngine, write: Write) -> FastAPI:
    text = entry("alice", ALICE, weight=2.5, priority=3) + entry("bob", BOB) + entry("root", ROOT, admin=True)
    return app_around(engine, None, KeyRing(write(text), ""), AccessConfig(metrics_key=True))


def status(app: FastAPI, method: str, path: str, key: str = "", **options: Any) -> int:
    return ask(app, method, path, headers=bearer(key) if key else {}, **options).status_code


def generate(app: FastAPI, key: str, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/completions", headers=bearer(key), json={"prompt": [1], **fields})


@pytest.mark.parametrize(
    "path", ["/v1/models", "/metrics", "/docs", "/openapi.json", "/nothing", "/admin/state", "/admin/tenants"]
)
def test_without_a_valid_key_there_is_nothing_but_health(guarded: FastAPI, path: str) -> None:
    for headers in ({}, bearer("wrong"), bearer(""), {"authorization": ALICE}, bearer(ALICE + "x"), bearer("é")):
        encoded = {name: value.encode() for name, value in headers.items()}
        response = ask(guarded, "GET", path, headers=encoded)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert status(guarded, "GET", "/health") == status(guarded, "GET", "/health/live") == 200


def test_a_key_opens_what_it_is_for(guarded: FastAPI, engine: FakeEngine) -> None:
    assert status(guarded, "GET", "/v1/models", BOB) == 200
    assert status(guarded, "GET", "/metrics", BOB) == 200
    assert generate(guarded, ALICE).status_code == 200
    assert status(guarded, "GET", "/admin/state", BOB) == 403
    assert status(guarded, "GET", "/admin/state", ROOT) == 200
    state = ask(guarded, "GET", "/admin/state", headers=bearer(ROOT)).json()
    assert state["generations_by_key"] == {"bob": 0, "alice": 0, "root": 0}
    assert state["places"]["held"] == 0
    assert engine.running == 0


def test_a_server_without_keys_is_open_but_has_no_administrator(app: FastAPI) -> None:
    assert status(app, "GET", "/v1/models") == status(app, "GET", "/metrics") == 200
    assert status(app, "GET", "/admin/state") == status(app, "GET", "/admin/state", ROOT) == 401


def test_the_key_says_for_whom_the_engine_works_and_how_urgently(guarded: FastAPI, engine: FakeEngine) -> None:
    generate(guarded, ALICE, user="somebody")
    generate(guarded, BOB)
    alice, bob = engine.scheduling
    assert (alice.tenant, alice.weight, alice.priority) == ("alice", 2.5, 3)
    assert (bob.tenant, bob.weight, bob.priority) == ("bob", 1.0, 0)


@pytest.mark.parametrize(
    ("own", "asked", "priority"), [(-5, None, -5), (-5, 2, 2), (-5, -7, -5), (3, None, 3), (3, 1, 3), (3, 4, 4)]
)
def test_a_request_may_be_less_urgent_than_its_key_but_not_more(
    engine: FakeEngine, write: Write, own: int, asked: int | None, priority: int
) -> None:
    engine.policy = "priority"
    app = app_around(engine, None, KeyRing(write(entry("alice", ALICE, priority=own)), ""))
    assert generate(app, ALICE, priority=asked).status_code == 200
    assert engine.scheduling[0].priority == priority


def test_prompts_share_cached_prefixes_only_with_keys_of_the_same_salt(engine: FakeEngine, write: Write) -> None:
    text = entry("alice", ALICE, cache_salt="'a'") + entry("bob", BOB) + entry("root", ROOT, cache_salt="'a'")
    app = app_around(engine, None, KeyRing(write(text), ""))
    for key, salt in ((ALICE, ""), (ROOT, ""), (ALICE, "x"), (ROOT, "x"), (BOB, ""), (BOB, "x"), (BOB, "a")):
        assert generate(app, key, cache_salt=salt).status_code == 200
    alice, root, alice_x, root_x, *others = [scheduling.cache_salt for scheduling in engine.scheduling]
    assert alice == root and alice_x == root_x
    assert len({alice, alice_x, *others}) == 5


def test_every_field_of_a_key_is_documented() -> None:
    text = document()
    assert all(f"`{field}`" in text for field in Key.__struct_fields__ if field != "name")


def test_the_command_makes_keys_that_open(engine: FakeEngine, write: Write) -> None:
    made = CliRunner().invoke(main, ["key", "team.a"])
    key = made.stderr.split()[0]
    assert made.exit_code == 0
    assert key not in made.stdout
    ring = KeyRing(write(made.stdout), "")
    found = ring.find(key.encode())
    assert found is not None and found.name == "team.a"


def test_a_key_s_streams_are_bounded_and_another_key_s_are_not_affected(engine: FakeEngine, write: Write) -> None:
    text = entry("alice", ALICE, streams=2) + entry("bob", BOB)
    app = app_around(engine, None, KeyRing(write(text), ""), streams_per_key=5)

    async def run() -> None:
        engine.gate = asyncio.Event()
        async with client_of(app) as client:

            def post(key: str, n: int) -> asyncio.Task[httpx.Response]:
                body = {"prompt": [1], "n": n}
                return asyncio.create_task(client.post("/v1/completions", json=body, headers=bearer(key)))

            running = [post(ALICE, 1), post(ALICE, 1)]
            await until(lambda: engine.running == 2)
            refused = await post(ALICE, 1)
            assert refused.status_code == 429
            assert refused.json()["error"]["code"] == "too_many_streams"
            running.append(post(BOB, 5))
            await until(lambda: engine.running == 7)
            assert (await post(BOB, 1)).status_code == 429
            engine.gate.set()
            assert [response.status_code for response in await asyncio.gather(*running)] == [200] * 3
            assert (await post(ALICE, 2)).status_code == 200

    asyncio.run(run())


def test_more_choices_than_a_key_may_ever_have_are_its_client_s_error(engine: FakeEngine, write: Write) -> None:
    app = app_around(engine, None, KeyRing(write(entry("alice", ALICE, streams=2)), ""))
    for fields, param in (({"n": 3}, "n"), ({"prompt": [[1], [2], [3]]}, "prompt")):
        refused = generate(app, ALICE, **fields)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        assert "this key may have at most 2" in refused.json()["error"]["message"]
    assert engine.submitted == []


@pytest.mark.parametrize(
    "section",
    [AccessConfig(metrics_key=True), *(LimitConfig(**{name: 3}) for name in PER_KEY)],
)
def test_settings_that_would_do_nothing_without_keys_are_named(
    section: AccessConfig | LimitConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEYS, raising=False)
    config = ServerConfig(**{"access" if isinstance(section, AccessConfig) else "limits": section})
    with pytest.raises(ConfigError, match=r"(metrics_key is true|_per_(key|minute) is 3); without API keys it does"):
        KeyRing.of(config)
    monkeypatch.setenv(API_KEYS, f"alice:{ALICE}")
    assert KeyRing.of(config).required
    monkeypatch.delenv(API_KEYS)
    assert not KeyRing.of(ServerConfig()).required


def test_requests_a_minute_are_bounded(engine: FakeEngine, write: Write) -> None:
    text = entry("alice", ALICE, requests_per_minute=3) + entry("bob", BOB)
    app = app_around(engine, None, KeyRing(write(text), ""))
    assert [generate(app, ALICE).status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = generate(app, ALICE)
    assert refused.json()["error"]["code"] == "rate_limited"
    assert 15 <= int(refused.headers["retry-after"]) <= 20
    assert generate(app, BOB).status_code == 200


def test_a_rate_fills_again_as_time_goes_by() -> None:
    now = 0.0
    rate = Rate(60, lambda: now)
    for _ in range(60):
        assert rate.wait_s() == 0
        rate.charge(1)
    assert rate.wait_s() == pytest.approx(1)
    now = 0.5
    assert rate.wait_s() == pytest.approx(0.5)
    now = 1000
    assert rate.wait_s() == 0
    rate.charge(100)
    assert rate.wait_s() == pytest.approx(41)
    assert Rate(0, lambda: now).wait_s() == 0


def test_limits_of_a_key_that_change_hold_at_once_and_lose_no_count(write: Write) -> None:
    ring = KeyRing(write(entry("alice", ALICE, streams=5)), "")
    admission = Admission(Permits(10), LimitConfig())

    def lease() -> Any:
        key = ring.find(ALICE.encode())
        assert key is not None
        return admission.lease(key)

    first, second = lease(), lease()
    first.take(3)
    write(entry("alice", ALICE, streams=4))
    ring.reload()
    with pytest.raises(ApiError, match="has 3 generations of the 4"):
        lease().take(2)
    second.take(1)
    first.release()
    second.release()
    assert admission.state()["generations_by_key"] == {"alice": 0}
    lease().take(4)


@pytest.mark.parametrize(
    ("limits", "fields", "param", "words"),
    [
        ({"max_prompt_tokens": 3}, {"prompt": [1] * 4}, "prompt", "prompt is 4 tokens; this server allows at most 3"),
        ({"max_output_tokens": 3}, {"max_tokens": 4}, "max_tokens", "max_tokens is 4; this server allows at most 3"),
        ({"max_choices": 2}, {"n": 3}, "n", "n is 3; this server allows at most 2"),
        ({"max_logprobs": 2}, {"logprobs": 3}, "logprobs", "logprobs is 3; this server allows at most 2"),
        ({"max_stops": 1}, {"stop": ["a", "b"]}, "stop", "stop is 2 texts; this server allows at most 1"),
    ],
)
def test_what_a_request_may_ask_for_is_bounded(
    engine: FakeEngine, tokenizer: Any, limits: dict[str, int], fields: dict[str, Any], param: str, words: str
) -> None:
    response = complete(app_around(engine, tokenizer, **limits), **fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert words in response.json()["error"]["message"]
    assert engine.submitted == []


def test_an_output_without_a_bound_of_its_own_gets_the_server_s(engine: FakeEngine, tokenizer: Any) -> None:
    app = app_around(engine, tokenizer, max_output_tokens=30)
    body = {"messages": [{"role": "user", "content": "x"}]}
    response = ask(app, "POST", "/v1/chat/completions", json=body)
    assert response.json()["usage"]["completion_tokens"] == 30


def test_a_default_that_nobody_sent_is_not_refused(engine: FakeEngine, tokenizer: Any) -> None:
    app = app_around(engine, tokenizer, max_output_tokens=8)
    assert complete(app).json()["usage"]["completion_tokens"] == 8
    assert complete(app, max_tokens=16).status_code == 400


def test_other_origins_are_let_in_only_where_they_are_named(app: FastAPI, engine: FakeEngine) -> None:
    named = app_around(engine, None, KeyRing("", f"a:{ALICE}"), AccessConfig(cors_origins=("https://chat.example",)))
    asked = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,content-type"}
    for target, origin, allowed in (
        (named, "https://chat.example", True),
        (named, "https://evil.example", False),
        (app, "https://chat.example", False),
    ):
        preflight = ask(target, "OPTIONS", "/v1/completions", headers={"origin": origin, **asked})
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        answer = ask(target, "GET", "/v1/models", headers={"origin": origin, **bearer(ALICE)})
        assert ("access-control-allow-origin" in answer.headers) is allowed


def test_a_request_has_an_id_that_comes_back(app: FastAPI) -> None:
    for path in ("/v1/models", "/nothing", "/health"):
        assert ask(app, "GET", path, headers={"x-request-id": "abc-1"}).headers["x-request-id"] == "abc-1"
    ids = {ask(app, "GET", "/health").headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5
    for bad in ("", "two words", "x" * 129, "\tx", "é"):
        made = ask(app, "GET", "/health", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
        assert made != bad and len(made) == 32
    assert complete(app, stream=True).headers["x-request-id"]
