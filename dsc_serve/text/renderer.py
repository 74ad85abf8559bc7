"""A process that renders one chat template, so that a template that never ends, or wants all memory, can be killed.

Started as `python -P -m dsc_serve.text.renderer FD`; FD is its end of a socket pair, which carries frames. The process
ends when the other side hangs up.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from dsc_serve.config import child_environment
from dsc_serve.frames import FrameError, framed, read_frame
from dsc_serve.text.sandbox import Message, Sandbox, fault

CPU_S = 2.0  # of processor time for one text, or for compiling: a busy machine takes none of it away
WAIT_S = 10.0  # for the same by the clock, and for the process to start
MEMORY = 2**30  # bytes of address space, of which an idle process has some 50 MB
MOST_TEXT = 2**24  # characters of a rendered text: more than any body asks for
MOST_FRAME = 2**27


class RendererError(ValueError):
    """The template is at fault, or refuses the messages; one line. fatal: the process has ended."""

    def __init__(self, message: str, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class StartRendering(msgspec.Struct, array_like=True):
    """The first message to a process: its template."""

    template: str
    special_tokens: dict[str, str]
    cpu_s: float  # the limit for this and for each text


class Render(msgspec.Struct, array_like=True):
    messages: list[dict[str, Any]]
    add_generation_prompt: bool
    tools: list[dict[str, Any]] = []
    variables: dict[str, Any] = {}


class Rendered(msgspec.Struct, array_like=True):
    """What a process answers."""

    text: str = ""  # of a `Render`, "" of a `StartRendering`
    fault: str = ""  # why there is none


def send(connection: socket.socket, message: StartRendering | Render | Rendered) -> None:
    """Raises OSError, and UnicodeEncodeError for a lone surrogate."""
    connection.sendall(framed(msgspec.msgpack.encode(message)))


class Renderer:
    """One such process. Not for two threads at once.

    Raises RendererError where the template does not compile, OSError where there can be no more processes.
    """

    def __init__(self, template: str, special_tokens: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        self._connection = ours
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "dsc_serve.text.renderer", str(theirs.fileno())],
                    pass_fds=(theirs.fileno(),),
                    stdin=subprocess.DEVNULL,
                    env=child_environment(),
                    process_group=0,
                )
        except OSError:
            ours.close()
            raise
        try:
            self._ask(StartRendering(template, dict(special_tokens), CPU_S))
        except BaseException:
            self.close()
            raise

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Message] = (),
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Raises RendererError."""
        asked = Render(list(map(dict, messages)), add_generation_prompt, list(map(dict, tools)), dict(variables or {}))
        try:
            return self._ask(asked)
        except UnicodeEncodeError:
            raise RendererError("the messages hold a lone surrogate, which is not valid Unicode") from None
        except OverflowError:
            what = "the messages, tools or chat_template_kwargs hold a whole number of more than 64 bits"
            raise RendererError(what) from None

    def close(self) -> None:
        """Safe to call twice."""
        self._connection.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, message: StartRendering | Render) -> str:
        end = time.monotonic() + WAIT_S
        try:
            self._connection.settimeout(WAIT_S)
            send(self._connection, message)
            answer = msgspec.msgpack.decode(read_frame(self._connection, MOST_FRAME, end), type=Rendered)
        except TimeoutError:
            raise RendererError(f"chat template: it was not rendered within {WAIT_S:g} s", fatal=True) from None
        except (OSError, EOFError, FrameError, msgspec.MsgspecError):
            raise RendererError(self._ended(), fatal=True) from None
        if answer.fault:
            raise RendererError(answer.fault)
        return answer.text

    def _ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self._process.wait(1) == -signal.SIGPROF:
                return f"chat template: it takes more than {CPU_S:g} s of processor time"
        return "chat template: the process that renders it has ended"


def answer_to(work: Callable[[], str | None], cpu_s: float) -> Rendered:
    """What comes of it, within the limits of this process."""
    signal.setitimer(signal.ITIMER_PROF, cpu_s)  # ends the process
    try:
        text = work() or ""
        if len(text) > MOST_TEXT:
            return Rendered(fault=f"chat template: it writes more than {MOST_TEXT} characters")
        msgspec.msgpack.encode(text)  # a lone surrogate of the template's own
        return Rendered(text)
    except Exception as error:
        return Rendered(fault=fault(error))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def main(descriptor: int) -> None:
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for limit, value in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        resource.setrlimit(limit, (value, value))
    connection = socket.socket(fileno=descriptor)
    with contextlib.suppress(EOFError, OSError):
        follow(connection)


def follow(connection: socket.socket) -> None:
    """Compile and then render until the other side hangs up. Raises EOFError and OSError."""
    start = msgspec.msgpack.decode(read_frame(connection, MOST_FRAME), type=StartRendering)
    made: list[Sandbox] = []
    send(connection, answer_to(lambda: made.append(Sandbox(start.template, start.special_tokens)), start.cpu_s))
    for sandbox in made:
        while True:
            asked = msgspec.msgpack.decode(read_frame(connection, MOST_FRAME), type=Render)
            work = functools.partial(
                sandbox.render, asked.messages, asked.add_generation_prompt, asked.tools, asked.variables
            )
            send(connection, answer_to(work, start.cpu_s))


if __name__ == "__main__":
    main(int(sys.argv[1]))
