"""A decoder written a second time, as plainly as possible: one sequence, no cache, float64. The tests' oracle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig

Weights = dict[str, Tensor]


def norm(config: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    if config.norm_type == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def mlp(config: ModelConfig, w: Weights, prefix: str, x: Tensor) -> Tensor:
    act = F.gelu if config.hidden_act == "gelu" else F.silu
    up = x @ w[f"{prefix}up_proj.weight"].T
    hidden = act(x @ w[f"{prefix}gate_proj.weight"].T) * up if config.mlp_gated else act(up)
    return hidden @ w[f"{prefix}down_proj.weight"].T


def layer_norm(config: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape, w[f"{name}.weight"], w[f"{name}.bias"], config.norm_eps)


def dsc(config: ModelConfig, c: DscConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    """One token x [d], straight from the paper's formulas."""
    routed = layer_norm(config, w, f"{p}router_norm", x) if c.router_norm else x
    logits = w[f"{p}router.weight"] @ routed + (w[f"{p}router.bias"] if c.router_bias else 0)
    r = [max(-c.tau, min(c.tau, float(v))) for v in logits]
    picked = sorted(range(len(r)), key=lambda j: (-r[j], j))[: c.atoms_per_token]
    phi = F.softplus(torch.tensor([r[j] for j in picked], dtype=torch.float64), threshold=1000.0)
    signal = phi.sum()
    y = mlp(config, w, f"{p}static.", x)
    for j, z in zip(picked, phi / (signal + c.eps) * signal.tanh(), strict=True):
        u, v = w[f"{p}atoms_u"][j], w[f"{p}atoms_v"][j]
        u, v = u / max(float(u.norm()), c.eps), v / max(float(v.norm()), c.eps)
        y = y + (x @ u) * z * v * w[f"{p}gamma"]
    return y


def moe(config: ModelConfig, c: MoeConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    routed = layer_norm(config, w, f"{p}router_norm", x) if c.router_norm else x
    probabilities = (w[f"{p}router.weight"] @ routed).softmax(0)
    values, experts = probabilities.topk(c.experts_per_token)
    if c.normalize_weights:
        values = values / values.sum()
    pairs = zip(values, experts.tolist(), strict=True)
    return sum((v * mlp(config, w, f"{p}experts.{e}.", x) for v, e in pairs), torch.zeros_like(x))


def molora(config: ModelConfig, c: MoloraConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    logits = w[f"{p}router.weight"] @ layer_norm(config, w, f"{p}router_norm", x)
    values, adapters = logits.topk(c.adapters_per_token)
    y = mlp(config, w, f"{p}static.", x)
    for g, e in zip(values.softmax(0), adapters.tolist(), strict=True):
        y = y + g * (w[f"{p}adapters_a"][e] @ x) @ w[f"{p}adapters_b"][e]
    return y


def ffn(config: ModelConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    c = config.ffn
    if isinstance(c, DenseConfig):
        return mlp(config, w, p, x)
    if isinstance(c, DscConfig):
        return torch.stack([dsc(config, c, w, p, row) for row in x])
    if isinstance(c, MoeConfig):
        return torch.stack([moe(config, c, w, p, row) for row in x])
    return torch.stack([molora(config, c, w, p, row) for row in x])


def rope(config: ModelConfig, x: Tensor) -> Tensor:
    """x [T, heads, head_dim]: each pair (i, i + head_dim / 2) turned by position · theta^(−2i / head_dim)."""
    half = config.head_dim // 2
    out = x.clone()
    for t in range(x.shape[0]):
        for i in range(half):
            angle = torch.tensor(t * config.rope_theta ** (-2 * i / config.head_dim), dtype=torch.float64)
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i], out[t, :, i + half] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attention(config: ModelConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    size, heads = x.shape[0], config.num_attention_heads
    q = (x @ w[f"{p}q_proj.weight"].T).view(size, heads, -1)
    k = (x @ w[f"{p}k_proj.weight"].T).view(size, config.num_key_value_heads, -1)
    v = (x @ w[f"{p}v_proj.weight"].T).view(size, config.num_key_value_heads, -1)
    if config.position_embedding_type == "rope":
        q, k = rope(config, q), rope(config, k)
    group = heads // config.num_key_value_heads
    out = torch.empty_like(q)
    for t in range(size):
        for h in range(heads):
            scores = k[: t + 1, h // group] @ q[t, h] / config.head_dim**0.5
            out[t, h] = scores.softmax(0) @ v[: t + 1, h // group]
    return out.flatten(1) @ w[f"{p}o_proj.weight"].T


def logits(config: ModelConfig, tensors: Weights, ids: list[int]) -> Tensor:
    """float64 logits [T, vocabulary] of one sequence."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][ids]
    if config.position_embedding_type == "learned":
        x = x + w["model.embed_positions.weight"][: len(ids)]
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        x = x + attention(config, w, f"{p}self_attn.", norm(config, w, f"{p}input_layernorm", x))
        x = x + ffn(config, w, f"{p}mlp.", norm(config, w, f"{p}post_attention_layernorm", x))
    head = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    return norm(config, w, "model.norm", x) @ head.T
