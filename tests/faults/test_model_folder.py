"""The files of a model are changed while it is served."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from running_server import RunningServer, start_server, stop_server
from safetensors.torch import load_file, save

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
