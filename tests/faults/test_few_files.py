"""Few open files: silent connections cannot take those that a restart needs, and too few are no start at all."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.certificates import make_certificate
from support.running_server import RunningServer, start_server, stop_server

from dsc_serve.server.process import LEAST_CONNECTIONS, RESERVED_FILES
from dsc_serve.worker.files import SpareFiles

FILES = 120
SILENT = 300
HEADER_TIMEOUT_S = 4.0
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv.pop(1)),) * 2)
from dsc_serve.cli import main
main()
"""


@pytest.fixture(scope="module", params=["http", pytest.param("https", marks=pytest.mark.full)])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    arguments = ["--header-timeout-s", str(HEADER_TIMEOUT_S)]
    if request.param == "https":
        cert, key = make_certificate(tmp_path_factory.mktemp("tls"))
        arguments += ["--tls-cert", cert, "--tls-key", key]
    server = start_server(*arguments, program=("-c", LIMITED, str(FILES)))
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    url = f"{server.url}/v1/chat/completions"
    answer = server.client.post(url, json=chat, headers={"Connection": "close"}, timeout=60)
    assert answer.status_code == 200, "by now the process that renders chats has its files"
    yield server
    assert stop_server(server) == 0


def open_files(server: RunningServer) -> int:
    return len(list(Path(f"/proc/{server.pid}/fd").iterdir()))


@contextlib.contextmanager
def silent_connections(server: RunningServer) -> Iterator[list[socket.socket]]:
    """More than the server can hold; those that it closes are opened again by `again`."""
    port = int(server.url.rsplit(":", 1)[1])
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(SILENT)]


def test_silent_connections_leave_descriptors_and_end_in_time(server: RunningServer) -> None:
    before = open_files(server)
    with silent_connections(server):
        server.wait_until(lambda: open_files(server) <= FILES - RESERVED_FILES + before)
        server.wait_until(lambda: open_files(server) <= before, 3 * HEADER_TIMEOUT_S)
    assert server.post("/v1/completions", prompt="Next", max_tokens=2).status_code == 200


def test_a_dead_engine_is_replaced_while_silent_connections_hold_all_that_they_get(server: RunningServer) -> None:
    restarts = server.metric("dsc_serve_engine_restarts_total")
    lines = len(server.log)
    stop = signal.SIGKILL
    with silent_connections(server):
        os.kill(server.engine_pid, stop)
        with silent_connections(server), silent_connections(server):
            server.wait_until(lambda: any("runs again" in line for line in server.log[lines:]), 60)
    server.wait_until(lambda: server.get("/health/ready").status_code == 200)
    assert server.metric("dsc_serve_engine_restarts_total") == restarts + 1
    assert not any("could not be started" in line for line in server.log[lines:]), server.log[lines:]
    assert server.post("/v1/completions", prompt="Next", max_tokens=2).status_code == 200


@pytest.mark.parametrize("files", [16, 32, 64, RESERVED_FILES + LEAST_CONNECTIONS - 1])
def test_with_too_few_files_the_server_does_not_start_and_says_why_in_one_line(files: int) -> None:
    command = [sys.executable, "-c", LIMITED, str(files), "serve", "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert f"at most {files} files may be open (ulimit -n)" in line


def test_more_connections_than_files_allow_are_refused_by_the_setting_s_name() -> None:
    command = [sys.executable, "-c", LIMITED, "200", "serve", "--port", "0", "--max-connections", "500"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert "max_connections is 500" in line and f"at most {200 - RESERVED_FILES}" in line


def test_spare_files_are_there_when_all_others_are_taken() -> None:
    spare = SpareFiles(4)
    spare.hold()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(map(int, os.listdir("/proc/self/fd"))) + 1  # noqa: PTH208
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 8, hard))
    taken: list[int] = []
    try:
        with pytest.raises(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        spare.let_go()
        for end in socket.socketpair():
            end.close()
        spare.hold()
        with pytest.raises(OSError):
            os.open(os.devnull, os.O_RDONLY)
    finally:
        spare.let_go()
        for file in taken:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_tls_is_spoken_by_the_real_server(server: RunningServer) -> None:
    if not server.url.startswith("https"):
        pytest.skip("this one speaks plain HTTP")
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    port = int(server.url.rsplit(":", 1)[1])
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain) as client,
    ):
        client.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n" * 3)
        said = b""
        while said.count(b'"ok"}') < 3:
            part = client.recv(2**16)
            assert part
            said += part
