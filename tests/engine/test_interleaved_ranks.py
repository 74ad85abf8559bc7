"""Whatever the interleaving of arrivals, aborts and preemptions, two ranks give the tokens of one process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_models import small_config, wide_tensors

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.engine import Engine
from dsc_serve.model.checkpoint import save_checkpoint

CONTEXT, VOCABULARY = 40, 61
SETTINGS: dict[str, Any] = {"dtype": "float32", "threads": 2, "block_size": 4, "step_tokens": 9, "max_running": 5}
SETTINGS["kv_tokens"] = 64  # one request and a half of the longest
SHARED = [[(7 * i + j) % VOCABULARY for j in range(24)] for i in range(2)]

ARRIVALS = st.tuples(
    st.just("arrive"),
    st.integers(0, 24),  # tokens of a beginning that others have too
    st.sampled_from(SHARED),
    st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=8),
    st.integers(1, 10),  # tokens of the answer
    st.sampled_from([0.0, 0.8]),
    st.sampled_from([1, 1, 1, 2]),  # choices
)
OPERATIONS = st.lists(
    st.one_of(ARRIVALS, st.tuples(st.just("step"), st.integers(1, 5)), st.tuples(st.just("abort"), st.integers(0, 9))),
    min_size=3,
    max_size=14,
)


@pytest.fixture(scope="module", params=["dsc", "moe"])
def engines(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Engine]]:
    """Of one process, and of two ranks."""
    config = small_config(request.param, max_position_embeddings=CONTEXT)
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(config, wide_tensors(config), folder)
    with LLM(str(folder), **SETTINGS) as one, LLM(str(folder), tensor_parallel=2, **SETTINGS) as two:
        yield one.engine, two.engine


Told = dict[str, tuple[list[int], list[str]]]


def told(engine: Engine, operations: list[tuple[object, ...]]) -> Told:
    """Each request's tokens, and how it ended."""
    news: Told = {}

    def step() -> None:
        for delta in engine.step():
            tokens, ends = news[delta.request_id]
            tokens += delta.token_ids
            ends += [] if delta.finish_reason is None else [delta.finish_reason]

    for name, *values in operations:
        if name == "arrive":
            shared, beginning, tail, max_tokens, temperature, choices = values
            prompt = [*beginning[:shared], *tail]  # type: ignore[index, misc]
            first, *others = ids = [str(len(news) + i) for i in range(choices)]  # type: ignore[arg-type]
            own = [
                SamplingParams(temperature=temperature, seed=int(one), max_tokens=max_tokens)  # type: ignore[arg-type]
                for one in ids
            ]
            news |= {one: ([], []) for one in ids}
            engine.add(first, prompt, own[0], siblings=list(zip(others, own[1:], strict=True)))
        elif name == "abort":
            engine.finish(str(values[0]))
        else:
            for _ in range(values[0]):  # type: ignore[call-overload]
                step()
    while engine.has_work:
        step()
    assert engine.scheduler.fault() is None and engine.scheduler.pool.available == engine.scheduler.pool.total
    return news


def check_same(one: Told, two: Told) -> None:
    """How far one was when it was aborted hangs on how long steps took, by which prompts are cut."""
    assert one.keys() == two.keys()
    for name, (tokens, ends) in one.items():
        others, their_ends = two[name]
        if ends and their_ends:
            assert (tokens, ends) == (others, their_ends)
        common = min(len(tokens), len(others))
        assert tokens[:common] == others[:common]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS)
def test_interleavings_give_the_tokens_of_one_process(
    engines: tuple[Engine, Engine], operations: list[tuple[object, ...]]
) -> None:
    one, two = (told(engine, operations) for engine in engines)
    check_same(one, two)
    if not any(name == "abort" for name, *_ in operations):
        assert two == one


def test_the_interleavings_have_requests_give_way_and_find_prefixes(engines: tuple[Engine, Engine]) -> None:
    """So that what is tried above is all of it."""
    arrive = ("arrive", 24, SHARED[0], [1, 2, 3], 10, 0.0, 1)
    operations: list[tuple[object, ...]] = [arrive, ("step", 4), *[arrive] * 4, ("step", 3), ("abort", 2)]
    one, two = engines
    before = two.scheduler.preemptions, two.scheduler.cached_tokens
    check_same(told(one, operations), told(two, operations))
    assert two.scheduler.preemptions > before[0] and two.scheduler.cached_tokens > before[1]
