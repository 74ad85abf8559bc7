"""Gemma 2 and 3: norms around branches, bounded scores and logits, and most layers seeing a window only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from dsc_serve.model.architectures.family import (
    Architecture,
    by_layer,
    dense,
    frame,
    sizes,
    sliding_layers,
)
from dsc_serve.model.architectures.positions import Positions, kind_name, kind_of
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, raised, scaled
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

LOCAL, LOCAL_THETA = "rope_local_base_freq", 1e4  # Gemma 3's, of layers that see a window
EVERY, WINDOW = 6, 4096  # layers of Gemma 3, of which the last sees all; tokens that the others see, as in Gemma 2
BOTH = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
}
CAPS = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
GEMMA2_DEFAULTS = sizes(256000, 2304, 9216, 26, 8, 8192, act="hidden_activation") | BOTH | CAPS
GEMMA3_DEFAULTS = (
    sizes(262208, 2304, 9216, 26, 8, 131072, act="hidden_activation") | BOTH | {"rope_theta": 1e6, LOCAL: LOCAL_THETA}
)
# Of layers of Gemma 3 that see all, and of those that see a window: their name, and the field that gives their base.
TURNINGS = {"full_attention": Positions(), "sliding_attention": Positions(LOCAL)}


def common(s: Settings) -> Fields:
    """What both share. Raises CheckpointError."""
    s.only("use_bidirectional_attention", False, supported="False: each token sees those before it")
    bias, width = s.flag("attention_bias"), s.size("hidden_size")
    return frame(s.changed(rope_scaling=None, rope_parameters=None), act="hidden_activation") | {
        "norms": "around",
        "attention_bias": bias,
        "attention_output_bias": bias,
        "attention_cap": cap(s, "attn_logit_softcapping"),
        "logits_cap": cap(s, "final_logit_softcapping"),
        "embedding_scale": math.sqrt(width),
        "ffn": dense(s),
    }


def cap(s: Settings, field: str) -> float:
    """The bound that a field names, 0 where it is null or missing. Raises CheckpointError."""
    value = s.number(field, 0.0)
    if s.get(field) is not None and value <= 0:
        s.refuse(field, value, "above 0, or null")
    return value


def by_window(s: Settings, fields: Fields, sliding: list[bool], whole: Fields) -> Fields:
    """Fields where layers see a window but for those that see all, in which `whole` differs."""
    window = s.read_size("sliding_window") if any(sliding) else 0
    return by_layer({**fields, "window": window}, {**whole, "window": 0}, [not own for own in sliding])


def gemma2(s: Settings) -> Fields:
    positions = Positions().fields(s, s.get("head_dim"))
    return by_window(s, common(s) | positions, sliding_layers(s, lambda layer: layer % 2 == 0), {})


def gemma3(s: Settings) -> Fields:
    every = s.size("sliding_window_pattern", "_sliding_window_pattern", default=EVERY)
    sliding = sliding_layers(s, lambda layer: (layer + 1) % every > 0)
    whole, local = turning(s)
    fields = common(s) | {"qk_norm": "head", **local}
    return by_window(s, fields, sliding, whole if any(sliding) else {}) | ({} if any(sliding) else whole)


def turning(s: Settings) -> tuple[Fields, Fields]:
    """Base and scaling of positions, of layers that see all and of those that see a window. Raises CheckpointError."""
    base, scaling = s.below("rope_parameters"), s.below("rope_scaling")
    nested = any(kind in base.content for kind in TURNINGS)
    found = []
    for kind, positions in TURNINGS.items():
        seen = kind == "full_attention"
        rope = base.below(kind) if nested else base if seen else replace(base, content={})
        if seen and scaling.content:
            names = {name: rope.told(name) for name in rope.content if name not in scaling.content}
            rope = replace(scaling, content={**rope.content, **scaling.content}, names=names)
        if kind_of(rope) not in (("default", "linear") if seen else ("default",)):
            rope.refuse(kind_name(rope), kind_of(rope), "default, linear" if seen else "default")
        fields = positions.of(s, rope, s.get("head_dim"))
        found.append({name: fields[name] for name in ("rope_theta", "rope_scaling")})
    return found[0], found[1]


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """Norms are stored as what 1 lacks."""
    found = dict(stored)
    for name in stored:
        if "norm" in name.rpartition(".")[0].rpartition(".")[2]:
            raised(found, name)
    return scaled_queries(found, s, config)


def scaled_queries(found: Tensors, s: Settings, config: ModelConfig) -> Tensors:
    """In place: what scores are scaled by, other than a head's size, goes into queries. Raises CheckpointError."""
    before = s.number("query_pre_attn_scalar")
    if before <= 0:
        s.refuse("query_pre_attn_scalar", before, "above 0")
    parts = ("q_norm.weight",) if config.qk_norm == "head" else ("q_proj.weight", "q_proj.bias")
    for i in range(config.num_hidden_layers):
        for part in parts:
            scaled(found, f"model.layers.{i}.self_attn.{part}", math.sqrt(config.head_dim / before))
    return found


GEMMA2, GEMMA3 = Architecture(gemma2, tensors, GEMMA2_DEFAULTS), Architecture(gemma3, tensors, GEMMA3_DEFAULTS)
