"""Cases of what a config may say besides the commonest, and of what it may leave out: biases, activations, rotary
scalings under both names, and the defaults of each family.
"""

from __future__ import annotations

from typing import Any

from support.family_case import DYNAMIC, LINEAR, LLAMA3, VOCABULARY, YARN, Case, decoder

SHORT = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0]
LONG = [1.0, 1.5, 3.0, 5.0, 8.0, 12.0]
BIASES = {"attention_bias": True}
SILU: list[dict[str, Any]] = [{"hidden_act": "silu"}]
# What a family's config need not say: the activation, a norm's number, whether the head is the embedding, the base.
PLAIN = ("hidden_act", "rms_norm_eps", "tie_word_embeddings", "rope_theta")
EIGHT = {"num_attention_heads": 16, "num_key_value_heads": 8, "hidden_size": 64}
QWEN3_EXPERTS = {"num_experts": 10, "num_experts_per_tok": 8, "moe_intermediate_size": 24}
QWEN2_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 56,
}
PHI3 = {"num_key_value_heads": 4, "rope_theta": 10000.0}
# As the family's first files have it; 4,096 positions of the first training, whatever stands within.
OLDER = {"type": "yarn", "short_factor": SHORT, "long_factor": LONG, "original_max_position_embeddings": 16}
WITHIN = {
    "rope_type": "longrope",
    "short_factor": SHORT[:3],
    "long_factor": LONG[:3],
    "rope_theta": 700.0,
    "partial_rotary_factor": 0.5,
}
STABLELM = {
    "rms_norm_eps": None,
    "layer_norm_eps": 1e-5,
    "use_qkv_bias": False,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}
NEOX_ROPE = {"rope_type": "linear", "factor": 4.0, "rope_theta": 700.0, "partial_rotary_factor": 0.5}
FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
    "max_position_embeddings": 64,
    "bias": True,
    "new_decoder_architecture": True,
    "activation": "gelu_pytorch_tanh",
    "rope_theta": 500.0,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 66,
}


def beside(scaling: dict[str, Any]) -> list[dict[str, Any]]:
    """Changes of a scaling that must be felt: twice its factor, and none."""
    return [{"rope_scaling": {**scaling, "factor": 2 * scaling["factor"]}}, {"rope_scaling": {"rope_type": "default"}}]


def within(scaling: dict[str, Any], theta: float = 700.0) -> dict[str, Any]:
    """The same as newer configs write it."""
    return {"rope_theta": None, "rope_parameters": {**scaling, "rope_theta": theta}}


def changed_within(scaling: dict[str, Any]) -> list[dict[str, Any]]:
    changes = ({**scaling, "factor": 2 * scaling["factor"], "rope_theta": 700.0}, {**scaling, "rope_theta": 300.0})
    return [{"rope_parameters": change} for change in changes]


