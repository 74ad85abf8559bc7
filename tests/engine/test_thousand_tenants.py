"""A thousand tenants of a bank as large as SmolLM2's, all in memory and each served, by a runner without a model."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from support.fake_runner import VOCABULARY, alone, fake_engine

from dsc_kernels import ops
from dsc_kernels.backend import Basis, BoundAdapter
from dsc_kernels.weights import Pair, Place, Tuning, Update
from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.engine.adapter_folder import AdapterFolder
from dsc_serve.engine.adapters import Adapters
from dsc_serve.machine import resident_bytes
from dsc_serve.model.adapter import BankTenant, module_shapes
from dsc_serve.model.adapter_kinds import read_adapter
from dsc_serve.model.config import DscConfig, ModelConfig
from dsc_serve.model.decoder import modules_of
from dsc_serve.model.graft import branch_bytes
from dsc_serve.model.tenant import write_tenant
from dsc_serve.sampling_params import SamplingParams

LAYERS, WIDTH, ATOMS = 30, 576, 1024
BANK = "0123456789abcdef"
SMOLLM2 = ModelConfig.model_validate(
    {
        "vocab_size": 49152,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 2048,
        "norm_type": "rmsnorm",
        "hidden_act": "silu",
        "mlp_gated": True,
        "ffn": {"kind": "dsc", "num_atoms": ATOMS, "atoms_per_token": 4, "static_size": 1536, "bank": BANK},
    }
)


class WeightlessDecoder:
    """Makes of tenants what the kernels read, and of a model nothing."""

    modules = modules_of(SMOLLM2)

    def basis(self, pairs: Mapping[Place, Pair]) -> Basis:
        raise AssertionError("no adapter here has any")

    def adapter(
        self, updates: Mapping[Place, Update], basis: Basis | None = None, tenant: BankTenant | None = None
    ) -> BoundAdapter:
        assert tenant is not None
        own = {layer: Tuning(tenant.bias[layer], tenant.gamma[layer]) for layer in range(LAYERS)}
        return ops.adapter(updates, self.modules, torch.bfloat16, torch.device("cpu"), None, own)

    def summed(self, parts: Sequence[tuple[BoundAdapter, float]]) -> BoundAdapter:
        raise AssertionError("nothing is composed here")


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.full)])
def test_tenants_take_what_their_biases_and_scales_take_and_all_are_served(count: int, tmp_path: Path) -> None:
    assert isinstance(SMOLLM2.ffn, DscConfig)
    for i in range(count):
        g = torch.Generator().manual_seed(i)
        bias, gamma = torch.randn(LAYERS, ATOMS, generator=g), torch.randn(LAYERS, WIDTH, generator=g)
        write_tenant(tmp_path / f"t{i:04d}", bias, gamma, BANK)
    size = 4 * LAYERS * (ATOMS + WIDTH)
    folder = AdapterFolder(tmp_path, lambda one: read_adapter(one, SMOLLM2))
    adapters = Adapters(folder, WeightlessDecoder(), int(1.01 * size * count), "SmolLM2")
    engine = fake_engine(blocks=200, max_running=32, step_tokens=128, adapters=adapters)
    names = [f"t{i:04d}" for i in range(count)]
    engine.arrivals.check([AdapterChoice.of(names[0])], engine.step)  # what the first needs beside its numbers
    gc.collect()
    before = resident_bytes()
    engine.arrivals.check([AdapterChoice.of(name) for name in names], engine.step)
    gc.collect()
    assert adapters.in_memory == count and adapters.counts.evictions == 0
    assert size * count <= adapters.nbytes <= 1.01 * size * count
    assert resident_bytes() - before < 1.25 * size * count + 16e6
    bank, each = branch_bytes(SMOLLM2, 2)
    assert each == size
    lora = sum(2 * 16 * sum(shape) for shape in module_shapes(SMOLLM2).values())
    assert 9.7e6 < lora < 9.9e6, "of rank 16 in bfloat16"
    assert (1000 / count) * adapters.nbytes + bank < 0.3e9 < 1000 * lora / 30
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    for i, name in enumerate(names):
        engine.add(name, [i % VOCABULARY, 3, 5], params, adapter=AdapterChoice.of(name))
    found: dict[str, list[int]] = {name: [] for name in names}
    while engine.has_work:
        for delta in engine.step():
            found[delta.request_id] += delta.token_ids
    digests = {info.name: info.digest for info in adapters.infos()}
    assert len(set(digests.values())) == count
    for i, name in enumerate(names):
        assert found[name] == alone([i % VOCABULARY, 3, 5], 4, (), digests[name])
    assert adapters.counts.evictions == 0 and adapters.counts.loads == count
    assert engine.adapter_report.distinct.counts[5] > 0, "more than 16 different ones in a step"
    engine.close()
