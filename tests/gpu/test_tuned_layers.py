"""Layers of a bank with tenants, and silent ones, on the GPU's backend: there they are torch's, and equal plain's."""

from __future__ import annotations

import pytest
import torch

from dsc_kernels import plain
from dsc_kernels.weights import Adapted, AdapterRun, AtomBank, FfnOptions, MlpWeights, Module, Router, Tuning

gpu = pytest.importorskip("dsc_kernels.gpu.layers", reason="triton is missing")
D, HIDDEN, ATOMS, K, TOKENS = 16, 24, 32, 3, 7


def tuning(seed: int) -> Tuning:
    generator = torch.Generator().manual_seed(seed)
    return Tuning(torch.randn(ATOMS, generator=generator), torch.randn(D, generator=generator))


@pytest.mark.parametrize(("silent", "tenants"), [(False, 2), (True, 0), (True, 2)])
def test_tokens_get_what_plain_torch_gives_them(silent: bool, tenants: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_kernels.gpu.compiler.serves", lambda dtype, device: True)  # no kernel is launched here
    generator = torch.Generator().manual_seed(0)
    x, up, down, router, u, v = (
        torch.randn(*shape, generator=generator)
        for shape in ((TOKENS, D), (HIDDEN, D), (D, HIDDEN), (ATOMS, D), (ATOMS, D), (ATOMS, D))
    )
    gamma = torch.zeros(D) if silent else torch.rand(D, generator=generator)
    options = FfnOptions(activation="gelu", k=K, tau=5.0, eps=1e-6, silent=silent)
    parts = MlpWeights(up, None, down), options, Router(router), AtomBank(u, v, gamma)
    modules = [{"atoms": Module(ATOMS, D)}]
    made = [plain.adapter({}, modules, x.dtype, x.device, tunings={0: tuning(seed)}) for seed in range(tenants)]
    runs = [AdapterRun(adapter, 1 + 3 * i, 2) for i, adapter in enumerate(made)]
    adapted = Adapted(runs, 0) if runs else None
    found, expected = (layer(*parts).routed(x, adapted=adapted) for layer in (gpu.Ffn, plain.Ffn))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted.to(got.dtype))
    nobody = [t for t in range(TOKENS) if not any(run.first <= t < run.first + run.length for run in runs)]
    static = plain.Ffn(MlpWeights(up, None, down), FfnOptions(activation="gelu"))(x)
    assert torch.equal(found[0][nobody], static[nobody]) == silent
