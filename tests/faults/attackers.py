"""Clients that send grammars which are dear to compile or to follow: `python attackers.py URL SECONDS CLIENTS`.

Prints one JSON list of [kind, status, seconds] for each request that was answered.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

import httpx

PRIMES = [499979, 499969, 499957, 499943, 499927, 499903, 499897, 499883, 499853, 499847, 499819, 499801, 499787]


def primes(draw: random.Random) -> dict[str, Any]:
    numbers = {f"p{i}": {"type": "integer", "multipleOf": p} for i, p in enumerate(draw.sample(PRIMES, 8))}
    return {"json": {"type": "object", "properties": numbers}}


def intersections(draw: random.Random) -> dict[str, Any]:
    rules = " & ".join(f"/(.{{{p}}})*/" for p in draw.sample([2, 3, 5, 7, 11, 13, 17, 19], 8))
    return {"grammar": f"start: TEXT\nTEXT: {rules}\n// {draw.random()}"}


def half_a_second(draw: random.Random) -> dict[str, Any]:
    return {"json": {"type": "integer", "multipleOf": draw.choice(PRIMES) - 2 * draw.randrange(1000)}}


def regex(draw: random.Random) -> dict[str, Any]:
    return {"regex": f"a{{{10**9 - draw.randrange(10**6)}}}"}


def choice(draw: random.Random) -> dict[str, Any]:
    return {"choice": [draw.choice("xyz") * (131000 - draw.randrange(1000))]}


def blank_lines(draw: random.Random) -> dict[str, Any]:
    return {"grammar": 'root ::= "a"' + "\n" * (32000 - draw.randrange(1000))}


def nested(draw: random.Random) -> dict[str, Any]:
    depth = draw.randrange(300, 400)
    return {"json": '{"type":"array","items":' * depth + "{}" + "}" * depth}


def repetitions(draw: random.Random) -> dict[str, Any]:
    a, b, c = (draw.randrange(20, 60) for _ in range(3))
    return {"json": {"type": "string", "pattern": f"^((a{{1,{a}}}b{{1,{b}}}){{1,{c}}}c?){{1,500}}$"}}


KINDS: list[Callable[[random.Random], dict[str, Any]]] = [
    primes,
    intersections,
    half_a_second,
    regex,
    choice,
    blank_lines,
    nested,
    repetitions,
]


async def attack(client: httpx.AsyncClient, url: str, end: float, number: int, answers: list[Any]) -> None:
    draw = random.Random(number)
    turn = number
    while time.monotonic() < end:
        kind = KINDS[turn % len(KINDS)]
        turn += 1
        body = {"prompt": "x", "max_tokens": 4, "structured_outputs": kind(draw)}
        begun = time.monotonic()
        response = await client.post(f"{url}/v1/completions", json=body, timeout=60)
        answers.append([kind.__name__, response.status_code, time.monotonic() - begun, response.text[:200]])


async def main(url: str, seconds: float, clients: int) -> None:
    answers: list[Any] = []
    end = time.monotonic() + seconds
    async with httpx.AsyncClient() as client:
        await asyncio.gather(*(attack(client, url, end, number, answers) for number in range(clients)))
    print(json.dumps(answers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3])))
