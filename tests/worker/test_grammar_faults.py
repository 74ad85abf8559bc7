"""What the engine process says of a grammar that it cannot have: whose fault it is."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest

from dsc_serve.frames import HEADER
from dsc_serve.grammars.faults import GrammarsFullError, GrammarsLostError
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.messages import CheckGrammar, GrammarChecked, StepDone, Submit, from_engine_decoder
from dsc_serve.worker.process import EngineProcess

ASKED = StructuredOutputs(regex="a")


class RefusingEngine:
    """Raises what it is told to where a grammar is asked for; or tells it later."""

    def __init__(self, fault: Exception, later: bool = False) -> None:
        self.fault, self.later = fault, later

    def add(self, *arguments: Any, **more: Any) -> None:
        raise self.fault

    def usable_grammars(self) -> Any:
        return SimpleNamespace(check=self.check)

    def check(self, asked: StructuredOutputs, told: Any) -> Any:
        if not self.later:
            raise self.fault
        told(self.fault)
        return lambda: None

    def close(self) -> None:
        pass


def said(engine: RefusingEngine, message: Any) -> Any:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = EngineProcess(theirs, engine)  # type: ignore[arg-type]
        process._handle(message)
        if engine.later:
            process.send(process._inbox.get())
        answer = from_engine_decoder.decode(ours.recv(2**16)[HEADER.size :])
        ours.close()
        process.close()
        return answer


@pytest.mark.parametrize(
    ("fault", "field", "unavailable"),
    [
        (ParameterError("structured_outputs", "structured_outputs cannot be used"), "structured_outputs", False),
        (GrammarsFullError("64 wait"), "", True),
        (GrammarsLostError("no process"), "", True),
    ],
    ids=repr,
)
def test_a_request_is_blamed_for_its_own_fault_alone(fault: Exception, field: str, unavailable: bool) -> None:
    done = said(RefusingEngine(fault), Submit("a", [1], SamplingParams(structured_outputs=ASKED)))
    assert isinstance(done, StepDone)
    (delta,) = done.deltas
    assert (delta.finish_reason, delta.error) == ("error", str(fault))
    assert (delta.error_field, delta.unavailable) == (field, unavailable)


@pytest.mark.parametrize("later", [False, True])
def test_what_became_of_a_check_is_told(later: bool) -> None:
    for fault, full, lost in (
        (ParameterError("structured_outputs", "it is wrong"), False, False),
        (GrammarsFullError("64 wait"), True, False),
        (GrammarsLostError("no process"), False, True),
    ):
        if not (later and full):
            answer = said(RefusingEngine(fault, later), CheckGrammar(7, ASKED))
            assert answer == GrammarChecked(7, str(fault), full, lost)
