"""A GPU that is not there: its tensors have a shape and a dtype only, its kernels do nothing, and waiting is seen.

Operations on the host run as ever. Where one reads from the device, copies to it in a way that waits for it, mixes it
with the host, or needs to know what a tensor on it holds, `WaitedError` is raised while `watched`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsc_kernels import ops
from dsc_kernels.gpu import compiler
from dsc_serve.engine import preparation

DEVICE = torch.device("meta")

aten = torch.ops.aten
NEEDS_CONTENT = {
    *(aten._local_scalar_dense, aten.item, aten.equal, aten.is_nonzero),
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.unique_consecutive, aten.bincount),
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._unsafe_index}
COPIES = {aten._to_copy, aten.copy_}


make_tensor = torch.tensor


class WaitedError(AssertionError):
    """The host would have waited for the device here, or the device refused."""


class PretendedGpu(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.watching = False
        self.pinned: set[int] = set()
        self.operations = 0
        self.nbytes = 0  # of all that operations have made on it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(map(on_device, tensors)) and kwargs.get("device") != DEVICE:
            pin = kwargs.pop("pin_memory", False)
            out = func(*args, **kwargs)
            if pin:
                self.pinned.add(out.untyped_storage().data_ptr())
            return out
        with self:  # what is made of other operations is seen as those, also where inference leaves it whole
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        self.operations += 1
        if self.watching:
            self._watch(func, args, kwargs, tensors)
        if func.overloadpacket is aten.copy_ and not on_device(args[0]):
            return args[0]  # which is as it was: nothing is on the device
        out = func(*args, **kwargs)
        known = {t.untyped_storage()._cdata for t in tensors}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and on_device(leaf)]
        self.nbytes += sum(t.numel() * t.element_size() for t in made if t.untyped_storage()._cdata not in known)
        return out

    def _watch(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        packet = func.overloadpacket
        if packet in NEEDS_CONTENT:
            raise WaitedError(f"{func} needs to know what is on the device")
        if packet in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise WaitedError(f"{func} with a mask, whose size is what it holds")
        if packet in COPIES:
            self._watch_copy(func, args, kwargs, tensors)
        elif any(t.dim() and not on_device(t) for t in tensors):
            raise WaitedError(f"{func} of tensors on the host and on the device")

    def _watch_copy(self, func: Any, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> None:
        if func.overloadpacket is aten.copy_:
            there, source = on_device(args[0]), args[1]
        else:
            there, source = kwargs.get("device", args[0].device) == DEVICE, args[0]
        if on_device(source) != there and not all(t.is_contiguous() for t in tensors if not on_device(t)):
            raise WaitedError(f"{func} of what is not in one piece on the host, which goes by pageable memory")
        if on_device(source) and not there:
            at_once = len(args) > 2 and args[2]
            if not at_once or args[0].untyped_storage().data_ptr() not in self.pinned:
                raise WaitedError(f"{func} from the device")
        if not on_device(source) and there:
            at_once = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            if not at_once or source.untyped_storage().data_ptr() not in self.pinned:
                raise WaitedError(f"{func} to the device, blocking or from memory that is not pinned")

    def tensor(self, data: Any, **options: Any) -> Tensor:
        """torch.tensor, which hides from a mode that it copies."""
        if self.watching and options.get("device") == DEVICE:
            raise WaitedError("a tensor is made on the device from values of the host")
        return make_tensor(data, **options)

    def pin(self, tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        self.pinned.add(copy.untyped_storage().data_ptr())
        return copy

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Waiting is an error in here."""
        before, self.watching = self.watching, True
        try:
            yield
        finally:
            self.watching = before


def on_device(tensor: Tensor) -> bool:
    return tensor.device == DEVICE


class Event:
    """Stands in for torch.cuda.Event; what it waits for is a copy to the device, not a result of its."""

    def record(self) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


@contextmanager
def pretended_gpu(monkeypatch: pytest.MonkeyPatch, free_bytes: int) -> Iterator[PretendedGpu]:
    """Inside, `device="cuda"` is a GPU that is pretended, with so much free memory, where Triton starts kernels."""
    from triton.runtime.jit import JITFunction

    def serves(dtype: torch.dtype, device: torch.device) -> bool:
        return dtype in compiler.FLOATS and device == DEVICE and ops.chosen() != "plain"

    gpu = PretendedGpu()
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: gpu.pin(tensor))
    monkeypatch.setattr(torch, "tensor", gpu.tensor)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 2 * free_bytes))
    monkeypatch.setattr(compiler, "serves", serves)
    monkeypatch.setattr(ops, "triton_serves", serves)
    monkeypatch.setitem(preparation.DEVICES, "cuda", DEVICE)
    with gpu:
        yield gpu
