"""Log probabilities of tokens as chats and responses tell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dsc_serve.server.answer import Reached
from dsc_serve.server.service import Service
from dsc_serve.worker.messages import TokenLogprobs

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


def logprob_entries(service: Service, entries: Sequence[TokenLogprobs | None]) -> list[dict[str, Any]]:
    """One for each token, with the likeliest ones in its place; none for tokens that nothing stands before."""
    return [
        {
            **logprob_entry(service, entry.token_id, entry.logprob),
            "top_logprobs": [logprob_entry(service, token_id, logprob) for token_id, logprob in entry.top],
        }
        for entry in entries
        if entry is not None
    ]


class UntoldLogprobs:
    """Those of tokens whose text is part of nothing yet: it is held back, since it may be a mark of something else."""

    def __init__(self) -> None:
        self._entries: list[tuple[dict[str, Any], int]] = []  # each with where its text ends; -1: it has still to come
        self._characters = 0  # of the text so far

    def add(self, entry: dict[str, Any], reached: Reached) -> list[dict[str, Any]]:
        """A further token's. Returns those whose text is now part of something, or of nothing for good."""
        self._characters += reached.added
        self._entries.append((entry, -1))
        if reached.added:  # the text of those before that had none came with it
            self._entries = [(one, self._characters if end < 0 else end) for one, end in self._entries]
        known = self._characters - reached.held
        told = [one for one, end in self._entries if 0 <= end <= known]
        self._entries = [(one, end) for one, end in self._entries if not 0 <= end <= known]
        return told

    def rest(self) -> list[dict[str, Any]]:
        """All that are left when the answer has ended."""
        told, self._entries = [one for one, _ in self._entries], []
        return told


def logprob_entry(service: Service, token_id: int, logprob: float) -> dict[str, Any]:
    tokenizer = service.tokenizer
    return {
        "token": service.token_name(token_id),
        "logprob": max(logprob, LOWEST_LOGPROB),
        "bytes": None if tokenizer is None else list(tokenizer.token_bytes(token_id)),
    }
