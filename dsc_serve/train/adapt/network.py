"""A frozen decoder with low-rank updates: every tenant's windows go through the tenant's own, in one pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dsc_serve.model.config import DenseConfig, ModelConfig
from dsc_serve.train.functions import ACTIVATIONS, causal_attention, gated, head_loss, rotated
from dsc_serve.train.network import Network
from dsc_serve.train.settings import TrainError

NAMES = {
    **{part: f"self_attn.{part}_proj" for part in ("q", "k", "v", "o")},
    **{part: f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
QKV, GATE_UP = ("q", "k", "v"), ("gate", "up")  # modules of one input, multiplied at once
Updates = Mapping[tuple[int, str], tuple[Tensor, Tensor]]  # by layer and module: down [N, r, in], up [N, out, r]


class AdaptedNetwork(Network):
    """Computes each of N tenants' loss from the base's frozen weights and all tenants' updates, times `scale`."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        scale: float,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        if not isinstance(config.ffn, DenseConfig):
            raise TrainError(f"the base's ffn.kind is {config.ffn.kind!r}; adapters are trained of: 'dense'")
        super().__init__(config, dtype, device)
        self.scale = scale
        self.weights = {name: tensor.to(device, dtype) for name, tensor in weights.items()}
        self._products: dict[tuple[int, tuple[str, ...]], tuple[Tensor, Tensor | None]] = {
            (layer, modules): self._product(layer, modules)
            for layer in range(config.num_hidden_layers)
            for modules in (QKV, ("o",), GATE_UP if config.mlp_gated else ("up",), ("down",))
        }

    def _product(self, layer: int, modules: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """The weight [out of all, in] and bias of modules of one input. Each module's own weight is a part of it."""
        names = [f"model.layers.{layer}.{NAMES[module]}" for module in modules]
        parts, biases = zip(*((self.weights[f"{n}.weight"], self.weights.get(f"{n}.bias")) for n in names), strict=True)
        weight = torch.cat(parts)
        for name, part in zip(names, torch.split(weight, [len(part) for part in parts]), strict=True):
            self.weights[f"{name}.weight"] = part
        if all(bias is None for bias in biases):
            return weight, None
        whole = [part.new_zeros(len(part)) if own is None else own for part, own in zip(parts, biases, strict=True)]
        return weight, torch.cat(whole)

    def losses(self, updates: Updates, windows: Tensor) -> list[Tensor]:
        """Mean cross-entropy in nats per token of each tenant. windows int64 [N, rows, T + 1]."""
        config = self.config
        tenants, rows, size = windows.shape
        ids, targets = windows[..., :-1].flatten(0, 1), windows[..., 1:].flatten(1)
        x = F.embedding(ids, self.weights["model.embed_tokens.weight"])
        if config.position_embedding_type == "learned":
            x = x + self.weights["model.embed_positions.weight"][: size - 1]
        for layer in range(config.num_hidden_layers):
            prefix = f"model.layers.{layer}."
            x = x + self._attended(updates, layer, tenants, self._normed(f"{prefix}input_layernorm", x))
            x = x + self._mlp(updates, layer, tenants, self._normed(f"{prefix}post_attention_layernorm", x))
        x = self._normed("model.norm", x).view(tenants, rows * (size - 1), -1)
        head = self.weights["model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"]
        return [head_loss(own, head, wanted) for own, wanted in zip(x, targets, strict=True)]

    def _linear(self, updates: Updates, layer: int, modules: tuple[str, ...], tenants: int, x: Tensor) -> Tensor:
        """x [N · rows, T, in] → [N · rows, T, out of all modules], with the tenants' updates where there are any."""
        own = x.view(tenants, -1, x.shape[-1])
        y = F.linear(own, *self._products[layer, modules])
        update = self._joined(updates, layer, modules)
        if update is not None:
            down, up = (matrix.transpose(1, 2) for matrix in update)
            y = y.baddbmm_(torch.bmm(own, down), up, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)

    def _joined(self, updates: Updates, layer: int, modules: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
        """The updates of modules of one input as one: down beside each other, each up where its own down's rows are."""
        found = {module: updates[layer, module] for module in modules if (layer, module) in updates}
        if len(modules) == 1 or not found:
            return next(iter(found.values()), None)
        down, parts, before = torch.cat([own for own, _ in found.values()], 1), [], 0
        for module in modules:
            if module in found:
                up = found[module][1]
                parts.append(F.pad(up, (before, down.shape[1] - before - up.shape[2])))
                before += up.shape[2]
            else:
                out = len(self.weights[f"model.layers.{layer}.{NAMES[module]}.weight"])
                parts.append(down.new_zeros(len(down), out, down.shape[1]))
        return down, torch.cat(parts, 1)

    def _attended(self, updates: Updates, layer: int, tenants: int, x: Tensor) -> Tensor:
        c = self.config
        count, length, _ = x.shape
        heads, kv_heads, scale = c.num_attention_heads, c.num_key_value_heads, c.head_dim**-0.5
        joined = self._linear(updates, layer, QKV, tenants, x).view(count, length, -1, c.head_dim).transpose(1, 2)
        q, k, v = torch.split(joined, [heads, kv_heads, kv_heads], dim=1)
        if self.cos_sin_cache:
            cos, sin = (table[:length] for table in self.cos_sin_cache)
            q, k = rotated(q, cos * scale, sin * scale), rotated(k, cos, sin)
        else:
            q = q * scale
        if heads != kv_heads:
            k, v = (z.repeat_interleave(heads // kv_heads, dim=1) for z in (k, v))
        y = causal_attention(*(z.reshape(-1, length, c.head_dim) for z in (q, k, v)))
        attended = y.view(count, heads, length, -1).transpose(1, 2).flatten(2)
        return self._linear(updates, layer, ("o",), tenants, attended)

    def _mlp(self, updates: Updates, layer: int, tenants: int, x: Tensor) -> Tensor:
        act = "gelu" if self.config.hidden_act == "gelu" else "silu"
        if self.config.mlp_gated:
            hidden = gated(self._linear(updates, layer, GATE_UP, tenants, x), act)
        else:
            hidden = ACTIVATIONS[act](self._linear(updates, layer, ("up",), tenants, x))
        return self._linear(updates, layer, ("down",), tenants, hidden)

    def _normed(self, name: str, x: Tensor) -> Tensor:
        prefix, _, last = name.rpartition(".")
        own = {f"{last}.{part}": self.weights.get(f"{prefix}.{last}.{part}") for part in ("weight", "bias")}
        return self._norm({key: tensor for key, tensor in own.items() if tensor is not None}, last, x)
