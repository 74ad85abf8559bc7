"""What the tests of the C++ kernels share: guarded outputs, a measure of error, and the arguments of layers."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import HealthCheck, settings
from torch import Tensor

from dsc_kernels import reference

GUARD = 64
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.2e-2}
CASES = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Guarded:
    """Stands in for `torch` within `native`: every tensor it makes is poisoned and has guard bands."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        size = torch.Size(shape).numel()
        poison = float("nan") if dtype.is_floating_point else 0x7BADBAD
        buffer = torch.full((size + 2 * GUARD,), poison, dtype=dtype)
        buffer[:GUARD] = buffer[GUARD + size :] = 77
        self.buffers.append(buffer)
        return buffer[GUARD : GUARD + size].view(shape)

    def check(self) -> None:
        for buffer in self.buffers:
            assert bool((buffer[:GUARD] == 77).all()) and bool((buffer[-GUARD:] == 77).all()), "wrote out of bounds"


def error(got: Tensor, want: Tensor, scale: Tensor | None = None) -> float:
    """Error of the whole by norm, relative to `scale` (by default the result); NaN counts as infinite.

    Where terms cancel, `scale` is what the result would be if all had one sign: rounding errors are relative to that.
    """
    size = (want if scale is None else scale).double().norm().clamp_min(1e-30)
    return float(((got.double() - want.double()).norm() / size).nan_to_num(torch.inf))


def random(generator: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def routed_layer(
    g: torch.Generator, dtype: torch.dtype, d: int, atoms: int, k: int, hidden: int, **changes: Any
) -> Any:
    """The arguments of a DSC layer, for `ffn_parts` and for the oracle."""
    gated = changes.pop("gated", False)
    weights = {
        "up": random(g, dtype, hidden, d, scale=d**-0.5),
        "gate": random(g, dtype, hidden, d, scale=d**-0.5) if gated else None,
        "down": random(g, dtype, d, hidden, scale=hidden**-0.5),
        "activation": "gelu",
        "router": random(g, dtype, atoms, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, atoms, scale=0.3),
        "u": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "v": reference.project(random(g, torch.float32, atoms, d), 1e-6).to(dtype),
        "gamma": torch.rand(d, generator=g),
        "k": k,
        "tau": 20.0,
        "eps": 1e-6,
        "norm_eps": 1e-5,
    }
    return {**weights, **changes}


def moe_layer(g: torch.Generator, dtype: torch.dtype, d: int, hidden: int, experts: int, k: int) -> dict[str, Any]:
    return {
        "router": random(g, dtype, experts, d, scale=d**-0.5),
        "router_bias": random(g, torch.float32, experts, scale=0.3),
        "up": [random(g, dtype, hidden, d, scale=d**-0.5) for _ in range(experts)],
        "gate": None,
        "down": [random(g, dtype, d, hidden, scale=hidden**-0.5) for _ in range(experts)],
        "activation": "gelu",
        "k": k,
        "normalize": False,
        "norm_eps": 1e-5,
    }
