"""The scheduler: who runs in the next step. Plans are pure; `begin`, `commit` and `finish` alone change state."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from types import MappingProxyType

import numpy as np

from dsc_serve.engine.deadlines import Deadlines
from dsc_serve.engine.families import Families
from dsc_serve.engine.kv_cache import HASH_BYTES, BlockPool, block_hash, hash_seed
from dsc_serve.engine.policies import Plan, Policy, StepBudget, View
from dsc_serve.engine.position import Further
from dsc_serve.engine.prefix import find_prefix
from dsc_serve.engine.queue import Accounts, WaitingQueue
from dsc_serve.engine.request import NO_BLOCKS, Request
from dsc_serve.engine.step_report import HELD_BACK, PhaseReport
from dsc_serve.engine.step_time import StepTime
from dsc_serve.kv_layout import ALL, KvLayout

NOTHING_FURTHER: Mapping[str, Further] = MappingProxyType({})
WINDOW = 256  # waiting requests, or lanes of them, that a policy looks at


class Scheduler:
    """Requests wait, run and end; each ends exactly once, through `finish`, which alone releases its blocks.

    A step is: plan = self.plan(); begin(plan); compute; commit(plan, tokens). prefix_cache: whether prompts may use
    the blocks that others have computed. clock: seconds, for deadlines and for how long somebody was overtaken.
    windows: of the groups of layers, as in `KvLayout`; blocks behind them are given back when a step is committed.
    Counted: preemptions, timeouts, the prompt_tokens of requests that looked in the prefix cache and have computed, and
    of these the cached_tokens; phases: how long requests took to be admitted, to begin and to end.
    """

    def __init__(
        self,
        policy: Policy,
        budget: StepBudget,
        pool: BlockPool,
        block_size: int,
        prefix_cache: bool = True,
        clock: Callable[[], float] = time.monotonic,
        windows: tuple[int, ...] = ALL,
    ) -> None:
        self.policy, self.budget, self.pool, self.block_size, self.clock = policy, budget, pool, block_size, clock
        self.layout = KvLayout(block_size, windows)
        self._windowed = [group for group, window in enumerate(windows) if window]
        self.running: dict[str, Request] = {}
        self.accounts = Accounts()
        self.waiting = WaitingQueue(policy.lane, lambda lane: policy.rank(lane, self.accounts))
        self.step_time = StepTime()
        self.preemptions = self.timeouts = self.prompt_tokens = self.cached_tokens = 0
        self.phases = PhaseReport()
        self._deadlines = Deadlines(lambda request: self.get(request.id) is request)
        self.families = Families()
        self.copies: list[tuple[int, int]] = []  # blocks that must be copied before the step that has begun
        self._secret = secrets.token_bytes(16) if prefix_cache else None

    def add(self, request: Request, age_s: float = 0.0) -> None:
        """Queue a request that arrived so long ago, with its siblings."""
        request.hash_seed = self._hash_seed(request)
        if request.hash_seed is not None:
            self._hash_blocks(request, request.num_tokens // self.block_size)
        for one in (request, *request.siblings):
            one.arrived = self.clock() - age_s
            one.hash_seed, one.block_hashes = request.hash_seed, list(request.block_hashes)
            self.accounts.enter(one)
            self._deadlines.add(one)
        self.families.add(request, private=self._is_private(request))
        self.waiting.push(request)

    def get(self, request_id: str) -> Request | None:
        return self.running.get(request_id) or self.waiting.get(request_id) or self.families.get(request_id)

    def plan(self) -> Plan:
        view = View(
            running=tuple(self.running.values()),
            waiting=islice(self.waiting.requests(), WINDOW),
            lanes=islice(self.waiting.lanes(), WINDOW),
            pool=self.pool,
            layout=self.layout,
            now=self.clock(),
        )
        if self.step_time.estimate is not self.budget.estimate:
            self.budget = replace(self.budget, estimate=self.step_time.estimate)
        return self.policy.plan(view, self.budget)

    def begin(self, plan: Plan) -> list[tuple[Request, int]]:
        """Preempt, admit and allocate as planned; returns the requests to run with their numbers of tokens."""
        for request_id in plan.preempt:
            request = self.running.pop(request_id)
            self._release(request)
            request.num_computed = 0
            self.waiting.push(request, front=True)
            self.preemptions += 1
        running = self.running
        tails = [tail for i in plan.tokens if i not in running if (tail := self._admit(i)) is not None]
        work = [(running[request_id], count) for request_id, count in plan.tokens.items()]
        for request, count in work:
            if request.num_computed + count > request.pages * self.block_size:
                self._extend(request, self.layout.pages(request.num_computed + count))
        self.copies = [copy for request, blocks in tails for copy in self._copies(request, blocks)]
        return self._with_drafts(work, plan) if plan.drafts else work

    def commit(
        self,
        plan: Plan,
        tokens: Mapping[str, int],
        eos: frozenset[int],
        further: Mapping[str, Further] = NOTHING_FURTHER,
    ) -> dict[str, str | None]:
        """Advance the requests of a step and append their sampled tokens, then those after drafts that proved right.

        Returns why each request that got a token, or needs none, has ended (None: it goes on). Requests that ended
        since the plan was made are passed over.
        """
        ended: dict[str, str | None] = {}
        running, size = self.running, self.block_size
        for request_id, count in plan.tokens.items():
            request = running.get(request_id)
            if request is None:
                continue
            if request.cached_tokens is None:
                self._count_hits(request)
            request.num_computed += count
            if request.num_computed % size < count and request.hash_seed is not None:
                self._publish(request, count)
            if self._windowed:
                self._give_back(request)
            token = tokens.get(request_id)
            if token is not None:
                if request.begun_at is None:
                    self._begin(request)
                    ended |= self._part(request, tokens, eos)
                request.append(token)
                ended[request_id] = reason = end_of(request, token, eos)
            elif request.num_uncomputed == 0:
                ended[request_id] = reason = "length"  # max_tokens is 0: the prompt was all that was asked for
            else:
                continue
            if reason is not None:
                self.finish(request_id)
        for request_id in plan.drafts:
            request = running.get(request_id)
            if request is not None:
                reason = self._commit_drafts(request, further.get(request_id), eos)
                if reason is not None:
                    ended[request_id] = reason
                    self.finish(request_id)
        return ended

    def finish(self, request_id: str) -> Request | None:
        """End a request, whatever its state, and release what it holds. Safe to call twice: then returns None."""
        request = self.get(request_id)
        if request is not None:
            self._make_way(request)
            self._release(request)
            request.close()
            self.accounts.leave(request)
            self.waiting.rerank(request.scheduling)
            self._deadlines.prune(len(self.running) + len(self.waiting) + len(self.families))
            if request.begun_at is not None:
                self.phases.decode.observe(self.clock() - request.begun_at)
        return request

    def expire(self) -> list[tuple[Request, str]]:
        """End the requests that are out of time; returns them with the field of theirs that says so."""
        expired = self._deadlines.due(self.clock())
        for request, _ in expired:
            self.finish(request.id)
            self.timeouts += 1
        return expired

    def held_back(self) -> dict[str, int]:
        """How many wait, by what they wait for.

        preempted: for blocks, after they have begun; running: for one of the places to run; blocks: for KV blocks, with
        the first of the queue; step: for a step with tokens to spare, or for their turn.
        """
        counts = dict.fromkeys(HELD_BACK, 0)
        new = [request for request in self.waiting.requests() if request.cached_tokens is None]
        counts["preempted"] = len(self.waiting) - len(new)
        if len(self.running) >= self.budget.running:
            counts["running"] = len(new)
        else:
            counts["blocks" if new and not self._fits(new[0]) else "step"] = len(new)
        return counts

    def fault(self) -> str | None:
        """What breaks the invariants (see `BlockPool.fault`), or None."""
        return self.pool.fault(r.blocks for r in (*self.running.values(), *self.waiting.requests()))

    def _hash_seed(self, request: Request) -> bytes | None:
        """Where the chain of a request's block hashes begins; None where nobody is to find them."""
        if self._secret is not None and not self._is_private(request):
            digest = "" if request.adapter is None else request.adapter.digest
            return hash_seed(self._secret, request.scheduling.cache_salt, digest)
        return secrets.token_bytes(HASH_BYTES) if request.siblings else None

    def _is_private(self, request: Request) -> bool:
        """Whether it neither finds what others have computed, nor leaves anything to them but its siblings."""
        return self._secret is None or request.wants_prompt_rows

    def _make_way(self, request: Request) -> None:
        """Take a request from where it stands. If siblings wait for its prompt, the first of them computes it."""
        heir = self.families.leave(request, self.pool)
        if self.running.pop(request.id, None) is not None:
            if heir is not None:
                self.waiting.push(heir, front=True)
        elif heir is not None:
            self.waiting.replace(request, heir)
        else:
            self.waiting.pop(request.id)

    def _part(self, request: Request, tokens: Mapping[str, int], eos: frozenset[int]) -> dict[str, str | None]:
        """A request's prompt is computed: its siblings go on by themselves, in the queue's front, as if preempted.

        Returns why those that got a token have ended, as `commit`.
        """
        ended: dict[str, str | None] = {}
        for sibling in reversed(self.families.part(request, self.pool, self.block_size)):
            sibling.queued_s, sibling.cached_tokens = request.queued_s, request.prompt_size - 1
            self.phases.queue.observe(sibling.queued_s)
            self.waiting.push(sibling, front=True)
            token = tokens.get(sibling.id)
            if token is not None:
                self._begin(sibling)
                sibling.append(token)
                ended[sibling.id] = reason = end_of(sibling, token, eos)
                if reason is not None:
                    self.finish(sibling.id)
        return ended

    def _admit(self, request_id: str) -> tuple[Request, Sequence[int]] | None:
        """Returns the request with the blocks that it takes its prompt's end from, where it copies them."""
        for other in self.waiting.ahead_of(request_id):
            if other.overtaken == 0:
                other.overtaken_at = self.clock()
            other.overtaken += 1
        request = self.waiting.pop(request_id)
        assert request is not None, f"{request_id} neither runs nor waits"
        if request.cached_tokens is None:
            request.queued_s = self.clock() - request.arrived
            self.phases.queue.observe(request.queued_s)
        self.accounts.charge(request)
        self.waiting.rerank(request.scheduling)
        # All are taken hold of before anything is allocated, which may evict what nobody holds.
        found = find_prefix(self.pool, request, self.layout)
        self.pool.share(found.blocks)
        request.rows = [[0] * gone + row for gone, row in zip(found.gone, found.rows, strict=True)]
        request.gone, request.num_computed = list(found.gone), found.tokens
        request.table = np.array(request.rows, dtype=np.int64)
        self.running[request_id] = request
        self._has_shared(request)
        return (request, found.tail) if found.tail else None

    def _extend(self, request: Request, pages: int) -> None:
        """Give a request blocks for so many pages in all."""
        missing = pages - request.pages
        blocks = self.pool.allocate(missing * len(request.rows))
        for group, row in enumerate(request.rows):
            row.extend(blocks[group * missing : (group + 1) * missing])
        request.table = np.array(request.rows)

    def _copies(self, request: Request, tail: Sequence[int]) -> list[tuple[int, int]]:
        page = request.num_computed // self.block_size
        return [(block, row[page]) for block, row in zip(tail, request.rows, strict=True)]

    def _give_back(self, request: Request) -> None:
        """Release the blocks that no token of a request sees any more; its table may go on naming them."""
        for group in self._windowed:
            gone, behind = request.gone[group], self.layout.behind(group, request.num_computed)
            if behind > gone:
                row = request.rows[group]
                self.pool.release(row[gone:behind])
                row[gone:behind] = [0] * (behind - gone)
                request.gone[group] = behind

    def _has_shared(self, request: Request) -> None:
        """An admitted request owns what it shares. One that computes the prompt for others has yet to leave it."""
        if not request.siblings:
            self.families.want_no_more(request, self.pool)

    def _fits(self, request: Request) -> bool:
        """Whether there are blocks to admit a waiting request, beside one to spare for each that runs."""
        found = find_prefix(self.pool, request, self.layout)
        shared = sum(self.pool.owners(block) > 0 for block in found.blocks)
        needed = found.most_blocks(request.num_tokens, self.budget.tokens, self.layout) - shared
        return needed + len(self.running) <= self.pool.available

    def _with_drafts(self, work: Sequence[tuple[Request, int]], plan: Plan) -> list[tuple[Request, int]]:
        """The requests with their planned drafts, as far as the blocks that all others leave hold them."""
        size, counts = self.block_size, {request.id: count for request, count in work}
        for request_id, planned in list(plan.drafts.items()):
            request = self.running[request_id]
            end = request.num_computed + counts[request_id]
            room = (request.pages + self.pool.available // self.layout.groups) * size - end
            request.draft(planned.tokens[:room])
            pages = self.layout.pages(end + len(request.drafts))
            if pages > request.pages:
                self._extend(request, pages)
            counts[request_id] += len(request.drafts)
            plan.drafts[request_id] = replace(planned, tokens=request.drafts)
        return [(request, counts[request.id]) for request, _ in work]

    def _commit_drafts(self, request: Request, further: Further | None, eos: frozenset[int]) -> str | None:
        """Advance a request over its drafts that proved right, and give the blocks of the others back.

        Returns why it has ended, or None.
        """
        request.drafts, reason = (), None
        tokens = () if further is None else further.tokens
        if tokens:
            request.num_computed += len(tokens)
            request.extend(tokens)
            reason = end_of(request, tokens[-1], eos)  # no draft ends a request, so that only the last token may
        if request.num_computed % self.block_size < len(tokens) and request.hash_seed is not None:
            self._publish(request, len(tokens))
        held = self.layout.pages(request.num_computed)
        if held < request.pages:
            self.pool.release([block for row in request.rows for block in row[held:]])
            for row in request.rows:
                del row[held:]
            request.table = np.array(request.rows)
        self._give_back(request)
        return reason

    def _begin(self, request: Request) -> None:
        request.begun_at = self.clock()
        self.phases.prefill.observe(request.begun_at - request.arrived - request.queued_s)

    def _count_hits(self, request: Request) -> None:
        request.cached_tokens = min(request.num_computed, request.prompt_size)
        if request.hash_seed is not None:
            self.prompt_tokens += request.prompt_size
            self.cached_tokens += request.cached_tokens

    def _publish(self, request: Request, count: int) -> None:
        """Let the blocks that the last `count` computed tokens filled be found by others."""
        full = request.num_computed // self.block_size
        self._hash_blocks(request, full)
        for i in range((request.num_computed - count) // self.block_size, full):
            for group, row in enumerate(request.rows):
                self.pool.publish(row[i], request.block_hashes[i], group)

    def _hash_blocks(self, request: Request, full: int) -> None:
        """Extend a request's block hashes to its first `full` ones."""
        assert request.hash_seed is not None
        for i in range(len(request.block_hashes), full):
            parent = request.block_hashes[-1] if request.block_hashes else request.hash_seed
            request.block_hashes.append(
                block_hash(parent, request.tokens[i * self.block_size : (i + 1) * self.block_size])
            )

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.rows, request.gone, request.table = [[]], [0], NO_BLOCKS


def end_of(request: Request, token: int, eos: frozenset[int]) -> str | None:
    """Why a request ends with its newest token, or None."""
    params = request.params
    if (token in eos and not params.ignore_eos) or token in params.stop_token_ids:
        return "stop"
    if request.constraint is not None:
        return None  # its grammar will say whether its text is whole
    return "length" if len(request.tokens) - request.prompt_size >= request.max_tokens else None
