"""The time and the steps of a run, and how far it has come."""

from __future__ import annotations

import re
import time

from dsc_serve.config import ConfigError
from dsc_serve.train.settings import TrainError

MARGIN_S = 15.0  # for the last checkpoint and the export
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def seconds(text: str) -> float:
    """A time such as "9000", "150m" or "2.5h" in seconds. Raises ConfigError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    if found is None or not float(found[1]):
        raise ConfigError(f"time limit {text!r}; expected a time such as 9000, 150m or 2.5h")
    return float(found[1]) * UNITS[found[2] or "s"]


class TrainingClock:
    """Counts the seconds of all of a run's starts.

    limit: seconds for everything, or None. `began`: the second at which training itself began; `reserve`: seconds that
    the end will take; `longest`: seconds from one step to the next, at most, so that a last one fits too. A run with a
    limit is as far as its time between these; without one, as far as its steps.
    """

    def __init__(self, limit: float | None, steps: int) -> None:
        self.limit, self.steps = limit, steps
        self.before, self.began, self.reserve, self.longest = 0.0, 0.0, 0.0, 0.0
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        return self.before + time.monotonic() - self._start

    def begin(self) -> None:
        """Training itself begins. Raises TrainError where the limit leaves no time for it."""
        self.began = self.spent
        if self.share(0) >= 1:
            raise TrainError(
                f"the time limit of {self.limit:g} s leaves none to train: preparation took "
                f"{self.spent:.0f} s, the end takes about {self.reserve + MARGIN_S:.0f} s"
            )

    def share(self, step: int) -> float:
        """The part of the run that is done before this step; 1 or more when it is over."""
        if self.limit is None:
            return step / self.steps
        room = self.limit - self.reserve - self.longest - MARGIN_S - self.began
        if room <= 0:
            return 1.0
        return (self.spent - self.began) / room if step else 0.0  # so that a run that may begin takes a step
