from __future__ import annotations

import pytest

from dsc_serve.bench.layer.roofline import Rates, RooflinePhase, phases
from dsc_serve.bench.layer.systems import layer_config
from dsc_serve.model.config import DscConfig, MoeConfig, MoloraConfig

PAPER = {kind: layer_config("paper", kind) for kind in ("dsc", "moe", "molora", "dense")}


def sized(kind: str, ffn: object, **changes: object) -> list[RooflinePhase]:
    """Phases at d 10, B 3, 2 bytes an element and 5 different picks."""
    config = layer_config("tiny", kind).model_copy(update={"hidden_size": 10, "ffn": ffn, **changes})
    return phases(config, 3, 5, 2)


def test_dsc_counts_router_static_and_the_picked_rows_of_both_banks() -> None:
    got = sized("dsc", DscConfig(num_atoms=7, atoms_per_token=2, static_size=4))
    assert got == [
        RooflinePhase("router", 7 * 10 * 2, 2 * 3 * 7 * 10),
        RooflinePhase("static", 2 * 4 * 10 * 2, 2 * 3 * 2 * 4 * 10),
        RooflinePhase("bank", 2 * 5 * 10 * 2, 3 * 2 * (2 * 10 + 2 * 10)),
    ]


def test_a_gate_adds_a_third_matrix() -> None:
    got = sized("dsc", DscConfig(num_atoms=7, atoms_per_token=2, static_size=4), mlp_gated=True)
    assert got[1] == RooflinePhase("static", 3 * 4 * 10 * 2, 2 * 3 * 3 * 4 * 10)


def test_moe_counts_the_experts_that_are_hit_and_the_work_of_each_token() -> None:
    got = sized("moe", MoeConfig(num_experts=6, experts_per_token=2, expert_size=8))
    assert got == [
        RooflinePhase("router", 6 * 10 * 2, 2 * 3 * 6 * 10),
        RooflinePhase("experts", 5 * 2 * 8 * 10 * 2, 3 * 2 * 2 * (2 * 8 * 10)),
    ]


def test_molora_counts_r_rows_per_picked_adapter() -> None:
    got = sized("molora", MoloraConfig(num_adapters=9, adapters_per_token=2, rank=4, static_size=3))
    assert got == [
        RooflinePhase("router", 9 * 10 * 2, 2 * 3 * 9 * 10),
        RooflinePhase("static", 2 * 3 * 10 * 2, 2 * 3 * 2 * 3 * 10),
        RooflinePhase("bank", 2 * 5 * 4 * 10 * 2, 3 * 2 * 4 * (2 * 10 + 2 * 10)),
    ]


def test_dense_reads_and_multiplies_everything() -> None:
    assert phases(PAPER["dense"], 2, 0, 4) == [RooflinePhase("static", 2 * 2611 * 384 * 4, 2 * 2 * 2 * 2611 * 384)]


@pytest.mark.parametrize(("batch", "ratio"), [(1, 1.00), (16, 2.36), (64, 2.05), (256, 1.48)])
def test_bytes_of_moe_over_dsc_at_the_papers_sizes(batch: int, ratio: float) -> None:
    """Under uniform routing, within the biases and norms that the published ratios count and `phases` does not."""
    atoms = 1523 * (1 - (1 - 4 / 1523) ** batch)
    experts = 5 * (1 - (1 - 2 / 5) ** batch)
    dsc = sum(phase.bytes for phase in phases(PAPER["dsc"], batch, atoms, 2))
    moe = sum(phase.bytes for phase in phases(PAPER["moe"], batch, experts, 2))
    assert moe / dsc == pytest.approx(ratio, rel=0.006)


def test_roofline_time_adds_phases_up_and_overlaps_only_within_one() -> None:
    rates = Rates(gemm=100.0, bandwidth={4096: 10.0})
    layer = [RooflinePhase("reads", bytes=50, flops=100), RooflinePhase("computes", bytes=10, flops=700)]
    added, overlapped = rates.seconds(layer, 4096)
    assert added == pytest.approx((5 + 1) + (1 + 7))
    assert overlapped == pytest.approx(5 + 7)  # one max over the whole would be 8
