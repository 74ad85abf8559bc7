"""The budget solver against the figures of the paper's script."""

from __future__ import annotations

import pytest

from dsc_serve.model.budget import ParameterBudget
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.initial import preset_config

TABLE = [
    # total, active, layers, width, K, dense width, experts × hidden, atoms, static width
    (35e6, 28e6, 6, 384, 4, 2611, (5, 545), (1523, 327)),
    (35e6, 28e6, 6, 384, 16, 2611, (5, 545), (1535, 309)),
    (60e6, 32e6, 6, 384, 4, 8037, (8, 978), (3849, 32)),
    (200e6, 150e6, 12, 768, 4, 7205, (3, 2245), (2716, 3131)),
]


@pytest.mark.parametrize(("total", "active", "layers", "width", "k", "dense", "moe", "dsc"), TABLE)
def test_sizes(
    total: float, active: float, layers: int, width: int, k: int, dense: int, moe: tuple[int, int], dsc: tuple[int, int]
) -> None:
    budget = ParameterBudget(total, active, 50304, 256, layers, width)
    assert budget.dense().size == dense
    assert (budget.moe().num_experts, budget.moe().expert_size) == moe
    assert (budget.dsc(k).num_atoms, budget.dsc(k).static_size) == dsc


@pytest.mark.parametrize(("kind", "total"), [("dsc", 35.0138e6), ("moe", 35.54e6), ("dense", 35.0e6)])
def test_paper_preset_has_the_papers_parameters(kind: str, total: float) -> None:
    assert parameter_counts(preset_config("paper", kind))[0] == pytest.approx(total, rel=2e-4)


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora"])
@pytest.mark.parametrize(("preset", "active"), [("paper", 28e6), ("large", 250e6)])
def test_sparse_kinds_are_iso_active(preset: str, active: float, kind: str) -> None:
    assert parameter_counts(preset_config(preset, kind))[1] == pytest.approx(active, rel=1e-3)


def test_impossible_budgets_are_named() -> None:
    with pytest.raises(ValueError, match="less than active"):
        ParameterBudget(1e6, 2e6, 100, 10, 1, 16)
    with pytest.raises(ValueError, match="without any FFN"):
        ParameterBudget(1e6, 1e6, 50304, 256, 6, 384)
    with pytest.raises(ValueError, match="mixture of experts"):
        ParameterBudget(24e6, 23.1e6, 50304, 256, 6, 384).moe()
