from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.bench.prompts import prompt_source
from dsc_serve.config import ConfigError
from dsc_serve.text.tokenizer import Tokenizer

TEXT = "one two three four five six seven eight nine ten 你好 world\n"


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return str(path)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> str:
    """A tokenizer whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.save(str(tmp_path / "tokenizer.json"))
    return str(tmp_path)


def test_without_a_file_prompts_are_random_ids() -> None:
    prompts = list(itertools.islice(prompt_source(None, None, 50, 20, seed=1), 30))
    assert all(len(prompt) == 20 for prompt in prompts)
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    assert prompts == list(itertools.islice(prompt_source(None, None, 50, 20, seed=1), 30))
    assert prompts != list(itertools.islice(prompt_source(None, None, 50, 20, seed=2), 30))


def test_without_a_tokenizer_prompts_are_stretches_of_words(text_file: str) -> None:
    for prompt in itertools.islice(prompt_source(text_file, None, 1, 4, seed=0), 40):
        assert isinstance(prompt, str)
        assert len(prompt.split()) == 4
        assert prompt in " ".join(TEXT.split())


def test_with_a_tokenizer_prompts_are_counted_in_tokens(text_file: str, tokenizer_folder: str) -> None:
    tokenizer = Tokenizer.load(Path(tokenizer_folder))
    assert tokenizer is not None
    for prompt in itertools.islice(prompt_source(text_file, tokenizer_folder, 1, 12, seed=0), 60):
        assert isinstance(prompt, str)
        assert prompt in TEXT
        assert 12 - 4 <= len(tokenizer.encode(prompt)) <= 12


def test_a_text_may_be_just_one_prompt_long_but_not_shorter(text_file: str) -> None:
    assert next(prompt_source(text_file, None, 1, 12, seed=0)) == " ".join(TEXT.split())
    with pytest.raises(ConfigError, match="has 12 words; a prompt needs 13"):
        prompt_source(text_file, None, 1, 13, seed=0)


def test_files_that_cannot_be_used_are_named(text_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_file .*missing.txt' cannot be read"):
        prompt_source(str(tmp_path / "missing.txt"), None, 1, 4, seed=0)
    with pytest.raises(ConfigError, match=r"must be a folder with a tokenizer\.json"):
        prompt_source(text_file, str(tmp_path), 1, 4, seed=0)
