"""Follows a grammar without a model."""

from __future__ import annotations

import numpy as np

from dsc_serve.grammars.constraint import Constraint, wait
from dsc_serve.grammars.follower import Grammars
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer

PATIENCE_S = 60.0


def answered(constraint: Constraint) -> Constraint:
    assert wait([constraint], PATIENCE_S), "no answer came"
    return constraint


def written(grammars: Grammars, tokenizer: Tokenizer, asked: StructuredOutputs, seed: int, limit: int = 600) -> str:
    """A text of allowed tokens, drawn evenly; `tests.grammars.conftest.END` ends it."""
    grammars.compile(asked)
    constraint, draw = grammars.constraint(asked), np.random.default_rng(seed)
    tokens: list[int] = []
    try:
        while not answered(constraint).complete:
            assert not constraint.error, constraint.error
            assert len(tokens) < limit, f"no end: {tokenizer.decode(tokens)!r}"
            token = int(draw.choice(np.flatnonzero(constraint.allowed)))
            if token == 0:
                break
            tokens.append(token)
            constraint.push(token)
    finally:
        constraint.close()
    return b"".join(map(tokenizer.token_bytes, tokens)).decode()
