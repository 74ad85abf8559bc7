"""Steps on a device, whose graphs are computed again on the host here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dsc_serve.bench.step import device_steps as module
from dsc_serve.bench.step import harness
from dsc_serve.bench.step.device_steps import NotCapturedError, device_steps, format_device_steps
from dsc_serve.bench.step.engine_command import engine_command
from dsc_serve.config import EngineConfig
from dsc_serve.engine import runner as runner_module
from dsc_serve.engine.graphs import Graph
from dsc_serve.engine.preparation import prepare_model


class Again:
    """A graph whose replay computes again."""

    replays = 0

    def __init__(self, compute: Callable[[], Tensor]) -> None:
        self.compute, self.out = compute, compute()

    def replay(self) -> None:
        Again.replays += 1
        self.out.copy_(self.compute())


class Clock:
    """What it times takes 4 ms where a graph is replayed, and else 1."""

    def start(self) -> None:
        self.began = Again.replays

    def stop(self) -> float:
        return 0.004 if Again.replays > self.began else 0.001


def capture(compute: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    made = Again(compute)
    return made, made.out


def test_a_step_is_its_graph_its_head_and_the_host(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_model(max_position_embeddings=1024, position_embedding_type="rope")
    config = EngineConfig(model=str(folder), max_running=3, step_tokens=64)
    model = prepare_model(config)
    monkeypatch.setattr(module, "RATE_SECONDS", 0.01)
    monkeypatch.setattr(module, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(harness, "WARM_STEPS", 4)
    with pytest.raises(NotCapturedError, match="steps are not captured here"):
        device_steps(model, config, (1,), 3, Clock())
    monkeypatch.setattr(runner_module, "capture_for", lambda dtype, device: capture)
    found = device_steps(model, config, (1, 3), 3, Clock())
    assert [(one.running, one.padded) for one in found] == [(1, 1), (3, 3)]
    for one in found:
        assert (one.graph_ms, one.head_ms) == (4.0, 1.0) and one.step_ms > 0 and one.least_ms > 0
        assert one.inside and one.host_ms == pytest.approx(max(one.step_ms - one.graph_ms, 0))
        apart = msgspec.structs.replace(one, inside=False)
        assert apart.host_ms == pytest.approx(max(one.step_ms - one.graph_ms - one.head_ms, 0))
    assert len(format_device_steps(found).splitlines()) == 3


def test_a_device_that_is_not_there_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(engine_command, ["--device", "cuda"])
    assert result.exit_code == 1 and "torch finds no CUDA device" in result.output
