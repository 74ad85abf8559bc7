"""Requests on their way to the queue: they wait until their adapter is in memory, and their time already counts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsc_serve.adapter_choice import AdapterChoice, UnknownAdapterError
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine.adapter_folder import AdapterFolder
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.adapters import Adapters
from dsc_serve.engine.leases import AdapterLease, Wanted
from dsc_serve.engine.request import Request
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.decoder import Decoder
from dsc_serve.parameter_errors import ParameterError

MOMENT_S = 0.05
SPARED_S = 0.001
TIMEOUTS = ("queue_timeout_s", "timeout_s")


@dataclass(eq=False)
class Arrival:
    """The choices of one prompt, of which the first computes it."""

    members: list[Request]
    wanted: Wanted
    since: float  # the clock's seconds


class Arrivals:
    """Requests with adapters, until they have them. adapters: None where the engine has none.

    clock: seconds, by which deadlines are.
    """

    def __init__(self, adapters: Adapters | None, clock: Callable[[], float]) -> None:
        self.adapters, self._clock = adapters, clock
        self._waiting: list[Arrival] = []

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def __len__(self) -> int:
        return sum(len(arrival.members) for arrival in self._waiting)

    @property
    def names(self) -> Collection[str]:
        """Of all adapters."""
        return () if self.adapters is None else self.adapters.names()

    @property
    def restless(self) -> bool:
        """Whether a step may let some of them go on, or end."""
        if not self._waiting or self.adapters is None:
            return False
        return self.adapters.restless or any(self._late(arrival, one) for arrival, one in self._members())

    @property
    def patience_s(self) -> float | None:
        """Until the next of them is out of time; None: nobody will be."""
        left = [self._left(arrival, limit) for arrival, one in self._members() for limit in limits(one).values()]
        return max(0.0, min(left)) if left else None

    def want(self, choice: AdapterChoice) -> Wanted:
        """Raises UnknownAdapterError or BrokenAdapterError."""
        if self.adapters is None:
            raise UnknownAdapterError(choice.names[0], "; there are none: set adapters to their folder")
        return self.adapters.want(choice)

    def check(self, choices: Iterable[AdapterChoice | None], step: Callable[[], object]) -> None:
        """Load each once, taking steps until it is there. Raises UnknownAdapterError or BrokenAdapterError."""
        for choice in dict.fromkeys(choices):
            if choice is not None:
                wanted = self.want(choice)
                while not wanted.resolved:
                    step()
                    self.wait(SPARED_S)  # for the thread that loads, which needs the interpreter, too
                self.cancel(wanted)
                if wanted.error is not None:
                    raise wanted.error

    def cancel(self, wanted: Wanted) -> None:
        """Nobody waits for it any more."""
        if self.adapters is not None:
            self.adapters.cancel(wanted)

    def wait(self, timeout_s: float = MOMENT_S) -> None:
        """For a moment, until something has been loaded, if anything is being loaded."""
        if self.adapters is not None:
            self.adapters.resolve(timeout_s)

    def add(self, request: Request, wanted: Wanted, age_s: float) -> None:
        """Let a request and its siblings wait, which arrived so long ago."""
        members = [request, *request.siblings]
        request.siblings = ()
        self._waiting.append(Arrival(members, wanted, self._clock() - age_s))

    def get(self, request_id: str) -> Request | None:
        return next((one for _, one in self._members() if one.id == request_id), None)

    def finish(self, request_id: str) -> Request | None:
        """End one that waits. Safe to call twice: then returns None."""
        for arrival, one in self._members():
            if one.id == request_id:
                self._leave(arrival, one)
                return one
        return None

    def expire(self) -> list[tuple[Request, str]]:
        """End those that are out of time; returns them with the field of theirs that says so."""
        expired = []
        for arrival, one in list(self._members()):
            field = self._late(arrival, one)
            if field:
                self._leave(arrival, one)
                expired.append((one, field))
        return expired

    def take_resolved(self) -> Iterator[tuple[Request, float, ParameterError | None]]:
        """Those that have waited long enough, with their age in seconds: they have a lease, or there is an error."""
        if self.adapters is None:
            return
        self.adapters.resolve()
        if not self._waiting or not any(arrival.wanted.resolved for arrival in self._waiting):
            return
        resolved = [arrival for arrival in self._waiting if arrival.wanted.resolved]
        self._waiting = [arrival for arrival in self._waiting if not arrival.wanted.resolved]
        for arrival in resolved:
            first, *others = arrival.members
            age_s, wanted = self._clock() - arrival.since, arrival.wanted
            if wanted.lease is not None:
                hold(wanted.lease, arrival.members)
                first.siblings = others
                yield first, age_s, None
            else:
                for one in arrival.members:
                    one.close()
                    yield one, age_s, wanted.error

    def _leave(self, arrival: Arrival, request: Request) -> None:
        arrival.members.remove(request)
        request.close()
        if not arrival.members:
            self._waiting.remove(arrival)
            self.cancel(arrival.wanted)

    def _late(self, arrival: Arrival, request: Request) -> str:
        """The field of a request that says that it is out of time; "" where none does."""
        return next((name for name, limit in limits(request).items() if self._left(arrival, limit) <= 0), "")

    def _left(self, arrival: Arrival, limit_s: float) -> float:
        return arrival.since + limit_s - self._clock()

    def _members(self) -> Iterator[tuple[Arrival, Request]]:
        return ((arrival, one) for arrival in self._waiting for one in arrival.members)


def limits(request: Request) -> dict[str, float]:
    """Seconds that it may wait, by the field that says so."""
    found = {name: getattr(request.scheduling, name) for name in TIMEOUTS}
    return {name: limit for name, limit in found.items() if limit is not None}


def adapters_of(model: Decoder, config: EngineConfig) -> Adapters | None:
    """The adapters of a configuration, none of which is read yet. Raises ConfigError."""
    if not config.adapters:
        return None
    path = Path(config.adapters)
    if not path.is_dir():
        raise ConfigError(f"adapters is {config.adapters!r}, which is no folder")
    folder = AdapterFolder(path, lambda one: read_adapter(one, model.config, origin=model.origin))
    return Adapters(folder, model, config.adapter_bytes)


def count_adapters(report: AdapterReport, work: Sequence[tuple[Request, int]], known: Collection[str]) -> None:
    """Count a step in which some requests have adapters."""
    tokens: dict[str, int] = {}
    used = {request.adapter for request, _ in work if request.adapter is not None}
    for request, count in work:
        if request.adapter is not None:
            tokens[request.adapter.name] = tokens.get(request.adapter.name, 0) + count
    shared = {id(basis): basis.nbytes for adapter in used for basis in adapter.weights.bases}
    report.count_step(tokens, [adapter.read_bytes for adapter in used], known, sum(shared.values()))


def hold(lease: AdapterLease, members: list[Request]) -> None:
    """Give the choices of one prompt a lease each, of which this is the first."""
    first, *others = members
    first.hold(lease)
    for one in others:
        one.hold(lease.shared())
