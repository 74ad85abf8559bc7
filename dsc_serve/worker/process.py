"""The engine process: runs steps while there is work, waits for messages while there is none.

Started by the supervisor as `python -P -m dsc_serve.worker.process FD`; FD is its end of a socket pair.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import msgspec
import torch

from dsc_serve.config import resolve_model
from dsc_serve.engine.adapter_report import AdapterReport
from dsc_serve.engine.engine import Engine
from dsc_serve.engine.output import Delta, refusal
from dsc_serve.engine.preparation import start_errors
from dsc_serve.engine.ranks.watch import end_soon
from dsc_serve.engine.start import start_engine
from dsc_serve.engine.tenant_report import TenantsReport
from dsc_serve.frames import limit_sending, read_frame
from dsc_serve.grammars.faults import GrammarsFullError, GrammarsLostError
from dsc_serve.machine import default_threads
from dsc_serve.model.decoder import Decoder, parameter_counts
from dsc_serve.model.description import kernels
from dsc_serve.model.exchange import GroupLostError
from dsc_serve.model.fingerprint import Fingerprint
from dsc_serve.panics import PanicError, panics_as_errors
from dsc_serve.parameter_errors import ParameterError
from dsc_serve.structured_outputs import StructuredOutputs
from dsc_serve.worker.messages import (
    MAX_FRAME,
    AdapterList,
    CheckGrammar,
    Finish,
    ForgetGrammar,
    FromEngine,
    GrammarChecked,
    ListAdapters,
    ListTenants,
    ModelInfo,
    Shutdown,
    Start,
    StartFailed,
    Stats,
    StatsRequest,
    Submit,
    TenantList,
    ToEngine,
    frame,
    frames,
    to_engine_decoder,
)

CLOSE_LIMIT_S = 5.0
SEND_TIMEOUT_S = 60.0  # an API process that reads nothing for so long is hung


def receive(source: socket.socket) -> ToEngine | None:
    """The next message, or None when the other side has closed the connection. Raises FrameError."""
    try:
        body = read_frame(source, MAX_FRAME)
    except EOFError:
        return None
    message: ToEngine = to_engine_decoder.decode(body)
    return message


def model_info(model: Decoder, engine: Engine, fingerprint: str) -> ModelInfo:
    total, active = parameter_counts(model.config)
    return ModelInfo(
        capacity=engine.capacity,
        dtype=str(model.dtype).removeprefix("torch."),
        device=engine.config.device,
        threads=engine.config.threads or default_threads(),
        kernels=kernels(model),
        policy=engine.config.policy,
        total_parameters=total,
        active_parameters=active,
        fingerprint=fingerprint,
        pooling=engine.pooling,
        weight_bytes=dict(model.held),
        kv_token_bytes=model.kv_bytes(engine.config.kv_dtype == "int8"),
        captured=engine.captured,
    )


def stats_of(engine: Engine, ticket: int) -> Stats:
    scheduler = engine.scheduler
    return Stats(
        ticket=ticket,
        running=len(scheduler.running),
        waiting=len(scheduler.waiting) + len(scheduler.families),
        blocks_free=scheduler.pool.free,
        blocks_cached=scheduler.pool.cached,
        blocks_total=scheduler.pool.total,
        steps=engine.counters.steps,
        preemptions=scheduler.preemptions,
        timeouts=scheduler.timeouts,
        prompt_tokens=scheduler.prompt_tokens,
        cached_tokens=scheduler.cached_tokens,
        invariant_repairs=engine.counters.repairs,
        routing=None if engine.routing is None else engine.routing.report(),
        bank_bytes=engine.bank_bytes,
        device=engine.config.device,
        step_report=engine.report,
        phases=scheduler.phases,
        held_back=scheduler.held_back(),
        drafts=engine.drafter.report,
        adapters=adapter_report(engine),
    )


def adapter_report(engine: Engine) -> AdapterReport | None:
    """The engine's, with what there is now."""
    adapters = engine.arrivals.adapters
    if adapters is None:
        return None
    return msgspec.structs.replace(
        engine.adapter_report,
        known=len(adapters.names()),
        loaded=adapters.in_memory,
        nbytes=adapters.nbytes,
        budget=adapters.budget,
        waiting=len(engine.arrivals),
        **vars(adapters.counts),
    )


class Wake(msgspec.Struct):
    """A step is to be made though nothing has been asked for."""


WAKE = Wake()


