"""DeepSeek-V2 and V3: latent attention, dense layers before mixtures, experts that all tokens share, picked by groups.

Keys and values are products of one vector of a token, which alone is cached, with its turned part before it. What makes
keys of it goes into the queries' projection, what makes values into the one behind attention: all heads then attend to
the same key, whose last numbers are the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dsc_serve.files import CheckpointError
from dsc_serve.model.architectures.experts import STACKED, mixture, unstacked
from dsc_serve.model.architectures.family import LLAMA_MODULES, Architecture, by_layer, dense, frame, sizes
from dsc_serve.model.architectures.positions import kind_name, kind_of, written
from dsc_serve.model.architectures.settings import Fields, Settings
from dsc_serve.model.architectures.tensors import Tensors, renamed, without
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.field_value import FieldValue
from dsc_serve.model.source import Stored

NAMES = {
    r"\.mlp\.gate\.e_score_correction_bias$": ".mlp.router.choice_bias",
    r"\.mlp\.gate\.": ".mlp.router.",
    r"\.mlp\.shared_experts\.": ".mlp.shared_expert.",
}
# Attention's are none: each projection that is computed has become a product of two that are stored.
MODULES = {
    **{name: below for name, below in LLAMA_MODULES.items() if ".mlp." in name},
    **{
        f"model.layers.{{}}.mlp.shared_experts.{part}_proj": (f"mlp.shared_expert.{part}_proj",)
        for part in ("gate", "up", "down")
    },
}
METHODS = {"greedy": False, "group_limited_greedy": True}
MOST_PREDICTING = 64  # layers behind the last
LARGEST_MAGNITUDE = 1000.0
LATENT = {
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "rope_interleave": True,
}
V2_DEFAULTS = sizes(102400, 4096, 11008, 32, 32, 2048) | {
    **LATENT,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "moe_intermediate_size": 1407,
    "routed_scaling_factor": 1.0,
    "topk_method": "greedy",
}
V3_DEFAULTS = sizes(129280, 7168, 18432, 61, 128, 4096) | {
    **LATENT,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "first_k_dense_replace": 3,
    "routed_scaling_factor": 2.5,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "num_key_value_heads": 128,
    "num_mtp_layers": 1,
}


@dataclass(frozen=True)
class Sizes:
    """Of a head what is not turned and what is, of its value, and what keys and values are made of."""

    still: int
    turned: int
    value: int
    latent: int

    @classmethod
    def of(cls, s: Settings) -> Sizes:
        names = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "kv_lora_rank")
        return cls(*(s.size(name) for name in names))


def attention(s: Settings) -> Fields:
    """Raises CheckpointError."""
    s.only("q_lora_rank", supported="null: queries projected at once, as in V2-Lite")
    s.only("attention_bias", False)
    s.only("mlp_bias", False)
    size = Sizes.of(s)
    whole = size.latent + size.turned
    fields = frame(s.changed(head_dim=whole, num_key_value_heads=1))
    if fields["rope_scaling"] is not None:
        magnified(written(s))
        score_scale(s)
    return fields | {
        "head_dim": FieldValue(whole, f"{s.told('kv_lora_rank')} + {s.told('qk_rope_head_dim')}"),
        "rotary_dim": s.read("qk_rope_head_dim"),
        "num_key_value_heads": 1,
        "latent_size": s.read("kv_lora_rank"),
        "qk_norm": "latent",
    }


def magnified(rope: Settings) -> None:
    """Raises CheckpointError for a scaling whose magnitude scores are not scaled by."""
    kind = kind_of(rope)
    if kind not in ("yarn", "linear", "llama3"):
        rope.refuse(kind_name(rope), kind, "default, linear, llama3, yarn")


def score_scale(s: Settings) -> float:
    """What scores are multiplied by beside 1 / √(head size): YaRN's magnitude, squared. Raises CheckpointError."""
    rope = written(s)
    if kind_of(rope) == "default":
        return 1.0
    all_dim, factor = rope.get("mscale_all_dim"), rope.get("factor")
    if all_dim is None or not isinstance(factor, int | float) or factor <= 1:
        return 1.0
    if isinstance(all_dim, bool) or not isinstance(all_dim, int | float) or not 0 <= all_dim <= LARGEST_MAGNITUDE:
        rope.refuse("mscale_all_dim", all_dim, f"a number from 0 to {LARGEST_MAGNITUDE:g}")
    return float((0.1 * all_dim * math.log(factor) + 1) ** 2)


def layered(s: Settings, routing: Fields) -> Fields:
    """Attention and mixtures behind `first_k_dense_replace` dense layers."""
    normalize = bool(routing.pop("normalize"))
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    experts = mixture(s, names, "moe_intermediate_size", normalize)
    shared, size = s.whole("n_shared_experts"), s.read_size("moe_intermediate_size")
    if shared:
        name = f"{s.told('n_shared_experts')} * {size.name}"
        experts["shared_expert"] = {"size": FieldValue(shared * size.value, name), "gated": False}
    s.only("moe_layer_freq", 1)
    first, layers = s.whole("first_k_dense_replace"), s.layers()
    s.number("routed_scaling_factor")
    fields = attention(s) | {"ffn": {**experts, **routing, "weight_scale": s.read("routed_scaling_factor")}}
    return by_layer(fields, {"ffn": dense(s)}, [layer < first for layer in range(layers)])


def groups(s: Settings, picks: int) -> Fields:
    count, used = s.read_size("n_group"), s.read_size("topk_group")
    return {"groups": count, "groups_used": used, "group_picks": picks} if count.value > 1 else {}


