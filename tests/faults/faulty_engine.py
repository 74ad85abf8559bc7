"""The engine process with a runner that fails where a prompt says so. A prompt's first three tokens are the fault's."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence

from clock import let_the_clock_jump

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.isolation import StepRunner
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.worker.process import main

RAISE, MEMORY, DIE, HANG = ([token] * 3 for token in (1001, 1002, 1003, 1004))
AFTER = 5  # tokens that a request with a fault generates before it acts
MEMORY_LIMIT = 8  # tokens in a step that a request with the fault MEMORY leaves room for


class FaultyRunner:
    def __init__(self, inner: StepRunner) -> None:
        self.inner = inner

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        faults = [request.tokens[:3] for request, _ in work if request.output_size >= AFTER]
        if RAISE in faults:
            self.inner.run(work)  # so that its traces, if there were any, would show
            raise RuntimeError("poison")
        if MEMORY in faults and sum(count for _, count in work) > MEMORY_LIMIT:
            raise MemoryError("no room for this step")
        if DIE in faults:
            os.kill(os.getpid(), signal.SIGSEGV)
        if HANG in faults:
            time.sleep(600)
        return self.inner.run(work)

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self.inner.copy_blocks(pairs)


if __name__ == "__main__":
    let_the_clock_jump()
    create = Engine.__init__

    def with_faults(self: Engine, *arguments: object, **options: object) -> None:
        create(self, *arguments, **options)  # type: ignore[arg-type]
        self.runner = FaultyRunner(self.runner)

    Engine.__init__ = with_faults  # type: ignore[method-assign]
    sys.exit(main(int(sys.argv[1])))
