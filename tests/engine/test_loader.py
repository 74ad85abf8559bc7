"""Jobs beside the steps: what they return or raise is taken, and no thread of theirs outlives them."""

from __future__ import annotations

import threading
import time

import pytest

from dsc_serve.engine.loader import Loader


def others() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "adapters"]


def test_outcomes_come_back_and_the_thread_of_a_job_ends_with_it() -> None:
    loader: Loader[int] = Loader()
    told = threading.Event()
    loader.on_done = told.set
    threads: list[threading.Thread] = []

    def job() -> int:
        threads.append(threading.current_thread())
        return len(threads)

    for count in (1, 2):
        loader.start(job)
        assert loader.busy and loader.take(5.0) == count and not loader.busy
        assert told.wait(5.0)
        told.clear()
        threads[-1].join(5.0)
        assert not threads[-1].is_alive(), "idle, it would keep OpenMP's threads"
    assert threads[0] is not threads[1] and loader.take() is None


def test_what_a_job_raises_is_an_outcome() -> None:
    loader: Loader[int] = Loader()

    def job() -> int:
        raise ValueError("no such file")

    loader.start(job)
    outcome = loader.take(5.0)
    assert isinstance(outcome, ValueError) and str(outcome) == "no such file" and not loader.busy


def test_one_job_at_a_time_which_close_waits_for() -> None:
    loader: Loader[int] = Loader()
    go, before = threading.Event(), len(others())

    def job() -> int:
        go.wait(5.0)
        time.sleep(0.05)
        return 7

    loader.start(job)
    with pytest.raises(AssertionError, match="one job at a time"):
        loader.start(job)
    assert loader.take() is None and len(others()) == before + 1
    go.set()
    loader.close()
    loader.close()
    assert len(others()) == before and loader.take() == 7
