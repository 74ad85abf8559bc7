"""Panics of libraries that are written in Rust: they come as BaseExceptions, past everything that handles errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class PanicError(RuntimeError):
    """A library has failed where it must not; one line."""


def is_panic(error: BaseException) -> bool:
    # Each library has a class of its own, which none of them exports.
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


@contextlib.contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raises PanicError where what is within panics."""
    try:
        yield
    except BaseException as error:
        if not is_panic(error):
            raise
        raise PanicError(f"a library panicked: {' '.join(str(error).split())[:200]}") from error
