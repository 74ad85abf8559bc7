"""Tenants share the engine by their weights."""

from __future__ import annotations

import heapq
from collections.abc import Hashable

from dsc_serve.engine.policies.base import Levels, Plan, StepBudget, View
from dsc_serve.engine.policies.plan_builder import PlanBuilder
from dsc_serve.scheduling_params import SchedulingParams


def fair(view: View, budget: StepBudget) -> Plan:
    """As fcfs, but each admission goes to the tenant that has been charged the least per unit of its weight."""
    builder = PlanBuilder(view, budget)
    if not builder.advance() or len(builder.running) >= budget.running:
        return builder.plan
    lanes = []
    for number, (level, requests) in enumerate(view.lanes):
        waiting = iter(requests)
        lanes.append((level, number, next(waiting), waiting))
    while lanes:
        level, number, request, waiting = lanes[0]
        if not builder.admit(request):
            break
        following = next(waiting, None)
        if following is None:
            heapq.heappop(lanes)
        else:
            charged = level + request.claim / request.scheduling.weight
            heapq.heapreplace(lanes, (charged, number, following, waiting))
    return builder.plan


def tenant_lane(scheduling: SchedulingParams) -> Hashable:
    return scheduling.tenant


def tenant_rank(lane: Hashable, levels: Levels) -> float:
    assert isinstance(lane, str)
    return levels.level(lane)
