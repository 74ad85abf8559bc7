"""Captured steps where there is no device that could capture any."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from dsc_serve.engine.graph_budget import GraphKey
from dsc_serve.engine.graphs import Graph, StepGraphs


class Recorded:
    """Stands in for a graph: replaying computes again, from what then lies in the buffers, into the same output."""

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.out, self.replays = compute, compute().clone(), 0

    def replay(self) -> None:
        self.replays += 1
        self.out.copy_(self.compute())


class Capture:
    def __init__(self) -> None:
        self.graphs: list[Recorded] = []

    def __call__(self, compute: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
        self.graphs.append(Recorded(compute))
        return self.graphs[-1], self.graphs[-1].out

    @property
    def replayed(self) -> list[int]:
        """The sizes of the graphs that were replayed."""
        return sorted(len(graph.out) for graph in self.graphs if graph.replays)


def replays_of(graphs: StepGraphs) -> dict[GraphKey, int]:
    """How often each graph has been replayed, of those that were."""
    found = {key: getattr(graph, "replays", 0) for key, (graph, _) in graphs._graphs.items()}
    return {key: count for key, count in found.items() if count}
