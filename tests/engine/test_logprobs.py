"""Log probabilities: the model's own, reported once for each position."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.sampling_cases import logits_of
from torch import Tensor

from dsc_serve import LLM, SamplingParams
from dsc_serve.engine.output import TokenLogprobs
from dsc_serve.engine.sampler import logprobs

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [7, 61, 5000])
def test_logprobs_are_the_float64_log_softmax(size: int) -> None:
    top = [0, 1, 5, 20, 20]
    logits = logits_of(len(top) * size, 5.0).view(len(top), size)
    tokens = [0, size - 1, 3, int(logits[3].argmax()), int(logits[4].argmin())]
    want = logits.double().log_softmax(dim=1)
    for i, entry in enumerate(logprobs(logits, tokens, top)):
        check(entry, tokens[i], top[i], want[i], 1e-5)
    assert [len(entry.top) for entry in logprobs(logits, tokens, [0] * len(top))] == [0] * len(top)
    assert logprobs(logits[:0], [], []) == []


def check(entry: TokenLogprobs, token: int, top: int, want: Tensor, tolerance: float) -> None:
    """One report against the log probabilities [V]: the token, its value, and `top` alternatives in falling order."""
    assert entry.token_id == token
    assert entry.logprob == pytest.approx(float(want[token]), abs=tolerance)
    ids, values = [i for i, _ in entry.top], [v for _, v in entry.top]
    assert len(ids) == len(set(ids)) == min(top, len(want))
    assert values == sorted(values, reverse=True)
    assert values == pytest.approx(want[ids].tolist(), abs=tolerance)
    assert values == pytest.approx(want.topk(len(ids)).values.tolist(), abs=tolerance)
    if token in ids:
        assert values[ids.index(token)] == entry.logprob


SETTINGS: dict[str, dict[str, int]] = {
    "roomy": {},
    "three tokens a step": {"step_tokens": 3, "max_running": 3},
    "preempted": {"kv_tokens": 64, "block_size": 4, "step_tokens": 16, "max_running": 8},
    "preempted, in chunks": {"kv_tokens": 52, "block_size": 4, "step_tokens": 5, "max_running": 5},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_the_engine_reports_the_models_own_distribution_once_for_each_position(
    name: str, small_model: Callable[..., Path]
) -> None:
    """Before temperature, penalties and bias; each prompt position once, however often it is computed."""
    folder = str(small_model("dense"))
    generator = torch.Generator().manual_seed(2)
    sizes = [1, 2, 19, 8, 27, 13, 3, 16]
    prompts = [torch.randint(61, (n,), generator=generator).tolist() for n in sizes]
    tops: list[tuple[int | None, int | None]] = [(5, 3), (0, 0), (20, 20), (None, 2), (2, None), (1, 1), (4, 0), (0, 4)]
    params = [
        SamplingParams(
            temperature=0.0 if i == 5 else 0.7,
            top_k=30,
            presence_penalty=1.0,
            repetition_penalty=1.4,
            logit_bias={7: 3.0, 9: -100.0},
            seed=i,
            max_tokens=20,
            ignore_eos=True,
            logprobs=output_top,
            prompt_logprobs=prompt_top,
        )
        for i, (output_top, prompt_top) in enumerate(tops)
    ]
    with LLM(folder, dtype="float32", threads=1, **SETTINGS[name]) as llm:
        outputs = llm.generate(prompts, params)
        assert (llm.engine.scheduler.preemptions > 0) == name.startswith("preempted")
    with LLM(folder, dtype="float32", threads=1) as roomy:
        rows = roomy.logits([o.prompt_token_ids + o.token_ids for o in outputs])
    for output, logits, (output_top, prompt_top) in zip(outputs, rows, tops, strict=True):
        want = logits.double().log_softmax(dim=1)
        size = len(output.prompt_token_ids)
        assert len(output.token_ids) == 20
        assert (output.logprobs is None) == (output_top is None)
        assert (output.prompt_logprobs is None) == (prompt_top is None)
        if output.logprobs is not None and output_top is not None:
            for i, (entry, token) in enumerate(zip(output.logprobs, output.token_ids, strict=True)):
                check(entry, token, output_top, want[size - 1 + i], 1e-4)
        if output.prompt_logprobs is not None and prompt_top is not None:
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == size
            for i, reported in enumerate(output.prompt_logprobs[1:], start=1):
                assert reported is not None
                check(reported, output.prompt_token_ids[i], prompt_top, want[i - 1], 1e-4)


def test_a_prompt_preempted_halfway_is_reported_once(small_model: Callable[..., Path]) -> None:
    """Recomputing reports only what had not been reached before."""
    folder = str(small_model("dense"))
    prompt = torch.randint(61, (24,), generator=torch.Generator().manual_seed(3)).tolist()
    greedy = SamplingParams(temperature=0, max_tokens=36, ignore_eos=True)
    with LLM(folder, dtype="float32", threads=1, kv_tokens=40, block_size=2, step_tokens=4, max_running=4) as llm:
        for i in range(3):
            llm.engine.add(f"short-{i}", [i], greedy)
        reporting = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2)
        long = llm.engine.add("long", prompt, reporting)
        entries: list[TokenLogprobs | None] = []
        halfway = 0
        while llm.engine.has_work:
            before = long.num_computed
            for delta in llm.engine.step():
                entries += (delta.prompt_logprobs or []) if delta.request_id == "long" else []
            halfway += long.num_computed < before < long.prompt_size
        assert halfway > 0, "nothing was preempted within its prompt"
        want = llm.logits([prompt])[0].double().log_softmax(dim=1)
    assert entries[0] is None
    assert len(entries) == len(prompt)
    for i, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        check(entry, prompt[i], 2, want[i - 1], 1e-4)
