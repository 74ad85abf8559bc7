"""Mistral: after its mark a list of objects, or in newer models a tool's name and its arguments."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection

from dsc_serve.server.tools.form import CallForm

MARK, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
ID_SIZE = 9
LIST = re.compile(r"\[TOOL_CALLS\]( ?\[)(?!ARGS\]|CALL_ID\])")
LETTERS = string.ascii_letters + string.digits


def call_id() -> str:
    """The templates take nothing else than nine letters and digits."""
    return "".join(secrets.choice(LETTERS) for _ in range(ID_SIZE))


def form(template: str) -> CallForm:
    """Of newer models where the template writes no list behind the mark."""
    signs = (ARGUMENTS, CALL_ID)
    listed = LIST.search(template)
    if MARK in template and listed is None:
        head = f"{{name}}{ARGUMENTS}" if ARGUMENTS in template else "{name}"
        return CallForm(
            "mistral",
            (MARK,),
            listed=True,
            labelled=True,
            head=head,
            tail="",
            apart="",
            new_id=call_id,
            more_signs=signs,
        )
    start = "[" if listed is None else listed[1]
    return CallForm("mistral", (MARK,), listed=True, labelled=True, new_id=call_id, more_signs=signs, list_start=start)


def fits(template: str, special: Collection[str]) -> bool:
    return MARK in template or MARK in special
