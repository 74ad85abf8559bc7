"""Where requests with adapters stand in a step: neighbours have the same one."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_kernels.weights import AdapterRun
from dsc_serve.engine.request import Request


def chunks_last(pair: tuple[Request, int]) -> bool:
    """Where nobody has an adapter: single tokens come first."""
    return pair[1] > 1


def no_runs(ordered: Sequence[tuple[Request, int]]) -> tuple[AdapterRun, ...]:
    return ()


def place_in_step(pair: tuple[Request, int]) -> tuple[bool, int, int]:
    """Single tokens come first, those of one basis beside each other, and of these those of one adapter; of others the
    order stays.
    """
    request, count = pair
    adapter = request.adapter
    return (count > 1, 0, 0) if adapter is None else (count > 1, adapter.basis, id(adapter))


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
