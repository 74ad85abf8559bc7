"""Engines whose keys and values are in int8: near the others, and alike whatever happens to a request's blocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.drafts import FreeDrafts, all_there_are

from dsc_kernels import native, ops
from dsc_serve import LLM, SamplingParams
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.kv_size import pool_blocks
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.engine.room import check_room

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[(7 * i + 3 * j) % 61 for j in range(20)] for i in range(6)]
INT8 = {"dtype": "float32", "kv_dtype": "int8", "threads": 1, "block_size": 4}


WINDOWS = {"layer_kinds": [{"window": 9}, {}], "layer_pattern": [0, 1], "num_hidden_layers": 4, "attention_cap": 3.0}
LATENT = {"num_key_value_heads": 1, "head_dim": 24, "latent_size": 16, "qk_norm": "latent", "rotary_dim": 8}
VARIANTS: dict[str, dict[str, Any]] = {"whole": {"num_key_value_heads": 1}, "windows": WINDOWS, "latent": LATENT}


@pytest.fixture
def folder(small_model: Callable[..., Path]) -> str:
    return str(small_model("dense", num_key_value_heads=1))


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, small_model: Callable[..., Path]) -> str:
    return str(small_model("dense", **VARIANTS[request.param]))


def tokens(folder: str, **settings: Any) -> list[list[int]]:
    with LLM(folder, **{**INT8, **settings}) as llm:
        return [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize("kernels", ["plain", "auto"])
def test_logits_are_near_those_of_a_wide_cache(variant: str, kernels: str) -> None:
    with LLM(variant, **{**INT8, "kv_dtype": "auto", "kernels": kernels}) as llm:
        want = llm.logits(PROMPTS[:1])[0]
    with LLM(variant, **INT8, kernels=kernels) as llm:
        assert {part.dtype for cache in llm.engine.runner.kv_caches for part in cache} == {torch.int8}  # type: ignore[attr-defined]
        got = llm.logits(PROMPTS[:1])[0]
    error = float((got - want).norm() / want.norm())
    assert 0 < error < 0.02


@pytest.mark.skipif(native.active() is None, reason="installed without a C++ compiler")
def test_the_stack_computes_what_its_layers_do(variant: str) -> None:
    with LLM(variant, **INT8, prefix_cache=False) as llm:
        model: Any = llm.engine.runner.model  # type: ignore[attr-defined]
        want = llm.logits(PROMPTS[:2])
        assert model.stack is not None
        model.stack = None
        got = llm.logits(PROMPTS[:2])
    for one, other in zip(want, got, strict=True):
        torch.testing.assert_close(one, other, atol=2e-3, rtol=1e-3)


def test_preemption_prefixes_chunks_and_drafts_change_nothing(variant: str) -> None:
    want = tokens(variant, kv_tokens=512, prefix_cache=False)
    assert tokens(variant, kv_tokens=72, max_running=4) == want  # so few that requests give way
    assert tokens(variant, kv_tokens=512, step_tokens=8, max_running=8) == want
    assert tokens(variant, kv_tokens=512, speculation="auto") == want
    with LLM(variant, **INT8, kv_tokens=512) as llm:
        for _ in range(2):
            again = [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)]
            assert again == want


def test_a_draft_model_keeps_its_own_in_int8_too(variant: str) -> None:
    want = tokens(variant, kv_tokens=512)
    with LLM(variant, **INT8, kv_tokens=512, speculation="auto", draft_model=variant, max_drafts=3) as llm:
        engine: Any = llm.engine
        drafter, engine.scheduler.step_time.drafts = engine.drafter, FreeDrafts()
        drafter._choose, drafter._kinds = all_there_are, {COMPANION: drafter._kinds[COMPANION]}
        got = [list(output.token_ids) for output in llm.generate(PROMPTS, GREEDY)]
        companion = drafter._kinds[COMPANION].together
        caches = [*engine.runner.kv_caches, *companion._runner.kv_caches]
        report = engine.drafter.report
    assert {cache.keys.dtype for cache in caches} == {torch.int8}
    assert report.accepted[COMPANION] > 0.9 * report.drafted[COMPANION] > 0
    assert got == want


def test_the_pool_is_sized_by_real_bytes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.engine.kv_size.available_memory", lambda: 2**19)
    model = prepare_model(EngineConfig(model=folder, dtype="float32"))
    wide, narrow = (
        pool_blocks(model, EngineConfig(model=folder, dtype="float32", kv_dtype=kind, block_size=4))
        for kind in ("auto", "int8")
    )
    assert narrow == pytest.approx(wide * 64 / 20, rel=0.01)  # heads of 16: 64 bytes, and 16 with a scale of 4
    monkeypatch.setattr("dsc_serve.engine.room.available_memory", lambda: 1 << 17)
    check_room(Path(folder), EngineConfig(model=folder, kv_dtype="int8", kv_tokens=1024, max_running=1))
    with pytest.raises(ConfigError, match="kv_tokens is 1024"):
        check_room(Path(folder), EngineConfig(model=folder, kv_tokens=1024, max_running=1))


def test_inputs_of_products_in_int8_are_refused_where_nothing_rounds_them(folder: str) -> None:
    try:
        with pytest.raises(ConfigError, match=r"activations is 'int8', which native .* allowed with plain .*: int16"):
            prepare_model(EngineConfig(model=folder, activations="int8", kernels="plain"))
    finally:
        ops.use("auto")


def test_where_it_is_not_served_it_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsc_serve.engine.preparation.INT8_KV", ())
    with pytest.raises(ConfigError, match=r"kv_dtype is 'int8', which native kernels and plain torch serve; allowed"):
        prepare_model(EngineConfig(model=folder, kv_dtype="int8"))
