"""Models of random weights, made on the device without files."""

from __future__ import annotations

import torch
from common import DEVICE, DRY
from internals import Decoder, ModelConfig, plan_dsc_layers, preset_config, tensor_shapes

BIG_FFN = {
    "dsc": {"kind": "dsc", "num_atoms": 16384, "atoms_per_token": 32, "static_size": 8192},
    "moe": {"kind": "moe", "num_experts": 4, "experts_per_token": 2, "expert_size": 8192},
    "dense": {"kind": "dense", "size": 16384},
}
BIG_FRAME = {"vocab_size": 50304, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
BIG_HEADS = {"num_key_value_heads": 8, "head_dim": 128}
DRY_FRAME = {"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
DRY_HEADS = {"num_key_value_heads": 2, "head_dim": 16}
DRY_SIZES = {
    "num_atoms": 50,
    "static_size": 33,
    "expert_size": 40,
    "size": 65,
    "num_adapters": 20,
    "atoms_per_token": 4,
}


def config(size: str, kind: str, context: int, layers: int | None = None, **changes: object) -> ModelConfig:
    """The paper's sizes, or ("big") those of a model that a GPU is bought for; dry, the same forms in small."""
    if size == "paper":
        made = preset_config("paper", kind, context=context)
        if DRY:
            made = made.model_copy(update={**DRY_FRAME, "num_key_value_heads": 4, "head_dim": 16})
    else:
        form = {"position_embedding_type": "rope", "norm_type": "rmsnorm", "tie_word_embeddings": True}
        frame = {**DRY_FRAME, **DRY_HEADS} if DRY else {**BIG_FRAME, **BIG_HEADS}
        made = ModelConfig.model_validate({**frame, **form, "max_position_embeddings": context, "ffn": BIG_FFN[kind]})
    if DRY:
        small = {name: value for name, value in DRY_SIZES.items() if hasattr(made.ffn, name)}
        made = made.model_copy(update={"ffn": made.ffn.model_copy(update=small)})
    if layers:
        changes["num_hidden_layers"] = layers
    return made.model_copy(update=changes)


def decoder(made: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    generator = torch.Generator(DEVICE).manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes(made).items():
        tensor = torch.empty(shape, dtype=dtype, device=DEVICE)
        if "norm" in name:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        elif name.endswith("gamma"):
            tensor.fill_(0.5)
        else:
            tensor.normal_(0.0, 0.02 if len(shape) > 1 else 0.1, generator=generator)
        tensors[name] = tensor
    with torch.inference_mode():
        model = Decoder(made, tensors, dtype, DEVICE)
    plan_dsc_layers(model)
    return model
