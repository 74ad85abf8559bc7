"""What a policy sees and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dsc_serve.engine.kv_cache import blocks_for


class RequestView(Protocol):
    """A request as a policy may see it: its identity and its sizes in tokens."""

    @property
    def id(self) -> str: ...
    @property
    def known(self) -> int: ...
    @property
    def computed(self) -> int: ...
    @property
    def gap(self) -> int: ...
    @property
    def blocks(self) -> Sequence[int]: ...
    @property
    def signature(self) -> NDArray[np.uint64] | None:
        """uint64 [16]: a bitmap of the atoms picked; what two share is the population count of their AND."""


@dataclass(frozen=True)
class View:
    """The scheduler's state, not a copy: running requests in order of admission, waiting ones in order of arrival.

    waiting yields a bounded window of the queue.
    """

    running: Sequence[RequestView]
    waiting: Iterable[RequestView]
    free_blocks: int
    block_size: int

    def blocks_needed(self, request: RequestView, tokens: int) -> int:
        """Blocks to allocate before so many more of the request's tokens can be computed."""
        return max(0, blocks_for(request.computed + tokens, self.block_size) - len(request.blocks))


@dataclass(frozen=True)
class Budget:
    """Most tokens a step may compute, and most requests that may run at once."""

    tokens: int
    running: int


@dataclass
class Plan:
    """One step: tokens to compute per request, and before that the requests to preempt.

    A request in `tokens` that is not running yet is admitted by it.
    """

    tokens: dict[str, int] = field(default_factory=dict)
    preempt: list[str] = field(default_factory=list)


Policy = Callable[[View, Budget], Plan]
