"""llama.cpp in a process of its own, where the package llama-cpp-python is installed: decoding of GGUF files, timed.

Run as a program it takes commands, one JSON object a line, and answers each with one. `Peer` is the other end.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LAUNCH = (sys.executable, "-m", "dsc_serve.bench.step.llama_peer")
UBATCH = 512  # tokens that llama.cpp computes at a time, its default


class PeerError(RuntimeError):
    """The other program cannot be measured; one line that says why."""


class Peer:
    """The other end. room: tokens of each of so many streams. Raises PeerError where the file cannot be loaded."""

    def __init__(self, file: Path, streams: int, room: int, threads: int, launch: Sequence[str] = LAUNCH) -> None:
        self._process = subprocess.Popen([*launch], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self._ask(do="load", file=str(file), streams=streams, room=room, threads=threads)
        except PeerError:
            self.end()
            raise

    def begin(self, streams: int, prompt_tokens: int) -> None:
        """Let so many streams decode, in place of those before, with prompts of this length before them."""
        self._ask(do="begin", streams=streams, prompt_tokens=prompt_tokens)

    def steps(self, count: int) -> list[float]:
        """Milliseconds of steps in which each stream gets a token."""
        return list(self._ask(do="steps", count=count)["ms"])

    def prompt(self, tokens: int) -> float:
        """Milliseconds of a prompt."""
        return float(self._ask(do="prompt", tokens=tokens)["ms"])

    def _ask(self, **command: object) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(command) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"it ended with status {self._process.wait()}"}
        if "error" in answer:
            raise PeerError(f"llama.cpp: {answer['error']}")
        return dict(answer)

    def end(self) -> None:
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: object, error: object, where: object) -> None:
        self.end()


class Llama:
    """llama.cpp's C interface: one model, one context of so many sequences."""

    def __init__(self, file: str, streams: int, room: int, threads: int) -> None:
        self.c: Any = importlib.import_module("llama_cpp")
        self.c.llama_backend_init()
        model_options = self.c.llama_model_default_params()
        self._quieten()
        self.model = self.c.llama_model_load_from_file(file.encode(), model_options)
        if not self.model:
            raise PeerError(f"{file} cannot be loaded")
        options = self.c.llama_context_default_params()
        options.n_ctx, options.n_seq_max = streams * room, streams
        options.n_batch, options.n_ubatch = max(UBATCH, room), UBATCH
        options.n_threads = options.n_threads_batch = threads
        self.context = self.c.llama_init_from_model(self.model, options)
        if not self.context:
            raise PeerError(f"no context of {streams} times {room} tokens")
        self.words: int = self.c.llama_vocab_n_tokens(self.c.llama_model_get_vocab(self.model))
        self.batch = self.c.llama_batch_init(max(UBATCH, room), 0, 1)
        self.streams = self.position = 0

    def _quieten(self) -> None:
        self._log = self.c.llama_log_callback(lambda *_: None)
        self.c.llama_log_set(self._log, None)

    def clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)

    def decode(self, tokens: Sequence[tuple[int, int, int]], logits: bool = True) -> float:
        """Milliseconds of one call, with logits of each sequence's last token. tokens: id, position, sequence."""
        batch = self.batch
        batch.n_tokens = len(tokens)
        last = {sequence: i for i, (_, _, sequence) in enumerate(tokens)}
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = logits and last[sequence] == i
        began = time.perf_counter()
        status = self.c.llama_decode(self.context, batch)
        if logits:
            self.c.llama_get_logits(self.context)  # which waits for them
        spent = 1e3 * (time.perf_counter() - began)
        if status:
            raise PeerError(f"llama_decode ended with {status}")
        return spent

    def token(self, i: int) -> int:
        return (7919 * i + 31) % self.words

    def begin(self, streams: int, prompt_tokens: int) -> None:
        self.clear()
        for sequence in range(streams):
            self.decode([(self.token(sequence + j), j, sequence) for j in range(prompt_tokens)], logits=False)
        self.streams, self.position = streams, prompt_tokens

    def step(self) -> float:
        spent = self.decode(
            [(self.token(self.position + sequence), self.position, sequence) for sequence in range(self.streams)]
        )
        self.position += 1
        return spent

    def prompt(self, tokens: int) -> float:
        self.clear()
        return self.decode([(self.token(j), j, 0) for j in range(tokens)])


def answer(llama: Llama | None, command: dict[str, Any]) -> tuple[Llama | None, dict[str, object]]:
    """What a command does and says."""
    do = command.pop("do")
    if do == "load":
        return Llama(**command), {}
    assert llama is not None
    if do == "begin":
        llama.begin(**command)
        return llama, {}
    if do == "steps":
        return llama, {"ms": [llama.step() for _ in range(command["count"])]}
    return llama, {"ms": llama.prompt(**command)}


def serve() -> None:
    llama: Llama | None = None
    for line in sys.stdin:
        try:
            llama, said = answer(llama, json.loads(line))
        except ImportError:
            said = {"error": "the package llama_cpp is missing: pip install llama-cpp-python"}
        except PeerError as error:
            said = {"error": str(error)}
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    serve()
