"""The Python API: wrong arguments are named, and a failure reaches the call it belongs to."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dsc_serve import LLM, GenerationError, SamplingParams
from dsc_serve.config import EngineConfig
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.parameter_errors import ParameterError


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        (5, "prompts is 5; expected texts or lists of token ids"),
        ([1, "a"], "prompts"),
        ([["a"]], r"prompts\[0\] is \['a'\]"),
        ([[1], [1.7]], r"prompts\[1\] is \[1.7\]"),
        ([[True]], r"prompts\[0\]"),
        ("text", "no tokenizer"),
        ([[]], "prompt is empty"),
        ([[61]], "token id 61; allowed: 0 to 60"),
    ],
)
def test_prompts_that_are_none_are_named(small_model: Callable[..., Path], prompts: Any, words: str) -> None:
    with LLM(str(small_model())) as llm:
        with pytest.raises(ParameterError, match=words):
            llm.generate(prompts)
        assert not llm.engine.has_work
        assert llm.generate([]) == []
        assert llm.logits([]) == []


def test_parameters_are_checked_before_anything_runs(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model()), dtype="bf16") as llm:  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="params has 1 entries for 2 prompts"):
            llm.generate([[1], [2]], [SamplingParams()])
        with pytest.raises(ParameterError, match="expected SamplingParams"):
            llm.generate([[1]], [{"temperature": 0}])  # type: ignore[list-item]
        with pytest.raises(ParameterError, match="params is 5; expected SamplingParams"):
            llm.generate([[1]], 5)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="prompts is 5"):
            llm.logits(5)  # type: ignore[arg-type]
        with pytest.raises(ParameterError, match="n is 2; a stream has one choice"):
            llm.stream([1], SamplingParams(n=2))
        with pytest.raises(ParameterError, match="together they may be at most 48"):
            llm.stream([1], SamplingParams(max_tokens=48))
        with pytest.raises(ParameterError, match="together they may be at most 48"):
            llm.generate([[1], [2] * 40], SamplingParams(max_tokens=20))
        assert not llm.engine.has_work


def test_a_stream_that_nobody_reads_leaves_nothing(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model())) as llm:
        unread = llm.stream([1, 2, 3])
        assert not llm.engine.has_work
        del unread
        assert not llm._tracks


def test_a_closed_llm_says_so(small_model: Callable[..., Path]) -> None:
    llm = LLM(str(small_model()))
    llm.close()
    llm.close()
    for call in (llm.generate, llm.logits):
        with pytest.raises(RuntimeError, match="closed"):
            call([])


def test_a_failed_step_reaches_every_call_it_belongs_to(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(small_model())) as llm:
        stream = llm.stream([1, 2, 3], SamplingParams(max_tokens=10, ignore_eos=True))
        next(stream)

        def fail(work: object) -> None:
            raise MemoryError("no room")

        with monkeypatch.context() as patch:
            patch.setattr(llm.engine.runner, "run", fail)
            with pytest.raises(RuntimeError, match="no room"):
                llm.generate([[4, 5]])
        with pytest.raises(RuntimeError, match="no room"):
            next(stream)
        assert not llm.engine.has_work
        assert llm.generate([[4, 5]], SamplingParams(max_tokens=2, ignore_eos=True))[0].finish_reason == "length"


def test_a_request_that_fails_takes_no_other_with_it(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LLM(str(small_model())) as llm:
        run = llm.engine.runner.run

        def fail(work: Sequence[tuple[Request, int]]) -> StepResult:
            if any(request.tokens[:2] == [4, 5] for request, _ in work):
                raise MemoryError("no room")
            return run(work)

        params = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
        want = llm.generate([[1, 2], [3]], params)
        monkeypatch.setattr(llm.engine.runner, "run", fail)
        with pytest.raises(GenerationError, match=r"1 of 3 failed, the first for: .*no room") as caught:
            llm.generate([[1, 2], [4, 5], [3]], params)
        first, failed, last = caught.value.outputs
        assert [first, last] == want
        assert (failed.finish_reason, failed.token_ids) == ("error", [])
        assert not llm._tracks and not llm.engine.has_work


def test_losses_are_those_of_the_logits_beyond_one_context(small_model: Callable[..., Path]) -> None:
    with LLM(str(small_model()), dtype="float32") as llm:
        length = llm.engine.capacity.max_model_len
        window = torch.randint(
            llm.engine.capacity.vocab_size, (length + 1,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        (losses,) = llm.losses([window])
        (logits,) = llm.logits([window[:-1]])
        want = torch.nn.functional.cross_entropy(logits.double(), torch.tensor(window[1:]), reduction="none")
        assert losses.shape == (length,)
        torch.testing.assert_close(losses, want)
        for last in (-1, llm.engine.capacity.vocab_size):
            with pytest.raises(ParameterError, match=rf"token_ids\[1\] ends with {last}"):
                llm.losses([[1, 2], [1, last]])


def test_it_takes_every_setting_of_the_engine() -> None:
    changed = {
        "dtype": "float32",
        "threads": 1,
        "max_running": 3,
        "step_tokens": 17,
        "policy": "fair",
        "grouping": "off",
    }
    settings = {name: getattr(EngineConfig(), name) for name in EngineConfig.__struct_fields__} | changed
    with LLM(**settings) as llm:
        assert llm.engine.config == EngineConfig(**settings)
    assert set(settings) == inspect.signature(LLM).parameters.keys()


def test_a_name_that_is_no_setting_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(TypeError, match="max_runing is not a setting of the engine; did you mean max_running"):
        LLM(max_runing=2)
    with pytest.raises(
        TypeError,
        match="colour is not a setting of the engine; known: model, context, dtype, weights, keep, activations,",
    ):
        LLM(colour="red")
