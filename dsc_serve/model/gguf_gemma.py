"""What GGUF files of Gemma 2 and 3 say, and what llama.cpp has in its code: who sees a window, and one scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dsc_serve.model.architectures.gemma import EVERY, LOCAL, LOCAL_THETA, WINDOW, scaled_queries
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.gguf_metadata import Metadata
from dsc_serve.model.source import Stored

WIDE_SCALE = {"gemma2": 46, "gemma3": 62}  # layers of those whose scores are scaled by the width over the heads
CAPS = ("attn_logit_softcapping", "final_logit_softcapping")


def gemma2(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return {**shared(metadata), "rope_theta": metadata.read("rope.freq_base", 10000.0)}


def gemma3(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    kind = metadata.name("rope.scaling.type")
    if metadata.get(kind) not in (None, "linear"):
        metadata.refuse(kind, "none", "none, linear")
    factor = metadata.read("rope.scaling.factor", 1.0)
    scaled = metadata.get(kind) is not None and factor.value != 1
    return {
        **shared(metadata),
        "rope_theta": metadata.read("rope.freq_base", 1e6),
        LOCAL: metadata.read("rope.freq_base_swa", LOCAL_THETA),
        "rope_scaling": {"rope_type": "linear", "factor": factor} if scaled else None,
        "sliding_window_pattern": metadata.read("attention.sliding_window_pattern", EVERY),
    }


def shared(metadata: Metadata) -> Fields:
    layers, before = metadata.own("block_count"), metadata.head_size
    width, heads = metadata.own("embedding_length"), metadata.own("attention.head_count")
    if layers == WIDE_SCALE[metadata.architecture] and isinstance(width, int) and isinstance(heads, int) and heads:
        names = metadata.name("embedding_length"), metadata.name("attention.head_count")
        before = FieldValue(width // heads, " // ".join(names))
    window = FieldValue(window_of(metadata) or WINDOW, metadata.name("attention.sliding_window"))
    return {"sliding_window": window, "query_pre_attn_scalar": before, **caps(metadata)}


def caps(metadata: Metadata) -> Fields:
    """The bounds that a file names, of which 0 is none; the family has those that it leaves out."""
    found = {name: metadata.read(name) for name in CAPS}
    return {
        name: replace(own, value=None) if own.value == 0 else own
        for name, own in found.items()
        if own.value is not None
    }


def window_of(metadata: Metadata) -> Any:
    """The window that a file names; None where it names none."""
    return metadata.own("attention.sliding_window") or None


def windowed(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return {"sliding_window": FieldValue(window_of(metadata), metadata.name("attention.sliding_window"))}


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """Norms are stored whole in these files."""
    return scaled_queries(dict(stored), s, config)
