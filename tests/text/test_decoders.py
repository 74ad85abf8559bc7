"""Decoders of all steps in any order: whole and token by token the text is what the library makes of the list."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models

from dsc_serve.text.detokenize import IncrementalDetokenizer
from dsc_serve.text.tokenizer import Tokenizer

TOKENS = [
    *(
        "a",
        "b",
        "ab",
        "ba",
        " ",
        "  ",
        "x y",
        "a|b",
        "é",
        ".",
        " .",
        "'s",
        " '",
        "n't",
        " n",
        "'t",
        " do",
        "do",
        " not",
    ),
    *("▁", "▁a", "a▁", "##", "##a", "##b", "</w>", "a</w>", "</w>b", "</", "w>", "<pad>", "<pa", "d>", "|"),
    *("Ġ", "Ġa", "<0x41>", "<0x20>", "<0xE2>", "<0x96>", "<0x81>", "<", "<0x", "0x41>"),
]
VOCAB = {token: i for i, token in enumerate(TOKENS)}
TEXTS = st.sampled_from(["a", "ab", "aba", " ", "  ", "▁", "aa", "b a", "</w>", "é"])
CONTENTS = st.sampled_from(["", " ", "c", "ab", "aab"])
CHARS = st.sampled_from([" ", "a", "▁"])
STEP = st.one_of(
    st.builds(decoders.Replace, TEXTS, CONTENTS),
    st.builds(
        lambda pattern, to: decoders.Replace(Regex(pattern), to), st.sampled_from(["a+", "[ab]", "b$"]), CONTENTS
    ),
    st.builds(decoders.ByteFallback),
    st.builds(decoders.Fuse),
    st.builds(decoders.ByteLevel),
    st.builds(lambda char, start: decoders.Strip(char, start, 0), CHARS, st.integers(0, 3)),
    st.builds(lambda char, stop: decoders.Strip(char, 0, stop), CHARS, st.integers(0, 2)),
    st.builds(lambda scheme: decoders.Metaspace(prepend_scheme=scheme), st.sampled_from(["always", "never", "first"])),
    st.builds(decoders.WordPiece, st.sampled_from(["##", "a", ""]), st.booleans()),
    st.builds(decoders.BPEDecoder, st.sampled_from(["</w>", "a"])),
    st.builds(lambda clean: decoders.CTC(cleanup=clean), st.booleans()),
)
STEPS = st.lists(STEP, min_size=1, max_size=4)
IDS = st.lists(st.integers(0, len(TOKENS) - 1), max_size=12)
BYTE_LEVEL_AGAIN = {("Fuse", "ByteLevel"), ("ByteLevel", "ByteLevel")}  # see `decoding.build`


def library(steps: list[Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel(VOCAB, unk_token="a"))
    backend.decoder = decoders.Sequence(steps)
    return backend


def decoded(backend: tokenizers.Tokenizer, ids: list[int]) -> str:
    """The library's text; examples in which it breaks down, or finds characters that are none, are left out."""
    try:
        text: str = backend.decode(ids)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # Strip, of a token that is shorter than what it may lose
            raise
        assume(False)
    assume("�" not in text)
    return text


def incremental(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt)
    return [*(detokenizer.push([id]) for id in ids), detokenizer.flush()]


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, ids=IDS)
def test_the_text_is_the_library_s(steps: list[Any], ids: list[int]) -> None:
    kinds = [json.loads(step.__getstate__())["type"] for step in steps]
    assume(BYTE_LEVEL_AGAIN.isdisjoint(itertools.pairwise(kinds)))
    backend = library(steps)
    expected = decoded(backend, ids)
    tokenizer = Tokenizer(backend)
    found = tokenizer.decode(ids)
    assume("�" not in found)
    assert found == expected, (steps, ids)
    assert "".join(incremental(tokenizer, [], ids)) == expected


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, prompt=IDS, ids=IDS)
def test_generated_text_goes_on_where_the_prompt_s_ends(steps: list[Any], prompt: list[int], ids: list[int]) -> None:
    tokenizer = Tokenizer(library(steps))
    before, whole = tokenizer.decode(prompt), tokenizer.decode([*prompt, *ids])
    assume(whole.startswith(before) and not before.endswith("�"))
    assert before + "".join(incremental(tokenizer, prompt, ids)) == whole


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, ids=IDS, more=IDS)
def test_what_is_released_no_later_token_changes(steps: list[Any], ids: list[int], more: list[int]) -> None:
    tokenizer = Tokenizer(library(steps))
    assert tokenizer.decode([*ids, *more]).startswith("".join(incremental(tokenizer, [], ids)[:-1]))


