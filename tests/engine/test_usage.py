"""Usage of late: what it tells of counts of picks that go on growing."""

from __future__ import annotations

import numpy as np
import pytest

from dsc_serve.engine.usage import PICKS_PER_ATOM, AtomUsage


def test_even_uneven_and_no_usage() -> None:
    counts = np.zeros((3, 200), dtype=np.int64)
    counts[0] = 7
    counts[1, 50] = 3
    usage = AtomUsage(counts, k=4)
    usage.advance(350)
    assert usage.shares(0) == pytest.approx((0.0, 0.01, 1.0))
    assert usage.shares(1) == pytest.approx((0.995, 1.0, 0.0))
    assert usage.shares(2) == (1.0, 0.0, 0.0)
    assert usage.picks_per_atom == 350 * 4 / 200


def test_what_is_more_than_two_windows_old_is_forgotten() -> None:
    counts = np.zeros((1, 10), dtype=np.int64)
    usage = AtomUsage(counts, k=2)
    tokens = 0
    dead = []
    for atoms in (slice(0, 10), slice(0, 5), slice(0, 5), slice(0, 5)):
        counts[0, atoms] += 1
        tokens += usage.window // 2
        usage.advance(tokens)
        dead.append(usage.shares(0)[0])
    assert dead == [0.0, 0.0, 0.0, 0.5]
    assert usage.picks_per_atom == PICKS_PER_ATOM
