"""Chunks of prompts of a step, one after the other, where no kernel takes all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from dsc_kernels.weights import WHOLE, ChunkPlace, KvCache, Scope

ChunkAttention = Callable[[Tensor, KvCache, Tensor, int, float, Scope], Tensor]


def one_by_one(attend: ChunkAttention) -> Callable[..., None]:
    """`backend.Backend.chunks_attention` of what attends for one: q [n, heads, size], its table and its context."""

    def chunks_attention(
        q: Tensor,
        cache: KvCache,
        tables: Tensor,
        chunks: Iterable[ChunkPlace],
        out: Tensor,
        scale: float,
        scope: Scope = WHOLE,
    ) -> None:
        for row, start, length, context in chunks:
            rows = slice(start, start + length)
            out[rows] = attend(q[rows], cache, tables[row], context, scale, scope)

    return chunks_attention
