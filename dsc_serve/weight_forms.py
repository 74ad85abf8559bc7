"""What weights are computed with: forms by parts of a model, as settings say them. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Literal, get_args

Form = Literal["stored", "bfloat16", "int8", "int4"]
FORMS: tuple[Form, ...] = get_args(Form)
Part = Literal["embedding", "head", "attention", "mlp", "experts", "router", "bank"]
PARTS: tuple[Part, ...] = get_args(Part)
EIGHT_AT_LEAST = ("router", "bank")  # rows of which a token picks few: what four bits lose there, nothing else makes up

Forms = Mapping[Part, Form]

AS_STORED: Forms = dict.fromkeys(PARTS, "stored")
# Words are compared with each other, atoms too: a head, a router and a bank in 4 bits would save little and lose much.
IN_FOUR_BITS: Forms = {
    "embedding": "int8",
    "head": "int8",
    "attention": "int4",
    "mlp": "int4",
    "experts": "int4",
    "router": "int8",
    "bank": "int8",
}
BY_SETTING: Mapping[str, Forms] = {
    "stored": AS_STORED,
    "bfloat16": dict.fromkeys(PARTS, "bfloat16"),
    "int8": dict.fromkeys(PARTS, "int8"),
    "int4": IN_FOUR_BITS,
}
SMALL_ROUTERS = ("moe", "molora")  # of a row for each expert or adapter: a hundredth of a layer's bytes, and they stay


class KeepError(ValueError):
    """What `keep` says and cannot be; the text names the setting."""


def kept(text: str) -> dict[Part, Form]:
    """The parts that `keep` names, such as "router,head=int8": without a form a part stays as it is stored.

    Raises KeepError.
    """
    found: dict[Part, Form] = {}
    for item in (item.strip() for item in text.split(",")) if text.strip() else ():
        name, equals, wanted = (word.strip() for word in item.partition("="))
        part = next((part for part in PARTS if part == name), None)
        form = next((form for form in FORMS if form == (wanted if equals else "stored")), None)
        if part is None:
            raise KeepError(f"keep is {text!r}: {name!r} is no part of a model; allowed: {', '.join(PARTS)}")
        if form is None:
            raise KeepError(f"keep is {text!r}: {part} cannot be {wanted!r}; allowed: {', '.join(FORMS)}")
        if form == "int4" and part in EIGHT_AT_LEAST:
            raise KeepError(f"keep is {text!r}: {part} cannot be int4; allowed: stored, bfloat16, int8")
        if part in found:
            raise KeepError(f"keep is {text!r}: {part} is there twice")
        found[part] = form
    return found


def forms_of(weights: str, keep: str, ffn: str, tied: bool, present: Collection[Part] = PARTS) -> Forms:
    """The form of each part of a model with FFNs of this kind; tied: whether its head is its embedding.

    Then what is said of either holds for both. present: the parts that it has. Raises KeepError.
    """
    forms, exceptions = dict(BY_SETTING[weights]), kept(keep)
    for part in exceptions:
        if part not in present and not (tied and part == "head"):
            raise KeepError(
                f"keep is {keep!r}: this model has no {part}; it has {', '.join(p for p in PARTS if p in present)}"
            )
    if ffn in SMALL_ROUTERS and weights in ("int8", "int4"):
        forms["router"] = "stored"
    if tied and exceptions.keys() & {"embedding", "head"}:
        either = {exceptions[part] for part in ("embedding", "head") if part in exceptions}
        if len(either) > 1:
            raise KeepError(f"keep is {keep!r}: the head of this model is its embedding, and both have one form")
        exceptions["embedding"] = exceptions["head"] = either.pop()
    return forms | exceptions


# By the name of a tensor which part its matrix is of: the first that matches.
NAMES: tuple[tuple[str, Part], ...] = (
    (r"model\.embed_tokens\.weight", "embedding"),
    (r"lm_head\.weight", "head"),
    (r".*\.self_attn\.[qkvo]_proj\.weight", "attention"),
    (r".*\.mlp\.router\.weight", "router"),
    (r".*\.mlp\.(atoms_[uv]|adapters_[ab])", "bank"),
    (r".*\.mlp\.experts\.\d+\.\w+_proj\.weight", "experts"),
    (r".*\.mlp\.((static|shared_expert)\.)?\w+_proj\.weight", "mlp"),
)


def part_of(name: str) -> Part | None:
    """The part that a tensor's name belongs to; None for what stays in floating point."""
    return next((part for pattern, part in NAMES if re.fullmatch(pattern, name)), None)
