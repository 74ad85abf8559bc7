"""Differentiable functions with hand-written backward passes, for what autograd computes slowly on a CPU.

All of them work in any floating dtype and leave the mathematics unchanged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 128  # rows of scores computed at a time; keys after them are skipped
HEAD_ROWS = 2048  # tokens whose logits exist at a time


class _Rotated(torch.autograd.Function):
    """Writes where the result lies, backwards by the opposite angle: nothing is joined, and nothing is kept of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grads[0], cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    (a, b), (first, second) = x.chunk(2, dim=-1), y.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return y


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [..., T, head] with each pair (i, i + head / 2) turned by its position's angle; cos, sin [T, head / 2]."""
    y: Tensor = _Rotated.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _RmsNorm(torch.autograd.Function):
    """torch's is a dozen operations for autograd, each of which keeps what it made in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
        rstd = (length.square_().div_(x.shape[-1]).add_(eps)).rsqrt_()
        ctx.save_for_backward(x, weight, rstd)
        y: Tensor = (x * rstd).mul_(weight)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        (dy,) = grads
        x, weight, rstd = ctx.saved_tensors
        normed, dweight = x * rstd, None
        if ctx.needs_input_grad[1]:  # a frozen norm takes none
            dweight = (normed * dy).flatten(0, -2).sum(0).to(weight.dtype)
        dx = dy.to(normed.dtype) * weight
        shared = (dx * normed).mean(-1, keepdim=True)
        return dx.addcmul_(normed, shared, value=-1).mul_(rstd).to(x.dtype), dweight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., d] over its root mean square, times weight [d]; statistics in float32 at least."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _Gated(torch.autograd.Function):
    """Keeps its input alone, and writes both halves' gradients where they lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.activation = activation
        gate, up = x.chunk(2, dim=-1)
        return ACTIVATIONS[activation](gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (dy,), (x,) = grads, ctx.saved_tensors
        gate, up = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        dgate, dup = dx.chunk(2, dim=-1)
        torch.mul(dy, ACTIVATIONS[ctx.activation](gate), out=dup)
        backward = torch.ops.aten.silu_backward if ctx.activation == "silu" else torch.ops.aten.gelu_backward
        backward.grad_input(dy * up, gate, grad_input=dgate)
        return dx, None


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}


def gated(x: Tensor, activation: str) -> Tensor:
    """activation(gate) · up [..., n] of x [..., 2n], gate beside up; activation: of ACTIVATIONS."""
    y: Tensor = _Gated.apply(x, activation)  # type: ignore[no-untyped-call]
    return y


