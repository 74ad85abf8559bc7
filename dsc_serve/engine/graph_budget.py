"""Which steps are captured as graphs: how many, in about how much memory, within how many seconds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import NamedTuple

import torch

from dsc_kernels.launch_time import FLOPS
from dsc_serve.engine.graph_forms import FORMS, LAYERS, WITH_HEAD, LayersAlone
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.tensor_shapes import tensor_shapes

LAUNCHES = 10  # nodes of a layer, at most
STEP_LAUNCHES = 10  # and of a step beside its layers
NODE_BYTES = 4096  # of a node, in the driver: assumed, not measured
COPIES = 3  # of what a layer makes of a token, in float32: sums come in parts, and some are kept twice
HEAD_COPIES = 2  # of a token's logits, in float32: those of quantised words are put together
LEAST_APART, MIXED_SIZES, MIXED_DECODES = 64, 8, 2  # tokens between sizes of steps with prompts, how many, of each
HOST_LAUNCH = 4.5e-6  # seconds that a host takes for a launch: assumed, not measured
FEW = 8  # graphs, with fewer of which each step is padded less if all of them serve all steps


@dataclass(frozen=True)
class GraphBudget:
    """What captured steps may take."""

    graphs: int = 64  # most that are captured, at least 1
    nbytes: int = 512 << 20  # that they may take, by `GraphSizes`
    seconds: float = 60.0  # after which no further one is begun


USUAL = GraphBudget()


class GraphKey(NamedTuple):
    """A step that is captured: its form, of `graph_forms.FORMS`, for how many sequences of one token, and where it has
    chunks of prompts, for how many tokens of all together."""

    form: str
    decodes: int
    tokens: int = 0

    @property
    def rows(self) -> int:
        """Tokens of the step."""
        return self.tokens or self.decodes


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


def head_bytes(config: ModelConfig) -> int:
    """About what a token takes in the head, when the layers have given theirs back."""
    return 4 * (HEAD_COPIES * config.vocab_size + COPIES * config.hidden_size)


def kept_bytes(config: ModelConfig, form: LayersAlone) -> int:
    """What a token of a form takes that stays until the next replay, beside the graphs' own memory."""
    return 4 * config.vocab_size if form.keeps_logits else 0


class GraphSizes:
    """What graphs of one model take, as it is estimated. itemsize: bytes of a number of the model's dtype."""

    def __init__(self, config: ModelConfig, itemsize: int) -> None:
        self._layers, self._head = row_bytes(config), head_bytes(config)
        self._kept = {name: kept_bytes(config, form) for name, form in FORMS.items()}
        self._output = config.hidden_size * itemsize
        self._nodes = (LAUNCHES * len(config.layers) + STEP_LAUNCHES) * NODE_BYTES

    def memory(self, key: GraphKey) -> int:
        """What a graph works in, which the others use again."""
        head = key.decodes * self._head if FORMS[key.form].has_head else 0
        return max(key.rows * self._layers, head)

    def largest(self, key: GraphKey) -> int:
        """What all that is shared takes if this is the largest graph of its form."""
        return self.memory(key) + key.decodes * self._kept[key.form]

    def total(self, keys: Sequence[GraphKey]) -> int:
        """Memory for the largest with chunks and without, what stays of the largest of each form, outputs, nodes."""
        kept = sum(
            own * max((key.decodes for key in keys if key.form == name), default=0) for name, own in self._kept.items()
        )
        outputs = sum(key.rows for key in keys) * self._output
        single, chunks = (
            max((self.memory(key) for key in keys if bool(key.tokens) is own), default=0) for own in (False, True)
        )
        return single + chunks + kept + outputs + len(keys) * self._nodes


def in_turn(queues: Iterable[Sequence[GraphKey]]) -> Iterator[GraphKey]:
    """The first of each queue, the second of each, and so on."""
    return (key for key in chain.from_iterable(zip_longest(*queues)) if key is not None)


