"""What sections of typed settings are made of: fields that carry their meaning and their bounds."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

# No setting overflows where it is used, and none is without any limit.
MOST = 10**12


class ConfigError(ValueError):
    """A setting that cannot be used; the text names the setting, its value and what is allowed."""


def allowed_values(kind: Any) -> str:
    """What a field of this annotated type may hold, in words."""
    base, *notes = get_args(kind) if get_origin(kind) is Annotated else (kind,)
    if get_origin(base) is Literal:
        return f"one of {', '.join(map(str, get_args(base)))}"
    if get_origin(base) is tuple:
        return "a list of texts"
    name = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}[base]
    low = next((note.ge for note in notes if note.ge is not None), None)
    high = next((note.le for note in notes if note.le is not None), None)
    bounds = [f"{word} {bound}" for word, bound in (("at least", low), ("at most", high)) if bound is not None]
    return f"{name} of {' and '.join(bounds)}" if bounds else name


def converted(value: object, kind: Any, strict: bool = True) -> Any:
    """A value as a field of this annotated type holds it. Raises ValidationError; not strict: texts are parsed."""
    result = msgspec.convert(value, kind, strict=strict)
    if isinstance(result, float) and not math.isfinite(result):
        raise msgspec.ValidationError("not finite")
    return result


class Section(msgspec.Struct, frozen=True, kw_only=True):
    """Settings that belong together. Raises ConfigError where a value is not what its field allows."""

    def __post_init__(self) -> None:
        for name, kind in self.kinds().items():
            value = getattr(self, name)
            try:
                converted(value, kind)
            except msgspec.ValidationError:
                raise ConfigError(f"{name} is {value!r}; it must be {allowed_values(kind)}") from None

    @classmethod
    @functools.cache
    def kinds(cls) -> Mapping[str, Any]:
        """The annotated type of every field."""
        return get_type_hints(cls, include_extras=True)


def served_names(names: str) -> tuple[str, ...]:
    """The names between commas. Raises ConfigError for names that are blank, or there twice."""
    parts = tuple(part.strip() for part in names.split(",")) if names else ()
    if not all(parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"served_model_name is {names!r}; its names must not be blank, and each may be there once")
    return parts
