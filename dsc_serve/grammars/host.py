"""The host: forks a process for each grammar, and ends those that take too long or too much.

Run as `python -P -m dsc_serve.grammars.host FD`, where FD is its end of a socket pair. It holds one thread, so that it
may fork, and the tokenizer, which all grammars share with it. It ends when the other side hangs up, and its grammars
with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import selectors
import signal
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import llguidance
import tokenizers

from dsc_serve.frames import Frames
from dsc_serve.grammars.member import OUT_OF_MEMORY, Member, quiet
from dsc_serve.grammars.memory import own_bytes
from dsc_serve.grammars.messages import (
    NO_OUTPUT,
    Begin,
    Compile,
    Demote,
    Ended,
    Forked,
    FromHost,
    Kill,
    frame,
    to_host,
)
from dsc_serve.grammars.vocabulary import Vocabulary

AT_ONCE = 3  # grammars that are compiled with precedence
MOST_LATE = 8  # unfinished ones that have lost it; beyond that the oldest is given up
# After so many seconds a grammar that is still being compiled goes down in rank. Ordinary ones take milliseconds.
NICENESS = ((0.02, 10), (0.2, 19))
PRECEDENCE_S = NICENESS[-1][0]
DEMOTED = 19
PIECE = 2**16
PR_SET_PDEATHSIG = 1
PROCESS_MRELEASE = 448  # a system call, of the same number everywhere
NUMBER = struct.Struct("=I")
OUTPUT = struct.Struct("=q")


@dataclass
class Process:
    """A grammar's process, as its parent sees it."""

    grammar: int
    pid: int
    pipe: int  # numbers come: of the thread that compiles, then 0; the end of file when the process ends
    computes: mmap.mmap  # the output whose answer it computes, written by it and read when it has ended
    started: float  # monotonic seconds
    compiler: int = 0  # the thread that compiles
    compiled: bool = False
    niceness: int = 0
    reason: str = ""  # why the host ended it


