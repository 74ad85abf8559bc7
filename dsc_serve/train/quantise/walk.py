"""A model layer by layer in plain torch and float32: what each product is given, and what a layer makes of a window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dsc_kernels import ops, plain
from dsc_kernels.quantised import Weight
from dsc_kernels.weights import KvCache
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import placed_norm, rotary_tables, transformer_layer
from dsc_serve.model.placement import Placement
from dsc_serve.model.transformer_layer import TransformerLayer

CPU = torch.device("cpu")
BLOCK = 16
HEAD_ROWS = 256  # whose logits exist at a time
ROUTED = (plain.Ffn, plain.Moe)


@contextmanager
def plainly() -> Iterator[None]:
    """Layers that are made meanwhile are plain torch's."""
    before = ops.chosen()
    ops.use("plain")
    try:
        with torch.inference_mode():
            yield
    finally:
        ops.use(before)


class Products(TorchFunctionMode):
    """Adds up, while it is entered, the squares xᵀx [in, in] of what each of some weights is multiplied by."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """names: of the weights, by where they lie."""
        super().__init__()
        self.squares: dict[str, Tensor] = {}
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and (name := self._names.get(args[1].data_ptr())) is not None:
            x = args[0].flatten(0, -2).float()
            square = x.T @ x
            self.squares[name] = self.squares[name] + square if name in self.squares else square
        return func(*args, **(kwargs or {}))


class Walk:
    """One model's layers over windows of tokens; each sees its own window alone."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors
        self.place = Placement(torch.float32, CPU)
        self.ropes = rotary_tables(config, CPU)

    def embedded(self, windows: Sequence[Tensor]) -> list[Tensor]:
        """The first layer's input [T, d] for each window int64 [T]."""
        table = self.place.tensor(self.tensors["model.embed_tokens.weight"])
        found = [F.embedding(window, table) * self.config.embedding_scale for window in windows]
        for rope in self.ropes.values():
            rope.reach(max(map(len, windows)))
        if self.config.position_embedding_type != "learned":
            return found
        positions = self.place.tensor(self.tensors["model.embed_positions.weight"])
        return [x + positions[: len(x)] for x in found]

    def layer(self, number: int, tensors: Mapping[str, Weight] | None = None) -> TransformerLayer:
        """A layer of the model's tensors, or of others with the same names."""
        prefix = f"model.layers.{number}."
        own = tensors or self.tensors
        # Each is asked for once: a source reads it anew.
        read = {name: own[name] for name in own if name.startswith(prefix)}
        return transformer_layer(self.config.layers[number], number, read, self.place, self.ropes)

    def run(self, layer: TransformerLayer, inputs: Sequence[Tensor]) -> list[Tensor]:
        """What it makes of each window's [T, d]."""
        return [layer(x, *alone(self.config, len(x))) for x in inputs]

    def losses(self, outputs: Sequence[Tensor], windows: Sequence[Tensor]) -> Tensor:
        """−log probability in nats, float64, of each window's tokens after its first, of the last layer's outputs."""
        norm = placed_norm(self.config, "model.norm", self.tensors, self.place)
        tied = self.config.tie_word_embeddings
        head = self.place.tensor(self.tensors["model.embed_tokens.weight" if tied else "lm_head.weight"])
        found = []
        for x, window in zip(outputs, windows, strict=True):
            rows = norm(x)[:-1]
            for start in range(0, len(rows), HEAD_ROWS):
                logits, cap = F.linear(rows[start : start + HEAD_ROWS], head).double(), self.config.logits_cap
                logits = cap * (logits / cap).tanh() if cap else logits
                targets = window[start + 1 : start + 1 + len(logits)]
                found.append(F.cross_entropy(logits, targets, reduction="none"))
        return torch.cat(found)


def alone(config: ModelConfig, length: int) -> tuple[StepBatch, KvCache]:
    """A step of one sequence's first tokens, and a layer's cache for it."""
    blocks = -(-length // BLOCK)
    positions = torch.arange(length)
    batch = StepBatch(
        token_ids=positions,
        positions=positions,
        slot_blocks=(positions // BLOCK)[None],
        slot_offsets=positions % BLOCK,
        block_tables=torch.arange(blocks)[None, None],
        context_lens=torch.tensor([length]),
        decodes=0,
        decode_context=0,
        chunks=(Chunk(0, 0, length, length),),
    )
    shape = (blocks, config.num_key_value_heads, BLOCK, config.head_dim)
    keys, latent = torch.zeros(shape), config.latent_size
    return batch, KvCache(keys, torch.zeros(shape)) if latent is None else KvCache.within(keys, latent)


class WatchedFfn:
    """Stands in for a layer's FFN and keeps what each token picked: [T, k], in order of number."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.picks = inner, list[Tensor]()

    def __call__(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        picked = self.inner.route(x)[1] if isinstance(self.inner, plain.Moe) else self.inner.routed(x)[1]
        self.picks.append(picked.long().sort(dim=1).values)
        out: Tensor = self.inner(x, *arguments, **options)
        return out


def watch(layer: TransformerLayer) -> WatchedFfn | None:
    """From now on what a layer's tokens pick is kept; None where they pick nothing."""
    inner: Any = layer.ffn.layer
    if not isinstance(inner, ROUTED) or inner.router is None:
        return None
    watched = WatchedFfn(inner)
    layer.ffn.layer = watched  # type: ignore[misc, assignment]
    return watched
