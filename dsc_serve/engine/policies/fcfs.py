"""First come, first served."""

from __future__ import annotations

from dsc_serve.engine.policies.base import Budget, Plan, View
from dsc_serve.engine.policies.draft import Draft


def fcfs(view: View, budget: Budget) -> Plan:
    """Running requests go on, the one admitted last is preempted first; waiting ones are admitted as they came."""
    draft = Draft(view, budget)
    if draft.advance():
        for request in view.waiting:
            if not draft.admit(request):
                break
    return draft.plan
