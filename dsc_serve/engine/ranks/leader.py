"""The first of the ranks that share a model: it starts the others and tells them each step, then computes its own."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dsc_serve.config import ConfigError, EngineConfig, engine_environment
from dsc_serve.engine.inputs import Inputs
from dsc_serve.engine.preparation import check_devices, device_of
from dsc_serve.engine.ranks.messages import (
    BlockCopies,
    FromRank,
    RankFailed,
    RankLoaded,
    RankPool,
    RankStart,
    StepInputs,
    ToRank,
    frame,
    from_rank,
    receive,
)
from dsc_serve.engine.ranks.watch import watch
from dsc_serve.engine.request import Request
from dsc_serve.engine.runner import Runner
from dsc_serve.engine.step_result import StepResult
from dsc_serve.frames import limit_sending
from dsc_serve.machine import default_threads
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.exchange import GroupLostError, Shard
from dsc_serve.model.ffn.picks import Picks
from dsc_serve.model.group import RankGroup
from dsc_serve.sampling_params import EngineCapacity

# -P: the modules that this process has, not what lies in the working directory under their names.
FOLLOWER = (sys.executable, "-P", "-m", "dsc_serve.engine.ranks.follower")
LOAD_LIMIT_S = 3600.0
POOL_LIMIT_S = 300.0
SEND_LIMIT_S = 60.0
LOOK_S = 0.1  # between looks at whether a rank has ended that others wait for
CLOSE_LIMIT_S = 5.0


class Ranks:
    """The processes of the other ranks, from their start to `close`, and this one's group with them.

    on_lost: told once, from another thread, when one of them has ended before that.
    """

    def __init__(self, config: EngineConfig) -> None:
        """Each begins to load its part. Raises ConfigError where there are not as many devices."""
        check_devices(config)
        size = config.tensor_parallel
        self._folder = tempfile.TemporaryDirectory(prefix="dsc-serve-ranks-")
        store = Path(self._folder.name) / "store"
        self.group = RankGroup(Shard(0, size), store, device_of(config, 0))
        self._lock, self._lost = threading.Lock(), ""
        self._on_lost: Callable[[str], None] = lambda reason: None
        self._connections: dict[int, socket.socket] = {}
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._watch: threading.Thread | None = None
        weakref.finalize(self, hang_up, self._connections)  # also where nobody closes it
        try:
            for rank in range(1, size):
                self._start(config, rank, store)
        except BaseException:
            self.close()
            raise
        told = weakref.WeakMethod(self._hung_up)

        def hung_up(rank: int) -> None:
            if (tell := told()) is not None:
                tell(rank)

        self._watch = watch(self._connections, hung_up)

    def _start(self, config: EngineConfig, rank: int, store: Path) -> None:
        ours, theirs = socket.socketpair()
        self._connections[rank] = ours
        limit_sending(ours, SEND_LIMIT_S)
        threads = (config.threads or default_threads()) // config.tensor_parallel
        with theirs:
            self._processes[rank] = subprocess.Popen(
                (*FOLLOWER, str(theirs.fileno())),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=engine_environment(max(1, threads)),
            )
        ours.sendall(frame(RankStart(config, rank, str(store))))

    @property
    def pids(self) -> list[int]:
        """Of the other ranks' processes."""
        return [process.pid for process in self._processes.values()]

    @property
    def on_lost(self) -> Callable[[str], None]:
        return self._on_lost

    @on_lost.setter
    def on_lost(self, told: Callable[[str], None]) -> None:
        with self._lock:
            self._on_lost = told
            lost = self._lost
        if lost:
            told(lost)

    def blocks(self, own: int) -> int:
        """KV blocks that every rank has room for, of which this one has so many, once all have loaded their parts.

        Raises ConfigError where one could not.
        """
        answers = self._answers("loaded its part", LOAD_LIMIT_S)
        return min(own, *(message.blocks for message in answers if isinstance(message, RankLoaded)))

    def _answers(self, done: str, limit_s: float) -> list[FromRank]:
        """What all say once they have done that. Raises ConfigError where one has not, after so long at most."""
        answers, end = list[FromRank](), time.monotonic() + limit_s
        for rank, connection in self._connections.items():
            try:
                message = receive(connection, from_rank, end)
            except TimeoutError:
                raise ConfigError(f"tensor_parallel: rank {rank} has not {done} within {limit_s:g} s") from None
            except (OSError, EOFError):
                what = f"rank {rank} ended before it had {done}"
                raise ConfigError(f"tensor_parallel: {what}; its message is above, if it had one") from None
            if isinstance(message, RankFailed):
                raise ConfigError(f"tensor_parallel: rank {rank}: {message.error}")
            connection.settimeout(None)
            answers.append(message)
        return answers

    def runner(self, model: Decoder, config: EngineConfig, capacity: EngineCapacity) -> LeadingRunner:
        """What computes steps with all ranks, which have met then. Raises ConfigError and GroupLostError."""
        return LeadingRunner(self, model, config, capacity)

    def begin(self, capacity: EngineCapacity) -> None:
        """Have all make their KV pools and meet. Raises ConfigError where one cannot, and GroupLostError."""
        self.tell(RankPool(capacity))
        self._answers("made its pool", POOL_LIMIT_S)
        self._meet()
        self._folder.cleanup()

    def _meet(self) -> None:
        """Connect the group, but wait for nobody who has ended. Raises GroupLostError."""
        met: queue.SimpleQueue[GroupLostError | None] = queue.SimpleQueue()

        def connect() -> None:
            try:
                self.group.connect()
                met.put(None)
            except GroupLostError as error:
                met.put(error)

        threading.Thread(target=connect, name="ranks-meet", daemon=True).start()
        while True:
            try:
                failed = met.get(timeout=LOOK_S)
            except queue.Empty:
                failed = GroupLostError(self._lost) if self._lost else None
                if failed is None:
                    continue
            if failed is not None:
                raise failed
            return

    def tell(self, message: ToRank) -> None:
        """Raises GroupLostError where they have ended."""
        body = frame(message)
        if not self._lost:
            try:
                for connection in self._connections.values():
                    connection.sendall(body)
            except OSError as error:
                self._lose(f"a rank takes no message: {error}")
        if self._lost:
            raise GroupLostError(self._lost)

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Around what this rank computes of a step that it has told: the others compute all of it, or end.

        Raises GroupLostError where it does not come to its end, whatever the reason.
        """
        try:
            yield
        except BaseException as error:
            self._lose(f"the ranks that share the model have not computed the same: {type(error).__name__}: {error}")
            hang_up(self._connections)
            if isinstance(error, Exception):
                raise GroupLostError(self._lost) from error
            raise

    def close(self) -> None:
        """End the other ranks, and wait for them. Safe to call twice."""
        with self._lock:
            self._on_lost = lambda reason: None
            self._lost = self._lost or "the ranks that share the model have been ended"
        hang_up(self._connections)
        self.group.close()
        for process in self._processes.values():
            try:
                process.wait(CLOSE_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._watch is not None and self._watch is not threading.current_thread():
            self._watch.join(CLOSE_LIMIT_S)
        for connection in self._connections.values():
            connection.close()
        self._folder.cleanup()

    def _hung_up(self, rank: int) -> None:
        self._lose(f"rank {rank} of {self.group.shard.size} has ended")

    def check(self) -> None:
        """Raises GroupLostError where a rank has ended, and what was computed since is no group's."""
        if self._lost:
            raise GroupLostError(self._lost)

    def _lose(self, reason: str) -> None:
        with self._lock:
            first, self._lost = not self._lost, self._lost or reason
        if first:
            self._on_lost(reason)
            self.group.abort()  # may wait for the device


