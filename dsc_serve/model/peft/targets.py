"""Which modules a configuration names, by the rules of PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dsc_serve.files import CheckpointError
from dsc_serve.model.patterns import PatternError, ending, whole

ALL_LINEAR = "all-linear"
MOST = 2**14  # entries of a list


@dataclass(frozen=True)
class Named:
    """A module by its name in the base model."""

    name: str
    layer: int | None = None  # None for what stands in no layer


@dataclass(frozen=True)
class Targets:
    """What `target_modules`, `exclude_modules`, `layers_to_transform` and `layers_pattern` say together."""

    entries: Mapping[str, Callable[[str], bool]]  # tests by entry of `target_modules`
    excluded: Callable[[str], bool]
    layers: tuple[int, ...] | None = None  # None: all
    above: Callable[[str], bool] = field(default=lambda name: True)  # of what stands above a layer

    def takes(self, module: Named) -> bool:
        """Whether a module is named, and not left out."""
        if self.excluded(module.name):
            return False
        if self.layers is not None:
            above = module.name.partition(f".{module.layer}.")[0]
            if module.layer not in self.layers or not self.above(above):
                return False
        return any(matches(module.name) for matches in self.entries.values())


def read_targets(content: Mapping[str, Any]) -> Targets:
    """Raises CheckpointError naming the field that cannot be used."""
    wanted = content.get("target_modules")
    if isinstance(wanted, str):
        linear = wanted.lower() == ALL_LINEAR
        entries = {wanted: (lambda name: True) if linear else pattern("target_modules", wanted, whole)}
    else:
        entries = {name: suffix(name) for name in names("target_modules", wanted)}
    if not entries:
        raise CheckpointError(f"target_modules is {wanted!r}; expected a list of modules' names, or a pattern")
    left_out = content.get("exclude_modules")
    excluded = any_of([pattern("exclude_modules", left_out, whole)] if isinstance(left_out, str) and left_out else [])
    if not isinstance(left_out, str) and left_out:
        excluded = any_of([suffix(name) for name in names("exclude_modules", left_out)])
    layers, above = content.get("layers_to_transform"), content.get("layers_pattern")
    if layers is None or layers == []:
        if above:
            raise CheckpointError(f"layers_pattern is {above!r}, but layers_to_transform is not given")
        return Targets(entries, excluded)
    if isinstance(wanted, str):
        raise CheckpointError(f"layers_to_transform is given, but target_modules is the pattern {wanted!r}")
    numbers = layers if isinstance(layers, list) else [layers]
    if len(numbers) > MOST or not all(type(number) is int and number >= 0 for number in numbers):
        raise CheckpointError(f"layers_to_transform is {short(layers)}; expected layers' numbers")
    if not above:
        return Targets(entries, excluded, tuple(numbers))
    parts = [above] if isinstance(above, str) else names("layers_pattern", above)
    return Targets(
        entries, excluded, tuple(numbers), any_of([pattern("layers_pattern", part, ending) for part in parts])
    )


def names(field: str, value: object) -> list[str]:
    """A field that must be a list of names, sorted: it was a set. Raises CheckpointError."""
    if not isinstance(value, list) or len(value) > MOST or not all(isinstance(own, str) and own for own in value):
        raise CheckpointError(f"{field} is {short(value)}; expected a list of names, at most {MOST}")
    return sorted(set(value))


def suffix(wanted: str) -> Callable[[str], bool]:
    return lambda name: name == wanted or name.endswith(f".{wanted}")


def any_of(tests: list[Callable[[str], bool]]) -> Callable[[str], bool]:
    return lambda name: any(matches(name) for matches in tests)


def pattern(field: str, text: str, kind: Callable[[str], Callable[[str], bool]]) -> Callable[[str], bool]:
    """Raises CheckpointError naming the field."""
    try:
        return kind(text)
    except PatternError as error:
        raise CheckpointError(f"{field}: {error}") from None


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"
