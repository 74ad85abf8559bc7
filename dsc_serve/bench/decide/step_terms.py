"""What a step has to do, in the terms that its time is a sum of."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dsc_serve.bench.layer.roofline import phases, screened
from dsc_serve.model.config import ModelConfig
from dsc_serve.model.ffn.picks import pick_shape
from dsc_serve.weight_forms import Form

BYTES = {"int8": 34 / 32, "int4": 20 / 32}  # of a weight, with its group's scale and minimum
SHARED = ("step", "requests", "frame GB", "frame GFLOP", "context GB", "pairs")
OWN = ("layers", "GB", "GFLOP")


class ComparedFfn(msgspec.Struct, frozen=True):
    """A kind of FFN as it is served: its registered name, and how a DSC's router is scored."""

    ffn: str
    router: str = "auto"


SYSTEMS: Mapping[str, ComparedFfn] = {
    "dsc": ComparedFfn("dsc"),
    "dsc exact": ComparedFfn("dsc", "exact"),
    "moe": ComparedFfn("moe"),
    "molora": ComparedFfn("molora"),
    "dense": ComparedFfn("dense"),
}
WEIGHTS: tuple[Form, ...] = ("stored", "int8", "int4")


class StepShape(msgspec.Struct, frozen=True):
    """What a step holds."""

    singles: int = 0  # requests that decode
    context: float = 0.0  # tokens in that of each
    drafts: int = 0  # beside each one's token
    chunk: int = 0  # tokens of a prompt that is computed whole with them

    @property
    def tokens(self) -> int:
        return self.singles * (1 + self.drafts) + self.chunk

    @property
    def rows(self) -> int:
        """Tokens after which words are chosen."""
        return self.singles * (1 + self.drafts) + (self.chunk > 0)


class ServedForm(msgspec.Struct, frozen=True):
    """How a model's weights are held: the form, bytes of a number of the dtype, and what is screened in int8."""

    weights: str
    element: int
    int8_router: bool = False
    int8_head: bool = False

    @property
    def matrix(self) -> float:
        """Bytes of a weight."""
        return BYTES.get(self.weights, float(self.element))

    @property
    def head(self) -> float:
        """Bytes of a weight of the head, which is never held in fewer than 8 bits."""
        return 1.0 if self.int8_head else max(self.matrix, BYTES["int8"])


def step_terms(system: str, config: ModelConfig, form: ServedForm, step: StepShape) -> dict[str, float]:
    """By the names in SHARED, and "SYSTEM NAME" of those in OWN; counts, 1e9 bytes, 1e9 FLOPs.

    pairs: of tokens of a prompt that attend to each other, in all layers, times the numbers of a query, 1e9.
    """
    c, layers, tokens = config, config.num_hidden_layers, step.tokens
    projections, words = layers * c.hidden_size * c.projected, c.vocab_size * c.hidden_size
    found = {
        "step": 1.0,
        "requests": float(step.singles + (step.chunk > 0)),
        "frame GB": (projections * form.matrix + words * form.head) / 1e9,
        "frame GFLOP": 2.0 * (tokens * projections + step.rows * words) / 1e9,
        "context GB": step.singles * step.context * layers * c.cached_size * form.element / 1e9,
        "pairs": layers * c.query_size * step.chunk**2 / 2 / 1e9,
    }
    size, flops = ffn_work(config, form, tokens)
    own = dict(zip(OWN, (float(layers), size / 1e9, flops / 1e9), strict=True))
    return found | {f"{system} {name}": value for name, value in own.items()}


def ffn_work(config: ModelConfig, form: ServedForm, tokens: int) -> tuple[float, float]:
    """Bytes and FLOPs of all FFN layers of a step whose tokens pick evenly."""
    shape, held = pick_shape(config), form.matrix / form.element
    distinct = shape.rows * (1 - (1 - shape.per_token / shape.rows) ** tokens) if shape.rows else 0.0
    own = phases(config, tokens, distinct, form.element)
    size = sum(phase.bytes for phase in own) * held
    flops = sum(phase.flops for phase in own)
    if shape.of == "atoms":
        router = own[0]
        if form.int8_router and form.weights == "stored":
            narrow = screened(own, form.element)
            size, flops = sum(phase.bytes for phase in narrow), sum(phase.flops for phase in narrow)
        elif form.weights == "int4":  # router and bank stay in 8 bits
            size = own[1].bytes * held + (router.bytes + own[2].bytes) * BYTES["int8"] / form.element
    return config.num_hidden_layers * size, config.num_hidden_layers * flops
