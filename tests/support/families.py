"""Tiny random checkpoints of every family that is served, and what transformers computes of them.

The expected values lie in tests/data/families, one file for each case: float32 logits of chosen positions of some
prompts, and greedy continuations, with the versions that gave them. They are written again with an interpreter that
has transformers:

    PYTHONPATH=tests python -m support.families PYTHON [CASE ...]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from support.family_case import LINEAR, LLAMA3, VOCABULARY, Case, decoder
from support.family_tensors import SHAPES, Shapes
from support.reading_families import READING_CASES
from support.small_models import DATA
from support.window_families import LATENT_CASES, WINDOW_CASES

EMBEDDINGS = (
    *("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight"),
    *("gpt_neox.embed_in.weight", "transformer.word_embeddings.weight"),
)
EXPECTED = DATA / "families"
NEW_TOKENS = 8
LENGTHS = (1, 11, 43)  # of the prompts; one reaches over every switch and pattern of the cases below
PROMPTS = [[(37 * i * i + 11 * i + 5 + 7 * length) % VOCABULARY for i in range(length)] for length in LENGTHS]


MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "logits_scaling": 0.5,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.2,
}
NO_MULTIPLIER: list[dict[str, Any]] = [{name: 1.0} for name in MULTIPLIERS]
QWEN3_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "head_dim": 16}
QWEN2_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 56,
    "norm_topk_prob": False,
}
SHORT = [1.0, 1.1, 1.25, 1.5, 1.75, 2.0]
LONG = [1.0, 1.5, 3.0, 5.0, 8.0, 12.0]
LONGROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
STABLELM = {
    "rms_norm_eps": None,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "use_qkv_bias": True,
    "qk_layernorm": False,
    "use_parallel_residual": False,
}
GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": VOCABULARY,
    "n_embd": 48,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "n_ctx": 64,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 66,
}
GPT_NEOX = {
    "architectures": ["GPTNeoXForCausalLM"],
    "model_type": "gpt_neox",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "max_position_embeddings": 64,
    "rotary_pct": 0.25,
    "rotary_emb_base": 500,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "use_parallel_residual": True,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 66,
}
FALCON = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "layer_norm_epsilon": 1e-5,
    "max_position_embeddings": 64,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
    "rope_theta": 500.0,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 66,
}

MIXTRAL = decoder("MixtralForCausalLM", "mixtral", num_local_experts=5, num_experts_per_tok=2, sliding_window=None)
GRANITE_MOE = {"num_local_experts": 6, "num_experts_per_tok": 3, **MULTIPLIERS}
QWEN3 = ("Qwen3MoeForCausalLM", "qwen3_moe")
PHI3 = ("Phi3ForCausalLM", "phi3")
OLMOE = {"num_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 24, "num_key_value_heads": 4}
ORIGINAL = {"original_max_position_embeddings": 16}
PARALLEL: list[dict[str, Any]] = [{"use_parallel_residual": False}]

CASES: dict[str, Case] = {
    "mixtral": Case(MIXTRAL, [{"num_experts_per_tok": 1}]),
    "granite": Case(decoder("GraniteForCausalLM", "granite", **MULTIPLIERS), NO_MULTIPLIER),
    "granite tied with biases": Case(
        decoder(
            *("GraniteForCausalLM", "granite"),
            **{**MULTIPLIERS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        ),
        NO_MULTIPLIER,
    ),
    "granitemoe": Case(
        decoder("GraniteMoeForCausalLM", "granitemoe", tie_word_embeddings=True, **GRANITE_MOE),
        [*NO_MULTIPLIER, {"num_experts_per_tok": 2}],
    ),
    "qwen3": Case(decoder("Qwen3ForCausalLM", "qwen3", head_dim=16, tie_word_embeddings=True)),
    "qwen3moe": Case(decoder(*QWEN3, **QWEN3_MOE, norm_topk_prob=True), [{"norm_topk_prob": False}]),
    "qwen3moe weights not normalised": Case(
        decoder(*QWEN3, **QWEN3_MOE, norm_topk_prob=False), [{"norm_topk_prob": True}]
    ),
    "qwen3moe with dense layers": Case(
        decoder(*QWEN3, **QWEN3_MOE, norm_topk_prob=True, mlp_only_layers=[1], intermediate_size=56)
    ),
    "qwen3moe with every second layer sparse": Case(
        decoder(*QWEN3, **QWEN3_MOE, norm_topk_prob=True, decoder_sparse_step=2, num_hidden_layers=4)
    ),
    "qwen3moe with num_local_experts": Case(
        decoder(*QWEN3, **{**QWEN3_MOE, "num_experts": None, "num_local_experts": 8}, norm_topk_prob=True)
    ),
    "olmoe": Case(decoder("OlmoeForCausalLM", "olmoe", **OLMOE, norm_topk_prob=False), [{"norm_topk_prob": True}]),
    "olmoe weights normalised": Case(
        decoder("OlmoeForCausalLM", "olmoe", **{**OLMOE, "num_key_value_heads": 2}, norm_topk_prob=True),
        [{"norm_topk_prob": False}],
    ),
    "olmo2": Case(decoder("Olmo2ForCausalLM", "olmo2")),
    "qwen2moe": Case(
        decoder("Qwen2MoeForCausalLM", "qwen2_moe", **QWEN2_MOE), [{"norm_topk_prob": True}, {"num_experts_per_tok": 3}]
    ),
    "qwen2moe with dense layers": Case(
        decoder("Qwen2MoeForCausalLM", "qwen2_moe", **{**QWEN2_MOE, "norm_topk_prob": True}, mlp_only_layers=[0])
    ),
    "phi3": Case(
        decoder(*PHI3),
        [
            {"rope_theta": 10000.0},
            {"rope_scaling": LINEAR},
            {"rope_scaling": LLAMA3, "original_max_position_embeddings": 8},  # which goes before the one within
            {"partial_rotary_factor": 0.5},
        ],
        seed=1,
    ),
    "phi3 longrope": Case(
        decoder(*PHI3, rope_scaling=LONGROPE, **ORIGINAL),
        [{"rope_scaling": {**LONGROPE, "short_factor": LONG}}, {"rope_scaling": {**LONGROPE, "long_factor": SHORT}}],
    ),
    "phi4 mini": Case(
        decoder(
            *PHI3,
            **ORIGINAL,
            rope_scaling={"type": "longrope", "short_factor": SHORT[:4], "long_factor": LONG[:4]},
            head_dim=None,
            num_attention_heads=4,
            hidden_size=64,
            partial_rotary_factor=0.5,
            tie_word_embeddings=True,
        ),
    ),
    "smollm3": Case(
        decoder(
            "SmolLM3ForCausalLM",
            "smollm3",
            tie_word_embeddings=True,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=False,
        ),
        [{"no_rope_layers": [1, 1, 1]}],
    ),
    "smollm3 by interval": Case(
        decoder("SmolLM3ForCausalLM", "smollm3", no_rope_layer_interval=4, num_hidden_layers=5),
        [{"no_rope_layer_interval": 3}],
    ),
    "gpt2": Case(GPT2),
    "gpt2 by layers": Case(
        {**GPT2, "scale_attn_by_inverse_layer_idx": True},
        [{"scale_attn_by_inverse_layer_idx": False}, {"scale_attn_weights": False}, {"activation_function": "silu"}],
    ),
    "gpt2 unscaled": Case({**GPT2, "scale_attn_weights": False}, [{"scale_attn_weights": True}]),
    "gpt2 with older names": Case({**GPT2, "n_inner": 80}, older_names=True),
    "stablelm": Case(decoder("StableLmForCausalLM", "stablelm", **STABLELM)),
    "stablelm in parallel": Case(
        decoder("StableLmForCausalLM", "stablelm", **{**STABLELM, "use_parallel_residual": True})
    ),
    "gptneox": Case(GPT_NEOX, PARALLEL),
    "gptneox one after the other": Case(
        {**GPT_NEOX, "use_parallel_residual": False, "rotary_pct": 1.0}, [{"use_parallel_residual": True}]
    ),
    "falcon": Case(FALCON),
    "falcon one after the other": Case({**FALCON, "parallel_attn": False, "multi_query": False, "bias": True}),
    "falcon new": Case({**FALCON, "num_attention_heads": 6, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon new with one norm": Case(
        {
            **FALCON,
            "num_attention_heads": 6,
            "num_kv_heads": 3,
            "new_decoder_architecture": True,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "ffn_hidden_size": 80,
        },
    ),
    **WINDOW_CASES,
    **LATENT_CASES,
    **READING_CASES,
}


def shapes_of(case: Case) -> Shapes:
    return SHAPES[case.config["architectures"][0]](case.config)


def tensors_of(name: str) -> dict[str, Tensor]:
    """Random weights wide enough that every part of the model matters to its output."""
    case, tensors = CASES[name], {}
    random = np.random.RandomState(sum(name.encode()) + case.seed)
    transposed = case.config["model_type"] == "gpt2"
    tied = case.config.get("tie_word_embeddings", True)
    for own, shape in sorted(shapes_of(case).items()):
        values = random.standard_normal(shape)
        if len(shape) == 1:
            values = 0.3 * values + ("norm" in own or ".ln_" in own) * own.endswith("weight")
        elif tied or own not in EMBEDDINGS:
            # where the head is the embedding, a large one would have every token followed by itself
            values /= (shape[-2] if transposed and own not in EMBEDDINGS else shape[-1]) ** 0.5
        tensors[own] = torch.from_numpy(values.astype(np.float32))
    return tensors


def stored_tensors(name: str) -> dict[str, Tensor]:
    """The tensors under the names that the checkpoint stores."""
    tensors, config = tensors_of(name), CASES[name].config
    if not CASES[name].older_names:
        return tensors
    tensors = {own.removeprefix("transformer."): tensor for own, tensor in tensors.items()}
    for i in range(config["n_layer"]):  # buffers, which are no weights
        tensors[f"h.{i}.attn.bias"] = torch.ones(config["n_ctx"], config["n_ctx"]).tril()[None, None]
        tensors[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return tensors


def family_folder(name: str, out: Path, **changes: Any) -> Path:
    """A case's checkpoint as a folder; changes: of its config, None leaves a field out."""
    out.mkdir(parents=True, exist_ok=True)
    dropped = {key for key, value in changes.items() if value is None}
    dropped |= set(CASES[name].left_out) - changes.keys()
    content = {key: value for key, value in {**CASES[name].config, **changes}.items() if key not in dropped}
    (out / "config.json").write_text(json.dumps(content))
    save_file(stored_tensors(name), out / "model.safetensors", metadata={"format": "pt"})
    return out


