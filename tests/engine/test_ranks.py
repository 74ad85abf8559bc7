"""One engine whose model is shared by two processes gives what one process gives, and leaves none behind."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from support.ranks import followers, runs
from support.small_models import METHODS
from torch import Tensor

from dsc_serve import LLM, CheckpointError, ConfigError, GenerationError, SamplingParams
from dsc_serve.model.exchange import GroupLostError
from dsc_serve.scale.estimate import ModelSizes, exchanges

Golden = Callable[[str], dict[str, Tensor]]
Folder = Callable[[str], Path]
TOLERANCE = {"atol": 1e-4, "rtol": 0.0}
SETTINGS = {"dtype": "float32", "threads": 2, "block_size": 4, "step_tokens": 7, "max_running": 7}


def ranks_of(llm: LLM) -> list[int]:
    assert llm.engine.ranks is not None
    return llm.engine.ranks.pids


def ids_of(llm: LLM, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
    return [output.token_ids for output in llm.generate(list(prompts), params)]


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_give_the_reference_s_logits_and_ids(method: str, golden_folder: Folder, golden_io: Golden) -> None:
    """In chunks, together and alone, with prefixes from the cache, and where requests give way to each other."""
    io = golden_io(method)
    greedy = io["greedy_ids"]
    half = greedy.shape[1] // 2
    prompts, want = greedy[:, :half].tolist(), greedy[:, half:].tolist()
    params = SamplingParams(temperature=0, max_tokens=half)
    with LLM(str(golden_folder(method)), tensor_parallel=2, kv_tokens=48, **SETTINGS) as llm:
        others = ranks_of(llm)
        assert others == followers(os.getpid())
        for got, logits in zip(llm.logits(io["input_ids"].tolist()), io["logits"], strict=True):
            torch.testing.assert_close(got, logits, **TOLERANCE)
        assert ids_of(llm, prompts * 3, params) == want * 3
        scheduler = llm.engine.scheduler
        assert scheduler.preemptions > 0
        cached = scheduler.cached_tokens
        for prompt, ids in zip(prompts, want, strict=True):
            assert [ids_of(llm, [prompt], params) for _ in range(2)] == [[ids]] * 2
        assert scheduler.cached_tokens > cached
        assert scheduler.fault() is None
    assert not any(map(runs, others))


@pytest.mark.parametrize("kind", ["molora", "dsc"])
def test_sampled_choices_drafts_and_picks_are_those_of_one_rank(kind: str, small_model: Folder) -> None:
    folder, prompts = str(small_model(kind)), [[5, 17, 2, 9] * 4, [8, 8, 3], [40, 1, 22, 7, 5]]
    asked = [
        SamplingParams(temperature=0.8, seed=3, max_tokens=16, n=2, logprobs=2),
        SamplingParams(temperature=0, max_tokens=20, routing=-1),
        SamplingParams(temperature=0.7, top_p=0.9, seed=1, max_tokens=12, prompt_logprobs=1),
    ]
    found = []
    for ranks in (1, 2):
        with LLM(folder, tensor_parallel=ranks, speculation="auto", **SETTINGS) as llm:
            found.append((llm.generate(prompts, asked), llm.embed(prompts)))
    (one, embedded), (two, embedded_by_two) = found
    assert [output.token_ids for output in two] == [output.token_ids for output in one]
    torch.testing.assert_close(embedded_by_two, embedded, atol=1e-4, rtol=0)
    assert one[2].routing is not None and two[2].routing is not None
    assert two[2].routing.atoms == one[2].routing.atoms


def test_every_token_sends_what_the_estimate_of_a_bank_by_rows_says(small_model: Folder) -> None:
    sizes = ModelSizes(d=32, layers=2, vocabulary=61, kv=32, atoms=37, k=3, static=24, context=48, weight_bytes=4)
    with LLM(str(small_model()), tensor_parallel=2, **SETTINGS) as llm:
        assert llm.engine.ranks is not None
        group = llm.engine.ranks.group
        llm.generate([[1, 2, 3]], SamplingParams(temperature=0, max_tokens=3))
        for prompt, output in ((20, 1), (4, 9)):
            before = group.sent
            llm.generate([list(range(prompt))], SamplingParams(temperature=0, max_tokens=output, ignore_eos=True))
            tokens = prompt + output - 1  # the last one is not computed
            assert group.sent - before == pytest.approx(2 * sum(exchanges(sizes, tokens, 2, "rows").values()))


def until(condition: Callable[[], bool], limit_s: float = 20.0) -> None:
    end = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < end, f"not reached within {limit_s} s"
        time.sleep(0.02)


@pytest.fixture
def shared(small_model: Folder) -> Iterator[LLM]:
    with LLM(str(small_model()), tensor_parallel=2, **SETTINGS) as llm:
        yield llm


def test_a_rank_that_is_killed_ends_the_call_that_needs_it_and_every_later_one(shared: LLM) -> None:
    (other,) = ranks_of(shared)
    stream = shared.stream([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    os.kill(other, signal.SIGKILL)
    with pytest.raises(GroupLostError):
        list(stream)
    with pytest.raises(GroupLostError):
        shared.generate([[1, 2]], SamplingParams(max_tokens=2))
    until(lambda: not runs(other))


def test_a_step_that_fails_here_ends_the_others_too(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait in the middle of it, and answer another one's exchange."""
    (other,) = ranks_of(shared)
    layer = shared.engine.runner.model.layers[1]  # type: ignore[attr-defined]

    def fails(*arguments: object, **options: object) -> Tensor:
        raise MemoryError("no room")

    monkeypatch.setattr(layer, "ffn", fails)
    with pytest.raises(GroupLostError, match="have not computed the same: MemoryError: no room"):
        shared.generate([[1, 2]], SamplingParams(max_tokens=2))
    until(lambda: not runs(other))


def test_a_step_that_fails_before_it_is_told_ends_its_request_alone(
    shared: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = shared.engine.runner
    monkeypatch.setattr(runner, "pack", lambda *arguments: [][0])
    with pytest.raises(GenerationError, match="the first for: the step failed: IndexError"):
        shared.generate([[1, 2]], SamplingParams(max_tokens=2))
    monkeypatch.undo()
    assert len(shared.generate([[1, 2]], SamplingParams(max_tokens=2, ignore_eos=True))[0].token_ids) == 2


def test_what_a_rank_cannot_load_is_told_before_anything_is_served(small_model: Folder) -> None:
    folder = small_model(num_key_value_heads=1)
    with pytest.raises((CheckpointError, ConfigError), match="num_key_value_heads is 1; tensor_parallel is 2"):
        LLM(str(folder), tensor_parallel=2, **SETTINGS)
    until(lambda: not followers(os.getpid()))


def test_ranks_end_with_an_engine_that_nobody_closes(small_model: Folder) -> None:
    llm = LLM(str(small_model()), tensor_parallel=2, **SETTINGS)
    (other,) = ranks_of(llm)
    del llm
    gc.collect()
    until(lambda: not runs(other))
