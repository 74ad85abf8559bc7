"""Which steps are captured as graphs: how many, in about how much memory, within how many seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.tensor_shapes import tensor_shapes

LAUNCHES = 10  # nodes of a layer, at most
STEP_LAUNCHES = 10  # and of a step beside its layers
NODE_BYTES = 4096  # of a node, in the driver: assumed, not measured
COPIES = 3  # of what a layer makes of a token, in float32: sums come in parts, and some are kept twice


@dataclass(frozen=True)
class GraphBudget:
    """graphs: most that are captured, at least 1; nbytes: that they may take, by `graph_bytes`; seconds: after which no
    further one is begun."""

    graphs: int = 40
    nbytes: int = 512 << 20
    seconds: float = 60.0


USUAL = GraphBudget()


def buckets(most: int) -> list[int]:
    """Batch sizes for steps of up to `most` sequences, the wider apart the larger they are."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, 1024, 64), *range(1024, most, 256)]
    return [*(size for size in sizes if size < most), most]


def ranked(sizes: Sequence[int]) -> list[int]:
    """Sizes in falling order, the most needed first: of so many first ones, steps are padded by the smallest factor.

    The first is the largest, so that the others fit into its memory.
    """
    left, dropped = sorted(sizes), []
    while len(left) > 1:
        padding = [above / (below + 1) for below, above in zip([0, *left[:-2]], left[1:], strict=True)]
        dropped.append(left.pop(padding.index(min(padding))))
    return left + dropped[::-1]


def row_bytes(config: ModelConfig) -> int:
    """About what a token takes on its way through the widest layer: what it makes, or reads, with each matrix."""
    shapes, widths = tensor_shapes(config), []
    for i, kind in enumerate(config.layers):
        own = [torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith(f"model.layers.{i}.")]
        widths.append((sum(own) - KINDS[kind.ffn.kind].idle_parameters(kind)) // config.hidden_size)
    return 4 * COPIES * max(widths)


def graph_bytes(config: ModelConfig, sizes: Sequence[int], itemsize: int) -> int:
    """An estimate of what graphs of these sizes take: memory for the largest, which all share, their outputs, nodes.

    itemsize: bytes of a number of the model's dtype.
    """
    nodes = LAUNCHES * len(config.layers) + STEP_LAUNCHES
    outputs = sum(sizes) * config.hidden_size * itemsize
    return row_bytes(config) * max(sizes) + outputs + len(sizes) * nodes * NODE_BYTES


def chosen(config: ModelConfig, sizes: Sequence[int], itemsize: int, budget: GraphBudget) -> list[int]:
    """Those of the sizes that are captured, in order; one in any case.

    The largest may take half of the memory, so that it leaves some for others.
    """
    row = row_bytes(config)
    wanted = ranked([size for size in sizes if size * row <= budget.nbytes / 2] or sizes[:1])[: budget.graphs]
    while len(wanted) > 1 and graph_bytes(config, wanted, itemsize) > budget.nbytes:
        wanted.pop()
    return wanted


def told(config: ModelConfig, captured: Sequence[int], itemsize: int, capture_s: float, wanted: Sequence[int]) -> str:
    """What was captured of the sizes that would pad least, for who starts the engine."""
    nbytes = graph_bytes(config, captured, itemsize)
    text = f"{len(captured)} graphs for steps of 1 to {max(captured)} sequences, captured in {capture_s:.1f} s; "
    text += f"about {max(1, nbytes >> 20)} MiB"
    missing = len(set(wanted) - set(captured))
    return text if not missing else f"{text}. {missing} more would pad steps less: graphs, graph_mb, graph_capture_s"
