"""The `dsc` object: routing and timings in the answer, terms for the scheduler, and the trace of a prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import msgspec
import numpy as np
import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, chat, complete, events_of

from dsc_serve.sampling_params import ALL_ATOMS, EngineCapacity
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.text.tokenizer import Tokenizer
from dsc_serve.worker.messages import Delta

Ask = Callable[..., httpx.Response]
BOTH = pytest.mark.parametrize("ask_for", [complete, chat])


def choice_of(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    choice: dict[str, Any] = response.json()["choices"][0]
    return choice


def check_routing(routing: dict[str, Any], start: int, token_ids: list[int], k: int = 3) -> None:
    count = len(token_ids)
    assert (routing["start"], routing["token_ids"]) == (start, token_ids)
    places = range(start, start + count)
    assert routing["atoms"] == [[[100 * p + 10 * layer + i for i in range(k)] for layer in range(2)] for p in places]
    assert routing["coefficients"] == [[[0.25] * k] * 2] * count
    assert routing["signal"] == [[1.5, 1.5]] * count


def test_a_completion_tells_what_its_tokens_picked(app: FastAPI, engine: FakeEngine) -> None:
    choice = choice_of(complete(app, max_tokens=4, dsc={"return_routing": True}))
    check_routing(choice["dsc"]["routing"], 0, [104, 105, 97, 98, 99])
    assert engine.submitted[0][2].routing == ALL_ATOMS


def test_a_chat_tells_it_too_and_of_as_few_atoms_as_asked_for(app: FastAPI, engine: FakeEngine) -> None:
    choice = choice_of(chat(app, max_tokens=2, dsc={"return_routing": True, "top_k_atoms": 2}))
    check_routing(choice["dsc"]["routing"], 0, [*b"<user>hi<assistant>a"], k=2)
    assert engine.submitted[0][2].routing == 2


@BOTH
@pytest.mark.parametrize("tokens_per_step", [1, 3])
def test_the_parts_of_a_stream_make_up_the_whole(
    app: FastAPI, engine: FakeEngine, ask_for: Ask, tokens_per_step: int
) -> None:
    engine.tokens_per_step = tokens_per_step
    fields: dict[str, Any] = {"max_tokens": 7, "dsc": {"return_routing": True}}
    whole = choice_of(ask_for(app, **fields))["dsc"]["routing"]
    events = events_of(ask_for(app, stream=True, **fields))
    parts = [
        event["choices"][0]["dsc"]["routing"] for event in events if "routing" in event["choices"][0].get("dsc", {})
    ]
    assert len(parts) > 2
    for key in ("token_ids", "atoms", "coefficients", "signal"):
        assert [item for part in parts for item in part[key]] == whole[key]
    starts = [part["start"] for part in parts]
    assert starts == [sum(len(part["token_ids"]) for part in parts[:i]) for i in range(len(parts))]


@BOTH
def test_nothing_is_told_of_tokens_after_a_stop_string(app: FastAPI, engine: FakeEngine, ask_for: Ask) -> None:
    engine.tokens_per_step = 3
    fields: dict[str, Any] = {"max_tokens": 9, "dsc": {"return_routing": True}, "stop": "d"}
    assert choice_of(ask_for(app, **fields))["dsc"]["routing"]["token_ids"][-3:] == [97, 98, 99]


@BOTH
def test_timings_come_with_the_end(app: FastAPI, engine: FakeEngine, ask_for: Ask) -> None:
    engine.delay_s, engine.cached_tokens = 0.01, 2
    for timings in (
        choice_of(ask_for(app, max_tokens=4, dsc={}))["dsc"]["timings"],
        events_of(ask_for(app, max_tokens=4, dsc={}, stream=True))[-1]["choices"][0]["dsc"]["timings"],
    ):
        assert timings["queue_ms"] == 250
        assert timings["cached_tokens"] == 2
        assert 8 < timings["mean_itl_ms"] <= timings["max_itl_ms"]
        assert timings["ttft_ms"] > 8
    one = choice_of(ask_for(app, max_tokens=1, dsc={}))["dsc"]
    assert (one["timings"]["mean_itl_ms"], one["timings"]["max_itl_ms"]) == (None, None)
    assert "routing" not in one


@BOTH
def test_who_does_not_ask_is_told_nothing(app: FastAPI, engine: FakeEngine, ask_for: Ask) -> None:
    assert "dsc" not in choice_of(ask_for(app, max_tokens=2))
    assert engine.submitted[0][2].routing == 0
    assert all("dsc" not in event["choices"][0] for event in events_of(ask_for(app, max_tokens=2, stream=True)))


@BOTH
def test_terms_reach_the_engine(app: FastAPI, engine: FakeEngine, ask_for: Ask) -> None:
    engine.policy = "priority"
    ask_for(app, user="me", cache_salt="s", dsc={"priority": -3, "deadline_ms": 1500})
    ask_for(app)
    assert engine.scheduling == [
        SchedulingParams(tenant="me", priority=-3, timeout_s=1.5, cache_salt="s"),
        SchedulingParams(),
    ]


@BOTH
def test_a_deadline_ends_the_text_and_is_an_error_where_there_is_none(
    app: FastAPI, engine: FakeEngine, ask_for: Ask
) -> None:
    engine.fail_after, engine.error = 2, Delta("", [], "timeout", error="the request did not end within 1 s")
    response = ask_for(app, dsc={"deadline_ms": 1000})
    assert response.json()["choices"][0]["finish_reason"] == "length"
    assert response.json()["choices"][0]["dsc"]["finish_reason"] == "timeout"
    engine.fail_after = 0
    for stream in (False, True):
        response = ask_for(app, dsc={"deadline_ms": 1000}, stream=stream)
        assert response.status_code == 408
        assert response.json()["error"]["code"] == "timeout"


@BOTH
@pytest.mark.parametrize(
    ("dsc", "param"),
    [
        ([], "dsc"),
        ({"routing": True}, "dsc.routing"),
        ({"return_routing": 1}, "dsc.return_routing"),
        ({"top_k_atoms": 2}, "dsc.top_k_atoms"),
        ({"top_k_atoms": 2, "return_routing": False}, "dsc.top_k_atoms"),
        ({"top_k_atoms": 0, "return_routing": True}, "dsc.top_k_atoms"),
        ({"top_k_atoms": 4, "return_routing": True}, "dsc.top_k_atoms"),
        ({"top_k_atoms": 10**30, "return_routing": True}, "dsc.top_k_atoms"),
        ({"priority": 1}, "dsc.priority"),
        ({"priority": 1.5}, "dsc.priority"),
        ({"priority": 2**31}, "dsc.priority"),
        ({"deadline_ms": 0}, "dsc.deadline_ms"),
        ({"deadline_ms": "1"}, "dsc.deadline_ms"),
        ({"deadline_ms": 1e12}, "dsc.deadline_ms"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(app: FastAPI, engine: FakeEngine, ask_for: Ask, dsc: Any, param: str) -> None:
    response = ask_for(app, dsc=dsc)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "dsc" in error["message"]
    assert engine.submitted == []


def test_a_term_may_be_given_in_one_place_only(app: FastAPI) -> None:
    for fields, param in (
        ({"priority": 0, "dsc": {"priority": 0}}, "dsc.priority"),
        ({"timeout_s": 1, "dsc": {"deadline_ms": 1000}}, "dsc.deadline_ms"),
    ):
        assert complete(app, **fields).json()["error"]["param"] == param


@BOTH
def test_a_model_whose_tokens_pick_nothing_says_so(engine: FakeEngine, tokenizer: Tokenizer, ask_for: Ask) -> None:
    engine.capacity = EngineCapacity(300, 512, num_blocks=64, block_size=16)
    error = ask_for(app_around(engine, tokenizer), dsc={"return_routing": True}).json()["error"]
    assert error["param"] == "dsc.return_routing"
    assert "pick nothing" in error["message"]


@pytest.mark.parametrize("of", ["experts", "adapters"])
def test_what_mixtures_pick_has_its_own_names(engine: FakeEngine, tokenizer: Tokenizer, of: str) -> None:
    engine.capacity = msgspec.structs.replace(engine.capacity, picks=of)
    app = app_around(engine, tokenizer)
    routing = choice_of(complete(app, max_tokens=4, dsc={"return_routing": True}))["dsc"]["routing"]
    assert routing.keys() == {"start", "token_ids", of, "gates", "signal"}
    assert np.shape(routing[of]) == np.shape(routing["gates"]) == (5, 2, 3)
    card = ask(app, "GET", "/v1/models").json()["data"][0]
    assert card["dsc"] is None
    assert card["picks"] == {"of": of, "layers": [0, 1], "number": 500, "per_token": 3}


def trace(app: FastAPI, **fields: Any) -> httpx.Response:
    return ask(app, "POST", "/v1/dsc/trace", json={"prompt": "hi", **fields})


@pytest.mark.parametrize("prompt", ["hi", [104, 105]])
def test_a_trace_is_a_prompt_s_routing_and_nothing_more(app: FastAPI, engine: FakeEngine, prompt: object) -> None:
    body = trace(app, prompt=prompt, model="fake").json()
    assert body.pop("id").startswith("trace-")
    assert isinstance(body.pop("created"), int)
    dsc = body.pop("dsc")
    check_routing(dsc["routing"], 0, [104, 105])
    assert dsc["timings"]["ttft_ms"] is None
    usage = {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}
    usage |= {"prompt_tokens_details": {"cached_tokens": 0}}
    assert body == {"object": "dsc.trace", "model": "fake", "usage": usage}
    assert engine.submitted[0][2].max_tokens == 0


def test_a_trace_may_have_terms_and_fewer_atoms(app: FastAPI, engine: FakeEngine) -> None:
    engine.policy = "priority"
    body = trace(app, top_k_atoms=1, dsc={"priority": 2}, user="me").json()
    check_routing(body["dsc"]["routing"], 0, [104, 105], k=1)
    assert engine.scheduling == [SchedulingParams(tenant="me", priority=2)]


def test_a_trace_may_fill_the_context(app: FastAPI) -> None:
    assert trace(app, prompt="x" * 512).status_code == 200
    assert trace(app, prompt="x" * 513).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [[1]]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, 300]}, "prompt"),
        ({"top_k_atoms": 4}, "top_k_atoms"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"dsc": {"return_routing": True}}, "dsc.return_routing"),
        ({"stream": True}, "stream"),
    ],
    ids=str,
)
def test_what_is_wrong_with_a_trace_is_named(app: FastAPI, fields: dict[str, Any], param: str) -> None:
    response = trace(app, **fields)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param
