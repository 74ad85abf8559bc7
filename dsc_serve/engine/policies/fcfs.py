"""First come, first served."""

from __future__ import annotations

from dsc_serve.engine.kv_cache import blocks_for
from dsc_serve.engine.policies.base import Budget, Plan, RequestView, View


def fcfs(view: View, budget: Budget) -> Plan:
    """Running requests first, those with one token to go before those with a chunk; then waiting ones as they came.

    When blocks run out, the request admitted last is preempted. A waiting request is admitted only when all its known
    tokens fit, with one block to spare for every running request, so that admission does not cause preemption at once.
    """
    plan = Plan()
    running = list(view.running)
    preempted: set[str] = set()
    free, left = view.free_blocks, budget.tokens

    def preempt(request: RequestView) -> None:
        nonlocal free, left
        free += len(request.blocks)
        left += plan.tokens.pop(request.id, 0)
        preempted.add(request.id)
        plan.preempt.append(request.id)

    for request in sorted(running, key=lambda r: r.gap > 1):
        count = min(request.gap, left)
        if request.id in preempted or count == 0:
            continue
        needed = view.blocks_needed(request, count)
        while needed > free and running[-1] is not request:
            last = running.pop()
            if last.id in plan.tokens:  # its blocks of this step are not its own yet
                free += view.blocks_needed(last, plan.tokens[last.id])
            preempt(last)
        if needed > free:
            running.pop()
            preempt(request)
            continue
        plan.tokens[request.id] = count
        free, left = free - needed, left - count
    if plan.preempt:
        return plan
    spare = len(running)
    for request in view.waiting:
        if left == 0 or spare >= budget.running:
            break
        if blocks_for(request.known, view.block_size) + spare > free:
            break
        count = min(request.gap, left)
        plan.tokens[request.id] = count
        free, left, spare = free - blocks_for(request.known, view.block_size), left - count, spare + 1
    return plan
