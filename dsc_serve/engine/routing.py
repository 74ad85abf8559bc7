"""What requests pick: signatures for policies, sharing for the planners, figures for people; a step late.

Layers write their picks into buffers that stay where they are. A step's are read when the next one begins, when they
have long arrived: nothing waits for them. Steps are watched now and then only: one that is takes some hundred
microseconds longer. Where a policy goes by what requests pick, so is every step with a chunk of a prompt.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsc_kernels import grouping
from dsc_kernels.plan import Sharing
from dsc_kernels.sketch import Signature, Sketch
from dsc_serve.engine.request import Request
from dsc_serve.engine.routing_report import LayerRouting, RoutingReport
from dsc_serve.engine.usage import AtomUsage
from dsc_serve.model.ffn.dsc import DscFfn, PickBuffers

WATCHED = 8  # of so many steps one is watched
SAMPLED = 4  # every so many watched steps one layer is looked at closely, in turn
SMOOTHING = 0.25  # weight of a new sample
FORESEEN = 64  # requests that get a prediction after one step, where they came before there was any

Recorder = Callable[[NDArray[np.int32]], None]


class RoutingWatch:
    """Watches the DSC layers of one model through steps of at most `step_tokens` tokens.

    recorder: where set, every step is watched, and it gets a copy of the picks int32 [layers, tokens, K]. predicts:
    whether a new request gets a signature of what it is expected to pick.
    """

    recorder: Recorder | None = None
    predicts: bool = False

    def __init__(self, layers: Sequence[DscFfn], step_tokens: int, vocab_size: int) -> None:
        shape = layers[0].shape
        device = layers[0].u.device
        self._layers, self._shape = layers, shape
        self._traced = torch.zeros(len(layers), step_tokens, shape.k, dtype=torch.int32, device=device)
        self._signals = torch.zeros(len(layers), step_tokens, device=device)
        self._traces = [PickBuffers(*pair) for pair in zip(self._traced, self._signals, strict=True)]
        self._copies = None if device.type == "cpu" else PinnedCopies(self._traced, self._signals)
        self._watching, self._unwatched = False, WATCHED
        self._trace(self._copies is not None)  # captured steps write theirs always
        self._recorded: tuple[list[Request], list[int], NDArray[np.int64]] | None = None
        self._unforeseen: deque[Request] = deque()
        self.sketch = Sketch(len(layers), shape.atoms, shape.k, vocab_size)
        self._usage = AtomUsage(self.sketch.counts, shape.k)
        self._reports = [LayerRouting(0, 0) for _ in layers]

    def expect(self, request: Request) -> None:
        """Predict what a new request will pick, where anybody asks; later, where nothing has been picked so far."""
        if not self.predicts:
            return
        if self.sketch.tokens:
            request.signature = self.sketch.predict(request.tokens)
        else:
            self._unforeseen.append(request)

    def begin(self, tokens: int, requests: int) -> None:
        """A step begins: take in the last one, and decide whether to watch this one."""
        self.flush()
        self._unwatched += 1
        prompts = self.predicts and tokens > requests
        watching = prompts or self._unwatched >= WATCHED or self.recorder is not None
        if watching:
            self._unwatched = 0
        if watching != self._watching:
            self._watching = watching
            if self._copies is None:
                self._trace(watching)

    def _trace(self, on: bool) -> None:
        for layer, trace in zip(self._layers, self._traces, strict=True):
            layer.trace = trace if on else None

    def record(self, work: Sequence[tuple[Request, int]], token_ids: NDArray[np.int64], tokens: int) -> None:
        """The layers have been told to compute this: the first `tokens` of token_ids, until the next step begins."""
        if not self._watching:
            return
        self._recorded = [request for request, _ in work], [count for _, count in work], token_ids[:tokens]
        if self._copies is not None:
            self._copies.fetch(tokens)

    def flush(self) -> None:
        """Take in the step that was noted last, if it has not been."""
        if self._recorded is None:
            return
        (requests, counts, token_ids), self._recorded = self._recorded, None
        picks, signals = self._traced, self._signals
        if self._copies is not None:
            picks, signals = self._copies.arrived(len(token_ids))
        held = picks.numpy()[:, : len(token_ids)]
        for request in requests:
            if request.seen is None:
                request.seen = Signature.empty()
                request.signature = request.seen.bits
        owners = (
            np.arange(len(requests)) if len(token_ids) == len(requests) else np.repeat(range(len(requests)), counts)
        )
        self.sketch.observe(held, token_ids, owners, [request.seen for request in requests if request.seen])
        self._usage.advance(self.sketch.tokens)
        if self.recorder is not None:
            self.recorder(held.copy())
        if self.sketch.steps % SAMPLED == 1:
            layer = self.sketch.steps // SAMPLED % len(self._layers)
            self._look_at(layer, picks[layer, : len(token_ids)], float(signals[layer, : len(token_ids)].mean()))
        for _ in range(min(FORESEEN, len(self._unforeseen))):
            waiting = self._unforeseen.popleft()
            if waiting.seen is None:
                waiting.signature = self.sketch.predict(waiting.tokens)

    def report(self) -> RoutingReport:
        self.flush()
        for layer, report, distinct in zip(self._layers, self._reports, self.sketch.distinct.tolist(), strict=True):
            report.distinct = distinct
            report.grouped_tiles = 0 if layer.planner is None else layer.planner.tiles
        planners = [layer.planner for layer in self._layers if layer.planner is not None]
        rescored, screened = np.sum([layer.rescored for layer in self._layers], axis=0).tolist()
        return RoutingReport(
            steps=self.sketch.steps,
            tokens=self.sketch.tokens,
            bank_bytes=int(self.sketch.distinct.sum()) * self._shape.row,
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
        reads, whole = self.sketch.steps * len(self._layers), self._shape.router_bytes
        if screened == 0:
            return reads * whole
        again = rescored / screened * self.sketch.tokens * len(self._layers) * whole / self._shape.atoms
        return reads * whole // self._shape.dtype.itemsize + int(min(again, reads * whole))

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


class PinnedCopies:
    """Picks on a device, and the pinned copies of a step's that travel to the host while it goes on."""

    def __init__(self, picks: Tensor, signals: Tensor) -> None:
        self._sources = picks, signals
        self._copies = [torch.zeros(t.numel(), dtype=t.dtype, pin_memory=True) for t in self._sources]
        self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def fetch(self, tokens: int) -> None:
        for source, copy in zip(self._sources, self._copies, strict=True):
            part = source[:, :tokens].reshape(-1)
            copy[: part.numel()].copy_(part, non_blocking=True)
        self._done.record()

    def arrived(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What was fetched: picks [layers, tokens, K] and signals [layers, tokens] on the host."""
        self._done.synchronize()
        layers, _, k = self._sources[0].shape
        picks, signals = self._copies
        return picks[: layers * tokens * k].view(layers, tokens, k), signals[: layers * tokens].view(layers, tokens)
