"""Tokenizer folders as people have them, against the stored answers of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from dsc_serve.text.tokenizer import FILES, Tokenizer, TokenizerError

from .tokenizer_folders import ADDED, CONFIG, EXPECTED, FOLDERS, MAP, MESSAGES, TEXTS, byte_level, entry, write

VERSIONS: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text("utf8"))


def load(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_reads_as_in_transformers(name: str, version: str, tmp_path: Path) -> None:
    write(name, tmp_path)
    tokenizer, expected = load(tmp_path), VERSIONS[version][name]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (expected["bos"], expected["eos"])
    for text, answer in zip(TEXTS, expected["texts"], strict=True):
        assert tokenizer.encode(text) == answer["ids"]
        assert tokenizer.decode(answer["ids"], skip_special_tokens=False) == answer["shown"]
        assert tokenizer.decode(answer["ids"]) == answer["hidden"]
    if "chat" in expected:
        assert tokenizer.chat_template is not None
        assert tokenizer.chat_template.render(list(MESSAGES), add_generation_prompt=False) == expected["chat"]


def test_the_stored_answers_are_of_all_folders_and_tell_them_apart() -> None:
    assert len(VERSIONS) == 2
    for answers in VERSIONS.values():
        assert answers.keys() == FOLDERS.keys()
        assert len({json.dumps(answer) for answer in answers.values()}) > len(FOLDERS) // 3


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (MAP, "[]", r"special_tokens_map\.json holds a list; it must hold a JSON object"),
        (MAP, '{"additional_special_tokens": "<x>"}', r"additional_special_tokens is '<x>'; it must be a list of tok"),
        (MAP, '{"additional_special_tokens": [3]}', r"additional_special_tokens\.0 is 3; it must be a text or an obj"),
        (MAP, '{"pad_token": {"content": 3}}', r"pad_token is \{'content': 3\}; it must be a text or an object"),
        (MAP, '{"pad_token": {"content": "a", "lstrip": 3}}', r"pad_token is .*; it must be a text or an object"),
        (ADDED, "{", r"added_tokens\.json cannot be read"),
        (ADDED, '{"<x>": "a"}', r"<x> has the id 'a'; it must be a number from 0 on"),
        (ADDED, '{"<x>": -1}', r"<x> has the id -1; it must be a number from 0 on"),
        (ADDED, '{"<x>": true}', r"<x> has the id True; it must be a number from 0 on"),
        (ADDED, '{"<x>": 999}', r"added_tokens\.json: '<x>' has the id 999, but with tokenizer\.json it is 260"),
        (ADDED, '{"He": 260}', r"added_tokens\.json: 'He' has the id 260, but with tokenizer\.json it is 256"),
        (CONFIG, '{"added_tokens_decoder": 3}', r"added_tokens_decoder is 3; it must be an object of ids and tokens"),
        (CONFIG, '{"added_tokens_decoder": {"a": "b"}}', r"added_tokens_decoder\.a has the id 'a'"),
        (CONFIG, '{"added_tokens_decoder": {"260": {}}}', r"added_tokens_decoder\.260 is \{\}; it must be a text or"),
        (CONFIG, '{"added_tokens_decoder": {"300": "b<"}}', r"'b<' has the id 300, but with tokenizer\.json it is 260"),
    ],
)
def test_what_is_no_token_is_refused_by_file_and_name(file: str, content: str, message: str, tmp_path: Path) -> None:
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / file).write_text(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_token_keeps_its_properties_whichever_file_has_them(tmp_path: Path) -> None:
    byte_level(added=(AddedToken("<two>", normalized=False, special=False),)).save(str(tmp_path / "tokenizer.json"))
    files = {MAP: {"pad_token": entry("<tool>", True, lstrip=True)}, CONFIG: {"extra_special_tokens": ["<one>"]}}
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    tokenizer = load(tmp_path)
    ids = {text: tokenizer.encode(text) for text in ("<tool>", "<one>", "<two>")}
    assert all(len(found) == 1 for found in ids.values())
    assert tokenizer.encode("a  <tool>") == [*tokenizer.encode("a"), *ids["<tool>"]]
    assert [tokenizer.is_special(found[0]) for found in ids.values()] == [True, True, False]


def test_all_files_of_a_tokenizer_are_known_by_name() -> None:
    assert set(FILES) == {"tokenizer.json", CONFIG, MAP, ADDED, "chat_template.jinja"}
