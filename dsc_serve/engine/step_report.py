"""What the engine reports of its steps and of the phases of its requests. Free of torch; travels as it is."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

import msgspec

from dsc_serve.engine.histogram import COUNT_EDGES, PHASE_EDGES_S, STEP_EDGES_S, Histogram

HELD_BACK = ("preempted", "running", "blocks", "step")  # what requests wait for


class StepReport(msgspec.Struct, array_like=True):
    """All steps since the start. seconds: of whole steps; tokens and requests: computed in one.

    The parts, summed: schedule, from deadlines to allocated blocks; forward, from inputs to the last block's output (on
    a GPU, until it is told to compute that); sample, the head and the choice of tokens (there, with the wait for them);
    output, committing and telling.
    """

    schedule_s: float = 0.0
    forward_s: float = 0.0
    sample_s: float = 0.0
    output_s: float = 0.0
    seconds: Histogram = msgspec.field(default_factory=partial(Histogram, STEP_EDGES_S))
    tokens: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))
    requests: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))

    def add(self, started: float, scheduled: float, computed: float, forward_s: float, tokens: Collection[int]) -> None:
        """Count a step that ends now; the times are of perf_counter, the tokens those of its requests."""
        ended = time.perf_counter()
        self.schedule_s += scheduled - started
        self.forward_s += forward_s
        self.sample_s += computed - scheduled - forward_s
        self.output_s += ended - computed
        self.seconds.observe(ended - started)
        self.tokens.observe(sum(tokens))
        self.requests.observe(len(tokens))


class PhaseReport(msgspec.Struct, array_like=True):
    """Seconds of requests since the start: queue, from arrival to admission; prefill, from there to the first token;
    decode, from there to the end."""

    queue: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))
    prefill: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))
    decode: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))
