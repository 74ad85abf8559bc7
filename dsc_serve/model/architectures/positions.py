"""Rotary positions of a configuration of Hugging Face's form, older or newer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsc_serve.files import CheckpointError
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.config import shortened
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
    """How a family writes its rotary positions; partial: the share of a head that is turned, None: always all of it."""

    theta: str = "rope_theta"
    default_theta: float = 10000.0
    share: str = PARTIAL
    default_share: float | None = None

    def fields(self, s: Settings, head_dim: Any) -> Fields:
        """rope_theta, the scaling, the context that it gives and rotary_dim. Raises CheckpointError.

        As transformers reads them: `rope_scaling` goes before `rope_parameters`, what stands in it before what stands
        beside it, and only an `original_max_position_embeddings` beside it before the one within. As in vLLM, linear
        scaling and YaRN multiply the context that the model was trained with. Longrope's context is that of its first
        training until a longer one is asked for, since the angles of short texts change with it.
        """
        rope = written(s)
        theta = rope.get("rope_theta", s.get(self.theta, default=self.default_theta))
        kind = rope.get("rope_type", rope.get("type", "default"))
        kind = OLDER.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in SCALINGS:
            raise CheckpointError(f"{s.path}: rope_type {kind!r} is not supported; supported: {', '.join(SCALINGS)}")
        scaling, context = scaled(s, rope, kind)
        return {
            "rope_theta": theta,
            "rope_scaling": scaling,
            CONTEXT: context,
            "rotary_dim": self._turned(s, rope, head_dim),
        }

    def _turned(self, s: Settings, rope: Mapping[str, Any], head_dim: Any) -> int | None:
        share = rope.get(PARTIAL, s.get(self.share, default=self.default_share))
        if share in (None, 1.0):
            return None
        if self.default_share is None:
            s.refuse(PARTIAL, share, "1.0, all dimensions")
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            s.refuse(self.share, share, "above 0, at most 1")
        return int(head_dim * share) if type(head_dim) is int else None


def written(s: Settings) -> Mapping[str, Any]:
    """The object that says how positions are scaled; empty where there is none. Raises CheckpointError."""
    rope = s.get("rope_scaling") or s.get("rope_parameters") or {}
    if isinstance(rope, dict) and isinstance(rope.get("full_attention"), dict):
        rope = rope["full_attention"]  # by the layers' kinds, of which one is served
    if not isinstance(rope, dict):
        raise CheckpointError(f"{s.path}: rope_scaling is {shortened(rope)}, expected an object")
    return rope


def scaled(s: Settings, rope: Mapping[str, Any], kind: str) -> tuple[Fields | None, Any]:
    """The scaling of this kind, and the context that it gives."""
    context = s.get(CONTEXT)
    if kind == "default":
        return None, context
    scaling = {name: rope[name] for name in SCALINGS[kind] if rope.get(name) is not None}
    if ORIGINAL in SCALINGS[kind]:
        original = s.get(ORIGINAL)
        if original is not None:
            scaling[ORIGINAL] = original
        scaling.setdefault(ORIGINAL, context)
    trained: Any = context
    if kind == "longrope":
        scaling[CONTEXT] = context
        return {"rope_type": kind, **scaling}, shorter(context, scaling[ORIGINAL])
    if kind == "yarn":
        trained = scaling[ORIGINAL]
        if "factor" not in scaling and is_size(context) and is_size(trained):
            scaling["factor"] = context / trained
    factor = scaling.get("factor")
    if kind in ("linear", "yarn") and is_size(trained) and isinstance(factor, int | float):
        context = lengthened(trained, factor)
    return {"rope_type": kind, **scaling}, context


def shorter(context: Any, original: Any) -> Any:
    return min(context, original) if is_size(context) and is_size(original) else context


def is_size(value: object) -> bool:
    return type(value) is int and value > 0
