"""What a step's tokens pick: the layers write it into buffers that stay where they are.

It is read when the next step begins: by then it has long arrived, and nothing waits for it. Where steps are launched
ahead it may not have; then it is read when a later one begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsc_serve.engine.request import Request
from dsc_serve.model.ffn.dsc import DscFfn, PickBuffers


@dataclass(frozen=True, slots=True)
class RecordedStep:
    """A step that was watched, on the host."""

    requests: list[Request]  # in the order of their tokens
    owners: NDArray[np.int64]  # [T]: which of the requests a token belongs to
    token_ids: NDArray[np.int64]  # [T]
    picks: Tensor  # int32 [layers, T, K]
    signals: Tensor  # float32 [layers, T]


class PickRecorder:
    """Records the picks of steps of at most `step_tokens` tokens, while it is told to watch."""

    def __init__(self, layers: Sequence[DscFfn], step_tokens: int) -> None:
        device, k = layers[0].u.device, layers[0].shape.k
        self._layers, self._silent = layers, all(layer.silent for layer in layers)
        self._picks = torch.zeros(len(layers), step_tokens, k, dtype=torch.int32, device=device)
        self._signals = torch.zeros(len(layers), step_tokens, device=device)
        self._traces = [PickBuffers(*pair) for pair in zip(self._picks, self._signals, strict=True)]
        self._copies = None if device.type == "cpu" else PinnedCopies(self._picks, self._signals)
        self._watching = False
        self._recorded: WatchedStep | None = None
        self._kept: NDArray[np.int64] | None = None
        self._trace(self._copies is not None)  # captured steps write theirs always

    def watch(self, watching: bool) -> None:
        """Whether the steps from now on are recorded."""
        if watching != self._watching:
            self._watching = watching
            if self._copies is None:
                self._trace(watching)

    @property
    def free(self) -> bool:
        """Whether a step can be recorded: none waits to arrive."""
        return self._recorded is None

    def record(self, work: Sequence[tuple[Request, int]], token_ids: NDArray[np.int64] | None, tokens: int) -> None:
        """The layers have been told to compute this: the first `tokens` of token_ids, until the next step begins; None:
        tokens that have been drawn on a device and not been read."""
        if not self._watching:
            return
        requests, counts = [request for request, _ in work], [count for _, count in work]
        ids = [request.num_computed for request in requests] if token_ids is None else token_ids[:tokens]
        self._recorded = WatchedStep(requests, counts, tokens, ids)
        if self._copies is not None:
            self._copies.fetch(tokens)

    def keep(self, rows: NDArray[np.int64]) -> None:
        """Of the step that was recorded last, only these rows count: the others were drafts that proved wrong."""
        self._kept = None if self._recorded is None else rows

    def take(self) -> RecordedStep | None:
        """The step that was recorded last, once it has arrived, and once only."""
        if self._recorded is None or (self._copies is not None and not self._copies.done):
            return None
        recorded, self._recorded = self._recorded, None
        requests, counts, tokens = recorded.requests, recorded.counts, recorded.tokens
        kept, self._kept = self._kept, None
        if isinstance(recorded.ids, list):
            token_ids, kept = recorded.read()
            if not len(kept):
                return None
        else:
            token_ids = recorded.ids
        picks, signals = self._picks, self._signals
        if self._copies is not None:
            picks, signals = self._copies.arrived(tokens)
        owners = np.arange(len(requests)) if tokens == len(requests) else np.repeat(range(len(requests)), counts)
        picks, signals = picks[:, :tokens], signals[:, :tokens]
        if self._silent:  # nobody but tenants of the bank picks anything
            tuned = np.array([request.adapter is not None and request.adapter.tuned for request in requests])
            own = tuned[owners]
            kept = np.flatnonzero(own) if kept is None else kept[own[kept]]
            if not len(kept):
                return None
        if kept is not None:
            owners, token_ids, picks, signals = owners[kept], token_ids[kept], picks[:, kept], signals[:, kept]
        return RecordedStep(requests, owners, token_ids, picks, signals)

    def _trace(self, on: bool) -> None:
        for layer, trace in zip(self._layers, self._traces, strict=True):
            layer.trace = trace if on else None


@dataclass(frozen=True, slots=True)
class WatchedStep:
    """A step that was watched, where what it picked may not have arrived."""

    requests: list[Request]
    counts: list[int]
    tokens: int
    ids: NDArray[np.int64] | list[int]  # of the tokens; or where each request's begin, of a step launched ahead

    def read(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The ids of tokens that are known by now, and which rows count: not those of requests that had ended when the
        step was launched, which was not known then."""
        spans = list(zip(self.requests, self.ids, self.counts, strict=True))
        ids = np.concatenate([request.tokens[start : start + count] for request, start, count in spans])
        drawn = np.repeat([request.num_tokens > start + count for request, start, count in spans], self.counts)
        return ids, np.flatnonzero(drawn)


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

    @property
    def done(self) -> bool:
        """Whether what was fetched has arrived."""
        return bool(self._done.query())  # type: ignore[no-untyped-call]

    def arrived(self, tokens: int) -> tuple[Tensor, Tensor]:
        """What was fetched: picks [layers, tokens, K] and signals [layers, tokens] on the host."""
        self._done.synchronize()
        layers, _, k = self._sources[0].shape
        picks, signals = self._copies
        return picks[: layers * tokens * k].view(layers, tokens, k), signals[: layers * tokens].view(layers, tokens)
