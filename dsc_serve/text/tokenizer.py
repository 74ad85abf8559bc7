"""A model's tokenizer: text to token ids and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from dsc_serve.files import CheckpointError
from dsc_serve.gguf_file import open_gguf
from dsc_serve.panics import PanicError, panics_as_errors
from dsc_serve.text.broken_template import usable
from dsc_serve.text.chat import TEMPLATE_FILE, ChatTemplate, default_template, load_chat_template, one_line
from dsc_serve.text.gguf_tokenizer import converted_tokenizer
from dsc_serve.text.pieces import Decoding, Pieces
from dsc_serve.text.special_tokens import ADDED_FILE, MAP_FILE, check_file, complete, read_object, tokens_of
from dsc_serve.text.special_tokens import CONFIG_FILE as CONFIG_FILE
from dsc_serve.text.special_tokens import TokenizerError as TokenizerError

TOKENIZER_FILE = "tokenizer.json"
# All that a model folder may hold of a tokenizer.
FILES = (TOKENIZER_FILE, CONFIG_FILE, MAP_FILE, ADDED_FILE, TEMPLATE_FILE)
MOST_TOKENS = 2**22  # a place is kept for each; vocabularies of the field have up to 2**18
# without the "Fast" that some have behind
FLAGGED_CLASSES = {"LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer", "GPTNeoXTokenizer"}


class Tokenizer:
    """Encodes and decodes for one model.

    Decoding joins the tokens' bytes and reads them as UTF-8; each longest ill-formed run becomes one U+FFFD. Ids that
    the tokenizer does not have, as in a padded vocabulary, decode to nothing.

    vocab_size: one more than the highest token id. eos_token_id, bos_token_id: None where the model names none.
    add_bos_token, add_eos_token: True or False where a prompt gets this token or does not, whatever
        tokenizer.json says.
    chat_template: None where the model has none; a BrokenTemplate where it has one that cannot be used.
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
        if self.vocab_size > MOST_TOKENS:
            raise ValueError(f"it has a token of id {self.vocab_size - 1}; allowed: 0 to {MOST_TOKENS - 1}")
        self.eos_token_id = eos_token_id
        self.bos_token_id = bos_token_id
        self.chat_template = chat_template
        self._special = {id for id, token in backend.get_added_tokens_decoder().items() if token.special}
        self._pieces = Pieces(backend, self.vocab_size)
        self._frame: tuple[list[int], list[int]] | None = None
        own = own_frame(backend)
        if own is not None:
            before, after = own
            framed = wanted(before, bos_token_id, add_bos_token), wanted(after[::-1], eos_token_id, add_eos_token)[::-1]
            self._frame = None if framed == own else framed

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
            with panics_as_errors():
                backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise TokenizerError(f"{path} cannot be read: {one_line(error)}") from error
        config = read_config(folder / CONFIG_FILE)
        named = complete(backend, folder, config)
        template = usable(folder, lambda: load_chat_template(folder, config, named))
        try:
            with panics_as_errors():
                return cls.of(backend, config, named, template)
        except (ValueError, PanicError) as error:
            raise TokenizerError(f"{path}: {error}") from error

    @classmethod
    def of(
        cls,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, object],
        named: Mapping[str, str],
        chat_template: ChatTemplate | None,
    ) -> Tokenizer:
        """A tokenizer as its tokenizer_config.json sets it up; named: texts of tokens that it has ("bos_token", …)."""
        flags = {name: config.get(name) for name in ("add_bos_token", "add_eos_token")} if heeds_flags(config) else {}
        ids = {name: backend.token_to_id(named[name]) for name in ("bos_token", "eos_token") if name in named}
        return cls(
            backend,
            bos_token_id=ids.get("bos_token"),
            eos_token_id=ids.get("eos_token"),
            chat_template=chat_template,
            **flags,
        )

    @classmethod
    def _of_gguf(cls, file: Path) -> Tokenizer:
        """The tokenizer in a GGUF file's metadata, as importing the file would write it. Raises TokenizerError."""
        try:
            with panics_as_errors():
                backend, config = converted_tokenizer(open_gguf(file).tokenizer)
            named = {name: token.content for name, token in tokens_of(config, file)[0].items()}
        except CheckpointError as error:
            raise TokenizerError(str(error)) from None
        except (ValueError, PanicError) as error:
            raise TokenizerError(f"{file}: {error}") from error

        def template() -> ChatTemplate | None:
            source = default_template(config.get("chat_template"))
            return None if source is None else ChatTemplate(source, named)

        return cls.of(backend, config, named, usable(file, template))

    def to_json(self) -> str:
        """The tokenizer alone, as tokenizer.json holds it."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt.

        Raises TokenizerError when the text is not valid Unicode (a lone surrogate) or has no tokens for a part of it.
        """
        framed = add_special_tokens and self._frame is not None
        try:
            # a batch of one: only batches release the interpreter's lock while they encode
            with panics_as_errors():
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
        decoding = self.decoding()
        parts = [decoding.push(token_id) for token_id in ids if self.visible(token_id, skip_special_tokens)]
        return b"".join([*parts, decoding.ending()]).decode("utf-8", "replace")

    def decoding(self) -> Decoding:
        """The bytes of one text, to be fed with its visible tokens."""
        return self._pieces.decoding()

    @property
    def local(self) -> bool:
        """Whether a token adds the same bytes to a text wherever it stands in it, but at the start."""
        return self._pieces.local

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that a token adds to the text before it: possibly part of a character, or none.

        Where tokens are not local: as after others that it has no dealings with.
        """
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

    @property
    def special_texts(self) -> dict[str, int]:
        """Special tokens by their texts."""
        return {text: token for token in self._special if (text := self._backend.id_to_token(token)) is not None}

    def token_id(self, text: str) -> int | None:
        """The token of exactly this text, as the vocabulary writes it; None where there is none."""
        found: int | None = self._backend.token_to_id(text)
        return found

    @property
    def frame(self) -> tuple[list[int], list[int]]:
        """The special tokens that a prompt begins and ends with; none where that depends on the prompt."""
        return self._frame or own_frame(self._backend) or ([], [])

    def visible(self, token_id: int, skip_special_tokens: bool = True) -> bool:
        """Whether decoding shows the token."""
        return not (skip_special_tokens and token_id in self._special) and self._pieces.known(token_id)


def own_frame(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]] | None:
    """The special tokens that tokenizer.json puts before and behind a text; None where it does something else."""
    marks: list[int] = backend.encode("", add_special_tokens=True).ids
    stand_in = next(i for i in range(len(marks) + 1) if i not in marks)
    text = tokenizers.Tokenizer(tokenizers.models.WordLevel({"text": stand_in}, unk_token="text")).encode("text")
    ids: list[int] = backend.post_process(text, add_special_tokens=True).ids
    if ids.count(stand_in) != 1:
        return None
    place = ids.index(stand_in)
    return ids[:place], ids[place + 1 :]


def heeds_flags(config: Mapping[str, object]) -> bool:
    """Whether `add_bos_token` and `add_eos_token` of a tokenizer_config.json count.

    As in transformers, only some classes of tokenizers heed them; here so does a config that names no class.
    """
    name = config.get("tokenizer_class")
    return name is None or (isinstance(name, str) and name.removesuffix("Fast") in FLAGGED_CLASSES)


def wanted(marks: list[int], token_id: int | None, add: object) -> list[int]:
    """These marks, the outermost first, with a token or without it; `add`: as settings say, True, False or nothing."""
    if add is True and token_id is not None and token_id not in marks:
        return [token_id, *marks]
    return [mark for mark in marks if mark != token_id] if add is False else marks


def read_config(path: Path) -> dict[str, object]:
    """tokenizer_config.json as a dict, empty when there is none. Raises TokenizerError."""
    return read_object(path)
