"""The bytes that each token adds to a text.

A token is seen as bytes, not as text: a character may be spread over tokens, and only the joined bytes say what it is.
With most decoders a token's bytes depend on its neighbours only at the very start of a text; those of the others are
worked out as the text grows.
"""

from __future__ import annotations

import copy
import json
from threading import Lock
from typing import Any

import tokenizers

from dsc_serve.text.decoder_steps import byte_alphabet as byte_alphabet
from dsc_serve.text.decoder_steps import byte_level_bytes
from dsc_serve.text.decoding import Chain, is_local


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]] | None:
    """The tokenizer's decoder as a flat list of its steps; None when it has none."""
    if backend.decoder is None:
        return None
    # Only the decoder is wanted, but the library serialises nothing less than a whole tokenizer: use an empty one.
    shell = tokenizers.Tokenizer(tokenizers.models.BPE())
    shell.decoder = backend.decoder
    pending = [json.loads(shell.to_str())["decoder"]]
    steps: list[dict[str, Any]] = []
    while pending:
        step = pending.pop(0)
        if step["type"] == "Sequence":
            pending[:0] = step["decoders"]
        else:
            steps.append(step)
    return steps


class Pieces:
    """Bytes of each token of a tokenizer, worked out when first asked for.

    local: a token adds the same bytes wherever it stands after the start of a text.
    Raises ValueError when the decoder has a step of an unsupported kind.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        steps = decoder_steps(backend)
        kinds = [step["type"] for step in steps or ()]
        # As the first step it is done here, where added tokens, which are text, are known.
        self._byte_level = "ByteLevel" in kinds and set(kinds[: kinds.index("ByteLevel")]) <= {"Fuse"}
        if steps is not None and self._byte_level:
            steps = [{"type": "Fuse"}, *steps[kinds.index("ByteLevel") + 1 :]]
        self.local = steps is None or is_local(steps)
        self._backend = backend
        self._steps = steps
        self._begun = Chain(steps)  # shared where tokens are local, as nothing is held back then
        self._begun.skip_start()
        self._lock = Lock()
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self._cache: list[bytes | None] = [None] * vocab_size

    def known(self, token_id: int) -> bool:
        """Whether the tokenizer has a token of this id."""
        return 0 <= token_id < len(self._cache) and self._backend.id_to_token(token_id) is not None

    def following(self, token_id: int) -> bytes:
        """Bytes that the token adds after other tokens; none for ids that the tokenizer does not have.

        Where tokens are not local: after others that it has no dealings with.
        """
        if not 0 <= token_id < len(self._cache):
            return b""
        piece = self._cache[token_id]
        if piece is None:
            piece = self._cache[token_id] = self._after_others(token_id)
        return piece

    def leading(self, token_id: int) -> bytes:
        """Bytes of the token at the very start of a text, where some tokenizers drop the space before a word."""
        decoding = self.decoding()
        return decoding.push(token_id) + decoding.ending()

    def decoding(self) -> Decoding:
        """A text that begins."""
        return Decoding(self, Chain(self._steps))

    def source(self, token_id: int) -> bytes | None:
        """The token itself, from which the decoder makes text; None for an id that the tokenizer does not have."""
        token = self._backend.id_to_token(token_id) if 0 <= token_id < len(self._cache) else None
        if token is None:
            return None
        return byte_level_bytes(token.encode()) if self._byte_level and token_id not in self._added else token.encode()

    def _after_others(self, token_id: int) -> bytes:
        source = self.source(token_id)
        if source is None:
            return b""
        if self.local:
            with self._lock:
                return self._begun.push(source)
        chain = copy.deepcopy(self._begun)
        return chain.push(source) + chain.end()


class Decoding:
    """The bytes of one text, token by token: those that no later token can change."""

    def __init__(self, pieces: Pieces, chain: Chain) -> None:
        self._pieces = pieces
        self._chain: Chain | None = chain  # None once each token adds its own bytes

    @property
    def context_free(self) -> bool:
        """Whether from here on each token adds the bytes of `Pieces.following`."""
        return self._chain is None

    def push(self, token_id: int) -> bytes:
        """What becomes certain with this token; none for an id that the tokenizer does not have."""
        if self._chain is None:
            return self._pieces.following(token_id)
        source = self._pieces.source(token_id)
        if source is None:
            return b""
        piece = self._chain.push(source)
        if self._pieces.local and self._chain.past_start:
            self._chain = None
        return piece

    def ending(self) -> bytes:
        """What would follow if no more tokens came."""
        return b"" if self._chain is None else copy.deepcopy(self._chain).end()
