"""What the steps of a tokenizer's decoder do, as filters on a text that grows token by token.

The `tokenizers` library decodes whole lists: each step turns the list of all tokens into another. Here a step is told
that a token starts, parts of it, that it stops, and at last that no more come. It passes on at once what no later token
can change and holds back the rest; so all that comes out, joined, is what the library makes of the whole list.

Text is bytes here: a character may be spread over tokens, and only the joined bytes say what it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from tokenizers import Regex, decoders

BYTE_TOKEN = re.compile(rb"<0x([0-9A-Fa-f]{2})>")
LONGEST_BYTE_TOKEN = 6
# what the library's `cleanup` replaces, in its order
CLEANED = (
    *((b" .", b"."), (b" ?", b"?"), (b" !", b"!"), (b" ,", b","), (b" ' ", b"'"), (b" n't", b"n't"), (b" 'm", b"'m")),
    *((b" do not", b" don't"), (b" 's", b"'s"), (b" 've", b"'ve"), (b" 're", b"'re")),
)


def byte_alphabet() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


ALPHABET = byte_alphabet()


def byte_level_bytes(token: bytes) -> bytes:
    """The bytes that a byte-level token stands for; itself where one of its characters stands for none."""
    try:
        return bytes(ALPHABET[char] for char in token.decode())
    except (KeyError, UnicodeDecodeError):
        return token


def overlap(text: bytes, pattern: bytes) -> int:
    """How many bytes at the end of a text could begin the pattern; fewer than it has."""
    return next((n for n in range(min(len(text), len(pattern) - 1), 0, -1) if text.endswith(pattern[:n])), 0)


class Output:
    """Where the last step's bytes gather."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def start(self) -> None: ...

    def text(self, piece: bytes) -> None:
        self._bytes += piece

    def stop(self) -> None: ...

    def end(self) -> None: ...

    def take(self) -> bytes:
        taken = bytes(self._bytes)
        self._bytes.clear()
        return taken


class Step:
    """A step that changes nothing; those below each change one thing."""

    past_start: bool = True  # the start of the text has gone by and no longer bears on what comes

    def __init__(self, sink: Step | Output) -> None:
        self.sink = sink

    def skip_start(self) -> None:
        """As after a text has begun."""
        self.past_start = True

    def start(self) -> None:
        self.sink.start()

    def text(self, piece: bytes) -> None:
        self.sink.text(piece)

    def stop(self) -> None:
        self.sink.stop()

    def end(self) -> None:
        self.sink.end()


class Fuse(Step):
    """All tokens become one."""

    past_start = False

    def start(self) -> None:
        if not self.past_start:
            self.past_start = True
            self.sink.start()

    def stop(self) -> None: ...

    def end(self) -> None:
        if self.past_start:
            self.sink.stop()
        self.sink.end()


class Spaces(Step):
    """A space between two tokens: what the library does for a tokenizer without decoder."""

    past_start = False

    def start(self) -> None:
        self.sink.start()
        if self.past_start:
            self.sink.text(b" ")
        self.past_start = True


class ByteLevel(Fuse):
    """Characters that stand for bytes."""

    def __init__(self, sink: Step | Output) -> None:
        super().__init__(sink)
        self._token = b""

    def text(self, piece: bytes) -> None:
        self._token += piece

    def stop(self) -> None:
        self.sink.text(byte_level_bytes(self._token))
        self._token = b""


class ByteFallback(Step):
    """Tokens such as <0xE4> become bytes; together: those in a row become one token."""

    def __init__(self, sink: Step | Output, together: bool) -> None:
        super().__init__(sink)
        self._together = together
        self._row = b""
        self._token: bytes | None = None

    def start(self) -> None:
        self._token = b""

    def text(self, piece: bytes) -> None:
        if self._token is None:
            self.sink.text(piece)
            return
        self._token += piece
        if len(self._token) > LONGEST_BYTE_TOKEN:
            self._begin(self._token)

    def stop(self) -> None:
        byte = None if self._token is None else BYTE_TOKEN.fullmatch(self._token)
        if byte is not None:
            self._row += bytes.fromhex(byte[1].decode())
            if not self._together:
                self._pass_row()
            return
        if self._token is not None:
            self._begin(self._token)
        self.sink.stop()

    def end(self) -> None:
        self._pass_row()
        self.sink.end()

    def _begin(self, text: bytes) -> None:
        """The token is none of those: what has come of it goes on."""
        self._token = None
        self._pass_row()
        self.sink.start()
        self.sink.text(text)

    def _pass_row(self) -> None:
        if self._row:
            row, self._row = self._row, b""
            self.sink.start()
            self.sink.text(row)
            self.sink.stop()


class Replace(Step):
    """A text within a token becomes another."""

    def __init__(self, sink: Step | Output, pattern: bytes, content: bytes) -> None:
        super().__init__(sink)
        self._pattern, self._content = pattern, content
        self._held = b""

    def text(self, piece: bytes) -> None:
        *before, rest = (self._held + piece).split(self._pattern)
        kept = len(rest) - overlap(rest, self._pattern)
        self._held = rest[kept:]
        self.sink.text(self._content.join([*before, rest[:kept]]))

    def stop(self) -> None:
        held, self._held = self._held, b""
        self.sink.text(held)
        self.sink.stop()


