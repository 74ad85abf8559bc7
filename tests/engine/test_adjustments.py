"""Penalties, biases and masks: what the sampler makes of logits before it draws."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_cases import assert_distributed, logits_of, many, request

from dsc_serve import SamplingParams
from dsc_serve.engine.sampler import Sampler

VOCABULARY = 13
EOS = (5, 6)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
pytestmark = pytest.mark.usefixtures("one_thread")


def adjusted_by_hand(row: list[float], prompt: list[int], output: list[int], p: SamplingParams) -> list[float]:
    out = []
    for token, logit in enumerate(row):
        value = logit + p.logit_bias.get(token, 0.0)
        if token in prompt or token in output:
            value = value / p.repetition_penalty if value > 0 else value * p.repetition_penalty
        value -= output.count(token) * p.frequency_penalty
        if token in output:
            value -= p.presence_penalty
        ends = token in p.stop_token_ids or (token in EOS and not p.ignore_eos)
        out.append(-math.inf if ends and len(output) < p.min_tokens else value)
    return out


@settings(max_examples=60, deadline=None)
@given(
    prompt=TOKENS.filter(bool),
    output=TOKENS,
    seed=st.integers(0, 2**32),
    params=st.builds(
        SamplingParams,
        temperature=st.just(0.0),
        presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.25, 2.0, -1.0]),
        repetition_penalty=st.sampled_from([1.0, 1.3, 0.7, 100.0]),
        logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4),
        min_tokens=st.integers(0, 14),
        stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=3).map(tuple),
        ignore_eos=st.booleans(),
    ),
)
def test_adjustments_are_those_of_a_plain_loop(
    prompt: list[int], output: list[int], seed: int, params: SamplingParams
) -> None:
    row = logits_of(VOCABULARY, 4.0, seed)
    logits = row[None].clone()
    (token,) = Sampler(EOS)(logits, [request(params, prompt, output)])
    want = torch.tensor(adjusted_by_hand(row.tolist(), prompt, output, params))
    torch.testing.assert_close(logits[0], want, rtol=1e-5, atol=1e-5)
    assert token == logits[0].argmax()


class Watched(list[int]):
    """Counts the tokens that are read of it."""

    read = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        self.read += len(found) if isinstance(place, slice) else 1
        return found

    def __iter__(self) -> Iterator[int]:
        self.read += len(self)
        return super().__iter__()


def test_penalties_look_at_each_token_once_however_long_the_text_grows() -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=1.3)
    prompt, output = [1, 2, 3] * 100, list[int]()
    growing = request(params, prompt)
    tokens = growing.tokens = Watched(prompt)
    row = logits_of(400, 2.0)
    for step in range(300):
        logits = row[None].clone()
        Sampler(())(logits, [growing])
        if step % 50 == 0:
            want = torch.tensor(adjusted_by_hand(row.tolist(), prompt, output, params))
            torch.testing.assert_close(logits[0], want, rtol=1e-5, atol=1e-5)
        output.append(step * step % 400)
        tokens.append(output[-1])
    assert tokens.read <= len(prompt) + 2 * len(output)


def test_bias_minus_100_bans_and_100_forces() -> None:
    row = logits_of(20, 3.0)
    best = int(row.argmax())
    for temperature in (0.0, 1.0, 2.0):
        banned = SamplingParams(temperature=temperature, logit_bias={best: -100.0})
        forced = SamplingParams(temperature=temperature, logit_bias={int(row.argmin()): 100.0})
        chunk = list(many(banned, 2000))
        assert best not in Sampler([])(row.expand(2000, -1).clone(), chunk)
        chunk = list(many(forced, 2000))
        assert set(Sampler([])(row.expand(2000, -1).clone(), chunk)) == {int(row.argmin())}


def test_penalties_and_masks_shape_what_is_drawn() -> None:
    row, output = logits_of(VOCABULARY, 1.0), [3, 3, 4]
    params = SamplingParams(
        temperature=0.9,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias={1: 1.5, 2: -1.0},
        min_tokens=4,
        stop_token_ids=(7,),
    )
    want = torch.tensor(adjusted_by_hand(row.tolist(), [0, 1], output, params), dtype=torch.float64)
    requests = [request(params, [0, 1], output) for _ in range(4000)]
    for seed, each in enumerate(requests):
        each.seed = seed
    tokens = torch.tensor(Sampler(EOS)(row.expand(4000, -1).clone(), requests))
    assert_distributed(tokens.bincount(minlength=VOCABULARY), (want / 0.9).softmax(dim=0))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_min_tokens_forbids_ends_until_they_are_reached(temperature: float) -> None:
    row = torch.full((VOCABULARY,), -20.0)
    row[[EOS[0], 9]] = torch.tensor([20.0, 30.0])
    params = SamplingParams(temperature=temperature, min_tokens=3, stop_token_ids=(9,), seed=0)
    for size in range(5):
        for ignore_eos in (False, True):
            own = SamplingParams(
                temperature=temperature, min_tokens=3, stop_token_ids=(9,), seed=0, ignore_eos=ignore_eos
            )
            (token,) = Sampler(EOS)(row[None].clone(), [request(own, [1], [2] * size)])
            assert (token == 9) == (size >= 3)
            assert (token == EOS[0]) == (size < 3 and ignore_eos)
    (token,) = Sampler(EOS)(row[None].clone(), [request(params, [1] * 5, [])])
    assert token not in (*EOS, 9), "the prompt does not count"
