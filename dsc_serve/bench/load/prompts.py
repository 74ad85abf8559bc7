"""Prompts for a load: cut from a text, taken from conversations, or random tokens; with shared beginnings too."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from dsc_serve.bench.load.lengths import Lengths, parse_lengths
from dsc_serve.config import ConfigError
from dsc_serve.text.tokenizer import Tokenizer

DEFAULT_LENGTH = 64  # tokens of prompts and answers

Prompt = str | list[int]
Cut = Callable[[int], Prompt]  # a stretch of so many tokens or words


class Turn(msgspec.Struct):
    speaker: str = msgspec.field(name="from", default="")
    value: str = ""


class Conversation(msgspec.Struct):
    """One record of a file of the ShareGPT form; its other fields are left unread."""

    conversations: list[Turn] = []


class Question(msgspec.Struct, frozen=True):
    """A prompt and the answer that it once got."""

    prompt: str
    answer: str


def read_text(path: Path, field: str) -> str:
    """Raises ConfigError when the file cannot be read as UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{field} {str(path)!r} cannot be read: {error}") from error


def load_tokenizer(folder: Path) -> Tokenizer:
    """Raises ConfigError when the folder has no tokenizer, TokenizerError when it is broken."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ConfigError(f"tokenizer is {str(folder)!r}; it must be a folder with a tokenizer.json")
    return tokenizer


class Words:
    """Counts and cuts texts by words, where there is no tokenizer to count by."""

    unit = "words"

    def split(self, text: str) -> list[str]:
        return text.split()

    def join(self, parts: list[str]) -> str:
        return " ".join(parts)


class TokenPrompts:
    """Counts and cuts texts by a tokenizer's tokens; cut ends may shift a server's own count by a few."""

    unit = "tokens"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def split(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def join(self, parts: list[int]) -> str:
        # A stretch that begins or ends within a character loses that character, not gains a replacement mark.
        return self._tokenizer.decode(parts).strip("�")


def stretches(path: Path, counter: Words | TokenPrompts, rng: random.Random) -> Cut:
    """Cuts stretches from random places of a text."""
    parts = counter.split(read_text(path, "prompt_file"))

    def cut(length: int) -> str:
        if len(parts) < length:
            raise ConfigError(f"prompt_file {str(path)!r} has {len(parts)} {counter.unit}; a prompt needs {length}")
        start = rng.randrange(len(parts) - length + 1)
        return counter.join(parts[start : start + length])  # type: ignore[arg-type]

    return cut


def random_ids(vocab_size: int, rng: random.Random) -> Cut:
    """Token ids drawn uniformly from the vocabulary."""
    return lambda length: [rng.randrange(vocab_size) for _ in range(length)]


def joined(prefix: Prompt, rest: Prompt) -> Prompt:
    if isinstance(prefix, str):
        assert isinstance(rest, str)
        return f"{prefix} {rest}"
    assert isinstance(rest, list)
    return prefix + rest


class Ask(msgspec.Struct, frozen=True):
    """What one request asks for."""

    prompt: Prompt
    output_tokens: int


def cut_asks(
    cut: Cut, prompt: Lengths, output: Lengths, prefix_tokens: int, prefixes: int, rng: random.Random
) -> Iterator[Ask]:
    """An endless series; each prompt begins with one of `prefixes` beginnings of `prefix_tokens`, drawn evenly."""
    beginnings = [cut(prefix_tokens) for _ in range(prefixes)] if prefix_tokens else []

    def made() -> Ask:
        own = cut(prompt(rng))
        return Ask(joined(rng.choice(beginnings), own) if beginnings else own, output(rng))

    first = made()  # now, so that a text too short is said before the load begins
    return itertools.chain([first], (made() for _ in itertools.repeat(None)))


def read_questions(path: Path) -> list[Question]:
    """Each conversation's first question and answer. Raises ConfigError where there is none, or no such file."""
    try:
        found = msgspec.json.decode(read_text(path, "sharegpt").encode(), type=list[Conversation])
    except msgspec.DecodeError as error:
        raise ConfigError(f"sharegpt {str(path)!r} is not of the ShareGPT form: {error}") from error
    openings = [turns for turns in (item.conversations[:2] for item in found) if len(turns) == 2]
    questions = [
        Question(asked.value, answered.value)
        for asked, answered in openings
        if asked.speaker in ("human", "user") and asked.value.strip() and answered.value.strip()
    ]
    if not questions:
        raise ConfigError(f"sharegpt {str(path)!r} has no conversation that begins with a question and its answer")
    return questions


def shared_asks(
    questions: list[Question],
    counter: Words | TokenPrompts,
    prompt: Lengths | None,
    output: Lengths | None,
    rng: random.Random,
) -> Iterator[Ask]:
    """Conversations in random order, over and over; questions cut to the drawn length, answers as long as they were
    where `output` is None."""
    while True:
        for question in rng.sample(questions, len(questions)):
            text = question.prompt
            if prompt is not None:
                text = counter.join(counter.split(text)[: prompt(rng)])  # type: ignore[arg-type]
            yield Ask(text, len(counter.split(question.answer)) if output is None else output(rng))


def ask_source(
    *,
    prompt_file: str | None = None,
    sharegpt: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int = 256,
    prompt_tokens: Lengths | None = None,
    output_tokens: Lengths | None = None,
    prefix_tokens: int = 0,
    prefixes: int = 1,
    seed: int = 0,
) -> Iterator[Ask]:
    """An endless series of what requests ask for, the same for the same arguments.

    Of the text in `prompt_file`, or the conversations in `sharegpt`, counted in tokens of the tokenizer in folder
    `tokenizer`, or in words without one; without a file, random ids below `vocab_size`. Lengths that are None are the
    conversations' own, elsewhere DEFAULT_LENGTH. Raises ConfigError and TokenizerError.
    """
    rng = random.Random(seed)
    counter = TokenPrompts(load_tokenizer(Path(tokenizer))) if tokenizer else Words()
    if sharegpt is not None:
        return shared_asks(read_questions(Path(sharegpt)), counter, prompt_tokens, output_tokens, rng)
    cut = random_ids(vocab_size, rng) if prompt_file is None else stretches(Path(prompt_file), counter, rng)
    default = parse_lengths("length", DEFAULT_LENGTH)
    return cut_asks(cut, prompt_tokens or default, output_tokens or default, prefix_tokens, prefixes, rng)
