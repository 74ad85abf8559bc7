"""The prompt with the least to compute first."""

from __future__ import annotations

from dsc_serve.engine.policies.base import Budget, Plan, View
from dsc_serve.engine.policies.draft import Draft
from dsc_serve.engine.policies.overtaking import admit_best


def shortest_prefill(view: View, budget: Budget) -> Plan:
    """As fcfs, but of the waiting requests those with the fewest uncached tokens first, within the overtaking bound."""
    draft = Draft(view, budget)
    if draft.advance() and draft.left and len(draft.running) < budget.running:
        window = list(view.waiting)
        merits = [len(view.cached(request)) * view.block_size - request.num_tokens for request in window]
        admit_best(draft, window, merits)
    return draft.plan
