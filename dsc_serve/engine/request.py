"""One request's state inside the engine."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsc_kernels.sketch import Signature
from dsc_serve.engine.adapter_jobs import LoadedAdapter
from dsc_serve.engine.drafts.drafting import Drafting
from dsc_serve.engine.leases import AdapterLease
from dsc_serve.engine.pooling import Pooler
from dsc_serve.engine.token_counts import TokenCounts
from dsc_serve.grammars.constraint import Constraint
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

NO_BLOCKS: NDArray[np.int64] = np.empty((1, 0), dtype=np.int64)
Collect = Callable[[int, Tensor], Tensor]  # first prompt position, its and the next ones' logits → what to keep of them
FORESIGHT = 128  # output tokens that a request is expected to take at most, before it has taken them


@dataclass(eq=False, slots=True)
class SharedPrompt:
    """A prompt that one request computes for others, too."""

    waiting: int  # requests that may still want it
    block_hashes: list[bytes]  # of blocks that are for these requests alone
    private: bool  # whether nobody else may find any of its blocks
    tail: bytes | None = None  # the hash of the block that holds its end, once it is computed


@dataclass(eq=False, slots=True)
class Request:
    """A sequence that grows until it ends: each step brings `num_computed` closer to `num_tokens`."""

    id: str
    prompt_size: int
    tokens: list[int]  # prompt and output
    params: SamplingParams
    max_tokens: int  # most output tokens, already bounded by the context
    collect: Collect | None = None
    scheduling: SchedulingParams = field(default_factory=SchedulingParams)
    pooler: Pooler | None = None  # where it asks for its prompt's vector
    lease: AdapterLease | None = None  # on its adapter, until it ends
    adapter: LoadedAdapter | None = None  # that it is computed with; None: the model as it is
    seed: int = 0
    num_computed: int = 0  # tokens that the KV cache holds
    routed: int = 0  # positions whose picks have been reported
    reported: int = 0  # prompt positions whose logits have been; recomputing after a preemption must not repeat them
    rows: list[list[int]] = field(default_factory=lambda: [[]])  # of each group of layers its KV blocks, page by page
    gone: list[int] = field(default_factory=lambda: [0])  # of each group the first pages that it has given back
    table: NDArray[np.int64] = field(default_factory=lambda: NO_BLOCKS)  # [groups, pages], any block where it is gone
    collected: list[Tensor] = field(default_factory=list)  # what `collect` or `pooler` kept
    block_hashes: list[bytes] = field(default_factory=list)  # of its full blocks, as far as they have been needed
    siblings: Sequence[Request] = ()  # other choices of its prompt, which wait until it has computed it
    leader: Request | None = None  # whose prompt it waits for
    shared: SharedPrompt | None = None  # what it has of its siblings, or they of it, while it may be wanted
    hash_seed: bytes | None = None  # what these begin with; None: it neither finds nor leaves a prefix
    cached_tokens: int | None = None  # of the prompt, from the prefix cache; None until its first step is committed
    queued_s: float = 0.0  # from its arrival to its first admission
    arrived: float = 0.0  # the clock's seconds
    begun_at: float | None = None  # the clock's seconds at its first token
    overtaken: int = 0  # requests of its lane that came later and were admitted earlier
    overtaken_at: float = 0.0  # when the first was
    charged: int = 0  # tokens that its tenant has been charged for it
    signature: NDArray[np.uint64] | None = None  # [16], atoms that its tokens pick, seen or predicted; None: not known
    seen: Signature | None = None  # of what it has picked, once it has
    constraint: Constraint | None = None  # where its output stands in the grammar that it has to follow
    held: bool = False  # it sits steps out until the grammar has answered
    drafts: Sequence[int] = ()  # what this step computes after its tokens; they may prove wrong
    drafting: Drafting | None = None  # where its drafts come from, once it has been asked for some
    token_counts_from: dict[int, TokenCounts] = field(default_factory=dict)  # by first position, for penalties
    host_bound: bool = False  # as its parameters say: see `needs_host`
    landed: tuple[int, int] | None = None  # num_computed and num_tokens without the step in flight that computes it

    def __post_init__(self) -> None:
        p = self.params
        self.seed = secrets.randbits(64) if p.seed is None else p.seed % 2**64
        penalised = bool(p.presence_penalty or p.frequency_penalty or p.repetition_penalty != 1)
        self.host_bound = penalised or p.logprobs is not None or p.routing != 0 or self.max_tokens == 0

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def pages(self) -> int:
        """Pages that it has had blocks for."""
        return len(self.rows[0])

    @property
    def blocks(self) -> list[int]:
        """The KV blocks it owns: of each group from the first page on that its layers still see."""
        if len(self.rows) == 1 and not self.gone[0]:
            return self.rows[0]
        return [block for row, gone in zip(self.rows, self.gone, strict=True) for block in row[gone:]]

    @property
    def num_uncomputed(self) -> int:
        """Tokens that the next steps compute."""
        return len(self.tokens) - self.num_computed

    @property
    def output_size(self) -> int:
        return len(self.tokens) - self.prompt_size

    @property
    def due(self) -> int:
        """Tokens that the next step may compute."""
        return 0 if self.held else len(self.tokens) - self.num_computed

    @property
    def tail(self) -> bytes | None:
        """The hash of the block that its prompt's end can be copied from."""
        return None if self.shared is None else self.shared.tail

    @property
    def has_begun(self) -> bool:
        """Whether anything of it, or of the prompt that it waits for, has been computed."""
        return self.cached_tokens is not None or (self.leader is not None and self.leader.cached_tokens is not None)

    @property
    def may_sample(self) -> bool:
        """Whether it is known which tokens may follow, and there is one, and room for it."""
        if self.constraint is None:
            return True
        full = len(self.tokens) - self.prompt_size >= self.max_tokens  # it waits to hear whether its text is whole
        return self.constraint.ready and not self.constraint.complete and not full

    @property
    def needs_host(self) -> bool:
        """Whether the host makes something of its next token before the step after that, or reports more of a step
        than the token: no step may be launched ahead of reading it."""
        if self.host_bound or self.constraint is not None or self.siblings:
            return True
        return self.reads_prompt and self.reported < self.prompt_size

    def fly(self, count: int, place: int) -> None:
        """Stand as after a step of so many tokens that a device computes. If that draws a token, `place` stands for it
        until it has been read, and the request sits out if it needs no more."""
        self.landed = self.num_computed, len(self.tokens)
        self.num_computed += count
        if self.num_computed == len(self.tokens):
            self.tokens.append(place)
            self.held = self.output_size >= self.max_tokens

    def land(self) -> None:
        """Stand as before the step in flight, which is to be committed or has come to nothing."""
        if self.landed is not None:
            self.num_computed, known = self.landed
            del self.tokens[known:]
            self.landed, self.held = None, False

    def span(self, first: int, end: int) -> list[int]:
        """The tokens at positions first … end − 1, of which the last may be drafts."""
        own, known = self.tokens[first:end], len(self.tokens)
        return own if end <= known else [*own, *self.drafts[max(0, first - known) : end - known]]

    def draft(self, tokens: Sequence[int]) -> None:
        """Let the step compute these after its own tokens."""
        self.drafts = tokens
        if self.constraint is not None:
            self.constraint.foresee(tokens)

    def append(self, token: int) -> None:
        """Take in a token of its output."""
        self.tokens.append(token)
        if self.constraint is not None:
            self.constraint.push(token)

    def extend(self, tokens: Sequence[int]) -> None:
        """Take in several tokens of its output."""
        self.tokens.extend(tokens)
        if self.constraint is not None:
            self.constraint.extend(tokens)

    def close(self) -> None:
        """It has ended. Safe to call twice."""
        self.land()
        if self.constraint is not None:
            self.constraint.close()
        if self.lease is not None:
            self.lease.release()
        if self.drafting is not None:
            self.drafting.close()

    def hold(self, lease: AdapterLease) -> None:
        """Be computed with an adapter."""
        self.lease, self.adapter = lease, lease.adapter

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
        pooled = self.pooler is not None and self.pooler.every_position
        return pooled or self.wants_prompt_logits or self.params.routing != 0

    @property
    def reads_prompt(self) -> bool:
        """Whether anything but its next token is made of the prompt's hidden states."""
        return self.pooler is not None or self.wants_prompt_logits

    @property
    def wants_prompt_logits(self) -> bool:
        return self.collect is not None or self.params.prompt_logprobs is not None
