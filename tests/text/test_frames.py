"""The tokens that a tokenizer puts around every text: the same in every load, whatever its vocabulary."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors

from dsc_serve.text.tokenizer import Tokenizer, own_frame

Frame = tuple[list[int], list[int]]
Processor = Any
MARKS = ["<s>", "</s>", "<x>"]
TEMPLATES = ["$A", "<s> $A", "$A </s>", "<s> $A </s>", "<s> <x> $A </s> </s>", "<x>:1 $A:0", "<wide> $A <x>"]


def template(text: str, ids: dict[str, int]) -> tuple[Processor, Frame]:
    """A template's processor, and the frame that it spells; <wide> stands for two tokens."""
    marks: list[Any] = [(token, ids[token]) for token in MARKS]
    marks.append({"id": "<wide>", "ids": [ids["<x>"], ids["<s>"]], "tokens": ["<x>", "<s>"]})
    parts = [part.split(":")[0] for part in text.split()]
    place = parts.index("$A")
    spelt = [
        [i for part in half for i in ([ids["<x>"], ids["<s>"]] if part == "<wide>" else [ids[part]])]
        for half in (parts[:place], parts[place + 1 :])
    ]
    return processors.TemplateProcessing(text, special_tokens=marks), (spelt[0], spelt[1])


FORMS: dict[str, Callable[[dict[str, int]], tuple[Processor, Frame]]] = {
    **{text: (lambda ids, text=text: template(text, ids)) for text in TEMPLATES},  # type: ignore[misc]
    "nothing": lambda ids: (None, ([], [])),
    "byte level": lambda ids: (processors.ByteLevel(), ([], [])),
    "BERT": lambda ids: (
        processors.BertProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"])),
        ([ids["<s>"]], [ids["</s>"]]),
    ),
    "RoBERTa": lambda ids: (
        processors.RobertaProcessing(("</s>", ids["</s>"]), ("<s>", ids["<s>"])),
        ([ids["<s>"]], [ids["</s>"]]),
    ),
    "a sequence": lambda ids: (
        processors.Sequence([processors.ByteLevel(trim_offsets=True), template("<s> $A </s>", ids)[0]]),
        ([ids["<s>"]], [ids["</s>"]]),
    ),
    "a sequence of two": lambda ids: (
        processors.Sequence([template("<x> $A", ids)[0], template("<s> $A </s>", ids)[0]]),
        ([ids["<x>"]], []),  # the library heeds the first
    ),
}


def backend(words: list[str], number: int) -> tokenizers.Tokenizer:
    """Words, of which some are marks, vanish, or become others before they are looked up."""
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*words, *MARKS]))}
    built = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=words[0] if words else "<x>"))
    built.normalizer = normalizers.Sequence([normalizers.Strip(), normalizers.Replace("~", "")])
    built.pre_tokenizer = [pre_tokenizers.Whitespace(), pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()][
        number
    ]
    built.add_tokens([AddedToken(mark, special=True, normalized=False, rstrip=number == 1) for mark in MARKS])
    return built


WORDS = st.lists(st.sampled_from(["", " ", "~", "a", "<s>x", "</s>", "b c", "é", "<", "~~", "<s><s>"]), max_size=6)


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=40)
@given(words=WORDS, number=st.integers(0, 2), flags=st.tuples(*[st.sampled_from([None, True, False])] * 2))
def test_a_frame_is_found_whatever_the_vocabulary(
    form: str, words: list[str], number: int, flags: tuple[bool | None, bool | None]
) -> None:
    built = backend(words, number)
    ids = {mark: built.token_to_id(mark) for mark in MARKS}
    processor, frame = FORMS[form](ids)
    if processor is not None:
        built.post_processor = processor
    assert own_frame(built) == frame
    for text in ("a", "", "b c <s> a"):
        assert built.encode(text).ids == [*frame[0], *built.encode(text, add_special_tokens=False).ids, *frame[1]]
    bos, eos = ids["<s>"], ids["</s>"]
    tokenizer = Tokenizer(built, bos_token_id=bos, eos_token_id=eos, add_bos_token=flags[0], add_eos_token=flags[1])
    before, after = frame
    if flags[0] is not None:
        before = [bos, *before] if flags[0] and bos not in before else [i for i in before if flags[0] or i != bos]
    if flags[1] is not None:
        after = [*after, eos] if flags[1] and eos not in after else [i for i in after if flags[1] or i != eos]
    for text in ("a", "", "b c <s> a"):
        assert tokenizer.encode(text) == [*before, *tokenizer.encode(text, add_special_tokens=False), *after]


@pytest.mark.parametrize("loads", [150, pytest.param(3000, marks=pytest.mark.full)])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "nothing"])
def test_every_load_encodes_alike(form: str, loads: int, tmp_path: Path) -> None:
    built = backend(["~", "a", "<s>x", " "], 0)
    built.post_processor = FORMS[form]({mark: built.token_to_id(mark) for mark in MARKS})[0]
    built.save(str(tmp_path / "tokenizer.json"))
    config = '{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": false, "add_eos_token": true}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    found = set()
    for _ in range(loads):
        tokenizer = Tokenizer.load(tmp_path)
        assert tokenizer is not None
        found.add(tuple(tokenizer.encode("a a")))
    assert len(found) == 1


def test_a_processor_that_repeats_the_text_is_left_alone() -> None:
    built = backend(["a"], 0)
    built.post_processor = processors.TemplateProcessing("<s> $A $A", special_tokens=[("<s>", 1)])
    assert own_frame(built) is None
    assert Tokenizer(built, bos_token_id=1, add_bos_token=False).encode("a") == [1, 0, 0]
