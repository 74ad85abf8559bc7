"""The `dsc-serve` command with the engine of faulty_engine.py."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from clock import let_the_clock_jump

from dsc_serve.cli import main
from dsc_serve.server import process
from dsc_serve.worker.supervisor import EngineSupervisor

if __name__ == "__main__":
    let_the_clock_jump()
    engine = (sys.executable, str(Path(__file__).with_name("faulty_engine.py")))
    process.EngineSupervisor = functools.partial(EngineSupervisor, command=engine)  # type: ignore[misc,assignment]
    main()
