"""The parts of an answer, in their order. Neighbouring texts of one kind are one, however they came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Text that the model wrote for itself."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins."""

    index: int  # its place among the answer's calls, from 0 on
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of a call's arguments, which are JSON in the end."""

    index: int
    text: str


Part = Content | Reasoning | CallStart | CallArguments


def joined(parts: Iterable[Part]) -> list[Part]:
    """The parts with neighbours of one kind made one, without empty ones."""
    runs: list[tuple[Part, list[str]]] = []
    for part in parts:
        if isinstance(part, CallStart):
            runs.append((part, []))
        elif part.text:
            first = runs[-1][0] if runs else None
            same = type(first) is type(part) and getattr(first, "index", None) == getattr(part, "index", None)
            if same:
                runs[-1][1].append(part.text)
            else:
                runs.append((part, [part.text]))
    return [remade(part, "".join(texts)) for part, texts in runs]


def remade(part: Part, text: str) -> Part:
    if isinstance(part, CallStart):
        return part
    return CallArguments(part.index, text) if isinstance(part, CallArguments) else type(part)(text)