@dataclass
class Host:
    connection: socket.socket
    begin: Begin
    tokens: llguidance.LLTokenizer
    processes: dict[int, Process] = field(default_factory=dict)
    waiting: deque[tuple[Compile, int]] = field(default_factory=deque)

    def run(self) -> None:
        """Until the other side hangs up."""
        self._pid = os.getpid()
        self._frames = Frames(to_host)
        self._descriptors: deque[int] = deque()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.connection, selectors.EVENT_READ)
        open_ = True
        while open_:
            for key, _ in self._selector.select(self._pause()):
                if key.fileobj is self.connection:
                    open_ = self._receive()
                else:
                    self._hear(key.data)
            self._look()
        for process in self.processes.values():
            self._signal(process, signal.SIGKILL)

    def _receive(self) -> bool:
        try:
            piece, descriptors, _, _ = socket.recv_fds(self.connection, PIECE, 64)
        except ConnectionResetError:
            return False
        self._descriptors += descriptors
        for message in self._frames.add(piece):
            if isinstance(message, Compile) and not self._descriptors:  # it was lost where too many files are open
                self._refuse(message.grammar, "too many files are open")
            elif isinstance(message, Compile):
                self.waiting.append((message, self._descriptors.popleft()))
            elif isinstance(message, Demote) and message.grammar in self.processes:
                process = self.processes[message.grammar]
                self._demote(process, DEMOTED, process.pid)
            elif isinstance(message, Kill):
                self._drop(message.grammar, message.at_once)
        return bool(piece)

    def _drop(self, grammar: int, at_once: bool) -> None:
        for waiting in self.waiting:
            if waiting[0].grammar == grammar:
                self.waiting.remove(waiting)
                os.close(waiting[1])
                self._tell(Ended(grammar, "", 0.0))
                return
        if grammar in self.processes:
            self._end(self.processes[grammar], "nobody wants it any more")
            if at_once:
                take_memory(self.processes[grammar].pid)

    def _hear(self, process: Process) -> None:
        if told := os.read(process.pipe, NUMBER.size):
            (number,) = NUMBER.unpack(told)
            process.compiler, process.compiled = number or process.compiler, number == 0
            process.niceness = 0  # of the thread that answers from now on
            return
        self._selector.unregister(process.pipe)
        os.close(process.pipe)
        del self.processes[process.grammar]
        _, status, usage = os.wait4(process.pid, 0)
        (output,) = OUTPUT.unpack_from(process.computes)
        process.computes.close()
        code, cpu_s = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
        if process.reason:
            ended = Ended(process.grammar, process.reason, cpu_s, output)
        elif code == OUT_OF_MEMORY or -code in (signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS):
            reason = f"it takes more than {self.begin.memory_bytes >> 20} MiB, or nests too deeply"
            ended = Ended(process.grammar, reason, cpu_s, output)
        else:  # somebody else has ended it, or a fault of ours
            ended = Ended(process.grammar, f"its process ended with {code}", cpu_s, output, blameless=True)
        self._tell(ended)

    def _look(self) -> None:
        """Start, demote and end what is due."""
        now = time.monotonic()
        unfinished = [process for process in self.processes.values() if not process.compiled]
        late = [process for process in unfinished if now - process.started >= PRECEDENCE_S]
        for process in unfinished:
            age = now - process.started
            for after, niceness in NICENESS:
                if age >= after:
                    self._demote(process, niceness, process.compiler)
            if age >= self.begin.timeout_s:
                self._end(process, f"it takes longer than {self.begin.timeout_s:g} s to compile")
        for process in late[: max(0, len(late) - MOST_LATE)]:
            self._end(process, "it takes longer to compile than others that wait can bear")
        room = AT_ONCE - (len(unfinished) - len(late))
        for _ in range(min(room, len(self.waiting))):
            self._start(*self.waiting.popleft())

    def _pause(self) -> float | None:
        """Seconds until something may be due."""
        now = time.monotonic()
        ages = [now - process.started for process in self.processes.values() if not process.compiled]
        moments = (*(after for after, _ in NICENESS), self.begin.timeout_s)
        left = [moment - age for age in ages for moment in moments if moment > age]
        return min(left, default=0.05 if ages else None)

    def _start(self, message: Compile, descriptor: int) -> None:
        held = [descriptor]
        try:
            ours, theirs = os.pipe()
            held += [ours, theirs]
            computes = mmap.mmap(-1, mmap.PAGESIZE)
            OUTPUT.pack_into(computes, 0, NO_OUTPUT)
            at_first = own_bytes()
            pid = os.fork()
        except OSError as error:
            for open_ in held:
                os.close(open_)
            self._refuse(message.grammar, str(error))
            return
        if pid == 0:
            self._become(message, descriptor, theirs, computes)
        os.close(theirs)
        os.close(descriptor)
        self._tell(Forked(message.grammar, pid, at_first))
        process = Process(message.grammar, pid, ours, computes, time.monotonic())
        self.processes[message.grammar] = process
        self._selector.register(ours, selectors.EVENT_READ, process)

    def _become(self, message: Compile, descriptor: int, pipe: int, computes: mmap.mmap) -> None:
        """Be the grammar's process from now on; never returns."""
        code = 1
        try:
            parent = self._pid
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            quiet()
            if os.getppid() != parent:  # which ended before it could take this process with it
                return
            with contextlib.suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text("1000")  # where memory runs out, this goes first
            self._selector.close()
            self.connection.close()
            held = [process.pipe for process in self.processes.values()]
            held += [other for _, other in self.waiting] + list(self._descriptors)
            for other in held:
                os.close(other)
            with socket.socket(fileno=descriptor) as connection:
                begin = self.begin
                mark = partial(OUTPUT.pack_into, computes, 0)
                member = Member(connection, begin.vocab_size, begin.ends, begin.memory_bytes, begin.most_forced, mark)
                code = member.run(message.asked, self.tokens, lambda number: tell(pipe, number))
        finally:
            os._exit(code)

    def _refuse(self, grammar: int, why: str) -> None:
        self._tell(Ended(grammar, f"no process can be made for it: {why}", 0.0, blameless=True))

    def _tell(self, message: FromHost) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who hung up is seen by the loop
            self.connection.sendall(frame(message))

    def _demote(self, process: Process, niceness: int, thread: int) -> None:
        """Put a thread of a grammar's behind others. Where the system knows no rank of threads, nothing happens."""
        if niceness > process.niceness and thread:
            process.niceness = niceness
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, thread, niceness)
                if niceness == DEMOTED:  # it then runs only where nobody else would
                    os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))

    def _end(self, process: Process, reason: str) -> None:
        process.reason = process.reason or reason
        self._signal(process, signal.SIGKILL)

    def _signal(self, process: Process, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def take_memory(pid: int) -> None:
    """Take back the memory of a process that has been killed, by this process's rank and not by its own.

    One that runs only where nobody else would may take seconds to end, and only root may raise its rank again.
    """
    with contextlib.suppress(OSError):
        descriptor = os.pidfd_open(pid)
        try:
            ctypes.CDLL(None).syscall(PROCESS_MRELEASE, descriptor, 0)
        finally:
            os.close(descriptor)


def tell(pipe: int, number: int) -> None:
    os.write(pipe, NUMBER.pack(number))


def first(connection: socket.socket) -> Begin | None:
    """The first message, and not a byte more: descriptors come with the next one. None where nobody is there."""
    frames = Frames(to_host)
    while piece := connection.recv(min(frames.missing, PIECE)):
        for message in frames.add(piece):
            assert isinstance(message, Begin)
            return message
    return None


def main(descriptor: int) -> int:
    # Who made this process ends it, by hanging up; it may write to a terminal from the background.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    begin = first(connection)
    if begin is None:
        return 1
    vocabulary = Vocabulary(tokenizers.Tokenizer.from_str(begin.tokenizer), begin.vocab_size)
    wrapper = llguidance.TokenizerWrapper(vocabulary)
    tokens = llguidance.LLTokenizer(wrapper, n_vocab=begin.vocab_size + 1)
    gc.collect()
    gc.freeze()  # else collecting in a process would copy all that it shares with this one
    Host(connection, begin, tokens).run()
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
