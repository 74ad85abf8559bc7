"""Adapters as they are served give what PEFT and transformers give, alone and beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.adapters import CASES, adapter_folder, expected
from support.families import NEW_TOKENS, PROMPTS, chosen, family_folder
from support.families import expected as expected_of_base
from torch import Tensor

from dsc_serve import LLM, SamplingParams
from dsc_serve.parameter_errors import ParameterError

CLOSE = 1e-4  # the largest difference of a logit
GREEDY = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
ON_QWEN3 = [case for case, own in CASES.items() if own.base == "qwen3"]


def served(base: Path, adapters: Path, **options: Any) -> LLM:
    settings = {"threads": 1, "max_running": 32, "block_size": 8, **options}
    return LLM(str(base), dtype="float32", adapters=str(adapters), **settings)


def distance(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max())


@pytest.mark.parametrize("kernels", ["auto", "plain"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_is_served_gives_what_peft_gives(case: str, kernels: str, tmp_path: Path) -> None:
    base = family_folder(CASES[case].base, tmp_path / "base")
    adapter_folder(case, tmp_path / "adapters" / "tenant")
    want, plain = expected(case), expected_of_base(CASES[case].base)
    with served(base, tmp_path / "adapters", kernels=kernels) as llm:
        with_adapter, without = llm.logits(PROMPTS, adapter="tenant"), llm.logits(PROMPTS)
        greedy = [output.token_ids for output in llm.generate(PROMPTS, GREEDY, adapter="tenant")]
    for i, prompt in enumerate(PROMPTS):
        assert distance(with_adapter[i][chosen(len(prompt))], want.logits[i]) < CLOSE
        assert distance(without[i][chosen(len(prompt))], plain.logits[i]) < CLOSE
    assert greedy == want.greedy


@pytest.mark.parametrize("step_tokens", [512, 32], ids=["whole", "in chunks"])
@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_ranks_and_scales_are_mixed_in_one_batch(step_tokens: int, kernels: str, tmp_path: Path) -> None:
    """Every prompt with the base and with each adapter, twice, in the same steps: the second finds prefixes."""
    base = family_folder("qwen3", tmp_path / "base")
    for case in ON_QWEN3:
        adapter_folder(case, tmp_path / "adapters" / case.replace(" ", "-"))
    asked: list[tuple[str | None, int]] = [
        (case, i) for i in range(len(PROMPTS)) for case in (None, *ON_QWEN3) for _ in range(2)
    ]
    prompts = [PROMPTS[i] for _, i in asked]
    names = [None if case is None else case.replace(" ", "-") for case, _ in asked]
    with served(base, tmp_path / "adapters", kernels=kernels, step_tokens=step_tokens) as llm:
        logits = llm.logits(prompts, adapter=names)
        for _ in range(2):
            greedy = [output.token_ids for output in llm.generate(prompts, GREEDY, adapter=names)]
            for (case, i), tokens in zip(asked, greedy, strict=True):
                want = expected_of_base("qwen3") if case is None else expected(case)
                assert tokens == want.greedy[i], (case, i)
    for (case, i), own in zip(asked, logits, strict=True):
        want = expected_of_base("qwen3") if case is None else expected(case)
        assert distance(own[chosen(len(PROMPTS[i]))], want.logits[i]) < CLOSE, (case, i)


def test_choices_drafts_and_few_blocks_change_nothing(tmp_path: Path) -> None:
    """n of a prompt, speculation, and a KV pool so small that requests are set back."""
    base = family_folder("qwen3", tmp_path / "base")
    case = ON_QWEN3[0]
    adapter_folder(case, tmp_path / "adapters" / "tenant")
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, n=2)
    options = {"speculation": "auto", "kv_tokens": 128, "step_tokens": 48}
    with served(base, tmp_path / "adapters", **options) as llm:
        found = llm.generate(PROMPTS * 2, params, adapter=["tenant", "tenant", "tenant", None, None, None])
    want = [*expected(case).greedy, *expected_of_base("qwen3").greedy]
    assert [output.token_ids for output in found] == [tokens for tokens in want for _ in range(2)]


def test_a_name_that_is_not_known_is_never_the_base(tmp_path: Path) -> None:
    base = family_folder("qwen3", tmp_path / "base")
    adapter_folder(ON_QWEN3[0], tmp_path / "adapters" / "tenant")
    adapter_folder("phi3 fused", tmp_path / "adapters" / "other")
    with served(base, tmp_path / "adapters") as llm:
        with pytest.raises(ParameterError, match="tenent"):
            llm.generate(PROMPTS, GREEDY, adapter="tenent")
        with pytest.raises(ParameterError, match="matches nothing in the base model"):
            llm.generate(PROMPTS, GREEDY, adapter="other")
