from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import SMALL_FFN, small_config, wide_tensors

from dsc_kernels import native
from dsc_kernels.native import head
from dsc_serve.bench.step import inspect_model
from dsc_serve.bench.step.inspect_model import Routers, bytes_read, inspect_folder
from dsc_serve.model.checkpoint import save_checkpoint
from dsc_serve.model.decoder import parameter_counts


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TIMED_STEPS", "ROUTED_STEPS"):
        monkeypatch.setattr(inspect_model, name, 3)


@pytest.mark.parametrize("kind", ["dsc", *(pytest.param(k, marks=pytest.mark.full) for k in SMALL_FFN if k != "dsc")])
def test_a_step_is_taken_apart(tmp_path: Path, kind: str) -> None:
    config = small_config(kind, max_position_embeddings=256)
    save_checkpoint(config, wide_tensors(config), tmp_path)
    found = inspect_folder(tmp_path, (1, 3), 1, "auto")
    description, steps = found["description"], found["steps"]
    assert isinstance(description, dict) and isinstance(steps, dict) and set(steps) == {"1", "3"}
    assert (description["parameters"], description["active"]) == parameter_counts(config)
    for running, step in steps.items():
        times = step["milliseconds"]
        assert set(times) == {"norms", "attention", "ffn", "head", "rest", "step"}
        assert all(0 < value <= times["step"] for value in times.values())
        picked = {"dsc": 3, "moe": 2, "molora": 2, "dense": 0}[kind]
        assert picked <= step["distinct"] <= picked * int(running)
    assert steps["1"]["distinct"] == {"dsc": 3, "moe": 2, "molora": 2, "dense": 0}[kind]


def test_bytes_are_those_of_the_rows_that_a_step_touches() -> None:
    d, layers = 32, 2
    moe = bytes_read(small_config("moe"), 4, 3.5, 2, int8_router=False, int8_head=False)
    assert moe == {
        "router": layers * 5 * d * 2,
        "experts": layers * 3.5 * 2 * 20 * d * 2,
        "attention": layers * 4 * d * d * 2,
        "head": 61 * d * 2,
    }
    exact = bytes_read(small_config("dsc"), 4, 7, 2, int8_router=False, int8_head=False)
    int8 = bytes_read(small_config("dsc"), 4, 7, 2, int8_router=True, int8_head=True)
    assert exact["head"] == 2 * int8["head"]
    assert exact["router"] == layers * 37 * d * 2 == 2 * int8["router"]
    assert exact["bank"] == layers * 2 * 7 * d * 2 == int8["bank"]
    assert "again" in int8 and "again" not in exact


def test_distinct_picks_are_counted_with_the_stored_router(tmp_path: Path) -> None:
    config = small_config("moe")
    tensors = wide_tensors(config)
    save_checkpoint(config, tensors, tmp_path)
    x = torch.randn(6, 32)
    at = "model.layers.1.mlp."
    normed = torch.nn.functional.layer_norm(
        x, (32,), tensors[f"{at}router_norm.weight"], tensors[f"{at}router_norm.bias"], config.norm_eps
    )
    picked = (normed @ tensors[f"{at}router.weight"].T).topk(2, dim=-1).indices
    assert Routers(tmp_path, config).distinct(1, x) == len(set(picked.flatten().tolist()))


@pytest.mark.skipif(not native.available(), reason="this processor has no kernels")
def test_bytes_follow_what_the_engine_chose_not_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("dsc", max_position_embeddings=256)
    save_checkpoint(config, {name: tensor.bfloat16() for name, tensor in wide_tensors(config).items()}, tmp_path)
    monkeypatch.setattr(native.layers, "screens", lambda router, k: True)  # as "auto" decides for wide routers
    monkeypatch.setattr(head, "screens_head", lambda words, d: True)
    found = inspect_folder(tmp_path, (1,), 1, "auto")
    steps: Any = found["steps"]
    assert steps["1"]["bytes"]["router"] == 2 * 37 * 32 and steps["1"]["bytes"]["head"] == 61 * 32
