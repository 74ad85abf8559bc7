"""The fields of a GGUF file, and the positions that they describe."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.gguf_file import GgufFile
from dsc_serve.model.config import shortened
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.rope import lengthened

log = logging.getLogger(__name__)

DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (DIVISORS, LONG, SHORT)  # tensors that are no weights but say how positions are stretched


class Metadata:
    """The fields of a GGUF file; those of its architecture also by the names behind it."""

    def __init__(self, content: GgufFile) -> None:
        self._fields, self.content, self.file = content.metadata, content, content.path

    def get(self, name: str) -> Any:
        return self._fields.get(name)

    @property
    def names(self) -> Collection[str]:
        return self._fields.keys()

    @property
    def architecture(self) -> str:
        return str(self.need("general.architecture", str))

    def name(self, field: str) -> str:
        return f"{self.architecture}.{field}"

    def own(self, field: str, default: Any = None) -> Any:
        """A field of the architecture, by its name without that."""
        value = self.get(self.name(field))
        return default if value is None else value

    def read(self, field: str, default: Any = None) -> FieldValue:
        """As `own`, with the field's whole name."""
        return FieldValue(self.own(field, default), self.name(field))

    @property
    def head_size(self) -> FieldValue:
        """The size of a head: as it is said, or the width over the heads; None where neither is a number."""
        size, width, heads = (
            self.read(name) for name in ("attention.key_length", "embedding_length", "attention.head_count")
        )
        if size.value is None and isinstance(width.value, int) and isinstance(heads.value, int) and heads.value > 0:
            return FieldValue(width.value // heads.value, f"{width.name} // {heads.name}")
        return size

    @property
    def head_dim(self) -> Any:
        return self.head_size.value

    def need(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field's value. Raises CheckpointError when it is missing or of another kind."""
        value = self.get(name)
        if not isinstance(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else "number"
            raise CheckpointError(f"{self.file}: {name} is {shortened(value)}, expected {wanted}")
        return value

    def number(self, name: str, default: float, most: float) -> float:
        """A field that must be a number from 0 to `most`. Raises CheckpointError."""
        value = self.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
            raise CheckpointError(f"{self.file}: {name} is {shortened(value)}; supported: a number from 0 to {most:g}")
        return float(value)

    def refuse(self, name: str, neutral: Any, supported: str) -> None:
        """Raises CheckpointError unless the field is missing or has the neutral value."""
        value = self.get(name)
        if value is not None and value != neutral:
            raise CheckpointError(f"{self.file}: {name} is {shortened(value)}; supported: {supported}")


def positions(metadata: Metadata, factors: Mapping[str, Tensor], longrope: bool) -> dict[str, Any]:
    """How positions are stretched, and the context that this gives, as fields of a ModelConfig.

    factors: those tensors of FACTORS that the file has. longrope: whether the architecture takes those of two kinds.
    Raises CheckpointError.
    """
    both = factors.get(LONG), factors.get(SHORT)
    if longrope and both[0] is not None and both[1] is not None:
        return stretched_by_length(metadata, both[0], both[1])
    for name, found in zip((LONG, SHORT), both, strict=True):
        if found is not None:
            where = "in a pair, in architecture phi3"
            raise CheckpointError(f"{metadata.file}: tensor {name} does not belong to this architecture; {where}")
    context = metadata.read("context_length")
    scaling, context = rope_scaling(metadata, metadata.architecture, factors.get(DIVISORS), context)
    return {"rope_scaling": scaling, "max_position_embeddings": context}


def stretched_by_length(metadata: Metadata, long: Tensor, short: Tensor) -> dict[str, Any]:
    """Longrope. Its context is that of the first training until a longer one is asked for."""
    kind, context = metadata.name("rope.scaling.type"), metadata.read("context_length")
    if metadata.get(kind) != "longrope":
        metadata.refuse(kind, "none", "none and longrope in a file with rope_factors_long")
    original = metadata.read("rope.scaling.original_context_length", context.value)
    scaling = {
        "rope_type": "longrope",
        "short_factor": FieldValue(short.tolist(), SHORT),
        "long_factor": FieldValue(long.tolist(), LONG),
        "original_max_position_embeddings": original,
        "max_position_embeddings": context,
        "attention_factor": metadata.read("rope.scaling.attn_factor", 1.0),
    }
    first = type(context.value) is int and type(original.value) is int and original.value < context.value
    served = original if first else context
    return {"rope_scaling": scaling, "max_position_embeddings": served}


def rope_scaling(
    metadata: Metadata, architecture: str, divisors: Tensor | None, context: FieldValue
) -> tuple[dict[str, Any] | None, FieldValue]:
    """The scaling of positions as llama.cpp computes it, and the context that linear scaling and YaRN give.

    Linear where no type is named, by the factor or by what older files call it. `attn_factor` multiplies cosines and
    sines whatever the type, YaRN's own besides.
    """
    rope = f"{architecture}.rope."
    kind, name = f"{rope}scaling.type", f"{rope}scaling.factor"
    if metadata.get(kind) not in (None, "linear", "yarn"):
        metadata.refuse(kind, "none", "none, linear, yarn, and llama3's scaling by rope_freqs")
    if metadata.get(name) is None:
        name = f"{rope}scale_linear"
    factor = metadata.get(name)
    if factor in (None, 0) or metadata.get(kind) == "none":
        factor = 1.0
    elif type(factor) not in (int, float):
        metadata.need(name, float)
    own = metadata.get(f"{rope}scaling.attn_factor")
    attention = 1.0 if own is None else metadata.need(f"{rope}scaling.attn_factor", float)
    if metadata.get(kind) == "yarn":
        if divisors is not None:
            metadata.refuse(kind, "none", "none in a file with rope_freqs")
        return yarn(metadata, rope, context, factor, attention)
    if divisors is not None:
        if factor != 1:
            metadata.refuse(name, 1, "1 in a file with rope_freqs")
        own_factor = metadata.read("rope.scaling.attn_factor", 1.0)
        listed = FieldValue(divisors.tolist(), DIVISORS)
        return {"rope_type": "divisors", "divisors": listed, "attention_factor": own_factor}, context
    if factor == attention == 1:
        return None, context
    scaling = {
        "rope_type": "linear",
        "factor": FieldValue(factor, name),
        "attention_factor": metadata.read("rope.scaling.attn_factor", 1.0),
    }
    return scaling, longer(context, factor, name)


def longer(context: FieldValue, factor: float, name: str) -> FieldValue:
    """A context times a factor, which a field of this name gives."""
    if type(context.value) is not int:
        return context
    return FieldValue(lengthened(context.value, factor), f"{context.name} by {name}")


def yarn(
    metadata: Metadata, rope: str, context: FieldValue, factor: float, attention: float
) -> tuple[dict[str, Any], FieldValue]:
    scaling = f"{rope}scaling."
    unused = [name for name in metadata.names if name.startswith(f"{scaling}yarn_")]
    if unused:
        log.warning("%s is not used, as llama.cpp does not use it for this architecture", ", ".join(unused))
    name = f"{scaling}factor"
    trained = metadata.read("rope.scaling.original_context_length")
    trained = trained if trained.value else context
    magnitude = attention * (1 + 0.1 * math.log(max(factor, 1)))
    fields = {
        "rope_type": "yarn",
        "factor": FieldValue(factor, name),
        "original_max_position_embeddings": trained,
        "attention_factor": FieldValue(magnitude, f"{scaling}attn_factor"),
    }
    if type(trained.value) is not int or type(context.value) is not int:
        return fields, context
    grown = longer(trained, factor, name)
    return fields, grown if grown.value > context.value else context
