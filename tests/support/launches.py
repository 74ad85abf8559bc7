"""Launches of a decoder's layer, counted on a pretended GPU: one for each kernel, and for each operator of torch's.

Operators that launch nothing (views, allocations) are left out. A layer's are told from the rest of a step by computing
with one layer and with two.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from dsc_kernels.plan import Planner
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder, dsc_layers, tensor_shapes
from dsc_serve.model.ffn.dsc import PickBuffers
from support import pretended
from support.pretended import DEVICE, PretendedGpu, on_device, pretended_gpu

NO_LAUNCH = {
    *("layer_norm", "matmul", "flatten", "to", "softmax", "contiguous", "numpy_T", "zeros", "scalar_tensor"),
    *("view", "slice", "select", "t", "transpose", "detach", "alias", "unsqueeze", "squeeze"),
    *("permute", "_unsafe_view", "expand", "as_strided", "split", "chunk", "unbind", "empty", "empty_like"),
    *("new_empty", "reshape", "_reshape_alias", "split_with_sizes", "empty_strided", "diagonal", "narrow"),
}
BLOCK, TOKENS = 16, 16 + 8 * 64  # tokens: of the largest of STEPS

WANTED = {  # decode, 1 chunk of 64, 8 of them, these and 16 single tokens
    "dsc": (8, 7, 11, 13),
    "molora": (8, 7, 11, 13),
    "dense": (8, 7, 9, 11),
    "moe": (8, 7, 9, 11),
    "many experts": (9, 8, 11, 13),  # more than a token's program reads by itself
}

Counts = collections.Counter[str]


class Launches:
    """What has been launched since `counted` began."""

    def __init__(self) -> None:
        self.counts: Counts = collections.Counter()

    def counted(self, work: Callable[[], object]) -> Counts:
        self.counts.clear()
        work()
        return collections.Counter(self.counts)


@contextmanager
def counting(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Inside, there is a pretended GPU whose launches are counted."""
    from triton.runtime.jit import JITFunction

    launches = Launches()
    dispatched = PretendedGpu.__torch_dispatch__

    def dispatch(self: PretendedGpu, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An operator that the pretended GPU computes, and that is no part of another one, is a launch."""
        before = self.operations
        out = dispatched(self, func, types, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        if any(map(on_device, tensors)) or (kwargs or {}).get("device") == DEVICE:
            name = func.overloadpacket._qualified_op_name.split("::")[1]
            if self.operations == before + 1 and name not in NO_LAUNCH:
                launches.counts[name] += 1
        return out

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        launches.counts[f"triton:{self.fn.__name__}"] += 1

    monkeypatch.setattr(pretended.PretendedGpu, "__torch_dispatch__", dispatch)
    with pretended_gpu(monkeypatch, 10**9):
        monkeypatch.setattr(JITFunction, "run", launch)
        yield launches


def batch(decodes: int, chunks: tuple[Chunk, ...] = ()) -> StepBatch:
    """A step of single tokens and of chunks of 64."""

    def integers(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=torch.int32, device=DEVICE)

    tokens, rows = decodes + sum(chunk.length for chunk in chunks), decodes + len(chunks)
    ids, positions, offsets = (integers(tokens) for _ in range(3))
    blocks, tables = integers(1, tokens), integers(1, rows, 64)
    return StepBatch(ids, positions, blocks, offsets, tables, integers(rows), decodes, 1024, chunks)


STEPS: dict[str, Callable[[], StepBatch]] = {
    "decode": lambda: batch(16),
    "1 chunk": lambda: batch(0, (Chunk(0, 0, 64, 64),)),
    "8 chunks": lambda: batch(0, tuple(Chunk(row, 64 * row, 64, 64) for row in range(8))),
    "16 and 8 chunks": lambda: batch(16, tuple(Chunk(16 + row, 16 + 64 * row, 64, 64) for row in range(8))),
}


def decoder(config: ModelConfig) -> Decoder:
    """One of two layers on the pretended GPU, its picks watched as the engine does."""
    config = config.model_copy(update={"num_hidden_layers": 2})
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    model = Decoder(config, tensors, torch.bfloat16, DEVICE)
    for layer in dsc_layers(model):
        layer.planner = Planner("auto", layer.shape, None)
        picks = torch.zeros(TOKENS, model.config.ffn.atoms_per_token, dtype=torch.int32, device=DEVICE)  # type: ignore[union-attr]
        layer.trace = PickBuffers(picks, torch.zeros(TOKENS, device=DEVICE))
    return model


@torch.inference_mode()
def of_a_layer(launches: Launches, model: Decoder) -> dict[str, Counts]:
    """By the steps of STEPS."""
    caches, found = model.kv_caches(65, BLOCK), {}
    stack, all_layers = model.stack, model.layers
    for name, make in STEPS.items():
        both = launches.counted(lambda make=make: model.hidden(make(), caches))  # type: ignore[misc]
        model.layers = all_layers[:1]
        if stack is not None:
            ours, stack.layers = stack.layers, stack.layers[:1]  # type: ignore[attr-defined]
        found[name] = both - launches.counted(lambda make=make: model.hidden(make(), caches[:1]))  # type: ignore[misc]
        model.layers = all_layers
        if stack is not None:
            stack.layers = ours  # type: ignore[attr-defined]
    return found
