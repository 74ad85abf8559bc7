"""The prompt with the least to compute first."""

from __future__ import annotations

from dsc_serve.engine.policies.base import Plan, StepBudget, View
from dsc_serve.engine.policies.overtaking import admit_best
from dsc_serve.engine.policies.plan_builder import PlanBuilder


def shortest_prefill(view: View, budget: StepBudget) -> Plan:
    """As fcfs, but of the waiting requests those with the fewest uncached tokens first, within the overtaking bound."""
    builder = PlanBuilder(view, budget)
    if builder.advance() and builder.left and len(builder.running) < budget.running:
        window = list(view.waiting)
        merits = [view.cached(request).tokens - request.num_tokens for request in window]
        admit_best(builder, window, merits)
    return builder.plan
