"""How many launches a decoder layer needs, by kind: counted on a pretended GPU, so without one; prints a table.

Operators that launch nothing (views, allocations) are left out. Copies of layers are told from the rest by computing
with one layer and with two.
"""

from __future__ import annotations

import collections

import pytest
import torch
from common import DRY, table
from internals import (
    BLOCK,
    Chunk,
    Decoder,
    StepBatch,
    argmax_tokens,
    keep_layers,
    kv_caches,
    plan_dsc_layers,
    preset_config,
    restore_layers,
    tensor_shapes,
    trace_dsc_layers,
)
from support import pretended
from support.pretended import DEVICE, on_device, pretended_gpu
from torch.utils._pytree import tree_leaves
from triton.runtime.jit import JITFunction

NO_LAUNCH = {
    *("layer_norm", "matmul", "flatten", "to", "softmax", "contiguous", "numpy_T", "zeros", "scalar_tensor"),
    *("view", "slice", "select", "t", "transpose", "detach", "alias", "unsqueeze", "squeeze"),
    *("permute", "_unsafe_view", "expand", "as_strided", "split", "chunk", "unbind", "empty", "empty_like"),
    *("new_empty", "reshape", "_reshape_alias", "split_with_sizes", "empty_strided", "diagonal", "narrow"),
}
TOKENS = 512
counts: collections.Counter[str] = collections.Counter()
dispatched = pretended.PretendedGpu.__torch_dispatch__


def counting(self, func, types, args=(), kwargs=None):
    """An operator that the pretended GPU computes, and that is no part of another one, is a launch."""
    before = self.operations
    out = dispatched(self, func, types, args, kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
    if any(map(on_device, tensors)) or (kwargs or {}).get("device") == DEVICE:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if self.operations == before + 1 and name not in NO_LAUNCH:
            counts[name] += 1
    return out


def launch(self, *args, **kwargs) -> None:
    counts[f"triton:{self.fn.__name__}"] += 1


def batch(decodes: int, chunks: tuple[Chunk, ...] = ()) -> StepBatch:
    def integers(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=DEVICE)

    tokens, rows = decodes + sum(chunk.length for chunk in chunks), decodes + len(chunks)
    ids, positions, offsets = (integers(tokens) for _ in range(3))
    blocks, tables = integers(1, tokens), integers(1, rows, 64)
    return StepBatch(ids, positions, blocks, offsets, tables, integers(rows), decodes, 1024, chunks)


STEPS = {
    "decode": batch,
    "1 chunk": lambda _: batch(0, (Chunk(0, 0, 64, 64),)),
    "8 chunks": lambda _: batch(0, tuple(Chunk(row, 64 * row, 64, 64) for row in range(8))),
}


def counted(work) -> collections.Counter[str]:
    counts.clear()
    work()
    return collections.Counter(counts)


@torch.inference_mode()
def row(kind: str, positions: str) -> tuple[list[object], dict[str, int]]:
    config = preset_config("paper", kind, context=1024)
    heads = {"num_key_value_heads": 2} if positions == "rope" else {}
    config = config.model_copy(update={"position_embedding_type": positions, "num_hidden_layers": 2, **heads})
    tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in tensor_shapes(config).items()}
    model = Decoder(config, tensors, torch.bfloat16, DEVICE)
    plan_dsc_layers(model)
    if kind == "dsc":
        trace_dsc_layers(model, TOKENS)
    caches = kv_caches(model, 65)
    found: dict[str, collections.Counter[str]] = {}
    for name, make in STEPS.items():
        both = counted(lambda make=make: model.hidden(make(16), caches))
        had = keep_layers(model, 1)
        found[name] = both - counted(lambda make=make: model.hidden(make(16), caches[:1]))
        restore_layers(model, had)
    hidden = torch.zeros(16, config.hidden_size, dtype=torch.bfloat16, device=DEVICE)
    head = counted(lambda: argmax_tokens(model, hidden))
    return [positions, kind, *(sum(one.values()) for one in found.values()), sum(head.values())], dict(found["decode"])


def main() -> None:
    patch = pytest.MonkeyPatch()
    patch.setattr(pretended.PretendedGpu, "__torch_dispatch__", counting)
    rows, decodes = [], []
    with pretended_gpu(patch, 10**9):
        patch.setattr(JITFunction, "run", launch)
        for positions in ("learned",) if DRY else ("learned", "rope"):
            for kind in ("dsc", "moe", "molora", "dense"):
                cells, decode = row(kind, positions)
                rows.append(cells)
                decodes.append((kind, decode))
    patch.undo()
    table(f"launches a layer ({BLOCK} tokens a block)", ["positions", "kind", *STEPS, "head and argmax"], rows)
    for kind, decode in decodes:
        print(kind, "decode:", decode)


main()
