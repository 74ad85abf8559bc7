"""How much memory loading a model takes, measured in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys, torch
from pathlib import Path
from dsc_serve.model.checkpoint import load_model
from dsc_serve.config import resolve_model

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return 1024 * int(fields["Rss"].split()[0])

torch.set_num_threads(1)
load_model(resolve_model("dsc-tiny"), "float32", torch.device("cpu"))  # what is loaded once, by any model
before = resident()
model = load_model(Path(sys.argv[1]), "auto", torch.device("cpu"), weights="stored")
print(resident() - before, sum(model.held.values()))
"""


def resident_growth(path: Path) -> tuple[int, int]:
    """Bytes that a process has grown by when it has loaded the model at a path, and the model's own account of them."""
    ran = subprocess.run([sys.executable, "-c", PROGRAM, str(path)], stdout=subprocess.PIPE, text=True, check=True)
    grown, held = map(int, ran.stdout.split())
    return grown, held
