"""How much a JSON text may be made of: counted in its bytes, before anything is built of it."""

from __future__ import annotations

from itertools import accumulate

import msgspec

from dsc_serve.server.errors import ApiError, bad_request

MAX_DEPTH = 128
TEXT_SHARE, CONTAINER_SHARE = 4, 8  # texts, and lists and objects, cost so many times as much as numbers
ESCAPES = ((b"\\\\", b""), (b'\\"', b""))
OPENING, CLOSING = b"[{", b"]}"
STEPS = bytes.maketrans(OPENING + CLOSING, b"\x01\x01\x00\x00")
NO_BRACKETS = bytes(set(range(256)) - set(OPENING + CLOSING))


def check(body: bytes, most: int) -> None:
    """Raises ApiError (400), naming the field, for more than `most` values, or lists within lists that are too deep.

    Text that is no JSON is left to the parser, whose errors say where it is wrong.
    """
    outside = without_texts(body, most // TEXT_SHARE, body)
    containers = sum(map(outside.count, (b"[", b"{")))
    if containers > most // CONTAINER_SHARE:
        raise too_much(body, containers, "lists and objects", most // CONTAINER_SHARE)
    values = outside.count(b",") + containers
    if values > most:
        raise too_much(body, values, "values", most)
    if containers > MAX_DEPTH and depth(outside) > MAX_DEPTH:
        raise bad_request(largest_field(body), f"the body is more than {MAX_DEPTH} lists and objects deep")


def without_texts(text: bytes, most: int, body: bytes) -> bytes:
    """What stands outside of the texts. Raises ApiError for more than `most` of them."""
    if b"\\" in text:
        for escape, nothing in ESCAPES:
            text = text.replace(escape, nothing)
    texts = text.count(b'"') // 2
    if texts > most:
        raise too_much(body, texts, "texts", most)
    return b"".join(text.split(b'"')[::2])


def depth(outside: bytes) -> int:
    """Of the deepest value; 0 where more is closed than opened."""
    steps = outside.translate(STEPS, NO_BRACKETS)
    if len(steps) > 2 * steps.count(1) + 1:
        return 0
    return max(accumulate(steps, lambda level, opens: level + (1 if opens else -1), initial=0))


def too_much(body: bytes, count: int, what: str, most: int) -> ApiError:
    field = largest_field(body)
    where = f"; most of it is {field}" if field else ""
    return bad_request(field, f"the body has {count} {what}; at most {most} are allowed{where}", "invalid_value")


def largest_field(body: bytes) -> str | None:
    """The field with the longest text; None where that cannot be told."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return max(fields, key=lambda name: len(bytes(fields[name])), default="")[:120] or None
