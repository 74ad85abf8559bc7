"""What the engine reports of a request. Free of torch; travels between processes as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from dsc_serve.adapter_choice import AdapterAccidentError, UnknownAdapterError
from dsc_serve.parameter_errors import ParameterError


class TokenLogprobs(msgspec.Struct, array_like=True):
    """Log probability of one token, and the most likely alternatives in falling order."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


class RoutingSlice(msgspec.Struct, array_like=True):
    """What consecutive tokens of a request picked: the k strongest atoms of each layer, strongest first.

    The arrays are packed in little-endian order.
    """

    start: int  # the position of the first token
    shape: tuple[int, int, int]  # tokens, layers, k
    atoms: bytes  # int32 [tokens, layers, k]
    coefficients: bytes  # float32 [tokens, layers, k]
    signal: bytes  # float32 [tokens, layers]

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

    def before(self, end: int) -> RoutingSlice:
        """Of the tokens at positions before `end` alone."""
        count = max(0, end - self.start)
        atoms, coefficients, signal = self.arrays
        return RoutingSlice.packed(self.start, atoms[:count], coefficients[:count], signal[:count])

    @classmethod
    def joined(cls, parts: Sequence[RoutingSlice]) -> RoutingSlice:
        """One for parts that follow each other; at least one."""
        tokens = sum(part.shape[0] for part in parts)
        packed = (b"".join(getattr(part, name) for part in parts) for name in ("atoms", "coefficients", "signal"))
        return cls(parts[0].start, (tokens, *parts[0].shape[1:]), *packed)


class Delta(msgspec.Struct, array_like=True):
    """What one step has to say of one request."""

    request_id: str
    token_ids: list[int]
    finish_reason: str | None = None  # None while it runs, else stop, length, abort, timeout or error
    logprobs: list[TokenLogprobs] | None = None  # one for each token, where asked for
    prompt_logprobs: list[TokenLogprobs | None] | None = (
        None  # in order, over one or more deltas; None: the first token
    )
    error: str = ""  # of finish reasons timeout and error: what happened
    error_field: str = ""  # and the request's field that is to blame, if any
    unknown: bool = False  # because there is nothing of the name that the field says
    cached_tokens: int = 0  # of the prompt, found in the prefix cache, once the request has begun
    queued_s: float = 0.0  # that it waited for that
    routing: RoutingSlice | None = None  # of the tokens that the step computed, where asked for
    unavailable: bool = False  # of an error: nothing is wrong with the request, which may be sent again
    embedding: bytes | None = None  # float32, little-endian, with the end of a request that asks for one
    prediction: tuple[int, int] = (0, 0)  # tokens of the predicted text that were tried: those that were right, and not


def refusal(request_id: str, error: Exception) -> Delta:
    """The end of a request that the engine does not take, for its client: whose fault it is, and no name of others."""
    if isinstance(error, AdapterAccidentError):
        return Delta(request_id, [], "error", error=str(error), unavailable=True)
    unknown = isinstance(error, UnknownAdapterError)
    text = error.short if isinstance(error, UnknownAdapterError) else str(error)
    field = error.field if isinstance(error, ParameterError) else ""
    return Delta(request_id, [], "error", error=text, error_field=field, unknown=unknown)
