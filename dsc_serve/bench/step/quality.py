"""What weights in few bits cost: a text's bits per byte, and how far its logits lie from those in float32."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor

from dsc_serve.config import DTYPES, EngineConfig
from dsc_serve.llm import LLM

WINDOW = 512  # tokens of a text that see each other, and whose logits are held at a time


class QualityRow(msgspec.Struct, frozen=True):
    """Of one system, on so many tokens of a text."""

    system: str
    tokens: int
    bits_per_byte: float
    off: float  # ‖logits − those of the weights' own values in float32‖ / ‖these‖
    argmax: float  # share of the tokens whose largest logit is theirs


class TextError(ValueError):
    """A text that no loss can be measured on; one line that says why."""


def opened(config: EngineConfig) -> LLM:
    """The model of a configuration, as it says."""
    return LLM(
        config.model,
        dtype=DTYPES[config.dtype],  # type: ignore[arg-type]
        weights=config.weights,
        activations=config.activations,
        kv_dtype=config.kv_dtype,
        threads=config.threads,
        kernels=config.kernels,
    )


def quality(configs: Sequence[tuple[str, EngineConfig]], text: str, tokens: int) -> list[QualityRow]:
    """Of one model in several forms, one after the other. Raises TextError."""
    exact = msgspec.structs.replace(configs[0][1], dtype="float32", weights="bfloat16")
    with opened(exact) as llm:
        windows = windows_of(llm, text, tokens, WINDOW)
        size, wanted = bytes_of(llm, windows), llm.logits(windows)
    return [measured(name, config, windows, size, wanted) for name, config in configs]


def measured(
    name: str, config: EngineConfig, windows: Sequence[list[int]], size: int, wanted: Sequence[Tensor]
) -> QualityRow:
    nats, apart, whole, same, count = 0.0, 0.0, 0.0, 0, 0
    with opened(config) as llm:
        for window, want in zip(windows, wanted, strict=True):
            got = llm.logits([window])[0]
            targets = torch.tensor(window[1:])
            nats += float(torch.nn.functional.cross_entropy(got[:-1].double(), targets, reduction="sum"))
            apart += float((got - want).square().sum(dtype=torch.float64))
            whole += float(want.square().sum(dtype=torch.float64))
            same += int((got.argmax(1) == want.argmax(1)).sum())
            count += len(window)
    return QualityRow(name, count, nats / math.log(2) / size, math.sqrt(apart / whole), same / count)


def bits_per_byte(config: EngineConfig, text: str, tokens: int, window: int) -> float:
    """Of a text's first tokens, in windows of so many. Raises TextError."""
    with opened(config) as llm:
        windows = windows_of(llm, text, tokens, window)
        nats = sum(float(llm.losses([own])[0].sum()) for own in windows)
        return nats / math.log(2) / bytes_of(llm, windows)


def windows_of(llm: LLM, text: str, tokens: int, length: int) -> list[list[int]]:
    """The first tokens of a text, in windows of at least two tokens that do not overlap."""
    if llm.tokenizer is None:
        raise TextError("the model has no tokenizer; a text's loss needs one")
    ids = llm.tokenizer.encode(text, add_special_tokens=False)[:tokens]
    if len(ids) < 2:
        raise TextError(f"the text has {len(ids)} tokens; a loss needs at least 2")
    length = min(length, llm.engine.capacity.max_tokens)
    return [window for start in range(0, len(ids), length) if len(window := ids[start : start + length]) > 1]


def bytes_of(llm: LLM, windows: Sequence[list[int]]) -> int:
    """Of the tokens that are predicted."""
    assert llm.tokenizer is not None
    return sum(len(llm.tokenizer.token_bytes(token)) for window in windows for token in window[1:])


def format_quality(rows: Sequence[QualityRow]) -> str:
    lines = ["| system | tokens of text | bits per byte | logits off those in float32 | same largest logit |"]
    lines.append("|---" * 5 + "|")
    lines += [
        f"| {row.system} | {row.tokens} | {row.bits_per_byte:.4f} | {row.off:.2%} | {row.argmax:.1%} |" for row in rows
    ]
    return "\n".join(lines)
