"""Chunks of prompts of a step: one after the other, where no kernel takes all of them, and such as can be captured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from torch import Tensor

from dsc_kernels.weights import WHOLE, ChunkPlace, KvCache, Scope


class PlacedChunks:
    """Chunks of which a tensor holds where they are, so that a captured step can have others in each replay.

    places: integers [n, 4], contiguous, each as `weights.ChunkPlace` says; of one without tokens all are 0. tokens:
    rows of the step that they lie in, one behind the other. context: the most that any has. Kernels read the tensor
    where it is; on the host one can go through the chunks that there are.
    """

    def __init__(self, places: Tensor, tokens: int, context: int) -> None:
        self.places, self.tokens, self.context = places, tokens, context

    def __iter__(self) -> Iterator[ChunkPlace]:
        for row, start, length, context in self.places.tolist():
            if length:
                yield row, start, length, context


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
