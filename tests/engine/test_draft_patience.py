"""Steps wait for what a grammar forces only where that pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from support.drafts import draft_from
from support.fake_runner import fake_engine
from support.small_grammars import SHAPES, small_grammars

from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.drafts.patience import LONGEST_S, PROBE, SHARE, Patience
from dsc_serve.engine.engine import Engine
from dsc_serve.grammars.constraint import Constraint
from dsc_serve.sampling_params import SamplingParams


class Due:
    """A constraint whose answer comes after a while."""

    def __init__(self, after_s: float, forces: bool) -> None:
        self.after_s, self.forces = after_s, forces
        self.ready, self.waits = False, list[float]()

    def wait(self, enough: Callable[[], bool], timeout_s: float) -> bool:
        self.waits.append(timeout_s)
        time.sleep(min(self.after_s, timeout_s))
        self.ready = self.after_s <= timeout_s
        return enough()

    def forced(self, most: int) -> list[int]:
        return [1][: most * self.forces]


def waits(patience: Patience, due: Due, count: int, step_ms: float) -> int:
    """How many of so many steps waited."""
    before = len(due.waits)
    for _ in range(count):
        due.ready = False
        patience.wait(cast(Constraint, due), step_ms)
    return len(due.waits) - before


def test_a_wait_that_finds_nothing_is_given_up_and_tried_now_and_then() -> None:
    patience, due = Patience(), Due(0.001, forces=False)
    assert waits(patience, due, 40, 8.0) < 20
    assert waits(patience, due, 4 * PROBE, 8.0) == 4
    due.forces, due.after_s = True, 0.0
    assert waits(patience, due, 40 * PROBE, 8.0) > 30 * PROBE, "what pays again is not waited for again"


def test_a_wait_that_finds_something_goes_on() -> None:
    patience, due = Patience(), Due(0.0001, forces=True)
    assert waits(patience, due, 50, 8.0) == 50
    assert max(due.waits) == LONGEST_S
    assert waits(Patience(), due, 1, 2.0) == 1 and due.waits[-1] == SHARE * 2.0 / 1e3


def test_an_answer_that_is_there_is_not_waited_for() -> None:
    due = Due(0.0, forces=True)
    due.ready = True
    assert Patience().wait(cast(Constraint, due), 8.0) == 0.0
    assert not due.waits


def test_with_company_nobody_waits() -> None:
    """Alone a request's steps wait; beside another they do not, until that has ended."""
    asked = SamplingParams(temperature=0, max_tokens=20, structured_outputs=SHAPES[4])
    with small_grammars() as grammars:
        grammars.compile(SHAPES[4])
        for company in (False, True):
            engine = fake_engine(blocks=60, step_tokens=32)
            engine.grammars = grammars
            draft_from(engine, 5, SOURCES)
            patience = Counting(engine)
            engine.drafter._patience = patience  # type: ignore[assignment]
            engine.add("bound", [1, 2, 3], asked)
            if company:
                engine.add("free", [1, 2], SamplingParams(temperature=0, max_tokens=50, ignore_eos=True))
            while "bound" in engine.scheduler.running or engine.scheduler.waiting:
                engine.step()
            assert set(patience.running) <= {("bound",)} and (company or patience.running)


class Counting:
    """Remembers who runs whenever somebody would wait."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.running = engine, list[tuple[str, ...]]()

    def wait(self, constraint: Any, step_ms: float) -> float:
        self.running.append(tuple(self.engine.scheduler.running))
        return 0.0
