"""Why a grammar is not there that was not its sender's fault."""

from __future__ import annotations


class GrammarsFullError(RuntimeError):
    """Too many grammars wait to be compiled."""


class GrammarsLostError(RuntimeError):
    """The processes of grammars have ended, or none can be had. What was asked for may be right: ask again."""
