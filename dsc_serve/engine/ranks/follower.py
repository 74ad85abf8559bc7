"""One of the ranks that share a model, but for the first: it computes its part of the steps that the first tells it.

Run as `python -P -m dsc_serve.engine.ranks.follower FD`, where FD is its end of a socket pair. It ends when the other
side hangs up, whatever it is doing then.
"""

from __future__ import annotations

import gc
import signal
import socket
import sys
from pathlib import Path

import numpy as np
import torch

from dsc_serve.config import EngineConfig
from dsc_serve.engine.kv_size import pool_blocks
from dsc_serve.engine.preparation import device_of, prepare_model, start_errors
from dsc_serve.engine.ranks.messages import (
    BlockCopies,
    RankFailed,
    RankLoaded,
    RankPool,
    RankReady,
    RankStart,
    StepInputs,
    ToRank,
    frame,
    receive,
    to_rank,
)
from dsc_serve.engine.ranks.watch import end_soon, watch
from dsc_serve.engine.runner import Runner
from dsc_serve.model.batch import StepBatch
from dsc_serve.model.decoder import Decoder
from dsc_serve.model.exchange import GroupLostError, Shard
from dsc_serve.model.group import RankGroup
from dsc_serve.panics import panics_as_errors
from dsc_serve.sampling_params import EngineCapacity


class FollowingRunner(Runner):
    """A runner without requests: it computes steps from their inputs, for its keys and values and the others' sums."""

    def __init__(self, model: Decoder, capacity: EngineCapacity, config: EngineConfig) -> None:
        int8_kv = config.kv_dtype == "int8"
        super().__init__(model, capacity, config.step_tokens, config.max_running, int8_kv=int8_kv, spare=True)
        self.routing = None  # the first rank watches
        for layer in self._layers:
            layer.trace = None

    def follow(self, message: StepInputs | BlockCopies) -> None:
        """Compute a step, or copy blocks, in inference mode."""
        if isinstance(message, BlockCopies):
            self.copy_blocks(message.pairs)
        else:
            self._layers_of(self._batch(message))

    def _batch(self, step: StepInputs) -> StepBatch:
        inputs = self._inputs
        inputs.wait()
        columns = np.frombuffer(step.columns, np.int64).reshape(len(inputs.columns), -1)
        contexts = np.frombuffer(step.contexts, np.int64)
        tokens, requests, groups = columns.shape[1], len(contexts), len(inputs.columns) - 3
        for column, told in zip(inputs.columns, columns, strict=True):
            column[:tokens] = told
        inputs.rows[:requests] = contexts
        for row, table in step.tables:
            inputs.hold(row, np.frombuffer(table, np.int64).reshape(groups, -1))
        held = inputs.on_device(tokens, requests)
        return StepBatch(*held, step.decodes, step.decode_context, step.chunks, (), step.drafted)


def follow(connection: socket.socket, start: RankStart) -> int:
    """From loading the part until the other side hangs up; returns the exit status."""
    config, shard = start.config, Shard(start.rank, start.config.tensor_parallel)
    device = device_of(config, shard.rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # where kernels are launched that name none
    group = RankGroup(shard, Path(start.store), device)
    try:
        with panics_as_errors():
            model = prepare_model(config, group)
            blocks = pool_blocks(model, config)
    except start_errors() as error:
        connection.sendall(frame(RankFailed(str(error))))
        return 1
    connection.sendall(frame(RankLoaded(blocks)))
    message: ToRank = receive(connection, to_rank)
    assert isinstance(message, RankPool)
    try:
        with panics_as_errors():
            runner = FollowingRunner(model, message.capacity, config)
    except start_errors() as error:
        tokens = message.capacity.num_blocks * config.block_size
        connection.sendall(frame(RankFailed(f"keys and values of {tokens} tokens: {error}; lower kv_tokens")))
        return 1
    connection.sendall(frame(RankReady()))
    group.connect()
    gc.collect()
    gc.freeze()  # a full collection would hold a step of all ranks up
    with torch.inference_mode():
        while True:
            message = receive(connection, to_rank)
            assert isinstance(message, StepInputs | BlockCopies)
            runner.follow(message)


def main(descriptor: int) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):  # the rank that leads decides when to stop; it closes the connection
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=descriptor)
    try:
        start: ToRank = receive(connection, to_rank)
        if not isinstance(start, RankStart):
            return 1
        watch({0: connection}, lambda leader: end_soon())
        return follow(connection, start)
    except (EOFError, ConnectionError):  # it is the end
        return 0
    except GroupLostError as error:
        print(f"rank: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1])))
