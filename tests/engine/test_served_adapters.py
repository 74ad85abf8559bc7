"""Adapters served as their libraries compute them: alone, mixed, in chunks, preempted, with drafts, as vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Never

import msgspec
import pytest
import torch
from support.adapters import CASES, adapter_folder, expected
from support.families import NEW_TOKENS, PROMPTS, chosen, family_folder

from dsc_kernels import native
from dsc_serve import LLM, SamplingParams
from dsc_serve.adapter_choice import AdapterChoice, BrokenAdapterError, UnknownAdapterError
from dsc_serve.config import ConfigError
from dsc_serve.engine import runner
from dsc_serve.engine.scheduler import Scheduler
from dsc_serve.llm import RequestOutput
from dsc_serve.parameter_errors import ParameterError

CLOSE = 1e-4  # of logits, of which most lie between -3 and 3
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
QWEN = [case for case in CASES if CASES[case].base == "qwen3"]


def served(tmp_path: Path, cases: list[str], **settings: Any) -> LLM:
    """The base of some cases, with the adapter of each in the folder under its number."""
    base = family_folder(CASES[cases[0]].base, tmp_path / "base")
    for i, case in enumerate(cases):
        adapter_folder(case, tmp_path / "adapters" / str(i))
    return LLM(str(base), dtype="float32", threads=1, adapters=tmp_path / "adapters", **{"max_running": 8, **settings})


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.token_ids for output in outputs]


@pytest.mark.parametrize("case", CASES)
def test_what_peft_computes_is_served_beside_the_base(case: str, tmp_path: Path) -> None:
    want = expected(case)
    with served(tmp_path, [case]) as llm:
        base = llm.logits(PROMPTS)
        found = llm.logits([*PROMPTS, *PROMPTS], adapter=["0"] * len(PROMPTS) + [None] * len(PROMPTS))
        mixed = llm.generate([*PROMPTS, *PROMPTS], GREEDY, adapter=["0"] * len(PROMPTS) + [None] * len(PROMPTS))
        alone = llm.generate(PROMPTS, GREEDY)
    for i, prompt in enumerate(PROMPTS):
        assert (found[i][chosen(len(prompt))] - want.logits[i]).abs().max() < CLOSE
        assert (found[len(PROMPTS) + i] - base[i]).abs().max() < CLOSE
        if len(prompt) > 1:  # a query alone sees nothing but its own key
            assert not torch.allclose(found[i], base[i], atol=10 * CLOSE)
    assert tokens(mixed) == [*want.greedy, *tokens(alone)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"step_tokens": 8, "block_size": 4},
        {"block_size": 4, "kv_tokens": 120, "context": 60},
        {"prefix_cache": False, "policy": "affinity"},
        {"speculation": "auto", "policy": "fair"},
        {"kernels": "plain", "step_tokens": 16},
    ],
    ids=["as it is", "chunks", "preempted", "affinity", "drafts", "plain"],
)
def test_tenants_mixed_in_one_batch_get_what_each_gets_alone(settings: dict[str, Any], tmp_path: Path) -> None:
    with served(tmp_path, QWEN, **settings) as llm:
        names = [str(i) for i in range(len(QWEN))]
        jobs = [(prompt, name) for name in [*names, None] for prompt in PROMPTS]
        prompts, adapters = [prompt for prompt, _ in jobs], [name for _, name in jobs]
        alone = tokens(llm.generate(PROMPTS, GREEDY))
        want = [own for case in QWEN for own in expected(case).greedy] + alone
        for _ in range(2):  # the second time prefixes are found
            order = sorted(range(len(jobs)), key=lambda i: (7 * i) % len(jobs))
            predicted = tuple(want[0]) if "speculation" in settings else ()
            params = msgspec.structs.replace(GREEDY, prediction_token_ids=predicted)
            found = llm.generate([prompts[i] for i in order], params, adapter=[adapters[i] for i in order])
            assert tokens(found) == [want[i] for i in order]
        if settings.get("kv_tokens"):
            assert llm.engine.scheduler.preemptions > 0
        if settings.get("prefix_cache", True):
            assert llm.engine.scheduler.cached_tokens > 0
        report = llm.engine.adapter_report
        assert set(report.requests) == set(names) and sum(report.distinct.counts) > 0


def test_choices_and_vectors_have_adapters_too(tmp_path: Path) -> None:
    with served(tmp_path, QWEN[:1]) as llm:
        params = SamplingParams(n=3, temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        assert tokens(llm.generate([PROMPTS[1]], params, adapter="0")) == [expected(QWEN[0]).greedy[1]] * 3
        streamed = [token for part in llm.stream(PROMPTS[1], GREEDY, adapter="0") for token in part.token_ids]
        assert streamed == expected(QWEN[0]).greedy[1]
        base, own, again = llm.embed([PROMPTS[1]]), llm.embed([PROMPTS[1]], adapter="0"), llm.embed([PROMPTS[1]])
        assert torch.allclose(base, again, atol=1e-5) and not torch.allclose(base, own, atol=1e-2)
        losses = llm.losses([PROMPTS[1], PROMPTS[1]], adapter=["0", None])
        assert not torch.allclose(losses[0], losses[1], atol=1e-2)


def test_weights_compose_exactly(tmp_path: Path) -> None:
    """With one weight 1 and the other 0 it is the first; halves of the same are the whole; −1 beside 1 is the base."""
    with served(tmp_path, [QWEN[0], QWEN[1], QWEN[0]]) as llm:
        prompt = [PROMPTS[1]]
        base, first = llm.logits(prompt)[0], llm.logits(prompt, adapter="0")[0]
        for weights, want in [
            ({"0": 1, "1": 0}, first),
            ({"0": 0.5, "2": 0.5}, first),
            ({"0": 1.0, "2": -1.0}, base),
            ({"0": 0.0}, base),
        ]:
            assert (llm.logits(prompt, adapter=weights)[0] - want).abs().max() < CLOSE
        half = AdapterChoice((("0", 0.5), ("2", 0.5)), "product of sums")  # of itself: (½ + ½)B · (½ + ½)A
        assert (llm.logits(prompt, adapter=half)[0] - first).abs().max() < CLOSE
        both = llm.logits(prompt, adapter={"0": 1.0, "1": 1.0})[0]
        assert (both - first).abs().max() > 100 * CLOSE


def test_what_cannot_be_asked_for_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with served(tmp_path, QWEN[:2]) as llm:
        (tmp_path / "adapters" / "broken").mkdir()
        with pytest.raises(UnknownAdapterError, match="adapter 'nobody' is not known"):
            llm.generate([PROMPTS[0], PROMPTS[0]], GREEDY, adapter=["0", "nobody"])
        with pytest.raises(ParameterError, match="adapter has 1 entries for 2 prompts"):
            llm.generate([PROMPTS[0], PROMPTS[0]], GREEDY, adapter=["0"])
        with pytest.raises(ParameterError, match="adapter is 3; it must be"):
            llm.logits([PROMPTS[0]], adapter=3)
        for call in (llm.generate, llm.logits, llm.losses, llm.embed):
            with pytest.raises((BrokenAdapterError, UnknownAdapterError), match="'broken'"):
                call([PROMPTS[1]], adapter="broken")
        ranks = AdapterChoice((("0", 1.0), ("1", 1.0)), "product of sums")
        assert llm.logits([PROMPTS[0]], adapter=ranks)[0].isfinite().all()
        assert not llm.engine.has_work and llm.engine.counters.steps > 0
    base = str(tmp_path / "base")
    with pytest.raises(ConfigError, match="nowhere', which is no folder"):
        LLM(base, dtype="float32", adapters=tmp_path / "nowhere")
    with LLM(base, dtype="float32") as llm, pytest.raises(UnknownAdapterError, match="there are none"):
        llm.generate([PROMPTS[0]], GREEDY, adapter="0")


def test_more_adapters_than_fit_are_served_one_after_the_other(tmp_path: Path) -> None:
    with served(tmp_path, QWEN[:1]) as llm:
        llm.logits([PROMPTS[0]], adapter="0")
        adapters = llm.engine.arrivals.adapters
        assert adapters is not None
        size = adapters.nbytes
    for i in range(1, 9):
        adapter_folder(QWEN[i % 2], tmp_path / "adapters" / str(i))
    with served(tmp_path, QWEN[:1], adapter_bytes=3 * size) as llm:
        adapters = llm.engine.arrivals.adapters
        assert adapters is not None
        names = [str(i) for i in range(9)]
        found = llm.generate([PROMPTS[1]] * 9, GREEDY, adapter=names)
        assert tokens(found) == [expected(QWEN[i % 2]).greedy[1] for i in range(9)]
        assert adapters.nbytes <= adapters.budget and adapters.counts.evictions > 0


def test_where_there_are_no_adapters_steps_do_not_ask_for_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor for windows that blocks could leave, where the model has none."""

    def asked(*what: object) -> Never:
        raise AssertionError("somebody pays for what nobody uses")

    monkeypatch.setattr(runner, "by_kind_and_adapter", asked)
    monkeypatch.setattr(runner, "adapter_runs", asked)
    monkeypatch.setattr(Scheduler, "_give_back", asked)
    base = family_folder(CASES[QWEN[0]].base, tmp_path / "base")
    with LLM(str(base), dtype="float32", threads=1) as llm:
        assert all(output.token_ids for output in llm.generate(PROMPTS, GREEDY))


def test_a_composition_counts_what_it_holds_itself(tmp_path: Path) -> None:
    with served(tmp_path, QWEN[:2]) as llm:
        llm.logits([PROMPTS[1]], adapter={"0": 1.0, "1": 1.0})
        adapters = llm.engine.arrivals.adapters
        assert adapters is not None
        alone = sum(entry.nbytes for entry in adapters._entries.values() if not entry.parts)
        assert 0 <= adapters.nbytes - alone < alone / 10
        assert (adapters.nbytes > alone) == (native.active() is not None)
