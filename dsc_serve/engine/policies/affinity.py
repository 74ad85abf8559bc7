"""Requests that need what the running ones read already, first: their adapters, then the atoms that they pick."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.policies.base import Plan, RequestView, StepBudget, View
from dsc_serve.engine.policies.overtaking import admit_best
from dsc_serve.engine.policies.plan_builder import PlanBuilder


def affinity(view: View, budget: StepBudget) -> Plan:
    """As fcfs, but of the waiting requests those first that need the least besides what the running ones need.

    An adapter that runs already, or none, counts for more than any atoms: their own are a small part of what it is.
    Within the overtaking bound. A request whose atoms are unknown counts as an average one.
    """
    builder = PlanBuilder(view, budget)
    if builder.advance() and builder.left and len(builder.running) < budget.running:
        window = list(view.waiting)
        atoms, adapters = overlaps(window, builder.running), known_adapters(window, builder.running)
        admit_best(builder, window, [share + known for share, known in zip(atoms, adapters, strict=True)])
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


def known_adapters(window: Sequence[RequestView], running: Sequence[RequestView]) -> list[bool]:
    """Of each request whether its adapter, if it has one, is a running request's too."""
    in_use = {id(request.adapter) for request in running if request.adapter is not None}
    return [request.adapter is None or id(request.adapter) in in_use for request in window]


def signatures(requests: Sequence[RequestView]) -> NDArray[np.uint64]:
    """Those that are known, one in a row."""
    known = [request.signature for request in requests if request.signature is not None]
    return np.stack(known) if known else np.empty((0, 0), dtype=np.uint64)
