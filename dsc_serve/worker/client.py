"""The API process's side of the engine: submit requests, receive their tokens, whatever process serves them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from dsc_serve.adapter_choice import AdapterChoice, AdapterInfo
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.sampling_params import EmbeddingParams, SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.connection import EngineConnection
from dsc_serve.worker.connection import EngineDiedError as EngineDiedError
from dsc_serve.worker.messages import Delta, Finish, GrammarChecked, ModelInfo, Sibling, Stats, Submit

MAX_TRIES = 2  # a request that two engines died with may be what kills them
LATE_S = 1.0  # how much later than the engine this process ends a request that is out of time
TIMEOUTS = ("queue_timeout_s", "timeout_s")


class UnreadError(EngineDiedError):
    """A request was ended since nobody read what it had to say."""


class Mailbox:
    """What comes for one reader, in order. A queue without locks or limits: one is filled for every token."""

    def __init__(self) -> None:
        self._unread: deque[Delta | EngineDiedError] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._unread)

    def put(self, delta: Delta | EngineDiedError) -> None:
        self._unread.append(delta)
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def get(self) -> Delta | EngineDiedError:
        """The next, once there is one."""
        while not self._unread:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._unread.popleft()


@dataclass
class Pending:
    """A request that has not ended."""

    submit: Submit
    family: Family
    deltas: Mailbox = field(default_factory=Mailbox)
    begun: bool = False  # it has said something
    tries: int = 0  # engines that it was submitted to
    arrived: float = field(default_factory=time.monotonic)  # in monotonic seconds


class Family:
    """The choices of one prompt, which are submitted together once all of them are there. missing: those that are not.

    The engine computes their prompt once.
    """

    def __init__(self, size: int) -> None:
        self.missing = size
        self.members: list[Pending] = []


class EngineClient:
    """The engine as the server sees it; the supervisor attaches one connection after another to it.

    A request that has said nothing when its engine dies is submitted to the next one; any other ends with the reason.
    The time that a request has is the engine's to watch; one that hangs, or is being restarted, is not waited for.
    trouble: why the engine cannot be relied on at the moment, "" when it is well. gave_up: it will not come back.
    """

    def __init__(self, max_unread: int) -> None:
        self.trouble = "the engine is starting"
        self.gave_up = False
        self.restarts = 0
        self._max_unread = max_unread
        self._connection: EngineConnection | None = None
        self._latest: EngineConnection | None = None
        self._pending: dict[str, Pending] = {}

    @property
    def model(self) -> ModelInfo:
        """What the engine has loaded, or the last one had."""
        assert self._latest is not None, "no engine has been attached"
        return self._latest.model

    @property
    def heartbeat_age_s(self) -> float:
        """Seconds since the engine, or the last one, sent anything; it is asked every `ping_s`."""
        assert self._latest is not None, "no engine has been attached"
        return time.monotonic() - self._latest.heard

    @property
    def alive(self) -> bool:
        return self._connection is not None

    @property
    def in_flight(self) -> int:
        return len(self._pending)

    def attach(self, connection: EngineConnection) -> None:
        """Serve through this connection from now on, the requests that were kept for it first."""
        self._connection, self._latest, self.trouble = connection, connection, ""
        for family in {id(pending.family): pending.family for pending in self._pending.values()}.values():
            if not family.missing:
                self._submit(family)

    def detach(self, reason: str) -> None:
        """The connection is lost: end the requests that had begun, keep the others for the next."""
        self._connection, self.trouble = None, reason
        for request_id, pending in list(self._pending.items()):
            if pending.begun or pending.tries >= MAX_TRIES:
                self._end(request_id, EngineDiedError(reason))

    def give_up(self, reason: str) -> None:
        """No engine will be attached any more."""
        self._connection, self.trouble, self.gave_up = None, reason, True
        self.end_all(reason)

    def end_all(self, reason: str) -> None:
        """End every request with this reason."""
        for request_id in list(self._pending):
            self.finish(request_id, "abort")
            self._end(request_id, EngineDiedError(reason))

    async def generate(
        self,
        request_id: str,
        prompt: list[int],
        params: SamplingParams,
        scheduling: SchedulingParams | None = None,
        family: Family | None = None,
        embedding: EmbeddingParams | None = None,
        adapter: AdapterChoice | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Yield deltas until one has a finish reason. Leaving the iterator early ends the request in the engine.

        family: of the choices of one prompt; the others must be generated at the same time, since all wait for each
            other. embedding: where given, the prompt's vector comes with its end. adapter: of all of a family; one that
            is not known, or cannot be used, ends it with an error whose field is "adapter".
        Raises EngineDiedError when the engine is not running, or ends before the request does; UnreadError when the
        iterator was left behind.
        """
        if self._connection is None:
            raise EngineDiedError(self.trouble)
        if request_id in self._pending:
            raise ValueError(f"request id {request_id!r} is in use")
        family = family or Family(1)
        pending = self._pending[request_id] = Pending(
            Submit(request_id, prompt, params, scheduling or SchedulingParams(), embedding=embedding, adapter=adapter),
            family,
        )
        family.members.append(pending)
        timers, ended = self._timers(pending), False
        try:
            self._join(family)
            while not ended:
                # ended by the engine's finish, by its death, or by the caller's cancellation
                delta = await pending.deltas.get()
                if isinstance(delta, EngineDiedError):
                    ended = True
                    raise delta
                ended = delta.finish_reason is not None
                yield delta
        finally:
            for timer in timers:
                timer.cancel()
            self._pending.pop(request_id, None)
            if not ended:
                self.finish(request_id, "abort")

    def finish(self, request_id: str, reason: str) -> None:
        """End a request in the engine. Safe to call twice, and for a request that has already ended."""
        if self._connection is not None:
            self._connection.send(Finish(request_id, reason))

    async def check_grammar(self, asked: StructuredOutputs) -> GrammarChecked:
        """Whether a grammar can be used, once it has been compiled. Leaving early stops that.

        Raises EngineDiedError when the engine is gone, or goes.
        """
        if self._connection is None:
            raise EngineDiedError(self.trouble)
        return await self._connection.check_grammar(asked)

    async def stats(self, timeout_s: float = 1.0) -> Stats:
        """The engine's state now. Raises TimeoutError when it does not answer, EngineDiedError when it is gone."""
        if self._connection is None:
            raise EngineDiedError(self.trouble)
        return await self._connection.stats(timeout_s)

    async def adapters(self, timeout_s: float = 1.0) -> list[AdapterInfo]:
        """The adapters that the engine knows. Raises as `stats`."""
        if self._connection is None:
            raise EngineDiedError(self.trouble)
        return await self._connection.adapters(timeout_s)

    async def tenants(self, timeout_s: float = 1.0) -> TenantsReport:
        """What tenants of the model's bank have picked. Raises as `stats`."""
        if self._connection is None:
            raise EngineDiedError(self.trouble)
        return await self._connection.tenants(timeout_s)

    def take(self, delta: Delta) -> None:
        """News from the engine; those of requests that have ended are dropped."""
        pending = self._pending.get(delta.request_id)
        if pending is None:
            return
        pending.begun = True
        if len(pending.deltas) < self._max_unread:
            pending.deltas.put(delta)
            return
        self.finish(delta.request_id, "abort")
        self._end(delta.request_id, UnreadError(f"the client left {self._max_unread} steps' tokens unread"))

    def _join(self, family: Family) -> None:
        """One of the missing is there."""
        family.missing -= 1
        if not family.missing and self._connection is not None:  # else: when there is one
            self._submit(family)

    def _submit(self, family: Family) -> None:
        """Send those of a family that have not ended."""
        assert self._connection is not None
        members = [pending for pending in family.members if pending.submit.request_id in self._pending]
        if not members:
            return
        first, *others = members
        if first.tries:
            first.submit.age_s = time.monotonic() - first.arrived
        first.submit.siblings = [Sibling(one.submit.request_id, one.submit.params) for one in others]
        for pending in members:
            pending.tries += 1
        self._connection.send(first.submit)

    def _timers(self, pending: Pending) -> list[asyncio.TimerHandle]:
        limits = {name: limit for name in TIMEOUTS if (limit := getattr(pending.submit.scheduling, name)) is not None}
        later = asyncio.get_running_loop().call_later
        return [later(limit + LATE_S, self._time_out, pending, name) for name, limit in limits.items()]

    def _time_out(self, pending: Pending, name: str) -> None:
        """End a request whose time was up LATE_S ago. Only where there is no engine it is known not to have begun."""
        request_id, scheduling = pending.submit.request_id, pending.submit.scheduling
        may_have_begun = pending.begun or self._connection is not None
        if request_id in self._pending and not (name == "queue_timeout_s" and may_have_begun):
            self.finish(request_id, "abort")
            self._pending.pop(request_id).deltas.put(Delta(request_id, [], "timeout", error=scheduling.overdue(name)))

    def _end(self, request_id: str, error: EngineDiedError) -> None:
        self._pending.pop(request_id).deltas.put(error)
