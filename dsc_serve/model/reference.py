"""Checkpoints of the paper's reference script, brought into the serving form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor

from dsc_serve.model.config import (
    CheckpointError,
    DenseConfig,
    DscConfig,
    FfnConfig,
    ModelConfig,
    MoeConfig,
    one_line,
    read_json,
)
from dsc_serve.model.folder import load_tensors, save_checkpoint

TORCH_FILE = b"PK\x03\x04"  # how a file of torch.save begins: it is a zip
METHODS = ("dsc", "standard_moe", "dense")


def _field(content: dict[str, Any], path: Path, name: str, kind: type | tuple[type, ...]) -> Any:
    value = content.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = kind.__name__ if isinstance(kind, type) else "number"
        raise CheckpointError(f"{path}: {name} is {value!r}, expected {wanted}")
    return value


def reference_config(path: Path) -> ModelConfig:
    """The script's own config file as a ModelConfig. Raises CheckpointError naming the field that does not fit."""
    try:
        return _reference_config(path)
    except ValidationError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None


def _reference_config(path: Path) -> ModelConfig:
    content = read_json(path)

    def size(name: str) -> int:
        value: int = _field(content, path, name, int)
        if value < 1:
            raise CheckpointError(f"{path}: {name} is {value}, expected at least 1")
        return value

    method = _field(content, path, "method", str)
    ffn: FfnConfig
    if method == "dsc":
        tau = float(_field(content, path, "tau_clamp", (int, float)))
        atoms, picked, static = size("num_bases"), size("dmc_top_k"), size("dmc_base_d_ffn")
        ffn = DscConfig(num_atoms=atoms, atoms_per_token=picked, static_size=static, tau=tau)
    elif method == "standard_moe":
        experts, picked, width = size("num_experts"), size("moe_top_k"), size("expert_d_ffn")
        ffn = MoeConfig(num_experts=experts, experts_per_token=picked, expert_size=width)
    elif method == "dense":
        ffn = DenseConfig(size=size("dense_d_ffn"))
    else:
        raise CheckpointError(f"{path}: method is {method!r}; supported: {', '.join(METHODS)}")
    heads, width = size("n_head"), size("d_model")
    if width % heads:
        raise CheckpointError(f"{path}: d_model is {width}, which n_head, {heads}, does not divide")
    return ModelConfig(
        vocab_size=size("vocab_size"),
        hidden_size=width,
        num_hidden_layers=size("n_layer"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=width // heads,
        max_position_embeddings=size("block_size"),
        position_embedding_type="learned",
        tie_word_embeddings=_field(content, path, "tie_weights", bool),
        ffn=ffn,
    )


def serving_name(name: str, kind: str) -> str | None:
    """The serving form's name of a tensor of the script's state dict; None for what is not stored (the causal mask)."""
    outer = {
        "token_embedding.weight": "model.embed_tokens.weight",
        "position_embedding.weight": "model.embed_positions.weight",
        "ln_f.weight": "model.norm.weight",
        "ln_f.bias": "model.norm.bias",
        "head.weight": "lm_head.weight",
    }
    if name in outer:
        return outer[name]
    parts = name.split(".", 2)
    if len(parts) < 3 or parts[0] != "blocks":
        return name
    layer, rest = f"model.layers.{parts[1]}", parts[2]
    if rest == "attn.bias":
        return None
    inner = {
        "ln1.": "input_layernorm.",
        "ln2.": "post_attention_layernorm.",
        "attn.c_proj.": "self_attn.o_proj.",
        "ffn.raw_U": "mlp.atoms_u",
        "ffn.raw_V": "mlp.atoms_v",
        "ffn.gate.": "mlp.router.",
        "ffn.static_net.0.": "mlp.static.up_proj.",
        "ffn.static_net.2.": "mlp.static.down_proj.",
        "ffn.net.0.": "mlp.up_proj.",
        "ffn.net.2.": "mlp.down_proj.",
        "ffn.": "mlp.",
    }
    for old, new in inner.items():
        if rest.startswith(old):
            rest = new + rest.removeprefix(old)
            break
    if kind == "moe":
        rest = rest.replace(".0.weight", ".up_proj.weight").replace(".2.weight", ".down_proj.weight")
    return f"{layer}.{rest}"


def serving_tensors(tensors: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The script's state dict under the serving form's names: q, k, v separate, γ of shape [d]."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "head.weight" and config.tie_word_embeddings:
            continue
        target = serving_name(name, config.ffn.kind)
        if target is None:
            continue
        if target.endswith("attn.c_attn.weight"):
            layer = target.removesuffix("attn.c_attn.weight")
            for part, weight in zip("qkv", tensor.chunk(3), strict=True):
                result[f"{layer}self_attn.{part}_proj.weight"] = weight.contiguous()
        else:
            result[target] = tensor.flatten() if target.endswith("gamma") else tensor
    return result


def import_reference(weights: Path, config_file: Path, out: Path) -> ModelConfig:
    """Convert one checkpoint of the script to a folder in the serving form. Raises CheckpointError."""
    config = reference_config(config_file)
    if not weights.is_file():
        raise CheckpointError(f"{weights}: no such file")
    with weights.open("rb") as file:
        if file.read(4) == TORCH_FILE:
            raise CheckpointError(f"{weights}: torch's own format; write its state dict as safetensors (README.md)")
    save_checkpoint(config, serving_tensors(load_tensors([weights]), config), out, weights)
    return config
