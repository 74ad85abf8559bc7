"""Clients that leave before their answer has come."""

from __future__ import annotations

from starlette.types import Receive


async def client_gone(receive: Receive) -> None:
    """Return when the client has left. The framework watches for this only while it streams."""
    while (await receive())["type"] != "http.disconnect":
        pass
