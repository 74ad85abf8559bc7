"""POST /v1/completions: what comes back for what was asked."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine, saying
from support.serving import app_around, ask, complete, events_of

from dsc_serve.sampling_params import SamplingParams
from dsc_serve.text.tokenizer import Tokenizer

UNCACHED = {"prompt_tokens_details": {"cached_tokens": 0}}


def test_a_completion_has_the_shape_of_openais(app: FastAPI, engine: FakeEngine) -> None:
    body = complete(app, max_tokens=3, model="fake").json()
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body == {
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length", "stop_reason": None}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5, **UNCACHED},
    }
    assert engine.submitted[0][1] == [104, 105]


def test_the_defaults_are_openais(app: FastAPI, engine: FakeEngine) -> None:
    assert complete(app).json()["choices"][0]["text"] == "abcdefghijklmnop"
    assert engine.submitted[0][2] == SamplingParams(max_tokens=16)


def test_null_means_the_default(app: FastAPI, engine: FakeEngine) -> None:
    nullable = ("temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "logit_bias", "max_tokens")
    assert complete(app, **dict.fromkeys((*nullable, "logprobs", "echo", "best_of", "suffix"))).status_code == 200
    assert engine.submitted[0][2] == SamplingParams(max_tokens=16)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[104, 105]]),
        ([1, 2, 3], [[1, 2, 3]]),
        (["hi", "ho"], [[104, 105], [104, 111]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        ([[7]], [[7]]),
    ],
)
def test_prompts_come_in_four_forms(app: FastAPI, engine: FakeEngine, prompt: Any, ids: list[list[int]]) -> None:
    body = complete(app, prompt=prompt, n=2, max_tokens=1).json()
    assert sorted(prompt for _, prompt, _ in engine.submitted) == sorted(ids * 2)
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(ids)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert body["usage"]["completion_tokens"] == 2 * len(ids)


def test_choices_run_at_once_and_answer_in_order(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = lambda prompt, params: [prompt[0]] * 3
    body = complete(app, prompt=[[98], [99], [100]], max_tokens=3).json()
    assert [choice["text"] for choice in body["choices"]] == ["bbb", "ccc", "ddd"]


def test_choice_zero_equals_the_answer_of_one_choice(app: FastAPI) -> None:
    one = complete(app, seed=5).json()["choices"]
    three = complete(app, seed=5, n=3).json()["choices"]
    assert three[0]["text"] == one[0]["text"]
    assert len({choice["text"] for choice in three}) == 3


def test_a_stop_string_ends_the_choice_in_the_engine_too(app: FastAPI, engine: FakeEngine) -> None:
    body = complete(app, stop="de", max_tokens=20).json()
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == 5
    assert engine.finished == [(engine.submitted[0][0], "stop")]


def test_tokens_after_a_stop_string_are_dropped(app: FastAPI, engine: FakeEngine) -> None:
    engine.tokens_per_step = 8
    body = complete(app, stop=["xx", "de"], max_tokens=20, logprobs=0).json()
    assert body["choices"][0]["text"] == "abc"
    assert body["choices"][0]["logprobs"]["tokens"] == ["a", "b", "c", "d", "e"]
    assert body["usage"]["completion_tokens"] == 5


def test_a_stop_string_in_the_last_step_counts(app: FastAPI, engine: FakeEngine) -> None:
    body = complete(app, stop="e", max_tokens=5).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("abcd", "stop")
    assert engine.finished == []  # it has ended by itself


def test_echo_begins_with_the_prompt(app: FastAPI) -> None:
    assert complete(app, echo=True, max_tokens=2).json()["choices"][0]["text"] == "hiab"
    assert complete(app, prompt=[104, 111], echo=True, max_tokens=2).json()["choices"][0]["text"] == "hoab"


def test_echo_may_be_all_that_is_wanted(app: FastAPI, engine: FakeEngine) -> None:
    choice = complete(app, echo=True, max_tokens=0, logprobs=1).json()["choices"][0]
    assert choice["text"] == "hi"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] == {
        "tokens": ["h", "i"],
        "token_logprobs": [None, -0.5],
        "top_logprobs": [None, {"a": -1.0, "i": -0.5}],
        "text_offset": [0, 1],
    }
    assert engine.submitted[0][2].prompt_logprobs == 1
    assert events_of(complete(app, echo=True, max_tokens=0, stream=True))[0]["choices"][0]["text"] == "hi"


def test_logprobs_cover_prompt_and_output_with_echo(app: FastAPI) -> None:
    logprobs = complete(app, prompt="né", echo=True, max_tokens=2, logprobs=3).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["n", "bytes:\\xc3", "bytes:\\xa9", "a", "b"]
    assert logprobs["text_offset"] == [0, 1, 1, 2, 3]  # two bytes, one character
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][3] == {"a": -1.0, "b": -2.0, "c": -9999.0}


def test_offsets_count_the_prompt_as_it_was_sent(app: FastAPI) -> None:
    choice = complete(app, prompt="<|end|>x", echo=True, max_tokens=2, logprobs=0).json()["choices"][0]
    assert choice["text"] == "<|end|>xab"
    assert choice["logprobs"]["text_offset"] == [0, 7, 8, 9]


def test_offsets_skip_what_the_text_skips(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = lambda prompt, params: [97, 256, 98]
    hidden = complete(app, logprobs=0).json()["choices"][0]
    assert (hidden["text"], hidden["logprobs"]["text_offset"]) == ("ab", [0, 1, 1])
    visible = complete(app, logprobs=0, skip_special_tokens=False).json()["choices"][0]
    assert (visible["text"], visible["logprobs"]["text_offset"]) == ("a<|end|>b", [0, 1, 8])


def test_streamed_pieces_add_up_to_the_whole(app: FastAPI, engine: FakeEngine) -> None:
    engine.script = saying("Grüße, 世界! 😀 bye")
    fields: dict[str, Any] = {"max_tokens": 40, "logprobs": 2, "echo": True, "stop": ["bye"]}
    whole = complete(app, **fields).json()["choices"][0]
    choices = [event["choices"][0] for event in events_of(complete(app, stream=True, **fields))]
    assert "".join(choice["text"] for choice in choices) == whole["text"] == "hiGrüße, 世界! 😀 "
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["stop"]
    for key, values in whole["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][key]] == values, key


def test_every_token_with_text_is_an_event_of_its_own(app: FastAPI) -> None:
    events = events_of(complete(app, stream=True, max_tokens=3))
    assert [event["choices"][0]["text"] for event in events] == ["a", "b", "c"]
    assert {event["object"] for event in events} == {"text_completion"}
    assert len({event["id"] for event in events}) == 1
    assert all("usage" not in event for event in events)


def test_usage_comes_last_when_asked_for(app: FastAPI) -> None:
    fields = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 2, "n": 2}
    *events, last = events_of(complete(app, **fields))
    assert [event["usage"] for event in events] == [None] * 4
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 4, "total_tokens": 6, **UNCACHED}


def test_usage_so_far_is_in_every_event_when_asked_for(app: FastAPI) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *events, last = events_of(complete(app, stream=True, stream_options=options, max_tokens=3))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3]
    assert all(event["usage"]["prompt_tokens"] == 2 for event in events)
    assert last["choices"] == [] and last["usage"] == events[-1]["usage"]


def test_streamed_choices_each_have_one_end(app: FastAPI) -> None:
    choices = [event["choices"][0] for event in events_of(complete(app, stream=True, prompt=["a", "b"], n=2, seed=1))]
    for index in range(4):
        own = [choice for choice in choices if choice["index"] == index]
        assert sum(choice["finish_reason"] is not None for choice in own) == 1
        assert own[-1]["finish_reason"] == "length"
        assert len("".join(choice["text"] for choice in own)) == 16


def test_the_default_length_gives_way_to_the_context(app: FastAPI, engine: FakeEngine) -> None:
    body = complete(app, prompt=[1] * 507).json()
    assert body["usage"]["completion_tokens"] == 5
    assert engine.submitted[0][2].max_tokens is None


@pytest.fixture
def bare(engine: FakeEngine) -> FastAPI:
    return app_around(engine, None)


def test_without_a_tokenizer_token_ids_come_back(bare: FastAPI) -> None:
    choice = complete(bare, prompt=[1, 2], max_tokens=3, logprobs=1, echo=True).json()["choices"][0]
    assert (choice["text"], choice["token_ids"]) == ("", [1, 2, 97, 98, 99])
    assert choice["logprobs"]["tokens"] == ["token_id:1", "token_id:2", "token_id:97", "token_id:98", "token_id:99"]
    events = events_of(complete(bare, prompt=[1, 2], max_tokens=3, stream=True))
    assert [event["choices"][0]["token_ids"] for event in events] == [[97], [98], [99]]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("prompt", "param"), [("hi", "prompt"), (["hi"], "prompt.0")])
def test_without_a_tokenizer_text_is_refused(bare: FastAPI, prompt: Any, param: str) -> None:
    response = complete(bare, prompt=prompt)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "token ids" in response.json()["error"]["message"]


def test_without_a_tokenizer_stop_strings_are_refused(bare: FastAPI) -> None:
    response = complete(bare, prompt=[1], stop="x")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stop")


def test_a_long_text_is_encoded_like_a_short_one(engine: FakeEngine, tokenizer: Tokenizer) -> None:
    engine.capacity = type(engine.capacity)(300, 40000, 4000, 16)
    body = complete(app_around(engine, tokenizer), prompt="x" * 20000, max_tokens=1).json()
    assert body["usage"]["prompt_tokens"] == 20000


def test_models_are_listed_and_found(app: FastAPI) -> None:
    listed = ask(app, "GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["fake"]
    assert ask(app, "GET", "/v1/models/fake").json() == listed["data"][0]
    missing = ask(app, "GET", "/v1/models/no/such")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
