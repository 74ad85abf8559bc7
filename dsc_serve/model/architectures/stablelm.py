"""StableLM 2: LayerNorm, heads of which a part is turned, branches that may lie beside each other under one norm."""

from __future__ import annotations

from dsc_serve.model.architectures.family import Architecture, frame
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings

POSITIONS = Positions(default_share=0.25)


def fields(s: Settings) -> Fields:
    s.only("qk_layernorm", False)
    return frame(s, POSITIONS) | {
        "norm_type": "layernorm",
        "norm_eps": s.get("layer_norm_eps", default=1e-5),
        "norms": "shared" if s.flag("use_parallel_residual") else "before",
        "attention_bias": s.flag("use_qkv_bias"),
    }


STABLELM = Architecture(fields)
