"""A thread that notices when one of several processes has hung up, whatever this one is waiting for."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Mapping

GRACE_S = 1.0  # that a process has to end by itself, before it is ended in the middle of what it waits for


def watch(connections: Mapping[int, socket.socket], hung_up: Callable[[int], None]) -> threading.Thread:
    """Call this once, from a thread, with the number of the first that hangs up, or is hung up on here."""
    poll = select.poll()
    numbers = {connection.fileno(): number for number, connection in connections.items()}
    for descriptor in numbers:
        poll.register(descriptor, select.POLLRDHUP)

    def wait() -> None:
        (descriptor, _), *_ = poll.poll()
        hung_up(numbers[descriptor])

    thread = threading.Thread(target=wait, name="ranks", daemon=True)
    thread.start()
    return thread


def end_soon() -> None:
    """End this process after a while, even where a collective never returns."""
    timer = threading.Timer(GRACE_S, os._exit, (1,))
    timer.daemon = True
    timer.start()
