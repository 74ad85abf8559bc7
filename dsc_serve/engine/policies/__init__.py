"""Scheduling policies: pure functions from a read-only view to a plan, one file each, registered by name."""

from __future__ import annotations

from dsc_serve.engine.policies.affinity import affinity
from dsc_serve.engine.policies.base import Plan, Policy, StepBudget, View
from dsc_serve.engine.policies.bursts import bursts
from dsc_serve.engine.policies.fair import fair, tenant_lane, tenant_rank
from dsc_serve.engine.policies.fcfs import fcfs
from dsc_serve.engine.policies.priority import priority, priority_lane, priority_rank
from dsc_serve.engine.policies.shortest_prefill import shortest_prefill

POLICIES: dict[str, Policy] = {
    "fcfs": Policy(fcfs),
    "bursts": Policy(bursts),
    "affinity": Policy(affinity, by_picks=True),
    "shortest-prefill": Policy(shortest_prefill),
    "priority": Policy(priority, priority_lane, priority_rank),
    "fair": Policy(fair, tenant_lane, tenant_rank),
}

__all__ = ["POLICIES", "Plan", "Policy", "StepBudget", "View"]
