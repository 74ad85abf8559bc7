"""Which adapters a request asks for, and what the engine says of those it knows. Free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import msgspec

from dsc_serve.parameter_errors import ParameterError, reject

FIELD = "adapter"
MAX_ADAPTERS = 16  # in one request's composition
MAX_WEIGHT = 1e4
FORMS = ("sum", "product of sums")
CORE_KINDS = ("shared", "lora-xs")  # of adapters on a basis: found in others, or the base's own singular vectors

Form = Literal["sum", "product of sums"]


class UnknownAdapterError(ParameterError):
    """No adapter of this name is known. known: what the text names besides; not everybody may hear of it."""

    def __init__(self, name: str, known: str = "") -> None:
        self.short = f"adapter {name!r} is not known"
        super().__init__(FIELD, self.short + known)
        self.name = name


class BrokenAdapterError(ParameterError):
    """An adapter that cannot be used, with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(FIELD, f"adapter {name!r} cannot be used: {reason}")
        self.name, self.reason = name, reason


class AdapterAccidentError(ParameterError):
    """An adapter that could not be loaded, which is not its fault: it may be asked for again."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(FIELD, f"adapter {name!r} could not be loaded: {type(error).__name__}: {error}")


class AdapterChoice(msgspec.Struct, frozen=True, array_like=True):
    """Adapters by name, with weights, and how they are composed.

    sum: ΔW = Σ wᵢ sᵢ Bᵢ Aᵢ, exactly. product of sums: ΔW = (Σ wᵢ √sᵢ Bᵢ)(Σ wᵢ √sᵢ Aᵢ), LoRAHub's composition, for which
    ranks must be equal. One adapter with weight 1 is itself in either form.
    Raises ParameterError for what cannot be meant.
    """

    parts: tuple[tuple[str, float], ...]
    form: Form = "sum"

    def __post_init__(self) -> None:
        names = [name for name, _ in self.parts]
        if not 1 <= len(names) <= MAX_ADAPTERS:
            reject(FIELD, names, f"1 to {MAX_ADAPTERS} names of adapters")
        for name, weight in self.parts:
            if not isinstance(name, str) or not name:
                reject(FIELD, name, "the name of an adapter")
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not abs(weight) <= MAX_WEIGHT:
                reject(f"{FIELD}[{name!r}]", weight, f"a number between -{MAX_WEIGHT:g} and {MAX_WEIGHT:g}")
            if names.count(name) > 1:
                reject(FIELD, names, "names that differ")
        if self.form not in FORMS:
            reject("form", self.form, " or ".join(map(repr, FORMS)))

    @classmethod
    def of(cls, name: str) -> Self:
        """One adapter as it is."""
        return cls(((name, 1.0),))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.parts)

    @property
    def single(self) -> bool:
        """Whether this is one adapter as it is."""
        return len(self.parts) == 1 and math.isclose(self.parts[0][1], 1.0, rel_tol=0, abs_tol=0)


class AdapterInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one adapter. Until it has been read once, digest is "" and the sizes are 0."""

    name: str
    parent: str = ""  # the name of the model that it adapts
    digest: str = ""  # of its content
    kind: str = ""
    rank: int = 0  # the largest of its modules
    modules: int = 0
    nbytes: int = 0  # that it takes in memory, without its basis
    basis: str = ""  # digest of what it shares with others; "": nothing
    loaded: bool = False  # whether it is in memory now
    error: str = ""  # why it cannot be used


AdapterArgument = str | Mapping[str, float] | AdapterChoice
AdapterArguments = AdapterArgument | None | Sequence[AdapterArgument | None]  # for all prompts, or one for each


def choice_of(asked: object, field: str = FIELD) -> AdapterChoice | None:
    """What a caller has asked for: None is the model as it is. Raises ParameterError for what no adapter is."""
    if asked is None or isinstance(asked, AdapterChoice):
        return asked
    if isinstance(asked, str):
        return AdapterChoice.of(asked)
    if isinstance(asked, Mapping):
        return AdapterChoice(tuple(asked.items()))
    return reject(
        field, asked, "None, a name, names with weights, an AdapterChoice, or a list with one for each prompt"
    )


def choices_of(asked: AdapterArguments, count: int) -> list[AdapterChoice | None]:
    """One for each of so many prompts. Raises ParameterError."""
    if not isinstance(asked, list | tuple):
        return [choice_of(asked)] * count
    if len(asked) != count:
        raise ParameterError(FIELD, f"adapter has {len(asked)} entries for {count} prompts")
    return [choice_of(one, f"{FIELD}[{i}]") for i, one in enumerate(asked)]
