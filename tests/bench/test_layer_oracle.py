from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dsc_serve.bench.layer.oracle import expected, verdict
from dsc_serve.bench.layer.systems import PATHS, build_system, layer_config, random_input, random_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "path"), PATHS)
def test_every_system_computes_its_layer(kind: str, path: str, dtype: torch.dtype) -> None:
    config = layer_config("tiny", kind)
    weights = [random_weights(config, seed, dtype) for seed in range(8)]
    system = build_system(config, path, weights, dtype, CPU)
    if system is None:
        pytest.skip("installed without a C++ compiler")
    for batch in (1, 64):
        x = random_input(batch, config.hidden_size, batch, dtype, CPU)
        wanted = [expected(config, w, x) for w in weights]
        seen = verdict([layer(x) for layer in system.layers], wanted, dtype, system.logit_error)
        assert seen.wrong is None and seen.compared >= batch  # of 8 × batch


@pytest.mark.parametrize("part", ["atoms_u", "atoms_v", "gamma", "router.weight", "static.down_proj.weight"])
def test_an_error_in_any_part_of_the_layer_is_seen(part: str) -> None:
    config = layer_config("tiny", "dsc")
    right = random_weights(config, 0, torch.bfloat16)
    wrong = {**right, part: -right[part]}
    x = random_input(64, config.hidden_size, 1, torch.bfloat16, CPU)
    output = expected(config, wrong, x).output
    assert verdict([output], [expected(config, right, x)], torch.bfloat16, 3e-2).wrong


def one_token(**changes: Tensor) -> str | None:
    """What is wrong with a float32 output of 4 numbers whose second token has no clear selection."""
    config = layer_config("tiny", "dense")
    x = random_input(2, config.hidden_size, 0, torch.float32, CPU)
    want = expected(config, random_weights(config, 0, torch.float32), x)
    output = want.output.clone()
    want.margin[1] = 1e-6
    for name, value in changes.items():
        output[0 if name == "clear" else 1] += value
    return verdict([output], [want], torch.float32, 1e-4).wrong


def test_only_tokens_with_a_clear_selection_are_compared_but_all_must_be_finite() -> None:
    assert one_token() is None
    assert one_token(doubtful=torch.tensor(5.0)) is None
    assert one_token(doubtful=torch.tensor(torch.nan)) == "not finite"
    assert "relative error" in str(one_token(clear=torch.tensor(0.01)))


def test_nothing_comparable_and_a_wrong_shape_are_wrong() -> None:
    config = layer_config("tiny", "dense")
    x = random_input(2, config.hidden_size, 0, torch.float32, CPU)
    want = expected(config, random_weights(config, 0, torch.float32), x)
    assert "shape [1, 32], expected [2, 32]" in str(verdict([want.output[:1]], [want], torch.float32, 0).wrong)
    want.margin.zero_()
    assert "nothing could be compared" in str(verdict([want.output], [want], torch.float32, 1e-4).wrong)
