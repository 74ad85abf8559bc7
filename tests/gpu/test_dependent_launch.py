"""Kernels that begin while the one before them ends: on sm_90, where they say so and wait; nowhere else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pretended import PretendedGpu, pretended_gpu
from test_waiting import engine_on, serve

from dsc_kernels import ops
from dsc_serve.sampling_params import SamplingParams

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1",
    reason="there is a GPU, or no compiled kernel",
)


def compiled(target: str) -> dict[str, dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).parent / "compile_chained.py"), target]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_on_sm_90_each_kernel_lets_the_next_one_begin_and_waits_before_it_touches_memory() -> None:
    found = compiled("sm_90")
    assert len(found) > 30
    for name, own in found.items():
        assert own["launch_pdl"] and own["waits"] == own["begins"] == 1 and own["first"], (name, own)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", ["sm_80", "gfx942"])
def test_elsewhere_their_code_knows_nothing_of_it(target: str) -> None:
    found = compiled(target)
    assert len(found) > 30
    assert not any(own["mentioned"] or own["launch_pdl"] for own in found.values())


def test_the_architecture_says_who_is_chained() -> None:
    from dsc_kernels.gpu.compiler import APART, CHAINED, chain, chain_of

    assert [chain_of(architecture) for architecture in (None, 80, 89)] == [APART] * 3
    assert [chain_of(architecture) for architecture in (90, 100, 120)] == [CHAINED] * 3
    assert chain() == APART, "there is no GPU here"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedGpu]:
    with pretended_gpu(monkeypatch, 10**7) as pretended:
        yield pretended
    ops.use("auto")


@pytest.mark.parametrize("choice", ["auto", "off"])
@pytest.mark.parametrize("kind", ["dsc", "moe"])
def test_all_launches_of_an_engine_are_chained_or_none_is(
    kind: str, choice: str, gpu: PretendedGpu, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is not told to wait, among such as may begin early, would read what is not there yet."""
    from triton.runtime.jit import JITFunction

    from dsc_kernels.gpu import compiler

    monkeypatch.setattr(compiler, "architecture", lambda: 90)
    launched: dict[str, set[tuple[Any, Any]]] = {}

    def run(function: Any, *args: Any, **options: Any) -> None:
        told = options.get("chained"), options.get("launch_pdl")
        launched.setdefault(function.fn.__name__, set()).add(told)

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(compiler, "_dependent_launch", "auto")
    settings = {"step_ahead": "off", "dependent_launch": choice}
    engine, _ = engine_on(gpu, small_model(kind, position_embedding_type="rope"), monkeypatch, **settings)
    monkeypatch.setattr("dsc_serve.engine.sampler.read", lambda tokens: [0] * len(tokens))
    params = [SamplingParams(temperature=0.7 * (i % 2), max_tokens=4, ignore_eos=True) for i in range(3)]
    serve(gpu, engine, params)
    assert {"add_norm_rows", "attend", "attend_chunks", "plan_tiles", "sample_rows"} < launched.keys()
    wanted = (True, True) if choice == "auto" else (False, None)
    assert all(told == {wanted} for told in launched.values()), launched
