"""Which tokenizers structured outputs work with."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import decoders, models

from dsc_serve.sampling_params import ParameterError, StructuredOutputs
from dsc_serve.text.grammar import Grammars
from dsc_serve.text.tokenizer import Tokenizer


def test_grammars_are_refused_where_a_token_s_text_depends_on_its_neighbours() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    asked = StructuredOutputs(regex="a+")
    for steps, works in (([decoders.Fuse(), decoders.Replace("ab", "c")], False), ([decoders.Fuse()], True)):
        backend.decoder = decoders.Sequence(steps)
        grammars = Grammars(Tokenizer(backend), 2)
        if works:
            assert grammars.constraint(asked).allowed([], 0).tolist() == [True, False]
            continue
        with pytest.raises(ParameterError, match="a token's text depends on those around it"):
            grammars.constraint(asked)
