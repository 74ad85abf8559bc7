"""Models with drafts give what they give without: tokens, log probabilities, routing, signatures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from support.captures import Capture
from support.drafts import draft_from, guess

from dsc_kernels import native, ops
from dsc_serve import LLM, RequestOutput, SamplingParams
from dsc_serve.config import EngineConfig
from dsc_serve.engine.drafts import SOURCES
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.runner import Runner
from dsc_serve.model.checkpoint import load_model
from dsc_serve.sampling_params import EngineCapacity
from dsc_serve.structured_outputs import StructuredOutputs

PROMPTS = [[1, 2, 3, 4, 5], [7] * 8, list(range(12)), [9]]
KINDS = ["dsc", "moe", "molora", "dense"]


def generated(llm: LLM, prompts: list[list[int]], each: list[SamplingParams]) -> list[RequestOutput]:
    return llm.generate(prompts, each)


def same(here: list[RequestOutput], there: list[RequestOutput]) -> None:
    for ours, theirs in zip(here, there, strict=True):
        assert ours.token_ids == theirs.token_ids
        assert (ours.text, ours.finish_reason) == (theirs.text, theirs.finish_reason)
        for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert a.token_id == b.token_id
            assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
        assert (ours.routing is None) == (theirs.routing is None)
        if ours.routing is not None and theirs.routing is not None:
            assert (ours.routing.start, ours.routing.shape) == (theirs.routing.start, theirs.routing.shape)
            for one, other in zip(ours.routing.arrays[1:], theirs.routing.arrays[1:], strict=True):
                np.testing.assert_allclose(one, other, atol=1e-3)


def predicting(params: list[SamplingParams], outputs: list[RequestOutput]) -> list[SamplingParams]:
    return [
        msgspec.structs.replace(own, prediction_token_ids=tuple(output.token_ids))
        for own, output in zip(params, outputs, strict=True)
    ]


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_says_the_same(small_model: Callable[..., Path], kind: str, kernels: str) -> None:
    """Native kernels in one call or plain torch; greedy, sampled, penalised, with log probabilities."""
    asked = [
        SamplingParams(temperature=0, max_tokens=20),
        SamplingParams(temperature=0, max_tokens=20, frequency_penalty=0.5, repetition_penalty=1.2, logprobs=2),
        SamplingParams(temperature=0.7, seed=5, max_tokens=20, min_tokens=6, stop_token_ids=(3, 11)),
        SamplingParams(temperature=1.0, top_p=0.9, seed=6, max_tokens=20, logit_bias={4: 2.0}, logprobs=0),
    ]
    try:
        with LLM(str(small_model(kind)), kernels=kernels, threads=1, block_size=4, dtype="float32") as llm:
            alone = generated(llm, PROMPTS, asked)
            before = llm.engine.counters.steps
            guess(llm.engine, 5, 0.8, 3, known=True)
            same(generated(llm, PROMPTS, predicting(asked, alone)), alone)
            report = llm.engine.drafter.report
            assert 0 < report.accepted["known"] < report.drafted["known"]
            assert llm.engine.counters.steps < 2 * before
    finally:
        ops.use("auto")


@pytest.mark.skipif(not native.available(), reason="installed without a C++ compiler")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_are_the_same_to_the_bit(small_model: Callable[..., Path], kind: str, dtype: str) -> None:
    """Native kernels attend to each drafted row as to a single token; all else takes each row by itself anyway."""
    asked = [SamplingParams(temperature=0.7, seed=i, max_tokens=30, logprobs=2) for i in range(len(PROMPTS))]
    with LLM(str(small_model(kind)), threads=2, block_size=4, dtype=dtype, prefix_cache=False) as llm:
        alone = generated(llm, PROMPTS, asked)
        guess(llm.engine, 5, 0.8, 3, known=True)
        drafted = generated(llm, PROMPTS, predicting(asked, alone))
        assert llm.engine.drafter.report.accepted["known"] > 0
        for ours, theirs in zip(drafted, alone, strict=True):
            assert ours.token_ids == theirs.token_ids and ours.logprobs == theirs.logprobs


def test_routing_is_told_of_kept_tokens_alone(small_model: Callable[..., Path]) -> None:
    asked = [SamplingParams(temperature=0, max_tokens=20, routing=k) for k in (1, 3, -1, 2)]
    with LLM(str(small_model()), threads=1, block_size=4, dtype="float32") as llm:
        alone = generated(llm, PROMPTS, asked)
        guess(llm.engine, 5, 0.6, 3, known=True)
        same(generated(llm, PROMPTS, predicting(asked, alone)), alone)


def test_statistics_take_kept_tokens_alone(small_model: Callable[..., Path]) -> None:
    """What layers are seen to pick, summed over all steps, is what they pick without drafts."""
    asked = [SamplingParams(temperature=0, max_tokens=20)] * len(PROMPTS)
    counts = []
    alone: list[RequestOutput] = []
    for drafts in (False, True):
        with LLM(str(small_model()), threads=1, dtype="float32", prefix_cache=False) as llm:
            watch = llm.engine.routing
            assert watch is not None
            watch.on_picks = lambda picks: None  # every step is watched
            if drafts:
                guess(llm.engine, 5, 0.6, 3, known=True)
            params = predicting(asked, alone) if drafts else asked
            alone = generated(llm, PROMPTS, params)
            watch.flush()
            counts.append((watch.sketch.tokens, watch.sketch.counts.copy()))
    assert counts[0][0] == counts[1][0]
    np.testing.assert_array_equal(counts[0][1], counts[1][1])


@pytest.mark.parametrize("kind", KINDS)
def test_steps_with_drafts_are_replayed_with_a_row_for_each(small_model: Callable[..., Path], kind: str) -> None:
    """On a device with captured steps, as far as there are graphs for so many rows; with the same tokens."""
    model = load_model(small_model(kind), "float32", torch.device("cpu"))
    capacity = EngineCapacity(model.config.vocab_size, model.config.max_position_embeddings, 60, 4)
    config = EngineConfig(max_running=4, step_tokens=24, block_size=4)
    answers: dict[str, list[int]] = {"a": [], "b": []}
    for rate in (None, 0.7):
        capture = Capture()
        runner = Runner(model, capacity, 24, 4, capture)
        engine = Engine(config, capacity, runner, (), strict=True)
        if rate is not None:
            guess(engine, 5, rate, 1, known=True)
        found: dict[str, list[int]] = {"a": [], "b": []}
        for name, prompt in (("a", [1, 2, 3]), ("b", [4] * 5)):
            params = SamplingParams(temperature=0, max_tokens=20, prediction_token_ids=tuple(answers[name]))
            engine.add(name, prompt, params)
        while engine.has_work:
            for delta in engine.step():
                found[delta.request_id] += delta.token_ids
        assert rate is None or found == answers
        answers = found
        assert capture.replayed == [2] if rate is None else 4 in capture.replayed
        replays = sum(graph.replays for graph in capture.graphs)
        assert replays == engine.counters.steps - 1 if rate is None else 0 < replays < engine.counters.steps - 1
        assert all(bool(pool[-1].any()) for caches in runner.kv_caches for pool in caches) or rate is None


def test_a_stop_string_cuts_what_was_computed_with_it() -> None:
    """In the middle of several tokens at once: text, tokens, log probabilities and routing end where they did."""
    with LLM(threads=1, dtype="float32") as llm:
        (whole,) = llm.generate(["The President of the"], SamplingParams(temperature=0, max_tokens=24))
        words = whole.text.split()
        asked = [SamplingParams(temperature=0, max_tokens=24, stop=(words[4],), logprobs=1, routing=2)]
        prompt = [llm.tokenizer.encode("The President of the")] if llm.tokenizer else []
        alone = generated(llm, prompt, asked)
        assert alone[0].finish_reason == "stop"
        guess(llm.engine, 7, 1.0, 3, known=True)
        llm.engine.drafter._choose = lambda options, *_: [option.most for option in options]
        same(generated(llm, prompt, predicting(asked, [whole])), alone)


SCHEMA = """{"type": "object", "additionalProperties": false, "required": ["firstname", "population", "colour"],
"properties": {"firstname": {"type": "string", "maxLength": 6}, "population": {"type": "integer", "maximum": 9999},
"colour": {"enum": ["red", "green", "blueish"]}}}"""
SHAPES = [
    StructuredOutputs(json=SCHEMA, disable_any_whitespace=True),
    StructuredOutputs(regex="(yes|no), because of the (weather|government)\\."),
    StructuredOutputs(choice=("a long choice of words", "another one")),
    StructuredOutputs(json=SCHEMA),
]


def test_what_a_grammar_forces_costs_no_step_of_its_own() -> None:
    """Greedy and sampled, with log probabilities, bounds and penalties, beside a request without a grammar."""
    asked = [
        SamplingParams(
            temperature=0.9 * (i % 2),
            seed=i,
            max_tokens=8 if i == 5 else 80,
            structured_outputs=SHAPES[i % 4],
            logprobs=1 if i == 2 else None,
            frequency_penalty=0.5 * (i == 3),
        )
        for i in range(8)
    ]
    asked += [SamplingParams(temperature=0, max_tokens=30), SamplingParams(temperature=0, max_tokens=60)]
    prompts = [[5 + i, 6, 7] for i in range(9)] + [[1, 2, 3, 4] * 4]
    with LLM(threads=1, dtype="float32", block_size=4) as llm:
        alone = generated(llm, prompts, asked)
        first = generated(llm, prompts[:1], asked[:1])
        steps = llm.engine.counters.steps
        generated(llm, prompts[:1], asked[:1])
        steps = llm.engine.counters.steps - steps
    with LLM(threads=1, dtype="float32", block_size=4, speculation="auto") as llm:
        draft_from(llm.engine, 7, SOURCES)
        same(generated(llm, prompts, asked), alone)
        report = llm.engine.drafter.report
        assert report.accepted["grammar"] == report.drafted["grammar"] > 20
        assert report.drafted["ngram"] > report.accepted["ngram"] > 0
        before = llm.engine.counters.steps
        same(generated(llm, prompts[:1], asked[:1]), first)
        assert llm.engine.counters.steps - before < 0.75 * steps
