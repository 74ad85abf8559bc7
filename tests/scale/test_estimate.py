"""The arithmetic of docs/scale.md, against sums done by hand and the parameters that models are built with."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from dsc_serve.cli import main
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.model.initial import preset_config
from dsc_serve.scale.estimate import (
    MODELS,
    Machine,
    all_gather_bytes,
    all_reduce_bytes,
    certified,
    dollars_per_million,
    exchanges,
    phases,
    plan,
    prompt_tokens_per_s,
)

MACHINE = Machine()
HUGE = MODELS["160B"]


@pytest.mark.parametrize("preset", ["paper", "large"])
def test_the_models_are_those_that_init_writes(preset: str) -> None:
    total, _ = parameter_counts(preset_config(preset, "dsc"))
    assert MODELS[preset].parameters == pytest.approx(total, rel=5e-3)


def test_bytes_of_exchanges() -> None:
    assert all_reduce_bytes(1000, 4, 2) == 3000  # 2 · 3/4 · 1000 values of 2 bytes
    assert all_gather_bytes(1000, 4, 8) == 24000
    assert exchanges(HUGE, 16, 1, "rows") == {}
    rows, mixed, columns = (exchanges(HUGE, 16, 8, form) for form in ("rows", "mixed", "columns"))
    assert rows == {
        "attention": 2 * 7 / 8 * 16 * 8192 * 2,
        "output": 2 * 7 / 8 * 16 * 8192 * 2,
        "candidates": 7 * 16 * 128 * 8,
    }
    assert mixed == {**rows, "latents": 2 * 7 / 8 * 16 * 128 * 4}
    assert columns["logits"] == 2 * 7 / 8 * 16 * 65_536 * 4
    assert columns["logits"] / rows["candidates"] == 65_536 / (8 * 128)  # M / (gK)


def test_distinct_atoms_of_a_step() -> None:
    model = MODELS["paper"]
    assert model.distinct(1) == pytest.approx(model.k)
    assert model.distinct(10**6) == pytest.approx(model.atoms)
    assert model.distinct(16) < 16 * model.k


def test_a_step_of_one_token_reads_its_weights_once() -> None:
    model = MODELS["10B"]
    spent = phases(model, MACHINE, 1, 1)
    rate = MACHINE.bandwidth * MACHINE.reached
    assert spent["router"] == pytest.approx(32 * 16_384 * 4096 * 2 / rate)
    assert spent["atoms"] == pytest.approx(32 * 64 * 2 * 4096 * 2 / rate)
    assert spent["KV cache"] == pytest.approx(4096 * model.kv_bytes / rate)
    assert spent["exchange"] == 0
    assert phases(certified(model), MACHINE, 1, 1)["router"] == pytest.approx(spent["router"] / 2)
    read = model.layers * (model.attention + model.atoms * model.d + 2 * model.static * model.d)
    whole = (read + model.vocabulary * model.d) * 2 / rate
    assert sum(spent.values()) == pytest.approx(whole, rel=0.12)  # and atoms, KV cache and fixed times


def test_shards_divide_all_but_exchanges_and_fixed_times() -> None:
    one, eight = phases(HUGE, MACHINE, 64, 1), phases(HUGE, MACHINE, 64, 8)
    for name in ("attention", "KV cache", "router", "static", "atoms", "head"):
        assert eight[name] == pytest.approx(one[name] / 8)
    sent = sum(exchanges(HUGE, 64, 8, "rows").values())
    assert eight["exchange"] == pytest.approx(80 * (3 * MACHINE.link_latency_s + sent / MACHINE.link))


def test_products_bound_large_steps() -> None:
    model = MODELS["10B"]
    spent = phases(model, MACHINE, 4096, 1)
    assert spent["static"] == pytest.approx(2 * 4096 * 32 * 2 * 4096 * 7168 / (MACHINE.flops * MACHINE.reached))


def test_plans_fit_and_keep_the_target() -> None:
    assert plan(HUGE, MACHINE, 4, 0.05) is None
    for name, model in MODELS.items():
        found = plan(model, MACHINE, 1000, 0.05)
        assert found is not None, name
        assert found.replicas * found.shards <= 1000
        assert found.step_s <= 0.05
        held = model.resident_bytes + found.tokens * model.kv_bytes * model.context
        assert held <= 0.9 * MACHINE.memory * found.shards
        assert found.tokens_per_s == pytest.approx(found.replicas * found.tokens / found.step_s)
    one, many = (plan(MODELS["10B"], MACHINE, gpus, 0.05) for gpus in (1, 1000))
    assert one is not None and many is not None
    assert many.tokens_per_s == pytest.approx(1000 * one.tokens_per_s)


def test_cost() -> None:
    assert dollars_per_million(1000, 1, Machine(price_per_hour=3.6), 1) == pytest.approx(1)
    assert dollars_per_million(1000, 1, Machine(price_per_hour=3.6), 0.5) == pytest.approx(2)
    cold, warm = (prompt_tokens_per_s(MODELS["10B"], MACHINE, 1, hits) for hits in (0, 0.8))
    assert warm == pytest.approx(5 * cold)


def test_the_command_prints_every_table_with_the_inputs_given() -> None:
    def lines(*options: str) -> list[str]:
        result = CliRunner().invoke(main, ["scale-model", *options])
        assert result.exit_code == 0, result.output
        return result.output.splitlines()

    cheap, dear = lines("--price", "1"), lines("--price", "2")
    assert sum(line.endswith(":") for line in cheap) == 5
    row = [next(line for line in text if line.startswith("| 10B | 8 |")) for text in (cheap, dear)]
    costs = [float(line.split("|")[7]) for line in row]
    assert costs[1] == pytest.approx(2 * costs[0], rel=0.01)


def test_a_target_that_no_step_keeps_is_told_from_a_model_that_does_not_fit() -> None:
    said = CliRunner().invoke(main, ["scale-model", "--target-ms", "0.001"]).output
    assert "| 10B | 8 | too slow |" in said and "| 160B | 1 | does not fit |" in said
    refused = CliRunner().invoke(main, ["scale-model", "--bandwidth-gb", "0"])
    assert refused.exit_code == 2 and "--bandwidth-gb" in refused.output