class EngineProcess:
    """The loop around one engine. Messages arrive through a thread that blocks on the socket; an idle loop waits.

    When the connection closes, whatever the reason, the process ends: it never outlives its API process.
    """

    def __init__(self, connection: socket.socket, engine: Engine) -> None:
        self.connection, self.engine = connection, engine
        self._inbox: queue.SimpleQueue[ToEngine | GrammarChecked | Wake | None] = queue.SimpleQueue()
        self._checks: dict[int, Callable[[], None]] = {}
        self._reader = threading.Thread(target=self._receive, name="inbox", daemon=True)
        self._reader.start()

    def run(self) -> None:
        adapters = self.engine.arrivals.adapters
        if adapters is not None:
            adapters.loader.on_done = self._wake
            adapters.survey()
        if self.engine.ranks is not None:
            self.engine.ranks.on_lost = self._lose
        while True:
            try:
                # Idle until told, or until one that waits for an adapter is out of time.
                message = self._inbox.get(not self.engine.has_work, self.engine.arrivals.patience_s)
                if message is None or isinstance(message, Shutdown):
                    return
                if isinstance(message, GrammarChecked):
                    self._checks.pop(message.ticket, None)
                    self.send(message)
                elif isinstance(message, Wake):
                    self._step()
                else:
                    self._handle(message)
            except queue.Empty:
                self._step()

    def close(self) -> None:
        """Hang up and wait for the reading thread: one that outlives the interpreter aborts the process."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self._reader.join(CLOSE_LIMIT_S)
        self.engine.close()

    def send(self, message: FromEngine) -> None:
        self.connection.sendall(frame(message))

    def tell(self, deltas: list[Delta]) -> None:
        for part in frames(deltas):
            self.connection.sendall(part)

    def _wake(self) -> None:
        """From the thread that loads adapters: there is something for `Engine.step` to take."""
        self._inbox.put(WAKE)

    def _lose(self, reason: str) -> None:
        """From the thread that watches the other ranks: the engine cannot go on without them."""
        print(f"engine: {reason}", file=sys.stderr)
        self._inbox.put(None)
        end_soon()

    def _step(self) -> None:
        deltas = self.engine.step()
        if deltas:
            stepped = time.perf_counter()
            self.tell(deltas)
            self.engine.report.output_s += time.perf_counter() - stepped

    def _handle(self, message: ToEngine) -> None:
        if isinstance(message, Submit):
            try:
                with panics_as_errors():
                    self.engine.add(
                        message.request_id,
                        message.prompt,
                        message.params,
                        scheduling=message.scheduling,
                        age_s=message.age_s,
                        embedding=message.embedding,
                        siblings=[(one.request_id, one.params) for one in message.siblings],
                        adapter=message.adapter,
                    )
            except (ParameterError, ValueError, PanicError) as error:
                self.tell([refusal(one, error) for one in message.ids])
            except (GrammarsFullError, GrammarsLostError) as error:  # it may be right, and was when it was checked
                self.tell([Delta(one, [], "error", error=str(error), unavailable=True) for one in message.ids])
        elif isinstance(message, Finish):
            if self.engine.finish(message.request_id):
                self.tell([Delta(message.request_id, [], message.reason)])
        elif isinstance(message, StatsRequest):
            self.send(stats_of(self.engine, message.ticket))
        elif isinstance(message, ListAdapters):
            adapters = self.engine.arrivals.adapters
            self.send(AdapterList(message.ticket, [] if adapters is None else adapters.infos()))
        elif isinstance(message, ListTenants):
            routing = self.engine.routing
            self.send(TenantList(message.ticket, TenantsReport() if routing is None else routing.tenant_report()))
        elif isinstance(message, CheckGrammar):
            self._check(message.ticket, message.asked)
        elif isinstance(message, ForgetGrammar):
            self._checks.pop(message.ticket, lambda: None)()

    def _check(self, ticket: int, asked: StructuredOutputs) -> None:
        """Answers by the inbox, which the thread of the grammars may put something into."""

        def told(fault: Exception | None) -> None:
            self._inbox.put(GrammarChecked(ticket, str(fault or ""), lost=isinstance(fault, GrammarsLostError)))

        try:
            self._checks[ticket] = self.engine.usable_grammars().check(asked, told)
        except (ParameterError, GrammarsFullError, GrammarsLostError) as error:
            full, lost = isinstance(error, GrammarsFullError), isinstance(error, GrammarsLostError)
            self.send(GrammarChecked(ticket, str(error), full, lost))

    def _receive(self) -> None:
        message: ToEngine | None = None
        try:
            while (message := receive(self.connection)) is not None:
                self._inbox.put(message)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            print(f"engine: the API process's messages cannot be read: {error}", file=sys.stderr)
        finally:
            self._inbox.put(None)


def main(descriptor: int) -> int:
    # Service managers send the first two to both processes at once: the API process decides when to stop, and closes
    # the connection. The last is of terminals that stop who writes to them from the background.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    start = receive(connection)
    if not isinstance(start, Start):
        return 1
    limit_sending(connection, SEND_TIMEOUT_S)
    try:
        seal = Fingerprint(resolve_model(start.config.model))
        with panics_as_errors():
            engine, model = start_engine(start.config)
        fingerprint = seal.take()
    except start_errors() as error:
        connection.sendall(frame(StartFailed(str(error))))
        return 1
    if engine.grammars is not None:
        engine.grammars.start()  # so that the first grammar need not wait for its host
    freeze()
    process = EngineProcess(connection, engine)
    hung_up = contextlib.suppress(BrokenPipeError, ConnectionResetError)
    try:
        with contextlib.closing(process), hung_up, torch.inference_mode():
            process.send(model_info(model, engine, fingerprint))
            process.run()
    except GroupLostError as error:  # a new engine has new ranks
        print(f"engine: {error}", file=sys.stderr)
        return 1
    return 0


def freeze() -> None:
    """Leave what there is now out of every later garbage collection: a full one would hold a step up."""
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
