"""Three clients' keys, and how a key file says them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dsc_serve.server.keys import digest

ALICE, BOB, ROOT = "alice-has-a-long-key", "bob-has-a-long-key-too", "the-administrator-s-key"
Write = Callable[[str], str]


def entry(name: str, key: str, **fields: Any) -> str:
    lines = [f"{field} = {str(value).lower()}" for field, value in fields.items()]
    return "\n".join([f"[{name}]", f'sha256 = "{digest(key.encode())}"', *lines, ""])


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
