"""Tokenizers of both kinds, each with the grammars of its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from text.conftest import metaspace_backend

from dsc_serve.config import resolve_model
from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.text.tokenizer import Tokenizer

END = 0


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    """Byte-level BPE, of the embedded model."""
    loaded = Tokenizer.load(resolve_model("dsc-tiny"))
    assert loaded is not None
    return loaded


@pytest.fixture(scope="session", params=["byte level", "metaspace"])
def tokenizer(request: pytest.FixtureRequest, bytes_tokenizer: Tokenizer) -> Tokenizer:
    return bytes_tokenizer if request.param == "byte level" else Tokenizer(metaspace_backend())


@pytest.fixture(scope="session")
def grammars(tokenizer: Tokenizer) -> Iterator[Grammars]:
    # What is tested with these is what they say, not how fast a busy machine is.
    made = Grammars(tokenizer, tokenizer.vocab_size, (END,), GrammarLimits(timeout_s=60.0))
    yield made
    made.close()


@pytest.fixture
def make(bytes_tokenizer: Tokenizer) -> Iterator[Callable[..., Grammars]]:
    made: list[Grammars] = []

    def make(**limits: float) -> Grammars:
        tokens = bytes_tokenizer
        made.append(Grammars(tokens, tokens.vocab_size, (END,), GrammarLimits(**limits)))  # type: ignore[arg-type]
        made[-1].start()
        return made[-1]

    yield make
    for grammars in made:
        grammars.close()
