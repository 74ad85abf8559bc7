"""Llama, and what Mistral and Qwen2 fix in their code and not in their config."""

from __future__ import annotations

from dsc_serve.model.architectures.family import ROTARY, Architecture, dense, frame, full_attention
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings


def llama_fields(s: Settings, positions: Positions = ROTARY) -> Fields:
    bias = bool(s.get("attention_bias", default=False))
    ffn = dense(s, bias=s.get("mlp_bias", default=False))
    return frame(s, positions) | {"attention_bias": bias, "attention_output_bias": bias, "ffn": ffn}


def mistral(s: Settings) -> Fields:
    full_attention(s, acts=True, default=4096)
    return frame(s)


def qwen2(s: Settings) -> Fields:
    full_attention(s, acts=bool(s.get("use_sliding_window")))
    return frame(s) | {"attention_bias": True}


LLAMA, MISTRAL, QWEN2 = Architecture(llama_fields), Architecture(mistral), Architecture(qwen2)
