"""Names and shapes of the tensors that a checkpoint of each family stores, as Hugging Face's files have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Shapes = dict[str, tuple[int, ...]]
Config = dict[str, Any]


def linear(name: str, rows: int, columns: int, bias: bool = False) -> Shapes:
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name: str, width: int, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (width,)} | ({f"{name}.bias": (width,)} if bias else {})


def heads_of(c: Config) -> tuple[int, int, int]:
    """Heads, heads of keys and values, and the size of one."""
    heads = c["num_attention_heads"]
    return heads, c.get("num_key_value_heads", heads), c.get("head_dim") or c["hidden_size"] // heads


def attention(at: str, c: Config, qkv_bias: bool = False) -> Shapes:
    """With biases of all projections where `attention_bias` asks for them."""
    (heads, kv, size), d = heads_of(c), c["hidden_size"]
    out_bias = c.get("attention_bias", False)
    shapes: Shapes = {}
    for part, rows in (("q", heads), ("k", kv), ("v", kv)):
        shapes |= linear(f"{at}self_attn.{part}_proj", rows * size, d, qkv_bias or out_bias)
    return shapes | linear(f"{at}self_attn.o_proj", d, heads * size, out_bias)


def gated_mlp(
    at: str, c: Config, size: int, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
) -> Shapes:
    d, bias = c["hidden_size"], c.get("mlp_bias", False)
    gate, up, down = names
    return linear(at + gate, size, d, bias) | linear(at + up, size, d, bias) | linear(at + down, d, size, bias)


def around(c: Config, layers: Shapes, name: str = "model", final_bias: bool = False) -> Shapes:
    """The embedding, the last norm and the head, where it is not the embedding, beside the layers."""
    outer: Shapes = {f"{name}.embed_tokens.weight": (c["vocab_size"], c["hidden_size"])}
    outer |= norm(f"{name}.norm", c["hidden_size"], final_bias)
    if not c["tie_word_embeddings"]:
        outer |= linear("lm_head", c["vocab_size"], c["hidden_size"])
    return outer | layers


def each_layer(
    c: Config, of: Callable[[str, int], Shapes], name: str = "model.layers", count: str = "num_hidden_layers"
) -> Shapes:
    shapes: Shapes = {}
    for i in range(c[count]):
        shapes |= of(f"{name}.{i}.", i)
    return shapes


def two_norms(at: str, c: Config, bias: bool = False) -> Shapes:
    return norm(f"{at}input_layernorm", c["hidden_size"], bias) | norm(
        f"{at}post_attention_layernorm", c["hidden_size"], bias
    )


def llama(c: Config) -> Shapes:
    """Granite, SmolLM3 and Qwen3 too, but for the norms of its heads."""

    def layer(at: str, i: int) -> Shapes:
        return two_norms(at, c) | attention(at, c) | gated_mlp(f"{at}mlp.", c, c["intermediate_size"])

    return around(c, each_layer(c, layer))


def qwen2(c: Config) -> Shapes:
    def biases(at: str, i: int) -> Shapes:
        return attention(at, c, qkv_bias=True)

    return llama(c) | each_layer(c, biases)


def head_norms(at: str, c: Config) -> Shapes:
    size = heads_of(c)[2]
    return norm(f"{at}self_attn.q_norm", size) | norm(f"{at}self_attn.k_norm", size)


def all_heads_norms(at: str, c: Config) -> Shapes:
    heads, kv, size = heads_of(c)
    return norm(f"{at}self_attn.q_norm", heads * size) | norm(f"{at}self_attn.k_norm", kv * size)


def qwen3(c: Config) -> Shapes:
    return llama(c) | each_layer(c, lambda at, i: head_norms(at, c))


def mixtral(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        moe = linear(f"{at}block_sparse_moe.gate", c["num_local_experts"], c["hidden_size"])
        for e in range(c["num_local_experts"]):
            moe |= gated_mlp(f"{at}block_sparse_moe.experts.{e}.", c, c["intermediate_size"], ("w1", "w3", "w2"))
        return two_norms(at, c) | attention(at, c) | moe

    return around(c, each_layer(c, layer))


def granite_moe(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        experts, d, size = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]
        moe: Shapes = {
            f"{at}block_sparse_moe.input_linear.weight": (experts, 2 * size, d),
            f"{at}block_sparse_moe.output_linear.weight": (experts, d, size),
            f"{at}block_sparse_moe.router.layer.weight": (experts, d),
        }
        return two_norms(at, c) | attention(at, c) | moe

    return around(c, each_layer(c, layer))


def experts(at: str, c: Config, size: int) -> Shapes:
    count = c.get("num_experts", c.get("num_local_experts", 0))
    shapes = linear(f"{at}mlp.gate", count, c["hidden_size"])
    for e in range(count):
        shapes |= gated_mlp(f"{at}mlp.experts.{e}.", c, size)
    return shapes


def is_sparse(c: Config, i: int) -> bool:
    return i not in (c.get("mlp_only_layers") or []) and (i + 1) % c.get("decoder_sparse_step", 1) == 0


def qwen_moe_ffn(at: str, c: Config, i: int) -> Shapes:
    if not is_sparse(c, i):
        return gated_mlp(f"{at}mlp.", c, c["intermediate_size"])
    shapes = experts(at, c, c["moe_intermediate_size"])
    if "shared_expert_intermediate_size" in c:
        shapes |= gated_mlp(f"{at}mlp.shared_expert.", c, c["shared_expert_intermediate_size"])
        shapes |= linear(f"{at}mlp.shared_expert_gate", 1, c["hidden_size"])
    return shapes


def qwen3_moe(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        return two_norms(at, c) | attention(at, c) | head_norms(at, c) | qwen_moe_ffn(at, c, i)

    return around(c, each_layer(c, layer))


def qwen2_moe(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        return two_norms(at, c) | attention(at, c, qkv_bias=c.get("qkv_bias", True)) | qwen_moe_ffn(at, c, i)

    return around(c, each_layer(c, layer))


def olmoe(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        own = two_norms(at, c) | attention(at, c) | all_heads_norms(at, c)
        return own | experts(at, c, c["intermediate_size"])

    return around(c, each_layer(c, layer))


def olmo2(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        norms = norm(f"{at}post_attention_layernorm", c["hidden_size"])
        norms |= norm(f"{at}post_feedforward_layernorm", c["hidden_size"])
        own = norms | attention(at, c) | all_heads_norms(at, c)
        return own | gated_mlp(f"{at}mlp.", c, c["intermediate_size"])

    return around(c, each_layer(c, layer))


def phi3(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        (heads, kv, size), d, wide = heads_of(c), c["hidden_size"], c["intermediate_size"]
        own = linear(f"{at}self_attn.qkv_proj", (heads + 2 * kv) * size, d)
        own |= linear(f"{at}self_attn.o_proj", d, heads * size)
        own |= linear(f"{at}mlp.gate_up_proj", 2 * wide, d) | linear(f"{at}mlp.down_proj", d, wide)
        return two_norms(at, c) | own

    return around(c, each_layer(c, layer))


def stablelm(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        (heads, kv, size), d = heads_of(c), c["hidden_size"]
        own = norm(f"{at}input_layernorm", d, bias=True) | attention(at, c, qkv_bias=c["use_qkv_bias"])
        if not c["use_parallel_residual"]:
            own |= norm(f"{at}post_attention_layernorm", d, bias=True)
        if c["qk_layernorm"]:
            for part, count in (("q", heads), ("k", kv)):
                for head in range(count):
                    own |= norm(f"{at}self_attn.{part}_layernorm.norms.{head}", size)
        return own | gated_mlp(f"{at}mlp.", c, c["intermediate_size"])

    return around(c, each_layer(c, layer), final_bias=True)


def gpt2(c: Config) -> Shapes:
    """Products are stored transposed, [in, out]."""
    d, wide = c["n_embd"], c.get("n_inner") or 4 * c["n_embd"]

    def product(name: str, inputs: int, outputs: int) -> Shapes:
        return {f"{name}.weight": (inputs, outputs), f"{name}.bias": (outputs,)}

    def layer(at: str, i: int) -> Shapes:
        own = norm(f"{at}ln_1", d, bias=True) | norm(f"{at}ln_2", d, bias=True)
        own |= product(f"{at}attn.c_attn", d, 3 * d) | product(f"{at}attn.c_proj", d, d)
        return own | product(f"{at}mlp.c_fc", d, wide) | product(f"{at}mlp.c_proj", wide, d)

    outer: Shapes = {"transformer.wte.weight": (c["vocab_size"], d), "transformer.wpe.weight": (c["n_positions"], d)}
    outer |= norm("transformer.ln_f", d, bias=True)
    return outer | each_layer(c, layer, "transformer.h", "n_layer")


def gpt_neox(c: Config) -> Shapes:
    d, wide, bias = c["hidden_size"], c["intermediate_size"], c.get("attention_bias", True)

    def layer(at: str, i: int) -> Shapes:
        own = two_norms(at, c, bias=True)
        own |= linear(f"{at}attention.query_key_value", 3 * d, d, bias) | linear(f"{at}attention.dense", d, d, bias)
        return own | linear(f"{at}mlp.dense_h_to_4h", wide, d, True) | linear(f"{at}mlp.dense_4h_to_h", d, wide, True)

    outer: Shapes = {"gpt_neox.embed_in.weight": (c["vocab_size"], d)}
    outer |= norm("gpt_neox.final_layer_norm", d, bias=True) | linear("embed_out", c["vocab_size"], d)
    return outer | each_layer(c, layer, "gpt_neox.layers")


def falcon(c: Config) -> Shapes:
    d, bias, heads = c["hidden_size"], c["bias"], c["num_attention_heads"]
    new = c["new_decoder_architecture"]
    kv = c["num_kv_heads"] if new else 1 if c["multi_query"] else heads
    wide, size = c.get("ffn_hidden_size") or 4 * d, d // heads

    def layer(at: str, i: int) -> Shapes:
        if new and c.get("num_ln_in_parallel_attn", 2) == 2:
            own = norm(f"{at}ln_attn", d, bias=True) | norm(f"{at}ln_mlp", d, bias=True)
        else:
            own = norm(f"{at}input_layernorm", d, bias=True)
            if not new and not c["parallel_attn"]:
                own |= norm(f"{at}post_attention_layernorm", d, bias=True)
        own |= linear(f"{at}self_attention.query_key_value", (heads + 2 * kv) * size, d, bias)
        own |= linear(f"{at}self_attention.dense", d, d, bias)
        return own | linear(f"{at}mlp.dense_h_to_4h", wide, d, bias) | linear(f"{at}mlp.dense_4h_to_h", d, wide, bias)

    outer: Shapes = {"transformer.word_embeddings.weight": (c["vocab_size"], d)}
    outer |= norm("transformer.ln_f", d, bias=True)
    if not c.get("tie_word_embeddings", True):
        outer |= linear("lm_head", c["vocab_size"], d)
    return outer | each_layer(c, layer, "transformer.h")


def gemma2(c: Config) -> Shapes:
    def layer(at: str, i: int) -> Shapes:
        norms = two_norms(at, c)
        for place in ("pre", "post"):
            norms |= norm(f"{at}{place}_feedforward_layernorm", c["hidden_size"])
        return norms | attention(at, c) | gated_mlp(f"{at}mlp.", c, c["intermediate_size"])

    return around(c, each_layer(c, layer))


def gemma3(c: Config) -> Shapes:
    return gemma2(c) | each_layer(c, lambda at, i: head_norms(at, c))


def deepseek2(c: Config) -> Shapes:
    heads, d, latent = c["num_attention_heads"], c["hidden_size"], c["kv_lora_rank"]
    still, turned, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]

    def layer(at: str, i: int) -> Shapes:
        own = two_norms(at, c) | linear(f"{at}self_attn.q_proj", heads * (still + turned), d)
        own |= linear(f"{at}self_attn.kv_a_proj_with_mqa", latent + turned, d)
        own |= norm(f"{at}self_attn.kv_a_layernorm", latent)
        own |= linear(f"{at}self_attn.kv_b_proj", heads * (still + value), latent)
        own |= linear(f"{at}self_attn.o_proj", d, heads * value)
        if i < c["first_k_dense_replace"]:
            return own | gated_mlp(f"{at}mlp.", c, c["intermediate_size"])
        shared = c["n_shared_experts"] * c["moe_intermediate_size"]
        own |= experts(at, {**c, "num_experts": c["n_routed_experts"]}, c["moe_intermediate_size"])
        return own | gated_mlp(f"{at}mlp.shared_experts.", c, shared)

    return around(c, each_layer(c, layer))


def deepseek3(c: Config) -> Shapes:
    def bias(at: str, i: int) -> Shapes:
        sparse = i >= c["first_k_dense_replace"]
        return {f"{at}mlp.gate.e_score_correction_bias": (c["n_routed_experts"],)} if sparse else {}

    return deepseek2(c) | each_layer(c, bias)


SHAPES: dict[str, Callable[[Config], Shapes]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": qwen2,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "DeepseekV2ForCausalLM": deepseek2,
    "DeepseekV3ForCausalLM": deepseek3,
    "MixtralForCausalLM": mixtral,
    "GraniteForCausalLM": llama,
    "GraniteMoeForCausalLM": granite_moe,
    "Qwen3ForCausalLM": qwen3,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "OlmoeForCausalLM": olmoe,
    "Olmo2ForCausalLM": olmo2,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Phi3ForCausalLM": phi3,
    "SmolLM3ForCausalLM": llama,
    "GPT2LMHeadModel": gpt2,
    "StableLmForCausalLM": stablelm,
    "GPTNeoXForCausalLM": gpt_neox,
    "FalconForCausalLM": falcon,
}
