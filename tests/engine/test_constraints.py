"""Requests whose grammar is late: they sit steps out, nobody waits for them, and who is late for too long ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.constraints import BEHIND, DEMOTED_S, LATE_S, ORDINARY_S, Followers
from dsc_serve.engine.output import Delta
from dsc_serve.engine.request import Request


class Grammar:
    """Answers when it is told to; allows any token. ends_after: tokens after which nothing may follow."""

    def __init__(self, vocab_size: int, ends_after: int = 10**9) -> None:
        self.clock: Callable[[], float] = time.monotonic
        self.answered_at = 0.0
        self.ready, self.compiled, self.error, self.late_s = True, True, "", 0.0
        self.blameless, self.compile_limit_s, self.wait_s = False, 12.0, 0.0
        self.allowed = np.ones(vocab_size, dtype=np.bool_)
        self.pushed: list[int] = []
        self.demotions = self.closed = 0
        self.used_s: float | None = None
        self.waits: list[float] = []
        self.late_for: list[int] = []  # numbers of tokens after which no answer comes by itself
        self._ends_after = ends_after

    @property
    def ready(self) -> bool:
        return self._ready

    @ready.setter
    def ready(self, ready: bool) -> None:
        self._ready, self.answered_at = ready, self.clock()

    @property
    def complete(self) -> bool:
        return self.ready and len(self.pushed) >= self._ends_after

    def push(self, token: int) -> None:
        self.pushed.append(token)
        self.ready = len(self.pushed) not in self.late_for

    def wait(self, enough: object, timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        time.sleep(self.wait_s)
        return False

    @property
    def demoted(self) -> bool:
        return self.demotions > 0

    def demote(self) -> None:
        self.demotions += 1

    def give_up(self, why: str, blameless: bool = False) -> None:
        self.error, self.blameless = why, blameless

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", threads=1) as llm:
        yield llm


def added(llm: LLM, name: str, grammar: Grammar | None, max_tokens: int = 6, prompt: int = 3) -> Request:
    tokens = list(range(5, 5 + prompt))
    request = llm.engine.add(name, tokens, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))
    if grammar is not None:
        request.constraint = grammar  # type: ignore[assignment]
        llm.engine.followers.add(request)
    return request


def steps(llm: LLM, count: int) -> list[Delta]:
    return [delta for _ in range(count) for delta in llm.engine.step()]


def to_the_end(llm: LLM) -> list[Delta]:
    found = []
    while llm.engine.has_work:
        found += llm.engine.step()
    assert len(llm.engine.followers) == 0
    return found


def test_a_late_request_sits_out_and_then_goes_on_where_it_was(llm: LLM) -> None:
    added(llm, "alone", None)
    alone = [token for delta in to_the_end(llm) for token in delta.token_ids]
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for = [2]
    late = added(llm, "late", grammar)
    other = added(llm, "other", None)
    steps(llm, 4)
    assert late.output_size == 2 and late.held
    assert other.output_size == 4
    computed = llm.engine.scheduler.step_time, late.num_computed
    steps(llm, 1)
    assert late.num_computed == computed[1] and other.output_size == 5, "it was computed although it sits out"
    time.sleep(2 * ORDINARY_S)
    grammar.ready = True
    to_the_end(llm)
    assert late.tokens[3:] == other.tokens[3:] == alone
    assert grammar.closed == 1 and grammar.late_s > 0


def test_others_wait_for_a_late_answer_a_part_of_their_step_at_most(llm: LLM) -> None:
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for = list(range(1, 7))
    added(llm, "late", grammar)
    added(llm, "other", None, max_tokens=4)
    found = steps(llm, 4)
    assert [delta.request_id for delta in found] == ["late", "other", "other", "other", "other"]
    assert grammar.waits and max(grammar.waits) <= 0.002
    llm.engine.finish("late")
    assert len(llm.engine.followers) == 0


def test_others_whose_prompt_is_computed_are_company(llm: LLM) -> None:
    """They are not sampled in this step, and wait all the same."""
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for = [1]
    added(llm, "late", grammar)
    steps(llm, 1)
    reader = added(llm, "reader", None, prompt=llm.engine.config.step_tokens + 40)
    steps(llm, 1)
    assert 0 < reader.num_computed < reader.num_tokens, "its prompt was computed in one step"
    assert grammar.waits and max(grammar.waits) <= 0.002
    for name in ("late", "reader"):
        llm.engine.finish(name)


def test_waiting_for_a_grammar_is_no_part_of_what_a_step_takes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for, grammar.wait_s = [1], 2.0
    seen: list[float] = []
    monkeypatch.setattr(llm.engine.scheduler.step_time, "observe", lambda load, ms: seen.append(ms))
    added(llm, "late", grammar)
    added(llm, "other", None)
    began = time.monotonic()
    steps(llm, 2)
    assert grammar.waits and time.monotonic() - began >= 2
    assert len(seen) == 2 and max(seen) < 2000
    for name in ("late", "other"):
        llm.engine.finish(name)


def test_an_error_that_is_nobodys_fault_blames_no_field(llm: LLM) -> None:
    for late in ([], [1]):  # found by the step, and by one after it
        grammar = Grammar(llm.engine.capacity.vocab_size)
        grammar.late_for = late
        added(llm, "lost", grammar)
        steps(llm, 2 if late else 1)
        grammar.error, grammar.blameless, grammar.ready = "its process has ended", True, True
        (end,) = [delta for delta in to_the_end(llm) if delta.finish_reason]
        assert (end.error, end.error_field, end.unavailable) == ("its process has ended", "", True)


def test_whoever_is_alone_waits_for_its_answer_without_computing(llm: LLM) -> None:
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for = [1]
    added(llm, "late", grammar)
    before = llm.engine.counters.steps
    steps(llm, 6)
    assert llm.engine.counters.steps == before + 2  # its prompt, and the step that found no answer
    llm.engine.finish("late")


@pytest.mark.parametrize("late", [False, True])
def test_a_text_is_whole_when_nothing_may_follow(llm: LLM, late: bool) -> None:
    for limit, reason in ((6, "stop"), (3, "stop"), (2, "length")):
        grammar = Grammar(llm.engine.capacity.vocab_size, ends_after=3)
        grammar.late_for = [limit if limit < 3 else 3] * late
        request = added(llm, "whole", grammar, max_tokens=limit)
        found = steps(llm, 8)
        assert late == (found[-1].finish_reason is None)
        grammar.ready = True
        found += to_the_end(llm)
        assert [delta.finish_reason for delta in found if delta.finish_reason] == [reason]
        assert sum(len(delta.token_ids) for delta in found) == request.output_size == min(limit, 3)


def test_an_error_that_comes_late_ends_the_request_alone(llm: LLM) -> None:
    grammar = Grammar(llm.engine.capacity.vocab_size)
    grammar.late_for = [2]
    added(llm, "late", grammar)
    other = added(llm, "other", None)
    found = steps(llm, 4)
    grammar.error, grammar.ready = "structured_outputs cannot be followed further: it broke", True
    found += to_the_end(llm)
    (end,) = [delta for delta in found if delta.request_id == "late" and delta.finish_reason]
    assert (end.finish_reason, end.error, end.error_field) == ("error", grammar.error, "structured_outputs")
    assert other.output_size == 6


def test_whoever_is_late_for_too_long_is_put_behind_others_and_then_ends() -> None:
    now = [0.0]
    request = Request("late", 1, [1, 2], SamplingParams(), 9)
    grammar: Any = Grammar(8)
    grammar.clock = lambda: now[0]
    request.constraint = grammar
    followers = Followers(lambda request: True, lambda: now[0])
    followers.add(request)
    for _ in range(3):  # three times late, with a time between that counts for nothing
        grammar.ready = False
        followers.hold("late")
        now[0] += DEMOTED_S / 2
        assert followers.resume() == [] and request.held
        grammar.ready = True
        now[0] += 3  # until a step looks
        assert followers.resume() == [] and not request.held
        now[0] += 10
    assert grammar.late_s == pytest.approx(1.5 * DEMOTED_S - 3 * ORDINARY_S) and grammar.demotions >= 1
    grammar.ready = False
    followers.hold("late")
    now[0] += LATE_S
    (end,) = followers.resume()
    assert end.finish_reason == "error" and "1 s later than the steps" in end.error


def test_a_grammar_that_waits_for_a_processor_is_not_to_blame() -> None:
    now = [0.0]
    request = Request("starved", 1, [1, 2], SamplingParams(), 9)
    grammar: Any = Grammar(8)
    grammar.clock, grammar.used_s = lambda: now[0], 1.0
    request.constraint = grammar
    followers = Followers(lambda request: True, lambda: now[0])
    followers.add(request)
    for _ in range(10):
        grammar.ready = False
        followers.hold("starved")
        now[0] += 3
        grammar.used_s += ORDINARY_S + DEMOTED_S / 20
        assert followers.resume() == []
        grammar.ready = True
        assert followers.resume() == []
    assert grammar.late_s == pytest.approx(DEMOTED_S / 2) and grammar.demotions == 0
    grammar.ready = False
    followers.hold("starved")
    now[0] += 3
    grammar.used_s += ORDINARY_S + DEMOTED_S
    assert followers.resume() == [] and grammar.demotions == 1
    now[0] += LATE_S / BEHIND / 2
    assert followers.resume() == []
    now[0] += LATE_S / BEHIND / 2  # from now on a part of the time counts, whoever has the processor
    (end,) = followers.resume()
    assert end.finish_reason == "error" and "1 s later" in end.error


def test_an_ordinary_grammar_is_followed_for_as_long_as_one_likes() -> None:
    """Of a model whose steps take less than an answer does."""
    now = [0.0]
    request = Request("long", 1, [1, 2], SamplingParams(), 9)
    grammar: Any = Grammar(8)
    grammar.clock = lambda: now[0]
    request.constraint = grammar
    followers = Followers(lambda request: True, lambda: now[0])
    followers.add(request)
    for _ in range(10_000):
        grammar.ready = False
        followers.hold("long")
        now[0] += 0.9 * ORDINARY_S
        assert followers.resume() == []
        grammar.ready = True
        assert followers.resume() == []
    assert grammar.late_s == 0 and grammar.demotions == 0


def test_a_grammar_that_is_not_compiled_yet_is_not_late() -> None:
    now = [0.0]
    request = Request("early", 1, [1, 2], SamplingParams(), 9)
    grammar: Any = Grammar(8)
    grammar.ready = grammar.compiled = False
    request.constraint = grammar
    followers = Followers(lambda request: True, lambda: now[0])
    followers.add(request)
    followers.hold("early")
    now[0] += 5
    assert followers.resume() == []
    grammar.compiled = True
    assert followers.resume() == [] and grammar.demotions == 0


def test_a_grammar_that_is_never_compiled_is_not_waited_for_for_ever() -> None:
    now = [0.0]
    request = Request("held", 1, [1, 2], SamplingParams(), 9)
    grammar: Any = Grammar(8)
    grammar.ready = grammar.compiled = False
    request.constraint = grammar
    followers = Followers(lambda request: True, lambda: now[0])
    followers.add(request)
    followers.hold("held")
    for _ in range(2):  # the time begins anew with each wait
        assert followers.resume() == []
        now[0] += grammar.compile_limit_s
        assert followers.resume() == []
        grammar.compiled = True
        assert followers.resume() == []
        grammar.compiled = False
    assert followers.resume() == []
    now[0] += grammar.compile_limit_s + 1
    (end,) = followers.resume()
    assert end.finish_reason == "error" and "not there within 12 s" in end.error and grammar.blameless


def test_a_request_without_room_for_a_token_gets_none() -> None:
    """One that was full when it was preempted is computed again before its grammar has answered."""
    request = Request("full", 1, [1, 2, 3], SamplingParams(), 2)
    request.constraint = Grammar(8)  # type: ignore[assignment]
    assert request.output_size == request.max_tokens and not request.may_sample
    request.max_tokens = 3
    assert request.may_sample
