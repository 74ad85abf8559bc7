"""What a step has to read and to compute at least, part by part."""

from __future__ import annotations

from dsc_serve.bench.layer.roofline import RooflinePhase, phases, screened
from dsc_serve.model.config import ModelConfig, MoeConfig
from dsc_serve.model.decoder import Decoder, dsc_layers
from dsc_serve.model.ffn.picks import pick_shape


def expected_distinct(config: ModelConfig, batch: int) -> float:
    """Different atoms, adapters or experts of a step whose tokens pick uniformly."""
    shape = pick_shape(config)
    return float(shape.rows * (1 - (1 - shape.per_token / shape.rows) ** batch)) if shape.rows else 0.0


def screens_router(model: Decoder, tokens: int = 1) -> bool:
    """Whether this model's FFN layers screen their routers in int8 in a step of so many tokens."""
    return any(layer.layer.screens(tokens) for layer in dsc_layers(model))


def screens_head(model: Decoder) -> bool:
    """Whether this model's head screens words in int8, where no logits are asked for."""
    return model.head.screened


def ffn_phases(model: Decoder, batch: int) -> list[RooflinePhase]:
    """All FFN layers', one after the other, int8 routers counted as such."""
    element, screening = model.dtype.itemsize, screens_router(model, batch)
    found: list[RooflinePhase] = []
    for layer in model.config.layers:
        own = phases(layer, batch, expected_distinct(layer, batch), element)
        if screening:
            router, static, again, bank = screened(own, element, model.device)
            own = [RooflinePhase("router", router.bytes + again.bytes, router.flops + again.flops), static, bank]
        found += own
    return found


def work(model: Decoder, batch: int, context: float, greedy: bool) -> dict[str, tuple[float, float]]:
    """Bytes read at least and FLOPs of a step's parts; a screened head's without the few panels multiplied again."""
    c, e = model.config, model.dtype.itemsize
    layers, d = c.num_hidden_layers, c.hidden_size
    projections = layers * d * c.projected
    seen = sum(min(context, layer.window or context) for layer in c.layers)
    head = c.vocab_size * d / (e if greedy and screens_head(model) else 1)
    names = {"bank": "compose"}
    found = {
        "projections": (projections * e, 2.0 * batch * projections),
        "attention": (batch * seen * c.cached_size * e, batch * seen * 4.0 * c.query_size),
        "head": (head * e, 2.0 * batch * head),
    }
    for phase in ffn_phases(model, batch):
        name = names.get(phase.name, phase.name)
        if isinstance(c.ffn, MoeConfig):
            name = "experts"
        size, flops = found.get(name, (0.0, 0.0))
        found[name] = size + phase.bytes, flops + phase.flops
    return found


def weight_bytes(model: Decoder, batch: int) -> float:
    """Of all weights that a step needs, each once, in the model's dtype."""
    c, e = model.config, model.dtype.itemsize
    ffn = sum(p.bytes for layer in c.layers for p in phases(layer, batch, expected_distinct(layer, batch), e))
    attention = c.hidden_size * c.projected * e
    return ffn + c.num_hidden_layers * attention + c.vocab_size * c.hidden_size * e


def read_bytes(model: Decoder, batch: int, greedy: bool) -> float:
    """Of all weights that a step reads, each once; of those that it screens, the int8."""
    return sum(size for name, (size, _) in work(model, batch, 0.0, greedy).items() if name != "attention")
