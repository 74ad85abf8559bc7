"""An engine process without a model or torch, for the supervisor to start: does what its requests' prompts say."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from dsc_serve.frames import HEADER
from dsc_serve.sampling_params import EngineCapacity
from dsc_serve.worker.messages import (
    Delta,
    Finish,
    FromEngine,
    ModelInfo,
    Shutdown,
    StartFailed,
    Stats,
    StatsRequest,
    StepDone,
    Submit,
    ToEngine,
    frame,
    to_engine_decoder,
)

# What the first token of a prompt makes this engine do.
ANSWER, BEGIN, WAIT, DIE, HANG, STALL, FLOOD, AGE = range(8)
INFO = ModelInfo(
    capacity=EngineCapacity(100, 100, 100, 1),
    dtype="",
    device="",
    threads=1,
    kernels="",
    policy="fcfs",
    total_parameters=0,
    active_parameters=0,
)


class ScriptedEngine:
    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.open: set[str] = set()

    def read(self) -> ToEngine:
        (size,) = HEADER.unpack(self.exactly(HEADER.size))
        return to_engine_decoder.decode(self.exactly(size))

    def exactly(self, size: int) -> bytes:
        data = self.connection.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            raise SystemExit
        return data

    def say(self, message: FromEngine) -> None:
        self.connection.sendall(frame(message))

    def take(self, submit: Submit) -> None:
        name, first = submit.request_id, submit.prompt[0]
        self.open.add(name)
        if first == DIE or (first == AGE and not submit.age_s):
            os.kill(os.getpid(), signal.SIGKILL)
        elif first == HANG:
            time.sleep(600)
        elif first == ANSWER:
            self.open.remove(name)
            self.say(StepDone([Delta(name, [1]), Delta(name, [os.getpid()], "length")]))
        elif first == AGE:
            self.say(StepDone([Delta(name, [int(1000 * submit.age_s)], "length")]))
        elif first in (BEGIN, STALL):
            self.say(StepDone([Delta(name, [1])]))
        elif first == FLOOD:
            for _ in range(50):
                self.say(StepDone([Delta(name, [1])]))

    def run(self) -> None:
        while not isinstance(message := self.read(), Shutdown):
            if isinstance(message, Submit):
                self.take(message)
            elif isinstance(message, Finish):
                self.open.discard(message.request_id)
            elif isinstance(message, StatsRequest):
                self.say(
                    Stats(
                        ticket=message.ticket,
                        running=len(self.open),
                        waiting=0,
                        blocks_free=0,
                        blocks_cached=0,
                        blocks_total=0,
                        steps=0,
                        preemptions=0,
                        timeouts=0,
                        prompt_tokens=0,
                        cached_tokens=0,
                        invariant_repairs=0,
                    )
                )


def main(starts: Path, good_starts: int, descriptor: int) -> None:
    """The first `good_starts` processes come up; `starts` counts them all."""
    engine = ScriptedEngine(socket.socket(fileno=descriptor))
    engine.read()
    with starts.open("a") as file:
        file.write(".")
    if starts.stat().st_size > good_starts:
        engine.say(StartFailed("no more engines"))
        return
    model = starts.with_name("model")  # what the folder is said to hold now
    engine.say(msgspec.structs.replace(INFO, fingerprint=model.read_text() if model.exists() else ""))
    engine.run()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
