"""A decoder written a second time, as plainly as possible: one sequence, no cache, float64. The tests' oracle."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DenseConfig, DscConfig, ModelConfig, MoeConfig, MoloraConfig
from dsc_serve.model.rope import DivisorsRope, LinearRope, Llama3Rope, YarnRope

Weights = dict[str, Tensor]


def norm(config: ModelConfig, w: Weights, name: str, x: Tensor) -> Tensor:
    if config.norm_type == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + config.norm_eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def mlp(config: ModelConfig, w: Weights, prefix: str, x: Tensor) -> Tensor:
    tanh = {"gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / math.pi) ** 0.5 * (v + 0.044715 * v**3)))}
    act = {"gelu": F.gelu, "silu": F.silu, **tanh}[config.hidden_act]
    up = linear(w, f"{prefix}up_proj", x)
    hidden = act(linear(w, f"{prefix}gate_proj", x)) * up if config.mlp_gated else act(up)
    return linear(w, f"{prefix}down_proj", hidden)


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


def moe_picks(config: ModelConfig, c: MoeConfig, w: Weights, p: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and experts [k] of one token."""
    routed = layer_norm(config, w, f"{p}router_norm", x) if c.router_norm else x
    logits = w[f"{p}router.weight"] @ routed
    scores = logits.softmax(0) if c.scoring == "softmax" else logits.sigmoid()
    choices = (scores + w[f"{p}router.choice_bias"] if c.choice_bias else scores).tolist()
    size = c.num_experts // c.groups
    best = [sum(sorted(choices[g * size : (g + 1) * size])[-c.group_picks :]) for g in range(c.groups)]
    kept = sorted(range(c.groups), key=lambda g: -best[g])[: c.groups_used]
    allowed = [e for e in range(c.num_experts) if e // size in kept]
    experts = torch.tensor(sorted(allowed, key=lambda e: -choices[e])[: c.experts_per_token])
    values = scores[experts]
    return c.weight_scale * (values / values.sum() if c.normalize_weights else values), experts


def moe(config: ModelConfig, c: MoeConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    values, experts = moe_picks(config, c, w, p, x)
    pairs = zip(values, experts.tolist(), strict=True)
    y = sum((v * mlp(config, w, f"{p}experts.{e}.", x) for v, e in pairs), torch.zeros_like(x))
    if c.shared_expert is None:
        return y
    gate = 1 / (1 + (-(w[f"{p}shared_expert_gate.weight"][0] @ x)).exp()) if c.shared_expert.gated else 1
    return y + gate * mlp(config, w, f"{p}shared_expert.", x)


def molora_picks(config: ModelConfig, c: MoloraConfig, w: Weights, p: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and LoRAs [k] of one token."""
    logits = w[f"{p}router.weight"] @ layer_norm(config, w, f"{p}router_norm", x)
    values, adapters = logits.topk(c.adapters_per_token)
    return values.softmax(0), adapters


def molora(config: ModelConfig, c: MoloraConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    values, adapters = molora_picks(config, c, w, p, x)
    y = mlp(config, w, f"{p}static.", x)
    for g, e in zip(values, adapters.tolist(), strict=True):
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


def frequency(config: ModelConfig, i: int) -> float:
    """The angle per position of pair i, with the configured scaling."""
    plain = config.rope_theta ** (-2 * i / config.turned)
    scaling = config.rope_scaling
    if isinstance(scaling, LinearRope):
        return plain / scaling.factor
    if isinstance(scaling, DivisorsRope):
        return plain / scaling.divisors[i]
    if isinstance(scaling, Llama3Rope):
        wavelength = 2 * math.pi / plain
        if wavelength < scaling.original_max_position_embeddings / scaling.high_freq_factor:
            return plain
        if wavelength > scaling.original_max_position_embeddings / scaling.low_freq_factor:
            return plain / scaling.factor
        ratio = scaling.original_max_position_embeddings / wavelength
        smooth = (ratio - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        return (1 - smooth) * plain / scaling.factor + smooth * plain
    if isinstance(scaling, YarnRope):
        bounds = []
        for turns in (scaling.beta_fast, scaling.beta_slow):
            length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
            bounds.append(config.head_dim * math.log(length) / (2 * math.log(config.rope_theta)))
        low, high = max(math.floor(bounds[0]), 0), min(math.ceil(bounds[1]), config.head_dim - 1)
        slowed = min(max((i - low) / (high - low), 0), 1)
        return plain / scaling.factor * slowed + plain * (1 - slowed)
    return plain


def rope(config: ModelConfig, x: Tensor) -> Tensor:
    """x [T, heads, head_dim]: each pair (i, i + turned / 2) turned by position · frequency(i)."""
    half = config.turned // 2
    out = x.clone()
    scaling = config.rope_scaling
    size = 1 + 0.1 * math.log(scaling.factor) if isinstance(scaling, YarnRope) else 1
    for t in range(x.shape[0]):
        for i in range(half):
            angle = torch.tensor(t * frequency(config, i), dtype=torch.float64)
            cos, sin = size * angle.cos(), size * angle.sin()
            a, b = x[t, :, i], x[t, :, i + half]
            out[t, :, i], out[t, :, i + half] = a * cos - b * sin, b * cos + a * sin
    return out


def head_norm(config: ModelConfig, weight: Tensor, x: Tensor) -> Tensor:
    """x [T, heads, head_dim] over each head, or over all heads together."""
    rows = x if config.qk_norm == "head" else x.flatten(1)
    return (rows / (rows.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight).view(x.shape)


def attention(config: ModelConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    size, heads = x.shape[0], config.num_attention_heads
    q = linear(w, f"{p}q_proj", x).view(size, heads, -1)
    k = linear(w, f"{p}k_proj", x).view(size, config.num_key_value_heads, -1)
    if config.latent_size is not None:
        turned, own = k.tensor_split((config.head_dim - config.latent_size,), dim=2)
        v = own / (own.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{p}k_norm.weight"]
        k = torch.cat((turned, v), dim=2)
    else:
        v = linear(w, f"{p}v_proj", x).view(size, config.num_key_value_heads, -1)
    if config.qk_norm in ("head", "all"):
        q, k = (head_norm(config, w[f"{p}{name}_norm.weight"], x) for name, x in (("q", q), ("k", k)))
    if config.position_embedding_type == "rope" and config.rotation:
        q, k = rope(config, q), rope(config, k)
    group = heads // config.num_key_value_heads
    out = q.new_empty(size, heads, v.shape[2])
    for t in range(size):
        seen = range(max(0, t + 1 - config.window) if config.window else 0, t + 1)
        for h in range(heads):
            scores = k[seen, h // group] @ q[t, h] / config.head_dim**0.5
            if config.attention_cap:
                scores = config.attention_cap * (scores / config.attention_cap).tanh()
            out[t, h] = scores.softmax(0) @ v[seen, h // group]
    return linear(w, f"{p}o_proj", out.flatten(1))


def layer(config: ModelConfig, w: Weights, p: str, x: Tensor) -> Tensor:
    def normed(name: str, x: Tensor) -> Tensor:
        return norm(config, w, f"{p}{name}", x)

    def attended(x: Tensor) -> Tensor:
        return attention(config, w, f"{p}self_attn.", x)

    def fed(x: Tensor) -> Tensor:
        return ffn(config, w, f"{p}mlp.", x)

    if config.norms == "after":
        x = x + normed("post_attention_layernorm", attended(x))
        return x + normed("post_feedforward_layernorm", fed(x))
    first = normed("input_layernorm", x)
    if config.norms == "around":
        x = x + normed("post_attention_layernorm", attended(first))
        return x + normed("post_feedforward_layernorm", fed(normed("pre_feedforward_layernorm", x)))
    if config.norms == "shared":
        return x + attended(first) + fed(first)
    if config.norms == "parallel":
        return x + attended(first) + fed(normed("post_attention_layernorm", x))
    x = x + attended(first)
    return x + fed(normed("post_attention_layernorm", x))


def logits(config: ModelConfig, tensors: Weights, ids: list[int]) -> Tensor:
    """float64 logits [T, vocabulary] of one sequence."""
    w = {name: tensor.double() for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][ids] * config.embedding_scale
    if config.position_embedding_type == "learned":
        x = x + w["model.embed_positions.weight"][: len(ids)]
    for i, c in enumerate(config.layers):
        x = layer(c, w, f"model.layers.{i}.", x)
    head = w["model.embed_tokens.weight"] if config.tie_word_embeddings else w["lm_head.weight"]
    out = norm(config, w, "model.norm", x) @ head.T
    return config.logits_cap * (out / config.logits_cap).tanh() if config.logits_cap else out
