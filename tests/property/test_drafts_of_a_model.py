"""A smaller model's drafts change nothing, whatever becomes of its own blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from property.test_drafts_change_nothing import CONTEXT, REQUESTS, answers
from support.drafts import any_width, draft_from
from support.fake_runner import VOCABULARY, FakeRunner, fake_engine
from support.fake_runner import alone as expected

from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.drafts.model import CATCH_UP, DraftModel
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.sampling_params import SamplingParams


class SmallerRunner(FakeRunner):
    """Says what the fake runner does, wrong now and then; whether its blocks hold what it knows is checked as there."""

    def __init__(self, blocks: int, block_size: int, rate: float, seed: int) -> None:
        super().__init__(blocks, block_size)
        self._rate, self._rng = rate, random.Random(seed)

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        result = super().run(work)
        for request_id, token in result.tokens.items():
            if self._rng.random() >= self._rate:
                result.tokens[request_id] = (token + 1) % VOCABULARY
        return result


def drafting(engine: Engine, blocks: int, rate: float, seed: int, most: int, context: int = CONTEXT) -> DraftModel:
    """Let an engine draft from a smaller runner with so many blocks of its own, in widths by chance."""
    smaller = DraftModel(SmallerRunner(blocks, 4, rate, seed), blocks, 4, engine.config.step_tokens, context)
    draft_from(engine, most, {COMPANION: smaller.kind()}, any_width(seed))
    return smaller


@settings(max_examples=60, deadline=None)
@given(
    requests=REQUESTS,
    blocks=st.integers(14, 30),
    own_blocks=st.integers(3, 40),
    policy=st.sampled_from(sorted(POLICIES)),
    prefix_cache=st.booleans(),
    between=st.integers(0, 3),
    most=st.integers(1, 6),
    rate=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 99),
)
def test_a_smaller_models_drafts_change_nothing(
    requests: list[tuple[list[int], SamplingParams]],
    blocks: int,
    own_blocks: int,
    policy: str,
    prefix_cache: bool,
    between: int,
    most: int,
    rate: float,
    seed: int,
) -> None:
    """Read on after rejections and preemptions, read anew where its blocks were taken; all are given back."""
    size = {"block_size": 4, "step_tokens": 16, "max_running": 4, "context": CONTEXT}
    alone = [answers(fake_engine(**size, blocks=200), [request], 0)[0] for request in requests]
    engine = fake_engine(**size, blocks=blocks, policy=policy, prefix_cache=prefix_cache)
    smaller = drafting(engine, own_blocks, rate, seed, most)
    assert answers(engine, requests, between) == alone
    assert smaller.pool.free == own_blocks
    assert not smaller._held


def test_right_drafts_of_a_smaller_model_save_steps() -> None:
    """Greedy or sampled: it draws what the request would of the same logits."""
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, seed=7, max_tokens=16, ignore_eos=True)
        steps, sizes = {}, []
        for rate in (None, 1.0, 0.0):
            engine = fake_engine(blocks=40, step_tokens=32)
            if rate is not None:
                smaller = drafting(engine, 40, rate, 0, 3)
                engine.drafter._choose = lambda options, *_: [option.most for option in options]
            answers(engine, [([1, 2, 3], params)], 0)
            steps[rate] = engine.counters.steps
            if rate == 1.0:
                sizes = smaller._runner.step_sizes  # type: ignore[attr-defined]
                report = engine.drafter.report
                assert report.accepted[COMPANION] == report.drafted[COMPANION] > 8
        assert steps == {None: 16, 1.0: 5, 0.0: 16}
        assert max(sizes) == 4  # the prompt and one token at first, then what was kept and the token after it


def test_a_long_prompt_is_read_in_parts() -> None:
    """Nobody waits for more than CATCH_UP tokens of it in a step."""
    engine = fake_engine(blocks=400, block_size=4, step_tokens=2 * CATCH_UP, context=1200)
    smaller = drafting(engine, 400, 1.0, 0, 3, context=1200)
    engine.drafter._choose = lambda options, *_: [option.most for option in options]
    prompt = [i % VOCABULARY for i in range(3 * CATCH_UP)]
    answers(engine, [(prompt, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))], 0)
    sizes = smaller._runner.step_sizes  # type: ignore[attr-defined]
    assert sizes[:3] == [CATCH_UP] * 3 and max(sizes) == CATCH_UP
    assert engine.drafter.report.accepted[COMPANION] > 0


def test_beyond_the_smaller_models_context_nothing_is_drafted() -> None:
    engine = fake_engine(blocks=40, step_tokens=32)
    smaller = drafting(engine, 40, 1.0, 0, 3, context=10)
    engine.drafter._choose = lambda options, *_: [option.most for option in options]
    answers(engine, [([1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))], 0)
    assert 0 < engine.drafter.report.accepted[COMPANION] < 10
    assert smaller.pool.free == 40


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: 5 bytes")])
def test_where_its_memory_runs_out_requests_go_on_without(error: Exception) -> None:
    engine = fake_engine(blocks=40, step_tokens=32)
    smaller = drafting(engine, 40, 1.0, 0, 3)
    engine.drafter._choose = lambda options, *_: [option.most for option in options]
    run, calls = smaller._runner.run, [0]

    def failing(work: Sequence[tuple[Request, int]]) -> StepResult:
        calls[0] += 1
        if calls[0] % 4 == 0:
            raise error
        return run(work)

    smaller._runner.run = failing  # type: ignore[method-assign]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    assert answers(engine, [([1, 2, 3], params)], 0)[0].tokens == expected([1, 2, 3], 20, ())
    assert calls[0] > 8 and engine.drafter.report.accepted[COMPANION] > 0
    assert smaller.pool.free == 40


def test_a_smaller_model_that_fails_leaves_its_drafts_out_and_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    engine = fake_engine(blocks=40, step_tokens=32)
    smaller = drafting(engine, 40, 1.0, 0, 3)
    engine.drafter._choose = lambda options, *_: [option.most for option in options]

    def failing(work: Sequence[tuple[Request, int]]) -> StepResult:
        raise ZeroDivisionError

    smaller._runner.run = failing  # type: ignore[method-assign]
    asked = [([1, 2, 3], SamplingParams(temperature=0, max_tokens=20))]
    assert answers(engine, asked, 0) == answers(fake_engine(blocks=40, step_tokens=32), asked, 0)
    assert smaller.pool.free == 40
    assert caplog.text.count("the draft model failed") == 1


def test_a_smaller_model_is_asked_only_where_nobody_knows_better() -> None:
    """A text that repeats itself is drafted by n-grams once these have proved right."""
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, logit_bias={5: 100.0})
    engine = fake_engine(blocks=40, step_tokens=32)
    smaller = DraftModel(SmallerRunner(40, 4, 0.0, 0), 40, 4, 32, CONTEXT)
    draft_from(engine, 3, {**SOURCES, COMPANION: smaller.kind()})
    answers(engine, [([1, 2, 3], params)], 0)
    report = engine.drafter.report
    assert report.accepted["ngram"] > 10
    assert report.drafted[COMPANION] <= 9
