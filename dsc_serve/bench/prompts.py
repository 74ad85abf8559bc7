"""Prompts for a load: cut from a text, or random tokens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from dsc_serve.config import ConfigError
from dsc_serve.text.tokenizer import Tokenizer

Prompt = str | list[int]


def read_text(path: Path) -> str:
    """Raises ConfigError when the file cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"prompt_file {str(path)!r} cannot be read: {error}") from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises ConfigError when the folder has no tokenizer, TokenizerError when it is broken."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ConfigError(f"tokenizer is {str(folder)!r}; it must be a folder with a tokenizer.json")
    return tokenizer


def word_prompts(path: Path, words: int, seed: int) -> Iterator[str]:
    """Stretches of `words` words, each from a random place of the text."""
    text = read_text(path).split()
    if len(text) < words:
        raise ConfigError(f"prompt_file {str(path)!r} has {len(text)} words; a prompt needs {words}")
    return _stretches_of_words(text, words, random.Random(seed))


def _stretches_of_words(text: list[str], words: int, rng: random.Random) -> Iterator[str]:
    while True:
        start = rng.randrange(len(text) - words + 1)
        yield " ".join(text[start : start + words])


def text_prompts(path: Path, tokenizer: Tokenizer, tokens: int, seed: int) -> Iterator[str]:
    """Stretches of the text that are `tokens` tokens long, as text; cut ends may shift the server's count by a few."""
    ids = tokenizer.encode(read_text(path), add_special_tokens=False)
    if len(ids) < tokens:
        raise ConfigError(f"prompt_file {str(path)!r} has {len(ids)} tokens; a prompt needs {tokens}")
    return _stretches_of_tokens(ids, tokenizer, tokens, random.Random(seed))


def _stretches_of_tokens(ids: list[int], tokenizer: Tokenizer, tokens: int, rng: random.Random) -> Iterator[str]:
    while True:
        start = rng.randrange(len(ids) - tokens + 1)
        # A stretch that begins or ends within a character loses that character, not gains a replacement mark.
        yield tokenizer.decode(ids[start : start + tokens]).strip("�")


def random_prompts(vocab_size: int, tokens: int, seed: int) -> Iterator[list[int]]:
    """`tokens` token ids, each drawn uniformly from the vocabulary."""
    rng = random.Random(seed)
    while True:
        yield [rng.randrange(vocab_size) for _ in range(tokens)]


def prompt_source(
    prompt_file: str | None, tokenizer: str | None, vocab_size: int, prompt_tokens: int, seed: int
) -> Iterator[Prompt]:
    """An endless series of prompts, the same for the same arguments.

    Of the text in `prompt_file`, counted in tokens of the tokenizer in folder `tokenizer`, or in words without one;
    without a file, random ids below `vocab_size`. Raises ConfigError and TokenizerError.
    """
    if prompt_file is None:
        return random_prompts(vocab_size, prompt_tokens, seed)
    if tokenizer is None:
        return word_prompts(Path(prompt_file), prompt_tokens, seed)
    return text_prompts(Path(prompt_file), load_tokenizer(Path(tokenizer)), prompt_tokens, seed)
