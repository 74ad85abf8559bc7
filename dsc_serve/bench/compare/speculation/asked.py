"""What is compared of speculation: systems, sizes, streams and how often drafts are right."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from dsc_serve.bench.compare.comparison import MIXTURES, ComparisonError, PresetName

KINDS = ("dsc", "moe", "molora", "dense")
COUNT = Annotated[int, Meta(ge=1)]
RATE = Annotated[float, Meta(ge=0, le=1)]


class SpeculationComparison(msgspec.Struct, frozen=True, kw_only=True):
    """The systems are kinds of FFN at each preset, with random weights, in one process and in turn."""

    systems: tuple[str, ...] = KINDS
    presets: tuple[PresetName, ...] = ("paper", "large", *MIXTURES)
    streams: tuple[COUNT, ...] = (1, 8, 16, 32)
    # how often a draft is right that the bench makes; a round has each of them and none
    rates: tuple[RATE, ...] = (0.0, 0.5, 0.7, 0.9)
    prompt_tokens: COUNT = 48  # drawn evenly, as the continuation is, so that none repeats itself
    tokens: Annotated[int, Meta(ge=2)] = 128  # of each stream, after its prompt
    max_drafts: COUNT = 7  # also of the table of step times
    rounds: COUNT = 5  # of all systems
    text_rounds: COUNT = 5
    threads: Annotated[int, Meta(ge=0)] = 0
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    def systems_at(self, preset: str) -> tuple[str, ...]:
        """Those that a preset has: a mixture's shape is one of experts, and a DSC of equal total beside it."""
        return tuple(name for name in self.systems if preset not in MIXTURES or name in ("dsc", "moe"))

    def only(self, names: tuple[str, ...]) -> SpeculationComparison:
        """The same without the systems that are not named. Raises ComparisonError for a name that is unknown."""
        for name in names:
            if name not in self.systems:
                raise ComparisonError(f"system {name!r} is not in this comparison; it has {', '.join(self.systems)}")
        return msgspec.structs.replace(self, systems=tuple(name for name in self.systems if name in names))


def comparable(asked: SpeculationComparison) -> dict[str, Any]:
    """What results must share to be of one comparison: there may be more rounds, and more streams, later."""
    content = msgspec.to_builtins(asked)
    for name in ("rounds", "text_rounds", "systems", "presets", "streams"):
        del content[name]
    return dict(content)
