"""What weights in few bits cost: a text's bits per byte, and how far its logits lie from those in float32."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from dsc_serve.config import DTYPES, EngineConfig
from dsc_serve.llm import LLM

WINDOW = 512  # tokens of a text that see each other, and whose logits are held at a time


class QualityRow(msgspec.Struct, frozen=True):
    """Of one system, on so many tokens of a text.

    off: ‖logits − those of the weights' own values in float32‖ / ‖these‖. argmax: share of the tokens whose largest
    logit is theirs.
    """

    system: str
    tokens: int
    bits_per_byte: float
    off: float
    argmax: float


class TextError(ValueError):
    """A text that no loss can be measured on; one line that says why."""


def quality(configs: Sequence[tuple[str, EngineConfig]], text: str, tokens: int) -> list[QualityRow]:
    """Of one model in several forms, one after the other. Raises TextError."""
    first = configs[0][1]
    with LLM(first.model, dtype="float32", weights="bfloat16", threads=first.threads) as llm:
        windows = windows_of(llm, text, tokens)
        assert llm.tokenizer is not None
        size = sum(len(llm.tokenizer.token_bytes(token)) for window in windows for token in window[1:])
        wanted = llm.logits(windows)
    return [measured(name, config, windows, size, wanted) for name, config in configs]


def measured(
    name: str, config: EngineConfig, windows: Sequence[list[int]], size: int, wanted: Sequence[Tensor]
) -> QualityRow:
    nats, apart, whole, same, count = 0.0, 0.0, 0.0, 0, 0
    with LLM(
        config.model,
        dtype=DTYPES[config.dtype],  # type: ignore[arg-type]
        weights=config.weights,
        activations=config.activations,
        threads=config.threads,
    ) as llm:
        for window, want in zip(windows, wanted, strict=True):
            got = llm.logits([window])[0]
            targets = torch.tensor(window[1:])
            nats += float(torch.nn.functional.cross_entropy(got[:-1].double(), targets, reduction="sum"))
            apart += float((got - want).square().sum(dtype=torch.float64))
            whole += float(want.square().sum(dtype=torch.float64))
            same += int((got.argmax(1) == want.argmax(1)).sum())
            count += len(window)
    bits = nats / math.log(2) / size
    return QualityRow(name, count, bits, math.sqrt(apart / whole), same / count)


def windows_of(llm: LLM, text: str, tokens: int) -> list[list[int]]:
    """The first tokens of a text, as many as the windows hold that are at least two tokens long."""
    if llm.tokenizer is None:
        raise TextError("the model has no tokenizer; a text's loss needs one")
    ids = llm.tokenizer.encode(text, add_special_tokens=False)[:tokens]
    return list(cut(ids, min(WINDOW, llm.engine.capacity.max_tokens)))


def cut(ids: list[int], length: int) -> Iterator[list[int]]:
    if len(ids) < 2:
        raise TextError(f"the text has {len(ids)} tokens; a loss needs at least 2")
    for start in range(0, len(ids) - 1, length):
        window = ids[start : start + length]
        if len(window) > 1:
            yield window


def format_quality(rows: Sequence[QualityRow]) -> str:
    lines = ["| system | tokens of text | bits per byte | logits off those in float32 | same largest logit |"]
    lines.append("|---" * 5 + "|")
    lines += [
        f"| {row.system} | {row.tokens} | {row.bits_per_byte:.4f} | {row.off:.2%} | {row.argmax:.1%} |" for row in rows
    ]
    return "\n".join(lines)
