"""Prompts that fill in the middle, in every known form."""

from __future__ import annotations

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from dsc_serve.text.fill import FORMS, fill_of
from dsc_serve.text.pieces import byte_alphabet
from dsc_serve.text.tokenizer import Tokenizer


def made(marks: list[str]) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=byte_alphabet(), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ["<s>", *marks]])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    return Tokenizer(backend)


@pytest.mark.parametrize("name", FORMS)
def test_a_prompt_has_the_marks_of_its_form_in_their_order(name: str) -> None:
    form = FORMS[name]
    tokenizer = made([mark for mark in (form.prefix, form.suffix, form.middle) if mark])
    fill = fill_of(tokenizer)
    assert fill is not None
    text = tokenizer.decode(fill.prompt(tokenizer.encode_chat("ab"), tokenizer.encode_chat("yz")), False)
    parts = f"{form.suffix}yz{form.prefix}ab" if form.suffix_first else f"{form.prefix}ab{form.suffix}yz"
    assert text == f"<s>{parts}{form.middle}"


def test_a_tokenizer_without_marks_fills_nothing() -> None:
    assert fill_of(made([])) is None
    assert fill_of(made(["<fim_prefix>", "<fim_suffix>"])) is None
