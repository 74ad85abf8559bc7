"""Calls of tools, and reasoning before an answer, as one Lark grammar of the library."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from dsc_serve.structured_outputs import CallGrammar, Literals, ReasoningGrammar, ToolGrammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

ANY = r"(.|\n)*"
LINES = r"/\n{1,2}/"
# Fixed, not free: what models were taught, and nothing that could go on for ever.
SEPARATORS: JsonCompileOptions = {"item_separator": ", ", "key_separator": ": "}


class Rules:
    """The rules of one grammar. Names are given as they come."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def rule(self, body: str, options: str = "") -> str:
        return self._add(f"r{len(self._lines)}", options, body)

    def terminal(self, body: str) -> str:
        return self._add(f"T{len(self._lines)}", "", body)

    def _add(self, name: str, options: str, body: str) -> str:
        self._lines.append(f"{name}{options}: {body}")
        return name

    def text(self, start: str) -> str:
        return "\n".join([f"start: {start}", *self._lines])


def literal(parts: Literals) -> str:
    """These, one after the other; possibly nothing."""
    return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts if part != "")


def pattern(regex: str) -> str:
    """A regex as Lark writes it."""
    return "/" + re.sub(r"(?<!\\)((?:\\\\)*)/", r"\1\\/", regex) + "/"


def with_calls(rules: Rules, calls: CallGrammar, prepared: Callable[[ToolGrammar], str], not_first: str = "") -> str:
    """What stands for the calls of an answer, possibly with text around them.

    prepared: a tool's schema as the library takes it. not_first: no text begins with this.
    """
    tools = [
        rules.rule(f"{literal(tool.head)} {rules.rule('%json ' + prepared(tool))} {literal(calls.tail)}")
        for tool in calls.tools
    ]
    call = rules.rule(" | ".join(tools))
    if calls.start or calls.end:
        more = f"({literal((calls.between,))} {call}){{0,{calls.most - 1}}}" if calls.most > 1 else ""
        call = rules.rule(f"{literal((calls.start,))} {call} {more} {literal((calls.end,))}")
    if calls.triggers:
        return with_text(rules, calls.triggers, call, not_first)
    first = f"{literal((calls.mark,))} {call}"
    if calls.most == 1 or calls.start or calls.end:
        return first
    return f"{first} ({literal((calls.apart, calls.mark))} {call}){{0,{calls.most - 1}}}"


def with_text(rules: Rules, triggers: Literals, call: str, not_first: str) -> str:
    """Text, and after each trigger a call. not_first: as in `with_calls`; a regex of it is kept out of the text."""

    def parts(but: str) -> tuple[str, str]:
        text = rules.terminal(pattern(ANY) + but)
        heads = [f"{text} <[{part}]>" for part in triggers if isinstance(part, int)]
        for part in triggers:
            if isinstance(part, str):
                heads.append(rules.rule(rules.terminal(pattern(part) + but), "[lazy]"))
        return rules.rule(" | ".join(heads)), text

    head, text = parts("")
    rest = rules.rule(f"({head} {call})* {text}")
    if not not_first:
        return rest
    first, alone = parts(f" & ~{pattern(re.escape(not_first) + ANY)}")
    return rules.rule(f"{first} {call} {rest} | {alone}")


def with_reasoning(rules: Rules, marks: ReasoningGrammar, answers: Sequence[str], text_follows: bool) -> str:
    """An answer, possibly after reasoning. answers: after reasoning, and without any."""
    if isinstance(marks.closing, int):
        thought = f"{rules.terminal(pattern(ANY))} <[{marks.closing}]>"
    else:
        thought = rules.rule(pattern(ANY + re.escape(marks.closing)), "[lazy]")
    gap = "" if text_follows else f"{rules.terminal(LINES)}?"
    after, alone = answers
    if marks.begun:
        return f"{thought} {gap} {after}"
    return f"{literal((marks.opening,))} {thought} {gap} {after} | {alone}"
