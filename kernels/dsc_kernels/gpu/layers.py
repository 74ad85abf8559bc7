"""Layers made of these kernels: they take what their twins in `plain` and `native` take.

Dense products are torch's own (cuBLAS). Everything stays on the device: no layer waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsc_kernels import grouping, plain, reference
from dsc_kernels.gpu.attention import decode_attention as decode_attention
from dsc_kernels.gpu.compiler import check
from dsc_kernels.gpu.contract import contract
from dsc_kernels.gpu.expand import expand
from dsc_kernels.gpu.moe import run_experts
from dsc_kernels.gpu.router import router_logits
from dsc_kernels.gpu.select import MAX_PICKS, select
from dsc_kernels.gpu.select_compose import select_compose
from dsc_kernels.native import Activation
from dsc_kernels.plain import chunk_attention as chunk_attention
from dsc_kernels.plain import norm as norm
from dsc_kernels.plain import store_kv as store_kv

WIDE = 2048  # from this d on, few tokens are composed by `contract` and `expand`
FEW_TOKENS = 16
ALIGNED = 16


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, tau: float, eps: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms int32 [B, k], coefficients float32 [B, k] and signal [B]; see `reference.route`."""
    logits, maxima = router_logits(x, weight, None if bias is None else bias.float(), tau, norm_eps)
    return select(logits, maxima, k, eps)


def compose(static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """static [B, d] plus the dynamic part of the picked atoms, in x's dtype."""
    atoms, weights = atoms.int(), weights.float()
    return expand(contract(x, u, atoms, weights), v, atoms, gamma.float(), static, None, x.dtype)


class Linear(plain.Linear):
    """out = act(x Wᵀ + bias) + residual, W [n, d]: torch's product, which is already the best one on a GPU."""


class Ffn:
    """A static MLP plus a routed composition of rank-1 atoms: DSC; with `rank`, a mixture of LoRAs; without, dense.

    up, gate [hidden, d], down [d, hidden]; router [atoms, d] folded with its norm (kept in up's dtype, since its
    products are exact in float32), router_bias [atoms]; u, v [atoms · max(rank, 1), d]; gamma [d] or [1]. norm_eps: of
    the folded norm, None without one. Raises ValueError where shapes or k do not fit.
    """

    def __init__(
        self,
        up: Tensor,
        gate: Tensor | None,
        down: Tensor,
        activation: Activation,
        router: Tensor | None = None,
        router_bias: Tensor | None = None,
        u: Tensor | None = None,
        v: Tensor | None = None,
        gamma: Tensor | None = None,
        k: int = 0,
        rank: int = 0,
        tau: float = 0.0,
        eps: float = 0.0,
        norm_eps: float | None = None,
    ) -> None:
        self.static = plain.Mlp(up, gate, down, activation)
        self.d, self.dtype, self.k, self.rank = up.shape[1], up.dtype, k, rank
        self.tau, self.eps, self.norm_eps = tau, eps, norm_eps
        self.router: Tensor | None = None
        if router is None:
            return
        if u is None or v is None or gamma is None:
            raise ValueError("a routed layer needs u, v and gamma")
        atoms = router.shape[0]
        if not 1 <= k <= min(atoms, MAX_PICKS) or k * max(rank, 1) > MAX_PICKS:
            raise ValueError(f"k is {k}, rank {rank}; k · rank may be at most {MAX_PICKS}, k at most {atoms}")
        for name, bank in (("u", u), ("v", v)):
            check(name, bank, (atoms * max(rank, 1), self.d), self.dtype)
        self.router = router.to(self.dtype).contiguous()
        self.router_bias = None if router_bias is None else router_bias.float().contiguous()
        self.u, self.v, self.gamma = u.contiguous(), v.contiguous(), gamma.float().contiguous()

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
    ) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]; the rest as in `native.Ffn`.

        Grouped tokens always go through `contract` and `expand`, whose sums may round differently.
        """
        check("x", x, (x.shape[0], self.d), self.dtype)
        if self.router is None:
            out = self.static(x)
            return out if residual is None else out + residual
        out, trace = self._compose(x, residual, picks is not None or signal is not None, grouped)
        if trace is not None and picks is not None:
            picks[: x.shape[0]] = trace[0]
        if trace is not None and signal is not None:
            signal[: x.shape[0]] = trace[2]
        return out

    def routed(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        check("x", x, (x.shape[0], self.d), self.dtype)
        out, trace = self._compose(x, residual, traced=True)
        assert trace is not None
        return out, *trace

    def _compose(
        self, x: Tensor, residual: Tensor | None, traced: bool, grouped: bool = False
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        if self.router is None:
            raise ValueError("this layer has no router")
        logits, maxima = router_logits(x, self.router, self.router_bias, self.tau, self.norm_eps)
        static = self.static(x)
        if not grouped and (self.d < WIDE or x.shape[0] > FEW_TOKENS):
            bank = (self.u, self.v, self.gamma)
            return select_compose(
                logits, maxima, x, *bank, static, residual, self.k, self.eps, self.rank, traced=traced
            )
        trace = select(logits, maxima, self.k, self.eps, softmax=self.rank > 0)
        atoms, weights = trace[:2]
        if grouped:
            order = grouping.min_hash_order(atoms).long()
            x, atoms, weights, static = (t[order] for t in (x, atoms, weights, static))
            residual = None if residual is None else residual[order]
        latent = contract(x, self.u, atoms, weights, self.rank)
        out = expand(latent, self.v, atoms, self.gamma, static, residual, self.dtype, self.rank)
        return (torch.empty_like(out).index_copy_(0, order, out) if grouped else out), trace


class Moe:
    """The mixture of experts: routing, grouping by expert, both products and the weighted sum.

    router [experts, d] folded with its norm (kept in the experts' dtype); up, gate, down: one matrix per expert. The
    matrices are copied into one tensor each, their hidden width padded with zeros to a multiple of 16.
    """

    owns_weights = True

    def __init__(
        self,
        router: Tensor,
        router_bias: Tensor | None,
        up: list[Tensor],
        gate: list[Tensor] | None,
        down: list[Tensor],
        activation: Activation,
        k: int,
        normalize: bool,
        norm_eps: float | None,
    ) -> None:
        (hidden, self.d), self.dtype = up[0].shape, up[0].dtype
        if not 1 <= k <= router.shape[0]:
            raise ValueError(f"k is {k}; it must be between 1 and {router.shape[0]}")
        extra = -hidden % ALIGNED
        self.up = padded(up, (0, 0, 0, extra))
        self.gate = None if gate is None else padded(gate, (0, 0, 0, extra))
        self.down = padded(down, (0, extra))
        self.router = router.to(self.dtype).contiguous()
        self.router_bias = None if router_bias is None else router_bias.float().contiguous()
        self.activation: Activation = activation
        self.k, self.normalize, self.norm_eps = k, normalize, norm_eps

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [B, k] and experts int64 [B, k]."""
        logits, _ = router_logits(x, self.router, self.router_bias, torch.inf, self.norm_eps)
        weights, experts = reference.softmax_top_k(logits, self.k)
        return (weights / weights.sum(dim=1, keepdim=True) if self.normalize else weights), experts

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        check("x", x, (x.shape[0], self.d), self.dtype)
        weights, experts = self.route(x)
        return run_experts(x, weights, experts, self.up, self.gate, self.down, self.activation, residual)


def padded(matrices: list[Tensor], padding: tuple[int, ...]) -> Tensor:
    """Matrices of one shape stacked, with zeros behind their rows or columns."""
    return torch.stack([torch.nn.functional.pad(matrix, padding) for matrix in matrices])
