"""What the engine reports of a request. Free of torch; travels between processes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log probability of one token, and the most likely alternatives in falling order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class RoutingSlice(msgspec.Struct, array_like=True):
    """What consecutive tokens of a request picked: the k strongest atoms of each layer, strongest first.

    start: the position of the first token. shape: tokens, layers, k. Packed in little-endian order: atoms int32
    [tokens, layers, k], coefficients float32 [tokens, layers, k], signal float32 [tokens, layers].
    """

    start: int
    shape: tuple[int, int, int]
    atoms: bytes
    coefficients: bytes
    signal: bytes

    @classmethod
    def packed(
        cls, start: int, atoms: NDArray[np.integer], coefficients: NDArray[np.float32], signal: NDArray[np.float32]
    ) -> Self:
        tokens, layers, k = atoms.shape
        parts = atoms.astype("<i4"), coefficients.astype("<f4"), signal.astype("<f4")
        return cls(start, (tokens, layers, k), *(part.tobytes() for part in parts))

    @property
    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]:
        """atoms, coefficients and signal."""
        return (
            np.frombuffer(self.atoms, "<i4").reshape(self.shape),
            np.frombuffer(self.coefficients, "<f4").reshape(self.shape),
            np.frombuffer(self.signal, "<f4").reshape(self.shape[:2]),
        )

    @classmethod
    def joined(cls, parts: Sequence[RoutingSlice]) -> RoutingSlice:
        """One for parts that follow each other; at least one."""
        tokens = sum(part.shape[0] for part in parts)
        packed = (b"".join(getattr(part, name) for part in parts) for name in ("atoms", "coefficients", "signal"))
        return cls(parts[0].start, (tokens, *parts[0].shape[1:]), *packed)


class Delta(msgspec.Struct, array_like=True):
    """News of one request: tokens that one step added, and why it ended if it did.

    finish_reason: None while it runs, else "stop", "length", "abort", "timeout" or "error"; with the last two, `error`
    says what and `error_field` names the request's field that is to blame ("" where none is).
    logprobs has one entry per token where asked for; prompt_logprobs come as the prompt is computed, in order, over one
    or more deltas (None for the first prompt token, which nothing precedes). cached_tokens: of the prompt, those that
    were found in the prefix cache, once the request has begun. queued_s: seconds that it waited for that.
    routing: of the tokens that the step computed, where asked for.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    error: str = ""
    error_field: str = ""
    cached_tokens: int = 0
    queued_s: float = 0.0
    routing: RoutingSlice | None = None
