"""Rotary positions of a configuration of Hugging Face's form, older or newer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.rope import lengthened

SCALINGS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "attention_factor"),
}
OLDER = {"su": "longrope"}  # names that a scaling had before
CONTEXT, ORIGINAL, PARTIAL = "max_position_embeddings", "original_max_position_embeddings", "partial_rotary_factor"


@dataclass(frozen=True)
class Positions:
    """How a family writes its rotary positions."""

    theta: str = "rope_theta"  # the field that says the base
    share: str = PARTIAL  # the field that says which share of a head is turned
    partial: bool = False  # whether that may be another than all of it
    older: Mapping[str, str] = field(default_factory=lambda: OLDER)  # names of scalings that stand for others

    def fields(self, s: Settings, head_dim: Any) -> Fields:
        """rope_theta, the scaling, the context that it gives and rotary_dim. Raises CheckpointError."""
        return self.of(s, written(s), head_dim)

    def of(self, s: Settings, rope: Settings, head_dim: Any) -> Fields:
        """The same of what stands in `rope`.

        As transformers reads them: `rope_scaling` goes before `rope_parameters`, what stands in it before what stands
        beside it, and only an `original_max_position_embeddings` beside it before the one within. As in vLLM, linear
        scaling and YaRN multiply the context that the model was trained with. Longrope's context is that of its first
        training until a longer one is asked for, since the angles of short texts change with it.
        """
        scaling, context = scaled(s, rope, kind_of(rope, self.older))
        within = rope.get("rope_theta") is not None
        return {
            "rope_theta": rope.read("rope_theta") if within else s.read(self.theta),
            "rope_scaling": scaling,
            CONTEXT: context,
            "rotary_dim": self._turned(s, rope, head_dim),
        }

    def _turned(self, s: Settings, rope: Settings, head_dim: Any) -> FieldValue | None:
        where, name = (s, self.share) if rope.get(PARTIAL) is None else (rope, PARTIAL)
        share = where.get(name)
        if share is None or (share == 1 and not isinstance(share, bool)):
            return None
        if not self.partial:
            where.refuse(name, share, "1.0, all dimensions")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            where.refuse(name, share, "above 0, at most 1")
        return FieldValue(int(head_dim * share), where.told(name)) if type(head_dim) is int else None


def written(s: Settings) -> Settings:
    """The object that says how positions are scaled; empty where there is none. Raises CheckpointError."""
    rope = s.below("rope_scaling" if s.get("rope_scaling") else "rope_parameters")
    nested = isinstance(rope.get("full_attention"), dict)  # by the layers' kinds, of which one is served
    return rope.below("full_attention") if nested else rope


def kind_of(rope: Settings, older: Mapping[str, str] = OLDER) -> str:
    """Which of SCALINGS an object asks for. Raises CheckpointError."""
    kind = rope.get("rope_type", "type", default="default")
    kind = older.get(kind, kind) if isinstance(kind, str) else kind
    if not isinstance(kind, str) or kind not in SCALINGS:
        rope.refuse(kind_name(rope), kind, ", ".join(SCALINGS))
    return kind


def kind_name(rope: Settings) -> str:
    """The field that says the kind."""
    return "type" if rope.get("rope_type") is None else "rope_type"


def scaled(s: Settings, rope: Settings, kind: str) -> tuple[FieldValue | None, FieldValue]:
    """The scaling of this kind, and the context that it gives."""
    context = s.read(CONTEXT)
    if kind == "default":
        return None, context
    scaling = {name: rope.read(name) for name in SCALINGS[kind] if rope.get(name) is not None}
    if ORIGINAL in SCALINGS[kind]:
        if s.get(ORIGINAL) is not None:
            scaling[ORIGINAL] = s.read(ORIGINAL)
        scaling.setdefault(ORIGINAL, context)
    if kind == "longrope":
        return longrope(rope, scaling, context)
    trained = scaling[ORIGINAL] if kind == "yarn" else context
    if kind == "yarn" and "factor" not in scaling and is_size(context.value) and is_size(trained.value):
        scaling["factor"] = FieldValue(context.value / trained.value, f"{context.name} / {trained.name}")
    factor = scaling.get("factor")
    if kind in ("linear", "yarn") and is_size(trained.value) and factor is not None and is_number(factor.value):
        context = FieldValue(lengthened(trained.value, factor.value), f"{trained.name} by {factor.name}")
    return named_scaling(rope, kind, scaling), context


def longrope(rope: Settings, scaling: dict[str, FieldValue], context: FieldValue) -> tuple[FieldValue, FieldValue]:
    """A `factor` stands for the quotient of both contexts where attention's own factor is left out."""
    original, factor = scaling[ORIGINAL], rope.get("factor")
    if factor is not None and "attention_factor" not in scaling:
        if not is_number(factor) or not math.isfinite(factor) or factor <= 0:
            rope.refuse("factor", factor, "a finite number above 0")
        if is_size(original.value) and original.value > 1:
            grown = 1 + math.log(max(factor, 1)) / math.log(original.value)
            scaling = {**scaling, "attention_factor": FieldValue(math.sqrt(grown), rope.told("factor"))}
    whole, first = context.value, original.value
    served = FieldValue(first, original.name) if is_size(whole) and is_size(first) and first < whole else context
    return named_scaling(rope, "longrope", {**scaling, CONTEXT: context}), served


def named_scaling(rope: Settings, kind: str, scaling: Mapping[str, FieldValue]) -> FieldValue:
    return FieldValue({"rope_type": kind, **scaling}, rope.prefix.removesuffix("."))


def is_size(value: object) -> bool:
    return type(value) is int and value > 0


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
