"""The servers that tests of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.running_server import RunningServer, start_server, stop_server


@pytest.fixture(scope="session")
def tiny() -> Iterator[RunningServer]:
    """The embedded model, served with its defaults."""
    server = start_server()
    yield server
    assert stop_server(server) == 0


@pytest.fixture(scope="session")
def golden_server(golden_folder: Callable[[str], Path]) -> Iterator[RunningServer]:
    """The reference script's DSC checkpoint: no tokenizer, 32 positions."""
    server = start_server(str(golden_folder("dsc")), "--dtype", "fp32", "--kv-tokens", "96")
    yield server
    assert stop_server(server) == 0
