"""What is timed: on a device the graph, never the Python that made it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from dsc_serve.bench.layer.measurement import interleaved_medians
from dsc_serve.bench.layer.roofline import best_seconds
from dsc_serve.bench.layer.systems import LayerSystem
from dsc_serve.bench.layer.timing import GraphTimer, HostTimer, Work
from dsc_serve.engine.graphs import Graph


class Device:
    """One whose graphs take what their layers say; capturing is Python's time, and no part of it."""

    def __init__(self) -> None:
        self.now, self.captured, self.replays, self._began = 0.0, 0, 0, 0.0

    def work(self, seconds: float) -> None:
        self.now += seconds

    def capture(self, compute: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        before = self.now
        out = compute()
        taken, self.now = self.now - before, before
        self.captured += 1
        return Replayed(self, taken), out

    def start(self) -> None:
        self._began = self.now

    def stop(self) -> float:
        return self.now - self._began


class Replayed:
    def __init__(self, device: Device, seconds: float) -> None:
        self.device, self.seconds = device, seconds

    def replay(self) -> None:
        self.device.replays += 1
        self.device.work(self.seconds)


def test_layers_are_timed_by_replays_of_their_graphs() -> None:
    device, python = Device(), []

    def layer(seconds: float) -> Callable[[Tensor], None]:
        def run(x: Tensor) -> None:
            python.append(seconds)
            device.work(seconds)

        return run

    systems = [LayerSystem("dsc", "triton", [layer(2e-3)] * 3), LayerSystem("moe", "triton", [layer(5e-3)] * 3)]
    timer = GraphTimer(device.capture, device, lambda work: False)
    medians = interleaved_medians(systems, torch.zeros(1), 8, 60.0, timer, lambda order: None)
    assert [round(median, 9) for median in medians] == [2e-3, 5e-3]
    assert device.captured == 4 and device.replays == 2 + 2 * 8
    assert len(python) == 2 * 2 + 2 + 1, "layers are called where they are captured, and nowhere else"


def test_what_waits_for_the_device_is_timed_as_it_is_launched() -> None:
    device, calls = Device(), []

    def waits(work: Work) -> bool:
        return True

    timed = GraphTimer(device.capture, device, waits).prepared(lambda: (calls.append(1), device.work(3e-3)))
    assert (round(timed(), 9), round(timed(), 9)) == (3e-3, 3e-3)
    assert device.captured == 0 and len(calls) == 2


def test_ceilings_are_of_many_runs_in_a_graph() -> None:
    device = Device()
    timer = GraphTimer(device.capture, device, lambda work: False)
    assert round(best_seconds(lambda: device.work(1e-4), 0.0, timer), 9) == 1e-4
    assert device.captured == 1 and device.replays == 4 and timer.together > 1


def test_the_hosts_clock_leaves_out_what_wakes() -> None:
    timed = HostTimer().prepared(lambda: time.sleep(0.002), lambda: time.sleep(0.1))
    assert 0.002 <= timed() < 0.1
