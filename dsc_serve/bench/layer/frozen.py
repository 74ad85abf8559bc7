"""Frozen baselines: layers as the reference script and a straightforward plain-torch MoE write them.

They call torch alone and are never tuned, so that a ratio to them means the same before and after the kernels change.
Weights stay in the dtype of the run, without autocast, which on a CPU would cast them again at every forward.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig


class ScriptDsc:
    """The reference script's DSC layer: the whole bank projected, and softplus over all M, at every forward."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        assert isinstance(config.ffn, DscConfig)
        self.k, self.tau, self.eps, self.norm_eps = (
            *(config.ffn.atoms_per_token, config.ffn.tau, config.ffn.eps),
            config.norm_eps,
        )
        self.raw_u, self.raw_v, self.gamma = weights["atoms_u"], weights["atoms_v"], weights["gamma"]
        self.router, self.router_bias = weights["router.weight"], weights["router.bias"]
        self.norm = (weights["router_norm.weight"], weights["router_norm.bias"])
        self.up, self.down = weights["static.up_proj.weight"], weights["static.down_proj.weight"]

    def __call__(self, x: Tensor) -> Tensor:
        u = self.raw_u / self.raw_u.norm(p=2, dim=1, keepdim=True).clamp(min=self.eps)
        v = self.raw_v / self.raw_v.norm(p=2, dim=1, keepdim=True).clamp(min=self.eps)
        logits = F.linear(F.layer_norm(x, x.shape[1:], *self.norm, self.norm_eps), self.router, self.router_bias)
        alpha = F.softplus(torch.clamp(logits, -self.tau, self.tau))
        phi, atoms = torch.topk(alpha, self.k, dim=-1)
        signal = phi.sum(dim=-1, keepdim=True)
        weights = phi / (signal + self.eps) * torch.tanh(signal)
        latent = torch.einsum("bd,bkd->bk", x, u[atoms]) * weights
        dynamic = torch.einsum("bk,bkd->bd", latent, v[atoms]) * self.gamma
        return F.linear(F.gelu(F.linear(x, self.up)), self.down) + dynamic


class _PlainMoe:
    """Experts plain or gated, a router with or without a norm before it, and a shared expert where there is one."""

    def __init__(self, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
        assert isinstance(config.ffn, MoeConfig)
        self.k, self.norm_eps, self.normalize = (
            *(config.ffn.experts_per_token, config.norm_eps),
            config.ffn.normalize_weights,
        )
        self.act = F.silu if config.hidden_act == "silu" else F.gelu
        self.router = weights["router.weight"]
        self.norm = [weights.get(f"router_norm.{part}") for part in ("weight", "bias")]

        def mlp(at: str) -> tuple[Tensor, Tensor | None, Tensor]:
            gate = weights[f"{at}gate_proj.weight"] if config.mlp_gated else None
            return weights[f"{at}up_proj.weight"], gate, weights[f"{at}down_proj.weight"]

        self.experts = [mlp(f"experts.{e}.") for e in range(config.ffn.num_experts)]
        self.shared = mlp("shared_expert.") if config.ffn.shared_expert is not None else None
        self.shared_gate = weights.get("shared_expert_gate.weight")

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, bias = self.norm
        normed = x if weight is None else F.layer_norm(x, x.shape[1:], weight, bias, self.norm_eps)
        weights, experts = torch.topk(F.softmax(F.linear(normed, self.router), dim=-1), self.k, dim=-1)
        return weights / weights.sum(dim=-1, keepdim=True) if self.normalize else weights, experts

    def begin(self, x: Tensor) -> Tensor:
        """What all tokens share, to which the experts' outputs are added."""
        if self.shared is None:
            return torch.zeros_like(x)
        out = self.mlp(self.shared, x)
        return out if self.shared_gate is None else torch.sigmoid(F.linear(x, self.shared_gate)) * out

    def mlp(self, matrices: tuple[Tensor, Tensor | None, Tensor], x: Tensor) -> Tensor:
        up, gate, down = matrices
        hidden = self.act(F.linear(x, up)) if gate is None else self.act(F.linear(x, gate)) * F.linear(x, up)
        return F.linear(hidden, down)

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.mlp(self.experts[e], x)


class ScriptMoe(_PlainMoe):
    """The reference script's MoE: a Python loop over the experts, each taking its tokens by a boolean mask."""

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        out = self.begin(x)
        for e in range(len(self.experts)):
            picked = experts == e
            mask = picked.any(dim=-1)
            if mask.any():
                weight = (weights * picked).sum(dim=-1)[mask].unsqueeze(-1)
                out[mask] += weight * self.expert(e, x[mask])
        return out


class SortedMoe(_PlainMoe):
    """The plain MoE of `ratio_to_plain_moe`: tokens sorted by expert, then an `F.linear` per matrix."""

    def __call__(self, x: Tensor) -> Tensor:
        weights, experts = self.route(x)
        flat = experts.flatten()
        order = flat.argsort()
        tokens = order // self.k
        parts = torch.split(x[tokens], torch.bincount(flat, minlength=len(self.experts)).tolist())
        outputs = torch.cat([self.expert(e, part) for e, part in enumerate(parts) if part.shape[0]])
        return self.begin(x).index_add_(0, tokens, outputs * weights.flatten()[order, None])
