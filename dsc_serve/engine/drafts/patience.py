"""Whether a step waits, before it is planned, to be told what a grammar forces."""

from __future__ import annotations

import time

from dsc_serve.grammars.constraint import Constraint

LONGEST_S = 0.002
SHARE = 0.25  # of the step that is expected, at most
FORGET = 0.9  # weight of a wait that is one older than another
EXPECTED_MS, EXPECTED_GAIN = 0.5, 0.3  # of waits, before there were any
PROBE = 64  # of so many waits that are not expected to pay one is tried


class Patience:
    """A grammar's answer comes a moment after the token, when the next step has been planned already, so that a run of
    forced tokens begins a step late. Waiting for it saves that step where there is such a run, and is learned to.
    """

    def __init__(self) -> None:
        self._ms, self._gain, self._passed = EXPECTED_MS, EXPECTED_GAIN, 0

    def wait(self, constraint: Constraint, step_ms: float) -> float:
        """Wait for an answer that is due, where that is expected to pay beside such a step; returns the seconds."""
        if constraint.ready or not self._pays(step_ms):
            return 0.0
        began = time.perf_counter()
        constraint.wait(lambda: constraint.ready, min(LONGEST_S, SHARE * step_ms / 1e3))
        waited_s = time.perf_counter() - began
        found = constraint.ready and bool(constraint.forced(1))
        self._ms = FORGET * self._ms + (1 - FORGET) * 1e3 * waited_s
        self._gain = FORGET * self._gain + (1 - FORGET) * found
        return waited_s

    def _pays(self, step_ms: float) -> bool:
        if self._gain * step_ms > self._ms:
            return True
        self._passed += 1
        return self._passed % PROBE == 0
