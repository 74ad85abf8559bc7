"""For models that were taught no form: an object of JSON on a line of its own."""

from __future__ import annotations

from collections.abc import Collection

from dsc_serve.server.tools.form import CallForm


def form(template: str) -> CallForm:
    return CallForm("json", bare=True)


def fits(template: str, special: Collection[str]) -> bool:
    return False  # it is what is left
