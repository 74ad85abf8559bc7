"""A runner whose outputs are given: steps take what they take, and nobody's continuation repeats itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsc_serve.engine.isolation import StepRunner
from dsc_serve.engine.request import Request
from dsc_serve.engine.step_result import StepResult


class ScriptedRunner:
    """Computes and draws as another does, and then puts each request's script in the place of what was drawn.

    scripts: the output of each request, by id. Models of random weights loop on a few tokens when they are greedy, and
    then read the same few experts again and again; and drafts of a greedy step cost what they cost in practice.
    """

    def __init__(self, inner: StepRunner, scripts: Mapping[str, Sequence[int]]) -> None:
        self._inner, self._scripts = inner, scripts

    def run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        result = self._inner.run(work)
        for request, _ in work:
            if request.id not in result.tokens:
                continue
            script, place = self._scripts[request.id], request.output_size
            result.tokens[request.id] = script[place]
            further = result.further.get(request.id)
            if further is not None:
                right = 0
                while right < further.computed and request.drafts[right] == script[place + right]:
                    right += 1
                further.tokens = list(script[place + 1 : place + 1 + right])
        return result

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._inner.copy_blocks(pairs)
