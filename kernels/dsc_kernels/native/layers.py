"""Linear and FFN layers with packed weights, and norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from dsc_kernels.memory import resident
from dsc_kernels.native.dispatch import module, screens, threads
from dsc_kernels.native.tensors import address, check, half
from dsc_kernels.screen import NO_SCREEN, padded_bias, screen

Activation = Literal["none", "gelu", "silu"]

LANES = 16
MAX_PICKS = 64
ACTIVATIONS: dict[str, int] = {"none": 0, "gelu": 1, "silu": 2}


def pack(*weights: Tensor) -> Tensor:
    """Weights [N, D] of one shape and dtype, packed one after the other into panels of 16 outputs."""
    first = weights[0]
    n, d = first.shape
    if not n or not d:
        raise ValueError(f"a weight is {first.dtype} {list(first.shape)}; its sizes must be at least 1")
    kind = half(first.dtype)
    width = -(-d // 2) * 2 if kind else d
    packed = torch.empty(len(weights), -(-n // LANES) * LANES * width, dtype=first.dtype)
    for weight, out in zip(weights, packed, strict=True):
        check("a weight", weight, (n, d), first.dtype)
        rows = weight.contiguous()  # under a name: a copy must live until it is packed
        module().pack(kind, rows.data_ptr(), n, d, out.data_ptr())
    return packed


def check_all(shapes: Mapping[str, tuple[Tensor | None, tuple[int, ...]]], dtype: torch.dtype | None = None) -> None:
    """Raise ValueError unless those tensors that there are have these shapes and, where it matters, this dtype."""
    for name, (tensor, shape) in shapes.items():
        if tensor is not None:
            check(name, tensor, shape, dtype or tensor.dtype)


class Linear:
    """out = act(x Wᵀ + bias) + residual with a packed weight W [n, d]; sums in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.packed = resident(pack(weight))
        self.n, self.d = weight.shape
        self.dtype = weight.dtype
        check_all({"bias": (bias, (self.n,))})
        self.bias = None if bias is None else bias.float().contiguous()
        self._half = half(self.dtype)

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [B, d] → [B, n] in x's dtype, or in float32 when out_dtype says so (then without residual)."""
        batch = x.shape[0]
        check("x", x, (batch, self.d), self.dtype)
        if out_dtype not in (None, self.dtype, torch.float32):
            raise ValueError(f"out_dtype is {out_dtype}; allowed: {self.dtype} and torch.float32")
        out = torch.empty(batch, self.n, dtype=out_dtype or self.dtype)
        if residual is not None:
            check("residual", residual, (batch, self.n), out.dtype)
            residual = residual.contiguous()
        x = x.contiguous()
        wide = int(out.dtype == torch.float32)
        if batch:
            module().linear(
                *(self._half, x.data_ptr(), self.packed.data_ptr(), address(self.bias), address(residual)),
                *(out.data_ptr(), batch, self.d, self.n, ACTIVATIONS[activation], wide, threads()),
            )
        return out


