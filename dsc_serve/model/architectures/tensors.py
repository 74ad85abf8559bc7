"""Stored tensors brought under other names and into other shapes; nothing is read before it is asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.source import Stored

T = TypeVar("T")
Tensors = dict[str, Stored]
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def renamed(tensors: Mapping[str, Stored], rules: Mapping[str, str]) -> Tensors:
    """The same under names in which each pattern is replaced by what it stands for, the first that matches alone."""
    compiled = [(re.compile(pattern), new) for pattern, new in rules.items()]

    def new_name(name: str) -> str:
        for pattern, new in compiled:
            changed, count = pattern.subn(new, name, count=1)
            if count:
                return changed
        return name

    return {new_name(name): stored for name, stored in tensors.items()}


class Whole:
    """A tensor that is read once for its parts, and kept until each of them has been asked for."""

    def __init__(self, stored: Stored) -> None:
        self._stored, self.parts = stored, 0
        self._floating: ReadOnce[Tensor] = ReadOnce(stored.read)
        self._quantised = None if stored.quantised is None else ReadOnce(stored.quantised)

    def part(self, shape: tuple[int, ...], take: Callable[[Tensor], Tensor]) -> Stored:
        """What `take` makes of the whole: [shape]. Of a quantised one it gets each part, of as many rows."""
        self.parts += 1
        quantised = None if self._quantised is None else partial(self._take_quantised, take)
        return replace(self._stored, shape=shape, read=partial(self._take, take), quantised=quantised)

    def _take(self, take: Callable[[Tensor], Tensor]) -> Tensor:
        return take(self._floating.get(self.parts)).clone(memory_format=torch.contiguous_format)

    def _take_quantised(self, take: Callable[[Tensor], Tensor]) -> QuantisedTensor | None:
        assert self._quantised is not None
        whole = self._quantised.get(self.parts)
        return None if whole is None else whole.mapped(lambda own: take(own).clone())


class ReadOnce(Generic[T]):
    """What is read once for several, and kept until as many have asked."""

    def __init__(self, read: Callable[[], T]) -> None:
        self._read, self._left = read, 0
        self._found: list[T] = []

    def get(self, times: int) -> T:
        if not self._found:
            self._found, self._left = [self._read()], times
        found = self._found[0]
        self._left -= 1
        if not self._left:
            self._found = []
        return found


class Take(Protocol):
    """Of a whole the part of this number."""

    def __call__(self, whole: Tensor, *, number: int) -> Tensor: ...


def narrowed(whole: Tensor, start: int, count: int) -> Tensor:
    return whole[start : start + count]


def split_rows(
    tensors: Tensors,
    name: str,
    parts: Mapping[str, int],
    path: Path,
    take: Take | None = None,
) -> None:
    """In place: the rows of one tensor become several, by name as many as given, in order.

    take: gives a part where its rows do not lie together. Nothing happens where there
    is no such tensor, which is missed later. Raises CheckpointError where it has other rows.
    """
    stored = tensors.pop(name, None)
    if stored is None:
        return
    rows = sum(parts.values())
    if not stored.shape or stored.shape[0] != rows:
        expected = [rows, *stored.shape[1:]]
        raise CheckpointError(f"{path}: tensor {name} has shape {list(stored.shape)}, expected {expected}")
    whole, start = Whole(stored), 0
    for i, (part, count) in enumerate(parts.items()):
        own = partial(narrowed, start=start, count=count) if take is None else partial(take, number=i)
        tensors[part] = whole.part((count, *stored.shape[1:]), own)
        start += count


def transposed(tensors: Tensors, names: re.Pattern[str]) -> None:
    """In place: matrices whose names match, stored the other way round."""
    for name, stored in tensors.items():
        if names.search(name) and len(stored.shape) == 2:
            read = partial(lambda own: own.read().T.contiguous(), stored)
            tensors[name] = Stored(stored.shape[::-1], stored.dtype, read)


def scaled(tensors: Tensors, name: str, factor: float) -> None:
    """In place: a tensor multiplied by a number, in float32; of a quantised one the scales, rounded to float16."""
    if name in tensors and factor != 1:
        stored = tensors[name]
        read = partial(lambda own: own.read().float() * factor, stored)
        quantised = None if stored.quantised is None else partial(scaled_scales, stored.quantised, factor)
        tensors[name] = Stored(stored.shape, torch.float32, read, quantised)


def scaled_scales(read: Callable[[], QuantisedTensor | None], factor: float) -> QuantisedTensor | None:
    """None where float16 does not hold the product."""
    own = read()
    if own is None or own.wrong():
        return own
    times = own.scaled(factor)
    return None if times.wrong() else times


def raised(tensors: Tensors, name: str) -> None:
    """In place: one more in each of a tensor's numbers, in float32: a norm's weight that is stored as what 1 lacks."""
    if name in tensors:
        stored = tensors[name]
        tensors[name] = Stored(stored.shape, torch.float32, partial(lambda own: own.read().float() + 1, stored))


def without(tensors: Mapping[str, Stored], names: str) -> Tensors:
    """The same but for those whose names match: buffers that old checkpoints store."""
    pattern = re.compile(names)
    return {name: stored for name, stored in tensors.items() if not pattern.search(name)}
