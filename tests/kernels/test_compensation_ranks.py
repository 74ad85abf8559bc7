"""Compensations of high ranks, such as those of queries, keys and values together: what plain torch gives."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import naive_decoder
from support.native_cases import DTYPES, random
from support.quantised_cases import bound, exact, quantised
from support.small_models import small_config, wide_tensors
from test_adapted_steps import prompts_of, step
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.quantised import QuantisedWeight
from dsc_serve.model.checkpoint import load_model, save_checkpoint
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.quantised_tensor import QuantisedTensor
from dsc_serve.model.rounding import rounded

pytestmark = [
    pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler"),
    pytest.mark.usefixtures("instruction_set"),
]
CPU = torch.device("cpu")
RANK = 100  # three times of which native kernels have to add up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 5, 97])
@pytest.mark.parametrize("rank", [256, 257, 700, 3072])
def test_a_product_adds_its_compensation_whatever_the_rank(rank: int, batch: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(rank)
    weight, x = quantised(g, 37, 70, rank=rank, dtype=dtype), random(g, dtype, batch, 70)
    layer = native.Linear(weight)
    got = layer(x, out_dtype=torch.float32)
    assert bool(((got.double() - exact(x, weight)).abs() <= bound(x, weight)).all())
    without = exact(x, replace(weight, compensation=None))
    assert bool(((got.double() - without).abs() > bound(x, weight)).any())
    for count in {1, batch // 2} - {0}:
        assert torch.equal(layer(x[:count], out_dtype=torch.float32), got[:count])


def test_the_highest_rank_is_computed_and_the_next_refused() -> None:
    g, most = torch.Generator().manual_seed(0), native.kernels.MAX_RANK
    weight, x = quantised(g, 20, 18, rank=most), random(g, torch.float32, 3, 18)
    got = native.Linear(weight)(x)
    assert bool(((got.double() - exact(x, weight)).abs() <= bound(x, weight)).all())
    with pytest.raises(ValueError, match=f"rank is {most + 1}; it may be at most {most}"):
        native.Linear(quantised(g, 8, 18, rank=most + 1))


def compensated(config: ModelConfig) -> tuple[dict[str, Tensor | QuantisedWeight], dict[str, Tensor]]:
    """Weights whose projections of attention are compensated, and what they then are."""
    g, stored, wide = torch.Generator().manual_seed(1), dict[str, Tensor | QuantisedWeight](), wide_tensors(config)
    for name, tensor in wide.items():
        stored[name] = tensor
        if "self_attn" in name and tensor.dim() == 2:
            left, right = torch.randn(tensor.shape[0], RANK, generator=g), torch.randn(RANK, 32, generator=g)
            pair = (left / RANK**0.5).half(), (right / 32**0.5).half()
            stored[name] = own = replace(rounded(tensor, 8), compensation=pair)
            wide[name] = own.whole()
    return stored, wide


def test_compensations_of_queries_keys_and_values_add_up() -> None:
    config = small_config("dense")
    stored, wide = compensated(config)
    model = Decoder(config, stored, torch.float32, CPU)
    assert model.stack is not None
    prompts = prompts_of((1, 7, 30))
    for prompt, got in zip(prompts, step(model, prompts, [None] * 3), strict=True):
        want = naive_decoder.logits(config, wide, prompt)
        assert float((got.double() - want).norm()) < 0.06 * float(want.norm())


def test_what_kernels_refuse_is_told_with_the_file_and_the_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("dense")
    tensors: dict[str, Tensor | QuantisedTensor] = {}
    for name, own in compensated(config)[0].items():
        if isinstance(own, QuantisedWeight):
            left, right = own.compensation or (None, None)
            own = QuantisedTensor(own.values, own.scales, own.minimums, own.bits, own.group, own.shape, left, right)
        tensors[name] = own
    save_checkpoint(config, tensors, tmp_path)
    assert load_model(tmp_path, "float32", CPU).stack is not None
    monkeypatch.setattr(native.kernels, "MAX_RANK", 299)
    with pytest.raises(CheckpointError) as refused:
        load_model(tmp_path, "float32", CPU)
    what = "a compensation's rank is 300; it may be at most 299"
    assert str(refused.value) == f"{tmp_path}: model.layers.0.self_attn: {what}"
