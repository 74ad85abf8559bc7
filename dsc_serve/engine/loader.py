"""A thread that does one job after the other, so that steps need not wait for files."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

CLOSE_LIMIT_S = 5.0


class Loader(Generic[T]):
    """Jobs are started and their outcomes taken by one and the same other thread.

    on_done: called in the loader's thread whenever there is an outcome to take.
    """

    def __init__(self) -> None:
        self.on_done: Callable[[], None] = lambda: None
        self._jobs: queue.SimpleQueue[Callable[[], T] | None] = queue.SimpleQueue()
        self._outcomes: queue.SimpleQueue[T | Exception] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self.busy = False  # a job has been started whose outcome has not been taken

    def start(self, job: Callable[[], T]) -> None:
        """Do a job, unless one is being done."""
        assert not self.busy, "one job at a time"
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="adapters", daemon=True)
            self._thread.start()
        self.busy = True
        self._jobs.put(job)

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
            self._jobs.put(None)
            thread.join(CLOSE_LIMIT_S)

    def _work(self) -> None:
        while self._do(self._jobs.get()):
            pass  # and nothing of a job is kept

    def _do(self, job: Callable[[], T] | None) -> bool:
        """Returns whether there may be more."""
        if job is None:
            return False
        try:
            self._outcomes.put(job())
        except Exception as error:  # it is whose job it was that is told
            self._outcomes.put(error)
        self.on_done()
        return True
