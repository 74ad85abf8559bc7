"""What the engine reports of its steps and of the phases of its requests. Free of torch; travels as it is."""

from __future__ import annotations

import time
from collections.abc import Collection
from functools import partial

import msgspec

from dsc_serve.engine.histogram import COUNT_EDGES, PHASE_EDGES_S, STEP_EDGES_S, Histogram

HELD_BACK = ("preempted", "running", "blocks", "step")  # what requests wait for


class StepReport(msgspec.Struct, array_like=True):
    """All steps since the start, and their parts, summed.

    On a GPU, forward ends when the device has been told what to compute, and sample holds the wait for it. A step that
    is launched ahead counts from when the host came back to wait for it, so that its parts may be more than the whole.
    """

    schedule_s: float = 0.0  # from deadlines to allocated blocks
    forward_s: float = 0.0  # from inputs to the last layer's output
    sample_s: float = 0.0  # the head and the choice of tokens
    output_s: float = 0.0  # committing and telling
    seconds: Histogram = msgspec.field(default_factory=partial(Histogram, STEP_EDGES_S))  # of whole steps
    tokens: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))  # computed in one
    requests: Histogram = msgspec.field(default_factory=partial(Histogram, COUNT_EDGES))  # computed in one
    prompts: int = 0  # steps with a part of a prompt

    def add(
        self,
        since: float,
        schedule_s: float,
        forward_s: float,
        computing_s: float,
        computed: float,
        tokens: Collection[int],
        prompts: bool,
    ) -> None:
        """Count a step that ends now; since when, and when it was computed, are of perf_counter, the tokens those of
        its requests. prompts: whether a part of a prompt is among them."""
        ended = time.perf_counter()
        self.schedule_s += schedule_s
        self.forward_s += forward_s
        self.sample_s += computing_s - forward_s
        self.output_s += ended - computed
        self.seconds.observe(ended - since)
        self.tokens.observe(sum(tokens))
        self.requests.observe(len(tokens))
        self.prompts += prompts


class PhaseReport(msgspec.Struct, array_like=True):
    """Seconds of requests since the start."""

    queue: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))  # from arrival to admission
    prefill: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))  # then to the first token
    decode: Histogram = msgspec.field(default_factory=partial(Histogram, PHASE_EDGES_S))  # then to the end
