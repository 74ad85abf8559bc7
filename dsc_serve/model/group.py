"""The ranks of one host that share a model: torch's collectives, NCCL on GPUs and gloo on CPUs, counted in bytes.

The group is nobody's default: a process may have several, and one of its own besides.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]  # it is not in the list of its names

from dsc_serve.model.exchange import GroupLostError, Shard

LIMIT_S = 300.0  # that a rank waits for the others: one of them may be compiling kernels
LOOPBACK = "127.0.0.1"  # ranks are of one host, and gloo listens to nobody else


class Collectives(Protocol):
    """What of torch's groups is used here."""

    def allreduce(self, tensors: list[Tensor]) -> dist.Work: ...

    def abort(self) -> None: ...

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor]) -> dist.Work: ...


class RankGroup:
    """`RankExchange` with other processes, once connected.

    store: a file that all ranks can reach, and that nobody else writes to, for them to find each other by.
    reduced, gathered: bytes that this rank has given to sums, and to gathering.
    """

    def __init__(self, shard: Shard, store: Path, device: torch.device, limit_s: float = LIMIT_S) -> None:
        self.shard, self.reduced, self.gathered = shard, 0, 0
        self._store, self._device, self._limit = store, device, timedelta(seconds=limit_s)
        self._backend: Collectives | None = None

    def connect(self) -> None:
        """Meet the other ranks, all of which call this. Raises GroupLostError when they do not come."""
        rank, size = self.shard.rank, self.shard.size
        try:
            store = FileStore(str(self._store), size)
            store.set_timeout(self._limit)
            make = nccl_backend if self._device.type == "cuda" else gloo_backend
            self._backend = make(store, rank, size, self._limit)
            self.sum(torch.zeros(1, device=self._device))  # connections are made, and nobody needs the file any more
        except RuntimeError as error:
            raise GroupLostError(f"rank {rank} of {size} could not meet the others: {error}") from error
        self.reduced = self.gathered = 0

    def close(self) -> None:
        """Let the others go. Safe to call twice."""
        self._backend = None

    def abort(self) -> None:
        """From another thread: another rank has ended. Who waits for a GPU's exchange with it then waits no longer, and
        goes on with what is none; on CPUs the broken connection is an error by itself."""
        backend = self._backend  # which `close` may take away meanwhile
        if backend is not None and self._device.type == "cuda":
            backend.abort()

    @property
    def sent(self) -> float:
        """Bytes that this rank has sent, by rings: 2(g − 1)/g of what is summed, g − 1 times what is gathered."""
        others, size = self.shard.size - 1, self.shard.size
        return 2 * others / size * self.reduced + others * self.gathered

    def sum(self, own: Tensor) -> Tensor:
        own = own.contiguous()
        self.reduced += own.nbytes
        self._wait(lambda backend: backend.allreduce([own]))
        return own

    def gather(self, own: Tensor) -> Tensor:
        self.gathered += own.nbytes
        every = own.new_empty(self.shard.size, *own.shape)
        self._wait(lambda backend: backend.allgather([list(every.unbind(0))], [own.contiguous()]))
        return every

    def _wait(self, collective: Callable[[Collectives], dist.Work]) -> None:
        if self._backend is None:
            raise GroupLostError(f"rank {self.shard.rank} of {self.shard.size} is not connected")
        try:
            collective(self._backend).wait()
        except RuntimeError as error:
            raise GroupLostError(f"rank {self.shard.rank} has lost the others: {error}") from error


def gloo_backend(store: FileStore, rank: int, size: int, limit: timedelta) -> Collectives:
    # These are the names that all versions of torch have.
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # noqa: SLF001
    options._timeout = limit  # noqa: SLF001
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=LOOPBACK)]  # noqa: SLF001
    return cast(Collectives, dist.ProcessGroupGloo(store, rank, size, options))


def nccl_backend(store: FileStore, rank: int, size: int, limit: timedelta) -> Collectives:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = limit  # noqa: SLF001
    return cast(Collectives, dist.ProcessGroupNCCL(store, rank, size, options))
