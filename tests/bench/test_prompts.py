from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from dsc_serve.bench.load.lengths import parse_lengths
from dsc_serve.bench.load.prompts import Ask, ask_source
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


def asks(count: int, **settings: Any) -> list[Ask]:
    for field in ("prompt_tokens", "output_tokens"):
        if field in settings:
            settings[field] = parse_lengths(field, settings[field])
    return list(itertools.islice(ask_source(**settings), count))


def test_without_a_file_prompts_are_random_ids() -> None:
    prompts = [ask.prompt for ask in asks(30, vocab_size=50, prompt_tokens=20, seed=1)]
    assert all(len(prompt) == 20 for prompt in prompts)
    assert {token for prompt in prompts for token in prompt} == set(range(50))
    assert prompts == [ask.prompt for ask in asks(30, vocab_size=50, prompt_tokens=20, seed=1)]
    assert prompts != [ask.prompt for ask in asks(30, vocab_size=50, prompt_tokens=20, seed=2)]


def test_without_a_tokenizer_prompts_are_stretches_of_words(text_file: str) -> None:
    for ask in asks(40, prompt_file=text_file, prompt_tokens=4):
        assert isinstance(ask.prompt, str) and ask.output_tokens == 64
        assert len(ask.prompt.split()) == 4
        assert ask.prompt in " ".join(TEXT.split())


def test_with_a_tokenizer_prompts_are_counted_in_tokens(text_file: str, tokenizer_folder: str) -> None:
    tokenizer = Tokenizer.load(Path(tokenizer_folder))
    assert tokenizer is not None
    for ask in asks(60, prompt_file=text_file, tokenizer=tokenizer_folder, prompt_tokens=12):
        assert isinstance(ask.prompt, str)
        assert ask.prompt in TEXT
        assert 12 - 4 <= len(tokenizer.encode(ask.prompt)) <= 12


def test_a_text_may_be_just_one_prompt_long_but_not_shorter(text_file: str) -> None:
    assert asks(1, prompt_file=text_file, prompt_tokens=12)[0].prompt == " ".join(TEXT.split())
    with pytest.raises(ConfigError, match="has 12 words; a prompt needs 13"):
        ask_source(prompt_file=text_file, prompt_tokens=parse_lengths("prompt_tokens", 13))


def test_files_that_cannot_be_used_are_named(text_file: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompt_file .*missing.txt' cannot be read"):
        ask_source(prompt_file=str(tmp_path / "missing.txt"))
    with pytest.raises(ConfigError, match=r"must be a folder with a tokenizer\.json"):
        ask_source(prompt_file=text_file, tokenizer=str(tmp_path))
    with pytest.raises(ConfigError, match="is not of the ShareGPT form"):
        ask_source(sharegpt=text_file)
    empty = tmp_path / "empty.json"
    empty.write_text('[{"conversations": [{"from": "human", "value": "alone"}]}]', encoding="utf-8")
    with pytest.raises(ConfigError, match="has no conversation that begins with a question and its answer"):
        ask_source(sharegpt=str(empty))


def test_lengths_are_drawn_and_repeat_with_the_seed() -> None:
    drawn = asks(400, prompt_tokens="uniform:3:9", output_tokens="normal:20:4", seed=5)
    assert drawn == asks(400, prompt_tokens="uniform:3:9", output_tokens="normal:20:4", seed=5)
    assert {len(ask.prompt) for ask in drawn} == set(range(3, 10))
    assert statistics.mean(ask.output_tokens for ask in drawn) == pytest.approx(20, abs=1)
    assert 3 < statistics.pstdev(ask.output_tokens for ask in drawn) < 5
    long = [ask.output_tokens for ask in asks(400, output_tokens="lognormal:30:0.5")]
    assert statistics.median(long) == pytest.approx(30, rel=0.1) and statistics.mean(long) > 32
    assert min(ask.output_tokens for ask in asks(200, output_tokens="normal:1:9")) == 1


@pytest.mark.parametrize(
    "value", [0, "", "-3", "2.5", "uniform:1", "uniform:9:3", "normal:10:-1", "normal:nan:1", "pareto:1:2", "1:2"]
)
def test_lengths_that_cannot_be_drawn_are_named(value: int | str) -> None:
    with pytest.raises(ConfigError, match=rf"prompt_tokens is {value!r}; it must be a number, uniform:LOW:HIGH"):
        parse_lengths("prompt_tokens", value)


def test_prompts_share_their_beginnings(text_file: str) -> None:
    drawn = [ask.prompt for ask in asks(60, prompt_tokens=4, prefix_tokens=10, prefixes=3)]
    assert all(len(prompt) == 14 for prompt in drawn)
    assert len({tuple(prompt[:10]) for prompt in drawn}) == 3 and len({tuple(prompt) for prompt in drawn}) == 60
    texts = [str(ask.prompt) for ask in asks(20, prompt_file=text_file, prompt_tokens=2, prefix_tokens=3)]
    assert len({tuple(text.split()[:3]) for text in texts}) == 1 and all(len(text.split()) == 5 for text in texts)


def test_conversations_give_prompts_and_lengths_of_answers(tmp_path: Path) -> None:
    file = tmp_path / "conversations.json"
    spoken = [("human", "How are you today"), ("gpt", "Very well indeed"), ("human", "Good")]
    other = [("user", "Why"), ("assistant", "Because")]
    unanswered = [("system", "Be kind"), ("human", "Who are you")]
    content = [
        {"id": i, "conversations": [{"from": who, "value": text} for who, text in turns]}
        for i, turns in enumerate((spoken, other, unanswered, []))
    ]
    file.write_text(json.dumps(content), encoding="utf-8")
    taken = asks(20, sharegpt=str(file), seed=2)
    assert {(ask.prompt, ask.output_tokens) for ask in taken} == {("How are you today", 3), ("Why", 1)}
    assert all(
        {a.prompt, b.prompt} == {"How are you today", "Why"} for a, b in zip(taken[::2], taken[1::2], strict=True)
    )
    cut = asks(20, sharegpt=str(file), prompt_tokens=2, output_tokens=5)
    assert {(ask.prompt, ask.output_tokens) for ask in cut} == {("How are", 5), ("Why", 5)}
