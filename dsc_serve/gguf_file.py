"""GGUF files: their metadata and where tensors lie, in either byte order, in one file or split over several.

The library's own reader makes an array of every number and text, which takes seconds for a vocabulary.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsc_serve.files import CheckpointError, refuse_pointer

MAGIC = b"GGUF"
VERSIONS = (2, 3)
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, LIST = 8, 9
IN_FOLDERS = (".safetensors", ".json", ".bin", ".pt", ".pth")
MAX_DEPTH, MAX_DIMENSIONS = 4, 4
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class _BrokenError(ValueError):
    """What is wrong with a file's content."""


@dataclass(frozen=True)
class Entry:
    """One tensor: [shape] in the quantisation numbered `kind`, from byte `offset` of `file`."""

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    offset: int
    big: bool  # whether its bytes come in big-endian order

    def read(self, size: int) -> bytearray:
        """The first `size` bytes, in memory of their own. Raises CheckpointError when the file ends before."""
        content = bytearray(size)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            got = stream.readinto(content)
        if got != size:
            raise CheckpointError(f"{self.file}: not a readable GGUF file: it ends within tensor {self.name}")
        return content


@dataclass(frozen=True)
class GgufFile:
    """What the header of a file says; of a split one, what all headers say together."""

    path: Path
    metadata: Mapping[str, Any]
    tensors: tuple[Entry, ...]

    @property
    def tokenizer(self) -> dict[str, Any]:
        """The fields below `tokenizer.`, without that prefix and without `ggml.`."""
        names = [name for name in self.metadata if name.startswith("tokenizer.")]
        return {name.removeprefix("tokenizer.").removeprefix("ggml."): self.metadata[name] for name in names}


def open_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file and, of any part of a split one, those of all parts. Raises CheckpointError."""
    first = read_header(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return first
    named = PART.fullmatch(path.name)
    if named is None or int(named[3]) != count:
        raise CheckpointError(
            f"{path}: one of {count} parts of a split file; expected a name that ends in -00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [own.name for own in paths if not own.is_file()]
    if missing:
        raise CheckpointError(f"{path}: one of {count} parts of a split file, of which {missing[0]} is missing")
    parts = [first if own == path else read_header(own) for own in paths]
    tensors: dict[str, Entry] = {}
    for i, part in enumerate(parts):
        if part.metadata.get("split.no") != i or part.metadata.get("split.count") != count:
            raise CheckpointError(f"{part.path}: its header does not say that it is part {i + 1} of {count}")
        for entry in part.tensors:
            if entry.name in tensors:
                raise CheckpointError(f"{part.path}: tensor {entry.name} is stored twice")
            tensors[entry.name] = entry
    expected = parts[0].metadata.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise CheckpointError(f"{path}: its parts hold {len(tensors)} tensors; split.tensors.count is {expected}")
    return GgufFile(path, parts[0].metadata, tuple(tensors.values()))


def read_header(path: Path) -> GgufFile:
    """The header of one file. Raises CheckpointError."""
    refuse_pointer(path)
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return Header(content).file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except _BrokenError as error:
        way = f"; of a {path.suffix} file, name the folder" if path.suffix in IN_FOLDERS else ""
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}{way}") from None
    except (OSError, ValueError) as error:  # ValueError: mapping an empty file, text that is not UTF-8
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from None


class Header:
    """Reads a header from its beginning on."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content, self._size, self._at, self._order = content, len(content), 4, "<"
        if content[:4] != MAGIC:
            raise _BrokenError("it does not begin with GGUF")
        version = self.number("I")
        if not version & 0xFFFF:  # a small number in the other byte order
            self._order, self._at = ">", 4
            version = self.number("I")
        if version not in VERSIONS:
            raise _BrokenError(f"it is of version {version}; supported: {', '.join(map(str, VERSIONS))}")

    def file(self, path: Path) -> GgufFile:
        tensors, fields = self.numbers("Q", 2)
        metadata: dict[str, Any] = {}
        for _ in range(fields):
            name = self.text()
            if name in metadata:
                raise _BrokenError(f"{name} is given twice")
            metadata[name] = self.value(self.number("I"))
        found = [self._tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise _BrokenError(f"general.alignment is {alignment!r}; expected a power of two")
        start = -(-self._at // alignment) * alignment
        big = self._order == ">"
        entries = (Entry(name, shape, kind, path, start + at, big) for name, shape, kind, at in found)
        return GgufFile(path, metadata, tuple(entries))

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > MAX_DIMENSIONS:
            raise _BrokenError(f"tensor {name} has {dimensions} dimensions; at most {MAX_DIMENSIONS} are known")
        shape = tuple(reversed(self.numbers("Q", dimensions)))
        return name, shape, self.number("I"), self.number("Q")

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == TEXT:
            return self.text()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != LIST or depth == MAX_DEPTH:
            raise _BrokenError(f"a field of type {kind} at byte {self._at} is not known")
        kind, count = self.number("I"), self.number("Q")
        if kind in SCALARS:
            return list(self.numbers(SCALARS[kind], count))
        if kind == TEXT:
            return self.texts(count)
        return [self.value(kind, depth + 1) for _ in range(count)]

    def number(self, code: str) -> Any:
        return self.numbers(code, 1)[0]

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        size = struct.calcsize(code) * count
        self._need(size)
        found = struct.unpack_from(f"{self._order}{count}{code}", self._content, self._at)
        self._at += size
        return found

    def text(self) -> str:
        return self.texts(1)[0]

    def texts(self, count: int) -> list[str]:
        length_of = struct.Struct(f"{self._order}Q").unpack_from
        content, size, at, found = self._content, self._size, self._at, []
        self._need(8 * count)
        for _ in range(count):
            start = at + 8
            end = start + length_of(content, at)[0] if start <= size else size + 1
            if end > size:  # looked at here, not in a call for each: a vocabulary has a hundred thousand
                self._at = at
                self._need(end - at)
            found.append(content[start:end].decode())
            at = end
        self._at = at
        return found

    def _need(self, size: int) -> None:
        if size > self._size - self._at:
            raise _BrokenError(f"it ends within its header, which needs {size} bytes from byte {self._at} on")
