"""The engine process with a runner that sleeps: schedule, KV blocks and prefix cache are real, tokens are not."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from dsc_serve.engine.engine import Engine
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.worker.process import main

STEP_S = 0.1
TOKEN = 300


class TimedRunner:
    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        time.sleep(STEP_S)
        computed = [request for request, count in work if request.num_computed + count >= request.num_tokens]
        reached = [one.id for request in computed for one in (request, *request.siblings)]
        return StepResult(tokens=dict.fromkeys(reached, TOKEN))

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        pass


if __name__ == "__main__":
    create = Engine.__init__

    def timed(self: Engine, *arguments: object, **options: object) -> None:
        create(self, *arguments, **options)  # type: ignore[arg-type]
        self.runner = TimedRunner()

    Engine.__init__ = timed  # type: ignore[method-assign]
    sys.exit(main(int(sys.argv[1])))
