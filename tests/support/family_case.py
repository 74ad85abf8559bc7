"""What a case of a family is: the config of a tiny checkpoint, and the changes of it that must be felt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

VOCABULARY = 67
LINEAR = {"type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@dataclass(frozen=True)
class Case:
    """A checkpoint of a family."""

    config: dict[str, Any]
    # changes of its config, each of which changes the logits: what was read and not used would show
    features: list[dict[str, Any]] = field(default_factory=list)
    seed: int = 0  # one more where two tokens were too near to each other
    older_names: bool = False  # as the first files of GPT-2 have them
    # Fields of its config that the checkpoint does not write, since they are what the family has without them
    left_out: tuple[str, ...] = ()


def decoder(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    """A config of the Llama form; a change of None leaves the field out."""
    content = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 66,
        **changes,
    }
    return {name: value for name, value in content.items() if value is not None}
