"""Regular expressions that others wrote: matched in time that is linear in the text, whatever they are."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from pydantic import StringConstraints, TypeAdapter, ValidationError
from pydantic_core import SchemaError

LONGEST = 4096  # characters
NAME = re.compile(r"[\w.]+")


class PatternError(ValueError):
    """A pattern that cannot be used; one line."""


def whole(pattern: str) -> Callable[[str], bool]:
    """Whether a whole text matches. Raises PatternError, too for what needs looking around or back."""
    return compiled(pattern, pattern)


def compiled(expression: str, pattern: str) -> Callable[[str], bool]:
    """As `whole`, of an expression that was made of a pattern, by which errors call it."""
    if len(pattern) > LONGEST:
        raise PatternError(f"it has {len(pattern)} characters; at most {LONGEST} are read")
    try:
        kind = TypeAdapter[str](Annotated[str, StringConstraints(pattern=rf"\A(?:{expression})\z")])
    except SchemaError as error:
        raise PatternError(f"{pattern!r} is not a pattern that is read: {reason(error)}") from None

    def matches(text: str) -> bool:
        try:
            kind.validate_python(text)
        except ValidationError:
            return False
        return True

    return matches


def ending(pattern: str) -> Callable[[str], bool]:
    """Whether a dotted name matches, or what follows one of its dots does. Raises PatternError."""
    if not NAME.fullmatch(pattern):
        return compiled(rf"(.*\.)?({pattern})", pattern)

    def matches(text: str) -> bool:  # the commonest kind, without an expression: a dot stands for any character
        start = len(text) - len(pattern)
        if start < 0 or (start and text[start - 1] != "."):
            return False
        return all(own in (".", other) for own, other in zip(pattern, text[start:], strict=True))

    return matches


def reason(error: SchemaError) -> str:
    """What the library says of a pattern, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])
