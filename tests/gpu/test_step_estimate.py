"""The estimate of a step has as many launches as are counted, and the floor of its bytes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from support.launches import WANTED

from dsc_kernels.launch_time import LAUNCH, Launch, beside_the_norm, finding_rows, in_a_product, seconds
from dsc_kernels.step_estimate import MODELS, estimate, ffn, layer, scored_again, screened_ffn, steps_command


@pytest.mark.parametrize(("model", "kind"), [(name, kind) for name, sizes in MODELS.items() for kind in sizes.kinds])
def test_a_layer_has_the_launches_that_are_counted(model: str, kind: str) -> None:
    counted = WANTED["many experts" if model == "64 experts" else kind]
    assert len(layer(kind, MODELS[model], 1)) == counted[0]


@pytest.mark.parametrize("experts", [17, 32, 60, 64, 128, 256])
@pytest.mark.parametrize("d", [1024, 2048, 4096])
def test_a_mixtures_logits_are_merged_with_the_norm_only_where_that_is_no_slower(experts: int, d: int) -> None:
    route_experts = pytest.importorskip("dsc_kernels.gpu.route_experts", reason="Triton is not installed")
    merged = [tokens for tokens in (1, 4, 8, 16, 64, 1024) if route_experts.scored_beside(tokens, experts, d)]
    assert 1 in merged and 1024 not in merged and (8 in merged or experts * d > 128 * 4096)
    for tokens in merged:
        beside, apart = beside_the_norm(experts, d, tokens), in_a_product(experts, d, tokens)
        assert len(beside) < len(apart) and seconds(beside) <= seconds(apart), tokens


@pytest.mark.parametrize(("experts", "k", "hidden"), [(8, 2, 14336), (32, 8, 512), (60, 4, 1408), (128, 8, 768)])
def test_tiles_find_their_rows_only_where_that_is_no_slower_than_a_sort(experts: int, k: int, hidden: int) -> None:
    moe = pytest.importorskip("dsc_kernels.gpu.moe", reason="Triton is not installed")
    direct = [tokens for tokens in (1, 16, 32, 64, 256, 512) if moe.direct(tokens, k, experts, hidden, 2048)]
    columns = -(-hidden // 32) - (-2048 // 32)
    assert all(finding_rows(experts, tokens, k, columns).seconds() <= LAUNCH for tokens in direct)
    assert direct[:2] == [1, 16] and 512 not in direct


@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize(("atoms", "static", "d"), [(1024, 320, 384), (1024, 1024, 1024), (16384, 8192, 4096)])
def test_no_split_of_a_router_over_its_inputs_would_gain_the_launch_that_sums_it(
    atoms: int, static: int, d: int, tokens: int
) -> None:
    """Maxima of groups are of whole sums: with split ones there would be a launch more."""
    ffn_in = pytest.importorskip("dsc_kernels.gpu.ffn_in", reason="Triton is not installed")
    rows, tile = atoms + static, ffn_in.blocks(tokens, atoms + static, torch.bfloat16)
    own = (tile["rows_per_block"] + tile["tokens_per_block"]) * d
    whole = Launch("route and raise", rows * d, of_a_program=own).seconds()
    best = Launch("the same, its rows read at full speed", rows * d).seconds()
    assert whole - best < LAUNCH


@pytest.mark.parametrize(("tokens", "floor_ms"), [(1, 0.0142), (16, 0.0188), (64, 0.0334)])
def test_the_floor_of_the_papers_dsc_is_its_bytes(tokens: int, floor_ms: float) -> None:
    """57.0, 75.2 and 133.4 MB with each weight that is touched once."""
    found = estimate("dsc", MODELS["paper"], tokens, 4e12, 7e14, 2e-6)
    assert found.floor_ms == pytest.approx(floor_ms, rel=0.02)
    assert found.now_ms - found.floor_ms == pytest.approx(2e-3 * found.launches)
    assert found.before_ms > found.now_ms


def test_the_command_prints_a_table() -> None:
    result = CliRunner().invoke(steps_command, ["--launch-us", "0"])
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2 + 4 + 3 + 1 + 1 + 2 + 2


def test_rows_scored_again_are_as_many_as_bounds_leave() -> None:
    """Of normally distributed rows and inputs, at the paper's sizes and narrower ones."""
    made = pytest.importorskip("dsc_kernels.gpu.screen", reason="Triton is not installed")
    g = torch.Generator().manual_seed(0)
    for sizes in (MODELS["paper"], replace(MODELS["paper"], d=1024, k=16)):
        router, x = torch.randn(sizes.atoms, sizes.d, generator=g), torch.randn(60, sizes.d, generator=g)
        screen = made.screen(router)
        error = x.norm(dim=1, keepdim=True) * screen.errors[: sizes.atoms]
        logits = x @ router.T
        reached = (logits - error).topk(sizes.k, dim=1).values[:, -1:]
        found = (logits + error >= reached).sum(dim=1).float().mean()
        assert float(found) == pytest.approx(scored_again(sizes), rel=0.15)


def test_a_screen_pays_where_the_router_is_large_and_tokens_are_few() -> None:
    def gain(name: str, tokens: int) -> float:
        both = (ffn("dsc", MODELS[name], tokens), screened_ffn(MODELS[name], tokens))
        exact, screened = map(seconds, both)
        return exact - screened

    assert gain("paper", 1) < 0 < gain("large", 1)
    assert gain("large", 1) > gain("large", 16) > gain("large", 64) < 0
