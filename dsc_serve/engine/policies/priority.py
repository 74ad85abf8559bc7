"""The most urgent first."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from dsc_serve.engine.policies.base import Levels, Plan, StepBudget, View
from dsc_serve.engine.policies.plan_builder import PlanBuilder
from dsc_serve.scheduling_params import SchedulingParams


def priority(view: View, budget: StepBudget) -> Plan:
    """Lower numbers first, the earliest among equals; running requests are preempted for more urgent ones.

    Every running request gets its single token. Of prompts, one that waits comes before less urgent ones that run.
    """
    builder = PlanBuilder(view, budget, sorted(view.running, key=lambda request: request.scheduling.priority))
    prompts = deque(builder.advance_singles())
    for request in view.waiting:
        while prompts and prompts[0].scheduling.priority <= request.scheduling.priority:
            builder.advance_chunk(prompts.popleft())
        less_urgent = [r for r in reversed(builder.running) if r.scheduling.priority > request.scheduling.priority]
        if builder.pressed or not builder.admit(request, less_urgent):
            break
    for request in prompts:
        builder.advance_chunk(request)
    return builder.plan


def priority_lane(scheduling: SchedulingParams) -> Hashable:
    return scheduling.priority


def priority_rank(lane: Hashable, levels: Levels) -> float:
    assert isinstance(lane, int)
    return float(lane)
