"""Server-sent events on the wire."""

from __future__ import annotations

import asyncio
import itertools
import json
import re

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.serving import live, post_bytes

from dsc_serve.server.answer import ResponseFormatter


def exchange(app: FastAPI, request: bytes, stop: bytes) -> bytes:
    async def run() -> bytes:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await asyncio.wait_for(reader.readuntil(stop), 10)
            writer.close()
            return answer

    return asyncio.run(run())


def test_a_stream_is_framed_byte_by_byte_as_the_standard_says(app: FastAPI) -> None:
    request = post_bytes("/v1/completions", {"prompt": "hi", "stream": True, "max_tokens": 2, "model": "fake"})
    answer = exchange(app, request, b"0\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode().lower().split("\r\n")
    assert lines[0] == "http/1.1 200 ok"
    assert "content-type: text/event-stream; charset=utf-8" in lines
    assert "cache-control: no-cache" in lines
    assert "x-accel-buffering: no" in lines
    chunks = re.findall(rb"([0-9a-f]+)\r\n(.*?)\r\n(?=[0-9a-f]+\r\n)", body, re.DOTALL)
    assert all(int(size, 16) == len(data) for size, data in chunks)
    payload = b"".join(data for _, data in chunks)
    first = json.loads(payload.partition(b"\n\n")[0].removeprefix(b"data: "))
    expected = b""
    for text, reason in (("a", None), ("b", "length")):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
        event = {
            "id": first["id"],
            "created": first["created"],
            "model": "fake",
            "object": "text_completion",
            "choices": [choice],
        }
        expected += b"data: " + json.dumps(event, separators=(",", ":")).encode() + b"\n\n"
    assert payload == expected + b"data: [DONE]\n\n"


def test_an_event_leaves_as_soon_as_its_token_is_there(app: FastAPI, engine: FakeEngine) -> None:
    engine.delay_s = 0.05

    async def run() -> list[float]:
        async with live(app) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post_bytes("/v1/completions", {"prompt": "hi", "stream": True, "max_tokens": 4}))
            times = []
            for _ in range(4):
                await reader.readuntil(b"\n\n")
                times.append(asyncio.get_running_loop().time())
            writer.close()
            return times

    times = asyncio.run(run())
    assert all(later - earlier > 0.03 for earlier, later in itertools.pairwise(times))


def test_line_ends_in_the_text_do_not_break_the_events(app: FastAPI, engine: FakeEngine) -> None:
    text = "a\n\nb\r\nc\u2028d data: e\u2029\x85é\\u2028"
    engine.script = lambda prompt, params: list(text.encode())
    request = post_bytes("/v1/completions", {"prompt": "hi", "stream": True, "max_tokens": 99})
    answer = exchange(app, request, b"0\r\n\r\n").decode()
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: {")]
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == text


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/completions", {"prompt": "hi"}),
        ("/v1/completions", {"prompt": "hi", "echo": True, "stream_options": {"include_usage": True}}),
        ("/v1/completions", {"prompt": ["hi", "ho"], "stop": "z", "dsc": {}}),
        ("/v1/completions", {"prompt": "hi", "stop": "本 q end"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "dsc": {}}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": True}},
        ),
    ],
)
def test_events_filled_in_are_those_that_are_written_whole(
    app: FastAPI, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, path: str, fields: dict[str, object]
) -> None:
    text = list('é "quoted" \\ \u2028 \x00 日本 q end'.encode())
    engine.script = lambda prompt, params: [*text[:5], 256, *text[5:]]  # a special token has no text

    def events(written_whole: bool) -> list[str]:
        with monkeypatch.context() as patch:
            if written_whole:
                patch.setattr(ResponseFormatter, "is_plain", lambda self, choice: False)
            answer = exchange(
                app, post_bytes(path, {**fields, "stream": True, "max_tokens": 99}), b"0\r\n\r\n"
            ).decode()
        lines = [line for line in answer.split("\n") if line.startswith("data: ")]
        unnamed = [re.sub(r'"id":"[^"]*","created":\d+', "", line) for line in lines]
        return [re.sub(r'_ms":[0-9.]+', '_ms"', line) for line in unnamed]

    filled, whole = events(False), events(True)
    assert len(filled) > 15
    assert sorted(filled) == sorted(whole)  # several choices come in any order
    assert filled == whole or isinstance(fields.get("prompt"), list)
