"""What a request may take of the tokens that its key has in a minute."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dsc_serve.server.answer import Choice
from dsc_serve.server.errors import bad_request


def claim(choices: Sequence[Choice], prompt_tokens: int, room: int, allowed: int, field: str) -> int:
    """Tokens to set aside for a request before it begins: its prompts, each counted once, and its outputs.

    room: tokens of a prompt and its output that the engine holds. allowed: what the key may use in a minute, 0 for any
    number. Outputs whose length the request leaves open are cut so that all of it can be let in.
    Raises ApiError (400), naming `field`, where it never could be.
    """
    unbounded = [choice for choice in choices if choice.params.max_tokens is None]
    fixed = prompt_tokens + sum(choice.params.max_tokens or 0 for choice in choices)
    whole = fixed + sum(room - len(choice.prompt) for choice in unbounded)
    if not 0 < allowed < whole:
        return whole
    shortest = max((1, *(choice.params.min_tokens for choice in unbounded)))
    each = (allowed - fixed) // len(unbounded) if unbounded else 0
    if not unbounded or each < shortest:
        least = fixed + shortest * len(unbounded)
        message = f"the request takes up to {least} tokens, and this key may use {allowed} in a minute"
        raise bad_request(field, f"{message}; lower {field}, or send less in one request")
    for choice in unbounded:
        choice.params = msgspec.structs.replace(choice.params, max_tokens=each)
    return fixed + each * len(unbounded)
