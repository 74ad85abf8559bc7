"""What is asked of a GPU before kernels are chosen for it, and of Triton when it fails. No GPU is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from dsc_kernels import library, ops

pytest.importorskip("triton", reason="Triton is not installed")

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bfloat16_is_left_to_plain_torch_on_gpus_without_it(
    capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsc_kernels.gpu import compiler

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    compiler.compiles_bfloat16.cache_clear()
    assert compiler.serves(torch.bfloat16, GPU) == served
    assert compiler.serves(torch.float32, GPU) and compiler.serves(torch.float16, GPU)
    compiler.compiles_bfloat16.cache_clear()


def test_what_triton_raises_is_known() -> None:
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    assert all(issubclass(error, ops.compiler_errors()) for error in (CompilationError, OutOfResources, PTXASError))


def test_operators_run_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        current.append(tensor)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(2)
    run = library.on_its_device(lambda first, *rest: (current == [first], *rest))
    assert run(x, 3, None) == (True, 3, None)
    assert not current
