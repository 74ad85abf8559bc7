"""Values of a configuration with the name of the field that each was read from, by which errors call it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]  # of a value in a configuration: keys and indices from the outside inwards


@dataclass(frozen=True)
class FieldValue:
    """A value, and what the file that it comes from calls it."""

    value: Any
    name: str


def plain(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[Place, str]]:
    """The same with values alone, and the names of those that had one."""
    names: dict[Place, str] = {}

    def value_of(own: Any, place: Place) -> Any:
        if isinstance(own, FieldValue):
            names[place] = own.name
            return value_of(own.value, place)
        if isinstance(own, Mapping):
            return {key: value_of(inner, (*place, key)) for key, inner in own.items()}
        if isinstance(own, list):
            return [value_of(inner, (*place, i)) for i, inner in enumerate(own)]
        return own

    return {key: value_of(own, (key,)) for key, own in content.items()}, names


def told(place: Place, names: Mapping[Place, str]) -> str:
    """What the value at a place, or one within it, is called; "" for the whole."""
    for end in range(len(place), 0, -1):
        if place[:end] in names:
            return ".".join((names[place[:end]], *map(str, place[end:])))
    return ".".join(map(str, place))


def reworded(message: str, below: Place, names: Mapping[Place, str]) -> str:
    """A message about the fields below a place with the names that they were read from."""
    size = len(below)
    known = {".".join(map(str, place[size:])): name for place, name in names.items() if place[:size] == below}
    known.pop("", None)
    if not known:
        return message
    longest_first = "|".join(re.escape(own) for own in sorted(known, key=len, reverse=True))
    return re.sub(rf"(?<![\w.'])({longest_first})(?!\.?\w|')", lambda found: known[found[1]], message)