def chosen(length: int) -> list[int]:
    """The positions of a prompt whose logits are stored."""
    return sorted({0, length // 3, length // 2, length - 2, length - 1} & set(range(length)))


@dataclass(frozen=True)
class Expected:
    """What a model says of each prompt."""

    logits: list[Tensor]  # float32 [positions, vocabulary], of `chosen`
    greedy: list[list[int]]  # the tokens that follow it greedily


def expected(name: str) -> Expected:
    with safe_open(EXPECTED / f"{file_name(name)}.safetensors", "pt") as file:
        parts = [(file.get_tensor(f"logits.{i}"), file.get_tensor(f"greedy.{i}")) for i in range(len(PROMPTS))]
    return Expected([logits for logits, _ in parts], [greedy.tolist() for _, greedy in parts])


def file_name(name: str) -> str:
    return name.replace(" ", "_")


TRANSFORMERS = """
import json, sys, torch, transformers
from safetensors.torch import save_file
prompts, chosen, count = json.loads(sys.argv[2])
versions = {"transformers": transformers.__version__, "torch": torch.__version__}
for folder, out in json.loads(sys.argv[1]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    unknown = [name for name in info["unexpected_keys"] if not name.endswith(".attn.masked_bias")]
    assert not any((unknown, info["missing_keys"], info["mismatched_keys"])), (folder, info)
    found, margin = {}, 1e9
    with torch.no_grad():
        for i, prompt in enumerate(prompts):
            logits = model(torch.tensor([prompt]), use_cache=False).logits[0]
            found[f"logits.{i}"] = logits[chosen[i]].clone()
            tokens = list(prompt)
            for _ in range(count):  # without a cache: what longrope rotated otherwise is computed again
                last = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
                top = last.topk(2).values
                margin = min(margin, float(top[0] - top[1]))
                tokens.append(int(last.argmax()))
            found[f"greedy.{i}"] = torch.tensor(tokens[len(prompt):])
    assert margin > 1e-3, (folder, margin, "another seed, please")
    save_file(found, out, metadata=versions)
    print(out.rsplit("/")[-1], "smallest margin", round(margin, 4), "spread", round(float(logits.std()), 3))
"""


def main(interpreter: str, *names: str) -> None:
    EXPECTED.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            (str(family_folder(name, Path(folder) / file_name(name))), str(EXPECTED / f"{file_name(name)}.safetensors"))
            for name in names or CASES
        ]
        prompts = [PROMPTS, [chosen(len(prompt)) for prompt in PROMPTS], NEW_TOKENS]
        subprocess.run([interpreter, "-c", TRANSFORMERS, json.dumps(asked), json.dumps(prompts)], check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
