"""Arguments of every registered operator, for its checks in torch, in C++ and in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsc_kernels import reference

TAU, EPS, NORM_EPS = 20.0, 1e-6, 1e-5


def random(g: torch.Generator, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=g) * scale).to(dtype)


def bank(g: torch.Generator, dtype: torch.dtype, rows: int, d: int) -> Tensor:
    return reference.project(random(g, torch.float32, rows, d), EPS).to(dtype)


def arguments(
    name: str, dtype: torch.dtype, tokens: int, d: int, atoms: int, k: int, hidden: int = 33, gated: bool = False
) -> tuple[Any, ...]:
    """What `torch.ops.dsc.NAME` and `reference.NAME` take; atoms are experts or adapters where those are picked."""
    g = torch.Generator().manual_seed(tokens * 7919 + d * 101 + atoms + k)
    x, residual = random(g, dtype, tokens, d), random(g, dtype, tokens, d)
    router, bias = random(g, dtype, atoms, d, scale=d**-0.5), random(g, torch.float32, atoms, scale=0.3)

    def matrices(*lead: int) -> tuple[Tensor, Tensor | None, Tensor]:
        up, gate = (random(g, dtype, *lead, hidden, d, scale=d**-0.5) for _ in range(2))
        return up, gate if gated else None, random(g, dtype, *lead, d, hidden, scale=hidden**-0.5)

    if name == "route":
        return x, router, bias, k, TAU, EPS, NORM_EPS
    if name == "compose":
        picks = torch.stack([torch.randperm(atoms, generator=g)[:k] for _ in range(tokens)]) if tokens else None
        picks = torch.empty(0, k) if picks is None else picks
        rest = (bank(g, dtype, atoms, d), bank(g, dtype, atoms, d), torch.rand(d, generator=g))
        return residual, x, picks.int(), torch.rand(tokens, k, generator=g) / k, *rest
    if name == "dsc_layer":
        rest = (bank(g, dtype, atoms, d), bank(g, dtype, atoms, d), torch.rand(d, generator=g))
        return x, residual, *matrices(), "gelu", router, bias, *rest, k, TAU, EPS, NORM_EPS
    if name == "molora_layer":
        adapters = (random(g, dtype, atoms, 3, d, scale=d**-0.5) for _ in range(2))
        return x, residual, *matrices(), "silu", router, bias, *adapters, k, NORM_EPS
    if name == "moe_layer":
        return x, residual, router, bias, *matrices(atoms), "gelu", k, True, NORM_EPS
    assert name == "decode_attention"
    heads, block, max_context_len = 2, 5, 17
    width = -(-max_context_len // block)
    pools = (random(g, dtype, tokens * width + 1, heads, block, 16) for _ in range(2))
    tables = torch.randperm(tokens * width + 1, generator=g)[: tokens * width].view(tokens, width)
    contexts = torch.randint(1, max_context_len + 1, (tokens,), generator=g)
    return random(g, dtype, tokens, 2 * heads, 16), *pools, tables, contexts, max_context_len, 0.25


def wide(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same in float64; atoms as the oracle indexes with them."""
    return tuple((v.double() if v.is_floating_point() else v.long()) if isinstance(v, Tensor) else v for v in values)


def decided(x: Tensor, router: Tensor, bias: Tensor | None, k: int) -> Tensor:
    """Tokens whose k-th logit leads the next by more than rounding could turn around."""
    logits = reference.router_logits(x.double(), router.double(), None if bias is None else bias.double(), NORM_EPS)
    ranked = logits.clamp(-TAU, TAU).sort(dim=1, descending=True).values
    if k == ranked.shape[1]:
        return torch.ones(len(x), dtype=torch.bool)
    return ranked[:, k - 1] - ranked[:, k] > 1e-3
