"""Panics of libraries that are written in Rust: they come as BaseExceptions, past everything that handles errors."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType


class PanicError(RuntimeError):
    """A library has failed where it must not; one line."""


def is_panic(error: BaseException) -> bool:
    # Each library has a class of its own, which none of them exports.
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


class PanicGuard:
    """Raises PanicError where what is within panics; a class, since a step enters it: a generator costs it 1 %."""

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and is_panic(error):
            raise PanicError(f"a library panicked: {' '.join(str(error).split())[:200]}") from error


GUARD = PanicGuard()


def panics_as_errors() -> AbstractContextManager[None]:
    """Raises PanicError where what is within panics."""
    return GUARD