class _CausalAttention(torch.autograd.Function):
    """Blocks of queries against the keys up to them: half the scores of a full square, all in plain batched GEMMs.

    torch's own attention is several times slower than this in bfloat16 on CPUs without AMX.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (scaled already), k, v [N, T, head] → [N, T, head]."""
        length = q.shape[1]
        y = torch.empty_like(q)
        probabilities = []
        for start in range(0, length, QUERY_BLOCK):
            stop = min(start + QUERY_BLOCK, length)
            scores = q[:, start:stop] @ k[:, :stop].transpose(1, 2)
            unseen = torch.full((stop - start, stop - start), -math.inf, dtype=q.dtype, device=q.device).triu(1)
            scores[:, :, start:] += unseen
            p = scores.softmax(-1)
            y[:, start:stop] = p @ v[:, :stop]
            probabilities.append(p)
        ctx.save_for_backward(q, k, v, y, *probabilities)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (dy,) = grads
        q, k, v, y, *probabilities = ctx.saved_tensors
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for p in probabilities:
            stop = p.shape[2]
            start = stop - p.shape[1]
            rows = dy[:, start:stop]
            ds = rows @ v[:, :stop].transpose(1, 2)
            ds -= (rows * y[:, start:stop]).sum(-1, keepdim=True)
            ds *= p
            dq[:, start:stop] = ds @ k[:, :stop]
            dk[:, :stop] += ds.transpose(1, 2) @ q[:, start:stop]
            dv[:, :stop] += p.transpose(1, 2) @ rows
        return dq, dk, dv


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ) v over each token and those before it. q, scaled already, k, v: [N, T, head] → [N, T, head]."""
    y: Tensor = _CausalAttention.apply(q, k, v)  # type: ignore[no-untyped-call]
    return y


class _Compose(torch.autograd.Function):
    """Four GEMMs over the whole bank and two sparse sums instead of gathering K rows per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, v: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
        latent = (x @ u.T).gather(1, picked)
        scaled = latent * weights.to(x.dtype)
        ctx.save_for_backward(x, u, v, picked, weights, latent, scaled)
        return F.embedding_bag(picked, v, per_sample_weights=scaled, mode="sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, Tensor]:
        (dy,) = grads
        x, u, v, picked, weights, latent, scaled = ctx.saved_tensors
        dscaled = (dy @ v.T).gather(1, picked)
        dlatent = dscaled * weights.to(x.dtype)
        dx = F.embedding_bag(picked, u, per_sample_weights=dlatent, mode="sum")
        du = dv = None
        if ctx.needs_input_grad[1]:  # a frozen bank takes none
            spread = torch.zeros(x.shape[0], u.shape[0], dtype=x.dtype, device=x.device)
            du = spread.scatter_(1, picked, dlatent).T @ x
            dv = spread.scatter_(1, picked, scaled).T @ dy
        return dx, du, dv, None, dscaled.to(weights.dtype) * latent


def compose(x: Tensor, u: Tensor, v: Tensor, picked: Tensor, weights: Tensor) -> Tensor:
    """Σ_j (x·u_j) ẑ_j v_j [B, d] over each token's picked rows.

    x [B, d]; u, v [M, d]; picked int64 [B, K], no row twice per token; weights ẑ [B, K].
    """
    y: Tensor = _Compose.apply(x, u, v, picked, weights)  # type: ignore[no-untyped-call]
    return y


class _HeadLoss(torch.autograd.Function):
    """Computes the gradients with the loss, chunk by chunk, so that the logits of all tokens never exist together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=x.device)
        wanted = x.requires_grad or head.requires_grad
        dx = torch.empty_like(x) if wanted else None
        wide = torch.promote_types(head.dtype, torch.float32)
        dhead = torch.zeros_like(head, dtype=wide) if head.requires_grad else None  # a frozen head takes none
        for start in range(0, x.shape[0], HEAD_ROWS):
            rows, ids = x[start : start + HEAD_ROWS], targets[start : start + HEAD_ROWS]
            p = F.linear(rows, head).softmax(-1)
            total -= p.gather(1, ids[:, None]).to(wide).clamp_min(torch.finfo(wide).tiny).log().sum(dtype=torch.float64)
            if dx is not None:  # of the targets' own logits apart: to write into p costs as much as to multiply it
                dx[start : start + HEAD_ROWS] = (p @ head).sub_(head[ids])
                if dhead is not None:
                    dhead += p.T @ rows
                    dhead.index_add_(0, ids, rows.to(wide), alpha=-1)
        if dx is not None:
            ctx.save_for_backward(dx, *(() if dhead is None else (dhead.to(head.dtype),)))
        return (total / x.shape[0]).to(wide)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        dx, *dhead = ctx.saved_tensors
        scale = grads[0] / dx.shape[0]
        return dx * scale.to(dx.dtype), dhead[0] * scale.to(dhead[0].dtype) if dhead else None, None


def head_loss(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats of logits x headᵀ. x [B, d], head [V, d], targets int64 [B]."""
    if not torch.is_grad_enabled():
        x, head = x.detach(), head.detach()  # else a leaf asks for the gradient that nobody takes
    loss: Tensor = _HeadLoss.apply(x, head, targets)  # type: ignore[no-untyped-call]
    return loss
