"""Where steps are launched before the last one's tokens are read, requests get the tokens that they get without."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_drafts_change_nothing import CONTEXT, SHARED, Answer, params_of
from support.drafts import guess
from support.fake_runner import VOCABULARY, LateRunner, fake_engine
from support.small_grammars import SHAPES, small_grammars

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies import POLICIES
from dsc_serve.grammars.follower import Grammars
from dsc_serve.sampling_params import SamplingParams

SIZE = {"block_size": 4, "step_tokens": 16, "max_running": 4, "context": CONTEXT}


@dataclass
class SentChoices:
    prompt: list[int]
    params: SamplingParams
    choices: int
    abort_after: int | None  # steps after its arrival


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    with small_grammars() as made:
        for shape in SHAPES:
            made.compile(shape)
        yield made


def varied(draw: Any) -> SamplingParams:
    """Of most requests nothing is made on the host, else hardly a step would be launched ahead."""
    params = params_of(draw)
    if draw(st.sampled_from([True, True, True, False])):
        plain = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "logprobs": None}
        params = msgspec.structs.replace(params, **plain)
    changes = draw(st.sampled_from([{}, {}, {"max_drafts": 0}, {"structured_outputs": SHAPES[0]}]))
    if "structured_outputs" in changes:
        changes |= {"ignore_eos": False, "min_tokens": 0}
    return msgspec.structs.replace(params, **changes)


REQUESTS = st.lists(
    st.builds(
        lambda shared, tail, params, *rest: SentChoices(SHARED[:shared] + tail, params, *rest),
        st.integers(0, 20),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        st.composite(varied)(),
        st.sampled_from([1, 1, 1, 3]),
        st.sampled_from([None, None, None, 0, 2, 5]),
    ),
    min_size=1,
    max_size=6,
)


def answers(engine: Engine, requests: Sequence[SentChoices], between: int, aborting: bool = True) -> list[list[Answer]]:
    """What the choices of requests get that arrive every so many steps."""
    found = [[Answer() for _ in range(one.choices)] for one in requests]
    waiting, aborts = list(enumerate(requests)), dict[int, int]()
    steps = 0
    while waiting or engine.has_work:
        if waiting and steps >= between * waiting[0][0]:
            number, own = waiting.pop(0)
            seeds = [msgspec.structs.replace(own.params, seed=(own.params.seed or 0) + i) for i in range(own.choices)]
            others = [(f"{number}-{i}", params) for i, params in enumerate(seeds) if i]
            engine.add(f"{number}-0", own.prompt, seeds[0], siblings=others)
            if aborting and own.abort_after is not None:
                aborts[number] = steps + own.abort_after
        for number in [number for number, at in aborts.items() if at <= steps]:
            if engine.finish(f"{number}-0"):
                found[number][0].reason = "abort"
            del aborts[number]
        for delta in engine.step():
            number, choice = map(int, delta.request_id.split("-"))
            answer = found[number][choice]
            assert answer.reason is None
            answer.tokens += delta.token_ids
            answer.logprobs += delta.logprobs or []
            answer.reason = delta.finish_reason
            assert all(0 <= token < VOCABULARY for token in delta.token_ids)
        steps += 1
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    return found


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=REQUESTS,
    blocks=st.integers(14, 30),
    policy=st.sampled_from(sorted(POLICIES)),
    prefix_cache=st.booleans(),
    between=st.integers(0, 3),
    drafts=st.sampled_from([0, 0, 0, 4]),
)
def test_the_same_tokens_with_and_without_the_step_ahead(
    grammars: Grammars,
    requests: list[SentChoices],
    blocks: int,
    policy: str,
    prefix_cache: bool,
    between: int,
    drafts: int,
) -> None:
    """Greedy and seeded, with penalties, log probabilities, grammars, drafts, choices, aborts and preemptions."""

    def engine_with(ahead: bool, blocks: int) -> Engine:
        engine = fake_engine(**SIZE, blocks=blocks, policy=policy, prefix_cache=prefix_cache, ahead=ahead)
        engine.grammars = grammars
        return engine

    alone = [answers(engine_with(False, 200), [one], 0, aborting=False)[0] for one in requests]
    tight = engine_with(True, blocks)
    if drafts:
        guess(tight, drafts, 0.7, 0)
    for own, want in zip(answers(tight, requests, between), alone, strict=True):
        for choice, wanted in zip(own, want, strict=True):
            if choice.reason == "abort":
                assert choice.tokens == wanted.tokens[: len(choice.tokens)]
            else:
                assert choice == wanted
    runner = tight.runner
    assert isinstance(runner, LateRunner) and tight.pace.in_flight is None
