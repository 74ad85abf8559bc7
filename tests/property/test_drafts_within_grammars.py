"""With drafts, requests that follow a grammar get the tokens that they get without, however late its answers come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_drafts_change_nothing import CONTEXT, SHARED, Answer, answers
from property.test_drafts_of_a_model import SmallerRunner
from support.drafts import all_there_are, any_width, draft_from, guess
from support.fake_runner import VOCABULARY, FakeRunner, fake_engine
from support.small_grammars import SHAPES, small_grammars

from dsc_serve.bench.step.known_drafts import known_kinds
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.drafts.model import DraftModel
from dsc_serve.engine.engine import Engine
from dsc_serve.grammars.follower import Grammars
from dsc_serve.sampling_params import SamplingParams

SIZE = {"block_size": 4, "step_tokens": 16, "max_running": 4, "context": CONTEXT}


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    with small_grammars() as made:
        for shape in SHAPES:
            made.compile(shape)
        yield made


def engine_with(grammars: Grammars, **settings: Any) -> Engine:
    engine = fake_engine(**{**SIZE, "blocks": 200, **settings})
    engine.grammars = grammars
    return engine


def params_of(draw: Any) -> SamplingParams:
    max_tokens = draw(st.integers(1, 20))
    shape = draw(st.sampled_from([None, *SHAPES, *SHAPES]))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 1.0])),
        top_k=draw(st.sampled_from([0, 3])),
        seed=draw(st.integers(0, 2**40)),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 2.0])),
        logit_bias=draw(st.sampled_from([{}, {}, {3: 4.0, 5: -2.0}])),
        max_tokens=max_tokens,
        min_tokens=draw(st.integers(0, max_tokens)) if shape is None else 0,
        stop_token_ids=tuple(draw(st.sets(st.integers(0, VOCABULARY - 1), max_size=1))),
        ignore_eos=draw(st.booleans()) if shape is None else False,
        logprobs=draw(st.sampled_from([None, None, 2])),
        structured_outputs=shape,
    )


REQUESTS = st.lists(
    st.builds(
        lambda shared, tail, params: (SHARED[:shared] + tail, params),
        st.integers(0, 20),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=6),
        st.composite(params_of)(),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=REQUESTS,
    blocks=st.integers(14, 30),
    between=st.integers(0, 3),
    most=st.integers(1, 7),
    source=st.sampled_from(["right", "some right", "none right", "real", "a model's"]),
    forward_s=st.sampled_from([0.0, 0.0002, 0.02]),
    seed=st.integers(0, 99),
)
def test_drafts_change_nothing_where_a_grammar_is_followed(
    grammars: Grammars,
    requests: list[tuple[list[int], SamplingParams]],
    blocks: int,
    between: int,
    most: int,
    source: str,
    forward_s: float,
    seed: int,
) -> None:
    """Drafts right and wrong, such as the grammar forbids among them, with answers that come in time or do not."""
    alone = [answers(engine_with(grammars), [request], 0)[0] for request in requests]
    predicted = [
        (prompt, msgspec.structs.replace(params, prediction_token_ids=tuple(own.tokens)))
        for (prompt, params), own in zip(requests, alone, strict=True)
    ]
    tight = engine_with(grammars, blocks=blocks)
    runner = tight.runner
    assert isinstance(runner, FakeRunner)
    runner.forward_s = forward_s
    if source == "real":
        draft_from(tight, most, SOURCES)
    elif source == "a model's":
        smaller = DraftModel(SmallerRunner(12, 4, 0.8, seed), 12, 4, 16, CONTEXT)
        draft_from(tight, most, {**SOURCES, COMPANION: smaller.kind()}, any_width(seed))
    else:
        guess(tight, most, {"right": 1.0, "some right": 0.6, "none right": 0.0}[source], seed, known=True)
    assert finished(answers(tight, predicted, between)) == finished(alone)
    assert len(tight.followers) == 0


def finished(found: list[Answer]) -> list[tuple[list[int], object, str | None]]:
    return [(own.tokens, own.logprobs, own.reason) for own in found]


def test_tokens_that_need_not_follow_are_drafted_too(grammars: Grammars) -> None:
    """A grammar that forces nothing: a request whose text is known takes a fraction of the steps."""
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=24, structured_outputs=SHAPES[0])
    params = msgspec.structs.replace(params, logit_bias={0: -100.0})
    plain = engine_with(grammars)
    (alone,) = answers(plain, [([1, 2, 3], params)], 0)
    assert len(alone.tokens) == 24
    engine = engine_with(grammars, step_tokens=32)
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.forward_s = 0.02
    draft_from(engine, 7, known_kinds(1.0, VOCABULARY))
    told = msgspec.structs.replace(params, prediction_token_ids=tuple(alone.tokens))
    (found,) = answers(engine, [([1, 2, 3], told)], 0)
    assert (found.tokens, found.reason) == (alone.tokens, alone.reason)
    assert engine.drafter.report.accepted["known"] > 12
    assert engine.counters.steps < plain.counters.steps


def test_a_forced_run_goes_on_beyond_it(grammars: Grammars) -> None:
    """What the grammar forces and what the source knows share a step, and each is counted as what it is."""
    params = SamplingParams(temperature=1.0, seed=4, max_tokens=40, structured_outputs=SHAPES[2])
    (alone,) = answers(engine_with(grammars), [([1, 2, 3], params)], 0)
    engine = engine_with(grammars, step_tokens=32)
    assert isinstance(engine.runner, FakeRunner)
    engine.runner.forward_s = 0.02
    kinds = {**known_kinds(1.0, VOCABULARY), "grammar": SOURCES["grammar"]}
    draft_from(engine, 7, kinds, all_there_are)
    mixed = []
    learn = engine.drafter.learn
    engine.drafter.learn = lambda plan, further: (  # type: ignore[method-assign, assignment]
        mixed.extend((own.led, len(own.tokens)) for own in plan.drafts.values()),
        learn(plan, further),
    )
    told = msgspec.structs.replace(params, prediction_token_ids=tuple(alone.tokens))
    (found,) = answers(engine, [([1, 2, 3], told)], 0)
    assert (found.tokens, found.reason) == (alone.tokens, alone.reason)
    report = engine.drafter.report
    assert report.accepted["grammar"] == report.drafted["grammar"] > 0
    assert any(0 < led < size for led, size in mixed), mixed


def test_widths_by_chance_change_nothing_either(grammars: Grammars) -> None:
    asked = [
        ([1 + i, 2, 3], SamplingParams(temperature=1.0, seed=i, max_tokens=20, structured_outputs=shape))
        for i, shape in enumerate(SHAPES)
    ]
    alone = [answers(engine_with(grammars), [request], 0)[0] for request in asked]
    told = [
        (prompt, msgspec.structs.replace(params, prediction_token_ids=tuple(own.tokens)))
        for (prompt, params), own in zip(asked, alone, strict=True)
    ]
    for seed in range(4):
        engine = engine_with(grammars)
        draft_from(engine, 5, {**known_kinds(0.7, VOCABULARY), **SOURCES}, any_width(seed))
        assert finished(answers(engine, told, 1)) == finished(alone)
