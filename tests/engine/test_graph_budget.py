"""How many steps are captured, which, and what they may take."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from support.captures import Capture
from support.small_models import small_config

from dsc_serve.engine import graphs
from dsc_serve.engine.graph_budget import (
    FEW,
    USUAL,
    GraphBudget,
    GraphKey,
    GraphSizes,
    buckets,
    chosen,
    head_bytes,
    idle_rows,
    kept_bytes,
    mixed,
    ranked,
    row_bytes,
    told,
)
from dsc_serve.engine.graph_forms import FORMS, LAYERS, WITH_HEAD
from dsc_serve.engine.graphs import StepGraphs
from dsc_serve.model.config import ModelConfig

LARGE = {"vocab_size": 50_304, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LARGE |= {"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1024}
FFNS = {
    "dsc": {"num_atoms": 16_384, "atoms_per_token": 32, "static_size": 8192},
    "moe": {"num_experts": 128, "experts_per_token": 8, "expert_size": 2048},
    "dense": {"size": 20_480},
}


def large(kind: str) -> ModelConfig:
    return small_config(kind, FFNS[kind], **LARGE)


@pytest.mark.parametrize("most", [1, 2, 3, 8, 20, 64, 100, 256, 1000, 5000])
def test_a_bucket_holds_every_step_up_to_the_largest(most: int) -> None:
    sizes = buckets(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most and sizes[0] == 1
    for below, size in pairwise([0, *sizes]):
        assert size - below <= max(1, 8 if size <= 64 else size / 4)


def padding(sizes: list[int]) -> float:
    """The largest factor by which a step is padded."""
    return max(size / (below + 1) for below, size in pairwise([0, *sorted(sizes)]))


def test_fewer_sizes_are_those_that_pad_least() -> None:
    sizes = buckets(1024)
    order = ranked(sizes)
    assert sorted(order) == sizes and order[0] == 1024
    factors = [padding(order[:count]) for count in range(1, len(order) + 1)]
    assert factors == sorted(factors, reverse=True)
    for count in (2, 4, 8, 16):  # not far from what evenly spaced factors would be
        assert factors[count - 1] <= 4 * 1024 ** (1 / count)


def sizes_of(keys: list[GraphKey], form: str) -> list[int]:
    return [key.decodes for key in keys if key.form == form]


@pytest.mark.parametrize("kind", FFNS)
def test_graphs_of_a_large_model_stay_within_number_and_memory(kind: str) -> None:
    config = large(kind)
    cost = GraphSizes(config, 2)
    keys = chosen(config, buckets(1024), 2, USUAL)
    assert 40 <= len(keys) <= USUAL.graphs and cost.memory(keys[0]) == max(map(cost.memory, keys))
    for form in WITH_HEAD:
        own = sizes_of(keys, form.name)
        assert len(own) >= 20 and max(own) >= 256 and padding(own) < 2
    assert cost.total(keys) <= USUAL.nbytes
    less = chosen(config, buckets(1024), 2, GraphBudget(graphs=FEW, nbytes=USUAL.nbytes))
    assert len(less) == FEW and all(len(sizes_of(less, form.name)) > 2 for form in WITH_HEAD)
    tight = GraphBudget(nbytes=USUAL.nbytes // 8)
    small = chosen(config, buckets(1024), 2, tight)
    assert all(cost.largest(key) <= tight.nbytes / 2 for key in small) and cost.total(small) <= tight.nbytes
    assert len(small) > 1 and small[0].decodes < keys[0].decodes


def test_a_few_graphs_serve_all_steps_without_their_heads() -> None:
    config, usual = large("dsc"), chosen(large("dsc"), buckets(64), 2, USUAL)
    less = chosen(config, buckets(64), 2, GraphBudget(graphs=5))
    assert {key.form for key in less} == {LAYERS.name} and len(less) == 5
    assert padding([key.decodes for key in less]) < 8
    assert {key.form for key in usual} == {form.name for form in WITH_HEAD}, "what no step would ask for"
    two = chosen(config, buckets(2), 2, GraphBudget(graphs=4))
    every = [GraphKey(form, size) for form in ("greedy", "sampled") for size in (1, 2)]
    assert sorted(two) == every, "these are all there are"


def test_steps_too_large_for_a_head_are_captured_without() -> None:
    """A vocabulary takes more than any layer."""
    config = large("dsc").model_copy(update={"vocab_size": 10**6})
    assert head_bytes(config) > 10 * row_bytes(config)
    keys, cost = chosen(config, buckets(256), 2, USUAL), GraphSizes(config, 2)
    greedy, sampled, alone = (sizes_of(keys, name) for name in FORMS)
    assert 1 < max(sampled) <= max(greedy) < 256 and max(alone) == 256 and min(alone) > max(sampled)
    assert cost.total(keys) <= USUAL.nbytes
    assert cost.total([GraphKey("sampled", 4)]) - cost.total([GraphKey("greedy", 4)]) == 4 * sum(
        kept_bytes(config, form) for form in FORMS.values()
    )


def test_one_step_is_captured_however_little_there_is() -> None:
    assert chosen(small_config(), buckets(64), 4, GraphBudget(nbytes=1)) == [GraphKey(LAYERS.name, 1)]
    assert chosen(small_config(), buckets(64), 4, GraphBudget(graphs=1)) == [GraphKey(LAYERS.name, 64)]


def test_mixtures_count_the_experts_that_a_token_uses() -> None:
    """The others compute nothing for it."""
    few, many = ({**FFNS["moe"], "num_experts": n} for n in (16, 128))
    rows = [row_bytes(small_config("moe", ffn, **LARGE)) for ffn in (few, many)]
    assert rows[1] - rows[0] <= 12 * 112 + 12


def test_capturing_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    capture = Capture()

    def compute(key: GraphKey) -> torch.Tensor:
        nonlocal now
        now += 1.0  # a capture computes once here
        return torch.full((key.rows, 1), key.decodes)

    def keys(*sizes: int) -> list[GraphKey]:
        return [GraphKey("greedy", size) for size in sizes]

    def bucket(graphs: StepGraphs, sequences: int) -> int:
        key = graphs.key("greedy", sequences)
        return 0 if key is None else key.decodes

    monkeypatch.setattr(graphs.time, "perf_counter", lambda: now)
    first = sorted(ranked(buckets(64))[:3])
    readied: list[GraphKey] = []
    found = StepGraphs(keys(*ranked(buckets(64))), readied.append, compute, capture, 2.5)
    assert readied == keys(*ranked(buckets(64))[:3]), "not those that are captured, each before it is"
    assert found.keys == keys(*first) and found.capture_s == 3.0 and found.most() == 64
    assert [bucket(found, n) for n in (1, first[0] + 1, 64, 65)] == [*first, 0]
    assert found.key("sampled", 1) is None
    one = StepGraphs(keys(8, 4), readied.append, compute, capture, 0.0)
    assert one.keys == keys(8), "one is captured in any case"
    every = StepGraphs(keys(*ranked(buckets(64))), readied.append, compute, capture)
    assert every.keys == keys(*buckets(64)) and math.isfinite(every.capture_s)


def test_who_starts_the_engine_is_told_what_was_captured_and_what_was_not() -> None:
    config = large("dsc")
    every, some = buckets(256), ranked(buckets(256))[:4]
    both = [GraphKey(form.name, size) for form in WITH_HEAD for size in every]
    part = [GraphKey(form.name, size) for form in WITH_HEAD for size in some]
    alone = [GraphKey(LAYERS.name, size) for size in some]
    whole, less, few = (told(config, keys, 2, 1.25, every) for keys in (both, part, alone))
    assert whole.startswith(
        f"{len(both)} graphs for steps of 1 to 256 sequences ({len(every)} greedy to 256, "
        f"{len(every)} sampled to 256), captured in 1.2 s; about "
    )
    assert "more" not in whole and f"{len(both) - 8} more would pad steps less: graphs, graph_mb" in less
    assert few.startswith("4 graphs") and "(4 layers to 256)" in few and f"{len(every) - 4} more" in few


def test_steps_with_prompts_are_captured_for_few_sizes_within_the_same_budget() -> None:
    config, sizes = large("dsc"), buckets(64)
    cost, keys = GraphSizes(config, 2), mixed(sizes, 512)
    assert keys[0] == (LAYERS.name, 64, 512) and len(keys) == len(set(keys)) == 15
    assert {key.tokens for key in keys} == set(range(64, 513, 64)), "evenly apart: rows are a layer's work"
    assert all(key.decodes < key.tokens for key in keys) and len({key.decodes for key in keys}) == 2
    assert {key.tokens for key in mixed(sizes, 100)} == {64, 100} and {key.tokens for key in mixed([1], 2)} == {2}
    assert mixed([1], 1) == []
    most = chosen(config, sizes, 2, USUAL, 512)
    assert {key for key in most if key.tokens} == set(keys) and not most[0].tokens
    assert cost.total(most) <= USUAL.nbytes and len(most) == 2 * len(sizes) + len(keys)
    single = [key for key in most if not key.tokens]
    assert single == chosen(config, sizes, 2, USUAL)
    assert cost.total(most) - cost.total(single) >= 512 * row_bytes(config), "what is shared is no smaller than both"
    tight = GraphBudget(nbytes=USUAL.nbytes // 4)
    less = chosen(config, sizes, 2, tight, 512)
    assert cost.total(less) <= tight.nbytes and max(key.tokens for key in less) * row_bytes(config) <= tight.nbytes / 2
    assert len(chosen(config, sizes, 2, GraphBudget(graphs=20), 512)) == 20
    words = told(config, most, 2, 1.0, sizes, 512)
    assert "11 greedy to 64, 11 sampled to 64, 15 with prompts to 512 tokens" in words and "more" not in words
    assert "15 more would pad" in told(config, single, 2, 1.0, sizes, 512)


def test_a_step_with_prompts_is_padded_to_the_least_rows_that_hold_it() -> None:
    keys = mixed(buckets(8), 256)
    graphs = StepGraphs(
        [GraphKey("greedy", 8), *keys], lambda key: None, lambda key: torch.zeros(key.rows, 1), Capture()
    )
    few = min(key.decodes for key in keys)
    assert graphs.mixed(0, 2) == graphs.mixed(few, 64) == (LAYERS.name, few, 64)
    assert graphs.mixed(few + 1, 64) == (LAYERS.name, 8, 64) and graphs.mixed(1, 65) == (LAYERS.name, few, 128)
    assert graphs.mixed(9, 100) is None and graphs.mixed(1, 257) is None
    assert graphs.most() == 8 and graphs.key("layers", 1) is None, "one with prompts is none of single tokens"


def test_padding_is_worth_what_launching_would_take() -> None:
    """A narrow model's rows cost next to nothing, and a large one's some of a step."""
    wide = idle_rows(large("dense"))
    assert 16 < wide < 256 < 1024 < idle_rows(small_config())
    assert idle_rows(large("moe")) > wide, "experts that a token does not use cost it nothing"
