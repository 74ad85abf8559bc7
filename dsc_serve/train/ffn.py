"""The FFN kinds as they are trained: from the serving form's tensors, differentiable, with their training terms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.train import losses
from dsc_serve.train.functions import compose
from dsc_serve.train.settings import LossSettings

Weights = Mapping[str, Tensor]
JITTER = 0.01  # standard deviation of the noise on a mixture of experts' logits while it trains


@dataclass
class FfnTrace:
    """What one layer leaves behind besides its output."""

    terms: dict[str, Tensor] = field(default_factory=dict)  # the weighted training terms by name
    picks: Tensor | None = None  # int64 [M], how often each atom, expert or adapter was picked
    signal: Tensor | None = None  # mean S over the tokens
    routed: Tensor | None = None  # what the router read, [B, d]


@dataclass(frozen=True)
class Pass:
    """How one forward pass runs."""

    losses: LossSettings
    training: bool = True  # with jitter and terms
    noise: int = 0  # the jitter's seed
    frame: float = 1.0  # factor of the frame term, which no token changes: one pass of a step can carry it for all


def mlp(config: ModelConfig, w: Weights, x: Tensor, prefix: str = "") -> Tensor:
    act = F.gelu if config.hidden_act == "gelu" else F.silu

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{prefix}{name}.weight"], w.get(f"{prefix}{name}.bias"))

    up = linear(x, "up_proj")
    return linear(act(linear(x, "gate_proj")) * up if config.mlp_gated else act(up), "down_proj")


def router_input(config: ModelConfig, w: Weights, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w["router_norm.weight"], w["router_norm.bias"], config.norm_eps)


def count(picked: Tensor, members: int) -> Tensor:
    return torch.bincount(picked.detach().flatten(), minlength=members)


def projected(rows: Tensor, eps: float) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / norms.clamp_min(eps)


def dsc(config: ModelConfig, w: Weights, x: Tensor, mode: Pass) -> tuple[Tensor, FfnTrace]:
    c, lam = config.ffn, mode.losses
    assert isinstance(c, DscConfig)
    routed = router_input(config, w, x) if c.router_norm else x
    logits = F.linear(routed, w["router.weight"], w["router.bias"] if c.router_bias else None)
    wide = torch.promote_types(x.dtype, torch.float32)
    picked = logits.detach().clamp(-c.tau, c.tau).topk(c.atoms_per_token, dim=-1, sorted=False).indices
    phi = F.softplus(logits.gather(1, picked).to(wide).clamp(-c.tau, c.tau), threshold=30.0)
    signal = phi.sum(-1, keepdim=True)
    coefficients = phi / (signal + c.eps) * signal.tanh()
    u, v = (w[name].to(wide) for name in ("atoms_u", "atoms_v"))
    if c.atoms == "raw":
        u, v = projected(u, c.eps), projected(v, c.eps)
    y = mlp(config, w, x, "static.") + compose(x, u.to(x.dtype), v.to(x.dtype), picked, coefficients) * w["gamma"]
    trace = FfnTrace(picks=count(picked, c.num_atoms), signal=signal.detach().mean(), routed=routed.detach())
    if mode.training:
        load, z = losses.load_and_z(logits, c.tau, lam.z_of)
        trace.terms = {
            "load": lam.load * load,
            "budget": lam.budget * losses.budget(signal, lam.signal_floor),
            "z": lam.z * z,
        }
        if mode.frame:
            trace.terms["frame"] = mode.frame * lam.frame * (losses.frame(u) + losses.frame(v))
    return y, trace


def mixture_terms(logits: Tensor, probabilities: Tensor, picked: Tensor, lam: LossSettings) -> dict[str, Tensor]:
    return {
        "load": lam.load * losses.mixture_load(probabilities, picked),
        "z": lam.z * logits.logsumexp(-1).square().mean(),
    }


def moe(config: ModelConfig, w: Weights, x: Tensor, mode: Pass) -> tuple[Tensor, FfnTrace]:
    c = config.ffn
    assert isinstance(c, MoeConfig)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(router_input(config, w, x) if c.router_norm else x, w["router.weight"]).to(wide)
    if mode.training:
        generator = torch.Generator(x.device).manual_seed(mode.noise)
        logits = logits + JITTER * torch.randn(logits.shape, generator=generator, dtype=wide, device=x.device)
    probabilities = logits.softmax(-1)
    gates, picked = probabilities.topk(c.experts_per_token, dim=-1)
    if c.normalize_weights:
        gates = gates / gates.sum(-1, keepdim=True)
    picks = count(picked, c.num_experts)
    order = picked.flatten().argsort(stable=True)
    rows = order // c.experts_per_token
    pieces = torch.split(x.index_select(0, rows), picks.tolist())
    outputs = torch.cat([mlp(config, w, piece, f"experts.{e}.") for e, piece in enumerate(pieces)])
    gated = outputs * gates.flatten().index_select(0, order)[:, None].to(x.dtype)
    trace = FfnTrace(picks=picks)
    if mode.training:
        trace.terms = mixture_terms(logits, probabilities, picked, mode.losses)
    return torch.zeros_like(x).index_add(0, rows, gated), trace


def molora(config: ModelConfig, w: Weights, x: Tensor, mode: Pass) -> tuple[Tensor, FfnTrace]:
    c = config.ffn
    assert isinstance(c, MoloraConfig)
    wide = torch.promote_types(x.dtype, torch.float32)
    logits = F.linear(router_input(config, w, x), w["router.weight"]).to(wide)
    values, picked = logits.topk(c.adapters_per_token, dim=-1)
    rows = (picked[:, :, None] * c.rank + torch.arange(c.rank, device=x.device)).flatten(1)
    gates = values.softmax(-1).repeat_interleave(c.rank, dim=1)
    y = compose(x, w["adapters_a"].flatten(0, 1), w["adapters_b"].flatten(0, 1), rows, gates)
    trace = FfnTrace(picks=count(picked, c.num_adapters))
    if mode.training:
        trace.terms = mixture_terms(logits, logits.softmax(-1), picked, mode.losses)
    return mlp(config, w, x, "static.") + y, trace


def dense(config: ModelConfig, w: Weights, x: Tensor, mode: Pass) -> tuple[Tensor, FfnTrace]:
    assert isinstance(config.ffn, DenseConfig)
    return mlp(config, w, x), FfnTrace()


TRAINED: dict[str, Callable[[ModelConfig, Weights, Tensor, Pass], tuple[Tensor, FfnTrace]]] = {
    "dsc": dsc,
    "moe": moe,
    "molora": molora,
    "dense": dense,
}
