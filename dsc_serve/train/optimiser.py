"""Optimisers over float32 master weights, in the paper's three groups, and the course of their rates."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from dsc_serve.train.settings import OptimiserSettings, ScheduleSettings

ROUTER_FACTOR = 5.0
HIDDEN = tuple(f"{name}_proj.weight" for name in ("q", "k", "v", "o", "up", "gate", "down"))


def parameter_groups(names: Mapping[str, Tensor], settings: OptimiserSettings) -> dict[str, list[str]]:
    """Names by group: "router" (no decay, its own rate), "hidden" (Muon's, empty for AdamW), "matrix", "vector".

    γ decays with the matrices: the reference script, which goes by dimensions, holds it as [1, 1, d].
    """
    groups: dict[str, list[str]] = {"router": [], "hidden": [], "matrix": [], "vector": []}
    for name, tensor in names.items():
        if ".mlp.router." in name:
            groups["router"].append(name)
        elif settings.kind == "muon" and name.endswith(HIDDEN):
            groups["hidden"].append(name)
        else:
            decays = tensor.dim() > 1 or name.endswith(".mlp.gamma")
            groups["matrix" if decays else "vector"].append(name)
    return groups


class Optimiser:
    """AdamW, with Muon beside it where the settings say so, over masters by name."""

    def __init__(self, masters: Mapping[str, Tensor], settings: OptimiserSettings) -> None:
        self.masters = masters
        self.groups = parameter_groups(masters, settings)
        rate, decay = settings.rate, settings.weight_decay
        router = rate * (ROUTER_FACTOR if settings.router_rate == "paper" else 1.0)
        adam = [("router", router, 0.0), ("matrix", rate, decay), ("vector", rate, 0.0)]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(
                [
                    {"params": [masters[n] for n in self.groups[g]], "lr": lr, "weight_decay": wd, "peak": lr}
                    for g, lr, wd in adam
                    if self.groups[g]
                ],
                betas=settings.betas,
                foreach=True,
            )
        ]
        if self.groups["hidden"]:
            hidden = {"params": [masters[n] for n in self.groups["hidden"]], "peak": settings.hidden_rate}
            self.parts.append(
                torch.optim.Muon(
                    [hidden],
                    lr=settings.hidden_rate,
                    weight_decay=decay,
                    momentum=settings.momentum,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    def step(self, factor: float) -> None:
        """One update at `factor` of every group's peak rate; gradients are released."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * factor
            part.step()
            part.zero_grad(set_to_none=True)

    def forget(self, name: str, rows: Tensor) -> None:
        """Drop the moments of these rows of a parameter."""
        for part in self.parts:
            for value in part.state.get(self.masters[name], {}).values():
                if isinstance(value, Tensor) and value.dim():
                    value[rows] = 0

    def state(self) -> list[dict[str, object]]:
        return [part.state_dict() for part in self.parts]

    def load(self, state: list[dict[str, object]]) -> None:
        for part, own in zip(self.parts, state, strict=True):
            part.load_state_dict(own)


def rate_factor(step: int, share: float, schedule: ScheduleSettings) -> float:
    """Share of the peak rate at a step, with `share` of the run done."""
    rise = min(1.0, (step + 1) / schedule.warmup) if schedule.warmup else 1.0
    if share <= schedule.hold:
        return rise
    done = min(1.0, (share - schedule.hold) / (1 - schedule.hold))
    left = (1 + math.cos(math.pi * done)) / 2 if schedule.shape == "cosine" else 1 - done
    return rise * (schedule.final + (1 - schedule.final) * left)
