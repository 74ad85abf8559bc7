"""What the three parties say to each other: a follower (in the engine), the host, and a process for each grammar.

Follower and host: a stream of frames (`dsc_serve.frames`). Follower and grammar: one message a packet, in msgpack.
"""

from __future__ import annotations

import msgspec

from dsc_serve.frames import framed
from dsc_serve.structured_outputs import StructuredOutputs

NO_OUTPUT = -1


class Begin(msgspec.Struct, tag=True, array_like=True):
    """To a new host: the tokenizer, and what each grammar may take."""

    tokenizer: str  # its tokenizer.json
    vocab_size: int
    ends: tuple[int, ...]  # tokens that end a text; allowed where the grammar is fulfilled, and nowhere else
    timeout_s: float  # for compiling
    memory_bytes: int  # above what every grammar's process begins with
    most_forced: int  # tokens that an answer tells beforehand; 0: nobody drafts


class Compile(msgspec.Struct, tag=True, array_like=True):
    """To the host, together with the grammar's end of its socket."""

    grammar: int
    asked: StructuredOutputs


class Demote(msgspec.Struct, tag=True, array_like=True):
    """To the host: this grammar takes the processor from others."""

    grammar: int


class Kill(msgspec.Struct, tag=True, array_like=True):
    """To the host."""

    grammar: int
    at_once: bool = False  # its memory is wanted before its turn to end comes, which its rank may put off


class Forked(msgspec.Struct, tag=True, array_like=True):
    """From the host: a grammar has a process."""

    grammar: int
    pid: int
    bytes_at_first: int  # what that seemed to hold then


class Ended(msgspec.Struct, tag=True, array_like=True):
    """From the host: a grammar's process is no more."""

    grammar: int
    reason: str  # "" where it was told to end
    cpu_s: float
    output: int = NO_OUTPUT  # the one whose answer it was computing, NO_OUTPUT for none
    blameless: bool = False  # it was not what was asked for that ended it


class Open(msgspec.Struct, tag=True, array_like=True):
    """To a grammar: a new output, which has these tokens already."""

    output: int
    tokens: list[int]


class Push(msgspec.Struct, tag=True, array_like=True):
    """To a grammar: tokens that an output has grown by."""

    output: int
    tokens: list[int]


class Look(msgspec.Struct, tag=True, array_like=True):
    """To a grammar: what may follow each of these tokens, should they follow an output, which stays where it is."""

    output: int
    number: int  # of this look among the output's
    tokens: list[int]
    known: int = 0  # the first tokens, of which that is known


class Drop(msgspec.Struct, tag=True, array_like=True):
    """To a grammar: nobody wants to know more of this output."""

    output: int


class Compiled(msgspec.Struct, tag=True, array_like=True):
    """From a grammar, once: whether it can be used."""

    error: str  # "" where it can
    memory_bytes: int


class Answer(msgspec.Struct, tag=True, array_like=True):
    """From a grammar: what may follow an output."""

    output: int
    count: int  # the tokens that it had seen
    allowed: bytes  # one bit for each token of the vocabulary, little end first
    complete: bool  # nothing may follow
    error: str  # it cannot go on; "" where it can
    memory_bytes: int
    forced: tuple[int, ...] = ()  # tokens that must follow, one after the other
    after: bytes = b""  # what may follow the last of them, b"" where that is not known or is nothing

    def fits(self, size: int) -> bool:
        """Whether it says what may follow of a vocabulary of so many bytes of bits."""
        return self.complete or bool(self.error) or len(self.allowed) == size

    @property
    def last(self) -> bool:
        return True


class Foreseen(msgspec.Struct, tag=True, array_like=True):
    """From a grammar: what may follow the next tokens of a look, in order; as `Answer.allowed`."""

    output: int
    number: int
    allowed: list[bytes]
    # no more comes, though it may be fewer than there are tokens: after one that may not follow, or that completes the
    # text, and where something else is asked meanwhile
    last: bool
    memory_bytes: int
    cpu_s: float  # that these took

    def fits(self, size: int) -> bool:
        """As `Answer.fits`."""
        return all(len(bits) == size for bits in self.allowed)


ToHost = Begin | Compile | Demote | Kill
FromHost = Forked | Ended
ToGrammar = Open | Push | Look | Drop
FromGrammar = Compiled | Answer | Foreseen

encode = msgspec.msgpack.Encoder().encode
to_host = msgspec.msgpack.Decoder(ToHost)
from_host = msgspec.msgpack.Decoder(FromHost)
to_grammar = msgspec.msgpack.Decoder(ToGrammar)
from_grammar = msgspec.msgpack.Decoder(FromGrammar)


def frame(message: ToHost | FromHost) -> bytes:
    return framed(encode(message))
