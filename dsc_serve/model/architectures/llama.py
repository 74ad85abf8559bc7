"""Llama, and what Mistral and Qwen2 fix in their code and not in their config."""

from __future__ import annotations

from dsc_serve.model.architectures.family import ROTARY, Architecture, dense, every_layer, frame, later_layers, windowed
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings


def llama_fields(s: Settings, positions: Positions = ROTARY) -> Fields:
    bias = bool(s.get("attention_bias", default=False))
    ffn = dense(s, bias=s.get("mlp_bias", default=False))
    return frame(s, positions) | {"attention_bias": bias, "attention_output_bias": bias, "ffn": ffn}


def mistral(s: Settings) -> Fields:
    return windowed(s, frame(s), every_layer(s), default=4096)


def qwen2(s: Settings) -> Fields:
    return windowed(s, frame(s) | {"attention_bias": True}, later_layers(s), default=4096)


LLAMA, MISTRAL, QWEN2 = Architecture(llama_fields), Architecture(mistral), Architecture(qwen2)
