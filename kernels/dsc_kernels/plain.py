"""The layers in plain torch, for every device and dtype: what serves where no kernel of ours does.

A backend (`backend.Backend`) that knows nothing of `native`. Routers are kept in float32, since selection needs float32
logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels import min_hash, reference, scoped
from dsc_kernels.adapters import adapted_product
from dsc_kernels.adapters import adapter as adapter
from dsc_kernels.adapters import basis as basis
from dsc_kernels.adapters import summed as summed
from dsc_kernels.backend import UNROUTED
from dsc_kernels.chunks import one_by_one
from dsc_kernels.dequantised import WIDE_ROWS as WIDE_ROWS
from dsc_kernels.dequantised import dense, product, wide_product
from dsc_kernels.kv_rows import narrow_rows
from dsc_kernels.picking import compose_add as compose_add
from dsc_kernels.picking import compose_rows as compose_rows
from dsc_kernels.picking import order_keys as order_keys
from dsc_kernels.picking import select as select
from dsc_kernels.picking import top_k as top_k
from dsc_kernels.quantised import Weight
from dsc_kernels.scoped import gather_context
from dsc_kernels.tunings import tuned_layer, tuned_runs
from dsc_kernels.weights import (
    WHOLE,
    Activation,
    Adapted,
    AtomBank,
    DecoderLayer,
    FfnOptions,
    KvCache,
    MlpWeights,
    MoeOptions,
    NormWeights,
    QkNorm,
    Router,
    Scope,
    SharedExpert,
    Slots,
)

NAME = "plain"
name = NAME
dequantises: tuple[str, ...] = ()
ACTIVATIONS = reference.ACTIVATIONS


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, tau: float, eps: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.route` with float32 logits."""
    bias = None if bias is None else bias.float()
    selected, atoms = select(reference.router_logits(x.float(), weight.float(), bias, norm_eps), k, tau)
    return atoms, *reference.coefficients(selected, eps)


def compose(static: Tensor, x: Tensor, atoms: Tensor, weights: Tensor, u: Weight, v: Weight, gamma: Tensor) -> Tensor:
    """`compose_add` in x's dtype."""
    return compose_add(static, x, atoms, weights, u, v, gamma).to(x.dtype)