@settings(max_examples=150, deadline=None)
@given(steps=STEPS, ids=IDS, token=st.integers(0, len(TOKENS) - 1))
def test_local_tokens_add_the_same_bytes_everywhere(steps: list[Any], ids: list[int], token: int) -> None:
    tokenizer = Tokenizer(library(steps))
    assume(tokenizer.local)
    decoding = tokenizer.decoding()
    for id in ids:
        decoding.push(id)
    assume(decoding.context_free)
    text = "".join(incremental(tokenizer, [], ids)[:-1])
    assume("�" not in text)
    added = tokenizer.token_bytes(token)
    whole = tokenizer.decode([*ids, token]).encode()
    assert b"\xef\xbf\xbd" in whole or whole == tokenizer.decode(ids).encode() + added


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]


@pytest.mark.parametrize(
    ("steps", "tokens", "pieces"),
    [
        ([decoders.Fuse(), decoders.Replace("</w>", " ")], ["a", "</", "w>", "b", "</", "b"], "a,,' ',b,,</b,"),
        ([decoders.Fuse(), decoders.Replace("aba", "c")], ["a", "b", "a", "b", "a"], ",,c,b,,a"),
        ([decoders.Fuse(), decoders.Strip(" ", 0, 1)], ["a", " ", " ", "b", " "], "a,,' ',' b',,"),
        ([decoders.Fuse(), decoders.Strip(" ", 2, 0)], [" ", " ", " ", "a"], ",,' ',a,"),
        (
            [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " ")],
            ["<0xE2>", "<0x96>", "<0x81>"],
            ",,' ',",
        ),
        ([decoders.BPEDecoder()], ["a</w>", "b", "a</w>"], "a,' b',a,"),
        ([decoders.CTC()], ["a", "a", "<pad>", "a", "|", "b"], "a,,,a,' ',b,"),
        ([decoders.WordPiece()], ["a", "##b", ".", "'s"], "a,b,.,'s,"),
        ([decoders.Metaspace()], ["▁a", "▁a", "b"], "a,' a',b,"),
        ([decoders.Fuse(), decoders.Metaspace()], ["▁a", "▁a", "b"], "a,a,b,"),
        ([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)], ["▁a", "▁a"], "a,a,"),
        (LLAMA, ["▁a", "▁a", "<0xE2>", "<0x96>", "<0x81>"], "a,' a',,,▁,"),
    ],
    ids=str,
)
def test_steps_that_look_across_tokens_stream(steps: list[Any], tokens: list[str], pieces: str) -> None:
    backend = library(steps)
    ids = [VOCAB[token] for token in tokens]
    released = incremental(Tokenizer(backend), [], ids)
    assert released == [piece.strip("'") if " " in piece else piece for piece in pieces.split(",")]
    assert "".join(released) == backend.decode(ids)


def test_common_decoders_are_local() -> None:
    local = {
        "byte level": [decoders.ByteLevel()],
        "llama": LLAMA,
        "gemma": [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()],
        "metaspace": [decoders.Metaspace()],
        "word pieces": [decoders.WordPiece()],
        "fused, one byte": [decoders.Fuse(), decoders.Replace("_", " ")],
    }
    assert [name for name, steps in local.items() if not Tokenizer(library(steps)).local] == []
    others = [
        [decoders.Fuse(), decoders.Replace("ab", "c")],
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("é", "e")],
        [decoders.ByteFallback(), decoders.Strip(" ", 1, 0)],
        [decoders.Fuse(), decoders.Strip(" ", 0, 1)],
        [decoders.CTC()],
        [decoders.BPEDecoder()],
    ]
    assert [steps for steps in others if Tokenizer(library(steps)).local] == []


def test_a_step_that_would_match_everywhere_is_refused() -> None:
    backend = library([decoders.Fuse(), decoders.BPEDecoder("")])
    with pytest.raises(ValueError, match="decoder BPEDecoder has an empty suffix, which would be found everywhere"):
        Tokenizer(backend)
