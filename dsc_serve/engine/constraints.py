"""Structured outputs in a step: tokens that may not follow are taken out of the logits before sampling.

What may follow is computed beside the step, by the grammar's own process. A request whose answer is late sits out:
nobody waits for it longer than PATIENCE of the step's own time. Lateness is a grammar's fault only as far as it has
computed meanwhile: on a busy machine an ordinary one waits for a processor. Once it has been put behind all others for
that, half of its wait counts whoever computes, so that its sender is told soon.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_serve.engine.position import Position, PositionAhead
from dsc_serve.engine.request import Request
from dsc_serve.engine.sampler import to_device
from dsc_serve.grammars.constraint import wait

PATIENCE = 0.25  # of a step's forward pass, what others wait for late answers
PATIENCE_S = 0.002  # but no longer
ALONE_S = 0.02  # what a step waits that nobody else is in
ORDINARY_S = 0.005  # after the step an answer that comes within it is not late
DEMOTED_S = 0.05  # late for so long, a grammar is put behind all others
BEHIND = 0.5  # of what it then waits counts even if others had the processor: two seconds, and a request ends
LATE_S = 1.0  # late for so long in all, a request ends


@dataclass(frozen=True)
class End:
    """How a request has ended that follows a grammar."""

    request: Request
    finish_reason: str
    error: str = ""  # "" where its text is whole


def answered(requests: Sequence[Request], forward_s: float, company: bool) -> tuple[list[bool], float]:
    """Which of the requests that a step has computed to their end may be sampled; waits a little for those that are
    late, and returns how long, in seconds. company: whether the step has computed anything else.
    """
    late = [request.constraint for request in requests if request.constraint is not None and not request.may_sample]
    open_ = [constraint for constraint in late if not constraint.ready]
    waited_s = 0.0
    if open_:
        alone = len(late) == len(requests) and not company
        began = time.perf_counter()
        wait(open_, ALONE_S if alone else min(PATIENCE_S, PATIENCE * forward_s), any if alone else all)
        waited_s = time.perf_counter() - began
    return [request.may_sample for request in requests], waited_s


def answered_ahead(positions: Sequence[PositionAhead], forward_s: float, alone: bool) -> float:
    """Wait a little until it is known what may follow drafts; returns how long, in seconds. Positions of which it does
    not become known cannot be drawn from: `PositionAhead.known`. alone: whether nobody else waits with them.
    """
    asked = [position.constraint for position in positions if position.constraint is not None]
    if all(constraint.settled for constraint in asked):
        return 0.0
    began = time.perf_counter()
    worth_s = min(ALONE_S, len(asked) * forward_s) if alone else min(PATIENCE_S, PATIENCE * forward_s)
    asked[0].wait(lambda: all(constraint.settled for constraint in asked), worth_s)
    return time.perf_counter() - began


def constrain(logits: Tensor, requests: Sequence[Position]) -> dict[str, str]:
    """Set the logits [R, V] of tokens that may not follow to −∞, in place.

    Returns why a request cannot go on, by id, for those that cannot.
    """
    stuck = {}
    for i, request in enumerate(requests):
        constraint = request.constraint
        if constraint is None:
            continue
        if constraint.error:
            stuck[request.id] = constraint.error
            continue
        allowed = torch.from_numpy(~constraint.allowed)
        logits[i].masked_fill_(to_device(allowed, logits.device), -torch.inf)
    return stuck


class Followers:
    """The requests that follow a grammar, from when they are added to when they have ended.

    lives: whether a request is still the scheduler's.
    """

    def __init__(self, lives: Callable[[Request], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._lives, self._clock = lives, clock
        self._requests: dict[str, Request] = {}
        self._held_since: dict[str, float] = {}
        self._used_before: dict[str, float | None] = {}  # by the grammars of those that are held
        self._uncompiled_since: dict[str, float] = {}  # of those that are held

    def __len__(self) -> int:
        return len(self._requests)

    def add(self, request: Request) -> None:
        self._requests[request.id] = request

    def hold(self, request_id: str) -> None:
        """Let a request sit out until its grammar has answered."""
        request = self._requests.get(request_id)
        if request is not None and not request.held:
            request.held = True
            self._since_now(request)

    def resume(self) -> list[End]:
        """Let those go on that have their answer; returns those that have come to their end, or cannot go on."""
        self.prune()
        return [end for request in self._requests.values() if (end := self._end(request)) is not None]

    def prune(self) -> None:
        """Forget those that have ended."""
        for request in [request for request in self._requests.values() if not self._lives(request)]:
            del self._requests[request.id]
            self._held_since.pop(request.id, None)
            self._used_before.pop(request.id, None)
            self._uncompiled_since.pop(request.id, None)

    def wait(self) -> bool:
        """Where nobody else is computed: wait for one of those that sit out. Returns whether there are any."""
        held = [r.constraint for r in self._requests.values() if r.held and r.constraint is not None]
        if held:
            wait(held, ALONE_S, any)
        return bool(held)

    def _end(self, request: Request) -> End | None:
        constraint = request.constraint
        assert constraint is not None
        if constraint.error:
            return End(request, "error", constraint.error)
        full = request.output_size >= request.max_tokens > 0
        if not constraint.ready:
            if full:
                self.hold(request.id)  # whether its text is whole is not known yet
            if request.held:
                self._judge(request)
            return End(request, "error", constraint.error) if constraint.error else None
        if request.held:
            request.held = False
            self._uncompiled_since.pop(request.id, None)
            # Until the answer came, not until a step had time to look.
            constraint.late_s += self._late_s(request, constraint.answered_at)
        if constraint.complete:
            return End(request, "stop")
        return End(request, "length") if full else None

    def _since_now(self, request: Request) -> None:
        assert request.constraint is not None
        self._held_since[request.id], self._used_before[request.id] = self._clock(), request.constraint.used_s

    def _late_s(self, request: Request, until: float) -> float:
        """Seconds of this wait that its grammar answers for."""
        constraint = request.constraint
        assert constraint is not None
        late_s = max(0.0, until - self._held_since[request.id])
        before, used = self._used_before[request.id], constraint.used_s
        if before is not None and used is not None:
            least = BEHIND * late_s if constraint.demoted else 0.0
            late_s = max(least, min(late_s, used - before))
        return max(0.0, late_s - ORDINARY_S)

    def _judge(self, request: Request) -> None:
        """What being late costs a request's grammar, and at last the request."""
        constraint = request.constraint
        assert constraint is not None
        now = self._clock()
        if not constraint.compiled:  # the host sees to it that this does not take long, where it is there and has time
            self._since_now(request)
            if now - self._uncompiled_since.setdefault(request.id, now) > constraint.compile_limit_s:
                why = f"its grammar was not there within {constraint.compile_limit_s:g} s; try again"
                constraint.give_up(why, blameless=True)
            return
        self._uncompiled_since.pop(request.id, None)
        late_s = constraint.late_s + self._late_s(request, now)
        if late_s > LATE_S:
            constraint.give_up(f"its answers came {LATE_S:g} s later than the steps that waited for them")
        elif late_s > DEMOTED_S and not constraint.demoted:
            constraint.late_s = late_s
            self._since_now(request)
            constraint.demote()
