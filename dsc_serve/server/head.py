"""What the head of a request must be before anything is made of it, by RFC 9112."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsc_serve.server.errors import ApiError, shown

MAX_HEADERS = 256  # each becomes objects that are far larger than its bytes
VERSIONS = ("1.0", "1.1")
HOST = re.compile(rb"[\w.~!$&'()*+,;=%-]*(:\d*)?|\[[\dA-Fa-f:.]+\](:\d*)?", re.ASCII)


def fault(version: str, headers: Sequence[tuple[bytes, bytes]]) -> ApiError | None:
    """What is wrong with a head, names in small letters; None: nothing."""
    if version not in VERSIONS:
        return invalid(f"the version is HTTP/{version}; it must be HTTP/1.0 or HTTP/1.1")
    if len(headers) > MAX_HEADERS:
        return ApiError(431, f"there are more than {MAX_HEADERS} headers", code="headers_too_large")
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (not hosts and version != "1.0"):
        return invalid(f"there are {len(hosts)} Host headers; there must be one")
    if hosts and not HOST.fullmatch(hosts[0]):
        return invalid(f"host is {text(hosts[0])}; it must be a name or an address, and a port")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and version == "1.0":
        return invalid("transfer-encoding is set; HTTP/1.0 has none")
    if codings and codings[0].strip().lower() != b"chunked":  # the parser has refused a second one
        message = f"transfer-encoding is {text(codings[0])}; it must be chunked alone"
        return ApiError(501, message, code="unsupported_transfer_encoding")
    return None


def invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_http")


def text(value: bytes) -> str:
    return shown(value.decode("latin-1"))
