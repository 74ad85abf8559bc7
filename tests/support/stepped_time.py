"""Time that stands still but for the seconds that each training step is said to take."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dsc_serve.train.settings import TrainingPhase
from dsc_serve.train.trainer import Trainer


class SteppedTime:
    """In the place of the trainer's `time`. seconds: what a step of a phase takes in this run."""

    def __init__(self, patch: pytest.MonkeyPatch, seconds: Callable[[Trainer, TrainingPhase], float]) -> None:
        self.now = 0.0
        step = Trainer._step

        def paced(run: Trainer, phase: TrainingPhase, factor: float) -> tuple[float, float]:
            self.now += seconds(run, phase)
            return step(run, phase, factor)

        patch.setattr(Trainer, "_step", paced)
        for module in ("clock", "study"):
            patch.setattr(f"dsc_serve.train.{module}.time", self)

    def monotonic(self) -> float:
        return self.now
