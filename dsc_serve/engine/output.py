"""What the engine reports of a request. Free of torch; travels between processes as it is."""

from __future__ import annotations

import msgspec


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log probability of one token, and the most likely alternatives in falling order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class Delta(msgspec.Struct, array_like=True):
    """News of one request: tokens that one step added, and why it ended if it did.

    finish_reason: None while it runs, else "stop", "length", "abort", "timeout" or "error"; with the last two, `error`
    says what and `error_field` names the request's field that is to blame ("" where none is).
    logprobs has one entry per token where asked for; prompt_logprobs come as the prompt is computed, in order, over one
    or more deltas (None for the first prompt token, which nothing precedes). cached_tokens: of the prompt, those that
    were found in the prefix cache, once the request has begun.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str = ""
    error_field: str = ""
    cached_tokens: int = 0
