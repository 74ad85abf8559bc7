"""Who holds which adapter in memory, and who waits for one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.engine.adapter_jobs import LoadedAdapter
from dsc_serve.parameter_errors import ParameterError


@dataclass(eq=False)
class AdapterEntry:
    """An adapter in memory."""

    loaded: LoadedAdapter
    parts: tuple[AdapterEntry, ...] = ()  # of a composition
    users: int = 0  # leases on it, compositions in memory that read it, and who is loading one
    retired: bool = False  # nobody new gets it

    @property
    def nbytes(self) -> int:
        return self.loaded.nbytes


def bytes_of(entries: Iterable[AdapterEntry]) -> int:
    """Of adapters in memory, all together: a basis counts once, however many stand on it."""
    size, bases = 0, dict[int, int]()
    for entry in entries:
        weights = entry.loaded.weights
        size += weights.nbytes
        for basis in weights.bases:
            bases[id(basis)] = basis.nbytes
    return size + sum(bases.values())


class AdapterLease:
    """A request's hold on an adapter, until it is released."""

    def __init__(self, entry: AdapterEntry, released: Callable[[AdapterEntry], None]) -> None:
        self.adapter = entry.loaded
        self._entry: AdapterEntry | None = entry
        self._released = released
        entry.users += 1

    def shared(self) -> AdapterLease:
        """One more."""
        assert self._entry is not None, "a lease that has ended"
        return AdapterLease(self._entry, self._released)

    def release(self) -> None:
        """Safe to call twice."""
        entry, self._entry = self._entry, None
        if entry is not None:
            self._released(entry)


@dataclass(eq=False)
class Wanted:
    """An adapter that somebody waits for. At last it has a lease, or an error."""

    choice: AdapterChoice
    since: float
    lease: AdapterLease | None = None
    error: ParameterError | None = None
    cancelled: bool = False
    pins: list[AdapterEntry] = field(default_factory=list)  # parts of a composition, which must stay until it is made

    @property
    def resolved(self) -> bool:
        return self.lease is not None or self.error is not None
