"""Fixtures of the kernels' tests."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from support.native_cases import Guarded

from dsc_kernels import native
from dsc_kernels.native import head


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tensors so tiny that threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=native.available() or ["none"])
def instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each of this machine's; without any, what plain torch computes is tested all the same."""
    if request.param != "none":
        native.use(request.param)
    yield request.param
    native.use("auto")


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    guard = Guarded()
    names = {name: getattr(torch, name) for name in ("float32", "bfloat16", "int32", "int64")}
    for part in (native.layers, native.moe, native.attention, native.tokens, head):
        monkeypatch.setattr(part, "torch", SimpleNamespace(**names, empty=guard.empty))
    yield guard
    guard.check()
