"""Min-hash order and tiles against a naive oracle, and grouped layers against ungrouped ones, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.layer_parts import ffn_parts
from torch import Tensor

from dsc_kernels import grouping, native, ops, reference

CASES = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=["plain", *native.available()])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    native.use(request.param)
    yield request.param
    native.use("auto")


@pytest.fixture(params=["plain", "auto"])
def either(request: pytest.FixtureRequest) -> Iterator[str]:
    """The order is the same code for all instruction sets."""
    native.use(request.param)
    yield request.param
    native.use("auto")


def scrambled(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def naive_order(picks: list[list[int]]) -> list[int]:
    """By the two smallest hashes, of which 23 and 20 bits count, then by index."""

    def key(token: int) -> tuple[int, int, int]:
        first, second = [*sorted(scrambled(atom) for atom in picks[token]), 2**32 - 1][:2]
        return first >> 9, second >> 12, token

    return sorted(range(len(picks)), key=key)


def naive_unions(picks: list[list[int]], order: list[int], tile: int) -> list[list[int]]:
    groups = [order[start : start + tile] for start in range(0, len(order), tile)]
    return [sorted({atom for token in group for atom in picks[token]}) for group in groups]


def lists(tiles: grouping.Tiles) -> list[list[int]]:
    return [tiles.atoms[a:b].tolist() for a, b in zip(tiles.offsets[:-1], tiles.offsets[1:], strict=True)]


@CASES
@given(
    tokens=st.integers(0, 90),
    k=st.integers(1, 12),
    atoms=st.sampled_from([12, 60, 70_000]),
    tile=st.integers(1, 100),
    seed=st.integers(0, 2**31),
)
def test_order_and_tiles_are_those_of_the_naive_oracle(
    either: str, tokens: int, k: int, atoms: int, tile: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    picks = torch.stack([torch.randperm(atoms, generator=generator)[:k] for _ in range(tokens)] or [torch.zeros(k)])
    picks = picks[:tokens].to(torch.int32)
    order = grouping.min_hash_order(picks)
    assert order.dtype == torch.int32
    assert order.tolist() == naive_order(picks.tolist())
    arrival, grouped = grouping.tiles(picks, tile=tile), grouping.tiles(picks, order, tile)
    assert lists(arrival) == naive_unions(picks.tolist(), list(range(tokens)), tile)
    assert lists(grouped) == naive_unions(picks.tolist(), order.tolist(), tile)
    wanted = sum(map(len, lists(grouped))) / (tokens * k) if tokens else 1.0
    assert grouped.sharing == pytest.approx(wanted)


def test_sharing_of_planted_groups_is_what_is_computed_by_hand(either: str) -> None:
    """64 tokens, 4 kinds in turn, each kind with 4 atoms of its own: a tile of 16 holds all 16 atoms as they come, and
    4 when grouped; of 64 picks a tile that is ρ = 16 / 64 and 4 / 64."""
    picks = torch.arange(16).view(4, 4)[torch.arange(64) % 4]
    assert grouping.tiles(picks).sharing == 0.25
    order = grouping.min_hash_order(picks)
    assert grouping.tiles(picks, order).sharing == 0.0625
    assert [set((order[i : i + 16] % 4).tolist()) for i in range(0, 64, 16)] != [{0, 1, 2, 3}] * 4


def test_nonsense_is_named(either: str) -> None:
    with pytest.raises(ValueError, match=r"picks are torch.float32 \[3, 2\]"):
        grouping.min_hash_order(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="at most 1048576"):
        grouping.min_hash_order(torch.zeros(2**20 + 1, 1, dtype=torch.int32))
    with pytest.raises(ValueError, match="tile is 0"):
        grouping.tiles(torch.zeros(3, 2, dtype=torch.int64), tile=0)
    with pytest.raises(ValueError, match=r"order is \[2\]"):
        grouping.tiles(torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.int32))


def layer(dtype: torch.dtype, d: int, atoms: int, k: int, rank: int = 0) -> Any:
    g = torch.Generator().manual_seed(atoms)

    def weight(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * shape[-1] ** -0.5).to(dtype)

    rows = atoms * max(rank, 1)
    bank = [reference.project(torch.randn(rows, d, generator=g), 1e-6).to(dtype) for _ in range(2)]
    static = (weight(24, d), None, weight(d, 24), "gelu")
    router = (weight(atoms, d), torch.randn(atoms, generator=g))
    options = {"k": k, "rank": rank, "tau": 20.0, "eps": 1e-6}
    return ops.ffn(**ffn_parts(*static, *router, *bank, torch.rand(d, generator=g), 1e-5, **options))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("d", "atoms", "k", "rank"), [(48, 40, 4, 0), (33, 7, 7, 0), (64, 70, 32, 0), (40, 9, 2, 3)])
def test_a_grouped_layer_gives_the_same_bits(
    kernels: str, dtype: torch.dtype, d: int, atoms: int, k: int, rank: int
) -> None:
    ffn = layer(dtype, d, atoms, k, rank)
    for batch in (1, 2, 17, 24, 25, 130, 401):
        x = torch.randn(batch, d, generator=torch.Generator().manual_seed(batch)).to(dtype)
        residual = x.flip(1).contiguous()
        assert torch.equal(ffn(x, residual, grouped=True), ffn(x, residual))


def test_picks_and_signal_are_written_where_asked_for(kernels: str) -> None:
    ffn = layer(torch.float32, 48, 40, 4)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(1))
    _, atoms, _, signal = ffn.routed(x)
    for grouped in (False, True):
        picks, strength = torch.full((12, 4), -1, dtype=torch.int32), torch.full((12,), -1.0)
        ffn(x, None, grouped, picks, strength)
        assert torch.equal(picks[:9].long(), atoms.long()) and torch.equal(strength[:9], signal)
        assert bool((picks[9:] == -1).all()) and bool((strength[9:] == -1).all())
