"""Steps that are captured, their heads with them, give requests the tokens that they get without."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from property.test_drafts_change_nothing import CONTEXT
from property.test_step_ahead_changes_nothing import REQUESTS, SentChoices, answers, grammars  # noqa: F401
from support.captures import Capture, replays_of
from support.drafts import guess
from support.fake_runner import EOS, VOCABULARY
from support.small_models import small_config, wide_tensors

from dsc_kernels import ops
from dsc_serve.config import EngineConfig
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.graph_budget import USUAL, GraphBudget
from dsc_serve.engine.policies import POLICIES
from dsc_serve.engine.runner import Runner
from dsc_serve.grammars.follower import Grammars
from dsc_serve.model.decoder import Decoder
from dsc_serve.sampling_params import EngineCapacity

CPU = torch.device("cpu")
BUDGETS = {"usual": USUAL, "few": GraphBudget(graphs=2), "one": GraphBudget(seconds=0.0)}
seen: Counter[str] = Counter()  # forms of graphs that were replayed in any example


@pytest.fixture(scope="module")
def models() -> Iterator[dict[tuple[str, str], Decoder]]:
    """By kernels and kind. Plain torch takes chunks whose places are data, as kernels of a device do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    made = {}
    for kernels in ("auto", "plain"):
        ops.use(kernels)
        for kind in ("dsc", "moe"):
            config = small_config(kind, vocab_size=VOCABULARY)
            made[kernels, kind] = Decoder(config, wide_tensors(config), torch.float32, CPU)
    yield made
    ops.use("auto")
    torch.set_num_threads(threads)


def engine_of(
    model: Decoder, blocks: int, policy: str = "fcfs", budget: GraphBudget | None = None, ahead: bool = False
) -> Engine:
    capacity = EngineCapacity(VOCABULARY, CONTEXT, blocks, 4, step_tokens=16)
    config = EngineConfig(
        max_running=4, step_tokens=16, block_size=4, kv_tokens=4 * blocks, policy=policy, itl_target_ms=60_000.0
    )
    capture = None if budget is None else Capture()
    runner = Runner(model, capacity, 16, 4, capture, ahead=ahead, graph_budget=budget or USUAL)
    return Engine(config, capacity, runner, (EOS,), True, routing=runner.routing, ahead=runner if ahead else None)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=REQUESTS,
    kernels=st.sampled_from(["auto", "plain"]),
    kind=st.sampled_from(["dsc", "moe"]),
    blocks=st.integers(14, 30),
    policy=st.sampled_from(sorted(POLICIES)),
    between=st.integers(0, 3),
    drafts=st.sampled_from([0, 0, 4]),
    budget=st.sampled_from(["usual", "usual", *BUDGETS]),
    ahead=st.booleans(),
)
def check(
    models: dict[tuple[str, str], Decoder],
    grammars: Grammars,  # noqa: F811
    requests: list[SentChoices],
    kernels: str,
    kind: str,
    blocks: int,
    policy: str,
    between: int,
    drafts: int,
    budget: str,
    ahead: bool,
) -> None:
    def following(engine: Engine) -> Engine:
        engine.grammars = grammars
        return engine

    ops.use(kernels)
    model = models[kernels, kind]
    alone = [answers(following(engine_of(model, 200)), [one], 0, aborting=False)[0] for one in requests]
    tight = following(engine_of(model, blocks, policy, BUDGETS[budget], ahead))
    if drafts:
        guess(tight, drafts, 0.7, 0)
    for own, want in zip(answers(tight, requests, between), alone, strict=True):
        for choice, wanted in zip(own, want, strict=True):
            if choice.reason == "abort":
                assert choice.tokens == wanted.tokens[: len(choice.tokens)]
            else:
                assert (choice.tokens, choice.reason) == (wanted.tokens, wanted.reason)
    runner = tight.runner
    assert isinstance(runner, Runner) and runner.graphs is not None and tight.pace.in_flight is None
    seen.update(f"{key.form}{' with prompts' if key.tokens else ''}" for key in replays_of(runner.graphs.graphs))


def test_the_same_tokens_with_and_without_graphs(
    models: dict[tuple[str, str], Decoder],
    grammars: Grammars,  # noqa: F811
) -> None:
    """Greedy and sampled, with penalties, grammars, drafts, choices, aborts and preemptions, ahead and not."""
    check(models, grammars)
    assert {"greedy", "sampled", "layers", "layers with prompts"} <= seen.keys(), "not all forms were replayed"
