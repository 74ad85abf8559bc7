"""How the host keeps pace with its device: one step after the other, or one step ahead of what it has read.

A step ahead is launched while the last one's tokens are still on the device, where it takes them from. Requests stand
as after it (`Request.fly`) while the next plan is made; when its tokens are read they stand as before it again, and it
is committed like any other. What could not be known when it was launched, that a request had ended with the token
before, costs that request's row of the step and nothing else: it is left out of the commit and of all counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Protocol

import torch

from dsc_serve.engine.isolation import Computed, StepRunner, compute
from dsc_serve.engine.policies import Plan
from dsc_serve.engine.request import Request
from dsc_serve.engine.scheduler import Scheduler
from dsc_serve.engine.step_result import StepResult
from dsc_serve.panics import panics_as_errors

Work = Sequence[tuple[Request, int]]


@dataclass
class PacedStep:
    """A step on its way from its plan to its news. Times are perf_counter's."""

    plan: Plan
    work: Work
    since: float  # from when on its time counts
    schedule_s: float
    done: Computed = field(default_factory=Computed)
    computing_s: float = 0.0  # what the host spent on launching it and waiting for it
    computed: float = 0.0  # when that ended


class InFlight(Protocol):
    """A launched step. places: what stands for the token of each request that draws one, by id."""

    @property
    def places(self) -> Mapping[str, int]: ...
    @property
    def forward_s(self) -> float: ...
    def read(self) -> StepResult: ...


class AheadRunner(StepRunner, Protocol):
    """What can launch a step before the last one has been read. flies: whether that is so now."""

    @property
    def flies(self) -> bool: ...
    def launch(self, work: Work) -> InFlight: ...


class Alternating:
    """The host waits for each step before it plans the next one. strict: whether what a step raises is raised."""

    in_flight: tuple[PacedStep, InFlight] | None = None

    def __init__(self, strict: bool) -> None:
        self._strict = strict

    def may_fly(self, plan: Plan) -> bool:
        """Whether a planned step can be launched before the one in flight has been read, and be read later."""
        return False

    def compute(self, runner: StepRunner, step: PacedStep) -> Iterable[PacedStep]:
        """The steps that are to be committed now, in order; each is before the next is asked for."""
        step.done = Computed(runner.run(step.work)) if self._strict else compute(runner, step.work)
        step.computed = perf_counter()
        step.computing_s = step.computed - step.since - step.schedule_s
        return (step,)

    def land(self) -> Iterable[PacedStep]:
        """The step in flight, if there is one, which is to be committed now."""
        return ()


class StepAhead(Alternating):
    """Launches each step before it reads the last one, where nobody in it needs the host between them.

    drafts: whether a request may want drafts, which are made of its tokens.
    """

    def __init__(
        self, runner: AheadRunner, scheduler: Scheduler, drafts: Callable[[Request], bool], strict: bool
    ) -> None:
        super().__init__(strict)
        self._runner, self._scheduler, self._drafts = runner, scheduler, drafts

    def may_fly(self, plan: Plan) -> bool:
        """Not where somebody gives way: what is in flight may free the blocks that are missing."""
        if not plan.tokens or plan.preempt or not self._runner.flies:
            return False
        requests = map(self._scheduler.get, plan.tokens)
        return not any(one is None or one.needs_host or self._drafts(one) for one in requests)

    def compute(self, runner: StepRunner, step: PacedStep) -> Iterator[PacedStep]:
        """As `Alternating`; of two steps that need not wait for each other, the first while the second is computed."""
        if not self.may_fly(step.plan):
            yield from super().compute(runner, step)
            return
        launched = self._launched(step.work)
        yield from self.land(step.since)
        self._keep_living(step)
        if launched is None and step.work:
            yield from super().compute(runner, step)
        elif launched is not None and step.work:
            for request, count in step.work:
                request.fly(count, launched.places.get(request.id, 0))
            self.in_flight = step, launched

    def land(self, since: float = 0.0) -> Iterator[PacedStep]:
        if self.in_flight is None:
            return
        (step, launched), self.in_flight = self.in_flight, None
        began = perf_counter()
        step.since, step.done = since or began, Computed(launched.read())
        step.computed = perf_counter()
        step.computing_s = launched.forward_s + step.computed - began
        self._keep_living(step)
        for request, _ in step.work:
            request.land()
        yield step

    def _keep_living(self, step: PacedStep) -> None:
        """Take those out that have ended since it was planned: another request may have the id by now."""
        living = [(one, count) for one, count in step.work if self._scheduler.running.get(one.id) is one]
        if len(living) < len(step.work):
            step.work = living
            step.plan = replace(step.plan, tokens={request.id: count for request, count in living})

    def _launched(self, work: Work) -> InFlight | None:
        """None where that failed: the step is then computed when the last one is known, and fails again or does not."""
        try:
            with panics_as_errors():
                return self._runner.launch(work)
        except Exception as error:
            if self._strict or isinstance(error, torch.AcceleratorError):  # the device is lost to this process
                raise
            return None
