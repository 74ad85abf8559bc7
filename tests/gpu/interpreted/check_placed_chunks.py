"""Chunks whose places are data: planned on the device, and computed in a step with room for more than there are."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.decoder_steps import BLOCK, PAGES, decoder, steps
from support.honest import banded, error, poisoned

from dsc_kernels import ops
from dsc_kernels.chunks import PlacedChunks
from dsc_kernels.gpu import attention, chunk_attention, stack
from dsc_kernels.gpu.chunk_attention import FIELDS, cut, tiles_of
from dsc_serve.model.batch import Chunk, StepBatch

CPU = torch.device("cpu")
CASES: list[list[tuple[int, int]]] = [  # lengths and contexts
    [],
    [(1, 1)],
    [(64, 64), (64, 200)],
    [(65, 70), (2, 2), (1, 130), (63, 63)],
    [(200, 1000)],
    [(3, 9)] * 8,
]


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    yield
    ops.use("auto")


def placed(chunks: list[Chunk], room: int, tokens: int, context: int = 1000) -> PlacedChunks:
    places = torch.zeros(room, FIELDS, dtype=torch.int32)
    for place, chunk in zip(places, chunks, strict=False):
        place[:] = torch.tensor(chunk)
    return PlacedChunks(banded(places), tokens, context)


@pytest.mark.parametrize("group", [1, 3, 8, 64])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_tiles_are_those_that_are_cut_and_behind_them_none_has_tokens(
    case: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunk_attention, "TILES_PER_PROGRAM", 16)
    outputs = poisoned(monkeypatch, chunk_attention)
    chunks, start = [], 5
    for row, (length, context) in enumerate(CASES[case], 3):
        chunks.append(Chunk(row, start, length, context))
        start += length
    found, want = tiles_of(placed(chunks, 8, 208), group, CPU), cut(chunks, group, CPU)
    outputs.check()
    assert found.tokens == want.tokens and torch.equal(found.work[: len(want.work)], want.work)
    assert bool((found.work[len(want.work) :] == 0).all()) and len(found.work) == 208 // want.tokens + 8


def padded(batch: StepBatch, decodes: int, tokens: int, rows: int, chunks: int, spare: int) -> StepBatch:
    """The same step with room for more, as the engine captures it."""

    def longer(part: torch.Tensor, size: int, value: int) -> torch.Tensor:
        extra = size - part.shape[-1]
        return torch.nn.functional.pad(part, (0, extra), value=value)

    columns = batch.token_ids, batch.positions, batch.slot_offsets
    ids, positions, offsets = (longer(part, tokens, 0) for part in columns)
    tables = torch.nn.functional.pad(batch.block_tables, (0, 0, 0, rows - batch.block_tables.shape[1]), value=spare)
    contexts = longer(batch.context_lens, rows, 7)
    contexts[batch.decodes : decodes] = 0
    assert isinstance(batch.chunks, tuple)
    places = placed(list(batch.chunks), chunks, tokens, 48)
    return StepBatch(
        ids, positions, longer(batch.slot_blocks, tokens, spare), offsets, tables, contexts, decodes, 48, places
    )


@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("dsc", "Llama"),
        ("moe", "Llama"),
        pytest.param("molora", "paper", marks=pytest.mark.full),
        pytest.param("dense", "windows", marks=pytest.mark.full),
        pytest.param("moe", "many experts", marks=pytest.mark.full),
        pytest.param("dense", "norms after", marks=pytest.mark.full),
    ],
)
@torch.inference_mode()
def test_one_captured_step_serves_others_and_gives_what_they_give(
    kind: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors stay and what they hold changes: two prompts; one beside single tokens; a prompt's later chunk.

    What nobody writes to is no number: rows of padding spoil none that are somebody's.
    """
    batches = steps(lengths=(2, 5, 3))
    ops.use("triton")
    model = decoder("triton", kind, form)
    eager, replayed = model.kv_caches(PAGES + 1, BLOCK), model.kv_caches(PAGES + 1, BLOCK)
    room = padded(batches[0], 4, 12, 6, 3, PAGES)
    graph_inputs = list(room[:6])
    poisoned(monkeypatch, stack, attention, chunk_attention)
    for batch in (*batches[:2], later_chunk(batches[1])):
        want = model.hidden(batch, eager)
        other = padded(batch, 4, 12, 6, 3, PAGES)
        for mine, new in zip(graph_inputs, other[:6], strict=True):
            mine.copy_(new)
        assert isinstance(room.chunks, PlacedChunks) and isinstance(other.chunks, PlacedChunks)
        room.chunks.places.copy_(other.chunks.places)
        got = model.hidden(room, replayed)
        assert got.shape[0] == 12 and error(got[: len(want)], want) < 1e-5
    for one, other_cache in zip(eager, replayed, strict=True):
        assert all(error(part[:-1], want[:-1]) < 1e-5 for part, want in zip(one, other_cache, strict=True))


def later_chunk(batch: StepBatch) -> StepBatch:
    """Three more tokens of the last prompt of a step that begins with single tokens; nothing else."""
    assert isinstance(batch.chunks, tuple)
    row, start, length, context = batch.chunks[0]
    count = 3
    positions = torch.arange(context, context + count)
    tables = batch.block_tables[:, row : row + 1]
    blocks = tables[:, 0, positions // BLOCK]
    ids = batch.token_ids[:count]
    contexts = torch.tensor([context + count])
    assert length == 3 and start == 2
    return StepBatch(
        ids, positions, blocks, positions % BLOCK, tables, contexts, 0, 0, (Chunk(0, 0, count, context + count),)
    )


def test_a_place_of_the_wrong_kind_is_named() -> None:
    with pytest.raises(ValueError, match="places is"):
        tiles_of(PlacedChunks(torch.zeros(3, 5, dtype=torch.int32), 8, 8), 1, CPU)
