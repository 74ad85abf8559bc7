"""Llama, and what Mistral and Qwen2 fix in their code and not in their config."""

from __future__ import annotations

from dsc_serve.model.architectures.family import (
    ROTARY,
    Architecture,
    as_stored,
    dense,
    every_layer,
    frame,
    later_layers,
    sizes,
    windowed,
)
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings

LLAMA_DEFAULTS = sizes(32000, 4096, 11008, 32, 32, 2048)
MISTRAL_DEFAULTS = sizes(32000, 4096, 14336, 32, 32, 131072) | {"num_key_value_heads": 8, "sliding_window": 4096}
QWEN2_DEFAULTS = sizes(151936, 4096, 22016, 32, 32, 32768) | {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def llama_fields(s: Settings, positions: Positions = ROTARY) -> Fields:
    bias = s.flag("attention_bias")
    ffn = dense(s, bias=s.flag("mlp_bias"))
    return frame(s, positions) | {"attention_bias": bias, "attention_output_bias": bias, "ffn": ffn}


def mistral(s: Settings) -> Fields:
    return windowed(s, frame(s) | {"ffn": dense(s)}, every_layer(s))


def qwen2(s: Settings) -> Fields:
    return windowed(s, frame(s) | {"attention_bias": True, "ffn": dense(s)}, later_layers(s))


LLAMA = Architecture(llama_fields, as_stored, LLAMA_DEFAULTS)
MISTRAL, QWEN2 = Architecture(mistral, as_stored, MISTRAL_DEFAULTS), Architecture(qwen2, as_stored, QWEN2_DEFAULTS)
