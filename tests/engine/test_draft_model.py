"""A smaller model beside the served one: what it must share with it, what it takes, and that answers stay the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from support.drafts import FreeDrafts, all_there_are

from dsc_serve import LLM, SamplingParams
from dsc_serve.config import ConfigError, EngineConfig, resolve_model
from dsc_serve.engine.companion import difference, load_companion
from dsc_serve.engine.drafts.drafting import COMPANION
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.kv_size import pool_blocks
from dsc_serve.engine.preparation import prepare_model
from dsc_serve.text.tokenizer import Tokenizer

PROMPTS = [[1, 2, 3, 4, 5], [7] * 8, list(range(12)), [9]]
ASKED = [
    SamplingParams(temperature=0, max_tokens=20),
    SamplingParams(temperature=0, max_tokens=20, frequency_penalty=0.5, logprobs=2),
    SamplingParams(temperature=0.7, seed=5, max_tokens=20, min_tokens=6),
    SamplingParams(temperature=1.0, top_p=0.9, seed=6, max_tokens=20, logit_bias={4: 2.0}),
]


@pytest.mark.parametrize("kinds", [("dsc", "dense"), ("dense", "dsc"), ("moe", "moe")])
def test_a_smaller_model_changes_no_answer(small_model: Callable[..., Path], kinds: tuple[str, str]) -> None:
    served, smaller = (str(small_model(kind)) for kind in kinds)
    with LLM(served, threads=1, block_size=4, dtype="float32") as llm:
        alone = llm.generate(PROMPTS, ASKED)
    with LLM(
        served, threads=1, block_size=4, dtype="float32", speculation="auto", draft_model=smaller, max_drafts=3
    ) as llm:
        drafter = llm.engine.drafter
        drafter._choose, drafter._kinds = all_there_are, {COMPANION: drafter._kinds[COMPANION]}
        llm.engine.scheduler.step_time.drafts = FreeDrafts()
        together = llm.generate(PROMPTS, ASKED)
        report = drafter.report
        companion = drafter._kinds[COMPANION].together
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert report.drafted[COMPANION] > 0
    if kinds[0] == kinds[1]:  # the very same model
        assert report.accepted[COMPANION] > 0.9 * report.drafted[COMPANION]
    assert companion.pool.free == companion.pool.total  # type: ignore[union-attr]


def test_it_needs_speculation(small_model: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="draft_model is 'x' but speculation is 'off'"):
        EngineConfig(draft_model="x")
    EngineConfig(draft_model="x", speculation="auto")


def engine_of(served: str, smaller: str) -> Engine:
    config = EngineConfig(model=served, draft_model=smaller, speculation="auto", threads=1)
    return Engine.for_model(prepare_model(config), config)


def test_other_tokens_are_refused(small_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"draft_model is '.*', which has \d+ tokens; the served model has \d+"):
        engine_of("dsc-tiny", str(small_model()))
    other = tmp_path / "other"
    shutil.copytree(resolve_model("dsc-tiny"), other)
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"its token 300 is b'.*', and the served model's is b'"):
        engine_of("dsc-tiny", str(other))
    (other / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="it has no tokenizer; a draft model must have the same tokens"):
        engine_of("dsc-tiny", str(other))
    with pytest.raises(ConfigError, match="neither a folder, a file nor an embedded model"):
        engine_of("dsc-tiny", str(tmp_path / "nowhere"))


def test_the_same_tokens_are_told_from_others() -> None:
    tokenizer = Tokenizer.load(resolve_model("dsc-tiny"))
    assert tokenizer is not None
    assert difference(tokenizer, Tokenizer.load(resolve_model("dsc-tiny")), tokenizer.vocab_size) == ""
    assert difference(None, None, 10) == ""
    assert difference(None, tokenizer, 10) == "the served model has no tokenizer"


@pytest.mark.parametrize("kind", ["auto", "int8"])
def test_its_keys_and_values_are_counted(
    small_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A pool of as many tokens is held twice, so that fewer fit."""
    config = EngineConfig(model=str(small_model()), threads=1, block_size=16, kv_dtype=kind)
    model = prepare_model(config)
    c, at_least = model.config, 2  # bytes of a number, where nothing has been loaded
    row = c.head_dim + 4 if kind == "int8" else c.head_dim * model.dtype.itemsize
    per_token = 2 * c.num_hidden_layers * c.num_key_value_heads * row
    monkeypatch.setattr("dsc_serve.engine.kv_size.available_memory", lambda: 5 * 640 * per_token + 5)
    assert pool_blocks(model, config) == 40
    assert pool_blocks(model, config, model) == 20
    tight = msgspec.structs.replace(config, draft_model=config.model, speculation="auto", kv_tokens=10**6)
    pool = 2 * 10**6 * (per_token if kind == "int8" else per_token * at_least // model.dtype.itemsize)
    monkeypatch.setattr("dsc_serve.engine.room.available_memory", lambda: pool - 1)
    with pytest.raises(ConfigError, match="kv_tokens is 1000000"):
        prepare_model(tight)


def test_what_it_drafts_is_counted_by_its_name() -> None:
    """The embedded model beside itself: every greedy draft is right, and steps are fewer."""
    params = SamplingParams(temperature=0, max_tokens=40)
    with LLM(threads=1, dtype="float32") as llm:
        (alone,) = llm.generate(["The President of the"], params)
        steps = llm.engine.counters.steps
    with LLM(threads=1, dtype="float32", speculation="auto", draft_model="dsc-tiny") as llm:
        drafter = llm.engine.drafter
        drafter._choose, drafter._kinds = all_there_are, {COMPANION: drafter._kinds[COMPANION]}
        llm.engine.scheduler.step_time.drafts = FreeDrafts()
        (found,) = llm.generate(["The President of the"], params)
        assert llm.engine.counters.steps < steps / 2
        assert drafter.report.accepted[COMPANION] > 20
    assert found.text == alone.text


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_its_weights_are_held_as_the_served_ones(weights: str) -> None:
    config = EngineConfig(model="dsc-tiny", draft_model="dsc-tiny", speculation="auto", threads=1, weights=weights)
    served = prepare_model(config)
    loaded = load_companion(config, served, Tokenizer.load(resolve_model("dsc-tiny")))
    assert loaded.held == served.held
    assert any("int8" in form for form in loaded.held) == (weights == "int8")
