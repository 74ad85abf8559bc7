"""Where requests stand in a step: by what is computed of them, and such of one adapter beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_kernels.weights import AdapterRun
from dsc_serve.engine.request import Request

SINGLE, DRAFTED, PROMPT = range(3)  # what a step computes of a request, in this order


def kind_of(request: Request, count: int) -> int:
    """A single token, one with drafts behind it, or some of a prompt."""
    if count == 1:
        return SINGLE
    return DRAFTED if request.num_uncomputed == 1 else PROMPT


def by_kind(pair: tuple[Request, int]) -> int:
    """Where nobody has an adapter."""
    return kind_of(*pair)


def no_runs(ordered: Sequence[tuple[Request, int]]) -> tuple[AdapterRun, ...]:
    return ()


def by_kind_and_adapter(pair: tuple[Request, int]) -> tuple[int, int, int]:
    """Those of a kind that have one basis stand beside each other, and of these those of one adapter; of others the
    order stays.
    """
    kind, adapter = kind_of(*pair), pair[0].adapter
    return (kind, 0, 0) if adapter is None else (kind, adapter.basis, id(adapter))


def adapter_runs(ordered: Sequence[tuple[Request, int]]) -> tuple[AdapterRun, ...]:
    """The tokens of a step whose requests have adapters, by adapter."""
    runs: list[AdapterRun] = []
    start = 0
    for request, count in ordered:
        if request.adapter is not None:
            weights = request.adapter.weights
            if runs and runs[-1].adapter is weights and runs[-1].first + runs[-1].length == start:
                runs[-1] = AdapterRun(weights, runs[-1].first, runs[-1].length + count)
            else:
                runs.append(AdapterRun(weights, start, count))
        start += count
    return tuple(runs)
