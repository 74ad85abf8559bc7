"""The most urgent first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from dsc_serve.engine.policies.base import Budget, Levels, Plan, View
from dsc_serve.engine.policies.draft import Draft
from dsc_serve.scheduling_params import SchedulingParams


def priority(view: View, budget: Budget) -> Plan:
    """Lower numbers first, the earliest among equals; running requests are preempted for more urgent ones.

    Every running request gets its single token. Of prompts, one that waits comes before less urgent ones that run.
    """
    draft = Draft(view, budget, sorted(view.running, key=lambda request: request.scheduling.priority))
    prompts = deque(draft.advance_singles())
    for request in view.waiting:
        while prompts and prompts[0].scheduling.priority <= request.scheduling.priority:
            draft.advance_chunk(prompts.popleft())
        less_urgent = [r for r in reversed(draft.running) if r.scheduling.priority > request.scheduling.priority]
        if draft.pressed or not draft.admit(request, less_urgent):
            break
    for request in prompts:
        draft.advance_chunk(request)
    return draft.plan


def priority_lane(scheduling: SchedulingParams) -> Hashable:
    return scheduling.priority


def priority_rank(lane: Hashable, levels: Levels) -> float:
    assert isinstance(lane, int)
    return float(lane)
