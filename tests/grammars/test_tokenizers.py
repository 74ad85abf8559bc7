"""Which tokenizers structured outputs work with."""

from __future__ import annotations

import pytest
import tokenizers
from grammars.drawing import answered
from tokenizers import decoders, models

from dsc_serve.grammars.follower import Grammars
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer


def test_grammars_are_refused_where_a_token_s_text_depends_on_its_neighbours() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    asked = StructuredOutputs(regex="a+")
    for steps, works in (([decoders.Fuse(), decoders.Replace("ab", "c")], False), ([decoders.Fuse()], True)):
        backend.decoder = decoders.Sequence(steps)
        grammars = Grammars(Tokenizer(backend), 2)
        if works:
            assert answered(grammars.constraint(asked)).allowed.tolist() == [True, False]
            grammars.close()
            continue
        for attempt in (grammars.constraint, grammars.compile):
            with pytest.raises(ParameterError, match="a token's text depends on those around it"):
                attempt(asked)
