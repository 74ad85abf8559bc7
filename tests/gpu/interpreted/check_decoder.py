"""Whole decoders whose layers are one call of these kernels, against the same in plain torch, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.honest import error
from support.small_models import small_config, wide_tensors

from dsc_kernels import ops
from dsc_kernels.gpu import product, stack
from dsc_kernels.weights import LayerOutputs
from dsc_serve.model.batch import Chunk, StepBatch
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.ffn.picks import Picks

CPU, BLOCK, PAGES = torch.device("cpu"), 4, 40
LLAMA = {
    "norm_type": "rmsnorm",
    "position_embedding_type": "rope",
    "num_attention_heads": 4,
    "hidden_act": "silu",
    "mlp_gated": True,
}
FORMS: dict[str, dict[str, Any]] = {
    "paper": {},
    "Llama": LLAMA,
    "windows": {**LLAMA, "window": 6, "attention_cap": 3.0},
    "norms of heads": {**LLAMA, "qk_norm": "head"},
    "half turned": {**LLAMA, "rotary_dim": 8, "attention_bias": True},
    "norms after": {**LLAMA, "norms": "after"},
}


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    yield
    ops.use("auto")


def decoder(kernels: str, kind: str, form: str) -> Decoder:
    ops.use(kernels)
    config = small_config(kind, **FORMS[form])
    return Decoder(config, wide_tensors(config), torch.float32, CPU)


def steps() -> list[StepBatch]:
    """Two prompts; one more beside their next tokens; then three next tokens."""
    g = torch.Generator().manual_seed(0)
    tables = torch.randperm(PAGES, generator=g)[:36].view(1, 3, 12)

    def step(work: list[tuple[int, int, int]]) -> StepBatch:
        """Of rows, how many tokens after how many."""
        rows = torch.tensor([row for row, _, _ in work])
        positions = torch.cat([torch.arange(before, before + count) for _, count, before in work])
        owners = torch.cat([torch.full((count,), row) for row, count, _ in work])
        blocks = tables[0, owners, positions // BLOCK][None]
        singles = sum(count == 1 for _, count, _ in work)
        contexts = torch.tensor([count + before for _, count, before in work])
        chunks, start = [], singles
        for at, (_, count, before) in enumerate(work):
            if count > 1:
                chunks.append(Chunk(at, start, count, count + before))
                start += count
        ids = torch.randint(61, (len(positions),), generator=g)
        longest = int(contexts[:singles].max()) if singles else 0
        return StepBatch(
            ids, positions, blocks, positions % BLOCK, tables[:, rows], contexts, singles, longest, tuple(chunks)
        )

    return [
        step([(0, 5, 0), (1, 9, 0)]),
        step([(0, 1, 5), (1, 1, 9), (2, 7, 0)]),
        step([(0, 1, 6), (1, 1, 10), (2, 1, 7)]),
    ]


def check(kind: str, form: str, whole: bool) -> None:
    ours, plain = decoder("triton", kind, form), decoder("plain", kind, form)
    assert isinstance(ours.stack, stack.Stack) == whole and plain.stack is None
    mine, theirs = (model.kv_caches(PAGES, BLOCK) for model in (ours, plain))
    for batch in steps():
        picks: tuple[list[Picks], list[Picks]] = ([], [])
        ops.use("triton")
        got = ours.hidden(batch, mine, picks[0])
        ops.use("plain")
        assert error(got, plain.hidden(batch, theirs, picks[1])) < 1e-5
        for own, want in zip(*picks, strict=True):
            assert torch.equal(own.atoms.long(), want.atoms.long()) and error(own.signal, want.signal) < 1e-5
    for one, other in zip(mine, theirs, strict=True):
        assert all(error(part, want) < 1e-5 for part, want in zip(one, other, strict=True))


LONG = pytest.mark.full


@pytest.mark.parametrize("kind", ["dsc", "moe", pytest.param("molora", marks=LONG), pytest.param("dense", marks=LONG)])
@torch.inference_mode()
def test_steps_of_a_llama_and_the_papers_form(kind: str) -> None:
    check(kind, "Llama" if kind in ("dsc", "moe") else "paper", True)


@pytest.mark.parametrize(
    ("form", "whole"),
    [
        ("windows", True),
        pytest.param("norms of heads", True, marks=LONG),
        pytest.param("half turned", True, marks=LONG),
        pytest.param("norms after", False, marks=LONG),
    ],
)
@torch.inference_mode()
def test_steps_of_other_forms(form: str, whole: bool) -> None:
    check("dense", form, whole)


@LONG
@torch.inference_mode()
def test_what_is_left_to_cublas_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many tokens."""
    monkeypatch.setattr(product, "MANY_TOKENS", 0)  # of narrow layers, as these are
    check("dsc", "Llama", True)


@torch.inference_mode()
def test_picks_are_written_where_they_are_wanted() -> None:
    model, batch = decoder("triton", "dsc", "Llama"), steps()[0]
    caches, whole = model.kv_caches(PAGES, BLOCK), model.stack
    assert whole is not None
    rooms = [LayerOutputs.everything(20, 3) for _ in model.layers]
    for room in rooms:
        assert room.picks is not None
        room.picks.fill_(-1)
    contexts = (batch.context_lens, batch.decodes, batch.decode_context, batch.chunks)
    whole(batch.token_ids, batch.slots, batch.block_tables, *contexts, caches, rooms)
    for room in rooms:
        assert room.picks is not None and bool((room.picks[:14] >= 0).all()) and bool((room.picks[14:] == -1).all())
