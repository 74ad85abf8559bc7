"""What a family's mapping reads: the fields of a configuration of another form, each asked for by its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from dsc_serve.files import CheckpointError

Fields = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """A configuration under Hugging Face's field names; path: the file that it stands in, for errors."""

    content: Mapping[str, Any]
    path: Path

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these fields that there is and is not null."""
        return next((self.content[name] for name in names if self.content.get(name) is not None), default)

    def refuse(self, name: str, value: object, supported: str) -> NoReturn:
        """Raises CheckpointError that names the field, its value and what is supported."""
        raise CheckpointError(f"{self.path}: {name} is {value!r}; supported: {supported}")

    def only(self, name: str, *allowed: object, supported: str | None = None) -> None:
        """Raises CheckpointError unless the field is missing, null or one of these values."""
        value = self.get(name)
        if value is not None and value not in allowed:
            self.refuse(name, value, supported or ", ".join(map(repr, allowed)))

    def number(self, name: str, default: float) -> float:
        """A field that must be a number. Raises CheckpointError."""
        value = self.get(name, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {name} is {value!r}, expected a number")
        return float(value)

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of these fields that there is, which must be a whole number above 0. Raises CheckpointError."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            found = next((name for name in names if self.content.get(name) is not None), names[0])
            raise CheckpointError(f"{self.path}: {found} is {value!r}, expected a whole number above 0")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that must be true or false. Raises CheckpointError."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {name} is {value!r}, expected true or false")
        return value
