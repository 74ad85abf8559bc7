"""Constrained calls of the embedded model are valid, every one of them, streamed and whole alike."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from support.running_server import RunningServer, start_server, stop_server
from support.tool_calls import CHOICES, MESSAGES, TOOLS, asked, check, streamed


@pytest.fixture(scope="module")
def exact() -> Iterator[RunningServer]:
    """In float32: in bfloat16 a prompt from the cache has logits that are rounded otherwise, and so other draws."""
    server = start_server("--dtype", "fp32")
    yield server
    assert stop_server(server) == 0


@pytest.mark.parametrize("count", [6, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize("way", CHOICES)
def test_constrained_calls_are_valid_and_streamed_as_they_are_whole(exact: RunningServer, way: str, count: int) -> None:
    with ThreadPoolExecutor(6) as pool:
        assert sum(pool.map(lambda i: check(exact.url, way, i), range(count))) == count


def test_under_auto_a_strict_tool_leaves_the_text_free(tiny: RunningServer) -> None:
    tools = [{**tool, "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    fields = {"tools": tools, "max_tokens": 12, "seed": 3, "temperature": 0}
    answer = asked(tiny.url, fields)
    assert answer["message"]["content"] and "tool_calls" not in answer["message"]
    assert streamed(tiny.url, fields)["message"]["content"] == answer["message"]["content"]


def test_chats_with_and_without_tools_share_no_more_than_their_beginning(tiny: RunningServer) -> None:
    """What the prefix cache gives to either is what their prompts have in common, token by token."""
    messages = [{"role": "system", "content": "You are a clerk of the old town hall. " * 4}, *MESSAGES]

    def tokens(**fields: Any) -> list[int]:
        found: list[int] = tiny.post("/tokenize", messages=messages, **fields).json()["tokens"]
        return found

    plain, with_tools = tokens(), tokens(tools=TOOLS)
    common = next(i for i, (a, b) in enumerate(zip(plain, with_tools, strict=False)) if a != b)
    salt = {"cache_salt": "tools", "max_tokens": 1, "messages": messages}
    cached = []
    for fields in ({}, {"tools": TOOLS}, {}, {"tools": TOOLS}):
        usage = tiny.post("/v1/chat/completions", **salt, **fields).json()["usage"]
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 and cached[1] <= common < min(cached[2:])


def test_a_result_goes_back_and_is_answered(tiny: RunningServer) -> None:
    first = asked(tiny.url, {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1})
    (call,) = first["message"]["tool_calls"]
    messages = [*MESSAGES, first["message"], {"role": "tool", "tool_call_id": call["id"], "content": "sunny"}]
    body = {"messages": messages, "tools": TOOLS, "max_tokens": 8}
    answer = httpx.post(f"{tiny.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text


def test_metrics_count_calls(tiny: RunningServer) -> None:
    name = 'dsc_serve_tool_calls_total{form="json"}'
    before = tiny.metric(name)
    assert json.loads(asked(tiny.url, CHOICES["named"])["message"]["tool_calls"][0]["function"]["arguments"])
    assert tiny.metric(name) == before + 1
