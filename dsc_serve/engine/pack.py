"""A step's requests as the inputs of a model: single tokens, such with drafts, parts of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.request import Request
from dsc_serve.model.batch import Chunk

Work = Sequence[tuple[Request, int]]


def pack(inputs: Inputs, ordered: Work, decodes: int, drafted: int, size: int) -> tuple[Chunk, ...]:
    """Write a step's inputs to the buffers: all single tokens at once, all with drafts, and prompts one by one.

    size: tokens of a KV block. Returns the chunks: those with drafts, then the prompts'.
    """
    for row, (request, _) in enumerate(ordered):
        inputs.hold(row, request.table)
    _pack_singles(inputs, [request for request, _ in ordered[:decodes]], size)
    prompts = decodes + drafted
    chunks = _pack_drafted(inputs, ordered[decodes:prompts], decodes, size) if drafted else []
    start = chunks[-1].start + chunks[-1].length if chunks else decodes
    for row, (request, count) in enumerate(ordered[prompts:], prompts):
        chunks.append(_pack_prompt(inputs, request, Chunk(row, start, count, request.num_computed + count), size))
        start += count
    return tuple(chunks)


def _pack_singles(inputs: Inputs, requests: Sequence[Request], size: int) -> None:
    token_ids, positions, slot_offsets, *slot_blocks = inputs.columns
    count, num_computed = len(requests), [request.num_computed for request in requests]
    token_ids[:count] = [request.tokens[request.num_computed] for request in requests]
    positions[:count] = num_computed
    for group, blocks in enumerate(slot_blocks):
        blocks[:count] = [request.rows[group][request.num_computed // size] for request in requests]
    slot_offsets[:count] = [position % size for position in num_computed]
    inputs.rows[:count] = [position + 1 for position in num_computed]


def _pack_drafted(inputs: Inputs, work: Work, row: int, size: int) -> list[Chunk]:
    """Those with drafts begin with this row of the tables, and with the token of this number."""
    chunks: list[Chunk] = []
    start, ids, at = row, list[int](), list[int]()
    pages: list[list[int]] = [[] for _ in inputs.columns[3:]]
    for request, count in work:
        first, end = request.num_computed, request.num_computed + count
        ids += request.span(first, end)
        at += range(first, end)
        for own, table in zip(pages, request.rows, strict=True):
            own += [table[position // size] for position in range(first, end)]
        chunks.append(Chunk(row, start, count, end))
        row, start = row + 1, start + count
    token_ids, positions, slot_offsets, *slot_blocks = inputs.columns
    new = slice(chunks[0].start, start)
    token_ids[new], positions[new] = ids, at
    for blocks, own in zip(slot_blocks, pages, strict=True):
        blocks[new] = own
    slot_offsets[new] = [position % size for position in at]
    inputs.rows[chunks[0].row : row] = [chunk.context for chunk in chunks]
    return chunks


def _pack_prompt(inputs: Inputs, request: Request, chunk: Chunk, size: int) -> Chunk:
    token_ids, positions, slot_offsets, *slot_blocks = inputs.columns
    first, new = chunk.context - chunk.length, slice(chunk.start, chunk.start + chunk.length)
    token_ids[new] = request.span(first, chunk.context)
    positions[new] = np.arange(first, chunk.context)
    pages = positions[new] // size
    for blocks, table in zip(slot_blocks, request.table, strict=True):
        blocks[new] = table[pages]
    slot_offsets[new] = positions[new] % size
    inputs.rows[chunk.row] = chunk.context
    return chunk
