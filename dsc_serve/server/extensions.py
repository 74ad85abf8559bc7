"""The `dsc` object: what a request may ask beyond OpenAI's fields, and what its answer then tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from dsc_serve.sampling_params import ALL_ATOMS
from dsc_serve.scheduling_params import MAX_PRIORITY, MAX_TIMEOUT_S
from dsc_serve.server.errors import bad_request
from dsc_serve.server.fields import Fields
from dsc_serve.worker.messages import Delta, RoutingSlice

DIGITS = 7  # of a float32 below 1
WEIGHTS = {"atoms": "coefficients", "experts": "gates", "adapters": "gates"}  # by what is picked


TopAtoms = Annotated[int, Field(ge=1, le=1024)]


class AdapterFields(Fields):
    """Which adapters are asked for."""

    adapters: Annotated[dict[str, float], Field(min_length=1)] | None = Field(
        default=None, description="weights by adapters' names, instead of an adapter in `model`"
    )
    composition: Literal["sum", "product_of_sums"] | None = Field(
        default=None,
        description=(
            "sum: the updates of the adapters added with their weights; product_of_sums: the two matrices of each "
            "added first, as LoRAHub has it"
        ),
    )


class SchedulingFields(AdapterFields):
    """How urgent a request is."""

    priority: Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)] | None = Field(
        default=None, description="lower is served earlier, by the policies that look at it"
    )
    deadline_ms: Annotated[float, Field(gt=0, le=MAX_TIMEOUT_S * 1000)] | None = Field(
        default=None,
        description=(
            "from the request's arrival at the engine; a request that has not ended by then ends with an error, or, "
            "once it has begun to answer, with the finish reason `timeout`"
        ),
    )


class DscFields(SchedulingFields):
    """Extensions. An answer to a request that has this object has one as well, in each choice, with its timings."""

    return_routing: bool | None = Field(default=None, description="tell what every token but the last one picked")
    top_k_atoms: TopAtoms | None = Field(default=None, description="only so many atoms per layer, the strongest")
    max_drafts: Annotated[int, Field(ge=0, le=64)] | None = Field(
        default=None,
        description="of the tokens that may follow, most that a step computes with this request's own; 0: none",
    )

    @property
    def routing(self) -> int:
        """As in SamplingParams. Raises ApiError (400)."""
        if self.top_k_atoms is not None and not self.return_routing:
            message = "dsc.top_k_atoms is set; it may only be when dsc.return_routing is true"
            raise bad_request("dsc.top_k_atoms", message)
        return (self.top_k_atoms or ALL_ATOMS) if self.return_routing else 0


@dataclass(slots=True)
class GenerationTimes:
    """When the tokens of one generation came, in seconds from the request's arrival at the server."""

    queued_s: float = 0.0  # before it was admitted
    first: float | None = None  # token
    last: float = 0.0  # token
    longest_gap_s: float = 0.0  # between two
    tokens: int = 0

    def record(self, delta: Delta, now: float) -> float | None:
        """Take in a delta; returns the time since the last token, or since the arrival, where it has tokens."""
        if delta.queued_s > self.queued_s:
            self.queued_s = delta.queued_s
        if not delta.token_ids:
            return None
        passed = now - self.last
        if self.first is None:
            self.first = now
        elif passed > self.longest_gap_s:
            self.longest_gap_s = passed
        self.last = now
        self.tokens += len(delta.token_ids)
        return passed

    @property
    def mean_gap_s(self) -> float | None:
        """Between tokens; None where there were fewer than two."""
        return None if self.first is None or self.tokens < 2 else (self.last - self.first) / (self.tokens - 1)

    def timings(self, cached_tokens: int) -> dict[str, float | int | None]:
        """null where there were too few tokens to tell."""
        mean = self.mean_gap_s
        return {
            "queue_ms": milliseconds(self.queued_s),
            "ttft_ms": milliseconds(self.first),
            "mean_itl_ms": milliseconds(mean),
            "max_itl_ms": milliseconds(None if mean is None else self.longest_gap_s),
            "cached_tokens": cached_tokens,
        }


def milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e3 * seconds, 3)


def routing_entry(
    parts: Sequence[RoutingSlice], prompt: list[int], output: list[int], picks: str
) -> dict[str, Any] | None:
    """What tokens picked, the strongest first: lists over tokens, layers and picks. None where there is no news.

    picks: what they pick, atoms, experts or adapters, by which their list is named.
    Of the output's last token nothing is told: it need not have been computed.
    """
    if not parts:
        return None
    routing, size = RoutingSlice.joined(parts), len(prompt)
    start, end = routing.start, min(routing.start + routing.shape[0], size + max(len(output) - 1, 0))
    if end <= start:
        return None
    atoms, coefficients, signal = (array[: end - start] for array in routing.arrays)
    return {
        "start": start,
        "token_ids": [*prompt[start:end], *output[max(start - size, 0) : max(end - size, 0)]],
        picks: atoms.tolist(),
        WEIGHTS[picks]: np.round(coefficients.astype(np.float64), DIGITS).tolist(),
        "signal": np.round(signal.astype(np.float64), DIGITS).tolist(),
    }
