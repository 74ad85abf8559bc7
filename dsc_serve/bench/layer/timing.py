"""How work is timed: by the host's clock where it is done there, as a captured graph by the device's own where not.

What Python and a launch cost the host is no part of a graph's time, and of a served step of single tokens neither.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import torch

from dsc_serve.engine.graphs import Capture, CudaCapture

Work = Callable[[], object]
Timed = Callable[[], float]  # does the work once; returns the seconds that it took


class Timer(Protocol):
    """Times work."""

    together: int  # how often work that is shorter than what starts it is done in one timing

    def prepared(self, work: Work, wake: Work = lambda: None) -> Timed:
        """Work that can be timed again and again; wake: what is done before, and not timed, where that matters."""


class HostTimer:
    """By the host's clock."""

    together = 1

    def prepared(self, work: Work, wake: Work = lambda: None) -> Timed:
        def timed() -> float:
            wake()
            start = time.perf_counter()
            work()
            return time.perf_counter() - start

        return timed


class DeviceClock(Protocol):
    """Times what the device does between two of its calls."""

    def start(self) -> None: ...

    def stop(self) -> float:
        """Seconds since the start, once all of it has been done."""


class EventClock:
    """By CUDA's events."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]

    def start(self) -> None:
        self._begin.record()

    def stop(self) -> float:
        self._end.record()
        self._end.synchronize()
        return float(self._begin.elapsed_time(self._end)) / 1e3


class GraphTimer:
    """Replays of captured graphs by a device's clock; work that waits for the device cannot be captured.

    Such work is timed as it is launched, its waiting included, and told of by `waits`.
    """

    together = 20

    def __init__(self, capture: Capture, clock: DeviceClock, waits: Callable[[Work], bool]) -> None:
        self._capture, self._clock, self.waits = capture, clock, waits

    def prepared(self, work: Work, wake: Work = lambda: None) -> Timed:
        again: Work = work
        if not self.waits(work):
            nothing = torch.empty(0)

            def compute() -> torch.Tensor:
                work()
                return nothing

            graph, _ = self._capture(compute)
            again = graph.replay

        def timed() -> float:
            self._clock.start()
            again()
            return self._clock.stop()

        return timed


def waits_for_device(work: Work) -> bool:
    """Whether work reads what is on the CUDA device, or has sizes that depend on it. It is done once."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False


def timer_for(device: torch.device) -> Timer:
    """The timer of a device's work."""
    if device.type != "cuda":
        return HostTimer()
    return GraphTimer(CudaCapture(), EventClock(), waits_for_device)
