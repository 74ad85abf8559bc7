"""Adapters in memory: loaded on demand by a thread of their own, within a budget, held by the requests that use them.

There are no slots. A request holds a lease on an immutable object; what nobody holds goes when room is needed, the
least recently used first, and an adapter whose files have changed is another object.
"""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo, BrokenAdapterError
from dsc_serve.engine.adapter_folder import LOOK_S, AdapterFolder, Stamp
from dsc_serve.engine.adapter_jobs import AdaptedDecoder, AdapterJobs, Looked, Outcome
from dsc_serve.engine.leases import AdapterEntry, AdapterLease, Wanted, bytes_of
from dsc_serve.engine.loader import Loader
from dsc_serve.parameter_errors import ParameterError

PATIENCE_S = 1.0  # that who waits for room lets others take hold of what is in memory
LOOKED_AT = 32  # sub-folders, between two jobs that somebody waits for
KEPT_COMPOSITIONS = 16  # in memory that nobody uses: there can be any number of weights


@dataclass
class Known:
    """What is known of an adapter's files as they are now."""

    stamp: Stamp
    info: AdapterInfo | None = None
    error: str = ""


@dataclass
class AdapterCounts:
    """Since the start."""

    loads: int = 0
    evictions: int = 0
    errors: int = 0


class Adapters:
    """All of one engine, whose thread calls everything.

    budget: bytes in memory, beside the one that is being loaded. parent: what adapters are listed to adapt. surveys:
    whether all are read once while there is nothing else to load, so that a listing knows them.
    """

    def __init__(
        self,
        folder: AdapterFolder,
        decoder: AdaptedDecoder,
        budget: int,
        parent: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.budget, self.parent, self.clock = folder, budget, parent, clock
        self.jobs = AdapterJobs(folder, decoder, parent)
        self.surveys = False
        self.counts = AdapterCounts()
        self.loader: Loader[Outcome | Looked] = Loader()
        self._entries: OrderedDict[AdapterChoice, AdapterEntry] = OrderedDict()  # the least recently used first
        self._retired: list[AdapterEntry] = []  # that requests still hold
        self._known: dict[str, Known] = {}
        self._wanted: deque[Wanted] = deque()
        self._unplaced: tuple[AdapterChoice, AdapterEntry] | None = None  # loaded, and there is no room yet
        self._composing: tuple[AdapterEntry, ...] = ()  # parts of the composition that the loader makes
        self._looked = float("-inf")  # the clock's seconds, when all sub-folders were to be looked at
        self._to_look: list[str] = []  # those of them that still are
        self._released = False

    @property
    def nbytes(self) -> int:
        """In memory."""
        return bytes_of(self.held)

    @property
    def held(self) -> tuple[AdapterEntry, ...]:
        """All in memory, those among them that nobody new gets."""
        return (*self._entries.values(), *self._retired)

    @property
    def in_memory(self) -> int:
        return sum(len(choice.parts) == 1 for choice in self._entries)

    @property
    def waiting(self) -> int:
        return len(self._wanted)

    def names(self) -> Sequence[str]:
        return self.folder.names()

    def infos(self) -> list[AdapterInfo]:
        """What is known of each, as its files were last seen; whether they have changed is looked at meanwhile."""
        if self.surveys and not self._to_look and self.clock() - self._looked >= LOOK_S:
            self._looked, self._to_look = self.clock(), list(self.names())
            self._pump()
        found = []
        for name in self.names():
            known, loaded = self._known.get(name), AdapterChoice.of(name) in self._entries
            told = AdapterInfo(name=name, parent=self.parent, error="" if known is None else known.error)
            info = told if known is None or known.info is None else known.info
            found.append(msgspec.structs.replace(info, loaded=loaded))
        return found

    def want(self, choice: AdapterChoice) -> Wanted:
        """Ask for an adapter: at once, if it is in memory, else after `resolve` has found it loaded.

        Raises UnknownAdapterError, and BrokenAdapterError for one that is known to be.
        """
        for name in choice.names:
            self._check(name)
        wanted = Wanted(choice, self.clock())
        if self._is_due() or not self._grant(wanted):
            self._wanted.append(wanted)
            self._pump()
        return wanted

    def resolve(self, timeout_s: float = 0.0) -> None:
        """Take in what has been loaded, waiting for it so long, and let go on who waits."""
        outcome = self.loader.take(timeout_s) if self.loader.busy else None
        if outcome is None and not self._released and not self._is_due():
            return
        self._released = False
        if isinstance(outcome, Exception):
            raise outcome
        if outcome is not None:
            self._take(outcome)
        self._pump()
        self._released = self._released and self._unplaced is not None  # else all that went has been given on

    def survey(self) -> None:
        """Begin to read all once, and go on with it in `resolve`."""
        self.surveys = True
        self._pump()

    def cancel(self, wanted: Wanted) -> None:
        """Nobody waits for it any more."""
        wanted.cancelled = self._released = True
        if wanted.lease is not None:
            wanted.lease.release()
        elif wanted in self._wanted:
            self._wanted.remove(wanted)
            self._unpin(wanted)

    @property
    def restless(self) -> bool:
        """Whether `resolve` may find something to do without anything having been loaded."""
        return self._released and bool(self._wanted)

    def close(self) -> None:
        self.loader.close()

    def _check(self, name: str) -> None:
        """Raises where an adapter is not there, or known to be broken."""
        stamp = self.folder.stamp(name)
        if stamp is None:
            self._forget(name)
            raise self.folder.unknown(name)
        if error := self._look(name, stamp).error:
            raise BrokenAdapterError(name, error)

    def _look(self, name: str, stamp: Stamp) -> Known:
        known = self._known.get(name)
        if known is None or known.stamp != stamp:
            if known is not None:
                self._forget(name)
            known = self._known[name] = Known(stamp)
        return known

    def _forget(self, name: str) -> None:
        """Its files are others, or gone: nobody new gets what is in memory of it."""
        self._known.pop(name, None)
        for choice in [choice for choice in self._entries if name in choice.names]:
            self._retire(choice)
        if self._unplaced is not None and name in self._unplaced[0].names:
            self._drop(self._unplaced[1])
            self._unplaced = None

    def _grant(self, wanted: Wanted) -> bool:
        entry = self._entries.get(wanted.choice)
        if entry is None:
            return False
        for choice in (wanted.choice, *parts_of(wanted.choice)):
            if choice in self._entries:
                self._entries.move_to_end(choice)
        wanted.lease = AdapterLease(entry, self._release)
        self._unpin(wanted)
        return True

    def _release(self, entry: AdapterEntry) -> None:
        entry.users -= 1
        self._released = True
        if entry.retired and not entry.users:
            self._retired.remove(entry)
            self._drop(entry)
        elif entry.parts and not entry.users:
            self._forget_compositions()

    def _forget_compositions(self) -> None:
        """But for the last ones that nobody uses."""
        unused = [choice for choice, entry in self._entries.items() if entry.parts and not entry.users]
        for choice in unused[: -KEPT_COMPOSITIONS or None]:
            self._retire(choice)

    def _retire(self, choice: AdapterChoice) -> None:
        entry = self._entries.pop(choice)
        entry.retired = True
        if entry.users:
            self._retired.append(entry)
        else:
            self._drop(entry)

    def _drop(self, entry: AdapterEntry) -> None:
        """It is in memory no more: its parts need not be, for its sake."""
        parts, entry.parts = entry.parts, ()
        self._let_go(parts)

    def _is_due(self) -> bool:
        """Whether the first of those who wait has done so for too long to let others take hold of anything."""
        return bool(self._wanted) and self._unplaced is not None and self.clock() - self._wanted[0].since >= PATIENCE_S

    def _pump(self) -> None:
        """Give what is in memory to those who wait, in order; then begin the next job of the first of the others."""
        while True:
            self._place()
            self._give()
            if self.loader.busy or self._unplaced is not None:
                return None
            if not self._wanted:
                return self._survey()
            if self._begin(self._wanted[0]):
                return None

    def _give(self) -> None:
        waiting: deque[Wanted] = deque()
        while self._wanted:
            wanted = self._wanted.popleft()
            if wanted.cancelled or wanted.resolved:
                self._unpin(wanted)
            elif (waiting and self._is_due_first(waiting[0])) or not self._grant(wanted):
                waiting.append(wanted)
        self._wanted = waiting

    def _is_due_first(self, first: Wanted) -> bool:
        return self._unplaced is not None and self.clock() - first.since >= PATIENCE_S

    def _begin(self, first: Wanted) -> bool:
        """Begin what is missing of an adapter; or say that it cannot be had, and return False."""
        try:
            for name in first.choice.names:
                self._check(name)
        except ParameterError as error:
            return self._fail(first, error)
        self._unpin(first)
        for part in parts_of(first.choice):
            entry = self._entries.get(part)
            if entry is None:
                self._start_loading(part)
                return True
            entry.users += 1
            first.pins.append(entry)
        if first.choice.single:
            self._start_loading(first.choice)
        else:
            self._composing = tuple(first.pins)
            for pin in self._composing:
                pin.users += 1
            weighted = [(pin.loaded, weight) for pin, (_, weight) in zip(first.pins, first.choice.parts, strict=True)]
            self.loader.start(lambda: self.jobs.compose(first.choice, weighted))
        return True

    def _fail(self, wanted: Wanted, error: ParameterError) -> bool:
        wanted.error = error
        self._unpin(wanted)
        return False

    def _start_loading(self, choice: AdapterChoice) -> None:
        ((name, _),) = choice.parts
        self.loader.start(lambda: self.jobs.load(choice, name, ready=True))

    def _survey(self) -> None:
        """Begin what nobody waits for: to read what has not been read, or to look whether files have changed."""
        if not self.surveys:
            return
        for name in self.names():
            known = self._known.get(name)
            if known is None or (known.info is None and not known.error):
                stamp = self.folder.stamp(name)
                if stamp is not None:
                    self._look(name, stamp)
                    self.loader.start(partial(self.jobs.load, AdapterChoice.of(name), name, ready=False))
                    return
        if self._to_look:
            names, self._to_look = self._to_look[:LOOKED_AT], self._to_look[LOOKED_AT:]
            self.loader.start(lambda: self.jobs.look(names))

    def _take(self, outcome: Outcome | Looked) -> None:
        """What a job has come to."""
        if isinstance(outcome, Looked):
            for name, stamp in outcome.stamps.items():
                self.folder.hold(name, stamp)
                known = self._known.get(name)
                if known is not None and known.stamp != stamp:
                    self._forget(name)
            return
        parts, self._composing = self._composing, ()
        if not self._is_current(outcome, parts):
            self._let_go(parts)
            return  # whoever waits for it begins anew
        if outcome.error is not None:
            self.counts.errors += 1
            self._refuse(outcome.choice, outcome.error)
        if outcome.loaded is None:
            self._let_go(parts)
            return
        self.counts.loads += 1
        entry = AdapterEntry(outcome.loaded, parts)
        if (size := bytes_of([entry])) > self.budget:
            self._drop(entry)
            told = f"it takes {size} bytes; adapter_bytes, for all together, is {self.budget}"
            self._refuse(outcome.choice, BrokenAdapterError(outcome.loaded.name, told))
            return
        self._unplaced = outcome.choice, entry

    def _refuse(self, choice: AdapterChoice, error: ParameterError) -> None:
        """Tell all who wait for an adapter, or for a composition with it."""
        for wanted in self._wanted:
            if choice in (wanted.choice, *parts_of(wanted.choice)):
                wanted.error = error

    def _is_current(self, outcome: Outcome, parts: Sequence[AdapterEntry]) -> bool:
        """Whether no files that it was made of have changed since; and takes in what has been learned of them."""
        if not outcome.choice.single:
            return not any(part.retired for part in parts)
        ((name, _),) = outcome.choice.parts
        known = self._known.get(name)
        if outcome.stamp is None or known is None or known.stamp != outcome.stamp:
            self.folder.forget(name)
            return False
        known.info = outcome.info
        if isinstance(outcome.error, BrokenAdapterError):
            known.error = outcome.error.reason
        return True

    def _let_go(self, parts: Sequence[AdapterEntry]) -> None:
        for part in parts:
            self._release(part)

    def _place(self) -> None:
        """Put what has been loaded where it is found, if there is room or can be made."""
        if self._unplaced is None:
            return
        choice, entry = self._unplaced
        wanted = any(not one.cancelled and choice in (one.choice, *parts_of(one.choice)) for one in self._wanted)
        if not wanted and bytes_of((*self.held, entry)) > self.budget:  # it would push others out for nobody
            self._drop(entry)
            self._unplaced = None
            return
        first = next((one for one in self._wanted if choice in parts_of(one.choice)), None)
        beside = entry.parts or (() if first is None else first.pins)
        if bytes_of((*beside, entry)) > self.budget:
            told = f"its adapters take more than adapter_bytes, {self.budget}"
            if entry.parts:
                self._refuse(choice, BrokenAdapterError("+".join(choice.names), told))
            elif first is not None:
                self._fail(first, BrokenAdapterError("+".join(first.choice.names), told))
            self._drop(entry)
            self._unplaced = None
            return
        if self._make_room(entry):
            self._unplaced = None
            self._entries[choice] = entry

    def _make_room(self, new: AdapterEntry) -> bool:
        """Give up what nobody uses, the least recently used first, if that is enough."""
        while bytes_of((*self.held, new)) > self.budget:
            unused = next((choice for choice, entry in self._entries.items() if not entry.users), None)
            if unused is None:
                return False
            self.counts.evictions += 1
            self._retire(unused)
        return True

    def _unpin(self, wanted: Wanted) -> None:
        pins, wanted.pins = wanted.pins, []
        self._let_go(pins)


def parts_of(choice: AdapterChoice) -> list[AdapterChoice]:
    """The adapters that a composition is made of; none of one as it is."""
    return [] if choice.single else [AdapterChoice.of(name) for name in choice.names]
