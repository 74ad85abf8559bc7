"""A model's tokenizer: text to token ids and back."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from dsc_serve.files import CheckpointError, refuse_pointer
from dsc_serve.gguf_file import open_gguf
from dsc_serve.text.chat import ChatTemplate, ChatTemplateError, default_template, load_chat_template, one_line
from dsc_serve.text.gguf_tokenizer import converted_tokenizer
from dsc_serve.text.pieces import Pieces

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"


class TokenizerError(ValueError):
    """A tokenizer that cannot be used or a text that cannot be encoded; one line."""


class Tokenizer:
    """Encodes and decodes for one model.

    Decoding joins the tokens' bytes and reads them as UTF-8; each longest ill-formed run becomes one U+FFFD. Ids that
    the tokenizer does not have, as in a padded vocabulary, decode to nothing.

    vocab_size: one more than the highest token id. eos_token_id, bos_token_id: None where the model names none.
    add_bos_token, add_eos_token: True or False where a prompt gets this token or does not, whatever
        tokenizer.json says.
    chat_template: None where the model has none.
    Raises ValueError when the tokenizer's decoder is of an unsupported kind.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        add_bos_token: object = None,
        add_eos_token: object = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # A tokenizer saved after training may still cut or fill its texts; a prompt must arrive whole.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._pieces = Pieces(backend, self.vocab_size)
        before, after = own_frame(backend)
        framed = wanted(before, bos_token_id, add_bos_token), wanted(after[::-1], eos_token_id, add_eos_token)[::-1]
        self._frame = None if framed == (before, after) else framed

    @classmethod
    def load(cls, folder: Path) -> Tokenizer | None:
        """The tokenizer of a model folder, None when it has no tokenizer.json, or of a GGUF file.

        Raises TokenizerError.
        """
        if folder.is_file():
            return cls._of_gguf(folder)
        path = folder / TOKENIZER_FILE
        if not path.is_file():
            return None
        check_file(path)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {one_line(error)}") from error
        config = read_config(folder / CONFIG_FILE)
        named = special_tokens(config)
        ids: dict[str, int | None] = {}
        for name in ("eos_token", "bos_token"):
            token = named.get(name)
            ids[name] = None if token is None else backend.token_to_id(token)
            if token is not None and ids[name] is None:
                raise TokenizerError(f"{folder / CONFIG_FILE}: {name} is {token!r}, which {path.name} does not have")
        try:
            return cls(
                backend,
                eos_token_id=ids["eos_token"],
                bos_token_id=ids["bos_token"],
                add_bos_token=config.get("add_bos_token"),
                add_eos_token=config.get("add_eos_token"),
                chat_template=load_chat_template(folder, config, named),
            )
        except ChatTemplateError as error:
            raise TokenizerError(f"{folder}: {error}") from error
        except ValueError as error:
            raise TokenizerError(f"{path}: {error}") from error

    @classmethod
    def _of_gguf(cls, file: Path) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata, as importing the file would write it. Raises TokenizerError."""
        try:
            backend, config = converted_tokenizer(open_gguf(file).tokenizer)
            named = special_tokens(config)
            ids = {name: backend.token_to_id(named[name]) if name in named else None for name in named}
            template = default_template(config.get("chat_template"))
            return cls(
                backend,
                eos_token_id=ids.get("eos_token"),
                bos_token_id=ids.get("bos_token"),
                chat_template=None if template is None else ChatTemplate(template, named),
            )
        except CheckpointError as error:
            raise TokenizerError(str(error)) from None
        except ValueError as error:
            raise TokenizerError(f"{file}: {error}") from error

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises TokenizerError when the text is not valid Unicode (a lone surrogate) or has no tokens for a part of it.
        """
        framed = add_special_tokens and self._frame is not None
        try:
            # a batch of one: only batches release the interpreter's lock while they encode
            (encoding,) = self._backend.encode_batch([text], add_special_tokens=add_special_tokens and not framed)
            ids: list[int] = encoding.ids
        except TypeError as error:
            raise TokenizerError("the text holds a lone surrogate, which is not valid Unicode") from error
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"the text cannot be encoded: {one_line(error)}") from error
        return [*self._frame[0], *ids, *self._frame[1]] if framed and self._frame is not None else ids

    def encode_chat(self, rendered: str) -> list[int]:
        """Token ids of a rendered chat template, which writes its special tokens itself. Raises TokenizerError."""
        return self.encode(rendered, add_special_tokens=False)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence of tokens."""
        parts: list[bytes] = []
        for token_id in ids:
            if self.visible(token_id, skip_special_tokens):
                parts.append(self.token_bytes(token_id) if parts else self.leading_bytes(token_id))
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text before it: possibly part of a character, or none."""
        return self._pieces.following(token_id)

    def leading_bytes(self, token_id: int) -> bytes:
        """Bytes of a token at the start of a text, where some tokenizers drop the space before a word."""
        return self._pieces.leading(token_id)

    def shown_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        """Bytes that a token adds to the text before it where decoding shows the token, else none."""
        return b"" if skip_special_tokens and token_id in self._special else self._pieces.following(token_id)

    def token_text(self, token_id: int) -> str:
        r"""A token's own text for showing it alone.

        Bytes that are not UTF-8 by themselves are written as `bytes:\xe4\xbd`, so that different tokens stay different.
        """
        piece = self.token_bytes(token_id)
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a mark for the model, not text, such as the end of text."""
        return token_id in self._special

    def visible(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding shows the token."""
        return not (skip_special_tokens and token_id in self._special) and self._pieces.known(token_id)


def own_frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """The special tokens that tokenizer.json puts before and behind a text."""
    marks: list[int] = backend.encode("", add_special_tokens=True).ids
    if marks:
        text = next(iter(backend.get_vocab(with_added_tokens=False)), "")
        within, ids = (backend.encode(text, add_special_tokens=framed).ids for framed in (False, True))
        for start in range(len(marks) + 1):
            if within and ids == [*marks[:start], *within, *marks[start:]]:
                return marks[:start], marks[start:]
    return marks, []


def wanted(marks: list[int], token_id: int | None, add: object) -> list[int]:
    """These marks, the outermost first, with a token or without it; `add`: as settings say, True, False or nothing."""
    if add is True and token_id is not None and token_id not in marks:
        return [token_id, *marks]
    return [mark for mark in marks if mark != token_id] if add is False else marks


def check_file(path: Path) -> None:
    """Raises TokenizerError for a file that is only a pointer to another one."""
    try:
        refuse_pointer(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def read_config(path: Path) -> dict[str, object]:
    """tokenizer_config.json as a dict, empty when there is none. Raises TokenizerError."""
    if not path.is_file():
        return {}
    check_file(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{path} holds a {type(config).__name__}; it must hold a JSON object")
    return config


def special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """The texts of the named special tokens ("bos_token", "eos_token", …) in a tokenizer_config.json."""
    named: dict[str, str] = {}
    for name, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(content, str):
            named[name] = content
    return named
