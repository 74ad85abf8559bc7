"""How many drafts a step has, and what they learn from."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.drafts import guess
from support.fake_runner import EOS, alone, fake_engine

from dsc_serve.config import EngineConfig
from dsc_serve.engine.draft_time import DraftCost, DraftTime
from dsc_serve.engine.drafts import SourceKind
from dsc_serve.engine.drafts.drafter import PAUSE, PROBE, REFRESH, Drafter
from dsc_serve.engine.drafts.drafting import DraftSource
from dsc_serve.engine.drafts.widths import Option, widths
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.step_time import Estimate, Load, StepTime
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams

FREE = DraftCost(0.0, 0.0)


def per_ms(chance: float, width: int, drawn: float, ms: float, cost: DraftCost) -> float:
    gain = sum(chance**i for i in range(1, width + 1))
    return (drawn + gain) / (ms + (cost.request + cost.token * width if width else 0.0))


@settings(max_examples=200, deadline=None)
@given(
    chance=st.floats(0.01, 1.0),
    most=st.integers(1, 8),
    ms=st.floats(0.5, 30.0),
    request=st.floats(0.0, 3.0),
    token=st.floats(0.0, 3.0),
)
def test_one_requests_width_makes_the_most_of_a_millisecond(
    chance: float, most: int, ms: float, request: float, token: float
) -> None:
    cost = DraftCost(request, token)
    (width,) = widths([Option([chance] * most)], 1, ms, cost, 100)
    best = max(per_ms(chance, w, 1, ms, cost) for w in range(most + 1))
    assert per_ms(chance, width, 1, ms, cost) == pytest.approx(best)


def test_who_is_likelier_right_comes_first_and_room_bounds_all() -> None:
    assert widths([Option([0.5] * 4), Option([0.9] * 4)], 2, 10.0, FREE, 5) == [1, 4]
    assert widths([Option([0.5] * 4), Option([0.9] * 4)], 2, 10.0, FREE, 0) == [0, 0]


def test_drafts_vanish_as_the_batch_fills() -> None:
    """A step of many rows pays for each more row as for a row that is sure to be right."""
    cost, found = DraftCost(0.1, 0.3), []
    for running in (1, 2, 4, 8, 16, 32):
        step_ms = 2.0 + 0.3 * running
        found.append(sum(widths([Option([0.6] * 7)] * running, running, step_ms, cost, 500)) / running)
    assert found == sorted(found, reverse=True)
    assert found[0] >= 2 and found[-1] == 0


def test_what_a_grammar_has_to_be_asked_for_is_dearer() -> None:
    """Tokens that must follow need no mask; those that may follow them need one each."""
    chances = [0.95] * 3 + [0.6] * 4
    assert widths([Option(chances, 0.0, 3)], 1, 10.0, FREE, 100) == [7]
    assert widths([Option(chances, 5.0, 3)], 1, 10.0, FREE, 100) == [3]
    (some,) = widths([Option(chances, 1.2, 3)], 1, 10.0, FREE, 100)
    assert 3 < some < 7


def test_the_wait_for_masks_is_learned() -> None:
    time = DraftTime()
    for masks in (1, 4, 0, 7) * 30:
        time.observe_masks(masks, 0.8 * masks)
    assert time.mask_ms == pytest.approx(0.8, abs=0.01)
    for _ in range(80):
        time.observe_masks(5, 0.0)
    assert time.mask_ms < 0.05


def test_a_mixture_gets_narrower_drafts() -> None:
    """The dearer the rows, the fewer: as a mixture of experts reads more experts for each."""
    dense, mixture = DraftCost(0.0, 0.5), DraftCost(0.0, 3.0)
    (wide,) = widths([Option([0.7] * 7)], 1, 15.0, dense, 100)
    (narrow,) = widths([Option([0.7] * 7)], 1, 15.0, mixture, 100)
    assert wide > narrow >= 1


def test_the_cost_of_drafts_is_learned() -> None:
    time = DraftTime()
    assert time.cost(0.5) == DraftCost(0.0, 0.5)  # as another request's token, before anything is known
    for requests, tokens in [(1, 3), (1, 7), (2, 5), (4, 20), (3, 3)] * 12:
        time.observe(requests, tokens, 0.4 * requests + 0.2 * tokens)
    cost = time.cost(0.5)
    assert cost.request == pytest.approx(0.4, abs=0.05)
    assert cost.token == pytest.approx(0.2, abs=0.02)
    for _ in range(60):
        time.observe(2, 6, -1.0)
    assert min(time.cost(0.0).request, time.cost(0.0).token) >= 0


def test_steps_with_drafts_do_not_change_what_others_are_taken_to_cost() -> None:
    times = StepTime()
    for singles in [1, 2, 4, 8] * 10:
        times.observe(Load(singles=singles), 2.0 + 0.5 * singles)
    before = times.estimate
    for _ in range(20):
        times.observe(Load(singles=2, drafted=1, drafts=4), 5.0)
    assert times.estimate == before
    assert times.drafts.cost(0.5).request + 4 * times.drafts.cost(0.5).token == pytest.approx(2.0, abs=0.2)


class Wrong(DraftSource):
    """Drafts that no answer has."""

    def __init__(self) -> None:
        self.asked = 0

    def draft(self, tokens: list[int], most: int) -> tuple[list[int], int]:
        self.asked += 1
        return [(alone(tokens, 1, ())[0] + 1) % 29 or 1] * most, 0


def drafting_engine(kinds: dict[str, SourceKind], estimate: Estimate) -> Engine:
    engine = fake_engine(blocks=200, context=400, estimate=estimate)
    engine.drafter = Drafter(7, 16, (EOS,), kinds)
    return engine


def test_drafts_that_are_never_right_are_given_up_and_tried_now_and_then() -> None:
    engine = drafting_engine({"wrong": SourceKind(lambda request: Wrong(), (0.6,))}, Estimate(2.0, 0.5))
    engine.add("a", [1, 2], SamplingParams(temperature=0, max_tokens=300, ignore_eos=True))
    while engine.has_work:
        engine.step()
    assert engine.counters.steps == 300
    assert 300 // PROBE - 1 <= engine.drafter.report.drafted["wrong"] <= 12
    assert engine.drafter.report.accepted["wrong"] == 0


def test_drafts_that_cannot_pay_are_asked_for_less_often_until_the_streams_change() -> None:
    source = Wrong()
    engine = drafting_engine({"wrong": SourceKind(lambda request: source, (0.9,))}, Estimate(2.0, 0.5))
    engine.drafter._choose = lambda options, *_: [0] * len(options)
    engine.add("a", [1, 2], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True))
    for _ in range(50):
        engine.step()
    assert 50 // (PAUSE + 1) <= source.asked <= 50 // (PAUSE + 1) + PAUSE + 1
    engine.add("b", [1, 2], SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, max_drafts=0))
    engine.step()  # the prompt
    before = source.asked
    engine.step()
    assert source.asked == before + 1


def test_one_step_of_some_is_always_without() -> None:
    """What steps take without drafts is to stay known: it is looked at soon, and then ever more seldom."""
    engine = fake_engine(blocks=200, context=700, step_tokens=16)
    guess(engine, 1, 1.0, 0)
    engine.drafter._choose = lambda options, *_: [1] * len(options)
    engine.add("a", [1], SamplingParams(temperature=0, max_tokens=400, ignore_eos=True))
    while engine.has_work:
        engine.step()
    sizes = engine.runner.step_sizes[1:-1]
    first, last = REFRESH
    expected, place, after = [], 0, first
    while place + after < len(sizes):
        expected.append(place + after)
        place, after = place + after + 1, min(2 * after, last)
    assert [i for i, size in enumerate(sizes) if size == 1] == expected


def test_a_request_may_have_fewer_or_none() -> None:
    for most, widest in ((0, 1), (2, 3), (None, 6)):
        engine = fake_engine(blocks=40, step_tokens=32)
        guess(engine, 5, 1.0, 0)
        engine.drafter._choose = lambda options, *_: [option.most for option in options]
        params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, max_drafts=most)
        engine.add("a", [1], params)
        while engine.has_work:
            engine.step()
        assert max(engine.runner.step_sizes) == widest


def test_speculation_off_asks_nobody() -> None:
    engine = fake_engine()
    assert EngineConfig().drafts == engine.drafter.most == 0
    with pytest.raises(ParameterError, match="speculation is off here"):
        engine.add("a", [1], SamplingParams(prediction_token_ids=(1, 2)))
    with pytest.raises(ParameterError, match="max_drafts is 3; it must be at most 0"):
        engine.add("a", [1], SamplingParams(max_drafts=3))
    request = engine.add("a", [1], SamplingParams(temperature=0, max_tokens=9))
    while engine.has_work:
        engine.step()
    assert request.drafting is None
    assert EngineConfig(speculation="auto").drafts == 7
    assert EngineConfig(speculation="auto", max_drafts=3).drafts == 3
