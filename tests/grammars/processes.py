"""Grammars that take little or much, and the processes that they have."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from grammars.drawing import PATIENCE_S

from dsc_serve.grammars.follower import Grammars
from dsc_serve.structured_outputs import StructuredOutputs

PRIMES = [499979, 499969, 499957, 499943, 499927, 499903, 499897, 499883]


def slow(first: int = 0) -> StructuredOutputs:
    """A schema that takes minutes to compile."""
    numbers = {f"p{i}": {"type": "integer", "multipleOf": PRIMES[(first + i) % 8]} for i in range(8)}
    return StructuredOutputs(json=json.dumps({"type": "object", "title": str(first), "properties": numbers}))


def large(number: int = 0) -> StructuredOutputs:
    """A regex that takes a second to follow, and more memory than most."""
    return StructuredOutputs(regex=f"a{{{10**9 - number}}}")


def quick(name: str) -> StructuredOutputs:
    return StructuredOutputs(json=json.dumps({"type": "object", "properties": {name: {"type": "string"}}}))


def until(condition: Callable[[], bool], what: str, limit_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def host_of(grammars: Grammars) -> int:
    link = grammars._inner._link
    assert link is not None
    until(lambda: link._process is not None, "no host is there")
    return link._process.pid  # type: ignore[union-attr]
