"""Every tenant's adapter on every tenant's held-out text, through the serving engine: bits per byte."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsc_serve.llm import LLM
from dsc_serve.train.checkpoint import write_whole
from dsc_serve.train.corpus import Corpus
from dsc_serve.train.evaluation import TOGETHER

BASE = "base"  # of a row: no adapter
SPEED = 1000.0  # tokens a second that are expected before any were measured


@dataclass(frozen=True)
class HeldOutText:
    """Held-out windows of a text, at most length + 1 tokens each, and the bytes that they predict."""

    windows: Sequence[list[int]]
    size: int

    @property
    def tokens(self) -> int:
        return sum(len(window) - 1 for window in self.windows)


def held_out(corpus: Corpus, length: int, most: int) -> HeldOutText:
    """Of the one text of a corpus: at most so many windows, evenly spaced over all that there are."""
    (source,) = corpus.sources
    every = list(corpus.held_windows(source, length))
    count = min(most, len(every))
    chosen = [every[i * len(every) // count] for i in range(count)]
    return HeldOutText([window.tolist() for window, _ in chosen], sum(size for _, size in chosen))


@dataclass
class Rows:
    """What is measured of one kind so far, in a file that is whole after each adapter."""

    file: Path
    bits: dict[str, dict[str, float]] = field(default_factory=dict)  # by adapter and text bits per byte
    tokens: int = 0  # that it took
    seconds: float = 0.0  # likewise

    @classmethod
    def read(cls, file: Path) -> Rows:
        if not file.is_file():
            return cls(file)
        content: dict[str, Any] = json.loads(file.read_text("utf8"))
        return cls(file, content["bits"], content["tokens"], content["seconds"])

    def add(self, adapter: str, bits: dict[str, float], tokens: int, seconds: float) -> None:
        self.bits[adapter] = bits
        self.tokens, self.seconds = self.tokens + tokens, round(self.seconds + seconds, 2)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"bits": self.bits, "tokens": self.tokens, "seconds": self.seconds}
        write_whole(self.file, json.dumps(content, indent=2) + "\n")


def expected_seconds(files: Sequence[Path], tokens: int) -> float:
    """For so many tokens, by the slowest kind that was measured."""
    measured = [rows for file in files if (rows := Rows.read(file)).tokens]
    return tokens * max((rows.seconds / rows.tokens for rows in measured), default=1 / SPEED)


def measure_row(llm: LLM, adapter: str, texts: Mapping[str, HeldOutText]) -> dict[str, float]:
    """Bits per byte by text, all under one adapter."""
    found = {}
    for name, own in texts.items():
        nats = 0.0
        for start in range(0, len(own.windows), TOGETHER):
            batch = own.windows[start : start + TOGETHER]
            nats += sum(float(loss.sum()) for loss in llm.losses(batch, adapter=None if adapter == BASE else adapter))
        found[name] = round(nats / math.log(2) / own.size, 6)
    return found


def measure_rows(
    rows: Rows,
    model: Path,
    adapters: Path | None,
    names: Sequence[str],
    texts: Mapping[str, HeldOutText],
    engine: Mapping[str, Any],
    expected_s: float,
    stop_at: float | None,
) -> bool:
    """Measure the adapters of these names that are not measured yet, in `adapters`; returns whether all are.

    engine: its settings. expected_s: of the first row; none that would end after `stop_at`, a time of
    time.monotonic(), is begun.
    """
    missing = [name for name in names if name not in rows.bits]
    if not missing:
        return True
    tokens = sum(own.tokens for own in texts.values())
    with LLM(str(model), adapters="" if adapters is None else str(adapters), **engine) as llm:
        for name in missing:
            began = time.monotonic()
            if stop_at is not None and began + expected_s > stop_at:
                return False
            bits = measure_row(llm, name, texts)
            expected_s = time.monotonic() - began
            rows.add(name, bits, tokens, expected_s)
    return True
