"""Messages between the processes, as frames."""

from __future__ import annotations

import pytest

from dsc_serve.frames import HEADER
from dsc_serve.worker import messages
from dsc_serve.worker.messages import Delta, StepDone, frames, from_engine_decoder


def read(data: bytes) -> list[list[Delta]]:
    """The deltas of each message."""
    told = []
    while data:
        (size,) = HEADER.unpack_from(data)
        body, data = data[HEADER.size : HEADER.size + size], data[HEADER.size + size :]
        assert size <= messages.MAX_FRAME
        message = from_engine_decoder.decode(body)
        assert isinstance(message, StepDone)
        told.append(message.deltas)
    return told


def test_a_step_with_more_to_say_than_a_message_holds_says_it_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [Delta(str(i), list(range(60))) for i in range(7)]
    assert read(b"".join(frames(deltas))) == [deltas]
    monkeypatch.setattr(messages, "MAX_FRAME", 200)
    told = read(b"".join(frames(deltas)))
    assert [delta for part in told for delta in part] == deltas
    assert 1 < len(told) < 7
    with pytest.raises(ValueError, match="exceeds the limit of 200"):
        list(frames([Delta("large", list(range(200)))]))
