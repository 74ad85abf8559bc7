"""The checkpoints of `families` as GGUF files, as llama.cpp's converter would write them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from support.families import CASES, VOCABULARY, tensors_of
from support.reading_families import READING_CASES

Arrays = dict[str, np.ndarray]

# GGUF's architecture of a model_type, and of which cases there is a file
ARCHITECTURES = {
    "mixtral": "llama",
    "granite": "granite",
    "granitemoe": "granitemoe",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
    "olmo2": "olmo2",
    "qwen2_moe": "qwen2moe",
    "phi3": "phi3",
    "smollm3": "smollm3",
    "gpt2": "gpt2",
    "stablelm": "stablelm",
    "gpt_neox": "gptneox",
    "falcon": "falcon",
    "mistral": "llama",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
}
INTERLEAVED = ("llama", "granite", "granitemoe", "smollm3")  # which turn neighbours
WITHOUT = {  # what llama.cpp has no field for
    "granite tied with biases",
    "qwen3moe weights not normalised",
    "qwen3moe with dense layers",
    "qwen3moe with every second layer sparse",
    "qwen3moe with num_local_experts",
    "olmoe weights normalised",
    "qwen2moe with dense layers",
    "smollm3",  # whose pattern is another than its code's
    "falcon one after the other",
    "gpt2 with older names",
    *("gpt2 by layers", "gpt2 unscaled"),
    *(f"qwen2 with {what}" for what in ("windows", "layer types")),
    *(f"{name} with {what}" for name, what in (("qwen3", "windows"), ("qwen3moe", "a window"))),
    *("qwen2moe with windows", "smollm3 with windows"),
    *("gemma2", "gemma3", "gemma3 with layer types"),  # scores scaled otherwise than its code does
    "deepseek3 with halves",
}
FILES = [name for name in CASES if name not in WITHOUT and name not in READING_CASES]
NAMES = {
    "model.embed_tokens": "token_embd",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.word_embeddings": "token_embd",
    "gpt_neox.embed_in": "token_embd",
    "model.norm": "output_norm",
    "transformer.ln_f": "output_norm",
    "gpt_neox.final_layer_norm": "output_norm",
    "lm_head": "output",
    "embed_out": "output",
}
INNER = {
    "input_layernorm": "attn_norm",
    "ln_1": "attn_norm",
    "ln_mlp": "attn_norm",
    "ln_attn": "attn_norm_2",
    "post_attention_layernorm": "ffn_norm",
    "ln_2": "ffn_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    **{f"self_attn.{part}_norm": f"attn_{part}_norm" for part in "qk"},
    "self_attn.qkv_proj": "attn_qkv",
    "attn.c_attn": "attn_qkv",
    "attention.query_key_value": "attn_qkv",
    "self_attention.query_key_value": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "attn.c_proj": "attn_output",
    "attention.dense": "attn_output",
    "self_attention.dense": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.router.layer": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    **{f"mlp.shared_experts.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "pre_feedforward_layernorm": "ffn_norm",
}
AFTER = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
EXPERT = re.compile(r"(.*\.layers\.\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight")
EXPERT_PARTS = {"w1": "gate", "w3": "up", "w2": "down", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}
PLACE = re.compile(r"(?:model\.layers|transformer\.h|gpt_neox\.layers)\.(\d+)\.(.*)\.(weight|bias)")


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """A rotary pair's two rows next to each other, as files of the llama kind store q and k."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def apart(rows: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """Rows in groups of query heads with a head of keys and one of values, as all q, all k and all v."""
    grouped = rows.reshape(groups, heads // groups + 2, -1, *rows.shape[1:])
    parts = grouped[:, :-2], grouped[:, -2:-1], grouped[:, -1:]
    return np.concatenate([part.reshape(-1, *rows.shape[1:]) for part in parts])


def converted(name: str, newer: bool = False) -> Arrays:
    """The tensors of a case under GGUF's names and in its forms; newer: what makes keys and values apart."""
    c, found = CASES[name].config, {}
    arrays = {own: tensor.numpy() for own, tensor in tensors_of(name).items()}
    kind, experts = c["model_type"], {}
    heads = c.get("num_attention_heads", c.get("n_head"))
    kv = c.get("num_key_value_heads", heads)
    inner = INNER | (AFTER if kind in ("olmo2", "gemma2", "gemma3_text") else {})
    for own, values in arrays.items():
        expert, place = EXPERT.match(own), PLACE.match(own)
        if kind.startswith("gemma") and "norm" in own:
            values = values + 1
        if own.endswith("e_score_correction_bias"):
            found[f"blk.{own.split('.')[2]}.exp_probs_b.bias"] = values
        elif own.endswith("kv_b_proj.weight") and newer:
            still, value = c["qk_nope_head_dim"], c["v_head_dim"]
            parts = np.split(values.reshape(heads, still + value, -1), [still], axis=1)
            found[f"blk.{own.split('.')[2]}.attn_k_b.weight"] = parts[0].swapaxes(1, 2)
            found[f"blk.{own.split('.')[2]}.attn_v_b.weight"] = parts[1]
        elif expert:
            layer, number, part = expert.groups()
            experts.setdefault((layer.rsplit(".", 1)[1], EXPERT_PARTS[part]), {})[int(number)] = values
        elif place is None:
            found[f"{NAMES[own.rsplit('.', 1)[0]]}.{own.rsplit('.', 1)[1]}"] = values
        elif place[2].endswith("input_linear"):
            for part, half in zip(("gate", "up"), np.split(values, 2, axis=1), strict=True):
                found[f"blk.{place[1]}.ffn_{part}_exps.weight"] = half
        elif place[2].endswith("output_linear"):
            found[f"blk.{place[1]}.ffn_down_exps.weight"] = values
        else:
            gguf_name = inner[place[2]]
            if ARCHITECTURES[kind] in ("llama", "granite", "granitemoe", "smollm3") and gguf_name in (
                "attn_q",
                "attn_k",
            ):
                values = neighbours(values, heads if gguf_name == "attn_q" else kv)
            elif kind in ("gpt_neox", "falcon") and gguf_name == "attn_qkv":
                values = apart(values, heads, groups_of(c))
            elif kind == "gpt2" and values.ndim == 2:
                values = values.T
            elif gguf_name == "ffn_gate_inp_shexp":
                values = values[0]
            found[f"blk.{place[1]}.{gguf_name}.{place[3]}"] = values
    for (layer, part), own in experts.items():
        found[f"blk.{layer}.ffn_{part}_exps.weight"] = np.stack([own[e] for e in sorted(own)])
    return found


def groups_of(c: dict[str, Any]) -> int:
    """Heads of keys and values."""
    if c["model_type"] != "falcon":
        return int(c["num_attention_heads"])
    return int(c["num_kv_heads"]) if c["new_decoder_architecture"] else 1


def family_file(
    name: str,
    out: Path,
    change: Callable[[gguf.GGUFWriter], None] | None = None,
    one_by_one: bool = False,
    newer: bool = False,
) -> Path:
    """A case's checkpoint as a GGUF file of float32 tensors.

    one_by_one: the experts too, as in older files; newer: as newer files have latent attention.
    """
    c = CASES[name].config
    kind = c["model_type"]
    writer = gguf.GGUFWriter(out, ARCHITECTURES[kind])
    heads = c.get("num_attention_heads", c.get("n_head"))
    width = c.get("hidden_size", c.get("n_embd"))
    writer.add_block_count(c.get("num_hidden_layers", c.get("n_layer")))
    writer.add_context_length(c.get("max_position_embeddings", c.get("n_positions")))
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(c.get("intermediate_size", c.get("n_inner", c.get("ffn_hidden_size"))) or 4 * width)
    writer.add_head_count(heads)
    kv_heads = groups_of(c) if kind == "falcon" else c.get("num_key_value_heads", heads)
    writer.add_head_count_kv(1 if newer else kv_heads)
    size = c.get("head_dim", width // heads)
    if "kv_lora_rank" in c:
        size = c["qk_rope_head_dim"]
        add_latent(writer, c, newer)
    elif "head_dim" in c:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if kind != "gpt2":
        writer.add_rope_freq_base(float(c.get("rope_theta", c.get("rotary_emb_base"))))
        share = c.get("partial_rotary_factor", c.get("rotary_pct", 1.0))
        writer.add_rope_dimension_count(int(size * share))
    if "rms_norm_eps" in c:
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    else:
        writer.add_layer_norm_eps(c.get("layer_norm_eps", c.get("layer_norm_epsilon")))
    add_particulars(writer, c, size)
    add_vocabulary(writer)
    if change is not None:
        change(writer)
    for own, values in converted(name, newer).items():
        if one_by_one and "_exps." in own:
            for e, expert in enumerate(values):
                writer.add_tensor(own.replace("_exps.", f".{e}."), np.ascontiguousarray(expert))
        else:
            writer.add_tensor(own, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def add_particulars(writer: gguf.GGUFWriter, c: dict[str, Any], head_dim: int) -> None:
    """What a family says besides the sizes of its frame."""
    experts = c.get("num_local_experts", c.get("num_experts"))
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(c["num_experts_per_tok"])
    if "moe_intermediate_size" in c:
        writer.add_expert_feed_forward_length(c["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in c:
        writer.add_expert_shared_feed_forward_length(c["shared_expert_intermediate_size"])
    if "embedding_multiplier" in c:
        writer.add_embedding_scale(c["embedding_multiplier"])
        writer.add_residual_scale(c["residual_multiplier"])
        writer.add_logit_scale(c["logits_scaling"])
        writer.add_attention_scale(c["attention_multiplier"])
    if c.get("sliding_window"):
        writer.add_sliding_window(c["sliding_window"])
    if "sliding_window_pattern" in c:
        writer.add_uint32("gemma3.attention.sliding_window_pattern", c["sliding_window_pattern"])
        writer.add_float32("gemma3.rope.freq_base_swa", c["rope_local_base_freq"])
    if "attn_logit_softcapping" in c:
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
    if c["model_type"] == "gemma3_text" and "rope_scaling" in c:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(c["rope_scaling"]["factor"])
    if "use_parallel_residual" in c:
        writer.add_parallel_residual(c["use_parallel_residual"])
    if "longrope" in str(c.get("rope_scaling")):
        scaling, original = c["rope_scaling"], c["original_max_position_embeddings"]
        factor = c["max_position_embeddings"] / original
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_attn_factors(float(np.sqrt(1 + np.log(factor) / np.log(original))))
        for kind in ("long", "short"):
            writer.add_tensor(f"rope_factors_{kind}.weight", np.array(scaling[f"{kind}_factor"], dtype=np.float32))


def add_latent(writer: gguf.GGUFWriter, c: dict[str, Any], newer: bool) -> None:
    """What DeepSeek's files say of attention and of experts."""
    at, key = "deepseek2.attention", c["qk_nope_head_dim"] + c["qk_rope_head_dim"]
    latent = c["kv_lora_rank"]
    writer.add_uint32(f"{at}.kv_lora_rank", latent)
    writer.add_key_length(latent + c["qk_rope_head_dim"] if newer else key)
    writer.add_value_length(latent if newer else c["v_head_dim"])
    if newer:
        writer.add_uint32(f"{at}.key_length_mla", key)
        writer.add_uint32(f"{at}.value_length_mla", c["v_head_dim"])
    writer.add_leading_dense_block_count(c["first_k_dense_replace"])
    writer.add_expert_count(c["n_routed_experts"])
    writer.add_expert_used_count(c["num_experts_per_tok"])
    writer.add_expert_shared_count(c["n_shared_experts"])
    writer.add_expert_weights_scale(c["routed_scaling_factor"])
    if c["model_type"] == "deepseek_v3":
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        writer.add_expert_weights_norm(c["norm_topk_prob"])
    if "n_group" in c:
        writer.add_expert_group_count(c["n_group"])
        writer.add_expert_group_used_count(c["topk_group"])
    if "rope_scaling" in c:
        scaling = c["rope_scaling"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
        writer.add_float32("deepseek2.rope.scaling.yarn_log_multiplier", 0.1 * scaling["mscale_all_dim"])


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens = ["<unk>", "<s>", *(f"▁w{i}" for i in range(VOCABULARY - 3)), "</s>"]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(VOCABULARY)])
    writer.add_token_types([2, 3, *[1] * (VOCABULARY - 3), 3])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(VOCABULARY - 1)
    writer.add_unk_token_id(0)
