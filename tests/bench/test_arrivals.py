from __future__ import annotations

import asyncio
import itertools
import statistics
import time

import pytest

from dsc_serve.bench.load.arrivals import Pace, RequestBudget, burst_times, gamma_times, poisson, ramp_times


def test_poisson_arrivals_wait_for_no_answer_and_come_at_the_rate() -> None:
    starts: list[float] = []

    async def send(due: float) -> None:
        starts.append(due)
        await asyncio.sleep(0.3)

    begun = time.perf_counter()
    asyncio.run(poisson(send, RequestBudget(200, 60), Pace(1, rate=1000.0, seed=3)))
    assert len(starts) == 200
    assert starts == sorted(starts)
    assert 0.1 < starts[-1] - begun < 0.4, "200 requests at 1,000 a second"
    again: list[float] = []

    async def note(due: float) -> None:
        again.append(due)

    asyncio.run(poisson(note, RequestBudget(200, 60), Pace(1, rate=1000.0, seed=3)))
    gaps = [b - a for a, b in itertools.pairwise(starts)]
    assert gaps == pytest.approx([b - a for a, b in itertools.pairwise(again)], abs=1e-6)


def test_burstiness_changes_the_spread_of_gaps_and_not_their_mean() -> None:
    for burstiness in (0.25, 1.0, 4.0):
        times = itertools.islice(gamma_times(Pace(1, rate=10.0, burstiness=burstiness)), 20_000)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert statistics.mean(gaps) == pytest.approx(0.1, rel=0.05)
        assert statistics.pstdev(gaps) == pytest.approx(0.1 / burstiness**0.5, rel=0.08)


@pytest.mark.parametrize(("start", "end"), [(100.0, 300.0), (300.0, 100.0), (200.0, 200.0)])
def test_a_ramp_changes_its_rate_evenly_and_then_stays(start: float, end: float) -> None:
    pace = Pace(1, rate=start, end_rate=end, duration_s=20.0, seed=1)
    times = list(itertools.takewhile(lambda at: at < 30, ramp_times(pace)))
    for begin in range(0, 30, 5):
        middle = min(begin + 2.5, 20.0)
        expected = 5 * (start + (end - start) * middle / 20)
        assert sum(begin <= at < begin + 5 for at in times) == pytest.approx(expected, rel=0.12)


def test_bursts_come_at_once_and_together_at_the_rate() -> None:
    times = list(itertools.islice(burst_times(Pace(8, rate=100.0)), 24))
    assert times == pytest.approx([0.0] * 8 + [0.08] * 8 + [0.16] * 8)
