"""Which process gives way to which is decided by the system, and only between processes that it compares."""

from __future__ import annotations

import os
from pathlib import Path

import httpx
from support.running_server import start_server, stop_server

from dsc_serve.bench.compare.processes import family


def test_a_grammar_that_is_put_behind_others_is_behind_the_server_and_its_engine() -> None:
    server = start_server()
    try:
        body = {"prompt": "x", "max_tokens": 4, "structured_outputs": {"regex": "a+b?"}}
        assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
        modules = ("dsc_serve.cli", "dsc_serve.worker.process", "dsc_serve.grammars.host")
        pids = {}
        for pid in family(server.pid):
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            pids |= {module: pid for module in modules if module in words}
        assert len(pids) == 3
        # Linux's autogroups share processors between sessions, whatever the niceness of who is in them.
        assert len({os.getsid(pid) for pid in pids.values()}) == 1
        # A terminal's signals reach the server alone, which ends the others.
        assert len({os.getpgid(pid) for pid in pids.values()}) == 3
    finally:
        assert stop_server(server) == 0
