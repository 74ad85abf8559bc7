"""Penalties, biases and masks of a whole step at once are those of its rows one by one."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.sampling_cases import request

from dsc_serve import SamplingParams
from dsc_serve.engine.penalties import adjust_together
from dsc_serve.engine.sampler import Sampler

VOCABULARY = 13
EOS = (5, 6)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
PARAMS = st.builds(
    SamplingParams,
    presence_penalty=st.sampled_from([0.0, 0.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.3, -1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.7]),
    logit_bias=st.dictionaries(st.integers(0, VOCABULARY - 1), st.floats(-100, 100), max_size=4),
    min_tokens=st.integers(0, 14),
    stop_token_ids=st.lists(st.integers(0, VOCABULARY - 1), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
)
pytestmark = pytest.mark.usefixtures("one_thread")


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.tuples(TOKENS.filter(bool), TOKENS, PARAMS), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rows_together_are_rows_one_by_one(rows: list[tuple[list[int], list[int], SamplingParams]], seed: int) -> None:
    requests = [request(params, prompt, output) for prompt, output, params in rows]
    logits = 4 * torch.randn(len(rows), VOCABULARY, generator=torch.Generator().manual_seed(seed))
    one_by_one, sampler = logits.clone(), Sampler(EOS)
    for row, own in zip(one_by_one, requests, strict=True):
        sampler._adjust(row, own)
    adjust_together(logits, requests, EOS)
    assert torch.equal(logits, one_by_one)


def test_rows_without_any_are_left_alone() -> None:
    logits = torch.ones(2, VOCABULARY)
    adjust_together(logits, [request(SamplingParams(), [1, 2], [3])] * 2, EOS)
    assert (logits == 1).all()
