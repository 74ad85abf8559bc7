"""Weighted fair sharing: over a thousand steps every busy tenant gets what its weight says."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsc_serve.engine.kv_cache import BlockPool
from dsc_serve.engine.policies import POLICIES, StepBudget
from dsc_serve.engine.request import Request
from dsc_serve.engine.scheduler import Scheduler
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams

Tenant = tuple[float, int, int]
STEPS = 1000
TENANTS = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 2.0, 3.0]), st.integers(1, 60), st.integers(1, 60)), min_size=2, max_size=4
)


def tokens_served(policy: str, tenants: list[Tenant], running: int, step_tokens: int, seed: int) -> list[int]:
    """Prompt and output tokens of each tenant in STEPS steps, all of them having requests waiting all the time.

    tenants: weight, longest prompt and longest output of each.
    """
    rng = random.Random(seed)
    scheduler = Scheduler(POLICIES[policy], StepBudget(step_tokens, running), BlockPool(4000), 8)
    served: Counter[str] = Counter()
    sent: Counter[str] = Counter()
    owner: dict[str, int] = {}
    for _ in range(STEPS):
        for tenant, (weight, prompt, output) in enumerate(tenants):
            while sent[str(tenant)] < 2 * running:
                sent[str(tenant)] += 1
                name = str(len(owner))
                owner[name] = tenant
                tokens = [rng.randrange(99) for _ in range(rng.randint(1, prompt))]
                most = rng.randint(1, output)
                scheduling = SchedulingParams(tenant=str(tenant), weight=weight)
                scheduler.add(Request(name, len(tokens), tokens, SamplingParams(), most, scheduling=scheduling))
        plan = scheduler.plan()
        work = scheduler.begin(plan)
        tokens_now = {r.id: rng.randrange(99) for r, count in work if r.num_computed + count == r.num_tokens}
        for request, count in work:
            prompt = min(count, max(0, request.prompt_size - request.num_computed))
            served[request.scheduling.tenant] += prompt + (request.id in tokens_now)
        for name, reason in scheduler.commit(plan, tokens_now, frozenset()).items():
            if reason is not None:
                sent[str(owner[name])] -= 1
    return [served[str(tenant)] for tenant in range(len(tenants))]


@settings(max_examples=12, deadline=None)
@given(tenants=TENANTS, running=st.integers(2, 12), step_tokens=st.integers(16, 80), seed=st.integers(0, 99))
def test_busy_tenants_get_their_shares(tenants: list[Tenant], running: int, step_tokens: int, seed: int) -> None:
    tokens = tokens_served("fair", tenants, running, step_tokens, seed)
    total = sum(weight for weight, _, _ in tenants)
    for (weight, _, _), own in zip(tenants, tokens, strict=True):
        assert own / sum(tokens) == pytest.approx(weight / total, abs=0.02)


def test_first_come_first_served_is_not_fair() -> None:
    heavy, light = tokens_served("fcfs", [(1.0, 60, 60), (1.0, 5, 5)], 8, 64, 0)
    assert heavy > 3 * light
