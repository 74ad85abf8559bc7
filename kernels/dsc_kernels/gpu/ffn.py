"""Products and FFN layers made of these kernels: they take what their twins in `plain` and `native` take.

Products of many tokens are torch's own (cuBLAS), those of few tokens ours, with what is around them. Everything stays
on the device: no layer waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dsc_kernels import min_hash, plain
from dsc_kernels.backend import UNROUTED
from dsc_kernels.dequantised import dense
from dsc_kernels.gpu.add_norm import Moments, Parts, add_norm, moments_of, rstd_of, summed
from dsc_kernels.gpu.compiler import check
from dsc_kernels.gpu.contract import contract
from dsc_kernels.gpu.expand import expand
from dsc_kernels.gpu.ffn_in import route_beside, router_logits
from dsc_kernels.gpu.moe import SharedBeside, expert_slots
from dsc_kernels.gpu.pick_experts import pick_experts
from dsc_kernels.gpu.product import fused, multiply
from dsc_kernels.gpu.quantised import float_product, product
from dsc_kernels.gpu.rescore import screened_beside
from dsc_kernels.gpu.route_experts import norm_and_pick, scored_beside
from dsc_kernels.gpu.screen import SCREENED_TOKENS, Screen, screen
from dsc_kernels.gpu.select import MAX_PICKS, select
from dsc_kernels.gpu.select_compose import WIDE, compose_beside, select_compose
from dsc_kernels.native import router_precision
from dsc_kernels.quantised import QuantisedWeight, Weight
from dsc_kernels.tunings import Tuned, tuned_layer, tuned_runs
from dsc_kernels.weights import (
    OUTPUT_ONLY,
    Activation,
    Adapted,
    AtomBank,
    FfnOptions,
    LayerOutputs,
    MlpWeights,
    MoeOptions,
    NormWeights,
    Router,
    SharedExpert,
    gates_of,
)

NAME = "triton"
SPREAD_TOKENS = 256  # up to which rows of a wide bank are spread over programs, by `contract` and `expand`
ALIGNED = 16


class Linear(plain.Linear):
    """out = act(x Wᵀ + bias) + residual, W [n, d]: torch's product, which is already the best one on a GPU.

    Few tokens read a quantised weight as it is, and many its numbers.
    """

    backend = NAME
    product = staticmethod(product)
    wide_product = staticmethod(float_product)

    def parts(self, x: Tensor) -> Parts:
        """What the product of x [B, d] gives, as terms [n]: of few tokens in one launch of ours."""
        if isinstance(self.weight, Tensor) and fused(*x.shape):
            return Parts.of(multiply(x, self.weight, self.bias))
        return Parts.of(self(x)[None])


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

    def __init__(
        self, mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None
    ) -> None:
        self.static, self.options, self.mlp = Mlp(mlp, options.activation), options, mlp
        self.d, self.dtype = mlp.up.shape[1], mlp.up.dtype
        weights = (mlp.up, mlp.gate, mlp.down)
        self._whole = not any(isinstance(weight, QuantisedWeight) for weight in weights)
        self.router: Router | None = None
        self.screen: Screen | None = None
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
        # Tokens of a silent layer's tenants are routed in plain torch, and no others
        if router_precision() == "int8-certified" and rank == 0 and not options.silent:
            assert isinstance(self.router.weight, Tensor)
            self.screen = screen(self.router.weight)

    @property
    def screened(self) -> bool:
        """Whether its router is screened in int8, which it is in steps of few tokens."""
        return self.screen is not None

    @property
    def rescored(self) -> tuple[int, int]:
        """Router rows that screening could not rule out so far, and the tokens that this was for, those that a captured
        step is padded with among them; 0 where none is. Waits for the device where it is screened."""
        return (0, 0) if self.screen is None else self.screen.counted

    def screens(self, tokens: int) -> bool:
        """Whether its router is screened in a step of so many tokens."""
        return self.screen is not None and tokens <= SCREENED_TOKENS

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
        return self._summed(x, residual, LayerOutputs(grouped, picks, None, signal), adapted)

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms int32 [B, k], coefficients [B, k] and signal [B] in float32."""
        if self.router is None:
            raise ValueError("this layer has no router")
        outputs = LayerOutputs.everything(x.shape[0], self.options.k, device=x.device)
        out = self._summed(x, residual, outputs, adapted)
        assert outputs.picks is not None and outputs.weights is not None and outputs.signal is not None
        return out, outputs.picks, outputs.weights, outputs.signal

    def after(
        self, residual: Tensor, parts: Parts | None, norm: NormWeights, outputs: LayerOutputs = OUTPUT_ONLY
    ) -> tuple[Tensor, Parts]:
        """The stream x = residual + parts [B, d], and what the layer gives for the norm of it."""
        eps = None if self.router is None else self.router.norm_eps
        x, normed, *moments = add_norm(residual, parts, norm, eps, self.screens(residual.shape[0]))
        return x, self.parts(normed, Moments(*moments), outputs)

    def _summed(self, x: Tensor, residual: Tensor | None, outputs: LayerOutputs, adapted: Adapted | None) -> Tensor:
        check("x", x, (x.shape[0], self.d), self.dtype)
        x = x.contiguous()
        eps = None if self.router is None else self.router.norm_eps
        parts = self.parts(x, moments_of(x, eps, self.screens(x.shape[0])), outputs, adapted)
        if residual is None and parts.number == 1 and parts.terms.dtype == self.dtype:
            return parts.terms[0]
        return summed(None if residual is None else residual.contiguous(), parts, self.dtype)

    def parts(
        self,
        x: Tensor,
        moments: Moments,
        outputs: LayerOutputs = OUTPUT_ONLY,
        adapted: Adapted | None = None,
    ) -> Parts:
        """What the layer gives for x [B, d], as terms; moments: of its rows, those that the router asks for.

        outputs: what is picked is written to what there is of these. adapted: as in `backend.Layer`.
        """
        ours = adapted is None and self._whole and not outputs.grouped and fused(*x.shape)
        if self.router is None:
            if not ours:
                return Parts.of(self.static(x, adapted)[None])
            _, hidden = route_beside(x, None, None, None, 0.0, self.mlp, self.options.activation)
            assert hidden is not None
            return Parts.of(multiply(hidden, self.mlp.down, self.mlp.down_bias))  # type: ignore[arg-type]
        r, o, runs = self.router, self.options, tuned_runs(adapted)
        if runs or o.silent:
            return Parts.of(self._tuned(x, runs, adapted, outputs)[None])
        if ours:
            scores, hidden = self._scores(x, r, moments, self.mlp)
            assert hidden is not None
            down, bias = self.mlp.down, self.mlp.down_bias
            return Parts.of(compose_beside(*scores, x, self.bank, hidden, down, bias, o, outputs))  # type: ignore[arg-type]
        (logits, maxima), _ = self._scores(x, r, moments, None)
        static = self.static(x, adapted)
        if not outputs.grouped and (self.d < WIDE or x.shape[0] > SPREAD_TOKENS):
            return Parts.of(select_compose(logits, maxima, x, self.bank, static, o, outputs)[None])
        trace = select(logits, maxima, o.k, o.eps, o.rank > 0, outputs)
        return Parts.of(self._spread(x, static, *trace[:2], outputs.grouped)[None])

    def _scores(
        self, x: Tensor, r: Router, moments: Moments, mlp: MlpWeights | None
    ) -> tuple[tuple[Tensor, Tensor], Tensor | None]:
        """Logits and maxima from which the same is picked whether they are screened or not, and what an MLP raises."""
        o = self.options
        assert isinstance(r.weight, Tensor)
        if self.screen is not None and self.screens(x.shape[0]):
            return screened_beside(x, r.weight, r.bias, moments, o.tau, o.k, self.screen, mlp, o.activation)
        scores, hidden = route_beside(x, r.weight, r.bias, moments.rstd, o.tau, mlp, o.activation)
        assert scores is not None
        return scores, hidden

    def _tuned(self, x: Tensor, runs: Sequence[Tuned], adapted: Adapted | None, outputs: LayerOutputs) -> Tensor:
        """Where tokens have biases and scales of their own, and of a silent layer: in plain torch."""
        assert self.router is not None
        static = self.static(x, adapted)
        out, *found = tuned_layer(x, static, runs, self.router, self.bank, self.options)
        for room, told in zip((outputs.picks, outputs.weights, outputs.signal), found, strict=True):
            if room is not None:
                room[: x.shape[0]] = told
        return out

    def _spread(self, x: Tensor, static: Tensor, atoms: Tensor, weights: Tensor, grouped: bool) -> Tensor:
        """static plus the composition, its rows spread over programs; grouped: tokens in an order that shares atoms."""
        order = min_hash.min_hash_order(atoms).long() if grouped else None
        if order is not None:
            x, atoms, weights, static = (t[order] for t in (x, atoms, weights, static))
        u, v, gamma = self.bank.u, self.bank.v, self.bank.gamma
        assert isinstance(u, Tensor) and isinstance(v, Tensor)
        latent = contract(x, u, atoms, weights, self.options.rank)
        out = expand(latent, v, atoms, gamma, static, None, self.dtype, self.options.rank)
        return out if order is None else torch.empty_like(out).index_copy_(0, order, out)


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
        self._shared = whole_shared(shared, bool(gates))
        self.router = contiguous_router(router, self.dtype)
        self.activation: Activation = options.activation
        options.check(len(experts))
        self.options = options

    def route(
        self, x: Tensor, rstd: Tensor | None = None, outputs: LayerOutputs = OUTPUT_ONLY
    ) -> tuple[Tensor, Tensor]:
        """Weights float32 [B, k] and experts int32 [B, k]; rstd: of x [B, d], found here where it is not given."""
        r = self.router
        if rstd is None and r.norm_eps is not None:
            rstd = rstd_of(x, r.norm_eps)
        assert isinstance(r.weight, Tensor)
        logits, _ = router_logits(x, r.weight, r.bias, torch.inf, rstd)
        return pick_experts(logits, self.options, r.choice_bias, outputs)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        return self.routed(x, residual, adapted=adapted)[0]

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and what was picked: experts int32 [B, k], the best choice first, and weights [B, k]."""
        check("x", x, (x.shape[0], self.d), self.dtype)
        x = x.contiguous()
        weights, experts = self.route(x)
        parts = self._experts(x, weights, experts, adapted)
        return summed(None if residual is None else residual.contiguous(), parts, self.dtype), experts, weights

    def after(
        self, residual: Tensor, parts: Parts | None, norm: NormWeights, outputs: LayerOutputs = OUTPUT_ONLY
    ) -> tuple[Tensor, Parts]:
        """The stream x = residual + parts [B, d], and what the layer gives for the norm of it."""
        gate = None if self.shared is None else self.shared.gate
        if scored_beside(residual.shape[0], *self.router.weight.shape):
            (x, normed, *_), picked, weighed = norm_and_pick(
                residual, parts, norm, self.router, self.options, gate, outputs
            )
            beside = self._beside(x, weighed)
            return x, self._experts(normed, *picked, beside=beside)
        x, normed, rstd, _ = add_norm(residual, parts, norm, self.router.norm_eps)
        beside = None if gate is not None else self._beside(x, None)
        return x, self._experts(normed, *self.route(normed, rstd, outputs), beside=beside)

    def _beside(self, x: Tensor, weights: Tensor | None) -> SharedBeside | None:
        """The shared expert, where its products are launched with the others'; None: they are not."""
        return None if self._shared is None or not fused(*x.shape) else SharedBeside(self._shared, weights)

    def _experts(
        self,
        x: Tensor,
        weights: Tensor,
        experts: Tensor,
        adapted: Adapted | None = None,
        beside: SharedBeside | None = None,
    ) -> Parts:
        slots = expert_slots(x, weights, experts, self.up, self.gate, self.down, self.activation, beside)
        further = None
        if self.shared is not None and beside is None:
            further = self.shared(x, adapted).contiguous()
        number = slots.shape[1]
        return Parts(slots, number, self.d, number * self.d, further)


def whole_shared(shared: SharedExpert | None, gated: bool) -> MlpWeights | None:
    """Its weights, contiguous, where the experts' kernels take them."""
    if shared is None:
        return None
    mlp = shared.mlp
    whole = not any(isinstance(weight, QuantisedWeight) for weight in (mlp.up, mlp.gate, mlp.down))
    if not whole or (mlp.gate is not None) != gated or any(bias is not None for bias in mlp.biases):
        return None
    return MlpWeights(*(w.contiguous() if isinstance(w, Tensor) else None for w in (mlp.up, mlp.gate, mlp.down)))  # type: ignore[arg-type]


def padded(matrices: Sequence[Weight], padding: tuple[int, ...]) -> Tensor:
    """Matrices of one shape stacked, with zeros behind their rows or columns; quantised ones as their numbers."""
    return torch.stack([torch.nn.functional.pad(dense(matrix, matrix.dtype), padding) for matrix in matrices])