class _Layer:
    """What FFN layers share: a capsule of addresses, and the tensors that must outlive it."""

    owns_weights = True

    def __init__(self, d: int, dtype: torch.dtype) -> None:
        self.d, self.dtype = d, dtype
        self._kept: list[Tensor] = []
        self.capsule: object = None

    def _keep(self, tensor: Tensor | None) -> int:
        if tensor is None:
            return 0
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _ready(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
        check("x", x, (x.shape[0], self.d), self.dtype)
        if residual is not None:
            check("residual", residual, (x.shape[0], self.d), self.dtype)
            residual = residual.contiguous()
        return x.contiguous(), residual, torch.empty(x.shape[0], self.d, dtype=self.dtype)


class Ffn(_Layer):
    """A static MLP plus a routed composition of rank-1 atoms: DSC; with `rank`, a mixture of LoRAs; without, dense.

    up, gate [hidden, d], down [d, hidden]; router [atoms, d] folded with its norm, router_bias [atoms];
    u, v [atoms · max(rank, 1), d]; gamma float32 [d] or [1]. norm_eps: of the folded norm, None without one.
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
        hidden, d = up.shape
        super().__init__(d, up.dtype)
        self.k, self.atoms = k, 0 if router is None else router.shape[0]
        if not min(1, self.atoms) <= k <= self.atoms or rank < 0 or k * max(rank, 1) > MAX_PICKS:
            raise ValueError(f"k is {k}, rank {rank}; k · rank may be at most {MAX_PICKS}, k from 1 to {self.atoms}")
        if router is not None and (u is None or v is None or gamma is None):
            raise ValueError("a routed layer needs u, v and gamma")
        bank = (self.atoms * max(rank, 1), d)
        shapes = {"gate": (gate, (hidden, d)), "down": (down, (d, hidden)), "router": (router, (self.atoms, d))}
        check_all({**shapes, "u": (u, bank), "v": (v, bank)}, self.dtype)
        gamma_shape = (1 if gamma is not None and gamma.numel() == 1 else d,)
        check_all({"router_bias": (router_bias, (self.atoms,)), "gamma": (gamma, gamma_shape)})
        bias = None if router is None else padded_bias(router_bias, self.atoms)
        screened = router is not None and rank == 0 and screens(router, k)
        self.screen = screen(router, router_bias, rows=True) if router is not None and screened else NO_SCREEN
        pieces = [None if w is None else resident(pack(w)) for w in (up, gate, down, None if screened else router)]
        scale = None if gamma is None else gamma.float()
        self.capsule = module().ffn_layer(
            half(self.dtype),
            *(self._keep(p) for p in pieces),
            *(self._keep(t) for t in (bias, u, v, scale)),
            *(d, hidden, self.atoms, tau, eps, -1.0 if norm_eps is None else norm_eps, k, rank),
            *(int(scale is not None and scale.numel() == 1), ACTIVATIONS[activation]),
            *(self._keep(t) for t in self.screen.tensors),
            *(self.screen.slack, self._keep(self.screen.counts)),
        )

    def __call__(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        grouped: bool = False,
        picks: Tensor | None = None,
        signal: Tensor | None = None,
    ) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d].

        grouped: compose the tokens in an order in which neighbours share atoms; the output is the same, bit for bit.
        picks int32 [≥ B, k], signal float32 [≥ B]: where given, the atoms picked and the signal are written there.
        """
        x, residual, out = self._ready(x, residual)
        self._run(x, residual, out, grouped, picks, None, signal)
        return out

    def routed(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        if not self.atoms:
            raise ValueError("this layer has no router")
        x, residual, out = self._ready(x, residual)
        picks = torch.empty(x.shape[0], self.k, dtype=torch.int32)
        weights, signal = torch.empty(x.shape[0], self.k), torch.empty(x.shape[0])
        self._run(x, residual, out, False, picks, weights, signal)
        return out, picks, weights, signal

    def _run(
        self,
        x: Tensor,
        residual: Tensor | None,
        out: Tensor,
        grouped: bool,
        picks: Tensor | None,
        weights: Tensor | None,
        signal: Tensor | None,
    ) -> None:
        batch = x.shape[0]
        self.check_asked(batch, picks, weights, signal)
        if batch:
            module().ffn(
                *(self.capsule, x.data_ptr(), address(residual), out.data_ptr(), batch, threads()),
                *(address(picks), address(weights), address(signal), int(grouped)),
            )

    def check_asked(self, batch: int, picks: Tensor | None, weights: Tensor | None, signal: Tensor | None) -> None:
        """Raise ValueError unless there is room for what so many tokens pick: [≥ batch, k], of the signal [≥ batch]."""
        for name, tensor, dtype in (("picks", picks, torch.int32), ("weights", weights, torch.float32)):
            if tensor is not None:
                check(name, tensor, (max(batch, tensor.shape[0]), self.k), dtype, in_place=True)
        if signal is not None:
            check("signal", signal, (max(batch, signal.shape[0]),), torch.float32, in_place=True)


class Moe(_Layer):
    """The mixture of experts in one call: routing, grouping by expert, both products and the weighted sum.

    router [experts, d] folded with its norm; up, gate, down: one matrix per expert.
    """

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
        hidden, d = up[0].shape
        super().__init__(d, up[0].dtype)
        experts = router.shape[0]
        if not 1 <= k <= min(experts, MAX_PICKS):
            raise ValueError(f"k is {k}; it must be between 1 and {min(experts, MAX_PICKS)}")
        shapes = {"router": (router, (experts, d))}
        for name, matrices, shape in (
            ("up", up, (hidden, d)),
            ("gate", gate, (hidden, d)),
            ("down", down, (d, hidden)),
        ):
            if matrices is not None and len(matrices) != experts:
                raise ValueError(f"{name} has {len(matrices)} matrices; expected one for each of {experts} experts")
            shapes |= {f"{name} of expert {e}": (matrix, shape) for e, matrix in enumerate(matrices or ())}
        check_all(shapes, self.dtype)
        check_all({"router_bias": (router_bias, (experts,))})
        bias = None if router_bias is None else router_bias.float()
        self.capsule = module().moe_layer(
            half(self.dtype),
            *(self._keep(resident(pack(router))), self._keep(bias)),
            *(0 if ws is None else self._keep(resident(pack(*ws))) for ws in (up, gate, down)),
            *(d, hidden, experts, -1.0 if norm_eps is None else norm_eps, k, int(normalize), ACTIVATIONS[activation]),
        )

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        x, residual, out = self._ready(x, residual)
        if x.shape[0]:
            module().moe(self.capsule, x.data_ptr(), address(residual), out.data_ptr(), x.shape[0], threads())
        return out


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d] with weight [d] of x's dtype, in float32 and rounded once."""
    batch, d = x.shape
    check("x", x, (batch, d), x.dtype)
    check_all({"weight": (weight, (d,)), "bias": (bias, (d,))}, x.dtype)
    bias = None if bias is None else bias.contiguous()
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty(batch, d, dtype=x.dtype)
    if batch:
        addresses = x.data_ptr(), weight.data_ptr(), address(bias), out.data_ptr()
        module().norm(half(x.dtype), *addresses, batch, d, eps, threads())
    return out
