"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.kv_cache import blocks_for
from dsc_serve.engine.step_time import Estimate, Load
from dsc_serve.scheduling_params import SchedulingParams


class RequestView(Protocol):
    """A request as a policy may see it; the fields are those of `request.Request`."""

    @property
    def id(self) -> str: ...
    @property
    def scheduling(self) -> SchedulingParams: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_computed(self) -> int: ...
    @property
    def num_uncomputed(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...
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


class PoolView(Protocol):
    """The KV pool as a policy may see it."""

    @property
    def available(self) -> int: ...
    def owners(self, block: int) -> int: ...
    def match(self, block_hashes: Sequence[bytes]) -> list[int]: ...


@dataclass(frozen=True)
class View:
    """The scheduler's state, not a copy: running requests in order of admission, waiting ones in the queue's order.

    waiting yields a bounded window of the queue, and lanes as many of its lanes: each one's rank and its requests in
    order of arrival. now: the clock's seconds.
    """

    running: Sequence[RequestView]
    waiting: Iterable[RequestView]
    lanes: Iterable[tuple[float, Iterable[RequestView]]]
    pool: PoolView
    block_size: int
    now: float = 0.0

    def blocks_needed(self, request: RequestView, tokens: int) -> int:
        """Blocks to allocate before so many more of a running request's tokens can be computed."""
        return max(0, blocks_for(request.num_computed + tokens, self.block_size) - len(request.blocks))

    def cached(self, request: RequestView) -> list[int]:
        """The blocks that a waiting request would find in the prefix cache; its last token is computed in any case."""
        return self.pool.match(request.block_hashes[: (request.num_tokens - 1) // self.block_size])


@dataclass(frozen=True)
class StepBudget:
    """What a step may hold: tokens, and requests that run at once.

    itl_target_ms: how long a step with single tokens may take, where chunks can be cut to it; 0: QUIET_STEPS times a
    step without chunks, at least SHORT_MS. estimate: what steps are expected to take (None: nothing is known yet).
    overtaken, overtake_s: a waiting request may be overtaken by so many, and no later than so long after the first.
    """

    tokens: int
    running: int
    itl_target_ms: float = 0.0
    estimate: Estimate | None = None
    overtaken: int = 32
    overtake_s: float = 2.0


@dataclass
class Plan:
    """One step: tokens to compute per request, and before that the requests to preempt.

    A request in `tokens` that is not running yet is admitted by it. load: what the step computes.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    preempt: list[str] = field(default_factory=list)
    load: Load = field(default_factory=Load)


class Levels(Protocol):
    """What tenants have been charged, per unit of their weight."""

    def level(self, tenant: str) -> float: ...


@dataclass(frozen=True)
class Policy:
    """plan: the pure function. lane: where in the queue a request waits. rank: the order of the lanes, lowest first.

    by_picks: whether it goes by what requests pick, or are expected to.
    """

    plan: Callable[[View, StepBudget], Plan]
    lane: Callable[[SchedulingParams], Hashable] = lambda scheduling: 0
    rank: Callable[[Hashable, Levels], float] = lambda lane, levels: 0.0
    by_picks: bool = False
