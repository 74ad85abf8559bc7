"""How many distinct experts, adapters or atoms a step reads, by its width: what drafts cost is mostly these."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
from torch import Tensor

from dsc_kernels import ops
from dsc_serve.bench.step.speculation import Task, fixed_engine
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.decoder import Decoder

STEPS = 6  # of each width


class PickingLayer:
    """A layer of plain torch that tells what it picks."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.picks: list[Tensor] = []

    def __call__(self, x: Tensor, *rest: Any, **options: Any) -> Tensor:
        layer = self.layer
        self.picks.append(layer.route(x)[1] if hasattr(layer, "route") else layer.routed(x)[1])
        out: Tensor = layer(x, *rest, **options)
        return out

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def distinct_rows(config: EngineConfig, tasks: Sequence[Task], most: int) -> dict[tuple[int, int], float]:
    """By streams and width, distinct picks of a layer in a step, on average; empty where the model picks nothing.

    The kernels of this process are plain torch meanwhile, since only that tells what a mixture picks.
    """
    model = prepare_model(msgspec.structs.replace(config, kernels="plain"))
    try:
        return {
            (task.streams, width): found
            for task in tasks
            for width in range(most + 1)
            if (found := _distinct(model, config, task, width)) is not None
        }
    finally:
        ops.use(config.kernels)


def _distinct(model: Decoder, config: EngineConfig, task: Task, width: int) -> float | None:
    layers: list[Any] = [layer.ffn for layer in model.layers if picks(layer.ffn.layer)]
    if not layers:
        return None
    vocabulary = model.config.vocab_size
    short = Task(task.streams, task.prompt_tokens, min(task.tokens, STEPS * (width + 1) + 2), 0.0)
    scripts = short.scripts(vocabulary)
    engine = fixed_engine(model, config, short, width, scripts)
    watched = [PickingLayer(ffn.layer) for ffn in layers]
    for ffn, layer in zip(layers, watched, strict=True):
        ffn.layer = layer
    try:
        counts = _counts(engine, short, scripts, watched, task.streams * (width + 1))
    finally:
        for ffn, layer in zip(layers, watched, strict=True):
            ffn.layer = layer.layer
    return sum(counts) / len(counts) if counts else None


def _counts(
    engine: Engine, task: Task, scripts: Sequence[Sequence[int]], watched: Sequence[PickingLayer], rows: int
) -> list[int]:
    """Of each layer and each step of so many rows."""
    for i, prompt in enumerate(task.prompts(engine.capacity.vocab_size)):
        engine.add(str(i), prompt, task.params(i, scripts[i]))
    counts = []
    while engine.has_work:
        engine.step()
        for layer in watched:
            if layer.picks and layer.picks[-1].shape[0] == rows:
                counts.append(len(set(layer.picks[-1].flatten().tolist())))
            layer.picks.clear()
    return counts


def picks(layer: Any) -> bool:
    """Whether a layer of plain torch picks anything."""
    return hasattr(layer, "route") or getattr(layer, "router", None) is not None
