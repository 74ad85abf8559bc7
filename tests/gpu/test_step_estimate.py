"""The estimate of a step has as many launches as are counted, and the floor of its bytes."""

from __future__ import annotations

import pytest
from click.testing import CliRunner
from support.launches import WANTED

from dsc_kernels.step_estimate import LAUNCHES_BEFORE, MODELS, estimate, layer, steps_command


@pytest.mark.parametrize("kind", LAUNCHES_BEFORE)
def test_a_layer_has_the_launches_that_are_counted(kind: str) -> None:
    assert len(layer(kind, MODELS["paper"], 1)) == WANTED[kind][0]


@pytest.mark.parametrize(("tokens", "floor_ms"), [(1, 0.0142), (16, 0.0188), (64, 0.0334)])
def test_the_floor_of_the_papers_dsc_is_its_bytes(tokens: int, floor_ms: float) -> None:
    """57.0, 75.2 and 133.4 MB with each weight that is touched once."""
    found = estimate("dsc", MODELS["paper"], tokens, 4e12, 7e14, 2e-6)
    assert found.floor_ms == pytest.approx(floor_ms, rel=0.02)
    assert found.now_ms - found.floor_ms == pytest.approx(2e-3 * found.launches)
    assert found.before_ms > found.now_ms


def test_the_command_prints_a_table() -> None:
    result = CliRunner().invoke(steps_command, ["--launch-us", "0"])
    assert result.exit_code == 0 and len(result.output.splitlines()) == 2 + 4 + 3
