"""Mixtures of experts in the shapes of ones that people run, and the DSC models that may be compared with each.

Routing is as wide as there: as many experts, as many picked. Layers, widths and vocabularies are cut to about 0.7
billion parameters. A DSC layer reads its whole router, M of its 3·M rows, for every token: its FFN cannot have more
than three times as many parameters as are active, where these mixtures have up to eight. So no DSC is equal in both,
and there are two: one of equal total and more active parameters, one of equal active and fewer in total.
"""

from __future__ import annotations

from typing import Any

import torch

from dsc_serve.model.budget import MIN_STATIC
from dsc_serve.model.config import DscConfig, ModelConfig, MoeConfig, SharedExpertConfig
from dsc_serve.model.ffn import KINDS

EQUALS = ("total", "active")
PICKS = 4  # atoms of a token, as the paper's budgets have them

FRAME: dict[str, Any] = {
    "vocab_size": 50304,
    "hidden_size": 1024,
    "max_position_embeddings": 1024,
    "norm_type": "rmsnorm",
    "hidden_act": "silu",
    "mlp_gated": True,
}
MIXTURES: dict[str, ModelConfig] = {
    # OLMoE-1B-7B: there 16 layers of width 2,048, experts of 1,024
    "olmoe": ModelConfig(
        **FRAME,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        qk_norm="all",
        tie_word_embeddings=False,
        ffn=MoeConfig(num_experts=64, experts_per_token=8, expert_size=512, router_norm=False),
    ),
    # Granite-3.1-1B-A400M: there 24 layers of the same widths
    "granite": ModelConfig(
        **FRAME,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=64,
        ffn=MoeConfig(num_experts=32, experts_per_token=8, expert_size=512, router_norm=False, normalize_weights=True),
    ),
    # Qwen1.5-MoE-A2.7B: there 24 layers of width 2,048, experts of 1,408 and a shared one of 5,632
    "qwen": ModelConfig(
        **FRAME,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
        attention_bias=True,
        tie_word_embeddings=False,
        ffn=MoeConfig(
            num_experts=60,
            experts_per_token=4,
            expert_size=704,
            router_norm=False,
            shared_expert=SharedExpertConfig(size=2816, gated=True),
        ),
    ),
}


def mixture_config(name: str, kind: str, equal: str | None = None, context: int | None = None) -> ModelConfig:
    """A mixture of MIXTURES, or for kind "dsc" its frame with a DSC of equal total or active parameters.

    Raises ValueError for another kind, and where `equal` is missing or has no meaning.
    """
    config = MIXTURES[name]
    if kind not in ("moe", "dsc"):
        raise ValueError(f"preset {name!r} has no ffn {kind!r}; it has 'moe' and 'dsc'")
    if (equal not in EQUALS) if kind == "dsc" else (equal is not None):
        raise ValueError(
            f"equal is {equal!r}; with preset {name!r} it must be one of {', '.join(EQUALS)} for 'dsc', and none else"
        )
    if context is not None:
        config = config.model_copy(update={"max_position_embeddings": context})
    return config if equal is None else config.model_copy(update={"ffn": equal_dsc(config, equal)})


def equal_dsc(mixture: ModelConfig, equal: str) -> DscConfig:
    """The DSC layer with as many parameters, in total or active, as the mixture's FFN, nearly all of them in its bank.

    So it has the fewest active ones for its total, and the largest total for its active ones.
    """

    def counts(config: ModelConfig) -> dict[str, int]:
        total = sum(torch.Size(shape).numel() for shape in KINDS[config.ffn.kind].shapes(config).values())
        return {"total": total, "active": total - KINDS[config.ffn.kind].idle_parameters(config)}

    def of(atoms: int) -> int:
        ffn = DscConfig(num_atoms=atoms, atoms_per_token=PICKS, static_size=MIN_STATIC)
        return counts(mixture.model_copy(update={"ffn": ffn}))[equal]

    each = of(PICKS + 1) - of(PICKS)
    return DscConfig(
        num_atoms=PICKS + (counts(mixture)[equal] - of(PICKS)) // each,
        atoms_per_token=PICKS,
        static_size=MIN_STATIC,
    )
