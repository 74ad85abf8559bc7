"""Prompts that begin alike share blocks: when, how far, and when not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.fake_runner import alone, fake_engine

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.kv_cache import BlockPool, block_hash, hash_seed
from dsc_serve.scheduling_params import SchedulingParams

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def serve(
    engine: Engine, prompt: list[int], scheduling: SchedulingParams | None = None, params: SamplingParams = GREEDY
) -> int:
    """Cached tokens of a request that is alone in the engine; its tokens must be right."""
    engine.add("x", prompt, params, scheduling=scheduling)
    tokens: list[int] = []
    cached = 0
    while engine.has_work:
        for delta in engine.step():
            tokens += delta.token_ids
            cached = delta.cached_tokens
    assert tokens == alone(prompt, 3, stops=())
    return cached


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_all_full_blocks_but_that_of_the_last_token_are_found(length: int, cached: int) -> None:
    engine = fake_engine(blocks=12, block_size=4)
    prompt = list(range(length))
    assert serve(engine, prompt) == 0
    assert serve(engine, prompt) == cached
    assert engine.scheduler.cached_tokens == cached


def test_what_is_not_looked_up_is_not_counted() -> None:
    engine = fake_engine(blocks=12, block_size=4)
    serve(engine, list(range(9)), params=msgspec.structs.replace(GREEDY, prompt_logprobs=0))
    assert engine.scheduler.prompt_tokens == 0
    serve(engine, list(range(9)))
    assert engine.scheduler.prompt_tokens == 9


def test_what_was_generated_is_found_by_the_prompt_that_continues_it() -> None:
    engine = fake_engine(blocks=12, block_size=4)
    prompt = list(range(6))
    serve(engine, prompt)
    assert serve(engine, prompt + alone(prompt, 3, stops=()) + [1]) == 8


def test_prompts_share_only_what_they_begin_with() -> None:
    engine = fake_engine(blocks=12, block_size=4)
    serve(engine, [1] * 8 + [2] * 4)
    assert serve(engine, [3] * 4 + [1] * 8) == 0
    assert serve(engine, [1] * 8 + [3] * 4) == 8


def test_a_salt_keeps_prompts_apart() -> None:
    engine = fake_engine(blocks=12, block_size=4)
    serve(engine, [1] * 9, SchedulingParams(cache_salt="a"))
    assert serve(engine, [1] * 9) == 0
    assert serve(engine, [1] * 9, SchedulingParams(cache_salt="b")) == 0
    assert serve(engine, [1] * 9, SchedulingParams(cache_salt="a")) == 8


def test_it_can_be_switched_off_and_is_bypassed_where_positions_are_reported() -> None:
    off = fake_engine(prefix_cache=False)
    serve(off, [1] * 9)
    assert serve(off, [1] * 9) == 0
    assert off.scheduler.pool.free == off.scheduler.pool.total
    engine = fake_engine()
    serve(engine, [1] * 9)
    asking = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=0)
    assert serve(engine, [1] * 9, params=asking) == 0


def test_requests_that_run_together_own_the_same_blocks() -> None:
    engine = fake_engine(blocks=12, block_size=4)
    engine.add("a", [1] * 10, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    engine.step()
    engine.add("b", [1] * 10, GREEDY)
    engine.step()
    a, b = engine.scheduler.running["a"], engine.scheduler.running["b"]
    assert a.blocks[:2] == b.blocks[:2] and a.blocks[2] != b.blocks[2]
    assert [engine.scheduler.pool.owners(block) for block in b.blocks] == [2, 2, 1]
    engine.finish("a")
    assert engine.scheduler.fault() is None


def test_a_preempted_request_finds_its_own_blocks_and_is_counted_once() -> None:
    engine = fake_engine(blocks=9, block_size=4, max_running=8)
    for i in range(4):
        engine.add(str(i), [i] * 6, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    while not engine.scheduler.preemptions:
        engine.step()
    while engine.has_work:
        engine.step()
    assert engine.scheduler.prompt_tokens == 4 * 6
    assert engine.scheduler.cached_tokens == 0


def test_the_longest_unused_end_of_a_prefix_is_forgotten_first() -> None:
    pool = BlockPool(4)
    hashes = [hash_seed(b"secret", "")]
    for i in range(3):
        hashes.append(block_hash(hashes[-1], [i]))
    blocks = pool.allocate(3)
    for block, name in zip(blocks, hashes[1:], strict=True):
        pool.publish(block, name)
    pool.release(blocks)
    assert (pool.free, pool.cached) == (1, 3)
    pool.allocate(2)
    assert pool.match(hashes[1:]) == blocks[:2]
    pool.share(blocks[:2])
    assert (pool.available, pool.owners(blocks[0])) == (0, 1)
    with pytest.raises(MemoryError, match="1 KV blocks wanted, 0 are available"):
        pool.allocate(1)


def test_a_wrong_ownership_is_told() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    assert pool.fault([blocks]) is None
    assert pool.fault([blocks, blocks[:1]]) is not None
    pool.release(blocks)
    pool._free.append(3)
    assert pool.fault([]) == "4 KV blocks, but 5 free, 0 cached and 0 owned"


def test_a_real_model_says_the_same_after_a_hit(small_model: Callable[..., Path]) -> None:
    folder = str(small_model())
    prompt = [(7 * i) % 61 for i in range(30)]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, logprobs=0)
    with LLM(folder, dtype="float32", block_size=4) as llm:
        (first,), (second,) = llm.generate([prompt], params), llm.generate([prompt], params)
        assert llm.engine.scheduler.cached_tokens == 28
    assert second.token_ids == first.token_ids
    for a, b in zip(first.logprobs or [], second.logprobs or [], strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4)
