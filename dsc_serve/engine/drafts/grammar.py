"""Drafts that a grammar forces: keys and punctuation of a JSON answer cost no step of their own."""

from __future__ import annotations

from collections.abc import Sequence

from dsc_serve.engine.drafts.drafting import DraftSource
from dsc_serve.grammars.constraint import Constraint


class GrammarSource(DraftSource):
    """The tokens that must follow, as far as the grammar's last answer says what may follow each of them.

    That answer came with the mask for the first of them, so that nothing is waited for and nothing taken back.
    """

    def __init__(self, constraint: Constraint) -> None:
        self._constraint = constraint

    def draft(self, tokens: Sequence[int], most: int) -> tuple[Sequence[int], int]:
        return self._constraint.forced(most), 0
