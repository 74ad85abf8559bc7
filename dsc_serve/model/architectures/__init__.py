"""The families of checkpoints: a registry with one file per family, by the names that their `config.json` gives."""

from __future__ import annotations

from dsc_serve.model.architectures.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from dsc_serve.model.architectures.falcon import FALCON
from dsc_serve.model.architectures.family import Architecture
from dsc_serve.model.architectures.gemma import GEMMA2, GEMMA3
from dsc_serve.model.architectures.gpt2 import GPT2
from dsc_serve.model.architectures.gpt_neox import GPT_NEOX
from dsc_serve.model.architectures.granite import GRANITE, GRANITE_MOE
from dsc_serve.model.architectures.llama import LLAMA, MISTRAL, QWEN2
from dsc_serve.model.architectures.mixtral import MIXTRAL
from dsc_serve.model.architectures.olmo import OLMO2, OLMOE
from dsc_serve.model.architectures.phi3 import PHI3
from dsc_serve.model.architectures.qwen2_moe import QWEN2_MOE
from dsc_serve.model.architectures.qwen3 import QWEN3, QWEN3_MOE
from dsc_serve.model.architectures.settings import Settings
from dsc_serve.model.architectures.smollm3 import SMOLLM3
from dsc_serve.model.architectures.stablelm import STABLELM
from dsc_serve.model.config import CheckpointError

__all__ = ["ARCHITECTURES", "Architecture", "Settings", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    "DeepseekV2ForCausalLM": DEEPSEEK_V2,
    "DeepseekV3ForCausalLM": DEEPSEEK_V3,
    "FalconForCausalLM": FALCON,
    "GPT2LMHeadModel": GPT2,
    "GPTNeoXForCausalLM": GPT_NEOX,
    "Gemma2ForCausalLM": GEMMA2,
    "Gemma3ForCausalLM": GEMMA3,
    "GraniteForCausalLM": GRANITE,
    "GraniteMoeForCausalLM": GRANITE_MOE,
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Olmo2ForCausalLM": OLMO2,
    "OlmoeForCausalLM": OLMOE,
    "Phi3ForCausalLM": PHI3,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen2MoeForCausalLM": QWEN2_MOE,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
    "SmolLM3ForCausalLM": SMOLLM3,
    "StableLmForCausalLM": STABLELM,
}


def architecture_of(settings: Settings) -> Architecture:
    """The family that a configuration names. Raises CheckpointError naming those that are supported."""
    names = settings.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    found = ARCHITECTURES.get(name) if isinstance(name, str) else None
    if found is None:
        supported = ", ".join(ARCHITECTURES)
        raise CheckpointError(f"{settings.path}: architecture {name!r} is not supported; supported: {supported}")
    return found
