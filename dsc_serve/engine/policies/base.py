"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.drafts.drafting import DraftTokens
from dsc_serve.engine.prefix import Prefix, find_prefix
from dsc_serve.engine.step_time import Estimate, Load
from dsc_serve.kv_layout import KvLayout
from dsc_serve.scheduling_params import SchedulingParams


class RequestView(Protocol):
    """A request as a policy may see it; the fields are those of `request.Request`."""

    @property
    def id(self) -> str: ...
    @property
    def scheduling(self) -> SchedulingParams: ...
    @property
    def prompt_size(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def due(self) -> int: ...
    @property
    def pages(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...
    @property
    def tail(self) -> bytes | None: ...
    @property
    def arrived(self) -> float: ...
    @property
    def overtaken(self) -> int: ...
    @property
    def overtaken_at(self) -> float: ...
    @property
    def claim(self) -> int: ...
    @property
    def signature(self) -> NDArray[np.uint64] | None: ...
    @property
    def adapter(self) -> object | None: ...


class PoolView(Protocol):
    """The KV pool as a policy may see it."""

    @property
    def available(self) -> int: ...
    def owners(self, block: int) -> int: ...
    def find(self, digest: bytes, group: int = 0) -> int | None: ...


@dataclass(frozen=True)
class View:
    """The scheduler's state, not a copy."""

    running: Sequence[RequestView]  # in order of admission
    waiting: Iterable[RequestView]  # a bounded window of the queue, in its order
    lanes: Iterable[tuple[float, Iterable[RequestView]]]  # as many of its lanes: rank, and requests as they arrived
    pool: PoolView
    layout: KvLayout
    now: float = 0.0  # the clock's seconds

    def blocks_needed(self, request: RequestView, tokens: int) -> int:
        """Blocks to allocate before so many more of a running request's tokens can be computed."""
        layout = self.layout
        return max(0, layout.pages(request.num_computed + tokens) - request.pages) * layout.groups

    def cached(self, request: RequestView) -> Prefix:
        """What a waiting request would find in the prefix cache; its last token is computed in any case."""
        return find_prefix(self.pool, request, self.layout)


@dataclass(frozen=True)
class StepBudget:
    """What a step may hold, and how far a waiting request may be overtaken."""

    tokens: int
    running: int  # requests at once
    itl_target_ms: float = 0.0  # a step with single tokens is cut to it; 0: QUIET_STEPS quiet ones, at least SHORT_MS
    estimate: Estimate | None = None  # what steps are expected to take; None: nothing is known yet
    overtaken: int = 32  # by so many
    overtake_s: float = 2.0  # and no later than so long after the first


@dataclass
class Plan:
    """One step."""

    tokens: dict[str, int] = field(default_factory=dict)  # to compute per request; one that does not run is admitted
    preempt: list[str] = field(default_factory=list)  # before that
    load: Load = field(default_factory=Load)  # what the step computes
    drafts: dict[str, DraftTokens] = field(default_factory=dict)  # after the tokens of requests that compute all theirs

    def shorten(self, tokens: Mapping[str, int]) -> None:
        """Of these requests no more tokens, drafts among them, have been computed."""
        self.tokens.update({request_id: min(count, self.tokens[request_id]) for request_id, count in tokens.items()})

    def computed(self) -> Collection[int]:
        """How many tokens of each request the step computes, with its drafts."""
        if not self.drafts:
            return self.tokens.values()
        drafts = self.drafts
        return [n + (len(drafts[i].tokens) if i in drafts else 0) for i, n in self.tokens.items()]


class Levels(Protocol):
    """What tenants have been charged, per unit of their weight."""

    def level(self, tenant: str) -> float: ...


@dataclass(frozen=True)
class Policy:
    """Who is computed when."""

    plan: Callable[[View, StepBudget], Plan]  # a pure function
    lane: Callable[[SchedulingParams], Hashable] = lambda scheduling: 0  # where in the queue a request waits
    rank: Callable[[Hashable, Levels], float] = lambda lane, levels: 0.0  # the order of the lanes, lowest first
    by_picks: bool = False  # whether it goes by what requests pick, or are expected to
