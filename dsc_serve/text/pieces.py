"""The bytes that each token adds to a text.

A token is seen as bytes, not as text: a character may be spread over tokens, and only the joined bytes say what it is.
For every decoder supported here a token's bytes do not depend on its neighbours, only on whether it comes first.
"""

from __future__ import annotations

import json
import re

import tokenizers

LOCAL_DECODERS = ("ByteLevel", "ByteFallback", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


def decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, object]]:
    """The tokenizer's decoder as a flat list of its steps."""
    # Only the decoder is wanted, but the library serialises nothing less than a whole tokenizer: use an empty one.
    shell = tokenizers.Tokenizer(tokenizers.models.BPE())
    if backend.decoder is not None:
        shell.decoder = backend.decoder
    pending = [json.loads(shell.to_str())["decoder"]]
    steps: list[dict[str, object]] = []
    while pending:
        step = pending.pop(0)
        if step is None:
            continue
        if step["type"] == "Sequence":
            pending[:0] = step["decoders"]
        else:
            steps.append(step)
    return steps


class Pieces:
    """Bytes of each token of a tokenizer, worked out when first asked for.

    Raises ValueError when the decoder is of a kind whose tokens cannot be told apart from their neighbours.
    """

    def __init__(self, backend: tokenizers.Tokenizer, vocab_size: int) -> None:
        steps = decoder_steps(backend)
        kinds = {str(step["type"]) for step in steps}
        unknown = kinds.difference(LOCAL_DECODERS)
        if unknown:
            raise ValueError(f"decoder {sorted(unknown)[0]} is not supported; allowed: {', '.join(LOCAL_DECODERS)}")
        if "ByteLevel" in kinds and not kinds <= {"ByteLevel", "Fuse"}:
            raise ValueError(f"decoder ByteLevel is not supported together with {', '.join(sorted(kinds))}")
        if any(step["type"] == "Strip" and step["stop"] for step in steps):
            raise ValueError("decoder Strip is not supported with a stop above 0")
        self._backend = backend
        self._decoder = backend.decoder
        self._alphabet = byte_alphabet() if "ByteLevel" in kinds else None
        self._byte_fallback = "ByteFallback" in kinds
        self._added = {id: token.content for id, token in backend.get_added_tokens_decoder().items()}
        self._cache: list[bytes | None] = [None] * vocab_size

    def known(self, token_id: int) -> bool:
        """Whether the tokenizer has a token of this id."""
        return 0 <= token_id < len(self._cache) and self._backend.id_to_token(token_id) is not None

    def following(self, token_id: int) -> bytes:
        """Bytes that the token adds after other tokens; none for ids that the tokenizer does not have."""
        if not 0 <= token_id < len(self._cache):
            return b""
        piece = self._cache[token_id]
        if piece is None:
            piece = self._cache[token_id] = self._bytes(token_id, first=False)
        return piece

    def leading(self, token_id: int) -> bytes:
        """Bytes of the token at the very start of a text, where some tokenizers drop the space before a word."""
        return self._bytes(token_id, first=True) if 0 <= token_id < len(self._cache) else b""

    def _bytes(self, token_id: int, first: bool) -> bytes:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._alphabet is not None:
            if token_id in self._added or not all(char in self._alphabet for char in token):
                return token.encode()
            return bytes(self._alphabet[char] for char in token)
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte is not None and (not first or byte[1] != "20"):
            return bytes.fromhex(byte[1])
        if self._decoder is None:
            return token.encode() if first else b" " + token.encode()
        # What the token adds after a plain letter, which no decoder changes.
        text: str = self._decoder.decode([token] if first else ["a", token])
        return (text if first else text.removeprefix("a")).encode()
