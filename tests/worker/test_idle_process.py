"""A process that has nothing to compute sleeps, and wakes for who is out of time."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

from support.fake_runner import fake_engine
from support.made_adapters import MadeAdapters

from dsc_serve.adapter_choice import AdapterChoice
from dsc_serve.frames import HEADER
from dsc_serve.sampling_params import SamplingParams
from dsc_serve.scheduling_params import SchedulingParams
from dsc_serve.worker.messages import Submit, from_engine_decoder
from dsc_serve.worker.process import EngineProcess


def test_one_that_waits_for_an_adapter_alone_is_told_when_its_time_is_out(tmp_path: Path) -> None:
    made = MadeAdapters(tmp_path, budget=1)
    made.put(a="1", b="2")
    held = made.get(AdapterChoice.of("a"))
    engine = fake_engine(adapters=made.adapters)
    engine.scheduler.clock = time.monotonic
    ours, theirs = socket.socketpair()
    ours.settimeout(20)
    with ours, theirs:
        process = EngineProcess(theirs, engine)
        loop = threading.Thread(target=process.run, daemon=True)
        loop.start()
        limits = SchedulingParams(queue_timeout_s=0.5)
        params = SamplingParams(max_tokens=1)
        process._inbox.put(Submit("late", [1], params, scheduling=limits, adapter=AdapterChoice.of("b")))
        (delta,) = from_engine_decoder.decode(ours.recv(2**16)[HEADER.size :]).deltas  # type: ignore[union-attr]
        assert (delta.request_id, delta.finish_reason) == ("late", "timeout") and "queue_timeout_s" in delta.error
        began = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - began < 0.25, "nobody waits, and it sleeps"
        ours.close()
        loop.join(20)
        process.close()
    assert held.lease is not None
