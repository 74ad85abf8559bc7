"""A step that fails is computed again in parts, so that only the requests that make it fail have to end.

Computing a part of a step again is safe: keys and values are written to the same places, a sampled token depends on its
request's seed and position, and requests advance only when the step is committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult
from dsc_serve.model.exchange import GroupLostError
from dsc_serve.panics import panics_as_errors


class StepRunner(Protocol):
    """What computes a step: `Runner` with a model, or a test's without one."""

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult: ...

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None: ...


@dataclass
class Computed:
    """What became of a step."""

    result: StepResult = field(default_factory=StepResult)
    errors: dict[str, Exception] = field(default_factory=dict)  # by request id; these requests must end
    fewer: dict[str, int] = field(default_factory=dict)  # tokens computed instead of the planned number


def compute(runner: StepRunner, work: Sequence[tuple[Request, int]]) -> Computed:
    """Run a step; where it raises, its halves, and so on to single requests. Raises what no smaller step can cure."""
    done = Computed()
    parts = [list(work)]
    while parts:
        part = parts.pop()
        error = attempt(runner, part, done.result)
        if error is None:
            continue
        if len(part) > 1:
            middle = len(part) // 2
            parts += [part[middle:], part[:middle]]
            continue
        ((request, count),) = part
        if count > 1 and is_out_of_memory(error):
            done.fewer[request.id] = count // 2
            parts.append([(request, count // 2)])
        else:
            done.errors[request.id] = error
    return done


def attempt(runner: StepRunner, part: Sequence[tuple[Request, int]], result: StepResult) -> Exception | None:
    """Run one part and add what it computed to the result, or leave its requests as they were."""
    told = [one for request, _ in part for one in (request, *request.siblings)]
    marks = [(request, request.reported, request.routed, len(request.collected)) for request in told]
    try:
        with panics_as_errors():
            result.add(runner.run(part))
    except (torch.AcceleratorError, GroupLostError):  # the device, or another rank, is lost to this process for good
        raise
    except Exception as error:
        for request, reported, routed, rows in marks:
            request.reported, request.routed = reported, routed
            del request.collected[rows:]
        return error.with_traceback(None)  # its frames hold the step's tensors, perhaps all the memory there is
    return None


def is_out_of_memory(error: Exception) -> bool:
    """Torch has no class of its own for a CPU that is out of memory."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
