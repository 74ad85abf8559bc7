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
    USUAL,
    GraphBudget,
    buckets,
    chosen,
    graph_bytes,
    ranked,
    row_bytes,
    told,
)
from dsc_serve.engine.graphs import DecodeGraphs
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


@pytest.mark.parametrize("kind", FFNS)
def test_graphs_of_a_large_model_stay_within_number_and_memory(kind: str) -> None:
    config = large(kind)
    sizes = chosen(config, buckets(1024), 2, USUAL)
    assert 20 <= len(sizes) <= USUAL.graphs and sizes[0] == max(sizes) >= 256
    assert graph_bytes(config, sizes, 2) <= USUAL.nbytes
    less = chosen(config, buckets(1024), 2, GraphBudget(graphs=5, nbytes=USUAL.nbytes))
    assert less == sizes[:5] and padding(less) < 16
    tight = GraphBudget(nbytes=USUAL.nbytes // 8)
    small = chosen(config, buckets(1024), 2, tight)
    assert small[0] * row_bytes(config) <= tight.nbytes / 2 and graph_bytes(config, small, 2) <= tight.nbytes
    assert len(small) > 1 and small[0] < sizes[0]


def test_one_step_is_captured_however_little_there_is() -> None:
    assert chosen(small_config(), buckets(64), 4, GraphBudget(nbytes=1)) == [1]


def test_mixtures_count_the_experts_that_a_token_uses() -> None:
    """The others compute nothing for it."""
    few, many = ({**FFNS["moe"], "num_experts": n} for n in (16, 128))
    rows = [row_bytes(small_config("moe", ffn, **LARGE)) for ffn in (few, many)]
    assert rows[1] - rows[0] <= 12 * 112 + 12


def test_capturing_stops_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    capture = Capture()

    def compute(size: int) -> torch.Tensor:
        nonlocal now
        now += 1.0  # a capture computes once here
        return torch.full((size, 1), size)

    monkeypatch.setattr(graphs.time, "perf_counter", lambda: now)
    found = DecodeGraphs(ranked(buckets(64)), lambda size: size, compute, capture, 2.5)  # type: ignore[arg-type, return-value]
    assert len(found.sizes) == 3 and found.capture_s == 3.0
    assert found.sizes == sorted(ranked(buckets(64))[:3])
    assert [found.bucket(n) for n in (1, found.sizes[0] + 1, 64, 65)] == [*found.sizes, 0]
    one = DecodeGraphs([8, 4], lambda size: size, compute, capture, 0.0)  # type: ignore[arg-type, return-value]
    assert one.sizes == [8], "one is captured in any case"
    every = DecodeGraphs(ranked(buckets(64)), lambda size: size, compute, capture)  # type: ignore[arg-type, return-value]
    assert every.sizes == buckets(64) and math.isfinite(every.capture_s)


def test_who_starts_the_engine_is_told_what_was_captured_and_what_was_not() -> None:
    config = large("dsc")
    every, some = buckets(256), ranked(buckets(256))[:4]
    whole, part = (told(config, sizes, 2, 1.25, every) for sizes in (every, some))
    assert whole.startswith(f"{len(every)} graphs for steps of 1 to 256 sequences, captured in 1.2 s; about ")
    assert "more" not in whole and f"{len(every) - 4} more would pad steps less: graphs, graph_mb" in part
