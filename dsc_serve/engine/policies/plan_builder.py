"""What all policies share: the running requests go on, decoding is protected, blocks are accounted for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from dsc_serve.engine.policies.base import Plan, RequestView, StepBudget, View
from dsc_serve.engine.prefix import Prefix

QUIET_STEPS = 1.6
SHORT_MS = 6.0
LEAST_CHUNK = 8  # tokens; prompts move on however slow the steps are


class PlanBuilder:
    """A plan in the making, and what it leaves of the step's tokens, of its time and of the blocks.

    running: those that run, in order of precedence; the last is preempted first. pressed: whether blocks ran out for
    them, so that nobody may be admitted. Once somebody is, nobody is preempted any more for those that ran before.
    """

    def __init__(self, view: View, budget: StepBudget, running: Sequence[RequestView] | None = None) -> None:
        self.view, self.budget = view, budget
        self.plan = Plan()
        self.running = list(view.running if running is None else running)
        self.free, self.left = view.pool.available, budget.tokens
        self.pressed = self._admitted = False
        self._spare_ms = math.inf
        self._whole_ms = 0.0
        self._preempted: set[str] = set()
        self._given_up: Counter[int] = Counter()  # owners that blocks lose by planned preemptions

    def advance(self) -> bool:
        """Plan for those that run: single tokens, then chunks. Returns whether that preempts nobody."""
        for request in self.advance_singles():
            self.advance_chunk(request)
        return not self.pressed

    def advance_singles(self) -> list[RequestView]:
        """Plan for those that run and have one token to compute; returns those with more."""
        uncomputed = [(request, request.due) for request in self.running]
        self._advance_singles([request for request, num_uncomputed in uncomputed if num_uncomputed == 1][: self.left])
        self._protect_singles()
        return [request for request, num_uncomputed in uncomputed if num_uncomputed > 1]

    @property
    def spare_ms(self) -> float:
        """What is left of the step's time for prompts; infinite where nobody decodes, or nothing is known of steps."""
        return self._spare_ms

    def allow(self, ms: float) -> None:
        """Let the step take so much longer for prompts that it computes to their ends, and for no others."""
        self._whole_ms = ms

    def advance_chunk(self, request: RequestView) -> None:
        """Plan for one that has run until now and has more than a token to compute."""
        if request.id in self._preempted:
            return
        count = self._chunk(request.due, request.num_computed, self.left)
        if self._admitted:
            spare = max(0, self.free - len(self.running))
            layout = self.view.layout
            pages = request.pages + spare // layout.groups
            count = min(count, pages * layout.block_size - request.num_computed)
        if count:
            self._compute(request, count)

    def admit(self, request: RequestView, victims: Sequence[RequestView] = ()) -> bool:
        """Plan the first tokens of a waiting request, if it fits; victims may be preempted for it, the first one first.

        It fits when all that it will hold of its known tokens at once fits into the blocks, with one to spare for
        every running request, so that admission does not cause preemption at once.
        """
        cached = self.view.cached(request)
        num_computed = cached.tokens
        chosen = self._enough(request, cached, victims)
        if chosen is None:
            return False
        left = self.left + sum(self.plan.tokens.get(victim.id, 0) for victim in chosen)
        count = self._chunk(request.num_tokens - num_computed, num_computed, left)
        if count == 0:
            return False
        for victim in chosen:
            self._preempt(victim)
        self.free -= self._needed(request, cached, self._given_up)
        self._plan(request, count, num_computed)
        self.running.append(request)
        self._admitted = True
        return True

    def _advance_singles(self, singles: Sequence[RequestView]) -> None:
        size = self.view.layout.block_size
        full = [request for request in singles if request.num_computed % size == 0]
        needed = sum([self.view.blocks_needed(request, 1) for request in full])
        if needed > self.free:
            for request in singles:
                if request.id not in self._preempted:
                    self._compute(request, 1)
            return
        self.plan.tokens = dict.fromkeys([r.id for r in singles], 1)
        self.plan.load.singles = len(singles)
        self.free, self.left = self.free - needed, self.left - len(singles)

    def _protect_singles(self) -> None:
        estimate, load = self.budget.estimate, self.plan.load
        if estimate is None or load.singles == 0:
            return
        quiet = estimate.quiet_ms(load)
        target = self.budget.itl_target_ms or max(SHORT_MS, QUIET_STEPS * quiet)
        self._spare_ms = max(0.0, target - quiet)

    def _chunk(self, num_uncomputed: int, num_computed: int, left: int) -> int:
        """How many of the uncomputed tokens this step takes, where so many are left of its own."""
        estimate = self.budget.estimate
        if num_uncomputed == 1 or self._spare_ms == math.inf or estimate is None:
            return min(num_uncomputed, left)
        if num_uncomputed <= left and self._is_whole(num_uncomputed, num_computed):
            return num_uncomputed
        within = estimate.chunk_within(self._spare_ms, num_computed)
        least = LEAST_CHUNK if self.plan.load.tokens == 0 else 0
        return int(min(num_uncomputed, left, max(within, least)))

    def _is_whole(self, num_uncomputed: int, num_computed: int) -> bool:
        """Whether the rest of a prompt fits into what was allowed for such, with what is left of the step's time."""
        estimate = self.budget.estimate
        assert estimate is not None
        return self._whole_ms > 0 and estimate.chunk_ms(num_uncomputed, num_computed) <= self._spare_ms + self._whole_ms

    def _compute(self, request: RequestView, count: int) -> None:
        """Plan tokens of a running request; when blocks run out, preempt from the end, at last the request itself."""
        needed = self.view.blocks_needed(request, count)
        self.pressed = self.pressed or needed > self.free
        while needed > self.free and self.running[-1] is not request:
            self._preempt(self.running[-1])
        if needed > self.free:
            self._preempt(request)
            return
        self._plan(request, count, request.num_computed)
        self.free -= needed

    def _plan(self, request: RequestView, count: int, num_computed: int) -> None:
        self.plan.tokens[request.id] = count
        self.plan.load.add(count, num_computed)
        self.left -= count
        if count > 1 and self.budget.estimate is not None:
            ms = self.budget.estimate.chunk_ms(count, num_computed)
            self._whole_ms = max(0.0, self._whole_ms - max(0.0, ms - self._spare_ms))
            self._spare_ms = max(0.0, self._spare_ms - ms)

    def _preempt(self, request: RequestView) -> None:
        self.free += self._released(request, self._given_up) + self._planned_blocks(request)
        count = self.plan.tokens.pop(request.id, 0)
        if count:
            self.plan.load.add(count, request.num_computed, -1)
        self.left += count
        self.running.remove(request)
        self._preempted.add(request.id)
        self.plan.preempt.append(request.id)

    def _enough(
        self, request: RequestView, cached: Prefix, victims: Sequence[RequestView]
    ) -> Sequence[RequestView] | None:
        """As few of the victims as let a waiting request in; None when all would not do."""
        free, slots, given_up = self.free, len(self.running), self._given_up
        for chosen in range(len(victims) + 1):
            if self._needed(request, cached, given_up) + slots <= free and slots < self.budget.running:
                return victims[:chosen]
            if chosen < len(victims):
                given_up = given_up.copy() if chosen == 0 else given_up
                free += self._released(victims[chosen], given_up) + self._planned_blocks(victims[chosen])
                slots -= 1
        return None

    def _needed(self, request: RequestView, cached: Prefix, given_up: Counter[int]) -> int:
        """Blocks that a waiting request takes from the available ones."""
        owners, blocks = self.view.pool.owners, cached.blocks
        idle = sum(owners(block) == given_up[block] for block in blocks)
        return cached.most_blocks(request.num_tokens, self.budget.tokens, self.view.layout) - len(blocks) + idle

    def _released(self, request: RequestView, given_up: Counter[int]) -> int:
        """Blocks that nobody else owns once this request is preempted."""
        owners = self.view.pool.owners
        released = 0
        for block in request.blocks:
            given_up[block] += 1
            released += owners(block) == given_up[block]
        return released

    def _planned_blocks(self, request: RequestView) -> int:
        """Blocks set aside for what this step was to compute of a running request."""
        count = self.plan.tokens.get(request.id, 0)
        return self.view.blocks_needed(request, count) if count else 0
