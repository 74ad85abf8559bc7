from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from click.testing import CliRunner

from dsc_serve.bench.load.command import serve_command
from dsc_serve.bench.load.generator import LoadConfig

Serve = Callable[..., Any]


def test_the_command_prints_a_table_and_writes_json(serve: Serve, tmp_path: Path) -> None:
    server = serve()
    file, records = tmp_path / "result.json", tmp_path / "requests.jsonl"
    options = ["--requests", "4", "--concurrency", "2", "--prompt-tokens", "3", "--goodput", "ttft:60000"]
    options += ["--json", str(file), "--records", str(records)]
    result = CliRunner().invoke(serve_command, [server.url, *options])
    assert result.exit_code == 0, result.output
    assert "fake-model at http://127.0.0.1" in result.output and "time to first token" in result.output
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["completed"] == 4 and written["config"]["prompt_tokens"] == "3"
    assert written["request_goodput"] == written["request_throughput"]
    lines = [json.loads(line) for line in records.read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 4 and lines[0]["start_s"] == 0 and all(line["output_tokens"] == 4 for line in lines)
    assert [line["start_s"] for line in lines] == sorted(line["start_s"] for line in lines)
    assert len(server.exchanges) == 4 + 2


def test_every_setting_has_an_option_with_the_same_default() -> None:
    parsed = serve_command.make_context("serve", ["http://x"]).params
    helps = {option.name: getattr(option, "help", None) for option in serve_command.params}
    for field in msgspec.structs.fields(LoadConfig):
        if field.name != "url":
            assert parsed[field.name] == field.default
            assert helps[field.name]


def test_a_run_without_success_ends_with_status_1(serve: Serve) -> None:
    async def refuse(exchange: Any) -> None:
        await exchange.answer("503 Service Unavailable", {"error": {"message": "starting"}})

    result = CliRunner().invoke(serve_command, [serve(refuse).url, "--requests", "2"])
    assert result.exit_code == 1
    assert "Every request failed:" in result.output and "2 × HTTP 503: starting" in result.output


def test_errors_are_one_line_without_a_traceback() -> None:
    for arguments, message in (
        (["nonsense"], "Error: url is 'nonsense'"),
        (["http://127.0.0.1:1"], "Error: http://127.0.0.1:1 does not answer GET /v1/models"),
        (["http://127.0.0.1:1", "--concurrency", "0"], "Error: concurrency is 0; it must be at least 1"),
    ):
        result = CliRunner().invoke(serve_command, arguments)
        assert result.exit_code == 1
        assert message in result.output and "Traceback" not in result.output


def test_the_load_generator_loads_no_torch() -> None:
    code = "import dsc_serve.bench.load.command, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
