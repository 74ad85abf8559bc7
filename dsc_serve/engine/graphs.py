"""Steps as captured graphs: one launch for a whole step, for batches padded to a few sizes."""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.engine.graph_budget import GraphKey


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


class StepGraphs:
    """Steps that were captured, by their keys.

    keys: in the order in which they are captured, the one that takes most memory first: the others then fit into it.
    ready: lets the inputs of a key be some that can be computed with. compute: what the graph of a key computes, the
    output [rows, d] of a step's layers. seconds: after which no further one is begun; larger ones then serve.
    """

    def __init__(
        self,
        keys: Sequence[GraphKey],
        ready: Callable[[GraphKey], object],
        compute: Callable[[GraphKey], Tensor],
        capture: Capture,
        seconds: float = math.inf,
    ) -> None:
        self._graphs: dict[GraphKey, tuple[Graph, Tensor]] = {}
        began = time.perf_counter()
        for key in keys:
            if self._graphs and time.perf_counter() - began > seconds:
                break
            ready(key)
            self._graphs[key] = capture(partial(compute, key))
        self.keys, self.capture_s = sorted(self._graphs), time.perf_counter() - began
        single = [key for key in self.keys if not key.tokens]
        self._sizes = {form: [key.decodes for key in single if key.form == form] for form, *_ in single}
        self._mixed = sorted((key for key in self.keys if key.tokens), key=lambda key: (key.tokens, key.decodes))

    def most(self) -> int:
        """Sequences of the largest step of single tokens."""
        return max(sizes[-1] for sizes in self._sizes.values())

    def key(self, form: str, sequences: int) -> GraphKey | None:
        """What a step of so many single tokens is padded to, of this form; None where none holds it."""
        sizes = self._sizes.get(form, [])
        at = bisect_left(sizes, sequences)
        return GraphKey(form, sizes[at]) if at < len(sizes) else None

    def mixed(self, sequences: int, tokens: int) -> GraphKey | None:
        """What a step of so many tokens, of which so many are single ones and the others chunks, is padded to."""
        holding = (key for key in self._mixed if key.decodes >= sequences and key.tokens >= tokens)
        return next(holding, None)

    def replay(self, key: GraphKey) -> Tensor:
        """Compute what lies in the buffers: [rows, d], overwritten by the next replay."""
        graph, hidden = self._graphs[key]
        graph.replay()
        return hidden
