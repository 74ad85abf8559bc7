"""What of a step's inputs goes to a device, and where it lies there."""

from __future__ import annotations

import numpy as np
import torch

from dsc_serve.engine.device_inputs import ALIGNMENT, CHUNKS, DeviceInputs
from dsc_serve.engine.inputs import Inputs

CPU = torch.device("cpu")
GROUPS, REQUESTS, WIDTH, TOKENS = 2, 6, 5, 9


def pair() -> tuple[Inputs, DeviceInputs]:
    """Inputs whose device is the host, where its buffers can be read."""
    inputs = Inputs(TOKENS, REQUESTS, WIDTH, CPU, GROUPS)
    device = DeviceInputs(3 + GROUPS, TOKENS, GROUPS, REQUESTS, WIDTH, CPU)
    inputs._device = device
    return inputs, device


def test_what_is_on_the_device_is_what_the_host_wrote() -> None:
    inputs, _ = pair()
    rng = np.random.default_rng(0)
    owned = [rng.integers(0, 99, (GROUPS, WIDTH)) for _ in range(REQUESTS)]
    for _ in range(30):
        requests = int(rng.integers(1, REQUESTS + 1))
        tokens = int(rng.integers(requests, TOKENS + 1))
        inputs.wait()
        inputs.tokens[:, :tokens] = torch.from_numpy(rng.integers(0, 99, (3 + GROUPS, tokens)))
        inputs.rows[:requests] = rng.integers(1, 50, requests)
        for row in range(requests):
            if rng.random() < 0.4:
                owned[row] = rng.integers(0, 99, (GROUPS, int(rng.integers(1, WIDTH + 1))))
            inputs.hold(row, owned[row])
        if rng.random() < 0.3:
            inputs.pad(requests - 1, requests, 77)
        found = inputs.on_device(tokens, requests)
        ids, positions, blocks, offsets, tables, contexts = found
        assert all(part.dtype == torch.int32 for part in found)
        columns = torch.stack((ids, positions, offsets, *blocks))
        assert torch.equal(columns.long(), inputs.tokens[:, :tokens])
        assert torch.equal(tables.long(), inputs.tables[:, :requests])
        assert torch.equal(contexts.long(), inputs.contexts[:requests])
        assert all(
            part.data_ptr() % (4 * ALIGNMENT) == ids.data_ptr() % (4 * ALIGNMENT) for part in (positions, contexts)
        )
        assert found is inputs.held(tokens, requests), "a captured step reads where it was captured"


def test_only_rows_that_changed_are_copied() -> None:
    inputs, device = pair()
    copied: list[list[int]] = []
    copy = device.copy
    device.copy = lambda *rest: (copied.append(list(rest[3])), copy(*rest))[1]  # type: ignore[method-assign]
    tables = [np.full((GROUPS, 2), row) for row in range(4)]
    for row, table in enumerate(tables):
        inputs.hold(row, table)
    inputs.on_device(3, 3)
    inputs.on_device(3, 3)
    inputs.hold(1, np.full((GROUPS, 3), 9))
    inputs.on_device(4, 4)
    inputs.pad(2, 4, 50)
    inputs.on_device(4, 4)
    inputs.pad(2, 4, 50)
    inputs.on_device(4, 4)
    assert copied == [[0, 1, 2], [], [1, 3], [2, 3], []]


def test_the_places_of_chunks_lie_where_nothing_else_does() -> None:
    """Of every size of step, with rows of tables behind them and without; on the host, too."""
    rng = np.random.default_rng(1)
    for tokens, requests in ((9, 6), (9, 1), (5, 3), (1, 1)):
        inputs, _ = pair()
        inputs.tokens[:] = torch.from_numpy(rng.integers(0, 99, inputs.tokens.shape))
        inputs.rows[:] = rng.integers(1, 50, REQUESTS)
        table = rng.integers(0, 99, (GROUPS, WIDTH))
        for row in range(requests):
            inputs.hold(row, table + row)
        chunks = [(2, 3, 4, 5), (6, 7, 8, 9)]
        inputs.place(chunks)
        ids, positions, blocks, offsets, tables, contexts = inputs.on_device(tokens, requests, placed=True)
        chunk_places = inputs.chunk_places(tokens, requests)
        assert chunk_places.tolist() == [*map(list, chunks), *[[0] * 4] * (CHUNKS - 2)]
        assert chunk_places.data_ptr() % (4 * ALIGNMENT) == ids.data_ptr() % (4 * ALIGNMENT)
        assert torch.equal(torch.stack((ids, positions, offsets, *blocks)).long(), inputs.tokens[:, :tokens])
        assert torch.equal(contexts.long(), inputs.contexts[:requests])
        assert torch.equal(tables.long(), inputs.tables[:, :requests])
        inputs.place(())
        inputs.hold(0, table + 9)
        inputs.on_device(tokens, requests, placed=True)
        assert not chunk_places.any() and torch.equal(tables.long(), inputs.tables[:, :requests])
    host = Inputs(TOKENS, REQUESTS, WIDTH, CPU, GROUPS)
    host.place([(1, 2, 3, 4)])
    assert host.chunk_places(9, 6)[0].tolist() == [1, 2, 3, 4] and host.chunk_places(1, 1) is host.chunk_places(9, 6)
