"""Layers made of these kernels: they take what their twins in `plain` and `native` take.

Dense products are torch's own (cuBLAS). Everything stays on the device: no layer waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_kernels import min_hash, plain, reference
from dsc_kernels.adapters import adapter as adapter
from dsc_kernels.adapters import basis as basis
from dsc_kernels.adapters import summed as summed
from dsc_kernels.backend import UNROUTED
from dsc_kernels.dequantised import dense
from dsc_kernels.gpu import attention
from dsc_kernels.gpu.compiler import check
from dsc_kernels.gpu.contract import contract
from dsc_kernels.gpu.expand import expand
from dsc_kernels.gpu.moe import run_experts
from dsc_kernels.gpu.quantised import float_product, product
from dsc_kernels.gpu.router import router_logits
from dsc_kernels.gpu.select import MAX_PICKS, select
from dsc_kernels.gpu.select_compose import select_compose
from dsc_kernels.plain import chunk_attention as chunk_attention
from dsc_kernels.plain import norm as norm
from dsc_kernels.plain import stack as stack
from dsc_kernels.plain import store_kv as store_kv
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.tunings import tuned_layer, tuned_runs
from dsc_kernels.weights import (
    WHOLE,
    Activation,
    Adapted,
    AtomBank,
    FfnOptions,
    KvCache,
    MlpWeights,
    MoeOptions,
    Router,
    Scope,
    SharedExpert,
    gates_of,
)

NAME = "triton"
name = NAME

WIDE = 2048  # from this d on, few tokens are composed by `contract` and `expand`
FEW_TOKENS = 16
ALIGNED = 16


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """As `backend.Backend` says; the kernel attends to whole contexts by a plain softmax, torch where that differs."""
    if scope != WHOLE or cache.latent or cache.in_int8:
        return plain.decode_attention(q, cache, tables, contexts, max_context_len, scale, scope)
    return attention.decode_attention(q, cache, tables, contexts, max_context_len, scale)


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
    """out = act(x Wᵀ + bias) + residual, W [n, d]: torch's product, which is already the best one on a GPU.

    Few tokens read a quantised weight as it is, and many its numbers.
    """

    backend = NAME
    product = staticmethod(product)
    wide_product = staticmethod(float_product)


Head = Linear


class Mlp(plain.Mlp):
    """`MlpWeights` with their activation."""

    linear = Linear


class Shared(plain.Shared):
    """The shared expert of a mixture: few tokens read its quantised weights as they are."""

    mlp = Mlp


class Ffn:
    """A static MLP plus a routed composition of rank-1 atoms; see `backend.Ffn`.

    The router is kept in the MLP's dtype, since its products are exact in float32. Raises ValueError where shapes or k
    do not fit.
    """

    backend = NAME
    owns_weights = False
    screened = False
    rescored = (0, 0)

    def __init__(
        self, mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None
    ) -> None:
        self.static, self.options = Mlp(mlp, options.activation), options
        self.d, self.dtype = mlp.up.shape[1], mlp.up.dtype
        self.router: Router | None = None
        if router is None and bank is None:
            return
        if router is None or bank is None:
            raise ValueError(UNROUTED)
        atoms, k, rank = router.weight.shape[0], options.k, options.rank
        if not 1 <= k <= min(atoms, MAX_PICKS) or k * max(rank, 1) > MAX_PICKS:
            raise ValueError(f"k is {k}, rank {rank}; k · rank may be at most {MAX_PICKS}, k at most {atoms}")
        u, v = (dense(rows, self.dtype) if isinstance(rows, QuantisedWeight) else rows for rows in (bank.u, bank.v))
        for part, rows in (("u", u), ("v", v)):
            check(part, rows, (atoms * max(rank, 1), self.d), self.dtype)
        self.router = contiguous_router(router, self.dtype)
        self.bank = AtomBank(u.contiguous(), v.contiguous(), bank.gamma.float().contiguous())

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
        *,
        adapted: Adapted | None = None,
    ) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]; the rest as in `backend.Ffn`.

        Grouped tokens always go through `contract` and `expand`, whose sums may round differently.
        """
        check("x", x, (x.shape[0], self.d), self.dtype)
        if self.router is None:
            out = self.static(x, adapted)
            return out if residual is None else out + residual
        out, trace = self._compose(x, residual, picks is not None or signal is not None, grouped, adapted)
        if trace is not None and picks is not None:
            picks[: x.shape[0]] = trace[0]
        if trace is not None and signal is not None:
            signal[: x.shape[0]] = trace[2]
        return out

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        check("x", x, (x.shape[0], self.d), self.dtype)
        out, trace = self._compose(x, residual, traced=True, adapted=adapted)
        assert trace is not None
        return out, *trace

    def _compose(
        self,
        x: Tensor,
        residual: Tensor | None,
        traced: bool,
        grouped: bool = False,
        adapted: Adapted | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        if self.router is None:
            raise ValueError("this layer has no router")
        r, o = self.router, self.options
        u, v = (dense(rows, self.dtype) for rows in (self.bank.u, self.bank.v))
        gamma = self.bank.gamma
        runs = tuned_runs(adapted)
        if runs or o.silent:
            out, picked, *strengths = tuned_layer(x, self.static(x, adapted), runs, r, AtomBank(u, v, gamma), o)
            return (out if residual is None else out + residual), (picked.int(), strengths[0], strengths[1])
        logits, maxima = router_logits(x, dense(r.weight, self.dtype), r.bias, o.tau, r.norm_eps)
        static = self.static(x, adapted)
        if not grouped and (self.d < WIDE or x.shape[0] > FEW_TOKENS):
            return select_compose(logits, maxima, x, u, v, gamma, static, residual, o.k, o.eps, o.rank, traced=traced)
        trace = select(logits, maxima, o.k, o.eps, softmax=o.rank > 0)
        atoms, weights = trace[:2]
        if grouped:
            order = min_hash.min_hash_order(atoms).long()
            x, atoms, weights, static = (t[order] for t in (x, atoms, weights, static))
            residual = None if residual is None else residual[order]
        latent = contract(x, u, atoms, weights, o.rank)
        out = expand(latent, v, atoms, gamma, static, residual, self.dtype, o.rank)
        return (torch.empty_like(out).index_copy_(0, order, out) if grouped else out), trace


def contiguous_router(router: Router, dtype: torch.dtype) -> Router:
    """The same with a weight of this dtype and a float32 bias, as the kernels read them."""
    biases = router.bias, router.choice_bias
    bias, choice = (None if own is None else own.float().contiguous() for own in biases)
    return Router(dense(router.weight, dtype).contiguous(), bias, router.norm_eps, choice)


class Moe:
    """The mixture of experts: routing, grouping by expert, both products and the weighted sum.

    The router is kept in the experts' dtype. The matrices are copied into one tensor each, their hidden width padded
    with zeros to a multiple of 16. Raises ValueError where k does not fit.
    """

    backend = NAME
    owns_weights = True

    def __init__(
        self, router: Router, experts: Sequence[MlpWeights], options: MoeOptions, shared: SharedExpert | None = None
    ) -> None:
        gates = gates_of(experts)
        self.shared = None if shared is None else Shared(shared, options.activation)
        (hidden, self.d), self.dtype = experts[0].up.shape, experts[0].up.dtype
        if not 1 <= options.k <= router.weight.shape[0]:
            raise ValueError(f"k is {options.k}; it must be between 1 and {router.weight.shape[0]}")
        extra = -hidden % ALIGNED
        self.up = padded([expert.up for expert in experts], (0, 0, 0, extra))
        self.gate = padded(gates, (0, 0, 0, extra)) if gates else None
        self.down = padded([expert.down for expert in experts], (0, extra))
        self.router = contiguous_router(router, self.dtype)
        self.activation: Activation = options.activation
        options.check(len(experts))
        self.options = options

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [B, k] and experts int64 [B, k]."""
        r = self.router
        logits, _ = router_logits(x, dense(r.weight, self.dtype), r.bias, torch.inf, r.norm_eps)
        return reference.pick_experts(logits, self.options, r.choice_bias)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        return self.routed(x, residual, adapted=adapted)[0]

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and what was picked: experts int64 [B, k], the best choice first, and weights [B, k]."""
        check("x", x, (x.shape[0], self.d), self.dtype)
        weights, experts = self.route(x)
        if self.shared is not None:
            own = self.shared(x, adapted)
            residual = (own if residual is None else own + residual).to(x.dtype)
        out = run_experts(x, weights, experts, self.up, self.gate, self.down, self.activation, residual)
        return out, experts, weights


def padded(matrices: Sequence[Weight], padding: tuple[int, ...]) -> Tensor:
    """Matrices of one shape stacked, with zeros behind their rows or columns; quantised ones as their numbers."""
    return torch.stack([torch.nn.functional.pad(dense(matrix, matrix.dtype), padding) for matrix in matrices])
