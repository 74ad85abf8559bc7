"""Admission, failures and the ends of requests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.fake_runner import fake_engine

from dsc_kernels import native
from dsc_serve import LLM, SamplingParams
from dsc_serve.config import ConfigError, EngineConfig
from dsc_serve.engine import kv_size
from dsc_serve.engine.kv_size import pool_blocks
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.scheduling_params import SchedulingParams

GREEDY = SamplingParams(temperature=0, max_tokens=4)


def run(engine: object) -> dict[str, tuple[list[int], str | None]]:
    news: dict[str, tuple[list[int], str | None]] = {}
    while engine.has_work:  # type: ignore[attr-defined]
        for delta in engine.step():  # type: ignore[attr-defined]
            tokens, _ = news.get(delta.request_id, ([], None))
            news[delta.request_id] = (tokens + delta.token_ids, delta.finish_reason)
    return news


@pytest.mark.parametrize(
    ("prompt", "params", "field", "message"),
    [
        ([], GREEDY, "prompt", "prompt is empty"),
        ([29], GREEDY, "prompt", "token id 29; allowed: 0 to 28"),
        ([-1], GREEDY, "prompt", "token id -1"),
        ([1] * 49, SamplingParams(max_tokens=0), "prompt", "prompt has 49 tokens; the KV pool holds 48"),
        ([1] * 46, GREEDY, "max_tokens", "together they may be at most 48"),
        ([1] * 48, SamplingParams(max_tokens=None), "prompt", "fills the KV pool"),
        ([1], SamplingParams(logit_bias={29: 1.0}), "logit_bias", "token id 29"),
        ([1], SamplingParams(stop_token_ids=(40,)), "stop_token_ids", "token id 40"),
    ],
)
def test_what_could_never_finish_is_refused(
    prompt: list[int], params: SamplingParams, field: str, message: str
) -> None:
    engine = fake_engine(blocks=12, block_size=4)
    with pytest.raises(ParameterError, match=message) as caught:
        engine.add("a", prompt, params)
    assert caught.value.field == field
    assert not engine.has_work


def test_the_context_bounds_too() -> None:
    engine = fake_engine(blocks=100, context=20)
    with pytest.raises(ParameterError, match="prompt has 21 tokens; the model's context holds 20"):
        engine.add("a", [1] * 21, GREEDY)
    assert engine.add("b", [1] * 15, SamplingParams(max_tokens=None)).max_tokens == 5


def test_an_id_in_use_is_refused_and_the_first_request_unharmed() -> None:
    engine = fake_engine()
    engine.add("a", [1, 2], GREEDY)
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add("a", [3], GREEDY)
    assert len(run(engine)["a"][0]) > 0


def test_a_failing_step_ends_its_requests_with_the_reason() -> None:
    engine = fake_engine(strict=False, fail_on=frozenset({"bad"}))
    engine.add("bad", [1, 2], GREEDY)
    news = {d.request_id: d for d in engine.step()}
    assert news["bad"].finish_reason == "error"
    assert "RuntimeError: out of luck" in news["bad"].error
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    engine.add("good", [1, 2], GREEDY)
    assert run(engine)["good"][1] in ("stop", "length")


def test_lost_blocks_are_raised_in_tests_and_repaired_in_production() -> None:
    for strict in (True, False):
        engine = fake_engine(strict=strict)
        engine.add("a", [1, 2], GREEDY)
        engine.scheduler.pool.allocate(1)  # leaked: nobody owns it
        if strict:
            with pytest.raises(AssertionError, match="12 KV blocks, but"):
                run(engine)
        else:
            run(engine)
            assert engine.counters.repairs == 1
            assert engine.scheduler.pool.available == engine.scheduler.pool.total


def test_decoding_requests_get_their_token_beside_a_long_prompt() -> None:
    engine = fake_engine(blocks=40, step_tokens=8, max_running=4)
    engine.add("short", [1], SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add("long", [2] * 40, GREEDY)
    for _ in range(5):
        assert "short" in {d.request_id for d in engine.step()}


def test_settings_that_make_no_sense_are_named() -> None:
    for field, value in [("dtype", "int8"), ("device", "tpu"), ("max_running", 0), ("step_tokens", 8)]:
        with pytest.raises(ConfigError, match=field):
            EngineConfig(**{field: value})
    with pytest.raises(ConfigError, match="policy 'nope' is not known; allowed: fcfs"):
        fake_engine(policy="nope")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_named(small_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="finds no CUDA device"):
        LLM(str(small_model()), device="cuda")


@pytest.mark.parametrize("name", ["router_precision", "head_precision"])
def test_a_precision_that_the_kernels_do_not_have_is_refused(name: str, small_model: Callable[..., Path]) -> None:
    settings: dict[str, Any] = {"model": str(small_model()), name: "int8-certified"}
    with pytest.raises(ConfigError, match=rf"{name} is 'int8-certified', which .*plain torch.*: auto, exact"):
        prepare_model(EngineConfig(kernels="plain", **settings))
    for kernels in native.available():
        prepare_model(EngineConfig(kernels=kernels, **settings))
    prepare_model(EngineConfig())  # these are settings of the whole process


@pytest.mark.skipif(native.active() is None, reason="the screen is native")
def test_a_router_that_is_not_screened_though_it_is_asked_for_is_refused(small_model: Callable[..., Path]) -> None:
    config = EngineConfig(
        model=str(small_model("dsc", {"num_atoms": 80, "atoms_per_token": 65})), router_precision="int8-certified"
    )
    with pytest.raises(ConfigError, match=r"router_precision is 'int8-certified', which .* 64 atoms .*: auto, exact"):
        prepare_model(config)
    prepare_model(EngineConfig())


def test_a_pool_of_one_context_that_takes_more_than_its_share_is_told(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = EngineConfig(model=str(small_model()), max_running=2)
    model, one = prepare_model(config), 2 * 2 * 32 * 4 * 48
    for free, tokens, told in ((50 * one, 96, 0), (5 * one, 48, 0), (5 * one - 1, 48, 1), (0, 48, 2)):
        monkeypatch.setattr(kv_size, "available_memory", lambda free=free: free)
        assert pool_blocks(model, config) * config.block_size == tokens
        assert len(caplog.records) == told
    assert "KV pool's 48 tokens, one whole context, are more than 20 % of the 0 MiB" in caplog.text


def test_crowded_real_model_gives_the_same_tokens_as_alone_under_every_policy(
    small_model: Callable[..., Path],
) -> None:
    folder = str(small_model())
    generator = torch.Generator().manual_seed(0)
    shared = torch.randint(61, (9,), generator=generator).tolist()
    lengths = torch.randint(1, 20, (12,), generator=generator).tolist()
    prompts = [torch.randint(61, (length,), generator=generator).tolist() for length in lengths]
    prompts += [[*shared, i] for i in range(4)]
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    with LLM(folder, dtype="float32") as llm:
        alone = [llm.generate([p], params)[0].token_ids for p in prompts]
        margins = [decided(llm, p, ids) for p, ids in zip(prompts, alone, strict=True)]
    assert min(margins) > 0, "no token of these is decided by more than the arithmetic's error"
    for policy in POLICIES:
        # no chunk is cut by how long steps take: what is planned, and so what the cache holds, is the same in each run
        tight = {"kv_tokens": 64, "block_size": 4, "step_tokens": 16, "max_running": 8, "itl_target_ms": 60_000.0}
        with LLM(folder, dtype="float32", policy=policy, **tight) as llm:
            tokens: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
            for i, prompt in enumerate(prompts):
                llm.engine.add(str(i), prompt, params, scheduling=SchedulingParams(tenant="ab"[i % 2], priority=-i % 3))
                for delta in llm.engine.step():
                    tokens[delta.request_id] += delta.token_ids
            while llm.engine.has_work:
                for delta in llm.engine.step():
                    tokens[delta.request_id] += delta.token_ids
            assert llm.engine.scheduler.preemptions > 0
            assert llm.engine.scheduler.cached_tokens > 0
        for i, (ids, sure) in enumerate(zip(alone, margins, strict=True)):
            assert tokens[str(i)][:sure] == ids[:sure], (policy, i)


def decided(llm: LLM, prompt: list[int], ids: list[int]) -> int:
    """How many of the greedy tokens in a row have a margin above the arithmetic's error."""
    rows = llm.logits([prompt + ids])[0][len(prompt) - 1 : -1]
    top = rows.topk(2, dim=1).values
    sure = (top[:, 0] - top[:, 1] > 1e-4).tolist()
    return sure.index(False) if False in sure else len(sure)


def test_stream_yields_what_generate_returns(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model())) as llm:
        params = SamplingParams(seed=3, max_tokens=12, ignore_eos=True)
        (whole,) = llm.generate([[1, 2, 3]], params)
        parts = list(llm.stream([1, 2, 3], params))
        first, second = llm.stream([1, 2, 3], params), llm.stream([4, 5], params)
        mixed = [next(first).token_ids, next(second).token_ids, *(p.token_ids for p in first)]
        assert sum(1 for _ in second) == 11
    assert [t for p in parts for t in p.token_ids] == whole.token_ids
    assert [p.finish_reason for p in parts] == [None] * 11 + ["length"]
    assert [t for i, ids in enumerate(mixed) for t in ids if i != 1] == whole.token_ids


def test_an_abandoned_stream_releases_its_blocks(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model())) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=20))
        next(stream)
        stream.close()
        assert not llm.engine.has_work
        assert llm.engine.scheduler.pool.available == llm.engine.scheduler.pool.total
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([[1]])
