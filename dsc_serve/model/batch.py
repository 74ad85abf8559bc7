"""The inputs of one step, flattened over requests."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsc_kernels.weights import Slots


class Chunk(NamedTuple):
    """Several new tokens of one sequence: `length` rows of the batch from `start`, the sequence's row of the tables."""

    row: int
    start: int
    length: int
    context: int


class StepBatch(NamedTuple):
    """T new tokens of S sequences. The first `decodes` tokens are the only new ones of sequences 0 … decodes − 1.

    token_ids, positions, slot_blocks, slot_offsets: int64 [T]; where each token's key and value go in the KV pool.
    block_tables: int64 [S, W], padded with any valid block. context_lens: int64 [S], tokens cached after the step.
    decode_context: the largest context of the one-token sequences. chunks: the sequences with several new tokens.
    """

    token_ids: Tensor
    positions: Tensor
    slot_blocks: Tensor
    slot_offsets: Tensor
    block_tables: Tensor
    context_lens: Tensor
    decodes: int
    decode_context: int
    chunks: tuple[Chunk, ...]

    @property
    def slots(self) -> Slots:
        """Where the tokens stand, and where their keys and values go."""
        return Slots(self.positions, self.slot_blocks, self.slot_offsets)
