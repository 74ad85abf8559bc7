"""A tokenizer's decoder, put together from its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dsc_serve.text.decoder_steps import (
    CLEANED,
    ByteFallback,
    ByteLevel,
    Collapse,
    Fuse,
    Metaspace,
    Output,
    Replace,
    ReplaceExpression,
    Spaces,
    Step,
    Strip,
    WordEnds,
    WordPiece,
)

Description = Mapping[str, Any]
KINDS = ("BPEDecoder", "ByteFallback", "ByteLevel", "CTC", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")


class Chain:
    """The steps of a decoder, set up for one text.

    descriptions: of the steps, as tokenizer.json has them, without sequences. None: the tokenizer has no decoder.
    Raises ValueError for a step that is not known.
    """

    def __init__(self, descriptions: Sequence[Description] | None) -> None:
        self._output = Output()
        self._steps: list[Step] = []
        if descriptions is None:
            self._steps.append(Spaces(self._output))
            descriptions = ()
        for i, description in enumerate(descriptions):
            self._steps += build(description, descriptions[i + 1 :], is_fused(descriptions[:i]))
        sinks: list[Step | Output] = [*self._steps[1:], self._output]
        for step, following in zip(self._steps, sinks, strict=True):
            step.sink = following
        self._head = self._steps[0] if self._steps else self._output

    @property
    def past_start(self) -> bool:
        """Whether the start of the text has gone by, so that it no longer bears on what comes."""
        return all(step.past_start for step in self._steps)

    def skip_start(self) -> None:
        """As after a text has begun."""
        for step in self._steps:
            step.skip_start()

    def push(self, token: bytes) -> bytes:
        """What is certain with this token more."""
        self._head.start()
        self._head.text(token)
        self._head.stop()
        return self._output.take()

    def end(self) -> bytes:
        """What was held back, when no more tokens come."""
        self._head.end()
        return self._output.take()


def is_local(descriptions: Sequence[Description]) -> bool:
    """Whether a token adds the same bytes to a text wherever it stands after the text's start."""
    fused = in_bytes = False
    for step in descriptions:
        kind = step["type"]
        if kind in ("BPEDecoder", "CTC") or (kind == "ByteLevel" and (fused or in_bytes)):
            return False
        if kind in ("Fuse", "ByteLevel"):
            fused = True
        elif fused:
            at_start = kind == "Strip" and not step["stop"]
            one_byte = kind == "Replace" and len(step["pattern"].get("String", "").encode()) == 1
            if not (at_start or one_byte):
                return False
        elif in_bytes:  # those in a row are one token to the steps that follow
            return False
        else:
            in_bytes = kind == "ByteFallback"
    return True


def is_fused(descriptions: Sequence[Description]) -> bool:
    """Whether one token is left after these steps."""
    return any(step["type"] in ("Fuse", "ByteLevel") for step in descriptions)


def build(step: Description, later: Sequence[Description], fused: bool) -> list[Step]:
    """A step of a decoder, of which `later` come behind; fused: there is but one token, all the text."""
    nowhere = Output()
    kind = step["type"]
    if kind == "Fuse":
        after = next((other["type"] for other in later if other["type"] != kind), None)
        # one character that stands for no byte would else leave all of the text as it is
        return [] if after == "ByteLevel" else [Fuse(nowhere)]
    if kind == "ByteLevel":
        return [ByteLevel(nowhere)]
    if kind == "ByteFallback":
        return [ByteFallback(nowhere, together=bool(later) and later[0]["type"] != "Fuse")]
    if kind == "Replace":
        (form, pattern), *_ = step["pattern"].items()
        if form == "Regex":
            return [ReplaceExpression(nowhere, pattern, step["content"])]
        return [Replace(nowhere, text_of(pattern, "Replace", "pattern"), step["content"].encode())]
    if kind == "Metaspace":
        first = b" " if step.get("prepend_scheme", "always") == "never" else b""
        return [Metaspace(nowhere, text_of(step["replacement"], kind, "replacement"), first)]
    if kind == "WordPiece":
        cleaned = CLEANED if step["cleanup"] else ()
        return [WordPiece(nowhere, step["prefix"].encode()), *(Replace(nowhere, *pair) for pair in cleaned)]
    if kind == "BPEDecoder":
        suffix = text_of(step["suffix"], kind, "suffix")
        return [Replace(nowhere, suffix, b"") if fused else WordEnds(nowhere, suffix)]
    if kind == "Strip":
        return [Strip(nowhere, step["content"].encode(), step["start"], step["stop"], once=fused)]
    if kind == "CTC":
        pad = text_of(step["pad_token"], kind, "pad_token")
        replaced = [(pad, b"")]
        if step["cleanup"]:
            delimiter = text_of(step["word_delimiter_token"], kind, "word_delimiter_token")
            replaced += [*CLEANED, (delimiter, b" ")]
        return [Replace(nowhere, *pair) for pair in replaced] if fused else [Collapse(nowhere, replaced)]
    raise ValueError(f"decoder {kind} is not supported; allowed: {', '.join(KINDS)}")


def text_of(value: str, kind: str, field: str) -> bytes:
    if not value:
        raise ValueError(f"decoder {kind} has an empty {field}, which would be found everywhere")
    return value.encode()
