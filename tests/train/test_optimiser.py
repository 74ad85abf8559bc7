"""Groups, rates and presets."""

from __future__ import annotations

import math

import pytest
import torch
from support.small_models import small_config, wide_tensors

from dsc_serve.model.config import DenseConfig, DscConfig, MoeConfig
from dsc_serve.model.decoder import parameter_counts
from dsc_serve.train import command
from dsc_serve.train.optimiser import Optimiser, parameter_groups, rate_factor
from dsc_serve.train.settings import (
    PRESETS,
    OptimiserSettings,
    ScheduleSettings,
    TrainError,
    TrainingPhase,
    load_settings,
    preset_file,
)


def test_groups_are_the_papers() -> None:
    tensors = wide_tensors(small_config("dsc"))
    groups = parameter_groups(tensors, OptimiserSettings())
    assert sorted(name for group in groups.values() for name in group) == sorted(tensors)
    assert {name.split(".mlp.")[1] for name in groups["router"]} == {"router.weight", "router.bias"}
    assert not groups["hidden"]
    gammas = {name for name in tensors if name.endswith("gamma")}
    assert len(gammas) == 2 and gammas <= set(groups["matrix"])
    assert all(tensors[name].dim() > 1 for name in set(groups["matrix"]) - gammas)
    assert all(tensors[name].dim() == 1 for name in groups["vector"])
    hidden = parameter_groups(tensors, OptimiserSettings(kind="muon"))["hidden"]
    assert "model.layers.0.mlp.static.up_proj.weight" in hidden
    assert "model.embed_tokens.weight" not in hidden
    assert "model.layers.0.mlp.atoms_u" not in hidden


@pytest.mark.parametrize(("router_rate", "factor"), [("paper", 5.0), ("script", 1.0)])
def test_the_router_learns_five_times_as_fast_unless_asked_not_to(router_rate: str, factor: float) -> None:
    masters = {name: torch.nn.Parameter(t) for name, t in wide_tensors(small_config("dsc")).items()}
    settings = OptimiserSettings.model_validate({"router_rate": router_rate, "rate": 1e-3})
    optimiser = Optimiser(masters, settings)
    before = {name: master.detach().clone() for name, master in masters.items()}
    for master in masters.values():
        master.grad = torch.ones_like(master)
    optimiser.step(0.5)  # Adam's first step moves by the rate itself
    moved = {name: float((before[name] - masters[name].detach()).abs().mean()) for name in masters}
    assert moved["model.layers.0.mlp.router.weight"] == pytest.approx(factor * 0.5e-3, rel=1e-3)
    assert moved["model.layers.0.mlp.router.bias"] == pytest.approx(factor * 0.5e-3, rel=1e-3)
    assert moved["model.norm.weight"] == pytest.approx(0.5e-3, rel=1e-3)


def test_the_papers_course_of_the_rate() -> None:
    schedule = ScheduleSettings(
        steps=2000, warmup=150, hold=0.075, final=0.1, phases=(TrainingPhase(length=256, step_tokens=32768),)
    )
    factors = [rate_factor(step, step / 2000, schedule) for step in range(2001)]
    assert factors[0] == pytest.approx(1 / 150)
    assert factors[149] == factors[150] == 1.0
    assert factors[1075] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.5)) / 2)
    assert factors[2000] == pytest.approx(0.1)
    assert factors[150:] == sorted(factors[150:], reverse=True)


def test_a_linear_course_holds_and_falls() -> None:
    phases = (TrainingPhase(length=8, step_tokens=8),)
    schedule = ScheduleSettings(warmup=0, hold=0.5, shape="linear", final=0.0, phases=phases)
    assert [rate_factor(9, share, schedule) for share in (0.0, 0.5, 0.75, 1.0)] == [1.0, 1.0, 0.5, 0.0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_whole(name: str) -> None:
    config = load_settings(preset_file(name)).model_config_for(0)
    assert isinstance(config.ffn, DscConfig)


def test_the_command_offers_every_preset() -> None:
    assert command.PRESETS == PRESETS


def test_the_papers_preset_has_the_papers_sizes() -> None:
    config = load_settings(preset_file("paper")).model_config_for(None)
    assert isinstance(config.ffn, DscConfig)
    assert (config.ffn.num_atoms, config.ffn.static_size) == (1523, 327)
    total, active = parameter_counts(config)
    uncounted = 6 * (1523 + 3 * 384)  # the solver leaves out the router's bias and norm, and γ
    assert total / 1e6 == pytest.approx(35.0138, abs=1e-4)
    assert (active - uncounted) / 1e6 == pytest.approx(27.9982, abs=1e-4)
    moe = load_settings(preset_file("paper"), ["budget.kind=moe", "budget.k=2"]).model_config_for(None).ffn
    assert isinstance(moe, MoeConfig)
    assert (moe.num_experts, moe.expert_size) == (5, 545)
    dense = load_settings(preset_file("paper"), ["budget.kind=dense"]).model_config_for(None).ffn
    assert isinstance(dense, DenseConfig)
    assert dense.size == 2611


@pytest.mark.parametrize("kind", ["dsc", "moe", "molora", "dense"])
def test_a_budget_that_the_frame_breaks_is_refused(kind: str) -> None:
    gated = ["budget.k=2", f"budget.kind={kind}", "model.mlp_gated=true"]
    with pytest.raises(TrainError, match=r"\[budget\] (active|total) is .* but the model has .*mlp_gated = True"):
        load_settings(preset_file("study"), gated).model_config_for(0)


def test_a_budget_without_room_is_told_in_one_line() -> None:
    tight = load_settings(preset_file("study"), ["budget.kind=dense", "budget.total=1428900", "budget.active=1428900"])
    with pytest.raises(TrainError, match=r"^\[budget\] size: .* greater than or equal to 1 \(got 0\)$"):
        tight.model_config_for(0)


def test_the_embedded_model_fits_in_forty_megabytes() -> None:
    settings = load_settings(preset_file("embedded"))
    assert 2 * parameter_counts(settings.model_config_for(0))[0] < 40e6
    assert settings.run.export == "bfloat16"
