"""Rope scalings against transformers' own functions, where it is installed."""

from __future__ import annotations

import pytest
import torch
from pydantic import TypeAdapter

from dsc_serve.model.rope import RopeScaling, YarnRope, rope_table

SCALINGS = [
    {"rope_type": "linear", "factor": 3.5},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024, "attention_factor": 0.8},
    {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 512,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
        "truncate": False,
    },
]


def test_yarn_scales_attention() -> None:
    """A position of 0 turns nothing: its cosines are the magnitude itself."""
    scaling = YarnRope(rope_type="yarn", factor=10.0, original_max_position_embeddings=64)
    table = rope_table(16, 8, 10000.0, scaling)
    torch.testing.assert_close(table[0, 0], torch.full((8,), 1.2302585))


@pytest.mark.full
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(("head_dim", "theta"), [(64, 10000.0), (128, 500000.0)])
def test_equals_transformers(scaling: dict[str, object], head_dim: int, theta: float) -> None:
    utilities = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")
    llama = pytest.importorskip("transformers").LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        max_position_embeddings=4096,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    frequencies, magnitude = utilities.ROPE_INIT_FUNCTIONS[scaling["rope_type"]](llama, torch.device("cpu"))
    table = rope_table(head_dim, 4096, theta, TypeAdapter(RopeScaling).validate_python(scaling))
    angles = torch.arange(4096, dtype=torch.float64)[:, None] * frequencies.double()
    expected = magnitude * torch.stack((angles.cos(), angles.sin()), dim=1)
    assert (table.double() - expected).abs().max() < 4096 * 1e-6  # the frequencies there are float32
