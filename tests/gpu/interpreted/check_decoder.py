"""Whole decoders whose layers are one call of these kernels, against the same in plain torch, step by step."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.decoder_steps import BLOCK, PAGES, decoder, steps
from support.honest import error

from dsc_kernels import ops
from dsc_kernels.gpu import product, stack
from dsc_kernels.weights import AdapterRun, LayerOutputs, LowRank
from dsc_serve.model.ffn.picks import Picks


@pytest.fixture(autouse=True)
def kernels() -> Iterator[None]:
    yield
    ops.use("auto")


def check(kind: str, form: str, whole: bool, lengths: tuple[int, int, int] = (2, 5, 3)) -> None:
    ours, plain = decoder("triton", kind, form), decoder("plain", kind, form)
    assert isinstance(ours.stack, stack.Stack) == whole and plain.stack is None
    mine, theirs = (model.kv_caches(PAGES, BLOCK) for model in (ours, plain))
    for batch in steps(lengths=lengths):
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
        pytest.param("biases", True, marks=LONG),
        pytest.param("norms after", False, marks=LONG),
    ],
)
@torch.inference_mode()
def test_steps_of_other_forms(form: str, whole: bool) -> None:
    check("dense", form, whole, (5, 9, 7))


@torch.inference_mode()
def test_steps_of_many_experts_and_a_shared_one() -> None:
    check("moe", "many experts", True, (2, 3, 2))


@LONG
@torch.inference_mode()
def test_what_is_left_to_cublas_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with many tokens."""
    monkeypatch.setattr(product, "MANY_TOKENS", 0)  # of narrow layers, as these are
    check("dsc", "Llama", True)


@LONG
@torch.inference_mode()
def test_steps_with_adapters_are_computed_layer_by_layer() -> None:
    g, found = torch.Generator().manual_seed(1), []
    update = LowRank(torch.randn(2, 32, generator=g), torch.randn(64, 2, generator=g), 0.5)
    for kernels in ("triton", "plain"):
        model = decoder(kernels, "dsc", "Llama")
        adapter, caches = model.adapter({(1, "q"): update}), model.kv_caches(PAGES, BLOCK)
        for batch in steps(lengths=(2, 4, 3))[:2]:
            batch = batch._replace(runs=(AdapterRun(adapter, 0, 2),))
            assert model.stack is None or not model.stack.takes(caches, batch.runs)
            found.append(model.hidden(batch, caches))
    assert all(error(mine, theirs) < 1e-5 for mine, theirs in zip(found[:2], found[2:], strict=True))


@LONG
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
