"""Figures of routing for people, and of sharing for the layers' planners."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from torch import Tensor

from dsc_kernels import grouping
from dsc_kernels.plan import Sharing
from dsc_kernels.sketch import Sketch
from dsc_serve.engine.routing_recorder import RecordedStep
from dsc_serve.engine.routing_report import LayerRouting, RoutingReport
from dsc_serve.engine.usage import AtomUsage
from dsc_serve.model.ffn.dsc import DscFfn

SAMPLED = 4  # every so many watched steps one layer is looked at closely, in turn
SMOOTHING = 0.25  # weight of a new sample


class RoutingReporter:
    """Follows a sketch that somebody else fills, step by step."""

    def __init__(self, layers: Sequence[DscFfn], sketch: Sketch) -> None:
        self._layers, self._shape, self._sketch = layers, layers[0].shape, sketch
        self._usage = AtomUsage(sketch.counts, self._shape.k)
        self._reports = [LayerRouting(0, 0) for _ in layers]
        self._wide_steps = self._wide_tokens = 0  # of those that were watched, in which the router is not screened

    def observe(self, step: RecordedStep) -> None:
        """A step that the sketch has taken in."""
        self._usage.advance(self._sketch.tokens)
        tokens = step.picks.shape[1]
        if not self._layers[0].layer.screens(tokens):
            self._wide_steps, self._wide_tokens = self._wide_steps + 1, self._wide_tokens + tokens
        if self._sketch.steps % SAMPLED == 1:
            layer = self._sketch.steps // SAMPLED % len(self._layers)
            self._look_at(layer, step.picks[layer], float(step.signals[layer].mean()))

    def report(self) -> RoutingReport:
        sketch = self._sketch
        for layer, report, distinct in zip(self._layers, self._reports, sketch.distinct.tolist(), strict=True):
            report.distinct = distinct
            report.grouped_tiles = 0 if layer.planner is None else layer.planner.tiles
        planners = [layer.planner for layer in self._layers if layer.planner is not None]
        rescored, screened = np.sum([layer.rescored for layer in self._layers], axis=0).tolist()
        return RoutingReport(
            steps=sketch.steps,
            tokens=sketch.tokens,
            bank_bytes=int(sketch.distinct.sum()) * self._shape.row,
            router_bytes=self._router_bytes(rescored, screened),
            layers=[msgspec.structs.replace(report) for report in self._reports],
            composed=sum(planner.steps for planner in planners),
            grouped=sum(planner.grouped_steps for planner in planners),
            rescored=rescored,
            screened=screened,
            picks_per_atom=self._usage.picks_per_atom,
        )

    def _router_bytes(self, rescored: int, screened: int) -> int:
        """Of all watched steps. A screened router is read in int8, and its own rows where they are scored again."""
        layers, whole = len(self._layers), self._shape.router_bytes
        if screened == 0:
            return self._sketch.steps * layers * whole
        reads, tokens = (self._sketch.steps - self._wide_steps) * layers, self._sketch.tokens - self._wide_tokens
        again = rescored / screened * tokens * layers * whole / self._shape.atoms
        return self._wide_steps * layers * whole + reads * self._shape.screen_bytes + int(min(again, reads * whole))

    def _look_at(self, layer: int, picks: Tensor, signal: float) -> None:
        report, planner = self._reports[layer], self._layers[layer].planner
        first = report.signal == 0.0

        def smooth(before: float, now: float) -> float:
            return now if first else before + SMOOTHING * (now - before)

        report.signal = smooth(report.signal, signal)
        if len(picks) >= grouping.TILE:
            order = grouping.min_hash_order(picks)
            seen = [grouping.tiles(picks, *how).sharing for how in ((), (order,), (None, len(picks)))]
            report.arrival, report.grouped = smooth(report.arrival, seen[0]), smooth(report.grouped, seen[1])
            if planner is not None:
                planner.sharing = Sharing(report.arrival, report.grouped, seen[2])
        report.dead, report.top, report.entropy = self._usage.shares(layer)
