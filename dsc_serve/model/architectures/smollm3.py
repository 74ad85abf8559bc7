"""SmolLM3: Llama, some of whose layers turn nothing."""

from __future__ import annotations

from dsc_serve.model.architectures.family import Architecture, as_stored, by_layer, sizes, sliding_layers, windowed
from dsc_serve.model.architectures.llama import llama_fields
from dsc_serve.model.architectures.settings import Fields, Settings

DEFAULTS = sizes(128256, 2048, 11008, 36, 16, 32768) | {
    "num_key_value_heads": 4,
    "no_rope_layer_interval": 4,
    "rope_theta": 2e6,
    "tie_word_embeddings": True,
}


def fields(s: Settings) -> Fields:
    own, still = llama_fields(s), unturned(s)
    sliding = sliding_layers(s, lambda layer: still[layer]) if s.flag("use_sliding_window") else []
    return windowed(s, by_layer(own, {"rotation": False}, still), sliding)


def unturned(s: Settings) -> list[bool]:
    """Which layers turn nothing: where `no_rope_layers` has a 0; without it the last of each interval.

    Of a longer list the first entries count, as in transformers.
    """
    layers, turned = s.layers(), s.get("no_rope_layers")
    if turned is None:
        every = s.size("no_rope_layer_interval")
        return [(layer + 1) % every == 0 for layer in range(layers)]
    if not isinstance(turned, list) or len(turned) < layers or not all(own in (0, 1) for own in turned):
        s.refuse("no_rope_layers", turned, f"a list of {layers} numbers, 1 where positions turn heads and 0 elsewhere")
    return [not own for own in turned[:layers]]


SMOLLM3 = Architecture(fields, as_stored, DEFAULTS)
