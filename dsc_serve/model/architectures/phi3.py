"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another; longrope, and heads of which a part is turned."""

from __future__ import annotations

from collections.abc import Mapping

from dsc_serve.model.adapter import shared_size
from dsc_serve.model.architectures.family import (
    ATTENTION,
    LLAMA_MODULES,
    Architecture,
    dense,
    every_layer,
    frame,
    sizes,
    windowed,
)
from dsc_serve.model.architectures.positions import ORIGINAL, PARTIAL, Positions
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, split_rows
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

MODULES = {
    "model.layers.{}.self_attn.qkv_proj": ATTENTION,
    "model.layers.{}.mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    **{name: LLAMA_MODULES[name] for name in ("model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj")},
}
# What the family's first files call su or yarn is longrope.
POSITIONS = Positions(partial=True, older={"su": "longrope", "yarn": "longrope"})
DEFAULTS = sizes(32064, 3072, 8192, 32, 32, 4096, eps=1e-5) | {ORIGINAL: 4096, PARTIAL: 1.0}


def fields(s: Settings) -> Fields:
    return windowed(s, frame(s, POSITIONS) | {"ffn": dense(s)}, every_layer(s))


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    found = dict(stored)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        sizes = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
        qkv = {f"{layer}self_attn.{part}_proj.weight": size for part, size in sizes.items()}
        split_rows(found, f"{layer}self_attn.qkv_proj.weight", qkv, s.path)
        halves = {f"{layer}mlp.{part}_proj.weight": shared_size(config) for part in ("gate", "up")}
        split_rows(found, f"{layer}mlp.gate_up_proj.weight", halves, s.path)
    return found


PHI3 = Architecture(fields, tensors, DEFAULTS, MODULES)
