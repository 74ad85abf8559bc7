"""Routers of random weights without preferences, as training leaves them.

Deep in a model of random weights all tokens' hidden states have much of their length in common. A random router then
gives some rows a larger logit for nearly every token, and these are picked again and again. Load losses do not let that
happen; here the router's rows lose their part along what all tokens have in common. What tokens of one sequence have in
common stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.transformer_layer import TransformerLayer
from dsc_serve.train.quantise.walk import Walk, plainly

WINDOWS = 8  # of random tokens …
LENGTH = 64  # … that are looked at


def balanced_routers(config: ModelConfig, tensors: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The routers' weights that change, by name: each row without its part along the mean of the router's inputs.

    Layer after layer, since what a layer picks is in the inputs of those after it. Empty where nothing is routed.
    """
    found: dict[str, Tensor] = {}
    if not any(_router(layer) in tensors for layer in range(config.num_hidden_layers)):
        return found
    generator = torch.Generator().manual_seed(seed)
    length = min(LENGTH, config.max_position_embeddings)
    windows = torch.randint(config.vocab_size, (WINDOWS, length), generator=generator)
    walk = Walk(config, tensors)
    with plainly():
        inputs = walk.embedded(list(windows))
        for number in range(config.num_hidden_layers):
            layer, name = walk.layer(number), _router(number)
            if name in tensors:
                mean = _routed(config, tensors, number, _seen(walk, layer, inputs)).mean(0)
                found[name] = _without(tensors[name], mean)
                layer = walk.layer(number, {**tensors, name: found[name]})
            inputs = walk.run(layer, inputs)
    return found


def _router(layer: int) -> str:
    return f"model.layers.{layer}.mlp.router.weight"


def _without(weight: Tensor, direction: Tensor) -> Tensor:
    """Rows [M, d] without their parts along a direction [d]."""
    unit, wide = F.normalize(direction.double(), dim=0), weight.double()
    return (wide - (wide @ unit)[:, None] * unit).to(weight.dtype)


class _Seen:
    """Stands in for a layer's FFN and keeps what it is given."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.inputs = inner, list[Tensor]()

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        self.inputs.append(x)
        out: Tensor = self.inner(x, *arguments, **options)
        return out


def _seen(walk: Walk, layer: TransformerLayer, inputs: Sequence[Tensor]) -> Tensor:
    """What the layer's FFN is given of the windows: [tokens, d]."""
    seen = _Seen(layer.ffn.layer)
    layer.ffn.layer = seen  # type: ignore[misc, assignment]
    walk.run(layer, inputs)
    return torch.cat(seen.inputs)


def _routed(config: ModelConfig, tensors: Mapping[str, Tensor], number: int, x: Tensor) -> Tensor:
    """What the router multiplies of them."""
    norm = [tensors.get(f"model.layers.{number}.mlp.router_norm.{part}") for part in ("weight", "bias")]
    if norm[0] is None:
        return x
    weight, bias = (None if part is None else part.to(x.dtype) for part in norm)
    return F.layer_norm(x, x.shape[-1:], weight, bias, config.norm_eps)
