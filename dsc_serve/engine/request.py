"""One request's state inside the engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsc_kernels.sketch import Signature
from dsc_serve.engine.token_counts import TokenCounts
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.text.grammar import Constraint

NO_BLOCKS: NDArray[np.int64] = np.empty(0, dtype=np.int64)
Collect = Callable[[int, Tensor], Tensor]  # first prompt position, its and the next ones' logits → what to keep of them
FORESIGHT = 128  # output tokens that a request is expected to take at most, before it has taken them


@dataclass(eq=False, slots=True)
class Request:
    """A sequence that grows until it ends.

    tokens: prompt and output, all that is known. computed: how many of them the KV cache holds; the next steps close
    the gap. blocks: the KV blocks it owns, in order; table: the same as an array. max_tokens: most output tokens,
    already bounded by the context. reported: prompt positions whose logits have been reported; recomputing after a
    preemption must not repeat them. routed: positions whose picks have been reported.
    names: the names of its full blocks, as far as they have been needed; root: what they begin with (None: it neither
    finds nor leaves a prefix). cached_tokens: of the prompt, found in the prefix cache; None before its first step has
    been committed. arrived: the clock's seconds at its arrival; queued_s: from then to its first admission; begun_at:
    at its first token. overtaken: requests of its lane that came later and were admitted earlier; overtaken_at: when
    the first was. charged: tokens that its tenant has been charged for it. signature: uint64 [16], a bitmap of the
    atoms that its tokens pick (hashed over all layers), seen or predicted; None while nothing is known. seen: the
    signature of what it has picked, once it has. constraint: where its output stands in the grammar that it has to
    follow, if any. tallies: by the position that they begin at, where penalties ask for them.
    """

    id: str
    prompt_size: int
    tokens: list[int]
    params: SamplingParams
    max_tokens: int
    collect: Collect | None = None
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    seed: int = 0
    num_computed: int = 0
    routed: int = 0
    reported: int = 0
    blocks: list[int] = field(default_factory=list)
    table: NDArray[np.int64] = field(default_factory=lambda: NO_BLOCKS)
    collected: list[Tensor] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    hash_seed: bytes | None = None
    cached_tokens: int | None = None
    queued_s: float = 0.0
    arrived: float = 0.0
    begun_at: float | None = None
    overtaken: int = 0
    overtaken_at: float = 0.0
    charged: int = 0
    signature: NDArray[np.uint64] | None = None
    seen: Signature | None = None
    constraint: Constraint | None = None
    token_counts_from: dict[int, TokenCounts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.seed = secrets.randbits(64) if self.params.seed is None else self.params.seed % 2**64

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_uncomputed(self) -> int:
        """Tokens known but not yet computed."""
        return len(self.tokens) - self.num_computed

    @property
    def output_size(self) -> int:
        return len(self.tokens) - self.prompt_size

    @property
    def is_complete(self) -> bool:
        """Whether the grammar allows nothing more."""
        return self.constraint is not None and self.constraint.complete(self.tokens, self.prompt_size)

    def token_counts(self, start: int) -> TokenCounts:
        """How often each token occurs from this position on."""
        if start not in self.token_counts_from:
            self.token_counts_from[start] = TokenCounts(start)
        return self.token_counts_from[start].follow(self.tokens)

    @property
    def claim(self) -> int:
        """Tokens to charge for when it is admitted: its prompt and a bounded guess at its output, but only once."""
        return 0 if self.charged else self.prompt_size + min(self.max_tokens, FORESIGHT)

    @property
    def wants_prompt_rows(self) -> bool:
        """Whether every position must be computed for the request itself."""
        return self.wants_prompt_logits or self.params.routing != 0

    @property
    def wants_prompt_logits(self) -> bool:
        return self.collect is not None or self.params.prompt_logprobs is not None
