"""Random models follow the paper's initialisation and every --set is checked."""

from __future__ import annotations

import pytest
import torch
from support.small_models import small_config

from dsc_serve.model.config import CheckpointError, DscConfig
from dsc_serve.model.initial import changed_config, initial_tensors, preset_config


def test_initialisation() -> None:
    config = small_config(hidden_size=256, head_dim=128, num_hidden_layers=8, ffn={"num_atoms": 64, "static_size": 64})
    tensors = dict(initial_tensors(config, seed=0, dtype=torch.float32))
    u = tensors["model.layers.3.mlp.atoms_u"]
    torch.testing.assert_close(u @ u.T, torch.eye(64) * 0.02**2, atol=1e-6, rtol=0)
    assert torch.equal(tensors["model.layers.3.mlp.gamma"], torch.full((256,), 0.1))
    assert torch.equal(tensors["model.norm.weight"], torch.ones(256))
    assert not tensors["model.layers.0.mlp.router.bias"].any()
    for name, std in [
        ("self_attn.q_proj.weight", 0.02),
        ("self_attn.o_proj.weight", 0.005),
        ("mlp.router.weight", 0.02),
        ("mlp.static.down_proj.weight", 0.02),
    ]:
        assert float(tensors[f"model.layers.2.{name}"].std()) == pytest.approx(std, rel=0.05)


def test_the_seed_alone_decides() -> None:
    first, again, other = (dict(initial_tensors(small_config(), s, torch.float32)) for s in (1, 1, 2))
    name = "model.layers.0.mlp.router.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_set_changes_fields() -> None:
    config = changed_config(preset_config("paper", "dsc"), ["ffn.num_atoms=512", "norm_type=rmsnorm", "mlp_gated=true"])
    assert isinstance(config.ffn, DscConfig)
    assert (config.ffn.num_atoms, config.norm_type, config.mlp_gated) == (512, "rmsnorm", True)


@pytest.mark.parametrize(
    "change", ["ffn.num_atom=5", "ffn.num_atoms", "hidden_size=-1", "ffn.kind=moe", "x=1", "ffn=1"]
)
def test_bad_set_is_named(change: str) -> None:
    with pytest.raises(CheckpointError, match="--set"):
        changed_config(preset_config("paper", "dsc"), [change])
