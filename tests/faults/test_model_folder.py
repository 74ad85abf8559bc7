"""A model folder that is changed while it is served, or is hostile to begin with, and a user without a home."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save
from support.running_server import RunningServer, memory_mb, start_server, stop_server

from dsc_serve.config import resolve_model

ASKED = {"prompt": "The President of the", "max_tokens": 24, "temperature": 0}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model."""
    return Path(shutil.copytree(resolve_model("dsc-tiny"), tmp_path / "model", copy_function=shutil.copyfile))


@pytest.fixture
def server(folder: Path) -> Iterator[RunningServer]:
    # Plain torch in float32 keeps most tensors as the file has them.
    server = start_server(str(folder), "--kernels", "plain", "--dtype", "float32")
    yield server
    assert stop_server(server) == 0


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., RunningServer]]:
    servers: list[RunningServer] = []

    def run(*arguments: str) -> RunningServer:
        servers.append(start_server(str(folder), *arguments))
        return servers[-1]

    yield run
    for server in servers:
        assert stop_server(server) == 0


def answer(server: RunningServer) -> str:
    response = server.post("/v1/completions", **ASKED)
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_weights_that_are_written_over_or_cut_do_not_reach_the_running_model(
    server: RunningServer, folder: Path
) -> None:
    weights, before = folder / "model.safetensors", answer(server)
    engine = server.engine_pid
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 10)
        file.write(os.urandom(weights.stat().st_size // 2))
    assert answer(server) == before
    os.truncate(weights, 1000)
    assert answer(server) == before
    assert server.engine_pid == engine
    assert server.metric("dsc_serve_engine_restarts_total") == 0


def test_another_model_in_the_folder_is_refused_when_the_engine_starts_again(
    server: RunningServer, folder: Path
) -> None:
    other = {
        name: torch.flip(tensor, [0]).contiguous() for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").write_bytes(save(other))
    os.kill(server.engine_pid, signal.SIGKILL)
    server.wait_until(lambda: server.get("/health/live").status_code == 503, 60)
    refused = server.post("/v1/completions", **ASKED)
    assert refused.status_code == 503
    assert "is not the one that this server was started with" in refused.json()["error"]["message"]
    assert any("is not the one that this server was started with" in line for line in server.log)


def test_a_template_that_never_ends_does_not_keep_the_server_from_ending(
    start: Callable[..., RunningServer], folder: Path
) -> None:
    loop = "{% for a in range(100000) %}" * 2 + "{% endfor %}" * 2
    (folder / "chat_template.jinja").write_text(loop)
    server = start("--drain-s", "0.5")
    body = {"messages": [{"role": "user", "content": "hi"}]}
    asking = [threading.Thread(target=ask_to_the_end, args=(server, body)) for _ in range(8)]
    for thread in asking:
        thread.start()
    server.wait_until(lambda: server.metric("dsc_serve_permits_held") >= 4)
    assert answer(server)
    memory = memory_mb(server.pid)
    server.process.terminate()
    assert server.process.wait(60) == 0
    assert memory < 250
    for thread in asking:
        thread.join(60)


def ask_to_the_end(server: RunningServer, body: dict[str, object]) -> None:
    """Of the answer, or of the connection."""
    with contextlib.suppress(httpx.HTTPError):
        server.client.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


@pytest.mark.parametrize("template", ["{{ 'a' * 10**9 * 10 }}", "{{ 9 ** (9 ** 9) }}", "{{ 1 | nothing }}", "{% if %}"])
def test_a_template_that_does_not_compile_fails_chats_alone(
    start: Callable[..., RunningServer], folder: Path, template: str
) -> None:
    (folder / "chat_template.jinja").write_text(template)
    server = start()
    assert any("chats cannot be served" in line for line in server.log)
    assert answer(server)
    refused = server.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert refused.status_code == 400
    assert "chat template is broken" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", "[" * 100_000),
        ("config.json", "[" * 100_000),
    ],
)
def test_a_hostile_folder_is_refused_in_one_line(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(text)
    command = [sys.executable, "-m", "dsc_serve.cli", "serve", str(folder), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and ended.stderr.count("\n") == 1, ended.stderr


def test_a_user_without_a_name_and_a_home_is_served(
    start: Callable[..., RunningServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = "import pwd\ndef none(*_): raise KeyError('no such user')\npwd.getpwuid = pwd.getpwnam = none\n"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(hidden)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    for name in ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME"):
        monkeypatch.delenv(name, raising=False)
    finds_home = subprocess.run([sys.executable, "-c", "import pathlib; pathlib.Path.home()"], capture_output=True)
    assert finds_home.returncode == 1
    server = start()
    assert answer(server)
    messages = [{"role": "user", "content": "hi"}]
    assert server.post("/v1/chat/completions", messages=messages, max_tokens=4).status_code == 200
