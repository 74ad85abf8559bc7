"""Live: worth keeping. Ready: worth sending requests to."""

from __future__ import annotations

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import ask, complete, service_of


def statuses(app: FastAPI) -> dict[str, int]:
    return {path: ask(app, "GET", path).status_code for path in ("/health/live", "/health/ready", "/health")}


def test_a_server_in_good_health_is_live_and_ready(app: FastAPI) -> None:
    assert set(statuses(app).values()) == {200}


@pytest.mark.parametrize(("dead", "words"), [(True, "has ended"), (False, "has not answered for 7 s")])
def test_an_engine_in_trouble_is_not_ready(app: FastAPI, engine: FakeEngine, dead: bool, words: str) -> None:
    engine.alive, engine.hung = not dead, not dead
    assert statuses(app) == {"/health/live": 200, "/health/ready": 503, "/health": 503}
    assert words in ask(app, "GET", "/health/ready").json()["error"]["message"]


def test_a_server_that_gave_up_on_its_engine_is_not_live(app: FastAPI, engine: FakeEngine) -> None:
    engine.alive, engine.gave_up = False, True
    assert set(statuses(app).values()) == {503}


def test_a_server_that_is_told_to_stop_is_live_but_not_ready(app: FastAPI, engine: FakeEngine) -> None:
    service_of(app).admission.draining = True
    assert statuses(app) == {"/health/live": 200, "/health/ready": 503, "/health": 503}
    refused = complete(app)
    assert refused.status_code == 503
    assert refused.headers["connection"] == "close"
    assert refused.json()["error"]["code"] == "shutting_down"
    assert engine.submitted == []
