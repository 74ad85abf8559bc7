"""Ranks that share a model: as threads of this process, each with its group, and what is left of them as processes."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from dsc_serve.model.exchange import Shard
from dsc_serve.model.group import RankGroup

T = TypeVar("T")
LIMIT_S = 60.0
FOLLOWER = b"dsc_serve.engine.ranks.follower"


def on_ranks(size: int, folder: Path, run: Callable[[RankGroup], T]) -> list[T]:
    """What each of so many ranks returns, computed at the same time, in their order. folder: an empty one."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def one(rank: int) -> None:
        group = RankGroup(Shard(rank, size), folder / "store", torch.device("cpu"), LIMIT_S)
        try:
            group.connect()
            with torch.inference_mode():
                results[rank] = run(group)
        except BaseException as error:
            errors.append(error)
        finally:
            group.close()

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * LIMIT_S)
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


def followers(parent: int) -> list[int]:
    """The processes of other ranks that a process has started."""
    children: list[int] = []
    for task in Path(f"/proc/{parent}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended since
            children += map(int, (task / "children").read_text().split())
    return [child for child in children if FOLLOWER in Path(f"/proc/{child}/cmdline").read_bytes()]


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