@lru_cache(maxsize=64)
def expression(pattern: str, content: str) -> decoders.Replace:
    return decoders.Replace(Regex(pattern), content)


class ReplaceExpression(Step):
    """What a regular expression finds within a token becomes another text. It may need all of the token to be found."""

    def __init__(self, sink: Step | Output, pattern: str, content: str) -> None:
        super().__init__(sink)
        self._pattern, self._content = pattern, content
        self._token = b""

    def text(self, piece: bytes) -> None:
        self._token += piece

    def stop(self) -> None:
        whole: str = expression(self._pattern, self._content).decode([self._token.decode("utf-8", "replace")])
        self._token = b""
        self.sink.text(whole.encode())
        self.sink.stop()


class Metaspace(Replace):
    """A mark in a token becomes a space; in the first token nothing where texts get a mark in front."""

    past_start = False

    def __init__(self, sink: Step | Output, mark: bytes, first: bytes) -> None:
        super().__init__(sink, mark, first)

    def stop(self) -> None:
        super().stop()
        self.skip_start()

    def skip_start(self) -> None:
        self.past_start, self._content = True, b" "


class WordPiece(Step):
    """Tokens but the first get a space in front, or lose the prefix that says that they go on with a word."""

    past_start = False

    def __init__(self, sink: Step | Output, prefix: bytes) -> None:
        super().__init__(sink)
        self._prefix = prefix
        self._head: bytes | None = None

    def start(self) -> None:
        self.sink.start()
        self._head = b"" if self.past_start else None
        self.past_start = True

    def text(self, piece: bytes) -> None:
        if self._head is None:
            self.sink.text(piece)
            return
        self._head += piece
        if len(self._head) >= len(self._prefix):
            self._pass_head()

    def stop(self) -> None:
        if self._head is not None:
            self._pass_head()
        self.sink.stop()

    def _pass_head(self) -> None:
        head, self._head = self._head or b"", None
        self.sink.text(head.removeprefix(self._prefix) if head.startswith(self._prefix) else b" " + head)


class WordEnds(Step):
    """The suffix that ends a word becomes a space, or nothing in the last token."""

    def __init__(self, sink: Step | Output, suffix: bytes) -> None:
        super().__init__(sink)
        self._suffix = suffix
        self._held = b""
        self._open = False

    def start(self) -> None:
        self._close(b" ")
        self._open = True
        self.sink.start()

    def text(self, piece: bytes) -> None:
        text = self._held + piece
        found = text.find(self._suffix)
        kept = found if found >= 0 else len(text) - overlap(text, self._suffix)
        self._held = text[kept:]
        self.sink.text(text[:kept])

    def stop(self) -> None: ...

    def end(self) -> None:
        self._close(b"")
        self.sink.end()

    def _close(self, mark: bytes) -> None:
        if self._open:
            held, self._held = self._held, b""
            self.sink.text(held.replace(self._suffix, mark))
            self.sink.stop()
            self._open = False


class Strip(Step):
    """A character goes, up to so many times, from a token's start and from its end.

    once: there is one token, so that its start is the text's.
    """

    def __init__(self, sink: Step | Output, content: bytes, start: int, stop: int, once: bool) -> None:
        super().__init__(sink)
        self._content, self._start, self._stop = content, start, stop
        self._left = start
        self._held = b""
        self.past_start = not (once and start)

    def skip_start(self) -> None:
        self.past_start, self._left = True, 0

    def start(self) -> None:
        self._left = self._start
        self.sink.start()

    def text(self, piece: bytes) -> None:
        text, content = self._held + piece, self._content
        while self._left and text.startswith(content):
            self._left -= 1
            text = text[len(content) :]
        if self._left:
            if content.startswith(text):  # nothing, or a part of the character
                self._held = text
                return
            self._left = 0
        self.past_start = True
        end = len(text)
        if self._stop:
            end -= overlap(text, content)
            for _ in range(self._stop):
                end -= len(content) if text[:end].endswith(content) else 0
        self._held = text[end:]
        self.sink.text(text[:end])

    def stop(self) -> None:
        held, self._held = self._held, b""
        if len(held) % len(self._content):  # a part of the character is last
            self.sink.text(held)
        self.sink.stop()


class Collapse(Step):
    """The decoder of connectionist temporal classification: repeated tokens count once, padding not at all."""

    def __init__(self, sink: Step | Output, replaced: Sequence[tuple[bytes, bytes]]) -> None:
        super().__init__(sink)
        self._replaced = replaced
        self._token, self._before = b"", b""
        self._begun = False

    def start(self) -> None:
        self._token = b""

    def text(self, piece: bytes) -> None:
        self._token += piece

    def stop(self) -> None:
        if self._begun and self._token == self._before:
            return
        self._begun, self._before = True, self._token
        text = self._token
        for pattern, content in self._replaced:
            text = text.replace(pattern, content)
        if text:
            self.sink.start()
            self.sink.text(text)
            self.sink.stop()