def mixed(sizes: Sequence[int], step_tokens: int) -> list[GraphKey]:
    """Steps of up to so many tokens with chunks of prompts that are captured, the most needed first.

    Single tokens of nobody's cost next to nothing there, so few numbers of them do; rows are a layer's work.
    """
    apart = max(LEAST_APART, -(-step_tokens // MIXED_SIZES))
    tokens, few = sorted({*range(apart, step_tokens, apart), step_tokens}), ranked(sizes)[:MIXED_DECODES]
    return [GraphKey(LAYERS.name, size, count) for count in ranked(tokens) for size in few if size < count]


def idle_rows(config: ModelConfig) -> int:
    """Most rows of padding with which a device is done no later than a host has launched the layers one by one."""
    shapes = tensor_shapes(config)
    every = sum(torch.Size(shape).numel() for name, shape in shapes.items() if name.startswith("model.layers."))
    products = every - sum(KINDS[kind.ffn.kind].idle_parameters(kind) for kind in config.layers)
    return int(LAUNCHES * len(config.layers) * HOST_LAUNCH * FLOPS / (2 * products))


def wanted(sizes: Sequence[int], most: int, cost: GraphSizes, step_tokens: int = 0) -> list[list[GraphKey]]:
    """Those that would be captured if there were as many as one likes, by form, the most needed first.

    most: bytes that the largest of each may take. Layers alone are captured of what is too large for them with a head,
    and of steps with chunks of prompts; step_tokens: of the largest, 0: of none.
    """
    queues, reached = [], max(sizes)
    for form in WITH_HEAD:
        fitting = [size for size in sizes if cost.largest(GraphKey(form.name, size)) <= most]
        queues.append([GraphKey(form.name, size) for size in ranked(fitting)])
        reached = min(reached, max(fitting, default=0))
    alone = [size for size in sizes if size > reached and cost.largest(GraphKey(LAYERS.name, size)) <= most]
    chunks = [key for key in mixed(sizes, step_tokens) if cost.largest(key) <= most] if step_tokens else []
    return [*queues, [GraphKey(LAYERS.name, size) for size in ranked(alone)], chunks]


def within(keys: Sequence[GraphKey], budget: GraphBudget, cost: GraphSizes) -> list[GraphKey]:
    """The first of these that the budget has room for, at least one."""
    kept = list(keys[: budget.graphs])
    while len(kept) > 1 and cost.total(kept) > budget.nbytes:
        kept.pop()
    return kept


def chosen(
    config: ModelConfig, sizes: Sequence[int], itemsize: int, budget: GraphBudget, step_tokens: int = 0
) -> list[GraphKey]:
    """Steps of up to so many sequences that are captured, in order; one of single tokens in any case.

    The largest of a form may take half of the memory, so that it leaves some for others. Where there is room for a few
    only, layers alone are captured, which serve all steps of single tokens. step_tokens: of steps with chunks of
    prompts, 0: none of these is.
    """
    cost, most = GraphSizes(config, itemsize), budget.nbytes // 2
    every = list(in_turn(wanted(sizes, most, cost, step_tokens)))
    keys = within(every, budget, cost) if every else []
    if len(keys) < min(FEW, len(every)) or all(key.tokens for key in keys):
        fitting = [size for size in sizes if cost.largest(GraphKey(LAYERS.name, size)) <= most] or sizes[:1]
        keys = within([GraphKey(LAYERS.name, size) for size in ranked(fitting)], budget, cost)
    first = max((key for key in keys if not key.tokens), key=cost.memory)  # so that the others fit into its memory
    return [first, *(key for key in keys if key != first)]


def told(
    config: ModelConfig,
    captured: Sequence[GraphKey],
    itemsize: int,
    capture_s: float,
    sizes: Sequence[int],
    step_tokens: int = 0,
) -> str:
    """What was captured of the steps that would pad least, for who starts the engine."""
    cost = GraphSizes(config, itemsize)
    text = f"{len(captured)} graphs for steps of 1 to {max(key.decodes for key in captured)} sequences"
    parts = []
    for name in FORMS:
        own = [key.decodes for key in captured if key.form == name and not key.tokens]
        if own:
            parts.append(f"{len(own)} {name} to {max(own)}")
    chunks = [key.tokens for key in captured if key.tokens]
    if chunks:
        parts.append(f"{len(chunks)} with prompts to {max(chunks)} tokens")
    text += f" ({', '.join(parts)}), captured in {capture_s:.1f} s; about {max(1, cost.total(captured) >> 20)} MiB"
    single = [key.form for key in captured if not key.tokens]
    forms = set(single).difference({LAYERS.name}) or {LAYERS.name}
    missing = len(forms) * len(sizes) - sum(form in forms for form in single)
    missing += len(mixed(sizes, step_tokens)) - len(chunks) if step_tokens else 0
    return text if missing <= 0 else f"{text}. {missing} more would pad steps less: graphs, graph_mb, graph_capture_s"
