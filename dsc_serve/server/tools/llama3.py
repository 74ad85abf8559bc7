"""Llama 3.1 to 3.3: an object of JSON, sometimes after a mark, that names its arguments `parameters`."""

from __future__ import annotations

from collections.abc import Collection

from dsc_serve.server.tools.form import CallForm

MARK = "<|python_tag|>"


def form(template: str) -> CallForm:
    return CallForm("llama3", marks=(MARK,), bare=True, head='{"name": "{name}", "parameters": ', apart="; ")


def fits(template: str, special: Collection[str]) -> bool:
    return MARK in template or MARK in special
