"""The layers' mathematics in plain torch, in any floating dtype: the oracle of every test.

Shapes: B tokens, d width, M atoms, K atoms per token, N experts or adapters, r adapter rank.
Source: V. Khasia, "Dynamic Subspace Composition", arXiv 2512.23448; equation names follow its Algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_kernels.weights import WHOLE, MoeOptions, Scope

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def project(rows: Tensor, eps: float) -> Tensor:
    """Rows [M, d] divided by max(their 2-norm, eps): norm at most 1, a zero row stays zero."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(eps)


def fold_router_norm(
    weight: Tensor, bias: Tensor | None, norm_weight: Tensor, norm_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """A router that applies LayerNorm's affine part and centring through its weights.

    weight [M, d], bias [M] → W″ [M, d] with centred rows and b′ [M], so that
    LayerNorm(x) Wᵀ + b = rstd(x) · (x W″ᵀ) + b′, since a centred row takes no notice of x's mean.
    """
    scaled = weight * norm_weight
    folded_bias = weight @ norm_bias
    if bias is not None:
        folded_bias = folded_bias + bias
    return scaled - scaled.mean(dim=1, keepdim=True), folded_bias


def reciprocal_std(x: Tensor, norm_eps: float) -> Tensor:
    """LayerNorm's 1 / √(variance + eps) per row of x [B, d] → [B, 1]."""
    return torch.rsqrt(x.var(dim=1, correction=0, keepdim=True) + norm_eps)


def router_logits(x: Tensor, weight: Tensor, bias: Tensor | None, norm_eps: float | None) -> Tensor:
    """Raw logits [B, M] from x [B, d]; with norm_eps the weight is a folded one (`fold_router_norm`)."""
    logits = x @ weight.T
    if norm_eps is not None:
        logits = logits * reciprocal_std(x, norm_eps)
    return logits if bias is None else logits + bias


def select(logits: Tensor, k: int, tau: float) -> tuple[Tensor, Tensor]:
    """The k largest of clamp(logits, −τ, τ) [B, M] → values [B, k] and indices [B, k].

    Ordered by clamped logit descending, then index ascending: also the rule where the clamp makes logits tie.
    """
    ordered = torch.sort(logits.clamp(-tau, tau), dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def coefficients(selected: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """ẑ [B, K] and the signal S [B] from the selected truncated logits [B, K]; Σ ẑ < 1."""
    phi = F.softplus(selected, threshold=30.0)
    signal = phi.sum(dim=1, keepdim=True)
    return phi / (signal + eps) * torch.tanh(signal), signal.squeeze(1)


def compose(x: Tensor, atoms: Tensor, weights: Tensor, u: Tensor, v: Tensor, gamma: Tensor) -> Tensor:
    """The dynamic part (Σ_j (x·u_j) ẑ_j v_j) ⊙ γ [B, d] for the atoms [B, K] with coefficients [B, K]."""
    latent = torch.einsum("bd,bkd->bk", x, u[atoms]) * weights
    return torch.einsum("bk,bkd->bd", latent, v[atoms]) * gamma


def softmax_top_k(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The MoE router: the k largest softmax probabilities over all N experts, not renormalised, and their indices."""
    ordered = torch.sort(logits.softmax(dim=1), dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def pick_experts(logits: Tensor, options: MoeOptions, choice_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A mixture's router: of logits [B, N] the weights [B, k] and the experts int64 [B, k] that are picked."""
    scores = logits.softmax(dim=1) if options.scoring == "softmax" else logits.sigmoid()
    choices = scores if choice_bias is None else scores + choice_bias
    if options.groups > 1:
        grouped = choices.view(len(choices), options.groups, -1)
        best = torch.sort(grouped.topk(options.group_picks, dim=2).values.sum(2), dim=1, descending=True, stable=True)
        dropped = torch.ones_like(best.values, dtype=torch.bool)
        dropped.scatter_(1, best.indices[:, : options.groups_used], False)
        choices = grouped.masked_fill(dropped[:, :, None], -torch.inf).flatten(1)
    experts = torch.sort(choices, dim=1, descending=True, stable=True).indices[:, : options.k]
    weights = scores.gather(1, experts)
    if options.normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights * options.weight_scale, experts


def mlp(x: Tensor, up: Tensor, gate: Tensor | None, down: Tensor, activation: str) -> Tensor:
    """W_2 act(W_1 x), or W_2 (act(W_g x) ⊙ W_1 x) with a gate; GELU in its exact form. up, gate [H, d], down [d, H]."""
    act = ACTIVATIONS[activation]
    inner = act(x @ up.T) if gate is None else act(x @ gate.T) * (x @ up.T)
    return inner @ down.T


def route(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, tau: float, eps: float, norm_eps: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Atoms [B, k], coefficients [B, k] and signal [B] of x [B, d]; see `router_logits`, `select`, `coefficients`."""
    selected, atoms = select(router_logits(x, weight, bias, norm_eps), k, tau)
    return atoms, *coefficients(selected, eps)


def dsc_layer(
    x: Tensor,
    residual: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
    router: Tensor,
    router_bias: Tensor | None,
    u: Tensor,
    v: Tensor,
    gamma: Tensor,
    k: int,
    tau: float,
    eps: float,
    norm_eps: float | None,
) -> Tensor:
    """The DSC layer of x [B, d] plus residual: static MLP and composition of the picked of M projected atoms."""
    atoms, weights, _ = route(x, router, router_bias, k, tau, eps, norm_eps)
    out = mlp(x, up, gate, down, activation) + compose(x, atoms, weights, u, v, gamma)
    return out if residual is None else out + residual


def molora_layer(
    x: Tensor,
    residual: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
    router: Tensor,
    router_bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    k: int,
    norm_eps: float | None,
) -> Tensor:
    """f(x) + Σ_e g_e (x A_eᵀ) B_e + residual over k picked adapters; a, b [N, r, d], g the softmax of their logits."""
    selected, picks = select(router_logits(x, router, router_bias, norm_eps), k, math.inf)
    gates = selected.softmax(dim=1)
    inner = torch.einsum("bd,bkrd->bkr", x, a[picks]) * gates[:, :, None]
    out = mlp(x, up, gate, down, activation) + torch.einsum("bkr,bkrd->bd", inner, b[picks])
    return out if residual is None else out + residual


def moe_layer(
    x: Tensor,
    residual: Tensor | None,
    router: Tensor,
    router_bias: Tensor | None,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    activation: str,
    k: int,
    normalize: bool,
    norm_eps: float | None,
    shared: tuple[Tensor, Tensor | None, Tensor] | None = None,
    shared_gate: Tensor | None = None,
) -> Tensor:
    """Σ_e p_e f_e(x) + residual over the k most likely of N experts; up, gate [N, H, d], down [N, d, H].

    shared: up, gate, down of an expert that every token gets, times sigmoid(shared_gate · x) where that [d] is given.
    """
    weights, picks = softmax_top_k(router_logits(x, router, router_bias, norm_eps), k)
    if normalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    outputs = [mlp(x, up[e], None if gate is None else gate[e], down[e], activation) for e in range(len(up))]
    picked = torch.stack(outputs, dim=1).gather(1, picks[:, :, None].expand(-1, -1, x.shape[1]))
    out = torch.einsum("bk,bkd->bd", weights, picked)
    if shared is not None:
        own = mlp(x, *shared, activation)
        out = out + (own if shared_gate is None else own * (x @ shared_gate).sigmoid()[:, None])
    return out if residual is None else out + residual


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or with a bias LayerNorm, over the last dimension of x."""
    centred = x if bias is None else x - x.mean(-1, keepdim=True)
    scaled = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight
    return scaled if bias is None else scaled + bias


def prepared_heads(x: Tensor, weight: Tensor | None, eps: float, cos_sin: Tensor | None) -> Tensor:
    """Queries or keys x [T, heads, size] as attention takes them: normed, then turned.

    weight: of an RMSNorm, [size] over each head or [heads · size] over all of a token's together; None: none.
    cos_sin [T, 2, turned / 2]: of each token's angles, for the first numbers of a head; None: nothing is turned.
    """
    if weight is not None:
        x = norm(x.reshape(len(x), -1, weight.shape[0]), weight, None, eps).view(x.shape)
    if cos_sin is None:
        return x
    cos, sin = cos_sin[:, None, 0], cos_sin[:, None, 1]
    first, second, rest = x.tensor_split((cos.shape[-1], 2 * cos.shape[-1]), dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    tables: Tensor,
    contexts: Tensor,
    max_context_len: int,
    scale: float,
    scope: Scope = WHOLE,
) -> Tensor:
    """softmax(q Kᵀ · scale) V of one token per sequence over the first `contexts` ≤ `max_context_len` cached positions.

    q [S, heads, size]; keys, values [blocks, kv heads, block, size]; tables [S, W]; contexts [S]. Returns q's shape, or
    where values are shorter than keys [S, heads, value size].
    """
    group = q.shape[1] // keys.shape[1]
    rows = []
    for row, table, context in zip(q, tables, contexts.tolist(), strict=True):
        first = max(context - scope.window, 0) if scope.window else 0
        own = (pool[table].transpose(0, 1).flatten(1, 2)[:, first:context] for pool in (keys, values))
        k, v = (cached.repeat_interleave(group, dim=0) for cached in own)
        scores = torch.einsum("hs,hcs->hc", row, k) * scale
        scores = scope.cap * torch.tanh(scores / scope.cap) if scope.cap else scores
        rows.append(torch.einsum("hc,hcs->hs", scores.softmax(dim=1), v))
    return torch.stack(rows) if rows else q.new_zeros(0, q.shape[1], values.shape[-1])
