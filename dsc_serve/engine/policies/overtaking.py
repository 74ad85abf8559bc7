"""Admission out of order, within bounds."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.policies.base import RequestView, StepBudget, View
from dsc_serve.engine.policies.plan_builder import PlanBuilder

MOST_REFUSED = 8  # requests that do not fit, after which no more are tried


def admit_best(builder: PlanBuilder, window: Sequence[RequestView], merits: Sequence[float]) -> None:
    """Admit requests of a window of the queue, those of the highest merit first and the earliest among equals.

    A request that does not fit is passed over. But from the first one on that may not be overtaken any more, nobody is
    admitted before it: it is waited for.
    """
    overtaken = [request.overtaken for request in window]
    due = [is_due(request, builder.view, builder.budget) for request in window]
    left = list(range(len(window)))
    refused: set[int] = set()
    while left and len(refused) < MOST_REFUSED and builder.left and len(builder.running) < builder.budget.running:
        last = next((at for at, i in enumerate(left) if due[i]), len(left) - 1)
        open_to = [i for i in left[: last + 1] if i not in refused]
        if not open_to:
            return
        best = max(open_to, key=lambda i: (merits[i], -i))
        if not builder.admit(window[best]):
            refused.add(best)
            continue
        for i in left[: left.index(best)]:
            overtaken[i] += 1
            due[i] = due[i] or overtaken[i] >= builder.budget.overtaken
        left.remove(best)


def is_due(request: RequestView, view: View, budget: StepBudget) -> bool:
    """Whether a waiting request has been overtaken by as many, or for as long, as anybody may be."""
    if request.overtaken == 0:
        return False
    return request.overtaken >= budget.overtaken or view.now - request.overtaken_at >= budget.overtake_s
