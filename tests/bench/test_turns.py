"""Runs that take turns: each gets slices of time and steps, all of them end, and each knows where a turn begins."""

from __future__ import annotations

from collections.abc import Generator

from dsc_serve.bench.step.turns import in_turns


def steps(name: str, seconds: float, count: int, seen: list[str]) -> Generator[float, bool | None, tuple[str, int]]:
    """Notes its name at each step, in capitals at one that begins a turn."""
    cold: bool | None = False
    for _ in range(count):
        seen.append(name.upper() if cold else name)
        cold = yield seconds
    return name, count


def test_each_takes_steps_until_its_slice_is_over() -> None:
    seen: list[str] = []
    found = in_turns([steps("a", 0.75, 5, seen), steps("b", 0.125, 10, seen)], slice_s=1.0, slice_steps=1)
    assert found == [("a", 5), ("b", 10)]
    assert "".join(seen) == "aa" + 8 * "b" + "Aa" + "Bb" + "A"


def test_a_step_longer_than_a_slice_is_a_turn() -> None:
    seen: list[str] = []
    runs = [steps("a", 1.0, 2, seen), steps("b", 1.0, 1, seen), steps("c", 1.0, 0, seen)]
    assert in_turns(runs, slice_steps=1) == [("a", 2), ("b", 1), ("c", 0)]
    assert "".join(seen) == "abA"


def test_a_turn_has_steps_enough_however_long_they_are() -> None:
    seen: list[str] = []
    in_turns([steps("a", 9.0, 5, seen), steps("b", 9.0, 4, seen)], slice_steps=3)
    assert "".join(seen) == "aaa" + "bbb" + "Aa" + "B"


def test_who_is_left_alone_begins_no_turn() -> None:
    seen: list[str] = []
    in_turns([steps("a", 1.0, 1, seen), steps("b", 1.0, 4, seen)], slice_steps=2)
    assert "".join(seen) == "a" + "bb" + "bb"
    seen.clear()
    in_turns([steps("a", 1.0, 5, seen)], slice_steps=2)
    assert "".join(seen) == "aaaaa"
