"""StableLM 2: LayerNorm, heads of which a part is turned, branches that may lie beside each other under one norm."""

from __future__ import annotations

from dsc_serve.model.architectures.family import Architecture, as_stored, dense, frame, share_of_width, sizes
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings

POSITIONS = Positions(partial=True)
DEFAULTS = sizes(50304, 2560, 6912, 32, 32, 4096, eps=1e-5, norm="layer_norm_eps") | {
    "num_key_value_heads": 32,
    "partial_rotary_factor": 0.25,
}


def fields(s: Settings) -> Fields:
    s.only("qk_layernorm", False)
    return frame(s, POSITIONS, "layer_norm_eps") | {
        "head_dim": share_of_width(s),
        "norm_type": "layernorm",
        "norms": "shared" if s.flag("use_parallel_residual") else "before",
        "attention_bias": s.flag("use_qkv_bias"),
        "ffn": dense(s),
    }


STABLELM = Architecture(fields, as_stored, DEFAULTS)
