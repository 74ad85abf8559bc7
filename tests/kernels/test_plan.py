"""`plan.choose` by hand-computed costs, the planner's memory of it, and calibration kept between runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dsc_kernels import native
from dsc_kernels.plan import DeviceConstants, Level, Planner, Shape, Sharing, choose, layer_seconds
from dsc_serve.cli import main
from dsc_serve.config import EngineConfig, calibration_file
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.model.decoder import dsc_layers

NEAR, FAR = 1e-11, 5e-11
CONSTANTS = DeviceConstants(
    gather=(Level(1e6, NEAR), Level(math.inf, FAR)),
    stream=1e10,
    flops={"float32": 1e12},
    order_token=0,
    order_pick=1e-9,
)
SHAPE = Shape(atoms=4096, k=8, d=1024, hidden=512, dtype=torch.bfloat16)  # 4,096 bytes an atom
SHARING = Sharing(arrival=0.9, grouped=0.4, step=0.5)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    threads = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(threads)


def test_costs_are_those_computed_by_hand() -> None:
    """256 tokens pick 2,048 rows of 4,096 bytes; 1,024 different ones are 4.2 MB, far; two neighbours' 64 KB, near."""
    choice = choose(256, SHAPE, CONSTANTS, SHARING)
    moved = 2048 * 4096
    assert choice.seconds["gather"] == pytest.approx(moved * (0.9 * FAR + 0.1 * NEAR))
    assert choice.seconds["grouped"] == pytest.approx(moved * (0.4 * FAR + 0.6 * NEAR) + 2048e-9)
    assert choice.path == "grouped"
    assert choice.reason == "ρ 0.90 → 0.40 over 4.2 MB of rows saves 43% of the composition"


@pytest.mark.parametrize(
    ("batch", "sharing", "constants", "reason"),
    [
        (1, SHARING, CONSTANTS, "one token"),
        (256, None, CONSTANTS, "ordering does not lower ρ"),
        (256, Sharing(0.9, 0.9, 0.5), CONSTANTS, "ordering does not lower ρ"),
        (256, Sharing(0.9, 0.87, 0.5), CONSTANTS, "less than 5%"),
        (16, SHARING, CONSTANTS, "as near as a neighbour's"),
        (256, SHARING, DeviceConstants(gather=CONSTANTS.gather, order_pick=1e-6), "less than 5%"),
    ],
)
def test_grouping_is_left_where_it_does_not_pay(
    batch: int, sharing: Sharing | None, constants: DeviceConstants, reason: str
) -> None:
    choice = choose(batch, SHAPE, constants, sharing)
    assert choice.path == "gather" and reason in choice.reason


def test_a_layers_time_has_its_phases() -> None:
    parts = layer_seconds(256, SHAPE, CONSTANTS, SHARING)
    assert parts["router"] == pytest.approx(max(4096 * 1024 * 2 / 1e10, 2 * 256 * 4096 * 1024 / 1e12))
    assert parts["static"] == pytest.approx(2 * max(512 * 1024 * 2 / 1e10, 2 * 256 * 512 * 1024 / 1e12))
    assert parts["composition"] == pytest.approx(choose(256, SHAPE, CONSTANTS, SHARING).seconds["grouped"])


def test_a_planner_follows_its_mode_and_what_it_has_seen() -> None:
    auto = Planner("auto", SHAPE, CONSTANTS)
    assert not auto.grouped(256)
    auto.sharing = SHARING
    assert auto.grouped(256) and not auto.grouped(16) and not auto.grouped(1)
    assert auto.tiles == 16
    auto.sharing = Sharing(0.9, 0.9, 0.5)
    assert not auto.grouped(256)
    always, off = Planner("always", SHAPE, None), Planner("off", SHAPE, CONSTANTS)
    assert always.grouped(17) and always.tiles == 2 and not always.grouped(1)
    off.sharing = SHARING
    assert not off.grouped(256)
    unknown = Planner("auto", SHAPE, None)
    unknown.sharing = SHARING
    assert not unknown.grouped(256) and "not been calibrated" in unknown.choice(256).reason
    with pytest.raises(ValueError, match="grouping 'some' is not known; allowed: auto, always, off"):
        Planner("some", SHAPE, CONSTANTS)  # type: ignore[arg-type]


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler: plain torch would take long")
def test_calibration_is_kept_and_used(cache: Path, small_model: Callable[..., Path]) -> None:
    config = EngineConfig(model=str(small_model()), threads=1)

    def source() -> str:
        planner = dsc_layers(prepare_model(config))[0].planner
        assert planner is not None and planner.constants is not None
        return planner.constants.source

    assert source() == "defaults"
    done = CliRunner().invoke(main, ["kernels", "calibrate", "--threads", "1", "--dtype", "float32"])
    assert done.exit_code == 0, done.output
    assert "GB/s" in done.output and "of the layer" in done.output
    assert calibration_file().is_relative_to(cache)
    assert source().startswith("measured 20")
    calibration_file().write_text("not json")
    assert source() == "defaults"