def v2(s: Settings) -> Fields:
    s.only("norm_topk_prob", False)
    s.only("scoring_func", "softmax")
    method = s.get("topk_method")
    if not isinstance(method, str) or method not in METHODS:
        s.refuse("topk_method", method, ", ".join(METHODS))
    return layered(s, {"normalize": False, **(groups(s, 1) if METHODS[method] else {})})


def v3(s: Settings) -> Fields:
    s.only("scoring_func", "sigmoid")
    s.only("topk_method", "noaux_tc")
    predicting(s)
    routing = {"scoring": "sigmoid", "choice_bias": True, "normalize": s.flag("norm_topk_prob")}
    return layered(s, routing | groups(s, 2))


def tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    return absorbed(unstacked(renamed(stored, NAMES), s, config, STACKED), s, config)


def absorbed(found: Tensors, s: Settings, config: ModelConfig) -> Tensors:
    """In place, and returned: the projections of all layers, by `absorb`."""
    for i in range(config.num_hidden_layers):
        absorb(found, f"model.layers.{i}.self_attn.", s, config)
    return found


def v3_tensors(stored: Mapping[str, Stored], s: Settings, config: ModelConfig) -> Tensors:
    """Without the layers behind the last, which predict further tokens and are not used."""
    count = predicting(s)
    behind = "|".join(str(config.num_hidden_layers + i) for i in range(count))
    return tensors(without(stored, rf"^model\.layers\.({behind})\.") if count else stored, s, config)


def predicting(s: Settings) -> int:
    """How many layers behind the last predict further tokens. Raises CheckpointError."""
    return s.whole("num_nextn_predict_layers", "num_mtp_layers", most=MOST_PREDICTING)


def absorb(tensors: Tensors, at: str, s: Settings, config: ModelConfig) -> None:
    """In place: a layer's projections become those of heads that share one key. Raises CheckpointError for shapes."""
    size, heads, d = Sizes.of(s), config.num_attention_heads, config.hidden_size
    whole = size.still + size.turned
    names = {
        "q_proj": (heads * whole, d),
        "kv_a_proj_with_mqa": (size.latent + size.turned, d),
        "kv_b_proj": (heads * (size.still + size.value), size.latent),
        "o_proj": (d, heads * size.value),
    }
    parts = {}
    for name, shape in names.items():
        own = tensors.pop(f"{at}{name}.weight", None)
        if own is None:
            return  # which is missed later, under this layer's other names
        if own.shape != shape:
            raise CheckpointError(
                f"{s.path}: tensor {at}{name}.weight has shape {list(own.shape)}, expected {list(shape)}"
            )
        parts[name] = own
    interleaved = s.flag("rope_interleave")
    scale = math.sqrt((size.latent + size.turned) / whole) * score_scale(s)
    norm = tensors.pop(f"{at}kv_a_layernorm.weight", None)
    if norm is not None:
        tensors[f"{at}k_norm.weight"] = norm
    made: dict[str, tuple[tuple[int, ...], Callable[..., Tensor], tuple[str, ...]]] = {
        "q_proj": ((config.query_size, d), partial(queries, interleaved, scale), ("q_proj", "kv_b_proj")),
        "k_proj": ((config.kv_size, d), partial(key, interleaved), ("kv_a_proj_with_mqa",)),
        "o_proj": ((d, heads * size.latent), outputs, ("o_proj", "kv_b_proj")),
    }
    for name, (size_of, make, of) in made.items():
        read = partial(read_made, make, size, heads, [parts[own] for own in of])
        tensors[f"{at}{name}.weight"] = Stored(size_of, torch.float32, read)


def read_made(make: Callable[..., Tensor], size: Sizes, heads: int, parts: list[Stored]) -> Tensor:
    return make(size, heads, *(part.read().float() for part in parts))


def pairs_apart(rows: Tensor, interleaved: bool) -> Tensor:
    """Rows [..., turned, d] whose rotary pairs are neighbours, put so that a pair is (i, i + turned / 2)."""
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), dim=-2) if interleaved else rows


def queries(interleaved: bool, scale: float, size: Sizes, heads: int, q: Tensor, kv: Tensor) -> Tensor:
    """[heads · (turned + latent), d]: what is turned of each head, then the rest times what keys are made with."""
    own = q.view(heads, size.still + size.turned, -1)
    up = kv.view(heads, size.still + size.value, -1)[:, : size.still]
    still = torch.einsum("hnl,hnd->hld", up.double(), own[:, : size.still].double()).float()
    turned = pairs_apart(own[:, size.still :], interleaved)
    return (scale * torch.cat((turned, still), dim=1)).flatten(0, 1)


def key(interleaved: bool, size: Sizes, heads: int, down: Tensor) -> Tensor:
    """[turned + latent, d]."""
    return torch.cat((pairs_apart(down[size.latent :], interleaved), down[: size.latent]))


def outputs(size: Sizes, heads: int, out: Tensor, kv: Tensor) -> Tensor:
    """[d, heads · latent]: the projection behind attention times what values are made with."""
    own = out.view(len(out), heads, size.value)
    up = kv.view(heads, size.still + size.value, -1)[:, size.still :]
    return torch.einsum("dhv,hvl->dhl", own.double(), up.double()).float().flatten(1)


DEEPSEEK_V2, DEEPSEEK_V3 = (
    Architecture(v2, tensors, V2_DEFAULTS, MODULES),
    Architecture(v3, v3_tensors, V3_DEFAULTS, MODULES),
)
