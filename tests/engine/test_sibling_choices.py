"""Choices of one prompt start from one computation of it."""

from __future__ import annotations

import pytest
from support.fake_runner import EOS, FakeRunner, alone, fake_engine

from dsc_serve.engine.engine import Engine
from dsc_serve.llm import LLM, RequestOutput
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.structured_outputs import StructuredOutputs

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
TEXT = "The first thing that everybody should know about a very small model is that it"


def run(engine: Engine) -> tuple[dict[str, list[int]], dict[str, str | None]]:
    tokens: dict[str, list[int]] = {}
    ends: dict[str, str | None] = {}
    while engine.has_work:
        for delta in engine.step():
            tokens.setdefault(delta.request_id, []).extend(delta.token_ids)
            ends[delta.request_id] = delta.finish_reason
    assert not engine.scheduler.families
    assert engine.scheduler.pool.available == engine.scheduler.pool.total
    return tokens, ends


def greedy(max_tokens: int = 6) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize("size", [7, 8, 9])
def test_the_prompt_is_computed_once(size: int, prefix_cache: bool) -> None:
    engine = fake_engine(blocks=60, prefix_cache=prefix_cache)
    engine.add("a", PROMPT[:size], greedy(), siblings=[(name, greedy()) for name in "bcd"])
    tokens, _ = run(engine)
    assert tokens == {name: alone(PROMPT[:size], 6, ()) for name in "abcd"}
    assert isinstance(engine.runner, FakeRunner)
    assert engine.runner.step_sizes == [size, 4, 4, 4, 4, 4]
    assert prefix_cache or engine.scheduler.pool.cached == 0


def test_the_first_choice_may_be_aborted_before_during_and_after_the_prompt() -> None:
    for steps in range(4):
        engine = fake_engine(blocks=60, step_tokens=8)
        engine.add("a", PROMPT, greedy(), siblings=[("b", greedy()), ("c", greedy())])
        engine.add("other", PROMPT[::-1], greedy())
        seen: dict[str, list[int]] = {}
        for _ in range(steps):
            for delta in engine.step():
                seen.setdefault(delta.request_id, []).extend(delta.token_ids)
        engine.finish("a")
        tokens, ends = run(engine)
        assert seen.get("b", []) + tokens["b"] == seen.get("c", []) + tokens["c"] == alone(PROMPT, 6, ())
        assert ends["b"] == ends["c"] == ends["other"] == "length"


def test_a_sibling_may_leave_while_it_waits() -> None:
    engine = fake_engine(blocks=60, step_tokens=8)
    engine.add("a", PROMPT, greedy(), siblings=[("b", greedy()), ("c", greedy())])
    engine.step()
    assert engine.finish("b") and not engine.finish("b")
    tokens, _ = run(engine)
    assert sorted(tokens) == ["a", "c"]


def test_the_heir_takes_the_place_of_the_first_in_the_queue() -> None:
    engine = fake_engine(blocks=60, max_running=1)
    engine.add("before", [1], greedy(2))
    engine.step()
    engine.add("a", PROMPT, greedy(), siblings=[("b", greedy())])
    engine.add("after", [2], greedy())
    engine.finish("a")
    assert list(engine.scheduler.waiting) == ["b", "after"]


def test_one_choice_stops_and_the_others_go_on() -> None:
    stop = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, stop_token_ids=(alone(PROMPT, 1, ())[0],))
    engine = fake_engine(blocks=60)
    engine.add("a", PROMPT, greedy(), siblings=[("b", stop), ("c", greedy(1)), ("d", greedy())])
    tokens, ends = run(engine)
    assert ends == {"a": "length", "b": "stop", "c": "length", "d": "length"}
    assert tokens["b"] == tokens["c"] == tokens["a"][:1]


def test_a_failing_step_ends_only_the_choice_that_it_is_of() -> None:
    engine = fake_engine(blocks=60, fail_on=frozenset("a"), strict=False)
    engine.add("a", PROMPT, greedy(), siblings=[("b", greedy())])
    tokens, ends = run(engine)
    assert ends == {"a": "error", "b": "length"}
    assert tokens["b"] == alone(PROMPT, 6, ())


