"""Cases of families whose tokens see a window, whose norms are around branches, or whose keys are latent.

Windows of 4 tokens, of which the longest prompt is more than ten long.
"""

from __future__ import annotations

from typing import Any

from support.family_case import Case, decoder

QWEN2 = ("Qwen2ForCausalLM", "qwen2")
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
WIDER = [{"sliding_window": 5}, {"sliding_window": 40}]
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA: dict[str, Any] = {
    "head_dim": 16,
    "query_pre_attn_scalar": 10,
    "sliding_window": 4,
    "num_hidden_layers": 4,
    "hidden_act": None,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
}
GEMMA2 = {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0, "cache_implementation": "hybrid"}
# What llama.cpp has in its code: scores scaled by a head's size, and the local base.
AS_FILES = {"query_pre_attn_scalar": 16}
GEMMA3 = {**GEMMA, "rope_local_base_freq": 20.0, "num_hidden_layers": 5, "sliding_window_pattern": 3}
KINDS = ["sliding_attention", "full_attention"]
NESTED = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 900.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 30.0},
}
SCALE: list[dict[str, Any]] = [{"query_pre_attn_scalar": 16}]

WINDOW_CASES: dict[str, Case] = {
    "mistral with a window": Case(decoder("MistralForCausalLM", "mistral", sliding_window=4), WIDER),
    "mixtral with a window": Case(
        decoder("MixtralForCausalLM", "mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=4), WIDER
    ),
    "qwen2 with windows": Case(decoder(*QWEN2, **SLIDING, max_window_layers=1), [*WIDER, {"max_window_layers": 2}]),
    "qwen2 with layer types": Case(
        decoder(*QWEN2, **SLIDING, layer_types=[KINDS[0], KINDS[1], KINDS[0]]), [{"layer_types": KINDS[:1] * 3}]
    ),
    "qwen3 with windows": Case(
        decoder("Qwen3ForCausalLM", "qwen3", head_dim=16, **SLIDING, max_window_layers=2), [{"max_window_layers": 0}]
    ),
    "qwen3moe with a window": Case(
        decoder("Qwen3MoeForCausalLM", "qwen3_moe", head_dim=16, **SLIDING, **EXPERTS, norm_topk_prob=True), WIDER
    ),
    "qwen2moe with windows": Case(
        decoder(
            *("Qwen2MoeForCausalLM", "qwen2_moe"),
            **{**SLIDING, **EXPERTS, "shared_expert_intermediate_size": 56, "norm_topk_prob": False},
        ),
        WIDER,
    ),
    "phi3 with a window": Case(decoder("Phi3ForCausalLM", "phi3", sliding_window=4), WIDER, seed=2),
    "smollm3 with windows": Case(
        decoder("SmolLM3ForCausalLM", "smollm3", **SLIDING, no_rope_layers=[1, 0, 1], tie_word_embeddings=True), WIDER
    ),
    "gemma2": Case(
        decoder("Gemma2ForCausalLM", "gemma2", **GEMMA2),
        [
            *WIDER,
            *SCALE,
            {"attn_logit_softcapping": 1.0},
            {"attn_logit_softcapping": 50.0},
            {"final_logit_softcapping": 5.0},
            {"layer_types": KINDS[::-1] * 2},
            {"rope_theta": 10000.0},
        ],
    ),
    "gemma3": Case(
        decoder("Gemma3ForCausalLM", "gemma3_text", **GEMMA3),
        [*WIDER, *SCALE, {"rope_theta": 10000.0}, {"rope_local_base_freq": 10000.0}, {"sliding_window_pattern": 2}],
        seed=1,
    ),
    "gemma2 by head size": Case(
        decoder("Gemma2ForCausalLM", "gemma2", **{**GEMMA2, **AS_FILES}),
        [{"query_pre_attn_scalar": 10}],
    ),
    "gemma3 stretched": Case(
        decoder(
            "Gemma3ForCausalLM",
            "gemma3_text",
            **{**GEMMA3, **AS_FILES},
            rope_scaling={"rope_type": "linear", "factor": 8.0},
        ),
        [{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, {"rope_scaling": {"rope_type": "default"}}],
    ),
    "gemma3 with layer types": Case(
        decoder(
            *("Gemma3ForCausalLM", "gemma3_text"),
            **{**GEMMA, "rope_theta": None, "rope_parameters": NESTED, "layer_types": [*KINDS, *KINDS]},
        ),
        [{"rope_parameters": {**NESTED, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}}],
        seed=1,
    ),
}

DEEPSEEK: dict[str, Any] = {
    "q_lora_rank": None,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
LITE = {**DEEPSEEK, "topk_method": "greedy", "norm_topk_prob": False, "routed_scaling_factor": 1.0}
GROUPS = {"n_group": 4, "topk_group": 2}
V2, V3 = ("DeepseekV2ForCausalLM", "deepseek_v2"), ("DeepseekV3ForCausalLM", "deepseek_v3")
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}

LATENT_CASES: dict[str, Case] = {
    "deepseek2": Case(
        decoder(*V2, **LITE) | {"q_lora_rank": None},
        [{"num_experts_per_tok": 2}, {"routed_scaling_factor": 2.0}, {"rope_theta": 10000.0}],
    ),
    "deepseek2 stretched": Case(
        decoder(*V2, **LITE, rope_scaling=YARN) | {"q_lora_rank": None},
        [{"rope_scaling": {**YARN, "mscale": 1.0}}, {"rope_scaling": {**YARN, "mscale_all_dim": 1.0}}],
    ),
    "deepseek2 by groups": Case(
        decoder(*V2, **{**LITE, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0}, **GROUPS)
        | {"q_lora_rank": None},
        [{"topk_group": 3}, {"n_group": 2}, {"topk_method": "greedy"}],
        seed=1,
    ),
    "deepseek3": Case(
        decoder(*V3, **DEEPSEEK, **GROUPS, norm_topk_prob=True, routed_scaling_factor=2.5, num_nextn_predict_layers=0)
        | {"q_lora_rank": None},
        [{"norm_topk_prob": False}, {"routed_scaling_factor": 1.0}, {"topk_group": 4}, {"n_group": 2}],
    ),
    "deepseek3 with halves": Case(
        decoder(
            *V3,
            **{**DEEPSEEK, "n_shared_experts": 1},
            norm_topk_prob=False,
            n_group=1,
            topk_group=1,
            rope_interleave=False,
            num_nextn_predict_layers=0,
        )
        | {"q_lora_rank": None},
        [{"rope_interleave": True}, {"norm_topk_prob": True}],
    ),
}
