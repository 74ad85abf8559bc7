"""The special and added tokens of a tokenizer, from all the files of a folder that name some.

The files go before each other as in transformers: `added_tokens_decoder` in tokenizer_config.json makes the older
special_tokens_map.json and added_tokens.json void; without it the map holds and overrides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from dsc_serve.documents import DocumentError, parse_json, read_document
from dsc_serve.files import CheckpointError, refuse_pointer
from dsc_serve.text.chat import one_line

CONFIG_FILE = "tokenizer_config.json"
MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
DECODER_FIELD = "added_tokens_decoder"
# the order in which those that are nowhere else get their ids
ORDER = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MOST_DIGITS = 9  # of a token's id
LISTS = ("additional_special_tokens", "extra_special_tokens")


class TokenizerError(ValueError):
    """A tokenizer that cannot be used or a text that cannot be encoded; one line."""


def check_file(path: Path) -> None:
    """Raises TokenizerError for a file that is only a pointer to another one."""
    try:
        refuse_pointer(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty when there is no file. Raises TokenizerError."""
    if not path.is_file():
        return {}
    check_file(path)
    try:
        content = parse_json(read_document(path))
    except (OSError, DocumentError) as error:
        raise TokenizerError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise TokenizerError(f"{path} holds a {type(content).__name__}; it must hold a JSON object")
    return content


def complete(backend: tokenizers.Tokenizer, folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Add to a tokenizer what only other files than tokenizer.json name.

    config: tokenizer_config.json. Returns the texts of the named tokens ("bos_token", "eos_token", …). Raises
    TokenizerError for a field that is no token, or a token that is said to have another id than it gets.
    """
    source = folder / CONFIG_FILE
    named, listed = tokens_of(config, source)
    numbered: dict[int, AddedToken] = {}
    if config.get(DECODER_FIELD) is not None:
        entries = config[DECODER_FIELD]
        if not isinstance(entries, dict):
            raise TokenizerError(f"{source}: {DECODER_FIELD} is {entries!r}; it must be an object of ids and tokens")
        for key, value in entries.items():
            where = f"{DECODER_FIELD}.{key}"
            numbered[id_of(key, source, where)] = token_of(value, source, where)
    else:
        path = folder / MAP_FILE
        content = read_object(path)
        overriding, more = tokens_of(content, path)
        named = {name: token for name, token in named.items() if name not in content} | overriding
        listed += [token for token in more if token.content not in {known.content for known in listed}]
        special = {token.content for token in (*named.values(), *listed)}
        source = folder / ADDED_FILE
        for text, id in read_object(source).items():
            mark = text in special
            numbered[id_of(id, source, text)] = AddedToken(text, normalized=not mark, special=mark)
        # where both number a token, tokenizer.json knows more of it
        numbered |= backend.get_added_tokens_decoder()
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    new = [token for _, token in sorted(numbered.items()) if repr(token) not in known]
    marks = {token.content for token in named.values()}
    # for the library a token that was special stays it
    marks |= {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    for token in new:
        token.special = token.special or token.content in marks
    backend.add_tokens(new)
    for id, token in numbered.items():
        if backend.token_to_id(token.content) != id:
            own = backend.token_to_id(token.content)
            raise TokenizerError(f"{source}: {token.content!r} has the id {id}, but with tokenizer.json it is {own}")
    texts = {token.content for token in backend.get_added_tokens_decoder().values()}
    first = {name: named[name] for name in ORDER if name in named} | named
    backend.add_tokens([token for token in (*first.values(), *listed) if token.content not in texts])
    return {name: token.content for name, token in named.items()}


def tokens_of(content: Mapping[str, Any], source: Path) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """The named tokens, and the others that are special too, in a tokenizer_config.json or a map of special tokens."""
    named: dict[str, AddedToken] = {}
    for name, value in content.items():
        if name.endswith("_token") and (isinstance(value, str) or (isinstance(value, dict) and "content" in value)):
            named[name] = token_of(value, source, name)
    listed: dict[str, AddedToken] = {}
    for name in LISTS:
        for key, value in members(content.get(name), source, name):
            token = token_of(value, source, f"{name}.{key}")
            if isinstance(key, str):
                named.setdefault(key, token)
            listed.setdefault(token.content, token)
    return named, list(listed.values())


def members(value: object, source: Path, name: str) -> Iterator[tuple[int | str, object]]:
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        yield from enumerate(value)
    elif value is not None:
        raise TokenizerError(f"{source}: {name} is {value!r}; it must be a list of tokens")


def token_of(value: object, source: Path, where: str) -> AddedToken:
    """A token as a text or as an object of its properties; special unless it says that it is not."""
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {name: value[name] for name in ("single_word", "lstrip", "rstrip", "normalized") if name in value}
        # a map of special tokens and the named ones of a config leave out what goes without saying
        special = value.get("special", not where.startswith(DECODER_FIELD))
        if all(isinstance(flag, bool) for flag in (*flags.values(), special)):
            return AddedToken(value["content"], special=special, **flags)
    raise TokenizerError(f"{source}: {where} is {value!r}; it must be a text or an object with content and flags")


def id_of(value: object, source: Path, where: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not (text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS):
        raise TokenizerError(f"{source}: {where} has the id {value!r}; it must be a number from 0 on")
    return int(text)
