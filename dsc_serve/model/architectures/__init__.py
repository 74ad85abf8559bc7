"""The families of checkpoints: a registry with one file per family, by the names that their `config.json` gives."""

from __future__ import annotations

from dsc_serve.model.architectures.family import Architecture
from dsc_serve.model.architectures.llama import LLAMA, MISTRAL, QWEN2
from dsc_serve.model.architectures.mixtral import MIXTRAL
from dsc_serve.model.architectures.qwen3 import QWEN3, QWEN3_MOE
from dsc_serve.model.architectures.settings import Settings
from dsc_serve.model.config import CheckpointError

__all__ = ["ARCHITECTURES", "Architecture", "Settings", "architecture_of"]

ARCHITECTURES: dict[str, Architecture] = {
    "LlamaForCausalLM": LLAMA,
    "MistralForCausalLM": MISTRAL,
    "MixtralForCausalLM": MIXTRAL,
    "Qwen2ForCausalLM": QWEN2,
    "Qwen3ForCausalLM": QWEN3,
    "Qwen3MoeForCausalLM": QWEN3_MOE,
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