class Linear:
    """out = act(x Wᵀ + bias) + residual, W [n, d]; also as an output head."""

    backend = NAME
    screened = False
    product = staticmethod(product)
    wide_product = staticmethod(wide_product)

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(
        self,
        x: Tensor,
        activation: Activation = "none",
        residual: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x [B, d] → [B, n]."""
        if out_dtype == torch.float32 and x.dtype.itemsize < 4:
            y = self.wide_product(x, self.weight)
            y = y if self.bias is None else y + self.bias
        else:
            y = self.product(x, self.weight, self.bias)
        y = ACTIVATIONS[activation](y)
        if residual is not None:
            y = y + residual
        return y if out_dtype is None else y.to(out_dtype)

    def argmax(self, x: Tensor) -> Tensor:
        """Where each row has its largest output: int64 [B]."""
        return self(x, out_dtype=torch.float32).argmax(dim=1)


Head = Linear


class Mlp:
    """`MlpWeights` with their activation; GELU in its exact form."""

    linear = Linear  # its products

    def __init__(self, weights: MlpWeights, activation: Activation) -> None:
        self.weights, self.activation = weights, ACTIVATIONS[activation]

    def __call__(self, x: Tensor, adapted: Adapted | None = None) -> Tensor:
        w = self.weights

        def product(x: Tensor, weight: Weight, bias: Tensor | None, name: str) -> Tensor:
            layer = self.linear(weight, bias)
            return layer(x) if adapted is None else adapted_product(layer, x, adapted, {name: 0})

        up = product(x, w.up, w.up_bias, "up")
        if w.gate is None:
            hidden = self.activation(up)
        else:
            hidden = self.activation(product(x, w.gate, w.gate_bias, "gate")) * up
        return product(hidden, w.down, w.down_bias, "down")


class Ffn:
    """A static MLP plus a routed composition of rank-1 atoms; see `backend.Ffn`."""

    backend = NAME
    owns_weights = False
    screened = False
    rescored = (0, 0)

    def __init__(
        self, mlp: MlpWeights, options: FfnOptions, router: Router | None = None, bank: AtomBank | None = None
    ) -> None:
        if (router is None) != (bank is None):
            raise ValueError(UNROUTED)
        self.static, self.options = Mlp(mlp, options.activation), options
        self.router = None if router is None else wide_router(router)
        self.bank = None if bank is None else AtomBank(bank.u, bank.v, bank.gamma.float())

    def screens(self, tokens: int) -> bool:
        """Whether its router is screened in a step of so many tokens."""
        return False

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
        """x [B, d] → the layer's output plus residual, [B, d]; the rest as in `backend.Ffn`."""
        if self.router is None:
            out = self.static(x, adapted)
        else:
            out, atoms, _, strength = self.routed(x, None, grouped, adapted=adapted)
            if picks is not None:
                picks[: x.shape[0]] = atoms
            if signal is not None:
                signal[: x.shape[0]] = strength
        return out if residual is None else out + residual

    def routed(
        self, x: Tensor, residual: Tensor | None = None, grouped: bool = False, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The output, and what was picked: atoms [B, k], coefficients [B, k] and signal [B] in float32."""
        if self.router is None or self.bank is None:
            raise ValueError("this layer has no router")
        r, bank, o = self.router, (self.bank.u, self.bank.v, self.bank.gamma), self.options
        runs = tuned_runs(adapted)
        if runs or o.silent:
            out, atoms, weights, signal = tuned_layer(x, self.static(x, adapted), runs, r, self.bank, o)
            return out if residual is None else out + residual, atoms, weights, signal
        rows_of_router = dense(r.weight, torch.float32)
        if o.rank:
            logits = reference.router_logits(x.float(), rows_of_router, r.bias, r.norm_eps)
            selected, atoms = select(logits, o.k, o.tau)
            weights, signal = selected.softmax(dim=1), x.new_zeros(x.shape[0], dtype=torch.float32)
            rows = (atoms[:, :, None] * o.rank + torch.arange(o.rank, device=x.device)).flatten(1)
            spread = weights.repeat_interleave(o.rank, dim=1)
        else:
            atoms, weights, signal = route(x, rows_of_router, r.bias, o.k, o.tau, o.eps, r.norm_eps)
            rows, spread = atoms, weights
        static = self.static(x, adapted)
        if grouped:
            order = min_hash.min_hash_order(atoms).long()
            composed = compose_add(static[order], x[order], rows[order], spread[order], *bank)
            out = torch.empty_like(composed).index_copy_(0, order, composed)
        else:
            out = compose_add(static, x, rows, spread, *bank)
        out = out.to(x.dtype)
        return out if residual is None else out + residual, atoms, weights, signal


def wide_router(router: Router) -> Router:
    """The same in float32."""
    bias, choice = (None if own is None else own.float() for own in (router.bias, router.choice_bias))
    return Router(dense(router.weight, torch.float32), bias, router.norm_eps, choice)


class Shared:
    """The shared expert of a mixture."""

    mlp = Mlp  # its products and what is between them

    def __init__(self, shared: SharedExpert, activation: Activation) -> None:
        self.expert = self.mlp(shared.mlp, activation)
        self.gate = None if shared.gate is None else shared.gate.float()

    def __call__(self, x: Tensor, adapted: Adapted | None = None) -> Tensor:
        """x [B, d] → its output in float32, weighted by its gate where it has one."""
        out = self.expert(x, adapted).float()
        return out if self.gate is None else out * (x.float() @ self.gate).sigmoid()[:, None]


class Moe:
    """The mixture of experts: tokens sorted by expert, one pair of products per expert."""

    backend = NAME
    owns_weights = False

    def __init__(
        self, router: Router, experts: Sequence[MlpWeights], options: MoeOptions, shared: SharedExpert | None = None
    ) -> None:
        options.check(len(experts))
        self.experts = [Mlp(expert, options.activation) for expert in experts]
        self.shared = None if shared is None else Shared(shared, options.activation)
        self.router, self.options, self.k = wide_router(router), options, options.k

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float32 [B, k] and experts int64 [B, k]."""
        r = self.router
        logits = reference.router_logits(x.float(), dense(r.weight, torch.float32), r.bias, r.norm_eps)
        return reference.pick_experts(logits, self.options, r.choice_bias)

    def __call__(self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None) -> Tensor:
        """x [B, d] → the layer's output plus residual, [B, d]."""
        return self.routed(x, residual, adapted=adapted)[0]

    def routed(
        self, x: Tensor, residual: Tensor | None = None, *, adapted: Adapted | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The output, and what was picked: experts int64 [B, k], the best choice first, and weights [B, k]."""
        weights, experts = self.route(x)
        flat = experts.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=len(self.experts)).tolist()
        tokens = order // self.k
        pieces = [
            expert(part)
            for expert, part in zip(self.experts, torch.split(x[tokens], counts), strict=True)
            if part.shape[0] or not x.shape[0]
        ]
        outputs = torch.cat(pieces).float() * weights.flatten()[order, None]
        start = torch.zeros(x.shape, device=x.device) if residual is None else residual.float()
        if self.shared is not None:
            start = start + self.shared(x, adapted)
        return start.index_add(0, tokens, outputs).to(x.dtype), experts, weights


def stack(
    token_embedding: Weight,
    position_embedding: Tensor | None,
    layers: Sequence[DecoderLayer],
    embedding_scale: float = 1.0,
) -> None:
    """There is no such call here."""


def norm(x: Tensor, weights: NormWeights, residual: Tensor | None = None) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, of rows x [T, d], plus residual [T, d] where one is given."""
    if weights.bias is not None:
        out = torch.layer_norm(x, x.shape[-1:], weights.weight, weights.bias, weights.eps)
    else:
        out = torch.rms_norm(x, x.shape[-1:], weights.weight, weights.eps)
    return out if residual is None else out + residual


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Turn the halves of heads x [T, heads, turned] by cosines and sines [T, 2, turned / 2], in float32 or wider."""
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    first, second = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def head_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of heads x [T, heads, size]: of each, or of its last numbers, or of a token's all together."""
    skipped = x.shape[2] - weight.shape[0]
    if skipped == 0:
        return torch.rms_norm(x, weight.shape, weight, eps)
    if skipped > 0:
        return torch.cat((x[..., :skipped], torch.rms_norm(x[..., skipped:], weight.shape, weight, eps)), dim=-1)
    return torch.rms_norm(x.flatten(1), weight.shape, weight, eps).view(x.shape)


def store_kv(
    qkv: Tensor,
    heads: int,
    cos_sin_cache: Tensor | None,
    slots: Slots,
    cache: KvCache,
    qk_norm: QkNorm | None = None,
) -> None:
    """Write new tokens' keys and values to the cache; queries (in place) and keys are normed and turned first."""
    (positions, blocks, offsets), (keys, values) = slots, cache
    turned = heads + keys.shape[1]
    if qk_norm is not None:
        if qk_norm.query is not None:
            qkv[:, :heads] = head_norm(qkv[:, :heads], qk_norm.query, qk_norm.eps)
        qkv[:, heads:turned] = head_norm(qkv[:, heads:turned], qk_norm.key, qk_norm.eps)
    if cos_sin_cache is not None:
        width = 2 * cos_sin_cache.shape[2]
        qkv[:, :turned, :width] = rotate(qkv[:, :turned, :width], cos_sin_cache[positions])
    written = (keys, qkv[:, heads:turned]), (values, qkv[:, turned:])
    for part, rows in written[: 1 if cache.latent else 2]:
        part[blocks, :, offsets] = narrow_rows(rows) if cache.in_int8 else rows


def decode_attention(
    q: Tensor,
    cache: KvCache,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """Attention of one new token per sequence over its paged keys and values, copied out of their blocks."""
    if scope != WHOLE or cache.latent:
        return scoped.decode_attention(q, cache, tables, contexts, max_context_len, scale, scope)
    seen = torch.arange(max_context_len, device=q.device)[None] < contexts[:, None]
    # What another request left in a block may be NaN, and neither a weight of 0 nor an added −∞ silences that.
    k, v = (gather_context(pool, tables, max_context_len, q.dtype) for pool in cache)
    k, v = (part.masked_fill_(~seen[:, None, :, None], 0.0) for part in (k, v))
    grouped = k.shape[1] != q.shape[1]
    mask = seen[:, None, None]
    return F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[:, :, 0]


def chunk_attention(
    q: Tensor, cache: KvCache, table: Tensor, context: int, scale: float, scope: Scope = WHOLE
) -> Tensor:
    """Attention of the last tokens of one sequence, each up to itself, over copies of its keys and values."""
    if scope != WHOLE or cache.latent:
        return scoped.chunk_attention(q, cache, table, context, scale, scope)
    count, heads, _ = q.shape
    k, v = (gather_context(pool, table[None], context, q.dtype) for pool in cache)
    mask = torch.ones(count, context, dtype=torch.bool, device=q.device).tril(context - count)
    spoilt = silence(k[0, :, context - count :], v[0, :, context - count :])
    grouped = k.shape[1] != heads
    own = q.transpose(0, 1)[None]
    out = F.scaled_dot_product_attention(own, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)[0]
    return (out + spoilt.repeat_interleave(heads // k.shape[1], 0)).transpose(0, 1)


chunks_attention = one_by_one(chunk_attention)


def places_chunks(cache: KvCache) -> bool:
    """As `backend.Backend` says: it goes through them on the host."""
    return cache.keys.device.type == "cpu"


def silence(keys: Tensor, values: Tensor) -> Tensor:
    """Set what is not finite in new tokens' keys and values [heads, T, size] to 0; returns what it does to each token.

    That is 0 before the first such number: a mask keeps earlier tokens from seeing it, but not from being spoilt by it.
    """
    good = keys.isfinite().all(-1, keepdim=True)
    spoilt = torch.where(good, values.where(~values.isfinite(), 0.0), torch.nan).cumsum(1)
    for rows in (keys, values):
        rows.nan_to_num_(0.0, 0.0, 0.0)
    return spoilt
