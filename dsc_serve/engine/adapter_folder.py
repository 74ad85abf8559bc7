"""The folder that adapters come from: one in each sub-folder, under its name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from dsc_serve.adapter_choice import BrokenAdapterError, UnknownAdapterError
from dsc_serve.model.adapter import Adapter
from dsc_serve.model.cores.files import basis_beside

LOOK_S = 1.0  # a sub-folder is looked at again no earlier than this
MOST_NAMED = 8  # in an error

Stamp = tuple[tuple[str, int, int, int], ...]  # of each file, and of its basis's: name, time, size and inode


class AdapterFolder:
    """Sub-folders are looked at again whenever they are asked for, once a second at most.

    read: what a sub-folder holds; raises BrokenAdapterError. A name that begins with a dot, or is not UTF-8, is none.
    """

    def __init__(
        self, path: Path, read: Callable[[Path], Adapter], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path, self._read, self._clock = path, read, clock
        self._names: tuple[float, list[str]] | None = None
        self._stamps: dict[str, tuple[float, Stamp | None]] = {}

    def names(self) -> Sequence[str]:
        """All that there are, in order, broken ones among them."""
        now = self._clock()
        if self._names is None or now - self._names[0] >= LOOK_S:
            try:
                found = [entry.name for entry in os.scandir(self.path) if entry.is_dir()]
            except OSError:
                found = []
            self._names = now, sorted(name for name in found if not name.startswith(".") and is_text(name))
            for gone in self._stamps.keys() - set(found):
                del self._stamps[gone]
        return self._names[1]

    def stamp(self, name: str) -> Stamp | None:
        """What changes when an adapter's files do; None: there is none of this name."""
        known, now = self._stamps.get(name), self._clock()
        if known is None or now - known[0] >= LOOK_S:
            known = now, self.look(name)
            if known[1] is not None:  # names that there are not may be any number
                self._stamps[name] = known
            else:
                self._stamps.pop(name, None)
        return known[1]

    def look(self, name: str) -> Stamp | None:
        """The same, now."""
        if not name or name.startswith(".") or "/" in name or "\0" in name or not is_text(name):
            return None
        try:
            with os.scandir(self.path / name) as entries:
                files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
        except (OSError, ValueError):
            return None
        for beside in filter(None, [basis_beside(file) for file, _ in files]):
            with suppress(OSError):  # one that is missing is for who reads the adapter to say
                files.append((beside, (self.path / beside).stat()))
        return tuple(sorted((file, own.st_mtime_ns, own.st_size, own.st_ino) for file, own in files))

    def get(self, name: str) -> Adapter:
        """Reads it. Raises UnknownAdapterError or BrokenAdapterError."""
        if self.look(name) is None:
            raise self.unknown(name)
        try:
            return self._read(self.path / name)
        except BrokenAdapterError:
            raise
        except Exception as error:  # whatever files can do to a reader: the engine lives on
            raise BrokenAdapterError(name, f"{type(error).__name__}: {error}") from error

    def unknown(self, name: str) -> UnknownAdapterError:
        names = self.names()
        shown = ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")
        return UnknownAdapterError(name, f"; known: {shown or 'none'}")

    def forget(self, name: str) -> None:
        """Look at it again when it is asked for."""
        self._stamps.pop(name, None)

    def hold(self, name: str, stamp: Stamp | None) -> None:
        """Take what another thread has found with `look` for what a sub-folder is now."""
        if stamp is None:
            self._stamps.pop(name, None)
        else:
            self._stamps[name] = self._clock(), stamp


def is_text(name: str) -> bool:
    """Whether a file's name is UTF-8, so that requests and answers can hold it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
