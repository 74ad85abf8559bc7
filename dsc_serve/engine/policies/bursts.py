"""First come, first served, and prompts that come together are not kept for the sake of those that decode."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dsc_serve.engine.policies.base import Plan, RequestView, StepBudget, View
from dsc_serve.engine.policies.plan_builder import PlanBuilder

LONGEST_STEPS = 8.0  # a step is not made longer than so many without prompts,
LONGEST_MS = 50.0  # or than this, if that is more


def bursts(view: View, budget: StepBudget) -> Plan:
    """As fcfs, but a step may take longer for prompts that it computes to their ends, by `longer_ms`.

    So one prompt alone, however long, is computed as under fcfs; of many that wait together each has a share.
    """
    builder = PlanBuilder(view, budget)
    prompts = builder.advance_singles()
    waiting = list(view.waiting)
    if math.isfinite(builder.spare_ms) and not budget.itl_target_ms:
        room = max(0, budget.running - len(builder.running))  # who has none is not helped by a longer step
        able = (*prompts, *waiting[:room])
        unheard = [request for request in able if request.num_tokens <= request.prompt_size]
        builder.allow(longer_ms(view.now, unheard, builder, budget))
    for request in prompts:
        builder.advance_chunk(request)
    if not builder.pressed:
        for request in waiting:
            if not builder.admit(request):
                break
    return builder.plan


def longer_ms(now: float, unheard: Sequence[RequestView], builder: PlanBuilder, budget: StepBudget) -> float:
    """How much longer a step may take than decoding's protection says, for n requests that wait for a first token and
    not for a place.

    The least of three: what they have waited together, over the number of those that decode, so that these lose no
    more together than the others have; n − 1 times what protection leaves for prompts, so that each that waits has it;
    and what keeps the step to the longest that there may be.
    """
    singles = builder.plan.load.singles
    if not singles or len(unheard) < 2:
        return 0.0
    assert budget.estimate is not None
    waited = 1e3 * sum(max(0.0, now - request.arrived) for request in unheard)
    quiet = budget.estimate.quiet_ms(builder.plan.load)
    room = max(LONGEST_MS, LONGEST_STEPS * quiet) - quiet - builder.spare_ms
    return max(0.0, min(waited / singles, (len(unheard) - 1) * builder.spare_ms, room))
