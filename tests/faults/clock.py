"""A wall clock that jumps: SIGUSR1 a day ahead, SIGUSR2 a day back, of where it really is."""

from __future__ import annotations

import signal
import time

DAY_S = 24 * 3600.0


def let_the_clock_jump() -> None:
    real, offset = time.time, 0.0

    def jump(number: int, _: object) -> None:
        nonlocal offset
        offset = DAY_S if number == signal.SIGUSR1 else -DAY_S

    time.time = lambda: real() + offset
    time.time_ns = lambda: int((real() + offset) * 1e9)
    signal.signal(signal.SIGUSR1, jump)
    signal.signal(signal.SIGUSR2, jump)
