"""How byte-level tokenizers of GGUF files cut words, against the stored words of llama.cpp's expressions."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Regex, pre_tokenizers

from dsc_serve.text.cuts import CUTS

from .cuts_of_llama_cpp import EXPECTED

STORED: dict[str, Any] = json.loads(EXPECTED.read_text("utf8"))


@pytest.mark.parametrize("name", CUTS)
def test_a_name_means_the_cuts_that_it_means_to_llama_cpp(name: str) -> None:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in CUTS[name].patterns]
    cutter = pre_tokenizers.Sequence(splits)
    for text, expected in zip(STORED["texts"], STORED["cuts"][STORED["names"][name]], strict=True):
        assert [word for word, _ in cutter.pre_tokenize_str(text)] == expected


def test_the_texts_tell_the_kinds_of_cuts_apart() -> None:
    patterns = {cut.patterns for cut in CUTS.values()}
    assert len({json.dumps(STORED["cuts"][kind]) for kind in STORED["names"].values()}) >= len(patterns) - 2
