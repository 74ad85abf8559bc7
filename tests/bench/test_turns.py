"""Runs that take turns: each gets slices of time, and all of them end."""

from __future__ import annotations

from collections.abc import Generator

from dsc_serve.bench.step.turns import in_turns


def steps(name: str, seconds: float, count: int, seen: list[str]) -> Generator[float, None, tuple[str, int]]:
    for _ in range(count):
        seen.append(name)
        yield seconds
    return name, count


def test_each_takes_steps_until_its_slice_is_over() -> None:
    seen: list[str] = []
    found = in_turns([steps("a", 0.75, 5, seen), steps("b", 0.125, 10, seen)], slice_s=1.0)
    assert found == [("a", 5), ("b", 10)]
    assert "".join(seen) == "aa" + 8 * "b" + "aa" + 2 * "b" + "a"


def test_a_step_longer_than_a_slice_is_a_turn() -> None:
    seen: list[str] = []
    assert in_turns([steps("a", 1.0, 2, seen), steps("b", 1.0, 1, seen), steps("c", 1.0, 0, seen)]) == [
        ("a", 2),
        ("b", 1),
        ("c", 0),
    ]
    assert "".join(seen) == "aba"
