"""Where a model comes from: its configuration, and its tensors, each read when it is asked for."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dsc_kernels.quantised import Weight
from dsc_serve.config import DTYPES
from dsc_serve.files import CheckpointError
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import tensor_shapes
from dsc_serve.model.ffn import KINDS
from dsc_serve.model.origin import Origin
from dsc_serve.model.quantised_tensor import QuantisedTensor

STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SILENT_S, APART_S = 5.0, 10.0  # what loads faster says nothing; how often a log hears of progress


@dataclass(frozen=True)
class Stored:
    """A tensor in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]  # gives it, [shape] in this dtype, in memory of its own that no file shows through
    # Gives what is stored in 4 or 8 bits as it is, None where float16 scales do not hold it after all
    quantised: Callable[[], QuantisedTensor | None] | None = None

    def mapped(self, take: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Stored:
        """[shape]: with the rows that `take` chooses and orders, which does not look into them."""
        read, whole = self.read, self.quantised
        if whole is None:
            return replace(self, shape=shape, read=lambda: take(read()))

        def quantised() -> QuantisedTensor | None:
            own = whole()
            return None if own is None else own.mapped(take)

        return Stored(shape, self.dtype, lambda: take(read()), quantised)


def commonest_dtype(tensors: Mapping[str, Stored]) -> torch.dtype:
    """The dtype that most numbers are stored in; float32 where there are none."""
    sizes: Counter[torch.dtype] = Counter()
    for stored in tensors.values():
        if stored.dtype in STORED_DTYPES:
            sizes[stored.dtype] += torch.Size(stored.shape).numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32


@dataclass(frozen=True)
class ModelSource:
    """A model at a path, under the names and in the forms of `tensor_shapes`; nothing of it has been read yet."""

    path: Path
    config: ModelConfig
    tensors: Mapping[str, Stored]
    dtype: torch.dtype  # what the weights are taken to be stored in
    texts: Callable[[], dict[str, str]]  # the tokenizer's files, by name, when they are asked for
    # The family's form that the tensors were brought from; None: they were made in the serving form
    origin: Origin | None = None
    # Whether nothing is held in few bits under `weights` "auto" where float32 is asked for
    exact_in_float32: bool = False
    assumed: str = ""  # of sizes that were not given, to stand before errors about tensors

    def auto_weights(self, dtype: str) -> str:
        """What the setting `weights` "auto" is under the setting `dtype`."""
        return "bfloat16" if self.exact_in_float32 and DTYPES.get(dtype) == "float32" else "stored"

    def check(self) -> None:
        """Every tensor of the configuration is there with its shape, floating, and no other. Raises CheckpointError."""
        found = {name: (stored.shape, stored.dtype) for name, stored in self.tensors.items()}
        try:
            check_count(self.config, len(self.tensors), self.path)
            check_stored(found, tensor_shapes(self.config), self.path)
        except CheckpointError as error:
            raise CheckpointError(f"{self.assumed}{error}") from None

    def weights(self, progress: Callable[[int], None] = lambda size: None) -> Weights:
        """The tensors, to be read; progress hears of the elements that were."""
        return Weights(self, progress)

    def stored_weights(self, progress: Callable[[int], None] = lambda size: None) -> StoredWeights:
        """The same, but what is stored in 4 or 8 bits as it is."""
        return StoredWeights(self, progress)


class Weights(Mapping[str, Tensor]):
    """A source's tensors, each read and found finite when it is asked for, and not kept here."""

    def __init__(self, source: ModelSource, progress: Callable[[int], None]) -> None:
        self._source, self._progress = source, progress

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._source.tensors[name].read()
        check_finite(name, tensor, self._source.path)
        self._progress(tensor.numel())
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.tensors)

    def __len__(self) -> int:
        return len(self._source.tensors)


class StoredWeights(Mapping[str, Weight]):
    """The same as they are stored: what is in 4 or 8 bits is not dequantised, and has all its rows in one matrix."""

    def __init__(self, source: ModelSource, progress: Callable[[int], None]) -> None:
        self._source, self._progress, self._floating = source, progress, Weights(source, progress)

    def __getitem__(self, name: str) -> Weight:
        stored = self._source.tensors[name]
        own = None if stored.quantised is None or len(stored.shape) < 2 else stored.quantised()
        if own is None:
            return self._floating[name]
        if wrong := own.wrong():
            what = f"tensor {name} holds {wrong[1]} {wrong[0]} that are not finite"
            raise CheckpointError(f"{self._source.path}: {what}")
        self._progress(torch.Size(own.shape).numel())
        return own.mapped(lambda part: part.flatten(0, -2)).weight()

    def __iter__(self) -> Iterator[str]:
        return iter(self._floating)

    def __len__(self) -> int:
        return len(self._floating)


def check_count(config: ModelConfig, count: int, source: Path) -> None:
    """Raises CheckpointError where so few tensors cannot be this model's, before each that is missing is looked for."""
    kinds = config.layers
    distinct = {id(kind): kind for kind in kinds}
    sizes = {own: len(KINDS[kind.ffn.kind].shapes(kind)) for own, kind in distinct.items()}
    each = min(sizes.values())
    if sum(sizes[id(kind)] for kind in kinds) > count:
        least = "" if len(set(sizes.values())) == 1 else " or more"
        needed = f"num_hidden_layers is {len(kinds)}, and the FFN of each has {each}{least} tensors"
        raise CheckpointError(f"{source}: {needed}; the weights hold {count} tensors in all")


def check_stored(
    found: Mapping[str, tuple[tuple[int, ...], torch.dtype]], expected: Mapping[str, tuple[int, ...]], source: Path
) -> None:
    """Exactly the expected tensors, with their shapes, in a dtype that is read. Raises CheckpointError."""
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    for names, what in ((missing, "is missing"), (unknown, "does not belong to this architecture")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise CheckpointError(f"{source}: tensor {names[0]} {what}{more}")
    for name, (shape, dtype) in found.items():
        if shape != expected[name]:
            raise CheckpointError(f"{source}: tensor {name} has shape {list(shape)}, expected {list(expected[name])}")
        if dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{source}: tensor {name} is stored as {str(dtype).removeprefix('torch.')}, "
                "expected float32, bfloat16 or float16"
            )


def check_finite(name: str, tensor: Tensor, source: Path) -> None:
    """Raises CheckpointError for a tensor that holds values that are not finite."""
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):  # which a finite tensor hardly ever misses
        return
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(f"{source}: tensor {name} holds {bad} values that are not finite")


class LoadingProgress:
    """Shows on standard error how far reading has come: as a bar on a terminal, elsewhere as lines of the log."""

    def __init__(self, source: ModelSource) -> None:
        self._total = sum(torch.Size(stored.shape).numel() for stored in source.tensors.values())
        self._name, self._done = source.path.name, 0
        self._next = time.monotonic() + SILENT_S
        self._bar = tqdm(
            total=self._total,
            desc=f"loading {self._name}",
            unit="",
            unit_scale=True,
            delay=SILENT_S,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def __call__(self, size: int) -> None:
        self._done += size
        self._bar.update(size)
        if self._bar.disable and time.monotonic() >= self._next:
            self._next = time.monotonic() + APART_S
            print(f"loading {self._name}: {self._done / max(self._total, 1):.0%}", file=sys.stderr, flush=True)

    def __enter__(self) -> LoadingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
