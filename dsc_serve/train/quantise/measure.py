"""What rounding costs: bits per byte as it is served, and by itself, layer by layer, the loss and the picks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.llm import LLM
from dsc_serve.model.checkpoint import open_source
from dsc_serve.model.transformer_layer import TransformerLayer
from dsc_serve.train.evaluation import Evaluation, evaluate
from dsc_serve.train.quantise.walk import Walk, plainly, watch

SAMPLE = 2048  # tokens by which layers are compared


@dataclass(frozen=True)
class LayerCost:
    """What rounding one layer costs."""

    loss: float  # nats per token more with this layer rounded and no other, in parts of the loss with none
    # the share of what its tokens pick that is other with all layers rounded; None where nothing is picked
    picks: float | None


def served(model: Path, texts: Mapping[str, str]) -> Evaluation:
    """The loss of texts through the engine."""
    with LLM(str(model), max_running=4) as llm:
        return sum((evaluate(llm, text) for text in texts.values()), Evaluation(0.0, 0, 0))


def layer_costs(before: Path, after: Path, windows: Sequence[Tensor]) -> list[LayerCost]:
    """For each layer what its rounding costs, over windows int64 [T]; in float32."""
    with plainly():
        sources = [open_source(path) for path in (before, after)]
        walks = [Walk(source.config, source.weights()) for source in sources]
        walks[1].ropes = walks[0].ropes  # which are filled as far as windows reach
        layers, rounded = ([walk.layer(i) for i in range(walk.config.num_hidden_layers)] for walk in walks)
        inputs = [walks[0].embedded(windows)]
        for layer in layers:
            inputs.append(walks[0].run(layer, inputs[-1]))
        base = float(walks[0].losses(inputs[-1], windows).mean())
        costs = []
        for i, layer in enumerate(rounded):
            x = walks[0].run(layer, inputs[i])
            for rest in layers[i + 1 :]:
                x = walks[0].run(rest, x)
            costs.append(float(walks[0].losses(x, windows).mean()) / base - 1)
        pairs = zip(picks(walks[0], layers, windows), picks(walks[1], rounded, windows), strict=True)
        changed = [None if a is None or b is None else others(a, b) for a, b in pairs]
        return [LayerCost(cost, share) for cost, share in zip(costs, changed, strict=True)]


def picks(walk: Walk, layers: Sequence[TransformerLayer], windows: Sequence[Tensor]) -> list[Tensor | None]:
    """What each layer's tokens pick [tokens, k]; None for one without a router."""
    x, found = walk.embedded(windows), []
    for layer in layers:
        watched = watch(layer)
        x = walk.run(layer, x)
        found.append(None if watched is None else torch.cat(watched.picks))
    return found


def others(these: Tensor, those: Tensor) -> float:
    """The share of `these` picks [tokens, k] that are not among those of the same token."""
    same = (these[:, :, None] == those[:, None, :]).any(2)
    return 1 - float(same.double().mean())
