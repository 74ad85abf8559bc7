"""The scheduler's own rules: order, admission, preemption, and commits that come late."""

from __future__ import annotations

from support.fake_runner import fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.sampling_params import SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def first_tokens(engine: Engine) -> list[str]:
    """Request ids in the order in which they got their first token."""
    order: list[str] = []
    while engine.has_work:
        order += [d.request_id for d in engine.step() if d.token_ids and d.request_id not in order]
    return order


def test_requests_are_served_in_order_of_arrival() -> None:
    engine = fake_engine(blocks=100, step_tokens=8, max_running=2)
    names = ["d", "a", "c", "b", "e"]
    for name in names:
        engine.add(name, [1, 2, 3, 4, 5, 6], LONG)
    assert first_tokens(engine) == names


def test_a_preempted_request_is_the_first_to_come_back() -> None:
    engine = fake_engine(blocks=9, block_size=4, max_running=8)
    for name in "abcd":
        engine.add(name, [1] * 6, LONG)
    while not engine.scheduler.preemptions:
        engine.step()
    victim = next(iter(engine.scheduler.waiting))
    assert victim not in engine.scheduler.running
    assert list(engine.scheduler.waiting) == sorted(engine.scheduler.waiting)
    request = engine.scheduler.waiting[victim]
    assert (request.num_computed, request.blocks) == (0, [])
    assert request.output_size > 0
    tokens = list(request.tokens)
    while engine.has_work:
        engine.step()
    assert request.tokens[: len(tokens)] == tokens
    assert request.output_size == 20


def test_planning_changes_nothing() -> None:
    engine = fake_engine(blocks=9, block_size=4)
    for name in "abcd":
        engine.add(name, [1] * 6, LONG)
    while engine.has_work:
        before = [(r.id, r.num_computed, list(r.blocks)) for r in engine.scheduler.running.values()]
        assert engine.scheduler.plan() == engine.scheduler.plan()
        assert before == [(r.id, r.num_computed, list(r.blocks)) for r in engine.scheduler.running.values()]
        engine.step()


def test_a_late_result_of_an_ended_request_is_dropped() -> None:
    engine = fake_engine()
    engine.add("a", [1, 2], LONG)
    engine.add("b", [1, 2], LONG)
    scheduler = engine.scheduler
    plan = scheduler.plan()
    work = scheduler.begin(plan)
    result = engine.runner.run(work)
    assert engine.finish("a")
    ended = scheduler.commit(plan, result.tokens, frozenset())
    assert ended == {"b": None}
    assert scheduler.fault() is None


def test_max_tokens_of_zero_computes_the_prompt_and_ends() -> None:
    engine = fake_engine(step_tokens=8)
    engine.add("a", [1] * 20, SamplingParams(max_tokens=0))
    deltas = [d for _ in range(3) for d in engine.step()]
    assert [(d.token_ids, d.finish_reason) for d in deltas] == [([], "length")]
    assert not engine.has_work
