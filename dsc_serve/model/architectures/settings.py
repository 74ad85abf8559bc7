"""What a family's mapping reads: the fields of a configuration of another form, each asked for by its name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

from dsc_serve.files import CheckpointError
from dsc_serve.model.config import shortened
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.schema import MOST_LAYERS

Fields = dict[str, Any]
LARGEST = 2**63  # of whole numbers: what is larger overflows where it meets a fraction
# Fields whose null says something else than that they are missing: as many as other heads, or none.
NULLS = {
    *("num_key_value_heads", "sliding_window", "q_lora_rank", "n_shared_experts"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
}


@dataclass(frozen=True)
class Settings:
    """A configuration under Hugging Face's field names."""

    content: Mapping[str, Any]
    path: Path  # the file that it stands in, for errors
    # What the file calls fields whose names are others, those within an object behind its name and a dot
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""  # behind which other fields have their own names in the file
    complete: bool = False  # nothing has a default that is there, were it null
    defaults: Mapping[str, Any] = field(default_factory=dict)  # what the fields are that it leaves out
    assumed: dict[str, int] = field(default_factory=dict)  # the sizes that were asked for and had a default

    def over(self, defaults: Mapping[str, Any]) -> Settings:
        """The same with a family's defaults."""
        nulls = self.content.keys() if self.complete else self.content.keys() & NULLS
        return replace(self, defaults={name: value for name, value in defaults.items() if name not in nulls})

    def changed(self, **changes: Any) -> Settings:
        """The same but for these fields."""
        return replace(self, content={**self.content, **changes})

    def below(self, name: str) -> Settings:
        """The object in a field as a configuration of its own, empty where there is none. Raises CheckpointError."""
        value = self.get(name, default={})
        if not isinstance(value, dict):
            self.refuse(name, value, "an object")
        names = {own.removeprefix(f"{name}."): told for own, told in self.names.items() if own.startswith(f"{name}.")}
        return Settings(value, self.path, names, f"{self.told(name)}.")

    def told(self, *names: str) -> str:
        """What the file calls the first of these fields that there is, or the last of them."""
        name = next((name for name in names if self.content.get(name) is not None), names[-1])
        return self.names.get(name, self.prefix + name)

    def get(self, *names: str, default: Any = None) -> Any:
        """The value of the first of these fields that there is and is not null, else of the first that has a default.

        Raises CheckpointError for giants.
        """
        name = next((name for name in names if self.content.get(name) is not None), None)
        if name is not None:
            return self.held(name, self.content[name])
        name = next((name for name in names if self.defaults.get(name) is not None), None)
        if name is None:
            return default
        if type(self.defaults[name]) is int:
            self.assumed[name] = self.defaults[name]
        return self.defaults[name]

    def read(self, *names: str, default: Any = None) -> FieldValue:
        """As `get`, with the name by which the file calls it: for what is checked where all fields are."""
        return FieldValue(self.get(*names, default=default), self.told(*names))

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
        raise CheckpointError(f"{self.path}: {self.told(name)} is {shortened(value)}; supported: {supported}")

    def only(self, name: str, *allowed: object, supported: str | None = None) -> None:
        """Raises CheckpointError unless the field is missing, null or one of these values."""
        value = self.get(name)
        if value is not None and not any(type(value) is type(own) and value == own for own in allowed):
            self.refuse(name, value, supported or ", ".join(map(repr, allowed)))

    def number(self, name: str, default: float | None = None) -> float:
        """A field that must be a number. Raises CheckpointError."""
        value = self.get(name, default=default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{self.path}: {self.told(name)} is {shortened(value)}, expected a number")
        if not math.isfinite(value):
            raise CheckpointError(f"{self.path}: {self.told(name)} is {value!r}, expected a finite number")
        return float(value)

    def size(self, *names: str, default: int | None = None) -> int:
        """The first of these fields that there is, which must be a whole number above 0. Raises CheckpointError."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 1:
            found = f"{self.told(*names)} is {shortened(value)}"
            raise CheckpointError(f"{self.path}: {found}, expected a whole number above 0")
        return value

    def whole(self, *names: str, default: int = 0, most: int | None = None) -> int:
        """The first of these fields that there is, a whole number from 0 to `most`. Raises CheckpointError."""
        value = self.get(*names, default=default)
        if type(value) is not int or value < 0 or (most is not None and value > most):
            name = next((name for name in names if self.content.get(name) is not None), names[-1])
            self.refuse(name, value, "a whole number " + ("of at least 0" if most is None else f"from 0 to {most}"))
        return value

    def read_size(self, *names: str) -> FieldValue:
        """As `size`, with the name by which the file calls it."""
        return FieldValue(self.size(*names), self.told(*names))

    def layers(self, *names: str) -> int:
        """The number of layers, small enough for a list of all of them. Raises CheckpointError."""
        names = names or ("num_hidden_layers",)
        count = self.size(*names)
        if count > MOST_LAYERS:
            name = next((name for name in names if self.content.get(name) is not None), names[-1])
            self.refuse(name, count, f"1 to {MOST_LAYERS}")
        return count

    def flag(self, name: str, default: bool = False) -> bool:
        """A field that must be true or false. Raises CheckpointError."""
        value = self.get(name, default=default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{self.path}: {self.told(name)} is {shortened(value)}, expected true or false")
        return value
