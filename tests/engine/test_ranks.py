"""One engine whose model is shared by two processes gives what one process gives, and leaves none behind."""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ranks import followers, runs
from support.small_models import METHODS
from torch import Tensor

from dsc_serve import LLM, CheckpointError, ConfigError, GenerationError, SamplingParams
from dsc_serve.config import EngineConfig
from dsc_serve.engine.ranks import follower, leader
from dsc_serve.engine.ranks.messages import RankFailed, RankLoaded, RankPool, RankStart, frame, from_rank, receive
from dsc_serve.engine.runner import Runner
from dsc_serve.model.exchange import GroupLostError
from dsc_serve.sampling_params import EngineCapacity
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


def test_steps_of_nobody_leave_nothing_behind_on_any_rank(shared: LLM) -> None:
    """With which kernels are compiled on GPUs, before requests wait for them."""
    prompts = [[5, 17, 2, 9] * 4, [8, 8, 3]]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    want = ids_of(shared, prompts, params)
    runner = shared.engine.runner
    assert isinstance(runner, Runner)
    runner.warm_up()
    assert ids_of(shared, prompts, params) == want
    assert shared.engine.scheduler.fault() is None


class Follower:
    """What stands in for the process of another rank: a script of what it answers, and when it ends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *does: str) -> None:
        lines = [
            "import socket, sys, time",
            "from dsc_serve.engine.ranks.messages import *",
            "link = socket.socket(fileno=int(sys.argv[1]))",
            "receive(link, to_rank)",
            *does,
        ]
        monkeypatch.setattr(leader, "FOLLOWER", (sys.executable, "-c", "\n".join(lines)))


LOADED = "link.sendall(frame(RankLoaded(1000))); receive(link, to_rank)"


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ([], "rank 1 ended before it had loaded its part"),
        (["time.sleep(60)"], "rank 1 has not loaded its part within 0.5 s"),
        (["link.sendall(frame(RankFailed('no room')))"], "rank 1: no room"),
        ([LOADED], "rank 1 ended before it had made its pool"),
        ([LOADED, "link.sendall(frame(RankFailed('no room')))"], "rank 1: no room"),
        ([LOADED, "time.sleep(60)"], "rank 1 has not made its pool within 0.5 s"),
        ([LOADED, "link.sendall(frame(RankReady()))"], "rank 1 of 2 has ended"),
    ],
)
def test_what_becomes_of_a_rank_before_all_have_met_is_told_at_once(
    does: list[str], told: str, small_model: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Follower(monkeypatch, *does)
    if "within" in told:
        monkeypatch.setattr(leader, "POOL_LIMIT_S" if LOADED in does else "LOAD_LIMIT_S", 0.5)
    began = time.monotonic()
    with pytest.raises((ConfigError, GroupLostError), match=told):
        LLM(str(small_model()), tensor_parallel=2, **SETTINGS)
    assert time.monotonic() - began < 30


def test_a_pool_that_a_rank_has_no_room_for_is_told_to_the_first(
    small_model: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = socket.socketpair()

    def fails(*arguments: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(follower, "FollowingRunner", fails)
    config = EngineConfig(model=str(small_model()), tensor_parallel=2, threads=2, block_size=4)
    with ours, theirs:
        start = RankStart(config, 1, "nobody's")
        status: list[int] = []
        thread = threading.Thread(target=lambda: status.append(follower.follow(theirs, start)))
        thread.start()
        loaded = receive(ours, from_rank, time.monotonic() + 60)
        assert isinstance(loaded, RankLoaded)
        capacity = EngineCapacity(vocab_size=61, max_model_len=48, num_blocks=7, block_size=4)
        ours.sendall(frame(RankPool(capacity)))
        failed = receive(ours, from_rank, time.monotonic() + 60)
        thread.join(60)
    assert status == [1]
    assert failed == RankFailed("keys and values of 28 tokens: no room; lower kv_tokens")


def test_an_exchange_that_was_broken_off_on_a_device_gives_nobody_a_token(
    shared: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who waits for it there goes on with numbers that are none, and raises nothing."""
    ranks = shared.engine.ranks
    assert ranks is not None
    aborted: list[bool] = []
    monkeypatch.setattr(ranks.group, "abort", lambda: aborted.append(True))
    stream = shared.stream([1, 2, 3], SamplingParams(max_tokens=40, ignore_eos=True))
    next(stream)
    runner = shared.engine.runner
    assert isinstance(runner, Runner)
    computed = Runner._run

    def broken(self: Runner, work: Any) -> Any:
        result = computed(self, work)
        ranks._hung_up(1)
        return result

    monkeypatch.setattr(Runner, "_run", broken)
    with pytest.raises(GroupLostError, match="rank 1 of 2 has ended"):
        list(stream)
    assert aborted == [True]


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
