"""What a caller may not ask, each refused by the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from dsc_serve.parameter_errors import ContextLengthError, ParameterError
from dsc_serve.sampling_params import EngineCapacity, SamplingParams, resolve_max_tokens


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1),
        ("temperature", -1e-9),
        ("temperature", 1e300),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("top_k", 2**31),
        ("top_k", 1.5),
        ("min_p", -0.1),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("inf")),
        ("repetition_penalty", 0),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {1: "x"}),
        ("logit_bias", None),
        ("logit_bias", dict.fromkeys(range(1025), 1.0)),
        ("seed", 1.5),
        ("seed", 2**64),
        ("max_tokens", -1),
        ("max_tokens", 2.5),
        ("max_tokens", "5"),
        ("min_tokens", 17),
        ("stop", "text"),
        ("stop", None),
        ("stop", ("",)),
        ("stop", tuple("abcdefghijklmnopq")),
        ("stop", ("x" * 1025,)),
        ("stop_token_ids", 5),
        ("stop_token_ids", tuple(range(1025))),
        ("stop_token_ids", (-1,)),
        ("stop_token_ids", (True,)),
        ("ignore_eos", "no"),
        ("logprobs", 21),
        ("logprobs", 1.5),
        ("prompt_logprobs", -1),
        ("n", 0),
        ("n", 129),
        ("n", 2.5),
    ],
)
def test_a_value_that_cannot_be_used_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert "must be" in str(caught.value)


def test_choices_have_seeds_of_their_own_and_the_first_keeps_its() -> None:
    params = SamplingParams(seed=2**64 - 1, n=4)
    seeds = [params.for_choice(i).seed for i in range(4)]
    assert seeds[0] == 2**64 - 1
    assert len(set(seeds)) == 4
    assert all(params.for_choice(i).n == 1 for i in range(4))


def test_min_tokens_must_fit_into_what_the_prompt_leaves() -> None:
    capacity = EngineCapacity(vocab_size=10, max_model_len=20, num_blocks=5, block_size=4)
    assert resolve_max_tokens([1] * 8, SamplingParams(max_tokens=None, min_tokens=12), capacity) == 12
    with pytest.raises(ParameterError, match="min_tokens is 13; it must be at most 12"):
        resolve_max_tokens([1] * 8, SamplingParams(max_tokens=None, min_tokens=13), capacity)


@pytest.mark.parametrize("tiny", [1e-9, 1e-8, 0.0009, 5e-324])
def test_a_temperature_at_which_nothing_else_is_ever_drawn_is_greedy(tiny: float) -> None:
    assert SamplingParams(temperature=tiny) == SamplingParams(temperature=0)
    assert SamplingParams(temperature=tiny).greedy


def test_what_does_not_fit_can_be_said_in_openais_words() -> None:
    with pytest.raises(ContextLengthError, match="max_tokens is 9 and the prompt has 15 tokens; together") as error:
        resolve_max_tokens([1] * 15, SamplingParams(max_tokens=9), EngineCapacity(10, 20, 5, 4))
    assert error.value.told("messages", "max_completion_tokens") == (
        "This model's maximum context length is 20 tokens. However, you requested 24 tokens (15 in the messages, 9 in "
        "the completion). Please reduce the length of the messages or completion. max_completion_tokens may be at most "
        "5, together with the messages 20."
    )
    with pytest.raises(ContextLengthError, match="prompt has 9 tokens; the KV pool holds 8") as error:
        resolve_max_tokens([1] * 9, SamplingParams(max_tokens=None), EngineCapacity(10, 20, 2, 4))
    assert error.value.told("prompt", "max_tokens") == (
        "This model's maximum context length is 8 tokens (the KV pool holds 8). However, your prompt resulted in 9 "
        "tokens. Please reduce the length of the prompt."
    )
