"""Quantised tensors of checkpoint folders: each is several tensors of a safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import tensor_shapes
from dsc_serve.model.quantised_config import QuantisedTensors
from dsc_serve.model.quantised_tensor import LEFT, MINIMUMS, RIGHT, SCALES, VALUES, QuantisedTensor
from dsc_serve.model.source import Stored, check_count

Saved = Tensor | QuantisedTensor


def assembled(stored: Mapping[str, Stored], config: ModelConfig, source: Path) -> dict[str, Stored]:
    """The tensors of a folder, the parts of quantised ones put together. Raises CheckpointError."""
    found = dict(stored)
    if not config.quantised:
        return found
    check_count(config, len(stored), source)
    shapes = tensor_shapes(config)
    for form in config.quantised:
        for name in form.tensors:
            shape = shapes.get(name)
            if shape is None or len(shape) < 2:
                what = "is no matrix of this architecture" if shape else "does not belong to this architecture"
                raise CheckpointError(f"{source}: quantised names tensor {name}, which {what}")
            if name in found:
                raise CheckpointError(f"{source}: tensor {name} is stored beside its quantised form")
            parts = {part: found.pop(f"{name}.{part}", None) for part in form.parts}
            for part, (expected, dtype) in part_shapes(form, shape).items():
                own = parts[part]
                if own is None:
                    raise CheckpointError(f"{source}: tensor {name}.{part} is missing")
                if own.shape != expected or own.dtype != dtype:
                    got, wanted = (
                        f"{str(kind).removeprefix('torch.')} {list(size)}"
                        for kind, size in ((own.dtype, own.shape), (dtype, expected))
                    )
                    raise CheckpointError(f"{source}: tensor {name}.{part} is {got}, expected {wanted}")
            whole = partial(together, form, shape, {part: own for part, own in parts.items() if own is not None})
            found[name] = Stored(shape, torch.float32, lambda whole=whole: whole().dequantised(), whole)  # type: ignore[misc]
    return found


def part_shapes(form: QuantisedTensors, shape: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what a quantised tensor [shape] consists of."""
    *outer, width = shape
    rows, groups = tuple(outer), -(-width // form.group)
    values = ((*rows, width), torch.int8) if form.bits == 8 else ((*rows, -(-width // 2)), torch.uint8)
    every = {
        VALUES: values,
        SCALES: ((*rows, groups), torch.float16),
        MINIMUMS: ((*rows, groups), torch.float16),
        LEFT: ((*rows, form.rank), torch.float16),
        RIGHT: ((form.rank, width), torch.float16),
    }
    return {part: every[part] for part in form.parts}


def together(form: QuantisedTensors, shape: tuple[int, ...], parts: Mapping[str, Stored]) -> QuantisedTensor:
    read = {part: own.read() for part, own in parts.items()}
    return QuantisedTensor(
        read[VALUES], read[SCALES], read.get(MINIMUMS), form.bits, form.group, shape, read.get(LEFT), read.get(RIGHT)
    )


def apart(tensors: Mapping[str, Saved]) -> tuple[dict[str, Tensor], list[QuantisedTensors]]:
    """What `assembled` puts together: the tensors to store, and what a configuration says of them."""
    stored: dict[str, Tensor] = {}
    named: dict[tuple[int, int, bool, int], list[str]] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Tensor):
            stored[name] = tensor.contiguous()
            continue
        rank = 0 if tensor.right is None else tensor.right.shape[0]
        named.setdefault((tensor.bits, tensor.group, tensor.minimums is not None, rank), []).append(name)
        stored |= {f"{name}.{part}": own.contiguous() for part, own in tensor.parts.items()}
    forms = [
        QuantisedTensors.model_validate(
            {"bits": bits, "group": group, "minimum": minimum, "rank": rank, "tensors": names}
        )
        for (bits, group, minimum, rank), names in named.items()
    ]
    return stored, forms
