"""With drafts, right and wrong and of any width, requests get the tokens that they get without."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafts import guess
from support.fake_runner import VOCABULARY, fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.output import TokenLogprobs
from dsc_serve.engine.policies import POLICIES
from dsc_serve.sampling_params import SamplingParams

CONTEXT = 48
SHARED = [(5 * i) % VOCABULARY for i in range(20)]


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: str | None = None


def params_of(draw: Any) -> SamplingParams:
    max_tokens = draw(st.integers(1, 20))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.8, 1.5])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        top_k=draw(st.sampled_from([0, 0, 3])),
        seed=draw(st.integers(0, 2**40)),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, 1.5])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 2.0])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 2.0])),
        logit_bias=draw(st.sampled_from([{}, {}, {3: 4.0, 5: -2.0}])),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)),
        stop_token_ids=tuple(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=2))),
        ignore_eos=draw(st.booleans()),
        logprobs=draw(st.sampled_from([None, None, 2])),
    )


REQUESTS = st.lists(
    st.builds(
        lambda shared, tail, params: (SHARED[:shared] + tail, params),
        st.integers(0, 20),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        st.composite(params_of)(),
    ),
    min_size=1,
    max_size=6,
)


def answers(engine: Engine, requests: list[tuple[list[int], SamplingParams]], between: int) -> list[Answer]:
    """What requests get that arrive every so many steps."""
    found = [Answer() for _ in requests]
    waiting = list(enumerate(requests))
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps >= between * waiting[0][0]:
            number, (prompt, params) = waiting.pop(0)
            engine.add(str(number), prompt, params)
        for delta in engine.step():
            own = found[int(delta.request_id)]
            assert own.reason is None
            own.tokens += delta.token_ids
            own.logprobs += delta.logprobs or []
            own.reason = delta.finish_reason
            assert delta.logprobs is None or len(delta.logprobs) == len(delta.token_ids)
        steps += 1
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    return found


@settings(max_examples=80, deadline=None)
@given(
    requests=REQUESTS,
    blocks=st.integers(14, 30),
    policy=st.sampled_from(sorted(POLICIES)),
    prefix_cache=st.booleans(),
    between=st.integers(0, 3),
    most=st.integers(1, 7),
    rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_drafts_change_nothing_but_the_number_of_steps(
    requests: list[tuple[list[int], SamplingParams]],
    blocks: int,
    policy: str,
    prefix_cache: bool,
    between: int,
    most: int,
    rate: float,
    seed: int,
) -> None:
    """Sampled or greedy, with penalties, biases, ends, log probabilities, shared prefixes and preemptions."""
    size = {"blocks": 200, "block_size": 4, "step_tokens": 16, "max_running": 4, "context": CONTEXT}
    alone = [answers(fake_engine(**size), [request], 0)[0] for request in requests]
    predicted = [
        (prompt, msgspec.structs.replace(params, prediction_token_ids=tuple(own.tokens)))
        for (prompt, params), own in zip(requests, alone, strict=True)
    ]
    tight = fake_engine(**{**size, "blocks": blocks}, policy=policy, prefix_cache=prefix_cache)
    guess(tight, most, rate, seed, known=True)
    assert answers(tight, predicted, between) == alone


def test_right_drafts_save_steps_and_wrong_ones_cost_none() -> None:
    params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
    steps = {}
    for rate in (None, 0.0, 1.0):
        engine = fake_engine(blocks=40, step_tokens=32)
        if rate is not None:
            guess(engine, 3, rate, 0)
            engine.drafter._choose = lambda options, *_: [option.most for option in options]
        answers(engine, [([1, 2, 3], params)], 0)
        steps[rate] = engine.counters.steps
    assert steps == {None: 16, 0.0: 16, 1.0: 5}  # the prompt's step draws one token, then four at a time, then three


def test_a_step_without_drafts_is_the_step_that_it_was() -> None:
    """The same work, by the same number of tokens, whether or not the engine may draft."""
    sizes = []
    for drafts in (False, True):
        engine = fake_engine(blocks=40)
        if drafts:
            guess(engine, 3, 1.0, 0)
            engine.drafter._choose = lambda options, *_: [0] * len(options)
        answers(engine, [([1, 2, 3], replace_tokens(9)), ([4], replace_tokens(5))], 1)
        sizes.append(engine.runner.step_sizes)
    assert sizes[0] == sizes[1]


def replace_tokens(count: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
