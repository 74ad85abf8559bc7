"""What GGUF files of DeepSeek-V2 and V3 say; newer ones store what makes keys and what makes values apart."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.architectures.deepseek import LARGEST_MAGNITUDE, Sizes, absorbed
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.gguf_metadata import Metadata
from dsc_serve.model.source import Stored

SOFTMAX, SIGMOID = 1, 2  # what a file calls its scores
INNER = {
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "attn_k_b": "self_attn.k_b",
    "attn_v_b": "self_attn.v_b",
    "exp_probs_b": "mlp.router.choice_bias",
}


def is_v3(metadata: Metadata) -> bool:
    """Whether experts are scored one by one."""
    name = metadata.name("expert_gating_func")
    if metadata.get(name) not in (None, 0, SOFTMAX, SIGMOID):
        metadata.refuse(name, SOFTMAX, "1, softmax; 2, sigmoid")
    return bool(metadata.get(name) == SIGMOID)


def fields(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    newer = metadata.own("attention.key_length_mla") is not None
    key, value = (metadata.read(f"attention.{part}_length{'_mla' * newer}") for part in ("key", "value"))
    turned = metadata.need(metadata.name("rope.dimension_count"), int)
    still = key.value - turned if type(key.value) is int else key.value
    groups = metadata.read("expert_group_count", 0), metadata.read("expert_group_used_count", 0)
    scale = metadata.read("expert_weights_scale")
    found: Fields = {
        "q_lora_rank": metadata.read("attention.q_lora_rank"),
        "kv_lora_rank": metadata.read("attention.kv_lora_rank"),
        "qk_rope_head_dim": metadata.read("rope.dimension_count"),
        "qk_nope_head_dim": FieldValue(still, f"{key.name} - {metadata.name('rope.dimension_count')}"),
        "v_head_dim": value,
        "n_routed_experts": metadata.read("expert_count"),
        "num_experts_per_tok": metadata.read("expert_used_count"),
        "moe_intermediate_size": metadata.read("expert_feed_forward_length"),
        "n_shared_experts": metadata.read("expert_shared_count", 0),
        "first_k_dense_replace": metadata.read("leading_dense_block_count", 0),
        "routed_scaling_factor": FieldValue(scale.value or 1.0, scale.name),
        "norm_topk_prob": metadata.read("expert_weights_norm", False),
        "rope_scaling": yarn(metadata),
    }
    if groups[0].value not in (0, 1):
        found |= {"n_group": groups[0], "topk_group": groups[1]}
        found |= {} if is_v3(metadata) else {"topk_method": "group_limited_greedy"}
    else:
        found |= {"n_group": 1, "topk_group": 1}
    return found


def yarn(metadata: Metadata) -> Fields | None:
    """How positions are stretched: llama.cpp takes cosines as they are and scales scores by one factor, squared."""
    kind = metadata.name("rope.scaling.type")
    if metadata.get(kind) in (None, "none"):
        return None
    if metadata.get(kind) != "yarn":
        metadata.refuse(kind, "none", "none, yarn")
    name = metadata.name("rope.scaling.yarn_log_multiplier")
    magnitude = 10 * metadata.number(name, 0.0, LARGEST_MAGNITUDE / 10)
    found: Fields = {
        "rope_type": "yarn",
        "factor": metadata.read("rope.scaling.factor", 1.0),
        "original_max_position_embeddings": metadata.read(
            "rope.scaling.original_context_length", metadata.own("context_length")
        ),
    }
    both = {"mscale": FieldValue(magnitude, name), "mscale_all_dim": FieldValue(magnitude, name)}
    return found | (both if magnitude else {"attention_factor": 1.0})


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """The tensors of the family, what makes keys and what makes values in one. Raises CheckpointError for shapes."""
    size, heads = Sizes.of(s), config.num_attention_heads
    shapes = {"k_b": (heads, size.latent, size.still), "v_b": (heads, size.value, size.latent)}
    found = {name.replace("choice_bias.bias", "choice_bias"): own for name, own in stored.items()}
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        parts = {part: found.pop(name) for part in shapes if (name := f"{at}{part}.weight") in found}
        for part, shape in shapes.items() if parts else ():
            named = f"{s.path}: tensor blk.{i}.attn_{part}.weight"
            if part not in parts:
                raise CheckpointError(f"{named} is missing, its counterpart is there")
            if parts[part].shape != shape:
                raise CheckpointError(f"{named} has shape {list(parts[part].shape)}, expected {list(shape)}")
        if parts:
            read, rows = partial(joined, parts["k_b"], parts["v_b"]), heads * (size.still + size.value)
            found[f"{at}kv_b_proj.weight"] = Stored((rows, size.latent), torch.float32, read)
    return absorbed(found, s, config)


def joined(keys: Stored, values: Stored) -> Tensor:
    """[heads · (still + value), latent] of keys [heads, latent, still] and values [heads, value, latent]."""
    return torch.cat((keys.read().transpose(1, 2), values.read()), dim=1).flatten(0, 1)
