"""Hermes, Qwen and Granite 4: each call is an object of JSON between two marks."""

from __future__ import annotations

from collections.abc import Collection

from dsc_serve.server.tools.form import CallForm

OPENING, CLOSING = "<tool_call>", "</tool_call>"


def form(template: str) -> CallForm:
    return CallForm("hermes", marks=(OPENING,), head='\n{"name": "{name}", "arguments": ', tail="}\n", closing=CLOSING)


def fits(template: str, special: Collection[str]) -> bool:
    return OPENING in template and CLOSING in template
