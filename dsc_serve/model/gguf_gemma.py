"""What GGUF files of Gemma 2 and 3 say, and what llama.cpp has in its code: who sees a window, and one scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dsc_serve.model.architectures.gemma import LOCAL, LOCAL_THETA, scaled_queries
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.gguf_metadata import Metadata
from dsc_serve.model.source import Stored

WIDE_SCALE = {"gemma2": 46, "gemma3": 62}  # layers of those whose scores are scaled by the width over the heads
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def gemma2(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return {**shared(metadata), "rope_theta": metadata.own("rope.freq_base", 10000.0)}


def gemma3(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    kind = metadata.name("rope.scaling.type")
    if metadata.get(kind) not in (None, "linear"):
        metadata.refuse(kind, "none", "none, linear")
    factor = 1.0 if metadata.get(kind) is None else metadata.own("rope.scaling.factor", 1.0)
    return {
        **shared(metadata),
        "rope_theta": metadata.own("rope.freq_base", 1e6),
        LOCAL: metadata.own("rope.freq_base_swa", LOCAL_THETA),
        "rope_scaling": {"rope_type": "linear", "factor": factor} if factor != 1 else None,
        "sliding_window_pattern": metadata.own("attention.sliding_window_pattern", 6),
    }


def shared(metadata: Metadata) -> Fields:
    layers, before = metadata.own("block_count"), metadata.head_dim
    width, heads = metadata.own("embedding_length"), metadata.own("attention.head_count")
    if layers == WIDE_SCALE[metadata.architecture] and isinstance(width, int) and isinstance(heads, int) and heads:
        before = width // heads
    return {"sliding_window": window_of(metadata), "query_pre_attn_scalar": before, **caps(metadata)}


def caps(metadata: Metadata) -> Fields:
    """The bounds that a file names, of which 0 is none; the family has those that it leaves out."""
    found = {name: metadata.own(name) for name in CAPS}
    return {name: None if value == 0 else value for name, value in found.items() if value is not None}


def window_of(metadata: Metadata) -> Any:
    """The window that a file names; None where it names none."""
    return metadata.own("attention.sliding_window") or None


def windowed(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return {"sliding_window": window_of(metadata)}


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """Norms are stored whole in these files."""
    return scaled_queries(dict(stored), s, config)
