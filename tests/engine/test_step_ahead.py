"""Steps that are launched before the last one's tokens have been read: in which order, for whom, and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from support.drafts import guess
from support.fake_runner import EOS, VOCABULARY, LateRunner, LateStep, alone, fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

EIGHT = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
ENDING = next(p for p in ([i, 3, 5] for i in range(1, VOCABULARY)) if 3 < len(alone(p, 20)) < 8)  # of itself


def ahead(**sizes: Any) -> tuple[Engine, LateRunner]:
    engine = fake_engine(ahead=True, **{"blocks": 60, **sizes})
    assert isinstance(engine.runner, LateRunner)
    return engine, engine.runner


def run(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    return tokens


def test_each_step_is_launched_before_the_last_one_is_read() -> None:
    engine, runner = ahead()
    for name, prompt in (("a", [1, 2, 3]), ("b", [4, 5])):
        engine.add(name, prompt, EIGHT)
    assert engine.step() == [] and runner.events == ["launch"]
    tokens = run(engine)
    assert tokens == {"a": alone([1, 2, 3], 8, ()), "b": alone([4, 5], 8, ())}
    assert runner.events == ["launch", *["launch", "read"] * 7, "read"]
    assert engine.counters.steps == 8


def test_who_needs_no_more_tokens_is_not_computed_again() -> None:
    """How many tokens there will be is known before they are."""
    engine, runner = ahead(step_tokens=8)
    engine.add("a", [1] * 11, EIGHT)
    engine.add("b", [2] * 3, SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))
    run(engine)
    assert sum(runner.step_sizes) == 11 + 7 + 3 + 2 and "run" not in runner.events


def test_the_row_after_an_end_of_text_counts_for_nobody() -> None:
    seen = []
    for early in (False, True):
        engine = fake_engine(blocks=60, policy="fair", ahead=early)
        engine.add("long", [7] * 5, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        engine.add(
            "short", ENDING, SamplingParams(temperature=0, max_tokens=20), scheduling=SchedulingParams(tenant="other")
        )
        tokens: list[int] = []
        while engine.scheduler.get("short") is not None:
            tokens += [token for d in engine.step() for token in d.token_ids if d.request_id == "short"]
        level = engine.scheduler.accounts._departed["other"]
        run(engine)
        report = engine.report
        seen.append((tokens, level, report.tokens.sum, report.requests.sum, engine.counters.steps))
    assert seen[0] == seen[1] and seen[0][0] == alone(ENDING, 20) and seen[0][0][-1] == EOS


def test_a_step_of_nobody_is_no_step() -> None:
    counts = []
    for early in (False, True):
        engine = fake_engine(ahead=early)
        engine.add("a", ENDING, SamplingParams(temperature=0, max_tokens=20))
        assert run(engine) == {"a": alone(ENDING, 20)}
        counts.append((engine.counters.steps, engine.report.tokens.sum))
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "fields",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"repetition_penalty": 1.5},
        {"logprobs": 1},
        {"routing": 2},
    ],
    ids=str,
)
def test_who_needs_the_host_is_waited_for_and_then_steps_fly_again(fields: dict[str, Any]) -> None:
    engine, runner = ahead()
    engine.capacity = msgspec.structs.replace(
        engine.capacity, picks="atoms", picking=(0,), pickable=9, picks_per_token=3
    )
    engine.add("plain", [1, 2, 3], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    for _ in range(3):
        engine.step()
    assert set(runner.events) == {"launch", "read"}
    engine.add("a", [1, 2], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **fields))
    before = len(runner.events)
    while engine.scheduler.get("a") is not None:
        engine.step()
    assert runner.events[before:] == ["read", *["run"] * 4]
    engine.step()
    engine.step()
    assert runner.events[-3:] == ["launch", "launch", "read"]
    run(engine)


def test_prompts_that_are_reported_are_waited_for_and_what_follows_is_not() -> None:
    engine, runner = ahead(step_tokens=4, max_running=4)
    request = engine.add("a", [1] * 8, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=0))
    engine.step()
    engine.step()
    assert runner.events == ["run", "run"]
    request.reported = 8  # as a runner with a model says
    run(engine)
    assert set(runner.events[2:]) == {"launch", "read"}


def test_only_who_may_have_drafts_is_waited_for() -> None:
    events = []
    for most in (None, 0):
        engine, runner = ahead()
        guess(engine, 3, 1.0, 0)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, max_drafts=most)
        engine.add("a", [1, 2, 3], params)
        assert run(engine) == {"a": alone([1, 2, 3], 8, ())}
        events.append(set(runner.events))
    assert events == [{"run"}, {"launch", "read"}]


def test_choices_part_when_their_prompt_has_been_read() -> None:
    engine, runner = ahead(step_tokens=4, max_running=4)
    params = [SamplingParams(temperature=1, seed=i, max_tokens=6, ignore_eos=True) for i in range(3)]
    engine.add("0", [1, 2, 3, 4, 5, 6], params[0], siblings=[("1", params[1]), ("2", params[2])])
    tokens = run(engine)
    assert runner.events[:2] == ["run", "run"] and set(runner.events[2:]) == {"launch", "read"}
    for i, own in enumerate(params):
        single = fake_engine(blocks=60)
        single.add("x", [1, 2, 3, 4, 5, 6], own)
        assert run(single)["x"] == tokens[str(i)]


def test_what_ends_between_steps_leaves_nothing_and_its_name_can_be_used_again() -> None:
    engine, _ = ahead()
    engine.add("a", [1, 2, 3], EIGHT)
    engine.add("b", [4, 5], EIGHT)
    engine.step()
    engine.step()
    request = engine.scheduler.running["a"]
    assert request.tokens[-1] >= VOCABULARY and engine.finish("a")
    assert request.tokens == [1, 2, 3, *alone([1, 2, 3], 1, ())], "what nobody has read is not of the request"
    engine.add("a", [9, 8, 7, 6], EIGHT)
    assert run(engine) == {"a": alone([9, 8, 7, 6], 8, ()), "b": alone([4, 5], 8, ())[1:]}


def test_nobody_gives_way_before_what_is_in_flight_has_been_read() -> None:
    engine, runner = ahead(blocks=6, step_tokens=64)
    preempted = []
    plan = engine.scheduler.plan

    def planned() -> Any:
        made = plan()
        preempted.append((bool(made.preempt), engine.pace.in_flight is not None))
        return made

    engine.scheduler.plan = planned  # type: ignore[method-assign]
    begun = engine.scheduler.begin

    def begin(made: Any) -> Any:
        assert not made.preempt or engine.pace.in_flight is None
        return begun(made)

    engine.scheduler.begin = begin  # type: ignore[method-assign]
    long = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    for name, prompt in (("a", [1] * 8), ("b", [2] * 8)):
        engine.add(name, prompt, long)
    assert run(engine) == {"a": alone([1] * 8, 12, ()), "b": alone([2] * 8, 12, ())}
    assert engine.scheduler.preemptions > 0 and (True, True) in preempted and (True, False) in preempted
    assert "launch" in runner.events


def test_a_launch_that_fails_ends_only_who_makes_it_fail() -> None:
    engine, runner = ahead(strict=False, fail_on=frozenset({"bad"}))
    engine.add("a", [1, 2, 3], EIGHT)
    engine.add("b", ENDING, SamplingParams(temperature=0, max_tokens=20))
    engine.step()
    engine.step()
    engine.add("bad", [5, 5], EIGHT)
    tokens: dict[str, list[int]] = {"a": [], "b": [], "bad": []}
    tokens["a"] += alone([1, 2, 3], 1, ())
    tokens["b"] += alone(ENDING, 1)
    reasons = {}
    while engine.has_work:
        for delta in engine.step():
            tokens[delta.request_id] += delta.token_ids
            if delta.finish_reason:
                reasons[delta.request_id] = delta.finish_reason
    assert tokens == {"a": alone([1, 2, 3], 8, ()), "b": alone(ENDING, 20), "bad": []}
    assert reasons == {"a": "length", "b": "stop", "bad": "error"}
    assert runner.events.count("launch") > 5 and engine.counters.repairs == 0


class FailsOnce(LateRunner):
    """Its launch of this number fails."""

    fails = 0

    def launch(self, work: Sequence[tuple[Request, int]]) -> LateStep:
        if self.events.count("launch") + 1 == self.fails:
            self.events.append("launch")
            raise RuntimeError("out of luck")
        return super().launch(work)

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        assert work, "a step of nobody"
        return super().run(work)


@pytest.mark.parametrize("company", [False, True], ids=["alone", "in company"])
def test_a_launch_that_fails_counts_nobody_who_has_ended_meanwhile(company: bool) -> None:
    """The launch behind an end of text, which nobody has read yet: it fails, and is computed again without that row."""
    counts = []
    for failing in (False, True):
        engine, runner = ahead(strict=False)
        runner.__class__ = FailsOnce
        assert isinstance(runner, FailsOnce)
        if failing:
            runner.fails = len(alone(ENDING, 20)) + 1
        engine.add("short", ENDING, SamplingParams(temperature=0, max_tokens=20))
        if company:
            engine.add("long", [7] * 3, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
        tokens = run(engine)
        assert tokens["short"] == alone(ENDING, 20)
        counts.append((tokens, engine.counters.steps, engine.report.tokens.sum, engine.report.requests.sum))
        assert runner.events.count("run") == (failing and company)
    assert counts[0] == counts[1]


def test_the_prefix_of_a_conversation_is_found_with_what_was_read_late() -> None:
    hits = []
    for early in (False, True):
        engine = fake_engine(blocks=60, ahead=early)
        engine.add("a", [1] * 6, EIGHT)
        said = run(engine)["a"]
        engine.add("b", [1] * 6 + said + [3], EIGHT)
        assert run(engine)["b"] == alone([1] * 6 + said + [3], 8, ())
        hits.append((engine.scheduler.prompt_tokens, engine.scheduler.cached_tokens))
    assert hits[0] == hits[1] and hits[0][1] == 12
