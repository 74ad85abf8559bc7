"""Granite 3: after its mark a list of objects."""

from __future__ import annotations

from collections.abc import Collection

from dsc_serve.server.tools.form import CallForm

MARK, OTHER = "<|tool_call|>", "<tool_call>"


def form(template: str) -> CallForm:
    """Some versions write the other mark, whatever the template says."""
    marks = (MARK, OTHER) if MARK in template or OTHER not in template else (OTHER, MARK)
    return CallForm("granite", marks=marks, listed=True, list_start="[")


def fits(template: str, special: Collection[str]) -> bool:
    return MARK in template or MARK in special
