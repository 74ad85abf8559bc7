"""What every part shares. DRY=1: tiny sizes on the CPU, so that mistakes are found before a device's time is spent."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

DRY = os.environ.get("DRY") == "1"
CPU = torch.device("cpu")
DEVICE = CPU if DRY else torch.device("cuda", 0)
REPO = Path(__file__).parents[3]
OUT = Path(os.environ.get("OUT") or "build/first-run")
LIMIT_S = float(os.environ.get("PART_S", "1e9"))  # a part stops by itself before its limit
RESULTS: dict = {}

_began = time.monotonic()


def left_s() -> float:
    return LIMIT_S - (time.monotonic() - _began)


def say(*words: object) -> None:
    print(f"[{time.monotonic() - _began:6.1f}s]", *words, flush=True)


def save(name: str) -> None:
    (OUT / f"{name}.json").write_text(json.dumps(RESULTS, indent=1, default=str), encoding="utf-8")


def sync() -> None:
    if not DRY:
        torch.cuda.synchronize()


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative norm in float64; infinite where anything is not a number."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return error if error == error else float("inf")


def graph(work: Callable[[], object]) -> Callable[[], object]:
    """What replays the work, captured once."""
    if DRY:
        work()
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
        work()
    torch.cuda.current_stream().wait_stream(stream)
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made, stream=stream):
        work()
    return made.replay


def time_us(run: Callable[[], object], pieces: int = 1, repeats: int = 9) -> float:
    """Median microseconds of one of the pieces of work in run(): device events round several runs. Dry: 0."""
    run()
    if DRY:
        return 0.0
    torch.cuda.synchronize()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def elapsed_ms(times: int) -> float:
        begin.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    times = max(1, min(20, int(2.0 / max(elapsed_ms(1), 1e-3))))
    return statistics.median(elapsed_ms(times) * 1e3 / times / pieces for _ in range(repeats))


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    cells = [list(head), *([f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    print(f"\n{title}")
    for row in cells:
        print(
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
        )
