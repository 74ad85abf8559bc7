"""The step-time model learns what steps cost, and forgets what is no longer so."""

from __future__ import annotations

import random

import pytest

from dsc_serve.engine.step_time import Estimate, Load, StepTime

TRUE = Estimate(step=3.0, single=0.2, token=0.04, pair=1e-4)


def cost(load: Load, true: Estimate = TRUE) -> float:
    return true.quiet_ms(load) + true.token * load.tokens + true.pair * load.pairs


def load_of(rng: random.Random) -> Load:
    load = Load(singles=rng.randint(1, 64))
    if rng.random() < 0.5:
        load.add(rng.randint(2, 500), rng.randint(0, 3000))
    return load


def learned(times: int = 400, noise: float = 0.05, outliers: float = 0.0) -> StepTime:
    rng = random.Random(1)
    model = StepTime()
    for _ in range(times):
        load = load_of(rng)
        slow = 50.0 if rng.random() < outliers else 1.0
        model.observe(load, slow * cost(load) * rng.uniform(1 - noise, 1 + noise))
    return model


@pytest.mark.parametrize(("outliers", "error"), [(0.0, 0.15), (0.02, 0.4)])
def test_it_predicts_steps(outliers: float, error: float) -> None:
    estimate = learned(outliers=outliers).estimate
    assert estimate is not None
    rng = random.Random(2)
    for _ in range(50):
        load = load_of(rng)
        assert cost(load, estimate) == pytest.approx(cost(load), rel=error)


@pytest.mark.parametrize("steps", [2000, 50_000])
def test_steps_without_chunks_do_not_make_it_forget_what_chunks_cost(steps: int) -> None:
    model = learned()
    for _ in range(steps):
        model.observe(Load(singles=16), cost(Load(singles=16)))
    estimate = model.estimate
    assert estimate is not None
    assert estimate.chunk_ms(200, 1000) == pytest.approx(TRUE.chunk_ms(200, 1000), rel=0.2)


def test_it_follows_a_machine_that_becomes_slower() -> None:
    model = learned()
    for _ in range(300):
        model.observe(Load(singles=16), 3 * cost(Load(singles=16)))
    assert model.estimate is not None
    assert model.estimate.quiet_ms(Load(singles=16)) == pytest.approx(3 * cost(Load(singles=16)), rel=0.1)


@pytest.mark.parametrize("computed", [0, 100, 3000])
def test_a_chunk_takes_the_time_it_is_cut_to(computed: int) -> None:
    for estimate in (TRUE, Estimate(step=1.0, token=0.1), Estimate(step=1.0, pair=1e-4)):
        count = estimate.chunk_within(10.0, computed)
        assert count * estimate.token + estimate.pair * count * (computed + count / 2) == pytest.approx(10.0)
    assert TRUE.chunk_within(0.0, computed) == 0
    assert Estimate(step=1.0).chunk_within(1.0, computed) == float("inf")
