"""What routing leaves behind, step by step: counts of atoms, and bitmaps of the atoms that requests and token ids pick.

A bitmap has 1,024 bits. Where layers and atoms are many, it follows a fixed sample of them, so that what a few hundred
tokens pick does not fill it; what two bitmaps share then estimates what their owners share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsc_kernels import native
from dsc_kernels.min_hash import scramble
from dsc_kernels.native.extension import kernels

WORDS = 16
BITS = 64 * WORDS
VOCABULARY_ROWS = 16384
FILL = 0.35  # of a bitmap that TYPICAL_TOKENS may fill
TYPICAL_TOKENS = 256

Bitmap = NDArray[np.uint64]


class Signature(NamedTuple):
    """A bitmap uint64 [16] and where it lies."""

    bits: Bitmap
    address: int

    @classmethod
    def empty(cls) -> Signature:
        bits = np.zeros(WORDS, dtype=np.uint64)
        return cls(bits, bits.ctypes.data)


class Sketch:
    """Sums over the steps of a model with `layers` layers of `atoms` atoms, `k` of them picked per token.

    counts int64 [layers, atoms]: how often each atom was picked; distinct int64 [layers]: different atoms of a step,
    summed over steps; vocabulary uint64 [rows, 16]: what each token id picked when it was last seen.
    """

    def __init__(self, layers: int, atoms: int, k: int, vocab_size: int) -> None:
        self.layers, self.atoms, self.k = layers, atoms, k
        self.divisor = max(1, round(min(layers * atoms, TYPICAL_TOKENS * k * layers / FILL) / BITS))
        self.counts = np.zeros((layers, atoms), dtype=np.int64)
        self.distinct = np.zeros(layers, dtype=np.int64)
        self.vocabulary = np.zeros((min(vocab_size, VOCABULARY_ROWS), WORDS), dtype=np.uint64)
        self.steps = self.tokens = 0
        self._last = np.full((layers, atoms), -1, dtype=np.int32)
        self._native = native.active() is not None
        self._held = (self.vocabulary, self.counts, self._last, self.distinct)
        self._addresses = {
            "vocabulary": self.vocabulary.ctypes.data,
            "counts": self.counts.ctypes.data,
            "last": self._last.ctypes.data,
            "distinct": self.distinct.ctypes.data,
        }

    def observe(
        self,
        picks: NDArray[np.int32],
        token_ids: NDArray[np.int64],
        owners: NDArray[np.int64],
        signatures: Sequence[Signature],
    ) -> None:
        """Take in a step: picks [layers, T, k], in which each layer lies in one piece; token_ids and owners [T].

        signatures: the requests' bitmaps, which gain what was picked; owners index them.
        """
        layers, tokens, k = picks.shape
        if picks.dtype != np.int32 or (layers, k) != (self.layers, self.k) or not picks[0].flags.c_contiguous:
            wanted = f"int32 [{self.layers}, T, {self.k}], each layer in one piece"
            raise ValueError(f"picks are {picks.dtype} {picks.shape}; expected {wanted}")
        for name, column in (("token_ids", token_ids), ("owners", owners)):
            if column.dtype != np.int64 or column.shape != (tokens,) or not column.flags.c_contiguous:
                raise ValueError(f"{name} are {column.dtype} {column.shape}; expected int64 [{tokens}] in one piece")
        self.steps, self.tokens = self.steps + 1, self.tokens + tokens
        if not tokens:
            return
        if not self._native:
            self._observe(picks, token_ids, owners, signatures)
            return
        targets = np.array([signature.address for signature in signatures], dtype=np.uint64)
        kernels.sketch(
            picks=picks.ctypes.data,
            token_ids=token_ids.ctypes.data,
            owners=owners.ctypes.data,
            signatures=targets.ctypes.data,
            vocabulary=self._addresses["vocabulary"],
            counts=self._addresses["counts"],
            last=self._addresses["last"],
            distinct=self._addresses["distinct"],
            layers=layers,
            tokens=tokens,
            k=k,
            atoms=self.atoms,
            layer_stride=picks.strides[0] // 4,
            rows=len(self.vocabulary),
            divisor=self.divisor,
            step=self.steps,
            requests=len(signatures),
        )

    def predict(self, token_ids: Sequence[int]) -> Bitmap | None:
        """What tokens are expected to pick, from when each was last seen; None where none ever was."""
        rows = self.vocabulary[np.array(token_ids, dtype=np.int64) % len(self.vocabulary)]
        united: Bitmap = np.bitwise_or.reduce(rows)
        return united if united.any() else None

    def _observe(
        self,
        picks: NDArray[np.int32],
        token_ids: NDArray[np.int64],
        owners: NDArray[np.int64],
        signatures: Sequence[Signature],
    ) -> None:
        flat = (picks.astype(np.int64) + np.arange(self.layers)[:, None, None] * self.atoms).transpose(1, 0, 2)
        unique, times = np.unique(flat, return_counts=True)
        self.counts.reshape(-1)[unique] += times
        self.distinct += np.bincount(unique // self.atoms, minlength=self.layers)
        hashes = scramble(flat.reshape(len(token_ids), -1))
        tokens, columns = np.nonzero(hashes % self.divisor == 0)
        bits = hashes[tokens, columns] // self.divisor % BITS
        words, masks = bits // 64, np.left_shift(np.uint64(1), (bits % 64).astype(np.uint64))
        rows = token_ids % len(self.vocabulary)
        self.vocabulary[rows] = 0
        np.bitwise_or.at(self.vocabulary, (rows[tokens], words), masks)
        gained = np.zeros((len(signatures), WORDS), dtype=np.uint64)
        np.bitwise_or.at(gained, (owners[tokens], words), masks)
        for signature, new in zip(signatures, gained, strict=True):
            signature.bits[:] |= new
