"""The decoder as it is trained: a function of the serving form's tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import ModelConfig
from dsc_serve.model.rope import rope_table
from dsc_serve.train.ffn import TRAINED, FfnTrace, Pass, Weights
from dsc_serve.train.functions import causal_attention, head_loss, rms_norm, rotated
from dsc_serve.train.settings import check_trained

SEEDS = 2**63  # beyond which torch takes none


@dataclass
class StepLoss:
    """What one pass of a step costs."""

    loss: Tensor  # mean cross-entropy in nats per token
    terms: Tensor  # the sum of all training terms
    layers: list[FfnTrace]  # one each


class Network:
    """Computes the loss of token windows from a mapping of weights, all in one dtype and on one device."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        check_trained(config)
        self.config = config
        self.cos_sin_cache: tuple[Tensor, ...] = ()
        if config.position_embedding_type == "rope":
            size, positions = config.head_dim, config.max_position_embeddings
            cos_sin_cache = rope_table(size, positions, config.rope_theta, config.rope_scaling)
            self.cos_sin_cache = cos_sin_cache.to(device=device, dtype=dtype).unbind(1)

    def __call__(self, weights: Weights, windows: Tensor, mode: Pass) -> StepLoss:
        """windows int64 [N, T + 1]: each token but the first is a target; T is at most the model's context."""
        config = self.config
        ids, targets = windows[:, :-1], windows[:, 1:].flatten()
        x = F.embedding(ids, weights["model.embed_tokens.weight"])
        if config.position_embedding_type == "learned":
            x = x + weights["model.embed_positions.weight"][: ids.shape[1]]
        traces = []
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}."
            own = {k.removeprefix(prefix): w for k, w in weights.items() if k.startswith(prefix)}
            x = x + self._attention(own, self._norm(own, "input_layernorm", x))
            mlp = {k.removeprefix("mlp."): w for k, w in own.items() if k.startswith("mlp.")}
            routed = self._norm(own, "post_attention_layernorm", x).flatten(0, 1)
            layer_mode = replace(mode, noise=(mode.noise * config.num_hidden_layers + i) % SEEDS)
            y, trace = TRAINED[config.ffn.kind](config, mlp, routed, layer_mode)
            x = x + y.view_as(x)
            traces.append(trace)
        x = self._norm(weights, "model.norm", x).flatten(0, 1)
        head = weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        loss = head_loss(x, head, targets)
        terms = sum((term for trace in traces for term in trace.terms.values()), torch.zeros_like(loss))
        return StepLoss(loss, terms, traces)

    def _norm(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        scale, shape = weights[f"{name}.weight"], x.shape[-1:]
        if self.config.norm_type == "rmsnorm":
            return rms_norm(x, scale, self.config.norm_eps)
        return F.layer_norm(x, shape, scale, weights[f"{name}.bias"], self.config.norm_eps)

    def _attention(self, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
        c = self.config
        count, length, _ = x.shape
        fused = torch.cat([weights[f"self_attn.{p}_proj.weight"] for p in "qkv"])
        bias = torch.cat([weights[f"self_attn.{p}_proj.bias"] for p in "qkv"]) if c.attention_bias else None
        qkv = F.linear(x, fused, bias).view(count, length, -1, c.head_dim).transpose(1, 2)
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        q, k, v = torch.split(qkv, [heads, kv_heads, kv_heads], dim=1)
        q = q * c.head_dim**-0.5
        if self.cos_sin_cache:
            cos, sin = (table[:length] for table in self.cos_sin_cache)
            q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if heads != kv_heads:
            k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        y = causal_attention(*(z.reshape(-1, length, c.head_dim) for z in (q, k, v)))
        joined = y.view(count, heads, length, -1).transpose(1, 2).flatten(2)
        return F.linear(joined, weights["self_attn.o_proj.weight"], weights.get("self_attn.o_proj.bias"))
