"""Compiles kernels as they are chained, and tells what of it is in their code: {target: {kernel: findings}} as JSON.

A script, since it cannot share a process with interpreted kernels; its argument is the target.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from dsc_kernels import aot

WAIT, NEXT = "griddepcontrol.wait", "griddepcontrol.launch_dependents"
MEMORY = re.compile(r"^\s*(?:@%p\d+\s+)?(?:(?:ld|st)(?:\.volatile)?\.global|cp\.async|red\.|atom\.)", re.MULTILINE)


def findings(compiled: Any) -> dict[str, Any]:
    """How often the instructions stand in PTX, whether no access to memory stands before them, and the option."""
    text = compiled.asm.get("ptx", "")
    first = MEMORY.search(text)
    return {
        "waits": text.count(WAIT),
        "begins": text.count(NEXT),
        "first": first is not None and text.find(WAIT) < first.start(),
        "launch_pdl": bool(getattr(compiled.metadata, "launch_pdl", False)),
        "mentioned": any("griddepcontrol" in str(code) for code in compiled.asm.values()),
    }


if __name__ == "__main__":
    (target,) = sys.argv[1:]
    print(json.dumps({job.name: findings(aot.compile_job(job, target)) for job in aot.jobs("paper", target)}))
