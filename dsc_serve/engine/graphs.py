"""Decode steps as captured graphs: one launch for a whole step, for batches padded to a few sizes."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.model.batch import StepBatch


class Graph(Protocol):
    """Work that can be done again with what now lies in the tensors it was captured with."""

    def replay(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]


class CudaCapture:
    """Captures CUDA graphs that share one pool of memory: they are never replayed at the same time.

    The stream is their own: cuBLAS keeps a workspace for each, and torch frees that of the stream on which a graph was
    captured when the graph goes, from under all others of it.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            compute()  # kernels are compiled and libraries set themselves up, which a capture forbids
        torch.cuda.current_stream().wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            out = compute()
        return graph, out


def capture_for(dtype: torch.dtype, device: torch.device) -> Capture | None:
    """How to capture on a device; None where steps cannot be, since plain torch's mixture of experts waits for it."""
    return CudaCapture() if device.type == "cuda" and ops.triton_serves(dtype, device) else None


class DecodeGraphs:
    """The hidden states of decode steps, captured for each of `sizes`.

    batch_of: the batch of so many sequences in the buffers that stay where they are. compute: what a step computes.
    sizes: in the order in which they are captured, the largest first: the others then fit into its memory. seconds:
    after which no further one is begun; larger ones then serve.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        batch_of: Callable[[int], StepBatch],
        compute: Callable[[StepBatch], Tensor],
        capture: Capture,
        seconds: float = math.inf,
    ) -> None:
        self._graphs: dict[int, tuple[Graph, Tensor]] = {}
        began = time.perf_counter()
        for size in sizes:
            if self._graphs and time.perf_counter() - began > seconds:
                break
            self._graphs[size] = self._captured(batch_of(size), compute, capture)
        self.sizes, self.capture_s = sorted(self._graphs), time.perf_counter() - began

    @staticmethod
    def _captured(batch: StepBatch, compute: Callable[[StepBatch], Tensor], capture: Capture) -> tuple[Graph, Tensor]:
        return capture(lambda: compute(batch))

    def bucket(self, sequences: int) -> int:
        """The size that a step of so many single tokens is padded to; 0 where none holds it."""
        at = bisect_left(self.sizes, sequences)
        return self.sizes[at] if at < len(self.sizes) else 0

    def replay(self, size: int) -> Tensor:
        """Compute what lies in the buffers: [size, d], overwritten by the next step of this size."""
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden
