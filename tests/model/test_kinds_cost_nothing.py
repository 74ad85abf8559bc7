"""What kinds of layers cost a step of a model that has none: nothing."""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from support.small_models import small_config, wide_tensors
from torch import Tensor

from dsc_kernels import native
from dsc_kernels.native.extension import kernels
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.decoder import Decoder

pytestmark = pytest.mark.skipif(native.active() is None, reason="there are no native kernels here")
LLAMA: dict[str, Any] = {"norm_type": "rmsnorm", "hidden_act": "silu", "mlp_gated": True}


def decoder(config: ModelConfig) -> Decoder:
    return Decoder(config, wide_tensors(config), torch.float32, torch.device("cpu"))


def step(model: Decoder, requests: int = 2) -> Callable[[], Tensor]:
    """One token of each of some requests, again and again."""
    caches = model.kv_caches(requests, 16)
    zeros = torch.zeros(requests, dtype=torch.int64)
    rows = torch.arange(requests)
    batch = StepBatch(rows + 1, zeros, rows, zeros, rows[:, None].contiguous(), zeros + 1, requests, 1, ())
    return lambda: model.hidden(batch, caches)


def calls_of(work: Callable[[], object]) -> Counter[str]:
    """How often it calls each function of Python's and of C's."""
    counted: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "c_call"):
            counted[frame.f_code.co_qualname if event == "call" else argument.__name__] += 1

    work()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
    return counted


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_a_step_calls_as_little_whatever_the_number_of_layers(kind: str) -> None:
    few, many = (calls_of(step(decoder(small_config(kind, num_hidden_layers=n, **LLAMA)))) for n in (1, 9))
    assert few == many and few["run_stack"] == 1


def test_layers_that_are_told_apart_and_are_alike_call_no_more() -> None:
    kinds = {"layer_kinds": [{"rotation": True}, {}], "layer_pattern": [0, 1]}
    plain, told = (calls_of(step(decoder(small_config("dense", **LLAMA, **changes)))) for changes in ({}, kinds))
    assert plain == told


def test_the_kernels_are_told_of_no_kind_that_a_layer_is_not_of(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is then one comparison with null or 0 for a layer and step."""
    seen: list[dict[str, Any]] = []
    made = kernels.decoder_layer

    def recorded(ffn: object, **arguments: Any) -> object:
        seen.append(arguments)
        return made(ffn, **arguments)

    monkeypatch.setattr(kernels, "decoder_layer", recorded)
    decoder(small_config("dense", **LLAMA))
    off = ("query_norm", "key_norm", "qk_norm_together", "norms", "attention_norm_bias", "qkv_bias", "out_bias")
    assert len(seen) == 2
    for arguments in seen:
        assert {name: arguments[name] for name in off} == dict.fromkeys(off, 0)
        assert arguments["turned"] == arguments["size"]


@pytest.mark.full
@pytest.mark.alone
def test_a_step_takes_no_longer_where_layers_are_told_as_kinds() -> None:
    """Medians of steps by turns, of a model as large as the paper's: within 3 %."""
    sizes: dict[str, Any] = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "head_dim": 64}
    ffn = {"size": 1024}
    kinds = {"layer_kinds": [{"rotation": True}, {}], "layer_pattern": [0, 1]}
    steps = [
        step(decoder(small_config("dense", ffn, num_key_value_heads=6, **sizes, **LLAMA, **changes)))
        for changes in ({}, kinds)
    ]
    times: list[list[float]] = [[], []]
    for _ in range(400):
        for own, run in zip(times, steps, strict=True):
            began = time.perf_counter()
            run()
            own.append(time.perf_counter() - began)
    plain, told = map(statistics.median, times)
    print(f"{1e6 * plain:.0f} µs a step of plain layers, {1e6 * told:.0f} of the same told as kinds")
    assert told < 1.03 * plain
