"""Random weights by the paper's initialisation, and the presets of `dsc-serve init`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dsc_serve.documents import DocumentError, parse_json
from dsc_serve.model.budget import ParameterBudget
from dsc_serve.model.config import CheckpointError, ModelConfig, checked_config
from dsc_serve.model.decoder import tensor_shapes
from dsc_serve.model.mixtures import MIXTURES, mixture_config

STD = 0.02
GAMMA = 0.1


@dataclass(frozen=True)
class Preset:
    budget: ParameterBudget
    heads: int


PRESETS = {
    "paper": Preset(ParameterBudget(35e6, 28e6, 50304, 256, 6, 384), 6),
    "large": Preset(ParameterBudget(400e6, 250e6, 50304, 256, 24, 1024), 16),
}


def preset_config(name: str, kind: str, context: int | None = None, equal: str | None = None) -> ModelConfig:
    """The configuration of a preset, one of PRESETS or MIXTURES, with an FFN of the kind; `context`: its positions.

    equal: see `mixture_config`. Raises ValueError where a preset has no such FFN.
    """
    if name in MIXTURES:
        return mixture_config(name, kind, equal, context)
    if equal is not None:
        raise ValueError(f"equal is {equal!r}; preset {name!r} is equal in both, and it must be left out")
    preset = PRESETS[name]
    return budget_config(preset.budget, preset.heads, kind, context)


def budget_config(budget: ParameterBudget, heads: int, kind: str, context: int | None = None) -> ModelConfig:
    """A model of a budget's sizes in the reference script's frame. Raises ValueError where it leaves FFNs no room."""
    return ModelConfig(
        vocab_size=budget.vocab_size,
        hidden_size=budget.width,
        num_hidden_layers=budget.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=budget.width // heads,
        max_position_embeddings=context or budget.context,
        position_embedding_type="learned",
        tie_word_embeddings=budget.tied,
        ffn=getattr(budget, kind)(),
    )


def initial_tensors(config: ModelConfig, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a fresh model: norms 1 and 0, γ 0.1, atoms orthogonal × 0.02, the rest normal.

    Residual projections (attention's output, an expert's or a dense FFN's second matrix, not DSC's static one) are
    narrower by √(2L). Source: the paper's section on training and its reference script.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, shape in tensor_shapes(config).items():
        tensor = torch.empty(shape)
        if name.endswith("gamma"):
            tensor.fill_(GAMMA)
        elif name.endswith("bias"):
            tensor.zero_()
        elif len(shape) == 1:
            tensor.fill_(1.0)
        elif name.endswith(("atoms_u", "atoms_v")):
            nn.init.orthogonal_(tensor, generator=generator)
            tensor.mul_(STD)
        else:
            residual = name.endswith(("o_proj.weight", "down_proj.weight")) and ".static." not in name
            std = STD / math.sqrt(2 * config.num_hidden_layers) if residual else STD
            tensor.normal_(0.0, std, generator=generator)
        yield name, tensor.to(dtype)


def changed_config(config: ModelConfig, changes: Sequence[str]) -> ModelConfig:
    """The configuration with fields replaced, each as "field=value" or "ffn.field=value", values as JSON or a word.

    Raises CheckpointError naming the field that is unknown or has a value that is not allowed.
    """
    content = config.model_dump()
    for change in changes:
        name, equals, text = change.partition("=")
        target = content["ffn"] if name.startswith("ffn.") else content
        field = name.removeprefix("ffn.")
        if not equals or field not in target or field in ("kind", "ffn"):
            allowed = [k for k in content if k != "ffn"] + [f"ffn.{k}" for k in content["ffn"] if k != "kind"]
            raise CheckpointError(f"--set {change}: expected FIELD=VALUE with one of {', '.join(allowed)}")
        try:
            target[field] = parse_json(text)
        except DocumentError:
            target[field] = text
    return checked_config(content, "--set")
