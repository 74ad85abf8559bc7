"""What a family's mapping reads: the fields of a configuration of another form, each asked for by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsc_serve.files import CheckpointError
from dsc_serve.model.config import shortened
from dsc_serve.model.schema import MOST_LAYERS

Fields = dict[str, Any]
LARGEST = 2**63  # of whole numbers: what is larger overflows where it meets a fraction


@dataclass(frozen=True)
class Settings:
    """A configuration under Hugging Face's field names; path: the file that it stands in, for errors."""

    content: Mapping[str, Any]
    path: Path

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these fields that there is and is not null. Raises CheckpointError for giants."""
        name = next((name for name in names if self.content.get(name) is not None), None)
        return default if name is None else self.held(name, self.content[name])

    def held(self, name: str, value: Any) -> Any:
        """A value, unless it is a whole number, or an object with one, that no computation takes: CheckpointError."""
        if isinstance(value, dict):
            for own, inner in value.items():
                self.held(f"{name}.{own}", inner)
        if isinstance(value, int) and not -LARGEST <= value < LARGEST:
            self.refuse(name, value, "whole numbers of 64 bits")
        return value

    def refuse(self, name: str, value: object, supported: str) -> NoReturn:
        """Raises CheckpointError that names the field, its value and what is supported."""
        raise CheckpointError(f"{self.path}: {name} is {shortened(value)}; supported: {supported}")

    def only(self, name: str, *allowed: object, supported: str | None = None) -> None:
        """Raises CheckpointError unless the field is missing, null or one of these values."""
        value = self.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, value, supported or ", ".join(map(repr, allowed)))

    def number(self, name: str, default: float) -> float:
        """A field that must be a number. Raises CheckpointError."""
        value = self.get(name, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {name} is {shortened(value)}, expected a number")
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {name} is {value!r}, expected a finite number")
        return float(value)

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of these fields that there is, which must be a whole number above 0. Raises CheckpointError."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            found = next((name for name in names if self.content.get(name) is not None), names[0])
            raise CheckpointError(f"{self.path}: {found} is {shortened(value)}, expected a whole number above 0")
        return value

    def layers(self, *names: str) -> int:
        """The number of layers, small enough for a list of all of them. Raises CheckpointError."""
        names = names or ("num_hidden_layers",)
        count = self.size(*names)
        if count > MOST_LAYERS:
            name = next(name for name in names if self.content.get(name) is not None)
            self.refuse(name, count, f"1 to {MOST_LAYERS}")
        return count

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that must be true or false. Raises CheckpointError."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {shortened(value)}, expected true or false")
        return value
