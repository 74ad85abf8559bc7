"""The loss of a text under a model, through the serving engine."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tqdm import tqdm

from dsc_serve.llm import LLM
from dsc_serve.train.settings import TrainError

TOGETHER = 16  # windows computed in the same steps


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text."""

    nats: float  # total loss of the predicted tokens
    tokens: int
    size: int  # their bytes

    def __add__(self, other: Evaluation) -> Evaluation:
        return Evaluation(self.nats + other.nats, self.tokens + other.tokens, self.size + other.size)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def to_dict(self) -> dict[str, float | int]:
        bits = self.nats / math.log(2)
        return {
            "loss": self.loss,
            "perplexity": math.exp(min(self.loss, 700.0)),
            "bits_per_byte": bits / self.size,
            "tokens": self.tokens,
        }


def windows_of(ids: list[int], length: int) -> list[list[int]]:
    """Windows of length + 1 tokens that share their edges, so that each token but the first is a target once.

    The rest that fills no window is left out; a text shorter than one window is one by itself.
    """
    starts = range(0, max(1, len(ids) - length), length)
    return [ids[start : start + length + 1] for start in starts]


def evaluate(llm: LLM, text: str, *, progress: bool = False) -> Evaluation:
    """Total loss of a text over full-context windows without overlap. Raises TrainError when it cannot be measured."""
    if llm.tokenizer is None:
        raise TrainError("the model has no tokenizer; a text's loss needs one")
    ids = llm.tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < 2:
        raise TrainError(f"the text has {len(ids)} tokens; a loss needs at least 2")
    limits = llm.engine.capacity
    length = limits.max_tokens
    windows = windows_of(ids, length)
    nats, tokens, size = 0.0, 0, 0
    with tqdm(total=len(windows), disable=not progress, unit="window") as bar:
        for start in range(0, len(windows), TOGETHER):
            batch = windows[start : start + TOGETHER]
            for window, losses in zip(batch, llm.losses(batch), strict=True):
                nats += float(losses.sum())
                tokens += len(losses)
                size += sum(len(llm.tokenizer.token_bytes(i)) for i in window[1:])
            bar.update(len(batch))
    return Evaluation(nats, tokens, size)
