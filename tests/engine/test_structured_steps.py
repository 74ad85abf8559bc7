"""Structured outputs through the engine's own steps: with company, preempted, stopped, stuck."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from dsc_serve import LLM, RequestOutput, SamplingParams
from dsc_serve.engine.constraints import constrain
from dsc_serve.engine.request import Request
from dsc_serve.grammars.constraint import wait
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs

PHONE = StructuredOutputs(regex=r"[0-9]{4}( [0-9]{3}){5}")
LIST = StructuredOutputs(
    json='{"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 12, "maxItems": 12}'
)
PROMPTS = ["The number is", "He said", "In the year", "Call me at", "A list of", "The price of"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(dtype="float32", threads=1) as llm:
        yield llm


def generated(llm: LLM, asked: StructuredOutputs | None, **fields: object) -> list[RequestOutput]:
    params = SamplingParams(max_tokens=100, seed=5, structured_outputs=asked, **fields)  # type: ignore[arg-type]
    return llm.generate(PROMPTS, params)


def test_requests_keep_their_grammar_when_they_are_preempted(llm: LLM) -> None:
    with LLM(dtype="float32", threads=1, block_size=4, kv_tokens=104) as small:
        for asked, valid in ((PHONE, is_phone), (LIST, is_list)):
            narrow, wide = generated(small, asked), generated(llm, asked)
            assert [output.token_ids for output in narrow] == [output.token_ids for output in wide]
            assert all(valid(output.text) and output.finish_reason == "stop" for output in narrow)
        assert small.engine.scheduler.preemptions > 2


def is_phone(text: str) -> bool:
    return re.fullmatch(PHONE.regex or "", text) is not None


def is_list(text: str) -> bool:
    value = json.loads(text)
    return len(value) == 12 and all(type(item) is int and 0 <= item <= 99 for item in value)


def test_company_without_a_grammar_is_left_alone(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=20, seed=i, structured_outputs=PHONE if i % 2 else None) for i in range(6)]
    together = llm.generate(PROMPTS, params)
    alone = [llm.generate(prompt, own)[0] for prompt, own in zip(PROMPTS, params, strict=True)]
    assert [output.text for output in together] == [output.text for output in alone]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_p": 0.01},
        {"min_p": 1.0},
        {"n": 3},
        {"logit_bias": {5: 100.0}},
        {"repetition_penalty": 50.0},
        {"frequency_penalty": 2.0},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_every_way_of_sampling_stays_within_the_grammar(llm: LLM, fields: dict[str, object]) -> None:
    outputs = generated(llm, PHONE, **fields)
    assert all(is_phone(output.text) and output.finish_reason == "stop" for output in outputs)


def test_log_probabilities_are_the_model_s_own(llm: LLM) -> None:
    (output,) = llm.generate("The number is", SamplingParams(seed=1, structured_outputs=PHONE, logprobs=0))
    (free,) = llm.generate("The number is", SamplingParams(temperature=0, max_tokens=1, logprobs=20))
    assert output.logprobs is not None and free.logprobs is not None
    assert output.logprobs[0].logprob <= free.logprobs[0].logprob
    assert output.logprobs[0].logprob < -1


def test_a_text_ends_without_a_token_for_its_end(llm: LLM) -> None:
    (output,) = llm.generate("Yes or no?", SamplingParams(structured_outputs=StructuredOutputs(choice=("yes", "no"))))
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(output.token_ids) == output.text
    assert llm.engine.runner.sampler.eos[0] not in output.token_ids  # type: ignore[attr-defined]


def test_stop_strings_and_the_limit_cut_a_text(llm: LLM) -> None:
    (stopped,) = llm.generate("x", SamplingParams(seed=1, structured_outputs=PHONE, stop=(" ",)))
    assert re.fullmatch("[0-9]{4}", stopped.text) and stopped.finish_reason == "stop"
    (cut,) = llm.generate("x", SamplingParams(seed=1, structured_outputs=LIST, max_tokens=3))
    assert cut.finish_reason == "length"


def test_a_grammar_that_cannot_be_used_is_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="unclosed"):
        llm.generate("x", SamplingParams(structured_outputs=StructuredOutputs(regex="(a")))
    with pytest.raises(ParameterError, match="unclosed"):
        llm.stream("x", SamplingParams(structured_outputs=StructuredOutputs(regex="(a")))
    assert not llm.engine.has_work


def ambiguous() -> StructuredOutputs:
    """A grammar that cannot be followed far."""
    lists = " | ".join("s " * n for n in range(2, 40))
    return StructuredOutputs(grammar="start:" + 20 * " s" + '\ns: "x" | ' + lists)


def test_a_stuck_request_fails_alone(llm: LLM) -> None:
    stuck = llm.stream("x", SamplingParams(structured_outputs=ambiguous()))
    well = llm.stream("x", SamplingParams(structured_outputs=PHONE, max_tokens=100))
    first = next(well)
    with pytest.raises(RuntimeError, match="followed further"):
        list(stuck)
    assert is_phone(first.text + "".join(new.text for new in well))
    assert not llm.engine.has_work


def test_nothing_follows_the_error_of_a_stuck_request(llm: LLM) -> None:
    llm.engine.add("stuck", [5, 6, 7], SamplingParams(structured_outputs=ambiguous(), routing=1))
    news = []
    while llm.engine.has_work:
        news += llm.engine.step()
    assert [delta.finish_reason == "error" for delta in news] == [False] * (len(news) - 1) + [True]


def test_a_mask_touches_the_rows_of_its_requests_alone(llm: LLM) -> None:
    params = SamplingParams(structured_outputs=PHONE)
    free, bound = (Request(name, 2, [1, 2], params, 9) for name in ("free", "bound"))
    bound.constraint = llm.engine._constraint(params)
    assert bound.constraint is not None
    assert wait([bound.constraint], 60.0)
    logits = torch.zeros(2, llm.engine.capacity.vocab_size)
    assert constrain(logits, [free, bound]) == {}
    assert torch.isfinite(logits[0]).all()
    assert 0 < torch.isfinite(logits[1]).sum() < 200
