"""The official client against a real server process with the embedded model."""

from __future__ import annotations

import openai
import pytest
from openai import OpenAI
from support.running_server import RunningServer

MODEL = "dsc-tiny"


@pytest.fixture
def client(tiny: RunningServer) -> OpenAI:
    return OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0, timeout=60)


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_completion_and_its_stream_agree(client: OpenAI) -> None:
    going_on = {"ignore_eos": True}  # whether a text ends early depends on the last bits of logits
    whole = client.completions.create(
        model=MODEL, prompt="In the beginning", max_tokens=24, seed=7, extra_body=going_on
    )
    assert len(whole.choices[0].text) > 20
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (24, "length")
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="In the beginning",
            max_tokens=24,
            seed=7,
            stream=True,
            stream_options={"include_usage": True},
            extra_body=going_on,
        )
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert chunks[-1].usage == whole.usage


def test_chat_and_its_stream_agree(client: OpenAI) -> None:
    messages = [{"role": "system", "content": "A sermon."}, {"role": "user", "content": "The love of God"}]
    whole = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, seed=3)  # type: ignore[arg-type]
    stream = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=24, seed=3, stream=True)  # type: ignore[arg-type]
    chunks = list(stream)
    assert whole.choices[0].message.role == "assistant"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"


def test_a_seed_repeats_and_another_differs(client: OpenAI) -> None:
    texts = [
        client.completions.create(model=MODEL, prompt="My dear", max_tokens=30, seed=seed).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_stop_ends_before_the_text(client: OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt="It is", max_tokens=40, temperature=0).choices[0].text
    stop = free[12:15]
    held = client.completions.create(model=MODEL, prompt="It is", max_tokens=40, temperature=0, stop=[stop])
    assert held.choices[0].text == free[: free.index(stop)]
    assert held.choices[0].finish_reason == "stop"
    streamed = client.completions.create(
        model=MODEL, prompt="It is", max_tokens=40, temperature=0, stop=stop, stream=True
    )
    assert "".join(c.choices[0].text for c in streamed) == held.choices[0].text


def test_choices_are_different_and_the_first_is_that_of_one(client: OpenAI) -> None:
    many = client.completions.create(model=MODEL, prompt="He said", max_tokens=20, seed=5, n=3)
    one = client.completions.create(model=MODEL, prompt="He said", max_tokens=20, seed=5)
    assert many.choices[0].text == one.choices[0].text
    assert len({c.text for c in many.choices}) == 3


def test_logprobs_and_echo(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="The house of", max_tokens=5, temperature=0, logprobs=3, echo=True
    )
    entry = answer.choices[0].logprobs
    assert entry is not None and entry.token_logprobs is not None and entry.tokens is not None
    assert answer.choices[0].text.startswith("The house of")
    assert "".join(entry.tokens) == answer.choices[0].text
    assert entry.token_logprobs[0] is None
    assert all(v <= 0 for v in entry.token_logprobs[1:])
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "Once"}],
        max_tokens=4,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs
    assert content is not None and content.content is not None
    assert [t.token == t.top_logprobs[0].token for t in content.content] == [True] * 4


HOT: dict[str, object] = {"temperature": 1.5, "seed": 1}


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"logit_bias": {"50": 100}}),
        ({}, {"presence_penalty": 2.0}),
        ({}, {"frequency_penalty": 2.0}),
        ({}, {"extra_body": {"repetition_penalty": 1.8}}),
        ({}, {"max_tokens": 39}),
        ({}, {"stop": ["e"]}),
        ({"stop": ["e"]}, {"extra_body": {"min_tokens": 20}}),
        ({}, {"extra_body": {"stop_token_ids": list(range(200, 600))}}),
        (
            {"logit_bias": {"0": 100}, "extra_body": {"ignore_eos": True}},
            {"extra_body": {"ignore_eos": True, "skip_special_tokens": False}},
        ),
        ({}, HOT),
        (HOT, {"seed": 2}),
        (HOT, {"temperature": 0.5}),
        (HOT, {"extra_body": {"top_k": 2}}),
        (HOT, {"top_p": 0.3}),
        (HOT, {"extra_body": {"min_p": 0.4}}),
        ({}, {"echo": True}),
    ],
    ids=lambda fields: "+".join([*fields, *fields.get("extra_body", {})]) or "greedy",
)
def test_each_sampling_field_changes_the_outcome(
    client: OpenAI, base: dict[str, object], change: dict[str, object]
) -> None:
    plain = {"model": MODEL, "prompt": "The king and the", "max_tokens": 40, "temperature": 0, **base}
    without = client.completions.create(**plain)  # type: ignore[call-overload]
    changed = client.completions.create(**{**plain, **change})  # type: ignore[call-overload]
    assert changed.choices[0].text != without.choices[0].text


def test_ignore_eos_goes_on_past_the_end_of_text(client: OpenAI) -> None:
    fields = {"model": MODEL, "prompt": "Amen", "max_tokens": 9, "logit_bias": {"0": 100}}
    ended = client.completions.create(**fields)  # type: ignore[call-overload]
    going = client.completions.create(**fields, extra_body={"ignore_eos": True})  # type: ignore[call-overload]
    assert (ended.usage.completion_tokens, ended.choices[0].finish_reason) == (1, "stop")
    assert (going.usage.completion_tokens, going.choices[0].finish_reason) == (9, "length")


def test_errors_are_the_clients_own_classes(client: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nope"):
        client.completions.create(model="nope", prompt="x")
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.completions.create(model=MODEL, prompt="x", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="frobnicate"):
        client.completions.create(model=MODEL, prompt="x", extra_body={"frobnicate": 1})
