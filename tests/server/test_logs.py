"""What is logged, what never is, and what logging cannot do to the server."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.fake_engine import FakeEngine
from support.serving import app_around, ask, client_of

from dsc_serve.config import ConfigError, LogConfig
from dsc_serve.server import logs
from dsc_serve.server.keys import KeyRing
from dsc_serve.server.logs import logging_to

KEY = "alice-has-a-long-key"
SECRET = "a secret of the client's"
log = logging.getLogger("dsc_serve.test")


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def logged(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def exchange(engine: FakeEngine, tokenizer: Any, config: LogConfig) -> None:
    """A request that succeeds, one that is wrong, and one that fails in the engine."""
    app = app_around(engine, tokenizer, KeyRing("", f"alice:{KEY}"), log=config)
    headers = {"authorization": f"Bearer {KEY}", "x-request-id": "id-1"}
    with logging_to(config):
        ask(app, "POST", "/v1/completions", headers=headers, json={"prompt": SECRET, "max_tokens": 3})
        ask(app, "POST", "/v1/completions", headers=headers, json={"prompt": SECRET, SECRET: 1})
        ask(app, "GET", "/v1/models", headers={"authorization": "Bearer wrong-key"})
        engine.fail_after = 1
        ask(app, "POST", "/v1/completions", headers=headers, json={"prompt": SECRET})


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_neither_prompts_nor_keys_are_logged_unless_asked(
    engine: FakeEngine, tokenizer: Any, tmp_path: Path, log_format: Any
) -> None:
    path = tmp_path / "log"
    config = LogConfig(log_file=str(path), log_requests=True, log_level="debug", log_format=log_format)
    exchange(engine, tokenizer, config)
    text = path.read_text()
    assert text.count("/v1/completions") == 3
    assert "alice" in text and "the engine broke" in text
    assert SECRET not in text and KEY not in text and "wrong-key" not in text
    asked = LogConfig(log_file=str(tmp_path / "asked"), log_prompts=True, log_format=log_format)
    exchange(FakeEngine(), tokenizer, asked)
    text = (tmp_path / "asked").read_text()
    assert SECRET in text and KEY not in text


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_a_request_cannot_write_lines_of_its_own(
    engine: FakeEngine, tokenizer: Any, tmp_path: Path, log_format: Any
) -> None:
    path = tmp_path / "log"
    config = LogConfig(log_file=str(path), log_requests=True, log_prompts=True, log_format=log_format)
    app = app_around(engine, tokenizer, log=config)
    with logging_to(config):
        ask(app, "GET", "/%0a2026-01-01T00:00:00.000+00:00%20error%20all%20is%20lost%1b[2J%c2%85%e2%80%a8")
        ask(app, "GET", "/x%20status=200")
        ask(app, "POST", "/v1/completions", json={"prompt": "x\r\ny"}, headers={"x-request-id": "id\ttab"})
        ask(app, "POST", "/v1/completions", content="{\r\n}", headers={"content-type": "application/json"})
    *lines, end = path.read_text().split("\n")
    assert (len(lines), end) == (6, "")
    assert log_format == "json" or 'path="/x status=200"' in lines[1]
    assert all(json.loads(line) if log_format == "json" else line.isprintable() for line in lines)


def test_json_lines_tell_which_request_they_belong_to(engine: FakeEngine, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "log"
    exchange(engine, tokenizer, LogConfig(log_file=str(path), log_format="json", log_requests=True))
    lines = logged(path)
    requests = [line for line in lines if line["message"] == "request"]
    assert [line["status"] for line in requests] == [200, 400, 401, 500]
    assert [line["key"] for line in requests] == ["alice", "alice", "", "alice"]
    assert all(line["method"] in ("GET", "POST") and line["duration_ms"] > 0 for line in requests)
    failure = next(line for line in lines if "the engine broke" in line["message"])
    assert failure["request_id"] == requests[0]["request_id"] == "id-1"
    assert failure["level"] == "error"


def test_a_failure_of_the_server_is_logged_with_its_cause(
    engine: FakeEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = app_around(engine, None)
    monkeypatch.setattr(app.state.service.catalogue, "find", lambda *asked: 1 / 0)
    path = tmp_path / "log"
    with logging_to(LogConfig(log_file=str(path), log_format="json")):
        response = ask(app, "GET", "/v1/models/x", headers={"x-request-id": "id-9"})
    assert (response.status_code, response.headers["x-request-id"]) == (500, "id-9")
    (line,) = logged(path)
    assert "ZeroDivisionError" in line["exception"]
    assert line["request_id"] == "id-9"


def test_below_the_level_nothing_is_logged(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with logging_to(LogConfig(log_file=str(path), log_level="warning")):
        log.info("quiet")
        log.warning("loud")
    assert "loud" in path.read_text() and "quiet" not in path.read_text()


def test_a_file_that_cannot_be_written_is_named() -> None:
    with pytest.raises(ConfigError, match="log_file is '/nowhere/log'"), logging_to(LogConfig(log_file="/nowhere/log")):
        pass


def test_a_full_disk_costs_lines_and_says_so_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = True
    write = os.write

    def limited(descriptor: int, data: bytes) -> int:
        if full:
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", limited)
    path = tmp_path / "log"
    with logging_to(LogConfig(log_file=str(path))):
        writer = logging.getLogger("dsc_serve").handlers[-1]
        assert isinstance(writer, logs.Writer)
        for _ in range(3):
            log.warning("lost")
        until(lambda: writer._lost == 3)
        full = False
        log.warning("kept")
    assert "3 log lines were lost" in path.read_text()
    assert "kept" in path.read_text() and "lost\n" in path.read_text()


def test_a_pipe_that_nobody_reads_holds_nothing_up(monkeypatch: pytest.MonkeyPatch, engine: FakeEngine) -> None:
    monkeypatch.setattr(logs, "WAITING_LINES", 50)
    reading, writing = os.pipe()
    app = app_around(engine, None, log=LogConfig(log_requests=True))

    async def run() -> float:
        async with client_of(app) as client:
            start = time.monotonic()
            for _ in range(1000):
                assert (await client.get("/health/live", headers={"x-request-id": "x" * 128})).status_code == 200
            return time.monotonic() - start

    writer = logs.Writer(writing)
    writer.setFormatter(logs.TextFormatter())
    logger = logging.getLogger("dsc_serve")
    logger.addHandler(writer)
    logger.setLevel("INFO")
    try:
        assert asyncio.run(run()) < 60
        assert writer._lost > 0
        start = time.monotonic()
        writer.stop()
        assert time.monotonic() - start < 30
    finally:
        logger.removeHandler(writer)
        logger.setLevel(logging.NOTSET)
        os.close(reading)
        until(lambda: not writer._thread.is_alive())
        os.close(writing)
