"""The scheduler: who runs in the next step. Plans are pure; `begin`, `commit` and `finish` alone change state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from itertools import islice

import numpy as np

from dsc_serve.engine.kv_cache import BlockPool
from dsc_serve.engine.policies import Budget, Plan, Policy, View
from dsc_serve.engine.request import NO_BLOCKS, Request

WINDOW = 256  # waiting requests that a policy looks at


class Scheduler:
    """Requests wait, run and end; each ends exactly once, through `finish`, which alone releases its blocks.

    A step is: plan = self.plan(); begin(plan); compute; commit(plan, tokens).
    """

    def __init__(self, policy: Policy, budget: Budget, pool: BlockPool, block_size: int) -> None:
        self.policy, self.budget, self.pool, self.block_size = policy, budget, pool, block_size
        self.running: dict[str, Request] = {}
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.preemptions = 0

    def add(self, request: Request) -> None:
        self.waiting[request.id] = request

    def get(self, request_id: str) -> Request | None:
        return self.running.get(request_id) or self.waiting.get(request_id)

    def plan(self) -> Plan:
        view = View(
            running=tuple(self.running.values()),
            waiting=islice(self.waiting.values(), WINDOW),
            free_blocks=self.pool.free,
            block_size=self.block_size,
        )
        return self.policy(view, self.budget)

    def begin(self, plan: Plan) -> list[tuple[Request, int]]:
        """Preempt, admit and allocate as planned; returns the requests to run with their numbers of tokens."""
        for request_id in plan.preempt:
            request = self.running.pop(request_id)
            self._release(request)
            request.computed = 0
            self.waiting[request_id] = request
            self.waiting.move_to_end(request_id, last=False)
            self.preemptions += 1
        work = []
        for request_id, count in plan.tokens.items():
            admitted = self.waiting.pop(request_id, None)
            if admitted is not None:
                self.running[request_id] = admitted
            request = self.running[request_id]
            missing = -(-(request.computed + count) // self.block_size) - len(request.blocks)
            if missing > 0:
                request.blocks.extend(self.pool.allocate(missing))
                request.table = np.array(request.blocks)
            work.append((request, count))
        return work

    def commit(self, plan: Plan, tokens: Mapping[str, int], eos: frozenset[int]) -> dict[str, str | None]:
        """Advance the requests of a step and append their sampled tokens.

        Returns why each request that got a token, or needs none, has ended (None: it goes on). Requests that ended
        since the plan was made are passed over.
        """
        ended: dict[str, str | None] = {}
        for request_id, count in plan.tokens.items():
            request = self.running.get(request_id)
            if request is None:
                continue
            request.computed += count
            if request_id in tokens:
                request.tokens.append(tokens[request_id])
                ended[request_id] = self._end_of(request, eos)
            elif request.gap == 0:
                ended[request_id] = "length"  # max_tokens is 0: the prompt was all that was asked for
            if ended.get(request_id):
                self.finish(request_id)
        return ended

    def finish(self, request_id: str) -> Request | None:
        """End a request, whatever its state, and release what it holds. Safe to call twice: then returns None."""
        request = self.running.pop(request_id, None) or self.waiting.pop(request_id, None)
        if request is not None:
            self._release(request)
        return request

    def fault(self) -> str | None:
        """What breaks the invariants (see `BlockPool.fault`), or None."""
        owners = [*self.running.values(), *self.waiting.values()]
        return self.pool.fault(r.blocks for r in owners)

    def _end_of(self, request: Request, eos: frozenset[int]) -> str | None:
        token, params = request.tokens[-1], request.params
        if (token in eos and not params.ignore_eos) or token in params.stop_token_ids or request.is_complete:
            return "stop"
        return "length" if request.output_size >= request.max_tokens else None

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks, request.table = [], NO_BLOCKS
