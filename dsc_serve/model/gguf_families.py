"""Which family each architecture of GGUF files is, and how such a file says what a checkpoint of that family says.

Facts that llama.cpp has in its code and not in the file stand here too: whether a mixture's weights are made to sum to
1, and which layers of SmolLM3 turn nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dsc_serve.model import gguf_deepseek, gguf_gemma
from dsc_serve.model.architectures import ARCHITECTURES, Architecture, Settings
from dsc_serve.model.architectures.experts import unstacked
from dsc_serve.model.architectures.settings import Fields
from dsc_serve.model.architectures.tensors import Tensors, split_rows
from dsc_serve.model.config import CheckpointError, ModelConfig
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.gguf_metadata import Metadata
from dsc_serve.model.source import Stored

OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "position_embd.weight": "model.embed_positions.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    "output.weight": "lm_head.weight",
}
INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_qkv": "self_attn.qkv",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}
EXPERTS = {f".mlp.experts.{part}.weight": part for part in ("gate_proj", "up_proj", "down_proj")}
ONE_BY_ONE = {f"ffn_{part}": f"{part}_proj" for part in ("gate", "up", "down")}  # of experts in older files
BRANCH_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
FUSED = {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}

Convert = Callable[[Mapping[str, Stored], Settings, ModelConfig], Tensors]


@dataclass(frozen=True)
class GgufFamily:
    """What an architecture of GGUF files is."""

    architecture: str  # the family's
    # Fields of its config besides those of all, from the metadata and the tensors
    settings: Callable[[Metadata, Mapping[str, Stored]], Fields] = lambda metadata, tensors: {}
    interleaved: bool = False  # whether rows of q and k lie as rotary positions by neighbouring pairs want them
    partial: bool = False  # whether only a part of a head may be turned
    longrope: bool = False  # whether there may be factors of two kinds for short and long texts
    # Fields of the metadata that `settings` reads, which others are refused for; with "rope" all of positions
    knows: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)  # of a layer's tensors where they are others than INNER's
    convert: Convert | None = None  # from there on; None: as the family has it

    @property
    def family(self) -> Architecture:
        return ARCHITECTURES[self.architecture]

    def serving_name(self, name: str) -> str:
        """A tensor's name by the family's; one that is not known stays, to be refused."""
        if name in OUTER:
            return OUTER[name]
        parts, inner = name.split("."), {**INNER, **self.names}
        if len(parts) == 4 and parts[0] == "blk" and parts[2] in inner:
            return f"model.layers.{parts[1]}.{inner[parts[2]]}.{parts[3]}"
        if len(parts) == 5 and parts[0] == "blk" and parts[2] in ONE_BY_ONE:
            return f"model.layers.{parts[1]}.mlp.experts.{parts[3]}.{ONE_BY_ONE[parts[2]]}.{parts[4]}"
        return name

    def tensors(self, stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
        """The tensors as they are served, from those under the names of `serving_name`. Raises CheckpointError."""
        found, s = unstacked(stored, s, config, EXPERTS), s.over(self.family.defaults)
        if self.interleaved:
            for name, own in found.items():
                if ".q_proj." in name or ".k_proj." in name:
                    found[name] = own.mapped(partial(in_halves, head_dim=config.head_dim), own.shape)
        return (self.convert or self.family.tensors)(found, s, config)


def in_halves(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of heads whose rotary pairs are neighbours, put so that a pair is (i, i + head_dim / 2)."""
    if rows.shape[0] % head_dim:
        return rows  # which no configuration fits
    return rows.view(-1, head_dim // 2, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def mixture(
    metadata: Metadata, tensors: Mapping[str, Stored], normalize: bool = False, by_shares: bool = False
) -> Fields:
    """The fields of a mixture of experts, under all names that families have for them.

    by_shares: whether, where the file does not give an expert's size, feed_forward_length is that of all picked ones.
    """
    metadata.need(metadata.name("expert_count"), int)
    experts, used = metadata.read("expert_count"), metadata.need(metadata.name("expert_used_count"), int)
    for name in ("expert_weights_scale", "expert_group_count", "expert_group_used_count"):
        metadata.refuse(metadata.name(name), 1, "1")
    if metadata.own("expert_gating_func") != 0:  # none is said, which llama.cpp takes for a softmax
        metadata.refuse(metadata.name("expert_gating_func"), 1, "0 and 1, softmax")
    metadata.refuse(metadata.name("expert_weights_norm"), normalize, f"{normalize}, for this architecture")
    size, whole = metadata.read("expert_feed_forward_length"), metadata.read("feed_forward_length")
    if not size.value:
        shared = by_shares and type(whole.value) is int and used > 0
        size = (
            FieldValue(whole.value // used, f"{whole.name} // {metadata.name('expert_used_count')}")
            if shared
            else whole
        )
    return {
        "num_experts": experts,
        "num_local_experts": experts,
        "num_experts_per_tok": metadata.read("expert_used_count"),
        "norm_topk_prob": normalize,
        "moe_intermediate_size": size,
        "intermediate_size": size,
    }


def granite(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    names = {
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
        "attention_multiplier": "attention.scale",
    }
    found = {ours: metadata.read(theirs) for ours, theirs in names.items()}
    if not found["attention_multiplier"].value:  # as llama.cpp takes it, 1 over the root of a head's size
        size = metadata.head_dim
        found["attention_multiplier"] = FieldValue(
            size**-0.5 if type(size) is int and size > 0 else 1.0, found["attention_multiplier"].name
        )
    return {ours: own for ours, own in found.items() if own.value not in (None, 0)}


def granite_moe(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    metadata.refuse(metadata.name("expert_shared_feed_forward_length"), 0, "0, no shared expert")
    return granite(metadata, tensors) | mixture(metadata, tensors, normalize=True)


def qwen2_moe(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    shared = metadata.read("expert_shared_feed_forward_length")
    shared = shared if shared.value else metadata.read("feed_forward_length")
    return mixture(metadata, tensors, by_shares=True) | {"shared_expert_intermediate_size": shared}


def qwen2_moe_tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """The shared expert's gate is a vector in these files."""
    found = dict(stored)
    for name, own in stored.items():
        if name.endswith(".shared_expert_gate.weight") and len(own.shape) == 1:
            found[name] = Stored((1, *own.shape), own.dtype, partial(one_row, own))
    return ARCHITECTURES["Qwen2MoeForCausalLM"].tensors(found, s, config)


def one_row(own: Stored) -> Tensor:
    return own.read()[None]


def gpt_neox(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return {"use_parallel_residual": metadata.read("use_parallel_residual", True)}


def stablelm(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    """Its branches lie beside each other where there is no second norm."""
    return {
        "use_parallel_residual": "model.layers.0.post_attention_layernorm.weight" not in tensors,
        "use_qkv_bias": "model.layers.0.self_attn.q_proj.bias" in tensors,
        "qk_layernorm": "model.layers.0.self_attn.q_norm.weight" in tensors,
    }


def falcon(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    """The newer architecture by its two norms, or by its heads of keys and values."""
    kv, norms = metadata.read("attention.head_count_kv", 1), "model.layers.0.attn_norm_2.weight" in tensors
    return {
        "new_decoder_architecture": norms or kv.value != 1,
        "num_ln_in_parallel_attn": 2 if norms else 1,
        "num_kv_heads": kv,
        "ffn_hidden_size": metadata.read("feed_forward_length"),
    }


def falcon_tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """Of two norms the second is that of attention."""
    second = re.compile(r"\.attn_norm_2\.")
    if not any(second.search(name) for name in stored):
        return split(stored, s, config)
    first = re.compile(r"\.input_layernorm\.")
    named = {first.sub(".post_attention_layernorm.", name): own for name, own in stored.items()}
    return split({second.sub(".input_layernorm.", name): own for name, own in named.items()}, s, config)


def split(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """q, k and v from one matrix, in which each lies by itself."""
    found = dict(stored)
    for i in range(config.num_hidden_layers):
        at = f"model.layers.{i}.self_attn."
        sizes = {"q": config.query_size, "k": config.kv_size, "v": config.kv_size}
        for part in ("weight", "bias"):
            rows = {f"{at}{name}_proj.{part}": size for name, size in sizes.items()}
            split_rows(found, f"{at}qkv.{part}", rows, s.path)
    return found


def mixtral(metadata: Metadata, tensors: Mapping[str, Stored]) -> Fields:
    return mixture(metadata, tensors, normalize=True) | gguf_gemma.windowed(metadata, tensors)


WINDOW = frozenset({"attention.sliding_window"})
GEMMA = WINDOW | {"attn_logit_softcapping", "final_logit_softcapping", "rope"}
LATENT = frozenset({"attention.value_length", "rope"})
AROUND = {**BRANCH_NORMS, "ffn_norm": "pre_feedforward_layernorm"}
MIXTRAL = GgufFamily("MixtralForCausalLM", mixtral, interleaved=True, knows=WINDOW)
MISTRAL = GgufFamily("MistralForCausalLM", gguf_gemma.windowed, interleaved=True, knows=WINDOW)
DEEPSEEK_V2, DEEPSEEK_V3 = (
    GgufFamily(
        f"DeepseekV{number}ForCausalLM",
        gguf_deepseek.fields,
        knows=LATENT,
        names=gguf_deepseek.INNER,
        convert=gguf_deepseek.tensors,
    )
    for number in (2, 3)
)
FAMILIES: dict[str, GgufFamily] = {
    "deepseek2": DEEPSEEK_V2,
    "falcon": GgufFamily("FalconForCausalLM", falcon, names={"attn_norm_2": "attn_norm_2"}, convert=falcon_tensors),
    "gemma2": GgufFamily("Gemma2ForCausalLM", gguf_gemma.gemma2, knows=GEMMA, names=AROUND, convert=gguf_gemma.tensors),
    "gemma3": GgufFamily("Gemma3ForCausalLM", gguf_gemma.gemma3, knows=GEMMA, names=AROUND, convert=gguf_gemma.tensors),
    "gpt2": GgufFamily("GPT2LMHeadModel", convert=split),
    "gptneox": GgufFamily("GPTNeoXForCausalLM", gpt_neox, partial=True, convert=split),
    "granite": GgufFamily("GraniteForCausalLM", granite, interleaved=True),
    "granitemoe": GgufFamily("GraniteMoeForCausalLM", granite_moe, interleaved=True),
    "llama": GgufFamily("LlamaForCausalLM", interleaved=True),
    "olmo2": GgufFamily("Olmo2ForCausalLM", names=BRANCH_NORMS),
    "olmoe": GgufFamily("OlmoeForCausalLM", mixture),
    "phi3": GgufFamily("Phi3ForCausalLM", gguf_gemma.windowed, partial=True, longrope=True, knows=WINDOW, names=FUSED),
    "qwen2": GgufFamily("Qwen2ForCausalLM"),
    "qwen2moe": GgufFamily("Qwen2MoeForCausalLM", qwen2_moe, convert=qwen2_moe_tensors),
    "qwen3": GgufFamily("Qwen3ForCausalLM"),
    "qwen3moe": GgufFamily("Qwen3MoeForCausalLM", partial(mixture, normalize=True, by_shares=True)),
    "smollm3": GgufFamily("SmolLM3ForCausalLM", lambda m, tensors: {"no_rope_layer_interval": 4}, interleaved=True),
    "stablelm": GgufFamily("StableLmForCausalLM", stablelm, partial=True),
}


def family_of(metadata: Metadata) -> GgufFamily:
    """The family of a file. Raises CheckpointError naming those that are supported."""
    name = metadata.architecture
    if name not in FAMILIES:
        raise CheckpointError(
            f"{metadata.file}: architecture {name!r} is not supported; supported: {', '.join(FAMILIES)}"
        )
    if name == "deepseek2":
        return DEEPSEEK_V3 if gguf_deepseek.is_v3(metadata) else DEEPSEEK_V2
    if name == "llama" and metadata.own("expert_count"):
        return MIXTRAL
    return MISTRAL if name == "llama" and gguf_gemma.window_of(metadata) else FAMILIES[name]