READING_CASES: dict[str, Case] = {
    "llama with biases": Case(
        decoder(
            *("LlamaForCausalLM", "llama"), **{**BIASES, "mlp_bias": True, "hidden_act": "gelu"}, rope_scaling=LINEAR
        ),
        [*SILU, *beside(LINEAR)],
    ),
    "llama by its defaults": Case(
        decoder("LlamaForCausalLM", "llama", num_key_value_heads=4, rms_norm_eps=1e-6, rope_theta=10000.0),
        [{"rope_theta": 100.0}],
        left_out=(*PLAIN, "num_key_value_heads"),
        seed=1,
    ),
    "mistral by its defaults": Case(
        decoder("MistralForCausalLM", "mistral", **EIGHT, rms_norm_eps=1e-6, rope_theta=10000.0),
        [{"sliding_window": 4}, {"rope_theta": 100.0}],
        left_out=(*PLAIN, "num_key_value_heads"),
    ),
    "qwen2 stretched": Case(decoder("Qwen2ForCausalLM", "qwen2", rope_scaling=YARN), beside(YARN), seed=1),
    "mixtral by its defaults": Case(
        decoder(
            *("MixtralForCausalLM", "mixtral"),
            **{**EIGHT, "num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1e6},
        ),
        [{"rope_theta": 100.0}, {"num_experts_per_tok": 1}],
        left_out=(*PLAIN, "num_key_value_heads", "num_local_experts", "num_experts_per_tok"),
    ),
    "mixtral stretched": Case(
        decoder(
            *("MixtralForCausalLM", "mixtral"),
            **{"num_local_experts": 5, "num_experts_per_tok": 2, "head_dim": 12, "hidden_act": "gelu", **within(YARN)},
        ),
        [*SILU, *changed_within(YARN)],
    ),
    "granite stretched": Case(
        decoder("GraniteForCausalLM", "granite", **{"hidden_act": "gelu_pytorch_tanh", **within(LLAMA3)}),
        [*SILU, *changed_within(LLAMA3)],
    ),
    "granitemoe with biases": Case(
        decoder(
            *("GraniteMoeForCausalLM", "granitemoe"),
            **{**BIASES, "num_local_experts": 6, "num_experts_per_tok": 2, "rope_scaling": LINEAR},
        ),
        beside(LINEAR),
        left_out=("num_experts_per_tok",),
    ),
    "qwen3 with biases": Case(
        decoder(
            *("Qwen3ForCausalLM", "qwen3"), **{**BIASES, "head_dim": 16, "hidden_act": "gelu", "rope_scaling": YARN}
        ),
        [*SILU, *beside(YARN)],
    ),
    "qwen3 dynamic": Case(
        decoder("Qwen3ForCausalLM", "qwen3", head_dim=128, rope_scaling=DYNAMIC), left_out=("head_dim",)
    ),
    "qwen3moe with biases": Case(
        decoder(
            *("Qwen3MoeForCausalLM", "qwen3_moe"),
            **{**BIASES, **QWEN3_EXPERTS, "norm_topk_prob": True, "hidden_act": "gelu", **within(LLAMA3)},
        ),
        [*SILU, *changed_within(LLAMA3)],
    ),
    "qwen3moe by its defaults": Case(
        decoder(
            *("Qwen3MoeForCausalLM", "qwen3_moe"),
            **{**QWEN3_EXPERTS, "num_attention_heads": 8, "num_key_value_heads": 4},
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
        ),
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
        left_out=(*PLAIN, "num_key_value_heads", "num_experts_per_tok"),
    ),
    "olmoe with biases": Case(
        decoder(
            *("OlmoeForCausalLM", "olmoe"),
            **{**BIASES, "num_experts": 9, "num_experts_per_tok": 8, "num_key_value_heads": 4, "rope_scaling": YARN},
        ),
        [{"hidden_act": "gelu"}, *beside(YARN)],
        left_out=("num_experts_per_tok", "num_key_value_heads", "hidden_act", "rms_norm_eps"),
    ),
    "olmo2 with biases": Case(
        decoder("Olmo2ForCausalLM", "olmo2", **{**BIASES, "hidden_act": "gelu", **within(LINEAR)}),
        [*SILU, *changed_within(LINEAR)],
        left_out=("rms_norm_eps",),
    ),
    "qwen2moe without biases": Case(
        decoder(
            *("Qwen2MoeForCausalLM", "qwen2_moe"),
            **{**QWEN2_EXPERTS, "qkv_bias": False, "hidden_act": "gelu", "rope_scaling": LINEAR},
        ),
        [*SILU, *beside(LINEAR)],
        seed=1,
    ),
    "qwen2moe by its defaults": Case(
        decoder(
            *("Qwen2MoeForCausalLM", "qwen2_moe"),
            **{**QWEN2_EXPERTS, "num_attention_heads": 32, "num_key_value_heads": 16, "hidden_size": 64},
            rms_norm_eps=1e-6,
            rope_theta=10000.0,
        ),
        [{"norm_topk_prob": True}, {"num_experts_per_tok": 2}],
        left_out=(*PLAIN, "num_key_value_heads", "num_experts_per_tok"),
    ),
    "phi3 with older names": Case(
        decoder("Phi3ForCausalLM", "phi3", **PHI3, rope_scaling={**OLDER, "factor": 8.0}),
        [
            {"rope_scaling": OLDER},
            {"rope_scaling": {**OLDER, "factor": 4096.0}},
            {"rope_scaling": {**OLDER, "attention_factor": 1.5}},
            {"rope_scaling": {**OLDER, "factor": 8.0, "short_factor": LONG}},
            {"hidden_act": "gelu"},
        ],
        left_out=(*PLAIN, "num_key_value_heads"),
    ),
    "phi3 from 4096 on": Case(
        decoder("Phi3ForCausalLM", "phi3", max_position_embeddings=65536, **within(WITHIN)),
        [
            {"rope_parameters": {**WITHIN, "short_factor": LONG[:3]}},
            {"rope_parameters": {**WITHIN, "rope_theta": 90.0}},
            {"original_max_position_embeddings": 65536},
        ],
        seed=1,
    ),
    "smollm3 with biases": Case(
        decoder(
            *("SmolLM3ForCausalLM", "smollm3"),
            **{**BIASES, "mlp_bias": True, "hidden_act": "gelu", "no_rope_layers": [1, 0, 1], "rope_scaling": YARN},
        ),
        [*SILU, *beside(YARN)],
    ),
    "smollm3 by its defaults": Case(
        decoder(
            *("SmolLM3ForCausalLM", "smollm3"),
            num_attention_heads=8,
            num_key_value_heads=4,
            no_rope_layers=[1, 0, 1, 0, 0, 0],
            tie_word_embeddings=True,
            rms_norm_eps=1e-6,
            rope_theta=2e6,
        ),
        [{"no_rope_layers": [0, 1, 1, 0, 0, 0]}, {"rope_theta": 100.0}],
        left_out=(*PLAIN, "num_key_value_heads"),
    ),
    "stablelm without biases": Case(
        decoder("StableLmForCausalLM", "stablelm", **STABLELM, hidden_act="gelu", rope_scaling=LINEAR, head_dim=None)
        | {"num_attention_heads": 2, "partial_rotary_factor": 0.25},
        [*SILU, *beside(LINEAR), {"partial_rotary_factor": 0.5}],
        left_out=("partial_rotary_factor", "use_qkv_bias", "qk_layernorm", "use_parallel_residual", "layer_norm_eps"),
    ),
    "stablelm by its defaults": Case(
        decoder(
            *("StableLmForCausalLM", "stablelm"),
            **{**STABLELM, "num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 256},
            rope_theta=10000.0,
        ),
        [{"rope_scaling": LINEAR}, {"partial_rotary_factor": 0.5}],
        left_out=("num_key_value_heads", "rope_theta", "hidden_act", "tie_word_embeddings"),
        seed=1,
    ),
    "gptneox without biases": Case(
        decoder(
            *("GPTNeoXForCausalLM", "gpt_neox"),
            num_key_value_heads=None,
            rms_norm_eps=None,
            rope_theta=None,
            attention_bias=False,
            hidden_act="gelu_new",
            rope_parameters=NEOX_ROPE,
        ),
        [
            *SILU,
            {"rope_parameters": {**NEOX_ROPE, "factor": 8.0}},
            {"rope_parameters": {**NEOX_ROPE, "partial_rotary_factor": 1.0}},
        ],
    ),
    "falcon with biases": Case(
        FALCON | {"rope_scaling": LLAMA3},
        [{"activation": "silu"}, {"rope_scaling": {**LLAMA3, "factor": 2.0}}],
    ),
    "gemma2 with biases": Case(
        decoder(
            *("Gemma2ForCausalLM", "gemma2"),
            **{**BIASES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "hidden_act": None},
            hidden_activation="silu",
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            tie_word_embeddings=True,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
        ),
        [{"hidden_activation": "gelu"}, {"final_logit_softcapping": 5.0}, {"query_pre_attn_scalar": 16}],
        left_out=(
            *("num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping", "tie_word_embeddings"),
            *("query_pre_attn_scalar", "rms_norm_eps"),
        ),
    ),
    "gemma3 with biases": Case(
        decoder(
            *("Gemma3ForCausalLM", "gemma3_text"),
            **{**BIASES, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16, "hidden_act": None},
            hidden_activation="silu",
            sliding_window=4,
            sliding_window_pattern=6,
            num_hidden_layers=7,
            tie_word_embeddings=True,
            query_pre_attn_scalar=256,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
        ),
        [{"hidden_activation": "gelu"}, {"sliding_window_pattern": 2}, {"rope_local_base_freq": 100.0}],
        left_out=(
            *("num_key_value_heads", "tie_word_embeddings", "query_pre_attn_scalar", "rms_norm_eps", "rope_theta"),
            "sliding_window_pattern",
        ),
    ),
}
