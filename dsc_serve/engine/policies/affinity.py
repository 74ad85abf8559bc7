"""Requests that pick the atoms which the running ones pick already, first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.policies.base import Plan, RequestView, StepBudget, View
from dsc_serve.engine.policies.overtaking import admit_best
from dsc_serve.engine.policies.plan_builder import PlanBuilder


def affinity(view: View, budget: StepBudget) -> Plan:
    """As fcfs, but of the waiting requests those first that need the fewest atoms besides those of the running ones.

    Within the overtaking bound. A request whose atoms are unknown counts as an average one.
    """
    builder = PlanBuilder(view, budget)
    if builder.advance() and builder.left and len(builder.running) < budget.running:
        window = list(view.waiting)
        admit_best(builder, window, overlaps(window, builder.running))
    return builder.plan


def overlaps(window: Sequence[RequestView], running: Sequence[RequestView]) -> list[float]:
    """The share of each request's atoms that running requests pick too."""
    merits = np.zeros(len(window))
    known = [i for i, request in enumerate(window) if request.signature is not None]
    in_use = signatures(running)
    if known and len(in_use):
        picked = signatures(window)
        common = np.bitwise_count(picked & np.bitwise_or.reduce(in_use)).sum(axis=1)
        merits[:] = (shares := common / np.maximum(np.bitwise_count(picked).sum(axis=1), 1)).mean()
        merits[known] = shares
    return merits.tolist()


def signatures(requests: Sequence[RequestView]) -> NDArray[np.uint64]:
    """Those that are known, one in a row."""
    known = [request.signature for request in requests if request.signature is not None]
    return np.stack(known) if known else np.empty((0, 0), dtype=np.uint64)
