"""Real grammars over the fake runner's vocabulary, in their real processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from dsc_serve.grammars.follower import GrammarLimits, Grammars
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.text.tokenizer import Tokenizer
from support.fake_runner import EOS, VOCABULARY

LETTERS = 'abcdef0123{}":,[].-'
PIECES = ["ab", "cd", '":', '",', "abc", "00", "12", "{}", "ef"]  # so that a text has several spellings


def small_tokenizer() -> Tokenizer:
    """As many tokens as the fake runner has, the first of which ends a text."""
    tokens = ["<end>", *LETTERS, *PIECES]
    assert len(tokens) == VOCABULARY
    merges = [
        ("a", "b"),
        ("c", "d"),
        ('"', ":"),
        ('"', ","),
        ("ab", "c"),
        ("0", "0"),
        ("1", "2"),
        ("{", "}"),
        ("e", "f"),
    ]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", special=True)])
    return Tokenizer(backend)


SHAPES = [
    StructuredOutputs(regex="[a-f]*"),
    StructuredOutputs(regex="(ab|cd|ef){2,9}0"),
    StructuredOutputs(regex="abcabc[0-3]+(\\.[0-3]+)?"),
    StructuredOutputs(choice=("abcdef", "abc", "0123")),
    StructuredOutputs(
        json='{"type": "object", "properties": {"abc": {"type": "integer", "minimum": 0}, '
        '"cd": {"enum": ["ab", "ef"]}}, "required": ["abc", "cd"], "additionalProperties": false}',
        disable_any_whitespace=True,
    ),
]


@contextmanager
def small_grammars(most_forced: int = 7) -> Iterator[Grammars]:
    grammars = Grammars(small_tokenizer(), VOCABULARY, (EOS,), GrammarLimits(timeout_s=60.0, most_forced=most_forced))
    try:
        grammars.start()
        yield grammars
    finally:
        grammars.close()
