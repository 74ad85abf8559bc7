"""What the client sees when the engine fails, before and after its answer has begun."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import chat, client_of, complete, events_of, service_of, until

from dsc_serve.server.process import drain
from dsc_serve.worker.client import EngineDiedError, UnreadError
from dsc_serve.worker.messages import Delta

Ask = Callable[..., httpx.Response]
ENDPOINTS = [complete, chat]


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_may_be_sent_again_is_not_told_that_it_is_wrong(
    app: FastAPI, engine: FakeEngine, stream: bool
) -> None:
    engine.fail_after, engine.error = 0, Delta("", [], "error", error="its process has ended", unavailable=True)
    answer = complete(app, stream=stream)
    assert answer.status_code == 503
    assert answer.json()["error"]["param"] is None and "its process has ended" in answer.json()["error"]["message"]


@pytest.mark.parametrize("ask_for", ENDPOINTS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("die", "status", "code"), [(False, 500, "engine_error"), (True, 503, "engine_down")])
def test_a_failure_before_the_first_token_has_its_status(
    app: FastAPI, engine: FakeEngine, ask_for: Ask, stream: bool, die: bool, status: int, code: str
) -> None:
    engine.fail_after, engine.die = 0, die
    response = ask_for(app, stream=stream)
    assert response.status_code == status
    error = response.json()["error"]
    assert (error["message"], error["type"], error["code"]) == ("the engine broke", "server_error", code)
    assert engine.running == 0


def test_a_whole_answer_fails_even_after_some_tokens(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 3
    assert complete(app).status_code == 500


@pytest.mark.parametrize("ask_for", ENDPOINTS)
def test_a_failure_within_a_stream_is_its_last_event(app: FastAPI, engine: FakeEngine, ask_for: Ask) -> None:
    engine.fail_after = 3
    *events, last = events_of(ask_for(app, stream=True))
    assert sum("choices" in event for event in events) == len(events)
    assert last["error"]["message"] == "the engine broke"
    assert all(choice["finish_reason"] is None for event in events for choice in event["choices"])


def test_a_failure_of_one_choice_ends_the_others(app: FastAPI, engine: FakeEngine) -> None:
    engine.delay_s = 0.001
    script = engine.script
    engine.script = lambda prompt, params: script(prompt, params)[: 3 if prompt == [1] else 400]
    engine.ends_silently = True
    response = complete(app, prompt=[[1], [2], [3]], max_tokens=400)
    assert response.status_code == 500
    assert engine.running == 0
    assert len(engine.aborted) == 2


def test_the_engine_s_refusal_of_a_field_is_the_client_s_error(app: FastAPI, engine: FakeEngine) -> None:
    engine.fail_after = 0
    engine.error = Delta("", [], "error", error="prompt is odd", error_field="prompt")
    for response, param in ((complete(app), "prompt"), (chat(app), "messages")):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param
        assert response.json()["error"]["message"] == f"{param} is odd"


@pytest.mark.parametrize("error", [EngineDiedError("gone"), BrokenPipeError("gone"), ConnectionResetError("gone")])
def test_a_broken_connection_to_the_engine_means_it_is_down(
    app: FastAPI, engine: FakeEngine, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    engine.raises = error
    assert complete(app).status_code == 503
    assert complete(app, stream=True).status_code == 503
    assert sum("failed: gone" in line for line in caplog.messages) == 2


def test_a_stream_that_is_not_read_is_its_client_s_failure(app: FastAPI, engine: FakeEngine) -> None:
    engine.raises = UnreadError("the client left 8 steps' tokens unread")
    response = complete(app)
    assert (response.status_code, response.json()["error"]["code"]) == (408, "client_too_slow")
    assert response.headers["x-should-retry"] == "false"


def test_what_is_cut_off_by_the_end_of_the_server_is_told_so(app: FastAPI, engine: FakeEngine) -> None:
    engine.delay_s = 0.01

    async def run() -> httpx.Response:
        async with client_of(app) as client:
            asking = asyncio.create_task(client.post("/v1/completions", json={"prompt": "hi", "stream": True}))
            await until(lambda: service_of(app).metrics.generated_tokens > 2)
            await drain(service_of(app), 0, asyncio.Event())
            return await asking

    last = events_of(asyncio.run(run()))[-1]["error"]
    assert (last["code"], last["message"]) == ("shutting_down", "the server is shutting down")


def test_an_end_without_a_reason_is_a_failure(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = lambda prompt, params: [97, 98]
    engine.ends_silently = True
    assert complete(app).status_code == 500
    assert "error" in events_of(complete(app, stream=True))[-1]


def test_a_bug_within_a_stream_is_its_last_event(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def observe(value: float) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyError("a bug")

    monkeypatch.setattr(service_of(app).metrics, "inter_token", SimpleNamespace(observe=observe))
    *events, last = events_of(complete(app, stream=True))
    assert len(events) == 3
    assert last["error"]["type"] == "server_error"
    assert "a bug" not in last["error"]["message"]


def test_the_log_names_the_user_whose_request_failed(
    app: FastAPI, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine.fail_after = 2
    complete(app, user="tenant-7")
    assert "user 'tenant-7'" in caplog.text
    assert [scheduling.tenant for scheduling in engine.scheduling] == ["tenant-7"]
    assert "the engine broke" in caplog.text
