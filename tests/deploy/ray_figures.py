"""What Ray Serve costs and two replicas give on this machine, beside one server; prints the table of docs/scale.md.

Run as `python tests/deploy/ray_figures.py`, with PYTHONPATH=tests.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from support.ray_cluster import Cluster
from support.running_server import start_server, stop_server
from support.streams import Stream

from dsc_serve.scale.call import placement_key
from dsc_serve.scale.placement import Bound, PrefixMemory, Ring, order

STREAMS, TOKENS, REPEATS = 32, 64, 3


async def tokens_per_s(url: str) -> float:
    start = time.monotonic()
    streams = [Stream({"prompt": f"Chapter {i}", "max_tokens": TOKENS, "user": f"user {i}"}) for i in range(STREAMS)]
    await asyncio.gather(*(stream.run(url) for stream in streams))
    assert all(stream.finished for stream in streams), {stream.error for stream in streams}
    return STREAMS * TOKENS / (time.monotonic() - start)


def seconds(processes: list[psutil.Process]) -> float:
    times = [process.cpu_times() for process in processes]
    return sum(spent.user + spent.system for spent in times)


def choice_us(replicas: int) -> float:
    """Microseconds to choose among so many, for a prompt of 4 kB whose beginning one of them holds."""
    loads = {f"replica-{i}": i % 7 for i in range(replicas)}
    ring, memory = Ring(loads), PrefixMemory()
    body = json.dumps({"prompt": "Once upon a time " * 250, "user": "ada"}).encode()
    memory.record(placement_key("", body).chain, "replica-0")
    start = time.perf_counter()
    for _ in range(200):
        placement = placement_key("", body)
        order(placement, ring, memory.holders(placement.chain, loads), loads, Bound())
    return 1e6 * (time.perf_counter() - start) / 200


def main() -> None:
    for replicas in (2, 100, 1000):
        print(f"a choice among {replicas:<13} {choice_us(replicas):7.0f} µs")
    cluster = Cluster(Path(tempfile.mkdtemp()))
    alone = {threads: start_server("--threads", str(threads)) for threads in (1, 2)}
    try:
        cluster.configure({}, import_path="dsc_serve.scale.app:build")
        urls = {f"one server, {threads} threads": server.url for threads, server in alone.items()}
        urls["Ray, 2 replicas of 1 thread"] = cluster.url
        rates: dict[str, list[float]] = {name: [] for name in urls}
        parts = {
            "door": cluster.serving("door"),
            "proxy": [p for p in cluster.processes() if p.name().startswith("ray::ProxyActor")],
            "replicas": cluster.serving("replica"),
        }
        for url in urls.values():
            asyncio.run(tokens_per_s(url))
        before = {name: seconds(processes) for name, processes in parts.items()}
        for _ in range(REPEATS):
            for name, url in urls.items():
                rates[name].append(asyncio.run(tokens_per_s(url)))
        for name, found in rates.items():
            print(f"{name:<28} {statistics.median(found):7.0f} tokens/s, median of {REPEATS}")
        for name, processes in parts.items():
            spent = (seconds(processes) - before[name]) / (REPEATS * STREAMS * TOKENS)
            print(f"{name:<28} {1e6 * spent:7.0f} µs of a core per token")
    finally:
        cluster.stop()
        for server in alone.values():
            stop_server(server)


if __name__ == "__main__":
    main()
