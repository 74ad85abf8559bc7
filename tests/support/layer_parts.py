"""What layers are built of, from the flat arguments that oracles take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from dsc_kernels.quantised import Weight
from dsc_kernels.weights import Activation, AtomBank, FfnOptions, MlpWeights, MoeOptions, Router


def ffn_parts(
    up: Weight,
    gate: Weight | None,
    down: Weight,
    activation: Activation,
    router: Weight | None = None,
    router_bias: Tensor | None = None,
    u: Weight | None = None,
    v: Weight | None = None,
    gamma: Tensor | None = None,
    norm_eps: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of an Ffn; without a router, of a dense one."""
    parts = {"mlp": MlpWeights(up, gate, down), "options": FfnOptions(activation=activation, **options)}
    if router is not None:
        assert u is not None and v is not None and gamma is not None
        parts |= {"router": Router(router, router_bias, norm_eps), "bank": AtomBank(u, v, gamma)}
    return parts


def moe_parts(
    router: Weight,
    router_bias: Tensor | None,
    up: Sequence[Weight],
    gate: Sequence[Weight] | None,
    down: Sequence[Weight],
    norm_eps: float | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The arguments of a Moe."""
    gates = len(up) * [None] if gate is None else gate
    experts = [MlpWeights(*one) for one in zip(up, gates, down, strict=True)]
    return {"router": Router(router, router_bias, norm_eps), "experts": experts, "options": MoeOptions(**options)}