def hang_up(connections: Mapping[int, socket.socket]) -> None:
    """Who is on the other sides ends then. Safe to call twice."""
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


class LeadingInputs(Inputs):
    """A step's inputs, with what of them other ranks have not been told yet."""

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # type: ignore[arg-type]
        self._untold: dict[int, NDArray[np.int64]] = {}  # tables by their rows

    def hold(self, row: int, table: NDArray[np.int64]) -> None:
        if self._held[row] is not table:
            self._untold[row] = table
        super().hold(row, table)

    def spare(self, row: int, block: int) -> None:
        super().spare(row, block)
        self._untold[row] = self._tables[:, row].copy()

    def told(self, batch: StepBatch) -> StepInputs:
        """The inputs of this step, once all are in the buffers."""
        tokens, requests = batch.token_ids.shape[0], batch.context_lens.shape[0]
        assert isinstance(batch.chunks, tuple), "steps that ranks share are not captured"
        rows = [row for row in self._untold if row < requests]
        return StepInputs(
            self.tokens[:, :tokens].numpy().tobytes(),
            self.rows[:requests].tobytes(),
            [(row, self._untold.pop(row).tobytes()) for row in rows],
            batch.decodes,
            batch.decode_context,
            batch.chunks,
            batch.drafted,
        )


class LeadingRunner(Runner):
    """A runner that has other ranks compute each step with it. Their outputs are its own: it alone needs the logits."""

    inputs_kind = LeadingInputs

    def __init__(self, ranks: Ranks, model: Decoder, config: EngineConfig, capacity: EngineCapacity) -> None:
        int8_kv = config.kv_dtype == "int8"
        super().__init__(model, capacity, config.step_tokens, config.max_running, int8_kv=int8_kv, spare=True)
        self._ranks = ranks
        ranks.begin(capacity)
        if model.device.type != "cpu":
            self.warm_up()  # all ranks do

    def _layers_of(self, batch: StepBatch, picks: list[Picks] | None = None) -> Tensor:
        assert isinstance(self._inputs, LeadingInputs)
        self._ranks.tell(self._inputs.told(batch))
        with self._ranks.step():
            return super()._layers_of(batch, picks)

    def _run(self, work: Sequence[tuple[Request, int]]) -> StepResult:
        result = super()._run(work)
        self._ranks.check()  # a device does not tell that an exchange was broken off
        return result

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        self._ranks.tell(BlockCopies(list(pairs)))
        super().copy_blocks(pairs)
