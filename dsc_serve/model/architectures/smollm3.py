"""SmolLM3: Llama, some of whose layers turn nothing."""

from __future__ import annotations

from dsc_serve.model.architectures.family import Architecture, by_layer, sliding_layers, windowed
from dsc_serve.model.architectures.llama import llama_fields
from dsc_serve.model.architectures.positions import Positions
from dsc_serve.model.architectures.settings import Fields, Settings

POSITIONS = Positions(default_theta=2e6)


def fields(s: Settings) -> Fields:
    own = llama_fields(s, POSITIONS) | {"tie_word_embeddings": s.get("tie_word_embeddings", default=True)}
    still = unturned(s)
    sliding = sliding_layers(s, lambda layer: still[layer]) if s.flag("use_sliding_window") else []
    return windowed(s, by_layer(own, {"rotation": False}, still), sliding)


def unturned(s: Settings) -> list[bool]:
    """Which layers turn nothing: where `no_rope_layers` has a 0; without it the last of each interval."""
    layers, turned = s.layers(), s.get("no_rope_layers")
    if not turned:
        every = s.size("no_rope_layer_interval", default=4)
        return [(layer + 1) % every == 0 for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) != layers or not all(own in (0, 1) for own in turned):
        s.refuse("no_rope_layers", turned, f"a list of {layers} numbers, 1 where positions turn heads and 0 elsewhere")
    return [not own for own in turned]


SMOLLM3 = Architecture(fields)
