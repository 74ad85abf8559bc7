"""Model folders for other servers: Mixtral or Llama of a preset's size, random weights, a made-up tokenizer."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dsc_serve.bench.load.made_up_tokenizer import save_tokenizer
from dsc_serve.model.config import DenseConfig, ModelConfig, MoeConfig
from dsc_serve.model.initial import STD, preset_config

FORMS = {"mixtral": "moe", "llama": "dense"}  # and the FFN kind whose sizes they take
MULTIPLE = 32  # of which hidden sizes are, as kernels like them


def gated_size(size: int) -> int:
    """The hidden size at which an MLP of three matrices has about the weights of one of two."""
    return max(MULTIPLE, size * 2 // 3 // MULTIPLE * MULTIPLE)


def peer_config(form: str, ours: ModelConfig) -> dict[str, object]:
    """config.json of a model with the frame and the FFN sizes of ours."""
    ffn = ours.ffn
    config: dict[str, object] = {
        "architectures": [f"{form.capitalize()}ForCausalLM"],
        "model_type": form,
        "vocab_size": ours.vocab_size,
        "hidden_size": ours.hidden_size,
        "num_hidden_layers": ours.num_hidden_layers,
        "num_attention_heads": ours.num_attention_heads,
        "num_key_value_heads": ours.num_key_value_heads,
        "head_dim": ours.head_dim,
        "max_position_embeddings": max(ours.max_position_embeddings, 1024),
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if isinstance(ffn, MoeConfig):
        experts = {"num_local_experts": ffn.num_experts, "num_experts_per_tok": ffn.experts_per_token}
        return config | experts | {"intermediate_size": gated_size(ffn.expert_size), "sliding_window": None}
    assert isinstance(ffn, DenseConfig)
    return config | {"intermediate_size": gated_size(ffn.size)}


def tensor_shapes(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every stored tensor of a Mixtral or a Llama without biases, by its name in the ecosystem. Raises KeyError."""

    def size(name: str) -> int:
        value = config[name]
        assert isinstance(value, int)
        return value

    d, h, heads, kv = map(size, ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    head = size("head_dim") if config.get("head_dim") else d // heads
    yield "model.embed_tokens.weight", (size("vocab_size"), d)
    if not config.get("tie_word_embeddings"):
        yield "lm_head.weight", (size("vocab_size"), d)
    yield "model.norm.weight", (d,)
    for layer in range(size("num_hidden_layers")):
        at = f"model.layers.{layer}."
        yield f"{at}input_layernorm.weight", (d,)
        yield f"{at}post_attention_layernorm.weight", (d,)
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            yield f"{at}self_attn.{name}_proj.weight", (rows * head, d)
        yield f"{at}self_attn.o_proj.weight", (d, heads * head)
        if config["model_type"] == "mixtral":
            experts = size("num_local_experts")
            yield f"{at}block_sparse_moe.gate.weight", (experts, d)
            for expert in range(experts):
                for name, shape in (("w1", (h, d)), ("w2", (d, h)), ("w3", (h, d))):
                    yield f"{at}block_sparse_moe.experts.{expert}.{name}.weight", shape
        else:
            for name, shape in (("gate", (h, d)), ("up", (h, d)), ("down", (d, h))):
                yield f"{at}mlp.{name}_proj.weight", shape


def write_peer_model(form: str, preset: str, folder: Path, seed: int = 0) -> int:
    """Write a model of `form` with a preset's sizes; returns the number of its parameters.

    Weights are normal with the deviation of our own fresh models, residual projections narrower by √(2L).
    """
    config = peer_config(form, preset_config(preset, FORMS[form]))
    generator = torch.Generator().manual_seed(seed)
    narrow = STD / math.sqrt(2 * preset_config(preset, FORMS[form]).num_hidden_layers)
    tensors: dict[str, Tensor] = {}
    for name, shape in tensor_shapes(config):
        residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
        filled = torch.ones(shape) if len(shape) == 1 else torch.empty(shape)
        if len(shape) > 1:
            filled.normal_(0.0, narrow if residual else STD, generator=generator)
        tensors[name] = filled.bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_tokenizer(preset_config(preset, FORMS[form]).vocab_size, folder)
    return sum(tensor.numel() for tensor in tensors.values())


def peer_counts(config: dict[str, object]) -> dict[str, object]:
    """What a Mixtral or a Llama is: parameters, in all and of one token, and bytes of its FFNs in bfloat16.

    Raises KeyError where the configuration lacks a size.
    """
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config)}
    total, active, text = sum(sizes.values()), sum(sizes.values()), f"dense, {config['intermediate_size']}"
    ffn = sum(size for name, size in sizes.items() if ".mlp." in name or ".block_sparse_moe." in name)
    if config["model_type"] == "mixtral":
        experts, picked = config["num_local_experts"], config["num_experts_per_tok"]
        assert isinstance(experts, int) and isinstance(picked, int)
        inner = sum(size for name, size in sizes.items() if ".experts." in name)
        active -= inner * (experts - picked) // experts
        text = f"moe: {experts} experts of {config['intermediate_size']} (gated), top {picked}"
    return {
        "ffn": text,
        "frame": f"{config['num_hidden_layers']} layers, d {config['hidden_size']}, vocabulary {config['vocab_size']}",
        "parameters": total,
        "active": active,
        "ffn_bytes": 2 * ffn,
        "dtype": "bfloat16",
    }


def describe_foreign(path: Path) -> dict[str, object]:
    """What another server's model is, as far as its files say: a folder of the forms above, else the bytes it has."""
    config = path / "config.json"
    content = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if content.get("model_type") in FORMS:
        with contextlib.suppress(KeyError):
            return peer_counts(content)
    files = [path] if path.is_file() else [file for file in path.glob("*") if file.is_file()]
    stored = sum(file.stat().st_size for file in files)
    return {"frame": f"{path.name}, {stored / 1e6:,.0f} MB stored" if files else ""}
