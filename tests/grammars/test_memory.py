"""What grammars hold together, at any time."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest
from grammars.drawing import answered
from grammars.processes import children, host_of, large, quick, until

from dsc_serve.grammars import memory
from dsc_serve.grammars.follower import Grammars
from dsc_serve.grammars.memory import grown_bytes, look_pause_s, own_bytes

MIB = 2**20


class Watch:
    """Looks at what a host's grammars hold together, as often as it can. largest: bytes."""

    def __init__(self, host: int) -> None:
        self.largest, self.looks = 0, 0
        self._host, self._at_first = host, own_bytes(host)
        self._going = True
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while self._going:
            self.largest = max(self.largest, sum(grown_bytes(child, self._at_first) for child in children(self._host)))
            self.looks += 1
            time.sleep(0.001)

    def end(self) -> int:
        self._going = False
        self._thread.join()
        return self.largest


def test_many_that_grow_at_once_stay_within_the_limit_of_all_and_that_of_one(make: Callable[..., Grammars]) -> None:
    one, all_ = 96 * MIB, 96 * MIB
    grammars = make(memory_bytes=one, kept_bytes=all_, timeout_s=60.0)
    small = answered(grammars.constraint(quick("small")))
    watch = Watch(host_of(grammars))
    constraints = [grammars.constraint(large(i)) for i in range(8)]
    until(lambda: all(constraint.ready for constraint in constraints), "no answer")
    largest = watch.end()
    assert watch.looks > 10 and largest > all_ // 2, "nothing has grown"
    assert largest <= one + all_
    assert any("together take more than 96 MiB" in constraint.error for constraint in constraints)
    assert small.error == ""


@pytest.mark.parametrize("cores", [1, 2, 16])
def test_looks_come_before_all_cores_together_can_fill_what_is_left(
    monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    monkeypatch.setattr(memory.os, "cpu_count", lambda: cores)
    spare = 192 * MIB
    for room in (-MIB, 0, 10 * MIB, 512 * MIB, 10**12):
        pause = look_pause_s(room, spare)
        assert memory.SHORTEST_LOOK_S <= pause <= memory.LONGEST_LOOK_S
        assert pause * cores * memory.FILLED_BYTES_S <= max(0, room) + spare


def test_a_process_that_is_no_more_holds_nothing() -> None:
    assert grown_bytes(2**22 + 1, 0) == 0
    assert own_bytes() > 0 and grown_bytes(os.getpid(), 0) > 0
