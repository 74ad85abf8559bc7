"""Runs the kernels' checks under Triton's interpreter, in processes of their own.

Triton decides when a kernel is defined whether to interpret it, so a process that interprets cannot also compile. The
interpreter keeps to one core: several processes share the checks.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

CHECKS = sorted(map(str, (Path(__file__).parent / "interpreted").glob("check_*.py")))
PROCESSES = min(os.cpu_count() or 1, 4)

pytest.importorskip("triton", reason="Triton is not installed")


def run_share(marks: str, files: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider", "-m", marks, *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def run_checks(marks: str) -> None:
    shares = [CHECKS[start::PROCESSES] for start in range(PROCESSES)]
    with ThreadPoolExecutor(PROCESSES) as pool:
        done = list(pool.map(lambda files: run_share(marks, files), shares))
    # 5: a share of which no check has these marks
    assert {share.returncode for share in done} <= {0, 5}, "\n".join(share.stdout + share.stderr for share in done)
    assert any(share.returncode == 0 for share in done)


@pytest.mark.timeout(600)
def test_checks_pass_when_interpreted() -> None:
    run_checks("not full")


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_long_checks_pass_when_interpreted() -> None:
    run_checks("full")
