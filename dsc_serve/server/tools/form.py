"""What a call form is: how calls are told from text, and how one is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from uuid import uuid4

ARGUMENT_KEYS = ("arguments", "parameters")


def call_id() -> str:
    return f"call_{uuid4().hex[:24]}"


@dataclass(frozen=True)
class CallForm:
    """How a model writes calls."""

    name: str
    # Each begins calls wherever it stands; the first is the one that a constrained output has
    marks: tuple[str, ...] = ()
    bare: bool = False  # an object at the beginning of a line is a call without any mark
    listed: bool = False  # calls may stand in a list
    labelled: bool = False  # a call may be its tool's name, then its arguments
    # What is written before the arguments, with the tool's name at `{name}`
    head: str = '{"name": "{name}", "arguments": '
    tail: str = "}"  # what is written behind them
    closing: str = ""  # what ends a call
    apart: str = "\n"  # what stands between two
    new_id: Callable[[], str] = call_id  # names a call, as the model's template takes it
    # Texts besides marks that belong to a call, and are shown to its parser where they are special tokens
    more_signs: tuple[str, ...] = ()
    list_start: str = ""  # what begins a list where the model always writes one

    @property
    def signs(self) -> tuple[str, ...]:
        return (*self.marks, self.closing, *self.more_signs) if self.closing else (*self.marks, *self.more_signs)

    @property
    def mark(self) -> str:
        """What begins a call where nothing else may: its mark, or the first character of its object."""
        return "{" if self.bare and not self.marks else self.marks[0]

    def head_of(self, name: str) -> str:
        """Of a call of this tool, up to its arguments."""
        return self.head.replace("{name}", name)

    def written(self, calls: Sequence[tuple[str, str]]) -> str:
        """Calls, each a name and arguments as JSON, as the model writes them."""
        each = [f"{self.head_of(name)}{arguments}{self.tail}" for name, arguments in calls]
        if self.list_start:
            return f"{self.marks[0]}{self.list_start}{', '.join(each)}]"
        mark = self.marks[0] if self.marks and not self.bare else ""
        return self.apart.join(f"{mark}{call}{self.closing}" for call in each)


def tool_text(name: str, description: str, parameters: object) -> str:
    """A tool as one line of JSON for the model."""
    tool = {"name": name, "description": description, "parameters": parameters}
    return json.dumps({key: value for key, value in tool.items() if value}, ensure_ascii=False)
