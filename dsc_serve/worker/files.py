"""Open files: how many this process may have, and some that are kept for when there are no others."""

from __future__ import annotations

import os
import resource

SPARE_FILES = 16  # what starting an engine takes, and as many again


def file_limit() -> int:
    """Most open files of this process."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def raise_file_limit() -> None:
    """Allow as many open files, and so connections, as the system lets this process have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class SpareFiles:
    """Descriptors that are held so that nobody else has them, and let go where they are needed."""

    def __init__(self, count: int = SPARE_FILES) -> None:
        self._count = count
        self._held: list[int] = []

    def hold(self) -> None:
        """Hold as many as are to be had, up to the count."""
        try:
            while len(self._held) < self._count:
                self._held.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            return  # there are no more at the moment

    def let_go(self) -> None:
        while self._held:
            os.close(self._held.pop())
