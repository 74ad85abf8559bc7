"""First come, first served."""

from __future__ import annotations

from dsc_serve.engine.policies.base import Plan, StepBudget, View
from dsc_serve.engine.policies.plan_builder import PlanBuilder


def fcfs(view: View, budget: StepBudget) -> Plan:
    """Running requests go on, the one admitted last is preempted first; waiting ones are admitted as they came."""
    builder = PlanBuilder(view, budget)
    if builder.advance():
        for request in view.waiting:
            if not builder.admit(request):
                break
    return builder.plan
