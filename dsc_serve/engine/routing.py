"""What requests pick: signatures for policies, sharing for the planners, figures for people; a step late.

Steps are watched now and then only: one that is takes some hundred microseconds longer. Where a policy goes by what
requests pick, so is every step with a chunk of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dsc_kernels.sketch import Sketch
from dsc_serve.engine.request import Request
from dsc_serve.engine.routing_predictor import PickPredictor
from dsc_serve.engine.routing_recorder import PickRecorder
from dsc_serve.engine.routing_report import RoutingReport
from dsc_serve.engine.routing_reporter import RoutingReporter
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.engine.tenants import TenantWatch
from dsc_serve.model.ffn.dsc import DscFfn

WATCHED = 16  # of so many steps one is watched


class RoutingWatch:
    """Watches the DSC layers of one model through steps of at most `step_tokens` tokens: says which steps are recorded,
    and passes them on. indices: of the layers in the model; none: they are all of it."""

    predicts: bool = False  # whether a new request gets a signature of what it is expected to pick
    on_picks: Callable[[NDArray[np.int32]], None] | None = None  # if set: all steps, to it a copy int32 [layers, T, K]

    def __init__(
        self, layers: Sequence[DscFfn], step_tokens: int, vocab_size: int, indices: Sequence[int] = ()
    ) -> None:
        self.sketch = Sketch(len(layers), layers[0].shape.atoms, layers[0].shape.k, vocab_size)
        self._recorder = PickRecorder(layers, step_tokens)
        self._predictor = PickPredictor(self.sketch)
        self._reporter = RoutingReporter(layers, self.sketch)
        self.tenants = TenantWatch(layers, indices or range(len(layers)))
        self._unwatched = WATCHED

    def expect(self, request: Request) -> None:
        """Predict what a new request will pick, where anybody asks."""
        if self.predicts:
            self._predictor.expect(request)

    def begin(self, tokens: int, requests: int) -> None:
        """A step begins: take in the last one, and decide whether to watch this one."""
        self.flush()
        self._unwatched += 1
        prompts = self.predicts and tokens > requests
        watching = prompts or self._unwatched >= WATCHED or self.on_picks is not None
        watching = watching and self._recorder.free
        if watching:
            self._unwatched = 0
        self._recorder.watch(watching)

    def record(self, work: Sequence[tuple[Request, int]], token_ids: NDArray[np.int64] | None, tokens: int) -> None:
        """The layers have been told to compute this: the first `tokens` of token_ids, until the next step begins; None:
        tokens that have been drawn on a device and not been read."""
        self._recorder.record(work, token_ids, tokens)

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Of the step that the layers computed last, only these rows are tokens; the others were wrong drafts."""
        self._recorder.keep(rows)

    def flush(self) -> None:
        """Take in the step that was recorded last, if it has not been and has arrived."""
        step = self._recorder.take()
        if step is None:
            return
        self._predictor.observe(step)
        self._reporter.observe(step)
        self.tenants.observe(step)
        if self.on_picks is not None:
            self.on_picks(step.picks.numpy().copy())

    def tenant_report(self) -> TenantsReport:
        self.flush()
        return self.tenants.report()

    def report(self) -> RoutingReport:
        self.flush()
        return self._reporter.report()
