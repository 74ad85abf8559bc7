"""A model whose steps are launched ahead takes the tokens from where they were drawn, and gives what it gives without.

There is no device: what is launched has been computed when the call returns, and is read a step later all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.captures import Capture
from test_graphs import generate

from dsc_serve.config import EngineConfig
from dsc_serve.engine import routing
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.runner import Runner
from dsc_serve.engine.token_feed import TokenFeed
from dsc_serve.model.checkpoint import load_model
from dsc_serve.sampling_params import EngineCapacity, SamplingParams

CPU = torch.device("cpu")


def engine_of(folder: Path, ahead: bool, capture: Capture | None = None, blocks: int = 60) -> Engine:
    model = load_model(folder, "float32", CPU)
    context = model.config.max_position_embeddings
    capacity = EngineCapacity(model.config.vocab_size, context, num_blocks=blocks, block_size=4)
    config = EngineConfig(max_running=7, step_tokens=24, block_size=4)
    runner = Runner(model, capacity, 24, 7, capture, ahead=ahead)
    watch = runner.routing
    return Engine(config, capacity, runner, (), strict=True, routing=watch, ahead=runner if ahead else None)


def requests() -> tuple[list[list[int]], list[SamplingParams]]:
    g = torch.Generator().manual_seed(0)
    prompts = [torch.randint(61, (3 + 2 * i,), generator=g).tolist() for i in range(7)]
    fields: list[dict[str, Any]] = [
        {"temperature": 0, "presence_penalty": 0.7},
        {"temperature": 0},
        {"temperature": 0.8},
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "min_p": 0.01},
        {"temperature": 0, "logit_bias": {3: 2.0}, "min_tokens": 3},
        {"temperature": 0, "stop_token_ids": tuple(range(40, 61))},
        {"temperature": 1.2, "seed": 5, "stop_token_ids": tuple(range(30))},
    ]
    return prompts, [SamplingParams(**{"seed": i, "max_tokens": 4 + 3 * i, **own}) for i, own in enumerate(fields)]


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_the_same_tokens_as_when_each_step_is_waited_for(
    kind: str, captured: bool, small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routing, "WATCHED", 1)
    folder = small_model(kind, position_embedding_type="rope")
    prompts, params = requests()
    found, watched = [], []
    for ahead in (False, True):
        engine = engine_of(folder, ahead, Capture() if captured else None)
        launched = count_launches(engine.runner)
        found.append((generate(engine, prompts, params), engine.counters.steps, engine.report.tokens.sum))
        assert (len(launched) > 10) is ahead
        if engine.routing is not None:
            report = engine.routing.report()
            watched.append((report.tokens, [layer.distinct for layer in report.layers]))
    assert found[0] == found[1]
    assert watched[:1] == watched[1:], "what was watched is not what the same tokens pick"


def count_launches(runner: Any) -> list[int]:
    """The requests of each step that is launched from now on."""
    launched: list[int] = []
    launch = runner.launch

    def counted(work: Any) -> Any:
        launched.append(len(work))
        return launch(work)

    runner.launch = counted
    return launched


def test_preempted_requests_are_computed_again_from_tokens_that_were_read(small_model: Callable[..., Path]) -> None:
    folder = small_model()
    prompts, params = requests()
    params = [SamplingParams(temperature=0.8, seed=i, max_tokens=12, ignore_eos=True) for i in range(7)]
    wide, tight = engine_of(folder, False), engine_of(folder, True, blocks=16)
    assert generate(tight, prompts, params) == generate(wide, prompts, params)
    assert tight.scheduler.preemptions > 0


def test_a_step_is_fed_with_what_the_last_one_drew() -> None:
    feed = TokenFeed(50, 4, CPU)
    first = feed.keep(torch.tensor([7, 8, 9]))
    ids = torch.tensor([3, 52, 50, 0, 49], dtype=torch.int32)
    assert feed.resolve(ids).tolist() == [3, 9, 7, 0, 49] and feed.resolve(ids).dtype == torch.int64
    second = feed.keep(torch.tensor([1]))
    assert feed.resolve(ids).tolist() == [3, 9, 1, 0, 49]
    assert first.tokens() == [7, 8, 9] and second.tokens() == [1], "a later step has written over what was not read"


def test_what_a_graph_has_written_to_the_feed_is_read_from_there() -> None:
    feed = TokenFeed(50, 4, CPU)
    feed.drawn[:3] = torch.tensor([4, 5, 6])
    first = feed.keep(feed.drawn[:2], placed=True)
    assert feed.resolve(torch.tensor([51, 50, 2])).tolist() == [5, 4, 2]
    feed.drawn[:3] = torch.tensor([7, 8, 9])
    second = feed.keep(feed.drawn[:3], placed=True)
    assert first.tokens() == [4, 5] and second.tokens() == [7, 8, 9]


def test_where_the_host_waits_nothing_is_kept_for_feeding(small_model: Callable[..., Path]) -> None:
    runner = engine_of(small_model(), ahead=False).runner
    assert isinstance(runner, Runner) and not runner.flies
    with pytest.raises(AssertionError, match="not made to launch"):
        runner.launch([])
    assert Inputs(8, 4, 3, CPU).held(1, 1)[0].dtype == torch.int64
