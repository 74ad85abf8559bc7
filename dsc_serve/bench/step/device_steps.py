"""Steps of single tokens on a device: their graph and head by its clock, what the host adds, and what reading takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec
import torch

from dsc_serve.bench.layer.roofline import read_bandwidth
from dsc_serve.bench.layer.timing import DeviceClock, Timed
from dsc_serve.bench.step.harness import DECODED, Harness
from dsc_serve.bench.step.least import work
from dsc_serve.config import EngineConfig
from dsc_serve.engine.graph_forms import FORMS, GREEDY
from dsc_serve.engine.runner import Runner
from dsc_serve.model.decoder import Decoder

CONTEXT = 64  # tokens of a sequence when it is measured, about
READ_BYTES = 1 << 28  # of the buffer that the ceiling is measured with
RATE_SECONDS = 0.3


class NotCapturedError(ValueError):
    """Steps of this model on this device are not captured, so there is no graph to time."""


class DeviceStep(msgspec.Struct, frozen=True, kw_only=True):
    """Medians in milliseconds; what is not device is the host's."""

    running: int
    padded: int  # to so many sequences
    graph_ms: float
    head_ms: float  # by itself
    inside: bool  # whether the graph has a head of its own
    step_ms: float  # the engine's, by the host's clock, the sampled ids read
    least_ms: float  # what the step must read, at the rate that was measured here

    @property
    def host_ms(self) -> float:
        return max(self.step_ms - self.graph_ms - (0.0 if self.inside else self.head_ms), 0.0)


@torch.inference_mode()
def device_steps(
    model: Decoder, config: EngineConfig, counts: Sequence[int], steps: int, clock: DeviceClock
) -> list[DeviceStep]:
    """Greedy steps of so many running requests each. Raises NotCapturedError."""
    most = max(counts)
    room = msgspec.structs.replace(config, max_running=max(most, config.max_running), kv_tokens=most * DECODED)
    room = msgspec.structs.replace(room, step_tokens=max(room.step_tokens, room.max_running))
    harness = Harness(model, room)
    runner = harness.engine.runner
    assert isinstance(runner, Runner)
    graphs = runner.graphs
    if graphs is None:
        raise NotCapturedError("steps are not captured here: that takes Triton's kernels on a CUDA device")
    rate = read_bandwidth(READ_BYTES, model.config.hidden_size, model.dtype, model.device, RATE_SECONDS)
    found = []
    for count in counts:
        harness.decode(count)
        times = [harness.step()[0] for _ in range(steps)]
        key = graphs.key(GREEDY, count)
        if key is None:
            raise NotCapturedError(f"steps of {count} are not captured here: graphs, graph_mb, graph_capture_s")
        replay = partial(graphs.graphs.replay, key)
        hidden = replay()[:count]
        graph = median_ms(replay, clock, steps)
        head = median_ms(partial(model.argmax_tokens, hidden), clock, steps)
        least = sum(read for read, _ in work(model, count, CONTEXT, True).values()) / rate
        own = {"graph_ms": graph, "head_ms": head, "step_ms": statistics.median(times), "least_ms": 1e3 * least}
        found.append(DeviceStep(running=count, padded=key.decodes, inside=FORMS[key.form].has_head, **own))
        harness.clear()
    return found


def median_ms(run: Callable[[], object], clock: DeviceClock, steps: int) -> float:
    """Of single runs by the device's clock, within a second or `steps` of them."""

    def timed() -> float:
        clock.start()
        run()
        return clock.stop()

    return 1e3 * statistics.median(repeated(timed, steps))


def repeated(timed: Timed, steps: int) -> list[float]:
    timed()
    stop, samples = time.perf_counter() + 1.0, [timed()]
    while len(samples) < steps and time.perf_counter() < stop:
        samples.append(timed())
    return samples


def format_device_steps(found: Sequence[DeviceStep]) -> str:
    names = ("running", "padded to", "graph ms", "a head ms", "host ms", "step ms", "least ms")
    lines = ["".join(f"{name:>11}" for name in names)]
    for one in found:
        times = (one.graph_ms, one.head_ms, one.host_ms, one.step_ms, one.least_ms)
        lines.append(f"{one.running:>11}{one.padded:>11}" + "".join(f"{ms:>11.3f}" for ms in times))
    return "\n".join(lines) + "\n"
