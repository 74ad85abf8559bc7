"""What origins and paths of the web may look like in settings."""

from __future__ import annotations

import re
from collections.abc import Sequence

ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\sA-Z]+")  # as browsers send it
ROOT_PATH = re.compile(r"(/(?!\.\.?(/|$))[A-Za-z0-9._~-]{1,100}){1,16}")
OWN_PATHS = (  # what the first parts of the server's own are called
    "admin", "detokenize", "docs", "health", "metrics", "openapi.json", "page", "redoc", "tokenize", "v1", "version",
)  # fmt: skip


def wrong_origin(origins: Sequence[str]) -> str:
    """What is wrong with the first of them that is no origin; "": nothing."""
    allowed = "allowed: * or a scheme and a host in small letters, such as https://chat.example:8443"
    wrong = (origin for origin in origins if not ORIGIN.fullmatch(origin))
    return next((f"cors_origins has {origin!r}, which no browser sends; {allowed}" for origin in wrong), "")


def wrong_root_path(path: str) -> str:
    """What is wrong with the path of a server behind a proxy; "": nothing. The empty one is that of none."""
    if not path:
        return ""
    if not ROOT_PATH.fullmatch(path):
        names = "names of letters, digits and . _ ~ -, each after a slash, such as /llm, with no slash at the end"
        return f"root_path is {path!r}; it must be empty or {names}"
    if path.split("/")[1] in OWN_PATHS:
        return f"root_path is {path!r}; it must not begin as the server's own paths do: {', '.join(OWN_PATHS)}"
    return ""
