"""What captured steps compute besides their layers: nothing, the tokens of the largest logits, or all logits.

A form is one line of FORMS: what is captured behind the layers, whom it serves, and what of it the runner finds. A step
whose form was not captured for so many sequences is one of layers alone, and its head is computed behind it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsc_serve.engine.position import Position
from dsc_serve.engine.sampler import is_greedy, to_device
from dsc_serve.model.decoder import Decoder


@dataclass(frozen=True)
class StepOutput:
    """What a step gave, a row for each of its tokens.

    Tokens and logits are None where they are still to be computed, and overwritten by the next replay.
    """

    hidden: Tensor  # [T, d], before the final norm
    tokens: Tensor | None = None  # int64 [T], those of the largest logits
    logits: Tensor | None = None  # float32 [T, vocabulary]

    def first(self, count: int) -> StepOutput:
        """The same of the first rows; the others are padding."""
        parts = (None if part is None else part[:count] for part in (self.tokens, self.logits))
        return StepOutput(self.hidden[:count], *parts)

    def greedy(self, model: Decoder, rows: list[int]) -> Tensor:
        """Tokens int64 [R] of the largest logits of some rows; `tokens` itself where these are all."""
        if self.tokens is not None:
            return picked_rows(self.tokens, rows)
        return model.argmax_tokens(picked_rows(self.hidden, rows))

    def rows_of_logits(self, model: Decoder, rows: list[int]) -> Tensor:
        """float32 logits [R, vocabulary] of some rows, which may be changed."""
        if self.logits is not None:
            return picked_rows(self.logits, rows)
        return model.logits(picked_rows(self.hidden, rows))


def picked_rows(parts: Tensor, rows: list[int]) -> Tensor:
    every = len(rows) == parts.shape[0] and rows == list(range(len(rows)))
    return parts if every else parts[to_device(torch.tensor(rows), parts.device)]


class HeadRoom:
    """Where captured heads write, the same for all graphs: they are never replayed at the same time.

    tokens: int64 [≥ rows], as where the next step looks its token ids up. rows: of the largest graph that keeps logits.
    """

    def __init__(self, tokens: Tensor, rows: int, vocabulary: int) -> None:
        self.tokens = tokens
        self.logits = torch.zeros(rows, vocabulary, dtype=torch.float32, device=tokens.device)


class LayersAlone:
    """Steps whose head is computed behind their graph."""

    name = "layers"
    has_head = False  # whether the head is in the graph
    keeps_logits = False  # whether its logits stay until the next replay

    def serves(self, requests: Sequence[Position]) -> bool:
        """Whether this is what a step of these wants."""
        return True

    def finish(self, model: Decoder, hidden: Tensor, room: HeadRoom) -> None:
        """What is captured behind the layers' output [S, d]."""

    def output(self, hidden: Tensor, room: HeadRoom) -> StepOutput:
        """What a replay has given."""
        return StepOutput(hidden)


class Greedy(LayersAlone):
    """Steps of which nothing is wanted but each row's token of the largest logit."""

    name = "greedy"
    has_head = True

    def serves(self, requests: Sequence[Position]) -> bool:
        return all(map(is_greedy, requests))

    def finish(self, model: Decoder, hidden: Tensor, room: HeadRoom) -> None:
        room.tokens[: len(hidden)] = model.argmax_tokens(hidden)

    def output(self, hidden: Tensor, room: HeadRoom) -> StepOutput:
        return StepOutput(hidden, tokens=room.tokens[: len(hidden)])


class Sampled(LayersAlone):
    """Steps that draw from logits, or change or report them: the host knows how, after the replay."""

    name = "sampled"
    has_head = keeps_logits = True

    def finish(self, model: Decoder, hidden: Tensor, room: HeadRoom) -> None:
        room.logits[: len(hidden)] = model.logits(hidden)

    def output(self, hidden: Tensor, room: HeadRoom) -> StepOutput:
        return StepOutput(hidden, logits=room.logits[: len(hidden)])


LAYERS = LayersAlone()
GREEDY = Greedy()
WITH_HEAD: tuple[LayersAlone, ...] = (GREEDY, Sampled())  # a step is one of the first that serves it
FORMS: Mapping[str, LayersAlone] = {form.name: form for form in (*WITH_HEAD, LAYERS)}


def form_of(requests: Sequence[Position]) -> LayersAlone:
    """What a step of these requests wants to be captured with."""
    return next(form for form in WITH_HEAD if form.serves(requests))
