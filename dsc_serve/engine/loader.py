"""Jobs beside the steps, one after the other, so that steps need not wait for files."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

CLOSE_LIMIT_S = 5.0


class Loader(Generic[T]):
    """Jobs are started and their outcomes taken by one and the same thread; each is done in a thread of its own.

    A thread that has computed in parallel keeps OpenMP's threads for as long as it lives, and while there are more of
    these than processors, those of the steps sleep instead of waiting at each barrier.

    on_done: called in the job's thread whenever there is an outcome to take.
    """

    def __init__(self) -> None:
        self.on_done: Callable[[], None] = lambda: None
        self._outcomes: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False  # a job has been started whose outcome has not been taken

    def start(self, job: Callable[[], T]) -> None:
        """Do a job, unless one is being done."""
        assert not self.busy, "one job at a time"
        self.busy = True
        self._thread = threading.Thread(target=self._do, args=(job,), name="adapters", daemon=True)
        self._thread.start()

    def take(self, timeout_s: float = 0.0) -> T | Exception | None:
        """What a job returned, or raised; None where there is nothing yet, after waiting for it for so long."""
        try:
            outcome = self._outcomes.get(block=timeout_s > 0, timeout=timeout_s or None)
        except queue.Empty:
            return None
        self.busy = False
        return outcome

    def close(self) -> None:
        """Wait for the job that is being done, within a limit. Safe to call twice."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(CLOSE_LIMIT_S)

    def _do(self, job: Callable[[], T]) -> None:
        try:
            self._outcomes.put(job())
        except Exception as error:  # it is whose job it was that is told
            self._outcomes.put(error)
        self.on_done()
