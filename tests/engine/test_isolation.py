"""A step that fails: only the requests that make it fail end, and the others' tokens are what they would have been."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.fake_runner import FakeRunner, alone, fake_engine

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult

Work = Sequence[tuple[Request, int]]
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"


class FaultyRunner(FakeRunner):
    """Computes a part of the step and then raises, where `fault` says so."""

    def __init__(self, inner: FakeRunner, fault: Callable[[Work], Exception | None]) -> None:
        self.__dict__ |= inner.__dict__
        self.fault = fault
        self.attempts = 0

    def run(self, work: Work) -> StepResult:
        self.attempts += 1
        error = self.fault(work)
        result = super().run(work[: len(work) // 2] if error else work)
        if error is not None:
            raise error
        return result


def engine_with(fault: Callable[[Work], Exception | None], **sizes: int) -> Engine:
    engine = fake_engine(strict=False, blocks=60, **sizes)
    assert isinstance(engine.runner, FakeRunner)
    engine.runner = FaultyRunner(engine.runner, fault)
    return engine


def run(engine: Engine) -> tuple[dict[str, list[int]], dict[str, str]]:
    tokens: dict[str, list[int]] = {}
    errors: dict[str, str] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            if delta.finish_reason == "error":
                errors[delta.request_id] = delta.error
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    assert engine.counters.repairs == 0
    return tokens, errors


def holds(work: Work, *ids: str) -> bool:
    return any(request.id in ids for request, _ in work)


@pytest.mark.parametrize("poisoned", [("r0",), ("r7",), ("r2", "r5"), tuple(f"r{i}" for i in range(8))])
def test_only_the_requests_that_raise_end(poisoned: tuple[str, ...]) -> None:
    def fault(work: Work) -> Exception | None:
        late = any(r.id in poisoned and r.output_size == 2 for r, _ in work)
        return KeyError("poison") if late else None

    engine = engine_with(fault)
    for i in range(8):
        engine.add(f"r{i}", [1 + i, 2], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    tokens, errors = run(engine)
    assert set(errors) == set(poisoned)
    assert set(errors.values()) == {"the step failed: KeyError: 'poison'"}
    for i in range(8):
        expected = alone([1 + i, 2], 6, stops=())
        assert tokens[f"r{i}"] == (expected[:2] if f"r{i}" in poisoned else expected)


def test_one_poisoned_request_among_many_costs_few_attempts() -> None:
    engine = engine_with(lambda work: KeyError() if holds(work, "r9") else None, max_running=16)
    for i in range(16):
        engine.add(f"r{i}", [1], SamplingParams(temperature=0, max_tokens=1))
    engine.step()
    assert isinstance(engine.runner, FaultyRunner)
    assert engine.runner.attempts == 1 + 2 * 4


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError(NO_MEMORY), torch.OutOfMemoryError("no memory")])
def test_a_step_too_large_for_the_memory_is_computed_in_smaller_ones(error: Exception) -> None:
    engine = engine_with(lambda work: error if sum(count for _, count in work) > 3 else None)
    prompts = {f"r{i}": [1 + i] * (9 * i + 1) for i in range(4)}
    for name, prompt in prompts.items():
        engine.add(name, prompt, SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    tokens, errors = run(engine)
    assert not errors
    assert tokens == {name: alone(prompt, 5, stops=()) for name, prompt in prompts.items()}


def test_a_token_too_large_for_the_memory_ends_its_request_alone() -> None:
    engine = engine_with(lambda work: MemoryError() if holds(work, "big") else None)
    engine.add("big", [1] * 9, SamplingParams(temperature=0, max_tokens=5))
    engine.add("small", [1], SamplingParams(temperature=0, max_tokens=5, ignore_eos=True))
    tokens, errors = run(engine)
    assert list(errors) == ["big"]
    assert tokens["small"] == alone([1], 5, stops=())


def test_a_lost_device_is_not_blamed_on_requests() -> None:
    engine = engine_with(lambda work: torch.AcceleratorError("an illegal memory access was encountered"))
    engine.add("a", [1], SamplingParams())
    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_what_is_reported_of_a_step_that_is_computed_again_is_whole(small_model: Callable[..., Path]) -> None:
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, logprobs=1, routing=2, ignore_eos=True)
    prompts = [[1, 2, 3], [4, 5, 6, 7], [8, 9]]
    with LLM(str(small_model()), dtype="float32") as llm:
        expected = llm.generate(prompts, params)
        inner, failures = llm.engine.runner, 0

        class LateFault:
            def run(self, work: Work) -> StepResult:
                nonlocal failures
                result = inner.run(work)
                if len(work) > 1:
                    failures += 1
                    raise KeyError
                return result

            def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
                inner.copy_blocks(pairs)

        llm.engine.runner = LateFault()
        outputs = llm.generate(prompts, params)
        assert failures > 0
    for got, wanted in zip(outputs, expected, strict=True):
        assert got.token_ids == wanted.token_ids
        assert got.prompt_logprobs is not None and wanted.prompt_logprobs is not None
        assert len(got.prompt_logprobs) == len(wanted.prompt_logprobs) == len(got.prompt_token_ids)
        assert got.routing is not None and wanted.routing is not None
        assert got.routing.shape == wanted.routing.shape == (len(got.prompt_token_ids) + 1, 2, 2)
