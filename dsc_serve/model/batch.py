"""The inputs of one step, flattened over requests."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from dsc_kernels.chunks import PlacedChunks
from dsc_kernels.weights import AdapterRun, Slots


class Chunk(NamedTuple):
    """Several new tokens of one sequence."""

    row: int  # of the block tables, the sequence's
    start: int  # the first of its rows of the batch
    length: int  # how many
    context: int  # tokens cached after the step


class StepBatch(NamedTuple):
    """T new tokens of S sequences. The first `decodes` tokens are the only new ones of sequences 0 … decodes − 1.

    Where chunks are placed they may begin before that: the last of these sequences then have empty contexts, and what
    attention gives for them is overwritten.
    """

    token_ids: Tensor  # int64 [T]
    positions: Tensor  # int64 [T]
    slot_blocks: Tensor  # int64 [groups, T], blocks of the KV pool that the tokens' keys and values go to
    slot_offsets: Tensor  # int64 [T], and where in them
    block_tables: Tensor  # int64 [groups, S, W], padded with any valid block; a group: `layer_groups.LayerGroups`
    context_lens: Tensor  # int64 [S], tokens cached after the step
    decodes: int
    decode_context: int  # the largest context of the one-token sequences
    chunks: tuple[Chunk, ...] | PlacedChunks  # the sequences with several new tokens
    runs: tuple[AdapterRun, ...] = ()  # of the tokens whose requests have adapters, in their order
    drafted: int = 0  # of the first chunks, which are a token and its drafts: each row is computed as it is alone

    @property
    def max_context_len(self) -> int:
        """The largest context after the step."""
        if isinstance(self.chunks, PlacedChunks):
            return max(self.decode_context, self.chunks.context)
        return max((self.decode_context, *(chunk.context for chunk in self.chunks)))

    @property
    def slots(self) -> Slots:
        """Where the tokens stand, and where their keys and values go in each group."""
        return Slots(self.positions, self.slot_blocks, self.slot_offsets)

    def slots_of(self, group: int) -> Slots:
        """The same of one group's layers."""
        return Slots(self.positions, self.slot_blocks[group], self.slot_offsets)
