"""Gemma 2 and 3: norms around branches, bounded scores and logits, and most layers seeing a window only."""

from __future__ import annotations

import math
from collections.abc import Mapping

from dsc_serve.model.architectures.family import (
    Architecture,
    activation,
    by_layer,
    frame,
    sliding_layers,
)
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, raised, scaled
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.source import Stored

THETA, LOCAL_THETA = 1e6, 1e4  # Gemma 3's, of layers that see all, and of those that see a window
LOCAL = "rope_local_base_freq"
EVERY = 6  # layers of Gemma 3, of which the last sees all


def common(s: Settings) -> Fields:
    """What both share. Raises CheckpointError."""
    s.only("use_bidirectional_attention", False, supported="False: each token sees those before it")
    bias, width = s.flag("attention_bias"), s.size("hidden_size")
    context = s.get("max_position_embeddings")
    named = {**s.content, "head_dim": s.get("head_dim", default=256), "rope_scaling": None, "rope_parameters": None}
    return frame(Settings(named, s.path)) | {
        "max_position_embeddings": context,
        "hidden_act": activation(s, "hidden_activation", "gelu_pytorch_tanh"),
        "norms": "around",
        "attention_bias": bias,
        "attention_output_bias": bias,
        "attention_cap": cap(s, "attn_logit_softcapping"),
        "logits_cap": cap(s, "final_logit_softcapping"),
        "embedding_scale": math.sqrt(width),
        "tie_word_embeddings": s.get("tie_word_embeddings", default=True),
    }


def cap(s: Settings, field: str) -> float:
    """The bound that a field names, 0 where it is null or missing. Raises CheckpointError."""
    value = s.number(field, 0.0)
    if s.get(field) is not None and value <= 0:
        s.refuse(field, value, "above 0, or null")
    return value


def by_window(s: Settings, fields: Fields, sliding: list[bool], whole: Fields) -> Fields:
    """Fields where layers see a window but for those that see all, in which `whole` differs."""
    window = s.size("sliding_window", default=4096) if any(sliding) else 0
    return by_layer({**fields, "window": window}, {**whole, "window": 0}, [not own for own in sliding])


def gemma2(s: Settings) -> Fields:
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    s = Settings({**caps, **s.content}, s.path)
    positions = Positions().fields(s, s.get("head_dim", default=256))
    return by_window(s, common(s) | positions, sliding_layers(s, lambda layer: layer % 2 == 0), {})


def gemma3(s: Settings) -> Fields:
    every = s.size("sliding_window_pattern", "_sliding_window_pattern", default=EVERY)
    sliding = sliding_layers(s, lambda layer: (layer + 1) % every > 0)
    whole, local = turning(s)
    fields = common(s) | {"qk_norm": "head", **local}
    return by_window(s, fields, sliding, whole if any(sliding) else {}) | ({} if any(sliding) else whole)


def turning(s: Settings) -> tuple[Fields, Fields]:
    """Base and scaling of positions, of layers that see all and of those that see a window. Raises CheckpointError."""
    rope = s.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        s.refuse("rope_parameters", rope, "an object")
    nested = "full_attention" in rope or "sliding_attention" in rope
    scaling = s.get("rope_scaling")
    found = []
    for kind, theta, field in (("full_attention", THETA, "rope_theta"), ("sliding_attention", LOCAL_THETA, LOCAL)):
        own = (rope.get(kind) or {}) if nested else (rope if kind == "full_attention" else {})
        if not isinstance(own, dict):
            s.refuse(f"rope_parameters.{kind}", own, "an object")
        if kind == "full_attention" and isinstance(scaling, dict):
            own = {**own, **scaling}
        asked = {
            **s.content,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": s.get(field, default=theta), **own},
        }
        fields = Positions().fields(Settings(asked, s.path), s.get("head_dim", default=256))
        if fields["rope_scaling"] is not None and fields["rope_scaling"]["rope_type"] != "linear":
            s.refuse("rope_type", fields["rope_scaling"]["rope_type"], "default, linear")
        if kind == "sliding_attention" and fields["rope_scaling"] is not None:
            s.refuse(f"rope_parameters.{kind}.rope_type", fields["rope_scaling"]["rope_type"], "default")
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
    before = s.number("query_pre_attn_scalar", 256.0)
    if before <= 0:
        s.refuse("query_pre_attn_scalar", before, "above 0")
    parts = ("q_norm.weight",) if config.qk_norm == "head" else ("q_proj.weight", "q_proj.bias")
    for i in range(config.num_hidden_layers):
        for part in parts:
            scaled(found, f"model.layers.{i}.self_attn.{part}", math.sqrt(config.head_dim / before))
    return found


GEMMA2, GEMMA3 = Architecture(gemma2, tensors), Architecture(gemma3, tensors)