def test_more_choices_than_places_wait_for_one_and_copy_the_prompts_end() -> None:
    engine = fake_engine(blocks=60, max_running=3)
    names = [str(i) for i in range(9)]
    engine.add(names[0], PROMPT, greedy(3), siblings=[(name, greedy(3)) for name in names[1:]])
    tokens, _ = run(engine)
    assert tokens == {name: alone(PROMPT, 3, ()) for name in names}
    assert isinstance(engine.runner, FakeRunner)
    assert sum(engine.runner.step_sizes) == len(PROMPT) + len(names) * 2


def test_time_to_begin_is_not_up_for_who_waits_for_a_prompt_that_is_being_computed() -> None:
    engine = fake_engine(blocks=60, step_tokens=8)
    now = 0.0
    engine.scheduler.clock = lambda: now
    hurried = SchedulingParams(queue_timeout_s=1.0)
    engine.add("a", PROMPT, greedy(), scheduling=hurried, siblings=[("b", greedy())])
    engine.step()
    now = 2.0
    _, ends = run(engine)
    assert ends == {"a": "length", "b": "length"}


def test_ids_in_use_are_refused_and_nothing_is_left() -> None:
    engine = fake_engine()
    with pytest.raises(ValueError, match="in use"):
        engine.add("a", PROMPT, greedy(), siblings=[("a", greedy())])
    assert not engine.has_work and not engine.scheduler.families


def choices(llm: LLM, prompt: str | list[int], **fields: object) -> list[list[int]]:
    params = SamplingParams(**{"n": 6, "seed": 11, "max_tokens": 12, "ignore_eos": True} | fields)  # type: ignore[arg-type]
    return [output.token_ids for output in llm.generate(prompt, params)]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_seed_gives_the_same_choices_run_after_run_in_bfloat16(prefix_cache: bool) -> None:
    seen: list[list[list[list[int]]]] = []
    prompts: list[list[int]] = []
    for _ in range(2):
        with LLM(dtype="bfloat16", prefix_cache=prefix_cache, max_running=4, step_tokens=64, threads=1) as llm:
            assert llm.tokenizer is not None
            ids = llm.tokenizer.encode(TEXT)
            prompts = [ids[:size] for size in (1, 16, 17)] + [(ids * 9)[:90]]
            seen += [[choices(llm, prompt) for prompt in prompts] for _ in range(2)]
    assert all(run == seen[0] for run in seen)
    assert all(len({tuple(tokens) for tokens in of_prompt}) > 1 for of_prompt in seen[0])


def test_choices_are_those_of_requests_of_their_own() -> None:
    """Penalties and reports are each choice's own, in float32, where other chunks change nothing that counts."""
    fields = {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "logprobs": 1, "prompt_logprobs": 1, "routing": 2}
    params = SamplingParams(n=3, seed=5, max_tokens=12, ignore_eos=True, **fields)  # type: ignore[arg-type]
    with LLM(dtype="float32", threads=1, step_tokens=64) as llm:
        assert llm.tokenizer is not None
        ids = llm.tokenizer.encode(TEXT)
        together = llm.generate(ids, params)
        single = [llm.generate(ids, params.for_choice(i))[0] for i in range(3)]
    for got, wanted in zip(together, single, strict=True):
        assert got.token_ids == wanted.token_ids
        assert_reports(got)
        assert_reports(wanted)


def assert_reports(output: RequestOutput) -> None:
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    assert output.routing is not None and output.routing.start == 0
    assert output.routing.shape[0] == len(output.prompt_token_ids) + len(output.token_ids) - 1


def test_each_choice_follows_a_grammar_of_its_own() -> None:
    asked = StructuredOutputs(regex="[a-z]{3}-[0-9]{2}")
    with LLM(dtype="float32", threads=1) as llm:
        outputs = llm.generate(TEXT, SamplingParams(n=5, seed=3, max_tokens=40, structured_outputs=asked))
    for output in outputs:
        assert output.finish_reason == "stop"
        word, _, number = output.text.partition("-")
        assert len(word) == 3 and number.isdecimal()
    assert len({output.text for output in outputs}) > 1


def test_no_choice_at_all_of_a_prompt_without_output() -> None:
    params = SamplingParams(temperature=0, max_tokens=0, prompt_logprobs=0)
    with LLM(dtype="float32", threads=1) as llm:
        outputs = llm.generate([11, 12, 13], SamplingParams(n=2, temperature=0, max_tokens=0, prompt_logprobs=0))
        (one,) = llm.generate([11, 12, 13], params)
    assert [output.prompt_logprobs for output in outputs] == [one.prompt_logprobs] * 2
    assert EOS not in outputs[0].token_ids
